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
//! `amqp/examples` has whole programs: `publish`, `consume`, `topology`, `rpc` asks and answers, `recovery` shows what [`Connection::events`] tells. Each brings a broker of
//! its own unless it is given an address: `cargo run -p sweepea-amqp --example rpc`.
//!
//! # How it works
//!
//! One task a connection reads and writes the socket. Handles share the protocol's state with it, so what needs no answer (an
//! ack, a publishing) is an ordinary call that leaves bytes behind; the driver sends the bytes of all tasks in one write. What needs an answer is
//! a future. Nothing is locked and nothing copied between tasks; a delivery's body is copied once, out of the read buffer.
//!
//! # When a connection is lost
//!
//! By default it is made again ([`Options::recovery`]), on any of the address's hosts, after waits that grow, and gets back what the lost one had:
//! exchanges, queues and bindings that were declared through it, channels, prefetch, confirm mode, consumers. Handles stay what they are.
//! Meanwhile requests and publishings wait; a request that was under way fails with [`Error::Unanswered`]. A [`Publisher`] publishes again what has no
//! confirm, so that it arrives at least once. [`Connection::events`] tells of all that, and of what could not be made again.
//!
//! Three things a user has to know: a message may come twice; a queue whose name the server chooses has another one afterwards
//! ([`Consumer::queue`], [`ConnectionEvent::Recovered`]); and what was published without confirms may be lost.
//!
//! # TLS, and who we are
//!
//! `amqps://` needs the feature `tls`. The server's certificate must be signed by one of the system's authorities, or of those in a file, and be for the name in the
//! address: `amqps://mq.example/?cacertfile=/etc/our-ca.pem`, with `certfile` and `keyfile` for servers that ask for one of ours.
//! [`Uri`](crate::uri::Uri) has all options; `Options::tls` takes a configuration in place of files.
//!
//! A user and a password log in by PLAIN or AMQPLAIN, whichever the server offers. `auth_mechanism=EXTERNAL` has the certificate say who we are.
//! [`Connection::update_secret`] renews a token that expires.
//!
//! # What holds
//!
//! - Whoever waits is told when the connection or the channel is lost for good, at once and with the reason: requests, confirms, consumers,
//!   publishers that wait for room.
//! - Every request has a deadline ([`Options::rpc_timeout`]). One that is dropped or late is *abandoned*: its answer is taken off in its turn,
//!   and undone where it matters (a consumer is cancelled, a message goes back).
//! - What a server can make grow is bounded: by prefetch, by [`Cap`], by the window of a publisher, by the largest body that is taken.
//! - Publishers wait above [`Options::high_water`], and while the server is short of memory. Acks and heartbeats do not.
//! - A delivery of a lost channel or connection settles to nothing ([`Settled::Stale`]).

mod book;
mod channel;
mod connection;
mod consumer;
mod dial;
mod driver;
mod error;
#[cfg(test)]
mod places_tests;
mod policy;
mod publisher;
mod recovery;
#[cfg(test)]
mod recovery_tests;
mod request;
mod shared;
#[cfg(test)]
mod tests;
mod tls;
mod transport;
mod window;

pub use channel::{Channel, DeclareExchange, DeclareQueue, QueueInfo};
pub use connection::{Closed, Connection, ConnectionEvent, Events, connect, connect_to};
pub use consumer::{Cap, Consume, Consumer, Delivery, Settled};
pub use error::{Busy, Error, Returned};
pub use publisher::{Confirm, Message, MessageProps, Publisher, PublisherOptions};
#[cfg(feature = "tls")]
pub use tls::Tls;

use std::time::Duration;

/// How a connection behaves. What the address says goes first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Seconds between heartbeats, 0 for none; `None` leaves it to the server.
    ///
    /// They leave from the kernel's own thread, so no task may keep that for longer than one interval without a pause: a server that hears nothing for
    /// two closes the connection. [`ConnectionEvent::LoopLag`] warns at a quarter; work that takes long belongs in
    /// [`kernel::run_in_thread`].
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
    /// How long the server lets a delivery go unsettled, its `consumer_timeout`: [`ConnectionEvent::AckDue`] warns when 80 % of that are
    /// over. `None` for no warning.
    pub ack_timeout: Option<Duration>,
    /// How a connection that is lost is made again; `None` if it is not, and everything ends with it.
    pub recovery: Option<Recovery>,
    /// For `amqps://`: whom to trust and what to show, in place of the files that the address names. The name that the server's certificate must
    /// be for is the address's all the same.
    #[cfg(feature = "tls")]
    pub tls: Option<Tls>,
}

/// How a connection that is lost is made again.
///
/// Before each attempt there is a wait, of random length up to a bound that doubles from one to the next. An attempt tries all
/// addresses of all hosts, in random order, and takes at most [`Options::connect_timeout`] for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// The bound of the first wait.
    pub first_wait: Duration,
    /// The largest bound.
    pub max_wait: Duration,
    /// How many attempts in a row may fail before the connection is given up; `None` for any number.
    pub attempts: Option<u32>,
}

impl Default for Recovery {
    /// From 200 ms to 30 s, without an end.
    fn default() -> Self {
        Self {
            first_wait: Duration::from_millis(200),
            max_wait: Duration::from_secs(30),
            attempts: None,
        }
    }
}

impl Default for Options {
    /// The server's heartbeat, no name, 10 s to connect, 30 s for a request, 1 MiB, 30 s, RabbitMQ's 30 minutes to settle, recovery.
    fn default() -> Self {
        Self {
            heartbeat: None,
            name: None,
            connect_timeout: Duration::from_secs(10),
            rpc_timeout: Duration::from_secs(30),
            high_water: 1 << 20,
            write_stall: Duration::from_secs(30),
            ack_timeout: Some(Duration::from_secs(30 * 60)),
            recovery: Some(Recovery::default()),
            #[cfg(feature = "tls")]
            tls: None,
        }
    }
}
