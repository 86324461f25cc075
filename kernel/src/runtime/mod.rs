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
//! 3. An armed node is in exactly the queue that its kind says, and in its task's list; a task that ended has no nodes.
//! 4. A wait, not a task, is what completes: a task polled by `join!` may have many.
//! 5. Bodies are dropped before the kernel lets go of its tables, so that the leaves in them find their nodes.

mod clock;
mod inbox;
mod lots;
mod nodes;
mod reactor;
mod ready;
mod scopes;
mod task;
mod waker;
mod wheel;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

pub use clock::{Clock, SystemClock, VirtualClock};
pub(crate) use inbox::{InboxSender, Ticket};
pub use nodes::WaitKind;
pub(crate) use nodes::{NIL, Phase, ROOT};
pub use reactor::Direction;
pub(crate) use reactor::SourceId;
pub(crate) use scopes::Verdict;
pub(crate) use task::{BodyRef, Flags, Handle};
pub(crate) use waker::Word;

use crate::error::{Interrupt, RunError, panic_text};
use crate::task::{TaskId, TaskInfo, TaskState};
use inbox::{InboxOwner, Note};
use lots::Lots;
use nodes::{Node, Nodes};
use reactor::Reactor;
use ready::Ready;
use scopes::Scopes;
use task::{Pool, Tasks};
use wheel::Wheel;

/// Polls between two looks at the outside world. A prime, as in tokio, so that it does not beat with the program's own rhythm.
const LOOK_INTERVAL: u32 = 61;
/// Polls between two looks at the clock.
const CLOCK_INTERVAL: u32 = 16;
/// How long tasks may run before the loop looks outside, if the polls are slow ones.
const LOOK_AFTER: u64 = 100_000;
/// How many operations a task may complete in one poll without blocking, before it has to let others run.
const BUDGET: u32 = 128;

/// The tables. Every method leaves them consistent; none calls user code.
pub(crate) struct State {
    pub(crate) tasks: Tasks,
    ready: Ready,
    pub(crate) nodes: Nodes,
    pub(crate) lots: Lots,
    wheel: Wheel,
    scopes: Scopes,
    pub(crate) reactor: Reactor,
    clock: Box<dyn Clock>,
    epoch: Instant,
    /// The kernel's serial number, as in `Core`.
    pub(crate) serial: u32,
    /// Slot of the task that is being polled.
    pub(crate) current: u32,
    /// The scope whose block is being polled.
    scope: u32,
    /// Why tasks were cancelled, by slot.
    reasons: HashMap<u32, Interrupt>,
    names: HashMap<u64, Rc<str>>,
    /// User code to run once no table is borrowed.
    aftermath: Vec<Aftermath>,
    due: Vec<u32>,
    last_serial: u64,
    /// How many waits depend on an answer from another thread.
    remote_waits: usize,
    /// No task starts any more.
    closed: bool,
    nowhere: &'static Location<'static>,
}

/// Saturating: 584 years are for ever.
const fn nanos(duration: Duration) -> u64 {
    let seconds = duration.as_secs().saturating_mul(1_000_000_000);
    seconds.saturating_add(duration.subsec_nanos() as u64)
}

enum Aftermath {
    Wake(Waker),
    Drop(Waker),
    /// Its reason is a user's value.
    Forget(Interrupt),
    /// Loggers are user code too: one that shows the current task asks the kernel for it.
    Log(log::Level, String),
}

/// The `prev` of a timer that has come off the wheel and waits for its turn in the same batch.
const DUE: u32 = u32::MAX - 1;

impl State {
    /// Nanoseconds since the kernel's epoch.
    pub(crate) fn time(&self) -> u64 {
        self.ticks(self.clock.now())
    }

    pub(crate) fn now(&self) -> Instant {
        self.clock.now()
    }

    pub(crate) fn ticks(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.epoch))
    }

    /// The time `duration` from now.
    pub(crate) fn after(&self, duration: Duration) -> u64 {
        self.time().saturating_add(nanos(duration))
    }

    fn instant(&self, ticks: u64) -> Instant {
        self.epoch + Duration::from_nanos(ticks)
    }

    /// A wait of the current task, in its list of waits and in no queue yet.
    pub(crate) fn open_wait(
        &mut self,
        kind: WaitKind,
        key: u64,
        at: &'static Location<'static>,
    ) -> u32 {
        let task = self.current;
        let waits = &mut self.tasks[task].waits;
        self.nodes
            .insert_for(task, waits, kind, self.scope, key, at)
    }

    pub(crate) fn park(&mut self, node: u32, lot: u32) {
        self.lots.park(&mut self.nodes, lot, node);
    }

    pub(crate) fn arm_timer(&mut self, node: u32) {
        self.wheel.arm(&mut self.nodes, node);
    }

    /// A wait that another thread will answer.
    pub(crate) fn arm_remote(&mut self, node: u32) -> Ticket {
        self.last_serial += 1;
        self.remote_waits += 1;
        self.nodes[node].key = self.last_serial;
        Ticket {
            node,
            serial: self.last_serial,
        }
    }

    /// Completes an armed wait that has left its queue.
    pub(crate) fn fire(&mut self, node: u32) {
        self.settle(node, Phase::Fired);
    }

    /// Notes how an armed wait that has left its queue ended, and calls the waker of its leaf: its own if it was polled with one, else its task's.
    fn settle(&mut self, id: u32, phase: Phase) {
        let node = &mut self.nodes[id];
        node.set_phase(phase);
        let task = node.task;
        if node.is_foreign() {
            self.wake_foreign(id);
        } else if task != NIL {
            self.make_ready(task);
        }
    }

    #[cold]
    fn wake_foreign(&mut self, node: u32) {
        let waker = self.nodes.take_waker(node);
        self.aftermath.extend(waker.map(Aftermath::Wake));
    }

    /// Wakes up to `count` tasks of a lot, the longest waiting first.
    pub(crate) fn unpark(&mut self, lot: u32, count: usize) -> usize {
        (0..count)
            .position(|_| !self.unpark_one(lot))
            .unwrap_or(count)
    }

    /// Wakes the task of a lot that waits longest. False if it is empty.
    #[inline]
    pub(crate) fn unpark_one(&mut self, lot: u32) -> bool {
        match self.lots.unpark(&mut self.nodes, lot) {
            Some(node) => {
                self.fire(node);
                true
            }
            None => false,
        }
    }

    /// Drops a lot; whoever still waits in it is told so.
    pub(crate) fn close_lot(&mut self, lot: u32) {
        while let Some(node) = self.lots.unpark(&mut self.nodes, lot) {
            self.settle(node, Phase::Closed);
        }
        self.lots.close(lot);
    }

    /// An answer from another thread; a late one finds its wait gone.
    fn complete(&mut self, ticket: Ticket) {
        let Some(node) = self.nodes.get(ticket.node) else {
            return;
        };
        if node.kind() == WaitKind::Remote
            && node.key == ticket.serial
            && node.phase() == Phase::Armed
        {
            self.remote_waits -= 1;
            self.fire(ticket.node);
        }
    }

    #[inline]
    pub(crate) fn make_ready(&mut self, task: u32) {
        let flags = &mut self.tasks[task].flags;
        if !flags.has(Flags::QUEUED) {
            flags.set(Flags::QUEUED);
            self.ready.push(task);
        }
    }

    /// Takes an armed wait out of the queue that would fire it.
    fn detach(&mut self, node: u32) {
        let key = self.nodes[node].key;
        match self.nodes[node].kind() {
            WaitKind::Deadline | WaitKind::Sleep if self.nodes[node].prev == DUE => {}
            WaitKind::Deadline | WaitKind::Sleep => self.wheel.cancel(&mut self.nodes, node),
            WaitKind::Read => self.reactor.remove_waiter(key, Direction::Read),
            WaitKind::Write => self.reactor.remove_waiter(key, Direction::Write),
            WaitKind::Remote => self.remote_waits -= 1,
            WaitKind::Join => self.disarm_join(node),
            WaitKind::Foreign => {}
            kind => {
                debug_assert!(kind.is_parked());
                self.lots.remove(&mut self.nodes, key as u32, node);
            }
        }
    }

    /// Ends a wait, wherever it stands.
    pub(crate) fn release(&mut self, node: u32) {
        if self.nodes[node].phase() == Phase::Armed {
            self.detach(node);
        }
        self.free(node);
    }

    /// Ends a wait if it has been fired.
    pub(crate) fn collect(&mut self, node: u32) -> bool {
        let has_fired = self.nodes[node].phase() == Phase::Fired;
        if has_fired {
            self.free(node);
        }
        has_fired
    }

    /// Frees a node that is in no queue any more.
    #[inline]
    fn free(&mut self, node: u32) {
        if let Some(waker) = self.nodes.remove(node, &mut self.tasks) {
            self.drop_later(waker);
        }
    }

    #[cold]
    fn drop_later(&mut self, waker: Waker) {
        self.aftermath.push(Aftermath::Drop(waker));
    }

    /// Notes by which task and in which scope a leaf that waits was polled.
    pub(crate) fn refresh_wait(&mut self, node: u32) {
        let task = self.nodes[node].task;
        if task != self.current {
            // The leaf was moved to another task since it was armed.
            if task != NIL {
                let waits = &mut self.tasks[task].waits;
                self.nodes.unlink_from_task(node, waits);
            }
            let waits = &mut self.tasks[self.current].waits;
            self.nodes.link_to_task(node, self.current, waits);
        }
        self.nodes[node].set_scope(self.scope);
    }

    /// Notes with which waker a leaf that waits was polled, if that is not the task's own.
    pub(crate) fn set_waker(&mut self, node: u32, foreign: Option<Waker>) {
        let replaced = match foreign {
            None => self.nodes.take_waker(node),
            Some(waker) => self.nodes.set_waker(node, waker),
        };
        self.aftermath.extend(replaced.map(Aftermath::Drop));
        if self.nodes[node].phase() != Phase::Armed {
            // It was fired while its waker was cloned, which is user code.
            self.wake_foreign(node);
        }
    }

    fn fire_timers(&mut self) {
        if self.wheel.is_empty() {
            return;
        }
        let now = self.time();
        let mut due = std::mem::take(&mut self.due);
        self.wheel.expire(&mut self.nodes, now, &mut due);
        for &timer in &due {
            self.nodes[timer].prev = DUE;
        }
        // In deadline order: a timeout that comes before a sleep of its body interrupts it, one that comes after finds it done.
        for timer in due.drain(..) {
            match (self.nodes[timer].kind(), self.nodes[timer].phase()) {
                (WaitKind::Deadline, _) => self.fire_deadline(timer),
                (_, Phase::Armed) => self.fire(timer),
                _ => {}
            }
        }
        self.due = due;
    }

    /// Ends a task: its slot is free, whoever joined it is woken. The caller drops the body once no table is borrowed.
    #[must_use]
    fn finish(&mut self, task: u32) -> BodyRef {
        let slot = &self.tasks[task];
        let is_bare = slot.waits == NIL && slot.scopes == NIL && !slot.flags.has(Flags::CANCELLED);
        if !is_bare {
            self.strip(task);
        }
        self.fire_joiners(task);
        let body = self.tasks.retire(task);
        if !self.names.is_empty() {
            self.names.remove(&body.id);
        }
        body
    }

    /// Cuts what a task that ends leaves behind.
    #[cold]
    fn strip(&mut self, task: u32) {
        while self.tasks[task].waits != NIL {
            // A leaf that was moved out of the future and outlives the task; whoever polls it next takes it over.
            let node = self.tasks[task].waits;
            let waits = &mut self.tasks[task].waits;
            self.nodes.unlink_from_task(node, waits);
        }
        self.orphan_scopes(task);
        if self.tasks[task].flags.has(Flags::CANCELLED) {
            let reason = self.reasons.remove(&task);
            self.forget(reason);
        }
    }

    /// Drops an interrupt once no table is borrowed.
    fn forget(&mut self, interrupt: Option<Interrupt>) {
        self.aftermath.extend(interrupt.map(Aftermath::Forget));
    }

    /// Puts `node`, whose key is `task`, at the end of the ring of those who wait for that task's end.
    pub(crate) fn arm_join(&mut self, node: u32, task: u32) {
        let first = self.tasks[task].joiners;
        if first == NIL {
            self.nodes[node].prev = node;
            self.nodes[node].next = node;
            self.tasks[task].joiners = node;
            return;
        }
        let last = self.nodes[first].prev;
        self.nodes[node].prev = last;
        self.nodes[node].next = first;
        self.nodes[last].next = node;
        self.nodes[first].prev = node;
    }

    fn disarm_join(&mut self, node: u32) {
        let Node {
            prev, next, key, ..
        } = self.nodes[node];
        self.nodes[prev].next = next;
        self.nodes[next].prev = prev;
        let first = &mut self.tasks[key as u32].joiners;
        if *first == node {
            *first = if next == node { NIL } else { next };
        }
    }

    fn fire_joiners(&mut self, task: u32) {
        let first = std::mem::replace(&mut self.tasks[task].joiners, NIL);
        let mut node = first;
        while node != NIL {
            let next = self.nodes[node].next;
            self.fire(node);
            node = if next == first { NIL } else { next };
        }
    }

    pub(crate) fn set_name(&mut self, task: u64, name: Rc<str>) {
        self.names.insert(task, name);
    }

    pub(crate) fn name(&self, task: u64) -> Option<Rc<str>> {
        self.names.get(&task).cloned()
    }

    pub(crate) fn info(&self, task: u32) -> TaskInfo {
        let slot = &self.tasks[task];
        let body = slot.body.as_ref().expect("only live tasks are described");
        let mut waits = Vec::new();
        let mut node = slot.waits;
        while node != NIL {
            waits.push((self.nodes[node].kind(), self.nodes[node].at));
            node = self.nodes[node].task_next;
        }
        let state = match (task == self.current, slot.flags.has(Flags::QUEUED)) {
            (true, _) => TaskState::Running,
            (_, true) => TaskState::Ready,
            _ => TaskState::Waiting,
        };
        TaskInfo {
            id: TaskId(body.id),
            parent: (body.parent != 0).then_some(TaskId(body.parent)),
            name: self.name(body.id).map(|name| name.to_string()),
            state,
            waits,
            cycles: body.cycles.get(),
            cancelled: body.is_cancelled(),
            spawned_at: body.spawned_at,
        }
    }

    /// Every live task, in the order of their ids.
    pub(crate) fn dump(&self) -> Vec<TaskInfo> {
        let mut tasks: Vec<_> = self.tasks.iter().map(|(slot, _)| self.info(slot)).collect();
        tasks.sort_by_key(|task| task.id);
        tasks
    }

    /// Whether nothing can ever happen again: no task is ready, no timer armed, no I/O or thread waited for, and no waker is out of our sight.
    fn is_stuck(&self) -> bool {
        self.ready.is_empty()
            && self.wheel.is_empty()
            && self.reactor.waiting() == 0
            && self.remote_waits == 0
            && self
                .tasks
                .iter()
                .all(|(_, slot)| !slot.flags.has(Flags::ESCAPED))
    }
}

/// A kernel as its tasks and wakers know it.
pub(crate) struct Core {
    state: RefCell<State>,
    pub(crate) pool: Pool,
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
    last_look: Cell<u64>,
    io_interval: u32,
    mail: RefCell<Vec<Note>>,
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
pub(crate) fn with_current<R>(f: impl FnOnce(Option<&Core>) -> R) -> R {
    waker::with_current(f)
}

/// Calls `f` with the kernel of this serial number, running or not, if it still exists on this thread. What outlives its
/// kernel must ask by this number: ids are given out again, and would lead it to the tables of a stranger.
#[inline]
pub(crate) fn with_kernel<R>(serial: u32, f: impl FnOnce(&Core) -> R) -> Option<R> {
    waker::with_current(|core| match core {
        Some(core) if core.serial == serial => Some(f(core)),
        _ => with_known(|known| known.serial == serial, f),
    })
}

/// Calls `f` with the kernel of a task that has not ended: then the kernel has not either, and its id is its own.
pub(crate) fn with_kernel_of<R>(body: &BodyRef, f: impl FnOnce(&Core) -> R) -> Option<R> {
    if !body.is_live() {
        return None;
    }
    waker::with_current(|core| match core {
        Some(core) if core.id() == body.kernel => Some(f(core)),
        _ => with_known(|known| known.id == body.kernel, f),
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

/// Calls `f` with a kernel of this thread that is not the running one.
#[cold]
fn with_known<R>(is_it: impl Fn(&Known) -> bool, f: impl FnOnce(&Core) -> R) -> Option<R> {
    let find = |kernels: &RefCell<Vec<Known>>| {
        kernels
            .borrow()
            .iter()
            .find(|known| is_it(known))
            .and_then(|known| known.core.upgrade())
    };
    let core = KERNELS.try_with(find).ok().flatten()?;
    let result = f(&core);
    core.nudge();
    Some(result)
}

impl Core {
    fn new(builder: Builder) -> io::Result<Rc<Self>> {
        let reactor = Reactor::new()?;
        let registry = reactor.registry().try_clone()?;
        let waker = mio::Waker::new(&registry, reactor::WAKE)?;
        let inbox = InboxOwner::claim(waker)
            .ok_or_else(|| io::Error::other("this process already runs 4096 kernels"))?;
        let epoch = builder.clock.now();
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed) + 1;
        let core = Rc::new(Self {
            state: RefCell::new(State {
                tasks: Tasks::new(),
                ready: Ready::new(),
                nodes: Nodes::new(),
                lots: Lots::new(),
                wheel: Wheel::new(),
                scopes: Scopes::new(),
                reactor,
                clock: builder.clock,
                epoch,
                serial,
                current: NIL,
                scope: ROOT,
                reasons: HashMap::new(),
                names: HashMap::new(),
                aftermath: Vec::new(),
                due: Vec::new(),
                last_serial: 0,
                remote_waits: 0,
                closed: false,
                nowhere: Location::caller(),
            }),
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
            last_look: Cell::new(0),
            io_interval: builder.io_interval,
            mail: RefCell::default(),
        });
        let known = Known {
            id: core.id(),
            serial: core.serial,
            core: Rc::downgrade(&core),
        };
        KERNELS.with_borrow_mut(|kernels| kernels.push(known));
        core.inbox.prepare_to_sleep();
        Ok(core)
    }

    pub(crate) fn id(&self) -> u16 {
        self.inbox.id()
    }

    pub(crate) fn remote(&self) -> Remote {
        Remote {
            sender: self.sender(),
            _alive: Arc::clone(&self.remotes),
        }
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
                Aftermath::Log(level, text) => log::log!(level, "{text}"),
            }
        }
    }

    /// R4: what a trap answers instead of blocking, if `may_block` said no. Nothing, if what is pending is held back by a shield.
    #[cold]
    pub(crate) fn refusal(&self) -> Option<Interrupt> {
        self.with(|state| {
            assert!(state.current != NIL, "a trap was polled outside of a task");
            state.pending_interrupt()
        })
    }

    /// Makes the scope around a block current again.
    pub(crate) fn leave_scope(&self, outer: u32) {
        self.state.borrow_mut().scope = outer;
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
        let parent = match state.current {
            NIL => 0,
            task => state.tasks[task].body.as_ref().map_or(0, |body| body.id),
        };
        let id = state.tasks.next_id();
        let handle = BodyRef::with_future(future, id, parent, self.id(), at);
        if state.closed {
            drop(state);
            handle.body().abort();
            return handle;
        }
        let slot = state.tasks.insert(handle.body().clone());
        if slot as usize >= state.ready.capacity() {
            let slots = state.tasks.capacity();
            state.ready.reserve(slots);
        }
        state.ready.push(slot);
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
            let body = self.with(|state| state.finish(slot));
            drop(body);
        } else {
            body.doom();
        }
        true
    }

    /// Runs up to `most` ready tasks, each until it waits, but none once `main` has ended. Says how many it took from the queue.
    fn run_ready(&self, most: u32, main: Option<&BodyRef>) -> u32 {
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
            let Some(body) = slot.body.clone() else {
                state.tasks.free_slot(task); // it ended while it stood in the queue
                continue;
            };
            let word = Word::new(self.id(), slot.generation, task);
            state.current = task;
            state.scope = ROOT;
            drop(state);

            self.word.set(word);
            self.budget.set(BUDGET);
            let waker = ManuallyDrop::new(word.waker());
            let ended = !body.is_doomed() && body.poll(&mut Context::from_waker(&waker));

            state = self.state.borrow_mut();
            state.current = NIL;
            if ended || body.is_doomed() {
                drop(state);
                self.end(task, body, ended);
                state = self.state.borrow_mut();
            } else {
                body.release_shared(); // the slot has another
            }
        }
        taken
    }

    /// After a poll in which the task ended, or was aborted.
    fn end(&self, task: u32, body: BodyRef, ended: bool) {
        if ended || body.abort() {
            // `body` is still a reference, so dropping the slot's runs no user code.
            self.with(|state| drop(state.finish(task)));
            body.drop_unwanted_output();
        }
    }

    /// How many tasks to run before `must_look` has something to say.
    fn batch(&self) -> u32 {
        let polls = self.polls.get();
        let to_look = self.io_interval.saturating_sub(polls);
        to_look.min(CLOCK_INTERVAL - polls % CLOCK_INTERVAL)
    }

    /// Whether it is time to look outside although tasks are ready, now that `taken` more have run.
    fn must_look(&self, taken: u32) -> bool {
        let polls = self.polls.get() + taken;
        self.polls.set(polls);
        if polls >= self.io_interval {
            return true;
        }
        if polls.is_multiple_of(CLOCK_INTERVAL) {
            let state = self.state.borrow();
            return !(state.wheel.is_empty() && state.reactor.is_empty())
                && state.time() > self.last_look.get() + LOOK_AFTER;
        }
        false
    }

    /// Polls I/O, fires timers and drains the inbox; waits for something to do for up to `max_wait` if no task is ready.
    fn look(&self, max_wait: Option<Duration>) -> io::Result<()> {
        self.polls.set(0);
        let outcome = self.with(|state| {
            let wait = self.time_to_wait(state, max_wait);
            let mut slept = wait != Some(Duration::ZERO);
            let wait = if slept && !self.inbox.prepare_to_sleep() {
                slept = false;
                self.inbox.awake();
                Some(Duration::ZERO)
            } else {
                wait
            };
            // The bell that rang while we were away is silenced by a poll, else the host finds us readable for ever.
            if slept || !state.reactor.is_empty() || self.away.replace(false) {
                let for_thread = slept && state.remote_waits > 0 && !state.wheel.is_empty();
                let started = for_thread.then(Instant::now);
                let polled = state.poll_io(wait);
                if let Some(started) = started {
                    // A virtual clock does not jump while a thread works; it must not stand still either, or no timeout ever ends the wait.
                    state
                        .clock
                        .advance_to(state.clock.now() + started.elapsed());
                }
                if slept {
                    self.inbox.awake();
                }
                polled?;
            }
            state.fire_timers();
            if !state.wheel.is_empty() || !state.reactor.is_empty() {
                self.last_look.set(state.time());
            }
            Ok(())
        });
        if self.inbox.has_mail() {
            self.read_mail();
        }
        outcome
    }

    /// How long to sleep in the poller. A virtual clock is moved here instead.
    fn time_to_wait(&self, state: &mut State, max_wait: Option<Duration>) -> Option<Duration> {
        if !state.ready.is_empty() || self.inbox.has_mail() || max_wait == Some(Duration::ZERO) {
            return Some(Duration::ZERO);
        }
        let Some(deadline) = state.wheel.next_deadline(&state.nodes) else {
            return max_wait;
        };
        let now = state.time();
        if deadline <= now {
            return Some(Duration::ZERO);
        }
        let until = Duration::from_nanos(deadline - now);
        let until = max_wait.map_or(until, |max| max.min(until));
        if state.remote_waits == 0 {
            let io_first = !state.reactor.is_empty()
                && state
                    .poll_io(Some(Duration::ZERO))
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
                        std::mem::forget(panic);
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
            if !main.is_live() {
                return Ok(());
            }
            if self.must_look(taken) {
                self.look(Some(Duration::ZERO))?;
                continue;
            }
            if taken == batch {
                continue;
            }
            if self.is_stuck() {
                return Err(RunError::Deadlock(self.state.borrow().dump()));
            }
            self.look(None)?;
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
            if taken < batch || self.must_look(taken) {
                break;
            }
        }
        // From here until the next turn other threads wake us through the descriptor.
        let ready = !self.inbox.prepare_to_sleep() || !self.state.borrow().ready.is_empty();
        let state = self.state.borrow();
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

impl State {
    /// Whether the waker's task still has its slot.
    fn is_current(&self, word: Word) -> bool {
        self.tasks
            .get(word.slot())
            .is_some_and(|slot| slot.body.is_some() && word.fits(slot.generation))
    }

    /// Every live task, the newest first.
    fn bodies(&self) -> Vec<BodyRef> {
        let mut bodies: Vec<_> = self
            .tasks
            .iter()
            .filter_map(|(_, slot)| slot.body.clone())
            .collect();
        bodies.sort_by_key(|body| std::cmp::Reverse(body.id));
        bodies
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

/// How a [`Kernel`] is set up.
#[must_use]
pub struct Builder {
    clock: Box<dyn Clock>,
    io_interval: u32,
}

impl Builder {
    /// The system's clock, and a look at I/O at least every 61 polls.
    pub fn new() -> Self {
        Self {
            clock: Box::new(SystemClock),
            io_interval: LOOK_INTERVAL,
        }
    }

    /// Takes the time from `clock`, for instance a [`VirtualClock`].
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Box::new(clock);
        self
    }

    /// Looks at I/O, timers and other threads after this many polls although tasks are still ready.
    /// Fewer answer sooner, more cost less. At least 1.
    pub fn io_interval(mut self, polls: u32) -> Self {
        self.io_interval = polls.max(1);
        self
    }

    /// Makes the kernel.
    ///
    /// # Errors
    /// If the poller cannot be made, or 4096 kernels already exist in this process.
    pub fn build<'env>(self) -> io::Result<Kernel<'env>> {
        Ok(Kernel {
            core: Core::new(self)?,
            env: PhantomData,
        })
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("io_interval", &self.io_interval)
            .finish_non_exhaustive()
    }
}

/// A kernel: tasks, and the loop that runs them on the thread that owns it.
///
/// Tasks spawned with [`Kernel::spawn`] and the main future of [`Kernel::run`] may borrow whatever outlives the kernel (`'env`),
/// since they are polled inside its methods and dropped with it at the latest.
///
/// ```
/// use std::time::Duration;
///
/// let name = String::from("kernel");
/// let mut kernel = kernel::Kernel::new()?;
/// let greeting = kernel.run(async {
///     let task = kernel::spawn(async { kernel::sleep(Duration::from_millis(1)).await });
///     task.join().await.unwrap().unwrap();
///     format!("hello, {name}")
/// })?;
/// assert_eq!(greeting, "hello, kernel");
/// # Ok::<(), kernel::RunError>(())
/// ```
///
/// What it borrows must outlive it, and it stays on its thread, as its tasks do:
///
/// ```compile_fail,E0597
/// let mut kernel = kernel::Kernel::new().unwrap();
/// let dies_first = String::new();
/// kernel.spawn(async { dies_first.len() });
/// kernel.run(async {}).unwrap();
/// ```
/// ```compile_fail,E0373
/// # async fn main_task() {
/// let local = String::new();
/// kernel::spawn(async { local.len() });
/// # }
/// ```
/// ```compile_fail,E0505
/// // A value that borrows must be gone, with its task, before what it borrows.
/// struct Noisy<'a>(&'a String);
/// impl Drop for Noisy<'_> {
///     fn drop(&mut self) { println!("{}", self.0); }
/// }
/// let text = String::new();
/// let mut kernel = kernel::Kernel::new().unwrap();
/// let task = kernel.spawn(async { Noisy(&text) });
/// kernel.run(task.wait()).unwrap().unwrap();
/// drop(kernel);
/// drop(text);
/// drop(task);
/// ```
/// ```compile_fail,E0277
/// fn is_send<T: Send>() {}
/// is_send::<kernel::Kernel<'static>>();
/// ```
/// ```compile_fail,E0277
/// fn is_send<T: Send>() {}
/// is_send::<kernel::Task<()>>();
/// ```
/// ```compile_fail,E0277
/// fn is_sync<T: Sync>() {}
/// is_sync::<kernel::TaskRef>();
/// ```
/// ```compile_fail,E0382
/// // A kernel that was shut down is gone.
/// let mut kernel = kernel::Kernel::new().unwrap();
/// kernel.shutdown(None).unwrap();
/// kernel.run(async {}).unwrap();
/// ```
pub struct Kernel<'env> {
    core: Rc<Core>,
    /// Invariant, and with the `Drop` below: borrowed data must outlive the kernel strictly.
    env: PhantomData<Cell<&'env ()>>,
}

/// What a [`Kernel::turn`] did and what is left to do.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// How many tasks were polled.
    pub polled: usize,
    /// Whether there is more to do at once: call `turn` again soon.
    pub ready: bool,
    /// When to call `turn` again at the latest.
    pub next_deadline: Option<Instant>,
    /// How many tasks have not ended.
    pub live: usize,
}

/// How a [`Kernel::shutdown`] went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShutdownReport {
    /// Tasks that ended after they were cancelled.
    pub cancelled: usize,
    /// Tasks that did not end within the grace and were dropped.
    pub aborted: usize,
}

impl<'env> Kernel<'env> {
    /// A kernel as [`Builder::new`] sets it up.
    ///
    /// # Errors
    /// As [`Builder::build`].
    pub fn new() -> io::Result<Self> {
        Builder::new().build()
    }

    /// Runs `main` as a task until it ends, and with it whatever it spawns. Other tasks that are still alive then stand still until
    /// the next `run` or [`turn`](Kernel::turn) (Curio's `Kernel.run`).
    ///
    /// # Errors
    /// [`RunError::Reentrant`] from inside a running kernel of this thread, [`RunError::Deadlock`] if nothing can wake `main` any more,
    /// [`RunError::Aborted`] if somebody aborted it.
    ///
    /// # Panics
    /// With what `main` panicked with.
    #[track_caller]
    pub fn run<T>(&mut self, main: impl Future<Output = T>) -> Result<T, RunError> {
        if with_current(|core| core.is_some()) {
            return Err(RunError::Reentrant);
        }
        let running = self.core.enter()?;
        // `main` may borrow from the caller: it must be gone when this returns, however that comes about.
        let main = DropMain {
            handle: self.core.spawn(main, Location::caller()),
            core: &self.core,
        };
        self.core.run(main.handle.body())?;
        let output = main.handle.take();
        drop(main);
        drop(running);
        match output.expect("the main task has ended") {
            Ok(value) => Ok(value),
            Err(crate::JoinError::Panicked(panic)) => resume_unwind(panic.into_payload()),
            Err(_) => Err(RunError::Aborted),
        }
    }

    /// One pass of the loop, for a host that has a loop of its own: polls I/O, fires timers, and runs each task that is ready then, once.
    /// Waits up to `max_wait` for something to do (`None`: until there is something; zero: not at all).
    ///
    /// The host watches [`as_fd`](AsFd::as_fd) for reading, and calls `turn(Some(Duration::ZERO))` when it is readable, at
    /// [`Turn::next_deadline`], and again at once while [`Turn::ready`].
    ///
    /// # Errors
    /// [`RunError::Reentrant`] if one of its own tasks calls it; [`RunError::Io`] if the poller fails.
    pub fn turn(&mut self, max_wait: Option<Duration>) -> Result<Turn, RunError> {
        let _running = self.core.enter()?;
        Ok(self.core.turn(max_wait)?)
    }

    /// Starts a task, to be run by the next `run` or `turn`.
    #[track_caller]
    pub fn spawn<T: 'env>(&self, future: impl Future<Output = T> + 'env) -> crate::Task<T> {
        let handle = self.core.spawn(future, Location::caller());
        self.core.nudge();
        crate::Task::from_handle(handle)
    }

    /// A handle for other threads.
    #[must_use]
    pub fn remote(&self) -> Remote {
        self.core.remote()
    }

    /// Every live task, in the order they were spawned.
    #[must_use]
    pub fn tasks(&self) -> Vec<TaskInfo> {
        self.core.state.borrow().dump()
    }

    /// Cancels the tasks, newest first, and waits for each; what has not ended after `grace` (`None`: however long it takes) is
    /// dropped, newest first.
    ///
    /// # Errors
    /// As [`Kernel::turn`]; then all tasks are dropped.
    pub fn shutdown(self, grace: Option<Duration>) -> Result<ShutdownReport, RunError> {
        let _running = self.core.enter()?;
        let core = &self.core;
        let deadline = grace.and_then(|grace| core.state.borrow().now().checked_add(grace));
        let mut cancelled = 0;
        'tasks: loop {
            let bodies = core.state.borrow().bodies();
            if bodies.is_empty() {
                break;
            }
            for body in bodies {
                if !body.is_live() {
                    continue; // it ended while another was waited for
                }
                core.with(|state| state.cancel(body.slot.get(), Interrupt::cancelled()));
                while body.is_live() {
                    let left = deadline.map(|deadline| {
                        deadline.saturating_duration_since(core.state.borrow().now())
                    });
                    if left == Some(Duration::ZERO) || core.is_stuck() {
                        break 'tasks;
                    }
                    if core.turn(left)?.polled == 0
                        && let Some(deadline) = deadline
                    {
                        // A virtual clock does not move while only I/O or a thread is waited for; the grace must end all the same.
                        core.state.borrow().clock.advance_to(deadline);
                    }
                }
                cancelled += 1;
            }
        }
        let aborted = core.close();
        Ok(ShutdownReport { cancelled, aborted })
    }
}

/// Drops what is left of a main task when `run` returns, by whichever way.
struct DropMain<'a, T> {
    handle: Handle<T>,
    core: &'a Core,
}

impl<T> Drop for DropMain<'_, T> {
    fn drop(&mut self) {
        self.core.abort(self.handle.body());
        // The output, if there is one, must not outlive this call either.
        drop(self.handle.take());
    }
}

impl Drop for Kernel<'_> {
    /// Drops every task, newest first. [`Kernel::shutdown`] lets them clean up.
    fn drop(&mut self) {
        if let Ok(_running) = self.core.enter() {
            self.core.close();
        }
        let serial = self.core.serial;
        // During thread exit the list may be gone already.
        let _ = KERNELS.try_with(|kernels| {
            kernels.borrow_mut().retain(|known| known.serial != serial);
        });
    }
}

impl AsFd for Kernel<'_> {
    /// Readable when there is something for [`Kernel::turn`] to do, apart from deadlines.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.core.registry.as_fd()
    }
}

impl std::fmt::Debug for Kernel<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("id", &self.core.id())
            .finish_non_exhaustive()
    }
}

/// A kernel as other threads see it. It may outlive the kernel; then it does nothing.
#[derive(Clone)]
pub struct Remote {
    sender: InboxSender,
    _alive: Arc<()>,
}

impl Remote {
    /// Runs `call` on the kernel's thread, between two tasks; there it may use [`spawn`](crate::spawn) and every trap that does not block.
    /// False if the kernel is gone.
    pub fn call(&self, call: impl FnOnce() + Send + 'static) -> bool {
        self.sender.push(Note::Call(Box::new(call)))
    }
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Remote")
    }
}

/// Answers one wait of a kernel's task, from any thread, once. Dropping it answers too, so that no task waits for a thread that is gone.
pub struct Completer {
    sender: InboxSender,
    ticket: Ticket,
}

impl Completer {
    pub(crate) const fn new(sender: InboxSender, ticket: Ticket) -> Self {
        Self { sender, ticket }
    }

    /// Wakes the task.
    pub fn complete(self) {}
}

impl Drop for Completer {
    fn drop(&mut self) {
        self.sender.push(Note::Complete(self.ticket));
    }
}

impl std::fmt::Debug for Completer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Completer")
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, pending};
    use std::task::Poll;

    use futures::future::{join, select};

    use super::*;
    use crate::traps::{Lot, future_wait, read_wait, sched_wait};
    use crate::{ignore_after, interruptible, shield, sleep, spawn, timeout_after, yield_now};

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn kernel<'env>() -> Kernel<'env> {
        Builder::new().clock(VirtualClock::new()).build().unwrap()
    }

    /// Nodes, timers, scopes, sources, remote waits, lots of joiners, reasons: of all this nothing is left.
    fn assert_clean(kernel: &Kernel<'_>) {
        let state = kernel.core.state.borrow();
        let State {
            nodes,
            wheel,
            scopes,
            reactor,
            ..
        } = &*state;
        assert_eq!((nodes.live(), wheel.len(), scopes.len()), (0, 0, 0));
        assert!(reactor.is_empty() && reactor.waiting() == 0);
        assert_eq!(state.remote_waits, 0);
        assert!(state.reasons.is_empty() && state.names.is_empty());
        assert!(state.aftermath.is_empty() && state.due.is_empty());
        assert_eq!((state.current, state.scope), (NIL, ROOT));
        assert_eq!(state.tasks.live(), 0);
        assert!(state.ready.is_empty());
    }

    /// One of each wait, raced against each other.
    async fn wait_in_every_way(lot: Rc<Lot>) -> bool {
        let (reader, _writer) = std::os::unix::net::UnixStream::pair().unwrap();
        let child = spawn(sleep(s(500)));
        let mut kept = None;
        let waits = join(
            join(
                timeout_after(s(200), join_results(sleep(s(100)), child.wait())),
                shield(ignore_after(s(3), sleep(Duration::from_millis(5)))),
            ),
            join(
                select(
                    Box::pin(sched_wait(&lot, WaitKind::Lock)),
                    Box::pin(interruptible(pending::<()>())),
                ),
                select(
                    Box::pin(future_wait(|completer| kept = Some(completer))),
                    Box::pin(async { read_wait(&reader).await }),
                ),
            ),
        );
        let _ = waits.await;
        child.cancel().await.is_ok()
    }

    async fn join_results<A, B, E>(
        a: impl Future<Output = Result<A, E>>,
        b: impl Future<Output = Result<B, E>>,
    ) -> Result<(A, B), E> {
        let (a, b) = join(a, b).await;
        Ok((a?, b?))
    }

    /// Accepts: sweepea-defect/S11, sweepea-defect/S22, curio-defect/C9
    #[test]
    fn nothing_is_left_of_a_task_that_was_cancelled_aborted_or_closed() {
        let lot = Rc::new(Lot::new());
        for steps in 0..4 {
            for (abort, cancel) in [(true, false), (false, true), (false, false)] {
                let mut kernel = kernel();
                let task = kernel.spawn(wait_in_every_way(lot.clone()));
                task.set_name("victim");
                for _ in 0..steps {
                    kernel.run(yield_now()).unwrap().unwrap();
                }
                // Before it ran, the first wait alone would be told, and the rest would wait for ever.
                if cancel && steps > 0 {
                    kernel.run(task.cancel()).unwrap().unwrap();
                }
                if abort {
                    task.abort();
                    kernel.turn(Some(Duration::ZERO)).unwrap();
                }
                let _running = kernel.core.enter().unwrap();
                kernel.core.close();
                while kernel.core.run_ready(1, None) > 0 {} // the slots of tasks that ended while queued
                assert_clean(&kernel);
            }
        }
    }

    #[test]
    fn nothing_is_left_of_waits_that_ended_timed_out_or_lost_a_race() {
        let mut kernel = kernel();
        kernel
            .run(async {
                for _ in 0..3 {
                    sleep(s(1)).await.unwrap();
                    let _ = timeout_after(s(1), sleep(s(2))).await;
                    let _ = timeout_after(s(2), timeout_after(s(9), sleep(s(5)))).await;
                    ignore_after(s(9), sleep(s(1))).await.unwrap();
                    select(sleep(s(1)), sleep(s(2))).await;
                    shield(sleep(s(1))).await.unwrap();
                    crate::drop_after(s(1), pending::<()>()).await;
                    let mut polled = Box::pin(timeout_after(s(5), shield(sleep(s(5)))));
                    assert!(futures::poll!(&mut polled) == Poll::Pending);
                    let task = spawn(sleep(s(5)));
                    let _ = timeout_after(s(1), task.wait()).await;
                    task.cancel().await.unwrap();
                    spawn(async { panic!("contained") })
                        .join()
                        .await
                        .unwrap_err();
                }
            })
            .unwrap();
        assert_clean(&kernel);
    }

    #[test]
    fn a_slot_that_is_retired_while_queued_is_free_after_its_pop() {
        let mut kernel = kernel();
        for _ in 0..100 {
            let task = kernel.spawn(async {});
            task.abort();
            drop(task);
            kernel.turn(Some(Duration::ZERO)).unwrap();
            kernel
                .run(async {
                    let task = spawn(async {});
                    task.abort();
                    yield_now().await.unwrap();
                })
                .unwrap();
        }
        assert!(kernel.core.state.borrow().tasks.capacity() <= 3);
        assert_clean(&kernel);
    }
}
