//! The publishings of a channel that somebody may want to know about, and what is kept of them.
//!
//! Those without an answer are numbered by the broker's count, and there are never more than the window allows. Each has a place in a table
//! that is used again: the place outlives the answer until the [`Confirm`](super::Confirm) has looked at it, so that one that is
//! kept for long costs its own place and nothing more.
//!
//! Where messages are replayed, the place holds a copy of its own as well, in a buffer that the next message in that place
//! uses again. When the connection is lost, the publishings lose their numbers and wait in the order they had; on the next connection they
//! are published again and numbered anew. Their places, and who waits for them, stay what they were.
//!
//! How long the answers take is looked at from time to time, so that nothing need be noted for a message.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::Waker;
use std::time::{Duration, Instant};

use kernel::sync::Event as Flag;

use super::error::{Error, Returned};
use super::publisher::PublisherOptions;
use crate::proto::event::Lost;
use crate::proto::unsettled::{Ages, Slots};
use crate::wire::{ContentHeader, Frame, Publish, Splitter};

/// What became of a publishing.
pub(super) enum Verdict {
    Confirmed,
    Nacked,
    Returned(Box<Returned>),
    Lost(Box<Lost>),
    /// It could not be published again.
    Refused(Box<Error>),
}

pub(super) struct Window {
    table: RefCell<Table>,
    limit: usize,
    /// How many bytes are kept for replay; `None` if there is none.
    replay_bytes: Option<usize>,
    /// How long an answer may take.
    patience: Duration,
    pub(super) has_room: Flag,
    pub(super) is_idle: Flag,
}

#[derive(Default)]
struct Table {
    by_seq: Slots<u32>,
    ages: Ages,
    /// Places of publishings that a lost connection owes an answer, oldest first.
    cut: VecDeque<u32>,
    /// How many of these the connection lost last has left behind.
    newly_cut: usize,
    places: Vec<Place>,
    free: Vec<u32>,
    kept_bytes: usize,
}

#[derive(Default)]
struct Place {
    state: State,
    kept: Kept,
}

#[derive(Default)]
enum State {
    #[default]
    Free,
    /// No answer yet; who waits for it.
    Waits(Option<Waker>),
    Answered(Verdict),
    /// No answer yet, and nobody wants it.
    Forgotten,
}

/// A copy of a message, as it went on the wire.
#[derive(Default)]
pub(super) struct Kept {
    /// Its frames; of a large message all but those of the body.
    pub(super) frames: Vec<u8>,
    /// A body that is sent from the same memory.
    pub(super) large: Option<Rc<[u8]>>,
}

/// A message that was kept, as it was published.
pub(super) struct Again<'a> {
    pub(super) publish: Publish<'a>,
    pub(super) props: &'a [u8],
    pub(super) body: &'a [u8],
    pub(super) large: Option<&'a Rc<[u8]>>,
}

impl Window {
    pub(super) fn new(options: PublisherOptions, recovers: bool) -> Self {
        let (has_room, is_idle) = (Flag::new(), Flag::new());
        has_room.set();
        is_idle.set();
        Self {
            table: RefCell::default(),
            limit: options.window.max(1),
            replay_bytes: (recovers && options.replay).then_some(options.replay_bytes),
            patience: options.confirm_timeout,
            has_room,
            is_idle,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        !self.has_room.is_set()
    }

    pub(super) fn unconfirmed(&self) -> usize {
        self.table.borrow().unconfirmed()
    }

    /// How many publishings of a lost connection have not been made again.
    pub(super) fn to_be_replayed(&self) -> usize {
        self.table.borrow().cut.len()
    }

    pub(super) fn replays(&self) -> bool {
        self.replay_bytes.is_some()
    }

    /// Publishes something, and notes by the number it is given that it has no answer. What is needed to publish it again goes where `publish` is
    /// told. Answers its place.
    #[inline]
    pub(super) fn post<E>(
        &self,
        publish: impl FnOnce(Option<&mut Kept>) -> Result<u64, E>,
    ) -> Result<u32, E> {
        let table = &mut *self.table.borrow_mut();
        let index = match table.free.last() {
            Some(&index) => index,
            None => table.add_place(),
        };
        let place = &mut table.places[index as usize];
        let seq = match publish(self.replays().then_some(&mut place.kept)) {
            Ok(seq) => seq,
            Err(error) => {
                place.kept.clear();
                return Err(error);
            }
        };
        table.free.pop();
        place.state = State::Waits(None);
        table.kept_bytes += place.kept.len();
        table.number(seq, index);
        self.is_idle.clear();
        if self.is_over(table) {
            self.has_room.clear();
        }
        Ok(index)
    }

    fn is_over(&self, table: &Table) -> bool {
        table.unconfirmed() >= self.limit
            || self
                .replay_bytes
                .is_some_and(|most| table.kept_bytes >= most)
    }

    /// The answer has come. Runs while the protocol is borrowed: whoever waits is the caller's to wake.
    pub(super) fn resolve(&self, seq: u64, verdict: Verdict) -> Option<Waker> {
        let mut table = self.table.borrow_mut();
        let index = table.by_seq.take(seq)?;
        table.answer(index, verdict)
    }

    /// The connection is lost, and with it the answer: the publishing waits to be made again. To be called in the order of the numbers.
    pub(super) fn cut(&self, seq: u64) {
        let mut table = self.table.borrow_mut();
        if let Some(index) = table.by_seq.take(seq) {
            table.cut(index);
        }
    }

    /// A new channel counts from the beginning, and all that was cut is to be published again.
    pub(super) fn renew(&self) {
        let mut table = self.table.borrow_mut();
        table.by_seq = Slots::new();
        table.ages = Ages::default();
        table.newly_cut = 0;
    }

    /// Looks at how long the oldest answer has been waited for; to be called from time to time. Whether that is too long.
    pub(super) fn is_late(&self, now: Instant) -> bool {
        let table = &mut *self.table.borrow_mut();
        let oldest = table.by_seq.front().map(|(seq, _)| seq);
        table.ages.look(oldest, table.by_seq.next_tag(), now);
        let held = table.ages.oldest(now);
        held.is_some_and(|held| held >= self.patience)
    }

    /// That there is no answer proves nothing at this time.
    pub(super) fn forgive(&self) {
        self.table.borrow_mut().ages = Ages::default();
    }

    /// Leaves a channel that does not answer: what has waited too long is resolved, the rest waits to be published again, or is
    /// resolved as well if it cannot be. Answers how many were resolved, and whom to wake.
    pub(super) fn leave(&self, now: Instant) -> (usize, Vec<Waker>) {
        let mut table = self.table.borrow_mut();
        let through = match (self.replays(), table.ages.older_than(self.patience, now)) {
            (true, Some(young)) => young - 1,
            (true, None) => 0,
            (false, _) => u64::MAX,
        };
        let (mut count, mut wakers) = (0, Vec::new());
        while let Some((_, index)) = table.by_seq.take_first_through(through) {
            let verdict = Verdict::Lost(Box::new(Lost::Late(self.patience)));
            wakers.extend(table.answer(index, verdict));
            count += 1;
        }
        while let Some((_, index)) = table.by_seq.take_first_through(u64::MAX) {
            table.cut(index);
        }
        (count, wakers)
    }

    /// The oldest publishing that has to be made again.
    pub(super) fn next_again(&self) -> Option<u32> {
        self.table.borrow().cut.front().copied()
    }

    /// Lends out a message that was kept.
    pub(super) fn with_kept<R>(&self, index: u32, f: impl FnOnce(Again<'_>) -> R) -> R {
        f(self.table.borrow().places[index as usize].kept.again())
    }

    /// The oldest publishing that had to be made again was, by this number.
    pub(super) fn posted_again(&self, seq: u64) {
        let mut table = self.table.borrow_mut();
        if let Some(index) = table.cut.pop_front() {
            table.number(seq, index);
        }
    }

    /// The oldest publishing that has to be made again cannot be.
    pub(super) fn refused_again(&self, error: Error) -> Option<Waker> {
        let mut table = self.table.borrow_mut();
        let index = table.cut.pop_front()?;
        table.answer(index, Verdict::Refused(Box::new(error)))
    }

    /// There will be no other connection. Answers how many publishings are resolved by that, and whom to wake.
    pub(super) fn give_up(&self, lost: &Lost) -> (usize, Vec<Waker>) {
        let mut table = self.table.borrow_mut();
        let cut = std::mem::take(&mut table.cut);
        let verdict = || Verdict::Lost(Box::new(lost.clone()));
        let wakers = cut.iter().filter_map(|&i| table.answer(i, verdict()));
        let wakers = wakers.collect();
        (cut.len(), wakers)
    }

    /// Nobody hears of answers any more: no publishing will have another one than this. Whom to wake.
    pub(super) fn abandon(&self, lost: &Lost) -> Vec<Waker> {
        let (_, mut wakers) = self.give_up(lost);
        let mut table = self.table.borrow_mut();
        while let Some((_, index)) = table.by_seq.take_first_through(u64::MAX) {
            wakers.extend(table.answer(index, Verdict::Lost(Box::new(lost.clone()))));
        }
        wakers
    }

    /// Lets those go on who wait for room, or for the last answer; to be called when answers have come and nothing is borrowed.
    pub(super) fn open(&self) {
        let table = self.table.borrow();
        let (has_room, is_idle) = (!self.is_over(&table), table.unconfirmed() == 0);
        drop(table);
        if has_room {
            self.has_room.set();
        }
        if is_idle {
            self.is_idle.set();
        }
    }

    /// The answer, if it is there, and then its place is free; otherwise `waker` is called when it comes.
    pub(super) fn take(&self, index: u32, waker: &Waker) -> Option<Verdict> {
        let mut table = self.table.borrow_mut();
        let state = &mut table.places[index as usize].state;
        if let State::Waits(waiting) = state {
            let old = waiting.replace(waker.clone());
            drop(table);
            drop(old);
            return None;
        }
        let State::Answered(verdict) = std::mem::take(state) else {
            unreachable!("a place belongs to its confirm until that has the answer");
        };
        table.free.push(index);
        Some(verdict)
    }

    pub(super) fn forget(&self, index: u32) {
        let mut table = self.table.borrow_mut();
        let state = &mut table.places[index as usize].state;
        let old = if let State::Waits(_) = state {
            std::mem::replace(state, State::Forgotten)
        } else {
            let old = std::mem::take(state);
            table.free.push(index);
            old
        };
        drop(table);
        drop(old);
    }
}

impl Table {
    /// A new place, free.
    #[cold]
    fn add_place(&mut self) -> u32 {
        let index = self.places.len() as u32;
        self.places.push(Place::default());
        self.free.push(index);
        index
    }

    /// What had not been made again yet when the channel was lost once more comes behind.
    fn cut(&mut self, index: u32) {
        self.cut.insert(self.newly_cut, index);
        self.newly_cut += 1;
    }

    fn unconfirmed(&self) -> usize {
        self.by_seq.len() + self.cut.len()
    }

    fn number(&mut self, seq: u64, index: u32) {
        // Something published on the channel past the publisher has a number, too.
        while self.by_seq.next_tag() < seq {
            self.by_seq.skip();
        }
        self.by_seq.push(index);
    }

    fn answer(&mut self, index: u32, verdict: Verdict) -> Option<Waker> {
        let place = &mut self.places[index as usize];
        self.kept_bytes -= place.kept.len();
        place.kept.clear();
        match std::mem::replace(&mut place.state, State::Answered(verdict)) {
            State::Waits(waker) => waker,
            State::Forgotten | State::Answered(_) | State::Free => {
                place.state = State::Free;
                self.free.push(index);
                None
            }
        }
    }
}

impl Kept {
    /// A buffer up to this is left to the next message in its place.
    const ROOM: usize = 4 << 10;

    fn again(&self) -> Again<'_> {
        let mut rest = &*self.frames;
        let mut next = || {
            let (frame, used) = Splitter::with_frame_max(usize::MAX)
                .next_frame(rest)
                .ok()??;
            rest = &rest[used..];
            Some(frame)
        };
        let (Some(Frame::Method { args, .. }), Some(Frame::Header { raw, .. })) = (next(), next())
        else {
            unreachable!("it was a message when it was kept");
        };
        let body = match next() {
            Some(Frame::Body { data, .. }) => data,
            _ => &[],
        };
        Again {
            publish: Publish::decode(args).expect("it was good when it was kept"),
            props: ContentHeader::parse(raw).map_or(&[], |header| header.props.as_bytes()),
            body: self.large.as_deref().unwrap_or(body),
            large: self.large.as_ref(),
        }
    }

    fn len(&self) -> usize {
        self.frames.len() + self.large.as_ref().map_or(0, |body| body.len())
    }

    fn clear(&mut self) {
        self.frames.clear();
        self.frames.shrink_to(Self::ROOM);
        self.large = None;
    }
}
