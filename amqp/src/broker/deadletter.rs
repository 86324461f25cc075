//! Dead letters: what is written on a message that leaves a queue without having been acknowledged.
//!
//! RabbitMQ's `x-death`: an array of tables, newest first, one for each pair of queue and reason, with a count.

use std::cell::Cell;
use std::rc::Rc;

use super::queue::Message;
use crate::wire::props::{ArrayBuf, Changes};
use crate::wire::{Props, PropsBuf, Table, TableBuf, Value};

/// Why a message died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Rejected,
    Expired,
    MaxLen,
    DeliveryLimit,
}

impl Reason {
    fn name(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Expired => "expired",
            Self::MaxLen => "maxlen",
            Self::DeliveryLimit => "delivery_limit",
        }
    }
}

/// A dead message, rewritten.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) props: PropsBuf,
    /// The keys it is routed by, its own first.
    pub(crate) keys: Vec<Rc<str>>,
}

impl Letter {
    /// The message to publish to the dead letter `exchange`; the body is the old one's.
    pub(crate) fn into_message(
        self,
        old: &Message,
        exchange: Rc<str>,
        memory: &Rc<Cell<usize>>,
    ) -> Message {
        let props = self.props.as_bytes();
        let mut content = Vec::with_capacity(props.len() + old.body().len());
        content.extend_from_slice(old.body());
        content.extend_from_slice(props);
        let key = self.keys[0].clone();
        let mut message = Message::new(exchange, key, content, old.body().len(), memory);
        message.persistent = old.persistent;
        message.priority = old.priority;
        message
    }
}

/// Rewrites the properties of a message that died in `queue`. `wall` is the time of day, seconds since 1970.
pub(crate) fn write(
    message: &Message,
    queue: &str,
    key: Option<&Rc<str>>,
    reason: Reason,
    wall: u64,
) -> Letter {
    let props = message.props();
    let old = props.headers().unwrap_or_default();
    let copies = carbon_copies(props);

    let mut routing_keys = ArrayBuf::new();
    routing_keys.push(&*message.routing_key);
    for copy in &copies {
        routing_keys.push(*copy);
    }

    let deaths = old
        .get("x-death")
        .and_then(|v| v.as_array())
        .unwrap_or_default();
    let same = |death: &Value<'_>| {
        death.as_table().is_some_and(|d| {
            text(d, "queue") == Some(queue) && text(d, "reason") == Some(reason.name())
        })
    };
    let before = deaths
        .iter()
        .find(|death| same(death))
        .and_then(|death| death.as_table());
    let count = before
        .and_then(|d| d.get("count")?.as_int())
        .unwrap_or(0)
        .saturating_add(1);
    let mut death = TableBuf::new();
    death.put("count", count);
    match before {
        // The rest of the first time stays.
        Some(before) => {
            for (name, value) in before.iter().filter(|(name, _)| *name != "count") {
                death.put(name, value);
            }
        }
        None => {
            death
                .put("reason", reason.name())
                .put("queue", queue)
                .put("time", Value::Timestamp(wall))
                .put("exchange", &*message.exchange)
                .put("routing-keys", routing_keys.as_array());
            if let Some(expiration) = props.expiration() {
                death.put("original-expiration", expiration);
            }
        }
    }
    let mut all = ArrayBuf::new();
    all.push(death.as_table());
    for death in deaths.iter().filter(|death| !same(death)) {
        all.push(death);
    }

    let mut headers = TableBuf::new();
    for (name, value) in old.iter() {
        // With a key of the queue's own, the copies were for the old route.
        if name != "x-death" && !(name == "BCC" || (name == "CC" && key.is_some())) {
            headers.put(name, value);
        }
    }
    headers.put("x-death", all.as_array());
    if old.get("x-first-death-reason").is_none() {
        headers
            .put("x-first-death-exchange", &*message.exchange)
            .put("x-first-death-queue", queue)
            .put("x-first-death-reason", reason.name());
    }
    let props = props.changed(&Changes {
        headers: Some(headers.as_table()),
        // It must not expire again where it is kept to be looked at.
        no_expiration: true,
        ..Changes::default()
    });

    let keys = match key {
        Some(key) => vec![key.clone()],
        None => std::iter::once(message.routing_key.clone())
            .chain(copies.into_iter().map(Rc::from))
            .collect(),
    };
    Letter { props, keys }
}

/// Whether `letter` has been in `queue` before and nobody has rejected it since.
pub(crate) fn is_cycle(letter: &Letter, queue: &str) -> bool {
    let headers = letter.props.as_props().headers().unwrap_or_default();
    let deaths = headers
        .get("x-death")
        .and_then(|v| v.as_array())
        .unwrap_or_default();
    for death in deaths.iter().filter_map(|death| death.as_table()) {
        if text(death, "reason") == Some(Reason::Rejected.name()) {
            return false;
        }
        if text(death, "queue") == Some(queue) {
            return true;
        }
    }
    false
}

/// The further routing keys in the headers `CC` and `BCC`.
pub(crate) fn carbon_copies<'a>(props: Props<'a>) -> Vec<&'a str> {
    let Some(headers) = props.headers() else {
        return Vec::new();
    };
    let mut copies = Vec::new();
    for (name, value) in headers.iter() {
        if (name == "CC" || name == "BCC")
            && let Some(array) = value.as_array()
        {
            copies.extend(array.iter().filter_map(|v| v.as_str()));
        }
    }
    copies
}

fn text<'a>(table: Table<'a>, name: &str) -> Option<&'a str> {
    table.get(name)?.as_str()
}
