//! The trap that waits until no other task can run.

use std::cell::Cell;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use kernel::sync::Event;
use kernel::{Interrupt, now, sleep, spawn, timeout_after, wait_until_idle, yield_now};

use super::{Story, ms, run, s, virtual_kernel};

#[test]
fn whoever_waits_for_idleness_goes_after_all_that_can_run() {
    let story = Story::default();
    run(async {
        for name in ["a", "b"] {
            let story = story.clone();
            spawn(async move {
                for _ in 0..100 {
                    yield_now().await.unwrap();
                }
                story.tell(name);
                let _ = Event::new().wait().await;
            });
        }
        wait_until_idle().await.unwrap();
        story.tell("idle");
    });
    story.assert(&["a", "b", "idle"]);
}

#[test]
fn several_that_wait_for_idleness_go_on_together_and_in_order() {
    let story = Story::default();
    run(async {
        let mut tasks = Vec::new();
        for name in ["first", "second"] {
            let story = story.clone();
            tasks.push(spawn(async move {
                wait_until_idle().await.unwrap();
                story.tell(name);
                yield_now().await.unwrap();
                story.tell(name);
            }));
        }
        for task in tasks {
            task.join().await.unwrap();
        }
    });
    story.assert(&["first", "second", "first", "second"]);
}

#[test]
fn what_is_due_goes_first_and_what_is_not_stays_where_it_is() {
    let story = Story::default();
    run(async {
        let start = now();
        for (name, wait) in [("due", Duration::ZERO), ("later", s(1))] {
            let story = story.clone();
            spawn(async move {
                sleep(wait).await.unwrap();
                story.tell(name);
            });
        }
        wait_until_idle().await.unwrap();
        story.tell("idle");
        assert_eq!(now(), start, "the clock jumped");
        sleep(s(2)).await.unwrap();
    });
    story.assert(&["due", "idle", "later"]);
}

#[test]
fn what_is_readable_goes_first() {
    let story = Story::default();
    run(async {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let reader = story.clone();
        spawn(async move {
            kernel::traps::read_wait(&ours).await.unwrap();
            reader.tell("read");
        });
        yield_now().await.unwrap();
        theirs.write_all(b"x").unwrap();
        wait_until_idle().await.unwrap();
        story.tell("idle");
    });
    story.assert(&["read", "idle"]);
}

#[test]
fn a_wait_for_idleness_is_a_cancellation_point() {
    run(async {
        // Somebody is always ready, so that idleness does not come.
        let busy = spawn(async { while yield_now().await.is_ok() {} });
        let waiter = spawn(async { wait_until_idle().await });
        yield_now().await.unwrap();
        waiter.cancel().await.unwrap();
        assert_eq!(waiter.join().await.unwrap(), Err(Interrupt::cancelled()));

        let block = timeout_after(ms(1), async {
            kernel::set_cancellation(Some(Interrupt::TaskTimeout));
            wait_until_idle().await
        });
        assert!(block.await.is_err(), "a pending interrupt was not told");
        busy.cancel().await.unwrap();
    });
}

#[test]
fn an_abandoned_wait_for_idleness_leaves_no_trace() {
    run(async {
        let mut wait = Box::pin(wait_until_idle());
        assert!(futures::poll!(wait.as_mut()).is_pending());
        drop(wait);
        // With a place left in the lot the clock would never move again.
        sleep(s(1)).await.unwrap();
    });
}

#[test]
fn main_may_wait_for_idleness_when_nothing_else_lives() {
    assert_eq!(run(wait_until_idle()), Ok(()));
}

#[test]
fn a_guest_tells_its_host_to_come_back_for_those_who_wait_for_idleness() {
    let (mut kernel, _clock) = virtual_kernel();
    let done = Rc::new(Cell::new(false));
    let is_idle = done.clone();
    kernel.spawn(async move {
        wait_until_idle().await.unwrap();
        is_idle.set(true);
    });
    while !done.get() {
        let turn = kernel.turn(Some(Duration::ZERO)).unwrap();
        assert!(turn.ready || done.get(), "the host would sleep for ever");
    }
}
