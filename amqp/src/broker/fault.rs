//! What the broker answers when it refuses something, in RabbitMQ's words: clients and people match on these texts.

use std::fmt::Display;

use crate::error::{ReplyCode, WireError};
use crate::wire::Value;

/// A refusal: the code says whether the channel or the connection closes, unless `hard` is set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code} {text}")]
pub(crate) struct Fault {
    pub(crate) code: ReplyCode,
    pub(crate) text: String,
    /// The class and method to blame where it is not the one being handled.
    pub(crate) blame: Option<(u16, u16)>,
    /// Close the connection even though the code is a soft one.
    pub(crate) hard: bool,
}

/// A constructor for each code that the broker uses.
macro_rules! faults {
    ($($name:ident: $code:ident;)*) => {
        $(pub(crate) fn $name(detail: impl Display) -> Self {
            Self::new(ReplyCode::$code, detail)
        })*
    };
}

impl Fault {
    pub(crate) fn new(code: ReplyCode, detail: impl Display) -> Self {
        Self {
            code,
            text: code.text(detail),
            blame: None,
            hard: !code.is_soft(),
        }
    }

    faults! {
        access_refused: ACCESS_REFUSED;
        not_found: NOT_FOUND;
        resource_locked: RESOURCE_LOCKED;
        precondition: PRECONDITION_FAILED;
        command_invalid: COMMAND_INVALID;
        channel_error: CHANNEL_ERROR;
        unexpected_frame: UNEXPECTED_FRAME;
        not_allowed: NOT_ALLOWED;
        not_implemented: NOT_IMPLEMENTED;
    }

    /// The same, on account of another method than the one being handled.
    pub(crate) fn blame(self, class: u16, method: u16) -> Self {
        Self {
            blame: Some((class, method)),
            ..self
        }
    }

    /// The same, closing the connection.
    pub(crate) fn hard(self) -> Self {
        Self { hard: true, ..self }
    }
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Self {
        Self {
            code: error.code,
            text: error.text,
            blame: Some((error.class, error.method)),
            hard: true,
        }
    }
}

/// RabbitMQ's name for the type of a table value, as its error texts have it.
pub(crate) fn type_name(value: &Value<'_>) -> &'static str {
    match value {
        Value::Bool(_) => "bool",
        Value::I8(_) => "byte",
        Value::U8(_) => "unsignedbyte",
        Value::I16(_) => "short",
        Value::U16(_) => "unsignedshort",
        Value::I32(_) => "signedint",
        Value::U32(_) => "unsignedint",
        Value::I64(_) => "long",
        Value::F32(_) => "float",
        Value::F64(_) => "double",
        Value::Decimal { .. } => "decimal",
        Value::Str(_) => "longstr",
        Value::Bytes(_) => "binary",
        Value::Timestamp(_) => "timestamp",
        Value::Array(_) => "array",
        Value::Table(_) => "table",
        Value::Void => "void",
    }
}
