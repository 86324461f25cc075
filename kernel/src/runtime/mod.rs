//! Kernel mode: the tables, the loop, and everything that user mode reaches only through [`traps`](crate::traps).
//!
//! One turn of the loop is: poll I/O → fire timers → drain the inbox → run what is ready. Tasks run in FIFO order. While
//! tasks are ready the outside world is looked at every 61 polls, or when 100 µs have passed; when none is, the loop sleeps in the
//! poller until the next deadline.
//!
//! What must stay true:
//!
//! 1. No user code runs while a table is borrowed. Futures, wakers and outputs are polled, woken and dropped by [`Core`] with no
//!    borrow held; what a kernel operation wants woken or dropped it leaves in `aftermath`.
//! 2. A task is in the ready queue at most once; `Flags::QUEUED` says whether it is.
//! 3. An armed node is in exactly the queue that its kind says, and in its task's list; a task that ended has no nodes. A noted join
//!    (see `joins`) is in the slots of both its tasks, or in neither.
//! 4. A wait, not a task, is what completes: a task polled by `join!` may have many.
//! 5. Bodies are dropped before the kernel lets go of its tables, so that the leaves in them find their nodes.

mod board;
mod clock;
mod inbox;
mod joins;
mod kernel;
mod lots;
mod nodes;
mod reactor;
mod readiness;
mod ready;
mod remote;
mod scopes;
mod state;
mod task;
#[cfg(test)]
mod tests;
mod waker;
mod watch;
mod wheel;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

pub(crate) use board::{Board, Posted, Step};
pub use clock::{Clock, SystemClock, VirtualClock};
pub(crate) use inbox::InboxSender;
pub(crate) use joins::NoteState;
pub use kernel::{Builder, Kernel, ShutdownReport, Turn};
pub use nodes::WaitKind;
pub(crate) use nodes::{NIL, Phase, ROOT};
pub use readiness::Direction;
pub(crate) use readiness::Readiness;
pub use remote::{Completer, Remote, Ring};
pub(crate) use scopes::Verdict;
use state::Aftermath;
pub(crate) use state::{State, nanos};
pub(crate) use task::{BodyRef, Flags, Handle};
pub(crate) use waker::Word;

use crate::error::{Interrupt, RunError, drop_quietly, panic_text};
use inbox::{InboxOwner, Note};
use nodes::Nodes;
use reactor::Reactor;
use ready::Ready;
use task::{Pool, Tasks};
use watch::Watch;
pub(crate) use watch::cancel_task;
use wheel::Wheel;

/// Polls between two looks at the outside world. A prime, as in tokio, so that it does not beat with the program's own rhythm.
const LOOK_INTERVAL: u32 = 61;
/// Polls between two looks at the clock.
const CLOCK_INTERVAL: u32 = 16;
/// Polls before the first look at the clock: a loop that goes to sleep sooner need not know the time.
const CLOCK_FIRST: u32 = 4;
/// How long tasks may run before the loop looks outside, if the polls are slow ones.
const LOOK_AFTER: u64 = 100_000;
/// How many operations a task may complete in one poll without blocking, before it has to let others run.
const BUDGET: u32 = 128;

/// A kernel as its tasks and wakers know it.
pub(crate) struct Core {
    state: RefCell<State>,
    /// What the poller said last.
    events: RefCell<mio::Events>,
    pool: Pool,
    inbox: InboxOwner,
    /// No other kernel of this process has it, ever.
    pub(crate) serial: u32,
    /// For `as_fd`, which must not borrow the tables.
    registry: mio::Registry,
    budget: Cell<u32>,
    /// The waker of the task that is being polled.
    word: Cell<Word>,
    /// Whether it is running, further up this thread's stack.
    entered: Cell<bool>,
    /// It was left since the last look: somebody may have rung.
    away: Cell<bool>,
    /// Clones are held by every `Remote`.
    remotes: Arc<()>,
    /// Polls since the last look outside.
    polls: Cell<u32>,
    /// So many polls after the last look, `must_look` has something to say.
    next_check: Cell<u32>,
    /// When `CLOCK_FIRST` polls had been made since the last look.
    busy_since: Cell<u64>,
    io_interval: u32,
    mail: RefCell<Vec<Note>>,
    /// `None` if nobody watches, which is the usual case.
    watch: Option<Box<Watch>>,
}

struct Known {
    id: u16,
    serial: u32,
    core: Weak<Core>,
}

thread_local! {
    /// The kernels of this thread, for what touches one between its turns.
    static KERNELS: RefCell<Vec<Known>> = const { RefCell::new(Vec::new()) };
}

/// The last serial number given to a kernel.
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// Calls `f` with the running kernel.
#[inline(always)]
pub(crate) fn with_current<R>(f: impl FnOnce(Option<&Core>) -> R) -> R {
    waker::with_current(f)
}

/// Calls `f` with the kernel of this serial number, running or not, if it still exists on this thread. What outlives its
/// kernel must ask by this number: ids are given out again, and would lead it to the tables of a stranger.
#[inline]
pub(crate) fn with_kernel<R>(serial: u32, f: impl FnOnce(&Core) -> R) -> Option<R> {
    with_current_or_known(
        |core| core.serial == serial,
        |known| known.serial == serial,
        f,
    )
}

/// Calls `f` with the kernel of a task that has not ended: then the kernel has not either, and its id is its own.
pub(crate) fn with_kernel_of<R>(body: &BodyRef, f: impl FnOnce(&Core) -> R) -> Option<R> {
    if !body.is_live() {
        return None;
    }
    with_current_or_known(
        |core| core.id() == body.kernel,
        |known| known.id == body.kernel,
        f,
    )
}

#[inline]
fn with_current_or_known<R>(
    is_it: impl FnOnce(&Core) -> bool,
    is_known_as: impl Fn(&Known) -> bool,
    f: impl FnOnce(&Core) -> R,
) -> Option<R> {
    waker::with_current(|core| {
        let mut elsewhere = None;
        // One place that calls `f`, or it would not be inlined.
        let result = f(match core {
            Some(core) if is_it(core) => core,
            _ => elsewhere.insert(find_known(is_known_as)?),
        });
        if let Some(core) = elsewhere {
            core.nudge();
        }
        Some(result)
    })
}

/// Whether kernel `serial` still exists on this thread.
pub(crate) fn exists(serial: u32) -> bool {
    let find = |kernels: &RefCell<Vec<Known>>| {
        kernels
            .borrow()
            .iter()
            .any(|known| known.serial == serial && known.core.strong_count() > 0)
    };
    KERNELS.try_with(find).unwrap_or(false)
}

/// A kernel of this thread, running or not.
#[cold]
fn find_known(is_it: impl Fn(&Known) -> bool) -> Option<Rc<Core>> {
    let find = |kernels: &RefCell<Vec<Known>>| {
        kernels
            .borrow()
            .iter()
            .find(|known| is_it(known))
            .and_then(|known| known.core.upgrade())
    };
    KERNELS.try_with(find).ok().flatten()
}

impl Core {
    fn new(builder: Builder, board: Option<Arc<Board>>) -> io::Result<Rc<Self>> {
        let reactor = Reactor::new()?;
        let registry = reactor.registry().try_clone()?;
        let waker = mio::Waker::new(&registry, reactor::WAKE)?;
        let inbox = InboxOwner::claim(waker)
            .ok_or_else(|| io::Error::other("this process already runs 4096 kernels"))?;
        let epoch = builder.clock.now();
        let watch = Watch::new(builder.observers, builder.on_panic, board.clone());
        let nowhere = Location::caller();
        let mut nodes = Nodes::new();
        let idle = nodes.open_lot(nowhere);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed) + 1;
        let core = Rc::new(Self {
            state: RefCell::new(State {
                tasks: Tasks::new(),
                ready: Ready::new(),
                nodes,
                idle,
                wheel: Wheel::new(),
                reactor,
                clock: builder.clock,
                epoch,
                fired_at: epoch,
                id: inbox.id(),
                serial,
                current: NIL,
                scope: ROOT,
                caller: None,
                is_shielded: false,
                reasons: HashMap::new(),
                noted: Vec::new(),
                names: HashMap::new(),
                board,
                locals: HashMap::new(),
                aftermath: Vec::new(),
                due: Vec::new(),
                last_serial: 0,
                remote_waits: 0,
                closed: false,
                nowhere,
            }),
            events: RefCell::new(mio::Events::with_capacity(1024)),
            pool: Pool::new(),
            inbox,
            serial,
            registry,
            budget: Cell::new(BUDGET),
            word: Cell::new(Word::new(0, 0, 0)),
            entered: Cell::new(false),
            away: Cell::new(true),
            remotes: Arc::new(()),
            polls: Cell::new(0),
            next_check: Cell::new(CLOCK_FIRST.min(builder.io_interval)),
            busy_since: Cell::new(0),
            io_interval: builder.io_interval,
            mail: RefCell::default(),
            watch,
        });
        let known = Known {
            id: core.id(),
            serial: core.serial,
            core: Rc::downgrade(&core),
        };
        KERNELS.with_borrow_mut(|kernels| kernels.push(known));
        core.inbox.prepare_to_sleep();
        core.watch_activate();
        Ok(core)
    }

    pub(crate) fn id(&self) -> u16 {
        self.inbox.id()
    }

    pub(crate) fn remote(&self) -> Remote {
        Remote::new(self.sender(), Arc::clone(&self.remotes))
    }

    pub(crate) fn sender(&self) -> InboxSender {
        self.inbox.sender()
    }

    /// Works on the tables, then wakes and drops what the operation left to be woken and dropped.
    #[inline]
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.borrow_mut();
        let result = f(&mut state);
        if !state.aftermath.is_empty() {
            drop(state);
            self.clear_up();
        }
        result
    }

    #[cold]
    fn clear_up(&self) {
        let aftermath = std::mem::take(&mut self.state.borrow_mut().aftermath);
        for deed in aftermath {
            match deed {
                Aftermath::Wake(waker) => waker.wake(),
                Aftermath::Drop(waker) => drop(waker),
                Aftermath::Forget(interrupt) => drop(interrupt),
                Aftermath::Discard(locals) => locals.discard(),
                Aftermath::Log(level, text) => log::log!(level, "{text}"),
            }
        }
    }

    /// Opens a wait of the running task. `None` if there is more to it, see `make_way`. What `is_shielded` from the interrupts that are pending may block
    /// all the same.
    #[inline(always)]
    pub(crate) fn open_wait(
        &self,
        is_shielded: bool,
        open: impl FnOnce(&mut State) -> Option<u32>,
    ) -> Option<u32> {
        let mut state = self.state.borrow_mut();
        state.is_shielded = is_shielded;
        open(&mut state)
    }

    /// After `open_wait` said no: answers what is pending (R4), or else sees to it that there is a node. What is pending then is held back by a shield.
    #[cold]
    pub(crate) fn make_way(&self) -> Result<(), Interrupt> {
        if let Some(interrupt) = self.refusal() {
            return Err(interrupt);
        }
        self.with(|state| state.nodes.reserve());
        Ok(())
    }

    /// What a trap answers that may not block. Nothing, if what is pending is held back by a shield.
    #[cold]
    fn refusal(&self) -> Option<Interrupt> {
        self.with(|state| {
            assert!(state.current != NIL, "a trap was polled outside of a task");
            state.pending_interrupt()
        })
    }

    /// Notes that the running task waits for another one's end. `None` if that takes a node, else the serial number of the kernel.
    #[inline(always)]
    pub(crate) fn note_join(
        &self,
        waker: &Waker,
        body: &BodyRef,
        at: &'static Location<'static>,
    ) -> Option<u32> {
        let is_noted = self.is_own(waker) && self.state.borrow_mut().note_join(body, at);
        is_noted.then_some(self.serial)
    }

    /// Ends a wait if it has been fired.
    #[inline(always)]
    pub(crate) fn collect(&self, node: u32) -> bool {
        self.state.borrow_mut().collect(node)
    }

    /// Whether a wait was polled without need: it is armed, as it would be if the running task armed it now with that waker. So are most waits of a task that
    /// waits for several things.
    #[inline]
    pub(crate) fn still_waits(&self, node: u32, waker: &Waker) -> bool {
        self.is_own(waker) && self.state.borrow().still_waits(node)
    }

    /// Whether `waker` is the running task's own, not one that a combinator made.
    #[inline]
    pub(crate) fn is_own(&self, waker: &Waker) -> bool {
        self.word.get().is(waker)
    }

    /// Queues the running task again behind all that are ready. False if there is more to it: an interrupt is pending, say, or the waker
    /// is not the task's own.
    #[inline]
    pub(crate) fn requeue(&self, waker: &Waker) -> bool {
        if !self.is_own(waker) {
            return false;
        }
        let mut state = self.state.borrow_mut();
        let task = state.current;
        let Some(slot) = state.tasks.get_mut(task) else {
            return false;
        };
        if slot.flags.has(Flags::PENDING.and(Flags::QUEUED)) {
            return false;
        }
        slot.flags.set(Flags::QUEUED);
        state.ready.push(task);
        true
    }

    /// As `requeue`, whatever there is to it.
    pub(crate) fn requeue_with_care(&self, waker: &Waker) -> Result<(), Interrupt> {
        if let Some(interrupt) = self.refusal() {
            return Err(interrupt);
        }
        if self.is_own(waker) {
            self.with(|state| state.make_ready(state.current));
        } else {
            waker.wake_by_ref();
        }
        Ok(())
    }

    /// Whether the task may go on without letting others run; each true counts against its budget.
    pub(crate) fn spend(&self) -> bool {
        let left = self.budget.get();
        self.budget.set(left.saturating_sub(1));
        left > 0
    }

    /// Wakes a task of this kernel from its own thread. False if the tables are in use, so that the caller takes the way through the inbox.
    pub(crate) fn wake_local(&self, word: Word) -> bool {
        let Ok(mut state) = self.state.try_borrow_mut() else {
            return false;
        };
        if state.is_current(word) {
            state.make_ready(word.slot());
        }
        true
    }

    pub(crate) fn note_escaped_waker(&self, word: Word) {
        if let Ok(mut state) = self.state.try_borrow_mut()
            && state.is_current(word)
        {
            state.tasks[word.slot()].flags.set(Flags::ESCAPED);
        }
    }

    /// If the host sleeps on our descriptor and does not know that there is work now, tells it.
    fn nudge(&self) {
        let asleep = !self.entered.get() && !self.inbox.has_mail();
        if asleep && !self.state.borrow().ready.is_empty() {
            self.inbox.sender().push(Note::Call(Box::new(|| {})));
        }
    }

    /// Starts a task at the end of the ready queue.
    pub(crate) fn spawn<F: Future>(
        &self,
        future: F,
        at: &'static Location<'static>,
    ) -> Handle<F::Output> {
        let mut state = self.state.borrow_mut();
        let parent = state.running();
        let id = state.tasks.next_id();
        let handle = BodyRef::with_future(&self.pool, future, id, parent, self.id(), at);
        if state.closed {
            drop(state);
            handle.body().abort();
            return handle;
        }
        let slot = state.admit(handle.body());
        if !state.locals.is_empty() {
            state.inherit_locals(slot);
        }
        if let Some(watch) = &self.watch {
            handle.body().watch();
            drop(state);
            self.watch_created(watch, slot, handle.body());
        }
        handle
    }

    /// Drops a task's future now; if the task is the one that runs, as soon as its poll returns; if the kernel does not run, at its next turn.
    pub(crate) fn abort(&self, body: &BodyRef) -> bool {
        if !body.is_live() {
            return false;
        }
        let slot = body.slot.get();
        if !self.entered.get() {
            // Between turns nobody can tell whether what the future borrows is still there: the `Kernel` may have been leaked.
            body.doom();
            self.with(|state| state.make_ready(slot));
        } else if body.abort() {
            if let Some(watch) = &self.watch {
                self.watch_terminated(watch, slot, body);
            }
            let body = self.with(|state| state.finish(slot));
            drop(body);
        } else {
            body.doom();
        }
        true
    }

    /// Runs up to `most` ready tasks, each until it waits, but none once `main` has ended. Says how many it took from the queue.
    fn run_ready(&self, most: u32, main: Option<&BodyRef>) -> u32 {
        let kernel = self.id();
        let mut taken = 0;
        // Held from the end of one poll to the beginning of the next: one borrow for each task.
        let mut state = self.state.borrow_mut();
        while taken < most && main.is_none_or(|main| main.is_live()) {
            let Some(task) = state.ready.pop() else {
                break;
            };
            taken += 1;
            let slot = &mut state.tasks[task];
            slot.flags.clear(Flags::QUEUED);
            let Some(body) = slot.body.as_ref().map(BodyRef::share) else {
                state.tasks.free_slot(task); // it ended while it stood in the queue
                continue;
            };
            let word = Word::new(kernel, slot.flags.generation(), task);
            state.current = task;
            state.scope = ROOT;
            drop(state);

            self.word.set(word);
            self.budget.set(BUDGET);
            let waker = ManuallyDrop::new(word.waker());
            let mut cx = Context::from_waker(&waker);
            let ended = match body.is_special() {
                false => body.poll(&mut cx),
                true => self.poll_special(task, &body, &mut cx),
            };

            state = self.state.borrow_mut();
            state.current = NIL;
            if !ended && !body.is_doomed() {
                body.release_shared(); // the slot has another
                continue;
            }
            if ended && body.ends_quietly() {
                state.finish(task).release_shared(); // there is `body`
                body.release_shared(); // the handle has another
                if state.aftermath.is_empty() {
                    continue;
                }
                drop(state);
                self.clear_up();
            } else {
                drop(state);
                self.bury(task, ended, body);
                if self.has_failed() {
                    return taken;
                }
            }
            state = self.state.borrow_mut();
        }
        taken
    }

    /// Polls a task that is doomed or watched; true if it ended.
    #[cold]
    fn poll_special(&self, task: u32, body: &BodyRef, cx: &mut Context<'_>) -> bool {
        match &self.watch {
            None => !body.is_doomed() && body.poll(cx),
            Some(watch) => self.poll_watched(watch, task, body, cx),
        }
    }

    /// Drops what is left after a poll in which the task ended or was doomed, and if somebody watches, tells it. That runs user code.
    #[inline(never)]
    fn bury(&self, task: u32, ended: bool, body: BodyRef) {
        if ended {
            if let Some(watch) = &self.watch {
                self.watch_terminated(watch, task, &body);
            }
            self.with(|state| state.finish(task)).release_shared();
        } else {
            self.abort(&body);
        }
        self.clear_up();
        body.drop_unwanted_output();
    }

    /// How many tasks to run before `must_look` has something to say.
    fn batch(&self) -> u32 {
        self.next_check.get() - self.polls.get()
    }

    fn check_after(&self, polls: u32) {
        self.next_check.set(polls.min(self.io_interval));
    }

    /// Whether it is time to look outside although tasks are ready, now that `taken` more have run.
    fn must_look(&self, taken: u32) -> bool {
        let polls = self.polls.get() + taken;
        self.polls.set(polls);
        if polls < self.next_check.get() {
            return false;
        }
        if polls >= self.io_interval {
            return true;
        }
        self.check_after((polls / CLOCK_INTERVAL + 1) * CLOCK_INTERVAL);
        let state = self.state.borrow();
        if state.wheel.is_empty() && state.reactor.is_empty() {
            return false;
        }
        let now = state.time();
        if polls == CLOCK_FIRST {
            self.busy_since.set(now);
        }
        now > self.busy_since.get() + LOOK_AFTER
    }

    /// Polls I/O, fires timers and drains the inbox; waits for something to do for up to `max_wait` if no task is ready.
    fn look(&self, max_wait: Option<Duration>) -> io::Result<()> {
        self.polls.set(0);
        self.check_after(CLOCK_FIRST);
        let planned = match &self.watch {
            Some(watch) if max_wait != Some(Duration::ZERO) => self.watch_idle(watch, max_wait),
            _ => None,
        };
        let outcome = self.with(|state| {
            let wait = match planned {
                None => self.time_to_wait(state, max_wait),
                Some(wait) => self.confirm_wait(state, wait),
            };
            let mut slept = wait != Some(Duration::ZERO);
            let wait = if slept && planned.is_none() && !self.inbox.prepare_to_sleep() {
                slept = false;
                self.inbox.awake();
                Some(Duration::ZERO)
            } else {
                wait
            };
            // The bell that rang while we were away is silenced by a poll, else the host finds us readable for ever.
            if slept || !state.reactor.is_empty() || self.away.replace(false) {
                let polled = self.poll_io(state, wait);
                if slept {
                    self.inbox.awake();
                }
                polled?;
            }
            state.fire_timers();
            Ok(())
        });
        if self.inbox.has_mail() {
            self.read_mail();
        }
        if self.state.borrow().ready.is_empty() {
            self.with(State::fire_idle);
        }
        outcome
    }

    /// Asks the poller what happened, waiting up to `wait` for something (`None`: for as long as it takes).
    #[inline(always)]
    fn poll_io(&self, state: &mut State, wait: Option<Duration>) -> io::Result<()> {
        let for_thread = state.remote_waits > 0 && wait != Some(Duration::ZERO);
        if for_thread && !state.wheel.is_empty() && state.clock.is_virtual() {
            return self.poll_for_thread(state, wait);
        }
        state.poll_io(&mut self.events.borrow_mut(), wait)
    }

    /// A virtual clock does not jump while a thread works; it must not stand still either, or no timeout ever ends the wait.
    #[cold]
    fn poll_for_thread(&self, state: &mut State, wait: Option<Duration>) -> io::Result<()> {
        let started = Instant::now();
        let polled = state.poll_io(&mut self.events.borrow_mut(), wait);
        let now = state.clock.now();
        state.clock.advance_to(now + started.elapsed());
        polled
    }

    /// How long to sleep in the poller.
    #[inline(always)]
    fn time_to_wait(&self, state: &mut State, max_wait: Option<Duration>) -> Option<Duration> {
        let may_sleep = state.ready.is_empty() && !state.has_idle_waits();
        if !may_sleep || max_wait == Some(Duration::ZERO) {
            return Some(Duration::ZERO);
        }
        if state.wheel.is_empty() {
            return max_wait;
        }
        self.time_to_deadline(state, max_wait)
    }

    /// As `time_to_wait`, if a timer is armed. A virtual clock is moved here instead.
    fn time_to_deadline(&self, state: &mut State, max_wait: Option<Duration>) -> Option<Duration> {
        let deadline = state.wheel.next_deadline(&state.nodes)?;
        let now = state.time();
        if deadline <= now || self.inbox.has_mail() {
            return Some(Duration::ZERO);
        }
        let until = Duration::from_nanos(deadline - now);
        let until = max_wait.map_or(until, |max| max.min(until));
        if state.remote_waits == 0 && state.clock.is_virtual() {
            let events = &mut self.events.borrow_mut();
            let io_first = !state.reactor.is_empty()
                && state
                    .poll_io(events, Some(Duration::ZERO))
                    .is_ok_and(|_| !state.ready.is_empty() || !state.aftermath.is_empty());
            if io_first || state.clock.advance_to(state.clock.now() + until) {
                return Some(Duration::ZERO);
            }
        }
        Some(until)
    }

    fn read_mail(&self) {
        let mut mail = std::mem::take(&mut *self.mail.borrow_mut());
        self.inbox.take(&mut mail);
        for note in mail.drain(..) {
            match note {
                Note::Wake(bits) => {
                    self.wake_local(Word::from_bits(bits));
                }
                Note::Complete(ticket) => self.with(|state| state.complete(ticket)),
                Note::Call(call) => {
                    // Contained, as a task's panic is: the notes behind it are answers that tasks wait for.
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(call)) {
                        log::error!("panic in a remote call: {}", panic_text(&*panic));
                        drop_quietly(panic);
                    }
                }
            }
        }
        *self.mail.borrow_mut() = mail;
    }

    /// Runs until `main` has ended.
    fn run(&self, main: &BodyRef) -> Result<(), RunError> {
        loop {
            let batch = self.batch();
            let taken = self.run_ready(batch, Some(main));
            if !main.is_live() || self.has_failed() {
                return Ok(());
            }
            if taken < batch {
                // No task is ready.
                if self.is_stuck() {
                    return Err(RunError::Deadlock(self.state.borrow().dump()));
                }
                self.look(None)?;
            } else if self.must_look(taken) {
                self.look(Some(Duration::ZERO))?;
            }
        }
    }

    /// Whether nothing inside or outside can ever make a task ready.
    fn is_stuck(&self) -> bool {
        if !self.state.borrow().is_stuck() || Arc::strong_count(&self.remotes) > 1 {
            return false;
        }
        // Pairs with the drop of the last `Remote`: what it sent before is seen below.
        fence(Ordering::Acquire);
        !self.inbox.has_mail()
    }

    fn turn(&self, max_wait: Option<Duration>) -> io::Result<Turn> {
        self.look(max_wait)?;
        // What becomes ready meanwhile goes on at the next turn, and so does what is left when it is time to look.
        let ready = self.state.borrow().ready.len();
        let mut polled = 0;
        while polled < ready {
            let batch = self.batch().min(ready - polled);
            let taken = self.run_ready(batch, None);
            polled += taken;
            if taken < batch || self.must_look(taken) || self.has_failed() {
                break;
            }
        }
        // From here until the next turn other threads wake us through the descriptor.
        let rings = self.inbox.prepare_to_sleep();
        let state = self.state.borrow();
        let ready = !rings || !state.ready.is_empty() || state.has_idle_waits();
        Ok(Turn {
            polled: polled as usize,
            ready,
            next_deadline: state
                .wheel
                .next_deadline(&state.nodes)
                .map(|ticks| state.instant(ticks)),
            live: state.tasks.live(),
        })
    }

    fn enter(&self) -> Result<Running<'_>, RunError> {
        if self.entered.replace(true) {
            return Err(RunError::Reentrant);
        }
        self.inbox.awake();
        Ok(Running {
            core: self,
            _entered: waker::enter(self),
        })
    }

    /// Drops every task, newest first. What their destructors spawn is dropped at once.
    fn close(&self) -> usize {
        let mut aborted = 0;
        self.state.borrow_mut().closed = true;
        let bodies = self.state.borrow().bodies();
        for body in bodies {
            // The destructors of an earlier one may have aborted it.
            if self.abort(&body) {
                aborted += 1;
            }
        }
        aborted
    }
}

/// While this lives the kernel runs on this thread.
struct Running<'a> {
    core: &'a Core,
    _entered: waker::Entered<'a>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // Whoever has something for us from now on rings, so that the host of our descriptor wakes.
        self.core.inbox.prepare_to_sleep();
        self.core.away.set(true);
        self.core.entered.set(false);
    }
}
