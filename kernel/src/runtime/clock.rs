//! Where the kernel gets its time from.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// The kernel's source of time. It is asked while the kernel's tables are in use, so it must not use traps.
pub trait Clock {
    /// The time, never less than it was before.
    fn now(&self) -> Instant;

    /// Whether [`advance_to`](Clock::advance_to) may move the time. Only then is it called, and only then is I/O looked at once
    /// more before it.
    fn is_virtual(&self) -> bool {
        false
    }

    /// Called when every task waits and `deadline` is the next thing due. A clock that can jump there does so and returns
    /// true; the default waits for real time to pass.
    fn advance_to(&self, deadline: Instant) -> bool {
        let _ = deadline;
        false
    }
}

/// The operating system's monotonic clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// A clock for tests: it stands still while tasks run and jumps to the next deadline when all of them wait, so that an hour
/// of sleeping takes no time and every run takes the same course.
///
/// Clones show the same time. Other threads run in real time: while a task waits in [`future_wait`](crate::traps::future_wait) for one, the
/// clock follows real time instead of jumping. It does jump while tasks wait for I/O, unless something is ready at that moment.
#[derive(Clone, Debug)]
pub struct VirtualClock {
    start: Instant,
    elapsed: Rc<Cell<Duration>>,
}

impl VirtualClock {
    /// A clock that stands at the present.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            elapsed: Rc::default(),
        }
    }

    /// Moves the time forward.
    pub fn advance(&self, by: Duration) {
        self.elapsed.set(self.elapsed.get() + by);
    }

    /// How far it has moved since it was made.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.elapsed.get()
    }
}

impl Default for VirtualClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Instant {
        self.start + self.elapsed.get()
    }

    fn is_virtual(&self) -> bool {
        true
    }

    fn advance_to(&self, deadline: Instant) -> bool {
        self.elapsed
            .set(self.elapsed.get().max(deadline - self.start));
        true
    }
}
