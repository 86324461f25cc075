//! Synchronisation between the tasks of one kernel: first come, first served, and not a cycle spent on other threads.
//!
//! | | waits for | Curio |
//! |---|---|---|
//! | [`Event`] | a flag | `Event` |
//! | [`promise`] | one value from one task | `Result` |
//! | [`Lock`], [`RLock`] | being alone | the same |
//! | [`Semaphore`], [`BoundedSemaphore`] | one of so many permits | the same |
//! | [`Condition`] | a change, with a lock | `Condition` |
//! | [`Queue`], [`PriorityQueue`], [`LifoQueue`] | an item, or room for one | the same |
//! | [`UniversalEvent`] | a flag, across threads | `UniversalEvent` |
//! | [`UniversalResult`] | one value, across threads | `UniversalResult` |
//! | [`UniversalQueue`] | an item, or room for one, across threads | `UniversalQueue` |
//!
//! All but the universal ones are shared by reference, usually in an [`Rc`](std::rc::Rc), and belong to the kernel in which a task first waits at them.
//! What cannot block is a plain call, and may also be made from outside a task. What can is a future: a cancellation
//! point only if it has to wait. When it has not, it lets the other tasks run only if the task has gone on for long without.
//!
//! **Grants.** A wake that gives something away (an item, room, a lock) gives it to one waiter and to nobody else: who comes
//! later queues behind it, even if it arrives before the woken task has run. Should the waiter go away before it takes
//! what it was given, the next one gets it. A cancellation that comes after the grant does not take it back.

mod condition;
mod crossing;
mod event;
mod lock;
mod queue;
mod result;
mod semaphore;
mod universal;
mod universal_queue;

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll};

pub use condition::Condition;
pub use event::{Event, EventWait};
pub use lock::{Lock, LockAcquire, LockGuard, RLock, RLockAcquire, RLockGuard};
pub use queue::{
    Get, LifoQueue, PriorityQueue, Put, Queue, QueueError, QueueJoin, Store, TryGetError,
    TryPutError,
};
pub use result::{Broken, Promise, Promised, PromisedWait, promise};
pub use semaphore::{BoundedSemaphore, Permit, Semaphore, SemaphoreAcquire, TooManyPermits};
pub use universal::{UniversalEvent, UniversalResult};
pub use universal_queue::{UniversalPut, UniversalQueue};

use crate::error::Interrupt;
use crate::runtime::WaitKind;
use crate::traps::{Lot, SchedWait, sched_wait, wake_one};

/// A parking lot whose wakes are grants.
#[derive(Debug, Default)]
struct Line {
    lot: Lot,
    /// How many stand in the lot, or were interrupted and do not know it yet.
    waiting: Cell<usize>,
    /// How many were given something and have not run since.
    granted: Cell<usize>,
}

impl Line {
    const fn new() -> Self {
        Self {
            lot: Lot::new(),
            waiting: Cell::new(0),
            granted: Cell::new(0),
        }
    }

    /// Gives one thing to the task that waits longest. False if nobody waits.
    #[inline]
    fn grant(&self) -> bool {
        // The count spares the way into the kernel in the common case.
        self.waiting.get() > 0 && self.grant_to_first()
    }

    #[inline(never)]
    fn grant_to_first(&self) -> bool {
        if !wake_one(&self.lot) {
            return false; // those who wait were interrupted
        }
        decrement(&self.waiting);
        self.granted.set(self.granted.get() + 1);
        true
    }

    /// How many grants have not been taken yet.
    const fn granted(&self) -> usize {
        self.granted.get()
    }

    /// A place at its end; taken at the first poll.
    #[track_caller]
    fn place(&self, kind: WaitKind) -> Place<'_> {
        Place {
            line: self,
            wait: sched_wait(&self.lot, kind),
        }
    }
}

/// A place in a [`Line`]. The future that owns it must call [`Place::leave`] when it is dropped.
#[derive(Debug)]
struct Place<'a> {
    line: &'a Line,
    wait: SchedWait<'a>,
}

impl Place<'_> {
    /// Waits for a grant. `Ok`: it is taken.
    #[inline(always)]
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Interrupt>> {
        let waited = self.wait.is_waiting();
        let answer = Pin::new(&mut self.wait).poll(cx);
        match answer {
            Poll::Pending if !waited => self.line.waiting.set(self.line.waiting.get() + 1),
            Poll::Ready(Ok(())) => decrement(&self.line.granted),
            Poll::Ready(Err(_)) if waited => decrement(&self.line.waiting),
            Poll::Pending | Poll::Ready(Err(_)) => {}
        }
        answer
    }

    const fn is_waiting(&self) -> bool {
        self.wait.is_waiting()
    }

    /// True: it was granted something that nobody took, to be handed on.
    #[inline]
    fn leave(&self) -> bool {
        self.wait.is_waiting() && self.give_up()
    }

    #[cold]
    fn give_up(&self) -> bool {
        let granted = self.wait.is_woken();
        decrement(if granted {
            &self.line.granted
        } else {
            &self.line.waiting
        });
        granted
    }
}

/// Saturating, for futures that were smuggled out of their kernel and outlived it.
fn decrement(count: &Cell<usize>) {
    count.set(count.get().saturating_sub(1));
}
