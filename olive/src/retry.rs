//! What a task may say about trying again, and how long to wait before the next attempt.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use crate::message::Failure;

/// Any error, as a task returns it.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// What a task function returns.
pub type TaskResult<T> = Result<T, TaskError>;

/// How a task failed, and whether another attempt may help. `?` on any error gives [`TaskError::Failed`].
pub enum TaskError {
    /// Try again, after that long or after the usual backoff. Counts against the attempts.
    Retry {
        /// How long to wait; `None` for the backoff.
        after: Option<Duration>,
        /// Why.
        source: BoxError,
    },
    /// Do not try again, whatever the policy says.
    Permanent(BoxError),
    /// Failed; the policy decides about another attempt.
    Failed(BoxError),
}

impl TaskError {
    /// Asks for another attempt after the usual backoff.
    pub fn retry(source: impl Into<BoxError>) -> Self {
        Self::Retry {
            after: None,
            source: source.into(),
        }
    }

    /// Asks for another attempt after `delay`.
    pub fn retry_after(delay: Duration, source: impl Into<BoxError>) -> Self {
        Self::Retry {
            after: Some(delay),
            source: source.into(),
        }
    }

    /// Says that no further attempt can help.
    pub fn permanent(source: impl Into<BoxError>) -> Self {
        Self::Permanent(source.into())
    }

    /// The failure as it is told to the one who submitted the task.
    #[must_use]
    pub fn failure(&self) -> Failure {
        let source = self.source();
        let kind = source
            .downcast_ref::<Named>()
            .map_or("TaskError", |named| named.kind);
        let mut trace = String::new();
        let mut cause = source.source();
        while let Some(error) = cause {
            trace.push_str(&format!("caused by: {error}\n"));
            cause = error.source();
        }
        Failure::new(kind, source.to_string())
            .with_trace(trace)
            .bounded()
    }

    fn source(&self) -> &BoxError {
        match self {
            Self::Retry { source, .. } | Self::Permanent(source) | Self::Failed(source) => source,
        }
    }
}

impl fmt::Debug for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Retry { after, source } => f
                .debug_struct("Retry")
                .field("after", after)
                .field("source", source)
                .finish(),
            Self::Permanent(source) => f.debug_tuple("Permanent").field(source).finish(),
            Self::Failed(source) => f.debug_tuple("Failed").field(source).finish(),
        }
    }
}

impl fmt::Display for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source().fmt(f)
    }
}

// `TaskError` is no `Error` itself, otherwise this conversion would overlap with the reflexive one (anyhow's reason, too).
impl<E: StdError + Send + Sync + 'static> From<E> for TaskError {
    fn from(error: E) -> Self {
        let path = std::any::type_name::<E>();
        let path = path.split('<').next().unwrap_or(path);
        let kind = path.rsplit("::").next().unwrap_or(path);
        Self::Failed(Box::new(Named {
            kind,
            error: Box::new(error),
        }))
    }
}

/// Remembers the type's name of an error that `?` turned into a box: callers want to see `ParseIntError`, not `Error`.
#[derive(Debug)]
struct Named {
    kind: &'static str,
    error: BoxError,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl StdError for Named {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.error.source()
    }
}

/// When and how often a task is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Attempts after the first one; 0 runs a task once, as sweepea did.
    pub max_retries: u32,
    /// Attempts after a worker died with the task, counted apart from the others.
    pub max_crashes: u32,
    /// Upper bound of the first wait.
    pub base: Duration,
    /// Upper bound of every wait.
    pub cap: Duration,
}

impl Policy {
    /// How long to wait before the attempt after the `failures`-th one failed (1 for the first): exponential with full jitter.
    /// `roll` is a random number of 0..1; the wait is `roll · min(cap, base · 2^(failures-1))`, so that tasks that failed
    /// together do not come back together.
    #[must_use]
    pub fn backoff(&self, failures: u32, roll: f64) -> Duration {
        let factor = 1_u32
            .checked_shl(failures.saturating_sub(1))
            .unwrap_or(u32::MAX);
        self.base
            .saturating_mul(factor)
            .min(self.cap)
            .mul_f64(roll.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POLICY: Policy = Policy {
        max_retries: 3,
        max_crashes: 2,
        base: Duration::from_secs(2),
        cap: Duration::from_secs(3600),
    };

    #[test]
    fn the_bound_of_the_wait_doubles_up_to_the_cap() {
        let bound = |failures| POLICY.backoff(failures, 1.0).as_secs();
        assert_eq!(
            [
                bound(1),
                bound(2),
                bound(3),
                bound(10),
                bound(11),
                bound(12)
            ],
            [2, 4, 8, 1024, 2048, 3600]
        );
        assert_eq!(bound(u32::MAX), 3600);
    }

    proptest! {
        #[test]
        fn jitter_is_full_and_stays_below_the_bound(failures in 0_u32..200, roll in 0.0_f64..1.0) {
            let (wait, bound) = (POLICY.backoff(failures, roll), POLICY.backoff(failures, 1.0));
            prop_assert!(wait <= bound);
            prop_assert!((wait.as_secs_f64() - roll * bound.as_secs_f64()).abs() < 1e-3);
        }
    }

    #[test]
    fn a_question_mark_keeps_the_name_of_the_error() {
        fn task() -> TaskResult<i64> {
            Ok("x".parse::<i64>()?)
        }
        let failure = task().unwrap_err().failure();
        assert_eq!(
            (failure.kind.as_str(), failure.message.as_str()),
            ("ParseIntError", "invalid digit found in string")
        );
        assert_eq!(failure.module, "olive.exceptions");
    }

    #[test]
    fn the_chain_of_causes_becomes_the_trace() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::num::ParseIntError);
        let error = TaskError::from(Outer("x".parse::<i64>().unwrap_err()));
        assert_eq!(
            error.failure().trace,
            "caused by: invalid digit found in string\n"
        );
        assert_eq!(
            TaskError::permanent("no such user").failure().message,
            "no such user"
        );
    }
}
