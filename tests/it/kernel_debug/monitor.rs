//! The monitor, as clients on other threads see it. In real time.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kernel::monitor::MonitorAddress;
use kernel::signal::{SIGUSR2, SignalQueue};
use kernel::traps::{Lot, sched_wait};
use kernel::{
    Builder, Interrupt, Kernel, Reason, RunError, WaitKind, run_in_thread, sleep, spawn,
    timeout_after, yield_now,
};
use rig::Deadline;

use super::{s, virtual_builder};

const PROMPT: &str = "kernel> ";

fn watched<'env>() -> (Kernel<'env>, std::net::SocketAddr) {
    watched_by(Builder::new())
}

fn watched_by<'env>(builder: Builder) -> (Kernel<'env>, std::net::SocketAddr) {
    let kernel = builder
        .monitor(MonitorAddress::loopback(0))
        .build()
        .unwrap();
    let Some(&MonitorAddress::Tcp(address)) = kernel.monitor() else {
        panic!("{:?}", kernel.monitor());
    };
    assert!(address.ip().is_loopback() && address.port() != 0);
    (kernel, address)
}

/// One connection to a monitor.
struct Client<S>(BufReader<S>);

impl Client<TcpStream> {
    fn connect(address: std::net::SocketAddr) -> Self {
        Self::greeted(TcpStream::connect(address).unwrap())
    }
}

impl<S: Read + Write> Client<S> {
    fn greeted(stream: S) -> Self {
        let mut client = Self(BufReader::new(stream));
        let greeting = client.answer();
        assert!(
            greeting.starts_with("kernel monitor, process "),
            "{greeting}"
        );
        client
    }

    /// What comes up to the next prompt.
    fn answer(&mut self) -> String {
        let mut text = Vec::new();
        while !text.ends_with(PROMPT.as_bytes()) {
            let before = text.len();
            self.0.read_until(b' ', &mut text).unwrap();
            assert!(
                text.len() > before,
                "hung up after {:?}",
                String::from_utf8_lossy(&text)
            );
        }
        let text = String::from_utf8(text).unwrap();
        text.strip_suffix(PROMPT).unwrap().to_owned()
    }

    fn ask(&mut self, command: &str) -> String {
        writeln!(self.0.get_mut(), "{command}").unwrap();
        self.answer()
    }

    /// What comes until the monitor hangs up.
    fn rest(mut self) -> String {
        let mut text = String::new();
        match self.0.read_to_string(&mut text) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("{error}"),
        }
        text
    }
}

/// The row of a task in the answer to `ps`, as words.
fn row(ps: &str, task: u64) -> Vec<String> {
    let rows = ps
        .lines()
        .map(|line| line.split_whitespace().map(str::to_owned).collect());
    let mut found = rows.filter(|row: &Vec<_>| row[0] == task.to_string());
    found
        .next()
        .unwrap_or_else(|| panic!("no task {task} in\n{ps}"))
}

/// A little world: a task that waits for a lock, one that sleeps inside a timeout, both children of a parent that waits for the one.
/// The parent has the number 2, its children 3 and 4. `hold` spins, as task 5, until the test lets go.
async fn world(hold: impl FnOnce() + 'static) -> (Result<(), Interrupt>, Result<(), Interrupt>) {
    let lot = Rc::new(Lot::new());
    let parent = spawn(async move {
        let locked = spawn(async move { sched_wait(&lot, WaitKind::Lock).await });
        locked.set_name("locked");
        let sleeper = spawn(timeout_after(s(3600), async {
            sleep(s(1800)).await.map(drop)
        }));
        sleeper.set_name("sleep\ner");
        let outcome = locked.join().await.unwrap();
        sleeper.request_cancel(Reason::default());
        (outcome, sleeper.join().await.unwrap())
    });
    parent.set_name("parent");
    yield_now().await.unwrap();
    yield_now().await.unwrap();
    let spinner = spawn(async move { hold() });
    spinner.set_name("spinner");
    spinner.join().await.unwrap();
    parent.join().await.unwrap()
}

/// Accepts: debug/monitor
#[test]
fn the_monitor_answers_while_a_task_spins() {
    let (mut kernel, address) = watched();
    let (spins, spinning) = mpsc::channel();
    let (let_go, may_go) = mpsc::channel::<()>();
    let client = thread::spawn(move || {
        spinning.recv().unwrap();
        let mut client = Client::connect(address);

        let ps = client.ask("ps");
        assert!(
            ps.contains("task 5 runs now, without a break for at least "),
            "{ps}"
        );
        assert_eq!(ps.lines().count(), 7, "{ps}");
        let words = |task| row(&ps, task)[1..].join(" ");
        assert!(words(1).starts_with("Join "), "{ps}");
        assert!(words(2).starts_with("Join 1 - - \"parent\""), "{ps}");
        assert_eq!(words(3), "Lock 1 - - \"locked\"", "{ps}");
        let sleeper = row(&ps, 4);
        let seconds = |word: &str| word.trim_end_matches('s').parse::<f32>().unwrap();
        assert_eq!((&*sleeper[1], &*sleeper[2]), ("Sleep", "1"), "{ps}");
        assert!((1.0..=3600.0).contains(&seconds(&sleeper[3])), "{ps}");
        assert!((1.0..=1800.0).contains(&seconds(&sleeper[4])), "{ps}");
        assert_eq!(
            sleeper[5], "\"sleep\\ner\"",
            "a name cannot break a line: {ps}"
        );
        assert_eq!(words(5), "RUNNING 0 - - \"spinner\"", "{ps}");
        assert_eq!(row(&client.ask("ps 4"), 4)[1], "Sleep");
        assert!(!client.ask("ps 4").contains("locked"));

        let locked = client.ask("where 3");
        let lines: Vec<_> = locked.lines().collect();
        let here = concat!("spawned at ", file!(), ":");
        assert!(
            lines[0].starts_with("task 3 \"locked\" ") && lines[0].contains(here),
            "{locked}"
        );
        assert!(
            lines[1].starts_with(concat!("  waits for Lock at ", file!(), ":")),
            "{locked}"
        );
        let sleeper = client.ask("where 4");
        assert!(sleeper.contains("\n  waits for Sleep at "), "{sleeper}");
        assert!(sleeper.contains("\n  sleep ends in "), "{sleeper}");
        assert!(sleeper.contains("\n  timeout ends in "), "{sleeper}");
        let deadline = Deadline::default();
        loop {
            let spinner = client.ask("where 5");
            let (_, time) = spinner
                .split_once("\n  runs without a break for at least ")
                .unwrap_or_else(|| panic!("{spinner}"));
            let time = time.trim_end();
            let is_long = match time.strip_suffix("ms") {
                Some(millis) => millis.parse::<f32>().unwrap() >= 50.0,
                None => !time.ends_with("µs") && seconds(time) >= 1.0,
            };
            if is_long {
                break;
            }
            assert!(
                deadline.left().is_some(),
                "its time stands still: {spinner}"
            );
        }
        assert_eq!(client.ask("where 99"), "there is no task 99\n");
        assert_eq!(client.ask("where x"), "\"x\" is no number of a task\n");

        let parents = client.ask("parents 3");
        let lines: Vec<_> = parents.lines().collect();
        assert!(
            lines[0].starts_with("task 3 \"locked\" spawned at "),
            "{parents}"
        );
        assert!(
            lines[1].starts_with("  by task 2 \"parent\" spawned at "),
            "{parents}"
        );
        assert!(
            lines[2].starts_with("    by task 1 spawned at "),
            "{parents}"
        );
        assert_eq!(lines.len(), 3, "{parents}");

        let signalled = client.ask("signal usr2");
        assert_eq!(signalled, "SIGUSR2 is sent\n");
        assert_eq!(client.ask("signal SIGNONE"), "\"SIGNONE\" is no signal\n");

        // The kernel's thread sees to it when it gets to it.
        let later = client.ask("cancel 3");
        assert_eq!(later, "task 3 will be cancelled once task 5 lets go\n");
        let_go.send(()).unwrap();
        client
    });
    let (outcome, signal) = kernel
        .run(async move {
            let signals = SignalQueue::new(&[SIGUSR2]).unwrap();
            let outcome = world(move || {
                spins.send(()).unwrap();
                may_go.recv().unwrap();
            });
            (outcome.await, signals.next().await)
        })
        .unwrap();
    assert_eq!(
        outcome,
        (Err(Interrupt::cancelled()), Err(Interrupt::cancelled()))
    );
    assert_eq!(signal.unwrap(), SIGUSR2);
    let mut client = client.join().unwrap();
    assert_eq!(
        client.ask("ps").lines().nth(1),
        Some("no task runs now"),
        "all have ended"
    );
    assert_eq!(client.ask(""), "");
    assert!(client.ask("help").contains("parents ID"));
    writeln!(client.0.get_mut(), "exit").unwrap();
    assert_eq!(client.rest(), "");
}

#[test]
fn the_monitor_cancels_in_a_kernel_that_runs_and_says_how_it_went() {
    let (mut kernel, address) = watched();
    let answers = kernel
        .run(async move {
            let task = spawn(async {
                let told = sleep(s(3600)).await.unwrap_err();
                sleep(Duration::from_millis(1)).await.unwrap();
                told
            });
            yield_now().await.unwrap();
            let conversation = run_in_thread(move || {
                let mut client = Client::connect(address);
                let first = client.ask("cancel 2");
                (first, client.ask("cancel 2"), client.ask("cancel 77"))
            });
            let answers = conversation.await.unwrap();
            assert_eq!(task.join().await.unwrap(), Interrupt::cancelled());
            answers
        })
        .unwrap();
    assert_eq!(answers.0, "task 2 is cancelled\n");
    // It may have cleaned up meanwhile.
    let again = ["task 2 was cancelled before\n", "there is no task 2\n"];
    assert!(again.contains(&&*answers.1), "{answers:?}");
    assert_eq!(answers.2, "there is no task 77\n");
}

#[test]
fn the_monitor_of_a_kernel_that_does_not_run_answers_and_leaves_a_note() {
    let (mut kernel, address) = watched();
    let task = kernel.spawn(sleep(s(3600)));
    let mut client = Client::connect(address);
    assert_eq!(row(&client.ask("ps"), 1)[1], "READY");
    assert_eq!(
        client.ask("cancel 1"),
        "task 1 will be cancelled once the kernel runs again\n"
    );
    assert_eq!(
        kernel.run(task.join()).unwrap().unwrap(),
        Err(Interrupt::cancelled())
    );
    let task = kernel.spawn(sleep(s(3600)));
    kernel.turn(Some(Duration::ZERO)).unwrap();
    assert_eq!(row(&client.ask("ps"), 3)[1..3], ["Sleep", "1"]);
    // What has ended is gone, and its place is taken by the next.
    task.abort();
    kernel.turn(Some(Duration::ZERO)).unwrap();
    assert_eq!(client.ask("where 3"), "there is no task 3\n");
    kernel.spawn(sleep(s(3600)));
    let orphan = client.ask("parents 4");
    assert_eq!(orphan.lines().count(), 1, "{orphan}");
}

#[test]
fn the_monitor_says_of_a_task_whether_it_was_cancelled() {
    let (mut kernel, address) = watched();
    let task = kernel.spawn(async {
        sleep(s(3600)).await.unwrap_err();
        sleep(s(3600)).await
    });
    kernel.turn(Some(Duration::ZERO)).unwrap();
    let mut client = Client::connect(address);
    let before = client.ask("where 1");
    assert!(!before.contains("cancelled"), "{before}");
    assert!(!before.contains("more"), "{before}");
    task.request_cancel(Reason::default());
    kernel.turn(Some(Duration::ZERO)).unwrap();
    let after = client.ask("where 1");
    assert!(after.ends_with("\n  was cancelled\n"), "{after}");
}

/// Who closes first keeps the connection for a minute.
#[test]
fn the_port_of_a_monitor_can_be_listened_on_again_at_once() {
    let (kernel, address) = watched();
    let client = Client::connect(address);
    drop(kernel);
    client.rest();
    let again = Builder::new().monitor(MonitorAddress::Tcp(address));
    let _kernel: Kernel<'_> = again.build().unwrap();
    Client::connect(address);
}

#[test]
fn the_parents_of_a_task_may_have_ended() {
    let (mut kernel, address) = watched();
    kernel
        .run(async move {
            spawn(async { spawn(sleep(s(3600))) }).join().await.unwrap();
            let parents = Client::connect(address).ask("parents 3");
            assert!(
                parents.ends_with("\n  by task 2, which has ended\n"),
                "{parents}"
            );
        })
        .unwrap();
}

#[test]
fn a_monitor_on_a_unix_socket_goes_with_its_kernel() {
    let path = std::env::temp_dir().join(format!("kernel-monitor-{}", std::process::id()));
    let address = MonitorAddress::Unix(path.clone());
    let kernel: Kernel<'_> = Builder::new().monitor(address.clone()).build().unwrap();
    assert_eq!(kernel.monitor(), Some(&address));
    let taken = Builder::new().monitor(address.clone()).build().unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    assert!(taken.to_string().starts_with("monitor at /"), "{taken}");
    let mut client = Client::greeted(UnixStream::connect(&path).unwrap());
    assert!(client.ask("ps").ends_with("no task runs now\n"));
    drop(kernel);
    assert!(!path.exists());
    assert_eq!(client.rest(), "", "it hung up");
}

#[test]
fn a_monitor_listens_on_loopback_only() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let at = MonitorAddress::Tcp(address.parse().unwrap());
        let refused = Builder::new().monitor(at).build().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        assert!(refused.to_string().contains("loopback only"), "{refused}");
    }
    assert!(Kernel::new().unwrap().monitor().is_none());
}

#[test]
fn what_peers_send_is_bounded_and_harms_nobody() {
    let (kernel, address) = watched();
    let send = |bytes: &[u8]| {
        let mut client = Client::connect(address);
        // The monitor may hang up before it has read all.
        let _ = client.0.get_mut().write_all(bytes);
        let _ = client.0.get_mut().shutdown(Shutdown::Write);
        client.rest()
    };
    let hung_up = |text: &str, why: &str| assert!(text.is_empty() || text.ends_with(why), "{text}");
    // A browser, and a form that it was made to send.
    let request = b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\ncancel 1\nsignal WINCH\n";
    hung_up(&send(request), "this is no client of ours\n");
    hung_up(&send(&[b'p'; 1 << 20]), "a line has at most 256 bytes\n");
    hung_up(&send(&[0xff; 200]), "this is no client of ours\n");
    assert_eq!(send(b"\r\n\n \t\nexit\nps\n").matches(PROMPT).count(), 3);
    // The last line need not end.
    let text = send(b"help\nps");
    assert!(
        text.ends_with(&format!("no task runs now\n{PROMPT}")),
        "{text}"
    );
    // After a command one may err.
    let text = send(b"help\nhelo\nwhere\nps 1 2\ncancel -1\nwhere 99999999999999999999\nsignal\n");
    let errs: Vec<_> = text.split(PROMPT).skip(1).collect();
    assert_eq!(
        errs,
        [
            "not a command; try help\n",
            "where takes something else; try help\n",
            "ps takes something else; try help\n",
            "\"-1\" is no number of a task\n",
            "\"99999999999999999999\" is no number of a task\n",
            "signal takes something else; try help\n",
            "",
        ]
    );
    const NOISE: &[u8] = b"ps where\xff\n\0 \r12cancel";
    for seed in 0..200_u32 {
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        let noise = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            NOISE[state as usize % NOISE.len()]
        });
        send(&noise.take(300).collect::<Vec<_>>());
    }
    assert!(
        Client::connect(address)
            .ask("ps")
            .ends_with("no task runs now\n")
    );
    drop(kernel);
    assert!(
        TcpStream::connect(address).is_err(),
        "nobody listens any more"
    );
}

#[test]
fn a_monitor_has_room_for_eight_clients() {
    let (_kernel, address) = watched();
    let mut clients: Vec<_> = (0..8).map(|_| Client::connect(address)).collect();
    let mut refused = String::new();
    TcpStream::connect(address)
        .unwrap()
        .read_to_string(&mut refused)
        .unwrap();
    assert_eq!(refused, "8 clients are connected already\n");
    for client in &mut clients {
        assert!(client.ask("help").contains("cancel"));
    }
    // Whoever leaves makes room.
    let mut leaver = clients.pop().unwrap();
    writeln!(leaver.0.get_mut(), "exit").unwrap();
    assert_eq!(leaver.rest(), "");
    loop {
        let mut stream = BufReader::new(TcpStream::connect(address).unwrap());
        let mut line = String::new();
        stream.read_line(&mut line).unwrap_or_default();
        if line.starts_with("kernel monitor") {
            break;
        }
        thread::yield_now(); // its thread has hung up, and is about to count itself out
    }
}

#[test]
fn thousands_of_tasks_are_listed_a_thousand_at_a_time() {
    let (mut kernel, address) = watched();
    kernel
        .run(async move {
            for _ in 0..2500 {
                spawn(sleep(s(3600)));
            }
            yield_now().await.unwrap();
            let mut client = Client::connect(address);
            let (mut from, mut seen) = (0, Vec::new());
            loop {
                let page = client.ask(&format!("ps {from}"));
                let rows = page
                    .lines()
                    .filter(|line| line.contains(" Sleep ") && !line.contains("State"));
                seen.extend(rows.map(|row| {
                    row.split_whitespace()
                        .next()
                        .unwrap()
                        .parse::<u64>()
                        .unwrap()
                }));
                let Some(next) = page.split(" more; ps ").nth(1) else {
                    break;
                };
                from = next.split(' ').next().unwrap().parse().unwrap();
                assert!(page.lines().count() <= 1003);
            }
            assert!(seen.into_iter().eq(2..=2501));
        })
        .unwrap();
}

#[test]
fn a_kernel_on_a_virtual_clock_has_no_times_to_show() {
    let (mut kernel, address) = watched_by(virtual_builder().0);
    let naps = Rc::new(Cell::new(0));
    kernel
        .run(async {
            let counted = naps.clone();
            let sleeper = spawn(async move {
                loop {
                    sleep(s(1000)).await?;
                    counted.set(counted.get() + 1);
                }
                #[expect(unreachable_code, reason = "names the type")]
                Ok::<(), Interrupt>(())
            });
            sleep(s(1500)).await.unwrap();
            let ps = Client::connect(address).ask("ps");
            assert_eq!(
                row(&ps, sleeper.id().get())[1..5],
                ["Sleep", "2", "-", "-"],
                "{ps}"
            );
        })
        .unwrap();
    assert_eq!(naps.get(), 1);
}

#[test]
fn a_monitor_is_no_reason_to_hope_in_a_deadlock() {
    let (mut kernel, _) = watched();
    let outcome = kernel.run(async { kernel::current_task().wait().await });
    assert!(matches!(outcome, Err(RunError::Deadlock(_))));
}

/// The board is written while others read it: no row is ever half of one task and half of another.
#[test]
fn what_a_monitor_shows_is_never_torn() {
    let (mut kernel, address) = watched();
    let (done, is_done) = mpsc::channel::<()>();
    let reader = thread::spawn(move || {
        let mut client = Client::connect(address);
        let mut looks = 0;
        while is_done.try_recv() == Err(mpsc::TryRecvError::Empty) {
            let ps = client.ask("ps");
            for line in ps
                .lines()
                .skip(1)
                .filter(|line| !line.contains(" runs now"))
            {
                if line == "no task runs now" {
                    continue;
                }
                let words: Vec<_> = line.split_whitespace().collect();
                let (id, state, place) = (words[0].parse::<u64>().unwrap(), words[1], words[7]);
                let line: u32 = place.split(':').nth(1).unwrap().parse().unwrap();
                let (wait, spawned) = match (id, id % 2) {
                    (1, _) => continue,
                    (_, 0) => ("Lock", LOCKED),
                    _ => ("Event", EXPECTANT),
                };
                assert!(["READY", "RUNNING", wait].contains(&state), "{ps}");
                assert_eq!(line, spawned, "{ps}");
            }
            looks += 1;
        }
        looks
    });
    kernel
        .run(async {
            let lot = Rc::new(Lot::new());
            for _ in 0..20_000 {
                let tasks = [spawn_locked(lot.clone()), spawn_expectant(lot.clone())];
                yield_now().await.unwrap();
                kernel::traps::sched_wake(&lot, 2);
                for task in tasks {
                    task.join().await.unwrap().unwrap();
                }
            }
        })
        .unwrap();
    drop(done);
    assert!(reader.join().unwrap() > 0);
}

const LOCKED: u32 = line!() + 3;
#[rustfmt::skip]
fn spawn_locked(lot: Rc<Lot>) -> kernel::Task<Result<(), Interrupt>> {
    spawn(async move { sched_wait(&lot, WaitKind::Lock).await })
}

const EXPECTANT: u32 = line!() + 3;
#[rustfmt::skip]
fn spawn_expectant(lot: Rc<Lot>) -> kernel::Task<Result<(), Interrupt>> {
    spawn(async move { sched_wait(&lot, WaitKind::Event).await })
}
