//! RabbitMQ nodes of the test's own that are killed, stopped, started again and put under pressure, as no shared one can be.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use amqp::client::{
    self, Busy, Channel, Connection, ConnectionEvent, Error, Events, Message, Options,
    PublisherOptions, Recovery,
};
use kernel::{run_in_thread, spawn, timeout_after};
use rig::{PATIENCE, Rabbit};

use crate::ledger::{Ledger, Producer, consume};

/// Nodes start in seconds, but not where the machine does much else.
const LONG: Duration = Duration::from_secs(500);

fn run(body: impl Future<Output = Result<(), Error>>) {
    kernel::run(timeout_after(LONG, body)).unwrap().unwrap();
}

fn options() -> Options {
    Options {
        recovery: Some(Recovery {
            first_wait: Duration::from_millis(50),
            max_wait: Duration::from_millis(500),
            attempts: None,
        }),
        // A node that is on its way down or up accepts and says nothing.
        connect_timeout: Duration::from_secs(20),
        rpc_timeout: Duration::from_secs(60),
        ..Options::default()
    }
}

/// Does something to the nodes while the clients go on.
async fn with<T: Send + 'static>(
    rabbit: &Arc<Rabbit>,
    what: impl FnOnce(&Rabbit) -> T + Send + 'static,
) -> T {
    let rabbit = Arc::clone(rabbit);
    let done = run_in_thread(move || what(&rabbit)).await;
    done.expect("nobody interrupts it")
}

async fn until(
    events: &mut Events,
    wanted: impl Fn(&ConnectionEvent) -> bool,
) -> Result<(), Error> {
    while let Some(event) = events.next().await? {
        if wanted(&event) {
            return Ok(());
        }
    }
    panic!("the connection was given up");
}

fn is_recovered(event: &ConnectionEvent) -> bool {
    matches!(event, ConnectionEvent::Recovered { .. })
}

async fn closed(connection: &Connection) -> Result<(), Error> {
    let _ = connection.close(PATIENCE).await?;
    Ok(())
}

/// While a producer and a consumer are at work, each over a connection of its own, `disturb`s the nodes; that may lose nothing that was confirmed.
async fn under_load(
    rabbit: &Arc<Rabbit>,
    queue_type: &str,
    disturb: impl AsyncFnOnce(&Connection, &Ledger) -> Result<(), Error>,
) -> Result<(), Error> {
    let sender = client::connect(&rabbit.url(), options()).await?;
    let taker = client::connect(&rabbit.url(), options()).await?;
    let channel = sender.channel().await?;
    let queue = channel.queue("tasks").durable();
    queue.arg("x-queue-type", queue_type).declare().await?;
    let ledger = Rc::<Ledger>::default();
    let consumer = taker.channel().await?.consume("tasks");
    let consumer = consumer.prefetch(20).start().await?;
    let consuming = spawn(consume(consumer, Rc::clone(&ledger)));
    let producer = Producer::start(&sender, "tasks", &ledger);

    ledger.goes_on(200).await?;
    disturb(&sender, &ledger).await?;
    ledger.goes_on(200).await?;
    producer.stop().await?;
    ledger.is_balanced().await?;
    assert_eq!(ledger.unconfirmed(), 0, "all were published again");
    drop(consuming);
    closed(&taker).await?;
    closed(&sender).await
}

/// Accepts: feature/cluster
#[test]
fn the_leader_of_a_quorum_queue_is_killed_and_nothing_confirmed_is_lost() {
    let rabbit = Arc::new(Rabbit::cluster(3));
    run(under_load(&rabbit, "quorum", async |sender, _| {
        let mut events = sender.events();
        let leader = loop {
            // What a queue leads is the node it was declared on: the sender is about to lose its connection too.
            let fields = ["list_queues", "--no-table-headers", "leader", "online"];
            let said = with(&rabbit, move |rabbit| rabbit.control(0, &fields)).await;
            let (leader, online) = said.trim().split_once('\t').expect("two fields");
            if (0..3).all(|n| online.contains(rabbit.name(n))) {
                break (0..3)
                    .find(|&n| rabbit.name(n) == leader)
                    .expect("one of them");
            }
        };
        with(&rabbit, move |rabbit| rabbit.kill(leader)).await;
        until(&mut events, is_recovered).await
    }));
}

#[test]
fn a_node_stopped_killed_and_killed_in_the_middle_of_recovery_costs_nothing_confirmed() {
    let rabbit = Arc::new(Rabbit::start());
    run(under_load(&rabbit, "classic", async |_, ledger| {
        with(&rabbit, |rabbit| {
            rabbit.stop(0);
            rabbit.restart(0);
        })
        .await;
        ledger.goes_on(200).await?;
        with(&rabbit, |rabbit| {
            rabbit.kill(0);
            rabbit.restart(0);
            // Both clients have just been let in, and one may have its queue back and the other not.
            rabbit.kill(0);
            rabbit.restart(0);
        })
        .await;
        Ok(())
    }));
}

/// Accepts: amqp/R24, amqp/R31, feature/blocked
#[test]
fn a_node_short_of_memory_or_patience_says_so_and_publishers_wait() {
    let rabbit = Arc::new(Rabbit::start());
    run(async {
        let connection = client::connect(&rabbit.url(), options()).await?;
        publishers_wait_for_memory(&rabbit, &connection).await?;
        let eval = "application:set_env(rabbit, consumer_timeout, 1000), \
                    application:set_env(rabbit, channel_tick_interval, 250).";
        with(&rabbit, |rabbit| rabbit.control(0, &["eval", eval])).await;
        a_delivery_held_too_long_costs_its_channel(&connection.channel().await?).await?;
        closed(&connection).await
    });
}

async fn publishers_wait_for_memory(
    rabbit: &Arc<Rabbit>,
    connection: &Connection,
) -> Result<(), Error> {
    let mut events = connection.events();
    let channel = connection.channel().await?;
    channel.queue("tasks").durable().declare().await?;
    let publisher = connection.publisher(PublisherOptions::default()).await?;
    let message = Message::new(b"x").key("tasks").mandatory();
    publisher.send(message).await?;

    let watermark = |value: &'static [&'static str]| {
        with(rabbit, move |rabbit| {
            rabbit.control(0, &[&["set_vm_memory_high_watermark"], value].concat())
        })
    };
    watermark(&["0.0001"]).await;
    // The node stops a connection by the first message that it sends, which stays unread.
    let unread = publisher.publish(message).await?;
    let is_blocked = |event: &ConnectionEvent| match event {
        ConnectionEvent::Blocked(reason) => reason.contains("memory"),
        _ => false,
    };
    until(&mut events, is_blocked).await?;
    assert!(connection.is_blocked());
    let refused = publisher.post(&message);
    assert!(matches!(refused, Err(Error::Busy(Busy::Blocked))));
    let waiting = spawn({
        let connection = connection.clone();
        async move {
            let publisher = connection.publisher(PublisherOptions::default()).await?;
            publisher.send(message).await
        }
    });
    watermark(&["absolute", "1GB"]).await;
    let is_unblocked = |event: &ConnectionEvent| matches!(event, ConnectionEvent::Unblocked);
    until(&mut events, is_unblocked).await?;
    unread.await?;
    waiting.join().await.expect("it does not panic")?;
    assert_eq!(channel.purge_queue("tasks").await?, 3);
    Ok(())
}

async fn a_delivery_held_too_long_costs_its_channel(channel: &Channel) -> Result<(), Error> {
    channel.publish(Message::new(b"x").key("tasks")).await?;
    let mut consumer = channel.consume("tasks").prefetch(1).start().await?;
    let held = consumer.next().await?.expect("the one that was published");
    match consumer.next().await {
        Err(Error::AckTimeout(reason)) => assert_eq!(reason.code.0, 406),
        other => panic!("{other:?}"),
    }
    assert!(held.is_stale());
    assert!(matches!(channel.check(), Err(Error::AckTimeout(_))));
    Ok(())
}
