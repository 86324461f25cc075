//! Deliveries, and the streams they come by.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::panic::Location;
use std::rc::Rc;

use kernel::sync::Event as Flag;
use kernel::traps::at_caller;

use super::book::{ChannelState, Gate, Got};
use super::channel::{Arguments, Channel, ChannelInner, qos};
use super::error::Error;
use crate::error::EncodeError;
use crate::proto::event::{ChannelKey, ConsumerKey, DeliveryKey};
use crate::proto::topology::ChannelTag;
use crate::proto::unsettled::Settle;
use crate::wire::cold::{Method, basic, short};
use crate::wire::{Deliver, Props, Value};

/// Prefetch of a consumer that does not say.
const DEFAULT_PREFETCH: u16 = 64;

/// How much a consumer holds that nobody has taken, before the connection is not read any more.
///
/// Where the broker sets no limit, this one has to. Nothing on the connection is read while any consumer is
/// over it (TCP makes the broker wait), so a task that holds up such a consumer holds up the connection's replies, confirms and
/// other consumers too. Heartbeats go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cap {
    /// How many deliveries.
    pub count: usize,
    /// How many bytes of bodies.
    pub bytes: usize,
}

/// A consumer to be started; made by [`Channel::consume`].
#[must_use = "a consumer does nothing until it is started"]
#[derive(Debug)]
pub struct Consume {
    channel: Channel,
    queue: String,
    tag: String,
    prefetch: u16,
    cap: Option<Cap>,
    no_ack: bool,
    exclusive: bool,
    arguments: Arguments,
}

impl Consume {
    pub(super) fn new(channel: Channel, queue: &str) -> Self {
        Self {
            channel,
            queue: queue.to_owned(),
            tag: String::new(),
            prefetch: DEFAULT_PREFETCH,
            cap: None,
            no_ack: false,
            exclusive: false,
            arguments: Arguments::default(),
        }
    }

    /// How many deliveries the broker sends ahead of their settlement; 64 if not said. In RabbitMQ the count is this consumer's own.
    ///
    /// # Panics
    /// If it is 0, AMQP's word for no limit: that is [`Consume::unlimited`].
    #[track_caller]
    pub fn prefetch(mut self, count: u16) -> Self {
        assert!(
            count > 0,
            "a prefetch of 0 sets no limit; ask for `unlimited`"
        );
        self.prefetch = count;
        self
    }

    /// No limit by the broker, only [`Cap`].
    pub fn unlimited(mut self, cap: Cap) -> Self {
        self.prefetch = 0;
        self.cap = Some(cap);
        self
    }

    /// Deliveries count as settled when they are sent, and are lost with the connection. Prefetch does not apply, only [`Cap`].
    pub fn no_ack(mut self, cap: Cap) -> Self {
        self.no_ack = true;
        self.cap = Some(cap);
        self
    }

    /// Nobody else may consume from the queue.
    pub fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }

    /// The consumer's name, unique on the channel; without, one is made up.
    pub fn tag(mut self, tag: &str) -> Self {
        tag.clone_into(&mut self.tag);
        self
    }

    /// An argument, such as `x-priority`.
    pub fn arg<'v>(mut self, key: &str, value: impl Into<Value<'v>>) -> Self {
        self.arguments.insert(key, value);
        self
    }

    /// Starts it.
    ///
    /// Cancellation point: yes. If dropped, the consumer is cancelled, and what it was sent goes back to the queue.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`] if there is no such queue (404), or not for us (403); [`Error::ConsumerTagTaken`]; [`Error::Timeout`];
    /// [`Error::Lost`].
    #[track_caller]
    pub fn start(self) -> impl Future<Output = Result<Consumer, Error>> {
        at_caller(async move {
            let Self { channel, queue, .. } = &self;
            let mut method = self.method()?;
            channel.inner().ready().await?;
            let (inner, channel_key) = (channel.inner(), channel.key());
            let shared = &inner.connection.shared;
            let prefetch = qos(self.prefetch);
            let preparing = if self.no_ack {
                None
            } else {
                Some(channel.request("basic.qos", &prefetch)?)
            };
            let mut key = None;
            let request = shared.request("basic.consume", channel_key, |core| {
                let (consumer, request) = core.consume(channel_key, method.clone())?;
                key = Some(consumer);
                Ok(request)
            });
            let request = request.map_err(|error| channel.explain(error))?;
            let key = key.expect("set with the request");
            let subscription = Rc::new(Subscription {
                channel: Rc::clone(inner),
                key: Cell::new(key),
                tag: OnceCell::new(),
                is_starting: Cell::new(false),
                is_waiting: Cell::new(false),
                queue: RefCell::new(queue.as_str().into()),
                needs_ack: !self.no_ack,
                // A broker that keeps to the prefetch does not come near this.
                cap: self.cap.unwrap_or_else(|| Cap {
                    count: 16 + 2 * usize::from(self.prefetch),
                    bytes: usize::MAX,
                }),
                deliveries: RefCell::default(),
                bytes: Cell::new(0),
                is_overfull: Cell::new(false),
                arrived: Flag::new(),
                end: RefCell::new(End::Open),
                last_names: RefCell::new(("".into(), "".into())),
            });
            shared.add_consumer(key, &subscription);
            // From here on, dropping it cancels.
            let consumer = Consumer { subscription };
            let qos = match (preparing, prefetch) {
                (Some(preparing), Method::Basic(basic::AMQPMethod::Qos(qos))) => {
                    preparing.reply().await?;
                    Some(qos)
                }
                _ => None,
            };
            method.consumer_tag = request
                .method(|method| match method {
                    Method::Basic(basic::AMQPMethod::ConsumeOk(ok)) => Some(ok.consumer_tag),
                    _ => None,
                })
                .await?;
            let tag = method.consumer_tag.as_str().into();
            let _ = consumer.subscription.tag.set(tag);
            if shared.policy.is_some() {
                let mut journal = shared.journal.borrow_mut();
                journal.consumes(channel.state().tag, method, qos);
            }
            Ok(consumer)
        })
    }

    fn method(&self) -> Result<basic::Consume, EncodeError> {
        Ok(basic::Consume {
            queue: short("queue", &self.queue)?,
            consumer_tag: short("consumer tag", &self.tag)?,
            no_local: false,
            no_ack: self.no_ack,
            exclusive: self.exclusive,
            nowait: false,
            arguments: self.arguments.table()?,
        })
    }
}

/// A stream of deliveries.
///
/// Where the connection [recovers](super::Options::recovery), so does the consumer: deliveries that were not taken are dropped, those that were
/// are [stale](Settled::Stale), the broker gives all of them out anew, and the stream goes on. It goes on as well if the server has ended the
/// consumer because its queue was deleted or has moved, once that is there again; a queue that this connection declared is declared again. The connection's events tell of both.
///
/// Dropping it cancels the consumer; deliveries that were not taken go back to the queue.
pub struct Consumer {
    subscription: Rc<Subscription>,
}

impl Consumer {
    /// Waits for the next delivery. `None` after [`Consumer::cancel`], and after an error.
    ///
    /// Cancellation point: only if none is there. If dropped, no delivery is lost.
    ///
    /// # Errors
    /// Once, why the stream has ended: [`Error::Lost`], [`Error::ChannelClosed`], [`Error::AckTimeout`],
    /// [`Error::Closed`] (deliveries that were not taken are void then, the broker gives them out anew), or [`Error::ConsumerCancelled`], after those that had come before.
    /// [`Error::Interrupted`] does not end it.
    #[expect(clippy::should_implement_trait, reason = "it is awaited")]
    #[track_caller]
    pub fn next(&mut self) -> impl Future<Output = Result<Option<Delivery>, Error>> {
        let at = Location::caller();
        async move {
            std::future::poll_fn(|cx| kernel::traps::poll_proceed(cx)).await;
            loop {
                if let Some(outcome) = self.try_next() {
                    return outcome;
                }
                self.subscription.arrived.clear();
                self.subscription.arrived.wait().called_at(at).await?;
            }
        }
    }

    /// The next delivery if it is there, or the end; otherwise `None`.
    pub fn try_next(&mut self) -> Option<Result<Option<Delivery>, Error>> {
        if let Some(delivery) = self.subscription.take_out() {
            return Some(Ok(Some(delivery)));
        }
        let mut end = self.subscription.end.borrow_mut();
        match std::mem::replace(&mut *end, End::Over) {
            End::Open => {
                *end = End::Open;
                None
            }
            End::With(error) => Some(Err(error)),
            End::Over => Some(Ok(None)),
        }
    }

    /// Asks the broker to send no more, and waits for its agreement. What has come can still be taken, then the stream ends.
    ///
    /// Cancellation point: yes. If dropped, the consumer ends all the same.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Lost`], [`Error::ChannelClosed`]; a consumer that has ended is cancelled already.
    #[track_caller]
    pub fn cancel(&mut self) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            if !matches!(*self.subscription.end.borrow(), End::Open) {
                return Ok(());
            }
            let Subscription { channel, key, .. } = &*self.subscription;
            let shared = &channel.connection.shared;
            self.subscription.forget();
            if channel.state.gate.get() == Gate::Suspended {
                // There is none, or it is only just being started again.
                shared.remove_consumer(key.get());
                *self.subscription.end.borrow_mut() = End::Over;
                return Ok(());
            }
            let at = channel.state.key.get();
            let request = shared
                .request("basic.cancel", at, |core| core.cancel(at, key.get()))
                .map_err(|error| channel.explain(error))?;
            *self.subscription.end.borrow_mut() = End::Over;
            match request.reply().await {
                // It has ended with the connection.
                Ok(_) | Err(Error::Unanswered { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    /// Its name on the wire.
    pub fn tag(&self) -> &str {
        self.subscription.names().1
    }

    /// The queue it consumes from, by the name it has now.
    pub fn queue(&self) -> Rc<str> {
        self.subscription.queue()
    }

    /// How many deliveries have come and not been taken.
    pub fn waiting(&self) -> usize {
        self.subscription.deliveries.borrow().len()
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        let Subscription { channel, key, .. } = &*self.subscription;
        let shared = &channel.connection.shared;
        self.subscription.forget();
        shared.remove_consumer(key.get());
        // Whoever is starting it again finds that it is gone.
        if !self.subscription.is_starting.get() {
            let at = channel.state.key.get();
            shared.with_core(|core| core.abandon_consumer(at, key.get()));
        }
        self.subscription.clear();
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("queue", &self.queue())
            .field("tag", &self.tag())
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}

/// A consumer as the driver sees it.
pub(super) struct Subscription {
    channel: Rc<ChannelInner>,
    /// What it is on the connection of today.
    key: Cell<ConsumerKey>,
    /// Once it has been started.
    tag: OnceCell<Box<str>>,
    /// It is being started again.
    is_starting: Cell<bool>,
    /// It is to be started again by itself, apart from its channel.
    is_waiting: Cell<bool>,
    queue: RefCell<Rc<str>>,
    needs_ack: bool,
    cap: Cap,
    deliveries: RefCell<VecDeque<Delivery>>,
    /// Of their bodies.
    bytes: Cell<usize>,
    is_overfull: Cell<bool>,
    arrived: Flag,
    end: RefCell<End>,
    /// Exchange and routing key of the last delivery, most likely those of the next.
    last_names: RefCell<(Rc<str>, Rc<str>)>,
}

/// Whether more may come.
enum End {
    Open,
    /// Not any more, and nobody knows why yet.
    With(Error),
    Over,
}

impl Subscription {
    pub(super) fn channel_key(&self) -> ChannelKey {
        self.channel.state.key.get()
    }

    pub(super) fn channel(&self) -> &Rc<ChannelState> {
        &self.channel.state
    }

    pub(super) fn key(&self) -> ConsumerKey {
        self.key.get()
    }

    pub(super) fn set_key(&self, key: ConsumerKey) {
        self.key.set(key);
    }

    /// Its channel and its tag, by which the journal knows it; the tag is empty until it has been started.
    pub(super) fn names(&self) -> (ChannelTag, &str) {
        let tag = self.tag.get().map_or("", |tag| tag);
        (self.channel.state.tag, tag)
    }

    pub(super) fn queue(&self) -> Rc<str> {
        Rc::clone(&self.queue.borrow())
    }

    pub(super) fn renamed_queue(&self, old: &str, new: &str) {
        let mut queue = self.queue.borrow_mut();
        if **queue == *old {
            *queue = new.into();
        }
    }

    pub(super) fn starts(&self, is_starting: bool) {
        self.is_starting.set(is_starting);
    }

    pub(super) fn waits(&self, is_waiting: bool) {
        self.is_waiting.set(is_waiting);
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.is_waiting.get()
    }

    /// It is not to be started again.
    fn forget(&self) {
        let (channel, tag) = self.names();
        let journal = &self.channel.connection.shared.journal;
        journal.borrow_mut().cancelled(channel, tag);
    }

    /// The server has ended it, for good.
    pub(super) fn cancelled(&self) {
        let queue = self.queue().to_string();
        self.end(Error::ConsumerCancelled { queue });
    }

    /// Takes in a delivery. Whether the consumer has to be told, later: this runs while the protocol is borrowed.
    pub(super) fn take_in(
        &self,
        key: DeliveryKey,
        deliver: &Deliver<'_>,
        props: Props<'_>,
        body: std::borrow::Cow<'_, [u8]>,
    ) -> bool {
        let body_len = body.len();
        let content = match body {
            std::borrow::Cow::Borrowed(body) => {
                let mut content = self.channel.spares.take(body_len + props.as_bytes().len());
                content.extend_from_slice(body);
                content.extend_from_slice(props.as_bytes());
                content
            }
            std::borrow::Cow::Owned(mut body) => {
                body.extend_from_slice(props.as_bytes());
                body
            }
        };
        let mut names = self.last_names.borrow_mut();
        if *names.0 != *deliver.exchange {
            names.0 = deliver.exchange.into();
        }
        if *names.1 != *deliver.routing_key {
            names.1 = deliver.routing_key.into();
        }
        let delivery = Delivery {
            channel: Rc::clone(&self.channel),
            key,
            is_settled: !self.needs_ack,
            redelivered: deliver.redelivered,
            exchange: Rc::clone(&names.0),
            routing_key: Rc::clone(&names.1),
            content,
            body_len,
        };
        let mut deliveries = self.deliveries.borrow_mut();
        deliveries.push_back(delivery);
        self.bytes.set(self.bytes.get() + body_len);
        if !self.is_overfull.get()
            && (deliveries.len() >= self.cap.count || self.bytes.get() >= self.cap.bytes)
        {
            self.is_overfull.set(true);
            self.channel.connection.shared.set_overfull(true);
        }
        // The first tells of all that follow, until the consumer has run.
        deliveries.len() == 1
    }

    fn take_out(&self) -> Option<Delivery> {
        let mut deliveries = self.deliveries.borrow_mut();
        let delivery = deliveries.pop_front()?;
        let bytes = self.bytes.get() - delivery.body_len;
        self.bytes.set(bytes);
        // Half of it, so that reading does not start and stop for each delivery.
        if self.is_overfull.get()
            && deliveries.len() <= self.cap.count / 2
            && bytes <= self.cap.bytes / 2
        {
            self.is_overfull.set(false);
            drop(deliveries);
            self.channel.connection.shared.set_overfull(false);
        }
        Some(delivery)
    }

    pub(super) fn arrived(&self) {
        self.arrived.set();
    }

    /// Nothing more comes.
    pub(super) fn end(&self, error: Error) {
        // A consumer that the broker has cancelled leaves valid deliveries, a channel that is gone does not.
        if !matches!(error, Error::ConsumerCancelled { .. }) {
            self.clear();
        }
        let mut end = self.end.borrow_mut();
        if matches!(*end, End::Open) {
            *end = End::With(error);
        }
        drop(end);
        self.arrived.set();
    }

    /// Drops what nobody has taken.
    pub(super) fn clear(&self) {
        let deliveries = std::mem::take(&mut *self.deliveries.borrow_mut());
        self.bytes.set(0);
        if self.is_overfull.replace(false) {
            self.channel.connection.shared.set_overfull(false);
        }
        drop(deliveries); // each settles itself
    }
}

/// What became of a settlement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It leaves with the next write.
    Queued,
    /// There is nothing to settle: the delivery needs no ack, or its channel or connection is gone, and the broker gives it
    /// out anew. Nothing is sent.
    Stale,
}

/// A message from a queue. Owns its body and its properties.
///
/// It is settled once, by [`ack`](Delivery::ack), [`nack`](Delivery::nack) or [`reject`](Delivery::reject), which consume it. If dropped
/// unsettled, it goes back to its queue (`basic.nack` with `requeue`), and will be delivered again, perhaps to us: a
/// task that panics loses nothing, but a message that always makes it panic comes round forever. It keeps its channel open.
pub struct Delivery {
    channel: Rc<ChannelInner>,
    key: DeliveryKey,
    is_settled: bool,
    redelivered: bool,
    exchange: Rc<str>,
    routing_key: Rc<str>,
    /// The body, the properties behind it.
    content: Vec<u8>,
    body_len: usize,
}

impl Delivery {
    pub(super) fn from_got(channel: &Rc<ChannelInner>, got: Got, needs_ack: bool) -> Self {
        Self {
            channel: Rc::clone(channel),
            key: got.key,
            is_settled: !needs_ack,
            redelivered: got.redelivered,
            exchange: got.exchange,
            routing_key: got.routing_key,
            content: got.content,
            body_len: got.body_len,
        }
    }

    /// Done with it: the broker forgets the message. Acks given in one turn leave merged, in one write.
    ///
    /// Not a cancellation point; nothing is waited for.
    pub fn ack(mut self) -> Settled {
        self.settle(Settle::Ack)
    }

    /// Not done with it: back to its queue if `requeue`, else it is dropped or dead-lettered.
    ///
    /// Not a cancellation point.
    pub fn nack(mut self, requeue: bool) -> Settled {
        self.settle(Settle::Nack { requeue })
    }

    /// As [`nack`](Self::nack): for a single delivery the two are the same in RabbitMQ.
    pub fn reject(self, requeue: bool) -> Settled {
        self.nack(requeue)
    }

    /// The body.
    pub fn body(&self) -> &[u8] {
        &self.content[..self.body_len]
    }

    /// The body, to be taken elsewhere. The properties stay; the body that is left is empty.
    pub fn take_body(&mut self) -> Vec<u8> {
        let props = self.content[self.body_len..].to_vec();
        let mut body = std::mem::replace(&mut self.content, props);
        body.truncate(self.body_len);
        self.body_len = 0;
        body
    }

    /// The properties.
    pub fn props(&self) -> Props<'_> {
        Props::from_bytes(&self.content[self.body_len..])
    }

    /// The exchange it was published to.
    pub fn exchange(&self) -> &str {
        &self.exchange
    }

    /// The key it was published with.
    pub fn routing_key(&self) -> &str {
        &self.routing_key
    }

    /// Whether it may have been delivered before.
    pub fn is_redelivered(&self) -> bool {
        self.redelivered
    }

    /// Its number on its channel.
    pub fn tag(&self) -> u64 {
        self.key.tag()
    }

    /// Whether its channel or connection is gone, so that settling it would do nothing.
    pub fn is_stale(&self) -> bool {
        let channel = self.key.channel();
        let shared = &self.channel.connection.shared;
        self.channel.state.down.get().is_some() || !shared.peek(|core| core.has_channel(channel))
    }

    fn settle(&mut self, how: Settle) -> Settled {
        if std::mem::replace(&mut self.is_settled, true) {
            return Settled::Stale;
        }
        if self.channel.connection.shared.settle(self.key, how) {
            Settled::Queued
        } else {
            Settled::Stale
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.settle(Settle::Nack { requeue: true });
        self.channel.spares.put(std::mem::take(&mut self.content));
    }
}

/// Buffers of small deliveries that are gone, for those to come.
#[derive(Debug, Default)]
pub(super) struct Spares(RefCell<Vec<Vec<u8>>>);

impl Spares {
    const MOST: usize = 256;
    const LARGEST: usize = 2 << 10;

    /// An empty buffer with some room.
    #[inline]
    fn take(&self, room: usize) -> Vec<u8> {
        let spare = self.0.borrow_mut().pop();
        let mut buffer = spare.unwrap_or_default();
        buffer.reserve(room);
        buffer
    }

    #[inline]
    fn put(&self, mut buffer: Vec<u8>) {
        let mut spares = self.0.borrow_mut();
        if (1..=Self::LARGEST).contains(&buffer.capacity()) && spares.len() < Self::MOST {
            buffer.clear();
            spares.push(buffer);
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("tag", &self.tag())
            .field("exchange", &self.exchange)
            .field("routing_key", &self.routing_key)
            .field("redelivered", &self.redelivered)
            .field("body", &self.body_len)
            .finish_non_exhaustive()
    }
}
