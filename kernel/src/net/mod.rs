//! Sockets: TCP, Unix, UDP; buffered streams, TLS and servers over them; the resolver.
//!
//! Every type here is an [`Io`], a descriptor in non-blocking mode whose readiness the kernel remembers. A call is tried at once and waits only
//! if it would block, as in Curio; only then is it a cancellation point. Methods take `&self`, so that one task reads
//! while another writes; two tasks that wait for the same direction are a mistake, and the second is told
//! [`ResourceBusy`](crate::ResourceBusy).
//!
//! ```
//! use kernel::net::{TcpListener, TcpStream};
//!
//! # kernel::run(async {
//! let listener = TcpListener::bind("127.0.0.1:0")?;
//! let server = listener.local_addr()?;
//! let echo = kernel::spawn(async move {
//!     let (client, _) = listener.accept().await?;
//!     let mut buf = [0; 1024];
//!     loop {
//!         match client.read(&mut buf).await? {
//!             0 => return std::io::Result::Ok(()),
//!             n => client.write_all(&buf[..n]).await?,
//!         }
//!     }
//! });
//!
//! let stream = TcpStream::connect(server).await?;
//! stream.write_all(b"hello").await?;
//! let mut answer = [0; 5];
//! assert_eq!(stream.read(&mut answer).await?, 5);
//! assert_eq!(&answer, b"hello");
//! drop(stream);
//! echo.join().await.unwrap()?;
//! # std::io::Result::Ok(()) }).unwrap().unwrap();
//! ```

mod address;
#[cfg(feature = "futures-io")]
mod futures_io;
#[cfg(feature = "hyper")]
pub mod hyper;
mod io;
mod open;
#[cfg(any(feature = "futures-io", feature = "hyper"))]
mod polled;
pub mod resolve;
mod server;
mod stream;
mod tcp;
#[cfg(feature = "tls")]
pub mod tls;
#[cfg(feature = "tls")]
mod tls_context;
mod udp;
mod unix;

pub use address::Address;
pub use io::{Incomplete, Io};
pub use open::{open_connection, open_unix_connection};
#[cfg(any(feature = "futures-io", feature = "hyper"))]
pub use polled::{Places, PollRead, PollWrite, Polled};
pub use server::{
    Listen, Plain, Server, Welcome, tcp_server, tcp_server_socket, unix_server, unix_server_socket,
};
pub use stream::{IntoStdError, Read, Stream, Write};
pub use tcp::{TcpListener, TcpStream};
#[cfg(feature = "tls")]
pub use tls::TlsStream;
pub use udp::UdpSocket;
pub use unix::{UnixListener, UnixStream};
