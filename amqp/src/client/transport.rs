//! What a connection runs over: a socket, or whatever else moves bytes both ways. A new kind is one variant here.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use kernel::net::TcpStream;
#[cfg(feature = "tls")]
use kernel::net::TlsStream;

use super::tls::Security;
use crate::uri::{Host, Uri};

/// A stream of bytes to a server.
#[derive(Debug)]
pub(super) enum Transport {
    Tcp(TcpStream),
    #[cfg(feature = "tls")]
    Tls(Box<TlsStream<TcpStream>>),
    #[cfg(test)]
    Unix(kernel::net::UnixStream),
}

impl Transport {
    /// Connects to one address of a host. What the address asks for on top of TCP is set up here, too.
    pub(super) async fn connect(
        uri: &Uri,
        host: &Host,
        peer: SocketAddr,
        security: Option<&Security>,
    ) -> io::Result<Self> {
        let stream = TcpStream::connect(peer).await?;
        // Writes are put together before; what is written should leave.
        stream.set_nodelay(true)?;
        match security {
            None => Ok(Self::Tcp(stream)),
            #[cfg(feature = "tls")]
            Some(config) => {
                let name = uri.tls_options.server_name.as_ref().unwrap_or(&host.name);
                // Certificates do not know our interfaces.
                let name = name.split_once('%').map_or(&**name, |(name, _)| name);
                let stream = TlsStream::connect(stream, config.clone(), name).await?;
                Ok(Self::Tls(Box::new(stream)))
            }
            #[cfg(not(feature = "tls"))]
            Some(never) => {
                let _ = (uri, host);
                match *never {}
            }
        }
    }

    /// Reads what is there; 0 at the end.
    pub(super) async fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buf).await,
            #[cfg(feature = "tls")]
            Self::Tls(stream) => stream.read(buf).await,
            #[cfg(test)]
            Self::Unix(stream) => stream.read(buf).await,
        }
    }

    /// Whether a read that gave `read` bytes where there was room for `room` has left nothing behind, as far as can be told.
    pub(super) fn has_emptied(&self, read: usize, room: usize) -> bool {
        match self {
            Self::Tcp(_) => read < room,
            // A record at a time, however many there are.
            #[cfg(feature = "tls")]
            Self::Tls(_) => false,
            #[cfg(test)]
            Self::Unix(_) => read < room,
        }
    }

    /// Writes as much as is taken. Of that, a part may leave only while something is read, written or flushed.
    pub(super) async fn write(&self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(data).await,
            #[cfg(feature = "tls")]
            Self::Tls(stream) => stream.write(data).await,
            #[cfg(test)]
            Self::Unix(stream) => stream.write(data).await,
        }
    }

    /// Waits until all that was taken has left.
    pub(super) async fn flush(&self) -> io::Result<()> {
        match self {
            Self::Tcp(_) => Ok(()),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => stream.flush().await,
            #[cfg(test)]
            Self::Unix(_) => Ok(()),
        }
    }

    /// Says that nothing more follows, where that can be told from a connection that was cut.
    pub(super) async fn say_goodbye(&self) -> io::Result<()> {
        match self {
            Self::Tcp(_) => Ok(()),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => stream.shutdown().await,
            #[cfg(test)]
            Self::Unix(_) => Ok(()),
        }
    }

    /// Has the system give up on a peer that acknowledges nothing, where it can.
    pub(super) fn set_user_timeout(&self, seconds: u32) {
        match self {
            Self::Tcp(stream) => set_user_timeout(stream, seconds),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => set_user_timeout(&**stream, seconds),
            #[cfg(test)]
            Self::Unix(_) => {}
        }
    }
}

fn set_user_timeout(io: &impl AsFd, seconds: u32) {
    #[cfg(target_os = "linux")]
    if seconds > 0 {
        let timeout = Some(Duration::from_secs(seconds.into()));
        if let Err(error) = socket2::SockRef::from(io).set_tcp_user_timeout(timeout) {
            log::debug!("TCP_USER_TIMEOUT: {error}");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (io, seconds);
}
