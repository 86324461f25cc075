//! Connections that are made again: cut, reset, refused, their broker killed. What was confirmed is consumed at least once, what was not
//! is told, and every future resolves.

use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use amqp::client::{
    self, Channel, Connection, ConnectionEvent, Error, Events, Message, Options, PublisherOptions,
    Recovery, Settled,
};
use kernel::{spawn, timeout_after};
use rig::{Broker, Direction, PATIENCE, Proxy, unique};

use crate::ledger::{Ledger, Producer, consume};

fn run(body: impl Future<Output = Result<(), Error>>) {
    kernel::run(timeout_after(PATIENCE, body)).unwrap().unwrap();
}

fn options() -> Options {
    Options {
        recovery: Some(Recovery {
            first_wait: Duration::from_millis(20),
            max_wait: Duration::from_millis(500),
            attempts: None,
        }),
        connect_timeout: Duration::from_secs(5),
        ..Options::default()
    }
}

/// A connection that is made again, through a proxy that breaks it.
async fn through(broker: &Broker) -> Result<(Proxy, Connection), Error> {
    let proxy = Proxy::to(broker.address());
    let url = broker.url_through(proxy.address());
    let connection = client::connect(&url, options()).await?;
    Ok((proxy, connection))
}

/// Plays a scene with a connection that is made again, behind a proxy that breaks it, and with one that nothing happens to.
fn scene(play: impl AsyncFnOnce(&Proxy, &Connection, &Connection) -> Result<(), Error>) {
    let broker = Broker::under_test();
    run(async {
        let (proxy, connection) = through(&broker).await?;
        let keeper = client::connect(&broker.url(), Options::default()).await?;
        play(&proxy, &connection, &keeper).await?;
        closed(&connection).await
    });
}

async fn closed(connection: &Connection) -> Result<(), Error> {
    let _ = connection.close(PATIENCE).await?;
    Ok(())
}

/// Waits until all is as it was; answers with everything that was told until then.
async fn recovered(events: &mut Events) -> Result<Vec<ConnectionEvent>, Error> {
    let mut seen = Vec::new();
    while let Some(event) = events.next().await? {
        let is_last = matches!(event, ConnectionEvent::Recovered { .. });
        seen.push(event);
        if is_last {
            return Ok(seen);
        }
    }
    panic!("the connection was given up: {seen:?}");
}

async fn count(channel: &Channel, queue: &str) -> Result<(u32, u32), Error> {
    let info = channel.queue(queue).passive().declare().await?;
    Ok((info.messages, info.consumers))
}

/// Accepts: amqp/R1, amqp/R28
#[test]
fn a_consumer_goes_on_with_its_prefetch_after_a_reset() {
    scene(async |proxy, connection, keeper| {
        let watching = keeper.channel().await?;
        let queue = unique("recovery");
        watching.queue(&queue).declare().await?;
        let publisher = keeper.publisher(PublisherOptions::default()).await?;
        for n in 0..50_u8 {
            drop(publisher.publish(Message::new(&[n]).key(&queue)).await?);
        }
        publisher.flush().await?;

        let mut events = connection.events();
        let channel = connection.channel().await?;
        let mut consumer = channel.consume(&queue).prefetch(5).start().await?;
        let stale = consumer.next().await?.unwrap();
        proxy.reset();
        recovered(&mut events).await?;
        assert!(stale.is_stale());
        assert_eq!(stale.ack(), Settled::Stale);

        // Five of them come, and no more before one is settled: the broker keeps the rest.
        let mut held = Vec::new();
        while held.len() < 5 {
            held.push(consumer.next().await?.unwrap());
        }
        loop {
            let (ready, consumers) = count(&watching, &queue).await?;
            assert!(ready <= 45 || consumers == 0, "{ready}");
            if ready == 45 {
                break;
            }
        }
        assert_eq!(consumer.waiting(), 0);
        let mut seen = std::collections::BTreeSet::new();
        for delivery in held {
            seen.insert(delivery.body()[0]);
            assert_eq!(delivery.ack(), Settled::Queued);
        }
        while seen.len() < 50 {
            let delivery = consumer.next().await?.unwrap();
            seen.insert(delivery.body()[0]);
            delivery.ack();
        }
        watching.delete_queue(&queue).await?;
        Ok(())
    });
}

/// Accepts: amqp/R2, amqp/R5
#[test]
fn exclusive_queues_bindings_and_exchanges_come_back_and_a_generated_name_is_followed() {
    scene(async |proxy, connection, _| {
        let mut events = connection.events();
        let (source, target) = (unique("source"), unique("target"));
        let one = connection.channel().await?;
        one.exchange(&source, "topic")
            .auto_delete()
            .declare()
            .await?;
        one.exchange(&target, "fanout")
            .auto_delete()
            .declare()
            .await?;
        one.bind_exchange(&target, &source, "a.*").await?;
        let two = connection.channel().await?;
        let old = two.queue("").exclusive().declare().await?.name;
        one.bind_queue(&old, &target, "").await?;
        let mut consumer = two.consume(&old).prefetch(3).start().await?;

        proxy.reset();
        let seen = recovered(&mut events).await?;
        let Some(ConnectionEvent::Recovered { renamed }) = seen.last() else {
            panic!("{seen:?}")
        };
        let new = consumer.queue();
        assert_eq!(*renamed, [(old.clone(), new.to_string())], "{seen:?}");
        assert_ne!(*old, *new);

        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let message = Message::new(b"x").exchange(&source).key("a.b");
        publisher.send(message.mandatory()).await?;
        assert_eq!(consumer.next().await?.unwrap().ack(), Settled::Queued);
        assert_eq!(count(&one, &new).await?, (0, 1), "one queue, one consumer");
        Ok(())
    });
}

/// Accepts: amqp/R3
#[test]
fn a_queue_that_became_another_is_told_of_and_the_rest_recovers() {
    scene(async |proxy, connection, keeper| {
        let keep = keeper.channel().await?;
        let mut events = connection.events();
        let channel = connection.channel().await?;
        let (changed, kept) = (unique("changed"), unique("kept"));
        channel.queue(&changed).declare().await?;
        channel.queue(&kept).declare().await?;
        let mut consumer = channel.consume(&kept).start().await?;
        proxy.refuse(true);
        proxy.reset();
        while !connection.is_recovering() {
            kernel::yield_now().await?;
        }
        keep.delete_queue(&changed).await?;
        keep.queue(&changed).durable().declare().await?;
        proxy.refuse(false);
        let seen = recovered(&mut events).await?;
        let failed: Vec<_> = seen
            .iter()
            .filter_map(|event| match event {
                ConnectionEvent::EntityFailed { entity, error } => {
                    Some((entity.to_string(), error.reply_code()?.0))
                }
                _ => None,
            })
            .collect();
        assert_eq!(failed, [(format!("queue {changed:?}"), 406)]);
        channel.publish(Message::new(b"x").key(&kept)).await?;
        consumer.next().await?.unwrap().ack();
        keep.delete_queue(&changed).await?;
        keep.delete_queue(&kept).await?;
        Ok(())
    });
}

/// Accepts: amqp/R6
#[test]
fn what_was_deleted_is_not_made_again() {
    scene(async |proxy, connection, keeper| {
        let mut events = connection.events();
        let channel = connection.channel().await?;
        let (gone, fleeting) = (unique("gone"), unique("fleeting"));
        channel.queue(&gone).declare().await?;
        channel.delete_queue(&gone).await?;
        channel.queue(&fleeting).auto_delete().declare().await?;
        let mut consumer = channel.consume(&fleeting).start().await?;
        consumer.cancel().await?;
        proxy.reset();
        recovered(&mut events).await?;
        for name in [&gone, &fleeting] {
            let looking = keeper.channel().await?;
            let found = looking.queue(name).passive().declare().await;
            let missing = found.unwrap_err();
            assert_eq!(
                missing.reply_code().map(|code| code.0),
                Some(404),
                "{missing}"
            );
        }
        Ok(())
    });
}

/// Accepts: amqp/R4
#[test]
fn a_connection_cut_again_and_again_in_the_middle_of_recovery_ends_with_one_consumer() {
    scene(async |proxy, connection, keeper| {
        let watching = keeper.channel().await?;
        let queue = unique("recovery");
        let mut events = connection.events();
        let channel = connection.channel().await?;
        channel.queue(&queue).declare().await?;
        channel.bind_queue(&queue, "amq.direct", &queue).await?;
        let mut consumer = channel.consume(&queue).prefetch(5).start().await?;
        // What the client sends first for a new connection is some 500 bytes; each time it comes a little further.
        for bytes in (50..900).step_by(85) {
            proxy.cut_after(Direction::ToServer, bytes);
            proxy.reset();
            while !connection.is_recovering() {
                kernel::yield_now().await?;
            }
        }
        loop {
            recovered(&mut events).await?;
            // The last cut may still be ahead, until enough has been sent.
            for _ in 0..50 {
                channel.qos(5).await.or_else(|error| match error {
                    Error::Unanswered { .. } => Ok(()),
                    error => Err(error),
                })?;
            }
            if !connection.is_recovering() {
                break;
            }
        }
        loop {
            // The broker may not have heard yet that the others are gone.
            let (_, consumers) = count(&watching, &queue).await?;
            assert!(consumers >= 1);
            if consumers == 1 {
                break;
            }
        }
        channel
            .publish(Message::new(b"x").exchange("amq.direct").key(&queue))
            .await?;
        consumer.next().await?.unwrap().ack();
        assert!(consumer.try_next().is_none());
        watching.delete_queue(&queue).await?;
        Ok(())
    });
}

/// Accepts: amqp/R8, amqp/R18
#[test]
fn connections_cut_under_load_lose_no_message_and_leave_no_confirm() {
    let broker = Broker::under_test();
    run(async {
        let (sending, sender) = through(&broker).await?;
        let (taking, taker) = through(&broker).await?;
        let queue = unique("recovery");
        let ledger = Rc::<Ledger>::default();
        let channel = taker.channel().await?;
        channel.queue(&queue).durable().declare().await?;
        let consumer = channel.consume(&queue).prefetch(20).start().await?;
        let consuming = spawn(consume(consumer, Rc::clone(&ledger)));
        let producer = Producer::start(&sender, &queue, &ledger);
        // A cut at some byte, a reset, an orderly end, on either side, while both go on.
        for round in 1..=6 {
            ledger.goes_on(100).await?;
            match round % 3 {
                0 => sending.cut_after(Direction::ToServer, 70_001),
                1 => sending.reset(),
                _ => taking.reset(),
            }
        }
        ledger.goes_on(200).await?;
        producer.stop().await?;
        ledger.is_balanced().await?;
        assert_eq!(ledger.unconfirmed(), 0, "all were published again");
        closed(&sender).await?;
        drop(consuming);
        channel.delete_queue(&queue).await?;
        closed(&taker).await
    });
}

/// Accepts: feature/failover
#[test]
fn a_broker_that_is_killed_is_left_for_the_other_host_and_told_of() {
    // Their own brokers, whatever is under test: one is killed with all it holds.
    let (first, second) = (Broker::embedded(), Broker::embedded());
    run(async {
        let (one, other) = (first.address(), second.address());
        let url = format!("amqp://guest:guest@{one},{other}/%2F");
        // Hosts are tried in random order: the one to be killed is the one that was taken.
        let connection = client::connect(&url, options()).await?;
        let mut events = connection.events();
        let channel = connection.channel().await?;
        let queue = channel.queue("tasks").durable().declare().await?.name;
        let mut consumer = channel.consume(&queue).start().await?;
        let looking = client::connect(&first.url(), Options::default()).await?;
        let is_first = looking
            .channel()
            .await?
            .queue("tasks")
            .passive()
            .declare()
            .await
            .is_ok();
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let (killed, alive) = if is_first {
            (first, second)
        } else {
            (second, first)
        };
        closed(&looking).await?;
        killed.kill();
        let sent = publisher.send(Message::new(b"x").key(&queue).mandatory());
        let (sent, seen) = futures::join!(sent, recovered(&mut events));
        sent?;
        assert!(matches!(seen?[0], ConnectionEvent::Lost(_)));
        consumer.next().await?.unwrap().ack();
        closed(&connection).await?;
        drop(alive);
        Ok(())
    });
}

#[test]
fn a_broker_killed_during_publish_consume_and_recovery_leaves_no_future_pending() {
    run(async {
        // Each broker is new and empty: what the dead one had confirmed and nobody had consumed is gone with its memory, but nothing
        // may hang, and what is confirmed by the last is consumed.
        let mut broker = Broker::embedded();
        let (proxy, connection) = through(&broker).await?;
        let channel = connection.channel().await?;
        channel.queue("tasks").declare().await?;
        let ledger = Rc::<Ledger>::default();
        let consumer = channel.consume("tasks").prefetch(20).start().await?;
        let consuming = spawn(consume(consumer, Rc::clone(&ledger)));
        let producer = Producer::start(&connection, "tasks", &ledger);
        for bytes in [None, Some(150), Some(600)] {
            ledger.goes_on(100).await?;
            let next = Broker::embedded();
            let old = std::mem::replace(&mut broker, next);
            old.kill();
            // The proxy in front stays where it is; behind it there is another broker.
            proxy.pass_to(broker.address());
            if let Some(bytes) = bytes {
                proxy.cut_after(Direction::ToServer, bytes);
            }
        }
        ledger.goes_on(200).await?;
        producer.stop().await?;
        ledger.has_seen_last(100).await?;
        closed(&connection).await?;
        consuming.join().await.unwrap().unwrap_err();
        Ok(())
    });
}

/// Accepts: amqp/R30
#[test]
fn a_consumer_whose_queue_somebody_deletes_is_started_again_on_a_new_one() {
    let broker = Broker::under_test();
    run(async {
        let connection = client::connect(&broker.url(), options()).await?;
        let keeper = client::connect(&broker.url(), Options::default()).await?;
        let mut events = connection.events();
        let channel = connection.channel().await?;
        let name = unique("recovery");
        channel.queue(&name).declare().await?;
        channel.bind_queue(&name, "amq.direct", &name).await?;
        let mut consumer = channel.consume(&name).prefetch(3).start().await?;
        keeper.channel().await?.delete_queue(&name).await?;
        let queue = name.clone();
        assert_eq!(
            events.next().await?,
            Some(ConnectionEvent::ConsumerLost { queue })
        );
        let queue = name.clone();
        assert_eq!(
            events.next().await?,
            Some(ConnectionEvent::ConsumerRestored { queue })
        );
        let publisher = keeper.publisher(PublisherOptions::default()).await?;
        let message = Message::new(b"x").exchange("amq.direct").key(&name);
        publisher.send(message.mandatory()).await?;
        consumer.next().await?.unwrap().ack();
        channel.delete_queue(&name).await?;
        assert!(matches!(
            consumer.next().await,
            Err(Error::ConsumerCancelled { .. })
        ));
        closed(&connection).await
    });
}

/// Accepts: amqp/R2, amqp/R3
#[test]
fn what_the_server_still_keeps_for_the_lost_connection_comes_back_when_it_lets_go() {
    let broker = Broker::under_test();
    run(async {
        let (proxy, connection) = through(&broker).await?;
        let keeper = client::connect(&broker.url(), Options::default()).await?;
        let watching = keeper.channel().await?;
        let mut events = connection.events();
        let (shared, mine, bare) = (unique("shared"), unique("mine"), unique("bare"));
        watching.queue(&shared).declare().await?;
        let one = connection.channel().await?;
        let mut alone = one.consume(&shared).exclusive().start().await?;
        let two = connection.channel().await?;
        two.queue(&mine).exclusive().declare().await?;
        let mut own = two.consume(&mine).start().await?;
        // One that nobody consumes from, with a binding.
        two.queue(&bare).exclusive().declare().await?;
        two.bind_queue(&bare, "amq.direct", &bare).await?;

        // The server has not noticed, so the lost connection still has them.
        proxy.strand();
        let mut seen = recovered(&mut events).await?;
        let mut failed = BTreeMap::new();
        for event in seen.drain(..) {
            if let ConnectionEvent::EntityFailed { entity, error } = event {
                failed.insert(entity.to_string(), error.reply_code().map(|code| code.0));
            }
        }
        let refused = |code: u16, name: &str| {
            let with = |(entity, refusal): (&String, &Option<u16>)| {
                *refusal == Some(code) && entity.contains(name)
            };
            failed.iter().any(with)
        };
        assert!(refused(403, &shared), "{failed:?}");
        assert!(refused(405, &mine) && refused(405, &bare), "{failed:?}");
        kernel::sleep(Duration::from_millis(300)).await?;

        proxy.let_go();
        let mut missing = vec![
            ConnectionEvent::ConsumerRestored {
                queue: shared.clone(),
            },
            ConnectionEvent::ConsumerRestored {
                queue: mine.clone(),
            },
            ConnectionEvent::QueueRestored {
                queue: bare.clone(),
            },
        ];
        while !missing.is_empty() {
            let event = events.next().await?.expect("the connection lives");
            missing.retain(|one| *one != event);
        }
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        for key in [&shared, &mine] {
            publisher
                .send(Message::new(b"x").key(key).mandatory())
                .await?;
        }
        alone.next().await?.unwrap().ack();
        own.next().await?.unwrap().ack();
        let message = Message::new(b"x").exchange("amq.direct").key(&bare);
        publisher.send(message.mandatory()).await?;
        assert_eq!(count(&two, &bare).await?, (1, 0));
        let _ = connection.close(PATIENCE).await?;
        watching.delete_queue(&shared).await?;
        Ok(())
    });
}
