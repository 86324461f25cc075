//! Queues, events and promises, locks and semaphores, conditions, workers and groups, on a virtual clock.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use kernel::sync::{
    Broken, Event, LifoQueue, PriorityQueue, Queue, QueueError, TryGetError, TryPutError, promise,
};
use kernel::{
    Builder, Interrupt, RunError, ThreadPool, VirtualClock, run_in_thread, sleep, spawn,
    timeout_after, yield_now,
};

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

// ---- workers

/// Accepts: curio/workers/blocking, trap/future_wait
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
        assert_eq!(payload.downcast_ref(), Some(&17_u8));
    });
}

/// Notes when it is dropped, and on which thread.
struct Dropped(mpsc::Sender<std::thread::ThreadId>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.send(std::thread::current().id()).unwrap();
    }
}

/// Accepts: curio/workers/worker_cancel, trap/future_wait
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
