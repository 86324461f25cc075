//! Where to connect to, and looking it up.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use crate::workers::run_in_thread;

/// Where to connect to: an address, a host and a port, or a text such as `localhost:5672` or `[::1]:5672`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address(Kind);

#[derive(Clone, PartialEq, Eq, Debug)]
enum Kind {
    Known(SocketAddr),
    Host(String, u16),
    Text(String),
}

impl Address {
    /// Looks up the addresses, in the order in which they should be tried. What is no name needs no look-up; names go to the
    /// system's resolver, in a worker thread.
    ///
    /// Cancellation point: only for a name. If dropped or interrupted, the thread is busy until the resolver answers.
    ///
    /// # Errors
    /// The resolver's; an [`Interrupt`](crate::Interrupt).
    pub async fn resolve(self) -> io::Result<Vec<SocketAddr>> {
        match self.0 {
            Kind::Known(known) => Ok(vec![known]),
            Kind::Host(host, port) => match host.parse::<IpAddr>() {
                Ok(ip) => Ok(vec![SocketAddr::new(ip, port)]),
                Err(_) => look_up((host, port)).await,
            },
            Kind::Text(text) => match text.parse() {
                Ok(known) => Ok(vec![known]),
                Err(_) => look_up(text).await,
            },
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(known: SocketAddr) -> Self {
        Self(Kind::Known(known))
    }
}

impl From<(IpAddr, u16)> for Address {
    fn from(known: (IpAddr, u16)) -> Self {
        Self(Kind::Known(known.into()))
    }
}

impl From<(&str, u16)> for Address {
    fn from((host, port): (&str, u16)) -> Self {
        Self(Kind::Host(host.to_owned(), port))
    }
}

impl From<(String, u16)> for Address {
    fn from((host, port): (String, u16)) -> Self {
        Self(Kind::Host(host, port))
    }
}

impl From<&str> for Address {
    fn from(text: &str) -> Self {
        Self(Kind::Text(text.to_owned()))
    }
}

impl From<String> for Address {
    fn from(text: String) -> Self {
        Self(Kind::Text(text))
    }
}

async fn look_up<N>(name: N) -> io::Result<Vec<SocketAddr>>
where
    N: ToSocketAddrs + fmt::Debug + Send + 'static,
{
    run_in_thread(move || match name.to_socket_addrs() {
        Ok(found) => Ok(found.collect()),
        Err(error) => {
            let text = format!("cannot look up {name:?}: {error}");
            Err(io::Error::new(error.kind(), text))
        }
    })
    .await?
}
