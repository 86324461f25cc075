//! What many messages and many connections leave behind, in our client and in the broker: no descriptor, and no memory that grows with them.
//!
//! Memory and descriptors belong to the process, so each scene has one to itself.

use std::future::Future;
use std::process::Command;
use std::time::Duration;
use std::{env, fs};

use amqp::client::{self, ConnectionEvent, Error, Message, Options, PublisherOptions, Recovery};
use kernel::{Interrupt, spawn, timeout_after};
use rig::{Broker, Deadline, PATIENCE, Process, Proxy, unique};

/// Enough that a few bytes for each would show.
const MESSAGES: u32 = if cfg!(debug_assertions) {
    160_000
} else {
    1_000_000
};
const CONNECTIONS: u32 = if cfg!(debug_assertions) { 200 } else { 5_000 };

/// In which they end on a slow machine, too.
const LIMIT: Duration = if cfg!(debug_assertions) {
    PATIENCE.saturating_mul(7)
} else {
    PATIENCE.saturating_mul(30)
};

/// What an allocator needs for its own comfort.
const SLACK: u64 = 1 << 20;

/// Plays a scene, an ignored test, in a process of its own.
pub(crate) fn play(scene: &str) {
    let mut command = Command::new(env::current_exe().expect("a running program has a path"));
    command.args(["--ignored", "--exact", "--nocapture", "--test-threads", "1"]);
    // With a threshold of its own, glibc does not keep more and more for the next time, as large pieces are freed.
    command.env("MALLOC_TRIM_THRESHOLD_", "131072").arg(scene);
    let played = Process::spawn(&mut command).ended_by(Deadline::after(LIMIT + PATIENCE));
    let played = played.expect_code(0).stdout;
    assert!(played.contains("1 passed"), "{played}");
}

fn run(body: impl Future<Output = Result<(), Error>>) {
    kernel::run(timeout_after(LIMIT, body)).unwrap().unwrap();
}

/// The processes whose growth counts: this one, and the broker if it is the test's own.
pub(crate) struct Scales(Vec<u32>);

impl Scales {
    pub(crate) fn of(broker: &Broker) -> Self {
        let own = std::process::id();
        Self(
            [Some(own), broker.process_id()]
                .into_iter()
                .flatten()
                .collect(),
        )
    }

    /// Bytes in memory, without those of files: of a program's code more is read in as more of it runs.
    pub(crate) fn memory(&self) -> Vec<u64> {
        let of = |id: &u32| {
            let status = fs::read_to_string(format!("/proc/{id}/status")).expect("it runs");
            let mut words = status
                .split_whitespace()
                .skip_while(|word| *word != "RssAnon:");
            let kibibytes = words.nth(1).expect("it says how many");
            kibibytes.parse::<u64>().expect("a number") << 10
        };
        self.0.iter().map(of).collect()
    }

    /// Open descriptors.
    pub(crate) fn descriptors(&self) -> Vec<usize> {
        let of = |id: &u32| fs::read_dir(format!("/proc/{id}/fd")).expect("it runs");
        self.0.iter().map(|id| of(id).count()).collect()
    }

    /// For people who play a scene by hand.
    pub(crate) fn tell(&self, half: &[u64], count: u32, of: &str) {
        let (memory, descriptors) = (self.memory(), self.descriptors());
        println!("{count} {of}: from {half:?} to {memory:?} bytes, {descriptors:?} descriptors");
    }

    #[track_caller]
    pub(crate) fn assert_level(&self, before: &[u64]) {
        let after = self.memory();
        let grown = before.iter().zip(&after).any(|(b, a)| *a > b + SLACK);
        assert!(!grown, "from {before:?} to {after:?} bytes");
    }

    /// Waits until there are no more descriptors than before; whoever has been left may not have noticed yet.
    pub(crate) async fn descriptors_are_back(&self, before: &[usize]) -> Result<(), Interrupt> {
        let deadline = Deadline::default();
        loop {
            let now = self.descriptors();
            if now.iter().zip(before).all(|(now, before)| now <= before) {
                return Ok(());
            }
            assert!(deadline.left().is_some(), "from {before:?} to {now:?}");
            kernel::sleep(Duration::from_millis(10)).await?;
        }
    }
}

/// Accepts: amqp/R19
#[test]
fn a_million_messages_leave_no_memory_behind() {
    play("endurance::messages");
}

#[test]
#[ignore = "a scene"]
fn messages() {
    let broker = Broker::under_test();
    let scales = Scales::of(&broker);
    run(async {
        let connection = client::connect(&broker.url(), Options::default()).await?;
        let channel = connection.channel().await?;
        let queue = unique("endurance");
        channel.queue(&queue).declare().await?;
        let mut consumer = channel.consume(&queue).prefetch(100).start().await?;
        let publishing = spawn({
            let (connection, queue) = (connection.clone(), queue.clone());
            async move {
                let publisher = connection.publisher(PublisherOptions::default()).await?;
                for n in 0..MESSAGES {
                    let message = Message::new(b"x").key(&queue).mandatory();
                    let confirm = publisher.publish(message).await?;
                    // Most of them are not looked at.
                    if n % 64 == 0 {
                        confirm.await?;
                    }
                }
                publisher.close().await
            }
        });
        let mut half = Vec::new();
        for n in 1..=MESSAGES {
            consumer.next().await?.expect("there are more").ack();
            if n == MESSAGES / 2 {
                half = scales.memory();
            }
        }
        publishing.join().await.expect("it does not panic")?;
        scales.assert_level(&half);
        scales.tell(&half, MESSAGES, "messages");
        channel.delete_queue(&queue).await?;
        let _ = connection.close(PATIENCE).await?;
        Ok(())
    });
}

/// Accepts: amqp/R37
#[test]
fn hundreds_of_lost_connections_leave_no_descriptor_and_no_memory_behind() {
    play("endurance::connections");
}

#[test]
#[ignore = "a scene"]
fn connections() {
    let broker = Broker::under_test();
    let scales = Scales::of(&broker);
    let proxy = Proxy::to(broker.address());
    let options = Options {
        recovery: Some(Recovery {
            first_wait: Duration::from_millis(1),
            max_wait: Duration::from_millis(10),
            attempts: None,
        }),
        ..Options::default()
    };
    run(async {
        let connection = client::connect(&broker.url_through(proxy.address()), options).await?;
        let mut events = connection.events();
        let channel = connection.channel().await?;
        let (exchange, queue) = (unique("endurance"), unique("endurance"));
        channel.exchange(&exchange, "fanout").declare().await?;
        channel.queue(&queue).durable().declare().await?;
        // Gone with each connection, and another one with the next.
        let other = channel.queue("").exclusive().declare().await?.name;
        let mut consumers = Vec::new();
        for queue in [&queue, &other] {
            channel.bind_queue(queue, &exchange, "").await?;
            consumers.push(channel.consume(queue).prefetch(10).start().await?);
        }
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let mut half = (Vec::new(), Vec::new());
        for n in 1..=CONNECTIONS {
            let message = Message::new(b"before").exchange(&exchange).mandatory();
            let before = publisher.publish(message).await?;
            // Half of them leave, and come twice or not.
            if n % 2 == 0 {
                kernel::yield_now().await?;
            }
            proxy.reset();
            let renamed = loop {
                match events.next().await?.expect("it is given up by nobody") {
                    ConnectionEvent::Recovered { renamed } => break renamed,
                    ConnectionEvent::EntityFailed { entity, error } => {
                        panic!("{entity:?}: {error}")
                    }
                    _ => {}
                }
            };
            assert_eq!(renamed.len(), 1, "{renamed:?}");
            before.await?;
            let body = n.to_be_bytes();
            let message = Message::new(&body).exchange(&exchange).mandatory();
            publisher.send(message).await?;
            for consumer in &mut consumers {
                loop {
                    let delivery = consumer.next().await?.expect("it goes on");
                    let is_last = *delivery.body() == body;
                    delivery.ack();
                    if is_last {
                        break;
                    }
                }
            }
            // Another that is ours to end, with a channel that goes before it.
            let short = client::connect(&broker.url(), Options::default()).await?;
            short.channel().await?.close().await?;
            let _ = short.close(PATIENCE).await?;
            if n == CONNECTIONS / 2 {
                half = (scales.memory(), scales.descriptors());
            }
        }
        scales.assert_level(&half.0);
        scales.tell(&half.0, CONNECTIONS, "connections");
        scales.descriptors_are_back(&half.1).await?;
        channel.delete_exchange(&exchange, false).await?;
        channel.delete_queue(&queue).await?;
        let _ = connection.close(PATIENCE).await?;
        Ok(())
    });
}
