//! What a connection tells, the names of the things it tells about, and how they end.

use std::borrow::Cow;
use std::time::Duration;

use thiserror::Error;

use super::handshake::{HandshakeError, Tuned};
use crate::error::{EncodeError, ReplyCode, WireError};
use crate::wire::{Deliver, GetOk, Method, Props, Return};

/// An open channel. Its number is used again after it is closed, the key is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChannelKey {
    pub(super) id: u16,
    pub(super) generation: u64,
}

impl ChannelKey {
    /// The number on the wire.
    pub fn id(self) -> u16 {
        self.id
    }
}

/// A request that has been sent. It gets exactly one [`Event::Reply`] or [`Event::Got`], unless it is abandoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReqId {
    pub(super) channel: u16,
    pub(super) n: u64,
}

/// A consumer, for as long as the connection lasts; another connection's is never the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConsumerKey(pub(super) u64);

/// A delivery that can be settled: only once, and only on the channel it came from while that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeliveryKey {
    pub(super) channel: ChannelKey,
    pub(super) tag: u64,
}

impl DeliveryKey {
    /// The channel it came on.
    pub fn channel(self) -> ChannelKey {
        self.channel
    }

    /// The delivery tag on the wire.
    pub fn tag(self) -> u64 {
        self.tag
    }
}

/// The fields of `channel.close` and `connection.close`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{code} {text}")]
pub struct CloseReason {
    /// Why.
    pub code: ReplyCode,
    /// Why, in words.
    pub text: String,
    /// The class of the method that caused it, or 0.
    pub class: u16,
    /// The method that caused it, or 0.
    pub method: u16,
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Down {
    /// We closed it and the peer agreed.
    #[error("connection closed")]
    ClosedByUs,
    /// The peer closed it.
    #[error("connection closed by the server: {0}")]
    ClosedByPeer(CloseReason),
    /// The peer broke the protocol; we told it so and closed.
    #[error("the server broke the protocol: {0}")]
    Violation(WireError),
    /// The two sides did not come together.
    #[error("handshake: {0}")]
    Handshake(HandshakeError),
    /// Nothing was heard for two heartbeat intervals, or no more than a few bytes of a frame that is not whole.
    #[error("no sign of life from the server for {} s, although heartbeats were agreed", .0.as_secs_f64())]
    HeartbeatMissed(Duration),
    /// The stream ended without a word.
    #[error("the server closed the stream without closing the connection")]
    Eof,
    /// The stream failed.
    #[error("stream: {0}")]
    Io(String),
}

impl Down {
    /// Whether the same attempt would end the same way, so that connecting again is of no use: a wrong password, a missing
    /// virtual host, no common mechanism, or our own wish.
    pub fn is_final(&self) -> bool {
        match self {
            Self::ClosedByUs => true,
            Self::ClosedByPeer(reason) => match reason.code {
                ReplyCode::ACCESS_REFUSED | ReplyCode::INVALID_PATH => true,
                // RabbitMQ has no other code for a user or a virtual host with as many connections as it may have. Those that a network has lost
                // count until their heartbeats are missed, so whoever comes back at once has to come again.
                ReplyCode::NOT_ALLOWED => !reason.text.contains("connection limit"),
                _ => false,
            },
            Self::Handshake(error) => !matches!(error, HandshakeError::Violation(_)),
            Self::Violation(_) | Self::HeartbeatMissed(_) | Self::Eof | Self::Io(_) => false,
        }
    }
}

/// Why a request or a publishing will never be answered.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Lost {
    /// The peer closed the channel.
    #[error("channel closed by the server: {0}")]
    ChannelClosed(CloseReason),
    /// We closed the channel first.
    #[error("the channel was closed before the answer came")]
    ChannelClosedByUs,
    /// There was no answer for so long.
    #[error("no answer within {} s", .0.as_secs_f64())]
    Late(Duration),
    /// The connection is gone.
    #[error(transparent)]
    ConnectionDown(Down),
}

/// Why something was not even sent.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// The connection is not open (yet, or any more).
    #[error("the connection is not open")]
    NotOpen,
    /// The channel is closed, or is about to be.
    #[error("the channel is closed")]
    ChannelGone,
    /// The broker has asked publishers to wait (`connection.blocked`).
    #[error("the broker is short of memory or disk and takes no messages now")]
    Blocked,
    /// As many channels are open as both sides agreed upon.
    #[error("all {0} channels that the server allows are open")]
    NoChannelLeft(u16),
    /// The channel has a consumer of that name.
    #[error("the channel has a consumer with the tag {0:?}; end that first, or choose another tag")]
    ConsumerTagTaken(String),
    /// The method has no reply (`nowait`, say), or a function of its own.
    #[error("not a method that waits for a reply")]
    NotARequest,
    /// It cannot be put on the wire.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// What became of a publishing on a channel in confirm mode.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome<'a> {
    /// The broker has taken it over.
    Ack,
    /// The broker has refused it.
    Nack,
    /// It was mandatory and no queue takes it: here it is again.
    Returned {
        /// Why, and where it was to go.
        reason: Return<'a>,
        /// Its properties.
        props: Props<'a>,
        /// Its body.
        body: Cow<'a, [u8]>,
    },
    /// The broker will not say any more. It may have it or not.
    Unconfirmed(&'a Lost),
}

/// Something has happened. Borrows from what was fed; what is to be kept has to be copied.
#[derive(Clone, Debug, PartialEq)]
pub enum Event<'a> {
    /// The handshake is through.
    Up(Tuned),
    /// The broker is short of something: publishing has to wait. Everything else goes on.
    Blocked(&'a str),
    /// Publishing may go on.
    Unblocked,
    /// The broker asks one channel to stop (`false`) or resume publishing. Already answered.
    Flow {
        /// Which channel.
        channel: ChannelKey,
        /// Whether to publish.
        active: bool,
    },
    /// A request has its answer.
    Reply {
        /// Which request.
        id: ReqId,
        /// The answer, or why there is none.
        result: Result<Method, &'a Lost>,
    },
    /// A `basic.get` has its message. (An empty queue is a `Reply` with `get-empty`.)
    Got {
        /// Which request.
        id: ReqId,
        /// To settle it by, unless `no_ack` was asked for.
        key: DeliveryKey,
        /// The method's fields.
        get: GetOk<'a>,
        /// The properties.
        props: Props<'a>,
        /// The body.
        body: Cow<'a, [u8]>,
    },
    /// A message for a consumer.
    Delivery {
        /// Which consumer.
        consumer: ConsumerKey,
        /// To settle it by, unless the consumer is `no_ack`.
        key: DeliveryKey,
        /// The method's fields.
        deliver: Deliver<'a>,
        /// The properties.
        props: Props<'a>,
        /// The body.
        body: Cow<'a, [u8]>,
    },
    /// A publishing is resolved; the only such event for it.
    Confirm {
        /// Which channel.
        channel: ChannelKey,
        /// The number that `publish` gave it.
        seq: u64,
        /// What became of it.
        outcome: Outcome<'a>,
    },
    /// A mandatory publishing on a channel without confirms has come back.
    Returned {
        /// Which channel.
        channel: ChannelKey,
        /// Why, and where it was to go.
        reason: Return<'a>,
        /// Its properties.
        props: Props<'a>,
        /// Its body.
        body: Cow<'a, [u8]>,
    },
    /// The broker has ended a consumer: its queue is gone, or has moved.
    Cancelled {
        /// Which channel.
        channel: ChannelKey,
        /// Which consumer.
        consumer: ConsumerKey,
    },
    /// The broker has closed a channel. Its requests and confirms have had their events.
    ChannelDown {
        /// Which channel.
        channel: ChannelKey,
        /// Why.
        reason: &'a CloseReason,
    },
    /// The connection has ended. All requests and confirms have had their events; nothing comes after this.
    Down(&'a Down),
}
