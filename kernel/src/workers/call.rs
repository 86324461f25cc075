//! A call that some thread is to make, and a task waits for: what the pools, ours and yours, have in common.
//!
//! Caller and thread share the call by an `Arc`, and lead it from stage to stage:
//!
//! ```text
//!   Queued ── thread ──▶ Running ── thread ──▶ Done ── caller ──▶ Over
//!     │                     │
//!     └──── either ─▶ Over  └─── caller ──▶ Zombie
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::traps::{Completer, Ring};

/// A call as the threads see it.
pub(super) trait Job: Send + Sync {
    /// Makes the call, unless it was abandoned.
    fn run(&self) -> End;
}

/// How a call ended.
pub(super) enum End {
    /// It was abandoned before it began.
    Unmade,
    /// The caller has its answer, but sleeps, it may be.
    Answered(Option<Ring>),
    /// The caller went away meanwhile, and the thread does not belong to the pool any more.
    Zombie,
}

pub(super) struct Call<F, T>(Mutex<Stage<F, T>>);

enum Stage<F, T> {
    Queued(F, Completer),
    Running,
    /// Abandoned while it ran.
    Zombie,
    Done(thread::Result<T>),
    /// Abandoned before it began, dropped by its pool, or its value was taken.
    Over,
}

impl<F, T> Call<F, T> {
    pub(super) const fn new(call: F, completer: Completer) -> Self {
        Self(Mutex::new(Stage::Queued(call, completer)))
    }

    /// The value, after the completer has answered; `None` if the call was dropped without being made.
    pub(super) fn take(&self) -> Option<thread::Result<T>> {
        match std::mem::replace(&mut *self.stage(), Stage::Over) {
            Stage::Done(outcome) => Some(outcome),
            Stage::Queued(..) | Stage::Running | Stage::Zombie | Stage::Over => None,
        }
    }

    /// The caller goes away, or the pool drops the call without making it. True: it runs, and will to its end.
    pub(super) fn abandon(&self) -> bool {
        let mut stage = self.stage();
        let next = match *stage {
            Stage::Running => Stage::Zombie,
            Stage::Queued(..) | Stage::Zombie | Stage::Done(_) | Stage::Over => Stage::Over,
        };
        let last = std::mem::replace(&mut *stage, next);
        drop(stage);
        // What the closure captured, or a value that came too late, is dropped here, without the lock.
        matches!(last, Stage::Running)
    }

    fn stage(&self) -> MutexGuard<'_, Stage<F, T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: FnOnce() -> T + Send, T: Send + 'static> Job for Call<F, T> {
    fn run(&self) -> End {
        let mut stage = self.stage();
        let (call, completer) = match std::mem::replace(&mut *stage, Stage::Running) {
            Stage::Queued(call, completer) => (call, completer),
            last @ (Stage::Running | Stage::Zombie | Stage::Done(_) | Stage::Over) => {
                *stage = last;
                return End::Unmade;
            }
        };
        drop(stage);
        let outcome = catch_unwind(AssertUnwindSafe(call));
        let mut stage = self.stage();
        if let Stage::Running = *stage {
            *stage = Stage::Done(outcome);
            drop(stage);
            return End::Answered(completer.complete_on_credit());
        }
        drop(stage);
        if let Err(payload) = &outcome {
            log::warn!(
                "an abandoned call in a thread panicked: {}",
                crate::error::panic_text(payload.as_ref())
            );
        }
        discard(outcome);
        End::Zombie
    }
}

/// Drops a value that may panic in doing so: not even that ends a thread of the pool.
fn discard<T>(value: T) {
    if catch_unwind(AssertUnwindSafe(|| drop(value))).is_err() {
        log::warn!("dropping the value of an abandoned call panicked");
    }
}
