//! The board: what other threads may see of a kernel at any time, also while a task spins and the kernel answers nobody.
//!
//! A mirror of the task table in atomics, which the kernel's thread writes after each step and anybody reads. It costs the loop a dozen
//! plain stores a step, no lock, no clock. An entry is guarded by its version (odd while it is written), so a reader never sees half of one task and half of
//! its successor. What a task does is shown as of the end of its last step; only who runs now, in which step, is always of this moment.
//!
//! Rejected: asking the kernel through its inbox, which it reads between steps, so that the one question that matters, "who does not let go?", would
//! go unanswered; a snapshot once in a while, which misses the task that was spawned just before all stood still; a lock round the
//! tables, which every step would pay for.

use std::collections::HashMap;
use std::panic::Location;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam_utils::atomic::AtomicCell;

use super::nodes::WaitKind;
use super::task::BodyRef;

type Place = &'static Location<'static>;

/// Written by one kernel, read by its monitor and its watchdog.
pub(crate) struct Board {
    /// The number of the step that runs (upper half) and the slot of its task plus one; 0 between steps.
    running: AtomicU64,
    /// Chunk n has 64 << n entries, so that entries stay where they are as the table grows.
    chunks: [OnceLock<Box<[Entry]>>; CHUNKS],
    names: Mutex<HashMap<u64, String>>,
    /// Whether anybody wants to know what tasks wait for. The watchdog does not.
    is_detailed: bool,
}

const FIRST_CHUNK: usize = 64;
/// As many as hold 2^28 tasks.
const CHUNKS: usize = 23;

/// A task slot. The id is 0 while no task has it.
#[derive(Default)]
struct Entry {
    version: AtomicU32,
    cycles: AtomicU32,
    id: AtomicU64,
    parent: AtomicU64,
    spawned_at: AtomicCell<Option<Place>>,
    waits_at: AtomicCell<Option<Place>>,
    waits_for: AtomicCell<Option<WaitKind>>,
    marks: AtomicU8,
    others: AtomicU32,
    sleep: AtomicU64,
    timeout: AtomicU64,
}

const _: () = assert!(AtomicCell::<Option<Place>>::is_lock_free());

const READY: u8 = 1;
const CANCELLED: u8 = 2;
/// For a time: none.
const NEVER: u64 = u64::MAX;

/// What the kernel tells of a task after a step. Times are in nanoseconds since the kernel's epoch.
pub(super) struct Report {
    pub(super) is_ready: bool,
    /// The newest of its waits.
    pub(super) wait: Option<(WaitKind, Place)>,
    /// How many more it has.
    pub(super) others: u32,
    /// When the first of its sleeps is over.
    pub(super) sleep: Option<u64>,
    /// When the first of its timeouts is due.
    pub(super) timeout: Option<u64>,
}

/// A task as the board shows it.
#[derive(Clone, Debug)]
pub(crate) struct Posted {
    pub(crate) id: u64,
    pub(crate) slot: u32,
    pub(crate) parent: u64,
    pub(crate) name: Option<String>,
    pub(crate) spawned_at: Place,
    pub(crate) cycles: u32,
    pub(crate) is_ready: bool,
    pub(crate) is_cancelled: bool,
    pub(crate) wait: Option<(WaitKind, Place)>,
    pub(crate) others: u32,
    pub(crate) sleep: Option<u64>,
    pub(crate) timeout: Option<u64>,
}

/// A step that runs now: it is over once the board shows another number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Step {
    bits: u64,
}

impl Step {
    const fn slot(self) -> u32 {
        (self.bits as u32) - 1
    }
}

impl Board {
    pub(crate) fn new(is_detailed: bool) -> Self {
        Self {
            running: AtomicU64::new(0),
            chunks: [const { OnceLock::new() }; CHUNKS],
            names: Mutex::default(),
            is_detailed,
        }
    }

    /// The chunk of a slot, and its place there.
    fn locate(slot: u32) -> (usize, usize) {
        let rank = slot as usize / FIRST_CHUNK + 1;
        let chunk = rank.ilog2() as usize;
        (chunk, slot as usize - FIRST_CHUNK * ((1 << chunk) - 1))
    }

    fn entry(&self, slot: u32) -> Option<&Entry> {
        let (chunk, place) = Self::locate(slot);
        self.chunks.get(chunk)?.get()?.get(place)
    }

    pub(super) fn add(&self, slot: u32, body: &BodyRef) {
        let (chunk, place) = Self::locate(slot);
        let entries = self.chunks[chunk].get_or_init(|| {
            (0..FIRST_CHUNK << chunk)
                .map(|_| Entry::default())
                .collect()
        });
        entries[place].write(|entry| {
            entry.id.store(body.id, Ordering::Relaxed);
            entry.parent.store(body.parent, Ordering::Relaxed);
            entry.spawned_at.store(Some(body.spawned_at));
            entry.cycles.store(0, Ordering::Relaxed);
            entry.marks.store(READY, Ordering::Relaxed);
            entry.waits_for.store(None);
            entry.others.store(0, Ordering::Relaxed);
            entry.sleep.store(NEVER, Ordering::Relaxed);
            entry.timeout.store(NEVER, Ordering::Relaxed);
        });
    }

    pub(super) fn remove(&self, slot: u32) {
        if let Some(entry) = self.entry(slot) {
            entry.write(|entry| entry.id.store(0, Ordering::Relaxed));
        }
    }

    /// A task's step begins; `step` tells it from the one before.
    pub(crate) fn begin(&self, slot: u32, step: u32) {
        let bits = u64::from(step) << 32 | u64::from(slot + 1);
        self.running.store(bits, Ordering::Release);
    }

    /// The step is over.
    pub(crate) fn end(&self) {
        self.running.store(0, Ordering::Release);
    }

    /// Posts what a task does now.
    pub(super) fn post(&self, slot: u32, body: &BodyRef, report: &Report) {
        let Some(entry) = self.entry(slot) else {
            return;
        };
        let mut marks = 0;
        if report.is_ready {
            marks |= READY;
        }
        if body.is_cancelled() {
            marks |= CANCELLED;
        }
        entry.write(|entry| {
            entry.cycles.store(body.cycles.get(), Ordering::Relaxed);
            entry.marks.store(marks, Ordering::Relaxed);
            entry.waits_for.store(report.wait.map(|(kind, _)| kind));
            entry.waits_at.store(report.wait.map(|(_, at)| at));
            entry.others.store(report.others, Ordering::Relaxed);
            entry
                .sleep
                .store(report.sleep.unwrap_or(NEVER), Ordering::Relaxed);
            entry
                .timeout
                .store(report.timeout.unwrap_or(NEVER), Ordering::Relaxed);
        });
    }

    pub(super) const fn is_detailed(&self) -> bool {
        self.is_detailed
    }

    pub(super) fn set_name(&self, id: u64, name: &str) {
        self.names().insert(id, name.to_owned());
    }

    pub(super) fn forget_name(&self, id: u64) {
        self.names().remove(&id);
    }

    /// The step that runs now, if one does.
    pub(crate) fn running(&self) -> Option<Step> {
        let bits = self.running.load(Ordering::Acquire);
        (bits != 0).then_some(Step { bits })
    }

    /// The task of a step, unless that is over.
    pub(crate) fn task_of(&self, step: Step) -> Option<Posted> {
        let posted = self.read(step.slot());
        posted.filter(|_| self.running() == Some(step))
    }

    /// The task with this id.
    pub(crate) fn find(&self, id: u64) -> Option<Posted> {
        self.slots().find_map(|(slot, entry)| {
            let is_it = entry.id.load(Ordering::Relaxed) == id;
            let posted = if is_it { self.read(slot) } else { None };
            posted.filter(|posted| posted.id == id)
        })
    }

    /// Up to `most` tasks by id, from `from` on, and how many more there are.
    pub(crate) fn list(&self, from: u64, most: usize) -> (Vec<Posted>, usize) {
        let ids = self
            .slots()
            .map(|(slot, entry)| (entry.id.load(Ordering::Relaxed), slot));
        let mut ids: Vec<_> = ids.filter(|&(id, _)| id != 0 && id >= from).collect();
        ids.sort_unstable();
        let left = ids.len().saturating_sub(most);
        ids.truncate(most);
        let tasks = ids.into_iter().filter_map(|(_, slot)| self.read(slot));
        (tasks.collect(), left)
    }

    fn slots(&self) -> impl Iterator<Item = (u32, &Entry)> {
        let chunks = self.chunks.iter().map_while(OnceLock::get);
        (0..).zip(chunks.flatten())
    }

    fn read(&self, slot: u32) -> Option<Posted> {
        let mut posted = self.entry(slot)?.read(slot)?;
        posted.name = self.names().get(&posted.id).cloned();
        Some(posted)
    }

    fn names(&self) -> MutexGuard<'_, HashMap<u64, String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// Called by the kernel's thread alone.
    fn write(&self, stores: impl FnOnce(&Self)) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        // Whoever sees one of the stores below sees the odd version too.
        fence(Ordering::Release);
        stores(self);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// What stands there; `None` if no task has the slot.
    fn read(&self, slot: u32) -> Option<Posted> {
        loop {
            let version = self.version.load(Ordering::Acquire);
            if version.is_multiple_of(2) {
                let posted = self.read_once(slot);
                fence(Ordering::Acquire);
                if self.version.load(Ordering::Relaxed) == version {
                    return posted;
                }
            }
            // The writer is between two stores, or was interrupted there by the system.
            std::thread::yield_now();
        }
    }

    fn read_once(&self, slot: u32) -> Option<Posted> {
        let time = |time: &AtomicU64| Some(time.load(Ordering::Relaxed)).filter(|&t| t != NEVER);
        let id = self.id.load(Ordering::Relaxed);
        if id == 0 {
            return None;
        }
        let marks = self.marks.load(Ordering::Relaxed);
        Some(Posted {
            id,
            slot,
            parent: self.parent.load(Ordering::Relaxed),
            name: None,
            spawned_at: self.spawned_at.load()?,
            cycles: self.cycles.load(Ordering::Relaxed),
            is_ready: marks & READY != 0,
            is_cancelled: marks & CANCELLED != 0,
            wait: self.waits_for.load().zip(self.waits_at.load()),
            others: self.others.load(Ordering::Relaxed),
            sleep: time(&self.sleep),
            timeout: time(&self.timeout),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two tasks take turns in one slot, as fast as they can, while a thread reads.
    #[test]
    fn no_reader_sees_half_of_one_task_and_half_of_another() {
        let pool = crate::runtime::task::Pool::new();
        let tasks = [(1, Location::caller()), (2, Location::caller())]
            .map(|(id, at)| BodyRef::with_future(&pool, async {}, id, 10 * id, 0, at));
        let board = Board::new(true);
        let over = AtomicU32::new(0);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut seen = [0; 2];
                while over.load(Ordering::Relaxed) == 0 || seen.contains(&0) {
                    let Some(task) = board.read(0) else {
                        continue;
                    };
                    assert_eq!(task.parent, 10 * task.id);
                    assert!(task.sleep.is_none_or(|sleep| sleep == task.id));
                    assert!(task.timeout.is_none_or(|timeout| timeout == task.id));
                    assert_eq!(task.timeout, task.sleep);
                    seen[task.id as usize - 1] += 1;
                }
            });
            // The rounds after the first are for a reader that starts late.
            while over.load(Ordering::Relaxed) == 0 || !reader.is_finished() {
                for _ in 0..200_000 {
                    for task in &tasks {
                        let body = task.body();
                        board.add(0, body);
                        let report = Report {
                            is_ready: false,
                            wait: None,
                            others: 0,
                            sleep: Some(body.id),
                            timeout: Some(body.id),
                        };
                        board.post(0, body, &report);
                        board.remove(0);
                    }
                }
                over.store(1, Ordering::Relaxed);
            }
        });
    }

    #[test]
    fn a_task_is_shown_as_posted_and_its_successor_as_new() {
        let pool = crate::runtime::task::Pool::new();
        let at = Location::caller();
        let [task, next] = [1, 2].map(|id| BodyRef::with_future(&pool, async {}, id, 0, 0, at));
        let board = Board::new(true);
        let look = || board.read(3).expect("a task has the slot");
        let post = |is_ready, wait, others, at| {
            let report = Report {
                is_ready,
                wait,
                others,
                sleep: at,
                timeout: at,
            };
            board.post(3, task.body(), &report);
            look()
        };
        board.add(3, task.body());
        assert_eq!((look().id, look().slot), (1, 3));

        task.body().cycles.set(5);
        let shown = post(false, Some((WaitKind::Lock, at)), 2, Some(9));
        assert_eq!(shown.wait, Some((WaitKind::Lock, at)));
        assert_eq!((shown.cycles, shown.others), (5, 2));
        assert_eq!((shown.sleep, shown.timeout), (Some(9), Some(9)));
        assert!(!shown.is_ready && !shown.is_cancelled);

        assert!(task.body().mark_cancelled());
        let shown = post(true, None, 0, None);
        assert!(shown.is_ready && shown.is_cancelled);
        assert_eq!((shown.wait, shown.others), (None, 0));
        assert_eq!((shown.sleep, shown.timeout), (None, None));

        post(false, Some((WaitKind::Lock, at)), 2, Some(9));
        board.remove(3);
        assert!(board.read(3).is_none());
        board.add(3, next.body());
        let shown = look();
        assert_eq!((shown.id, shown.cycles, shown.others), (2, 0, 0));
        assert!(shown.is_ready && !shown.is_cancelled);
        assert_eq!(shown.wait, None);
        assert_eq!((shown.sleep, shown.timeout), (None, None));
    }

    #[test]
    fn every_slot_has_one_entry() {
        let mut expected = (0, 0);
        for slot in 0..10_000 {
            assert_eq!(Board::locate(slot), expected);
            expected.1 += 1;
            if expected.1 == FIRST_CHUNK << expected.0 {
                expected = (expected.0 + 1, 0);
            }
        }
        let last = crate::runtime::waker::MAX_SLOTS as u32 - 1;
        assert!(Board::locate(last).0 < CHUNKS);
    }
}
