//! TCP.

use std::io;
use std::net::{self, Shutdown, SocketAddr, ToSocketAddrs};

use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::address::Address;
use super::io::{Io, accept};
use crate::error::MaybeInterrupt;
use crate::traps::{Direction, ReadyOp};

/// Connections that the system completes before anybody accepts them; it may have a lower limit of its own.
const BACKLOG: i32 = 1024;

/// Accepts TCP connections.
///
/// If dropped, it is closed, and connections nobody accepted are refused.
pub type TcpListener = Io<net::TcpListener>;

/// A TCP connection.
///
/// If dropped, it is closed; what was written is sent first.
pub type TcpStream = Io<net::TcpStream>;

impl Io<net::TcpListener> {
    /// Listens on the first of the addresses that can be had; port 0 means any free one. A port that an earlier listener has just
    /// left can be had (`SO_REUSEADDR`). A host name is looked up on the spot: give an address where that must not block.
    ///
    /// Not a cancellation point.
    ///
    /// # Errors
    /// That of the last address tried.
    pub fn bind(on: impl ToSocketAddrs) -> io::Result<Self> {
        let mut last = None;
        for local in on.to_socket_addrs()? {
            match listen(local) {
                Ok(listener) => return Ok(listener),
                Err(error) => last = Some(explain("listen on", local, error)),
            }
        }
        Err(last.unwrap_or_else(no_address))
    }

    /// Accepts a connection, and says who made it.
    ///
    /// Cancellation point: only if there is none. If dropped, none was accepted.
    ///
    /// # Errors
    /// As [`Source::ready_op`](crate::traps::Source::ready_op), with those of `accept(2)`. Some of those concern one connection only, or pass when
    /// descriptors are closed: a server goes on after them.
    #[track_caller]
    pub fn accept(&self) -> ReadyOp<'_, impl FnMut() -> io::Result<(TcpStream, SocketAddr)>> {
        self.ready_op(Direction::Read, |listener| {
            let (socket, peer) = accept(listener)?;
            let stream = net::TcpStream::from(socket);
            let peer = peer.map_or_else(|| stream.peer_addr(), Ok)?;
            Ok((Io::adopt(stream), peer))
        })
    }

    /// The address it listens on, with the port that port 0 became.
    ///
    /// # Errors
    /// Those of `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.as_std().local_addr()
    }
}

impl Io<net::TcpStream> {
    /// Connects; of several addresses of one name to the first that answers.
    ///
    /// Cancellation point: yes. If dropped, the attempt is given up.
    ///
    /// # Errors
    /// Those of [`Address::resolve`]; that of the last address tried; an [`Interrupt`](crate::Interrupt).
    pub async fn connect(to: impl Into<Address>) -> io::Result<Self> {
        let mut last = None;
        for peer in to.into().resolve().await? {
            match open(None, peer).await {
                Err(error) if error.interrupt().is_none() => last = Some(error),
                outcome => return outcome,
            }
        }
        Err(last.unwrap_or_else(no_address))
    }

    /// Connects from a local address of one's choice, with port 0 from any of its ports (Curio's `source_addr`). As [`connect`](Self::connect) otherwise.
    ///
    /// # Errors
    /// As [`connect`](Self::connect), with those of `bind(2)`.
    pub async fn connect_from(local: SocketAddr, peer: SocketAddr) -> io::Result<Self> {
        open(Some(local), peer).await
    }

    /// Our end.
    ///
    /// # Errors
    /// Those of `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.as_std().local_addr()
    }

    /// The other end.
    ///
    /// # Errors
    /// Those of `getpeername(2)`.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.as_std().peer_addr()
    }

    /// Whether small writes leave at once (`true`) or wait for the acknowledgement of earlier ones (Nagle; the system's default).
    ///
    /// # Errors
    /// Those of `setsockopt(2)`.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        self.as_std().set_nodelay(nodelay)
    }

    /// Ends one direction or both. The other side reads to the end of what was written; tasks that wait here in that direction
    /// go on.
    ///
    /// # Errors
    /// Those of `shutdown(2)`.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.as_std().shutdown(how)
    }

    /// As [`read`](Self::read), but leaves the bytes where they are.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[track_caller]
    pub fn peek(&self, buf: &mut [u8]) -> ReadyOp<'_, impl FnMut() -> io::Result<usize>> {
        self.ready_op(Direction::Read, |stream| stream.peek(buf))
    }
}

fn listen(local: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(local),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.bind(&local.into())?;
    socket.listen(BACKLOG)?;
    Io::from_std(socket.into())
}

async fn open(local: Option<SocketAddr>, peer: SocketAddr) -> io::Result<TcpStream> {
    let attempt = async {
        let socket = Socket::new(Domain::for_address(peer), Type::STREAM, Some(Protocol::TCP))?;
        if let Some(local) = local {
            socket.bind(&local.into())?;
        }
        let stream = Io::from_std(net::TcpStream::from(socket))?;
        let mut has_begun = false;
        let connecting = stream.ready_op(Direction::Write, |stream| {
            if has_begun {
                return connected(stream);
            }
            has_begun = true;
            match SockRef::from(stream).connect(&peer.into()) {
                Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => {
                    Err(io::ErrorKind::WouldBlock.into())
                }
                outcome => outcome,
            }
        });
        connecting.await?;
        Ok(stream)
    };
    attempt
        .await
        .map_err(|error| explain("connect to", peer, error))
}

/// What became of a connection attempt, once the socket can be written to.
fn connected(stream: &net::TcpStream) -> io::Result<()> {
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    match stream.peer_addr() {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => {
            Err(io::ErrorKind::WouldBlock.into())
        }
        outcome => outcome.map(drop),
    }
}

/// Says what was attempted; an interrupt stays what it is.
fn explain(what: &str, address: SocketAddr, error: io::Error) -> io::Error {
    if error.interrupt().is_some() {
        return error;
    }
    io::Error::new(error.kind(), format!("cannot {what} {address}: {error}"))
}

fn no_address() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the name has no address")
}
