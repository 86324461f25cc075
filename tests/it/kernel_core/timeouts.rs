//! Timeouts as Curio nests them; rules R6 to R9.

use futures::channel::oneshot;
use futures::future::{join, select};
use kernel::{
    Interrupt, MaybeInterrupt, drop_after, ignore_after, ignore_at, now, pending_cancellation,
    shield, sleep, spawn, timeout_after, timeout_at, yield_now,
};

use log::Level;

use super::logged::lines_of;
use super::{Story, ms, run, run_with, s};

async fn nap(story: &Story, name: &str, seconds: u64) -> Result<(), Interrupt> {
    story.tell(format_args!("{name} start"));
    sleep(s(seconds)).await?;
    story.tell(format_args!("{name} done"));
    Ok(())
}

/// Tells how a block ended, and whether that was an interrupt.
fn tell(story: &Story, name: &str, outcome: Result<(), Interrupt>) {
    match outcome {
        Ok(()) => story.tell(format_args!("{name} success")),
        Err(Interrupt::TaskTimeout) => story.tell(format_args!("{name} timeout")),
        Err(Interrupt::TimeoutCancellation) => story.tell(format_args!("{name} timeout cancel")),
        Err(Interrupt::UncaughtTimeout) => story.tell(format_args!("{name} uncaught")),
        Err(other) => story.tell(format_args!("{name} {other}")),
    }
}

/// Accepts: curio/kernel/sleep_timeout
#[test]
fn a_sleep_that_is_too_long_times_out() {
    run_with(async |clock| {
        let outcome = timeout_after(ms(100), async {
            let outcome = sleep(s(1)).await;
            assert_eq!(pending_cancellation(), None, "it was told");
            outcome
        });
        assert_eq!(outcome.await, Err(Interrupt::TaskTimeout));
        assert_eq!(clock.elapsed(), ms(100));
    });
}

/// Accepts: curio/kernel/sleep_ignore_timeout, curio-old/kernel/sleep_ignore_timeout_absolute
#[test]
fn an_ignored_timeout_is_none() {
    run_with(async |clock| {
        assert_eq!(ignore_after(ms(100), sleep(s(1))).await, Ok(None));
        assert_eq!(clock.elapsed(), ms(100));
        let at = now() + ms(100);
        assert_eq!(ignore_at(at, sleep(s(1))).await, Ok(None));
        assert_eq!(clock.elapsed(), ms(200));
        let in_time = ignore_at(now() + s(9), async { Ok::<_, Interrupt>(7) }).await;
        assert_eq!(in_time, Ok(Some(7)));
        // Only the own expiry is ignored.
        let inner = timeout_after(s(1), ignore_after(s(5), sleep(s(9)))).await;
        assert_eq!(inner, Err(Interrupt::TaskTimeout));
    });
}

/// Accepts: curio/kernel/sleep_notimeout, sweepea-defect/S10, sweepea-defect/S11
#[test]
fn a_timeout_that_did_not_fire_leaves_nothing_behind() {
    run_with(async |clock| {
        timeout_after(ms(500), sleep(ms(100))).await.unwrap();
        sleep(s(1)).await.unwrap();
        assert_eq!(clock.elapsed(), ms(1100));
        // One that did leaves nothing behind either, also where the next timer takes the same place.
        assert_eq!(ignore_after(ms(100), sleep(ms(400))).await, Ok(None));
        sleep(ms(600)).await.unwrap();
        assert_eq!(clock.elapsed(), ms(1800));
    });
}

/// Accepts: curio-old/kernel/sleep_timeout_absolute, curio-old/kernel/sleep_timeout_absolute_context
#[test]
fn an_absolute_timeout_covers_several_waits() {
    run_with(async |clock| {
        let deadline = now() + s(1);
        let outcome = timeout_at(deadline, async {
            sleep(ms(600)).await?;
            sleep(ms(600)).await?;
            unreachable!("the deadline came first");
            #[expect(unreachable_code, reason = "names the type")]
            Ok::<(), Interrupt>(())
        })
        .await;
        assert_eq!(outcome, Err(Interrupt::TaskTimeout));
        assert_eq!(clock.elapsed(), s(1));
        // Past from the start: whatever blocks is interrupted, what does not block is not.
        let outcome = timeout_at(deadline, sleep(s(1))).await;
        assert_eq!(outcome, Err(Interrupt::TaskTimeout));
        assert_eq!(clock.elapsed(), s(1));
        assert_eq!(
            timeout_at(deadline, async { Ok::<_, Interrupt>(1) }).await,
            Ok(1)
        );
    });
}

/// Accepts: curio/kernel/nested_timeout
#[test]
fn r7_swallowing_the_timeout_of_an_outer_block_wins_no_time() {
    let story = Story::default();
    run_with(async |clock| {
        let child = async {
            let inner = timeout_after(s(50), nap(&story, "coro1", 40)).await;
            tell(&story, "coro1", inner);
            nap(&story, "coro2", 40).await?;
            story.tell("coro2 success");
            Ok::<_, Interrupt>(())
        };
        tell(&story, "parent", timeout_after(s(1), child).await);
        assert_eq!(clock.elapsed(), s(1));
        sleep(s(100)).await.unwrap();
    });
    story.assert(&[
        "coro1 start",
        "coro1 timeout cancel",
        "coro2 start",
        "parent timeout",
    ]);
}

/// What was begun in a block and moved out of it is in the block around from then on, also before it is polled there.
#[test]
fn r3_what_leaves_its_block_is_interrupted_with_the_block_around() {
    run_with(async |clock| {
        let outer = timeout_after(s(1), async {
            let mut leaf = Box::pin(sleep(s(5)));
            let mut block = Box::pin(timeout_after(s(30), sleep(s(5))));
            timeout_after(s(50), async {
                assert!(futures::poll!(&mut leaf).is_pending());
                assert!(futures::poll!(&mut block).is_pending());
                Ok::<_, Interrupt>(())
            })
            .await?;
            assert_eq!(sleep(s(9)).await, Err(Interrupt::TaskTimeout));
            assert_eq!(leaf.await, Err(Interrupt::TaskTimeout));
            block.await
        });
        assert_eq!(outer.await, Err(Interrupt::TaskTimeout));
        assert_eq!(clock.elapsed(), s(1));
    });
}

#[test]
fn r3_a_block_that_was_begun_outside_is_interrupted_with_the_one_that_it_is_polled_in() {
    run_with(async |clock| {
        let mut begun = Box::pin(timeout_after(s(50), sleep(s(40))));
        assert!(futures::poll!(&mut begun).is_pending());
        let mut outcome = None;
        let around = timeout_after(s(1), async {
            outcome = Some(begun.await);
            Ok::<_, Interrupt>(())
        });
        around.await.unwrap();
        assert_eq!(outcome, Some(Err(Interrupt::TimeoutCancellation)));
        assert_eq!(clock.elapsed(), s(1));
    });
}

/// Even if something else has taken the block's place meanwhile.
#[test]
fn r3_what_leaves_the_outermost_block_is_cancelled_with_its_task() {
    run(async {
        let task = spawn(async {
            let mut leaf = Box::pin(sleep(s(5)));
            timeout_after(s(50), async {
                assert!(futures::poll!(&mut leaf).is_pending());
                Ok::<_, Interrupt>(())
            })
            .await
            .unwrap();
            shield(sleep(s(2))).await.unwrap();
            leaf.await
        });
        sleep(s(1)).await.unwrap();
        task.cancel().await.unwrap();
        let outcome = task.join().await.unwrap();
        assert!(
            matches!(outcome, Err(Interrupt::Cancelled(_))),
            "{outcome:?}"
        );
    });
}

/// What fired beyond the shield is no concern of a block behind it.
#[test]
fn r8_a_block_behind_a_shield_reports_its_own_deadline_as_its_own() {
    run(async {
        let outer = timeout_after(s(1), async {
            let inner = shield(timeout_after(s(5), sleep(s(9)))).await;
            assert_eq!(inner, Err(Interrupt::TaskTimeout));
            sleep(s(9)).await
        });
        assert_eq!(outer.await, Err(Interrupt::TaskTimeout));
    });
}

#[test]
fn r7_nor_does_swallowing_it_inside_of_the_inner_block() {
    run_with(async |clock| {
        let outer = timeout_after(s(1), async {
            timeout_after(s(50), async {
                assert_eq!(sleep(s(40)).await, Err(Interrupt::TaskTimeout));
                Ok::<_, Interrupt>(())
            })
            .await?;
            assert_eq!(pending_cancellation(), Some(Interrupt::TaskTimeout));
            sleep(s(40)).await
        });
        assert_eq!(outer.await, Err(Interrupt::TaskTimeout));
        assert_eq!(clock.elapsed(), s(1));
    });
}

/// Only a deadline around a block has it fire another one again, not that of a block beside it.
#[test]
fn r7_a_deadline_that_was_told_does_not_come_again_for_that_of_another_branch() {
    run_with(async |clock| {
        let outer = timeout_after(s(1), async {
            assert_eq!(sleep(s(9)).await, Err(Interrupt::TaskTimeout));
            let (short, long) = join(
                timeout_after(s(1), sleep(s(9))),
                timeout_after(s(9), sleep(s(2))),
            )
            .await;
            assert_eq!(short, Err(Interrupt::TimeoutCancellation));
            long.unwrap();
            sleep(s(1)).await
        });
        outer.await.unwrap();
        assert_eq!(clock.elapsed(), s(4));
    });
}

/// Accepts: curio/kernel/nested_context_timeout
#[test]
fn the_block_form_nests_the_same_way() {
    let story = Story::default();
    run(async {
        let outer = timeout_after(s(1), async {
            let inner = timeout_after(s(50), async {
                story.tell("coro1 start");
                sleep(s(40)).await?;
                Ok(())
            })
            .await;
            tell(&story, "coro1", inner);
            story.tell("coro2 start");
            sleep(s(40)).await?;
            Ok(())
        })
        .await;
        tell(&story, "parent", outer);
        sleep(s(100)).await.unwrap();
    });
    story.assert(&[
        "coro1 start",
        "coro1 timeout cancel",
        "coro2 start",
        "parent timeout",
    ]);
}

/// Accepts: curio/kernel/nested_context_timeout2, curio/kernel/nested_context_timeout3
#[test]
fn r6_of_three_levels_the_outermost_deadline_is_reported() {
    for (inner, middle, outer, expected) in [
        (
            70,
            60,
            50,
            [
                "inner timeout cancel",
                "middle timeout cancel",
                "outer timeout",
            ],
        ),
        (
            60,
            70,
            50,
            [
                "inner timeout cancel",
                "middle timeout cancel",
                "outer timeout",
            ],
        ),
        (
            70,
            50,
            60,
            ["inner timeout cancel", "middle timeout", "outer success"],
        ),
        (
            50,
            60,
            70,
            ["inner timeout", "middle success", "outer success"],
        ),
    ] {
        let story = Story::default();
        run_with(async |clock| {
            let level1 = async {
                let outcome =
                    timeout_after(s(inner), async { sleep(s(100)).await.map(drop) }).await;
                tell(&story, "inner", outcome.clone());
                pass_on(outcome)
            };
            let level2 = async {
                let outcome = timeout_after(s(middle), level1).await;
                tell(&story, "middle", outcome.clone());
                pass_on(outcome)
            };
            let outcome = timeout_after(s(outer), level2).await;
            tell(&story, "outer", outcome);
            assert_eq!(clock.elapsed(), s(50));
        });
        story.assert(&expected);
    }
}

/// A block handles its own timeout and passes on what is not its own.
fn pass_on(outcome: Result<(), Interrupt>) -> Result<(), Interrupt> {
    match outcome {
        Err(Interrupt::TaskTimeout) => Ok(()),
        other => other,
    }
}

/// Accepts: curio/kernel/nested_timeout_uncaught, curio/kernel/nested_context_timeout_uncaught
#[test]
fn r8_a_timeout_that_leaves_its_block_unhandled_is_uncaught_at_the_next() {
    let story = Story::default();
    run(async {
        let child = async { timeout_after(s(1), nap(&story, "coro1", 5)).await };
        tell(&story, "parent", timeout_after(s(10), child).await);
        // It stays uncaught further out.
        let child = timeout_after(s(1), nap(&story, "coro2", 5));
        let twice = timeout_after(s(20), timeout_after(s(10), child)).await;
        tell(&story, "grandparent", twice);
    });
    story.assert(&[
        "coro1 start",
        "parent uncaught",
        "coro2 start",
        "grandparent uncaught",
    ]);
}

/// Accepts: curio/kernel/nested_timeout_none, curio-defect/C2
#[test]
fn no_timeout_keeps_the_outer_one_in_force() {
    let story = Story::default();
    run_with(async |clock| {
        let child = timeout_after(None, nap(&story, "coro1", 5));
        tell(&story, "parent", timeout_after(s(1), child).await);
        assert_eq!(clock.elapsed(), s(1));
        let none = timeout_after(None, nap(&story, "coro2", 5)).await;
        tell(&story, "none", none);
        // An inner timeout under one that is none.
        let inner = async {
            let outcome = timeout_after(s(1), nap(&story, "coro3", 5)).await;
            tell(&story, "inner", outcome);
            Ok::<_, Interrupt>(())
        };
        tell(&story, "around", timeout_after(None, inner).await);
        let never = timeout_at(None, sleep(s(1))).await;
        assert!(never.is_ok());
    });
    story.assert(&[
        "coro1 start",
        "parent timeout",
        "coro2 start",
        "coro2 done",
        "none success",
        "coro3 start",
        "inner timeout",
        "around success",
    ]);
}

/// Accepts: curio/kernel/task_cancel_timeout
#[test]
fn r9_a_cancellation_switches_the_timeouts_off() {
    let story = Story::default();
    run_with(async |clock| {
        let child = story.clone();
        let task = spawn(async move {
            let outcome = timeout_after(s(5), async {
                let interrupt = sleep(s(100)).await.unwrap_err();
                child.tell(&interrupt);
                sleep(s(50)).await?;
                child.tell("cleaned up");
                // Those that are set from now on work.
                let late = timeout_after(s(1), sleep(s(9))).await;
                child.tell(late.unwrap_err());
                Err::<(), _>(interrupt)
            })
            .await;
            child.tell(outcome.unwrap_err());
        });
        sleep(s(1)).await.unwrap();
        task.cancel().await.unwrap();
        assert_eq!(clock.elapsed(), s(52));
    });
    story.assert(&[
        "task cancelled",
        "cleaned up",
        "timed out",
        "task cancelled",
    ]);
}

/// Both have come before the task is polled: the cancellation is around the block.
#[test]
fn r6_a_cancellation_right_after_a_timeout_is_what_the_task_is_told() {
    run(async {
        let task = spawn(timeout_after(s(5), sleep(s(100))));
        sleep(s(5)).await.unwrap(); // armed before the block, so that we go first
        assert!(task.request_cancel(""));
        let outcome = task.join().await.unwrap();
        assert!(
            matches!(outcome, Err(Interrupt::Cancelled(_))),
            "{outcome:?}"
        );
    });
}

#[test]
fn r9_a_timeout_that_nobody_was_told_of_is_off_as_well() {
    run(async {
        let (sender, receiver) = oneshot::channel::<()>();
        let task = spawn(timeout_after(s(1), async {
            receiver.await.unwrap();
            assert!(sleep(s(9)).await.unwrap_err() != Interrupt::TaskTimeout);
            timeout_after(s(1), sleep(s(9))).await
        }));
        sleep(s(2)).await.unwrap();
        task.request_cancel("");
        sender.send(()).unwrap();
        let clean_up = task.join().await.unwrap();
        assert_eq!(clean_up, Err(Interrupt::UncaughtTimeout));
    });
}

/// There is nothing to switch off where no deadline is, or where it has been told of.
#[test]
fn r9_a_cancellation_leaves_alone_what_has_no_deadline_any_more() {
    run(async {
        let endless = spawn(timeout_after(None, sleep(s(9))));
        let expired = spawn(timeout_after(s(1), async {
            let interrupt = sleep(s(9)).await.unwrap_err();
            sleep(s(9)).await.unwrap_err();
            Err::<(), _>(interrupt)
        }));
        sleep(s(2)).await.unwrap();
        endless.cancel().await.unwrap();
        let outcome = endless.join().await.unwrap();
        assert!(matches!(outcome, Err(Interrupt::Cancelled(_))));
        expired.cancel().await.unwrap();
        assert_eq!(expired.join().await.unwrap(), Err(Interrupt::TaskTimeout));
    });
}

#[test]
fn r9_a_deadline_that_was_told_before_the_cancellation_does_not_come_again() {
    run(async {
        let task = spawn(timeout_after(s(1), async {
            timeout_after(s(50), async {
                assert_eq!(sleep(s(9)).await, Err(Interrupt::TaskTimeout));
                let outcome = sleep(s(9)).await;
                assert!(matches!(outcome, Err(Interrupt::Cancelled(_))));
                Ok::<_, Interrupt>(())
            })
            .await?;
            sleep(s(9)).await.map(drop) // the clean-up
        }));
        sleep(s(2)).await.unwrap();
        task.cancel().await.unwrap();
        assert_eq!(task.join().await.unwrap(), Ok(()));
    });
}

/// The one that was begun last leads to the others.
#[test]
fn r9_also_when_another_block_was_moved_to_another_task() {
    run(async {
        let task = spawn(async {
            let mut kept = Box::pin(timeout_after(s(5), async {
                let outcome = sleep(s(100)).await;
                assert!(matches!(outcome, Err(Interrupt::Cancelled(_))));
                sleep(s(50)).await // the clean-up
            }));
            assert!(futures::poll!(&mut kept).is_pending());
            let mut moved = Box::pin(timeout_after(s(20), sleep(s(100))));
            assert!(futures::poll!(&mut moved).is_pending());
            let moved = spawn(moved);
            yield_now().await.unwrap();
            kept.await.unwrap();
            moved.join().await.unwrap()
        });
        sleep(s(1)).await.unwrap();
        task.cancel().await.unwrap();
        assert_eq!(task.join().await.unwrap(), Err(Interrupt::TaskTimeout));
    });
}

#[test]
fn r9_a_timeout_behind_a_shield_outlives_a_cancellation() {
    for stall in [false, true] {
        run_with(async |clock| {
            let inner_clock = clock.clone();
            let task = spawn(async move {
                let inside = shield(timeout_after(s(5), sleep(s(100)))).await;
                assert_eq!(inside, Err(Interrupt::TaskTimeout));
                sleep(s(1)).await.unwrap_err();
                inner_clock.elapsed()
            });
            if stall {
                // The timeout has interrupted the sleep when the cancellation comes, and nobody has been told yet.
                let canceller = now() + s(5) - ms(1);
                kernel::sleep_until(canceller).await.unwrap();
                clock.advance(s(1));
                yield_now().await.unwrap();
                sleep(ms(0)).await.unwrap();
            } else {
                sleep(s(1)).await.unwrap();
            }
            task.request_cancel("");
            assert!(task.join().await.unwrap() >= s(5));
        });
    }
}

/// The loop is stalled past both the sleep's and its block's deadline: each task is scheduled once, and what came first counts.
///
/// Accepts: curio/kernel/kernel_multischedule
#[test]
fn r2_a_sleep_that_was_done_before_its_timeout_is_done() {
    run_with(async |clock| {
        let story = Story::default();
        let tell = |limit, nap, name: &'static str| {
            let story = story.clone();
            spawn(async move {
                let outcome = timeout_after(ms(limit), sleep(ms(nap))).await;
                story.tell(format_args!("{name} {}", outcome.is_ok()));
                sleep(s(1)).await.unwrap();
                story.tell(format_args!("{name} slept"));
            })
        };
        let tasks = [
            tell(150, 100, "sleep first"),
            tell(100, 150, "timeout first"),
            tell(100, 100, "together"),
        ];
        yield_now().await.unwrap();
        clock.advance(s(10));
        for task in &tasks {
            task.wait().await.unwrap();
        }
        assert_eq!(clock.elapsed(), s(11));
        assert_eq!(tasks.map(|task| task.cycles()), [3; 3]);
        // Of equal deadlines the one that was armed first fires first: a block's before its body's.
        story.assert(&[
            "sleep first true",
            "timeout first false",
            "together false",
            "sleep first slept",
            "timeout first slept",
            "together slept",
        ]);
    });
}

/// Accepts: curio/kernel/timeout_badness
#[test]
fn a_block_that_is_late_without_having_blocked_keeps_its_result_and_is_warned_of() {
    let warnings = lines_of(Level::Warn, || {
        run_with(async |clock| {
            let late = timeout_after(s(1), async {
                clock.advance(s(2));
                Ok::<_, Interrupt>("result")
            })
            .await;
            assert_eq!(late, Ok("result"));
            sleep(s(5)).await.unwrap();
            assert_eq!(clock.elapsed(), s(7), "no timeout later");
        });
    });
    if cfg!(debug_assertions) {
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("after its deadline"), "{warnings:?}");
    }
    let warnings = lines_of(Level::Warn, || {
        run(async { timeout_after(s(1), sleep(ms(1))).await.unwrap() });
        run(async {
            timeout_after(s(2), timeout_after(s(1), sleep(ms(1))))
                .await
                .unwrap()
        });
        // No deadline is none that has passed.
        run_with(async |clock| {
            let body = async {
                clock.advance(s(2));
                Ok::<_, Interrupt>(())
            };
            timeout_after(None, body).await.unwrap();
        });
    });
    assert!(warnings.is_empty(), "{warnings:?}");
    // One that has expired where nobody could be told.
    let warnings = lines_of(Level::Warn, || {
        run(async {
            timeout_after(s(1), shield(sleep(s(2)))).await.unwrap();
        });
    });
    assert_eq!(warnings.len(), 1, "{warnings:?}");
}

/// Accepts: trap/set_timeout, trap/unset_timeout
#[test]
fn the_timeout_traps_nest_by_hand() {
    use kernel::traps::{Expiry, set_timeout};
    use std::future::poll_fn;
    use std::pin::{Pin, pin};

    run_with(async |clock| {
        // The earliest deadline wins, whichever block it belongs to.
        for (outer, inner, expected) in [
            (1, 5, (Expiry::Enclosing, Expiry::Own)),
            (5, 1, (Expiry::Own, Expiry::Not)),
        ] {
            let start = clock.elapsed();
            let mut around = set_timeout(Some(now() + s(outer)));
            let mut body = pin!(async {
                let mut within = set_timeout(Some(now() + s(inner)));
                let mut nap = sleep(s(10));
                let slept = poll_fn(|cx| within.poll(Pin::new(&mut nap), cx)).await;
                assert_eq!(slept, Err(Interrupt::TaskTimeout));
                assert_eq!(clock.elapsed() - start, s(1));
                let within = within.unset(true);
                // An outer deadline that is past fires at the next blocking trap, at once.
                let next = sleep(s(2)).await;
                assert_eq!(next.is_err(), within == Expiry::Enclosing);
                (within, next.is_err())
            });
            let (within, timed_out) = poll_fn(|cx| around.poll(body.as_mut(), cx)).await;
            assert_eq!((within, around.unset(timed_out)), expected);
        }
        assert_eq!(set_timeout(None).unset(false), Expiry::Not);
        assert_eq!(set_timeout(Some(now())).unset(true), Expiry::Uncaught);
    });
}

/// Accepts: curio-defect/C9
#[test]
fn timers_of_finished_blocks_do_not_move_the_clock() {
    let (mut kernel, clock) = super::virtual_kernel();
    kernel
        .run(async {
            for _ in 0..50 {
                ignore_after(ms(900), sleep(ms(1))).await.unwrap().unwrap();
            }
        })
        .unwrap();
    assert_eq!(clock.elapsed(), ms(50));
    let turn = kernel.turn(Some(ms(0))).unwrap();
    assert_eq!(turn.next_deadline, None);
}

#[test]
fn branches_have_timeouts_of_their_own() {
    run_with(async |clock| {
        let (short, long) = join(
            timeout_after(s(1), sleep(s(10))),
            timeout_after(s(20), sleep(s(10))),
        )
        .await;
        assert_eq!(short, Err(Interrupt::TaskTimeout));
        assert!(long.is_ok());
        assert_eq!(clock.elapsed(), s(10));
        // A block around both interrupts both; a branch that is lost leaves nothing behind.
        let both = timeout_after(s(1), async {
            let (a, b) = join(sleep(s(5)), sleep(s(6))).await;
            assert_eq!(
                (a.unwrap_err(), b.unwrap_err()),
                (Interrupt::TaskTimeout, Interrupt::TaskTimeout)
            );
            sleep(s(3)).await.expect("R11: told once");
            Ok::<_, Interrupt>(())
        });
        both.await.unwrap();
        select(timeout_after(s(1), sleep(s(9))), sleep(ms(1))).await;
        let before = clock.elapsed();
        sleep(s(5)).await.unwrap();
        assert_eq!(clock.elapsed() - before, s(5));
    });
}

/// The join was begun outside of any block.
#[test]
fn r3_the_deadline_of_one_branch_leaves_the_join_of_another_alone() {
    run(async {
        let task = spawn(sleep(s(2)));
        let (joined, timed) = join(task.wait(), timeout_after(s(1), sleep(s(9)))).await;
        assert_eq!(joined, Ok(()));
        assert_eq!(timed, Err(Interrupt::TaskTimeout));
    });
}

#[test]
fn drop_after_ends_a_foreign_future_at_its_time_and_not_before() {
    run_with(async |clock| {
        assert_eq!(drop_after(s(5), std::future::pending::<()>()).await, None);
        assert_eq!(clock.elapsed(), s(5));
        assert_eq!(drop_after(s(5), async { 3 }).await, Some(3));
        // Neither a cancellation nor an outer timeout ends it, they come afterwards.
        let task = spawn(async {
            let dropped = drop_after(s(5), std::future::pending::<()>()).await;
            (dropped, sleep(s(1)).await)
        });
        sleep(s(1)).await.unwrap();
        task.request_cancel("why");
        let (dropped, next) = task.join().await.unwrap();
        assert_eq!(dropped, None);
        assert!(matches!(next, Err(Interrupt::Cancelled(_))));
        assert_eq!(clock.elapsed(), s(10));
        let outer = timeout_after(s(1), async {
            drop_after(s(5), std::future::pending::<()>()).await;
            sleep(s(1)).await
        });
        assert_eq!(outer.await, Err(Interrupt::TaskTimeout));
        assert_eq!(clock.elapsed(), s(15));
    });
}

#[test]
fn a_timeout_travels_through_io_errors_and_boxes() {
    run(async {
        let error = timeout_after(s(1), async {
            sleep(s(2)).await?;
            Ok::<(), std::io::Error>(())
        })
        .await
        .unwrap_err();
        assert_eq!(error.interrupt(), Some(&Interrupt::TaskTimeout));
        assert_ne!(error.kind(), std::io::ErrorKind::Interrupted);
        let error = timeout_after(
            s(1),
            timeout_after(s(9), async {
                sleep(s(2)).await?;
                Ok::<(), Box<dyn std::error::Error>>(())
            }),
        )
        .await
        .unwrap_err();
        assert_eq!(error.interrupt(), Some(&Interrupt::TaskTimeout));
    });
}

/// R7 holds for blocks that were open when the deadline fired, and for no others.
#[test]
fn clean_up_with_a_timeout_of_its_own_is_not_interrupted_again() {
    run(async {
        let outcome = timeout_after(s(1), async {
            let told = sleep(s(10)).await;
            assert_eq!(told.map(drop), Err(Interrupt::TaskTimeout));
            timeout_after(s(5), sleep(s(1))).await?;
            sleep(s(1)).await?; // goes on cleaning up
            Ok::<_, Interrupt>(())
        })
        .await;
        assert_eq!(outcome, Ok(()));
    });
}

/// R9 switches timeouts off for good.
#[test]
fn a_deadline_that_a_cancellation_switched_off_does_not_cut_the_clean_up() {
    run(async {
        let task = spawn(timeout_after(s(1), async {
            let _ = sleep(s(10)).await;
            let cancelled = sleep(s(10)).await;
            assert!(matches!(cancelled, Err(Interrupt::Cancelled(_))));
            timeout_after(s(5), sleep(s(1))).await?;
            sleep(s(1)).await?;
            Ok::<_, Interrupt>(())
        }));
        sleep(s(2)).await.unwrap();
        task.cancel().await.unwrap();
        assert_eq!(task.join().await.unwrap(), Ok(()));
    });
}
