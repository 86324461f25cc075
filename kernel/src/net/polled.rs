//! Our connections for code that polls: what `AsyncRead` and its like ask for.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::AsFd;
use std::task::{Context, Poll};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use super::{Io, Stream};
use crate::traps::{Direction, IoPlace};

/// A connection for libraries that poll: with the feature `futures-io` it is `futures_io::AsyncRead` and `AsyncWrite`, with the feature
/// `hyper` it is [`hyper::rt::Read`](https://docs.rs/hyper/1/hyper/rt/) and `Write`.
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
/// Closing means that the writing direction is shut down; the other side reads to its end then. The descriptor is closed when this is dropped. Nothing is
/// buffered, so flushing has nothing to do.
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
pub struct Polled<T> {
    /// Before the connection, in whose kernel they wait.
    reading: IoPlace,
    writing: IoPlace,
    io: Io<T>,
    /// What was read already, and comes first.
    rest: Vec<u8>,
}

impl<T: AsFd> Polled<T> {
    /// Over a connection. The task dump says that the task waits at the caller.
    #[track_caller]
    pub const fn new(io: Io<T>) -> Self {
        Self {
            reading: IoPlace::new(),
            writing: IoPlace::new(),
            io,
            rest: Vec::new(),
        }
    }

    /// The connection, for its options and addresses.
    pub const fn get_ref(&self) -> &Io<T> {
        &self.io
    }

    /// The connection, and what of a stream's buffer was not read.
    pub fn into_parts(self) -> (Io<T>, Vec<u8>) {
        (self.io, self.rest)
    }

    pub(super) fn poll_close(&self) -> io::Result<()> {
        match shutdown(&self.io, Shutdown::Write) {
            // A pipe has no such thing, and a peer that is gone knows that we are.
            Err(Errno::NOTSOCK | Errno::NOTCONN) => Ok(()),
            outcome => Ok(outcome?),
        }
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

impl<T: AsFd> From<Stream<Io<T>>> for Polled<T> {
    /// What the stream has in its buffer is read first.
    #[track_caller]
    fn from(stream: Stream<Io<T>>) -> Self {
        let (io, rest) = stream.into_parts();
        Self {
            rest,
            ..Self::new(io)
        }
    }
}

impl<T: AsFd> Polled<T>
where
    for<'a> &'a T: Read,
{
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(count) = self.take_rest(buf) {
            return Poll::Ready(Ok(count));
        }
        let (io, place, len) = (&self.io, &mut self.reading, buf.len());
        io.poll_moving(Direction::Read, place, cx, len, |mut io| io.read(buf))
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
        let len = bufs.iter().map(|buf| buf.len()).sum();
        let (io, place) = (&self.io, &mut self.reading);
        io.poll_moving(Direction::Read, place, cx, len, |mut io| {
            io.read_vectored(bufs)
        })
    }
}

impl<T: AsFd> Polled<T>
where
    for<'a> &'a T: Write,
{
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let (io, place) = (&self.io, &mut self.writing);
        io.poll_moving(Direction::Write, place, cx, data.len(), |mut io| {
            io.write(data)
        })
    }

    pub(super) fn poll_write_vectored(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum();
        let (io, place) = (&self.io, &mut self.writing);
        io.poll_moving(Direction::Write, place, cx, len, |mut io| {
            io.write_vectored(bufs)
        })
    }
}

impl<T: fmt::Debug> fmt::Debug for Polled<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Polled").field(&self.io).finish()
    }
}
