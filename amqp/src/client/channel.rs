//! Channels: topology, and everything that is done on one.

use std::panic::Location;
use std::rc::Rc;
use std::task::Waker;

use kernel::traps::at_caller;

use super::book::{ChannelState, Gate, Reply};
use super::connection::ConnectionInner;
use super::consumer::{Consume, Delivery, Spares};
use super::error::{Busy, Error};
use super::publisher::{Message, PublisherOptions};
use super::request::Request;
use super::shared::Shared;
use super::window::Window;
use crate::error::EncodeError;
use crate::proto::event::{ChannelKey, Lost};
use crate::wire::cold::{
    self, FieldTable, Method, basic, channel, confirm, exchange, queue, short, tx,
};
use crate::wire::{TableBuf, Value};

/// A channel: a conversation of its own on a connection. Clones are the same channel.
///
/// Where the connection [recovers](super::Options::recovery), the channel does, with its prefetch, its confirm mode and its consumers; but not one that has begun
/// transactions, because what it had not committed is gone. Meanwhile requests and publishings wait; those under way fail with
/// [`Error::Unanswered`], and what was published without confirms may be lost.
///
/// What is done on a channel is done in order. An error of the server (no such queue, say) closes the channel and concerns nobody
/// else; open another one then. When the last clone, consumer and delivery is dropped, it is closed.
#[derive(Clone, Debug)]
pub struct Channel {
    inner: Rc<ChannelInner>,
}

#[derive(Debug)]
pub(super) struct ChannelInner {
    pub(super) connection: Rc<ConnectionInner>,
    pub(super) state: Rc<ChannelState>,
    pub(super) spares: Spares,
}

impl ChannelInner {
    /// Why a request was refused, as well as it is known.
    pub(super) fn explain(&self, error: Error) -> Error {
        match (error, self.shared().gone.get(), self.state.down.get()) {
            (Error::Closed, Some(gone), _) => gone.clone(),
            (Error::Closed, None, Some(why)) => why.clone(),
            (error, ..) => error,
        }
    }

    pub(super) fn shared(&self) -> &Rc<Shared> {
        &self.connection.shared
    }

    /// Waits until the channel is there again, if its connection is being recovered.
    pub(super) async fn ready(&self) -> Result<(), Error> {
        let Self { state, .. } = self;
        let is_away = || state.gate.get() == Gate::Suspended && state.down.get().is_none();
        self.shared().recovered(is_away).await?;
        match state.down.get() {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }
}

impl Drop for ChannelInner {
    fn drop(&mut self) {
        self.shared().close_channel(&self.state, Error::Closed);
        self.shared().remove_channel(&self.state);
        // A confirm may live longer than its publisher.
        if let Some(window) = &self.state.window {
            let wakers = window.abandon(&Lost::ChannelClosedByUs);
            wakers.into_iter().for_each(Waker::wake);
        }
    }
}

impl Channel {
    pub(super) async fn open(
        connection: &Rc<ConnectionInner>,
        publisher: Option<PublisherOptions>,
    ) -> Result<Self, Error> {
        let shared = &connection.shared;
        shared.recovered(|| shared.is_recovering()).await?;
        let (key, request) = shared.with_core(|core| core.open_channel())?;
        let recovers = shared.policy.is_some();
        let window = publisher.map(|options| {
            shared.expect_confirms(options.confirm_timeout);
            Window::new(options, recovers)
        });
        let state = ChannelState::new(shared.new_tag(), key, window);
        shared.add_channel(&state);
        let opening = shared.request("channel.open", key, |_| Ok(request))?;
        // From here on, dropping it closes.
        let this = Self {
            inner: Rc::new(ChannelInner {
                connection: Rc::clone(connection),
                state,
                spares: Spares::default(),
            }),
        };
        if publisher.is_some() {
            let select = confirm::AMQPMethod::Select(confirm::Select { nowait: false });
            let select = Method::Confirm(select);
            let confirms = this.request("confirm.select", &select)?;
            opening.reply().await?;
            let answer = confirms.method(Some).await?;
            this.note(select, &answer);
        } else {
            opening.reply().await?;
        }
        Ok(this)
    }

    /// Starts the declaration of a queue. An empty name lets the server choose one.
    pub fn queue(&self, name: &str) -> DeclareQueue {
        DeclareQueue {
            channel: self.clone(),
            name: name.to_owned(),
            passive: false,
            durable: false,
            exclusive: false,
            auto_delete: false,
            arguments: Arguments::default(),
        }
    }

    /// Starts the declaration of an exchange. `kind` is `direct`, `fanout`, `topic`, `headers`, or what a plugin adds.
    pub fn exchange(&self, name: &str, kind: &str) -> DeclareExchange {
        DeclareExchange {
            channel: self.clone(),
            name: name.to_owned(),
            kind: kind.to_owned(),
            passive: false,
            durable: false,
            auto_delete: false,
            internal: false,
            arguments: Arguments::default(),
        }
    }

    /// Binds a queue to an exchange; binding again changes nothing.
    ///
    /// Cancellation point: yes. If dropped, the binding may be made all the same.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`] if either is missing (404) or not ours to bind (403); those of all requests: [`Error::Encode`],
    /// [`Error::Timeout`], [`Error::Lost`], [`Error::Closed`], [`Error::Interrupted`].
    #[track_caller]
    pub fn bind_queue(
        &self,
        queue: &str,
        exchange: &str,
        routing_key: &str,
    ) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let none = TableBuf::new();
            self.bind_queue_with(queue, exchange, routing_key, &none)
                .await
        })
    }

    /// As [`bind_queue`](Self::bind_queue), with arguments: what a `headers` exchange matches.
    ///
    /// # Errors
    /// As [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn bind_queue_with(
        &self,
        queue: &str,
        exchange: &str,
        routing_key: &str,
        arguments: &TableBuf,
    ) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let bind = queue::Bind {
                queue: short("queue", queue)?,
                exchange: short("exchange", exchange)?,
                routing_key: short("routing key", routing_key)?,
                nowait: false,
                arguments: cold::field_table(arguments.as_table())?,
            };
            self.done("queue.bind", Method::Queue(queue::AMQPMethod::Bind(bind)))
                .await
        })
    }

    /// Undoes [`bind_queue`](Self::bind_queue). A binding that does not exist is gone already.
    ///
    /// # Errors
    /// As [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn unbind_queue(
        &self,
        queue: &str,
        exchange: &str,
        routing_key: &str,
    ) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let none = TableBuf::new();
            self.unbind_queue_with(queue, exchange, routing_key, &none)
                .await
        })
    }

    /// Undoes [`bind_queue_with`](Self::bind_queue_with); the arguments are part of what is looked for.
    ///
    /// # Errors
    /// As [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn unbind_queue_with(
        &self,
        queue: &str,
        exchange: &str,
        routing_key: &str,
        arguments: &TableBuf,
    ) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let unbind = queue::Unbind {
                queue: short("queue", queue)?,
                exchange: short("exchange", exchange)?,
                routing_key: short("routing key", routing_key)?,
                arguments: cold::field_table(arguments.as_table())?,
            };
            self.done(
                "queue.unbind",
                Method::Queue(queue::AMQPMethod::Unbind(unbind)),
            )
            .await
        })
    }

    /// Binds an exchange to another, RabbitMQ's extension: what `source` routes by `routing_key` goes to `destination`, too.
    ///
    /// # Errors
    /// As [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn bind_exchange(
        &self,
        destination: &str,
        source: &str,
        routing_key: &str,
    ) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let bind = exchange::Bind {
                destination: short("exchange", destination)?,
                source: short("exchange", source)?,
                routing_key: short("routing key", routing_key)?,
                nowait: false,
                arguments: FieldTable::default(),
            };
            self.done(
                "exchange.bind",
                Method::Exchange(exchange::AMQPMethod::Bind(bind)),
            )
            .await
        })
    }

    /// Undoes [`bind_exchange`](Self::bind_exchange).
    ///
    /// # Errors
    /// As [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn unbind_exchange(
        &self,
        destination: &str,
        source: &str,
        routing_key: &str,
    ) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let unbind = exchange::Unbind {
                destination: short("exchange", destination)?,
                source: short("exchange", source)?,
                routing_key: short("routing key", routing_key)?,
                nowait: false,
                arguments: FieldTable::default(),
            };
            self.done(
                "exchange.unbind",
                Method::Exchange(exchange::AMQPMethod::Unbind(unbind)),
            )
            .await
        })
    }

    /// Drops the messages of a queue that are not out for delivery, and says how many.
    ///
    /// # Errors
    /// As [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn purge_queue(&self, name: &str) -> impl Future<Output = Result<u32, Error>> {
        at_caller(async move {
            let purge = queue::Purge {
                queue: short("queue", name)?,
                nowait: false,
            };
            let purge = Method::Queue(queue::AMQPMethod::Purge(purge));
            match self.ask("queue.purge", purge).await? {
                Method::Queue(queue::AMQPMethod::PurgeOk(ok)) => Ok(ok.message_count),
                _ => Err(wrong("queue.purge")),
            }
        })
    }

    /// Deletes a queue with its messages, and says how many. In RabbitMQ one that does not exist is no error.
    ///
    /// # Errors
    /// As [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn delete_queue(&self, name: &str) -> impl Future<Output = Result<u32, Error>> {
        at_caller(async move { self.delete_queue_if(name, false, false).await })
    }

    /// Deletes a queue, provided that it has no consumers (`unused`) or no messages (`empty`).
    ///
    /// # Errors
    /// As [`bind_queue`](Self::bind_queue); [`Error::ChannelClosed`] with 406 if it is not as asked for.
    #[track_caller]
    pub fn delete_queue_if(
        &self,
        name: &str,
        unused: bool,
        empty: bool,
    ) -> impl Future<Output = Result<u32, Error>> {
        at_caller(async move {
            let delete = queue::Delete {
                queue: short("queue", name)?,
                if_unused: unused,
                if_empty: empty,
                nowait: false,
            };
            let delete = Method::Queue(queue::AMQPMethod::Delete(delete));
            self.inner.ready().await?;
            let journal = &self.inner.shared().journal;
            // Whatever becomes of the answer, nobody wants the queue back.
            journal.borrow_mut().dooms_queue(name);
            match self.ask("queue.delete", delete).await {
                Ok(Method::Queue(queue::AMQPMethod::DeleteOk(ok))) => Ok(ok.message_count),
                Ok(_) => Err(wrong("queue.delete")),
                Err(error) => {
                    if let Error::ChannelClosed(_) = error {
                        journal.borrow_mut().spared_queue(name);
                    }
                    Err(error)
                }
            }
        })
    }

    /// Deletes an exchange with its bindings; if `unused`, provided that it has none.
    ///
    /// # Errors
    /// As [`delete_queue_if`](Self::delete_queue_if).
    #[track_caller]
    pub fn delete_exchange(
        &self,
        name: &str,
        unused: bool,
    ) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let delete = exchange::Delete {
                exchange: short("exchange", name)?,
                if_unused: unused,
                nowait: false,
            };
            self.done(
                "exchange.delete",
                Method::Exchange(exchange::AMQPMethod::Delete(delete)),
            )
            .await
        })
    }

    /// Sets how many deliveries the broker may send ahead to each consumer that is started after this; 0 is no limit.
    /// [`Consume::prefetch`] does it for one consumer.
    ///
    /// # Errors
    /// Those of all requests, as [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn qos(&self, prefetch: u16) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move { self.done("basic.qos", qos(prefetch)).await })
    }

    /// Asks the broker to deliver everything again that this channel has not settled. Deliveries that are held are stale from then on.
    ///
    /// # Errors
    /// Those of all requests, as [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn recover(&self) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let recover = basic::Recover { requeue: true };
            self.done(
                "basic.recover",
                Method::Basic(basic::AMQPMethod::Recover(recover)),
            )
            .await
        })
    }

    /// Prepares a consumer: `ch.consume("tasks").prefetch(8).start().await?`.
    pub fn consume(&self, queue: &str) -> Consume {
        Consume::new(self.clone(), queue)
    }

    /// Takes one message from a queue, if it has any. For more than a few, a consumer is far cheaper.
    ///
    /// Cancellation point: yes. If dropped, a message that comes goes back to the queue.
    ///
    /// # Errors
    /// As [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn get(&self, queue: &str) -> impl Future<Output = Result<Option<Delivery>, Error>> {
        at_caller(async move {
            let get = basic::Get {
                queue: short("queue", queue)?,
                no_ack: false,
            };
            let get = Method::Basic(basic::AMQPMethod::Get(get));
            self.inner.ready().await?;
            match self.request("basic.get", &get)?.reply().await? {
                Reply::Got(got) => {
                    log::trace!("basic.get: {} are left", got.message_count);
                    Ok(Some(Delivery::from_got(&self.inner, *got, true)))
                }
                Reply::Method(_) => Ok(None),
            }
        })
    }

    /// Publishes as soon as there is room. Whether the broker takes the message is not known; a
    /// [`Publisher`](super::Publisher) knows.
    ///
    /// Cancellation point: only if more waits to be sent than the high-water mark allows, or the broker has asked publishers to wait. If
    /// dropped meanwhile, nothing is published.
    ///
    /// # Errors
    /// [`Error::Encode`], [`Error::ChannelClosed`], [`Error::Lost`], [`Error::Closed`], [`Error::Interrupted`].
    #[track_caller]
    pub fn publish(&self, message: Message<'_>) -> impl Future<Output = Result<(), Error>> {
        let at = Location::caller();
        async move {
            std::future::poll_fn(|cx| kernel::traps::poll_proceed(cx)).await;
            loop {
                match self.try_publish(&message) {
                    Err(Error::Busy(Busy::HighWater | Busy::Blocked | Busy::Recovering)) => {
                        self.room(at).await?;
                    }
                    outcome => return outcome,
                }
            }
        }
    }

    /// Publishes now. As [`publish`](Self::publish), but a plain call.
    ///
    /// # Errors
    /// [`Error::Busy`] where `publish` would wait; its other errors.
    pub fn try_publish(&self, message: &Message<'_>) -> Result<(), Error> {
        self.publish_now(message, None).map(drop)
    }

    /// Begins transactions on the channel, for good: what is published and settled from now on counts only with
    /// [`tx_commit`](Self::tx_commit). [`Publisher`](super::Publisher)s are far cheaper, and safer: of a transaction over several queues, a server that
    /// fails may have done a part.
    ///
    /// Not on the channel of a publisher. The channel is not recovered when its connection is lost.
    ///
    /// Cancellation point: yes. If dropped, they may have begun all the same.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`] (406) in confirm mode; those of all requests, as [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn tx_select(&self) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            self.done(
                "tx.select",
                Method::Tx(tx::AMQPMethod::Select(tx::Select {})),
            )
            .await
        })
    }

    /// Does what was published and settled since the last commit or rollback. Messages that are mandatory and that no queue takes come back before
    /// it answers, as [events](super::ConnectionEvent::Returned).
    ///
    /// Cancellation point: yes. If dropped, or if the connection is lost, it may have been done all the same.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`] (406) without transactions, or if a queue did not take its message; those of all requests, as
    /// [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn tx_commit(&self) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            self.done(
                "tx.commit",
                Method::Tx(tx::AMQPMethod::Commit(tx::Commit {})),
            )
            .await
        })
    }

    /// Forgets what was published since the last commit or rollback, and what was settled: those deliveries are the channel's again. They come
    /// once more after [`recover`](Self::recover), or to others when the channel is closed.
    ///
    /// Cancellation point: yes. If dropped, it may have been done all the same.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`] (406) without transactions; those of all requests, as [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn tx_rollback(&self) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let rollback = tx::AMQPMethod::Rollback(tx::Rollback {});
            self.done("tx.rollback", Method::Tx(rollback)).await
        })
    }

    /// Asks the server to stop deliveries on this channel (`false`), or to go on. RabbitMQ and the embedded broker only know how to go on, and close the
    /// connection otherwise (540): to stop deliveries, use a prefetch. What a server asks of us, publishing heeds by itself.
    ///
    /// Cancellation point: yes. If dropped, it may have been done all the same.
    ///
    /// # Errors
    /// Those of all requests, as [`bind_queue`](Self::bind_queue).
    #[track_caller]
    pub fn flow(&self, active: bool) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let flow = channel::AMQPMethod::Flow(channel::Flow { active });
            self.done("channel.flow", Method::Channel(flow)).await
        })
    }

    /// Sends any method that has a reply, and answers with that.
    ///
    /// # Errors
    /// [`Error::NotARequest`] for methods with a function of their own, or `nowait`; those of all requests.
    #[track_caller]
    pub fn call(&self, method: Method) -> impl Future<Output = Result<Method, Error>> {
        at_caller(async move { self.ask("call", method).await })
    }

    /// Closes the channel, with all its consumers. What was published on it has been sent; deliveries that are held are void.
    ///
    /// Cancellation point: yes. If dropped, it is closed all the same.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Timeout`], [`Error::Interrupted`]. A channel that is closed already is fine.
    #[track_caller]
    pub fn close(&self) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let state = &self.inner.state;
            let shared = self.inner.shared();
            if state.down.get().is_some() {
                return Ok(());
            }
            if state.gate.get() == Gate::Suspended {
                // There is none to close, or one that nobody has asked for yet.
                shared.close_channel(state, Error::Closed);
                return Ok(());
            }
            let key = self.key();
            let ok = crate::error::ReplyCode::SUCCESS;
            let closing = shared.request("channel.close", key, |core| {
                core.close_channel(key, ok, "bye")
            })?;
            shared.channel_closes(state, &Error::Closed);
            closing
                .method(|method| match method {
                    Method::Channel(channel::AMQPMethod::CloseOk(_)) => Some(()),
                    _ => None,
                })
                .await
        })
    }

    /// Its number on the wire.
    pub fn number(&self) -> u16 {
        self.key().id()
    }

    /// Whether it can be used.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), Error> {
        match self.inner.state.down.get() {
            Some(error) => Err(error.clone()),
            None => self.inner.shared().check_open(),
        }
    }

    pub(super) fn inner(&self) -> &Rc<ChannelInner> {
        &self.inner
    }

    pub(super) fn state(&self) -> &Rc<ChannelState> {
        &self.inner.state
    }

    pub(super) fn key(&self) -> ChannelKey {
        self.inner.state.key.get()
    }

    pub(super) fn explain(&self, error: Error) -> Error {
        self.inner.explain(error)
    }

    pub(super) fn publish_now(
        &self,
        message: &Message<'_>,
        window: Option<&Window>,
    ) -> Result<u32, Error> {
        let state = &self.inner.state;
        self.inner.shared().publish(state, message, window)
    }

    /// Waits until it is worth trying to publish again.
    pub(super) async fn room(&self, at: &'static Location<'static>) -> Result<(), Error> {
        Ok(self.inner.shared().room(&self.inner.state, at).await?)
    }

    /// Sends a request, of which nothing is noted.
    pub(super) fn request(&self, what: &'static str, method: &Method) -> Result<Request, Error> {
        self.check()?;
        let key = self.key();
        let shared = self.inner.shared();
        let request = shared.request(what, key, |core| core.request(key, method));
        request.map_err(|error| self.explain(error))
    }

    /// Asks for something, once there is a connection, and notes what has come of it.
    async fn ask(&self, what: &'static str, method: Method) -> Result<Method, Error> {
        self.inner.ready().await?;
        let answer = self.request(what, &method)?.method(Some).await?;
        self.note(method, &answer);
        Ok(answer)
    }

    /// Notes what is to be made again when the connection is lost.
    fn note(&self, method: Method, answer: &Method) {
        let shared = self.inner.shared();
        if shared.policy.is_some() {
            let mut journal = shared.journal.borrow_mut();
            journal.answered(self.inner.state.tag, method, answer);
        }
    }

    /// Asks for something whose answer says only that it is done.
    async fn done(&self, what: &'static str, method: Method) -> Result<(), Error> {
        self.ask(what, method).await.map(drop)
    }
}

pub(super) fn qos(prefetch_count: u16) -> Method {
    Method::Basic(basic::AMQPMethod::Qos(basic::Qos {
        prefetch_count,
        global: false,
    }))
}

fn wrong(what: &'static str) -> Error {
    Error::WrongAnswer { what }
}

/// A queue to be declared; made by [`Channel::queue`].
#[must_use = "a declaration does nothing until it is sent"]
#[derive(Debug)]
pub struct DeclareQueue {
    channel: Channel,
    name: String,
    passive: bool,
    durable: bool,
    exclusive: bool,
    auto_delete: bool,
    arguments: Arguments,
}

/// A queue that has been declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueInfo {
    /// Its name, also if the server chose it.
    pub name: String,
    /// How many messages are ready to be delivered.
    pub messages: u32,
    /// How many consumers it has.
    pub consumers: u32,
}

impl DeclareQueue {
    /// Only asks whether it exists, and how full it is.
    pub fn passive(mut self) -> Self {
        self.passive = true;
        self
    }

    /// Survives a restart of the broker.
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// For this connection only, and deleted with it.
    pub fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }

    /// Deleted when its last consumer goes.
    pub fn auto_delete(mut self) -> Self {
        self.auto_delete = true;
        self
    }

    /// An argument, such as `x-max-priority`.
    pub fn arg<'v>(mut self, key: &str, value: impl Into<Value<'v>>) -> Self {
        self.arguments.insert(key, value);
        self
    }

    /// Declares it.
    ///
    /// Cancellation point: yes. If dropped, it may be declared all the same.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`]: 406 if it exists and is otherwise, 405 if it is somebody else's, 404 if a passive one does not exist; those of all
    /// requests, as [`Channel::bind_queue`].
    #[track_caller]
    pub fn declare(self) -> impl Future<Output = Result<QueueInfo, Error>> {
        at_caller(async move {
            let declare = queue::Declare {
                queue: short("queue", &self.name)?,
                passive: self.passive,
                durable: self.durable,
                exclusive: self.exclusive,
                auto_delete: self.auto_delete,
                nowait: false,
                arguments: self.arguments.table()?,
            };
            let declare = Method::Queue(queue::AMQPMethod::Declare(declare));
            match self.channel.ask("queue.declare", declare).await? {
                Method::Queue(queue::AMQPMethod::DeclareOk(ok)) => Ok(QueueInfo {
                    name: ok.queue.to_string(),
                    messages: ok.message_count,
                    consumers: ok.consumer_count,
                }),
                _ => Err(wrong("queue.declare")),
            }
        })
    }
}

/// An exchange to be declared; made by [`Channel::exchange`].
#[must_use = "a declaration does nothing until it is sent"]
#[derive(Debug)]
pub struct DeclareExchange {
    channel: Channel,
    name: String,
    kind: String,
    passive: bool,
    durable: bool,
    auto_delete: bool,
    internal: bool,
    arguments: Arguments,
}

impl DeclareExchange {
    /// Only asks whether it exists.
    pub fn passive(mut self) -> Self {
        self.passive = true;
        self
    }

    /// Survives a restart of the broker.
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// Deleted when its last binding goes.
    pub fn auto_delete(mut self) -> Self {
        self.auto_delete = true;
        self
    }

    /// Takes messages from other exchanges only.
    pub fn internal(mut self) -> Self {
        self.internal = true;
        self
    }

    /// An argument, such as `alternate-exchange`.
    pub fn arg<'v>(mut self, key: &str, value: impl Into<Value<'v>>) -> Self {
        self.arguments.insert(key, value);
        self
    }

    /// Declares it.
    ///
    /// Cancellation point: yes. If dropped, it may be declared all the same.
    ///
    /// # Errors
    /// As [`DeclareQueue::declare`].
    #[track_caller]
    pub fn declare(self) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let declare = exchange::Declare {
                exchange: short("exchange", &self.name)?,
                kind: short("exchange type", &self.kind)?,
                passive: self.passive,
                durable: self.durable,
                auto_delete: self.auto_delete,
                internal: self.internal,
                nowait: false,
                arguments: self.arguments.table()?,
            };
            self.channel
                .done(
                    "exchange.declare",
                    Method::Exchange(exchange::AMQPMethod::Declare(declare)),
                )
                .await
        })
    }
}

/// A table being put together; an error waits until it is sent.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    table: TableBuf,
    error: Option<EncodeError>,
}

impl Arguments {
    pub(super) fn insert<'v>(&mut self, key: &str, value: impl Into<Value<'v>>) {
        if let Err(error) = self.table.insert(key, value) {
            self.error.get_or_insert(error);
        }
    }

    pub(super) fn table(&self) -> Result<FieldTable, EncodeError> {
        match &self.error {
            Some(error) => Err(error.clone()),
            None => cold::field_table(self.table.as_table()),
        }
    }
}
