//! Cancellation from the task's side: shields, and the pending interrupt.

use std::future::Future;
use std::panic::Location;
use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project_lite::pin_project;

use crate::error::Interrupt;
use crate::runtime::{State, WaitKind};
use crate::traps::{ForeignWait, Timeout, call};

/// Runs `body` with cancellation and timeouts held back; they are delivered at the first blocking trap after it (Curio's
/// `disable_cancellation`). Shields nest. One branch of a `select!` may be shielded while its siblings are not.
///
/// Cancellation point: no, whatever the body does. If dropped, the body is dropped.
///
/// What is begun is brought to its end, and the interrupt that came meanwhile is not lost:
///
/// ```
/// use std::time::Duration;
/// use kernel::{Interrupt, shield, sleep, spawn, yield_now};
///
/// # kernel::run(async {
/// let task = spawn(async {
///     shield(async {
///         sleep(Duration::from_millis(5)).await?; // not interrupted
///         Ok::<_, Interrupt>(())
///     })
///     .await?;
///     sleep(Duration::from_secs(60)).await // this is
/// });
/// yield_now().await.unwrap();
/// task.cancel().await.unwrap();
/// assert!(matches!(task.join().await.unwrap(), Err(Interrupt::Cancelled(_))));
/// # }).unwrap();
/// ```
pub const fn shield<F: Future>(body: F) -> Shielded<F> {
    Shielded { block: None, body }
}

pin_project! {
    /// A body that is not interrupted; made by [`shield`].
    #[derive(Debug)]
    #[must_use = "a future does nothing until it is awaited"]
    pub struct Shielded<F> {
        block: Option<Timeout>,
        #[pin]
        body: F,
    }
}

impl<F: Future> Future for Shielded<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let block = this
            .block
            .get_or_insert_with(|| Timeout::open(State::open_shield));
        let outcome = block.poll(this.body, cx);
        if outcome.is_ready() {
            *this.block = None;
        }
        outcome
    }
}

/// Makes any future a cancellation point. A task that waits only in futures of other libraries cannot be interrupted: they would not know what
/// to do with it. Wrapped, the wait ends with the interrupt, and the future is dropped with the wrapper.
///
/// Cancellation point: only if the body has to wait. If dropped, the body is dropped.
///
/// # Errors
/// An [`Interrupt`].
///
/// ```
/// use futures::channel::oneshot;
/// use kernel::{Interrupt, interruptible, spawn, yield_now};
///
/// # kernel::run(async {
/// let (_sender, receiver) = oneshot::channel::<u32>();
/// let task = spawn(async { interruptible(receiver).await });
/// yield_now().await.unwrap();
/// task.cancel().await.unwrap(); // without `interruptible` this would wait for ever
/// assert!(matches!(task.join().await.unwrap(), Err(Interrupt::Cancelled(_))));
/// # }).unwrap();
/// ```
#[track_caller]
pub fn interruptible<F: Future>(body: F) -> Interruptible<F> {
    Interruptible {
        wait: ForeignWait::new(),
        body,
    }
}

pin_project! {
    /// A foreign future as a cancellation point; made by [`interruptible`].
    #[derive(Debug)]
    #[must_use = "a future does nothing until it is awaited"]
    pub struct Interruptible<F> {
        wait: ForeignWait,
        #[pin]
        body: F,
    }
}

impl<F> Interruptible<F> {
    /// Where the task dump says that the task waits: at the caller of a primitive that awaits this in its turn, not inside it.
    pub fn called_at(mut self, at: &'static Location<'static>) -> Self {
        self.wait.at = at;
        self
    }
}

impl<F: Future> Future for Interruptible<F> {
    type Output = Result<F::Output, Interrupt>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(value) = this.body.poll(cx) {
            return Poll::Ready(Ok(value));
        }
        this.wait.poll(cx, WaitKind::Foreign).map(Err)
    }
}

/// Answers a pending cancellation or timeout, as a blocking trap would; behind a shield there is nothing to answer.
///
/// # Errors
/// The pending [`Interrupt`], which is then delivered.
pub fn check_cancellation() -> Result<(), Interrupt> {
    call::with_task(|state| match state.pending_interrupt() {
        Some(interrupt) => Err(interrupt),
        None => Ok(()),
    })
}

/// The pending interrupt, also behind a shield; it stays pending.
#[must_use]
pub fn pending_cancellation() -> Option<Interrupt> {
    call::with_task(|state| state.peek_interrupt())
}

/// Takes the pending interrupt, also from behind a shield, if `want` says so; then it counts as delivered.
#[must_use]
pub fn take_cancellation(want: impl FnOnce(&Interrupt) -> bool) -> Option<Interrupt> {
    let pending = pending_cancellation()?;
    if !want(&pending) {
        return None;
    }
    call::with_task(|state| state.forgive());
    Some(pending)
}

/// Replaces what is pending for the running task, and returns what was (Curio's `set_cancellation`).
pub fn set_cancellation(interrupt: Option<Interrupt>) -> Option<Interrupt> {
    call::with_task(|state| state.set_interrupt(interrupt))
}
