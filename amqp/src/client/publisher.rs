//! Publishing: messages, and publishers that learn what became of them.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use kernel::sync::Event as Flag;
use kernel::{Interruptible, interruptible};

use super::book::ChannelState;
use super::channel::Channel;
use super::error::{Busy, Error, Returned};
use crate::proto::event::Lost;
use crate::proto::unsettled::Slots;
use crate::wire::{Properties, Props, PropsBuf, Publish};

/// A message to be published. Borrows everything, so that building one costs nothing.
///
/// ```
/// use amqp::client::Message;
///
/// let message = Message::new(b"hello").key("tasks").persistent().mandatory();
/// # let _ = message;
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Message<'a> {
    pub(super) publish: Publish<'a>,
    pub(super) props: MessageProps<'a>,
    pub(super) body: &'a [u8],
}

/// Properties of a message to be published: encoded before, or to be encoded now.
#[derive(Clone, Copy, Debug)]
pub enum MessageProps<'a> {
    /// As they go on the wire.
    Encoded(Props<'a>),
    /// To be encoded at each publishing, into a buffer that is used again.
    Built(&'a Properties<'a>),
}

impl<'a> From<Props<'a>> for MessageProps<'a> {
    fn from(props: Props<'a>) -> Self {
        Self::Encoded(props)
    }
}

impl<'a> From<&'a PropsBuf> for MessageProps<'a> {
    fn from(props: &'a PropsBuf) -> Self {
        Self::Encoded(props.as_props())
    }
}

impl<'a> From<&'a Properties<'a>> for MessageProps<'a> {
    fn from(properties: &'a Properties<'a>) -> Self {
        Self::Built(properties)
    }
}

/// Nothing but `delivery_mode` 2.
const PERSISTENT: &[u8] = &[0x10, 0x00, 2];

impl<'a> Message<'a> {
    /// A message without properties, to the default exchange.
    pub fn new(body: &'a [u8]) -> Self {
        Self {
            publish: Publish::default(),
            props: Props::EMPTY.into(),
            body,
        }
    }

    /// The exchange it goes to; without, the default exchange, where the key is the queue's name.
    pub fn exchange(mut self, name: &'a str) -> Self {
        self.publish.exchange = name;
        self
    }

    /// The routing key.
    pub fn key(mut self, key: &'a str) -> Self {
        self.publish.routing_key = key;
        self
    }

    /// All its properties: `&PropsBuf` or `Props` if they are encoded, `&Properties` if they are not.
    pub fn properties(mut self, props: impl Into<MessageProps<'a>>) -> Self {
        self.props = props.into();
        self
    }

    /// Survives a restart of the broker in a durable queue. Replaces the properties by this one; set `delivery_mode` among them if
    /// there are others.
    pub fn persistent(mut self) -> Self {
        self.props = MessageProps::Encoded(Props::from_bytes(PERSISTENT));
        self
    }

    /// Comes back if no queue takes it: [`Error::Returned`] from a publisher, an event of the connection from a plain channel.
    ///
    /// Give it a `message_id`: of messages with the same exchange, key and id the oldest is taken for the returned one.
    pub fn mandatory(mut self) -> Self {
        self.publish.mandatory = true;
        self
    }
}

/// How a [`Publisher`] behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublisherOptions {
    /// How many messages may wait for their confirm, at least 1.
    pub window: usize,
}

impl Default for PublisherOptions {
    /// A window of 1000.
    fn default() -> Self {
        Self { window: 1000 }
    }
}

/// Publishes on a channel of its own and learns what became of each message.
///
/// Made by [`Connection::publisher`](super::Connection::publisher). Dropping it closes its channel; what was posted has been sent, but
/// no confirm comes any more: use [`Publisher::flush`] before.
#[derive(Debug)]
pub struct Publisher {
    channel: Channel,
}

impl Publisher {
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel }
    }

    /// Publishes, and waits until the broker has taken the message over: it is in all queues that it was routed to, and on disk
    /// where it is persistent and they are durable. If it is [mandatory](Message::mandatory), there is at least one such queue.
    ///
    /// Cancellation point: if it has to wait, which is nearly always. If dropped before there is room, nothing is published; if later, the message is
    /// published and the confirm ignored.
    ///
    /// # Errors
    /// [`Error::Returned`], [`Error::Nacked`]: it is in no queue. [`Error::Unconfirmed`]: it may be. Those of
    /// [`Publisher::publish`]: it was not sent.
    pub async fn send(&self, message: Message<'_>) -> Result<(), Error> {
        self.publish(message).await?.await
    }

    /// Publishes as soon as the window and the connection have room, and answers with the confirm to be waited for, at any time or
    /// never.
    ///
    /// Cancellation point: only if there is no room. If dropped meanwhile, nothing is published.
    ///
    /// # Errors
    /// [`Error::Encode`], [`Error::Lost`], [`Error::ChannelClosed`], [`Error::Closed`]; [`Error::Interrupted`].
    pub async fn publish(&self, message: Message<'_>) -> Result<Confirm, Error> {
        std::future::poll_fn(kernel_proceed).await;
        loop {
            match self.post(&message) {
                Err(Error::Busy(Busy::Window)) => self.window().has_room.wait().await?,
                Err(Error::Busy(Busy::HighWater | Busy::Blocked)) => self.channel.room().await?,
                outcome => return outcome,
            }
        }
    }

    /// Publishes now. As [`Publisher::publish`], but a plain call.
    ///
    /// Not a cancellation point.
    ///
    /// # Errors
    /// [`Error::Busy`] where `publish` would wait; its other errors.
    pub fn post(&self, message: &Message<'_>) -> Result<Confirm, Error> {
        let window = self.window();
        if window.is_full() {
            self.channel.check()?;
            return Err(Error::Busy(Busy::Window));
        }
        let seq = self.channel.publish_now(message)?;
        let index = window.posted(seq.expect("the channel is in confirm mode"));
        let confirm = RawConfirm {
            channel: Rc::clone(self.channel.state()),
            index,
            is_taken: false,
        };
        Ok(Confirm(interruptible(confirm)))
    }

    /// Waits until every message that was posted before has its answer, whatever that is.
    ///
    /// Cancellation point: only if some have none. If dropped, nothing is lost.
    ///
    /// # Errors
    /// The reason, if the channel or the connection is gone; [`Error::Interrupted`].
    pub async fn flush(&self) -> Result<(), Error> {
        while self.window().unconfirmed() > 0 {
            self.window().is_idle.wait().await?;
        }
        self.channel.check()
    }

    /// How many messages wait for their confirm.
    pub fn unconfirmed(&self) -> usize {
        self.window().unconfirmed()
    }

    /// The channel it publishes on: for topology, say. Messages published by its own function are confirmed to nobody.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Waits for all confirms, then closes the channel.
    ///
    /// Cancellation point: yes. If dropped, the channel is closed all the same.
    ///
    /// # Errors
    /// As [`Publisher::flush`], and [`Channel::close`].
    pub async fn close(self) -> Result<(), Error> {
        self.flush().await?;
        self.channel.close().await
    }

    fn window(&self) -> &Window {
        let window = self.channel.state().window.as_ref();
        window.expect("a publisher's channel has a window")
    }
}

fn kernel_proceed(cx: &mut Context<'_>) -> Poll<()> {
    kernel::traps::poll_proceed(cx)
}

/// What became of a publishing, to be awaited at any time. Resolves exactly once: with `Ok` when the broker has taken the message
/// over, or with [`Error::Nacked`], [`Error::Returned`] or [`Error::Unconfirmed`].
///
/// Cancellation point: only if the answer is not there. If dropped, the message is published all the same, and the answer ignored.
#[must_use = "a confirm that is dropped says nothing about the message"]
pub struct Confirm(Interruptible<RawConfirm>);

impl Future for Confirm {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|outcome| outcome?)
    }
}

impl fmt::Debug for Confirm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Confirm").finish_non_exhaustive()
    }
}

struct RawConfirm {
    channel: Rc<ChannelState>,
    index: u32,
    is_taken: bool,
}

impl RawConfirm {
    fn window(&self) -> &Window {
        let window = self.channel.window.as_ref();
        window.expect("a publisher's channel has a window")
    }
}

impl Future for RawConfirm {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        assert!(!self.is_taken, "a confirm is awaited once");
        let Some(verdict) = self.window().take(self.index, cx.waker()) else {
            return Poll::Pending;
        };
        self.is_taken = true;
        Poll::Ready(match verdict {
            Verdict::Confirmed => Ok(()),
            Verdict::Nacked => Err(Error::Nacked),
            Verdict::Returned(returned) => Err(Error::Returned(returned)),
            Verdict::Lost(lost) => Err(Error::Unconfirmed(*lost)),
        })
    }
}

impl Drop for RawConfirm {
    fn drop(&mut self) {
        if !self.is_taken {
            self.window().forget(self.index);
        }
    }
}

/// The broker's word on a publishing.
pub(super) enum Verdict {
    Confirmed,
    Nacked,
    Returned(Box<Returned>),
    Lost(Box<Lost>),
}

/// The publishings of a channel that somebody may want to know about.
///
/// Those without an answer are numbered by the broker's count, and there are never more than the window allows. Each has a place in a table
/// that is used again: the place outlives the answer until the [`Confirm`] has looked at it, so that one that is
/// kept for long costs its own place and nothing more.
pub(super) struct Window {
    table: RefCell<Table>,
    limit: usize,
    has_room: Flag,
    is_idle: Flag,
}

#[derive(Default)]
struct Table {
    by_seq: Slots<u32>,
    places: Vec<Place>,
    free: Vec<u32>,
}

enum Place {
    Free,
    /// No answer yet; who waits for it.
    Waits(Option<Waker>),
    Answered(Verdict),
    /// No answer yet, and nobody wants it.
    Forgotten,
}

impl Window {
    pub(super) fn new(limit: usize) -> Self {
        let (has_room, is_idle) = (Flag::new(), Flag::new());
        has_room.set();
        is_idle.set();
        Self {
            table: RefCell::default(),
            limit: limit.max(1),
            has_room,
            is_idle,
        }
    }

    fn is_full(&self) -> bool {
        !self.has_room.is_set()
    }

    fn unconfirmed(&self) -> usize {
        self.table.borrow().by_seq.len()
    }

    fn posted(&self, seq: u64) -> u32 {
        let mut table = self.table.borrow_mut();
        let index = match table.free.pop() {
            Some(index) => index,
            None => {
                table.places.push(Place::Free);
                table.places.len() as u32 - 1
            }
        };
        table.places[index as usize] = Place::Waits(None);
        // Something published on the channel past the publisher has a number, too.
        while table.by_seq.next_tag() < seq {
            table.by_seq.skip();
        }
        table.by_seq.push(index);
        let is_full = table.by_seq.len() >= self.limit;
        drop(table);
        self.is_idle.clear();
        if is_full {
            self.has_room.clear();
        }
        index
    }

    /// The answer has come. Runs while the protocol is borrowed: whoever waits is the caller's to wake.
    pub(super) fn resolve(&self, seq: u64, verdict: Verdict) -> Option<Waker> {
        let mut table = self.table.borrow_mut();
        let index = table.by_seq.take(seq)?;
        let place = &mut table.places[index as usize];
        match std::mem::replace(place, Place::Answered(verdict)) {
            Place::Waits(waker) => waker,
            Place::Forgotten | Place::Answered(_) | Place::Free => {
                *place = Place::Free;
                table.free.push(index);
                None
            }
        }
    }

    /// Lets those go on who wait for room, or for the last answer; to be called when answers have come and nothing is borrowed.
    pub(super) fn open(&self) {
        let unconfirmed = self.unconfirmed();
        if unconfirmed < self.limit {
            self.has_room.set();
        }
        if unconfirmed == 0 {
            self.is_idle.set();
        }
    }

    /// The answer, if it is there, and then its place is free; otherwise `waker` is called when it comes.
    fn take(&self, index: u32, waker: &Waker) -> Option<Verdict> {
        let mut table = self.table.borrow_mut();
        let place = &mut table.places[index as usize];
        if let Place::Waits(waiting) = place {
            let old = waiting.replace(waker.clone());
            drop(table);
            drop(old);
            return None;
        }
        let Place::Answered(verdict) = std::mem::replace(place, Place::Free) else {
            unreachable!("a place belongs to its confirm until that has the answer");
        };
        table.free.push(index);
        Some(verdict)
    }

    fn forget(&self, index: u32) {
        let mut table = self.table.borrow_mut();
        let place = &mut table.places[index as usize];
        let old = if let Place::Waits(_) = place {
            std::mem::replace(place, Place::Forgotten)
        } else {
            let old = std::mem::replace(place, Place::Free);
            table.free.push(index);
            old
        };
        drop(table);
        drop(old);
    }
}
