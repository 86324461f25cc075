//! The transaction of a channel: what it publishes and settles waits for `tx.commit`, or is forgotten by `tx.rollback`.
//!
//! As in RabbitMQ, that is all there is to it. Faults (no such exchange, an unknown tag) are told at once; messages that no queue takes come back
//! with the commit. A commit publishes first and settles then, one queue after the other: whoever looks meanwhile, or after a crash, may find
//! one half. What was settled and rolled back is unsettled again, not delivered again: for that there is `basic.recover`. A new
//! transaction begins with the end of the last.
//!
//! The memory of messages that wait is the broker's like any other's, so it may be what keeps the broker from reading on; then
//! the commit that would free it would never be read. Hence no transaction may hold more than half of what the broker takes.

use std::rc::Rc;

use super::Config;
use super::exchange::QueueId;
use super::fault::Fault;
use super::queue::Message;

/// How a delivery is settled.
#[derive(Clone, Copy, Debug)]
pub(super) enum How {
    Ack,
    Requeue,
    /// To where dead letters of its queue go, if anywhere.
    Drop,
}

/// A message that is routed and not yet in its queues.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) message: Rc<Message>,
    pub(super) queues: Rc<[QueueId]>,
    pub(super) mandatory: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    pub(super) publishings: Vec<Held>,
    /// Delivery tags, in the order in which they were settled.
    pub(super) settled: Vec<(u64, How)>,
    /// No delivery below this tag is left to be settled in this transaction, so `multiple` need not look there again.
    pub(super) settled_below: u64,
    bytes: usize,
}

/// Publishings and settled deliveries together.
const OPERATIONS_MAX: usize = 1 << 16;

impl Transaction {
    pub(super) fn publish(&mut self, held: Held, config: &Config) -> Result<(), Fault> {
        self.check_room()?;
        self.bytes += held.message.size();
        let most = config.memory_high / 2;
        // One message alone is within what the broker takes as a message.
        if self.bytes > most && !self.publishings.is_empty() {
            return Err(Fault::precondition(format_args!(
                "transaction holds more than {most} bytes, commit sooner"
            )));
        }
        self.publishings.push(held);
        Ok(())
    }

    pub(super) fn settle(&mut self, tag: u64, how: How) -> Result<(), Fault> {
        self.check_room()?;
        self.settled.push((tag, how));
        Ok(())
    }

    fn check_room(&self) -> Result<(), Fault> {
        if self.publishings.len() + self.settled.len() < OPERATIONS_MAX {
            return Ok(());
        }
        Err(Fault::precondition(format_args!(
            "transaction has more than {OPERATIONS_MAX} operations, commit sooner"
        )))
    }
}
