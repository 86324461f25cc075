//! The client against a scripted server, on virtual time: what a real one does only when it is ill.

use std::future::Future;
use std::time::Duration;

use kernel::net::UnixStream;
use kernel::{Builder, VirtualClock, spawn};

use super::connection::Connection;
use super::dial::Dialer;
use super::transport::Transport;
use super::*;
use crate::error::ReplyCode;
use crate::proto::event::{Down, Lost};
use crate::proto::handshake::{Auth, ClientConfig, Limits};
use crate::wire::cold::{self, Method, basic, channel, confirm, connection, queue, tx};
use crate::wire::frame::{put_content, put_heartbeat};
use crate::wire::{Ack, AnyMethod, Deliver, Frame, Props, Splitter};

const HEARTBEAT: u16 = 10;

pub(super) const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// The server's end of a connection.
pub(super) struct Server {
    stream: UnixStream,
    read: Vec<u8>,
    heartbeats: usize,
}

impl Server {
    /// The next frame that is no heartbeat: its channel, and the method if it is one that `amq-protocol` knows, decoded.
    async fn heard(&mut self) -> (u16, AnyMethodOwned) {
        loop {
            let mut found = None;
            if let Some((frame, used)) = Splitter::new().next_frame(&self.read).unwrap() {
                match frame {
                    Frame::Heartbeat => self.heartbeats += 1,
                    Frame::Method {
                        channel,
                        class,
                        method,
                        args,
                    } => {
                        let method = AnyMethod::decode(class, method, args).unwrap();
                        found = Some((channel, owned(method)));
                    }
                    Frame::Header { .. } | Frame::Body { .. } => {}
                }
                self.read.drain(..used);
                match found {
                    Some(found) => return found,
                    None => continue,
                }
            }
            let mut buf = [0; 4096];
            let n = self.stream.read(&mut buf).await.unwrap();
            assert_ne!(n, 0, "the client has gone");
            self.read.extend_from_slice(&buf[..n]);
        }
    }

    /// Takes what the client has said in the handshake.
    async fn shook_hands(&mut self) {
        let mut header = [0; 8];
        self.stream.read(&mut header).await.unwrap();
        for _ in ["start-ok", "tune-ok", "open"] {
            self.heard().await;
        }
    }

    async fn says(&self, channel: u16, method: Method) {
        let mut out = Vec::new();
        cold::put(&mut out, channel, &method);
        self.stream.write_all(&out).await.unwrap();
    }

    /// Opens the channel that it is asked for.
    async fn opens(&mut self) {
        let (number, _) = self.heard().await;
        let ok = channel::OpenOk {};
        self.says(number, Method::Channel(channel::AMQPMethod::OpenOk(ok)))
            .await;
    }
}

#[derive(Debug, PartialEq)]
enum AnyMethodOwned {
    Publish,
    Ack(u64),
    Cold(Method),
}

fn owned(method: AnyMethod<'_>) -> AnyMethodOwned {
    match method {
        AnyMethod::Publish(_) => AnyMethodOwned::Publish,
        AnyMethod::Ack(ack) => AnyMethodOwned::Ack(ack.delivery_tag),
        AnyMethod::Cold(method) => AnyMethodOwned::Cold(method),
        other => panic!("{other:?}"),
    }
}

/// Runs `body` with a connection that is open, and the server's end of it.
pub(super) fn with_server<F: Future<Output = Result<(), Error>>>(
    options: Options,
    body: impl FnOnce(Connection, Server, VirtualClock) -> F,
) {
    let clock = VirtualClock::new();
    let mut kernel = Builder::new().clock(clock.clone()).build().unwrap();
    let run = kernel.run(async {
        let (near, far) = UnixStream::pair().unwrap();
        let mut server = Server {
            stream: far,
            read: Vec::new(),
            heartbeats: 0,
        };
        let mut out = Vec::new();
        put_handshake(&mut out);
        server.stream.write_all(&out).await.unwrap();
        let mut near = Some(near);
        let mut dialer = Dialer::Script(Box::new(move || {
            let near = near.take().ok_or(std::io::ErrorKind::ConnectionRefused)?;
            Ok((Transport::Unix(near), config()))
        }));
        let link = dialer.dial(&options).await?;
        let connection = Connection::start(link, dialer, options);
        server.shook_hands().await;
        body(connection, server, clock).await
    });
    run.unwrap().unwrap();
}

pub(super) fn config() -> ClientConfig {
    ClientConfig {
        auth: Auth::External,
        virtual_host: "/".into(),
        limits: Limits::default(),
        name: String::new(),
    }
}

/// A connection that is not made again.
fn plain() -> Options {
    Options {
        recovery: None,
        ..Options::default()
    }
}

/// All that a server says to a client that does as expected.
pub(super) fn put_handshake(out: &mut Vec<u8>) {
    use connection::AMQPMethod as M;
    let start = connection::Start {
        version_major: 0,
        version_minor: 9,
        server_properties: Default::default(),
        mechanisms: "EXTERNAL".into(),
        locales: "en_US".into(),
    };
    let tune = connection::Tune {
        channel_max: 2047,
        frame_max: 131_072,
        heartbeat: HEARTBEAT,
    };
    for method in [
        M::Start(start),
        M::Tune(tune),
        M::OpenOk(connection::OpenOk {}),
    ] {
        cold::put(out, 0, &Method::Connection(method));
    }
}

/// Opens a channel while the server answers.
pub(super) async fn open(connection: &Connection, server: &mut Server) -> Result<Channel, Error> {
    let opening = spawn({
        let connection = connection.clone();
        async move { connection.channel().await }
    });
    server.opens().await;
    opening.join().await.unwrap()
}

/// A publisher, while the server answers.
pub(super) async fn publisher(
    connection: &Connection,
    server: &mut Server,
) -> Result<Publisher, Error> {
    publisher_with(PublisherOptions::default(), connection, server).await
}

pub(super) async fn publisher_with(
    options: PublisherOptions,
    connection: &Connection,
    server: &mut Server,
) -> Result<Publisher, Error> {
    let opening = spawn({
        let connection = connection.clone();
        async move { connection.publisher(options).await }
    });
    server.opens().await;
    let (number, _) = server.heard().await;
    let ok = confirm::SelectOk {};
    server
        .says(number, Method::Confirm(confirm::AMQPMethod::SelectOk(ok)))
        .await;
    opening.join().await.unwrap()
}

/// A consumer of `tasks` with one delivery on its way.
pub(super) async fn consumer(channel: &Channel, server: &mut Server) -> Result<Consumer, Error> {
    let starting = spawn(channel.consume("tasks").start());
    let (number, _) = server.heard().await;
    let ok = basic::QosOk {};
    server
        .says(number, Method::Basic(basic::AMQPMethod::QosOk(ok)))
        .await;
    let (_, AnyMethodOwned::Cold(Method::Basic(basic::AMQPMethod::Consume(consume)))) =
        server.heard().await
    else {
        panic!("no consume")
    };
    let consumer_tag = consume.consumer_tag;
    let mut out = Vec::new();
    put_delivery(&mut out, number, consumer_tag.as_str(), 1);
    let ok = basic::ConsumeOk { consumer_tag };
    server
        .says(number, Method::Basic(basic::AMQPMethod::ConsumeOk(ok)))
        .await;
    server.stream.write_all(&out).await.unwrap();
    starting.join().await.unwrap()
}

fn put_delivery(out: &mut Vec<u8>, channel: u16, consumer_tag: &str, delivery_tag: u64) {
    let deliver = Deliver {
        consumer_tag,
        delivery_tag,
        redelivered: false,
        exchange: "",
        routing_key: "tasks",
    };
    deliver.put(out, channel);
    put_content(out, channel, Props::EMPTY.as_bytes(), b"x", 131_064);
}

/// Accepts: amqp/R18
#[test]
fn a_confirm_that_outlives_its_publisher_is_unconfirmed() {
    with_server(plain(), async |connection, mut server, _| {
        let publisher = publisher(&connection, &mut server).await?;
        let message = Message::new(b"x").key("tasks");
        let waiting = spawn(publisher.publish(message).await?);
        let late = publisher.publish(message).await?;
        kernel::wait_until_idle().await?;
        drop(publisher);
        let waited = kernel::timeout_after(secs(9), waiting.join()).await;
        for outcome in [waited.unwrap(), kernel::timeout_after(secs(9), late).await] {
            let unknown = Err(Error::Unconfirmed(Lost::ChannelClosedByUs));
            assert_eq!(outcome, unknown);
        }
        Ok(())
    });
}

/// Accepts: amqp/R7
#[test]
fn a_server_that_falls_silent_is_found_dead_after_two_heartbeats() {
    with_server(plain(), async |connection, mut server, clock| {
        let channel = open(&connection, &mut server).await?;
        let mut consumer = consumer(&channel, &mut server).await?;
        let delivery = consumer.next().await?.unwrap();
        let asked = channel.get("tasks");
        let (next, got) = futures_join(consumer.next(), asked).await;
        assert!(
            matches!(next, Err(Error::Lost(Down::HeartbeatMissed(_)))),
            "{next:?}"
        );
        assert!(
            matches!(got, Err(Error::Lost(Down::HeartbeatMissed(_)))),
            "{got:?}"
        );
        assert!(consumer.next().await?.is_none());
        assert_eq!(delivery.ack(), Settled::Stale);
        assert_eq!(clock.elapsed(), secs(20));

        // What the client has sent meanwhile; the last frame it sent was at 0 s.
        let (_, AnyMethodOwned::Cold(Method::Basic(basic::AMQPMethod::Get(_)))) =
            server.heard().await
        else {
            panic!("no get")
        };
        let mut rest = Vec::new();
        let mut buf = [0; 4096];
        loop {
            match server.stream.read(&mut buf).await.unwrap() {
                0 => break,
                n => rest.extend_from_slice(&buf[..n]),
            }
        }
        let mut heartbeat = Vec::new();
        put_heartbeat(&mut heartbeat);
        rest.splice(..0, server.read);
        assert_eq!(rest, heartbeat.repeat(3), "at 5, 10 and 15 s");
        Ok(())
    });
}

/// Accepts: amqp/R8, amqp/R18
#[test]
fn a_server_that_closes_is_answered_and_everybody_is_told() {
    with_server(plain(), async |connection, mut server, clock| {
        let publisher = publisher(&connection, &mut server).await?;
        let channel = publisher.channel().clone();
        let confirm = publisher.post(&Message::new(b"x").key("tasks"))?;
        let dropped = publisher.post(&Message::new(b"x").key("tasks"))?;
        drop(dropped);
        let asked = spawn(async move { channel.purge_queue("tasks").await });
        server.heard().await;
        server.heard().await;
        server.heard().await;
        let close = connection::Close {
            reply_code: 320,
            reply_text: "CONNECTION_FORCED - shutdown".into(),
            class_id: 0,
            method_id: 0,
        };
        server
            .says(0, Method::Connection(connection::AMQPMethod::Close(close)))
            .await;
        let unconfirmed = confirm.await.unwrap_err();
        assert!(matches!(unconfirmed, Error::Unconfirmed(_)));
        assert!(unconfirmed.is_connection_gone());
        assert_eq!(unconfirmed.reply_code(), Some(ReplyCode::CONNECTION_FORCED));
        let purged = asked.join().await.unwrap().unwrap_err();
        assert_eq!(purged.reply_code(), Some(ReplyCode::CONNECTION_FORCED));
        assert_eq!(publisher.unconfirmed(), 0);
        assert!(matches!(connection.closed().await?, Down::ClosedByPeer(_)));
        assert_eq!(
            clock.elapsed(),
            Duration::ZERO,
            "nobody waited for a deadline"
        );
        let ok = connection::AMQPMethod::CloseOk(connection::CloseOk {});
        let answer = AnyMethodOwned::Cold(Method::Connection(ok));
        assert_eq!(server.heard().await, (0, answer));
        Ok(())
    });
}

/// Accepts: amqp/R18
#[test]
fn a_confirm_has_a_deadline_but_not_while_the_server_takes_no_messages() {
    with_server(plain(), async |connection, mut server, clock| {
        let options = PublisherOptions {
            confirm_timeout: secs(5),
            ..PublisherOptions::default()
        };
        let publisher = publisher_with(options, &connection, &mut server).await?;
        let blocked = connection::AMQPMethod::Blocked(connection::Blocked {
            reason: "low on memory".into(),
        });
        let unblocked = connection::AMQPMethod::Unblocked(connection::Unblocked {});
        let confirm = publisher.post(&Message::new(b"x").key("tasks"))?;
        server.says(0, Method::Connection(blocked)).await;
        kernel::sleep(secs(15)).await?;
        server.says(0, Method::Connection(unblocked)).await;
        kernel::sleep(secs(4)).await?;
        let mut ack = Vec::new();
        let answer = Ack {
            delivery_tag: 1,
            multiple: false,
        };
        answer.put(&mut ack, 1);
        server.stream.write_all(&ack).await.unwrap();
        confirm.await?;

        let late = publisher.post(&Message::new(b"y").key("tasks"))?;
        let before = clock.elapsed();
        let error = late.await.unwrap_err();
        assert_eq!(error, Error::Unconfirmed(Lost::Late(secs(5))));
        let waited = clock.elapsed() - before;
        assert!(waited >= secs(5) && waited <= secs(6), "{waited:?}");
        // There is no other channel to be had, so the publisher is over.
        let after = publisher.post(&Message::new(b"z").key("tasks"));
        assert!(matches!(after, Err(Error::ChannelStuck)), "{after:?}");
        assert_eq!(publisher.unconfirmed(), 0);
        assert!(connection.tuned().is_some(), "it cost the channel alone");
        Ok(())
    });
}

/// Accepts: amqp/R21
#[test]
fn a_request_has_a_deadline_and_the_second_late_one_in_a_row_closes_the_channel() {
    let options = Options {
        rpc_timeout: secs(5),
        ..plain()
    };
    with_server(options, async |connection, mut server, clock| {
        let channel = open(&connection, &mut server).await?;
        let purge_ok = |message_count| {
            let ok = queue::PurgeOk { message_count };
            Method::Queue(queue::AMQPMethod::PurgeOk(ok))
        };
        let late = channel.purge_queue("a").await;
        assert!(matches!(late, Err(Error::Timeout { after, .. }) if after == secs(5)));
        assert_eq!(clock.elapsed(), secs(5));

        // The answer to the late one comes first, and is not taken for that of the next.
        let next = spawn({
            let channel = channel.clone();
            async move { channel.purge_queue("b").await }
        });
        server.heard().await;
        server.heard().await;
        server.says(1, purge_ok(1)).await;
        server.says(1, purge_ok(2)).await;
        assert_eq!(next.join().await.unwrap()?, 2);

        // One that is answered in time breaks the row.
        assert!(matches!(channel.qos(1).await, Err(Error::Timeout { .. })));
        assert!(channel.check().is_ok());
        assert!(matches!(channel.qos(1).await, Err(Error::Timeout { .. })));
        assert!(matches!(channel.check(), Err(Error::ChannelStuck)));
        for _ in ["qos", "qos"] {
            server.heard().await;
        }
        let (number, AnyMethodOwned::Cold(closed)) = server.heard().await else {
            panic!("no close")
        };
        assert!(matches!(
            closed,
            Method::Channel(channel::AMQPMethod::Close(_))
        ));
        assert_eq!(number, 1);
        Ok(())
    });
}

/// Accepts: amqp/R24, feature/blocked
#[test]
fn a_blocked_connection_parks_publishers_and_nothing_else() {
    with_server(plain(), async |connection, mut server, clock| {
        let channel = open(&connection, &mut server).await?;
        let mut consumer = consumer(&channel, &mut server).await?;
        let delivery = consumer.next().await?.unwrap();
        let mut events = connection.events();
        let reason = connection::Blocked {
            reason: "low on memory".into(),
        };
        server
            .says(
                0,
                Method::Connection(connection::AMQPMethod::Blocked(reason)),
            )
            .await;
        let event = events.next().await?;
        assert_eq!(
            event,
            Some(ConnectionEvent::Blocked("low on memory".into()))
        );
        assert!(connection.is_blocked());

        let message = Message::new(b"x").key("tasks");
        let busy = channel.try_publish(&message);
        assert!(matches!(busy, Err(Error::Busy(Busy::Blocked))));
        let parked = spawn({
            let channel = channel.clone();
            async move { channel.publish(Message::new(b"x").key("tasks")).await }
        });
        delivery.ack();
        assert_eq!(server.heard().await, (1, AnyMethodOwned::Ack(1)));
        kernel::sleep(secs(9)).await?;
        put_and_write(&server).await;
        kernel::sleep(secs(2)).await?;
        assert!(!parked.is_terminated());

        let unblocked = connection::AMQPMethod::Unblocked(connection::Unblocked {});
        server.says(0, Method::Connection(unblocked)).await;
        assert_eq!(server.heard().await, (1, AnyMethodOwned::Publish));
        parked.join().await.unwrap()?;
        assert_eq!(events.next().await?, Some(ConnectionEvent::Unblocked));
        assert_eq!(server.heartbeats, 2, "at 5 and 10 s");
        assert_eq!(clock.elapsed(), secs(11));
        Ok(())
    });
}

/// Accepts: feature/flow_and_tx
#[test]
fn a_channel_that_the_server_stops_publishes_when_it_may_and_transactions_are_plain_calls() {
    with_server(plain(), async |connection, mut server, _| {
        let channel = open(&connection, &mut server).await?;
        let flow = |active| Method::Channel(channel::AMQPMethod::Flow(channel::Flow { active }));
        let flow_ok = |active| {
            let ok = channel::AMQPMethod::FlowOk(channel::FlowOk { active });
            (1, AnyMethodOwned::Cold(Method::Channel(ok)))
        };
        server.says(1, flow(false)).await;
        assert_eq!(server.heard().await, flow_ok(false));
        let message = Message::new(b"x").key("tasks");
        let busy = channel.try_publish(&message);
        assert!(matches!(busy, Err(Error::Busy(Busy::Blocked))), "{busy:?}");
        let parked = spawn({
            let channel = channel.clone();
            async move { channel.publish(Message::new(b"x").key("tasks")).await }
        });
        kernel::sleep(secs(1)).await?;
        assert!(!parked.is_terminated());
        server.says(1, flow(true)).await;
        assert_eq!(server.heard().await, flow_ok(true));
        assert_eq!(server.heard().await, (1, AnyMethodOwned::Publish));
        parked.join().await.unwrap()?;

        for (request, answer) in [
            (
                tx::AMQPMethod::Select(tx::Select {}),
                tx::AMQPMethod::SelectOk(tx::SelectOk {}),
            ),
            (
                tx::AMQPMethod::Rollback(tx::Rollback {}),
                tx::AMQPMethod::RollbackOk(tx::RollbackOk {}),
            ),
            (
                tx::AMQPMethod::Commit(tx::Commit {}),
                tx::AMQPMethod::CommitOk(tx::CommitOk {}),
            ),
        ] {
            let (request, answer) = (Method::Tx(request), Method::Tx(answer));
            let calling = spawn({
                let (channel, request) = (channel.clone(), request.clone());
                async move { channel.call(request).await }
            });
            assert_eq!(server.heard().await, (1, AnyMethodOwned::Cold(request)));
            server.says(1, answer.clone()).await;
            assert_eq!(calling.join().await.unwrap()?, answer);
        }
        Ok(())
    });
}

/// Accepts: amqp/R9
#[test]
fn a_server_that_takes_no_bytes_is_given_up_though_it_still_talks() {
    with_server(plain(), async |connection, mut server, clock| {
        let channel = open(&connection, &mut server).await?;
        let body = vec![0; 4 << 20];
        channel.publish(Message::new(&body).key("tasks")).await?;
        let talker = spawn(async move {
            loop {
                kernel::sleep(secs(5)).await?;
                put_and_write(&server).await;
            }
            #[expect(unreachable_code, reason = "tells the type")]
            Ok::<(), Error>(())
        });
        let down = connection.closed().await?;
        assert!(
            matches!(&down, Down::Io(text) if text.contains("30 s")),
            "{down:?}"
        );
        assert_eq!(clock.elapsed(), secs(30));
        talker.cancel().await?;
        Ok(())
    });
}

/// Accepts: amqp/R10
#[test]
fn a_task_that_keeps_the_kernel_busy_is_told_of_and_the_heartbeat_goes_first() {
    with_server(plain(), async |connection, mut server, clock| {
        let channel = open(&connection, &mut server).await?;
        let mut consumer = consumer(&channel, &mut server).await?;
        let mut events = connection.events();
        consumer.next().await?.unwrap().ack();
        server.heard().await;
        assert_eq!(connection.loop_lag(), Duration::ZERO);

        // A quarter is 2.5 s, and it is looked at each 1.25 s.
        clock.advance(secs(2));
        kernel::sleep(Duration::from_millis(1)).await?;
        assert!(connection.loop_lag() <= secs(2) && connection.loop_lag() > Duration::ZERO);
        clock.advance(secs(7));
        // Something of the server's waits to be answered; the heartbeat goes before that.
        let flow = channel::AMQPMethod::Flow(channel::Flow { active: true });
        server.says(1, Method::Channel(flow)).await;
        let event = events.next().await?;
        let Some(ConnectionEvent::LoopLag(lag)) = event else {
            panic!("{event:?}")
        };
        assert!(
            lag <= secs(7) && lag >= secs(7) - Duration::from_millis(1250),
            "{lag:?}"
        );
        assert_eq!(connection.loop_lag(), lag);
        let mut said = Vec::new();
        put_heartbeat(&mut said);
        let ok = channel::AMQPMethod::FlowOk(channel::FlowOk { active: true });
        cold::put(&mut said, 1, &Method::Channel(ok));
        let mut bytes = [0; 100];
        let n = server.stream.read(&mut bytes).await.unwrap();
        assert_eq!(bytes[..n], said);
        Ok(())
    });
}

/// Accepts: amqp/R31
#[test]
fn a_delivery_held_for_long_is_warned_of_before_the_server_closes_its_channel() {
    let options = Options {
        heartbeat: Some(0),
        ack_timeout: Some(secs(100)),
        ..plain()
    };
    with_server(options, async |connection, mut server, clock| {
        let channel = open(&connection, &mut server).await?;
        let mut consumer = consumer(&channel, &mut server).await?;
        let mut events = connection.events();
        let delivery = consumer.next().await?.unwrap();
        let talker = spawn({
            let stream = server.stream;
            async move {
                for _ in 0..20 {
                    kernel::sleep(secs(5)).await?;
                    let mut out = Vec::new();
                    put_heartbeat(&mut out);
                    stream.write_all(&out).await.unwrap();
                }
                let close = channel::Close {
                    reply_code: 406,
                    reply_text: "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. \
                                 Timeout value used: 100000 ms. This timeout value can be configured, see consumers doc guide to learn more"
                        .into(),
                    class_id: 0,
                    method_id: 0,
                };
                let mut out = Vec::new();
                let close = channel::AMQPMethod::Close(close);
                cold::put(&mut out, 1, &Method::Channel(close));
                stream.write_all(&out).await.unwrap();
                Ok::<_, Error>(stream)
            }
        });
        let event = events.next().await?;
        let Some(ConnectionEvent::AckDue {
            channel: 1,
            tag: 1,
            held,
        }) = event
        else {
            panic!("{event:?}")
        };
        assert!(held >= secs(80), "{held:?}");
        assert!(
            clock.elapsed() >= secs(80) && clock.elapsed() <= secs(90),
            "{:?}",
            clock.elapsed()
        );
        assert_eq!(delivery.tag(), 1);
        let error = consumer.next().await.unwrap_err();
        assert!(matches!(error, Error::AckTimeout(_)), "{error}");
        assert_eq!(delivery.ack(), Settled::Stale);
        drop(talker);
        Ok(())
    });
}

/// What it costs to be woken is most of what a small message costs.
#[test]
fn deliveries_and_the_acks_that_they_are_given_take_two_turns_of_the_driver() {
    with_server(plain(), async |connection, mut server, _| {
        let channel = open(&connection, &mut server).await?;
        let mut consumer = consumer(&channel, &mut server).await?;
        let consumer_tag = consumer.tag().to_owned();
        let acking = spawn(async move {
            while let Some(delivery) = consumer.next().await? {
                delivery.ack();
            }
            Ok::<_, Error>(())
        });
        assert_eq!(server.heard().await, (1, AnyMethodOwned::Ack(1)));
        let turns_of_the_driver = || {
            let mut tasks = kernel::tasks().into_iter();
            let driver = tasks.find(|task| task.name.as_deref() == Some("amqp connection"));
            driver.unwrap().cycles
        };
        for last in [4, 7, 10] {
            kernel::wait_until_idle().await?;
            let before = turns_of_the_driver();
            let mut out = Vec::new();
            for tag in last - 2..=last {
                put_delivery(&mut out, 1, &consumer_tag, tag);
            }
            server.stream.write_all(&out).await.unwrap();
            kernel::wait_until_idle().await?;
            assert_eq!(turns_of_the_driver() - before, 2);
            assert_eq!(server.heard().await, (1, AnyMethodOwned::Ack(last)));
        }
        drop(acking);
        Ok(())
    });
}

async fn put_and_write(server: &Server) {
    let mut heartbeat = Vec::new();
    put_heartbeat(&mut heartbeat);
    // The client may be gone by now.
    let _ = server.stream.write_all(&heartbeat).await;
}

/// Polls three futures in one task.
pub(super) async fn join3<A: Future, B: Future, C: Future>(
    a: A,
    b: B,
    c: C,
) -> (A::Output, B::Output, C::Output) {
    let (a, (b, c)) = futures_join(a, futures_join(b, c)).await;
    (a, b, c)
}

/// Polls two futures in one task.
pub(super) async fn futures_join<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    let (mut a, mut b) = (std::pin::pin!(a), std::pin::pin!(b));
    let (mut first, mut second) = (None, None);
    std::future::poll_fn(|cx| {
        if first.is_none()
            && let std::task::Poll::Ready(value) = a.as_mut().poll(cx)
        {
            first = Some(value);
        }
        if second.is_none()
            && let std::task::Poll::Ready(value) = b.as_mut().poll(cx)
        {
            second = Some(value);
        }
        if first.is_some() && second.is_some() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    (first.expect("ready"), second.expect("ready"))
}

#[cfg(not(feature = "tls"))]
#[test]
fn amqps_without_tls_says_what_to_do() {
    let error = kernel::run(super::connect("amqps://localhost", Options::default()));
    assert_eq!(
        error.unwrap().unwrap_err().to_string(),
        "amqps:// needs TLS, which this program was built without; build it with the feature `tls` of sweepea-amqp, or use amqp://"
    );
}
