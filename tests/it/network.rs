//! Our own client on networks that are slow, silent, cut or lie: one script through every fault that the proxy knows. What was confirmed is
//! consumed at least once, what was not is reported, and every future resolves.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use amqp::client::{
    self, Channel, Connection, ConnectionEvent, Error, Events, Message, Options, Publisher,
    PublisherOptions, Recovery,
};
use kernel::{Task, spawn, timeout_after};
use rig::{Broker, Direction, PATIENCE, Proxy, unique};

use crate::ledger::{Ledger, Producer, consume};

fn run(body: impl Future<Output = Result<(), Error>>) {
    kernel::run(timeout_after(3 * PATIENCE, body))
        .unwrap()
        .unwrap();
}

fn options() -> Options {
    Options {
        // Silence is told from a slow network by this alone.
        heartbeat: Some(2),
        connect_timeout: Duration::from_secs(5),
        recovery: Some(Recovery {
            first_wait: Duration::from_millis(20),
            max_wait: Duration::from_millis(500),
            attempts: None,
        }),
        ..Options::default()
    }
}

/// A producer and a consumer, each with a connection through the proxy.
struct Script {
    proxy: Proxy,
    sender: Connection,
    taker: Connection,
    events: [Events; 2],
    queue: String,
    ledger: Rc<Ledger>,
    consuming: Task<Result<(), Error>>,
    producer: Producer,
}

impl Script {
    async fn start(broker: &Broker) -> Result<Self, Error> {
        let proxy = Proxy::to(broker.address());
        let url = broker.url_through(proxy.address());
        let sender = client::connect(&url, options()).await?;
        let taker = client::connect(&url, options()).await?;
        let events = [sender.events(), taker.events()];
        let queue = unique("network");
        let channel = taker.channel().await?;
        channel.queue(&queue).durable().declare().await?;
        let ledger = Rc::<Ledger>::default();
        let consumer = channel.consume(&queue).prefetch(20).start().await?;
        let consuming = spawn(consume(consumer, Rc::clone(&ledger)));
        let producer = Producer::start(&sender, &queue, &ledger);
        let script = Self {
            proxy,
            sender,
            taker,
            events,
            queue,
            ledger,
            consuming,
            producer,
        };
        script.ledger.goes_on(60).await?;
        Ok(script)
    }

    /// Waits until both connections have been lost and are back.
    async fn recovers(&mut self) -> Result<(), Error> {
        for events in &mut self.events {
            loop {
                match events.next().await? {
                    Some(ConnectionEvent::Recovered { .. }) => break,
                    Some(ConnectionEvent::GaveUp(error)) => return Err(error),
                    Some(_) => {}
                    None => panic!("no more events, and not recovered"),
                }
            }
        }
        Ok(())
    }

    /// Everything that was confirmed comes, and nothing was given up.
    async fn end(self) -> Result<(), Error> {
        self.ledger.goes_on(60).await?;
        self.producer.stop().await?;
        self.ledger.is_balanced().await?;
        assert_eq!(self.ledger.unconfirmed(), 0, "all were published again");
        drop(self.consuming);
        let channel = self.sender.channel().await?;
        channel.delete_queue(&self.queue).await?;
        for connection in [&self.sender, &self.taker] {
            let _ = connection.close(PATIENCE).await?;
        }
        Ok(())
    }
}

#[test]
fn a_slow_network_costs_time_and_no_connection() {
    let broker = Broker::under_test();
    run(async {
        let mut script = Script::start(&broker).await?;
        script.proxy.delay(Duration::from_millis(5));
        script.ledger.goes_on(60).await?;
        script.proxy.heal();
        script.proxy.throttle(1_000_000);
        script.ledger.goes_on(60).await?;
        script.proxy.heal();
        script.proxy.slice(999);
        script.ledger.goes_on(60).await?;
        script.proxy.heal();
        for events in &mut script.events {
            let moment = Duration::from_millis(1);
            while let Some(event) = kernel::drop_after(moment, events.next()).await {
                let event = event?;
                let is_lost = matches!(event, None | Some(ConnectionEvent::Lost(_)));
                assert!(!is_lost, "{event:?}");
            }
        }
        script.end().await
    });
}

#[test]
fn a_network_of_single_bytes_carries_the_whole_life_of_a_connection() {
    let broker = Broker::under_test();
    run(async {
        for bytes in [1, 2, 3, 7] {
            let proxy = Proxy::to(broker.address());
            proxy.slice(bytes);
            let connection =
                client::connect(&broker.url_through(proxy.address()), options()).await?;
            there_and_back(&connection).await?;
            let _ = connection.close(PATIENCE).await?;
        }
        Ok(())
    });
}

#[test]
fn connections_cut_at_any_byte_either_way_lose_nothing() {
    let broker = Broker::under_test();
    run(async {
        let mut script = Script::start(&broker).await?;
        for direction in Direction::BOTH {
            // Between frames, in the head of one, in a body of several frames, in the handshake that comes after the cut before.
            for bytes in [0, 1, 9, 150, 700, 3_001, 131_073, 250_000] {
                script.proxy.cut_after(direction, bytes);
                script.ledger.goes_on(20).await?;
            }
        }
        script.proxy.heal();
        script.proxy.reset();
        script.recovers().await?;
        script.end().await
    });
}

#[test]
fn silence_both_ways_or_one_way_is_a_loss_and_ends_with_nothing_lost() {
    let broker = Broker::under_test();
    run(async {
        let mut script = Script::start(&broker).await?;
        for silent in [
            &[Direction::ToServer][..],
            &[Direction::ToClient],
            &Direction::BOTH,
        ] {
            for &direction in silent {
                script.proxy.half_open(direction);
            }
            for events in &mut script.events {
                while !matches!(events.next().await?, Some(ConnectionEvent::Lost(_))) {}
            }
            script.proxy.heal();
            script.recovers().await?;
            script.ledger.goes_on(60).await?;
        }
        script.end().await
    });
}

/// Declares, publishes with confirms, consumes and acks.
async fn there_and_back(connection: &Connection) -> Result<(), Error> {
    let channel = connection.channel().await?;
    let queue = channel.queue("").exclusive().declare().await?.name;
    let publisher = connection.publisher(PublisherOptions::default()).await?;
    let mut consumer = channel.consume(&queue).prefetch(3).start().await?;
    for size in [0, 1, 10, 100, 1_000] {
        let body = vec![7; size];
        let message = Message::new(&body).key(&queue);
        publisher.send(message.mandatory()).await?;
        let Some(delivery) = consumer.next().await? else {
            return Err(Error::Closed);
        };
        delivery.ack();
    }
    publisher.close().await?;
    channel.delete_queue(&queue).await?;
    channel.close().await
}

#[test]
fn a_byte_that_is_wrong_anywhere_hangs_and_breaks_nobody() {
    let broker = Broker::under_test();
    let options = Options {
        heartbeat: Some(2),
        connect_timeout: Duration::from_millis(500),
        rpc_timeout: Duration::from_millis(500),
        recovery: None,
        ..Options::default()
    };
    run(async {
        let (mut fine, mut broken) = (0, 0);
        for direction in Direction::BOTH {
            // The whole script is some 2,900 bytes either way, and as many to the broker again.
            for at in (0..3_000).step_by(61) {
                let proxy = Proxy::to(broker.address());
                proxy.corrupt_after(direction, at);
                let url = broker.url_through(proxy.address());
                let Ok(connection) = client::connect(&url, options.clone()).await else {
                    broken += 1;
                    continue;
                };
                // A length that has grown swallows what comes next without a word, and only the one who waits can tell.
                let patience = Duration::from_secs(1);
                let outcome = timeout_after(patience, there_and_back(&connection)).await;
                if outcome.is_ok() {
                    fine += 1;
                } else {
                    broken += 1;
                }
                let _ = connection.close(Duration::from_millis(200)).await?;
                let _ = connection.closed().await?;
            }
        }
        assert!(fine > 0 && broken > 0, "{fine} fine, {broken} broken");
        let connection = client::connect(&broker.url(), Options::default()).await?;
        there_and_back(&connection).await?;
        let _ = connection.close(PATIENCE).await?;
        Ok(())
    });
    let complaints = broker.complaints();
    assert!(complaints.is_empty(), "{complaints:?}");
}

/// A publisher whose next answer will be the payload of a frame that is never whole, for a wrong length swallows all that follows.
struct AboutToBeSwallowed {
    connection: Connection,
    channel: Channel,
    queue: String,
    publisher: Publisher,
    proxy: Proxy,
}

impl AboutToBeSwallowed {
    async fn start(broker: &Broker, heartbeat: u16) -> Result<Self, Error> {
        let proxy = Proxy::to(broker.address());
        let options = Options {
            heartbeat: Some(heartbeat),
            rpc_timeout: Duration::from_secs(2),
            ..options()
        };
        let connection = client::connect(&broker.url_through(proxy.address()), options).await?;
        let queue = unique("network");
        let channel = connection.channel().await?;
        channel.queue(&queue).durable().declare().await?;
        let options = PublisherOptions {
            confirm_timeout: Duration::from_secs(8),
            ..PublisherOptions::default()
        };
        let publisher = connection.publisher(options).await?;
        let scene = Self {
            connection,
            channel,
            queue,
            publisher,
            proxy,
        };
        scene.publisher.send(scene.message()).await?;
        // The third of four bytes of the next frame's length.
        scene.proxy.corrupt_after(Direction::ToClient, 5);
        Ok(scene)
    }

    fn message(&self) -> Message<'_> {
        Message::new(b"x").key(&self.queue).mandatory()
    }

    /// There are so many messages in the queue.
    async fn end(self, messages: u32) -> Result<(), Error> {
        assert_eq!(self.channel.purge_queue(&self.queue).await?, messages);
        self.channel.delete_queue(&self.queue).await?;
        let _ = self.connection.close(PATIENCE).await?;
        Ok(())
    }
}

/// What the connection tells until it is there again.
async fn until_recovered(events: &mut Events) -> Result<Vec<ConnectionEvent>, Error> {
    let mut seen = Vec::new();
    while let Some(event) = events.next().await? {
        let is_last = matches!(event, ConnectionEvent::Recovered { .. });
        seen.push(event);
        if is_last {
            break;
        }
    }
    Ok(seen)
}

#[test]
fn heartbeats_that_a_wrong_length_has_swallowed_are_no_sign_of_life() {
    let broker = Broker::under_test();
    run(async {
        let scene = AboutToBeSwallowed::start(&broker, 2).await?;
        let mut events = scene.connection.events();
        scene.publisher.send(scene.message()).await?;
        let seen = until_recovered(&mut events).await?;
        let is_lost = |event: &ConnectionEvent| match event {
            ConnectionEvent::Lost(why) => why.to_string().contains("no sign of life"),
            _ => false,
        };
        assert!(is_lost(&seen[0]), "{seen:?}");
        // The server had the second twice.
        scene.end(3).await
    });
}

/// Accepts: amqp/R18
#[test]
fn a_confirm_that_a_wrong_length_has_swallowed_is_reported_where_there_are_no_heartbeats() {
    let broker = Broker::under_test();
    run(async {
        let scene = AboutToBeSwallowed::start(&broker, 0).await?;
        let mut events = scene.connection.events();
        let late = scene.publisher.publish(scene.message()).await?;
        kernel::sleep(Duration::from_secs(5)).await?;
        let young = scene.publisher.publish(scene.message()).await?;
        match late.await {
            Err(Error::Unconfirmed(why)) => assert!(why.to_string().contains("8 s"), "{why}"),
            other => panic!("{other:?}"),
        }
        let seen = until_recovered(&mut events).await?;
        let is_late = |event: &ConnectionEvent| match event {
            ConnectionEvent::ConfirmsLate { unconfirmed, .. } => *unconfirmed == 1,
            _ => false,
        };
        assert!(is_late(&seen[0]), "{seen:?}");
        // It was published again, on another connection, since nothing was understood on this one.
        assert!(matches!(seen[1], ConnectionEvent::Lost(_)), "{seen:?}");
        young.await?;
        scene.publisher.send(scene.message()).await?;
        // The server had them all, and one of them twice.
        scene.end(5).await
    });
}
