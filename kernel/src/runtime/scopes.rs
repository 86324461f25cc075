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
//!
//! A scope is a node: its `scope` is the one around it, its `key` the deadline, and so a timeout block that is left in time, as
//! nearly all are, costs one node and the way into a list and out.

use super::nodes::{NIL, Node, Phase, ROOT, Term};
use super::task::Flags;
use super::{Aftermath, State};
use crate::error::Interrupt;

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

impl State {
    /// Opens a timeout block of the current task, inside the current scope.
    #[inline]
    pub(crate) fn open_block(&mut self, deadline: Option<u64>) -> u32 {
        let block = self.open_scope(Node::block(self.scope, deadline, self.nowhere));
        if deadline.is_some() {
            self.wheel.arm(&mut self.nodes, block);
        }
        block
    }

    /// Opens a shield of the current task, inside the current scope.
    pub(crate) fn open_shield(&mut self) -> u32 {
        self.open_scope(Node::shield(self.scope, self.nowhere))
    }

    #[inline]
    fn open_scope(&mut self, scope: Node) -> u32 {
        self.nodes.reserve();
        let id = match self.tasks.get_mut(self.current) {
            Some(slot) => self.nodes.insert_for(self.current, &mut slot.scopes, scope),
            None => self.nodes.place(scope),
        };
        id.expect("there is a free node")
    }

    /// When the first of a task's timeout blocks ends.
    pub(super) fn next_timeout(&self, task: u32) -> Option<u64> {
        let mut scope = self.tasks[task].scopes;
        let mut first: Option<u64> = None;
        while scope != NIL {
            let block = &self.nodes[scope];
            if block.term() == Term::Running {
                first = Some(first.map_or(block.key, |first| first.min(block.key)));
            }
            scope = block.task_next;
        }
        first
    }

    /// Makes `scope` the current one and returns the one that was.
    #[inline]
    pub(crate) fn enter_scope(&mut self, scope: u32) -> u32 {
        if self.nodes[scope].task() != self.current {
            self.adopt_scope(scope);
        }
        self.nodes[scope].set_scope(self.scope);
        std::mem::replace(&mut self.scope, scope)
    }

    /// Makes the scope around a block current again.
    pub(crate) fn leave_scope(&mut self, outer: u32) {
        self.scope = outer;
    }

    /// The block's future was moved to another task.
    #[cold]
    fn adopt_scope(&mut self, scope: u32) {
        self.unlink_scope(scope);
        match self.tasks.get_mut(self.current) {
            Some(slot) => self
                .nodes
                .link_to_task(scope, self.current, &mut slot.scopes),
            None => self.nodes[scope].orphan(),
        }
    }

    /// Ends a scope.
    #[inline]
    pub(crate) fn close_scope(&mut self, scope: u32) {
        let node = &self.nodes[scope];
        let (task, parent) = (node.task(), node.scope());
        if node.term() == Term::Running {
            self.cancel_timer(scope);
        }
        self.unlink_scope(scope);
        self.nodes.put_back(scope);
        let Some(slot) = self.tasks.get(task) else {
            return;
        };
        let has_pending = slot.flags.has(Flags::PENDING);
        if slot.waits != NIL || slot.scopes != NIL {
            self.hand_over(task, scope, parent);
        }
        if has_pending {
            self.refresh_pending(task);
        }
    }

    /// Leaves and blocks that were created inside a scope and moved out live on in the scope around.
    #[inline(never)]
    fn hand_over(&mut self, task: u32, scope: u32, parent: u32) {
        let slot = &self.tasks[task];
        for first in [slot.waits, slot.scopes] {
            let mut node = first;
            while node != NIL {
                if self.nodes[node].scope() == scope {
                    self.nodes[node].set_scope(parent);
                }
                node = self.nodes[node].task_next;
            }
        }
    }

    /// Ends a timeout block whose body came to its end; `timed_out` says that the body's result is a timeout's interrupt.
    #[inline]
    pub(crate) fn exit_timeout(&mut self, scope: u32, timed_out: bool) -> Verdict {
        let block = &self.nodes[scope];
        // Curio's "badness". Reading the clock at the end of every block is too much to ask of a release.
        let is_overdue =
            cfg!(debug_assertions) && block.term() == Term::Running && block.key <= self.time();
        if timed_out || is_overdue || block.scope() != ROOT || block.term() != Term::Running {
            return self.exit_with_care(scope, timed_out, is_overdue);
        }
        self.close_scope(scope);
        Verdict::Keep
    }

    /// As `exit_timeout`, of a block that has run out, or may have, or stands in others.
    #[inline(never)]
    fn exit_with_care(&mut self, scope: u32, timed_out: bool, is_overdue: bool) -> Verdict {
        let block = &self.nodes[scope];
        let (task, term, rearms) = (block.task(), block.term(), block.rearms());
        let mut enclosing = None;
        let mut outer = block.scope();
        while outer != ROOT {
            let around = &self.nodes[outer];
            if !around.is_scope() || around.is_shield() {
                break;
            }
            if matches!(around.term(), Term::Fired | Term::Told) {
                enclosing = Some(outer);
            }
            outer = around.scope();
        }
        self.close_scope(scope);
        if let Some(outer) = enclosing
            && rearms
        {
            // R7
            self.nodes[outer].set_term(Term::Fired);
            if let Some(slot) = self.tasks.get_mut(task) {
                slot.flags.set(Flags::PENDING);
            }
        }
        let has_fired = matches!(term, Term::Fired | Term::Told);
        match (timed_out, enclosing, has_fired) {
            (true, Some(_), _) => Verdict::Enclosing,
            (true, None, true) => Verdict::Expired,
            (true, None, false) => Verdict::Uncaught,
            (false, _, _) => {
                if is_overdue || term == Term::Fired {
                    let text = "a timeout block ended after its deadline without having blocked since; its result stands";
                    self.aftermath
                        .push(Aftermath::Log(log::Level::Warn, text.into()));
                }
                Verdict::Keep
            }
        }
    }

    /// The deadline of a block ran out; it is off the wheel.
    pub(crate) fn fire_deadline(&mut self, scope: u32) {
        self.nodes[scope].set_term(Term::Fired);
        let Some(slot) = self.tasks.get(self.nodes[scope].task()) else {
            return;
        };
        let mut inner = slot.scopes;
        while inner != NIL {
            if inner != scope && self.reaches(inner, scope) {
                self.nodes[inner].set_rearms(true);
            }
            inner = self.nodes[inner].task_next;
        }
        self.fire_scope(self.nodes[scope].task(), scope);
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
            if self.reaches(scope, ROOT) {
                self.disarm(scope);
                let block = &mut self.nodes[scope];
                if block.term() == Term::Fired {
                    block.set_term(Term::Off);
                }
                block.set_rearms(false);
            }
            scope = self.nodes[scope].task_next;
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
        if fired == ROOT {
            self.interrupt_note(task);
        }
    }

    /// Whether a firing of `outer` is felt in `scope`: it is the same or around it, and no shield stands between.
    fn reaches(&self, mut scope: u32, outer: u32) -> bool {
        while scope != outer {
            if scope == ROOT {
                return false;
            }
            let inner = &self.nodes[scope];
            // It need not be a scope still: a leaf may have been moved out of one, to another task, before that one was closed.
            if !inner.is_scope() || inner.is_shield() {
                return false;
            }
            scope = inner.scope();
        }
        true
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
        if self.nodes[node].key as u32 == ROOT {
            return self.cancellation();
        }
        self.tell(self.scope);
        Interrupt::TaskTimeout
    }

    /// That of a leaf that was interrupted because its task was cancelled.
    pub(crate) fn cancellation(&mut self) -> Interrupt {
        self.tell(self.scope);
        self.reason(self.current)
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
        slot.flags.set(Flags::CANCEL_DELIVERED);
        slot.flags.clear(Flags::PENDING);
        let mut scope = slot.scopes;
        while scope != NIL {
            let block = &mut self.nodes[scope];
            if block.term() == Term::Fired {
                block.set_term(Term::Told);
            }
            scope = block.task_next;
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
            let block = &mut self.nodes[scope];
            if block.is_shield() {
                break;
            }
            if block.term() == Term::Fired {
                block.set_term(Term::Told);
                found = Some(Interrupt::TaskTimeout);
            }
            scope = block.scope();
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
            let block = &self.nodes[scope];
            untold |= block.term() == Term::Fired;
            scope = block.task_next;
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

    /// Takes a scope's deadline away, if one runs.
    #[inline]
    fn disarm(&mut self, scope: u32) {
        if self.nodes[scope].term() == Term::Running {
            self.cancel_timer(scope);
            self.nodes[scope].set_term(Term::Off);
        }
    }

    /// Takes a scope out of its task's list.
    #[inline]
    fn unlink_scope(&mut self, scope: u32) {
        if let Some(slot) = self.tasks.get_mut(self.nodes[scope].task()) {
            self.nodes.unlink_from_task(scope, &mut slot.scopes);
        }
    }

    /// A task ended: scopes that outlive it belong to nobody, until a task polls them.
    pub(crate) fn orphan_scopes(&mut self, task: u32) {
        while self.tasks[task].scopes != NIL {
            let scope = self.tasks[task].scopes;
            self.unlink_scope(scope);
            self.nodes[scope].orphan();
        }
    }
}
