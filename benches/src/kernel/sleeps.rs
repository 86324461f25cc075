//! Many sleeping tasks: how late they wake, what that costs, and what room they take.

use super::runtimes;
use crate::harness::{Bench, Better, Figure};
use crate::harness::{Error, Sample, cpu_time};
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

const SLEEPS: u32 = 100_000;

pub(super) fn many() -> Bench {
    const FIGURES: &[Figure] = &[
        Figure {
            key: "cpu_s",
            unit: "s CPU",
            better: Better::Less,
        },
        Figure {
            key: "late_ms",
            unit: "ms late, mean",
            better: Better::Less,
        },
    ];
    let bench = Bench::new(
        "sleeps",
        "100,000 tasks spawned at once, each sleeps 1-100 ms; from the first spawn to the last end",
        FIGURES,
    )
    .ours(|| runtimes::ours(ours_sleeps()));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("tokio", || runtimes::tokio(peers::tokio_sleeps()))
        .peer("smol", || runtimes::smol(peers::smol_sleeps))
        .peer("monoio uring", || {
            runtimes::monoio_uring(peers::monoio_sleeps())
        })
        .peer("monoio epoll", || {
            runtimes::monoio_epoll(peers::monoio_sleeps())
        })
        .peer("glommio", || runtimes::glommio(peers::glommio_sleeps()));
    bench
}

async fn ours_sleeps() -> Sample {
    let (cpu, late) = (cpu_time(), Lateness::default());
    let tasks: Vec<_> = durations()
        .map(|d| kernel::spawn(late.clone().note(d, kernel::sleep)))
        .collect();
    for task in tasks {
        task.join().await.expect("the task does not panic");
    }
    late.sample(cpu_time() - cpu)
}

/// What the sleepers of one run have in common.
#[derive(Clone, Default)]
struct Lateness(Rc<Cell<Duration>>);

impl Lateness {
    /// Sleeps, by the given function, and notes how much later than asked it came back.
    async fn note<F: Future>(self, duration: Duration, sleep: impl FnOnce(Duration) -> F) {
        let due = Instant::now() + duration;
        sleep(duration).await;
        self.0.set(self.0.get() + due.elapsed());
    }

    fn sample(&self, cpu: Duration) -> Sample {
        Sample::from([
            ("cpu_s".into(), cpu.as_secs_f64()),
            (
                "late_ms".into(),
                self.0.get().as_secs_f64() * 1e3 / f64::from(SLEEPS),
            ),
        ])
    }
}

/// The same 1-100 ms for every contestant, from a linear congruential generator.
fn durations() -> impl Iterator<Item = Duration> {
    let mut state = 1u64;
    (0..SLEEPS).map(move |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        Duration::from_micros(1_000 + (state >> 33) % 99_001)
    })
}

// ------------------------------------------------------------------------------------------------------------------------------ memory

const SLEEPERS: u64 = 1_000_000;
/// Longer than any run.
const LONG: Duration = Duration::from_secs(3600);

pub(super) fn memory() -> Bench {
    const FIGURES: &[Figure] = &[Figure {
        key: "bytes",
        unit: "bytes",
        better: Better::Less,
    }];
    let bench = Bench::new(
        "bytes_per_sleeping_task",
        "resident memory of 1,000,000 sleeping tasks whose handles are dropped; per task",
        FIGURES,
    )
    .ours(|| runtimes::ours(ours_memory())?);
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("tokio", || runtimes::tokio(peers::tokio_memory())?)
        .peer("smol", || runtimes::smol(peers::smol_memory)?)
        .peer("monoio uring", || {
            runtimes::monoio_uring(peers::monoio_memory())?
        })
        .peer("monoio epoll", || {
            runtimes::monoio_epoll(peers::monoio_memory())?
        })
        .peer("glommio", || runtimes::glommio(peers::glommio_memory())?);
    bench
}

async fn ours_memory() -> Result<Sample, Error> {
    let before = resident()?;
    for _ in 0..SLEEPERS {
        drop(kernel::spawn(kernel::sleep(LONG)));
    }
    // The sleepers are polled, and so asleep, when a shorter sleep is over.
    kernel::sleep(Duration::from_millis(1)).await?;
    per_sleeper(before)
}

fn per_sleeper(before: u64) -> Result<Sample, Error> {
    let bytes = (resident()? - before) as f64 / SLEEPERS as f64;
    Ok(Sample::from([("bytes".into(), bytes)]))
}

/// Resident bytes of this process.
fn resident() -> Result<u64, Error> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().split(' ').next())
        .ok_or("/proc/self/status has no VmRSS")?;
    Ok(kib.parse::<u64>()? * 1024)
}

#[cfg(feature = "peers")]
mod peers {
    use super::*;

    pub(super) async fn tokio_sleeps() -> Sample {
        let (cpu, late) = (cpu_time(), Lateness::default());
        let tasks: Vec<_> = durations()
            .map(|d| tokio::task::spawn_local(late.clone().note(d, tokio::time::sleep)))
            .collect();
        for task in tasks {
            task.await.expect("the task does not panic");
        }
        late.sample(cpu_time() - cpu)
    }

    pub(super) async fn smol_sleeps(smol: runtimes::Smol) -> Sample {
        let (cpu, late) = (cpu_time(), Lateness::default());
        let tasks: Vec<_> = durations()
            .map(|d| smol.spawn(late.clone().note(d, async_io::Timer::after)))
            .collect();
        for task in tasks {
            task.await;
        }
        late.sample(cpu_time() - cpu)
    }

    pub(super) async fn monoio_sleeps() -> Sample {
        let (cpu, late) = (cpu_time(), Lateness::default());
        let tasks: Vec<_> = durations()
            .map(|d| monoio::spawn(late.clone().note(d, monoio::time::sleep)))
            .collect();
        for task in tasks {
            task.await;
        }
        late.sample(cpu_time() - cpu)
    }

    pub(super) async fn glommio_sleeps() -> Sample {
        let (cpu, late) = (cpu_time(), Lateness::default());
        let tasks: Vec<_> = durations()
            .map(|d| glommio::spawn_local(late.clone().note(d, glommio::timer::Timer::new)))
            .collect();
        for task in tasks {
            task.await;
        }
        late.sample(cpu_time() - cpu)
    }

    pub(super) async fn tokio_memory() -> Result<Sample, Error> {
        let before = resident()?;
        for _ in 0..SLEEPERS {
            tokio::task::spawn_local(tokio::time::sleep(LONG));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        per_sleeper(before)
    }

    pub(super) async fn smol_memory(smol: runtimes::Smol) -> Result<Sample, Error> {
        let before = resident()?;
        for _ in 0..SLEEPERS {
            smol.spawn(async_io::Timer::after(LONG)).detach();
        }
        async_io::Timer::after(Duration::from_millis(1)).await;
        per_sleeper(before)
    }

    pub(super) async fn monoio_memory() -> Result<Sample, Error> {
        let before = resident()?;
        for _ in 0..SLEEPERS {
            drop(monoio::spawn(monoio::time::sleep(LONG)));
        }
        monoio::time::sleep(Duration::from_millis(1)).await;
        per_sleeper(before)
    }

    pub(super) async fn glommio_memory() -> Result<Sample, Error> {
        let before = resident()?;
        for _ in 0..SLEEPERS {
            glommio::spawn_local(async {
                glommio::timer::Timer::new(LONG).await;
            })
            .detach();
        }
        glommio::timer::Timer::new(Duration::from_millis(1)).await;
        per_sleeper(before)
    }
}
