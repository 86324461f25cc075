//! The methods that carry and settle messages, by hand: borrowed in, appended out, no allocation either way.
//!
//! `amq-protocol` needs two to four allocations for each of these; they are the ones that come by the million.

use super::cursor::{Cursor, Fault};
use super::frame::{Erlang, FRAME_END, METHOD, check_header_size, put_content, put_content_header};
use crate::error::{EncodeError, ReplyCode, WireError, cut_short};

/// The class of all methods here.
pub const BASIC: u16 = 60;
/// `basic.publish`
pub const PUBLISH: u16 = 40;
/// `basic.return`
pub const RETURN: u16 = 50;
/// `basic.deliver`
pub const DELIVER: u16 = 60;
/// `basic.get-ok`
pub const GET_OK: u16 = 71;
/// `basic.ack`
pub const ACK: u16 = 80;
/// `basic.reject`
pub const REJECT: u16 = 90;
/// `basic.nack`
pub const NACK: u16 = 120;

/// `basic.publish`: a client gives a message to an exchange.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Publish<'a> {
    /// The exchange, `""` for the default one.
    pub exchange: &'a str,
    /// The routing key.
    pub routing_key: &'a str,
    /// Send it back if no queue takes it.
    pub mandatory: bool,
    /// AMQP's `immediate`; RabbitMQ answers it with 540.
    pub immediate: bool,
}

/// `basic.deliver`: a message for a consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deliver<'a> {
    /// Which consumer.
    pub consumer_tag: &'a str,
    /// The delivery's number on its channel, from 1.
    pub delivery_tag: u64,
    /// It may have been delivered before.
    pub redelivered: bool,
    /// The exchange it was published to.
    pub exchange: &'a str,
    /// The key it was published with.
    pub routing_key: &'a str,
}

/// `basic.get-ok`: the message asked for by `basic.get`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetOk<'a> {
    /// The delivery's number on its channel, from 1.
    pub delivery_tag: u64,
    /// It may have been delivered before.
    pub redelivered: bool,
    /// The exchange it was published to.
    pub exchange: &'a str,
    /// The key it was published with.
    pub routing_key: &'a str,
    /// How many messages the queue still holds.
    pub message_count: u32,
}

/// `basic.return`: a mandatory publishing that could not be routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Return<'a> {
    /// Why, 312 as a rule.
    pub reply_code: ReplyCode,
    /// Why, in words.
    pub reply_text: &'a str,
    /// The exchange it was published to.
    pub exchange: &'a str,
    /// The key it was published with.
    pub routing_key: &'a str,
}

/// `basic.ack`: done, by a consumer; taken over, by a broker to a publisher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The delivery, or the publishing; 0 with `multiple` is all so far.
    pub delivery_tag: u64,
    /// All up to and with this one.
    pub multiple: bool,
}

/// `basic.nack`: RabbitMQ's `basic.reject` with `multiple`; also a negative confirm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nack {
    /// The delivery, or the publishing; 0 with `multiple` is all so far.
    pub delivery_tag: u64,
    /// All up to and with this one.
    pub multiple: bool,
    /// Put it back in its queue rather than drop or dead-letter it.
    pub requeue: bool,
}

/// `basic.reject`: refuse one delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// The delivery.
    pub delivery_tag: u64,
    /// Put it back in its queue rather than drop or dead-letter it.
    pub requeue: bool,
}

/// Reads all of `args` by `read`, or says what is wrong with them in RabbitMQ's words.
#[inline]
fn decode<'a, T>(
    method: u16,
    args: &'a [u8],
    read: impl FnOnce(&mut Cursor<'a>) -> Result<T, Fault>,
) -> Result<T, WireError> {
    let mut cursor = Cursor(args);
    match read(&mut cursor) {
        Ok(fields) if cursor.0.is_empty() => Ok(fields),
        Ok(_) | Err(Fault::Truncated) => Err(cannot_decode(method, args)),
        Err(Fault::Utf8) => Err(bad_utf8(method)),
    }
}

#[cold]
fn cannot_decode(method: u16, args: &[u8]) -> WireError {
    let args = Erlang(args);
    let detail = format_args!("cannot decode {args}");
    WireError::new(ReplyCode::FRAME_ERROR, detail).in_method(BASIC, method)
}

#[cold]
fn bad_utf8(method: u16) -> WireError {
    WireError::new(ReplyCode::FRAME_ERROR, "Malformed UTF-8 in shortstr").in_method(BASIC, method)
}

impl<'a> Publish<'a> {
    /// Decodes the arguments.
    ///
    /// # Errors
    /// 501 if they do not fit.
    #[inline]
    pub fn decode(args: &'a [u8]) -> Result<Self, WireError> {
        decode(PUBLISH, args, |c| {
            c.u16().ok_or(Fault::Truncated)?; // the ticket of AMQP 0-8, ignored
            let exchange = c.short_str()?;
            let routing_key = c.short_str()?;
            let bits = c.u8().ok_or(Fault::Truncated)?;
            Ok(Self {
                exchange,
                routing_key,
                mandatory: bits & 1 != 0,
                immediate: bits & 2 != 0,
            })
        })
    }

    /// Appends the method and the whole content. `props` are encoded properties ([`PropsBuf`](super::PropsBuf)).
    ///
    /// # Errors
    /// Names that are no short strings, or a header larger than a frame; nothing has been written then.
    #[inline]
    pub fn put(
        &self,
        out: &mut Vec<u8>,
        channel: u16,
        props: &[u8],
        body: &[u8],
        max_payload: usize,
    ) -> Result<(), EncodeError> {
        self.check(props, max_payload)?;
        // Method, header, and a first guess at the body's frames: one growth at most for nearly all messages.
        out.reserve(64 + self.exchange.len() + self.routing_key.len() + props.len() + body.len());
        self.put_method(out, channel);
        put_content(out, channel, props, body, max_payload);
        Ok(())
    }

    /// Appends the method and the content's header, for those who send the body by other means.
    ///
    /// # Errors
    /// As [`Publish::put`].
    pub fn put_head(
        &self,
        out: &mut Vec<u8>,
        channel: u16,
        props: &[u8],
        body_len: usize,
        max_payload: usize,
    ) -> Result<(), EncodeError> {
        self.check(props, max_payload)?;
        self.put_method(out, channel);
        put_content_header(out, channel, props, body_len as u64);
        Ok(())
    }

    /// Appends the method alone: it is the same for all messages to one place.
    ///
    /// # Errors
    /// Names that are no short strings; nothing has been written then.
    pub(crate) fn put_method_alone(
        &self,
        out: &mut Vec<u8>,
        channel: u16,
    ) -> Result<(), EncodeError> {
        self.check_names()?;
        self.put_method(out, channel);
        Ok(())
    }

    #[inline]
    fn check(&self, props: &[u8], max_payload: usize) -> Result<(), EncodeError> {
        self.check_names()?;
        check_header_size(props, max_payload)
    }

    #[inline]
    fn check_names(&self) -> Result<(), EncodeError> {
        check_short("exchange", self.exchange)?;
        check_short("routing key", self.routing_key)
    }

    #[inline(always)] // large bodies have a call of their own, which must not cost the small ones theirs
    fn put_method(&self, out: &mut Vec<u8>, channel: u16) {
        let size = 2 + 1 + self.exchange.len() + 1 + self.routing_key.len() + 1;
        begin(out, channel, PUBLISH, size);
        out.extend_from_slice(&[0, 0]);
        put_short(out, self.exchange);
        put_short(out, self.routing_key);
        let bits = u8::from(self.mandatory) | u8::from(self.immediate) << 1;
        out.extend_from_slice(&[bits, FRAME_END]);
    }
}

impl<'a> Deliver<'a> {
    /// Decodes the arguments.
    ///
    /// # Errors
    /// 501 if they do not fit.
    #[inline]
    pub fn decode(args: &'a [u8]) -> Result<Self, WireError> {
        decode(DELIVER, args, |c| {
            Ok(Self {
                consumer_tag: c.short_str()?,
                delivery_tag: c.u64().ok_or(Fault::Truncated)?,
                redelivered: c.u8().ok_or(Fault::Truncated)? & 1 != 0,
                exchange: c.short_str()?,
                routing_key: c.short_str()?,
            })
        })
    }

    /// The delivery tag, and whether the message may have been delivered before, if all else in the arguments is as in an earlier
    /// delivery to the same consumer, of which `names` are the bytes behind these two. Then nobody has to look again whether the names are UTF-8,
    /// which is a tenth of what a delivery costs.
    #[inline]
    pub(crate) fn number_if_like(
        args: &[u8],
        consumer_tag: &str,
        names: &[u8],
    ) -> Option<(u64, bool)> {
        let mut cursor = Cursor(args);
        if cursor.short()? != consumer_tag.as_bytes() {
            return None;
        }
        let (tag, bits) = (cursor.u64()?, cursor.u8()?);
        (cursor.0 == names).then_some((tag, bits & 1 != 0))
    }

    /// The bytes of the names that [`Deliver::number_if_like`] compares.
    pub(crate) fn names(args: &[u8]) -> &[u8] {
        let mut cursor = Cursor(args);
        let names = cursor.short().and_then(|_| cursor.take(9));
        names.map_or(&[], |_| cursor.0)
    }

    /// Appends the method; the content is the caller's to append ([`put_content`]). Names beyond 255 bytes are cut.
    #[inline]
    pub fn put(&self, out: &mut Vec<u8>, channel: u16) {
        let (tag, exchange, key) = (
            cut_short(self.consumer_tag),
            cut_short(self.exchange),
            cut_short(self.routing_key),
        );
        let size = 1 + tag.len() + 9 + 1 + exchange.len() + 1 + key.len();
        out.reserve(size + 12);
        begin(out, channel, DELIVER, size);
        put_short(out, tag);
        put_tag_and_bits(out, self.delivery_tag, self.redelivered.into());
        put_short(out, exchange);
        put_short(out, key);
        out.push(FRAME_END);
    }
}

impl<'a> GetOk<'a> {
    /// Decodes the arguments.
    ///
    /// # Errors
    /// 501 if they do not fit.
    #[inline]
    pub fn decode(args: &'a [u8]) -> Result<Self, WireError> {
        decode(GET_OK, args, |c| {
            Ok(Self {
                delivery_tag: c.u64().ok_or(Fault::Truncated)?,
                redelivered: c.u8().ok_or(Fault::Truncated)? & 1 != 0,
                exchange: c.short_str()?,
                routing_key: c.short_str()?,
                message_count: c.u32().ok_or(Fault::Truncated)?,
            })
        })
    }

    /// Appends the method; the content is the caller's to append ([`put_content`]). Names beyond 255 bytes are cut.
    pub fn put(&self, out: &mut Vec<u8>, channel: u16) {
        let (exchange, key) = (cut_short(self.exchange), cut_short(self.routing_key));
        begin(
            out,
            channel,
            GET_OK,
            9 + 1 + exchange.len() + 1 + key.len() + 4,
        );
        put_tag_and_bits(out, self.delivery_tag, self.redelivered.into());
        put_short(out, exchange);
        put_short(out, key);
        out.extend_from_slice(&self.message_count.to_be_bytes());
        out.push(FRAME_END);
    }
}

impl<'a> Return<'a> {
    /// Decodes the arguments.
    ///
    /// # Errors
    /// 501 if they do not fit.
    #[inline]
    pub fn decode(args: &'a [u8]) -> Result<Self, WireError> {
        decode(RETURN, args, |c| {
            Ok(Self {
                reply_code: ReplyCode(c.u16().ok_or(Fault::Truncated)?),
                reply_text: c.short_str()?,
                exchange: c.short_str()?,
                routing_key: c.short_str()?,
            })
        })
    }

    /// Appends the method; the content is the caller's to append ([`put_content`]). Names beyond 255 bytes are cut.
    pub fn put(&self, out: &mut Vec<u8>, channel: u16) {
        let (text, exchange, key) = (
            cut_short(self.reply_text),
            cut_short(self.exchange),
            cut_short(self.routing_key),
        );
        let size = 2 + 1 + text.len() + 1 + exchange.len() + 1 + key.len();
        begin(out, channel, RETURN, size);
        out.extend_from_slice(&self.reply_code.0.to_be_bytes());
        put_short(out, text);
        put_short(out, exchange);
        put_short(out, key);
        out.push(FRAME_END);
    }
}

impl Ack {
    /// Decodes the arguments.
    ///
    /// # Errors
    /// 501 if they do not fit.
    #[inline]
    pub fn decode(args: &[u8]) -> Result<Self, WireError> {
        let (delivery_tag, bits) = tag_and_bits(ACK, args)?;
        Ok(Self {
            delivery_tag,
            multiple: bits & 1 != 0,
        })
    }

    /// Appends the method: a consumer's ack, or a broker's confirm.
    #[inline]
    pub fn put(&self, out: &mut Vec<u8>, channel: u16) {
        put_settlement(out, channel, ACK, self.delivery_tag, self.multiple.into());
    }
}

impl Nack {
    /// Decodes the arguments.
    ///
    /// # Errors
    /// 501 if they do not fit.
    #[inline]
    pub fn decode(args: &[u8]) -> Result<Self, WireError> {
        let (delivery_tag, bits) = tag_and_bits(NACK, args)?;
        Ok(Self {
            delivery_tag,
            multiple: bits & 1 != 0,
            requeue: bits & 2 != 0,
        })
    }

    /// Appends the method: a consumer's nack, or a broker's negative confirm.
    #[inline]
    pub fn put(&self, out: &mut Vec<u8>, channel: u16) {
        let bits = u8::from(self.multiple) | u8::from(self.requeue) << 1;
        put_settlement(out, channel, NACK, self.delivery_tag, bits);
    }
}

impl Reject {
    /// Decodes the arguments.
    ///
    /// # Errors
    /// 501 if they do not fit.
    #[inline]
    pub fn decode(args: &[u8]) -> Result<Self, WireError> {
        let (delivery_tag, bits) = tag_and_bits(REJECT, args)?;
        Ok(Self {
            delivery_tag,
            requeue: bits & 1 != 0,
        })
    }

    /// Appends the method.
    #[inline]
    pub fn put(&self, out: &mut Vec<u8>, channel: u16) {
        put_settlement(out, channel, REJECT, self.delivery_tag, self.requeue.into());
    }
}

#[inline]
fn tag_and_bits(method: u16, args: &[u8]) -> Result<(u64, u8), WireError> {
    decode(method, args, |c| {
        Ok((
            c.u64().ok_or(Fault::Truncated)?,
            c.u8().ok_or(Fault::Truncated)?,
        ))
    })
}

/// A whole settlement frame in one piece: they are all 21 bytes long.
#[inline]
fn put_settlement(out: &mut Vec<u8>, channel: u16, method: u16, tag: u64, bits: u8) {
    let mut frame = [0; 21];
    frame[..11].copy_from_slice(&method_head(channel, method, 9));
    frame[11..19].copy_from_slice(&tag.to_be_bytes());
    frame[19] = bits;
    frame[20] = FRAME_END;
    out.extend_from_slice(&frame);
}

#[inline]
fn method_head(channel: u16, method: u16, args_len: usize) -> [u8; 11] {
    let [c1, c0] = channel.to_be_bytes();
    let [s3, s2, s1, s0] = (4 + args_len as u32).to_be_bytes();
    let [k1, k0] = BASIC.to_be_bytes();
    let [m1, m0] = method.to_be_bytes();
    [METHOD, c1, c0, s3, s2, s1, s0, k1, k0, m1, m0]
}

#[inline]
fn begin(out: &mut Vec<u8>, channel: u16, method: u16, args_len: usize) {
    out.extend_from_slice(&method_head(channel, method, args_len));
}

#[inline]
fn put_tag_and_bits(out: &mut Vec<u8>, tag: u64, bits: u8) {
    let mut bytes = [0; 9];
    bytes[..8].copy_from_slice(&tag.to_be_bytes());
    bytes[8] = bits;
    out.extend_from_slice(&bytes);
}

/// The caller has made sure that it fits ([`check_short`] or [`cut_short`]).
#[inline]
fn put_short(out: &mut Vec<u8>, s: &str) {
    out.push(s.len() as u8);
    out.extend_from_slice(s.as_bytes());
}

/// Whether `s` can be a short string.
///
/// # Errors
/// Names the field as `what`.
#[inline]
pub fn check_short(what: &'static str, s: &str) -> Result<(), EncodeError> {
    if s.len() > 255 {
        return Err(EncodeError::ShortStringTooLong { what, len: s.len() });
    }
    // To the end in any case: so short a string is looked through sixteen bytes at a time, where a search has to begin and end bytewise.
    if s.bytes().fold(false, |found, byte| found | (byte == 0)) {
        return Err(EncodeError::ZeroByte { what });
    }
    Ok(())
}
