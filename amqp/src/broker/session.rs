//! One connection as the broker sees it: handshake, channels opening and closing, heartbeats, and what waits to be sent.
//!
//! A session reads frames until there is no more, or until it must not: because its peer does not take what is already waiting
//! for it, or because the broker is short of memory and this peer publishes. What is left unread stays with the caller, so that
//! TCP pushes back, and a peer cannot make the broker buffer an answer for each of its requests.
//!
//! A soft error closes the channel at once, for us: its deliveries go back and its consumers leave before the client knows. Then
//! whatever still comes in on it is dropped until `close-ok`. A hard error does the same to every channel.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::channel::{Answer, Channel, Scope};
use super::fault::Fault;
use super::queue::{Consumer, Entry};
use super::vhost::Vhost;
use super::{Config, SessionId};
use crate::error::ReplyCode;
use crate::proto::content::{self, Assembly};
use crate::proto::handshake::{Limits, Refusal, Server, ServerStep, Tuned};
use crate::proto::heartbeat::{Beat, Heartbeat};
use crate::wire::cold::{self, Method, basic, channel, connection, short_text};
use crate::wire::frame::{FRAME_MIN, PROTOCOL_HEADER, put_heartbeat};
use crate::wire::{AnyMethod, ContentHeader, Frame, Publish, Splitter, Table, TableBuf, hot};

/// What the connection waits for.
#[derive(Debug)]
enum State {
    AwaitHeader,
    Handshake(Server),
    Open,
    /// We have sent `connection.close`.
    AwaitCloseOk,
    /// Nothing more is read; the socket goes when the output has gone.
    Closed,
}

/// What the client has said that it understands.
#[derive(Clone, Copy, Debug, Default)]
struct Capabilities {
    consumer_cancel_notify: bool,
    blocked: bool,
    authentication_failure_close: bool,
}

impl Capabilities {
    fn read(properties: Table<'_>) -> Self {
        let has = |name| {
            let capabilities = properties.get("capabilities")?.as_table()?;
            capabilities.get(name)?.as_bool()
        };
        Self {
            consumer_cancel_notify: has("consumer_cancel_notify") == Some(true),
            blocked: has("connection.blocked") == Some(true),
            authentication_failure_close: has("authentication_failure_close") == Some(true),
        }
    }
}

/// Bytes on their way to the peer.
#[derive(Debug, Default)]
pub(super) struct Output {
    waiting: Vec<u8>,
    /// Taken by the caller and not yet reported as written.
    in_transit: usize,
    /// Since when nothing has been written although something waits.
    stalled_since: Option<Instant>,
}

impl Output {
    fn len(&self) -> usize {
        self.waiting.len() + self.in_transit
    }
}

/// A channel, and the content that comes in on it.
#[derive(Debug)]
struct Open {
    channel: Channel,
    assembly: Assembly,
    /// Bytes of body that `assembly` holds; they count towards the broker's memory.
    held: usize,
    /// It is on the list of channels that owe their publisher an answer.
    confirming: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Session {
    id: SessionId,
    state: State,
    splitter: Splitter,
    tuned: Tuned,
    user: Rc<str>,
    can: Capabilities,
    channels: BTreeMap<u16, Box<Open>>,
    pub(super) out: Output,
    heartbeat: Heartbeat,
    /// When a handshake or a close has to be over.
    patience: Option<Instant>,
    /// It has published something, so a shortage of memory concerns it.
    publishes: bool,
    /// It has been told `connection.blocked`.
    blocked: bool,
    /// Channels that owe their publisher an answer.
    confirming: Vec<u16>,
    /// Some of them wait for the store.
    pub(super) awaits_store: bool,
    /// It is on the broker's list of sessions to look at.
    pub(super) changed: bool,
}

/// RabbitMQ's `handshake_timeout`; we give a close the same.
const PATIENCE: Duration = Duration::from_secs(10);
/// A peer that takes nothing for so long while something waits for it is gone (RabbitMQ's `send_timeout` is 15 s).
const STALL_MAX: Duration = Duration::from_secs(30);

impl Session {
    pub(super) fn new(id: SessionId, now: Instant) -> Self {
        Self {
            id,
            state: State::AwaitHeader,
            splitter: Splitter::new(),
            tuned: Tuned {
                channel_max: 0,
                frame_max: FRAME_MIN as u32,
                heartbeat: 0,
            },
            user: "".into(),
            can: Capabilities::default(),
            channels: BTreeMap::new(),
            out: Output::default(),
            heartbeat: Heartbeat::new(0, now),
            patience: now.checked_add(PATIENCE),
            publishes: false,
            blocked: false,
            confirming: Vec::new(),
            awaits_store: false,
            changed: false,
        }
    }

    // ---- reading ----

    /// Handles as many whole frames at the front of `bytes` as it may, and says how many bytes those were.
    pub(super) fn input(
        &mut self,
        bytes: &[u8],
        vhost: &mut Vhost,
        config: &Config,
        now: Instant,
    ) -> usize {
        if !bytes.is_empty() {
            self.heartbeat.read(now);
        }
        let mut at = 0;
        if let State::AwaitHeader = self.state {
            let Some((header, _)) = bytes.split_first_chunk::<8>() else {
                return 0;
            };
            self.greet(*header, config);
            at = header.len();
        }
        while self.may_read(vhost, config) {
            let rest = &bytes[at..];
            match self.splitter.next_frame(rest) {
                Ok(None) => return at,
                Ok(Some((frame, len))) => {
                    at += len + self.frame(frame, &rest[len..], vhost, config, now);
                }
                Err(error) => {
                    self.fail(0, (0, 0), error.into(), vhost, now);
                    return bytes.len();
                }
            }
            if vhost.urgent {
                return at;
            }
        }
        if let State::Closed = self.state {
            return bytes.len();
        }
        at
    }

    fn greet(&mut self, header: [u8; 8], config: &Config) {
        if header != PROTOCOL_HEADER {
            self.out.waiting.extend_from_slice(&PROTOCOL_HEADER);
            self.state = State::Closed;
            return;
        }
        let limits = Limits {
            channel_max: config.channel_max,
            frame_max: config.frame_max,
            heartbeat: Some(config.heartbeat),
        };
        let properties = server_properties();
        self.state = State::Handshake(Server::start(
            limits,
            properties.as_table(),
            &mut self.out.waiting,
        ));
    }

    /// Handles one frame; `rest` are the bytes behind it. Returns how many of those belonged to it as well.
    fn frame(
        &mut self,
        frame: Frame<'_>,
        rest: &[u8],
        vhost: &mut Vhost,
        config: &Config,
        now: Instant,
    ) -> usize {
        let (number, blame) = match frame {
            Frame::Heartbeat => return 0,
            Frame::Method {
                channel,
                class,
                method,
                ..
            } => (channel, (class, method)),
            Frame::Header { channel, .. } | Frame::Body { channel, .. } => (channel, (0, 0)),
        };
        let result = match &self.state {
            State::Open if number != 0 => {
                self.channel_frame(number, frame, rest, vhost, config, now)
            }
            State::Open => self.connection_frame(frame, vhost, now).map(|()| 0),
            State::Handshake(_) => self.handshake_frame(frame, config, now).map(|()| 0),
            State::AwaitCloseOk => {
                self.closing_frame(frame);
                Ok(0)
            }
            State::AwaitHeader | State::Closed => Ok(0),
        };
        result.unwrap_or_else(|fault| {
            self.fail(number, blame, fault, vhost, now);
            0
        })
    }

    fn handshake_frame(
        &mut self,
        frame: Frame<'_>,
        config: &Config,
        now: Instant,
    ) -> Result<(), Fault> {
        let Frame::Method {
            channel: 0,
            class,
            method,
            args,
        } = frame
        else {
            return Err(Fault::unexpected_frame("expected a method on channel 0"));
        };
        let method = cold::decode(class, method, args)?;
        match &method {
            Method::Connection(connection::AMQPMethod::StartOk(start_ok)) => {
                let properties = cold::table_buf(&start_ok.client_properties);
                self.can = Capabilities::read(properties.as_table());
            }
            Method::Connection(connection::AMQPMethod::Close(_)) => {
                self.state = State::Closed;
                self.put(connection::AMQPMethod::CloseOk(connection::CloseOk {}));
                return Ok(());
            }
            _ => {}
        }
        let State::Handshake(server) = std::mem::replace(&mut self.state, State::Closed) else {
            unreachable!("called in this state only");
        };
        match server.step(method, &mut self.out.waiting, |user, password| {
            config.is_valid(user, password)
        }) {
            Ok(ServerStep::Continue(server)) => self.state = State::Handshake(server),
            Ok(ServerStep::Tuned(server, tuned)) => {
                self.tuned = tuned;
                self.splitter = Splitter::with_frame_max(tuned.frame_max as usize);
                self.heartbeat = Heartbeat::new(tuned.heartbeat, now);
                self.state = State::Handshake(server);
            }
            Ok(ServerStep::Open {
                user, virtual_host, ..
            }) => {
                if virtual_host != config.virtual_host {
                    let detail = format_args!("vhost {virtual_host} not found");
                    return Err(Fault::not_allowed(detail));
                }
                self.user = user.into();
                self.patience = None;
                self.state = State::Open;
                self.put(connection::AMQPMethod::OpenOk(connection::OpenOk {}));
            }
            Err(Refusal::Login { error, .. }) => {
                log::warn!("{}: {}", self.id, error.text);
                // A client that has not said that it understands sees the connection close.
                if self.can.authentication_failure_close {
                    return Err(error.into());
                }
                self.state = State::Closed;
            }
            Err(Refusal::Violation(error)) => return Err(error.into()),
        }
        Ok(())
    }

    fn connection_frame(
        &mut self,
        frame: Frame<'_>,
        vhost: &mut Vhost,
        now: Instant,
    ) -> Result<(), Fault> {
        use connection::AMQPMethod as M;
        let Frame::Method {
            class,
            method,
            args,
            ..
        } = frame
        else {
            return Err(Fault::unexpected_frame(
                "expected method frame, got non method frame instead",
            ));
        };
        let wrong = || Fault::channel_error("unexpected method in connection state running");
        if class != CONNECTION {
            return Err(wrong());
        }
        match cold::decode(class, method, args)? {
            Method::Connection(M::Close(_)) => {
                self.end(vhost, now);
                self.state = State::Closed;
                self.put(M::CloseOk(connection::CloseOk {}));
                Ok(())
            }
            Method::Connection(M::UpdateSecret(_)) => {
                self.put(M::UpdateSecretOk(connection::UpdateSecretOk {}));
                Ok(())
            }
            _ => Err(wrong()),
        }
    }

    fn closing_frame(&mut self, frame: Frame<'_>) {
        let Frame::Method {
            channel: 0,
            class,
            method,
            args,
        } = frame
        else {
            return;
        };
        match cold::decode(class, method, args) {
            Ok(Method::Connection(connection::AMQPMethod::CloseOk(_))) => {
                self.state = State::Closed
            }
            Ok(Method::Connection(connection::AMQPMethod::Close(_))) => {
                self.put(connection::AMQPMethod::CloseOk(connection::CloseOk {}));
            }
            Ok(_) | Err(_) => {}
        }
    }

    fn channel_frame(
        &mut self,
        number: u16,
        frame: Frame<'_>,
        rest: &[u8],
        vhost: &mut Vhost,
        config: &Config,
        now: Instant,
    ) -> Result<usize, Fault> {
        let Some(open) = self.channels.get_mut(&number) else {
            return self.open_channel(number, frame, config).map(|()| 0);
        };
        let Open {
            channel,
            assembly,
            held,
            confirming,
        } = &mut **open;
        if channel.closing {
            self.closing_channel_frame(number, frame);
            return Ok(0);
        }
        let max_payload = self.tuned.frame_max as usize - crate::wire::frame::FRAME_OVERHEAD;
        let mut scope = Scope {
            session: self.id,
            user: &self.user,
            number,
            vhost,
            config,
            out: &mut self.out.waiting,
            max_payload,
            now,
        };
        let mut more = 0;
        let published = match frame {
            Frame::Method {
                class: hot::BASIC,
                method: hot::PUBLISH,
                args,
                ..
            } => {
                assembly.method()?;
                self.publishes = true;
                let splitter = self.splitter;
                if let Some((props, body, len)) =
                    content::whole(&splitter, number, config.message_max, rest)
                {
                    channel.whole(&Publish::decode(args)?, props, body, &mut scope)?;
                    more = len;
                    true
                } else {
                    Publish::decode(args)?;
                    assembly.begin(hot::PUBLISH, args)?;
                    false
                }
            }
            Frame::Method {
                class,
                method,
                args,
                ..
            } => {
                assembly.method()?;
                match AnyMethod::decode(class, method, args)? {
                    AnyMethod::Ack(ack) => channel.ack(ack, &mut scope)?,
                    AnyMethod::Nack(nack) => channel.nack(nack, &mut scope)?,
                    AnyMethod::Reject(reject) => channel.reject(reject, &mut scope)?,
                    AnyMethod::Cold(Method::Channel(method)) => {
                        return self.channel_method(number, method, vhost, now);
                    }
                    AnyMethod::Cold(method) => channel.method(method, args, &mut scope)?,
                    AnyMethod::Publish(_)
                    | AnyMethod::Deliver(_)
                    | AnyMethod::GetOk(_)
                    | AnyMethod::Return(_) => {
                        return Err(Fault::command_invalid("a client does not send this method"));
                    }
                }
                false
            }
            Frame::Header { raw, .. } => {
                if let Ok(header) = ContentHeader::parse(raw)
                    && header.class == hot::BASIC
                    && header.body_size > config.message_max
                    && !assembly.is_idle()
                {
                    let fault = Fault::precondition(format_args!(
                        "message size {} is larger than configured max size {}",
                        header.body_size, config.message_max
                    ));
                    return Err(blame_publish(fault));
                }
                match assembly.header(raw)? {
                    None => false,
                    Some(content) => {
                        channel
                            .content(content, &mut scope)
                            .map_err(blame_publish)?;
                        true
                    }
                }
            }
            Frame::Body { data, .. } => {
                let memory = &scope.vhost.memory;
                match assembly.body(data)? {
                    None => {
                        *held += data.len();
                        memory.update(|bytes| bytes + data.len());
                        false
                    }
                    Some(content) => {
                        memory.update(|bytes| bytes - std::mem::take(held));
                        channel
                            .content(content, &mut scope)
                            .map_err(blame_publish)?;
                        true
                    }
                }
            }
            Frame::Heartbeat => false,
        };
        // A commit waits for the store like a confirm.
        if (published || channel.awaits_store()) && !*confirming && channel.owes_confirms() {
            *confirming = true;
            self.confirming.push(number);
        }
        Ok(more)
    }

    fn open_channel(
        &mut self,
        number: u16,
        frame: Frame<'_>,
        config: &Config,
    ) -> Result<(), Fault> {
        let Frame::Method {
            class: CHANNEL,
            method: 10,
            args,
            ..
        } = frame
        else {
            return Err(Fault::channel_error("expected 'channel.open'").hard());
        };
        cold::decode(CHANNEL, 10, args)?;
        let (open, most) = (self.channels.len(), self.tuned.channel_max);
        if open >= most.into() {
            let detail = format_args!(
                "number of channels opened ({open}) has reached the negotiated channel_max ({most})"
            );
            return Err(Fault::not_allowed(detail).blame(0, 0));
        }
        let open = Open {
            channel: Channel::new(),
            assembly: Assembly::new(config.message_max),
            held: 0,
            confirming: false,
        };
        self.channels.insert(number, Box::new(open));
        self.put_on(number, channel::AMQPMethod::OpenOk(channel::OpenOk {}));
        Ok(())
    }

    fn channel_method(
        &mut self,
        number: u16,
        method: channel::AMQPMethod,
        vhost: &mut Vhost,
        now: Instant,
    ) -> Result<usize, Fault> {
        use channel::AMQPMethod as M;
        match method {
            M::Open(_) => Err(Fault::channel_error("second 'channel.open' seen")),
            M::Flow(flow) if flow.active => {
                self.put_on(number, M::FlowOk(channel::FlowOk { active: true }));
                Ok(0)
            }
            M::Flow(_) => Err(Fault::not_implemented("active=false")),
            M::Close(_) => {
                self.end_channel(number, vhost, now);
                self.channels.remove(&number);
                self.put_on(number, M::CloseOk(channel::CloseOk {}));
                Ok(0)
            }
            M::OpenOk(_) | M::FlowOk(_) | M::CloseOk(_) => {
                Err(Fault::command_invalid("a client does not send this method"))
            }
        }
    }

    /// Both sides may have closed at the same time; then both have to be answered.
    fn closing_channel_frame(&mut self, number: u16, frame: Frame<'_>) {
        let Frame::Method {
            class: CHANNEL,
            method,
            args,
            ..
        } = frame
        else {
            return;
        };
        match cold::decode(CHANNEL, method, args) {
            Ok(Method::Channel(channel::AMQPMethod::CloseOk(_))) => {
                self.channels.remove(&number);
            }
            Ok(Method::Channel(channel::AMQPMethod::Close(_))) => {
                self.put_on(number, channel::AMQPMethod::CloseOk(channel::CloseOk {}));
            }
            Ok(_) | Err(_) => {}
        }
    }

    // ---- ending ----

    /// Refuses what came on channel `number`: closes it, or the connection.
    fn fail(
        &mut self,
        number: u16,
        blame: (u16, u16),
        fault: Fault,
        vhost: &mut Vhost,
        now: Instant,
    ) {
        let (class_id, method_id) = fault.blame.unwrap_or(blame);
        let reply_code = fault.code.0;
        let reply_text = short_text(&fault.text);
        if fault.hard || number == 0 {
            log::warn!("{}: closing: {fault}", self.id);
            self.close(reply_code, reply_text, class_id, method_id, vhost, now);
            return;
        }
        log::info!("{}: closing channel {number}: {fault}", self.id);
        self.flush_confirms(vhost);
        self.end_channel(number, vhost, now);
        self.put_on(
            number,
            channel::AMQPMethod::Close(channel::Close {
                reply_code,
                reply_text,
                class_id,
                method_id,
            }),
        );
    }

    fn close(
        &mut self,
        reply_code: u16,
        reply_text: cold::ShortString,
        class_id: u16,
        method_id: u16,
        vhost: &mut Vhost,
        now: Instant,
    ) {
        self.end(vhost, now);
        self.patience = now.checked_add(PATIENCE);
        self.state = State::AwaitCloseOk;
        self.put(connection::AMQPMethod::Close(connection::Close {
            reply_code,
            reply_text,
            class_id,
            method_id,
        }));
    }

    /// Asks the client to go: the broker shuts down.
    pub(super) fn dismiss(&mut self, reason: &str, vhost: &mut Vhost, now: Instant) {
        match self.state {
            State::Open => {
                let detail =
                    format_args!("broker forced connection closure with reason '{reason}'");
                let text = ReplyCode::CONNECTION_FORCED.text(detail);
                self.close(
                    ReplyCode::CONNECTION_FORCED.0,
                    short_text(&text),
                    0,
                    0,
                    vhost,
                    now,
                );
            }
            State::AwaitHeader | State::Handshake(_) => self.state = State::Closed,
            State::AwaitCloseOk | State::Closed => {}
        }
    }

    /// Gives back everything that the connection holds.
    pub(super) fn end(&mut self, vhost: &mut Vhost, now: Instant) {
        let numbers: Vec<u16> = self.channels.keys().copied().collect();
        for number in numbers {
            self.end_channel(number, vhost, now);
        }
        self.channels.clear();
        vhost.remove_owned(self.id);
    }

    fn end_channel(&mut self, number: u16, vhost: &mut Vhost, now: Instant) {
        if let Some(open) = self.channels.get_mut(&number) {
            open.channel.end(vhost, now);
            vhost
                .memory
                .update(|bytes| bytes - std::mem::take(&mut open.held));
            open.assembly = Assembly::new(0);
        }
    }

    /// Nothing more can be said to the peer, or need be.
    pub(super) fn abort(&mut self, vhost: &mut Vhost, now: Instant) {
        self.end(vhost, now);
        self.out.waiting = Vec::new();
        self.state = State::Closed;
    }

    // ---- what the broker does to it ----

    /// Whether `consumer`, one of this session's, could be sent a message now.
    pub(super) fn has_room(&self, consumer: &Consumer, config: &Config) -> bool {
        self.out.len() < config.output_high
            && self
                .channels
                .get(&consumer.channel)
                .is_some_and(|open| open.channel.has_room(consumer))
    }

    /// Sends a message to a consumer. Returns the entry if nobody will settle it.
    pub(super) fn deliver(&mut self, consumer: &Rc<Consumer>, entry: Entry) -> Option<Entry> {
        let max_payload = self.tuned.frame_max as usize - crate::wire::frame::FRAME_OVERHEAD;
        let open = self
            .channels
            .get_mut(&consumer.channel)
            .expect("a consumer that has room has a channel");
        open.channel
            .deliver(consumer, entry, max_payload, &mut self.out.waiting)
    }

    /// Tells the client that the queue of one of its consumers has gone.
    pub(super) fn cancel(&mut self, consumer: &Consumer) {
        let Some(open) = self.channels.get_mut(&consumer.channel) else {
            return;
        };
        let ours = open
            .channel
            .consumers
            .get(&consumer.tag)
            .is_some_and(|c| c.queue == consumer.queue);
        if !ours {
            return;
        }
        open.channel.consumers.remove(&consumer.tag);
        if self.can.consumer_cancel_notify {
            let consumer_tag = short_text(&consumer.tag);
            let cancel = basic::Cancel {
                consumer_tag,
                nowait: true,
            };
            self.put_on(consumer.channel, basic::AMQPMethod::Cancel(cancel));
        }
    }

    /// Answers what has been published since the last call.
    pub(super) fn flush_confirms(&mut self, vhost: &mut Vhost) {
        let Self {
            confirming,
            channels,
            out,
            ..
        } = self;
        confirming.retain(|number| {
            let Some(open) = channels.get_mut(number) else {
                return false;
            };
            open.confirming = open
                .channel
                .flush_confirms(*number, vhost, &mut out.waiting);
            open.confirming
        });
        self.awaits_store = !self.confirming.is_empty();
    }

    /// Tells a publisher that the broker is short of memory, or no longer is. `false` if that is no news.
    pub(super) fn set_blocked(&mut self, reason: Option<&str>) -> bool {
        match reason {
            Some(reason) if self.publishes && self.is_open() && !self.blocked => {
                self.blocked = true;
                if self.can.blocked {
                    let reason = short_text(reason);
                    self.put(connection::AMQPMethod::Blocked(connection::Blocked {
                        reason,
                    }));
                }
                true
            }
            None if self.blocked => {
                self.blocked = false;
                if self.can.blocked {
                    self.put(connection::AMQPMethod::Unblocked(connection::Unblocked {}));
                }
                true
            }
            Some(_) | None => false,
        }
    }

    /// Room has been made in the output: the queues of all consumers may go on.
    pub(super) fn feed_all(&self, vhost: &mut Vhost) {
        for open in self.channels.values() {
            open.channel.feed_all(vhost);
        }
    }

    // ---- output and time ----

    /// Swaps what waits to be sent with `buffer`, which has to be empty.
    pub(super) fn take_output(&mut self, buffer: &mut Vec<u8>, now: Instant) {
        std::mem::swap(&mut self.out.waiting, buffer);
        self.out.in_transit += buffer.len();
        if self.out.in_transit > 0 {
            self.out.stalled_since.get_or_insert(now);
        }
    }

    pub(super) fn written(&mut self, n: usize, now: Instant) {
        self.out.in_transit = self.out.in_transit.saturating_sub(n);
        self.out.stalled_since = (self.out.in_transit > 0).then_some(now);
        self.heartbeat.wrote(now);
    }

    /// Whether frames may be handled now.
    pub(super) fn may_read(&self, vhost: &Vhost, config: &Config) -> bool {
        let held_back = self.publishes && (self.blocked || vhost.memory.get() > config.memory_high);
        self.out.len() < config.output_high && !held_back && !matches!(self.state, State::Closed)
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let stall = self
            .out
            .stalled_since
            .and_then(|since| since.checked_add(STALL_MAX));
        [self.heartbeat.deadline(), self.patience, stall]
            .into_iter()
            .flatten()
            .min()
    }

    pub(super) fn tick(&mut self, vhost: &mut Vhost, config: &Config, now: Instant) {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(self.patience)
            || due(self
                .out
                .stalled_since
                .and_then(|s| s.checked_add(STALL_MAX)))
        {
            log::warn!("{}: no answer, giving up", self.id);
            self.abort(vhost, now);
            return;
        }
        if !self.may_read(vhost, config) {
            // Its heartbeats may be in what we do not read.
            self.heartbeat.read(now);
        }
        match self.heartbeat.poll(now) {
            Beat::Quiet => {}
            Beat::Due => put_heartbeat(&mut self.out.waiting),
            Beat::Dead => {
                let seconds = self.tuned.heartbeat;
                log::warn!(
                    "{}: missed heartbeats, one every {seconds} s was agreed",
                    self.id
                );
                self.abort(vhost, now);
            }
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, State::Open)
    }

    pub(super) fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }

    pub(super) fn id(&self) -> SessionId {
        self.id
    }

    pub(super) fn has_output(&self) -> bool {
        !self.out.waiting.is_empty()
    }

    pub(super) fn channel_count(&self) -> usize {
        self.channels.len()
    }

    pub(super) fn output_len(&self) -> usize {
        self.out.len()
    }

    fn put(&mut self, method: connection::AMQPMethod) {
        self.put_on(0, method);
    }

    fn put_on(&mut self, channel: u16, method: impl Answer) {
        cold::put(&mut self.out.waiting, channel, &method.into_method());
    }
}

/// What is wrong with a content is its method's fault, though it is another frame that shows it.
fn blame_publish(fault: Fault) -> Fault {
    match fault.blame {
        None => fault.blame(hot::BASIC, hot::PUBLISH),
        Some(_) => fault,
    }
}

const CONNECTION: u16 = 10;
const CHANNEL: u16 = 20;

fn server_properties() -> TableBuf {
    let mut capabilities = TableBuf::new();
    let mut properties = TableBuf::new();
    let written = [
        "publisher_confirms",
        "exchange_exchange_bindings",
        "basic.nack",
        "consumer_cancel_notify",
        "connection.blocked",
        "consumer_priorities",
        "authentication_failure_close",
        "per_consumer_qos",
        "direct_reply_to",
    ]
    .iter()
    .try_for_each(|name| capabilities.insert(name, true).map(drop))
    .and_then(|()| {
        properties
            .insert("capabilities", capabilities.as_table())
            .map(drop)
    })
    .and_then(|()| properties.insert("product", "sweepea").map(drop))
    .and_then(|()| {
        properties
            .insert("version", env!("CARGO_PKG_VERSION"))
            .map(drop)
    })
    .and_then(|()| properties.insert("platform", "Rust").map(drop));
    written.expect("the keys are short strings");
    properties
}
