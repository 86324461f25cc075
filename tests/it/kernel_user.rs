//! Corners of user mode: groups, locks and permits used in unusual ways, and what is refused. Much of the latter the compiler refuses; that is
//! tested by the examples of the types' documentation. On the virtual clock.

use std::cell::Cell;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::time::Duration;

use futures::FutureExt;
use kernel::sync::{BoundedSemaphore, Condition, Lock, RLock, TooManyPermits};
use kernel::traps::{self, Expiry, Lot, WaitKind, immediate};
use kernel::{
    Builder, GroupError, Interrupt, MaybeInterrupt, Outcome, Reason, Task, TaskGroup, VirtualClock,
    Wait, current_task, group, ignore_after, now, sleep, spawn, timeout_after, yield_now,
};

fn run<T>(main: impl Future<Output = T>) -> T {
    let mut kernel = Builder::new().clock(VirtualClock::new()).build().unwrap();
    kernel.run(main).unwrap()
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

type Group = TaskGroup<i32, Interrupt>;

async fn after(millis: u64, value: i32) -> Result<i32, Interrupt> {
    sleep(ms(millis)).await?;
    Ok(value)
}

/// The values of those that have one.
fn values(outcome: Outcome<i32, Interrupt>) -> Vec<Option<i32>> {
    let results = outcome.results.into_iter();
    results.map(|(_, result)| result.ok()).collect()
}

// ---- groups

/// Accepts: curio/task/task_join_daemon
#[test]
fn a_daemon_joined_inside_the_group_gives_its_value_and_is_no_result_of_the_group() {
    run(async {
        let began = now();
        let joined = Cell::new(None);
        let (_, outcome) = group(Wait::All, async |group: &mut Group| {
            let daemon = group.spawn_daemon(after(20, 1));
            let other = group.spawn_daemon(after(1_000_000, 2));
            group.spawn(after(30, 3));
            // It may be waited for as it is, too.
            assert_eq!(ignore_after(ms(10), daemon.wait()).await?, None);
            let daemon = group.release(&daemon).unwrap();
            joined.set(daemon.join().await.unwrap().ok());
            assert_eq!(now() - began, ms(20));
            Ok::<_, Interrupt>(other)
        })
        .await
        .unwrap();
        assert_eq!(joined.get(), Some(1));
        assert_eq!(values(outcome), [Some(3)]);
        assert_eq!(now() - began, ms(30));
        // One that has ended gives its value as well.
        let mut group = Group::new(Wait::All);
        let daemon = group.spawn_daemon(after(0, 4));
        daemon.wait().await.unwrap();
        group.spawn(after(10, 5));
        let daemon = group.release(&daemon).unwrap();
        assert_eq!(daemon.join().await.unwrap(), Ok(4));
        assert_eq!(values(group.join().await.unwrap()), [Some(5)]);
    });
}

/// That a joined group cannot be used, nor a task be added twice, is shown in the documentation of [`TaskGroup`].
///
/// Accepts: curio/task/task_group_use_error
#[test]
fn a_task_is_a_member_of_one_group_at_a_time() {
    run(async {
        let (mut first, mut second) = (Group::new(Wait::All), Group::new(Wait::All));
        let member = first.adopt(spawn(after(20, 1)));
        assert!(second.release(&member).is_none());
        second.adopt(first.release(&member).unwrap());
        assert!(first.release(&member).is_none());
        assert_eq!((first.tasks().count(), second.tasks().count()), (0, 1));
        assert!(first.next_done().await.unwrap().is_none());
        assert_eq!(values(first.join().await.unwrap()), []);
        assert!(!member.is_terminated(), "the other group ended without it");
        assert_eq!(values(second.join().await.unwrap()), [Some(1)]);
        // A stranger is no member.
        let stranger = spawn(after(10, 2));
        let mut group = Group::new(Wait::All);
        group.spawn(after(10, 3));
        assert!(group.release(&stranger).is_none());
        assert_eq!(values(group.join().await.unwrap()), [Some(3)]);
    });
}

/// Accepts: curio/task/taskgroup_misc
#[test]
fn cancel_remaining_of_none_of_one_and_again() {
    run(async {
        let began = now();
        let mut group = Group::new(Wait::All);
        group.cancel_remaining().await.unwrap();
        assert!(group.next_done().await.unwrap().is_none());
        for is_adopted in [false, true] {
            let member = match is_adopted {
                false => group.spawn(after(1_000_000, 1)),
                true => group.adopt(spawn(after(1_000_000, 1))),
            };
            group.cancel_remaining().await.unwrap();
            assert!(member.is_terminated() && member.is_cancelled());
            group.cancel_remaining().await.unwrap();
            assert!(group.release(&member).is_none(), "it is taken out");
        }
        // A single one that has ended stays; one that refuses is waited for.
        group.spawn(after(0, 2)).wait().await.unwrap();
        group.cancel_remaining().await.unwrap();
        group.spawn(kernel::shield(after(50, 3)));
        group.cancel_remaining().await.unwrap();
        assert_eq!(now() - began, ms(50));
        // The group goes on.
        group.spawn(after(10, 4));
        assert_eq!(values(group.join().await.unwrap()), [Some(2), Some(4)]);
    });
}

/// Results are a value that only [`TaskGroup::join`] makes; what there is of them before is empty.
///
/// Accepts: curio/task/errors
#[test]
fn before_its_end_nobody_has_a_members_result() {
    run(async {
        let mut group = Group::new(Wait::All);
        let member = group.spawn(after(20, 1));
        assert!(
            ignore_after(ms(10), group.next_done())
                .await
                .unwrap()
                .is_none()
        );
        let task: Task<_> = group.release(&member).unwrap();
        assert!(task.try_join().is_none());
        assert!(group.next_done().await.unwrap().is_none(), "none is left");
        group.adopt(task);
        let done = group.next_done().await.unwrap().unwrap();
        assert_eq!((done.task, done.result.unwrap()), (member, 1));
        assert!(group.next_done().await.unwrap().is_none());
        let outcome = group.join().await.unwrap();
        assert_eq!(outcome.completed, None);
        assert!(outcome.first_error().is_none() && outcome.into_completed().is_none());
    });
}

/// Accepts: curio-old/kernel/task_gather
#[test]
fn results_of_several_tasks_are_gathered_in_their_order() {
    async fn add(x: i32, y: i32) -> Result<i32, Interrupt> {
        sleep(ms(100 - x as u64)).await?; // the last ends first
        x.checked_add(y).ok_or(Interrupt::UncaughtTimeout)
    }
    run(async {
        let tasks = [spawn(add(1, 1)), spawn(add(2, 2)), spawn(add(3, 3))];
        let mut gathered = Group::new(Wait::All);
        tasks
            .into_iter()
            .for_each(|task| drop(gathered.adopt(task)));
        let outcome = gathered.join().await.unwrap();
        assert_eq!(values(outcome), [Some(2), Some(4), Some(6)]);
        // The failure of one is its own, and at its own place.
        let mut gathered = Group::new(Wait::All);
        for (x, y) in [(1, 1), (2, i32::MAX), (3, 3)] {
            gathered.adopt(spawn(add(x, y)));
        }
        let outcome = gathered.join().await.unwrap();
        let failed = matches!(outcome.results[1].1, Err(GroupError::Failed(_)));
        assert!(failed && outcome.results[2].1.is_ok());
        // The second ended before the first, which was cancelled then.
        assert_eq!(values(outcome), [None, None, Some(6)]);
    });
}

/// Accepts: curio-old/kernel/task_gather_timeout
#[test]
fn a_timeout_while_gathering_cancels_all_members() {
    run(async {
        let began = now();
        let cancelled = Rc::new(Cell::new(0));
        let tasks = [100, 200, 300].map(|millis| {
            let cancelled = cancelled.clone();
            spawn(async move {
                let outcome = after(millis, 0).await;
                if let Err(Interrupt::Cancelled(_)) = outcome {
                    sleep(ms(5)).await?; // cleaning up
                    cancelled.set(cancelled.get() + 1);
                }
                outcome
            })
        });
        let refs = tasks.each_ref().map(|task| task.to_ref());
        let gather = async {
            let mut group = Group::new(Wait::All);
            tasks.into_iter().for_each(|task| drop(group.adopt(task)));
            group.join().await
        };
        let late = timeout_after(ms(150), gather).await;
        assert_eq!(late.err(), Some(Interrupt::TaskTimeout));
        assert_eq!((now() - began, cancelled.get()), (ms(155), 2));
        assert_eq!(refs.map(|task| task.is_cancelled()), [false, true, true]);
    });
}

// ---- locks and permits

/// Only a guard lets go, and only a task that had the lock has one. (That nobody can make one is shown in the documentation of [`RLock`].)
///
/// Accepts: curio/sync/rlock_notowner
#[test]
fn a_task_that_does_not_own_an_rlock_cannot_release_it() {
    run(async {
        let lock = Rc::new(RLock::new());
        let outer = lock.acquire().await.unwrap();
        let inner = lock.acquire().await.unwrap();
        // Others come, wait, and go away by each way there is: none of them takes a level off.
        let [cancelled, aborted] = [0, 1].map(|_| {
            let lock = lock.clone();
            spawn(async move { lock.acquire().await.map(drop) })
        });
        let late = spawn({
            let lock = lock.clone();
            async move { timeout_after(ms(10), lock.acquire()).await.map(drop) }
        });
        sleep(ms(20)).await.unwrap();
        cancelled.cancel().await.unwrap();
        aborted.abort();
        assert_eq!(late.join().await.unwrap(), Err(Interrupt::TaskTimeout));
        assert!(lock.is_locked());
        drop(inner);
        assert!(lock.is_locked());
        drop(lock.acquire().await.unwrap()); // its owner's still
        let other = spawn({
            let lock = lock.clone();
            async move { lock.acquire().await.map(drop) }
        });
        sleep(ms(20)).await.unwrap();
        assert!(!other.is_terminated());
        drop(outer);
        other.join().await.unwrap().unwrap();
        assert!(!lock.is_locked());
    });
}

/// The guard is the argument, so the lock is held; but for one whose earlier wait was dropped half-way.
///
/// Accepts: curio/sync/condition_error
#[test]
fn waiting_at_a_condition_without_the_lock_is_refused() {
    run(async {
        let (lock, condition) = (Lock::new(0), Condition::new());
        let mut guard = lock.acquire().await.unwrap();
        let mut wait = Box::pin(condition.wait(&mut guard));
        assert!(futures::poll!(&mut wait).is_pending());
        drop(wait);
        assert!(!guard.is_held() && !lock.is_locked());
        let refused = |panic: Box<dyn std::any::Any + Send>| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap();
            assert!(text.contains("the lock of this guard was let go"), "{text}");
        };
        let wait = AssertUnwindSafe(async { condition.wait(&mut guard).await });
        refused(wait.catch_unwind().await.unwrap_err());
        let wait = AssertUnwindSafe(condition.wait_for(&mut guard, |_| true));
        refused(wait.catch_unwind().await.unwrap_err());
        assert_eq!(condition.notify(1), 0, "none of them waits");
        drop(guard);
        assert!(lock.try_acquire().is_some());
    });
}

/// Accepts: curio-old/sync/bounded
#[test]
fn a_bounded_semaphore_never_has_more_permits_than_it_began_with() {
    run(async {
        let semaphore = Rc::new(BoundedSemaphore::new(2));
        let too_many = Err(TooManyPermits { limit: 2 });
        assert_eq!(semaphore.release(), too_many);
        let first = semaphore.acquire().await.unwrap();
        assert_eq!(semaphore.release(), too_many, "its guard gives it back");
        let second = semaphore.acquire().await.unwrap();
        assert!(semaphore.is_locked());
        // A forgotten one is given back by hand, once.
        first.forget();
        assert_eq!(semaphore.release(), Ok(()));
        assert_eq!(semaphore.release(), too_many);
        drop(second);
        assert_eq!(semaphore.value(), 2);
        assert_eq!(semaphore.release(), too_many);
        // To the one that waits, if there is one.
        semaphore.try_acquire().unwrap().forget();
        let held = semaphore.acquire().await.unwrap();
        let waiter = spawn({
            let semaphore = semaphore.clone();
            async move { semaphore.acquire().await.map(drop) }
        });
        yield_now().await.unwrap();
        assert_eq!(semaphore.release(), Ok(()));
        assert_eq!(semaphore.release(), too_many, "the waiter has it");
        waiter.join().await.unwrap().unwrap();
        drop(held);
        assert_eq!(semaphore.value(), 2);
    });
    assert_eq!(
        TooManyPermits { limit: 2 }.to_string(),
        "a semaphore of 2 permits was released once too often"
    );
}

// ---- the door

/// Each asks, and has its answer, in one poll: nobody else runs meanwhile, and an interrupt that is pending stays pending.
///
/// Accepts: trap/spawn, trap/cancel, trap/get_current, trap/get_kernel, trap/clock, trap/set_timeout, trap/unset_timeout
#[test]
fn an_immediate_trap_answers_in_the_poll_that_asks() {
    run(async {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let others = Rc::new(Cell::new(0));
        let counter = others.clone();
        let other = spawn(async move {
            while yield_now().await.is_ok() {
                counter.set(counter.get() + 1);
            }
        });
        yield_now().await.unwrap();
        let before = others.get();
        current_task().request_cancel("");
        let lot = Lot::new();
        let child = traps::spawn(async { 7 }).now_or_never().unwrap();
        let me = traps::get_current().now_or_never().unwrap();
        assert_eq!((child.parent(), child.cycles()), (Some(me.id()), 0));
        let remote = traps::get_kernel().now_or_never().unwrap();
        assert!(remote.call(|| {}));
        assert_eq!(traps::clock().now_or_never(), Some(now()));
        let sooner = Some(now() + ms(5));
        let timeout = immediate(|| traps::set_timeout(sooner)).now_or_never();
        let expiry = immediate(|| timeout.unwrap().unset(false)).now_or_never();
        assert_eq!(expiry, Some(Expiry::Not));
        let woken = immediate(|| traps::sched_wake(&lot, 1)).now_or_never();
        assert_eq!(woken, Some(0));
        let waiting = immediate(|| traps::io_waiting(&ours)).now_or_never();
        assert_eq!(waiting, Some((None, None)));
        immediate(|| traps::io_release(&ours))
            .now_or_never()
            .unwrap();
        let cancelled = || traps::cancel_task(&other, Interrupt::cancelled()).now_or_never();
        assert_eq!((cancelled(), cancelled()), (Some(true), Some(false)));
        assert_eq!(others.get(), before, "nobody else ran");
        let told = sleep(ms(1)).await;
        assert!(matches!(told, Err(Interrupt::Cancelled(_))));
        assert_eq!(child.join().await.unwrap(), 7);
        other.join().await.unwrap();
    });
}

/// Each is told of the interrupt that is pending, and waits for nothing then.
///
/// Accepts: trap/read_wait, trap/write_wait, trap/future_wait, trap/sleep, trap/join, trap/sched_wait
#[test]
fn a_blocking_trap_is_a_cancellation_point_before_it_waits() {
    fn told<T>(answer: impl Future<Output = T>, ask: impl FnOnce(T) -> Option<Interrupt>) {
        kernel::set_cancellation(Some(Interrupt::cancelled()));
        // One that waits is not ready at its first poll.
        let answer = answer.now_or_never().expect("it answers at once");
        assert_eq!(ask(answer), Some(Interrupt::cancelled()));
        assert!(kernel::pending_cancellation().is_none(), "told once");
    }
    run(async {
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut theirs, b"it is readable and writable").unwrap();
        let in_io = |error: std::io::Error| Interrupt::find_in(&error).cloned();
        let (lot, other) = (Lot::new(), spawn(std::future::pending::<()>()));
        told(traps::read_wait(&ours), |answer| in_io(answer.unwrap_err()));
        told(traps::write_wait(&ours), |answer| {
            in_io(answer.unwrap_err())
        });
        let never_starts = traps::future_wait(|_| unreachable!("nobody would wait"));
        told(never_starts, |answer| answer.err());
        told(traps::sleep(ms(1)), |answer| answer.err());
        told(traps::sleep(Duration::ZERO), |answer| answer.err());
        told(traps::sched_wait(&lot, WaitKind::Custom), |answer| {
            answer.err()
        });
        told(traps::join_wait(&other), |answer| answer.err());
        assert_eq!((lot.len(), traps::io_waiting(&ours)), (0, (None, None)));
        // One that need not wait is none.
        other.abort();
        kernel::set_cancellation(Some(Interrupt::cancelled()));
        assert_eq!(traps::join_wait(&other).now_or_never(), Some(Ok(())));
        assert!(kernel::pending_cancellation().is_some());
    });
}

// ---- errors

#[test]
fn reasons_are_equal_if_they_are_the_same() {
    let reason = Reason::new(7);
    assert_eq!(reason, reason.clone());
    assert_ne!(reason, Reason::new(7));
    assert_eq!(Reason::default(), Reason::default());
    assert_ne!(reason, Reason::default());
    assert_ne!(Reason::default(), reason);
}

/// An error that knows more than its interrupt, and forgets it when that is replaced.
#[derive(Debug, PartialEq)]
struct Noted(Interrupt, &'static str);
impl From<Interrupt> for Noted {
    fn from(interrupt: Interrupt) -> Self {
        Self(interrupt, "")
    }
}
impl MaybeInterrupt for Noted {
    fn interrupt(&self) -> Option<&Interrupt> {
        Some(&self.0)
    }
}

#[test]
fn an_error_that_says_what_the_block_would_say_is_left_as_it_is() {
    run(async {
        let late = timeout_after(ms(1), async {
            let told = sleep(ms(2)).await.unwrap_err();
            Err::<(), _>(Noted(told, "half done"))
        });
        assert_eq!(late.await, Err(Noted(Interrupt::TaskTimeout, "half done")));
    });
}
