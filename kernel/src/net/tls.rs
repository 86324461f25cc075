//! TLS over our connections (Curio's `ssl`), by [rustls](https://docs.rs/rustls).
//!
//! rustls knows the protocol and no socket: ciphertext goes in and plaintext comes out, and the other way round. What is here moves the
//! ciphertext, with the same two calls as any [`Io`]: try at once, wait after `WouldBlock`. Three things are not obvious.
//!
//! **Whole records.** Plaintext that rustls has taken is ciphertext that must leave, whoever is interrupted meanwhile. So [`TlsStream::write`]
//! first waits until what there was has left, then gives rustls as much as it buffers (64 KiB), sends what the socket takes
//! at once, and does not wait again: an interrupt comes either before any of the data was taken or not at all. What the socket
//! did not take leaves with the next call, of which [`flush`](TlsStream::flush) is the one that waits for it.
//!
//! **Readers that write.** Whoever writes and then waits for the answer would wait for ever if the rest of the question
//! stayed here. So a reader that has to wait writes meanwhile. Another task may want to write just then, and the direction has
//! room for one waiter: it waits until the reader is done with it.
//!
//! **An end must be said.** A connection that is closed without `close_notify` may have been cut by anybody, so it is an error for the reader. For
//! the same reason a stream that is merely dropped, by an error or a cancellation half-way, does not say it: what it sent is not whole.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription, CertificateError, InvalidMessage};
use socket2::SockRef;

use super::io::{Incomplete, Io};
use super::stream::{Read, Write};
use crate::error::MaybeInterrupt;
use crate::runtime::WaitKind;
use crate::traps::{Direction, Lot, ReadyOp, at_caller, poll_proceed, sched_wait, sched_wake};

pub use super::open::{open_tls_connection, open_unix_tls_connection};
pub use super::server::Tls;
pub use super::tls_context::{
    ClientContext, Identity, ServerContext, read_certificates, read_private_key,
};
/// The library underneath, for what has no name here.
pub use rustls;
pub use rustls::{ClientConfig, ServerConfig};

/// How much ciphertext is asked of the system at once: little first, more while there is more.
const READ: std::ops::RangeInclusive<usize> = 4 * 1024..=32 * 1024;
/// How much [`TlsStream::close`] throws away of what nobody has read.
const DISCARD: usize = 256 * 1024;

/// A connection with TLS: [`connect`](TlsStream::connect) and [`accept`](TlsStream::accept) make one of any connected socket, and it
/// reads and writes as that does. Methods take `&self`, so that one task reads while another writes; [`Stream`](super::Stream) buffers it.
///
/// [`close`](TlsStream::close) ends it as the protocol wants. If it is dropped, the connection is closed without a word, and the other side
/// takes it for what it may be: cut off.
///
/// Memory: at most 64 KiB of what goes out and 80 KiB of what came in, whatever the other side does.
///
/// ```no_run
/// use kernel::net::tls::{ClientContext, TlsStream};
/// use kernel::net::{Stream, TcpStream};
///
/// # kernel::run(async {
/// let context = ClientContext::new().trust_file("/etc/ssl/certs/ca-certificates.crt")?.build()?;
/// let tcp = TcpStream::connect("www.rust-lang.org:443").await?;
/// let tls = TlsStream::connect(tcp, context, "www.rust-lang.org").await?;
/// tls.write_all(b"GET / HTTP/1.0\r\nHost: www.rust-lang.org\r\n\r\n").await?;
/// let mut stream = Stream::new(&tls);
/// print!("{}", String::from_utf8_lossy(&stream.read_line(1024).await?));
/// tls.close().await
/// # }).unwrap().unwrap();
/// ```
pub struct TlsStream<S> {
    io: S,
    state: RefCell<State>,
    /// How many readers may wait to write, which nobody else can at the same time.
    writing_readers: Cell<u32>,
    /// Where a writer waits for them.
    direction_free: Lot,
}

struct State {
    tls: rustls::Connection,
    /// The other side, as errors call it.
    peer: Box<str>,
    /// Ciphertext for which rustls had no room begins at `fed`.
    incoming: Vec<u8>,
    fed: usize,
    /// How much to ask for next.
    chunk: usize,
    /// The socket's end was seen.
    has_ended: bool,
    /// What rustls found wrong; it says nothing else from then on.
    broken: Option<rustls::Error>,
    /// Our `close_notify` was given to rustls.
    is_shut: bool,
}

/// What was wrong with the other side's TLS, with its certificate, or, by its account, with ours. It is inside the [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("TLS with {peer}: {reason}{}", advice(reason))]
pub struct TlsError {
    peer: Box<str>,
    reason: rustls::Error,
}

impl TlsError {
    /// In rustls' words.
    #[must_use]
    pub const fn reason(&self) -> &rustls::Error {
        &self.reason
    }
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

impl<T: AsFd> TlsStream<Io<T>>
where
    for<'a> &'a T: io::Read + io::Write,
{
    /// Begins TLS on a connected socket, as its client. `name` is the host name or IP address that the server's certificate must be for; a host
    /// name is also told to the server (SNI).
    ///
    /// Cancellation point: whenever it has to wait for the server. If dropped or interrupted, the connection is closed.
    ///
    /// # Errors
    /// `InvalidInput` if `name` is neither a host name nor an address; a [`TlsError`] if the two do not come to terms; `UnexpectedEof` if
    /// the server hangs up; those of the connection; an [`Interrupt`](crate::Interrupt). In TLS 1.3 the server looks at the client's
    /// certificate last: that it refuses it is what the first read says.
    #[track_caller]
    pub fn connect(
        stream: Io<T>,
        config: Arc<ClientConfig>,
        name: &str,
    ) -> impl Future<Output = io::Result<Self>> {
        at_caller(async move {
            let server = ServerName::try_from(name.to_owned()).map_err(|_| {
                let text =
                    format!("{name:?} is neither a host name nor an IP address: TLS needs one");
                io::Error::new(io::ErrorKind::InvalidInput, text)
            })?;
            let peer = match address_of(&stream) {
                Some(address) => format!("{name} ({address})"),
                None => name.to_owned(),
            };
            let session = rustls::ClientConnection::new(config, server);
            Self::begin(stream, peer, session.map(Into::into)).await
        })
    }

    /// Begins TLS on a connected socket, as its server.
    ///
    /// Cancellation point: whenever it has to wait for the client. If dropped or interrupted, the connection is closed. A client may stay silent:
    /// bound the time, as [`Server`](super::Server) does.
    ///
    /// # Errors
    /// As [`connect`](Self::connect); `InvalidInput` if `config` takes early data, which is not offered here.
    #[track_caller]
    pub fn accept(
        stream: Io<T>,
        config: Arc<ServerConfig>,
    ) -> impl Future<Output = io::Result<Self>> {
        at_caller(async move {
            if config.max_early_data_size > 0 {
                let text = "early data cannot be read here; leave `max_early_data_size` at 0";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            let peer = address_of(&stream).unwrap_or_else(|| "a client".to_owned());
            let session = rustls::ServerConnection::new(config);
            Self::begin(stream, peer, session.map(Into::into)).await
        })
    }

    async fn begin(
        io: Io<T>,
        peer: String,
        session: Result<rustls::Connection, rustls::Error>,
    ) -> io::Result<Self> {
        let peer = peer.into_boxed_str();
        let tls = match session {
            Ok(tls) => tls,
            Err(reason) => return Err(TlsError { peer, reason }.into()),
        };
        let stream = Self {
            io,
            state: RefCell::new(State::new(tls, peer)),
            writing_readers: Cell::new(0),
            direction_free: Lot::new(),
        };
        stream.shake_hands().await?;
        Ok(stream)
    }

    async fn shake_hands(&self) -> io::Result<()> {
        loop {
            let checked = self.state.borrow().check();
            checked.map_err(|error| self.say_goodbye(error))?;
            self.send_all().await?;
            if !self.state.borrow().tls.is_handshaking() {
                return Ok(());
            }
            let fed = self.state.borrow_mut().feed();
            match fed {
                Ok(true) => {}
                Ok(false) => self.receive().await?,
                Err(error) => return Err(self.say_goodbye(error)),
            }
        }
    }

    /// Reads what is there, at most `buf.len()` bytes; 0 after the other side has ended its direction, and said so.
    ///
    /// Cancellation point: only if nothing is there. If dropped or interrupted, nothing was read.
    ///
    /// # Errors
    /// As [`Io::read`]. `UnexpectedEof` if the connection ended without `close_notify`: what came may not be all. A [`TlsError`] for a record
    /// that is damaged or forged. What came whole before that is read first.
    #[track_caller]
    pub fn read(&self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>> {
        at_caller(async move {
            poll_fn(|cx| poll_proceed(cx)).await;
            loop {
                let taken = self.state.borrow_mut().take(buf);
                match taken {
                    Ok(Some(count)) => return Ok(count),
                    Ok(None) => self.receive().await?,
                    Err(error) => return Err(self.say_goodbye(error)),
                }
            }
        })
    }

    /// Writes as much of `data` as is taken at once, and says how much that was. What the socket does not take of it leaves with a later call:
    /// [`flush`](Self::flush) waits for that, and a task that goes on to read need not care.
    ///
    /// Cancellation point: only while the socket has not taken all that was written before. If dropped or interrupted, nothing was written.
    ///
    /// # Errors
    /// As [`Io::write`]; `BrokenPipe` after [`shutdown`](Self::shutdown).
    #[track_caller]
    pub fn write(&self, data: &[u8]) -> impl Future<Output = io::Result<usize>> {
        at_caller(self.encrypt(|mut writer| io::Write::write(&mut writer, data)))
    }

    /// As [`write`](Self::write), from several buffers, one after the other.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    #[track_caller]
    pub fn write_vectored(&self, bufs: &[IoSlice<'_>]) -> impl Future<Output = io::Result<usize>> {
        at_caller(self.encrypt(|mut writer| io::Write::write_vectored(&mut writer, bufs)))
    }

    async fn encrypt(
        &self,
        write: impl FnOnce(rustls::Writer<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        poll_fn(|cx| poll_proceed(cx)).await;
        self.send_all().await?;
        let taken = self.state.borrow_mut().encrypt(write)?;
        self.push()?;
        Ok(taken)
    }

    /// Writes all of `data`, and waits until the system has it (Curio's `sendall`).
    ///
    /// Cancellation point: whenever the system takes no more. If dropped, a part may have been written, and nobody knows how much.
    ///
    /// # Errors
    /// As [`write`](Self::write), with the number of bytes that are on their way; also for an interrupt. That many need not be written again:
    /// what the system does not have of them leaves with the next call.
    #[track_caller]
    pub fn write_all(&self, data: &[u8]) -> impl Future<Output = Result<(), Incomplete>> {
        at_caller(async move {
            let mut done = 0;
            while done < data.len() {
                let rest = &data[done..];
                let write = self.encrypt(|mut writer| io::Write::write(&mut writer, rest));
                match write.await {
                    Ok(0) => {
                        let error = io::ErrorKind::WriteZero.into();
                        return Err(Incomplete { done, error });
                    }
                    Ok(taken) => done += taken,
                    Err(error) => return Err(Incomplete { done, error }),
                }
            }
            let flushed = self.send_all().await;
            flushed.map_err(|error| Incomplete { done, error })
        })
    }

    /// Waits until the system has all that was written.
    ///
    /// Cancellation point: only if it has to wait. If dropped or interrupted, nothing is lost.
    ///
    /// # Errors
    /// As [`Io::write`].
    #[track_caller]
    pub fn flush(&self) -> impl Future<Output = io::Result<()>> {
        at_caller(self.send_all())
    }

    /// Ends our direction: tells the other side that this was all (`close_notify`). Theirs goes on, and can be read to its end.
    ///
    /// Cancellation point: only if the system takes no more. If dropped or interrupted, call it again.
    ///
    /// # Errors
    /// As [`Io::write`].
    #[track_caller]
    pub fn shutdown(&self) -> impl Future<Output = io::Result<()>> {
        at_caller(async move {
            self.state.borrow_mut().shut();
            self.send_all().await
        })
    }

    /// [`shutdown`](Self::shutdown), then closes the connection. Does not wait for the other side's end: whoever wants that reads to it first.
    ///
    /// Cancellation point: as [`shutdown`](Self::shutdown); then it is closed at once.
    ///
    /// # Errors
    /// As [`Io::write`].
    #[track_caller]
    pub fn close(self) -> impl Future<Output = io::Result<()>> {
        at_caller(async move {
            self.shutdown().await?;
            // With something unread the system would reset the connection, and the other side might never read what we wrote. A
            // client that read nothing has the server's session tickets there.
            let mut unread = [0; 4096];
            let mut discarded = 0;
            let mut socket = self.io.as_std();
            while discarded < DISCARD {
                match io::Read::read(&mut socket, &mut unread) {
                    Ok(count) if count > 0 => discarded += count,
                    _ => break,
                }
            }
            Ok(())
        })
    }

    async fn send_all(&self) -> io::Result<()> {
        while self.state.borrow().tls.wants_write() {
            match self.send().await {
                Ok(_) => {}
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy
                        && self.writing_readers.get() > 0 =>
                {
                    sched_wait(&self.direction_free, WaitKind::Custom).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends ciphertext that is there, in one system call.
    fn send(&self) -> ReadyOp<'_, impl FnMut() -> io::Result<usize>> {
        self.io.ready_op(Direction::Write, |socket| {
            self.state.borrow_mut().send(socket)
        })
    }

    /// Sends what the socket takes, and does not wait. That the call is made behind the kernel's back costs it at most a system call.
    fn push(&self) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        while state.tls.wants_write() {
            match state.send(self.io.as_std()) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends the alert that says what is wrong, if there is room for it, before the error is reported.
    fn say_goodbye(&self, error: io::Error) -> io::Error {
        if let Err(unsent) = self.push() {
            log::debug!("the alert about `{error}` was not sent: {unsent}");
        }
        error
    }

    /// Receives ciphertext in one system call; meanwhile sends what is there.
    async fn receive(&self) -> io::Result<()> {
        let chunk = self.state.borrow().chunk;
        let mut read = self.io.moving(Direction::Read, chunk, |socket| {
            self.state.borrow_mut().fill(socket)
        });
        if !self.state.borrow().tls.wants_write() {
            read.await?;
            return Ok(());
        }
        let mut turn = Some(WriteTurn::new(self));
        let mut send = Some(self.send());
        poll_fn(|cx| {
            while let Some(sending) = &mut send {
                match Pin::new(sending).poll(cx) {
                    Poll::Ready(Ok(_)) if self.state.borrow().tls.wants_write() => {
                        send = Some(self.send());
                    }
                    Poll::Ready(Err(error)) if error.interrupt().is_some() => {
                        // It is told once, and this was the time.
                        return Poll::Ready(Err(error));
                    }
                    // All is sent; or a writer waits there already, and sends it; or there will be no more writing, which the next to try is told.
                    Poll::Ready(Ok(_) | Err(_)) => {
                        (send, turn) = (None, None);
                    }
                    Poll::Pending => break,
                }
            }
            Pin::new(&mut read).poll(cx)
        })
        .await?;
        Ok(())
    }
}

/// For code that polls, which has this stream for itself.
#[cfg(any(feature = "futures-io", feature = "hyper"))]
mod polls {
    use std::task::{Context, ready};

    use super::*;
    use crate::net::polled::{Places, PollRead, PollWrite, end_writing};

    impl<T: AsFd> PollRead for TlsStream<Io<T>>
    where
        for<'a> &'a T: io::Read + io::Write,
    {
        /// As `receive`, it sends meanwhile what is there.
        fn poll_read(
            &self,
            places: &mut Places,
            cx: &mut Context<'_>,
            buf: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            ready!(poll_proceed(cx));
            loop {
                let taken = self.state.borrow_mut().take(buf);
                match taken {
                    Ok(Some(count)) => return Poll::Ready(Ok(count)),
                    Ok(None) => {}
                    Err(error) => return Poll::Ready(Err(self.say_goodbye(error))),
                }
                match self.poll_flush(places, cx) {
                    Poll::Ready(Err(error)) if error.interrupt().is_some() => {
                        return Poll::Ready(Err(error));
                    }
                    // That there is no more writing is said to whoever writes.
                    Poll::Ready(_) | Poll::Pending => {}
                }
                let chunk = self.state.borrow().chunk;
                let fill = |socket| self.state.borrow_mut().fill(socket);
                let place = &mut places.reading;
                ready!(self.io.poll_moving(Direction::Read, place, cx, chunk, fill))?;
            }
        }
    }

    impl<T: AsFd> PollWrite for TlsStream<Io<T>>
    where
        for<'a> &'a T: io::Read + io::Write,
    {
        fn poll_write(
            &self,
            places: &mut Places,
            cx: &mut Context<'_>,
            data: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.poll_encrypt(places, cx, |mut writer| io::Write::write(&mut writer, data))
        }

        fn poll_write_vectored(
            &self,
            places: &mut Places,
            cx: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.poll_encrypt(places, cx, |mut writer| {
                io::Write::write_vectored(&mut writer, bufs)
            })
        }

        fn poll_flush(&self, places: &mut Places, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            while self.state.borrow().tls.wants_write() {
                let send = |socket| self.state.borrow_mut().send(socket);
                let place = &mut places.writing;
                // How much there is to send is not known.
                ready!(self.io.poll_moving(Direction::Write, place, cx, 0, send))?;
            }
            Poll::Ready(Ok(()))
        }

        fn poll_close(&self, places: &mut Places, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.state.borrow_mut().shut();
            ready!(self.poll_flush(places, cx))?;
            Poll::Ready(end_writing(self))
        }
    }

    impl<T: AsFd> TlsStream<Io<T>>
    where
        for<'a> &'a T: io::Read + io::Write,
    {
        fn poll_encrypt(
            &self,
            places: &mut Places,
            cx: &mut Context<'_>,
            write: impl FnOnce(rustls::Writer<'_>) -> io::Result<usize>,
        ) -> Poll<io::Result<usize>> {
            ready!(poll_proceed(cx));
            ready!(self.poll_flush(places, cx))?;
            let taken = self.state.borrow_mut().encrypt(write)?;
            self.push()?;
            Poll::Ready(Ok(taken))
        }
    }
}

impl<S> TlsStream<S> {
    /// The connection underneath, for its options and addresses. Reading or writing through it breaks the TLS.
    pub const fn get_ref(&self) -> &S {
        &self.io
    }

    /// Looks at what else rustls knows of the session: version, cipher suite, ...
    pub fn inspect<R>(&self, look: impl FnOnce(&rustls::Connection) -> R) -> R {
        look(&self.state.borrow().tls)
    }

    /// The application protocol that both agreed on (ALPN), if both offered any.
    pub fn alpn(&self) -> Option<Vec<u8>> {
        Some(self.state.borrow().tls.alpn_protocol()?.to_vec())
    }

    /// On the server's side, the host name that the client asked for (SNI).
    pub fn server_name(&self) -> Option<String> {
        match &self.state.borrow().tls {
            rustls::Connection::Server(server) => Some(server.server_name()?.to_owned()),
            rustls::Connection::Client(_) => None,
        }
    }

    /// The certificate that the other side has shown, and those that certify it.
    pub fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        Some(self.state.borrow().tls.peer_certificates()?.to_vec())
    }
}

/// Held by a reader that may wait to write.
struct WriteTurn<'a, S>(&'a TlsStream<S>);

impl<'a, S> WriteTurn<'a, S> {
    fn new(stream: &'a TlsStream<S>) -> Self {
        stream.writing_readers.update(|readers| readers + 1);
        Self(stream)
    }
}

impl<S> Drop for WriteTurn<'_, S> {
    fn drop(&mut self) {
        self.0.writing_readers.update(|readers| readers - 1);
        sched_wake(&self.0.direction_free, usize::MAX);
    }
}

impl State {
    fn new(tls: rustls::Connection, peer: Box<str>) -> Self {
        Self {
            tls,
            peer,
            incoming: Vec::new(),
            fed: 0,
            chunk: *READ.start(),
            has_ended: false,
            broken: None,
            is_shut: false,
        }
    }

    /// Takes plaintext, 0 bytes at the end; `None` if more ciphertext is needed for any.
    fn take(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match io::Read::read(&mut self.tls.reader(), buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(self.cut_off());
                }
                outcome => return outcome.map(Some),
            }
            if !self.feed()? {
                return Ok(None);
            }
        }
    }

    /// Gives rustls ciphertext until there is some plaintext. False if there was none to give.
    fn feed(&mut self) -> io::Result<bool> {
        self.check()?;
        if self.fed == self.incoming.len() {
            return if self.has_ended {
                Err(self.cut_off())
            } else {
                Ok(false)
            };
        }
        while self.fed < self.incoming.len() {
            self.fed += match self.tls.read_tls(&mut &self.incoming[self.fed..])? {
                // After `close_notify` nothing counts.
                0 => self.incoming.len() - self.fed,
                count => count,
            };
            match self.tls.process_new_packets() {
                Ok(state) if state.plaintext_bytes_to_read() > 0 => break,
                Ok(_) => {}
                // There may be plaintext from before, which comes first.
                Err(reason) => {
                    self.broken = Some(reason);
                    break;
                }
            }
        }
        Ok(true)
    }

    /// Reads ciphertext, after all that was there is fed. A reader that waits holds no buffer.
    fn fill(&mut self, mut socket: impl io::Read) -> io::Result<usize> {
        self.fed = 0;
        self.incoming.resize(self.chunk, 0);
        let read = socket.read(&mut self.incoming);
        let Ok(count) = read else {
            self.incoming = Vec::new();
            return read;
        };
        self.incoming.truncate(count);
        self.has_ended = count == 0;
        self.chunk = match count {
            0 => {
                // rustls has its own opinion of what this end means.
                self.tls.read_tls(&mut io::empty())?;
                self.chunk
            }
            _ if count == self.chunk => (self.chunk * 2).min(*READ.end()),
            _ if count < self.chunk / 4 => (self.chunk / 2).max(*READ.start()),
            _ => self.chunk,
        };
        Ok(count)
    }

    fn send(&mut self, mut socket: impl io::Write) -> io::Result<usize> {
        match self.tls.write_tls(&mut socket)? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            count => Ok(count),
        }
    }

    fn encrypt(
        &mut self,
        write: impl FnOnce(rustls::Writer<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.check()?;
        if self.is_shut {
            let text = format!("this side has ended its TLS with {}", self.peer);
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, text));
        }
        write(self.tls.writer())
    }

    fn shut(&mut self) {
        if !self.is_shut {
            self.is_shut = true;
            self.tls.send_close_notify();
        }
    }

    /// Whether rustls still plays along.
    fn check(&self) -> io::Result<()> {
        match &self.broken {
            None => Ok(()),
            Some(reason) => {
                let (peer, reason) = (self.peer.clone(), reason.clone());
                Err(TlsError { peer, reason }.into())
            }
        }
    }

    fn cut_off(&self) -> io::Error {
        let text = if self.tls.is_handshaking() {
            "hung up before TLS was agreed on; it may not speak TLS, or refuse us"
        } else {
            "closed the connection without saying that this was all (close_notify); what came may be cut off"
        };
        let text = format!("TLS with {}: it {text}", self.peer);
        io::Error::new(io::ErrorKind::UnexpectedEof, text)
    }
}

/// What can be done about it, where rustls does not say.
fn advice(reason: &rustls::Error) -> &'static str {
    match reason {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "; trust the certificate authority that signed it, if it is the right one"
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "; connect by a name that it is for",
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "; does it speak TLS at this port?"
        }
        rustls::Error::NoCertificatesPresented
        | rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "; the client needs a certificate here"
        }
        rustls::Error::AlertReceived(AlertDescription::UnknownCA) => {
            "; the other side does not know who signed our certificate"
        }
        rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol) => {
            "; it speaks none of the application protocols we offer (ALPN)"
        }
        _ => "",
    }
}

/// The other end's address, if it has one.
fn address_of(socket: &impl AsFd) -> Option<String> {
    let address = SockRef::from(socket).peer_addr().ok()?;
    match (address.as_socket(), address.as_pathname()) {
        (Some(ip), _) => Some(ip.to_string()),
        (_, Some(path)) => Some(path.display().to_string()),
        _ => None,
    }
}

impl<T: AsFd> Read for TlsStream<Io<T>>
where
    for<'a> &'a T: io::Read + io::Write,
{
    #[track_caller]
    fn read(&self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>> {
        self.read(buf)
    }
}

impl<T: AsFd> Write for TlsStream<Io<T>>
where
    for<'a> &'a T: io::Read + io::Write,
{
    #[track_caller]
    fn write(&self, data: &[u8]) -> impl Future<Output = io::Result<usize>> {
        self.write(data)
    }

    #[track_caller]
    fn flush(&self) -> impl Future<Output = io::Result<()>> {
        self.flush()
    }
}

impl<S: AsFd> AsFd for TlsStream<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

impl<S: fmt::Debug> fmt::Debug for TlsStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream")
            .field("io", &self.io)
            .field("peer", &self.state.borrow().peer)
            .finish_non_exhaustive()
    }
}
