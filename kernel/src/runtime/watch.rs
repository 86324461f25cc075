//! Where the loop is watched: observers, the board that other threads read, and what happens after a panic.
//!
//! A kernel that nobody watches has no [`Watch`], and asks whether it has one at each spawn. If it has, the task's body is marked, among marks that each
//! step and each end look at anyway. All that follows is off that path. Observers are user code: they are called while no table is borrowed, and a step is *held* meanwhile, so that an
//! observer which aborts the very task that it is told of only dooms it.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use super::board::{Board, Report};
use super::nodes::{NIL, Phase, WaitKind};
use super::{BodyRef, Core, Flags, State, with_current};
use crate::activation::{Activation, KernelView, OnPanic, StepEnd, TaskView};
use crate::error::{Interrupt, drop_quietly, panic_text};

/// Who watches a kernel.
pub(crate) struct Watch {
    /// Borrowed while an observer runs: what it does itself is not told.
    observers: RefCell<Vec<Observer>>,
    has_observers: bool,
    board: Option<Arc<Board>>,
    /// Whether somebody wants to know how each step ended.
    wants_reports: bool,
    /// How many steps there were, as far as the board tells.
    steps: Cell<u32>,
    on_panic: RefCell<OnPanic>,
    /// What `run` or `turn` is to panic with.
    failure: Cell<Option<Box<dyn Any + Send>>>,
    has_failed: Cell<bool>,
}

/// `None` once it has panicked.
pub(super) struct Observer {
    name: &'static str,
    activation: Option<Box<dyn Activation>>,
}

impl Observer {
    pub(super) fn new<A: Activation + 'static>(activation: A) -> Self {
        Self {
            name: std::any::type_name::<A>(),
            activation: Some(Box::new(activation)),
        }
    }
}

impl Watch {
    /// `None` if there is nothing to watch.
    pub(super) fn new(
        observers: Vec<Observer>,
        on_panic: OnPanic,
        board: Option<Arc<Board>>,
    ) -> Option<Box<Self>> {
        let is_idle =
            observers.is_empty() && board.is_none() && matches!(on_panic, OnPanic::Contain);
        let has_observers = !observers.is_empty();
        let is_detailed = board.as_ref().is_some_and(|board| board.is_detailed());
        (!is_idle).then(|| {
            Box::new(Self {
                observers: RefCell::new(observers),
                has_observers,
                wants_reports: has_observers || is_detailed,
                steps: Cell::new(0),
                board,
                on_panic: RefCell::new(on_panic),
                failure: Cell::new(None),
                has_failed: Cell::new(false),
            })
        })
    }

    fn tell(&self, mut what: impl FnMut(&mut dyn Activation)) {
        if !self.has_observers {
            return;
        }
        let Ok(mut observers) = self.observers.try_borrow_mut() else {
            return;
        };
        for Observer { name, activation } in &mut *observers {
            let Some(observer) = activation else {
                continue;
            };
            let told = catch_unwind(AssertUnwindSafe(|| what(&mut **observer)));
            if let Err(panic) = told {
                let text = panic_text(&*panic);
                log::error!("observer {name} panicked and is taken out: {text}");
                drop_quietly(panic);
                drop_quietly(activation.take());
            }
        }
    }
}

impl Core {
    /// After the kernel was made.
    pub(super) fn watch_activate(&self) {
        if let Some(watch) = &self.watch {
            watch.tell(|observer| observer.activate(&KernelView::new(self)));
        }
    }

    /// After a spawn, with no table borrowed.
    #[cold]
    pub(super) fn watch_created(&self, watch: &Watch, task: u32, body: &BodyRef) {
        if let Some(board) = &watch.board {
            board.add(task, body);
        }
        let view = TaskView::new(self, body, task);
        watch.tell(|observer| observer.created(&view));
    }

    /// Polls a task that is watched; true if it ended.
    #[cold]
    #[inline(never)]
    pub(super) fn poll_watched(
        &self,
        watch: &Watch,
        task: u32,
        body: &BodyRef,
        cx: &mut Context<'_>,
    ) -> bool {
        if body.is_doomed() {
            return false;
        }
        if watch.has_observers {
            body.hold();
            let view = TaskView::new(self, body, task);
            watch.tell(|observer| observer.running(&view));
            body.let_go();
            if body.is_doomed() {
                return false;
            }
        }
        if let Some(board) = &watch.board {
            let step = watch.steps.get().wrapping_add(1);
            watch.steps.set(step);
            board.begin(task, step);
        }
        let ended = body.poll(cx);
        self.state.borrow_mut().current = NIL;
        if let Some(board) = &watch.board {
            board.end();
        }
        let has_panicked = ended && body.has_panicked();
        if watch.wants_reports || has_panicked {
            if !ended {
                body.hold();
            }
            self.report(watch, task, body, ended, has_panicked);
            if !ended {
                body.let_go();
            }
        }
        ended
    }

    /// Tells how a step ended.
    fn report(&self, watch: &Watch, task: u32, body: &BodyRef, ended: bool, has_panicked: bool) {
        let report = self.state.borrow().report(task);
        if let Some(board) = &watch.board
            && board.is_detailed()
            && !ended
        {
            board.post(task, body, &report);
        }
        let end = match report.wait {
            _ if has_panicked => StepEnd::Panicked,
            _ if ended => StepEnd::Returned,
            _ if body.is_doomed() => StepEnd::Aborted,
            _ if report.is_ready => StepEnd::Ready,
            Some((kind, at)) => StepEnd::Waits(kind, at),
            None => StepEnd::Foreign,
        };
        let view = TaskView::new(self, body, task);
        watch.tell(|observer| observer.suspended(&view, end));
        if has_panicked {
            self.apply_policy(watch, &view, body);
        }
    }

    /// Before a task that has ended is taken out of the tables.
    #[cold]
    pub(super) fn watch_terminated(&self, watch: &Watch, task: u32, body: &BodyRef) {
        if let Some(board) = &watch.board {
            board.remove(task);
        }
        let view = TaskView::new(self, body, task);
        watch.tell(|observer| observer.terminated(&view));
    }

    /// After a task panicked.
    fn apply_policy(&self, watch: &Watch, view: &TaskView<'_>, body: &BodyRef) {
        let Ok(mut policy) = watch.on_panic.try_borrow_mut() else {
            return;
        };
        // Out of the body while user code looks at it: it may join the task.
        let payload = match *policy {
            OnPanic::Contain => return,
            OnPanic::Propagate if watch.has_failed.get() => return, // one is on its way already
            OnPanic::Propagate | OnPanic::Call(_) => body.take_panic(),
        };
        let Some(payload) = payload else {
            return;
        };
        match &mut *policy {
            OnPanic::Contain => unreachable!("handled above"),
            OnPanic::Propagate => {
                let text = panic_text(&*payload).to_owned();
                body.put_panic(Box::new(text));
                watch.failure.set(Some(payload));
                watch.has_failed.set(true);
            }
            OnPanic::Call(callback) => {
                let called = catch_unwind(AssertUnwindSafe(|| callback(view, &*payload)));
                body.put_panic(payload);
                if let Err(panic) = called {
                    let text = panic_text(&*panic);
                    log::error!("panic in the callback for panics: {text}");
                    drop_quietly(panic);
                    return;
                }
            }
        }
        body.mark_reported();
    }

    /// Whether a task's panic is on its way out of `run` or `turn`.
    #[inline]
    pub(super) fn has_failed(&self) -> bool {
        self.watch
            .as_ref()
            .is_some_and(|watch| watch.has_failed.get())
    }

    /// What a task panicked with, if that is to leave the kernel.
    pub(super) fn take_failure(&self) -> Option<Box<dyn Any + Send>> {
        let watch = self.watch.as_ref()?;
        watch.has_failed.set(false);
        watch.failure.take()
    }

    /// Before a look that may sleep: how long it will, if anybody wants to know. Then the inbox is ready for it, and the observers know.
    #[cold]
    pub(super) fn watch_idle(
        &self,
        watch: &Watch,
        max_wait: Option<Duration>,
    ) -> Option<Option<Duration>> {
        if !watch.has_observers {
            return None;
        }
        let wait = self.with(|state| self.time_to_wait(state, max_wait));
        if wait == Some(Duration::ZERO) || !self.inbox.prepare_to_sleep() {
            return Some(Some(Duration::ZERO));
        }
        watch.tell(|observer| observer.idle(&KernelView::new(self)));
        Some(wait)
    }

    /// How long to sleep after `watch_idle`: not at all if something has come meanwhile, from another thread or from an observer.
    #[cold]
    pub(super) fn confirm_wait(&self, state: &State, wait: Option<Duration>) -> Option<Duration> {
        if state.ready.is_empty() && !self.inbox.has_mail() {
            return wait;
        }
        self.inbox.awake();
        self.away.set(true); // perhaps it rang, and must be silenced
        Some(Duration::ZERO)
    }
}

/// Cancels a task of the running kernel by the place and the number that the board shows. `None` if it has ended, else whether it was the first time.
pub(crate) fn cancel_task(slot: u32, id: u64) -> Option<bool> {
    with_current(|core| {
        core?.with(|state| {
            let body = state.tasks.get(slot)?.body.as_ref()?;
            (body.id == id).then(|| state.cancel(slot, Interrupt::cancelled()))
        })
    })
}

impl State {
    /// What a task does after a step.
    fn report(&self, task: u32) -> Report {
        let slot = &self.tasks[task];
        let mut report = Report {
            is_ready: slot.flags.has(Flags::QUEUED),
            wait: None,
            others: 0,
            sleep: None,
            timeout: None,
        };
        let mut node = slot.waits;
        while node != NIL {
            let wait = &self.nodes[node];
            match report.wait {
                None => report.wait = Some((wait.kind(), wait.at)),
                Some(_) => report.others += 1,
            }
            if wait.kind() == WaitKind::Sleep && wait.phase() == Phase::Armed {
                report.sleep = Some(report.sleep.map_or(wait.key, |at| at.min(wait.key)));
            }
            node = wait.task_next;
        }
        if let Some(at) = self.noted_at(task) {
            match report.wait {
                None => report.wait = Some((WaitKind::Join, at)),
                Some(_) => report.others += 1,
            }
        }
        report.timeout = self.next_timeout(task);
        report
    }
}
