//! Calls in threads.
//!
//! A pool has a queue of calls and up to `size` threads, which are made when they are needed and kept. A call that nobody waits for any more
//! is not started; one that runs cannot be stopped, so it runs on as a *zombie*. Its result is dropped in its thread, and the
//! thread ends with it: it left the pool at the moment its caller went away, so that a call that hangs for ever does not
//! take a place for ever (as in Curio).
//!
//! **Waking few.** Waking a thread costs more than a short call, and a thread that comes in vain takes a processor from those that work. So
//!
//! - at most one thread is on its way at any time (`calling`): the one that arrives takes a call and, if there are more, calls the next before
//!   it begins. Long calls spread over as many threads as there are within a few wakes. Of the sleepers the one that slept last is called.
//! - A thread that was called, and finds that others took several calls meanwhile, need not have come: calls are short. It becomes the *lookout*
//!   (`watched`): it naps, and as long as it does, nobody is called while a thread is awake. When it sees that few of the waiting calls were taken
//!   during a nap, the others are stuck in long ones: then it helps, and helpers are called as above. So a change from short calls to long ones delays some of them by two naps at most.
//! - While there is a lookout, a thread that has an answer for a sleeping kernel, and a next call to make, owes the kernel the wake (`owed`) until there are no more calls. So the
//!   kernel gets many answers at a time. The lookout pays such debts after each nap.
//!
//! No call is left behind. Whoever stops looking after the queue, to sleep or to be the lookout no more, first says so in an atomic and then looks at the queue; who
//! adds a call looks at those atomics after that; and on both sides there is a sequentially consistent fence in between. So at least one sees the other. Who adds a call and finds a thread on its way
//! leaves it to that thread, which looks at the queue after it has cleared `calling`; read-modify-writes of one atomic order the two. And who looks for a sleeper does so under the lock under which
//! sleepers look at the queue for the last time.

use std::future::Future;
use std::io;
use std::panic::{Location, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};

use super::call::{Call, End, Job};
use crate::error::Interrupt;
use crate::traps::{Ring, future_wait};

/// As many threads as [`run_in_thread`] uses (Curio's `MAX_WORKER_THREADS`).
const THREADS: usize = 64;
/// How long a lookout naps: long beside a wake, so that naps cost next to nothing; short beside what blocks.
const NAP: Duration = Duration::from_micros(200);
/// So many calls in a nap are short ones: calling another thread would cost more than it helps.
const MANY: u64 = 32;
/// So many calls in the time that a thread takes to come are short ones too.
const FEW: u64 = 8;

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
        let (jobs, queue) = crossbeam_channel::unbounded();
        let shared = Arc::new(Shared {
            jobs,
            queue,
            size,
            calling: AtomicBool::new(false),
            called_at: AtomicU64::new(0),
            awake: AtomicUsize::new(0),
            watched: AtomicBool::new(false),
            taken: Apart(AtomicU64::new(0)),
            crew: Mutex::default(),
        });
        Self {
            handle: Arc::new(Handle(shared)),
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
        let mut crew = self.0.crew();
        crew.closed = true;
        let sleepers = std::mem::take(&mut crew.sleepers);
        drop(crew);
        sleepers.into_iter().for_each(Sleeper::wake);
    }
}

struct Shared {
    jobs: Sender<Arc<dyn Job>>,
    queue: Receiver<Arc<dyn Job>>,
    size: usize,
    /// Whether a thread is on its way to the queue.
    calling: AtomicBool,
    /// How many calls had been taken when it was called.
    called_at: AtomicU64,
    /// How many threads look at the queue before they sleep: those that run a call and those that were called.
    awake: AtomicUsize,
    /// Whether there is a lookout.
    watched: AtomicBool,
    /// Counts the calls that were taken from the queue, for the lookout.
    taken: Apart<AtomicU64>,
    crew: Mutex<Crew>,
}

/// On cache lines of its own: what changes with each call does not take along what seldom does.
#[repr(align(128))]
struct Apart<T>(T);

#[derive(Default)]
struct Crew {
    threads: usize,
    /// The one that slept last comes last.
    sleepers: Vec<Sleeper>,
    /// Kernels that have answers and do not know it.
    owed: Vec<Ring>,
    closed: bool,
}

/// A thread that sleeps until it is called.
struct Sleeper {
    thread: Thread,
    called: Arc<AtomicBool>,
}

impl Sleeper {
    fn wake(self) {
        self.called.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

impl Shared {
    fn submit(self: &Arc<Self>, job: Arc<dyn Job>) {
        self.jobs
            .send(job)
            .expect("`self` holds the receiving end too");
        fence(Ordering::SeqCst);
        if !self.is_attended() {
            self.call_thread();
        }
    }

    /// Whether the calls in the queue are taken, or noticed when they are not, without anybody being called.
    fn is_attended(&self) -> bool {
        self.watched.load(Ordering::SeqCst) && self.awake.load(Ordering::SeqCst) > 0
    }

    /// Sees to it that a thread comes to the queue, unless one is on its way or all are busy, who will come by themselves.
    fn call_thread(self: &Arc<Self>) {
        if self.calling.swap(true, Ordering::AcqRel) {
            return;
        }
        let taken = self.taken.0.load(Ordering::Relaxed);
        self.called_at.store(taken, Ordering::Relaxed);
        let mut crew = self.crew();
        if let Some(sleeper) = crew.sleepers.pop() {
            drop(crew);
            self.awake.fetch_add(1, Ordering::SeqCst);
            sleeper.wake();
        } else if crew.threads < self.size {
            crew.threads += 1;
            drop(crew);
            self.awake.fetch_add(1, Ordering::SeqCst);
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
            self.awake.fetch_sub(1, Ordering::SeqCst);
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
        let bed = Arc::new(AtomicBool::new(false));
        let mut called = true;
        loop {
            if called && self.is_late() {
                called = false;
                self.arrived();
                self.awake.fetch_sub(1, Ordering::SeqCst);
                self.look_out();
                self.awake.fetch_add(1, Ordering::SeqCst);
            }
            if let Ok(job) = self.queue.try_recv() {
                self.taken.0.fetch_add(1, Ordering::Relaxed);
                if std::mem::take(&mut called) {
                    self.arrived();
                }
                if !self.queue.is_empty() && !self.is_attended() {
                    self.call_thread();
                }
                match job.run() {
                    End::Zombie => return,
                    End::Answered(Some(ring)) => self.owe(ring),
                    End::Answered(None) | End::Unmade => {}
                }
                continue;
            }
            if std::mem::take(&mut called) {
                self.arrived();
            }
            self.awake.fetch_sub(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            match self.sleep(&bed) {
                Sleep::Not => {
                    self.awake.fetch_add(1, Ordering::SeqCst);
                }
                Sleep::UntilCalled => called = true,
                Sleep::ForEver => return,
            }
        }
    }

    /// Whether others have taken so many calls since this thread was called that it need not have come.
    fn is_late(&self) -> bool {
        let taken = self.taken.0.load(Ordering::Relaxed) - self.called_at.load(Ordering::Relaxed);
        taken >= FEW && self.awake.load(Ordering::SeqCst) > 1
    }

    /// Who has answered a sleeping kernel wakes it, but only after the next answers if those come soon; the lookout sees to it if they do not.
    fn owe(&self, ring: Ring) {
        if self.queue.is_empty() || !self.is_attended() {
            return;
        }
        let mut crew = self.crew();
        // The lookout pays the debts once more after it has said that it goes.
        if self.watched.load(Ordering::SeqCst) {
            crew.owed.push(ring);
        }
    }

    fn pay_debts(&self) {
        let owed = std::mem::take(&mut self.crew().owed);
        drop(owed);
    }

    /// Naps as long as calls are taken, and short ones, unless somebody does already.
    fn look_out(&self) {
        if self.watched.swap(true, Ordering::SeqCst) {
            return;
        }
        loop {
            let before = self.taken.0.load(Ordering::Relaxed);
            thread::park_timeout(NAP);
            let taken = self.taken.0.load(Ordering::Relaxed) - before;
            let enough = if self.queue.is_empty() { 1 } else { MANY };
            if taken < enough {
                break;
            }
            self.pay_debts();
        }
        self.watched.store(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.pay_debts();
    }

    /// Sleeps, unless there are calls.
    fn sleep(&self, bed: &Arc<AtomicBool>) -> Sleep {
        let mut crew = self.crew();
        if !self.queue.is_empty() {
            return Sleep::Not;
        }
        if crew.closed {
            return Sleep::ForEver;
        }
        crew.sleepers.push(Sleeper {
            thread: thread::current(),
            called: Arc::clone(bed),
        });
        let owed = std::mem::take(&mut crew.owed);
        drop(crew);
        drop(owed);
        while !bed.swap(false, Ordering::Acquire) {
            thread::park();
        }
        Sleep::UntilCalled
    }

    /// A thread is left to its zombie: another may take its place.
    fn discharge(self: &Arc<Self>) {
        self.crew().threads -= 1;
        self.awake.fetch_sub(1, Ordering::SeqCst);
        if !self.queue.is_empty() {
            self.call_thread();
        }
    }

    /// Nothing that runs under the lock leaves the counts half changed, so poison is no reason to stop.
    fn crew(&self) -> MutexGuard<'_, Crew> {
        self.crew.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a thread slept.
enum Sleep {
    Not,
    UntilCalled,
    /// The pool is gone.
    ForEver,
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
