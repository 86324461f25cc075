//! A client's connection against bytes that a server might send, cut and mangled as a network might.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::connection::Connection;
use super::event::{ChannelKey, DeliveryKey, Down, Event, Outcome, Refused, ReqId};
use super::handshake::{Auth, ClientConfig, Limits};
use super::outbox::Sending;
use super::unsettled::Settle;
use crate::error::{EncodeError, ReplyCode};
use crate::wire::cold::{self, Method, basic, channel, confirm, connection, queue, tx};
use crate::wire::frame::{put_body, put_content, put_content_header, put_heartbeat};
use crate::wire::tests::{CELERY_PUBLISH, unhex};
use crate::wire::{
    Ack, AnyMethod, ContentHeader, Deliver, Frame, GetOk, Nack, Properties, Props, Publish, Return,
    Splitter,
};

#[expect(
    clippy::disallowed_methods,
    reason = "any instant will do to count from"
)]
fn start() -> Instant {
    Instant::now()
}

/// A connection, what it said, and the server's bytes that are being written.
struct Rig {
    conn: Connection,
    now: Instant,
    seen: Vec<String>,
    server: Vec<u8>,
}

fn config() -> ClientConfig {
    ClientConfig {
        auth: Auth::Plain {
            user: "guest".into(),
            password: "guest".into(),
        },
        virtual_host: "/".into(),
        limits: Limits::default(),
        name: String::new(),
    }
}

fn put_handshake(out: &mut Vec<u8>, channel_max: u16, heartbeat: u16) {
    use connection::AMQPMethod as M;
    let start = connection::Start {
        version_major: 0,
        version_minor: 9,
        server_properties: Default::default(),
        mechanisms: "AMQPLAIN PLAIN".into(),
        locales: "en_US".into(),
    };
    let tune = connection::Tune {
        channel_max,
        frame_max: 131_072,
        heartbeat,
    };
    for method in [
        M::Start(start),
        M::Tune(tune),
        M::OpenOk(connection::OpenOk {}),
    ] {
        cold::put(out, 0, &Method::Connection(method));
    }
}

impl Rig {
    fn fresh() -> Self {
        let now = start();
        Self {
            conn: Connection::new(config(), 1, now),
            now,
            seen: Vec::new(),
            server: Vec::new(),
        }
    }

    /// Through the handshake, with nothing left to be sent.
    fn up() -> Self {
        Self::up_with(2047, 60)
    }

    /// Up with frames no larger than that.
    fn up_with_frames(frame_max: u32) -> Self {
        let mut config = config();
        config.limits.frame_max = frame_max;
        let mut rig = Self::fresh();
        rig.conn = Connection::new(config, 1, rig.now);
        put_handshake(&mut rig.server, 2047, 60);
        rig.deliver();
        rig.sent();
        rig.seen.clear();
        rig
    }

    fn up_with(channel_max: u16, heartbeat: u16) -> Self {
        let mut rig = Self::fresh();
        put_handshake(&mut rig.server, channel_max, heartbeat);
        rig.deliver();
        rig.sent();
        rig.seen.clear();
        rig
    }

    /// Up with one open channel.
    fn with_channel() -> (Self, ChannelKey) {
        let mut rig = Self::up();
        let key = rig.open();
        (rig, key)
    }

    fn open(&mut self) -> ChannelKey {
        let (key, _) = self.conn.open_channel().unwrap();
        self.cold(key.id(), open_ok());
        self.deliver();
        self.sent();
        self.seen.clear();
        key
    }

    fn cold(&mut self, channel: u16, method: Method) -> &mut Self {
        cold::put(&mut self.server, channel, &method);
        self
    }

    /// Feeds what the server has written, and answers what was seen of it.
    fn deliver(&mut self) -> Vec<String> {
        let bytes = std::mem::take(&mut self.server);
        let seen = &mut self.seen;
        let used = self
            .conn
            .feed(&bytes, self.now, &mut |event| seen.push(show(&event)));
        assert_eq!(used, bytes.len());
        std::mem::take(&mut self.seen)
    }

    fn ended(&mut self) -> Vec<String> {
        let mut seen = Vec::new();
        self.conn
            .stream_ended(None, &mut |event| seen.push(show(&event)));
        seen
    }

    fn tick(&mut self, after: Duration) -> Vec<String> {
        self.now += after;
        let mut seen = Vec::new();
        self.conn
            .tick(self.now, &mut |event| seen.push(show(&event)));
        seen
    }

    /// What the client has sent since the last time, one line a frame.
    fn sent(&mut self) -> Vec<String> {
        frames(&self.sent_bytes())
    }

    fn sent_bytes(&mut self) -> Vec<u8> {
        let (mut bytes, mut sending) = (Vec::new(), Sending::default());
        loop {
            sending.fill(&mut self.conn);
            if sending.rest().is_empty() {
                return bytes;
            }
            bytes.extend_from_slice(sending.rest());
            sending.advance(sending.rest().len());
            self.conn.wrote(self.now);
        }
    }

    fn confirms(&mut self, key: ChannelKey) {
        let select = confirm::AMQPMethod::Select(confirm::Select { nowait: false });
        self.conn.request(key, &Method::Confirm(select)).unwrap();
        let ok = confirm::AMQPMethod::SelectOk(confirm::SelectOk {});
        self.cold(key.id(), Method::Confirm(ok)).deliver();
        self.sent();
    }

    fn publish(&mut self, key: ChannelKey, mandatory: bool, id: &str) -> Option<u64> {
        let props = Properties {
            message_id: Some(id),
            ..Properties::default()
        };
        let publish = Publish {
            routing_key: "q",
            mandatory,
            ..Publish::default()
        };
        let props = props.encode().unwrap();
        self.conn
            .publish(key, &publish, props.as_bytes(), b"body")
            .unwrap()
    }

    /// One delivery to the consumer `t`, to be settled.
    fn delivery(&mut self, channel: u16, tag: u64) -> DeliveryKey {
        put_delivery(&mut self.server, channel, tag, b"");
        let bytes = std::mem::take(&mut self.server);
        let mut delivery = None;
        self.conn.feed(&bytes, self.now, &mut |event| {
            if let Event::Delivery { key, .. } = event {
                delivery = Some(key);
            }
        });
        delivery.unwrap()
    }

    fn consume(&mut self, key: ChannelKey, no_ack: bool) -> ReqId {
        let consume = basic::Consume {
            queue: "q".into(),
            consumer_tag: "t".into(),
            no_local: false,
            no_ack,
            exclusive: false,
            nowait: false,
            arguments: Default::default(),
        };
        self.conn.consume(key, consume).unwrap().1
    }
}

/// Events as text, without what they borrow, so that sessions can be compared.
fn show(event: &Event<'_>) -> String {
    match event {
        Event::Delivery {
            key,
            deliver,
            props,
            body,
            ..
        } => format!(
            "delivery {} tag {} redelivered {} key {:?} id {:?} type {:?} body {:?}",
            key.tag(),
            deliver.consumer_tag,
            deliver.redelivered,
            deliver.routing_key,
            props.message_id(),
            props.content_type(),
            short(body),
        ),
        Event::Got { get, body, .. } => {
            format!(
                "got {} left {} body {:?}",
                get.delivery_tag,
                get.message_count,
                short(body)
            )
        }
        Event::Confirm { seq, outcome, .. } => match outcome {
            Outcome::Ack => format!("ack {seq}"),
            Outcome::Nack => format!("nack {seq}"),
            Outcome::Returned { reason, body, .. } => {
                format!(
                    "returned {seq} {} {} body {:?}",
                    reason.reply_code,
                    reason.reply_text,
                    short(body)
                )
            }
            Outcome::Unconfirmed(lost) => format!("unconfirmed {seq}: {lost}"),
        },
        Event::Reply { id, result } => match result {
            Ok(m) => format!(
                "reply {}/{} {}.{}",
                id.channel,
                id.n as u32,
                m.get_amqp_class_id(),
                m.get_amqp_method_id()
            ),
            Err(lost) => format!("failed {}/{}: {lost}", id.channel, id.n as u32),
        },
        Event::ChannelDown { channel, reason } => {
            format!("channel {} down: {reason}", channel.id())
        }
        Event::Down(down) => format!("down: {down}"),
        other => format!("{other:?}"),
    }
}

fn short(body: &[u8]) -> String {
    format!(
        "{} {}",
        body.len(),
        String::from_utf8_lossy(&body[..body.len().min(8)])
    )
}

fn frames(mut bytes: &[u8]) -> Vec<String> {
    let splitter = Splitter::with_frame_max(131_072);
    let mut lines = Vec::new();
    if let Some(rest) = bytes.strip_prefix(b"AMQP\0\0\x09\x01") {
        lines.push("header".to_owned());
        bytes = rest;
    }
    while let Some((frame, used)) = splitter.next_frame(bytes).unwrap() {
        bytes = &bytes[used..];
        lines.push(match frame {
            Frame::Heartbeat => "heartbeat".to_owned(),
            Frame::Method {
                channel,
                class,
                method,
                args,
            } => match AnyMethod::decode(class, method, args).unwrap() {
                AnyMethod::Ack(Ack {
                    delivery_tag,
                    multiple,
                }) => {
                    format!("{channel} ack {delivery_tag} {multiple}")
                }
                AnyMethod::Nack(Nack {
                    delivery_tag,
                    requeue,
                    ..
                }) => {
                    format!("{channel} nack {delivery_tag} requeue {requeue}")
                }
                AnyMethod::Cold(Method::Connection(connection::AMQPMethod::Close(c))) => {
                    format!(
                        "{channel} close {} {} {} {}",
                        c.reply_code, c.reply_text, c.class_id, c.method_id
                    )
                }
                _ => format!("{channel} {class}.{method}"),
            },
            Frame::Header { channel, raw } => {
                format!(
                    "{channel} header {}",
                    ContentHeader::parse(raw).unwrap().body_size
                )
            }
            Frame::Body { channel, data } => format!("{channel} body {}", data.len()),
        });
    }
    assert!(bytes.is_empty());
    lines
}

fn open_ok() -> Method {
    Method::Channel(channel::AMQPMethod::OpenOk(channel::OpenOk {}))
}

fn qos() -> Method {
    Method::Basic(basic::AMQPMethod::Qos(basic::Qos {
        prefetch_count: 5,
        global: false,
    }))
}

fn qos_ok() -> Method {
    Method::Basic(basic::AMQPMethod::QosOk(basic::QosOk {}))
}

fn consume_ok() -> Method {
    let consumer_tag = "t".into();
    Method::Basic(basic::AMQPMethod::ConsumeOk(basic::ConsumeOk {
        consumer_tag,
    }))
}

fn channel_close(code: u16, text: &str) -> Method {
    Method::Channel(channel::AMQPMethod::Close(channel::Close {
        reply_code: code,
        reply_text: text.into(),
        class_id: 60,
        method_id: 40,
    }))
}

fn channel_close_ok() -> Method {
    Method::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {}))
}

fn connection_close(code: u16, text: &str) -> Method {
    Method::Connection(connection::AMQPMethod::Close(connection::Close {
        reply_code: code,
        reply_text: text.into(),
        class_id: 0,
        method_id: 0,
    }))
}

fn put_delivery(out: &mut Vec<u8>, channel: u16, tag: u64, body: &[u8]) {
    let deliver = Deliver {
        consumer_tag: "t",
        delivery_tag: tag,
        redelivered: tag.is_multiple_of(2),
        exchange: "",
        routing_key: "q",
    };
    deliver.put(out, channel);
    put_content(out, channel, Props::EMPTY.as_bytes(), body, 131_064);
}

fn put_return(out: &mut Vec<u8>, channel: u16, id: &str) {
    let reason = Return {
        reply_code: ReplyCode::NO_ROUTE,
        reply_text: "NO_ROUTE",
        exchange: "",
        routing_key: "q",
    };
    let props = Properties {
        message_id: Some(id),
        ..Properties::default()
    };
    reason.put(out, channel);
    put_content(
        out,
        channel,
        props.encode().unwrap().as_bytes(),
        b"body",
        131_064,
    );
}

// ---- how bytes are cut --------------------------------------------------------------------------------------------------

/// Feeds a session in pieces that end at `cuts`; answers the events, and what the client sent.
///
/// The session: handshake, a channel with confirms and one consumer, deliveries of all shapes (one with the very header
/// and body that py-amqp sent), confirms, a return, a get, a soft error on a second channel, a heartbeat, the close.
fn session(cuts: &[usize]) -> (Vec<String>, Vec<String>) {
    let mut rig = Rig::fresh();
    let mut sent = rig.sent();
    let mut seen = Vec::new();
    let mut offset = 0;
    let mut play = |rig: &mut Rig, seen: &mut Vec<String>| {
        let bytes = std::mem::take(&mut rig.server);
        let mut start = 0;
        let mut pending = Vec::new();
        let ends = cuts
            .iter()
            .filter_map(|cut| cut.checked_sub(offset))
            .filter(|cut| *cut < bytes.len());
        for end in ends.chain([bytes.len()]) {
            pending.extend_from_slice(&bytes[start..end]);
            start = end;
            let used = rig
                .conn
                .feed(&pending, rig.now, &mut |event| seen.push(show(&event)));
            pending.drain(..used);
        }
        assert!(pending.is_empty());
        offset += bytes.len();
    };

    put_handshake(&mut rig.server, 2047, 60);
    play(&mut rig, &mut seen);
    let (first, _) = rig.conn.open_channel().unwrap();
    let (second, _) = rig.conn.open_channel().unwrap();
    rig.conn.request(second, &qos()).unwrap();
    let select = confirm::AMQPMethod::Select(confirm::Select { nowait: false });
    rig.conn.request(first, &Method::Confirm(select)).unwrap();
    rig.consume(first, false);
    let get = basic::AMQPMethod::Get(basic::Get {
        queue: "q".into(),
        no_ack: true,
    });
    rig.conn.request(first, &Method::Basic(get)).unwrap();
    for id in ["a", "b", "c"] {
        rig.publish(first, true, id);
    }
    sent.extend(rig.sent());

    rig.cold(1, open_ok()).cold(2, open_ok()).cold(2, qos_ok());
    let select_ok = confirm::AMQPMethod::SelectOk(confirm::SelectOk {});
    rig.cold(1, Method::Confirm(select_ok))
        .cold(1, consume_ok());
    let out = &mut rig.server;
    let got = GetOk {
        delivery_tag: 1,
        redelivered: false,
        exchange: "",
        routing_key: "q",
        message_count: 7,
    };
    got.put(out, 1);
    put_content(out, 1, Props::EMPTY.as_bytes(), b"got it", 131_064);
    put_delivery(out, 1, 2, b"");
    put_delivery(out, 1, 3, b"x");
    let deliver = Deliver {
        consumer_tag: "t",
        delivery_tag: 4,
        redelivered: true,
        exchange: "",
        routing_key: "celery",
    };
    deliver.put(out, 1);
    let celery = unhex(CELERY_PUBLISH);
    let method_frame = 7 + 15 + 1;
    out.extend_from_slice(&celery[method_frame..]);
    // A body in three frames, one of them empty, with another channel's soft error and a heartbeat between them.
    let deliver = Deliver {
        delivery_tag: 5,
        ..deliver
    };
    deliver.put(out, 1);
    put_content_header(out, 1, Props::EMPTY.as_bytes(), 9);
    put_body(out, 1, b"four");
    put_heartbeat(out);
    cold::put(
        out,
        2,
        &channel_close(404, "NOT_FOUND - no queue 'q' in vhost '/'"),
    );
    put_body(out, 1, b"");
    put_body(out, 1, b"five!");
    put_return(out, 1, "a");
    let ack = |delivery_tag, multiple| Ack {
        delivery_tag,
        multiple,
    };
    ack(1, false).put(out, 1);
    put_return(out, 1, "c");
    ack(3, false).put(out, 1);
    ack(2, false).put(out, 1);
    rig.publish(first, false, "d");
    cold::put(
        &mut rig.server,
        0,
        &connection_close(320, "CONNECTION_FORCED - bye"),
    );
    play(&mut rig, &mut seen);
    sent.extend(rig.sent());
    (seen, sent)
}

fn session_len() -> usize {
    // Long enough: cuts behind the end do nothing.
    2_000
}

/// Accepts: amqp/R35
#[test]
fn any_one_cut_of_a_session_gives_the_same_events() {
    let whole = session(&[]);
    assert_eq!(
        whole.0.iter().map(String::as_str).collect::<Vec<_>>(),
        [
            "Up(Tuned { channel_max: 2047, frame_max: 131072, heartbeat: 60 })",
            "reply 1/0 20.11",
            "reply 2/1 20.11",
            "reply 2/2 60.11",
            "reply 1/3 85.11",
            "reply 1/4 60.21",
            r#"got 1 left 7 body "6 got it""#,
            r#"delivery 2 tag t redelivered true key "q" id None type None body "0 ""#,
            r#"delivery 3 tag t redelivered false key "q" id None type None body "1 x""#,
            r#"delivery 4 tag t redelivered true key "celery" id None type Some("application/json") body "85 [[40], {""#,
            "channel 2 down: 404 NOT_FOUND - no queue 'q' in vhost '/'",
            r#"delivery 5 tag t redelivered true key "celery" id None type None body "9 fourfive""#,
            r#"returned 1 312 NO_ROUTE body "4 body""#,
            r#"returned 3 312 NO_ROUTE body "4 body""#,
            "ack 2",
            "unconfirmed 4: connection closed by the server: 320 CONNECTION_FORCED - bye",
            "down: connection closed by the server: 320 CONNECTION_FORCED - bye",
        ]
    );
    for cut in 1..session_len() {
        assert_eq!(session(&[cut]), whole, "cut at byte {cut}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Accepts: amqp/R35
    #[test]
    fn any_cuts_of_a_session_give_the_same_events(mut cuts in prop::collection::vec(1..session_len(), 2..200)) {
        cuts.sort_unstable();
        prop_assert_eq!(session(&cuts), session(&[]));
    }

    #[test]
    fn arbitrary_bytes_after_the_handshake_never_panic_and_always_resolve_what_waits(bytes: Vec<u8>, cut: usize) {
        let (mut rig, key) = Rig::with_channel();
        rig.conn.request(key, &qos()).unwrap();
        let mut replies = 0;
        let mut downs = 0;
        let mut count = |event: Event<'_>| match event {
            Event::Reply { .. } => replies += 1,
            Event::Down(_) => downs += 1,
            _ => {}
        };
        let cut = cut % (bytes.len() + 1);
        let used = rig.conn.feed(&bytes[..cut], rig.now, &mut count);
        rig.conn.feed(&bytes[used..], rig.now, &mut count);
        rig.conn.stream_ended(None, &mut count);
        prop_assert_eq!((replies, downs), (1, 1));
    }

    #[test]
    fn a_session_with_one_byte_changed_never_panics(at in 0..session_len(), with: u8) {
        let mut server = Vec::new();
        put_handshake(&mut server, 2047, 60);
        cold::put(&mut server, 1, &open_ok());
        cold::put(&mut server, 1, &consume_ok());
        for tag in 1..20 {
            put_delivery(&mut server, 1, tag, b"body");
        }
        let at = at % server.len();
        server[at] = with;
        let mut rig = Rig::fresh();
        let mut rest = &server[..];
        let mut asked = false;
        while !rest.is_empty() && !rig.conn.is_down() {
            let (piece, _) = rest.split_at(rest.len().min(64));
            let used = rig.conn.feed(piece, rig.now, &mut |_| {});
            if used == 0 {
                break;
            }
            rest = &rest[used..];
            if rig.conn.tuned().is_some() && !asked {
                asked = true;
                let (key, _) = rig.conn.open_channel().unwrap();
                rig.consume(key, false);
            }
        }
    }
}

// ---- what breaks the protocol -------------------------------------------------------------------------------------------

/// Accepts: amqp/R34
#[test]
fn what_breaks_the_protocol_closes_the_connection_with_rabbitmqs_code_and_text() {
    let method = |class: u16, method: u16, args: &[u8]| {
        let mut frame = vec![1, 0, 1];
        frame.extend_from_slice(&(4 + args.len() as u32).to_be_bytes());
        frame.extend_from_slice(&class.to_be_bytes());
        frame.extend_from_slice(&method.to_be_bytes());
        frame.extend_from_slice(args);
        frame.push(0xCE);
        frame
    };
    let mut begun = Vec::new();
    let deliver = Deliver {
        consumer_tag: "t",
        delivery_tag: 1,
        redelivered: false,
        exchange: "",
        routing_key: "q",
    };
    deliver.put(&mut begun, 1);
    let then = |with: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = begun.clone();
        with(&mut bytes);
        bytes
    };
    let empty = Props::EMPTY.as_bytes();
    // A table that holds an array in an array in an array..., as many as a frame takes.
    let depth = 26_000_u32;
    let mut nested = vec![1, b'a'];
    for inside in (0..depth).rev() {
        nested.push(b'A');
        nested.extend_from_slice(&(inside * 5).to_be_bytes());
    }
    let start = {
        let mut args = vec![0, 9];
        args.extend_from_slice(&(nested.len() as u32).to_be_bytes());
        args.extend_from_slice(&nested);
        let mut frame = method(10, 10, &args);
        frame[2] = 0;
        frame
    };
    for (bytes, expected) in [
        (
            vec![3, 0, 1, 0, 3, 13, 64],
            "0 close 501 FRAME_ERROR - type 3, all octets = <<>>: {frame_too_large,200000,131064} 0 0",
        ),
        (
            vec![2, 0, 1, 0, 16, 0, 1],
            "0 close 501 FRAME_ERROR - type 2, all octets = <<>>: {frame_too_large,1048577,131064} 0 0",
        ),
        (
            vec![1, 0, 1, 0, 0, 0, 4, 0, 60, 0, 80, 0],
            "0 close 501 FRAME_ERROR - type 1, all octets = <<0,60,0,80>>: {invalid_frame_end_marker,0} 0 0",
        ),
        (
            vec![7, 0, 1, 0, 0, 0, 1, 9, 0xCE],
            r#"0 close 501 FRAME_ERROR - type 7, all octets = <<"\t">>: unknown_frame 0 0"#,
        ),
        (
            [
                &[7, 0, 1, 0, 0, 0, 18][..],
                b"GET / HTTP/1.1\r\n\r\n",
                &[0xCE],
            ]
            .concat(),
            r#"0 close 501 FRAME_ERROR - type 7, first 16 octets = <<"GET / HTTP/1.1\r\n">>: unknown_frame 0 0"#,
        ),
        (
            vec![1, 0, 1, 0, 0, 0, 2, 0, 60, 0xCE],
            "0 close 501 FRAME_ERROR - type 1, all octets = <<0,60>>: unknown_frame 0 0",
        ),
        (
            vec![8, 0, 1, 0, 0, 0, 0, 0xCE],
            "0 close 505 UNEXPECTED_FRAME - type 8, all octets = <<>> 0 0",
        ),
        (
            vec![3, 0, 0, 0, 0, 0, 1, 65, 0xCE],
            r#"0 close 505 UNEXPECTED_FRAME - type 3, all octets = <<"A">> 0 0"#,
        ),
        (
            method(60, 80, &[0, 0]),
            "0 close 501 FRAME_ERROR - cannot decode <<0,0>> 60 80",
        ),
        (
            method(50, 11, &[9]),
            "0 close 501 FRAME_ERROR - cannot decode <<9>> 50 11",
        ),
        (
            method(60, 50, &[1, 56, 1, 0xFF, 0, 0]),
            "0 close 501 FRAME_ERROR - Malformed UTF-8 in shortstr 60 50",
        ),
        (
            method(61, 1, &[]),
            "0 close 503 COMMAND_INVALID - unknown method 1 of class 61 61 1",
        ),
        (
            method(50, 99, &[]),
            "0 close 503 COMMAND_INVALID - unknown method 99 of class 50 50 99",
        ),
        (
            method(60, 11, &[]),
            "0 close 503 COMMAND_INVALID - method 11 of class 60 answers nothing that was asked 60 11",
        ),
        (
            method(60, 80, &[0, 0, 0, 0, 0, 0, 0, 1, 0]),
            "0 close 503 COMMAND_INVALID - a confirm on a channel that is not in confirm mode 60 80",
        ),
        (
            then(&|b| put_body(b, 1, b"x")),
            "0 close 505 UNEXPECTED_FRAME - expected content header for class 60, got non content header frame instead 60 60",
        ),
        (
            then(&|b| cold::put(b, 1, &qos_ok())),
            "0 close 505 UNEXPECTED_FRAME - expected content header for class 60, got non content header frame instead 60 60",
        ),
        (
            then(&|b| {
                put_content_header(b, 1, empty, 2);
                cold::put(b, 1, &qos_ok());
            }),
            "0 close 505 UNEXPECTED_FRAME - expected content body, got non content body frame instead 60 60",
        ),
        (
            then(&|b| {
                let at = b.len();
                put_content_header(b, 1, empty, 2);
                b[at + 8] = 50;
            }),
            "0 close 505 UNEXPECTED_FRAME - expected content header for class 60, got one for class 50 instead 60 60",
        ),
        (
            then(&|b| {
                put_content_header(b, 1, empty, 2);
                put_body(b, 1, b"abc");
            }),
            "0 close 501 FRAME_ERROR - content body is 1 bytes longer than its header announced 60 60",
        ),
        (
            then(&|b| put_content_header(b, 1, empty, 1 << 40)),
            "0 close 311 CONTENT_TOO_LARGE - message size 1099511627776 is larger than max size 134217728 60 60",
        ),
        (
            then(&|b| b.extend([2, 0, 1, 0, 0, 0, 3, 0, 60, 0, 0xCE])),
            "0 close 501 FRAME_ERROR - type 2, all octets = <<0,60,0>>: unknown_frame 60 60",
        ),
        (
            {
                let mut b = Vec::new();
                put_content_header(&mut b, 1, empty, 0);
                b
            },
            "0 close 505 UNEXPECTED_FRAME - expected method frame, got non method frame instead 0 0",
        ),
        (
            {
                let mut b = Vec::new();
                put_delivery(&mut b, 9, 1, b"");
                b
            },
            "0 close 504 CHANNEL_ERROR - frame on channel 9, which is not open 0 0",
        ),
        (
            then(&|b| put_content(b, 1, empty, b"", 4088)),
            "0 close 530 NOT_ALLOWED - delivery for unknown consumer 't' 60 60",
        ),
        (
            then(&|b| {
                let at = b.len();
                put_content_header(b, 1, empty, 0);
                b[at + 10] = 1;
            }),
            "0 close 505 UNEXPECTED_FRAME - expected content header for class 60, got non content header frame instead 60 60",
        ),
        (
            start,
            "0 close 501 FRAME_ERROR - table is nested deeper than 64 levels 10 10",
        ),
    ] {
        for cut in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            let (mut rig, key) = Rig::with_channel();
            let waits = rig.conn.request(key, &queue_declare()).unwrap();
            rig.sent();
            let mut seen = Vec::new();
            let mut note = |event: Event<'_>| seen.push(show(&event));
            let used = rig.conn.feed(&bytes[..cut], rig.now, &mut note);
            rig.conn.feed(&bytes[used..], rig.now, &mut note);
            assert_eq!(rig.sent(), [expected], "cut at {cut}");
            assert!(rig.conn.is_down());
            let [failed, down] = &seen[..] else {
                panic!("{expected}: {seen:?}")
            };
            assert!(
                failed.starts_with(&format!("failed 1/{}: the server broke", waits.n as u32)),
                "{failed}"
            );
            assert!(
                down.starts_with("down: the server broke the protocol"),
                "{down}"
            );
        }
    }
}

fn queue_declare() -> Method {
    Method::Queue(queue::AMQPMethod::Declare(queue::Declare {
        queue: "q".into(),
        passive: false,
        durable: true,
        exclusive: false,
        auto_delete: false,
        nowait: false,
        arguments: Default::default(),
    }))
}

// ---- what must hold -----------------------------------------------------------------------------------------------------

/// Accepts: amqp/R8, amqp/R18
#[test]
fn a_lost_connection_resolves_every_request_and_publishing_once() {
    for how in ["close", "eof", "silence"] {
        let mut rig = Rig::up_with(2047, 10);
        let (a, b) = (rig.open(), rig.open());
        rig.confirms(a);
        rig.conn.request(a, &qos()).unwrap();
        rig.conn.request(b, &qos()).unwrap();
        for id in ["x", "y"] {
            rig.publish(a, false, id);
        }
        assert_eq!(rig.conn.unconfirmed(a), 2);
        let seen = match how {
            "close" => rig
                .cold(0, connection_close(320, "CONNECTION_FORCED - bye"))
                .deliver(),
            "eof" => rig.ended(),
            _ => rig.tick(Duration::from_secs(20)),
        };
        let why = match how {
            "close" => "connection closed by the server: 320 CONNECTION_FORCED - bye",
            "eof" => "the server closed the stream without closing the connection",
            _ => "no sign of life from the server for 20 s, although heartbeats were agreed",
        };
        assert_eq!(
            seen,
            [
                format!("failed 1/3: {why}"),
                format!("unconfirmed 1: {why}"),
                format!("unconfirmed 2: {why}"),
                format!("failed 2/4: {why}"),
                format!("down: {why}"),
            ]
        );
        assert_eq!(rig.ended(), [""; 0], "nothing comes after it");
        assert_eq!(rig.conn.unconfirmed(a), 0);
        assert_eq!(rig.conn.request(a, &qos()), Err(Refused::NotOpen));
        assert_eq!(rig.conn.deadline(), None);
    }
}

/// Accepts: amqp/R13
#[test]
fn a_soft_error_takes_down_one_channel_with_its_requests_and_confirms_and_frees_its_number() {
    let (mut rig, a) = Rig::with_channel();
    let b = rig.open();
    rig.confirms(a);
    rig.confirms(b);
    rig.publish(a, false, "lost");
    rig.publish(b, false, "kept");
    rig.conn.request(a, &qos()).unwrap();
    rig.conn.request(b, &qos()).unwrap();
    rig.sent();
    let seen = rig
        .cold(
            1,
            channel_close(404, "NOT_FOUND - no exchange 'x' in vhost '/'"),
        )
        .cold(2, qos_ok())
        .deliver();
    let why = "channel closed by the server: 404 NOT_FOUND - no exchange 'x' in vhost '/'";
    assert_eq!(
        seen,
        [
            format!("failed 1/4: {why}"),
            format!("unconfirmed 1: {why}"),
            "channel 1 down: 404 NOT_FOUND - no exchange 'x' in vhost '/'".to_owned(),
            "reply 2/5 60.11".to_owned(),
        ]
    );
    assert_eq!(rig.sent(), ["1 20.41"], "close-ok");
    assert_eq!(rig.conn.request(a, &qos()), Err(Refused::ChannelGone));
    let again = rig.open();
    assert_eq!((again.id(), again == a), (1, false));
    assert_eq!(rig.conn.unconfirmed(b), 1);
}

/// Accepts: amqp/R14
#[test]
fn what_comes_on_a_channel_being_closed_is_dropped_until_close_ok() {
    let (mut rig, key) = Rig::with_channel();
    rig.consume(key, false);
    rig.cold(1, consume_ok()).deliver();
    rig.conn.request(key, &qos()).unwrap();
    rig.conn
        .close_channel(key, ReplyCode::SUCCESS, "bye")
        .unwrap();
    rig.sent();
    put_delivery(&mut rig.server, 1, 1, b"late");
    let seen = rig
        .cold(1, qos_ok())
        .cold(
            1,
            channel_close(406, "PRECONDITION_FAILED - at the same time"),
        )
        .deliver();
    assert_eq!(seen, [""; 0]);
    assert_eq!(rig.sent(), ["1 20.41"], "their close is answered");
    assert_eq!(
        rig.cold(1, channel_close_ok()).deliver(),
        [
            "failed 1/2: the channel was closed before the answer came",
            "reply 1/3 20.41",
        ]
    );
    assert_eq!(rig.conn.open_channels(), 0);
    assert_eq!(rig.open().id(), 1);
}

/// Accepts: amqp/R20
#[test]
fn the_reply_to_an_abandoned_request_is_consumed_in_its_turn_and_undone() {
    let (mut rig, key) = Rig::with_channel();
    let first = rig.conn.request(key, &qos()).unwrap();
    let consume = rig.consume(key, false);
    let get = basic::AMQPMethod::Get(basic::Get {
        queue: "q".into(),
        no_ack: false,
    });
    let get = rig.conn.request(key, &Method::Basic(get)).unwrap();
    let last = rig.conn.request(key, &qos()).unwrap();
    for id in [first, consume, get] {
        rig.conn.abandon(id);
    }
    rig.sent();
    rig.cold(1, qos_ok()).cold(1, consume_ok());
    put_delivery(&mut rig.server, 1, 1, b"early");
    let got = GetOk {
        delivery_tag: 2,
        redelivered: false,
        exchange: "",
        routing_key: "q",
        message_count: 0,
    };
    got.put(&mut rig.server, 1);
    put_content(&mut rig.server, 1, Props::EMPTY.as_bytes(), b"", 4088);
    rig.cold(1, qos_ok());
    assert_eq!(rig.deliver(), [format!("reply 1/{} 60.11", last.n as u32)]);
    assert_eq!(
        rig.sent(),
        ["1 60.30", "1 nack 1 requeue true", "1 nack 2 requeue true"]
    );
    // The cancel of the consumer nobody wanted is answered, and nobody hears of it.
    let cancel_ok = basic::CancelOk {
        consumer_tag: "t".into(),
    };
    let cancel_ok = Method::Basic(basic::AMQPMethod::CancelOk(cancel_ok));
    assert_eq!(rig.cold(1, cancel_ok).deliver(), [""; 0]);

    let (_, open) = rig.conn.open_channel().unwrap();
    rig.conn.abandon(open);
    rig.cold(2, open_ok()).deliver();
    assert_eq!(
        rig.sent(),
        ["2 20.10", "2 20.40"],
        "opened, and closed again"
    );
    assert_eq!(rig.cold(2, channel_close_ok()).deliver(), [""; 0]);
    assert_eq!(rig.conn.open_channels(), 1);
}

/// Accepts: amqp/R24
#[test]
fn a_blocked_connection_takes_no_publishings_but_acks_and_requests() {
    let (mut rig, key) = Rig::with_channel();
    rig.consume(key, false);
    let delivery = rig.cold(1, consume_ok()).delivery(1, 1);
    rig.sent();
    let blocked = connection::AMQPMethod::Blocked(connection::Blocked {
        reason: "low on memory".into(),
    });
    let seen = rig.cold(0, Method::Connection(blocked)).deliver();
    assert_eq!(seen, [r#"Blocked("low on memory")"#]);
    let publish = Publish::default();
    let empty = Props::EMPTY.as_bytes();
    assert_eq!(
        rig.conn.publish(key, &publish, empty, b""),
        Err(Refused::Blocked)
    );
    assert!(rig.conn.settle(delivery, Settle::Ack));
    rig.conn.request(key, &qos()).unwrap();
    assert_eq!(rig.tick(Duration::from_secs(30)), [""; 0]);
    assert_eq!(
        rig.sent(),
        ["1 60.10", "1 ack 1 false"],
        "and no publishing"
    );
    let unblocked = connection::AMQPMethod::Unblocked(connection::Unblocked {});
    assert_eq!(
        rig.cold(0, Method::Connection(unblocked)).deliver(),
        ["Unblocked"]
    );
    assert_eq!(rig.conn.publish(key, &publish, empty, b""), Ok(None));
}

/// Accepts: amqp/R28
#[test]
fn a_delivery_of_an_earlier_channel_or_connection_settles_nothing() {
    let take = |rig: &mut Rig, key: ChannelKey| {
        rig.consume(key, false);
        let delivery = rig.cold(key.id(), consume_ok()).delivery(key.id(), 1);
        rig.sent();
        delivery
    };
    let (mut rig, key) = Rig::with_channel();
    let old = take(&mut rig, key);
    rig.cold(1, channel_close(406, "PRECONDITION_FAILED - x"))
        .deliver();
    rig.sent();
    let key = rig.open();
    let new = take(&mut rig, key);
    assert_eq!(
        (old.channel().id(), old.tag()),
        (new.channel().id(), new.tag())
    );
    assert!(!rig.conn.settle(old, Settle::Ack));
    assert!(!rig.conn.settle(old, Settle::Nack { requeue: true }));
    assert_eq!(rig.sent(), [""; 0]);
    assert!(rig.conn.settle(new, Settle::Ack));
    assert!(!rig.conn.settle(new, Settle::Ack), "a second time");
    assert_eq!(rig.sent(), ["1 ack 1 false"]);

    let mut next = Rig::fresh();
    next.conn = Connection::new(config(), 2, next.now);
    put_handshake(&mut next.server, 0, 0);
    next.deliver();
    let key = next.open();
    take(&mut next, key);
    assert!(!next.conn.settle(new, Settle::Ack));
    assert_eq!(next.sent(), [""; 0]);
}

/// Accepts: amqp/R32, amqp/R33
#[test]
fn a_message_that_cannot_be_sent_leaves_no_byte_and_no_slot() {
    let (mut rig, key) = Rig::with_channel();
    rig.confirms(key);
    let mut headers = crate::wire::TableBuf::new();
    headers.insert("big", "x".repeat(131_072).as_str()).unwrap();
    let big = Properties {
        headers: Some(headers.as_table()),
        ..Properties::default()
    };
    let big = big.encode().unwrap();
    let long = "k".repeat(256);
    let publish = |routing_key| Publish {
        routing_key,
        ..Publish::default()
    };
    let empty = Props::EMPTY.as_bytes();
    for (routing_key, props, expected) in [
        (
            "q",
            big.as_bytes(),
            EncodeError::HeadersTooLarge {
                len: 131_099,
                max: 131_064,
            },
        ),
        (
            &long,
            empty,
            EncodeError::ShortStringTooLong {
                what: "routing key",
                len: 256,
            },
        ),
        (
            "a\0b",
            empty,
            EncodeError::ZeroByte {
                what: "routing key",
            },
        ),
    ] {
        let refused = rig.conn.publish(key, &publish(routing_key), props, b"body");
        assert_eq!(refused, Err(Refused::Encode(expected)));
    }
    assert_eq!((rig.sent().len(), rig.conn.unconfirmed(key)), (0, 0));
    assert_eq!(
        rig.conn.publish(key, &publish("q"), empty, b"body"),
        Ok(Some(1))
    );
}

#[test]
fn whatever_the_last_message_was_the_next_has_its_own_method_and_is_kept_as_it_was_sent() {
    let (mut rig, key) = Rig::with_channel();
    rig.confirms(key);
    rig.sent_bytes();
    let (long, max) = ("k".repeat(256), rig.conn.splitter.max_payload());
    let to = |exchange, routing_key, mandatory, immediate| Publish {
        exchange,
        routing_key,
        mandatory,
        immediate,
    };
    let (mut kept, mut expected) = (b"of before".to_vec(), Vec::new());
    for publish in [
        to("", "q", false, false),
        to("", "q", false, false),
        to("x", "q", false, false),
        to("x", "r", false, false),
        to("x", "r", true, false),
        to("x", &long, true, false),
        to("x", "r", true, false),
        to("x", "r", true, true),
        to("xr", "", true, true),
        to("", "xr", true, true),
        to("", "", false, false),
        to("", "", false, false),
    ] {
        for body in [&b"body"[..], b""] {
            let (props, mut alone) = (&[0x10, 0, 2][..], Vec::new());
            let is_good = publish.put(&mut alone, key.id(), props, body, max).is_ok();
            let published = rig
                .conn
                .publish_keeping(key, &publish, props, body, &mut kept);
            assert_eq!(published.is_ok(), is_good, "{publish:?}");
            if is_good {
                assert_eq!(kept, alone, "{publish:?}");
            }
            expected.append(&mut alone);
        }
    }
    assert_eq!(rig.sent_bytes(), expected);
}

#[test]
fn deliveries_with_other_names_than_the_last_are_told_with_their_own() {
    let (mut rig, key) = Rig::with_channel();
    for tag in ["a", "b"] {
        let consume = basic::Consume {
            queue: "q".into(),
            consumer_tag: tag.into(),
            no_local: false,
            no_ack: false,
            exclusive: false,
            nowait: false,
            arguments: Default::default(),
        };
        rig.conn.consume(key, consume).unwrap();
    }
    let names = [
        ("a", "x", "k"),
        ("a", "x", "k"),
        ("b", "x", "k"),
        ("b", "", "k"),
        ("b", "", "k"),
        ("a", "", ""),
        ("b", "k", "x"),
    ];
    let mut bytes = Vec::new();
    for (tag, (consumer_tag, exchange, routing_key)) in (1..).zip(names) {
        let deliver = Deliver {
            consumer_tag,
            delivery_tag: tag,
            redelivered: false,
            exchange,
            routing_key,
        };
        deliver.put(&mut bytes, key.id());
        put_content(&mut bytes, key.id(), Props::EMPTY.as_bytes(), b"", 1);
    }
    let (mut seen, mut consumers) = (Vec::new(), Vec::new());
    let mut note = |event: Event<'_>| {
        if let Event::Delivery {
            consumer, deliver, ..
        } = event
        {
            let [exchange, key] = [deliver.exchange, deliver.routing_key].map(str::to_owned);
            seen.push((deliver.consumer_tag.to_owned(), exchange, key));
            consumers.push(consumer);
        }
    };
    assert_eq!(rig.conn.feed(&bytes, rig.now, &mut note), bytes.len());
    let owned = names.map(|(tag, x, k)| (tag.to_owned(), x.to_owned(), k.to_owned()));
    assert_eq!(seen, owned);
    let [a, b] = [consumers[0], consumers[2]];
    assert_ne!(a, b);
    assert_eq!(consumers, [a, a, b, b, b, a, b]);
    // What is no UTF-8 is refused, whatever was good before.
    let mut bad = Vec::new();
    let deliver = Deliver {
        consumer_tag: "b",
        delivery_tag: 8,
        redelivered: false,
        exchange: "k",
        routing_key: "x",
    };
    deliver.put(&mut bad, key.id());
    let at = bad.len() - 2;
    bad[at] = 0xff;
    put_content(&mut bad, key.id(), Props::EMPTY.as_bytes(), b"", 1);
    let mut down = false;
    let mut note = |event: Event<'_>| down |= matches!(event, Event::Down(_));
    rig.conn.feed(&bad, rig.now, &mut note);
    assert!(down);
}

#[test]
fn a_first_delivery_without_names_is_refused() {
    let (mut rig, key) = Rig::with_channel();
    rig.consume(key, false);
    let mut bytes = Vec::new();
    put_delivery(&mut bytes, key.id(), 1, b"");
    // The frame ends behind the number: a head of 7 bytes, class and method, the consumer's tag and nine more.
    let args = 2 + 9;
    bytes[3..7].copy_from_slice(&(4 + args as u32).to_be_bytes());
    bytes.truncate(7 + 4 + args);
    bytes.push(0xCE);
    put_content(&mut bytes, key.id(), Props::EMPTY.as_bytes(), b"", 1);
    let mut down = None;
    rig.conn.feed(&bytes, rig.now, &mut |event| {
        if let Event::Down(why) = event {
            down = Some(why.clone());
        }
    });
    assert!(
        matches!(&down, Some(Down::Violation(error)) if error.code == ReplyCode::FRAME_ERROR),
        "{down:?}"
    );
}

/// Accepts: amqp/R37
#[test]
fn channel_numbers_are_used_again_lowest_first_and_only_as_many_as_agreed() {
    let mut rig = Rig::up_with(3, 0);
    let keys = [rig.open(), rig.open(), rig.open()];
    assert_eq!(keys.map(ChannelKey::id), [1, 2, 3]);
    assert_eq!(rig.conn.open_channel(), Err(Refused::NoChannelLeft(3)));
    for key in [keys[2], keys[0]] {
        rig.conn.close_channel(key, ReplyCode::SUCCESS, "").unwrap();
    }
    let refused = rig.conn.open_channel();
    assert_eq!(refused, Err(Refused::NoChannelLeft(3)), "until close-ok");
    rig.cold(3, channel_close_ok())
        .cold(1, channel_close_ok())
        .deliver();
    assert_eq!(rig.open().id(), 1);
    assert_eq!(rig.open().id(), 3);
    for _ in 0..10_000 {
        let key = keys[1];
        let key = if rig.conn.request(key, &qos()).is_ok() {
            key
        } else {
            rig.open()
        };
        rig.conn.close_channel(key, ReplyCode::SUCCESS, "").unwrap();
        rig.cold(key.id(), channel_close_ok()).deliver();
    }
    assert_eq!(rig.conn.open_channels(), 2);
}

/// Accepts: amqp/R40
#[test]
fn a_message_leaves_in_one_piece_on_its_channel_split_at_the_frame_size() {
    let (mut rig, key) = Rig::with_channel();
    let other = rig.open();
    let max = 131_072 - 8;
    let body = vec![7; 2 * max + 1];
    let publish = Publish::default();
    for len in [0, 1, max - 1, max, max + 1, 2 * max + 1] {
        for key in [key, other] {
            let empty = Props::EMPTY.as_bytes();
            rig.conn
                .publish(key, &publish, empty, &body[..len])
                .unwrap();
        }
        let mut expected = Vec::new();
        for id in [1, 2] {
            expected.push(format!("{id} 60.40"));
            expected.push(format!("{id} header {len}"));
            let mut left = len;
            while left > 0 {
                expected.push(format!("{id} body {}", left.min(max)));
                left -= left.min(max);
            }
        }
        let mut sent = rig.sent();
        // Between channels, large ones take turns.
        sent.sort_by_key(|line| line.as_bytes()[0]);
        assert_eq!(sent, expected);
    }
}

/// Accepts: amqp/R25
/// As after something between the two has lost bytes: what stands where a size should is not one.
#[test]
fn heartbeats_inside_of_a_frame_that_is_never_whole_are_no_sign_of_life() {
    let mut rig = Rig::up_with(2047, 10);
    let mut unread = vec![3, 0, 1, 0, 1, 0, 0];
    for beats in 0..4 {
        let used = rig.conn.feed(&unread, rig.now, &mut |_| {});
        assert_eq!(used, 0, "{beats}");
        assert_eq!(rig.tick(Duration::from_secs(5)).len(), beats / 3, "{beats}");
        rig.sent();
        put_heartbeat(&mut unread);
    }
    assert!(rig.conn.is_down());
}

#[test]
fn an_idle_connection_beats_and_one_with_bytes_to_send_does_not() {
    let mut rig = Rig::up_with(0, 10);
    assert_eq!(rig.conn.deadline(), Some(rig.now + Duration::from_secs(5)));
    rig.tick(Duration::from_secs(5));
    rig.tick(Duration::from_secs(5));
    assert_eq!(rig.sent(), ["heartbeat"], "the first had not even gone");
    put_heartbeat(&mut rig.server);
    rig.deliver();
    rig.tick(Duration::from_secs(5));
    assert_eq!(rig.sent(), ["heartbeat"]);
}

/// Accepts: amqp/R12
#[test]
fn others_take_turns_with_a_large_body_frame_by_frame() {
    let (mut rig, key) = Rig::with_channel();
    let (second, third) = (rig.open(), rig.open());
    let max = 131_072 - 8;
    let body = vec![7; 3 * max];
    let (publish, empty) = (Publish::default(), Props::EMPTY.as_bytes());
    let mut sending = Sending::default();
    let mut taken = |rig: &mut Rig| {
        sending.fill(&mut rig.conn);
        let lines = frames(sending.rest());
        sending.advance(sending.rest().len());
        rig.conn.wrote(rig.now);
        lines
    };
    rig.conn.publish(key, &publish, empty, &body).unwrap();
    rig.conn.publish(key, &publish, empty, b"behind").unwrap();
    rig.conn.request(key, &qos()).unwrap();
    rig.conn
        .publish(second, &publish, empty, &body[max..])
        .unwrap();
    assert_eq!(
        rig.conn.output_len() / max,
        5,
        "what waits counts for the high-water mark"
    );
    let piece = |id: u16| format!("{id} body {max}");
    let begin = |id: u16, len: usize| [format!("{id} 60.40"), format!("{id} header {len}")];
    assert_eq!(
        taken(&mut rig),
        [&begin(1, 3 * max)[..], &[piece(1)]].concat()
    );
    // What is small and somebody else's goes first, at every frame.
    rig.conn.publish(third, &publish, empty, b"small").unwrap();
    let small = [&begin(3, 5)[..], &["3 body 5".to_owned()]].concat();
    assert_eq!(
        taken(&mut rig),
        [&small[..], &begin(2, 2 * max), &[piece(2)]].concat()
    );
    // Every byte is a sign of life; a heartbeat is due only when none has gone for half an interval.
    rig.tick(Duration::from_secs(29));
    assert_eq!(taken(&mut rig), [piece(1)]);
    rig.tick(Duration::from_secs(29));
    rig.conn.request(third, &qos()).unwrap();
    assert_eq!(taken(&mut rig), ["3 60.10".to_owned(), piece(2)]);
    assert_eq!(taken(&mut rig), [piece(1)]);
    let behind = ["1 60.40", "1 header 6", "1 body 6", "1 60.10"];
    assert_eq!(taken(&mut rig), behind);
    assert_eq!((rig.conn.output_len(), taken(&mut rig).len()), (0, 0));
    rig.conn.request(key, &qos()).unwrap();
    assert_eq!(taken(&mut rig), ["1 60.10"], "the lane is gone");
}

#[test]
fn a_channel_closed_in_the_middle_of_a_large_body_ends_it_and_forgets_the_rest() {
    let (mut rig, key) = Rig::with_channel();
    let max = 131_072 - 8;
    let body = vec![7; 2 * max];
    let (publish, empty) = (Publish::default(), Props::EMPTY.as_bytes());
    for _ in 0..2 {
        rig.conn.publish(key, &publish, empty, &body).unwrap();
    }
    let mut first = Vec::new();
    rig.conn.take_output(&mut first);
    rig.cold(1, channel_close(404, "NOT_FOUND")).deliver();
    let (again, _) = rig.conn.open_channel().unwrap();
    assert_eq!(again.id(), 1);
    let rest = format!("1 body {max}");
    assert_eq!(rig.sent(), [&rest, "1 20.41", "1 20.10"]);

    let mut rig = Rig::with_channel().0;
    let key = rig.open();
    rig.conn.publish(key, &publish, empty, &body).unwrap();
    rig.cold(2, channel_close(404, "NOT_FOUND")).deliver();
    assert_eq!(rig.sent(), ["2 20.41"], "it had not begun");
}

proptest! {
    /// Accepts: amqp/R36
    #[test]
    fn however_little_the_socket_takes_the_bytes_are_the_same(
        said in prop::collection::vec((0..3_usize, 0..4_u8, 0..20_000_usize), 1..40),
        takes in prop::collection::vec(0..9_000_usize, 1..20),
    ) {
        // Small frames, so that bodies are cut often.
        let talk = |rig: &mut Rig, keys: [ChannelKey; 3], &(at, what, len): &(usize, u8, usize)| {
            let (publish, empty) = (Publish::default(), Props::EMPTY.as_bytes());
            match what {
                0 => drop(rig.conn.request(keys[at], &qos()).unwrap()),
                1 => drop(rig.conn.publish(keys[at], &publish, empty, b"small").unwrap()),
                _ => drop(rig.conn.publish(keys[at], &publish, empty, &vec![what; len]).unwrap()),
            }
        };
        let by_channel = |bytes: &[u8]| {
            let mut lines: [Vec<String>; 4] = Default::default();
            for line in frames(bytes) {
                let id: usize = line[..1].parse().unwrap();
                lines[id].push(line);
            }
            lines
        };
        let rig = || {
            let mut rig = Rig::up_with_frames(4096);
            let keys = [rig.open(), rig.open(), rig.open()];
            (rig, keys)
        };

        // All at once, and everything taken.
        let (mut whole, keys) = rig();
        for said in &said {
            talk(&mut whole, keys, said);
        }
        let whole = whole.sent_bytes();

        // A socket that takes what it likes, nothing at all at times, while more is said.
        let (mut rig, keys) = rig();
        let (mut sending, mut stream, mut given) = (Sending::default(), Vec::new(), Vec::new());
        let mut takes = takes.iter().cycle();
        let mut said = said.iter();
        loop {
            let next = said.next();
            if let Some(said) = next {
                talk(&mut rig, keys, said);
            }
            if sending.rest().is_empty() {
                sending.fill(&mut rig.conn);
                given.extend_from_slice(sending.rest());
            }
            if sending.rest().is_empty() && next.is_none() {
                break;
            }
            let take = takes.next().unwrap() + usize::from(next.is_none());
            let take = take.min(sending.rest().len());
            stream.extend_from_slice(&sending.rest()[..take]);
            sending.advance(take);
        }
        prop_assert!(stream == given, "nothing twice, nothing left out");
        prop_assert_eq!(by_channel(&stream), by_channel(&whole));
    }
}

/// Accepts: amqp/R38
#[test]
fn a_refused_login_or_vhost_ends_for_good_and_what_may_pass_does_not() {
    for (code, text, is_final) in [
        (403, "ACCESS_REFUSED - Login was refused", true),
        (530, "NOT_ALLOWED - vhost nope not found", true),
        (
            530,
            "NOT_ALLOWED - access to vhost '/' refused for user 'guest': connection limit (5) is reached",
            false,
        ),
        (
            530,
            "NOT_ALLOWED - Connection refused for user 'guest': user connection limit (5) is reached",
            false,
        ),
        (320, "CONNECTION_FORCED - shutdown", false),
    ] {
        let mut rig = Rig::fresh();
        rig.cold(0, connection_close(code, text));
        let bytes = std::mem::take(&mut rig.server);
        let mut down = None;
        rig.conn.feed(&bytes, rig.now, &mut |event| {
            if let Event::Down(why) = event {
                down = Some(why.clone());
            }
        });
        let down = down.unwrap();
        assert_eq!(down.is_final(), is_final, "{down}");
        assert!(
            matches!(&down, Down::ClosedByPeer(reason) if reason.code.0 == code && reason.text == text)
        );
    }
}

/// An operator may give the server more properties than fit the smallest frame, and RabbitMQ sends them.
#[test]
fn a_server_may_say_more_of_itself_than_the_smallest_frame_holds() {
    let mut rig = Rig::fresh();
    rig.sent();
    let mut properties = crate::wire::TableBuf::new();
    let motto = "x".repeat(10_000);
    properties.insert("motto", motto.as_str()).unwrap();
    let start = connection::Start {
        version_major: 0,
        version_minor: 9,
        server_properties: cold::field_table(properties.as_table()).unwrap(),
        mechanisms: "PLAIN".into(),
        locales: "en_US".into(),
    };
    let start = Method::Connection(connection::AMQPMethod::Start(start));
    assert_eq!(rig.cold(0, start).deliver(), [""; 0]);
    assert_eq!(rig.sent(), ["0 10.11"]);
}

#[test]
fn a_server_of_another_protocol_is_named() {
    for cut in 0..8 {
        let mut rig = Rig::fresh();
        let mut seen = Vec::new();
        let bytes = b"AMQP\x03\x01\0\0";
        let mut note = |event: Event<'_>| seen.push(show(&event));
        let used = rig.conn.feed(&bytes[..cut], rig.now, &mut note);
        rig.conn.feed(&bytes[used..], rig.now, &mut note);
        assert_eq!(
            seen,
            ["down: handshake: the server does not speak AMQP 0-9-1, it offers AMQP [3, 1, 0, 0]"]
        );
    }
}

#[test]
fn a_clean_close_sends_the_acks_that_wait_and_ends_with_close_ok() {
    let (mut rig, key) = Rig::with_channel();
    rig.consume(key, false);
    let delivery = rig.cold(1, consume_ok()).delivery(1, 1);
    rig.conn.settle(delivery, Settle::Ack);
    rig.conn.close(ReplyCode::SUCCESS, "bye").unwrap();
    assert_eq!(
        rig.conn.close(ReplyCode::SUCCESS, "bye"),
        Err(Refused::NotOpen)
    );
    assert_eq!(
        rig.sent(),
        ["1 60.20", "1 ack 1 false", "0 close 200 bye 0 0"]
    );
    put_delivery(&mut rig.server, 1, 2, b"late");
    let close_ok = connection::AMQPMethod::CloseOk(connection::CloseOk {});
    rig.cold(0, Method::Connection(close_ok));
    assert_eq!(rig.deliver(), ["down: connection closed"]);
}

/// RabbitMQ takes headers of one frame and passes on longer ones: it adds `x-death`, and other connections have agreed upon other sizes.
#[test]
fn a_header_larger_than_a_frame_is_taken_from_a_server() {
    let mut rig = Rig::up_with_frames(4096);
    let key = rig.open();
    rig.consume(key, false);
    rig.cold(1, consume_ok()).deliver();
    let mut headers = crate::wire::TableBuf::new();
    headers.insert("h", "x".repeat(200_000).as_str()).unwrap();
    let props = Properties {
        headers: Some(headers.as_table()),
        message_id: Some("large"),
        ..Properties::default()
    };
    let props = props.encode().unwrap();
    for tag in [1, 2] {
        let deliver = Deliver {
            consumer_tag: "t",
            delivery_tag: tag,
            redelivered: false,
            exchange: "",
            routing_key: "q",
        };
        deliver.put(&mut rig.server, 1);
        put_content(&mut rig.server, 1, props.as_bytes(), &[b'b'; 5000], 4088);
    }
    let seen = rig.deliver();
    assert_eq!(seen.len(), 2);
    assert!(
        seen[1].contains(r#"Some("large")"#) && seen[1].contains("5000"),
        "{seen:?}"
    );
}

#[test]
fn a_second_consumer_of_the_same_name_is_refused_before_the_server_knows() {
    let (mut rig, key) = Rig::with_channel();
    let consume = basic::Consume {
        queue: "q".into(),
        consumer_tag: "t".into(),
        ..Default::default()
    };
    let (first, _) = rig.conn.consume(key, consume.clone()).unwrap();
    rig.sent();
    let refused = || Err(Refused::ConsumerTagTaken("t".into()));
    assert_eq!(rig.conn.consume(key, consume.clone()), refused());
    rig.cold(1, consume_ok()).deliver();
    assert_eq!(rig.conn.consume(key, consume.clone()), refused());
    assert_eq!(rig.sent(), [""; 0]);
    // Its name is free as soon as its cancel is on the way: the server does one after the other.
    rig.conn.abandon_consumer(key, first);
    rig.conn.consume(key, consume.clone()).unwrap();
    assert_eq!(rig.sent(), ["1 60.30", "1 60.20"]);
    assert_eq!(rig.conn.consume(key, consume), refused());
}

#[test]
fn a_consumer_cancelled_by_the_broker_is_told_and_the_broker_answered() {
    let (mut rig, key) = Rig::with_channel();
    rig.consume(key, false);
    rig.cold(1, consume_ok()).deliver();
    rig.sent();
    for (nowait, answer) in [(false, vec!["1 60.31"]), (true, vec![])] {
        let cancel = basic::Cancel {
            consumer_tag: "t".into(),
            nowait,
        };
        let seen = rig
            .cold(1, Method::Basic(basic::AMQPMethod::Cancel(cancel)))
            .deliver();
        assert_eq!(rig.sent(), answer);
        // The second one is for a consumer that is gone.
        assert_eq!(seen.len(), usize::from(!nowait));
        assert!(
            seen.iter().all(|line| line.starts_with("Cancelled")),
            "{seen:?}"
        );
    }
}

#[test]
fn a_nack_to_a_publishing_and_a_flow_to_a_channel_are_told_apart_by_channel() {
    let (mut rig, a) = Rig::with_channel();
    let b = rig.open();
    for key in [a, b] {
        rig.confirms(key);
        rig.publish(key, false, "m");
        rig.publish(key, false, "n");
    }
    rig.sent();
    let nack = Nack {
        delivery_tag: 2,
        multiple: true,
        requeue: false,
    };
    nack.put(&mut rig.server, 2);
    let flow = channel::AMQPMethod::Flow(channel::Flow { active: false });
    let seen = rig.cold(1, Method::Channel(flow)).deliver();
    assert_eq!(&seen[..2], ["nack 1", "nack 2"]);
    assert!(
        seen[2].starts_with("Flow { channel: ChannelKey { id: 1,")
            && seen[2].ends_with("active: false }")
    );
    assert_eq!(rig.sent(), ["1 20.21"], "flow-ok");
    assert_eq!((rig.conn.unconfirmed(a), rig.conn.unconfirmed(b)), (2, 0));
}

#[test]
fn a_recover_goes_behind_the_acks_and_what_comes_before_its_answer_settles_nothing() {
    let (mut rig, key) = Rig::with_channel();
    rig.consume(key, false);
    let first = rig.cold(1, consume_ok()).delivery(1, 1);
    let second = rig.delivery(1, 2);
    rig.sent();
    assert!(rig.conn.settle(first, Settle::Ack));
    let recover = || Method::Basic(basic::AMQPMethod::Recover(basic::Recover { requeue: true }));
    rig.conn.request(key, &recover()).unwrap();
    rig.conn.request(key, &recover()).unwrap();
    // The broker may have sent it before it read the request, which takes it back as well: its tag is void, and would be a fault.
    let late = rig.delivery(1, 3);
    for held in [second, late] {
        assert!(!rig.conn.settle(held, Settle::Ack));
        assert!(!rig.conn.settle(held, Settle::Nack { requeue: true }));
    }
    assert_eq!(rig.sent(), ["1 ack 1 false", "1 60.110", "1 60.110"]);

    let ok = Method::Basic(basic::AMQPMethod::RecoverOk(basic::RecoverOk {}));
    rig.cold(1, ok.clone()).deliver();
    let between = rig.delivery(1, 4);
    rig.cold(1, ok).deliver();
    let again = rig.delivery(1, 5);
    for held in [second, late, between] {
        assert!(!rig.conn.settle(held, Settle::Ack));
    }
    assert!(rig.conn.settle(again, Settle::Ack));
    assert_eq!(rig.sent(), ["1 ack 5 false"]);
}

/// What was acked and rolled back is the broker's again, unsettled: an ack with `multiple` would settle it for good.
#[test]
fn acks_in_transactions_leave_as_singles() {
    use crate::wire::cold::tx::AMQPMethod as Tx;
    let (mut rig, key) = Rig::with_channel();
    rig.consume(key, false);
    let first = rig.cold(1, consume_ok()).delivery(1, 1);
    let (second, third) = (rig.delivery(1, 2), rig.delivery(1, 3));
    for method in [Tx::Select(tx::Select {}), Tx::Rollback(tx::Rollback {})] {
        rig.conn.request(key, &Method::Tx(method)).unwrap();
        rig.conn.settle(first, Settle::Ack);
    }
    rig.sent();
    rig.conn.settle(third, Settle::Ack);
    rig.conn.settle(second, Settle::Ack);
    assert_eq!(rig.sent(), ["1 ack 3 false", "1 ack 2 false"]);
}

/// Accepts: amqp/R32
#[test]
fn a_request_larger_than_a_frame_is_refused_and_leaves_no_byte() {
    let (mut rig, key) = Rig::with_channel();
    let mut arguments = crate::wire::TableBuf::new();
    arguments.insert("x", "x".repeat(131_064).as_str()).unwrap();
    let declare = queue::Declare {
        arguments: cold::field_table(arguments.as_table()).unwrap(),
        ..Default::default()
    };
    let declare = Method::Queue(queue::AMQPMethod::Declare(declare));
    let (len, max) = (131_083, 131_064);
    let refused = Refused::Encode(EncodeError::MethodTooLarge { len, max });
    assert_eq!(rig.conn.request(key, &declare), Err(refused));
    let (len, secret) = (131_074, "x".repeat(131_065));
    let refused = Refused::Encode(EncodeError::MethodTooLarge { len, max });
    assert_eq!(rig.conn.update_secret(&secret, ""), Err(refused));
    assert_eq!(rig.sent(), [""; 0]);
    let id = rig.conn.request(key, &qos()).unwrap();
    let reply = format!("reply 1/{} 60.11", id.n as u32);
    assert_eq!(rig.cold(1, qos_ok()).deliver(), [reply]);
}

/// In RabbitMQ the answers to consume and cancel come from the queue's process, by a way that later answers are quicker on.
#[test]
fn answers_that_name_their_consumer_may_be_overtaken_by_later_ones() {
    let (mut rig, key) = Rig::with_channel();
    let consume = rig.consume(key, false);
    let qos_request = rig.conn.request(key, &qos()).unwrap();
    rig.cold(1, qos_ok()).cold(1, consume_ok());
    assert_eq!(
        rig.deliver(),
        [
            format!("reply 1/{} 60.11", qos_request.n as u32),
            format!("reply 1/{} 60.21", consume.n as u32),
        ]
    );
}

/// A cancel that is sent before the consume was answered crashes RabbitMQ's channel.
#[test]
fn a_consumer_that_is_abandoned_early_is_cancelled_once_it_has_started() {
    let (mut rig, key) = Rig::with_channel();
    let consume = basic::Consume {
        queue: "q".into(),
        consumer_tag: "t".into(),
        ..Default::default()
    };
    let (consumer, request) = rig.conn.consume(key, consume).unwrap();
    rig.sent();
    rig.conn.abandon_consumer(key, consumer);
    rig.conn.abandon(request);
    assert_eq!(rig.sent(), [""; 0]);
    rig.cold(1, consume_ok()).deliver();
    assert_eq!(rig.sent(), ["1 60.30"]);

    put_delivery(&mut rig.server, 1, 1, b"late");
    assert_eq!(rig.deliver(), [""; 0]);
    assert_eq!(rig.sent(), ["1 nack 1 requeue true"]);
    rig.conn.abandon_consumer(key, consumer);
    assert_eq!(rig.sent(), [""; 0], "cancelled once");
}

/// Accepts: feature/update-secret
#[test]
fn a_new_secret_has_its_answer_or_the_connections_end() {
    let mut rig = Rig::up();
    let ok = Method::Connection(connection::AMQPMethod::UpdateSecretOk(
        connection::UpdateSecretOk {},
    ));
    let (_, one) = rig.conn.update_secret("s3cret", "expires").unwrap();
    let (_, two) = rig.conn.update_secret("again", "").unwrap();
    let (_, three) = rig.conn.update_secret("and again", "").unwrap();
    rig.conn.abandon(two);
    assert_eq!(rig.sent(), ["0 10.70", "0 10.70", "0 10.70"]);
    for answered in [Some(one), None] {
        cold::put(&mut rig.server, 0, &ok);
        let bytes = std::mem::take(&mut rig.server);
        let mut replied = None;
        rig.conn.feed(&bytes, rig.now, &mut |event| match event {
            Event::Reply { id, result } => {
                assert_eq!(result, Ok(ok.clone()));
                assert_eq!(replied.replace(id), None);
            }
            other => panic!("{other:?}"),
        });
        assert_eq!(replied, answered);
    }
    let mut failed = Vec::new();
    rig.conn.stream_ended(None, &mut |event| match event {
        Event::Reply { id, result } => failed.push((id, result.is_err())),
        Event::Down(_) => assert_eq!(failed, [(three, true)]),
        other => panic!("{other:?}"),
    });
    assert_eq!(failed.len(), 1);
    // An answer that nobody asked for is a fault, as ever.
    let mut rig = Rig::up();
    cold::put(&mut rig.server, 0, &ok);
    let seen = rig.deliver();
    assert!(seen[0].contains("CHANNEL_ERROR"), "{seen:?}");
}
