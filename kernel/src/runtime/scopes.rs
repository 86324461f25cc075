//! Cancellation scopes: who is interrupted when, and how often.
//!
//! A scope is a timeout block, a shield, or (as [`ROOT`]) the task itself. Scopes of a task form a tree, because the branches
//! of a `select!` may each have their own; a scope's future makes it the *current* scope for the time of its poll, and every leaf notes the
//! scope it was armed under.
//!
//! Cancelling a task, or a deadline that runs out, *fires* a scope. The rules, by the names that the tests use:
//!
//! - **R2** a leaf that has completed returns its value, whatever fired;
//! - **R3** a leaf armed before the firing, with no shield between it and the scope, returns the interrupt;
//! - **R4** a leaf about to block under a fired scope that nobody was told of returns the interrupt without arming;
//! - **R5** firing wakes each such leaf's own waker, so that a combinator that wraps wakers polls the right child;
//! - **R6** when several scopes have fired the outermost one is reported, and all of them count as told;
//! - **R7** leaving a timeout block that was open when an enclosing deadline fired makes that one untold again: swallowing it wins no time;
//! - **R8** at the end of a timeout block: its own expiry is `TaskTimeout`, that of an enclosing one `TimeoutCancellation`, a timeout
//!   that belongs to no block in force `UncaughtTimeout`;
//! - **R9** a cancellation disarms the task's timeouts, so that clean-up may outlast them; not those behind a shield, where it is not felt;
//! - **R10** a shield covers the polls of the shielded future and nothing beside it;
//! - **R11** telling happens once for each firing.
//!
//! (R1 is the definition of firing, R12 is `interruptible`.) Told or not is one flag a scope; a flag on the slot says
//! whether any scope of the task is untold, so that a leaf that blocks in ordinary times tests one bit.

use slab::Slab;

use super::nodes::{NIL, Phase, ROOT, WaitKind};
use super::task::Flags;
use super::{Aftermath, State};
use crate::error::Interrupt;

/// A timeout block or a shield.
#[derive(Clone, Copy)]
pub(crate) struct Scope {
    /// Whose it is; `NIL` once that task ended.
    task: u32,
    /// The scope around it.
    parent: u32,
    /// Its neighbours in the task's list.
    prev: u32,
    next: u32,
    /// The armed deadline, `NIL` for a shield, for a block without one, and once it has fired.
    timer: u32,
    is_shield: bool,
    fired: bool,
    /// Whether a trap has told the task.
    told: bool,
    /// An enclosing deadline fired while it was open: leaving it fires that one again (R7).
    rearms: bool,
}

/// How a timeout block ended, by R8.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// The body's result stands.
    Keep,
    /// The block's own deadline interrupted the body.
    Expired,
    /// An enclosing deadline did.
    Enclosing,
    /// A timeout came out of a block that it does not belong to.
    Uncaught,
}

pub(crate) type Scopes = Slab<Scope>;

impl State {
    /// Opens a timeout block (with or without a deadline) or a shield of the current task, inside the current scope.
    pub(crate) fn open_scope(&mut self, deadline: Option<u64>, is_shield: bool) -> u32 {
        let task = self.current;
        let scope = self.scopes.insert(Scope {
            task: NIL,
            parent: self.scope,
            prev: NIL,
            next: NIL,
            timer: NIL,
            is_shield,
            fired: false,
            told: false,
            rearms: false,
        });
        let scope = u32::try_from(scope)
            .ok()
            .filter(|&scope| scope < ROOT)
            .expect("fewer than 2^24 scopes");
        self.link_scope(scope, task);
        if let Some(deadline) = deadline {
            let timer = self
                .nodes
                .insert(WaitKind::Deadline, scope, deadline, self.nowhere);
            self.wheel.arm(&mut self.nodes, timer);
            self.scopes[scope as usize].timer = timer;
        }
        scope
    }

    /// When the first of a task's timeout blocks ends.
    pub(super) fn next_timeout(&self, task: u32) -> Option<u64> {
        let mut scope = self.tasks[task].scopes;
        let mut first: Option<u64> = None;
        while scope != NIL {
            let block = &self.scopes[scope as usize];
            if block.timer != NIL {
                let deadline = self.nodes[block.timer].key;
                first = Some(first.map_or(deadline, |first| first.min(deadline)));
            }
            scope = block.next;
        }
        first
    }

    /// Makes `scope` the current one and returns the one that was.
    pub(crate) fn enter_scope(&mut self, scope: u32) -> u32 {
        let task = self.scopes[scope as usize].task;
        if task != self.current {
            // The block's future was moved to another task.
            self.unlink_scope(scope);
            self.link_scope(scope, self.current);
        }
        self.scopes[scope as usize].parent = self.scope;
        std::mem::replace(&mut self.scope, scope)
    }

    /// Ends a scope.
    pub(crate) fn close_scope(&mut self, scope: u32) {
        let closed = self.scopes.remove(scope as usize);
        let Scope { task, parent, .. } = closed;
        if closed.timer != NIL {
            self.release(closed.timer);
        }
        if task == NIL {
            return;
        }
        self.bridge(&closed);
        // Leaves and blocks that were created inside and moved out live on in the scope around.
        let mut node = self.tasks[task].waits;
        while node != NIL {
            if self.nodes[node].scope() == scope {
                self.nodes[node].set_scope(parent);
            }
            node = self.nodes[node].task_next;
        }
        let mut other = self.tasks[task].scopes;
        while other != NIL {
            let other_scope = &mut self.scopes[other as usize];
            if other_scope.parent == scope {
                other_scope.parent = parent;
            }
            other = other_scope.next;
        }
        if self.tasks[task].flags.has(Flags::PENDING) {
            self.refresh_pending(task);
        }
    }

    /// Ends a timeout block whose body came to its end; `timed_out` says that the body's result is a timeout's interrupt.
    pub(crate) fn exit_timeout(&mut self, scope: u32, timed_out: bool) -> Verdict {
        let Scope {
            fired,
            told,
            task,
            parent,
            timer,
            rearms,
            ..
        } = self.scopes[scope as usize];
        let mut enclosing = None;
        let mut outer = parent;
        while outer != ROOT && !self.scopes[outer as usize].is_shield {
            let around = &self.scopes[outer as usize];
            if around.fired {
                enclosing = Some(outer);
            }
            outer = around.parent;
        }
        // Curio's "badness". Reading the clock at the end of every block is too much to ask of a release.
        let is_late =
            !timed_out && (fired && !told || cfg!(debug_assertions) && self.is_overdue(timer));
        self.close_scope(scope);
        if let Some(outer) = enclosing
            && rearms
        {
            // R7
            self.scopes[outer as usize].told = false;
            if task != NIL {
                self.tasks[task].flags.set(Flags::PENDING);
            }
        }
        match (timed_out, enclosing, fired) {
            (true, Some(_), _) => Verdict::Enclosing,
            (true, None, true) => Verdict::Expired,
            (true, None, false) => Verdict::Uncaught,
            (false, _, _) => {
                if is_late {
                    let text = "a timeout block ended after its deadline without having blocked since; its result stands";
                    self.aftermath
                        .push(Aftermath::Log(log::Level::Warn, text.into()));
                }
                Verdict::Keep
            }
        }
    }

    /// The deadline of a block ran out.
    pub(crate) fn fire_deadline(&mut self, timer: u32) {
        let scope = self.nodes[timer].scope();
        self.release(timer);
        self.scopes[scope as usize].timer = NIL;
        self.scopes[scope as usize].fired = true;
        let task = self.scopes[scope as usize].task;
        if task != NIL {
            let mut inner = self.tasks[task].scopes;
            while inner != NIL {
                if inner != scope && self.reaches(inner, scope) {
                    self.scopes[inner as usize].rearms = true;
                }
                inner = self.scopes[inner as usize].next;
            }
            self.fire_scope(task, scope);
        }
    }

    /// Fires the task itself, unless it was cancelled before. R9: its timeouts are off from now on.
    pub(crate) fn cancel(&mut self, task: u32, interrupt: Interrupt) -> bool {
        let slot = &mut self.tasks[task];
        let body = slot.body.as_ref().expect("only a live task is cancelled");
        if !body.mark_cancelled() {
            self.forget(Some(interrupt));
            return false;
        }
        slot.flags.set(Flags::CANCELLED);
        slot.flags.clear(Flags::CANCEL_DELIVERED);
        let mut scope = slot.scopes;
        while scope != NIL {
            let next = self.scopes[scope as usize].next;
            if self.reaches(scope, ROOT) {
                self.disarm(scope);
                let block = &mut self.scopes[scope as usize];
                block.fired &= block.told;
                block.rearms = false;
            }
            scope = next;
        }
        let before = self.reasons.insert(task, interrupt);
        self.forget(before);
        self.fire_scope(task, ROOT);
        true
    }

    /// R3, R5: interrupts what the task waits at inside `fired`.
    fn fire_scope(&mut self, task: u32, fired: u32) {
        self.tasks[task].flags.set(Flags::PENDING);
        let mut node = self.tasks[task].waits;
        while node != NIL {
            let next = self.nodes[node].task_next;
            if self.reaches(self.nodes[node].scope(), fired) {
                match self.nodes[node].phase() {
                    Phase::Armed => {
                        self.detach(node);
                        self.nodes[node].key = u64::from(fired);
                        self.settle(node, Phase::Interrupted);
                    }
                    // R6: of two firings before the leaf was polled, the outer one counts.
                    Phase::Interrupted if self.reaches(self.nodes[node].key as u32, fired) => {
                        self.nodes[node].key = u64::from(fired);
                    }
                    Phase::Interrupted | Phase::Fired | Phase::Closed => {}
                }
            }
            node = next;
        }
    }

    /// Whether a firing of `outer` is felt in `scope`: it is the same or around it, and no shield stands between.
    fn reaches(&self, mut scope: u32, outer: u32) -> bool {
        while scope != outer {
            if scope == ROOT {
                return false;
            }
            match self.scopes.get(scope as usize) {
                Some(inner) if !inner.is_shield => scope = inner.parent,
                _ => return false,
            }
        }
        true
    }

    /// Whether a task runs and no interrupt is pending for it, so that a trap may block.
    #[inline]
    pub(crate) fn may_block(&self) -> bool {
        let slot = self.tasks.get(self.current);
        slot.is_some_and(|slot| !slot.flags.has(Flags::PENDING))
    }

    /// R4: what a trap that is about to block under the current scope must answer instead.
    #[inline]
    pub(crate) fn pending_interrupt(&mut self) -> Option<Interrupt> {
        if !self.tasks[self.current].flags.has(Flags::PENDING) {
            return None;
        }
        self.tell(self.scope)
    }

    /// The answer of a leaf that was interrupted.
    pub(crate) fn interrupt_of(&mut self, node: u32) -> Interrupt {
        let cancelled = self.nodes[node].key as u32 == ROOT;
        self.tell(self.scope);
        if cancelled {
            self.reason(self.current)
        } else {
            Interrupt::TaskTimeout
        }
    }

    /// Whether an interrupt waits for the current task, be it behind a shield.
    pub(crate) fn peek_interrupt(&self) -> Option<Interrupt> {
        let slot = &self.tasks[self.current];
        if !slot.flags.has(Flags::PENDING) {
            return None;
        }
        if slot.flags.has(Flags::CANCELLED) && !slot.flags.has(Flags::CANCEL_DELIVERED) {
            return Some(self.reason(self.current));
        }
        Some(Interrupt::TaskTimeout)
    }

    /// Marks everything that is pending for the current task as told, shields or not.
    pub(crate) fn forgive(&mut self) {
        let slot = &mut self.tasks[self.current];
        if slot.flags.has(Flags::CANCELLED) {
            slot.flags.set(Flags::CANCEL_DELIVERED);
        }
        slot.flags.clear(Flags::PENDING);
        let mut scope = slot.scopes;
        while scope != NIL {
            let block = &mut self.scopes[scope as usize];
            block.told |= block.fired;
            scope = block.next;
        }
    }

    /// Replaces the pending cancellation of the current task by hand.
    pub(crate) fn set_interrupt(&mut self, interrupt: Option<Interrupt>) -> Option<Interrupt> {
        let before = self.peek_interrupt();
        self.forgive();
        if let Some(interrupt) = interrupt {
            let slot = &mut self.tasks[self.current];
            slot.flags.set(Flags::CANCELLED);
            slot.flags.clear(Flags::CANCEL_DELIVERED);
            slot.flags.set(Flags::PENDING);
            let replaced = self.reasons.insert(self.current, interrupt);
            self.forget(replaced);
        }
        before
    }

    /// Marks all fired scopes from `scope` outwards, up to the first shield, as told and returns what to tell: the outermost (R6).
    #[cold]
    fn tell(&mut self, mut scope: u32) -> Option<Interrupt> {
        let task = self.current;
        let mut found = None;
        loop {
            if scope == ROOT {
                let flags = &mut self.tasks[task].flags;
                if flags.has(Flags::CANCELLED) && !flags.has(Flags::CANCEL_DELIVERED) {
                    flags.set(Flags::CANCEL_DELIVERED);
                    found = Some(self.reason(task));
                }
                break;
            }
            let block = &mut self.scopes[scope as usize];
            if block.is_shield {
                break;
            }
            if block.fired && !block.told {
                block.told = true;
                found = Some(Interrupt::TaskTimeout);
            }
            scope = block.parent;
        }
        self.refresh_pending(task);
        found
    }

    fn refresh_pending(&mut self, task: u32) {
        let slot = &self.tasks[task];
        let mut untold =
            slot.flags.has(Flags::CANCELLED) && !slot.flags.has(Flags::CANCEL_DELIVERED);
        let mut scope = slot.scopes;
        while scope != NIL {
            let block = &self.scopes[scope as usize];
            untold |= block.fired && !block.told;
            scope = block.next;
        }
        if !untold {
            self.tasks[task].flags.clear(Flags::PENDING);
        }
    }

    fn reason(&self, task: u32) -> Interrupt {
        self.reasons
            .get(&task)
            .cloned()
            .unwrap_or_else(Interrupt::cancelled)
    }

    /// Whether the deadline has passed although nobody has looked yet.
    fn is_overdue(&self, timer: u32) -> bool {
        timer != NIL && self.nodes[timer].key <= self.time()
    }

    fn disarm(&mut self, scope: u32) {
        let timer = std::mem::replace(&mut self.scopes[scope as usize].timer, NIL);
        if timer != NIL {
            self.release(timer);
        }
    }

    fn link_scope(&mut self, scope: u32, task: u32) {
        if task == NIL {
            return;
        }
        let next = std::mem::replace(&mut self.tasks[task].scopes, scope);
        if next != NIL {
            self.scopes[next as usize].prev = scope;
        }
        let block = &mut self.scopes[scope as usize];
        (block.task, block.prev, block.next) = (task, NIL, next);
    }

    fn unlink_scope(&mut self, scope: u32) {
        let block = self.scopes[scope as usize];
        if block.task != NIL {
            self.bridge(&block);
            let block = &mut self.scopes[scope as usize];
            (block.task, block.prev, block.next) = (NIL, NIL, NIL);
        }
    }

    /// Links the neighbours of a task's scope with each other.
    fn bridge(&mut self, block: &Scope) {
        match block.prev {
            NIL => self.tasks[block.task].scopes = block.next,
            prev => self.scopes[prev as usize].next = block.next,
        }
        if block.next != NIL {
            self.scopes[block.next as usize].prev = block.prev;
        }
    }

    /// A task ended: scopes that outlive it belong to nobody, until a task polls them.
    pub(crate) fn orphan_scopes(&mut self, task: u32) {
        while self.tasks[task].scopes != NIL {
            self.unlink_scope(self.tasks[task].scopes);
        }
    }
}
