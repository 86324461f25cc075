//! Servers: a task for each client (Curio's `tcp_server`, `unix_server`, `run_server`).
//!
//! A server is a task group: clients that end are taken out and what went wrong with them is logged, one by one, while the others go on; the
//! end of the server, whatever brings it, is the end of its clients. How many there may be is bounded. Those who come above the bound are not
//! refused but wait in the system's backlog.
//!
//! `accept` fails for three reasons. A connection may have been broken before it was accepted: on to the next. The process may be out of
//! descriptors: it will not have more for being asked at once, and asking for ever would take the whole processor, so the server pauses,
//! longer each time, until a client has gone. All else is the end of the server.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Display;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use rustix::io::Errno;

use super::tcp::{Listening, TcpListener, TcpStream};
use super::unix::{UnixListener, UnixStream};
use crate::error::{Interrupt, MaybeInterrupt};
use crate::group::{Done, GroupError, TaskGroup, Wait};
use crate::task::TaskId;
use crate::time::sleep;
use crate::traps::at_caller;

const MAX_CLIENTS: usize = 512;
const PAUSES: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(1);

/// Serves TCP clients: `handler` runs in a task for each. [`Server`] has the options, and this is `Server::new().tcp(on, handler)`.
///
/// # Errors
/// As [`Server::run`], and those of [`TcpListener::bind`].
///
/// ```
/// use kernel::net::{Server, TcpStream, open_connection, tcp_server_socket};
///
/// async fn echo(client: TcpStream) -> std::io::Result<()> {
///     let mut buf = [0; 1024];
///     loop {
///         match client.read(&mut buf).await? {
///             0 => return Ok(()),
///             n => client.write_all(&buf[..n]).await?,
///         }
///     }
/// }
///
/// # kernel::run(async {
/// // With a port that is known, `tcp_server("127.0.0.1:7000", echo)` does as well.
/// let listener = tcp_server_socket("127.0.0.1:0")?;
/// let address = listener.local_addr()?;
/// let server = kernel::spawn(Server::new().run(listener, echo));
///
/// let mut client = open_connection(address).await?;
/// client.write_all(b"hello\n").await?;
/// assert_eq!(client.read_line(100).await?, b"hello\n");
/// server.cancel().await?;
/// # std::io::Result::Ok(()) }).unwrap().unwrap();
/// ```
#[track_caller]
pub fn tcp_server<H>(
    on: impl ToSocketAddrs,
    handler: H,
) -> impl Future<Output = io::Result<Infallible>>
where
    H: AsyncFn(TcpStream) -> io::Result<()> + 'static,
{
    Server::new().tcp(on, handler)
}

/// Serves clients that connect to `path`: `handler` runs in a task for each. [`Server`] has the options, and this is
/// `Server::new().unix(path, handler)`.
///
/// # Errors
/// As [`Server::run`], and those of [`UnixListener::bind`].
#[track_caller]
pub fn unix_server<H>(
    path: impl AsRef<Path>,
    handler: H,
) -> impl Future<Output = io::Result<Infallible>>
where
    H: AsyncFn(UnixStream) -> io::Result<()> + 'static,
{
    Server::new().unix(path, handler)
}

/// The socket of [`tcp_server`], for [`Server::run`]: for whoever wants to know its port, or to make it before privileges are dropped.
///
/// # Errors
/// Those of [`TcpListener::bind`].
pub fn tcp_server_socket(on: impl ToSocketAddrs) -> io::Result<TcpListener> {
    Server::new().tcp_socket(on)
}

/// The socket of [`unix_server`], for [`Server::run`].
///
/// # Errors
/// Those of [`UnixListener::bind`].
pub fn unix_server_socket(path: impl AsRef<Path>) -> io::Result<UnixListener> {
    Server::new().unix_socket(path)
}

/// How to serve clients. `W` is how one is welcomed: [`Plain`], or with TLS.
///
/// | option | unless said |
/// |---|---|
/// | [`max_clients`](Self::max_clients) | 512 |
/// | [`backlog`](Self::backlog) | 1024 |
/// | [`reuse_address`](Self::reuse_address) | yes |
/// | [`reuse_port`](Self::reuse_port) | no |
/// | `tls`, with the feature of that name | none |
#[derive(Clone, Debug)]
#[must_use = "`run`, `tcp` and `unix` serve"]
pub struct Server<W = Plain> {
    listening: Listening,
    max_clients: usize,
    welcome: W,
}

impl Server {
    /// A server as the table above has it.
    pub fn new() -> Self {
        Self {
            listening: Listening::default(),
            max_clients: MAX_CLIENTS,
            welcome: Plain,
        }
    }
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl<W> Server<W> {
    /// How many clients it serves at a time; each takes a descriptor, of which processes often have no more than 1024. Others wait
    /// in the backlog.
    ///
    /// # Panics
    /// If it is 0.
    #[track_caller]
    pub const fn max_clients(mut self, clients: usize) -> Self {
        assert!(clients > 0, "a server without clients serves nobody");
        self.max_clients = clients;
        self
    }

    /// How many connections the system completes before they are accepted. The system may have a lower limit of its own, on Linux
    /// `net.core.somaxconn`.
    pub const fn backlog(mut self, connections: u32) -> Self {
        self.listening.backlog = connections;
        self
    }

    /// Whether a TCP port that an earlier server has just left can be had at once (`SO_REUSEADDR`).
    pub const fn reuse_address(mut self, reuse: bool) -> Self {
        self.listening.reuse_address = reuse;
        self
    }

    /// Whether other processes, which say so too, may listen on the same TCP port; the system deals clients out to them (`SO_REUSEPORT`).
    pub const fn reuse_port(mut self, reuse: bool) -> Self {
        self.listening.reuse_port = reuse;
        self
    }

    /// The socket, for [`run`](Self::run). As [`TcpListener::bind`], with the options.
    ///
    /// # Errors
    /// As [`TcpListener::bind`].
    pub fn tcp_socket(&self, on: impl ToSocketAddrs) -> io::Result<TcpListener> {
        TcpListener::bind_as(on, self.listening)
    }

    /// The socket, for [`run`](Self::run). As [`UnixListener::bind`], with the options.
    ///
    /// # Errors
    /// As [`UnixListener::bind`].
    pub fn unix_socket(&self, path: impl AsRef<Path>) -> io::Result<UnixListener> {
        UnixListener::bind_as(path.as_ref(), self.listening)
    }

    /// [`run`](Self::run) with [`tcp_socket`](Self::tcp_socket).
    ///
    /// # Errors
    /// Theirs.
    #[track_caller]
    pub fn tcp<H>(
        self,
        on: impl ToSocketAddrs,
        handler: H,
    ) -> impl Future<Output = io::Result<Infallible>>
    where
        W: Welcome<TcpStream>,
        H: AsyncFn(W::Client) -> io::Result<()> + 'static,
    {
        at_caller(async move {
            let listener = self.tcp_socket(on)?;
            self.run(listener, handler).await
        })
    }

    /// [`run`](Self::run) with [`unix_socket`](Self::unix_socket). The path stays when the server ends.
    ///
    /// # Errors
    /// Theirs.
    #[track_caller]
    pub fn unix<H>(
        self,
        path: impl AsRef<Path>,
        handler: H,
    ) -> impl Future<Output = io::Result<Infallible>>
    where
        W: Welcome<UnixStream>,
        H: AsyncFn(W::Client) -> io::Result<()> + 'static,
    {
        at_caller(async move {
            let listener = self.unix_socket(path)?;
            self.run(listener, handler).await
        })
    }

    /// Serves those who connect to `listener`, until it is interrupted or the listener fails (Curio's `run_server`). `handler` gets a client as its
    /// own, in a task of its own, and the connection is closed when it drops it. Its error or panic ends that client alone, and is logged.
    ///
    /// Cancellation point: yes. An interrupt cancels the clients, and is the answer when they have ended; if dropped, they are cancelled,
    /// but not waited for.
    ///
    /// # Errors
    /// Those of `accept(2)` that concern the listener; an [`Interrupt`].
    #[track_caller]
    pub fn run<L, H>(self, listener: L, handler: H) -> impl Future<Output = io::Result<Infallible>>
    where
        L: Listen,
        W: Welcome<L::Stream>,
        H: AsyncFn(W::Client) -> io::Result<()> + 'static,
    {
        at_caller(async move {
            let service = Rc::new((self.welcome, handler));
            let mut clients = Clients {
                tasks: TaskGroup::new(Wait::None),
                peers: HashMap::new(),
                was_full: false,
            };
            let stopped = loop {
                let (stream, peer) = match clients.next(&listener, self.max_clients).await {
                    Ok(client) => client,
                    Err(error) => break error,
                };
                let service = Rc::clone(&service);
                let task = clients.tasks.spawn(async move {
                    let (welcome, handler) = &*service;
                    let client = welcome.welcome(stream).await?;
                    handler(client).await
                });
                task.set_name(&format!("client {peer}"));
                clients.peers.insert(task.id(), peer);
            };
            for (id, result) in clients.tasks.join().await?.results {
                report(clients.peers.remove(&id), result);
            }
            Err(stopped)
        })
    }
}

struct Clients<P> {
    tasks: TaskGroup<(), io::Error>,
    /// Who they are, for the log.
    peers: HashMap<TaskId, P>,
    /// The log says once that they are many.
    was_full: bool,
}

impl<P: Display> Clients<P> {
    /// The next client that there is room for. Sees those off, meanwhile, that have ended.
    async fn next<L: Listen<Peer = P>>(
        &mut self,
        listener: &L,
        most: usize,
    ) -> io::Result<(L::Stream, P)> {
        let mut pauses = Pauses::new();
        loop {
            let (is_empty, is_full) = (self.peers.is_empty(), self.peers.len() >= most);
            let event = {
                let mut accepted = pin!(listener.accept());
                let mut ended = pin!(self.tasks.next_done());
                poll_fn(|cx| {
                    if !is_empty && let Poll::Ready(ended) = ended.as_mut().poll(cx) {
                        return Poll::Ready(Event::Ended(ended));
                    }
                    if is_full {
                        return Poll::Pending;
                    }
                    accepted.as_mut().poll(cx).map(Event::Accepted)
                })
                .await
            };
            match event {
                Event::Ended(ended) => {
                    let Done { task, result } = ended?.expect("there is a client");
                    report(self.peers.remove(&task.id()), result);
                }
                Event::Accepted(Ok(client)) => {
                    if self.peers.len() + 1 == most && !std::mem::replace(&mut self.was_full, true)
                    {
                        log::warn!("{most} clients at a time, others wait; see `max_clients`");
                    }
                    return Ok(client);
                }
                Event::Accepted(Err(error)) => match Trouble::of(&error) {
                    Trouble::Connection => log::debug!("a client went before it came: {error}"),
                    Trouble::Exhausted => sleep(pauses.next(&error)).await.map(drop)?,
                    Trouble::Listener => return Err(error),
                },
            }
        }
    }
}

enum Event<C> {
    Accepted(io::Result<C>),
    Ended(Result<Option<Done<(), io::Error>>, Interrupt>),
}

/// Says what was wrong with a client; one that was cancelled has only been told to go.
fn report(peer: Option<impl Display>, result: Result<(), GroupError<io::Error>>) {
    let peer = peer.map_or_else(String::new, |peer| format!(" {peer}"));
    match result {
        Ok(()) => log::debug!("client{peer} has gone"),
        Err(GroupError::Failed(error)) if error.interrupt().is_some() => {
            log::debug!("client{peer}: {error}");
        }
        Err(GroupError::Failed(error)) => log::warn!("client{peer}: {error}"),
        Err(GroupError::Join(error)) => log::error!("client{peer}: {error}"),
    }
}

/// What a failure to accept means.
#[derive(PartialEq, Eq, Debug)]
enum Trouble {
    /// This connection is broken.
    Connection,
    /// There is no room for any at the moment.
    Exhausted,
    /// There will be no other.
    Listener,
}

impl Trouble {
    fn of(error: &io::Error) -> Self {
        let Some(code) = error.raw_os_error() else {
            return Self::Listener;
        };
        match Errno::from_raw_os_error(code) {
            // Linux hands out errors of the new connection's network as those of `accept`.
            Errno::CONNABORTED
            | Errno::CONNRESET
            | Errno::PROTO
            | Errno::NOPROTOOPT
            | Errno::NETDOWN
            | Errno::NETUNREACH
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
            | Errno::TIMEDOUT
            | Errno::PERM => Self::Connection,
            Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM => Self::Exhausted,
            _ => Self::Listener,
        }
    }
}

/// How long to wait for descriptors.
struct Pauses(Duration);

impl Pauses {
    const fn new() -> Self {
        Self(*PAUSES.start())
    }

    /// Logs the first of them; the others say nothing new.
    fn next(&mut self, error: &io::Error) -> Duration {
        if self.0 == *PAUSES.start() {
            log::error!("cannot accept clients at the moment, going on to try: {error}");
        }
        let pause = self.0;
        self.0 = (pause * 2).min(*PAUSES.end());
        pause
    }
}

/// Where clients come from.
pub trait Listen {
    /// A connection.
    type Stream: 'static;
    /// Who made it, for the log.
    type Peer: Display;

    /// Accepts a connection. If dropped, none was accepted.
    ///
    /// # Errors
    /// Those of `accept(2)`; an [`Interrupt`].
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Self::Peer)>>;
}

impl Listen for TcpListener {
    type Stream = TcpStream;
    type Peer = SocketAddr;

    #[track_caller]
    fn accept(&self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> {
        self.accept()
    }
}

impl Listen for UnixListener {
    type Stream = UnixStream;
    type Peer = &'static str;

    async fn accept(&self) -> io::Result<(UnixStream, &'static str)> {
        Ok((self.accept().await?, "of a Unix socket"))
    }
}

/// What happens to a connection before it is handed to the handler, in the client's task.
pub trait Welcome<S>: 'static {
    /// What the handler gets.
    type Client: 'static;

    /// Makes a client of a connection.
    ///
    /// # Errors
    /// Those of whatever it does; the connection is closed then.
    fn welcome(&self, stream: S) -> impl Future<Output = io::Result<Self::Client>>;
}

/// The handler gets the connection as it is.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl<S: 'static> Welcome<S> for Plain {
    type Client = S;

    async fn welcome(&self, stream: S) -> io::Result<S> {
        Ok(stream)
    }
}

#[cfg(feature = "tls")]
mod with_tls {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use rustls::ServerConfig;

    use super::*;
    use crate::net::io::Io;
    use crate::net::tls::TlsStream;
    use crate::time::timeout_after;

    /// The handler gets a [`TlsStream`].
    #[derive(Clone, Debug)]
    pub struct Tls {
        config: Arc<ServerConfig>,
        handshake: Duration,
    }

    impl Server {
        /// Speaks TLS: the handler gets a [`TlsStream`], which it should [close](TlsStream::close) when all is said. A client that has not finished its
        /// handshake within 10 seconds is let go.
        pub fn tls(self, config: Arc<ServerConfig>) -> Server<Tls> {
            let handshake = Duration::from_secs(10);
            Server {
                listening: self.listening,
                max_clients: self.max_clients,
                welcome: Tls { config, handshake },
            }
        }
    }

    impl Server<Tls> {
        /// How long clients may take for the handshake.
        pub const fn handshake_timeout(mut self, timeout: Duration) -> Self {
            self.welcome.handshake = timeout;
            self
        }
    }

    impl<T: AsFd + 'static> Welcome<Io<T>> for Tls
    where
        for<'a> &'a T: Read + Write,
    {
        type Client = TlsStream<Io<T>>;

        async fn welcome(&self, stream: Io<T>) -> io::Result<Self::Client> {
            let accepting = TlsStream::accept(stream, Arc::clone(&self.config));
            match timeout_after(self.handshake, accepting).await {
                Err(error) if error.interrupt() == Some(&Interrupt::TaskTimeout) => {
                    let text = format!("no TLS handshake within {:?}", self.handshake);
                    Err(io::Error::new(io::ErrorKind::TimedOut, text))
                }
                accepted => accepted,
            }
        }
    }
}

#[cfg(feature = "tls")]
pub use with_tls::Tls;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_to_accept_are_told_apart() {
        for (code, trouble) in [
            (Errno::CONNABORTED, Trouble::Connection),
            (Errno::HOSTUNREACH, Trouble::Connection),
            (Errno::MFILE, Trouble::Exhausted),
            (Errno::NOBUFS, Trouble::Exhausted),
            (Errno::INVAL, Trouble::Listener),
            (Errno::BADF, Trouble::Listener),
        ] {
            assert_eq!(Trouble::of(&code.into()), trouble, "{code}");
        }
        assert_eq!(
            Trouble::of(&Interrupt::cancelled().into()),
            Trouble::Listener
        );
    }

    #[test]
    fn pauses_grow_to_a_second_and_begin_small_again() {
        let mut pauses = Pauses::new();
        let error = io::Error::from(Errno::MFILE);
        let taken: Vec<_> = (0..9).map(|_| pauses.next(&error).as_millis()).collect();
        assert_eq!(taken, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
    }
}
