//! One node type for everything that can be waited for.
//!
//! A leaf future that blocks owns one node; so does a timeout block or a shield (a *scope*), and a parking lot. A leaf's node is in up to two
//! lists at once: the *waits* of its task (so that a cancellation finds every leaf the task waits at), and the queue that will fire it (a
//! parking lot or a slot of the timer wheel). A scope's node is in its task's list of scopes, and in the wheel while its deadline runs.
//! All links are indices into one table, so arming and dropping a wait touch no
//! allocator once the table has grown, and nothing dangles: the leaf's `Drop` takes its node out of both lists.
//!
//! Life of a leaf's node: `Armed` → `Fired` | `Interrupted` | `Closed` → released by the leaf, or released at any moment when the leaf is dropped.
//! That of a join goes with the task that it waits for, see `Header::has_freed_joiners`; most joins have none, see `joins`.

use std::panic::Location;
use std::task::Waker;

pub(crate) use super::wheel::NIL;
use super::wheel::Timers;

/// What a wait is for. The task dump shows it, and it decides which queue the wait's node stands in.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[non_exhaustive]
pub enum WaitKind {
    /// The deadline of a timeout block. Not a trap: the block's body waits elsewhere.
    Deadline,
    /// `sleep`, `sleep_until`, `yield_now`.
    Sleep,
    /// Another task's end.
    Join,
    /// A source that becomes readable.
    Read,
    /// A source that becomes writable.
    Write,
    /// An answer from another thread.
    Remote,
    /// A future of another library, made interruptible.
    Foreign,
    /// An event that is set, or a result that arrives.
    Event,
    /// A lock.
    Lock,
    /// A permit of a semaphore.
    Semaphore,
    /// A condition that is notified.
    Condition,
    /// An item in a queue.
    QueueGet,
    /// Room in a queue.
    QueuePut,
    /// Every item of a queue being done.
    QueueJoin,
    /// The moment when no other task can run.
    Idle,
    /// A parking lot of somebody's own primitive.
    Custom,
}

impl WaitKind {
    const ALL: [Self; 16] = [
        Self::Deadline,
        Self::Sleep,
        Self::Join,
        Self::Read,
        Self::Write,
        Self::Remote,
        Self::Foreign,
        Self::Event,
        Self::Lock,
        Self::Semaphore,
        Self::Condition,
        Self::QueueGet,
        Self::QueuePut,
        Self::QueueJoin,
        Self::Idle,
        Self::Custom,
    ];

    /// Whether its node stands in a parking lot while armed.
    pub(crate) const fn is_parked(self) -> bool {
        !matches!(
            self,
            Self::Deadline
                | Self::Sleep
                | Self::Join
                | Self::Read
                | Self::Write
                | Self::Remote
                | Self::Foreign
        )
    }
}

/// How far a leaf's wait has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Phase {
    Armed,
    Fired,
    Interrupted,
    /// What it waited for is gone: the source was closed, the lot dropped.
    Closed,
}

/// How far a scope's deadline has come; told where a leaf's node has its phase.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Term {
    /// It stands in the timer wheel.
    Running,
    /// It has run out, and no trap has told the task.
    Fired,
    /// It has run out, and a trap has told the task.
    Told,
    /// There is none.
    Off,
}

/// 40 bytes; a million sleepers pay for every one of them.
pub(crate) struct Node {
    /// Slot of the task that waits (28 bits, all ones once that task ended), kind (4).
    owner: u32,
    /// Scope (28 bits, all ones for the task itself), phase or term (2), two flags.
    meta: u32,
    pub(crate) task_prev: u32,
    pub(crate) task_next: u32,
    pub(crate) prev: u32,
    pub(crate) next: u32,
    /// What the queue needs: a deadline, a source, a serial; the cause once interrupted.
    pub(crate) key: u64,
    /// Where the task awaits.
    pub(crate) at: &'static Location<'static>,
}

const _: () = assert!(size_of::<Node>() == 40);

/// The scope that stands for the task itself.
pub(crate) const ROOT: u32 = ID;

/// In place of a node's task.
pub(crate) const NOBODY: u32 = ID;

/// A scope's or a task's number within a word. All ones stand for none.
const ID: u32 = 0x0fff_ffff;
const KIND_SHIFT: u32 = 28;
const PHASE_SHIFT: u32 = 28;
const PHASE: u32 = 3 << PHASE_SHIFT;
/// Of a leaf: a waker other than the task's own waits here.
const FOREIGN: u32 = 1 << 30;
/// Of a scope: it is a shield.
const SHIELD: u32 = 1 << 30;
/// Of a scope: an enclosing deadline fired while it was open.
const REARMS: u32 = 1 << 31;

impl Node {
    /// In no queue, and in no task's list. Once it is in the table, its `prev` and `next` are itself: the beginning of a ring.
    pub(crate) const fn new(
        kind: WaitKind,
        scope: u32,
        key: u64,
        at: &'static Location<'static>,
    ) -> Self {
        Self {
            owner: ID | (kind as u32) << KIND_SHIFT,
            meta: scope,
            task_prev: NIL,
            task_next: NIL,
            prev: NIL,
            next: NIL,
            key,
            at,
        }
    }

    /// Slot of the task in whose list it is; [`NOBODY`], which is no slot's number, if it is in none.
    pub(crate) const fn task(&self) -> u32 {
        self.owner & ID
    }

    /// It was taken out of the list of a task that ended.
    pub(crate) const fn orphan(&mut self) {
        self.owner |= NOBODY;
    }

    const fn set_task(&mut self, task: u32) {
        self.owner = (self.owner & !ID) | task;
    }

    pub(crate) const fn scope(&self) -> u32 {
        self.meta & ID
    }

    pub(crate) const fn set_scope(&mut self, scope: u32) {
        self.meta = (self.meta & !ID) | scope;
    }

    pub(crate) const fn kind(&self) -> WaitKind {
        WaitKind::ALL[(self.owner >> KIND_SHIFT) as usize]
    }

    pub(crate) const fn phase(&self) -> Phase {
        match (self.meta & PHASE) >> PHASE_SHIFT {
            0 => Phase::Armed,
            1 => Phase::Fired,
            2 => Phase::Interrupted,
            _ => Phase::Closed,
        }
    }

    pub(crate) const fn set_phase(&mut self, phase: Phase) {
        self.meta = (self.meta & !PHASE) | (phase as u32) << PHASE_SHIFT;
    }

    /// Whether a waker other than the task's own waits here.
    pub(crate) const fn is_foreign(&self) -> bool {
        self.meta & FOREIGN != 0
    }
}

/// What a node says if it is a scope.
impl Node {
    /// A timeout block whose term is `Running`, which the caller sees to, or `Off`.
    pub(crate) const fn block(
        parent: u32,
        deadline: Option<u64>,
        at: &'static Location<'static>,
    ) -> Self {
        match deadline {
            Some(deadline) => Self::new(WaitKind::Deadline, parent, deadline, at),
            None => {
                let mut block = Self::new(WaitKind::Deadline, parent, 0, at);
                block.set_term(Term::Off);
                block
            }
        }
    }

    pub(crate) const fn shield(parent: u32, at: &'static Location<'static>) -> Self {
        let mut shield = Self::block(parent, None, at);
        shield.meta |= SHIELD;
        shield
    }

    pub(crate) const fn is_scope(&self) -> bool {
        self.owner >> KIND_SHIFT == WaitKind::Deadline as u32
    }

    pub(crate) const fn is_shield(&self) -> bool {
        self.meta & SHIELD != 0
    }

    pub(crate) const fn term(&self) -> Term {
        match (self.meta & PHASE) >> PHASE_SHIFT {
            0 => Term::Running,
            1 => Term::Fired,
            2 => Term::Told,
            _ => Term::Off,
        }
    }

    pub(crate) const fn set_term(&mut self, term: Term) {
        self.meta = (self.meta & !PHASE) | (term as u32) << PHASE_SHIFT;
    }

    /// Whether leaving it fires an enclosing deadline again (R7).
    pub(crate) const fn rearms(&self) -> bool {
        self.meta & REARMS != 0
    }

    pub(crate) const fn set_rearms(&mut self, rearms: bool) {
        self.meta &= !REARMS;
        if rearms {
            self.meta |= REARMS;
        }
    }
}

/// The table. Free nodes are chained through `next`; a `slab::Slab<Node>` would cost eight bytes more for each node.
pub(crate) struct Nodes {
    nodes: Vec<Node>,
    free: u32,
    /// Wakers of leaves that are polled with one of their own (`FuturesUnordered`, `select_all`), by node.
    foreign: Vec<Option<Waker>>,
}

/// By how many nodes the table grows: for a wait that finds it full, to make room is a long way round.
const GROWTH: u32 = 32;

impl Nodes {
    pub(crate) const fn new() -> Self {
        Self {
            nodes: Vec::new(),
            free: NIL,
            foreign: Vec::new(),
        }
    }

    /// How many nodes are in use.
    #[cfg(test)]
    pub(crate) fn live(&self) -> usize {
        let some = |id: u32| (id != NIL).then_some(id);
        let free = std::iter::successors(some(self.free), |&id| some(self[id].next));
        self.nodes.len() - free.count()
    }

    /// Puts a node into the table.
    pub(crate) fn insert(&mut self, node: Node) -> u32 {
        self.reserve();
        self.place(node).expect("there is a free node")
    }

    /// Puts a node into the table, unless that is full.
    #[inline]
    pub(crate) fn place(&mut self, node: Node) -> Option<u32> {
        let id = self.free;
        let place = self.nodes.get_mut(id as usize)?;
        self.free = place.next;
        *place = Node {
            prev: id,
            next: id,
            ..node
        };
        Some(id)
    }

    /// Puts a node of `task` into the table and at the head of the task's list, which begins at `head`. `None` if the table is full:
    /// to make room is the caller's, for a call here would have to save what it holds.
    #[inline]
    pub(crate) fn insert_for(&mut self, task: u32, head: &mut u32, mut node: Node) -> Option<u32> {
        let next = *head;
        node.set_task(task);
        node.task_next = next;
        let id = self.place(node)?;
        if next != NIL {
            self[next].task_prev = id;
        }
        *head = id;
        Some(id)
    }

    /// Makes room for one more.
    #[inline]
    pub(crate) fn reserve(&mut self) {
        if self.free == NIL {
            self.grow();
        }
    }

    #[cold]
    fn grow(&mut self) {
        let first = self.nodes.len() as u32;
        assert!(first + GROWTH <= ID, "more than 2^28 waits at once");
        self.nodes.extend((first + 1..=first + GROWTH).map(|next| {
            let mut free = Node::new(WaitKind::Custom, ROOT, 0, Location::caller());
            free.next = next;
            free
        }));
        self.nodes[(first + GROWTH - 1) as usize].next = NIL;
        self.free = first;
    }

    /// Frees a leaf's node that is in no list any more. The waker it had must be dropped by the caller once no table is borrowed.
    #[inline]
    #[must_use]
    pub(crate) fn remove(&mut self, id: u32) -> Option<Waker> {
        let waker = self.take_waker(id);
        self.put_back(id);
        waker
    }

    /// Frees any other node.
    #[inline]
    pub(crate) fn put_back(&mut self, id: u32) {
        let free = std::mem::replace(&mut self.free, id);
        let node = &mut self[id];
        // A late answer from another thread looks at kind and key; a free node must not pass for one. Nor must it lead anywhere
        // whoever takes it for the scope that it was.
        (node.owner, node.meta) = (NOBODY, ROOT);
        node.next = free;
    }

    pub(crate) fn set_waker(&mut self, id: u32, waker: Waker) -> Option<Waker> {
        let index = id as usize;
        if self.foreign.len() <= index {
            self.foreign.resize(self.nodes.len(), None);
        }
        self[id].meta |= FOREIGN;
        self.foreign[index].replace(waker)
    }

    #[inline]
    pub(crate) fn take_waker(&mut self, id: u32) -> Option<Waker> {
        match self[id].is_foreign() {
            true => self.take_foreign_waker(id),
            false => None,
        }
    }

    #[cold]
    fn take_foreign_waker(&mut self, id: u32) -> Option<Waker> {
        self[id].meta &= !FOREIGN;
        self.foreign[id as usize].take()
    }

    /// For those who change several: a store to a node does not make them look again for where the table is.
    #[inline]
    pub(super) fn as_mut_slice(&mut self) -> &mut [Node] {
        &mut self.nodes
    }

    pub(crate) fn get(&self, id: u32) -> Option<&Node> {
        self.nodes.get(id as usize)
    }

    /// Puts `id` at the head of a task's list, which begins at `head`.
    pub(crate) fn link_to_task(&mut self, id: u32, task: u32, head: &mut u32) {
        let next = *head;
        let node = &mut self[id];
        node.set_task(task);
        node.task_prev = NIL;
        node.task_next = next;
        if next != NIL {
            self[next].task_prev = id;
        }
        *head = id;
    }

    /// Takes `id` out of the list that begins at `head`. Its task is for the caller to change.
    #[inline]
    pub(crate) fn unlink_from_task(&mut self, id: u32, head: &mut u32) {
        let nodes = self.as_mut_slice();
        let node = &nodes[id as usize];
        let (prev, next) = (node.task_prev, node.task_next);
        match prev {
            NIL => *head = next,
            prev => nodes[prev as usize].task_next = next,
        }
        if next != NIL {
            nodes[next as usize].task_prev = prev;
        }
    }
}

impl std::ops::Index<u32> for Nodes {
    type Output = Node;
    fn index(&self, id: u32) -> &Node {
        &self.nodes[id as usize]
    }
}

impl std::ops::IndexMut<u32> for Nodes {
    fn index_mut(&mut self, id: u32) -> &mut Node {
        &mut self.nodes[id as usize]
    }
}

impl Timers for Nodes {
    fn deadline(&self, node: u32) -> u64 {
        self[node].key
    }
    fn prev(&self, node: u32) -> u32 {
        self[node].prev
    }
    fn next(&self, node: u32) -> u32 {
        self[node].next
    }
    fn set_prev(&mut self, node: u32, to: u32) {
        self[node].prev = to;
    }
    fn set_next(&mut self, node: u32, to: u32) {
        self[node].next = to;
    }
}
