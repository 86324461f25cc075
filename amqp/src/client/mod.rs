//! A client for AMQP 0-9-1 servers, on the kernel.
//!
//! ```no_run
//! use std::time::Duration;
//! use amqp::client::{self, Message, Options, PublisherOptions};
//!
//! # kernel::run(async {
//! let connection = client::connect("amqp://guest:guest@localhost/%2F", Options::default()).await?;
//!
//! let channel = connection.channel().await?;
//! channel.queue("tasks").durable().declare().await?;
//!
//! let publisher = connection.publisher(PublisherOptions::default()).await?;
//! publisher.send(Message::new(b"hello").key("tasks").mandatory()).await?; // in the queue now
//!
//! let mut tasks = channel.consume("tasks").prefetch(8).start().await?;
//! if let Some(delivery) = tasks.next().await? {
//!     assert_eq!(delivery.body(), b"hello");
//!     delivery.ack();
//! }
//! let closed = connection.close(Duration::from_secs(5)).await?;
//! assert_eq!(closed.unconfirmed, 0);
//! # Ok::<(), client::Error>(()) }).unwrap().unwrap();
//! ```
//!
//! # How it works
//!
//! One task a connection reads and writes the socket. Handles share the protocol's state with it, so what needs no answer (an
//! ack, a publishing) is an ordinary call that leaves bytes behind; the driver sends the bytes of all tasks in one write. What needs an answer is
//! a future. Nothing is locked and nothing copied between tasks; a delivery's body is copied once, out of the read buffer.
//!
//! # What holds
//!
//! - Whoever waits is told when the connection or the channel is lost, at once and with the reason: requests, confirms, consumers, publishers
//!   that wait for room.
//! - Every request has a deadline ([`Options::rpc_timeout`]). One that is dropped or late is *abandoned*: its answer is taken off in its turn,
//!   and undone where it matters (a consumer is cancelled, a message goes back).
//! - What a server can make grow is bounded: by prefetch, by [`Cap`], by the window of a publisher, by the largest body that is taken.
//! - Publishers wait above [`Options::high_water`], and while the server is short of memory. Acks and heartbeats do not.
//! - A delivery of a lost channel or connection settles to nothing ([`Settled::Stale`]).

mod book;
mod channel;
mod connection;
mod consumer;
mod driver;
mod error;
mod publisher;
mod request;
mod shared;
#[cfg(test)]
mod tests;

pub use channel::{Channel, DeclareExchange, DeclareQueue, QueueInfo};
pub use connection::{Closed, Connection, ConnectionEvent, Events, connect, connect_to};
pub use consumer::{Cap, Consume, Consumer, Delivery, Settled};
pub use error::{Busy, Error, Returned};
pub use publisher::{Confirm, Message, MessageProps, Publisher, PublisherOptions};

use std::time::Duration;

/// How a connection behaves. What the address says goes first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Seconds between heartbeats, 0 for none; `None` leaves it to the server.
    pub heartbeat: Option<u16>,
    /// How the connection calls itself in the server's lists.
    pub name: Option<String>,
    /// For each attempt to connect, handshake included.
    pub connect_timeout: Duration,
    /// For each request.
    pub rpc_timeout: Duration,
    /// Bytes that may wait to be sent before publishing has to; it goes on at half of that. One message more may be queued.
    pub high_water: usize,
    /// How long the server may take no bytes before it counts as dead; at least two heartbeats.
    pub write_stall: Duration,
}

impl Default for Options {
    /// The server's heartbeat, no name, 10 s to connect, 30 s for a request, 1 MiB, 30 s.
    fn default() -> Self {
        Self {
            heartbeat: None,
            name: None,
            connect_timeout: Duration::from_secs(10),
            rpc_timeout: Duration::from_secs(30),
            high_water: 1 << 20,
            write_stall: Duration::from_secs(30),
        }
    }
}
