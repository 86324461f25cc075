//! A descriptor in non-blocking mode, and the calls that sockets and pipes have in common.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};

use rustix::io::ioctl_fionbio;

use crate::error::{Interrupt, MaybeInterrupt};
use crate::traps::{Direction, IoPlace, ReadyOp, Source};

/// A descriptor in non-blocking mode: what [`TcpStream`](super::TcpStream) and its like are, by the type of the standard library inside.
///
/// If dropped, it is closed. It cannot be while a task waits in one of its methods, since the wait borrows it; to have such a
/// task told that it is over, shut the connection down or use [`io_release`](crate::traps::io_release).
#[derive(Debug)]
pub struct Io<T> {
    /// Before the descriptor, which must be forgotten before it is closed.
    source: Source,
    inner: T,
}

impl<T: AsFd> Io<T> {
    /// Takes over a socket or pipe, and puts it into non-blocking mode.
    ///
    /// # Errors
    /// If it has no such mode.
    pub fn from_std(inner: T) -> io::Result<Self> {
        ioctl_fionbio(&inner, true)?;
        Ok(Self::adopt(inner))
    }

    /// Gives it back in blocking mode, for instance to lend it to a thread.
    ///
    /// # Errors
    /// If the mode cannot be set; then it is closed.
    pub fn into_std(self) -> io::Result<T> {
        let Self { source, inner } = self;
        source.release();
        ioctl_fionbio(&inner, false)?;
        Ok(inner)
    }

    /// Takes over what is in non-blocking mode already.
    pub(crate) fn adopt(inner: T) -> Self {
        Self {
            source: Source::new(&inner),
            inner,
        }
    }

    /// Has another kernel forget it, before the running one uses it. No task may wait for it there.
    pub(crate) fn move_here(&self) {
        self.source.move_here();
    }

    /// The type inside, for its options. Reading or writing through it confuses the kernel's memory of what is ready.
    pub const fn as_std(&self) -> &T {
        &self.inner
    }

    /// Makes a system call of which it is not known whether it was exhaustive.
    #[track_caller]
    pub(crate) fn ready_op<'a, R>(
        &'a self,
        direction: Direction,
        mut call: impl FnMut(&'a T) -> io::Result<R>,
    ) -> ReadyOp<'a, impl FnMut() -> io::Result<R>> {
        self.source.ready_op(direction, move || call(&self.inner))
    }

    /// Makes a system call that moves up to `len` bytes. One that moved some, but fewer, has emptied or filled the buffer
    /// of the system: the next would only say so.
    #[track_caller]
    pub(super) fn moving<'a>(
        &'a self,
        direction: Direction,
        len: usize,
        mut call: impl FnMut(&'a T) -> io::Result<usize>,
    ) -> ReadyOp<'a, impl FnMut() -> io::Result<usize>> {
        self.source.ready_op(direction, move || {
            let moved = call(&self.inner)?;
            if 0 < moved && moved < len {
                self.source.clear_ready(direction);
            }
            Ok(moved)
        })
    }

    /// As [`moving`](Self::moving), for a method that polls.
    pub(super) fn poll_moving<'a>(
        &'a self,
        direction: Direction,
        place: &mut IoPlace,
        cx: &mut Context<'_>,
        len: usize,
        mut call: impl FnMut(&'a T) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        self.source.poll_op(direction, place, cx, || {
            let moved = call(&self.inner)?;
            if 0 < moved && moved < len {
                self.source.clear_ready(direction);
            }
            Ok(moved)
        })
    }
}

impl<T: AsFd> Io<T>
where
    for<'a> &'a T: Read,
{
    /// Reads what is there, at most `buf.len()` bytes; 0 at the end.
    ///
    /// Cancellation point: only if nothing is there. If dropped, nothing was read.
    ///
    /// # Errors
    /// As [`Source::ready_op`], with those of `read(2)`.
    #[track_caller]
    pub fn read(&self, buf: &mut [u8]) -> ReadyOp<'_, impl FnMut() -> io::Result<usize>> {
        self.moving(Direction::Read, buf.len(), move |mut inner| inner.read(buf))
    }

    /// As [`read`](Self::read), into several buffers, one after the other.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[track_caller]
    pub fn read_vectored(
        &self,
        bufs: &mut [IoSliceMut<'_>],
    ) -> ReadyOp<'_, impl FnMut() -> io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum();
        self.moving(Direction::Read, len, move |mut inner| {
            inner.read_vectored(bufs)
        })
    }
}

impl<T: AsFd> Io<T>
where
    for<'a> &'a T: Write,
{
    /// Writes as much of `data` as the system takes, and says how much that was.
    ///
    /// Cancellation point: only if it takes nothing. If dropped, nothing was written.
    ///
    /// # Errors
    /// As [`Source::ready_op`], with those of `write(2)`.
    #[track_caller]
    pub fn write(&self, data: &[u8]) -> ReadyOp<'_, impl FnMut() -> io::Result<usize>> {
        self.moving(Direction::Write, data.len(), |mut inner| inner.write(data))
    }

    /// As [`write`](Self::write), from several buffers, one after the other.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    #[track_caller]
    pub fn write_vectored(
        &self,
        bufs: &[IoSlice<'_>],
    ) -> ReadyOp<'_, impl FnMut() -> io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum();
        self.moving(Direction::Write, len, |mut inner| {
            inner.write_vectored(bufs)
        })
    }

    /// Writes all of `data` (Curio's `sendall`).
    ///
    /// Cancellation point: whenever the system takes no more. If dropped, a part may have been written, and nobody knows how much.
    ///
    /// # Errors
    /// As [`write`](Self::write), with the number of bytes that went before; also for an interrupt.
    #[track_caller]
    pub fn write_all(&self, data: &[u8]) -> impl Future<Output = Result<(), Incomplete>> {
        let (mut done, mut place) = (0, IoPlace::new());
        poll_fn(move |cx| {
            while done < data.len() {
                let (direction, rest) = (Direction::Write, &data[done..]);
                let written =
                    self.poll_moving(direction, &mut place, cx, rest.len(), |mut inner| {
                        inner.write(rest)
                    });
                done += match ready!(written) {
                    Ok(0) => {
                        let error = io::ErrorKind::WriteZero.into();
                        return Poll::Ready(Err(Incomplete { done, error }));
                    }
                    Ok(written) => written,
                    Err(error) => return Poll::Ready(Err(Incomplete { done, error })),
                };
            }
            Poll::Ready(Ok(()))
        })
    }
}

impl<T: AsFd> AsFd for Io<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// An operation of several system calls ended early: how far it came (Curio's `bytes_sent`, `bytes_read`), and why no further.
///
/// Timeouts travel through it and leave the count alone. As an [`io::Error`], which `?` makes of it, it has lost the count.
#[derive(Debug, thiserror::Error)]
#[error("{error} (after {done} bytes)")]
pub struct Incomplete {
    /// How many bytes were moved before.
    pub done: usize,
    /// Why it ended.
    #[source]
    pub error: io::Error,
}

impl From<Interrupt> for Incomplete {
    fn from(interrupt: Interrupt) -> Self {
        Self {
            done: 0,
            error: interrupt.into(),
        }
    }
}

impl From<Incomplete> for io::Error {
    fn from(incomplete: Incomplete) -> Self {
        incomplete.error
    }
}

impl MaybeInterrupt for Incomplete {
    fn interrupt(&self) -> Option<&Interrupt> {
        self.error.interrupt()
    }

    fn replace_interrupt(self, with: Interrupt) -> Self {
        Self {
            done: self.done,
            error: with.into(),
        }
    }
}

/// Accepts a connection in non-blocking mode, in one system call.
#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
pub(super) fn accept(listener: impl AsFd) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
    use rustix::net::{SocketFlags, acceptfrom_with};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (socket, peer) = acceptfrom_with(listener, flags)?;
    Ok((socket, peer.and_then(|peer| peer.try_into().ok())))
}

/// Accepts a connection, then puts it into non-blocking mode.
#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd")))]
pub(super) fn accept(listener: impl AsFd) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
    let (socket, peer) = socket2::SockRef::from(&listener).accept()?;
    socket.set_nonblocking(true)?;
    Ok((socket.into(), peer.as_socket()))
}
