//! Our own client doing anything at any moment, on a network that does anything at any moment. What was confirmed is consumed at least once,
//! every future resolves, and what all that needed is given back.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::env;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::process;
use std::rc::Rc;
use std::time::Duration;

use amqp::client::{
    self, Channel, Confirm, Connection, Consumer, Delivery, Error, Message, Options, Publisher,
    PublisherOptions, Recovery,
};
use kernel::{Interrupt, drop_after, sleep, spawn, yield_now};

use rig::{Broker, Deadline, Direction, PATIENCE, Proxy, Random, unique};

use crate::endurance::{Scales, play};

/// Each takes a third of a second; `SWEEPEA_TEST_ROUNDS` says how many there are.
const ROUNDS: u32 = if cfg!(debug_assertions) { 30 } else { 1_900 };

/// What publishers get ahead of consumers by. In memory that is less than is forgiven, so that what was needed for the longest queue does not
/// pass for something left behind, however quick the machine.
const BACKLOG: usize = 1_000;

/// Accepts: amqp/R18
#[test]
fn anything_at_any_moment_loses_nothing_and_leaves_nothing_behind() {
    play("chaos::anything_at_any_moment");
}

/// In real time, as the network is; so a seed, which `SWEEPEA_TEST_SEED` takes, repeats the deeds but not the moments.
#[test]
#[ignore = "a scene"]
fn anything_at_any_moment() {
    let told = env::var("SWEEPEA_TEST_SEED").ok();
    let seed = told.map_or_else(
        || RandomState::new().hash_one(process::id()),
        |seed| seed.parse().expect("the seed is a number"),
    );
    println!("SWEEPEA_TEST_SEED={seed}");
    let told = env::var("SWEEPEA_TEST_ROUNDS").ok();
    let rounds = told.map_or(ROUNDS, |n| n.parse().expect("the rounds are a number"));
    let broker = Broker::under_test();
    let scales = Scales::of(&broker);
    let proxy = Proxy::to(broker.address());
    let outcome: Result<(), Error> = kernel::run(async {
        let overseer = client::connect(&broker.url(), Options::default()).await?;
        let channel = overseer.channel().await?;
        let queue = unique("chaos");
        channel.queue(&queue).durable().declare().await?;
        let nothing = broker.holdings();
        let world = Rc::new(World {
            connections: RefCell::default(),
            url: broker.url_through(proxy.address()),
            queue,
            random: RefCell::new(Random::new(seed)),
            pending: RefCell::default(),
            is_calm: Cell::new(false),
            is_over: Cell::new(false),
            tally: Tally::default(),
        });
        world.play(rounds / 2, &proxy, &channel).await?;
        world.rest(&broker, &nothing, &channel).await?;
        // Both times the broker is as empty, and nobody is connected.
        let half = (scales.memory(), scales.descriptors());
        world.play(rounds - rounds / 2, &proxy, &channel).await?;
        world.rest(&broker, &nothing, &channel).await?;
        scales.descriptors_are_back(&half.1).await?;
        println!("{:?}", world.tally);
        scales.tell(&half.0, rounds, "rounds");
        scales.assert_level(&half.0);
        channel.delete_queue(&world.queue).await?;
        let _ = overseer.close(PATIENCE).await?;
        let Tally {
            confirmed,
            unconfirmed,
            seen,
            refused,
            ..
        } = &world.tally;
        let happened = [confirmed, unconfirmed, seen, refused].map(Cell::get);
        assert!(happened.iter().all(|n| *n > 0), "{:?}", world.tally);
        Ok(())
    })
    .unwrap();
    outcome.unwrap();
}

fn options() -> Options {
    Options {
        // Silence is told from a slow network by this alone.
        heartbeat: Some(1),
        connect_timeout: Duration::from_secs(5),
        rpc_timeout: Duration::from_secs(5),
        recovery: Some(Recovery {
            first_wait: Duration::from_millis(5),
            max_wait: Duration::from_millis(100),
            attempts: None,
        }),
        ..Options::default()
    }
}

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// What all have in common.
struct World {
    url: String,
    queue: String,
    /// The two of today; now and then there is another.
    connections: RefCell<Vec<Connection>>,
    random: RefCell<Random>,
    /// Publishings of which not everything is known yet.
    pending: RefCell<BTreeMap<u32, Pending>>,
    /// Nothing new is published.
    is_calm: Cell<bool>,
    is_over: Cell<bool>,
    tally: Tally,
}

#[derive(Default)]
struct Pending {
    is_confirmed: bool,
    is_seen: bool,
}

#[derive(Debug, Default)]
struct Tally {
    published: Cell<u32>,
    confirmed: Cell<u32>,
    unconfirmed: Cell<u32>,
    /// Nobody asked what became of them.
    forgotten: Cell<u32>,
    /// Deliveries, of which some come again.
    seen: Cell<u32>,
    /// Calls that failed.
    refused: Cell<u32>,
    reopened: Cell<u32>,
}

fn count(of: &Cell<u32>) -> u32 {
    of.set(of.get() + 1);
    of.get()
}

impl World {
    fn below(&self, bound: usize) -> usize {
        self.random.borrow_mut().below(bound)
    }

    fn connection(&self) -> Connection {
        let place = self.below(2);
        self.connections.borrow()[place].clone()
    }

    /// Every future resolves.
    async fn within<T>(&self, what: &str, future: impl Future<Output = T>) -> T {
        let outcome = drop_after(PATIENCE, future).await;
        outcome.unwrap_or_else(|| panic!("{what} does not resolve; {:?}", self.tally))
    }

    /// As [`within`](Self::within), for what may fail.
    async fn tries<T>(
        &self,
        what: &str,
        future: impl Future<Output = Result<T, Error>>,
    ) -> Option<T> {
        let outcome = self.within(what, future).await;
        if let Err(error) = &outcome {
            assert!(
                !matches!(error, Error::WrongAnswer { .. }),
                "{what}: {error}"
            );
            count(&self.tally.refused);
        }
        outcome.ok()
    }

    /// Has something happen to the network, for a moment.
    async fn harm(&self, proxy: &Proxy) -> Result<(), Interrupt> {
        let direction = Direction::BOTH[self.below(2)];
        match self.below(9) {
            0 | 1 => proxy.cut_after(direction, self.below(20_000) as u64),
            2 => proxy.reset(),
            3 => proxy.strand(),
            4 => proxy.pause(),
            5 => proxy.half_open(direction),
            6 => proxy.delay(ms(self.below(30) as u64)),
            7 => {
                proxy.slice(1 + self.below(999));
                proxy.throttle(20_000 + self.below(1_000_000) as u32);
            }
            _ => {
                proxy.refuse(true);
                proxy.reset();
            }
        }
        // Now and then so long that it is told from a slow network.
        let long = if self.below(30) == 0 { 3_000 } else { 0 };
        sleep(ms(20 + long + self.below(400) as u64)).await?;
        proxy.heal();
        proxy.let_go();
        sleep(ms(self.below(150) as u64)).await.map(drop)
    }

    /// Everybody lives through so many rounds, until all that was published is accounted for.
    async fn play(
        self: &Rc<Self>,
        rounds: u32,
        proxy: &Proxy,
        overseer: &Channel,
    ) -> Result<(), Error> {
        let connections = vec![self.connect().await, self.connect().await];
        self.connections.replace(connections);
        self.is_calm.set(false);
        self.is_over.set(false);
        let lives = [
            spawn(live(Rc::clone(self), publish)),
            spawn(live(Rc::clone(self), publish)),
            spawn(live(Rc::clone(self), consume)),
            spawn(live(Rc::clone(self), consume)),
            spawn(live(Rc::clone(self), ask)),
        ];
        for _ in 0..rounds {
            self.harm(proxy).await?;
            if self.below(8) == 0 {
                self.reopen().await?;
            }
        }
        self.calm_down(overseer).await?;
        self.is_over.set(true);
        for life in lives {
            let ended = self.within("a life", life.join()).await;
            ended.expect("it does not panic")?;
        }
        for connection in self.connections.take() {
            let _ = self.within("close", connection.close(PATIENCE)).await?;
        }
        Ok(())
    }

    /// Waits until the broker holds as much as before anybody came.
    async fn rest(
        &self,
        broker: &Broker,
        nothing: &Option<String>,
        overseer: &Channel,
    ) -> Result<(), Error> {
        let deadline = Deadline::default();
        let mut wait = ms(10);
        loop {
            // What was seen can come back from connections that the broker takes for lost only now.
            overseer.purge_queue(&self.queue).await?;
            let held = broker.holdings();
            if held == *nothing {
                return Ok(());
            }
            assert!(deadline.left().is_some(), "{held:?} after {nothing:?}");
            sleep(wait).await?;
            wait = (wait * 2).min(ms(1_000));
        }
    }

    async fn connect(&self) -> Connection {
        let connecting = client::connect(&self.url, options());
        let connected = self.within("connect", connecting).await;
        connected.expect("the network is sound")
    }

    /// Another connection takes the place of one.
    async fn reopen(&self) -> Result<(), Interrupt> {
        let place = self.below(2);
        let old = self.connections.borrow()[place].clone();
        let is_closed = self.below(2) == 0;
        if is_closed {
            let _ = self.within("close", old.close(ms(500))).await?;
        }
        let new = self.connect().await;
        self.connections.borrow_mut()[place] = new;
        count(&self.tally.reopened);
        Ok(())
    }

    /// Waits until everything is known of what was published, and the queue is empty.
    async fn calm_down(&self, overseer: &Channel) -> Result<(), Error> {
        self.is_calm.set(true);
        let is_quiet = async {
            loop {
                let depth = overseer.queue(&self.queue).passive().declare().await?;
                if self.pending.borrow().is_empty() && depth.messages == 0 {
                    return Ok(());
                }
                sleep(ms(10)).await?;
            }
        };
        let outcome = drop_after(2 * PATIENCE, is_quiet).await;
        outcome.unwrap_or_else(|| {
            let pending = self.pending.borrow();
            let first = pending.iter().next();
            let first = first.map(|(n, p)| (n, p.is_confirmed, p.is_seen));
            panic!("{first:?} of {} not seen; {:?}", pending.len(), self.tally)
        })
    }

    fn confirmed(&self, n: u32, outcome: &Result<(), Error>) {
        let mut pending = self.pending.borrow_mut();
        match outcome {
            Ok(()) => {
                count(&self.tally.confirmed);
                let known = pending.get_mut(&n).expect("it resolves once");
                known.is_confirmed = true;
                if known.is_seen {
                    pending.remove(&n);
                }
            }
            Err(Error::Unconfirmed(_) | Error::Nacked) => {
                count(&self.tally.unconfirmed);
                pending.remove(&n);
            }
            Err(error) => panic!("confirm of {n}: {error}"),
        }
    }

    fn seen(&self, delivery: &Delivery) {
        count(&self.tally.seen);
        let number = delivery.body()[..4].try_into().expect("four bytes");
        let n = u32::from_be_bytes(number);
        let mut pending = self.pending.borrow_mut();
        // Others have come before.
        if let Some(known) = pending.get_mut(&n) {
            known.is_seen = true;
            if known.is_confirmed {
                pending.remove(&n);
            }
        }
    }
}

/// Does the same again and again, each time with what there is now.
async fn live<F: Future<Output = Result<(), Interrupt>>>(
    world: Rc<World>,
    part: impl Fn(Rc<World>) -> F,
) -> Result<(), Interrupt> {
    while !world.is_over.get() {
        part(Rc::clone(&world)).await?;
        sleep(ms(1)).await?;
    }
    Ok(())
}

async fn publish(world: Rc<World>) -> Result<(), Interrupt> {
    if world.is_calm.get() {
        return sleep(ms(5)).await.map(drop);
    }
    let options = PublisherOptions {
        window: 1 + world.below(50),
        replay: world.below(4) > 0,
        confirm_timeout: Duration::from_secs(20),
        ..PublisherOptions::default()
    };
    let opening = world.connection();
    let Some(publisher) = world.tries("publisher", opening.publisher(options)).await else {
        return Ok(());
    };
    let mut confirms = VecDeque::new();
    for _ in 0..world.below(300) {
        let is_full = world.pending.borrow().len() >= BACKLOG;
        if is_full || world.is_calm.get() || !publish_one(&world, &publisher, &mut confirms).await {
            break;
        }
        if world.below(3) == 0
            && let Some((n, confirm)) = confirms.pop_front()
        {
            let outcome = world.within("confirm", confirm).await;
            world.confirmed(n, &outcome);
        }
        yield_now().await?;
    }
    match world.below(5) {
        0 => drop(publisher),
        1 => {
            world.tries("close", publisher.close()).await;
        }
        2 => {
            for (n, confirm) in confirms.drain(..) {
                drop(confirm);
                count(&world.tally.forgotten);
                world.pending.borrow_mut().remove(&n);
            }
        }
        _ => {
            world.tries("flush", publisher.flush()).await;
        }
    }
    for (n, confirm) in confirms {
        let outcome = world.within("confirm", confirm).await;
        world.confirmed(n, &outcome);
    }
    Ok(())
}

/// False if it was refused.
async fn publish_one(
    world: &World,
    publisher: &Publisher,
    confirms: &mut VecDeque<(u32, Confirm)>,
) -> bool {
    let n = count(&world.tally.published);
    let mut body = n.to_be_bytes().to_vec();
    // Now and then one that the network carries in several pieces.
    body.resize(if world.below(50) == 0 { 20_000 } else { 100 }, 0);
    let message = Message::new(&body).key(&world.queue).persistent();
    world.pending.borrow_mut().insert(n, Pending::default());
    let publishing = publisher.publish(message.mandatory());
    match world.tries("publish", publishing).await {
        Some(confirm) => confirms.push_back((n, confirm)),
        None => {
            world.pending.borrow_mut().remove(&n);
            return false;
        }
    }
    true
}

async fn consume(world: Rc<World>) -> Result<(), Interrupt> {
    let opening = world.connection();
    let Some(channel) = world.tries("channel", opening.channel()).await else {
        return Ok(());
    };
    let prefetch = 1 + world.below(50) as u16;
    let starting = channel.consume(&world.queue).prefetch(prefetch).start();
    let Some(mut consumer) = world.tries("consume", starting).await else {
        return Ok(());
    };
    for _ in 0..world.below(400) {
        // There may be none, for as long as it is calm.
        let Some(next) = drop_after(ms(300), consumer.next()).await else {
            if world.is_over.get() {
                break;
            }
            continue;
        };
        let Ok(Some(delivery)) = next else {
            count(&world.tally.refused);
            break;
        };
        settle(&world, delivery);
    }
    match world.below(4) {
        0 => drop(consumer),
        1 => {
            world.tries("close", channel.close()).await;
        }
        2 => drop(channel),
        _ => cancel(&world, consumer).await,
    }
    Ok(())
}

fn settle(world: &World, delivery: Delivery) {
    match world.below(20) {
        0 => drop(delivery),
        1 => {
            let _ = delivery.nack(true);
        }
        _ => {
            world.seen(&delivery);
            delivery.ack();
        }
    }
}

/// What has come can still be taken, then there is an end.
async fn cancel(world: &World, mut consumer: Consumer) {
    world.tries("cancel", consumer.cancel()).await;
    while let Some(Some(delivery)) = world.tries("the rest", consumer.next()).await {
        settle(world, delivery);
    }
}

/// Whatever has an answer.
async fn ask(world: Rc<World>) -> Result<(), Interrupt> {
    let opening = world.connection();
    let Some(channel) = world.tries("channel", opening.channel()).await else {
        return Ok(());
    };
    let declaring = channel.queue("").exclusive().declare();
    let Some(queue) = world.tries("declare", declaring).await else {
        return Ok(());
    };
    for _ in 0..world.below(50) {
        let (queue, exchange) = (queue.name.as_str(), "amq.topic");
        match world.below(6) {
            0 => drop(world.tries("qos", channel.qos(5)).await),
            1 => drop(
                world
                    .tries("bind", channel.bind_queue(queue, exchange, "#"))
                    .await,
            ),
            2 => drop(
                world
                    .tries("unbind", channel.unbind_queue(queue, exchange, "#"))
                    .await,
            ),
            3 => drop(world.tries("purge", channel.purge_queue(queue)).await),
            4 => drop(world.tries("recover", channel.recover()).await),
            _ => {
                if let Some(Some(delivery)) = world.tries("get", channel.get(&world.queue)).await {
                    settle(&world, delivery);
                }
            }
        }
        if channel.check().is_err() {
            break;
        }
    }
    world
        .tries("delete", channel.delete_queue(&queue.name))
        .await;
    Ok(())
}
