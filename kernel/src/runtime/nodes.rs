//! One node type for everything that can be waited for.
//!
//! A leaf future that blocks owns one node; a deadline that is armed owns one too. A node is in up to two lists at once:
//! the *waits* of its task (so that a cancellation finds every leaf the task waits at), and the queue that will fire it (a
//! parking lot or a slot of the timer wheel). All links are indices into one table, so arming and dropping a wait touch no
//! allocator once the table has grown, and nothing dangles: the leaf's `Drop` takes its node out of both lists.
//!
//! Life of a leaf's node: `Armed` → `Fired` | `Interrupted` | `Closed` → released by the leaf, or released at any moment when the leaf is dropped.

use std::panic::Location;
use std::task::Waker;

use super::task::Tasks;
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

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Phase {
    Armed,
    Fired,
    Interrupted,
    /// What it waited for is gone: the source was closed, the lot dropped.
    Closed,
}

/// 40 bytes; a million sleepers pay for every one of them.
pub(crate) struct Node {
    /// Slot of the task that waits, `NIL` once that task ended (or for a free node).
    pub(crate) task: u32,
    /// Scope (24 bits), kind (4), phase (2), foreign waker (1).
    meta: u32,
    pub(crate) task_prev: u32,
    pub(crate) task_next: u32,
    pub(crate) prev: u32,
    pub(crate) next: u32,
    /// What the queue needs: a deadline, a lot, a source, a serial; the cause once interrupted.
    pub(crate) key: u64,
    /// Where the task awaits.
    pub(crate) at: &'static Location<'static>,
}

const _: () = assert!(size_of::<Node>() == 40);

/// The scope that stands for the task itself.
pub(crate) const ROOT: u32 = 0xff_ffff;

const SCOPE: u32 = 0x00ff_ffff;
const KIND_SHIFT: u32 = 24;
const PHASE_SHIFT: u32 = 28;
const PHASE: u32 = 0x3000_0000;
const FOREIGN: u32 = 0x4000_0000;

impl Node {
    pub(crate) const fn scope(&self) -> u32 {
        self.meta & SCOPE
    }

    pub(crate) const fn set_scope(&mut self, scope: u32) {
        self.meta = (self.meta & !SCOPE) | scope;
    }

    pub(crate) const fn kind(&self) -> WaitKind {
        WaitKind::ALL[(self.meta >> KIND_SHIFT & 15) as usize]
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

/// The table. Free nodes are chained through `next`; a `slab::Slab<Node>` would cost eight bytes more for each node.
pub(crate) struct Nodes {
    nodes: Vec<Node>,
    free: u32,
    /// Wakers of leaves that are polled with one of their own (`FuturesUnordered`, `select_all`), by node.
    foreign: Vec<Option<Waker>>,
}

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

    pub(crate) fn insert(
        &mut self,
        kind: WaitKind,
        scope: u32,
        key: u64,
        at: &'static Location<'static>,
    ) -> u32 {
        let node = Node {
            task: NIL,
            meta: scope | (kind as u32) << KIND_SHIFT,
            task_prev: NIL,
            task_next: NIL,
            prev: NIL,
            next: NIL,
            key,
            at,
        };
        self.place(node)
    }

    /// A node of `task`, at the head of its list of waits, which begins at `head`.
    #[inline]
    pub(crate) fn insert_for(
        &mut self,
        task: u32,
        head: &mut u32,
        kind: WaitKind,
        scope: u32,
        key: u64,
        at: &'static Location<'static>,
    ) -> u32 {
        let task_next = *head;
        *head = self.place(Node {
            task,
            meta: scope | (kind as u32) << KIND_SHIFT,
            task_prev: NIL,
            task_next,
            prev: NIL,
            next: NIL,
            key,
            at,
        });
        if task_next != NIL {
            self[task_next].task_prev = *head;
        }
        *head
    }

    #[inline]
    fn place(&mut self, node: Node) -> u32 {
        let id = self.free;
        if let Some(place) = self.nodes.get_mut(id as usize) {
            self.free = place.next;
            *place = node;
            return id;
        }
        self.grow(node)
    }

    #[cold]
    fn grow(&mut self, node: Node) -> u32 {
        assert!(self.nodes.len() < 1 << 31, "more than 2^31 waits at once");
        self.nodes.push(node);
        (self.nodes.len() - 1) as u32
    }

    /// Frees a node that is in no queue any more and takes it out of the list of its task. The waker it had must be dropped by the caller once
    /// no table is borrowed.
    #[inline]
    #[must_use]
    pub(crate) fn remove(&mut self, id: u32, tasks: &mut Tasks) -> Option<Waker> {
        let node = &mut self.nodes[id as usize];
        let (task, prev, next) = (node.task, node.task_prev, node.task_next);
        let is_foreign = node.is_foreign();
        // A late answer from another thread looks at kind and key; a free node must not pass for one.
        node.meta = 0;
        node.task = NIL;
        node.next = self.free;
        self.free = id;
        if task != NIL {
            match prev {
                NIL => tasks[task].waits = next,
                prev => self[prev].task_next = next,
            }
            if next != NIL {
                self[next].task_prev = prev;
            }
        }
        match is_foreign {
            true => self.foreign[id as usize].take(),
            false => None,
        }
    }

    pub(crate) fn set_waker(&mut self, id: u32, waker: Waker) -> Option<Waker> {
        let index = id as usize;
        if self.foreign.len() <= index {
            self.foreign.resize(self.nodes.len(), None);
        }
        self[id].meta |= FOREIGN;
        self.foreign[index].replace(waker)
    }

    #[cold]
    pub(crate) fn take_waker(&mut self, id: u32) -> Option<Waker> {
        if !self[id].is_foreign() {
            return None;
        }
        self[id].meta &= !FOREIGN;
        self.foreign[id as usize].take()
    }

    pub(crate) fn get(&self, id: u32) -> Option<&Node> {
        self.nodes.get(id as usize)
    }

    /// Puts `id` at the head of a task's list of waits, which begins at `head`.
    pub(crate) fn link_to_task(&mut self, id: u32, task: u32, head: &mut u32) {
        let next = *head;
        let node = &mut self[id];
        node.task = task;
        node.task_prev = NIL;
        node.task_next = next;
        if next != NIL {
            self[next].task_prev = id;
        }
        *head = id;
    }

    /// Takes `id` out of the list that begins at `head`.
    pub(crate) fn unlink_from_task(&mut self, id: u32, head: &mut u32) {
        let node = &mut self[id];
        let prev = std::mem::replace(&mut node.task_prev, NIL);
        let next = std::mem::replace(&mut node.task_next, NIL);
        node.task = NIL;
        match prev {
            NIL => *head = next,
            prev => self[prev].task_next = next,
        }
        if next != NIL {
            self[next].task_prev = prev;
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
