//! Connections come and go, handles stay: what happens between a connection and the next.
//!
//! When a connection is lost, its [`Shared`] lives on without one: channels are *suspended*, deliveries that nobody has taken are
//! dropped (the broker gives them out anew), requests in flight fail, publishings that have no answer wait, and whoever asks
//! for something now waits, too. The task that runs the connection dials until a server answers, puts the new protocol state in the place of
//! the old, and runs that; beside it, a second task, the *carer*, restores what the journal says:
//!
//! 1. exchanges, bindings between them, queues, bindings, on a scratch channel of its own, because an error closes
//!    a channel: what cannot be made again costs that channel, is reported, and leaves all the rest alone;
//! 2. the channels, one by one: prefetch, confirm mode, consumers. A consumer that costs its channel is left out, and the channel
//!    done again;
//! 3. then everything is open again, and publishings that have no answer are made again, before any new ones of the same
//!    publisher;
//! 4. from then on, consumers that the server ends, or that could not be started, are tried again after waits that grow; and channels
//!    whose publishings the server has left without an answer are opened again, as in 2 and 3.
//!
//! What must stay true:
//!
//! - A connection that is lost in the middle of this ends the carer where it is, and the next begins at 1. All that
//!   survives is the journal and the handles, so nothing is done twice on one connection.
//! - What belongs to an earlier connection never speaks on a later one: keys carry the connection's number.
//! - A wait of the carer's is that of a request, which has a deadline; a server that does not answer is lost as well.
//! - Whatever the user drops meanwhile is gone: every step looks for what it restores first.

use std::rc::Rc;
use std::task::Waker;
use std::time::{Duration, Instant};

use kernel::spawn;

use super::book::{ChannelState, Gate, Reply};
use super::connection::ConnectionEvent;
use super::consumer::Subscription;
use super::dial::{Dialer, Link, chance};
use super::driver::{Pipe, drive};
use super::error::Error;
use super::policy::Backoff;
use super::shared::{Shared, heartbeat};
use super::window::Window;
use crate::error::ReplyCode;
use crate::proto::connection::Connection as Core;
use crate::proto::event::{ChannelKey, Down, Lost, Refused};
use crate::proto::topology::Step;
use crate::wire::Method;
use crate::wire::cold::{basic, confirm, exchange, queue, short};

/// Ends everything, whatever ends the task.
struct Guard(Rc<Shared>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Runs a connection, and those that follow it, to the end of the last.
pub(super) async fn run(mut pipe: Pipe, shared: Rc<Shared>, mut dialer: Dialer) {
    let guard = Guard(shared);
    let shared = &guard.0;
    loop {
        drive(&mut pipe, shared).await;
        shared.stop_care();
        drop(pipe);
        if !shared.is_recovering() {
            return;
        }
        pipe = match dial_again(shared, &mut dialer).await {
            Some(pipe) => pipe,
            None => return,
        };
    }
}

/// Dials until a server answers, and takes its connection over. `None` if that was given up.
async fn dial_again(shared: &Shared, dialer: &mut Dialer) -> Option<Pipe> {
    let mut last = None;
    loop {
        let next = shared.policy.as_ref()?.borrow_mut().next_attempt();
        let Some((attempt, wait)) = next else {
            shared.give_up_recovery(last);
            return None;
        };
        log::info!("connecting again in {:.1} s", wait.as_secs_f64());
        shared.log(&ConnectionEvent::Recovering { attempt, wait });
        let dialed = async {
            kernel::sleep(wait).await?;
            if let Some(secret) = shared.secret.take() {
                dialer.set_secret(secret);
            }
            dialer.dial(&shared.options).await
        };
        match or_closed(shared, dialed).await? {
            Ok(link) => return Some(shared.install(link)),
            Err(error) => {
                log::warn!("{error}");
                let is_final = matches!(
                    error,
                    Error::LoginRefused { .. }
                        | Error::VirtualHost { .. }
                        | Error::NoTls
                        | Error::Interrupted(_)
                );
                if is_final {
                    shared.give_up_recovery(Some(error));
                    return None;
                }
                last = Some(error);
            }
        }
    }
}

/// Waits for something, unless the user closes the connection first.
async fn or_closed<T>(shared: &Shared, wanted: impl Future<Output = T>) -> Option<T> {
    let mut wanted = std::pin::pin!(wanted);
    let mut closes = std::pin::pin!(async {
        while !shared.is_closing() {
            shared.nudge.clear();
            shared.nudge.wait().await?;
        }
        Ok::<(), kernel::Interrupt>(())
    });
    std::future::poll_fn(|cx| {
        use std::task::Poll;
        if shared.is_closing() {
            return Poll::Ready(None);
        }
        if let Poll::Ready(value) = wanted.as_mut().poll(cx) {
            return Poll::Ready(Some(value));
        }
        closes.as_mut().poll(cx).map(|_| None)
    })
    .await
}

/// The end of one connection, and the beginning of the next.
impl Shared {
    /// A connection has ended: either everything waits for the next, or there is none.
    pub(super) fn went_down(&self, down: Down) {
        if !self.is_closing()
            && !self.ends.get()
            && let Some(policy) = &self.policy
        {
            // One that was lost before all was restored has not been up at all.
            let up_for = match self.is_recovering() {
                true => Duration::ZERO,
                false => kernel::now().saturating_duration_since(self.up_since.get()),
            };
            if policy.borrow_mut().recovers(&down, up_for) {
                self.suspend(down);
                return;
            }
        }
        self.finish(down.clone(), down.into());
    }

    /// Everything waits for the next connection.
    fn suspend(&self, down: Down) {
        log::warn!("connection lost: {down}");
        let (states, subscriptions) = self.book.borrow_mut().suspend();
        self.lost.replace(Some(down.clone()));
        self.book.borrow_mut().left_unconfirmed = 0;
        self.orphans.take();
        for state in states {
            if self.journal.borrow().is_transactional(state.tag) {
                // What it had not committed is gone, and the user would commit the rest.
                self.channel_lost(&state, Error::Lost(down.clone()));
            }
        }
        for subscription in subscriptions {
            subscription.waits(false);
            subscription.clear();
        }
        self.log(&ConnectionEvent::Lost(down));
        self.pulse();
    }

    /// There will be no other connection: everybody is told.
    fn finish(&self, down: Down, error: Error) {
        if self.down.set(down.clone()).is_err() {
            return;
        }
        let _ = self.gone.set(error.clone());
        self.lost.take();
        let mut book = self.book.borrow_mut();
        let (states, subscriptions) = book.suspend();
        let mut unconfirmed = book.left_unconfirmed;
        drop(book);
        let lost = Lost::ConnectionDown(down.clone());
        for state in states {
            let _ = state.down.set(error.clone());
            unconfirmed += give_up(state.window.as_ref(), &lost);
        }
        self.left_unconfirmed.set(unconfirmed);
        for subscription in subscriptions {
            subscription.end(error.clone());
        }
        self.log(&match error {
            Error::NotRecovered { .. } => ConnectionEvent::GaveUp(error),
            _ => ConnectionEvent::Lost(down),
        });
        self.pulse();
    }

    fn give_up_recovery(&self, last: Option<Error>) {
        if let Some(why) = self.lost.take() {
            let last = last.map(Box::new);
            let error = Error::NotRecovered {
                why: why.clone(),
                last,
            };
            self.finish(why, error);
        }
    }

    /// The task that runs the connection has ended, and with it the connection.
    fn end(&self) {
        self.ends.set(true);
        self.stop_care();
        if self.is_recovering() {
            // Nobody dials any more.
            if self.is_closing() {
                self.finish(Down::ClosedByUs, Error::Closed);
            } else {
                self.give_up_recovery(None);
            }
        } else if !self.peek(Core::is_down) {
            self.give_up(Down::Io("the task that runs it was ended".to_owned()));
        }
        let mut book = self.book.borrow_mut();
        let gone = std::mem::take(&mut *book);
        drop(book);
        for log in gone.logs.iter().filter_map(|log| log.upgrade()) {
            log.finish();
        }
        drop(gone);
        self.pulse();
        self.ended.set();
    }

    /// Takes over a new connection in the place of the one that was lost.
    fn install(&self, link: Link) -> Pipe {
        log::info!("connected again, to {}", link.server);
        let spent = self.core.replace(link.core);
        drop(spent);
        self.unsent.set(0);
        if let Some(reason) = link.blocked {
            self.log(&ConnectionEvent::Blocked(reason));
        }
        self.set_pace();
        self.update_room();
        self.start_care();
        link.pipe
    }

    /// The server has ended a consumer, because its queue is gone or has moved.
    pub(super) fn cancelled(&self, subscription: Rc<Subscription>) {
        if self.policy.is_some() && self.wants(&subscription) {
            let queue = subscription.queue().to_string();
            self.log(&ConnectionEvent::ConsumerLost { queue });
            self.orphans
                .borrow_mut()
                .push(Orphan::consumer(subscription, None));
            self.start_care();
        } else {
            subscription.cancelled();
        }
    }

    /// Whether a consumer is still to be had.
    fn wants(&self, subscription: &Rc<Subscription>) -> bool {
        let (channel, tag) = subscription.names();
        self.book.borrow().has_consumer(subscription)
            && self.journal.borrow().wants_consumer(channel, tag)
    }

    /// Gives up the channel of a publisher, on which the server answers nothing.
    pub(super) fn leave_channel(&self, state: &Rc<ChannelState>, now: Instant) {
        let Some(window) = &state.window else { return };
        let (unconfirmed, wakers) = window.leave(now);
        let channel = state.key.get().id();
        log::warn!("channel {channel} is given up: confirms are late");
        if self.policy.is_none() || self.is_closing() {
            self.close_channel(state, Error::ChannelStuck);
        } else if self.peek(|core| core.tuned().is_some()) {
            self.book.borrow_mut().suspend_channel(state);
            self.with_core(|core| {
                let given_up = "confirms are late";
                if let Ok(request) =
                    core.close_channel(state.key.get(), ReplyCode::SUCCESS, given_up)
                {
                    core.abandon(request);
                }
            });
            let subscriptions = self.book.borrow().consumers_of(state.tag);
            for subscription in subscriptions {
                subscription.clear();
            }
            self.start_care();
        }
        wakers.into_iter().for_each(Waker::wake);
        window.open();
        self.log(&ConnectionEvent::ConfirmsLate {
            channel,
            unconfirmed,
        });
    }

    fn start_care(&self) {
        let Some(shared) = self.me.upgrade() else {
            return;
        };
        self.orphaned.set();
        let mut carer = self.carer.borrow_mut();
        if carer.as_ref().is_none_or(|carer| carer.is_terminated()) {
            let task = spawn(care(shared));
            task.set_name("amqp recovery");
            *carer = Some(task);
        }
    }

    fn stop_care(&self) {
        if let Some(carer) = self.carer.take() {
            carer.abort();
        }
    }

    /// A channel is not restored.
    fn channel_lost(&self, state: &Rc<ChannelState>, error: Error) {
        let lost = match &error {
            Error::ChannelClosed(reason) | Error::AckTimeout(reason) => {
                Lost::ChannelClosed(reason.clone())
            }
            _ => Lost::ChannelClosedByUs,
        };
        let _ = state.down.set(error.clone());
        self.remove_channel(state);
        give_up(state.window.as_ref(), &lost);
        let subscriptions = self.book.borrow().consumers_of(state.tag);
        for subscription in subscriptions {
            subscription.end(error.clone());
        }
        self.pulse();
    }
}

/// Resolves what waits to be published again; answers how many there were.
fn give_up(window: Option<&Window>, lost: &Lost) -> usize {
    let Some(window) = window else { return 0 };
    let (count, wakers) = window.give_up(lost);
    wakers.into_iter().for_each(Waker::wake);
    window.open();
    count
}

/// Restores what was lost, then looks after what is lost later; ends when there is nothing to do.
async fn care(shared: Rc<Shared>) {
    let cared = async {
        if shared.is_recovering() {
            restore(&shared).await?;
            replay(&shared).await?;
        }
        tend(&shared).await
    };
    if let Err(error) = cared.await {
        shared.give_up(Down::Io(format!("recovery: {error}")));
        shared.nudge.set();
    }
}

/// Whether a failure concerns what was asked for and nothing else.
fn is_local(error: &Error) -> bool {
    matches!(error, Error::ChannelClosed(_) | Error::NoChannelLeft(_))
}

async fn restore(shared: &Rc<Shared>) -> Result<(), Error> {
    let mut scratch = Scratch::new(shared);
    let plan = shared.journal.borrow().plan();
    for step in plan {
        let queue = match &step {
            Step::Queue { name, .. } => name.clone(),
            _ => String::new(),
        };
        if let Some(error) = scratch.remake(step).await?
            && !queue.is_empty()
            && is_locked(&error)
        {
            let orphan = Orphan::queue(queue, error);
            shared.orphans.borrow_mut().push(orphan);
        }
    }
    let plan = shared.journal.borrow().plan_of_bindings();
    for step in plan {
        scratch.remake(step).await?;
    }
    let renamed = std::mem::take(&mut scratch.renamed);
    scratch.close().await?;
    loop {
        let next = shared.book.borrow().suspended.first().map(Rc::clone);
        let Some(state) = next else { break };
        restore_channel(shared, &state).await?;
    }
    shared.lost.take();
    shared.up_since.set(kernel::now());
    if let Some(policy) = &shared.policy {
        policy.borrow_mut().recovered();
    }
    shared.book.borrow().open_gates();
    log::info!("recovered");
    shared.log(&ConnectionEvent::Recovered { renamed });
    shared.update_room();
    shared.pulse();
    Ok(())
}

/// Opens a channel again, with all it had but the consumers that wait to be started by themselves.
async fn restore_channel(shared: &Rc<Shared>, state: &Rc<ChannelState>) -> Result<(), Error> {
    'anew: loop {
        if state.down.get().is_some() {
            shared.book.borrow_mut().resumes(state);
            return Ok(());
        }
        let opened = shared.with_core(Core::open_channel);
        let (key, opening) = match opened {
            Ok(opened) => opened,
            Err(refused @ Refused::NoChannelLeft(_)) => {
                shared.channel_lost(state, refused.into());
                return Ok(());
            }
            Err(refused) => return Err(refused.into()),
        };
        // Not before: if this connection has ended already, the next is to find it.
        shared.book.borrow_mut().resumes(state);
        state.key.set(key);
        shared.add_channel(state);
        if let Some(window) = &state.window {
            window.renew();
        }
        let opening = shared.request("channel.open", key, |_| Ok(opening))?;
        let mut outcome = opening.reply().await.map(drop);
        let mut steps = shared
            .journal
            .borrow()
            .plan_of_channel(state.tag)
            .into_iter();
        let mut doing = None;
        while outcome.is_ok()
            && let Some(step) = steps.next()
        {
            if let Step::Consume(consume) = &step {
                let tag = consume.consumer_tag.as_str();
                let subscription = shared.book.borrow().consumer_named(state.tag, tag);
                if subscription.is_some_and(|subscription| subscription.is_waiting()) {
                    continue;
                }
            }
            outcome = redo(shared, state, &step).await;
            doing = Some(step);
        }
        match (outcome, doing) {
            (Ok(()), _) => return Ok(()),
            // The user has closed it meanwhile.
            (Err(_), _) if state.down.get().is_some() => return Ok(()),
            (Err(error), Some(Step::Consume(consume))) if is_local(&error) => {
                consumer_failed(shared, state, consume, error);
                continue 'anew;
            }
            (Err(error), Some(step)) if is_local(&error) => {
                report(shared, step, &error);
                shared.channel_lost(state, error);
                return Ok(());
            }
            (Err(error), _) => return Err(error),
        }
    }
}

/// One thing that belongs to a channel.
async fn redo(shared: &Rc<Shared>, state: &ChannelState, step: &Step) -> Result<(), Error> {
    let key = state.key.get();
    let (what, method) = match step {
        Step::Qos(qos) => (
            "basic.qos",
            Method::Basic(basic::AMQPMethod::Qos(qos.clone())),
        ),
        Step::Confirms => (
            "confirm.select",
            Method::Confirm(confirm::AMQPMethod::Select(confirm::Select {
                nowait: false,
            })),
        ),
        Step::Consume(consume) => return resume(shared, state, consume).await,
        Step::Exchange(_)
        | Step::ExchangeBinding(_)
        | Step::Queue { .. }
        | Step::QueueBinding(_) => return Ok(()),
    };
    let request = shared.request(what, key, |core| core.request(key, &method))?;
    request.reply().await.map(drop)
}

/// Starts a consumer again, if somebody still has it.
async fn resume(
    shared: &Rc<Shared>,
    state: &ChannelState,
    consume: &basic::Consume,
) -> Result<(), Error> {
    let (key, tag) = (state.key.get(), consume.consumer_tag.as_str());
    let Some(subscription) = shared.book.borrow().consumer_named(state.tag, tag) else {
        return Ok(());
    };
    let request = shared.request("basic.consume", key, |core| {
        let (consumer, request) = core.consume(key, consume.clone())?;
        shared
            .book
            .borrow_mut()
            .rename_consumer(&subscription, consumer);
        Ok(request)
    })?;
    // Dropped meanwhile, it leaves the cancelling to us, because this waits for the answer.
    subscription.starts(true);
    let outcome = request.reply().await;
    subscription.starts(false);
    if !shared.book.borrow().has_consumer(&subscription) {
        shared.with_core(|core| core.abandon_consumer(key, subscription.key()));
    }
    outcome.map(drop)
}

/// A consumer cannot be started: it waits to be started by itself, or it is told to the user and is over.
fn consumer_failed(
    shared: &Rc<Shared>,
    state: &Rc<ChannelState>,
    consume: basic::Consume,
    error: Error,
) {
    let subscription = {
        let tag = consume.consumer_tag.as_str();
        shared.book.borrow().consumer_named(state.tag, tag)
    };
    report(shared, Step::Consume(consume), &error);
    let Some(subscription) = subscription else {
        return;
    };
    if may_pass(&error) {
        let orphan = Orphan::consumer(subscription, Some(error));
        shared.orphans.borrow_mut().push(orphan);
    } else {
        give_up_consumer(shared, &subscription, error);
    }
}

fn give_up_consumer(shared: &Shared, subscription: &Rc<Subscription>, error: Error) {
    let (channel, tag) = subscription.names();
    shared.journal.borrow_mut().cancelled(channel, tag);
    subscription.waits(false);
    subscription.end(error);
}

/// Whether what is in the way may go by itself: a queue that is not there may come.
fn may_pass(error: &Error) -> bool {
    error.reply_code() == Some(ReplyCode::NOT_FOUND) || is_locked(error)
}

/// Whether somebody else has it for himself, perhaps the connection that was lost. RabbitMQ has no code of its own for consumers, so the
/// text decides.
fn is_locked(error: &Error) -> bool {
    match error {
        Error::ChannelClosed(reason) => {
            reason.code == ReplyCode::RESOURCE_LOCKED
                || reason.code == ReplyCode::ACCESS_REFUSED
                    && reason.text.contains("in exclusive use")
        }
        _ => false,
    }
}

fn report(shared: &Shared, entity: Step, error: &Error) {
    log::warn!("{entity} was not recovered: {error}");
    let error = error.clone();
    shared.log(&ConnectionEvent::EntityFailed { entity, error });
}

/// Publishes again what has no answer, publisher by publisher.
async fn replay(shared: &Rc<Shared>) -> Result<(), Error> {
    let states = shared.book.borrow().states();
    for state in states {
        replay_on(shared, &state).await?;
    }
    Ok(())
}

async fn replay_on(shared: &Rc<Shared>, state: &Rc<ChannelState>) -> Result<(), Error> {
    if state.gate.get() != Gate::Replaying {
        return Ok(());
    }
    while let Some(window) = &state.window {
        match shared.publish_again(state, window) {
            Ok(true) => {}
            Ok(false) => break,
            Err(Error::Busy(_)) => shared.room_to_replay(state).await?,
            Err(error) => {
                shared.channel_lost(state, error);
                break;
            }
        }
    }
    state.gate.set(Gate::Open);
    shared.pulse();
    Ok(())
}

/// Opens channels again that were given up alone.
async fn reopen(shared: &Rc<Shared>) -> Result<(), Error> {
    loop {
        let next = shared.book.borrow().suspended.first().map(Rc::clone);
        let Some(state) = next else { return Ok(()) };
        restore_channel(shared, &state).await?;
        if state.down.get().is_none() {
            state.gate.set(Gate::Replaying);
            shared.pulse();
            replay_on(shared, &state).await?;
        }
    }
}

/// A consumer or a queue that is to be there again.
pub(super) struct Orphan {
    wanted: Wanted,
    /// What was in its way, if the user has been told.
    told: Option<Error>,
}

enum Wanted {
    Consumer(Rc<Subscription>),
    Queue(String),
}

impl Orphan {
    fn consumer(subscription: Rc<Subscription>, told: Option<Error>) -> Self {
        subscription.waits(true);
        let wanted = Wanted::Consumer(subscription);
        Self { wanted, told }
    }

    fn queue(name: String, told: Error) -> Self {
        Self {
            wanted: Wanted::Queue(name),
            told: Some(told),
        }
    }
}

/// An orphan between two attempts.
struct Waiting {
    orphan: Orphan,
    backoff: Backoff,
    due: Instant,
    /// When it was first found that somebody else has it.
    locked_since: Option<Instant>,
}

/// Looks after what a connection that is up has lost alone: channels at once, consumers and queues after waits that grow.
async fn tend(shared: &Rc<Shared>) -> Result<(), Error> {
    let Some(recovery) = shared.options.recovery else {
        return Ok(());
    };
    let mut waiting: Vec<Waiting> = Vec::new();
    loop {
        shared.orphaned.clear();
        reopen(shared).await?;
        let new = shared.orphans.take();
        let now = kernel::now();
        waiting.extend(new.into_iter().map(|orphan| {
            let mut backoff = Backoff::new(recovery, chance(1));
            let due = now + backoff.next();
            let locked_since = orphan.told.as_ref().filter(|e| is_locked(e)).map(|_| now);
            Waiting {
                orphan,
                backoff,
                due,
                locked_since,
            }
        }));
        let Some(due) = waiting.iter().map(|waiting| waiting.due).min() else {
            return Ok(());
        };
        kernel::ignore_at(due, shared.orphaned.wait()).await?;
        let now = kernel::now();
        for mut this in waiting.extract_if(.., |w| w.due <= now).collect::<Vec<_>>() {
            let attempt = match &this.orphan.wanted {
                Wanted::Consumer(wanted) => {
                    resubscribe(shared, wanted, this.orphan.told.as_ref()).await
                }
                Wanted::Queue(name) => remake_queue(shared, name).await,
            };
            let (entity, error) = match attempt {
                Ok(()) => continue,
                Err(Obstacle::Entity(entity, error)) => (*entity, error),
                Err(Obstacle::Connection(error)) => return Err(error),
            };
            let now = kernel::now();
            this.locked_since = is_locked(&error).then(|| this.locked_since.unwrap_or(now));
            if this
                .locked_since
                .is_some_and(|since| now >= since + lock_patience(shared))
            {
                report(shared, entity, &error);
                if let Wanted::Consumer(wanted) = &this.orphan.wanted {
                    give_up_consumer(shared, wanted, error);
                }
                continue;
            }
            if this.orphan.told.is_none() {
                report(shared, entity, &error);
            }
            this.orphan.told = Some(error);
            this.due = now + this.backoff.next();
            waiting.push(this);
        }
    }
}

/// How long a server may hold something for a connection that was lost. RabbitMQ misses its heartbeats after three at most.
fn lock_patience(shared: &Shared) -> Duration {
    const LEAST: Duration = Duration::from_secs(60);
    LEAST.max(4 * shared.peek(heartbeat))
}

/// What stands in the way of an orphan.
enum Obstacle {
    Entity(Box<Step>, Error),
    Connection(Error),
}

impl Obstacle {
    fn of(entity: Step, error: Error) -> Self {
        match error {
            Error::Timeout { .. } => Self::Entity(entity.into(), error),
            _ if is_local(&error) => Self::Entity(entity.into(), error),
            _ => Self::Connection(error),
        }
    }
}

impl From<Error> for Obstacle {
    fn from(error: Error) -> Self {
        Self::Connection(error)
    }
}

/// One attempt to make an exclusive queue again, with its bindings.
async fn remake_queue(shared: &Rc<Shared>, name: &str) -> Result<(), Obstacle> {
    let Some(step) = shared.journal.borrow().plan_of_queue(name) else {
        // It has been deleted meanwhile.
        return Ok(());
    };
    let mut scratch = Scratch::new(shared);
    if let Err(error) = scratch.make(&step).await {
        return Err(Obstacle::of(step, error));
    }
    scratch.bind(name).await?;
    let queue = name.to_owned();
    shared.log(&ConnectionEvent::QueueRestored { queue });
    Ok(())
}

/// One attempt to start a consumer again, with its queue if that is ours; `told` is what was in the way last.
async fn resubscribe(
    shared: &Rc<Shared>,
    subscription: &Rc<Subscription>,
    told: Option<&Error>,
) -> Result<(), Obstacle> {
    if !shared.wants(subscription) {
        // We have deleted the queue ourselves, perhaps. One that was dropped does not mind.
        subscription.cancelled();
        return Ok(());
    }
    let (channel, tag) = subscription.names();
    let queue = subscription.queue();
    let mut scratch = Scratch::new(shared);
    let plan = shared.journal.borrow().plan_of_queue(&queue);
    let made = match &plan {
        Some(step) => scratch.make(step).await,
        None => scratch.look_for(&queue).await,
    };
    let queue = subscription.queue();
    let steps = shared.journal.borrow().plan_of_consumer(channel, tag);
    let consume = steps.iter().find(|step| step.is_consume()).cloned();
    if let Err(error) = made {
        return Err(match plan.or(consume) {
            Some(entity) => Obstacle::of(entity, error),
            None => Obstacle::Connection(error),
        });
    }
    // Each attempt that is refused costs the channel, and all its consumers with it: rather look first.
    if let (Some(error), Some(Step::Consume(consume))) = (told, &consume)
        && is_locked(error)
        && consume.exclusive
        && scratch.consumers > 0
    {
        return Err(Obstacle::of(Step::Consume(consume.clone()), error.clone()));
    }
    scratch.bind(&queue).await?;
    drop(scratch);

    let state = Rc::clone(subscription.channel());
    // While it is suspended, an error does not end it for the user.
    let gate = state.gate.replace(Gate::Suspended);
    let outcome = resubscribe_on(shared, &state, &steps).await;
    // Lost meanwhile, the connection has suspended it for longer.
    if !shared.is_recovering() {
        state.gate.set(gate);
        shared.pulse();
    }
    match outcome {
        Ok(Started::Runs) => {
            subscription.waits(false);
            let queue = queue.to_string();
            shared.log(&ConnectionEvent::ConsumerRestored { queue });
            Ok(())
        }
        Ok(Started::Refused(step, error)) => Err(Obstacle::of(step, error)),
        Ok(Started::Over) => Ok(()),
        Err(_) if state.down.get().is_some() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What has become of an attempt to start a consumer.
enum Started {
    Runs,
    /// Not now.
    Refused(Step, Error),
    /// It, or its channel, has been dealt with.
    Over,
}

async fn resubscribe_on(
    shared: &Rc<Shared>,
    state: &Rc<ChannelState>,
    steps: &[Step],
) -> Result<Started, Error> {
    for step in steps {
        match redo(shared, state, step).await {
            Ok(()) => {}
            Err(error) if is_local(&error) && state.down.get().is_none() => {
                let started = match step {
                    Step::Consume(_) if may_pass(&error) => Started::Refused(step.clone(), error),
                    Step::Consume(consume) => {
                        consumer_failed(shared, state, consume.clone(), error);
                        Started::Over
                    }
                    _ => Started::Over,
                };
                restore_channel(shared, state).await?;
                return Ok(started);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Started::Runs)
}

/// A channel for what may be refused. The refusal closes it, and the next request opens another.
struct Scratch<'a> {
    shared: &'a Rc<Shared>,
    key: Option<ChannelKey>,
    /// Queues whose names the server chose: what they were, what they are.
    renamed: Vec<(String, String)>,
    /// How many consumers the queue had that was declared last.
    consumers: u32,
}

impl<'a> Scratch<'a> {
    fn new(shared: &'a Rc<Shared>) -> Self {
        Self {
            shared,
            key: None,
            renamed: Vec::new(),
            consumers: 0,
        }
    }

    async fn ask(&mut self, what: &'static str, method: Method) -> Result<Method, Error> {
        let key = match self.key {
            Some(key) => key,
            None => {
                let (key, opening) = self.shared.with_core(Core::open_channel)?;
                self.key = Some(key);
                let opening = self.shared.request("channel.open", key, |_| Ok(opening))?;
                opening.reply().await?;
                key
            }
        };
        let request = self
            .shared
            .request(what, key, |core| core.request(key, &method))?;
        match request.reply().await {
            Ok(Reply::Method(answer)) => Ok(answer),
            Ok(Reply::Got(_)) => Err(Error::WrongAnswer { what }),
            Err(error) => {
                if is_local(&error) {
                    self.key = None;
                }
                Err(error)
            }
        }
    }

    /// Closes it, so that its number is free.
    async fn close(mut self) -> Result<(), Error> {
        let Some(key) = self.key.take() else {
            return Ok(());
        };
        let close = |core: &mut Core| core.close_channel(key, ReplyCode::SUCCESS, "done");
        let request = self.shared.request("channel.close", key, close)?;
        request.reply().await.map(drop)
    }

    /// Makes something again; if it is refused, that is reported, answered, and all right.
    async fn remake(&mut self, step: Step) -> Result<Option<Error>, Error> {
        match self.make(&step).await {
            Ok(()) => Ok(None),
            Err(error) if is_local(&error) => {
                report(self.shared, step, &error);
                Ok(Some(error))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the bindings of a queue again.
    async fn bind(&mut self, queue: &str) -> Result<(), Error> {
        let bindings = self.shared.journal.borrow().plan_of_bindings();
        for step in bindings {
            if matches!(&step, Step::QueueBinding(bind) if bind.queue.as_str() == queue) {
                self.remake(step).await?;
            }
        }
        Ok(())
    }

    /// Makes something again that belongs to no channel.
    async fn make(&mut self, step: &Step) -> Result<(), Error> {
        use exchange::AMQPMethod as Exchange;
        use queue::AMQPMethod as Queue;
        let (what, method) = match step {
            Step::Exchange(declare) => (
                "exchange.declare",
                Method::Exchange(Exchange::Declare(declare.clone())),
            ),
            Step::ExchangeBinding(bind) => (
                "exchange.bind",
                Method::Exchange(Exchange::Bind(bind.clone())),
            ),
            Step::Queue { declare, .. } => (
                "queue.declare",
                Method::Queue(Queue::Declare(declare.clone())),
            ),
            Step::QueueBinding(bind) => ("queue.bind", Method::Queue(Queue::Bind(bind.clone()))),
            Step::Qos(_) | Step::Confirms | Step::Consume(_) => return Ok(()),
        };
        let answer = self.ask(what, method).await?;
        if let (Step::Queue { name, .. }, Method::Queue(Queue::DeclareOk(ok))) = (step, answer) {
            self.consumers = ok.consumer_count;
            let new = ok.queue.as_str();
            if new != name {
                self.shared.journal.borrow_mut().renamed(name, new);
                self.shared.book.borrow().renamed_queue(name, new);
                self.renamed.push((name.clone(), new.to_owned()));
            }
        }
        Ok(())
    }

    /// Whether a queue that is not ours is there.
    async fn look_for(&mut self, name: &str) -> Result<(), Error> {
        let declare = queue::Declare {
            queue: short("queue", name)?,
            passive: true,
            durable: false,
            exclusive: false,
            auto_delete: false,
            nowait: false,
            arguments: Default::default(),
        };
        let declare = Method::Queue(queue::AMQPMethod::Declare(declare));
        let answer = self.ask("queue.declare", declare).await?;
        if let Method::Queue(queue::AMQPMethod::DeclareOk(ok)) = answer {
            self.consumers = ok.consumer_count;
        }
        Ok(())
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.shared.with_core(|core| {
                if let Ok(request) = core.close_channel(key, ReplyCode::SUCCESS, "done") {
                    core.abandon(request);
                }
            });
        }
    }
}
