//! The threads of a pool: which of them makes a call, which sleeps, and which is called for help.
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
//! **No call is left behind.** Whoever stops looking after the queue, to sleep or to be the lookout no more, first says so in an atomic and then looks at the queue; who
//! adds a call looks at those atomics after that; and on both sides there is a sequentially consistent fence in between. So at least one sees the other. Who adds a call and finds a thread on its way
//! leaves it to that thread, which looks at the queue after it has cleared `calling`; read-modify-writes of one atomic order the two. And who looks for a sleeper does so under the lock under which
//! sleepers look at the queue for the last time.

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::call::{End, Job};
use crate::primitives::{
    AtomicBool, AtomicUsize, Mutex, MutexGuard, Ordering, Parker, Queue, fence,
};

/// How long a lookout naps: long beside a wake, so that naps cost next to nothing; short beside what blocks.
const NAP: Duration = Duration::from_micros(200);
/// So many calls in a nap are short ones: calling another thread would cost more than it helps. Models have few calls.
const MANY: u64 = if cfg!(all(test, loom)) { 2 } else { 32 };
/// So many calls in the time that a thread takes to come are short ones too.
const FEW: u64 = if cfg!(all(test, loom)) { 1 } else { 8 };

/// Has a thread do the [`work`](Crew::work) of a crew.
type Start<R> = Box<dyn Fn(Arc<Crew<R>>) -> io::Result<()> + Send + Sync>;

/// The threads of a pool, and what they share. `R` wakes a kernel that has answers, when dropped.
pub(super) struct Crew<R> {
    queue: Queue<Arc<dyn Job<R>>>,
    size: usize,
    start: Start<R>,
    /// Whether a thread is on its way to the queue.
    calling: AtomicBool,
    /// How many calls had been taken when it was called. This and `taken` are for guesses that may be wrong, so they are not for models.
    called_at: AtomicU64,
    /// How many threads look at the queue before they sleep: those that run a call and those that were called.
    awake: AtomicUsize,
    /// Whether there is a lookout.
    watched: AtomicBool,
    /// Counts the calls that were taken from the queue, for the lookout.
    taken: Apart<AtomicU64>,
    roll: Mutex<Roll<R>>,
}

/// On cache lines of its own: what changes with each call does not take along what seldom does.
#[repr(align(128))]
struct Apart<T>(T);

struct Roll<R> {
    threads: usize,
    /// The one that slept last comes last.
    sleepers: Vec<Arc<Bed>>,
    /// Kernels that have answers and do not know it.
    owed: Vec<R>,
    closed: bool,
}

/// Where a thread sleeps until it is called.
struct Bed {
    parker: Parker,
    called: AtomicBool,
}

impl Bed {
    fn of_this_thread() -> Self {
        Self {
            parker: Parker::of_this_thread(),
            called: AtomicBool::new(false),
        }
    }

    fn call(&self) {
        self.called.store(true, Ordering::Release);
        self.parker.unpark();
    }

    fn sleep(&self) {
        while !self.called.load(Ordering::Acquire) {
            self.parker.park();
        }
        // Nobody calls again before it is among the sleepers again.
        self.called.store(false, Ordering::Relaxed);
    }
}

impl<R: Send + 'static> Crew<R> {
    /// Up to `size` threads, which `start` starts.
    pub(super) fn new(size: usize, start: Start<R>) -> Self {
        Self {
            queue: Queue::new(),
            size,
            start,
            calling: AtomicBool::new(false),
            called_at: AtomicU64::new(0),
            awake: AtomicUsize::new(0),
            watched: AtomicBool::new(false),
            taken: Apart(AtomicU64::new(0)),
            roll: Mutex::new(Roll {
                threads: 0,
                sleepers: Vec::new(),
                owed: Vec::new(),
                closed: false,
            }),
        }
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// How many threads there are, without those that were left to their zombies.
    pub(super) fn threads(&self) -> usize {
        self.roll().threads
    }

    /// Has a thread make the call. If there is none, and none can be started, the call is refused.
    pub(super) fn submit(self: &Arc<Self>, job: Arc<dyn Job<R>>) {
        self.queue.push(job);
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
        let mut roll = self.roll();
        let mut failed = None;
        if roll.sleepers.is_empty() && roll.threads < self.size {
            roll.threads += 1;
            drop(roll);
            self.awake.fetch_add(1, Ordering::SeqCst);
            let Err(error) = (self.start)(Arc::clone(self)) else {
                return;
            };
            self.awake.fetch_sub(1, Ordering::SeqCst);
            roll = self.roll();
            roll.threads -= 1;
            failed = Some(error);
        }
        // Also if none could be started: one may have gone to sleep meanwhile, and others have left their calls to the one that does not come.
        if let Some(sleeper) = roll.sleepers.pop() {
            drop(roll);
            self.awake.fetch_add(1, Ordering::SeqCst);
            sleeper.call();
            return;
        }
        let threads = roll.threads;
        self.arrived();
        drop(roll);
        if let Some(error) = failed {
            if threads == 0 {
                self.refuse_all(&error);
            } else {
                log::warn!("starting a worker thread: {error}; {threads} go on");
            }
        }
    }

    /// The called thread is there, or there was none to call.
    fn arrived(&self) {
        self.calling.swap(false, Ordering::AcqRel);
    }

    fn refuse_all(&self, error: &io::Error) {
        let why = format!("no worker thread could be started: {error}");
        while let Some(job) = self.queue.pop() {
            job.refuse(&why);
        }
    }

    /// The life of a thread.
    pub(super) fn work(self: &Arc<Self>) {
        let bed = Arc::new(Bed::of_this_thread());
        let mut called = true;
        loop {
            if called && self.is_late() {
                called = false;
                self.arrived();
                self.awake.fetch_sub(1, Ordering::SeqCst);
                self.look_out(&bed);
                self.awake.fetch_add(1, Ordering::SeqCst);
            }
            if let Some(job) = self.queue.pop() {
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
    fn owe(&self, ring: R) {
        if self.queue.is_empty() || !self.is_attended() {
            return;
        }
        let mut roll = self.roll();
        // The lookout pays the debts once more after it has said that it goes.
        if self.watched.load(Ordering::SeqCst) {
            roll.owed.push(ring);
        }
    }

    fn pay_debts(&self) {
        let owed = std::mem::take(&mut self.roll().owed);
        drop(owed);
    }

    /// Naps as long as calls are taken, and short ones, unless somebody does already.
    fn look_out(&self, bed: &Bed) {
        if self.watched.swap(true, Ordering::SeqCst) {
            return;
        }
        loop {
            let before = self.taken.0.load(Ordering::Relaxed);
            bed.parker.nap(NAP);
            let taken = self.taken.0.load(Ordering::Relaxed) - before;
            let enough = if self.queue.is_empty() { 1 } else { MANY };
            if taken < enough {
                break;
            }
            self.pay_debts();
        }
        self.watched.swap(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.pay_debts();
    }

    /// Sleeps, unless there are calls.
    fn sleep(&self, bed: &Arc<Bed>) -> Sleep {
        let mut roll = self.roll();
        if !self.queue.is_empty() {
            return Sleep::Not;
        }
        if roll.closed {
            return Sleep::ForEver;
        }
        roll.sleepers.push(Arc::clone(bed));
        let owed = std::mem::take(&mut roll.owed);
        drop(roll);
        drop(owed);
        bed.sleep();
        Sleep::UntilCalled
    }

    /// A thread is left to its zombie: another may take its place.
    pub(super) fn discharge(self: &Arc<Self>) {
        self.roll().threads -= 1;
        self.awake.fetch_sub(1, Ordering::SeqCst);
        if !self.queue.is_empty() {
            self.call_thread();
        }
    }

    /// Nothing will be submitted any more: threads end as soon as there are no calls.
    pub(super) fn close(&self) {
        let mut roll = self.roll();
        roll.closed = true;
        let sleepers = std::mem::take(&mut roll.sleepers);
        drop(roll);
        self.awake.fetch_add(sleepers.len(), Ordering::SeqCst);
        for sleeper in sleepers {
            sleeper.call();
        }
    }

    /// Nothing that runs under the lock leaves the counts half changed, so poison is no reason to stop.
    fn roll(&self) -> MutexGuard<'_, Roll<R>> {
        self.roll.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a thread slept.
enum Sleep {
    Not,
    UntilCalled,
    /// The pool is gone.
    ForEver,
}

/// Which threads are called, and who becomes the lookout: guesses that no order of steps tells right from wrong. The test's thread is all threads of the
/// crew, one after another; a closed crew lets it go.
#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Counts its calls.
    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Job<Arc<()>> for Counter {
        fn run(&self) -> End<Arc<()>> {
            self.0.fetch_add(1, Ordering::SeqCst);
            End::Answered(None)
        }

        fn refuse(&self, why: &str) {
            panic!("{why}");
        }
    }

    /// A crew of up to `size` threads, and how many were started.
    fn crew(size: usize) -> (Arc<Crew<Arc<()>>>, Arc<AtomicUsize>) {
        let started = Arc::new(AtomicUsize::new(0));
        let counter = started.clone();
        let start = move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        (Arc::new(Crew::new(size, Box::new(start))), started)
    }

    #[test]
    fn one_thread_is_called_at_a_time_and_calls_the_next() {
        let ((crew, started), job) = (crew(4), Arc::new(Counter::default()));
        for _ in 0..3 {
            crew.submit(job.clone());
        }
        assert_eq!(started.load(Ordering::SeqCst), 1);
        crew.close();
        crew.work();
        assert_eq!(job.0.load(Ordering::SeqCst), 3);
        assert_eq!(
            started.load(Ordering::SeqCst),
            2,
            "for the second and third"
        );
        assert_eq!(crew.threads(), 2);
        crew.work();
        assert_eq!(crew.awake.load(Ordering::SeqCst), 0);
        assert!(!crew.calling.load(Ordering::SeqCst));
    }

    #[test]
    fn there_are_no_more_threads_than_there_may_be() {
        let ((crew, started), job) = (crew(1), Arc::new(Counter::default()));
        for _ in 0..3 {
            crew.submit(job.clone());
        }
        crew.close();
        crew.work();
        assert_eq!(job.0.load(Ordering::SeqCst), 3);
        assert_eq!(started.load(Ordering::SeqCst), 1);
    }

    /// Whether a thread becomes the lookout, which pays what others owe, if so many calls were taken on its way by a thread that is still `busy`, and
    /// `before` it was called as many.
    fn looks_out(before: u64, taken: u64, busy: bool) -> bool {
        let ((crew, _), job) = (crew(4), Arc::new(Counter::default()));
        crew.taken.0.fetch_add(before, Ordering::SeqCst);
        crew.submit(job.clone());
        crew.taken.0.fetch_add(taken, Ordering::SeqCst);
        crew.awake.fetch_add(busy.into(), Ordering::SeqCst);
        let ring = Arc::new(());
        crew.roll().owed.push(ring.clone());
        crew.close();
        crew.work();
        assert_eq!(job.0.load(Ordering::SeqCst), 1);
        assert_eq!(crew.awake.load(Ordering::SeqCst), busy.into());
        Arc::strong_count(&ring) == 1
    }

    #[test]
    fn a_thread_that_others_were_quicker_than_becomes_the_lookout() {
        assert!(looks_out(0, FEW, true));
        assert!(!looks_out(0, FEW - 1, true));
        assert!(!looks_out(0, FEW, false), "nobody else takes calls");
        assert!(!looks_out(FEW, FEW - 1, true), "before it was called");
    }
}

/// Every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p sweepea-kernel --lib --release loom`. A call that nobody makes, an answer that
/// nobody is woken for, and a thread that does not end are deadlocks, which loom reports.
#[cfg(all(test, loom))]
mod loom_tests {
    use std::panic::resume_unwind;
    use std::sync::Mutex as StdMutex;
    use std::sync::atomic::AtomicUsize as Count;
    use std::thread::Result;

    use loom::thread::{self, JoinHandle};

    use super::super::call::{Answer, Call};
    use super::*;
    use crate::primitives::models::{Night, model};

    /// Wakes a caller, each of which has a kernel to itself that always sleeps.
    struct Rung(Arc<Parker>);

    impl Drop for Rung {
        fn drop(&mut self) {
            self.0.unpark();
        }
    }

    struct Sleeping(Rung);

    impl Answer for Sleeping {
        type Ring = Rung;

        fn answer(self) -> Option<Rung> {
            Some(self.0)
        }
    }

    struct Pool {
        crew: Arc<Crew<Rung>>,
        threads: Arc<StdMutex<Vec<JoinHandle<()>>>>,
    }

    impl Pool {
        fn new(size: usize) -> Arc<Self> {
            Self::with_threads(size, usize::MAX)
        }

        /// No more than `most` threads can be started.
        fn with_threads(size: usize, most: usize) -> Arc<Self> {
            let threads = Arc::new(StdMutex::new(Vec::new()));
            let started = threads.clone();
            let start = move |crew: Arc<Crew<Rung>>| {
                let mut started = started.lock().unwrap();
                if started.len() == most {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                started.push(thread::spawn(move || crew.work()));
                Ok(())
            };
            let crew = Arc::new(Crew::new(size, Box::new(start)));
            Arc::new(Self { crew, threads })
        }

        fn submit<T, F>(self: &Arc<Self>, call: F) -> Errand<F, T>
        where
            T: Send + 'static,
            F: FnOnce() -> T + Send + 'static,
        {
            let answered = Arc::new(Parker::new());
            let call = Arc::new(Call::new(call, Sleeping(Rung(answered.clone()))));
            self.crew.submit(call.clone());
            Errand {
                pool: self.clone(),
                call,
                answered,
            }
        }

        /// Closes it, which must be the last handle, and waits for its threads.
        fn end(self: Arc<Self>) {
            let Self { crew, threads } = Arc::into_inner(self).expect("the last handle");
            crew.close();
            while let Some(thread) = { threads.lock().unwrap().pop() } {
                thread.join().unwrap();
            }
            assert!(crew.queue.is_empty());
            assert!(crew.roll().owed.is_empty());
            assert_eq!(crew.awake.load(Ordering::SeqCst), 0);
            assert!(!crew.watched.load(Ordering::SeqCst));
            assert!(!crew.calling.load(Ordering::SeqCst));
        }
    }

    struct Errand<F, T> {
        pool: Arc<Pool>,
        call: Arc<Call<F, T, Sleeping>>,
        answered: Arc<Parker>,
    }

    impl<F, T> Errand<F, T> {
        fn outcome(self) -> Result<T> {
            self.answered.park();
            self.call.take().expect("the answer is there")
        }

        fn value(self) -> T {
            self.outcome().unwrap_or_else(|panic| resume_unwind(panic))
        }

        fn abandon(self) {
            if self.call.abandon() {
                self.pool.crew.discharge();
            }
        }
    }

    /// Counts how often it is dropped.
    struct Counted(Arc<Count>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn loom_each_call_is_made_once_whoever_submits_it() {
        model(2, || {
            let pool = Pool::new(2);
            let made = Arc::new(Count::new(0));
            let call = |value: usize| {
                let made = made.clone();
                move || made.fetch_add(value, Ordering::SeqCst)
            };
            let other = thread::spawn({
                let (pool, call) = (pool.clone(), call(1));
                move || pool.submit(call).value()
            });
            pool.submit(call(10)).value();
            other.join().unwrap();
            assert_eq!(made.load(Ordering::SeqCst), 11);
            pool.end();
        });
    }

    /// The helper is late, or not; if it is, answers are owed.
    #[test]
    fn loom_each_caller_is_woken_though_a_lookout_naps() {
        model(2, || {
            let pool = Pool::new(2);
            let calls = [1, 2, 3].map(|value| pool.submit(move || value));
            assert_eq!(calls.map(Errand::value), [1, 2, 3]);
            pool.end();
        });
    }

    /// The lookout sees to what is stuck; where nothing is, no call and no answer waits for it.
    #[test]
    fn loom_calls_that_do_not_block_need_no_lookout() {
        model(2, || {
            let night = Night::begin();
            let pool = Pool::new(2);
            let calls = [1, 2, 3].map(|value| pool.submit(move || value));
            assert_eq!(calls.map(Errand::value), [1, 2, 3]);
            night.end();
            pool.end();
        });
    }

    /// Other calls make it late for the helper, who becomes the lookout, or not.
    #[test]
    fn loom_behind_a_long_call_others_are_made() {
        model(2, || {
            let pool = Pool::new(2);
            let short = pool.submit(|| 1);
            let release = Arc::new(Parker::new());
            let long = pool.submit({
                let release = release.clone();
                move || release.park()
            });
            let behind = pool.submit(move || release.unpark());
            assert_eq!(short.value(), 1);
            long.value();
            behind.value();
            pool.end();
        });
    }

    #[test]
    fn loom_a_call_that_is_given_up_is_dropped_once_and_keeps_no_place() {
        model(2, || {
            let pool = Pool::new(1);
            let dropped = Arc::new(Count::new(0));
            let [captured, value] = [(); 2].map(|()| Counted(dropped.clone()));
            let release = Arc::new(Parker::new());
            let given_up = pool.submit({
                let release = release.clone();
                move || {
                    let _captured = captured;
                    release.park();
                    value
                }
            });
            given_up.abandon();
            // It ends only after this, for which there must be another thread if it was begun.
            assert_eq!(pool.submit(|| 7).value(), 7);
            release.unpark();
            pool.end();
            assert_eq!(dropped.load(Ordering::SeqCst), 2);
        });
    }

    #[test]
    fn loom_a_call_that_panics_or_ends_as_it_is_given_up_harms_nobody() {
        model(2, || {
            let pool = Pool::new(1);
            let dropped = Arc::new(Count::new(0));
            let value = Counted(dropped.clone());
            let given_up = pool.submit(move || value);
            let panics = pool.submit(|| resume_unwind(Box::new("as it should")));
            given_up.abandon();
            let panic: Result<()> = panics.outcome();
            assert_eq!(
                *panic.unwrap_err().downcast::<&str>().unwrap(),
                "as it should"
            );
            assert_eq!(pool.submit(|| 7).value(), 7);
            pool.end();
            assert_eq!(dropped.load(Ordering::SeqCst), 1);
        });
    }

    #[test]
    fn loom_threads_end_when_the_pool_closes_also_with_calls_that_nobody_wants() {
        model(3, || {
            let pool = Pool::new(2);
            let unwanted = [1, 2].map(|value| pool.submit(move || value));
            unwanted.into_iter().for_each(Errand::abandon);
            pool.end();
        });
    }

    /// While main waits for the helper that does not come, the one thread may fall asleep, and the other caller leave its call to that helper.
    #[test]
    fn loom_when_no_helper_can_be_started_the_others_make_all_calls() {
        model(3, || {
            let pool = Pool::with_threads(2, 1);
            let release = Arc::new(Parker::new());
            let long = pool.submit({
                let release = release.clone();
                move || release.park()
            });
            let other = thread::spawn({
                let pool = pool.clone();
                move || {
                    release.unpark();
                    long.value();
                    pool.submit(|| 1).value()
                }
            });
            assert_eq!(pool.submit(|| 2).value(), 2);
            assert_eq!(other.join().unwrap(), 1);
            pool.end();
        });
    }

    #[test]
    fn loom_when_no_thread_can_be_started_every_call_is_refused() {
        model(3, || {
            let pool = Pool::with_threads(2, 0);
            let other = thread::spawn({
                let pool = pool.clone();
                move || pool.submit(|| ()).outcome()
            });
            let outcome = pool.submit(|| ()).outcome();
            for outcome in [outcome, other.join().unwrap()] {
                let panic = outcome.unwrap_err();
                let text = panic.downcast_ref::<String>().unwrap();
                assert!(text.starts_with("no worker thread could be started: "));
            }
            pool.end();
        });
    }
}
