//! One channel of a client: its place in life, who waits for what, its consumers.

use std::collections::VecDeque;

use super::confirms::Confirms;
use super::content::Assembly;
use super::event::{ChannelKey, ConsumerKey, Event, Lost, Outcome, ReqId};
use super::unsettled::Unsettled;

pub(super) struct Channel {
    pub(super) key: ChannelKey,
    pub(super) stage: Stage,
    /// Answers come in the order of the requests, with two exceptions: see [`Channel::next_in_order`].
    pub(super) waiters: VecDeque<Waiter>,
    consumers: Vec<Consumer>,
    /// Where the last consumer tag was found: deliveries come in runs.
    last_found: usize,
    pub(super) assembly: Assembly,
    pub(super) unsettled: Unsettled,
    /// In confirm mode.
    pub(super) confirms: Option<Confirms>,
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
            consumers: Vec::new(),
            last_found: 0,
            assembly: Assembly::new(max_body),
            unsettled: Unsettled::default(),
            confirms: None,
        }
    }

    pub(super) fn takes_requests(&self) -> bool {
        match self.stage {
            Stage::Opening | Stage::Open => true,
            Stage::Closing => false,
        }
    }

    pub(super) fn add_consumer(&mut self, consumer: Consumer) {
        self.consumers.push(consumer);
    }

    #[inline]
    pub(super) fn consumer_by_tag(&mut self, tag: &str) -> Option<&Consumer> {
        if self
            .consumers
            .get(self.last_found)
            .is_none_or(|c| *c.tag != *tag)
        {
            self.last_found = self.consumers.iter().position(|c| *c.tag == *tag)?;
        }
        self.consumers.get(self.last_found)
    }

    pub(super) fn consumer(&mut self, key: ConsumerKey) -> Option<&mut Consumer> {
        self.consumers.iter_mut().find(|c| c.key == key)
    }

    /// Whether there is a consumer of that name, other than one whose cancel is on its way.
    pub(super) fn has_consumer(&self, tag: &str) -> bool {
        let leaves = |c: &Consumer| {
            let mut waiters = self.waiters.iter();
            waiters.any(|w| w.purpose == Purpose::Cancel(c.key))
        };
        self.consumers.iter().any(|c| *c.tag == *tag && !leaves(c))
    }

    pub(super) fn remove_consumer(&mut self, key: ConsumerKey) {
        self.consumers.retain(|c| c.key != key);
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
            let consumer = self.consumers.iter().find(|c| c.key == key);
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
