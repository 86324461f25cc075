//! Where messages go, in which order, and what becomes of them.

use std::time::Duration;

use super::rig::*;
use crate::wire::cold::{Method, basic};
use crate::wire::{Properties, Publish, TableBuf, Value};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// A client with a queue `q` that holds `bodies`.
fn with_queue(rig: &mut Rig, bodies: &[&str]) -> Client {
    let mut client = rig.client();
    client.ask(rig, declare("q"));
    for body in bodies {
        client.publish(rig, "", "q", body);
    }
    client
}

#[test]
fn messages_come_in_the_order_in_which_they_were_published() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &["a", "b", "c"]);
    assert_eq!(
        client.ask(&mut rig, consume("q", "t")),
        [
            "1 consume-ok t",
            "1 deliver t #1 a",
            "1 deliver t #2 b",
            "1 deliver t #3 c"
        ]
    );
    client.publish(&mut rig, "", "q", "d");
    assert_eq!(rig.read(&mut client), ["1 deliver t #4 d"]);
    assert_eq!(rig.queue("q"), Some((0, 4, 1)));
    client.ack(&mut rig, 3, true);
    client.ack(&mut rig, 4, false);
    assert_eq!(rig.queue("q"), Some((0, 0, 1)));
    assert_eq!(rig.broker.memory(), 0);
}

#[test]
fn what_is_requeued_returns_to_its_place_marked_redelivered() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &["a", "b", "c", "d", "e"]);
    for _ in 0..4 {
        client.ask(&mut rig, get("q", false));
    }
    client.nack(&mut rig, 3, false, true);
    client.reject(&mut rig, 1, true);
    client.ack(&mut rig, 2, false);
    let mut other = rig.client();
    assert_eq!(
        other.ask(&mut rig, get("q", true)),
        ["1 get-ok #1 again 2 left a"]
    );
    assert_eq!(
        other.ask(&mut rig, get("q", true)),
        ["1 get-ok #2 again 1 left c"]
    );
    // The channel goes: what it had not settled comes back, in front of what is behind it.
    assert_eq!(client.ask(&mut rig, close_channel()), ["1 close-ok"]);
    assert_eq!(
        other.ask(&mut rig, get("q", true)),
        ["1 get-ok #3 again 1 left d"]
    );
    assert_eq!(
        other.ask(&mut rig, get("q", true)),
        ["1 get-ok #4 0 left e"]
    );
    assert_eq!(other.ask(&mut rig, get("q", true)), ["1 get-empty"]);
}

#[test]
fn a_connection_that_is_lost_gives_back_what_it_had() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &["a", "b"]);
    client.ask(&mut rig, consume("q", "t"));
    let mut other = rig.client();
    other.ask(&mut rig, consume("q", "u"));
    rig.broker.close(client.id, rig.now);
    assert_eq!(
        rig.read(&mut other),
        ["1 deliver u #1 again a", "1 deliver u #2 again b"]
    );
    assert_eq!(rig.queue("q"), Some((0, 2, 1)));
}

#[test]
fn recover_brings_everything_back() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &["a", "b"]);
    client.ask(&mut rig, get("q", false));
    client.ask(&mut rig, get("q", false));
    assert_eq!(client.ask(&mut rig, recover(true)), ["1 recover-ok"]);
    assert_eq!(client.drain(&mut rig, "q"), ["a", "b"]);
}

#[test]
fn prefetch_bounds_what_a_consumer_holds() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &["a", "b", "c", "d", "e"]);
    client.ask(&mut rig, qos(2, false));
    assert_eq!(
        client.ask(&mut rig, consume("q", "t")),
        ["1 consume-ok t", "1 deliver t #1 a", "1 deliver t #2 b"]
    );
    client.ack(&mut rig, 1, false);
    assert_eq!(rig.read(&mut client), ["1 deliver t #3 c"]);
    client.nack(&mut rig, 3, true, false);
    assert_eq!(
        rig.read(&mut client),
        ["1 deliver t #4 d", "1 deliver t #5 e"]
    );
    // It holds for consumers started later, not for those that are there.
    client.ask(&mut rig, qos(0, false));
    client.publish(&mut rig, "", "q", "f");
    assert_eq!(rig.read(&mut client), [""; 0]);
}

#[test]
fn a_prefetch_for_the_channel_is_shared_by_its_consumers() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &[]);
    client.ask(&mut rig, declare("r"));
    client.ask(&mut rig, qos(2, true));
    client.ask(&mut rig, consume("q", "t"));
    client.ask(&mut rig, consume("r", "u"));
    for queue in ["q", "r", "q", "r"] {
        client.publish(&mut rig, "", queue, queue);
    }
    assert_eq!(
        rig.read(&mut client),
        ["1 deliver t #1 q", "1 deliver u #2 r"]
    );
    // A place that is made on account of one queue may go to the other.
    client.ack(&mut rig, 2, true);
    assert_eq!(rig.read(&mut client).len(), 2);
    client.ask(&mut rig, qos(0, true));
    client.publish(&mut rig, "", "q", "no limit");
    assert_eq!(rig.read(&mut client), ["1 deliver t #5 no limit"]);
}

#[test]
fn consumers_take_turns_and_one_that_is_full_is_passed_over() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &[]);
    client.ask(&mut rig, qos(1, false));
    client.ask(&mut rig, consume("q", "small"));
    client.ask(&mut rig, qos(0, false));
    client.ask(&mut rig, consume("q", "a"));
    client.ask(&mut rig, consume("q", "b"));
    for n in 0..6 {
        client.publish(&mut rig, "", "q", &n.to_string());
    }
    let tags: Vec<String> = rig
        .read(&mut client)
        .iter()
        .map(|line| line.split(' ').nth(2).unwrap().to_owned())
        .collect();
    assert_eq!(tags, ["small", "a", "b", "a", "b", "a"]);
}

#[test]
fn a_higher_consumer_priority_goes_first_while_it_has_room() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &[]);
    client.ask(&mut rig, consume("q", "low"));
    client.ask(&mut rig, qos(2, false));
    client.ask(
        &mut rig,
        consume_with("q", "high", |c| {
            c.arguments = table(&[("x-priority", Value::I32(10))])
        }),
    );
    for body in ["a", "b", "c"] {
        client.publish(&mut rig, "", "q", body);
    }
    assert_eq!(
        rig.read(&mut client),
        [
            "1 deliver high #1 a",
            "1 deliver high #2 b",
            "1 deliver low #3 c"
        ]
    );
}

#[test]
fn a_single_active_consumer_has_the_queue_until_it_leaves() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(
        &mut rig,
        declare_args("q", &[("x-single-active-consumer", Value::Bool(true))]),
    );
    client.ask(&mut rig, consume("q", "first"));
    client.ask(&mut rig, consume("q", "second"));
    client.publish(&mut rig, "", "q", "a");
    client.publish(&mut rig, "", "q", "b");
    assert_eq!(
        rig.read(&mut client),
        ["1 deliver first #1 a", "1 deliver first #2 b"]
    );
    assert_eq!(client.ask(&mut rig, cancel("first")), ["1 cancel-ok first"]);
    client.nack(&mut rig, 1, false, true);
    assert_eq!(rig.read(&mut client), ["1 deliver second #3 again a"]);
}

#[test]
fn each_kind_of_exchange_routes_in_its_way() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    for queue in ["a", "b", "c"] {
        client.ask(&mut rig, declare(queue));
    }
    for (queue, exchange, key) in [
        ("a", "amq.direct", "k"),
        ("b", "amq.direct", "k"),
        ("b", "amq.direct", "k2"),
        ("a", "amq.fanout", "whatever"),
        ("c", "amq.fanout", ""),
        ("a", "amq.topic", "*.x"),
        ("b", "amq.topic", "#"),
        ("b", "amq.topic", "a.x"),
    ] {
        assert_eq!(
            client.ask(&mut rig, bind(queue, exchange, key)),
            ["1 bind-ok"]
        );
    }
    for (exchange, key, expected) in [
        ("", "c", "c"),
        ("", "nobody", ""),
        ("amq.direct", "k", "ab"),
        ("amq.direct", "k2", "b"),
        ("amq.direct", "K", ""),
        ("amq.fanout", "ignored", "ac"),
        // Two bindings to one queue are one copy.
        ("amq.topic", "a.x", "ab"),
        ("amq.topic", "x", "b"),
    ] {
        client.publish(&mut rig, exchange, key, "m");
        let got: String = ["a", "b", "c"]
            .into_iter()
            .filter(|queue| !client.drain(&mut rig, queue).is_empty())
            .collect();
        assert_eq!(got, expected, "{exchange} {key}");
    }
    client.ask(&mut rig, unbind("a", "amq.direct", "k"));
    client.publish(&mut rig, "amq.direct", "k", "m");
    assert_eq!(
        (
            client.drain(&mut rig, "a").len(),
            client.drain(&mut rig, "b").len()
        ),
        (0, 1)
    );
}

#[test]
fn exchanges_bound_in_a_circle_deliver_once_and_alternates_take_the_rest() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &[]);
    client.ask(&mut rig, exchange("x", "fanout"));
    client.ask(
        &mut rig,
        exchange_with("y", "direct", |d| {
            d.arguments = table(&[("alternate-exchange", Value::Str(b"x"))])
        }),
    );
    client.ask(&mut rig, bind_exchange("x", "y", "k"));
    client.ask(&mut rig, bind_exchange("y", "x", "k"));
    client.ask(&mut rig, bind("q", "x", ""));
    client.publish(&mut rig, "y", "k", "bound");
    client.publish(&mut rig, "y", "unknown", "alternate");
    assert_eq!(client.drain(&mut rig, "q"), ["bound", "alternate"]);
    client.ask(&mut rig, unbind_exchange("x", "y", "k"));
    client.publish(&mut rig, "y", "k", "alternate too");
    assert_eq!(client.drain(&mut rig, "q"), ["alternate too"]);
}

#[test]
fn auto_delete_goes_with_the_last_user_and_takes_its_bindings_along() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(
        &mut rig,
        exchange_with("x", "direct", |d| d.auto_delete = true),
    );
    client.ask(&mut rig, declare_with("q", |d| d.auto_delete = true));
    client.ask(&mut rig, bind("q", "x", "k"));
    client.ask(&mut rig, consume("q", "t"));
    client.ask(&mut rig, consume("q", "u"));
    client.ask(&mut rig, cancel("t"));
    assert!(rig.queue("q").is_some());
    client.ask(&mut rig, cancel("u"));
    assert_eq!(rig.queue("q"), None);
    assert_eq!(
        client.ask(&mut rig, exchange_with("x", "direct", |d| d.passive = true)),
        ["1 close 404 NOT_FOUND - no exchange 'x' in vhost '/' (40, 10)"]
    );
}

#[test]
fn exclusive_queues_go_with_their_connection() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let lines = client.ask(&mut rig, declare_with("", |d| d.exclusive = true));
    let name = lines[0].split(' ').nth(2).unwrap().to_owned();
    let unique = name.strip_prefix("amq.gen-").unwrap();
    assert_eq!(unique.len(), 22);
    assert!(
        unique
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)),
        "{name}"
    );
    // The empty name is now this queue.
    assert_eq!(client.ask(&mut rig, purge("")), ["1 purge-ok 0"]);
    rig.broker.close(client.id, rig.now);
    assert_eq!(rig.queue(&name), None);
}

/// Accepts: feature/consumer_cancel_notify
#[test]
fn consumers_of_a_deleted_queue_are_told() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &["a"]);
    client.ask(&mut rig, consume("q", "t"));
    let mut other = rig.client();
    assert_eq!(
        other.ask(&mut rig, delete("q", false, false)),
        ["1 delete-ok 0"]
    );
    assert_eq!(rig.read(&mut client), ["1 cancel t"]);
    // What it still holds of that queue can be settled without harm.
    client.ack(&mut rig, 1, false);
    assert_eq!(
        client.ask(&mut rig, consume("amq.rabbitmq.reply-to", "t"))[0]
            .split(' ')
            .nth(1),
        Some("close")
    );
}

#[test]
fn confirms_follow_routing_and_come_as_one_for_many() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &["before confirm.select"]);
    assert_eq!(client.ask(&mut rig, confirm_select()), ["1 select-ok"]);
    client.publish(&mut rig, "", "q", "1");
    assert_eq!(rig.read(&mut client), ["1 ack 1"]);
    let mut bytes = Vec::new();
    for key in ["q", "nobody", "q"] {
        let publish = Publish {
            routing_key: key,
            ..Publish::default()
        };
        publish.put(&mut bytes, 1, &[0, 0], b"m", 4096).unwrap();
    }
    rig.send(&mut client, &bytes);
    assert_eq!(rig.read(&mut client), ["1 ack 4 multiple"]);
    assert_eq!(rig.queue("q"), Some((4, 0, 0)));
}

#[test]
fn a_mandatory_message_that_no_queue_takes_comes_back_before_its_ack() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &[]);
    client.ask(&mut rig, confirm_select());
    let mut bytes = Vec::new();
    for (key, body) in [("nobody", "one"), ("q", "two"), ("nobody", "three")] {
        let publish = Publish {
            routing_key: key,
            mandatory: true,
            ..Publish::default()
        };
        publish
            .put(&mut bytes, 1, &[0, 0], body.as_bytes(), 4096)
            .unwrap();
    }
    rig.send(&mut client, &bytes);
    assert_eq!(
        rig.read(&mut client),
        [
            "1 return 312 nobody one",
            "1 return 312 nobody three",
            "1 ack 3 multiple"
        ]
    );
}

#[test]
fn a_full_queue_rejects_or_drops_as_it_was_told() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let limited = |name, overflow| {
        declare_args(
            name,
            &[
                ("x-max-length", Value::I32(2)),
                ("x-overflow", Value::Str(overflow)),
            ],
        )
    };
    client.ask(&mut rig, limited("q", b"reject-publish"));
    client.ask(&mut rig, limited("r", b"drop-head"));
    client.ask(&mut rig, confirm_select());
    let mut bytes = Vec::new();
    for queue in ["q", "r"] {
        for body in ["1", "2", "3", "4"] {
            let publish = Publish {
                routing_key: queue,
                ..Publish::default()
            };
            publish
                .put(&mut bytes, 1, &[0, 0], body.as_bytes(), 4096)
                .unwrap();
        }
    }
    rig.send(&mut client, &bytes);
    assert_eq!(
        rig.read(&mut client),
        [
            "1 ack 2 multiple",
            "1 nack 3",
            "1 nack 4",
            "1 ack 8 multiple"
        ]
    );
    assert_eq!(client.drain(&mut rig, "q"), ["1", "2"]);
    assert_eq!(client.drain(&mut rig, "r"), ["3", "4"]);
    // Bytes of bodies are counted likewise, and a message on its way to a consumer is not in the way.
    client.ask(
        &mut rig,
        declare_args("s", &[("x-max-length-bytes", Value::I32(10))]),
    );
    client.ask(&mut rig, qos(1, false));
    client.ask(&mut rig, consume("s", "t"));
    for body in ["delivered", "dropped", "kept-6", "k-4!"] {
        client.publish(&mut rig, "", "s", body);
    }
    assert!(
        rig.read(&mut client)
            .contains(&"1 deliver t #5 delivered".to_owned())
    );
    assert_eq!(client.drain(&mut rig, "s"), ["kept-6", "k-4!"]);
}

#[test]
fn messages_and_queues_expire() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(
        &mut rig,
        declare_args("q", &[("x-message-ttl", Value::I32(1000))]),
    );
    client.publish(&mut rig, "", "q", "a");
    rig.pass(ms(600));
    client.publish(&mut rig, "", "q", "b");
    let sooner = Properties {
        expiration: Some("100"),
        ..Properties::default()
    };
    client.publish_with(&mut rig, "", "q", "c", sooner);
    assert_eq!(
        rig.broker.deadline(),
        Some(rig.now + ms(400)),
        "only the head is looked at"
    );
    rig.pass(ms(399));
    assert_eq!(rig.queue("q"), Some((3, 0, 0)));
    rig.pass(ms(1));
    assert_eq!(rig.queue("q"), Some((2, 0, 0)));
    rig.pass(ms(600));
    assert_eq!(rig.queue("q"), Some((0, 0, 0)));
    assert_eq!(rig.broker.deadline(), None);

    client.ask(
        &mut rig,
        declare_args("r", &[("x-expires", Value::I32(1000))]),
    );
    rig.pass(ms(900));
    client.ask(&mut rig, get("r", true));
    rig.pass(ms(900));
    client.ask(&mut rig, consume("r", "t"));
    rig.pass(ms(5000));
    assert_eq!(rig.queue("r"), Some((0, 0, 1)), "with a consumer it stays");
    client.ask(&mut rig, cancel("t"));
    rig.pass(ms(999));
    assert!(rig.queue("r").is_some());
    rig.pass(ms(1));
    assert_eq!(rig.queue("r"), None);
}

#[test]
fn a_message_that_may_not_wait_goes_to_a_free_consumer_or_nowhere() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &[]);
    let at_once = || Properties {
        expiration: Some("0"),
        ..Properties::default()
    };
    client.publish_with(&mut rig, "", "q", "nobody there", at_once());
    assert_eq!(rig.queue("q"), Some((0, 0, 0)));
    client.ask(&mut rig, consume("q", "t"));
    client.publish_with(&mut rig, "", "q", "taken", at_once());
    assert_eq!(rig.read(&mut client), ["1 deliver t #1 taken"]);
}

#[test]
fn priority_queues_deliver_the_highest_first() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(
        &mut rig,
        declare_args("q", &[("x-max-priority", Value::I32(5))]),
    );
    for (body, priority) in [("a", None), ("b", Some(3)), ("c", Some(9)), ("d", Some(0))] {
        let props = Properties {
            priority,
            ..Properties::default()
        };
        client.publish_with(&mut rig, "", "q", body, props);
    }
    assert_eq!(client.drain(&mut rig, "q"), ["c", "b", "a", "d"]);
}

/// The entries of `x-death` of the first message in `queue`, and its other headers.
fn deaths(rig: &mut Rig, client: &mut Client, queue: &str) -> (Vec<String>, Vec<String>, String) {
    let (props, line) = client.get_props(rig, queue);
    let headers = props.as_props().headers().unwrap();
    let text = |value: Value<'_>| match value {
        Value::Array(array) => array
            .iter()
            .map(|v| v.as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
            .join(","),
        Value::Timestamp(at) => at.to_string(),
        value => value
            .as_str()
            .map_or_else(|| value.as_int().unwrap().to_string(), str::to_owned),
    };
    let entries = headers
        .get("x-death")
        .unwrap()
        .as_array()
        .unwrap()
        .iter()
        .map(|death| {
            let mut fields: Vec<String> = death
                .as_table()
                .unwrap()
                .iter()
                .map(|(k, v)| format!("{k}={}", text(v)))
                .collect();
            fields.sort();
            fields.join(" ")
        });
    let mut others: Vec<String> = headers
        .iter()
        .filter(|(k, _)| *k != "x-death")
        .map(|(k, v)| format!("{k}={}", text(v)))
        .collect();
    others.sort();
    (entries.collect(), others, line)
}

#[test]
fn dead_letters_tell_how_they_died() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(&mut rig, declare("dead"));
    client.ask(
        &mut rig,
        declare_args(
            "q",
            &[
                ("x-dead-letter-exchange", Value::Str(b"")),
                ("x-dead-letter-routing-key", Value::Str(b"dead")),
            ],
        ),
    );
    let mut headers = TableBuf::new();
    let mut copies = crate::wire::props::ArrayBuf::new();
    copies.push("nowhere");
    headers
        .insert("a", 1)
        .unwrap()
        .insert("CC", copies.as_array())
        .unwrap();
    let props = Properties {
        headers: Some(headers.as_table()),
        expiration: Some("60000"),
        ..Properties::default()
    };
    client.publish_with(&mut rig, "", "q", "body", props);
    client.ask(&mut rig, get("q", false));
    client.reject(&mut rig, 1, false);
    let (entries, others, line) = deaths(&mut rig, &mut client, "dead");
    assert_eq!(
        entries,
        [
            "count=1 exchange= original-expiration=60000 queue=q reason=rejected routing-keys=q,nowhere time=1800000000"
        ]
    );
    assert_eq!(
        others,
        [
            "a=1",
            "x-first-death-exchange=",
            "x-first-death-queue=q",
            "x-first-death-reason=rejected"
        ]
    );
    assert!(
        line.ends_with(" 0 left body") && !line.contains("again"),
        "{line}"
    );
}

/// RabbitMQ keeps such messages too, though few clients would send them.
#[test]
fn a_dead_letter_keeps_properties_that_we_would_not_send() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(&mut rig, declare("dead"));
    let to_dead = [
        ("x-dead-letter-exchange", Value::Str(b"")),
        ("x-dead-letter-routing-key", Value::Str(b"dead")),
    ];
    client.ask(&mut rig, declare_args("q", &to_dead));
    let publish = Publish {
        routing_key: "q",
        ..Publish::default()
    };
    // A header "k\0", a correlation_id that is no UTF-8, and a message_id with a zero byte.
    let props = b"\x24\x80\0\0\0\x05\x02k\0t\x01\x02\xff\xfe\x02m\0";
    let mut bytes = Vec::new();
    publish.put(&mut bytes, 1, props, b"body", 131_064).unwrap();
    rig.send(&mut client, &bytes);
    client.ask(&mut rig, get("q", false));
    client.reject(&mut rig, 1, false);
    let (letter, line) = client.get_props(&mut rig, "dead");
    assert!(line.ends_with(" body"), "{line}");
    let letter = letter.as_props();
    assert_eq!(letter.header("k\0"), Some(Value::Bool(true)));
    assert_eq!(letter.message_id(), Some("m\0"));
    let count = letter.header("x-death").unwrap().as_array().unwrap();
    assert_eq!(count.iter().count(), 1);
    assert!(letter.as_bytes().ends_with(b"\x02\xff\xfe\x02m\0"));
}

#[test]
fn deaths_of_the_same_kind_are_counted_and_the_newest_kind_is_first() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(
        &mut rig,
        declare_args(
            "q",
            &[
                ("x-dead-letter-exchange", Value::Str(b"")),
                ("x-dead-letter-routing-key", Value::Str(b"wait")),
            ],
        ),
    );
    client.ask(
        &mut rig,
        declare_args(
            "wait",
            &[
                ("x-dead-letter-exchange", Value::Str(b"")),
                ("x-dead-letter-routing-key", Value::Str(b"q")),
                ("x-message-ttl", Value::I32(10)),
            ],
        ),
    );
    client.publish(&mut rig, "", "q", "m");
    for _ in 0..2 {
        let line = client.ask(&mut rig, get("q", false)).remove(0);
        let tag = line.split(['#', ' ']).nth(3).unwrap().parse().unwrap();
        client.nack(&mut rig, tag, false, false);
        rig.pass(ms(10));
    }
    let (entries, _, _) = deaths(&mut rig, &mut client, "q");
    let short: Vec<String> = entries
        .iter()
        .map(|e| {
            e.split(' ')
                .filter(|f| f.starts_with("count") || f.starts_with("reason"))
                .collect()
        })
        .collect();
    assert_eq!(short, ["count=2reason=expired", "count=2reason=rejected"]);
}

#[test]
fn a_circle_of_expiries_ends() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(
        &mut rig,
        declare_args(
            "q",
            &[
                ("x-dead-letter-exchange", Value::Str(b"")),
                ("x-dead-letter-routing-key", Value::Str(b"q")),
                ("x-message-ttl", Value::I32(0)),
            ],
        ),
    );
    client.publish(&mut rig, "", "q", "m");
    assert_eq!((rig.queue("q"), rig.broker.memory()), (Some((0, 0, 0)), 0));
}

#[test]
fn a_delivery_limit_ends_going_back_and_forth() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(&mut rig, declare("dead"));
    client.ask(
        &mut rig,
        declare_args(
            "q",
            &[
                ("x-queue-type", Value::Str(b"quorum")),
                ("x-delivery-limit", Value::I32(2)),
                ("x-dead-letter-exchange", Value::Str(b"")),
                ("x-dead-letter-routing-key", Value::Str(b"dead")),
            ],
        ),
    );
    client.publish(&mut rig, "", "q", "m");
    client.ask(&mut rig, consume("q", "t"));
    for tag in 1..=3 {
        client.nack(&mut rig, tag, false, true);
    }
    assert_eq!(
        (rig.queue("q"), rig.queue("dead")),
        (Some((0, 0, 1)), Some((1, 0, 0)))
    );
}

#[test]
fn copies_go_to_further_keys_and_the_blind_ones_are_not_shown() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &[]);
    client.ask(&mut rig, declare("r"));
    client.ask(&mut rig, declare("s"));
    let mut headers = TableBuf::new();
    for (name, key) in [("CC", "r"), ("BCC", "s")] {
        let mut keys = crate::wire::props::ArrayBuf::new();
        keys.push(key);
        headers.insert(name, keys.as_array()).unwrap();
    }
    let props = Properties {
        headers: Some(headers.as_table()),
        ..Properties::default()
    };
    client.publish_with(&mut rig, "", "q", "m", props);
    for queue in ["q", "r", "s"] {
        let (props, _) = client.get_props(&mut rig, queue);
        let names: Vec<&str> = props
            .as_props()
            .headers()
            .unwrap()
            .iter()
            .map(|(k, _)| k)
            .collect();
        assert_eq!(names, ["CC"], "{queue}");
    }
}

/// Accepts: feature/direct_reply-to
#[test]
fn a_reply_finds_its_asker_and_only_while_it_listens() {
    let mut rig = Rig::new();
    let mut asker = with_queue(&mut rig, &[]);
    let mut server = rig.client();
    let reply_to = "amq.rabbitmq.reply-to";
    asker.ask(
        &mut rig,
        consume_with(reply_to, "answers", |c| c.no_ack = true),
    );
    let props = Properties {
        reply_to: Some(reply_to),
        correlation_id: Some("7"),
        ..Properties::default()
    };
    asker.publish_with(&mut rig, "", "q", "question", props);
    let (props, _) = server.get_props(&mut rig, "q");
    let address = props.as_props().reply_to().unwrap().to_owned();
    assert!(
        address.starts_with("amq.rabbitmq.reply-to.")
            && props.as_props().correlation_id() == Some("7")
    );
    assert_eq!(server.ask(&mut rig, passive(&address)).len(), 1);
    server.publish(&mut rig, "", &address, "answer");
    assert_eq!(rig.read(&mut asker), ["1 deliver answers #1 answer"]);
    // It has used up no tag.
    server.publish(&mut rig, "", &address, "again");
    server.publish(&mut rig, "", "q", "other");
    assert_eq!(rig.read(&mut asker), ["1 deliver answers #1 again"]);
    let seen = asker.ask(&mut rig, consume("q", "others"));
    assert_eq!(seen[1..], ["1 deliver others #1 other"]);
    server.publish(&mut rig, "", &address, "third");
    assert_eq!(rig.read(&mut asker), ["1 deliver answers #2 third"]);
    asker.ask(&mut rig, close_channel());
    server.put(
        &mut rig,
        &Publish {
            routing_key: &address,
            mandatory: true,
            ..Publish::default()
        },
        Properties::default(),
        b"too late",
    );
    assert_eq!(
        rig.read(&mut server),
        [format!("1 return 312 {address} too late")]
    );
}

/// Accepts: feature/body
#[test]
fn bodies_of_every_size_pass_unchanged_with_their_properties() {
    let mut rig = Rig::new();
    let mut client = with_queue(&mut rig, &[]);
    let mut headers = TableBuf::new();
    headers.insert("n", 1).unwrap();
    let props = Properties {
        headers: Some(headers.as_table()),
        content_type: Some("text/plain"),
        ..Properties::default()
    };
    let encoded = props.encode().unwrap();
    for len in [0, 1, 131_063, 131_064, 131_065, 16 << 20] {
        let body = "x".repeat(len);
        client.publish_with(&mut rig, "", "q", &body, props);
        let (got, line) = client.get_props(&mut rig, "q");
        assert_eq!(got, encoded);
        assert!(line.ends_with(&format!(" {body}")), "{len}");
    }
    assert_eq!(rig.broker.memory(), 0);
}

/// Accepts: amqp/R35
#[test]
fn a_session_cut_anywhere_has_the_same_effect() {
    let record = |client: &mut Client, rig: &mut Rig, bytes: &[u8], cut: usize| {
        rig.send(client, &bytes[..cut]);
        rig.send(client, &bytes[cut..]);
        rig.read(client)
    };
    let mut bytes = Vec::new();
    for method in [declare("q"), confirm_select()] {
        crate::wire::cold::put(&mut bytes, 1, &method);
    }
    let publish = Publish {
        routing_key: "q",
        ..Publish::default()
    };
    publish
        .put(&mut bytes, 1, &[0x10, 0, 2], b"a body in two frames", 16)
        .unwrap();
    crate::wire::cold::put(
        &mut bytes,
        1,
        &Method::Basic(basic::AMQPMethod::Get(basic::Get {
            queue: "q".into(),
            no_ack: true,
        })),
    );
    for cut in 0..=bytes.len() {
        let mut rig = Rig::new();
        let mut client = rig.client();
        let mut lines = record(&mut client, &mut rig, &bytes, cut);
        // A confirm waits for the end of what was read, so it alone may change its place.
        lines.sort();
        assert_eq!(
            lines,
            [
                "1 ack 1",
                "1 declare-ok q 0 0",
                "1 get-ok #1 0 left a body in two frames",
                "1 select-ok"
            ],
            "cut at {cut}"
        );
    }
}
