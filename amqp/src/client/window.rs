//! The publishings of a channel that somebody may want to know about, and what is kept of them.
//!
//! Those without an answer are numbered by the broker's count, and there are never more than the window allows. Each has a place in a table
//! that is used again: the place outlives the answer until the [`Confirm`](super::Confirm) has looked at it, so that one that is
//! kept for long costs its own place and nothing more.
//!
//! Where messages are replayed, the place holds a copy of its own as well, in a buffer that the next message in that place
//! uses again. When the connection is lost, the publishings lose their numbers and wait in the order they had; on the next connection they
//! are published again and numbered anew. Their places, and who waits for them, stay what they were.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::Waker;

use kernel::sync::Event as Flag;

use super::error::{Error, Returned};
use super::publisher::PublisherOptions;
use crate::proto::event::Lost;
use crate::proto::unsettled::Slots;
use crate::wire::Publish;

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
    pub(super) has_room: Flag,
    pub(super) is_idle: Flag,
}

#[derive(Default)]
struct Table {
    by_seq: Slots<u32>,
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

/// A copy of a message: exchange, routing key, properties and body, one behind the other.
#[derive(Default)]
struct Kept {
    text: Vec<u8>,
    exchange_len: u8,
    key_len: u8,
    props_len: usize,
    mandatory: bool,
    immediate: bool,
    /// A body that is sent from the same memory, instead of the one in `text`.
    large: Option<Rc<[u8]>>,
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

    /// Notes a publishing that was given a number, and answers its place.
    pub(super) fn posted(
        &self,
        seq: u64,
        publish: &Publish<'_>,
        props: &[u8],
        body: &[u8],
        large: Option<Rc<[u8]>>,
    ) -> u32 {
        let mut table = self.table.borrow_mut();
        let index = match table.free.pop() {
            Some(index) => index,
            None => {
                table.places.push(Place::default());
                table.places.len() as u32 - 1
            }
        };
        let place = &mut table.places[index as usize];
        place.state = State::Waits(None);
        if self.replays() {
            place.kept.fill(publish, props, body, large);
            let bytes = place.kept.len();
            table.kept_bytes += bytes;
        }
        table.number(seq, index);
        let is_full = self.is_over(&table);
        drop(table);
        self.is_idle.clear();
        if is_full {
            self.has_room.clear();
        }
        index
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
            // What had not been made again yet when the connection was lost once more comes behind.
            let at = table.newly_cut;
            table.cut.insert(at, index);
            table.newly_cut += 1;
        }
    }

    /// A new connection counts from the beginning, and all that was cut is to be published again.
    pub(super) fn renew(&self) {
        let mut table = self.table.borrow_mut();
        table.by_seq = Slots::new();
        table.newly_cut = 0;
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

    fn fill(&mut self, publish: &Publish<'_>, props: &[u8], body: &[u8], large: Option<Rc<[u8]>>) {
        self.text.clear();
        self.text.extend_from_slice(publish.exchange.as_bytes());
        self.text.extend_from_slice(publish.routing_key.as_bytes());
        self.text.extend_from_slice(props);
        if large.is_none() {
            self.text.extend_from_slice(body);
        }
        // It has been published, so both are short strings.
        self.exchange_len = publish.exchange.len() as u8;
        self.key_len = publish.routing_key.len() as u8;
        self.props_len = props.len();
        (self.mandatory, self.immediate) = (publish.mandatory, publish.immediate);
        self.large = large;
    }

    fn again(&self) -> Again<'_> {
        let (exchange, rest) = self.text.split_at(self.exchange_len.into());
        let (key, rest) = rest.split_at(self.key_len.into());
        let (props, body) = rest.split_at(self.props_len);
        let text = |bytes| std::str::from_utf8(bytes).expect("it was a string when it was kept");
        Again {
            publish: Publish {
                exchange: text(exchange),
                routing_key: text(key),
                mandatory: self.mandatory,
                immediate: self.immediate,
            },
            props,
            body: self.large.as_deref().unwrap_or(body),
            large: self.large.as_ref(),
        }
    }

    fn len(&self) -> usize {
        self.text.len() + self.large.as_ref().map_or(0, |body| body.len())
    }

    fn clear(&mut self) {
        self.text.clear();
        self.text.shrink_to(Self::ROOM);
        self.large = None;
    }
}
