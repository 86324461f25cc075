//! Exchanges: tables that say where a publishing goes.
//!
//! All four kinds share one store, binding key -> bindings, and differ only in how a routing key is
//! looked up in it. Topic patterns are matched greedily, one pattern at a time: a trie with
//! backtracking reads nicer, but `#.a.#.a.#.a` against `a.a.a.a.b` makes it exponential, and both
//! strings come from a peer. Patterns without a wildcard are found by lookup, as in a direct exchange.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::fault::{Fault, type_name};
use crate::wire::{Table, TableBuf, Value};

/// How an exchange reads routing keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Direct,
    Fanout,
    Topic,
    Headers,
}

impl Kind {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        match name {
            "direct" => Some(Self::Direct),
            "fanout" => Some(Self::Fanout),
            "topic" => Some(Self::Topic),
            "headers" => Some(Self::Headers),
            _ => None,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Fanout => "fanout",
            Self::Topic => "topic",
            Self::Headers => "headers",
        }
    }
}

/// A queue, for as long as it lives: a slot that is used again gets a new serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct QueueId {
    pub(crate) slot: u32,
    pub(crate) serial: u32,
}

/// An exchange; like [`QueueId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ExchangeId {
    pub(crate) slot: u32,
    pub(crate) serial: u32,
}

/// Where a binding leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    Queue(QueueId),
    Exchange(ExchangeId),
}

/// What a headers binding asks of a message (RabbitMQ's `x-match`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Match {
    All { with_x: bool },
    Any { with_x: bool },
}

impl Match {
    fn parse(arguments: Table<'_>) -> Result<Self, Fault> {
        let Some(value) = arguments.get("x-match") else {
            return Ok(Self::All { with_x: false });
        };
        let Value::Str(text) = value else {
            let (found, value) = (type_name(&value), value.as_int().unwrap_or_default());
            return Err(Fault::precondition(format_args!(
                "Invalid x-match field type {found} (value {value}); expected longstr"
            )));
        };
        match text {
            b"all" => Ok(Self::All { with_x: false }),
            b"any" => Ok(Self::Any { with_x: false }),
            b"all-with-x" => Ok(Self::All { with_x: true }),
            b"any-with-x" => Ok(Self::Any { with_x: true }),
            other => {
                let found = String::from_utf8_lossy(other);
                Err(Fault::precondition(format_args!(
                    "Invalid x-match field value <<\"{found}\">>; expected all, any, all-with-x, or any-with-x"
                )))
            }
        }
    }

    /// A binding value of `Void` asks for the header's presence only.
    fn accepts(self, wanted: Table<'_>, headers: Option<Table<'_>>) -> bool {
        let with_x = match self {
            Self::All { with_x } | Self::Any { with_x } => with_x,
        };
        let mut terms = wanted
            .iter()
            .filter(|(name, _)| *name != "x-match" && (with_x || !name.starts_with("x-")))
            .map(|(name, value)| {
                headers
                    .and_then(|headers| headers.get(name))
                    .is_some_and(|found| value == Value::Void || same(&value, &found))
            });
        match self {
            Self::All { .. } => terms.all(|met| met),
            Self::Any { .. } => terms.any(|met| met),
        }
    }
}

/// RabbitMQ compares header values without their types: a short 1 is a long 1.
fn same(a: &Value<'_>, b: &Value<'_>) -> bool {
    a == b || (a.as_int().is_some() && a.as_int() == b.as_int())
}

/// One binding. The pair of key and arguments names it within its exchange and destination.
#[derive(Debug)]
struct Binding {
    to: Destination,
    arguments: TableBuf,
    /// Read from `arguments` once; `None` where headers do not matter.
    asks: Option<Match>,
}

/// An exchange and its bindings.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) id: ExchangeId,
    pub(crate) name: Rc<str>,
    pub(crate) kind: Kind,
    pub(crate) durable: bool,
    pub(crate) auto_delete: bool,
    /// Takes messages from other exchanges only.
    pub(crate) internal: bool,
    /// Where messages go that nothing here takes (`alternate-exchange`), by name: it may not exist yet.
    pub(crate) alternate: Option<Rc<str>>,
    bindings: BTreeMap<Rc<str>, Vec<Binding>>,
    /// The keys in `bindings` that hold a `*` or `#`; topic exchanges only.
    patterns: Vec<Rc<str>>,
    count: usize,
}

impl Exchange {
    pub(crate) fn new(id: ExchangeId, name: Rc<str>, kind: Kind) -> Self {
        Self {
            id,
            name,
            kind,
            durable: true,
            auto_delete: false,
            internal: false,
            alternate: None,
            bindings: BTreeMap::new(),
            patterns: Vec::new(),
            count: 0,
        }
    }

    /// Adds a binding; `false` if it was there.
    pub(crate) fn bind(
        &mut self,
        key: &str,
        to: Destination,
        arguments: TableBuf,
    ) -> Result<bool, Fault> {
        let asks = match self.kind {
            Kind::Headers => Some(Match::parse(arguments.as_table())?),
            Kind::Direct | Kind::Fanout | Kind::Topic => None,
        };
        let key = match self.bindings.get_key_value(key) {
            Some((known, _)) => known.clone(),
            None => Rc::from(key),
        };
        let same_key = self.bindings.entry(key.clone()).or_default();
        if same_key
            .iter()
            .any(|b| b.to == to && b.arguments == arguments)
        {
            return Ok(false);
        }
        if same_key.is_empty() && self.kind == Kind::Topic && has_wildcard(&key) {
            self.patterns.push(key);
        }
        same_key.push(Binding {
            to,
            arguments,
            asks,
        });
        self.count += 1;
        Ok(true)
    }

    /// Removes one binding; `false` if there was none.
    pub(crate) fn unbind(&mut self, key: &str, to: Destination, arguments: &TableBuf) -> bool {
        self.remove(key, |b| b.to == to && b.arguments == *arguments)
    }

    /// Removes every binding under `key` that leads to `to`; `false` if there was none.
    pub(crate) fn unbind_all(&mut self, key: &str, to: Destination) -> bool {
        self.remove(key, |b| b.to == to)
    }

    /// Removes every binding that leads to `to`, under whatever key.
    pub(crate) fn forget(&mut self, to: Destination) -> bool {
        let keys: Vec<Rc<str>> = self.bindings.keys().cloned().collect();
        let mut found = false;
        for key in keys {
            found |= self.unbind_all(&key, to);
        }
        found
    }

    fn remove(&mut self, key: &str, matches: impl Fn(&Binding) -> bool) -> bool {
        let Some(same_key) = self.bindings.get_mut(key) else {
            return false;
        };
        let before = same_key.len();
        same_key.retain(|b| !matches(b));
        let removed = before - same_key.len();
        self.count -= removed;
        if same_key.is_empty() {
            self.bindings.remove(key);
            self.patterns.retain(|pattern| &**pattern != key);
        }
        removed > 0
    }

    pub(crate) fn binding_count(&self) -> usize {
        self.count
    }

    /// Calls `found` for every binding that takes the message; a destination may come more than once.
    pub(crate) fn route(
        &self,
        key: &str,
        headers: Option<Table<'_>>,
        mut found: impl FnMut(Destination),
    ) {
        match self.kind {
            Kind::Direct => self.under(key).for_each(|b| found(b.to)),
            Kind::Fanout => self.bindings.values().flatten().for_each(|b| found(b.to)),
            Kind::Topic => {
                if !has_wildcard(key) {
                    self.under(key).for_each(|b| found(b.to));
                }
                for pattern in &self.patterns {
                    if topic_matches(pattern, key) {
                        self.under(pattern).for_each(|b| found(b.to));
                    }
                }
            }
            Kind::Headers => {
                for binding in self.bindings.values().flatten() {
                    let asks = binding
                        .asks
                        .expect("a binding of a headers exchange has an x-match");
                    if asks.accepts(binding.arguments.as_table(), headers) {
                        found(binding.to);
                    }
                }
            }
        }
    }

    fn under(&self, key: &str) -> impl Iterator<Item = &Binding> {
        self.bindings.get(key).into_iter().flatten()
    }
}

fn has_wildcard(key: &str) -> bool {
    key.split('.').any(|word| word == "*" || word == "#")
}

/// Whether a topic `pattern` takes `key`: `*` is one word, `#` any number of words, also none.
///
/// Only the last `#` is ever tried again, as in matching file names, so the cost is bounded by
/// words x words and nothing is allocated.
fn topic_matches(pattern: &str, key: &str) -> bool {
    let (mut pattern, mut key) = (Words::of(pattern), Words::of(key));
    let mut retry: Option<(Words<'_>, Words<'_>)> = None;
    loop {
        let (mut ahead, mut rest) = (pattern, key);
        match (ahead.next(), rest.next()) {
            (Some("#"), _) => {
                // Take no word for now; come back here and take one more when the rest fails.
                retry = Some((ahead, key));
                pattern = ahead;
                continue;
            }
            (None, None) => return true,
            (Some(want), Some(word)) if want == "*" || want == word => {
                (pattern, key) = (ahead, rest);
                continue;
            }
            (Some(_) | None, Some(_)) | (Some(_), None) => {}
        }
        let Some((after, from)) = &mut retry else {
            return false;
        };
        if from.next().is_none() {
            return false;
        }
        (pattern, key) = (*after, *from);
    }
}

/// The dot-separated words of a key.
#[derive(Clone, Copy)]
struct Words<'a>(Option<&'a str>);

impl<'a> Words<'a> {
    /// The empty key has no words; `a.` has two. RabbitMQ splits them so.
    fn of(key: &'a str) -> Self {
        Self((!key.is_empty()).then_some(key))
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let rest = self.0?;
        match rest.split_once('.') {
            Some((word, rest)) => {
                self.0 = Some(rest);
                Some(word)
            }
            None => {
                self.0 = None;
                Some(rest)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Destination = Destination::Queue(QueueId { slot: 0, serial: 0 });
    const B: Destination = Destination::Queue(QueueId { slot: 1, serial: 0 });

    fn exchange(kind: Kind) -> Exchange {
        Exchange::new(ExchangeId { slot: 0, serial: 0 }, "x".into(), kind)
    }

    fn routed(exchange: &Exchange, key: &str, headers: Option<&TableBuf>) -> Vec<Destination> {
        let mut found = Vec::new();
        exchange.route(key, headers.map(TableBuf::as_table), |to| found.push(to));
        found
    }

    fn table(entries: &[(&str, Value<'_>)]) -> TableBuf {
        let mut table = TableBuf::new();
        for (name, value) in entries {
            table.insert(name, *value).unwrap();
        }
        table
    }

    #[test]
    fn a_direct_exchange_compares_the_whole_key() {
        let mut x = exchange(Kind::Direct);
        x.bind("a.b", A, TableBuf::new()).unwrap();
        x.bind("*", B, TableBuf::new()).unwrap();
        assert_eq!(routed(&x, "a.b", None), [A]);
        assert_eq!(routed(&x, "a", None), []);
        assert_eq!(routed(&x, "*", None), [B]);
    }

    #[test]
    fn binding_twice_is_one_binding() {
        let mut x = exchange(Kind::Fanout);
        assert!(x.bind("k", A, TableBuf::new()).unwrap());
        assert!(!x.bind("k", A, TableBuf::new()).unwrap());
        assert_eq!(x.binding_count(), 1);
        assert!(x.unbind("k", A, &TableBuf::new()));
        assert!(!x.unbind("k", A, &TableBuf::new()));
        assert_eq!(routed(&x, "", None), []);
    }

    #[test]
    fn topic_patterns_of_the_specification() {
        for (pattern, key, expected) in [
            ("#", "", true),
            ("#", "a.b", true),
            ("*", "a", true),
            ("*", "a.b", false),
            ("*", "", false),
            ("", "", true),
            ("a.*", "a.", true),
            ("a.*", "a", false),
            ("a.#", "a", true),
            ("#.a", "a", true),
            ("a.#.b", "a.b", true),
            ("a.#.b", "a.x.y.b", true),
            ("a.#.b", "a.x.y.c", false),
            ("*.stock.#", "usd.stock", true),
            ("*.stock.#", "eur.stock.db", true),
            ("*.stock.#", "stock.nasdaq", false),
            ("#.#", "", true),
            ("a..b", "a..b", true),
            ("a.*.b", "a..b", true),
            ("worker.#", "worker", true),
            ("a*", "ab", false),
        ] {
            let mut x = exchange(Kind::Topic);
            x.bind(pattern, A, TableBuf::new()).unwrap();
            assert_eq!(
                routed(&x, key, None) == [A],
                expected,
                "{pattern:?} against {key:?}"
            );
        }
    }

    #[test]
    fn a_pattern_made_to_backtrack_is_still_quick() {
        let pattern = ["#.a"; 60].join(".");
        let key = ["a"; 59].join(".");
        assert!(!topic_matches(&pattern, &key));
        assert!(topic_matches(&pattern, &format!("{key}.a")));
    }

    #[test]
    fn headers_all_and_any() {
        let text = |s| Value::Str(s);
        let mut x = exchange(Kind::Headers);
        x.bind("", A, table(&[("n", Value::I32(1)), ("x-y", text(b"?"))]))
            .unwrap();
        x.bind(
            "",
            B,
            table(&[
                ("x-match", text(b"any")),
                ("n", Value::I32(1)),
                ("s", Value::Void),
            ]),
        )
        .unwrap();
        assert_eq!(
            routed(&x, "", Some(&table(&[("n", Value::I32(1))]))),
            [A, B]
        );
        assert_eq!(routed(&x, "", Some(&table(&[("n", Value::I32(2))]))), []);
        assert_eq!(
            routed(&x, "", Some(&table(&[("s", text(b"anything"))]))),
            [B]
        );
        assert_eq!(routed(&x, "", None), []);

        let mut strict = exchange(Kind::Headers);
        strict
            .bind(
                "",
                A,
                table(&[("x-match", text(b"all-with-x")), ("x-y", text(b"?"))]),
            )
            .unwrap();
        assert_eq!(routed(&strict, "", None), []);
        assert_eq!(
            routed(&strict, "", Some(&table(&[("x-y", text(b"?"))]))),
            [A]
        );
    }

    /// The definition, word by word, to compare with.
    fn by_definition(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), _) => (0..=key.len()).any(|n| by_definition(rest, &key[n..])),
            (Some((want, rest)), Some((word, words))) => {
                (*want == "*" || want == word) && by_definition(rest, words)
            }
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    proptest! {
        #[test]
        fn topic_matching_agrees_with_its_definition(
            pattern in proptest::collection::vec("[ab*#]", 1..7),
            key in proptest::collection::vec("[ab]", 1..7),
        ) {
            let (p, k): (Vec<&str>, Vec<&str>) =
                (pattern.iter().map(String::as_str).collect(), key.iter().map(String::as_str).collect());
            prop_assert_eq!(topic_matches(&pattern.join("."), &key.join(".")), by_definition(&p, &k));
        }
    }
}
