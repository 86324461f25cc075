//! Side-by-side benchmarks: ours and its peers on the same work, in one run.
//!
//! ```text
//! cargo run --release -p benches --features peers -- spawn_join yield --runs 5
//! ```
//!
//! Every figure comes from a process of its own: the binary starts itself with a hidden command that runs one contestant of one bench and
//! prints one line of JSON. The contestants take turns, so that what else the machine does in a minute falls on all of them.
//! `docs/measuring.md` says what each figure is.

mod delivery;
mod harness;
mod kernel;
mod load;
mod report;
mod wire;

use clap::{Parser, Subcommand};
use harness::{Bench, Error, INSTRUCTIONS};
use std::path::PathBuf;
use std::process::ExitCode;

#[cfg(feature = "allocations")]
#[global_allocator]
static ALLOCATOR: &stats_alloc::StatsAlloc<std::alloc::System> = &stats_alloc::INSTRUMENTED_SYSTEM;

/// How often `work` asks for memory, growing what it has included.
#[cfg(feature = "allocations")]
fn allocations_in(work: impl FnOnce()) -> usize {
    let region = stats_alloc::Region::new(ALLOCATOR);
    work();
    let change = region.change();
    change.allocations + change.reallocations
}

#[derive(Parser)]
#[command(
    about = "Side-by-side benchmarks; see docs/measuring.md",
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true
)]
struct Cli {
    /// Benches to run: names, or the beginnings of names; none means all
    names: Vec<String>,
    /// Rounds; each contestant gives one figure a round
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only contestants whose name begins so; may be given several times
    #[arg(long)]
    only: Vec<String>,
    /// Print the benches with their contestants and leave
    #[arg(long)]
    list: bool,
    /// Count instructions per operation with valgrind instead of measuring time
    #[arg(long)]
    instructions: bool,
    /// Let ours as an earlier build of this program has it take part; may be given several times
    #[arg(long, value_name = "PROGRAM")]
    with: Vec<PathBuf>,
    /// Print rows for a Markdown table instead of tables
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
    /// Print all samples as one JSON document instead of tables
    #[arg(long)]
    json: bool,
    /// RabbitMQ to run the AMQP benches against; without it a private node is started
    #[arg(long, value_name = "URL")]
    amqp: Option<String>,
    #[command(subcommand)]
    child: Option<Child>,
}

/// What the binary starts itself with. Not for users.
#[derive(Subcommand)]
enum Child {
    /// Measures one contestant and prints its sample
    #[command(name = "__one", hide = true)]
    One { bench: String, contestant: String },
    /// Runs one contestant's server until killed
    #[command(name = "__serve", hide = true)]
    Serve { bench: String, contestant: String },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let benches = kernel::benches()
        .into_iter()
        .chain(wire::benches())
        .chain(delivery::benches())
        .collect();
    match start(cli, benches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("benches: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli, benches: Vec<Bench>) -> Result<(), Error> {
    match &cli.child {
        Some(Child::One { bench, contestant }) => {
            harness::measure(harness::find(&benches, bench, contestant)?)
        }
        Some(Child::Serve { bench, contestant }) => {
            harness::serve(harness::find(&benches, bench, contestant)?)
        }
        None => {
            let benches = harness::select(benches, &cli.names, &cli.only)?;
            if cli.list {
                report::list(&benches);
                return Ok(());
            }
            run(&benches, &cli)
        }
    }
}

/// Runs the chosen benches one after the other and prints each table as soon as it is complete.
fn run(benches: &[Bench], cli: &Cli) -> Result<(), Error> {
    let machine = report::Machine::look();
    let programs = harness::Programs::with(&cli.with)?;
    if !cli.json {
        println!("{machine}");
    }
    if cli.markdown {
        println!("\n{}", report::MARKDOWN_HEAD);
    }
    // Lives as long as the run: dropping it stops the node.
    let broker = match benches.iter().any(|bench| bench.needs_broker) {
        true => Some(wire::Broker::at_or_private(cli.amqp.clone())?),
        false => None,
    };
    let mut results = Vec::new();
    for bench in benches {
        let (result, figures) = match cli.instructions {
            true => (
                harness::count_instructions(bench, &programs, broker.as_ref())?,
                &[INSTRUCTIONS][..],
            ),
            false => {
                let result = harness::interleave(bench, &programs, cli.runs, broker.as_ref())?;
                (result, bench.figures)
            }
        };
        match (cli.json, cli.markdown) {
            (true, _) => {}
            (false, true) => print!("{}", report::markdown(figures, &result)),
            (false, false) => print!("{}", report::tables(bench, figures, &result)),
        }
        results.push(result);
    }
    if cli.json {
        println!("{}", report::json(&machine, &results)?);
    }
    Ok(())
}
