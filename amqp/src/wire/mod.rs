//! Bytes to frames and back. No state but the negotiated frame size, no allocation where messages pass.
//!
//! [`frame`] cuts a byte stream into frames and writes them; [`hot`] reads and writes the methods that carry messages and their
//! settlements, borrowed from the read buffer; [`props`] looks into a content header without decoding what nobody asks for;
//! [`cold`] leaves every other method to the `amq-protocol` crate.

pub mod cold;
pub mod frame;
pub mod hot;
pub mod props;

mod cursor;
#[cfg(test)]
pub(crate) mod tests;

use crate::error::WireError;
pub use cold::Method;
pub use frame::{Frame, PROTOCOL_HEADER, Splitter};
pub use hot::{Ack, Deliver, GetOk, Nack, Publish, Reject, Return};
pub use props::{ContentHeader, Properties, Props, PropsBuf, Table, TableBuf, Value};

/// Any method that can arrive, the hot ones borrowed from the frame.
#[derive(Clone, Debug, PartialEq)]
pub enum AnyMethod<'a> {
    /// `basic.publish`; a content follows.
    Publish(Publish<'a>),
    /// `basic.deliver`; a content follows.
    Deliver(Deliver<'a>),
    /// `basic.get-ok`; a content follows.
    GetOk(GetOk<'a>),
    /// `basic.return`; a content follows.
    Return(Return<'a>),
    /// `basic.ack`, from a consumer or as a publisher confirm.
    Ack(Ack),
    /// `basic.nack`, from a consumer or as a publisher confirm.
    Nack(Nack),
    /// `basic.reject`.
    Reject(Reject),
    /// Everything else.
    Cold(Method),
}

impl<'a> AnyMethod<'a> {
    /// Decodes the arguments of a method frame.
    ///
    /// # Errors
    /// 503 for a method that AMQP 0-9-1 as RabbitMQ speaks it does not have, 501 for arguments that do not fit it.
    #[inline]
    pub fn decode(class: u16, method: u16, args: &'a [u8]) -> Result<Self, WireError> {
        if class != hot::BASIC {
            return cold::decode(class, method, args).map(Self::Cold);
        }
        Ok(match method {
            hot::PUBLISH => Self::Publish(Publish::decode(args)?),
            hot::DELIVER => Self::Deliver(Deliver::decode(args)?),
            hot::GET_OK => Self::GetOk(GetOk::decode(args)?),
            hot::RETURN => Self::Return(Return::decode(args)?),
            hot::ACK => Self::Ack(Ack::decode(args)?),
            hot::NACK => Self::Nack(Nack::decode(args)?),
            hot::REJECT => Self::Reject(Reject::decode(args)?),
            _ => Self::Cold(cold::decode(class, method, args)?),
        })
    }
}
