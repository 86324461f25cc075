//! Transactions: what waits for the commit, what a rollback gives back, and what they may hold.

use std::time::Duration;

use super::rig::*;
use crate::broker::Config;
use crate::wire::cold::{Method, tx};
use crate::wire::{Properties, Publish};

fn select() -> Method {
    Method::Tx(tx::AMQPMethod::Select(tx::Select {}))
}

fn commit() -> Method {
    Method::Tx(tx::AMQPMethod::Commit(tx::Commit {}))
}

fn rollback() -> Method {
    Method::Tx(tx::AMQPMethod::Rollback(tx::Rollback {}))
}

/// A client with a transaction and a queue `q`.
fn begun() -> (Rig, Client) {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(&mut rig, declare("q"));
    assert_eq!(client.ask(&mut rig, select()), ["1 select-ok"]);
    (rig, client)
}

/// Accepts: feature/flow_and_tx
#[test]
fn what_is_published_is_there_with_the_commit_and_never_after_a_rollback() {
    let (mut rig, mut client) = begun();
    client.publish(&mut rig, "", "q", "1");
    client.publish(&mut rig, "", "q", "2");
    assert_eq!(client.ask(&mut rig, passive("q")), ["1 declare-ok q 0 0"]);
    assert_eq!(client.ask(&mut rig, commit()), ["1 commit-ok"]);
    assert_eq!(client.ask(&mut rig, passive("q")), ["1 declare-ok q 2 0"]);
    client.publish(&mut rig, "", "q", "3");
    assert_eq!(client.ask(&mut rig, rollback()), ["1 rollback-ok"]);
    assert_eq!(client.ask(&mut rig, commit()), ["1 commit-ok"]);
    client.publish(&mut rig, "", "q", "4");
    client.ask(&mut rig, close_channel());
    client.open(&mut rig, 1);
    assert_eq!(client.drain(&mut rig, "q"), ["1", "2"]);
}

/// Accepts: feature/flow_and_tx
#[test]
fn what_is_settled_makes_room_with_the_commit_and_is_unsettled_after_a_rollback() {
    let (mut rig, mut client) = begun();
    for body in ["1", "2", "3", "4"] {
        client.publish(&mut rig, "", "q", body);
    }
    client.ask(&mut rig, commit());
    client.ask(&mut rig, qos(3, false));
    assert_eq!(client.ask(&mut rig, consume("q", "t")).len(), 4);
    client.ack(&mut rig, 2, true);
    assert_eq!(rig.read(&mut client), [""; 0], "no room before the commit");
    assert_eq!(client.ask(&mut rig, rollback()), ["1 rollback-ok"]);
    // The same again, now for good: they are there to be settled.
    client.ack(&mut rig, 2, true);
    client.nack(&mut rig, 3, false, false);
    let lines = client.ask(&mut rig, commit());
    assert_eq!(lines[0], "1 commit-ok");
    assert!(lines[1].ends_with(" 4"), "{lines:?}");
    client.ack(&mut rig, 0, true);
    client.ask(&mut rig, close_channel());
    assert_eq!(rig.queue("q"), Some((1, 0, 0)), "4 was not committed");
}

#[test]
fn a_delivery_is_settled_once_in_a_transaction_too() {
    let unknown =
        |tag| format!("1 close 406 PRECONDITION_FAILED - unknown delivery tag {tag} (60, 80)");
    for (first, second) in [
        ((1, false), (1, false)),
        ((2, true), (1, false)),
        ((2, true), (2, true)),
        ((0, true), (2, false)),
    ] {
        let (mut rig, mut client) = begun();
        client.publish(&mut rig, "", "q", "1");
        client.publish(&mut rig, "", "q", "2");
        client.ask(&mut rig, commit());
        client.ask(&mut rig, get("q", false));
        client.ask(&mut rig, get("q", false));
        client.ack(&mut rig, first.0, first.1);
        // Everything there is may be nothing.
        client.ack(&mut rig, 0, true);
        assert_eq!(rig.read(&mut client), [""; 0]);
        client.ack(&mut rig, second.0, second.1);
        assert_eq!(rig.read(&mut client), [unknown(second.0)]);
        assert_eq!(rig.queue("q"), Some((2, 0, 0)), "{first:?} {second:?}");
    }
}

#[test]
fn recover_leaves_alone_what_the_transaction_has_settled() {
    let (mut rig, mut client) = begun();
    client.publish(&mut rig, "", "q", "1");
    client.publish(&mut rig, "", "q", "2");
    client.ask(&mut rig, commit());
    client.ask(&mut rig, get("q", false));
    client.ask(&mut rig, get("q", false));
    client.ack(&mut rig, 1, false);
    assert_eq!(client.ask(&mut rig, recover(true)), ["1 recover-ok"]);
    assert_eq!(client.ask(&mut rig, commit()), ["1 commit-ok"]);
    assert_eq!(client.drain(&mut rig, "q"), ["2"]);
}

#[test]
fn faults_are_told_at_once_and_returns_come_with_the_commit() {
    let (mut rig, mut client) = begun();
    let nowhere = Publish {
        routing_key: "nowhere",
        mandatory: true,
        ..Publish::default()
    };
    client.put(&mut rig, &nowhere, Properties::default(), b"m");
    assert_eq!(rig.read(&mut client), [""; 0]);
    assert_eq!(
        client.ask(&mut rig, commit()),
        ["1 return 312 nowhere m", "1 commit-ok"]
    );
    client.publish(&mut rig, "missing", "k", "m");
    let lines = rig.read(&mut client);
    assert!(lines[0].starts_with("1 close 404"), "{lines:?}");
}

#[test]
fn a_commit_that_a_full_queue_refuses_in_part_closes_the_channel() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let full = [
        ("x-max-length", 1.into()),
        ("x-overflow", "reject-publish".into()),
    ];
    client.ask(&mut rig, declare_args("full", &full));
    client.ask(&mut rig, select());
    client.publish(&mut rig, "", "full", "1");
    client.publish(&mut rig, "", "full", "2");
    assert_eq!(
        client.ask(&mut rig, commit()),
        ["1 close 406 PRECONDITION_FAILED - partial tx completion (90, 20)"]
    );
}

#[test]
fn a_channel_has_transactions_or_confirms() {
    let (mut rig, mut client) = begun();
    assert_eq!(client.ask(&mut rig, select()), ["1 select-ok"]);
    assert_eq!(
        client.ask(&mut rig, confirm_select()),
        ["1 close 406 PRECONDITION_FAILED - cannot switch from tx to confirm mode (85, 10)"]
    );
}

#[test]
fn a_transaction_may_hold_half_of_the_brokers_memory_and_so_many_operations() {
    let mut rig = Rig::with(Config {
        memory_high: 64 << 10,
        ..Config::default()
    });
    let mut client = rig.client();
    client.ask(&mut rig, declare("q"));
    client.ask(&mut rig, select());
    let body = "x".repeat(10 << 10);
    for _ in 0..3 {
        client.publish(&mut rig, "", "q", &body);
    }
    assert_eq!(rig.read(&mut client), [""; 0]);
    client.publish(&mut rig, "", "q", &body);
    assert_eq!(
        rig.read(&mut client),
        [
            "1 close 406 PRECONDITION_FAILED - transaction holds more than 32768 bytes, commit sooner (60, 40)"
        ]
    );
    let (mut rig, mut client) = begun();
    for _ in 0..1 << 16 {
        client.publish(&mut rig, "", "q", "");
    }
    assert_eq!(rig.read(&mut client), [""; 0]);
    client.publish(&mut rig, "", "q", "");
    assert_eq!(
        rig.read(&mut client),
        [
            "1 close 406 PRECONDITION_FAILED - transaction has more than 65536 operations, commit sooner (60, 40)"
        ]
    );
    assert_eq!(rig.queue("q"), Some((0, 0, 0)));
}

#[test]
fn commit_ok_waits_for_the_store() {
    let (mut rig, disk) = Rig::with_slow_disk();
    let mut client = rig.client();
    client.ask(&mut rig, declare("q"));
    client.ask(&mut rig, select());
    client.publish(&mut rig, "", "q", "1");
    assert_eq!(client.ask(&mut rig, commit()), [""; 0]);
    assert_eq!(client.ask(&mut rig, commit()), [""; 0]);
    disk.safe.set(1);
    rig.pass(Duration::ZERO);
    assert_eq!(rig.read(&mut client), ["1 commit-ok"]);
    disk.safe.set(u64::MAX);
    rig.pass(Duration::ZERO);
    assert_eq!(rig.read(&mut client), ["1 commit-ok"]);
    // Who does not wait gets only so far ahead.
    disk.safe.set(0);
    for _ in 0..1 << 10 {
        assert_eq!(client.ask(&mut rig, commit()), [""; 0]);
    }
    let lines = client.ask(&mut rig, commit());
    assert!(lines[0].starts_with("1 close 406"), "{lines:?}");
}
