//! What crosses threads and processes: universal events, results and queues between kernels, threads and tokio; threads with a seat in the
//! kernel; files, which are read in threads; channels.

use std::io::{self, Read, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kernel::channel::{self, AuthenticationError, Channel, Connection, TooLong};
use kernel::fs::File;
use kernel::net::UnixStream;
use kernel::process::Command;
use kernel::sync::{
    Lock, QueueError, TryGetError, TryPutError, UniversalEvent, UniversalQueue, UniversalResult,
};
use kernel::{
    GroupError, Interrupt, JoinError, Kernel, MaybeInterrupt, TaskGroup, Wait, group, shield,
    sleep, spawn, spawn_thread, spawn_thread_with, timeout_after, yield_now,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Runs `main` in a tokio runtime of its own.
fn tokio_run<T>(main: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(main)
}

fn is_readable(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
}

// ---- events and results

/// Accepts: curio/sync/uevent_get_asyncio_set
#[test]
fn another_runtime_sets_an_event_for_a_task_and_for_a_thread() {
    let event = UniversalEvent::new();
    let blocked = thread::spawn({
        let event = event.clone();
        move || event.wait_blocking(None)
    });
    let setter = event.clone();
    kernel::run(async move {
        let waiter = spawn(event.wait());
        yield_now().await.unwrap();
        assert!(!waiter.is_terminated());
        let other = thread::spawn(move || tokio_run(async move { setter.set() }));
        waiter.join().await.unwrap().unwrap();
        other.join().unwrap();
    })
    .unwrap();
    assert!(blocked.join().unwrap());
}

/// Accepts: curio/sync/uevent_get_asyncio_wait
#[test]
fn another_runtime_waits_for_an_event_that_a_task_sets() {
    let (event, waiting) = (UniversalEvent::new(), UniversalEvent::new());
    let other = thread::spawn({
        let (event, waiting) = (event.clone(), waiting.clone());
        move || {
            tokio_run(async move {
                let late = tokio::time::timeout(ms(1), event.wait_anywhere()).await;
                assert!(late.is_err(), "nobody has set it");
                waiting.set();
                let waiter = tokio::spawn(event.wait_anywhere());
                waiter.await.unwrap();
                event.is_set()
            })
        }
    });
    kernel::run(async {
        waiting.wait().await.unwrap();
        event.set();
    })
    .unwrap();
    assert!(other.join().unwrap());
}

/// What is set while nobody has run is not lost by a `clear`, in any of the three forms.
#[test]
fn who_was_woken_goes_on_although_the_event_is_cleared() {
    let event = UniversalEvent::new();
    kernel::run(async {
        let ours = spawn(event.wait());
        let foreign = spawn(event.wait_anywhere());
        yield_now().await.unwrap();
        event.set();
        event.clear();
        ours.join().await.unwrap().unwrap();
        foreign.join().await.unwrap();
        assert!(!event.wait_blocking(Some(ms(1))));
    })
    .unwrap();
}

/// A value goes from a thread through tokio to a kernel's task.
fn chain(
    first: Result<u32, String>,
    step: impl FnOnce(u32) -> Result<u32, String> + Send + 'static,
) -> Result<u32, String> {
    let (start, end) = (UniversalResult::new(), UniversalResult::new());
    let other = thread::spawn({
        let (start, end) = (start.clone(), end.clone());
        move || {
            tokio_run(async move {
                let value: Result<u32, String> = start.wait_anywhere().await;
                end.set(value.and_then(step)).unwrap();
            });
        }
    });
    let answer = kernel::run(async move {
        let waiter = spawn(end.wait());
        yield_now().await.unwrap();
        assert!(!waiter.is_terminated() && !end.is_set());
        thread::spawn(move || start.set(first).unwrap());
        waiter.join().await.unwrap().unwrap()
    });
    other.join().unwrap();
    answer.unwrap()
}

/// Accepts: curio/sync/universal_value
#[test]
fn a_value_passes_from_a_thread_through_another_runtime_to_a_task() {
    assert_eq!(chain(Ok(20), |n| Ok(n + 22)), Ok(42));
}

/// Accepts: curio/sync/universal_error
#[test]
fn an_error_passes_from_a_thread_through_another_runtime_to_a_task() {
    let unreachable = |_| panic!("an error is not worked on");
    assert_eq!(chain(Err("lost".into()), unreachable), Err("lost".into()));
}

#[test]
fn a_universal_result_is_given_once_and_to_everybody() {
    let result = UniversalResult::new();
    assert_eq!((result.value(), result.is_set()), (None, false));
    assert_eq!(result.wait_blocking(Some(ms(1))), None);
    assert_eq!(result.set(1), Ok(()));
    assert_eq!(result.set(2), Err(2));
    assert_eq!(result.value(), Some(1));
    kernel::run(async {
        assert_eq!(result.wait().await, Ok(1));
        assert_eq!(result.wait().await, Ok(1));
        assert_eq!(result.wait_anywhere().await, 1);
    })
    .unwrap();
}

// ---- queues

/// Accepts: curio/queue/univ_queue_basic, curio-defect/C10
#[test]
fn a_universal_queue_knows_its_length_and_its_bounds() {
    let queue = UniversalQueue::new(Some(2));
    assert!(queue.is_empty() && !queue.is_full());
    queue.try_put(1).unwrap();
    assert_eq!(
        (queue.len(), queue.is_empty(), queue.is_full()),
        (1, false, false)
    );
    queue.try_put(2).unwrap();
    assert!(queue.is_full());
    assert_eq!(queue.try_put(3), Err(TryPutError::Full(3)));
    assert_eq!(
        queue.put_blocking(3, Some(ms(1))),
        Err(TryPutError::Full(3))
    );
    assert_eq!(queue.try_get(), Ok(1));
    assert_eq!(queue.get_blocking(None), Ok(2));
    assert_eq!(queue.try_get(), Err(TryGetError::Empty));
    assert_eq!(queue.get_blocking(Some(ms(1))), Err(TryGetError::Empty));
    queue.task_done();
    assert!(!queue.join_blocking(Some(ms(1))));
    queue.task_done();
    assert!(queue.join_blocking(None));
    let unbounded = UniversalQueue::new(None);
    unbounded.try_put(1).unwrap();
    assert!(!unbounded.is_full());
}

/// Accepts: curio-defect/C10
#[test]
#[should_panic(expected = "task_done was called more often than items were put")]
fn a_universal_queue_counts_what_is_done() {
    UniversalQueue::<()>::new(None).task_done();
}

/// Accepts: curio/queue/univ_queue_sync_async
#[test]
fn a_thread_produces_for_a_task_and_joins() {
    let queue = UniversalQueue::new(None);
    let producer = thread::spawn({
        let queue = queue.clone();
        move || {
            for n in 0..10 {
                queue.put_blocking(Some(n), None).unwrap();
            }
            assert!(queue.join_blocking(None));
            queue.put_blocking(None, None).unwrap();
        }
    });
    let consumed = kernel::run(async move {
        let mut consumed = Vec::new();
        while let Some(n) = queue.get().await.unwrap() {
            consumed.push(n);
            queue.task_done();
        }
        consumed
    });
    producer.join().unwrap();
    assert!(consumed.unwrap().into_iter().eq(0..10));
}

/// Accepts: curio/queue/univ_queue_async_sync
#[test]
fn a_task_produces_for_a_thread_and_joins() {
    let queue = UniversalQueue::new(Some(2));
    let consumer = thread::spawn({
        let queue = queue.clone();
        move || {
            let mut consumed = Vec::new();
            while let Ok(n) = queue.get_blocking(None) {
                consumed.push(n);
                queue.task_done();
            }
            consumed
        }
    });
    kernel::run(async {
        for n in 0..10 {
            queue.put(n).await.unwrap();
        }
        queue.join().await.unwrap();
        assert!(queue.is_empty());
        queue.close();
        assert_eq!(queue.put(10).await, Err(QueueError::Closed));
    })
    .unwrap();
    assert!(consumer.join().unwrap().into_iter().eq(0..10));
}

/// Accepts: curio/queue/univ_queue_cancel
#[test]
fn gets_that_time_out_under_a_slow_producer_lose_nothing() {
    let (ask, asked) = mpsc::channel();
    let queue = UniversalQueue::new(None);
    let producer = thread::spawn({
        let queue = queue.clone();
        move || {
            // Slow: an item for each get that came away with nothing.
            for n in 0..50 {
                asked.recv().unwrap();
                queue.put_blocking(n, None).unwrap();
            }
            queue.close();
        }
    });
    let (consumed, late) = kernel::run(async move {
        let (mut consumed, mut late) = (Vec::new(), 0);
        loop {
            match timeout_after(Duration::from_micros(100), queue.get()).await {
                Ok(n) => consumed.push(n),
                Err(QueueError::Interrupted(Interrupt::TaskTimeout)) => {
                    late += 1;
                    let _has_all_it_needs = ask.send(());
                }
                Err(QueueError::Closed) => return (consumed, late),
                Err(error) => panic!("{error}"),
            }
        }
    })
    .unwrap();
    producer.join().unwrap();
    assert!(consumed.into_iter().eq(0..50));
    assert!(late >= 50, "{late}");
}

/// Accepts: curio-defect/C3
#[test]
fn a_get_that_is_cancelled_after_it_was_served_leaves_the_item_at_the_head_of_a_full_queue() {
    kernel::run(async {
        let queue = Rc::new(UniversalQueue::new(Some(1)));
        let served = spawn(queue.get());
        yield_now().await.unwrap();
        queue.try_put(1).unwrap();
        let putter = spawn({
            let queue = queue.clone();
            async move { queue.put(2).await }
        });
        yield_now().await.unwrap();
        assert!(queue.is_full() && !putter.is_terminated());
        served.request_cancel("too late");
        // Served and cancelled in one turn: whichever of the two it was told, 1 is not lost and comes before 2.
        let first = match served.join().await.unwrap() {
            Ok(item) => item,
            Err(_) => queue.get().await.unwrap(),
        };
        assert_eq!((first, queue.get().await), (1, Ok(2)));
        putter.join().await.unwrap().unwrap();

        // The same without a choice: the one who was served is dropped before it can take the item.
        let mut dropped = Box::pin(queue.get_anywhere());
        assert!(futures::poll!(&mut dropped).is_pending());
        let next = spawn(queue.get());
        yield_now().await.unwrap();
        queue.try_put(3).unwrap();
        assert_eq!(queue.try_get(), Err(TryGetError::Empty), "it is granted");
        assert_eq!(queue.try_put(4), Err(TryPutError::Full(4)));
        drop(dropped);
        assert_eq!(next.join().await.unwrap(), Ok(3));
    })
    .unwrap();
}

#[test]
fn a_full_universal_queue_lets_in_one_putter_for_each_item_that_leaves() {
    kernel::run(async {
        let queue = UniversalQueue::new(Some(1));
        queue.put(0).await.unwrap();
        let putters = [1, 2].map(|item| {
            let queue = queue.clone();
            spawn(async move { queue.put(item).await })
        });
        yield_now().await.unwrap();
        for next in 1..3 {
            assert_eq!(queue.get().await, Ok(next - 1));
            putters[next - 1].wait().await.unwrap();
            sleep(ms(1)).await.unwrap();
            assert_eq!(queue.len(), 1);
            assert_eq!(putters[1].is_terminated(), next == 2);
        }
    })
    .unwrap();
}

/// Accepts: curio/queue/univ_queue_multiple_consumer
#[test]
fn three_tasks_share_a_thousand_items_of_a_bounded_queue() {
    let queue = UniversalQueue::new(Some(10));
    let producer = thread::spawn({
        let queue = queue.clone();
        move || {
            for n in 0..1000 {
                queue.put_blocking(n, None).unwrap();
            }
            queue.close();
        }
    });
    let mut consumed = kernel::run(async {
        let consumers = [(); 3].map(|()| spawn(consume(queue.clone())));
        let mut consumed = Vec::new();
        for consumer in consumers {
            consumed.extend(consumer.join().await.unwrap());
        }
        consumed
    })
    .unwrap();
    producer.join().unwrap();
    consumed.sort_unstable();
    assert!(consumed.into_iter().eq(0..1000));
}

async fn consume(queue: UniversalQueue<u32>) -> Vec<u32> {
    let mut consumed = Vec::new();
    while let Ok(n) = queue.get().await {
        consumed.push(n);
    }
    consumed
}

/// Accepts: curio/queue/univ_queue_multiple_kernels
#[test]
fn kernels_of_three_threads_share_a_queue() {
    let queue = UniversalQueue::new(Some(4));
    let consumers = [(); 3].map(|()| {
        let queue = queue.clone();
        thread::spawn(move || kernel::run(consume(queue)).unwrap())
    });
    kernel::run(async {
        for n in 0..1000 {
            queue.put(n).await.unwrap();
        }
        queue.close();
    })
    .unwrap();
    let consumed = consumers.map(|consumer| consumer.join().unwrap());
    let mut all = consumed.concat();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..1000));
}

/// Accepts: curio/queue/univ_queue_withfd
#[test]
fn a_queue_is_readable_through_its_descriptor_while_it_has_items() {
    assert!(UniversalQueue::<()>::new(None).fd().is_none());
    let queue = UniversalQueue::with_fd(None).unwrap();
    let fd = || queue.fd().unwrap();
    assert!(!is_readable(fd()));
    queue.try_put(1).unwrap();
    queue.try_put(2).unwrap();
    assert!(is_readable(fd()));
    assert_eq!(queue.try_get(), Ok(1));
    assert!(is_readable(fd()), "there is another item");
    assert_eq!(queue.try_get(), Ok(2));
    assert!(!is_readable(fd()));

    let getter = Rc::new(queue);
    kernel::run(async {
        // What belongs to somebody who waits is not offered.
        let waiting = spawn(getter.get());
        yield_now().await.unwrap();
        getter.try_put(3).unwrap();
        assert!(!is_readable(getter.fd().unwrap()));
        assert_eq!(waiting.join().await.unwrap(), Ok(3));
        // A task that waits for the descriptor, as another event loop would.
        let watcher = spawn({
            let queue = getter.clone();
            async move {
                kernel::traps::read_wait(&queue.fd().unwrap()).await?;
                io::Result::Ok(queue.try_get())
            }
        });
        yield_now().await.unwrap();
        getter.put(4).await.unwrap();
        assert_eq!(watcher.join().await.unwrap().unwrap(), Ok(4));
    })
    .unwrap();
    getter.close();
    assert!(
        is_readable(getter.fd().unwrap()),
        "try_get has something to say"
    );
}

/// Once an item: also for a poller that is told of changes only.
#[test]
fn each_item_raises_the_descriptor_anew() {
    let queue = UniversalQueue::with_fd(None).unwrap();
    let mut poll = mio::Poll::new().unwrap();
    let mut events = mio::Events::with_capacity(1);
    let fd = queue.fd().unwrap().as_raw_fd();
    let mut source = mio::unix::SourceFd(&fd);
    let registry = poll.registry();
    registry
        .register(&mut source, mio::Token(0), mio::Interest::READABLE)
        .unwrap();
    let mut told = || {
        poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        !events.is_empty()
    };
    queue.try_put(1).unwrap();
    assert!(told());
    queue.try_put(2).unwrap();
    assert!(told());
    assert_eq!(queue.try_get(), Ok(1));
    assert!(told(), "2 is still there");
    assert_eq!(queue.try_get(), Ok(2));
    assert!(!told());
}

/// Accepts: curio/queue/uqueue_withfd_corner, curio-defect/C5
#[test]
fn a_descriptor_that_nobody_reads_or_somebody_empties_breaks_nothing() {
    const ITEMS: usize = 100_000; // more than a pipe holds
    let queue = UniversalQueue::with_fd(None).unwrap();
    for n in 0..ITEMS {
        queue.try_put(n).unwrap();
    }
    for n in 0..ITEMS {
        assert!(is_readable(queue.fd().unwrap()));
        assert_eq!(queue.try_get(), Ok(n));
    }
    assert!(!is_readable(queue.fd().unwrap()));

    // The watcher reads what is in the pipe, as it would with other descriptors.
    queue.try_put(1).unwrap();
    queue.try_put(2).unwrap();
    let mut pipe = std::fs::File::from(queue.fd().unwrap().try_clone_to_owned().unwrap());
    let mut bytes = [0; 64];
    assert!(pipe.read(&mut bytes).unwrap() > 0);
    assert!(!is_readable(queue.fd().unwrap()));
    assert_eq!(queue.try_get(), Ok(1));
    assert!(is_readable(queue.fd().unwrap()));
    assert_eq!(queue.try_get(), Ok(2));
    assert!(!is_readable(queue.fd().unwrap()));
}

/// Accepts: curio/queue/uqueue_asyncio_prod
#[test]
fn another_runtime_produces_for_a_task() {
    let queue = UniversalQueue::new(Some(2));
    let producer = thread::spawn({
        let queue = queue.clone();
        move || {
            tokio_run(async move {
                for n in 0..100 {
                    queue.put_anywhere(n).await.unwrap();
                }
                queue.join_anywhere().await;
                queue.close();
                assert_eq!(queue.put_anywhere(0).await, Err(TryPutError::Closed(0)));
            });
        }
    });
    let consumed = kernel::run(async {
        let mut consumed = Vec::new();
        while let Ok(n) = queue.get().await {
            consumed.push(n);
            queue.task_done();
        }
        consumed
    });
    producer.join().unwrap();
    assert!(consumed.unwrap().into_iter().eq(0..100));
}

/// Accepts: curio/queue/uqueue_asyncio_consumer
#[test]
fn another_runtime_consumes_what_a_task_produces() {
    let queue = UniversalQueue::new(Some(2));
    // There before the consumer looks whether all is done.
    queue.try_put(0).unwrap();
    let consumer = thread::spawn({
        let queue = queue.clone();
        move || {
            tokio_run(async move {
                let mut consumed = Vec::new();
                let late = tokio::time::timeout(ms(1), queue.join_anywhere()).await;
                assert!(late.is_err(), "nothing is done yet");
                while let Some(n) = queue.get_anywhere().await {
                    consumed.push(n);
                    queue.task_done();
                }
                consumed
            })
        }
    });
    kernel::run(async {
        for n in 1..100 {
            queue.put(n).await.unwrap();
        }
        queue.join().await.unwrap();
        queue.close();
    })
    .unwrap();
    assert!(consumer.join().unwrap().into_iter().eq(0..100));
}

/// Accepts: curio/queue/uqueue_put_cancel
#[test]
fn a_put_that_times_out_gives_its_item_back() {
    kernel::run(async {
        let queue = UniversalQueue::new(Some(1));
        queue.put(1).await.unwrap();
        let mut put = queue.put(2);
        let outcome = timeout_after(ms(1), &mut put).await;
        assert_eq!(outcome, Err(Interrupt::TaskTimeout.into()));
        assert_eq!(put.take_item(), Some(2));
        assert_eq!(queue.get().await, Ok(1));
        assert!(queue.is_empty(), "it has not been put after all");
        // The room it asked for is free for others.
        queue.put(3).await.unwrap();
        queue.close();
        let mut put = queue.put(4);
        assert_eq!((&mut put).await, Err(QueueError::Closed));
        assert_eq!(put.take_item(), Some(4));
    })
    .unwrap();
}

#[test]
fn closing_tells_those_who_wait_to_put_and_to_get() {
    kernel::run(async {
        let full = UniversalQueue::new(Some(1));
        full.put(1).await.unwrap();
        let putter = spawn(full.put_anywhere(2));
        let empty = UniversalQueue::<u32>::new(None);
        let getters = (spawn(empty.get()), spawn(empty.get_anywhere()));
        yield_now().await.unwrap();
        full.close();
        empty.close();
        assert_eq!(putter.join().await.unwrap(), Err(TryPutError::Closed(2)));
        assert_eq!(full.get().await, Ok(1));
        assert_eq!(full.get().await, Err(QueueError::Closed));
        assert_eq!(getters.0.join().await.unwrap(), Err(QueueError::Closed));
        assert_eq!(getters.1.join().await.unwrap(), None);
    })
    .unwrap();
}

/// Consumers on every side come and go while producers on every side put; a wake that is lost leaves this test waiting.
#[test]
fn items_get_through_a_crowd_that_keeps_giving_up() {
    const EACH: u32 = 2000;
    let queue = UniversalQueue::new(Some(3));
    let producers = [0, 1].map(|side| {
        let queue = queue.clone();
        thread::spawn(move || match side {
            0 => (0..EACH).for_each(|n| {
                let mut n = n;
                while let Err(refused) = queue.put_blocking(n, Some(Duration::from_micros(50))) {
                    n = refused.into_item();
                }
            }),
            _ => tokio_run(async move {
                for n in EACH..2 * EACH {
                    queue.put_anywhere(n).await.unwrap();
                }
            }),
        })
    });
    let consumers = [0, 1, 2].map(|side| {
        let queue = queue.clone();
        thread::spawn(move || {
            let mut consumed = Vec::new();
            match side {
                0 => loop {
                    match queue.get_blocking(Some(Duration::from_micros(50))) {
                        Ok(n) => consumed.push(n),
                        Err(TryGetError::Empty) => {}
                        Err(TryGetError::Closed) => return consumed,
                    }
                },
                1 => tokio_run(async move {
                    while let Some(n) = queue.get_anywhere().await {
                        consumed.push(n);
                    }
                    consumed
                }),
                _ => kernel::run(async move {
                    loop {
                        let get = timeout_after(Duration::from_micros(50), queue.get());
                        match get.await {
                            Ok(n) => consumed.push(n),
                            Err(QueueError::Closed) => return consumed,
                            Err(_) => {}
                        }
                    }
                })
                .unwrap(),
            }
        })
    });
    for producer in producers {
        producer.join().unwrap();
    }
    queue.close();
    let mut all = consumers.map(|consumer| consumer.join().unwrap()).concat();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..2 * EACH));
}

// ---- threads with a seat in the kernel

/// Longer than any test: only an interrupt ends it.
const LONG: Duration = Duration::from_secs(3600);

/// Accepts: curio/thread/good_result, curio/thread/thread_good_result
#[test]
fn a_thread_awaits_on_the_kernel_and_is_joined_for_its_value() {
    kernel::run(async {
        let thread = spawn_thread(|| {
            let here = thread::current().id();
            let there = kernel::thread::run(async || {
                sleep(ms(1)).await?;
                Ok::<_, Interrupt>(thread::current().id())
            });
            (here, there.unwrap())
        });
        assert!(thread.try_join().is_none(), "it has not begun");
        let kernels = thread::current().id();
        let (here, there) = thread.join().await.unwrap();
        assert_ne!(here, kernels);
        assert_eq!(there, kernels);
    })
    .unwrap();
}

/// Accepts: curio/thread/bad_result, curio/thread/thread_bad_result
#[test]
fn errors_and_panics_cross_between_a_thread_and_the_kernel() {
    kernel::run(async {
        let failing = spawn_thread(|| {
            kernel::thread::run(async || Err::<(), _>(io::Error::other("no such luck")))
        });
        let error = failing.join().await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "no such luck");

        let panicking = spawn_thread(|| -> u32 { std::panic::panic_any(7_u8) });
        match panicking.join().await {
            Err(JoinError::Panicked(panic)) => {
                assert_eq!(panic.into_payload().downcast_ref(), Some(&7_u8));
            }
            other => panic!("{other:?}"),
        }

        // A future that panics does so in the thread that asked for it, and its seat outlives that.
        let surviving = spawn_thread(|| {
            let caught = std::panic::catch_unwind(|| {
                kernel::thread::run(async || -> Result<(), Interrupt> { panic!("in the kernel") })
            });
            assert!(caught.is_err());
            kernel::thread::run(async || Ok::<_, Interrupt>(1))
        });
        assert_eq!(surviving.join().await.unwrap(), Ok(1));
    })
    .unwrap();
}

/// Accepts: curio/thread/cancel_result, curio/thread/thread_cancel_result
#[test]
fn a_cancellation_arrives_in_what_the_thread_awaits() {
    kernel::run(async {
        let waits = UniversalEvent::new();
        let told = waits.clone();
        let thread = spawn_thread(move || {
            let outcome = kernel::thread::run(async move || {
                told.set();
                let outcome = sleep(LONG).await;
                yield_now().await.expect("it is told once");
                outcome.map(|_| ())
            });
            (
                outcome,
                kernel::thread::run(async || Ok::<_, Interrupt>(())),
            )
        });
        waits.wait().await.unwrap();
        thread.cancel().await.unwrap();
        let (outcome, next) = thread.join().await.unwrap();
        assert_eq!(outcome, Err(Interrupt::cancelled()));
        assert_eq!(next, Ok(()), "the thread may clean up");
    })
    .unwrap();
}

#[test]
fn a_cancellation_of_a_busy_thread_waits_for_its_next_call() {
    kernel::run(async {
        let (busy, go_on) = (UniversalEvent::new(), UniversalEvent::new());
        let thread = spawn_thread({
            let (busy, go_on) = (busy.clone(), go_on.clone());
            move || {
                busy.set();
                assert!(go_on.wait_blocking(None));
                kernel::thread::run(|| sleep(LONG))
            }
        });
        busy.wait().await.unwrap();
        assert!(thread.request_cancel("enough"));
        yield_now().await.unwrap();
        assert!(!thread.is_terminated());
        go_on.set();
        match thread.join().await.unwrap() {
            Err(Interrupt::Cancelled(why)) => assert_eq!(why.downcast_ref(), Some(&"enough")),
            other => panic!("{other:?}"),
        }
    })
    .unwrap();
}

/// Accepts: curio/thread/thread_sync
#[test]
fn a_thread_works_with_a_lock_that_tasks_hold() {
    kernel::run(async {
        let lock = Rc::new(Lock::new(Vec::new()));
        let mut held = lock.acquire().await.unwrap();
        let thread = spawn_thread_with(lock.clone(), |door| {
            door.run(async |lock| {
                let mut log = lock.acquire().await?;
                log.push("thread");
                sleep(ms(1)).await?;
                log.push("thread still");
                Ok::<_, Interrupt>(())
            })
        });
        sleep(ms(1)).await.unwrap();
        assert!(!thread.is_terminated());
        held.push("task");
        drop(held);
        thread.join().await.unwrap().unwrap();
        assert_eq!(
            *lock.acquire().await.unwrap(),
            ["task", "thread", "thread still"]
        );
    })
    .unwrap();
}

/// Accepts: curio/thread/thread_timeout
#[test]
fn a_thread_sets_a_timeout_by_running_it() {
    kernel::run(async {
        let thread = spawn_thread(|| {
            let late = kernel::thread::run(|| timeout_after(ms(1), sleep(LONG)));
            (
                late,
                kernel::thread::run(|| timeout_after(LONG, sleep(ms(1)))).is_ok(),
            )
        });
        let outcome = thread.join().await.unwrap();
        assert_eq!(outcome, (Err(Interrupt::TaskTimeout), true));
    })
    .unwrap();
}

/// Accepts: curio/thread/thread_disable_cancellation
#[test]
fn a_thread_shields_itself_by_running_a_shield() {
    kernel::run(async {
        let (entered, go_on) = (UniversalEvent::new(), UniversalEvent::new());
        let thread = spawn_thread({
            let (entered, go_on) = (entered.clone(), go_on.clone());
            move || {
                let shielded = kernel::thread::run(move || {
                    shield(async move {
                        entered.set();
                        go_on.wait().await
                    })
                });
                (shielded, kernel::thread::run(|| sleep(LONG)).map(|_| ()))
            }
        });
        entered.wait().await.unwrap();
        thread.request_cancel("");
        yield_now().await.unwrap();
        go_on.set();
        let (shielded, next) = thread.join().await.unwrap();
        assert_eq!(shielded, Ok(()));
        assert!(matches!(next, Err(Interrupt::Cancelled(_))));
    })
    .unwrap();
}

/// Accepts: curio/thread/thread_read
#[test]
fn a_thread_reads_a_file_of_the_kernel() {
    let scratch = Scratch::new("line 1\nline 2\n");
    kernel::run(async {
        let file = Lock::new(File::open(&scratch.0).await.unwrap());
        let thread = spawn_thread_with(file, |door| {
            let mut lines = Vec::new();
            while let Some(line) = door.run(async |file| file.acquire().await?.next_line().await)? {
                lines.push(line);
            }
            io::Result::Ok(lines)
        });
        assert_eq!(thread.join().await.unwrap().unwrap(), ["line 1", "line 2"]);
    })
    .unwrap();
}

/// Accepts: curio/thread/task_group_thread
#[test]
fn a_thread_uses_a_task_group() {
    kernel::run(async {
        let thread = spawn_thread(|| {
            kernel::thread::run(async || {
                let (_, outcome) = group(Wait::All, async |group| {
                    for n in 1..4 {
                        group.spawn(async move {
                            sleep(ms(1)).await?;
                            Ok::<_, Interrupt>(n)
                        });
                    }
                    Ok::<_, Interrupt>(())
                })
                .await?;
                let numbers = outcome.results.into_iter().map(|(_, n)| n.unwrap());
                Ok::<_, Interrupt>(numbers.collect::<Vec<_>>())
            })
        });
        assert_eq!(thread.join().await.unwrap().unwrap(), [1, 2, 3]);
    })
    .unwrap();
}

/// Accepts: curio/thread/task_group_spawn_thread
#[test]
fn threads_are_members_of_a_task_group() {
    kernel::run(async {
        let mut all = TaskGroup::new(Wait::All);
        for n in 1..4 {
            all.spawn_thread(move || Ok::<_, Interrupt>(n * n));
        }
        let outcome = all.join().await.unwrap();
        let values = outcome.results.into_iter().map(|(_, value)| value.unwrap());
        assert!(values.eq([1, 4, 9]));

        // A member that fails ends the others, in what they await.
        let mut failing = TaskGroup::new(Wait::All);
        failing.spawn_thread(|| kernel::thread::run(|| sleep(LONG)).map(|_| ()));
        failing.spawn(async { Err(Interrupt::cancelled()) });
        let outcome = failing.join().await.unwrap();
        assert!(matches!(
            outcome.results[0].1,
            Err(GroupError::Failed(Interrupt::Cancelled(_)))
        ));
    })
    .unwrap();
}

/// Accepts: curio/thread/errors
#[test]
fn awaiting_from_a_thread_without_a_seat_is_an_error() {
    let outside = || std::panic::catch_unwind(|| kernel::thread::run(|| sleep(ms(1)))).is_err();
    assert!(outside());
    kernel::run(async {
        assert!(outside(), "a task awaits");
        let thread = spawn_thread(|| {
            let stranger = thread::spawn(|| {
                std::panic::catch_unwind(|| kernel::thread::run(|| sleep(ms(1)))).is_err()
            });
            stranger.join().unwrap()
        });
        assert!(thread.try_join().is_none(), "too early");
        assert!(thread.join().await.unwrap());
        assert!(matches!(thread.join().await, Err(JoinError::Taken)));
    })
    .unwrap();
}

#[test]
fn a_thread_whose_kernel_is_gone_is_told_that_it_is_cancelled() {
    let (report, reported) = mpsc::channel();
    let waits = UniversalEvent::new();
    let mut kernel = Kernel::new().unwrap();
    kernel
        .run(async {
            let told = waits.clone();
            spawn_thread(move || {
                let outcome = kernel::thread::run(async move || {
                    told.set();
                    sleep(LONG).await
                });
                let next = kernel::thread::run(|| sleep(ms(1)));
                report.send((outcome, next)).unwrap();
            });
            waits.wait().await.unwrap();
        })
        .unwrap();
    drop(kernel);
    let (outcome, next) = reported.recv().unwrap();
    assert!(matches!(outcome, Err(Interrupt::Cancelled(_))));
    assert!(matches!(next, Err(Interrupt::Cancelled(_))));
}

/// Accepts: curio-old/thread/subprocess_popen
#[test]
fn a_thread_talks_with_a_child_process() {
    kernel::run(async {
        let thread = spawn_thread(|| {
            kernel::thread::run(async || {
                let output = Command::new("cat").check_output(b"through a child").await;
                Ok::<_, io::Error>(output?.stdout)
            })
        });
        assert_eq!(thread.join().await.unwrap().unwrap(), b"through a child");
    })
    .unwrap();
}

// ---- files

/// A file that is removed at the end of the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(content: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("kernel-universal-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, content).unwrap();
        Self(path)
    }

    fn content(&self) -> String {
        std::fs::read_to_string(&self.0).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

const TEXT: &str = "line 1\nline 2\r\nline 3";

/// Accepts: curio/file/read, curio/file/readall, curio/file/readinto
#[test]
fn a_file_is_read_whole_and_by_pieces() {
    let scratch = Scratch::new(TEXT);
    kernel::run(async {
        let mut file = File::open(&scratch.0).await?;
        assert_eq!(file.read_to_string().await?, TEXT);
        assert_eq!(file.read_to_end().await?, b"");

        let mut file = File::open(&scratch.0).await?;
        let mut piece = [0; 4];
        assert_eq!(file.read(&mut piece).await?, 4);
        assert_eq!(&piece, b"line");
        assert_eq!(file.read(&mut []).await?, 0);
        assert_eq!(file.read_to_end().await?, &TEXT.as_bytes()[4..]);
        assert_eq!(file.read(&mut piece).await?, 0);

        let missing = scratch.0.with_extension("missing");
        let error = File::open(&missing).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("missing"));
        io::Result::Ok(())
    })
    .unwrap()
    .unwrap();
}

/// Accepts: curio/file/readline, curio/file/readlines, curio/file/readiter
#[test]
fn a_file_is_read_by_lines() {
    let scratch = Scratch::new(TEXT);
    // Longer than a read.
    let long = Scratch::new(&format!("{}\nend", "long ".repeat(40_000)));
    kernel::run(async {
        let mut file = File::open(&scratch.0).await?;
        assert_eq!(file.read_line().await?, "line 1\n");
        assert_eq!(file.read_line().await?, "line 2\r\n");
        assert_eq!(file.read_line().await?, "line 3");
        assert_eq!(file.read_line().await?, "");

        let mut file = File::open(&scratch.0).await?;
        assert_eq!(file.next_line().await?.as_deref(), Some("line 1"));
        assert_eq!(file.next_line().await?.as_deref(), Some("line 2"));
        assert_eq!(file.next_line().await?.as_deref(), Some("line 3"));
        assert_eq!(file.next_line().await?, None);

        let mut file = File::open(&scratch.0).await?;
        assert_eq!(file.read_line().await?, "line 1\n");
        assert_eq!(file.lines().await?, ["line 2", "line 3"]);

        let mut file = File::open(&long.0).await?;
        assert_eq!(file.read_line().await?.len(), 200_001);
        assert_eq!(file.read_line().await?, "end");
        io::Result::Ok(())
    })
    .unwrap()
    .unwrap();
}

/// Accepts: curio/file/write, curio/file/writelines, curio/file/seek_tell, curio/file/truncate
#[test]
fn a_file_is_written_moved_in_and_cut() {
    let scratch = Scratch::new("what was there before");
    kernel::run(async {
        let mut file = File::create(&scratch.0).await?;
        assert_eq!(file.write("moon ").await?, 5);
        for line in ["and\n", "sun\n"] {
            file.write_all(line).await?;
        }
        file.flush().await?;
        assert_eq!(scratch.content(), "moon and\nsun\n");

        let mut options = std::fs::OpenOptions::new();
        let mut file = File::open_with(&scratch.0, options.read(true).write(true)).await?;
        assert_eq!(file.read_line().await?, "moon and\n");
        assert_eq!(
            file.position().await?,
            9,
            "where reading is, not the buffer"
        );
        file.write_all("ray").await?;
        assert_eq!(scratch.content(), "moon and\nray\n");
        assert_eq!(file.seek(SeekFrom::Start(5)).await?, 5);
        assert_eq!(file.read_line().await?, "and\n");
        assert_eq!(file.seek(SeekFrom::Current(-4)).await?, 5);
        file.set_len(4).await?;
        assert_eq!(scratch.content(), "moon");
        io::Result::Ok(())
    })
    .unwrap()
    .unwrap();
}

/// Accepts: curio/file/blocking
#[test]
fn the_file_inside_is_lent_and_given_back() {
    let scratch = Scratch::new(TEXT);
    kernel::run(async {
        let mut file = File::open(&scratch.0).await?;
        assert_eq!(file.read_line().await?, "line 1\n");
        let mut next = [0; 6];
        let (kernels, (there, next)) = (
            thread::current().id(),
            file.blocking(move |file| {
                file.read_exact(&mut next)?;
                Ok((thread::current().id(), next))
            })
            .await?,
        );
        assert_ne!(there, kernels);
        assert_eq!(&next, b"line 2");
        assert_eq!(file.read_line().await?, "\r\n");
        let mut rest = String::new();
        file.into_std().await?.read_to_string(&mut rest)?;
        assert_eq!(rest, "line 3");
        io::Result::Ok(())
    })
    .unwrap()
    .unwrap();
}

#[test]
fn an_interrupted_read_loses_nothing_and_does_not_read_too_much() {
    let (reader, mut writer) = io::pipe().unwrap();
    kernel::run(async {
        let mut file = File::from(std::fs::File::from(OwnedFd::from(reader)));
        writer.write_all(b"be").unwrap();
        // The first read ends, the second blocks in its thread.
        let late = timeout_after(ms(50), file.read_line()).await.unwrap_err();
        assert_eq!(late.interrupt(), Some(&Interrupt::TaskTimeout));
        writer.write_all(b"fore\nafter\n").unwrap();
        assert_eq!(file.read_line().await.unwrap(), "before\n");
        assert_eq!(file.read_line().await.unwrap(), "after\n");
        drop(writer);
        assert_eq!(file.read_line().await.unwrap(), "");
    })
    .unwrap();
}

// ---- channels

fn connections() -> (Connection<UnixStream>, Connection<UnixStream>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Connection::new(ours), Connection::new(theirs))
}

/// Accepts: curio/channel/connection_hello, curio/channel/connection_hello_bytes
#[test]
fn a_message_goes_there_and_back() {
    kernel::run(async {
        let (mut client, mut server) = connections();
        let answering = spawn(async move {
            let question = server.recv(100).await?;
            let mut object: serde_json::Value = serde_json::from_slice(&question)?;
            object["answer"] = 42.into();
            server.send(object.to_string().as_bytes()).await?;
            server.send(b"").await?;
            io::Result::Ok(())
        });
        client.send(br#"{"question":"?"}"#).await.unwrap();
        let answer = client.recv(100).await.unwrap();
        assert_eq!(answer, br#"{"answer":42,"question":"?"}"#);
        assert_eq!(client.recv(0).await.unwrap(), b"");
        answering.join().await.unwrap().unwrap();
        let gone = client.recv(100).await.unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
    })
    .unwrap();
}

/// Accepts: curio/channel/connection_large
#[test]
fn a_large_message_goes_there_and_back() {
    const SIZE: usize = 3_000_000;
    kernel::run(async {
        let (mut client, mut server) = connections();
        let echo = spawn(async move {
            let message = server.recv(SIZE).await?;
            server.send(&message).await?;
            io::Result::Ok(())
        });
        let message: Vec<u8> = (0..SIZE).map(|n| n as u8).collect();
        client.send(&message).await.unwrap();
        assert!(client.recv(SIZE).await.unwrap() == message);
        echo.join().await.unwrap().unwrap();
    })
    .unwrap();
}

/// Accepts: curio/channel/connection_send_partial_bytes
#[test]
fn a_part_of_a_message_is_a_slice_and_its_length_goes_before_it() {
    kernel::run(async {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut sender = Connection::new(ours);
        let message = b"abcdefghijklmnopqrstuvwxyz";
        sender.send(&message[5..]).await.unwrap();
        sender.send(&message[5..10]).await.unwrap();
        let mut bytes = [0; 25 + 9];
        assert_eq!(theirs.read(&mut bytes).await.unwrap(), 25 + 9);
        assert_eq!(&bytes[..25], b"\0\0\0\x15fghijklmnopqrstuvwxyz");
        assert_eq!(&bytes[25..], b"\0\0\0\x05fghij");
        theirs.write_all(&(-1_i32).to_be_bytes()).await.unwrap();
        let nonsense = sender.recv(100).await.unwrap_err();
        assert_eq!(nonsense.kind(), io::ErrorKind::InvalidData);
    })
    .unwrap();
}

/// Accepts: curio/channel/recv_bytes_into
#[test]
fn a_message_that_is_too_long_is_skipped() {
    kernel::run(async {
        let (mut sender, mut receiver) = connections();
        for message in ["fits", "much too long", "fits"] {
            sender.send(message.as_bytes()).await.unwrap();
        }
        let mut buf = [0; 8];
        assert_eq!(receiver.recv_into(&mut buf).await.unwrap(), 4);
        assert_eq!(&buf[..4], b"fits");
        let error = receiver.recv_into(&mut buf).await.unwrap_err();
        let too_long = *error.get_ref().unwrap().downcast_ref::<TooLong>().unwrap();
        assert_eq!((too_long.size, too_long.limit), (13, 8));
        assert_eq!(receiver.recv(4).await.unwrap(), b"fits");
    })
    .unwrap();
}

/// Accepts: curio/channel/connection_recv_cancel, curio/channel/connection_recv_timeout
#[test]
fn an_interrupted_receive_loses_nothing() {
    kernel::run(async {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let receiver = Rc::new(Lock::new(Connection::new(theirs)));
        let receive = || {
            let receiver = receiver.clone();
            async move { receiver.acquire().await?.recv(100).await }
        };
        let waiting = spawn(receive());
        sleep(ms(1)).await.unwrap();
        waiting.cancel().await.unwrap();
        let outcome = waiting.join().await.unwrap().unwrap_err();
        assert_eq!(outcome.interrupt(), Some(&Interrupt::cancelled()));
        // Cut off within the length, and then within the message.
        for part in [&b"\0\0"[..], b"\0\x05mes"] {
            ours.write_all(part).await.unwrap();
            let late = timeout_after(ms(5), receive()).await.unwrap_err();
            assert_eq!(late.interrupt(), Some(&Interrupt::TaskTimeout));
        }
        ours.write_all(b"sa\0\0\0\x02ge").await.unwrap();
        assert_eq!(receive().await.unwrap(), b"messa");
        assert_eq!(receive().await.unwrap(), b"ge");
    })
    .unwrap();
}

/// Accepts: curio/channel/connection_send_cancel, curio/channel/connection_send_timeout
#[test]
fn an_interrupted_send_stays_in_step() {
    const SIZE: usize = 3_000_000; // more than the socket holds
    kernel::run(async {
        let (sender, mut receiver) = connections();
        let sender = Rc::new(Lock::new(sender));
        let send = |message: Vec<u8>| {
            let sender = sender.clone();
            async move { sender.acquire().await.unwrap().send(&message).await }
        };
        let late = timeout_after(ms(1), send(vec![1; SIZE])).await.unwrap_err();
        assert_eq!(late.interrupt(), Some(&Interrupt::TaskTimeout));
        assert!((1..SIZE).contains(&late.done), "it has begun");
        // The next cannot even begin.
        let cancelled = spawn(send(vec![2; 10]));
        sleep(ms(1)).await.unwrap();
        cancelled.cancel().await.unwrap();
        let outcome = cancelled.join().await.unwrap().unwrap_err();
        assert_eq!(outcome.interrupt(), Some(&Interrupt::cancelled()));
        assert_eq!(outcome.done, 0);
        let last = spawn(send(vec![3; 10]));
        assert!(receiver.recv(SIZE).await.unwrap() == vec![1; SIZE]);
        assert_eq!(receiver.recv(SIZE).await.unwrap(), [3; 10]);
        last.join().await.unwrap().unwrap();
    })
    .unwrap();
}

fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
        && error
            .get_ref()
            .is_some_and(|inner| inner.is::<AuthenticationError>())
}

/// Accepts: curio/channel/connection_auth, curio/channel/connection_auth_fail
#[test]
fn both_sides_of_a_connection_prove_that_they_know_the_key() {
    kernel::run(async {
        let (mut client, mut server) = connections();
        let serving = spawn(async move {
            server.authenticate_server(b"moon").await?;
            server.send(b"welcome").await?;
            io::Result::Ok(())
        });
        client.authenticate_client(b"moon").await.unwrap();
        assert_eq!(client.recv(100).await.unwrap(), b"welcome");
        serving.join().await.unwrap().unwrap();

        let (mut client, mut server) = connections();
        let serving = spawn(async move { server.authenticate_server(b"moon").await });
        assert!(is_denied(
            &client.authenticate_client(b"sun").await.unwrap_err()
        ));
        assert!(is_denied(&serving.join().await.unwrap().unwrap_err()));

        // A server that lets everybody in, without knowing the key, is found out too.
        let (mut client, mut rogue) = connections();
        spawn(async move {
            rogue.send(b"#CHALLENGE#whatever").await?;
            let answer = rogue.recv(256).await?;
            rogue.send(b"#WELCOME#").await?;
            rogue.recv(256).await?;
            rogue.send(&answer).await?;
            rogue.recv(256).await
        });
        assert!(is_denied(
            &client.authenticate_client(b"moon").await.unwrap_err()
        ));

        // Who plays a challenge back gets an answer that proves nothing.
        let (mut mirror, mut server) = connections();
        let serving = spawn(async move { server.authenticate_server(b"moon").await });
        let challenge = mirror.recv(256).await.unwrap();
        mirror.send(&challenge).await.unwrap();
        assert_eq!(mirror.recv(256).await.unwrap(), b"#FAILURE#");
        assert!(is_denied(&serving.join().await.unwrap().unwrap_err()));
    })
    .unwrap();
}

/// Accepts: curio/channel/channel_hello, curio/channel/channel_hello_auth, curio/channel/channel_hello_auth_fail
#[test]
fn a_channel_accepts_who_knows_its_key() {
    async fn greet(channel: Channel) -> io::Result<Vec<u8>> {
        let mut client = channel.accept().await?;
        assert!(
            client.get_ref().as_std().nodelay()?,
            "a message is sent at once"
        );
        client.send(b"hello").await?;
        client.recv(100).await
    }

    kernel::run(async {
        let channel = Channel::bind("127.0.0.1:0").unwrap();
        let address = channel.local_addr().unwrap();
        let server = spawn(greet(channel));
        let mut client = channel::connect(address, None::<&str>).await.unwrap();
        assert!(client.get_ref().as_std().nodelay().unwrap());
        assert_eq!(client.recv(100).await.unwrap(), b"hello");
        client.send(b"bye").await.unwrap();
        assert_eq!(server.join().await.unwrap().unwrap(), b"bye");

        let channel = Channel::bind("127.0.0.1:0").unwrap().with_key("moon");
        assert!(!format!("{channel:?}").contains("moon"));
        let address = channel.local_addr().unwrap();
        let server = spawn(greet(channel));
        let stranger = channel::connect(address, Some("sun")).await;
        assert!(is_denied(&stranger.unwrap_err()));
        // One that says nothing is dropped after a second.
        let silent = kernel::net::TcpStream::connect(address).await.unwrap();
        let mut client = channel::connect(address, Some("moon")).await.unwrap();
        assert_eq!(client.recv(100).await.unwrap(), b"hello");
        client.send(b"bye").await.unwrap();
        assert_eq!(server.join().await.unwrap().unwrap(), b"bye");
        drop(silent);
    })
    .unwrap();
}

/// Accepts: curio-old/channel/slow_connect
#[test]
fn connecting_waits_for_the_channel_to_be_there() {
    // An address that no other test listens on, lest it take the port meanwhile.
    let address = Channel::bind("127.83.7.1:0").unwrap().local_addr().unwrap();
    kernel::run(async move {
        let early = spawn(channel::connect(address, None::<&str>));
        sleep(ms(5)).await.unwrap();
        assert!(!early.is_terminated(), "refused, but it does not give up");
        let channel = Channel::bind(address).unwrap();
        let mut server = channel.accept().await.unwrap();
        server.send(b"here I am").await.unwrap();
        let mut client = early.join().await.unwrap().unwrap();
        assert_eq!(client.recv(100).await.unwrap(), b"here I am");

        let nobody = Channel::bind("127.83.7.1:0").unwrap().local_addr().unwrap();
        let late = timeout_after(ms(30), channel::connect(nobody, None::<&str>)).await;
        assert_eq!(late.unwrap_err().interrupt(), Some(&Interrupt::TaskTimeout));
    })
    .unwrap();
}
