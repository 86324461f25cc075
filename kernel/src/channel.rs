//! Messages between processes (Curio's `Channel` and `Connection`).
//!
//! A message is bytes, of any length up to 2 GiB, with its length before it, as Curio and Python's `multiprocessing` send it: four bytes, a signed
//! number, high byte first. What is in it is between the two programs; `serde` is a good way to fill it.
//!
//! With a key, each side proves to the other that it knows it before anything else is said: it answers a random challenge with the
//! HMAC-SHA-256 of its role and the challenge. The role keeps an answer from being played back to the one who asked. Nothing is encrypted after that, so
//! this is for one machine, or for a network whose wires one trusts.
//!
//! ```
//! use kernel::channel::{self, Channel};
//!
//! # kernel::run(async {
//! let channel = Channel::bind("127.0.0.1:0")?.with_key("the moon");
//! let address = channel.local_addr()?;
//! let server = kernel::spawn(async move {
//!     let mut client = channel.accept().await?;
//!     let name = client.recv(1024).await?;
//!     client.send(&[b"hello ", &name[..]].concat()).await?;
//!     std::io::Result::Ok(())
//! });
//! let mut server_side = channel::connect(address, Some("the moon")).await?;
//! server_side.send(b"Ada").await?;
//! assert_eq!(server_side.recv(1024).await?, b"hello Ada");
//! server.join().await.unwrap()?;
//! # std::io::Result::Ok(()) }).unwrap().unwrap();
//! ```

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::error::{Interrupt, MaybeInterrupt};
use crate::net::{Address, Incomplete, Read, Stream, TcpListener, TcpStream, Write};
use crate::time::{sleep, timeout_after};
use crate::traps::at_caller;

/// How long a peer has to prove that it knows the key (as in Curio).
const HANDSHAKE: Duration = Duration::from_secs(1);

/// How long [`connect`] waits before it tries again: first and last.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

const CHALLENGE: &[u8] = b"#CHALLENGE#";
const WELCOME: &[u8] = b"#WELCOME#";
const FAILURE: &[u8] = b"#FAILURE#";

/// A place where other processes can connect to.
pub struct Channel {
    listener: TcpListener,
    key: Option<Vec<u8>>,
}

impl Channel {
    /// Listens on the first of the addresses that can be had; port 0 means any free one. Without a key: anybody can connect.
    ///
    /// Not a cancellation point.
    ///
    /// # Errors
    /// As [`TcpListener::bind`].
    pub fn bind(on: impl ToSocketAddrs) -> io::Result<Self> {
        Ok(Self {
            listener: TcpListener::bind(on)?,
            key: None,
        })
    }

    /// Accepts only who knows `key`, and proves that it is known here.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<Vec<u8>>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// The address it listens on, with the port that port 0 became.
    ///
    /// # Errors
    /// Those of `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits for a connection. With a key, a peer that does not prove within a second that it knows it is dropped, and the wait goes on.
    ///
    /// Cancellation point: yes. If dropped, or interrupted during a handshake, the peer is dropped.
    ///
    /// # Errors
    /// As [`TcpListener::accept`].
    #[track_caller]
    pub fn accept(&self) -> impl Future<Output = io::Result<Connection<TcpStream>>> {
        at_caller(async move {
            loop {
                let (stream, peer) = self.listener.accept().await?;
                let mut connection = Connection::new(stream);
                let Err(error) = self.welcome(&mut connection).await else {
                    return Ok(connection);
                };
                match error.interrupt() {
                    None | Some(Interrupt::TaskTimeout) => {
                        log::warn!("channel: dropped {peer}: {error}");
                    }
                    Some(_) => return Err(error),
                }
            }
        })
    }

    async fn welcome(&self, connection: &mut Connection<TcpStream>) -> io::Result<()> {
        connection.get_ref().set_nodelay(true)?;
        match &self.key {
            Some(key) => timeout_after(HANDSHAKE, connection.authenticate_server(key)).await,
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Channel {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

/// Connects to a [`Channel`]. While nobody listens there, it tries again, at first soon, then every second: peers that are started together find each
/// other. Set a timeout around it.
///
/// Cancellation point: yes. If dropped, the attempt is given up.
///
/// # Errors
/// As [`TcpStream::connect`], but for a refused connection; `PermissionDenied` with an [`AuthenticationError`] inside if the keys differ.
#[track_caller]
pub fn connect(
    to: impl Into<Address>,
    key: Option<impl AsRef<[u8]>>,
) -> impl Future<Output = io::Result<Connection<TcpStream>>> {
    at_caller(async move {
        let to = to.into();
        let mut pause = PAUSE.0;
        let stream = loop {
            match TcpStream::connect(to.clone()).await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    sleep(pause).await?;
                    pause = (pause * 2).min(PAUSE.1);
                }
                outcome => break outcome?,
            }
        };
        stream.set_nodelay(true)?;
        let mut connection = Connection::new(stream);
        if let Some(key) = key {
            connection.authenticate_client(key.as_ref()).await?;
        }
        Ok(connection)
    })
}

/// Messages over a stream.
///
/// An interrupt never takes it out of step. A message that was received in part goes on to be received by the next call. One that was sent in part goes first
/// with the next. To receive in one task and send in another, make two over an [`Rc`](std::rc::Rc) of the stream.
#[derive(Debug)]
pub struct Connection<S> {
    stream: Stream<S>,
    /// The size of the message whose bytes come next.
    incoming: Option<usize>,
    /// How much of what comes next belongs to a message that nobody wanted.
    unwanted: usize,
    /// A message with its size, and how much of it was sent.
    outgoing: Vec<u8>,
    sent: usize,
}

impl<S> Connection<S> {
    /// Over a stream.
    pub const fn new(stream: S) -> Self {
        Self {
            stream: Stream::new(stream),
            incoming: None,
            unwanted: 0,
            outgoing: Vec::new(),
            sent: 0,
        }
    }

    /// The stream. What is read from it, or written to it, is missing in the messages.
    pub const fn get_ref(&self) -> &S {
        self.stream.get_ref()
    }
}

impl<S: Read> Connection<S> {
    /// Receives a message of at most `limit` bytes.
    ///
    /// Cancellation point: as the stream. If dropped or interrupted, nothing is lost: receive again.
    ///
    /// # Errors
    /// Those of the stream; `UnexpectedEof` when the peer is gone; `InvalidData` if what comes is no message; `FileTooLarge`, with a [`TooLong`]
    /// inside, for a longer one, which is then skipped.
    #[track_caller]
    pub fn recv(&mut self, limit: usize) -> impl Future<Output = io::Result<Vec<u8>>> {
        at_caller(async move {
            let size = self.next_size(limit).await?;
            let mut message = vec![0; size];
            self.stream.read_exact(&mut message).await?;
            self.incoming = None;
            Ok(message)
        })
    }

    /// Receives a message into the beginning of `buf`, and says how long it is (Curio's `recv_bytes_into`).
    ///
    /// As [`recv`](Self::recv) in every other respect.
    ///
    /// # Errors
    /// As [`recv`](Self::recv), with the length of `buf` as the limit.
    #[track_caller]
    pub fn recv_into(&mut self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>> {
        at_caller(async move {
            let size = self.next_size(buf.len()).await?;
            self.stream.read_exact(&mut buf[..size]).await?;
            self.incoming = None;
            Ok(size)
        })
    }

    async fn next_size(&mut self, limit: usize) -> io::Result<usize> {
        let mut waste = [0; 4096];
        while self.unwanted > 0 {
            let wanted = self.unwanted.min(waste.len());
            match self.stream.read(&mut waste[..wanted]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                skipped => self.unwanted -= skipped,
            }
        }
        let size = match self.incoming {
            Some(size) => size,
            None => {
                let mut head = [0; 4];
                self.stream.read_exact(&mut head).await?;
                let size = i32::from_be_bytes(head);
                usize::try_from(size).map_err(|_| {
                    let text = format!("a message cannot have {size} bytes");
                    io::Error::new(io::ErrorKind::InvalidData, text)
                })?
            }
        };
        if size > limit {
            (self.incoming, self.unwanted) = (None, size);
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                TooLong { size, limit },
            ));
        }
        self.incoming = Some(size);
        Ok(size)
    }
}

impl<S: Write> Connection<S> {
    /// Sends a message.
    ///
    /// Cancellation point: as the stream. If dropped or interrupted, it is either not sent at all, or has begun: then the rest
    /// goes first with the next [`send`](Self::send) or [`flush`](Self::flush).
    ///
    /// # Errors
    /// Those of the stream, with the number of bytes that went before, of the message and the four before it; 0 means that it was not sent.
    /// `InvalidInput` if it is longer than 2 GiB.
    #[track_caller]
    pub fn send(&mut self, message: &[u8]) -> impl Future<Output = Result<(), Incomplete>> {
        at_caller(async move {
            let size = i32::try_from(message.len()).map_err(|_| {
                let text = format!("a message cannot have {} bytes", message.len());
                Incomplete {
                    done: 0,
                    error: io::Error::new(io::ErrorKind::InvalidInput, text),
                }
            })?;
            let none = |error| Incomplete { done: 0, error };
            self.flush().await.map_err(none)?;
            self.outgoing.extend_from_slice(&size.to_be_bytes());
            self.outgoing.extend_from_slice(message);
            let outcome = self.push().await;
            let done = self.sent;
            outcome.map_err(|error| Incomplete { done, error })
        })
    }

    /// Sends the rest of a message that was interrupted, if there is one.
    ///
    /// Cancellation point: as the stream. If dropped or interrupted, it can be tried again.
    ///
    /// # Errors
    /// Those of the stream.
    #[track_caller]
    pub fn flush(&mut self) -> impl Future<Output = io::Result<()>> {
        at_caller(async move {
            if self.sent > 0 {
                self.push().await?;
            }
            // Or else it has not begun.
            self.outgoing.clear();
            self.sent = 0;
            Ok(())
        })
    }

    async fn push(&mut self) -> io::Result<()> {
        while self.sent < self.outgoing.len() {
            match self
                .stream
                .get_ref()
                .write(&self.outgoing[self.sent..])
                .await?
            {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => self.sent += written,
            }
        }
        Ok(())
    }
}

impl<S: Read + Write> Connection<S> {
    /// Proves to the other side, which must call [`authenticate_server`](Self::authenticate_server), that `key` is known here, and the other way round.
    ///
    /// Cancellation point: as the stream. If dropped or interrupted, the connection is of no use.
    ///
    /// # Errors
    /// `PermissionDenied` with an [`AuthenticationError`] inside; those of the stream.
    #[track_caller]
    pub fn authenticate_client(&mut self, key: &[u8]) -> impl Future<Output = io::Result<()>> {
        at_caller(async move {
            self.answer(key, Role::Client).await?;
            self.challenge(key, Role::Server).await
        })
    }

    /// The other half of [`authenticate_client`](Self::authenticate_client).
    ///
    /// # Errors
    /// As [`authenticate_client`](Self::authenticate_client).
    #[track_caller]
    pub fn authenticate_server(&mut self, key: &[u8]) -> impl Future<Output = io::Result<()>> {
        at_caller(async move {
            self.challenge(key, Role::Client).await?;
            self.answer(key, Role::Server).await
        })
    }

    /// Lets the peer prove that it knows the key.
    async fn challenge(&mut self, key: &[u8], peer: Role) -> io::Result<()> {
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce).map_err(io::Error::other)?;
        self.send(&[CHALLENGE, &nonce].concat()).await?;
        let answer = self.recv(256).await?;
        let proof = digest(key, peer, &nonce);
        if proof.verify_slice(&answer).is_err() {
            self.send(FAILURE).await?;
            return Err(AuthenticationError.into());
        }
        Ok(self.send(WELCOME).await?)
    }

    /// Proves to the peer that we know the key.
    async fn answer(&mut self, key: &[u8], we: Role) -> io::Result<()> {
        let message = self.recv(256).await?;
        let nonce = message.strip_prefix(CHALLENGE).ok_or(AuthenticationError)?;
        let proof = digest(key, we, nonce).finalize().into_bytes();
        self.send(&proof).await?;
        if self.recv(256).await? != WELCOME {
            return Err(AuthenticationError.into());
        }
        Ok(())
    }
}

/// Who answers a challenge.
#[derive(Clone, Copy)]
enum Role {
    Client,
    Server,
}

fn digest(key: &[u8], role: Role, nonce: &[u8]) -> Hmac<Sha256> {
    let mut digest = Hmac::<Sha256>::new_from_slice(key).expect("a key may have any length");
    digest.update(match role {
        Role::Client => b"client",
        Role::Server => b"server",
    });
    digest.update(nonce);
    digest
}

/// The two sides of a channel do not have the same key (Curio's `AuthenticationError`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("authentication failed: the two sides do not have the same key")]
pub struct AuthenticationError;

impl From<AuthenticationError> for io::Error {
    fn from(error: AuthenticationError) -> Self {
        Self::new(io::ErrorKind::PermissionDenied, error)
    }
}

/// A message was longer than the receiver wanted. It is skipped; the next one can be received.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a message of {size} bytes came where at most {limit} were wanted")]
pub struct TooLong {
    /// How long it is.
    pub size: usize,
    /// How long it might have been.
    pub limit: usize,
}
