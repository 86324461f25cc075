//! Where to connect to, and looking it up.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use crate::traps::at_caller;
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
    #[track_caller]
    pub fn resolve(self) -> impl Future<Output = io::Result<Vec<SocketAddr>>> {
        at_caller(async move {
            match self.0 {
                Kind::Known(known) => Ok(vec![known]),
                Kind::Host(host, port) => match host.parse::<IpAddr>() {
                    Ok(ip) => Ok(vec![SocketAddr::new(ip, port)]),
                    Err(_) => look_up(&host.clone(), (host, port)).await,
                },
                Kind::Text(text) => match text.parse() {
                    Ok(known) => Ok(vec![known]),
                    Err(_) => look_up(&text.clone(), text).await,
                },
            }
        })
    }
}

impl Address {
    /// The host's name or number, as a certificate would have it.
    #[cfg(feature = "tls")]
    pub(super) fn host(&self) -> String {
        match &self.0 {
            Kind::Known(known) => known.ip().to_string(),
            Kind::Host(host, _) => host.clone(),
            Kind::Text(text) => {
                let host = text.rsplit_once(':').map_or(&text[..], |(host, _)| host);
                let bare = host
                    .strip_prefix('[')
                    .and_then(|host| host.strip_suffix(']'));
                bare.unwrap_or(host).to_owned()
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Known(known) => known.fmt(f),
            Kind::Host(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Kind::Host(host, port) => write!(f, "{host}:{port}"),
            Kind::Text(text) => f.write_str(text),
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

async fn look_up<N>(host: &str, name: N) -> io::Result<Vec<SocketAddr>>
where
    N: ToSocketAddrs + Send + 'static,
{
    let found = run_in_thread(move || Ok(name.to_socket_addrs()?.collect()));
    found.await?.map_err(|error: io::Error| {
        let text = format!("cannot look up {host:?}: {error}");
        io::Error::new(error.kind(), text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_shows_as_it_would_be_written() {
        let known: SocketAddr = "[::1]:5671".parse().unwrap();
        for (address, text) in [
            (Address::from(known), "[::1]:5671"),
            (Address::from(("localhost", 5671)), "localhost:5671"),
            (Address::from(("::1", 5671)), "[::1]:5671"),
            (Address::from("localhost:5671"), "localhost:5671"),
        ] {
            assert_eq!(address.to_string(), text);
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn the_host_is_what_a_certificate_names() {
        let known: SocketAddr = "[::1]:5671".parse().unwrap();
        for (address, host) in [
            (Address::from(known), "::1"),
            (Address::from(("localhost", 5671)), "localhost"),
            (Address::from("localhost:5671"), "localhost"),
            (Address::from("[::1]:5671"), "::1"),
            (Address::from("127.0.0.1:5671"), "127.0.0.1"),
            (Address::from("no port"), "no port"),
        ] {
            assert_eq!(address.host(), host);
        }
    }
}
