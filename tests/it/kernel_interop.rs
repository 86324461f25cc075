//! The kernel beside others: inside tokio, with tokio on another thread, with channels of other libraries, and with every kind of descriptor
//! that a poller knows. In real time, loopback only.

use std::cell::Cell;
use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::pin::pin;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use futures::channel::oneshot;
use futures::future::{join_all, select};
use kernel::net::{TcpStream, UnixStream as KernelUnixStream};
use kernel::sync::Lock;
use kernel::traps::{Direction, Source, get_kernel, io_waiting, read_wait, write_wait};
use kernel::{
    Interrupt, JoinError, Kernel, MaybeInterrupt, Remote, ResourceBusy, current_task,
    interruptible, run_in_thread, sleep, spawn, timeout_after, yield_now,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Runs `main` in real time; a test that hangs fails after a while.
fn run<T>(main: impl Future<Output = io::Result<T>>) -> T {
    kernel::run(timeout_after(ms(60_000), main))
        .unwrap()
        .unwrap()
}

/// Lets every other task run until it waits.
async fn settle() {
    for _ in 0..3 {
        yield_now().await.unwrap();
    }
}

/// As a task of tokio: it knows the kernel's descriptor and deadline, nothing else. Says how many turns it made.
async fn host(kernel: &mut Kernel<'_>, done: impl Fn() -> bool) -> usize {
    let bell = kernel.as_fd().try_clone_to_owned().unwrap();
    #[expect(
        deprecated,
        reason = "its successor is unsafe; an `OwnedFd` keeps its promise"
    )]
    let bell = AsyncFd::with_interest(bell, Interest::READABLE).unwrap();
    let far = tokio::time::Instant::now() + ms(60_000);
    let mut turns = 0;
    loop {
        let turn = kernel.turn(Some(Duration::ZERO)).unwrap();
        turns += 1;
        if done() {
            return turns;
        }
        assert!(tokio::time::Instant::now() < far, "the host was not woken");
        if turn.ready {
            tokio::task::yield_now().await;
            continue;
        }
        let deadline = turn.next_deadline.map_or(far, Into::into);
        let mut rung = pin!(bell.readable());
        select(
            pin!(async { rung.as_mut().await.unwrap().clear_ready() }),
            pin!(tokio::time::sleep_until(deadline)),
        )
        .await;
    }
}

fn tokio_here() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Accepts: embed/in_tokio
#[test]
fn the_kernel_runs_as_a_task_of_tokio() {
    let runtime = tokio_here();
    let mut kernel = Kernel::new().unwrap();
    let (to_tokio, mut from_kernel) = tokio::sync::mpsc::unbounded_channel();
    let (to_kernel, for_kernel) = tokio::sync::oneshot::channel();
    let (let_thread_go, thread_may_go) = mpsc::channel();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();

    let left = Rc::new(Cell::new(4));
    let finish = |left: &Rc<Cell<i32>>| left.set(left.get() - 1);
    let counter = left.clone();
    let sender = to_tokio.clone();
    kernel.spawn(async move {
        // The kernel's own time, sockets and threads.
        sleep(ms(5)).await.unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        let mut buf = [0; 100];
        let length = stream.read(&mut buf).await.unwrap();
        sender.send(buf[..length].to_vec()).unwrap();
        run_in_thread(move || thread_may_go.recv().unwrap())
            .await
            .unwrap();
        finish(&counter);
    });
    let counter = left.clone();
    kernel.spawn(async move {
        // Something that tokio's own tasks send.
        assert_eq!(for_kernel.await, Ok("from tokio"));
        finish(&counter);
    });
    let counter = left.clone();
    kernel.spawn(async move {
        // Tokio's futures, since the thread is tokio's: timers, sockets, tasks.
        tokio::time::sleep(ms(5)).await;
        let (mut ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
        let echo = tokio::spawn(async move {
            let mut buf = [0; 4];
            theirs.read_exact(&mut buf).await.unwrap();
            theirs.write_all(&buf).await.unwrap();
        });
        ours.write_all(b"ping").await.unwrap();
        let mut buf = [0; 4];
        ours.read_exact(&mut buf).await.unwrap();
        assert_eq!(&buf, b"ping");
        echo.await.unwrap();
        finish(&counter);
    });
    let counter = left.clone();
    kernel.spawn(async move {
        // Which our timeouts interrupt.
        let late = timeout_after(ms(5), interruptible(tokio::time::sleep(ms(60_000)))).await;
        assert_eq!(late, Err(Interrupt::TaskTimeout));
        finish(&counter);
    });

    let turns = runtime.block_on(async {
        tokio::spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let mut stream = listener.accept().await.unwrap().0;
            let mut buf = [0; 5];
            stream.read_exact(&mut buf).await.unwrap();
            stream.write_all(&buf).await.unwrap();
            tokio::time::sleep(ms(5)).await;
            to_kernel.send("from tokio").unwrap();
            // Which the kernel waits for, through its own thread.
            let_thread_go.send(()).unwrap();
        });
        host(&mut kernel, || left.get() == 0).await
    });
    assert_eq!(from_kernel.try_recv().unwrap(), b"hello");
    // It slept in between: a loop that spins would make thousands of turns in this time.
    assert!(turns < 200, "{turns} turns");
}

#[test]
fn a_busy_kernel_does_not_starve_tokio_nor_tokio_the_kernel() {
    let mut kernel = Kernel::new().unwrap();
    let cycles = Rc::new(Cell::new(0));
    for _ in 0..100 {
        let cycles = cycles.clone();
        kernel.spawn(async move {
            while yield_now().await.is_ok() {
                cycles.set(cycles.get() + 1);
            }
        });
    }
    let local = tokio::task::LocalSet::new();
    let rounds = Rc::new(Cell::new(0));
    let counter = rounds.clone();
    local.spawn_local(async move {
        loop {
            tokio::task::yield_now().await;
            counter.set(counter.get() + 1);
        }
    });
    let hosted = local.run_until(host(&mut kernel, || {
        rounds.get() >= 1000 && cycles.get() >= 1000
    }));
    let turns = tokio_here().block_on(hosted);
    // A turn is at most 61 polls.
    assert!(cycles.get() <= turns * 61);
}

/// Tokio on a thread of its own until it is dropped.
struct Beside(
    tokio::runtime::Handle,
    Option<(tokio::sync::oneshot::Sender<()>, thread::JoinHandle<()>)>,
);

impl Beside {
    fn new() -> Self {
        let runtime = tokio_here();
        let handle = runtime.handle().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = thread::spawn(move || {
            let _ = runtime.block_on(stopped);
        });
        Self(handle, Some((stop, thread)))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let (stop, thread) = self.1.take().unwrap();
        let _ = stop.send(());
        thread.join().unwrap();
    }
}

/// Accepts: embed/tokio_beside
#[test]
fn tasks_await_a_tokio_on_another_thread() {
    let beside = Beside::new();
    let tokio = beside.0.clone();
    run(async move {
        // What a tokio task returns, and its panic.
        let asked = (0..100).map(|n| {
            let tokio = tokio.clone();
            spawn(async move {
                let answer = tokio.spawn(async move {
                    tokio::time::sleep(ms(n % 10)).await;
                    n * n
                });
                answer.await.unwrap()
            })
        });
        let asked: Vec<_> = asked.collect();
        for (n, task) in asked.iter().enumerate() {
            assert_eq!(task.join().await.unwrap(), (n * n) as u64);
        }
        let failed = tokio.spawn(async { std::panic::resume_unwind(Box::new("there")) });
        let failed: Result<(), _> = failed.await;
        assert!(failed.unwrap_err().is_panic());

        // A wait that our timeout ends, and one that our cancellation ends: the other side goes on.
        let (release, released) = tokio::sync::oneshot::channel();
        let mut slow = tokio.spawn(async { released.await.unwrap() });
        let late = timeout_after(ms(5), interruptible(&mut slow)).await;
        assert!(matches!(late, Err(Interrupt::TaskTimeout)));
        let waiter = spawn(async move {
            let cancelled = interruptible(&mut slow).await;
            assert!(matches!(cancelled, Err(Interrupt::Cancelled(_))));
            Some(slow)
        });
        settle().await;
        waiter.cancel().await?;
        let slow = waiter.join().await.unwrap().unwrap();
        release.send(7).unwrap();
        assert_eq!(slow.await.unwrap(), 7);

        // A socket between the two.
        let (listening, address) = oneshot::channel();
        let server = tokio.spawn(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
            listening.send(listener.local_addr()?).unwrap();
            let mut stream = listener.accept().await?.0;
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await?;
            stream.write_all(&all).await?;
            io::Result::Ok(all.len())
        });
        let stream = TcpStream::connect(address.await.unwrap()).await?;
        let sent: Vec<u8> = (0..1_000_000).map(|n| n as u8).collect();
        stream.write_all(&sent).await?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut back = Vec::new();
        let mut buf = [0; 65_536];
        loop {
            match stream.read(&mut buf).await? {
                0 => break,
                length => back.extend_from_slice(&buf[..length]),
            }
        }
        assert!(back == sent);
        assert_eq!(server.await.unwrap()?, sent.len());

        // Its channels, in both directions.
        let (to_tokio, mut in_tokio) = tokio::sync::mpsc::channel(2);
        let (to_us, mut for_us) = tokio::sync::mpsc::channel(2);
        let doubler = tokio.spawn(async move {
            while let Some(n) = in_tokio.recv().await {
                to_us.send(2 * n).await.unwrap();
            }
        });
        let sender = spawn(async move {
            for n in 0..1000 {
                to_tokio.send(n).await.unwrap();
            }
        });
        for n in 0..1000 {
            assert_eq!(for_us.recv().await, Some(2 * n));
        }
        assert_eq!(for_us.recv().await, None);
        sender.join().await.unwrap();
        doubler.await.unwrap();
        Ok(())
    });
}

/// Accepts: curio-old/asyncio/simple
#[test]
fn a_task_awaits_work_of_another_runtime_and_either_side_may_go() {
    let beside = Beside::new();
    let tokio = beside.0.clone();
    run(async move {
        let work = |n: u64| async move {
            tokio::time::sleep(ms(1)).await;
            if n == 13 { Err("unlucky") } else { Ok(n + 1) }
        };
        // Values and errors, one after the other and at once.
        assert_eq!(tokio.spawn(work(1)).await.unwrap(), Ok(2));
        assert_eq!(tokio.spawn(work(13)).await.unwrap(), Err("unlucky"));
        let many = join_all((0..100).map(|n| tokio.spawn(work(n)))).await;
        let sum: u64 = many.into_iter().filter_map(|n| n.unwrap().ok()).sum();
        assert_eq!(sum, (1..=100).sum::<u64>() - 14);
        // Their panic, and their being aborted, is an error here.
        let panicked = tokio.spawn(async { panic!("there") });
        let error: Result<(), _> = panicked.await;
        assert!(error.unwrap_err().is_panic());
        let endless = tokio.spawn(std::future::pending::<()>());
        let aborter = endless.abort_handle();
        let waiter = spawn(endless);
        settle().await;
        aborter.abort();
        assert!(waiter.join().await.unwrap().unwrap_err().is_cancelled());
        // Our task goes: theirs goes on.
        let (ended, mut end) = tokio::sync::mpsc::channel(1);
        let (release, released) = tokio::sync::oneshot::channel();
        let theirs = tokio.spawn(async move {
            let released: Result<u32, _> = released.await;
            ended.send(released.unwrap()).await.unwrap();
        });
        let waiter = spawn(theirs);
        settle().await;
        waiter.abort();
        release.send(5).unwrap();
        assert_eq!(end.recv().await, Some(5));
        // Their runtime goes.
        let waiter = spawn(tokio.spawn(std::future::pending::<()>()));
        settle().await;
        drop(beside);
        assert!(waiter.join().await.unwrap().unwrap_err().is_cancelled());
        Ok(())
    });
}

/// A kernel on a thread of its own until it is told to stop.
struct KernelBeside {
    remote: Remote,
    stop: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl KernelBeside {
    fn new() -> Self {
        let (to_us, remotes) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let thread = thread::spawn(move || {
            run(async move {
                to_us.send(get_kernel().await).unwrap();
                let _ = stopped.await;
                Ok(())
            });
        });
        Self {
            remote: remotes.recv().unwrap(),
            stop,
            thread,
        }
    }

    fn stop(self) {
        drop(self.stop);
        self.thread.join().unwrap();
    }
}

/// Accepts: curio-old/asyncio/wrapper
#[test]
fn another_runtime_awaits_work_of_a_kernel_and_either_side_may_go() {
    let beside = KernelBeside::new();
    let remote = beside.remote.clone();
    let tokio = tokio_here();
    tokio.block_on(async {
        // Values of futures that are not `Send`, one after the other and at once.
        let work = |n: u64| {
            remote.spawn(async move || {
                let n = Rc::new(n);
                sleep(ms(*n % 5)).await?;
                let lock = Lock::new(*n);
                let doubled = spawn(async move { *lock.acquire().await.unwrap() * 2 });
                Ok::<_, Interrupt>(doubled.join().await.unwrap())
            })
        };
        assert_eq!(work(4).await.unwrap(), Ok(8));
        let many = join_all((0..100).map(work)).await;
        let sum: u64 = many.into_iter().map(|n| n.unwrap().unwrap()).sum();
        assert_eq!(sum, 99 * 100);
        // The panic of the future and of the function that makes it.
        let panicked: Result<(), _> = remote.spawn(async || panic!("there")).await;
        assert_eq!(panicked.unwrap_err().to_string(), "task panicked: there");
        // Cancelled from here, once: it cleans up. Also before it has begun.
        let endless = || {
            remote.spawn(async || {
                let told = sleep(ms(60_000)).await.unwrap_err();
                sleep(ms(1)).await.unwrap();
                told.to_string()
            })
        };
        for begins in [true, false] {
            let mut task = endless();
            if begins {
                assert!(tokio::time::timeout(ms(5), &mut task).await.is_err());
            }
            assert!(!task.is_finished());
            task.request_cancel("enough");
            task.request_cancel("twice");
            assert_eq!((&mut task).await.unwrap(), "task cancelled: enough");
            task.request_cancel("late");
        }
        // Aborted there.
        let aborted = remote.spawn(async || {
            current_task().abort();
            std::future::pending::<()>().await;
        });
        assert!(matches!(aborted.await, Err(JoinError::Aborted)));
        // Nobody waits any more: it goes on.
        let (ended, mut end) = tokio::sync::mpsc::channel(1);
        drop(remote.spawn(async move || {
            sleep(ms(5)).await.unwrap();
            ended.send(7).await.unwrap();
        }));
        assert_eq!(end.recv().await, Some(7));
        // The kernel goes, while somebody waits and before somebody asks.
        let waiting = endless();
        let waiter = tokio::task::LocalSet::new();
        let outcome = waiter.spawn_local(waiting);
        waiter.spawn_local(async move {
            tokio::time::sleep(ms(5)).await;
            beside.stop();
        });
        waiter.await;
        assert!(matches!(outcome.await.unwrap(), Err(JoinError::Aborted)));
        let late = endless();
        assert!(late.is_finished());
        assert!(matches!(late.await, Err(JoinError::Aborted)));
    });
    // Two kernels, one in each thread.
    let beside = KernelBeside::new();
    run(async {
        let theirs = beside.remote.spawn(async || sleep(ms(60_000)).await);
        let late = timeout_after(ms(5), interruptible(theirs)).await;
        assert!(matches!(late, Err(Interrupt::TaskTimeout)));
        let theirs = beside.remote.spawn(async || thread::current().id());
        assert_ne!(theirs.await.unwrap(), thread::current().id());
        Ok(())
    });
    beside.stop();
}

/// Accepts: interop/channels
#[test]
fn async_channel_joins_tasks_of_one_kernel_and_of_two_threads() {
    run(async {
        // Same thread, with backpressure.
        let (sender, receiver) = async_channel::bounded(1);
        let task = spawn(async move {
            for n in 0..100 {
                sender.send(n).await.unwrap();
            }
        });
        settle().await;
        assert_eq!(receiver.len(), 1, "the sender waits for room");
        for n in 0..100 {
            assert_eq!(receiver.recv().await, Ok(n));
        }
        assert_eq!(receiver.recv().await, Err(async_channel::RecvError));
        task.join().await.unwrap();

        // Several consumers here, a producer that blocks there.
        let (sender, receiver) = async_channel::bounded(2);
        let producer = thread::spawn(move || {
            for n in 0..1000_u64 {
                sender.send_blocking(n).unwrap();
            }
        });
        let consumers: Vec<_> = (0..3)
            .map(|_| {
                let receiver = receiver.clone();
                spawn(async move {
                    let mut sum = 0;
                    while let Ok(n) = receiver.recv().await {
                        sum += n;
                    }
                    sum
                })
            })
            .collect();
        let sums = join_all(consumers.iter().map(|task| task.join())).await;
        assert_eq!(sums.into_iter().map(Result::unwrap).sum::<u64>(), 499_500);
        producer.join().unwrap();

        // Producers here, a consumer that blocks there.
        let (sender, receiver) = async_channel::bounded(2);
        let consumer = thread::spawn(move || {
            let mut sum = 0;
            while let Ok(n) = receiver.recv_blocking() {
                sum += n;
            }
            sum
        });
        let producers: Vec<_> = (0..4_u64)
            .map(|_| {
                let sender = sender.clone();
                spawn(async move {
                    for n in 0..250 {
                        sender.send(n).await.unwrap();
                    }
                })
            })
            .collect();
        drop(sender);
        for task in producers {
            task.join().await.unwrap();
        }
        assert_eq!(consumer.join().unwrap(), 4 * 31_125);

        // A wait that is interrupted takes nothing from the channel.
        let (sender, receiver) = async_channel::bounded(1);
        let late = timeout_after(ms(2), interruptible(receiver.recv())).await;
        assert!(matches!(late, Err(Interrupt::TaskTimeout)));
        sender.send(1).await.unwrap();
        assert_eq!(receiver.recv().await, Ok(1));
        Ok(())
    });
}

/// Accepts: interop/channels
#[test]
fn a_oneshot_answers_from_here_from_there_and_by_being_dropped() {
    run(async {
        for from_thread in [false, true] {
            for sends in [true, false] {
                let (sender, receiver) = oneshot::channel();
                let waiter = spawn(receiver);
                settle().await;
                let answer = move || {
                    if sends {
                        sender.send(5).unwrap();
                    }
                };
                if from_thread {
                    thread::spawn(answer).join().unwrap();
                } else {
                    answer();
                }
                let expected = if sends { Ok(5) } else { Err(oneshot::Canceled) };
                assert_eq!(waiter.join().await.unwrap(), expected);
            }
        }
        // The sender learns that nobody waits any more.
        let (mut sender, receiver) = oneshot::channel::<()>();
        let waiter = spawn(receiver);
        let watcher = spawn(async move { sender.cancellation().await });
        settle().await;
        waiter.abort();
        watcher.join().await.unwrap();
        Ok(())
    });
}

/// Two ends of a connection, and what it is.
struct Pair(&'static str, OwnedFd, OwnedFd);

fn pairs() -> io::Result<Vec<Pair>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let tcp = std::net::TcpStream::connect(listener.local_addr()?)?;
    let accepted = listener.accept()?.0;
    let unix = UnixStream::pair()?;
    let datagram = UnixDatagram::pair()?;
    let udp = (
        UdpSocket::bind("127.0.0.1:0")?,
        UdpSocket::bind("127.0.0.1:0")?,
    );
    udp.0.connect(udp.1.local_addr()?)?;
    udp.1.connect(udp.0.local_addr()?)?;
    let pairs = vec![
        Pair("tcp", tcp.into(), accepted.into()),
        Pair("unix", unix.0.into(), unix.1.into()),
        Pair("unix datagram", datagram.0.into(), datagram.1.into()),
        Pair("udp", udp.0.into(), udp.1.into()),
    ];
    for Pair(_, ours, theirs) in &pairs {
        rustix::io::ioctl_fionbio(ours, true)?;
        rustix::io::ioctl_fionbio(theirs, true)?;
    }
    Ok(pairs)
}

/// As `pairs`, and a pipe: what is written to the second is read from the first.
fn channels() -> io::Result<Vec<Pair>> {
    let (reader, writer) = io::pipe()?;
    rustix::io::ioctl_fionbio(&reader, true)?;
    rustix::io::ioctl_fionbio(&writer, true)?;
    let mut all = pairs()?;
    all.push(Pair("pipe", reader.into(), writer.into()));
    Ok(all)
}

/// Writes until nothing goes any more. A TCP socket that is full may have room again when its peer's buffer has grown.
async fn fill(fd: &OwnedFd) -> Result<(), Interrupt> {
    let mut refused = 0;
    while refused < 3 {
        if rustix::io::write(fd, &[0; 1000]).is_ok() {
            refused = 0;
        } else {
            refused += 1;
            sleep(ms(1)).await?;
        }
    }
    Ok(())
}

fn drain(fd: &OwnedFd) {
    while rustix::io::read(fd, &mut [0; 65_536]).is_ok_and(|length| length > 0) {}
}

/// Accepts: trap/read_wait
#[test]
fn read_wait_ends_when_data_come_on_every_kind_of_descriptor() {
    run(async {
        for Pair(kind, ours, theirs) in channels()? {
            let ours = Rc::new(ours);
            for round in 0..3 {
                let waiter = spawn({
                    let ours = ours.clone();
                    async move { read_wait(&*ours).await }
                });
                settle().await;
                assert_eq!(io_waiting(&*ours), (Some(waiter.id()), None), "{kind}");
                let early = timeout_after(ms(1), waiter.wait()).await;
                assert_eq!(early, Err(Interrupt::TaskTimeout), "{kind}, {round}");
                rustix::io::write(&theirs, b"xy")?;
                waiter.join().await.unwrap()?;
                // The edge is spent, the data are not.
                read_wait(&*ours).await?;
                assert_eq!(rustix::io::read(&*ours, &mut [0; 10])?, 2, "{kind}");
                let late = timeout_after(ms(1), read_wait(&*ours)).await.unwrap_err();
                assert_eq!(late.interrupt(), Some(&Interrupt::TaskTimeout), "{kind}");
                assert_eq!(io_waiting(&*ours), (None, None), "{kind}");
            }
            let waiter = spawn({
                let ours = ours.clone();
                async move { read_wait(&*ours).await }
            });
            settle().await;
            waiter.cancel().await?;
            let cancelled = waiter.join().await.unwrap().unwrap_err();
            assert_eq!(
                cancelled.interrupt(),
                Some(&Interrupt::cancelled()),
                "{kind}"
            );
        }
        Ok(())
    });
}

/// Accepts: trap/write_wait, sweepea-defect/S1
#[test]
fn write_wait_ends_when_there_is_room_with_and_without_a_reader_beside_it() {
    run(async {
        for Pair(kind, theirs, ours) in channels()? {
            write_wait(&ours).await?;
            if kind == "udp" {
                continue; // What does not fit is thrown away, nobody ever waits.
            }
            let ours = Rc::new(ours);
            for with_reader in [false, kind != "pipe"] {
                fill(&ours).await?;
                let reader = spawn({
                    let ours = ours.clone();
                    async move {
                        if with_reader {
                            read_wait(&*ours).await
                        } else {
                            Ok(())
                        }
                    }
                });
                let writer = spawn({
                    let ours = ours.clone();
                    async move { write_wait(&*ours).await }
                });
                settle().await;
                if kind != "tcp" {
                    // The ends of a TCP connection go on moving what is on its way, and room may come by itself.
                    let reading = with_reader.then(|| reader.id());
                    assert_eq!(io_waiting(&*ours), (reading, Some(writer.id())), "{kind}");
                    let early = timeout_after(ms(1), writer.wait()).await;
                    assert_eq!(early, Err(Interrupt::TaskTimeout), "{kind}");
                }
                // TCP tells of room when a good part is free: keep draining.
                while !writer.is_terminated() {
                    drain(&theirs);
                    sleep(ms(1)).await?;
                }
                writer.join().await.unwrap()?;
                if with_reader {
                    assert!(!reader.is_terminated(), "{kind}: nothing to read");
                    rustix::io::write(&theirs, b"x")?;
                }
                reader.join().await.unwrap()?;
                drain(&ours);
            }
        }
        Ok(())
    });
}

/// Accepts: sweepea-defect/S2, sweepea-defect/S5
#[test]
fn a_second_writer_is_refused_and_neither_reader_nor_writer_is_lost() {
    run(async {
        for Pair(kind, ours, theirs) in pairs()? {
            if kind == "udp" {
                continue;
            }
            fill(&ours).await?;
            let ours = Rc::new(ours);
            let reader = spawn({
                let ours = ours.clone();
                async move { read_wait(&*ours).await }
            });
            let writer = spawn({
                let ours = ours.clone();
                async move { write_wait(&*ours).await }
            });
            settle().await;
            for (second, writing) in [
                (write_wait(&*ours).await.unwrap_err(), true),
                (read_wait(&*ours).await.unwrap_err(), false),
            ] {
                assert_eq!(second.kind(), ErrorKind::ResourceBusy, "{kind}");
                let busy = second.get_ref().unwrap().downcast_ref();
                assert_eq!(busy, Some(&ResourceBusy { writing }), "{kind}");
            }
            assert_eq!(io_waiting(&*ours), (Some(reader.id()), Some(writer.id())));
            rustix::io::write(&theirs, b"x")?;
            reader.join().await.unwrap()?;
            assert!(!writer.is_terminated(), "{kind}");
            while !writer.is_terminated() {
                drain(&theirs);
                sleep(ms(1)).await?;
            }
            writer.join().await.unwrap()?;
        }
        Ok(())
    });
}

/// The same through the types whose readiness the kernel remembers.
///
/// Accepts: sweepea-defect/S1, sweepea-defect/S2
#[test]
fn a_stream_is_read_and_written_at_once_by_two_tasks() {
    async fn both_ways(ours: Rc<KernelUnixStream>) -> io::Result<()> {
        const MUCH: usize = 3 << 20;
        let writer = spawn({
            let ours = ours.clone();
            async move { ours.write_all(&vec![7; MUCH]).await }
        });
        let mut buf = vec![0; 65_536];
        let mut left = MUCH;
        while left > 0 {
            left -= ours.read(&mut buf).await?;
        }
        writer.join().await.unwrap()?;
        Ok(())
    }
    run(async {
        let (a, b) = KernelUnixStream::pair()?;
        let other = spawn(both_ways(Rc::new(b)));
        both_ways(Rc::new(a)).await?;
        other.join().await.unwrap()
    });
}

/// Accepts: sweepea-defect/S3
#[test]
fn a_task_reads_sleeps_locks_joins_and_reads_again_on_every_kind_of_descriptor() {
    run(async {
        for Pair(kind, ours, theirs) in channels()? {
            let ours = Rc::new(ours);
            let lock = Rc::new(Lock::new(()));
            let reader = spawn({
                let (lock, ours) = (lock.clone(), ours.clone());
                async move {
                    let source = Source::new(&*ours);
                    let mut buf = [0; 10];
                    let mut lengths = Vec::new();
                    for _ in 0..3 {
                        let read = || Ok(rustix::io::read(&*ours, &mut buf)?);
                        lengths.push(source.ready_op(Direction::Read, read).await?);
                        sleep(ms(1)).await?;
                        drop(lock.acquire().await?);
                        spawn(sleep(ms(1))).join().await.unwrap()?;
                    }
                    io::Result::Ok(lengths)
                }
            });
            for data in [&b"1"[..], b"22", b"333"] {
                while io_waiting(&*ours).0 != Some(reader.id()) {
                    yield_now().await?;
                }
                let held = lock.acquire().await?;
                rustix::io::write(&theirs, data)?;
                sleep(ms(3)).await?;
                drop(held);
            }
            assert_eq!(reader.join().await.unwrap()?, [1, 2, 3], "{kind}");
        }
        Ok(())
    });
}

/// Accepts: sweepea-defect/S4
#[test]
fn a_peer_that_goes_away_wakes_whoever_waits_alone() {
    run(async {
        for (kind, ours, theirs) in channels()?.into_iter().map(|Pair(kind, a, b)| (kind, a, b)) {
            if kind == "unix datagram" {
                continue; // Has no end: the reader waits on.
            }
            let ours = Rc::new(ours);
            let reader = spawn({
                let ours = ours.clone();
                async move { read_wait(&*ours).await }
            });
            settle().await;
            if kind == "tcp" {
                // Unread data make it a reset instead of an end.
                rustix::io::write(&*ours, b"x")?;
                read_wait(&theirs).await?;
            }
            drop(theirs);
            if kind == "udp" {
                // Only who sends learns that nobody is there.
                rustix::io::write(&*ours, b"x")?;
            }
            reader.join().await.unwrap()?;
            let read = rustix::io::read(&*ours, &mut [0; 10]);
            let expected = match kind {
                "tcp" => Err(rustix::io::Errno::CONNRESET),
                "udp" => Err(rustix::io::Errno::CONNREFUSED),
                _ => Ok(0),
            };
            assert_eq!(read, expected, "{kind}");
        }
        for Pair(kind, theirs, ours) in channels()? {
            if kind == "udp" {
                continue;
            }
            fill(&ours).await?;
            let ours = Rc::new(ours);
            let writer = spawn({
                let ours = ours.clone();
                async move { write_wait(&*ours).await }
            });
            settle().await;
            drop(theirs);
            writer.join().await.unwrap()?;
            assert!(rustix::io::write(&*ours, b"x").is_err(), "{kind}");
        }
        sleep(ms(1)).await?;
        Ok(())
    });
}

/// Both are ready in one batch of events; whichever runs first makes the other's event stale.
///
/// Accepts: sweepea-defect/S6
#[test]
fn an_event_of_a_descriptor_that_is_gone_by_then_harms_nobody() {
    run(async {
        for (first, second) in channels()?.into_iter().zip(channels()?) {
            let kind = first.0;
            let theirs = [first.2, second.2];
            let victims = Rc::new(std::cell::RefCell::new(Vec::new()));
            let won = Rc::new(Cell::new(0));
            for ours in [first.1, second.1] {
                let task = spawn({
                    let (victims, won) = (victims.clone(), won.clone());
                    async move {
                        read_wait(&ours).await.unwrap();
                        won.set(won.get() + 1);
                        let me = kernel::current_task();
                        let others: Vec<kernel::TaskRef> = victims.take();
                        for other in others {
                            if other != me {
                                other.abort();
                            }
                        }
                        // Another descriptor takes the number of one that was closed, unless another thread is quicker.
                        let (next, _peer) = UnixStream::pair().unwrap();
                        let late = timeout_after(ms(2), read_wait(&next)).await;
                        assert!(late.is_err(), "an event of its predecessor");
                    }
                });
                victims.borrow_mut().push(task.to_ref());
            }
            let tasks = victims.borrow().clone();
            settle().await;
            for theirs in &theirs {
                rustix::io::write(theirs, b"x")?;
            }
            for task in tasks {
                task.wait().await?;
            }
            // The network may take its time; then they come one by one.
            if !matches!(kind, "tcp" | "udp") {
                assert_eq!(won.get(), 1, "{kind}");
            }
        }
        Ok(())
    });
}
