//! One channel of a client: its place in life, who waits for what, its consumers.

use std::collections::VecDeque;

use super::confirms::Confirms;
use super::content::Assembly;
use super::event::{ChannelKey, ConsumerKey, Event, Lost, Outcome, ReqId};
use super::unsettled::Unsettled;
use crate::error::EncodeError;
use crate::wire::{Deliver, Publish};

pub(super) struct Channel {
    pub(super) key: ChannelKey,
    pub(super) stage: Stage,
    /// Answers come in the order of the requests, with two exceptions: see [`Channel::next_in_order`].
    pub(super) waiters: VecDeque<Waiter>,
    pub(super) consumers: Consumers,
    pub(super) last_delivered: LastDelivered,
    pub(super) assembly: Assembly,
    pub(super) unsettled: Unsettled,
    /// In confirm mode.
    pub(super) confirms: Option<Confirms>,
    pub(super) last_published: LastPublished,
}

/// Where the last message went, and how that is said: most likely the next goes there, too.
#[derive(Default)]
pub(super) struct LastPublished {
    exchange: String,
    key: String,
    mandatory: bool,
    immediate: bool,
    /// The method's frame; empty if there is none.
    frame: Vec<u8>,
}

impl LastPublished {
    /// The frame of the method that begins a message.
    #[inline]
    pub(super) fn frame(
        &mut self,
        publish: &Publish<'_>,
        channel: u16,
    ) -> Result<&[u8], EncodeError> {
        let is_same = *self.key == *publish.routing_key
            && *self.exchange == *publish.exchange
            && (self.mandatory, self.immediate) == (publish.mandatory, publish.immediate)
            && !self.frame.is_empty();
        if !is_same {
            self.change(publish, channel)?;
        }
        Ok(&self.frame)
    }

    fn change(&mut self, publish: &Publish<'_>, channel: u16) -> Result<(), EncodeError> {
        self.frame.clear();
        publish.put_method_alone(&mut self.frame, channel)?;
        publish.exchange.clone_into(&mut self.exchange);
        publish.routing_key.clone_into(&mut self.key);
        (self.mandatory, self.immediate) = (publish.mandatory, publish.immediate);
        Ok(())
    }
}

/// Exchange and routing key of the last delivery, most likely those of the next.
pub(super) struct LastDelivered {
    pub(super) exchange: String,
    pub(super) key: String,
    /// Both as they came.
    pub(super) names: Vec<u8>,
}

impl LastDelivered {
    /// Two empty names.
    fn none() -> Self {
        Self {
            exchange: String::new(),
            key: String::new(),
            names: vec![0, 0],
        }
    }

    /// Keeps the names of a delivery, and its arguments' bytes.
    pub(super) fn change(&mut self, deliver: &Deliver<'_>, args: &[u8]) {
        deliver.exchange.clone_into(&mut self.exchange);
        deliver.routing_key.clone_into(&mut self.key);
        self.names.clear();
        self.names.extend_from_slice(Deliver::names(args));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// `channel.open` has been sent. Requests may follow it at once.
    Opening,
    Open,
    /// `channel.close` has been sent. Whatever still comes was sent before the peer read it.
    Closing,
}

pub(super) struct Waiter {
    pub(super) n: u64,
    /// Class, and the one or two methods that answer.
    pub(super) reply: (u16, [u16; 2]),
    pub(super) purpose: Purpose,
    /// Nobody is interested any more; the answer has to be consumed all the same.
    pub(super) abandoned: bool,
}

/// What an answer means for the channel itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Open,
    Close,
    Consume(ConsumerKey),
    Cancel(ConsumerKey),
    Get { no_ack: bool },
    Recover,
    Other,
}

pub(super) struct Consumer {
    pub(super) key: ConsumerKey,
    pub(super) tag: Box<str>,
    pub(super) no_ack: bool,
    /// Given up before it was there: what comes for it goes back to the queue.
    pub(super) abandoned: bool,
}

impl Channel {
    pub(super) fn new(key: ChannelKey, max_body: u64) -> Self {
        Self {
            key,
            stage: Stage::Opening,
            waiters: VecDeque::new(),
            consumers: Consumers::default(),
            last_delivered: LastDelivered::none(),
            assembly: Assembly::new(max_body),
            unsettled: Unsettled::default(),
            confirms: None,
            last_published: LastPublished::default(),
        }
    }

    pub(super) fn takes_requests(&self) -> bool {
        match self.stage {
            Stage::Opening | Stage::Open => true,
            Stage::Closing => false,
        }
    }

    pub(super) fn add_consumer(&mut self, consumer: Consumer) {
        self.consumers.list.push(consumer);
    }

    pub(super) fn consumer(&mut self, key: ConsumerKey) -> Option<&mut Consumer> {
        self.consumers.list.iter_mut().find(|c| c.key == key)
    }

    /// Whether there is a consumer of that name, other than one whose cancel is on its way.
    pub(super) fn has_consumer(&self, tag: &str) -> bool {
        let leaves = |c: &Consumer| {
            let mut waiters = self.waiters.iter();
            waiters.any(|w| w.purpose == Purpose::Cancel(c.key))
        };
        self.consumers
            .list
            .iter()
            .any(|c| *c.tag == *tag && !leaves(c))
    }

    pub(super) fn remove_consumer(&mut self, key: ConsumerKey) {
        self.consumers.list.retain(|c| c.key != key);
    }

    /// Where the request waits that is answered next, of those that are answered in order.
    ///
    /// `consume-ok` and `cancel-ok` are not: in RabbitMQ they come from the queue's process, by way of the channel's, which may
    /// have answered what was asked after them. They name their consumer.
    pub(super) fn next_in_order(&self) -> usize {
        let overtaken = |w: &&Waiter| matches!(w.purpose, Purpose::Consume(_) | Purpose::Cancel(_));
        self.waiters.iter().take_while(overtaken).count()
    }

    /// Where the request waits that a method with a consumer tag answers.
    pub(super) fn waiter_of_consumer(&self, reply: (u16, u16), tag: &str) -> Option<usize> {
        self.waiters.iter().position(|waiter| {
            let (Purpose::Consume(key) | Purpose::Cancel(key)) = waiter.purpose else {
                return false;
            };
            let consumer = self.consumers.list.iter().find(|c| c.key == key);
            // One that the broker has cancelled meanwhile has no entry any more.
            waiter.reply == (reply.0, [reply.1; 2]) && consumer.is_none_or(|c| *c.tag == *tag)
        })
    }

    pub(super) fn request_id(&self, waiter: &Waiter) -> ReqId {
        ReqId {
            channel: self.key.id,
            n: waiter.n,
        }
    }

    /// Resolves everything that is open on the channel, which is about to go.
    pub(super) fn fail(&mut self, lost: &Lost, sink: &mut dyn FnMut(Event<'_>)) {
        while let Some(waiter) = self.waiters.pop_front() {
            if !waiter.abandoned {
                let id = self.request_id(&waiter);
                let result = Err(lost);
                sink(Event::Reply { id, result });
            }
        }
        let channel = self.key;
        if let Some(confirms) = &mut self.confirms {
            confirms.lost(|seq| {
                let outcome = Outcome::Unconfirmed(lost);
                sink(Event::Confirm {
                    channel,
                    seq,
                    outcome,
                });
            });
        }
    }
}

/// The consumers of a channel.
#[derive(Default)]
pub(super) struct Consumers {
    list: Vec<Consumer>,
    /// Where the last tag was found: deliveries come in runs.
    last_found: usize,
}

impl Consumers {
    #[inline]
    pub(super) fn by_tag(&mut self, tag: &str) -> Option<&Consumer> {
        if self.last().is_none_or(|c| *c.tag != *tag) {
            self.last_found = self.list.iter().position(|c| *c.tag == *tag)?;
        }
        self.last()
    }

    #[inline]
    pub(super) fn last(&self) -> Option<&Consumer> {
        self.list.get(self.last_found)
    }
}
