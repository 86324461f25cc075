//! Publishing: messages, and publishers that learn what became of them.

use std::fmt;
use std::future::Future;
use std::panic::Location;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use kernel::traps::at_caller;
use kernel::{Interruptible, interruptible};

use super::book::ChannelState;
use super::channel::Channel;
use super::error::{Busy, Error};
use super::window::{Verdict, Window};
use crate::error::EncodeError;
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
    props: MessageProps<'a>,
    /// Whatever its properties say.
    is_persistent: bool,
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
            is_persistent: false,
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

    /// Its properties, instead of those it was given before: `&PropsBuf` or `Props` if they are encoded, `&Properties` if they are not.
    pub fn properties(mut self, props: impl Into<MessageProps<'a>>) -> Self {
        self.props = props.into();
        self
    }

    /// Survives a restart of the broker in a durable queue: its `delivery_mode` is 2, also if its [properties](Self::properties) say
    /// otherwise, before or after this.
    pub fn persistent(mut self) -> Self {
        self.is_persistent = true;
        self
    }

    /// Comes back if no queue takes it: [`Error::Returned`] from a publisher, an event of the connection from a plain channel.
    ///
    /// Give it a `message_id`: of messages with the same exchange, key and id the oldest is taken for the returned one.
    pub fn mandatory(mut self) -> Self {
        self.publish.mandatory = true;
        self
    }

    /// Its properties, if there are bytes that can go as they are.
    #[inline]
    pub(super) fn ready_props(&self) -> Option<&'a [u8]> {
        match (self.props, self.is_persistent) {
            (MessageProps::Encoded(props), false) => Some(props.as_bytes()),
            (MessageProps::Encoded(Props::EMPTY), true) => Some(PERSISTENT),
            (MessageProps::Encoded(_), true) | (MessageProps::Built(_), _) => None,
        }
    }

    /// Appends its properties as they are to go.
    pub(super) fn encode_props(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match (self.props, self.is_persistent) {
            (MessageProps::Encoded(props), false) => out.extend_from_slice(props.as_bytes()),
            (MessageProps::Encoded(props), true) => props.put_persistent(out),
            (MessageProps::Built(properties), false) => properties.encode_into(out)?,
            (MessageProps::Built(properties), true) => {
                let delivery_mode = Some(2);
                let persistent = Properties {
                    delivery_mode,
                    ..*properties
                };
                persistent.encode_into(out)?;
            }
        }
        Ok(())
    }
}

/// How a [`Publisher`] behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublisherOptions {
    /// How many messages may wait for their confirm, at least 1.
    pub window: usize,
    /// Where the connection [recovers](super::Options::recovery): keep each message until its confirm has come, and publish it again if the
    /// connection is lost before. It arrives at least once, then, and twice if the confirm alone was lost; a consumer tells by
    /// its `message_id`. Without, its [`Confirm`] says [`Error::Unconfirmed`].
    pub replay: bool,
    /// Bytes of messages that are kept for that. Publishing waits above it, though one message is always taken.
    pub replay_bytes: usize,
    /// How long the server may leave a message without an answer; noticed a tenth of that late, at most. Not counted while it
    /// [says](super::ConnectionEvent::Blocked) that it takes no messages, nor while the connection is being recovered: what is published
    /// again has all of it once more.
    ///
    /// Then its [`Confirm`] says [`Error::Unconfirmed`], and the message is not published again. A server that answers nothing for so long on a connection that
    /// lives has forgotten the channel, or never understood what came on it, so the channel is given up with it. Where the connection recovers, the
    /// publisher gets another one ([`ConnectionEvent::ConfirmsLate`](super::ConnectionEvent::ConfirmsLate)): messages that have not waited so long are
    /// published again there, or, without `replay`, are unconfirmed as well. Where it does not, all of them are, and the publisher ends with
    /// [`Error::ChannelStuck`].
    pub confirm_timeout: Duration,
}

impl Default for PublisherOptions {
    /// A window of 1000, at most 64 MiB kept for replay, and two minutes for a confirm.
    fn default() -> Self {
        Self {
            window: 1000,
            replay: true,
            replay_bytes: 64 << 20,
            confirm_timeout: Duration::from_secs(120),
        }
    }
}

/// Publishes on a channel of its own and learns what became of each message.
///
/// Where the connection recovers, the publisher does: meanwhile publishing waits, and what was not confirmed is published again
/// before anything else, in the same order. No [`Confirm`] is lost over it.
///
/// If nothing but [`Error::Nacked`] comes, have another publisher: a channel of RabbitMQ 3.10 that published to a quorum queue while its leader died
/// refuses all that follows, and a new channel does not.
///
/// Made by [`Connection::publisher`](super::Connection::publisher). Dropping it closes its channel: what was posted has been sent, but
/// what has no confirm yet is [`Error::Unconfirmed`]; use [`Publisher::flush`] before.
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
    #[track_caller]
    pub fn send(&self, message: Message<'_>) -> impl Future<Output = Result<(), Error>> {
        let publishing = self.publish(message);
        async move { publishing.await?.await }
    }

    /// Publishes as soon as the window and the connection have room, and answers with the confirm to be waited for, at any time or
    /// never.
    ///
    /// Cancellation point: only if there is no room. If dropped meanwhile, nothing is published.
    ///
    /// # Errors
    /// [`Error::Encode`], [`Error::Lost`], [`Error::ChannelClosed`], [`Error::Closed`]; [`Error::Interrupted`].
    #[track_caller]
    pub fn publish(&self, message: Message<'_>) -> impl Future<Output = Result<Confirm, Error>> {
        let at = Location::caller();
        async move {
            std::future::poll_fn(kernel_proceed).await;
            loop {
                match self.post_at(&message, at) {
                    Err(Error::Busy(Busy::Window)) => {
                        self.window().has_room.wait().called_at(at).await?;
                    }
                    Err(Error::Busy(Busy::HighWater | Busy::Blocked | Busy::Recovering)) => {
                        self.channel.room(at).await?;
                    }
                    outcome => return outcome,
                }
            }
        }
    }

    /// Publishes now. As [`Publisher::publish`], but a plain call.
    ///
    /// Not a cancellation point.
    ///
    /// # Errors
    /// [`Error::Busy`] where `publish` would wait; its other errors.
    #[track_caller]
    pub fn post(&self, message: &Message<'_>) -> Result<Confirm, Error> {
        self.post_at(message, Location::caller())
    }

    #[inline]
    fn post_at(
        &self,
        message: &Message<'_>,
        at: &'static Location<'static>,
    ) -> Result<Confirm, Error> {
        let window = self.window();
        if window.is_full() {
            self.channel.check()?;
            return Err(Error::Busy(Busy::Window));
        }
        let index = self.channel.publish_now(message, Some(window))?;
        let confirm = RawConfirm {
            channel: Rc::clone(self.channel.state()),
            index,
            is_taken: false,
        };
        Ok(Confirm(interruptible(confirm).called_at(at)))
    }

    /// Waits until every message that was posted before has its answer, whatever that is.
    ///
    /// Cancellation point: only if some have none. If dropped, nothing is lost.
    ///
    /// # Errors
    /// The reason, if the channel or the connection is gone; [`Error::Interrupted`].
    #[track_caller]
    pub fn flush(&self) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            while self.window().unconfirmed() > 0 {
                self.window().is_idle.wait().await?;
            }
            self.channel.check()
        })
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
    #[track_caller]
    pub fn close(self) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            self.flush().await?;
            self.channel.close().await
        })
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
            Verdict::Refused(error) => Err(*error),
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
