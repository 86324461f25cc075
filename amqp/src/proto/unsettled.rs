//! What waits to be settled: slots numbered by consecutive tags, and on top of them a consumer's acks, merged.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::wire::hot::{Ack, Nack};

/// Values numbered by tags that only ever grow. Taking one is O(1) amortised; a hole costs its place until all before it are gone.
///
/// Serves deliveries (tags given by the broker) and confirms (tags counted by the publisher), on both sides.
#[derive(Clone, Debug)]
pub struct Slots<T> {
    first: u64,
    slots: VecDeque<Option<T>>,
    live: usize,
}

impl<T> Slots<T> {
    /// No slots; the first tag will be 1, as AMQP counts.
    pub fn new() -> Self {
        Self {
            first: 1,
            slots: VecDeque::new(),
            live: 0,
        }
    }

    /// Puts a value under the next tag, and says which that is.
    #[inline]
    pub fn push(&mut self, value: T) -> u64 {
        let tag = self.next_tag();
        self.slots.push_back(Some(value));
        self.live += 1;
        tag
    }

    /// Uses up the next tag without a value: a delivery that needs no ack.
    #[inline]
    pub fn skip(&mut self) -> u64 {
        let tag = self.next_tag();
        if self.slots.is_empty() {
            self.first += 1;
        } else {
            self.slots.push_back(None);
        }
        tag
    }

    /// Takes out one value; `None` if the tag was never given or has been taken.
    #[inline]
    pub fn take(&mut self, tag: u64) -> Option<T> {
        if tag == self.first {
            return self.take_first();
        }
        let index = usize::try_from(tag.checked_sub(self.first)?).ok()?;
        let value = self.slots.get_mut(index)?.take()?;
        self.live -= 1;
        Some(value)
    }

    /// Takes out the oldest value, and the holes behind it.
    #[inline]
    fn take_first(&mut self) -> Option<T> {
        // Never a hole: `take` leaves none in front, and `skip` makes none there.
        let value = self.slots.pop_front()??;
        self.first += 1;
        self.live -= 1;
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            self.first += 1;
        }
        Some(value)
    }

    /// Takes out the first value if its tag is `tag` or less; call until `None` for AMQP's `multiple`.
    #[inline]
    pub fn take_first_through(&mut self, tag: u64) -> Option<(u64, T)> {
        let first = self.first;
        if first > tag {
            return None;
        }
        self.take_first().map(|value| (first, value))
    }

    /// The oldest value.
    #[inline]
    pub fn front(&self) -> Option<(u64, &T)> {
        // `take` never leaves a hole in front, and `skip` never makes one there.
        let value = self.slots.front()?.as_ref()?;
        Some((self.first, value))
    }

    /// The value under a tag.
    #[inline]
    pub fn get_mut(&mut self, tag: u64) -> Option<&mut T> {
        let index = usize::try_from(tag.checked_sub(self.first)?).ok()?;
        self.slots.get_mut(index)?.as_mut()
    }

    /// The tag that comes next.
    #[inline]
    pub fn next_tag(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.live
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// How many slots are held in memory, holes included.
    pub fn held(&self) -> usize {
        self.slots.len()
    }
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// For how long what waits in [`Slots`] has been there, without a note for each: of what came between two looks it is known that it
/// was there at the second.
#[derive(Debug, Default)]
pub(crate) struct Ages {
    /// When all tags below some were there already, oldest first.
    marks: VecDeque<(u64, Instant)>,
}

impl Ages {
    const MOST_MARKS: usize = 64;

    /// To be called from time to time: the oldest tag that waits, if any does, and the one that comes next.
    pub(crate) fn look(&mut self, oldest: Option<u64>, next: u64, now: Instant) {
        let Some(oldest) = oldest else {
            self.marks.clear();
            return;
        };
        if self.marks.back().is_none_or(|&(before, _)| before < next) {
            if self.marks.len() >= Self::MOST_MARKS {
                // Every other one: ages are guessed younger, by twice as much at most.
                let mut keep = false;
                self.marks.retain(|_| {
                    keep = !keep;
                    keep
                });
            }
            self.marks.push_back((next, now));
        }
        while self
            .marks
            .front()
            .is_some_and(|&(before, _)| before <= oldest)
        {
            self.marks.pop_front();
        }
    }

    /// For how long the oldest has been there, at least.
    pub(crate) fn oldest(&self, now: Instant) -> Option<Duration> {
        let &(_, seen) = self.marks.front()?;
        Some(now.saturating_duration_since(seen))
    }

    /// The first tag that has not been there for `limit`, if one before it has.
    #[cfg(feature = "client")]
    pub(crate) fn older_than(&self, limit: Duration, now: Instant) -> Option<u64> {
        let is_old = |&&(_, seen): &&(u64, Instant)| now.saturating_duration_since(seen) >= limit;
        let mark = self.marks.iter().take_while(is_old).last();
        mark.map(|&(before, _)| before)
    }
}

/// What a consumer does with a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settle {
    /// Done; merged with others and sent at the next flush.
    Ack,
    /// Not done; sent at once.
    Nack {
        /// Put it back in its queue rather than drop or dead-letter it.
        requeue: bool,
    },
}

/// The deliveries of a channel that the application has not settled, on the consumer's side.
///
/// Acks wait for [`Unsettled::flush`], which the driver calls once a turn. Those from the oldest delivery on without a hole
/// leave as one `multiple`, the others as singles.
#[derive(Debug, Default)]
pub struct Unsettled {
    /// The last delivery needed no ack. Its tag is the next one, which is perhaps used up.
    last_is_settled: bool,
    /// See [`Unsettled::transactional`].
    is_transactional: bool,
    /// How often the broker has been asked to take everything back, and has not answered.
    recovering: u32,
    slots: Slots<Held>,
    /// Tags of slots that are [`Held::Acked`], in the order of the calls.
    acked: Vec<u64>,
    ages: Ages,
    /// The last that [`Unsettled::overdue`] has told of.
    told: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    ByApp,
    Acked,
}

impl Unsettled {
    /// A delivery has come. `false` if its tag does not follow the last one.
    ///
    /// One that needs no ack may use up its tag or not: RabbitMQ gives a direct reply the tag that the next delivery will have.
    #[must_use]
    #[inline]
    pub fn delivered(&mut self, tag: u64, needs_ack: bool) -> bool {
        if self.last_is_settled && tag == self.slots.next_tag() + 1 {
            self.slots.skip();
        }
        if tag != self.slots.next_tag() {
            return false;
        }
        self.last_is_settled = !needs_ack;
        if needs_ack {
            self.slots.push(Held::ByApp);
        }
        true
    }

    /// Settles one delivery. `false`, and nothing sent, if it is not the application's to settle.
    #[inline]
    pub fn settle(&mut self, tag: u64, how: Settle, channel: u16, out: &mut Vec<u8>) -> bool {
        if self.recovering > 0 {
            return false;
        }
        let Some(held @ Held::ByApp) = self.slots.get_mut(tag) else {
            return false;
        };
        match how {
            Settle::Ack => {
                *held = Held::Acked;
                self.acked.push(tag);
            }
            Settle::Nack { requeue } => {
                self.slots.take(tag);
                let nack = Nack {
                    delivery_tag: tag,
                    multiple: false,
                    requeue,
                };
                nack.put(out, channel);
            }
        }
        true
    }

    /// Whether a flush would send anything.
    pub fn has_acks(&self) -> bool {
        !self.acked.is_empty()
    }

    /// Appends the acks that wait.
    pub fn flush(&mut self, channel: u16, out: &mut Vec<u8>) {
        if self.acked.is_empty() {
            return;
        }
        let mut prefix = 0;
        let mut last = 0;
        while !self.is_transactional
            && let Some((tag, Held::Acked)) = self.slots.front()
        {
            last = tag;
            prefix += 1;
            self.slots.take(tag);
        }
        if prefix > 0 {
            let ack = Ack {
                delivery_tag: last,
                multiple: prefix > 1,
            };
            ack.put(out, channel);
        }
        for tag in self.acked.drain(..) {
            if tag > last && self.slots.take(tag).is_some() {
                let ack = Ack {
                    delivery_tag: tag,
                    multiple: false,
                };
                ack.put(out, channel);
            }
        }
    }

    /// Transactions begin on the channel. A rollback gives tags that are settled here back to the broker, where a `multiple` would
    /// settle them after all: from now on acks leave as singles.
    pub fn transactional(&mut self) {
        self.is_transactional = true;
    }

    /// The broker is asked to take everything back (`basic.recover`), also what comes before its answer: nothing can be settled until then.
    /// The acks that wait have to be flushed before.
    pub fn recovers(&mut self) {
        self.recovering += 1;
    }

    /// The broker has taken everything back: no tag is the application's any more.
    pub fn recovered(&mut self) {
        self.recovering = self.recovering.saturating_sub(1);
        while self.slots.take_first_through(u64::MAX).is_some() {}
    }

    /// A delivery that has been unsettled for `limit` at least, and for how long: the oldest, once. To be asked from time to time: what came
    /// between two calls counts from the second, so that nothing need be noted for a delivery.
    pub fn overdue(&mut self, now: Instant, limit: Duration) -> Option<(u64, Duration)> {
        let oldest = self.slots.front().map(|(tag, _)| tag);
        self.ages.look(oldest, self.slots.next_tag(), now);
        let (oldest, held) = (oldest?, self.ages.oldest(now)?);
        if held < limit || oldest <= self.told {
            return None;
        }
        self.told = oldest;
        Some((oldest, held))
    }

    /// How many deliveries the application, or the next flush, has to settle.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{AnyMethod, Frame, Splitter};

    fn acks(bytes: &[u8]) -> Vec<(u64, bool)> {
        let mut rest = bytes;
        let mut acks = Vec::new();
        while let Some((frame, used)) = Splitter::new().next_frame(rest).unwrap() {
            let Frame::Method {
                class,
                method,
                args,
                ..
            } = frame
            else {
                panic!("{frame:?}")
            };
            match AnyMethod::decode(class, method, args).unwrap() {
                AnyMethod::Ack(ack) => acks.push((ack.delivery_tag, ack.multiple)),
                other => panic!("{other:?}"),
            }
            rest = &rest[used..];
        }
        acks
    }

    fn delivered(n: u64) -> Unsettled {
        let mut unsettled = Unsettled::default();
        for tag in 1..=n {
            assert!(unsettled.delivered(tag, true));
        }
        unsettled
    }

    fn ack_all(unsettled: &mut Unsettled, tags: &[u64]) -> Vec<(u64, bool)> {
        let mut out = Vec::new();
        for &tag in tags {
            assert!(unsettled.settle(tag, Settle::Ack, 1, &mut out));
        }
        assert!(out.is_empty(), "acks wait for the flush");
        unsettled.flush(1, &mut out);
        acks(&out)
    }

    /// Accepts: amqp/R16
    #[test]
    fn acks_without_a_hole_leave_as_one_multiple_and_the_others_as_singles() {
        let mut unsettled = delivered(10);
        assert_eq!(ack_all(&mut unsettled, &[3, 1, 2]), [(3, true)]);
        assert_eq!(ack_all(&mut unsettled, &[4]), [(4, false)]);
        assert_eq!(
            ack_all(&mut unsettled, &[7, 6, 9]),
            [(7, false), (6, false), (9, false)]
        );
        // 5 closes the hole; 6 and 7 are settled already and 8 is not.
        assert_eq!(ack_all(&mut unsettled, &[5]), [(5, false)]);
        assert_eq!(ack_all(&mut unsettled, &[8, 10]), [(10, true)]);
        assert!(unsettled.is_empty());
    }

    /// Accepts: amqp/R16
    #[test]
    fn a_nacked_delivery_is_no_hole_and_an_unknown_tag_sends_nothing() {
        let mut unsettled = delivered(3);
        let mut out = Vec::new();
        assert!(unsettled.settle(2, Settle::Nack { requeue: true }, 1, &mut out));
        out.clear();
        for tag in [0, 2, 4, u64::MAX] {
            assert!(!unsettled.settle(tag, Settle::Ack, 1, &mut out), "{tag}");
            assert!(!unsettled.settle(tag, Settle::Nack { requeue: false }, 1, &mut out));
        }
        assert!(out.is_empty());
        assert_eq!(ack_all(&mut unsettled, &[1, 3]), [(3, true)]);
        assert!(
            !unsettled.settle(3, Settle::Ack, 1, &mut out),
            "acked twice"
        );
    }

    #[test]
    fn deliveries_that_need_no_ack_use_up_tags_but_no_memory() {
        let mut unsettled = Unsettled::default();
        for tag in 1..=100_000 {
            assert!(unsettled.delivered(tag, false));
        }
        assert!(unsettled.delivered(100_001, true));
        assert_eq!(unsettled.slots.held(), 1);
        assert_eq!(ack_all(&mut unsettled, &[100_001]), [(100_001, false)]);
        assert_eq!(unsettled.slots.held(), 0);
    }

    /// As RabbitMQ numbers direct replies, with deliveries and other consumers' deliveries without acks between them.
    #[test]
    fn a_delivery_that_needs_no_ack_may_have_the_tag_of_the_next() {
        let mut unsettled = Unsettled::default();
        for (tag, needs_ack) in [
            (1, false),
            (1, false),
            (1, true),
            (2, false),
            (2, true),
            (3, false),
            (4, false),
            (4, false),
            (5, true),
        ] {
            assert!(unsettled.delivered(tag, needs_ack), "{tag}");
        }
        for tag in [1, 4, 5, 7] {
            assert!(!unsettled.delivered(tag, false), "{tag}");
        }
        assert_eq!(ack_all(&mut unsettled, &[5, 2, 1]), [(5, true)]);
    }

    #[test]
    fn a_tag_that_jumps_or_comes_twice_is_refused() {
        let mut unsettled = delivered(2);
        assert!(!unsettled.delivered(2, true));
        assert!(!unsettled.delivered(1 << 40, true));
        assert!(unsettled.delivered(3, true));
        assert_eq!(ack_all(&mut unsettled, &[1, 2, 3]), [(3, true)]);
    }

    /// Accepts: amqp/R31
    #[test]
    #[expect(
        clippy::disallowed_methods,
        reason = "any instant will do to count from"
    )]
    fn a_delivery_that_is_held_too_long_is_told_of_once_and_nothing_is_noted_for_the_others() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let limit = Duration::from_secs(80);
        let mut unsettled = delivered(3);
        assert_eq!(unsettled.overdue(at(0), limit), None);
        ack_all(&mut unsettled, &[1]);
        assert!(unsettled.delivered(4, true));
        assert_eq!(unsettled.overdue(at(79), limit), None);
        let held = Duration::from_secs(80);
        assert_eq!(unsettled.overdue(at(80), limit), Some((2, held)));
        assert_eq!(unsettled.overdue(at(85), limit), None, "told already");
        ack_all(&mut unsettled, &[2]);
        let held = Duration::from_secs(90);
        assert_eq!(unsettled.overdue(at(90), limit), Some((3, held)));
        ack_all(&mut unsettled, &[3]);
        assert_eq!(unsettled.overdue(at(158), limit), None, "4 was seen at 79");
        let held = Duration::from_secs(80);
        assert_eq!(unsettled.overdue(at(159), limit), Some((4, held)));
        for secs in 160..100_000 {
            assert!(unsettled.delivered(unsettled.slots.next_tag(), true));
            unsettled.overdue(at(secs), limit);
        }
        assert!(unsettled.ages.marks.len() <= Ages::MOST_MARKS);
        unsettled.recovered();
        assert_eq!(unsettled.overdue(at(100_000), limit), None);
        assert!(unsettled.ages.marks.is_empty());
    }

    proptest::proptest! {
        /// Accepts: amqp/R16
        #[test]
        fn the_broker_ends_with_exactly_the_settled_ones_settled(order: Vec<(u8, bool, bool)>) {
            const N: u64 = 40;
            let mut unsettled = delivered(N);
            let mut model: std::collections::BTreeSet<u64> = (1..=N).collect();
            let mut broker = model.clone();
            let mut out = Vec::new();
            for (tag, ack, flush) in order {
                let tag = u64::from(tag) % (N + 2);
                let how = if ack { Settle::Ack } else { Settle::Nack { requeue: true } };
                let ours = unsettled.settle(tag, how, 1, &mut out);
                proptest::prop_assert_eq!(ours, model.remove(&tag));
                if flush {
                    unsettled.flush(1, &mut out);
                }
            }
            unsettled.flush(1, &mut out);
            let mut rest = &out[..];
            while let Some((Frame::Method { class, method, args, .. }, used)) = Splitter::new().next_frame(rest).unwrap() {
                rest = &rest[used..];
                match AnyMethod::decode(class, method, args).unwrap() {
                    AnyMethod::Ack(Ack { delivery_tag, multiple: true }) => broker.retain(|&t| t > delivery_tag),
                    AnyMethod::Ack(Ack { delivery_tag, .. }) | AnyMethod::Nack(Nack { delivery_tag, .. }) => {
                        proptest::prop_assert!(broker.remove(&delivery_tag), "unknown delivery tag {}", delivery_tag);
                    }
                    other => panic!("{other:?}"),
                }
            }
            proptest::prop_assert_eq!(broker, model);
            proptest::prop_assert_eq!(unsettled.len(), unsettled.slots.live);
        }
    }
}
