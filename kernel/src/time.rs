//! Time: the clock, sleeping, and timeouts that nest as Curio's do.
//!
//! A timeout block ends its body by making the trap that it waits in answer [`Interrupt::TaskTimeout`]; the body may clean up, await
//! meanwhile, and even go on. Blocks nest: the earliest deadline fires, the block it belongs to reports `TaskTimeout`,
//! the ones inside it report [`Interrupt::TimeoutCancellation`], and a `TaskTimeout` that leaves its block unhandled becomes
//! [`Interrupt::UncaughtTimeout`] at the next one, lest a caller take it for its own.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use pin_project_lite::pin_project;

use crate::cancel::shield;
use crate::error::{Interrupt, MaybeInterrupt};
use crate::runtime::nanos;
use crate::traps::{self, Expiry, Sleep, SleepUntil, Timeout, call};

/// The kernel's time. It never goes back.
///
/// # Panics
/// Outside a running kernel.
#[track_caller]
#[must_use]
pub fn now() -> Instant {
    call::clock()
}

/// Waits for `duration`, counted from its first poll, and says what time it was when that was over. Never wakes early; zero lets every other ready task run.
///
/// Cancellation point: yes. If dropped, its timer is gone.
///
/// # Errors
/// An [`Interrupt`].
#[track_caller]
pub fn sleep(duration: Duration) -> Sleep {
    traps::sleep(duration)
}

/// Waits until `at` (Curio's `wake_at`); as [`sleep`] otherwise.
///
/// # Errors
/// An [`Interrupt`].
#[track_caller]
pub const fn sleep_until(at: Instant) -> SleepUntil {
    traps::sleep_until(at)
}

/// Runs `body` for at most `duration`. `None` sets no deadline, outer ones stay in force.
///
/// A body that ends late without having blocked since the deadline keeps its result; debug builds log a warning.
///
/// Cancellation point: as the body. If dropped, the body is dropped and the deadline gone.
///
/// # Errors
/// Those of the body. When this block's deadline interrupted it, an error that carries [`Interrupt::TaskTimeout`].
///
/// Blocks nest: the earliest deadline fires, the block it belongs to reports `TaskTimeout`, and the ones inside it report [`Interrupt::TimeoutCancellation`], so that
/// each knows whether its own time was up. A `TaskTimeout` that leaves its block unhandled is [`Interrupt::UncaughtTimeout`] from the next block on,
/// lest that be taken for its own.
///
/// ```
/// use std::time::Duration;
/// use kernel::{Interrupt, sleep, timeout_after};
///
/// # kernel::run(async {
/// let minute = Duration::from_secs(60);
/// let late = timeout_after(Duration::from_millis(5), sleep(minute)).await;
/// assert_eq!(late, Err(Interrupt::TaskTimeout));
///
/// let outer = timeout_after(Duration::from_millis(5), async {
///     let inner = timeout_after(minute, sleep(2 * minute)).await;
///     assert_eq!(inner, Err(Interrupt::TimeoutCancellation));
///     inner
/// });
/// assert_eq!(outer.await, Err(Interrupt::TaskTimeout));
/// # }).unwrap();
/// ```
pub fn timeout_after<T, E, F>(duration: impl Into<Option<Duration>>, body: F) -> Bounded<F>
where
    F: Future<Output = Result<T, E>>,
    E: MaybeInterrupt,
{
    Bounded {
        limit: duration.into().map_or(Limit::None, Limit::After),
        block: None,
        body,
    }
}

/// As [`timeout_after`], with a point in time.
///
/// # Errors
/// As [`timeout_after`].
pub fn timeout_at<T, E, F>(deadline: impl Into<Option<Instant>>, body: F) -> Bounded<F>
where
    F: Future<Output = Result<T, E>>,
    E: MaybeInterrupt,
{
    Bounded {
        limit: deadline.into().map_or(Limit::None, Limit::At),
        block: None,
        body,
    }
}

/// As [`timeout_after`], but this block's own expiry is `Ok(None)`.
///
/// # Errors
/// As [`timeout_after`], without `TaskTimeout`.
pub async fn ignore_after<T, E, F>(
    duration: impl Into<Option<Duration>>,
    body: F,
) -> Result<Option<T>, E>
where
    F: Future<Output = Result<T, E>>,
    E: MaybeInterrupt,
{
    ignore(timeout_after(duration, body).await)
}

/// As [`ignore_after`], with a point in time.
///
/// # Errors
/// As [`ignore_after`].
pub async fn ignore_at<T, E, F>(
    deadline: impl Into<Option<Instant>>,
    body: F,
) -> Result<Option<T>, E>
where
    F: Future<Output = Result<T, E>>,
    E: MaybeInterrupt,
{
    ignore(timeout_at(deadline, body).await)
}

fn ignore<T, E: MaybeInterrupt>(outcome: Result<T, E>) -> Result<Option<T>, E> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.interrupt() == Some(&Interrupt::TaskTimeout) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Runs any future for at most `duration`, then drops it: `None`. For futures that know nothing of interrupts.
///
/// Cancellation point: no; the body may have some. A cancellation or timeout of the task does not end the wait, it stays pending.
///
/// If dropped, the body is dropped and the deadline gone.
///
/// ```
/// use std::time::Duration;
/// use kernel::drop_after;
///
/// # kernel::run(async {
/// let never = std::future::pending::<()>();
/// assert!(drop_after(Duration::from_millis(1), never).await.is_none());
/// # }).unwrap();
/// ```
#[track_caller]
pub fn drop_after<F: Future>(
    duration: Duration,
    body: F,
) -> impl Future<Output = Option<F::Output>> {
    let limit = shield(sleep(duration));
    async move {
        let (mut body, mut limit) = (std::pin::pin!(body), std::pin::pin!(limit));
        std::future::poll_fn(|cx| {
            if let Poll::Ready(value) = body.as_mut().poll(cx) {
                return Poll::Ready(Some(value));
            }
            limit.as_mut().poll(cx).map(|_| None)
        })
        .await
    }
}

#[derive(Debug)]
enum Limit {
    None,
    After(Duration),
    At(Instant),
}

pin_project! {
    /// A body under a deadline; made by [`timeout_after`] and [`timeout_at`].
    #[derive(Debug)]
    #[must_use = "a future does nothing until it is awaited"]
    pub struct Bounded<F> {
        limit: Limit,
        // Opened at the first poll, closed at the last.
        block: Option<Timeout>,
        #[pin]
        body: F,
    }
}

impl<T, E, F> Future for Bounded<F>
where
    F: Future<Output = Result<T, E>>,
    E: MaybeInterrupt,
{
    type Output = Result<T, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let inside = match this.block {
            Some(block) => block.enter(),
            None => {
                let (block, inside) = Timeout::open_and_enter(|state| {
                    let deadline = match *this.limit {
                        Limit::None => None,
                        Limit::After(duration) => Some(state.after(nanos(duration))),
                        Limit::At(at) => Some(state.ticks(at)),
                    };
                    state.open_block(deadline)
                });
                *this.block = Some(block);
                inside
            }
        };
        let outcome = ready!(this.body.poll(cx));
        let timed_out =
            matches!(&outcome, Err(error) if error.interrupt().is_some_and(Interrupt::is_timeout));
        let block = this.block.take().expect("opened above");
        let expiry = inside.unset(block, timed_out);
        Poll::Ready(match (expiry, outcome) {
            (Expiry::Enclosing, Err(error)) => {
                Err(error.replace_interrupt(Interrupt::TimeoutCancellation))
            }
            (Expiry::Uncaught, Err(error)) => {
                Err(error.replace_interrupt(Interrupt::UncaughtTimeout))
            }
            (Expiry::Own, Err(error)) if error.interrupt() != Some(&Interrupt::TaskTimeout) => {
                Err(error.replace_interrupt(Interrupt::TaskTimeout))
            }
            (_, outcome) => outcome,
        })
    }
}
