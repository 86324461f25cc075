//! Files (Curio's `aopen`). The system has no waiting for a file, so every call that may reach the disk is made in a worker thread.
//!
//! That is what [`run_in_thread`] does; this module adds reading by pieces, which an interrupt must not cut holes into. For all that
//! is one call, `run_in_thread(|| std::fs::read(path))` needs no more.
//!
//! **Interrupts.** A call that runs cannot be stopped. When its task is interrupted it goes on in its thread, and the next operation on the
//! file waits there for its end. What it has read waits in the file's buffer, so nothing is lost and no byte is read twice.
//! Of what it writes nobody learns how much was written.

use std::future::{Future, poll_fn};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use crate::traps::{at_caller, poll_proceed};
use crate::workers::run_in_thread;

const CHUNK: usize = 64 * 1024;

/// An open file. Reading is buffered, writing is not: what a write returns from, the system has.
///
/// If dropped, it is closed, once the call that was abandoned on it, if any, has ended.
///
/// ```
/// use kernel::fs::File;
///
/// # let folder = std::env::temp_dir();
/// # let path = folder.join(format!("kernel-fs-{}", std::process::id()));
/// # let kept = path.clone();
/// # kernel::run(async {
/// let mut file = File::create(&path).await?;
/// file.write_all("moon\nsun\n").await?;
///
/// let mut file = File::open(&path).await?;
/// assert_eq!(file.next_line().await?.as_deref(), Some("moon"));
/// assert_eq!(file.next_line().await?.as_deref(), Some("sun"));
/// assert_eq!(file.next_line().await?, None);
/// # std::fs::remove_file(kept)
/// # }).unwrap().unwrap();
/// ```
#[derive(Debug)]
pub struct File {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    std: std::fs::File,
    /// What was read from the file but not asked for yet begins at `start`.
    buffer: Vec<u8>,
    start: usize,
}

impl File {
    /// Opens a file to read it.
    ///
    /// Cancellation point: yes. If dropped or interrupted, it is opened and closed.
    ///
    /// # Errors
    /// Those of `open(2)`, with the path; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn open<P: AsRef<Path>>(path: P) -> impl Future<Output = io::Result<Self>> + use<P> {
        Self::open_with(path, std::fs::OpenOptions::new().read(true))
    }

    /// Opens a file to write it; makes it if there is none, empties it if there is one.
    ///
    /// As [`open`](Self::open) in every other respect.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    #[track_caller]
    pub fn create<P: AsRef<Path>>(path: P) -> impl Future<Output = io::Result<Self>> + use<P> {
        let mut options = std::fs::OpenOptions::new();
        Self::open_with(path, options.write(true).create(true).truncate(true))
    }

    /// Opens a file as `options` say.
    ///
    /// As [`open`](Self::open) in every other respect.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    #[track_caller]
    pub fn open_with<P: AsRef<Path>>(
        path: P,
        options: &std::fs::OpenOptions,
    ) -> impl Future<Output = io::Result<Self>> + use<P> {
        let (path, options) = (PathBuf::from(path.as_ref()), options.clone());
        let opened = run_in_thread(move || match options.open(&path) {
            Ok(std) => Ok(Self::from(std)),
            Err(error) => {
                let text = format!("cannot open {}: {error}", path.display());
                Err(io::Error::new(error.kind(), text))
            }
        });
        async move { opened.await? }
    }

    /// Gives the file back, for code that may block, at the position up to which it was read here.
    ///
    /// Cancellation point: yes. If dropped or interrupted, it is closed.
    ///
    /// # Errors
    /// Those of `lseek(2)`; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn into_std(self) -> impl Future<Output = io::Result<std::fs::File>> {
        let aligned = self.call(Inner::align);
        async move {
            aligned.await?;
            match Arc::try_unwrap(self.inner) {
                Ok(inner) => Ok(inner
                    .into_inner()
                    .unwrap_or_else(PoisonError::into_inner)
                    .std),
                // An abandoned call has ended, but not gone yet.
                Err(shared) => lock(&shared).std.try_clone(),
            }
        }
    }

    /// Calls `f` with the file in a worker thread: for everything else that files can do (Curio's `blocking`). It is at the position up
    /// to which it was read here.
    ///
    /// Cancellation point: yes. If dropped or interrupted, `f` runs to its end if it has begun.
    ///
    /// # Errors
    /// Those of `f` and of `lseek(2)`; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn blocking<T: Send + 'static>(
        &mut self,
        f: impl FnOnce(&mut std::fs::File) -> io::Result<T> + Send + 'static,
    ) -> impl Future<Output = io::Result<T>> {
        self.call(move |inner| {
            inner.align()?;
            f(&mut inner.std)
        })
    }

    /// Reads up to `buf.len()` bytes; 0 at the end.
    ///
    /// Cancellation point: only if the buffer is empty. If dropped or interrupted, nothing is lost.
    ///
    /// # Errors
    /// Those of `read(2)`; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn read(&mut self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>> {
        at_caller(async move {
            let wanted = buf.len();
            if wanted > 0 && !self.has(|unread| !unread.is_empty()).await {
                self.call(move |inner| inner.fill(0, wanted)).await?;
            }
            let mut inner = lock(&self.inner);
            let count = wanted.min(inner.unread().len());
            buf[..count].copy_from_slice(&inner.unread()[..count]);
            inner.start += count;
            Ok(count)
        })
    }

    /// Reads all that is left (Curio's `read()`, `readall`).
    ///
    /// Cancellation point: yes. If dropped or interrupted, nothing is lost.
    ///
    /// # Errors
    /// Those of `read(2)`; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn read_to_end(&mut self) -> impl Future<Output = io::Result<Vec<u8>>> {
        at_caller(async move {
            self.call(|inner| {
                inner.compact();
                inner.std.read_to_end(&mut inner.buffer)
            })
            .await?;
            let mut inner = lock(&self.inner);
            let count = inner.unread().len();
            Ok(inner.take(count))
        })
    }

    /// As [`read_to_end`](Self::read_to_end), for text.
    ///
    /// # Errors
    /// As [`read_to_end`](Self::read_to_end); `InvalidData` if it is not UTF-8.
    #[track_caller]
    pub fn read_to_string(&mut self) -> impl Future<Output = io::Result<String>> {
        at_caller(async move { text(self.read_to_end().await?) })
    }

    /// Reads a line with its `\n`; at the end of the file, what is left, perhaps nothing.
    ///
    /// Cancellation point: only if the buffer has no whole line. If dropped or interrupted, nothing is lost.
    ///
    /// # Errors
    /// Those of `read(2)`; an [`Interrupt`](crate::Interrupt); `InvalidData` if it is not UTF-8.
    #[track_caller]
    pub fn read_line(&mut self) -> impl Future<Output = io::Result<String>> {
        at_caller(async move {
            let (mut searched, mut length) = (0, None);
            loop {
                let found = self.has(|unread| {
                    let end = unread[searched..].iter().position(|&byte| byte == b'\n');
                    length = end.map(|at| searched + at + 1);
                    searched = unread.len();
                    length.is_some()
                });
                if found.await || self.call(move |inner| inner.fill(searched, CHUNK)).await? == 0 {
                    break;
                }
            }
            let mut inner = lock(&self.inner);
            let count = length.unwrap_or_else(|| inner.unread().len());
            text(inner.take(count))
        })
    }

    /// The next line without its end, `\n` or `\r\n`; `None` at the end of the file. As [`read_line`](Self::read_line) otherwise.
    ///
    /// # Errors
    /// As [`read_line`](Self::read_line).
    #[track_caller]
    pub fn next_line(&mut self) -> impl Future<Output = io::Result<Option<String>>> {
        at_caller(async move {
            let mut line = self.read_line().await?;
            if line.is_empty() {
                return Ok(None);
            }
            if line.ends_with('\n') {
                line.pop();
                if line.ends_with('\r') {
                    line.pop();
                }
            }
            Ok(Some(line))
        })
    }

    /// Reads all lines that are left, without their ends (Curio's `readlines`).
    ///
    /// Cancellation point: yes. If dropped or interrupted, nothing is lost.
    ///
    /// # Errors
    /// As [`read_to_string`](Self::read_to_string).
    #[track_caller]
    pub fn lines(&mut self) -> impl Future<Output = io::Result<Vec<String>>> {
        at_caller(async move {
            let text = self.read_to_string().await?;
            Ok(text.lines().map(str::to_owned).collect())
        })
    }

    /// Writes as much of `data` as the system takes in one call, and says how much that was.
    ///
    /// Cancellation point: yes. If dropped or interrupted, some of it may be written, and nobody knows how much.
    ///
    /// # Errors
    /// Those of `write(2)`; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn write(&mut self, data: impl Into<Vec<u8>>) -> impl Future<Output = io::Result<usize>> {
        let data = data.into();
        self.blocking(move |file| file.write(&data))
    }

    /// Writes all of `data`. As [`write`](Self::write) otherwise; if interrupted, the thread still writes it to its end if it has begun.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    #[track_caller]
    pub fn write_all(&mut self, data: impl Into<Vec<u8>>) -> impl Future<Output = io::Result<()>> {
        let data = data.into();
        self.blocking(move |file| file.write_all(&data))
    }

    /// Waits until the system has handed all that was written on to the device (`fsync`). To be seen by others it needs no flush.
    ///
    /// Cancellation point: yes. If dropped or interrupted, it goes on.
    ///
    /// # Errors
    /// Those of `fsync(2)`; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn flush(&mut self) -> impl Future<Output = io::Result<()>> {
        self.blocking(|file| file.sync_all())
    }

    /// Moves to a position, and says where that is from the start.
    ///
    /// Cancellation point: yes. If dropped or interrupted, it may have moved.
    ///
    /// # Errors
    /// Those of `lseek(2)`; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn seek(&mut self, to: SeekFrom) -> impl Future<Output = io::Result<u64>> {
        self.blocking(move |file| file.seek(to))
    }

    /// The position, from the start (Curio's `tell`).
    ///
    /// Cancellation point: yes. If dropped, nothing happens.
    ///
    /// # Errors
    /// Those of `lseek(2)`; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn position(&mut self) -> impl Future<Output = io::Result<u64>> {
        self.blocking(|file| file.stream_position())
    }

    /// Cuts the file off at `len` bytes, or fills it up with zeros (Curio's `truncate`). The position stays.
    ///
    /// Cancellation point: yes. If dropped or interrupted, it may be done.
    ///
    /// # Errors
    /// Those of `ftruncate(2)`; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn set_len(&mut self, len: u64) -> impl Future<Output = io::Result<()>> {
        self.blocking(move |file| file.set_len(len))
    }

    /// Calls `f` in a worker thread. What it reads it must leave in the buffer: its value is dropped if the task is interrupted.
    #[track_caller]
    fn call<T, F>(&self, f: F) -> impl Future<Output = io::Result<T>> + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce(&mut Inner) -> io::Result<T> + Send + 'static,
    {
        let inner = Arc::clone(&self.inner);
        let called = run_in_thread(move || f(&mut lock(&inner)));
        async move { called.await? }
    }

    /// Whether what is in the buffer is enough.
    async fn has(&self, is_enough: impl FnOnce(&[u8]) -> bool) -> bool {
        let enough = self.look(is_enough);
        if enough {
            poll_fn(|cx| poll_proceed(cx)).await;
        }
        enough
    }

    /// An abandoned call may be filling the buffer: then the answer is no, and the next call waits for that one.
    fn look(&self, is_enough: impl FnOnce(&[u8]) -> bool) -> bool {
        match self.inner.try_lock() {
            Ok(inner) => is_enough(inner.unread()),
            Err(TryLockError::Poisoned(poisoned)) => is_enough(poisoned.into_inner().unread()),
            Err(TryLockError::WouldBlock) => false,
        }
    }
}

impl From<std::fs::File> for File {
    fn from(std: std::fs::File) -> Self {
        let inner = Inner {
            std,
            buffer: Vec::new(),
            start: 0,
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
        }
    }
}

impl Inner {
    fn unread(&self) -> &[u8] {
        &self.buffer[self.start..]
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let taken = self.unread()[..count].to_vec();
        self.start += count;
        taken
    }

    fn compact(&mut self) {
        self.buffer.drain(..self.start);
        self.start = 0;
    }

    /// Reads once, behind what is in the buffer, and says how much more there is than the `seen` bytes. That an abandoned call has put
    /// more there is answer enough: the file may be a pipe, where another read would block.
    fn fill(&mut self, seen: usize, wanted: usize) -> io::Result<usize> {
        if self.unread().len() > seen {
            return Ok(self.unread().len() - seen);
        }
        self.compact();
        let end = self.buffer.len();
        self.buffer.resize(end + wanted.clamp(CHUNK, 16 * CHUNK), 0);
        let read = loop {
            match self.std.read(&mut self.buffer[end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => break outcome,
            }
        };
        self.buffer.truncate(end + *read.as_ref().unwrap_or(&0));
        read
    }

    /// Moves the file's position back to where reading has come to. The buffer is empty afterwards.
    fn align(&mut self) -> io::Result<()> {
        if !self.unread().is_empty() {
            let ahead =
                i64::try_from(self.unread().len()).expect("a buffer is no longer than that");
            self.std.seek(SeekFrom::Current(-ahead))?;
        }
        self.buffer.clear();
        self.start = 0;
        Ok(())
    }
}

/// A panic in a closure of [`File::blocking`] leaves the buffer empty, not half changed.
fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_from_the_buffer_makes_room_for_more() {
        let line = [b"moon ".repeat(200), b"\n".to_vec()].concat();
        let (reader, writer) = io::pipe().unwrap();
        let writing = std::thread::spawn({
            let text = line.repeat(10_000);
            move || { &writer }.write_all(&text)
        });
        crate::run(async {
            let mut file = File::from(std::fs::File::from(std::os::fd::OwnedFd::from(reader)));
            while !file.read_line().await.unwrap().is_empty() {
                let room = lock(&file.inner).buffer.len();
                assert!(room <= 2 * CHUNK, "{room}");
            }
        })
        .unwrap();
        writing.join().unwrap().unwrap();
    }
}
