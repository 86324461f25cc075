//! The one printer of results: a table a figure, and the ratio of ours to the best peer.

use crate::harness::{Bench, BenchResult, Better, ContestantResult, Error, Figure, Side};
use serde::Serialize;
use std::fmt;
use std::time::SystemTime;

/// Where and when the run was.
#[derive(Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cores: usize,
    kernel: String,
    /// Load average of the last minute before the run: how far the figures may be trusted.
    load: f64,
    unix_time: u64,
}

impl Machine {
    /// Reads /proc; what is not there stays empty.
    pub(crate) fn look() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let cpu_info = read("/proc/cpuinfo");
        let cpu = cpu_info
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .map_or("", |rest| rest.trim_start_matches([' ', '\t', ':']));
        Self {
            cpu: cpu.to_string(),
            cores: std::thread::available_parallelism().map_or(1, Into::into),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_string(),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|word| word.parse().ok())
                .unwrap_or(f64::NAN),
            unix_time: SystemTime::UNIX_EPOCH
                .elapsed()
                .map_or(0, |time| time.as_secs()),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            cpu, cores, kernel, ..
        } = self;
        write!(
            f,
            "{cpu}, {cores} cores, Linux {kernel}, load {:.2}",
            self.load
        )
    }
}

/// Prints the benches, what they do, and who takes part.
pub(crate) fn list(benches: &[Bench]) {
    for bench in benches {
        let names: Vec<&str> = bench.contestants.iter().map(|it| it.name).collect();
        println!("{:24} {}", bench.name, bench.about);
        println!("{:24}   {}", "", names.join(", "));
    }
}

/// Prints the tables of one bench, the quickest contestant first.
pub(crate) fn print(bench: &Bench, figures: &[Figure], result: &BenchResult) {
    println!("\n{}: {}", bench.name, bench.about);
    for figure in figures {
        print_figure(figure, &result.contestants);
    }
    for it in &result.contestants {
        if let Some(why) = &it.missing {
            println!("  {:22} not measured: {why}", it.name);
        }
    }
}

fn print_figure(figure: &Figure, contestants: &[ContestantResult]) {
    let mut rows: Vec<(&ContestantResult, Spread)> = contestants
        .iter()
        .filter_map(|it| Some((it, Spread::of(it, figure.key)?)))
        .collect();
    if rows.is_empty() {
        return;
    }
    rows.sort_by(|(_, a), (_, b)| match figure.better {
        Better::Less => a.median.total_cmp(&b.median),
        Better::More => b.median.total_cmp(&a.median),
    });
    println!(
        "  {:22} {:>12} {:>12} {:>12}",
        figure.unit, "min", "median", "max"
    );
    for (it, spread) in &rows {
        let Spread { min, median, max } = spread;
        println!(
            "    {:20} {:>12} {:>12} {:>12}",
            it.name,
            number(*min),
            number(*median),
            number(*max)
        );
    }
    // The rows are sorted, so the first peer is the best.
    let first = |side| rows.iter().find(|(it, _)| it.side == side);
    if let (Some((_, ours)), Some((peer, theirs))) = (first(Side::Ours), first(Side::Peer)) {
        println!(
            "    ours / {}: {:.2} (best of each: {:.2})",
            peer.name,
            ours.median / theirs.median,
            ours.best(figure.better) / theirs.best(figure.better),
        );
    }
    if let (Some((_, ours)), Some((floor, least))) = (first(Side::Ours), first(Side::Floor)) {
        println!(
            "    ours / {}: {:.2}",
            floor.name,
            ours.median / least.median
        );
    }
}

struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    /// `None` if the contestant has no such figure.
    fn of(it: &ContestantResult, key: &str) -> Option<Self> {
        let mut values: Vec<f64> = it
            .samples
            .iter()
            .filter_map(|sample| sample.get(key).copied())
            .collect();
        values.sort_by(f64::total_cmp);
        Some(Self {
            min: *values.first()?,
            median: (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0,
            max: *values.last()?,
        })
    }

    fn best(&self, better: Better) -> f64 {
        match better {
            Better::Less => self.min,
            Better::More => self.max,
        }
    }
}

/// Three significant digits, or all of a large number's whole part.
fn number(value: f64) -> String {
    match value.abs() {
        v if v < 1.0 => format!("{value:.3}"),
        v if v < 10.0 => format!("{value:.2}"),
        v if v < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[derive(Serialize)]
struct Document<'a> {
    machine: &'a Machine,
    benches: Vec<BenchDocument<'a>>,
}

#[derive(Serialize)]
struct BenchDocument<'a> {
    name: &'a str,
    contestants: &'a [ContestantResult],
}

/// Every sample of the run.
pub(crate) fn json(machine: &Machine, results: &[BenchResult]) -> Result<String, Error> {
    let benches = results
        .iter()
        .map(|result| BenchDocument {
            name: &result.bench,
            contestants: &result.contestants,
        })
        .collect();
    Ok(serde_json::to_string_pretty(&Document {
        machine,
        benches,
    })?)
}
