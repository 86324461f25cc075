//! What is left when kernels are gone: no descriptor, no thread, no child, and of their tasks no body and nothing that a body held.
//!
//! Descriptors and threads belong to the process, so each scene has one to itself; its neighbours would open some meanwhile. What a kernel
//! leaves in its own tables is tested beside these, and memory is the address sanitizer's.

use std::future::pending;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs, io, thread};

use kernel::net::{Stream, TcpListener, TcpStream, UdpSocket, UnixStream};
use kernel::signal::{self, SignalEvent, SignalQueue};
use kernel::sync::{Lock, Queue, UniversalEvent, UniversalQueue};
use kernel::{
    Interrupt, Kernel, Remote, TaskGroup, ThreadPool, Wait, process, run_in_thread, shield, sleep,
    spawn, spawn_thread, timeout_after, yield_now,
};
use rig::Deadline;

/// More than there are ids for kernels, so that all are used again.
const KERNELS: usize = 5000;

const HOUR: Duration = Duration::from_secs(3600);

/// Plays a scene, an ignored test named with its module, in a process of its own.
pub(crate) fn play(scene: &str) {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--test-threads", "1"]);
    let played = command.arg(scene).output().unwrap();
    let text = String::from_utf8_lossy(&played.stdout);
    let errors = String::from_utf8_lossy(&played.stderr);
    // Under the leak sanitizer a test that passes may end with an error.
    assert!(
        played.status.success() && text.contains("1 passed"),
        "{}\n{text}\n{errors}",
        played.status
    );
}

/// The descriptors and the threads of this process.
pub(crate) fn held() -> (Vec<String>, usize) {
    let entries = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    // Without the folder that is being read.
    let links = links.filter(|link| !link.ends_with("fd"));
    let mut descriptors: Vec<_> = links.map(|link| kind(&link.to_string_lossy())).collect();
    descriptors.sort_unstable();
    (
        descriptors,
        fs::read_dir("/proc/self/task").unwrap().count(),
    )
}

/// `socket:[123]` without the number.
fn kind(link: &str) -> String {
    link.split('[').next().unwrap().to_owned()
}

/// Does it once for what is made once in a process, then again and again; then there is as much as after the first time. Threads get the time to
/// end.
fn leaves_nothing(times: usize, mut step: impl FnMut(usize, &Arc<()>)) {
    let bodies = Arc::new(());
    step(0, &bodies);
    let threads_end = |most: usize| {
        let deadline = Deadline::default();
        while held().1 > most && deadline.left().is_some() {
            thread::yield_now();
        }
    };
    // The pool of the process keeps one thread, libtest has two.
    threads_end(3);
    let before = held();
    for n in 1..=times {
        step(n, &bodies);
    }
    threads_end(before.1);
    assert_eq!(held(), before);
    assert_eq!(Arc::strong_count(&bodies), 1, "bodies are left");
}

/// Ends a kernel in one of the ways in which one can end.
fn end(mut kernel: Kernel<'_>, n: usize, bodies: &Arc<()>) -> Option<Remote> {
    let body = bodies.clone();
    match n % 5 {
        0 => drop(kernel),
        1 => drop(kernel.shutdown(None).unwrap()),
        2 => drop(kernel.shutdown(Some(Duration::ZERO)).unwrap()),
        3 => {
            // Tasks that nobody has polled yet.
            kernel.spawn(async move {
                let _body = body;
                pending::<()>().await;
            });
        }
        _ => {
            let remote = kernel.remote();
            remote.call(move || drop(body));
            kernel.run(yield_now()).unwrap().unwrap();
            let late = bodies.clone();
            drop(kernel);
            assert!(!remote.call(move || drop(late)));
            return Some(remote);
        }
    }
    None
}

#[test]
fn thousands_of_kernels_leave_nothing() {
    play("kernel_leaks::kernels");
}

#[test]
#[ignore = "counts what its process holds; run by the test above"]
fn kernels() {
    let event = UniversalEvent::new();
    let mut remotes = Vec::new();
    leaves_nothing(KERNELS, |n, bodies| {
        let mut kernel = Kernel::new().unwrap();
        for way in 0..4 {
            let (body, event) = (bodies.clone(), event.clone());
            kernel.spawn(async move {
                let _body = body;
                match way {
                    0 => drop(sleep(HOUR).await),
                    1 => event.wait().await.unwrap_or_default(),
                    2 => {
                        drop(shield(timeout_after(HOUR, pending::<Result<(), Interrupt>>())).await)
                    }
                    _ => {
                        let (ours, theirs) = UnixStream::pair().unwrap();
                        let child = spawn(async move { ours.read(&mut [0]).await });
                        child.set_name("reader");
                        let _ = child.wait().await;
                        drop(theirs);
                    }
                }
            });
        }
        kernel
            .run(async {
                yield_now().await.unwrap();
                yield_now().await.unwrap();
            })
            .unwrap();
        // A shutdown with all the time in the world waits for the second and third kind, which no cancellation ends.
        let n = if n % 5 == 1 { n + 1 } else { n };
        remotes.extend(end(kernel, n, bodies));
    });
    assert!(remotes.iter().all(|remote| !remote.call(|| ())));
}

#[test]
fn a_kernel_that_did_everything_leaves_nothing() {
    play("kernel_leaks::everything");
}

#[test]
#[ignore = "counts what its process holds; run by the test above"]
fn everything() {
    leaves_nothing(40, |n, bodies| {
        let mut kernel = Kernel::new().unwrap();
        let main = do_everything(bodies.clone());
        kernel.run(timeout_after(HOUR, main)).unwrap().unwrap();
        end(kernel, n, bodies);
        // No child, nor the zombie of one.
        assert!(rustix::process::wait(rustix::process::WaitOptions::NOHANG).is_err());
    });
}

async fn do_everything(body: Arc<()>) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?).await?;
    let (server, _) = listener.accept().await?;
    let held = body.clone();
    spawn(async move {
        let _held = held;
        let mut stream = Stream::new(server);
        stream.read_until(b'\n', 100).await.map(drop)
    });
    client.write_all(b"no end of line").await?;
    let held = body.clone();
    spawn(async move {
        let _held = (held, client);
        let _ = listener.accept().await;
    });
    let udp = UdpSocket::bind("127.0.0.1:0")?;
    spawn(async move { udp.recv_from(&mut [0; 8]).await.map(drop) });

    let mut cat = process::Command::new("cat");
    let cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped());
    assert_eq!(
        cat.output(b"to the cat").await.unwrap().stdout,
        b"to the cat"
    );
    let killed = cat.spawn()?;
    killed.kill()?;
    killed.wait().await?;
    let signals = SignalQueue::new(&[signal::SIGUSR1])?;
    let event = SignalEvent::new(&[signal::SIGUSR2])?;
    spawn(async move { event.wait().await });
    spawn(async move { signals.next().await.map(drop) });

    let held = body.clone();
    assert_eq!(
        run_in_thread(move || Arc::strong_count(&held) > 1).await,
        Ok(true)
    );
    let pool = ThreadPool::new(2);
    for _ in 0..4 {
        pool.run(thread::yield_now).await?;
    }
    let held = body.clone();
    let asynchronous = spawn_thread(move || {
        let _held = held;
        kernel::thread::run(|| sleep(Duration::ZERO)).map(drop)
    });
    let _ = asynchronous.join().await;

    let (lock, queue) = (Lock::new(body.clone()), Queue::new(None));
    queue.put(body.clone()).await.unwrap();
    spawn(async move {
        let _guard = lock.acquire().await;
        let _item = (queue.get().await, queue.get().await);
    });
    let universal = UniversalQueue::new(Some(1));
    universal.put(body.clone()).await.unwrap();
    let held = body.clone();
    spawn(async move { universal.put(held).await.map(drop) });

    let mut group = TaskGroup::new(Wait::Any);
    for seconds in [0, 3600] {
        let held = body.clone();
        group.spawn(async move {
            let _held = held;
            sleep(Duration::from_secs(seconds)).await
        });
    }
    group.join().await?;
    let held = body.clone();
    let panicked = spawn(async move {
        let _held = held;
        panic!("contained")
    });
    let _: Result<(), _> = panicked.join().await;
    let held = body;
    let aborted = spawn(async move {
        let _held = held;
        pending::<()>().await;
    });
    yield_now().await?;
    aborted.abort();
    Ok(())
}
