//! One value, from the task that works it out to the one that waits for it.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use crate::error::{Interrupt, MaybeInterrupt};
use crate::sync::{Event, EventWait};

/// A value that will come (Curio's `Result`). Whoever holds the [`Promise`] owes it; if that is dropped unkept, the wait
/// ends with [`Broken::Promise`], so that nobody waits for an answer that cannot come any more.
///
/// ```
/// use kernel::sync::promise;
///
/// # kernel::run(async {
/// let (promise, mut promised) = promise();
/// kernel::spawn(async move { promise.keep(42) });
/// assert_eq!(promised.wait().await.unwrap(), 42);
/// # }).unwrap();
/// ```
pub fn promise<T>() -> (Promise<T>, Promised<T>) {
    let shared = Rc::new(Shared {
        value: RefCell::new(None),
        settled: Event::new(),
        listened: Cell::new(true),
    });
    (
        Promise {
            shared: Rc::clone(&shared),
        },
        Promised { shared },
    )
}

#[derive(Debug)]
struct Shared<T> {
    value: RefCell<Option<T>>,
    /// Kept or broken.
    settled: Event,
    /// Whether anybody still wants the value.
    listened: Cell<bool>,
}

/// The side that owes the value.
#[derive(Debug)]
#[must_use = "dropping a promise breaks it"]
pub struct Promise<T> {
    shared: Rc<Shared<T>>,
}

impl<T> Promise<T> {
    /// Gives the value.
    ///
    /// # Errors
    /// The value, if nobody waits for it any more.
    pub fn keep(self, value: T) -> Result<(), T> {
        if !self.is_wanted() {
            return Err(value);
        }
        *self.shared.value.borrow_mut() = Some(value);
        Ok(()) // dropping `self` wakes the other side
    }

    /// Whether somebody still waits, or may come to wait.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.shared.listened.get()
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        self.shared.settled.set();
    }
}

/// The side that waits. If dropped, the value is dropped when it comes.
#[derive(Debug)]
pub struct Promised<T> {
    shared: Rc<Shared<T>>,
}

impl<T> Promised<T> {
    /// Waits for the value and takes it.
    ///
    /// Cancellation point: only if the value is not there. If dropped or interrupted, nothing is lost: wait again.
    ///
    /// # Errors
    /// [`Broken::Promise`] if it cannot come any more (or was taken already), [`Broken::Interrupted`] with an [`Interrupt`].
    #[track_caller]
    pub fn wait(&mut self) -> PromisedWait<'_, T> {
        PromisedWait {
            value: &self.shared.value,
            settled: self.shared.settled.wait(),
        }
    }

    /// The value, if it is there.
    #[must_use]
    pub fn try_take(&mut self) -> Option<T> {
        self.shared.value.take()
    }
}

impl<T> Drop for Promised<T> {
    fn drop(&mut self) {
        self.shared.listened.set(false);
        drop(self.shared.value.take());
    }
}

/// Waits for a promise to be kept; made by [`Promised::wait`].
#[derive(Debug)]
#[must_use = "a future does nothing until it is awaited"]
pub struct PromisedWait<'a, T> {
    value: &'a RefCell<Option<T>>,
    settled: EventWait<'a>,
}

impl<T> Future for PromisedWait<'_, T> {
    type Output = Result<T, Broken>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        ready!(Pin::new(&mut self.settled).poll(cx))?;
        Poll::Ready(self.value.take().ok_or(Broken::Promise))
    }
}

/// Why a promised value was not got.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Broken {
    /// The promise was dropped unkept, or its value was taken before.
    #[error("the promised value cannot come any more")]
    Promise,
    /// The waiting task was interrupted; the promise stands.
    #[error("{0}")]
    Interrupted(#[from] Interrupt),
}

impl MaybeInterrupt for Broken {
    fn interrupt(&self) -> Option<&Interrupt> {
        match self {
            Self::Interrupted(interrupt) => Some(interrupt),
            Self::Promise => None,
        }
    }
}
