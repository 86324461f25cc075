//! OWP/1: how the app and a worker process talk, without a socket in sight, and the Rust side of a worker process.
//!
//! One Unix stream socket joins the two. A frame is
//!
//! ```text
//! u32 length of what follows · u32 length of the head · head (a JSON object with "op") · blob (bytes, passed on untouched)
//! ```
//!
//! both numbers big-endian. The head is small; arguments and results travel in the blob, so nobody re-encodes them. The order is
//!
//! ```text
//! child   hello                  ready            done | fail                 …
//! app            welcome               task                     task | bye
//! ```
//!
//! One task a child at a time. A busy child sends nothing (the GIL or C code may hold it for as long as it likes): its deadline is the
//! watchdog. An idle child answers pings. End of file is the exact sign of death: it comes after the last result, so there is no waiting
//! in case one was still on its way. What a broken child sends never panics and never grows beyond `max_frame`.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::message::{Failure, TaskMessage};
use crate::outcome::Outcome;
use crate::registry::{Ctx, Registry};

/// Version of the protocol, said in `hello`.
pub const PROTOCOL: u32 = 1;
/// The environment variable that tells a program that it is a worker process, and on which descriptor.
pub const FD_VARIABLE: &str = "OLIVE_WORKER_FD";
/// The Python worker: one file without dependencies.
pub const PYTHON_WORKER: &str = include_str!("../../python/olive_worker.py");

/// Largest head in bytes: a failure's trace and what is around it.
const MAX_HEAD: usize = 1 << 20;
/// How long a child may take to say hello, and from there to say ready (imports run in that time).
const HELLO_WITHIN: Duration = Duration::from_secs(10);
const READY_WITHIN: Duration = Duration::from_secs(120);
/// An idle child is asked after this long, and must answer within that.
const PING_EVERY: Duration = Duration::from_secs(30);
const PONG_WITHIN: Duration = Duration::from_secs(10);

/// What the app says to a child.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum ToChild {
    /// Answer to hello: what the child needs before it is ready.
    Welcome {
        /// Modules whose functions may run.
        allow: Vec<String>,
        /// Modules to import now.
        preload: Vec<String>,
        /// Directories for the front of the module path.
        path: Vec<String>,
        /// Largest frame either side may send.
        max_frame: usize,
    },
    /// Run this; the blob is the body of the task message as it came.
    Task {
        /// Task id.
        tid: String,
        /// Which attempt, from 1.
        attempt: u32,
        /// Seconds until the child is killed.
        timeout: Option<f64>,
    },
    /// Answer with pong.
    Ping,
    /// No more tasks: exit with 0.
    Bye,
}

/// What a child says to the app.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum FromChild {
    /// The first frame.
    Hello {
        /// Must be [`PROTOCOL`].
        proto: u32,
        /// `rust` or `python`.
        lang: String,
        /// Version of that language's runtime, or of the program.
        ver: String,
        /// Process id.
        pid: u32,
    },
    /// Preloaded and waiting for tasks.
    Ready,
    /// Will never be ready: an import failed. The child exits after it.
    Unfit {
        /// What went wrong, traceback included.
        trace: String,
    },
    /// The task returned; the blob is its result as JSON.
    Done {
        /// Task id.
        tid: String,
        /// How long it ran, in milliseconds.
        ms: f64,
        /// Memory of the child, in KiB.
        rss_kb: u64,
    },
    /// The task did not return.
    Fail {
        /// Task id.
        tid: String,
        /// How.
        #[serde(flatten)]
        failure: Failure,
        /// What that means for further attempts.
        #[serde(default)]
        verdict: Verdict,
        /// Seconds to wait before the next attempt, where the task asked for one.
        #[serde(default)]
        after: Option<f64>,
    },
    /// Answer to ping.
    Pong,
}

/// What a failure means for further attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The policy decides.
    #[default]
    Failed,
    /// The task asks for another one.
    Retry,
    /// No further attempt can help.
    Permanent,
    /// The task ended because its time was up.
    Timeout,
    /// It never ran: no such function.
    NotRegistered,
    /// It never ran: not an allowed function.
    NotAllowed,
}

/// What is wrong with the bytes of the other side.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The frame is larger than agreed.
    #[error("frame of {0} bytes, at most {1} are allowed")]
    TooLarge(usize, usize),
    /// The lengths contradict each other.
    #[error("head of {0} bytes in a frame of {1}")]
    Lengths(usize, usize),
    /// The head is not understood.
    #[error("head not understood: {0}")]
    Head(String),
    /// The frame has no place at this point.
    #[error("{0} while {1}")]
    OutOfTurn(&'static str, &'static str),
    /// Speaks another version.
    #[error("speaks version {0} of the protocol, not {PROTOCOL}")]
    Version(u32),
}

/// Appends a frame to `out`.
pub fn encode<T: Serialize>(head: &T, blob: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; 8]);
    serde_json::to_writer(&mut *out, head).expect("heads are plain data and always encode");
    let head_len = u32::try_from(out.len() - start - 8).expect("heads are bounded");
    out.extend_from_slice(blob);
    let total = u32::try_from(out.len() - start - 4)
        .expect("frames are checked against max_frame before they are sent");
    out[start..start + 4].copy_from_slice(&total.to_be_bytes());
    out[start + 4..start + 8].copy_from_slice(&head_len.to_be_bytes());
}

/// Cuts frames out of bytes that arrive in any portions.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    taken: usize,
    max_frame: usize,
}

impl Decoder {
    /// A decoder that refuses frames larger than `max_frame` bytes as soon as their length is known.
    #[must_use]
    pub fn new(max_frame: usize) -> Self {
        Self {
            buffer: Vec::new(),
            taken: 0,
            max_frame,
        }
    }

    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` until more bytes come.
    pub fn next_frame<T: DeserializeOwned>(
        &mut self,
    ) -> Result<Option<(T, Vec<u8>)>, ProtocolError> {
        let rest = &self.buffer[self.taken..];
        let number = |at: usize| {
            rest.get(at..at + 4)
                .map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize)
        };
        let Some(total) = number(0) else {
            return Ok(None);
        };
        if total > self.max_frame {
            return Err(ProtocolError::TooLarge(total, self.max_frame));
        }
        if total < 4 {
            return Err(ProtocolError::Lengths(0, total));
        }
        let Some(head_len) = number(4) else {
            return Ok(None);
        };
        if head_len > total - 4 || head_len > MAX_HEAD {
            return Err(ProtocolError::Lengths(head_len, total));
        }
        let Some(frame) = rest.get(8..4 + total) else {
            return Ok(None);
        };
        let (head, blob) = frame.split_at(head_len);
        let head = serde_json::from_slice(head).map_err(|e| ProtocolError::Head(e.to_string()))?;
        let blob = blob.to_vec();
        self.taken += 4 + total;
        Ok(Some((head, blob)))
    }
}

/// The app's side of one child: bytes and the time come in; events, bytes and deadlines come out.
#[derive(Debug)]
pub struct Link {
    state: State,
    decoder: Decoder,
    out: VecDeque<u8>,
    welcome: ToChild,
    max_frame: usize,
}

#[derive(Debug)]
enum State {
    AwaitHello { until: Instant },
    AwaitReady { until: Instant },
    Idle { ping_at: Instant },
    AwaitPong { until: Instant },
    Busy { tid: String, limit: Option<Limit> },
    Leaving,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::AwaitHello { .. } => "waiting for hello",
            Self::AwaitReady { .. } => "waiting for ready",
            Self::Idle { .. } => "idle",
            Self::AwaitPong { .. } => "waiting for pong",
            Self::Busy { .. } => "busy",
            Self::Leaving => "leaving",
        }
    }
}

/// The time limits of one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// When the child is asked to end the task (SIGUSR1); `None` once it was.
    pub soft_at: Option<Instant>,
    /// When its process group is killed.
    pub hard_at: Instant,
    /// The limit, for the report.
    pub limit: Duration,
}

impl Limit {
    /// The limits of a run that starts now. Without a soft limit the task is asked to end when its time is up, and killed `grace` later.
    #[must_use]
    pub fn new(
        now: Instant,
        timeout: Option<Duration>,
        soft: Option<Duration>,
        grace: Duration,
    ) -> Option<Self> {
        let (soft, hard, limit) = match (timeout, soft) {
            (None, None) => return None,
            (Some(timeout), Some(soft)) if soft < timeout => (soft, timeout, timeout),
            (Some(timeout), _) => (timeout, timeout.saturating_add(grace), timeout),
            (None, Some(soft)) => (soft, soft.saturating_add(grace), soft),
        };
        // A limit beyond what the clock can say is no limit.
        Some(Self {
            soft_at: Some(now.checked_add(soft)?),
            hard_at: now.checked_add(hard)?,
            limit,
        })
    }
}

/// What the app learns from a child.
#[derive(Debug, PartialEq)]
pub enum Said {
    /// It is ready for its first task.
    Ready,
    /// It will never be; the text says why.
    Unfit(String),
    /// The task ended so; the child is free. KiB of memory it holds, where it says so.
    Ended(Outcome, u64),
}

/// What the app must do because time has passed.
#[derive(Debug, PartialEq)]
pub enum Due {
    /// Send SIGUSR1: the task shall end.
    AskToEnd,
    /// Kill the process group; the text says why. A task in it has this outcome.
    Kill(String, Option<Outcome>),
    /// Only bytes to write.
    Nothing,
}

impl Link {
    /// The link to a child that was just started.
    #[must_use]
    pub fn new(now: Instant, welcome: ToChild, max_frame: usize) -> Self {
        let state = State::AwaitHello {
            until: now + HELLO_WITHIN,
        };
        Self {
            state,
            decoder: Decoder::new(max_frame),
            out: VecDeque::new(),
            welcome,
            max_frame,
        }
    }

    /// Takes bytes from the child. After an error the child must be killed.
    pub fn feed(&mut self, bytes: &[u8], now: Instant) -> Result<Vec<Said>, ProtocolError> {
        self.decoder.push(bytes);
        let mut said = Vec::new();
        while let Some((head, blob)) = self.decoder.next_frame::<FromChild>()? {
            said.extend(self.frame(head, blob, now)?);
        }
        Ok(said)
    }

    fn frame(
        &mut self,
        head: FromChild,
        blob: Vec<u8>,
        now: Instant,
    ) -> Result<Option<Said>, ProtocolError> {
        let idle = State::Idle {
            ping_at: now + PING_EVERY,
        };
        match (&self.state, head) {
            (
                State::AwaitHello { .. },
                FromChild::Hello {
                    proto: PROTOCOL, ..
                },
            ) => {
                let welcome = self.welcome.clone();
                self.send(&welcome, &[]);
                self.state = State::AwaitReady {
                    until: now + READY_WITHIN,
                };
                Ok(None)
            }
            (State::AwaitHello { .. }, FromChild::Hello { proto, .. }) => {
                Err(ProtocolError::Version(proto))
            }
            (State::AwaitReady { .. }, FromChild::Ready) => {
                self.state = idle;
                Ok(Some(Said::Ready))
            }
            (State::AwaitReady { .. }, FromChild::Unfit { trace }) => {
                self.state = State::Leaving;
                Ok(Some(Said::Unfit(trace)))
            }
            (State::AwaitPong { .. }, FromChild::Pong) => {
                self.state = idle;
                Ok(None)
            }
            (State::Busy { .. } | State::Leaving, FromChild::Pong) => Ok(None), // asked before the task came
            (State::Busy { tid: running, .. }, FromChild::Done { tid, rss_kb, .. })
                if *running == tid =>
            {
                self.state = idle;
                Ok(Some(Said::Ended(Outcome::Done(blob), rss_kb)))
            }
            (
                State::Busy {
                    tid: running,
                    limit,
                },
                FromChild::Fail {
                    tid,
                    failure,
                    verdict,
                    after,
                },
            ) if *running == tid => {
                let outcome = failed(failure, verdict, after, limit.map(|l| l.limit));
                self.state = idle;
                Ok(Some(Said::Ended(outcome, 0)))
            }
            (state, head) => Err(ProtocolError::OutOfTurn(op(&head), state.name())),
        }
    }

    /// Whether the child can take a task.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle { .. } | State::AwaitPong { .. })
    }

    /// Whether a task of this body size fits into a frame.
    #[must_use]
    pub fn fits(&self, body: usize) -> bool {
        body + 4096 <= self.max_frame
    }

    /// Hands the child a task. It must be idle, and the body must fit.
    pub fn start(
        &mut self,
        message: &TaskMessage,
        attempt: u32,
        limit: Option<Limit>,
        now: Instant,
    ) {
        assert!(
            self.is_idle() && self.fits(message.body().len()),
            "the pool gives fitting tasks to idle children only"
        );
        let timeout = limit.map(|l| l.hard_at.saturating_duration_since(now).as_secs_f64());
        self.send(
            &ToChild::Task {
                tid: message.tid.clone(),
                attempt,
                timeout,
            },
            message.body(),
        );
        self.state = State::Busy {
            tid: message.tid.clone(),
            limit,
        };
    }

    /// Tells the child to exit. It must be idle.
    pub fn dismiss(&mut self) {
        self.send(&ToChild::Bye, &[]);
        self.state = State::Leaving;
    }

    /// When [`Link::due`] wants to be called next.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::AwaitHello { until }
            | State::AwaitReady { until }
            | State::AwaitPong { until } => Some(*until),
            State::Idle { ping_at } => Some(*ping_at),
            State::Busy { limit, .. } => limit.map(|l| l.soft_at.unwrap_or(l.hard_at)),
            State::Leaving => None,
        }
    }

    /// What to do now that time has passed.
    pub fn due(&mut self, now: Instant) -> Due {
        if self.deadline().is_none_or(|at| at > now) {
            return Due::Nothing;
        }
        match &mut self.state {
            State::AwaitHello { .. } => Due::Kill(
                format!("no hello within {} s", HELLO_WITHIN.as_secs()),
                None,
            ),
            State::AwaitReady { .. } => Due::Kill(
                format!("not ready within {} s", READY_WITHIN.as_secs()),
                None,
            ),
            State::AwaitPong { .. } => Due::Kill(
                format!("idle, and no answer within {} s", PONG_WITHIN.as_secs()),
                None,
            ),
            State::Idle { .. } => {
                self.send(&ToChild::Ping, &[]);
                self.state = State::AwaitPong {
                    until: now + PONG_WITHIN,
                };
                Due::Nothing
            }
            State::Busy {
                limit: Some(limit), ..
            } => {
                if limit.soft_at.take().is_some() {
                    return Due::AskToEnd;
                }
                let outcome = Outcome::TimedOut { limit: limit.limit };
                let why = format!("task ran longer than {} s", limit.limit.as_secs_f64());
                Due::Kill(why, Some(outcome))
            }
            State::Busy { limit: None, .. } | State::Leaving => Due::Nothing,
        }
    }

    /// The bytes to write next; not necessarily all there are.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        self.out.as_slices().0
    }

    /// Says that `n` bytes of the output were written.
    pub fn wrote(&mut self, n: usize) {
        self.out.drain(..n);
    }

    fn send(&mut self, head: &ToChild, blob: &[u8]) {
        let mut frame = Vec::with_capacity(blob.len() + 256);
        encode(head, blob, &mut frame);
        if self.out.is_empty() {
            self.out = frame.into();
        } else {
            self.out.extend(frame);
        }
    }
}

fn failed(
    failure: Failure,
    verdict: Verdict,
    after: Option<f64>,
    limit: Option<Duration>,
) -> Outcome {
    use crate::outcome::Reason;
    let failure = failure.bounded();
    match verdict {
        Verdict::Failed => Outcome::Failed(failure),
        Verdict::Retry => {
            let after = after.and_then(|s| Duration::try_from_secs_f64(s.max(0.0)).ok());
            Outcome::RetryAsked { after, failure }
        }
        Verdict::Permanent => Outcome::Permanent(failure),
        Verdict::Timeout => limit.map_or(Outcome::Failed(failure), |limit| Outcome::TimedOut {
            limit,
        }),
        Verdict::NotRegistered => Outcome::Refused {
            reason: Reason::NotRegistered,
            failure,
        },
        Verdict::NotAllowed => Outcome::Refused {
            reason: Reason::NotAllowed,
            failure,
        },
    }
}

fn op(head: &FromChild) -> &'static str {
    match head {
        FromChild::Hello { .. } => "hello",
        FromChild::Ready => "ready",
        FromChild::Unfit { .. } => "unfit",
        FromChild::Done { .. } => "done (perhaps of another task)",
        FromChild::Fail { .. } => "fail (perhaps of another task)",
        FromChild::Pong => "pong",
    }
}

/// The Rust side: runs tasks of `registry` on this thread until the app says bye or closes the socket. `stop` is set by SIGUSR1.
pub fn serve(registry: &Registry, socket: &UnixStream, stop: &Arc<AtomicBool>) -> io::Result<()> {
    let mut frames = Frames {
        socket,
        decoder: Decoder::new(usize::MAX >> 1),
        chunk: vec![0; 64 * 1024],
    };
    let (proto, ver) = (PROTOCOL, env!("CARGO_PKG_VERSION").to_owned());
    frames.send(
        &FromChild::Hello {
            proto,
            lang: "rust".into(),
            ver,
            pid: std::process::id(),
        },
        &[],
    )?;
    let max_frame = match frames.receive()? {
        Some((ToChild::Welcome { max_frame, .. }, _)) => max_frame,
        Some((other, _)) => {
            return Err(io::Error::other(format!(
                "expected a welcome, got {other:?}"
            )));
        }
        None => return Ok(()),
    };
    frames.decoder.max_frame = max_frame;
    frames.send(&FromChild::Ready, &[])?;
    while let Some((head, blob)) = frames.receive()? {
        match head {
            ToChild::Task {
                tid,
                attempt,
                timeout,
            } => {
                stop.store(false, Ordering::Relaxed);
                let started = Instant::now();
                let deadline =
                    timeout.and_then(|s| started.checked_add(Duration::try_from_secs_f64(s).ok()?));
                let ctx = Ctx::new(tid.as_str(), attempt, deadline, stop.clone());
                let outcome = match TaskMessage::decode(blob) {
                    Ok(message) => registry.run(&ctx, &message),
                    Err(malformed) => {
                        Outcome::Permanent(Failure::new("Malformed", malformed.reason))
                    }
                };
                let ms = started.elapsed().as_secs_f64() * 1000.0;
                let (head, blob) = report(tid, outcome, ms, max_frame);
                frames.send(&head, &blob)?;
            }
            ToChild::Ping => frames.send(&FromChild::Pong, &[])?,
            ToChild::Bye => return Ok(()),
            ToChild::Welcome { .. } => return Err(io::Error::other("a second welcome")),
        }
    }
    Ok(())
}

fn report(tid: String, outcome: Outcome, ms: f64, max_frame: usize) -> (FromChild, Vec<u8>) {
    let fail = |failure, verdict, after: Option<Duration>| {
        let after = after.map(|d| d.as_secs_f64());
        (
            FromChild::Fail {
                tid: tid.clone(),
                failure,
                verdict,
                after,
            },
            Vec::new(),
        )
    };
    match outcome {
        Outcome::Done(result) if result.len() + 4096 > max_frame => {
            let text = format!(
                "result of {} bytes, olive_worker_max_frame allows {max_frame}",
                result.len()
            );
            fail(
                Failure::new("ResultTooLarge", text),
                Verdict::Permanent,
                None,
            )
        }
        Outcome::Done(result) => (
            FromChild::Done {
                tid,
                ms,
                rss_kb: rss_kb(),
            },
            result,
        ),
        Outcome::Failed(failure) => fail(failure, Verdict::Failed, None),
        Outcome::RetryAsked { after, failure } => fail(failure, Verdict::Retry, after),
        Outcome::Permanent(failure) => fail(failure, Verdict::Permanent, None),
        Outcome::Refused { failure, .. } => fail(failure, Verdict::NotRegistered, None),
        Outcome::TimedOut { .. } | Outcome::Lost { .. } => {
            unreachable!("a registry's run ends by itself")
        }
    }
}

fn rss_kb() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * (rustix::param::page_size() as u64 / 1024)
}

struct Frames<'a> {
    socket: &'a UnixStream,
    decoder: Decoder,
    chunk: Vec<u8>,
}

impl Frames<'_> {
    fn send(&mut self, head: &FromChild, blob: &[u8]) -> io::Result<()> {
        let mut frame = Vec::with_capacity(blob.len() + 256);
        encode(head, blob, &mut frame);
        self.socket.write_all(&frame)
    }

    fn receive(&mut self) -> io::Result<Option<(ToChild, Vec<u8>)>> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(io::Error::other)? {
                return Ok(Some(frame));
            }
            match self.socket.read(&mut self.chunk) {
                Ok(0) => return Ok(None),
                Ok(n) => self.decoder.push(&self.chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Reason;
    use proptest::prelude::*;

    const MAX_FRAME: usize = 1 << 20;

    fn welcome() -> ToChild {
        ToChild::Welcome {
            allow: vec!["proj.tasks".into()],
            preload: vec![],
            path: vec![".".into()],
            max_frame: MAX_FRAME,
        }
    }

    fn hello(proto: u32) -> FromChild {
        FromChild::Hello {
            proto,
            lang: "python".into(),
            ver: "3.11".into(),
            pid: 7,
        }
    }

    fn done(tid: &str) -> FromChild {
        FromChild::Done {
            tid: tid.into(),
            ms: 1.5,
            rss_kb: 4096,
        }
    }

    fn fail(tid: &str, verdict: Verdict) -> FromChild {
        FromChild::Fail {
            tid: tid.into(),
            failure: Failure::new("E", "text"),
            verdict,
            after: Some(2.5),
        }
    }

    fn frame<T: Serialize>(head: &T, blob: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encode(head, blob, &mut out);
        out
    }

    fn message(tid: &str) -> TaskMessage {
        TaskMessage::decode(format!(r#"{{"func":"f","args":[1],"tid":"{tid}"}}"#).into_bytes())
            .unwrap()
    }

    fn sent(link: &mut Link) -> Vec<(ToChild, Vec<u8>)> {
        let mut decoder = Decoder::new(MAX_FRAME);
        while !link.output().is_empty() {
            let n = link.output().len();
            decoder.push(&link.output()[..n]);
            link.wrote(n);
        }
        std::iter::from_fn(|| decoder.next_frame().expect("our own frames are good")).collect()
    }

    fn idle(now: Instant) -> Link {
        let mut link = Link::new(now, welcome(), MAX_FRAME);
        assert_eq!(link.feed(&frame(&hello(1), &[]), now), Ok(vec![]));
        assert_eq!(sent(&mut link), [(welcome(), vec![])]);
        assert_eq!(
            link.feed(&frame(&FromChild::Ready, &[]), now),
            Ok(vec![Said::Ready])
        );
        link
    }

    fn busy(now: Instant, limit: Option<Limit>) -> Link {
        let mut link = idle(now);
        link.start(&message("t"), 1, limit, now);
        sent(&mut link);
        link
    }

    fn after(now: Instant, seconds: f64) -> Instant {
        now + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_frame_is_two_lengths_a_head_and_a_blob() {
        assert_eq!(
            frame(&ToChild::Ping, b"\0blob"),
            b"\0\0\0\x16\0\0\0\x0d{\"op\":\"ping\"}\0blob"
        );
    }

    #[test]
    fn a_child_comes_up_takes_a_task_and_is_free_again() {
        let now = Instant::now();
        let mut link = idle(now);
        assert!(link.is_idle());
        link.start(&message("t"), 3, None, now);
        assert!(!link.is_idle());
        let task = ToChild::Task {
            tid: "t".into(),
            attempt: 3,
            timeout: None,
        };
        assert_eq!(sent(&mut link), [(task, message("t").body().to_vec())]);
        let ended = Said::Ended(Outcome::Done(b"42".to_vec()), 4096);
        assert_eq!(link.feed(&frame(&done("t"), b"42"), now), Ok(vec![ended]));
        assert!(link.is_idle());
        link.dismiss();
        assert_eq!(sent(&mut link), [(ToChild::Bye, vec![])]);
        assert_eq!(link.deadline(), None);
    }

    #[test]
    fn what_a_failure_means_for_further_attempts_is_kept() {
        let now = Instant::now();
        let failure = Failure::new("E", "text");
        let second = Duration::from_secs(1);
        let cases = [
            (Verdict::Failed, Outcome::Failed(failure.clone())),
            (
                Verdict::Retry,
                Outcome::RetryAsked {
                    after: Some(Duration::from_millis(2500)),
                    failure: failure.clone(),
                },
            ),
            (Verdict::Permanent, Outcome::Permanent(failure.clone())),
            (Verdict::Timeout, Outcome::TimedOut { limit: second }),
            (
                Verdict::NotRegistered,
                Outcome::Refused {
                    reason: Reason::NotRegistered,
                    failure: failure.clone(),
                },
            ),
            (
                Verdict::NotAllowed,
                Outcome::Refused {
                    reason: Reason::NotAllowed,
                    failure,
                },
            ),
        ];
        for (verdict, outcome) in cases {
            let mut link = busy(now, Limit::new(now, Some(second), None, second));
            assert_eq!(
                link.feed(&frame(&fail("t", verdict), &[]), now),
                Ok(vec![Said::Ended(outcome, 0)])
            );
        }
    }

    #[test]
    fn a_task_is_asked_to_end_and_then_killed() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut link = busy(now, Limit::new(now, Some(10 * second), None, second));
        assert_eq!(link.deadline(), Some(after(now, 10.0)));
        assert_eq!(link.due(after(now, 9.9)), Due::Nothing);
        assert_eq!(link.due(after(now, 10.0)), Due::AskToEnd);
        assert_eq!(link.due(after(now, 10.0)), Due::Nothing, "it is asked once");
        let Due::Kill(_, outcome) = link.due(after(now, 11.0)) else {
            panic!("its time is up")
        };
        assert_eq!(outcome, Some(Outcome::TimedOut { limit: 10 * second }));
    }

    #[test]
    fn limits_come_from_what_is_set() {
        let now = Instant::now();
        let s = Duration::from_secs;
        let limits = |timeout, soft| {
            Limit::new(now, timeout, soft, s(1))
                .map(|l| (l.soft_at.unwrap() - now, l.hard_at - now, l.limit))
        };
        assert_eq!(limits(None, None), None);
        assert_eq!(limits(Some(s(10)), None), Some((s(10), s(11), s(10))));
        assert_eq!(limits(Some(s(10)), Some(s(7))), Some((s(7), s(10), s(10))));
        assert_eq!(
            limits(Some(s(10)), Some(s(70))),
            Some((s(10), s(11), s(10)))
        );
        assert_eq!(limits(None, Some(s(7))), Some((s(7), s(8), s(7))));
        assert_eq!(limits(Some(Duration::MAX), None), None);
    }

    #[test]
    fn an_idle_child_must_answer_and_a_busy_one_need_not() {
        let now = Instant::now();
        let mut link = idle(now);
        assert_eq!(link.due(after(now, 30.0)), Due::Nothing);
        assert_eq!(sent(&mut link), [(ToChild::Ping, vec![])]);
        assert_eq!(
            link.feed(&frame(&FromChild::Pong, &[]), after(now, 31.0)),
            Ok(vec![])
        );
        assert_eq!(link.deadline(), Some(after(now, 61.0)));
        link.due(after(now, 61.0));
        assert!(link.is_idle(), "a task may come while the pong is awaited");
        link.start(&message("t"), 1, None, after(now, 62.0));
        assert_eq!(
            link.feed(&frame(&FromChild::Pong, &[]), after(now, 63.0)),
            Ok(vec![])
        );
        assert_eq!(link.deadline(), None);

        let mut deaf = idle(now);
        deaf.due(after(now, 30.0));
        assert!(matches!(deaf.due(after(now, 40.0)), Due::Kill(_, None)));
    }

    #[test]
    fn a_child_that_does_not_come_up_is_killed() {
        let now = Instant::now();
        let mut link = Link::new(now, welcome(), MAX_FRAME);
        assert!(
            matches!(link.due(after(now, 10.0)), Due::Kill(why, None) if why == "no hello within 10 s")
        );
        assert_eq!(
            link.feed(&frame(&hello(2), &[]), now),
            Err(ProtocolError::Version(2))
        );
        let mut link = Link::new(now, welcome(), MAX_FRAME);
        link.feed(&frame(&hello(1), &[]), now).unwrap();
        let unfit = FromChild::Unfit {
            trace: "ImportError".into(),
        };
        assert_eq!(
            link.feed(&frame(&unfit, &[]), now),
            Ok(vec![Said::Unfit("ImportError".into())])
        );
    }

    #[test]
    fn an_answer_that_nobody_asked_for_is_an_error() {
        let now = Instant::now();
        let wrong = |mut link: Link, head: FromChild| {
            link.feed(&frame(&head, &[]), now).unwrap_err().to_string()
        };
        assert_eq!(
            wrong(idle(now), done("t")),
            "done (perhaps of another task) while idle"
        );
        assert_eq!(
            wrong(busy(now, None), done("other")),
            "done (perhaps of another task) while busy"
        );
        assert_eq!(wrong(idle(now), hello(1)), "hello while idle");
        assert_eq!(
            wrong(Link::new(now, welcome(), 9), FromChild::Ready),
            "frame of 18 bytes, at most 9 are allowed"
        );
    }

    #[test]
    fn impossible_lengths_are_refused_before_the_bytes_arrive() {
        let next = |bytes: &[u8]| {
            let mut decoder = Decoder::new(100);
            decoder.push(bytes);
            decoder.next_frame::<FromChild>()
        };
        assert_eq!(
            next(&[0, 0, 0, 101]),
            Err(ProtocolError::TooLarge(101, 100))
        );
        assert_eq!(
            next(&[0xff; 4]),
            Err(ProtocolError::TooLarge(0xffff_ffff, 100))
        );
        assert_eq!(next(&[0, 0, 0, 3]), Err(ProtocolError::Lengths(0, 3)));
        assert_eq!(
            next(&[0, 0, 0, 20, 0, 0, 0, 17]),
            Err(ProtocolError::Lengths(17, 20))
        );
        assert_eq!(next(&[0, 0, 0, 20, 0, 0]), Ok(None));
        assert!(matches!(
            next(b"\0\0\0\x06\0\0\0\x02[]"),
            Err(ProtocolError::Head(_))
        ));
    }

    // A session as a child sends it; any split into portions must give the same events.
    fn session() -> Vec<u8> {
        let mut bytes = frame(&hello(1), &[]);
        bytes.extend(frame(&FromChild::Ready, &[]));
        bytes.extend(frame(&done("t"), &[0, 1, 2, 255]));
        bytes
    }

    fn events(portions: &[&[u8]]) -> Vec<String> {
        let now = Instant::now();
        let mut link = Link::new(now, welcome(), MAX_FRAME);
        let mut all = Vec::new();
        for portion in portions {
            for said in link.feed(portion, now).expect("a good session") {
                if said == Said::Ready {
                    link.start(&message("t"), 1, None, now);
                }
                all.push(format!("{said:?}"));
            }
        }
        all
    }

    proptest! {
        #[test]
        fn any_split_of_a_session_gives_the_same_events(cuts in proptest::collection::vec(0_usize..1000, 0..12)) {
            // The task is started between ready and done, so the session cannot be one portion: the last frame is apart.
            let bytes = session();
            let last = bytes.len() - frame(&done("t"), &[0, 1, 2, 255]).len();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c % bytes.len()).chain([0, last, bytes.len()]).collect();
            cuts.sort_unstable();
            let portions: Vec<&[u8]> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            prop_assert_eq!(events(&portions), events(&[&bytes[..last], &bytes[last..]]));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64), sane in any::<bool>()) {
            let now = Instant::now();
            let mut bytes = bytes;
            if sane && bytes.len() > 8 {
                bytes[..3].fill(0);
                bytes[4..7].fill(0);
            }
            for mut link in [Link::new(now, welcome(), MAX_FRAME), idle(now), busy(now, None)] {
                let _ = link.feed(&bytes, now);
            }
        }

        #[test]
        fn what_encode_writes_the_decoder_reads(tid in ".{0,20}", blob in proptest::collection::vec(any::<u8>(), 0..300), cut in 0_usize..400) {
            let bytes = frame(&done(&tid), &blob);
            let (a, b) = bytes.split_at(cut.min(bytes.len()));
            let mut decoder = Decoder::new(MAX_FRAME);
            decoder.push(a);
            let early = decoder.next_frame().unwrap();
            decoder.push(b);
            let got: Option<(FromChild, Vec<u8>)> = match early { Some(frame) => Some(frame), None => decoder.next_frame().unwrap() };
            prop_assert_eq!(got, Some((done(&tid), blob)));
        }
    }

    // Runs `serve` in a thread and plays the app on the other end.
    fn with_child(
        play: impl FnOnce(&mut dyn FnMut(Option<(ToChild, &[u8])>) -> (FromChild, Vec<u8>)),
    ) {
        let mut registry = Registry::default();
        registry.add("add", |_, (a, b): (i64, i64)| Ok(a + b));
        registry.add("attempt", |ctx, ()| {
            Ok((
                ctx.tid().to_owned(),
                ctx.attempt(),
                ctx.deadline().is_some(),
            ))
        });
        registry.add("panics", |_, ()| -> crate::TaskResult<()> {
            panic!("it broke")
        });
        registry.add("big", |_, n: usize| Ok("x".repeat(n)));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = std::thread::spawn(move || serve(&registry, &theirs, &Arc::default()));
        let mut decoder = Decoder::new(MAX_FRAME);
        let mut exchange = |send: Option<(ToChild, &[u8])>| {
            if let Some((head, blob)) = send {
                (&ours).write_all(&frame(&head, blob)).unwrap();
            }
            loop {
                if let Some(frame) = decoder.next_frame().unwrap() {
                    return frame;
                }
                let mut chunk = [0; 4096];
                let n = (&ours).read(&mut chunk).unwrap();
                assert!(n > 0, "the child went away");
                decoder.push(&chunk[..n]);
            }
        };
        assert!(matches!(
            exchange(None).0,
            FromChild::Hello {
                proto: PROTOCOL,
                ..
            }
        ));
        assert_eq!(exchange(Some((welcome(), &[]))).0, FromChild::Ready);
        play(&mut exchange);
        (&ours).write_all(&frame(&ToChild::Bye, &[])).unwrap();
        child.join().unwrap().unwrap();
    }

    #[test]
    fn a_rust_child_runs_the_functions_of_its_registry() {
        with_child(|exchange| {
            let mut run = |body: &str, timeout| {
                let task = ToChild::Task {
                    tid: "t".into(),
                    attempt: 2,
                    timeout,
                };
                exchange(Some((task, body.as_bytes())))
            };
            let (head, blob) = run(r#"{"func":"add","args":[40,2]}"#, None);
            assert!(matches!(head, FromChild::Done { tid, .. } if tid == "t"));
            assert_eq!(blob, b"42");
            assert_eq!(
                run(r#"{"func":"attempt"}"#, Some(5.0)).1,
                br#"["t",2,true]"#
            );
            let verdict = |head| match head {
                FromChild::Fail {
                    failure, verdict, ..
                } => (failure.kind, verdict),
                other => panic!("{other:?}"),
            };
            assert_eq!(
                verdict(run(r#"{"func":"panics"}"#, None).0),
                ("Panic".into(), Verdict::Failed)
            );
            assert_eq!(
                verdict(run(r#"{"func":"none"}"#, None).0),
                ("NotRegistered".into(), Verdict::NotRegistered)
            );
            assert_eq!(
                verdict(run(r#"{"func":"add","args":[1]}"#, None).0),
                ("ArgumentError".into(), Verdict::Permanent)
            );
            assert_eq!(
                verdict(run(r#"{"func":"big","args":[1048576]}"#, None).0),
                ("ResultTooLarge".into(), Verdict::Permanent)
            );
            assert_eq!(
                verdict(run("nonsense", None).0),
                ("Malformed".into(), Verdict::Permanent)
            );
            assert_eq!(exchange(Some((ToChild::Ping, &[]))).0, FromChild::Pong);
        });
    }

    #[test]
    fn a_rust_child_ends_when_the_app_closes_the_socket() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child =
            std::thread::spawn(move || serve(&Registry::default(), &theirs, &Arc::default()));
        (&ours).read_exact(&mut [0; 8]).unwrap();
        drop(ours);
        let _ = child.join().expect("no panic");
    }
}
