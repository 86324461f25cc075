//! Our connections for code that polls: what `AsyncRead` and its like ask for.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::task::{Context, Poll};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use super::{Io, Stream};
use crate::traps::{Direction, IoPlace};

/// A connection for libraries that poll: with the feature `futures-io` it is `futures_io::AsyncRead` and `AsyncWrite`, with the feature
/// `hyper` it is [`hyper::rt::Read`](https://docs.rs/hyper/1/hyper/rt/) and `Write`. Every [`Io`] can be one, and a `TlsStream` over it.
///
/// # Interruption
/// A read or write that has to wait is a cancellation point inside the foreign code. Its error is then an [`io::Error`] that carries the
/// [`Interrupt`](crate::Interrupt); its kind is not `Interrupted`, which would be tried again. The foreign code passes it on, most often inside an error of its
/// own, and so the task comes to its end as one of ours does. [`Interrupt::find_in`](crate::Interrupt::find_in) finds it there. Many protocols count the connection as broken after
/// any error: to try again after a timeout, use [`drop_after`](crate::drop_after), which leaves no trace in the connection.
///
/// # Dropping half-way
/// A future over this type that is dropped while it waits leaves its wait in here, since the traits have no way to give one up. It is harmless but for one thing:
/// an interrupt that comes before the next operation of that direction is the answer of that operation, too.
///
/// # Closing and flushing
/// Closing means that the writing direction is shut down; the other side reads to its end then. The descriptor is closed when this is dropped. Nothing is
/// buffered here, so flushing has nothing to do, but for TLS, which holds what the system did not take: there it waits for that, as closing does.
///
#[cfg_attr(feature = "futures-io", doc = "```")]
#[cfg_attr(not(feature = "futures-io"), doc = "```ignore")]
/// use futures::io::{AsyncReadExt, AsyncWriteExt, copy};
/// use kernel::net::{Polled, UnixStream};
///
/// # kernel::run(async {
/// let (ours, theirs) = UnixStream::pair()?;
/// let echo = kernel::spawn(async move {
///     let (reader, mut writer) = Polled::new(theirs).split();
///     copy(reader, &mut writer).await
/// });
/// let mut ours = Polled::new(ours);
/// ours.write_all(b"hello").await?;
/// ours.close().await?;
/// let mut back = String::new();
/// ours.read_to_string(&mut back).await?;
/// assert_eq!((back.as_str(), echo.join().await.unwrap()?), ("hello", 5));
/// # std::io::Result::Ok(()) }).unwrap().unwrap();
/// ```
pub struct Polled<S> {
    /// Before the connection, in whose kernel they wait.
    places: Places,
    inner: S,
    /// What was read already, and comes first.
    rest: Vec<u8>,
}

/// Where a connection that is polled waits from one call to the next, in each direction.
#[derive(Debug)]
pub struct Places {
    /// To read.
    pub reading: IoPlace,
    /// To write.
    pub writing: IoPlace,
}

/// What [`Polled`] can read from. The methods are those of `AsyncRead`, but for the places.
pub trait PollRead {
    /// As [`Io::read`].
    fn poll_read(
        &self,
        places: &mut Places,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>>;

    /// As [`Io::read_vectored`]. Unless it is written otherwise, only the first buffer that has room is read into.
    fn poll_read_vectored(
        &self,
        places: &mut Places,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = bufs.iter_mut().find(|buf| !buf.is_empty());
        self.poll_read(places, cx, first.map_or(&mut [], |buf| buf))
    }
}

/// What [`Polled`] can write to. The methods are those of `AsyncWrite`, but for the places.
pub trait PollWrite {
    /// As [`Io::write`].
    fn poll_write(
        &self,
        places: &mut Places,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>>;

    /// As [`Io::write_vectored`].
    fn poll_write_vectored(
        &self,
        places: &mut Places,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>>;

    /// Waits until the system has all that was taken.
    fn poll_flush(&self, places: &mut Places, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Flushes, and ends the writing direction.
    fn poll_close(&self, places: &mut Places, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

impl<S> Polled<S> {
    /// Over a connection. The task dump says that the task waits at the caller.
    #[track_caller]
    pub const fn new(inner: S) -> Self {
        Self {
            places: Places {
                reading: IoPlace::new(),
                writing: IoPlace::new(),
            },
            inner,
            rest: Vec::new(),
        }
    }

    /// The connection, for its options and addresses.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The connection, and what of a stream's buffer was not read.
    pub fn into_parts(self) -> (S, Vec<u8>) {
        (self.inner, self.rest)
    }

    /// Takes what was read before into `buf`; `None` if there is nothing.
    fn take_rest(&mut self, buf: &mut [u8]) -> Option<usize> {
        let count = self.rest.len().min(buf.len());
        if count == 0 {
            return None;
        }
        buf[..count].copy_from_slice(&self.rest[..count]);
        self.rest.drain(..count);
        Some(count)
    }
}

impl<S> From<Stream<S>> for Polled<S> {
    /// What the stream has in its buffer is read first.
    #[track_caller]
    fn from(stream: Stream<S>) -> Self {
        let (inner, rest) = stream.into_parts();
        Self {
            rest,
            ..Self::new(inner)
        }
    }
}

impl<S: PollRead> Polled<S> {
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(count) = self.take_rest(buf) {
            return Poll::Ready(Ok(count));
        }
        self.inner.poll_read(&mut self.places, cx, buf)
    }

    #[cfg(feature = "futures-io")]
    pub(super) fn poll_read_vectored(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut taken = 0;
        for buf in bufs.iter_mut() {
            taken += self.take_rest(buf).unwrap_or(0);
        }
        if taken > 0 {
            return Poll::Ready(Ok(taken));
        }
        self.inner.poll_read_vectored(&mut self.places, cx, bufs)
    }
}

impl<S: PollWrite> Polled<S> {
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_write(&mut self.places, cx, data)
    }

    pub(super) fn poll_write_vectored(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_write_vectored(&mut self.places, cx, bufs)
    }

    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner.poll_flush(&mut self.places, cx)
    }

    pub(super) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner.poll_close(&mut self.places, cx)
    }
}

impl<S: fmt::Debug> fmt::Debug for Polled<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Polled").field(&self.inner).finish()
    }
}

impl<T: AsFd> PollRead for Io<T>
where
    for<'a> &'a T: io::Read,
{
    fn poll_read(
        &self,
        places: &mut Places,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let (place, len) = (&mut places.reading, buf.len());
        self.poll_moving(Direction::Read, place, cx, len, |mut io| {
            io::Read::read(&mut io, buf)
        })
    }

    fn poll_read_vectored(
        &self,
        places: &mut Places,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum();
        let place = &mut places.reading;
        self.poll_moving(Direction::Read, place, cx, len, |mut io| {
            io::Read::read_vectored(&mut io, bufs)
        })
    }
}

impl<T: AsFd> PollWrite for Io<T>
where
    for<'a> &'a T: io::Write,
{
    fn poll_write(
        &self,
        places: &mut Places,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let (place, len) = (&mut places.writing, data.len());
        self.poll_moving(Direction::Write, place, cx, len, |mut io| {
            io::Write::write(&mut io, data)
        })
    }

    fn poll_write_vectored(
        &self,
        places: &mut Places,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum();
        let place = &mut places.writing;
        self.poll_moving(Direction::Write, place, cx, len, |mut io| {
            io::Write::write_vectored(&mut io, bufs)
        })
    }

    fn poll_flush(&self, _: &mut Places, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(&self, _: &mut Places, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(end_writing(self))
    }
}

/// Lets the other side read to its end.
pub(super) fn end_writing(socket: &impl AsFd) -> io::Result<()> {
    match shutdown(socket, Shutdown::Write) {
        // A pipe has no such thing, and a peer that is gone knows that we are.
        Err(Errno::NOTSOCK | Errno::NOTCONN) => Ok(()),
        outcome => Ok(outcome?),
    }
}
