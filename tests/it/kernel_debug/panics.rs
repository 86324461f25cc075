//! What a kernel does when a task panics, as its builder said.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::rc::Rc;

use kernel::{JoinError, OnPanic, TaskView, sleep, spawn, yield_now};
use log::Level;

use super::{Diary, s, virtual_builder};
use crate::kernel_core::logged::lines_of;

#[test]
fn a_propagated_panic_leaves_run_at_once_and_the_kernel_stays_intact() {
    let (builder, clock) = virtual_builder();
    let diary = Diary::default();
    let builder = builder
        .on_panic(OnPanic::Propagate)
        .activation(diary.clone());
    let mut kernel = builder.build().unwrap();
    let crashed = kernel.spawn(async {
        sleep(s(1)).await.unwrap();
        panic_any(42);
    });
    let survivor = kernel.spawn(sleep(s(5)));
    let left = catch_unwind(AssertUnwindSafe(|| {
        kernel.run(async { sleep(s(3600)).await })
    }));
    assert_eq!(left.unwrap_err().downcast_ref(), Some(&42));
    assert_eq!(clock.elapsed(), s(1));
    assert!(kernel::try_current_task().is_none());
    let story = diary.take();
    let ending = ["1 suspended Panicked", "1 terminated", "3 terminated"];
    assert_eq!(story[story.len() - 3..], ending, "the main task is dropped");

    // It runs on, and whoever joins the task gets what is left of the panic.
    let outcome = kernel.run(crashed.join()).unwrap();
    let text = "task panicked: a value that is not text";
    assert_eq!(outcome.unwrap_err().to_string(), text);
    kernel.run(survivor.join()).unwrap().unwrap().unwrap();
    assert_eq!(clock.elapsed(), s(5));
    // A turn lets it out as well.
    kernel.spawn(async { panic!("in a turn") });
    let left = catch_unwind(AssertUnwindSafe(|| kernel.turn(None)));
    assert_eq!(left.unwrap_err().downcast_ref(), Some(&"in a turn"));
    assert_eq!(kernel.run(async { 7 }).unwrap(), 7);
}

#[test]
fn a_propagated_panic_during_shutdown_comes_when_all_tasks_have_ended() {
    let diary = Diary::default();
    let builder = virtual_builder().0.on_panic(OnPanic::Propagate);
    let mut kernel = builder.activation(diary.clone()).build().unwrap();
    kernel.spawn(async {
        sleep(s(9)).await.unwrap_err();
        panic!("when the other had");
    });
    kernel.spawn(async {
        sleep(s(9)).await.unwrap_err();
        panic!("while it cleaned up");
    });
    kernel.turn(Some(std::time::Duration::ZERO)).unwrap();
    let left = catch_unwind(AssertUnwindSafe(|| kernel.shutdown(None)));
    assert_eq!(
        left.unwrap_err().downcast_ref(),
        Some(&"while it cleaned up")
    );
    let ends: Vec<_> = diary
        .take()
        .into_iter()
        .filter(|line| line.ends_with("terminated"))
        .collect();
    assert_eq!(ends, ["2 terminated", "1 terminated"]);
}

#[test]
fn of_two_panics_on_the_way_out_the_second_is_reported_by_its_task() {
    let mut kernel = virtual_builder()
        .0
        .on_panic(OnPanic::Propagate)
        .build()
        .unwrap();
    let lines = lines_of(Level::Error, || {
        let left = catch_unwind(AssertUnwindSafe(|| {
            kernel.run(async {
                drop(spawn(async { panic!("first") }));
                drop(spawn(async { panic!("second") }));
                yield_now().await.unwrap();
            })
        }));
        assert_eq!(left.unwrap_err().downcast_ref(), Some(&"first"));
        let left = catch_unwind(AssertUnwindSafe(|| kernel.run(async { sleep(s(1)).await })));
        assert_eq!(
            left.unwrap_err().downcast_ref(),
            Some(&"second"),
            "it had not run yet"
        );
    });
    assert!(
        lines.is_empty(),
        "what left the kernel needs no line in the log: {lines:?}"
    );
}

type Seen = Rc<RefCell<Vec<(u64, String)>>>;

fn note(seen: &Seen) -> OnPanic {
    let seen = seen.clone();
    OnPanic::call(move |task: &TaskView<'_>, payload: &(dyn Any + Send)| {
        let text = payload.downcast_ref::<&str>().unwrap_or(&"?");
        seen.borrow_mut()
            .push((task.id().get(), (*text).to_owned()));
    })
}

#[test]
fn a_callback_is_told_of_each_panic_and_the_rest_is_as_usual() {
    let seen = Seen::default();
    let mut kernel = virtual_builder().0.on_panic(note(&seen)).build().unwrap();
    let lines = lines_of(Level::Error, || {
        kernel
            .run(async {
                let joined = spawn(async { panic!("joined") });
                drop(spawn(async { panic!("detached") }));
                sleep(s(1)).await.unwrap();
                let Err(JoinError::Panicked(panic)) = joined.join().await else {
                    panic!("it panicked");
                };
                assert_eq!(panic.into_payload().downcast_ref(), Some(&"joined"));
            })
            .unwrap();
        let left = catch_unwind(AssertUnwindSafe(|| kernel.run(async { panic!("main") })));
        assert_eq!(left.unwrap_err().downcast_ref(), Some(&"main"));
    });
    let expected = [(2, "joined"), (3, "detached"), (4, "main")];
    assert_eq!(
        *seen.borrow(),
        expected.map(|(id, text)| (id, text.to_owned()))
    );
    assert!(lines.is_empty(), "the callback knows: {lines:?}");
}

#[test]
fn a_callback_may_panic_or_join_the_task_itself() {
    let stumble = OnPanic::call(|_, _| panic!("stumbled"));
    let mut kernel = virtual_builder().0.on_panic(stumble).build().unwrap();
    let lines = lines_of(Level::Error, || {
        kernel
            .run(async {
                drop(spawn(async { panic!("lost?") }));
                sleep(s(1)).await.unwrap();
            })
            .unwrap();
    });
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines[0].ends_with("panic in the callback for panics: stumbled"),
        "{lines:?}"
    );
    assert!(
        lines[1].ends_with("panicked and nobody joined it: lost?"),
        "{lines:?}"
    );

    let task: Rc<RefCell<Option<kernel::Task<()>>>> = Rc::default();
    let shared = task.clone();
    let join = OnPanic::call(move |_, payload| {
        assert!(shared.borrow().as_ref().unwrap().try_join().is_some());
        shared.take();
        assert_eq!(payload.downcast_ref(), Some(&"joined too early"));
    });
    let mut kernel = virtual_builder().0.on_panic(join).build().unwrap();
    *task.borrow_mut() = Some(kernel.spawn(async { panic!("joined too early") }));
    let lines = lines_of(Level::Error, || {
        kernel.run(async { sleep(s(1)).await }).unwrap().unwrap();
    });
    assert!(task.borrow().is_none(), "the callback ran to its end");
    assert!(lines.is_empty(), "{lines:?}");
}

#[test]
fn a_contained_panic_that_nobody_can_join_any_more_is_logged_with_its_text() {
    for when in ["before", "after"] {
        let mut kernel = virtual_builder().0.build().unwrap();
        let lines = lines_of(Level::Error, || {
            kernel
                .run(async {
                    let task = spawn(async { panic!("nobody saw {}", 1) });
                    task.set_name("loner");
                    if when == "before" {
                        drop(task);
                        sleep(s(1)).await.unwrap();
                    } else {
                        sleep(s(1)).await.unwrap();
                        drop(task);
                    }
                })
                .unwrap();
        });
        assert_eq!(lines.len(), 1, "{when}: {lines:?}");
        assert!(
            lines[0].ends_with("panicked and nobody joined it: nobody saw 1"),
            "{lines:?}"
        );
    }
}
