//! Reading lines and records from a connection, without losing any of it to an interrupt.

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;

use super::io::{Incomplete, Io};
use crate::traps::at_caller;

const CHUNK: usize = 8 * 1024;

/// Bytes that come from somewhere. Takes `&self`: one task may read while another writes.
pub trait Read {
    /// Reads what is there, at most `buf.len()` bytes; 0 at the end. If dropped or interrupted, nothing was read.
    ///
    /// # Errors
    /// As [`Io::read`].
    fn read(&self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>>;
}

/// A place where bytes go.
pub trait Write {
    /// Writes as much of `data` as is taken, and says how much that was. If dropped or interrupted, nothing was written.
    ///
    /// # Errors
    /// As [`Io::write`].
    fn write(&self, data: &[u8]) -> impl Future<Output = io::Result<usize>>;

    /// Waits until the system has all that was taken. Of those here, only a `TlsStream` takes more than that.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn flush(&self) -> impl Future<Output = io::Result<()>> {
        std::future::ready(Ok(()))
    }
}

/// A connection with a read buffer (Curio's `SocketStream`). Writing is not buffered.
///
/// What an interrupted or dropped operation has read stays in the buffer, and the next operation begins with it; nothing is ever lost.
/// So a timeout may simply be tried again. To read in one task and write in another, give the stream an [`Rc`] of the connection.
///
/// ```
/// use kernel::net::{Stream, UnixStream};
///
/// # kernel::run(async {
/// let (ours, theirs) = UnixStream::pair()?;
/// theirs.write_all(b"GET /\r\n4:data").await?;
/// let mut stream = Stream::new(ours);
/// assert_eq!(stream.read_line(1024).await?, b"GET /\r\n");
/// let mut record = [0; 6];
/// stream.read_exact(&mut record).await?;
/// assert_eq!(&record, b"4:data");
/// # std::io::Result::Ok(()) }).unwrap().unwrap();
/// ```
#[derive(Debug)]
pub struct Stream<S> {
    inner: S,
    buffer: Vec<u8>,
    /// What of the buffer is data. Moved only when a read has come to its end, since that may be dropped half-way.
    data: std::ops::Range<usize>,
}

impl<S> Stream<S> {
    /// Over a connection, with an empty buffer.
    pub const fn new(inner: S) -> Self {
        Self {
            inner,
            buffer: Vec::new(),
            data: 0..0,
        }
    }

    /// The connection, and what was read from it but not asked for yet.
    pub fn into_parts(mut self) -> (S, Vec<u8>) {
        let rest = self.take(self.data.len());
        (self.inner, rest)
    }

    /// The connection. What is read from it directly comes after what is in the buffer.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// What was read but not asked for yet.
    #[must_use]
    pub fn buffered(&self) -> &[u8] {
        &self.buffer[self.data.clone()]
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let taken = self.buffered()[..count].to_vec();
        self.data.start += count;
        taken
    }
}

impl<T: AsFd> Stream<Io<T>> {
    /// Gives the connection back in blocking mode, for instance to lend it to a thread (Curio's `blocking`). Refused while something is
    /// buffered, which the borrower would miss: read it first, or take it with [`into_parts`](Self::into_parts).
    ///
    /// # Errors
    /// [`IntoStdError`].
    pub fn into_std(self) -> Result<T, IntoStdError<T>> {
        if self.data.is_empty() {
            Ok(self.inner.into_std()?)
        } else {
            Err(IntoStdError::Buffered(self))
        }
    }
}

impl<T: AsFd> Io<T> {
    /// The connection a second time, as a file with a buffer (Curio's `makefile`). The connection is closed when both are.
    ///
    /// The two share their mode: while one of them is [lent](Self::into_std) in blocking mode, the other blocks too.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn make_file(&self) -> io::Result<Stream<Io<File>>> {
        let duplicate = self.as_fd().try_clone_to_owned()?;
        Ok(Stream::new(Io::adopt(duplicate.into())))
    }
}

/// Why a [`Stream`] was not given back in blocking mode.
#[derive(Debug, thiserror::Error)]
pub enum IntoStdError<T> {
    /// This was read from the connection already, and not asked for yet. The stream is as it was.
    #[error("{} bytes are in the stream's buffer; read them before lending the connection", .0.buffered().len())]
    Buffered(Stream<Io<T>>),
    /// The mode cannot be set; the connection is closed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl<T> From<IntoStdError<T>> for io::Error {
    fn from(error: IntoStdError<T>) -> Self {
        match error {
            IntoStdError::Buffered(_) => Self::new(io::ErrorKind::ResourceBusy, error.to_string()),
            IntoStdError::Io(error) => error,
        }
    }
}

impl<S: Read> Stream<S> {
    /// Reads what is there, at most `buf.len()` bytes; 0 at the end.
    ///
    /// Cancellation point: as the connection, if the buffer is empty. If dropped, nothing was read.
    ///
    /// # Errors
    /// Those of the connection.
    #[track_caller]
    pub fn read(&mut self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>> {
        at_caller(async move {
            if self.data.is_empty() && buf.len() >= CHUNK {
                return self.inner.read(buf).await;
            }
            if self.data.is_empty() && !buf.is_empty() {
                self.fill(CHUNK).await?;
            }
            let count = buf.len().min(self.data.len());
            buf[..count].copy_from_slice(&self.buffered()[..count]);
            self.data.start += count;
            Ok(count)
        })
    }

    /// Fills `buf`, all of it or nothing.
    ///
    /// Cancellation point: as the connection. If dropped or interrupted, what has come waits in the buffer.
    ///
    /// # Errors
    /// Those of the connection, and `UnexpectedEof`, with the number of bytes that wait in the buffer.
    #[track_caller]
    pub fn read_exact(&mut self, buf: &mut [u8]) -> impl Future<Output = Result<(), Incomplete>> {
        at_caller(async move {
            while self.data.len() < buf.len() {
                if self.more(buf.len()).await? == 0 {
                    return Err(self.incomplete(io::ErrorKind::UnexpectedEof.into()));
                }
            }
            buf.copy_from_slice(&self.buffered()[..buf.len()]);
            self.data.start += buf.len();
            Ok(())
        })
    }

    /// Reads up to and including the first `end`; at the end of the stream, what is left, perhaps nothing. At most `limit` bytes.
    ///
    /// Cancellation point: as the connection, unless the buffer has it all. If dropped or interrupted, what has come waits in the buffer.
    ///
    /// # Errors
    /// Those of the connection, and `InvalidData` if there is no `end` within `limit` bytes, with the number of bytes that wait in the buffer.
    #[track_caller]
    pub fn read_until(
        &mut self,
        end: u8,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<u8>, Incomplete>> {
        at_caller(async move {
            let mut searched = 0;
            loop {
                let window = &self.buffered()[..self.data.len().min(limit)];
                if let Some(at) = window[searched..].iter().position(|&byte| byte == end) {
                    return Ok(self.take(searched + at + 1));
                }
                searched = window.len();
                if searched == limit {
                    let text = format!("no {:?} within {limit} bytes", char::from(end));
                    return Err(self.incomplete(io::Error::new(io::ErrorKind::InvalidData, text)));
                }
                if self.more(limit).await? == 0 {
                    return Ok(self.take(searched));
                }
            }
        })
    }

    /// Reads a line with its `\n`; at the end of the stream, what is left, perhaps nothing. As [`read_until`](Self::read_until).
    ///
    /// # Errors
    /// As [`read_until`](Self::read_until).
    #[track_caller]
    pub fn read_line(&mut self, limit: usize) -> impl Future<Output = Result<Vec<u8>, Incomplete>> {
        self.read_until(b'\n', limit)
    }

    /// Reads everything to the end of the stream, at most `limit` bytes (Curio's `readall`).
    ///
    /// Cancellation point: as the connection. If dropped or interrupted, what has come waits in the buffer.
    ///
    /// # Errors
    /// Those of the connection, and `FileTooLarge` beyond `limit`, with the number of bytes that wait in the buffer.
    #[track_caller]
    pub fn read_to_end(
        &mut self,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<u8>, Incomplete>> {
        at_caller(async move {
            while self.data.len() <= limit {
                if self.more(limit.saturating_add(1)).await? == 0 {
                    return Ok(self.take(self.data.len()));
                }
            }
            let text = format!("the stream has more than {limit} bytes");
            Err(self.incomplete(io::Error::new(io::ErrorKind::FileTooLarge, text)))
        })
    }

    /// As `fill`, for an operation that gets `needed` bytes in all.
    async fn more(&mut self, needed: usize) -> Result<usize, Incomplete> {
        match self.fill(needed).await {
            Ok(count) => Ok(count),
            Err(error) => Err(self.incomplete(error)),
        }
    }

    /// Reads once into the free part of the buffer. The buffer grows as data come, up to `needed` bytes, which is more than are there.
    async fn fill(&mut self, needed: usize) -> io::Result<usize> {
        if self.data.is_empty() {
            self.data = 0..0;
        }
        if self.data.end == self.buffer.len() {
            self.buffer.copy_within(self.data.clone(), 0);
            self.data = 0..self.data.len();
            let target = (self.data.len() * 2).min(needed).max(CHUNK);
            if self.data.len() == self.buffer.len() {
                self.buffer.resize(target, 0);
            }
        }
        let free = &mut self.buffer[self.data.end..];
        let count = self.inner.read(free).await?;
        self.data.end += count;
        Ok(count)
    }

    const fn incomplete(&self, error: io::Error) -> Incomplete {
        let done = self.data.end - self.data.start;
        Incomplete { done, error }
    }
}

#[cfg(feature = "tls")]
impl<T: AsFd> Stream<super::tls::TlsStream<Io<T>>>
where
    for<'a> &'a T: io::Read + io::Write,
{
    /// Ends the connection as TLS wants, as [`TlsStream::close`](super::TlsStream::close). What is in the buffer is gone.
    ///
    /// # Errors
    /// As [`Io::write`].
    #[track_caller]
    pub fn close(self) -> impl Future<Output = io::Result<()>> {
        self.inner.close()
    }
}

impl<S: Write> Stream<S> {
    /// Writes all of `data`, straight to the connection, and waits until the system has it.
    ///
    /// Cancellation point: as the connection. If dropped, a part may have been written, and nobody knows how much.
    ///
    /// # Errors
    /// Those of the connection, with the number of bytes that went before; also for an interrupt.
    #[track_caller]
    pub fn write_all(&self, data: &[u8]) -> impl Future<Output = Result<(), Incomplete>> {
        at_caller(async move {
            let mut done = 0;
            while done < data.len() {
                done += match self.inner.write(&data[done..]).await {
                    Ok(0) => {
                        let error = io::ErrorKind::WriteZero.into();
                        return Err(Incomplete { done, error });
                    }
                    Ok(written) => written,
                    Err(error) => return Err(Incomplete { done, error }),
                };
            }
            let flushed = self.inner.flush().await;
            flushed.map_err(|error| Incomplete { done, error })
        })
    }
}

impl<T: AsFd> Read for Io<T>
where
    for<'a> &'a T: io::Read,
{
    #[track_caller]
    fn read(&self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>> {
        self.read(buf)
    }
}

impl<T: AsFd> Write for Io<T>
where
    for<'a> &'a T: io::Write,
{
    #[track_caller]
    fn write(&self, data: &[u8]) -> impl Future<Output = io::Result<usize>> {
        self.write(data)
    }
}

impl<S: Read> Read for &S {
    fn read(&self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>> {
        (**self).read(buf)
    }
}

impl<S: Write> Write for &S {
    fn write(&self, data: &[u8]) -> impl Future<Output = io::Result<usize>> {
        (**self).write(data)
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> {
        (**self).flush()
    }
}

impl<S: Read> Read for Rc<S> {
    fn read(&self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>> {
        (**self).read(buf)
    }
}

impl<S: Write> Write for Rc<S> {
    fn write(&self, data: &[u8]) -> impl Future<Output = io::Result<usize>> {
        (**self).write(data)
    }

    fn flush(&self) -> impl Future<Output = io::Result<()>> {
        (**self).flush()
    }
}
