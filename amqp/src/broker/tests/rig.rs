//! A broker, clients that are byte buffers, and short words for frames.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::broker::store::{Mark, Store, Stored};
use crate::broker::{Broker, Config, QueueStatus, SessionId};
use crate::proto::content::Assembly;
use crate::wire::cold::{
    self, LongString, Method, basic, channel, confirm, connection, exchange, queue, tx,
};
use crate::wire::{
    Ack, AnyMethod, ContentHeader, Frame, Nack, PROTOCOL_HEADER, Properties, PropsBuf, Publish,
    Reject, Splitter, TableBuf, Value,
};

pub(super) struct Rig {
    pub(super) broker: Broker,
    pub(super) now: Instant,
}

pub(super) struct Client {
    pub(super) id: SessionId,
    unread: Vec<u8>,
    unsent: Vec<u8>,
}

impl Rig {
    pub(super) fn new() -> Self {
        Self::with(Config::default())
    }

    pub(super) fn with(config: Config) -> Self {
        let now = origin();
        let broker = Broker::new(config, now, Duration::from_secs(1_800_000_000));
        Self { broker, now }
    }

    /// A broker whose store is safe up to what the test says.
    pub(super) fn with_slow_disk() -> (Self, Rc<Disk>) {
        let (now, disk) = (origin(), Rc::<Disk>::default());
        let store = Slow {
            told: 0,
            disk: Rc::clone(&disk),
        };
        let broker = Broker::with_store(
            Config::default(),
            Box::new(store),
            now,
            Duration::from_secs(1_800_000_000),
        );
        (Self { broker, now }, disk)
    }

    /// A client that has said nothing.
    pub(super) fn stranger(&mut self) -> Client {
        let id = self.broker.open(self.now).expect("room for a session");
        Client {
            id,
            unread: Vec::new(),
            unsent: Vec::new(),
        }
    }

    /// A client with channel 1 open and no heartbeats.
    pub(super) fn client(&mut self) -> Client {
        let mut client = self.stranger();
        self.greet(&mut client, 0);
        client.open(self, 1);
        client
    }

    pub(super) fn greet(&mut self, client: &mut Client, heartbeat: u16) {
        self.send(client, &PROTOCOL_HEADER);
        assert_eq!(self.read(client), ["0 start"]);
        client.method(self, 0, start_ok("guest", "guest"));
        assert_eq!(self.read(client), ["0 tune 2047 131072 60"]);
        client.method(self, 0, tune_ok(heartbeat));
        client.method(self, 0, open("/"));
        assert_eq!(self.read(client), ["0 open-ok"]);
    }

    pub(super) fn send(&mut self, client: &mut Client, bytes: &[u8]) {
        client.unsent.extend_from_slice(bytes);
        let used = self.broker.input(client.id, &client.unsent, self.now);
        client.unsent.drain(..used);
    }

    /// Takes everything the broker has for a client, and lets it read on.
    pub(super) fn pump(&mut self, client: &mut Client) {
        loop {
            let mut bytes = Vec::new();
            self.broker.take_output(client.id, &mut bytes, self.now);
            self.broker.written(client.id, bytes.len(), self.now);
            client.unread.extend_from_slice(&bytes);
            let used = self.broker.input(client.id, &client.unsent, self.now);
            client.unsent.drain(..used);
            if bytes.is_empty() && used == 0 {
                return;
            }
        }
    }

    /// Everything the broker has said to a client since the last call, one line a frame or message.
    pub(super) fn read(&mut self, client: &mut Client) -> Vec<String> {
        self.pump(client);
        lines(&std::mem::take(&mut client.unread))
    }

    /// Bytes that wait for a client, for those who count.
    pub(super) fn unread(&mut self, client: &mut Client) -> usize {
        self.pump(client);
        client.unread.len()
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.broker.tick(self.now);
    }

    pub(super) fn queue(&self, name: &str) -> Option<(usize, usize, usize)> {
        let status = self.broker.queues().into_iter().find(|q| q.name == name)?;
        let QueueStatus {
            ready,
            unsettled,
            consumers,
            ..
        } = status;
        Some((ready, unsettled, consumers))
    }
}

#[expect(clippy::disallowed_methods, reason = "an origin for virtual time")]
fn origin() -> Instant {
    Instant::now()
}

/// What a slow store was told, and how much of it is safe: nothing at first.
#[derive(Debug, Default)]
pub(super) struct Disk {
    /// The last mark that is.
    pub(super) safe: Cell<u64>,
    /// The messages of each queue.
    queues: RefCell<BTreeMap<String, BTreeSet<u64>>>,
}

impl Disk {
    /// The queues it has heard of, and how many messages it keeps of each.
    pub(super) fn held(&self) -> Vec<(String, usize)> {
        let queues = self.queues.borrow();
        let held = queues.iter().map(|(name, kept)| (name.clone(), kept.len()));
        held.collect()
    }
}

#[derive(Debug)]
struct Slow {
    told: u64,
    disk: Rc<Disk>,
}

impl Store for Slow {
    fn append(&mut self, message: Stored<'_>) {
        let mut queues = self.disk.queues.borrow_mut();
        let queue = queues.entry(message.queue.to_owned()).or_default();
        assert!(queue.insert(message.sequence), "{message:?} twice");
    }

    fn settle(&mut self, queue: &str, sequence: u64) {
        let mut queues = self.disk.queues.borrow_mut();
        let kept = queues.get_mut(queue).expect("it is told of what it keeps");
        assert!(kept.remove(&sequence), "{sequence} of {queue} is not kept");
    }

    fn forget(&mut self, queue: &str) {
        self.disk.queues.borrow_mut().remove(queue);
    }

    fn mark(&mut self) -> Mark {
        self.told += 1;
        Mark(self.told)
    }

    fn safe(&self) -> Mark {
        Mark(self.disk.safe.get())
    }
}

impl Client {
    pub(super) fn method(&mut self, rig: &mut Rig, channel: u16, method: Method) {
        let mut bytes = Vec::new();
        cold::put(&mut bytes, channel, &method);
        rig.send(self, &bytes);
    }

    /// Sends a method on channel 1 and reads what comes.
    pub(super) fn ask(&mut self, rig: &mut Rig, method: Method) -> Vec<String> {
        self.method(rig, 1, method);
        rig.read(self)
    }

    pub(super) fn open(&mut self, rig: &mut Rig, channel: u16) {
        self.method(rig, channel, open_channel());
        assert_eq!(rig.read(self), [format!("{channel} open-ok")]);
    }

    pub(super) fn publish(&mut self, rig: &mut Rig, exchange: &str, key: &str, body: &str) {
        self.publish_with(rig, exchange, key, body, Properties::default());
    }

    pub(super) fn publish_with(
        &mut self,
        rig: &mut Rig,
        exchange: &str,
        key: &str,
        body: &str,
        props: Properties<'_>,
    ) {
        let publish = Publish {
            exchange,
            routing_key: key,
            ..Publish::default()
        };
        self.put(rig, &publish, props, body.as_bytes());
    }

    pub(super) fn put(
        &mut self,
        rig: &mut Rig,
        publish: &Publish<'_>,
        props: Properties<'_>,
        body: &[u8],
    ) {
        let mut bytes = Vec::new();
        let props = props.encode().unwrap();
        publish
            .put(&mut bytes, 1, props.as_bytes(), body, 131_064)
            .unwrap();
        rig.send(self, &bytes);
    }

    pub(super) fn ack(&mut self, rig: &mut Rig, delivery_tag: u64, multiple: bool) {
        let mut bytes = Vec::new();
        Ack {
            delivery_tag,
            multiple,
        }
        .put(&mut bytes, 1);
        rig.send(self, &bytes);
    }

    pub(super) fn nack(&mut self, rig: &mut Rig, delivery_tag: u64, multiple: bool, requeue: bool) {
        let mut bytes = Vec::new();
        let nack = Nack {
            delivery_tag,
            multiple,
            requeue,
        };
        nack.put(&mut bytes, 1);
        rig.send(self, &bytes);
    }

    pub(super) fn reject(&mut self, rig: &mut Rig, delivery_tag: u64, requeue: bool) {
        let mut bytes = Vec::new();
        Reject {
            delivery_tag,
            requeue,
        }
        .put(&mut bytes, 1);
        rig.send(self, &bytes);
    }

    /// Takes one message by `basic.get`: its properties and its line.
    pub(super) fn get_props(&mut self, rig: &mut Rig, queue: &str) -> (PropsBuf, String) {
        self.method(rig, 1, get(queue, true));
        rig.pump(self);
        let bytes = std::mem::take(&mut self.unread);
        let splitter = Splitter::with_frame_max(131_072);
        let (_, method_len) = splitter.next_frame(&bytes).unwrap().unwrap();
        let Some((Frame::Header { raw, .. }, _)) =
            splitter.next_frame(&bytes[method_len..]).unwrap()
        else {
            panic!("no message in {queue}: {:?}", lines(&bytes));
        };
        let props = PropsBuf::copy_of(ContentHeader::parse(raw).unwrap().props);
        (props, lines(&bytes).remove(0))
    }

    /// Empties a queue by `basic.get` and returns the bodies.
    pub(super) fn drain(&mut self, rig: &mut Rig, queue: &str) -> Vec<String> {
        let mut bodies = Vec::new();
        loop {
            let lines = self.ask(rig, get(queue, true));
            match lines[0].split_once(" left ") {
                Some((_, body)) => bodies.push(body.to_owned()),
                None => return bodies,
            }
        }
    }
}

// ---- requests ----

pub(super) fn start_ok(user: &str, password: &str) -> Method {
    let mut capabilities = TableBuf::new();
    for name in [
        "consumer_cancel_notify",
        "connection.blocked",
        "authentication_failure_close",
    ] {
        capabilities.insert(name, true).unwrap();
    }
    let mut properties = TableBuf::new();
    properties
        .insert("capabilities", capabilities.as_table())
        .unwrap();
    Method::Connection(connection::AMQPMethod::StartOk(connection::StartOk {
        client_properties: cold::field_table(properties.as_table()).unwrap(),
        mechanism: "PLAIN".into(),
        response: LongString::from(format!("\0{user}\0{password}")),
        locale: "en_US".into(),
    }))
}

pub(super) fn tune_ok(heartbeat: u16) -> Method {
    Method::Connection(connection::AMQPMethod::TuneOk(connection::TuneOk {
        channel_max: 2047,
        frame_max: 131_072,
        heartbeat,
    }))
}

pub(super) fn open_channel() -> Method {
    Method::Channel(channel::AMQPMethod::Open(channel::Open {}))
}

pub(super) fn open(virtual_host: &str) -> Method {
    Method::Connection(connection::AMQPMethod::Open(connection::Open {
        virtual_host: virtual_host.into(),
    }))
}

pub(super) fn table(entries: &[(&str, Value<'_>)]) -> cold::FieldTable {
    let mut table = TableBuf::new();
    for (name, value) in entries {
        table.insert(name, *value).unwrap();
    }
    cold::field_table(table.as_table()).unwrap()
}

pub(super) fn declare(queue: &str) -> Method {
    declare_with(queue, |_| {})
}

pub(super) fn declare_args(queue: &str, arguments: &[(&str, Value<'_>)]) -> Method {
    declare_with(queue, |d| d.arguments = table(arguments))
}

pub(super) fn declare_with(queue: &str, change: impl FnOnce(&mut queue::Declare)) -> Method {
    let mut declare = queue::Declare {
        queue: queue.into(),
        ..queue::Declare::default()
    };
    change(&mut declare);
    Method::Queue(queue::AMQPMethod::Declare(declare))
}

pub(super) fn passive(queue: &str) -> Method {
    declare_with(queue, |d| d.passive = true)
}

pub(super) fn exchange(name: &str, kind: &str) -> Method {
    exchange_with(name, kind, |_| {})
}

pub(super) fn exchange_with(
    name: &str,
    kind: &str,
    change: impl FnOnce(&mut exchange::Declare),
) -> Method {
    let mut declare = exchange::Declare {
        exchange: name.into(),
        kind: kind.into(),
        ..exchange::Declare::default()
    };
    change(&mut declare);
    Method::Exchange(exchange::AMQPMethod::Declare(declare))
}

pub(super) fn delete_exchange(name: &str, if_unused: bool) -> Method {
    Method::Exchange(exchange::AMQPMethod::Delete(exchange::Delete {
        exchange: name.into(),
        if_unused,
        nowait: false,
    }))
}

pub(super) fn bind(queue: &str, exchange: &str, key: &str) -> Method {
    bind_args(queue, exchange, key, &[])
}

pub(super) fn bind_args(
    queue: &str,
    exchange: &str,
    key: &str,
    arguments: &[(&str, Value<'_>)],
) -> Method {
    Method::Queue(queue::AMQPMethod::Bind(queue::Bind {
        queue: queue.into(),
        exchange: exchange.into(),
        routing_key: key.into(),
        nowait: false,
        arguments: table(arguments),
    }))
}

pub(super) fn unbind(queue: &str, exchange: &str, key: &str) -> Method {
    Method::Queue(queue::AMQPMethod::Unbind(queue::Unbind {
        queue: queue.into(),
        exchange: exchange.into(),
        routing_key: key.into(),
        ..queue::Unbind::default()
    }))
}

pub(super) fn bind_exchange(destination: &str, source: &str, key: &str) -> Method {
    Method::Exchange(exchange::AMQPMethod::Bind(exchange::Bind {
        destination: destination.into(),
        source: source.into(),
        routing_key: key.into(),
        ..exchange::Bind::default()
    }))
}

pub(super) fn unbind_exchange(destination: &str, source: &str, key: &str) -> Method {
    Method::Exchange(exchange::AMQPMethod::Unbind(exchange::Unbind {
        destination: destination.into(),
        source: source.into(),
        routing_key: key.into(),
        ..exchange::Unbind::default()
    }))
}

pub(super) fn purge(queue: &str) -> Method {
    Method::Queue(queue::AMQPMethod::Purge(queue::Purge {
        queue: queue.into(),
        nowait: false,
    }))
}

pub(super) fn delete(queue: &str, if_unused: bool, if_empty: bool) -> Method {
    Method::Queue(queue::AMQPMethod::Delete(queue::Delete {
        queue: queue.into(),
        if_unused,
        if_empty,
        nowait: false,
    }))
}

pub(super) fn consume(queue: &str, tag: &str) -> Method {
    consume_with(queue, tag, |_| {})
}

pub(super) fn consume_with(
    queue: &str,
    tag: &str,
    change: impl FnOnce(&mut basic::Consume),
) -> Method {
    let mut consume = basic::Consume {
        queue: queue.into(),
        consumer_tag: tag.into(),
        ..basic::Consume::default()
    };
    change(&mut consume);
    Method::Basic(basic::AMQPMethod::Consume(consume))
}

pub(super) fn cancel(tag: &str) -> Method {
    Method::Basic(basic::AMQPMethod::Cancel(basic::Cancel {
        consumer_tag: tag.into(),
        nowait: false,
    }))
}

pub(super) fn qos(prefetch_count: u16, global: bool) -> Method {
    Method::Basic(basic::AMQPMethod::Qos(basic::Qos {
        prefetch_count,
        global,
    }))
}

pub(super) fn get(queue: &str, no_ack: bool) -> Method {
    Method::Basic(basic::AMQPMethod::Get(basic::Get {
        queue: queue.into(),
        no_ack,
    }))
}

pub(super) fn recover(requeue: bool) -> Method {
    Method::Basic(basic::AMQPMethod::Recover(basic::Recover { requeue }))
}

pub(super) fn confirm_select() -> Method {
    Method::Confirm(confirm::AMQPMethod::Select(confirm::Select {
        nowait: false,
    }))
}

pub(super) fn close_channel() -> Method {
    Method::Channel(channel::AMQPMethod::Close(channel::Close::default()))
}

pub(super) fn close_ok() -> Method {
    Method::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {}))
}

// ---- what comes back ----

/// Frames as lines: channel, what it is, and the fields that matter. A message is one line, ending with its body.
pub(super) fn lines(bytes: &[u8]) -> Vec<String> {
    let splitter = Splitter::with_frame_max(131_072);
    let mut lines = Vec::new();
    let mut assembly = Assembly::new(u64::MAX);
    let mut at = 0;
    if bytes.starts_with(b"AMQP") {
        lines.push("AMQP header".to_owned());
        at = 8;
    }
    while let Some((frame, used)) = splitter.next_frame(&bytes[at..]).unwrap() {
        at += used;
        let (channel, content) = match frame {
            Frame::Method {
                channel,
                class,
                method,
                args,
            } => {
                let line = match AnyMethod::decode(class, method, args).unwrap() {
                    AnyMethod::Deliver(_) | AnyMethod::GetOk(_) | AnyMethod::Return(_) => {
                        assembly.begin(method, args).unwrap();
                        continue;
                    }
                    AnyMethod::Ack(Ack {
                        delivery_tag,
                        multiple,
                    }) => {
                        format!(
                            "ack {delivery_tag}{}",
                            if multiple { " multiple" } else { "" }
                        )
                    }
                    AnyMethod::Nack(Nack { delivery_tag, .. }) => format!("nack {delivery_tag}"),
                    AnyMethod::Cold(method) => describe(method),
                    other => panic!("{other:?}"),
                };
                lines.push(format!("{channel} {line}"));
                continue;
            }
            Frame::Header { channel, raw } => (channel, assembly.header(raw).unwrap()),
            Frame::Body { channel, data } => (channel, assembly.body(data).unwrap()),
            Frame::Heartbeat => {
                lines.push("heartbeat".into());
                continue;
            }
        };
        let Some(content) = content else {
            continue;
        };
        let body = String::from_utf8_lossy(&content.body).into_owned();
        let again = |redelivered| if redelivered { " again" } else { "" };
        let line = match AnyMethod::decode(60, content.method, content.args).unwrap() {
            AnyMethod::Deliver(d) => {
                format!(
                    "deliver {} #{}{}",
                    d.consumer_tag,
                    d.delivery_tag,
                    again(d.redelivered)
                )
            }
            AnyMethod::GetOk(g) => format!(
                "get-ok #{}{} {} left",
                g.delivery_tag,
                again(g.redelivered),
                g.message_count
            ),
            AnyMethod::Return(r) => format!("return {} {}", r.reply_code.0, r.routing_key),
            other => panic!("{other:?}"),
        };
        lines.push(format!("{channel} {line} {body}"));
    }
    assert_eq!(at, bytes.len(), "the output ends at the end of a frame");
    lines
}

fn describe(method: Method) -> String {
    match method {
        Method::Connection(method) => match method {
            connection::AMQPMethod::Start(_) => "start".into(),
            connection::AMQPMethod::Tune(t) => {
                format!("tune {} {} {}", t.channel_max, t.frame_max, t.heartbeat)
            }
            connection::AMQPMethod::OpenOk(_) => "open-ok".into(),
            connection::AMQPMethod::Close(c) => format!(
                "close {} {} ({}, {})",
                c.reply_code, c.reply_text, c.class_id, c.method_id
            ),
            connection::AMQPMethod::CloseOk(_) => "close-ok".into(),
            connection::AMQPMethod::Blocked(b) => format!("blocked {}", b.reason),
            connection::AMQPMethod::Unblocked(_) => "unblocked".into(),
            connection::AMQPMethod::UpdateSecretOk(_) => "update-secret-ok".into(),
            other => panic!("{other:?}"),
        },
        Method::Channel(method) => match method {
            channel::AMQPMethod::OpenOk(_) => "open-ok".into(),
            channel::AMQPMethod::Close(c) => format!(
                "close {} {} ({}, {})",
                c.reply_code, c.reply_text, c.class_id, c.method_id
            ),
            channel::AMQPMethod::CloseOk(_) => "close-ok".into(),
            channel::AMQPMethod::FlowOk(f) => format!("flow-ok {}", f.active),
            other => panic!("{other:?}"),
        },
        Method::Queue(method) => match method {
            queue::AMQPMethod::DeclareOk(d) => {
                format!(
                    "declare-ok {} {} {}",
                    d.queue, d.message_count, d.consumer_count
                )
            }
            queue::AMQPMethod::PurgeOk(p) => format!("purge-ok {}", p.message_count),
            queue::AMQPMethod::DeleteOk(d) => format!("delete-ok {}", d.message_count),
            queue::AMQPMethod::BindOk(_) => "bind-ok".into(),
            queue::AMQPMethod::UnbindOk(_) => "unbind-ok".into(),
            other => panic!("{other:?}"),
        },
        Method::Exchange(method) => match method {
            exchange::AMQPMethod::DeclareOk(_) => "declare-ok".into(),
            exchange::AMQPMethod::DeleteOk(_) => "delete-ok".into(),
            exchange::AMQPMethod::BindOk(_) => "bind-ok".into(),
            exchange::AMQPMethod::UnbindOk(_) => "unbind-ok".into(),
            other => panic!("{other:?}"),
        },
        Method::Basic(method) => match method {
            basic::AMQPMethod::ConsumeOk(c) => format!("consume-ok {}", c.consumer_tag),
            basic::AMQPMethod::Cancel(c) => format!("cancel {}", c.consumer_tag),
            basic::AMQPMethod::CancelOk(c) => format!("cancel-ok {}", c.consumer_tag),
            basic::AMQPMethod::QosOk(_) => "qos-ok".into(),
            basic::AMQPMethod::GetEmpty(_) => "get-empty".into(),
            basic::AMQPMethod::RecoverOk(_) => "recover-ok".into(),
            other => panic!("{other:?}"),
        },
        Method::Confirm(confirm::AMQPMethod::SelectOk(_)) => "select-ok".into(),
        Method::Tx(method) => match method {
            tx::AMQPMethod::SelectOk(_) => "select-ok".into(),
            tx::AMQPMethod::CommitOk(_) => "commit-ok".into(),
            tx::AMQPMethod::RollbackOk(_) => "rollback-ok".into(),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}
