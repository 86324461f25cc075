//! Every method that does not come by the million, by way of the `amq-protocol` crate. No other file names that crate.
//!
//! Its table parser recurses, so that one frame of nested tables overflows the stack: tables are walked by
//! [`Table::check`], which does not, before it sees them.

use amq_protocol::protocol::{AMQPClass, gen_class};
use amq_protocol::types::generation::gen_field_table;
use amq_protocol::types::parsing::parse_field_table;

pub use amq_protocol::protocol::{
    access, basic, channel, confirm, connection, exchange, queue, tx,
};
pub use amq_protocol::types::{
    AMQPValue, FieldArray, FieldTable, LongString, ShortString, ShortStringError,
};

use super::frame::{Erlang, FRAME_END, FRAME_OVERHEAD, METHOD};
use super::props::{Table, TableBuf, table_in};
use crate::error::{EncodeError, ReplyCode, WireError};

/// A decoded method, `Method::Queue(queue::AMQPMethod::Declare(queue::Declare { .. }))`.
pub type Method = AMQPClass;

/// Decodes the arguments of a method.
///
/// # Errors
/// 503 for a method that does not exist, 501 for arguments that do not fit it.
pub fn decode(class: u16, method: u16, args: &[u8]) -> Result<Method, WireError> {
    let blame = |e: WireError| Err(e.in_method(class, method));
    if !is_known(class, method) {
        let detail = format_args!("unknown method {method} of class {class}");
        return blame(WireError::new(ReplyCode::COMMAND_INVALID, detail));
    }
    if let Some(table) = table_in(class, method, args)
        && let Err(e) = table.check()
    {
        return blame(WireError::new(ReplyCode::FRAME_ERROR, e));
    }
    let mut whole = Vec::with_capacity(4 + args.len());
    whole.extend_from_slice(&class.to_be_bytes());
    whole.extend_from_slice(&method.to_be_bytes());
    whole.extend_from_slice(args);
    match amq_protocol::protocol::parse_class(whole.as_slice()) {
        Ok(([], method)) => Ok(method),
        // amq-protocol does not say whether it was the UTF-8; RabbitMQ's text for both starts like this.
        Ok(_) | Err(_) => {
            let args = Erlang(args);
            let detail = format_args!("cannot decode {args}");
            blame(WireError::new(ReplyCode::FRAME_ERROR, detail))
        }
    }
}

/// Appends a method frame.
pub fn put(out: &mut Vec<u8>, channel: u16, method: &Method) {
    let at = out.len();
    out.push(METHOD);
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    encode(out, |context| gen_class(method)(context));
    let size = (out.len() - at - 7) as u32;
    out[at + 3..at + 7].copy_from_slice(&size.to_be_bytes());
    out.push(FRAME_END);
}

/// As [`put`], for a method whose arguments are a user's. A method cannot be split, and one larger than the negotiated frame would end the
/// connection.
///
/// # Errors
/// [`EncodeError::MethodTooLarge`]; nothing has been written then.
pub fn try_put(
    out: &mut Vec<u8>,
    channel: u16,
    method: &Method,
    max_payload: usize,
) -> Result<(), EncodeError> {
    let at = out.len();
    put(out, channel, method);
    let len = out.len() - at - FRAME_OVERHEAD;
    if len > max_payload {
        out.truncate(at);
        let max = max_payload;
        return Err(EncodeError::MethodTooLarge { len, max });
    }
    Ok(())
}

/// Runs one of `amq-protocol`'s serializers at the end of `out`.
fn encode(
    out: &mut Vec<u8>,
    write: impl FnOnce(
        amq_protocol::frame::WriteContext<Vec<u8>>,
    ) -> amq_protocol::frame::GenResult<Vec<u8>>,
) {
    // The serializer patches lengths by position, which has to be counted from the start of what it writes into: it gets a
    // buffer of its own. These methods are rare.
    let (bytes, _) = write(Vec::new().into())
        .map(|context| context.into_inner())
        .expect("writing to a Vec does not fail");
    out.extend_from_slice(&bytes);
}

/// A table as `amq-protocol` has it, for the arguments of methods. Order and duplicates are lost.
///
/// # Errors
/// [`EncodeError::BadTable`] if it cannot be read to the end, or not by that crate.
pub fn field_table(table: Table<'_>) -> Result<FieldTable, EncodeError> {
    table.check()?;
    let mut whole = (table.as_bytes().len() as u32).to_be_bytes().to_vec();
    whole.extend_from_slice(table.as_bytes());
    match parse_field_table(whole.as_slice()) {
        Ok(([], table)) => Ok(table),
        Ok(_) | Err(_) => Err(crate::error::TableError::Truncated.into()),
    }
}

/// The encoded form of a table that came among a method's arguments.
pub fn table_buf(table: &FieldTable) -> TableBuf {
    let mut bytes = Vec::new();
    encode(&mut bytes, |context| gen_field_table(table)(context));
    bytes.drain(..4); // the length
    TableBuf::from_bytes(bytes)
}

/// A name for the arguments of a method.
///
/// # Errors
/// If it is no short string. (`ShortString::from` would panic.)
pub fn short(what: &'static str, s: &str) -> Result<ShortString, EncodeError> {
    super::hot::check_short(what, s)?;
    ShortString::try_new(s).map_err(|_| EncodeError::ShortStringTooLong { what, len: s.len() })
}

/// A reply text, cut to what a short string holds.
pub fn short_text(s: &str) -> ShortString {
    ShortString::try_new(crate::error::cut_short(s)).unwrap_or_default()
}

fn is_known(class: u16, method: u16) -> bool {
    match class {
        10 => matches!(
            method,
            10 | 11 | 20 | 21 | 30 | 31 | 40 | 41 | 50 | 51 | 60 | 61 | 70 | 71
        ),
        20 => matches!(method, 10 | 11 | 20 | 21 | 40 | 41),
        30 => matches!(method, 10 | 11),
        40 => matches!(method, 10 | 11 | 20 | 21 | 30 | 31 | 40 | 51),
        50 => matches!(method, 10 | 11 | 20 | 21 | 30 | 31 | 40 | 41 | 50 | 51),
        60 => matches!(
            method,
            10 | 11
                | 20
                | 21
                | 30
                | 31
                | 40
                | 50
                | 60
                | 70
                | 71
                | 72
                | 80
                | 90
                | 100
                | 110
                | 111
                | 120
        ),
        85 => matches!(method, 10 | 11),
        90 => matches!(method, 10 | 11 | 20 | 21 | 30 | 31),
        _ => false,
    }
}
