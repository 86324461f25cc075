//! A task there and back.

use rig::{Broker, Gate, Olive, Process, Signal, wait_until_gone};

/// A submit that stands at the gate, running in the background.
#[track_caller]
fn submit_at_gate(olive: &Olive, gate: &Gate, word: &str) -> Process {
    Process::spawn(&mut olive.command(&[
        "submit",
        "jobs.at_gate",
        &gate.port().to_string(),
        word,
        "--wait",
    ]))
}

/// Accepts: seed/submit, cli/submit_wait
#[test]
fn a_submitted_task_comes_back_with_its_result() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(1);
    let _worker = olive.run();
    let ended = olive
        .call(&["submit", "jobs.add", "40", "--kw", "b=2", "--wait"])
        .expect_code(0);
    assert_eq!(ended.stdout, "42\n");
}

/// Accepts: seed/submit
#[test]
fn submit_without_wait_prints_the_task_id_and_leaves() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(1);
    let _worker = olive.run();
    let gate = Gate::open();
    let ended = olive
        .call(&["submit", "jobs.at_gate", &gate.port().to_string(), "later"])
        .expect_code(0);
    assert!(!ended.stdout.trim().is_empty(), "no task id");
    let visitor = gate.next();
    assert_eq!(visitor.word, "later");
    visitor.release();
}

#[test]
fn arguments_are_json_or_else_text() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(1);
    let _worker = olive.run();
    let arguments = [
        "submit",
        "jobs.echo",
        "1",
        "two",
        "[3, null]",
        r#""4""#,
        "--kw",
        "deep={\"x\": [true]}",
        "--kw",
        "text=ü b",
        "--wait",
    ];
    let ended = olive.call(&arguments).expect_code(0);
    let found: serde_json::Value =
        serde_json::from_str(&ended.stdout).expect("a result is printed as JSON");
    let wanted = serde_json::json!({"args": [1, "two", [3, null], "4"], "kwargs": {"deep": {"x": [true]}, "text": "ü b"}});
    assert_eq!(found, wanted);
}

/// Rust would round or refuse these; the delivery process must not look at them.
#[test]
fn numbers_that_only_python_has_arrive_unharmed() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(1);
    let _worker = olive.run();
    let mut producer = olive.seed_producer(&[
        "--func",
        "jobs.echo",
        "--args",
        "[NaN, -Infinity, 123456789012345678901234567890]",
    ]);
    producer.args([
        "--resp-exchange",
        &rig::unique("replies"),
        "--resp-key",
        "k",
        "--replies",
        "1",
    ]);
    let ended = Process::spawn(&mut producer).ended().expect_code(0);
    assert!(
        ended
            .stdout
            .contains("[NaN, -Infinity, 123456789012345678901234567890]"),
        "{}",
        ended.stdout
    );
}

/// Accepts: logs/capture
#[test]
fn what_a_task_prints_goes_to_the_log_and_not_into_the_answer() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(1);
    let worker = olive.run();
    let ended = olive
        .call(&["submit", "jobs.shout", "hear me", "--wait"])
        .expect_code(0);
    assert_eq!(ended.stdout, "\"hear me\"\n");
    worker.wait_for_line("hear me");
    worker.wait_for_line("HEAR ME");
}

#[test]
fn the_workers_of_one_app_run_tasks_at_the_same_time() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(3);
    let _worker = olive.run();
    let gate = Gate::open();
    let submits: Vec<_> = ["a", "b", "c"]
        .into_iter()
        .map(|word| submit_at_gate(&olive, &gate, word))
        .collect();
    let visitors = [gate.next(), gate.next(), gate.next()];
    assert!(
        visitors[0].pid != visitors[1].pid
            && visitors[1].pid != visitors[2].pid
            && visitors[0].pid != visitors[2].pid
    );
    visitors.into_iter().for_each(rig::Visitor::release);
    for submit in submits {
        submit.ended().expect_code(0);
    }
}

/// Accepts: drain
#[test]
fn the_first_signal_finishes_what_runs_and_leaves_the_rest_in_the_queue() {
    for signal in [Signal::TERM, Signal::INT] {
        let broker = Broker::under_test();
        let olive = Olive::on(&broker).with_python_workers(1);
        let worker = olive.run();
        let gate = Gate::open();
        let running = submit_at_gate(&olive, &gate, "running");
        let visitor = gate.next();
        let waiting = submit_at_gate(&olive, &gate, "waiting");

        worker.signal(signal);
        worker.wait_for_line("draining");
        let python = visitor.pid;
        visitor.release();

        assert_eq!(running.ended().expect_code(0).stdout, "\"running\"\n");
        worker.ended().expect_code(0);
        wait_until_gone(python);
        let _next = olive.run();
        let visitor = gate.next();
        assert_eq!(visitor.word, "waiting");
        visitor.release();
        assert_eq!(waiting.ended().expect_code(0).stdout, "\"waiting\"\n");
    }
}

/// Accepts: drain
#[test]
fn the_second_signal_leaves_at_once_and_loses_nothing() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(1);
    let worker = olive.run();
    let gate = Gate::open();
    let submit = submit_at_gate(&olive, &gate, "again");
    let first = gate.next();

    worker.signal(Signal::TERM);
    worker.wait_for_line("draining");
    worker.signal(Signal::TERM);

    worker.ended().expect_code(1);
    wait_until_gone(first.pid);
    let _next = olive.run();
    let second = gate.next();
    assert_ne!(second.pid, first.pid);
    second.release();
    assert_eq!(submit.ended().expect_code(0).stdout, "\"again\"\n");
}

/// Accepts: dev/one_command
#[test]
fn dev_is_broker_and_workers_in_one_process() {
    let elsewhere = Broker::embedded();
    let olive = Olive::on(&elsewhere)
        .with_default_names()
        .with_python_workers(1)
        .set("olive_amqp_url", "amqp://127.0.0.1:0");
    let dev = Process::spawn(&mut olive.command(&["dev"]));
    let line = dev.wait_for_line("amqp://");
    let url = line
        .split_whitespace()
        .find(|word| word.starts_with("amqp://"))
        .expect("the line has a URL");
    let ended = olive
        .at(url)
        .call(&["submit", "jobs.add", "1", "2", "--wait"])
        .expect_code(0);
    assert_eq!(ended.stdout, "3\n");
    dev.signal(Signal::INT);
    dev.ended().expect_code(0);
}
