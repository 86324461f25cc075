//! Panics: in polls, in destructors of futures and outputs, in payloads; before, during and after joins, aborts and detaching.

use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use kernel::traps::get_kernel;
use kernel::{JoinError, Kernel, RunError, Task, current_task, sleep, spawn, yield_now};
use log::Level;

use super::logged::lines_of;
use super::{Story, Teller, run, s, virtual_kernel};

/// Accepts: panic/contained
#[test]
fn a_panic_is_contained_and_reported_at_join_while_others_go_on() {
    let story = Story::default();
    run(async {
        let teller = Teller(story.clone(), "dropped");
        let task = spawn(async move {
            let _teller = teller;
            sleep(s(1)).await.unwrap();
            panic!("task {}", 7);
        });
        let other = spawn(sleep(s(2)));
        let error = task.join().await.unwrap_err();
        assert_eq!(error.to_string(), "task panicked: task 7");
        assert!(matches!(error, JoinError::Panicked(_)));
        story.assert(&["dropped"]);
        other.join().await.unwrap().unwrap();
    });
}

/// Accepts: panic/main, curio/kernel/kernel_exit, sweepea-defect/S15
#[test]
fn a_panic_of_main_leaves_run_and_the_kernel_goes_on() {
    let (mut kernel, _) = virtual_kernel();
    let story = Story::default();
    let teller = story.clone();
    let task = kernel.spawn(async move {
        sleep(s(1)).await.unwrap();
        teller.tell("went on");
    });
    let left = catch_unwind(AssertUnwindSafe(|| {
        kernel.run(async {
            yield_now().await.unwrap();
            let _scope = kernel::timeout_after(s(1), async {
                panic_any(42);
                #[expect(unreachable_code, reason = "names the type")]
                Ok::<(), kernel::Interrupt>(())
            })
            .await;
        })
    }));
    assert_eq!(left.unwrap_err().downcast_ref(), Some(&42));
    assert!(kernel::try_current_task().is_none());
    kernel.run(task.wait()).unwrap().unwrap();
    story.assert(&["went on"]);
    kernel.shutdown(None).unwrap();
}

#[test]
fn an_aborted_main_task_ends_the_run() {
    let (mut kernel, _) = virtual_kernel();
    let outcome = kernel.run(async {
        current_task().abort();
        sleep(s(1)).await
    });
    assert!(matches!(outcome, Err(RunError::Aborted)));
    let outcome = kernel.run(async {
        let main = current_task();
        spawn(async move { main.abort() });
        sleep(s(1)).await
    });
    assert!(matches!(outcome, Err(RunError::Aborted)));
}

/// A value whose destructor tells, and then panics.
struct Bomb(Story, &'static str);

impl Drop for Bomb {
    fn drop(&mut self) {
        self.0.tell(self.1);
        // A second panic while one unwinds would end the process.
        if !std::thread::panicking() {
            panic_any(Fragile(self.1));
        }
    }
}

/// A payload that panics too when it is dropped.
struct Fragile(&'static str);

impl Drop for Fragile {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "payload {} was dropped", self.0);
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Returns,
    Panics,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Deed {
    Join,
    TryJoin,
    Detach,
    DetachKeepingRef,
    Abort,
    Cancel,
    CloseKernel,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    BeforeItRan,
    WhileItWaits,
    AfterItEnded,
}

/// Every way in which a task ends, beside everything that can be done to it, at any time: each destructor runs exactly once,
/// and the kernel is none the worse.
#[test]
fn the_matrix_of_ends_deeds_and_times() {
    for end in [End::Returns, End::Panics, End::Never] {
        for deed in [
            Deed::Join,
            Deed::TryJoin,
            Deed::Detach,
            Deed::DetachKeepingRef,
            Deed::Abort,
            Deed::Cancel,
            Deed::CloseKernel,
        ] {
            for when in [When::BeforeItRan, When::WhileItWaits, When::AfterItEnded] {
                let endless = end == End::Never
                    && (when == When::AfterItEnded || deed == Deed::Join || deed == Deed::Cancel);
                if endless {
                    continue;
                }
                for (bad_future, bad_output) in
                    [(false, false), (true, false), (false, true), (true, true)]
                {
                    let case = format!("{end:?} {deed:?} {when:?} {bad_future} {bad_output}");
                    try_out(end, deed, when, bad_future, bad_output, &case);
                }
            }
        }
    }
}

enum Piece {
    Tame(#[expect(dead_code, reason = "for its destructor")] Teller),
    Bad(#[expect(dead_code, reason = "for its destructor")] Bomb),
}

/// A future with something that goes when it is dropped, not when it ends.
struct Holding<F>(
    Pin<Box<F>>,
    #[expect(dead_code, reason = "for its destructor")] Piece,
);

impl<F> Unpin for Holding<F> {}

impl<F: Future> Future for Holding<F> {
    type Output = F::Output;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.0.as_mut().poll(cx)
    }
}

fn piece(story: &Story, name: &'static str, bad: bool) -> Piece {
    if bad {
        Piece::Bad(Bomb(story.clone(), name))
    } else {
        Piece::Tame(Teller(story.clone(), name))
    }
}

fn try_out(end: End, deed: Deed, when: When, bad_future: bool, bad_output: bool, case: &str) {
    let (futures, outputs) = (Story::default(), Story::default());
    let (mut kernel, _) = virtual_kernel();
    let mut kept = None;
    let task: Task<Piece> = kernel.spawn({
        let future = piece(&futures, "future", bad_future);
        let outputs = outputs.clone();
        let body = async move {
            yield_now().await.unwrap();
            yield_now().await.unwrap();
            match end {
                End::Returns => piece(&outputs, "output", bad_output),
                End::Panics => panic_any(Fragile("of the poll")),
                End::Never => std::future::pending().await,
            }
        };
        Holding(Box::pin(body), future)
    });
    match when {
        When::BeforeItRan => {}
        When::WhileItWaits => kernel.run(yield_now()).unwrap().unwrap(),
        When::AfterItEnded => kernel.run(task.wait()).unwrap().unwrap(),
    }
    let mut task = Some(task);
    match deed {
        Deed::Join => {
            let held = task.as_ref().unwrap();
            let outcome = kernel.run(held.join()).unwrap();
            let value = end == End::Returns && !bad_future;
            assert_eq!(outcome.is_ok(), value, "{case}");
            defuse(outcome);
        }
        Deed::TryJoin => {
            let held = task.as_ref().unwrap();
            kernel.run(yield_now()).unwrap().unwrap();
            if let Some(outcome) = held.try_join() {
                defuse(outcome);
            }
        }
        Deed::Detach => drop(task.take()),
        Deed::DetachKeepingRef => {
            kept = task.take().map(|task| task.to_ref());
        }
        Deed::Abort => {
            let held = task.as_ref().unwrap();
            let alive = !held.is_terminated();
            assert_eq!(held.abort(), alive, "{case}");
            kept = Some(held.to_ref());
        }
        Deed::Cancel => kernel
            .run(task.as_ref().unwrap().cancel())
            .unwrap()
            .unwrap(),
        Deed::CloseKernel => {}
    }
    if deed != Deed::CloseKernel {
        let outcome = kernel.run(async {
            for _ in 0..5 {
                yield_now().await.unwrap();
            }
            spawn(async { 5 }).join().await.unwrap()
        });
        assert_eq!(outcome.unwrap(), 5, "{case}");
    }
    drop((kernel, task));
    assert_eq!(futures.len(), 1, "the future is dropped once: {case}");
    let made = usize::from(outputs.len() > 0);
    assert_eq!(outputs.len(), made, "the output at most once: {case}");
    drop(kept);
    assert_eq!(outputs.len(), made, "and not by a reference: {case}");
    if end == End::Returns && when == When::AfterItEnded {
        assert_eq!(made, 1, "{case}");
    }
}

/// Drops what may panic at that.
fn defuse<T>(value: T) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
        std::mem::forget(payload);
    }
}

#[test]
fn a_destructor_may_use_the_kernel() {
    struct Busy(Story);
    impl Drop for Busy {
        fn drop(&mut self) {
            let story = self.0.clone();
            spawn(async move { story.tell("spawned by a destructor") });
            let _ = kernel::now();
            let _ = kernel::try_current_task().map(|task| task.info());
        }
    }
    // The reason of a cancellation is a user's value too.
    struct BusyReason;
    impl Drop for BusyReason {
        fn drop(&mut self) {
            let _ = kernel::now();
            spawn(async {});
        }
    }
    let story = Story::default();
    run(async {
        let busy = Busy(story.clone());
        let aborted = spawn(async move {
            let _busy = busy;
            sleep(s(1)).await
        });
        let busy = Busy(story.clone());
        let detached = spawn(async move { busy });
        yield_now().await.unwrap();
        aborted.abort();
        drop(detached);
        yield_now().await.unwrap();
        story.assert(&["spawned by a destructor"; 2]);

        let task = spawn(async {
            sleep(s(1)).await.unwrap_err();
        });
        task.request_cancel(kernel::Reason::new(BusyReason));
        task.request_cancel(kernel::Reason::new(BusyReason));
        task.join().await.unwrap();
        kernel::set_cancellation(Some(kernel::Interrupt::Cancelled(kernel::Reason::new(
            BusyReason,
        ))));
        kernel::set_cancellation(Some(kernel::Interrupt::TaskTimeout));
        kernel::set_cancellation(None);
    });
}

#[test]
fn what_a_destructor_spawns_while_its_kernel_goes_is_dropped_at_once() {
    struct Late(Story);
    impl Drop for Late {
        fn drop(&mut self) {
            let task = spawn(std::future::pending::<()>());
            self.0.tell(task.is_terminated());
        }
    }
    let story = Story::default();
    let (mut kernel, _) = virtual_kernel();
    let late = Late(story.clone());
    kernel.spawn(async move {
        let _late = late;
        std::future::pending::<()>().await;
    });
    kernel.run(yield_now()).unwrap().unwrap();
    drop(kernel);
    story.assert(&["true"]);
}

#[test]
fn a_panic_that_nobody_joined_is_logged() {
    let logged = lines_of(Level::Error, || {
        run(async {
            drop(spawn(async { panic!("unseen") }));
            sleep(s(1)).await.unwrap();
            let task = spawn(async { panic!("seen") });
            assert!(task.join().await.is_err());
        });
    });
    assert_eq!(logged.len(), 1, "{logged:?}");
    assert!(logged[0].contains("nobody joined it"), "{logged:?}");
}

#[test]
fn a_kernel_whose_main_panics_while_it_is_dropped_closes() {
    let story = Story::default();
    let left = catch_unwind(AssertUnwindSafe(|| {
        let mut kernel = Kernel::new().unwrap();
        let bomb = Bomb(story.clone(), "future");
        kernel.spawn(async move {
            let _bomb = bomb;
            std::future::pending::<()>().await
        });
        kernel.run(async { panic!("main") }).unwrap();
    }));
    assert!(left.is_err());
    story.assert(&["future"]);
}

/// The payload was forgotten, and with it whatever the call had put into it.
#[test]
fn r3_the_payload_of_a_panic_in_a_remote_call_is_dropped() {
    run(async {
        let payload = Arc::new(());
        let thrown = payload.clone();
        assert!(get_kernel().await.call(move || panic_any(thrown)));
        sleep(s(1)).await.unwrap();
        assert_eq!(Arc::strong_count(&payload), 1);
    });
}
