//! What is known of a descriptor's readiness.
//!
//! The reactor hears of events, a [`Source`](crate::traps::Source) of user mode makes the system calls and sees what they move. They share the memory of both, so
//! that a call which need not wait looks into no table. How the memory is kept is told in `reactor`.

use std::cell::Cell;

use super::nodes::NIL;
use super::reactor::SourceId;

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Direction {
    /// Towards us.
    Read,
    /// Away from us.
    Write,
}

/// Of one descriptor.
#[derive(Debug)]
pub(crate) struct Readiness {
    /// The kernel where it is registered, and as what; not before a task had to wait.
    at: Cell<Option<(u32, SourceId)>>,
    /// By direction.
    sides: [Side; 2],
}

/// Of one direction.
#[derive(Debug)]
struct Side {
    /// The node that waits for it.
    waiter: Cell<u32>,
    is_ready: Cell<bool>,
    /// However little a call moves, the next one is worth a try: it has ended or is broken, or nobody would tell when it becomes ready, since
    /// no task has had to wait for it yet.
    stays_ready: Cell<bool>,
}

impl Readiness {
    pub(crate) fn unregistered() -> Self {
        let side = || Side {
            waiter: Cell::new(NIL),
            is_ready: Cell::new(true),
            stays_ready: Cell::new(true),
        };
        Self {
            at: Cell::new(None),
            sides: [side(), side()],
        }
    }

    pub(crate) const fn at(&self) -> Option<(u32, SourceId)> {
        self.at.get()
    }

    /// Notes that it was registered, or is no more; as if it were new otherwise.
    pub(super) fn set_at(&self, at: Option<(u32, SourceId)>) {
        self.at.set(at);
        for side in &self.sides {
            side.waiter.set(NIL);
            side.is_ready.set(true);
            side.stays_ready.set(true);
        }
    }

    #[inline(always)]
    const fn side(&self, direction: Direction) -> &Side {
        &self.sides[direction as usize]
    }

    /// Whether a call may succeed, as far as is known.
    #[inline(always)]
    pub(crate) const fn is_ready(&self, direction: Direction) -> bool {
        self.side(direction).is_ready.get()
    }

    /// A call moved less than it was asked to.
    #[inline(always)]
    pub(crate) fn clear_ready(&self, direction: Direction) {
        let side = self.side(direction);
        side.is_ready.set(side.stays_ready.get());
    }

    /// A call would block, until an event says otherwise.
    pub(super) fn exhaust(&self, direction: Direction) {
        let side = self.side(direction);
        side.is_ready.set(false);
        side.stays_ready.set(false);
    }

    /// An event says that it is ready, or even that it has ended. The answer is who waited for it, `NIL` for nobody.
    #[inline(always)]
    pub(super) fn tell(&self, direction: Direction, is_ready: bool, has_ended: bool) -> u32 {
        if !(is_ready || has_ended) {
            return NIL;
        }
        let side = self.side(direction);
        side.is_ready.set(true);
        if has_ended {
            side.stays_ready.set(true);
        }
        side.waiter.replace(NIL)
    }

    /// The node that waits for it, `NIL` for none.
    #[inline(always)]
    pub(crate) const fn waiter(&self, direction: Direction) -> u32 {
        self.side(direction).waiter.get()
    }

    #[inline(always)]
    pub(super) fn set_waiter(&self, direction: Direction, node: u32) {
        self.side(direction).waiter.set(node);
    }
}
