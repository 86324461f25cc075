//! Functions by name, and the arguments of a message made into the types that a function wants.
//!
//! A function takes one value that serde can build: a tuple gets the positional arguments, a struct gets the keyword arguments (or
//! the positional ones in the order of its fields, as a Python call would), anything else is the one argument. What does not fit is a
//! failure of that task that says which argument is wrong; a panic is one that says where.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::time::Instant;

use serde::Serialize;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess,
    Visitor,
};
use serde_json::value::RawValue;

use crate::message::{Failure, TaskMessage, head};
use crate::outcome::{Outcome, Reason};
use crate::retry::{TaskError, TaskResult};

/// What a function can know about its run.
#[derive(Debug, Clone)]
pub struct Ctx {
    tid: String,
    attempt: u32,
    deadline: Option<Instant>,
    stop: Arc<AtomicBool>,
}

impl Ctx {
    /// The context of one run. Set `stop` to tell the function that it should end.
    #[must_use]
    pub fn new(
        tid: impl Into<String>,
        attempt: u32,
        deadline: Option<Instant>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        Self {
            tid: tid.into(),
            attempt,
            deadline,
            stop,
        }
    }

    /// Task id.
    #[must_use]
    pub fn tid(&self) -> &str {
        &self.tid
    }

    /// Which attempt this is, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// When the time limit ends; `None` without a limit.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether the function should end: its time is up. A thread cannot be stopped from outside, so long functions ask.
    #[must_use]
    pub fn cancelled(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

type Body = dyn Fn(&Ctx, Arguments<'_>) -> Outcome + Send + Sync;

/// The functions of an app.
#[derive(Clone, Default)]
pub struct Registry {
    functions: BTreeMap<String, Arc<Body>>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

impl Registry {
    /// Puts `function` under `name`; a second function of the same name replaces the first.
    pub fn add<A, R>(
        &mut self,
        name: impl Into<String>,
        function: impl Fn(&Ctx, A) -> TaskResult<R> + Send + Sync + 'static,
    ) where
        A: DeserializeOwned,
        R: Serialize,
    {
        let body = move |ctx: &Ctx, arguments: Arguments<'_>| match A::deserialize(arguments) {
            Ok(a) => outcome(function(ctx, a)),
            Err(wrong) => Outcome::Permanent(Failure::new("ArgumentError", wrong.0)),
        };
        self.functions.insert(name.into(), Arc::new(body));
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.functions.keys().map(String::as_str)
    }

    /// Whether there is a function of that name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.functions.contains_key(name)
    }

    /// Runs the function that `message` names, on this thread. A panic in it is an [`Outcome::Failed`].
    #[must_use]
    pub fn run(&self, ctx: &Ctx, message: &TaskMessage) -> Outcome {
        let Some(body) = self.functions.get(&message.func) else {
            return self.unknown(&message.func);
        };
        let arguments = match Arguments::parse(message.args(), message.kwargs()) {
            Ok(arguments) => arguments,
            Err(wrong) => return Outcome::Permanent(Failure::new("ArgumentError", wrong.0)),
        };
        note_where_panics_happen();
        catch_unwind(AssertUnwindSafe(|| body(ctx, arguments)))
            .unwrap_or_else(|panic| Outcome::Failed(panicked(&*panic)))
    }

    /// The outcome for a name that is not here, with the nearest one that is.
    #[must_use]
    pub fn unknown(&self, name: &str) -> Outcome {
        let hint = match nearest(name, self.names()) {
            Some(near) => format!(" — did you mean \"{near}\"?"),
            None => "; the app's log begins with the names that are".to_owned(),
        };
        let failure = Failure::celery(
            "NotRegistered",
            format!("function \"{name}\" is not registered{hint}"),
        );
        Outcome::Refused {
            reason: Reason::NotRegistered,
            failure: failure.bounded(),
        }
    }
}

/// The name of `names` that looks most like `name`, if one looks like it at all.
pub(crate) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .map(|candidate| {
            (
                strsim::normalized_damerau_levenshtein(name, candidate),
                candidate,
            )
        })
        .filter(|(likeness, _)| *likeness > 0.6)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

fn outcome<R: Serialize>(result: TaskResult<R>) -> Outcome {
    match result {
        Ok(value) => match serde_json::to_vec(&value) {
            Ok(json) => Outcome::Done(json),
            Err(error) => {
                Outcome::Permanent(Failure::new("ResultNotSerializable", error.to_string()))
            }
        },
        Err(error) => {
            let failure = error.failure();
            match error {
                TaskError::Retry { after, .. } => Outcome::RetryAsked { after, failure },
                TaskError::Permanent(_) => Outcome::Permanent(failure),
                TaskError::Failed(_) => Outcome::Failed(failure),
            }
        }
    }
}

thread_local! {
    static PANICKED_AT: RefCell<Option<String>> = const { RefCell::new(None) };
}

// The place of a panic is known to the hook only. Ours notes it and hands on to the hook that was there before.
fn note_where_panics_happen() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if let Some(at) = info.location() {
                let _ = PANICKED_AT.try_with(|place| *place.borrow_mut() = Some(at.to_string()));
            }
            before(info);
        }));
    });
}

fn panicked(panic: &(dyn Any + Send)) -> Failure {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "the panic carries no text".to_owned());
    let at = PANICKED_AT.with(|place| place.borrow_mut().take());
    Failure::new("Panic", text)
        .with_trace(at.map_or(String::new(), |at| format!("panicked at {at}\n")))
        .bounded()
}

/// `args` and `kwargs` of a message, each value still JSON text.
struct Arguments<'a> {
    args: Vec<&'a RawValue>,
    kwargs: BTreeMap<String, &'a RawValue>,
}

/// Which argument is wrong, and how.
#[derive(Debug, PartialEq)]
struct Wrong(String);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

impl de::Error for Wrong {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self(text.to_string())
    }
}

impl Wrong {
    fn at(place: &str, error: &serde_json::Error) -> Self {
        let text = error.to_string();
        let text = text.split(" at line ").next().unwrap_or(&text);
        let cut = head(text, 300);
        Self(format!(
            "{place}: {cut}{}",
            if cut.len() < text.len() { "…" } else { "" }
        ))
    }
}

impl<'a> Arguments<'a> {
    fn parse(args: &'a str, kwargs: &'a str) -> Result<Self, Wrong> {
        Ok(Self {
            args: serde_json::from_str(args).map_err(|e| Wrong::at("args", &e))?,
            kwargs: serde_json::from_str(kwargs).map_err(|e| Wrong::at("kwargs", &e))?,
        })
    }

    fn no_keywords(&self) -> Result<(), Wrong> {
        match self.kwargs.keys().next() {
            Some(name) => Err(Wrong(format!(
                "takes positional arguments only, got keyword argument \"{name}\""
            ))),
            None => Ok(()),
        }
    }

    fn only(self) -> Result<&'a RawValue, Wrong> {
        self.no_keywords()?;
        match self.args.as_slice() {
            [one] => Ok(one),
            args => Err(Wrong(format!("takes 1 argument, got {}", args.len()))),
        }
    }

    fn positional<V: Visitor<'a>>(
        self,
        wanted: Option<usize>,
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        self.no_keywords()?;
        if let Some(wanted) = wanted.filter(|wanted| *wanted != self.args.len()) {
            let s = if wanted == 1 { "" } else { "s" };
            return Err(Wrong(format!(
                "takes {wanted} argument{s}, got {}",
                self.args.len()
            )));
        }
        visitor.visit_seq(Positional {
            args: self.args.into_iter(),
            at: 0,
        })
    }

    // Binds as a Python call does: positional arguments take the names of the first fields.
    fn named<V: Visitor<'a>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        if self.args.len() > fields.len() {
            return Err(Wrong(format!(
                "takes at most {} arguments, got {}",
                fields.len(),
                self.args.len()
            )));
        }
        let mut entries: Vec<(String, &RawValue)> = fields
            .iter()
            .zip(self.args)
            .map(|(name, raw)| ((*name).to_owned(), raw))
            .collect();
        if let Some((name, _)) = entries
            .iter()
            .find(|(name, _)| self.kwargs.contains_key(name))
        {
            return Err(Wrong(format!(
                "got argument \"{name}\" twice, by position and by name"
            )));
        }
        entries.extend(self.kwargs);
        visitor.visit_map(Named {
            entries: entries.into_iter(),
            value: None,
        })
    }
}

struct Positional<'a> {
    args: std::vec::IntoIter<&'a RawValue>,
    at: usize,
}

impl<'a> SeqAccess<'a> for Positional<'a> {
    type Error = Wrong;

    fn next_element_seed<S: DeserializeSeed<'a>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Wrong> {
        let Some(raw) = self.args.next() else {
            return Ok(None);
        };
        self.at += 1;
        let value = seed.deserialize(&mut serde_json::Deserializer::from_str(raw.get()));
        value
            .map(Some)
            .map_err(|e| Wrong::at(&format!("argument {}", self.at), &e))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.args.len())
    }
}

struct Named<'a> {
    entries: std::vec::IntoIter<(String, &'a RawValue)>,
    value: Option<(String, &'a RawValue)>,
}

impl<'a> MapAccess<'a> for Named<'a> {
    type Error = Wrong;

    fn next_key_seed<S: DeserializeSeed<'a>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Wrong> {
        self.value = self.entries.next();
        match &self.value {
            Some((name, _)) => seed
                .deserialize(name.as_str().into_deserializer())
                .map(Some),
            None => Ok(None),
        }
    }

    fn next_value_seed<S: DeserializeSeed<'a>>(&mut self, seed: S) -> Result<S::Value, Wrong> {
        let (name, raw) = self
            .value
            .take()
            .expect("serde asks for a value after its key only");
        seed.deserialize(&mut serde_json::Deserializer::from_str(raw.get()))
            .map_err(|e| Wrong::at(&format!("argument \"{name}\""), &e))
    }
}

macro_rules! the_one_argument {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Wrong> {
            let raw = self.only()?;
            serde_json::Deserializer::from_str(raw.get()).$method(visitor).map_err(|e| Wrong::at("argument 1", &e))
        }
    )*};
}

impl<'a> Deserializer<'a> for Arguments<'a> {
    type Error = Wrong;

    the_one_argument! {
        deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128 deserialize_f32 deserialize_f64
        deserialize_char deserialize_str deserialize_string deserialize_bytes deserialize_byte_buf deserialize_identifier
    }

    fn deserialize_any<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Wrong> {
        if self.kwargs.is_empty() {
            self.positional(None, visitor)
        } else {
            self.deserialize_map(visitor)
        }
    }

    fn deserialize_option<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Wrong> {
        if self.args.is_empty() {
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        }
    }

    fn deserialize_unit<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.no_keywords()?;
        match self.args.len() {
            0 => visitor.visit_unit(),
            n => Err(Wrong(format!("takes 0 arguments, got {n}"))),
        }
    }

    fn deserialize_unit_struct<V: Visitor<'a>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'a>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.positional(None, visitor)
    }

    fn deserialize_tuple<V: Visitor<'a>>(self, len: usize, visitor: V) -> Result<V::Value, Wrong> {
        self.positional(Some(len), visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'a>>(
        self,
        _: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        self.positional(Some(len), visitor)
    }

    fn deserialize_map<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.named(&[], visitor)
    }

    fn deserialize_struct<V: Visitor<'a>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        self.named(fields, visitor)
    }

    fn deserialize_enum<V: Visitor<'a>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        let raw = self.only()?;
        serde_json::Deserializer::from_str(raw.get())
            .deserialize_enum(name, variants, visitor)
            .map_err(|e| Wrong::at("argument 1", &e))
    }

    fn deserialize_ignored_any<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Wrong> {
        visitor.visit_unit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::time::Duration;

    fn registry() -> Registry {
        #[derive(Deserialize)]
        struct Mail {
            to: String,
            subject: String,
            #[serde(default)]
            copies: u8,
        }
        let mut r = Registry::default();
        r.add("add", |_, (a, b): (i64, i64)| Ok(a + b));
        r.add("mail", |_, m: Mail| {
            Ok(format!("{}/{}/{}", m.to, m.subject, m.copies))
        });
        r.add("double", |_, n: f64| Ok(n * 2.0));
        r.add("sum", |_, all: Vec<i64>| Ok(all.iter().sum::<i64>()));
        r.add("nothing", |_, ()| Ok(()));
        r.add("maybe", |_, n: Option<u8>| Ok(n));
        r.add("parse", |_, (text,): (String,)| Ok(text.parse::<i64>()?));
        r.add("panics", |_, (text,): (String,)| -> TaskResult<()> {
            panic!("it broke: {text}")
        });
        r.add("unwritable", |_, ()| Ok(BTreeMap::from([((1, 2), 3)])));
        r.add("again", |ctx, ()| -> TaskResult<()> {
            Err(TaskError::retry_after(
                Duration::from_secs(u64::from(ctx.attempt())),
                "later",
            ))
        });
        r
    }

    fn run(func: &str, args: &str, kwargs: &str) -> Outcome {
        let body = format!(r#"{{"func":"{func}","args":{args},"kwargs":{kwargs}}}"#);
        let message = TaskMessage::decode(body.into_bytes()).expect("a good body");
        registry().run(&Ctx::new("t", 7, None, Arc::default()), &message)
    }

    fn result(func: &str, args: &str, kwargs: &str) -> String {
        match run(func, args, kwargs) {
            Outcome::Done(json) => String::from_utf8(json).unwrap(),
            other => panic!("{func}{args}{kwargs} gave {other:?}"),
        }
    }

    fn refusal(func: &str, args: &str, kwargs: &str) -> String {
        match run(func, args, kwargs) {
            Outcome::Permanent(failure) => format!("{}: {}", failure.kind, failure.message),
            other => panic!("{func}{args}{kwargs} gave {other:?}"),
        }
    }

    /// Accepts: registry/typed
    #[test]
    fn arguments_become_the_types_of_the_function() {
        assert_eq!(result("add", "[40,2]", "{}"), "42");
        assert_eq!(result("double", "[1.5]", "{}"), "3.0");
        assert_eq!(result("sum", "[1,2,3]", "{}"), "6");
        assert_eq!(result("nothing", "[]", "{}"), "null");
        assert_eq!(
            (result("maybe", "[]", "{}"), result("maybe", "[7]", "{}")),
            ("null".into(), "7".into())
        );
        assert_eq!(
            result("mail", "[]", r#"{"to":"a","subject":"b"}"#),
            "\"a/b/0\""
        );
        assert_eq!(
            result("mail", r#"["a"]"#, r#"{"subject":"b","copies":2}"#),
            "\"a/b/2\""
        );
    }

    /// Accepts: registry/typed
    #[test]
    fn a_wrong_argument_is_a_clear_failure() {
        let wrong = |func: &str, args: &str, kwargs: &str| {
            refusal(func, args, kwargs).replace("ArgumentError: ", "")
        };
        assert_eq!(
            wrong("add", r#"[1,"x"]"#, "{}"),
            "argument 2: invalid type: string \"x\", expected i64"
        );
        assert_eq!(wrong("add", "[1]", "{}"), "takes 2 arguments, got 1");
        assert_eq!(wrong("add", "[1,2,3]", "{}"), "takes 2 arguments, got 3");
        assert_eq!(
            wrong("add", "[1,2]", r#"{"c":3}"#),
            "takes positional arguments only, got keyword argument \"c\""
        );
        assert_eq!(
            wrong("double", r#"["x"]"#, "{}"),
            "argument 1: invalid type: string \"x\", expected f64"
        );
        assert_eq!(wrong("mail", r#"["a"]"#, "{}"), "missing field `subject`");
        assert_eq!(
            wrong("mail", "[]", r#"{"to":"a","subject":5}"#),
            "argument \"subject\": invalid type: integer `5`, expected a string"
        );
        assert_eq!(
            wrong("mail", r#"["a"]"#, r#"{"to":"b"}"#),
            "got argument \"to\" twice, by position and by name"
        );
        assert_eq!(
            wrong("mail", r#"["a","b",1,2]"#, "{}"),
            "takes at most 3 arguments, got 4"
        );
        assert_eq!(wrong("nothing", "[1]", "{}"), "takes 0 arguments, got 1");
        assert_eq!(wrong("add", "[1,NaN]", "{}"), "args: expected value");
        assert!(
            wrong("add", &format!("[1,\"{}\"]", "x".repeat(9999)), "{}").len() < 400,
            "the text of a peer is bounded"
        );
        assert!(
            wrong(
                "maybe",
                &format!("[{}{}]", "[".repeat(9999), "]".repeat(9999)),
                "{}"
            )
            .starts_with("argument 1: ")
        );
    }

    #[test]
    fn a_panic_is_contained_and_says_where() {
        let Outcome::Failed(failure) = run("panics", r#"["x"]"#, "{}") else {
            panic!("a failure")
        };
        assert_eq!(
            (failure.kind.as_str(), failure.message.as_str()),
            ("Panic", "it broke: x")
        );
        assert!(failure.trace.contains("registry.rs:"), "{}", failure.trace);
    }

    #[test]
    fn what_a_function_says_becomes_the_outcome() {
        let Outcome::Failed(failure) = run("parse", r#"["x"]"#, "{}") else {
            panic!("a failure")
        };
        assert_eq!(failure.kind, "ParseIntError");
        assert!(
            matches!(run("again", "[]", "{}"), Outcome::RetryAsked { after: Some(d), .. } if d.as_secs() == 7)
        );
        assert_eq!(
            refusal("unwritable", "[]", "{}"),
            "ResultNotSerializable: key must be a string"
        );
    }

    #[test]
    fn an_unknown_function_is_refused_with_the_nearest_name() {
        let Outcome::Refused { reason, failure } = run("ad", "[1,2]", "{}") else {
            panic!("a refusal")
        };
        assert_eq!(reason, Reason::NotRegistered);
        assert_eq!(
            failure.message,
            "function \"ad\" is not registered — did you mean \"add\"?"
        );
        let Outcome::Refused { failure, .. } = run("zzzzzz", "[]", "{}") else {
            panic!("a refusal")
        };
        assert_eq!(
            failure.message,
            "function \"zzzzzz\" is not registered; the app's log begins with the names that are"
        );
    }
}
