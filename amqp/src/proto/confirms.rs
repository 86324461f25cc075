//! A publisher's confirms: which publishing an ack, a nack or a return speaks of.
//!
//! Acks come out of order and in bunches, so the waiting are slots numbered by publish sequence, never a queue. A return
//! names no sequence number. RabbitMQ sends it before the publishing's ack, in the order of publishing, with the message's
//! own exchange, key and properties; it belongs to the oldest mandatory publishing in flight that has the same three.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::unsettled::Slots;

/// The publishings of a channel in confirm mode that the broker has not answered.
#[derive(Debug, Default)]
pub struct Confirms {
    slots: Slots<Waits>,
    /// Sequence and fingerprint of the mandatory ones, oldest first; may hold some that are settled.
    mandatory: VecDeque<(u64, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    ForAnswer,
    /// It has come back; the ack that follows is no news.
    ForAckAfterReturn,
}

/// Enough of a message to know it again: where it went and its `message_id`.
pub fn fingerprint(exchange: &str, routing_key: &str, message_id: Option<&str>) -> u64 {
    let mut hasher = DefaultHasher::new();
    (exchange, routing_key, message_id).hash(&mut hasher);
    hasher.finish()
}

impl Confirms {
    /// Counts a publishing, and says its sequence number; the first is 1. `fingerprint` if it is mandatory.
    #[inline]
    pub fn published(&mut self, fingerprint: Option<u64>) -> u64 {
        let seq = self.slots.push(Waits::ForAnswer);
        if let Some(fingerprint) = fingerprint {
            self.mandatory.push_back((seq, fingerprint));
        }
        seq
    }

    /// A message has come back. Answers the sequence number of its publishing, which is thereby resolved.
    pub fn returned(&mut self, fingerprint: u64) -> Option<u64> {
        self.prune();
        let index = self.mandatory.iter().position(|&(seq, print)| {
            print == fingerprint && self.slots.get_mut(seq) == Some(&mut Waits::ForAnswer)
        })?;
        let (seq, _) = self.mandatory.remove(index)?;
        *self.slots.get_mut(seq)? = Waits::ForAckAfterReturn;
        Some(seq)
    }

    /// An ack or nack has come. Calls `resolve` with each sequence number that it resolves, oldest first. An unknown one
    /// resolves nothing; `multiple` with 0 is all.
    #[inline]
    pub fn answered(&mut self, tag: u64, multiple: bool, mut resolve: impl FnMut(u64)) {
        if multiple {
            let through = if tag == 0 { u64::MAX } else { tag };
            while let Some((seq, waits)) = self.slots.take_first_through(through) {
                if waits == Waits::ForAnswer {
                    resolve(seq);
                }
            }
        } else if self.slots.take(tag) == Some(Waits::ForAnswer) {
            resolve(tag);
        }
        self.prune();
    }

    /// The channel is gone. Calls `resolve` with each sequence number still open, and holds none afterwards.
    pub fn lost(&mut self, resolve: impl FnMut(u64)) {
        self.answered(0, true, resolve);
    }

    /// How many publishings have no answer yet.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether all are answered.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Forgets mandatory ones at the front that are settled, so that the list is no longer than the window.
    #[inline]
    fn prune(&mut self) {
        let oldest = self.slots.front().map_or(u64::MAX, |(seq, _)| seq);
        while self.mandatory.front().is_some_and(|&(seq, _)| seq < oldest) {
            self.mandatory.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [u64; 0] = [];

    fn answered(confirms: &mut Confirms, tag: u64, multiple: bool) -> Vec<u64> {
        let mut resolved = Vec::new();
        confirms.answered(tag, multiple, |seq| resolved.push(seq));
        resolved
    }

    /// Accepts: amqp/R17
    #[test]
    fn a_return_resolves_its_own_publishing_however_the_acks_are_ordered() {
        let mut confirms = Confirms::default();
        let print = |id| Some(fingerprint("", "q", Some(id)));
        for id in ["a", "b", "c"] {
            confirms.published(print(id));
        }
        // As RabbitMQ answers three pipelined publishings of which the first and the last cannot be routed.
        assert_eq!(confirms.returned(print("a").unwrap()), Some(1));
        assert_eq!(answered(&mut confirms, 1, false), NONE);
        assert_eq!(confirms.returned(print("c").unwrap()), Some(3));
        assert_eq!(answered(&mut confirms, 3, false), NONE);
        assert_eq!(answered(&mut confirms, 2, false), [2]);
        assert!(confirms.is_empty() && confirms.mandatory.is_empty());
    }

    /// Accepts: amqp/R17
    #[test]
    fn returns_of_messages_alike_resolve_in_the_order_of_publishing() {
        let mut confirms = Confirms::default();
        let print = fingerprint("x", "k", None);
        confirms.published(Some(print));
        confirms.published(None);
        confirms.published(Some(print));
        assert_eq!(confirms.returned(print), Some(1));
        assert_eq!(confirms.returned(print), Some(3));
        assert_eq!(confirms.returned(print), None, "nobody published a third");
        assert_eq!(answered(&mut confirms, 3, true), [2]);
    }

    #[test]
    fn acks_resolve_out_of_order_in_bunches_and_once() {
        let mut confirms = Confirms::default();
        for _ in 0..6 {
            confirms.published(None);
        }
        assert_eq!(answered(&mut confirms, 4, false), [4]);
        assert_eq!(answered(&mut confirms, 5, true), [1, 2, 3, 5]);
        for unknown in [0, 4, 5, 7, u64::MAX] {
            assert_eq!(answered(&mut confirms, unknown, false), NONE, "{unknown}");
        }
        assert_eq!(answered(&mut confirms, 0, true), [6]);
    }

    /// Accepts: amqp/R18
    #[test]
    fn a_lost_channel_resolves_all_that_is_open_and_holds_nothing() {
        let mut confirms = Confirms::default();
        let print = fingerprint("", "q", None);
        for _ in 0..3 {
            confirms.published(Some(print));
        }
        confirms.returned(print);
        let mut lost = Vec::new();
        confirms.lost(|seq| lost.push(seq));
        assert_eq!(lost, [2, 3], "the returned one had its answer");
        assert_eq!(
            (
                confirms.len(),
                confirms.slots.held(),
                confirms.mandatory.len()
            ),
            (0, 0, 0)
        );
    }

    /// Accepts: amqp/R19
    #[test]
    fn a_million_publishings_nobody_waits_for_leave_no_slot() {
        let mut confirms = Confirms::default();
        let print = fingerprint("", "q", None);
        let mut most = 0;
        for n in 1..=1_000_000_u64 {
            confirms.published(Some(print));
            most = most.max(confirms.slots.held() + confirms.mandatory.len());
            if n % 100 == 0 {
                confirms.answered(n, true, |_| {});
            }
        }
        assert_eq!(most, 200);
        assert_eq!((confirms.slots.held(), confirms.mandatory.len()), (0, 0));
    }
}
