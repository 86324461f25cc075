//! `olive demo`: everything at once, and a look at what became of it.
//!
//! A broker, an app and a client share one kernel in one process; the client talks to the app through the broker, over TCP as any other would.
//! Each kind of task is sent by a few senders at a time that wait for each other's replies, so that the latencies are those of
//! a system that is busy, not those of a queue.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use kernel::signal::{SIGINT, SIGTERM, SignalQueue};
use serde_json::value::RawValue;

use crate::app::{App, Either, Running, in_kernel, race, system};
use crate::config::{Config, Origin, Url};
use crate::dev::Embedded;
use crate::error::Error;
use crate::retry::{TaskError, TaskResult};
use crate::stats::Timings;
use crate::submit::{Client, Request};
use crate::topology;

/// The module that Python workers run.
const MODULE: &str = include_str!("../python/olive_demo.py");
/// How many of a kind are on their way at a time.
const SENDERS: u32 = 32;

/// Tasks of one kind, and what shall become of them.
#[derive(Debug, Clone)]
struct Kind {
    name: &'static str,
    func: &'static str,
    /// The JSON array of arguments for the n-th.
    args: fn(u32) -> String,
    expected: Expected,
    count: u32,
    timeout: Option<Duration>,
    retries: u32,
    needs_python: bool,
}

#[derive(Debug, Clone, Copy)]
enum Expected {
    /// This result for the n-th.
    Result(fn(u32) -> String),
    /// A failure of this type.
    Failure(&'static str),
}

impl Kind {
    fn new(name: &'static str, func: &'static str, count: u32, expected: Expected) -> Self {
        Self {
            name,
            func,
            args: |_| "[]".into(),
            expected,
            count: count.max(1),
            timeout: None,
            retries: 0,
            needs_python: func.starts_with("olive_demo."),
        }
    }

    fn args(self, args: fn(u32) -> String) -> Self {
        Self { args, ..self }
    }

    fn timeout(self, ms: u64) -> Self {
        let timeout = Some(Duration::from_millis(ms));
        Self { timeout, ..self }
    }

    fn retries(self, retries: u32) -> Self {
        Self { retries, ..self }
    }
}

fn kinds(tasks: u32) -> Vec<Kind> {
    use Expected::{Failure, Result};
    let null: Expected = Result(|_| "null".into());
    let share = |percent: u32| tasks / 100 * percent;
    vec![
        Kind::new(
            "quick, thread",
            "demo.add",
            share(60),
            Result(|n| (n + 2).to_string()),
        )
        .args(|n| format!("[{n}, 2]")),
        Kind::new(
            "quick, Python",
            "olive_demo.square",
            share(30),
            Result(|n| (u64::from(n) * u64::from(n)).to_string()),
        )
        .args(|n| format!("[{n}]")),
        Kind::new("slow (20 ms), thread", "demo.nap", share(4), null).args(|_| "[0.02]".into()),
        Kind::new("slow (100 ms), Python", "olive_demo.nap", share(2), null)
            .args(|_| "[0.1]".into()),
        Kind::new(
            "fails once, thread",
            "demo.second_try",
            share(1),
            Result(|_| "2".into()),
        )
        .retries(1),
        Kind::new(
            "asks for 1 s, thread",
            "demo.later",
            5,
            Result(|_| "2".into()),
        )
        .retries(1),
        Kind::new("fails, thread", "demo.fail", share(1), Failure("TaskError")).retries(1),
        Kind::new(
            "fails, Python",
            "olive_demo.fail",
            share(1),
            Failure("ValueError"),
        )
        .args(|n| format!("[\"no luck with {n}\"]")),
        Kind::new(
            "too slow (200 ms), thread",
            "demo.endless",
            8,
            Failure("TimeLimitExceeded"),
        )
        .timeout(200),
        Kind::new(
            "stuck (200 ms), Python",
            "olive_demo.stuck",
            4,
            Failure("TimeLimitExceeded"),
        )
        .timeout(200),
        Kind::new(
            "kills its worker, Python",
            "olive_demo.crash",
            4,
            Failure("WorkerLostError"),
        ),
        Kind::new("unknown function", "demo.ad", 5, Failure("NotRegistered")),
        Kind::new(
            "not allowed, Python",
            "olive_demo.os.getpid",
            5,
            Failure("NotAllowed"),
        ),
    ]
}

fn functions(app: &mut App) {
    app.task("demo.add", |_, (a, b): (i64, i64)| Ok(a + b));
    app.task("demo.nap", |_, (seconds,): (f64,)| {
        std::thread::sleep(Duration::try_from_secs_f64(seconds)?);
        Ok(())
    });
    app.task("demo.second_try", |ctx, ()| match ctx.attempt() {
        1 => Err(TaskError::retry("not at the first try")),
        attempt => Ok(attempt),
    });
    app.task("demo.later", |ctx, ()| match ctx.attempt() {
        1 => Err(TaskError::retry_after(Duration::from_secs(1), "not now")),
        attempt => Ok(attempt),
    });
    app.task("demo.fail", |_, ()| -> TaskResult<()> {
        Err(TaskError::Failed("no luck".into()))
    });
    app.task("demo.endless", |ctx, ()| -> TaskResult<()> {
        while !ctx.cancelled() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(TaskError::permanent("asked to end"))
    });
}

/// What became of the tasks of one kind.
#[derive(Debug, Default)]
struct Tally {
    outcomes: BTreeMap<String, u32>,
    timings: Timings,
    first: Option<Instant>,
    last: Option<Instant>,
}

/// Runs the demo; `say` gets every line of its report.
///
/// # Errors
/// [`Error::Unexpected`] if a task did not become what it should have; those of [`App::start`].
pub fn demo(given: &Config, tasks: u32, say: impl Fn(&str)) -> Result<(), Error> {
    in_kernel(async {
        let signals = SignalQueue::new(&[SIGTERM, SIGINT])
            .map_err(|cause| system("watching for signals", cause))?;
        match race(show(given, tasks, &say), signals.next()).await {
            Either::Left(shown) => shown,
            Either::Right(_) => Err(Error::Forced { unfinished: 0 }),
        }
    })
}

async fn show(given: &Config, tasks: u32, say: &impl Fn(&str)) -> Result<(), Error> {
    let module =
        Module::write().map_err(|cause| system("writing the demo's Python module", cause))?;
    let python = python_version(given.python.clone()).await;
    let mut config = Config::default();
    config.python.clone_from(&given.python);
    match given.origin("olive_worker_num_workers") {
        Origin::Default => config.set("olive_worker_num_workers", "4")?,
        _ => config.num_workers = given.num_workers.clone(),
    }
    // Slow kinds must not keep the quick ones of other workers from being delivered.
    config.set("olive_amqp_qos", "1000")?;
    config.set("olive_retry_base", "200ms")?;
    config.set("olive_task_max_crashes", "1")?;
    if python.is_some() {
        config.set("olive_worker_allow", "olive_demo")?;
        config.path.0 = vec![module.0.to_string_lossy().into_owned()];
    }
    let broker = Embedded::start(0)?;
    config.amqp_url = Url(broker.url());

    let workers = &config.num_workers;
    say(&format!("broker    embedded, on {}", broker.address));
    match &python {
        Some(version) => say(&format!(
            "workers   {workers} threads, {workers} processes ({version})"
        )),
        None => say(&format!(
            "workers   {workers} threads; no processes, as there is no {:?} here: the kinds that need Python are left out",
            config.python
        )),
    }
    let mut app = App::new(config.clone());
    functions(&mut app);
    let app = app.launch().await?;
    let client = Rc::new(Client::connect(&config, true).await?);

    let mut kinds = kinds(tasks);
    kinds.retain(|kind| python.is_some() || !kind.needs_python);
    let total: u32 = kinds.iter().map(|kind| kind.count).sum();
    let ended = Rc::new(Cell::new(0));
    let started = kernel::now();
    let senders: Vec<_> = kinds
        .iter()
        .map(|kind| send_all(&client, kind.clone(), ended.clone()))
        .collect();
    watch(total, &ended, &app)
        .await
        .map_err(crate::app::interrupted)?;
    let mut tallies = Vec::new();
    for (senders, tally) in senders {
        for sender in senders {
            let sent = sender.join().await;
            sent.map_err(|error| system("sending", std::io::Error::other(error.to_string())))??;
        }
        tallies.push(tally.take());
    }
    let took = (kernel::now() - started).as_secs_f64();

    let bad = table(&kinds, &mut tallies, say);
    say(&format!(
        "{total} tasks in {took:.1} s, {:.0} a second; {}",
        f64::from(total) / took,
        app.stats()
    ));
    let failed = kinds
        .iter()
        .filter(|kind| matches!(kind.expected, Expected::Failure(_)));
    let failed: u32 = failed.map(|kind| kind.count).sum();
    let left = left_over(&broker, &config);
    app.leave().await?;
    broker.stop().await;
    say(&format!(
        "left in the queue: {}; dead letters: {} of {failed}",
        left.0, left.1
    ));
    match bad {
        0 if left == (0, failed as usize) => {
            say("every outcome is the expected one");
            Ok(())
        }
        0 => Err(Error::Unexpected(
            "the queues do not hold what they should".into(),
        )),
        bad => Err(Error::Unexpected(format!(
            "{bad} kinds of tasks did not end as expected"
        ))),
    }
}

/// Messages in the queue of tasks, and in that of dead letters.
fn left_over(broker: &Embedded, config: &Config) -> (usize, usize) {
    let queue = &config.queue_name.0;
    let messages = |name: &str| broker.messages_in(name);
    (messages(queue), messages(&topology::dead(queue)))
}

type Sender = kernel::Task<Result<(), Error>>;

/// Starts the senders of one kind.
fn send_all(
    client: &Rc<Client>,
    kind: Kind,
    ended: Rc<Cell<u32>>,
) -> (Vec<Sender>, Rc<RefCell<Tally>>) {
    let tally = Rc::new(RefCell::new(Tally::default()));
    let next = Rc::new(Cell::new(0));
    let kind = Rc::new(kind);
    let sender = |_| {
        let (client, kind, tally) = (client.clone(), kind.clone(), tally.clone());
        let (next, ended) = (next.clone(), ended.clone());
        kernel::spawn(async move {
            loop {
                let n = next.get();
                if n == kind.count {
                    return Ok(());
                }
                next.set(n + 1);
                let begun = kernel::now();
                tally.borrow_mut().first.get_or_insert(begun);
                let outcome = one(&client, &kind, n).await?;
                let now = kernel::now();
                let mut tally = tally.borrow_mut();
                *tally.outcomes.entry(outcome).or_default() += 1;
                tally.timings.add(now - begun);
                tally.last = Some(now);
                ended.set(ended.get() + 1);
            }
        })
    };
    ((0..SENDERS.min(kind.count)).map(sender).collect(), tally)
}

/// Sends one task and waits for its end; one word for that.
async fn one(client: &Client, kind: &Kind, n: u32) -> Result<String, Error> {
    let args = RawValue::from_string((kind.args)(n)).expect("the arguments of the demo are JSON");
    let request = Request {
        args,
        timeout: kind.timeout,
        max_retries: Some(kind.retries),
        ..Request::new(kind.func)
    };
    let sent = client.send(&request).await?;
    match sent.wait(Some(Duration::from_secs(60)), |_, _| {}).await {
        Ok(result) => Ok(match kind.expected {
            Expected::Result(expected) if expected(n) != result => format!("wrong: {result}"),
            Expected::Result(_) | Expected::Failure(_) => "ok".into(),
        }),
        Err(Error::TaskFailed { failure, .. }) => Ok(failure.kind),
        Err(Error::WaitedTooLong { .. }) => Ok("no reply".into()),
        Err(error) => Err(error),
    }
}

/// Shows how it goes until all tasks have ended: a bar on a terminal, else a line a second.
async fn watch(total: u32, ended: &Cell<u32>, app: &Running) -> Result<(), kernel::Interrupt> {
    let bar = std::io::stderr().is_terminal().then(|| {
        let style = ProgressStyle::with_template("{bar:32} {pos}/{len} tasks, {msg} ({elapsed})");
        let bar = ProgressBar::new(u64::from(total));
        bar.with_style(style.expect("the template is well-formed"))
    });
    let (mut said, mut last, mut rate) = (kernel::now(), 0, 0.0);
    while ended.get() < total {
        kernel::sleep(Duration::from_millis(100)).await?;
        let (now, done) = (kernel::now(), ended.get());
        let since = (now - said).as_secs_f64();
        if since >= 1.0 || bar.is_some() && since >= 0.3 {
            rate = f64::from(done - last) / since;
            (said, last) = (now, done);
            if bar.is_none() {
                eprintln!(
                    "{done}/{total} tasks, {rate:.0}/s, {} running",
                    app.active()
                );
            }
        }
        if let Some(bar) = &bar {
            bar.set_position(u64::from(done));
            bar.set_message(format!("{rate:.0}/s, {} running", app.active()));
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(())
}

/// Says what became of every kind, and counts those that are not as they should be.
fn table(kinds: &[Kind], tallies: &mut [Tally], say: &impl Fn(&str)) -> usize {
    let mut bad = 0;
    let row = |cells: [&str; 7]| {
        let [kind, tasks, expected, actual, p50, p99, rate] = cells;
        say(
            format!("{kind:26} {tasks:>6}  {expected:18} {actual:24} {p50:>8} {p99:>8} {rate:>8}")
                .trim_end(),
        );
    };
    say("");
    row([
        "kind", "tasks", "expected", "actual", "p50 ms", "p99 ms", "tasks/s",
    ]);
    for (kind, tally) in kinds.iter().zip(tallies) {
        let expected = match kind.expected {
            Expected::Result(_) => "ok",
            Expected::Failure(name) => name,
        };
        let as_expected =
            tally.outcomes.len() == 1 && tally.outcomes.get(expected) == Some(&kind.count);
        let actual = match as_expected {
            true => expected.to_owned(),
            false => {
                bad += 1;
                let parts = tally
                    .outcomes
                    .iter()
                    .map(|(name, count)| format!("{count} {name}"));
                format!("{} !", parts.collect::<Vec<_>>().join(", "))
            }
        };
        let mut ms = |share| {
            let took = tally.timings.percentile(share).unwrap_or_default();
            format!("{:.1}", took.as_secs_f64() * 1000.0)
        };
        let (p50, p99) = (ms(0.5), ms(0.99));
        let span = tally
            .first
            .zip(tally.last)
            .map_or(0.0, |(first, last)| (last - first).as_secs_f64());
        let rate = format!("{:.0}", f64::from(kind.count) / span.max(1e-6));
        row([
            kind.name,
            &kind.count.to_string(),
            expected,
            &actual,
            &p50,
            &p99,
            &rate,
        ]);
    }
    say("");
    bad
}

/// What the interpreter says of itself, if there is one that is recent enough.
async fn python_version(python: String) -> Option<String> {
    let ask = move || {
        let script = "import sys; print('Python %d.%d.%d' % sys.version_info[:3]); sys.exit(sys.version_info < (3, 8))";
        let said = std::process::Command::new(python)
            .args(["-c", script])
            .output()
            .ok()?;
        let version = String::from_utf8_lossy(&said.stdout).trim().to_owned();
        said.status.success().then_some(version)
    };
    kernel::run_in_thread(ask).await.ok().flatten()
}

/// The module in a directory of its own, which goes when this is dropped.
struct Module(PathBuf);

impl Module {
    fn write() -> std::io::Result<Self> {
        let module =
            Self(std::env::temp_dir().join(format!("olive-demo-{}", uuid::Uuid::new_v4())));
        std::fs::create_dir(&module.0)?;
        std::fs::write(module.0.join("olive_demo.py"), MODULE)?;
        Ok(module)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
