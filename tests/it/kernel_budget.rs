//! How many system calls the kernel makes for what it does, counted from outside, by strace.
//!
//! A scene runs in a process of its own, under strace, and marks the part that counts by asking for files that do not exist. Counting inside
//! the process would be cheaper, but would see only the calls that somebody thought of; and `/proc/PID/io` does not count what
//! sockets send and receive.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io::{Read, Write};
use std::net;
use std::os::unix::net as net_unix;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::task::{Poll, Waker};
use std::thread;
use std::time::Duration;
use std::{env, fs, hint};

use kernel::net::{TcpListener, UnixStream};
use kernel::sync::UniversalEvent;
use kernel::{Builder, ProcessPool, VirtualClock, sleep, spawn, yield_now};
use rig::Deadline;

/// How often a scene does what it is about.
const TIMES: usize = 500;

/// What the process did between the marks.
struct Calls {
    /// The thread that the first mark named.
    kernel: BTreeMap<String, usize>,
    others: BTreeMap<String, usize>,
}

/// Plays a scene: an ignored test of this module.
fn calls_in(scene: &str) -> Calls {
    let trace = env::temp_dir().join(rig::unique("strace"));
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o"]).arg(&trace);
    strace.arg(env::current_exe().unwrap());
    strace.args(["--ignored", "--exact", "--test-threads", "1"]);
    let played = strace.arg(format!("kernel_budget::{scene}")).output();
    let played = played.expect("install first: strace (tests/run does)");
    let text = fs::read_to_string(&trace).unwrap_or_default();
    let _ = fs::remove_file(&trace);
    assert!(played.status.success(), "{played:?}");

    let (_, marked) = text
        .split_once("/budget/begin/")
        .expect("a scene has marks");
    let (marked, _) = marked.split_once("/budget/end").expect("a scene has marks");
    let (kernel, marked) = marked.split_once('"').unwrap();
    let mut calls = Calls {
        kernel: BTreeMap::new(),
        others: BTreeMap::new(),
    };
    // The rest of the first mark's line, and the beginning of the last one's.
    let lines: Vec<_> = marked.lines().collect();
    for line in &lines[1..lines.len() - 1] {
        let (thread, call) = line.trim_start().split_once(char::is_whitespace).unwrap();
        let name: String = call
            .trim_start()
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        if name.is_empty() {
            continue; // a call that was interrupted in the log goes on, or a signal
        }
        let side = if thread == kernel {
            &mut calls.kernel
        } else {
            &mut calls.others
        };
        *side.entry(name).or_default() += 1;
    }
    calls
}

fn total(calls: &BTreeMap<String, usize>) -> usize {
    calls.values().sum()
}

/// The number of the calling thread.
/// The number of this thread.
pub(crate) fn thread_id() -> String {
    let path = fs::read_link("/proc/thread-self").unwrap();
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

/// From here on it counts. `kernel` is the kernel's thread.
fn begin(kernel: &str) {
    let _ = fs::metadata(format!("/budget/begin/{kernel}"));
}

fn end() {
    let _ = fs::metadata("/budget/end");
}

/// Waits until a thread of this process sleeps in a system call.
pub(crate) fn wait_until_asleep(thread: &str) {
    let deadline = Deadline::default();
    loop {
        let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
        let (_, state) = stat.rsplit_once(") ").unwrap();
        if state.starts_with('S') {
            return;
        }
        assert!(deadline.left().is_some(), "it does not sleep: {stat}");
        thread::yield_now();
    }
}

/// Waits, in a task, until somebody has called the waker that it sends.
async fn wait_for_wake(wakers: &mpsc::Sender<Waker>) {
    let mut is_sent = false;
    poll_fn(|cx| {
        if is_sent {
            return Poll::Ready(());
        }
        is_sent = true;
        wakers.send(cx.waker().clone()).unwrap();
        Poll::Pending
    })
    .await;
}

#[test]
fn an_echo_takes_three_system_calls_a_message() {
    let calls = calls_in("echo");
    // If the peer is quick, a message is there before anybody waits for it; the first that is not costs a look and a registration.
    let calls_a_message = 2 * TIMES..=3 * TIMES + 2;
    assert!(
        calls_a_message.contains(&total(&calls.kernel)),
        "{:?}",
        calls.kernel
    );
}

#[test]
#[ignore = "runs under strace, by the test above"]
fn echo() {
    let main = async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = thread::spawn(move || {
            let mut stream = net::TcpStream::connect(address).unwrap();
            let mut buf = [7; 64];
            for _ in 0..TIMES + 2 {
                stream.write_all(&buf).unwrap();
                stream.read_exact(&mut buf).unwrap();
            }
        });
        let (stream, _) = listener.accept().await.unwrap();
        for n in 0..TIMES + 2 {
            match n {
                1 => begin(&thread_id()),
                _ if n == TIMES + 1 => end(),
                _ => {}
            }
            let mut buf = [0; 128];
            let len = stream.read(&mut buf).await.unwrap();
            stream.write_all(&buf[..len]).await.unwrap();
        }
        client.join().unwrap();
    };
    kernel::run(main).unwrap();
}

/// The system tells of a Unix socket that it can be written to whenever the peer has read.
#[test]
fn nobody_is_woken_to_write_who_did_not_wait_for_it() {
    let calls = calls_in("peer_that_reads");
    assert_eq!(total(&calls.kernel), 3 * TIMES, "{:?}", calls.kernel);
}

#[test]
#[ignore = "runs under strace, by the test above"]
fn peer_that_reads() {
    let (ours, mut theirs) = net_unix::UnixStream::pair().unwrap();
    let kernel = thread_id();
    let client = thread::spawn(move || {
        let mut buf = [7];
        for n in 0..=TIMES {
            wait_until_asleep(&kernel);
            match n {
                0 => begin(&kernel),
                TIMES => end(),
                _ => {}
            }
            theirs.read_exact(&mut buf).unwrap();
            // Whatever that woke it for is over.
            wait_until_asleep(&kernel);
            theirs.write_all(&buf).unwrap();
        }
    });
    let main = async {
        let ours = UnixStream::from_std(ours).unwrap();
        let mut buf = [0; 2];
        for _ in 0..=TIMES {
            ours.write_all(&[7]).await.unwrap();
            assert_eq!(ours.read(&mut buf).await.unwrap(), 1);
        }
    };
    kernel::run(main).unwrap();
    client.join().unwrap();
}

#[test]
fn a_call_in_a_process_takes_three_system_calls() {
    let calls = calls_in("calls_in_a_process");
    // If the first answer was there before anybody waited for it, the second costs a look and a registration.
    let all_calls = 3 * TIMES..=3 * TIMES + 2;
    assert!(
        all_calls.contains(&total(&calls.kernel)),
        "{:?}",
        calls.kernel
    );
}

#[test]
#[ignore = "runs under strace, by the test above"]
fn calls_in_a_process() {
    let main = async {
        let pool = ProcessPool::new(1).program(env!("CARGO_BIN_EXE_process-worker"));
        pool.run("square", "1").await.unwrap();
        begin(&thread_id());
        for _ in 0..TIMES {
            assert_eq!(pool.run("square", "12").await.unwrap(), b"144");
        }
        end();
    };
    kernel::run(main).unwrap();
}

#[test]
fn an_idle_kernel_makes_no_system_call() {
    let calls = calls_in("idle");
    assert_eq!(calls.kernel, BTreeMap::new());
}

#[test]
#[ignore = "runs under strace, by the test above"]
fn idle() {
    let (kernel, event) = (thread_id(), UniversalEvent::new());
    let waker = event.clone();
    let other = thread::spawn(move || {
        wait_until_asleep(&kernel);
        begin(&kernel);
        // That nothing happens for a while can be seen only by waiting for a while.
        thread::sleep(Duration::from_millis(300));
        end();
        waker.set();
    });
    let main = async {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        spawn(async move { ours.read(&mut [0]).await });
        spawn(sleep(Duration::from_secs(3600)));
        event.wait().await.unwrap();
    };
    kernel::run(main).unwrap();
    other.join().unwrap();
}

#[test]
fn wakes_of_a_running_kernel_are_no_system_calls() {
    let calls = calls_in("wakes_while_it_runs");
    assert_eq!(calls.kernel, BTreeMap::new());
    assert_eq!(calls.others.get("write"), None, "{:?}", calls.others);
}

#[test]
#[ignore = "runs under strace, by the test above"]
fn wakes_while_it_runs() {
    let is_done = Arc::new(AtomicBool::new(false));
    let main = async {
        let (kernel, done) = (thread_id(), is_done.clone());
        let (wakers, sent) = mpsc::channel();
        let tasks = [(); 2].map(|()| {
            let wakers = wakers.clone();
            spawn(async move { wait_for_wake(&wakers).await })
        });
        yield_now().await.unwrap();
        let wakers = [sent.recv().unwrap(), sent.recv().unwrap()];
        let other = thread::spawn(move || {
            begin(&kernel);
            // In turn, since neighbours that say the same are merged.
            for n in 0..TIMES {
                wakers[n % 2].wake_by_ref();
            }
            end();
            done.store(true, Ordering::Release);
        });
        while !is_done.load(Ordering::Acquire) {
            hint::spin_loop();
        }
        for task in tasks {
            task.join().await.unwrap();
        }
        other.join().unwrap();
    };
    kernel::run(main).unwrap();
}

#[test]
fn a_wake_of_a_sleeping_kernel_is_one_write_and_one_wait() {
    let mut calls = calls_in("wakes_while_it_sleeps");
    calls.kernel.remove("futex"); // the scene's channel
    assert_eq!(
        calls.others.get("write"),
        Some(&TIMES),
        "{:?}",
        calls.others
    );
    assert_eq!(total(&calls.kernel), TIMES, "{:?}", calls.kernel);
}

#[test]
#[ignore = "runs under strace, by the test above"]
fn wakes_while_it_sleeps() {
    let kernel = thread_id();
    let (wakers, sent) = mpsc::channel::<Waker>();
    let other = thread::spawn(move || {
        for n in 0..=TIMES {
            let waker = sent.recv().unwrap();
            wait_until_asleep(&kernel);
            match n {
                0 => begin(&kernel),
                TIMES => end(),
                _ => {}
            }
            waker.wake();
        }
    });
    let main = async {
        for _ in 0..=TIMES {
            wait_for_wake(&wakers).await;
        }
    };
    kernel::run(main).unwrap();
    other.join().unwrap();
}

/// On the virtual clock, where no time passes, so that the kernel looks outside by the number of polls alone.
#[test]
fn a_busy_kernel_looks_outside_every_61_polls() {
    let calls = calls_in("busy");
    assert_eq!(total(&calls.kernel), TIMES, "{:?}", calls.kernel);
}

#[test]
#[ignore = "runs under strace, by the test above"]
fn busy() {
    let mut kernel = Builder::new().clock(VirtualClock::new()).build().unwrap();
    let main = async {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        spawn(async move { ours.read(&mut [0]).await });
        yield_now().await.unwrap();
        begin(&thread_id());
        for _ in 0..61 * TIMES {
            yield_now().await.unwrap();
        }
        end();
    };
    kernel.run(main).unwrap();
}
