//! A broker for an example that is given no address.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use amqp::broker::{Config, Server};
use kernel::net::TcpListener;

/// The address that was given, or that of a broker of our own, which is a task of the same kernel.
pub(crate) fn address(given: Option<String>) -> io::Result<String> {
    if let Some(address) = given {
        return Ok(address);
    }
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let address = format!("amqp://guest:guest@{}/", listener.local_addr()?);
    kernel::spawn(async move { Server::new(Config::default()).serve(listener).await });
    println!("no address was given; a broker of our own is at {address}");
    Ok(address)
}
