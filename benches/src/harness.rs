//! What a bench is, and how its contestants are measured: one process a sample, in turns.
//!
//! A sample is a map from figure to number (`"ns" -> 15.5`). Wall time on a busy machine is noisy in one direction only, so what is timed is
//! cut into many short laps and the median lap counts; CPU time comes from getrusage and is summed over all laps.

use crate::load;
use crate::wire::Broker;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::Signal;
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
/// Figure to value, in the unit that the bench's [`Figure`] names.
pub(crate) type Sample = BTreeMap<String, f64>;

/// One piece of work that several contestants do.
pub(crate) struct Bench {
    pub(crate) name: String,
    /// One line: what is done, and what one operation is.
    pub(crate) about: &'static str,
    pub(crate) figures: &'static [Figure],
    /// Runs on the first core alone. Off where threads are part of the work.
    pub(crate) pinned: bool,
    pub(crate) needs_broker: bool,
    pub(crate) contestants: Vec<Contestant>,
}

/// A number that a sample holds.
pub(crate) struct Figure {
    pub(crate) key: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    Less,
    More,
}

pub(crate) struct Contestant {
    pub(crate) name: &'static str,
    pub(crate) side: Side,
    work: Work,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Ours,
    Peer,
    /// No competitor: the least that the work can cost, for comparison.
    Floor,
}

/// Does the whole work and returns its sample.
type Measured = Box<dyn Fn() -> Result<Sample, Error>>;
/// Serves until the process is killed; calls the argument once with the address it listens on.
type Server = fn(fn(SocketAddr)) -> Result<(), Error>;

enum Work {
    Measured(Measured),
    /// Measured from outside, by the load generator, with so many connections.
    Served(Server, usize),
}

/// The figures of most benches: what one operation takes on the clock, and how much of that is CPU.
pub(crate) const PER_OPERATION: &[Figure] = &[
    Figure {
        key: "ns",
        unit: "ns",
        better: Better::Less,
    },
    Figure {
        key: "cpu_ns",
        unit: "ns CPU",
        better: Better::Less,
    },
];

impl Bench {
    /// A bench on the first core, without contestants.
    pub(crate) fn new(
        name: impl Into<String>,
        about: &'static str,
        figures: &'static [Figure],
    ) -> Self {
        Self {
            name: name.into(),
            about,
            figures,
            pinned: true,
            needs_broker: false,
            contestants: Vec::new(),
        }
    }

    /// Lets the contestants use every core.
    pub(crate) fn on_all_cores(mut self) -> Self {
        self.pinned = false;
        self
    }

    /// Gives the contestants a RabbitMQ, see [`Broker::from_env`].
    pub(crate) fn with_broker(mut self) -> Self {
        self.needs_broker = true;
        self
    }

    pub(crate) fn ours(self, work: impl Fn() -> Result<Sample, Error> + 'static) -> Self {
        self.with("sweepea", Side::Ours, Work::Measured(Box::new(work)))
    }

    #[cfg(feature = "peers")]
    pub(crate) fn peer(
        self,
        name: &'static str,
        work: impl Fn() -> Result<Sample, Error> + 'static,
    ) -> Self {
        self.with(name, Side::Peer, Work::Measured(Box::new(work)))
    }

    /// Adds a server that the load generator will talk to over `connections` connections.
    pub(crate) fn server(
        self,
        name: &'static str,
        side: Side,
        connections: usize,
        server: Server,
    ) -> Self {
        self.with(name, side, Work::Served(server, connections))
    }

    fn with(mut self, name: &'static str, side: Side, work: Work) -> Self {
        self.contestants.push(Contestant { name, side, work });
        self
    }
}

// ---------------------------------------------------------------------------------------------------------------- the run, in the parent

/// What the rounds of one bench gave.
pub(crate) struct BenchResult {
    pub(crate) bench: String,
    /// In the order of the bench's contestants.
    pub(crate) contestants: Vec<ContestantResult>,
}

#[derive(Serialize)]
pub(crate) struct ContestantResult {
    pub(crate) name: &'static str,
    #[serde(skip)]
    pub(crate) side: Side,
    pub(crate) samples: Vec<Sample>,
    /// Why it could not be measured, when it could not.
    pub(crate) missing: Option<String>,
}

/// The line that a measuring process prints.
#[derive(Serialize, Deserialize)]
enum Line {
    Sample(Sample),
    Missing(String),
}

/// The benches that `names` choose (all, if empty), with the contestants that `only` chooses.
pub(crate) fn select(
    benches: Vec<Bench>,
    names: &[String],
    only: &[String],
) -> Result<Vec<Bench>, Error> {
    for name in names {
        if !benches.iter().any(|bench| bench.name.starts_with(name)) {
            return Err(format!("no bench is called {name}; --list shows them").into());
        }
    }
    // A full name means that bench alone, though others may begin with it.
    let chosen = |bench: &Bench| {
        names.is_empty()
            || names.iter().any(|name| match is_full_name(&benches, name) {
                true => bench.name == *name,
                false => bench.name.starts_with(name),
            })
    };
    let keep: Vec<bool> = benches.iter().map(chosen).collect();
    let mut benches: Vec<Bench> = benches
        .into_iter()
        .zip(keep)
        .filter_map(|(bench, keep)| keep.then_some(bench))
        .collect();
    if !only.is_empty() {
        for bench in &mut benches {
            bench
                .contestants
                .retain(|it| only.iter().any(|prefix| it.name.starts_with(prefix)));
        }
    }
    benches.retain(|bench| !bench.contestants.is_empty());
    Ok(benches)
}

fn is_full_name(benches: &[Bench], name: &str) -> bool {
    benches.iter().any(|bench| bench.name == name)
}

/// Runs the bench's contestants in turns, `rounds` times, each time in a new process. Each round begins with another contestant, so that
/// nobody always follows the same neighbour.
pub(crate) fn interleave(
    bench: &Bench,
    rounds: u32,
    broker: Option<&Broker>,
) -> Result<BenchResult, Error> {
    let mut contestants: Vec<ContestantResult> = bench
        .contestants
        .iter()
        .map(|it| ContestantResult {
            name: it.name,
            side: it.side,
            samples: Vec::new(),
            missing: None,
        })
        .collect();
    let n = contestants.len();
    for round in 0..rounds as usize {
        for turn in 0..n {
            let it = &mut contestants[(round + turn) % n];
            if it.missing.is_some() {
                continue;
            }
            match one_sample(bench, it.name, broker)? {
                Line::Sample(sample) => it.samples.push(sample),
                Line::Missing(why) => it.missing = Some(why),
            }
        }
    }
    Ok(BenchResult {
        bench: bench.name.clone(),
        contestants,
    })
}

fn one_sample(bench: &Bench, contestant: &str, broker: Option<&Broker>) -> Result<Line, Error> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["__one", &bench.name, contestant]);
    if let Some(broker) = broker {
        command.envs(broker.to_env());
    }
    let output = command.stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().last().map(serde_json::from_str) {
        Some(Ok(line)) => Ok(line),
        _ => Ok(Line::Missing(format!("ended with {}", output.status))),
    }
}

/// How many laps [`time`] shall do.
const LAPS: &str = "BENCHES_LAPS";

/// Instructions per operation, counted by valgrind: what a noisy machine cannot blur. The difference of two runs, so that what comes before
/// the first lap does not count. Says nothing about waiting for memory or for atomics.
pub(crate) fn count_instructions(bench: &Bench) -> BenchResult {
    let one = |it: &Contestant| {
        let few = instructions(bench, it, 2)?;
        let more = instructions(bench, it, 6)?;
        let per_operation = (more.0 - few.0) / (more.1 - few.1);
        Ok(Sample::from([(INSTRUCTIONS.key.into(), per_operation)]))
    };
    let contestants = bench.contestants.iter().map(|it| {
        let outcome: Result<Sample, Error> = one(it);
        ContestantResult {
            name: it.name,
            side: it.side,
            missing: outcome.as_ref().err().map(ToString::to_string),
            samples: outcome.into_iter().collect(),
        }
    });
    BenchResult {
        bench: bench.name.clone(),
        contestants: contestants.collect(),
    }
}

pub(crate) const INSTRUCTIONS: Figure = Figure {
    key: "instructions",
    unit: "instructions",
    better: Better::Less,
};

/// Instructions and operations of so many laps.
fn instructions(bench: &Bench, contestant: &Contestant, laps: u64) -> Result<(f64, f64), Error> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["__one", &bench.name, contestant.name])
        .env(LAPS, laps.to_string())
        .output()
        .map_err(|error| format!("cannot start valgrind: {error}"))?;
    let line = match String::from_utf8_lossy(&output.stdout).lines().last() {
        Some(line) => serde_json::from_str(line)?,
        None => Line::Missing(format!("under valgrind it ended with {}", output.status)),
    };
    let operations = match line {
        Line::Sample(sample) => sample.get("operations").copied(),
        Line::Missing(why) => return Err(why.into()),
    };
    let log = String::from_utf8_lossy(&output.stderr);
    let collected = log
        .lines()
        .find_map(|line| line.split_once("Collected : "))
        .and_then(|(_, count)| count.trim().parse().ok());
    match (collected, operations) {
        (Some(collected), Some(operations)) => Ok((collected, operations)),
        _ => Err("this bench does not count its operations".into()),
    }
}

// ------------------------------------------------------------------------------------------------------------ one sample, in the child

pub(crate) fn find<'a>(
    benches: &'a [Bench],
    bench: &str,
    contestant: &str,
) -> Result<(&'a Bench, &'a Contestant), Error> {
    let bench = benches
        .iter()
        .find(|it| it.name == bench)
        .ok_or("no such bench")?;
    let contestant = bench
        .contestants
        .iter()
        .find(|it| it.name == contestant)
        .ok_or("no such contestant")?;
    Ok((bench, contestant))
}

/// Measures one contestant and prints the sample.
pub(crate) fn measure((bench, contestant): (&Bench, &Contestant)) -> Result<(), Error> {
    let outcome = match &contestant.work {
        Work::Measured(work) => {
            if bench.pinned {
                pin(0)?;
            }
            work()
        }
        Work::Served(_, connections) => {
            // The server is a third process, so that its CPU can be told from the load generator's.
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["__serve", &bench.name, contestant.name]);
            pin(1)?;
            load::against(command, *connections)
        }
    };
    let line = match outcome {
        Ok(sample) => Line::Sample(sample),
        Err(error) => Line::Missing(error.to_string()),
    };
    println!("{}", serde_json::to_string(&line)?);
    // Straight out: tearing a million tasks down is nobody's figure.
    std::process::exit(0)
}

/// Runs one contestant's server on the first core until it is killed; its first line of output is its address.
pub(crate) fn serve((_, contestant): (&Bench, &Contestant)) -> Result<(), Error> {
    let Work::Served(server, _) = &contestant.work else {
        return Err(format!("{} is no server", contestant.name).into());
    };
    pin(0)?;
    // Whoever starts a server kills it; if it cannot, the server must not stay.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    server(|address| println!("{address}")).inspect_err(|error| println!("{error}"))
}

/// Binds the process to the `index`th of the cores it may use, or to the last if there are fewer.
fn pin(index: usize) -> Result<(), Error> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let cores: Vec<usize> = (0..CpuSet::count())
        .filter(|&core| allowed.is_set(core).unwrap_or(false))
        .collect();
    let core = cores[index.min(cores.len() - 1)];
    let mut set = CpuSet::new();
    set.set(core)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// User and system time of this process, all threads.
pub(crate) fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("getrusage knows this process");
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(micros.unsigned_abs())
}

const WARM_UP: Duration = Duration::from_millis(100);
const MEASURE: Duration = Duration::from_millis(500);
const LEAST_LAPS: usize = 5;

/// Repeats `lap`, which does `operations` operations, first to warm up and then for half a second; gives [`PER_OPERATION`].
///
/// Under [`count_instructions`], it does the laps it is told and gives how many operations that were.
pub(crate) async fn time(operations: u64, mut lap: impl AsyncFnMut()) -> Sample {
    if let Some(laps) = std::env::var(LAPS).ok().and_then(|laps| laps.parse().ok()) {
        for _ in 0..laps {
            lap().await;
        }
        return Sample::from([("operations".into(), (laps * operations) as f64)]);
    }
    let begin = Instant::now();
    while begin.elapsed() < WARM_UP {
        lap().await;
    }
    let mut laps = Vec::new();
    let (begin, cpu) = (Instant::now(), cpu_time());
    while begin.elapsed() < MEASURE || laps.len() < LEAST_LAPS {
        let begin = Instant::now();
        lap().await;
        laps.push(begin.elapsed());
    }
    let cpu = cpu_time() - cpu;
    laps.sort_unstable();
    let per_operation =
        |time: Duration, laps: usize| time.as_nanos() as f64 / (laps as f64 * operations as f64);
    Sample::from([
        ("ns".into(), per_operation(laps[laps.len() / 2], 1)),
        ("cpu_ns".into(), per_operation(cpu, laps.len())),
    ])
}
