//! The tables of a kernel, and what happens to them. Nothing here calls user code: what is to be woken or dropped is left in `aftermath`.

use std::collections::HashMap;
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use super::board::Board;
use super::clock::Clock;
use super::inbox::Ticket;
use super::joins::Noted;
use super::nodes::{NIL, NOBODY, Node, Nodes, Phase, Term, WaitKind};
use super::reactor::Reactor;
use super::readiness::Direction;
use super::ready::Ready;
use super::task::{BodyRef, Flags, Tasks};
use super::waker::Word;
use super::wheel::{DUE, Due, Wheel};
use crate::error::Interrupt;
use crate::local::Locals;
use crate::task::{TaskId, TaskInfo, TaskState};

/// The tables. Every method leaves them consistent; none calls user code.
pub(crate) struct State {
    pub(crate) tasks: Tasks,
    pub(super) ready: Ready,
    pub(crate) nodes: Nodes,
    /// The lot of those who wait until no other task can run.
    pub(crate) idle: u32,
    pub(super) wheel: Wheel,
    pub(crate) reactor: Reactor,
    pub(super) clock: Box<dyn Clock>,
    pub(super) epoch: Instant,
    /// When timers were last looked at: every timer that has fired had run out by then.
    pub(crate) fired_at: Instant,
    /// The kernel's id, as its bodies have it.
    pub(super) id: u16,
    /// The kernel's serial number, as in `Core`.
    pub(crate) serial: u32,
    /// Slot of the task that is being polled.
    pub(crate) current: u32,
    /// The scope whose block is being polled.
    pub(super) scope: u32,
    /// Whose call is being polled: all its waits are said to be there.
    pub(super) caller: Option<&'static Location<'static>>,
    /// What is pending for the current task is held back by a shield, so that it may block all the same.
    pub(super) is_shielded: bool,
    /// Why tasks were cancelled, by slot.
    pub(super) reasons: HashMap<u32, Interrupt>,
    /// Joins without a node, by the slot of the task that waits.
    pub(super) noted: Vec<Noted>,
    pub(super) names: HashMap<u64, Rc<str>>,
    /// Shows the names to other threads.
    pub(super) board: Option<Arc<Board>>,
    /// The task-local values of those that have some, by slot.
    pub(super) locals: HashMap<u32, Locals>,
    /// User code to run once no table is borrowed.
    pub(super) aftermath: Vec<Aftermath>,
    pub(super) due: Vec<Due>,
    pub(super) last_serial: u64,
    /// How many waits depend on an answer from another thread.
    pub(super) remote_waits: usize,
    /// No task starts any more.
    pub(super) closed: bool,
    pub(super) nowhere: &'static Location<'static>,
}

/// Saturating: 584 years are for ever.
pub(crate) const fn nanos(duration: Duration) -> u64 {
    let seconds = duration.as_secs().saturating_mul(1_000_000_000);
    seconds.saturating_add(duration.subsec_nanos() as u64)
}

pub(super) enum Aftermath {
    Wake(Waker),
    Drop(Waker),
    /// Its reason is a user's value.
    Forget(Interrupt),
    /// Users' values too.
    Discard(Locals),
    /// Loggers are user code too: one that shows the current task asks the kernel for it.
    Log(log::Level, String),
}

impl State {
    /// The id of the task that is being polled, 0 if none is.
    pub(super) fn running(&self) -> u64 {
        let slot = self.tasks.get(self.current);
        let body = slot.and_then(|slot| slot.body.as_ref());
        body.map_or(0, |body| body.id)
    }

    /// Nanoseconds since the kernel's epoch.
    pub(crate) fn time(&self) -> u64 {
        self.ticks(self.clock.now())
    }

    pub(crate) fn now(&self) -> Instant {
        self.clock.now()
    }

    pub(crate) fn ticks(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.epoch))
    }

    /// The time so many nanoseconds from now.
    pub(crate) fn after(&self, nanos: u64) -> u64 {
        self.time().saturating_add(nanos)
    }

    pub(super) fn instant(&self, ticks: u64) -> Instant {
        self.epoch + Duration::from_nanos(ticks)
    }

    /// A wait of the current task, in its list of waits and in no queue yet. `None` if the task may not block or the table is full,
    /// see [`Core::open_wait`].
    #[inline]
    pub(crate) fn open_wait(
        &mut self,
        kind: WaitKind,
        key: u64,
        at: &'static Location<'static>,
    ) -> Option<u32> {
        let slot = self.tasks.get_mut(self.current)?;
        if slot.flags.has(Flags::PENDING) && !self.is_shielded {
            return None;
        }
        let node = Node::new(kind, self.scope, key, self.caller.unwrap_or(at));
        self.nodes.insert_for(self.current, &mut slot.waits, node)
    }

    /// Makes `caller` the place of all waits that are opened until [`leave_call`](Self::leave_call). False if a call around has one already.
    pub(crate) fn enter_call(&mut self, caller: &'static Location<'static>) -> bool {
        let is_outermost = self.caller.is_none();
        self.caller.get_or_insert(caller);
        is_outermost
    }

    pub(crate) fn leave_call(&mut self) {
        self.caller = None;
    }

    /// A wait of the current task for a time.
    #[inline]
    pub(crate) fn open_sleep(
        &mut self,
        deadline: u64,
        at: &'static Location<'static>,
    ) -> Option<u32> {
        let node = self.open_wait(WaitKind::Sleep, deadline, at)?;
        self.wheel.arm(&mut self.nodes, node);
        Some(node)
    }

    /// A wait that another thread will answer.
    pub(crate) fn arm_remote(&mut self, node: u32) -> Ticket {
        self.last_serial += 1;
        self.remote_waits += 1;
        self.nodes[node].key = self.last_serial;
        Ticket {
            node,
            serial: self.last_serial,
        }
    }

    /// Completes an armed wait that has left its queue.
    #[inline(always)]
    pub(crate) fn fire(&mut self, node: u32) {
        self.settle(node, Phase::Fired);
    }

    /// Notes how an armed wait that has left its queue ended, and calls the waker of its leaf: its own if it was polled with one, else its task's.
    #[inline(always)]
    pub(super) fn settle(&mut self, id: u32, phase: Phase) {
        let node = &mut self.nodes[id];
        node.set_phase(phase);
        let task = node.task();
        if node.is_foreign() {
            self.wake_foreign(id);
        } else {
            self.wake(task);
        }
    }

    /// Makes the task of a wait ready.
    #[inline(always)]
    pub(super) fn wake(&mut self, task: u32) {
        if !self.aftermath.is_empty() {
            self.wake_in_turn(task);
        } else if task != NOBODY {
            self.make_ready(task);
        }
    }

    /// Makes a task ready behind those that foreign wakers, which are still to be called, will make ready.
    #[cold]
    fn wake_in_turn(&mut self, task: u32) {
        if let Some(slot) = self.tasks.get(task)
            && let Some(body) = &slot.body
        {
            let word = Word::new(body.kernel, slot.flags.generation(), task);
            self.aftermath.push(Aftermath::Wake(word.waker()));
        }
    }

    #[cold]
    pub(super) fn wake_foreign(&mut self, node: u32) {
        let waker = self.nodes.take_waker(node);
        self.aftermath.extend(waker.map(Aftermath::Wake));
    }

    /// Wakes up to `count` tasks of a lot, the longest waiting first.
    pub(crate) fn unpark(&mut self, lot: u32, count: usize) -> usize {
        (0..count)
            .position(|_| !self.unpark_one(lot))
            .unwrap_or(count)
    }

    /// Wakes the task of a lot that waits longest. False if it is empty.
    #[inline]
    pub(crate) fn unpark_one(&mut self, lot: u32) -> bool {
        match self.nodes.unpark(lot) {
            Some(node) => {
                self.fire(node);
                true
            }
            None => false,
        }
    }

    /// Opens an empty lot.
    pub(crate) fn open_lot(&mut self) -> u32 {
        self.nodes.open_lot(self.nowhere)
    }

    pub(super) fn has_idle_waits(&self) -> bool {
        !self.nodes.is_vacant(self.idle)
    }

    /// Wakes those who wait until no other task can run, if none can.
    pub(super) fn fire_idle(&mut self) {
        if self.ready.is_empty() {
            self.unpark(self.idle, usize::MAX);
        }
    }

    /// Drops a lot; whoever still waits in it is told so.
    pub(crate) fn close_lot(&mut self, lot: u32) {
        while let Some(node) = self.nodes.unpark(lot) {
            self.settle(node, Phase::Closed);
        }
        self.nodes.close_lot(lot);
    }

    /// An answer from another thread; a late one finds its wait gone.
    pub(super) fn complete(&mut self, ticket: Ticket) {
        let Some(node) = self.nodes.get(ticket.node) else {
            return;
        };
        if node.kind() == WaitKind::Remote
            && node.key == ticket.serial
            && node.phase() == Phase::Armed
        {
            self.remote_waits -= 1;
            self.fire(ticket.node);
        }
    }

    #[inline]
    pub(crate) fn make_ready(&mut self, task: u32) {
        self.ready.queue(task, &mut self.tasks[task].flags);
    }

    /// Takes an armed wait out of the queue that would fire it.
    pub(super) fn detach(&mut self, node: u32) {
        let key = self.nodes[node].key;
        match self.nodes[node].kind() {
            WaitKind::Sleep => self.cancel_timer(node),
            WaitKind::Read => self.reactor.remove_waiter(key, Direction::Read),
            WaitKind::Write => self.reactor.remove_waiter(key, Direction::Write),
            WaitKind::Remote => self.remote_waits -= 1,
            WaitKind::Join => self.disarm_join(node),
            WaitKind::Foreign => {}
            kind => {
                debug_assert!(kind.is_parked());
                self.nodes.leave_lot(node);
            }
        }
    }

    /// Takes a timer off the wheel, if it is still there.
    #[inline]
    pub(super) fn cancel_timer(&mut self, node: u32) {
        if self.nodes[node].prev != DUE {
            self.wheel.cancel(&mut self.nodes, node);
        }
    }

    /// Ends a wait, wherever it stands.
    pub(crate) fn release(&mut self, node: u32) {
        if self.nodes[node].phase() == Phase::Armed {
            self.detach(node);
        }
        self.free(node);
    }

    /// Ends a wait if it has been fired.
    #[inline(always)]
    pub(crate) fn collect(&mut self, node: u32) -> bool {
        let fired = &self.nodes[node];
        if fired.phase() != Phase::Fired {
            return false;
        }
        // Its waker, had it one of its own, was taken to be woken.
        let task = fired.task();
        self.nodes.put_back(node);
        if let Some(slot) = self.tasks.get_mut(task) {
            self.nodes.unlink_from_task(node, &mut slot.waits);
        }
        true
    }

    /// Frees a leaf's node that is in no queue any more.
    pub(super) fn free(&mut self, node: u32) {
        self.unlink_wait(node);
        if let Some(waker) = self.nodes.remove(node) {
            self.drop_later(waker);
        }
    }

    /// Takes a leaf's node out of its task's list.
    #[inline(always)]
    fn unlink_wait(&mut self, node: u32) {
        if let Some(slot) = self.tasks.get_mut(self.nodes[node].task()) {
            self.nodes.unlink_from_task(node, &mut slot.waits);
        }
    }

    #[cold]
    pub(super) fn drop_later(&mut self, waker: Waker) {
        self.aftermath.push(Aftermath::Drop(waker));
    }

    /// Whether a wait is armed for the current task, its own waker and the current scope.
    #[inline]
    pub(super) fn still_waits(&self, node: u32) -> bool {
        let node = &self.nodes[node];
        node.phase() == Phase::Armed
            && node.task() == self.current
            && node.scope() == self.scope
            && !node.is_foreign()
    }

    /// Notes by which task and in which scope a leaf that waits was polled.
    pub(crate) fn refresh_wait(&mut self, node: u32) {
        let task = self.nodes[node].task();
        if task != self.current {
            // The leaf was moved to another task since it was armed.
            self.unlink_wait(node);
            let waits = &mut self.tasks[self.current].waits;
            self.nodes.link_to_task(node, self.current, waits);
        }
        self.nodes[node].set_scope(self.scope);
    }

    /// Notes with which waker a leaf that waits was polled, if that is not the task's own.
    pub(crate) fn set_waker(&mut self, node: u32, foreign: Option<Waker>) {
        let replaced = match foreign {
            None => self.nodes.take_waker(node),
            Some(waker) => self.nodes.set_waker(node, waker),
        };
        self.aftermath.extend(replaced.map(Aftermath::Drop));
        if self.nodes[node].phase() != Phase::Armed {
            // It was fired while its waker was cloned, which is user code.
            self.wake_foreign(node);
        }
    }

    pub(super) fn fire_timers(&mut self) {
        if self.wheel.is_empty() {
            return;
        }
        self.fired_at = self.now();
        let now = self.ticks(self.fired_at);
        let mut due = std::mem::take(&mut self.due);
        self.wheel.expire(&mut self.nodes, now, &mut due);
        // In deadline order: a timeout that comes before a sleep of its body interrupts it, one that comes after finds it done.
        for (_, timer) in due.drain(..) {
            let node = &self.nodes[timer];
            match node.is_scope() {
                true if node.term() == Term::Running => self.fire_deadline(timer),
                false if node.phase() == Phase::Armed => self.fire(timer),
                _ => {}
            }
        }
        self.due = due;
    }

    /// A slot for a new task, and a place at the end of the ready queue.
    #[inline(always)]
    pub(super) fn admit(&mut self, body: &BodyRef) -> u32 {
        let slot = match self.tasks.reuse(body) {
            Some(slot) => slot,
            None => self.admit_anew(body),
        };
        self.ready.push(slot);
        slot
    }

    /// The ready queue has room for every slot.
    #[cold]
    fn admit_anew(&mut self, body: &BodyRef) -> u32 {
        let slot = self.tasks.push(body);
        self.ready.reserve(self.tasks.capacity());
        slot
    }

    /// Ends a task: its slot is free, whoever joined it is woken. The caller drops the body once no table is borrowed.
    #[must_use]
    #[inline(never)]
    pub(super) fn finish(&mut self, task: u32) -> BodyRef {
        let slot = &self.tasks[task];
        if slot.leaves_more() {
            return self.strip_and_finish(task);
        }
        let joiners = slot.joiners;
        if joiners != NIL && !self.fire_note(joiners) {
            return self.fire_joiners_and_finish(task);
        }
        self.tasks.retire(task)
    }

    /// Ends a task for whose end more wait than one noted joiner.
    #[inline(never)]
    fn fire_joiners_and_finish(&mut self, task: u32) -> BodyRef {
        let joiners = self.tasks[task].joiners;
        let body = self.tasks.retire(task);
        self.fire_joiners(joiners, &body);
        body
    }

    /// Cuts what a task that ends leaves behind, and ends it.
    #[cold]
    fn strip_and_finish(&mut self, task: u32) -> BodyRef {
        while self.tasks[task].waits != NIL {
            // A leaf that was moved out of the future and outlives the task; whoever polls it next takes it over.
            let node = self.tasks[task].waits;
            self.unlink_wait(node);
            self.nodes[node].orphan();
        }
        self.orphan_scopes(task);
        self.orphan_note(task);
        if self.tasks[task].flags.has(Flags::CANCELLED) {
            let reason = self.reasons.remove(&task);
            self.forget(reason);
        }
        if self.tasks[task].flags.has(Flags::NAMED) {
            let body = self.tasks[task].body.as_ref();
            let id = body.expect("it is about to end").id;
            self.names.remove(&id);
            if let Some(board) = &self.board {
                board.forget_name(id);
            }
        }
        if self.tasks[task].flags.has(Flags::LOCALS) {
            let locals = self.locals.remove(&task);
            self.aftermath.extend(locals.map(Aftermath::Discard));
        }
        self.tasks[task].flags.clear(Flags::LEAVES_MORE);
        self.finish(task)
    }

    /// The task-local values of the current task, if it has any.
    pub(crate) fn locals(&self) -> Option<&Locals> {
        let has_some = self.tasks[self.current].flags.has(Flags::LOCALS);
        has_some.then(|| &self.locals[&self.current])
    }

    /// As `locals`, to be changed.
    pub(crate) fn locals_mut(&mut self) -> &mut Locals {
        self.tasks[self.current].flags.set(Flags::LOCALS);
        self.locals.entry(self.current).or_default()
    }

    /// Gives a task that the current one has just spawned the same values.
    #[cold]
    pub(super) fn inherit_locals(&mut self, child: u32) {
        if self.current != NIL
            && let Some(locals) = self.locals().cloned()
        {
            self.locals.insert(child, locals);
            self.tasks[child].flags.set(Flags::LOCALS);
        }
    }

    /// Drops an interrupt once no table is borrowed.
    pub(super) fn forget(&mut self, interrupt: Option<Interrupt>) {
        self.aftermath.extend(interrupt.map(Aftermath::Forget));
    }

    pub(crate) fn set_name(&mut self, task: u32, name: Rc<str>) {
        let slot = &mut self.tasks[task];
        slot.flags.set(Flags::NAMED);
        let body = slot.body.as_ref().expect("only live tasks are named");
        if let Some(board) = &self.board {
            board.set_name(body.id, &name);
        }
        self.names.insert(body.id, name);
    }

    pub(crate) fn name(&self, task: u64) -> Option<Rc<str>> {
        self.names.get(&task).cloned()
    }

    pub(crate) fn info(&self, task: u32) -> TaskInfo {
        let slot = &self.tasks[task];
        let body = slot.body.as_ref().expect("only live tasks are described");
        let mut waits = Vec::new();
        let mut node = slot.waits;
        while node != NIL {
            waits.push((self.nodes[node].kind(), self.nodes[node].at));
            node = self.nodes[node].task_next;
        }
        waits.extend(self.noted_at(task).map(|at| (WaitKind::Join, at)));
        let state = match (task == self.current, slot.flags.has(Flags::QUEUED)) {
            _ if !body.is_live() => TaskState::Terminated, // an observer looks at its end
            (true, _) => TaskState::Running,
            (_, true) => TaskState::Ready,
            _ => TaskState::Waiting,
        };
        TaskInfo {
            id: TaskId(body.id),
            parent: (body.parent != 0).then_some(TaskId(body.parent)),
            name: self.name(body.id).map(|name| name.to_string()),
            state,
            waits,
            cycles: body.cycles.get(),
            cancelled: body.is_cancelled(),
            spawned_at: body.spawned_at,
        }
    }

    /// Every live task, in the order of their ids.
    pub(crate) fn dump(&self) -> Vec<TaskInfo> {
        let mut tasks: Vec<_> = self.tasks.iter().map(|(slot, _)| self.info(slot)).collect();
        tasks.sort_by_key(|task| task.id);
        tasks
    }

    /// Whether nothing can ever happen again: no task is ready, no timer armed, no I/O or thread waited for, and no waker is out of our sight.
    pub(super) fn is_stuck(&self) -> bool {
        self.ready.is_empty()
            && self.wheel.is_empty()
            && self.reactor.waiting() == 0
            && self.remote_waits == 0
            && !self.has_idle_waits()
            && self
                .tasks
                .iter()
                .all(|(_, slot)| !slot.flags.has(Flags::ESCAPED))
    }

    /// Whether the waker's task still has its slot.
    pub(super) fn is_current(&self, word: Word) -> bool {
        self.tasks
            .get(word.slot())
            .is_some_and(|slot| slot.body.is_some() && word.fits(slot.flags.generation()))
    }

    /// Every live task, the newest first.
    pub(super) fn bodies(&self) -> Vec<BodyRef> {
        let mut bodies: Vec<_> = self
            .tasks
            .iter()
            .filter_map(|(_, slot)| slot.body.clone())
            .collect();
        bodies.sort_by_key(|body| std::cmp::Reverse(body.id));
        bodies
    }
}
