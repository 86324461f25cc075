//! The kernel's examples of embedding and of primitives of one's own, run as tests. In real time but for the barrier.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kernel::{Builder, Interrupt, Kernel, VirtualClock, sleep, spawn, timeout_after, yield_now};

#[path = "../../kernel/examples/barrier.rs"]
mod barrier;
#[path = "../../kernel/examples/beside_tokio.rs"]
mod beside_tokio;
#[path = "../../kernel/examples/foreign_loop.rs"]
mod foreign_loop;
#[path = "../../kernel/examples/in_tokio.rs"]
mod in_tokio;
#[path = "../../kernel/examples/own_pool.rs"]
mod own_pool;

use barrier::Barrier;
use own_pool::{Pool, run_in_pool};

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn virtual_kernel<'env>() -> Kernel<'env> {
    let builder = Builder::new().clock(VirtualClock::new());
    builder.build().unwrap()
}

#[test]
fn a_barrier_of_traps_alone_keeps_tasks_together() {
    virtual_kernel()
        .run(async {
            let log = barrier::phases().await;
            let (first, second) = log.split_at(3);
            assert!(first.iter().all(|line| line.ends_with('1')), "{log:?}");
            assert!(second.iter().all(|line| line.ends_with('2')), "{log:?}");

            // Who is cancelled, timed out or dropped while it waits has not come.
            let barrier = Rc::new(Barrier::new(2));
            for how in ["cancel", "abort", "timeout"] {
                let waiter = spawn({
                    let barrier = barrier.clone();
                    async move { timeout_after(s(5), barrier.wait()).await }
                });
                sleep(s(1)).await.unwrap();
                match how {
                    "cancel" => waiter.cancel().await.unwrap(),
                    "abort" => drop(waiter.abort()),
                    _ => waiter.wait().await.unwrap(),
                }
                let late = timeout_after(s(1), barrier.wait()).await;
                assert_eq!(late, Err(Interrupt::TaskTimeout), "{how}");
            }
            let other = spawn({
                let barrier = barrier.clone();
                async move { barrier.wait().await }
            });
            yield_now().await.unwrap();
            assert_eq!(barrier.wait().await, Ok(true));
            assert_eq!(other.join().await.unwrap(), Ok(false));
        })
        .unwrap();
}

/// Accepts: curio-old/workers/executor
#[test]
fn calls_run_in_a_pool_of_the_callers_own() {
    kernel::run(async {
        let pool = Rc::new(Pool::new(2));
        let here = thread::current().id();
        let calls: Vec<_> = (0..50)
            .map(|n| {
                let pool = pool.clone();
                let there = move || (n * n, thread::current().id());
                spawn(async move { run_in_pool(&pool, there).await })
            })
            .collect();
        let mut threads = std::collections::HashSet::new();
        for (n, call) in calls.iter().enumerate() {
            let (square, thread) = call.join().await.unwrap().unwrap();
            assert_eq!(square, n * n);
            threads.insert(thread);
        }
        assert!(threads.len() <= 2 && !threads.contains(&here));
        // A panic arrives here, and the pool goes on.
        let panics = spawn({
            let pool = pool.clone();
            async move { run_in_pool(&pool, || panic!("over there")).await }
        });
        let panicked: Result<Result<(), _>, _> = panics.join().await;
        assert_eq!(
            panicked.unwrap_err().to_string(),
            "task panicked: over there"
        );
        // A wait that ends early leaves the call to itself.
        let (release, held) = mpsc::channel::<()>();
        let late = timeout_after(
            Duration::from_millis(5),
            run_in_pool(&pool, move || held.recv()),
        );
        assert_eq!(late.await.unwrap_err(), Interrupt::TaskTimeout);
        drop(release);
        assert_eq!(run_in_pool(&pool, || 7).await, Ok(7));
    })
    .unwrap();
}

/// Accepts: embed/host_epoll
#[test]
fn the_example_of_a_foreign_loop_serves_its_own_socket_and_its_guest() {
    let (host_side, guest_side) = std::os::unix::net::UnixStream::pair().unwrap();
    host_side.set_nonblocking(true).unwrap();
    let mut guest = Kernel::new().unwrap();
    let ticks = Rc::new(Cell::new(0));
    let ticker = ticks.clone();
    guest.spawn(async move {
        while sleep(Duration::from_millis(2)).await.is_ok() {
            ticker.set(ticker.get() + 1);
        }
    });
    let task = guest.spawn(async move {
        let stream = kernel::net::UnixStream::from_std(guest_side).unwrap();
        let mut byte = [0];
        for _ in 0..100 {
            stream.write_all(&byte).await.unwrap();
            assert_eq!(stream.read(&mut byte).await.unwrap(), 1);
        }
        sleep(Duration::from_millis(20)).await.unwrap();
        byte[0]
    });
    let host_side = mio::net::UnixStream::from_std(host_side);
    let wakes = foreign_loop::host(&mut guest, host_side, || task.is_terminated()).unwrap();
    assert_eq!(task.try_join().unwrap().unwrap(), 100);
    assert!(ticks.get() > 0);
    // It slept in between: a loop that spins would wake thousands of times in these 20 ms.
    assert!(wakes < 1000, "{wakes} wakes");
}

/// Accepts: embed/in_tokio
#[test]
fn the_example_in_tokio_runs_tasks_of_both() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut guest = Kernel::new().unwrap();
    let (to_guest, mut in_guest) = tokio::sync::mpsc::channel(1);
    let task = guest.spawn(async move {
        let mut sum = 0;
        while let Some(n) = in_guest.recv().await {
            sum += n;
            sleep(Duration::from_millis(1)).await.unwrap();
        }
        sum
    });
    let turns = runtime.block_on(async {
        tokio::spawn(async move {
            for n in 1..=10 {
                to_guest.send(n).await.unwrap();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        let turns = in_tokio::host(&mut guest, || task.is_terminated()).await;
        turns.unwrap()
    });
    assert_eq!(task.try_join().unwrap().unwrap(), 55);
    assert!(turns < 1000, "{turns} turns");
}

/// Accepts: embed/tokio_beside
#[test]
fn the_example_beside_tokio_joins_and_aborts_tasks_there() {
    let tokio = beside_tokio::Tokio::start().unwrap();
    kernel::run(async {
        let theirs = tokio.handle.spawn(async { 1 });
        assert_eq!(beside_tokio::join(theirs).await.unwrap().unwrap(), 1);
        let theirs = tokio.handle.spawn(async { panic!("over there") });
        let panicked: Result<(), _> = beside_tokio::join(theirs).await.unwrap();
        assert!(panicked.unwrap_err().is_panic());
        // A cancelled wait takes the other side along.
        let (alive, mut gone) = tokio::sync::mpsc::channel::<()>(1);
        let theirs = tokio.handle.spawn(async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        });
        let waiter = spawn(beside_tokio::join(theirs));
        yield_now().await.unwrap();
        waiter.cancel().await.unwrap();
        assert!(waiter.join().await.unwrap().is_err());
        assert_eq!(gone.recv().await, None);
    })
    .unwrap();
}

/// What they print is for people; that they come to their end is for us.
#[test]
fn the_examples_run() {
    let mains: [fn() -> bool; 5] = [
        || barrier::main().is_ok(),
        || own_pool::main().is_ok(),
        || beside_tokio::main().is_ok(),
        || foreign_loop::main().is_ok(),
        || in_tokio::main().is_ok(),
    ];
    for main in mains {
        assert!(catch_unwind(AssertUnwindSafe(main)).unwrap());
    }
}
