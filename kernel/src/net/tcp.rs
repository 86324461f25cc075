//! TCP.

use std::future::Future;
use std::io;
use std::net::{self, Shutdown, SocketAddr, ToSocketAddrs};

use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::address::Address;
use super::io::{Io, accept};
use crate::error::MaybeInterrupt;
use crate::traps::{Direction, ReadyOp, at_caller};

/// How to make a listening socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listening {
    /// Connections that the system completes before anybody accepts them; it may have a lower limit of its own.
    pub(super) backlog: u32,
    pub(super) reuse_address: bool,
    pub(super) reuse_port: bool,
}

impl Default for Listening {
    fn default() -> Self {
        Self {
            backlog: 1024,
            reuse_address: true,
            reuse_port: false,
        }
    }
}

/// Accepts TCP connections. Its methods are on the page of [`Io`], as are those of all sockets.
///
/// If dropped, it is closed, and connections nobody accepted are refused.
pub type TcpListener = Io<net::TcpListener>;

/// A TCP connection. Its methods are on the page of [`Io`].
///
/// If dropped, it is closed; what was written is sent first.
pub type TcpStream = Io<net::TcpStream>;

impl Io<net::TcpListener> {
    /// Listens on the first of the addresses that can be had; port 0 means any free one. A port that an earlier listener has just
    /// left can be had (`SO_REUSEADDR`). A host name is looked up on the spot: give an address where that must not block.
    ///
    /// [`Server`](super::Server) knows more options.
    ///
    /// Not a cancellation point.
    ///
    /// # Errors
    /// Those of `bind(2)` and `listen(2)`, with the address; of several addresses all, with the kind of the last.
    pub fn bind(on: impl ToSocketAddrs) -> io::Result<Self> {
        Self::bind_as(on, Listening::default())
    }

    pub(super) fn bind_as(on: impl ToSocketAddrs, how: Listening) -> io::Result<Self> {
        let mut failures = Failures::default();
        for local in on.to_socket_addrs()? {
            match listen(local, how) {
                Ok(listener) => return Ok(listener),
                Err(error) => failures.add(local, error),
            }
        }
        Err(failures.into_error("listen on", None))
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
    /// Connects; of several addresses of one name to the first that answers, in the resolver's order.
    ///
    /// Cancellation point: yes. If dropped, the attempt is given up.
    ///
    /// # Errors
    /// Those of [`Address::resolve`]; those of `connect(2)`, with the address, and of several addresses all, with the kind of the last; an
    /// [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn connect(to: impl Into<Address>) -> impl Future<Output = io::Result<Self>> {
        at_caller(async move {
            let to = to.into();
            let mut failures = Failures::default();
            for peer in to.clone().resolve().await? {
                match open(None, peer).await {
                    Err(error) if error.interrupt().is_none() => failures.add(peer, error),
                    outcome => return outcome,
                }
            }
            Err(failures.into_error("connect to", Some(&to)))
        })
    }

    /// Connects from a local address of one's choice, with port 0 from any of its ports (Curio's `source_addr`). As [`connect`](Self::connect) otherwise.
    ///
    /// # Errors
    /// As [`connect`](Self::connect), with those of `bind(2)`.
    #[track_caller]
    pub fn connect_from(
        local: SocketAddr,
        peer: SocketAddr,
    ) -> impl Future<Output = io::Result<Self>> {
        at_caller(async move {
            match open(Some(local), peer).await {
                Err(error) if error.interrupt().is_none() => {
                    let text = format!("cannot connect from {local} to {peer}: {error}");
                    Err(io::Error::new(error.kind(), text))
                }
                outcome => outcome,
            }
        })
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

fn listen(local: SocketAddr, how: Listening) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(local),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(how.reuse_address)?;
    if how.reuse_port {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&local.into())?;
    socket.listen(how.backlog.try_into().unwrap_or(i32::MAX))?;
    Io::from_std(socket.into())
}

async fn open(local: Option<SocketAddr>, peer: SocketAddr) -> io::Result<TcpStream> {
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

/// What became of the addresses of a name, none of which could be had.
#[derive(Default)]
struct Failures(Vec<(SocketAddr, io::Error)>);

impl Failures {
    fn add(&mut self, address: SocketAddr, error: io::Error) {
        self.0.push((address, error));
    }

    /// One error of all of them, of the last one's kind.
    fn into_error(self, what: &str, name: Option<&Address>) -> io::Error {
        let Some((_, last)) = self.0.last() else {
            let text = match name {
                Some(name) => format!("cannot {what} {name}: the name has no address"),
                None => format!("cannot {what} a name without an address"),
            };
            return io::Error::new(io::ErrorKind::NotFound, text);
        };
        let each = |(address, error): &(SocketAddr, io::Error)| format!("{address}: {error}");
        let all: Vec<String> = self.0.iter().map(each).collect();
        let text = match name {
            Some(name) if all.len() > 1 => format!("cannot {what} {name}: {}", all.join("; ")),
            _ => format!("cannot {what} {}", all.join("; ")),
        };
        io::Error::new(last.kind(), text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_error_tells_of_all_addresses() {
        let mut failures = Failures::default();
        let name = Address::from(("example.org", 80));
        let none = failures.into_error("connect to", Some(&name));
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
        assert!(none.to_string().contains("example.org:80"), "{none}");

        failures = Failures::default();
        failures.add(([10, 0, 0, 1], 80).into(), io::ErrorKind::TimedOut.into());
        let one = Failures(vec![failures.0.remove(0)]).into_error("connect to", Some(&name));
        assert_eq!(one.to_string(), "cannot connect to 10.0.0.1:80: timed out");

        failures.add(([10, 0, 0, 1], 80).into(), io::ErrorKind::TimedOut.into());
        failures.add(
            ([10, 0, 0, 2], 80).into(),
            io::ErrorKind::ConnectionRefused.into(),
        );
        let both = failures.into_error("connect to", Some(&name));
        assert_eq!(both.kind(), io::ErrorKind::ConnectionRefused);
        let text = "cannot connect to example.org:80: 10.0.0.1:80: timed out; 10.0.0.2:80: connection refused";
        assert_eq!(both.to_string(), text);
    }
}
