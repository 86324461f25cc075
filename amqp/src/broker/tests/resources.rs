//! What is bounded, what is timed, and what is given back.

use std::time::Duration;

use super::rig::*;
use crate::broker::Config;
use crate::wire::cold::{self, Method, channel, connection};
use crate::wire::{Properties, Publish};

const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn heartbeats_are_sent_and_missed() {
    let mut rig = Rig::new();
    let mut client = rig.stranger();
    rig.greet(&mut client, 10);
    rig.read(&mut client);
    let mut beats = 0;
    for _ in 0..3 {
        rig.now = rig.broker.session_deadline(client.id).unwrap();
        rig.broker.session_tick(client.id, rig.now);
        beats += rig
            .read(&mut client)
            .iter()
            .filter(|line| *line == "heartbeat")
            .count();
    }
    assert_eq!(beats, 3, "one every five seconds");
    // The reading above was only ours; the client has said nothing for fifteen seconds. Any byte saves it.
    rig.send(&mut client, &[8, 0, 0]);
    rig.now += seconds(19);
    rig.broker.session_tick(client.id, rig.now);
    assert!(!rig.broker.is_over(client.id));
    rig.now += seconds(1);
    rig.broker.session_tick(client.id, rig.now);
    assert!(rig.broker.is_over(client.id));
}

#[test]
fn a_client_without_heartbeats_has_no_deadline_once_it_is_in() {
    let mut rig = Rig::new();
    let mut stranger = rig.stranger();
    assert_eq!(
        rig.broker.session_deadline(stranger.id),
        Some(rig.now + seconds(10))
    );
    let client = rig.client();
    assert_eq!(rig.broker.session_deadline(client.id), None);
    rig.now += seconds(10);
    rig.broker.session_tick(stranger.id, rig.now);
    assert!(
        rig.broker.is_over(stranger.id),
        "who says nothing for ten seconds is sent away"
    );
    assert_eq!(rig.read(&mut stranger), [""; 0]);
}

#[test]
fn a_session_that_does_not_take_its_output_gets_no_more_deliveries_and_is_not_read() {
    let config = Config {
        output_high: 10_000,
        output_low: 2_000,
        ..Config::default()
    };
    let mut rig = Rig::with(config);
    let mut publisher = rig.client();
    publisher.ask(&mut rig, declare("q"));
    let mut slow = rig.client();
    slow.ask(&mut rig, consume_with("q", "t", |c| c.no_ack = true));
    for _ in 0..100 {
        publisher.publish(&mut rig, "", "q", &"x".repeat(1000));
    }
    let (ready, ..) = rig.queue("q").unwrap();
    assert!((88..=91).contains(&ready), "about ten were sent: {ready}");
    assert!(!rig.broker.wants_input(slow.id) && rig.broker.wants_input(publisher.id));
    let mut bytes = Vec::new();
    rig.broker.take_output(slow.id, &mut bytes, rig.now);
    rig.broker.written(slow.id, 100, rig.now);
    assert_eq!(
        rig.queue("q").unwrap().0,
        ready,
        "a little is not enough to go on"
    );
    rig.broker.written(slow.id, bytes.len() - 100, rig.now);
    assert!(rig.queue("q").unwrap().0 < ready - 8);
    assert!(rig.unread(&mut slow) > 80_000);
    assert_eq!(rig.queue("q"), Some((0, 0, 1)));
}

#[test]
fn requests_whose_answers_are_not_taken_stay_unread() {
    let config = Config {
        output_high: 10_000,
        ..Config::default()
    };
    let mut rig = Rig::with(config);
    let mut client = rig.client();
    client.ask(&mut rig, declare("q"));
    for _ in 0..50 {
        client.publish(&mut rig, "", "q", &"x".repeat(1000));
    }
    let mut bytes = Vec::new();
    for _ in 0..50 {
        cold::put(&mut bytes, 1, &get("q", true));
    }
    let used = rig.broker.input(client.id, &bytes, rig.now);
    assert!(used < bytes.len() / 4, "{used} of {} bytes", bytes.len());
    assert_eq!(rig.queue("q").map(|(ready, ..)| ready >= 39), Some(true));
}

#[test]
fn a_peer_that_takes_nothing_for_half_a_minute_is_gone() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.method(&mut rig, 1, declare("q"));
    let mut bytes = Vec::new();
    rig.broker.take_output(client.id, &mut bytes, rig.now);
    assert_eq!(
        rig.broker.session_deadline(client.id),
        Some(rig.now + seconds(30))
    );
    rig.now += seconds(29);
    rig.broker.written(client.id, 1, rig.now);
    rig.now += seconds(29);
    rig.broker.session_tick(client.id, rig.now);
    assert!(!rig.broker.is_over(client.id));
    rig.now += seconds(1);
    rig.broker.session_tick(client.id, rig.now);
    assert!(rig.broker.is_over(client.id));
}

#[test]
fn short_of_memory_publishers_are_blocked_and_consumers_go_on() {
    let config = Config {
        memory_high: 20_000,
        memory_low: 10_000,
        ..Config::default()
    };
    let mut rig = Rig::with(config);
    let mut publisher = rig.client();
    publisher.ask(&mut rig, declare("q"));
    let mut consumer = rig.client();
    for _ in 0..50 {
        publisher.publish(&mut rig, "", "q", &"x".repeat(1000));
    }
    assert_eq!(rig.read(&mut publisher), ["0 blocked low on memory"]);
    assert!(!rig.broker.wants_input(publisher.id));
    assert!(rig.broker.memory() < 23_000, "{}", rig.broker.memory());
    let mut idle = rig.client();
    assert_eq!(
        rig.read(&mut idle),
        [""; 0],
        "who does not publish is not told"
    );

    // Its heartbeats may be among what is not read.
    let held = rig.queue("q").unwrap().0;
    consumer.ask(&mut rig, consume_with("q", "t", |c| c.no_ack = true));
    assert_eq!(rig.queue("q"), Some((0, 0, 1)));
    let lines = rig.read(&mut publisher);
    assert_eq!(lines[0], "0 unblocked");
    assert!(
        rig.read(&mut consumer).len() >= 50 - held,
        "what was held back came after"
    );
    assert_eq!((rig.queue("q"), rig.broker.memory()), (Some((0, 0, 1)), 0));
}

#[test]
fn a_blocked_publisher_is_not_expected_to_beat() {
    let mut rig = Rig::new();
    let mut client = rig.stranger();
    rig.greet(&mut client, 10);
    client.open(&mut rig, 1);
    client.publish(&mut rig, "", "nobody", "");
    rig.broker.block(Some("a test"));
    assert_eq!(rig.read(&mut client), ["0 blocked a test"]);
    for _ in 0..10 {
        rig.now += seconds(6);
        rig.broker.session_tick(client.id, rig.now);
        assert_eq!(rig.read(&mut client), ["heartbeat"]);
    }
    rig.broker.block(None);
    assert_eq!(rig.read(&mut client), ["0 unblocked"]);
    assert!(!rig.broker.is_over(client.id));
}

#[test]
fn a_message_larger_than_allowed_closes_its_channel() {
    let config = Config {
        message_max: 1000,
        ..Config::default()
    };
    let mut rig = Rig::with(config);
    let mut client = rig.client();
    client.publish(&mut rig, "", "q", &"x".repeat(1000));
    client.publish(&mut rig, "", "q", &"x".repeat(1001));
    assert_eq!(
        rig.read(&mut client),
        [
            "1 close 406 PRECONDITION_FAILED - message size 1001 is larger than configured max size 1000 (60, 40)"
        ]
    );
}

#[test]
fn half_a_message_counts_and_is_given_back_with_its_channel() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let mut bytes = Vec::new();
    Publish::default()
        .put(&mut bytes, 1, &[0, 0], &[b'x'; 5000], 1000)
        .unwrap();
    rig.send(&mut client, &bytes[..3500]);
    assert!(
        (2000..=3500).contains(&rig.broker.memory()),
        "{}",
        rig.broker.memory()
    );
    rig.broker.close(client.id, rig.now);
    assert_eq!(rig.broker.memory(), 0);
}

#[test]
fn limits_on_what_peers_create() {
    let config = Config {
        max_queues: 2,
        max_exchanges: 6,
        max_bindings: 1,
        max_consumers: 1,
        max_sessions: 4,
        ..Config::default()
    };
    let mut rig = Rig::with(config);
    let mut client = rig.client();
    client.ask(&mut rig, declare("a"));
    client.ask(&mut rig, declare("b"));
    client.ask(&mut rig, exchange("x", "direct"));
    client.ask(&mut rig, bind("a", "x", "1"));
    client.ask(&mut rig, consume("a", "t"));
    for (request, expected) in [
        (
            consume("b", "u"),
            "0 close 530 NOT_ALLOWED - more than 1 consumers on one channel (60, 20)",
        ),
        (
            declare("c"),
            "1 close 406 PRECONDITION_FAILED - cannot declare queue 'c' in vhost '/': queue limit in vhost '/' (2) is reached (50, 10)",
        ),
        (
            exchange("y", "direct"),
            "1 close 406 PRECONDITION_FAILED - cannot declare exchange 'y' in vhost '/': exchange limit in vhost '/' (6) is reached (40, 10)",
        ),
    ] {
        let mut other = rig.client();
        other.ask(&mut rig, consume("b", "t"));
        assert_eq!(other.ask(&mut rig, request), [expected]);
        rig.broker.close(other.id, rig.now);
    }
    let lines = client.ask(&mut rig, bind("b", "x", "2"));
    assert!(
        lines[0].starts_with(
            "1 close 406 PRECONDITION_FAILED - cannot bind with key '2': at most 1 bindings"
        ),
        "{lines:?}"
    );
    for _ in 0..3 {
        rig.stranger();
    }
    assert!(rig.broker.open(rig.now).is_none());
}

#[test]
fn a_connection_has_as_many_channels_as_was_agreed() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let open = Method::Channel(channel::AMQPMethod::Open(channel::Open {}));
    for number in 2..=2047 {
        client.method(&mut rig, number, open.clone());
    }
    assert_eq!(rig.read(&mut client).len(), 2046);
    // The number itself may be any, the count may not.
    client.method(&mut rig, 1, close_channel());
    client.method(&mut rig, 3000, open.clone());
    assert_eq!(rig.read(&mut client), ["1 close-ok", "3000 open-ok"]);
    client.method(&mut rig, 1, open);
    let lines = rig.read(&mut client);
    assert!(
        lines[0].starts_with("0 close 530 NOT_ALLOWED - number of channels opened (2047)"),
        "{lines:?}"
    );
}

/// Accepts: feature/update-secret
#[test]
fn leaving_in_good_order_and_being_asked_to() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let secret = connection::UpdateSecret {
        new_secret: "x".into(),
        reason: "".into(),
    };
    client.method(
        &mut rig,
        0,
        Method::Connection(connection::AMQPMethod::UpdateSecret(secret)),
    );
    assert_eq!(rig.read(&mut client), ["0 update-secret-ok"]);
    client.method(
        &mut rig,
        0,
        Method::Connection(connection::AMQPMethod::Close(connection::Close::default())),
    );
    assert_eq!(rig.read(&mut client), ["0 close-ok"]);
    assert!(rig.broker.is_over(client.id));

    let mut other = rig.client();
    rig.broker.shutdown(rig.now);
    assert_eq!(
        rig.read(&mut other),
        [
            "0 close 320 CONNECTION_FORCED - broker forced connection closure with reason 'shutdown' (0, 0)"
        ]
    );
    assert!(!rig.broker.is_over(other.id));
    other.method(
        &mut rig,
        0,
        Method::Connection(connection::AMQPMethod::CloseOk(connection::CloseOk {})),
    );
    assert!(rig.broker.is_over(other.id));
    let mut stubborn = rig.client();
    rig.broker.shutdown(rig.now);
    rig.read(&mut stubborn);
    rig.now += seconds(10);
    rig.broker.session_tick(stubborn.id, rig.now);
    assert!(rig.broker.is_over(stubborn.id));
}

#[test]
fn a_session_is_listed_once_when_it_has_something_to_hear_and_then_not_again() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let mut consumer = rig.client();
    client.ask(&mut rig, declare("q"));
    consumer.ask(&mut rig, consume("q", "t"));
    while rig.broker.next_changed().is_some() {}
    client.publish(&mut rig, "", "q", "a");
    client.publish(&mut rig, "", "q", "b");
    assert_eq!(rig.broker.next_changed(), Some(consumer.id));
    assert_eq!(rig.broker.next_changed(), None);
}

#[test]
fn confirms_wait_for_the_store_and_it_hears_of_persistent_messages_only() {
    let (mut rig, disk) = Rig::with_slow_disk();
    let mut client = rig.client();
    client.ask(&mut rig, declare_with("durable", |d| d.durable = true));
    client.ask(&mut rig, declare("transient"));
    client.ask(&mut rig, confirm_select());
    let persistent = Properties {
        delivery_mode: Some(2),
        ..Properties::default()
    };
    client.publish_with(&mut rig, "", "durable", "1", persistent);
    client.publish_with(&mut rig, "", "transient", "2", persistent);
    client.publish(&mut rig, "", "durable", "3");
    let held = |messages| [("durable".to_owned(), messages)];
    assert_eq!(
        (disk.held(), rig.read(&mut client)),
        (held(1).to_vec(), vec![])
    );
    disk.safe.set(1);
    rig.pass(Duration::ZERO);
    assert_eq!(rig.read(&mut client), ["1 ack 1"]);
    disk.safe.set(u64::MAX);
    rig.pass(Duration::ZERO);
    assert_eq!(rig.read(&mut client), ["1 ack 3 multiple"]);
    client.ask(&mut rig, get("durable", false));
    assert_eq!(disk.held(), held(1), "until it is settled");
    client.ack(&mut rig, 1, false);
    assert_eq!(disk.held(), held(0));
    client.ask(&mut rig, delete("durable", false, false));
    assert_eq!(disk.held(), []);
}
