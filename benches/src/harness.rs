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
use nix::unistd::{Pid, SysconfVar, sysconf};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
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
    /// Ours as an earlier build has it.
    Earlier,
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
        self.ours_called("sweepea", work)
    }

    /// One of several of ours.
    pub(crate) fn ours_called(
        self,
        name: &'static str,
        work: impl Fn() -> Result<Sample, Error> + 'static,
    ) -> Self {
        self.with(name, Side::Ours, Work::Measured(Box::new(work)))
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
    /// Cores that other processes of the machine used meanwhile, on the average.
    pub(crate) others: f64,
    /// Load average of the last minute when it began; our own benches count in it.
    pub(crate) load: f64,
}

#[derive(Serialize)]
pub(crate) struct ContestantResult {
    pub(crate) name: String,
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

/// Who takes part in a bench: a contestant of some program, which is this one or an earlier build of it.
struct Entry<'a> {
    program: &'a Path,
    /// What the program calls it.
    contestant: &'static str,
    /// How many connections the load generator makes to it, if it is a server.
    connections: Option<usize>,
    result: ContestantResult,
}

/// The programs that a run takes its contestants from.
pub(crate) struct Programs {
    this: PathBuf,
    earlier: Vec<PathBuf>,
}

impl Programs {
    /// This one, and earlier builds of it that lend their version of ours.
    pub(crate) fn with(earlier: &[PathBuf]) -> Result<Self, Error> {
        for path in earlier {
            if !path.is_file() {
                return Err(format!("there is no program {}", path.display()).into());
            }
        }
        Ok(Self {
            this: std::env::current_exe()?,
            // Without a folder, the name would be looked up in the search path.
            earlier: earlier
                .iter()
                .map(|path| path.canonicalize())
                .collect::<Result<_, _>>()?,
        })
    }

    fn entries(&self, bench: &Bench) -> Vec<Entry<'_>> {
        let entry = |program, it: &Contestant, name, side| Entry {
            program,
            contestant: it.name,
            connections: match it.work {
                Work::Measured(_) => None,
                Work::Served(_, connections) => Some(connections),
            },
            result: ContestantResult {
                name,
                side,
                samples: Vec::new(),
                missing: None,
            },
        };
        let mut entries: Vec<Entry<'_>> = bench
            .contestants
            .iter()
            .map(|it| entry(self.this.as_path(), it, it.name.to_string(), it.side))
            .collect();
        for program in &self.earlier {
            let label = program.file_name().unwrap_or_default().to_string_lossy();
            let ours = bench.contestants.iter().filter(|it| it.side == Side::Ours);
            entries.extend(ours.map(|it| {
                let name = earlier_name(it.name, &label);
                entry(program, it, name, Side::Earlier)
            }));
        }
        entries
    }
}

/// What the tables call our contestant as the build `label` has it.
pub(crate) fn earlier_name(ours: &str, label: &str) -> String {
    format!("{ours} @{label}")
}

/// Runs the bench's contestants in turns, `rounds` times, each time in a new process. Each round begins with another contestant, so that
/// nobody always follows the same neighbour.
pub(crate) fn interleave(
    bench: &Bench,
    programs: &Programs,
    rounds: u32,
    broker: Option<&Broker>,
) -> Result<BenchResult, Error> {
    let neighbours = Neighbours::watch(broker)?;
    let mut entries = programs.entries(bench);
    let n = entries.len();
    for round in 0..rounds as usize {
        for turn in 0..n {
            let it = &mut entries[(round + turn) % n];
            if it.result.missing.is_some() {
                continue;
            }
            match one_sample(bench, it, broker)? {
                Line::Sample(sample) => it.result.samples.push(sample),
                Line::Missing(why) => it.result.missing = Some(why),
            }
        }
    }
    Ok(BenchResult {
        bench: bench.name.clone(),
        contestants: entries.into_iter().map(|it| it.result).collect(),
        others: neighbours.cores()?,
        load: neighbours.load,
    })
}

fn one_sample(bench: &Bench, it: &Entry<'_>, broker: Option<&Broker>) -> Result<Line, Error> {
    let mut command = Command::new(it.program);
    command.args(["__one", &bench.name, it.contestant]);
    if let Some(broker) = broker {
        command.envs(broker.to_env());
    }
    let output = command.stderr(Stdio::inherit()).output()?;
    Ok(Line::of(&output.stdout)
        .unwrap_or_else(|| Line::Missing(format!("ended with {}", output.status))))
}

impl Line {
    /// The last line of a measuring process's output, if it is one.
    fn of(output: &[u8]) -> Option<Self> {
        let text = str::from_utf8(output).ok()?;
        serde_json::from_str(text.lines().last()?).ok()
    }
}

/// What else the machine does while a bench runs: all CPU time less that of our children and the broker.
struct Neighbours {
    begin: Instant,
    busy: Duration,
    own: Duration,
    broker: Option<u32>,
    load: f64,
}

impl Neighbours {
    fn watch(broker: Option<&Broker>) -> Result<Self, Error> {
        let broker = broker.and_then(|broker| broker.pid);
        Ok(Self {
            begin: Instant::now(),
            busy: busy_time(&std::fs::read_to_string("/proc/stat")?)?,
            own: own_time(broker)?,
            broker,
            load: load_average(&std::fs::read_to_string("/proc/loadavg")?),
        })
    }

    /// Cores in use by others since then, on the average.
    fn cores(&self) -> Result<f64, Error> {
        let busy = busy_time(&std::fs::read_to_string("/proc/stat")?)? - self.busy;
        let own = own_time(self.broker)? - self.own;
        let others = busy.saturating_sub(own);
        Ok(others.as_secs_f64() / self.begin.elapsed().as_secs_f64())
    }
}

/// The first number of `/proc/loadavg`.
pub(crate) fn load_average(text: &str) -> f64 {
    let first = text.split(' ').next();
    first.and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)
}

/// CPU time since the start of the machine, all cores, by the first line of `/proc/stat`: user, nice, system, idle, iowait, irq, softirq.
fn busy_time(stat: &str) -> Result<Duration, Error> {
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("cpu "))
        .ok_or("/proc/stat does not begin with cpu")?
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields[..] else {
        return Err("/proc/stat has too few fields".into());
    };
    let ticks_per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100).unsigned_abs();
    let ticks = user + nice + system + irq + softirq;
    Ok(Duration::from_micros(ticks * 1_000_000 / ticks_per_second))
}

/// CPU time of this process, of its children that have ended, and of the broker.
fn own_time(broker: Option<u32>) -> Result<Duration, Error> {
    let broker = broker.map_or(Ok(Duration::ZERO), load::cpu_of)?;
    Ok(cpu_time() + cpu_time_of(UsageWho::RUSAGE_CHILDREN) + broker)
}

/// How many laps [`time`] shall do.
const LAPS: &str = "BENCHES_LAPS";
/// The larger of the two numbers of laps whose difference counts.
pub(crate) const MOST_LAPS: u64 = 6;

/// How many laps to do, where instructions are being counted.
pub(crate) fn laps_to_count() -> Option<u64> {
    std::env::var(LAPS).ok()?.parse().ok()
}

/// Instructions per operation, counted by valgrind: what a noisy machine cannot blur. The difference of two runs, so that what comes before
/// the first lap does not count. Says nothing about waiting for memory or for atomics.
pub(crate) fn count_instructions(
    bench: &Bench,
    programs: &Programs,
    broker: Option<&Broker>,
) -> Result<BenchResult, Error> {
    let neighbours = Neighbours::watch(broker)?;
    let mut entries = programs.entries(bench);
    for it in &mut entries {
        let counted = (|| {
            let [few, more] = match it.connections {
                None => [2, MOST_LAPS].map(|laps| instructions(bench, it, broker, laps)),
                Some(n) => REQUESTS.map(|requests| instructions_served(bench, it, n, requests)),
            };
            let (few, more) = (few?, more?);
            let per_operation = (more.0 - few.0) / (more.1 - few.1);
            Ok::<_, Error>(Sample::from([(INSTRUCTIONS.key.into(), per_operation)]))
        })();
        match counted {
            Ok(sample) => it.result.samples.push(sample),
            Err(error) => it.result.missing = Some(error.to_string()),
        }
    }
    Ok(BenchResult {
        bench: bench.name.clone(),
        contestants: entries.into_iter().map(|it| it.result).collect(),
        others: neighbours.cores()?,
        load: neighbours.load,
    })
}

pub(crate) const INSTRUCTIONS: Figure = Figure {
    key: "instructions",
    unit: "instructions",
    better: Better::Less,
};

/// The program under valgrind, which writes the count to its standard error at the end.
fn counting(command: &str, bench: &Bench, it: &Entry<'_>) -> Command {
    let mut counting = Command::new("valgrind");
    counting
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(it.program)
        .args([command, &bench.name, it.contestant]);
    counting
}

/// The count in valgrind's log.
fn collected(log: &str) -> Option<f64> {
    let (_, count) = log
        .lines()
        .find_map(|line| line.split_once("Collected : "))?;
    count.trim().parse().ok()
}

/// How many requests a server answers in the two runs.
const REQUESTS: [u64; 2] = [5_000, 25_000];

/// Instructions of a server that answers so many requests.
fn instructions_served(
    bench: &Bench,
    it: &Entry<'_>,
    connections: usize,
    requests: u64,
) -> Result<(f64, f64), Error> {
    let log = load::count(counting("__serve", bench, it), connections, requests)?;
    let collected = collected(&log).ok_or("valgrind has not counted")?;
    Ok((collected, requests as f64))
}

/// Instructions and operations of so many laps.
fn instructions(
    bench: &Bench,
    it: &Entry<'_>,
    broker: Option<&Broker>,
    laps: u64,
) -> Result<(f64, f64), Error> {
    let output = counting("__one", bench, it)
        .envs(broker.map(Broker::to_env).unwrap_or_default())
        .env(LAPS, laps.to_string())
        .output()
        .map_err(|error| format!("cannot start valgrind: {error}"))?;
    let line = Line::of(&output.stdout).unwrap_or_else(|| {
        Line::Missing(format!("under valgrind it ended with {}", output.status))
    });
    let operations = match line {
        Line::Sample(sample) => sample.get("operations").copied(),
        Line::Missing(why) => return Err(why.into()),
    };
    let collected = collected(&String::from_utf8_lossy(&output.stderr));
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
    cpu_time_of(UsageWho::RUSAGE_SELF)
}

fn cpu_time_of(who: UsageWho) -> Duration {
    let usage = getrusage(who).expect("getrusage knows this process");
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(micros.unsigned_abs())
}

const WARM_UP: Duration = Duration::from_millis(100);
const MEASURE: Duration = Duration::from_millis(500);
const LEAST_LAPS: usize = 5;

/// Repeats `lap`, which does `operations` operations, first to warm up and then for half a second; gives [`PER_OPERATION`].
///
/// Under [`count_instructions`], it does the laps it is told and gives how many operations that were.
pub(crate) async fn time(operations: u64, lap: impl AsyncFnMut()) -> Sample {
    time_for(WARM_UP, MEASURE, operations, lap).await
}

async fn time_for(
    warm_up: Duration,
    measure: Duration,
    operations: u64,
    mut lap: impl AsyncFnMut(),
) -> Sample {
    if let Some(laps) = laps_to_count() {
        for _ in 0..laps {
            lap().await;
        }
        return Sample::from([("operations".into(), (laps * operations) as f64)]);
    }
    let begin = Instant::now();
    while begin.elapsed() < warm_up {
        lap().await;
    }
    let mut laps = Vec::new();
    let (begin, cpu) = (Instant::now(), cpu_time());
    while begin.elapsed() < measure || laps.len() < LEAST_LAPS {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn benches() -> Vec<Bench> {
        ["spawn_join", "spawn_join_one", "yield"]
            .into_iter()
            .map(|name| {
                Bench::new(name, "", PER_OPERATION)
                    .ours(|| Err("not run".into()))
                    .with(
                        "tokio",
                        Side::Peer,
                        Work::Measured(Box::new(|| Err("not run".into()))),
                    )
            })
            .collect()
    }

    fn selected(names: &[&str], only: &[&str]) -> Result<Vec<(String, usize)>, Error> {
        let owned = |names: &[&str]| {
            names
                .iter()
                .map(|name| name.to_string())
                .collect::<Vec<_>>()
        };
        let benches = select(benches(), &owned(names), &owned(only))?;
        Ok(benches
            .into_iter()
            .map(|it| (it.name, it.contestants.len()))
            .collect())
    }

    fn names(names: &[&str]) -> Vec<String> {
        let chosen = selected(names, &[]).unwrap();
        chosen.into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn a_full_name_chooses_one_bench_and_a_beginning_all_that_begin_so() {
        assert_eq!(names(&["spawn_join"]), ["spawn_join"]);
        assert_eq!(names(&["spawn"]), ["spawn_join", "spawn_join_one"]);
        assert_eq!(names(&[]).len(), 3);
        let error = selected(&["spwan"], &[]).unwrap_err().to_string();
        assert!(error.contains("spwan"), "{error}");
    }

    #[test]
    fn only_keeps_the_contestants_it_names_and_drops_benches_without_any() {
        assert_eq!(
            selected(&["yield"], &["swe"]).unwrap(),
            [("yield".into(), 1)]
        );
        assert!(selected(&[], &["nobody"]).unwrap().is_empty());
    }

    #[test]
    fn every_name_finds_its_contestant_and_no_other() {
        let benches = benches();
        let (bench, contestant) = find(&benches, "yield", "tokio").unwrap();
        assert_eq!((bench.name.as_str(), contestant.name), ("yield", "tokio"));
        assert!(find(&benches, "yield", "toki").is_err());
        assert!(find(&benches, "yiel", "tokio").is_err());
    }

    #[test]
    fn an_earlier_build_lends_ours_and_nothing_else() {
        let programs = Programs {
            this: "/now/benches".into(),
            earlier: vec!["/then/before".into()],
        };
        let entries = programs.entries(&benches()[0]);
        let seen: Vec<(&str, &str, &Path)> = entries
            .iter()
            .map(|it| (it.result.name.as_str(), it.contestant, it.program))
            .collect();
        let (now, then) = (Path::new("/now/benches"), Path::new("/then/before"));
        assert_eq!(
            seen,
            [
                ("sweepea", "sweepea", now),
                ("tokio", "tokio", now),
                ("sweepea @before", "sweepea", then),
            ]
        );
        assert!(Programs::with(&["/no/such/program".into()]).is_err());
    }

    #[test]
    fn the_last_line_of_output_is_the_sample() {
        let output = b"noise\n{\"Sample\":{\"ns\":15.5}}\n";
        match Line::of(output) {
            Some(Line::Sample(sample)) => assert_eq!(sample["ns"], 15.5),
            _ => panic!("no sample"),
        }
        let missing = Line::of(br#"{"Missing":"no io_uring"}"#);
        assert!(matches!(missing, Some(Line::Missing(why)) if why == "no io_uring"));
        assert!(Line::of(b"").is_none());
        assert!(Line::of(b"{\"Sample\":{\"ns\":15.5}}\nthread panicked").is_none());
    }

    #[test]
    fn busy_time_leaves_out_what_was_idle_or_waited() {
        let tick = Duration::from_secs(1) / sysconf(SysconfVar::CLK_TCK).unwrap().unwrap() as u32;
        let stat = "cpu  1 2 4 1000 2000 8 16 0 0 0\ncpu0 9 9 9 9 9 9 9 0 0 0\n";
        assert_eq!(busy_time(stat).unwrap(), tick * 31);
        assert!(busy_time("cpu0 1 2").is_err());
        assert!(busy_time("cpu  1 2 x").is_err());
        assert!(busy_time("cpu  1 2 3").is_err());
    }

    #[test]
    fn the_load_average_is_the_one_of_the_last_minute() {
        assert_eq!(load_average("0.53 1.20 2.00 1/345 999\n"), 0.53);
        assert!(load_average("").is_nan());
    }

    #[test]
    fn laps_are_counted_after_the_warm_up_and_never_too_few() {
        // Longer than all the time there is, so that only the least number of laps is done.
        let (mut laps, long) = (0, Duration::from_millis(2));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let mut timing = Box::pin(time_for(long / 2, long / 2, 10, async || {
            laps += 1;
            std::thread::sleep(long);
        }));
        let std::task::Poll::Ready(sample) = timing.as_mut().poll(&mut context) else {
            panic!("nothing here waits");
        };
        drop(timing);
        assert_eq!(laps, 1 + LEAST_LAPS);
        assert!(sample["ns"] >= long.as_nanos() as f64 / 10.0);
    }
}
