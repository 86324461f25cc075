//! A single-threaded kernel for async programs, in the manner of [Curio](https://github.com/dabeaz/curio).
//!
//! Curio looks at async functions as an operating system looks at processes. A *task* runs in user mode until it needs something
//! that only the kernel has: time, the readiness of a socket, another task's end. It asks for that with a *trap*, the kernel puts
//! it aside and runs another, and gives it the processor back when the answer is there. Everything above the traps, locks and queues and
//! sockets and groups, is ordinary code in user mode that could as well be yours.
//!
//! Here a trap is a future, and the kernel is the executor that polls it:
//!
//! ```
//! use std::time::Duration;
//! use kernel::{Interrupt, sleep, spawn, timeout_after};
//!
//! async fn countdown(from: u32) -> Result<u32, Interrupt> {
//!     for _ in 0..from {
//!         sleep(Duration::from_millis(10)).await?;
//!     }
//!     Ok(from)
//! }
//!
//! kernel::run(async {
//!     let quick = spawn(countdown(2));
//!     let slow = spawn(countdown(60_000));
//!     assert_eq!(quick.join().await.unwrap(), Ok(2));
//!
//!     // Ten minutes are too long: the wait is interrupted, the task goes on, until it is cancelled too.
//!     assert!(timeout_after(Duration::from_millis(5), slow.join()).await.is_err());
//!     slow.cancel().await.unwrap();
//!     assert_eq!(slow.join().await.unwrap(), Err(Interrupt::cancelled()));
//! })
//! .unwrap();
//! ```
//!
//! # User mode and kernel mode
//!
//! [`traps`] is the door, and there is no other: what stands above it (`task`, `time`, `cancel`, `sync`, `net`, ...) knows no table of
//! the kernel, and what stands below it (`runtime`) knows no socket and no lock. A trap either never blocks, then it is also a
//! plain function, or it blocks, then it is a *leaf future*, and a *cancellation point*.
//!
//! # Interruption
//!
//! Cancellation and timeouts are the same thing: the blocking trap in which a task waits answers `Err(`[`Interrupt`]`)`. It is
//! told once; the task may clean up, and await meanwhile, before it ends. Rust's own way to end a future, dropping it, is there
//! as well: a leaf that is dropped has left no trace in the kernel, so `select!` and its kind work, and
//! [`TaskRef::abort`] drops a whole task.
//!
//! # One thread
//!
//! A kernel and its tasks live on one thread, share data by `Rc` and `Cell`, and need no lock. Other threads reach it through its inbox:
//! wakers, [`Remote`], and the answers of worker threads. A program may run a kernel in each of several threads.
//!
//! # Seeing inside
//!
//! [`TaskTree`] prints who waits where; a [deadlock](RunError::Deadlock) carries it. [`Activation`] is the observer's interface, and [`debug`] has observers that log steps, traps,
//! long steps and panics. [`Builder::watchdog`] notices a task that does not let go, and a [`monitor`] answers from another thread meanwhile. What becomes of
//! a task's panic is said with [`Builder::on_panic`].
//!
//! # Where to look
//!
//! | for | see |
//! |---|---|
//! | tasks, their ends and their groups | [`spawn`], [`Task`], [`group`], [`TaskGroup`], [`local`] |
//! | time, timeouts, what must not be interrupted | [`sleep`], [`timeout_after`], [`ignore_after`], [`shield`] |
//! | tasks that wait for each other, and for threads | [`sync`] |
//! | sockets, servers, TLS, the resolver | [`net`] |
//! | files, child processes, signals | [`fs`], [`process`], [`signal`] |
//! | what would block or computes for long | [`run_in_thread`], [`run_in_process`], [`thread`] |
//! | futures of other libraries | awaited as they are; [`interruptible`] and [`drop_after`] bound them; `net::Polled` lends them sockets |
//! | other runtimes and event loops | [`Remote::spawn`], [`sync::UniversalQueue`], [`Kernel::turn`] |
//! | tests | [`VirtualClock`], [`wait_until_idle`] |
//!
//! # Features
//!
//! None is on by itself.
//!
//! | feature | brings |
//! |---|---|
//! | `channel` | `channel`: messages between processes that know the same key |
//! | `futures-io` | `net::Polled` as `AsyncRead` and `AsyncWrite` |
//! | `hyper` | `net::hyper`: HTTP with hyper 1.x |
//! | `resolver` | more of `net::resolve` than the addresses of a name |
//! | `tls` | `net::tls`: TLS by rustls |
//!
//! # As a guest
//!
//! A kernel need not own the loop: [`Kernel::turn`] makes one pass and tells the next deadline, and the kernel's descriptor
//! ([`AsFd`](std::os::fd::AsFd)) becomes readable when there is more to do. So it runs inside another event loop, which is how
//! its ancestor [sweepea](https://github.com/allenling/sweepea) ran Curio inside pika's.

#[cfg(feature = "channel")]
pub mod channel;
pub mod debug;
pub mod fs;
pub mod local;
pub mod monitor;
pub mod net;
mod primitives;
pub mod process;
pub mod signal;
pub mod sync;
pub mod thread;
pub mod traps;

mod activation;
mod bridge;
mod cancel;
mod error;
mod group;
mod runtime;
mod task;
mod time;
mod watchdog;
mod workers;

pub use activation::{Activation, KernelView, OnPanic, PanicCallback, StepEnd, TaskView};
pub use bridge::RemoteTask;
pub use cancel::{
    Interruptible, Shielded, check_cancellation, interruptible, pending_cancellation,
    set_cancellation, shield, take_cancellation,
};
pub use error::{Interrupt, JoinError, MaybeInterrupt, Panic, Reason, ResourceBusy, RunError};
pub use group::{Done, GroupError, Outcome, TaskGroup, Wait, group};
pub use local::TaskLocal;
pub use runtime::{
    Builder, Clock, Kernel, Remote, ShutdownReport, SystemClock, Turn, VirtualClock, WaitKind,
};
pub use task::{
    Join, Task, TaskId, TaskInfo, TaskRef, TaskState, TaskTree, current_task, spawn, tasks,
    try_current_task, wait_until_idle, yield_now,
};
pub use thread::{spawn_thread, spawn_thread_with};
pub use time::{
    Bounded, drop_after, ignore_after, ignore_at, now, sleep, sleep_until, timeout_after,
    timeout_at,
};
pub use watchdog::Stuck;
pub use workers::{
    PoolJob, ProcessCallError, ProcessFn, ProcessPool, ThreadPool, process_worker, run_in_process,
    run_in_thread, run_on,
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
