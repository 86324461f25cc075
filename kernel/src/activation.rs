//! Observers: what a kernel tells while it runs (Curio's activations).
//!
//! The ready-made ones are in [`debug`](crate::debug).

use std::any::Any;
use std::fmt;
use std::panic::Location;
use std::rc::Rc;
use std::time::Instant;

use crate::runtime::{BodyRef, Core, Remote, WaitKind};
use crate::task::{TaskId, TaskInfo, TaskRef, TaskState};

/// An observer of a kernel, registered with [`Builder::activation`](crate::Builder::activation). Of each task it sees, in this order: `created`, then `running` and
/// `suspended` for each step, then `terminated`. A task that is dropped before it ran has no steps.
///
/// It is called between the steps, on the kernel's thread, with no table of the kernel in use: it may look around, spawn and cancel, but what it does
/// itself is not told to any observer. If it panics, that is logged, it is taken out, and the kernel goes on.
///
/// A kernel without observers pays one branch a step for the possibility.
///
/// ```
/// use std::{cell::Cell, rc::Rc};
/// use kernel::{Activation, Builder, TaskView, spawn};
///
/// /// Counts the tasks that are alive, and how many there were at most.
/// #[derive(Clone, Default)]
/// struct Census {
///     alive: Rc<Cell<usize>>,
///     most: Rc<Cell<usize>>,
/// }
///
/// impl Activation for Census {
///     fn created(&mut self, _: &TaskView<'_>) {
///         self.alive.set(self.alive.get() + 1);
///         self.most.set(self.most.get().max(self.alive.get()));
///     }
///     fn terminated(&mut self, _: &TaskView<'_>) {
///         self.alive.set(self.alive.get() - 1);
///     }
/// }
///
/// let census = Census::default();
/// let mut kernel = Builder::new().activation(census.clone()).build()?;
/// kernel.run(async {
///     let tasks: Vec<_> = (0..3).map(|n| spawn(async move { n })).collect();
///     for task in tasks {
///         task.join().await.unwrap();
///     }
/// })?;
/// assert_eq!((census.alive.get(), census.most.get()), (0, 4)); // main is one of them
/// # Ok::<(), kernel::RunError>(())
/// ```
pub trait Activation {
    /// The kernel has been made. Called once, before anything else.
    fn activate(&mut self, kernel: &KernelView<'_>) {
        let _ = kernel;
    }

    /// A task was spawned, and stands at the end of the ready queue. It has no name yet.
    fn created(&mut self, task: &TaskView<'_>) {
        let _ = task;
    }

    /// A task is about to be polled.
    fn running(&mut self, task: &TaskView<'_>) {
        let _ = task;
    }

    /// A task has been polled; `end` says why it does not run on. Its last step is told too.
    fn suspended(&mut self, task: &TaskView<'_>, end: StepEnd) {
        let _ = (task, end);
    }

    /// A task has ended, or was dropped. Whoever joins it has not seen that yet.
    fn terminated(&mut self, task: &TaskView<'_>) {
        let _ = task;
    }

    /// No task is ready, and the kernel is about to sleep until something comes from outside or a deadline passes. What other threads send from here on
    /// wakes it. Not told when a virtual clock jumps instead, nor of the sleep of a host between two [`turn`](crate::Kernel::turn)s.
    fn idle(&mut self, kernel: &KernelView<'_>) {
        let _ = kernel;
    }
}

/// Why a task does not run on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum StepEnd {
    /// It waits in this trap, called there; if it waits in several, this is the one that it entered last.
    Waits(WaitKind, &'static Location<'static>),
    /// It waits in futures of other libraries alone.
    Foreign,
    /// It lets others run, or was woken while it ran: it is ready again.
    Ready,
    /// It ended, with a value.
    Returned,
    /// It ended with a panic; [`TaskView::panic`] has the text.
    Panicked,
    /// It was aborted, perhaps by itself, while it ran.
    Aborted,
}

impl fmt::Display for StepEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waits(kind, at) => write!(f, "waits for {kind:?} at {at}"),
            Self::Foreign => f.write_str("waits in a foreign future"),
            Self::Ready => f.write_str("is ready again"),
            Self::Returned => f.write_str("returned"),
            Self::Panicked => f.write_str("panicked"),
            Self::Aborted => f.write_str("was aborted"),
        }
    }
}

/// A task as an observer sees it.
pub struct TaskView<'a> {
    core: &'a Core,
    body: &'a BodyRef,
    slot: u32,
}

impl<'a> TaskView<'a> {
    pub(crate) const fn new(core: &'a Core, body: &'a BodyRef, slot: u32) -> Self {
        Self { core, body, slot }
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> TaskId {
        TaskId(self.body.id)
    }

    /// Its name, if it was given one.
    #[must_use]
    pub fn name(&self) -> Option<Rc<str>> {
        self.core.with(|state| state.name(self.body.id))
    }

    /// The task that spawned it; `None` for one that was spawned from outside.
    #[must_use]
    pub fn parent(&self) -> Option<TaskId> {
        self.to_ref().parent()
    }

    /// Where it was spawned.
    #[must_use]
    pub fn spawned_at(&self) -> &'static Location<'static> {
        self.body.spawned_at
    }

    /// How often it was polled.
    #[must_use]
    pub fn cycles(&self) -> u32 {
        self.body.cycles.get()
    }

    /// What it does now.
    #[must_use]
    pub fn state(&self) -> TaskState {
        self.info().state
    }

    /// Everything that is known of it.
    #[must_use]
    pub fn info(&self) -> TaskInfo {
        self.core.with(|state| state.info(self.slot))
    }

    /// The text of the panic it ended with, until that is joined.
    #[must_use]
    pub fn panic(&self) -> Option<String> {
        self.body.panic_text()
    }

    /// The task itself, to keep or to cancel.
    #[must_use]
    pub fn to_ref(&self) -> TaskRef {
        TaskRef::new(self.body.clone())
    }

    /// The time of its kernel's clock.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.core.with(|state| state.now())
    }
}

/// Its number, its name if it has one, and where it was spawned.
impl fmt::Display for TaskView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "task {}", self.body.id)?;
        if let Some(name) = self.name() {
            write!(f, " {name:?}")?;
        }
        write!(f, " spawned at {}", self.body.spawned_at)
    }
}

impl fmt::Debug for TaskView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TaskView({self})")
    }
}

/// A kernel as an observer sees it.
pub struct KernelView<'a> {
    core: &'a Core,
}

impl<'a> KernelView<'a> {
    pub(crate) const fn new(core: &'a Core) -> Self {
        Self { core }
    }

    /// Every live task, in the order they were spawned.
    #[must_use]
    pub fn tasks(&self) -> Vec<TaskInfo> {
        self.core.with(|state| state.dump())
    }

    /// The time of its clock.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.core.with(|state| state.now())
    }

    /// A handle for other threads. While one is kept the kernel cannot tell a [deadlock](crate::RunError::Deadlock).
    #[must_use]
    pub fn remote(&self) -> Remote {
        self.core.remote()
    }
}

impl fmt::Debug for KernelView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelView")
            .field("id", &self.core.id())
            .finish_non_exhaustive()
    }
}

/// What a kernel does when a task panics; see [`Builder::on_panic`](crate::Builder::on_panic).
#[derive(Default)]
pub enum OnPanic {
    /// Keeps it for whoever joins the task, and logs it as an error if nobody will. The other tasks go on. The default.
    #[default]
    Contain,
    /// Lets it out of [`Kernel::run`](crate::Kernel::run) or [`Kernel::turn`](crate::Kernel::turn) at once, as if no task were around it. The kernel stays intact: it can be
    /// run again, or shut down. Whoever joins the task gets the panic's text. Out of [`Kernel::shutdown`](crate::Kernel::shutdown) it comes when all tasks have ended.
    Propagate,
    /// Calls the function with the task and the payload; apart from that as `Contain`, but a task that nobody joins is not logged.
    Call(Box<PanicCallback>),
}

/// What [`OnPanic::Call`] calls.
pub type PanicCallback = dyn FnMut(&TaskView<'_>, &(dyn Any + Send));

impl OnPanic {
    /// [`OnPanic::Call`] of a closure.
    pub fn call(callback: impl FnMut(&TaskView<'_>, &(dyn Any + Send)) + 'static) -> Self {
        Self::Call(Box::new(callback))
    }
}

impl fmt::Debug for OnPanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Contain => "Contain",
            Self::Propagate => "Propagate",
            Self::Call(_) => "Call(..)",
        })
    }
}
