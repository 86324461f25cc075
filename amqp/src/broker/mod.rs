//! The embedded broker.
//!
//! [`Broker`] is sans-IO: it is given the bytes that come in from each session and the time, and asked for the bytes that go out
//! and for deadlines. What it answers, and in which words, is what RabbitMQ 3.10 answers. [`Server`] runs it on the kernel.
//!
//! A turn of a session: [`Broker::input`] handles every whole frame; then the publisher's confirms are written, as one ack for
//! many; then everything that has become deliverable is delivered, round robin among the consumers that have room. So a burst of
//! messages costs one pass, and leaves in one write.
//!
//! # What is bounded
//!
//! * Output: above [`Config::output_high`] bytes waiting for one session, it is sent no deliveries and nothing more of it is read.
//! * Memory: above [`Config::memory_high`] bytes of messages, every session that has published is told `connection.blocked` and is
//!   not read until they are fewer than [`Config::memory_low`]. Like with RabbitMQ its acks wait as well, so a program that
//!   publishes and consumes should use two connections. A session that only consumes goes on.
//! * A message, the channels of a connection, the consumers of a channel, and the number of queues, exchanges and bindings.
//!
//! What is not here: clusters, policies, permissions, transactions, and (with the [`Memory`] store) durability.
//! `x-queue-type` is accepted, and every queue is a classic one.

use std::fmt;
use std::time::{Duration, Instant};

use slab::Slab;

pub use serve::Server;

use session::Session;
use store::{Memory, Store};
use vhost::{Limits, Vhost};

mod channel;
mod deadletter;
mod exchange;
mod fault;
mod queue;
mod serve;
mod session;
pub mod store;
mod transaction;
mod vhost;

/// What a broker allows.
#[derive(Clone, Debug)]
pub struct Config {
    /// Names and passwords.
    pub users: Vec<(String, String)>,
    /// The only virtual host.
    pub virtual_host: String,
    /// Channels a connection may open.
    pub channel_max: u16,
    /// The largest frame, in bytes.
    pub frame_max: u32,
    /// Seconds between heartbeats; 0 for none. Clients may ask for less, more or none.
    pub heartbeat: u16,
    /// The largest message body, in bytes.
    pub message_max: u64,
    /// Bytes that wait for one session before it gets no more deliveries.
    pub output_high: usize,
    /// Bytes that still wait when deliveries go on.
    pub output_low: usize,
    /// Bytes of messages before publishers are blocked.
    pub memory_high: usize,
    /// Bytes of messages when publishers may go on.
    pub memory_low: usize,
    /// Sessions at the same time.
    pub max_sessions: usize,
    /// Consumers of one channel.
    pub max_consumers: usize,
    /// Queues.
    pub max_queues: usize,
    /// Exchanges.
    pub max_exchanges: usize,
    /// Bindings of all exchanges together.
    pub max_bindings: usize,
}

impl Default for Config {
    /// RabbitMQ's limits and its user `guest`, and a quarter of a GiB for messages.
    fn default() -> Self {
        Self {
            users: vec![("guest".into(), "guest".into())],
            virtual_host: "/".into(),
            channel_max: 2047,
            frame_max: 131_072,
            heartbeat: 60,
            message_max: 128 << 20,
            output_high: 1 << 20,
            output_low: 256 << 10,
            memory_high: 256 << 20,
            memory_low: 192 << 20,
            max_sessions: 10_000,
            max_consumers: 10_000,
            max_queues: 65_536,
            max_exchanges: 4096,
            max_bindings: 131_072,
        }
    }
}

impl Config {
    /// Compares the whole password, wherever it differs.
    fn is_valid(&self, user: &str, password: &str) -> bool {
        self.users.iter().any(|(name, secret)| {
            let same = secret.len() == password.len()
                && secret
                    .bytes()
                    .zip(password.bytes())
                    .fold(0, |d, (a, b)| d | (a ^ b))
                    == 0;
            name == user && same
        })
    }
}

/// A session, for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId {
    slot: u32,
    serial: u32,
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session {}", self.serial)
    }
}

/// One queue, as an onlooker sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueStatus {
    /// Its name.
    pub name: String,
    /// Messages that wait for a consumer.
    pub ready: usize,
    /// Messages that have been delivered and not settled.
    pub unsettled: usize,
    /// Consumers.
    pub consumers: usize,
}

/// A broker: see the [module](self).
///
/// Whoever drives it calls [`Broker::input`] with what a socket brings, then asks [`Broker::next_changed`] which sessions have
/// something to send, may be read again or are over, and calls [`Broker::tick`] and [`Broker::session_tick`] at their deadlines.
/// A [`SessionId`] that is no longer known is ignored everywhere.
#[derive(Debug)]
pub struct Broker {
    config: Config,
    vhost: Vhost,
    sessions: Slab<Session>,
    changed: Vec<SessionId>,
    /// Publishers are blocked for want of memory.
    alarm: bool,
    /// Publishers are blocked because somebody said so.
    forced: Option<String>,
    next_serial: u32,
    /// The time of day at some instant, to have it at any other.
    origin: (Instant, Duration),
}

impl Broker {
    /// A broker that keeps its messages in memory. `wall` is the time since 1970 at the instant `now`.
    pub fn new(config: Config, now: Instant, wall: Duration) -> Self {
        Self::with_store(config, Box::new(Memory::default()), now, wall)
    }

    /// A broker with a store for what is to survive it.
    pub fn with_store(config: Config, store: Box<dyn Store>, now: Instant, wall: Duration) -> Self {
        let limits = Limits {
            queues: config.max_queues,
            exchanges: config.max_exchanges,
            bindings: config.max_bindings,
        };
        Self {
            vhost: Vhost::new(&config.virtual_host, limits, store),
            config,
            sessions: Slab::new(),
            changed: Vec::new(),
            alarm: false,
            forced: None,
            next_serial: 0,
            origin: (now, wall),
        }
    }

    /// A connection has been accepted. `None` if there are too many: hang up.
    pub fn open(&mut self, now: Instant) -> Option<SessionId> {
        if self.sessions.len() >= self.config.max_sessions {
            return None;
        }
        self.next_serial = self.next_serial.wrapping_add(1);
        let place = self.sessions.vacant_entry();
        let id = SessionId {
            slot: place.key() as u32,
            serial: self.next_serial,
        };
        place.insert(Session::new(id, now));
        Some(id)
    }

    /// The connection has gone, in whatever way: what it held goes back, what was its own goes.
    pub fn close(&mut self, id: SessionId, now: Instant) {
        if let Some(session) = session_mut(&mut self.sessions, id) {
            session.end(&mut self.vhost, now);
            self.sessions.remove(id.slot as usize);
            self.work(now);
        }
    }

    /// Handles the whole frames at the front of `bytes` and returns how many bytes those were.
    ///
    /// The rest is to be kept and given again: with what comes next, or, if [`Broker::wants_input`] says no now, when it says yes.
    pub fn input(&mut self, id: SessionId, bytes: &[u8], now: Instant) -> usize {
        let mut at = 0;
        loop {
            let Some(session) = session_mut(&mut self.sessions, id) else {
                return bytes.len();
            };
            at += session.input(&bytes[at..], &mut self.vhost, &self.config, now);
            if !self.vhost.urgent {
                break;
            }
            self.vhost.urgent = false;
            self.work(now);
        }
        if let Some(session) = session_mut(&mut self.sessions, id) {
            session.flush_confirms(&mut self.vhost);
            note(&mut self.changed, session);
        }
        self.work(now);
        at
    }

    /// Whether [`Broker::input`] would handle anything of this session now.
    pub fn wants_input(&self, id: SessionId) -> bool {
        session(&self.sessions, id).is_some_and(|s| s.may_read(&self.vhost, &self.config))
    }

    /// Swaps what is to be sent to the session with `buffer`, which must be empty.
    pub fn take_output(&mut self, id: SessionId, buffer: &mut Vec<u8>, now: Instant) {
        debug_assert!(
            buffer.is_empty(),
            "what was taken before has to be sent first"
        );
        if let Some(session) = session_mut(&mut self.sessions, id) {
            session.take_output(buffer, now);
        }
    }

    /// Of what was taken, `n` bytes more have been sent.
    pub fn written(&mut self, id: SessionId, n: usize, now: Instant) {
        let Some(session) = session_mut(&mut self.sessions, id) else {
            return;
        };
        let (low, before) = (self.config.output_low, session.output_len());
        session.written(n, now);
        if before > low && session.output_len() <= low {
            session.feed_all(&mut self.vhost);
            note(&mut self.changed, session);
            self.work(now);
        }
    }

    /// Whether the session is over: once its output has been sent, the socket can be closed.
    pub fn is_over(&self, id: SessionId) -> bool {
        session(&self.sessions, id).is_none_or(Session::is_closed)
    }

    /// A session that has something to send, that may be read again or that is over; each once, until `None`.
    pub fn next_changed(&mut self) -> Option<SessionId> {
        loop {
            let id = self.changed.pop()?;
            if let Some(session) = session_mut(&mut self.sessions, id) {
                session.changed = false;
                return Some(id);
            }
        }
    }

    /// When [`Broker::session_tick`] has something to do for this session.
    pub fn session_deadline(&self, id: SessionId) -> Option<Instant> {
        session(&self.sessions, id)?.deadline()
    }

    /// Heartbeats of one session, both ways, and its time limits.
    pub fn session_tick(&mut self, id: SessionId, now: Instant) {
        if let Some(session) = session_mut(&mut self.sessions, id) {
            session.tick(&mut self.vhost, &self.config, now);
            note(&mut self.changed, session);
            self.work(now);
        }
    }

    /// When [`Broker::tick`] has something to do: a message or a queue expires.
    pub fn deadline(&self) -> Option<Instant> {
        self.vhost.deadline()
    }

    /// Lets messages and queues expire, and releases confirms that have waited for the store.
    pub fn tick(&mut self, now: Instant) {
        self.vhost.tick(now);
        for (_, session) in &mut self.sessions {
            if session.awaits_store {
                session.flush_confirms(&mut self.vhost);
                note(&mut self.changed, session);
            }
        }
        self.work(now);
    }

    /// Asks every client to go. Each session is over when its client has agreed, or after ten seconds.
    pub fn shutdown(&mut self, now: Instant) {
        for (_, session) in &mut self.sessions {
            session.dismiss("shutdown", &mut self.vhost, now);
            note(&mut self.changed, session);
        }
        self.work(now);
    }

    /// Blocks publishers for `reason` as if memory were short, or lets them go on. For tests of clients.
    pub fn block(&mut self, reason: Option<&str>) {
        self.forced = reason.map(str::to_owned);
        self.tell_publishers();
    }

    /// How many connections there are.
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// How many channels all connections have open.
    pub fn channel_count(&self) -> usize {
        let counts = self.sessions.iter().map(|(_, s)| s.channel_count());
        counts.sum()
    }

    /// How many bindings there are.
    pub fn binding_count(&self) -> usize {
        self.vhost.binding_count()
    }

    /// Bytes held by messages, whether they wait in queues or are unsettled.
    pub fn memory(&self) -> usize {
        self.vhost.memory.get()
    }

    /// Every queue.
    pub fn queues(&self) -> Vec<QueueStatus> {
        let status = |queue: &queue::Queue| QueueStatus {
            name: queue.name.to_string(),
            ready: queue.len(),
            unsettled: queue.unsettled,
            consumers: queue.consumers().len(),
        };
        self.vhost.queues().map(status).collect()
    }

    // ---- the pass over what has changed ----

    /// Delivers, drops and buries until there is nothing left to do, then looks at memory.
    fn work(&mut self, now: Instant) {
        let wall = self.origin.1 + now.saturating_duration_since(self.origin.0);
        loop {
            while let Some(consumer) = self.vhost.cancelled.pop() {
                if let Some(session) = session_mut(&mut self.sessions, consumer.session) {
                    session.cancel(&consumer);
                    note(&mut self.changed, session);
                }
            }
            if let Some(queue) = self.vhost.dirty.pop_front() {
                self.deliver(queue, now);
            } else if !self.vhost.publish_dead(now, wall.as_secs())
                && self.vhost.cancelled.is_empty()
            {
                break;
            }
        }
        self.vhost.urgent = false;
        let alarm = self.alarm;
        let (memory, config) = (self.vhost.memory.get(), &self.config);
        self.alarm = memory
            > if alarm {
                config.memory_low
            } else {
                config.memory_high
            };
        if alarm || self.alarm {
            self.tell_publishers();
        }
    }

    /// Sends what one queue holds to the consumers that have room.
    fn deliver(&mut self, id: exchange::QueueId, now: Instant) {
        if let Some(queue) = self.vhost.queue_mut(id) {
            queue.dirty = false;
        }
        loop {
            // A message that may live no longer than nothing is still delivered if somebody can take it at once.
            self.vhost.expire(id, |at| at < now);
            let Some(queue) = self.vhost.queue_mut(id) else {
                return;
            };
            if queue.starved || queue.is_empty() || queue.consumers().is_empty() {
                break;
            }
            let (sessions, config) = (&self.sessions, &self.config);
            let may = |c: &queue::Consumer| {
                session(sessions, c.session).is_some_and(|s| s.has_room(c, config))
            };
            let Some(consumer) = queue.next_consumer(may) else {
                queue.starved = true;
                break;
            };
            let entry = queue.pop().expect("it is not empty");
            queue.unsettled += 1;
            let session = session_mut(&mut self.sessions, consumer.session)
                .expect("a consumer that has room has a session");
            let settled = session.deliver(&consumer, entry);
            note(&mut self.changed, session);
            if let Some(entry) = settled {
                self.vhost.acked(id, entry);
            }
        }
        self.vhost.expire(id, |at| at <= now);
        self.vhost.shorten(id);
        self.vhost.rearm(id);
    }

    fn tell_publishers(&mut self) {
        let reason = self.forced.as_deref().or(if self.alarm {
            Some("low on memory")
        } else {
            None
        });
        for (_, session) in &mut self.sessions {
            if session.set_blocked(reason) {
                list(&mut self.changed, session);
            }
        }
    }
}

/// Puts a session that has something to send or is over on the list of those to be looked at.
fn note(changed: &mut Vec<SessionId>, session: &mut Session) {
    if session.has_output() || session.is_closed() {
        list(changed, session);
    }
}

/// Puts a session on the list of those to be looked at.
fn list(changed: &mut Vec<SessionId>, session: &mut Session) {
    if !session.changed {
        session.changed = true;
        changed.push(session.id());
    }
}

fn session(sessions: &Slab<Session>, id: SessionId) -> Option<&Session> {
    sessions.get(id.slot as usize).filter(|s| s.id() == id)
}

fn session_mut(sessions: &mut Slab<Session>, id: SessionId) -> Option<&mut Session> {
    sessions.get_mut(id.slot as usize).filter(|s| s.id() == id)
}

#[cfg(test)]
mod tests;
