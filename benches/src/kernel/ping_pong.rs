//! Two tasks that wait for each other.

use super::runtimes;
use crate::harness::{Bench, PER_OPERATION, Sample, time};
use kernel::sync::Queue;
use std::rc::Rc;

const ROUNDS: u64 = 10_000;

pub(super) fn over_queues() -> Bench {
    let bench = Bench::new(
        "ping_pong",
        "two tasks over two queues of length 1, the runtime's own kind; per round trip",
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
    time(ROUNDS, async || {
        let ping = Rc::new(Queue::new(Some(1)));
        let pong = Rc::new(Queue::new(Some(1)));
        let other = kernel::spawn({
            let (ping, pong) = (ping.clone(), pong.clone());
            async move {
                while let Ok(n) = ping.get().await {
                    pong.put(n).await.expect("the first task listens");
                }
            }
        });
        for n in 0..ROUNDS {
            ping.put(n).await.expect("the other task listens");
            assert_eq!(pong.get().await.expect("the other task answers"), n);
        }
        ping.close();
        other.join().await.expect("the task does not panic");
    })
    .await
}

#[cfg(feature = "peers")]
mod peers {
    use super::*;

    pub(super) async fn tokio() -> Sample {
        use tokio::sync::mpsc::channel;
        time(ROUNDS, async || {
            let (ping, mut pinged) = channel(1);
            let (pong, mut ponged) = channel(1);
            let other = tokio::task::spawn_local(async move {
                while let Some(n) = pinged.recv().await {
                    pong.send(n).await.expect("the first task listens");
                }
            });
            for n in 0..ROUNDS {
                ping.send(n).await.expect("the other task listens");
                assert_eq!(ponged.recv().await, Some(n));
            }
            drop(ping);
            other.await.expect("the task does not panic");
        })
        .await
    }

    /// async-channel is smol's; it has no single-threaded kind.
    pub(super) async fn smol(smol: runtimes::Smol) -> Sample {
        use async_channel::bounded;
        time(ROUNDS, async || {
            let (ping, pinged) = bounded(1);
            let (pong, ponged) = bounded(1);
            let other = smol.spawn(async move {
                while let Ok(n) = pinged.recv().await {
                    pong.send(n).await.expect("the first task listens");
                }
            });
            for n in 0..ROUNDS {
                ping.send(n).await.expect("the other task listens");
                assert_eq!(ponged.recv().await, Ok(n));
            }
            drop(ping);
            other.await;
        })
        .await
    }

    /// monoio has no channel of its own and names local-sync, by its author, for the purpose.
    pub(super) async fn monoio() -> Sample {
        use local_sync::mpsc::bounded::channel;
        time(ROUNDS, async || {
            let (ping, mut pinged) = channel(1);
            let (pong, mut ponged) = channel(1);
            let other = monoio::spawn(async move {
                while let Some(n) = pinged.recv().await {
                    pong.send(n).await.expect("the first task listens");
                }
            });
            for n in 0..ROUNDS {
                ping.send(n).await.expect("the other task listens");
                assert_eq!(ponged.recv().await, Some(n));
            }
            drop(ping);
            other.await;
        })
        .await
    }

    pub(super) async fn glommio() -> Sample {
        use glommio::channels::local_channel::new_bounded;
        time(ROUNDS, async || {
            let (ping, pinged) = new_bounded(1);
            let (pong, ponged) = new_bounded(1);
            let other = glommio::spawn_local(async move {
                while let Some(n) = pinged.recv().await {
                    pong.send(n).await.expect("the first task listens");
                }
            });
            for n in 0..ROUNDS {
                ping.send(n).await.expect("the other task listens");
                assert_eq!(ponged.recv().await, Some(n));
            }
            drop(ping);
            other.await;
        })
        .await
    }
}
