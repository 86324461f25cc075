//! The AMQP client beside other clients, all against one RabbitMQ.
//!
//! The figure that counts is the client's CPU per message: messages per second are the broker's doing. Nothing is pinned, since the broker
//! wants both cores, and lapin has a thread for its I/O beside tokio's.

mod bodies;
mod broker;
mod codec;
mod consume;
mod ours;
#[cfg(feature = "peers")]
mod peers;
mod publish;
mod rpc;

pub(crate) use broker::Broker;
pub(crate) use ours::{Ours, on_kernel};

use crate::harness::{Bench, Better, Error, Figure, MOST_LAPS, Sample, cpu_time, laps_to_count};
use crate::load::cpu_of;
use std::time::{Duration, Instant};

pub(crate) fn benches() -> Vec<Bench> {
    vec![
        codec::publish(),
        codec::deliver(),
        codec::ack(),
        publish::unconfirmed(),
        publish::confirmed(),
        consume::acking_each(),
        consume::acking_many(),
        bodies::one_mebibyte(),
        rpc::round_trips(),
    ]
}

/// A queue's name that no other process uses.
fn queue_name(role: &str) -> String {
    format!("benches.{}.{role}", std::process::id())
}

/// What the small messages carry.
const BODY: [u8; 100] = [b'x'; 100];

/// How many operations to do: `usual`, or, where instructions are being counted, as the laps say.
fn measured(usual: u64) -> u64 {
    laps_to_count().map_or(usual, |laps| laps * (usual / LAPS))
}

/// As many as the longest run needs, so that what comes before the measured ones costs all runs the same.
fn prepared(usual: u64) -> u64 {
    laps_to_count().map_or(usual, |_| MOST_LAPS * (usual / LAPS))
}

/// What is measured by the clock is cut into so many where instructions are counted.
const LAPS: u64 = 20;

const PER_MESSAGE: &[Figure] = &[
    Figure {
        key: "cpu_us",
        unit: "us client CPU",
        better: Better::Less,
    },
    Figure {
        key: "rate",
        unit: "messages/s",
        better: Better::More,
    },
    Figure {
        key: "broker_us",
        unit: "us broker CPU",
        better: Better::Less,
    },
];

/// Clocks read at both ends of what is measured.
struct Meter {
    begin: Instant,
    client: Duration,
    /// The broker's pid and CPU, if it is known.
    broker: Option<(u32, Duration)>,
}

impl Meter {
    fn start() -> Result<Self, Error> {
        let broker = match Broker::from_env()?.pid {
            Some(pid) => Some((pid, cpu_of(pid)?)),
            None => None,
        };
        Ok(Self {
            broker,
            client: cpu_time(),
            begin: Instant::now(),
        })
    }

    /// [`PER_MESSAGE`] over the time since the start.
    fn stop(self, messages: u64) -> Result<Sample, Error> {
        let (wall, client) = (self.begin.elapsed(), cpu_time() - self.client);
        let n = messages as f64;
        let mut sample = Sample::from([
            ("cpu_us".into(), client.as_secs_f64() * 1e6 / n),
            ("rate".into(), n / wall.as_secs_f64()),
            ("operations".into(), n),
        ]);
        if let Some((pid, before)) = self.broker {
            let broker = cpu_of(pid)? - before;
            sample.insert("broker_us".into(), broker.as_secs_f64() * 1e6 / n);
        }
        Ok(sample)
    }
}
