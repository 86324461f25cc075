//! A single-threaded, Curio-style kernel for async programs.

pub mod traps;

mod cancel;
mod error;
mod runtime;
mod task;
mod time;

pub use cancel::{
    Interruptible, Shielded, check_cancellation, interruptible, pending_cancellation,
    set_cancellation, shield, take_cancellation,
};
pub use error::{Interrupt, JoinError, MaybeInterrupt, Reason, ResourceBusy, RunError};
pub use runtime::{
    Builder, Clock, Kernel, Remote, ShutdownReport, SystemClock, Turn, VirtualClock, WaitKind,
};
pub use task::{
    Join, Task, TaskId, TaskInfo, TaskRef, TaskState, current_task, spawn, try_current_task,
    yield_now,
};
pub use time::{
    Bounded, drop_after, ignore_after, ignore_at, now, sleep, sleep_until, timeout_after,
    timeout_at,
};

/// Makes a kernel, runs `main` in it until it ends, and drops the tasks that are left, newest first.
///
/// # Errors
/// As [`Kernel::run`].
///
/// # Panics
/// With what `main` panicked with.
#[track_caller]
pub fn run<T>(main: impl Future<Output = T>) -> Result<T, RunError> {
    Kernel::new()?.run(main)
}
