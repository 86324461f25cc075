//! The one printer of results: a table a figure, and the ratio of ours to the best peer.

use crate::harness::{
    Bench, BenchResult, Better, ContestantResult, Error, Figure, Side, earlier_name, load_average,
};
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
            load: load_average(&read("/proc/loadavg")),
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

/// The tables of one bench, the quickest contestant first.
pub(crate) fn tables(bench: &Bench, figures: &[Figure], result: &BenchResult) -> String {
    let mut text = format!(
        "\n{}: {}\n  (load {:.2} at its beginning; others used {:.2} cores)\n",
        bench.name, bench.about, result.load, result.others
    );
    for figure in figures {
        text += &table(figure, &result.contestants);
    }
    for it in &result.contestants {
        if let Some(why) = &it.missing {
            text += &format!("  {:22} not measured: {why}\n", it.name);
        }
    }
    text
}

fn table(figure: &Figure, contestants: &[ContestantResult]) -> String {
    let rows = rows(figure, contestants);
    if rows.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "  {:22} {:>12} {:>12} {:>12}\n",
        figure.unit, "min", "median", "max"
    );
    for (it, spread) in &rows {
        let [min, median, max] = [spread.min, spread.median, spread.max].map(number);
        text += &format!("    {:20} {min:>12} {median:>12} {max:>12}\n", it.name);
    }
    let mut compare = |(it, ours): &Row<'_>, (other, theirs): &Row<'_>| {
        text += &format!(
            "    {} / {}: {:.2} (best of each: {:.2})\n",
            it.name,
            other.name,
            ours.median / theirs.median,
            ours.best(figure.better) / theirs.best(figure.better),
        );
    };
    // The rows are sorted, so the first of a side is its best.
    let first = |side| rows.iter().find(|(it, _)| it.side == side);
    if let Some(ours) = first(Side::Ours) {
        for side in [Side::Peer, Side::Floor] {
            if let Some(other) = first(side) {
                compare(ours, other);
            }
        }
    }
    for ours in rows.iter().filter(|(it, _)| it.side == Side::Ours) {
        for earlier in rows.iter().filter(|(it, _)| it.side == Side::Earlier) {
            if earlier.0.name.starts_with(&earlier_name(&ours.0.name, "")) {
                compare(ours, earlier);
            }
        }
    }
    text
}

pub(crate) const MARKDOWN_HEAD: &str = "\
| bench | figure | ours: min / median / max | best peer: min / median / max | ours / peer: median, best | other medians | load, others' cores |
|---|---|---|---|---:|---|---|";

/// A row a figure, under [`MARKDOWN_HEAD`].
pub(crate) fn markdown(figures: &[Figure], result: &BenchResult) -> String {
    let mut text = String::new();
    for figure in figures {
        let rows = rows(figure, &result.contestants);
        // A figure that this build or this machine does not have; one whose contestants all failed says so.
        if rows.is_empty() && result.contestants.iter().all(|it| it.missing.is_none()) {
            continue;
        }
        let first = |side| rows.iter().find(|(it, _)| it.side == side);
        let (ours, peer) = (first(Side::Ours), first(Side::Peer));
        let ratio = match (ours, peer) {
            (Some((_, ours)), Some((_, theirs))) => format!(
                "**{:.2}**, {:.2}",
                ours.median / theirs.median,
                ours.best(figure.better) / theirs.best(figure.better)
            ),
            _ => "-".into(),
        };
        let full = |row: Option<&Row<'_>>| match row {
            Some((it, spread)) => format!("{} {spread}", it.name),
            None => "-".into(),
        };
        let is_shown = |row: &Row<'_>| {
            [ours, peer]
                .iter()
                .flatten()
                .any(|it| std::ptr::eq(*it, row))
        };
        let mut others: Vec<String> = rows
            .iter()
            .filter(|row| !is_shown(row))
            .map(|(it, spread)| format!("{} {}", it.name, number(spread.median)))
            .collect();
        others.extend(result.contestants.iter().filter_map(|it| {
            let why = it.missing.as_ref()?;
            Some(format!("{} not measured: {why}", it.name))
        }));
        text += &format!(
            "| `{}` | {} | {} | {} | {ratio} | {} | {:.1}, {:.1} |\n",
            result.bench,
            figure.unit,
            full(ours),
            full(peer),
            others.join(", "),
            result.load,
            result.others,
        );
    }
    text
}

type Row<'a> = (&'a ContestantResult, Spread);

/// Who has the figure, the best median first.
fn rows<'a>(figure: &Figure, contestants: &'a [ContestantResult]) -> Vec<Row<'a>> {
    let mut rows: Vec<Row<'_>> = contestants
        .iter()
        .filter_map(|it| Some((it, Spread::of(it, figure.key)?)))
        .collect();
    rows.sort_by(|(_, a), (_, b)| match figure.better {
        Better::Less => a.median.total_cmp(&b.median),
        Better::More => b.median.total_cmp(&a.median),
    });
    rows
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

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [min, median, max] = [self.min, self.median, self.max].map(number);
        write!(f, "{min} / **{median}** / {max}")
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
    load: f64,
    /// Cores that other processes used meanwhile.
    others: f64,
    contestants: &'a [ContestantResult],
}

/// Every sample of the run.
pub(crate) fn json(machine: &Machine, results: &[BenchResult]) -> Result<String, Error> {
    let benches = results
        .iter()
        .map(|result| BenchDocument {
            name: &result.bench,
            load: result.load,
            others: result.others,
            contestants: &result.contestants,
        })
        .collect();
    Ok(serde_json::to_string_pretty(&Document {
        machine,
        benches,
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Sample;

    const NS: Figure = Figure {
        key: "ns",
        unit: "ns",
        better: Better::Less,
    };
    const RATE: Figure = Figure {
        key: "rate",
        unit: "messages/s",
        better: Better::More,
    };

    fn contestant(name: &str, side: Side, ns: &[f64]) -> ContestantResult {
        ContestantResult {
            name: name.into(),
            side,
            samples: ns
                .iter()
                .map(|&ns| Sample::from([("ns".into(), ns), ("rate".into(), 1e9 / ns)]))
                .collect(),
            missing: None,
        }
    }

    fn result(contestants: Vec<ContestantResult>) -> BenchResult {
        BenchResult {
            bench: "yield".into(),
            contestants,
            others: 0.25,
            load: 1.5,
        }
    }

    #[test]
    fn a_spread_is_of_the_figure_asked_for_whatever_the_order_of_samples() {
        let it = contestant("a", Side::Ours, &[30.0, 10.0, 20.0]);
        let spread = Spread::of(&it, "ns").unwrap();
        assert_eq!((spread.min, spread.median, spread.max), (10.0, 20.0, 30.0));
        assert_eq!(spread.best(Better::Less), 10.0);
        assert_eq!(spread.best(Better::More), 30.0);
        assert!(Spread::of(&it, "cpu_ns").is_none());
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        let it = contestant("a", Side::Ours, &[1.0, 100.0, 2.0, 4.0]);
        assert_eq!(Spread::of(&it, "ns").unwrap().median, 3.0);
    }

    #[test]
    fn numbers_keep_three_digits_or_the_whole_part() {
        let values = [0.0123, 1.234, 12.34, 123.4, 123_456.7];
        let texts = values.map(number);
        assert_eq!(texts, ["0.012", "1.23", "12.3", "123", "123457"]);
    }

    #[test]
    fn the_ratio_is_to_the_best_peer_by_the_figures_own_measure() {
        let contestants = [
            contestant("slow", Side::Peer, &[40.0]),
            contestant("sweepea", Side::Ours, &[10.0, 10.0, 25.0]),
            contestant("quick", Side::Peer, &[20.0, 16.0, 30.0]),
            contestant("by hand", Side::Floor, &[5.0]),
        ];
        let less = table(&NS, &contestants);
        assert!(
            less.contains("sweepea / quick: 0.50 (best of each: 0.62)"),
            "{less}"
        );
        assert!(less.contains("sweepea / by hand: 2.00"), "{less}");
        let order: Vec<&str> = less.lines().skip(1).take(4).map(|row| row.trim()).collect();
        assert!(
            order[0].starts_with("by hand") && order[3].starts_with("slow"),
            "{less}"
        );
        let more = table(&RATE, &contestants);
        assert!(
            more.contains("sweepea / quick: 2.00 (best of each: 1.60)"),
            "{more}"
        );
    }

    #[test]
    fn an_earlier_build_is_compared_with_its_own_contestant_and_is_no_peer() {
        let contestants = [
            contestant("olive threads", Side::Ours, &[10.0]),
            contestant("olive processes", Side::Ours, &[30.0]),
            contestant("olive threads @before", Side::Earlier, &[20.0]),
            contestant("olive processes @before", Side::Earlier, &[20.0]),
        ];
        let text = table(&NS, &contestants);
        assert!(
            text.contains("olive threads / olive threads @before: 0.50"),
            "{text}"
        );
        assert!(
            text.contains("olive processes / olive processes @before: 1.50"),
            "{text}"
        );
        assert_eq!(text.matches("best of each").count(), 2, "{text}");
    }

    #[test]
    fn a_markdown_row_names_whoever_is_missing_and_how_busy_the_machine_was() {
        let mut absent = contestant("absent", Side::Peer, &[]);
        absent.missing = Some("no io_uring".into());
        let contestants = vec![
            contestant("sweepea", Side::Ours, &[10.0]),
            contestant("quick", Side::Peer, &[20.0]),
            contestant("slow", Side::Peer, &[40.0]),
            absent,
        ];
        let row = markdown(&[NS], &result(contestants));
        assert_eq!(
            row,
            "| `yield` | ns | sweepea 10.0 / **10.0** / 10.0 | quick 20.0 / **20.0** / 20.0 | **0.50**, 0.50 \
             | slow 40.0, absent not measured: no io_uring | 1.5, 0.2 |\n"
        );
        let columns = |line: &str| line.matches('|').count();
        assert!(
            MARKDOWN_HEAD
                .lines()
                .all(|line| columns(line) == columns(row.trim()))
        );
    }

    #[test]
    fn a_figure_that_nobody_has_is_no_row_unless_all_failed() {
        let allocations = Figure {
            key: "allocations",
            unit: "allocations",
            better: Better::Less,
        };
        let mut ours = contestant("sweepea", Side::Ours, &[10.0]);
        assert_eq!(markdown(&[allocations], &result(vec![ours])), "");
        ours = contestant("sweepea", Side::Ours, &[]);
        ours.missing = Some("no broker".into());
        assert!(markdown(&[NS], &result(vec![ours])).contains("sweepea not measured: no broker"));
    }

    #[test]
    fn a_bench_of_ours_alone_has_no_ratio() {
        let contestants = vec![contestant("sweepea", Side::Ours, &[10.0])];
        assert!(!table(&NS, &contestants).contains('/'));
        assert!(markdown(&[NS], &result(contestants)).contains("| - | - |"));
    }
}
