//! The door itself: parking lots, answers from elsewhere, bare descriptors.

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use futures::channel::oneshot;
use futures::future::join;
use futures::stream::{FuturesUnordered, StreamExt};
use kernel::signal::{SIGURG, SignalQueue};
use kernel::traps::{
    Completer, Lot, future_wait, get_kernel, io_release, io_waiting, read_wait, sched_wait,
    sched_wake, write_wait,
};
use kernel::{
    Builder, Interrupt, ResourceBusy, VirtualClock, WaitKind, current_task, ignore_after, sleep,
    spawn, timeout_after, yield_now,
};

use log::Level;
use rig::Deadline;
use rustix::process::{Pid, Signal, kill_process};

use super::logged::lines_of;
use super::{Story, ms, run, run_with, s, told_of_sleep, virtual_kernel};
use crate::kernel_budget::thread_id;

/// One stands in the lot with a waker that a combinator made, the others with their task's own.
#[test]
fn those_who_wait_through_a_combinator_keep_their_turn() {
    let story = Story::default();
    run(async {
        let lot = Rc::new(Lot::new());
        let tasks: Vec<_> = ["own", "wrapped", "own again"]
            .map(|name| {
                let (lot, story) = (lot.clone(), story.clone());
                spawn(async move {
                    let wait = sched_wait(&lot, WaitKind::Event);
                    match name {
                        "wrapped" => FuturesUnordered::from_iter([wait]).next().await.unwrap(),
                        _ => wait.await,
                    }
                    .unwrap();
                    story.tell(name);
                })
            })
            .into();
        for _ in 0..2 {
            yield_now().await.unwrap(); // the combinator wakes its task once more by itself
        }
        sched_wake(&lot, 3);
        for task in tasks {
            task.join().await.unwrap();
        }
    });
    story.assert(&["own", "wrapped", "own again"]);
}

/// Accepts: trap/sched_wait, trap/sched_wake
#[test]
fn a_lot_wakes_as_many_as_asked_in_the_order_they_came() {
    let story = Story::default();
    run(async {
        let lot = Rc::new(Lot::new());
        assert_eq!(sched_wake(&lot, 3), 0);
        let tasks: Vec<_> = ["a", "b", "c", "d", "e"]
            .map(|name| {
                let (lot, story) = (lot.clone(), story.clone());
                spawn(async move {
                    if sched_wait(&lot, WaitKind::Event).await.is_ok() {
                        story.tell(name);
                    }
                })
            })
            .into();
        yield_now().await.unwrap();
        assert_eq!(lot.len(), 5);
        tasks[1].cancel().await.unwrap();
        assert_eq!(lot.len(), 4);
        assert_eq!(sched_wake(&lot, 2), 2);
        yield_now().await.unwrap();
        story.tell("|");
        assert_eq!(sched_wake(&lot, usize::MAX), 2);
        yield_now().await.unwrap();
        assert!(lot.is_empty());
    });
    story.assert(&["a", "c", "|", "d", "e"]);
}

/// The kind says where the kernel keeps a wait: a caller cannot have it look for a lot's in the timer wheel.
#[test]
fn a_kind_that_no_lot_has_is_custom() {
    run(async {
        let lot = Rc::new(Lot::new());
        for kind in [
            WaitKind::Sleep,
            WaitKind::Read,
            WaitKind::Remote,
            WaitKind::Join,
        ] {
            let parked = lot.clone();
            let task = spawn(async move { sched_wait(&parked, kind).await });
            yield_now().await.unwrap();
            let info = kernel::tasks().pop().unwrap();
            assert_eq!((info.id, info.waits[0].0), (task.id(), WaitKind::Custom));
            task.cancel().await.unwrap();
            assert!(lot.is_empty());
        }
    });
}

#[test]
fn a_woken_wait_knows_it_until_it_is_polled() {
    run(async {
        let lot = Lot::new();
        let mut wait = Box::pin(sched_wait(&lot, WaitKind::Semaphore));
        assert!(!wait.is_waiting());
        assert!(futures::poll!(&mut wait).is_pending());
        assert!(wait.is_waiting() && !wait.is_woken());
        sched_wake(&lot, 1);
        assert!(wait.is_woken());
        wait.as_mut().await.unwrap();
        assert!(!wait.is_woken() && !wait.is_waiting());
    });
    // With its kernel goes whoever could wake it.
    let lot = Lot::new();
    let mut wait = Box::pin(sched_wait(&lot, WaitKind::Semaphore));
    run(async { assert!(futures::poll!(&mut wait).is_pending()) });
    assert!(!wait.is_woken());
}

/// A queue or lock that is made outside serves one kernel after another.
#[test]
fn a_lot_outlives_its_kernel_and_starts_afresh_in_the_next() {
    let lots: [Lot; 3] = Default::default();
    let mut leaf = Box::pin(sleep(s(60)));
    let mut nap = Box::pin(timeout_after(s(30), sleep(s(60))));
    let mut task = None;
    for round in 0..3 {
        // Only later kernels have these: whoever confuses numbers, meets a stranger's.
        run(async {
            let strangers: Vec<_> = (0..4 - round)
                .map(|_| {
                    let lot = Rc::new(Lot::new());
                    let parked = lot.clone();
                    (
                        lot,
                        spawn(async move { sched_wait(&parked, WaitKind::Lock).await }),
                    )
                })
                .collect();
            yield_now().await.unwrap();
            for lot in &lots {
                assert_eq!((lot.len(), sched_wake(lot, 1)), (0, 0));
                assert_eq!(
                    ignore_after(ms(1), sched_wait(lot, WaitKind::Lock)).await,
                    Ok(None)
                );
            }
            if round == 0 {
                assert!(futures::poll!(&mut leaf).is_pending());
                assert!(futures::poll!(&mut nap).is_pending());
            } else {
                // What is left of the first kernel touches nothing here.
                drop(std::mem::replace(&mut leaf, Box::pin(sleep(s(1)))));
                drop(std::mem::replace(
                    &mut nap,
                    Box::pin(timeout_after(s(1), sleep(s(1)))),
                ));
                assert_ne!(task, Some(current_task()));
            }
            task = Some(current_task());
            assert!(strangers.iter().all(|(lot, _)| lot.len() == 1));
        });
    }
}

/// Accepts: trap/future_wait
#[test]
fn an_answer_from_another_thread_resumes_the_task_and_a_late_one_is_discarded() {
    kernel::run(async {
        let (sender, receiver) = std::sync::mpsc::channel::<Completer>();
        let thread = std::thread::spawn(move || {
            for completer in receiver {
                completer.complete();
            }
        });
        for _ in 0..100 {
            future_wait(|completer| sender.send(completer).unwrap())
                .await
                .unwrap();
        }
        // Many at once, by their own wakers.
        let many: FuturesUnordered<_> = (0..100)
            .map(|_| future_wait(|completer| sender.send(completer).unwrap()))
            .collect();
        assert_eq!(many.count().await, 100);
        drop(sender);
        thread.join().unwrap();

        // Late: the wait has timed out, another one may have its place.
        let mut late = None;
        let outcome = timeout_after(ms(1), future_wait(|completer| late = Some(completer))).await;
        assert_eq!(outcome, Err(Interrupt::TaskTimeout));
        let mut next = None;
        let mut waiting = Box::pin(future_wait(|completer| next = Some(completer)));
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(late);
        assert_eq!(ignore_after(ms(5), waiting.as_mut()).await, Ok(None));
        drop(waiting);
        drop(next);

        let mut late = None;
        let mut given_up = Box::pin(future_wait(|completer| late = Some(completer)));
        assert!(futures::poll!(&mut given_up).is_pending());
        drop(given_up);
        let next = Cell::new(None);
        let mut waiting = Box::pin(future_wait(|completer| next.set(Some(completer))));
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(late);
        sleep(ms(1)).await.unwrap();
        assert!(
            futures::poll!(&mut waiting).is_pending(),
            "it has the place"
        );
        drop(next.take());
        waiting.await.unwrap();

        // A thread that goes without an answer answers all the same; so does one that is quicker than the wait.
        future_wait(|completer| {
            std::thread::spawn(move || {
                let _completer = completer;
                panic!("the thread is gone");
            });
        })
        .await
        .unwrap();
        future_wait(drop).await.unwrap();
    })
    .unwrap();
}

#[test]
fn a_virtual_clock_follows_real_time_while_another_thread_is_waited_for() {
    let clock = VirtualClock::new();
    let (mut kernel, asleep) = told_of_sleep(Builder::new().clock(clock.clone()));
    kernel
        .run(async {
            let answer = future_wait(|completer| {
                std::thread::spawn(move || {
                    asleep
                        .recv()
                        .expect("it waits for the answer, and jumps to no timeout");
                    completer.complete();
                });
            });
            timeout_after(s(3600), answer).await.unwrap();
            assert!(clock.elapsed() < s(3600));
            // And a timeout ends a wait that is never answered.
            let mut kept = None;
            let never = future_wait(|completer| kept = Some(completer));
            assert_eq!(ignore_after(ms(10), never).await, Ok(None));
        })
        .unwrap();
}

thread_local! {
    static CALLED: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
}

/// Accepts: trap/get_kernel
#[test]
fn a_task_gets_its_kernel_and_other_threads_can_call_into_it() {
    CALLED.take();
    kernel::run(async {
        let remote = get_kernel().await;
        std::thread::spawn(move || {
            remote.call(|| {
                // Not in a task; it may start some.
                assert!(kernel::try_current_task().is_none());
                spawn(async { CALLED.with_borrow_mut(|called| called.push("task")) });
                CALLED.with_borrow_mut(|called| called.push("call"));
            });
            remote.call(|| panic!("contained"));
            remote.call(|| CALLED.with_borrow_mut(|called| called.push("after the panic")));
        });
        while CALLED.with_borrow(Vec::len) < 3 {
            sleep(ms(1)).await.unwrap();
        }
    })
    .unwrap();
    let mut called = CALLED.take();
    assert_eq!(called[0], "call");
    called.sort_unstable();
    assert_eq!(called, ["after the panic", "call", "task"]);
}

/// Accepts: curio/kernel/io_registration, trap/io_waiting, sweepea-defect/S2, sweepea-defect/S19
#[test]
fn a_reader_and_a_writer_share_a_descriptor_and_a_second_of_each_is_refused() {
    run(async {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let ours = Rc::new(ours);
        ours.set_nonblocking(true).unwrap();
        while (&*ours).write(&[0; 65536]).is_ok() {}
        let (reading, writing) = (ours.clone(), ours.clone());
        let reader = spawn(async move { read_wait(&reading).await });
        let writer = spawn(async move { write_wait(&writing).await });
        yield_now().await.unwrap();
        assert_eq!(io_waiting(&ours), (Some(reader.id()), Some(writer.id())));
        for (busy, writing) in [
            (read_wait(&ours).await.unwrap_err(), false),
            (write_wait(&ours).await.unwrap_err(), true),
        ] {
            assert_eq!(busy.kind(), ErrorKind::ResourceBusy);
            let cause = busy.get_ref().unwrap().downcast_ref();
            assert_eq!(cause, Some(&ResourceBusy { writing }));
        }
        theirs.write_all(b"x").unwrap();
        reader.join().await.unwrap().unwrap();
        assert_eq!(io_waiting(&ours), (None, Some(writer.id())));
        theirs.set_nonblocking(true).unwrap();
        while theirs.read(&mut [0; 65536]).is_ok() {}
        writer.join().await.unwrap().unwrap();
        assert_eq!(io_waiting(&ours), (None, None));
        // The number may mean another descriptor now: nothing is cached for it.
        drop((ours, theirs));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"x").unwrap();
        read_wait(&ours).await.unwrap();
    });
}

/// The poller told that it was readable while nobody asked.
#[test]
fn what_was_readable_before_is_told_although_another_task_waits_to_write() {
    run(async {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let ours = Rc::new(ours);
        ours.set_nonblocking(true).unwrap();
        while (&*ours).write(&[0; 65536]).is_ok() {}
        let writing = ours.clone();
        let writer = spawn(async move { write_wait(&writing).await });
        yield_now().await.unwrap();
        theirs.write_all(b"x").unwrap();
        sleep(ms(1)).await.unwrap();
        let readable = timeout_after(s(1), async { read_wait(&ours).await });
        readable.await.unwrap();
        assert_eq!(io_waiting(&ours), (None, Some(writer.id())));
    });
}

/// Accepts: trap/io_release
#[test]
fn releasing_a_descriptor_tells_whoever_waits_for_it() {
    run(async {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let ours = Rc::new(ours);
        let waiting = ours.clone();
        let task = spawn(async move { read_wait(&waiting).await });
        yield_now().await.unwrap();
        io_release(&ours);
        let error = task.join().await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotConnected);
        assert_eq!(io_waiting(&ours), (None, None));
    });
}

/// By its own task, between turns, and while another kernel runs.
#[test]
fn a_source_can_be_told_from_anywhere_that_it_is_empty() {
    use kernel::traps::{Direction, Source};

    for by in ["its own", "no", "another kernel's"] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let source = Source::new(&ours);
        let (mut kernel, _) = virtual_kernel();
        let calls = Cell::new(0);
        let read = || {
            calls.set(calls.get() + 1);
            (&ours).read(&mut [0])
        };
        let first = async {
            let first = source.ready_op(Direction::Read, read);
            let write = async { theirs.write_all(b"xy").unwrap() };
            join(first, write).await.0.unwrap()
        };
        assert_eq!(kernel.run(first).unwrap(), 1);
        assert_eq!(
            calls.take(),
            2,
            "once in vain, and when there was something"
        );
        assert_eq!(read().unwrap(), 1);
        let clear = async { source.clear_ready(Direction::Read) };
        match by {
            "its own" => kernel.run(clear).unwrap(),
            "no" => source.clear_ready(Direction::Read),
            _ => run(clear),
        }
        calls.set(0);
        let again = timeout_after(s(1), async { source.ready_op(Direction::Read, read).await });
        assert!(kernel.run(again).unwrap().is_err());
        assert_eq!(calls.get(), 0, "it would block, as {by} task says");
    }
}

#[test]
fn releasing_a_source_tells_whoever_waits_for_it() {
    use kernel::traps::{Direction, Source};

    run(async {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let source = Source::new(&ours);
        let read = source.ready_op(Direction::Read, || (&ours).read(&mut [0]));
        let release = async { source.release() };
        let (outcome, ()) = join(read, release).await;
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::NotConnected);
        assert_eq!(io_waiting(&ours), (None, None));
    });
}

#[test]
fn a_primitive_can_show_its_caller_where_its_own_wait_is() {
    use kernel::traps::{Direction, Source, join_wait};

    let at = std::panic::Location::caller();
    run(async {
        let shown = || current_task().info().unwrap().waits[0].1;
        let lot = Lot::new();
        let mut wait = Box::pin(sched_wait(&lot, WaitKind::Lock).called_at(at));
        assert!(futures::poll!(&mut wait).is_pending());
        assert_eq!(shown(), at);

        let task = spawn(std::future::pending::<()>());
        let mut wait = Box::pin(join_wait(&task).called_at(at));
        assert!(futures::poll!(&mut wait).is_pending());
        assert_eq!(shown(), at);

        let kept = Cell::new(None);
        let mut wait = Box::pin(future_wait(|completer| kept.set(Some(completer))).called_at(at));
        assert!(futures::poll!(&mut wait).is_pending());
        assert_eq!(shown(), at);

        let (ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let source = Source::new(&ours);
        let read = source.ready_op(Direction::Read, || (&ours).read(&mut [0]));
        let mut wait = Box::pin(read.called_at(at));
        assert!(futures::poll!(&mut wait).is_pending());
        assert_eq!(shown(), at);
    });
}

/// Whoever never has to wait lets others run all the same.
#[test]
fn a_task_makes_128_calls_in_one_poll() {
    use kernel::traps::{Direction, Source};

    run(async {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let calls = Rc::new(Cell::new(0));
        let counter = calls.clone();
        let task = spawn(async move {
            let source = Source::new(&ours);
            loop {
                let call = source.ready_op(Direction::Write, || Ok(()));
                call.await.unwrap();
                counter.set(counter.get() + 1);
            }
        });
        for polls in 1..4 {
            yield_now().await.unwrap();
            assert_eq!((task.cycles(), calls.get()), (polls, polls * 128));
        }
        task.abort();
    });
}

#[test]
fn a_descriptor_that_is_closed_while_it_is_waited_for_is_told_of_in_the_log() {
    let lines = lines_of(Level::Debug, || {
        run(async {
            let (ours, _theirs) = UnixStream::pair().unwrap();
            let mut wait = Box::pin(read_wait(&ours));
            assert!(futures::poll!(&mut wait).is_pending());
            drop(ours);
            drop(wait);
        });
    });
    let told = lines
        .iter()
        .filter(|line| line.contains("closed before it was released"));
    assert_eq!(told.count(), 1, "{lines:?}");
}

#[test]
fn a_wait_for_a_descriptor_is_interrupted_and_abandoned() {
    run_with(async |clock| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let late = timeout_after(s(5), async {
            read_wait(&ours).await?;
            Ok::<_, std::io::Error>(())
        });
        assert!(late.await.is_err());
        assert_eq!(clock.elapsed(), s(5));
        assert_eq!(io_waiting(&ours), (None, None));
        // I/O that is ready comes before the clock's jump, also for a leaf with a waker of its own.
        theirs.write_all(b"x").unwrap();
        let mut many: FuturesUnordered<_> = std::iter::once(read_wait(&ours)).collect();
        let (first, _) = join(
            async {
                many.next().await.unwrap().unwrap();
                clock.elapsed()
            },
            sleep(s(5)),
        )
        .await;
        assert_eq!(first, s(5));
    });
}

/// Accepts: interop/channels
#[test]
fn a_foreign_channel_wakes_our_task_from_this_thread_and_from_another() {
    let (mut kernel, asleep) = told_of_sleep(Builder::new());
    let main = async {
        let (sender, receiver) = oneshot::channel();
        let task = spawn(receiver);
        yield_now().await.unwrap();
        sender.send(1).unwrap();
        assert_eq!(task.join().await.unwrap(), Ok(1));

        let (sender, receiver) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            asleep.recv().unwrap();
            sender.send(2).unwrap();
        });
        assert_eq!(receiver.await, Ok(2));
        thread.join().unwrap();

        let (sender, mut receiver) = futures::channel::mpsc::channel(1);
        let thread = std::thread::spawn(move || {
            futures::executor::block_on(async move {
                let mut sender = sender;
                for i in 0..1000 {
                    futures::SinkExt::send(&mut sender, i).await.unwrap();
                }
            });
        });
        for i in 0..1000 {
            assert_eq!(receiver.next().await, Some(i));
        }
        assert_eq!(receiver.next().await, None);
        thread.join().unwrap();
    };
    kernel.run(main).unwrap();
}

#[test]
fn who_is_woken_by_a_foreign_future_goes_before_what_is_spawned_after() {
    let story = Story::default();
    run(async {
        let (sender, receiver) = oneshot::channel::<()>();
        let teller = story.clone();
        let woken = spawn(async move {
            receiver.await.unwrap();
            teller.tell("woken");
        });
        yield_now().await.unwrap();
        sender.send(()).unwrap();
        let teller = story.clone();
        let spawned = spawn(async move { teller.tell("spawned") });
        woken.join().await.unwrap();
        spawned.join().await.unwrap();
    });
    story.assert(&["woken", "spawned"]);
}

/// Even where a wait with the same number has just been fired.
#[test]
#[should_panic(expected = "a future that waits in one kernel was polled in another")]
fn a_wait_belongs_to_the_kernel_in_which_it_began() {
    let (mut first, mut second) = (Box::pin(sleep(s(1))), Box::pin(sleep(s(1))));
    let (mut kernel, _) = virtual_kernel();
    kernel
        .run(async { assert!(futures::poll!(&mut first).is_pending()) })
        .unwrap();
    run(async {
        assert!(futures::poll!(&mut second).is_pending());
        sleep(s(2)).await.unwrap();
        let _ = first.await;
    });
}

#[test]
#[should_panic(expected = "no kernel runs on this thread")]
fn a_trap_outside_a_kernel_panics_with_a_clear_text() {
    futures::executor::block_on(async { sleep(s(1)).await.unwrap() });
}

/// As a call from another thread may try, even with the waker of the task that ran last.
#[test]
fn a_trap_between_two_tasks_panics_with_a_clear_text() {
    thread_local! {
        static LAST: RefCell<Option<Waker>> = const { RefCell::new(None) };
    }
    let lines = lines_of(Level::Error, || {
        run(async {
            get_kernel().await.call(|| {
                let waker = LAST.take().unwrap();
                let _ = Pin::new(&mut yield_now()).poll(&mut Context::from_waker(&waker));
            });
            std::future::poll_fn(|cx| {
                LAST.set(Some(cx.waker().clone()));
                Poll::Ready(())
            })
            .await;
            sleep(ms(1)).await.unwrap();
        });
    });
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].contains("a trap was polled outside of a task"),
        "{lines:?}"
    );
}

#[test]
#[should_panic(expected = "no kernel runs on this thread")]
fn spawning_outside_a_kernel_panics_with_a_clear_text() {
    spawn(async {});
}

/// The number of the calling thread.
/// The poller's system call answers `EINTR` then, however the handler was installed.
#[test]
fn a_signal_that_interrupts_the_sleep_of_the_kernel_ends_nothing() {
    let _handler = SignalQueue::new(&[SIGURG]).unwrap();
    let (mut kernel, asleep) = told_of_sleep(Builder::new());
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    let sleeper = Pid::from_raw(thread_id().parse().unwrap()).unwrap();
    let others = std::thread::spawn(move || {
        let deadline = Deadline::default();
        asleep.recv().unwrap();
        for _ in 0..3 {
            // Linux gives it to the thread of that number first; it may come before that sleeps.
            kill_process(sleeper, Signal::URG).unwrap();
            while asleep.recv_timeout(ms(10)).is_err() {
                assert!(deadline.left().is_some(), "the sleep is not interrupted");
                kill_process(sleeper, Signal::URG).unwrap();
            }
        }
        theirs.write_all(b"x").unwrap();
    });
    let main = async {
        let bystander = spawn(sleep(s(3600)));
        read_wait(&ours).await.unwrap();
        bystander.cancel().await.unwrap();
    };
    kernel.run(main).unwrap();
    others.join().unwrap();
}
