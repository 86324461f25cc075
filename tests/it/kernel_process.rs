//! Calls in processes: `rig/bin/process_worker.rs` has the functions.

use std::cell::Cell;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use kernel::{
    Builder, Interrupt, MaybeInterrupt, ProcessCallError, ProcessPool, Task, Wait, drop_after,
    group, run_in_thread, sleep, spawn, timeout_after, yield_now,
};
use rig::{Gate, Signal, Visitor, unique, wait_until_gone};
use rustix::process::{Pid, kill_process};

const WORKER: &str = env!("CARGO_BIN_EXE_process-worker");

/// Runs `main` in real time, since processes know no other; a test that hangs fails after a while.
fn run(main: impl AsyncFnOnce()) {
    let bounded = timeout_after(rig::PATIENCE, async {
        main().await;
        Ok::<_, Interrupt>(())
    });
    kernel::run(bounded).unwrap().unwrap();
}

fn pool(size: usize) -> ProcessPool {
    ProcessPool::new(size).program(WORKER)
}

async fn pid_of_worker(pool: &ProcessPool) -> u32 {
    let pid = pool.run("pid", "").await.unwrap();
    u32::from_be_bytes(pid.try_into().unwrap())
}

/// Has the pool call a function that comes to a gate, and waits until it is there.
async fn caught(
    pool: &Rc<ProcessPool>,
    function: &'static str,
) -> (Task<Result<Vec<u8>, ProcessCallError>>, Visitor) {
    let gate = Gate::open();
    let (calling, port) = (Rc::clone(pool), gate.port().to_string());
    let task = spawn(async move { calling.run(function, port).await });
    (task, visitor(gate).await)
}

async fn visitor(gate: Gate) -> Visitor {
    run_in_thread(move || gate.next()).await.unwrap()
}

/// Accepts: curio/workers/cpu
#[test]
fn a_call_in_a_process_runs_beside_a_spinning_task() {
    run(async || {
        let turns = Rc::new(Cell::new(0_u64));
        let count = Rc::clone(&turns);
        let spinner = spawn(async move {
            loop {
                yield_now().await?;
                count.set(count.get() + 1);
            }
            #[expect(unreachable_code)]
            Ok::<_, Interrupt>(())
        });
        let pool = pool(1);
        assert_eq!(pool.run("square", "12").await.unwrap(), b"144");
        assert!(turns.get() > 0, "the kernel stood still");
        spinner.cancel().await.unwrap();
    });
}

/// Accepts: curio/workers/bad_cpu
#[test]
fn an_error_of_the_function_comes_back_as_text_and_its_process_goes_on() {
    run(async || {
        let pool = pool(1);
        let pid = pid_of_worker(&pool).await;
        let error = pool.run("square", "twelve").await.unwrap_err();
        assert!(
            matches!(&error, ProcessCallError::Failed { function, .. } if function == "square")
        );
        assert_eq!(
            error.to_string(),
            "\"twelve\" is no number: invalid digit found in string"
        );
        assert_eq!(pid_of_worker(&pool).await, pid);
    });
}

#[test]
fn a_panic_of_the_function_comes_back_with_its_place_and_its_process_goes_on() {
    run(async || {
        let pool = pool(1);
        let pid = pid_of_worker(&pool).await;
        let error = pool.run("panic", "no more").await.unwrap_err();
        let ProcessCallError::Panicked { function, text } = error else {
            panic!("{error:?}");
        };
        assert_eq!(function, "panic");
        assert!(
            text.starts_with("no more (at tests/rig/bin/process_worker.rs:"),
            "{text}"
        );
        assert_eq!(pid_of_worker(&pool).await, pid);
    });
}

/// Accepts: curio/workers/worker_cancel
#[test]
fn a_cancelled_call_kills_its_process_and_the_next_one_gets_another() {
    run(async || {
        let pool = Rc::new(pool(1));
        let (task, spinning) = caught(&pool, "spin").await;
        let pid = spinning.pid;
        assert_eq!(pool.processes(), 1);
        task.cancel().await.unwrap();
        let outcome = task.join().await.unwrap();
        assert!(matches!(
            outcome,
            Err(ProcessCallError::Interrupted(Interrupt::Cancelled(_)))
        ));
        // Not only killed but reaped: its number is free.
        assert!(!is_alive(pid));
        assert_eq!(pool.processes(), 0);
        assert_ne!(pid_of_worker(&pool).await, pid);
    });
}

/// Accepts: curio/workers/worker_timeout
#[test]
fn a_call_that_times_out_kills_its_process_and_the_next_one_gets_another() {
    run(async || {
        let pool = pool(1);
        let idle = pid_of_worker(&pool).await;
        let gate = Gate::open();
        let call = pool.run("spin", gate.port().to_string());
        let late = timeout_after(Duration::from_millis(50), call).await;
        let error = late.unwrap_err();
        assert!(matches!(
            error,
            ProcessCallError::Interrupted(Interrupt::TaskTimeout)
        ));
        assert_eq!(error.interrupt(), Some(&Interrupt::TaskTimeout));
        assert!(!is_alive(idle));
        assert_eq!(pool.run("square", "3").await.unwrap(), b"9");
    });
}

#[test]
fn a_call_that_is_dropped_kills_its_process() {
    run(async || {
        let pool = Rc::new(pool(1));
        let (task, spinning) = caught(&pool, "spin").await;
        let pid = spinning.pid;
        task.abort();
        assert_eq!(pool.processes(), 0);
        wait_until_gone(pid);
        assert_eq!(pool.run("square", "3").await.unwrap(), b"9");
    });
}

#[test]
fn what_a_function_started_is_killed_with_it() {
    run(async || {
        let pool = Rc::new(pool(1));
        let (task, visitor) = caught(&pool, "grandchild").await;
        let grandchild = visitor.pid;
        assert!(is_alive(grandchild));
        task.cancel().await.unwrap();
        wait_until_gone(grandchild);
    });
}

#[test]
fn a_pending_cancellation_prevents_the_call_and_leaves_the_process_alone() {
    run(async || {
        let pool = Rc::new(pool(1));
        let pid = pid_of_worker(&pool).await;
        let calling = Rc::clone(&pool);
        let task = spawn(async move { calling.run("exit", "3").await });
        task.cancel().await.unwrap();
        assert!(matches!(
            task.join().await.unwrap(),
            Err(ProcessCallError::Interrupted(_))
        ));
        assert_eq!(pid_of_worker(&pool).await, pid);
    });
}

#[test]
fn a_process_that_dies_says_how() {
    run(async || {
        let pool = Rc::new(pool(1));
        let status = async |function: &str, args: &str| match pool.run(function, args).await {
            Err(ProcessCallError::Died { status, .. }) => status,
            other => panic!("{other:?}"),
        };
        assert_eq!(status("exit", "3").await.code(), Some(3));
        assert_eq!(status("abort", "").await.signal(), Some(6));

        let (task, spinning) = caught(&pool, "spin").await;
        kill(spinning.pid);
        let error = task.join().await.unwrap().unwrap_err();
        assert_eq!(
            error.to_string(),
            "the worker process died while it ran `spin`: signal: 9 (SIGKILL)"
        );
        assert_eq!(pool.processes(), 0);
        assert_eq!(pool.run("square", "3").await.unwrap(), b"9");
    });
}

#[test]
fn processes_that_died_idle_are_replaced_unnoticed() {
    run(async || {
        let pool = Rc::new(pool(2));
        // Whether the kernel has looked outside since, or not.
        for looks in [true, false] {
            let (one, held) = caught(&pool, "hold").await;
            let pids = [held.pid, pid_of_worker(&pool).await];
            held.release();
            one.join().await.unwrap().unwrap();
            pids.into_iter().for_each(kill);
            // Their end is seen, without reaping them, by the state that they are in.
            while !pids.into_iter().all(is_zombie) {
                if looks {
                    sleep(Duration::from_millis(1)).await.unwrap();
                }
            }
            // Longer than a socket's buffer.
            let length = pool.run("length", vec![7; 600_000]).await.unwrap();
            assert_eq!(length, 600_000_usize.to_be_bytes());
            assert_eq!(pool.processes(), 1);
            assert!(!pids.into_iter().any(is_alive), "they are reaped");
            assert!(!pids.contains(&pid_of_worker(&pool).await));
        }
    });
}

#[test]
fn a_message_beyond_the_limit_is_refused_on_either_way() {
    run(async || {
        let pool = pool(1).max_message(1000);
        let fits = "length".len() + 994;
        assert_eq!(fits, 1000);
        let length = pool.run("length", vec![0; 994]).await.unwrap();
        assert_eq!(length, 994_usize.to_be_bytes());
        let error = pool.run("length", vec![0; 995]).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "arguments of 1001 bytes for a worker process, of which at most 1000 are allowed"
        );

        assert_eq!(pool.run("zeros", "1000").await.unwrap(), [0; 1000]);
        let error = pool.run("zeros", "1001").await.unwrap_err();
        assert!(matches!(
            error,
            ProcessCallError::TooLong {
                what: "result",
                length: 1001,
                limit: 1000
            }
        ));
        // The text of an error is cut, not refused.
        let error = pool.run("panic", vec![b'x'; 990]).await.unwrap_err();
        assert!(matches!(error, ProcessCallError::Panicked { text, .. } if text.len() == 1000));
        assert_eq!(pool.run("square", "3").await.unwrap(), b"9");
    });
}

#[test]
fn messages_longer_than_any_socket_buffer_pass() {
    run(async || {
        let pool = pool(1);
        let length = pool.run("length", vec![7; 5_000_000]).await.unwrap();
        assert_eq!(length, 5_000_000_usize.to_be_bytes());
        assert_eq!(pool.run("zeros", "5000000").await.unwrap().len(), 5_000_000);
    });
}

#[test]
fn an_unknown_function_is_named_with_those_that_there_are() {
    run(async || {
        let pool = pool(1);
        let error = pool.run("cube", "").await.unwrap_err().to_string();
        let expected = "no function `cube` in the worker process, which has: square, length, ";
        assert!(error.starts_with(expected), "{error}");
        assert_eq!(pool.run("square", "3").await.unwrap(), b"9");
    });
}

#[test]
fn a_program_that_is_no_worker_is_found_out() {
    run(async || {
        let silent = ProcessPool::new(1).program("/bin/true");
        let error = silent.run("square", "3").await.unwrap_err().to_string();
        assert_eq!(
            error,
            "cannot start a worker process: it ended with exit status: 0 at once; \
             does its `main` begin with `kernel::process_worker`?"
        );
        let absent = ProcessPool::new(1).program("/no/such/program");
        let error = absent.run("square", "3").await.unwrap_err();
        assert!(matches!(error, ProcessCallError::Start { .. }));
        assert!(error.to_string().contains("/no/such/program"), "{error}");
    });
}

#[test]
fn processes_start_when_needed_and_the_last_idle_one_is_used_first() {
    run(async || {
        let pool = Rc::new(pool(2));
        assert_eq!(pool.processes(), 0);
        let first = pid_of_worker(&pool).await;
        assert_eq!(pid_of_worker(&pool).await, first);
        assert_eq!(pool.processes(), 1);

        let (one, held) = caught(&pool, "hold").await;
        assert_eq!(held.pid, first);
        let (other, held_too) = caught(&pool, "hold").await;
        let second = held_too.pid;
        assert_ne!(second, first);
        // Both are busy, and there is no third.
        let waiting = Rc::clone(&pool);
        let third = spawn(async move { pid_of_worker(&waiting).await });
        sleep(Duration::from_millis(10)).await.unwrap();
        assert_eq!(pool.processes(), 2);
        assert!(!third.is_terminated());

        held.release();
        one.join().await.unwrap().unwrap();
        assert_eq!(third.join().await.unwrap(), first);
        held_too.release();
        other.join().await.unwrap().unwrap();
        for _ in 0..3 {
            assert_eq!(pid_of_worker(&pool).await, second);
        }
        assert_eq!(pool.processes(), 2);
    });
}

#[test]
fn who_waits_for_a_place_can_be_interrupted_and_harms_nobody() {
    run(async || {
        let pool = Rc::new(pool(1));
        let (task, spinning) = caught(&pool, "spin").await;
        let pid = spinning.pid;
        let waited = drop_after(Duration::from_millis(1), pool.run("square", "3")).await;
        assert!(waited.is_none());
        assert!(is_alive(pid));
        task.cancel().await.unwrap();
        assert_eq!(pool.run("square", "3").await.unwrap(), b"9");
    });
}

#[test]
fn a_group_of_calls_that_fails_stops_the_others() {
    run(async || {
        let pool = Rc::new(pool(2));
        let (spinning, failing, gate) = (Rc::clone(&pool), Rc::clone(&pool), Gate::open());
        let outcome = group(Wait::All, async |tasks| {
            let port = gate.port().to_string();
            tasks.spawn(async move { spinning.run("spin", port).await });
            visitor(gate).await;
            tasks.spawn(async move { failing.run("square", "x").await });
            Ok::<_, ProcessCallError>(())
        })
        .await;
        assert!(outcome.unwrap().1.first_error().is_some());
        assert_eq!(pool.processes(), 1);
    });
}

#[test]
fn a_shutdown_lets_every_process_end_and_reaps_it() {
    run(async || {
        let pool = Rc::new(pool(2));
        let (task, held) = caught(&pool, "hold").await;
        let pids = [held.pid, pid_of_worker(&pool).await];
        assert_ne!(pids[0], pids[1]);
        held.release();
        task.join().await.unwrap().unwrap();
        Rc::into_inner(pool).unwrap().shutdown().await.unwrap();
        assert!(!pids.into_iter().any(is_alive));
    });
}

#[test]
fn a_pool_serves_one_kernel_after_another() {
    let pool = pool(1);
    let mut first = 0;
    run(async || first = pid_of_worker(&pool).await);
    run(async || assert_eq!(pid_of_worker(&pool).await, first));
    drop(pool);
    wait_until_gone(first);
}

#[test]
fn a_pool_serves_two_kernels_in_turn() {
    let pool = Rc::new(pool(1));
    let mut kernels = [(); 2].map(|()| Builder::new().build().unwrap());
    let pids = [0, 1, 0, 1, 1, 0].map(|n: usize| {
        let pool = Rc::clone(&pool);
        let call = timeout_after(rig::PATIENCE, async move {
            Ok::<_, Interrupt>(pid_of_worker(&pool).await)
        });
        kernels[n].run(call).unwrap().unwrap()
    });
    assert_eq!(pids, [pids[0]; 6]);
    // Where it is registered is gone.
    let [one, mut other] = kernels;
    drop(one);
    let last = other.run(async move { pid_of_worker(&pool).await });
    assert_eq!(last.unwrap(), pids[0]);
}

#[test]
fn a_function_finds_neither_the_socket_nor_input() {
    run(async || {
        let pool = pool(1);
        assert_eq!(pool.run("read_stdin", "").await.unwrap(), b"");
        let descriptors = pool.run("descriptors", "").await.unwrap();
        let descriptors = String::from_utf8(descriptors).unwrap();
        assert!(descriptors.contains("/dev/null"), "{descriptors}");
        assert!(!descriptors.contains("socket:"), "{descriptors}");
    });
}

#[test]
fn a_program_calls_its_own_functions_also_from_within_them() {
    let said = Command::new(WORKER).arg("square").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&said.stdout), "144\n");
    run(async || {
        let pool = pool(1);
        assert_eq!(pool.run("call_another", "12").await.unwrap(), b"144");
    });
}

#[test]
fn a_program_that_forgets_to_serve_does_not_start_itself_for_ever() {
    let started = std::env::temp_dir().join(unique("started"));
    let forgetful = Command::new(WORKER)
        .env("RIG_FORGETFUL_WORKER", &started)
        .output()
        .unwrap();
    let each = fs::read(&started).unwrap();
    fs::remove_file(started).unwrap();
    assert_eq!(each.len(), 2);
    // The child, then its parent.
    assert_eq!(
        String::from_utf8_lossy(&forgetful.stderr),
        "cannot start a worker process: this process was started as one; \
         does its `main` begin with `kernel::process_worker`?\n\
         cannot start a worker process: it ended with exit status: 9 at once; \
         does its `main` begin with `kernel::process_worker`?\n"
    );
}

#[test]
fn a_program_calls_its_own_functions_though_its_file_is_gone() {
    let program = Path::new(WORKER).with_file_name(unique("worker"));
    fs::hard_link(WORKER, &program).unwrap();
    run(async || {
        let pool = ProcessPool::new(1).program(&program);
        pid_of_worker(&pool).await;
        fs::remove_file(&program).unwrap();
        assert_eq!(pool.run("call_another", "12").await.unwrap(), b"144");
    });
}

/// A call, as the parent sends it.
fn message(name: &str, args: &str) -> Vec<u8> {
    let numbers = [100, name.len() as u32, args.len() as u32];
    let head = numbers.map(u32::to_be_bytes).concat();
    [&head[..], name.as_bytes(), args.as_bytes()].concat()
}

#[test]
fn a_worker_ends_well_with_its_parents_side_and_badly_when_a_call_is_cut_off() {
    type Talk = fn(&mut UnixStream);
    let talks: [(Talk, i32, &str); 4] = [
        (|_| {}, 0, ""),
        (
            |parent| {
                parent.write_all(&message("panic", "no more")).unwrap();
                let mut head = [0; 5];
                parent.read_exact(&mut head).unwrap();
                let length = u32::from_be_bytes(head[1..].try_into().unwrap());
                parent.read_exact(&mut vec![0; length as usize]).unwrap();
            },
            0,
            "no more",
        ),
        (
            |parent| parent.write_all(&message("square", "3")[..15]).unwrap(),
            1,
            "worker process ",
        ),
        (
            |parent| {
                parent.shutdown(Shutdown::Read).unwrap();
                parent.write_all(&message("square", "3")).unwrap();
            },
            1,
            "worker process ",
        ),
    ];
    for (n, (talk, code, said)) in talks.into_iter().enumerate() {
        let (mut parent, theirs) = UnixStream::pair().unwrap();
        let theirs = fs::File::from(OwnedFd::from(theirs));
        let inode = theirs.metadata().unwrap().ino().to_string();
        let child = Command::new(WORKER)
            .env("SWEEPEA_WORKER_SOCKET", inode)
            .stdin(theirs)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut hello = [0; 8];
        parent.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"SWEEPEA\x01");
        talk(&mut parent);
        // The last one has to see for itself that nobody listens.
        let open = (n == 3).then(|| parent.try_clone().unwrap());
        drop(parent);
        let ended = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(code), "{n}: {stderr}");
        assert!(stderr.contains(said), "{n}: {stderr}");
        assert_eq!(stderr.is_empty(), said.is_empty(), "{n}: {stderr}");
        drop(open);
    }
}

#[test]
fn a_shutdown_that_is_interrupted_kills_who_does_not_end() {
    run(async || {
        let pool = pool(1);
        let pid = pid_of_worker(&pool).await;
        let stopped = Pid::from_raw(pid.cast_signed()).unwrap();
        kill_process(stopped, Signal::STOP).unwrap();
        let late = timeout_after(Duration::from_millis(20), pool.shutdown()).await;
        assert_eq!(late.unwrap_err().interrupt(), Some(&Interrupt::TaskTimeout));
        wait_until_gone(pid);
    });
}

#[test]
fn a_spinning_process_does_not_outlive_a_parent_that_crashes() {
    let orphaning = Command::new(WORKER).arg("orphan").output().unwrap();
    assert_eq!(orphaning.status.signal(), Some(6));
    let pid = String::from_utf8_lossy(&orphaning.stdout);
    wait_until_gone(pid.trim().parse().unwrap());
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

fn is_alive(pid: u32) -> bool {
    fs::exists(format!("/proc/{pid}")).unwrap()
}

fn is_zombie(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(')')
        .next()
        .unwrap()
        .trim_start()
        .starts_with('Z')
}
