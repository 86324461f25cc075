//! The task tree, and the places that it names.

use std::rc::Rc;

use kernel::signal::{SIGVTALRM, SignalEvent};
use kernel::sync::{Condition, Event, Lock, Queue, RLock, Semaphore};
use kernel::{
    Interrupt, RunError, TaskGroup, TaskTree, Wait, WaitKind, group, sleep, spawn, tasks, yield_now,
};

use super::{s, virtual_builder};

fn run<T>(main: impl Future<Output = T>) -> T {
    virtual_builder().0.build().unwrap().run(main).unwrap()
}

#[test]
fn the_tree_prints_each_task_under_the_one_that_spawned_it() {
    run(async {
        let family = spawn(async {
            let child = spawn(async {
                spawn(sleep(s(9))).set_name("grandchild");
                yield_now().await?;
                sleep(s(9)).await
            });
            child.set_name("child");
            spawn(sleep(s(9))).set_name("sister");
            sleep(s(1)).await
        });
        family.set_name("parent");
        yield_now().await.unwrap();
        yield_now().await.unwrap();
        let shape = |text: &str| -> Vec<String> {
            let lines = text.lines();
            lines
                .map(|line| line.split('"').take(2).collect::<Vec<_>>().join(""))
                .collect()
        };
        let tree = TaskTree(&tasks()).to_string();
        let main = tree.lines().next().unwrap();
        assert!(main.starts_with("task 1 Running spawned at "), "{tree}");
        assert_eq!(
            shape(&tree)[1..],
            [
                "  task 2 parent",
                "    task 3 child",
                "      task 5 grandchild",
                "    task 4 sister"
            ],
            "{tree}"
        );
        assert!(
            tree.contains(" waits for Sleep at tests/it/kernel_debug/tree.rs:"),
            "{tree}"
        );
        assert!(tree.contains(" cycles"), "{tree}");
        // Orphans move to the left.
        family.wait().await.unwrap();
        let tree = TaskTree(&tasks()).to_string();
        assert_eq!(
            shape(&tree)[1..],
            ["task 3 child", "  task 5 grandchild", "task 4 sister"],
            "{tree}"
        );
    });
}

#[test]
fn a_deadlock_carries_the_tree() {
    let outcome = virtual_builder().0.build().unwrap().run(async {
        let lot = std::rc::Rc::new(kernel::traps::Lot::new());
        let stuck = lot.clone();
        let child =
            spawn(async move { kernel::traps::sched_wait(&stuck, kernel::WaitKind::Lock).await });
        child.set_name("stuck");
        child.wait().await
    });
    let Err(error @ RunError::Deadlock(_)) = outcome else {
        panic!("{outcome:?}");
    };
    let text = error.to_string();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("deadlock"), "{text}");
    assert!(
        lines[1].starts_with("task 1 waits for Join at tests"),
        "{text}"
    );
    assert!(
        lines[2].starts_with("  task 2 \"stuck\" waits for Lock at tests"),
        "{text}"
    );
}

#[test]
fn a_chain_of_many_thousand_tasks_prints_in_short_lines() {
    fn chain(depth: u32) -> std::pin::Pin<Box<dyn Future<Output = Result<(), Interrupt>>>> {
        Box::pin(async move {
            if depth > 0 {
                spawn(chain(depth - 1));
            }
            sleep(s(9)).await.map(drop)
        })
    }
    run(async {
        spawn(chain(20_000));
        sleep(s(1)).await.unwrap();
        let tasks = tasks();
        let tree = TaskTree(&tasks).to_string();
        assert_eq!(tree.lines().count(), 20_002);
        assert!(tree.lines().all(|line| line.len() < 400));
    });
}

/// Where the only wait of the task is.
fn line_of(task: &kernel::TaskRef) -> (String, u32) {
    let waits = task.info().unwrap().waits;
    assert!(!waits.is_empty());
    let at = waits[0].1;
    assert!(waits.iter().all(|wait| wait.1 == at), "{waits:?}");
    (at.file().to_owned(), at.line())
}

#[test]
fn whoever_waits_for_a_group_waits_at_his_own_line() {
    run(async {
        let here = |line| (file!().to_owned(), line);
        let fill = |group: &mut TaskGroup<_, Interrupt>| {
            group.spawn(async { sleep(s(9)).await });
            group.adopt(spawn(async { sleep(s(9)).await }));
        };
        let task = spawn(async move {
            let mut group = TaskGroup::new(Wait::All);
            fill(&mut group);
            group.next_done().await.map(drop)
        });
        let next_done = line!() - 2;
        yield_now().await.unwrap();
        assert_eq!(line_of(&task), here(next_done));

        let task = spawn(async move {
            let mut group = TaskGroup::new(Wait::All);
            fill(&mut group);
            group.join().await.map(drop)
        });
        let join = line!() - 2;
        yield_now().await.unwrap();
        assert_eq!(line_of(&task), here(join));

        let block = line!() + 2;
        let task = spawn(async move {
            let joined = group(Wait::All, async |group| {
                fill(group);
                Ok::<_, Interrupt>(())
            });
            joined.await.map(drop)
        });
        yield_now().await.unwrap();
        assert_eq!(line_of(&task), here(block));

        // Members that take their time to end.
        let slow = |group: &mut TaskGroup<_, Interrupt>| {
            group.spawn(async {
                yield_now().await?;
                sleep(s(9)).await.unwrap_err();
                sleep(s(9)).await
            });
        };
        let task = spawn(async move {
            let mut group = TaskGroup::new(Wait::All);
            slow(&mut group);
            sleep(s(1)).await?;
            group.cancel_remaining().await
        });
        let cancel = line!() - 2;
        sleep(s(2)).await.unwrap();
        assert_eq!(line_of(&task), here(cancel));
    });
}

/// What tasks wait for that wait for one another.
struct Sync {
    lock: Lock<()>,
    rlock: RLock,
    semaphore: Semaphore,
    condition: Condition,
    event: Event,
    empty: Queue<i32>,
    full: Queue<i32>,
}

#[test]
fn a_wait_is_shown_as_what_it_is() {
    run(async {
        let sync = Rc::new(Sync {
            lock: Lock::new(()),
            rlock: RLock::new(),
            semaphore: Semaphore::new(0),
            condition: Condition::new(),
            event: Event::new(),
            empty: Queue::new(None),
            full: Queue::new(Some(1)),
        });
        let _held = sync.lock.acquire().await.unwrap();
        let _held_too = sync.rlock.acquire().await.unwrap();
        sync.full.try_put(0).unwrap();
        macro_rules! tasks {
            ($sync:ident: $($kind:ident in $wait:expr),* $(,)?) => {
                [$((WaitKind::$kind, spawn({
                    let $sync = Rc::clone(&sync);
                    async move { let _ = (&$sync, $wait.await); }
                }))),*]
            };
        }
        let waits = tasks!(at:
            Lock in at.lock.acquire(),
            Lock in at.rlock.acquire(),
            Semaphore in at.semaphore.acquire(),
            Condition in at.condition.wait(&mut Lock::new(()).acquire().await.unwrap()),
            Event in at.event.wait(),
            Event in SignalEvent::new(&[SIGVTALRM]).unwrap().wait(),
            QueueGet in at.empty.get(),
            QueuePut in at.full.put(1),
            QueueJoin in at.full.join(),
        );
        sleep(s(1)).await.unwrap();
        for (kind, task) in waits {
            assert_eq!(task.info().unwrap().waits[0].0, kind, "{task:?}");
            task.abort();
        }
    });
}
