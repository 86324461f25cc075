//! Both ends of a connection without sockets: recorded together, then played alone.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use amqp::broker::{Broker, Config};
use amqp::error::ReplyCode;
use amqp::proto::connection::Connection;
use amqp::proto::event::{ChannelKey, ConsumerKey, DeliveryKey, Event};
use amqp::proto::handshake::{Auth, ClientConfig, Limits};
use amqp::proto::unsettled::Settle;
use amqp::wire::cold::{FieldTable, basic, confirm, exchange, queue};
use amqp::wire::{Method, PROTOCOL_HEADER, Properties, Publish, Splitter, TableBuf, cold};

use crate::mutate::{Packet, packets};
use rig::Random;

/// A session in which most methods occur.
pub(crate) struct Recording {
    /// Without the protocol header.
    pub(crate) said_by_client: Vec<u8>,
    /// What the broker answered to each step of the client.
    pub(crate) said_by_broker: Vec<Vec<u8>>,
    /// The frames of both, to be put where they do not belong.
    pub(crate) pool: Vec<Packet>,
}

const STEPS: usize = 8;
/// So small that bodies take several frames.
const FRAME_MAX: u32 = 4_096;

impl Recording {
    pub(crate) fn make() -> Self {
        let mut server = Server::new();
        let mut client = Client::new();
        let mut said_by_client = Vec::new();
        let mut said_by_broker = Vec::new();
        for step in 0..STEPS {
            client.act(step);
            let mut answer = Vec::new();
            loop {
                let said = client.output();
                let heard = server.hears(&said);
                said_by_client.extend_from_slice(&said);
                client.hears(&heard);
                if said.is_empty() && heard.is_empty() {
                    break;
                }
                answer.extend_from_slice(&heard);
            }
            said_by_broker.push(answer);
        }
        said_by_client.drain(..PROTOCOL_HEADER.len());
        let log = client.end();
        for wanted in ["Delivery", "Confirm", "Returned", "Got", "ClosedByUs"] {
            let is_there = log.events.iter().any(|event| event.contains(wanted));
            assert!(is_there, "no {wanted} in the recording: {:?}", log.events);
        }
        let mut pool = packets(&said_by_client);
        pool.extend(said_by_broker.iter().flat_map(|said| packets(said)));
        Self {
            said_by_client,
            said_by_broker,
            pool,
        }
    }
}

/// Plays what a client says to a broker, in pieces; whether its session lives on.
///
/// # Panics
/// If the broker panics, says what is no frame, or serves nobody any more.
pub(crate) fn to_broker(bytes: &[u8], random: &mut Random) -> bool {
    let mut server = Server::new();
    let mut said = server.hears(&PROTOCOL_HEADER);
    for piece in pieces(bytes, Some(random)) {
        said.extend(server.hears(piece));
    }
    assert_frames(&said);
    let is_alive = !server.broker.is_over(server.id);
    server.broker.close(server.id, server.now);
    server.id = server.broker.open(server.now).expect("room for another");
    server.unread.clear();
    let greeting = server.hears(&PROTOCOL_HEADER);
    assert_eq!(greeting[..3], [1, 0, 0], "connection.start");
    is_alive
}

/// Plays what a broker answers to a client that does what it did in the recording, whole or in pieces.
///
/// # Panics
/// If the client panics, says what is no frame, or leaves something without an end.
pub(crate) fn to_client(answers: &[Vec<u8>], mut random: Option<&mut Random>) -> Log {
    let mut client = Client::new();
    let mut said = Vec::new();
    for (step, answer) in answers.iter().enumerate() {
        client.act(step);
        said.extend(client.output());
        for piece in pieces(answer, random.as_deref_mut()) {
            client.hears(piece);
            said.extend(client.output());
        }
    }
    assert_eq!(said[..8], PROTOCOL_HEADER);
    assert_frames(&said[8..]);
    client.end()
}

/// Once a session is cut somewhere, it must not matter where.
fn pieces<'b>(mut bytes: &'b [u8], random: Option<&mut Random>) -> Vec<&'b [u8]> {
    let Some(random) = random else {
        return vec![bytes];
    };
    let most = *random.pick(&[1, 7, 100, 5_000]);
    let mut pieces = Vec::new();
    while !bytes.is_empty() {
        let (piece, rest) = bytes.split_at(bytes.len().min(1 + random.below(most)));
        pieces.push(piece);
        bytes = rest;
    }
    pieces
}

fn assert_frames(mut said: &[u8]) {
    let splitter = Splitter::with_frame_max(131_072);
    while !said.is_empty() {
        let (_, len) = splitter
            .next_frame(said)
            .expect("we say frames")
            .expect("we say whole frames");
        said = &said[len..];
    }
}

struct Server {
    broker: Broker,
    id: amqp::broker::SessionId,
    now: Instant,
    unread: Vec<u8>,
}

impl Server {
    fn new() -> Self {
        let now = Instant::now();
        let mut broker = Broker::new(Config::default(), now, Duration::from_secs(1_800_000_000));
        let id = broker.open(now).expect("it is the first");
        Self {
            broker,
            id,
            now,
            unread: Vec::new(),
        }
    }

    /// Takes bytes, and answers.
    fn hears(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.unread.extend_from_slice(bytes);
        let mut said = Vec::new();
        loop {
            let used = self.broker.input(self.id, &self.unread, self.now);
            self.unread.drain(..used);
            let mut output = Vec::new();
            self.broker.take_output(self.id, &mut output, self.now);
            self.broker.written(self.id, output.len(), self.now);
            if output.is_empty() && used == 0 {
                return said;
            }
            said.append(&mut output);
        }
    }
}

/// What a client has seen.
#[derive(Debug, PartialEq)]
pub(crate) struct Log {
    events: Vec<String>,
    /// The connection went on to the end.
    pub(crate) is_orderly: bool,
}

struct Client {
    connection: Connection,
    now: Instant,
    unread: Vec<u8>,
    events: Vec<String>,
    /// How many ends each request and publishing has had, by their names.
    ends: BTreeMap<String, u32>,
    downs: u32,
    channel: Option<ChannelKey>,
    consumer: Option<ConsumerKey>,
    unsettled: Vec<DeliveryKey>,
}

impl Client {
    fn new() -> Self {
        let config = ClientConfig {
            auth: Auth::Plain {
                user: "guest".into(),
                password: "guest".into(),
            },
            virtual_host: "/".into(),
            limits: Limits {
                channel_max: 0,
                frame_max: FRAME_MAX,
                heartbeat: Some(0),
            },
            name: String::new(),
        };
        let now = Instant::now();
        Self {
            connection: Connection::new(config, 1, now),
            now,
            unread: Vec::new(),
            events: Vec::new(),
            ends: BTreeMap::new(),
            downs: 0,
            channel: None,
            consumer: None,
            unsettled: Vec::new(),
        }
    }

    /// Does what belongs to a step, as far as the connection lets it.
    fn act(&mut self, step: usize) {
        match step {
            0 => {} // the handshake
            1 => {
                if let Ok((channel, request)) = self.connection.open_channel() {
                    self.channel = Some(channel);
                    self.ends.insert(format!("{request:?}"), 0);
                }
            }
            2 => {
                for method in topology() {
                    self.ask(&method);
                }
                self.consume();
            }
            3 => self.publish(),
            4 => {
                for (n, key) in std::mem::take(&mut self.unsettled).into_iter().enumerate() {
                    let how = match n % 3 {
                        0 => Settle::Ack,
                        n => Settle::Nack { requeue: n == 1 },
                    };
                    self.connection.settle(key, how);
                }
            }
            5 => {
                if let (Some(channel), Some(consumer)) = (self.channel, self.consumer)
                    && let Ok(request) = self.connection.cancel(channel, consumer)
                {
                    self.ends.insert(format!("{request:?}"), 0);
                }
                for key in std::mem::take(&mut self.unsettled) {
                    self.connection.settle(key, Settle::Nack { requeue: true });
                }
                for _ in 0..2 {
                    self.ask(&get());
                }
            }
            6 => {
                self.ask(&delete());
                if let Some(channel) = self.channel
                    && let Ok(request) = self.connection.close_channel(channel, ReplyCode(200), "")
                {
                    self.ends.insert(format!("{request:?}"), 0);
                }
            }
            _ => drop(self.connection.close(ReplyCode(200), "bye")),
        }
    }

    fn ask(&mut self, method: &Method) {
        if let Some(channel) = self.channel
            && let Ok(request) = self.connection.request(channel, method)
        {
            self.ends.insert(format!("{request:?}"), 0);
        }
    }

    fn consume(&mut self) {
        let method = basic::Consume {
            queue: "q".into(),
            consumer_tag: "".into(),
            no_local: false,
            no_ack: false,
            exclusive: false,
            nowait: false,
            arguments: FieldTable::default(),
        };
        if let Some(channel) = self.channel
            && let Ok((consumer, request)) = self.connection.consume(channel, method)
        {
            self.consumer = Some(consumer);
            self.ends.insert(format!("{request:?}"), 0);
        }
    }

    fn publish(&mut self) {
        let mut headers = TableBuf::new();
        headers.insert("retries", 3).expect("a short key");
        headers.insert("lang", "py").expect("a short key");
        let rich = Properties {
            content_type: Some("application/json"),
            headers: Some(headers.as_table()),
            delivery_mode: Some(2),
            correlation_id: Some("c-1"),
            reply_to: Some("answers"),
            message_id: Some("m-1"),
            timestamp: Some(1_700_000_000),
            ..Properties::default()
        };
        let rich = rich.encode().expect("they are well-formed");
        let plain = Properties::default().encode().expect("there are none");
        let bodies: [&[u8]; 4] = [b"", b"short", &[7; 5_000], b"last"];
        for (n, body) in bodies.into_iter().enumerate() {
            let routing_key = if n == 3 { "nowhere" } else { "a.b" };
            let publish = Publish {
                exchange: "x",
                routing_key,
                mandatory: true,
                immediate: false,
            };
            let properties = if n == 1 { &rich } else { &plain };
            let properties = properties.as_bytes();
            if let Some(channel) = self.channel
                && let Ok(Some(seq)) = self.connection.publish(channel, &publish, properties, body)
            {
                self.ends.insert(format!("{channel:?} {seq}"), 0);
            }
        }
    }

    fn hears(&mut self, bytes: &[u8]) {
        let mut unread = std::mem::take(&mut self.unread);
        unread.extend_from_slice(bytes);
        let used = self.feed(&unread);
        unread.drain(..used);
        self.unread = unread;
    }

    fn feed(&mut self, bytes: &[u8]) -> usize {
        let Self {
            connection,
            now,
            events,
            ends,
            downs,
            unsettled,
            ..
        } = self;
        let mut sink = |event: Event<'_>| note(&event, events, ends, downs, unsettled);
        connection.feed(bytes, *now, &mut sink)
    }

    fn output(&mut self) -> Vec<u8> {
        self.connection.flush_acks();
        let mut said = Vec::new();
        loop {
            let mut output = Vec::new();
            self.connection.take_output(&mut output);
            if output.is_empty() {
                return said;
            }
            self.connection.wrote(self.now);
            said.append(&mut output);
        }
    }

    /// The stream ends, if nothing has ended it before; then nothing may be left open.
    fn end(mut self) -> Log {
        let last = self.events.last();
        let is_orderly = last.is_some_and(|event| event == "Down(ClosedByUs)");
        let Self {
            connection,
            events,
            ends,
            downs,
            unsettled,
            ..
        } = &mut self;
        let mut sink = |event: Event<'_>| note(&event, events, ends, downs, unsettled);
        connection.stream_ended(None, &mut sink);
        assert_eq!(self.downs, 1, "a connection ends once");
        for (what, ends) in &self.ends {
            assert_eq!(*ends, 1, "{what} ended so often");
        }
        Log {
            events: self.events,
            is_orderly,
        }
    }
}

fn note(
    event: &Event<'_>,
    events: &mut Vec<String>,
    ends: &mut BTreeMap<String, u32>,
    downs: &mut u32,
    unsettled: &mut Vec<DeliveryKey>,
) {
    assert_eq!(*downs, 0, "nothing comes after the end: {event:?}");
    let mut ended = |what: String| {
        let count = ends.get_mut(&what);
        *count.unwrap_or_else(|| panic!("nobody has asked for {what}")) += 1;
    };
    match event {
        Event::Reply { id, .. } => ended(format!("{id:?}")),
        Event::Got { id, key, .. } => {
            ended(format!("{id:?}"));
            unsettled.push(*key);
        }
        Event::Confirm { channel, seq, .. } => ended(format!("{channel:?} {seq}")),
        Event::Delivery { key, .. } => unsettled.push(*key),
        Event::Down(_) => *downs += 1,
        Event::Up(_)
        | Event::Blocked(_)
        | Event::Unblocked
        | Event::Flow { .. }
        | Event::Returned { .. }
        | Event::Cancelled { .. }
        | Event::ChannelDown { .. } => {}
    }
    events.push(format!("{event:?}"));
}

fn topology() -> [Method; 5] {
    let mut arguments = TableBuf::new();
    arguments.insert("x-max-length", 100).expect("a short key");
    let arguments = cold::field_table(arguments.as_table()).expect("it is well-formed");
    [
        Method::Exchange(exchange::AMQPMethod::Declare(exchange::Declare {
            exchange: "x".into(),
            kind: "topic".into(),
            passive: false,
            durable: false,
            auto_delete: false,
            internal: false,
            nowait: false,
            arguments: FieldTable::default(),
        })),
        Method::Queue(queue::AMQPMethod::Declare(queue::Declare {
            queue: "q".into(),
            passive: false,
            durable: false,
            exclusive: false,
            auto_delete: false,
            nowait: false,
            arguments,
        })),
        Method::Queue(queue::AMQPMethod::Bind(queue::Bind {
            queue: "q".into(),
            exchange: "x".into(),
            routing_key: "a.*".into(),
            nowait: false,
            arguments: FieldTable::default(),
        })),
        Method::Basic(basic::AMQPMethod::Qos(basic::Qos {
            prefetch_count: 10,
            global: false,
        })),
        Method::Confirm(confirm::AMQPMethod::Select(confirm::Select {
            nowait: false,
        })),
    ]
}

fn get() -> Method {
    Method::Basic(basic::AMQPMethod::Get(basic::Get {
        queue: "q".into(),
        no_ack: false,
    }))
}

fn delete() -> Method {
    Method::Queue(queue::AMQPMethod::Delete(queue::Delete {
        queue: "q".into(),
        if_unused: false,
        if_empty: false,
        nowait: false,
    }))
}
