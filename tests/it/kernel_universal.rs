//! What crosses threads: universal events, results and queues between kernels, threads and tokio.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use kernel::sync::{
    QueueError, TryGetError, TryPutError, UniversalEvent, UniversalQueue, UniversalResult,
};
use kernel::{Interrupt, spawn, timeout_after, yield_now};
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
    let queue = UniversalQueue::new(None);
    let producer = thread::spawn({
        let queue = queue.clone();
        move || {
            for n in 0..50 {
                thread::sleep(ms(1));
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
                Err(QueueError::Interrupted(Interrupt::TaskTimeout)) => late += 1,
                Err(QueueError::Closed) => return (consumed, late),
                Err(error) => panic!("{error}"),
            }
        }
    })
    .unwrap();
    producer.join().unwrap();
    assert!(consumed.into_iter().eq(0..50));
    assert!(late > 0, "the producer was slow");
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
        for n in 0..100 {
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
