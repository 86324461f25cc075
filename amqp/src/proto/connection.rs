//! The client's side of a connection, without a socket.
//!
//! Bytes go in by [`Connection::feed`] and come out of [`Connection::take_output`]; what happened goes to the `sink` that the
//! caller passes. Time is an argument. The caller calls [`Connection::flush_acks`] before it takes the output, sends that, says so
//! ([`Connection::wrote`]), and calls [`Connection::tick`] at [`Connection::deadline`].
//!
//! What holds always:
//!
//! - Every request and every publishing in confirm mode that was accepted gets exactly one terminal event. When the
//!   connection ends, that event is sent before [`Event::Down`], in the same call.
//! - The frames of a message follow each other on its channel, so no two are ever interleaved there; large ones on different channels
//!   take turns (see [`outbox`](super::outbox)).
//! - Where `feed` stops, the output ends at a frame boundary: a heartbeat can be appended at any time.
//! - The events do not depend on how the incoming bytes were cut.
//!
//! A soft error takes down one channel, a hard one everything. A peer that breaks the protocol is told so by
//! `connection.close` and not waited for.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::channel::Channel;
use super::confirms::{Confirms, fingerprint};
use super::event::{ChannelKey, DeliveryKey, Down, Event, Lost, Refused, ReqId};
use super::handshake::{self, ClientConfig, HandshakeError, Tuned};
use super::heartbeat::{Beat, Heartbeat};
use super::outbox::Outbox;
use super::unsettled::Settle;
use crate::error::{ReplyCode, WireError};
use crate::wire::cold::{self, Method, connection};
use crate::wire::frame::{check_header_size, put_content, put_heartbeat};
use crate::wire::{Props, Publish, Splitter};

/// Where events go. It is called while the connection is borrowed, so it notes and does not act.
pub type Sink<'s> = dyn FnMut(Event<'_>) + 's;

/// The largest body that is taken in, unless the configuration says otherwise: RabbitMQ's own limit.
pub const DEFAULT_MAX_BODY: u64 = 128 << 20;

/// A client's connection.
pub struct Connection {
    pub(super) state: State,
    pub(super) out: Outbox,
    pub(super) splitter: Splitter,
    pub(super) beat: Heartbeat,
    /// Index is the channel's number; 0 is the connection itself and stays empty.
    pub(super) channels: Vec<Option<Box<Channel>>>,
    /// Numbers below `channels.len()` that are not in use; the lowest is taken first.
    pub(super) free: BinaryHeap<Reverse<u16>>,
    /// Channels with acks that wait for the flush.
    pub(super) with_acks: Vec<u16>,
    /// Requests for a new secret, in their order: by number, and whether somebody still waits.
    pub(super) secrets: VecDeque<(u64, bool)>,
    pub(super) next_generation: u64,
    pub(super) next_request: u64,
    pub(super) next_consumer: u64,
    pub(super) is_blocked: bool,
    pub(super) max_body: u64,
}

pub(super) enum State {
    Handshake(handshake::Client),
    Open(Tuned),
    /// `connection.close` has been sent.
    AwaitCloseOk,
    Down,
}

impl Connection {
    /// Starts the handshake: the protocol header is in the output at once.
    ///
    /// `epoch` is to differ from one connection to the next of the same user, so that nothing of an earlier one (a delivery, a
    /// request, a consumer) is taken for one of this.
    pub fn new(config: ClientConfig, epoch: u32, now: Instant) -> Self {
        let mut out = Outbox::default();
        let handshake = handshake::Client::start(config, out.lane(0));
        Self {
            state: State::Handshake(handshake),
            out,
            splitter: Splitter::new(),
            beat: Heartbeat::new(0, now),
            channels: vec![None],
            free: BinaryHeap::new(),
            with_acks: Vec::new(),
            secrets: VecDeque::new(),
            next_generation: u64::from(epoch) << 32,
            next_request: u64::from(epoch) << 32,
            next_consumer: u64::from(epoch) << 32,
            is_blocked: false,
            max_body: DEFAULT_MAX_BODY,
        }
    }

    /// Takes bytes that have come and answers how many it used. The caller keeps the rest, which is less than a frame, and
    /// feeds it again with what follows.
    pub fn feed(&mut self, bytes: &[u8], now: Instant, sink: &mut Sink<'_>) -> usize {
        if !bytes.is_empty() {
            self.beat.read(now);
        }
        let used = self.feed_frames(bytes, now, sink);
        self.beat.unfinished(bytes.len() - used, used > 0, now);
        used
    }

    #[inline]
    fn feed_frames(&mut self, bytes: &[u8], now: Instant, sink: &mut Sink<'_>) -> usize {
        let mut used = 0;
        loop {
            let rest = &bytes[used..];
            match &self.state {
                State::Down => return bytes.len(),
                State::Handshake(client) if client.awaits_first_frame() => {
                    if let [b'A', b'M', b'Q', b'P', version @ ..] = rest {
                        // No frame starts like this: it is the header of the protocol that the server speaks instead.
                        let Some(version) = version.get(..4) else {
                            return used;
                        };
                        let version = format!("AMQP {version:?}");
                        let error = HandshakeError::Version(version);
                        self.go_down(Down::Handshake(error), sink);
                        continue;
                    }
                }
                State::Handshake(_) | State::Open(_) | State::AwaitCloseOk => {}
            }
            let step = match self.splitter.next_frame(rest) {
                Ok(None) => return used,
                Ok(Some((frame, len))) => {
                    used += len;
                    self.frame(frame, &rest[len..], now, sink)
                }
                Err(error) => Err(error),
            };
            match step {
                Ok(more) => used += more,
                Err(error) => self.violation(error, sink),
            }
        }
    }

    /// The stream has ended, or failed with `error`.
    pub fn stream_ended(&mut self, error: Option<String>, sink: &mut Sink<'_>) {
        let down = match (&self.state, error) {
            // The peer need not wait for us to read its close-ok.
            (State::AwaitCloseOk, _) => Down::ClosedByUs,
            (_, Some(error)) => Down::Io(error),
            (_, None) => Down::Eof,
        };
        self.go_down(down, sink);
    }

    /// Gives up at once, without a word to the peer: a deadline of the caller's has passed, say.
    pub fn give_up(&mut self, down: Down, sink: &mut Sink<'_>) {
        self.go_down(down, sink);
    }

    /// Does what is due at `now`: sends a heartbeat, or finds the peer dead.
    pub fn tick(&mut self, now: Instant, sink: &mut Sink<'_>) {
        match self.beat.poll(now) {
            Beat::Quiet => {}
            Beat::Due => {
                // Bytes that wait are proof enough once they go, and a peer that does not read needs no more of them.
                if self.out.is_empty() && !self.is_down() {
                    put_heartbeat(self.out.lane(0));
                }
            }
            Beat::Dead => {
                let patience = self.beat.patience();
                self.go_down(Down::HeartbeatMissed(patience), sink);
            }
        }
    }

    /// Sends a heartbeat if one is due, and does nothing else: for a caller that is late, before it looks at anything that has come.
    pub fn beat(&mut self, now: Instant) {
        if self.beat.is_due(now) && self.out.is_empty() && !self.is_down() {
            self.beat.wrote(now);
            put_heartbeat(self.out.lane(0));
        }
    }

    /// Tells of deliveries that have been unsettled for `limit`, of each once, by channel and tag: see [`Unsettled::overdue`].
    ///
    /// [`Unsettled::overdue`]: super::unsettled::Unsettled::overdue
    pub fn overdue(
        &mut self,
        now: Instant,
        limit: Duration,
        mut tell: impl FnMut(ChannelKey, u64, Duration),
    ) {
        for channel in self.channels.iter_mut().flatten() {
            if let Some((tag, held)) = channel.unsettled.overdue(now, limit) {
                tell(channel.key, tag, held);
            }
        }
    }

    /// When [`Connection::tick`] is to be called next.
    pub fn deadline(&self) -> Option<Instant> {
        if self.is_down() {
            return None;
        }
        self.beat.deadline()
    }

    /// How many bytes there are to be sent.
    pub fn output_len(&self) -> usize {
        self.out.len()
    }

    /// Moves the bytes to be sent next into an empty buffer, to be sent from there while others append: what was said so far, and a part
    /// of each large body. There may be more when they are gone. [`Sending`](super::outbox::Sending) is such a buffer.
    pub fn take_output(&mut self, into: &mut Vec<u8>) {
        debug_assert!(into.is_empty(), "what is left of the last bytes goes first");
        self.out.take(into, self.splitter.max_payload());
    }

    /// Bytes that were taken have been sent.
    pub fn wrote(&mut self, now: Instant) {
        self.beat.wrote(now);
    }

    /// The caller has chosen not to read, so that the peer's silence proves nothing.
    pub fn not_reading(&mut self, now: Instant) {
        self.beat.not_reading(now);
    }

    /// Appends the acks that have been given since the last flush, merged. To be called once before each write.
    pub fn flush_acks(&mut self) {
        for id in self.with_acks.drain(..) {
            if let Some(Some(channel)) = self.channels.get_mut(usize::from(id))
                && channel.takes_requests()
            {
                channel.unsettled.flush(id, self.out.lane(id));
            }
        }
    }

    /// What was agreed upon, while the connection is open.
    pub fn tuned(&self) -> Option<Tuned> {
        match self.state {
            State::Open(tuned) => Some(tuned),
            State::Handshake(_) | State::AwaitCloseOk | State::Down => None,
        }
    }

    /// Whether it has ended. There may still be output worth sending: the answer to a `connection.close`.
    pub fn is_down(&self) -> bool {
        matches!(self.state, State::Down)
    }

    /// Whether the broker has asked publishers to wait.
    pub fn is_blocked(&self) -> bool {
        self.is_blocked
    }

    /// Whether a channel can be used: deliveries of any other are stale.
    pub fn has_channel(&self, key: ChannelKey) -> bool {
        self.channel(key).is_some_and(Channel::takes_requests)
    }

    /// How many channels are open, or are being opened or closed.
    pub fn open_channels(&self) -> usize {
        self.channels.len() - 1 - self.free.len()
    }

    /// How many publishings on all channels have no answer yet.
    pub fn all_unconfirmed(&self) -> usize {
        let confirms = |c: &Channel| c.confirms.as_ref().map_or(0, Confirms::len);
        self.channels.iter().flatten().map(|c| confirms(c)).sum()
    }

    /// How many publishings on a channel have no answer yet.
    pub fn unconfirmed(&self, key: ChannelKey) -> usize {
        let confirms = self.channel(key).and_then(|c| c.confirms.as_ref());
        confirms.map_or(0, |confirms| confirms.len())
    }

    /// Starts to close the connection. [`Event::Down`] follows when the peer has answered; the caller watches the time.
    ///
    /// # Errors
    /// [`Refused::NotOpen`] if there is nothing to close.
    pub fn close(&mut self, code: ReplyCode, text: &str) -> Result<(), Refused> {
        self.must_be_open()?;
        self.flush_acks();
        self.put_connection_close(code, text, 0, 0);
        self.out.forget_lanes();
        self.state = State::AwaitCloseOk;
        Ok(())
    }

    /// Appends a publishing as a whole. In confirm mode its number is answered, and an [`Event::Confirm`] will follow.
    ///
    /// `props` are encoded ([`PropsBuf::as_bytes`](crate::wire::PropsBuf::as_bytes)).
    ///
    /// # Errors
    /// Nothing has been appended then. [`Refused::Blocked`] while the broker has asked publishers to wait.
    #[inline]
    pub fn publish(
        &mut self,
        key: ChannelKey,
        publish: &Publish<'_>,
        props: &[u8],
        body: &[u8],
    ) -> Result<Option<u64>, Refused> {
        self.publish_body(key, publish, props, Body::Lent(body), None)
    }

    /// As [`Connection::publish`], for a [short](Connection::is_short) body: the frames are left in `kept` as well, to be published again.
    ///
    /// # Errors
    /// As [`Connection::publish`].
    #[inline]
    pub fn publish_keeping(
        &mut self,
        key: ChannelKey,
        publish: &Publish<'_>,
        props: &[u8],
        body: &[u8],
        kept: &mut Vec<u8>,
    ) -> Result<Option<u64>, Refused> {
        debug_assert!(self.is_short(body), "a long one is better shared");
        self.publish_body(key, publish, props, Body::Lent(body), Some(kept))
    }

    /// As [`Connection::publish`], with a body that can be kept instead of copied until it has been sent.
    ///
    /// # Errors
    /// As [`Connection::publish`].
    pub fn publish_shared(
        &mut self,
        key: ChannelKey,
        publish: &Publish<'_>,
        props: &[u8],
        body: &Rc<[u8]>,
    ) -> Result<Option<u64>, Refused> {
        self.publish_body(key, publish, props, Body::Shared(body), None)
    }

    /// Whether a body leaves in one frame; larger ones are best handed over by [`Connection::publish_shared`].
    #[inline]
    pub fn is_short(&self, body: &[u8]) -> bool {
        body.len() <= self.splitter.max_payload()
    }

    #[inline]
    fn publish_body(
        &mut self,
        key: ChannelKey,
        publish: &Publish<'_>,
        props: &[u8],
        body: Body<'_>,
        kept: Option<&mut Vec<u8>>,
    ) -> Result<Option<u64>, Refused> {
        self.must_be_open()?;
        if self.is_blocked {
            return Err(Refused::Blocked);
        }
        let max_payload = self.splitter.max_payload();
        let channel = find_mut(&mut self.channels, key).ok_or(Refused::ChannelGone)?;
        if !channel.takes_requests() {
            return Err(Refused::ChannelGone);
        }
        let (id, bytes) = (key.id, body.bytes());
        if bytes.len() <= max_payload {
            check_header_size(props, max_payload)?;
            let method = channel.last_published.frame(publish, id)?;
            let lane = self.out.lane(id);
            let at = lane.len();
            // One growth at most: the frames of header and body have 28 bytes round them.
            lane.reserve(method.len() + props.len() + bytes.len() + 32);
            lane.extend_from_slice(method);
            put_content(lane, id, props, bytes, max_payload);
            if let Some(kept) = kept {
                kept.clear();
                kept.extend_from_slice(&lane[at..]);
            }
        } else {
            let body = match body {
                Body::Lent(body) => body.into(),
                Body::Shared(body) => Rc::clone(body),
            };
            self.out.put_large(id, publish, props, body, max_payload)?;
        }
        let Some(confirms) = &mut channel.confirms else {
            return Ok(None);
        };
        let print = publish.mandatory.then(|| {
            let message_id = Props::from_bytes(props).message_id();
            fingerprint(publish.exchange, publish.routing_key, message_id)
        });
        Ok(Some(confirms.published(print)))
    }

    /// Settles a delivery. `false`, and nothing is sent, if it is not ours to settle any more: settled already, or its channel
    /// or connection is gone and the broker has given the message back.
    #[inline]
    pub fn settle(&mut self, key: DeliveryKey, how: Settle) -> bool {
        if !matches!(self.state, State::Open(_)) {
            return false;
        }
        let Some(channel) = find_mut(&mut self.channels, key.channel) else {
            return false;
        };
        if !channel.takes_requests() {
            return false;
        }
        let had_acks = channel.unsettled.has_acks();
        let settled =
            channel
                .unsettled
                .settle(key.tag, how, key.channel.id, self.out.lane(key.channel.id));
        if !had_acks && channel.unsettled.has_acks() {
            self.with_acks.push(key.channel.id);
        }
        settled
    }

    pub(super) fn must_be_open(&self) -> Result<Tuned, Refused> {
        self.tuned().ok_or(Refused::NotOpen)
    }

    fn channel(&self, key: ChannelKey) -> Option<&Channel> {
        let channel = self.channels.get(usize::from(key.id))?.as_deref()?;
        (channel.key == key).then_some(channel)
    }

    pub(super) fn channel_mut(&mut self, key: ChannelKey) -> Option<&mut Channel> {
        find_mut(&mut self.channels, key)
    }

    pub(super) fn forget_channel(&mut self, id: u16) {
        self.channels[usize::from(id)] = None;
        self.free.push(Reverse(id));
    }

    pub(super) fn put_connection_close(
        &mut self,
        code: ReplyCode,
        text: &str,
        class_id: u16,
        method_id: u16,
    ) {
        let close = connection::Close {
            reply_code: code.0,
            reply_text: cold::short_text(text),
            class_id,
            method_id,
        };
        let close = Method::Connection(connection::AMQPMethod::Close(close));
        cold::put(self.out.lane(0), 0, &close);
    }

    pub(super) fn violation(&mut self, error: WireError, sink: &mut Sink<'_>) {
        self.put_connection_close(error.code, &error.text, error.class, error.method);
        self.go_down(Down::Violation(error), sink);
    }

    pub(super) fn go_down(&mut self, down: Down, sink: &mut Sink<'_>) {
        if self.is_down() {
            return;
        }
        self.state = State::Down;
        self.is_blocked = false;
        self.out.forget_lanes();
        let channels = std::mem::replace(&mut self.channels, vec![None]);
        self.free.clear();
        self.with_acks.clear();
        let lost = Lost::ConnectionDown(down);
        for mut channel in channels.into_iter().flatten() {
            channel.fail(&lost, sink);
        }
        for (n, waits) in std::mem::take(&mut self.secrets) {
            if waits {
                let id = ReqId { channel: 0, n };
                let result = Err(&lost);
                sink(Event::Reply { id, result });
            }
        }
        if let Lost::ConnectionDown(down) = &lost {
            sink(Event::Down(down));
        }
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("tuned", &self.tuned())
            .field("is_down", &self.is_down())
            .field("open_channels", &self.open_channels())
            .field("output", &self.output_len())
            .finish_non_exhaustive()
    }
}

pub(super) fn find_mut(
    channels: &mut [Option<Box<Channel>>],
    key: ChannelKey,
) -> Option<&mut Channel> {
    let channel = channels.get_mut(usize::from(key.id))?.as_deref_mut()?;
    (channel.key == key).then_some(channel)
}

/// A body to be published.
#[derive(Clone, Copy)]
enum Body<'a> {
    Lent(&'a [u8]),
    Shared(&'a Rc<[u8]>),
}

impl<'a> Body<'a> {
    fn bytes(self) -> &'a [u8] {
        match self {
            Self::Lent(body) => body,
            Self::Shared(body) => body,
        }
    }
}
