//! What a trap can answer instead of its value, and what a kernel can fail with.
//!
//! Interruption is not failure. Curio raises `CancelledError` from `BaseException` so that a catch-all does not swallow it;
//! here it is a type of its own, [`Interrupt`], that `?` carries through any error type which implements [`MaybeInterrupt`].

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use crate::task::{TaskInfo, TaskTree};

/// Cancellation or timeout, delivered as the `Err` of a blocking trap.
///
/// Each is delivered once; what the task awaits afterwards works again, so that clean-up may block.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Interrupt {
    /// The task was cancelled.
    #[error("task cancelled{0}")]
    Cancelled(Reason),
    /// The innermost deadline in force ran out (Curio's `TaskTimeout`).
    #[error("timed out")]
    TaskTimeout,
    /// The deadline of an enclosing block ran out (Curio's `TimeoutCancellationError`): whoever set it sees
    /// [`Interrupt::TaskTimeout`], the blocks between see this.
    #[error("cancelled by the timeout of an enclosing block")]
    TimeoutCancellation,
    /// A timeout travelled out of the block it belongs to without being handled (Curio's `UncaughtTimeoutError`).
    #[error("a timeout was not handled by the block it belongs to")]
    UncaughtTimeout,
}

impl Interrupt {
    /// A cancellation without a reason.
    #[must_use]
    pub const fn cancelled() -> Self {
        Self::Cancelled(Reason(None))
    }

    /// The interrupt in a chain of errors, if there is one. Foreign code wraps what our sockets answer into errors of its own: this tells an interrupted task
    /// from a failed one.
    ///
    /// ```
    /// use kernel::Interrupt;
    ///
    /// let wrapped = std::io::Error::other(std::io::Error::from(Interrupt::TaskTimeout));
    /// assert_eq!(Interrupt::find_in(&wrapped), Some(&Interrupt::TaskTimeout));
    /// assert_eq!(Interrupt::find_in(&std::fmt::Error), None);
    /// ```
    #[must_use]
    pub fn find_in<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(interrupt) = error.downcast_ref() {
                return Some(interrupt);
            }
            // The source of an `io::Error` is that of what it carries, which would be passed over.
            let carried = error.downcast_ref().and_then(io::Error::get_ref);
            next = carried.map_or_else(|| error.source(), |carried| Some(carried as _));
        }
        None
    }

    pub(crate) const fn is_timeout(&self) -> bool {
        matches!(self, Self::TaskTimeout | Self::TimeoutCancellation)
    }
}

impl PartialEq for Interrupt {
    /// Same kind; two cancellations are equal when they carry the very same reason.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Cancelled(a), Self::Cancelled(b)) => a == b,
            (Self::TaskTimeout, Self::TaskTimeout)
            | (Self::TimeoutCancellation, Self::TimeoutCancellation)
            | (Self::UncaughtTimeout, Self::UncaughtTimeout) => true,
            _ => false,
        }
    }
}

/// Why a task was cancelled: nothing, or any value the canceller chose.
#[derive(Clone, Default)]
pub struct Reason(Option<Arc<Box<dyn Any + Send + Sync>>>);

// The box makes the pointer a thin one, so that what a trap answers fits into two registers.
const _: () = assert!(size_of::<Poll<Result<(), Interrupt>>>() == 16);

impl Reason {
    /// Carries `value`; the cancelled task gets at it with [`Reason::downcast_ref`].
    pub fn new(value: impl Any + Send + Sync) -> Self {
        Self(Some(Arc::new(Box::new(value))))
    }

    /// The value, if there is one and it is a `T`.
    #[must_use]
    pub fn downcast_ref<T: Any>(&self) -> Option<&T> {
        let value: &(dyn Any + Send + Sync) = &***self.0.as_ref()?;
        value.downcast_ref()
    }
}

impl PartialEq for Reason {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.downcast_ref::<&str>() {
            Some(text) => write!(f, "Reason({text:?})"),
            None if self.0.is_some() => f.write_str("Reason(..)"),
            None => f.write_str("Reason(none)"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.downcast_ref::<&str>(), self.downcast_ref::<String>()) {
            (Some(text), _) => write!(f, ": {text}"),
            (_, Some(text)) => write!(f, ": {text}"),
            _ => Ok(()),
        }
    }
}

impl From<&'static str> for Reason {
    fn from(text: &'static str) -> Self {
        Self::new(text)
    }
}

/// An error type that can carry an [`Interrupt`], so that timeouts and cancellation travel through it with `?`. [`io::Error`] and the boxed `dyn Error`s are such,
/// and one of your own is with a variant more:
///
/// ```
/// use std::time::Duration;
/// use kernel::{Interrupt, MaybeInterrupt, sleep, timeout_after};
///
/// #[derive(Debug)]
/// enum OrderError {
///     SoldOut,
///     Interrupted(Interrupt),
/// }
///
/// impl From<Interrupt> for OrderError {
///     fn from(interrupt: Interrupt) -> Self {
///         Self::Interrupted(interrupt)
///     }
/// }
///
/// impl MaybeInterrupt for OrderError {
///     fn interrupt(&self) -> Option<&Interrupt> {
///         match self {
///             Self::Interrupted(interrupt) => Some(interrupt),
///             Self::SoldOut => None,
///         }
///     }
/// }
///
/// async fn order(pieces: u32) -> Result<(), OrderError> {
///     sleep(Duration::from_millis(20)).await?;
///     if pieces > 9 { Err(OrderError::SoldOut) } else { Ok(()) }
/// }
///
/// # kernel::run(async {
/// let late = timeout_after(Duration::from_millis(1), order(1)).await;
/// assert!(matches!(late, Err(OrderError::Interrupted(Interrupt::TaskTimeout))));
/// let refused = timeout_after(Duration::from_secs(60), order(10)).await;
/// assert!(matches!(refused, Err(OrderError::SoldOut)));
/// # }).unwrap();
/// ```
pub trait MaybeInterrupt: From<Interrupt> {
    /// The interrupt inside, if that is what this error is.
    fn interrupt(&self) -> Option<&Interrupt>;

    /// The same error with another interrupt. The default forgets whatever else the error carried, such as bytes read so far;
    /// types that carry progress override it.
    #[must_use]
    fn replace_interrupt(self, with: Interrupt) -> Self {
        with.into()
    }
}

impl MaybeInterrupt for Interrupt {
    fn interrupt(&self) -> Option<&Interrupt> {
        Some(self)
    }
}

impl From<Interrupt> for io::Error {
    /// Never `ErrorKind::Interrupted`: read and write loops take that as "try again".
    fn from(interrupt: Interrupt) -> Self {
        Self::other(interrupt)
    }
}

impl MaybeInterrupt for io::Error {
    fn interrupt(&self) -> Option<&Interrupt> {
        self.get_ref()?.downcast_ref()
    }
}

impl MaybeInterrupt for Box<dyn std::error::Error> {
    fn interrupt(&self) -> Option<&Interrupt> {
        Interrupt::find_in(&**self)
    }
}

impl MaybeInterrupt for Box<dyn std::error::Error + Send + Sync> {
    fn interrupt(&self) -> Option<&Interrupt> {
        Interrupt::find_in(&**self)
    }
}

/// Why [`Task::join`](crate::Task::join) has no value to give.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The joining task was interrupted while it waited; the joined one goes on and can be joined again.
    #[error("join interrupted: {0}")]
    Interrupted(#[from] Interrupt),
    /// The task panicked; the payload is what it panicked with.
    #[error("task panicked: {0}")]
    Panicked(Panic),
    /// The task was dropped before it ended: aborted, or its kernel was closed.
    #[error("task aborted before it ended")]
    Aborted,
    /// The value was taken by an earlier join.
    #[error("the task's value was already taken")]
    Taken,
}

impl MaybeInterrupt for JoinError {
    fn interrupt(&self) -> Option<&Interrupt> {
        match self {
            Self::Interrupted(interrupt) => Some(interrupt),
            Self::Panicked(_) | Self::Aborted | Self::Taken => None,
        }
    }
}

/// What a task panicked with.
///
/// A payload is `Send` but not `Sync`; behind the mutex it is both, so that a [`JoinError`] can become an error of any kind.
pub struct Panic(Mutex<Box<dyn Any + Send>>);

impl Panic {
    pub(crate) const fn new(payload: Box<dyn Any + Send>) -> Self {
        Self(Mutex::new(payload))
    }

    /// The payload, for [`std::panic::resume_unwind`].
    #[must_use]
    pub fn into_payload(self) -> Box<dyn Any + Send> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let payload = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        f.write_str(panic_text(&**payload))
    }
}

impl fmt::Debug for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Panic({:?})", self.to_string())
    }
}

/// The text of a panic payload, as far as it is one.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a value that is not text")
}

/// Drops what may panic at that. The payload of that panic is dropped too; what comes of it if that panics once more is leaked.
pub(crate) fn drop_quietly<T>(value: T) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(value)))
        && let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic)))
    {
        std::mem::forget(again);
    }
}

/// Why a kernel did not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A kernel already runs on this thread, or this one is being run by one of its own tasks.
    #[error("a kernel already runs on this thread; spawn into it instead of running another")]
    Reentrant,
    /// The main task waits, and nothing inside or outside the kernel can ever wake it.
    #[error("deadlock: nothing can wake the main task\n{}", TaskTree(.0))]
    Deadlock(Vec<TaskInfo>),
    /// The main task was aborted before it ended.
    #[error("the main task was aborted")]
    Aborted,
    /// The poller failed.
    #[error("the kernel's poller failed: {0}")]
    Io(#[from] io::Error),
}

/// A second task waits for the same direction of the same source (Curio's `ReadResourceBusy` and `WriteResourceBusy`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("another task already waits to {} this source", if *.writing { "write to" } else { "read from" })]
pub struct ResourceBusy {
    /// Whether it is the writing side that is taken.
    pub writing: bool,
}

impl From<ResourceBusy> for io::Error {
    fn from(busy: ResourceBusy) -> Self {
        Self::new(io::ErrorKind::ResourceBusy, busy)
    }
}

/// Every error fits into `Box<dyn Error + Send + Sync>`, which is what most programs make of them.
const _: () = {
    const fn fits<E: std::error::Error + Send + Sync + 'static>() {}
    fits::<Interrupt>();
    fits::<JoinError>();
    fits::<RunError>();
    fits::<ResourceBusy>();
};
