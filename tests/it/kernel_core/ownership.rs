//! What may borrow, outlive and be leaked. The compile-time half is in the documentation of `Kernel`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Poll, Wake, Waker};
use std::time::{Duration, Instant};

use kernel::{
    Builder, Clock, Kernel, Task, TaskRef, VirtualClock, WaitKind, current_task, sleep, spawn,
    yield_now,
};

use super::{Story, Teller, ms, run, s, virtual_kernel};

/// The reference has no lifetime: it must not keep an output that borrows.
#[test]
fn an_output_goes_with_its_task_whatever_refers_to_it() {
    let story = Story::default();
    let (mut kernel, _) = virtual_kernel();
    let ended = kernel.spawn({
        let teller = Teller(story.clone(), "joined by nobody");
        async move { teller }
    });
    let detached = kernel.spawn({
        let teller = Teller(story.clone(), "detached");
        async move { teller }
    });
    let references: Vec<TaskRef> = vec![ended.to_ref(), detached.to_ref()];
    drop(detached);
    kernel.run(yield_now()).unwrap().unwrap();
    story.assert(&["detached"]);
    drop(kernel);
    drop(ended);
    story.assert(&["detached", "joined by nobody"]);
    drop(references);
    assert_eq!(story.len(), 2);
}

/// A leaked kernel leaks its tasks: what they borrow may be gone when a reference asks for their end.
#[test]
fn a_leaked_kernel_drops_nothing() {
    let dropped = Rc::new(Cell::new(false));
    struct Flag(Rc<Cell<bool>>);
    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }
    let kernel = Kernel::new().unwrap();
    let flag = Flag(dropped.clone());
    let task: Task<()> = kernel.spawn(async move {
        let _flag = flag;
        std::future::pending().await
    });
    std::mem::forget(kernel);
    assert!(task.abort());
    assert!(!dropped.get() && !task.is_terminated());
    drop(task);
    assert!(!dropped.get());
}

#[test]
fn an_abort_between_turns_takes_place_at_the_next() {
    let story = Story::default();
    let (mut kernel, _) = virtual_kernel();
    let teller = Teller(story.clone(), "dropped");
    let task = kernel.spawn(async move {
        let _teller = teller;
        sleep(s(60)).await
    });
    kernel.run(yield_now()).unwrap().unwrap();
    assert!(task.abort());
    story.assert(&[]);
    kernel.turn(Some(Duration::ZERO)).unwrap();
    story.assert(&["dropped"]);
    assert!(task.is_terminated() && !task.abort());
    assert_eq!(kernel.turn(Some(Duration::ZERO)).unwrap().live, 0);
}

/// Accepts: shutdown/late_wake
#[test]
fn wakers_remotes_and_handles_that_outlive_their_kernel_do_nothing() {
    let wakers: Rc<Cell<Vec<Waker>>> = Rc::default();
    let (mut kernel, _) = virtual_kernel();
    let kept = wakers.clone();
    kernel.spawn(std::future::poll_fn(move |cx| {
        let mut wakers = kept.take();
        wakers.push(cx.waker().clone());
        kept.set(wakers);
        Poll::<()>::Pending
    }));
    let task = kernel.spawn(sleep(s(1)));
    let remote = kernel.remote();
    let lot = Rc::new(kernel::traps::Lot::new());
    let parked = lot.clone();
    kernel.spawn(async move { kernel::traps::sched_wait(&parked, WaitKind::Lock).await });
    let mut completer = None;
    let _ = kernel.run(kernel::ignore_after(
        ms(1),
        kernel::traps::future_wait(|it| completer = Some(it)),
    ));
    drop(kernel);
    let wakers = wakers.take();
    assert_eq!(wakers.len(), 1);
    let late = || {
        wakers.iter().for_each(Waker::wake_by_ref);
        let elsewhere = wakers.clone();
        std::thread::spawn(move || elsewhere.into_iter().for_each(Waker::wake))
            .join()
            .unwrap();
        assert!(!remote.call(|| unreachable!("the kernel is gone")));
        assert!(task.is_terminated() && !task.abort() && !task.request_cancel(""));
        assert_eq!(task.name(), None);
        assert_eq!(lot.len(), 0);
        assert_eq!(kernel::traps::sched_wake(&lot, 1), 0);
    };
    late();
    completer.take();
    // Nor do they do harm to a successor, to which they may at most give a poll for nothing.
    let value = run(async {
        late();
        let tasks: Vec<_> = (1..4).map(|i| spawn(sleep(s(i)))).collect();
        yield_now().await.unwrap();
        late();
        for task in tasks {
            task.join().await.unwrap().unwrap();
        }
        current_task().id().get()
    });
    assert_eq!(value, 1);
}

#[test]
fn a_waker_that_outlives_its_task_does_not_wake_the_next_ones_in_its_place() {
    run(async {
        let kept: Rc<RefCell<Vec<Waker>>> = Rc::default();
        for _ in 0..10 {
            let kept = kept.clone();
            let task = std::future::poll_fn(move |cx| {
                kept.borrow_mut().push(cx.waker().clone());
                Poll::Ready(())
            });
            spawn(task).join().await.unwrap();
        }
        let next = spawn(std::future::pending::<()>());
        yield_now().await.unwrap();
        assert_eq!(next.cycles(), 1);
        kept.take().into_iter().for_each(Waker::wake);
        yield_now().await.unwrap();
        assert_eq!(next.cycles(), 1);
    });
}

#[test]
fn a_task_that_is_woken_several_times_is_polled_once() {
    run(async {
        let kept: Rc<Cell<Option<Waker>>> = Rc::default();
        let place = kept.clone();
        let task = spawn(std::future::poll_fn(move |cx| {
            place.set(Some(cx.waker().clone()));
            Poll::<()>::Pending
        }));
        yield_now().await.unwrap();
        let waker = kept.take().unwrap();
        for _ in 0..3 {
            waker.wake_by_ref();
        }
        for _ in 0..3 {
            yield_now().await.unwrap();
        }
        assert_eq!(task.cycles(), 2);
    });
}

/// Wakes a task whenever it is asked for the time, which is while the kernel's tables are in use.
struct Rooster(VirtualClock, Rc<Cell<Option<Waker>>>);

impl Clock for Rooster {
    fn now(&self) -> Instant {
        if let Some(waker) = self.1.take() {
            waker.wake();
        }
        self.0.now()
    }
    fn is_virtual(&self) -> bool {
        true
    }
    fn advance_to(&self, deadline: Instant) -> bool {
        self.0.advance_to(deadline)
    }
}

#[test]
fn a_clock_may_wake_tasks() {
    let kept: Rc<Cell<Option<Waker>>> = Rc::default();
    let clock = Rooster(VirtualClock::new(), kept.clone());
    let mut kernel = Builder::new().clock(clock).build().unwrap();
    let main = async {
        let mut polls = 0;
        let task = spawn(std::future::poll_fn(move |cx| {
            polls += 1;
            kept.set(Some(cx.waker().clone()));
            match polls {
                ..5 => Poll::Pending,
                _ => Poll::Ready(polls),
            }
        }));
        for _ in 0..5 {
            sleep(ms(1)).await.unwrap();
        }
        task.try_join().expect("it was woken each time").unwrap()
    };
    assert_eq!(kernel.run(main).unwrap(), 5);
}

#[test]
fn a_forgotten_wait_hurts_nobody() {
    run(async {
        let task = spawn(async {
            let lot = kernel::traps::Lot::new();
            let mut nap = sleep(s(1));
            assert!(futures::poll!(&mut nap).is_pending());
            std::mem::forget(nap);
            {
                let mut wait = kernel::traps::sched_wait(&lot, WaitKind::Lock);
                assert!(futures::poll!(&mut wait).is_pending());
                std::mem::forget(wait);
            }
            let mut bounded = Box::pin(kernel::timeout_after(s(2), sleep(s(9))));
            assert!(futures::poll!(&mut bounded).is_pending());
            std::mem::forget(bounded);
        });
        task.join().await.unwrap();
        sleep(s(20)).await.unwrap();
    });
}

/// Wakers of combinators run, and are dropped, with no table borrowed.
#[test]
fn a_foreign_waker_may_use_the_kernel() {
    struct Nosy(AtomicUsize);
    impl Wake for Nosy {
        fn wake(self: Arc<Self>) {
            let _ = kernel::now();
            spawn(async {});
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    impl Drop for Nosy {
        fn drop(&mut self) {
            spawn(async {});
        }
    }
    run(async {
        let nosy = Arc::new(Nosy(AtomicUsize::new(0)));
        let waker = Waker::from(nosy.clone());
        let mut cx = std::task::Context::from_waker(&waker);
        let mut naps: Vec<_> = (1..4).map(|i| Box::pin(sleep(s(i)))).collect();
        for nap in &mut naps {
            assert!(nap.as_mut().poll(&mut cx).is_pending());
        }
        drop(naps.pop());
        sleep(s(1)).await.unwrap();
        assert_eq!(nosy.0.load(Ordering::Relaxed), 1);
        current_task().request_cancel("");
        assert_eq!(nosy.0.load(Ordering::Relaxed), 2);
        // The last waker goes when its leaf is polled with another.
        let mut nap = Box::pin(sleep(s(5)));
        assert!(sleep(s(1)).await.is_err());
        assert!(nap.as_mut().poll(&mut cx).is_pending());
        drop((waker, nosy));
        assert!(futures::poll!(&mut nap).is_pending());
    });
}

#[test]
fn a_hundred_thousand_tasks_are_dropped_with_their_kernel() {
    let (mut kernel, _) = virtual_kernel();
    for _ in 0..100_000 {
        kernel.spawn(sleep(s(60)));
    }
    kernel.run(yield_now()).unwrap().unwrap();
    assert_eq!(kernel.tasks().len(), 100_000);
    drop(kernel);
}
