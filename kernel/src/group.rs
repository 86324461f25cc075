//! Task groups: tasks that are waited for together and do not outlive the block they belong to.
//!
//! A spawned member reports its own end, with a guard in its future, so that waiting for any of ten thousand looks at one queue
//! and not at ten thousand tasks. A member that was adopted has no such guard; those are few, and waited for one by one.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::Location;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use crate::error::{Interrupt, JoinError, Reason};
use crate::runtime::WaitKind;
use crate::task::{Task, TaskId, TaskRef, spawn};
use crate::traps::{Lot, join_wait, sched_wait, sched_wake};

/// For which of its members [`TaskGroup::join`] waits. The rest are cancelled then. A member that fails always ends the wait.
#[derive(Clone, Copy, Debug)]
pub enum Wait<T> {
    /// For all.
    All,
    /// For the first that ends.
    Any,
    /// For the first whose value the function accepts, as in `Wait::First(Option::is_some)` (Curio's `wait=object`).
    First(fn(&T) -> bool),
    /// For none: all are cancelled at once.
    None,
}

/// Tasks that end together (Curio's `TaskGroup`). [`group`] is the form that cannot be left without joining.
///
/// A member fails by returning `Err`, by panicking, or by being aborted. Its error is never an error of the group: it is
/// among the results.
///
/// If dropped, its members are cancelled, but not waited for.
///
/// What an error means is up to whoever has the group. Here a job that fails is tried once more, and a second failure is the end of all:
///
/// ```
/// use kernel::{GroupError, Interrupt, TaskGroup, Wait};
///
/// #[derive(Debug)]
/// enum JobError {
///     Failed { job: u32, tries: u32 },
///     Interrupted(Interrupt),
/// }
/// # impl From<Interrupt> for JobError {
/// #     fn from(interrupt: Interrupt) -> Self { Self::Interrupted(interrupt) }
/// # }
///
/// async fn work(job: u32, tries: u32) -> Result<u32, JobError> {
///     // ...
/// #   kernel::yield_now().await?;
///     if job == 3 && tries == 1 { Err(JobError::Failed { job, tries }) } else { Ok(job * job) }
/// }
///
/// # kernel::run(async {
/// let mut group = TaskGroup::new(Wait::All);
/// for job in 1..5 {
///     group.spawn(work(job, 1));
/// }
/// let mut sum = 0;
/// while let Some(done) = group.next_done().await? {
///     match done.result {
///         Ok(square) => sum += square,
///         Err(GroupError::Failed(JobError::Failed { job, tries: 1 })) => drop(group.spawn(work(job, 2))),
///         Err(error) => {
///             eprintln!("{:?}: {error:?}", done.task);
///             group.cancel_remaining().await?;
///         }
///     }
/// }
/// assert_eq!(sum, 1 + 4 + 9 + 16);
/// # Ok::<_, Interrupt>(()) }).unwrap().unwrap();
/// ```
///
/// A task is a member of one group, once; a group that was joined is gone, and there are no results before that. None of these compiles:
///
/// ```compile_fail,E0382
/// # fn adds_twice(task: kernel::Task<Result<i32, kernel::Interrupt>>) {
/// let mut group = kernel::TaskGroup::new(kernel::Wait::All);
/// group.adopt(task);
/// group.adopt(task);
/// # }
/// ```
/// ```compile_fail,E0382
/// # async fn uses_a_joined_group(mut group: kernel::TaskGroup<i32>) {
/// group.join().await.unwrap();
/// group.spawn(async { Ok(1) });
/// # }
/// ```
/// ```compile_fail,E0507
/// # async fn joins_inside_the_block() {
/// kernel::group(kernel::Wait::All, async |group: &mut kernel::TaskGroup<i32>| {
///     group.join().await
/// });
/// # }
/// ```
pub struct TaskGroup<T, E = Interrupt> {
    wait: Wait<T>,
    /// By number, which is the order of creation.
    members: BTreeMap<u64, Member<T, E>>,
    last_number: u64,
    /// How many members have no outcome yet, daemons aside.
    pending: usize,
    /// The adopted members whose end was not seen yet, and some that were taken out.
    adopted: Vec<u64>,
    ends: Rc<Ends>,
}

/// Where the task dump says that a task waits for the group.
type Place = &'static Location<'static>;

struct Member<T, E> {
    task: Task<Result<T, E>>,
    is_daemon: bool,
    outcome: Option<Result<T, GroupError<E>>>,
}

/// Which members have ended and were not looked at since, in the order of their ends.
#[derive(Default)]
struct Ends {
    numbers: RefCell<VecDeque<u64>>,
    /// Where the group waits for more.
    lot: Lot,
}

impl Ends {
    fn add(&self, number: u64) {
        self.numbers.borrow_mut().push_back(number);
        sched_wake(&self.lot, 1);
    }

    fn next(&self) -> Option<u64> {
        self.numbers.borrow_mut().pop_front()
    }
}

/// Dropped when a member's future is, be it at its end.
struct ReportEnd {
    number: u64,
    ends: Rc<Ends>,
}

impl Drop for ReportEnd {
    fn drop(&mut self) {
        self.ends.add(self.number);
    }
}

/// A member that has ended.
#[derive(Debug)]
pub struct Done<T, E> {
    /// The task.
    pub task: TaskRef,
    /// What became of it.
    pub result: Result<T, GroupError<E>>,
}

/// How a member failed.
#[derive(thiserror::Error)]
pub enum GroupError<E> {
    /// It returned this error; of a member that was cancelled, most often an [`Interrupt`].
    #[error("{0}")]
    Failed(E),
    /// It came to no result of its own: [`JoinError::Panicked`] or [`JoinError::Aborted`].
    #[error(transparent)]
    Join(JoinError),
}

impl<E: fmt::Debug> fmt::Debug for GroupError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error) => f.debug_tuple("Failed").field(error).finish(),
            Self::Join(error) => f.debug_tuple("Join").field(error).finish(),
        }
    }
}

/// What became of a group; the answer of [`TaskGroup::join`].
#[derive(Debug)]
pub struct Outcome<T, E> {
    /// The member that ended the wait: for [`Wait::All`] the first that failed, else the first that ended (as wanted); none in an empty group.
    pub completed: Option<TaskId>,
    /// The members' results in the order in which they were created; without daemons, and without members that were taken out before.
    pub results: Vec<(TaskId, Result<T, GroupError<E>>)>,
}

impl<T, E> Outcome<T, E> {
    /// The result of the member that ended the wait.
    pub fn into_completed(self) -> Option<Result<T, GroupError<E>>> {
        let completed = self.completed?;
        let mut results = self.results.into_iter();
        results
            .find(|(id, _)| *id == completed)
            .map(|(_, result)| result)
    }

    /// The first error in the order of creation, if any member failed.
    pub fn first_error(&self) -> Option<&GroupError<E>> {
        self.results
            .iter()
            .find_map(|(_, result)| result.as_ref().err())
    }
}

impl<T: 'static, E: 'static> TaskGroup<T, E> {
    /// An empty group.
    #[must_use]
    pub fn new(wait: Wait<T>) -> Self {
        Self {
            wait,
            members: BTreeMap::new(),
            last_number: 0,
            pending: 0,
            adopted: Vec::new(),
            ends: Rc::default(),
        }
    }

    /// Starts a task as a member.
    ///
    /// # Panics
    /// Outside a running kernel.
    #[track_caller]
    pub fn spawn(&mut self, future: impl Future<Output = Result<T, E>> + 'static) -> TaskRef {
        self.start(future, false)
    }

    /// Starts a task as a member that is not waited for: it is cancelled when the group ends, and its result, be it an error, is of no interest.
    ///
    /// # Panics
    /// Outside a running kernel.
    #[track_caller]
    pub fn spawn_daemon(
        &mut self,
        future: impl Future<Output = Result<T, E>> + 'static,
    ) -> TaskRef {
        self.start(future, true)
    }

    /// Makes a task that runs, or has ended, a member. It is no daemon, whoever started it.
    pub fn adopt(&mut self, task: Task<Result<T, E>>) -> TaskRef {
        let number = self.next_number();
        if task.is_terminated() {
            self.ends.add(number);
        } else {
            self.adopted.push(number);
        }
        self.add(number, task, false)
    }

    /// Takes a member out, so that it outlives the group or is joined by hand. `None` if it is not, or no longer, a member.
    pub fn release(&mut self, task: &TaskRef) -> Option<Task<Result<T, E>>> {
        let number = *self.members.iter().find(|(_, m)| *m.task == *task)?.0;
        let member = self.members.remove(&number)?;
        if !member.is_daemon {
            self.pending -= 1;
        }
        Some(member.task)
    }

    /// The members, in the order in which they were created, but for daemons.
    pub fn tasks(&self) -> impl Iterator<Item = &TaskRef> {
        let members = self.members.values().filter(|member| !member.is_daemon);
        members.map(|member| &*member.task)
    }

    /// Waits for the next member to end and takes it out; `None` if there is none left. Daemons do not count.
    ///
    /// Cancellation point: only if it has to wait. If dropped, nothing is lost.
    ///
    /// # Errors
    /// The caller's [`Interrupt`]; the members go on.
    #[track_caller]
    pub fn next_done(
        &mut self,
    ) -> impl Future<Output = Result<Option<Done<T, E>>, Interrupt>> + use<'_, T, E> {
        let at = Location::caller();
        async move {
            let Some(number) = self.next_end(at).await? else {
                return Ok(None);
            };
            let member = self.members.remove(&number).expect("it was just found");
            Ok(Some(Done {
                task: member.task.to_ref(),
                result: member.outcome.expect("it has ended"),
            }))
        }
    }

    /// Cancels all members that have not ended, waits for them, and takes them out. Daemons go on.
    ///
    /// Cancellation point: if it has to wait. Then, as if dropped, the members are cancelled but still in the group.
    ///
    /// # Errors
    /// The caller's [`Interrupt`].
    #[track_caller]
    pub fn cancel_remaining(
        &mut self,
    ) -> impl Future<Output = Result<(), Interrupt>> + use<'_, T, E> {
        self.cancel_remaining_at(Location::caller())
    }

    async fn cancel_remaining_at(&mut self, at: Place) -> Result<(), Interrupt> {
        let mut cancelled = Vec::new();
        for (&number, member) in &self.members {
            if !member.is_daemon && !member.task.is_terminated() {
                member.task.request_cancel(Reason::default());
                cancelled.push(number);
            }
        }
        for number in &cancelled {
            join_wait(&self.members[number].task).called_at(at).await?;
        }
        for number in &cancelled {
            self.members.remove(number);
            self.pending -= 1;
        }
        Ok(())
    }

    /// Waits for the members as [`Wait`] says, then cancels those that are left and waits for them too. When it returns, all have ended.
    ///
    /// Cancellation point: if it has to wait. An interrupt cancels the members, and is the answer when they have ended. If
    /// dropped, they are cancelled, but not waited for.
    ///
    /// # Errors
    /// The caller's [`Interrupt`]; never that of a member.
    #[track_caller]
    pub fn join(self) -> impl Future<Output = Result<Outcome<T, E>, Interrupt>> + use<T, E> {
        self.join_at(Location::caller())
    }

    async fn join_at(mut self, at: Place) -> Result<Outcome<T, E>, Interrupt> {
        let completed = self.wait_for_members(at).await;
        let ended = self.end_all(at).await;
        let completed = completed?;
        ended?;
        let results = std::mem::take(&mut self.members)
            .into_values()
            .filter(|member| !member.is_daemon)
            .map(|member| (member.task.id(), member.outcome.expect("it has ended")))
            .collect();
        Ok(Outcome { completed, results })
    }

    #[track_caller]
    fn start(
        &mut self,
        future: impl Future<Output = Result<T, E>> + 'static,
        is_daemon: bool,
    ) -> TaskRef {
        let number = self.next_number();
        let end = ReportEnd {
            number,
            ends: Rc::clone(&self.ends),
        };
        let task = spawn(async move {
            let _end = end;
            future.await
        });
        self.add(number, task, is_daemon)
    }

    const fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    fn add(&mut self, number: u64, task: Task<Result<T, E>>, is_daemon: bool) -> TaskRef {
        let task_ref = task.to_ref();
        let member = Member {
            task,
            is_daemon,
            outcome: None,
        };
        self.members.insert(number, member);
        self.pending += usize::from(!is_daemon);
        task_ref
    }

    /// Waits for the end of any member that is no daemon; `None` if all have ended. Its outcome is set.
    async fn next_end(&mut self, at: Place) -> Result<Option<u64>, Interrupt> {
        loop {
            while let Some(number) = self.ends.next() {
                let Some(member) = self.members.get_mut(&number) else {
                    continue; // taken out
                };
                if member.is_daemon {
                    self.members.remove(&number);
                } else if member.settle() {
                    self.pending -= 1;
                    return Ok(Some(number));
                }
            }
            if self.pending == 0 {
                return Ok(None);
            }
            let mut adopted = Vec::new();
            self.adopted.retain(|&number| {
                let member = self.members.get(&number).filter(|m| m.outcome.is_none());
                adopted
                    .extend(member.map(|member| (number, join_wait(&member.task).called_at(at))));
                member.is_some()
            });
            let mut reported = sched_wait(&self.ends.lot, WaitKind::Join).called_at(at);
            let ends = &self.ends;
            poll_fn(|cx| {
                let mut answer = Pin::new(&mut reported).poll(cx);
                for (number, wait) in &mut adopted {
                    if answer.is_pending() {
                        answer = Pin::new(wait).poll(cx);
                        if let Poll::Ready(Ok(())) = answer {
                            ends.numbers.borrow_mut().push_back(*number);
                        }
                    }
                }
                answer
            })
            .await?;
        }
    }

    /// Waits as `self.wait` says and tells which member ended it.
    async fn wait_for_members(&mut self, at: Place) -> Result<Option<TaskId>, Interrupt> {
        if let Wait::None = self.wait {
            return Ok(None);
        }
        let mut first = None;
        while let Some(number) = self.next_end(at).await? {
            let member = &self.members[&number];
            let id = member.task.id();
            first = first.or(Some(id));
            let is_enough = match (&self.wait, member.outcome.as_ref().expect("it has ended")) {
                (_, Err(_)) | (Wait::Any, Ok(_)) => true,
                (Wait::First(wanted), Ok(value)) => wanted(value),
                (Wait::All | Wait::None, Ok(_)) => false,
            };
            if is_enough {
                return Ok(Some(id));
            }
        }
        Ok(match self.wait {
            Wait::All => first,
            Wait::Any | Wait::First(_) | Wait::None => None,
        })
    }

    /// Cancels all that run, waits for their ends, daemons' last, and sets their outcomes.
    async fn end_all(&mut self, at: Place) -> Result<(), Interrupt> {
        for is_daemon in [false, true] {
            let of_kind = |member: &&mut Member<T, E>| member.is_daemon == is_daemon;
            for member in self.members.values_mut().filter(of_kind) {
                member.task.request_cancel(Reason::default());
            }
            for member in self.members.values_mut().filter(of_kind) {
                join_wait(&member.task).called_at(at).await?;
                member.settle();
            }
        }
        Ok(())
    }
}

impl<T, E> Member<T, E> {
    /// Takes over the result of a task that has ended. False if that happened before, or if it has not ended.
    fn settle(&mut self) -> bool {
        if self.outcome.is_some() {
            return false;
        }
        self.outcome = self.task.try_join().map(|result| match result {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(GroupError::Failed(error)),
            Err(error) => Err(GroupError::Join(error)),
        });
        self.outcome.is_some()
    }
}

impl<T, E> Drop for TaskGroup<T, E> {
    fn drop(&mut self) {
        for member in self.members.values() {
            member.task.request_cancel(Reason::default());
        }
    }
}

impl<T, E> fmt::Debug for TaskGroup<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tasks = self.members.values().map(|member| &member.task);
        f.debug_list().entries(tasks).finish()
    }
}

/// Runs `body` with a group, and joins it however the body ends: at its end as `wait` says, after an error at once, with all members cancelled.
///
/// Cancellation point: as the body, and if it has to wait for members. If dropped, the members are cancelled, but not waited for.
///
/// # Errors
/// The body's; an [`Interrupt`] of the join. Not those of members: see [`Outcome`].
///
/// ```
/// use kernel::{Interrupt, Wait, group};
///
/// # kernel::run(async {
/// let (_, outcome) = group(Wait::All, async |group| {
///     for n in 1..4 {
///         group.spawn(async move { Ok::<_, Interrupt>(n * n) });
///     }
///     Ok::<_, Interrupt>(())
/// })
/// .await?;
/// let squares: Vec<_> = outcome.results.into_iter().map(|(_, square)| square.unwrap()).collect();
/// assert_eq!(squares, [1, 4, 9]);
/// # Ok::<(), Interrupt>(())
/// # }).unwrap().unwrap();
/// ```
#[track_caller]
pub fn group<T, E, R, X>(
    wait: Wait<T>,
    body: impl AsyncFnOnce(&mut TaskGroup<T, E>) -> Result<R, X>,
) -> impl Future<Output = Result<(R, Outcome<T, E>), X>>
where
    T: 'static,
    E: 'static,
    X: From<Interrupt>,
{
    let at = Location::caller();
    async move {
        let mut group = TaskGroup::new(wait);
        match body(&mut group).await {
            Ok(value) => Ok((value, group.join_at(at).await?)),
            Err(error) => {
                group.end_all(at).await?;
                Err(error)
            }
        }
    }
}
