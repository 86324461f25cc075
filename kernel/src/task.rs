//! Tasks: start them, wait for them, cancel them, look at them.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::Future;
use std::panic::Location;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use crate::error::{Interrupt, JoinError, Reason};
use crate::runtime::{BodyRef, Handle, WaitKind};
use crate::traps::{self, IdleWait, JoinPlace, JoinWait, Yield, call, idle_wait};

/// Starts a task. It runs when its turn in the ready queue comes; the caller goes on.
///
/// Not a cancellation point.
///
/// # Panics
/// Outside a running kernel; there, [`Kernel::spawn`](crate::Kernel::spawn) starts tasks.
///
/// ```
/// # kernel::run(async {
/// let task = kernel::spawn(async { 6 * 7 });
/// assert_eq!(task.join().await.unwrap(), 42);
/// # }).unwrap();
/// ```
#[track_caller]
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    call::spawn(future)
}

/// Lets every other ready task run first (Curio's `sleep(0)`).
///
/// Cancellation point: yes. If dropped, the task is polled once for nothing.
///
/// # Errors
/// A pending [`Interrupt`].
pub const fn yield_now() -> Yield {
    Yield(false)
}

/// Lets all other tasks go on until none of them can: each waits for a time, a descriptor, an answer (Trio's
/// `wait_all_tasks_blocked`). The end of "let it run as far as it can" in a test, with no guess at a number of turns; and a place for work
/// that should only be done when there is none. Does not wait for a time to come: the clock of a test stands still meanwhile.
///
/// Tasks that never stop running keep it waiting for ever. Several that wait for it go on together.
///
/// Cancellation point: yes. If dropped, the wait is abandoned.
///
/// # Errors
/// An [`Interrupt`].
///
/// ```
/// use kernel::sync::Queue;
/// use std::{cell::Cell, rc::Rc};
///
/// # kernel::run(async {
/// let (jobs, done) = (Rc::new(Queue::new(None)), Rc::new(Cell::new(0)));
/// let (todo, count) = (jobs.clone(), done.clone());
/// kernel::spawn(async move {
///     while let Ok(job) = todo.get().await {
///         count.set(count.get() + job);
///     }
/// });
/// for job in [1, 2, 3] {
///     jobs.put(job).await.unwrap();
/// }
/// kernel::wait_until_idle().await.unwrap();
/// assert_eq!(done.get(), 6);
/// # }).unwrap();
/// ```
#[track_caller]
pub const fn wait_until_idle() -> IdleWait {
    idle_wait()
}

/// The running task.
///
/// # Panics
/// Outside a task; [`try_current_task`] does not.
#[track_caller]
#[must_use]
pub fn current_task() -> TaskRef {
    call::current()
}

/// The running task, if there is one.
#[must_use]
pub fn try_current_task() -> Option<TaskRef> {
    call::try_current()
}

/// Every live task of the running kernel, in the order they were spawned. [`TaskTree`] prints them.
///
/// Not a cancellation point. Works in tasks, in observers and in a [`Remote::call`](crate::Remote::call).
///
/// # Panics
/// Outside a running kernel; there, [`Kernel::tasks`](crate::Kernel::tasks) tells.
///
/// A program that prints what its tasks do when it is sent `SIGUSR1`:
///
/// ```
/// use kernel::signal::{SIGUSR1, SignalQueue};
/// use kernel::{TaskTree, spawn, tasks, yield_now};
///
/// # kernel::run(async {
/// let signals = SignalQueue::new(&[SIGUSR1])?;
/// let inspector = spawn(async move {
///     while signals.next().await.is_ok() {
///         eprintln!("{}", TaskTree(&tasks()));
///     }
/// });
/// inspector.set_name("inspector");
/// yield_now().await.unwrap();
/// let tree = TaskTree(&tasks()).to_string();
/// assert!(tree.contains("\n  task 2 \"inspector\" waits for Read at "), "{tree}");
/// # std::io::Result::Ok(()) }).unwrap().unwrap();
/// ```
#[track_caller]
#[must_use]
pub fn tasks() -> Vec<TaskInfo> {
    call::tasks()
}

/// Number of a task, in the order they were spawned in its kernel, from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TaskId(pub(crate) u64);

impl TaskId {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A started task. Dropping it detaches the task, which goes on; [`TaskRef::abort`] ends it.
pub struct Task<T> {
    handle: Handle<T>,
}

impl<T> Task<T> {
    pub(crate) const fn from_handle(handle: Handle<T>) -> Self {
        Self { handle }
    }

    /// Waits for the task's end and takes its value. The first join to see the end gets the value.
    ///
    /// Cancellation point: only if the task has not ended. If dropped or interrupted, the task goes on and can be joined again.
    ///
    /// # Errors
    /// [`JoinError::Panicked`] if it panicked, [`JoinError::Aborted`] if it was dropped before its end, [`JoinError::Interrupted`] if
    /// the caller is interrupted, [`JoinError::Taken`] if an earlier join has the value. A task that was cancelled says so itself, in its value.
    #[track_caller]
    pub fn join(&self) -> Join<'_, T> {
        Join {
            handle: &self.handle,
            wait: JoinPlace::new(self.handle.body(), Location::caller()),
        }
    }

    /// Cancels the task and waits for its end. A task that was cancelled before is not cancelled again, only waited for; one that has
    /// ended is left alone.
    ///
    /// Cancellation point: only if it has to wait; then the task goes on with its clean-up.
    ///
    /// # Errors
    /// The caller's [`Interrupt`].
    #[track_caller]
    pub fn cancel(&self) -> JoinWait {
        self.request_cancel(Reason::default());
        traps::join_wait(self)
    }

    /// The value, if the task has ended and nobody has taken it: join without waiting.
    ///
    /// # Errors
    /// As [`Task::join`], but for the interrupt.
    pub fn try_join(&self) -> Option<Result<T, JoinError>> {
        self.handle.take()
    }

    /// The task without its value: dropping the rest detaches it.
    #[must_use]
    pub fn to_ref(&self) -> TaskRef {
        self.handle.task.clone()
    }
}

impl<T> std::ops::Deref for Task<T> {
    type Target = TaskRef;
    fn deref(&self) -> &TaskRef {
        &self.handle.task
    }
}

impl<T> fmt::Debug for Task<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.handle.task.fmt(f)
    }
}

/// Waits for a task's end and takes its value; made by [`Task::join`].
#[must_use = "a future does nothing until it is awaited"]
pub struct Join<'a, T> {
    handle: &'a Handle<T>,
    wait: JoinPlace<&'a BodyRef>,
}

impl<T> Future for Join<'_, T> {
    type Output = Result<T, JoinError>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        ready!(self.wait.poll(cx))?;
        Poll::Ready(self.handle.take().expect("the task has ended"))
    }
}

impl<T> fmt::Debug for Join<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Join").field(&self.handle.task).finish()
    }
}

/// A task, whatever its value: to look at, wait for or cancel.
#[derive(Clone)]
pub struct TaskRef {
    body: BodyRef,
}

impl TaskRef {
    pub(crate) const fn new(body: BodyRef) -> Self {
        Self { body }
    }

    pub(crate) const fn body(&self) -> &BodyRef {
        &self.body
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> TaskId {
        TaskId(self.body.id)
    }

    /// The task that spawned it; `None` for one that was spawned from outside.
    #[must_use]
    pub fn parent(&self) -> Option<TaskId> {
        (self.body.parent != 0).then_some(TaskId(self.body.parent))
    }

    /// Its name, while it lives, if it was given one.
    #[must_use]
    pub fn name(&self) -> Option<Rc<str>> {
        call::inspect(&self.body, |state, _| state.name(self.body.id))?
    }

    /// Names it, for the task dump.
    pub fn set_name(&self, name: &str) {
        call::inspect(&self.body, |state, slot| state.set_name(slot, name.into()));
    }

    /// How often it was polled.
    #[must_use]
    pub fn cycles(&self) -> u32 {
        self.body.cycles.get()
    }

    /// Where it was spawned.
    #[must_use]
    pub fn spawned_at(&self) -> &'static Location<'static> {
        self.body.spawned_at
    }

    /// What it does now.
    #[must_use]
    pub fn state(&self) -> TaskState {
        self.info().map_or(TaskState::Terminated, |info| info.state)
    }

    /// Everything that is known of it; `None` once it has ended.
    #[must_use]
    pub fn info(&self) -> Option<TaskInfo> {
        call::inspect(&self.body, |state, slot| state.info(slot))
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_terminated(&self) -> bool {
        !self.body.is_live()
    }

    /// Whether a cancellation was asked for while it lived. What the task made of it is in its value.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.body.is_cancelled()
    }

    /// Asks for it to be interrupted: at the trap it waits in, or at its next blocking one. True if it was alive and not
    /// cancelled before. Does not wait.
    ///
    /// The task sees [`Interrupt::Cancelled`] once; what it awaits afterwards works, so that it can clean up. Its own timeouts are
    /// off from then on. One that has not run yet does start, and is interrupted where it first blocks.
    pub fn request_cancel(&self, why: impl Into<Reason>) -> bool {
        call::cancel(&self.body, Interrupt::Cancelled(why.into()))
    }

    /// Drops its future: destructors run, nothing is awaited any more. A task that aborts itself ends when its poll
    /// returns; one that is aborted while its kernel does not run, at the kernel's next turn. False if it had ended.
    pub fn abort(&self) -> bool {
        call::abort(&self.body)
    }

    /// Waits for its end, and leaves its value alone.
    ///
    /// Cancellation point: only if it has not ended.
    ///
    /// # Errors
    /// The caller's [`Interrupt`].
    #[track_caller]
    pub fn wait(&self) -> JoinWait {
        traps::join_wait(self)
    }
}

impl PartialEq for TaskRef {
    fn eq(&self, other: &Self) -> bool {
        self.body.is_same(&other.body)
    }
}

impl Eq for TaskRef {}

impl fmt::Debug for TaskRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.info() {
            Some(info) => write!(f, "Task({info})"),
            None => write!(
                f,
                "Task({} ended, spawned at {})",
                self.body.id, self.body.spawned_at
            ),
        }
    }
}

/// What a task does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TaskState {
    /// It stands in the ready queue.
    Ready,
    /// It is being polled.
    Running,
    /// It waits; [`TaskInfo::waits`] says for what, and is empty if only foreign futures know.
    Waiting,
    /// It has ended.
    Terminated,
}

/// A line of the task dump.
#[derive(Clone, Debug)]
pub struct TaskInfo {
    /// Its number.
    pub id: TaskId,
    /// The task that spawned it.
    pub parent: Option<TaskId>,
    /// The name it was given.
    pub name: Option<String>,
    /// What it does.
    pub state: TaskState,
    /// What it waits for and where it awaits that, newest first.
    pub waits: Vec<(WaitKind, &'static Location<'static>)>,
    /// How often it was polled.
    pub cycles: u32,
    /// Whether it was cancelled.
    pub cancelled: bool,
    /// Where it was spawned.
    pub spawned_at: &'static Location<'static>,
}

impl fmt::Display for TaskInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "task {}", self.id)?;
        if let Some(name) = &self.name {
            write!(f, " {name:?}")?;
        }
        match (self.state, &self.waits[..]) {
            (TaskState::Waiting, []) => f.write_str(" waits in a foreign future")?,
            (TaskState::Waiting, waits) => {
                for (kind, at) in waits {
                    write!(f, " waits for {kind:?} at {at},")?;
                }
            }
            (state, _) => write!(f, " {state:?}")?,
        }
        write!(f, " spawned at {}, {} cycles", self.spawned_at, self.cycles)?;
        if self.cancelled {
            f.write_str(", cancelled")?;
        }
        Ok(())
    }
}

/// Prints tasks, each under the one that spawned it, a line each: state, waits, where they were spawned. Tasks whose parents have ended stand at the left.
#[derive(Clone, Copy, Debug)]
pub struct TaskTree<'a>(pub &'a [TaskInfo]);

/// Deeper than this nothing is indented any more: a chain of a million tasks is no reason for lines of a million blanks.
const DEEPEST: usize = 32;

impl fmt::Display for TaskTree<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let alive: HashSet<_> = self.0.iter().map(|task| task.id).collect();
        let mut children: HashMap<_, Vec<_>> = HashMap::new();
        for task in self.0 {
            let parent = task.parent.filter(|parent| alive.contains(parent));
            children.entry(parent).or_default().push(task);
        }
        let mut ahead = Vec::new();
        let mut add = |ahead: &mut Vec<_>, parent, depth| {
            let tasks = children.remove(&parent).unwrap_or_default();
            ahead.extend(tasks.into_iter().rev().map(|task| (task, depth)));
        };
        add(&mut ahead, None, 0);
        while let Some((task, depth)) = ahead.pop() {
            writeln!(f, "{:1$}{task}", "", 2 * depth.min(DEEPEST))?;
            add(&mut ahead, Some(task.id), depth + 1);
        }
        Ok(())
    }
}
