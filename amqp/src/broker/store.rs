//! What outlives the process: the seam for a durable log.
//!
//! Queues themselves always live in memory. A store is told about every persistent message that enters or leaves a durable queue,
//! in the order in which that happens, and about nothing else; it says when what it was told is safe. A publisher's confirm waits for that.

use std::fmt;

use super::queue::Message;

/// Everything a store was told up to some moment. Later moments compare greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(pub u64);

/// A message as a store sees it.
#[derive(Debug)]
pub struct Stored<'a> {
    /// The durable queue it is in.
    pub queue: &'a str,
    /// Its place in that queue; never used twice while the queue lives.
    pub sequence: u64,
    /// The exchange it was published to.
    pub exchange: &'a str,
    /// The key it was published with.
    pub routing_key: &'a str,
    /// Encoded properties: flags and values.
    pub props: &'a [u8],
    /// The body.
    pub body: &'a [u8],
}

impl<'a> Stored<'a> {
    pub(crate) fn new(queue: &'a str, sequence: u64, message: &'a Message) -> Self {
        Self {
            queue,
            sequence,
            exchange: &message.exchange,
            routing_key: &message.routing_key,
            props: message.props().as_bytes(),
            body: message.body(),
        }
    }
}

/// Keeps persistent messages of durable queues.
///
/// The broker calls `append`, `settle` and `forget` as things happen, `mark` once for each stretch of input, and `safe` when it wants to
/// release confirms. None of them may block for long: a store that syncs to disk does so elsewhere and lets `safe` advance.
pub trait Store: fmt::Debug {
    /// A message has entered a queue.
    fn append(&mut self, message: Stored<'_>);

    /// A message has left a queue for good: acknowledged, expired, dropped or dead-lettered.
    fn settle(&mut self, queue: &str, sequence: u64);

    /// A queue is gone with everything in it.
    fn forget(&mut self, queue: &str);

    /// Ends a stretch of calls, and names it.
    fn mark(&mut self) -> Mark;

    /// The last mark whose calls, and all before them, would survive a crash now.
    fn safe(&self) -> Mark;
}

/// The store that keeps nothing: a restart empties the broker.
///
/// It calls everything safe at once, as RabbitMQ does for transient messages: a confirm then means that the queues have the message.
#[derive(Debug, Default)]
pub struct Memory(());

impl Store for Memory {
    fn append(&mut self, _message: Stored<'_>) {}

    fn settle(&mut self, _queue: &str, _sequence: u64) {}

    fn forget(&mut self, _queue: &str) {}

    fn mark(&mut self) -> Mark {
        Mark(0)
    }

    fn safe(&self) -> Mark {
        Mark(0)
    }
}
