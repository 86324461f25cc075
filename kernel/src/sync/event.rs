//! A flag that tasks wait for.

use std::cell::Cell;
use std::future::Future;
use std::panic::Location;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use crate::error::Interrupt;
use crate::runtime::WaitKind;
use crate::traps::{Lot, SchedWait, poll_proceed, sched_wait, sched_wake};

/// A flag that any number of tasks can wait for (Curio's `Event`).
///
/// ```
/// use std::rc::Rc;
/// use kernel::sync::Event;
///
/// # kernel::run(async {
/// let ready = Rc::new(Event::new());
/// let task = kernel::spawn({
///     let ready = ready.clone();
///     async move { ready.wait().await }
/// });
/// ready.set();
/// task.join().await.unwrap().unwrap();
/// # }).unwrap();
/// ```
#[derive(Debug, Default)]
pub struct Event {
    is_set: Cell<bool>,
    lot: Lot,
}

impl Event {
    /// An event that is not set.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            is_set: Cell::new(false),
            lot: Lot::new(),
        }
    }

    /// Sets it and wakes all who wait. Who was woken goes on even if the event is cleared before it runs.
    pub fn set(&self) {
        if !self.is_set.replace(true) {
            sched_wake(&self.lot, usize::MAX);
        }
    }

    /// Resets it: who comes now waits.
    pub fn clear(&self) {
        self.is_set.set(false);
    }

    /// Whether it is set.
    #[must_use]
    pub const fn is_set(&self) -> bool {
        self.is_set.get()
    }

    /// Waits until it is set.
    ///
    /// Cancellation point: only if it has to wait. If dropped, nothing is lost.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn wait(&self) -> EventWait<'_> {
        EventWait {
            event: self,
            wait: sched_wait(&self.lot, WaitKind::Event),
        }
    }
}

/// Waits for an event; made by [`Event::wait`].
#[derive(Debug)]
#[must_use = "a future does nothing until it is awaited"]
pub struct EventWait<'a> {
    event: &'a Event,
    wait: SchedWait<'a>,
}

impl EventWait<'_> {
    /// Where the task dump says that the task waits: at the caller of a primitive that awaits this in its turn, not inside it.
    pub fn called_at(mut self, at: &'static Location<'static>) -> Self {
        self.wait = self.wait.called_at(at);
        self
    }
}

impl Future for EventWait<'_> {
    type Output = Result<(), Interrupt>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.event.is_set() && !self.wait.is_waiting() {
            ready!(poll_proceed(cx));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.wait).poll(cx)
    }
}
