//! Our own client against the broker under test, and what it makes of a connection that breaks.

use std::future::Future;
use std::net::{Ipv4Addr, TcpListener};
use std::rc::Rc;
use std::time::Duration;

use amqp::client::{
    self, Busy, Cap, Channel, Connection, ConnectionEvent, Error, Message, Options,
    PublisherOptions, Settled,
};
use amqp::error::ReplyCode;
use amqp::wire::cold::channel;
use amqp::wire::{Method, Properties, TableBuf};
use kernel::{MaybeInterrupt, drop_after, spawn, timeout_after};
use rig::{Broker, Direction, PATIENCE, Proxy, unique};

const REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// Runs a test's body with a connection to the broker under test.
fn with_connection<F>(body: impl FnOnce(Connection) -> F)
where
    F: Future<Output = Result<(), Error>>,
{
    let broker = Broker::under_test();
    run(async {
        let connection = client::connect(&broker.url(), Options::default()).await?;
        body(connection.clone()).await?;
        let _ = connection.close(PATIENCE).await?;
        Ok(())
    });
}

/// The same with a channel and the name of a fresh queue, which goes with the connection.
fn with_queue<F>(body: impl FnOnce(Connection, Channel, String) -> F)
where
    F: Future<Output = Result<(), Error>>,
{
    with_connection(async |connection| {
        let channel = connection.channel().await?;
        let name = unique("client");
        channel.queue(&name).exclusive().declare().await?;
        body(connection, channel, name).await
    });
}

fn run(body: impl Future<Output = Result<(), Error>>) {
    kernel::run(timeout_after(PATIENCE, body)).unwrap().unwrap();
}

/// A connection through a proxy that can be broken, and that is not made again then.
async fn through(broker: &Broker) -> Result<(Proxy, Connection), Error> {
    let proxy = Proxy::to(broker.address());
    let url = broker.url_through(proxy.address());
    let options = Options {
        recovery: None,
        ..Options::default()
    };
    let connection = client::connect(&url, options).await?;
    Ok((proxy, connection))
}

fn window(window: usize) -> PublisherOptions {
    PublisherOptions {
        window,
        ..PublisherOptions::default()
    }
}

/// Publishes to be counted: RabbitMQ counts what it has confirmed.
async fn send(connection: &Connection, message: Message<'_>) -> Result<(), Error> {
    let publisher = connection.publisher(PublisherOptions::default()).await?;
    publisher.send(message).await?;
    publisher.close().await
}

async fn depth(channel: &Channel, queue: &str) -> Result<u32, Error> {
    Ok(channel.queue(queue).passive().declare().await?.messages)
}

/// RabbitMQ numbers direct replies by the tag that the channel's next delivery has as well.
///
/// Accepts: feature/direct_reply-to
#[test]
fn replies_come_straight_back_one_after_another_beside_other_deliveries() {
    with_queue(async |connection, channel, name| {
        let asker = connection.channel().await?;
        let cap = Cap {
            count: 10,
            bytes: 1 << 20,
        };
        let mut answers = asker.consume(REPLY_TO).no_ack(cap).start().await?;
        let others = asker.queue("").exclusive().declare().await?.name;
        let mut others_come = asker.consume(&others).start().await?;
        let mut questions = channel.consume(&name).start().await?;
        let properties = Properties {
            reply_to: Some(REPLY_TO),
            ..Properties::default()
        };
        for n in ["1", "2", "3"] {
            let question = Message::new(n.as_bytes()).key(&name);
            asker.publish(question.properties(&properties)).await?;
            let question = questions.next().await?.unwrap();
            let to = question.props().reply_to().unwrap().to_owned();
            channel
                .publish(Message::new(question.body()).key(&to))
                .await?;
            question.ack();
            assert_eq!(answers.next().await?.unwrap().body(), n.as_bytes());
            send(&connection, Message::new(n.as_bytes()).key(&others)).await?;
            let other = others_come.next().await?.unwrap();
            assert_eq!(other.body(), n.as_bytes());
            assert_eq!(other.ack(), Settled::Queued);
        }
        // Had an ack been for the wrong delivery, the channel would be closed.
        assert_eq!(depth(&asker, &others).await?, 0);
        Ok(())
    });
}

#[test]
fn what_is_acked_before_a_recover_stays_acked_and_the_rest_comes_again() {
    with_queue(async |connection, channel, name| {
        let mut consumer = channel.consume(&name).start().await?;
        for body in [b"1", b"2"] {
            send(&connection, Message::new(body).key(&name)).await?;
        }
        let first = consumer.next().await?.unwrap();
        let second = consumer.next().await?.unwrap();
        assert_eq!(first.ack(), Settled::Queued);
        channel.recover().await?;
        assert_eq!(second.ack(), Settled::Stale);
        let again = consumer.next().await?.unwrap();
        assert!(again.is_redelivered() && again.body() == b"2");
        again.ack();
        consumer.cancel().await?;
        channel.close().await?;
        let other = connection.channel().await?;
        assert_eq!(depth(&other, &name).await?, 0);
        Ok(())
    });
}

/// An ack with `multiple` after the rollback would settle it for good.
#[test]
fn what_was_acked_and_rolled_back_goes_back_to_the_queue() {
    with_queue(async |connection, channel, name| {
        let transactions = connection.channel().await?;
        transactions.tx_select().await?;
        for body in [b"1", b"2", b"3"] {
            send(&connection, Message::new(body).key(&name)).await?;
        }
        let mut consumer = transactions.consume(&name).start().await?;
        consumer.next().await?.unwrap().ack();
        transactions.tx_rollback().await?;
        for _ in 0..2 {
            consumer.next().await?.unwrap().ack();
        }
        transactions.tx_commit().await?;
        transactions.close().await?;
        let left = channel.get(&name).await?.unwrap();
        assert_eq!(left.body(), b"1");
        assert!(channel.get(&name).await?.is_none());
        left.ack();
        Ok(())
    });
}

/// Accepts: feature/queue
#[test]
fn queues_are_declared_bound_unbound_purged_and_deleted() {
    with_connection(async |connection| {
        let channel = connection.channel().await?;
        let named = channel.queue("").exclusive().declare().await?.name;
        assert!(!named.is_empty(), "the server chose a name");
        assert_eq!(depth(&channel, &named).await?, 0);

        let key = unique("key");
        channel.bind_queue(&named, "amq.direct", &key).await?;
        let to_key = Message::new(b"1").exchange("amq.direct").key(&key);
        send(&connection, to_key).await?;
        send(&connection, to_key).await?;
        channel.unbind_queue(&named, "amq.direct", &key).await?;
        send(&connection, to_key).await?;
        assert_eq!(channel.purge_queue(&named).await?, 2);

        send(&connection, Message::new(b"2").key(&named)).await?;
        assert_eq!(channel.delete_queue(&named).await?, 1);
        let gone = channel.queue(&named).passive().declare().await;
        assert_eq!(gone.unwrap_err().reply_code(), Some(ReplyCode::NOT_FOUND));
        Ok(())
    });
}

/// Accepts: feature/exchange
#[test]
fn exchanges_are_declared_bound_to_each_other_and_deleted() {
    with_queue(async |connection, channel, queue| {
        let (source, target) = (unique("source"), unique("target"));
        channel.exchange(&source, "topic").declare().await?;
        channel.exchange(&target, "fanout").declare().await?;
        channel
            .exchange(&source, "topic")
            .passive()
            .declare()
            .await?;
        channel.bind_queue(&queue, &target, "").await?;
        channel.bind_exchange(&target, &source, "a.*").await?;
        let message = Message::new(b"x").exchange(&source);
        send(&connection, message.key("a.b")).await?;
        send(&connection, message.key("b.b")).await?;
        assert_eq!(depth(&channel, &queue).await?, 1);

        channel.unbind_exchange(&target, &source, "a.*").await?;
        send(&connection, message.key("a.b")).await?;
        assert_eq!(depth(&channel, &queue).await?, 1);

        channel.delete_exchange(&source, false).await?;
        channel.delete_exchange(&target, false).await?;
        let other = connection.channel().await?;
        let gone = other.exchange(&source, "topic").passive().declare().await;
        assert_eq!(gone.unwrap_err().reply_code(), Some(ReplyCode::NOT_FOUND));
        Ok(())
    });
}

/// Accepts: feature/basic, amqp/R16
#[test]
fn deliveries_are_acked_out_of_order_nacked_rejected_recovered_and_got() {
    with_queue(async |_connection, channel, queue| {
        for body in [b"a", b"b", b"c", b"d"] {
            channel.publish(Message::new(body).key(&queue)).await?;
        }
        channel.qos(3).await?;
        let mut consumer = channel.consume(&queue).prefetch(3).start().await?;
        let a = consumer.next().await?.unwrap();
        let b = consumer.next().await?.unwrap();
        let c = consumer.next().await?.unwrap();
        assert_eq!(
            (a.body(), b.body(), c.body()),
            (&b"a"[..], &b"b"[..], &b"c"[..])
        );
        assert!(consumer.try_next().is_none(), "the prefetch is used up");
        assert_eq!(c.ack(), Settled::Queued);
        let d = consumer.next().await?.unwrap();
        assert_eq!(d.body(), b"d");
        d.reject(false);
        a.nack(true);
        let again = consumer.next().await?.unwrap();
        assert_eq!((again.body(), again.is_redelivered()), (&b"a"[..], true));
        b.ack();
        again.ack();
        consumer.cancel().await?;
        assert!(consumer.next().await?.is_none());

        assert!(channel.get(&queue).await?.is_none());
        channel.publish(Message::new(b"e").key(&queue)).await?;
        let got = channel.get(&queue).await?.unwrap();
        channel.recover().await?;
        assert_eq!(got.ack(), Settled::Stale, "the broker took it back");
        let got = channel.get(&queue).await?.unwrap();
        assert_eq!((got.body(), got.is_redelivered()), (&b"e"[..], true));
        got.ack();
        assert_eq!(channel.delete_queue(&queue).await?, 0);
        Ok(())
    });
}

/// Accepts: feature/basic, amqp/R29
#[test]
fn a_delivery_or_consumer_that_is_dropped_gives_its_messages_back() {
    with_queue(async |_connection, channel, queue| {
        for body in [b"a", b"b", b"c"] {
            channel.publish(Message::new(body).key(&queue)).await?;
        }
        let mut consumer = channel.consume(&queue).prefetch(2).start().await?;
        drop(consumer.next().await?.unwrap());
        drop(consumer);
        let mut bodies = Vec::new();
        while bodies.len() < 3 {
            if let Some(delivery) = channel.get(&queue).await? {
                bodies.push(delivery.body().to_vec());
                delivery.ack();
            }
        }
        bodies.sort();
        assert_eq!(bodies, [b"a", b"b", b"c"]);
        Ok(())
    });
}

#[test]
fn what_is_said_of_a_message_stays_said_in_any_order() {
    with_queue(async |connection, channel, name| {
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let (mut headers, mut long) = (TableBuf::new(), Vec::new());
        headers.insert("attempt", 3)?;
        long.resize(200, b'x');
        let id = std::str::from_utf8(&long).expect("it is ASCII");
        let transient = Properties {
            content_type: Some("text/plain"),
            headers: Some(headers.as_table()),
            delivery_mode: Some(1),
            priority: Some(4),
            message_id: Some(id),
            ..Properties::default()
        };
        let silent = Properties {
            delivery_mode: None,
            ..transient
        };
        for properties in [transient, silent, Properties::default()] {
            let encoded = properties.encode()?;
            let plain = || Message::new(b"x").key(&name);
            let wanted = Properties {
                delivery_mode: Some(2),
                ..properties
            };
            for message in [
                plain().properties(&properties).persistent().mandatory(),
                plain().persistent().properties(&properties).mandatory(),
                plain().mandatory().properties(&encoded).persistent(),
                plain().mandatory().persistent().properties(&encoded),
            ] {
                publisher.send(message).await?;
                let delivery = channel.get(&name).await?.expect("there is one");
                assert_eq!(delivery.props().to_properties(), wanted);
                delivery.ack();
            }
            publisher.send(plain().properties(&encoded)).await?;
            let delivery = channel.get(&name).await?.expect("there is one");
            assert_eq!(delivery.props().to_properties(), properties);
            delivery.ack();
        }
        let unknown = unique("client");
        let message = Message::new(b"x").persistent().key(&unknown).mandatory();
        let returned = publisher.send(message).await;
        assert!(matches!(returned, Err(Error::Returned(_))), "{returned:?}");
        Ok(())
    });
}

/// Accepts: feature/confirm
#[test]
fn confirms_are_pipelined_and_each_has_its_own() {
    with_queue(async |connection, channel, queue| {
        let publisher = connection.publisher(window(10)).await?;
        let mut confirms = Vec::new();
        let message = Message::new(b"x").key(&queue);
        while confirms.len() < 10 {
            confirms.push(publisher.post(&message)?);
        }
        assert_eq!(publisher.unconfirmed(), 10);
        let full = publisher.post(&message);
        assert!(matches!(full, Err(Error::Busy(Busy::Window))));
        // In any order, and not all: the last waits for the window's room.
        let last = publisher.publish(message).await?;
        confirms.pop().unwrap().await?;
        confirms.remove(3).await?;
        drop(confirms);
        last.await?;
        publisher.flush().await?;
        assert_eq!(publisher.unconfirmed(), 0);
        assert_eq!(depth(&channel, &queue).await?, 11);
        publisher.close().await
    });
}

/// Accepts: feature/return, amqp/R17
#[test]
fn a_returned_message_is_told_to_its_own_publisher() {
    with_queue(async |connection, channel, queue| {
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let nowhere = unique("nowhere");
        let mut confirms = Vec::new();
        for n in 0..20_u32 {
            let (id, body) = (n.to_string(), n.to_be_bytes());
            let properties = Properties {
                message_id: Some(&id),
                ..Properties::default()
            };
            let key = if n % 3 == 0 { &nowhere } else { &queue };
            let message = Message::new(&body).key(key).properties(&properties);
            confirms.push(publisher.post(&message.mandatory())?);
        }
        for (n, confirm) in confirms.into_iter().enumerate() {
            match confirm.await {
                Ok(()) => assert_ne!(n % 3, 0),
                Err(Error::Returned(returned)) => {
                    assert_eq!(n % 3, 0);
                    assert_eq!(returned.code, ReplyCode::NO_ROUTE);
                    assert_eq!(returned.body, (n as u32).to_be_bytes());
                    assert_eq!(returned.routing_key, nowhere);
                    let id = returned.properties.as_props().message_id();
                    assert_eq!(id, Some(&*n.to_string()));
                }
                Err(error) => return Err(error),
            }
        }
        assert_eq!(depth(&channel, &queue).await?, 13);
        Ok(())
    });
}

/// Accepts: feature/body
#[test]
fn bodies_of_every_size_come_back_as_they_went() {
    with_queue(async |connection, channel, queue| {
        let frame = connection.tuned().unwrap().frame_max as usize - 8;
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let mut consumer = channel.consume(&queue).prefetch(2).start().await?;
        for size in [0, 1, frame - 1, frame, frame + 1, 16 << 20] {
            let body: Vec<u8> = (0..size).map(|n| (n * 7 % 251) as u8).collect();
            let properties = Properties {
                message_id: Some("same"),
                ..Properties::default()
            };
            let message = Message::new(&body).key(&queue).properties(&properties);
            let sent = publisher.publish(message).await?;
            let mut delivery = consumer.next().await?.unwrap();
            assert_eq!(delivery.props().message_id(), Some("same"), "{size}");
            assert!(delivery.take_body() == body, "{size} bytes");
            assert_eq!(delivery.props().message_id(), Some("same"), "{size}");
            delivery.ack();
            sent.await?;
        }
        Ok(())
    });
}

/// Accepts: amqp/R40
#[test]
fn messages_of_two_tasks_on_one_channel_are_not_mixed() {
    with_queue(async |connection, channel, queue| {
        let frame = connection.tuned().unwrap().frame_max as usize - 8;
        let size = 3 * frame;
        let (channel, queue) = (Rc::new(channel), Rc::<str>::from(queue));
        let tasks = [1_u8, 2, 3].map(|fill| {
            let (channel, queue) = (Rc::clone(&channel), Rc::clone(&queue));
            spawn(async move {
                let body = vec![fill; size];
                for _ in 0..20 {
                    channel.publish(Message::new(&body).key(&queue)).await?;
                    kernel::yield_now().await?;
                }
                Ok::<_, Error>(())
            })
        });
        let mut consumer = channel.consume(&queue).prefetch(10).start().await?;
        let mut seen = [0; 4];
        for _ in 0..60 {
            let delivery = consumer.next().await?.unwrap();
            let fill = delivery.body()[0];
            assert!(delivery.body().iter().all(|&byte| byte == fill));
            assert_eq!(delivery.body().len(), size);
            seen[usize::from(fill)] += 1;
            delivery.ack();
        }
        assert_eq!(seen, [0, 20, 20, 20]);
        for task in tasks {
            task.join().await.unwrap()?;
        }
        Ok(())
    });
}

/// Accepts: feature/consumer_cancel_notify
#[test]
fn a_consumer_whose_queue_is_deleted_is_told() {
    with_queue(async |connection, channel, queue| {
        channel.publish(Message::new(b"last").key(&queue)).await?;
        let mut consumer = channel.consume(&queue).start().await?;
        let delivery = consumer.next().await?.unwrap();
        connection.channel().await?.delete_queue(&queue).await?;
        match consumer.next().await {
            Err(Error::ConsumerCancelled { queue: of }) => assert_eq!(of, queue),
            other => panic!("{other:?}"),
        }
        assert!(consumer.next().await?.is_none());
        delivery.ack();
        channel.queue("").exclusive().declare().await?; // the channel lives
        Ok(())
    });
}

/// Accepts: amqp/R13
#[test]
fn a_soft_error_takes_down_one_channel_with_all_that_is_on_it() {
    with_queue(async |connection, channel, queue| {
        let broken = connection.channel().await?;
        let number = broken.number();
        let own = broken.queue("").exclusive().declare().await?.name;
        let mut consumer = broken.consume(&own).start().await?;
        let missing = unique("missing");
        let (first, second) = futures::join!(
            broken.queue(&missing).passive().declare(),
            broken.purge_queue(&own)
        );
        for error in [first.unwrap_err(), second.unwrap_err()] {
            let Error::ChannelClosed(reason) = error else {
                panic!("{error}")
            };
            assert_eq!(
                (reason.code, reason.class, reason.method),
                (ReplyCode::NOT_FOUND, 50, 10)
            );
            assert!(reason.text.contains(&missing), "{}", reason.text);
        }
        assert!(matches!(
            consumer.next().await,
            Err(Error::ChannelClosed(_))
        ));
        assert!(consumer.next().await?.is_none());
        assert!(matches!(broken.qos(1).await, Err(Error::ChannelClosed(_))));
        let message = Message::new(b"x").key(&queue);
        assert!(matches!(
            broken.publish(message).await,
            Err(Error::ChannelClosed(_))
        ));

        let again = connection.channel().await?;
        assert_eq!(again.number(), number, "the number can be used again");
        send(&connection, message).await?;
        assert_eq!(depth(&again, &queue).await?, 1);
        assert_eq!(depth(&channel, &queue).await?, 1);
        Ok(())
    });
}

/// Accepts: amqp/R18
#[test]
fn confirms_that_a_lost_channel_owes_say_so() {
    with_queue(async |connection, channel, queue| {
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let missing = unique("missing");
        let doomed = publisher.post(&Message::new(b"x").exchange(&missing))?;
        let behind = publisher.post(&Message::new(b"x").key(&queue))?;
        for confirm in [doomed, behind] {
            match confirm.await {
                Err(Error::Unconfirmed(lost)) => {
                    assert!(lost.to_string().contains(&missing), "{lost}");
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(publisher.unconfirmed(), 0);
        assert!(matches!(
            publisher.flush().await,
            Err(Error::ChannelClosed(_))
        ));
        assert_eq!(depth(&channel, &queue).await?, 0);
        Ok(())
    });
}

/// Accepts: amqp/R19
#[test]
fn confirms_that_nobody_waits_for_free_their_place() {
    with_queue(async |connection, _channel, queue| {
        let publisher = connection.publisher(window(100)).await?;
        let nowhere = unique("nowhere");
        for _ in 0..5_000 {
            drop(publisher.publish(Message::new(b"").key(&nowhere)).await?);
        }
        publisher.flush().await?;
        publisher
            .send(Message::new(b"").key(&queue).mandatory())
            .await
    });
}

/// Accepts: amqp/R20
#[test]
fn a_request_that_is_dropped_leaves_the_next_its_own_answer() {
    with_queue(async |_connection, channel, queue| {
        channel.publish(Message::new(b"1").key(&queue)).await?;
        for _ in 0..3 {
            // Sent at the first poll, dropped at once.
            assert!(
                drop_after(Duration::ZERO, channel.get(&queue))
                    .await
                    .is_none()
            );
            let consume = channel.consume(&queue).prefetch(1).start();
            assert!(drop_after(Duration::ZERO, consume).await.is_none());
        }
        let named = channel.queue("").exclusive().declare().await?;
        assert!(!named.name.is_empty());
        // What the dropped ones were sent has gone back, and their consumers are no more.
        let delivery = loop {
            if let Some(delivery) = channel.get(&queue).await? {
                break delivery;
            }
        };
        assert_eq!(delivery.body(), b"1");
        delivery.ack();
        let info = channel.queue(&queue).passive().declare().await?;
        assert_eq!((info.messages, info.consumers), (0, 0));
        Ok(())
    });
}

/// Accepts: amqp/R23
#[test]
fn a_publisher_waits_while_the_broker_does_not_read() {
    let broker = Broker::under_test();
    run(async {
        let (proxy, connection) = through(&broker).await?;
        let channel = connection.channel().await?;
        let queue = channel.queue("").exclusive().declare().await?.name;
        proxy.pause();
        let body = vec![0; 256 << 10];
        let message = Message::new(&body).key(&queue);
        let mut sent = 0;
        // Buffers of the system take a few megabytes; then publishing waits, and memory does not grow.
        while drop_after(Duration::from_millis(200), channel.publish(message))
            .await
            .is_some()
        {
            sent += 1;
            assert!(sent < 4_000, "a gigabyte");
        }
        assert!(matches!(
            channel.try_publish(&message),
            Err(Error::Busy(Busy::HighWater))
        ));
        proxy.resume();
        channel.publish(message).await?;
        // The same way, so it comes last.
        let last = Message::new(b"last").key(&queue);
        channel.publish(last).await?;
        let mut consumer = channel.consume(&queue).start().await?;
        for _ in 0..=sent {
            let delivery = consumer.next().await?.unwrap();
            assert_eq!(delivery.body().len(), body.len());
            delivery.ack();
        }
        assert_eq!(consumer.next().await?.unwrap().body(), b"last");
        let _ = connection.close(PATIENCE).await?;
        Ok(())
    });
}

/// Accepts: amqp/R22
#[test]
fn a_consumer_without_a_prefetch_holds_no_more_than_its_cap() {
    with_queue(async |connection, _channel, queue| {
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let body = vec![0; 64 << 10];
        for _ in 0..200 {
            drop(publisher.publish(Message::new(&body).key(&queue)).await?);
        }
        publisher.flush().await?;
        let other = connection.channel().await?;
        let cap = Cap {
            count: 1000,
            bytes: 1 << 20,
        };
        let mut consumer = other.consume(&queue).no_ack(cap).start().await?;
        for n in 0..200 {
            kernel::sleep(Duration::from_millis(u64::from(n == 0) * 300)).await?;
            // One read of 256 KiB may come on top, and the frame that it cuts.
            assert!(consumer.waiting() <= 16 + 4 + 4, "{}", consumer.waiting());
            let delivery = consumer.next().await?.unwrap();
            assert_eq!(delivery.body().len(), body.len());
            assert_eq!(delivery.ack(), Settled::Stale);
        }
        Ok(())
    });
}

/// Accepts: amqp/R8
#[test]
fn everybody_who_waits_is_told_when_the_connection_breaks() {
    let broker = Broker::under_test();
    run(async {
        let (proxy, connection) = through(&broker).await?;
        let channel = connection.channel().await?;
        let queue = channel.queue("").exclusive().declare().await?.name;
        let publisher = connection.publisher(window(2)).await?;
        let mut events = connection.events();
        let mut consumer = channel.consume(&queue).start().await?;
        proxy.pause();
        let one = publisher.post(&Message::new(b"x").key(&queue))?;
        let two = publisher.post(&Message::new(b"x").key(&queue))?;
        let parked = publisher.send(Message::new(b"x").key(&queue));
        let asked = channel.purge_queue(&queue);
        let reset = async {
            kernel::yield_now().await.unwrap();
            proxy.reset();
        };
        let (one, two, parked, asked, next, ()) =
            futures::join!(one, two, parked, asked, consumer.next(), reset);
        for confirm in [one, two] {
            assert!(matches!(confirm, Err(Error::Unconfirmed(_))), "{confirm:?}");
        }
        assert!(matches!(parked, Err(Error::Lost(_))), "{parked:?}");
        assert!(matches!(asked, Err(Error::Lost(_))), "{asked:?}");
        assert!(matches!(next, Err(Error::Lost(_))), "{next:?}");
        assert!(consumer.next().await?.is_none());
        assert!(matches!(channel.qos(1).await, Err(Error::Lost(_))));
        let message = Message::new(b"x").key(&queue);
        assert!(matches!(
            channel.publish(message).await,
            Err(Error::Lost(_))
        ));
        assert!(matches!(publisher.post(&message), Err(Error::Lost(_))));
        assert!(matches!(connection.channel().await, Err(Error::Lost(_))));
        let event = events.next().await?;
        assert!(
            matches!(event, Some(client::ConnectionEvent::Lost(_))),
            "{event:?}"
        );
        assert!(events.next().await?.is_none());
        Ok(())
    });
}

/// Accepts: amqp/R27
#[test]
fn closing_a_broken_connection_returns_at_once_and_twice_is_fine() {
    let broker = Broker::under_test();
    run(async {
        let (proxy, connection) = through(&broker).await?;
        proxy.reset();
        let down = connection.closed().await?;
        // Far longer than the test may take: it must not be waited for.
        let long = 10 * PATIENCE;
        assert_eq!(connection.close(long).await?.unconfirmed, 0);
        assert_eq!(connection.close(long).await?.unconfirmed, 0);
        assert_eq!(connection.closed().await?, down);

        let (proxy, connection) = through(&broker).await?;
        let channel = connection.channel().await?;
        proxy.pause();
        // A server that does not answer is waited for as long as said.
        let _ = connection.close(Duration::from_millis(50)).await?;
        assert!(matches!(channel.qos(1).await, Err(Error::Closed)));
        Ok(())
    });
}

/// Accepts: amqp/R26
#[test]
fn closing_sends_what_is_queued_and_waits_for_its_confirms() {
    let broker = Broker::under_test();
    run(async {
        let keeper = client::connect(&broker.url(), Options::default()).await?;
        let keep = keeper.channel().await?;
        let queue = keep.queue("").exclusive().declare().await?.name;
        // Exclusive queues are the keeper's alone to consume from, but anybody may publish to one.
        let connection = client::connect(&broker.url(), Options::default()).await?;
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let body = vec![0; 32 << 10];
        let message = Message::new(&body).key(&queue);
        let mut confirms = Vec::new();
        for _ in 0..20 {
            confirms.push(publisher.post(&message)?);
        }
        assert_eq!(connection.close(PATIENCE).await?.unconfirmed, 0);
        for confirm in confirms {
            confirm.await?;
        }
        assert!(matches!(publisher.post(&message), Err(Error::Closed)));
        assert_eq!(depth(&keep, &queue).await?, 20);

        let (proxy, connection) = through(&broker).await?;
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        proxy.pause();
        let lost = [publisher.post(&message)?, publisher.post(&message)?];
        let closed = connection.close(Duration::from_millis(50)).await?;
        assert_eq!(closed.unconfirmed, 2);
        for confirm in lost {
            assert!(matches!(confirm.await, Err(Error::Unconfirmed(_))));
        }
        let _ = keeper.close(PATIENCE).await?;
        Ok(())
    });
}

/// Accepts: amqp/R28
#[test]
fn a_delivery_of_a_connection_that_is_gone_settles_to_nothing() {
    let broker = Broker::under_test();
    run(async {
        let queue = unique("client");
        let first = client::connect(&broker.url(), Options::default()).await?;
        let channel = first.channel().await?;
        channel.queue(&queue).declare().await?;
        send(&first, Message::new(b"x").key(&queue)).await?;
        let mut consumer = channel.consume(&queue).start().await?;
        let stale = consumer.next().await?.unwrap();
        assert!(!stale.is_stale());
        let _ = first.close(PATIENCE).await?;

        let second = client::connect(&broker.url(), Options::default()).await?;
        let channel = second.channel().await?;
        let fresh = loop {
            if let Some(delivery) = channel.get(&queue).await? {
                break delivery;
            }
        };
        assert_eq!(
            stale.tag(),
            fresh.tag(),
            "the same number on the same channel"
        );
        assert!(stale.is_stale());
        assert_eq!(stale.ack(), Settled::Stale);
        assert_eq!(fresh.nack(true), Settled::Queued);
        assert_eq!(channel.delete_queue(&queue).await?, 1);
        let _ = second.close(PATIENCE).await?;
        Ok(())
    });
}

/// Accepts: amqp/R38
#[test]
fn a_refused_login_or_virtual_host_is_not_tried_elsewhere() {
    let broker = Broker::under_test();
    run(async {
        // Were the search not over, it would end with the port that nobody listens on.
        let dead = dead_port();
        let address = broker.address();
        let url = format!("amqp://guest:wrong@{address},{address}/%2F");
        let error = client::connect(&url, Options::default()).await.unwrap_err();
        assert_eq!(
            error.reply_code(),
            Some(ReplyCode::ACCESS_REFUSED),
            "{error}"
        );
        assert!(matches!(error, Error::LoginRefused { .. }));
        assert!(!error.to_string().contains("wrong"), "{error}");
        let url = format!("amqp://guest:guest@{address}/no-such-vhost");
        let error = client::connect(&url, Options::default()).await.unwrap_err();
        assert!(matches!(error, Error::VirtualHost { .. }), "{error}");
        assert!(error.to_string().contains("no-such-vhost"), "{error}");

        let url = format!("amqp://guest:guest@127.0.0.1:{dead}/");
        let error = client::connect(&url, Options::default()).await.unwrap_err();
        assert!(error.to_string().contains(&dead.to_string()), "{error}");
        assert!(!error.to_string().contains("guest:guest"), "{error}");
        Ok(())
    });
}

/// Accepts: amqp/R39, feature/failover
#[test]
fn of_several_hosts_the_first_that_answers_is_taken() {
    let broker = Broker::under_test();
    run(async {
        let (dead, silent) = (
            dead_port(),
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(),
        );
        let silent = silent.local_addr().unwrap();
        let address = broker.address();
        let url = format!(
            "amqp://guest:guest@127.0.0.1:{dead},{silent},{address}/?connection_timeout=2000"
        );
        // In random order: often enough that each was first.
        for _ in 0..8 {
            let connection = client::connect(&url, Options::default()).await?;
            let _ = connection.close(PATIENCE).await?;
        }
        let url = format!("amqp://guest:guest@127.0.0.1:{dead},{silent}/?connection_timeout=100");
        match client::connect(&url, Options::default()).await {
            Err(Error::Connect { tried, .. }) => assert_eq!(tried.len(), 2, "{tried:?}"),
            other => panic!("{other:?}"),
        }
        Ok(())
    });
}

/// Accepts: amqp/R37
#[test]
fn no_more_channels_are_opened_than_agreed_upon() {
    let broker = Broker::under_test();
    run(async {
        let url = format!("{}?channel_max=3", broker.url());
        let connection = client::connect(&url, Options::default()).await?;
        let (one, two, three) = futures::join!(
            connection.channel(),
            connection.channel(),
            connection.channel()
        );
        let more = connection.channel().await;
        assert!(matches!(more, Err(Error::NoChannelLeft(3))), "{more:?}");
        two?.close().await?;
        assert_eq!(connection.channel().await?.number(), 2);
        three?.close().await?;
        one?.close().await?;
        for _ in 0..300 {
            // Dropped in every way: before the answer, and after it.
            let opening = drop_after(Duration::ZERO, connection.channel()).await;
            drop(opening);
            let channel = connection.channel().await?;
            assert!(channel.number() <= 3);
            channel.close().await?;
        }
        let _ = connection.close(PATIENCE).await?;
        Ok(())
    });
}

/// Accepts: feature/flow_and_tx
#[test]
fn a_channel_may_ask_for_flow_and_is_told_that_it_has_it() {
    with_queue(async |_connection, channel, queue| {
        let flow = channel::AMQPMethod::Flow(channel::Flow { active: true });
        let answer = channel.call(Method::Channel(flow)).await?;
        let ok = channel::AMQPMethod::FlowOk(channel::FlowOk { active: true });
        assert_eq!(answer, Method::Channel(ok));
        channel.publish(Message::new(b"x").key(&queue)).await
    });
}

/// Accepts: feature/flow_and_tx
#[test]
fn a_transaction_publishes_and_settles_with_its_commit_or_not_at_all() {
    with_queue(async |connection, channel, queue| {
        let other = connection.channel().await?;
        channel.tx_select().await?;
        channel.publish(Message::new(b"1").key(&queue)).await?;
        channel.publish(Message::new(b"2").key(&queue)).await?;
        assert_eq!(depth(&other, &queue).await?, 0);
        channel.tx_commit().await?;
        assert_eq!(depth(&other, &queue).await?, 2);
        channel.publish(Message::new(b"3").key(&queue)).await?;
        channel.tx_rollback().await?;
        channel.tx_commit().await?;
        assert_eq!(depth(&other, &queue).await?, 2);

        // An ack is part of the transaction that it was given in.
        let one = channel.get(&queue).await?.unwrap();
        one.ack();
        channel.tx_rollback().await?;
        channel.recover().await?;
        let again = channel.get(&queue).await?.unwrap();
        assert_eq!((again.body(), again.is_redelivered()), (&b"1"[..], true));
        again.ack();
        channel.tx_commit().await?;
        let two = channel.get(&queue).await?.unwrap();
        assert_eq!(two.body(), b"2");
        two.ack();
        channel.close().await?;
        let left = other.get(&queue).await?.unwrap();
        assert_eq!(left.body(), b"2");
        assert!(other.get(&queue).await?.is_none());
        Ok(())
    });
}

#[test]
fn transactions_need_to_be_begun_and_a_channel_without_confirms() {
    with_connection(async |connection| {
        let channel = connection.channel().await?;
        let error = channel.tx_commit().await.unwrap_err();
        assert_eq!(error.reply_code(), Some(ReplyCode::PRECONDITION_FAILED));
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let error = publisher.channel().tx_select().await.unwrap_err();
        assert_eq!(error.reply_code(), Some(ReplyCode::PRECONDITION_FAILED));
        connection.channel().await?.flow(true).await
    });
}

/// Accepts: feature/update-secret
#[test]
fn a_new_secret_is_taken_and_is_the_password_of_the_next_connection() {
    let broker = Broker::under_test();
    let proxy = Proxy::to(broker.address());
    run(async {
        let url = broker.url_through(proxy.address());
        let connection = client::connect(&url, Options::default()).await?;
        connection.update_secret("guest", "as good as new").await?;
        let long = "x".repeat(256);
        let error = connection.update_secret("x", &long).await.unwrap_err();
        assert!(matches!(error, Error::Encode(_)), "{error}");
        let mut events = connection.events();
        proxy.reset();
        while !matches!(
            events.next().await?,
            Some(ConnectionEvent::Recovered { .. })
        ) {}
        // These brokers look at passwords when one connects, and only then.
        connection.update_secret("wrong", "").await?;
        proxy.reset();
        loop {
            match events.next().await? {
                Some(ConnectionEvent::GaveUp(error)) => {
                    let Error::NotRecovered {
                        last: Some(last), ..
                    } = error
                    else {
                        panic!("{error}")
                    };
                    assert!(matches!(*last, Error::LoginRefused { .. }), "{last}");
                    return Ok(());
                }
                Some(_) => {}
                None => panic!("it ended without giving up"),
            }
        }
    });
}

#[test]
fn a_timeout_of_the_callers_travels_through_the_clients_errors() {
    with_queue(async |_connection, channel, queue| {
        let mut consumer = channel.consume(&queue).start().await?;
        let late = timeout_after(Duration::from_millis(20), consumer.next()).await;
        let error = late.unwrap_err();
        assert_eq!(error.interrupt(), Some(&kernel::Interrupt::TaskTimeout));
        channel.publish(Message::new(b"x").key(&queue)).await?;
        assert_eq!(consumer.next().await?.unwrap().body(), b"x");
        Ok(())
    });
}

#[test]
fn a_connection_cut_at_any_byte_of_the_handshake_is_an_error_not_a_hang() {
    let broker = Broker::under_test();
    run(async {
        for bytes in [0, 1, 100, 340] {
            let proxy = Proxy::to(broker.address());
            proxy.cut_after(Direction::ToClient, bytes);
            let url = broker.url_through(proxy.address());
            match client::connect(&url, Options::default()).await {
                Err(Error::Connect { tried, .. }) => assert_eq!(tried.len(), 1, "{tried:?}"),
                other => panic!("{bytes}: {other:?}"),
            }
        }
        Ok(())
    });
}

/// A port that nobody listens on.
fn dead_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}
