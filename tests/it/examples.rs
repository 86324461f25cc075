//! The client's examples, run as the programs they are: against the broker under test, and with the one they bring along.

use std::process::Command;

use amqp::client::{self, Options};
use rig::{Broker, PATIENCE, Process, Proxy, Signal, unique};

const PUBLISH: &str = env!("CARGO_BIN_EXE_example-publish");
const CONSUME: &str = env!("CARGO_BIN_EXE_example-consume");
const RPC: &str = env!("CARGO_BIN_EXE_example-rpc");
const TOPOLOGY: &str = env!("CARGO_BIN_EXE_example-topology");
const RECOVERY: &str = env!("CARGO_BIN_EXE_example-recovery");

fn start(example: &str, arguments: &[&str]) -> Process {
    Process::spawn(Command::new(example).args(arguments))
}

/// Runs one to its end; what it printed.
#[track_caller]
fn run(example: &str, arguments: &[&str]) -> Vec<String> {
    let ended = start(example, arguments).ended().expect_code(0);
    ended.stdout.lines().map(str::to_owned).collect()
}

#[test]
fn what_one_example_publishes_another_consumes_until_it_is_told_to_end() {
    let broker = Broker::under_test();
    let (url, queue) = (broker.url(), unique("example"));
    let published = run(PUBLISH, &[&url, &queue, "one", "two"]);
    assert_eq!(
        published,
        ["the broker has \"one\"", "the broker has \"two\""]
    );
    let consumer = start(CONSUME, &[&url, &queue]);
    consumer.wait_for_line("two");
    run(PUBLISH, &[&url, &queue, "three"]);
    consumer.wait_for_line("three");
    consumer.signal(Signal::INT);
    let consumed = consumer.ended().expect_code(0).stdout;
    assert_eq!(consumed, "one\ntwo\nthree\n");

    kernel::run(async {
        let connection = client::connect(&url, Options::default()).await?;
        let channel = connection.channel().await?;
        assert_eq!(channel.delete_queue(&queue).await?, 0, "all was acked");
        let _ = connection.close(PATIENCE).await?;
        Ok::<(), client::Error>(())
    })
    .unwrap()
    .unwrap();
}

#[test]
fn without_an_address_they_bring_a_broker_of_their_own() {
    let published = run(PUBLISH, &[]);
    assert!(published[0].starts_with("no address was given"));
    assert_eq!(
        published[1..],
        ["one", "two", "three"].map(|body| format!("the broker has {body:?}"))
    );
    let consumer = start(CONSUME, &[]);
    let line = consumer.wait_for_line("no address was given");
    let url = line.rsplit(' ').next().expect("it ends with the address");
    run(PUBLISH, &[url, "tasks", "from elsewhere"]);
    consumer.wait_for_line("from elsewhere");
    consumer.signal(Signal::TERM);
    consumer.ended().expect_code(0);
}

#[test]
fn questions_are_answered() {
    let broker = Broker::under_test();
    let doubled = [1, 2, 3, 4, 5].map(|n| format!("{n} doubled is {}", 2 * n));
    assert_eq!(run(RPC, &[&broker.url()]), doubled);
    assert_eq!(run(RPC, &[])[1..], doubled);
}

#[test]
fn messages_go_where_the_topology_says() {
    let broker = Broker::under_test();
    for arguments in [&[&*broker.url()][..], &[]] {
        let lines = run(TOPOLOGY, arguments);
        let lines = &lines[lines.len() - 4..];
        let fields: Vec<_> = lines[..3]
            .iter()
            .filter_map(|line| line.split_once(": "))
            .collect();
        let [north, south, chess] = fields[..] else {
            panic!("{lines:?}")
        };
        assert_eq!(
            [north.1, south.1, chess.1],
            ["weather.north", "weather.south.coast", "sports.chess"]
        );
        assert!(north.0 == south.0 && south.0 != chess.0, "{lines:?}");
        assert!(lines[3].contains("404 NOT_FOUND"), "{lines:?}");
    }
}

#[test]
fn a_lost_connection_is_told_of_and_costs_no_number() {
    let broker = Broker::under_test();
    let proxy = Proxy::to(broker.address());
    let example = start(RECOVERY, &[&broker.url_through(proxy.address()), "4"]);
    example.wait_for_line("got 0");
    proxy.reset();
    let ended = example.ended().expect_code(0).stdout;
    for said in [
        "lost: ",
        "attempt 1 in ",
        "recovered, renamed [(\"amq.gen-",
        "got 1",
        "got 2",
        "got 3",
    ] {
        assert!(ended.contains(said), "no {said:?} in\n{ended}");
    }
}
