//! Reply codes, and the errors of the two lowest layers.

use std::fmt;

use thiserror::Error;

/// An AMQP reply code, as carried by `channel.close`, `connection.close` and `basic.return`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplyCode(pub u16);

impl ReplyCode {
    /// 200: closed on request.
    pub const SUCCESS: Self = Self(200);
    /// 311: a body larger than the receiver takes.
    pub const CONTENT_TOO_LARGE: Self = Self(311);
    /// 312: a mandatory publishing that no queue takes.
    pub const NO_ROUTE: Self = Self(312);
    /// 313: an immediate publishing that no consumer takes (RabbitMQ has dropped `immediate`).
    pub const NO_CONSUMERS: Self = Self(313);
    /// 320: an operator, or the broker's own shutdown, closed the connection.
    pub const CONNECTION_FORCED: Self = Self(320);
    /// 402: no such virtual host.
    pub const INVALID_PATH: Self = Self(402);
    /// 403: not allowed to.
    pub const ACCESS_REFUSED: Self = Self(403);
    /// 404: no such exchange or queue.
    pub const NOT_FOUND: Self = Self(404);
    /// 405: an exclusive queue of somebody else.
    pub const RESOURCE_LOCKED: Self = Self(405);
    /// 406: the request contradicts what is there.
    pub const PRECONDITION_FAILED: Self = Self(406);
    /// 501: bytes that are no frame.
    pub const FRAME_ERROR: Self = Self(501);
    /// 502: a field with an impossible value.
    pub const SYNTAX_ERROR: Self = Self(502);
    /// 503: a method that this state does not take, or that does not exist.
    pub const COMMAND_INVALID: Self = Self(503);
    /// 504: a channel that is not open, or already is.
    pub const CHANNEL_ERROR: Self = Self(504);
    /// 505: a frame that cannot come now.
    pub const UNEXPECTED_FRAME: Self = Self(505);
    /// 506: the peer has run out of something.
    pub const RESOURCE_ERROR: Self = Self(506);
    /// 530: against the rules of the connection.
    pub const NOT_ALLOWED: Self = Self(530);
    /// 540: known, but not done here.
    pub const NOT_IMPLEMENTED: Self = Self(540);
    /// 541: the peer's own fault.
    pub const INTERNAL_ERROR: Self = Self(541);

    /// The name RabbitMQ puts before the text, `PRECONDITION_FAILED` for 406; `UNKNOWN` for a code that is not AMQP's.
    pub fn name(self) -> &'static str {
        match self.0 {
            200 => "SUCCESS",
            311 => "CONTENT_TOO_LARGE",
            312 => "NO_ROUTE",
            313 => "NO_CONSUMERS",
            320 => "CONNECTION_FORCED",
            402 => "INVALID_PATH",
            403 => "ACCESS_REFUSED",
            404 => "NOT_FOUND",
            405 => "RESOURCE_LOCKED",
            406 => "PRECONDITION_FAILED",
            501 => "FRAME_ERROR",
            502 => "SYNTAX_ERROR",
            503 => "COMMAND_INVALID",
            504 => "CHANNEL_ERROR",
            505 => "UNEXPECTED_FRAME",
            506 => "RESOURCE_ERROR",
            530 => "NOT_ALLOWED",
            540 => "NOT_IMPLEMENTED",
            541 => "INTERNAL_ERROR",
            _ => "UNKNOWN",
        }
    }

    /// Whether the code closes one channel only (a soft error) rather than the connection.
    pub fn is_soft(self) -> bool {
        matches!(self.0, 311..=313 | 403..=406)
    }

    /// `detail` as RabbitMQ words it, `NAME - detail`, cut to what a short string holds.
    ///
    /// Clients and people match on these texts, so they are part of the protocol in practice.
    pub fn text(self, detail: impl fmt::Display) -> String {
        let mut text = format!("{} - {detail}", self.name());
        text.truncate(cut_short(&text).len());
        text
    }
}

impl fmt::Debug for ReplyCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, self.name())
    }
}

impl fmt::Display for ReplyCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The longest start of `s` that a short string holds, cut between characters.
pub(crate) fn cut_short(s: &str) -> &str {
    let mut end = s.len().min(255);
    while !s.is_char_boundary(end) {
        end -= 1;
    }
    &s[..end]
}

/// The peer sent what the protocol does not allow. Always a hard error: the connection has to be closed with these four fields.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{code}: {text}")]
pub struct WireError {
    /// The code for `connection.close`.
    pub code: ReplyCode,
    /// The text for `connection.close`, RabbitMQ's wording, with its prefix, at most 255 bytes.
    pub text: String,
    /// The class of the method at fault, 0 if none is known.
    pub class: u16,
    /// The method at fault, 0 if none is known.
    pub method: u16,
}

impl WireError {
    /// An error that no method is to blame for.
    pub fn new(code: ReplyCode, detail: impl fmt::Display) -> Self {
        Self {
            code,
            text: code.text(detail),
            class: 0,
            method: 0,
        }
    }

    /// The same error, blamed on a method.
    #[must_use]
    pub fn in_method(self, class: u16, method: u16) -> Self {
        Self {
            class,
            method,
            ..self
        }
    }
}

/// The caller asked for something that cannot be put on the wire. Nothing was written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EncodeError {
    /// AMQP's short strings (names, keys, most properties) hold 255 bytes.
    #[error("{what} is {len} bytes long, a short string holds at most 255")]
    ShortStringTooLong {
        /// Which field.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// AMQP's short strings hold no zero byte.
    #[error("{what} contains a zero byte, which AMQP does not allow")]
    ZeroByte {
        /// Which field.
        what: &'static str,
    },
    /// `expiration` is a number of milliseconds written in decimal.
    #[error("expiration {0:?} is not a number of milliseconds in decimal digits")]
    BadExpiration(String),
    /// Properties and headers travel in one frame that cannot be split.
    #[error(
        "properties with headers take {len} bytes, the connection's frame_max leaves room for {max}; put large data in the body"
    )]
    HeadersTooLarge {
        /// The size of the header frame's payload, in bytes.
        len: usize,
        /// The largest payload a frame may have, in bytes.
        max: usize,
    },
    /// The arguments of a request travel in one frame that cannot be split.
    #[error(
        "a request of {len} bytes, the connection's frame_max leaves room for {max}; give it smaller arguments"
    )]
    MethodTooLarge {
        /// The size of the method frame's payload, in bytes.
        len: usize,
        /// The largest payload a frame may have, in bytes.
        max: usize,
    },
    /// Tables and arrays are nested deeper than [`MAX_DEPTH`](crate::wire::props::MAX_DEPTH), or malformed.
    #[error("headers: {0}")]
    BadTable(#[from] TableError),
}

/// A field table that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TableError {
    /// A length points past the end, or bytes are left over.
    #[error("table is cut short or has a length that does not fit")]
    Truncated,
    /// A type byte RabbitMQ's dialect does not have.
    #[error("unknown table field type {0:#04x}")]
    UnknownType(u8),
    /// Deeper than [`MAX_DEPTH`](crate::wire::props::MAX_DEPTH).
    #[error("table is nested deeper than 64 levels")]
    TooDeep,
    /// A key that is not UTF-8.
    #[error("table key is not UTF-8")]
    BadKey,
}
