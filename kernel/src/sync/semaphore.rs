//! Permits, of which there are only so many.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::{Line, Place};
use crate::error::Interrupt;
use crate::runtime::WaitKind;
use crate::traps::poll_proceed;

/// A number of permits (Curio's `Semaphore`). A permit that is given back goes to the task that waits longest.
///
/// ```
/// use kernel::sync::Semaphore;
///
/// # kernel::run(async {
/// let connections = Semaphore::new(10);
/// let permit = connections.acquire().await?;
/// assert_eq!(connections.value(), 9);
/// drop(permit);
/// assert_eq!(connections.value(), 10);
/// # Ok::<(), kernel::Interrupt>(())
/// # }).unwrap().unwrap();
/// ```
#[derive(Debug)]
pub struct Semaphore {
    permits: Cell<usize>,
    /// How many were forgotten, and not given back by hand since.
    forgotten: Cell<usize>,
    line: Line,
}

impl Semaphore {
    /// A semaphore with `permits` permits; 0 is allowed, see [`release`](Semaphore::release).
    #[must_use]
    pub const fn new(permits: usize) -> Self {
        Self {
            permits: Cell::new(permits),
            forgotten: Cell::new(0),
            line: Line::new(),
        }
    }

    /// Waits for a permit; dropping it gives it back.
    ///
    /// Cancellation point: only if it has to wait. If dropped, no permit is lost.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn acquire(&self) -> SemaphoreAcquire<'_> {
        SemaphoreAcquire {
            semaphore: self,
            place: self.line.place(WaitKind::Semaphore),
        }
    }

    /// A permit, if one is free.
    pub fn try_acquire(&self) -> Option<Permit<'_>> {
        self.take().then_some(Permit { semaphore: self })
    }

    /// Adds a permit, be it new or that of a [forgotten](Permit::forget) one.
    pub fn release(&self) {
        if !self.line.grant() {
            self.permits.set(self.permits.get() + 1);
        }
    }

    /// How many permits are free.
    #[must_use]
    pub const fn value(&self) -> usize {
        self.permits.get()
    }

    /// Whether no permit is free.
    #[must_use]
    pub const fn is_locked(&self) -> bool {
        self.value() == 0
    }

    fn take(&self) -> bool {
        let left = self.permits.get().checked_sub(1);
        left.inspect(|&left| self.permits.set(left)).is_some()
    }
}

/// A permit of a [`Semaphore`]; given back when it is dropped.
#[derive(Debug)]
#[must_use = "dropping a permit gives it back"]
pub struct Permit<'a> {
    semaphore: &'a Semaphore,
}

impl Permit<'_> {
    /// Does not give it back: there is one less from now on, until somebody calls [`Semaphore::release`].
    pub fn forget(self) {
        let forgotten = &self.semaphore.forgotten;
        forgotten.set(forgotten.get() + 1);
        std::mem::forget(self);
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.semaphore.release();
    }
}

/// Waits for a permit; made by [`Semaphore::acquire`].
#[derive(Debug)]
#[must_use = "a future does nothing until it is awaited"]
pub struct SemaphoreAcquire<'a> {
    semaphore: &'a Semaphore,
    place: Place<'a>,
}

impl<'a> Future for SemaphoreAcquire<'a> {
    type Output = Result<Permit<'a>, Interrupt>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if !self.place.is_waiting() && !self.semaphore.is_locked() {
            ready!(poll_proceed(cx));
            self.semaphore.take();
        } else {
            ready!(self.place.poll(cx))?;
        }
        let semaphore = self.semaphore;
        Poll::Ready(Ok(Permit { semaphore }))
    }
}

impl Drop for SemaphoreAcquire<'_> {
    fn drop(&mut self) {
        if self.place.leave() {
            self.semaphore.release();
        }
    }
}

/// A semaphore that never has more permits than it began with (Curio's `BoundedSemaphore`).
#[derive(Debug)]
pub struct BoundedSemaphore {
    semaphore: Semaphore,
    limit: usize,
}

impl BoundedSemaphore {
    /// A semaphore with `permits` permits.
    #[must_use]
    pub const fn new(permits: usize) -> Self {
        Self {
            semaphore: Semaphore::new(permits),
            limit: permits,
        }
    }

    /// Gives back a [forgotten](Permit::forget) permit; a [`Permit`] gives itself back.
    ///
    /// # Errors
    /// [`TooManyPermits`] if none was forgotten: each is free, or somebody has it.
    pub fn release(&self) -> Result<(), TooManyPermits> {
        let Some(forgotten) = self.semaphore.forgotten.get().checked_sub(1) else {
            return Err(TooManyPermits { limit: self.limit });
        };
        self.semaphore.forgotten.set(forgotten);
        self.semaphore.release();
        Ok(())
    }

    /// As [`Semaphore::acquire`].
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn acquire(&self) -> SemaphoreAcquire<'_> {
        self.semaphore.acquire()
    }

    /// As [`Semaphore::try_acquire`].
    pub fn try_acquire(&self) -> Option<Permit<'_>> {
        self.semaphore.try_acquire()
    }

    /// How many permits are free.
    #[must_use]
    pub const fn value(&self) -> usize {
        self.semaphore.value()
    }

    /// Whether no permit is free.
    #[must_use]
    pub const fn is_locked(&self) -> bool {
        self.semaphore.is_locked()
    }
}

/// A bounded semaphore was given back more than was taken from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a semaphore of {limit} permits was released once too often")]
pub struct TooManyPermits {
    /// How many it has.
    pub limit: usize,
}
