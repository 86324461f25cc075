//! Method, header and body frames become one message.
//!
//! A message whose frames are all in the read buffer is handed out where it lies ([`whole`]). Otherwise an [`Assembly`]
//! keeps what has come; its small buffers are used again, and the body is copied once, into room reserved when the header
//! announced it.

use std::borrow::Cow;

use crate::error::{ReplyCode, WireError};
use crate::wire::{ContentHeader, Frame, Props, Splitter, hot};

/// Room reserved for a body on the word of its header. What is announced beyond this is believed as it comes.
const RESERVE_CAP: u64 = 16 << 20;

/// A complete message.
#[derive(Clone, Debug, PartialEq)]
pub struct Content<'a> {
    /// The method that began it, one of basic's.
    pub method: u16,
    /// The method's arguments, for its `decode`.
    pub args: &'a [u8],
    /// The properties.
    pub props: Props<'a>,
    /// The body; owned if it had to be put together, so that keeping it costs no second copy.
    pub body: Cow<'a, [u8]>,
}

/// Looks for a content that is complete at the front of `rest`, the bytes behind its method frame: header and one body
/// frame, or none for an empty body. Answers it with the bytes it takes.
///
/// `None` means that the frames have to go through an [`Assembly`] one by one, be it that some are missing, that the body
/// is in several, or that they are wrong: the assembly is the one to complain.
#[inline]
pub fn whole<'a>(
    splitter: &Splitter,
    channel: u16,
    max_body: u64,
    rest: &'a [u8],
) -> Option<(Props<'a>, &'a [u8], usize)> {
    let (frame, header_len) = splitter.next_frame(rest).ok()??;
    let Frame::Header { channel: on, raw } = frame else {
        return None;
    };
    let header = ContentHeader::parse(raw).ok()?;
    if on != channel || header.class != hot::BASIC || header.body_size > max_body {
        return None;
    }
    if header.body_size == 0 {
        return Some((header.props, &[], header_len));
    }
    let (frame, body_len) = splitter.next_frame(&rest[header_len..]).ok()??;
    match frame {
        Frame::Body { channel: on, data }
            if on == channel && data.len() as u64 == header.body_size =>
        {
            Some((header.props, data, header_len + body_len))
        }
        _ => None,
    }
}

/// A content on its way in, one for each channel. Whatever arrives on the channel has to go by here first.
#[derive(Debug)]
pub struct Assembly {
    stage: Stage,
    method: u16,
    // Kept across messages; only meaningful in the stages behind the one that fills them.
    args: Vec<u8>,
    props: Vec<u8>,
    body: Vec<u8>,
    max_body: u64,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Idle,
    AwaitHeader,
    AwaitBody { left: u64 },
}

impl Assembly {
    /// An assembly that takes bodies of up to `max_body` bytes.
    pub fn new(max_body: u64) -> Self {
        Self {
            stage: Stage::Idle,
            method: 0,
            args: Vec::new(),
            props: Vec::new(),
            body: Vec::new(),
            max_body,
        }
    }

    /// Whether no content is under way, so that a method may come.
    pub fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Idle)
    }

    /// A method has come, of whatever kind.
    ///
    /// # Errors
    /// 505 if a content is under way.
    #[inline]
    pub fn method(&self) -> Result<(), WireError> {
        match self.stage {
            Stage::Idle => Ok(()),
            Stage::AwaitHeader => Err(self.unexpected(
                "expected content header for class 60, got non content header frame instead",
            )),
            Stage::AwaitBody { .. } => {
                Err(self.unexpected("expected content body, got non content body frame instead"))
            }
        }
    }

    /// The method that has come is one that a content follows.
    ///
    /// # Errors
    /// 505 if a content is under way.
    pub fn begin(&mut self, method: u16, args: &[u8]) -> Result<(), WireError> {
        self.method()?;
        self.method = method;
        self.args.clear();
        self.args.extend_from_slice(args);
        self.stage = Stage::AwaitHeader;
        Ok(())
    }

    /// A header frame has come. With an empty body the content is complete.
    ///
    /// # Errors
    /// 505 if none was due or it is of another class, 501 if it is malformed, 311 if the body is larger than allowed.
    pub fn header(&mut self, raw: &[u8]) -> Result<Option<Content<'_>>, WireError> {
        match self.stage {
            Stage::Idle => return Err(not_a_method()),
            Stage::AwaitHeader => {}
            Stage::AwaitBody { .. } => {
                return Err(
                    self.unexpected("expected content body, got non content body frame instead")
                );
            }
        }
        let header = ContentHeader::parse(raw).map_err(|e| e.in_method(hot::BASIC, self.method))?;
        if header.class != hot::BASIC {
            let class = header.class;
            return Err(self.unexpected(&format!(
                "expected content header for class 60, got one for class {class} instead"
            )));
        }
        if header.body_size > self.max_body {
            let detail = format_args!(
                "message size {} is larger than max size {}",
                header.body_size, self.max_body
            );
            return Err(WireError::new(ReplyCode::CONTENT_TOO_LARGE, detail)
                .in_method(hot::BASIC, self.method));
        }
        self.props.clear();
        self.props.extend_from_slice(header.props.as_bytes());
        self.body = Vec::with_capacity(header.body_size.min(RESERVE_CAP) as usize);
        self.stage = Stage::AwaitBody {
            left: header.body_size,
        };
        Ok(self.complete())
    }

    /// A body frame has come.
    ///
    /// # Errors
    /// 505 if none was due, 501 if it is longer than what the header announced.
    pub fn body(&mut self, data: &[u8]) -> Result<Option<Content<'_>>, WireError> {
        let left = match self.stage {
            Stage::Idle => return Err(not_a_method()),
            Stage::AwaitHeader => {
                return Err(self.unexpected(
                    "expected content header for class 60, got non content header frame instead",
                ));
            }
            Stage::AwaitBody { left } => left,
        };
        let Some(left) = left.checked_sub(data.len() as u64) else {
            let more = data.len() as u64 - left;
            let detail =
                format_args!("content body is {more} bytes longer than its header announced");
            return Err(
                WireError::new(ReplyCode::FRAME_ERROR, detail).in_method(hot::BASIC, self.method)
            );
        };
        self.body.extend_from_slice(data);
        self.stage = Stage::AwaitBody { left };
        Ok(self.complete())
    }

    fn complete(&mut self) -> Option<Content<'_>> {
        let Stage::AwaitBody { left: 0 } = self.stage else {
            return None;
        };
        self.stage = Stage::Idle;
        Some(Content {
            method: self.method,
            args: &self.args,
            props: Props::from_bytes(&self.props),
            body: Cow::Owned(std::mem::take(&mut self.body)),
        })
    }

    #[cold]
    fn unexpected(&self, detail: &str) -> WireError {
        WireError::new(ReplyCode::UNEXPECTED_FRAME, detail).in_method(hot::BASIC, self.method)
    }
}

#[cold]
fn not_a_method() -> WireError {
    WireError::new(
        ReplyCode::UNEXPECTED_FRAME,
        "expected method frame, got non method frame instead",
    )
}
