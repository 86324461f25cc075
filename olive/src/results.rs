//! Replies on their way back: one queue for each client, sorted by correlation id.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use amqp::client::{self, Cap, Connection, Consumer};
use kernel::TaskRef;
use kernel::sync::Queue;

use crate::message::{Heard, Reply};

/// The replies to one client: a queue of its own, which goes with its connection.
#[derive(Debug)]
pub struct Replies {
    queue: String,
    awaited: Rc<Awaited>,
    reader: TaskRef,
}

type Awaited = RefCell<HashMap<String, Rc<Queue<Heard>>>>;

/// Replies that nobody has looked at, before the connection is not read any more.
const CAP: Cap = Cap {
    count: 10_000,
    bytes: 256 << 20,
};

impl Replies {
    /// Declares the queue and starts to read it.
    ///
    /// # Errors
    /// Those of the client.
    pub async fn open(connection: &Connection) -> Result<Self, client::Error> {
        let channel = connection.channel().await?;
        let queue = channel.queue("").exclusive().auto_delete().declare();
        let queue = queue.await?.name;
        let consumer = channel.consume(&queue).no_ack(CAP).start().await?;
        let awaited = Rc::new(Awaited::default());
        let reader = kernel::spawn(read(consumer, awaited.clone()));
        reader.set_name("olive replies");
        Ok(Self {
            queue,
            awaited,
            reader: reader.to_ref(),
        })
    }

    /// The queue, for `reply_to`.
    #[must_use]
    pub fn queue(&self) -> &str {
        &self.queue
    }

    /// Expects replies with this correlation id. To be called before the task is sent, or its reply may be missed.
    #[must_use]
    pub fn expect(&self, correlation_id: &str) -> Expected {
        let heard = Rc::new(Queue::new(None));
        let mut awaited = self.awaited.borrow_mut();
        awaited.insert(correlation_id.to_owned(), heard.clone());
        Expected {
            correlation_id: correlation_id.to_owned(),
            heard,
            awaited: self.awaited.clone(),
        }
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        self.reader.abort();
        close(&self.awaited);
    }
}

async fn read(mut consumer: Consumer, awaited: Rc<Awaited>) {
    while let Ok(Some(mut delivery)) = consumer.next().await {
        let body = delivery.take_body();
        let props = delivery.props();
        let Some(expected) = props.correlation_id() else {
            continue;
        };
        let heard = awaited.borrow().get(expected).cloned();
        let Some(heard) = heard else {
            log::debug!("a reply that nobody waits for: {expected}");
            continue;
        };
        match Reply::decode(&body) {
            Ok(said) => _ = heard.try_put(said),
            Err(why) => log::warn!("{why}"),
        }
    }
    close(&awaited);
}

/// Nothing more will come.
fn close(awaited: &Awaited) {
    for heard in awaited.borrow_mut().drain().map(|(_, heard)| heard) {
        heard.close();
    }
}

/// The replies to one task. Dropping it gives them up.
#[derive(Debug)]
pub struct Expected {
    correlation_id: String,
    heard: Rc<Queue<Heard>>,
    awaited: Rc<Awaited>,
}

impl Expected {
    /// Waits for the next reply; `None` when none can come any more, because the connection is gone.
    ///
    /// Cancellation point: only if there is none. If dropped, no reply is lost.
    ///
    /// # Errors
    /// An interrupt.
    pub async fn next(&self) -> Result<Option<Heard>, kernel::Interrupt> {
        match self.heard.get().await {
            Ok(heard) => Ok(Some(heard)),
            Err(error) => match kernel::MaybeInterrupt::interrupt(&error) {
                Some(interrupt) => Err(interrupt.clone()),
                None => Ok(None),
            },
        }
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.awaited.borrow_mut().remove(&self.correlation_id);
    }
}
