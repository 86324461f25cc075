//! The task that runs a connection: it alone reads and writes the socket.
//!
//! Handles and driver share [`Shared`]. A user's call appends to the protocol's output and nudges the driver, which has
//! its turn behind all tasks that are ready by then; so what they all queued leaves in one write, the acks merged just before.
//! What arrives is read until the socket is empty, or 256 KiB, then taken apart in one go, and only afterwards, when nothing is
//! borrowed any more, is anybody woken.
//!
//! What must stay true:
//!
//! - `core` and `book` are borrowed within one statement or block, never across an await, and no code of a user's runs meanwhile:
//!   no waker is called and no delivery is dropped (which would settle it).
//! - The driver never waits for the socket to take bytes without reading from it as well.
//! - A peer is found dead only after an attempt to read: a task that kept the kernel busy for long is no proof of anything.
//! - Whatever ends the driver, everybody who waits is told: [`Shared::end`] runs also when it is dropped.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use kernel::net::Io;
use kernel::sync::{Event as Flag, Promise, Promised, promise};
use kernel::{Interrupt, sleep_until};

use super::Options;
use super::connection::{ConnectionEvent, EventLog};
use super::consumer::Subscription;
use super::error::{Busy, Error, Returned};
use super::publisher::{Message, Verdict, Window};
use crate::error::ReplyCode;
use crate::proto::connection::Connection as Core;
use crate::proto::event::{
    ChannelKey, ConsumerKey, DeliveryKey, Down, Event, Lost, Outcome, Refused, ReqId,
};
use crate::proto::handshake::Tuned;
use crate::proto::unsettled::Settle;
use crate::wire::{GetOk, Method, Props};

/// Read at once before anything else has its turn.
const FAIR_READ: usize = 256 << 10;
/// Room for a read that is worth the call.
const LEAST_READ: usize = 64 << 10;

/// What the handles of a connection and its driver have in common.
pub(super) struct Shared {
    core: RefCell<Core>,
    pub(super) book: RefCell<Book>,
    /// There is something for the driver to do.
    nudge: Flag,
    /// Publishings can be appended.
    has_room: Cell<bool>,
    /// Never set for longer than it takes to wake those who wait: they look for themselves at what has changed.
    changed: Flag,
    /// The handshake is through, or has failed.
    ready: Flag,
    ended: Flag,
    down: OnceCell<Down>,
    /// Bytes that the driver has taken to send and the system has not taken yet.
    unsent: Cell<usize>,
    /// Consumers that hold more than they may: while there are any, nothing is read.
    overfull: Cell<usize>,
    closing: Cell<Closing>,
    /// How many publishings had no answer when the connection ended.
    left_unconfirmed: Cell<usize>,
    /// For properties that are given unencoded.
    scratch: RefCell<Vec<u8>>,
    pub(super) options: Options,
}

/// Whether anything new is taken.
#[derive(Clone, Copy, Debug)]
enum Closing {
    No,
    /// Has to be over after so long.
    Within(Duration),
    /// Confirms, and the server's answer, are waited for until then.
    By(Instant),
}

/// Who waits for what.
#[derive(Default)]
pub(super) struct Book {
    requests: BTreeMap<ReqId, Asked>,
    /// When requests time out. All have the same patience, so the order is that of asking; may name some that are answered.
    deadlines: VecDeque<(Instant, ReqId)>,
    /// By channel number.
    channels: Vec<Option<Rc<ChannelState>>>,
    consumers: BTreeMap<ConsumerKey, Rc<Subscription>>,
    /// Deliveries come in runs for one consumer.
    last_consumer: Option<(ConsumerKey, Rc<Subscription>)>,
    pub(super) logs: Vec<Weak<EventLog>>,
    /// Publishings that will never be answered, because the connection has ended.
    left_unconfirmed: usize,
    /// What to do once nothing is borrowed.
    todo: Vec<Todo>,
}

struct Asked {
    channel: ChannelKey,
    what: &'static str,
    promise: Promise<Result<Reply, Error>>,
}

/// A channel as its handles and the driver see it.
pub(super) struct ChannelState {
    pub(super) key: ChannelKey,
    pub(super) down: OnceCell<Error>,
    /// `channel.flow` with `active` false.
    pub(super) is_stopped: Cell<bool>,
    /// Requests in a row that had no answer in time.
    timeouts: Cell<u32>,
    /// Whether [`Todo::Open`] is noted.
    is_noted: Cell<bool>,
    /// Confirm mode.
    pub(super) window: Option<Window>,
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

enum Todo {
    Answer(Promise<Result<Reply, Error>>, Result<Reply, Error>),
    Wake(Waker),
    /// Confirms have come.
    Open(Rc<ChannelState>),
    Arrived(Rc<Subscription>),
    End(Rc<Subscription>, Error),
    GiveBack(DeliveryKey),
    Log(ConnectionEvent),
    /// Those who wait for room should look again.
    Pulse,
}

impl Shared {
    pub(super) fn new(core: Core, options: Options) -> Rc<Self> {
        Rc::new(Self {
            core: RefCell::new(core),
            book: RefCell::default(),
            nudge: Flag::new(),
            has_room: Cell::new(false),
            changed: Flag::new(),
            ready: Flag::new(),
            ended: Flag::new(),
            down: OnceCell::new(),
            unsent: Cell::new(0),
            overfull: Cell::new(0),
            closing: Cell::new(Closing::No),
            left_unconfirmed: Cell::new(0),
            scratch: RefCell::default(),
            options,
        })
    }

    /// Does something with the protocol, and has the driver send what came of it.
    pub(super) fn with_core<R>(&self, f: impl FnOnce(&mut Core) -> R) -> R {
        let outcome = f(&mut self.core.borrow_mut());
        self.nudge.set();
        outcome
    }

    pub(super) fn peek<R>(&self, f: impl FnOnce(&Core) -> R) -> R {
        f(&self.core.borrow())
    }

    pub(super) fn down(&self) -> Option<&Down> {
        self.down.get()
    }

    pub(super) fn is_closing(&self) -> bool {
        !matches!(self.closing.get(), Closing::No)
    }

    /// Why nothing can be asked any more, if that is so.
    pub(super) fn check_open(&self) -> Result<(), Error> {
        match self.down.get() {
            Some(down) => Err(down.clone().into()),
            None if self.is_closing() => Err(Error::Closed),
            None => Ok(()),
        }
    }

    /// Waits for the end of the handshake.
    pub(super) async fn up(&self) -> Result<Tuned, Error> {
        self.ready.wait().await?;
        self.peek(Core::tuned)
            .ok_or_else(|| self.down().cloned().unwrap_or(Down::ClosedByUs).into())
    }

    /// Waits for the end of the connection.
    pub(super) async fn ended(&self) -> Result<&Down, Interrupt> {
        self.ended.wait().await?;
        Ok(self.down().expect("set before the flag"))
    }

    /// Asks the server for something. What `ask` does to the protocol is undone if the request is dropped.
    pub(super) fn request(
        self: &Rc<Self>,
        what: &'static str,
        channel: ChannelKey,
        ask: impl FnOnce(&mut Core) -> Result<ReqId, Refused>,
    ) -> Result<Request, Error> {
        let id = self.with_core(ask)?;
        let (promise, promised) = promise();
        let asked = Asked {
            channel,
            what,
            promise,
        };
        let mut book = self.book.borrow_mut();
        book.requests.insert(id, asked);
        let deadline = kernel::now() + self.options.rpc_timeout;
        book.deadlines.push_back((deadline, id));
        Ok(Request {
            shared: Rc::clone(self),
            id,
            what,
            promised,
            is_answered: false,
        })
    }

    /// Appends a message if that is possible now.
    pub(super) fn publish(
        &self,
        channel: &ChannelState,
        message: &Message<'_>,
    ) -> Result<Option<u64>, Error> {
        if !self.has_room.get() || self.is_closing() || channel.is_stopped.get() {
            self.check_open()?;
            if let Some(error) = channel.down.get() {
                return Err(error.clone());
            }
            let is_blocked = channel.is_stopped.get() || self.peek(Core::is_blocked);
            return Err(Error::Busy(if is_blocked {
                Busy::Blocked
            } else {
                Busy::HighWater
            }));
        }
        let mut core = self.core.borrow_mut();
        let put = |core: &mut Core, props: &[u8]| {
            core.publish(channel.key, &message.publish, props, message.body)
        };
        let published = match message.props {
            super::publisher::MessageProps::Encoded(props) => put(&mut core, props.as_bytes()),
            super::publisher::MessageProps::Built(properties) => {
                let mut scratch = self.scratch.borrow_mut();
                scratch.clear();
                properties.encode_into(&mut scratch)?;
                put(&mut core, &scratch)
            }
        };
        let queued = core.output_len();
        drop(core);
        let seq = published.map_err(|refused| self.refused(refused, channel))?;
        if queued + self.unsent.get() > self.options.high_water {
            self.has_room.set(false);
        }
        self.nudge.set();
        Ok(seq)
    }

    /// The best explanation of why the protocol refused something on a channel.
    pub(super) fn refused(&self, refused: Refused, channel: &ChannelState) -> Error {
        match (refused, self.down(), channel.down.get()) {
            (Refused::NotOpen | Refused::ChannelGone, Some(down), _) => down.clone().into(),
            (Refused::NotOpen | Refused::ChannelGone, None, Some(error)) => error.clone(),
            (refused, ..) => refused.into(),
        }
    }

    /// Waits until it is worth trying to publish again: there is room, or there never will be. Others may be quicker.
    pub(super) async fn room(&self, channel: &ChannelState) -> Result<(), Interrupt> {
        while (!self.has_room.get() || channel.is_stopped.get())
            && channel.down.get().is_none()
            && self.check_open().is_ok()
        {
            self.changed.wait().await?;
        }
        Ok(())
    }

    /// Wakes all who wait for room.
    fn pulse(&self) {
        self.changed.set();
        self.changed.clear();
    }

    pub(super) fn settle(&self, key: DeliveryKey, how: Settle) -> bool {
        let settled = self.core.borrow_mut().settle(key, how);
        if settled {
            self.nudge.set();
        }
        settled
    }

    /// A consumer holds more than it may, or does no longer.
    pub(super) fn set_overfull(&self, is_overfull: bool) {
        let count = self.overfull.get();
        if is_overfull {
            self.overfull.set(count + 1);
        } else {
            self.overfull.set(count.saturating_sub(1));
            if count == 1 {
                self.nudge.set();
            }
        }
    }

    pub(super) fn add_channel(&self, state: &Rc<ChannelState>) {
        let mut book = self.book.borrow_mut();
        let at = usize::from(state.key.id());
        if book.channels.len() <= at {
            book.channels.resize_with(at + 1, || None);
        }
        book.channels[at] = Some(Rc::clone(state));
    }

    pub(super) fn remove_channel(&self, key: ChannelKey) {
        let mut book = self.book.borrow_mut();
        if let Some(slot) = book.channels.get_mut(usize::from(key.id()))
            && slot.as_ref().is_some_and(|state| state.key == key)
        {
            *slot = None;
        }
    }

    pub(super) fn add_consumer(&self, key: ConsumerKey, subscription: &Rc<Subscription>) {
        let mut book = self.book.borrow_mut();
        book.consumers.insert(key, Rc::clone(subscription));
    }

    pub(super) fn remove_consumer(&self, key: ConsumerKey) {
        let mut book = self.book.borrow_mut();
        let last = book.last_consumer.take_if(|(last, _)| *last == key);
        let removed = book.consumers.remove(&key);
        drop(book);
        // They may hold deliveries, which settle themselves.
        drop((last, removed));
    }

    /// Starts to close; the driver does the rest. A second call changes nothing.
    pub(super) fn start_closing(&self, patience: Duration) {
        if !self.is_closing() {
            self.closing.set(Closing::Within(patience));
            self.nudge.set();
            self.pulse();
        }
    }

    pub(super) fn left_unconfirmed(&self) -> usize {
        self.left_unconfirmed.get()
    }

    /// Takes in what was read; answers how many bytes it used.
    fn feed(&self, bytes: &[u8], now: Instant) -> usize {
        self.with_sink(|core, sink| core.feed(bytes, now, sink))
    }

    /// Lets the protocol do something that may have events.
    fn with_sink<R>(&self, f: impl FnOnce(&mut Core, &mut dyn FnMut(Event<'_>)) -> R) -> R {
        let outcome = {
            let mut core = self.core.borrow_mut();
            let mut book = self.book.borrow_mut();
            f(&mut core, &mut |event| book.note(event, &self.down))
        };
        self.catch_up();
        outcome
    }

    /// Does what the events ask for, now that nothing is borrowed.
    fn catch_up(&self) {
        let mut todo = std::mem::take(&mut self.book.borrow_mut().todo);
        for what in todo.drain(..) {
            match what {
                Todo::Answer(promise, answer) => drop(promise.keep(answer)),
                Todo::Wake(waker) => waker.wake(),
                Todo::Open(state) => {
                    state.is_noted.set(false);
                    if let Some(window) = &state.window {
                        window.open();
                    }
                }
                Todo::Arrived(subscription) => subscription.arrived(),
                Todo::End(subscription, error) => subscription.end(error),
                Todo::GiveBack(key) => {
                    self.settle(key, Settle::Nack { requeue: true });
                }
                Todo::Pulse => self.pulse(),
                Todo::Log(event) => {
                    let logs = std::mem::take(&mut self.book.borrow_mut().logs);
                    let live = logs.into_iter().filter(|log| {
                        let log = log.upgrade();
                        log.map(|log| log.push(event.clone())).is_some()
                    });
                    let live: Vec<_> = live.collect();
                    self.book.borrow_mut().logs.extend(live);
                }
            }
        }
        // Keep the room; whatever came meanwhile goes first the next time.
        let mut book = self.book.borrow_mut();
        if book.todo.is_empty() {
            book.todo = todo;
        }
        drop(book);
        if self.down.get().is_some() || self.peek(|core| core.tuned().is_some()) {
            self.ready.set();
        }
        self.update_room();
    }

    /// Lets publishers go on below the low-water mark, and stops them while the server asks for that.
    fn update_room(&self) {
        let (is_blocked, is_open, queued) =
            self.peek(|core| (core.is_blocked(), core.tuned().is_some(), core.output_len()));
        if is_blocked || !is_open {
            self.has_room.set(false);
        } else if queued + self.unsent.get() <= self.options.high_water / 2
            && !self.has_room.replace(true)
        {
            self.pulse();
        }
    }

    /// What is due at `now`; only after an attempt to read.
    fn tick(&self, now: Instant) {
        if self.overfull.get() > 0 {
            self.core.borrow_mut().not_reading(now);
        }
        self.with_sink(|core, sink| core.tick(now, sink));
        self.time_out_requests(now);
    }

    fn time_out_requests(&self, now: Instant) {
        loop {
            let mut book = self.book.borrow_mut();
            if book.next_timeout().is_none_or(|at| at > now) {
                return;
            }
            let due = book.deadlines.pop_front();
            let asked = due.and_then(|(_, id)| Some((id, book.requests.remove(&id)?)));
            let Some((id, asked)) = asked else { return };
            let state = book.channel(asked.channel).map(Rc::clone);
            drop(book);
            self.core.borrow_mut().abandon(id);
            let after = self.options.rpc_timeout;
            let what = asked.what;
            drop(asked.promise.keep(Err(Error::Timeout { what, after })));
            // One late answer may be a slow server; after two the channel is not to be trusted.
            if let Some(state) = state {
                state.timeouts.set(state.timeouts.get() + 1);
                if state.timeouts.get() >= 2 {
                    self.close_channel(&state, Error::ChannelStuck);
                }
            }
        }
    }

    /// Closes a channel without waiting for the answer.
    pub(super) fn close_channel(&self, state: &ChannelState, why: Error) {
        if state.down.get().is_some() {
            return;
        }
        self.with_core(|core| {
            if let Ok(request) = core.close_channel(state.key, ReplyCode::SUCCESS, "bye") {
                core.abandon(request);
            }
        });
        self.channel_closes(state, &why);
    }

    /// Nothing can be done on a channel any more.
    pub(super) fn channel_closes(&self, state: &ChannelState, why: &Error) {
        if state.down.set(why.clone()).is_ok() {
            self.book.borrow_mut().end_consumers(Some(state.key), why);
            self.catch_up();
            self.pulse();
        }
    }

    /// When [`Shared::tick`] and the driver have something to do, whatever the socket brings.
    fn deadline(&self, stalled_since: Option<Instant>) -> Option<Instant> {
        let stall = stalled_since.map(|since| since + self.write_stall());
        let closing = match self.closing.get() {
            Closing::No | Closing::Within(_) => None,
            Closing::By(deadline) => Some(deadline),
        };
        let request = self.book.borrow_mut().next_timeout();
        let core = self.peek(Core::deadline);
        [core, request, stall, closing].into_iter().flatten().min()
    }

    /// How long the peer may refuse to take bytes.
    fn write_stall(&self) -> Duration {
        let heartbeat = self.peek(|core| core.tuned().map_or(0, |tuned| tuned.heartbeat));
        let silence = Duration::from_secs(u64::from(heartbeat) * 2);
        self.options.write_stall.max(silence)
    }

    /// One step of closing; the first is to wait until everything that was queued before has left.
    fn close_step(&self, now: Instant, all_is_sent: bool) {
        let deadline = match self.closing.get() {
            Closing::No => return,
            Closing::Within(patience) => {
                let deadline = now + patience;
                self.closing.set(Closing::By(deadline));
                deadline
            }
            Closing::By(deadline) => deadline,
        };
        let is_late = now >= deadline;
        let (is_open, unconfirmed) =
            self.peek(|core| (core.tuned().is_some(), core.all_unconfirmed()));
        if is_open && (is_late || (unconfirmed == 0 && all_is_sent)) {
            // It is open, so that is not refused.
            let _ = self.with_core(|core| core.close(ReplyCode::SUCCESS, "bye"));
        }
        if is_late || !self.ready.is_set() {
            // The server does not answer in time, or there is no connection yet and so nothing to be polite about.
            self.give_up(Down::ClosedByUs);
        }
    }

    fn give_up(&self, down: Down) {
        self.with_sink(|core, sink| core.give_up(down, sink));
    }

    /// The connection is over, one way or another.
    fn end(&self) {
        if !self.peek(Core::is_down) {
            self.give_up(Down::Io("the task that runs it was ended".to_owned()));
        }
        let mut book = self.book.borrow_mut();
        let gone = std::mem::take(&mut *book);
        self.left_unconfirmed.set(gone.left_unconfirmed);
        drop(book);
        drop(gone);
        self.ready.set();
        self.pulse();
        self.ended.set();
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.core.try_borrow() {
            Ok(core) => core.fmt(f),
            Err(_) => f.write_str("Connection(..)"),
        }
    }
}

impl Book {
    /// When the oldest request that waits times out.
    fn next_timeout(&mut self) -> Option<Instant> {
        while let Some(&(at, id)) = self.deadlines.front() {
            if self.requests.contains_key(&id) {
                return Some(at);
            }
            self.deadlines.pop_front();
        }
        None
    }

    fn channel(&self, key: ChannelKey) -> Option<&Rc<ChannelState>> {
        let state = self.channels.get(usize::from(key.id()))?.as_ref()?;
        (state.key == key).then_some(state)
    }

    #[inline]
    fn consumer(&mut self, key: ConsumerKey) -> Option<&Rc<Subscription>> {
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
    fn note(&mut self, event: Event<'_>, down: &OnceCell<Down>) {
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
                        Outcome::Ack => Verdict::Confirmed,
                        Outcome::Nack => Verdict::Nacked,
                        Outcome::Returned {
                            reason,
                            props,
                            body,
                        } => Verdict::Returned(Box::new(Returned::new(reason, props, &body))),
                        Outcome::Unconfirmed(lost) => {
                            if let Lost::ConnectionDown(_) = lost {
                                self.left_unconfirmed += 1;
                            }
                            Verdict::Lost(Box::new(lost.clone()))
                        }
                    };
                    if let Some(waker) = window.resolve(seq, verdict) {
                        self.todo.push(Todo::Wake(waker));
                    }
                    if !state.is_noted.replace(true) {
                        self.todo.push(Todo::Open(Rc::clone(state)));
                    }
                }
            }
            event => self.note_rare(event, down),
        }
    }

    #[cold]
    fn note_rare(&mut self, event: Event<'_>, ended: &OnceCell<Down>) {
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
                    let queue = subscription.queue().to_owned();
                    let error = Error::ConsumerCancelled { queue };
                    self.todo.push(Todo::End(Rc::clone(subscription), error));
                }
            }
            Event::ChannelDown { channel, reason } => {
                let error = Error::of_channel(reason.clone());
                if let Some(state) = self.channel(channel) {
                    // It may have been given up by us a moment before: the first reason stays.
                    let _ = state.down.set(error.clone());
                }
                self.end_consumers(Some(channel), &error);
                self.todo.push(Todo::Pulse);
                if let Some(slot) = self.channels.get_mut(usize::from(channel.id())) {
                    *slot = None;
                }
            }
            Event::Down(down) => {
                let _ = ended.set(down.clone());
                let error = Error::from(down.clone());
                for state in self.channels.iter().flatten() {
                    let _ = state.down.set(error.clone());
                }
                self.end_consumers(None, &error);
                self.todo
                    .push(Todo::Log(ConnectionEvent::Lost(down.clone())));
            }
        }
    }

    fn answer(&mut self, id: ReqId, answer: Result<Reply, Error>) {
        let Some(asked) = self.requests.remove(&id) else {
            return;
        };
        if let Some(state) = self.channel(asked.channel) {
            state.timeouts.set(0);
        }
        self.todo.push(Todo::Answer(asked.promise, answer));
    }

    /// Ends the consumers of a channel, or all.
    fn end_consumers(&mut self, of: Option<ChannelKey>, error: &Error) {
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

/// A request that waits for its answer. Dropping it abandons it: the answer is consumed in its turn, and what it brings is undone.
pub(super) struct Request {
    shared: Rc<Shared>,
    id: ReqId,
    what: &'static str,
    promised: Promised<Result<Reply, Error>>,
    is_answered: bool,
}

impl Request {
    /// Waits for the answer.
    pub(super) async fn reply(mut self) -> Result<Reply, Error> {
        let outcome = self.promised.wait().await;
        match outcome {
            Ok(answer) => {
                self.is_answered = true;
                answer
            }
            Err(kernel::sync::Broken::Interrupted(interrupt)) => Err(interrupt.into()),
            Err(_) => {
                self.is_answered = true;
                let down = self.shared.down().cloned();
                Err(down.map_or(Error::Closed, Error::from))
            }
        }
    }

    /// Waits for a method, of which `pick` takes what matters.
    pub(super) async fn method<T>(
        self,
        pick: impl FnOnce(Method) -> Option<T>,
    ) -> Result<T, Error> {
        let what = self.what;
        match self.reply().await? {
            Reply::Method(method) => pick(method).ok_or(Error::WrongAnswer { what }),
            Reply::Got(_) => Err(Error::WrongAnswer { what }),
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if self.is_answered {
            return;
        }
        let asked = self.shared.book.borrow_mut().requests.remove(&self.id);
        if asked.is_some() {
            self.shared.with_core(|core| core.abandon(self.id));
        } else if let Some(Ok(Reply::Got(got))) = self.promised.try_take() {
            // It came, but nobody looked.
            self.shared.settle(got.key, Settle::Nack { requeue: true });
        }
        drop(asked);
    }
}

impl ChannelState {
    pub(super) fn new(key: ChannelKey, window: Option<Window>) -> Rc<Self> {
        Rc::new(Self {
            key,
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
            .field("number", &self.key.id())
            .field("down", &self.down.get())
            .finish_non_exhaustive()
    }
}

/// What has been read and not been used yet.
struct Input {
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn new() -> Self {
        Self {
            buf: vec![0; 2 * LEAST_READ],
            start: 0,
            end: 0,
        }
    }

    /// Room for the next read, behind what is left of a frame.
    fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.buf.len() - self.end < LEAST_READ {
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            if self.buf.len() - self.end < LEAST_READ {
                // No frame is longer than agreed upon, so this ends at about that.
                self.buf.resize(self.end + 2 * LEAST_READ, 0);
            }
        }
        &mut self.buf[self.end..]
    }

    fn feed(&mut self, read: usize, shared: &Shared, now: Instant) {
        self.end += read;
        self.start += shared.feed(&self.buf[self.start..self.end], now);
    }
}

/// Bytes on their way into the socket; the protocol appends to a buffer of its own meanwhile.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// Since when the socket has taken nothing.
    stalled_since: Option<Instant>,
}

impl Outgoing {
    /// Room that is kept when all has been sent.
    const KEEP: usize = 1 << 20;

    fn rest(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// Takes what there is to be sent, if the last is gone.
    fn fill(&mut self, shared: &Shared) {
        if self.rest().is_empty() {
            self.bytes.clear();
            self.bytes.shrink_to(Self::KEEP);
            self.sent = 0;
            let mut core = shared.core.borrow_mut();
            core.flush_acks();
            core.take_output(&mut self.bytes);
        }
        shared.unsent.set(self.rest().len());
    }

    /// Gives up on a peer that takes nothing. One that has said so (`connection.blocked`) may take its time.
    fn check_stall(&mut self, shared: &Shared, now: Instant) {
        if shared.peek(Core::is_blocked) {
            self.stalled_since = self.stalled_since.map(|_| now);
        }
        let patience = shared.write_stall();
        if self
            .stalled_since
            .is_some_and(|since| now >= since + patience)
        {
            let secs = patience.as_secs_f64();
            let text = format!("the server has not taken a byte for {secs} s");
            shared.give_up(Down::Io(text));
        }
    }

    fn wrote(&mut self, n: usize, shared: &Shared, now: Instant) {
        self.sent += n;
        self.stalled_since = None;
        shared.unsent.set(self.rest().len());
        shared.core.borrow_mut().wrote(now);
        shared.update_room();
    }
}

/// What the driver was woken by.
enum Woke {
    Wrote(io::Result<usize>),
    Read(io::Result<usize>),
    Nudged,
    Time,
    Interrupted(Interrupt),
}

/// Tells everybody, whatever ends the driver.
struct Guard(Rc<Shared>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Runs a connection until it has ended.
pub(super) async fn drive<T>(io: Io<T>, shared: Rc<Shared>)
where
    T: AsFd,
    for<'a> &'a T: Read + Write,
{
    let guard = Guard(shared);
    let shared = &*guard.0;
    let mut input = Input::new();
    let mut outgoing = Outgoing::default();
    let mut timer = pin!(None::<kernel::traps::SleepUntil>);
    let mut armed: Option<Instant> = None;
    let mut read_in_a_row = 0;
    let mut has_options = false;
    loop {
        shared.nudge.clear();
        outgoing.fill(shared);
        let now = kernel::now();
        shared.close_step(now, outgoing.rest().is_empty());
        if shared.peek(Core::is_down) {
            last_words(&io, &mut outgoing, shared).await;
            return;
        }
        if outgoing.rest().is_empty() {
            // `close_step` may have had something to say.
            outgoing.fill(shared);
        }
        if !has_options && let Some(tuned) = shared.peek(Core::tuned) {
            has_options = true;
            set_user_timeout(&io, u32::from(tuned.heartbeat) * 2);
        }
        if !outgoing.rest().is_empty() {
            outgoing.stalled_since.get_or_insert(now);
        }
        let due = shared.deadline(outgoing.stalled_since);
        if let Some(due) = due
            && armed.is_none_or(|armed| due < armed)
        {
            timer.set(Some(sleep_until(due)));
            armed = Some(due);
        }

        let woke = {
            let wants_write = !outgoing.rest().is_empty();
            let wants_read = shared.overfull.get() == 0;
            let mut write = pin!(io.write(outgoing.rest()));
            let mut read = pin!(io.read(input.space()));
            let mut nudge = pin!(shared.nudge.wait());
            std::future::poll_fn(|cx| {
                if wants_write && let Poll::Ready(wrote) = write.as_mut().poll(cx) {
                    return Poll::Ready(Woke::Wrote(wrote));
                }
                if wants_read && let Poll::Ready(read) = read.as_mut().poll(cx) {
                    return Poll::Ready(Woke::Read(read));
                }
                if let Some(timer) = timer.as_mut().as_pin_mut()
                    && let Poll::Ready(time) = timer.poll(cx)
                {
                    return Poll::Ready(time.map_or_else(Woke::Interrupted, |_| Woke::Time));
                }
                nudge.as_mut().poll(cx).map(|nudged| match nudged {
                    Ok(()) => Woke::Nudged,
                    Err(interrupt) => Woke::Interrupted(interrupt),
                })
            })
            .await
        };
        let now = kernel::now();
        match woke {
            Woke::Wrote(Ok(n)) => {
                outgoing.wrote(n, shared, now);
            }
            Woke::Read(Ok(0)) => {
                shared.with_sink(|core, sink| core.stream_ended(None, sink));
            }
            Woke::Read(Ok(n)) => {
                input.feed(n, shared, now);
                read_in_a_row += n;
                if armed.is_some_and(|at| at <= now) {
                    armed = None;
                    timer.set(None);
                    shared.tick(now);
                    outgoing.check_stall(shared, now);
                }
                if read_in_a_row >= FAIR_READ {
                    read_in_a_row = 0;
                    if let Err(interrupt) = kernel::yield_now().await {
                        shared.give_up(Down::Io(interrupt.to_string()));
                    }
                }
                continue;
            }
            Woke::Wrote(Err(error)) | Woke::Read(Err(error)) => {
                let text = Some(error.to_string());
                shared.with_sink(|core, sink| core.stream_ended(text, sink));
            }
            Woke::Nudged => {}
            Woke::Time => {
                armed = None;
                timer.set(None);
                shared.tick(now);
                outgoing.check_stall(shared, now);
            }
            Woke::Interrupted(interrupt) => {
                shared.give_up(Down::Io(format!("its task was interrupted: {interrupt}")));
            }
        }
        read_in_a_row = 0;
    }
}

/// Sends what there still is to say, the answer to a `connection.close`, if the socket takes it at once.
async fn last_words<T>(io: &Io<T>, outgoing: &mut Outgoing, shared: &Shared)
where
    T: AsFd,
    for<'a> &'a T: Write,
{
    loop {
        outgoing.fill(shared);
        if outgoing.rest().is_empty() {
            return;
        }
        let wrote = {
            let mut write = pin!(io.write(outgoing.rest()));
            std::future::poll_fn(|cx| match write.as_mut().poll(cx) {
                Poll::Ready(Ok(n)) => Poll::Ready(n),
                Poll::Ready(Err(_)) | Poll::Pending => Poll::Ready(0),
            })
            .await
        };
        if wrote == 0 {
            return;
        }
        outgoing.sent += wrote;
    }
}

/// Has the system give up on a peer that acknowledges nothing, where it can.
fn set_user_timeout(io: &impl AsFd, seconds: u32) {
    #[cfg(target_os = "linux")]
    if seconds > 0 {
        let timeout = Some(Duration::from_secs(seconds.into()));
        if let Err(error) = socket2::SockRef::from(io).set_tcp_user_timeout(timeout) {
            log::debug!("TCP_USER_TIMEOUT: {error}");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (io, seconds);
}
