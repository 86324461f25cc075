//! Claims about the tables themselves: what ended has left nothing behind.

use std::future::{Future, pending};
use std::task::Poll;

use futures::future::{join, select};
use futures::stream::StreamExt;

use super::*;
use crate::traps::{Lot, future_wait, read_wait, sched_wait};
use crate::{ignore_after, interruptible, shield, sleep, spawn, timeout_after, yield_now};

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn kernel<'env>() -> Kernel<'env> {
    Builder::new().clock(VirtualClock::new()).build().unwrap()
}

/// Nodes (and with them scopes and lots), timers, sources, remote waits, lots of joiners, reasons: of all this nothing is left.
fn assert_clean(kernel: &Kernel<'_>) {
    let state = kernel.core.state.borrow();
    let State {
        nodes,
        wheel,
        reactor,
        ..
    } = &*state;
    assert_eq!((nodes.live(), wheel.len()), (1, 0), "the lot `idle` alone");
    assert!(reactor.is_empty() && reactor.waiting() == 0);
    assert_eq!(state.remote_waits, 0);
    assert!(state.reasons.is_empty() && state.names.is_empty());
    assert!(state.aftermath.is_empty() && state.due.is_empty());
    assert_eq!((state.current, state.scope), (NIL, ROOT));
    assert_eq!(state.tasks.live(), 0);
    assert!(state.ready.is_empty());
}

/// One of each wait, raced against each other.
async fn wait_in_every_way(lot: Rc<Lot>) -> bool {
    let (reader, _writer) = std::os::unix::net::UnixStream::pair().unwrap();
    let child = spawn(sleep(s(500)));
    let mut kept = None;
    let waits = join(
        join(
            timeout_after(s(200), join_results(sleep(s(100)), child.wait())),
            shield(ignore_after(s(3), sleep(Duration::from_millis(5)))),
        ),
        join(
            select(
                Box::pin(sched_wait(&lot, WaitKind::Lock)),
                Box::pin(interruptible(pending::<()>())),
            ),
            select(
                Box::pin(future_wait(|completer| kept = Some(completer))),
                Box::pin(async { read_wait(&reader).await }),
            ),
        ),
    );
    let _ = waits.await;
    child.cancel().await.is_ok()
}

async fn join_results<A, B, E>(
    a: impl Future<Output = Result<A, E>>,
    b: impl Future<Output = Result<B, E>>,
) -> Result<(A, B), E> {
    let (a, b) = join(a, b).await;
    Ok((a?, b?))
}

/// Accepts: sweepea-defect/S11, sweepea-defect/S22, curio-defect/C9
#[test]
fn nothing_is_left_of_a_task_that_was_cancelled_aborted_or_closed() {
    for steps in 0..4 {
        for (abort, cancel) in [(true, false), (false, true), (false, false)] {
            let mut kernel = kernel();
            let task = kernel.spawn(wait_in_every_way(Rc::new(Lot::new())));
            task.set_name("victim");
            for _ in 0..steps {
                kernel.run(yield_now()).unwrap().unwrap();
            }
            // Before it ran, the first wait alone would be told, and the rest would wait for ever.
            if cancel && steps > 0 {
                kernel.run(task.cancel()).unwrap().unwrap();
            }
            if abort {
                task.abort();
                kernel.turn(Some(Duration::ZERO)).unwrap();
            }
            let _running = kernel.core.enter().unwrap();
            kernel.core.close();
            while kernel.core.run_ready(1, None) > 0 {} // the slots of tasks that ended while queued
            assert_clean(&kernel);
        }
    }
}

#[test]
fn nothing_is_left_of_waits_that_ended_timed_out_or_lost_a_race() {
    let mut kernel = kernel();
    kernel
        .run(async {
            for _ in 0..3 {
                sleep(s(1)).await.unwrap();
                let _ = timeout_after(s(1), sleep(s(2))).await;
                let _ = timeout_after(s(2), timeout_after(s(9), sleep(s(5)))).await;
                ignore_after(s(9), sleep(s(1))).await.unwrap();
                select(sleep(s(1)), sleep(s(2))).await;
                shield(sleep(s(1))).await.unwrap();
                crate::drop_after(s(1), pending::<()>()).await;
                let mut polled = Box::pin(timeout_after(s(5), shield(sleep(s(5)))));
                assert!(futures::poll!(&mut polled) == Poll::Pending);
                let task = spawn(sleep(s(5)));
                let _ = timeout_after(s(1), task.wait()).await;
                task.cancel().await.unwrap();
                spawn(async { panic!("contained") })
                    .join()
                    .await
                    .unwrap_err();
            }
        })
        .unwrap();
    assert_clean(&kernel);
}

impl Core {
    pub(super) fn live_nodes(&self) -> usize {
        self.state.borrow().nodes.live()
    }
}

#[test]
fn the_end_of_a_task_frees_the_nodes_of_those_who_wait_for_it() {
    let live = || with_current(|core| core.unwrap().live_nodes());
    let mut kernel = kernel();
    let waits = async {
        let before = live();
        let task = spawn(yield_now());
        let mut waits = [task.wait(), task.wait()];
        for wait in &mut waits {
            assert!(futures::poll!(wait).is_pending());
        }
        assert_eq!(live(), before + 1, "the first one is noted");
        while !task.is_terminated() {
            yield_now().await.unwrap();
        }
        assert_eq!(live(), before);
        let [polled, dropped] = waits;
        drop(dropped);
        polled.await.unwrap();
        task.join().await.unwrap().unwrap();
    };
    kernel.run(waits).unwrap();
    assert_clean(&kernel);
}

/// A joiner is told what happened first, its cancellation or the end of the task, whoever is polled first.
#[test]
fn a_joiner_that_was_interrupted_is_told_so_although_the_task_has_ended_since() {
    let mut kernel = kernel();
    let waits = async {
        let task = spawn(pending::<()>());
        let [cancelled, other, late] = [(); 3].map(|()| spawn(task.wait()));
        yield_now().await.unwrap();
        assert!(cancelled.request_cancel(""));
        task.abort();
        assert!(late.request_cancel(""));
        let outcome = cancelled.join().await.unwrap();
        assert!(matches!(outcome, Err(Interrupt::Cancelled(_))));
        other.join().await.unwrap().unwrap();
        late.join().await.unwrap().unwrap();
    };
    kernel.run(waits).unwrap();
    assert_clean(&kernel);
}

/// Once a wait is interrupted, the number of the block that did it stands where its serial number was; sooner or later they are the same.
#[test]
fn an_answer_that_comes_after_the_interrupt_changes_nothing() {
    let clock = VirtualClock::new();
    let mut kernel = Builder::new().clock(clock.clone()).build().unwrap();
    let kept = Rc::new(Cell::new(None));
    for _ in 0..40 {
        let keep = Rc::clone(&kept);
        let task = kernel.spawn(timeout_after(
            s(1),
            future_wait(move |completer| keep.set(Some(completer))),
        ));
        kernel.turn(Some(Duration::ZERO)).unwrap();
        clock.advance(s(1));
        drop(kept.take());
        kernel.turn(Some(Duration::ZERO)).unwrap(); // fires the timer, reads the answer, polls the task
        let outcome = kernel.run(task.join()).unwrap().unwrap();
        assert_eq!(outcome, Err(Interrupt::TaskTimeout));
    }
    assert_clean(&kernel);
}

#[test]
#[should_panic(expected = "a task of one kernel was waited for in another")]
fn a_task_cannot_be_waited_for_in_another_kernel() {
    let other = kernel();
    let task = other.spawn(pending::<()>());
    let _ = kernel().run(task.wait());
}

#[test]
fn a_slot_that_is_retired_while_queued_is_free_after_its_pop() {
    let mut kernel = kernel();
    for _ in 0..100 {
        let task = kernel.spawn(async {});
        task.abort();
        drop(task);
        kernel.turn(Some(Duration::ZERO)).unwrap();
        kernel
            .run(async {
                let task = spawn(async {});
                task.abort();
                yield_now().await.unwrap();
            })
            .unwrap();
    }
    assert!(kernel.core.state.borrow().tasks.capacity() <= 3);
    assert_clean(&kernel);
}

#[test]
fn a_block_without_a_deadline_arms_no_timer() {
    let armed = || with_current(|core| core.unwrap().state.borrow().wheel.len());
    let block = timeout_after(None, async { Ok::<_, Interrupt>(armed()) });
    assert_eq!(kernel().run(block).unwrap(), Ok(0));
}

/// It may borrow what does not live on.
#[test]
fn the_main_task_is_gone_when_run_returns_though_it_has_not_ended() {
    let mut kernel = kernel();
    let kept = Rc::new(());
    let borrowed = Rc::clone(&kept);
    let outcome = kernel.run(async move {
        let _borrowed = borrowed;
        pending::<()>().await;
    });
    assert!(matches!(outcome, Err(RunError::Deadlock(_))));
    assert_eq!(Rc::strong_count(&kept), 1);
    assert_clean(&kernel);
}

#[test]
fn a_stale_waker_does_not_keep_a_deadlock_from_being_found() {
    let outcome = kernel().run(async {
        let waker = |cx: &mut Context<'_>| Poll::Ready(cx.waker().clone());
        let task = spawn(std::future::poll_fn(waker));
        let (slot, stale) = (task.body().slot.get(), task.join().await.unwrap());
        let successor = spawn(pending::<()>());
        assert_eq!(successor.body().slot.get(), slot);
        let _ = stale.clone();
        successor.wait().await
    });
    assert!(matches!(outcome, Err(RunError::Deadlock(_))));
}

#[test]
fn a_wake_from_the_kernels_own_thread_is_one_poll() {
    kernel()
        .run(async {
            let (sender, receiver) = futures::channel::oneshot::channel();
            let task = spawn(async {
                receiver.await.unwrap();
                pending::<()>().await;
            });
            crate::wait_until_idle().await.unwrap();
            sender.send(()).unwrap();
            sleep(s(1)).await.unwrap();
            sleep(s(1)).await.unwrap();
            assert_eq!(task.cycles(), 2);
            task.abort();
        })
        .unwrap();
}

/// First polled by a combinator, with a waker of that one's, then by the task itself.
#[test]
fn a_wait_wakes_whoever_polled_it_last() {
    kernel()
        .run(async {
            let mut nap = Box::pin(sleep(s(1)));
            let mut all = futures::stream::FuturesUnordered::from_iter([&mut nap]);
            assert!(futures::poll!(all.next()).is_pending());
            drop(all);
            nap.await.unwrap();
        })
        .unwrap();
}

#[test]
fn a_wait_that_goes_on_elsewhere_is_that_of_its_new_place() {
    kernel()
        .run(async {
            let mut nap = Box::pin(sleep(s(1)));
            assert!(futures::poll!(&mut nap).is_pending());
            spawn(nap).join().await.unwrap().unwrap();

            let mut nap = Box::pin(sleep(s(60)));
            assert!(futures::poll!(&mut nap).is_pending());
            assert!(timeout_after(s(1), nap).await.is_err());
        })
        .unwrap();
}

#[test]
fn there_is_room_for_any_number_of_blocks() {
    let mut kernel = kernel();
    kernel
        .run(async {
            let mut blocks = [(); 100].map(|()| Box::pin(shield(pending::<()>())));
            for block in &mut blocks {
                assert!(futures::poll!(block).is_pending());
            }
        })
        .unwrap();
    assert_clean(&kernel);
}

#[test]
fn nothing_is_left_of_a_socket_that_was_dropped() {
    let mut kernel = kernel();
    let main = async {
        let (ours, _theirs) = crate::net::UnixStream::pair().unwrap();
        let late = timeout_after(s(1), async { ours.read(&mut [0]).await });
        assert!(late.await.is_err());
    };
    kernel.run(main).unwrap();
    assert_clean(&kernel);
}

#[test]
fn nothing_is_left_of_a_shield_that_has_ended_though_its_future_is_kept() {
    let nodes = kernel().run(async {
        let mut kept = Box::pin(shield(sleep(s(1))));
        (&mut kept).await.unwrap();
        with_current(|core| core.unwrap().state.borrow().nodes.live())
    });
    assert_eq!(nodes.unwrap(), 1, "the lot `idle` alone");
}

/// How many polls it takes until the loop finds out that a socket is readable, if each poll takes that long; counted from one such find to the next.
fn polls_between_looks(builder: Builder, each: Duration) -> u32 {
    let clock = VirtualClock::new();
    let mut kernel = builder.clock(clock.clone()).build().unwrap();
    let polls = kernel.run(async {
        clock.advance(s(1));
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let ours = crate::net::UnixStream::from_std(ours).unwrap();
        let told = Rc::new(Cell::new(0));
        let counter = Rc::clone(&told);
        spawn(async move {
            loop {
                ours.read(&mut [0]).await.unwrap();
                counter.set(counter.get() + 1);
            }
        });
        yield_now().await.unwrap();
        let mut polls = 0;
        for message in 1..=2 {
            std::io::Write::write_all(&mut theirs, b"x").unwrap();
            polls = 0;
            while told.get() < message {
                clock.advance(each);
                yield_now().await.unwrap();
                polls += 1;
            }
        }
        polls
    });
    polls.unwrap()
}

#[test]
fn slow_polls_make_the_loop_look_outside_sooner() {
    let slow = polls_between_looks(Builder::new(), Duration::from_millis(1));
    assert!(slow <= CLOCK_INTERVAL, "{slow}");
    let quick = polls_between_looks(Builder::new(), Duration::ZERO);
    assert!(
        quick > LOOK_INTERVAL - 3 && quick <= LOOK_INTERVAL,
        "{quick}"
    );
    for often in [0, 1, 8] {
        let polls = polls_between_looks(Builder::new().io_interval(often), Duration::ZERO);
        assert!(polls <= often.max(2), "{polls} of {often}");
    }
}

#[test]
fn the_first_timeout_to_come_is_shown_whichever_block_it_belongs_to() {
    let first = || {
        with_current(|core| {
            let state = core.unwrap().state.borrow();
            state.next_timeout(state.current)
        })
    };
    kernel()
        .run(async {
            for (outer, inner) in [(5, 9), (9, 5)] {
                let block = timeout_after(s(outer), async {
                    timeout_after(s(inner), async {
                        // Neither this nor a shield has one.
                        timeout_after(None, async {
                            shield(yield_now()).await?;
                            let left = shield(async { first().map(|at| at - time()) });
                            assert_eq!(left.await, Some(nanos(s(5))));
                            Ok::<_, crate::Interrupt>(())
                        })
                        .await
                    })
                    .await
                });
                block.await.unwrap();
                assert_eq!(first(), None);
                sleep(s(1)).await.unwrap();
            }
        })
        .unwrap();
}

fn time() -> u64 {
    with_current(|core| core.unwrap().state.borrow().time())
}

/// The monitor asks for what the board showed: by now another task may have the slot.
#[test]
fn a_task_is_cancelled_by_its_place_only_if_it_still_has_it() {
    kernel()
        .run(async {
            let task = spawn(sleep(s(1)));
            let (slot, id) = (task.body().slot.get(), task.id().get());
            assert_eq!(cancel_task(slot, id + 1), None);
            assert_eq!(cancel_task(slot + 1, id), None);
            assert!(!task.is_cancelled());
            assert_eq!(cancel_task(slot, id), Some(true));
            assert_eq!(cancel_task(slot, id), Some(false));
            assert!(task.join().await.unwrap().is_err());
            assert_eq!(cancel_task(slot, id), None);
        })
        .unwrap();
}
