//! What the handles of a connection and its driver have in common.

use std::cell::{Cell, OnceCell, RefCell};
use std::panic::Location;
use std::rc::{Rc, Weak};
use std::task::Waker;
use std::time::{Duration, Instant};

use kernel::sync::{Event as Flag, promise};
use kernel::{Interrupt, Task};

use super::Options;
use super::book::{Asked, Book, ChannelState, Gate, Todo};
use super::connection::ConnectionEvent;
use super::consumer::Subscription;
use super::dial::chance;
use super::error::{Busy, Error};
use super::policy::Policy;
use super::publisher::Message;
use super::recovery::Orphan;
use super::request::Request;
use super::window::Window;
use crate::error::ReplyCode;
use crate::proto::connection::Connection as Core;
use crate::proto::event::{
    ChannelKey, ConsumerKey, DeliveryKey, Down, Event, Lost, Refused, ReqId,
};
use crate::proto::topology::{ChannelTag, Journal};
use crate::proto::unsettled::Settle;

/// What the handles of a connection and its driver have in common.
pub(super) struct Shared {
    pub(super) me: Weak<Self>,
    pub(super) core: RefCell<Core>,
    pub(super) book: RefCell<Book>,
    /// There is something for the driver to do.
    pub(super) nudge: Flag,
    /// Publishings can be appended.
    has_room: Cell<bool>,
    /// Never set for longer than it takes to wake those who wait: they look for themselves at what has changed.
    changed: Flag,
    pub(super) ended: Flag,
    /// How it ended, for good; until then, connections may come and go.
    pub(super) down: OnceCell<Down>,
    /// What that means for those who ask for something.
    pub(super) gone: OnceCell<Error>,
    /// What is to be made again on a new connection; stays empty where none is made.
    pub(super) journal: RefCell<Journal>,
    /// Whether a lost connection is made again.
    pub(super) policy: Option<RefCell<Policy>>,
    /// Why the last connection was lost, from then until everything is as it was.
    pub(super) lost: RefCell<Option<Down>>,
    /// When all was as it should be for the first time on this connection.
    pub(super) up_since: Cell<Instant>,
    /// The task that restores what was lost, while there is anything to restore.
    pub(super) carer: RefCell<Option<Task<()>>>,
    /// Consumers that the server has ended and queues that were locked: they are to be there again.
    pub(super) orphans: RefCell<Vec<Orphan>>,
    pub(super) orphaned: Flag,
    next_tag: Cell<ChannelTag>,
    /// The shortest time that a publisher has given its confirms.
    confirm_timeout: Cell<Option<Duration>>,
    /// How often to look at what may take too long.
    pace: Cell<Option<Duration>>,
    /// The most by which the driver was late.
    pub(super) lag: Cell<Duration>,
    /// Nothing is to be made again any more: the task that runs the connection ends.
    pub(super) ends: Cell<bool>,
    /// Bytes that the driver has taken to send and the system has not taken yet.
    pub(super) unsent: Cell<usize>,
    /// Consumers that hold more than they may: while there are any, nothing is read.
    pub(super) overfull: Cell<usize>,
    pub(super) closing: Cell<Closing>,
    /// How many publishings had no answer when the connection ended.
    pub(super) left_unconfirmed: Cell<usize>,
    /// For properties that are not given as they go.
    scratch: RefCell<Vec<u8>>,
    /// What has taken the place of the address's password.
    pub(super) secret: RefCell<Option<String>>,
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
        let policy = options
            .recovery
            .map(|r| RefCell::new(Policy::new(r, chance(0))));
        let book = Book {
            recovers: policy.is_some(),
            ..Book::default()
        };
        let shared = Rc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            core: RefCell::new(core),
            book: RefCell::new(book),
            gone: OnceCell::new(),
            journal: RefCell::default(),
            policy,
            lost: RefCell::default(),
            up_since: Cell::new(kernel::now()),
            carer: RefCell::default(),
            orphans: RefCell::default(),
            orphaned: Flag::new(),
            next_tag: Cell::new(0),
            confirm_timeout: Cell::new(None),
            pace: Cell::new(None),
            lag: Cell::new(Duration::ZERO),
            ends: Cell::new(false),
            nudge: Flag::new(),
            has_room: Cell::new(true),
            changed: Flag::new(),
            ended: Flag::new(),
            down: OnceCell::new(),
            unsent: Cell::new(0),
            overfull: Cell::new(0),
            closing: Cell::new(Closing::No),
            left_unconfirmed: Cell::new(0),
            scratch: RefCell::default(),
            secret: RefCell::default(),
            options,
        });
        shared.set_pace();
        shared
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

    /// Whether the connection is lost, and not all is yet as it was.
    pub(super) fn is_recovering(&self) -> bool {
        self.lost.borrow().is_some()
    }

    /// Why nothing can be asked any more, if that is so.
    pub(super) fn check_open(&self) -> Result<(), Error> {
        match self.gone.get() {
            Some(error) => Err(error.clone()),
            None if self.is_closing() => Err(Error::Closed),
            None => Ok(()),
        }
    }

    /// Waits while `is_away` says that a recovery is in the way, as long as one request may take.
    pub(super) async fn recovered(&self, is_away: impl Fn() -> bool) -> Result<(), Error> {
        if !is_away() {
            return self.check_open();
        }
        let after = self.options.rpc_timeout;
        let back = async {
            while is_away() && self.check_open().is_ok() {
                self.changed.wait().await?;
            }
            self.check_open()
        };
        let what = "waiting for the connection to recover";
        let back = kernel::ignore_after(after, back).await?;
        back.ok_or(Error::Timeout { what, after })
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

    /// Appends a message if that is possible now, and notes it in the window of the publisher that it belongs to. Answers its
    /// place there.
    pub(super) fn publish(
        &self,
        channel: &ChannelState,
        message: &Message<'_>,
        window: Option<&Window>,
    ) -> Result<u32, Error> {
        if !self.has_room.get()
            || self.is_closing()
            || channel.is_stopped.get()
            || channel.gate.get() != Gate::Open
        {
            return Err(self.why_busy(channel));
        }
        if let Some(props) = message.ready_props() {
            return self.put(channel, message, props, window);
        }
        let mut scratch = self.scratch.borrow_mut();
        scratch.clear();
        message.encode_props(&mut scratch)?;
        self.put(channel, message, &scratch, window)
    }

    #[cold]
    fn why_busy(&self, channel: &ChannelState) -> Error {
        if let Err(error) = self.check_open() {
            return error;
        }
        if let Some(error) = channel.down.get() {
            return error.clone();
        }
        Error::Busy(if channel.gate.get() != Gate::Open {
            Busy::Recovering
        } else if channel.is_stopped.get() || self.peek(Core::is_blocked) {
            Busy::Blocked
        } else {
            Busy::HighWater
        })
    }

    #[inline]
    fn put(
        &self,
        channel: &ChannelState,
        message: &Message<'_>,
        props: &[u8],
        window: Option<&Window>,
    ) -> Result<u32, Error> {
        let Message { publish, body, .. } = message;
        let core = &mut *self.core.borrow_mut();
        let key = channel.key.get();
        let published = match window {
            None => core.publish(key, publish, props, body).map(|_| 0),
            Some(window) => window.post(|kept| {
                let seq = match kept {
                    Some(kept) if core.is_short(body) => {
                        core.publish_keeping(key, publish, props, body, &mut kept.frames)
                    }
                    Some(kept) => {
                        // Kept in the memory that it is sent from.
                        let large: Rc<[u8]> = (*body).into();
                        kept.frames.clear();
                        publish
                            .put_head(&mut kept.frames, key.id(), props, body.len(), usize::MAX)
                            .map_err(Refused::from)
                            .and_then(|()| {
                                core.publish_shared(key, publish, props, kept.large.insert(large))
                            })
                    }
                    None => core.publish(key, publish, props, body),
                }?;
                Ok(seq.expect("a publisher's channel is in confirm mode"))
            }),
        };
        let queued = core.output_len();
        match published {
            Ok(place) => {
                self.queued(queued);
                Ok(place)
            }
            Err(refused) => Err(self.refused(refused, channel)),
        }
    }

    /// Publishes a message again that a lost connection left without an answer: the oldest. `false` if there is none.
    pub(super) fn publish_again(
        &self,
        channel: &ChannelState,
        window: &Window,
    ) -> Result<bool, Error> {
        let Some(index) = window.next_again() else {
            return Ok(false);
        };
        if let Some(error) = channel.down.get() {
            return Err(error.clone());
        }
        if !self.has_room.get() || channel.is_stopped.get() {
            return Err(Error::Busy(Busy::HighWater));
        }
        let mut core = self.core.borrow_mut();
        let key = channel.key.get();
        let published = window.with_kept(index, |kept| match kept.large {
            Some(body) => core.publish_shared(key, &kept.publish, kept.props, body),
            None => core.publish(key, &kept.publish, kept.props, kept.body),
        });
        let queued = core.output_len();
        drop(core);
        match published {
            Ok(seq) => {
                window.posted_again(seq.expect("a publisher's channel is in confirm mode"));
                self.queued(queued);
            }
            // The new server may take less than the old one.
            Err(Refused::Encode(error)) => {
                if let Some(waker) = window.refused_again(error.into()) {
                    waker.wake();
                }
                window.open();
            }
            Err(refused) => return Err(self.refused(refused, channel)),
        }
        Ok(true)
    }

    fn queued(&self, queued: usize) {
        if queued + self.unsent.get() > self.options.high_water {
            self.has_room.set(false);
        }
        self.nudge.set();
    }

    /// The best explanation of why the protocol refused something on a channel.
    pub(super) fn refused(&self, refused: Refused, channel: &ChannelState) -> Error {
        match (refused, self.gone.get(), channel.down.get()) {
            (Refused::NotOpen | Refused::ChannelGone, Some(gone), _) => gone.clone(),
            (Refused::NotOpen | Refused::ChannelGone, None, Some(error)) => error.clone(),
            (refused, ..) => refused.into(),
        }
    }

    /// Waits, at a line of the caller's, until it is worth trying to publish again: there is room, or there never will be. Others may be quicker.
    pub(super) async fn room(
        &self,
        channel: &ChannelState,
        at: &'static Location<'static>,
    ) -> Result<(), Interrupt> {
        while (!self.has_room.get() || channel.is_stopped.get() || channel.gate.get() != Gate::Open)
            && channel.down.get().is_none()
            && self.check_open().is_ok()
        {
            self.changed.wait().called_at(at).await?;
        }
        Ok(())
    }

    /// As [`Shared::room`], for those who publish before all others.
    pub(super) async fn room_to_replay(&self, channel: &ChannelState) -> Result<(), Interrupt> {
        while (!self.has_room.get() || channel.is_stopped.get())
            && channel.down.get().is_none()
            && self.gone.get().is_none()
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

    /// A name for a channel that outlives its connection.
    pub(super) fn new_tag(&self) -> ChannelTag {
        let tag = self.next_tag.get();
        self.next_tag.set(tag.wrapping_add(1));
        tag
    }

    pub(super) fn add_channel(&self, state: &Rc<ChannelState>) {
        let mut book = self.book.borrow_mut();
        let at = usize::from(state.key.get().id());
        if book.channels.len() <= at {
            book.channels.resize_with(at + 1, || None);
        }
        book.channels[at] = Some(Rc::clone(state));
    }

    pub(super) fn remove_channel(&self, state: &ChannelState) {
        let mut book = self.book.borrow_mut();
        let key = state.key.get();
        if let Some(slot) = book.channels.get_mut(usize::from(key.id()))
            && slot.as_ref().is_some_and(|state| state.key.get() == key)
        {
            *slot = None;
        }
        book.suspended.retain(|other| other.tag != state.tag);
        drop(book);
        self.journal.borrow_mut().closed_channel(state.tag);
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
            f(&mut core, &mut |event| book.note(event))
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
                Todo::Cancelled(subscription) => self.cancelled(subscription),
                Todo::Forget(tag) => self.journal.borrow_mut().closed_channel(tag),
                Todo::Down(down) => self.went_down(down),
                Todo::Log(event) => self.log(&event),
            }
        }
        // Keep the room; whatever came meanwhile goes first the next time.
        let mut book = self.book.borrow_mut();
        if book.todo.is_empty() {
            book.todo = todo;
        }
        drop(book);
        self.update_room();
    }

    /// Tells everybody who watches.
    pub(super) fn log(&self, event: &ConnectionEvent) {
        let logs = std::mem::take(&mut self.book.borrow_mut().logs);
        let live = logs.into_iter().filter(|log| {
            let log = log.upgrade();
            log.map(|log| log.push(event.clone())).is_some()
        });
        let live: Vec<_> = live.collect();
        self.book.borrow_mut().logs.extend(live);
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
        self.time_out_confirms(now);
        if let Some(timeout) = self.options.ack_timeout {
            let mut due = Vec::new();
            let mut core = self.core.borrow_mut();
            core.overdue(now, timeout.mul_f64(0.8), |channel, tag, held| {
                let channel = channel.id();
                due.push(ConnectionEvent::AckDue { channel, tag, held });
            });
            drop(core);
            for event in due {
                log::warn!("a delivery has not been settled for long: {event:?}");
                self.log(&event);
            }
        }
    }

    /// The driver's turn came so much later than it was due.
    pub(super) fn lagged(&self, lag: Duration) {
        self.lag.set(self.lag.get().max(lag));
        let heartbeat = self.peek(heartbeat);
        if !heartbeat.is_zero() && lag >= heartbeat / 4 {
            let secs = lag.as_secs_f64();
            log::warn!(
                "a task has kept the kernel busy: the connection had its turn {secs} s late"
            );
            self.log(&ConnectionEvent::LoopLag(lag));
        }
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

    fn time_out_confirms(&self, now: Instant) {
        let is_blocked = self.peek(Core::is_blocked);
        let mut late = Vec::new();
        for state in self.book.borrow().channels.iter().flatten() {
            if let Some(window) = &state.window {
                if is_blocked {
                    window.forgive();
                } else if window.is_late(now) && state.gate.get() == Gate::Open {
                    late.push(Rc::clone(state));
                }
            }
        }
        for state in late {
            self.leave_channel(&state, now);
        }
    }

    /// Closes a channel without waiting for the answer.
    pub(super) fn close_channel(&self, state: &ChannelState, why: Error) {
        if state.down.get().is_some() {
            return;
        }
        self.with_core(|core| {
            if let Ok(request) = core.close_channel(state.key.get(), ReplyCode::SUCCESS, "bye") {
                core.abandon(request);
            }
        });
        self.channel_closes(state, &why);
    }

    /// Nothing can be done on a channel any more.
    pub(super) fn channel_closes(&self, state: &ChannelState, why: &Error) {
        if state.down.set(why.clone()).is_ok() {
            let key = state.key.get();
            self.book.borrow_mut().end_consumers(Some(key), why);
            self.journal.borrow_mut().closed_channel(state.tag);
            if let Some(window) = &state.window {
                // What was to be published again is not.
                let (_, wakers) = window.give_up(&Lost::ChannelClosedByUs);
                wakers.into_iter().for_each(Waker::wake);
                window.open();
            }
            self.catch_up();
            self.pulse();
        }
    }

    /// When [`Shared::tick`] and the driver have something to do, whatever the socket brings.
    pub(super) fn deadline(&self, stalled_since: Option<Instant>, now: Instant) -> Option<Instant> {
        let stall = stalled_since.map(|since| since + self.write_stall());
        let closing = match self.closing.get() {
            Closing::No | Closing::Within(_) => None,
            Closing::By(deadline) => Some(deadline),
        };
        let request = self.book.borrow_mut().next_timeout();
        let core = self.peek(Core::deadline);
        let look = self.pace.get().map(|pace| now + pace);
        let due = [core, request, stall, closing, look];
        due.into_iter().flatten().min()
    }

    /// A publisher gives its confirms so long.
    pub(super) fn expect_confirms(&self, timeout: Duration) {
        let shortest = self
            .confirm_timeout
            .get()
            .map_or(timeout, |t| t.min(timeout));
        self.confirm_timeout.set(Some(shortest));
        self.set_pace();
    }

    /// There is another connection, or another time limit.
    pub(super) fn set_pace(&self) {
        let heartbeat = self.peek(heartbeat);
        // Often enough to see by its own lateness that the kernel is busy.
        let lag = (!heartbeat.is_zero()).then(|| heartbeat / 8);
        // What takes too long is noticed a twentieth later at most, or a tenth, where it is not known when it began.
        let limits = [self.options.ack_timeout, self.confirm_timeout.get()];
        let limits = limits.into_iter().flatten().map(|limit| limit / 20);
        self.pace.set(limits.chain(lag).min());
    }

    /// How long the peer may refuse to take bytes.
    pub(super) fn write_stall(&self) -> Duration {
        self.options.write_stall.max(self.peek(heartbeat) * 2)
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
        let unconfirmed = unconfirmed + self.to_be_replayed();
        if is_open && (is_late || (unconfirmed == 0 && all_is_sent)) {
            // It is open, so that is not refused.
            let _ = self.with_core(|core| core.close(ReplyCode::SUCCESS, "bye"));
        }
        if is_late {
            self.give_up(Down::ClosedByUs);
        }
    }

    pub(super) fn give_up(&self, down: Down) {
        self.with_sink(|core, sink| core.give_up(down, sink));
    }

    /// How many messages of a lost connection have not been published again.
    fn to_be_replayed(&self) -> usize {
        let book = self.book.borrow();
        let states = book.channels.iter().flatten().chain(&book.suspended);
        let windows = states.filter_map(|state| state.window.as_ref());
        windows.map(Window::to_be_replayed).sum()
    }
}

/// The interval that was agreed upon; zero for none.
pub(super) fn heartbeat(core: &Core) -> Duration {
    let seconds = core.tuned().map_or(0, |tuned| tuned.heartbeat);
    Duration::from_secs(seconds.into())
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.core.try_borrow() {
            Ok(core) => core.fmt(f),
            Err(_) => f.write_str("Connection(..)"),
        }
    }
}
