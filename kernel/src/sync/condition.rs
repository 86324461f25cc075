//! Waiting, with a lock, for something to change.

use std::future::{Future, poll_fn};
use std::task::{Context, Poll};

use super::lock::LockGuard;
use super::{Line, Place};
use crate::cancel::shield;
use crate::error::Interrupt;
use crate::runtime::WaitKind;
use crate::traps::at_caller;

/// Tasks that hold a [`Lock`](super::Lock) let go of it here until another task says that something has changed (Curio's
/// `Condition`). That one need not hold the lock.
///
/// ```
/// use std::rc::Rc;
/// use kernel::sync::{Condition, Lock};
///
/// # kernel::run(async {
/// let shared = Rc::new((Lock::new(0), Condition::new()));
/// kernel::spawn({
///     let shared = shared.clone();
///     async move {
///         *shared.0.acquire().await? = 5;
///         shared.1.notify_all();
///         Ok::<_, kernel::Interrupt>(())
///     }
/// });
/// let mut number = shared.0.acquire().await?;
/// shared.1.wait_for(&mut number, |number| *number > 3).await?;
/// assert_eq!(*number, 5);
/// # Ok::<(), kernel::Interrupt>(())
/// # }).unwrap().unwrap();
/// ```
#[derive(Debug, Default)]
pub struct Condition {
    line: Line,
}

impl Condition {
    /// A condition that nobody waits for.
    #[must_use]
    pub const fn new() -> Self {
        Self { line: Line::new() }
    }

    /// Lets go of the lock, waits to be notified, and waits for the lock.
    ///
    /// Cancellation point: yes, but only in its first part: the lock is taken again in any case, however long that lasts. If dropped,
    /// the guard may be [without the lock](LockGuard::is_held); a notification that it had is handed on.
    ///
    /// # Errors
    /// An [`Interrupt`]; the lock is held then as well.
    ///
    /// # Panics
    /// If the guard is without the lock already. The guard is the argument, so that nobody waits without the lock:
    ///
    /// ```compile_fail,E0308
    /// # async fn waits() {
    /// let (lock, condition) = (kernel::sync::Lock::new(0), kernel::sync::Condition::new());
    /// condition.wait(&lock).await.unwrap();
    /// # }
    /// ```
    #[track_caller]
    pub fn wait<T>(
        &self,
        guard: &mut LockGuard<'_, T>,
    ) -> impl Future<Output = Result<(), Interrupt>> {
        guard.assert_held();
        // Both are made here, not in the block below, for the caller's location.
        let again = guard.acquire_again();
        let mut waiter = Waiter {
            place: self.line.place(WaitKind::Condition),
            is_notified: false,
        };
        async move {
            guard.let_go();
            let outcome = poll_fn(|cx| waiter.poll(cx)).await;
            *guard = shield(again)
                .await
                .expect("a shielded wait is not interrupted");
            waiter.tell();
            outcome
        }
    }

    /// Waits, as [`wait`](Condition::wait) does, until `holds` is true of the locked value; it is asked first of all.
    ///
    /// # Errors
    /// An [`Interrupt`]; the lock is held then as well.
    #[track_caller]
    pub fn wait_for<T>(
        &self,
        guard: &mut LockGuard<'_, T>,
        mut holds: impl FnMut(&mut T) -> bool,
    ) -> impl Future<Output = Result<(), Interrupt>> {
        at_caller(async move {
            while !holds(guard) {
                self.wait(guard).await?;
            }
            Ok(())
        })
    }

    /// Wakes up to `count` tasks, the longest waiting first, and says how many.
    pub fn notify(&self, count: usize) -> usize {
        (0..count).take_while(|_| self.line.grant()).count()
    }

    /// Wakes all that wait.
    pub fn notify_all(&self) {
        self.notify(usize::MAX);
    }
}

struct Waiter<'a> {
    place: Place<'a>,
    /// It was notified, and its task knows nothing of it yet.
    is_notified: bool,
}

impl Waiter<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Interrupt>> {
        let answer = self.place.poll(cx);
        self.is_notified = matches!(answer, Poll::Ready(Ok(())));
        answer
    }

    /// Its task goes on and sees the change for itself.
    const fn tell(&mut self) {
        self.is_notified = false;
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if self.place.leave() || self.is_notified {
            self.place.line.grant();
        }
    }
}
