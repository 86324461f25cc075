//! A call that some thread is to make, and a task waits for: what the pools, ours and yours, have in common.
//!
//! Caller and thread share the call by an `Arc`, and lead it from stage to stage:
//!
//! ```text
//!     ┌──────────── pool: no thread ───────────┐
//!     │                                        ▼
//!   Queued ── thread ──▶ Running ── thread ──▶ Done ── caller ──▶ Over
//!     │                     │
//!     └──── either ─▶ Over  └─── caller ──▶ Zombie
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::thread;

use crate::error::{drop_quietly, panic_text};
use crate::primitives::{Mutex, MutexGuard};
use crate::traps::{Completer, Ring};

/// A call as the threads see it. `R` wakes its caller's kernel, when dropped.
pub(super) trait Job<R>: Send + Sync {
    /// Makes the call, unless it was abandoned.
    fn run(&self) -> End<R>;

    /// Answers the caller with a panic that says why the call is not made.
    fn refuse(&self, why: &str);
}

/// How a call ended.
pub(super) enum End<R> {
    /// It was abandoned before it began.
    Unmade,
    /// The caller has its answer, but sleeps, it may be.
    Answered(Option<R>),
    /// The caller went away meanwhile, and the thread does not belong to the pool any more.
    Zombie,
}

/// Where the caller waits. Dropping it answers too.
pub(super) trait Answer: Send {
    type Ring;

    /// Answers; the ring, if there is one, wakes the caller's kernel when it is dropped.
    fn answer(self) -> Option<Self::Ring>;
}

impl Answer for Completer {
    type Ring = Ring;

    fn answer(self) -> Option<Ring> {
        self.complete_on_credit()
    }
}

pub(super) struct Call<F, T, A = Completer>(Mutex<Stage<F, T, A>>);

enum Stage<F, T, A> {
    Queued(F, A),
    Running,
    /// Abandoned while it ran.
    Zombie,
    Done(thread::Result<T>),
    /// Abandoned before it began, dropped by its pool, or its value was taken.
    Over,
}

impl<F, T, A> Call<F, T, A> {
    pub(super) fn new(call: F, caller: A) -> Self {
        Self(Mutex::new(Stage::Queued(call, caller)))
    }

    /// The value, after the caller was answered; `None` if the call was dropped without being made.
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

    fn stage(&self) -> MutexGuard<'_, Stage<F, T, A>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F, T, A> Job<A::Ring> for Call<F, T, A>
where
    F: FnOnce() -> T + Send,
    T: Send + 'static,
    A: Answer,
{
    fn run(&self) -> End<A::Ring> {
        let mut stage = self.stage();
        let (call, caller) = match std::mem::replace(&mut *stage, Stage::Running) {
            Stage::Queued(call, caller) => (call, caller),
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
            return End::Answered(caller.answer());
        }
        drop(stage);
        if let Err(payload) = &outcome {
            log::warn!(
                "an abandoned call in a thread panicked: {}",
                panic_text(payload.as_ref())
            );
        }
        discard(outcome);
        End::Zombie
    }

    fn refuse(&self, why: &str) {
        let mut stage = self.stage();
        match std::mem::replace(&mut *stage, Stage::Over) {
            Stage::Queued(call, caller) => {
                *stage = Stage::Done(Err(Box::new(why.to_owned())));
                drop(stage);
                drop(caller);
                discard(call);
            }
            last @ (Stage::Running | Stage::Zombie | Stage::Done(_) | Stage::Over) => {
                *stage = last;
            }
        }
    }
}

/// Drops a value that may panic in doing so: not even that ends a thread of the pool.
fn discard<T>(value: T) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
        log::warn!("dropping what nobody waits for of a call in a thread panicked");
        drop_quietly(panic);
    }
}
