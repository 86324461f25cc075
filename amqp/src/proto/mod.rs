//! State machines without I/O: bytes and the time in; bytes, events and deadlines out.
//!
//! [`connection::Connection`] is the client's side of a connection. The pieces that a server needs as well stand on their
//! own: [`handshake`], [`content`] (method, header and body to one message), [`unsettled`] (slots numbered by tag) and
//! [`heartbeat`].

pub mod confirms;
pub mod connection;
pub mod content;
pub mod event;
pub mod handshake;
pub mod heartbeat;
pub mod outbox;
pub mod topology;
pub mod unsettled;

mod ask;
mod channel;
mod receive;
#[cfg(test)]
mod tests;
