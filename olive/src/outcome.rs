//! What a run said (`Outcome`), and what is told to the broker because of it (`Settlement`): a table without input or output.

use std::time::Duration;

use crate::message::Failure;
use crate::retry::Policy;

/// How one attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The function returned; the JSON text of its result.
    Done(Vec<u8>),
    /// The function failed; the policy decides about another attempt.
    Failed(Failure),
    /// The function asked for another attempt.
    RetryAsked {
        /// The wait it asked for; `None` for the backoff.
        after: Option<Duration>,
        /// Why.
        failure: Failure,
    },
    /// The function said that no further attempt can help, or its source does not parse.
    Permanent(Failure),
    /// It ran longer than it may.
    TimedOut {
        /// The limit.
        limit: Duration,
    },
    /// The worker died with it.
    Lost {
        /// Exit status or signal.
        how: String,
        /// The last lines that the worker wrote to stderr.
        last_words: String,
    },
    /// It never ran: the message cannot be understood, or its function does not exist or is not allowed.
    Refused {
        /// Label of the dead letter.
        reason: Reason,
        /// What the submitter is told.
        failure: Failure,
    },
}

/// Why a message is in the dead queue (header `x-olive-reason`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Failed, and no attempts are left.
    Failed,
    /// Failed for good: by its own word, or because its source does not parse.
    Permanent,
    /// Ran into its time limit, and no attempts are left.
    Timeout,
    /// Killed its worker too often.
    WorkerLost,
    /// The body is no task message.
    Malformed,
    /// The body is larger than `olive_amqp_max_body`.
    TooLarge,
    /// No such function.
    NotRegistered,
    /// The import path is not in `olive_worker_allow`.
    NotAllowed,
}

impl Reason {
    /// The label as it stands in headers, logs and metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Permanent => "permanent",
            Self::Timeout => "timeout",
            Self::WorkerLost => "worker_lost",
            Self::Malformed => "malformed",
            Self::TooLarge => "too_large",
            Self::NotRegistered => "not_registered",
            Self::NotAllowed => "not_allowed",
        }
    }
}

/// What earlier deliveries of the same task message left in its headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Which attempt this is, from 1 (header `x-olive-attempt`).
    pub attempt: u32,
    /// How many attempts ended with a dead worker (header `x-olive-crashes`).
    pub crashes: u32,
}

impl Default for Marks {
    fn default() -> Self {
        Self {
            attempt: 1,
            crashes: 0,
        }
    }
}

/// What must be safe at the broker before the delivery may be acked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settlement {
    /// The reply, if somebody asked for one.
    Reply,
    /// A copy of the message that comes back after `delay`.
    Retry {
        /// How long it waits.
        delay: Duration,
        /// The marks of the copy.
        marks: Marks,
    },
    /// A copy in the dead queue, and the reply.
    Dead(Reason),
}

impl Outcome {
    /// Decides what follows from this outcome. `roll` is a random number of 0..1 for the backoff.
    #[must_use]
    pub fn settle(&self, marks: Marks, policy: &Policy, roll: f64) -> Settlement {
        let tried = marks.attempt.saturating_sub(marks.crashes);
        let again = |after: Option<Duration>, exhausted| {
            if tried > policy.max_retries {
                return Settlement::Dead(exhausted);
            }
            let delay = after.unwrap_or_else(|| policy.backoff(tried, roll));
            Settlement::Retry {
                delay,
                marks: Marks {
                    attempt: marks.attempt.saturating_add(1),
                    ..marks
                },
            }
        };
        match self {
            Self::Done(_) => Settlement::Reply,
            Self::Failed(_) => again(None, Reason::Failed),
            Self::RetryAsked { after, .. } => again(*after, Reason::Failed),
            Self::TimedOut { .. } => again(None, Reason::Timeout),
            Self::Permanent(_) => Settlement::Dead(Reason::Permanent),
            Self::Refused { reason, .. } => Settlement::Dead(*reason),
            Self::Lost { .. } if marks.crashes >= policy.max_crashes => {
                Settlement::Dead(Reason::WorkerLost)
            }
            Self::Lost { .. } => {
                let crashes = marks.crashes + 1;
                let delay = policy.backoff(crashes, roll);
                Settlement::Retry {
                    delay,
                    marks: Marks {
                        attempt: marks.attempt.saturating_add(1),
                        crashes,
                    },
                }
            }
        }
    }

    /// How many attempts there will have been if all that are left end as this one did.
    #[must_use]
    pub fn attempts(&self, marks: Marks, policy: &Policy) -> u32 {
        let left = match self {
            Self::Failed(_) | Self::RetryAsked { .. } | Self::TimedOut { .. } => {
                let failed_before = marks.attempt.saturating_sub(marks.crashes + 1);
                policy.max_retries.saturating_sub(failed_before)
            }
            Self::Lost { .. } => policy.max_crashes.saturating_sub(marks.crashes),
            Self::Done(_) | Self::Permanent(_) | Self::Refused { .. } => 0,
        };
        marks.attempt.saturating_add(left)
    }

    /// What the submitter is told when this outcome is the last one; `Err` carries the failure.
    pub fn answer(&self) -> Result<&[u8], Failure> {
        match self {
            Self::Done(result) => Ok(result),
            Self::Failed(failure)
            | Self::RetryAsked { failure, .. }
            | Self::Permanent(failure)
            | Self::Refused { failure, .. } => Err(failure.clone()),
            Self::TimedOut { limit } => Err(Failure::celery(
                "TimeLimitExceeded",
                format!("ran longer than its limit of {} s", limit.as_secs_f64()),
            )),
            Self::Lost { how, last_words } => Err(Failure::celery(
                "WorkerLostError",
                format!("the worker died with the task: {how}"),
            )
            .with_trace(last_words.as_str())
            .bounded()),
        }
    }

    /// One word for logs, metrics and the demo's table.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Done(_) => "ok",
            Self::Failed(_) | Self::Permanent(_) => "fail",
            Self::RetryAsked { .. } => "retry",
            Self::TimedOut { .. } => "timeout",
            Self::Lost { .. } => "lost",
            Self::Refused { .. } => "refused",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy = Policy {
        max_retries: 3,
        max_crashes: 2,
        base: Duration::from_secs(2),
        cap: Duration::from_secs(3600),
    };
    const ONCE: Policy = Policy {
        max_retries: 0,
        max_crashes: 0,
        ..POLICY
    };

    fn failure() -> Failure {
        Failure::new("E", "text")
    }

    fn retry(seconds: u64, attempt: u32, crashes: u32) -> Settlement {
        Settlement::Retry {
            delay: Duration::from_secs(seconds),
            marks: Marks { attempt, crashes },
        }
    }

    // Runs a task that always ends the same way until it is dead, and counts the runs.
    fn runs_until_dead(outcome: &Outcome, policy: &Policy) -> (u32, Reason) {
        let (mut marks, mut runs) = (Marks::default(), 0);
        loop {
            runs += 1;
            match outcome.settle(marks, policy, 0.5) {
                Settlement::Retry { marks: next, .. } => marks = next,
                Settlement::Dead(reason) => return (runs, reason),
                Settlement::Reply => unreachable!("a failure is never settled by a reply alone"),
            }
        }
    }

    #[test]
    fn a_result_needs_no_more_than_its_reply() {
        assert_eq!(
            Outcome::Done(b"1".to_vec()).settle(Marks::default(), &POLICY, 0.0),
            Settlement::Reply
        );
    }

    #[test]
    fn a_failure_waits_longer_each_time_and_then_is_dead() {
        let at = |attempt| {
            Outcome::Failed(failure()).settle(
                Marks {
                    attempt,
                    crashes: 0,
                },
                &POLICY,
                1.0,
            )
        };
        assert_eq!(
            [at(1), at(2), at(3)],
            [retry(2, 2, 0), retry(4, 3, 0), retry(8, 4, 0)]
        );
        assert_eq!(at(4), Settlement::Dead(Reason::Failed));
    }

    #[test]
    fn a_task_says_when_it_wants_to_run_again_or_never() {
        let asked = Outcome::RetryAsked {
            after: Some(Duration::from_secs(60)),
            failure: failure(),
        };
        assert_eq!(
            asked.settle(Marks::default(), &POLICY, 0.1),
            retry(60, 2, 0)
        );
        assert_eq!(
            asked.settle(
                Marks {
                    attempt: 4,
                    crashes: 0
                },
                &POLICY,
                0.1
            ),
            Settlement::Dead(Reason::Failed)
        );
        assert_eq!(
            Outcome::Permanent(failure()).settle(Marks::default(), &POLICY, 0.1),
            Settlement::Dead(Reason::Permanent)
        );
    }

    #[test]
    fn a_task_that_kills_its_worker_runs_once_more_than_the_crashes_allowed() {
        let lost = Outcome::Lost {
            how: "signal 9".into(),
            last_words: String::new(),
        };
        assert_eq!(
            runs_until_dead(&lost, &POLICY),
            (1 + POLICY.max_crashes, Reason::WorkerLost)
        );
        assert_eq!(runs_until_dead(&lost, &ONCE), (1, Reason::WorkerLost));
    }

    #[test]
    fn crashes_do_not_use_up_the_attempts() {
        let twice_lost = Marks {
            attempt: 3,
            crashes: 2,
        };
        assert_eq!(
            Outcome::Failed(failure()).settle(twice_lost, &POLICY, 1.0),
            retry(2, 4, 2)
        );
    }

    #[test]
    fn no_retries_means_sweepeas_run_once() {
        assert_eq!(
            runs_until_dead(&Outcome::Failed(failure()), &ONCE),
            (1, Reason::Failed)
        );
        assert_eq!(
            runs_until_dead(
                &Outcome::TimedOut {
                    limit: Duration::from_secs(1)
                },
                &ONCE
            ),
            (1, Reason::Timeout)
        );
        assert_eq!(
            runs_until_dead(
                &Outcome::TimedOut {
                    limit: Duration::from_secs(1)
                },
                &POLICY
            ),
            (4, Reason::Timeout)
        );
    }

    #[test]
    fn the_number_of_attempts_is_known_from_the_first_on() {
        let lost = Outcome::Lost {
            how: "signal 9".into(),
            last_words: String::new(),
        };
        for outcome in [Outcome::Failed(failure()), lost] {
            let (mut marks, promised) = (
                Marks::default(),
                outcome.attempts(Marks::default(), &POLICY),
            );
            while let Settlement::Retry { marks: next, .. } = outcome.settle(marks, &POLICY, 0.5) {
                marks = next;
                assert_eq!(outcome.attempts(marks, &POLICY), promised);
            }
            assert_eq!(marks.attempt, promised, "{outcome:?}");
        }
    }

    #[test]
    fn what_never_ran_is_dead_at_once() {
        for reason in [
            Reason::Malformed,
            Reason::TooLarge,
            Reason::NotRegistered,
            Reason::NotAllowed,
        ] {
            let refused = Outcome::Refused {
                reason,
                failure: failure(),
            };
            assert_eq!(
                refused.settle(Marks::default(), &POLICY, 0.0),
                Settlement::Dead(reason)
            );
        }
    }

    #[test]
    fn celery_clients_raise_their_own_classes_for_timeouts_and_dead_workers() {
        let timed_out = Outcome::TimedOut {
            limit: Duration::from_millis(1500),
        }
        .answer()
        .unwrap_err();
        assert_eq!(
            (timed_out.module.as_str(), timed_out.kind.as_str()),
            ("celery.exceptions", "TimeLimitExceeded")
        );
        assert_eq!(timed_out.message, "ran longer than its limit of 1.5 s");
        let lost = Outcome::Lost {
            how: "killed by signal 9".into(),
            last_words: "MemoryError".into(),
        }
        .answer()
        .unwrap_err();
        assert_eq!(
            (lost.kind.as_str(), lost.trace.as_str()),
            ("WorkerLostError", "MemoryError")
        );
    }
}
