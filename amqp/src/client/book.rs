//! What the driver notes while the protocol is borrowed: who waits for what, and what to do about an event afterwards.

use std::cell::{Cell, OnceCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::{Rc, Weak};
use std::task::Waker;
use std::time::Instant;

use kernel::sync::Promise;

use super::connection::{ConnectionEvent, EventLog};
use super::consumer::Subscription;
use super::error::{Error, Returned};
use super::window::{Verdict, Window};
use crate::proto::event::{
    ChannelKey, ConsumerKey, DeliveryKey, Down, Event, Lost, Outcome, ReqId,
};
use crate::proto::topology::ChannelTag;
use crate::wire::{GetOk, Method, Props};

/// Who waits for what.
#[derive(Default)]
pub(super) struct Book {
    pub(super) requests: BTreeMap<ReqId, Asked>,
    /// When requests time out. All have the same patience, so the order is that of asking; may name some that are answered.
    pub(super) deadlines: VecDeque<(Instant, ReqId)>,
    /// By channel number.
    pub(super) channels: Vec<Option<Rc<ChannelState>>>,
    /// Channels of a connection that was lost, which have no number until it is recovered.
    pub(super) suspended: Vec<Rc<ChannelState>>,
    pub(super) consumers: BTreeMap<ConsumerKey, Rc<Subscription>>,
    /// Deliveries come in runs for one consumer.
    pub(super) last_consumer: Option<(ConsumerKey, Rc<Subscription>)>,
    pub(super) logs: Vec<Weak<EventLog>>,
    /// Publishings that will never be answered, because the connection has ended.
    pub(super) left_unconfirmed: usize,
    /// Whether a lost connection is made again.
    pub(super) recovers: bool,
    /// What to do once nothing is borrowed.
    pub(super) todo: Vec<Todo>,
}

pub(super) struct Asked {
    pub(super) channel: ChannelKey,
    pub(super) what: &'static str,
    pub(super) promise: Promise<Result<Reply, Error>>,
}

/// A channel as its handles and the driver see it. It outlives the connection if that is recovered.
pub(super) struct ChannelState {
    /// Its name in the journal.
    pub(super) tag: ChannelTag,
    /// What it is on the connection of today.
    pub(super) key: Cell<ChannelKey>,
    pub(super) gate: Cell<Gate>,
    pub(super) down: OnceCell<Error>,
    /// `channel.flow` with `active` false.
    pub(super) is_stopped: Cell<bool>,
    /// Requests in a row that had no answer in time.
    pub(super) timeouts: Cell<u32>,
    /// Whether [`Todo::Open`] is noted.
    pub(super) is_noted: Cell<bool>,
    /// Confirm mode.
    pub(super) window: Option<Window>,
}

/// What a channel can be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    Open,
    /// For all but publishing: what was published before goes first.
    Replaying,
    /// For nothing: the connection is being recovered.
    Suspended,
}

/// The answer to a request.
pub(super) enum Reply {
    Method(Method),
    Got(Box<Got>),
}

/// The message that `basic.get` brought.
pub(super) struct Got {
    pub(super) key: DeliveryKey,
    pub(super) redelivered: bool,
    pub(super) message_count: u32,
    pub(super) exchange: Rc<str>,
    pub(super) routing_key: Rc<str>,
    pub(super) content: Vec<u8>,
    pub(super) body_len: usize,
}

pub(super) enum Todo {
    Answer(Promise<Result<Reply, Error>>, Result<Reply, Error>),
    Wake(Waker),
    /// Confirms have come.
    Open(Rc<ChannelState>),
    Arrived(Rc<Subscription>),
    End(Rc<Subscription>, Error),
    /// The server has ended the consumer.
    Cancelled(Rc<Subscription>),
    GiveBack(DeliveryKey),
    /// A channel is gone for good.
    Forget(ChannelTag),
    Down(Down),
    Log(ConnectionEvent),
    /// Those who wait for room should look again.
    Pulse,
}

impl ChannelState {
    pub(super) fn new(tag: ChannelTag, key: ChannelKey, window: Option<Window>) -> Rc<Self> {
        Rc::new(Self {
            tag,
            key: Cell::new(key),
            gate: Cell::new(Gate::Open),
            down: OnceCell::new(),
            is_stopped: Cell::new(false),
            timeouts: Cell::new(0),
            is_noted: Cell::new(false),
            window,
        })
    }
}

impl std::fmt::Debug for ChannelState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChannelState")
            .field("number", &self.key.get().id())
            .field("down", &self.down.get())
            .finish_non_exhaustive()
    }
}

impl Book {
    /// When the oldest request that waits times out.
    pub(super) fn next_timeout(&mut self) -> Option<Instant> {
        while let Some(&(at, id)) = self.deadlines.front() {
            if self.requests.contains_key(&id) {
                return Some(at);
            }
            self.deadlines.pop_front();
        }
        None
    }

    pub(super) fn channel(&self, key: ChannelKey) -> Option<&Rc<ChannelState>> {
        let state = self.channels.get(usize::from(key.id()))?.as_ref()?;
        (state.key.get() == key).then_some(state)
    }

    #[inline]
    pub(super) fn consumer(&mut self, key: ConsumerKey) -> Option<&Rc<Subscription>> {
        if self
            .last_consumer
            .as_ref()
            .is_none_or(|(last, _)| *last != key)
        {
            let found = self.consumers.get(&key)?;
            self.last_consumer = Some((key, Rc::clone(found)));
        }
        self.last_consumer.as_ref().map(|(_, found)| found)
    }

    /// Notes an event. Runs while the protocol is borrowed, so it wakes nobody and drops nothing of a user's.
    #[inline]
    pub(super) fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Delivery {
                consumer,
                key,
                deliver,
                props,
                body,
            } => match self.consumer(consumer) {
                Some(subscription) => {
                    if subscription.take_in(key, &deliver, props, body) {
                        let subscription = Rc::clone(subscription);
                        self.todo.push(Todo::Arrived(subscription));
                    }
                }
                None => self.todo.push(Todo::GiveBack(key)),
            },
            Event::Confirm {
                channel,
                seq,
                outcome,
            } => {
                let state = self.channels.get(usize::from(channel.id()));
                if let Some(Some(state)) = state
                    && let Some(window) = &state.window
                {
                    let verdict = match outcome {
                        Outcome::Ack => Some(Verdict::Confirmed),
                        Outcome::Nack => Some(Verdict::Nacked),
                        Outcome::Returned {
                            reason,
                            props,
                            body,
                        } => Some(Verdict::Returned(Box::new(Returned::new(
                            reason, props, &body,
                        )))),
                        Outcome::Unconfirmed(Lost::ConnectionDown(_)) if window.replays() => {
                            window.cut(seq);
                            None
                        }
                        Outcome::Unconfirmed(lost) => {
                            if let Lost::ConnectionDown(_) = lost {
                                self.left_unconfirmed += 1;
                            }
                            Some(Verdict::Lost(Box::new(lost.clone())))
                        }
                    };
                    if let Some(waker) = verdict.and_then(|v| window.resolve(seq, v)) {
                        self.todo.push(Todo::Wake(waker));
                    }
                    if !state.is_noted.replace(true) {
                        self.todo.push(Todo::Open(Rc::clone(state)));
                    }
                }
            }
            event => self.note_rare(event),
        }
    }

    #[cold]
    fn note_rare(&mut self, event: Event<'_>) {
        match event {
            Event::Delivery { .. } | Event::Confirm { .. } => {}
            Event::Up(tuned) => log::debug!("connection is open: {tuned:?}"),
            Event::Blocked(reason) => {
                self.todo
                    .push(Todo::Log(ConnectionEvent::Blocked(reason.to_owned())));
            }
            Event::Unblocked => self.todo.push(Todo::Log(ConnectionEvent::Unblocked)),
            Event::Flow { channel, active } => {
                if let Some(state) = self.channel(channel) {
                    state.is_stopped.set(!active);
                    self.todo.push(Todo::Pulse);
                }
            }
            Event::Reply { id, result } => {
                let answer = match result {
                    Ok(method) => Ok(Reply::Method(method)),
                    Err(Lost::ConnectionDown(why)) if self.recovers => {
                        let what = self.requests.get(&id).map_or("request", |asked| asked.what);
                        let why = why.clone();
                        Err(Error::Unanswered { what, why })
                    }
                    Err(lost) => Err(lost.clone().into()),
                };
                self.answer(id, answer);
            }
            Event::Got {
                id,
                key,
                get,
                props,
                body,
            } => {
                if self.requests.contains_key(&id) {
                    let got = got(key, &get, props, &body);
                    self.answer(id, Ok(Reply::Got(Box::new(got))));
                } else {
                    self.todo.push(Todo::GiveBack(key));
                }
            }
            Event::Returned {
                reason,
                props,
                body,
                ..
            } => {
                let returned = Rc::new(Returned::new(reason, props, &body));
                self.todo
                    .push(Todo::Log(ConnectionEvent::Returned(returned)));
            }
            Event::Cancelled { consumer, .. } => {
                if let Some(subscription) = self.consumers.get(&consumer) {
                    self.todo.push(Todo::Cancelled(Rc::clone(subscription)));
                }
            }
            Event::ChannelDown { channel, reason } => {
                // One that is being restored is restored once more, without what it was closed for.
                if let Some(state) = self.channel(channel)
                    && state.gate.get() != Gate::Suspended
                {
                    let error = Error::of_channel(reason.clone());
                    let tag = state.tag;
                    // It may have been given up by us a moment before: the first reason stays.
                    let _ = state.down.set(error.clone());
                    self.end_consumers(Some(channel), &error);
                    self.todo.push(Todo::Forget(tag));
                    self.todo.push(Todo::Pulse);
                }
                if let Some(slot) = self.channels.get_mut(usize::from(channel.id()))
                    && let Some(state) = slot.take()
                    && state.gate.get() == Gate::Suspended
                {
                    self.suspended.push(state);
                }
            }
            Event::Down(down) => self.todo.push(Todo::Down(down.clone())),
        }
    }

    pub(super) fn answer(&mut self, id: ReqId, answer: Result<Reply, Error>) {
        let Some(asked) = self.requests.remove(&id) else {
            return;
        };
        if let Some(state) = self.channel(asked.channel) {
            state.timeouts.set(0);
        }
        self.todo.push(Todo::Answer(asked.promise, answer));
    }

    /// Takes the channels off the connection that was lost. Answers with everything that outlives it.
    pub(super) fn suspend(&mut self) -> (Vec<Rc<ChannelState>>, Vec<Rc<Subscription>>) {
        self.suspended.extend(self.channels.drain(..).flatten());
        for state in &self.suspended {
            state.gate.set(Gate::Suspended);
            state.is_stopped.set(false);
            state.timeouts.set(0);
        }
        let subscriptions = self.consumers.values().map(Rc::clone);
        (self.suspended.clone(), subscriptions.collect())
    }

    /// Takes one channel off a connection that lives.
    pub(super) fn suspend_channel(&mut self, state: &Rc<ChannelState>) {
        state.gate.set(Gate::Suspended);
        state.is_stopped.set(false);
        state.timeouts.set(0);
        let slot = self.channels.get_mut(usize::from(state.key.get().id()));
        if let Some(state) = slot.and_then(Option::take) {
            self.suspended.push(state);
        }
    }

    /// A channel is being restored.
    pub(super) fn resumes(&mut self, state: &ChannelState) {
        self.suspended.retain(|other| other.tag != state.tag);
    }

    /// All is as it was; but publishers wait for what they had published before.
    pub(super) fn open_gates(&self) {
        for state in self.channels.iter().flatten() {
            let replays = |window: &Window| window.to_be_replayed() > 0;
            let is_replaying = state.window.as_ref().is_some_and(replays);
            state.gate.set(if is_replaying {
                Gate::Replaying
            } else {
                Gate::Open
            });
        }
    }

    pub(super) fn states(&self) -> Vec<Rc<ChannelState>> {
        self.channels.iter().flatten().map(Rc::clone).collect()
    }

    pub(super) fn consumers_of(&self, channel: ChannelTag) -> Vec<Rc<Subscription>> {
        let all = self.consumers.values();
        all.filter(|s| s.names().0 == channel)
            .map(Rc::clone)
            .collect()
    }

    pub(super) fn consumer_named(
        &self,
        channel: ChannelTag,
        tag: &str,
    ) -> Option<Rc<Subscription>> {
        let mut all = self.consumers.values();
        all.find(|s| s.names() == (channel, tag)).map(Rc::clone)
    }

    /// Whether somebody still has a consumer.
    pub(super) fn has_consumer(&self, subscription: &Rc<Subscription>) -> bool {
        let found = self.consumers.get(&subscription.key());
        found.is_some_and(|found| Rc::ptr_eq(found, subscription))
    }

    /// A consumer is another on the wire than it was.
    pub(super) fn rename_consumer(&mut self, subscription: &Rc<Subscription>, key: ConsumerKey) {
        self.last_consumer = None;
        self.consumers.remove(&subscription.key());
        subscription.set_key(key);
        self.consumers.insert(key, Rc::clone(subscription));
    }

    pub(super) fn renamed_queue(&self, old: &str, new: &str) {
        for subscription in self.consumers.values() {
            subscription.renamed_queue(old, new);
        }
    }

    /// Ends the consumers of a channel, or all.
    pub(super) fn end_consumers(&mut self, of: Option<ChannelKey>, error: &Error) {
        for subscription in self.consumers.values() {
            if of.is_none_or(|key| subscription.channel_key() == key) {
                self.todo
                    .push(Todo::End(Rc::clone(subscription), error.clone()));
            }
        }
    }
}

fn got(key: DeliveryKey, get: &GetOk<'_>, props: Props<'_>, body: &[u8]) -> Got {
    let mut content = Vec::with_capacity(body.len() + props.as_bytes().len());
    content.extend_from_slice(body);
    content.extend_from_slice(props.as_bytes());
    Got {
        key,
        redelivered: get.redelivered,
        message_count: get.message_count,
        exchange: get.exchange.into(),
        routing_key: get.routing_key.into(),
        content,
        body_len: body.len(),
    }
}
