//! From a delivery to its ack, on the kernel: one task each, which waits for a worker, runs the function there, publishes what
//! [`plan`] says, and acks when all of it is confirmed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use amqp::client::{Delivery, Message};
use amqp::error::{EncodeError, ReplyCode};
use amqp::wire::{Properties, Props, PropsBuf, TableBuf, Value};
use kernel::Interrupt;
use kernel::sync::Event;

use crate::config::Config;
use crate::deliver::{Arrival, Incoming, Job, Ledger, Plan, Publication, Run, accept, plan};
use crate::message::{self, Failure, RespondTo};
use crate::outbox::{Fate, Outbox, Pause};
use crate::outcome::{Outcome, Settlement};
use crate::pool::{Task, Workers};
use crate::retry::Policy;
use crate::stats::Stats;
use crate::topology;

/// Which attempt a message is, from 1.
pub(crate) const ATTEMPT: &str = "x-olive-attempt";
/// How many attempts ended with a dead worker.
pub(crate) const CRASHES: &str = "x-olive-crashes";
/// Asks for a reply to each failed attempt.
pub(crate) const INTERIM: &str = "x-olive-interim";
/// How many retries the sender grants.
pub(crate) const MAX_RETRIES: &str = "x-olive-max-retries";
/// Why a message is in the dead queue, and what went wrong.
const REASON: &str = "x-olive-reason";
const ERROR: &str = "x-olive-error";

/// Delays from here on are spent at the broker, on the ladder; shorter ones and fractions here.
const LADDER_FROM: Duration = Duration::from_secs(1);

/// What takes the deliveries of an app.
#[derive(Debug)]
pub(crate) struct Dispatch {
    pub(crate) config: Config,
    pub(crate) workers: Workers,
    pub(crate) outbox: Outbox,
    pub(crate) stats: Stats,
    policy: Policy,
    ledger: RefCell<Ledger<Delivery>>,
    /// Deliveries between their start in a worker and their ack.
    active: Cell<usize>,
    /// Set while there are none.
    idle: Event,
}

impl Dispatch {
    pub(crate) fn new(config: Config, workers: Workers) -> Self {
        let idle = Event::new();
        idle.set();
        Self {
            policy: config.policy(),
            config,
            workers,
            outbox: Outbox::default(),
            stats: Stats::default(),
            ledger: RefCell::default(),
            active: Cell::new(0),
            idle,
        }
    }

    /// How many tasks run or are being settled.
    pub(crate) fn active(&self) -> usize {
        self.active.get()
    }

    /// Waits until no task runs.
    ///
    /// # Errors
    /// The caller's interrupt.
    pub(crate) async fn idle(&self) -> Result<(), Interrupt> {
        self.idle.wait().await
    }

    /// Takes a delivery; the rest happens in a task of the kernel.
    pub(crate) fn take(self: &Rc<Self>, mut delivery: Delivery) {
        self.stats.received();
        let body = delivery.take_body();
        let (job, refused) = accept(incoming(body, delivery.props()), self.config.max_body.0);
        let run = Run {
            tid: job.tid.clone(),
            attempt: job.marks.attempt,
        };
        let redelivered = delivery.is_redelivered();
        let now = kernel::now();
        let arrival = self
            .ledger
            .borrow_mut()
            .arrive(&run, redelivered, delivery, now);
        let twin = match arrival {
            Arrival::Run => None,
            Arrival::Twin(delivery) => Some(delivery),
            Arrival::Adopted(_) => {
                log::debug!("task {}: goes on under its new delivery", job.tid);
                return;
            }
            Arrival::Ended(delivery) => {
                log::debug!("task {}: ended before, acked", job.tid);
                delivery.ack();
                return;
            }
        };
        let this = self.clone();
        kernel::spawn(async move {
            // An interrupt means that the app leaves. What is not acked then, the broker delivers again.
            let _ = this.see_through(job, refused, run, twin).await;
        });
    }

    async fn see_through(
        &self,
        job: Job,
        refused: Option<Outcome>,
        run: Run,
        twin: Option<Delivery>,
    ) -> Result<(), Interrupt> {
        let (_active, outcome) = match (&job.message, refused) {
            (Ok(message), None) => {
                let lane = self.workers.lane(&message.func);
                let Some(place) = self.workers.place(&lane).await else {
                    // Back to the queue with it, for another app: this one starts nothing any more.
                    self.ledger.borrow_mut().abandoned(&run);
                    return Ok(());
                };
                let active = Active::new(self);
                let task = Task {
                    message: message.clone(),
                    attempt: job.marks.attempt,
                    timeout: message.timeout.or(self.config.task_timeout),
                    soft: self.config.soft_timeout,
                };
                let outcome = self.workers.run(lane, task).await?;
                drop(place);
                (active, outcome)
            }
            (_, Some(outcome)) => (Active::new(self), outcome),
            (Err(_), None) => unreachable!("what is no task message is refused"),
        };
        self.settle(&job, self.bounded(outcome), &run, twin.as_ref())
            .await?;
        let delivery = match twin {
            Some(delivery) => Some(delivery),
            None => self.ledger.borrow_mut().settled(&run, kernel::now()),
        };
        if let Some(delivery) = delivery {
            delivery.ack();
        }
        Ok(())
    }

    /// A result that no broker would take is a failure.
    fn bounded(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Done(result) if result.len() > self.config.max_body.0 => {
                let text = format!(
                    "result of {} bytes, olive_amqp_max_body allows {}",
                    result.len(),
                    self.config.max_body.0
                );
                Outcome::Permanent(Failure::new("ResultTooLarge", text))
            }
            outcome => outcome,
        }
    }

    /// Brings everything that follows from an outcome to the broker. After it, the delivery may be acked.
    async fn settle(
        &self,
        job: &Job,
        outcome: Outcome,
        run: &Run,
        twin: Option<&Delivery>,
    ) -> Result<(), Interrupt> {
        let plan = plan(
            job,
            &outcome,
            &self.policy,
            fastrand::f64(),
            SystemTime::now(),
        );
        report(job, &outcome, &plan);
        let Plan {
            first,
            wait,
            publish,
            settlement,
        } = plan;
        if let Some(first) = &first {
            self.publish(job, first, Duration::ZERO, run, twin).await?;
        }
        for publication in &publish {
            self.publish(job, publication, wait, run, twin).await?;
        }
        self.stats.settled(&settlement);
        Ok(())
    }

    async fn publish(
        &self,
        job: &Job,
        publication: &Publication,
        wait: Duration,
        run: &Run,
        twin: Option<&Delivery>,
    ) -> Result<(), Interrupt> {
        let copy = |headers: &[(&str, Value<'_>)]| {
            let ledger = self.ledger.borrow();
            let delivery = twin.or_else(|| ledger.delivery(run));
            let props = delivery.map_or(Props::EMPTY, Delivery::props);
            again(props, headers)
        };
        match publication {
            Publication::Reply {
                to,
                correlation_id,
                body,
            } => self.reply(job, to, correlation_id, body).await,
            Publication::Again { marks } => {
                let props = copy(&[
                    (ATTEMPT, i64::from(marks.attempt).into()),
                    (CRASHES, i64::from(marks.crashes).into()),
                ]);
                self.delay(job, &props, wait).await
            }
            Publication::Dead { reason, error } => {
                let props = copy(&[
                    (ATTEMPT, i64::from(job.marks.attempt).into()),
                    (CRASHES, i64::from(job.marks.crashes).into()),
                    (REASON, reason.label().into()),
                    (ERROR, error.as_str().into()),
                ]);
                let queue = &self.config.queue_name.0;
                let dead = topology::dead(queue);
                let mut pause = Pause::default();
                loop {
                    self.outbox.need_dead_queue(queue).await?;
                    if self.copy_to("", &dead, &props, job).await? {
                        return Ok(());
                    }
                    self.outbox.forget_declared();
                    pause.wait().await?;
                }
            }
        }
    }

    /// Publishes a copy of the task that comes back after `wait`.
    async fn delay(&self, job: &Job, props: &PropsBuf, wait: Duration) -> Result<(), Interrupt> {
        let queue = &self.config.queue_name.0;
        let mut pause = Pause::default();
        let (mut here, mut there) = (wait, Duration::ZERO);
        if wait >= LADDER_FROM && self.outbox.need_ladder(queue).await? {
            there = Duration::from_secs(wait.as_secs());
            here = wait - there;
        }
        if !here.is_zero() {
            kernel::sleep(here).await?;
        }
        loop {
            let route = if there.is_zero() {
                None
            } else {
                topology::delayed(there, queue)
            };
            let (exchange, key) = route.unwrap_or_else(|| (String::new(), queue.clone()));
            if self.copy_to(&exchange, &key, props, job).await? {
                return Ok(());
            }
            log::warn!(
                "task {}: its next attempt finds no queue; trying again",
                job.tid
            );
            pause.wait().await?;
            self.outbox.forget_declared();
            if !there.is_zero() && !self.outbox.need_ladder(queue).await? {
                there = Duration::ZERO;
            }
        }
    }

    /// Publishes a copy of the task. Whether a queue has it.
    async fn copy_to(
        &self,
        exchange: &str,
        key: &str,
        props: &PropsBuf,
        job: &Job,
    ) -> Result<bool, Interrupt> {
        let body = job.body();
        let message = Message::new(body).exchange(exchange).key(key).mandatory();
        let fate = self
            .outbox
            .publish(exchange, body.len(), message.properties(props))
            .await?;
        match fate {
            Fate::Taken => return Ok(true),
            Fate::Unroutable => {}
            Fate::Refused(reason) => {
                log::warn!("task {}: the broker refuses a copy: {reason}", job.tid)
            }
            Fate::Unsendable(why) => {
                // Its own headers leave no room for ours; without them it can go.
                log::warn!("task {}: a copy goes without its headers: {why}", job.tid);
                let bare = again(
                    Props::EMPTY,
                    &[(ATTEMPT, i64::from(job.marks.attempt + 1).into())],
                );
                let fate = self
                    .outbox
                    .publish(exchange, body.len(), message.properties(&bare))
                    .await?;
                return Ok(matches!(fate, Fate::Taken));
            }
        }
        Ok(false)
    }

    async fn reply(
        &self,
        job: &Job,
        to: &RespondTo,
        correlation_id: &str,
        body: &[u8],
    ) -> Result<(), Interrupt> {
        let properties = Properties {
            content_type: Some(message::REPLY_CONTENT_TYPE),
            content_encoding: Some("utf-8"),
            correlation_id: Some(correlation_id),
            // A queue named by reply_to goes with its reader; an exchange of the sender's may lead to one that stays.
            delivery_mode: Some(if to.exchange.is_empty() { 1 } else { 2 }),
            ..Properties::default()
        };
        let mut pause = Pause::default();
        let too_large;
        let mut body = body;
        loop {
            let message = Message::new(body)
                .exchange(&to.exchange)
                .key(&to.routing_key)
                .properties(&properties);
            let fate = self.outbox.publish(&to.exchange, body.len(), message);
            match fate.await? {
                Fate::Taken | Fate::Unroutable => return Ok(()),
                Fate::Refused(reason) if reason.code == ReplyCode::NOT_FOUND => {
                    log::warn!("task {}: its reply has nowhere to go: {reason}", job.tid);
                    return Ok(());
                }
                Fate::Refused(reason) if reason.code == ReplyCode::PRECONDITION_FAILED => {
                    log::warn!(
                        "task {}: the broker does not take its reply: {reason}",
                        job.tid
                    );
                    let text = format!("the broker does not take the result: {}", reason.text);
                    let failure = Failure::new("ResultTooLarge", text);
                    too_large = message::failure(&job.tid, &failure, SystemTime::now());
                    body = &too_large;
                    break;
                }
                Fate::Refused(reason) => {
                    log::warn!(
                        "task {}: the broker refuses its reply, trying again: {reason}",
                        job.tid
                    );
                }
                Fate::Unsendable(why) => {
                    log::warn!("task {}: its reply cannot be sent: {why}", job.tid);
                    return Ok(());
                }
            }
            pause.wait().await?;
        }
        let message = Message::new(body)
            .exchange(&to.exchange)
            .key(&to.routing_key)
            .properties(&properties);
        self.outbox
            .publish(&to.exchange, body.len(), message)
            .await
            .map(drop)
    }
}

/// Counts a task as active while it lives.
struct Active<'a>(&'a Dispatch);

impl<'a> Active<'a> {
    fn new(dispatch: &'a Dispatch) -> Self {
        dispatch.active.set(dispatch.active.get() + 1);
        dispatch.idle.clear();
        Self(dispatch)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        let left = self.0.active.get() - 1;
        self.0.active.set(left);
        if left == 0 {
            self.0.idle.set();
        }
    }
}

/// A delivery in olive's terms.
fn incoming(body: Vec<u8>, props: Props<'_>) -> Incoming {
    let mut incoming = Incoming {
        body,
        reply_to: props.reply_to().map(str::to_owned),
        correlation_id: props.correlation_id().map(str::to_owned),
        ..Incoming::default()
    };
    let number = |value: Value<'_>| u32::try_from(value.as_int()?).ok();
    for (key, value) in props.headers().unwrap_or_default().iter() {
        match key {
            ATTEMPT => incoming.marks.attempt = number(value).unwrap_or(1).max(1),
            CRASHES => incoming.marks.crashes = number(value).unwrap_or(0),
            INTERIM => incoming.interim = value.as_bool() == Some(true),
            MAX_RETRIES => incoming.max_retries = number(value),
            _ => {}
        }
    }
    incoming
}

/// The properties of a copy: those of the message, with these headers in place of older ones of the same names.
///
/// What the broker would act on is left out: `CC` would send the copy to the other queues once more, `expiration` would let it
/// expire, `user_id` is not ours, and `x-death` tells of queues of the ladder that it has been through, which RabbitMQ would
/// take for a cycle, and drop the message.
fn again(props: Props<'_>, headers: &[(&str, Value<'_>)]) -> PropsBuf {
    let try_again = |with_own: bool| -> Result<PropsBuf, EncodeError> {
        let mut table = TableBuf::new();
        if with_own {
            for (key, value) in props.headers().unwrap_or_default().iter() {
                let is_replaced = headers.iter().any(|(name, _)| *name == key);
                if !is_replaced && !is_for_the_broker(key) {
                    table.insert(key, value)?;
                }
            }
        }
        for (key, value) in headers {
            table.insert(key, *value)?;
        }
        Properties {
            headers: Some(table.as_table()),
            expiration: None,
            user_id: None,
            ..props.to_properties()
        }
        .encode()
    };
    try_again(true)
        .or_else(|_| try_again(false))
        .unwrap_or_default()
}

fn is_for_the_broker(header: &str) -> bool {
    matches!(header, "CC" | "BCC" | "x-death" | "x-delay")
        || header.starts_with("x-first-death-")
        || header.starts_with("x-last-death-")
}

/// One line for an outcome: what went well is for those who look closely.
fn report(job: &Job, outcome: &Outcome, plan: &Plan) {
    let (tid, func, attempt) = (&job.tid, job.func(), job.marks.attempt);
    let why = || {
        outcome
            .answer()
            .err()
            .map_or(String::new(), |f| format!("{}: {}", f.kind, f.message))
    };
    match plan.settlement {
        Settlement::Reply => log::debug!("task {tid} {func}: done (attempt {attempt})"),
        Settlement::Retry { delay, .. } => {
            log::info!(
                "task {tid} {func}: attempt {attempt} failed: {}; again in {:.1} s",
                why(),
                delay.as_secs_f64()
            );
        }
        Settlement::Dead(reason) => {
            log::warn!("task {tid} FAILED: {func}: {} ({})", why(), reason.label());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Marks;

    fn headers(entries: &[(&str, Value<'_>)]) -> TableBuf {
        let mut table = TableBuf::new();
        for (key, value) in entries {
            table.insert(key, *value).unwrap();
        }
        table
    }

    #[test]
    fn a_copy_keeps_the_properties_and_foreign_headers_of_its_message() {
        let table = headers(&[("traceparent", "00-abc".into()), (ATTEMPT, 1_i64.into())]);
        let props = Properties {
            headers: Some(table.as_table()),
            correlation_id: Some("c"),
            reply_to: Some("q"),
            delivery_mode: Some(2),
            ..Properties::default()
        };
        let copy = again(
            props.encode().unwrap().as_props(),
            &[(ATTEMPT, 2_i64.into())],
        );
        let copy = copy.as_props();
        assert_eq!(
            (copy.correlation_id(), copy.reply_to(), copy.delivery_mode()),
            (Some("c"), Some("q"), Some(2))
        );
        let kept: Vec<_> = copy.headers().unwrap().iter().collect();
        assert_eq!(
            kept,
            [
                ("traceparent", Value::from("00-abc")),
                (ATTEMPT, 2_i64.into())
            ]
        );
    }

    #[test]
    fn a_copy_carries_nothing_that_the_broker_would_act_on() {
        let table = headers(&[
            ("CC", "elsewhere".into()),
            ("x-death", "ladder".into()),
            ("x-first-death-queue", "ladder".into()),
        ]);
        let props = Properties {
            headers: Some(table.as_table()),
            expiration: Some("1000"),
            user_id: Some("guest"),
            ..Properties::default()
        };
        let copy = again(props.encode().unwrap().as_props(), &[]);
        let copy = copy.as_props();
        assert_eq!((copy.expiration(), copy.user_id()), (None, None));
        assert!(copy.headers().unwrap().is_empty());
    }

    #[test]
    fn what_earlier_attempts_and_the_sender_left_is_read_from_the_headers() {
        let table = headers(&[
            (ATTEMPT, 3_i64.into()),
            (CRASHES, 1_i64.into()),
            (INTERIM, true.into()),
            (MAX_RETRIES, 0_i64.into()),
        ]);
        let props = Properties {
            headers: Some(table.as_table()),
            ..Properties::default()
        };
        let incoming = incoming(vec![], props.encode().unwrap().as_props());
        assert_eq!(
            incoming.marks,
            Marks {
                attempt: 3,
                crashes: 1
            }
        );
        assert_eq!((incoming.interim, incoming.max_retries), (true, Some(0)));
        let odd = headers(&[(ATTEMPT, (-1_i64).into()), (CRASHES, "many".into())]);
        let props = Properties {
            headers: Some(odd.as_table()),
            ..Properties::default()
        };
        let incoming = super::incoming(vec![], props.encode().unwrap().as_props());
        assert_eq!(incoming.marks, Marks::default());
    }
}
