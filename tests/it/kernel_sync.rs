//! Queues, events and promises, locks and semaphores, conditions, workers and groups, on a virtual clock.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use std::{io, thread};

use kernel::net::Incomplete;
use kernel::sync::{
    BoundedSemaphore, Broken, Condition, Event, LifoQueue, Lock, PriorityQueue, Queue, QueueError,
    RLock, Semaphore, TooManyPermits, TryGetError, TryPutError, UniversalEvent, UniversalQueue,
    UniversalResult, promise,
};
use kernel::{
    Builder, GroupError, Interrupt, JoinError, MaybeInterrupt, PoolJob, RunError, TaskGroup,
    ThreadPool, VirtualClock, Wait, current_task, group, interruptible, run_in_thread, run_on,
    sleep, spawn, timeout_after, yield_now,
};

use crate::kernel_budget::{thread_id, wait_until_asleep};

/// Runs `main` on a clock that jumps.
fn run<T>(main: impl Future<Output = T>) -> T {
    let mut kernel = Builder::new().clock(VirtualClock::new()).build().unwrap();
    kernel.run(main).unwrap()
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// What happened, in order.
#[derive(Clone, Default)]
struct Log(Rc<RefCell<Vec<String>>>);

impl Log {
    fn add(&self, line: impl ToString) {
        self.0.borrow_mut().push(line.to_string());
    }

    #[track_caller]
    fn assert(&self, lines: &[&str]) {
        assert_eq!(*self.0.borrow(), lines);
    }
}

// ---- queues

/// Takes numbers until a negative one comes; `pause` is the work that one takes.
async fn consume(queue: Rc<Queue<i32>>, log: Log, label: &str, pause: Option<Duration>) {
    loop {
        let item = queue.get().await.unwrap();
        if item < 0 {
            break;
        }
        log.add(format!("{label} {item}"));
        if let Some(pause) = pause {
            sleep(pause).await.unwrap();
        }
        queue.task_done();
    }
    queue.task_done();
    log.add(format!("{label} done"));
}

/// Accepts: curio/queue/queue_simple
#[test]
fn two_getters_are_served_in_turn_and_join_waits_for_all_items() {
    let log = Log::default();
    run(async {
        let queue = Rc::new(Queue::new(None));
        spawn(consume(queue.clone(), log.clone(), "a", None));
        spawn(consume(queue.clone(), log.clone(), "b", None));
        sleep(ms(100)).await.unwrap();
        for n in 0..4 {
            queue.put(n).await.unwrap();
            sleep(ms(100)).await.unwrap();
        }
        for _ in 0..2 {
            queue.put(-1).await.unwrap();
        }
        log.add("join");
        queue.join().await.unwrap();
        log.add("joined");
    });
    log.assert(&[
        "a 0", "b 1", "a 2", "b 3", "join", "a done", "b done", "joined",
    ]);
}

/// Accepts: curio/queue/queue_unbounded
#[test]
fn putting_into_a_queue_without_limit_never_waits() {
    let log = Log::default();
    run(async {
        let queue = Rc::new(Queue::new(None));
        spawn(consume(queue.clone(), log.clone(), "a", None));
        sleep(ms(100)).await.unwrap();
        for n in [0, 1, 2, 3, -1] {
            queue.put(n).await.unwrap();
        }
        log.add("join");
        queue.join().await.unwrap();
        log.add("joined");
    });
    log.assert(&["join", "a 0", "a 1", "a 2", "a 3", "a done", "joined"]);
}

/// Accepts: curio/queue/queue_bounded
#[test]
fn a_full_queue_makes_putters_wait_and_interleaves_as_curios() {
    let log = Log::default();
    run(async {
        let queue = Rc::new(Queue::new(Some(2)));
        spawn(consume(queue.clone(), log.clone(), "a", Some(ms(100))));
        sleep(ms(100)).await.unwrap();
        for n in 0..4 {
            queue.put(n).await.unwrap();
            log.add(format!("put {n}"));
        }
        queue.put(-1).await.unwrap();
        log.add("join");
        queue.join().await.unwrap();
        log.add("joined");
    });
    log.assert(&[
        "put 0", "put 1", "a 0", "put 2", "a 1", "put 3", "a 2", "join", "a 3", "a done", "joined",
    ]);
}

/// Accepts: curio/queue/queue_get_cancel, curio/queue/queue_get_timeout, trap/sched_wait
#[test]
fn a_waiting_get_can_be_cancelled_and_timed_out_and_takes_nothing() {
    run(async {
        let queue = Rc::new(Queue::new(None));
        let getter = queue.clone();
        let task = spawn(async move { getter.get().await });
        sleep(ms(500)).await.unwrap();
        task.cancel().await.unwrap();
        let got = task.join().await.unwrap();
        assert_eq!(got, Err(QueueError::Interrupted(Interrupt::cancelled())));

        let late = timeout_after(ms(500), queue.get()).await;
        assert_eq!(late, Err(QueueError::Interrupted(Interrupt::TaskTimeout)));

        queue.try_put(7).unwrap();
        assert_eq!(
            queue.try_get(),
            Ok(7),
            "no waiter is left with a right to it"
        );
    });
}

/// Accepts: curio/queue/queue_put_cancel, curio/queue/queue_put_timeout
#[test]
fn a_waiting_put_can_be_cancelled_and_timed_out_and_keeps_its_item() {
    run(async {
        let queue = Rc::new(Queue::new(Some(1)));
        queue.put(0).await.unwrap();
        let putter = queue.clone();
        let task = spawn(async move { putter.put(1).await });
        sleep(ms(500)).await.unwrap();
        task.cancel().await.unwrap();
        let put = task.join().await.unwrap();
        assert_eq!(put, Err(QueueError::Interrupted(Interrupt::cancelled())));

        let mut put = queue.put(2);
        let late = timeout_after(ms(500), &mut put).await;
        assert_eq!(late, Err(QueueError::Interrupted(Interrupt::TaskTimeout)));
        assert_eq!(put.take_item(), Some(2));

        assert_eq!(queue.try_get(), Ok(0));
        assert_eq!(
            queue.try_put(3),
            Ok(()),
            "no waiter is left with a right to the room"
        );
    });
}

/// Accepts: curio/queue/queue_qsize, curio-defect/C10
#[test]
fn a_queue_knows_its_size_and_when_it_is_full() {
    let queue = Queue::new(Some(2));
    assert!(queue.is_empty() && !queue.is_full());
    queue.try_put('a').unwrap();
    queue.try_put('b').unwrap();
    assert_eq!(queue.len(), 2);
    assert!(queue.is_full());
    assert_eq!(queue.try_put('c'), Err(TryPutError::Full('c')));
    assert_eq!(queue.try_get(), Ok('a'));
    assert!(!queue.is_full());
    assert_eq!(queue.try_get(), Ok('b'));
    assert_eq!(queue.try_get(), Err(TryGetError::Empty));

    let unbounded = Queue::new(None);
    assert!((0..1000).all(|n| unbounded.try_put(n).is_ok() && !unbounded.is_full()));
}

/// Accepts: curio-defect/C10
#[test]
#[should_panic(expected = "task_done was called more often than items were put")]
fn more_items_done_than_put_is_an_error() {
    let queue = Queue::new(None);
    queue.try_put(1).unwrap();
    queue.task_done();
    queue.task_done();
}

/// Accepts: curio-defect/C11
#[test]
fn join_does_not_return_while_an_item_is_undone_that_slipped_in() {
    run(async {
        let queue = Rc::new(Queue::new(None));
        queue.try_put(1).unwrap();
        let joiner = queue.clone();
        let join = spawn(async move { joiner.join().await });
        yield_now().await.unwrap();
        queue.task_done();
        queue.try_put(2).unwrap();
        sleep(ms(1)).await.unwrap();
        assert!(!join.is_terminated());
        queue.task_done();
        join.join().await.unwrap().unwrap();
    });
}

/// Accepts: curio/queue/priority_queue
#[test]
fn a_priority_queue_gives_the_smallest_first() {
    run(async {
        let queue = PriorityQueue::ordered(None);
        for n in [3, 1, 4, 1, 5] {
            queue.put(n).await.unwrap();
        }
        for n in [1, 1, 3, 4, 5] {
            assert_eq!(queue.get().await, Ok(n));
        }
    });
}

/// Accepts: curio/queue/lifo_queue
#[test]
fn a_lifo_queue_gives_the_newest_first() {
    run(async {
        let queue = LifoQueue::ordered(None);
        for n in [1, 2, 3] {
            queue.put(n).await.unwrap();
        }
        for n in [3, 2, 1] {
            assert_eq!(queue.get().await, Ok(n));
        }
    });
}

#[test]
fn a_newcomer_does_not_overtake_a_woken_getter() {
    run(async {
        let queue = Rc::new(Queue::new(None));
        let getter = queue.clone();
        let first = spawn(async move { getter.get().await });
        yield_now().await.unwrap();
        queue.try_put(1).unwrap();
        assert_eq!(queue.try_get(), Err(TryGetError::Empty), "it is granted");
        assert_eq!(queue.len(), 1, "but it is still there");
        let late = spawn({
            let queue = queue.clone();
            async move { queue.get().await }
        });
        assert_eq!(first.join().await.unwrap(), Ok(1));
        queue.try_put(2).unwrap();
        assert_eq!(late.join().await.unwrap(), Ok(2));
    });
}

#[test]
fn a_newcomer_does_not_take_the_room_of_a_woken_putter() {
    run(async {
        let queue = Rc::new(Queue::new(Some(1)));
        queue.try_put(1).unwrap();
        let putter = queue.clone();
        let second = spawn(async move { putter.put(2).await });
        yield_now().await.unwrap();
        assert_eq!(queue.try_get(), Ok(1));
        assert_eq!(queue.try_put(3), Err(TryPutError::Full(3)));
        second.join().await.unwrap().unwrap();
        assert_eq!(queue.try_get(), Ok(2));
    });
}

/// A cancellation that comes after the item was granted does not lose it.
#[test]
fn a_getter_cancelled_after_its_wake_still_gets_the_item() {
    run(async {
        let queue = Rc::new(Queue::new(None));
        let getter = queue.clone();
        let task = spawn(async move { getter.get().await });
        yield_now().await.unwrap();
        queue.try_put(1).unwrap();
        task.cancel().await.unwrap();
        assert_eq!(task.join().await.unwrap(), Ok(1));
    });
}

#[test]
fn a_getter_dropped_after_its_wake_hands_the_item_to_the_next() {
    run(async {
        let queue = Rc::new(Queue::new(None));
        let tasks: Vec<_> = (0..3)
            .map(|_| {
                let getter = queue.clone();
                spawn(async move { getter.get().await })
            })
            .collect();
        yield_now().await.unwrap();
        queue.try_put(1).unwrap();
        tasks[0].abort();
        assert_eq!(
            queue.try_get(),
            Err(TryGetError::Empty),
            "it is the next one's"
        );
        assert_eq!(tasks[1].join().await.unwrap(), Ok(1));
        queue.try_put(2).unwrap();
        assert!(tasks[2].abort());
        assert_eq!(queue.try_get(), Ok(2), "with nobody waiting, anybody's");
    });
}

#[test]
fn a_putter_dropped_after_its_wake_hands_the_room_to_the_next() {
    run(async {
        let queue = Rc::new(Queue::new(Some(1)));
        queue.try_put(0).unwrap();
        let tasks: Vec<_> = (1..4)
            .map(|n| {
                let putter = queue.clone();
                spawn(async move { putter.put(n).await })
            })
            .collect();
        yield_now().await.unwrap();
        assert_eq!(queue.try_get(), Ok(0));
        tasks[0].abort();
        assert_eq!(queue.try_put(9), Err(TryPutError::Full(9)));
        assert_eq!(tasks[1].join().await.unwrap(), Ok(()));
        assert_eq!(queue.try_get(), Ok(2));
        tasks[2].abort();
        assert_eq!(queue.try_put(9), Ok(()), "with nobody waiting, anybody's");
    });
}

#[test]
fn waiters_dropped_before_their_wake_are_passed_over() {
    run(async {
        let queue = Rc::new(Queue::new(None));
        let tasks: Vec<_> = (0..2)
            .map(|_| {
                let getter = queue.clone();
                spawn(async move { getter.get().await })
            })
            .collect();
        yield_now().await.unwrap();
        tasks[0].abort();
        queue.try_put(1).unwrap();
        assert_eq!(tasks[1].join().await.unwrap(), Ok(1));
        queue.try_put(2).unwrap();
        assert_eq!(queue.try_get(), Ok(2));
    });
}

#[test]
fn a_closed_queue_takes_nothing_and_gives_what_it_has() {
    run(async {
        let queue = Rc::new(Queue::new(Some(1)));
        queue.try_put(1).unwrap();
        let putter = queue.clone();
        let put = spawn(async move { putter.put(2).await });
        yield_now().await.unwrap();
        queue.close();
        assert_eq!(put.join().await.unwrap(), Err(QueueError::Closed));
        assert_eq!(queue.put(3).await, Err(QueueError::Closed));
        assert_eq!(queue.try_put(3), Err(TryPutError::Closed(3)));
        assert_eq!(queue.get().await, Ok(1));
        assert_eq!(queue.get().await, Err(QueueError::Closed));
        assert_eq!(queue.try_get(), Err(TryGetError::Closed));
    });
}

/// The granted item of a getter that is dropped after the close is not lost, and nobody waits for ever.
#[test]
fn closing_tells_every_waiter_once_the_last_item_is_gone() {
    run(async {
        let queue = Rc::new(Queue::new(None));
        let get = || {
            let getter = queue.clone();
            spawn(async move { getter.get().await })
        };
        let (first, second) = (get(), get());
        yield_now().await.unwrap();
        queue.try_put(1).unwrap();
        queue.close();
        let third = get();
        yield_now().await.unwrap();
        assert_eq!(first.join().await.unwrap(), Ok(1));
        assert_eq!(second.join().await.unwrap(), Err(QueueError::Closed));
        assert_eq!(third.join().await.unwrap(), Err(QueueError::Closed));
    });
    run(async {
        let queue = Rc::new(Queue::new(None));
        let get = || {
            let getter = queue.clone();
            spawn(async move { getter.get().await })
        };
        let (first, second) = (get(), get());
        yield_now().await.unwrap();
        queue.try_put(1).unwrap();
        queue.close();
        first.abort();
        assert_eq!(second.join().await.unwrap(), Ok(1));
    });
}

/// Whatever is aborted, cancelled or overtaken: no item is lost or doubled, and nobody waits who need not.
#[test]
fn a_queue_loses_nothing_under_random_cancellation() {
    for seed in 0..500_u64 {
        run(random_traffic(seed));
    }
}

async fn random_traffic(seed: u64) {
    let mut state = seed;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let queue = Rc::new(Queue::new(Some(2)));
    let (put, got) = (Log::default(), Log::default());
    let (mut getters, mut putters) = (Vec::new(), Vec::new());
    for n in 0..100 {
        let (queue, put, got) = (queue.clone(), put.clone(), got.clone());
        match random(10) {
            0 | 1 => getters.push(spawn(async move {
                if let Ok(item) = queue.get().await {
                    got.add(item);
                }
            })),
            2 | 3 => putters.push(spawn(async move {
                if queue.put(n).await.is_ok() {
                    put.add(n);
                }
            })),
            kind @ 4..=7 => {
                let tasks = if kind % 2 == 0 { &getters } else { &putters };
                if let Some(task) = tasks.get(random(tasks.len().max(1))) {
                    if kind < 6 {
                        task.abort();
                    } else {
                        task.request_cancel("at random");
                    }
                }
            }
            8 => {
                if let Ok(item) = queue.try_get() {
                    got.add(item);
                } else if queue.try_put(n).is_ok() {
                    put.add(n);
                }
            }
            _ => yield_now().await.unwrap(),
        }
    }
    sleep(ms(1)).await.unwrap();
    let waits = |task: &kernel::Task<()>| !task.is_terminated();
    assert!(
        queue.is_empty() || !getters.iter().any(waits),
        "seed {seed}"
    );
    assert!(queue.is_full() || !putters.iter().any(waits), "seed {seed}");
    for task in putters {
        task.abort();
    }
    while let Ok(item) = queue.try_get() {
        got.add(item);
    }
    put.0.borrow_mut().sort();
    got.0.borrow_mut().sort();
    assert_eq!(put.0, got.0, "seed {seed}");
}

/// Every get of a backlog is ready at once, but the kernel's other tasks get their turn.
#[test]
fn a_task_that_never_waits_at_a_queue_lets_others_run() {
    run(async {
        let other = Rc::new(Cell::new(false));
        let seen = other.clone();
        spawn(async move { seen.set(true) });
        let queue = Queue::new(None);
        for n in 0..1000 {
            queue.try_put(n).unwrap();
        }
        queue.get().await.unwrap();
        assert!(!other.get(), "a single one is no schedule point");
        while !queue.is_empty() {
            queue.get().await.unwrap();
        }
        assert!(other.get());
    });
}

#[test]
fn a_queue_that_nobody_can_fill_is_a_deadlock_and_not_a_hang() {
    let mut kernel = Builder::new().clock(VirtualClock::new()).build().unwrap();
    let queue = Queue::<u8>::new(None);
    let outcome = kernel.run(queue.get());
    let Err(RunError::Deadlock(tasks)) = outcome else {
        panic!("{outcome:?}");
    };
    let (kind, at) = tasks[0].waits[0];
    assert_eq!(kind, kernel::WaitKind::QueueGet);
    assert_eq!(at.file(), file!(), "the dump names the line that awaits");
}

// ---- events and promises

/// Accepts: curio/sync/event_get_wait, trap/sched_wake
#[test]
fn an_event_wakes_all_who_wait_in_the_order_they_came() {
    let log = Log::default();
    run(async {
        let event = Rc::new(Event::new());
        for label in ["a", "b", "c"] {
            let (event, log) = (event.clone(), log.clone());
            spawn(async move {
                log.add(format!("{label} waits, {}", event.is_set()));
                event.wait().await.unwrap();
                log.add(format!("{label} goes on, {}", event.is_set()));
            });
        }
        sleep(ms(1000)).await.unwrap();
        log.add("set");
        event.set();
        sleep(ms(1000)).await.unwrap();
        event.clear();
        assert!(!event.is_set());
    });
    log.assert(&[
        "a waits, false",
        "b waits, false",
        "c waits, false",
        "set",
        "a goes on, true",
        "b goes on, true",
        "c goes on, true",
    ]);
}

/// Accepts: curio/sync/event_get_immediate
#[test]
fn waiting_for_a_set_event_does_not_let_others_run() {
    run(async {
        let event = Event::new();
        event.set();
        let ran = Rc::new(Cell::new(false));
        let task = spawn({
            let ran = ran.clone();
            async move { ran.set(true) }
        });
        event.wait().await.unwrap();
        assert!(!ran.get());
        task.join().await.unwrap();
    });
}

/// Accepts: curio/sync/event_wait_cancel, curio/sync/event_wait_timeout, curio/sync/event_wait_notimeout
#[test]
fn waiting_for_an_event_can_be_interrupted_and_a_timeout_that_did_not_fire_leaves_nothing() {
    run(async {
        let event = Rc::new(Event::new());
        let waiter = event.clone();
        let task = spawn(async move { waiter.wait().await });
        sleep(ms(1000)).await.unwrap();
        task.cancel().await.unwrap();
        assert_eq!(task.join().await.unwrap(), Err(Interrupt::cancelled()));

        let late = timeout_after(ms(500), event.wait()).await;
        assert_eq!(late, Err(Interrupt::TaskTimeout));

        let setter = event.clone();
        spawn(async move {
            sleep(ms(250)).await.unwrap();
            setter.set();
            sleep(ms(1000)).await.unwrap();
            setter.set();
        });
        timeout_after(ms(1000), event.wait()).await.unwrap();
        event.clear();
        event.wait().await.unwrap();
    });
}

#[test]
fn who_was_woken_goes_on_though_the_event_was_cleared() {
    run(async {
        let event = Rc::new(Event::new());
        let waiter = event.clone();
        let task = spawn(async move { waiter.wait().await });
        yield_now().await.unwrap();
        event.set();
        event.clear();
        task.join().await.unwrap().unwrap();
    });
}

/// Accepts: sweepea-defect/S9
#[test]
fn a_timeout_that_ran_out_behind_a_shield_is_delivered_at_the_next_wait() {
    run(async {
        let event = Event::new();
        let outcome = timeout_after(ms(100), async {
            kernel::shield(sleep(ms(500))).await?;
            event.wait().await
        })
        .await;
        assert_eq!(outcome, Err(Interrupt::TaskTimeout));
    });
}

/// Accepts: curio/sync/value, curio/sync/error
#[test]
fn a_promise_brings_a_value_or_an_error() {
    run(async {
        let (promise, mut promised) = promise::<Result<i32, String>>();
        spawn(async move {
            sleep(ms(100)).await.unwrap();
            promise.keep(Ok(42)).unwrap();
        });
        assert_eq!(promised.wait().await, Ok(Ok(42)));

        let (promise, mut promised) = kernel::sync::promise::<Result<i32, String>>();
        promise.keep(Err("no".into())).unwrap();
        assert_eq!(promised.wait().await, Ok(Err("no".into())));
    });
}

/// Accepts: sweepea-defect/S26
#[test]
fn a_promise_that_is_dropped_answers_whoever_waits() {
    run(async {
        let (promise, mut promised) = promise::<()>();
        let task = spawn(async move { promised.wait().await });
        yield_now().await.unwrap();
        assert!(promise.is_wanted());
        drop(promise);
        assert_eq!(task.join().await.unwrap(), Err(Broken::Promise));
    });
}

#[test]
fn an_interrupted_wait_for_a_promise_can_be_repeated_and_an_unwanted_value_comes_back() {
    run(async {
        let (promise, mut promised) = promise();
        let late = timeout_after(ms(10), promised.wait()).await;
        assert_eq!(late, Err(Broken::Interrupted(Interrupt::TaskTimeout)));
        promise.keep(1).unwrap();
        assert_eq!(promised.wait().await, Ok(1));

        let (promise, promised) = kernel::sync::promise();
        drop(promised);
        assert_eq!(promise.keep(2), Err(2));
    });
}

/// Accepts: curio/sync/uevent_get_wait, curio/sync/uevent_get_wait_timeout
#[test]
fn a_universal_event_joins_tasks_and_can_be_interrupted() {
    run(async {
        let event = UniversalEvent::new();
        let tasks = [spawn(event.wait()), spawn(event.wait())];
        yield_now().await.unwrap();
        assert!(!tasks[0].is_terminated());
        tasks[0].cancel().await.unwrap();
        assert_eq!(tasks[0].join().await.unwrap(), Err(Interrupt::cancelled()));
        event.set();
        event.clear();
        tasks[1].join().await.unwrap().unwrap();
        event.set();
        event.wait().await.unwrap();
    });
    // Real time: a virtual clock stands still while an answer from elsewhere may come.
    let event = UniversalEvent::new();
    kernel::run(async {
        let late = timeout_after(ms(1), event.wait()).await;
        assert_eq!(late, Err(Interrupt::TaskTimeout));
    })
    .unwrap();
}

/// Accepts: curio/sync/uevent_get_twait
#[test]
fn a_universal_event_joins_threads_and_kernels() {
    let (there, back) = (UniversalEvent::new(), UniversalEvent::new());
    let thread = std::thread::spawn({
        let (there, back) = (there.clone(), back.clone());
        move || {
            assert!(there.wait_blocking(None));
            back.set();
        }
    });
    kernel::run(async {
        let waiter = spawn(back.wait());
        yield_now().await.unwrap();
        there.set();
        waiter.join().await.unwrap().unwrap();
    })
    .unwrap();
    thread.join().unwrap();
    there.clear();
    assert!(!there.wait_blocking(Some(ms(1))));
}

// ---- locks and semaphores

/// Accepts: curio/sync/lock_sequence
#[test]
fn a_lock_is_handed_over_in_the_order_of_asking() {
    let log = Log::default();
    run(async {
        let lock = Rc::new(Lock::new(()));
        let tasks: Vec<_> = ["a", "b", "c"]
            .into_iter()
            .map(|label| {
                let (lock, log) = (lock.clone(), log.clone());
                spawn(async move {
                    log.add(format!("{label} asks, {}", lock.is_locked()));
                    let guard = lock.acquire().await.unwrap();
                    log.add(format!("{label} holds"));
                    sleep(ms(250)).await.unwrap();
                    drop(guard);
                    log.add(format!("{label} lets go, {}", lock.is_locked()));
                })
            })
            .collect();
        for task in tasks {
            task.join().await.unwrap();
        }
    });
    log.assert(&[
        "a asks, false",
        "a holds",
        "b asks, true",
        "c asks, true",
        "a lets go, true",
        "b holds",
        "b lets go, true",
        "c holds",
        "c lets go, false",
    ]);
}

/// Accepts: curio/sync/lock_acquire_cancel, curio/sync/lock_acquire_timeout
#[test]
fn waiting_for_a_lock_can_be_interrupted_and_leaves_nobody_in_line() {
    run(async {
        let lock = Rc::new(Lock::new(5));
        let guard = lock.acquire().await.unwrap();
        let waiter = lock.clone();
        let task = spawn(async move { waiter.acquire().await.map(|guard| *guard) });
        sleep(ms(1000)).await.unwrap();
        task.cancel().await.unwrap();
        assert_eq!(task.join().await.unwrap(), Err(Interrupt::cancelled()));
        let late = timeout_after(ms(500), lock.acquire()).await;
        assert_eq!(late.err(), Some(Interrupt::TaskTimeout));
        drop(guard);
        assert!(!lock.is_locked());
    });
}

#[test]
fn a_task_cancelled_after_the_hand_over_has_the_lock_and_a_dropped_one_hands_it_on() {
    run(async {
        let lock = Rc::new(Lock::new(Vec::new()));
        let tasks: Vec<_> = (0..3)
            .map(|n| {
                let lock = lock.clone();
                spawn(async move {
                    lock.acquire().await?.push(n);
                    Ok::<_, Interrupt>(())
                })
            })
            .collect();
        let guard = lock.acquire().await.unwrap();
        yield_now().await.unwrap();
        drop(guard);
        assert!(lock.is_locked(), "handed over, though the next has not run");
        assert!(lock.try_acquire().is_none());
        tasks[0].abort();
        assert!(lock.is_locked(), "handed on");
        tasks[1].request_cancel("too late");
        for task in &tasks[1..] {
            task.join().await.unwrap().unwrap();
        }
        assert_eq!(*lock.try_acquire().unwrap(), [1, 2]);
    });
}

/// Accepts: curio/sync/rlock_reenter
#[test]
fn a_task_takes_an_rlock_again_and_others_wait_until_it_has_let_go_of_all() {
    run(async {
        let lock = Rc::new(RLock::new());
        let outer = lock.acquire().await.unwrap();
        let inner = lock.acquire().await.unwrap();
        let other = lock.clone();
        let task = spawn(async move {
            let _first = other.acquire().await?;
            let _second = other.acquire().await?;
            Ok::<_, Interrupt>(())
        });
        yield_now().await.unwrap();
        drop(inner);
        sleep(ms(1)).await.unwrap();
        assert!(!task.is_terminated());
        drop(outer);
        // Handed over: the task that just let go is not its owner any more.
        let again = timeout_after(None, lock.acquire()).await.unwrap();
        assert!(task.is_terminated());
        drop(again);
        assert!(!lock.is_locked());
    });
}

#[test]
fn an_rlock_handed_to_a_dropped_waiter_is_free_again() {
    run(async {
        let lock = Rc::new(RLock::new());
        let guard = lock.acquire().await.unwrap();
        let other = lock.clone();
        let task = spawn(async move { other.acquire().await.map(|_| ()) });
        yield_now().await.unwrap();
        drop(guard);
        assert!(lock.is_locked());
        task.abort();
        assert!(!lock.is_locked());
    });
}

#[test]
fn a_wait_that_was_forgotten_with_its_kernel_takes_no_permit_along() {
    let semaphore = Semaphore::new(0);
    run(async {
        let mut wait = Box::pin(semaphore.acquire());
        assert!(futures::poll!(&mut wait).is_pending());
        std::mem::forget(wait);
    });
    semaphore.release();
    run(async { semaphore.acquire().await.unwrap().forget() });
}

async fn use_permit(semaphore: Rc<Semaphore>, log: Log, label: &str, millis: u64) {
    log.add(format!("{label} asks, {}", semaphore.is_locked()));
    let permit = semaphore.acquire().await.unwrap();
    log.add(format!("{label} has"));
    sleep(ms(millis)).await.unwrap();
    drop(permit);
    log.add(format!("{label} gives"));
}

/// Accepts: curio/sync/sema_sequence
#[test]
fn a_single_permit_goes_round_in_the_order_of_asking() {
    let log = Log::default();
    run(async {
        let semaphore = Rc::new(Semaphore::new(1));
        let tasks = ["a", "b", "c"]
            .map(|label| spawn(use_permit(semaphore.clone(), log.clone(), label, 250)));
        for task in tasks {
            task.join().await.unwrap();
        }
        assert_eq!(semaphore.value(), 1);
    });
    log.assert(&[
        "a asks, false",
        "a has",
        "b asks, true",
        "c asks, true",
        "a gives",
        "b has",
        "b gives",
        "c has",
        "c gives",
    ]);
}

/// Accepts: curio/sync/sema_sequence2
#[test]
fn two_permits_let_two_tasks_in() {
    let log = Log::default();
    run(async {
        let semaphore = Rc::new(Semaphore::new(2));
        let tasks = [("a", 250), ("b", 300), ("c", 350)].map(|(label, millis)| {
            spawn(use_permit(semaphore.clone(), log.clone(), label, millis))
        });
        for task in tasks {
            task.join().await.unwrap();
        }
    });
    log.assert(&[
        "a asks, false",
        "a has",
        "b asks, false",
        "b has",
        "c asks, true",
        "a gives",
        "c has",
        "b gives",
        "c gives",
    ]);
}

/// Accepts: curio/sync/sema_acquire_cancel, curio/sync/sema_acquire_timeout
#[test]
fn waiting_for_a_permit_can_be_interrupted_and_loses_none() {
    run(async {
        let semaphore = Rc::new(Semaphore::new(1));
        let permit = semaphore.acquire().await.unwrap();
        let waiter = semaphore.clone();
        let task = spawn(async move { waiter.acquire().await.map(|_| ()) });
        sleep(ms(1000)).await.unwrap();
        task.cancel().await.unwrap();
        assert_eq!(task.join().await.unwrap(), Err(Interrupt::cancelled()));
        let late = timeout_after(ms(500), semaphore.acquire()).await;
        assert_eq!(late.err(), Some(Interrupt::TaskTimeout));
        drop(permit);
        assert_eq!(semaphore.value(), 1);

        let permit = semaphore.acquire().await.unwrap();
        let waiter = semaphore.clone();
        let task = spawn(async move { waiter.acquire().await.map(|_| ()) });
        yield_now().await.unwrap();
        drop(permit);
        assert_eq!(semaphore.value(), 0, "granted");
        task.abort();
        assert_eq!(semaphore.value(), 1, "and given back");
    });
}

#[test]
fn permits_can_be_added_and_forgotten_but_a_bounded_semaphore_counts() {
    let semaphore = Semaphore::new(0);
    semaphore.release();
    semaphore.try_acquire().unwrap().forget();
    assert!(semaphore.is_locked());

    let bounded = BoundedSemaphore::new(1);
    assert_eq!(bounded.release(), Err(TooManyPermits { limit: 1 }));
    bounded.try_acquire().unwrap().forget();
    assert_eq!(bounded.release(), Ok(()));
}

// ---- conditions

/// Accepts: curio/sync/cond_sequence
#[test]
fn notifying_one_at_a_time_alternates_between_those_who_wait() {
    type Shared = Rc<(Lock<Vec<Option<i32>>>, Condition)>;
    async fn consumer(shared: Shared, log: Log, label: &str) {
        loop {
            let mut items = shared.0.acquire().await.unwrap();
            if items.is_empty() {
                log.add(format!("{label} waits"));
                shared.1.wait(&mut items).await.unwrap();
            }
            let Some(item) = items.remove(0) else { break };
            log.add(format!("{label} {item}"));
        }
        log.add(format!("{label} done"));
    }
    let log = Log::default();
    run(async {
        let shared = Shared::default();
        spawn(consumer(shared.clone(), log.clone(), "a"));
        spawn(consumer(shared.clone(), log.clone(), "b"));
        yield_now().await.unwrap();
        for item in [Some(0), Some(1), Some(2), Some(3), None, None] {
            let mut items = shared.0.acquire().await.unwrap();
            items.push(item);
            log.add(format!("add {item:?}"));
            shared.1.notify(1);
            drop(items);
            sleep(ms(100)).await.unwrap();
        }
    });
    log.assert(&[
        "a waits",
        "b waits",
        "add Some(0)",
        "a 0",
        "a waits",
        "add Some(1)",
        "b 1",
        "b waits",
        "add Some(2)",
        "a 2",
        "a waits",
        "add Some(3)",
        "b 3",
        "b waits",
        "add None",
        "a done",
        "add None",
        "b done",
    ]);
}

/// Accepts: curio/sync/cond_wait_cancel, curio/sync/cond_wait_timeout
#[test]
fn an_interrupted_wait_for_a_condition_takes_the_lock_again_first() {
    run(async {
        let lock = Rc::new(Lock::new(0));
        let condition = Rc::new(Condition::new());
        let task = spawn({
            let (lock, condition) = (lock.clone(), condition.clone());
            async move {
                let mut number = lock.acquire().await.unwrap();
                let outcome = condition.wait(&mut number).await;
                assert!(number.is_held());
                (outcome, *number)
            }
        });
        yield_now().await.unwrap();
        let mut number = lock.try_acquire().expect("the waiter has let go");
        task.request_cancel("enough");
        sleep(ms(100)).await.unwrap();
        assert!(!task.is_terminated(), "it waits for the lock");
        *number = 1;
        drop(number);
        let (outcome, number) = task.join().await.unwrap();
        assert!(matches!(outcome, Err(Interrupt::Cancelled(_))));
        assert_eq!(number, 1);

        let mut number = lock.acquire().await.unwrap();
        let late = timeout_after(ms(250), condition.wait(&mut number)).await;
        assert_eq!(late, Err(Interrupt::TaskTimeout));
        *number += 1;
        assert!(lock.is_locked());
    });
}

/// Accepts: curio/sync/cond_notify_all, curio-defect/C1
#[test]
fn notifying_more_than_wait_wakes_all() {
    run(async {
        let shared = Rc::new((Lock::new(()), Condition::new()));
        let wait = || {
            let shared = shared.clone();
            spawn(async move {
                let mut guard = shared.0.acquire().await?;
                shared.1.wait(&mut guard).await
            })
        };
        assert_eq!(shared.1.notify(1), 0);
        let tasks = [wait(), wait(), wait()];
        sleep(ms(100)).await.unwrap();
        assert_eq!(shared.1.notify(7), 3);
        for task in tasks {
            task.join().await.unwrap().unwrap();
        }
        let tasks = [wait(), wait(), wait()];
        sleep(ms(100)).await.unwrap();
        shared.1.notify_all();
        for task in tasks {
            task.join().await.unwrap().unwrap();
        }
    });
}

/// Accepts: curio/sync/cond_waitfor
#[test]
fn wait_for_goes_on_when_its_predicate_holds() {
    run(async {
        let shared = Rc::new((Lock::new(0), Condition::new()));
        let task = spawn({
            let shared = shared.clone();
            async move {
                let mut number = shared.0.acquire().await?;
                shared
                    .1
                    .wait_for(&mut number, |number| *number == 3)
                    .await?;
                Ok::<_, Interrupt>(*number)
            }
        });
        for _ in 0..5 {
            yield_now().await.unwrap();
            *shared.0.acquire().await.unwrap() += 1;
            shared.1.notify_all();
            yield_now().await.unwrap();
            yield_now().await.unwrap();
        }
        assert_eq!(task.join().await.unwrap(), Ok(3));
    });
}

#[test]
fn a_notification_is_handed_on_by_a_waiter_that_is_dropped_before_it_has_the_lock() {
    run(async {
        let shared = Rc::new((Lock::new(()), Condition::new()));
        let tasks: Vec<_> = (0..3)
            .map(|_| {
                let shared = shared.clone();
                spawn(async move {
                    let mut guard = shared.0.acquire().await?;
                    shared.1.wait(&mut guard).await
                })
            })
            .collect();
        sleep(ms(1)).await.unwrap();
        let guard = shared.0.acquire().await.unwrap();
        shared.1.notify(1);
        tasks[0].abort(); // woken, not polled
        yield_now().await.unwrap();
        tasks[1].abort(); // notified, waiting for the lock
        drop(guard);
        tasks[2].join().await.unwrap().unwrap();
        assert!(!shared.0.is_locked());
    });
}

#[test]
fn a_guard_whose_wait_was_dropped_says_that_it_has_no_lock() {
    run(async {
        let (lock, condition) = (Lock::new(1), Condition::new());
        let mut guard = lock.acquire().await.unwrap();
        kernel::drop_after(ms(5), condition.wait(&mut guard)).await;
        assert!(!guard.is_held());
        assert!(!lock.is_locked());
        drop(guard);
        assert_eq!(*lock.try_acquire().unwrap(), 1);
    });
}

// ---- workers

/// Accepts: trap/future_wait
#[test]
fn an_answer_from_another_thread_wakes_its_wait_and_a_late_one_wakes_no_other() {
    use kernel::traps::{Completer, future_wait};
    kernel::run(async {
        let stale: Rc<RefCell<Option<Completer>>> = Rc::default();
        let keep = stale.clone();
        let abandoned = future_wait(move |completer| *keep.borrow_mut() = Some(completer));
        assert!(kernel::drop_after(ms(1), abandoned).await.is_none());
        let late = stale.take().unwrap();
        let (sender, receiver) = mpsc::channel::<Completer>();
        let task = spawn(future_wait(move |completer| {
            sender.send(completer).unwrap()
        }));
        yield_now().await.unwrap();
        // The new wait stands where the abandoned one stood.
        let completer = receiver.recv().unwrap();
        std::thread::spawn(move || late.complete()).join().unwrap();
        sleep(ms(1)).await.unwrap();
        assert!(!task.is_terminated());
        std::thread::spawn(move || completer.complete());
        task.join().await.unwrap().unwrap();
    })
    .unwrap();
}

/// Accepts: curio/workers/blocking
#[test]
fn a_call_in_a_thread_leaves_the_kernel_to_the_other_tasks() {
    run(async {
        let (release, held) = mpsc::channel();
        let task = spawn(run_in_thread(move || held.recv().unwrap() + 1));
        for _ in 0..10 {
            yield_now().await.unwrap();
        }
        assert!(!task.is_terminated());
        release.send(41).unwrap();
        assert_eq!(task.join().await.unwrap(), Ok(42));
    });
}

/// Accepts: curio/workers/exception
#[test]
fn an_error_or_panic_of_a_call_in_a_thread_arrives_unchanged() {
    run(async {
        let failed = run_in_thread(|| "x".parse::<i32>()).await.unwrap();
        assert_eq!(failed, "x".parse::<i32>());
        let task = spawn(run_in_thread(|| std::panic::panic_any(17_u8)));
        let Err(kernel::JoinError::Panicked(payload)) = task.join().await else {
            panic!("the panic was lost");
        };
        assert_eq!(payload.into_payload().downcast_ref(), Some(&17_u8));
    });
}

/// Notes when it is dropped, and on which thread.
#[derive(Debug)]
struct Dropped(mpsc::Sender<std::thread::ThreadId>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.send(std::thread::current().id()).unwrap();
    }
}

/// Accepts: curio/workers/worker_cancel
#[test]
fn a_cancelled_caller_is_released_at_once_and_the_call_runs_on() {
    let (begun, has_begun) = mpsc::channel();
    let (release, held) = mpsc::channel::<()>();
    let (dropped, is_dropped) = mpsc::channel();
    let pool = ThreadPool::new(1);
    run(async {
        let task = spawn(pool.run(move || {
            begun.send(()).unwrap();
            held.recv().unwrap();
            Dropped(dropped)
        }));
        yield_now().await.unwrap();
        has_begun.recv().unwrap();
        task.cancel().await.unwrap();
        assert!(matches!(
            task.join().await.unwrap(),
            Err(Interrupt::Cancelled(_))
        ));
        // The place in the pool is free although the call still runs.
        assert_eq!(pool.threads(), 0);
        assert_eq!(pool.run(|| 5).await, Ok(5));
    });
    release.send(()).unwrap();
    let worker = is_dropped.recv().unwrap();
    assert_ne!(worker, std::thread::current().id());
}

/// Accepts: curio/workers/worker_timeout
#[test]
fn a_call_in_a_thread_can_be_timed_out() {
    // Real time: a virtual clock stands still while a thread is waited for.
    let (release, held) = mpsc::channel::<()>();
    kernel::run(async {
        let late = timeout_after(ms(5), run_in_thread(move || held.recv().is_ok())).await;
        assert_eq!(late, Err(Interrupt::TaskTimeout));
        drop(release);
    })
    .unwrap();
}

#[test]
fn a_call_that_was_abandoned_before_it_began_never_runs() {
    let ran = Arc::new(AtomicBool::new(false));
    let (release, held) = mpsc::channel();
    let pool = ThreadPool::new(1);
    run(async {
        let first = spawn(pool.run(move || held.recv().unwrap()));
        let note = ran.clone();
        let second = spawn(pool.run(move || note.store(true, Ordering::SeqCst)));
        yield_now().await.unwrap();
        second.cancel().await.unwrap();
        release.send(7).unwrap();
        assert_eq!(first.join().await.unwrap(), Ok(7));
        assert_eq!(pool.run(|| 8).await, Ok(8), "the thread went on past it");
    });
    assert!(!ran.load(Ordering::SeqCst));
}

#[test]
fn a_pending_cancellation_keeps_the_call_from_starting() {
    let ran = Arc::new(AtomicBool::new(false));
    run(async {
        let note = ran.clone();
        let task = spawn(run_in_thread(move || note.store(true, Ordering::SeqCst)));
        task.cancel().await.unwrap();
        assert_eq!(task.join().await.unwrap(), Err(Interrupt::cancelled()));
    });
    assert!(!ran.load(Ordering::SeqCst));
}

#[test]
fn a_pool_runs_as_many_calls_at_a_time_as_it_has_threads() {
    const SIZE: usize = 3;
    let pool = ThreadPool::new(SIZE);
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let barrier = Arc::new(std::sync::Barrier::new(SIZE));
    run(async {
        let tasks: Vec<_> = (0..SIZE * 5)
            .map(|_| {
                let (running, most, barrier) = (running.clone(), most.clone(), barrier.clone());
                spawn(pool.run(move || {
                    most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    barrier.wait(); // only goes on if `SIZE` calls run at once
                    running.fetch_sub(1, Ordering::SeqCst);
                }))
            })
            .collect();
        for task in tasks {
            task.join().await.unwrap().unwrap();
        }
    });
    assert_eq!(most.load(Ordering::SeqCst), SIZE);
    assert_eq!(pool.threads(), SIZE, "threads are kept");
}

/// A thread that comes to help short calls in vain takes a break, and answers to a sleeping kernel are told several at a time: neither may keep what is
/// behind a long call waiting for it.
#[test]
fn long_calls_among_short_ones_hold_up_neither_calls_nor_answers() {
    let pool = ThreadPool::new(4);
    kernel::run(async {
        let short: Vec<_> = (0..32)
            .map(|_| {
                let pool = pool.clone();
                spawn(async move {
                    for _ in 0..500 {
                        pool.run(|| ()).await.unwrap();
                    }
                })
            })
            .collect();
        for _ in 0..50 {
            let (releases, long): (Vec<_>, Vec<_>) = (0..3)
                .map(|_| {
                    let (release, held) = mpsc::channel::<()>();
                    (release, spawn(pool.run(move || held.recv().is_err())))
                })
                .unzip();
            // They end only after these, which the fourth thread makes.
            let behind: Vec<_> = (0..10).map(|n| spawn(pool.run(move || n))).collect();
            for (n, call) in behind.into_iter().enumerate() {
                assert_eq!(call.join().await.unwrap(), Ok(n));
            }
            drop(releases);
            for call in long {
                assert_eq!(call.join().await.unwrap(), Ok(true));
            }
        }
        for task in short {
            task.join().await.unwrap();
        }
    })
    .unwrap();
}

/// A pool that is not ours: tokio's for blocking calls.
fn foreign_pool() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(1)
        .build()
        .unwrap()
}

/// Accepts: curio-old/workers/executor
#[test]
fn a_call_on_a_foreign_pool_leaves_the_kernel_to_the_other_tasks() {
    let tokio = foreign_pool();
    run(async {
        let (release, held) = mpsc::channel();
        let pool = tokio.handle().clone();
        let submit = move |job: PoolJob| drop(pool.spawn_blocking(job));
        let task = spawn(run_on(submit, move || {
            (held.recv().unwrap() + 1, std::thread::current().id())
        }));
        for _ in 0..10 {
            yield_now().await.unwrap();
        }
        assert!(!task.is_terminated());
        release.send(41).unwrap();
        let (sum, thread) = task.join().await.unwrap().unwrap();
        assert_eq!(sum, 42);
        assert_ne!(thread, std::thread::current().id());
    });
}

#[test]
fn a_panic_on_a_foreign_pool_arrives_unchanged_and_the_pool_sees_nothing_of_it() {
    let tokio = foreign_pool();
    run(async {
        let (send_ended, ended) = mpsc::channel();
        let submit = |job: PoolJob| {
            let job = tokio.spawn_blocking(job);
            send_ended.send(job).unwrap();
        };
        let caught = AssertUnwindSafe(run_on(submit, || std::panic::panic_any(17_u8)));
        let payload = futures::FutureExt::catch_unwind(caught).await.unwrap_err();
        assert_eq!(payload.downcast_ref(), Some(&17_u8));
        tokio.block_on(ended.recv().unwrap()).unwrap();
    });
}

#[test]
fn an_abandoned_call_on_a_foreign_pool_does_not_begin_or_ends_there() {
    let (begun, has_begun) = mpsc::channel();
    let (release, held) = mpsc::channel::<()>();
    let (dropped, is_dropped) = mpsc::channel();
    let ran = Arc::new(AtomicBool::new(false));
    let tokio = foreign_pool();
    run(async {
        let pool = tokio.handle().clone();
        let running = spawn(run_on(
            move |job| drop(pool.spawn_blocking(job)),
            move || {
                begun.send(std::thread::current().id()).unwrap();
                held.recv().unwrap();
                Dropped(dropped)
            },
        ));
        let (pool, note) = (tokio.handle().clone(), ran.clone());
        let waiting = spawn(run_on(
            move |job| drop(pool.spawn_blocking(job)),
            move || note.store(true, Ordering::SeqCst),
        ));
        yield_now().await.unwrap();
        let thread = has_begun.recv().unwrap();
        running.cancel().await.unwrap();
        waiting.cancel().await.unwrap();
        assert_eq!(
            running.join().await.unwrap().unwrap_err(),
            Interrupt::cancelled()
        );
        assert_eq!(waiting.join().await.unwrap(), Err(Interrupt::cancelled()));
        release.send(()).unwrap();
        assert_eq!(is_dropped.recv(), Ok(thread));
    });
    drop(tokio); // waits for what it has
    assert!(!ran.load(Ordering::SeqCst));
}

#[test]
fn a_call_that_a_foreign_pool_drops_is_answered_with_a_cancellation() {
    run(async {
        let outcome = run_on(drop, || 1).await;
        let Err(Interrupt::Cancelled(reason)) = outcome else {
            panic!("{outcome:?}");
        };
        let text = "the pool dropped the call without making it";
        assert_eq!(reason.downcast_ref(), Some(&text));
    });
}

#[test]
fn a_pending_cancellation_keeps_a_job_from_a_foreign_pool() {
    let submitted = Rc::new(Cell::new(false));
    run(async {
        let note = submitted.clone();
        let task = spawn(run_on(move |_| note.set(true), || ()));
        task.cancel().await.unwrap();
        assert_eq!(task.join().await.unwrap(), Err(Interrupt::cancelled()));
    });
    assert!(!submitted.get());
}

/// Accepts: curio-defect/C5
#[test]
fn ten_thousand_answers_to_a_kernel_that_does_not_listen_block_no_thread() {
    const CALLS: usize = 10_000;
    let done = Arc::new(AtomicUsize::new(0));
    let pool = ThreadPool::new(2);
    let mut kernel = kernel::Kernel::new().unwrap();
    let tasks: Vec<_> = (0..CALLS)
        .map(|_| {
            let done = done.clone();
            kernel.spawn(pool.run(move || done.fetch_add(1, Ordering::SeqCst)))
        })
        .collect();
    kernel
        .run(async {
            yield_now().await.unwrap();
            while done.load(Ordering::SeqCst) < CALLS {
                std::thread::yield_now(); // the kernel stands still
            }
            let mut results = Vec::new();
            for task in tasks {
                results.push(task.join().await.unwrap().unwrap());
            }
            results.sort_unstable();
            assert!(results.into_iter().eq(0..CALLS));
        })
        .unwrap();
}

/// Kernels of three threads share a pool, and every third call is abandoned at some stage of its life. A wake that is
/// lost would leave a call, and with it this test, waiting for ever.
#[test]
fn a_pool_shared_by_several_kernels_leaves_no_call_behind() {
    let pool = ThreadPool::new(2);
    let calls = |pool: ThreadPool| {
        kernel::run(async move {
            for round in 0..200_usize {
                let tasks: Vec<_> = (0..10)
                    .map(|n| spawn(pool.run(move || round + n)))
                    .collect();
                yield_now().await.unwrap();
                for task in tasks.iter().step_by(3) {
                    task.abort();
                }
                for (n, task) in tasks.iter().enumerate() {
                    match task.join().await {
                        Ok(sum) => assert_eq!(sum, Ok(round + n)),
                        Err(error) => assert!(matches!(error, JoinError::Aborted) && n % 3 == 0),
                    }
                }
            }
        })
        .unwrap();
    };
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| calls(pool.clone()));
        }
    });
    assert!(pool.threads() <= pool.size());
}

// ---- task groups

type Group = TaskGroup<i32, Interrupt>;

/// A member that yields `value` after so long.
async fn after(millis: u64, value: i32) -> Result<i32, Interrupt> {
    sleep(ms(millis)).await?;
    Ok(value)
}

async fn fail(millis: u64) -> Result<i32, Interrupt> {
    sleep(ms(millis)).await?;
    Err(Interrupt::UncaughtTimeout)
}

/// Values as they are, cancellations as -1, other errors as -2.
fn plain(result: Result<i32, GroupError<Interrupt>>) -> i32 {
    match result {
        Ok(value) => value,
        Err(GroupError::Failed(Interrupt::Cancelled(_))) => -1,
        Err(_) => -2,
    }
}

fn values(outcome: kernel::Outcome<i32, Interrupt>) -> Vec<i32> {
    let results = outcome.results.into_iter();
    results.map(|(_, result)| plain(result)).collect()
}

/// Accepts: curio/task/task_group
#[test]
fn a_group_waits_for_all_and_gives_results_in_the_order_of_creation() {
    run(async {
        let mut group = Group::new(Wait::All);
        group.spawn(after(30, 1));
        let second = group.spawn(after(10, 2));
        group.spawn(after(20, 3));
        let outcome = group.join().await.unwrap();
        assert_eq!(outcome.completed, Some(second.id()), "the first that ended");
        assert_eq!(values(outcome), [1, 2, 3]);
    });
}

/// Accepts: curio/task/task_group_daemon, curio/task/task_group_daemon_error
#[test]
fn daemons_are_cancelled_at_the_end_and_may_fail() {
    run(async {
        let mut group = Group::new(Wait::All);
        let endless = group.spawn_daemon(after(1_000_000, 0));
        group.spawn_daemon(fail(1));
        group.spawn(after(10, 1));
        let outcome = group.join().await.unwrap();
        assert_eq!(values(outcome), [1]);
        assert!(endless.is_terminated() && endless.is_cancelled());
    });
}

/// Accepts: curio/task/task_group_existing
#[test]
fn a_group_adopts_tasks_that_run_and_tasks_that_have_ended() {
    run(async {
        let ended = spawn(after(0, 1));
        ended.wait().await.unwrap();
        let mut group = Group::new(Wait::All);
        group.adopt(spawn(after(20, 0)));
        group.adopt(ended);
        group.spawn(after(10, 2));
        group.adopt(spawn(after(30, 3)));
        assert_eq!(group.tasks().count(), 4);
        assert_eq!(values(group.join().await.unwrap()), [0, 1, 2, 3]);
    });
}

/// Accepts: curio/task/task_group_iter
#[test]
fn next_done_takes_members_out_in_the_order_of_their_ends() {
    run(async {
        let mut group = Group::new(Wait::All);
        group.spawn(after(30, 1));
        group.adopt(spawn(after(10, 2)));
        group.spawn_daemon(after(15, 9));
        group.spawn(after(20, 3));
        let mut ends = Vec::new();
        while let Some(done) = group.next_done().await.unwrap() {
            assert!(done.task.is_terminated());
            ends.push(plain(done.result));
        }
        assert_eq!(ends, [2, 3, 1]);
        assert_eq!(values(group.join().await.unwrap()), Vec::<i32>::new());
    });
}

/// Accepts: curio/task/task_group_error
#[test]
fn the_first_failure_cancels_the_rest() {
    run(async {
        let mut group = Group::new(Wait::All);
        group.spawn(after(10, 1));
        group.spawn(after(1_000_000, 2));
        let failed = group.spawn(fail(20));
        group.adopt(spawn(after(1_000_000, 4)));
        let outcome = group.join().await.unwrap();
        assert_eq!(outcome.completed, Some(failed.id()));
        assert!(matches!(
            outcome.first_error(),
            Some(GroupError::Failed(Interrupt::Cancelled(_)))
        ));
        assert_eq!(values(outcome), [1, -1, -2, -1]);
    });
    run(async {
        let mut group = Group::new(Wait::All);
        group.spawn(async { panic!("a member's own affair") });
        group.spawn(after(1_000_000, 2));
        let outcome = group.join().await.unwrap();
        let Some(Err(GroupError::Join(JoinError::Panicked(_)))) = outcome.into_completed() else {
            panic!("a panic is a failure");
        };
    });
}

/// Accepts: curio/task/task_group_error_block
#[test]
fn an_error_in_the_block_cancels_all_members_and_is_the_answer() {
    run(async {
        let mut members = Vec::new();
        let failed = group(Wait::All, async |group: &mut Group| {
            members.push(group.spawn(after(1_000_000, 1)));
            members.push(group.spawn(after(1_000_000, 2)));
            yield_now().await?;
            Err::<(), _>(Interrupt::UncaughtTimeout)
        })
        .await;
        assert_eq!(failed.err(), Some(Interrupt::UncaughtTimeout));
        assert!(
            members
                .iter()
                .all(|m| m.is_terminated() && m.is_cancelled())
        );
    });
}

/// Accepts: curio/task/task_group_join, curio/task/task_group_join_done
#[test]
fn a_member_joined_by_hand_is_no_business_of_the_group() {
    run(async {
        let mut group = Group::new(Wait::All);
        let failing = group.spawn(fail(10));
        group.spawn(after(20, 2));
        let task = group.release(&failing).unwrap();
        assert!(group.release(&failing).is_none());
        assert_eq!(task.join().await.unwrap(), Err(Interrupt::UncaughtTimeout));
        assert_eq!(values(group.join().await.unwrap()), [2]);
    });
}

/// Accepts: curio/task/task_group_cancel, curio/task/task_group_timeout
#[test]
fn an_interrupted_join_ends_the_members_first() {
    run(async {
        let members = Rc::new(RefCell::new(Vec::new()));
        let seen = members.clone();
        let owner = spawn(async move {
            let mut group = Group::new(Wait::All);
            for _ in 0..3 {
                let member = group.spawn(async {
                    let interrupted = sleep(ms(1_000_000)).await;
                    sleep(ms(10)).await.unwrap(); // cleaning up
                    interrupted.map(|_| 0)
                });
                seen.borrow_mut().push(member);
            }
            group.join().await.map(values)
        });
        sleep(ms(100)).await.unwrap();
        owner.cancel().await.unwrap();
        assert!(members.borrow().iter().all(|member| member.is_terminated()));
        assert_eq!(owner.join().await.unwrap(), Err(Interrupt::cancelled()));

        let mut group = Group::new(Wait::All);
        let member = group.spawn(after(1_000_000, 0));
        let late = timeout_after(ms(250), group.join()).await;
        assert_eq!(late.err(), Some(Interrupt::TaskTimeout));
        assert!(member.is_terminated() && member.is_cancelled());
    });
}

#[test]
fn a_join_interrupted_while_it_ends_the_members_answers_the_interrupt() {
    run(async {
        let mut group = Group::new(Wait::Any);
        group.spawn(async { Ok(1) });
        let slow = group.spawn(kernel::shield(after(1_000, 2)));
        let late = timeout_after(ms(250), group.join()).await;
        assert_eq!(late.err(), Some(Interrupt::TaskTimeout));
        assert!(!slow.is_terminated() && slow.is_cancelled());
    });
}

/// Accepts: curio/task/task_group_cancel_remaining
#[test]
fn cancel_remaining_ends_those_that_run_and_keeps_what_has_ended() {
    run(async {
        let mut group = Group::new(Wait::All);
        group.cancel_remaining().await.unwrap();
        group.spawn(after(10, 1));
        group.spawn(after(10, 2));
        let running = group.spawn(after(1_000_000, 3));
        let daemon = group.spawn_daemon(after(1_000_000, 4));
        let done = group.next_done().await.unwrap().unwrap();
        assert_eq!(plain(done.result), 1);
        group.cancel_remaining().await.unwrap();
        assert!(running.is_terminated() && running.is_cancelled());
        assert!(!daemon.is_terminated());
        assert_eq!(values(group.join().await.unwrap()), [2]);
    });
}

/// Accepts: curio/task/task_group_empty
#[test]
fn an_empty_group_ends_at_once_with_nothing() {
    run(async {
        let mut group = Group::new(Wait::All);
        assert!(group.next_done().await.unwrap().is_none());
        let outcome = group.join().await.unwrap();
        assert!(outcome.first_error().is_none() && outcome.results.is_empty());
        assert!(outcome.into_completed().is_none());
    });
}

/// Accepts: curio/task/task_group_result, curio/task/task_any_cancel, curio/task/task_any_error, curio/task/task_wait_none
#[test]
fn a_group_may_wait_for_any_for_the_first_fit_or_for_none() {
    run(async {
        let mut any = Group::new(Wait::Any);
        any.spawn(after(20, 1));
        any.spawn(after(10, 2));
        let outcome = any.join().await.unwrap();
        assert_eq!(plain(outcome.into_completed().unwrap()), 2);

        let mut any = Group::new(Wait::Any);
        any.spawn(after(20, 1));
        any.spawn(fail(10));
        let outcome = any.join().await.unwrap();
        assert_eq!(values(outcome), [-1, -2]);

        let mut fit = Group::new(Wait::First(|value| *value > 10));
        fit.spawn(after(10, 1));
        fit.spawn(after(30, 13));
        fit.spawn(after(20, 12));
        let outcome = fit.join().await.unwrap();
        assert_eq!(plain(outcome.into_completed().unwrap()), 12);

        let mut none = Group::new(Wait::None);
        none.spawn(after(10, 1));
        assert_eq!(values(none.join().await.unwrap()), [-1]);
    });
}

/// Work for each end that grew with the number of members would make this test last for minutes.
#[test]
fn a_group_of_a_hundred_thousand_hears_of_each_end_by_itself() {
    const MEMBERS: u64 = 100_000;
    run(async {
        let mut group = Group::new(Wait::All);
        for n in 0..MEMBERS {
            group.spawn(after(n % 1000, 1));
        }
        let sum: i32 = values(group.join().await.unwrap()).into_iter().sum();
        assert_eq!(sum, MEMBERS as i32);
    });
}

#[test]
fn a_dropped_group_cancels_its_members() {
    run(async {
        let mut group = Group::new(Wait::All);
        let member = group.spawn(after(1_000_000, 1));
        yield_now().await.unwrap();
        drop(group);
        assert!(!member.is_terminated(), "nobody can wait for it here");
        member.wait().await.unwrap();
        assert!(member.is_cancelled());
    });
}

/// A wait for members that lost a race leaves nothing behind that an interrupt could hit.
#[test]
fn next_done_can_lose_a_race_and_be_called_again() {
    run(async {
        let mut group = Group::new(Wait::All);
        group.adopt(spawn(after(100, 1)));
        group.spawn(after(200, 2));
        let early = kernel::drop_after(ms(10), interruptible(group.next_done())).await;
        assert!(early.is_none());
        let late = timeout_after(ms(10), group.next_done()).await;
        assert_eq!(late.err(), Some(Interrupt::TaskTimeout));
        assert_eq!(plain(group.next_done().await.unwrap().unwrap().result), 1);
        assert_eq!(plain(group.next_done().await.unwrap().unwrap().result), 2);
    });
}

// ---- what is easily forgotten

#[test]
fn queues_say_whether_they_are_empty_closed_or_have_items() {
    run(async {
        let queue = Queue::new(None);
        assert!(queue.is_empty());
        queue.try_put('a').unwrap();
        queue.try_put('b').unwrap();
        assert!(!queue.is_empty());
        assert!(!queue.is_empty());
        let sorted = PriorityQueue::ordered(Some(3));
        sorted.try_put(1).unwrap();
        sorted.try_put(2).unwrap();
        assert_eq!((sorted.len(), sorted.is_full()), (2, false));
        assert_eq!(sorted.try_get(), Ok(1));
        assert_eq!((sorted.len(), sorted.is_empty()), (1, false));

        let queue = UniversalQueue::new(None);
        assert!(queue.is_empty() && !queue.is_closed());
        queue.try_put('a').unwrap();
        assert!(!queue.is_empty() && !queue.is_closed());
        queue.close();
        assert!(!queue.is_empty() && queue.is_closed());
        assert_eq!(queue.clone().try_get(), Ok('a'));
        assert!(queue.is_empty() && queue.is_closed());
    });
}

#[test]
fn every_task_that_joins_a_queue_goes_on_when_all_is_done() {
    run(async {
        let queue = Rc::new(Queue::new(None));
        queue.try_put(()).unwrap();
        queue.try_get().unwrap();
        let joiners = [(); 3].map(|()| {
            let queue = Rc::clone(&queue);
            spawn(async move { queue.join().await })
        });
        sleep(ms(1)).await.unwrap();
        queue.task_done();
        for joiner in joiners {
            joiner.join().await.unwrap().unwrap();
        }
    });
}

#[test]
fn every_task_that_waits_at_a_queue_is_told_that_it_was_closed() {
    run(async {
        let (full, empty) = (
            Rc::new(Queue::new(Some(1))),
            Rc::new(Queue::<i32>::new(None)),
        );
        full.try_put(0).unwrap();
        let putters = [1, 2].map(|item| {
            let full = Rc::clone(&full);
            spawn(async move { full.put(item).await })
        });
        let getters = [(); 2].map(|()| {
            let empty = Rc::clone(&empty);
            spawn(async move { empty.get().await })
        });
        sleep(ms(1)).await.unwrap();
        full.close();
        empty.close();
        for putter in putters {
            assert_eq!(putter.join().await.unwrap(), Err(QueueError::Closed));
        }
        for getter in getters {
            assert_eq!(getter.join().await.unwrap(), Err(QueueError::Closed));
        }
    });
}

#[test]
fn a_newcomer_does_not_take_the_room_in_a_universal_queue_of_a_woken_putter() {
    run(async {
        let queue = UniversalQueue::new(Some(2));
        queue.try_put(0).unwrap();
        queue.try_put(1).unwrap();
        let putter = spawn(queue.put(2));
        sleep(ms(1)).await.unwrap();
        assert_eq!(queue.try_get(), Ok(0));
        assert!(queue.try_put(3).is_err());
        putter.join().await.unwrap().unwrap();
        assert_eq!((queue.try_get(), queue.try_get()), (Ok(1), Ok(2)));
    });
}

#[test]
fn a_putter_to_a_universal_queue_that_goes_after_its_wake_hands_the_room_to_the_next() {
    run(async {
        let queue = UniversalQueue::new(Some(1));
        queue.try_put(0).unwrap();
        let first = spawn(queue.put(1));
        let second = spawn(queue.put(2));
        sleep(ms(1)).await.unwrap();
        assert_eq!(queue.try_get(), Ok(0));
        first.abort();
        second.join().await.unwrap().unwrap();
        assert_eq!(queue.try_get(), Ok(2));
    });
}

#[test]
fn a_universal_queue_with_items_lets_others_run_and_is_no_cancellation_point() {
    run(async {
        let queue = UniversalQueue::new(None);
        for item in 0..1000 {
            queue.try_put(item).unwrap();
        }
        let turns = Rc::new(Cell::new(0));
        let others = Rc::clone(&turns);
        let other = spawn(async move {
            while yield_now().await.is_ok() {
                others.set(others.get() + 1);
            }
        });
        let getter = spawn(async move {
            current_task().request_cancel("late");
            for item in 0..1000 {
                assert_eq!(queue.get().await, Ok(item));
            }
            yield_now().await.unwrap_err();
        });
        getter.join().await.unwrap();
        let turns = turns.get();
        assert!((2..100).contains(&turns), "{turns}");
        other.cancel().await.unwrap();
    });
}

#[test]
fn waits_for_the_work_of_a_queue_and_for_a_predicate_can_be_interrupted() {
    run(async {
        let queue = Queue::new(None);
        queue.try_put(()).unwrap();
        let late = timeout_after(ms(1), queue.join()).await;
        assert_eq!(late, Err(Interrupt::TaskTimeout));
        let (lock, condition) = (Lock::new(0), Condition::new());
        let mut guard = lock.acquire().await.unwrap();
        let late = timeout_after(ms(1), condition.wait_for(&mut guard, |n| *n > 0)).await;
        assert_eq!(late, Err(Interrupt::TaskTimeout));
    });
}

#[test]
fn a_promised_value_can_be_taken_without_waiting() {
    run(async {
        let (promise, mut promised) = promise();
        assert_eq!(promised.try_take(), None);
        promise.keep(7).unwrap();
        assert_eq!(promised.try_take(), Some(7));
        assert_eq!(promised.try_take(), None);
        assert_eq!(promised.wait().await, Err(Broken::Promise));
    });
}

#[test]
fn errors_of_waits_tell_the_interrupt_inside_also_when_boxed() {
    let interrupt = || Interrupt::TaskTimeout;
    assert_eq!(Broken::from(interrupt()).interrupt(), Some(&interrupt()));
    assert_eq!(Broken::Promise.interrupt(), None);
    assert_eq!(JoinError::from(interrupt()).interrupt(), Some(&interrupt()));
    assert_eq!(JoinError::Aborted.interrupt(), None);
    let plain: Box<dyn Error> = Box::new(Broken::from(interrupt()));
    assert_eq!(plain.interrupt(), Some(&interrupt()));
    let shared: Box<dyn Error + Send + Sync> = Box::new(Broken::from(interrupt()));
    assert_eq!(shared.interrupt(), Some(&interrupt()));
    let incomplete = Incomplete::from(interrupt());
    assert_eq!(
        (incomplete.done, incomplete.interrupt()),
        (0, Some(&interrupt()))
    );
}

#[test]
fn a_task_that_waits_for_a_universal_result_is_not_polled_until_it_is_there() {
    run(async {
        let result = UniversalResult::new();
        assert!(!result.is_set());
        let waiting = spawn(result.wait());
        sleep(ms(1)).await.unwrap();
        let before = waiting.cycles();
        for _ in 0..10 {
            sleep(ms(1)).await.unwrap();
        }
        assert_eq!(waiting.cycles(), before);
        result.set(7).unwrap();
        assert!(result.is_set());
        assert_eq!(waiting.join().await.unwrap(), Ok(7));
    });
}

#[test]
fn a_thread_waits_for_as_long_as_it_said_and_no_longer_than_it_must() {
    let (long, began) = (Duration::from_secs(60), Instant::now());
    let result = UniversalResult::new();
    let setter = {
        let (waiter, result) = (thread_id(), result.clone());
        thread::spawn(move || {
            wait_until_asleep(&waiter);
            result.set(7).unwrap();
        })
    };
    assert_eq!(result.wait_blocking(Some(long)), Some(7));
    assert!(began.elapsed() < long, "nobody told it");
    setter.join().unwrap();
    let began = Instant::now();
    let none = UniversalQueue::<i32>::new(None).get_blocking(Some(ms(20)));
    assert_eq!(none, Err(TryGetError::Empty));
    assert!(began.elapsed() >= ms(20));
}

#[test]
fn what_nobody_waits_for_may_panic_when_it_is_dropped_and_the_pool_sees_nothing_of_it() {
    /// Panics when dropped, with another one, as often as it says.
    struct Grudge(u32);
    impl Drop for Grudge {
        fn drop(&mut self) {
            if self.0 > 0 {
                std::panic::panic_any(Self(self.0 - 1));
            }
        }
    }
    run(async {
        let (submit, jobs) = mpsc::channel::<PoolJob>();
        let (begun, begins) = mpsc::channel();
        let (may_end, ends) = mpsc::channel::<()>();
        let caller = spawn(async move {
            let call = move || {
                begun.send(()).unwrap();
                ends.recv().unwrap();
                Grudge(2)
            };
            run_on(|job| submit.send(job).unwrap(), call)
                .await
                .map(drop)
        });
        yield_now().await.unwrap();
        let job = jobs.recv().unwrap();
        let pool = thread::spawn(job);
        begins.recv().unwrap();
        caller.cancel().await.unwrap();
        may_end.send(()).unwrap();
        assert!(pool.join().is_ok());
    });
}

// group
#[test]
fn daemons_are_cancelled_when_the_other_members_have_ended() {
    run(async {
        let log = Rc::new(RefCell::new(Vec::new()));
        let mut group = TaskGroup::<(), Interrupt>::new(Wait::None);
        let until_cancelled = |name: &'static str| {
            let log = Rc::clone(&log);
            async move {
                let told = sleep(ms(1000)).await;
                log.borrow_mut().push(name);
                sleep(ms(1)).await?;
                log.borrow_mut().push(name);
                told.map(drop)
            }
        };
        group.spawn_daemon(until_cancelled("daemon"));
        group.spawn(until_cancelled("member"));
        sleep(ms(1)).await.unwrap();
        group.join().await.unwrap();
        assert_eq!(*log.borrow(), ["member", "member", "daemon", "daemon"]);
    });
}

#[test]
fn an_interrupt_while_a_failed_block_ends_its_members_is_the_answer() {
    run(async {
        let failed = spawn(group(
            Wait::All,
            async |group: &mut TaskGroup<(), Interrupt>| {
                group.spawn(async {
                    sleep(ms(1000)).await.unwrap_err();
                    sleep(ms(10)).await.map(drop)
                });
                yield_now().await?;
                Err::<(), _>(io::Error::other("the body's"))
            },
        ));
        sleep(ms(1)).await.unwrap();
        failed.cancel().await.unwrap();
        let error = failed.join().await.unwrap().map(drop).unwrap_err();
        assert_eq!(error.interrupt(), Some(&Interrupt::cancelled()), "{error}");
    });
}

#[test]
fn a_daemon_that_has_ended_is_no_member_any_more() {
    run(async {
        let mut group = TaskGroup::<(), Interrupt>::new(Wait::All);
        let daemon = group.spawn_daemon(async { Ok(()) });
        group.spawn(async { sleep(ms(1000)).await.map(drop) });
        assert!(group.next_done().await.unwrap().is_some());
        assert!(group.release(&daemon).is_none());
        group.join().await.unwrap();
    });
}
