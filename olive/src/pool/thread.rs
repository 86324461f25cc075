//! Thread workers: Rust functions in threads of this process.
//!
//! A thread cannot be killed. When a task's time is up its [`Ctx`] says so, and a function that looks ends in order; one that does not
//! is given up after a moment: its outcome is the timeout, another thread takes its place, and it runs on unheard, counted as stuck.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use kernel::Interrupt;
use kernel::sync::Queue;

use super::Task;
use super::child::Limit;
use crate::outcome::Outcome;
use crate::registry::{Ctx, Registry};

/// How long a function may take to notice that its time is up.
const GRACE: Duration = Duration::from_secs(1);

/// A pool of threads that run the functions of a registry. Cheap to clone; must be used inside one kernel.
#[derive(Debug, Clone)]
pub struct ThreadPool {
    registry: Arc<Registry>,
    threads: kernel::ThreadPool,
    /// One item for each task that may run: the time limit counts from the start of a task, not from its arrival.
    permits: Rc<Queue<()>>,
    stuck: Rc<Cell<u64>>,
}

impl ThreadPool {
    /// A pool of up to `size` threads; none is started yet.
    #[must_use]
    pub fn new(registry: Arc<Registry>, size: usize) -> Self {
        let permits = Queue::new(None);
        for _ in 0..size {
            permits
                .try_put(())
                .expect("a queue without bound takes everything");
        }
        Self {
            registry,
            threads: kernel::ThreadPool::new(size),
            permits: Rc::new(permits),
            stuck: Rc::default(),
        }
    }

    /// Runs a task in a thread. Waits for a free one.
    ///
    /// If dropped, a function that has begun runs on and nobody hears of it.
    ///
    /// # Errors
    /// The caller's interrupt.
    pub async fn run(&self, task: Task) -> Result<Outcome, Interrupt> {
        let permit = self.permit().await?;
        let now = kernel::now();
        let limit = Limit::new(now, task.timeout, task.soft, GRACE);
        let stop = Arc::new(AtomicBool::new(false));
        let ctx = Ctx::new(
            task.message.tid.as_str(),
            task.attempt,
            limit.map(|l| l.hard_at),
            stop.clone(),
        );
        let (registry, message) = (self.registry.clone(), task.message);
        let tid = message.tid.clone();
        let mut run = pin!(self.threads.run(move || registry.run(&ctx, &message)));
        let Some(limit) = limit else { return run.await };
        if let Some(outcome) = until(limit.soft_at.unwrap_or(limit.hard_at), run.as_mut()).await? {
            return outcome;
        }
        stop.store(true, Ordering::Relaxed);
        let ended = until(limit.hard_at, run).await?;
        drop(permit);
        match ended {
            Some(Ok(outcome @ Outcome::Done(_))) => Ok(outcome),
            Some(Err(interrupt)) => Err(interrupt),
            Some(Ok(_)) => Ok(Outcome::TimedOut { limit: limit.limit }),
            None => {
                self.stuck.set(self.stuck.get() + 1);
                log::warn!(
                    "task {tid} does not end after its {:?}; its thread runs on, a process worker could be killed",
                    limit.limit
                );
                Ok(Outcome::TimedOut { limit: limit.limit })
            }
        }
    }

    /// How many functions did not end in time and were given up.
    #[must_use]
    pub fn stuck(&self) -> u64 {
        self.stuck.get()
    }

    async fn permit(&self) -> Result<Permit, Interrupt> {
        match self.permits.get().await {
            Ok(()) => Ok(Permit(self.permits.clone())),
            Err(error) => Err(kernel::MaybeInterrupt::interrupt(&error)
                .cloned()
                .unwrap_or_else(Interrupt::cancelled)),
        }
    }
}

struct Permit(Rc<Queue<()>>);

impl Drop for Permit {
    fn drop(&mut self) {
        let _ = self.0.try_put(());
    }
}

/// Waits for `future` until `deadline`; `None` leaves it as it is, to be waited for again.
async fn until<F: Future>(
    deadline: Instant,
    mut future: Pin<&mut F>,
) -> Result<Option<F::Output>, Interrupt> {
    let mut sleep = pin!(kernel::sleep_until(deadline));
    poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(Some(output)));
        }
        sleep.as_mut().poll(cx).map(|woken| woken.map(|_| None))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::TaskMessage;
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, channel};

    fn task(func: &str, timeout: Option<u64>) -> Task {
        let body = format!(r#"{{"func":"{func}","tid":"t"}}"#);
        let message = Arc::new(TaskMessage::decode(body.into_bytes()).unwrap());
        Task {
            message,
            attempt: 1,
            timeout: timeout.map(Duration::from_millis),
            soft: None,
        }
    }

    fn pool(size: usize, add: impl FnOnce(&mut Registry)) -> ThreadPool {
        let mut registry = Registry::default();
        add(&mut registry);
        ThreadPool::new(Arc::new(registry), size)
    }

    fn receive(gate: &Mutex<Receiver<()>>) {
        let _ = gate.lock().unwrap().recv();
    }

    /// Accepts: seed/thread_worker
    #[test]
    fn a_task_in_a_thread_does_not_hold_up_the_kernel() {
        let (open, gate) = channel();
        let gate = Mutex::new(gate);
        let outcome = kernel::run(async move {
            let pool = pool(1, |r| {
                r.add("waits", move |_, ()| {
                    receive(&gate);
                    Ok("opened")
                })
            });
            let task = kernel::spawn(async move { pool.run(task("waits", None)).await });
            kernel::sleep(Duration::from_millis(1)).await.unwrap();
            open.send(()).unwrap(); // sent by the kernel's thread: it was free to
            task.join().await.unwrap()
        });
        assert_eq!(outcome.unwrap(), Ok(Outcome::Done(b"\"opened\"".to_vec())));
    }

    #[test]
    fn a_function_that_looks_ends_when_its_time_is_up_and_one_that_does_not_is_given_up() {
        let (open, gate) = channel::<()>();
        let gate = Mutex::new(gate);
        kernel::run(async move {
            let pool = pool(1, |r| {
                r.add("looks", |ctx, ()| -> crate::TaskResult<()> {
                    while !ctx.cancelled() {
                        std::thread::yield_now();
                    }
                    Err(crate::TaskError::permanent("stopped"))
                });
                r.add("stuck", move |_, ()| {
                    receive(&gate);
                    Ok(())
                });
                r.add("quick", |_, ()| Ok(1));
            });
            let timed_out = |ms| {
                Ok(Outcome::TimedOut {
                    limit: Duration::from_millis(ms),
                })
            };
            assert_eq!(pool.run(task("looks", Some(20))).await, timed_out(20));
            assert_eq!(pool.stuck(), 0);
            assert_eq!(pool.run(task("stuck", Some(20))).await, timed_out(20));
            assert_eq!(pool.stuck(), 1);
            assert_eq!(
                pool.run(task("quick", Some(60_000))).await,
                Ok(Outcome::Done(b"1".to_vec())),
                "its place was taken"
            );
            drop(open);
        })
        .unwrap();
    }

    #[test]
    fn no_more_tasks_run_at_once_than_there_are_workers() {
        let both = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let most = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let (running, high) = (both, most.clone());
        kernel::run(async move {
            let pool = pool(2, |r| {
                r.add("count", move |_, ()| {
                    high.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    std::thread::yield_now();
                    running.fetch_sub(1, Ordering::SeqCst);
                    Ok(())
                })
            });
            let tasks: Vec<_> = (0..200)
                .map(|_| {
                    let pool = pool.clone();
                    kernel::spawn(async move { pool.run(task("count", None)).await })
                })
                .collect();
            for task in tasks {
                assert!(matches!(task.join().await, Ok(Ok(Outcome::Done(_)))));
            }
        })
        .unwrap();
        assert!(most.load(Ordering::SeqCst) <= 2);
    }
}
