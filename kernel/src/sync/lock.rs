//! Locks, for what must not change while a task waits for something else.
//!
//! Between two awaits a task is alone anyway; a lock is for invariants that must hold across them.

use std::cell::{Cell, RefCell, RefMut};
use std::fmt;
use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::{Line, Place, decrement};
use crate::error::Interrupt;
use crate::runtime::WaitKind;
use crate::task::TaskRef;
use crate::traps::{call, poll_proceed};

/// A lock round a value, or round nothing (Curio's `Lock`). It is handed over directly: when the holder lets go, the
/// task that waits longest has it, before that task has even run.
///
/// ```
/// use kernel::sync::Lock;
///
/// # kernel::run(async {
/// let log = Lock::new(Vec::new());
/// log.acquire().await?.push("one line");
/// assert_eq!(log.into_inner(), ["one line"]);
/// # Ok::<(), kernel::Interrupt>(())
/// # }).unwrap().unwrap();
/// ```
pub struct Lock<T = ()> {
    locked: Cell<bool>,
    line: Line,
    /// Borrowed by the holder alone.
    value: RefCell<T>,
}

impl<T> Lock<T> {
    /// A lock that nobody holds.
    #[must_use]
    pub const fn new(value: T) -> Self {
        Self {
            locked: Cell::new(false),
            line: Line::new(),
            value: RefCell::new(value),
        }
    }

    /// Waits for the lock; dropping the guard lets go of it. A task that holds it already waits for ever; see [`RLock`].
    ///
    /// Cancellation point: only if it has to wait. A cancellation that comes after the hand-over does not take it
    /// back. If dropped, the next one gets it.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn acquire(&self) -> LockAcquire<'_, T> {
        LockAcquire {
            lock: self,
            place: self.line.place(WaitKind::Lock),
        }
    }

    /// The lock, if it is free.
    pub fn try_acquire(&self) -> Option<LockGuard<'_, T>> {
        (!self.locked.replace(true)).then(|| self.guard())
    }

    /// Whether a task holds it.
    #[must_use]
    pub const fn is_locked(&self) -> bool {
        self.locked.get()
    }

    /// The value; nobody can hold the lock now.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    /// Takes the value out.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }

    fn guard(&self) -> LockGuard<'_, T> {
        LockGuard {
            lock: self,
            value: Some(self.value.borrow_mut()),
        }
    }

    fn release(&self) {
        if !self.line.grant() {
            self.locked.set(false);
        }
    }
}

impl<T: Default> Default for Lock<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> fmt::Debug for Lock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lock")
            .field("locked", &self.locked.get())
            .finish_non_exhaustive()
    }
}

/// A held [`Lock`]: leads to its value, lets go when it is dropped.
#[must_use = "dropping a guard lets go of the lock"]
pub struct LockGuard<'a, T = ()> {
    lock: &'a Lock<T>,
    /// `None` while a [`Condition`](super::Condition) has let go of the lock.
    value: Option<RefMut<'a, T>>,
}

impl<'a, T> LockGuard<'a, T> {
    /// Whether it still has the lock: false only after a [`Condition::wait`](super::Condition::wait) with it was dropped half-way.
    #[must_use]
    pub const fn is_held(&self) -> bool {
        self.value.is_some()
    }

    #[track_caller]
    pub(super) fn assert_held(&self) {
        assert!(self.is_held(), "{UNHELD}");
    }

    pub(super) fn let_go(&mut self) {
        if self.value.take().is_some() {
            self.lock.release();
        }
    }

    /// Waits for the lock again.
    #[track_caller]
    pub(super) fn acquire_again(&self) -> LockAcquire<'a, T> {
        self.lock.acquire()
    }
}

const UNHELD: &str =
    "the lock of this guard was let go by a condition's wait that was dropped before it ended";

impl<T> Deref for LockGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.value.as_deref().expect(UNHELD)
    }
}

impl<T> DerefMut for LockGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_deref_mut().expect(UNHELD)
    }
}

impl<T> Drop for LockGuard<'_, T> {
    fn drop(&mut self) {
        self.let_go();
    }
}

impl<T> fmt::Debug for LockGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("is_held", &self.is_held())
            .finish_non_exhaustive()
    }
}

/// Waits for a lock; made by [`Lock::acquire`].
#[must_use = "a future does nothing until it is awaited"]
pub struct LockAcquire<'a, T = ()> {
    lock: &'a Lock<T>,
    place: Place<'a>,
}

impl<'a, T> Future for LockAcquire<'a, T> {
    type Output = Result<LockGuard<'a, T>, Interrupt>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if !self.place.is_waiting() && !self.lock.is_locked() {
            ready!(poll_proceed(cx));
            self.lock.locked.set(true);
        } else {
            ready!(self.place.poll(cx))?;
        }
        let lock = self.lock;
        Poll::Ready(Ok(lock.guard()))
    }
}

impl<T> Drop for LockAcquire<'_, T> {
    fn drop(&mut self) {
        if self.place.leave() {
            self.lock.release();
        }
    }
}

impl<T> fmt::Debug for LockAcquire<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockAcquire").finish_non_exhaustive()
    }
}

/// A lock that the task which holds it can take again (Curio's `RLock`). It guards no value: two guards would both lead to it.
///
/// Only its guards let go of it, and only [`acquire`](Self::acquire) makes them, so a task that does not hold it has nothing to release it with:
///
/// ```compile_fail,E0624
/// kernel::sync::RLock::new().release();
/// ```
/// ```compile_fail,E0451
/// let lock = kernel::sync::RLock::new();
/// drop(kernel::sync::RLockGuard { lock: &lock });
/// ```
#[derive(Debug, Default)]
pub struct RLock {
    /// How many guards there are.
    depth: Cell<usize>,
    /// Who holds it; `None` also between a hand-over and the poll that sees it.
    owner: RefCell<Option<TaskRef>>,
    line: Line,
}

impl RLock {
    /// A lock that nobody holds.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            depth: Cell::new(0),
            owner: RefCell::new(None),
            line: Line::new(),
        }
    }

    /// Waits for the lock, unless this task holds it already. It is free again when all guards are dropped, by whichever task.
    ///
    /// Cancellation point: only if it has to wait. If dropped, the next one gets it.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn acquire(&self) -> RLockAcquire<'_> {
        RLockAcquire {
            lock: self,
            place: self.line.place(WaitKind::Lock),
        }
    }

    /// Whether a task holds it.
    #[must_use]
    pub const fn is_locked(&self) -> bool {
        self.depth.get() > 0
    }

    fn is_mine(&self) -> bool {
        let owner = self.owner.borrow();
        owner.is_some() && *owner == call::try_current()
    }

    fn release(&self) {
        if self.depth.get() > 1 {
            decrement(&self.depth);
            return;
        }
        self.owner.take();
        if !self.line.grant() {
            decrement(&self.depth);
        }
    }
}

/// A held [`RLock`]; lets go, of one level, when it is dropped.
#[derive(Debug)]
#[must_use = "dropping a guard lets go of the lock"]
pub struct RLockGuard<'a> {
    lock: &'a RLock,
}

impl Drop for RLockGuard<'_> {
    fn drop(&mut self) {
        self.lock.release();
    }
}

/// Waits for a lock; made by [`RLock::acquire`].
#[derive(Debug)]
#[must_use = "a future does nothing until it is awaited"]
pub struct RLockAcquire<'a> {
    lock: &'a RLock,
    place: Place<'a>,
}

impl<'a> Future for RLockAcquire<'a> {
    type Output = Result<RLockGuard<'a>, Interrupt>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let lock = self.lock;
        if !self.place.is_waiting() && (!lock.is_locked() || lock.is_mine()) {
            ready!(poll_proceed(cx));
            lock.depth.set(lock.depth.get() + 1);
        } else {
            ready!(self.place.poll(cx))?; // the depth of 1 was handed over
        }
        *lock.owner.borrow_mut() = call::try_current();
        Poll::Ready(Ok(RLockGuard { lock }))
    }
}

impl Drop for RLockAcquire<'_> {
    fn drop(&mut self) {
        if self.place.leave() {
            self.lock.release();
        }
    }
}
