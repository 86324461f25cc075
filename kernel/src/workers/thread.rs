//! Calls in threads.
//!
//! A pool has a queue of calls and up to `size` threads, which are made when they are needed and kept. A call that nobody waits for any more
//! is not started; one that runs cannot be stopped, so it runs on as a *zombie*. Its result is dropped in its thread, and the
//! thread ends with it: it left the pool at the moment its caller went away, so that a call that hangs for ever does not
//! take a place for ever (as in Curio).
//!
//! **Waking few.** Waking a thread costs more than a short call. So at most one thread is on its way at any time (`calling`): the one
//! that arrives takes a call and, if there are more, calls the next thread before it begins. Long calls spread over as many
//! threads as there are within a few wakes; of short ones the first thread has done most before a second one comes.
//!
//! No call is left behind. Who adds one and finds a thread on its way leaves it to that thread: that looks at the queue after it
//! has cleared `calling`, and read-modify-writes of one atomic order the two. A thread that goes to sleep looks at the queue
//! once more under the lock under which callers look for sleepers.

use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, LazyLock, PoisonError};
use std::thread::Result as Outcome;

use crate::error::Interrupt;
use crate::primitives::channel::{self, Receiver, Sender};
use crate::primitives::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering, thread};
use crate::traps::{Completer, future_wait};

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
        Self {
            handle: Arc::new(Handle(Arc::new(Shared::new(size)))),
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
        let errand = Errand {
            call: Arc::new(Call(Mutex::new(Stage::Idle))),
            pool: self.clone(),
        };
        let (job, handle) = (Arc::clone(&errand.call), Arc::clone(&self.handle));
        // Made here, not in the block below, for the caller's location.
        let wait = future_wait(move |completer| {
            *job.stage() = Stage::Queued(call, completer);
            handle.0.submit(job);
        });
        async move {
            wait.await?;
            match errand.call.take() {
                Some(Ok(value)) => Ok(value),
                Some(Err(payload)) => resume_unwind(payload),
                None => unreachable!("only the call's end completes the wait"),
            }
        }
    }

    /// How many threads it may have.
    #[must_use]
    pub fn size(&self) -> usize {
        self.handle.0.size
    }

    /// How many threads it has now, without those that still run an abandoned call.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.handle.0.crew().threads
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
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.crew().closed = true;
        self.0.bell.notify_all();
    }
}

struct Shared {
    jobs: Sender<Arc<dyn Job>>,
    queue: Receiver<Arc<dyn Job>>,
    size: usize,
    /// Whether a thread is on its way to the queue.
    calling: AtomicBool,
    crew: Mutex<Crew>,
    bell: Condvar,
}

#[derive(Default)]
struct Crew {
    threads: usize,
    idle: usize,
    /// How many of the sleepers were called and have not woken yet.
    called: usize,
    closed: bool,
}

impl Shared {
    fn new(size: usize) -> Self {
        let (jobs, queue) = channel::unbounded();
        Self {
            jobs,
            queue,
            size,
            calling: AtomicBool::new(false),
            crew: Mutex::new(Crew::default()),
            bell: Condvar::new(),
        }
    }

    fn submit(self: &Arc<Self>, job: Arc<dyn Job>) {
        self.jobs
            .send(job)
            .expect("`self` holds the receiving end too");
        self.call_thread();
    }

    /// Sees to it that a thread comes to the queue, unless one is on its way or all are busy, who will come by themselves.
    fn call_thread(self: &Arc<Self>) {
        if self.calling.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut crew = self.crew();
        if crew.idle > 0 {
            crew.idle -= 1;
            crew.called += 1;
            drop(crew);
            self.bell.notify_one();
        } else if crew.threads < self.size {
            crew.threads += 1;
            drop(crew);
            self.start_thread();
        } else {
            self.arrived();
        }
    }

    /// The called thread is there, or there was none to call.
    fn arrived(&self) {
        self.calling.swap(false, Ordering::AcqRel);
    }

    fn start_thread(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        let started: io::Result<_> = thread::Builder::new()
            .name("kernel-worker".into())
            .spawn(move || shared.work());
        if let Err(error) = started {
            let mut crew = self.crew();
            crew.threads -= 1;
            self.arrived();
            assert!(
                crew.threads > 0,
                "no worker thread could be started: {error}"
            );
            log::warn!("starting a worker thread: {error}; {} go on", crew.threads);
        }
    }

    /// The life of a thread.
    fn work(self: &Arc<Self>) {
        let mut called = true;
        loop {
            if let Ok(job) = self.queue.try_recv() {
                if std::mem::take(&mut called) {
                    self.arrived();
                }
                if !self.queue.is_empty() {
                    self.call_thread();
                }
                if job.run() == Crewed::No {
                    return;
                }
                continue;
            }
            let mut crew = self.crew();
            if std::mem::take(&mut called) {
                self.arrived();
            }
            if !self.queue.is_empty() {
                continue;
            }
            crew.idle += 1;
            while crew.called == 0 {
                if crew.closed {
                    return;
                }
                crew = self.bell.wait(crew).unwrap_or_else(PoisonError::into_inner);
            }
            crew.called -= 1;
            called = true;
        }
    }

    /// A thread is left to its zombie: another may take its place.
    fn discharge(self: &Arc<Self>) {
        self.crew().threads -= 1;
        if !self.queue.is_empty() {
            self.call_thread();
        }
    }

    /// Nothing that runs under the lock leaves the counts half changed, so poison is no reason to stop.
    fn crew(&self) -> MutexGuard<'_, Crew> {
        self.crew.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call as the threads see it.
trait Job: Send + Sync {
    /// Runs it, unless it was abandoned.
    fn run(&self) -> Crewed;
}

/// Whether the thread still belongs to the pool.
#[derive(PartialEq, Eq)]
enum Crewed {
    Yes,
    No,
}

struct Call<F, T>(Mutex<Stage<F, T>>);

enum Stage<F, T> {
    /// Not submitted, or abandoned before it began, or its value was taken.
    Idle,
    Queued(F, Completer),
    Running,
    /// Abandoned while it ran.
    Zombie,
    Done(Outcome<T>),
}

impl<F, T> Call<F, T> {
    fn stage(&self) -> MutexGuard<'_, Stage<F, T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Outcome<T>> {
        match std::mem::replace(&mut *self.stage(), Stage::Idle) {
            Stage::Done(outcome) => Some(outcome),
            Stage::Idle | Stage::Queued(..) | Stage::Running | Stage::Zombie => None,
        }
    }
}

impl<F: FnOnce() -> T + Send, T: Send + 'static> Job for Call<F, T> {
    fn run(&self) -> Crewed {
        let mut stage = self.stage();
        let (call, completer) = match std::mem::replace(&mut *stage, Stage::Idle) {
            Stage::Queued(call, completer) => (call, completer),
            Stage::Idle | Stage::Running | Stage::Zombie | Stage::Done(_) => return Crewed::Yes,
        };
        *stage = Stage::Running;
        drop(stage);
        let outcome = catch_unwind(AssertUnwindSafe(call));
        let mut stage = self.stage();
        if let Stage::Running = *stage {
            *stage = Stage::Done(outcome);
            drop(stage);
            completer.complete();
            return Crewed::Yes;
        }
        drop(stage);
        if let Err(payload) = &outcome {
            log::warn!(
                "an abandoned call in a thread panicked: {}",
                crate::error::panic_text(payload.as_ref())
            );
        }
        discard(outcome);
        Crewed::No
    }
}

/// Drops a value that may panic in doing so: not even that ends a thread of the pool.
fn discard<T>(value: T) {
    if catch_unwind(AssertUnwindSafe(|| drop(value))).is_err() {
        log::warn!("dropping the value of an abandoned call panicked");
    }
}

/// The caller's side of a call.
struct Errand<F, T> {
    call: Arc<Call<F, T>>,
    pool: ThreadPool,
}

impl<F, T> Drop for Errand<F, T> {
    fn drop(&mut self) {
        let mut stage = self.call.stage();
        let next = match *stage {
            Stage::Running => Stage::Zombie,
            Stage::Idle | Stage::Queued(..) | Stage::Zombie | Stage::Done(_) => Stage::Idle,
        };
        let last = std::mem::replace(&mut *stage, next);
        drop(stage);
        if let Stage::Running = last {
            self.pool.handle.0.discharge();
        }
        // What the closure captured, or a value that came too late, is dropped here, without the lock.
        drop(last);
    }
}

/// Every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p sweepea-kernel --lib --release loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Notify;
    use loom::sync::atomic::AtomicUsize;

    use super::*;
    use crate::primitives::models::model;

    /// Tells when the last of them has run.
    struct Counted {
        left: Arc<AtomicUsize>,
        done: Arc<Notify>,
    }

    impl Job for Counted {
        fn run(&self) -> Crewed {
            if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.done.notify();
            }
            Crewed::Yes
        }
    }

    /// A job that is left behind, or a thread that does not end, is a deadlock, which loom reports.
    fn run_jobs(size: usize, jobs: usize) {
        let pool = Handle(Arc::new(Shared::new(size)));
        let (left, done) = (Arc::new(AtomicUsize::new(jobs)), Arc::new(Notify::new()));
        for _ in 0..jobs {
            let (left, done) = (left.clone(), done.clone());
            pool.0.submit(Arc::new(Counted { left, done }));
        }
        done.wait();
        drop(pool);
    }

    #[test]
    fn loom_one_thread_leaves_no_job_behind() {
        model(3, || run_jobs(1, 3));
    }

    #[test]
    fn loom_two_threads_leave_no_job_behind() {
        model(2, || run_jobs(2, 2));
    }
}
