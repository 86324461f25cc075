//! The system's resolver, in worker threads (Curio's `socket.getaddrinfo` and its kin, by the same names).
//!
//! To connect by name needs none of this: see [`TcpStream::connect`](super::TcpStream). The reverse way and services by name come with
//! the feature `resolver`.
//!
//! Each of these is a cancellation point. If dropped or interrupted, the caller goes on at once, and the thread when the resolver has answered.

use std::future::Future;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};

use crate::traps::at_caller;
use crate::workers::run_in_thread;

/// The addresses of a host, each once, in the order in which they should be tried (`gethostbyname_ex`, but with IPv6).
///
/// # Errors
/// The resolver's, with the name; `NotFound` if it has no address; an [`Interrupt`](crate::Interrupt).
///
/// ```
/// # kernel::run(async {
/// let addresses = kernel::net::resolve::gethostbyname("localhost").await?;
/// assert!(addresses.iter().all(|address| address.is_loopback()));
/// # std::io::Result::Ok(()) }).unwrap().unwrap();
/// ```
#[track_caller]
pub fn gethostbyname(host: &str) -> impl Future<Output = io::Result<Vec<IpAddr>>> {
    at_caller(async move {
        let host = host.to_owned();
        run_in_thread(move || {
            let found = (&host[..], 0).to_socket_addrs();
            let found = found.map_err(|error| explain(&host, &error))?;
            let mut addresses = Vec::new();
            for address in found.map(|address| address.ip()) {
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
            if addresses.is_empty() {
                return Err(explain(&host, &io::ErrorKind::NotFound.into()));
            }
            Ok(addresses)
        })
        .await?
    })
}

/// This machine's name. Needs no resolver, so it is no cancellation point.
#[must_use]
pub fn gethostname() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

fn explain(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot look up {what:?}: {error}"))
}

#[cfg(feature = "resolver")]
mod more {
    use std::net::SocketAddr;

    use dns_lookup::{AddrInfoHints, LookupError, SockType};

    use super::*;

    /// The socket addresses of a service, which may be a port or a name such as `https`, at a host; both as text, either of them left out for
    /// none: without a host, those of this machine.
    ///
    /// # Errors
    /// The resolver's, with the names; an [`Interrupt`](crate::Interrupt).
    ///
    /// ```
    /// # kernel::run(async {
    /// let found = kernel::net::resolve::getaddrinfo(Some("127.0.0.1"), Some("8080")).await?;
    /// assert_eq!(found, ["127.0.0.1:8080".parse().unwrap()]);
    /// # std::io::Result::Ok(()) }).unwrap().unwrap();
    /// ```
    #[track_caller]
    pub fn getaddrinfo(
        host: Option<&str>,
        service: Option<&str>,
    ) -> impl Future<Output = io::Result<Vec<SocketAddr>>> {
        at_caller(async move {
            let (host, service) = (host.map(str::to_owned), service.map(str::to_owned));
            run_in_thread(move || {
                let (host, service) = (host.as_deref(), service.as_deref());
                let what = [host, service].map(Option::unwrap_or_default).join(":");
                let hints = AddrInfoHints {
                    // Else every address comes once for each kind of socket.
                    socktype: SockType::Stream.into(),
                    ..AddrInfoHints::default()
                };
                dns_lookup::getaddrinfo(host, service, Some(hints))
                    .map_err(|error| failed(&what, error))?
                    .map(|found| Ok(found?.sockaddr))
                    .collect()
            })
            .await?
        })
    }

    /// The names of a host and a service; their numbers, as text, where there are no names.
    ///
    /// # Errors
    /// The resolver's, with the address; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn getnameinfo(address: SocketAddr) -> impl Future<Output = io::Result<(String, String)>> {
        at_caller(async move {
            run_in_thread(move || {
                dns_lookup::getnameinfo(&address, 0)
                    .map_err(|error| failed(&address.to_string(), error))
            })
            .await?
        })
    }

    /// The name of a host.
    ///
    /// # Errors
    /// The resolver's, with the address, also if it has no name; an [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn gethostbyaddr(address: IpAddr) -> impl Future<Output = io::Result<String>> {
        at_caller(async move {
            run_in_thread(move || {
                dns_lookup::lookup_addr(&address)
                    .map_err(|error| failed(&address.to_string(), error))
            })
            .await?
        })
    }

    /// The full name of a host: that of its first address which has one with a dot, else the name as it is.
    ///
    /// # Errors
    /// An [`Interrupt`](crate::Interrupt); a name that cannot be looked up is its own answer.
    #[track_caller]
    pub fn getfqdn(host: &str) -> impl Future<Output = io::Result<String>> {
        at_caller(async move {
            let name = host.to_owned();
            let named = run_in_thread(move || {
                let found = (&name[..], 0).to_socket_addrs().ok()?;
                let mut names = found.filter_map(|found| dns_lookup::lookup_addr(&found.ip()).ok());
                names.find(|name| name.contains('.'))
            });
            Ok(named.await?.unwrap_or_else(|| host.to_owned()))
        })
    }

    fn failed(what: &str, error: LookupError) -> io::Error {
        explain(what, &error.into())
    }
}

#[cfg(feature = "resolver")]
pub use more::{getaddrinfo, getfqdn, gethostbyaddr, getnameinfo};
