//! Spawning tasks and joining them.

use super::runtimes;
use crate::harness::{Bench, PER_OPERATION, Sample, time};
use std::hint::black_box;

const BATCH: u64 = 1000;

pub(super) fn in_batches() -> Bench {
    let bench = Bench::new(
        "spawn_join",
        "1,000 tasks spawned, then all joined; per task",
        PER_OPERATION,
    )
    .ours(|| runtimes::ours(ours_in_batches()));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("tokio", || runtimes::tokio(peers::tokio_batches()))
        .peer("tokio LocalSet", || {
            runtimes::tokio_local_set(peers::tokio_batches())
        })
        .peer("smol", || runtimes::smol(peers::smol_batches))
        .peer("monoio uring", || {
            runtimes::monoio_uring(peers::monoio_batches())
        })
        .peer("monoio epoll", || {
            runtimes::monoio_epoll(peers::monoio_batches())
        })
        .peer("glommio", || runtimes::glommio(peers::glommio_batches()));
    bench
}

pub(super) fn one_by_one() -> Bench {
    let bench = Bench::new(
        "spawn_join_one",
        "a task spawned and joined, then the next; per task",
        PER_OPERATION,
    )
    .ours(|| runtimes::ours(ours_one_by_one()));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("tokio", || runtimes::tokio(peers::tokio_one_by_one()))
        .peer("tokio LocalSet", || {
            runtimes::tokio_local_set(peers::tokio_one_by_one())
        })
        .peer("smol", || runtimes::smol(peers::smol_one_by_one))
        .peer("monoio uring", || {
            runtimes::monoio_uring(peers::monoio_one_by_one())
        })
        .peer("monoio epoll", || {
            runtimes::monoio_epoll(peers::monoio_one_by_one())
        })
        .peer("glommio", || runtimes::glommio(peers::glommio_one_by_one()));
    bench
}

async fn ours_in_batches() -> Sample {
    time(BATCH, async || {
        let tasks: Vec<_> = (0..BATCH)
            .map(|n| kernel::spawn(async move { n }))
            .collect();
        for task in tasks {
            black_box(task.join().await.expect("the task does not panic"));
        }
    })
    .await
}

async fn ours_one_by_one() -> Sample {
    time(BATCH, async || {
        for n in 0..BATCH {
            let task = kernel::spawn(async move { n });
            black_box(task.join().await.expect("the task does not panic"));
        }
    })
    .await
}

#[cfg(feature = "peers")]
mod peers {
    use super::*;

    pub(super) async fn tokio_batches() -> Sample {
        time(BATCH, async || {
            let tasks: Vec<_> = (0..BATCH)
                .map(|n| tokio::task::spawn_local(async move { n }))
                .collect();
            for task in tasks {
                black_box(task.await.expect("the task does not panic"));
            }
        })
        .await
    }

    pub(super) async fn smol_batches(smol: runtimes::Smol) -> Sample {
        time(BATCH, async || {
            let tasks: Vec<_> = (0..BATCH).map(|n| smol.spawn(async move { n })).collect();
            for task in tasks {
                black_box(task.await);
            }
        })
        .await
    }

    pub(super) async fn monoio_batches() -> Sample {
        time(BATCH, async || {
            let tasks: Vec<_> = (0..BATCH)
                .map(|n| monoio::spawn(async move { n }))
                .collect();
            for task in tasks {
                black_box(task.await);
            }
        })
        .await
    }

    pub(super) async fn glommio_batches() -> Sample {
        time(BATCH, async || {
            let tasks: Vec<_> = (0..BATCH)
                .map(|n| glommio::spawn_local(async move { n }))
                .collect();
            for task in tasks {
                black_box(task.await);
            }
        })
        .await
    }

    pub(super) async fn tokio_one_by_one() -> Sample {
        time(BATCH, async || {
            for n in 0..BATCH {
                let task = tokio::task::spawn_local(async move { n });
                black_box(task.await.expect("the task does not panic"));
            }
        })
        .await
    }

    pub(super) async fn smol_one_by_one(smol: runtimes::Smol) -> Sample {
        time(BATCH, async || {
            for n in 0..BATCH {
                black_box(smol.spawn(async move { n }).await);
            }
        })
        .await
    }

    pub(super) async fn monoio_one_by_one() -> Sample {
        time(BATCH, async || {
            for n in 0..BATCH {
                black_box(monoio::spawn(async move { n }).await);
            }
        })
        .await
    }

    pub(super) async fn glommio_one_by_one() -> Sample {
        time(BATCH, async || {
            for n in 0..BATCH {
                black_box(glommio::spawn_local(async move { n }).await);
            }
        })
        .await
    }
}
