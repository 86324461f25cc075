//! What [hyper](https://docs.rs/hyper/1) 1.x needs of a runtime: [`Polled`] is its `rt::Read` and `rt::Write`, in the clear and, over a `TlsStream`, for HTTPS;
//! [`KernelTimer`] is its `rt::Timer`, [`KernelExecutor`] its `rt::Executor`. Nothing here asks for `Send`, and neither does hyper: services and bodies may hold an `Rc`.
//!
//! A connection future of hyper's is awaited in a task like any other. When that is cancelled or times out while it waits for its socket, the future ends:
//!
//! - amid a request with a `hyper::Error` in whose chain [`Interrupt::find_in`](crate::Interrupt::find_in) finds the interrupt ([`Polled`] has the details);
//! - amid an answer with `Ok`, and whoever asked gets that error;
//! - between two requests with `Ok`, since hyper takes any error there for the end of the connection.
//!
//! ```
//! use std::convert::Infallible;
//! use hyper::server::conn::http1;
//! use hyper::service::service_fn;
//! use hyper::{Request, Response, body::Incoming};
//! use kernel::net::hyper::KernelTimer;
//! use kernel::net::{Polled, TcpListener, TcpStream};
//! use kernel::spawn;
//!
//! async fn hello(_: Request<Incoming>) -> Result<Response<String>, Infallible> {
//!     Ok(Response::new("hello".to_string()))
//! }
//!
//! async fn serve(client: TcpStream) -> hyper::Result<()> {
//!     let mut http = http1::Builder::new();
//!     http.timer(KernelTimer).serve_connection(Polled::new(client), service_fn(hello)).await
//! }
//!
//! # kernel::run(async {
//! let listener = TcpListener::bind("127.0.0.1:0")?;
//! let address = listener.local_addr()?;
//! let server = spawn(async move {
//!     let (client, _) = listener.accept().await?;
//!     std::io::Result::Ok(serve(client).await)
//! });
//!
//! let stream = TcpStream::connect(address).await?;
//! let (mut sender, connection) = hyper::client::conn::http1::handshake(Polled::new(stream)).await?;
//! let connection = spawn(connection);
//! let request = Request::get("/").header("host", "localhost").body(String::new())?;
//! assert_eq!(sender.send_request(request).await?.status(), 200);
//!
//! server.cancel().await?; // the connection is idle
//! server.join().await???;
//! connection.join().await??;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # }).unwrap().unwrap();
//! ```
//!
//! With TLS, offer the versions of HTTP that you serve, the best first, and serve the one that both agreed on; a client does the same.
//!
#![cfg_attr(feature = "tls", doc = "```no_run")]
#![cfg_attr(not(feature = "tls"), doc = "```ignore")]
//! # use std::convert::Infallible;
//! # use hyper::service::service_fn;
//! # use hyper::{Request, Response, body::Incoming};
//! use hyper::server::conn::{http1, http2};
//! use kernel::net::hyper::{KernelExecutor, KernelTimer};
//! use kernel::net::tls::{Identity, ServerContext};
//! use kernel::net::{Polled, Server, TcpStream, TlsStream};
//! # async fn hello(_: Request<Incoming>) -> Result<Response<String>, Infallible> { Ok(Response::new(String::new())) }
//!
//! async fn serve(client: TlsStream<TcpStream>) -> std::io::Result<()> {
//!     let is_http2 = client.alpn().is_some_and(|protocol| protocol == b"h2");
//!     let (client, service) = (Polled::new(client), service_fn(hello));
//!     let served = if is_http2 {
//!         http2::Builder::new(KernelExecutor).timer(KernelTimer).serve_connection(client, service).await
//!     } else {
//!         http1::Builder::new().timer(KernelTimer).serve_connection(client, service).await
//!     };
//!     served.map_err(std::io::Error::other)
//! }
//!
//! # kernel::run(async {
//! let identity = Identity::from_files("server.pem", "server-key.pem")?;
//! let context = ServerContext::new(identity).alpn(&["h2", "http/1.1"]).build()?;
//! Server::new().tls(context).tcp("0.0.0.0:443", serve).await
//! # }).unwrap().unwrap();
//! ```

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use ::hyper::rt;
use send_wrapper::SendWrapper;

use super::{PollRead, PollWrite, Polled};
use crate::cancel::{Shielded, shield};
use crate::{spawn, time, traps};

/// Most that one read fetches.
const CHUNK: usize = 64 * 1024;

thread_local! {
    /// hyper's buffers are uninitialised memory, into which only unsafe code can read: a copy is what it costs to have none.
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl<S: PollRead + Unpin> rt::Read for Polled<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buf: rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut scratch = SCRATCH.take();
        let len = buf.remaining().min(CHUNK);
        if scratch.len() < len {
            scratch.resize(len, 0);
        }
        let read = Self::poll_read(self.get_mut(), cx, &mut scratch[..len]);
        if let Poll::Ready(Ok(count)) = read {
            buf.put_slice(&scratch[..count]);
        }
        SCRATCH.set(scratch);
        read.map_ok(|_| ())
    }
}

impl<S: PollWrite + Unpin> rt::Write for Polled<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Self::poll_write(self.get_mut(), cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Self::poll_write_vectored(self.get_mut(), cx, bufs)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Self::poll_flush(self.get_mut(), cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Self::poll_close(self.get_mut(), cx)
    }
}

/// Runs what hyper wants done beside a connection (HTTP/2 does, HTTP/1 never) as tasks of the running kernel, detached.
///
/// # Panics
/// Outside a running kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelExecutor;

impl<F> rt::Executor<F> for KernelExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        spawn(future);
    }
}

/// hyper's timeouts on the kernel's clock, be it a virtual one.
///
/// Its sleeps are no cancellation points: to hyper the end of a sleep means that its time has come, so an interrupt is left to the socket.
///
/// # Panics
/// Outside a running kernel. A sleep that is polled or dropped on another thread than its own panics there: it says that it is `Send` because hyper asks for that.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelTimer;

impl rt::Timer for KernelTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn rt::Sleep>> {
        // From now on, not from its first poll.
        let now = self.now();
        self.sleep_until(now.checked_add(duration).unwrap_or(now + FOR_EVER))
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn rt::Sleep>> {
        let slept = shield(time::sleep_until(deadline));
        Box::pin(KernelSleep(SendWrapper::new(slept)))
    }

    fn now(&self) -> Instant {
        time::now()
    }
}

/// A century.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 86_400);

struct KernelSleep(SendWrapper<Shielded<traps::SleepUntil>>);

impl Future for KernelSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let slept = ready!(Pin::new(&mut *self.0).poll(cx));
        slept.expect("a shielded sleep is not interrupted");
        Poll::Ready(())
    }
}

impl rt::Sleep for KernelSleep {}

impl fmt::Debug for KernelSleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KernelSleep")
    }
}
