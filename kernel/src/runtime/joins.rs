//! Joins: who waits for a task's end.
//!
//! Those who wait for a task stand in a ring of nodes; its slot leads to the first. When the task ends, their nodes go with it (see
//! `Header::has_freed_joiners`), and so a leaf learns from the body that its wait is over and looks into no table.
//!
//! **A noted join** has no node. Mostly one task waits for another, with its own waker, in no timeout block and for nothing else. Then the
//! slot of the task that is waited for names the one that waits, and what a node would say besides, [`Noted`] does. Later ones stand in a ring behind it.
//! Its leaf keeps no number. It need not, for the body of the task that is waited for tells what became of the note:
//!
//! - it was *interrupted*, says a mark;
//! - or the task has ended, and so has the wait;
//! - or the slot holds a note: that is the leaf's own, and it still waits;
//! - or it holds none: the leaf outlived the task that waited, and whoever polls it now waits anew.
//!
//! That a note is the leaf's own rests on this: a task whose note was taken away by another than its leaf, be it by an interrupt or by the end of the
//! task that waited, is never noted again. (`keeps_joiners` says so: once a wait for it was given up, all wait with nodes.)

use std::panic::Location;

use super::State;
use super::nodes::{NIL, Node, Phase, ROOT, WaitKind};
use super::task::{BodyRef, Flags};
use crate::error::Interrupt;

/// The join of a task that waits without a node.
#[derive(Clone)]
pub(crate) struct Noted {
    /// Slot of the task that is waited for.
    task: u32,
    /// First in the ring of those who wait for it too.
    others: u32,
    at: &'static Location<'static>,
}

/// What became of a noted join.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NoteState {
    Waits,
    /// The task that it waits for has ended.
    Ended,
    /// It must wait anew.
    Gone,
}

/// In `Slot::joiners`, beside the slot of the task whose join is noted. No node has it in its number.
const NOTE: u32 = 1 << 30;

/// Whose join is noted, if `joiners` does not lead to a node.
fn noted_joiner(joiners: u32) -> Option<u32> {
    (joiners & (NOTE | 1 << 31) == NOTE).then_some(joiners & !NOTE)
}

impl State {
    /// Notes that the current task waits for another one's end. False if that takes a node, or room for the note.
    ///
    /// No index is out of bounds in here, which the compiler cannot know; `get_mut` spares it to save registers for a panic.
    #[inline(always)]
    pub(crate) fn note_join(&mut self, body: &BodyRef, at: &'static Location<'static>) -> bool {
        let joiner = self.current;
        let Some(slot) = self.tasks.get_mut(joiner) else {
            return false;
        };
        if slot.waits != NIL
            || slot.flags.has(Flags::PENDING.and(Flags::JOINS))
            || self.scope != ROOT
            || body.kernel != self.id
            || body.keeps_joiners()
        {
            return false;
        }
        let Some(noted) = self.noted.get_mut(joiner as usize) else {
            return false;
        };
        let task = body.slot.get();
        match self.tasks.get_mut(task) {
            Some(slot) if slot.joiners == NIL => slot.joiners = NOTE | joiner,
            _ => return false,
        }
        *noted = Noted {
            task,
            others: NIL,
            at: self.caller.unwrap_or(at),
        };
        if let Some(slot) = self.tasks.get_mut(joiner) {
            slot.flags.set(Flags::JOINS);
        }
        true
    }

    /// Makes room for a note of the current task; false if there is.
    pub(crate) fn make_room_for_note(&mut self) -> bool {
        let joiner = self.current as usize;
        let lacks_room = (self.noted.len()..self.tasks.capacity()).contains(&joiner);
        if lacks_room {
            let nothing = Noted {
                task: NIL,
                others: NIL,
                at: self.nowhere,
            };
            self.noted.resize(joiner + 1, nothing);
        }
        lacks_room
    }

    /// Where the task awaits its noted join, if it has one.
    pub(super) fn noted_at(&self, task: u32) -> Option<&'static Location<'static>> {
        let joins = self.tasks[task].flags.has(Flags::JOINS);
        joins.then(|| self.noted[task as usize].at)
    }

    /// What became of the noted join for a task's end, whose leaf is polled: with the waker of its task if it `is_own`.
    pub(crate) fn look_at_note(
        &mut self,
        body: &BodyRef,
        is_own: bool,
    ) -> Result<NoteState, Interrupt> {
        if body.has_lost_join() {
            return Err(self.cancellation());
        }
        if !body.is_live() {
            return Ok(NoteState::Ended);
        }
        let task = body.slot.get();
        let joiner = noted_joiner(self.tasks[task].joiners);
        if is_own && joiner == Some(self.current) && self.scope == ROOT {
            return Ok(NoteState::Waits);
        }
        // By another task, with another waker or in a timeout block it waits with a node.
        self.take_note(task);
        Ok(NoteState::Gone)
    }

    /// The leaf of a noted join is dropped.
    pub(crate) fn drop_note(&mut self, body: &BodyRef) {
        if body.is_live() {
            self.take_note(body.slot.get());
        }
    }

    /// Takes the note away, if there is one.
    fn take_note(&mut self, task: u32) {
        let joiners = &mut self.tasks[task].joiners;
        if let Some(joiner) = noted_joiner(*joiners) {
            *joiners = self.noted[joiner as usize].others;
            self.tasks[joiner].flags.clear(Flags::JOINS);
        }
    }

    /// Takes the note of `joiner` away, which its leaf does not know of.
    fn revoke_note(&mut self, joiner: u32) -> &BodyRef {
        let task = self.noted[joiner as usize].task;
        self.take_note(task);
        let body = self.tasks[task].body.as_ref();
        let body = body.expect("only a live task is waited for");
        body.keep_joiners();
        body
    }

    /// The task was cancelled (R3): so is its noted join.
    pub(super) fn interrupt_note(&mut self, joiner: u32) {
        if self.tasks[joiner].flags.has(Flags::JOINS) {
            self.revoke_note(joiner).lose_join();
            self.wake(joiner);
        }
    }

    /// The task has ended, and the leaf of its join has not.
    pub(super) fn orphan_note(&mut self, joiner: u32) {
        if self.tasks[joiner].flags.has(Flags::JOINS) {
            self.revoke_note(joiner);
        }
    }

    /// A wait of the current task for another one's end, at the end of the ring of those who wait for it.
    #[inline]
    pub(crate) fn open_join(
        &mut self,
        body: &BodyRef,
        at: &'static Location<'static>,
    ) -> Option<u32> {
        assert!(
            body.kernel == self.id,
            "a task of one kernel was waited for in another"
        );
        let task = body.slot.get();
        let node = self.open_wait(WaitKind::Join, u64::from(task), at)?;
        let first = self.ring(task);
        match *first {
            NIL => *first = node,
            first => self.nodes.park(node, first),
        }
        Some(node)
    }

    /// The first node in the ring of those who wait for the task's end.
    fn ring(&mut self, task: u32) -> &mut u32 {
        let joiners = &mut self.tasks[task].joiners;
        match noted_joiner(*joiners) {
            Some(joiner) => &mut self.noted[joiner as usize].others,
            None => joiners,
        }
    }

    /// A wait whose node must not go while user code runs: the task that is waited for may end in it.
    pub(crate) fn keep_at_end(&self, node: u32) {
        let node = &self.nodes[node];
        if (node.kind(), node.phase()) == (WaitKind::Join, Phase::Armed) {
            let body = self.tasks[node.key as u32].body.as_ref();
            body.expect("only a live task is waited for").keep_joiners();
        }
    }

    pub(super) fn disarm_join(&mut self, node: u32) {
        let Node { next, key, .. } = self.nodes[node];
        let task = key as u32;
        self.nodes.leave_lot(node);
        let first = self.ring(task);
        if *first == node {
            *first = if next == node { NIL } else { next };
        }
        let body = self.tasks[task].body.as_ref();
        body.expect("only a live task is waited for").keep_joiners();
    }

    /// Fires the one who waits for a task's end, if it is a noted joiner, and the only one. False if there is more to it.
    #[inline(always)]
    pub(super) fn fire_note(&mut self, joiners: u32) -> bool {
        let Some(joiner) = noted_joiner(joiners) else {
            return false;
        };
        let noted = self.noted.get(joiner as usize);
        let is_only_one = noted.is_some_and(|noted| noted.others == NIL);
        if !is_only_one || !self.aftermath.is_empty() {
            return false;
        }
        let Some(slot) = self.tasks.get_mut(joiner) else {
            return false; // it is there, as above
        };
        slot.flags.clear(Flags::JOINS);
        self.ready.queue(joiner, &mut slot.flags);
        true
    }

    /// Fires those who waited for the end of `body`'s task.
    pub(super) fn fire_joiners(&mut self, joiners: u32, body: &BodyRef) {
        let first = match noted_joiner(joiners) {
            None => joiners,
            Some(joiner) => {
                self.tasks[joiner].flags.clear(Flags::JOINS);
                self.wake(joiner);
                self.noted[joiner as usize].others
            }
        };
        if first != NIL {
            self.fire_ring(first, body);
        }
    }

    /// In the order in which they came.
    fn fire_ring(&mut self, first: u32, body: &BodyRef) {
        let mut node = first;
        loop {
            let next = self.nodes[node].next;
            self.fire(node);
            if !body.keeps_joiners() {
                self.free(node);
            }
            if next == first {
                return;
            }
            node = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::future::pending;
    use std::pin::Pin;
    use std::rc::Rc;
    use std::time::Duration;

    use futures::poll;
    use futures::stream::{FuturesUnordered, StreamExt};

    use super::*;
    use crate::traps::JoinWait;
    use crate::{
        Builder, TaskRef, VirtualClock, current_task, spawn, timeout_after, wait_until_idle,
        yield_now,
    };

    /// Runs `main`, and the tables are empty afterwards.
    fn run(main: impl Future<Output = ()>) {
        let clock = VirtualClock::new();
        let mut kernel = Builder::new().clock(clock).build().unwrap();
        kernel.run(main).unwrap();
        let state = kernel.core.state.borrow();
        assert_eq!((state.tasks.live(), state.nodes.live()), (0, 1));
    }

    fn live_nodes() -> usize {
        super::super::with_current(|core| core.unwrap().live_nodes())
    }

    fn waits(task: &TaskRef) -> Vec<WaitKind> {
        let waits = task.info().unwrap().waits;
        waits.into_iter().map(|(kind, _)| kind).collect()
    }

    /// A task that ends when it is told to.
    fn endless() -> crate::Task<()> {
        spawn(pending())
    }

    #[test]
    fn a_noted_join_has_no_node_and_is_shown() {
        run(async {
            let (task, before) = (endless(), live_nodes());
            let mut wait = task.wait();
            let line = line!() - 1;
            assert!(poll!(&mut wait).is_pending());
            assert_eq!(live_nodes(), before);
            let [(WaitKind::Join, at)] = current_task().info().unwrap().waits[..] else {
                panic!("it is not shown");
            };
            assert_eq!((at.file(), at.line()), (file!(), line));
            drop(wait);
            assert_eq!(waits(&current_task()), []);
            task.abort();
            assert_eq!(current_task().cycles(), 1);
            yield_now().await.unwrap();
            assert_eq!(current_task().cycles(), 2, "nothing else woke it");
        });
    }

    #[test]
    fn those_who_join_go_on_in_the_order_in_which_they_came() {
        run(async {
            let order = Rc::new(RefCell::new(Vec::new()));
            let task = endless();
            let joiners: Vec<_> = (0..4)
                .map(|n| {
                    let (wait, order) = (task.wait(), order.clone());
                    spawn(async move {
                        wait.await.unwrap();
                        order.borrow_mut().push(n);
                    })
                })
                .collect();
            wait_until_idle().await.unwrap();
            joiners[1].abort();
            task.abort();
            for joiner in &joiners {
                joiner.wait().await.unwrap();
            }
            assert_eq!(*order.borrow(), [0, 2, 3]);
        });
    }

    #[test]
    fn a_cancellation_interrupts_a_noted_join_once() {
        run(async {
            let task = endless();
            let target = task.to_ref();
            let joiner = spawn(async move {
                let first = target.wait().await;
                (first, target.wait().await)
            });
            wait_until_idle().await.unwrap();
            assert!(joiner.request_cancel(""));
            wait_until_idle().await.unwrap();
            assert_eq!(waits(&joiner), [WaitKind::Join], "the second, with a node");
            task.abort();
            let (first, second) = joiner.join().await.unwrap();
            assert!(matches!(first, Err(Interrupt::Cancelled(_))));
            second.unwrap();
        });
    }

    /// Polls a join in a task of its own and leaves it in the answer's place, for somebody else.
    async fn noted_elsewhere(task: &TaskRef, ends: bool) -> (Pin<Box<JoinWait>>, TaskRef) {
        let place = Rc::new(RefCell::new(None));
        let (wait, left) = (task.wait(), place.clone());
        let poller = spawn(async move {
            let mut wait = Box::pin(wait);
            assert!(poll!(wait.as_mut()).is_pending());
            *left.borrow_mut() = Some(wait);
            if !ends {
                pending::<()>().await;
            }
        });
        wait_until_idle().await.unwrap();
        (place.take().unwrap(), poller.to_ref())
    }

    #[test]
    fn a_noted_join_that_moves_to_another_task_is_that_ones() {
        for ends in [false, true] {
            run(async {
                let task = endless();
                let (wait, poller) = noted_elsewhere(&task, ends).await;
                assert_eq!(poller.is_terminated(), ends);
                let taker = spawn(wait);
                wait_until_idle().await.unwrap();
                assert_eq!(waits(&taker), [WaitKind::Join]);
                let before = poller.cycles();
                task.abort();
                taker.join().await.unwrap().unwrap();
                assert_eq!(poller.cycles(), before);
                poller.abort();
            });
        }
    }

    #[test]
    fn the_join_of_a_task_that_ended_does_not_take_the_note_of_another_with_it() {
        run(async {
            let task = endless();
            let (wait, _) = noted_elsewhere(&task, true).await;
            let joiner = spawn(task.wait());
            wait_until_idle().await.unwrap();
            drop(wait);
            assert_eq!(waits(&joiner), [WaitKind::Join]);
            task.abort();
            joiner.join().await.unwrap().unwrap();
        });
    }

    #[test]
    fn a_noted_join_ends_for_another_waker_and_in_a_timeout_block() {
        run(async {
            let [task, late] = [endless(), endless()];
            let mut waits: Vec<_> = [&task, &late].map(|task| Box::pin(task.wait())).into();
            assert!(poll!(waits[0].as_mut()).is_pending());
            let mut all: FuturesUnordered<_> = waits.drain(..1).collect();
            assert!(poll!(all.next()).is_pending());
            task.abort();
            all.next().await.unwrap().unwrap();

            assert!(poll!(waits[0].as_mut()).is_pending());
            let outcome = timeout_after(Duration::from_secs(1), waits[0].as_mut()).await;
            assert_eq!(outcome, Err(Interrupt::TaskTimeout));
            late.abort();
        });
    }
}
