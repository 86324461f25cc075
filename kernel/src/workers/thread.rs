//! Calls in threads.
//!
//! A pool has a queue of calls and up to `size` threads, which are made when they are needed and kept. A call that nobody waits for any more
//! is not started; one that runs cannot be stopped, so it runs on as a *zombie*. Its result is dropped in its thread, and the
//! thread ends with it: it left the pool at the moment its caller went away, so that a call that hangs for ever does not
//! take a place for ever (as in Curio).
//!
//! Which thread makes a call, and which are woken for it, is the business of their [`Crew`].

use std::future::Future;
use std::io;
use std::panic::{Location, resume_unwind};
use std::sync::{Arc, LazyLock};
use std::thread;

use super::call::Call;
use super::crew::Crew;
use crate::error::Interrupt;
use crate::traps::{Ring, future_wait};

/// As many threads as [`run_in_thread`] uses (Curio's `MAX_WORKER_THREADS`).
const THREADS: usize = 64;

/// Calls `call` in a thread and waits for its value (Curio's `run_in_thread`). At most 64 such calls run in this process at a time;
/// the others wait their turn. [`ThreadPool`] makes a pool of one's own.
///
/// The call starts only when the task waits for it: an interrupt that is pending prevents it.
///
/// Cancellation point: yes. If interrupted or dropped, the caller goes on at once. A call that has not begun never will; one that has
/// goes on in its thread to its end, and its value is dropped there.
///
/// # Errors
/// An [`Interrupt`].
///
/// # Panics
/// With what the call panicked with. Also if no thread can be started.
///
/// ```
/// # kernel::run(async {
/// let sum = kernel::run_in_thread(|| (1..=100).sum::<u32>()).await;
/// assert_eq!(sum, Ok(5050));
/// # }).unwrap();
/// ```
#[track_caller]
pub fn run_in_thread<T, F>(call: F) -> impl Future<Output = Result<T, Interrupt>> + use<T, F>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    static POOL: LazyLock<ThreadPool> = LazyLock::new(|| ThreadPool::new(THREADS));
    POOL.run(call)
}

/// A pool of threads for calls that would block the kernel. Can be shared by the kernels of several threads.
///
/// When the last handle is dropped, idle threads end at once, the others after the calls that are waited for.
#[derive(Clone)]
pub struct ThreadPool {
    handle: Arc<Handle>,
}

impl ThreadPool {
    /// A pool of up to `size` threads, none of which is started yet.
    ///
    /// # Panics
    /// If `size` is 0.
    #[must_use]
    #[track_caller]
    pub fn new(size: usize) -> Self {
        assert!(size > 0, "a pool needs a thread");
        Self::started_by(size, |crew| {
            let thread = thread::Builder::new().name("kernel-worker".into());
            thread.spawn(move || crew.work()).map(drop)
        })
    }

    fn started_by(
        size: usize,
        start: impl Fn(Arc<Crew<Ring>>) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let crew = Crew::new(size, Box::new(start));
        Self {
            handle: Arc::new(Handle(Arc::new(crew))),
        }
    }

    /// Calls `call` in a thread of the pool and waits for its value. Calls start in the order in which they are awaited.
    ///
    /// As [`run_in_thread`] in every other respect.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn run<T, F>(&self, call: F) -> impl Future<Output = Result<T, Interrupt>> + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let at = Location::caller();
        let mut errand = Errand {
            call: None,
            pool: Arc::clone(&self.handle),
        };
        async move {
            let Errand { call: slot, pool } = &mut errand;
            let submit = move |completer| {
                let call = Arc::new(Call::new(call, completer));
                *slot = Some(Arc::clone(&call));
                pool.0.submit(call);
            };
            future_wait(submit).called_at(at).await?;
            let call = errand.call.take().expect("the wait was answered");
            match call.take() {
                Some(Ok(value)) => Ok(value),
                Some(Err(payload)) => resume_unwind(payload),
                None => unreachable!("the pool drops no call that is waited for"),
            }
        }
    }

    /// How many threads it may have.
    #[must_use]
    pub fn size(&self) -> usize {
        self.handle.0.size()
    }

    /// How many threads it has now, without those that still run an abandoned call.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.handle.0.threads()
    }
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool")
            .field("size", &self.size())
            .field("threads", &self.threads())
            .finish()
    }
}

/// Dropped when nobody can submit any more.
struct Handle(Arc<Crew<Ring>>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The caller's side of a call.
struct Errand<F, T> {
    /// From its submission until its value is taken.
    call: Option<Arc<Call<F, T>>>,
    pool: Arc<Handle>,
}

impl<F, T> Drop for Errand<F, T> {
    fn drop(&mut self) {
        if self.call.take().is_some_and(|call| call.abandon()) {
            self.pool.0.discharge();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::{JoinError, spawn};

    #[test]
    fn a_call_panics_in_its_caller_when_there_is_no_thread_for_it() {
        let pool = ThreadPool::started_by(2, |_| Err(io::ErrorKind::OutOfMemory.into()));
        crate::run(async {
            for _ in 0..2 {
                let call = pool.run(|| 1);
                let Err(JoinError::Panicked(panic)) = spawn(call).join().await else {
                    panic!("there is no thread");
                };
                assert_eq!(
                    panic.to_string(),
                    "no worker thread could be started: out of memory"
                );
                assert_eq!(pool.threads(), 0);
            }
        })
        .unwrap();
    }
}
