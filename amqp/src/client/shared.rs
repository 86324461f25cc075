//! What the handles of a connection and its driver have in common.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use kernel::Interrupt;
use kernel::sync::{Event as Flag, promise};

use super::Options;
use super::book::{Asked, Book, ChannelState, Todo};
use super::consumer::Subscription;
use super::error::{Busy, Error};
use super::publisher::{Message, MessageProps};
use super::request::Request;
use crate::error::ReplyCode;
use crate::proto::connection::Connection as Core;
use crate::proto::event::{ChannelKey, ConsumerKey, DeliveryKey, Down, Event, Refused, ReqId};
use crate::proto::handshake::Tuned;
use crate::proto::unsettled::Settle;

/// What the handles of a connection and its driver have in common.
pub(super) struct Shared {
    pub(super) core: RefCell<Core>,
    pub(super) book: RefCell<Book>,
    /// There is something for the driver to do.
    pub(super) nudge: Flag,
    /// Publishings can be appended.
    has_room: Cell<bool>,
    /// Never set for longer than it takes to wake those who wait: they look for themselves at what has changed.
    changed: Flag,
    /// The handshake is through, or has failed.
    pub(super) ready: Flag,
    pub(super) ended: Flag,
    pub(super) down: OnceCell<Down>,
    /// Bytes that the driver has taken to send and the system has not taken yet.
    pub(super) unsent: Cell<usize>,
    /// Consumers that hold more than they may: while there are any, nothing is read.
    pub(super) overfull: Cell<usize>,
    pub(super) closing: Cell<Closing>,
    /// How many publishings had no answer when the connection ended.
    left_unconfirmed: Cell<usize>,
    /// For properties that are given unencoded.
    scratch: RefCell<Vec<u8>>,
    pub(super) options: Options,
}

/// Whether anything new is taken.
#[derive(Clone, Copy, Debug)]
pub(super) enum Closing {
    No,
    /// Has to be over after so long.
    Within(Duration),
    /// Confirms, and the server's answer, are waited for until then.
    By(Instant),
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
            MessageProps::Encoded(props) => put(&mut core, props.as_bytes()),
            MessageProps::Built(properties) => {
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
    pub(super) fn pulse(&self) {
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
    pub(super) fn feed(&self, bytes: &[u8], now: Instant) -> usize {
        self.with_sink(|core, sink| core.feed(bytes, now, sink))
    }

    /// Lets the protocol do something that may have events.
    pub(super) fn with_sink<R>(
        &self,
        f: impl FnOnce(&mut Core, &mut dyn FnMut(Event<'_>)) -> R,
    ) -> R {
        let outcome = {
            let mut core = self.core.borrow_mut();
            let mut book = self.book.borrow_mut();
            f(&mut core, &mut |event| book.note(event, &self.down))
        };
        self.catch_up();
        outcome
    }

    /// Does what the events ask for, now that nothing is borrowed.
    pub(super) fn catch_up(&self) {
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
    pub(super) fn update_room(&self) {
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
    pub(super) fn tick(&self, now: Instant) {
        if self.overfull.get() > 0 {
            self.core.borrow_mut().not_reading(now);
        }
        self.with_sink(|core, sink| core.tick(now, sink));
        self.time_out_requests(now);
    }

    pub(super) fn time_out_requests(&self, now: Instant) {
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
    pub(super) fn deadline(&self, stalled_since: Option<Instant>) -> Option<Instant> {
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
    pub(super) fn write_stall(&self) -> Duration {
        let heartbeat = self.peek(|core| core.tuned().map_or(0, |tuned| tuned.heartbeat));
        let silence = Duration::from_secs(u64::from(heartbeat) * 2);
        self.options.write_stall.max(silence)
    }

    /// One step of closing; the first is to wait until everything that was queued before has left.
    pub(super) fn close_step(&self, now: Instant, all_is_sent: bool) {
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

    pub(super) fn give_up(&self, down: Down) {
        self.with_sink(|core, sink| core.give_up(down, sink));
    }

    /// The connection is over, one way or another.
    pub(super) fn end(&self) {
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
