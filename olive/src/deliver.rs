//! From a delivery to its ack: at least once always, and once while this process lives.
//!
//! ```text
//! arrives ─▶ accept ──refused──────────────────────┐
//!              │ ok                                ▼
//!              ▼                     outcome ─▶ plan ─▶ publish everything, each confirmed ─▶ ack
//!            ledger ─new─▶ a worker runs it ──────┘                                            │
//!              ├─ still running here: the run gets this delivery, in place of its dead one      │
//!              └─ finished here: ack ◀──────────────────── tid goes into the ledger ◀───────────┘
//! ```
//!
//! What is acked is gone, so the ack comes last: after the broker has confirmed the reply, the copy for the next attempt or the dead
//! letter. If this process dies before, the broker delivers again. If only the connection is lost, running tasks run on; the broker
//! delivers their messages once more over the next connection, and the *ledger* knows them by task id: no second run, and the ack goes to
//! the delivery that is valid now.
//!
//! Everything here that decides is a plain function or table: no socket, no clock of its own.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::message::{self, Failure, Next, RespondTo, TaskMessage};
use crate::outcome::{Marks, Outcome, Reason, Settlement};
use crate::retry::Policy;

/// A delivery as it came, in olive's terms.
#[derive(Debug, Clone, Default)]
pub struct Incoming {
    /// The body.
    pub body: Vec<u8>,
    /// Queue for the reply, on the default exchange.
    pub reply_to: Option<String>,
    /// What the reply must carry.
    pub correlation_id: Option<String>,
    /// What earlier attempts left in the headers.
    pub marks: Marks,
    /// Whether the sender wants to hear of attempts that fail (header `x-olive-interim`).
    pub interim: bool,
    /// How many retries the sender grants, if that is not the app's business (header `x-olive-max-retries`).
    pub max_retries: Option<u32>,
}

/// A delivery on its way through: what must be known of it to run it and to settle it.
#[derive(Debug, Clone)]
pub struct Job {
    /// Task id; of a body that is no task message, the correlation id or a new one.
    pub tid: String,
    /// Which attempt this is, and how many workers died before.
    pub marks: Marks,
    /// The task message, or the body that is none.
    pub message: Result<Arc<TaskMessage>, Vec<u8>>,
    correlation_id: String,
    reply_to: Vec<RespondTo>,
    /// Where failed attempts are told of, the last one excepted.
    interim: Option<RespondTo>,
    max_retries: Option<u32>,
}

impl Job {
    /// Name of the function, for logs.
    #[must_use]
    pub fn func(&self) -> &str {
        self.message.as_ref().map_or("?", |message| &message.func)
    }

    /// The body as it came.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        match &self.message {
            Ok(message) => message.body(),
            Err(body) => body,
        }
    }
}

/// Reads a delivery. With an outcome, it is settled by that without running.
#[must_use]
pub fn accept(incoming: Incoming, max_body: usize) -> (Job, Option<Outcome>) {
    let Incoming {
        body,
        reply_to,
        correlation_id,
        marks,
        interim,
        max_retries,
    } = incoming;
    let by_property = reply_to.filter(|queue| !queue.is_empty());
    let mut reply_to: Vec<RespondTo> = by_property
        .map(|routing_key| RespondTo {
            exchange: String::new(),
            routing_key,
        })
        .into_iter()
        .collect();
    let interim = reply_to.first().filter(|_| interim).cloned();
    let correlation_id = correlation_id.filter(|id| !id.is_empty());
    let refuse = |reason, text: String| Outcome::Refused {
        reason,
        failure: Failure::new("Refused", text).bounded(),
    };

    let (message, outcome) = if body.len() > max_body {
        let text = format!(
            "body of {} bytes, olive_amqp_max_body allows {max_body}",
            body.len()
        );
        (Err(body), Some(refuse(Reason::TooLarge, text)))
    } else {
        match TaskMessage::decode(body) {
            Ok(message) => (Ok(Arc::new(message)), None),
            Err(bad) => (Err(bad.body), Some(refuse(Reason::Malformed, bad.reason))),
        }
    };
    let tid = match &message {
        Ok(message) => message.tid.clone(),
        Err(_) => correlation_id
            .clone()
            .unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
    };
    let by_message = message
        .as_ref()
        .ok()
        .and_then(|message| message.respond_to.clone());
    reply_to.extend(by_message.filter(|to| reply_to.first() != Some(to)));
    let correlation_id = correlation_id.unwrap_or_else(|| tid.clone());
    (
        Job {
            tid,
            marks,
            message,
            correlation_id,
            reply_to,
            interim,
            max_retries,
        },
        outcome,
    )
}

/// Something that must be confirmed by the broker before the ack.
#[derive(Debug, Clone, PartialEq)]
pub enum Publication {
    /// The reply. If nobody listens any more, that is its reader's choice: it counts as sent.
    Reply {
        /// Where to.
        to: RespondTo,
        /// Matches the reply with its request.
        correlation_id: String,
        /// JSON.
        body: Vec<u8>,
    },
    /// The message once more, with its own properties and headers, these marks added.
    Again {
        /// `x-olive-attempt` and `x-olive-crashes`.
        marks: Marks,
    },
    /// A copy in the dead queue, with its own properties and headers.
    Dead {
        /// `x-olive-reason`.
        reason: Reason,
        /// `x-olive-error`.
        error: String,
    },
}

/// What to do about an outcome, in this order; then ack.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What to publish at once.
    pub first: Option<Publication>,
    /// How long to wait then.
    pub wait: Duration,
    /// What to publish after that, all of it.
    pub publish: Vec<Publication>,
    /// What it amounts to.
    pub settlement: Settlement,
}

/// Turns an outcome into what must be published for it. `roll` is a random number of 0..1 for the backoff.
#[must_use]
pub fn plan(job: &Job, outcome: &Outcome, policy: &Policy, roll: f64, now: SystemTime) -> Plan {
    let policy = Policy {
        max_retries: job.max_retries.unwrap_or(policy.max_retries),
        ..*policy
    };
    let answer = outcome.answer();
    let reply = |to: &RespondTo, body: Vec<u8>| Publication::Reply {
        to: to.clone(),
        correlation_id: job.correlation_id.clone(),
        body,
    };
    let settlement = outcome.settle(job.marks, &policy, roll);
    let replies = |mut publish: Vec<Publication>| {
        if !job.reply_to.is_empty() {
            let body = match &answer {
                Ok(result) => message::success(&job.tid, result, now),
                Err(failure) => message::failure(&job.tid, failure, now),
            };
            publish.extend(job.reply_to.iter().map(|to| reply(to, body.clone())));
        }
        Plan {
            first: None,
            wait: Duration::ZERO,
            publish,
            settlement,
        }
    };
    match settlement {
        Settlement::Reply => replies(vec![]),
        Settlement::Retry { delay, marks } => {
            let first = job.interim.as_ref().zip(answer.as_ref().err());
            let next = Next {
                attempt: job.marks.attempt,
                of: outcome.attempts(job.marks, &policy),
                after: delay,
            };
            Plan {
                first: first
                    .map(|(to, failure)| reply(to, message::retry(&job.tid, failure, next, now))),
                wait: delay,
                publish: vec![Publication::Again { marks }],
                settlement,
            }
        }
        Settlement::Dead(reason) => {
            let error = answer
                .as_ref()
                .err()
                .map_or(String::new(), |f| format!("{}: {}", f.kind, f.message));
            let error = message::head(&error, 1024).to_owned();
            replies(vec![Publication::Dead { reason, error }])
        }
    }
}

/// One attempt of one task: what the ledger knows deliveries by. The copy that a retry publishes has the task id of the message that
/// it is a copy of, and must not be taken for that.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Run {
    /// Task id.
    pub tid: String,
    /// Attempt, from 1.
    pub attempt: u32,
}

/// The runs that go on here and those that ended here lately. `D` is a delivery, as far as acking goes.
#[derive(Debug)]
pub struct Ledger<D> {
    running: HashMap<Run, D>,
    ended: HashMap<Run, Instant>,
    /// When each run ended, from the oldest to the newest. An entry that `ended` does not agree with is out of date.
    order: VecDeque<(Instant, Run)>,
}

/// What to do with a delivery that has just come.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrival<D> {
    /// Run it.
    Run,
    /// It runs here already, and its run has this delivery now. The old one, which is void, comes back.
    Adopted(D),
    /// It ended here, and everything about it is safe: ack.
    Ended(D),
    /// Run it, although a task of the same id runs already: its sender used an id twice. The ledger does not know it.
    Twin(D),
}

/// How many ended runs are remembered, and how long.
const REMEMBERED: usize = 10_000;
const REMEMBER_FOR: Duration = Duration::from_secs(600);

impl<D> Default for Ledger<D> {
    fn default() -> Self {
        Self {
            running: HashMap::new(),
            ended: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

impl<D> Ledger<D> {
    /// Notes a delivery. Only one that the broker calls redelivered can be one that is known: an id that comes again without that
    /// is another task.
    pub fn arrive(
        &mut self,
        run: &Run,
        redelivered: bool,
        delivery: D,
        now: Instant,
    ) -> Arrival<D> {
        self.forget(now);
        match self.running.get_mut(run) {
            Some(current) if redelivered => Arrival::Adopted(std::mem::replace(current, delivery)),
            Some(_) => Arrival::Twin(delivery),
            None if redelivered && self.ended.contains_key(run) => Arrival::Ended(delivery),
            None => {
                self.ended.remove(run);
                self.running.insert(run.clone(), delivery);
                Arrival::Run
            }
        }
    }

    /// Takes the delivery of a run that is settled, to be acked. If that is void because the connection is gone, the broker
    /// delivers again and finds the run ended.
    pub fn settled(&mut self, run: &Run, now: Instant) -> Option<D> {
        let delivery = self.running.remove(run)?;
        self.ended.insert(run.clone(), now);
        self.order.push_back((now, run.clone()));
        self.forget(now);
        Some(delivery)
    }

    /// Takes the delivery of a run that could not be settled: the broker shall deliver it again, and it shall run again.
    pub fn abandoned(&mut self, run: &Run) -> Option<D> {
        self.running.remove(run)
    }

    /// The delivery that a run has now.
    #[must_use]
    pub fn delivery(&self, run: &Run) -> Option<&D> {
        self.running.get(run)
    }

    /// How many runs are between their delivery and their ack.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    fn forget(&mut self, now: Instant) {
        while let Some((at, run)) = self.order.front() {
            if self.order.len() <= REMEMBERED && now.saturating_duration_since(*at) < REMEMBER_FOR {
                break;
            }
            if self.ended.get(run) == Some(at) {
                self.ended.remove(run);
            }
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy = Policy {
        max_retries: 1,
        max_crashes: 2,
        base: Duration::from_secs(2),
        cap: Duration::from_secs(3600),
    };

    fn incoming(body: &str) -> Incoming {
        Incoming {
            body: body.as_bytes().to_vec(),
            ..Incoming::default()
        }
    }

    fn accepted(incoming: Incoming) -> Job {
        let (job, outcome) = accept(incoming, 1000);
        assert_eq!(outcome, None);
        job
    }

    fn planned(job: &Job, outcome: &Outcome) -> Plan {
        plan(job, outcome, &POLICY, 1.0, SystemTime::UNIX_EPOCH)
    }

    fn addresses(plan: &Plan) -> Vec<(&str, &str, &str)> {
        let mut all = Vec::new();
        for publication in &plan.publish {
            if let Publication::Reply {
                to, correlation_id, ..
            } = publication
            {
                all.push((
                    to.exchange.as_str(),
                    to.routing_key.as_str(),
                    correlation_id.as_str(),
                ));
            }
        }
        all
    }

    fn failed() -> Outcome {
        Outcome::Failed(Failure::new("E", "text"))
    }

    #[test]
    fn the_reply_goes_to_both_addresses_with_the_callers_correlation_id() {
        let body = r#"{"func":"f","tid":"t","resp_exchange":"x","resp_routing_key":"k"}"#;
        let job = accepted(Incoming {
            reply_to: Some("q".into()),
            correlation_id: Some("c".into()),
            ..incoming(body)
        });
        let plan = planned(&job, &Outcome::Done(b"42".to_vec()));
        assert_eq!(addresses(&plan), [("", "q", "c"), ("x", "k", "c")]);
        assert_eq!(plan.wait, Duration::ZERO);
    }

    #[test]
    fn the_task_id_stands_in_for_a_missing_correlation_id() {
        let job = accepted(incoming(r#"{"func":"f","tid":"t","resp_routing_key":"k"}"#));
        assert_eq!(
            addresses(&planned(&job, &failed())),
            [],
            "nothing is said before the last attempt"
        );
        assert_eq!(
            addresses(&planned(&job, &Outcome::Done(b"1".to_vec()))),
            [("", "k", "t")]
        );
        let nobody = accepted(Incoming {
            reply_to: Some(String::new()),
            ..incoming(r#"{"func":"f"}"#)
        });
        assert_eq!(planned(&nobody, &Outcome::Done(b"1".to_vec())).publish, []);
    }

    #[test]
    fn a_failure_comes_again_and_then_is_dead_with_a_reply() {
        let mut job = accepted(Incoming {
            reply_to: Some("q".into()),
            ..incoming(r#"{"func":"f","tid":"t"}"#)
        });
        let first = planned(&job, &failed());
        let marks = Marks {
            attempt: 2,
            crashes: 0,
        };
        assert_eq!(
            first,
            Plan {
                first: None,
                wait: Duration::from_secs(2),
                publish: vec![Publication::Again { marks }],
                settlement: Settlement::Retry {
                    delay: Duration::from_secs(2),
                    marks
                },
            }
        );
        job.marks = marks;
        let last = planned(&job, &failed());
        assert_eq!(
            last.publish[0],
            Publication::Dead {
                reason: Reason::Failed,
                error: "E: text".into()
            }
        );
        assert_eq!(addresses(&last), [("", "q", "t")]);
    }

    #[test]
    fn whoever_asks_hears_of_a_failed_attempt_where_the_reply_will_come() {
        let job = accepted(Incoming {
            reply_to: Some("q".into()),
            interim: true,
            ..incoming(r#"{"func":"f","tid":"t","resp_exchange":"x","resp_routing_key":"k"}"#)
        });
        let plan = planned(&job, &failed());
        let Some(Publication::Reply { to, body, .. }) = &plan.first else {
            panic!("{plan:?}")
        };
        assert_eq!((to.exchange.as_str(), to.routing_key.as_str()), ("", "q"));
        let next = Next {
            attempt: 1,
            of: 2,
            after: Duration::from_secs(2),
        };
        assert_eq!(
            message::Reply::decode(body),
            Ok(message::Heard::Retry(Failure::new("E", "text"), Some(next)))
        );
        let last = Job {
            marks: Marks {
                attempt: 2,
                crashes: 0,
            },
            ..job
        };
        let plan = planned(&last, &failed());
        assert_eq!((plan.first.as_ref(), addresses(&plan).len()), (None, 2));
    }

    #[test]
    fn the_sender_may_say_how_often_it_is_tried_again() {
        let never = accepted(Incoming {
            max_retries: Some(0),
            ..incoming(r#"{"func":"f"}"#)
        });
        assert!(matches!(
            planned(&never, &failed()).publish[0],
            Publication::Dead { .. }
        ));
    }

    #[test]
    fn a_body_that_is_no_task_message_is_dead_and_its_sender_hears_why() {
        let bad = Incoming {
            reply_to: Some("q".into()),
            correlation_id: Some("c".into()),
            ..incoming("[1]")
        };
        let (job, outcome) = accept(bad, 1000);
        let plan = planned(&job, &outcome.expect("refused"));
        let error = "Refused: body must be a JSON object, found an array".into();
        assert_eq!(
            plan.publish[0],
            Publication::Dead {
                reason: Reason::Malformed,
                error
            }
        );
        assert_eq!(addresses(&plan), [("", "q", "c")]);
        assert_eq!(
            (job.body(), job.tid.as_str(), job.func()),
            (b"[1]".as_slice(), "c", "?")
        );
    }

    #[test]
    fn a_body_that_is_too_large_is_not_even_looked_at() {
        let (job, outcome) = accept(incoming(&"x".repeat(1001)), 1000);
        assert!(matches!(
            outcome,
            Some(Outcome::Refused {
                reason: Reason::TooLarge,
                ..
            })
        ));
        assert_eq!(job.body().len(), 1001);
    }

    fn run(tid: &str) -> Run {
        Run {
            tid: tid.into(),
            attempt: 1,
        }
    }

    #[test]
    fn a_task_that_runs_through_a_lost_connection_is_not_run_twice() {
        let (mut ledger, now, t) = (Ledger::default(), Instant::now(), run("t"));
        assert_eq!(ledger.arrive(&t, false, "first", now), Arrival::Run);
        assert_eq!(
            ledger.arrive(&t, true, "second", now),
            Arrival::Adopted("first")
        );
        assert_eq!(
            ledger.settled(&t, now),
            Some("second"),
            "the ack goes to the valid delivery"
        );
        assert_eq!(
            ledger.arrive(&t, true, "third", now),
            Arrival::Ended("third")
        );
        assert_eq!((ledger.settled(&t, now), ledger.running()), (None, 0));
    }

    #[test]
    fn a_redelivery_that_this_process_does_not_know_runs() {
        let mut ledger = Ledger::default();
        assert_eq!(
            ledger.arrive(&run("t"), true, (), Instant::now()),
            Arrival::Run
        );
    }

    #[test]
    fn the_copy_of_a_retry_is_not_taken_for_its_original() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        ledger.arrive(&run("t"), false, 1, now);
        ledger.settled(&run("t"), now);
        let second = Run {
            attempt: 2,
            ..run("t")
        };
        assert_eq!(ledger.arrive(&second, true, 2, now), Arrival::Run);
    }

    #[test]
    fn an_id_used_twice_is_two_tasks() {
        let (mut ledger, now, t) = (Ledger::default(), Instant::now(), run("t"));
        assert_eq!(ledger.arrive(&t, false, 1, now), Arrival::Run);
        assert_eq!(ledger.arrive(&t, false, 2, now), Arrival::Twin(2));
        assert_eq!(ledger.settled(&t, now), Some(1));
        assert_eq!(ledger.arrive(&t, false, 3, now), Arrival::Run);
        assert_eq!(
            ledger.arrive(&t, true, 4, now),
            Arrival::Adopted(3),
            "it is the one that runs, not the one that ended"
        );
    }

    #[test]
    fn what_could_not_be_settled_runs_again() {
        let (mut ledger, now, t) = (Ledger::default(), Instant::now(), run("t"));
        ledger.arrive(&t, false, 1, now);
        assert_eq!(ledger.abandoned(&t), Some(1));
        assert_eq!(ledger.arrive(&t, true, 2, now), Arrival::Run);
    }

    #[test]
    fn ended_runs_are_forgotten_after_a_while_and_beyond_a_number() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        for n in 0..=REMEMBERED {
            ledger.arrive(&run(&n.to_string()), false, n, now);
            ledger.settled(&run(&n.to_string()), now);
        }
        assert_eq!(
            ledger.arrive(&run("0"), true, 0, now),
            Arrival::Run,
            "one too many, so the oldest is gone"
        );
        assert_eq!(ledger.arrive(&run("1"), true, 1, now), Arrival::Ended(1));
        assert_eq!(
            ledger.arrive(&run("1"), true, 1, now + REMEMBER_FOR),
            Arrival::Run
        );
        assert_eq!((ledger.ended.len(), ledger.order.len()), (0, 0));
    }
}
