//! What must be safe at the broker before a delivery may be acked: published with confirms, over as many connections as it takes.
//!
//! Publishing here does not fail for want of a connection: it waits for the next one and publishes again, so a reader may see a reply
//! twice, and never none. What the broker refuses for good comes back as a [`Fate`], for the caller to deal with.
//!
//! **One channel for each exchange.** Publishing to an exchange that does not exist closes the channel, and everything that was not
//! confirmed on it is in doubt. Exchanges of strangers (`resp_exchange`) may be gone at any time; each has a channel of its own, so
//! that nothing but messages to the missing exchange can be hurt. The same goes for large bodies: a broker with a lower limit than ours closes
//! the channel that one comes by.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use amqp::client::{Connection, Error as ClientError, Message, Publisher, PublisherOptions};
use amqp::error::ReplyCode;
use amqp::proto::event::{CloseReason, Lost};
use kernel::Interrupt;
use kernel::sync::{Event, Queue};

use crate::topology;

/// Bodies from this size on have a channel of their own.
const LARGE: usize = 1 << 20;
/// Most channels that are kept for exchanges of strangers.
const MAX_CHANNELS: usize = 64;
/// Dead letters are kept that long, and that many.
const DEAD_TTL_MS: i64 = 7 * 24 * 3600 * 1000;
const DEAD_MAX: i64 = 100_000;

/// What became of a message in the end.
#[derive(Debug)]
pub(crate) enum Fate {
    /// The broker has it.
    Taken,
    /// It was mandatory, and no queue takes it.
    Unroutable,
    /// The broker closed the channel because of it, or of another one to the same exchange.
    Refused(CloseReason),
    /// It cannot be put on the wire.
    Unsendable(String),
}

/// Publishes over whatever connection there is.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    link: RefCell<Option<Rc<Link>>>,
    /// Set while there is a connection.
    up: Event,
}

/// What belongs to one connection.
#[derive(Debug)]
struct Link {
    connection: Connection,
    publishers: RefCell<HashMap<String, Rc<Publisher>>>,
    /// Held by whoever opens or declares something, so that a crowd does it once.
    turn: Queue<()>,
    has_ladder: Cell<Option<bool>>,
    has_dead_queue: Cell<bool>,
}

impl Outbox {
    /// There is a connection: those who wait publish over it.
    pub(crate) fn attach(&self, connection: Connection) {
        let turn = Queue::new(Some(1));
        turn.try_put(()).expect("there is room for one");
        *self.link.borrow_mut() = Some(Rc::new(Link {
            connection,
            publishers: RefCell::default(),
            turn,
            has_ladder: Cell::new(None),
            has_dead_queue: Cell::new(false),
        }));
        self.up.set();
    }

    /// The connection is gone, or about to go.
    pub(crate) fn detach(&self) {
        self.up.clear();
        self.link.borrow_mut().take();
    }

    async fn link(&self) -> Result<Rc<Link>, Interrupt> {
        loop {
            self.up.wait().await?;
            if let Some(link) = &*self.link.borrow() {
                return Ok(link.clone());
            }
        }
    }

    /// Publishes until the broker has confirmed or refused it, however many connections are lost meanwhile. `exchange` and `size` (of
    /// the body) are the message's.
    ///
    /// # Errors
    /// The caller's interrupt.
    pub(crate) async fn publish(
        &self,
        exchange: &str,
        size: usize,
        message: Message<'_>,
    ) -> Result<Fate, Interrupt> {
        let large;
        let channel = if size < LARGE {
            exchange
        } else {
            large = format!("{exchange}\0large");
            &large
        };
        let mut pause = Pause::default();
        loop {
            let link = self.link().await?;
            let error = match link.publisher(channel).await {
                Ok(publisher) => match publisher.send(message).await {
                    Ok(()) => return Ok(Fate::Taken),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            match error {
                ClientError::Interrupted(interrupt) => return Err(interrupt),
                ClientError::Returned(_) => return Ok(Fate::Unroutable),
                ClientError::Encode(error) => return Ok(Fate::Unsendable(error.to_string())),
                ClientError::ChannelClosed(reason)
                | ClientError::Unconfirmed(Lost::ChannelClosed(reason)) => {
                    link.forget(channel);
                    return Ok(Fate::Refused(reason));
                }
                error => {
                    log::debug!("publishing again: {error}");
                    if !error.is_connection_gone() {
                        link.forget(channel);
                    }
                }
            }
            pause.wait().await?;
        }
    }

    /// Makes the queue for dead letters, unless it is there.
    ///
    /// # Errors
    /// The caller's interrupt.
    pub(crate) async fn need_dead_queue(&self, queue: &str) -> Result<(), Interrupt> {
        let mut pause = Pause::default();
        loop {
            let link = self.link().await?;
            let turn = link.take_turn().await?;
            if link.has_dead_queue.get() {
                return Ok(());
            }
            match declare_dead(&link.connection, &topology::dead(queue)).await {
                Ok(()) => {
                    link.has_dead_queue.set(true);
                    return Ok(());
                }
                Err(ClientError::Interrupted(interrupt)) => return Err(interrupt),
                Err(error) => log::warn!("cannot make the queue for dead letters: {error}"),
            }
            drop(turn);
            pause.wait().await?;
        }
    }

    /// Makes the ladder that holds delayed messages, unless it is there. `false`: the broker does not let us, delays have to be
    /// waited for here.
    ///
    /// # Errors
    /// The caller's interrupt.
    pub(crate) async fn need_ladder(&self, queue: &str) -> Result<bool, Interrupt> {
        let mut pause = Pause::default();
        loop {
            let link = self.link().await?;
            let turn = link.take_turn().await?;
            if let Some(has_ladder) = link.has_ladder.get() {
                return Ok(has_ladder);
            }
            match declare_ladder(&link.connection, queue).await {
                Ok(()) => link.has_ladder.set(Some(true)),
                Err(ClientError::Interrupted(interrupt)) => return Err(interrupt),
                Err(error) if error.is_connection_gone() => {
                    drop(turn);
                    pause.wait().await?;
                }
                Err(error) => {
                    log::warn!(
                        "delays are kept in memory, the broker refuses the queues for them: {error}"
                    );
                    link.has_ladder.set(Some(false));
                }
            }
        }
    }

    /// Something that was declared has gone meanwhile.
    pub(crate) fn forget_declared(&self) {
        if let Some(link) = &*self.link.borrow() {
            link.has_dead_queue.set(false);
            link.has_ladder.set(None);
        }
    }
}

impl Link {
    /// The publisher of a channel, which is opened if there is none.
    async fn publisher(&self, channel: &str) -> Result<Rc<Publisher>, ClientError> {
        let known = |link: &Self| link.publishers.borrow().get(channel).cloned();
        if let Some(publisher) = known(self) {
            return Ok(publisher);
        }
        let _turn = self.take_turn().await?;
        if let Some(publisher) = known(self) {
            return Ok(publisher);
        }
        let publisher = self.connection.publisher(PublisherOptions::default());
        let publisher = Rc::new(publisher.await?);
        let mut publishers = self.publishers.borrow_mut();
        if publishers.len() >= MAX_CHANNELS {
            // Whoever waits for a confirm holds its publisher too.
            publishers.retain(|name, _| name.is_empty());
        }
        publishers.insert(channel.to_owned(), publisher.clone());
        Ok(publisher)
    }

    fn forget(&self, channel: &str) {
        self.publishers.borrow_mut().remove(channel);
    }

    async fn take_turn(&self) -> Result<Turn<'_>, Interrupt> {
        match self.turn.get().await {
            Ok(()) => Ok(Turn(&self.turn)),
            Err(error) => Err(kernel::MaybeInterrupt::interrupt(&error)
                .cloned()
                .unwrap_or_else(Interrupt::cancelled)),
        }
    }
}

struct Turn<'a>(&'a Queue<()>);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let _ = self.0.try_put(());
    }
}

/// A queue of ours alone, so arguments are safe. One that is there with others is as good.
async fn declare_dead(connection: &Connection, name: &str) -> Result<(), ClientError> {
    let channel = connection.channel().await?;
    let declare = channel
        .queue(name)
        .durable()
        .arg("x-message-ttl", DEAD_TTL_MS)
        .arg("x-max-length", DEAD_MAX)
        .arg("x-overflow", "drop-head");
    match declare.declare().await {
        Err(error) if error.reply_code() == Some(ReplyCode::PRECONDITION_FAILED) => {
            let channel = connection.channel().await?;
            channel.queue(name).passive().declare().await.map(drop)
        }
        declared => declared.map(drop),
    }
}

/// From the bottom to the top, so that what is there is whole below.
async fn declare_ladder(connection: &Connection, queue: &str) -> Result<(), ClientError> {
    let channel = connection.channel().await?;
    let exchange = |name: &str| channel.exchange(name, "topic").durable().declare();
    exchange(topology::OUT).await?;
    for n in 0..topology::LEVELS {
        let (level, below) = (topology::level(n), topology::below(n));
        exchange(&level).await?;
        let ttl = i64::try_from(topology::level_ttl(n)).expect("levels are few");
        let held = channel.queue(&level).durable();
        let held = held
            .arg("x-message-ttl", ttl)
            .arg("x-dead-letter-exchange", below.as_str());
        held.declare().await?;
        let (stay, pass) = (topology::level_pattern(n, 1), topology::level_pattern(n, 0));
        channel.bind_queue(&level, &level, &stay).await?;
        channel.bind_exchange(&below, &level, &pass).await?;
    }
    channel
        .bind_queue(queue, topology::OUT, &topology::out_pattern(queue))
        .await
}

/// Waits that grow: 0.1 s to 10 s, each between half and the whole.
#[derive(Debug)]
pub(crate) struct Pause {
    next: Duration,
    longest: Duration,
}

impl Default for Pause {
    fn default() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(10))
    }
}

impl Pause {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self {
            next: first.min(longest),
            longest,
        }
    }

    /// How long to wait now; the next one is longer.
    pub(crate) fn take(&mut self) -> Duration {
        let now = self.next;
        self.next = (now * 2).min(self.longest);
        now.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    pub(crate) async fn wait(&mut self) -> Result<(), Interrupt> {
        kernel::sleep(self.take()).await.map(drop)
    }
}
