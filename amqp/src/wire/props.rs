//! Content headers: properties, and tables in RabbitMQ's dialect.
//!
//! A header is looked into, not decoded: [`Props`] walks to the field that is asked for, [`Table`] to the key. What nobody
//! reads costs nothing and cannot fail, and a broker passes it on byte for byte. Nothing here recurses, so a table nested
//! twenty thousand deep is an error, not a stack overflow.

use super::cursor::Cursor;
use super::frame::short_header;
use super::hot::{BASIC, check_short};
use crate::error::{EncodeError, ReplyCode, TableError, WireError};

/// How deep tables and arrays may nest, the headers table itself being the first level.
pub const MAX_DEPTH: usize = 64;

/// A content header, split into its fixed fields and the properties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentHeader<'a> {
    /// The class the content belongs to; 60, basic, is the only one that has any.
    pub class: u16,
    /// How many bytes of body follow.
    pub body_size: u64,
    /// The properties, not yet looked at.
    pub props: Props<'a>,
}

impl<'a> ContentHeader<'a> {
    /// Splits the payload of a header frame.
    ///
    /// # Errors
    /// 501 if it is too short to hold the fixed fields and the property flags, 505 if the weight, of no use since AMQP 0-8, is not 0.
    #[inline]
    pub fn parse(raw: &'a [u8]) -> Result<Self, WireError> {
        let mut cursor = Cursor(raw);
        let read = |c: &mut Cursor<'a>| Some((c.u16()?, c.u16()?, c.u64()?));
        match read(&mut cursor) {
            Some((class, 0, body_size)) if cursor.0.len() >= 2 => Ok(Self {
                class,
                body_size,
                props: Props(cursor.0),
            }),
            Some((_, 0, _)) | None => Err(short_header(raw)),
            Some(_) => Err(WireError::new(
                ReplyCode::UNEXPECTED_FRAME,
                "expected content header for class 60, got non content header frame instead",
            )),
        }
    }
}

// The flags, from the top: fourteen properties, one unused bit, one that announces more flags (which no property needs).
const CONTENT_TYPE: u16 = 1 << 15;
const CONTENT_ENCODING: u16 = 1 << 14;
const HEADERS: u16 = 1 << 13;
const DELIVERY_MODE: u16 = 1 << 12;
const PRIORITY: u16 = 1 << 11;
const CORRELATION_ID: u16 = 1 << 10;
const REPLY_TO: u16 = 1 << 9;
const EXPIRATION: u16 = 1 << 8;
const MESSAGE_ID: u16 = 1 << 7;
const TIMESTAMP: u16 = 1 << 6;
const KIND: u16 = 1 << 5;
const USER_ID: u16 = 1 << 4;
const APP_ID: u16 = 1 << 3;
const CLUSTER_ID: u16 = 1 << 2;
const NOT_PROPERTIES: u16 = 0b11;

/// The properties of a message, as they came: flags and fields. An accessor answers `None` for what is absent, and for
/// everything behind a field that cannot be read; [`Props::check`] tells the two apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Props<'a>(&'a [u8]);

impl<'a> Props<'a> {
    /// No properties at all.
    pub const EMPTY: Props<'static> = Props(&[0, 0]);

    /// A view of bytes kept from an earlier [`ContentHeader`], flags first.
    pub fn from_bytes(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The bytes, flags first; what [`put_content`](super::frame::put_content) takes.
    #[inline]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.0
    }

    /// Whether all that the flags announce is there, in shape, and nothing else.
    ///
    /// Texts may be any bytes, since RabbitMQ passes on such as well: a `correlation_id` of sixteen raw bytes, say. But those that a broker
    /// acts upon, `expiration` and `user_id`, have to be UTF-8.
    ///
    /// # Errors
    /// 501, to be sent in `connection.close`.
    pub fn check(&self) -> Result<(), WireError> {
        let fault = |why: &dyn std::fmt::Display| Err(WireError::new(ReplyCode::FRAME_ERROR, why));
        let mut cursor = Cursor(self.0);
        let Some(flags) = cursor.u16() else {
            return fault(&"content header is cut short");
        };
        if flags & NOT_PROPERTIES != 0 {
            return fault(&"content header has property flags that basic does not define");
        }
        for bit in (2..16).rev().map(|n| 1 << n).filter(|bit| flags & bit != 0) {
            let Some(field) = skip(&mut cursor, bit) else {
                return fault(&"content header is cut short");
            };
            match bit {
                HEADERS => {
                    if let Err(e) = Table(field).check() {
                        return fault(&e);
                    }
                }
                EXPIRATION | USER_ID if std::str::from_utf8(field).is_err() => {
                    return fault(&"Malformed UTF-8 in shortstr");
                }
                _ => {}
            }
        }
        if !cursor.0.is_empty() {
            return fault(&"content header has bytes behind its properties");
        }
        Ok(())
    }

    /// The bytes of one property, without the length in front of them.
    #[inline]
    fn field(&self, wanted: u16) -> Option<&'a [u8]> {
        let mut cursor = Cursor(self.0);
        let flags = cursor.u16()?;
        if flags & wanted == 0 || flags & NOT_PROPERTIES != 0 {
            return None;
        }
        // Only the properties in front of the wanted one, highest bit first.
        let mut before = flags & !(wanted | (wanted - 1));
        while before != 0 {
            let bit = 1 << (15 - before.leading_zeros());
            skip(&mut cursor, bit)?;
            before &= !bit;
        }
        skip(&mut cursor, wanted)
    }

    #[inline]
    fn short_str(&self, wanted: u16) -> Option<&'a str> {
        std::str::from_utf8(self.field(wanted)?).ok()
    }

    #[inline]
    fn byte(&self, wanted: u16) -> Option<u8> {
        self.field(wanted)?.first().copied()
    }

    /// MIME type of the body.
    pub fn content_type(&self) -> Option<&'a str> {
        self.short_str(CONTENT_TYPE)
    }

    /// MIME encoding of the body.
    pub fn content_encoding(&self) -> Option<&'a str> {
        self.short_str(CONTENT_ENCODING)
    }

    /// The headers table.
    pub fn headers(&self) -> Option<Table<'a>> {
        self.field(HEADERS).map(Table)
    }

    /// One entry of the headers table, the first of that name.
    pub fn header(&self, key: &str) -> Option<Value<'a>> {
        self.headers()?.get(key)
    }

    /// 1 is transient, 2 is persistent.
    pub fn delivery_mode(&self) -> Option<u8> {
        self.byte(DELIVERY_MODE)
    }

    /// Whether the message is to survive the broker's restart.
    pub fn is_persistent(&self) -> bool {
        self.delivery_mode() == Some(2)
    }

    /// Priority in queues that have priorities, 0 to 255.
    pub fn priority(&self) -> Option<u8> {
        self.byte(PRIORITY)
    }

    /// What a reply is to repeat.
    pub fn correlation_id(&self) -> Option<&'a str> {
        self.short_str(CORRELATION_ID)
    }

    /// Where a reply is to go: a queue, as a rule.
    pub fn reply_to(&self) -> Option<&'a str> {
        self.short_str(REPLY_TO)
    }

    /// Milliseconds to live, in decimal.
    pub fn expiration(&self) -> Option<&'a str> {
        self.short_str(EXPIRATION)
    }

    /// The sender's name for the message.
    pub fn message_id(&self) -> Option<&'a str> {
        self.short_str(MESSAGE_ID)
    }

    /// When it was sent, seconds since 1970.
    pub fn timestamp(&self) -> Option<u64> {
        self.field(TIMESTAMP)?
            .try_into()
            .ok()
            .map(u64::from_be_bytes)
    }

    /// AMQP's `type`: the sender's name for the kind of message.
    pub fn kind(&self) -> Option<&'a str> {
        self.short_str(KIND)
    }

    /// Who sent it; RabbitMQ refuses any but the name logged in with.
    pub fn user_id(&self) -> Option<&'a str> {
        self.short_str(USER_ID)
    }

    /// Which program sent it.
    pub fn app_id(&self) -> Option<&'a str> {
        self.short_str(APP_ID)
    }

    /// Of no use today, but it has a flag.
    pub fn cluster_id(&self) -> Option<&'a str> {
        self.short_str(CLUSTER_ID)
    }

    /// The same but for some; the others stay as they came, byte for byte, even if we would not send their like.
    #[cfg(any(feature = "broker", test))]
    pub(crate) fn changed(&self, changes: &Changes<'_>) -> PropsBuf {
        let mut out = vec![0, 0];
        let mut fields = Fields {
            out: &mut out,
            flags: 0,
        };
        for bit in (2..16).rev().map(|n| 1 << n) {
            let field = match bit {
                HEADERS => changes.headers.map(|Table(bytes)| bytes),
                REPLY_TO => changes.reply_to.map(str::as_bytes),
                EXPIRATION if changes.no_expiration => continue,
                _ => None,
            };
            let Some(field) = field.or_else(|| self.field(bit)) else {
                continue;
            };
            match bit {
                HEADERS => fields.put(bit, &(field.len() as u32).to_be_bytes(), field),
                DELIVERY_MODE | PRIORITY | TIMESTAMP => fields.put(bit, &[], field),
                _ => fields.put(bit, &[field.len() as u8], field),
            }
        }
        let flags = fields.flags;
        out[..2].copy_from_slice(&flags.to_be_bytes());
        PropsBuf(out)
    }

    /// Appends the same with `delivery_mode` 2; what cannot be read goes as it is.
    #[cfg(any(feature = "client", test))]
    pub(crate) fn put_persistent(&self, out: &mut Vec<u8>) {
        let mut cursor = Cursor(self.0);
        let flags = cursor.u16().filter(|flags| flags & NOT_PROPERTIES == 0);
        let mut before = [CONTENT_TYPE, CONTENT_ENCODING, HEADERS].into_iter();
        let is_there = |bit| flags.is_some_and(|flags| flags & bit != 0);
        let can_be_read = before.all(|bit| !is_there(bit) || skip(&mut cursor, bit).is_some());
        let (Some(flags), true) = (flags, can_be_read) else {
            return out.extend_from_slice(self.0);
        };
        let at = self.0.len() - cursor.0.len();
        if is_there(DELIVERY_MODE) {
            let _ = skip(&mut cursor, DELIVERY_MODE);
        }
        out.extend_from_slice(&(flags | DELIVERY_MODE).to_be_bytes());
        out.extend_from_slice(&self.0[2..at]);
        out.push(2);
        out.extend_from_slice(cursor.0);
    }

    /// All at once, to change some and encode again. What is not UTF-8 is left out.
    pub fn to_properties(&self) -> Properties<'a> {
        Properties {
            content_type: self.content_type(),
            content_encoding: self.content_encoding(),
            headers: self.headers(),
            delivery_mode: self.delivery_mode(),
            priority: self.priority(),
            correlation_id: self.correlation_id(),
            reply_to: self.reply_to(),
            expiration: self.expiration(),
            message_id: self.message_id(),
            timestamp: self.timestamp(),
            kind: self.kind(),
            user_id: self.user_id(),
            app_id: self.app_id(),
            cluster_id: self.cluster_id(),
        }
    }
}

/// What [`Props::changed`] is to change.
#[cfg(any(feature = "broker", test))]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Changes<'a> {
    pub(crate) headers: Option<Table<'a>>,
    /// At most 255 bytes.
    pub(crate) reply_to: Option<&'a str>,
    pub(crate) no_expiration: bool,
}

/// Steps over one property and answers its bytes.
#[inline]
fn skip<'a>(cursor: &mut Cursor<'a>, bit: u16) -> Option<&'a [u8]> {
    match bit {
        HEADERS => cursor.long(),
        DELIVERY_MODE | PRIORITY => cursor.take(1),
        TIMESTAMP => cursor.take(8),
        _ => cursor.short(),
    }
}

/// The properties of a message to be sent.
///
/// ```
/// use amqp::wire::{Properties, Props, TableBuf};
///
/// let mut headers = TableBuf::new();
/// headers.insert("attempt", 3)?;
/// let encoded = Properties {
///     delivery_mode: Some(2),
///     headers: Some(headers.as_table()),
///     message_id: Some("m-1"),
///     ..Properties::default()
/// }
/// .encode()?;
/// assert!(encoded.as_props().is_persistent());
/// assert_eq!(encoded.as_props().header("attempt"), Some(3.into()));
/// # Ok::<(), amqp::error::EncodeError>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Properties<'a> {
    /// MIME type of the body.
    pub content_type: Option<&'a str>,
    /// MIME encoding of the body.
    pub content_encoding: Option<&'a str>,
    /// The headers table.
    pub headers: Option<Table<'a>>,
    /// 1 is transient, 2 is persistent.
    pub delivery_mode: Option<u8>,
    /// Priority in queues that have priorities.
    pub priority: Option<u8>,
    /// What a reply is to repeat.
    pub correlation_id: Option<&'a str>,
    /// Where a reply is to go.
    pub reply_to: Option<&'a str>,
    /// Milliseconds to live, in decimal.
    pub expiration: Option<&'a str>,
    /// The sender's name for the message.
    pub message_id: Option<&'a str>,
    /// Seconds since 1970.
    pub timestamp: Option<u64>,
    /// AMQP's `type`.
    pub kind: Option<&'a str>,
    /// Must be the name logged in with, or absent.
    pub user_id: Option<&'a str>,
    /// Which program sent it.
    pub app_id: Option<&'a str>,
    /// Of no use today.
    pub cluster_id: Option<&'a str>,
}

impl Properties<'_> {
    /// Encodes into a buffer of its own.
    ///
    /// # Errors
    /// See [`Properties::encode_into`].
    pub fn encode(&self) -> Result<PropsBuf, EncodeError> {
        let mut bytes = Vec::new();
        self.encode_into(&mut bytes)?;
        Ok(PropsBuf(bytes))
    }

    /// Appends flags and fields to `out`, which a publisher can use again for each message.
    ///
    /// # Errors
    /// A short string that is none, an `expiration` that is no number, headers too deep. `out` is as it was then.
    pub fn encode_into(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        if let Some(ms) = self.expiration
            && (ms.is_empty() || !ms.bytes().all(|b| b.is_ascii_digit()))
        {
            return Err(EncodeError::BadExpiration(ms.chars().take(255).collect()));
        }
        if let Some(headers) = self.headers {
            headers.check()?;
        }
        let at = out.len();
        let written = self.write(out);
        if written.is_err() {
            out.truncate(at);
        }
        written
    }

    /// Appends flags and fields, up to a short string that is none.
    #[inline]
    fn write(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let at = out.len();
        out.extend_from_slice(&[0, 0]);
        let mut fields = Fields { out, flags: 0 };
        fields.short(CONTENT_TYPE, "content_type", self.content_type)?;
        fields.short(CONTENT_ENCODING, "content_encoding", self.content_encoding)?;
        if let Some(Table(bytes)) = self.headers {
            fields.put(HEADERS, &(bytes.len() as u32).to_be_bytes(), bytes);
        }
        if let Some(mode) = self.delivery_mode {
            fields.put(DELIVERY_MODE, &[], &[mode]);
        }
        if let Some(priority) = self.priority {
            fields.put(PRIORITY, &[], &[priority]);
        }
        fields.short(CORRELATION_ID, "correlation_id", self.correlation_id)?;
        fields.short(REPLY_TO, "reply_to", self.reply_to)?;
        fields.short(EXPIRATION, "expiration", self.expiration)?;
        fields.short(MESSAGE_ID, "message_id", self.message_id)?;
        if let Some(seconds) = self.timestamp {
            fields.put(TIMESTAMP, &[], &seconds.to_be_bytes());
        }
        fields.short(KIND, "type", self.kind)?;
        fields.short(USER_ID, "user_id", self.user_id)?;
        fields.short(APP_ID, "app_id", self.app_id)?;
        fields.short(CLUSTER_ID, "cluster_id", self.cluster_id)?;
        let flags = fields.flags;
        out[at..at + 2].copy_from_slice(&flags.to_be_bytes());
        Ok(())
    }
}

/// Properties being written, and the flags of those that have been.
struct Fields<'o> {
    out: &'o mut Vec<u8>,
    flags: u16,
}

impl Fields<'_> {
    fn put(&mut self, bit: u16, length: &[u8], bytes: &[u8]) {
        self.flags |= bit;
        self.out.extend_from_slice(length);
        self.out.extend_from_slice(bytes);
    }

    #[inline]
    fn short(&mut self, bit: u16, what: &'static str, s: Option<&str>) -> Result<(), EncodeError> {
        if let Some(s) = s {
            check_short(what, s)?;
            self.put(bit, &[s.len() as u8], s.as_bytes());
        }
        Ok(())
    }
}

/// Encoded properties: flags and fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PropsBuf(Vec<u8>);

impl PropsBuf {
    /// A copy of what came off the wire.
    pub fn copy_of(props: Props<'_>) -> Self {
        Self(props.0.to_vec())
    }

    /// A view that can be read.
    pub fn as_props(&self) -> Props<'_> {
        Props(&self.0)
    }

    /// The bytes, flags first.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Default for PropsBuf {
    fn default() -> Self {
        Self(Props::EMPTY.0.to_vec())
    }
}

/// A value in a table or an array; RabbitMQ's dialect of AMQP's types. The letter of each is its byte on the wire.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// `t`
    Bool(bool),
    /// `b`
    I8(i8),
    /// `B`
    U8(u8),
    /// `s`; `U` is read as well
    I16(i16),
    /// `u`
    U16(u16),
    /// `I`
    I32(i32),
    /// `i`
    U32(u32),
    /// `l`; `L` is read as well
    I64(i64),
    /// `f`
    F32(f32),
    /// `d`
    F64(f64),
    /// `D`: `value` divided by ten to the power `scale`
    Decimal {
        /// Digits behind the point.
        scale: u8,
        /// The digits.
        value: u32,
    },
    /// `S`: any bytes, text as a rule; see [`Value::as_str`]
    Str(&'a [u8]),
    /// `x`
    Bytes(&'a [u8]),
    /// `T`: seconds since 1970
    Timestamp(u64),
    /// `A`
    Array(Array<'a>),
    /// `F`
    Table(Table<'a>),
    /// `V`
    Void,
}

impl<'a> Value<'a> {
    /// The text of an `S`, if it is UTF-8.
    pub fn as_str(&self) -> Option<&'a str> {
        match self {
            Self::Str(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// Any of the integer types, widened.
    pub fn as_int(&self) -> Option<i64> {
        Some(match *self {
            Self::I8(n) => n.into(),
            Self::U8(n) => n.into(),
            Self::I16(n) => n.into(),
            Self::U16(n) => n.into(),
            Self::I32(n) => n.into(),
            Self::U32(n) => n.into(),
            Self::I64(n) => n,
            _ => return None,
        })
    }

    /// A `t`.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(b) => Some(b),
            _ => None,
        }
    }

    /// An `F`.
    pub fn as_table(&self) -> Option<Table<'a>> {
        match *self {
            Self::Table(t) => Some(t),
            _ => None,
        }
    }

    /// An `A`.
    pub fn as_array(&self) -> Option<Array<'a>> {
        match *self {
            Self::Array(a) => Some(a),
            _ => None,
        }
    }

    /// Reads one value; nested ones are not looked into.
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, TableError> {
        let kind = cursor.u8().ok_or(TableError::Truncated)?;
        let value = match kind {
            b't' => cursor.u8().map(|b| Self::Bool(b != 0)),
            b'b' => cursor.u8().map(|n| Self::I8(n as i8)),
            b'B' => cursor.u8().map(Self::U8),
            b's' | b'U' => cursor.u16().map(|n| Self::I16(n as i16)),
            b'u' => cursor.u16().map(Self::U16),
            b'I' => cursor.u32().map(|n| Self::I32(n as i32)),
            b'i' => cursor.u32().map(Self::U32),
            b'l' | b'L' => cursor.u64().map(|n| Self::I64(n as i64)),
            b'f' => cursor.u32().map(|n| Self::F32(f32::from_bits(n))),
            b'd' => cursor.u64().map(|n| Self::F64(f64::from_bits(n))),
            b'D' => cursor
                .u8()
                .zip(cursor.u32())
                .map(|(scale, value)| Self::Decimal { scale, value }),
            b'S' => cursor.long().map(Self::Str),
            b'x' => cursor.long().map(Self::Bytes),
            b'T' => cursor.u64().map(Self::Timestamp),
            b'A' => cursor.long().map(|a| Self::Array(Array(a))),
            b'F' => cursor.long().map(|t| Self::Table(Table(t))),
            b'V' => Some(Self::Void),
            _ => return Err(TableError::UnknownType(kind)),
        };
        value.ok_or(TableError::Truncated)
    }

    fn write(&self, out: &mut Vec<u8>) {
        fn put(out: &mut Vec<u8>, kind: u8, bytes: &[u8]) {
            out.push(kind);
            out.extend_from_slice(bytes);
        }
        fn put_long(out: &mut Vec<u8>, kind: u8, bytes: &[u8]) {
            put(out, kind, &(bytes.len() as u32).to_be_bytes());
            out.extend_from_slice(bytes);
        }
        match *self {
            Self::Bool(b) => put(out, b't', &[b.into()]),
            Self::I8(n) => put(out, b'b', &n.to_be_bytes()),
            Self::U8(n) => put(out, b'B', &[n]),
            Self::I16(n) => put(out, b's', &n.to_be_bytes()),
            Self::U16(n) => put(out, b'u', &n.to_be_bytes()),
            Self::I32(n) => put(out, b'I', &n.to_be_bytes()),
            Self::U32(n) => put(out, b'i', &n.to_be_bytes()),
            Self::I64(n) => put(out, b'l', &n.to_be_bytes()),
            Self::F32(n) => put(out, b'f', &n.to_be_bytes()),
            Self::F64(n) => put(out, b'd', &n.to_be_bytes()),
            Self::Decimal { scale, value } => {
                put(out, b'D', &[scale]);
                out.extend_from_slice(&value.to_be_bytes());
            }
            Self::Str(bytes) => put_long(out, b'S', bytes),
            Self::Bytes(bytes) => put_long(out, b'x', bytes),
            Self::Timestamp(n) => put(out, b'T', &n.to_be_bytes()),
            Self::Array(Array(bytes)) => put_long(out, b'A', bytes),
            Self::Table(Table(bytes)) => put_long(out, b'F', bytes),
            Self::Void => out.push(b'V'),
        }
    }
}

impl From<bool> for Value<'_> {
    fn from(b: bool) -> Self {
        Self::Bool(b)
    }
}

impl From<i32> for Value<'_> {
    fn from(n: i32) -> Self {
        Self::I32(n)
    }
}

impl From<i64> for Value<'_> {
    fn from(n: i64) -> Self {
        Self::I64(n)
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(s: &'a str) -> Self {
        Self::Str(s.as_bytes())
    }
}

impl<'a> From<Table<'a>> for Value<'a> {
    fn from(t: Table<'a>) -> Self {
        Self::Table(t)
    }
}

impl<'a> From<Array<'a>> for Value<'a> {
    fn from(a: Array<'a>) -> Self {
        Self::Array(a)
    }
}

/// A field table, read as it is walked. Order and duplicates are what the sender made them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table<'a>(&'a [u8]);

impl<'a> Table<'a> {
    /// A view of encoded entries, without the length in front.
    pub fn from_bytes(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Entries in order. Stops at the first that cannot be read, and passes over keys that are not UTF-8; see [`Table::check`].
    pub fn iter(&self) -> TableIter<'a> {
        TableIter(Cursor(self.0))
    }

    /// The value of the first entry of that name.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        self.iter().find(|(k, _)| *k == key).map(|(_, v)| v)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The entries, encoded, without the length in front.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.0
    }

    /// Whether all of it can be read, down to [`MAX_DEPTH`] levels.
    ///
    /// # Errors
    /// The first fault.
    pub fn check(&self) -> Result<(), TableError> {
        // What is left of each container we are in. Depth is bounded, so is this.
        let mut open = [(Cursor(&[]), false); MAX_DEPTH];
        open[0] = (Cursor(self.0), true);
        let mut depth = 1;
        while depth > 0 {
            let (cursor, keyed) = &mut open[depth - 1];
            if cursor.0.is_empty() {
                depth -= 1;
                continue;
            }
            if *keyed {
                let key = cursor.short().ok_or(TableError::Truncated)?;
                std::str::from_utf8(key).map_err(|_| TableError::BadKey)?;
            }
            let inner = match Value::read(cursor)? {
                Value::Table(Table(bytes)) => (Cursor(bytes), true),
                Value::Array(Array(bytes)) => (Cursor(bytes), false),
                _ => continue,
            };
            *open.get_mut(depth).ok_or(TableError::TooDeep)? = inner;
            depth += 1;
        }
        Ok(())
    }
}

/// See [`Table::iter`].
#[derive(Clone)]
pub struct TableIter<'a>(Cursor<'a>);

impl std::fmt::Debug for TableIter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.clone()).finish()
    }
}

impl<'a> Iterator for TableIter<'a> {
    type Item = (&'a str, Value<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let key = self.0.short()?;
            let value = Value::read(&mut self.0).ok()?;
            if let Ok(key) = std::str::from_utf8(key) {
                return Some((key, value));
            }
        }
    }
}

impl<'a> IntoIterator for Table<'a> {
    type Item = (&'a str, Value<'a>);
    type IntoIter = TableIter<'a>;

    fn into_iter(self) -> TableIter<'a> {
        self.iter()
    }
}

/// A field array, read as it is walked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Array<'a>(&'a [u8]);

impl<'a> Array<'a> {
    /// The values in order, up to the first that cannot be read.
    pub fn iter(&self) -> ArrayIter<'a> {
        ArrayIter(Cursor(self.0))
    }
}

/// See [`Array::iter`].
#[derive(Clone)]
pub struct ArrayIter<'a>(Cursor<'a>);

impl std::fmt::Debug for ArrayIter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.clone()).finish()
    }
}

impl<'a> Iterator for ArrayIter<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        Value::read(&mut self.0).ok()
    }
}

impl<'a> IntoIterator for Array<'a> {
    type Item = Value<'a>;
    type IntoIter = ArrayIter<'a>;

    fn into_iter(self) -> ArrayIter<'a> {
        self.iter()
    }
}

/// A field table being written, in the order of the calls. Nested ones are written first and inserted as values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableBuf(Vec<u8>);

impl TableBuf {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an entry. A second one of the same name is kept as well; readers take the first.
    ///
    /// # Errors
    /// A key of more than 255 bytes, or with a zero byte.
    pub fn insert<'v>(
        &mut self,
        key: &str,
        value: impl Into<Value<'v>>,
    ) -> Result<&mut Self, EncodeError> {
        check_short("table key", key)?;
        Ok(self.put(key, value))
    }

    /// As [`TableBuf::insert`], for a key of at most 255 bytes: one of our own, or one that came off the wire, zero bytes and all.
    pub(crate) fn put<'v>(&mut self, key: &str, value: impl Into<Value<'v>>) -> &mut Self {
        debug_assert!(key.len() <= 255, "{key:?}");
        self.0.push(key.len() as u8);
        self.0.extend_from_slice(key.as_bytes());
        value.into().write(&mut self.0);
        self
    }

    /// A view that can be read and sent.
    pub fn as_table(&self) -> Table<'_> {
        Table(&self.0)
    }

    /// For those who have encoded entries, without the length in front.
    pub(super) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

/// A field array being written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArrayBuf(Vec<u8>);

impl ArrayBuf {
    /// An empty array.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a value.
    pub fn push<'v>(&mut self, value: impl Into<Value<'v>>) -> &mut Self {
        value.into().write(&mut self.0);
        self
    }

    /// A view that can be read and sent.
    pub fn as_array(&self) -> Array<'_> {
        Array(&self.0)
    }
}

/// The table among a method's arguments, still encoded, or `None` if the method has none or ends before it.
pub(super) fn table_in(class: u16, method: u16, args: &[u8]) -> Option<Table<'_>> {
    // How many bytes, then how many short strings, then how many bytes of flags are in front of the table.
    let (fixed, strings, flags) = match (class, method) {
        (10, 10) => (2, 0, 0),      // connection.start
        (10, 11) => (0, 0, 0),      // connection.start-ok
        (40, 10) => (2, 2, 1),      // exchange.declare
        (40, 30 | 40) => (2, 3, 1), // exchange.bind, unbind
        (50, 10) => (2, 1, 1),      // queue.declare
        (50, 20) => (2, 3, 1),      // queue.bind
        (50, 50) => (2, 3, 0),      // queue.unbind
        (BASIC, 20) => (2, 2, 1),   // basic.consume
        _ => return None,
    };
    let mut cursor = Cursor(args);
    cursor.take(fixed)?;
    for _ in 0..strings {
        cursor.short()?;
    }
    cursor.take(flags)?;
    cursor.long().map(Table)
}
