//! What a user sees when something is killed, absent, refused or wrong.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};

use rig::{Broker, Ended, Gate, Olive, Process, Proxy, Signal, unique, wait_until_gone};
use rustix::process::{Pid, kill_process};

use crate::replies::Replies;

/// Olive's default prefetch: how many tasks one app may hold unacked, so how many may run twice when it is killed.
const QOS: usize = 80;

#[track_caller]
fn kill(pid: u32) {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .expect("a process id is a positive number");
    kill_process(pid, Signal::KILL).expect("the worker is alive");
}

/// A producer of tasks at the gate that waits for its replies.
#[track_caller]
fn produce(olive: &Olive, arguments: &[&str]) -> Process {
    let mut command =
        olive.seed_producer(&["--resp-exchange", &unique("replies"), "--resp-key", "k"]);
    Process::spawn(command.args(arguments))
}

#[test]
fn a_worker_killed_in_a_task_costs_no_task() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(1);
    let app = olive.run();
    let gate = Gate::open();
    let arguments = format!("[{}, \"once\"]", gate.port());
    let producer = produce(
        &olive,
        &[
            "--func",
            "jobs.at_gate",
            "--args",
            &arguments,
            "--replies",
            "1",
        ],
    );

    let first = gate.next();
    kill(first.pid);
    let second = gate.next();

    assert_ne!(first.pid, second.pid);
    second.release();
    let replies = Replies::of(producer.ended());
    assert_eq!(replies.expect_all("SUCCESS").only()["result"], "once");
    app.signal(Signal::TERM);
    app.ended().expect_code(0);
}

/// Accepts: olive/P5
#[test]
fn a_task_that_costs_a_worker_every_time_ends_as_lost() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker)
        .with_python_workers(1)
        .set("olive_task_max_crashes", "2");
    let _app = olive.run();
    let gate = Gate::open();
    let arguments = format!("[{}, \"poison\"]", gate.port());
    let producer = produce(
        &olive,
        &[
            "--func",
            "jobs.at_gate",
            "--args",
            &arguments,
            "--replies",
            "1",
        ],
    );

    // The first run and two more; a fourth would keep the producer waiting for its reply.
    for _ in 0..3 {
        kill(gate.next().pid);
    }

    let replies = Replies::of(producer.ended());
    assert_eq!(
        replies.expect_all("FAILURE").only()["result"]["exc_type"],
        "WorkerLostError"
    );
    let next = olive
        .call(&["submit", "jobs.add", "1", "--wait"])
        .expect_code(0);
    assert_eq!(next.stdout, "1\n");
}

/// Accepts: olive/P26
#[test]
fn a_killed_worker_does_not_disturb_its_sibling() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(2);
    let _app = olive.run();
    let gate = Gate::open();
    let arguments = format!("[{}, \"pair\"]", gate.port());
    let producer = produce(
        &olive,
        &[
            "--func",
            "jobs.at_gate",
            "--args",
            &arguments,
            "--count",
            "2",
            "--replies",
            "2",
        ],
    );

    let (victim, sibling) = (gate.next(), gate.next());
    kill(victim.pid);
    let replacement = gate.next();

    assert_ne!(replacement.pid, sibling.pid);
    sibling.release();
    replacement.release();
    let replies = Replies::of(producer.ended());
    assert_eq!(replies.expect_all("SUCCESS").all().count(), 2);
}

/// Accepts: crash/delivery_process
#[test]
fn the_app_killed_under_load_loses_nothing_and_leaves_no_worker() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(2);
    let first = olive.run();
    let producer = produce(
        &olive,
        &[
            "--func",
            "jobs.who",
            "--args",
            "[0.002]",
            "--count",
            "400",
            "--replies",
            "400",
        ],
    );

    producer.wait_for_lines("SUCCESS", 40);
    let ended = first.kill();
    assert_eq!(ended.signal(), Some(9));
    let answered = producer
        .lines()
        .iter()
        .filter(|line| line.contains("SUCCESS"))
        .count();
    assert!(answered < 400, "all tasks were done before the kill");
    let second = olive.run();

    let replies = Replies::of(producer.ended());
    replies.expect_all("SUCCESS");
    let twice = replies.all().count() - replies.sent.len();
    assert!(twice <= QOS, "{twice} tasks ran twice");
    second.signal(Signal::TERM);
    second.ended().expect_code(0);
    for reply in replies.all() {
        wait_until_gone(
            u32::try_from(reply["result"].as_u64().expect("a process id")).expect("a process id"),
        );
    }
}

#[test]
fn connections_lost_under_load_lose_no_task() {
    let broker = Broker::under_test();
    let proxy = Proxy::to(broker.address());
    let olive = Olive::on(&broker).with_python_workers(2);
    let app = olive.clone().at(&broker.url_through(proxy.address())).run();
    let producer = produce(
        &olive,
        &[
            "--func",
            "jobs.who",
            "--args",
            "[0.002]",
            "--count",
            "400",
            "--replies",
            "400",
        ],
    );

    for answered in [20, 80, 140] {
        producer.wait_for_lines("SUCCESS", answered);
        proxy.reset();
    }

    Replies::of(producer.ended()).expect_all("SUCCESS");
    app.signal(Signal::TERM);
    app.ended().expect_code(0);
}

/// Accepts: cli/errors
#[test]
fn a_wrong_password_is_one_clear_line() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).at(&broker.url_with_wrong_password());
    for command in [&["run"][..], &["submit", "jobs.add", "1"]] {
        let ended = olive.call(command).expect_code(3);
        assert!(
            ended
                .stderr
                .contains("refused the login for user \"guest\""),
            "{}",
            ended.stderr
        );
        let error = error_line(&ended);
        for wanted in ["127.0.0.1", "olive_amqp_url"] {
            assert!(error.contains(wanted), "no {wanted}: {error}");
        }
        assert!(
            !ended.stderr.contains("wrong"),
            "the password is shown: {}",
            ended.stderr
        );
    }
}

/// Accepts: cli/errors, olive/P16
#[test]
fn no_broker_is_one_clear_line_with_the_way_out() {
    // Bound and closed again, so nobody listens there; the kernel does not give the port out again soon.
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .expect("a free port");
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).at(&broker.url_through(nobody));
    for command in [&["run"][..], &["submit", "jobs.add", "1"]] {
        let ended = olive.call(command).expect_code(3);
        assert!(
            ended
                .stderr
                .contains("cannot reach the broker at amqp://guest"),
            "{}",
            ended.stderr
        );
        assert!(ended.stderr.contains("olive dev"), "{}", ended.stderr);
        let (error, port) = (error_line(&ended), nobody.port().to_string());
        assert!(error.contains("refused"), "{error}");
        assert_eq!(error.matches(&port).count(), 1, "{error}");
        assert!(
            !ended.stderr.contains("guest:guest"),
            "the password is shown: {}",
            ended.stderr
        );
    }
}

/// What it says it ended with, behind all that it has logged.
fn error_line(ended: &Ended) -> &str {
    let mut lines = ended.stderr.lines();
    lines
        .find(|line| line.starts_with("error: "))
        .unwrap_or_else(|| panic!("no error in: {}", ended.stderr))
}

/// Accepts: cli/errors
#[test]
fn a_module_with_an_error_is_named_with_its_line_and_nothing_around_it() {
    let broker = Broker::under_test();
    let folder = std::env::temp_dir().join(unique("modules"));
    fs::create_dir(&folder).unwrap();
    fs::write(
        folder.join("crooked.py"),
        "def add(a, b)\n    return a + b\n",
    )
    .unwrap();
    let olive = Olive::on(&broker)
        .with_python_workers(1)
        .set("olive_worker_allow", "crooked")
        .set("olive_worker_path", folder.to_str().unwrap());
    let app = olive.run();
    let call = &["submit", "crooked.add", "1", "2", "--wait"];
    let ended = olive.call(call).expect_code(1);
    fs::remove_dir_all(&folder).unwrap();
    for wanted in ["crooked.py\", line 1", "SyntaxError"] {
        assert!(
            ended.stderr.contains(wanted),
            "no {wanted:?} in: {}",
            ended.stderr
        );
    }
    for ours in ["importlib", "import_module", "in call"] {
        assert!(!ended.stderr.contains(ours), "{}", ended.stderr);
    }
    assert_hopeless(&app, "permanent");
}

/// The one task that failed did so for this reason, and was not tried again.
#[track_caller]
fn assert_hopeless(app: &Process, reason: &str) {
    let failed = app.wait_for_line(" FAILED: ");
    assert!(failed.ends_with(&format!("({reason})")), "{failed}");
    let lines = app.lines();
    let again = lines.iter().find(|line| line.contains("again in"));
    assert_eq!(again, None);
}

/// Accepts: allow_list
#[test]
fn only_allowed_functions_run() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(1);
    let _app = olive.run();
    // A module that is not on the list, one that an allowed module imports, and one behind a private name.
    for function in [
        "os.getpid",
        "jobs.getpid",
        "jobs.os.getpid",
        "jobs.__builtins__.exec",
    ] {
        let ended = olive.call(&["submit", function, "--wait"]).expect_code(1);
        assert!(
            ended.stderr.contains("not allowed"),
            "{function}: {}",
            ended.stderr
        );
        assert_eq!(ended.stdout, "");
    }
    let allowed = olive
        .call(&["submit", "jobs.add", "1", "--wait"])
        .expect_code(0);
    assert_eq!(allowed.stdout, "1\n");
}

#[test]
fn without_an_allow_list_nothing_runs_and_the_setting_is_named() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker)
        .with_python_workers(1)
        .set("olive_worker_allow", "");
    let app = olive.run();
    let ended = olive
        .call(&["submit", "jobs.add", "1", "--wait"])
        .expect_code(1);
    assert!(
        ended.stderr.contains("olive_worker_allow"),
        "{}",
        ended.stderr
    );
    assert_hopeless(&app, "not_registered");
}

/// Accepts: cli/submit_wait
#[test]
fn a_failing_task_shows_its_trace_on_stderr_and_exits_with_one() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker)
        .with_python_workers(1)
        .set("olive_task_max_retries", "0");
    let _app = olive.run();
    let ended = olive
        .call(&["submit", "jobs.fail", "out of luck", "--wait"])
        .expect_code(1);
    assert_eq!(ended.stdout, "");
    for wanted in ["ValueError", "out of luck", "in fail"] {
        assert!(
            ended.stderr.contains(wanted),
            "no {wanted:?} in: {}",
            ended.stderr
        );
    }
}

/// Accepts: olive/P15
#[test]
fn an_unknown_function_fails_by_name_and_at_once() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(1);
    let app = olive.run();
    let ended = olive
        .call(&["submit", "jobs.ad", "1", "--wait"])
        .expect_code(1);
    assert!(ended.stderr.contains("jobs.ad"), "{}", ended.stderr);
    assert_hopeless(&app, "not_registered");
}

#[test]
fn bodies_that_are_no_tasks_do_not_stop_the_app() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(1);
    let _app = olive.run();
    for body in [
        "",
        "not json",
        "[1, 2]",
        "{}",
        r#"{"func": 7}"#,
        r#"{"func": "jobs.add", "args": {"a": 1}}"#,
        "\u{1}\u{2}",
    ] {
        Process::spawn(&mut olive.seed_producer(&["--body", body]))
            .ended()
            .expect_code(0);
    }
    let next = olive
        .call(&["submit", "jobs.add", "1", "--wait"])
        .expect_code(0);
    assert_eq!(next.stdout, "1\n");
}

#[test]
fn a_submit_that_nobody_will_ever_take_says_so() {
    let broker = Broker::under_test();
    let ended = Olive::on(&broker).call(&["submit", "jobs.add", "1"]);
    assert_ne!(
        ended.code(),
        Some(0),
        "the message went nowhere, and submit was content"
    );
}
