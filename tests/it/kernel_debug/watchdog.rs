//! The watchdog. In real time; a report may come late, but it comes.

use std::sync::mpsc;
use std::time::Duration;

use kernel::{Builder, Stuck, now, sleep, spawn, yield_now};

const LIMIT: Duration = Duration::from_millis(20);

#[test]
fn the_watchdog_reports_a_task_that_does_not_let_go_again_and_again() {
    let (sender, reports) = mpsc::channel();
    let report = move |stuck: &Stuck| drop(sender.send(stuck.clone()));
    let mut kernel = Builder::new().watchdog_with(LIMIT, report).build().unwrap();
    kernel
        .run(async {
            spawn(sleep(Duration::from_secs(60)));
            let spawned = line!() + 1;
            let hog = spawn(async move {
                yield_now().await.unwrap();
                // Nobody else runs until it has been reported twice.
                [reports.recv().unwrap(), reports.recv().unwrap()]
            });
            hog.set_name("hog");
            let id = hog.id();
            let [first, second] = hog.join().await.unwrap();
            for stuck in [&first, &second] {
                assert_eq!((stuck.task, stuck.name.as_deref()), (id, Some("hog")));
                assert_eq!(
                    (stuck.spawned_at.file(), stuck.spawned_at.line()),
                    (file!(), spawned)
                );
            }
            assert!(first.running_for >= LIMIT);
            assert!(second.running_for >= 2 * LIMIT);
            let text = first.to_string();
            assert!(
                text.starts_with(&format!("task {id} \"hog\" spawned at tests")),
                "{text}"
            );
            assert!(text.contains(" has been running for "), "{text}");
        })
        .unwrap();
}

#[test]
fn a_kernel_that_sleeps_and_tasks_that_take_turns_are_not_stuck() {
    let limit = Duration::from_millis(200);
    // A busy machine may hold a step up for longer than the limit: then the watchdog is right, and this is tried again.
    loop {
        let (sender, reports) = mpsc::channel();
        let report = move |stuck: &Stuck| sender.send(stuck.to_string()).unwrap();
        let mut kernel = Builder::new().watchdog_with(limit, report).build().unwrap();
        let longest = kernel.run(async {
            let began = now();
            sleep(2 * limit).await.unwrap();
            let mut last = now();
            let mut longest = last - began - 2 * limit;
            while last < began + 4 * limit {
                yield_now().await.unwrap();
                longest = longest.max(now() - last);
                last = now();
            }
            longest
        });
        drop(kernel);
        if longest.unwrap() < limit / 2 {
            assert_eq!(reports.try_iter().collect::<Vec<_>>(), [""; 0]);
            return;
        }
    }
}

#[test]
fn a_kernel_that_is_dropped_takes_its_watchdog_along() {
    let (sender, reports) = mpsc::channel();
    let report = move |_: &Stuck| sender.send(()).unwrap();
    let kernel = Builder::new().watchdog_with(LIMIT, report).build().unwrap();
    assert_eq!(reports.try_recv(), Err(mpsc::TryRecvError::Empty));
    drop(kernel);
    assert_eq!(reports.try_recv(), Err(mpsc::TryRecvError::Disconnected));
}

#[test]
fn a_callback_that_panics_ends_the_watchdog_and_nothing_else() {
    let (sender, reports) = mpsc::channel();
    let report = move |_: &Stuck| {
        sender.send(()).unwrap();
        panic!("stumbled");
    };
    let mut kernel = Builder::new().watchdog_with(LIMIT, report).build().unwrap();
    kernel
        .run(async {
            reports.recv().unwrap();
            assert_eq!(reports.recv(), Err(mpsc::RecvError), "no second report");
            assert_eq!(spawn(async { 7 }).join().await.unwrap(), 7);
        })
        .unwrap();
}
