//! Queues: messages in order, and the consumers that wait for them.
//!
//! A message gets a sequence number when it enters. The number orders the queue: what is requeued goes back to the place it
//! came from. Only a queue with `x-max-priority` pays for a tree; every other one is a ring.
//!
//! A queue hands out entries and takes them back; it knows no session. Who may get one is decided by the caller of
//! [`Queue::next_consumer`], which keeps the round robin.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::SessionId;
use super::exchange::{ExchangeId, QueueId};
use super::fault::{Fault, type_name};
use crate::wire::{Props, Table, TableBuf, Value, frame};

/// A message: what its publisher sent, byte for byte, in one buffer. Queues share it.
pub(crate) struct Message {
    pub(crate) exchange: Rc<str>,
    pub(crate) routing_key: Rc<str>,
    /// The body, then the encoded properties (flags and values).
    content: Vec<u8>,
    body_len: usize,
    pub(crate) persistent: bool,
    pub(crate) priority: u8,
    /// The publisher's `expiration`.
    pub(crate) ttl: Option<Duration>,
    memory: Rc<Cell<usize>>,
}

impl Message {
    /// A message of `content`: a body of `body_len` bytes and the encoded properties. It counts towards `memory` until it is gone.
    pub(crate) fn new(
        exchange: Rc<str>,
        routing_key: Rc<str>,
        content: Vec<u8>,
        body_len: usize,
        memory: &Rc<Cell<usize>>,
    ) -> Self {
        let message = Self {
            exchange,
            routing_key,
            content,
            body_len,
            persistent: false,
            priority: 0,
            ttl: None,
            memory: memory.clone(),
        };
        memory.set(memory.get() + message.size());
        message
    }

    /// Flags and values of the properties, as they came.
    pub(crate) fn props(&self) -> Props<'_> {
        Props::from_bytes(&self.content[self.body_len..])
    }

    pub(crate) fn body(&self) -> &[u8] {
        &self.content[..self.body_len]
    }

    /// Appends the content's frames: what follows the method that brings the message to somebody.
    pub(super) fn put_content(&self, out: &mut Vec<u8>, channel: u16, max_payload: usize) {
        let props = &self.content[self.body_len..];
        frame::put_content(out, channel, props, self.body(), max_payload);
    }

    pub(super) fn size(&self) -> usize {
        size_of::<Self>() + self.content.capacity()
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        self.memory.set(self.memory.get() - self.size());
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("exchange", &self.exchange)
            .field("routing_key", &self.routing_key)
            .field("body_len", &self.body().len())
            .finish_non_exhaustive()
    }
}

/// A message's place in one queue. It counts towards the memory bound too: fan-out shares messages, not places.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) sequence: u64,
    pub(crate) message: Rc<Message>,
    pub(crate) expires: Option<Instant>,
    /// How often it came back; kept for `x-delivery-limit`.
    pub(crate) returns: u32,
    pub(crate) redelivered: bool,
}

impl Entry {
    fn new(sequence: u64, message: Rc<Message>, expires: Option<Instant>) -> Self {
        message.memory.set(message.memory.get() + size_of::<Self>());
        Self {
            sequence,
            message,
            expires,
            returns: 0,
            redelivered: false,
        }
    }

    /// An entry for a message that no queue has.
    pub(crate) fn unplaced(message: Rc<Message>) -> Self {
        Self::new(0, message, None)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let memory = &self.message.memory;
        memory.set(memory.get() - size_of::<Self>());
    }
}

/// A subscription. Shared by its queue, its channel and its unsettled deliveries.
#[derive(Debug)]
pub(crate) struct Consumer {
    pub(crate) tag: Rc<str>,
    pub(crate) session: SessionId,
    pub(crate) channel: u16,
    pub(crate) queue: QueueId,
    pub(crate) no_ack: bool,
    pub(crate) exclusive: bool,
    pub(crate) priority: i64,
    /// Most unsettled deliveries; 0 is no limit.
    pub(crate) prefetch: u16,
    pub(crate) unsettled: Cell<u32>,
}

impl Consumer {
    /// Whether its own prefetch has room; its channel may still say no.
    pub(crate) fn has_room(&self) -> bool {
        self.prefetch == 0 || self.no_ack || self.unsettled.get() < self.prefetch.into()
    }
}

/// What happens to a full queue (`x-overflow`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Overflow {
    #[default]
    DropHead,
    RejectPublish,
    RejectPublishDlx,
}

/// The `x-` arguments that change what a queue does. Others are accepted and mean nothing here.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Features {
    pub(crate) message_ttl: Option<Duration>,
    pub(crate) expires: Option<Duration>,
    pub(crate) max_length: Option<usize>,
    pub(crate) max_bytes: Option<usize>,
    pub(crate) overflow: Overflow,
    pub(crate) dead_letter_exchange: Option<Rc<str>>,
    pub(crate) dead_letter_key: Option<Rc<str>>,
    pub(crate) max_priority: Option<u8>,
    pub(crate) single_active: bool,
    pub(crate) delivery_limit: Option<u32>,
}

/// The arguments that make two declarations of a queue different.
pub(crate) const COMPARED: [&str; 12] = [
    "x-expires",
    "x-message-ttl",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-max-length",
    "x-max-length-bytes",
    "x-max-priority",
    "x-overflow",
    "x-queue-mode",
    "x-single-active-consumer",
    "x-queue-type",
    "x-delivery-limit",
];

impl Features {
    /// Reads the arguments of `queue.declare`; `what` names the queue in the error.
    pub(crate) fn parse(arguments: Table<'_>, what: &str) -> Result<Self, Fault> {
        let mut features = Self::default();
        for name in COMPARED {
            let Some(value) = arguments.get(name) else {
                continue;
            };
            features.set(name, &value, arguments).map_err(|why| {
                Fault::precondition(format_args!("invalid arg '{name}' for {what}: {why}"))
            })?;
        }
        Ok(features)
    }

    fn set(&mut self, name: &str, value: &Value<'_>, all: Table<'_>) -> Result<(), String> {
        match name {
            "x-expires" => {
                let after = milliseconds(value)?;
                if after.is_zero() {
                    return Err("{value_zero,0}".into());
                }
                self.expires = Some(after);
            }
            "x-message-ttl" => self.message_ttl = Some(milliseconds(value)?),
            "x-max-length" => self.max_length = Some(not_negative(value)? as usize),
            "x-max-length-bytes" => self.max_bytes = Some(not_negative(value)? as usize),
            "x-delivery-limit" => self.delivery_limit = u32::try_from(not_negative(value)?).ok(),
            "x-max-priority" => {
                let most = not_negative(value)?;
                let most =
                    u8::try_from(most).map_err(|_| format!("{{max_value_exceeded,{most}}}"))?;
                self.max_priority = Some(most);
            }
            "x-dead-letter-exchange" => self.dead_letter_exchange = Some(string(value)?.into()),
            "x-dead-letter-routing-key" => {
                self.dead_letter_key = Some(string(value)?.into());
                if all.get("x-dead-letter-exchange").is_none() {
                    return Err("routing_key_but_no_dlx_defined".into());
                }
            }
            "x-overflow" => {
                self.overflow = match string(value)? {
                    "drop-head" => Overflow::DropHead,
                    "reject-publish" => Overflow::RejectPublish,
                    "reject-publish-dlx" => Overflow::RejectPublishDlx,
                    _ => return Err("invalid_overflow".into()),
                }
            }
            // Lazy or not, messages are in memory.
            "x-queue-mode" => match string(value)? {
                "default" | "lazy" => {}
                other => return Err(format!("\"unsupported queue mode '{other}'\"")),
            },
            "x-single-active-consumer" => {
                self.single_active = value.as_bool().ok_or_else(|| unacceptable(value))?;
            }
            // Any type of queue is served by this one kind; that it keeps no replicas is in the documentation.
            "x-queue-type" => {
                string(value)?;
            }
            other => unreachable!("{other} is not in COMPARED"),
        }
        Ok(())
    }

    fn is_limited(&self) -> bool {
        self.max_length.is_some() || self.max_bytes.is_some()
    }
}

fn not_negative(value: &Value<'_>) -> Result<u64, String> {
    let number = value
        .as_int()
        .ok_or_else(|| format!("\"expected integer, got {}\"", type_name(value)))?;
    u64::try_from(number).map_err(|_| format!("{{value_negative,{number}}}"))
}

/// RabbitMQ's timers hold 32 bits.
fn milliseconds(value: &Value<'_>) -> Result<Duration, String> {
    match not_negative(value)? {
        ms if ms > u32::MAX.into() => Err(format!("{{value_too_large,{ms}}}")),
        ms => Ok(Duration::from_millis(ms)),
    }
}

fn string<'a>(value: &Value<'a>) -> Result<&'a str, String> {
    value.as_str().ok_or_else(|| unacceptable(value))
}

fn unacceptable(value: &Value<'_>) -> String {
    format!("{{unacceptable_type,{}}}", type_name(value))
}

/// Places that an empty queue may keep for the next messages.
const KEEP: usize = 1 << 10;

/// The messages that wait, in order of delivery.
#[derive(Debug)]
enum Ready {
    Fifo(VecDeque<Entry>),
    Priority(BTreeMap<(Reverse<u8>, u64), Entry>),
}

/// A queue.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) id: QueueId,
    pub(crate) name: Rc<str>,
    pub(crate) durable: bool,
    pub(crate) auto_delete: bool,
    /// The only session that may use it, and with which it goes.
    pub(crate) owner: Option<SessionId>,
    /// What it was declared with: the entries of [`COMPARED`] only, so that nobody keeps a megabyte here.
    pub(crate) arguments: TableBuf,
    pub(crate) features: Features,
    /// Where it is bound, for its deletion. The same pair may be here twice if bound with different arguments.
    pub(crate) bound: Vec<(ExchangeId, Rc<str>)>,
    ready: Ready,
    /// Bytes of the bodies in `ready`.
    ready_bytes: usize,
    next_sequence: u64,
    /// Entries handed out and not settled.
    pub(crate) unsettled: usize,
    /// Highest priority first; within one priority whoever waits longest.
    consumers: Vec<Rc<Consumer>>,
    /// Set when no consumer had room, so that publishing to a full house costs nothing. Whoever makes room clears it.
    pub(crate) starved: bool,
    /// It is on the vhost's list of queues to look at.
    pub(crate) dirty: bool,
    /// When the vhost will look at it next without being asked.
    pub(crate) alarm: Option<Instant>,
    /// Last declared, asked by `basic.get` or left by a consumer; `x-expires` counts from here.
    pub(crate) last_used: Instant,
}

impl Queue {
    pub(crate) fn new(id: QueueId, name: Rc<str>, features: Features, now: Instant) -> Self {
        let ready = match features.max_priority {
            Some(_) => Ready::Priority(BTreeMap::new()),
            None => Ready::Fifo(VecDeque::new()),
        };
        Self {
            id,
            name,
            durable: false,
            auto_delete: false,
            owner: None,
            arguments: TableBuf::new(),
            features,
            bound: Vec::new(),
            ready,
            ready_bytes: 0,
            next_sequence: 0,
            unsettled: 0,
            consumers: Vec::new(),
            starved: false,
            dirty: false,
            alarm: None,
            last_used: now,
        }
    }

    /// Adds a message at the end and returns its sequence number.
    pub(crate) fn push(&mut self, message: Rc<Message>, now: Instant) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let ttl = match (self.features.message_ttl, message.ttl) {
            (Some(ours), Some(its)) => Some(ours.min(its)),
            (ours, its) => ours.or(its),
        };
        // A time to live beyond the clock's range is no limit.
        let expires = ttl.and_then(|ttl| now.checked_add(ttl));
        self.insert(Entry::new(sequence, message, expires));
        sequence
    }

    /// Puts an entry back to where it was taken from.
    pub(crate) fn restore(&mut self, mut entry: Entry) {
        entry.redelivered = true;
        entry.returns = entry.returns.saturating_add(1);
        self.insert(entry);
    }

    fn insert(&mut self, entry: Entry) {
        self.ready_bytes += entry.message.body().len();
        let limit = self.features.max_priority;
        match &mut self.ready {
            Ready::Fifo(ring) => match ring.back() {
                Some(last) if last.sequence > entry.sequence => {
                    let place = ring.partition_point(|waiting| waiting.sequence < entry.sequence);
                    ring.insert(place, entry);
                }
                _ => ring.push_back(entry),
            },
            Ready::Priority(tree) => {
                let priority = entry.message.priority.min(limit.unwrap_or(0));
                tree.insert((Reverse(priority), entry.sequence), entry);
            }
        }
    }

    /// Takes the first entry.
    pub(crate) fn pop(&mut self) -> Option<Entry> {
        let entry = match &mut self.ready {
            Ready::Fifo(ring) => {
                let first = ring.pop_front();
                // A ring keeps the room of its longest day.
                if ring.capacity() > KEEP && ring.len() * 4 <= ring.capacity() {
                    ring.shrink_to((ring.len() * 2).max(KEEP));
                }
                first
            }
            Ready::Priority(tree) => tree.pop_first().map(|(_, entry)| entry),
        }?;
        self.ready_bytes -= entry.message.body().len();
        Some(entry)
    }

    fn front(&self) -> Option<&Entry> {
        match &self.ready {
            Ready::Fifo(ring) => ring.front(),
            Ready::Priority(tree) => tree.first_key_value().map(|(_, entry)| entry),
        }
    }

    /// Takes the first entry if it was to be delivered before `now`. Like RabbitMQ, a queue looks at its head only.
    pub(crate) fn pop_expired(&mut self, is_due: impl Fn(Instant) -> bool) -> Option<Entry> {
        self.front()?.expires.filter(|&at| is_due(at))?;
        self.pop()
    }

    /// Takes the first entry if there are more than the queue may hold.
    pub(crate) fn pop_overflow(&mut self) -> Option<Entry> {
        let features = &self.features;
        let over = features.max_length.is_some_and(|most| self.len() > most)
            || features
                .max_bytes
                .is_some_and(|most| self.ready_bytes > most);
        if over { self.pop() } else { None }
    }

    /// Whether one more message of `body_len` bytes is over the limit.
    pub(crate) fn is_full(&self, body_len: usize) -> bool {
        let features = &self.features;
        features.is_limited()
            && (features.max_length.is_some_and(|most| self.len() >= most)
                || features
                    .max_bytes
                    .is_some_and(|most| self.ready_bytes + body_len > most))
    }

    /// Empties it of everything that waits; what is unsettled stays.
    pub(crate) fn purge(&mut self) -> Vec<Entry> {
        std::iter::from_fn(|| self.pop()).collect()
    }

    pub(crate) fn add_consumer(&mut self, consumer: Rc<Consumer>) {
        let place = self
            .consumers
            .partition_point(|c| c.priority >= consumer.priority);
        self.consumers.insert(place, consumer);
        self.starved = false;
    }

    /// Removes it; `false` if it is not there.
    pub(crate) fn remove_consumer(&mut self, consumer: &Rc<Consumer>, now: Instant) -> bool {
        let before = self.consumers.len();
        self.consumers.retain(|c| !Rc::ptr_eq(c, consumer));
        self.last_used = now;
        self.starved = false;
        self.consumers.len() < before
    }

    /// The consumer whose turn it is among those that `may` take something.
    pub(crate) fn next_consumer(
        &mut self,
        may: impl Fn(&Consumer) -> bool,
    ) -> Option<Rc<Consumer>> {
        if self.features.single_active {
            // The order of `consumers` is the order of succession then, so nobody is moved.
            return self.consumers.first().filter(|c| may(c)).cloned();
        }
        let turn = self.consumers.iter().position(|c| may(c))?;
        let consumer = self.consumers[turn].clone();
        if self.consumers.len() > 1 {
            let end = self
                .consumers
                .partition_point(|c| c.priority >= consumer.priority);
            self.consumers[turn..end].rotate_left(1);
        }
        Some(consumer)
    }

    pub(crate) fn consumers(&self) -> &[Rc<Consumer>] {
        &self.consumers
    }

    /// How many messages wait.
    pub(crate) fn len(&self) -> usize {
        match &self.ready {
            Ready::Fifo(ring) => ring.len(),
            Ready::Priority(tree) => tree.len(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.front().is_none()
    }

    /// When it has to be looked at even if nothing happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let head = self.front().and_then(|entry| entry.expires);
        match (head, self.expiry()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// When it goes for want of use (`x-expires`).
    pub(crate) fn expiry(&self) -> Option<Instant> {
        if !self.consumers.is_empty() {
            return None;
        }
        self.features
            .expires
            .and_then(|after| self.last_used.checked_add(after))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(features: Features) -> Queue {
        let id = QueueId { slot: 0, serial: 0 };
        Queue::new(id, "q".into(), features, origin())
    }

    #[expect(clippy::disallowed_methods, reason = "an origin for virtual time")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn message(body: &str, memory: &Rc<Cell<usize>>) -> Message {
        Message::new(
            "".into(),
            "q".into(),
            body.as_bytes().to_vec(),
            body.len(),
            memory,
        )
    }

    fn bodies(queue: &mut Queue) -> Vec<String> {
        queue
            .purge()
            .iter()
            .map(|e| String::from_utf8(e.message.body().to_vec()).unwrap())
            .collect()
    }

    #[test]
    fn what_is_restored_returns_to_its_place() {
        let memory = Rc::default();
        let mut q = queue(Features::default());
        let now = q.last_used;
        for body in ["a", "b", "c", "d"] {
            q.push(Rc::new(message(body, &memory)), now);
        }
        let (a, b, c) = (q.pop().unwrap(), q.pop().unwrap(), q.pop().unwrap());
        q.restore(b);
        assert_eq!(
            q.front().map(|e| (e.sequence, e.redelivered)),
            Some((1, true))
        );
        q.restore(c);
        q.restore(a);
        assert_eq!(bodies(&mut q), ["a", "b", "c", "d"]);
        assert_eq!((q.len(), q.ready_bytes, memory.get()), (0, 0, 0));
    }

    #[test]
    fn a_queue_that_was_long_gives_the_room_of_its_messages_back() {
        let memory = Rc::default();
        let mut q = queue(Features::default());
        let now = q.last_used;
        let room = |q: &Queue| match &q.ready {
            Ready::Fifo(ring) => ring.capacity(),
            Ready::Priority(_) => unreachable!("it has no priorities"),
        };
        for n in 0..100_000 {
            q.push(Rc::new(message(&n.to_string(), &memory)), now);
        }
        for n in 0..100_000 {
            assert_eq!(q.pop().unwrap().message.body(), n.to_string().as_bytes());
            assert!(
                room(&q) <= (4 * q.len()).max(KEEP),
                "{} of {}",
                q.len(),
                room(&q)
            );
        }
        assert_eq!(memory.get(), 0);
    }

    #[test]
    fn priorities_come_highest_first_and_are_clamped() {
        let memory = Rc::default();
        let mut q = queue(Features {
            max_priority: Some(5),
            ..Features::default()
        });
        let now = q.last_used;
        for (body, priority) in [("low", 0), ("high", 5), ("higher", 200), ("low too", 0)] {
            let mut message = message(body, &memory);
            message.priority = priority;
            q.push(Rc::new(message), now);
        }
        assert_eq!(bodies(&mut q), ["high", "higher", "low", "low too"]);
    }

    #[test]
    fn a_fan_out_counts_its_message_once_and_every_place() {
        let memory: Rc<Cell<usize>> = Rc::default();
        let shared = Rc::new(message(&"x".repeat(1000), &memory));
        let alone = memory.get();
        assert!(alone >= 1000);
        let (mut one, mut two) = (queue(Features::default()), queue(Features::default()));
        let now = one.last_used;
        one.push(shared.clone(), now);
        two.push(shared, now);
        assert_eq!(memory.get(), alone + 2 * size_of::<Entry>());
        one.purge();
        assert_eq!(memory.get(), alone + size_of::<Entry>());
        two.purge();
        assert_eq!(memory.get(), 0);
    }

    #[test]
    fn consumers_take_turns_within_their_priority() {
        let consumer = |tag: &str, priority| {
            Rc::new(Consumer {
                tag: tag.into(),
                session: SessionId { slot: 0, serial: 0 },
                channel: 1,
                queue: QueueId { slot: 0, serial: 0 },
                no_ack: false,
                exclusive: false,
                priority,
                prefetch: 0,
                unsettled: Cell::new(0),
            })
        };
        let mut q = queue(Features::default());
        for (tag, priority) in [("low", -1), ("a", 0), ("b", 0), ("c", 0)] {
            q.add_consumer(consumer(tag, priority));
        }
        let mut next =
            |may: &dyn Fn(&Consumer) -> bool| q.next_consumer(may).map(|c| c.tag.to_string());
        let turns: Vec<_> = (0..4).map(|_| next(&|_| true).unwrap()).collect();
        assert_eq!(turns, ["a", "b", "c", "a"]);
        // One that cannot take anything keeps its place at the front.
        assert_eq!(next(&|c| &*c.tag != "b").unwrap(), "c");
        assert_eq!(next(&|_| true).unwrap(), "b");
        assert_eq!(next(&|c| c.priority < 0).unwrap(), "low");
        assert_eq!(next(&|_| false), None);
    }
}
