//! Cancellation: Curio's tests, and rules R1 to R5 and R10 to R12.

use std::cell::Cell;
use std::future::pending;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::channel::oneshot;
use futures::future::{Either, join, join_all, select, select_all};
use futures::stream::{FuturesUnordered, StreamExt};
use kernel::traps::{Lot, sched_wait, sched_wake};
use kernel::{
    Interrupt, JoinError, Reason, WaitKind, check_cancellation, current_task, ignore_after,
    interruptible, now, pending_cancellation, set_cancellation, shield, sleep, spawn,
    take_cancellation, timeout_after, yield_now,
};

use super::{Story, Teller, ms, run, run_with, s};

const fn is_cancelled<T>(outcome: &Result<T, Interrupt>) -> bool {
    matches!(outcome, Err(Interrupt::Cancelled(_)))
}

/// Accepts: curio/kernel/sleep_cancel
#[test]
fn r3_a_sleeper_is_cancelled_where_it_sleeps() {
    run_with(async |clock| {
        let task = spawn(sleep(s(1)));
        sleep(ms(100)).await.unwrap();
        task.cancel().await.unwrap();
        assert!(is_cancelled(&task.join().await.unwrap()));
        assert_eq!(clock.elapsed(), ms(100));
    });
}

/// Accepts: curio/kernel/task_cancel, trap/cancel
#[test]
fn r4_a_task_that_was_cancelled_before_it_ran_starts_and_is_interrupted_where_it_blocks() {
    let story = Story::default();
    run(async {
        let child = story.clone();
        let task = spawn(async move {
            child.tell("start");
            let interrupt = sleep(s(1)).await.unwrap_err();
            child.tell(&interrupt);
            // Asynchronous clean-up works.
            sleep(s(1)).await.unwrap();
            child.tell("cleaned up");
            interrupt
        });
        story.tell("cancelling");
        task.cancel().await.unwrap();
        story.tell("done");
    });
    story.assert(&[
        "cancelling",
        "start",
        "task cancelled",
        "cleaned up",
        "done",
    ]);
}

/// Accepts: curio/kernel/task_cancel_poll
#[test]
fn a_shielded_task_polls_for_its_cancellation() {
    let story = Story::default();
    run(async {
        let child = story.clone();
        let task = spawn(shield(async move {
            child.tell("start");
            sleep(s(1)).await.unwrap();
            child.tell("slept");
            assert!(
                check_cancellation().is_ok(),
                "nothing is raised behind a shield"
            );
            assert!(matches!(
                pending_cancellation(),
                Some(Interrupt::Cancelled(_))
            ));
            child.tell("seen");
        }));
        yield_now().await.unwrap();
        task.cancel().await.unwrap();
        story.tell("done");
    });
    story.assert(&["start", "slept", "seen", "done"]);
}

/// Accepts: curio/kernel/task_cancel_not_blocking, curio/task/cancel_noblock
#[test]
fn a_cancel_that_does_not_wait_returns_at_once() {
    let story = Story::default();
    run(async {
        let child = story.clone();
        let task = spawn(async move {
            let _finally = Teller(child.clone(), "finally");
            child.tell("start");
            let outcome = sleep(s(1)).await;
            child.tell("cancelled");
            sleep(s(1)).await.unwrap();
            outcome
        });
        yield_now().await.unwrap();
        assert!(task.request_cancel(Reason::default()));
        story.tell("requested");
        assert!(
            !task.request_cancel(Reason::default()),
            "only the first counts"
        );
        task.cancel().await.unwrap();
        story.tell("done");
        assert!(is_cancelled(&task.join().await.unwrap()));
    });
    story.assert(&["start", "requested", "cancelled", "finally", "done"]);
}

/// Accepts: curio/kernel/task_cancel_join
#[test]
fn join_of_a_cancelled_task_tells_that_it_was_cancelled() {
    run(async {
        let task = spawn(sleep(s(1)));
        task.cancel().await.unwrap();
        assert!(task.is_cancelled());
        assert!(is_cancelled(&task.join().await.unwrap()));
    });
}

/// Accepts: curio/kernel/task_cancel_join_wait
#[test]
fn a_join_that_waits_sees_the_cancellation_by_a_third_task() {
    let story = Story::default();
    run(async {
        let child = Rc::new(spawn(sleep(s(10))));
        let (victim, teller) = (child.clone(), story.clone());
        let canceller = spawn(async move {
            sleep(s(1)).await.unwrap();
            teller.tell("cancel");
            victim.cancel().await.unwrap();
        });
        story.tell("joining");
        assert!(is_cancelled(&child.join().await.unwrap()));
        story.tell("joined");
        canceller.join().await.unwrap();
    });
    story.assert(&["joining", "cancel", "joined"]);
}

/// Accepts: curio/kernel/task_child_cancel
#[test]
fn handlers_that_cancel_their_children_unwind_from_the_inside() {
    let story = Story::default();
    run(async {
        let (child, parent, grandparent) = (story.clone(), story.clone(), story.clone());
        let child = async move {
            child.tell("start");
            sleep(s(1)).await.unwrap_err();
            child.tell("child cancelled");
        };
        let parent = async move {
            let task = spawn(child);
            sleep(s(1)).await.unwrap_err();
            task.cancel().await.unwrap();
            parent.tell("parent cancelled");
        };
        let grandparent = async move {
            let task = spawn(parent);
            sleep(s(1)).await.unwrap_err();
            task.cancel().await.unwrap();
            grandparent.tell("grandparent cancelled");
        };
        let task = spawn(grandparent);
        sleep(ms(100)).await.unwrap();
        story.tell("cancelling");
        task.cancel().await.unwrap();
        story.tell("done");
    });
    story.assert(&[
        "start",
        "cancelling",
        "child cancelled",
        "parent cancelled",
        "grandparent cancelled",
        "done",
    ]);
}

/// Accepts: curio/kernel/task_ready_cancel
#[test]
fn r2_a_task_whose_wait_is_over_finishes_it_and_is_cancelled_at_the_next() {
    let story = Story::default();
    run_with(async |clock| {
        let child = story.clone();
        let task = Rc::new(spawn(async move {
            child.tell("sleep");
            sleep(s(1)).await.expect("done before it was cancelled");
            child.tell("slept");
            let outcome = sleep(s(1)).await;
            child.tell("interrupted");
            outcome
        }));
        let (victim, teller) = (task.clone(), story.clone());
        let parent = spawn(async move {
            sleep(ms(500)).await.unwrap();
            teller.tell("cancel");
            victim.cancel().await.unwrap();
            teller.tell("cancel done");
        });
        sleep(ms(100)).await.unwrap();
        clock.advance(s(1)); // both are ready when the loop comes back
        parent.join().await.unwrap();
    });
    story.assert(&["sleep", "cancel", "slept", "interrupted", "cancel done"]);
}

/// Accepts: curio/kernel/double_cancel
#[test]
fn a_second_cancel_waits_for_the_clean_up_that_the_first_began() {
    let story = Story::default();
    run(async {
        let sleeper = story.clone();
        let task = spawn(async move {
            sleeper.tell("start");
            sleep(s(9)).await.unwrap_err();
            sleeper.tell("cancel request");
            sleep(s(2)).await.expect("not aborted");
            sleeper.tell("cancelled");
        });
        sleep(ms(500)).await.unwrap();
        let first = timeout_after(s(1), task.cancel()).await;
        assert_eq!(first, Err(Interrupt::TaskTimeout));
        story.tell("retry");
        task.cancel().await.unwrap();
        story.tell("done");
    });
    story.assert(&["start", "cancel request", "retry", "cancelled", "done"]);
}

/// Accepts: curio/kernel/custom_cancel, curio/task/cancel_custom_exception, curio/task/cancel_custom_exception_instance, curio-defect/C6
#[test]
fn a_cancellation_carries_the_very_value_that_the_canceller_chose() {
    run(async {
        let reason = Reason::new(vec![1, 2, 3]);
        let task = spawn(sleep(s(1)));
        task.request_cancel(reason.clone());
        let Err(Interrupt::Cancelled(seen)) = task.join().await.unwrap() else {
            panic!("it was cancelled");
        };
        assert!(seen == reason && seen != Reason::new(vec![1, 2, 3]));
        assert_eq!(seen.downcast_ref(), Some(&vec![1, 2, 3]));
        // Any interrupt can be sent, and a task may swallow what it gets: its value says so.
        let task = spawn(async { sleep(s(1)).await.unwrap_err() });
        assert!(kernel::traps::cancel_task(&task, Interrupt::UncaughtTimeout).await);
        assert_eq!(task.join().await.unwrap(), Interrupt::UncaughtTimeout);
        let task = spawn(async { sleep(s(1)).await.is_err() });
        task.cancel().await.unwrap();
        assert!(task.is_cancelled(), "it was asked to");
        assert!(task.join().await.unwrap(), "and ended well");
    });
}

/// Accepts: curio/task/late_join
#[test]
fn cancelling_what_has_ended_does_nothing() {
    run(async {
        let task = spawn(async { 1 });
        yield_now().await.unwrap();
        task.cancel().await.unwrap();
        assert!(!task.request_cancel("late"));
        assert!(!task.is_cancelled());
        assert_eq!(task.join().await.unwrap(), 1);
    });
}

/// Accepts: curio/task/self_cancellation
#[test]
fn a_task_that_cancels_itself_is_interrupted_at_its_next_block() {
    run(async {
        let task = spawn(async {
            assert!(current_task().request_cancel("me"));
            kernel::traps::clock().await;
            let lot = Lot::new();
            sched_wake(&lot, 1);
            let outcome = sleep(s(1)).await;
            sleep(s(1)).await.expect("R11: once");
            outcome
        });
        assert!(is_cancelled(&task.join().await.unwrap()));
        // Waiting for one's own end is where it hits.
        let task = spawn(async { current_task().wait().await.is_ok() });
        task.cancel().await.unwrap();
        assert!(!task.join().await.unwrap());
    });
}

/// Accepts: curio/task/defer_cancellation, curio/task/disable_cancellation_function
#[test]
fn a_shield_holds_a_cancellation_back_until_after_it() {
    let story = Story::default();
    run_with(async |clock| {
        let child = story.clone();
        let task = spawn(async move {
            shield(async {
                child.tell("shielded");
                shield(sleep(s(1))).await.unwrap();
                sleep(s(1)).await.unwrap();
            })
            .await;
            child.tell("outside");
            let outcome = check_cancellation();
            assert!(check_cancellation().is_ok(), "told once");
            sleep(s(1)).await.unwrap();
            outcome
        });
        sleep(ms(500)).await.unwrap();
        task.cancel().await.unwrap();
        assert!(is_cancelled(&task.join().await.unwrap()));
        assert_eq!(clock.elapsed(), s(3));
        // Timeouts are held back too.
        let outcome = timeout_after(s(1), async {
            shield(sleep(s(5))).await?;
            assert!(yield_now().await.is_err());
            sleep(s(5)).await
        });
        outcome.await.unwrap();
        assert_eq!(clock.elapsed(), s(13));
    });
    story.assert(&["shielded", "outside"]);
}

/// Raising by hand is `set_cancellation` here: an error that a block returns is a value, and passes shields as any other.
///
/// Accepts: curio/task/explicit_raise_cancel_disable, curio/task/disable_cancellation_explicit_raise
#[test]
fn an_interrupt_raised_by_hand_is_pending_in_nested_shields_and_passes_out_of_the_outermost() {
    run(async {
        let passed = shield(async { Err::<(), _>(Interrupt::cancelled()) }).await;
        assert!(is_cancelled(&passed));
        assert!(check_cancellation().is_ok(), "it is not pending as well");
        shield(async {
            shield(async {
                assert_eq!(set_cancellation(Some(Interrupt::cancelled())), None);
                sleep(s(1)).await.unwrap();
            })
            .await;
            sleep(s(1)).await.unwrap();
            assert!(pending_cancellation().is_some());
        })
        .await;
        assert!(is_cancelled(&sleep(s(1)).await));
        sleep(s(1)).await.unwrap();
    });
}

/// Accepts: curio/task/set_cancellation
#[test]
fn a_pending_cancellation_can_be_looked_at_taken_and_replaced() {
    run(async {
        let task = spawn(async {
            shield(yield_now()).await.unwrap();
            shield(async {
                let before = set_cancellation(Some(Interrupt::TaskTimeout));
                assert!(matches!(before, Some(Interrupt::Cancelled(_))));
                let no_match = take_cancellation(|it| matches!(it, Interrupt::Cancelled(_)));
                assert_eq!(no_match, None);
                assert_eq!(pending_cancellation(), Some(Interrupt::TaskTimeout));
                let taken = take_cancellation(|it| *it == Interrupt::TaskTimeout);
                assert_eq!(taken, Some(Interrupt::TaskTimeout));
                assert_eq!(pending_cancellation(), None);
            })
            .await;
            sleep(s(1)).await.unwrap();
            assert_eq!(set_cancellation(Some(Interrupt::UncaughtTimeout)), None);
            let replaced = set_cancellation(Some(Interrupt::TaskTimeout));
            assert_eq!(replaced, Some(Interrupt::UncaughtTimeout));
            assert_eq!(sleep(s(1)).await, Err(Interrupt::TaskTimeout));
            set_cancellation(Some(Interrupt::TaskTimeout));
            assert_eq!(set_cancellation(None), Some(Interrupt::TaskTimeout));
            sleep(s(1)).await.unwrap();
        });
        yield_now().await.unwrap();
        task.cancel().await.unwrap();
        task.join().await.unwrap();
    });
}

#[test]
fn to_take_a_cancellation_is_not_to_take_the_timeout_around() {
    run_with(async |clock| {
        let outcome = timeout_after(s(5), async {
            set_cancellation(Some(Interrupt::cancelled()));
            assert!(take_cancellation(|_| true).is_some());
            shield(sleep(s(6))).await?;
            assert_eq!(pending_cancellation(), Some(Interrupt::TaskTimeout));
            sleep(s(9)).await
        });
        assert_eq!(outcome.await, Err(Interrupt::TaskTimeout));
        assert_eq!(clock.elapsed(), s(6));
    });
}

/// R11: also when another timeout, told behind a shield, has the kernel look through what is untold.
#[test]
fn r11_a_timeout_that_was_taken_does_not_come_again() {
    run_with(async |clock| {
        let outcome = timeout_after(s(5), async {
            shield(sleep(s(6))).await?;
            assert!(take_cancellation(|_| true).is_some());
            let inner = shield(timeout_after(s(1), sleep(s(9)))).await;
            assert_eq!(inner, Err(Interrupt::TaskTimeout));
            sleep(s(1)).await
        });
        outcome.await.unwrap();
        assert_eq!(clock.elapsed(), s(8));
    });
}

/// R1 and R11: each wait that is outstanding is told, each firing once.
#[test]
fn r11_both_waits_of_a_join_are_interrupted_and_the_next_works() {
    run(async {
        let task = spawn(async {
            let (a, b) = join(sleep(s(1)), sleep(s(2))).await;
            assert!(is_cancelled(&a) && is_cancelled(&b));
            sleep(s(1)).await.unwrap();
            let lost = select(sleep(s(1)), sleep(s(2))).await;
            assert!(matches!(lost, Either::Left((Ok(_), _))));
        });
        yield_now().await.unwrap();
        task.cancel().await.unwrap();
        task.join().await.unwrap();
    });
}

/// Accepts: rule/R5
#[test]
fn r5_each_leaf_is_woken_by_its_own_waker() {
    run(async {
        let task = spawn(async {
            let mut many: FuturesUnordered<_> = (1..=5).map(|i| sleep(s(i))).collect();
            let mut outcomes = Vec::new();
            while let Some(outcome) = many.next().await {
                outcomes.push(is_cancelled(&outcome));
            }
            sleep(s(1)).await.unwrap();
            outcomes
        });
        sleep(ms(1500)).await.unwrap();
        task.cancel().await.unwrap();
        assert_eq!(task.join().await.unwrap(), [false, true, true, true, true]);
        let task = spawn(async { select_all((1..=5).map(|i| sleep(s(i)))).await });
        yield_now().await.unwrap();
        task.cancel().await.unwrap();
        let (outcome, _, rest) = task.join().await.unwrap();
        assert!(is_cancelled(&outcome));
        assert_eq!(rest.len(), 4);
        // More than select_all's threshold for FuturesUnordered; a timeout is told to each as well.
        let all = timeout_after(s(10), async {
            Ok::<_, Interrupt>(join_all((0..100).map(|i| sleep(s(i)))).await)
        });
        let outcomes = all.await.unwrap();
        assert_eq!(
            outcomes.iter().filter(|outcome| outcome.is_ok()).count(),
            10
        );
    });
}

/// Accepts: rule/R10
#[test]
fn r10_a_shield_in_one_branch_does_not_shield_its_sibling() {
    run(async {
        let task = spawn(async {
            let (shielded, plain) = join(shield(sleep(s(5))), sleep(s(5))).await;
            assert!(shielded.is_ok());
            assert!(is_cancelled(&plain));
            // It was told to the sibling: nothing is left for later.
            sleep(s(1)).await.unwrap();
        });
        yield_now().await.unwrap();
        task.cancel().await.unwrap();
        task.join().await.unwrap();
        let task = spawn(async {
            let shielded = pin!(shield(sleep(s(5))));
            let Either::Right((plain, shielded)) = select(shielded, sleep(s(9))).await else {
                panic!("the shielded branch is not interrupted");
            };
            assert!(is_cancelled(&plain));
            shielded.await.unwrap();
            // A shield that was begun and dropped shields no longer.
            sleep(s(1)).await.unwrap();
        });
        yield_now().await.unwrap();
        task.cancel().await.unwrap();
        task.join().await.unwrap();
    });
}

/// Accepts: rule/R12
#[test]
fn r12_a_task_in_foreign_futures_keeps_its_cancellation_until_it_can_be_told() {
    run(async {
        let (sender, receiver) = oneshot::channel::<i32>();
        let task = spawn(async {
            let value = receiver.await.unwrap();
            (value, sleep(s(1)).await)
        });
        yield_now().await.unwrap();
        task.request_cancel("");
        sleep(s(1)).await.unwrap();
        assert!(!task.is_terminated());
        sender.send(5).unwrap();
        let (value, outcome) = task.join().await.unwrap();
        assert_eq!(value, 5);
        assert!(is_cancelled(&outcome));

        let task = spawn(interruptible(pending::<()>()));
        yield_now().await.unwrap();
        task.cancel().await.unwrap();
        assert!(is_cancelled(&task.join().await.unwrap()));
        assert_eq!(run_ready(interruptible(async { 4 })).await, Ok(4));
        let late = timeout_after(s(1), interruptible(pending::<()>())).await;
        assert_eq!(late, Err(Interrupt::TaskTimeout));

        let task = spawn(pending::<()>());
        yield_now().await.unwrap();
        assert!(task.abort());
        assert!(task.is_terminated());
        assert!(matches!(task.join().await, Err(JoinError::Aborted)));
    });
}

/// With a cancellation pending, what need not wait is not interrupted.
async fn run_ready<T>(future: impl Future<Output = Result<T, Interrupt>>) -> Result<T, Interrupt> {
    set_cancellation(Some(Interrupt::cancelled()));
    let outcome = future.await;
    assert!(set_cancellation(None).is_some());
    outcome
}

#[test]
fn an_abort_drops_at_once_and_a_self_abort_when_the_poll_returns() {
    let story = Story::default();
    run(async {
        let teller = Teller(story.clone(), "dropped");
        let task = spawn(async move {
            let _teller = teller;
            sleep(s(1)).await
        });
        yield_now().await.unwrap();
        assert!(task.abort() && !task.abort());
        story.tell("aborted");
        let teller = Teller(story.clone(), "self dropped");
        let task = spawn(async move {
            assert!(current_task().abort());
            teller.0.tell("goes on");
            yield_now().await.unwrap();
            teller.0.tell("not here");
        });
        assert!(matches!(task.join().await, Err(JoinError::Aborted)));
        // One that ends in the poll in which it was aborted has ended.
        let task = spawn(async { current_task().abort() });
        assert!(task.join().await.unwrap());
        let unstarted = spawn(async { unreachable!() });
        unstarted.abort();
        assert!(matches!(
            unstarted.try_join(),
            Some(Err::<(), _>(JoinError::Aborted))
        ));
    });
    story.assert(&["dropped", "aborted", "goes on", "self dropped"]);
}

/// Accepts: curio/kernel/pending_cancellation, sweepea-defect/S9
#[test]
fn what_is_pending_is_told_at_the_entry_of_every_blocking_trap_and_nothing_is_registered() {
    use kernel::traps::{future_wait, join_wait, read_wait, write_wait};
    use std::os::unix::net::UnixStream;

    run(async {
        let (socket, _peer) = UnixStream::pair().unwrap();
        let lot = Lot::new();
        let other = spawn(sleep(s(1)));
        let pend = || assert_eq!(set_cancellation(Some(Interrupt::cancelled())), None);
        let told = |error: std::io::Error| {
            use kernel::MaybeInterrupt;
            matches!(error.interrupt(), Some(Interrupt::Cancelled(_)))
        };
        pend();
        assert!(told(read_wait(&socket).await.unwrap_err()));
        pend();
        assert!(told(write_wait(&socket).await.unwrap_err()));
        pend();
        assert!(is_cancelled(
            &future_wait(|_| unreachable!("not started")).await
        ));
        pend();
        assert!(is_cancelled(&sched_wait(&lot, WaitKind::Lock).await));
        assert!(lot.is_empty());
        pend();
        assert!(is_cancelled(&join_wait(&other).await));
        pend();
        assert!(is_cancelled(&sleep(s(1)).await));
        pend();
        assert!(is_cancelled(&yield_now().await));
        pend();
        assert!(is_cancelled(&interruptible(pending::<()>()).await));
        // A timeout that expired behind a shield comes at the next wait in a lot.
        let outcome = timeout_after(s(1), async {
            shield(sleep(s(2))).await?;
            sched_wait(&lot, WaitKind::Lock).await
        });
        assert_eq!(outcome.await, Err(Interrupt::TaskTimeout));
        // One that nobody was told of is forgotten with its block.
        let outcome = timeout_after(s(1), async {
            shield(sleep(s(2))).await?;
            Ok::<_, Interrupt>(())
        });
        outcome.await.unwrap();
        assert_eq!(pending_cancellation(), None);
        sleep(s(1)).await.unwrap();
    });
}

/// Accepts: sweepea-defect/S14
#[test]
fn a_task_that_was_woken_is_neither_cancelled_in_its_old_wait_nor_queued_twice() {
    run(async {
        let lot = Rc::new(Lot::new());
        let waits = Rc::new(Cell::new(0));
        let (parked, counter) = (lot.clone(), waits.clone());
        let task = spawn(async move {
            sched_wait(&parked, WaitKind::Event)
                .await
                .expect("woken first");
            counter.set(counter.get() + 1);
            sleep(s(1)).await
        });
        yield_now().await.unwrap();
        assert_eq!(sched_wake(&lot, 5), 1);
        task.request_cancel("");
        assert_eq!(sched_wake(&lot, 5), 0);
        assert!(is_cancelled(&task.join().await.unwrap()));
        assert_eq!((waits.get(), task.cycles()), (1, 2));
    });
}

#[test]
fn an_interrupted_wait_that_is_dropped_unseen_leaves_the_cancellation_pending() {
    run(async {
        let (sender, receiver) = oneshot::channel::<()>();
        let task = spawn(async {
            // The foreign branch is polled first and is ready when the other is interrupted.
            let Either::Left(_) = select(receiver, sleep(s(9))).await else {
                panic!("the first branch is ready");
            };
            sleep(s(1)).await
        });
        yield_now().await.unwrap();
        task.request_cancel("");
        sender.send(()).unwrap();
        assert!(is_cancelled(&task.join().await.unwrap()));
    });
}

#[test]
fn a_leaf_can_be_moved_to_another_task_and_outlive_its_own() {
    run_with(async |clock| {
        let (sender, receiver) = oneshot::channel();
        let first = spawn(async move {
            let mut nap = Box::pin(timeout_after(s(20), sleep(s(5))));
            assert!(futures::poll!(&mut nap).is_pending());
            sender.send(nap).ok().unwrap();
        });
        first.join().await.unwrap();
        let moved = receiver.await.unwrap();
        let second = spawn(moved);
        sleep(s(1)).await.unwrap();
        second.cancel().await.unwrap();
        assert!(is_cancelled(&second.join().await.unwrap()));
        assert_eq!(clock.elapsed(), s(1));

        // Timed out by a block that began in a task that has ended.
        let slot = Rc::new(Cell::new(None));
        let place = slot.clone();
        spawn(async move {
            let mut nap = Box::pin(timeout_after(s(5), sleep(s(50))));
            assert!(futures::poll!(&mut nap).is_pending());
            place.set(Some(nap));
        })
        .join()
        .await
        .unwrap();
        let before = now();
        let outcome = ignore_after(s(60), slot.take().unwrap()).await;
        assert_eq!(outcome, Err(Interrupt::UncaughtTimeout));
        assert_eq!(now() - before, s(5));
    });
}

#[test]
fn a_leaf_that_outlives_its_task_does_not_wake_the_next_one_in_its_place() {
    run(async {
        let kept = Rc::new(Cell::new(None));
        let place = kept.clone();
        let first = spawn(async move {
            let mut nap = Box::pin(sleep(s(5)));
            assert!(futures::poll!(&mut nap).is_pending());
            place.set(Some(nap));
        });
        first.join().await.unwrap();
        let next = spawn(pending::<()>());
        sleep(s(6)).await.unwrap();
        assert_eq!(next.cycles(), 1);
        assert!(next.info().unwrap().waits.is_empty());
        kept.take().unwrap().await.unwrap();
    });
}

/// Asks the kernel when it is dropped, as foreign code may.
struct Curious(Arc<AtomicBool>);

impl Drop for Curious {
    fn drop(&mut self) {
        self.0
            .store(current_task().is_cancelled(), Ordering::Relaxed);
    }
}

#[test]
fn a_reason_that_another_replaces_is_dropped_where_it_may_ask_the_kernel() {
    run(async {
        let asked = Arc::new(AtomicBool::new(false));
        let reason = Reason::new(Curious(asked.clone()));
        shield(async {
            set_cancellation(Some(Interrupt::Cancelled(reason)));
            current_task().request_cancel(Reason::default());
        })
        .await;
        assert!(asked.load(Ordering::Relaxed));
    });
}
