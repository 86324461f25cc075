//! Recovery, against a server that does what it is asked, says what it was asked, and can be told to refuse or hang up. On virtual
//! time, so that every wait is exact.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Duration;

use kernel::net::UnixStream;
use kernel::{Builder, VirtualClock, spawn};

use super::connection::Connection;
use super::dial::Dialer;
use super::tests::{config, put_handshake};
use super::transport::Transport;
use super::*;
use crate::error::ReplyCode;
use crate::proto::event::Lost;
use crate::wire::cold::{
    self, Method, basic, channel, confirm, connection, exchange, queue, short_text,
};
use crate::wire::frame::put_content;
use crate::wire::{Ack, AnyMethod, Deliver, Frame, Props, Splitter};

/// As a code in [`Robot::refuses`]: there is no answer at all.
const IGNORES: u16 = 0;

/// A server that can be dialled again and again.
#[derive(Default)]
struct Robot {
    /// What it was asked, over all connections, one line each: `1 queue.declare q`.
    heard: RefCell<Vec<String>>,
    /// The beginnings of lines that it answers by closing something with this code: the connection if it is 5xx or 320.
    refuses: RefCell<Vec<(&'static str, u16)>>,
    /// Why, if it says.
    reason: Cell<Option<&'static str>>,
    /// The beginning of a line at which it hangs up; once.
    hangs_up_at: Cell<Option<&'static str>>,
    /// The beginning of a line that it answers, and closes the connection in the same breath; once.
    closes_after: Cell<Option<&'static str>>,
    /// How many consumers its queues have.
    consumers: Cell<u32>,
    is_away: Cell<bool>,
    dialled: Cell<u32>,
    names: Cell<u32>,
    /// Publishings stay without an answer.
    is_silent: Cell<bool>,
    line: RefCell<Option<Rc<UnixStream>>>,
}

impl Robot {
    fn dialer(self: &Rc<Self>) -> Dialer {
        let robot = Rc::clone(self);
        Dialer::Script(Box::new(move || {
            robot.dialled.set(robot.dialled.get() + 1);
            if robot.is_away.get() {
                return Err(ErrorKind::ConnectionRefused.into());
            }
            let (near, far) = UnixStream::pair()?;
            let far = Rc::new(far);
            *robot.line.borrow_mut() = Some(Rc::clone(&far));
            spawn(Rc::clone(&robot).serve(far));
            Ok((Transport::Unix(near), config()))
        }))
    }

    /// Ends the connection without a word.
    fn cut(&self) {
        if let Some(line) = self.line.take() {
            line.as_std().shutdown(std::net::Shutdown::Both).unwrap();
        }
    }

    /// What was heard since the last time, without the handshakes.
    fn heard(&self) -> Vec<String> {
        self.heard.take()
    }

    async fn says(&self, channel: u16, method: Method) {
        let mut out = Vec::new();
        cold::put(&mut out, channel, &method);
        self.writes(&out).await;
    }

    async fn writes(&self, out: &[u8]) {
        let line = self.line.borrow().clone();
        if let Some(line) = line {
            let _ = line.write_all(out).await;
        }
    }

    /// Delivers to a consumer; the first on a channel is number 1.
    async fn delivers(&self, channel: u16, consumer_tag: &str, delivery_tag: u64) {
        let mut out = Vec::new();
        let deliver = Deliver {
            consumer_tag,
            delivery_tag,
            redelivered: false,
            exchange: "",
            routing_key: "q",
        };
        deliver.put(&mut out, channel);
        put_content(&mut out, channel, Props::EMPTY.as_bytes(), b"x", 131_064);
        self.writes(&out).await;
    }

    async fn serve(self: Rc<Self>, line: Rc<UnixStream>) {
        let mut out = Vec::new();
        put_handshake(&mut out);
        let _ = line.write_all(&out).await;
        let mut header = [0; 8];
        let _ = line.read(&mut header).await;
        let mut read = Vec::new();
        let mut published = [0_u64; 64];
        let mut publishing = String::new();
        loop {
            let mut said = None;
            while let Some((frame, used)) =
                Splitter::with_frame_max(131_072).next_frame(&read).unwrap()
            {
                let (mut channel_id, mut method, mut text) = (0, None, None);
                match frame {
                    Frame::Method {
                        channel,
                        class,
                        method: id,
                        args,
                    } => {
                        channel_id = channel;
                        match AnyMethod::decode(class, id, args).unwrap() {
                            AnyMethod::Publish(publish) => {
                                publishing = format!("{channel} publish {}", publish.routing_key);
                            }
                            AnyMethod::Ack(ack) => {
                                text = Some(format!("{channel} ack {}", ack.delivery_tag));
                            }
                            AnyMethod::Nack(nack) => {
                                text = Some(format!("{channel} nack {}", nack.delivery_tag));
                            }
                            AnyMethod::Cold(cold) => {
                                text = Some(format!("{channel} {}", name(&cold)));
                                method = Some(cold);
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                    Frame::Body { channel, data } => {
                        channel_id = channel;
                        let body = String::from_utf8_lossy(&data[..data.len().min(3)]);
                        text = Some(format!("{publishing} {body}"));
                        published[usize::from(channel)] += 1;
                    }
                    Frame::Header { .. } | Frame::Heartbeat => {}
                }
                read.drain(..used);
                if let Some(text) = text {
                    said = Some((channel_id, method, text));
                    break;
                }
            }
            let Some((id, method, text)) = said else {
                let mut buf = [0; 4096];
                match line.read(&mut buf).await {
                    Ok(n @ 1..) => read.extend_from_slice(&buf[..n]),
                    _ => return,
                }
                continue;
            };
            if text.starts_with("0 ") {
                if let Some(Method::Connection(connection::AMQPMethod::Close(_))) = method {
                    let ok = connection::AMQPMethod::CloseOk(connection::CloseOk {});
                    self.says(0, Method::Connection(ok)).await;
                }
                continue;
            }
            if let Some(Method::Channel(channel::AMQPMethod::CloseOk(_))) = method {
                continue;
            }
            let hangs_up = self.hangs_up_at.get().filter(|at| text.starts_with(at));
            let refused = {
                let refuses = self.refuses.borrow();
                let refused = refuses.iter().find(|(at, _)| text.starts_with(at));
                refused.map(|&(_, code)| code)
            };
            let is_publish = text.contains(" publish ");
            let closes = self.closes_after.get().filter(|at| text.starts_with(at));
            self.heard.borrow_mut().push(text);
            if hangs_up.is_some() {
                self.hangs_up_at.set(None);
                let _ = line.as_std().shutdown(std::net::Shutdown::Both);
                return;
            }
            match (refused, method) {
                (Some(code @ (320 | 500..)), _) => {
                    let close = connection::AMQPMethod::Close(connection::Close {
                        reply_code: code,
                        reply_text: "REFUSED".into(),
                        class_id: 0,
                        method_id: 0,
                    });
                    self.says(0, Method::Connection(close)).await;
                    return;
                }
                (Some(IGNORES), _) => {}
                (Some(code), _) => {
                    let close = channel::AMQPMethod::Close(channel::Close {
                        reply_code: code,
                        reply_text: self.reason.get().unwrap_or("REFUSED").into(),
                        class_id: 0,
                        method_id: 0,
                    });
                    self.says(id, Method::Channel(close)).await;
                }
                (None, Some(method)) => {
                    if let Method::Channel(channel::AMQPMethod::Open(_)) = method {
                        published[usize::from(id)] = 0;
                    }
                    if let Some(answer) = self.answer(method) {
                        let mut out = Vec::new();
                        cold::put(&mut out, id, &answer);
                        if closes.is_some() {
                            self.closes_after.set(None);
                            let close = connection::AMQPMethod::Close(connection::Close {
                                reply_code: 320,
                                reply_text: "CONNECTION_FORCED".into(),
                                class_id: 0,
                                method_id: 0,
                            });
                            cold::put(&mut out, 0, &Method::Connection(close));
                        }
                        self.writes(&out).await;
                        if closes.is_some() {
                            return;
                        }
                    }
                }
                (None, None) if is_publish && !self.is_silent.get() => {
                    let mut out = Vec::new();
                    let ack = Ack {
                        delivery_tag: published[usize::from(id)],
                        multiple: false,
                    };
                    ack.put(&mut out, id);
                    self.writes(&out).await;
                }
                (None, None) => {}
            }
        }
    }

    fn answer(&self, method: Method) -> Option<Method> {
        use {basic::AMQPMethod as B, channel::AMQPMethod as C, confirm::AMQPMethod as F};
        use {exchange::AMQPMethod as E, queue::AMQPMethod as Q};
        Some(match method {
            Method::Channel(C::Open(_)) => Method::Channel(C::OpenOk(channel::OpenOk {})),
            Method::Channel(C::Close(_)) => Method::Channel(C::CloseOk(channel::CloseOk {})),
            Method::Exchange(E::Declare(_)) => {
                Method::Exchange(E::DeclareOk(exchange::DeclareOk {}))
            }
            Method::Exchange(E::Bind(_)) => Method::Exchange(E::BindOk(exchange::BindOk {})),
            Method::Queue(Q::Declare(declare)) => {
                let mut name = declare.queue;
                if name.as_str().is_empty() {
                    self.names.set(self.names.get() + 1);
                    name = short_text(&format!("amq.gen-{}", self.names.get()));
                }
                Method::Queue(Q::DeclareOk(queue::DeclareOk {
                    queue: name,
                    message_count: 0,
                    consumer_count: self.consumers.get(),
                }))
            }
            Method::Queue(Q::Bind(_)) => Method::Queue(Q::BindOk(queue::BindOk {})),
            Method::Queue(Q::Delete(_)) => {
                Method::Queue(Q::DeleteOk(queue::DeleteOk { message_count: 0 }))
            }
            Method::Basic(B::Qos(_)) => Method::Basic(B::QosOk(basic::QosOk {})),
            Method::Basic(B::Consume(consume)) => {
                let consumer_tag = consume.consumer_tag;
                Method::Basic(B::ConsumeOk(basic::ConsumeOk { consumer_tag }))
            }
            Method::Basic(B::Cancel(cancel)) => {
                let consumer_tag = cancel.consumer_tag;
                Method::Basic(B::CancelOk(basic::CancelOk { consumer_tag }))
            }
            Method::Confirm(F::Select(_)) => Method::Confirm(F::SelectOk(confirm::SelectOk {})),
            _ => return None,
        })
    }
}

fn name(method: &Method) -> String {
    use {basic::AMQPMethod as B, channel::AMQPMethod as C};
    use {exchange::AMQPMethod as E, queue::AMQPMethod as Q};
    match method {
        Method::Channel(C::Open(_)) => "open".to_owned(),
        Method::Channel(C::Close(_)) => "close".to_owned(),
        Method::Exchange(E::Declare(m)) => format!("exchange.declare {}", m.exchange),
        Method::Exchange(E::Bind(m)) => format!("exchange.bind {} {}", m.destination, m.source),
        Method::Queue(Q::Declare(m)) if m.passive => format!("queue.look {}", m.queue),
        Method::Queue(Q::Declare(m)) => format!("queue.declare {}", m.queue),
        Method::Queue(Q::Bind(m)) => format!("queue.bind {} {}", m.queue, m.exchange),
        Method::Queue(Q::Purge(m)) => format!("queue.purge {}", m.queue),
        Method::Queue(Q::Delete(m)) => format!("queue.delete {}", m.queue),
        Method::Basic(B::Qos(m)) => format!("qos {}", m.prefetch_count),
        Method::Basic(B::Consume(m)) => format!("consume {} {}", m.queue, m.consumer_tag),
        Method::Basic(B::Cancel(m)) => format!("cancel {}", m.consumer_tag),
        Method::Confirm(_) => "confirm".to_owned(),
        Method::Tx(_) => "tx".to_owned(),
        other => format!(
            "{}.{}",
            other.get_amqp_class_id(),
            other.get_amqp_method_id()
        ),
    }
}

fn with_robot<F: Future<Output = Result<(), Error>>>(
    recovery: Recovery,
    body: impl FnOnce(Connection, Rc<Robot>, VirtualClock) -> F,
) {
    let clock = VirtualClock::new();
    let mut kernel = Builder::new().clock(clock.clone()).build().unwrap();
    let run = kernel.run(async {
        let robot = Rc::<Robot>::default();
        let options = Options {
            recovery: Some(recovery),
            ..Options::default()
        };
        let mut dialer = robot.dialer();
        let link = dialer.dial(&options).await?;
        let connection = Connection::start(link, dialer, options);
        body(connection, robot, clock).await
    });
    run.unwrap().unwrap();
}

/// Waits for an event that `is_it`; answers with those before it, and it.
async fn until(
    events: &mut Events,
    is_it: impl Fn(&ConnectionEvent) -> bool,
) -> Result<Vec<ConnectionEvent>, Error> {
    let mut seen = Vec::new();
    while let Some(event) = events.next().await? {
        let is_last = is_it(&event);
        seen.push(event);
        if is_last {
            return Ok(seen);
        }
    }
    panic!("the events are over: {seen:?}");
}

async fn recovered(events: &mut Events) -> Result<Vec<ConnectionEvent>, Error> {
    until(events, |e| matches!(e, ConnectionEvent::Recovered { .. })).await
}

/// Lets everybody else do what they can.
async fn settled() -> Result<(), Error> {
    for _ in 0..100 {
        kernel::yield_now().await?;
    }
    Ok(())
}

/// An exchange bound to another, a queue that the server names, bound, consumed from with a prefetch of 5 on channel 2.
async fn furnish(connection: &Connection) -> Result<(Channel, Channel, Consumer), Error> {
    let one = connection.channel().await?;
    one.exchange("y", "topic").declare().await?;
    one.exchange("x", "fanout").declare().await?;
    one.bind_exchange("x", "y", "#").await?;
    let two = connection.channel().await?;
    let queue = two.queue("").exclusive().declare().await?.name;
    one.bind_queue(&queue, "x", "").await?;
    let consumer = two.consume(&queue).prefetch(5).tag("t").start().await?;
    Ok((one, two, consumer))
}

/// What recovery says for [`furnish`], for the second name of the queue, or a later one.
fn furnished(n: u32) -> Vec<String> {
    [
        "1 open".to_owned(),
        "1 exchange.declare y".to_owned(),
        "1 exchange.declare x".to_owned(),
        "1 exchange.bind x y".to_owned(),
        "1 queue.declare ".to_owned(),
        format!("1 queue.bind amq.gen-{n} x"),
        "1 close".to_owned(),
        "1 open".to_owned(),
        "2 open".to_owned(),
        "2 qos 5".to_owned(),
        format!("2 consume amq.gen-{n} t"),
    ]
    .into()
}

/// Accepts: amqp/R1, amqp/R2, amqp/R5
#[test]
fn everything_comes_back_in_order_with_its_prefetch_and_under_its_new_name() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let mut events = connection.events();
        let (one, two, mut consumer) = furnish(&connection).await?;
        assert_eq!(&*consumer.queue(), "amq.gen-1");
        robot.delivers(2, "t", 1).await;
        let taken = consumer.next().await?.unwrap();
        robot.delivers(2, "t", 2).await;
        settled().await?;
        assert_eq!(consumer.waiting(), 1);
        robot.heard();
        robot.cut();

        let seen = recovered(&mut events).await?;
        assert_eq!(robot.heard(), furnished(2));
        assert!(matches!(seen[0], ConnectionEvent::Lost(_)), "{seen:?}");
        assert!(
            matches!(seen[1], ConnectionEvent::Recovering { attempt: 1, .. }),
            "{seen:?}"
        );
        let renamed = vec![("amq.gen-1".to_owned(), "amq.gen-2".to_owned())];
        assert_eq!(seen[2], ConnectionEvent::Recovered { renamed });
        assert_eq!(&*consumer.queue(), "amq.gen-2");

        // What is of the old connection says nothing on the new one.
        assert_eq!(consumer.waiting(), 0, "given out anew by the broker");
        assert!(taken.is_stale());
        assert_eq!(taken.ack(), Settled::Stale);
        robot.delivers(2, "t", 1).await;
        assert_eq!(consumer.next().await?.unwrap().ack(), Settled::Queued);
        settled().await?;
        assert_eq!(robot.heard(), ["2 ack 1"]);
        one.exchange("z", "direct").declare().await?;
        assert_eq!((one.number(), two.number()), (1, 2));
        let _ = connection.close(Duration::from_secs(5)).await?;
        assert_eq!(robot.dialled.get(), 2, "closed by us, it is not made again");
        assert_eq!(
            events.next().await?,
            Some(ConnectionEvent::Lost(crate::proto::event::Down::ClosedByUs))
        );
        assert_eq!(events.next().await?, None);
        Ok(())
    });
}

/// Accepts: amqp/R4
#[test]
fn a_connection_cut_at_any_step_of_recovery_starts_again_from_zero() {
    const STEPS: [&str; 9] = [
        "1 open",
        "1 exchange.declare y",
        "1 exchange.bind",
        "1 queue.declare",
        "1 queue.bind",
        "1 close",
        "2 open",
        "2 qos",
        "2 consume",
    ];
    for step in STEPS {
        with_robot(Recovery::default(), async |connection, robot, _| {
            let mut events = connection.events();
            let (_one, _two, mut consumer) = furnish(&connection).await?;
            robot.heard();
            robot.hangs_up_at.set(Some(step));
            robot.cut();
            recovered(&mut events).await?;
            let heard = robot.heard();
            // The last connection's share is the whole, and the only one with a consumer that lives.
            let names = robot.names.get();
            let whole = furnished(names);
            assert!(heard.ends_with(&whole), "{step}: {heard:?}");
            let first = &heard[..heard.len() - whole.len()];
            assert!(first.last().unwrap().starts_with(step), "{step}: {first:?}");
            robot.delivers(2, "t", 1).await;
            assert_eq!(consumer.next().await?.unwrap().ack(), Settled::Queued);
            assert_eq!(robot.dialled.get(), 3, "{step}");
            Ok(())
        });
    }
}

/// Accepts: amqp/R3
#[test]
fn what_cannot_be_made_again_costs_nothing_else() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let mut events = connection.events();
        let (one, two, mut consumer) = furnish(&connection).await?;
        let other = two.consume("elsewhere").tag("u").start().await?;
        robot.heard();
        robot.refuses.replace(vec![
            ("1 exchange.declare y", 406),
            ("2 consume elsewhere", 403),
        ]);
        robot.cut();
        let seen = recovered(&mut events).await?;
        let failed: Vec<_> = seen
            .iter()
            .filter_map(|event| match event {
                ConnectionEvent::EntityFailed { entity, error } => {
                    Some((entity.to_string(), error.reply_code().unwrap().0))
                }
                _ => None,
            })
            .collect();
        assert_eq!(
            failed,
            [
                ("exchange \"y\"".to_owned(), 406),
                ("consumer \"u\" of queue \"elsewhere\"".to_owned(), 403)
            ]
        );
        let heard = robot.heard();
        let heard: Vec<_> = heard.iter().map(String::as_str).collect();
        assert_eq!(
            heard,
            [
                "1 open",
                "1 exchange.declare y",
                "1 open",
                "1 exchange.declare x",
                "1 exchange.bind x y",
                "1 queue.declare ",
                "1 queue.bind amq.gen-2 x",
                "1 close",
                "1 open",
                "2 open",
                "2 qos 5",
                "2 consume amq.gen-2 t",
                "2 qos 64",
                "2 consume elsewhere u",
                // The same channel to its user, without the consumer that is refused.
                "2 open",
                "2 qos 5",
                "2 consume amq.gen-2 t",
                "2 qos 64",
            ]
        );
        robot.delivers(2, "t", 1).await;
        assert_eq!(consumer.next().await?.unwrap().ack(), Settled::Queued);
        let mut other = other;
        let error = other.next().await.unwrap_err();
        assert_eq!(error.reply_code(), Some(ReplyCode::ACCESS_REFUSED));
        assert!(other.next().await?.is_none());
        one.check()?;
        two.check()
    });
}

/// Accepts: amqp/R8, amqp/R18
#[test]
fn what_was_not_confirmed_is_published_again_and_every_future_resolves_once() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let mut events = connection.events();
        let publisher = Rc::new(connection.publisher(PublisherOptions::default()).await?);
        publisher.send(Message::new(b"0").key("q")).await?;
        robot.heard();
        robot.is_silent.set(true);
        let mut confirms = Vec::new();
        for body in [b"1", b"2", b"3"] {
            confirms.push(publisher.post(&Message::new(body).key("q"))?);
        }
        // Nobody waits for this one; it is published again all the same.
        drop(confirms.remove(1));
        let large = vec![b'L'; 300_000];
        confirms.push(publisher.post(&Message::new(&large).key("q"))?);
        settled().await?;
        let channel = publisher.channel().clone();
        let asked = spawn(async move { channel.purge_queue("q").await });
        settled().await?;
        robot.cut();
        settled().await?;
        assert!(connection.is_recovering());
        let busy = publisher.post(&Message::new(b"4").key("q"));
        assert!(
            matches!(busy, Err(Error::Busy(Busy::Recovering))),
            "{busy:?}"
        );
        let parked = spawn({
            let publisher = Rc::clone(&publisher);
            async move { publisher.send(Message::new(b"4").key("q")).await }
        });
        let purged = asked.join().await.unwrap();
        assert!(
            matches!(
                purged,
                Err(Error::Unanswered {
                    what: "queue.purge",
                    ..
                })
            ),
            "{purged:?}"
        );
        // Cut once more in the middle of it: nothing is confirmed yet.
        robot.heard();
        robot.hangs_up_at.set(Some("1 publish q 2"));
        recovered(&mut events).await?;
        recovered(&mut events).await?;
        while !robot
            .heard
            .borrow()
            .iter()
            .any(|line| line.ends_with(" q 4"))
        {
            kernel::yield_now().await?;
        }
        assert_eq!(publisher.unconfirmed(), 5);
        let heard = robot.heard();
        let bodies = |heard: &[String]| -> Vec<char> {
            let bodies = heard.iter().filter_map(|line| line.split(" q ").nth(1));
            bodies.filter_map(|body| body.chars().next()).collect()
        };
        assert_eq!(
            bodies(&heard),
            ['1', '2', '1', '2', '3', 'L', 'L', 'L', '4'],
            "a large one in three frames, the new one last: {heard:?}"
        );
        robot.is_silent.set(false);
        let mut out = Vec::new();
        let ack = Ack {
            delivery_tag: 5,
            multiple: true,
        };
        ack.put(&mut out, 1);
        robot.writes(&out).await;
        for confirm in confirms {
            confirm.await?;
        }
        parked.join().await.unwrap()?;
        publisher.flush().await?;
        assert_eq!(publisher.unconfirmed(), 0);
        publisher.send(Message::new(b"5").key("q")).await
    });
}

/// Accepts: amqp/R4
#[test]
fn a_connection_closed_in_the_same_breath_as_a_channel_is_opened_is_recovered_whole() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let mut events = connection.events();
        let (one, two, mut consumer) = furnish(&connection).await?;
        robot.closes_after.set(Some("1 close"));
        robot.cut();
        recovered(&mut events).await?;
        robot.closes_after.set(Some("1 open"));
        robot.cut();
        recovered(&mut events).await?;
        robot.delivers(2, "t", 1).await;
        assert_eq!(consumer.next().await?.unwrap().ack(), Settled::Queued);
        one.qos(1).await?;
        two.qos(1).await
    });
}

fn impatient() -> PublisherOptions {
    PublisherOptions {
        confirm_timeout: Duration::from_secs(10),
        ..PublisherOptions::default()
    }
}

/// Accepts: amqp/R18
#[test]
fn a_confirm_that_is_late_is_reported_and_what_came_after_is_published_again_on_another_channel() {
    with_robot(Recovery::default(), async |connection, robot, clock| {
        let mut events = connection.events();
        let publisher = connection.publisher(impatient()).await?;
        let consumer = publisher.channel().consume("q").tag("t").start().await?;
        let other = connection.channel().await?;
        robot.is_silent.set(true);
        let message = Message::new(b"1").key("q");
        let late = [publisher.post(&message)?, publisher.post(&message)?];
        drop(publisher.post(&message)?);
        kernel::sleep(Duration::from_secs(6)).await?;
        let young = publisher.post(&Message::new(b"2").key("q"))?;
        drop(publisher.post(&Message::new(b"3").key("q"))?);
        settled().await?;
        robot.heard();
        robot.is_silent.set(false);
        for late in late {
            let error = late.await.unwrap_err();
            let limit = Duration::from_secs(10);
            assert_eq!(error, Error::Unconfirmed(Lost::Late(limit)));
        }
        let elapsed = clock.elapsed();
        assert!(elapsed >= Duration::from_secs(10), "{elapsed:?}");
        assert!(elapsed <= Duration::from_secs(12), "{elapsed:?}");
        young.await?;
        publisher.send(Message::new(b"4").key("q")).await?;
        assert_eq!(publisher.unconfirmed(), 0);
        let late = ConnectionEvent::ConfirmsLate {
            channel: 1,
            unconfirmed: 3,
        };
        assert_eq!(events.next().await?, Some(late));
        assert_eq!(
            robot.heard(),
            [
                "1 close",
                "3 open",
                "3 qos 64",
                "3 confirm",
                "3 consume q t",
                "3 publish q 2",
                "3 publish q 3",
                "3 publish q 4"
            ]
        );
        assert_eq!(robot.dialled.get(), 1, "it cost one channel");
        other.qos(1).await?;
        drop(consumer);

        // A server that answers nothing at all costs its connection.
        robot
            .refuses
            .replace(vec![("3 close", IGNORES), ("1 open", IGNORES)]);
        robot.is_silent.set(true);
        let late = publisher.post(&message)?;
        kernel::sleep(Duration::from_secs(6)).await?;
        let young = publisher.post(&Message::new(b"5").key("q"))?;
        assert!(matches!(late.await, Err(Error::Unconfirmed(Lost::Late(_)))));
        robot.is_silent.set(false);
        until(&mut events, |e| matches!(e, ConnectionEvent::Lost(_))).await?;
        robot.refuses.take();
        recovered(&mut events).await?;
        young.await?;
        publisher.close().await?;
        assert_eq!(robot.dialled.get(), 2);
        Ok(())
    });
}

#[test]
fn without_replay_a_late_confirm_takes_the_others_along_and_the_publisher_goes_on() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let options = PublisherOptions {
            replay: false,
            ..impatient()
        };
        let publisher = connection.publisher(options).await?;
        robot.is_silent.set(true);
        let late = publisher.post(&Message::new(b"1").key("q"))?;
        kernel::sleep(Duration::from_secs(6)).await?;
        let young = publisher.post(&Message::new(b"2").key("q"))?;
        settled().await?;
        for confirm in [late, young] {
            assert!(matches!(
                confirm.await,
                Err(Error::Unconfirmed(Lost::Late(_)))
            ));
        }
        robot.is_silent.set(false);
        publisher.send(Message::new(b"3").key("q")).await?;
        assert_eq!(robot.dialled.get(), 1);
        Ok(())
    });
}

/// Often enough that the connection is not taken for dead in between.
const BUSY: Recovery = Recovery {
    first_wait: Duration::from_secs(1),
    max_wait: Duration::from_secs(8),
    attempts: None,
};

fn failures(seen: &[ConnectionEvent]) -> Vec<(String, u16)> {
    let failed = seen.iter().filter_map(|event| match event {
        ConnectionEvent::EntityFailed { entity, error } => {
            Some((entity.to_string(), error.reply_code()?.0))
        }
        _ => None,
    });
    failed.collect()
}

/// Accepts: amqp/R3
#[test]
fn an_exclusive_consumer_that_the_server_still_has_is_started_when_that_is_gone() {
    with_robot(BUSY, async |connection, robot, _| {
        let mut events = connection.events();
        let channel = connection.channel().await?;
        let held = channel.consume("held").exclusive().tag("h");
        let mut held = held.start().await?;
        let mut kept = channel.consume("kept").tag("k").start().await?;
        robot.heard();
        robot.consumers.set(1);
        robot.reason.set(Some(
            "ACCESS_REFUSED - queue 'held' in vhost '/' in exclusive use",
        ));
        robot.refuses.replace(vec![("1 consume held", 403)]);
        robot.cut();
        let seen = recovered(&mut events).await?;
        let refused = ("consumer \"h\" of queue \"held\"".to_owned(), 403);
        assert_eq!(failures(&seen), [refused]);
        robot.heard();
        // As long as somebody has it, nobody asks for it: each refusal would cost the channel.
        kernel::sleep(Duration::from_secs(30)).await?;
        let heard = robot.heard();
        let tries = |what: &str| heard.iter().filter(|line| line.contains(what)).count();
        assert!(tries("queue.look held") >= 3, "{heard:?}");
        assert_eq!(tries("consume"), 0, "{heard:?}");
        robot.delivers(1, "k", 1).await;
        kept.next().await?.unwrap().ack();
        // It goes, but somebody else is quicker once.
        robot.consumers.set(0);
        while tries_of(&robot, "1 consume held") == 0 {
            kernel::sleep(Duration::from_secs(1)).await?;
        }
        robot.refuses.take();
        let restored = |e: &ConnectionEvent| matches!(e, ConnectionEvent::ConsumerRestored { queue } if queue == "held");
        let seen = until(&mut events, restored).await?;
        assert_eq!(failures(&seen), [], "told already");
        robot.delivers(1, "h", 1).await;
        held.next().await?.unwrap().ack();
        Ok(())
    });
}

fn tries_of(robot: &Robot, what: &str) -> usize {
    let heard = robot.heard.borrow();
    heard.iter().filter(|line| line.starts_with(what)).count()
}

#[test]
fn what_somebody_else_keeps_for_himself_is_given_up_after_a_while_and_told_of() {
    for (code, entity) in [(403, "consumer \"h\" of queue \"q\""), (405, "queue \"q\"")] {
        with_robot(BUSY, async |connection, robot, clock| {
            let mut events = connection.events();
            let channel = connection.channel().await?;
            channel.queue("q").exclusive().declare().await?;
            channel.bind_queue("q", "x", "").await?;
            let mut consumer = channel.consume("q").exclusive().tag("h").start().await?;
            robot.consumers.set(1);
            robot
                .reason
                .set(Some("queue 'q' in vhost '/' in exclusive use"));
            robot.refuses.replace(match code {
                403 => vec![("1 consume q", 403)],
                _ => vec![
                    ("1 queue.declare q", 405),
                    ("2 queue.declare q", 405),
                    ("1 queue.bind q", 404),
                    ("1 consume q", 404),
                ],
            });
            let before = clock.elapsed();
            robot.cut();
            let first = recovered(&mut events).await?;
            assert!(
                failures(&first).contains(&(entity.to_owned(), code)),
                "{first:?}"
            );
            let error = consumer.next().await.unwrap_err();
            assert_eq!(error.reply_code(), Some(ReplyCode(code)), "{error}");
            let waited = clock.elapsed() - before;
            assert!(waited >= Duration::from_secs(60), "{waited:?}");
            assert!(waited <= Duration::from_secs(100), "{waited:?}");
            assert!(consumer.next().await?.is_none());
            robot.heard();
            // Nobody asks any more, but for the queue, which has a time of its own.
            kernel::sleep(Duration::from_secs(15)).await?;
            assert_eq!(tries_of(&robot, "1 consume"), 0);
            let given_up = |e: &ConnectionEvent| matches!(e, ConnectionEvent::EntityFailed { .. });
            until(&mut events, given_up).await?;
            channel.qos(1).await
        });
    }
}

#[test]
fn an_exclusive_queue_that_the_server_still_has_is_made_again_with_its_bindings() {
    with_robot(BUSY, async |connection, robot, _| {
        let mut events = connection.events();
        let channel = connection.channel().await?;
        channel.queue("mine").exclusive().declare().await?;
        channel.bind_queue("mine", "x", "").await?;
        robot.refuses.replace(vec![
            ("1 queue.declare mine", 405),
            ("2 queue.declare mine", 405),
            ("1 queue.bind mine", 405),
        ]);
        robot.cut();
        let seen = recovered(&mut events).await?;
        let queue = ("queue \"mine\"".to_owned(), 405);
        assert_eq!(failures(&seen)[0], queue, "{seen:?}");
        kernel::sleep(Duration::from_secs(10)).await?;
        robot.heard();
        robot.refuses.take();
        let restored = ConnectionEvent::QueueRestored {
            queue: "mine".to_owned(),
        };
        assert_eq!(events.next().await?, Some(restored));
        assert_eq!(
            robot.heard(),
            ["2 open", "2 queue.declare mine", "2 queue.bind mine x"]
        );
        Ok(())
    });
}

#[test]
fn consumers_that_wait_on_one_channel_do_not_multiply() {
    with_robot(BUSY, async |connection, robot, _| {
        let mut events = connection.events();
        let channel = connection.channel().await?;
        let consumers = [
            channel.consume("a").tag("a").start().await?,
            channel.consume("b").tag("b").start().await?,
        ];
        // The queues are there, and yet the consumers are refused.
        robot.refuses.replace(vec![
            ("1 consume", 404),
            ("2 consume", 404),
            ("3 consume", 404),
        ]);
        robot.cut();
        let seen = recovered(&mut events).await?;
        assert_eq!(failures(&seen).len(), 2, "{seen:?}");
        kernel::sleep(Duration::from_secs(100)).await?;
        // In the mean one each four seconds for either, once the waits have grown.
        let looks = tries_of(&robot, "2 queue.look") + tries_of(&robot, "1 queue.look");
        assert!((20..150).contains(&looks), "{looks}");
        robot.refuses.take();
        for name in ["a", "b"] {
            let restored = |e: &ConnectionEvent| matches!(e, ConnectionEvent::ConsumerRestored { queue } if queue == "a" || queue == "b");
            let seen = until(&mut events, restored).await?;
            assert_eq!(failures(&seen), [], "{name}");
        }
        drop(consumers);
        Ok(())
    });
}

#[test]
fn what_is_kept_for_replay_is_bounded_in_bytes() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let options = PublisherOptions {
            replay_bytes: 1_000,
            ..PublisherOptions::default()
        };
        let publisher = connection.publisher(options).await?;
        robot.is_silent.set(true);
        let body = [0; 499];
        let message = Message::new(&body).key("q");
        let kept = [publisher.post(&message)?, publisher.post(&message)?];
        let full = publisher.post(&message);
        assert!(matches!(full, Err(Error::Busy(Busy::Window))), "{full:?}");
        let mut out = Vec::new();
        let ack = Ack {
            delivery_tag: 1,
            multiple: false,
        };
        ack.put(&mut out, 1);
        robot.writes(&out).await;
        let third = publisher.publish(message).await?;
        drop((kept, third));

        // One that is larger than all that may be kept goes alone, and a publisher that replays nothing keeps nothing.
        let huge = vec![0; 5_000];
        let other = connection.publisher(options).await?;
        drop(other.post(&Message::new(&huge).key("q"))?);
        assert!(other.post(&message).is_err());
        let plain = PublisherOptions {
            replay: false,
            ..options
        };
        let plain = connection.publisher(plain).await?;
        let mut confirms = Vec::new();
        for _ in 0..10 {
            confirms.push(plain.post(&message)?);
        }
        robot.cut();
        for confirm in confirms {
            assert!(matches!(confirm.await, Err(Error::Unconfirmed(_))));
        }
        Ok(())
    });
}

/// Accepts: amqp/R4
#[test]
fn attempts_go_on_with_growing_waits_until_one_succeeds_or_no_more_are_allowed() {
    let recovery = Recovery {
        first_wait: Duration::from_secs(1),
        max_wait: Duration::from_secs(8),
        attempts: None,
    };
    with_robot(recovery, async |connection, robot, clock| {
        let mut events = connection.events();
        let channel = connection.channel().await?;
        robot.is_away.set(true);
        robot.cut();
        let many = until(&mut events, |e| {
            matches!(e, ConnectionEvent::Recovering { attempt: 50, .. })
        });
        let mut waited = Duration::ZERO;
        for event in many.await? {
            if let ConnectionEvent::Recovering { attempt, wait } = event {
                let bound = Duration::from_secs(1 << (attempt - 1).min(3));
                assert!(wait <= bound, "{attempt}: {wait:?}");
                waited += wait;
            }
        }
        // The last wait has begun; a request waits no longer than any other.
        let before = clock.elapsed();
        assert!(waited >= before);
        let asked = channel.qos(1).await;
        assert!(
            matches!(asked, Err(Error::Timeout { after, .. }) if after == Duration::from_secs(30)),
            "{asked:?}"
        );
        robot.is_away.set(false);
        recovered(&mut events).await?;
        channel.qos(1).await
    });
    let recovery = Recovery {
        attempts: Some(3),
        ..recovery
    };
    with_robot(recovery, async |connection, robot, _| {
        let mut events = connection.events();
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        let channel = connection.channel().await?;
        let mut consumer = channel.consume("q").start().await?;
        robot.is_silent.set(true);
        let confirm = publisher.post(&Message::new(b"x").key("q"))?;
        settled().await?;
        robot.is_away.set(true);
        robot.cut();
        settled().await?;
        let (confirm, next, asked) =
            super::tests::join3(confirm, consumer.next(), channel.qos(1)).await;
        assert!(matches!(confirm, Err(Error::Unconfirmed(_))), "{confirm:?}");
        for error in [
            next.unwrap_err(),
            asked.unwrap_err(),
            publisher.post(&Message::new(b"x")).unwrap_err(),
        ] {
            assert!(matches!(error, Error::NotRecovered { .. }), "{error}");
            assert!(error.is_connection_gone());
            assert!(error.to_string().contains("refused"), "{error}");
        }
        assert_eq!(robot.dialled.get(), 4);
        let over = until(&mut events, |e| matches!(e, ConnectionEvent::GaveUp(_)));
        over.await?;
        assert_eq!(events.next().await?, None);
        assert_eq!(
            connection.close(Duration::from_secs(1)).await?.unconfirmed,
            1
        );
        Ok(())
    });
}

/// Accepts: amqp/R15
#[test]
fn a_hard_error_is_recovered_unless_it_would_come_again() {
    for (code, dialled) in [(320, 2), (541, 2), (530, 1), (504, 3)] {
        with_robot(Recovery::default(), async |connection, robot, _| {
            let channel = connection.channel().await?;
            let mut consumer = channel.consume("q").tag("t").start().await?;
            robot.refuses.replace(vec![("1 queue.declare bad", code)]);
            let failed = channel.queue("bad").declare().await.unwrap_err();
            assert_eq!(failed.reply_code(), Some(ReplyCode(code)));
            if dialled > 1 {
                channel.qos(1).await?;
                robot.refuses.take();
            }
            if code == 504 {
                // A second one, and it is over.
                robot.refuses.replace(vec![("1 qos", 501), ("2 qos", 501)]);
                channel.qos(2).await.unwrap_err();
            }
            if dialled != 2 {
                let error = consumer.next().await.unwrap_err();
                assert!(matches!(error, Error::Lost(_)), "{code}: {error}");
                let error = channel.qos(1).await.unwrap_err();
                assert!(error.is_connection_gone(), "{error}");
            }
            let dialled = if code == 504 { 2 } else { dialled };
            assert_eq!(robot.dialled.get(), dialled, "{code}");
            Ok(())
        });
    }
}

/// Accepts: amqp/R30
#[test]
fn a_consumer_that_the_server_ends_is_started_again_with_its_queue() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let mut events = connection.events();
        let (_one, two, mut consumer) = furnish(&connection).await?;
        let mut other = two.consume("elsewhere").tag("u").start().await?;
        robot.heard();
        // The other's queue is not ours, and stays away for a while.
        robot.refuses.replace(vec![("3 queue.look elsewhere", 404)]);
        for tag in ["t", "u"] {
            let cancel = basic::AMQPMethod::Cancel(basic::Cancel {
                consumer_tag: tag.into(),
                nowait: true,
            });
            robot.says(2, Method::Basic(cancel)).await;
        }
        let mut seen = until(
            &mut events,
            |e| matches!(e, ConnectionEvent::ConsumerRestored { queue } if queue == "amq.gen-2"),
        )
        .await?;
        if !seen
            .iter()
            .any(|e| matches!(e, ConnectionEvent::EntityFailed { .. }))
        {
            seen.extend(
                until(&mut events, |e| {
                    matches!(e, ConnectionEvent::EntityFailed { .. })
                })
                .await?,
            );
        }
        let lost = |name: &str| ConnectionEvent::ConsumerLost {
            queue: name.to_owned(),
        };
        assert_eq!(seen[..2], [lost("amq.gen-1"), lost("elsewhere")]);
        robot.refuses.take();
        until(
            &mut events,
            |e| matches!(e, ConnectionEvent::ConsumerRestored { queue } if queue == "elsewhere"),
        )
        .await?;
        let heard = robot.heard();
        let of_ours: Vec<_> = heard
            .iter()
            .filter(|l| l.contains("amq.gen") || l.contains("declare"))
            .collect();
        assert_eq!(
            of_ours,
            [
                "3 queue.declare ",
                "3 queue.bind amq.gen-2 x",
                "2 consume amq.gen-2 t"
            ]
        );
        let looked = heard
            .iter()
            .filter(|line| line.contains("queue.look elsewhere"));
        assert!(looked.count() >= 2, "{heard:?}");
        robot.delivers(2, "t", 1).await;
        robot.delivers(2, "u", 2).await;
        consumer.next().await?.unwrap().ack();
        other.next().await?.unwrap().ack();

        // A queue that we delete ourselves ends its consumer, even if the broker says so before it has answered.
        two.queue("mine").declare().await?;
        let mut mine = two.consume("mine").tag("m").start().await?;
        robot.heard();
        robot
            .refuses
            .replace(vec![("2 queue.delete mine", IGNORES)]);
        let deleting = spawn({
            let two = two.clone();
            async move { two.delete_queue("mine").await }
        });
        settled().await?;
        let cancel = basic::AMQPMethod::Cancel(basic::Cancel {
            consumer_tag: "m".into(),
            nowait: true,
        });
        robot.says(2, Method::Basic(cancel)).await;
        let ended = mine.next().await;
        assert!(
            matches!(ended, Err(Error::ConsumerCancelled { .. })),
            "{ended:?}"
        );
        kernel::sleep(Duration::from_secs(20)).await?;
        assert_eq!(robot.heard(), ["2 queue.delete mine"]);
        drop(deleting);
        Ok(())
    });
}

#[test]
fn a_connection_lost_while_a_consumer_is_started_again_recovers_all_of_it() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let mut events = connection.events();
        let (_one, two, mut consumer) = furnish(&connection).await?;
        let cancel = basic::AMQPMethod::Cancel(basic::Cancel {
            consumer_tag: "t".into(),
            nowait: true,
        });
        robot.hangs_up_at.set(Some("2 consume amq.gen-2"));
        robot.says(2, Method::Basic(cancel)).await;
        let lost = until(&mut events, |e| matches!(e, ConnectionEvent::Lost(_)));
        lost.await?;
        settled().await?;
        // Asked now, it waits.
        two.qos(9).await?;
        assert!(!connection.is_recovering());
        robot.delivers(2, "t", 1).await;
        assert_eq!(consumer.next().await?.unwrap().ack(), Settled::Queued);
        Ok(())
    });
}

/// Accepts: amqp/R6
#[test]
fn what_was_dropped_or_closed_before_the_cut_or_during_it_stays_away() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let mut events = connection.events();
        let channel = connection.channel().await?;
        channel.queue("gone").declare().await?;
        channel.queue("left").declare().await?;
        channel.queue("fleeting").auto_delete().declare().await?;
        let fleeting = channel.consume("fleeting").tag("f").start().await?;
        let dropped = channel.consume("left").tag("d").start().await?;
        let mut cancelled = channel.consume("left").tag("c").start().await?;
        let _kept = channel.consume("left").tag("k").start().await?;
        let closed = connection.channel().await?;
        let _on_closed = closed.consume("left").tag("x").start().await?;
        channel.delete_queue("gone").await?;
        drop(fleeting);
        settled().await?;
        robot.heard();
        robot.cut();
        settled().await?;
        assert!(connection.is_recovering());
        drop(dropped);
        cancelled.cancel().await?;
        closed.close().await?;
        recovered(&mut events).await?;
        let heard = robot.heard();
        let heard: Vec<_> = heard.iter().map(String::as_str).collect();
        assert_eq!(
            heard,
            [
                "1 open",
                "1 queue.declare left",
                "1 close",
                "1 open",
                "1 qos 64",
                "1 consume left k"
            ]
        );
        Ok(())
    });
}

#[test]
fn a_channel_with_transactions_ends_with_its_connection() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let mut events = connection.events();
        let channel = connection.channel().await?;
        let select = Method::Tx(cold::tx::AMQPMethod::Select(cold::tx::Select {}));
        let selecting = spawn({
            let channel = channel.clone();
            async move { channel.call(select).await }
        });
        settled().await?;
        let ok = Method::Tx(cold::tx::AMQPMethod::SelectOk(cold::tx::SelectOk {}));
        robot.says(1, ok).await;
        selecting.join().await.unwrap()?;
        robot.cut();
        recovered(&mut events).await?;
        let error = channel
            .publish(Message::new(b"x").key("q"))
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Lost(_)), "{error}");
        connection.channel().await?.qos(1).await
    });
}

#[test]
fn closing_while_recovering_returns_at_once_and_says_what_is_unconfirmed() {
    with_robot(Recovery::default(), async |connection, robot, clock| {
        let publisher = connection.publisher(PublisherOptions::default()).await?;
        robot.is_silent.set(true);
        let confirm = publisher.post(&Message::new(b"x").key("q"))?;
        settled().await?;
        robot.is_away.set(true);
        robot.cut();
        settled().await?;
        let before = clock.elapsed();
        assert_eq!(
            connection.close(Duration::from_secs(60)).await?.unconfirmed,
            1
        );
        assert_eq!(clock.elapsed(), before);
        assert!(matches!(confirm.await, Err(Error::Unconfirmed(_))));
        assert!(matches!(
            publisher.post(&Message::new(b"x")),
            Err(Error::Closed)
        ));
        Ok(())
    });
}

/// Accepts: amqp/R24
#[test]
fn a_new_connection_is_not_blocked_because_the_old_one_was() {
    with_robot(Recovery::default(), async |connection, robot, _| {
        let mut events = connection.events();
        let channel = connection.channel().await?;
        let blocked = connection::AMQPMethod::Blocked(connection::Blocked {
            reason: "memory".into(),
        });
        robot.says(0, Method::Connection(blocked)).await;
        until(&mut events, |e| matches!(e, ConnectionEvent::Blocked(_))).await?;
        robot.cut();
        recovered(&mut events).await?;
        assert!(!connection.is_blocked());
        channel.publish(Message::new(b"x").key("q")).await
    });
}
