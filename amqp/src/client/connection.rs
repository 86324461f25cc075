//! Connections: their handle, their events, and their end.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use kernel::Interrupt;
use kernel::sync::Event as Flag;
use kernel::traps::at_caller;

use super::Options;
use super::channel::Channel;
use super::dial::{Dialer, Link};
use super::error::{Error, Returned};
use super::publisher::{Publisher, PublisherOptions};
use super::recovery::run;
use super::shared::Shared;
use crate::proto::connection::Connection as Core;
use crate::proto::event::Down;
use crate::proto::handshake::Tuned;
use crate::proto::topology::Step;
use crate::uri::Uri;
use crate::wire::Method;
use crate::wire::cold::connection;

/// How long a connection whose last handle was dropped may take to close.
const LINGER: Duration = Duration::from_secs(5);
/// Events that nobody has looked at; of more, the oldest are forgotten.
const LOG_LENGTH: usize = 256;

/// Connects to the first server of an address that answers.
///
/// Hosts are tried in random order, so that clients spread; all addresses of each. Every attempt, handshake included, has
/// the address's `connection_timeout`, or that of the options. A server that refuses the login or the virtual host ends the search: the
/// others would as well.
///
/// Cancellation point: yes. If dropped, attempts are given up.
///
/// # Errors
/// [`Error::Address`]; [`Error::LoginRefused`], [`Error::VirtualHost`]; [`Error::Connect`] with what became of each attempt.
#[track_caller]
pub fn connect(address: &str, options: Options) -> impl Future<Output = Result<Connection, Error>> {
    at_caller(async move { connect_to(&address.parse()?, options).await })
}

/// As [`connect`], with an address that was parsed, or put together, before.
///
/// # Errors
/// As [`connect`].
#[track_caller]
pub fn connect_to(uri: &Uri, options: Options) -> impl Future<Output = Result<Connection, Error>> {
    at_caller(async move {
        let mut dialer = Dialer::Address(Box::new(uri.clone()));
        let link = dialer.dial(&options).await?;
        Ok(Connection::start(link, dialer, options))
    })
}

/// An open connection. Clones are the same connection.
///
/// A task of the kernel runs it, as long as there is a handle: when the last clone, channel, consumer and delivery is dropped,
/// it is closed in the background. [`close`](Self::close) does it in the foreground, and says how it went.
#[derive(Clone)]
pub struct Connection {
    inner: Rc<ConnectionInner>,
}

pub(super) struct ConnectionInner {
    pub(super) shared: Rc<Shared>,
}

impl Drop for ConnectionInner {
    fn drop(&mut self) {
        self.shared.start_closing(LINGER);
    }
}

impl fmt::Debug for ConnectionInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shared.fmt(f)
    }
}

/// How [`Connection::close`] went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Closed {
    /// How many publishings the broker had not confirmed in time. Their [`Confirm`](super::Confirm)s say so, too.
    pub unconfirmed: usize,
}

impl Connection {
    /// Starts the task that runs a connection.
    pub(super) fn start(link: Link, dialer: Dialer, options: Options) -> Self {
        log::debug!("connected to {}", link.server);
        let shared = Shared::new(link.core, options);
        if let Some(reason) = link.blocked {
            log::info!("{} takes no messages now: {reason}", link.server);
        }
        let running = kernel::spawn(run(link.pipe, Rc::clone(&shared), dialer));
        running.set_name("amqp connection");
        Self {
            inner: Rc::new(ConnectionInner { shared }),
        }
    }

    /// Opens a channel.
    ///
    /// Cancellation point: yes. If dropped, the channel is closed again.
    ///
    /// # Errors
    /// [`Error::NoChannelLeft`]; [`Error::Timeout`], [`Error::Lost`], [`Error::Closed`], [`Error::Interrupted`].
    #[track_caller]
    pub fn channel(&self) -> impl Future<Output = Result<Channel, Error>> {
        at_caller(async move { Channel::open(&self.inner, None).await })
    }

    /// Opens a channel for publishing with confirms.
    ///
    /// Cancellation point: yes. If dropped, the channel is closed again.
    ///
    /// # Errors
    /// As [`channel`](Self::channel).
    #[track_caller]
    pub fn publisher(
        &self,
        options: PublisherOptions,
    ) -> impl Future<Output = Result<Publisher, Error>> {
        at_caller(async move {
            let channel = Channel::open(&self.inner, Some(options)).await?;
            Ok(Publisher::new(channel))
        })
    }

    /// Shows the server another secret, a token say, before the one it has expires. It is used from now on, also to connect again.
    ///
    /// Servers that check passwords alone take note of any.
    ///
    /// Cancellation point: yes. If dropped, the secret counts all the same.
    ///
    /// # Errors
    /// [`Error::Encode`] if the reason is longer than 255 bytes; [`Error::Timeout`], [`Error::Unanswered`], [`Error::Lost`] with what a server
    /// that refuses it has to say, [`Error::Closed`], [`Error::Interrupted`].
    #[track_caller]
    pub fn update_secret(
        &self,
        secret: &str,
        reason: &str,
    ) -> impl Future<Output = Result<(), Error>> {
        at_caller(async move {
            let shared = &self.inner.shared;
            shared.check_open()?;
            let reason = crate::wire::cold::short("reason", reason)?;
            shared.secret.replace(Some(secret.to_owned()));
            shared.recovered(|| shared.is_recovering()).await?;
            let (nobody, request) =
                shared.with_core(|core| core.update_secret(secret, reason.as_str()))?;
            let updating = shared.request("connection.update-secret", nobody, |_| Ok(request))?;
            updating
                .method(|method| match method {
                    Method::Connection(connection::AMQPMethod::UpdateSecretOk(_)) => Some(()),
                    _ => None,
                })
                .await
        })
    }

    /// What happens to the connection from now on.
    pub fn events(&self) -> Events {
        let log = Rc::new(EventLog::default());
        let mut book = self.inner.shared.book.borrow_mut();
        book.logs.push(Rc::downgrade(&log));
        drop(book);
        if let Some(down) = self.inner.shared.down() {
            log.push(ConnectionEvent::Lost(down.clone()));
            log.finish();
        }
        Events { log }
    }

    /// Whether the broker has asked publishers to wait.
    pub fn is_blocked(&self) -> bool {
        self.inner.shared.peek(Core::is_blocked)
    }

    /// Whether the connection is lost and being made again: requests and publishings wait.
    pub fn is_recovering(&self) -> bool {
        self.inner.shared.is_recovering()
    }

    /// The most by which the connection's task has had its turn too late, because other tasks kept the kernel busy. Looked at eight times in a heartbeat
    /// interval; zero without heartbeats. From a quarter of the interval on there is an [event](ConnectionEvent::LoopLag).
    pub fn loop_lag(&self) -> Duration {
        self.inner.shared.lag.get()
    }

    /// What both sides have agreed upon; `None` while there is no connection.
    pub fn tuned(&self) -> Option<Tuned> {
        self.inner.shared.peek(Core::tuned)
    }

    /// Waits until the connection has ended for good, and says how. One that is lost and made again has not.
    ///
    /// Cancellation point: only if it has not ended. If dropped, nothing happens.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn closed(&self) -> impl Future<Output = Result<Down, Interrupt>> {
        at_caller(async move { self.inner.shared.ended().await.cloned() })
    }

    /// Closes the connection: takes nothing new, sends what is queued, waits for the confirms of what was published, tells the server, and
    /// waits for its agreement; all of that at most for `patience`. Deliveries that are not settled go back to their queues.
    ///
    /// A connection that is closed, or lost, is fine: this returns at once, also while it is being recovered; what was to be published again
    /// is not, and counts as unconfirmed.
    ///
    /// Cancellation point: yes. If dropped, it is closed all the same.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn close(&self, patience: Duration) -> impl Future<Output = Result<Closed, Interrupt>> {
        at_caller(async move {
            let shared = &self.inner.shared;
            shared.start_closing(patience);
            shared.ended().await?;
            Ok(Closed {
                unconfirmed: shared.left_unconfirmed(),
            })
        })
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

/// Something has happened to a connection.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ConnectionEvent {
    /// The broker is short of memory or disk, and says of which: publishing waits, everything else goes on.
    Blocked(String),
    /// Publishing goes on.
    Unblocked,
    /// A mandatory message came back that was published on a plain channel.
    Returned(Rc<Returned>),
    /// The connection has ended, how ever. Where it is not [recovered](super::Options::recovery), or was closed by us, there are no events
    /// after this one.
    Lost(Down),
    /// The next attempt to connect.
    Recovering {
        /// Its number, from 1, since the connection was lost.
        attempt: u32,
        /// How long is waited before it.
        wait: Duration,
    },
    /// There is a new connection, and it has all that the lost one had, but for what [`EntityFailed`](Self::EntityFailed) has said. What has
    /// not been confirmed is published again from now on.
    Recovered {
        /// Queues whose names the server chooses: the old name, the new one.
        renamed: Vec<(String, String)>,
    },
    /// Something could not be made again on the new connection; everything else was. A consumer whose queue is missing is tried
    /// again after waits that grow, with a queue of ours made again first. So are, for four heartbeats but at least a minute, exclusive queues and consumers
    /// that somebody else still has: it is the lost connection, as long as the server has not noticed that it is lost. If it was not, there is another of
    /// these events, and the consumer ends with the error, as all others do at once.
    EntityFailed {
        /// What.
        entity: Step,
        /// Why.
        error: Error,
    },
    /// The server has ended a consumer, because its queue was deleted or has moved; it is tried to start it again, after waits that grow.
    ConsumerLost {
        /// Its queue.
        queue: String,
    },
    /// A consumer that was lost alone runs again.
    ConsumerRestored {
        /// Its queue.
        queue: String,
    },
    /// The server has left messages of a publisher without an answer for its
    /// [`confirm_timeout`](super::PublisherOptions::confirm_timeout): they are unconfirmed, and their channel is given up, for another where the
    /// connection recovers.
    ConfirmsLate {
        /// The number of the channel.
        channel: u16,
        /// How many messages are unconfirmed for good.
        unconfirmed: usize,
    },
    /// An exclusive queue, which was still locked by the connection that was lost, is there again with its bindings.
    QueueRestored {
        /// The queue.
        queue: String,
    },
    /// Making a new connection was given up, for this reason. The last event.
    GaveUp(Error),
    /// The connection's task had its turn so much too late, because some task kept the kernel busy: a quarter of the heartbeat or more. With two
    /// heartbeats, the server takes us for dead.
    LoopLag(Duration),
    /// A delivery has not been settled for 80 % of [`Options::ack_timeout`](super::Options::ack_timeout), after which the server closes
    /// its channel. Told once for a delivery, of the oldest ones first.
    AckDue {
        /// The number of its channel.
        channel: u16,
        /// Its [tag](super::Delivery::tag).
        tag: u64,
        /// For how long at least.
        held: Duration,
    },
}

/// The events of a connection; made by [`Connection::events`]. Of more than 256 that nobody has looked at, the oldest are
/// forgotten.
#[derive(Debug)]
pub struct Events {
    log: Rc<EventLog>,
}

impl Events {
    /// Waits for the next event; `None` when the connection has ended for good.
    ///
    /// Cancellation point: only if there is none. If dropped, no event is lost.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[expect(clippy::should_implement_trait, reason = "it is awaited")]
    #[track_caller]
    pub fn next(&mut self) -> impl Future<Output = Result<Option<ConnectionEvent>, Interrupt>> {
        at_caller(async move {
            loop {
                let event = self.log.events.borrow_mut().pop_front();
                if event.is_some() || self.log.is_over.get() {
                    return Ok(event);
                }
                self.log.arrived.clear();
                self.log.arrived.wait().await?;
            }
        })
    }
}

#[derive(Debug, Default)]
pub(super) struct EventLog {
    events: RefCell<VecDeque<ConnectionEvent>>,
    arrived: Flag,
    is_over: Cell<bool>,
}

impl EventLog {
    pub(super) fn push(&self, event: ConnectionEvent) {
        let mut events = self.events.borrow_mut();
        if events.len() == LOG_LENGTH {
            events.pop_front();
        }
        events.push_back(event);
        drop(events);
        self.arrived.set();
    }

    /// There will be no more.
    pub(super) fn finish(&self) {
        self.is_over.set(true);
        self.arrived.set();
    }
}
