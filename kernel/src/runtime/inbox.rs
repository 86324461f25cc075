//! The inbox: the one way into a kernel from other threads.
//!
//! A foreign thread pushes a [`Note`] and, only if the kernel sleeps in its poll, rings the bell (writes mio's eventfd).
//! Four states say when that is so:
//!
//! ```text
//!               prepare_to_sleep                 push: rings
//!    RUNNING ─────────────────────▶ SLEEPING ──────────────────────▶ NOTIFIED
//!     ▲ │ ▲                          │  │                            ▲ ▲ ▲ │
//!     │ │ └───────── awake ──────────┘  │ push on credit             │ │ │ │
//!     │ │                               ▼                            │ │ │ │
//!     │ │                              OWED ─── ring, push: rings ───┘ │ │ │
//!     │ │                               └──────── awake ───────────────┘ │ │
//!     │ └───────────────────────── push, on credit or not ───────────────┘ │
//!     └─────────────────────────────── take ───────────────────────────────┘
//! ```
//!
//! `NOTIFIED` and `OWED` mean that there are notes, the other two that there are none: pushes and `take` change notes and state together under
//! the lock, and what the kernel does without the lock, to fall asleep and to wake, keeps to its side of that border. So either `prepare_to_sleep` finds
//! `NOTIFIED` and the kernel does not block, or the push finds `SLEEPING` and rings. And as only one
//! takes it out of `SLEEPING`, or out of `OWED`, a sleep costs at most one ring, however many threads push.
//!
//! **A ring on credit.** Who is about to have more notes may push one without ringing, if it promises to ring soon. If the kernel sleeps that leads to
//! `OWED`: there are notes, the kernel sleeps, and somebody owes it a ring. Whoever comes first pays: the debtor, or a push of another thread. If the
//! kernel wakes by itself, there is nothing left to pay. The price is that for the time of the debt the kernel sleeps although there are notes; nobody but the debtor
//! bounds it.
//!
//! A push on credit has more to lose than a push, which changes whatever state there is to the same one: the kernel may fall asleep or wake between its look at the state and
//! its exchange, so it looks again.
//!
//! **Names instead of pointers.** The waker of a task is an integer with 12 bits for its kernel, so inboxes live in a
//! static table and are reused, never freed. An epoch tells one tenant from the next: what was addressed to a kernel that
//! is gone is refused. A bare waker knows no epoch; it may reach a successor, whose task table takes no harm from
//! a word that it did not give out.
//!
//! An inbox has no limit: a note is the answer to something that the kernel started, and losing one would lose a wait. Of the
//! notes that repeat without end, wakes of one task, neighbours are merged.
//!
//! Notes run user code when dropped. It never runs under the lock.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Arc, OnceLock, PoisonError};

use crate::primitives::{AtomicU8, Mutex, MutexGuard, Ordering};

/// What other threads have to say to a kernel.
pub(crate) enum Note {
    /// A waker was called: its word.
    Wake(u64),
    /// The wait was answered from another thread.
    Complete(Ticket),
    /// To be called on the kernel's thread.
    Call(Box<dyn FnOnce() + Send>),
}

/// Names one wait for all time: `serial` tells it from others that used the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    pub(crate) node: u32,
    pub(crate) serial: u64,
}

/// The kernel's side. Dropping it closes the inbox: what is there is dropped, what comes later is refused.
pub(crate) struct InboxOwner {
    id: u16,
    epoch: u64,
    entry: &'static Entry,
}

/// The other threads' side; outlives the kernel without harm.
#[derive(Clone, Copy)]
pub(crate) struct InboxSender {
    epoch: u64,
    entry: &'static Entry,
}

impl InboxOwner {
    /// Takes a free inbox, whose bell is `waker`. `None` if all 4096 are in use.
    pub(crate) fn claim(waker: mio::Waker) -> Option<Self> {
        let id = ids().claim()?;
        let entry = *TABLE[usize::from(id)].get_or_init(|| Box::leak(Box::default()));
        let epoch = entry.0.open(waker);
        Some(Self { id, epoch, entry })
    }

    /// The kernel id, below 4096.
    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    pub(crate) fn sender(&self) -> InboxSender {
        InboxSender {
            epoch: self.epoch,
            entry: self.entry,
        }
    }

    /// Are there notes? One load.
    #[inline]
    pub(crate) fn has_mail(&self) -> bool {
        self.entry.0.has_mail()
    }

    /// Moves all notes to the end of `into`, in the order they came. An empty `into` is swapped, so that
    /// two buffers go round.
    pub(crate) fn take(&self, into: &mut Vec<Note>) {
        self.entry.0.take(into);
    }

    /// From now on a push rings. False: there are notes, do not block.
    pub(crate) fn prepare_to_sleep(&self) -> bool {
        self.entry.0.prepare_to_sleep()
    }

    /// From now on a push need not ring. To be called after every block, whatever ended it.
    pub(crate) fn awake(&self) {
        self.entry.0.awake();
    }
}

impl Drop for InboxOwner {
    fn drop(&mut self) {
        let _orphans = self.entry.0.close();
        ids().release(self.id);
    }
}

impl InboxSender {
    /// False if the kernel is gone; the note has then been dropped.
    pub(crate) fn push(&self, note: Note) -> bool {
        self.entry.0.push(Some(self.epoch), note)
    }

    /// As `push`, but does not ring. True: the kernel sleeps, and the caller owes it a [`ring`](Self::ring).
    pub(crate) fn push_on_credit(&self, note: Note) -> bool {
        self.entry.0.push_on_credit(self.epoch, note)
    }

    /// Pays for a push on credit, if nobody else has.
    pub(crate) fn ring(&self) {
        self.entry.0.ring(self.epoch);
    }

    /// Has `call` called on the kernel's thread, between two tasks.
    pub(crate) fn call(&self, call: impl FnOnce() + Send + 'static) -> bool {
        self.push(Note::Call(Box::new(call)))
    }
}

/// Delivers a waker's word to whichever kernel has this id now, if any.
pub(crate) fn push_wake(kernel_id: u16, word: u64) {
    if let Some(entry) = TABLE.get(usize::from(kernel_id)).and_then(OnceLock::get) {
        entry.0.push(None, Note::Wake(word));
    }
}

/// As many as a waker's word can name.
const KERNELS: usize = 1 << 12;

/// Entries are made when their id is first used, so an unused one costs two words.
static TABLE: [OnceLock<&'static Entry>; KERNELS] = [const { OnceLock::new() }; KERNELS];

static IDS: std::sync::Mutex<Ids> = std::sync::Mutex::new(Ids {
    fresh: 0,
    released: VecDeque::new(),
});

/// Alone on its cache lines, also where the processor fetches them in pairs: kernels do not slow each other down.
#[derive(Default)]
#[repr(align(128))]
struct Entry(Mailbox<mio::Waker>);

/// Hands out ids below `KERNELS`; the one released longest ago comes first, so that stale wakers have time to die.
struct Ids {
    /// Never used so far: this and above.
    fresh: u16,
    released: VecDeque<u16>,
}

impl Ids {
    fn claim(&mut self) -> Option<u16> {
        if let Some(id) = self.released.pop_front() {
            return Some(id);
        }
        let id = self.fresh;
        if usize::from(id) == KERNELS {
            return None;
        }
        self.fresh += 1;
        Some(id)
    }

    fn release(&mut self, id: u16) {
        self.released.push_back(id);
    }
}

/// Wakes a kernel from its sleep; rung in advance, the sleep ends at once.
trait Bell {
    fn ring(&self);
}

impl Bell for mio::Waker {
    fn ring(&self) {
        if let Err(error) = self.wake() {
            log::error!(
                "waking a sleeping kernel: {error}; it sleeps on until something else wakes it"
            );
        }
    }
}

/// The protocol, apart from table and mio so that a model checker can run it.
struct Mailbox<B> {
    /// Written under the lock, but for `RUNNING` ⇄ `SLEEPING` and `OWED` → `NOTIFIED`.
    state: AtomicU8,
    post: Mutex<Post<B>>,
}

struct Post<B> {
    /// Counts tenants.
    epoch: u64,
    /// `None`: closed, and `notes` is empty.
    bell: Option<Arc<B>>,
    notes: Vec<Note>,
}

const RUNNING: u8 = 0;
const SLEEPING: u8 = 1;
const NOTIFIED: u8 = 2;
const OWED: u8 = 3;

impl<B> Default for Mailbox<B> {
    fn default() -> Self {
        Self {
            state: AtomicU8::new(RUNNING),
            post: Mutex::new(Post {
                epoch: 0,
                bell: None,
                notes: Vec::new(),
            }),
        }
    }
}

impl<B: Bell> Mailbox<B> {
    /// Begins an epoch and returns it.
    fn open(&self, bell: B) -> u64 {
        let mut post = self.lock();
        debug_assert!(post.bell.is_none() && post.notes.is_empty());
        post.bell = Some(Arc::new(bell));
        post.epoch += 1;
        post.epoch
    }

    /// Returns what nobody will read. To be dropped by the caller, without locks held.
    fn close(&self) -> (Option<Arc<B>>, Vec<Note>) {
        let mut post = self.lock();
        self.state.store(RUNNING, Ordering::Release);
        (post.bell.take(), mem::take(&mut post.notes))
    }

    /// `epoch`: the tenant that the note is for, `None` for any.
    fn push(&self, epoch: Option<u64>, note: Note) -> bool {
        let Some(post) = self.add(epoch, note) else {
            return false;
        };
        let sleeper = match self.state.swap(NOTIFIED, Ordering::AcqRel) {
            SLEEPING | OWED => post.bell.clone(),
            _ => None,
        };
        // Rung without the lock, which the kernel wants next. Should it close meanwhile, the ring is heard by nobody.
        drop(post);
        if let Some(bell) = sleeper {
            bell.ring();
        }
        true
    }

    /// True: a ring is owed.
    fn push_on_credit(&self, epoch: u64, note: Note) -> bool {
        let Some(_post) = self.add(Some(epoch), note) else {
            return false;
        };
        // Again if the kernel fell asleep or woke in between, for which it needs no lock.
        loop {
            match self.state.load(Ordering::Acquire) {
                SLEEPING if self.exchange(SLEEPING, OWED) => return true,
                RUNNING if self.exchange(RUNNING, NOTIFIED) => return false,
                SLEEPING | RUNNING => {}
                _ => return false, // there were notes: what is `OWED` is somebody else's debt
            }
        }
    }

    fn ring(&self, epoch: u64) {
        let post = self.lock();
        let sleeper = if post.epoch == epoch && self.exchange(OWED, NOTIFIED) {
            post.bell.clone()
        } else {
            None
        };
        drop(post);
        if let Some(bell) = sleeper {
            bell.ring();
        }
    }

    /// The lock, after the note was added under it; the state is for the caller to change.
    fn add(&self, epoch: Option<u64>, note: Note) -> Option<MutexGuard<'_, Post<B>>> {
        let mut post = self.lock();
        if post.bell.is_none() || epoch.is_some_and(|epoch| epoch != post.epoch) {
            drop(post);
            drop(note);
            return None;
        }
        let is_repeated = matches!(
            (&note, post.notes.last()),
            (Note::Wake(word), Some(Note::Wake(last))) if word == last
        );
        if !is_repeated {
            post.notes.push(note);
        }
        Some(post)
    }

    fn take(&self, into: &mut Vec<Note>) {
        let mut post = self.lock();
        if into.is_empty() {
            mem::swap(&mut post.notes, into);
        } else {
            into.append(&mut post.notes);
        }
        // Notes have just been there or the state is RUNNING already: the owner, which calls this, is not asleep.
        self.state.store(RUNNING, Ordering::Release);
    }

    fn has_mail(&self) -> bool {
        matches!(self.state.load(Ordering::Acquire), NOTIFIED | OWED)
    }

    fn prepare_to_sleep(&self) -> bool {
        self.exchange(RUNNING, SLEEPING)
    }

    fn awake(&self) {
        if !self.exchange(SLEEPING, RUNNING) {
            self.exchange(OWED, NOTIFIED);
        }
    }

    fn exchange(&self, from: u8, to: u8) -> bool {
        self.state
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Nothing that runs under the lock leaves a note half written, so poison is no reason to stop.
    fn lock(&self) -> MutexGuard<'_, Post<B>> {
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ids() -> std::sync::MutexGuard<'static, Ids> {
    IDS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[derive(Clone, Default)]
    struct Counter(Arc<AtomicUsize>);

    impl Counter {
        fn rung(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    impl Bell for Counter {
        fn ring(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn answer(node: u32, serial: u64) -> Note {
        Note::Complete(Ticket { node, serial })
    }

    fn wakes(notes: &[Note]) -> Vec<u64> {
        let word = |note: &Note| match note {
            Note::Wake(word) => *word,
            Note::Complete(_) | Note::Call(_) => panic!("only wakes were pushed"),
        };
        notes.iter().map(word).collect()
    }

    /// Accepts: sweepea-defect/S13
    #[test]
    fn a_running_kernel_is_not_rung() {
        let (mailbox, bell) = (Mailbox::default(), Counter::default());
        mailbox.open(bell.clone());
        for word in 0..100 {
            assert!(mailbox.push(None, Note::Wake(word)));
        }
        assert!(mailbox.has_mail());
        assert!(!mailbox.prepare_to_sleep(), "there is mail");
        let mut notes = Vec::new();
        mailbox.take(&mut notes);
        assert_eq!(wakes(&notes), Vec::from_iter(0..100));
        assert!(!mailbox.has_mail());
        assert_eq!(bell.rung(), 0);
    }

    #[test]
    fn a_sleeping_kernel_is_rung_once_and_its_mail_waits() {
        let (mailbox, bell) = (Mailbox::default(), Counter::default());
        mailbox.open(bell.clone());
        for sleep in 1..=3 {
            assert!(mailbox.prepare_to_sleep());
            assert!(!mailbox.has_mail());
            for word in 0..100 {
                mailbox.push(None, Note::Wake(word));
            }
            assert_eq!(bell.rung(), sleep);
            mailbox.awake();
            assert!(mailbox.has_mail());
            mailbox.take(&mut Vec::new());
        }
        // Woken by something else, it needs no bell any more.
        assert!(mailbox.prepare_to_sleep());
        mailbox.awake();
        mailbox.push(None, Note::Wake(0));
        assert_eq!(bell.rung(), 3);
    }

    #[test]
    fn a_push_on_credit_is_silent_until_anybody_rings() {
        let (mailbox, bell) = (Mailbox::default(), Counter::default());
        let epoch = mailbox.open(bell.clone());
        assert!(!mailbox.push_on_credit(epoch, Note::Wake(0)), "it runs");
        assert!(!mailbox.prepare_to_sleep(), "there is mail");
        mailbox.take(&mut Vec::new());

        // Paid by the debtor.
        assert!(mailbox.prepare_to_sleep());
        assert!(mailbox.push_on_credit(epoch, Note::Wake(1)));
        assert!(!mailbox.push_on_credit(epoch, Note::Wake(2)), "owed once");
        assert!(mailbox.has_mail());
        assert_eq!(bell.rung(), 0);
        mailbox.ring(epoch + 1);
        assert_eq!(bell.rung(), 0, "somebody else's ring");
        mailbox.ring(epoch);
        mailbox.ring(epoch);
        assert_eq!(bell.rung(), 1);
        mailbox.awake();
        let mut notes = Vec::new();
        mailbox.take(&mut notes);
        assert_eq!(wakes(&notes), [1, 2]);

        // Paid by another's push.
        assert!(mailbox.prepare_to_sleep());
        assert!(mailbox.push_on_credit(epoch, Note::Wake(1)));
        mailbox.push(None, Note::Wake(2));
        assert_eq!(bell.rung(), 2);
        mailbox.ring(epoch);
        assert_eq!(bell.rung(), 2);
        mailbox.awake();
        mailbox.take(&mut Vec::new());

        // The kernel woke by itself.
        assert!(mailbox.prepare_to_sleep());
        assert!(mailbox.push_on_credit(epoch, Note::Wake(1)));
        mailbox.awake();
        assert!(mailbox.has_mail());
        assert!(!mailbox.prepare_to_sleep());
        mailbox.ring(epoch);
        assert_eq!(bell.rung(), 2);
    }

    #[test]
    fn notes_keep_their_order_and_only_neighbouring_wakes_of_one_task_merge() {
        let mailbox = Mailbox::default();
        mailbox.open(Counter::default());
        for word in [1, 1, 2, 1, 1, 1] {
            assert!(mailbox.push(None, Note::Wake(word)));
        }
        let mut notes = vec![Note::Wake(0)];
        mailbox.take(&mut notes);
        assert_eq!(wakes(&notes), [0, 1, 2, 1]);
    }

    #[test]
    fn two_buffers_go_round() {
        let mailbox = Mailbox::default();
        mailbox.open(Counter::default());
        let mut notes = Vec::new();
        let mut seen = HashSet::new();
        for _ in 0..10 {
            for word in 0..100 {
                mailbox.push(None, Note::Wake(word));
            }
            notes.clear();
            mailbox.take(&mut notes);
            seen.insert(notes.as_ptr());
        }
        assert_eq!(seen.len(), 2);
    }

    #[test]
    fn what_is_addressed_to_a_closed_kernel_does_not_reach_its_successor() {
        let mailbox = Mailbox::default();
        assert!(!mailbox.push(None, Note::Wake(1)), "never opened");
        let first = mailbox.open(Counter::default());
        assert!(mailbox.push(Some(first), answer(1, 1)));
        drop(mailbox.close());
        assert!(!mailbox.push(Some(first), answer(2, 2)));
        assert!(!mailbox.push(None, Note::Wake(1)));

        let second = mailbox.open(Counter::default());
        assert!(!mailbox.has_mail());
        assert!(!mailbox.push(Some(first), answer(3, 3)));
        assert!(mailbox.prepare_to_sleep());
        mailbox.awake();
        assert!(mailbox.push(Some(second), answer(4, 4)));
        let mut notes = Vec::new();
        mailbox.take(&mut notes);
        assert!(matches!(
            notes[..],
            [Note::Complete(Ticket { node: 4, serial: 4 })]
        ));
    }

    /// A captured value that notes, when dropped, whether the lock was free.
    struct Probe(Arc<Mailbox<Counter>>, Arc<AtomicUsize>);

    impl Drop for Probe {
        fn drop(&mut self) {
            assert!(self.0.post.try_lock().is_ok(), "dropped under the lock");
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn notes_are_dropped_outside_the_lock() {
        let mailbox = Arc::new(Mailbox::default());
        let dropped = Arc::new(AtomicUsize::new(0));
        let call = || {
            let probe = Probe(mailbox.clone(), dropped.clone());
            Note::Call(Box::new(move || drop(probe)))
        };
        let epoch = mailbox.open(Counter::default());
        assert!(mailbox.push(Some(epoch), call()));
        drop(mailbox.close());
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
        assert!(!mailbox.push(Some(epoch), call()));
        assert_eq!(dropped.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn ids_are_distinct_bounded_and_reused_oldest_first() {
        let mut ids = Ids {
            fresh: 0,
            released: VecDeque::new(),
        };
        let all: HashSet<_> = std::iter::from_fn(|| ids.claim()).collect();
        assert_eq!(all, HashSet::from_iter(0..4096));
        ids.release(7);
        ids.release(3);
        assert_eq!(
            [ids.claim(), ids.claim(), ids.claim()],
            [Some(7), Some(3), None]
        );
    }

    #[test]
    fn an_inbox_that_was_let_go_is_another_kernels_to_take() {
        for _ in 0..=KERNELS {
            let poll = mio::Poll::new().unwrap();
            let waker = mio::Waker::new(poll.registry(), mio::Token(0)).unwrap();
            assert!(InboxOwner::claim(waker).is_some());
        }
    }

    #[test]
    fn an_integer_waker_reaches_its_kernel_by_id_and_nobody_when_it_is_gone() {
        let poll = mio::Poll::new().unwrap();
        let owner =
            InboxOwner::claim(mio::Waker::new(poll.registry(), mio::Token(0)).unwrap()).unwrap();
        push_wake(owner.id(), 42);
        push_wake(4095, 43);
        push_wake(u16::MAX, 44);
        let mut notes = Vec::new();
        owner.take(&mut notes);
        assert_eq!(wakes(&notes), [42]);
        let sender = owner.sender();
        drop(owner);
        assert!(!sender.push(Note::Wake(45)));
    }

    /// Real threads, real bell. Every fourth push is unhurried enough to find the kernel asleep.
    ///
    /// Accepts: curio-defect/C5
    #[test]
    fn every_note_of_many_threads_arrives_in_the_order_of_its_thread() {
        const THREADS: u32 = 4;
        const NOTES: u64 = 5_000;
        let mut poll = mio::Poll::new().unwrap();
        let owner =
            InboxOwner::claim(mio::Waker::new(poll.registry(), mio::Token(0)).unwrap()).unwrap();
        let sender = owner.sender();
        let called = Arc::new(AtomicUsize::new(0));
        thread::scope(|scope| {
            for node in 0..THREADS {
                let called = called.clone();
                scope.spawn(move || {
                    for serial in 0..NOTES {
                        assert!(sender.push(answer(node, serial)));
                        if serial % 4 == 0 {
                            thread::yield_now();
                        }
                    }
                    let call = move || {
                        called.fetch_add(1, Ordering::SeqCst);
                    };
                    assert!(sender.push(Note::Call(Box::new(call))));
                });
            }
            let mut events = mio::Events::with_capacity(8);
            let mut notes = Vec::new();
            let mut expected = [0; THREADS as usize];
            while called.load(Ordering::SeqCst) < THREADS as usize {
                if owner.prepare_to_sleep() {
                    // A lost wake-up would end here, with nothing in the mailbox to show for the long sleep.
                    poll.poll(&mut events, Some(Duration::from_secs(60)))
                        .unwrap();
                    assert!(!events.is_empty(), "nobody rang");
                }
                owner.awake();
                owner.take(&mut notes);
                for note in notes.drain(..) {
                    match note {
                        Note::Complete(Ticket { node, serial }) => {
                            assert_eq!(serial, expected[node as usize]);
                            expected[node as usize] += 1;
                        }
                        Note::Call(call) => call(),
                        Note::Wake(word) => panic!("nobody pushed {word}"),
                    }
                }
            }
            assert_eq!(expected, [NOTES; THREADS as usize]);
        });
    }

    #[test]
    fn tenants_that_come_and_go_get_their_own_mail_only() {
        let mailbox = Mailbox::default();
        let current = std::sync::Mutex::new(0);
        let (over, pushed, dropped) = (
            AtomicBool::new(false),
            AtomicUsize::new(0),
            Arc::new(AtomicUsize::new(0)),
        );
        let mut arrived = 0;
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::SeqCst) {
                        // Often stale by the time it is used.
                        let epoch = *current.lock().unwrap();
                        thread::yield_now();
                        pushed.fetch_add(1, Ordering::SeqCst);
                        let probe = Counted(dropped.clone());
                        mailbox.push(Some(epoch), answer(0, epoch));
                        mailbox.push(Some(epoch), Note::Call(Box::new(move || drop(probe))));
                    }
                });
            }
            let mut tenant = 0;
            while tenant < 1_000 || arrived < 100 {
                tenant += 1;
                let epoch = mailbox.open(Counter::default());
                assert_eq!(epoch, tenant);
                *current.lock().unwrap() = epoch;
                thread::yield_now();
                let mut notes = Vec::new();
                mailbox.take(&mut notes);
                for note in notes {
                    if let Note::Complete(ticket) = note {
                        assert_eq!(ticket.serial, epoch);
                        arrived += 1;
                    }
                }
                drop(mailbox.close());
            }
            over.store(true, Ordering::SeqCst);
        });
        assert_eq!(
            dropped.load(Ordering::SeqCst),
            pushed.load(Ordering::SeqCst)
        );
    }

    struct Counted(Arc<AtomicUsize>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p sweepea-kernel --lib --release loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::atomic::AtomicUsize;
    use loom::sync::{Arc, Notify};
    use loom::thread;

    use super::*;
    use crate::primitives::models::model;

    /// Remembers one ring, as an eventfd does; loom reports a sleep without one as a deadlock.
    #[derive(Clone)]
    struct Counting {
        eventfd: Arc<Notify>,
        rung: Arc<AtomicUsize>,
    }

    impl Counting {
        fn new() -> Self {
            Self {
                eventfd: Arc::new(Notify::new()),
                rung: Arc::new(AtomicUsize::new(0)),
            }
        }
    }

    impl Bell for Counting {
        fn ring(&self) {
            self.rung.fetch_add(1, Ordering::SeqCst);
            self.eventfd.notify();
        }
    }

    /// The run loop of a kernel that waits for `total` notes; returns how often it slept.
    fn receive(mailbox: &Mailbox<Counting>, bell: &Counting, total: usize) -> usize {
        let (mut notes, mut received, mut sleeps) = (Vec::new(), 0, 0);
        while received < total {
            if mailbox.has_mail() || !mailbox.prepare_to_sleep() {
                mailbox.take(&mut notes);
                assert!(!notes.is_empty(), "mail was announced");
                received += notes.drain(..).count();
            } else {
                sleeps += 1;
                bell.eventfd.wait();
                mailbox.awake();
            }
        }
        sleeps
    }

    #[test]
    fn loom_no_wake_up_is_lost_and_a_sleep_is_rung_at_most_once() {
        model(3, || {
            let mailbox = Arc::new(Mailbox::default());
            let bell = Counting::new();
            let epoch = mailbox.open(bell.clone());
            let producers = [1, 2].map(|node| {
                let mailbox = mailbox.clone();
                thread::spawn(move || {
                    let ticket = Ticket { node, serial: 0 };
                    assert!(mailbox.push(Some(epoch), Note::Complete(ticket)));
                })
            });
            let sleeps = receive(&mailbox, &bell, 2);
            for producer in producers {
                producer.join().unwrap();
            }
            assert!(bell.rung.load(Ordering::SeqCst) <= sleeps);
            assert!(!mailbox.has_mail());
        });
    }

    #[test]
    fn loom_one_thread_pushing_twice_is_heard_twice() {
        model(3, || {
            let mailbox = Arc::new(Mailbox::default());
            let bell = Counting::new();
            mailbox.open(bell.clone());
            let producer = thread::spawn({
                let mailbox = mailbox.clone();
                move || {
                    mailbox.push(None, Note::Wake(1));
                    mailbox.push(None, Note::Wake(2));
                }
            });
            let sleeps = receive(&mailbox, &bell, 2);
            producer.join().unwrap();
            assert!(bell.rung.load(Ordering::SeqCst) <= sleeps);
        });
    }

    #[test]
    fn loom_a_debtor_and_others_wake_a_sleep_at_most_once() {
        model(3, || {
            let mailbox = Arc::new(Mailbox::default());
            let bell = Counting::new();
            let epoch = mailbox.open(bell.clone());
            let debtor = thread::spawn({
                let mailbox = mailbox.clone();
                move || {
                    let owed = [1, 2].map(|word| mailbox.push_on_credit(epoch, Note::Wake(word)));
                    if owed.contains(&true) {
                        mailbox.ring(epoch);
                    }
                }
            });
            let other = thread::spawn({
                let mailbox = mailbox.clone();
                move || mailbox.push(None, Note::Wake(3))
            });
            let sleeps = receive(&mailbox, &bell, 3);
            debtor.join().unwrap();
            other.join().unwrap();
            assert!(bell.rung.load(Ordering::SeqCst) <= sleeps);
            assert!(!mailbox.has_mail());
        });
    }

    /// Counts its drops.
    struct Counted(Arc<AtomicUsize>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn loom_a_late_push_is_dropped_once_and_never_reaches_the_successor() {
        model(3, || {
            let mailbox = Arc::new(Mailbox::default());
            let bell = Counting::new();
            let epoch = mailbox.open(bell.clone());
            let dropped = Arc::new(AtomicUsize::new(0));
            let producer = thread::spawn({
                let (mailbox, counted) = (mailbox.clone(), Counted(dropped.clone()));
                move || mailbox.push(Some(epoch), Note::Call(Box::new(move || drop(counted))))
            });
            // Closed on the way to sleep, the worst moment: the state must not survive.
            let asleep = mailbox.prepare_to_sleep();
            let (_bell, orphans) = mailbox.close();
            let orphaned = orphans.len();
            drop(orphans);

            let successor = Counting::new();
            mailbox.open(successor.clone());
            assert!(mailbox.prepare_to_sleep(), "no mail yet");
            let accepted = producer.join().unwrap();
            assert_eq!(accepted, orphaned == 1);
            assert_eq!(dropped.load(Ordering::SeqCst), 1);
            assert_eq!(successor.rung.load(Ordering::SeqCst), 0);
            assert!(bell.rung.load(Ordering::SeqCst) <= usize::from(asleep));
            mailbox.awake();
            assert!(!mailbox.has_mail());
        });
    }

    /// A task's waker knows no epoch: it may find nobody, or the successor, which then must hear of it.
    #[test]
    fn loom_a_late_wake_is_refused_or_heard_by_the_successor() {
        model(3, || {
            let mailbox = Arc::new(Mailbox::default());
            mailbox.open(Counting::new());
            let waker = thread::spawn({
                let mailbox = mailbox.clone();
                move || mailbox.push(None, Note::Wake(7))
            });
            mailbox.prepare_to_sleep();
            let (_bell, orphans) = mailbox.close();

            let bell = Counting::new();
            mailbox.open(bell.clone());
            let asleep = mailbox.prepare_to_sleep();
            let accepted = waker.join().unwrap();
            assert_eq!(accepted && orphans.is_empty(), mailbox.has_mail());
            let rung = bell.rung.load(Ordering::SeqCst);
            assert_eq!(rung, usize::from(asleep && mailbox.has_mail()));
        });
    }
}
