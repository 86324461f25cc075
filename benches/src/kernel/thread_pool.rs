//! A function handed to the thread pool, until the caller goes on.

use super::runtimes;
use crate::harness::{Bench, PER_OPERATION, Sample, time};

const CALLS: u64 = 1000;
const IN_FLIGHT: u64 = 64;

pub(super) fn one_at_a_time() -> Bench {
    let bench = Bench::new(
        "thread_pool_one",
        "a no-op in the thread pool, one at a time; per call",
        PER_OPERATION,
    )
    .on_all_cores()
    .ours(|| runtimes::ours(ours(1)));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("tokio", || runtimes::tokio(peers::tokio(1)))
        .peer("smol", || runtimes::smol(|smol| peers::smol(smol, 1)))
        .peer("monoio uring", || runtimes::monoio_uring(peers::monoio(1)))
        .peer("monoio epoll", || runtimes::monoio_epoll(peers::monoio(1)))
        .peer("glommio", || runtimes::glommio(peers::glommio(1)));
    bench
}

pub(super) fn many_in_flight() -> Bench {
    let bench = Bench::new(
        "thread_pool_64",
        "a no-op in the thread pool, 64 tasks each call one at a time; per call",
        PER_OPERATION,
    )
    .on_all_cores()
    .ours(|| runtimes::ours(ours(IN_FLIGHT)));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("tokio", || runtimes::tokio(peers::tokio(IN_FLIGHT)))
        .peer("smol", || {
            runtimes::smol(|smol| peers::smol(smol, IN_FLIGHT))
        })
        .peer("monoio uring", || {
            runtimes::monoio_uring(peers::monoio(IN_FLIGHT))
        })
        .peer("monoio epoll", || {
            runtimes::monoio_epoll(peers::monoio(IN_FLIGHT))
        })
        .peer("glommio", || runtimes::glommio(peers::glommio(IN_FLIGHT)));
    bench
}

async fn ours(tasks: u64) -> Sample {
    time(tasks * CALLS, async || {
        let calls = async || {
            for _ in 0..CALLS {
                kernel::run_in_thread(|| ())
                    .await
                    .expect("nobody cancels it");
            }
        };
        let tasks: Vec<_> = (0..tasks).map(|_| kernel::spawn(calls())).collect();
        for task in tasks {
            task.join().await.expect("the task does not panic");
        }
    })
    .await
}

#[cfg(feature = "peers")]
mod peers {
    use super::*;

    pub(super) async fn tokio(tasks: u64) -> Sample {
        time(tasks * CALLS, async || {
            let calls = async || {
                for _ in 0..CALLS {
                    tokio::task::spawn_blocking(|| ())
                        .await
                        .expect("a no-op does not panic");
                }
            };
            let tasks: Vec<_> = (0..tasks)
                .map(|_| tokio::task::spawn_local(calls()))
                .collect();
            for task in tasks {
                task.await.expect("the task does not panic");
            }
        })
        .await
    }

    pub(super) async fn smol(smol: runtimes::Smol, tasks: u64) -> Sample {
        time(tasks * CALLS, async || {
            let calls = async || {
                for _ in 0..CALLS {
                    blocking::unblock(|| ()).await;
                }
            };
            let tasks: Vec<_> = (0..tasks).map(|_| smol.spawn(calls())).collect();
            for task in tasks {
                task.await;
            }
        })
        .await
    }

    pub(super) async fn monoio(tasks: u64) -> Sample {
        time(tasks * CALLS, async || {
            let calls = async || {
                for _ in 0..CALLS {
                    monoio::spawn_blocking(|| ())
                        .await
                        .expect("the pool outlives the call");
                }
            };
            let tasks: Vec<_> = (0..tasks).map(|_| monoio::spawn(calls())).collect();
            for task in tasks {
                task.await;
            }
        })
        .await
    }

    pub(super) async fn glommio(tasks: u64) -> Sample {
        time(tasks * CALLS, async || {
            let calls = async || {
                for _ in 0..CALLS {
                    glommio::executor().spawn_blocking(|| ()).await;
                }
            };
            let tasks: Vec<_> = (0..tasks).map(|_| glommio::spawn_local(calls())).collect();
            for task in tasks {
                task.await;
            }
        })
        .await
    }
}
