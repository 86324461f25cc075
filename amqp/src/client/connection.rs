//! Connections: from an address to an open connection, and its end.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kernel::net::{Address, Io, TcpStream};
use kernel::sync::Event as Flag;
use kernel::{Interrupt, ignore_after};

use super::Options;
use super::channel::Channel;
use super::driver::drive;
use super::error::{Error, Returned};
use super::publisher::{Publisher, PublisherOptions};
use super::shared::Shared;
use crate::error::ReplyCode;
use crate::proto::connection::Connection as Core;
use crate::proto::event::Down;
use crate::proto::handshake::{Auth, ClientConfig, Tuned};
use crate::uri::{Host, Uri};

/// How long a connection whose last handle was dropped may take to close.
const LINGER: Duration = Duration::from_secs(5);
/// Events that nobody has looked at; of more, the oldest are forgotten.
const LOG_LENGTH: usize = 256;

/// Makes deliveries of one connection strangers to every other.
static NEXT_EPOCH: AtomicU32 = AtomicU32::new(0);

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
pub async fn connect(address: &str, options: Options) -> Result<Connection, Error> {
    connect_to(&address.parse()?, options).await
}

/// As [`connect`], with an address that was parsed, or put together, before.
///
/// # Errors
/// As [`connect`].
pub async fn connect_to(uri: &Uri, options: Options) -> Result<Connection, Error> {
    if uri.tls {
        return Err(Error::NoTls);
    }
    let timeout = uri.connection_timeout.unwrap_or(options.connect_timeout);
    let mut tried = Vec::new();
    for host in shuffled(&uri.hosts) {
        let address = Address::from((host.name.as_str(), host.port));
        let found = ignore_after(timeout, async { Ok(address.resolve().await?) }).await;
        let peers = match found {
            Ok(Some(peers)) if !peers.is_empty() => peers,
            Ok(Some(_)) => {
                tried.push(format!("{host}: the name has no address"));
                continue;
            }
            Ok(None) => {
                let secs = timeout.as_secs_f64();
                tried.push(format!("{host}: the name was not found within {secs} s"));
                continue;
            }
            Err(Failure::Interrupted(interrupt)) => return Err(interrupt.into()),
            Err(failure) => {
                tried.push(format!("{host}: {failure}"));
                continue;
            }
        };
        for peer in peers {
            let server = if host.name.parse::<std::net::IpAddr>().is_ok() {
                host.to_string()
            } else {
                format!("{host} ({peer})")
            };
            match ignore_after(timeout, attempt(peer, uri, &options)).await {
                Ok(Some(connection)) => return Ok(connection),
                Ok(None) => {
                    let secs = timeout.as_secs_f64();
                    tried.push(format!("{server}: no answer within {secs} s"));
                }
                Err(Failure::Interrupted(interrupt)) => return Err(interrupt.into()),
                Err(Failure::Down(down)) if down.is_final() => {
                    return Err(refused(server, uri, down));
                }
                Err(failure) => tried.push(format!("{server}: {failure}")),
            }
        }
    }
    let to = uri.to_string();
    Err(Error::Connect { to, tried })
}

/// Why one attempt failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Io(std::io::Error),
    #[error(transparent)]
    Down(Down),
    #[error(transparent)]
    Interrupted(#[from] Interrupt),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match kernel::MaybeInterrupt::interrupt(&error) {
            Some(interrupt) => Self::Interrupted(interrupt.clone()),
            None => Self::Io(error),
        }
    }
}

impl kernel::MaybeInterrupt for Failure {
    fn interrupt(&self) -> Option<&Interrupt> {
        match self {
            Self::Interrupted(interrupt) => Some(interrupt),
            Self::Io(_) | Self::Down(_) => None,
        }
    }
}

async fn attempt(peer: SocketAddr, uri: &Uri, options: &Options) -> Result<Connection, Failure> {
    let stream = TcpStream::connect(peer).await?;
    // Writes are put together before; what is written should leave.
    stream.set_nodelay(true)?;
    let mut limits = uri.limits;
    limits.heartbeat = limits.heartbeat.or(options.heartbeat);
    let name = uri.connection_name.as_ref().or(options.name.as_ref());
    let config = ClientConfig {
        auth: uri.auth.clone(),
        virtual_host: uri.virtual_host.clone(),
        limits,
        name: name.cloned().unwrap_or_default(),
    };
    let connection = Connection::start(stream, config, options.clone());
    match connection.up().await {
        Ok(_) => Ok(connection),
        Err(Error::Lost(down)) => Err(Failure::Down(down)),
        Err(Error::Interrupted(interrupt)) => Err(Failure::Interrupted(interrupt)),
        Err(_) => Err(Failure::Down(Down::ClosedByUs)),
    }
}

/// A refusal that the next attempt would meet again.
fn refused(server: String, uri: &Uri, down: Down) -> Error {
    match down {
        Down::ClosedByPeer(reason) if reason.code == ReplyCode::ACCESS_REFUSED => {
            let user = match &uri.auth {
                Auth::Plain { user, .. } | Auth::AmqPlain { user, .. } => user.clone(),
                Auth::External => "of the certificate".to_owned(),
            };
            Error::LoginRefused {
                server,
                user,
                reason,
            }
        }
        Down::ClosedByPeer(reason) => Error::VirtualHost {
            server,
            name: uri.virtual_host.clone(),
            reason,
        },
        down => Error::Connect {
            to: uri.to_string(),
            tried: vec![format!("{server}: {down}")],
        },
    }
}

/// Chance from the standard library's own hasher: not for secrets, good enough to spread clients.
fn shuffled(hosts: &[Host]) -> Vec<&Host> {
    let mut hosts: Vec<_> = hosts.iter().collect();
    let state = RandomState::new();
    for i in (1..hosts.len()).rev() {
        let mut hasher = state.build_hasher();
        hasher.write_usize(i);
        let j = hasher.finish() % (i as u64 + 1);
        hosts.swap(i, j as usize);
    }
    hosts
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
    /// Starts the handshake on a stream that is connected, and the task that runs it.
    pub(super) fn start<T>(io: Io<T>, config: ClientConfig, options: Options) -> Self
    where
        T: AsFd + 'static,
        for<'a> &'a T: Read + Write,
    {
        let epoch = NEXT_EPOCH.fetch_add(1, Ordering::Relaxed);
        let core = Core::new(config, epoch, kernel::now());
        let shared = Shared::new(core, options);
        let driver = kernel::spawn(drive(io, Rc::clone(&shared)));
        driver.set_name("amqp connection");
        Self {
            inner: Rc::new(ConnectionInner { shared }),
        }
    }

    /// Waits for the end of the handshake.
    pub(super) async fn up(&self) -> Result<Tuned, Error> {
        self.inner.shared.up().await
    }

    /// Opens a channel.
    ///
    /// Cancellation point: yes. If dropped, the channel is closed again.
    ///
    /// # Errors
    /// [`Error::NoChannelLeft`]; [`Error::Timeout`], [`Error::Lost`], [`Error::Closed`], [`Error::Interrupted`].
    pub async fn channel(&self) -> Result<Channel, Error> {
        Channel::open(&self.inner, None).await
    }

    /// Opens a channel for publishing with confirms.
    ///
    /// Cancellation point: yes. If dropped, the channel is closed again.
    ///
    /// # Errors
    /// As [`channel`](Self::channel).
    pub async fn publisher(&self, options: PublisherOptions) -> Result<Publisher, Error> {
        let channel = Channel::open(&self.inner, Some(options.window)).await?;
        Ok(Publisher::new(channel))
    }

    /// What happens to the connection from now on.
    pub fn events(&self) -> Events {
        let log = Rc::new(EventLog::default());
        let mut book = self.inner.shared.book.borrow_mut();
        book.logs.push(Rc::downgrade(&log));
        drop(book);
        if let Some(down) = self.inner.shared.down() {
            log.push(ConnectionEvent::Lost(down.clone()));
        }
        Events { log }
    }

    /// Whether the broker has asked publishers to wait.
    pub fn is_blocked(&self) -> bool {
        self.inner.shared.peek(Core::is_blocked)
    }

    /// What both sides have agreed upon; `None` once the connection is closed.
    pub fn tuned(&self) -> Option<Tuned> {
        self.inner.shared.peek(Core::tuned)
    }

    /// Waits until the connection has ended, and says how.
    ///
    /// Cancellation point: only if it has not ended. If dropped, nothing happens.
    ///
    /// # Errors
    /// An [`Interrupt`].
    pub async fn closed(&self) -> Result<Down, Interrupt> {
        self.inner.shared.ended().await.cloned()
    }

    /// Closes the connection: takes nothing new, sends what is queued, waits for the confirms of what was published, tells the server, and
    /// waits for its agreement; all of that at most for `patience`. Deliveries that are not settled go back to their queues.
    ///
    /// A connection that is closed, or lost, is fine: this returns at once.
    ///
    /// Cancellation point: yes. If dropped, it is closed all the same.
    ///
    /// # Errors
    /// An [`Interrupt`].
    pub async fn close(&self, patience: Duration) -> Result<Closed, Interrupt> {
        let shared = &self.inner.shared;
        shared.start_closing(patience);
        shared.ended().await?;
        Ok(Closed {
            unconfirmed: shared.left_unconfirmed(),
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
    /// The connection has ended, how ever. There are no events after this one.
    Lost(Down),
}

/// The events of a connection; made by [`Connection::events`]. Of more than 256 that nobody has looked at, the oldest are
/// forgotten.
#[derive(Debug)]
pub struct Events {
    log: Rc<EventLog>,
}

impl Events {
    /// Waits for the next event; `None` after [`ConnectionEvent::Lost`].
    ///
    /// Cancellation point: only if there is none. If dropped, no event is lost.
    ///
    /// # Errors
    /// An [`Interrupt`].
    pub async fn next(&mut self) -> Result<Option<ConnectionEvent>, Interrupt> {
        loop {
            let event = self.log.events.borrow_mut().pop_front();
            if event.is_some() || self.log.is_over.get() {
                return Ok(event);
            }
            self.log.arrived.clear();
            self.log.arrived.wait().await?;
        }
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
        if matches!(event, ConnectionEvent::Lost(_)) {
            self.is_over.set(true);
        }
        events.push_back(event);
        drop(events);
        self.arrived.set();
    }
}
