//! Connections with a read buffer in one call, by Curio's names.

use std::future::Future;
use std::io;
use std::path::Path;

use super::address::Address;
use super::stream::Stream;
use super::tcp::TcpStream;
use super::unix::UnixStream;
use crate::traps::at_caller;

/// Connects to `to`, with a read buffer. [`TcpStream::connect_from`] chooses the local address, too.
///
/// Cancellation point: yes. If dropped, the attempt is given up.
///
/// # Errors
/// As [`TcpStream::connect`].
///
/// ```
/// use kernel::net::{Stream, open_connection, tcp_server_socket};
///
/// # kernel::run(async {
/// let listener = tcp_server_socket("127.0.0.1:0")?;
/// let mut client = open_connection(listener.local_addr()?).await?;
/// let (server, _) = listener.accept().await?;
/// server.write_all(b"220 ready\r\n").await?;
/// assert_eq!(client.read_line(512).await?, b"220 ready\r\n");
/// # std::io::Result::Ok(()) }).unwrap().unwrap();
/// ```
#[track_caller]
pub fn open_connection(
    to: impl Into<Address>,
) -> impl Future<Output = io::Result<Stream<TcpStream>>> {
    at_caller(async move { Ok(Stream::new(TcpStream::connect(to).await?)) })
}

/// Connects to the server at `path`, with a read buffer.
///
/// Cancellation point: only while the server's backlog is full. If dropped, the attempt is given up.
///
/// # Errors
/// As [`UnixStream::connect`].
#[track_caller]
pub fn open_unix_connection(
    path: impl AsRef<Path>,
) -> impl Future<Output = io::Result<Stream<UnixStream>>> {
    at_caller(async move { Ok(Stream::new(UnixStream::connect(path).await?)) })
}

#[cfg(feature = "tls")]
mod with_tls {
    use std::sync::Arc;

    use rustls::ClientConfig;

    use super::*;
    use crate::net::tls::TlsStream;

    /// Connects to `to` with TLS, and a read buffer. `name` is what the server's certificate must be for; without one it is the host in `to`.
    ///
    /// Cancellation point: yes. If dropped, the attempt is given up.
    ///
    /// # Errors
    /// As [`TcpStream::connect`] and [`TlsStream::connect`].
    #[track_caller]
    pub fn open_tls_connection(
        to: impl Into<Address>,
        config: Arc<ClientConfig>,
        name: Option<&str>,
    ) -> impl Future<Output = io::Result<Stream<TlsStream<TcpStream>>>> {
        at_caller(async move {
            let to = to.into();
            let name = name.map_or_else(|| to.host(), str::to_owned);
            let stream = TcpStream::connect(to).await?;
            Ok(Stream::new(
                TlsStream::connect(stream, config, &name).await?,
            ))
        })
    }

    /// Connects to the server at `path` with TLS, and a read buffer. `name` is what the server's certificate must be for.
    ///
    /// Cancellation point: yes. If dropped, the attempt is given up.
    ///
    /// # Errors
    /// As [`UnixStream::connect`] and [`TlsStream::connect`].
    #[track_caller]
    pub fn open_unix_tls_connection(
        path: impl AsRef<Path>,
        config: Arc<ClientConfig>,
        name: &str,
    ) -> impl Future<Output = io::Result<Stream<TlsStream<UnixStream>>>> {
        at_caller(async move {
            let stream = UnixStream::connect(path).await?;
            Ok(Stream::new(TlsStream::connect(stream, config, name).await?))
        })
    }
}

#[cfg(feature = "tls")]
pub use with_tls::{open_tls_connection, open_unix_tls_connection};
