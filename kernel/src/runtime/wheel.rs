//! The timer wheel: when does the next wait run out?
//!
//! Nearly every timer of a server is a timeout that is cancelled, so arming and cancelling are what must cost
//! nothing. Curio sorts its near timers into a heap and leaves cancelled ones there; a wheel needs neither
//! comparison nor tombstone. Six levels of 64 slots: a slot of level 0 is one tick wide, a slot of level `n`
//! is as wide as level `n - 1` as a whole. What lies beyond the sixth level (52 days) waits in one overflow list.
//!
//! **Where a timer lies** depends only on its tick and on `elapsed`, the tick up to which the wheel has expired:
//! read both as numbers of six digits in base 64; the highest digit in which they differ is the level, the
//! timer's digit there is the slot. Three things follow, and everything below rests on them:
//!
//! 1. Slots of level `n > 0` in use lie ahead of `elapsed`'s digit, those of level 0 at or ahead of it. Nothing wraps
//!    round, so the earliest slot is the lowest bit of the lowest level in use.
//! 2. Moving `elapsed` up to just before the earliest slot moves no timer.
//! 3. Equal deadlines lie in the same list at any moment. Lists are appended to and cascade in order, so
//!    they come out in the order they were armed.
//!
//! The tick only chooses the slot. Deadlines stay exact: a slot that `now` has reached but not passed gives out only
//! what is due. Nothing is early, and nothing later than it was asked for.
//!
//! **The wheel owns no timers.** They are nodes of the kernel's table, linked through [`Timers`], and have room for two
//! links and nothing else. A list therefore ends, on both sides, in a link that names its slot (`END | slot`):
//! so cancelling the first or last finds the slot.

use std::cell::Cell;

/// No node.
pub(crate) const NIL: u32 = u32::MAX;

/// The `prev` of a node that the wheel has handed out and nobody has linked since.
pub(crate) const DUE: u32 = u32::MAX - 1;

/// A timer that has run out: its deadline and its node. The deadline is here because sorting by what must be looked up in the table takes twice as long.
pub(crate) type Due = (u64, u32);

/// The table whose nodes the wheel links. Indices stay below 2^31.
pub(crate) trait Timers {
    /// When the node is due, in nanoseconds since the kernel's epoch. Constant while it is armed.
    fn deadline(&self, node: u32) -> u64;
    fn prev(&self, node: u32) -> u32;
    fn next(&self, node: u32) -> u32;
    fn set_prev(&mut self, node: u32, to: u32);
    fn set_next(&mut self, node: u32, to: u32);
}

/// See the module's text.
pub(crate) struct Wheel {
    /// The tick up to which everything has been expired; never falls.
    elapsed: u64,
    /// Armed timers.
    len: usize,
    /// The earliest deadline if known. `UNKNOWN` is 0, so `min` keeps it unknown.
    soonest: Cell<u64>,
    /// A bit for each slot that holds timers; the last word is the overflow list's.
    occupied: [u64; LEVELS + 1],
    /// A bit for each slot whose list is not in the order of deadlines. Clear while a slot is empty.
    unsorted: [u64; LEVELS + 1],
    lists: [List; SLOTS + 1],
}

/// First and last node of a slot; meaningless while its occupancy bit is clear.
#[derive(Clone, Copy)]
struct List {
    head: u32,
    tail: u32,
}

impl Wheel {
    pub(crate) fn new() -> Self {
        let empty = List {
            head: NIL,
            tail: NIL,
        };
        Self {
            elapsed: 0,
            len: 0,
            soonest: Cell::new(UNKNOWN),
            occupied: [0; LEVELS + 1],
            unsorted: [0; LEVELS + 1],
            lists: [empty; SLOTS + 1],
        }
    }

    /// Links `node`, which must be in no list. A deadline that has passed comes out at the next `expire`.
    #[inline]
    pub(crate) fn arm<T: Timers>(&mut self, timers: &mut T, node: u32) {
        debug_assert!(node < END, "node {node} is no index");
        let deadline = timers.deadline(node);
        self.len += 1;
        self.soonest.set(self.soonest.get().min(deadline));
        self.link(timers, node, deadline);
    }

    /// Unlinks `node`, which must be armed: neither cancelled nor handed out by `expire` since.
    #[inline]
    pub(crate) fn cancel<T: Timers>(&mut self, timers: &mut T, node: u32) {
        debug_assert!(self.len > 0, "node {node} is not armed");
        if timers.deadline(node) == self.soonest.get() {
            self.soonest.set(UNKNOWN);
        }
        self.unlink(timers, node);
    }

    /// Unlinks all that are due at `now`, marks them as [`DUE`] and appends them to `due`, by deadline, equal ones as they were armed.
    ///
    /// `now` should not fall; if it does, nothing is early.
    pub(crate) fn expire<T: Timers>(&mut self, timers: &mut T, now: u64, due: &mut Vec<Due>) {
        let from = due.len();
        let before = self.elapsed;
        self.elapsed = before.max(now >> TICK_BITS);
        if self.soonest.get() <= now {
            self.soonest.set(UNKNOWN);
        }

        // Everything is relative to `before`. A level below the highest digit that changed has been passed whole.
        // In the level of that digit the slots up to the new digit are reached, and levels above it are untouched.
        let changed = before ^ self.elapsed;
        for level in 0..LEVELS {
            let passed_whole = changed >> (DIGIT_BITS * (level as u32 + 1)) != 0;
            let digit = digit(self.elapsed, level);
            let reached = if passed_whole { !0 } else { !0 >> (63 - digit) };
            let mut slots = self.occupied[level] & reached;
            while slots != 0 {
                let at = slots.trailing_zeros();
                slots &= slots - 1;
                let slot = level * 64 + at as usize;
                if level == 0 && !passed_whole && at == digit {
                    self.drain(timers, slot, now, due);
                } else {
                    self.cascade(timers, slot, now, due);
                }
            }
            if !passed_whole {
                break;
            }
        }
        if changed >> OVERFLOW_BITS != 0 && self.occupied[LEVELS] != 0 {
            self.cascade(timers, SLOTS, now, due);
        }

        // Slots came in order, but a cascaded slot is wide, and one that takes late arrivals holds any past deadline.
        let due = &mut due[from..];
        if !due.is_sorted_by_key(|&(deadline, _)| deadline) {
            due.sort_by_key(|&(deadline, _)| deadline);
        }
    }

    /// The earliest deadline, exactly.
    ///
    /// Costs nothing while the earliest timer stays armed or its slot's list is in order, which timeouts of one
    /// length always are. Otherwise it walks the earliest slot.
    pub(crate) fn next_deadline<T: Timers>(&self, timers: &T) -> Option<u64> {
        let known = self.soonest.get();
        if self.len == 0 || known != UNKNOWN {
            return (self.len != 0).then_some(known);
        }
        let level = self.occupied.iter().position(|&slots| slots != 0)?;
        let at = self.occupied[level].trailing_zeros();
        let mut node = self.lists[level * 64 + at as usize].head;
        let mut soonest = timers.deadline(node);
        if self.unsorted[level] & (1 << at) != 0 {
            while node < END {
                soonest = soonest.min(timers.deadline(node));
                node = timers.next(node);
            }
        }
        self.soonest.set(soonest);
        Some(soonest)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Armed timers.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Appends `node` to the list where it belongs as `elapsed` stands.
    #[inline]
    fn link<T: Timers>(&mut self, timers: &mut T, node: u32, deadline: u64) {
        let slot = self.slot_for(deadline);
        let (level, bit) = (slot / 64, 1 << (slot % 64));
        let end = END | slot as u32;
        let list = &mut self.lists[slot];
        if self.occupied[level] & bit == 0 {
            self.occupied[level] |= bit;
            list.head = node;
            timers.set_prev(node, end);
        } else {
            if deadline < timers.deadline(list.tail) {
                self.unsorted[level] |= bit;
            }
            timers.set_next(list.tail, node);
            timers.set_prev(node, list.tail);
        }
        list.tail = node;
        timers.set_next(node, end);
    }

    // As a call it took half of a cancel's time.
    #[inline(always)]
    fn unlink<T: Timers>(&mut self, timers: &mut T, node: u32) {
        self.len -= 1;
        let (prev, next) = (timers.prev(node), timers.next(node));
        match (prev < END, next < END) {
            (true, true) => {
                timers.set_next(prev, next);
                timers.set_prev(next, prev);
            }
            (true, false) => {
                self.lists[(next ^ END) as usize].tail = prev;
                timers.set_next(prev, next);
            }
            (false, true) => {
                self.lists[(prev ^ END) as usize].head = next;
                timers.set_prev(next, prev);
            }
            (false, false) => self.vacate((prev ^ END) as usize),
        }
    }

    /// Hands out what is due of the slot that `elapsed` stands in; the rest stays where it is.
    fn drain<T: Timers>(&mut self, timers: &mut T, slot: usize, now: u64, due: &mut Vec<Due>) {
        let sorted = self.unsorted[0] & (1 << slot) == 0;
        let mut node = self.lists[slot].head;
        while node < END {
            let next = timers.next(node);
            let deadline = timers.deadline(node);
            if deadline <= now {
                self.unlink(timers, node);
                timers.set_prev(node, DUE);
                due.push((deadline, node));
            } else if sorted {
                break;
            }
            node = next;
        }
    }

    /// Empties a slot: hands out what is due and moves the rest to where it belongs now.
    fn cascade<T: Timers>(&mut self, timers: &mut T, slot: usize, now: u64, due: &mut Vec<Due>) {
        let mut node = self.lists[slot].head;
        self.vacate(slot);
        while node < END {
            let next = timers.next(node);
            let deadline = timers.deadline(node);
            if deadline <= now {
                self.len -= 1;
                timers.set_prev(node, DUE);
                due.push((deadline, node));
            } else {
                self.link(timers, node, deadline);
            }
            node = next;
        }
    }

    #[inline]
    fn vacate(&mut self, slot: usize) {
        let (level, bit) = (slot / 64, 1 << (slot % 64));
        self.occupied[level] &= !bit;
        self.unsorted[level] &= !bit;
    }

    /// Where a deadline belongs as `elapsed` stands. What is already past shares the slot of `elapsed` itself, the
    /// one that every `expire` looks at.
    #[inline]
    fn slot_for(&self, deadline: u64) -> usize {
        let tick = (deadline >> TICK_BITS).max(self.elapsed);
        let differ = tick ^ self.elapsed;
        if differ >> OVERFLOW_BITS != 0 {
            return SLOTS;
        }
        let level = ((differ | 1).ilog2() / DIGIT_BITS) as usize;
        level * 64 + digit(tick, level) as usize
    }
}

/// A tick is 2^16 ns, about 66 us.
const TICK_BITS: u32 = 16;
const DIGIT_BITS: u32 = 6;
const LEVELS: usize = 6;
/// Slots of the levels; the list at this index is the overflow list.
const SLOTS: usize = LEVELS * 64;
/// Ticks that differ above these bits are beyond the levels.
const OVERFLOW_BITS: u32 = DIGIT_BITS * LEVELS as u32;
/// Marks a link that leads out of a list, to the slot in the bits below.
const END: u32 = 1 << 31;
const UNKNOWN: u64 = 0;

#[inline]
fn digit(tick: u64, level: usize) -> u32 {
    (tick >> (DIGIT_BITS * level as u32)) as u32 & 63
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const TICK: u64 = 1 << TICK_BITS;

    /// Deadline, prev, next. Links of an unarmed node are rubbish, as they may be in the kernel's table. And how often a node was looked at or linked.
    #[derive(Default)]
    struct Table(Vec<(u64, u32, u32)>, Cell<usize>);

    impl Table {
        fn count(&self) {
            self.1.set(self.1.get() + 1);
        }
    }

    impl Timers for Table {
        fn deadline(&self, node: u32) -> u64 {
            self.count();
            self.0[node as usize].0
        }
        fn prev(&self, node: u32) -> u32 {
            self.0[node as usize].1
        }
        fn next(&self, node: u32) -> u32 {
            self.0[node as usize].2
        }
        fn set_prev(&mut self, node: u32, to: u32) {
            self.count();
            self.0[node as usize].1 = to;
        }
        fn set_next(&mut self, node: u32, to: u32) {
            self.count();
            self.0[node as usize].2 = to;
        }
    }

    struct Rig {
        table: Table,
        wheel: Wheel,
    }

    impl Rig {
        fn new() -> Self {
            Self {
                table: Table::default(),
                wheel: Wheel::new(),
            }
        }

        fn arm(&mut self, deadline: u64) -> u32 {
            let node = self.table.0.len() as u32;
            self.table.0.push((deadline, NIL, NIL));
            self.wheel.arm(&mut self.table, node);
            self.check();
            node
        }

        fn cancel(&mut self, node: u32) {
            self.wheel.cancel(&mut self.table, node);
            self.table.0[node as usize].1 = NIL;
            self.table.0[node as usize].2 = NIL;
            self.check();
        }

        fn expire(&mut self, now: u64) -> Vec<u32> {
            let mut due = Vec::new();
            self.wheel.expire(&mut self.table, now, &mut due);
            for &(deadline, node) in &due {
                assert_eq!(self.table.deadline(node), deadline);
                assert_eq!(self.table.prev(node), DUE);
            }
            self.check();
            due.into_iter().map(|(_, node)| node).collect()
        }

        fn next_deadline(&self) -> Option<u64> {
            self.wheel.next_deadline(&self.table)
        }

        /// How often `f` looks at a node or links one.
        fn touches<R>(&mut self, f: impl FnOnce(&mut Wheel, &mut Table) -> R) -> usize {
            self.table.1.set(0);
            f(&mut self.wheel, &mut self.table);
            self.table.1.get()
        }

        /// Every armed node is in exactly one list, the one where it belongs; the bits say the truth.
        fn check(&self) {
            let Self { table, wheel } = self;
            let mut seen = 0;
            for slot in 0..=SLOTS {
                let bit = 1 << (slot % 64);
                let unsorted = wheel.unsorted[slot / 64] & bit != 0;
                if wheel.occupied[slot / 64] & bit == 0 {
                    assert!(!unsorted, "slot {slot} is empty and unsorted");
                    continue;
                }
                let end = END | slot as u32;
                let (mut before, mut node) = (end, wheel.lists[slot].head);
                while node != end {
                    let deadline = table.deadline(node);
                    assert_eq!(table.prev(node), before);
                    assert_eq!(wheel.slot_for(deadline), slot, "deadline {deadline}");
                    if !unsorted && before != end {
                        assert!(
                            table.deadline(before) <= deadline,
                            "slot {slot} is unsorted"
                        );
                    }
                    seen += 1;
                    (before, node) = (node, table.next(node));
                }
                assert_eq!(wheel.lists[slot].tail, before);
            }
            assert_eq!(wheel.len(), seen);
            assert_eq!(wheel.is_empty(), seen == 0);
        }
    }

    #[test]
    fn equal_deadlines_come_out_as_they_were_armed_however_far_apart() {
        let mut rig = Rig::new();
        let deadline = 40_000 * TICK + 5;
        let far = rig.arm(deadline);
        rig.arm(39_000 * TICK);
        rig.expire(39_999 * TICK);
        let near = rig.arm(deadline);
        rig.expire(deadline - 1);
        let last = rig.arm(deadline);
        assert_eq!(rig.expire(deadline), [far, near, last]);
    }

    /// What makes a wheel worth its code: what is not due costs nothing.
    #[test]
    fn only_what_comes_out_is_touched() {
        let mut rig = Rig::new();
        let spans = (0..=LEVELS as u32)
            .flat_map(|level| (1..4).map(move |digit| (digit * TICK) << (DIGIT_BITS * level)));
        let deadlines: Vec<_> = spans.collect();
        for &deadline in deadlines.iter().rev() {
            rig.arm(deadline);
        }
        for &deadline in &deadlines {
            let touches = rig.touches(|wheel, table| {
                let mut due = Vec::new();
                wheel.expire(table, deadline, &mut due);
                assert_eq!(due.len(), 1);
            });
            // Looked at, and marked; the overflow list is looked through as a whole.
            let is_far = deadline >> TICK_BITS >> OVERFLOW_BITS != 0;
            assert!(is_far || touches == 2, "{touches} at {deadline}");
        }
    }

    #[test]
    fn what_is_due_later_in_the_same_slot_is_not_looked_through() {
        let mut rig = Rig::new();
        let nodes: Vec<_> = (0..9).map(|n| rig.arm(5 * TICK + n)).collect();
        for &node in &nodes[..8] {
            let touches = rig.touches(|wheel, table| {
                let mut due = Vec::new();
                wheel.expire(table, table.0[node as usize].0, &mut due);
                assert_eq!(due.len(), 1);
            });
            // Looked at, taken out of the list, marked; and a look at the next.
            assert_eq!(touches, 4);
        }
    }

    #[test]
    fn the_next_deadline_is_one_look_away_while_its_slot_is_in_order() {
        let mut rig = Rig::new();
        let look = |rig: &mut Rig| rig.touches(|wheel, table| wheel.next_deadline(table));
        let deadlines = [0, 1, 1, 2, 3, 4, 5, 6, 7].map(|n| 5 * TICK + n);
        let nodes = deadlines.map(|deadline| rig.arm(deadline));
        assert_eq!(look(&mut rig), 1);
        assert_eq!(look(&mut rig), 0, "known by now");
        rig.cancel(nodes[8]);
        assert_eq!(look(&mut rig), 0, "another one is the earliest");
        assert!(rig.expire(5 * TICK - 1).is_empty());
        assert_eq!(look(&mut rig), 0, "it has not come");
        rig.cancel(nodes[0]);
        assert_eq!(look(&mut rig), 1);
        rig.arm(5 * TICK);
        assert_eq!(look(&mut rig), 0);
        assert_eq!(rig.expire(5 * TICK).len(), 1);
        assert!(look(&mut rig) > 1, "out of order since it came late");
        // A slot that was emptied begins in order again.
        for &node in &nodes[1..8] {
            rig.cancel(node);
        }
        for n in [1, 2, 3] {
            rig.arm(5 * TICK + n);
        }
        assert_eq!(look(&mut rig), 1);
    }

    #[test]
    fn a_deadline_within_the_current_tick_is_kept_to_the_nanosecond() {
        let mut rig = Rig::new();
        let late = rig.arm(7 * TICK + 9);
        let soon = rig.arm(7 * TICK + 8);
        assert!(rig.expire(7 * TICK + 7).is_empty());
        assert_eq!(rig.next_deadline(), Some(7 * TICK + 8));
        assert_eq!(rig.expire(7 * TICK + 8), [soon]);
        assert_eq!(rig.next_deadline(), Some(7 * TICK + 9));
        assert_eq!(rig.expire(7 * TICK + 9), [late]);
    }

    #[test]
    fn a_past_deadline_comes_out_first_at_the_next_expire() {
        let mut rig = Rig::new();
        rig.expire(1_000 * TICK);
        let present = rig.arm(1_000 * TICK);
        let past = rig.arm(3);
        let origin = rig.arm(0);
        assert_eq!(rig.next_deadline(), Some(0));
        assert_eq!(rig.expire(1_000 * TICK), [origin, past, present]);
    }

    #[test]
    fn what_is_due_in_the_first_tick_of_a_round_comes_out_in_its_last() {
        let mut rig = Rig::new();
        let nodes = [0, 1, 62, 63].map(|tick| rig.arm(tick * TICK + 1));
        assert_eq!(rig.expire(63 * TICK + 1), nodes);
    }

    #[test]
    fn a_clock_that_falls_makes_nothing_early() {
        let mut rig = Rig::new();
        rig.expire(1_000 * TICK);
        let node = rig.arm(500 * TICK);
        assert!(rig.expire(400 * TICK).is_empty());
        assert_eq!(rig.expire(500 * TICK), [node]);
    }

    #[test]
    fn the_end_of_time_can_be_armed_and_reached() {
        let mut rig = Rig::new();
        let end = rig.arm(u64::MAX);
        let beyond = rig.arm(TICK << OVERFLOW_BITS);
        assert_eq!(rig.next_deadline(), Some(TICK << OVERFLOW_BITS));
        assert_eq!(rig.expire(u64::MAX - 1), [beyond]);
        assert_eq!(rig.next_deadline(), Some(u64::MAX));
        assert_eq!(rig.expire(u64::MAX), [end]);
        assert_eq!(rig.next_deadline(), None);
    }

    /// Accepts: curio-defect/C9
    #[test]
    fn a_cancelled_timer_leaves_nothing_behind() {
        let mut rig = Rig::new();
        for deadline in [0, TICK, 900_000_000, 1 << 40, u64::MAX] {
            let nodes: Vec<_> = (0..5).map(|_| rig.arm(deadline)).collect();
            for at in [2, 0, 4, 3, 1] {
                rig.cancel(nodes[at]);
            }
            assert!(rig.wheel.is_empty());
            assert_eq!(rig.next_deadline(), None);
        }
        assert_eq!(rig.wheel.occupied, [0; LEVELS + 1]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// Due so much after now.
        Arm(u64),
        /// Due so much before now.
        ArmPast(u64),
        /// Again at the deadline of an armed timer.
        ArmAgain(prop::sample::Index),
        Cancel(prop::sample::Index),
        Advance(u64),
        /// To just so much after the next deadline, as a virtual clock does with 0.
        AdvanceToNext(u64),
    }

    /// Spans of every size: nanoseconds, ticks, every level, overflow.
    fn span() -> impl Strategy<Value = u64> {
        prop_oneof![
            1 => Just(0),
            1 => Just(u64::MAX),
            9 => (0_u32..63).prop_flat_map(|bits| 0..(2_u64 << bits)),
        ]
    }

    fn short_span() -> impl Strategy<Value = u64> {
        (0_u32..40).prop_flat_map(|bits| 0..(2_u64 << bits))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => short_span().prop_map(Step::Arm),
            2 => span().prop_map(Step::Arm),
            1 => span().prop_map(Step::ArmPast),
            3 => any::<prop::sample::Index>().prop_map(Step::ArmAgain),
            4 => any::<prop::sample::Index>().prop_map(Step::Cancel),
            3 => short_span().prop_map(Step::Advance),
            1 => (0_u32..60).prop_flat_map(|bits| 0..(2_u64 << bits)).prop_map(Step::Advance),
            3 => (0_u64..3).prop_map(Step::AdvanceToNext),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Accepts: curio/timequeue/timequeue_expired
        #[test]
        fn the_wheel_does_what_a_sorted_map_does(steps in prop::collection::vec(step(), 1..200), start in span()) {
            let mut rig = Rig::new();
            let mut model = BTreeMap::new();
            let mut now = start / 2;
            rig.expire(now);
            for step in steps {
                match step {
                    Step::Cancel(which) => {
                        if !model.is_empty() {
                            let key = *model.keys().nth(which.index(model.len())).unwrap();
                            rig.cancel(model.remove(&key).unwrap());
                        }
                    }
                    Step::Advance(by) => now = now.saturating_add(by),
                    Step::AdvanceToNext(more) => {
                        if let Some(next) = rig.next_deadline() {
                            now = now.max(next.saturating_add(more));
                        }
                    }
                    Step::Arm(_) | Step::ArmPast(_) | Step::ArmAgain(_) => {
                        let deadline = match step {
                            Step::Arm(after) => now.saturating_add(after),
                            Step::ArmPast(before) => now.saturating_sub(before),
                            Step::ArmAgain(which) if !model.is_empty() => {
                                model.keys().nth(which.index(model.len())).map(|&(deadline, _)| deadline).unwrap()
                            }
                            _ => now,
                        };
                        // Nodes are numbered as they are armed, which makes the number the sequence too.
                        let node = rig.arm(deadline);
                        model.insert((deadline, node), node);
                    }
                }
                if matches!(step, Step::Advance(_) | Step::AdvanceToNext(_)) {
                    let later = match now.checked_add(1) {
                        Some(after) => model.split_off(&(after, 0)),
                        None => BTreeMap::new(),
                    };
                    let expected: Vec<_> = std::mem::replace(&mut model, later).into_values().collect();
                    prop_assert_eq!(rig.expire(now), expected);
                }
                prop_assert_eq!(rig.wheel.len(), model.len());
                // Not after every step, so that it is also asked with nothing cached and several changes behind it.
                if model.len() % 3 != 0 {
                    prop_assert_eq!(rig.next_deadline(), model.keys().next().map(|&(deadline, _)| deadline));
                }
            }
            let rest: Vec<_> = model.into_values().collect();
            prop_assert_eq!(rig.expire(u64::MAX), rest);
            prop_assert!(rig.wheel.is_empty());
        }
    }
}
