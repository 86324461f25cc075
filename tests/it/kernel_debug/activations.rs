//! Observers, and the debuggers made of them.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::rc::Rc;
use std::time::Instant;

use kernel::debug::{logcrash, longblock, schedtrace, traptrace};
use kernel::traps::{Lot, sched_wait};
use kernel::{
    Activation, Builder, KernelView, RunError, StepEnd, TaskRef, TaskState, TaskView, WaitKind,
    current_task, sleep, spawn, tasks, yield_now,
};
use log::Level;

use super::{Diary, s, virtual_builder};
use crate::kernel_core::logged::lines_of;

/// Accepts: curio/activation/activation_base
#[test]
fn an_observer_is_told_of_every_step_of_a_task_in_order() {
    let diary = Diary::default();
    let mut kernel = virtual_builder()
        .0
        .activation(diary.clone())
        .build()
        .unwrap();
    assert_eq!(diary.take(), ["activate"]);
    kernel
        .run(async {
            for _ in 0..3 {
                sleep(s(1)).await.unwrap();
            }
        })
        .unwrap();
    let sleeps = ["1 running", "1 suspended Sleep"];
    let expected = [
        &["1 created"],
        &sleeps[..],
        &sleeps[..],
        &sleeps[..],
        &["1 running", "1 suspended Returned", "1 terminated"],
    ];
    assert_eq!(diary.take(), expected.concat());

    // A child's end is told before whoever joins it knows.
    let child = kernel.spawn(async { yield_now().await });
    kernel
        .run(async {
            child.join().await.unwrap().unwrap();
        })
        .unwrap();
    assert_eq!(
        diary.take(),
        [
            "2 created",
            "3 created",
            "2 running",
            "2 suspended Ready",
            "3 running",
            "3 suspended Join",
            "2 running",
            "2 suspended Returned",
            "2 terminated",
            "3 running",
            "3 suspended Returned",
            "3 terminated",
        ]
    );
}

/// Accepts: curio/activation/activation_crash
#[test]
fn a_failing_main_task_is_told_to_its_end() {
    let diary = Diary::default();
    let mut kernel = virtual_builder()
        .0
        .activation(diary.clone())
        .build()
        .unwrap();
    let left = catch_unwind(AssertUnwindSafe(|| {
        kernel.run(async {
            sleep(s(1)).await.unwrap();
            panic!("dead");
        })
    }));
    assert_eq!(left.unwrap_err().downcast_ref(), Some(&"dead"));
    let expected = [
        "activate",
        "1 created",
        "1 running",
        "1 suspended Sleep",
        "1 running",
        "1 suspended Panicked",
        "1 terminated",
    ];
    assert_eq!(diary.take(), expected);
    // An error that it returns is a value like any other.
    let outcome = kernel.run(async { Err::<(), _>("dead") }).unwrap();
    assert_eq!(outcome, Err("dead"));
    let expected = [
        "2 created",
        "2 running",
        "2 suspended Returned",
        "2 terminated",
    ];
    assert_eq!(diary.take(), expected);
}

/// Accepts: curio/activation/activation_count
#[test]
fn the_kernel_has_no_tasks_of_its_own() {
    let diary = Diary::default();
    let mut kernel = Builder::new().activation(diary.clone()).build().unwrap();
    kernel
        .run(async {
            assert_eq!(tasks().len(), 1);
            // Threads, timers and signals need none either.
            kernel::run_in_thread(|| {}).await.unwrap();
            let _signals = kernel::signal::SignalQueue::new(&[kernel::signal::SIGHUP]).unwrap();
            assert_eq!(tasks().len(), 1);
        })
        .unwrap();
    kernel.shutdown(None).unwrap();
    let created: Vec<_> = diary
        .take()
        .into_iter()
        .filter(|line| line.ends_with("created"))
        .collect();
    assert_eq!(created, ["1 created"]);
}

#[test]
fn tasks_that_are_aborted_or_dropped_with_their_kernel_are_told_as_terminated() {
    let diary = Diary::default();
    let mut kernel = virtual_builder()
        .0
        .activation(diary.clone())
        .build()
        .unwrap();
    kernel
        .run(async {
            let waits = spawn(sleep(s(9)));
            let fresh = spawn(sleep(s(9)));
            fresh.abort();
            yield_now().await.unwrap();
            waits.abort();
            let suicide = spawn(async { current_task().abort() });
            suicide.wait().await.unwrap();
            drop(spawn(sleep(s(9))));
            yield_now().await.unwrap();
        })
        .unwrap();
    let story = diary.take();
    let of = |task: &str| -> Vec<String> {
        let words = story
            .iter()
            .map(|line| line.split_once(' ').unwrap_or((line, "")));
        words
            .filter(|(id, _)| *id == task)
            .map(|(_, what)| what.to_owned())
            .collect()
    };
    assert_eq!(
        of("2"),
        ["created", "running", "suspended Sleep", "terminated"]
    );
    assert_eq!(of("3"), ["created", "terminated"]);
    assert_eq!(
        of("4"),
        ["created", "running", "suspended Returned", "terminated"]
    );
    assert_eq!(of("5"), ["created", "running", "suspended Sleep"]);
    drop(kernel);
    assert_eq!(diary.take(), ["5 terminated"]);
}

/// Looks at each task in each of its calls.
#[derive(Clone, Default)]
struct Inspector(Rc<RefCell<Vec<Seen>>>);

/// Number and event, state, steps, name.
type Seen = (String, TaskState, u32, Option<String>);

impl Inspector {
    fn look(&self, when: &str, task: &TaskView<'_>) {
        let name = task.name().map(|name| name.to_string());
        let seen = (
            format!("{} {when}", task.id()),
            task.state(),
            task.cycles(),
            name,
        );
        self.0.borrow_mut().push(seen);
        assert_eq!(task.spawned_at().file(), file!());
        assert_eq!(task.info().id, task.id());
        assert_eq!(task.to_ref().id(), task.id());
        assert_eq!(
            task.parent().map(|id| id.get()),
            (task.id().get() == 2).then_some(1)
        );
    }
}

impl Activation for Inspector {
    fn created(&mut self, task: &TaskView<'_>) {
        self.look("created", task);
    }
    fn running(&mut self, task: &TaskView<'_>) {
        self.look("running", task);
    }
    fn suspended(&mut self, task: &TaskView<'_>, end: StepEnd) {
        self.look("suspended", task);
        if task.id().get() == 2 && task.cycles() == 1 {
            let StepEnd::Waits(WaitKind::Sleep, at) = end else {
                panic!("{end}");
            };
            assert_eq!((task.info().waits[0].1, at.file()), (at, file!()));
            assert_eq!(end.to_string(), format!("waits for Sleep at {at}"));
        }
    }
    fn terminated(&mut self, task: &TaskView<'_>) {
        self.look("terminated", task);
    }
}

#[test]
fn an_observer_sees_state_steps_name_parent_and_places() {
    let inspector = Inspector::default();
    let mut kernel = virtual_builder()
        .0
        .activation(inspector.clone())
        .build()
        .unwrap();
    kernel
        .run(async {
            let task = spawn(sleep(s(1)));
            task.set_name("napper");
            task.join().await.unwrap().unwrap();
        })
        .unwrap();
    let seen = inspector.0.take();
    let of_child: Vec<_> = seen.iter().filter(|seen| seen.0.starts_with('2')).collect();
    let states: Vec<_> = of_child
        .iter()
        .map(|seen| (&*seen.0, seen.1, seen.2))
        .collect();
    assert_eq!(
        states,
        [
            ("2 created", TaskState::Ready, 0),
            ("2 running", TaskState::Running, 0),
            ("2 suspended", TaskState::Waiting, 1),
            ("2 running", TaskState::Running, 1),
            ("2 suspended", TaskState::Terminated, 2),
            ("2 terminated", TaskState::Terminated, 2),
        ]
    );
    let names: Vec<_> = of_child.iter().map(|seen| seen.3.as_deref()).collect();
    assert_eq!(names[0], None);
    assert!(
        names[1..].iter().all(|name| *name == Some("napper")),
        "{names:?}"
    );
}

/// Panics at the given event.
struct Clumsy(&'static str);

impl Clumsy {
    fn stumble(&self, event: &str) {
        assert_ne!(event, self.0, "stumbled");
    }
}

impl Activation for Clumsy {
    fn activate(&mut self, _: &KernelView<'_>) {
        self.stumble("activate");
    }
    fn created(&mut self, _: &TaskView<'_>) {
        self.stumble("created");
    }
    fn running(&mut self, _: &TaskView<'_>) {
        self.stumble("running");
    }
    fn suspended(&mut self, _: &TaskView<'_>, _: StepEnd) {
        self.stumble("suspended");
    }
    fn terminated(&mut self, _: &TaskView<'_>) {
        self.stumble("terminated");
    }
    fn idle(&mut self, _: &KernelView<'_>) {
        self.stumble("idle");
    }
}

impl Drop for Clumsy {
    fn drop(&mut self) {
        self.stumble("drop");
        if self.0 != "none" && !std::thread::panicking() {
            panic!("stumbled once more");
        }
    }
}

struct Bomber;

/// Panics once more when it is dropped.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("dropped");
    }
}

impl Activation for Bomber {
    fn created(&mut self, _: &TaskView<'_>) {
        panic_any(Bomb);
    }
}

#[test]
fn what_an_observer_panics_with_may_panic_in_its_turn() {
    let mut kernel = Builder::new().activation(Bomber).build().unwrap();
    assert_eq!(kernel.run(async { 7 }).unwrap(), 7);
}

#[test]
fn an_observer_that_panics_is_taken_out_and_the_kernel_goes_on() {
    for event in [
        "activate",
        "created",
        "running",
        "suspended",
        "terminated",
        "idle",
    ] {
        let diary = Diary::default();
        let mut lines = lines_of(Level::Error, || {
            let builder = Builder::new()
                .activation(Clumsy(event))
                .activation(diary.clone());
            let mut kernel = builder.build().unwrap();
            for _ in 0..2 {
                let answer = kernel.run(async {
                    let nap = sleep(std::time::Duration::from_millis(1));
                    spawn(nap).join().await.unwrap().unwrap();
                    7
                });
                assert_eq!(answer.unwrap(), 7);
            }
        });
        lines.retain(|line| line.contains("observer"));
        assert_eq!(lines.len(), 1, "{event}: {lines:?}");
        assert!(
            lines[0].contains("Clumsy panicked and is taken out: "),
            "{lines:?}"
        );
        let story = diary.take();
        for task in 1..=4 {
            let ends = story
                .iter()
                .filter(|line| **line == format!("{task} terminated"));
            assert_eq!(ends.count(), 1, "the other observer is told all: {event}");
        }
    }
}

/// Does to each task what it is told to.
struct Meddler {
    event: &'static str,
    deed: fn(&TaskRef) -> bool,
}

impl Meddler {
    fn act(&self, event: &str, task: &TaskView<'_>) {
        if event == self.event && task.id().get() == 2 {
            (self.deed)(&task.to_ref());
        }
    }
}

impl Activation for Meddler {
    fn created(&mut self, task: &TaskView<'_>) {
        self.act("created", task);
    }
    fn running(&mut self, task: &TaskView<'_>) {
        self.act("running", task);
    }
    fn suspended(&mut self, task: &TaskView<'_>, _: StepEnd) {
        self.act("suspended", task);
    }
    fn terminated(&mut self, task: &TaskView<'_>) {
        self.act("terminated", task);
    }
}

#[test]
fn an_observer_may_abort_or_cancel_the_very_task_that_it_is_told_of() {
    for event in ["created", "running", "suspended", "terminated"] {
        let cancel: fn(&TaskRef) -> bool = |task| task.request_cancel("meddled");
        for (is_abort, deed) in [(true, TaskRef::abort as _), (false, cancel)] {
            let diary = Diary::default();
            let builder = virtual_builder().0.activation(Meddler { event, deed });
            let mut kernel = builder.activation(diary.clone()).build().unwrap();
            let has_run = Rc::new(Cell::new(false));
            let outcome = kernel
                .run(async {
                    let has_run = has_run.clone();
                    let task = spawn(async move {
                        has_run.set(true);
                        sleep(s(1)).await
                    });
                    let outcome = task.join().await;
                    // The slot is in order: others have it after this task.
                    for n in 0..10 {
                        assert_eq!(spawn(async move { n }).join().await.unwrap(), n);
                    }
                    outcome
                })
                .unwrap();
            let is_early = event != "terminated";
            match outcome {
                Ok(Ok(_)) => assert!(!is_early),
                Ok(Err(interrupt)) => {
                    assert!(is_early && !is_abort, "{event}");
                    assert_eq!(interrupt.to_string(), "task cancelled: meddled");
                }
                Err(error) => {
                    assert!(is_early && is_abort, "{event}");
                    assert!(matches!(error, kernel::JoinError::Aborted), "{error}");
                }
            }
            let ends = diary
                .take()
                .into_iter()
                .filter(|line| line == "2 terminated");
            // What it ends itself, it is not told of, and no other observer is.
            assert_eq!(
                ends.count(),
                usize::from(!(is_abort && event == "created")),
                "{event}"
            );
            assert_eq!(
                kernel.turn(Some(std::time::Duration::ZERO)).unwrap().live,
                0
            );
        }
    }
}

/// Spawns a task for each that it sees.
struct Breeder(Rc<Cell<u32>>);

impl Activation for Breeder {
    fn created(&mut self, _: &TaskView<'_>) {
        let count = self.0.clone();
        if kernel::try_current_task().is_some() {
            spawn(async move { count.set(count.get() + 1) });
        }
    }
    fn suspended(&mut self, _: &TaskView<'_>, _: StepEnd) {
        assert!(kernel::try_current_task().is_none());
        let _ = kernel::now();
    }
}

#[test]
fn what_an_observer_spawns_runs_and_is_not_told() {
    let bred = Rc::new(Cell::new(0));
    let diary = Diary::default();
    let builder = virtual_builder().0.activation(diary.clone());
    let mut kernel = builder.activation(Breeder(bred.clone())).build().unwrap();
    kernel
        .run(async {
            spawn(async {});
            sleep(s(1)).await.unwrap();
        })
        .unwrap();
    assert_eq!(bred.get(), 1);
    let created: Vec<_> = diary
        .take()
        .into_iter()
        .filter(|line| line.ends_with("created"))
        .collect();
    assert_eq!(created, ["1 created", "2 created"]);
}

/// Tells the thread when the kernel is about to sleep.
struct IdleBell(std::sync::mpsc::Sender<Instant>);

impl Activation for IdleBell {
    fn idle(&mut self, kernel: &KernelView<'_>) {
        let _ = self.0.send(kernel.now());
        assert!(!kernel.tasks().is_empty());
    }
}

#[test]
fn an_observer_knows_when_the_kernel_goes_to_sleep_and_what_is_sent_from_there_on_wakes_it() {
    let (bell, idle) = std::sync::mpsc::channel();
    let mut kernel = Builder::new().activation(IdleBell(bell)).build().unwrap();
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    let thread = std::thread::spawn(move || {
        for n in 0..100 {
            idle.recv().unwrap();
            sender.unbounded_send(n).unwrap();
        }
        idle
    });
    let received = kernel.run(async { futures::StreamExt::collect::<Vec<_>>(receiver).await });
    assert_eq!(received.unwrap(), Vec::from_iter(0..100));
    // A kernel that has work does not sleep.
    let idle = thread.join().unwrap();
    while idle.try_recv().is_ok() {}
    kernel
        .run(async {
            for _ in 0..1000 {
                yield_now().await.unwrap();
            }
        })
        .unwrap();
    kernel.turn(Some(std::time::Duration::ZERO)).unwrap();
    assert!(idle.try_recv().is_err());
}

#[test]
fn an_observer_that_gives_work_to_a_kernel_about_to_sleep_keeps_it_awake() {
    struct Waker(Rc<Lot>, Rc<Cell<u32>>);
    impl Activation for Waker {
        fn idle(&mut self, _: &KernelView<'_>) {
            self.1.set(self.1.get() + 1);
            kernel::traps::sched_wake(&self.0, 1);
        }
    }
    let (lot, idle) = (Rc::new(Lot::new()), Rc::new(Cell::new(0)));
    let observer = Waker(lot.clone(), idle.clone());
    let mut kernel = Builder::new().activation(observer).build().unwrap();
    let remote = kernel.remote(); // else nothing could wake it, as far as it knows
    for round in 1..=3 {
        kernel
            .run(sched_wait(&lot, WaitKind::Event))
            .unwrap()
            .unwrap();
        assert_eq!(idle.get(), round);
    }
    drop(remote);
    let outcome = kernel.run(sched_wait(&lot, WaitKind::Event));
    assert!(
        matches!(outcome, Err(RunError::Deadlock(_))),
        "an observer is no reason to hope"
    );
}

#[test]
fn a_limited_turn_moves_a_virtual_clock_once_however_many_look_on() {
    let (builder, clock) = virtual_builder();
    let mut kernel = builder.activation(Diary::default()).build().unwrap();
    kernel.spawn(sleep(s(10)));
    kernel.turn(Some(s(1))).unwrap();
    kernel.turn(Some(s(1))).unwrap();
    assert_eq!(clock.elapsed(), s(1), "the first turn had something to run");
    kernel.turn(Some(s(1))).unwrap();
    assert_eq!(clock.elapsed(), s(2));
}

/// Accepts: curio/kernel/kernel_debug
#[test]
fn schedtrace_and_traptrace_log_steps_and_traps_of_the_tasks_that_are_wanted() {
    let trace = |builder: Builder| {
        lines_of(Level::Trace, || {
            let mut kernel = builder.build().unwrap();
            kernel
                .run(async {
                    let task = spawn(async {
                        sleep(s(1)).await.unwrap();
                        sched_wait(&Lot::new(), WaitKind::Lock).await.unwrap_err();
                    });
                    task.set_name("wanted");
                    current_task().set_name("unwanted");
                    sleep(s(2)).await.unwrap();
                    task.cancel().await.unwrap();
                })
                .unwrap();
        })
    };
    let lines = trace(virtual_builder().0.activation(schedtrace()));
    assert_eq!(lines.len(), 6, "{lines:?}");
    assert!(
        lines[0].starts_with("INFO kernel::debug runs: task 1 spawned at tests"),
        "{lines:?}"
    );
    assert!(
        lines[1].contains("runs: task 2 \"wanted\" spawned at "),
        "{lines:?}"
    );

    let lines = trace(
        virtual_builder()
            .0
            .activation(schedtrace().named(["wanted", "other"])),
    );
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(
        lines.iter().all(|line| line.contains("\"wanted\"")),
        "{lines:?}"
    );

    let only_main = |task: &TaskView<'_>| task.parent().is_none();
    let lines = trace(
        virtual_builder()
            .0
            .activation(schedtrace().filter(only_main)),
    );
    assert_eq!(lines.len(), 3, "{lines:?}");

    let lines = trace(
        virtual_builder()
            .0
            .activation(traptrace(&[]).level(Level::Trace)),
    );
    let ends: Vec<_> = lines
        .iter()
        .map(|line| line.rsplit_once(" waits for ").map_or("", |(_, end)| end))
        .collect();
    let kinds: Vec<_> = ends
        .iter()
        .map(|end| end.split(' ').next().unwrap())
        .collect();
    assert_eq!(
        kinds,
        ["Sleep", "Sleep", "Lock", "Join", "", ""],
        "{lines:?}"
    );
    assert!(ends[0].contains(file!()), "{lines:?}");
    assert!(
        lines[0].starts_with("TRACE kernel::debug trap: task 1 "),
        "{lines:?}"
    );
    assert!(lines[5].ends_with(" returned"), "{lines:?}");

    let lines = trace(virtual_builder().0.activation(traptrace(&[WaitKind::Lock])));
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("waits for Lock"), "{lines:?}");
}

#[test]
fn longblock_reports_steps_that_took_longer_than_the_limit() {
    let (builder, clock) = virtual_builder();
    let mut kernel = builder.activation(longblock(s(1))).build().unwrap();
    let lines = lines_of(Level::Warn, || {
        kernel
            .run(async {
                let hog = spawn(async move {
                    for seconds in [0, 1, 2] {
                        clock.advance(s(seconds));
                        sleep(s(5)).await.unwrap();
                    }
                });
                hog.set_name("hog");
                hog.join().await.unwrap();
            })
            .unwrap();
    });
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].starts_with("WARN kernel::debug task 2 \"hog\" spawned at "),
        "{lines:?}"
    );
    assert!(
        lines[0].ends_with(" ran for 2.000s without a break"),
        "{lines:?}"
    );
}

#[test]
fn logcrash_reports_a_panic_when_it_happens_though_it_is_joined_later() {
    let mut kernel = virtual_builder().0.activation(logcrash()).build().unwrap();
    let lines = lines_of(Level::Error, || {
        kernel
            .run(async {
                let task = spawn(async { panic!("crash {}", 7) });
                spawn(async {}).join().await.unwrap();
                let error = task.join().await.unwrap_err();
                assert_eq!(
                    error.to_string(),
                    "task panicked: crash 7",
                    "it is still there"
                );
            })
            .unwrap();
    });
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].starts_with("ERROR kernel::debug task 2 spawned at "),
        "{lines:?}"
    );
    assert!(lines[0].ends_with(" panicked: crash 7"), "{lines:?}");
}
