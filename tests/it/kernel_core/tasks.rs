//! Spawning, joining, running: what Curio's `test_kernel` and `test_task` say of tasks.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use kernel::{
    Builder, Interrupt, JoinError, Kernel, RunError, TaskState, VirtualClock, WaitKind,
    current_task, now, sleep, spawn, timeout_after, yield_now,
};

use super::{Story, Teller, ms, run, run_with, s, told_of_sleep, virtual_kernel};

/// Accepts: curio/kernel/hello
#[test]
fn run_returns_the_value_of_main() {
    assert_eq!(kernel::run(async { "hello" }).unwrap(), "hello");
}

/// Accepts: curio/kernel/raise, curio/kernel/task_run_error
#[test]
fn an_error_of_main_comes_out_of_run_as_it_is() {
    let outcome = kernel::run(async { "bad".parse::<i32>() }).unwrap();
    assert_eq!(outcome, "bad".parse::<i32>());
}

/// In real time, which is what the claim is about.
///
/// Accepts: curio/kernel/sleep, curio/kernel/clock, trap/clock
#[test]
fn a_sleep_is_never_early_and_the_clock_never_goes_back() {
    kernel::run(async {
        for wait in [ms(1), Duration::from_micros(30), ms(3), Duration::ZERO] {
            let (before, before_here) = (Instant::now(), now());
            let woken = sleep(wait).await.unwrap();
            assert!(Instant::now() - before >= wait);
            assert!(woken - before_here >= wait);
            assert!(now() >= woken);
            assert!(kernel::traps::clock().await >= woken);
        }
    })
    .unwrap();
}

/// Accepts: trap/sleep
#[test]
fn sleeping_no_time_lets_the_others_run_once() {
    let story = Story::default();
    run(async {
        let other = story.clone();
        let task = spawn(async move {
            for _ in 0..2 {
                other.tell("other");
                yield_now().await.unwrap();
            }
        });
        for _ in 0..3 {
            story.tell("main");
            sleep(Duration::ZERO).await.unwrap();
        }
        task.join().await.unwrap();
    });
    story.assert(&["main", "other", "main", "other", "main"]);
}

/// Accepts: curio-old/kernel/wakeat
#[test]
fn a_task_sleeps_until_an_absolute_time() {
    run(async {
        let at = now() + s(5);
        assert_eq!(kernel::sleep_until(at).await.unwrap(), at);
        // A time that has passed does not block for long, and still lets others run.
        let task = spawn(async {});
        kernel::sleep_until(at - s(1)).await.unwrap();
        assert!(task.is_terminated());
        assert_eq!(now(), at);
    });
}

/// Not the time at which its task is polled, which would cost a look at the clock.
#[test]
fn a_sleep_answers_when_it_was_over() {
    run_with(async |clock| {
        let start = now();
        let early = spawn(async move {
            sleep(s(1)).await.unwrap();
            clock.advance(s(5));
        });
        let late = spawn(sleep(s(1)));
        assert_eq!(late.join().await.unwrap().unwrap(), start + s(1));
        assert_eq!(now(), start + s(6));
        early.join().await.unwrap();
    });
}

/// Accepts: curio/kernel/task_join, trap/join
#[test]
fn join_waits_and_returns_the_value() {
    let story = Story::default();
    run(async {
        let child = story.clone();
        let task = spawn(async move {
            child.tell("start");
            sleep(ms(500)).await.unwrap();
            child.tell("end");
            37
        });
        sleep(ms(100)).await.unwrap();
        story.tell("joining");
        let value = task.join().await.unwrap();
        story.tell(value);
        assert!(matches!(task.join().await, Err(JoinError::Taken)));
    });
    story.assert(&["start", "joining", "end", "37"]);
}

/// Accepts: curio/kernel/task_join_error
#[test]
fn join_of_a_failed_task_keeps_the_cause() {
    run(async {
        let task = spawn(async { "bad".parse::<i32>() });
        sleep(ms(100)).await.unwrap();
        assert_eq!(task.join().await.unwrap(), "bad".parse::<i32>());
        let task = spawn(async { panic!("bad") });
        let Err(JoinError::Panicked(cause)) = task.join().await else {
            panic!("it panicked");
        };
        assert_eq!(*cause.into_payload().downcast::<&str>().unwrap(), "bad");
    });
}

#[test]
fn any_number_of_tasks_wait_for_one_and_go_on_in_the_order_they_came() {
    let story = Story::default();
    run(async {
        let task = spawn(sleep(s(1))).to_ref();
        let waiters: Vec<_> = ["a", "b", "c"]
            .into_iter()
            .map(|name| {
                let (task, story) = (task.clone(), story.clone());
                spawn(async move {
                    task.wait().await.unwrap();
                    story.tell(name);
                })
            })
            .collect();
        for waiter in waiters {
            waiter.join().await.unwrap();
        }
        task.wait().await.unwrap(); // does not block any more
    });
    story.assert(&["a", "b", "c"]);
}

#[test]
fn a_wait_for_a_task_that_is_given_up_leaves_nothing_and_another_finds_the_end() {
    run(async {
        let task = spawn(std::future::pending::<()>());
        let mut wait = task.wait();
        assert!(futures::poll!(&mut wait).is_pending());
        assert_eq!(current_task().info().unwrap().waits.len(), 1);
        drop(wait);
        assert!(current_task().info().unwrap().waits.is_empty());
        let waiter = spawn(task.wait());
        yield_now().await.unwrap();
        task.abort();
        task.wait().await.unwrap();
        waiter.join().await.unwrap().unwrap();
        task.wait().await.unwrap();
    });
}

/// Accepts: trap/spawn, trap/get_current
#[test]
fn spawned_tasks_run_in_order_after_the_caller_blocks() {
    let story = Story::default();
    run(async {
        let main = current_task();
        assert_eq!(kernel::traps::get_current().await, main);
        let tasks: Vec<_> = (0..5)
            .map(|i| {
                let story = story.clone();
                spawn(async move {
                    story.tell(i);
                    current_task().parent()
                })
            })
            .collect();
        let trapped = kernel::traps::spawn(async {}).await;
        assert!(tasks.iter().all(|task| task.cycles() == 0));
        story.tell("spawned");
        for task in tasks {
            assert_eq!(task.join().await.unwrap(), Some(main.id()));
        }
        trapped.join().await.unwrap();
    });
    story.assert(&["spawned", "0", "1", "2", "3", "4"]);
}

/// Accepts: sweepea-defect/S18
#[test]
fn what_is_spawned_from_outside_can_be_joined_and_cancelled() {
    let (mut kernel, _) = virtual_kernel();
    let (value, sleeper) = (kernel.spawn(async { 5 }), kernel.spawn(sleep(s(60))));
    assert_eq!(value.parent(), None);
    assert!(sleeper.request_cancel("enough"));
    kernel.run(yield_now()).unwrap().unwrap();
    assert_eq!(value.try_join().unwrap().unwrap(), 5);
    let ended = sleeper.try_join().unwrap().unwrap();
    assert!(
        matches!(ended, Err(Interrupt::Cancelled(why)) if why.downcast_ref() == Some(&"enough"))
    );
}

/// Accepts: curio/kernel/sleep_0_starvation
#[test]
fn a_yield_loop_starves_neither_io_nor_timers_nor_resists_a_cancel() {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    // In real time: a virtual clock stands still while a task is ready.
    kernel::run(async {
        let spinner = spawn(async {
            loop {
                yield_now().await?;
            }
            #[expect(unreachable_code, reason = "names the type")]
            Ok::<(), Interrupt>(())
        });
        sleep(ms(5)).await.unwrap();
        let (reader, mut writer) = UnixStream::pair().unwrap();
        writer.write_all(b"x").unwrap();
        kernel::traps::read_wait(&reader).await.unwrap();
        spinner.cancel().await.unwrap();
        assert!(matches!(
            spinner.try_join(),
            Some(Ok(Err(Interrupt::Cancelled(_))))
        ));
    })
    .unwrap();
}

/// Accepts: curio/kernel/ping_pong_starvation
#[test]
fn two_tasks_that_wake_each_other_do_not_starve_a_third() {
    use kernel::traps::{Lot, sched_wait, sched_wake};
    run(async {
        let lots = Rc::new([Lot::new(), Lot::new()]);
        let rounds = Rc::new(Cell::new(0));
        let players: Vec<_> = [0, 1]
            .map(|side| {
                let (lots, rounds) = (lots.clone(), rounds.clone());
                spawn(async move {
                    loop {
                        sched_wake(&lots[1 - side], 1);
                        sched_wait(&lots[side], WaitKind::Custom).await?;
                        rounds.set(rounds.get() + 1);
                    }
                    #[expect(unreachable_code, reason = "names the type")]
                    Ok::<(), Interrupt>(())
                })
            })
            .into();
        let third = spawn(async {
            for _ in 0..100 {
                yield_now().await.unwrap();
            }
        });
        third.join().await.unwrap();
        assert!((90..110).contains(&rounds.get()), "each had its turn");
        for player in players {
            player.cancel().await.unwrap();
        }
    });
}

/// Accepts: curio/kernel/reentrant_kernel
#[test]
fn run_inside_a_running_kernel_is_refused() {
    run(async {
        assert!(matches!(kernel::run(async {}), Err(RunError::Reentrant)));
        let (mut inner, _) = virtual_kernel();
        assert!(matches!(inner.run(async {}), Err(RunError::Reentrant)));
        // Another kernel may be turned by hand; this one is current again afterwards.
        let me = current_task();
        let task = inner.spawn(async { current_task().id().get() });
        inner.turn(Some(Duration::ZERO)).unwrap();
        assert_eq!(task.try_join().unwrap().unwrap(), 1);
        assert_eq!(current_task(), me);
    });
}

/// Accepts: curio/kernel/single_stepping
#[test]
fn a_turn_makes_one_pass_without_blocking() {
    let (mut kernel, clock) = virtual_kernel();
    let story = Story::default();
    let child = story.clone();
    kernel.spawn(async move {
        child.tell("one");
        yield_now().await.unwrap();
        child.tell("two");
        sleep(s(10)).await.unwrap();
        child.tell("three");
    });
    let turn = kernel.turn(Some(Duration::ZERO)).unwrap();
    assert_eq!((turn.polled, turn.ready, turn.live), (1, true, 1));
    story.assert(&["one"]);
    let turn = kernel.turn(Some(Duration::ZERO)).unwrap();
    assert_eq!((turn.polled, turn.ready), (1, false));
    story.assert(&["one", "two"]);
    assert!(turn.next_deadline.is_some());
    assert_eq!(kernel.turn(Some(Duration::ZERO)).unwrap().polled, 0);
    clock.advance(s(10));
    let turn = kernel.turn(Some(Duration::ZERO)).unwrap();
    assert_eq!((turn.polled, turn.live, turn.next_deadline), (1, 0, None));
    story.assert(&["one", "two", "three"]);
}

#[test]
fn tasks_stand_still_between_two_runs() {
    let (mut kernel, _) = virtual_kernel();
    let steps = Cell::new(0);
    let count = async |times: usize| {
        for _ in 0..times {
            yield_now().await.unwrap();
        }
    };
    let counter = Rc::new(Cell::new(0));
    let shared = counter.clone();
    kernel.spawn(async move {
        loop {
            shared.set(shared.get() + 1);
            yield_now().await.unwrap();
        }
    });
    kernel.run(count(3)).unwrap();
    steps.set(counter.get());
    assert!(steps.get() >= 3);
    assert_eq!(counter.get(), steps.get());
    kernel.run(count(2)).unwrap();
    assert!(counter.get() >= steps.get() + 2);
}

/// The destructors run, and shutdown consumes the kernel, so that nothing can run after it.
///
/// Accepts: curio/kernel/kernel_no_shutdown, sweepea-defect/S22
#[test]
fn dropping_a_kernel_drops_its_tasks_newest_first() {
    let story = Story::default();
    let (mut kernel, _) = virtual_kernel();
    for name in ["first", "second", "third"] {
        let teller = Teller(story.clone(), name);
        kernel.spawn(async move {
            let _teller = teller;
            sleep(s(60)).await.unwrap();
        });
    }
    kernel.run(yield_now()).unwrap().unwrap();
    story.assert(&[]);
    drop(kernel);
    story.assert(&["third", "second", "first"]);
}

/// Accepts: shutdown/order, sweepea-defect/S21
#[test]
fn shutdown_cancels_newest_first_within_a_grace_and_drops_the_rest() {
    let story = Story::default();
    let (mut kernel, clock) = virtual_kernel();
    for (name, clean_up) in [("stubborn", 100), ("slow", 5), ("quick", 0)] {
        let (story, teller) = (story.clone(), Teller(story.clone(), name));
        kernel.spawn(async move {
            let _teller = teller;
            assert!(sleep(s(1000)).await.is_err());
            story.tell(format_args!("{name} cancelled"));
            sleep(s(clean_up)).await.unwrap();
        });
    }
    // It ends while another is waited for: not cancelled.
    kernel.spawn(sleep(s(1000)));
    kernel.run(yield_now()).unwrap().unwrap();
    let report = kernel.shutdown(Some(s(10))).unwrap();
    story.assert(&[
        "quick cancelled",
        "quick",
        "slow cancelled",
        "slow",
        "stubborn cancelled",
        "stubborn",
    ]);
    assert_eq!((report.cancelled, report.aborted), (3, 1));
    assert_eq!(clock.elapsed(), s(10));
}

#[test]
fn shutdown_counts_what_ends_by_itself_and_cancels_what_is_started_meanwhile() {
    let story = Story::default();
    let (mut kernel, _) = virtual_kernel();
    kernel.spawn(sleep(s(1)));
    let teller = story.clone();
    kernel.spawn(async move {
        sleep(s(1000)).await.unwrap_err();
        sleep(s(2)).await.unwrap();
        let late = teller.clone();
        spawn(async move {
            late.tell("started");
            sleep(s(1000)).await.unwrap_err();
            late.tell("cancelled");
        });
    });
    kernel.run(yield_now()).unwrap().unwrap();
    let report = kernel.shutdown(None).unwrap();
    story.assert(&["started", "cancelled"]);
    assert_eq!((report.cancelled, report.aborted), (2, 0));
}

/// Accepts: sweepea-defect/S23
#[test]
fn shutdown_ends_although_a_task_waits_for_what_never_comes() {
    let (mut kernel, clock) = virtual_kernel();
    // Nothing can wake it: dropped at once, however long the grace.
    kernel.spawn(kernel::shield(std::future::pending::<()>()));
    kernel.spawn(kernel::shield(sleep(s(3600))));
    kernel.run(yield_now()).unwrap().unwrap();
    let report = kernel.shutdown(Some(s(1))).unwrap();
    assert_eq!((report.cancelled, report.aborted), (0, 2));
    assert_eq!(clock.elapsed(), s(1));
    let (kernel, _) = virtual_kernel();
    kernel.spawn(std::future::pending::<()>());
    let report = kernel.shutdown(None).unwrap();
    assert_eq!((report.cancelled, report.aborted), (0, 1));
    let (kernel, _) = virtual_kernel();
    kernel.spawn(async {});
    kernel.shutdown(Some(Duration::MAX)).unwrap();
    // A virtual clock stands still meanwhile; the grace ends all the same.
    let (kernel, clock) = virtual_kernel();
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    kernel.spawn(kernel::shield(async move {
        kernel::traps::read_wait(&ours).await
    }));
    let report = kernel.shutdown(Some(ms(5))).unwrap();
    assert_eq!((report.cancelled, report.aborted), (0, 1));
    assert_eq!(clock.elapsed(), ms(5));
}

/// Accepts: debug/deadlock
#[test]
fn a_main_task_that_nothing_can_wake_is_a_deadlock_with_a_dump() {
    let (mut kernel, _) = virtual_kernel();
    let outcome = kernel.run(async {
        let task = spawn(std::future::pending::<()>());
        task.set_name("forever");
        task.join().await.unwrap();
    });
    let Err(RunError::Deadlock(tasks)) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(tasks.len(), 2);
    assert_eq!(tasks[0].waits[0].0, WaitKind::Join);
    assert!(tasks[0].waits[0].1.file().ends_with("tasks.rs"));
    assert!(tasks[1].waits.is_empty());
    let text = RunError::Deadlock(tasks).to_string();
    assert!(
        text.contains("\"forever\" waits in a foreign future"),
        "{text}"
    );
    // The kernel can go on.
    assert_eq!(kernel.run(async { 3 }).unwrap(), 3);
    // A task that joins itself waits for ever.
    let outcome = kernel.run(async { current_task().wait().await });
    assert!(matches!(outcome, Err(RunError::Deadlock(_))));
}

#[test]
fn no_wait_that_is_over_hides_a_deadlock() {
    use kernel::traps::{future_wait, io_release, read_wait};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    let (mut kernel, _) = virtual_kernel();
    let outcome = kernel.run(async {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"x").unwrap();
        read_wait(&ours).await.unwrap();
        ours.read_exact(&mut [0]).unwrap();
        let late = timeout_after(ms(1), async { read_wait(&ours).await });
        assert!(late.await.is_err());
        let mut abandoned = Box::pin(read_wait(&ours));
        assert!(futures::poll!(&mut abandoned).is_pending());
        drop(abandoned);
        let mut released = Box::pin(read_wait(&ours));
        assert!(futures::poll!(&mut released).is_pending());
        io_release(&ours);
        released.await.unwrap_err();

        future_wait(drop).await.unwrap();
        let mut kept = None;
        let late = timeout_after(ms(1), future_wait(|completer| kept = Some(completer)));
        assert!(late.await.is_err());
        let mut abandoned = Box::pin(future_wait(|completer| kept = Some(completer)));
        assert!(futures::poll!(&mut abandoned).is_pending());
        drop(abandoned);
        drop(kept);
        sleep(ms(1)).await.unwrap();
        std::future::pending::<()>().await;
    });
    assert!(matches!(outcome, Err(RunError::Deadlock(_))));
}

#[test]
fn a_remote_or_a_kept_waker_is_no_deadlock() {
    let (mut kernel, asleep) = told_of_sleep(Builder::new().clock(VirtualClock::new()));
    let remote = kernel.remote();
    let lot = Rc::new(kernel::traps::Lot::new());
    thread_local! {
        static LOT: std::cell::RefCell<Option<Rc<kernel::traps::Lot>>> = const { std::cell::RefCell::new(None) };
    }
    LOT.set(Some(lot.clone()));
    let thread = std::thread::spawn(move || {
        asleep.recv().unwrap();
        assert!(remote.call(|| {
            LOT.with_borrow(|lot| kernel::traps::sched_wake(lot.as_ref().unwrap(), 1));
        }));
    });
    kernel
        .run(kernel::traps::sched_wait(&lot, WaitKind::Event))
        .unwrap()
        .unwrap();
    thread.join().unwrap();
    LOT.take();
}

#[test]
fn the_dump_is_in_the_order_of_spawning_whichever_places_are_used_again() {
    run(async {
        let first = spawn(async {});
        let _second = spawn(sleep(s(1)));
        first.join().await.unwrap();
        let _third = spawn(sleep(s(1)));
        let ids: Vec<_> = kernel::tasks().iter().map(|task| task.id.get()).collect();
        assert_eq!(ids, [1, 3, 4]);
    });
}

/// Accepts: debug/dump, curio/task/task_diag
#[test]
fn the_dump_shows_parent_state_wait_and_where_tasks_were_spawned_and_wait() {
    let (mut kernel, _) = virtual_kernel();
    let (spawned, awaited) = kernel
        .run(async {
            let spawned = line!() + 1;
            let task = spawn(async {
                sleep(s(60)).await.unwrap(); // 2 below `spawned`'s value + 1
            });
            task.set_name("sleeper");
            assert_eq!(task.state(), TaskState::Ready);
            assert_eq!(current_task().state(), TaskState::Running);
            yield_now().await.unwrap();
            assert_eq!(task.state(), TaskState::Waiting);
            assert_eq!(task.name().as_deref(), Some("sleeper"));
            assert!(format!("{task:?}").contains("waits for Sleep at"));
            assert_eq!(task.cycles(), 1);
            let done = spawn(async {});
            yield_now().await.unwrap();
            assert_eq!(done.state(), TaskState::Terminated);
            assert!(done.info().is_none());
            assert!(format!("{done:?}").contains("ended"));
            (spawned, spawned + 1)
        })
        .unwrap();
    let tasks = kernel.tasks();
    assert_eq!(tasks.len(), 1, "main and `done` have ended");
    let info = &tasks[0];
    assert_eq!(info.parent.map(|id| id.get()), Some(1));
    assert_eq!(info.state, TaskState::Waiting);
    assert_eq!(info.spawned_at.line(), spawned);
    let (kind, at) = info.waits[0];
    assert_eq!((kind, at.line()), (WaitKind::Sleep, awaited));
    assert!(at.file().ends_with("tasks.rs"));
    let text = info.to_string();
    assert!(
        text.starts_with("task 2 \"sleeper\" waits for Sleep at "),
        "{text}"
    );
}

/// Accepts: debug/virtual_clock
#[test]
fn an_idle_virtual_clock_jumps_to_the_next_deadline() {
    let started = Instant::now();
    run_with(async |clock| {
        let long = spawn(sleep(s(3600)));
        sleep(s(60)).await.unwrap();
        assert_eq!(clock.elapsed(), s(60), "no further than the next deadline");
        clock.advance(s(40));
        assert_eq!(clock.elapsed(), s(100));
        long.join().await.unwrap().unwrap();
        assert_eq!(clock.elapsed(), s(3600));
    });
    assert!(started.elapsed() < s(3600));
}

#[test]
fn tasks_may_borrow_what_outlives_the_kernel() {
    let numbers = [1, 2, 3];
    let sum = Cell::new(0);
    let mut kernel = Kernel::new().unwrap();
    let task = kernel.spawn(async { sum.set(numbers.iter().sum()) });
    kernel.run(task.wait()).unwrap().unwrap();
    drop((task, kernel));
    assert_eq!(sum.get(), 6);
}
