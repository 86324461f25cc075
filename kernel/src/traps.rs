//! The door: every way from user mode into the kernel.
//!
//! Curio's kernel serves fifteen traps, and everything above it (locks, queues, sockets, groups, workers) is made of them. The
//! same holds here: no other module of this crate touches a kernel table, and none of it has powers that this module does
//! not give to everyone. Use it to build primitives of your own; for everyday work there are friendlier names.
//!
//! A trap is either *immediate*, it never suspends and is no cancellation point, or *blocking*: then it suspends the task, and
//! a cancellation or timeout that is pending, or comes while it waits, is its `Err`.
//!
//! | Curio's trap | here | kind | answer | what it costs | everyday name |
//! |---|---|---|---|---|---|
//! | `_read_wait`, `_write_wait` | [`read_wait`], [`write_wait`] | blocking | `io::Result<()>` | a node; the descriptor is registered with the poller for each wait ([`Source`] does it once) | the types of [`net`](crate::net) |
//! | `_io_release` | [`io_release`] | immediate | – | a look-up; the poller is told if the descriptor is registered | dropping a socket |
//! | `_io_waiting` | [`io_waiting`] | immediate | who waits to read, to write | a look-up | |
//! | `_future_wait` | [`future_wait`] | blocking | woken by a [`Completer`] from any thread | a node; the answer wakes the kernel's thread only if that sleeps | [`run_in_thread`](crate::run_in_thread) |
//! | `_sleep` | [`sleep`], [`sleep_until`] | blocking | the time after it | a node in the timer wheel; for no time at all only a place in the ready queue | [`sleep`](crate::sleep()) |
//! | `_spawn` | [`spawn`] | immediate | [`Task`] | a slot, and one piece of memory for the future and then its value, most often one that an earlier task had | [`spawn`](crate::spawn) |
//! | `_cancel_task` | [`cancel_task`] | immediate | whether it was the first | a walk along what the task waits for | [`Task::cancel`] |
//! | `_scheduler_wait` | [`sched_wait`] | blocking | woken by `sched_wake` | a node in the lot's queue | the types of [`sync`](crate::sync) |
//! | `_scheduler_wake` | [`sched_wake`] | immediate | how many were woken | as many steps as it wakes | |
//! | `_get_kernel` | [`get_kernel`] | immediate | [`Remote`] | two atomic counts | |
//! | `_get_current` | [`get_current`] | immediate | [`TaskRef`] | a count | [`current_task`](crate::current_task) |
//! | `_set_timeout` | [`set_timeout`] | immediate | [`Timeout`] | a node in the timer wheel | [`timeout_after`](crate::timeout_after) |
//! | `_unset_timeout` | [`Timeout::unset`] | immediate | [`Expiry`] | gives it back | the end of [`timeout_after`](crate::timeout_after) |
//! | `_clock` | [`clock`] | immediate | `Instant` | a look at the clock | [`now`](crate::now) |
//! | – | [`join_wait`] | blocking | the task has ended | a node, if the task has not ended | [`Task::join`] |
//! | – | [`idle_wait`] | blocking | no other task can run | a node | [`wait_until_idle`](crate::wait_until_idle) |
//!
//! *Blocking* says that it is a cancellation point, as [`join_wait`] is if it has to wait; *immediate* that it is none. No trap but the first three makes a system call.
//!
//! A blocking trap is a *leaf future*: it registers one node in the kernel's table when it is first polled and takes it out when
//! it is dropped, so losing a race in `select!` abandons the wait. The immediate ones that ask something are futures too, ready at
//! their first poll; those that only tell something are plain calls, which [`immediate`] makes futures of. So a program can be written
//! against the door alone, and with futures alone.
//!
//! # Panics
//! Traps are requests to the running kernel of this thread: without one, polling or calling them panics. The blocking ones, [`get_current`] and
//! [`set_timeout`] are requests of a task, and panic outside one.

use std::borrow::Borrow;
use std::cell::Cell;
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::panic::Location;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use pin_project_lite::pin_project;

use crate::error::{Interrupt, ResourceBusy};
use crate::local::Locals;
use crate::runtime::{
    self, BodyRef, Core, NIL, NoteState, Phase, Readiness, State, Verdict, nanos,
};
use crate::task::{Task, TaskId, TaskInfo, TaskRef};

pub use crate::runtime::{Completer, Direction, Remote, Ring, WaitKind};

/// Calls `f` with the kernel of the running task.
#[inline(always)]
#[track_caller]
fn running<R>(f: impl FnOnce(&Core) -> R) -> R {
    runtime::with_current(|core| match core {
        Some(core) => f(core),
        None => no_kernel(),
    })
}

#[cold]
#[track_caller]
fn no_kernel() -> ! {
    panic!("no kernel runs on this thread: traps work inside `kernel::run` or `Kernel::turn`")
}

/// In place of a node's number: the join is noted, see `runtime::joins`.
const NOTED: u32 = NIL - 1;

/// A place in some queue of the kernel, held by a leaf future from its first poll to its last.
#[derive(Debug)]
struct Wait {
    node: u32,
    /// The kernel's serial number.
    kernel: u32,
    /// Its number means nothing on another thread, where nobody could take the node out.
    _local: PhantomData<*const ()>,
}

impl Wait {
    const IDLE: Self = Self {
        node: NIL,
        kernel: 0,
        _local: PhantomData,
    };

    /// Blocks: `open` makes the node and puts it into its queue, unless an interrupt is pending. The answer is whether the wait was
    /// fired; if not, what it waited for is gone.
    ///
    /// Nearly every wait is a first poll that arms it and a second that finds it fired. The first is a call, so that the second, which is
    /// short, need not save the registers of both.
    #[inline(always)]
    fn poll(
        &mut self,
        cx: &Context<'_>,
        open: impl FnMut(&mut State) -> Option<u32>,
    ) -> Poll<Result<bool, Interrupt>> {
        if self.node == NIL {
            self.arm(cx, false, open)?;
            return Poll::Pending;
        }
        self.poll_armed(cx)
    }

    /// The first poll. Saves no registers either: there is no call in it but for those that end it.
    #[inline(never)]
    fn arm(
        &mut self,
        cx: &Context<'_>,
        is_shielded: bool,
        mut open: impl FnMut(&mut State) -> Option<u32>,
    ) -> Result<(), Interrupt> {
        running(|core| {
            let Some(node) = core.open_wait(is_shielded, &mut open) else {
                return self.arm_with_care(core, cx, open);
            };
            (self.node, self.kernel) = (node, core.serial);
            if core.is_own(cx.waker()) {
                return Ok(());
            }
            self.keep_waker(core, cx.waker());
            Ok(())
        })
    }

    #[cold]
    fn arm_with_care(
        &mut self,
        core: &Core,
        cx: &Context<'_>,
        open: impl FnMut(&mut State) -> Option<u32>,
    ) -> Result<(), Interrupt> {
        core.make_way()?;
        self.arm(cx, true, open)
    }

    /// Any other.
    #[inline(always)]
    fn poll_armed(&mut self, cx: &Context<'_>) -> Poll<Result<bool, Interrupt>> {
        if self.collect() {
            return Poll::Ready(Ok(true));
        }
        running(|core| self.proceed(core, cx))
    }

    /// Ends the wait if it has been fired.
    #[inline(always)]
    fn collect(&mut self) -> bool {
        let has_fired = self.node != NIL
            && running(|core| self.kernel == core.serial && core.collect(self.node));
        if has_fired {
            self.node = NIL;
        }
        has_fired
    }

    /// Goes on with a wait that was not fired.
    #[cold]
    fn proceed(&mut self, core: &Core, cx: &Context<'_>) -> Poll<Result<bool, Interrupt>> {
        assert!(
            self.kernel == core.serial,
            "a future that waits in one kernel was polled in another"
        );
        if core.still_waits(self.node, cx.waker()) {
            return Poll::Pending;
        }
        let phase = core.with(|state| state.nodes[self.node].phase());
        let answer = match phase {
            Phase::Armed => {
                self.refresh(core, cx);
                return Poll::Pending;
            }
            Phase::Fired => Ok(true),
            Phase::Closed => Ok(false),
            Phase::Interrupted => Err(core.with(|state| state.interrupt_of(self.node))),
        };
        let node = std::mem::replace(&mut self.node, NIL);
        core.with(|state| state.release(node));
        Poll::Ready(answer)
    }

    /// Polled by another task, in another scope or with another waker than before.
    fn refresh(&self, core: &Core, cx: &Context<'_>) {
        core.with(|state| {
            assert!(state.current != NIL, "a trap was polled outside of a task");
            state.refresh_wait(self.node);
        });
        if core.is_own(cx.waker()) {
            core.with(|state| state.set_waker(self.node, None));
        } else {
            self.keep_waker(core, cx.waker());
        }
    }

    /// The leaf is polled with a waker of its own, which is what must be woken then.
    #[cold]
    fn keep_waker(&self, core: &Core, waker: &Waker) {
        core.with(|state| state.keep_at_end(self.node));
        let waker = waker.clone(); // user code, so no table is borrowed
        core.with(|state| state.set_waker(self.node, Some(waker)));
    }

    /// Takes the node out of its queue.
    #[inline(never)]
    fn abandon(&self) {
        runtime::with_kernel(self.kernel, |core| {
            core.with(|state| state.release(self.node))
        });
    }

    /// Whether it was fired and the future has not been polled since: what it was given must be handed on if it is dropped.
    fn is_fired(&self) -> bool {
        let fired = |core: &Core| core.with(|state| state.nodes[self.node].phase() == Phase::Fired);
        self.node != NIL && runtime::with_kernel(self.kernel, fired).unwrap_or(false)
    }

    const fn is_armed(&self) -> bool {
        self.node != NIL
    }

    /// Whether it waits for a task's end without a node.
    const fn is_noted(&self) -> bool {
        self.node == NOTED
    }

    /// Waits for the end of `body`'s task. Mostly this is the first poll and all there is to it, see `runtime::joins`.
    #[inline(never)]
    fn poll_join(
        &mut self,
        cx: &Context<'_>,
        body: &BodyRef,
        at: &'static Location<'static>,
    ) -> Poll<Result<(), Interrupt>> {
        let is_first = !self.is_armed() && body.is_live();
        if is_first && let Some(kernel) = running(|core| core.note_join(cx.waker(), body, at)) {
            (self.node, self.kernel) = (NOTED, kernel);
            return Poll::Pending;
        }
        self.poll_join_with_care(cx, body, at)
    }

    #[cold]
    fn poll_join_with_care(
        &mut self,
        cx: &Context<'_>,
        body: &BodyRef,
        at: &'static Location<'static>,
    ) -> Poll<Result<(), Interrupt>> {
        if self.is_noted() {
            match self.look_at_note(cx, body)? {
                NoteState::Waits => return Poll::Pending,
                NoteState::Ended => return Poll::Ready(Ok(())),
                NoteState::Gone => {}
            }
        } else if !self.is_armed() {
            if !body.is_live() {
                return Poll::Ready(Ok(()));
            }
            if running(|core| core.with(State::make_room_for_note)) {
                return self.poll_join(cx, body, at);
            }
        }
        let fired = self.poll(cx, |state| state.open_join(body, at));
        fired.map_ok(|_| ())
    }

    /// Goes on with a noted join; it is idle if it does not wait any more.
    fn look_at_note(&mut self, cx: &Context<'_>, body: &BodyRef) -> Result<NoteState, Interrupt> {
        let note = running(|core| {
            assert!(
                self.kernel == core.serial,
                "a future that waits in one kernel was polled in another"
            );
            let is_own = core.is_own(cx.waker());
            core.with(|state| state.look_at_note(body, is_own))
        });
        if note != Ok(NoteState::Waits) {
            self.forget();
        }
        note
    }

    #[inline(never)]
    fn drop_note(&mut self, body: &BodyRef) {
        runtime::with_kernel(self.kernel, |core| core.with(|state| state.drop_note(body)));
        self.forget();
    }

    /// Its node was freed by whoever fired it.
    const fn forget(&mut self) {
        self.node = NIL;
    }
}

impl Drop for Wait {
    #[inline]
    fn drop(&mut self) {
        if self.node != NIL {
            self.abandon();
        }
    }
}

/// An immediate trap as a future: ready at its first poll.
#[derive(Debug)]
#[must_use = "a trap does nothing until it is awaited"]
pub struct Immediate<F>(Option<F>);

impl<F> Unpin for Immediate<F> {}

impl<T, F: FnOnce() -> T> Future for Immediate<F> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<T> {
        let call = self
            .0
            .take()
            .expect("a future is not polled after it was ready");
        Poll::Ready(call())
    }
}

/// A trap that is a plain call, as a future that is ready at its first poll.
///
/// ```
/// use kernel::traps::{Lot, immediate, sched_wake};
///
/// # kernel::run(async {
/// let lot = Lot::new();
/// assert_eq!(immediate(|| sched_wake(&lot, 1)).await, 0);
/// # }).unwrap();
/// ```
pub const fn immediate<T, F: FnOnce() -> T>(call: F) -> Immediate<F> {
    Immediate(Some(call))
}

/// The immediate traps as plain calls, for the friendly layer.
pub(crate) mod call {
    use super::*;

    #[track_caller]
    pub(crate) fn spawn<T>(future: impl Future<Output = T> + 'static) -> Task<T> {
        let at = Location::caller();
        Task::from_handle(running(|core| core.spawn(future, at)))
    }

    #[track_caller]
    pub(crate) fn clock() -> Instant {
        running(|core| core.with(|state| state.now()))
    }

    #[track_caller]
    pub(crate) fn current() -> TaskRef {
        try_current().expect("no task runs on this thread")
    }

    pub(crate) fn try_current() -> Option<TaskRef> {
        runtime::with_current(|core| {
            core?.with(|state| {
                let slot = state.tasks.get(state.current)?;
                slot.body.clone().map(TaskRef::new)
            })
        })
    }

    #[track_caller]
    pub(crate) fn tasks() -> Vec<TaskInfo> {
        running(|core| core.with(|state| state.dump()))
    }

    pub(crate) fn cancel(body: &BodyRef, interrupt: Interrupt) -> bool {
        let cancel = |core: &Core| core.with(|state| state.cancel(body.slot.get(), interrupt));
        runtime::with_kernel_of(body, cancel).unwrap_or(false)
    }

    pub(crate) fn abort(body: &BodyRef) -> bool {
        runtime::with_kernel_of(body, |core| core.abort(body)).unwrap_or(false)
    }

    /// Works on the tables for a live task's handle; `None` if it has ended.
    pub(crate) fn inspect<R>(body: &BodyRef, f: impl FnOnce(&mut State, u32) -> R) -> Option<R> {
        runtime::with_kernel_of(body, |core| core.with(|state| f(state, body.slot.get())))
    }

    /// Calls `f` with the running task's local values; `None` if no task runs here.
    pub(crate) fn locals<R>(f: impl FnOnce(Option<&Locals>) -> R) -> Option<R> {
        in_task(|state| f(state.locals()))
    }

    /// As `locals`, to change them. `f` calls no user code, and drops no user's value: the tables are borrowed.
    pub(crate) fn locals_mut<R>(f: impl FnOnce(&mut Locals) -> R) -> Option<R> {
        in_task(|state| f(state.locals_mut()))
    }

    fn in_task<R>(f: impl FnOnce(&mut State) -> R) -> Option<R> {
        runtime::with_current(|core| core?.with(|state| (state.current != NIL).then(|| f(state))))
    }

    /// Works on the tables for the running task.
    #[track_caller]
    pub(crate) fn with_task<R>(f: impl FnOnce(&mut State) -> R) -> R {
        running(|core| {
            core.with(|state| {
                assert!(state.current != NIL, "no task runs on this thread");
                f(state)
            })
        })
    }
}

/// Trap `spawn`: starts a task at the end of the ready queue; the caller goes on.
#[track_caller]
pub fn spawn<T>(future: impl Future<Output = T> + 'static) -> Immediate<impl FnOnce() -> Task<T>> {
    let at = Location::caller();
    Immediate(Some(move || {
        Task::from_handle(running(|core| core.spawn(future, at)))
    }))
}

/// Trap `get_current`: the running task.
pub fn get_current() -> Immediate<impl FnOnce() -> TaskRef> {
    Immediate(Some(call::current))
}

/// Trap `get_kernel`: the running kernel, as other threads see it.
pub fn get_kernel() -> Immediate<impl FnOnce() -> Remote> {
    Immediate(Some(|| running(Core::remote)))
}

/// Trap `clock`: the kernel's time. It never goes back.
pub fn clock() -> Immediate<impl FnOnce() -> Instant> {
    Immediate(Some(call::clock))
}

/// Trap `cancel_task`: asks for `task` to be interrupted at its next blocking trap, or at the one it waits in. True if it was
/// alive and nobody had asked before. Does not wait: that is [`Task::cancel`].
pub fn cancel_task(task: &TaskRef, interrupt: Interrupt) -> Immediate<impl FnOnce() -> bool> {
    Immediate(Some(move || call::cancel(task.body(), interrupt)))
}

/// Trap `sleep`: waits for `duration` from its first poll on; never wakes early. Zero lets every other ready task run first.
///
/// Cancellation point: yes. If dropped, its timer is gone.
#[track_caller]
pub fn sleep(duration: Duration) -> Sleep {
    Sleep(Nap::New {
        nanos: nanos(duration),
        at: Location::caller(),
    })
}

/// Waits for a time; made by [`sleep`].
#[derive(Debug)]
#[must_use = "a trap does nothing until it is awaited"]
pub struct Sleep(Nap);

#[derive(Debug)]
enum Nap {
    New {
        nanos: u64,
        at: &'static Location<'static>,
    },
    /// Over once its wait is `Wait::IDLE` again.
    Begun(Wait),
}

// A million sleepers pay for every one of them.
const _: () = assert!(size_of::<Sleep>() == 16);

impl Future for Sleep {
    type Output = Result<Instant, Interrupt>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let nap = &mut self.get_mut().0;
        match nap {
            Nap::New { nanos: 0, .. } => {
                // Its second poll is that of a nap that is over.
                let begun = Pin::new(&mut Yield(false)).poll(cx);
                if begun.is_pending() {
                    *nap = Nap::Begun(Wait::IDLE);
                }
                begun.map_ok(|()| call::clock())
            }
            Nap::New { nanos, at } => {
                let mut wait = Wait::IDLE;
                let answer = wait.poll(cx, |state| state.open_sleep(state.after(*nanos), at));
                if answer.is_pending() {
                    *nap = Nap::Begun(wait);
                }
                woken(answer)
            }
            Nap::Begun(wait) if wait.is_armed() => woken(wait.poll_armed(cx)),
            Nap::Begun(_) => Poll::Ready(Ok(call::clock())),
        }
    }
}

/// What a sleep answers: the time at which it was fired, which costs no look at the clock.
fn woken(answer: Poll<Result<bool, Interrupt>>) -> Poll<Result<Instant, Interrupt>> {
    answer.map_ok(|_| running(|core| core.with(|state| state.fired_at)))
}

/// Waits until `at`; as [`sleep`] otherwise.
///
/// Cancellation point: yes. If dropped, its timer is gone.
#[track_caller]
pub const fn sleep_until(at: Instant) -> SleepUntil {
    SleepUntil {
        until: at,
        wait: Wait::IDLE,
        at: Location::caller(),
    }
}

/// Waits until a point in time; made by [`sleep_until`].
#[derive(Debug)]
#[must_use = "a trap does nothing until it is awaited"]
pub struct SleepUntil {
    until: Instant,
    wait: Wait,
    at: &'static Location<'static>,
}

impl Future for SleepUntil {
    type Output = Result<Instant, Interrupt>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { until, wait, at } = self.get_mut();
        woken(wait.poll(cx, |state| state.open_sleep(state.ticks(*until), at)))
    }
}

/// Lets every other ready task run; made by [`yield_now`](crate::yield_now).
#[derive(Debug)]
#[must_use = "a trap does nothing until it is awaited"]
pub struct Yield(pub(crate) bool);

impl Future for Yield {
    type Output = Result<(), Interrupt>;

    #[inline(always)]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.0 {
            return Poll::Ready(Ok(()));
        }
        self.0 = true;
        match requeue(cx.waker()) {
            true => Poll::Pending,
            false => requeue_with_care(cx.waker()),
        }
    }
}

// A call of its own keeps the second poll, which only reads a flag, free of the registers that this one needs.
#[inline(never)]
fn requeue(waker: &Waker) -> bool {
    running(|core| core.requeue(waker))
}

#[cold]
fn requeue_with_care(waker: &Waker) -> Poll<Result<(), Interrupt>> {
    match running(|core| core.requeue_with_care(waker)) {
        Ok(()) => Poll::Pending,
        Err(interrupt) => Poll::Ready(Err(interrupt)),
    }
}

/// A parking lot: a FIFO queue of tasks (Curio's `SchedFIFO`), what [`sched_wait`] waits in and [`sched_wake`] wakes from.
///
/// Belongs to the kernel in which a task first waits in it, until that ends. Dropping it wakes those who still wait.
///
/// Enough for a primitive of one's own, here a gate that lets tasks pass while it is open:
///
/// ```
/// use kernel::traps::{Lot, WaitKind, sched_wait, sched_wake};
/// use kernel::{Interrupt, spawn, wait_until_idle};
/// use std::{cell::Cell, rc::Rc};
///
/// #[derive(Default)]
/// struct Gate {
///     is_open: Cell<bool>,
///     waiting: Lot,
/// }
///
/// impl Gate {
///     /// Cancellation point: only if the gate is closed.
///     async fn pass(&self) -> Result<(), Interrupt> {
///         while !self.is_open.get() {
///             sched_wait(&self.waiting, WaitKind::Custom).await?;
///         }
///         Ok(())
///     }
///
///     fn open(&self) {
///         self.is_open.set(true);
///         sched_wake(&self.waiting, usize::MAX);
///     }
/// }
///
/// # kernel::run(async {
/// let gate = Rc::new(Gate::default());
/// let guest = spawn({
///     let gate = gate.clone();
///     async move { gate.pass().await }
/// });
/// wait_until_idle().await.unwrap();
/// assert!(!guest.is_terminated());
/// gate.open();
/// guest.join().await.unwrap().unwrap();
/// # }).unwrap();
/// ```
#[derive(Debug)]
pub struct Lot {
    id: Cell<u32>,
    kernel: Cell<u32>,
    /// Its number means nothing on another thread.
    _local: PhantomData<*const ()>,
}

impl Lot {
    /// An empty lot.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            id: Cell::new(NIL),
            kernel: Cell::new(0),
            _local: PhantomData,
        }
    }

    /// How many tasks wait in it. Counts them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.look(|state, lot| state.nodes.parked(lot)).unwrap_or(0)
    }

    /// Whether no task waits in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.look(|state, lot| state.nodes.is_vacant(lot))
            .unwrap_or(true)
    }

    /// `None` if no task has ever waited in it, or its kernel has ended.
    fn look<R>(&self, f: impl FnOnce(&State, u32) -> R) -> Option<R> {
        let lot = self.id.get();
        if lot == NIL {
            return None;
        }
        runtime::with_kernel(self.kernel.get(), |core| core.with(|state| f(state, lot)))
    }

    fn open(&self, state: &mut State) -> u32 {
        if self.kernel.get() != state.serial {
            self.open_anew(state);
        }
        self.id.get()
    }

    #[cold]
    fn open_anew(&self, state: &mut State) {
        assert!(
            self.id.get() == NIL || !runtime::exists(self.kernel.get()),
            "a synchronisation object of one kernel was used in another"
        );
        self.id.set(state.open_lot());
        self.kernel.set(state.serial);
    }
}

impl Default for Lot {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Lot {
    fn drop(&mut self) {
        if self.id.get() != NIL {
            let close = |core: &Core| core.with(|state| state.close_lot(self.id.get()));
            runtime::with_kernel(self.kernel.get(), close);
        }
    }
}

/// Trap `sched_wait`: parks the task at the end of `lot` until [`sched_wake`] reaches it. `kind` is what the task dump shows.
///
/// Cancellation point: yes. If dropped, the task is out of the lot; if it had been woken already, the wake is lost unless the primitive hands it
/// on (see [`SchedWait::is_woken`]).
#[track_caller]
pub fn sched_wait(lot: &Lot, kind: WaitKind) -> SchedWait<'_> {
    let kind = if kind.is_parked() {
        kind
    } else {
        WaitKind::Custom
    };
    SchedWait {
        lot,
        kind,
        wait: Wait::IDLE,
        at: Location::caller(),
    }
}

/// Waits in a parking lot; made by [`sched_wait`].
#[derive(Debug)]
#[must_use = "a trap does nothing until it is awaited"]
pub struct SchedWait<'a> {
    lot: &'a Lot,
    kind: WaitKind,
    wait: Wait,
    at: &'static Location<'static>,
}

impl SchedWait<'_> {
    /// Where the task dump says that the task waits: at the caller of a primitive that awaits this in its turn, not inside it.
    pub const fn called_at(mut self, at: &'static Location<'static>) -> Self {
        self.at = at;
        self
    }

    /// Whether it has been woken and not polled since. A primitive that gives something away with a wake (a lock, a permit) asks
    /// this when the waiting future is dropped, and passes it on.
    #[must_use]
    pub fn is_woken(&self) -> bool {
        self.wait.is_fired()
    }

    /// Whether it stands in the lot or has been woken from it.
    #[must_use]
    pub const fn is_waiting(&self) -> bool {
        self.wait.is_armed()
    }
}

impl Future for SchedWait<'_> {
    type Output = Result<(), Interrupt>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let fired = this.wait.poll(cx, |state| {
            let lot = this.lot.open(state);
            let node = state.open_wait(this.kind, 0, this.at)?;
            state.nodes.park(node, lot);
            Some(node)
        });
        fired.map_ok(|_| ())
    }
}

/// Trap `sched_wake`: makes up to `count` tasks of `lot` ready, the longest waiting first, and says how many.
pub fn sched_wake(lot: &Lot, count: usize) -> usize {
    if lot.id.get() == NIL {
        return 0;
    }
    let wake = |core: &Core| core.with(|state| state.unpark(lot.id.get(), count));
    runtime::with_kernel(lot.kernel.get(), wake).unwrap_or(0)
}

/// `sched_wake` for one task. False if none waits.
#[inline]
pub(crate) fn wake_one(lot: &Lot) -> bool {
    if lot.id.get() == NIL {
        return false;
    }
    let wake = |core: &Core| core.with(|state| state.unpark_one(lot.id.get()));
    runtime::with_kernel(lot.kernel.get(), wake).unwrap_or(false)
}

/// Waits for the end of a task (in Curio a barrier on the task, here a trap).
///
/// Cancellation point: only if the task has not ended. If dropped, the wait is abandoned.
#[track_caller]
pub fn join_wait(task: &TaskRef) -> JoinWait {
    JoinWait(JoinPlace::new(task.body().clone(), Location::caller()))
}

/// Waits for the end of a task; made by [`join_wait`].
#[must_use = "a trap does nothing until it is awaited"]
pub struct JoinWait(JoinPlace<BodyRef>);

impl JoinWait {
    /// As [`SchedWait::called_at`].
    pub const fn called_at(mut self, at: &'static Location<'static>) -> Self {
        self.0.at = at;
        self
    }
}

impl std::fmt::Debug for JoinWait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinWait")
            .field("task", &self.0.body.id)
            .finish_non_exhaustive()
    }
}

impl Future for JoinWait {
    type Output = Result<(), Interrupt>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(cx)
    }
}

/// A place among those who wait for a task's end.
pub(crate) struct JoinPlace<B: Borrow<BodyRef>> {
    body: B,
    wait: Wait,
    at: &'static Location<'static>,
}

impl<B: Borrow<BodyRef>> JoinPlace<B> {
    pub(crate) const fn new(body: B, at: &'static Location<'static>) -> Self {
        Self {
            body,
            wait: Wait::IDLE,
            at,
        }
    }

    #[inline(always)]
    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Poll<Result<(), Interrupt>> {
        let body = self.body.borrow();
        if body.has_freed_joiners() {
            self.wait.forget();
            return Poll::Ready(Ok(()));
        }
        self.wait.poll_join(cx, body, self.at)
    }
}

impl<B: Borrow<BodyRef>> Drop for JoinPlace<B> {
    #[inline]
    fn drop(&mut self) {
        if !self.wait.is_armed() {
            return;
        }
        let body = self.body.borrow();
        if body.has_freed_joiners() {
            self.wait.forget();
        } else if self.wait.is_noted() {
            self.wait.drop_note(body);
        }
    }
}

/// Waits until no other task can run: each waits for a time, a descriptor, another task, an answer from elsewhere (Trio's
/// `wait_all_tasks_blocked`; Curio has no such trap). What is readable, due or answered by then goes first. Several that wait for it go on
/// together.
///
/// Cancellation point: yes. If dropped, the wait is abandoned.
#[track_caller]
pub const fn idle_wait() -> IdleWait {
    IdleWait {
        wait: Wait::IDLE,
        at: Location::caller(),
    }
}

/// Waits until no other task can run; made by [`idle_wait`].
#[derive(Debug)]
#[must_use = "a trap does nothing until it is awaited"]
pub struct IdleWait {
    wait: Wait,
    at: &'static Location<'static>,
}

impl Future for IdleWait {
    type Output = Result<(), Interrupt>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let fired = this.wait.poll(cx, |state| {
            let node = state.open_wait(WaitKind::Idle, 0, this.at)?;
            state.nodes.park(node, state.idle);
            Some(node)
        });
        fired.map_ok(|_| ())
    }
}

/// Trap `future_wait`: waits for an answer from elsewhere. `start` is called with the [`Completer`] once the wait is armed, so that no answer
/// can come too early; if an interrupt is pending it is not called at all.
///
/// Cancellation point: yes. If dropped, a later answer does nothing.
///
/// ```
/// use kernel::traps::future_wait;
///
/// # kernel::run(async {
/// // Somebody else's thread, with a callback.
/// fn ask(callback: impl FnOnce(u32) + Send + 'static) {
///     std::thread::spawn(move || callback(42));
/// }
///
/// let (sender, answer) = std::sync::mpsc::channel();
/// future_wait(|completer| {
///     ask(move |value| {
///         sender.send(value).unwrap();
///         completer.complete();
///     })
/// })
/// .await
/// .unwrap();
/// assert_eq!(answer.try_recv(), Ok(42));
/// # }).unwrap();
/// ```
#[track_caller]
pub fn future_wait<F: FnOnce(Completer)>(start: F) -> FutureWait<F> {
    FutureWait {
        start: Some(start),
        wait: Wait::IDLE,
        at: Location::caller(),
    }
}

/// Waits for a [`Completer`]; made by [`future_wait`].
#[derive(Debug)]
#[must_use = "a trap does nothing until it is awaited"]
pub struct FutureWait<F> {
    start: Option<F>,
    wait: Wait,
    at: &'static Location<'static>,
}

impl<F> FutureWait<F> {
    /// As [`SchedWait::called_at`].
    pub fn called_at(mut self, at: &'static Location<'static>) -> Self {
        self.at = at;
        self
    }
}

impl<F> Unpin for FutureWait<F> {}

impl<F: FnOnce(Completer)> Future for FutureWait<F> {
    type Output = Result<(), Interrupt>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let mut ticket = None;
        let fired = this.wait.poll(cx, |state| {
            assert!(this.start.is_some(), "polled after it was ready");
            let node = state.open_wait(WaitKind::Remote, 0, this.at)?;
            ticket = Some(state.arm_remote(node));
            Some(node)
        });
        if let (Some(ticket), Some(start)) = (ticket, this.start.take()) {
            start(Completer::new(running(Core::sender), ticket));
        }
        fired.map_ok(|_| ())
    }
}

/// A wait that only an interrupt ends: beside it stands a future that wakes the task by itself.
#[derive(Debug)]
pub(crate) struct ForeignWait {
    wait: Wait,
    pub(crate) at: &'static Location<'static>,
}

impl ForeignWait {
    #[track_caller]
    pub(crate) const fn new() -> Self {
        Self {
            wait: Wait::IDLE,
            at: Location::caller(),
        }
    }

    pub(crate) fn poll(&mut self, cx: &Context<'_>, kind: WaitKind) -> Poll<Interrupt> {
        match self
            .wait
            .poll(cx, |state| state.open_wait(kind, 0, self.at))
        {
            Poll::Ready(Err(interrupt)) => Poll::Ready(interrupt),
            Poll::Ready(Ok(_)) => unreachable!("nothing fires a foreign wait"),
            Poll::Pending => Poll::Pending,
        }
    }
}

pin_project! {
    /// A future whose waits are said to be where it was made; made by [`at_caller`].
    #[derive(Debug)]
    #[must_use = "a future does nothing until it is awaited"]
    pub struct AtCaller<F> {
        at: &'static Location<'static>,
        #[pin]
        future: F,
    }
}

/// Has the task dump say that a task which waits in `future` waits at the caller. For a primitive that makes several traps in an `async` block: where the block
/// was awaited is not known in there, so the traps would be said to be inside the primitive. Of several, one in the other, the outermost counts.
///
/// ```
/// use kernel::{Interrupt, sleep, spawn, wait_until_idle};
/// use std::{future::Future, time::Duration};
///
/// #[track_caller]
/// fn nap_twice() -> impl Future<Output = Result<(), Interrupt>> {
///     kernel::traps::at_caller(async {
///         sleep(Duration::from_secs(1)).await?;
///         sleep(Duration::from_secs(1)).await.map(drop)
///     })
/// }
///
/// # kernel::run(async {
/// let (task, here) = (spawn(async { nap_twice().await }), line!());
/// wait_until_idle().await.unwrap();
/// let (_, at) = task.info().unwrap().waits[0];
/// assert_eq!(at.line(), here);
/// # }).unwrap();
/// ```
#[track_caller]
pub const fn at_caller<F: Future>(future: F) -> AtCaller<F> {
    let at = Location::caller();
    AtCaller { at, future }
}

impl<F: Future> Future for AtCaller<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let _calling = Calling::from(this.at);
        this.future.poll(cx)
    }
}

/// While it lives, waits are said to be where the outermost call came from. Dropped, also by a panic, that is over.
struct Calling {
    is_outermost: bool,
}

impl Calling {
    fn from(at: &'static Location<'static>) -> Self {
        let enter = |core: &Core| core.with(|state| state.enter_call(at));
        Self {
            is_outermost: runtime::with_current(|core| core.is_some_and(enter)),
        }
    }
}

impl Drop for Calling {
    fn drop(&mut self) {
        if self.is_outermost {
            running(|core| core.with(State::leave_call));
        }
    }
}

/// Trap `read_wait`: waits until `fd` is readable, at its end, or broken. For descriptors that this crate has no type for: it asks the poller anew for every
/// wait, since it does not see what you read.
///
/// Cancellation point: yes. If dropped, the descriptor is unregistered.
///
/// # Errors
/// An [`Interrupt`]; [`ResourceBusy`] if another task waits for the same; the poller's error, such as `EPERM` for a plain file.
#[track_caller]
pub fn read_wait(fd: &impl AsFd) -> IoWait {
    IoWait::new(fd.as_fd().as_raw_fd(), Direction::Read)
}

/// Trap `write_wait`: waits until `fd` takes data, or is broken. As [`read_wait`] otherwise.
///
/// # Errors
/// As [`read_wait`].
#[track_caller]
pub fn write_wait(fd: &impl AsFd) -> IoWait {
    IoWait::new(fd.as_fd().as_raw_fd(), Direction::Write)
}

/// Waits for a bare descriptor; made by [`read_wait`] and [`write_wait`].
#[derive(Debug)]
#[must_use = "a trap does nothing until it is awaited"]
pub struct IoWait {
    fd: RawFd,
    direction: Direction,
    /// Once it is registered.
    readiness: Option<Rc<Readiness>>,
    wait: Wait,
    at: &'static Location<'static>,
}

impl IoWait {
    #[track_caller]
    fn new(fd: RawFd, direction: Direction) -> Self {
        Self {
            fd,
            direction,
            readiness: None,
            wait: Wait::IDLE,
            at: Location::caller(),
        }
    }
}

impl Future for IoWait {
    type Output = io::Result<()>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let readiness = match &this.readiness {
            Some(readiness) => readiness,
            None => this.readiness.insert(running(|core| {
                core.with(|state| {
                    assert!(state.current != NIL, "a trap was polled outside of a task");
                    if let Some(interrupt) = state.pending_interrupt() {
                        return Err(io::Error::from(interrupt));
                    }
                    let reactor = &mut state.reactor;
                    reactor.watch(core.serial, this.fd, this.direction)
                })
            })?),
        };
        let (direction, at) = (this.direction, this.at);
        let wait = this
            .wait
            .poll(cx, |state| state.open_io_wait(readiness, direction, at));
        if ready!(wait)? {
            Poll::Ready(Ok(()))
        } else {
            Poll::Ready(Err(closed()))
        }
    }
}

impl Drop for IoWait {
    fn drop(&mut self) {
        let Some(readiness) = &self.readiness else {
            return;
        };
        self.wait = Wait::IDLE;
        if let Some((kernel, source)) = readiness.at() {
            runtime::with_kernel(kernel, |core| core.with(|state| state.unwatch(source)));
        }
    }
}

fn closed() -> io::Error {
    io::Error::new(
        io::ErrorKind::NotConnected,
        "the source was closed while a task waited for it",
    )
}

/// Trap `io_release`: forgets `fd`, which must happen before it is closed. Whoever waits for it gets an error.
/// The types of this crate do it when they are dropped.
pub fn io_release(fd: &impl AsFd) {
    let fd = fd.as_fd().as_raw_fd();
    running(|core| {
        core.with(|state| {
            if let Some(source) = state.reactor.find(fd) {
                state.release_source(source);
            }
        });
    });
}

/// Trap `io_waiting`: which tasks wait to read from `fd` and to write to it.
#[must_use]
pub fn io_waiting(fd: &impl AsFd) -> (Option<TaskId>, Option<TaskId>) {
    let fd = fd.as_fd().as_raw_fd();
    running(|core| {
        core.with(|state| {
            let Some(source) = state.reactor.find(fd) else {
                return (None, None);
            };
            let [reader, writer] = state.reactor.waiters(source);
            (state.waiting_task(reader), state.waiting_task(writer))
        })
    })
}

/// A descriptor whose readiness the kernel remembers: what sockets are built on.
///
/// [`Source::ready_op`] runs a non-blocking system call whenever it may succeed and waits otherwise. All reading and writing of the
/// descriptor must go through it (or tell [`Source::clear_ready`]), or the memory is wrong.
///
/// Drop it before the descriptor is closed: put it first in your struct.
#[derive(Debug)]
pub struct Source {
    fd: RawFd,
    readiness: Rc<Readiness>,
}

impl Source {
    /// For a descriptor in non-blocking mode.
    #[must_use]
    pub fn new(fd: &impl AsFd) -> Self {
        Self {
            fd: fd.as_fd().as_raw_fd(),
            readiness: Rc::new(Readiness::unregistered()),
        }
    }

    /// Calls `op`, which makes a system call, until that does not answer `WouldBlock`, and waits in between.
    ///
    /// Cancellation point: only if it has to wait. If dropped, nothing is lost: `op` either ran to its end or did nothing.
    ///
    /// # Errors
    /// Those of `op`; an [`Interrupt`]; [`ResourceBusy`] if another task waits for the same direction; `NotConnected` if the source is released meanwhile.
    #[track_caller]
    pub fn ready_op<R, F: FnMut() -> io::Result<R>>(
        &self,
        direction: Direction,
        op: F,
    ) -> ReadyOp<'_, F> {
        ReadyOp {
            source: self,
            direction,
            op,
            place: IoPlace::new(),
        }
    }

    /// As [`ready_op`](Self::ready_op), for a method that polls, such as those of `AsyncRead`: what waits from one call to the next is `place`.
    ///
    /// Cancellation point: only if it has to wait. Whoever drops such a call half-way leaves the wait behind in `place`: until the next call, or until `place` is
    /// dropped, the source wakes the task for nothing, and an interrupt that comes meanwhile is the answer of the next call as well.
    ///
    /// # Errors
    /// As [`ready_op`](Self::ready_op).
    #[inline]
    pub fn poll_op<R>(
        &self,
        direction: Direction,
        place: &mut IoPlace,
        cx: &mut Context<'_>,
        mut op: impl FnMut() -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        if place.wait.is_armed() {
            ready!(place.poll_event(cx))?;
        } else if !self.readiness.is_ready(direction) && self.is_here() {
            return self.begin_wait(direction, place, cx);
        } else if !running(Core::spend) {
            return let_others_run(cx);
        }
        loop {
            match op() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    running(|core| self.exhausted(core, direction))?;
                    return self.begin_wait(direction, place, cx);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    /// Waits until the poller says that the next call may succeed.
    #[inline(always)]
    fn begin_wait<R>(
        &self,
        direction: Direction,
        place: &mut IoPlace,
        cx: &Context<'_>,
    ) -> Poll<io::Result<R>> {
        if self.readiness.waiter(direction) != NIL {
            let writing = direction == Direction::Write;
            return Poll::Ready(Err(ResourceBusy { writing }.into()));
        }
        let (readiness, at) = (&*self.readiness, place.at);
        let open = move |state: &mut State| state.open_io_wait(readiness, direction, at);
        match place.wait.arm(cx, false, open) {
            Ok(()) => Poll::Pending,
            Err(interrupt) => Poll::Ready(Err(interrupt.into())),
        }
    }

    /// Whether it is registered in the running kernel.
    fn is_here(&self) -> bool {
        let here = running(|core| core.serial);
        self.readiness
            .at()
            .is_some_and(|(kernel, _)| kernel == here)
    }

    /// Notes that the last call moved less than it could have: the next one would block, so wait before it.
    #[inline]
    pub fn clear_ready(&self, direction: Direction) {
        self.readiness.clear_ready(direction);
    }

    /// Forgets the descriptor, so that it can be used elsewhere or closed. Whoever waits for it gets an error.
    pub fn release(&self) {
        if let Some((kernel, source)) = self.readiness.at() {
            runtime::with_kernel(kernel, |core| {
                core.with(|state| state.release_source(source))
            });
        }
    }

    /// Has a kernel forget the descriptor, if it is another than the running one.
    pub(crate) fn move_here(&self) {
        if !self.is_here() {
            self.release();
        }
    }

    /// After a `WouldBlock`: registered, and known not to be ready.
    fn exhausted(&self, core: &Core, direction: Direction) -> io::Result<()> {
        core.with(|state| match self.readiness.at() {
            Some((kernel, id)) if kernel == core.serial => state.reactor.exhaust(id, direction),
            Some((kernel, _)) if runtime::exists(kernel) => Err(io::Error::other(
                "this source is registered in another kernel; release it there first",
            )),
            _ => {
                let (reactor, readiness) = (&mut state.reactor, Rc::clone(&self.readiness));
                reactor
                    .register(core.serial, self.fd, direction, readiness)
                    .map(drop)
            }
        })
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.release();
    }
}

/// Where [`Source::poll_op`] waits from one call to the next; one for each direction.
#[derive(Debug)]
pub struct IoPlace {
    wait: Wait,
    at: &'static Location<'static>,
}

impl IoPlace {
    /// Nothing waits here yet. The task dump says that the task waits at the caller.
    #[track_caller]
    #[must_use]
    pub const fn new() -> Self {
        Self {
            wait: Wait::IDLE,
            at: Location::caller(),
        }
    }

    /// Goes on with a wait.
    #[inline(always)]
    fn poll_event(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        match ready!(self.wait.poll_armed(cx))? {
            true => Poll::Ready(Ok(())),
            false => Poll::Ready(Err(closed())),
        }
    }
}

impl Default for IoPlace {
    #[track_caller]
    fn default() -> Self {
        Self::new()
    }
}

/// A system call that waits until it can be made; made by [`Source::ready_op`].
#[must_use = "a trap does nothing until it is awaited"]
pub struct ReadyOp<'a, F> {
    source: &'a Source,
    direction: Direction,
    op: F,
    place: IoPlace,
}

impl<F> ReadyOp<'_, F> {
    /// Where the task dump says that the task waits: at the caller of a primitive that makes several calls, not inside it.
    pub const fn called_at(mut self, at: &'static Location<'static>) -> Self {
        self.place.at = at;
        self
    }
}

impl<F> Unpin for ReadyOp<'_, F> {}

impl<F> std::fmt::Debug for ReadyOp<'_, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadyOp")
            .field("source", self.source)
            .field("direction", &self.direction)
            .finish_non_exhaustive()
    }
}

impl<R, F: FnMut() -> io::Result<R>> Future for ReadyOp<'_, F> {
    type Output = io::Result<R>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self {
            source,
            direction,
            op,
            place,
        } = self.get_mut();
        source.poll_op(*direction, place, cx, op)
    }
}

/// Counts one operation that completes without blocking; when the task has made 128 of them in one poll, lets the others run first.
/// Not a cancellation point.
pub fn poll_proceed(cx: &Context<'_>) -> Poll<()> {
    if running(Core::spend) {
        return Poll::Ready(());
    }
    let_others_run(cx)
}

#[cold]
fn let_others_run<T>(cx: &Context<'_>) -> Poll<T> {
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// Trap `set_timeout`: opens a timeout block in the running task, inside the blocks that are open now. The earliest deadline of
/// all of them is the one that fires.
///
/// A block covers what is polled through [`Timeout::poll`], not what runs beside it.
#[must_use]
pub fn set_timeout(deadline: Option<Instant>) -> Timeout {
    Timeout::open(|state| {
        let deadline = deadline.map(|at| state.ticks(at));
        state.open_block(deadline)
    })
}

/// A timeout block, or a shield; closed when it is dropped.
#[derive(Debug)]
pub struct Timeout {
    scope: u32,
    kernel: u32,
    _local: PhantomData<*const ()>,
}

/// What became of a timeout block; the answer of [`Timeout::unset`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expiry {
    /// The result of the body stands.
    Not,
    /// The deadline of this block interrupted the body: report [`Interrupt::TaskTimeout`].
    Own,
    /// The deadline of an enclosing block did: report [`Interrupt::TimeoutCancellation`]. It will fire again at the next blocking trap.
    Enclosing,
    /// The body reports a timeout that belongs to none of the open blocks: report [`Interrupt::UncaughtTimeout`].
    Uncaught,
}

impl Timeout {
    /// `open` makes the scope.
    pub(crate) fn open(open: impl FnOnce(&mut State) -> u32) -> Self {
        running(|core| Self {
            scope: core.with(open),
            kernel: core.serial,
            _local: PhantomData,
        })
    }

    /// As `open`, and goes inside.
    #[inline]
    pub(crate) fn open_and_enter(open: impl FnOnce(&mut State) -> u32) -> (Self, Inside) {
        let mut outer = NIL;
        let block = Self::open(|state| {
            let scope = open(state);
            outer = state.enter_scope(scope);
            scope
        });
        (block, Inside { outer })
    }

    /// Goes inside the block, until the answer is dropped.
    #[inline]
    pub(crate) fn enter(&self) -> Inside {
        running(|core| {
            assert!(
                self.kernel == core.serial,
                "a timeout block of one kernel was polled in another"
            );
            Inside {
                outer: core.with(|state| state.enter_scope(self.scope)),
            }
        })
    }

    /// Polls `future` inside the block.
    pub fn poll<F: Future + ?Sized>(
        &mut self,
        future: Pin<&mut F>,
        cx: &mut Context<'_>,
    ) -> Poll<F::Output> {
        let _inside = self.enter();
        future.poll(cx)
    }

    /// Trap `unset_timeout`: closes the block. `timed_out` says that the body ended with a timeout's interrupt.
    #[must_use]
    pub fn unset(self, timed_out: bool) -> Expiry {
        let verdict = runtime::with_kernel(self.kernel, |core| {
            core.with(|state| state.exit_timeout(self.scope, timed_out))
        });
        std::mem::forget(self);
        verdict.map_or(Expiry::Not, Expiry::from)
    }
}

impl Drop for Timeout {
    fn drop(&mut self) {
        runtime::with_kernel(self.kernel, |core| {
            core.with(|state| state.close_scope(self.scope))
        });
    }
}

impl From<Verdict> for Expiry {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Keep => Self::Not,
            Verdict::Expired => Self::Own,
            Verdict::Enclosing => Self::Enclosing,
            Verdict::Uncaught => Self::Uncaught,
        }
    }
}

/// While it lives, a timeout block or a shield is the current one of the running task. Dropped, also by a panic, the one around is.
#[must_use = "dropped, it leaves the block"]
pub(crate) struct Inside {
    outer: u32,
}

impl Inside {
    /// Leaves the block and closes it: [`Timeout::unset`], while still inside.
    #[inline]
    pub(crate) fn unset(self, block: Timeout, timed_out: bool) -> Expiry {
        let verdict = running(|core| {
            core.with(|state| {
                state.leave_scope(self.outer);
                state.exit_timeout(block.scope, timed_out)
            })
        });
        std::mem::forget((self, block));
        verdict.into()
    }
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        running(|core| core.with(|state| state.leave_scope(self.outer)));
    }
}
