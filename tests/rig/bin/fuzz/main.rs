//! Bytes that no peer should send, at both ends of a connection: `fuzz [--seconds 20] [--seed N] [--cases N]`.
//!
//! A session between our client and our broker is recorded once. Each case mutates one side of it, frame by frame (see [`mutate`]), and
//! plays that to a fresh other side. What must hold:
//!
//! - Nobody panics, and what either says stays well-formed.
//! - Every request, publishing and connection of the client has exactly one end, and the events are the same however the bytes are cut.
//! - Each frame is refused by `amq-protocol` and by us, or read alike by both (see [`oracle`]).
//!
//! A failure names the seed of its case, which `--seed` repeats as the first.

mod mutate;
mod oracle;
mod play;

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mutate::Packet;
use play::Recording;
use rig::Random;

struct Options {
    seconds: u64,
    seed: u64,
    cases: u64,
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(what) => {
            eprintln!("fuzz: {what}; usage: fuzz [--seconds N] [--seed N] [--cases N]");
            return ExitCode::from(2);
        }
    };
    println!("fuzz: {} s from seed {}", options.seconds, options.seed);
    let recording = Recording::make();
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let mut totals = Totals::default();
    let mut seeds = Random::new(options.seed);
    let mut seed = options.seed;
    while totals.cases < options.cases && Instant::now() < end {
        let run = AssertUnwindSafe(|| case(&recording, seed, &mut totals));
        if catch_unwind(run).is_err() {
            eprintln!("fuzz: failed, repeat with: fuzz --cases 1 --seed {seed}");
            return ExitCode::FAILURE;
        }
        seed = seeds.next();
    }
    println!(
        "fuzz: {} cases, {} bytes; {} frames read by both, {} refused by both; {} of {} clients and {} of {} sessions lived on",
        totals.cases,
        totals.bytes,
        totals.read,
        totals.refused,
        totals.clients_alive,
        totals.clients,
        totals.sessions_alive,
        totals.cases - totals.clients,
    );
    ExitCode::SUCCESS
}

#[derive(Default)]
struct Totals {
    cases: u64,
    bytes: u64,
    read: u64,
    refused: u64,
    clients: u64,
    clients_alive: u64,
    sessions_alive: u64,
}

fn case(recording: &Recording, seed: u64, totals: &mut Totals) {
    let mut random = Random::new(seed);
    totals.cases += 1;
    let mut judge = |packets: &[Packet], bytes: usize| {
        totals.bytes += bytes as u64;
        for packet in packets {
            match oracle::judge(&packet.to_bytes()) {
                Some(true) => totals.read += 1,
                Some(false) => totals.refused += 1,
                None => {}
            }
        }
    };
    if random.below(2) == 0 {
        let mut packets = mutate::packets(&recording.said_by_client);
        mutate::mutate(&mut packets, &recording.pool, &mut random);
        let bytes = mutate::join(&packets);
        judge(&packets, bytes.len());
        totals.sessions_alive += u64::from(play::to_broker(&bytes, &mut random));
    } else {
        let mut steps: Vec<_> = recording
            .said_by_broker
            .iter()
            .map(|said| mutate::packets(said))
            .collect();
        let step = random.below(steps.len());
        mutate::mutate(&mut steps[step], &recording.pool, &mut random);
        let bytes: Vec<_> = steps.iter().map(|step| mutate::join(step)).collect();
        judge(&steps[step], bytes.iter().map(Vec::len).sum());
        let whole = play::to_client(&bytes, None);
        let cut = play::to_client(&bytes, Some(&mut random));
        assert_eq!(whole, cut, "the events depend on how the bytes are cut");
        totals.clients += 1;
        totals.clients_alive += u64::from(whole.is_orderly);
    }
}

fn options() -> Result<Options, String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut options = Options {
        seconds: 20,
        seed: now.map_or(0, |now| now.as_nanos() as u64),
        cases: u64::MAX,
    };
    let mut arguments = env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().and_then(|value| value.parse().ok());
        let value = value.ok_or_else(|| format!("{name} needs a number"))?;
        match name.as_str() {
            "--seconds" => options.seconds = value,
            "--seed" => options.seed = value,
            "--cases" => options.cases = value,
            _ => return Err(format!("no such option: {name}")),
        }
    }
    Ok(options)
}
