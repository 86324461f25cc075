//! The cost of one turn through the ready queue.

use super::runtimes;
#[cfg(feature = "peers")]
use super::runtimes::YieldOnce;
use crate::harness::{Bench, PER_OPERATION, Sample, time};

const TASKS: u64 = 1000;
const YIELDS: u64 = 100;

pub(super) fn a_thousand_tasks() -> Bench {
    let bench = Bench::new(
        "yield",
        "1,000 tasks, each lets the others go first 100 times; per yield",
        PER_OPERATION,
    )
    .ours(|| runtimes::ours(ours()));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("tokio", || runtimes::tokio(peers::tokio()))
        .peer("tokio LocalSet", || {
            runtimes::tokio_local_set(peers::tokio())
        })
        .peer("smol", || runtimes::smol(peers::smol))
        .peer("monoio uring", || runtimes::monoio_uring(peers::monoio()))
        .peer("monoio epoll", || runtimes::monoio_epoll(peers::monoio()))
        .peer("glommio", || runtimes::glommio(peers::glommio()));
    bench
}

async fn ours() -> Sample {
    let yields = async || {
        for _ in 0..YIELDS {
            kernel::yield_now().await.expect("nobody cancels it");
        }
    };
    time(TASKS * YIELDS, async || {
        let tasks: Vec<_> = (0..TASKS).map(|_| kernel::spawn(yields())).collect();
        for task in tasks {
            task.join().await.expect("the task does not panic");
        }
    })
    .await
}

#[cfg(feature = "peers")]
mod peers {
    use super::*;

    async fn yields() {
        for _ in 0..YIELDS {
            YieldOnce::default().await;
        }
    }

    pub(super) async fn tokio() -> Sample {
        time(TASKS * YIELDS, async || {
            let tasks: Vec<_> = (0..TASKS)
                .map(|_| tokio::task::spawn_local(yields()))
                .collect();
            for task in tasks {
                task.await.expect("the task does not panic");
            }
        })
        .await
    }

    pub(super) async fn smol(smol: runtimes::Smol) -> Sample {
        time(TASKS * YIELDS, async || {
            let tasks: Vec<_> = (0..TASKS).map(|_| smol.spawn(yields())).collect();
            for task in tasks {
                task.await;
            }
        })
        .await
    }

    pub(super) async fn monoio() -> Sample {
        time(TASKS * YIELDS, async || {
            let tasks: Vec<_> = (0..TASKS).map(|_| monoio::spawn(yields())).collect();
            for task in tasks {
                task.await;
            }
        })
        .await
    }

    pub(super) async fn glommio() -> Sample {
        time(TASKS * YIELDS, async || {
            let tasks: Vec<_> = (0..TASKS).map(|_| glommio::spawn_local(yields())).collect();
            for task in tasks {
                task.await;
            }
        })
        .await
    }
}
