//! Sweepea's own producer, unchanged, with olive in the place of sweepea.

use rig::{Broker, Ended, Gate, Olive, Process, Signal, unique};
use serde_json::json;

use crate::replies::Replies;

/// Runs the producer to its end, with a place for the replies.
#[track_caller]
fn produce(olive: &Olive, arguments: &[&str]) -> Ended {
    let exchange = unique("replies");
    let mut command = olive.seed_producer(&["--resp-exchange", &exchange, "--resp-key", "answers"]);
    Process::spawn(command.args(arguments)).ended()
}

/// Accepts: seed/message, seed/thread_worker, seed/response
#[test]
fn its_tasks_run_in_thread_workers_by_the_names_it_uses() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).set("olive_worker_num_workers", "4");
    let _worker = olive.run();

    let slept = produce(
        &olive,
        &[
            "--func",
            "olive.tasks.sleep_n",
            "--args",
            "[0.01]",
            "--count",
            "50",
            "--replies",
            "50",
        ],
    );
    let nothing = produce(
        &olive,
        &[
            "--func",
            "olive.tasks.do_nothing",
            "--args",
            "[]",
            "--replies",
            "1",
        ],
    );

    Replies::of(slept).expect_all("SUCCESS");
    Replies::of(nothing).expect_all("SUCCESS");
}

/// Accepts: seed/message, seed/process_worker, seed/python_import_path, seed/response
#[test]
fn its_tasks_run_in_python_workers_by_import_path() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker).with_python_workers(2);
    let _worker = olive.run();

    let slept = produce(
        &olive,
        &[
            "--func",
            "olive.tasks.sleep_n",
            "--args",
            "[0.01]",
            "--count",
            "50",
            "--replies",
            "50",
        ],
    );
    let nothing = produce(
        &olive,
        &[
            "--func",
            "olive.tasks.do_nothing",
            "--args",
            "[]",
            "--replies",
            "1",
        ],
    );
    let own = produce(
        &olive,
        &[
            "--func",
            "jobs.add",
            "--args",
            "[40]",
            "--kwargs",
            r#"{"b": 2}"#,
            "--replies",
            "1",
        ],
    );

    let slept = Replies::of(slept);
    slept.expect_all("SUCCESS");
    assert!(slept.all().all(|reply| reply["result"] == json!(0.01)));
    assert_eq!(
        Replies::of(nothing).expect_all("SUCCESS").only()["result"],
        json!(null)
    );
    assert_eq!(
        Replies::of(own).expect_all("SUCCESS").only()["result"],
        json!(42)
    );
}

/// No other test may use these names: RabbitMQ is shared.
///
/// Accepts: seed/topology, seed/env_config
#[test]
fn its_default_exchange_queue_and_key_are_olives_too() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker)
        .with_default_names()
        .with_python_workers(1);
    let _worker = olive.run();
    let answer = produce(
        &olive,
        &[
            "--exchange",
            "Olive.x",
            "--key",
            "Olive.k",
            "--func",
            "jobs.add",
            "--args",
            "[1]",
            "--replies",
            "1",
        ],
    );
    assert_eq!(
        Replies::of(answer).expect_all("SUCCESS").only()["result"],
        json!(1)
    );
}

/// Accepts: seed/response
#[test]
fn an_error_goes_where_the_result_would_have_gone() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker)
        .with_python_workers(1)
        .set("olive_task_max_retries", "0");
    let _worker = olive.run();

    let failed = produce(
        &olive,
        &[
            "--func",
            "jobs.fail",
            "--args",
            r#"["no such luck"]"#,
            "--replies",
            "1",
        ],
    );

    let failed = Replies::of(failed);
    let reply = failed.expect_all("FAILURE").only();
    assert_eq!(reply["result"]["exc_type"], "ValueError");
    assert_eq!(reply["result"]["exc_message"], json!(["no such luck"]));
    let trace = reply["traceback"]
        .as_str()
        .expect("a failure has a traceback");
    assert!(trace.contains("in fail"), "{trace}");
    assert_eq!(reply["correlation_id"], reply["tid"]);
}

/// Real time is what this tests: the task would stand at the gate for ever.
///
/// Accepts: seed/timeout
#[test]
fn the_timeout_of_the_message_ends_the_task_and_its_process() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker)
        .with_python_workers(1)
        .set("olive_task_max_retries", "0");
    let _worker = olive.run();
    let gate = Gate::open();

    let arguments = format!("[{}, \"stuck\"]", gate.port());
    let ended = produce(
        &olive,
        &[
            "--func",
            "jobs.at_gate",
            "--args",
            &arguments,
            "--timeout",
            "1",
            "--replies",
            "1",
        ],
    );

    let stuck = Replies::of(ended);
    let reply = stuck.expect_all("FAILURE").only();
    assert_eq!(
        reply["result"]["exc_type"], "TimeLimitExceeded",
        "{reply:#}"
    );
    rig::wait_until_gone(gate.next().pid);
    let next = produce(
        &olive,
        &["--func", "jobs.add", "--args", "[1]", "--replies", "1"],
    );
    Replies::of(next).expect_all("SUCCESS");
}

/// Accepts: seed/env_config
#[test]
fn a_setting_that_cannot_be_read_is_refused_by_name() {
    let broker = Broker::under_test();
    let ended = Olive::on(&broker)
        .set("olive_amqp_qos", "ten")
        .call(&["run"])
        .expect_code(2);
    assert!(
        ended.stderr.contains("olive_amqp_qos") && ended.stderr.contains("ten"),
        "{}",
        ended.stderr
    );
}

/// Accepts: seed/env_config
#[test]
fn every_setting_of_sweepeas_is_understood() {
    let broker = Broker::under_test();
    let olive = Olive::on(&broker)
        .set("olive_amqp_qos", "10")
        .set("olive_amqp_global_qos", "true")
        .set("olive_worker_num_workers", "2")
        .set("olive_worker_worker_type", "thread")
        .set("olive_worker_pool_imp", "concurrent")
        .set("log_level", "debug");
    let worker = olive.run();
    let answer = produce(
        &olive,
        &[
            "--func",
            "olive.tasks.do_nothing",
            "--args",
            "[]",
            "--replies",
            "1",
        ],
    );
    Replies::of(answer).expect_all("SUCCESS");
    worker.signal(Signal::TERM);
    worker.ended().expect_code(0);
}
