//! AMQP 0-9-1 for the sweepea kernel: framing, protocol, a client and an embedded broker.
//!
//! The layers, lowest first; each knows only those above it in this list:
//!
//! | module | knows | does not know |
//! |---|---|---|
//! | [`wire`] | bytes, frames, methods, properties | what a connection is |
//! | [`proto`] | handshake, channels, contents, acks, confirms, heartbeats | sockets, clocks, tasks |
//! | `client` | how to run `proto` on the kernel (feature `client`) | exchanges, queues |
//! | `broker` | exchanges, queues, sessions (feature `broker`) | the client |
//!
//! `wire` and `proto` are *sans-IO*: bytes and the time come in as arguments; bytes, events and deadlines come out.
//! They build without the kernel (`--no-default-features`), and a test can cut a session at any byte and move the clock at will.
#![forbid(unsafe_code)]

pub mod error;
pub mod proto;
pub mod uri;
pub mod wire;

#[cfg(feature = "broker")]
pub mod broker;
#[cfg(feature = "client")]
pub mod client;
