//! Unix domain sockets, for connections within one machine.

use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::os::unix::net;
use std::path::Path;
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::io::{Io, accept};
use super::tcp::Listening;
use crate::time::sleep;
use crate::traps::{Direction, ReadyOp, at_caller};

/// Accepts Unix domain connections. Its methods are on the page of [`Io`].
///
/// If dropped, it is closed; its path stays in the file system, and binding to it again fails before it is removed.
pub type UnixListener = Io<net::UnixListener>;

/// A Unix domain connection. Its methods are on the page of [`Io`].
///
/// If dropped, it is closed; what was written can still be read by the other side.
pub type UnixStream = Io<net::UnixStream>;

impl Io<net::UnixListener> {
    /// Listens at a path, which must not exist.
    ///
    /// Not a cancellation point.
    ///
    /// # Errors
    /// Those of `bind(2)`, with the path.
    pub fn bind(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::bind_as(path.as_ref(), Listening::default())
    }

    pub(super) fn bind_as(path: &Path, how: Listening) -> io::Result<Self> {
        let listen = || {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            socket.bind(&SockAddr::unix(path)?)?;
            socket.listen(how.backlog.try_into().unwrap_or(i32::MAX))?;
            Self::from_std(socket.into())
        };
        listen().map_err(|error| explain("listen at", path, error))
    }

    /// The path it listens at.
    ///
    /// # Errors
    /// Those of `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<net::SocketAddr> {
        self.as_std().local_addr()
    }

    /// Accepts a connection.
    ///
    /// Cancellation point: only if there is none. If dropped, none was accepted.
    ///
    /// # Errors
    /// As [`Source::ready_op`](crate::traps::Source::ready_op), with those of `accept(2)`.
    #[track_caller]
    pub fn accept(&self) -> ReadyOp<'_, impl FnMut() -> io::Result<UnixStream>> {
        self.ready_op(Direction::Read, |listener| {
            Ok(Io::adopt(accept(listener)?.0.into()))
        })
    }
}

impl Io<net::UnixStream> {
    /// Connects. While the listener's backlog is full, tries again now and then: the system offers nothing to wait for.
    ///
    /// Cancellation point: only while the backlog is full. If dropped, the attempt is given up.
    ///
    /// # Errors
    /// Those of `connect(2)`, with the path; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn connect(path: impl AsRef<Path>) -> impl Future<Output = io::Result<Self>> {
        at_caller(async move {
            let path = path.as_ref();
            let address =
                SockAddr::unix(path).map_err(|error| explain("connect to", path, error))?;
            let stream = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            let stream = Self::from_std(stream.into())?;
            let mut pause = Duration::from_millis(1);
            loop {
                match SockRef::from(&stream).connect(&address) {
                    Ok(()) => return Ok(stream),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        sleep(pause).await?;
                        pause = (pause * 2).min(Duration::from_millis(64));
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(explain("connect to", path, error)),
                }
            }
        })
    }

    /// Two connected ends.
    ///
    /// # Errors
    /// Those of `socketpair(2)`.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = net::UnixStream::pair()?;
        Ok((Self::from_std(one)?, Self::from_std(other)?))
    }

    /// Ends one direction or both; as [`TcpStream::shutdown`](super::TcpStream).
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
        self.ready_op(Direction::Read, |stream| {
            let (_, length) = recv(stream, &mut *buf, RecvFlags::PEEK)?;
            Ok(length)
        })
    }
}

fn explain(what: &str, path: &Path, error: io::Error) -> io::Error {
    let text = format!("cannot {what} {}: {error}", path.display());
    io::Error::new(error.kind(), text)
}
