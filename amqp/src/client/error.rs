//! What a client can fail with.

use std::io;
use std::time::Duration;

use kernel::{Interrupt, MaybeInterrupt};
use thiserror::Error;

use crate::error::{EncodeError, ReplyCode};
use crate::proto::event::{CloseReason, Down, Lost, Refused};
use crate::uri::UriError;
use crate::wire::{Props, PropsBuf};

/// Why something could not be done.
///
/// After [`Error::Lost`], [`Error::NotRecovered`] and [`Error::Closed`] the connection is of no use any more, after
/// [`Error::ChannelClosed`] and [`Error::AckTimeout`] the channel; the others concern one operation.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum Error {
    /// The address is none.
    #[error("bad AMQP address: {0}")]
    Address(#[from] UriError),
    /// `amqps://` needs a client with TLS.
    #[error(
        "amqps:// needs TLS, which this program was built without; build it with the feature `tls` of sweepea-amqp, or use amqp://"
    )]
    NoTls,
    /// The files that `amqps://` needs cannot be used. They are read again for each attempt to recover.
    #[error("cannot prepare TLS: {0}")]
    Certificates(String),
    /// No server answered; which were tried, and what became of each.
    #[error("cannot connect to {to}: {}", tried.join("; "))]
    Connect {
        /// The address, without its password.
        to: String,
        /// One text for each attempt, with host and port.
        tried: Vec<String>,
    },
    /// The server does not let this user in. Trying again is of no use.
    #[error("{server} refused the login of user {user:?}: {reason}")]
    LoginRefused {
        /// Host and port.
        server: String,
        /// The user.
        user: String,
        /// What the server says.
        reason: CloseReason,
    },
    /// There is no such virtual host, or not for this user. Trying again is of no use.
    #[error("{server} does not open the virtual host {name:?}: {reason}")]
    VirtualHost {
        /// Host and port.
        server: String,
        /// The virtual host.
        name: String,
        /// What the server says.
        reason: CloseReason,
    },
    /// The connection has ended, other than by [`Connection::close`](super::Connection::close).
    #[error("connection lost: {0}")]
    Lost(Down),
    /// The connection has ended, and making a new one was given up.
    #[error(
        "connection lost ({why}), and not recovered: {}",
        last.as_ref().map_or_else(|| "no more attempts are allowed".to_owned(), |last| last.to_string())
    )]
    NotRecovered {
        /// Why it ended.
        why: Down,
        /// What became of the last attempt, if there was one.
        last: Option<Box<Self>>,
    },
    /// The connection was lost before the answer came; it is being recovered. The server may have done what it was asked.
    #[error(
        "{what}: the connection was lost before the answer came ({why}); it is being recovered"
    )]
    Unanswered {
        /// What was asked.
        what: &'static str,
        /// Why it was lost.
        why: Down,
    },
    /// The connection, or this channel, was closed by us.
    #[error("closed")]
    Closed,
    /// The server closed the channel, because of something that was done on it.
    #[error("channel closed by the server: {0}")]
    ChannelClosed(CloseReason),
    /// The server closed the channel, because a delivery was not settled within its `consumer_timeout` (30 minutes in
    /// RabbitMQ).
    #[error(
        "channel closed by the server, a delivery was not settled in time (consumer_timeout): {0}"
    )]
    AckTimeout(CloseReason),
    /// The channel was closed by us since the server left two requests in a row without an answer, or a publishing for
    /// [`confirm_timeout`](super::PublisherOptions::confirm_timeout).
    #[error(
        "channel closed: the server did not answer on it, two requests in a row or a publishing"
    )]
    ChannelStuck,
    /// The server ended the consumer: its queue was deleted, or has moved.
    #[error("the server ended the consumer of queue {queue:?}; the queue is gone or has moved")]
    ConsumerCancelled {
        /// The queue.
        queue: String,
    },
    /// The server did not answer in time. It may still do what it was asked.
    #[error("{what}: no answer from the server within {} s", after.as_secs_f64())]
    Timeout {
        /// What was asked.
        what: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The server took the publishing back: it could not store it.
    #[error("the server refused a message (basic.nack)")]
    Nacked,
    /// The publishing was mandatory, and no queue takes it.
    #[error(
        "no queue takes the message, {code} {text} (exchange {exchange:?}, routing key {routing_key:?})",
        code = .0.code, text = .0.text, exchange = .0.exchange, routing_key = .0.routing_key
    )]
    Returned(Box<Returned>),
    /// The answer to a publishing will not come any more. The server may have the message or not.
    #[error("it is not known whether the server has the message: {0}")]
    Unconfirmed(Lost),
    /// A message cannot be taken without waiting; the futures that publish wait instead.
    #[error("cannot take the message now: {0}")]
    Busy(Busy),
    /// It cannot be put on the wire; nothing was sent.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// As many channels are open as both sides agreed upon.
    #[error("all {0} channels that the server allows are open")]
    NoChannelLeft(u16),
    /// The channel has a consumer of that name, which RabbitMQ would close the connection over.
    #[error("the channel has a consumer with the tag {0:?}; end that first, or choose another tag")]
    ConsumerTagTaken(String),
    /// Something was asked for by [`Channel::call`](super::Channel::call) that has a function of its own, or no answer.
    #[error("not a method that waits for a reply")]
    NotARequest,
    /// The server answered something else than was asked. A fault of the server.
    #[error("{what}: the server gave an answer that does not belong to it")]
    WrongAnswer {
        /// What was asked.
        what: &'static str,
    },
    /// The waiting task was cancelled or timed out.
    #[error(transparent)]
    Interrupted(#[from] Interrupt),
}

/// Why a message has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Busy {
    /// As many publishings wait for their confirm as the publisher's window allows.
    #[error("the publisher's window is full of unconfirmed messages")]
    Window,
    /// More bytes wait to be sent than the high-water mark allows.
    #[error("the connection has more to send than its high-water mark allows")]
    HighWater,
    /// The server has asked publishers to wait.
    #[error("the server is short of memory or disk and takes no messages")]
    Blocked,
    /// The connection was lost and is being recovered, or messages from before are being published again.
    #[error("the connection is being recovered")]
    Recovering,
}

/// A mandatory publishing that came back, because no queue takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Returned {
    /// Why, 312 as a rule.
    pub code: ReplyCode,
    /// Why, in words.
    pub text: String,
    /// The exchange it was published to.
    pub exchange: String,
    /// The key it was published with.
    pub routing_key: String,
    /// Its properties.
    pub properties: PropsBuf,
    /// Its body.
    pub body: Vec<u8>,
}

impl Returned {
    pub(super) fn new(reason: crate::wire::Return<'_>, props: Props<'_>, body: &[u8]) -> Self {
        Self {
            code: reason.reply_code,
            text: reason.reply_text.to_owned(),
            exchange: reason.exchange.to_owned(),
            routing_key: reason.routing_key.to_owned(),
            properties: PropsBuf::copy_of(props),
            body: body.to_vec(),
        }
    }
}

impl Error {
    /// Whether the connection has ended, so that only a new one helps.
    pub fn is_connection_gone(&self) -> bool {
        match self {
            Self::Lost(_)
            | Self::NotRecovered { .. }
            | Self::Closed
            | Self::Unconfirmed(Lost::ConnectionDown(_)) => true,
            Self::Address(_)
            | Self::NoTls
            | Self::Certificates(_)
            | Self::Connect { .. }
            | Self::LoginRefused { .. }
            | Self::VirtualHost { .. }
            | Self::ChannelClosed(_)
            | Self::AckTimeout(_)
            | Self::Unanswered { .. }
            | Self::ChannelStuck
            | Self::ConsumerCancelled { .. }
            | Self::Timeout { .. }
            | Self::Nacked
            | Self::Returned(_)
            | Self::Unconfirmed(_)
            | Self::Busy(_)
            | Self::Encode(_)
            | Self::NoChannelLeft(_)
            | Self::ConsumerTagTaken(_)
            | Self::NotARequest
            | Self::WrongAnswer { .. }
            | Self::Interrupted(_) => false,
        }
    }

    /// The server's code, if it closed something or sent a message back.
    pub fn reply_code(&self) -> Option<ReplyCode> {
        match self {
            Self::LoginRefused { reason, .. }
            | Self::VirtualHost { reason, .. }
            | Self::Lost(Down::ClosedByPeer(reason))
            | Self::Unanswered {
                why: Down::ClosedByPeer(reason),
                ..
            }
            | Self::Unconfirmed(Lost::ConnectionDown(Down::ClosedByPeer(reason)))
            | Self::Unconfirmed(Lost::ChannelClosed(reason))
            | Self::ChannelClosed(reason)
            | Self::AckTimeout(reason) => Some(reason.code),
            Self::Returned(returned) => Some(returned.code),
            Self::NotRecovered {
                last: Some(last), ..
            } => last.reply_code(),
            Self::NotRecovered {
                why: Down::ClosedByPeer(reason),
                ..
            } => Some(reason.code),
            _ => None,
        }
    }

    pub(super) fn of_channel(reason: CloseReason) -> Self {
        // RabbitMQ has no code of its own for this.
        let is_late_ack = reason.code == ReplyCode::PRECONDITION_FAILED
            && reason.text.contains("delivery acknowledgement")
            && reason.text.contains("timed out");
        if is_late_ack {
            Self::AckTimeout(reason)
        } else {
            Self::ChannelClosed(reason)
        }
    }
}

impl From<Down> for Error {
    fn from(down: Down) -> Self {
        match down {
            Down::ClosedByUs => Self::Closed,
            down => Self::Lost(down),
        }
    }
}

impl From<Lost> for Error {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::ChannelClosed(reason) => Self::of_channel(reason),
            Lost::ChannelClosedByUs => Self::Closed,
            Lost::Late(after) => Self::Timeout {
                what: "request",
                after,
            },
            Lost::ConnectionDown(down) => down.into(),
        }
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::NotOpen | Refused::ChannelGone => Self::Closed,
            Refused::Blocked => Self::Busy(Busy::Blocked),
            Refused::NoChannelLeft(max) => Self::NoChannelLeft(max),
            Refused::ConsumerTagTaken(tag) => Self::ConsumerTagTaken(tag),
            Refused::NotARequest => Self::NotARequest,
            Refused::Encode(error) => Self::Encode(error),
        }
    }
}

impl MaybeInterrupt for Error {
    fn interrupt(&self) -> Option<&Interrupt> {
        match self {
            Self::Interrupted(interrupt) => Some(interrupt),
            _ => None,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Interrupted(interrupt) => interrupt.into(),
            error => Self::other(error),
        }
    }
}
