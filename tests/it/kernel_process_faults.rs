//! Worker processes that are killed at any moment, or are no proper workers: every call is answered, rightly or with an error, and of its process nothing is left.
//!
//! Children and descriptors belong to the process, so each scene has one to itself.

use std::cell::Cell;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, process, thread};

use kernel::{
    Interrupt, MaybeInterrupt, ProcessCallError, ProcessPool, sleep, spawn, timeout_after,
    yield_now,
};
use rig::{Deadline, PATIENCE, Random, Signal, unique};
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, pidfd_send_signal, wait};

use crate::kernel_leaks::{held, play};

const WORKER: &str = env!("CARGO_BIN_EXE_process-worker");
const SIZE: usize = 3;
/// Twice as many as there are places, so that some always wait for one.
const CALLERS: usize = 2 * SIZE;
const KILLS: usize = 60;

fn run(main: impl AsyncFnOnce()) {
    let bounded = timeout_after(PATIENCE, async {
        main().await;
        Ok::<_, Interrupt>(())
    });
    kernel::run(bounded).unwrap().unwrap();
}

#[test]
fn processes_that_are_killed_at_any_moment_cost_the_calls_that_they_ran_and_nothing_else() {
    play("kernel_process_faults::killed_at_any_moment");
}

/// In real time, as it is about what happens between any two instructions; so a seed, which `SWEEPEA_TEST_SEED` takes, repeats the calls but not the moments.
#[test]
#[ignore = "counts what its process holds; run by the test above"]
fn killed_at_any_moment() {
    let told = env::var("SWEEPEA_TEST_SEED").ok();
    let seed = told.map_or_else(
        || RandomState::new().hash_one(process::id()),
        |seed| seed.parse().expect("the seed is a number"),
    );
    println!("SWEEPEA_TEST_SEED={seed}");
    // With what is made once in a process.
    endure(seed, 1);
    let (before, _) = held();
    let tally = endure(seed, KILLS);
    println!("{tally:?}");
    assert!(tally.right.get() > 0 && tally.killed.get() > 0);
    assert_eq!(held().0, before);
}

/// What became of the calls.
#[derive(Debug, Default)]
struct Tally {
    right: Cell<usize>,
    killed: Cell<usize>,
    /// Given up by the caller.
    left: Cell<usize>,
}

/// Calls without end, until so many processes have been killed.
fn endure(seed: u64, kills: usize) -> Rc<Tally> {
    let tally = Rc::new(Tally::default());
    let over = Arc::new(AtomicBool::new(false));
    let killer = thread::spawn({
        let over = over.clone();
        move || {
            kill_children(&mut Random::new(seed), kills);
            over.store(true, Ordering::SeqCst);
        }
    });
    run(async || {
        let pool = Rc::new(ProcessPool::new(SIZE).program(WORKER));
        let callers: Vec<_> = (1..=CALLERS)
            .map(|n| {
                let (pool, tally, over) = (pool.clone(), tally.clone(), over.clone());
                let mut random = Random::new(seed.wrapping_add(n as u64));
                spawn(async move {
                    while !over.load(Ordering::SeqCst) {
                        call(&pool, &mut random, &tally).await;
                        assert!(pool.processes() <= SIZE);
                    }
                })
            })
            .collect();
        for caller in callers {
            caller.join().await.unwrap();
        }
        // Nobody is killed any more.
        let calls = [1, 2, 3, 4, 5, 6].map(|n| {
            let pool = pool.clone();
            spawn(async move { pool.run("square", n.to_string()).await })
        });
        for (n, call) in (1..).zip(calls) {
            let square = call.join().await.unwrap().unwrap();
            assert_eq!(square, (n * n).to_string().into_bytes());
        }
        assert!(pool.processes() <= SIZE);
        let pool = Rc::into_inner(pool).expect("all callers have ended");
        pool.shutdown().await.unwrap();
    });
    killer.join().unwrap();
    // A child whose caller did not wait for its end is reaped when the next is started.
    let deadline = Deadline::default();
    while !children().is_empty() && deadline.left().is_some() {
        let mut once = kernel::process::Command::new("true");
        run(async || assert!(once.check_output(b"").await.is_ok()));
    }
    assert!(wait(WaitOptions::NOHANG).is_err(), "a child is left");
    tally
}

/// One call of any kind.
async fn call(pool: &Rc<ProcessPool>, random: &mut Random, tally: &Tally) {
    // Longer than a socket's buffer, sometimes.
    let length = random.below(600_000);
    let short = Duration::from_micros(random.below(3000) as u64);
    let spinning = || {
        let pool = pool.clone();
        async move { pool.run("hang", "").await }
    };
    match random.below(8) {
        0 => {
            let square = (length * length).to_string().into_bytes();
            tally.right(pool.run("square", length.to_string()).await, &square);
        }
        1 => {
            let answer = pool.run("length", vec![7; length]).await;
            tally.right(answer, &length.to_be_bytes());
        }
        2 => {
            let answer = pool.run("zeros", length.to_string()).await;
            tally.right(answer, &vec![0; length]);
        }
        3 => match pool.run("panic", "as it should").await.unwrap_err() {
            ProcessCallError::Panicked { text, .. } => {
                assert!(text.starts_with("as it should"), "{text}");
                count(&tally.right);
            }
            error => tally.killed(&error),
        },
        4 => match pool.run("no such", "").await.unwrap_err() {
            ProcessCallError::Unknown { .. } => count(&tally.right),
            error => tally.killed(&error),
        },
        5 => {
            let error = timeout_after(short, spinning()).await.unwrap_err();
            if error.interrupt().is_some() {
                count(&tally.left);
            } else {
                tally.killed(&error);
            }
        }
        6 => {
            let task = spawn(spinning());
            sleep(short).await.unwrap();
            task.cancel().await.unwrap();
            let error = task.join().await.unwrap().unwrap_err();
            if error.interrupt().is_some() {
                count(&tally.left);
            } else {
                tally.killed(&error);
            }
        }
        _ => {
            let task = spawn(spinning());
            for _ in 0..random.below(10) {
                yield_now().await.unwrap();
            }
            task.abort();
            match task.join().await {
                Ok(ended) => tally.killed(&ended.unwrap_err()),
                Err(_) => count(&tally.left),
            }
        }
    }
}

impl Tally {
    fn right(&self, answer: Result<Vec<u8>, ProcessCallError>, expected: &[u8]) {
        match answer {
            Ok(answer) => {
                assert!(answer == expected, "a wrong answer");
                count(&self.right);
            }
            Err(error) => self.killed(&error),
        }
    }

    #[track_caller]
    fn killed(&self, error: &ProcessCallError) {
        match error {
            ProcessCallError::Died { status, .. } => assert_eq!(status.signal(), Some(9)),
            ProcessCallError::Start { error } => {
                assert_eq!(
                    error.to_string(),
                    "it ended with signal: 9 (SIGKILL) at once"
                );
            }
            error => panic!("{error:?}"),
        }
        count(&self.killed);
    }
}

fn count(cell: &Cell<usize>) {
    cell.set(cell.get() + 1);
}

fn kill_children(random: &mut Random, kills: usize) {
    let deadline = Deadline::after(PATIENCE / 2);
    let mut killed = 0;
    while killed < kills && deadline.left().is_some() {
        thread::sleep(Duration::from_micros(random.below(3000) as u64));
        let running: Vec<_> = children()
            .into_iter()
            .filter(|&(_, state)| state != 'Z')
            .collect();
        if running.is_empty() {
            continue;
        }
        let &(pid, _) = random.pick(&running);
        let Ok(child) = pidfd_open(pid, PidfdFlags::empty()) else {
            continue;
        };
        // Whoever has the number now: it is a child of ours.
        if children().iter().any(|&(other, _)| other == pid)
            && pidfd_send_signal(child, Signal::KILL).is_ok()
        {
            killed += 1;
        }
    }
}

/// The children of this process, and the states that they are in.
fn children() -> Vec<(Pid, char)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let child = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let mut fields = stat.rsplit(") ").next()?.split(' ');
        let state = fields.next()?.chars().next()?;
        let parent: u32 = fields.next()?.parse().ok()?;
        Some((Pid::from_raw(pid)?, state)).filter(|_| parent == process::id())
    };
    entries.filter_map(child).collect()
}

#[test]
fn a_worker_that_dies_or_lies_at_any_stage_of_a_call_is_told_apart_and_leaves_nothing() {
    play("kernel_process_faults::at_any_stage");
}

/// Also because a script that was just written can be started only where nobody forks meanwhile.
#[test]
#[ignore = "counts what its process holds; run by the test above"]
fn at_any_stage() {
    const HELLO: &str = r"printf 'SWEEPEA\001' >&0";
    // Its head, the name and "3".
    const CALL: &str = "head -c 19 >/dev/null";
    const KILL: &str = "kill -9 $$";
    const SLEEP: &str = "exec sleep 600";
    let killed_at_once = "cannot start a worker process: it ended with signal: 9 (SIGKILL) at once";
    let died = "the worker process died while it ran `square`: signal: 9 (SIGKILL)";
    let stages: [(&[&str], &str); 12] = [
        (&[KILL], killed_at_once),
        (&["printf SWEE >&0", KILL], killed_at_once),
        (&[CALL, KILL], killed_at_once),
        // Without a byte of the call read, it may be gone before the call is sent: then it was never started.
        (&[HELLO, "head -c 1 >/dev/null", KILL], died),
        (&[HELLO, CALL, KILL], died),
        (&[HELLO, CALL, r"printf '\0\0\0' >&0", KILL], died),
        (
            &[HELLO, CALL, r"printf '\0\0\0\3\350too short' >&0", KILL],
            died,
        ),
        // It lives, but cannot answer any more.
        (&[HELLO, CALL, "exec sleep 600 <&-"], died),
        (
            &["printf 'HELLO, I AM' >&0", SLEEP],
            "talking to a worker process: it speaks another language; \
             does its `main` begin with `kernel::process_worker`?",
        ),
        (
            &[HELLO, r"printf '\11\0\0\0\0' >&0", SLEEP],
            "talking to a worker process: an answer of no known kind, 9",
        ),
        (
            &[HELLO, r"printf '\0\377\377\377\377' >&0", SLEEP],
            "talking to a worker process: an answer of 4294967295 bytes, beyond the limit",
        ),
        // The next caller must not get it.
        (
            &[HELLO, r"printf '\0\0\0\0\00199' >&0", SLEEP],
            "talking to a worker process: 1 bytes more than the answer has",
        ),
    ];
    let script = env::temp_dir().join(unique("worker"));
    let before = held();
    for (steps, expected) in stages {
        let text = format!("#!/bin/sh\n{}\n", steps.join("\n"));
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
        run(async || {
            let pool = ProcessPool::new(1).program(&script);
            // The second finds the pool as the first did.
            for _ in 0..2 {
                let error = pool.run("square", "3").await.unwrap_err();
                assert_eq!(error.to_string(), expected, "{steps:?}");
                if let ProcessCallError::Broken { error } = &error {
                    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{steps:?}");
                }
                assert_eq!(pool.processes(), 0);
            }
        });
        assert!(wait(WaitOptions::NOHANG).is_err(), "a child of {steps:?}");
    }
    fs::remove_file(&script).unwrap();
    assert_eq!(held(), before);
}
