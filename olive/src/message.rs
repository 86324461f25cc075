//! The task message and the reply, as they travel: sweepea's JSON body in, a JSON object that celery's `rpc://` reads as well out.
//!
//! The delivery process never looks at a task's arguments. It decodes the envelope and remembers where in the body `args` and
//! `kwargs` stand; the worker gets the body as it came and parses it in its own language. That is faster, and it is the only way
//! to be right: Python producers write `NaN` and integers of any size, which no Rust type would carry through unharmed.

use std::borrow::Cow;
use std::ops::Range;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Longest name that AMQP can carry (a short string), in bytes. `tid` travels as correlation id, the response fields as names.
pub const MAX_NAME: usize = 255;
/// Longest text kept of a failure's message and of its trace, in bytes.
const MAX_MESSAGE: usize = 8 * 1024;
const MAX_TRACE: usize = 64 * 1024;

/// A decoded task message: the envelope's fields, and the body they were found in.
#[derive(Debug, Clone)]
pub struct TaskMessage {
    /// Name of the function, or a Python import path.
    pub func: String,
    /// Task id. Made up when the producer sent none.
    pub tid: String,
    /// How long the task may run. `None` when the message sets no limit (absent, null, zero or negative: sweepea's producers send -1).
    pub timeout: Option<Duration>,
    /// Where sweepea's producers want the reply. The other way to ask for one is the AMQP property `reply_to`.
    pub respond_to: Option<RespondTo>,
    body: Vec<u8>,
    args: Range<usize>,
    kwargs: Range<usize>,
}

/// An exchange and a routing key that a reply goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RespondTo {
    /// Exchange; empty for the default exchange, where the key names a queue.
    pub exchange: String,
    /// Routing key.
    pub routing_key: String,
}

/// A body that is not a task message, with the reason in words that name the field. The body comes back for the dead queue.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Malformed {
    /// What is wrong, for instance `field "args": must be a JSON array, found a string`.
    pub reason: String,
    /// The body as it came.
    pub body: Vec<u8>,
}

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    func: Option<&'a RawValue>,
    #[serde(borrow)]
    args: Option<&'a RawValue>,
    #[serde(borrow)]
    kwargs: Option<&'a RawValue>,
    #[serde(borrow)]
    tid: Option<&'a RawValue>,
    #[serde(borrow)]
    timeout: Option<&'a RawValue>,
    #[serde(borrow)]
    resp_exchange: Option<&'a RawValue>,
    #[serde(borrow)]
    resp_routing_key: Option<&'a RawValue>,
}

impl TaskMessage {
    /// Decodes the envelope of `body`, which must be a JSON object in UTF-8 with at least `func`. Unknown fields are left alone.
    pub fn decode(body: Vec<u8>) -> Result<Self, Malformed> {
        match parse(&body) {
            Ok(e) => Ok(Self {
                func: e.func,
                tid: e.tid.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
                timeout: e.timeout,
                respond_to: e.respond_to,
                args: e.args,
                kwargs: e.kwargs,
                body,
            }),
            Err(reason) => Err(Malformed { reason, body }),
        }
    }

    /// Encodes a new message. `args` and `kwargs` are JSON texts: an array and an object.
    #[must_use]
    pub fn encode(
        func: &str,
        args: &RawValue,
        kwargs: &RawValue,
        tid: &str,
        timeout: Option<Duration>,
    ) -> Vec<u8> {
        #[derive(Serialize)]
        struct Out<'a> {
            func: &'a str,
            args: &'a RawValue,
            kwargs: &'a RawValue,
            tid: &'a str,
            timeout: f64,
            resp_exchange: Option<&'a str>,
            resp_routing_key: Option<&'a str>,
        }
        let timeout = timeout.map_or(-1.0, |t| t.as_secs_f64());
        let out = Out {
            func,
            args,
            kwargs,
            tid,
            timeout,
            resp_exchange: None,
            resp_routing_key: None,
        };
        serde_json::to_vec(&out).expect("strings, a finite number and JSON texts always encode")
    }

    /// The body exactly as it came: what a worker, a retry and a dead letter get.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The JSON text of `args`; `[]` when the message has none.
    #[must_use]
    pub fn args(&self) -> &str {
        self.slice(&self.args, "[]")
    }

    /// The JSON text of `kwargs`; `{}` when the message has none.
    #[must_use]
    pub fn kwargs(&self) -> &str {
        self.slice(&self.kwargs, "{}")
    }

    fn slice(&self, at: &Range<usize>, absent: &'static str) -> &str {
        if at.is_empty() {
            return absent;
        }
        std::str::from_utf8(&self.body[at.clone()])
            .expect("the range was cut out of a checked UTF-8 body")
    }
}

struct Parsed {
    func: String,
    tid: Option<String>,
    timeout: Option<Duration>,
    respond_to: Option<RespondTo>,
    args: Range<usize>,
    kwargs: Range<usize>,
}

fn parse(body: &[u8]) -> Result<Parsed, String> {
    let text = std::str::from_utf8(body)
        .map_err(|e| format!("body is not UTF-8 (byte {})", e.valid_up_to()))?;
    let strict = strict(text);
    let text: &str = &strict;
    let first = text.trim_start().as_bytes().first();
    if first != Some(&b'{') {
        return Err(format!(
            "body must be a JSON object, found {}",
            kind(text.trim_start())
        ));
    }
    let fields: Fields<'_> =
        serde_json::from_str(text).map_err(|e| format!("body is not valid JSON: {e}"))?;

    let func = string("func", fields.func)?
        .ok_or("field \"func\": missing; it names the function to run")?;
    if func.is_empty() {
        return Err("field \"func\": must not be empty".into());
    }
    let exchange = string("resp_exchange", fields.resp_exchange)?;
    let routing_key = string("resp_routing_key", fields.resp_routing_key)?;
    let respond_to = match (
        exchange.unwrap_or_default(),
        routing_key.unwrap_or_default(),
    ) {
        (exchange, routing_key) if exchange.is_empty() && routing_key.is_empty() => None,
        (exchange, routing_key) => Some(RespondTo {
            exchange,
            routing_key,
        }),
    };
    Ok(Parsed {
        func,
        tid: string("tid", fields.tid)?.filter(|tid| !tid.is_empty()),
        timeout: seconds("timeout", fields.timeout)?,
        respond_to,
        args: container("args", fields.args, b'[', "array", text)?,
        kwargs: container("kwargs", fields.kwargs, b'{', "object", text)?,
    })
}

fn string(name: &str, raw: Option<&RawValue>) -> Result<Option<String>, String> {
    let Some(raw) = present(raw) else {
        return Ok(None);
    };
    let text: String = serde_json::from_str(raw)
        .map_err(|_| format!("field \"{name}\": must be a string, found {}", kind(raw)))?;
    if text.len() > MAX_NAME {
        return Err(format!(
            "field \"{name}\": {} bytes long, at most {MAX_NAME} fit",
            text.len()
        ));
    }
    Ok(Some(text))
}

fn seconds(name: &str, raw: Option<&RawValue>) -> Result<Option<Duration>, String> {
    let Some(raw) = present(raw) else {
        return Ok(None);
    };
    let seconds: f64 = serde_json::from_str(raw).map_err(|_| {
        format!(
            "field \"{name}\": must be a number of seconds, found {}",
            kind(raw)
        )
    })?;
    if seconds <= 0.0 {
        return Ok(None);
    }
    Duration::try_from_secs_f64(seconds)
        .map(Some)
        .map_err(|_| format!("field \"{name}\": {seconds} seconds is too long"))
}

fn container(
    name: &str,
    raw: Option<&RawValue>,
    open: u8,
    what: &str,
    text: &str,
) -> Result<Range<usize>, String> {
    let Some(raw) = present(raw) else {
        return Ok(0..0);
    };
    if raw.as_bytes().first() != Some(&open) {
        return Err(format!(
            "field \"{name}\": must be a JSON {what}, found {}",
            kind(raw)
        ));
    }
    let start = raw.as_ptr().addr() - text.as_ptr().addr();
    Ok(start..start + raw.len())
}

fn present(raw: Option<&RawValue>) -> Option<&str> {
    raw.map(RawValue::get).filter(|text| *text != "null")
}

fn kind(json: &str) -> &'static str {
    match json.as_bytes().first() {
        None => "nothing",
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b'"') => "a string",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') if json.starts_with("null") => "null",
        Some(b'-' | b'0'..=b'9') => "a number",
        Some(_) => "text that is not JSON",
    }
}

// Python writes NaN, Infinity and -Infinity, which JSON does not have. Each is masked by a number of the same length, so that
// serde_json accepts the text and every offset found in it also holds in the original.
fn strict(text: &str) -> Cow<'_, str> {
    const WORDS: [(&str, &str); 2] = [("NaN", "0.0"), ("Infinity", "0.000000")];
    if !WORDS.iter().any(|(word, _)| text.contains(word)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut quoted) = (text, false);
    while let Some(c) = rest.chars().next() {
        let mut taken = c.len_utf8();
        match c {
            '"' => quoted = !quoted,
            '\\' if quoted => taken += rest[1..].chars().next().map_or(0, char::len_utf8),
            'N' | 'I' if !quoted => {
                if let Some((word, mask)) = WORDS.iter().find(|(word, _)| rest.starts_with(word)) {
                    out.push_str(mask);
                    rest = &rest[word.len()..];
                    continue;
                }
            }
            _ => {}
        }
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    Cow::Owned(out)
}

/// Why a task failed, in the terms of celery's failure object.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Failure {
    /// Name of the error's type, for instance `ValueError`.
    pub kind: String,
    /// Python module of that type; `olive.exceptions` for errors of Rust functions and of olive itself.
    pub module: String,
    /// The error's text.
    pub message: String,
    /// Traceback, or the chain of causes.
    pub trace: String,
}

impl Failure {
    /// A failure of olive's own or of a Rust function.
    pub fn new(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind: kind.into(),
            module: "olive.exceptions".into(),
            message: message.into(),
            trace: String::new(),
        }
    }

    /// One that celery clients raise as their own exception class of that name.
    pub fn celery(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            module: "celery.exceptions".into(),
            ..Self::new(kind, message)
        }
    }

    /// Adds the trace.
    #[must_use]
    pub fn with_trace(mut self, trace: impl Into<String>) -> Self {
        self.trace = trace.into();
        self
    }

    /// Shortens message (its end goes) and trace (its start goes) to what a reply may carry.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        if self.message.len() > MAX_MESSAGE {
            self.message = format!("{}…", head(&self.message, MAX_MESSAGE));
        }
        if self.trace.len() > MAX_TRACE {
            let start =
                (self.trace.len() - MAX_TRACE..).find(|at| self.trace.is_char_boundary(*at));
            let start = start.expect("the end of a text is a boundary");
            self.trace = format!("…{}", &self.trace[start..]);
        }
        self.kind.truncate(head(&self.kind, MAX_NAME).len());
        self.module.truncate(head(&self.module, MAX_NAME).len());
        self
    }
}

/// The longest start of `text` that has at most `max` bytes.
pub(crate) fn head(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len()))
        .rev()
        .find(|at| text.is_char_boundary(*at));
    &text[..end.expect("the start of a text is a boundary")]
}

/// The reply's content type; celery's client fails without it.
pub const REPLY_CONTENT_TYPE: &str = "application/json";

/// Body of a reply that carries a result. `result` is a JSON text and is passed on as it is.
#[must_use]
pub fn success(tid: &str, result: &[u8], now: SystemTime) -> Vec<u8> {
    reply(tid, "SUCCESS", result, None, now)
}

/// Body of a reply that tells of a failure.
#[must_use]
pub fn failure(tid: &str, failure: &Failure, now: SystemTime) -> Vec<u8> {
    let status = if failure.kind == "TaskRevokedError" {
        "REVOKED"
    } else {
        "FAILURE"
    };
    reply(tid, status, &raised(failure), Some(&failure.trace), now)
}

/// Body of a reply that tells of an attempt that failed, while another is to come (celery's `RETRY`).
#[must_use]
pub fn retry(tid: &str, failure: &Failure, next: Next, now: SystemTime) -> Vec<u8> {
    let mut out = reply(tid, "RETRY", &raised(failure), Some(&failure.trace), now);
    out.pop();
    let Next { attempt, of, after } = next;
    let after = after.as_secs_f64();
    out.extend_from_slice(
        format!(",\"attempt\":{attempt},\"of\":{of},\"after\":{after}}}").as_bytes(),
    );
    out
}

/// Which attempt it was that failed, and when the next one comes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Next {
    /// The attempt that failed, from 1.
    pub attempt: u32,
    /// How many there will be if all the others fail the same way.
    pub of: u32,
    /// How long until the next.
    pub after: Duration,
}

fn raised(failure: &Failure) -> Vec<u8> {
    #[derive(Serialize)]
    struct Raised<'a> {
        exc_type: &'a str,
        exc_message: [&'a str; 1],
        exc_module: &'a str,
    }
    let raised = Raised {
        exc_type: &failure.kind,
        exc_message: [&failure.message],
        exc_module: &failure.module,
    };
    serde_json::to_vec(&raised).expect("strings always encode")
}

fn reply(tid: &str, status: &str, result: &[u8], trace: Option<&str>, now: SystemTime) -> Vec<u8> {
    let quoted = |text: &str| serde_json::to_string(text).expect("strings always encode");
    let date = jiff::Timestamp::try_from(now)
        .unwrap_or_default()
        .strftime("%Y-%m-%dT%H:%M:%S.%6f+00:00");
    let (trace, tid) = (trace.map_or_else(|| "null".into(), quoted), quoted(tid));
    let mut out = format!("{{\"status\":\"{status}\",\"result\":").into_bytes();
    out.extend_from_slice(result);
    out.extend_from_slice(
        format!(",\"traceback\":{trace},\"children\":[],\"date_done\":\"{date}\",\"task_id\":{tid},\"tid\":{tid}}}").as_bytes(),
    );
    out
}

/// A reply, as the one who submitted the task reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// The task it answers.
    pub tid: String,
    /// JSON text of the result, or the failure.
    pub result: Result<String, Failure>,
}

/// What a reply body says.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// The task has ended.
    End(Reply),
    /// An attempt failed, another will come. Celery's own `RETRY` does not say which and when.
    Retry(Failure, Option<Next>),
    /// The task goes on (`STARTED`, `PROGRESS`).
    News,
}

impl Reply {
    /// Decodes a reply body.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn decode(body: &[u8]) -> Result<Heard, String> {
        #[derive(Deserialize)]
        struct In<'a> {
            status: String,
            #[serde(borrow)]
            result: &'a RawValue,
            traceback: Option<String>,
            task_id: String,
            attempt: Option<u32>,
            of: Option<u32>,
            after: Option<f64>,
        }
        let text = std::str::from_utf8(body).map_err(|_| "reply is not UTF-8".to_owned())?;
        let strict = strict(text);
        let reply: In<'_> =
            serde_json::from_str(&strict).map_err(|e| format!("reply is not understood: {e}"))?;
        let tid = reply.task_id;
        match reply.status.as_str() {
            "SUCCESS" => {
                let start = reply.result.get().as_ptr().addr() - strict.as_ptr().addr();
                let result = text[start..start + reply.result.get().len()].to_owned();
                let result = Ok(result);
                Ok(Heard::End(Self { tid, result }))
            }
            "FAILURE" | "REVOKED" => {
                let result = Err(told(reply.result, reply.traceback)?);
                Ok(Heard::End(Self { tid, result }))
            }
            "RETRY" => {
                let after = reply
                    .after
                    .and_then(|s| Duration::try_from_secs_f64(s).ok());
                let next = match (reply.attempt, reply.of, after) {
                    (Some(attempt), Some(of), Some(after)) => Some(Next { attempt, of, after }),
                    _ => None,
                };
                Ok(Heard::Retry(told(reply.result, reply.traceback)?, next))
            }
            _ => Ok(Heard::News),
        }
    }
}

/// Reads celery's failure object.
fn told(result: &RawValue, trace: Option<String>) -> Result<Failure, String> {
    #[derive(Deserialize)]
    struct Raised {
        exc_type: String,
        #[serde(default)]
        exc_message: serde_json::Value,
        exc_module: Option<String>,
    }
    let raised: Raised = serde_json::from_str(result.get())
        .map_err(|e| format!("failure is not understood: {e}"))?;
    let message = match &raised.exc_message {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Array(parts) => match parts.as_slice() {
            [serde_json::Value::String(text)] => text.clone(),
            parts => parts
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", "),
        },
        other => other.to_string(),
    };
    Ok(Failure {
        kind: raised.exc_type,
        module: raised.exc_module.unwrap_or_default(),
        message,
        trace: trace.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(body: &str) -> TaskMessage {
        TaskMessage::decode(body.as_bytes().to_vec()).expect("a good body")
    }

    fn reason(body: &[u8]) -> String {
        let err = TaskMessage::decode(body.to_vec()).expect_err("a bad body");
        assert_eq!(err.body, body, "the body comes back for the dead queue");
        err.reason
    }

    // The first body is what sweepea's `OliveTaskMessage(...).to_str()` writes.
    #[test]
    fn the_body_of_sweepeas_own_producer_is_understood() {
        let m = decode(
            r#"{"func": "olive.tasks.sleep_n", "args": [10], "kwargs": {}, "tid": "5f2b", "timeout": -1, "resp_exchange": null, "resp_routing_key": null}"#,
        );
        assert_eq!(
            (m.func.as_str(), m.tid.as_str()),
            ("olive.tasks.sleep_n", "5f2b")
        );
        assert_eq!((m.args(), m.kwargs()), ("[10]", "{}"));
        assert_eq!((m.timeout, m.respond_to), (None, None));
    }

    #[test]
    fn optional_fields_may_be_absent_and_a_tid_is_made_up() {
        let (a, b) = (
            decode(r#"{"func":"f"}"#),
            decode(r#"{"func":"f","tid":null}"#),
        );
        assert_eq!((a.args(), a.kwargs(), a.timeout), ("[]", "{}", None));
        assert_eq!(a.tid.len(), 36);
        assert_ne!(a.tid, b.tid);
    }

    #[test]
    fn timeout_is_seconds_and_negative_or_zero_means_none() {
        assert_eq!(
            decode(r#"{"func":"f","timeout":1.5}"#).timeout,
            Some(Duration::from_millis(1500))
        );
        assert_eq!(decode(r#"{"func":"f","timeout":0}"#).timeout, None);
        assert_eq!(decode(r#"{"func":"f","timeout":-7.5}"#).timeout, None);
    }

    #[test]
    fn one_response_field_is_enough() {
        let to = |body| {
            decode(body)
                .respond_to
                .map(|to| (to.exchange, to.routing_key))
        };
        assert_eq!(
            to(r#"{"func":"f","resp_exchange":"x","resp_routing_key":"k"}"#),
            Some(("x".into(), "k".into()))
        );
        assert_eq!(
            to(r#"{"func":"f","resp_routing_key":"queue"}"#),
            Some((String::new(), "queue".into()))
        );
        assert_eq!(
            to(r#"{"func":"f","resp_exchange":"fan"}"#),
            Some(("fan".into(), String::new()))
        );
    }

    #[test]
    fn arguments_keep_their_bytes_even_where_json_has_no_word_for_them() {
        let body = r#"{"func":"f","args":[NaN, -Infinity, 123456789012345678901234567890, "NaN \" Infinity é"],"kwargs":{"x":Infinity}}"#;
        let m = decode(body);
        assert_eq!(
            m.args(),
            r#"[NaN, -Infinity, 123456789012345678901234567890, "NaN \" Infinity é"]"#
        );
        assert_eq!(m.kwargs(), r#"{"x":Infinity}"#);
        assert_eq!(m.body(), body.as_bytes());
    }

    #[test]
    fn a_bad_field_is_refused_by_name() {
        assert_eq!(
            reason(br#"{"args":[]}"#),
            "field \"func\": missing; it names the function to run"
        );
        assert_eq!(
            reason(br#"{"func":7}"#),
            "field \"func\": must be a string, found a number"
        );
        assert_eq!(
            reason(br#"{"func":"f","args":"x"}"#),
            "field \"args\": must be a JSON array, found a string"
        );
        assert_eq!(
            reason(br#"{"func":"f","kwargs":[]}"#),
            "field \"kwargs\": must be a JSON object, found an array"
        );
        assert_eq!(
            reason(br#"{"func":"f","timeout":"5"}"#),
            "field \"timeout\": must be a number of seconds, found a string"
        );
        assert_eq!(
            reason(br#"{"func":"f","timeout":1e300}"#),
            format!("field \"timeout\": {} seconds is too long", 1e300)
        );
        assert_eq!(
            reason(br#"[1]"#),
            "body must be a JSON object, found an array"
        );
        assert_eq!(reason(b""), "body must be a JSON object, found nothing");
        assert_eq!(reason(b"{\"func\":\"\xff\"}"), "body is not UTF-8 (byte 9)");
        assert!(reason(br#"{"func":"f""#).starts_with("body is not valid JSON: "));
        let long = format!(r#"{{"func":"f","tid":"{}"}}"#, "t".repeat(256));
        assert_eq!(
            reason(long.as_bytes()),
            "field \"tid\": 256 bytes long, at most 255 fit"
        );
    }

    #[test]
    fn deep_nesting_is_carried_without_recursion() {
        let depth = 200_000;
        let body = format!(
            r#"{{"func":"f","args":[{}{}]}}"#,
            "[".repeat(depth),
            "]".repeat(depth)
        );
        assert_eq!(decode(&body).args().len(), 2 * depth + 2);
    }

    #[test]
    fn what_encode_writes_decode_reads() {
        let raw = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        let body = TaskMessage::encode(
            "add",
            &raw("[1, 2]"),
            &raw("{\"b\":3}"),
            "t1",
            Some(Duration::from_millis(2500)),
        );
        let m = TaskMessage::decode(body).unwrap();
        assert_eq!(
            (m.func.as_str(), m.args(), m.kwargs(), m.tid.as_str()),
            ("add", "[1, 2]", "{\"b\":3}", "t1")
        );
        assert_eq!(m.timeout, Some(Duration::from_millis(2500)));
    }

    #[test]
    fn replies_carry_what_celerys_rpc_client_needs() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_micros(1_795_287_536_569_654);
        let ok: serde_json::Value = serde_json::from_slice(&success("t\"1", b"42", now)).unwrap();
        assert_eq!(
            ok,
            serde_json::json!({"status": "SUCCESS", "result": 42, "traceback": null, "children": [],
                "date_done": "2026-11-21T18:58:56.569654+00:00", "task_id": "t\"1", "tid": "t\"1"})
        );
        let failed = Failure {
            kind: "ValueError".into(),
            module: "builtins".into(),
            message: "bad".into(),
            trace: "T\n".into(),
        };
        let bad: serde_json::Value = serde_json::from_slice(&failure("t", &failed, now)).unwrap();
        assert_eq!(bad["status"], "FAILURE");
        assert_eq!(
            bad["result"],
            serde_json::json!({"exc_type": "ValueError", "exc_message": ["bad"], "exc_module": "builtins"})
        );
        assert_eq!(bad["traceback"], "T\n");
        assert_eq!(
            Reply::decode(&failure("t", &failed, now)),
            Ok(Heard::End(Reply {
                tid: "t".into(),
                result: Err(failed)
            }))
        );
    }

    #[test]
    fn a_failed_attempt_says_which_it_was_and_when_the_next_one_comes() {
        let failed = Failure::new("E", "text").with_trace("T");
        let next = Next {
            attempt: 1,
            of: 4,
            after: Duration::from_millis(1250),
        };
        let body = retry("t", &failed, next, SystemTime::UNIX_EPOCH);
        assert_eq!(Reply::decode(&body), Ok(Heard::Retry(failed, Some(next))));
        let celerys =
            br#"{"status":"RETRY","result":{"exc_type":"E"},"traceback":null,"task_id":"t"}"#;
        assert!(matches!(Reply::decode(celerys), Ok(Heard::Retry(_, None))));
    }

    #[test]
    fn a_result_that_only_python_can_write_comes_through() {
        let body = success("t", b"[NaN, \"NaN\"]", SystemTime::UNIX_EPOCH);
        let Ok(Heard::End(reply)) = Reply::decode(&body) else {
            panic!("a result")
        };
        assert_eq!(reply.result.as_deref(), Ok("[NaN, \"NaN\"]"));
    }

    #[test]
    fn news_on_the_way_is_not_a_result() {
        let body = br#"{"status":"PROGRESS","result":{"done":3},"traceback":null,"task_id":"t"}"#;
        assert_eq!(Reply::decode(body), Ok(Heard::News));
    }

    #[test]
    fn a_failure_keeps_the_start_of_its_message_and_the_end_of_its_trace() {
        let f = Failure::new("E", "é".repeat(MAX_MESSAGE))
            .with_trace(format!("{}end", "é".repeat(MAX_TRACE)))
            .bounded();
        assert!(f.message.len() <= MAX_MESSAGE + 3 && f.message.starts_with('é'));
        assert!(f.trace.len() <= MAX_TRACE + 3 && f.trace.ends_with("end"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = TaskMessage::decode(body.clone());
            let _ = Reply::decode(&body);
        }

        // Built from the tokens of a real body, so that the parser gets past the first byte.
        #[test]
        fn arbitrary_json_like_text_never_panics(parts in proptest::collection::vec(
            proptest::sample::select(vec!["{", "}", "[", "]", ",", ":", "\"", "\\", "\"func\"", "\"args\"", "\"tid\"", "\"x\"", "NaN",
                "-Infinity", "1e9", "null", " ", "é", "\\u00e9", "\"kwargs\":{}"]), 0..30)) {
            let body = parts.concat().into_bytes();
            if let Ok(m) = TaskMessage::decode(body) {
                let containers = m.args().starts_with('[') && m.kwargs().starts_with('{');
                prop_assert!(containers);
            }
        }

        #[test]
        fn masking_changes_no_offset(text in ".{0,40}", nan in any::<bool>()) {
            let text = if nan { format!("{text}NaN") } else { text };
            prop_assert_eq!(strict(&text).len(), text.len());
        }
    }
}
