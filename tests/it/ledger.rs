//! What a producer was told and what a consumer has seen, while something between them breaks.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use amqp::client::{Connection, Consumer, Error, Message, PublisherOptions};
use amqp::wire::Properties;
use kernel::{Task, spawn};

/// The invariant: what was confirmed is consumed at least once, what was not is reported, every future resolves.
#[derive(Default)]
pub(crate) struct Ledger {
    published: Cell<u32>,
    confirmed: RefCell<BTreeSet<u32>>,
    /// Taken back by the broker, which could not store them.
    nacked: Cell<u32>,
    unconfirmed: Cell<u32>,
    seen: RefCell<BTreeMap<u32, u32>>,
}

/// Publishes one message after the other until it is stopped.
pub(crate) struct Producer {
    task: Task<Result<(), Error>>,
    is_stopped: Rc<Cell<bool>>,
}

impl Ledger {
    /// How many messages were confirmed.
    pub(crate) fn confirmed(&self) -> usize {
        self.confirmed.borrow().len()
    }

    /// How many different messages were seen.
    pub(crate) fn seen(&self) -> usize {
        self.seen.borrow().len()
    }

    /// Waits until so many more have been confirmed, and so many more seen.
    pub(crate) async fn goes_on(&self, by: usize) -> Result<(), Error> {
        let (confirmed, seen) = (self.confirmed() + by, self.seen() + by);
        while self.confirmed() < confirmed || self.seen() < seen {
            kernel::sleep(Duration::from_millis(5)).await?;
        }
        Ok(())
    }

    /// Waits until all that was confirmed has been seen; every publishing has its answer before.
    pub(crate) async fn is_balanced(&self) -> Result<(), Error> {
        self.has_seen_last(usize::MAX).await
    }

    /// As [`is_balanced`](Self::is_balanced), for the last `count` that were confirmed.
    pub(crate) async fn has_seen_last(&self, count: usize) -> Result<(), Error> {
        let reported = self.nacked.get() + self.unconfirmed.get();
        let published = self.published.get() as usize;
        assert_eq!(self.confirmed() + reported as usize, published);
        loop {
            let is_seen = |n: &u32| self.seen.borrow().contains_key(n);
            if self
                .confirmed
                .borrow()
                .iter()
                .rev()
                .take(count)
                .all(is_seen)
            {
                return Ok(());
            }
            kernel::sleep(Duration::from_millis(5)).await?;
        }
    }

    /// Publishings of which it was reported that nobody knows what became of them.
    pub(crate) fn unconfirmed(&self) -> u32 {
        self.unconfirmed.get()
    }
}

impl Producer {
    /// Publishes to a queue, mandatory and persistent, with a window of 50.
    pub(crate) fn start(connection: &Connection, queue: &str, ledger: &Rc<Ledger>) -> Self {
        let is_stopped = Rc::<Cell<bool>>::default();
        let publishing = publish(
            connection.clone(),
            queue.into(),
            Rc::clone(ledger),
            Rc::clone(&is_stopped),
        );
        let task = spawn(publishing);
        Self { task, is_stopped }
    }

    /// Waits until every publishing has its answer.
    pub(crate) async fn stop(self) -> Result<(), Error> {
        self.is_stopped.set(true);
        self.task.join().await.expect("the producer does not panic")
    }
}

async fn publish(
    connection: Connection,
    queue: Rc<str>,
    ledger: Rc<Ledger>,
    is_stopped: Rc<Cell<bool>>,
) -> Result<(), Error> {
    let options = PublisherOptions {
        window: 50,
        ..PublisherOptions::default()
    };
    let mut publisher = connection.publisher(options).await?;
    let mut confirming = Vec::new();
    let mut nacked = 0;
    for n in 0_u32.. {
        if is_stopped.get() {
            break;
        }
        // A quorum queue without a leader takes nothing, and says so at once. A channel of RabbitMQ 3.10 that has met it like that asks the
        // lost leader for ever, and refuses all that follows: another channel finds the new one.
        if std::mem::replace(&mut nacked, ledger.nacked.get()) != ledger.nacked.get() {
            kernel::sleep(Duration::from_millis(100)).await?;
            publisher.close().await?;
            publisher = connection.publisher(options).await?;
        }
        let id = n.to_string();
        let properties = Properties {
            message_id: Some(&id),
            delivery_mode: Some(2),
            ..Properties::default()
        };
        // Now and then one of several frames.
        let mut body = n.to_be_bytes().to_vec();
        body.resize(if n % 50 == 7 { 300_000 } else { 100 }, 0);
        let message = Message::new(&body).key(&queue).properties(&properties);
        let confirm = publisher.publish(message.mandatory()).await?;
        ledger.published.set(n + 1);
        let ledger = Rc::clone(&ledger);
        confirming.push(spawn(async move {
            match confirm.await {
                Ok(()) => {
                    assert!(ledger.confirmed.borrow_mut().insert(n), "{n} twice");
                }
                Err(Error::Unconfirmed(_)) => ledger.unconfirmed.set(ledger.unconfirmed() + 1),
                Err(Error::Nacked) => ledger.nacked.set(ledger.nacked.get() + 1),
                Err(error) => panic!("{n}: {error}"),
            }
        }));
        kernel::yield_now().await?;
    }
    for task in confirming {
        task.join().await.expect("a confirm resolves");
    }
    Ok(())
}

/// Settles whatever comes, and takes note of it.
pub(crate) async fn consume(mut consumer: Consumer, ledger: Rc<Ledger>) -> Result<(), Error> {
    while let Some(delivery) = consumer.next().await? {
        let number = delivery.body()[..4].try_into().expect("four bytes");
        let number = u32::from_be_bytes(number);
        *ledger.seen.borrow_mut().entry(number).or_default() += 1;
        delivery.ack();
    }
    Ok(())
}
