//! Synchronisation across threads: for tasks of any kernel and for threads that run none.

use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Interrupt;
use crate::traps::{Completer, future_wait, poll_proceed};

/// A flag that tasks of several kernels, and other threads, set and wait for (Curio's `UniversalEvent`). Clones are the same event.
///
/// ```
/// use kernel::sync::UniversalEvent;
///
/// let ready = UniversalEvent::new();
/// let setter = ready.clone();
/// std::thread::spawn(move || setter.set());
/// kernel::run(async { ready.wait().await }).unwrap().unwrap();
/// ```
#[derive(Clone, Default)]
pub struct UniversalEvent {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    threads: Condvar,
}

#[derive(Default)]
struct State {
    is_set: bool,
    /// How often it was set: threads that slept through a `set` and a `clear` go on by this.
    sets: u64,
    /// The tasks that wait, by ticket.
    tasks: Vec<(u64, Completer)>,
    last_ticket: u64,
}

impl UniversalEvent {
    /// An event that is not set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets it and wakes all who wait. Who was woken goes on even if the event is cleared before it runs.
    pub fn set(&self) {
        let mut state = self.shared.lock();
        if state.is_set {
            return;
        }
        state.is_set = true;
        state.sets += 1;
        let tasks = std::mem::take(&mut state.tasks);
        drop(state);
        self.shared.threads.notify_all();
        drop(tasks); // dropping a completer answers its wait
    }

    /// Resets it: who comes now waits.
    pub fn clear(&self) {
        self.shared.lock().is_set = false;
    }

    /// Whether it is set.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.shared.lock().is_set
    }

    /// Waits, in a task, until it is set.
    ///
    /// Cancellation point: only if it has to wait. If dropped, nothing is lost.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn wait(&self) -> impl Future<Output = Result<(), Interrupt>> + use<> {
        let shared = Arc::clone(&self.shared);
        let ticket = shared.ticket();
        let waiter = Waiter {
            shared: Arc::clone(&self.shared),
            ticket,
        };
        // Made here, not in the block below, for the caller's location.
        let wait = future_wait(move |completer| {
            let mut state = shared.lock();
            if !state.is_set {
                state.tasks.push((ticket, completer));
            }
        });
        async move {
            if waiter.shared.lock().is_set {
                poll_fn(|cx| poll_proceed(cx)).await;
                return Ok(());
            }
            let answer = wait.await;
            drop(waiter);
            answer
        }
    }

    /// Waits, in a thread that runs no kernel, until it is set; for at most `timeout`, if there is one. False if it was not.
    ///
    /// In a task this would stop the whole kernel: use [`wait`](UniversalEvent::wait) there.
    pub fn wait_blocking(&self, timeout: Option<Duration>) -> bool {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.shared.lock();
        let sets = state.sets;
        while !state.is_set && state.sets == sets {
            let threads = &self.shared.threads;
            let Some(deadline) = deadline else {
                state = threads.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let woken = threads.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl fmt::Debug for UniversalEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UniversalEvent")
            .field("is_set", &self.is_set())
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn ticket(&self) -> u64 {
        let mut state = self.lock();
        state.last_ticket += 1;
        state.last_ticket
    }

    /// Nothing that runs under the lock leaves the state half changed, so poison is no reason to stop.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A task's place among those who wait; given up when it is dropped.
struct Waiter {
    shared: Arc<Shared>,
    ticket: u64,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let place = state.tasks.iter().position(|(id, _)| *id == self.ticket);
        let completer = place.map(|place| state.tasks.swap_remove(place));
        drop(state);
        drop(completer); // too late to matter, but it takes the inbox's lock
    }
}
