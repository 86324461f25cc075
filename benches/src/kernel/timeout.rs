//! A timeout that is set and then not needed: what most timers of a server come to.

use super::runtimes;
#[cfg(feature = "peers")]
use super::runtimes::YieldOnce;
use crate::harness::{Bench, PER_OPERATION, Sample, time};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(10);
const TIMEOUTS: u64 = 1000;

pub(super) fn set_and_cancelled() -> Bench {
    let bench = Bench::new(
        "timeout",
        "a timeout of 10 s round a future that yields once; per timeout",
        PER_OPERATION,
    )
    .ours(|| runtimes::ours(ours()));
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("tokio", || runtimes::tokio(peers::tokio()))
        .peer("tokio LocalSet", || {
            runtimes::tokio_local_set(peers::tokio())
        })
        .peer("smol", || runtimes::smol(|_| peers::smol()))
        .peer("monoio uring", || runtimes::monoio_uring(peers::monoio()))
        .peer("monoio epoll", || runtimes::monoio_epoll(peers::monoio()))
        .peer("glommio", || runtimes::glommio(peers::glommio()));
    bench
}

async fn ours() -> Sample {
    time(TIMEOUTS, async || {
        for _ in 0..TIMEOUTS {
            kernel::timeout_after(LIMIT, kernel::yield_now())
                .await
                .expect("the future is ready long before");
        }
    })
    .await
}

#[cfg(feature = "peers")]
mod peers {
    use super::*;

    pub(super) async fn tokio() -> Sample {
        time(TIMEOUTS, async || {
            for _ in 0..TIMEOUTS {
                tokio::time::timeout(LIMIT, YieldOnce::default())
                    .await
                    .expect("the future is ready long before");
            }
        })
        .await
    }

    /// smol has no `timeout`; racing a `Timer` is how its documentation spells one.
    pub(super) async fn smol() -> Sample {
        use futures_lite::FutureExt;
        time(TIMEOUTS, async || {
            for _ in 0..TIMEOUTS {
                let late = async {
                    async_io::Timer::after(LIMIT).await;
                    panic!("the future is ready long before");
                };
                YieldOnce::default().or(late).await;
            }
        })
        .await
    }

    pub(super) async fn monoio() -> Sample {
        time(TIMEOUTS, async || {
            for _ in 0..TIMEOUTS {
                monoio::time::timeout(LIMIT, YieldOnce::default())
                    .await
                    .expect("the future is ready long before");
            }
        })
        .await
    }

    pub(super) async fn glommio() -> Sample {
        time(TIMEOUTS, async || {
            for _ in 0..TIMEOUTS {
                let work = async {
                    YieldOnce::default().await;
                    Ok(())
                };
                glommio::timer::timeout(LIMIT, work)
                    .await
                    .expect("the future is ready long before");
            }
        })
        .await
    }
}
