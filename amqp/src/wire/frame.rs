//! Frames: type, channel, size, payload, `0xCE`.

use std::fmt;

use crate::error::{ReplyCode, WireError};

/// What a client says first; a server that speaks another protocol answers with its own and hangs up.
pub const PROTOCOL_HEADER: [u8; 8] = *b"AMQP\0\0\x09\x01";
/// The smallest `frame_max` that AMQP allows, and what holds until `connection.tune-ok`.
pub const FRAME_MIN: usize = 4096;
/// Bytes of a frame that are not payload: type, channel, size, end.
pub const FRAME_OVERHEAD: usize = 8;
/// The largest payload of a content header that a client takes, in bytes.
pub const LARGE_HEADER: usize = 1 << 20;
/// The last byte of each frame.
pub const FRAME_END: u8 = 0xCE;

pub(super) const METHOD: u8 = 1;
pub(super) const HEADER: u8 = 2;
pub(super) const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;

/// One frame, borrowed from the read buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A method; channel 0 is the connection itself.
    Method {
        /// The channel number.
        channel: u16,
        /// The class, such as 60 for basic.
        class: u16,
        /// The method within its class.
        method: u16,
        /// The arguments, still encoded.
        args: &'a [u8],
    },
    /// The header of a content, still encoded; see [`ContentHeader::parse`](super::ContentHeader::parse).
    Header {
        /// The channel number, never 0.
        channel: u16,
        /// Class, weight, body size, flags and properties.
        raw: &'a [u8],
    },
    /// A piece of a content's body.
    Body {
        /// The channel number, never 0.
        channel: u16,
        /// The bytes.
        data: &'a [u8],
    },
    /// Proof that the peer lives.
    Heartbeat,
}

/// Cuts frames off the front of a byte buffer.
///
/// The size is checked as soon as the seven bytes that hold it are there, so a peer cannot make the caller buffer more than `frame_max`, or
/// [`LARGE_HEADER`].
#[derive(Clone, Copy, Debug)]
pub struct Splitter {
    max_payload: usize,
    max_header: usize,
}

impl Splitter {
    /// A splitter for the time before tuning, when frames are at most [`FRAME_MIN`] bytes.
    pub const fn new() -> Self {
        Self::with_frame_max(FRAME_MIN)
    }

    /// A splitter for the negotiated `frame_max`, in bytes with the frame's own eight. At least [`FRAME_MIN`] is accepted always.
    pub const fn with_frame_max(frame_max: usize) -> Self {
        let frame_max = if frame_max < FRAME_MIN {
            FRAME_MIN
        } else {
            frame_max
        };
        Self {
            max_payload: frame_max - FRAME_OVERHEAD,
            max_header: frame_max - FRAME_OVERHEAD,
        }
    }

    /// The same for a client, with content headers of up to [`LARGE_HEADER`] bytes.
    ///
    /// RabbitMQ passes headers on whole, whatever it has agreed upon with the receiver, and longer than they came if it has dead-lettered the message. A
    /// client that would not have that would lose its connections to one message, again and again.
    pub const fn taking_large_headers(self) -> Self {
        let max_header = if self.max_payload < LARGE_HEADER {
            LARGE_HEADER
        } else {
            self.max_payload
        };
        Self { max_header, ..self }
    }

    /// The largest payload that passes, in bytes.
    pub const fn max_payload(&self) -> usize {
        self.max_payload
    }

    /// The first frame of `buf` and its length in bytes, or `None` if it is not complete yet.
    ///
    /// # Errors
    /// 501 for what is no frame or too large a one, 505 for one that its channel cannot carry.
    #[inline(always)]
    pub fn next_frame<'a>(&self, buf: &'a [u8]) -> Result<Option<(Frame<'a>, usize)>, WireError> {
        let Some((head, rest)) = buf.split_first_chunk::<7>() else {
            return Ok(None);
        };
        let [kind, c1, c0, s3, s2, s1, s0] = *head;
        let channel = u16::from_be_bytes([c1, c0]);
        let size = u32::from_be_bytes([s3, s2, s1, s0]) as usize;
        if size > self.max_payload && !(kind == HEADER && size <= self.max_header) {
            let cause = format_args!("{{frame_too_large,{size},{}}}", self.max_payload);
            return Err(frame_error(kind, &[], cause));
        }
        let Some(&end) = rest.get(size) else {
            return Ok(None);
        };
        let payload = &rest[..size];
        if end != FRAME_END {
            let cause = format_args!("{{invalid_frame_end_marker,{end}}}");
            return Err(frame_error(kind, payload, cause));
        }
        let frame = match (kind, channel) {
            (METHOD, _) => {
                let Some((&[c1, c0, m1, m0], args)) = payload.split_first_chunk::<4>() else {
                    return Err(frame_error(kind, payload, format_args!("unknown_frame")));
                };
                Frame::Method {
                    channel,
                    class: u16::from_be_bytes([c1, c0]),
                    method: u16::from_be_bytes([m1, m0]),
                    args,
                }
            }
            (HEADER, 1..) => Frame::Header {
                channel,
                raw: payload,
            },
            (BODY, 1..) => Frame::Body {
                channel,
                data: payload,
            },
            (HEARTBEAT, 0) if size == 0 => Frame::Heartbeat,
            (HEADER | BODY, 0) => return Err(unexpected(kind, payload)),
            (HEARTBEAT, 1..) if size == 0 => return Err(unexpected(kind, payload)),
            _ => return Err(frame_error(kind, payload, format_args!("unknown_frame"))),
        };
        Ok(Some((frame, size + FRAME_OVERHEAD)))
    }
}

impl Default for Splitter {
    fn default() -> Self {
        Self::new()
    }
}

/// A header frame without room for what each header has.
#[cold]
pub(super) fn short_header(payload: &[u8]) -> WireError {
    frame_error(HEADER, payload, format_args!("unknown_frame"))
}

#[cold]
fn frame_error(kind: u8, payload: &[u8], cause: fmt::Arguments<'_>) -> WireError {
    let detail = format_args!("type {kind}, {}: {cause}", Snippet(payload));
    WireError::new(ReplyCode::FRAME_ERROR, detail)
}

#[cold]
fn unexpected(kind: u8, payload: &[u8]) -> WireError {
    let detail = format_args!("type {kind}, {}", Snippet(payload));
    WireError::new(ReplyCode::UNEXPECTED_FRAME, detail)
}

/// The start of a payload as RabbitMQ quotes it: `all octets = <<0,60>>`, `first 16 octets = <<"GET / HTTP/1.1\r\n">>`.
struct Snippet<'a>(&'a [u8]);

impl fmt::Display for Snippet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.get(..16) {
            Some(first) => write!(f, "first 16 octets = {}", ErlangText(first)),
            None => write!(f, "all octets = {}", ErlangText(self.0)),
        }
    }
}

/// Bytes as Erlang's `~p` prints a binary: as text if that is what it is.
struct ErlangText<'a>(&'a [u8]);

impl fmt::Display for ErlangText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_text = |byte: &u8| matches!(byte, b' '..=b'~' | b'\n' | b'\r' | b'\t');
        if self.0.is_empty() || !self.0.iter().all(is_text) {
            return Erlang(self.0).fmt(f);
        }
        // Of these characters, Rust escapes the same as Erlang, and alike.
        write!(f, "<<{:?}>>", String::from_utf8_lossy(self.0))
    }
}

/// Bytes as Erlang's `~w` prints a binary.
pub(super) struct Erlang<'a>(pub(super) &'a [u8]);

impl fmt::Display for Erlang<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<<")?;
        for (i, byte) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            byte.fmt(f)?;
        }
        f.write_str(">>")
    }
}

/// Appends a heartbeat frame.
pub fn put_heartbeat(out: &mut Vec<u8>) {
    out.extend_from_slice(&[HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END]);
}

/// Appends a content: its header, then the body in as many frames as `max_payload` asks for.
///
/// `props` are the flags and properties as [`PropsBuf`](super::PropsBuf) holds them or as they arrived. The caller has checked
/// that they fit ([`check_header_size`]); a header cannot be split.
#[inline]
pub fn put_content(out: &mut Vec<u8>, channel: u16, props: &[u8], body: &[u8], max_payload: usize) {
    put_content_header(out, channel, props, body.len() as u64);
    if (1..=max_payload).contains(&body.len()) {
        put_body(out, channel, body);
    } else {
        for piece in body.chunks(max_payload) {
            put_body(out, channel, piece);
        }
    }
}

/// Appends a content header alone, for those who send the body by other means.
#[inline]
pub fn put_content_header(out: &mut Vec<u8>, channel: u16, props: &[u8], body_size: u64) {
    let mut head = [0; 19];
    head[0] = HEADER;
    head[1..3].copy_from_slice(&channel.to_be_bytes());
    head[3..7].copy_from_slice(&(HEADER_FIXED as u32 + props.len() as u32).to_be_bytes());
    head[7..9].copy_from_slice(&super::hot::BASIC.to_be_bytes());
    // 9..11 is the weight, always 0
    head[11..19].copy_from_slice(&body_size.to_be_bytes());
    out.extend_from_slice(&head);
    out.extend_from_slice(props);
    out.push(FRAME_END);
}

/// Appends one body frame.
#[inline]
pub fn put_body(out: &mut Vec<u8>, channel: u16, data: &[u8]) {
    let mut head = [0; 7];
    head[0] = BODY;
    head[1..3].copy_from_slice(&channel.to_be_bytes());
    head[3..7].copy_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(&head);
    out.extend_from_slice(data);
    out.push(FRAME_END);
}

/// Class, weight and body size before the properties in a header's payload.
const HEADER_FIXED: usize = 12;

/// Whether a header with these properties fits a frame.
///
/// # Errors
/// [`EncodeError::HeadersTooLarge`](crate::error::EncodeError::HeadersTooLarge); nothing has been written then.
#[inline]
pub fn check_header_size(
    props: &[u8],
    max_payload: usize,
) -> Result<(), crate::error::EncodeError> {
    let len = HEADER_FIXED + props.len();
    if len > max_payload {
        return Err(crate::error::EncodeError::HeadersTooLarge {
            len,
            max: max_payload,
        });
    }
    Ok(())
}
