//! What is refused, in which words, and how far it reaches. The answers are RabbitMQ 3.10.8's, given to the same requests.

use super::rig::*;
use crate::wire::cold::{Method, basic, channel, tx};
use crate::wire::{PROTOCOL_HEADER, Properties, Publish, TableBuf, Value};

const GUEST: &str = "guest";

/// What a client is answered on channel 1 after `first` and `then`, without what `first` is answered.
fn answer(first: &[Method], then: Method) -> String {
    let mut rig = Rig::new();
    let mut client = rig.client();
    for method in first {
        client.method(&mut rig, 1, method.clone());
    }
    let before = rig.read(&mut client);
    assert!(
        !before.iter().any(|line| line.contains(" close ")),
        "{before:?}"
    );
    client.ask(&mut rig, then).join("\n")
}

#[test]
fn declaring_a_queue_again_must_be_the_same_declaration() {
    let durable = || declare_with("q", |d| d.durable = true);
    let auto_delete = || declare_with("q", |d| d.auto_delete = true);
    let plain = "close 406 PRECONDITION_FAILED - inequivalent arg";
    let q = "for queue 'q' in vhost '/'";
    let with = |ttl: Value<'static>| declare_args("q", &[("x-message-ttl", ttl)]);
    assert_eq!(answer(&[declare("q")], declare("q")), "1 declare-ok q 0 0");
    for (first, then, expected) in [
        (
            declare("q"),
            durable(),
            format!("{plain} 'durable' {q}: received 'true' but current is 'false'"),
        ),
        (
            durable(),
            declare("q"),
            format!("{plain} 'durable' {q}: received 'false' but current is 'true'"),
        ),
        (
            declare("q"),
            auto_delete(),
            format!("{plain} 'auto_delete' {q}: received 'true' but current is 'false'"),
        ),
        (
            with(Value::I32(60000)),
            with(Value::I64(60001)),
            format!("{plain} 'x-message-ttl' {q}: received '60001' but current is '60000'"),
        ),
        (
            with(Value::I32(60000)),
            with(Value::Str(b"a")),
            format!("{plain} 'x-message-ttl' {q}: received 'a' but current is '60000'"),
        ),
        (
            with(Value::I32(60000)),
            declare("q"),
            format!(
                "{plain} 'x-message-ttl' {q}: received none but current is the value '60000' of type 'signedint'"
            ),
        ),
        (
            declare("q"),
            with(Value::I32(60000)),
            format!(
                "{plain} 'x-message-ttl' {q}: received the value '60000' of type 'signedint' but current is none"
            ),
        ),
    ] {
        assert_eq!(answer(&[first], then), format!("1 {expected} (50, 10)"));
    }
    // The width of a number does not matter, nor what nobody knows.
    assert_eq!(
        answer(&[with(Value::I32(7))], with(Value::I64(7))),
        "1 declare-ok q 0 0"
    );
    assert_eq!(
        answer(
            &[declare("q")],
            declare_args("q", &[("x-foo", Value::I32(1))])
        ),
        "1 declare-ok q 0 0"
    );
}

#[test]
fn bad_queue_arguments() {
    for (name, value, why) in [
        ("x-message-ttl", Value::I32(-1), "{value_negative,-1}"),
        (
            "x-message-ttl",
            Value::Str(b"a"),
            "\"expected integer, got longstr\"",
        ),
        (
            "x-message-ttl",
            Value::I64(1 << 40),
            "{value_too_large,1099511627776}",
        ),
        ("x-expires", Value::I32(0), "{value_zero,0}"),
        (
            "x-max-priority",
            Value::I32(256),
            "{max_value_exceeded,256}",
        ),
        ("x-max-length", Value::I32(-3), "{value_negative,-3}"),
        (
            "x-max-length-bytes",
            Value::Bool(true),
            "\"expected integer, got bool\"",
        ),
        ("x-overflow", Value::Str(b"zzz"), "invalid_overflow"),
        ("x-overflow", Value::I32(1), "{unacceptable_type,signedint}"),
        (
            "x-queue-mode",
            Value::Str(b"zz"),
            "\"unsupported queue mode 'zz'\"",
        ),
        (
            "x-single-active-consumer",
            Value::I32(1),
            "{unacceptable_type,signedint}",
        ),
        (
            "x-dead-letter-routing-key",
            Value::Str(b"a"),
            "routing_key_but_no_dlx_defined",
        ),
    ] {
        let expected = format!(
            "1 close 406 PRECONDITION_FAILED - invalid arg '{name}' for queue 'n' in vhost '/': {why} (50, 10)"
        );
        assert_eq!(answer(&[], declare_args("n", &[(name, value)])), expected);
    }
    assert_eq!(
        answer(
            &[],
            declare_args("n", &[("x-dead-letter-exchange", Value::I32(1))])
        ),
        "1 close 406 PRECONDITION_FAILED - invalid type 'signedint' for arg 'x-dead-letter-exchange' in queue 'n' in vhost '/' (50, 10)"
    );
}

#[test]
fn names_that_are_reserved_or_missing() {
    let consume_nope = consume("nope", "t");
    for (request, expected) in [
        (
            declare("amq.foo"),
            "403 ACCESS_REFUSED - queue name 'amq.foo' contains reserved prefix 'amq.*' (50, 10)",
        ),
        (
            exchange("amq.foo", "direct"),
            "403 ACCESS_REFUSED - exchange name 'amq.foo' contains reserved prefix 'amq.*' (40, 10)",
        ),
        (
            passive("nope"),
            "404 NOT_FOUND - no queue 'nope' in vhost '/' (50, 10)",
        ),
        (
            exchange_with("nope", "direct", |d| d.passive = true),
            "404 NOT_FOUND - no exchange 'nope' in vhost '/' (40, 10)",
        ),
        (
            consume_nope,
            "404 NOT_FOUND - no queue 'nope' in vhost '/' (60, 20)",
        ),
        (
            get("nope", true),
            "404 NOT_FOUND - no queue 'nope' in vhost '/' (60, 70)",
        ),
        (
            purge("nope"),
            "404 NOT_FOUND - no queue 'nope' in vhost '/' (50, 30)",
        ),
        (
            bind("nope", "amq.direct", "k"),
            "404 NOT_FOUND - no queue 'nope' in vhost '/' (50, 20)",
        ),
        (
            bind("nope", "nope", "k"),
            "404 NOT_FOUND - no exchange 'nope' in vhost '/' (50, 20)",
        ),
        (
            purge(""),
            "404 NOT_FOUND - no previously declared queue (50, 30)",
        ),
        (
            get("amq.rabbitmq.reply-to", true),
            "404 NOT_FOUND - no queue 'amq.rabbitmq.reply-to' in vhost '/' (60, 70)",
        ),
    ] {
        assert_eq!(answer(&[], request), format!("1 close {expected}"));
    }
}

#[test]
fn removing_what_is_not_there_is_no_error() {
    for (request, expected) in [
        (delete("nope", false, false), "1 delete-ok 0"),
        (delete_exchange("nope", false), "1 delete-ok"),
        (unbind("nope", "amq.direct", "k"), "1 unbind-ok"),
        (unbind("q", "nope", "k"), "1 unbind-ok"),
        (unbind("q", "amq.direct", "k"), "1 unbind-ok"),
        (
            unbind_exchange("amq.fanout", "amq.direct", "k"),
            "1 unbind-ok",
        ),
        (cancel("nobody"), "1 cancel-ok nobody"),
    ] {
        assert_eq!(answer(&[declare("q")], request), expected);
    }
}

#[test]
fn exchanges_are_declared_alike_or_refused() {
    let plain = "close 406 PRECONDITION_FAILED - inequivalent arg";
    let x = "for exchange 'x' in vhost '/'";
    for (then, expected) in [
        (
            exchange("x", "fanout"),
            format!("{plain} 'type' {x}: received 'fanout' but current is 'direct'"),
        ),
        (
            exchange_with("x", "direct", |d| d.durable = true),
            format!("{plain} 'durable' {x}: received 'true' but current is 'false'"),
        ),
        (
            exchange_with("x", "direct", |d| d.internal = true),
            format!("{plain} 'internal' {x}: received 'true' but current is 'false'"),
        ),
        (
            exchange_with("x", "direct", |d| {
                d.arguments = table(&[("alternate-exchange", Value::Str(b"y"))])
            }),
            format!(
                "{plain} 'alternate-exchange' {x}: received the value 'y' of type 'longstr' but current is none"
            ),
        ),
    ] {
        assert_eq!(
            answer(&[exchange("x", "direct")], then),
            format!("1 {expected} (40, 10)")
        );
    }
    assert_eq!(
        answer(&[], exchange("x", "zzz")),
        "0 close 503 COMMAND_INVALID - unknown exchange type 'zzz' (40, 10)"
    );
    for (request, method) in [
        (exchange("", "direct"), "(40, 10)"),
        (delete_exchange("", false), "(40, 20)"),
        (bind("q", "", "k"), "(50, 20)"),
        (unbind("q", "", "k"), "(50, 50)"),
        (bind_exchange("amq.fanout", "", "k"), "(40, 30)"),
    ] {
        assert_eq!(
            answer(&[declare("q")], request),
            format!(
                "1 close 403 ACCESS_REFUSED - operation not permitted on the default exchange {method}"
            )
        );
    }
    assert_eq!(
        answer(&[], delete_exchange("amq.direct", false)),
        "1 close 403 ACCESS_REFUSED - deletion of system exchange 'amq.direct' in vhost '/' not allowed (40, 20)"
    );
    assert_eq!(
        answer(
            &[declare("q"), exchange("h", "headers")],
            bind_args("q", "h", "", &[("x-match", Value::Str(b"zzz"))])
        ),
        "1 close 406 PRECONDITION_FAILED - Invalid x-match field value <<\"zzz\">>; expected all, any, all-with-x, or any-with-x (50, 20)"
    );
}

#[test]
fn what_is_in_use_is_not_deleted_when_that_was_asked() {
    let busy = [
        declare("q"),
        exchange("x", "direct"),
        bind("q", "x", "k"),
        consume("q", "t"),
    ];
    assert_eq!(
        answer(&busy, delete("q", true, false)),
        "1 close 406 PRECONDITION_FAILED - queue 'q' in vhost '/' in use (50, 40)"
    );
    assert_eq!(
        answer(&busy, delete_exchange("x", true)),
        "1 close 406 PRECONDITION_FAILED - exchange 'x' in vhost '/' in use (40, 20)"
    );
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.ask(&mut rig, declare("q"));
    client.publish(&mut rig, "", "q", "m");
    assert_eq!(
        client.ask(&mut rig, delete("q", true, true)),
        ["1 close 406 PRECONDITION_FAILED - queue 'q' in vhost '/' not empty (50, 40)"]
    );
}

#[test]
fn exclusive_queues_and_consumers_refuse_others() {
    let mut rig = Rig::new();
    let mut owner = rig.client();
    owner.ask(&mut rig, declare_with("mine", |d| d.exclusive = true));
    let requests = [
        declare_with("mine", |d| d.exclusive = true),
        declare("mine"),
        passive("mine"),
        consume("mine", "t"),
        get("mine", true),
        purge("mine"),
        delete("mine", false, false),
        bind("mine", "amq.direct", "k"),
    ];
    for request in requests {
        let mut other = rig.client();
        let lines = other.ask(&mut rig, request);
        assert!(
            lines[0].starts_with(
                "1 close 405 RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'mine' in vhost '/'. It could be \
                 originally declared on another connection or the exclusive property value does not match that of the original declaration."
            ),
            "{lines:?}"
        );
    }
    // Publishing to it is everybody's right.
    let mut other = rig.client();
    other.publish(&mut rig, "", "mine", "for you");
    assert_eq!(owner.drain(&mut rig, "mine"), ["for you"]);

    owner.ask(&mut rig, declare("q"));
    owner.ask(&mut rig, consume_with("q", "t", |c| c.exclusive = true));
    assert_eq!(
        other.ask(&mut rig, consume("q", "u")),
        ["1 close 403 ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use (60, 20)"]
    );
    assert_eq!(
        answer(
            &[declare("q"), consume("q", "t")],
            consume_with("q", "u", |c| c.exclusive = true)
        ),
        "1 close 403 ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use (60, 20)"
    );
    assert_eq!(
        answer(&[declare("q"), consume("q", "t1")], consume("q", "t1")),
        "0 close 530 NOT_ALLOWED - attempt to reuse consumer tag 't1' (60, 20)"
    );
}

#[test]
fn unknown_delivery_tags() {
    let mut rig = Rig::new();
    type Settle = fn(&mut Client, &mut Rig);
    let cases: [(Settle, &str); 5] = [
        (|c, r| c.ack(r, 99, false), "99 (60, 80)"),
        (|c, r| c.ack(r, 0, false), "0 (60, 80)"),
        (|c, r| c.ack(r, 7, true), "7 (60, 80)"),
        (|c, r| c.reject(r, 7, true), "7 (60, 90)"),
        (|c, r| c.nack(r, 7, true, true), "7 (60, 120)"),
    ];
    for (settle, expected) in cases {
        let mut client = rig.client();
        settle(&mut client, &mut rig);
        assert_eq!(
            rig.read(&mut client),
            [format!(
                "1 close 406 PRECONDITION_FAILED - unknown delivery tag {expected}"
            )]
        );
    }
    let mut client = rig.client();
    client.ack(&mut rig, 0, true);
    assert_eq!(
        client.ask(&mut rig, declare("q")),
        ["1 declare-ok q 0 0"],
        "all of nothing is fine"
    );
    client.publish(&mut rig, "", "q", "m");
    client.ask(&mut rig, get("q", false));
    client.ack(&mut rig, 1, false);
    client.ack(&mut rig, 1, false);
    assert_eq!(
        rig.read(&mut client),
        ["1 close 406 PRECONDITION_FAILED - unknown delivery tag 1 (60, 80)"],
        "twice"
    );
}

#[test]
fn messages_that_are_refused() {
    let headers = |name, value| {
        let mut headers = TableBuf::new();
        headers.insert(name, value).unwrap();
        headers
    };
    let text = headers("CC", Value::Str(b"a"));
    let number = headers("BCC", Value::I32(1));
    let default = Properties::default();
    for (props, expected) in [
        (
            Properties {
                expiration: Some("99999999999"),
                ..default
            },
            "406 PRECONDITION_FAILED - invalid expiration '99999999999': {value_too_large,99999999999}",
        ),
        (
            Properties {
                user_id: Some("mallory"),
                ..default
            },
            "406 PRECONDITION_FAILED - user_id property set to 'mallory' but authenticated user was 'guest'",
        ),
        (
            Properties {
                headers: Some(text.as_table()),
                ..default
            },
            "406 PRECONDITION_FAILED - invalid message: {unacceptable_type_in_header,\"CC\",longstr}",
        ),
        (
            Properties {
                headers: Some(number.as_table()),
                ..default
            },
            "406 PRECONDITION_FAILED - invalid message: {unacceptable_type_in_header,\"BCC\",signedint}",
        ),
        (
            Properties {
                reply_to: Some("amq.rabbitmq.reply-to"),
                ..default
            },
            "406 PRECONDITION_FAILED - fast reply consumer does not exist",
        ),
    ] {
        let mut rig = Rig::new();
        let mut client = rig.client();
        client.publish_with(&mut rig, "", "q", "", props);
        assert_eq!(
            rig.read(&mut client),
            [format!("1 close {expected} (60, 40)")]
        );
    }
    // Properties are built by hand where our own encoder would refuse them.
    for (expiration, why) in [
        ("abc", "no_integer"),
        ("", "no_integer"),
        ("-5", "{value_negative,-5}"),
        ("5x", "{leftover_string,\"x\"}"),
    ] {
        let mut rig = Rig::new();
        let mut client = rig.client();
        let mut props = vec![0x01, 0x00, expiration.len() as u8];
        props.extend_from_slice(expiration.as_bytes());
        let mut bytes = Vec::new();
        Publish::default()
            .put(&mut bytes, 1, &props, b"", 4096)
            .unwrap();
        rig.send(&mut client, &bytes);
        assert_eq!(
            rig.read(&mut client),
            [format!(
                "1 close 406 PRECONDITION_FAILED - invalid expiration '{expiration}': {why} (60, 40)"
            )]
        );
    }
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.publish_with(
        &mut rig,
        "",
        "q",
        "",
        Properties {
            user_id: Some(GUEST),
            ..default
        },
    );
    client.publish(&mut rig, "nope", "q", "");
    assert_eq!(
        rig.read(&mut client),
        ["1 close 404 NOT_FOUND - no exchange 'nope' in vhost '/' (60, 40)"]
    );
    let mut client = rig.client();
    client.ask(
        &mut rig,
        exchange_with("i", "direct", |d| d.internal = true),
    );
    client.publish(&mut rig, "i", "q", "");
    assert_eq!(
        rig.read(&mut client),
        [
            "1 close 403 ACCESS_REFUSED - cannot publish to internal exchange 'i' in vhost '/' (60, 40)"
        ]
    );
}

#[test]
fn what_is_not_done_here_closes_the_connection() {
    let flow = Method::Channel(channel::AMQPMethod::Flow(channel::Flow { active: false }));
    assert_eq!(
        answer(&[], flow),
        "0 close 540 NOT_IMPLEMENTED - active=false (20, 20)"
    );
    assert_eq!(
        answer(&[], recover(false)),
        "0 close 540 NOT_IMPLEMENTED - requeue=false (60, 110)"
    );
    let mut rig = Rig::new();
    let mut client = rig.client();
    let immediate = Publish {
        immediate: true,
        ..Publish::default()
    };
    client.put(&mut rig, &immediate, Properties::default(), b"m");
    assert_eq!(
        rig.read(&mut client),
        ["0 close 540 NOT_IMPLEMENTED - immediate=true (60, 40)"]
    );
    let mut client = rig.client();
    rig.send(
        &mut client,
        &[
            1, 0, 1, 0, 0, 0, 11, 0, 60, 0, 10, 0, 0, 0, 100, 0, 0, 0, 0xce,
        ],
    );
    assert_eq!(
        rig.read(&mut client),
        ["0 close 540 NOT_IMPLEMENTED - prefetch_size!=0 (100) (60, 10)"]
    );
    assert_eq!(
        answer(
            &[confirm_select()],
            Method::Tx(tx::AMQPMethod::Select(tx::Select {}))
        ),
        "1 close 406 PRECONDITION_FAILED - cannot switch from confirm to tx mode (90, 10)"
    );
    assert_eq!(
        answer(&[], Method::Tx(tx::AMQPMethod::Commit(tx::Commit {}))),
        "1 close 406 PRECONDITION_FAILED - channel is not transactional (90, 20)"
    );
}

#[test]
fn replies_need_a_consumer_that_does_not_ack() {
    let reply_to = "amq.rabbitmq.reply-to";
    assert_eq!(
        answer(&[], consume(reply_to, "t")),
        "1 close 406 PRECONDITION_FAILED - reply consumer cannot acknowledge (60, 20)"
    );
    let no_ack = |tag| consume_with(reply_to, tag, |c| c.no_ack = true);
    assert_eq!(
        answer(&[no_ack("t")], no_ack("u")),
        "1 close 406 PRECONDITION_FAILED - reply consumer already set (60, 20)"
    );
}

#[test]
fn strangers_are_turned_away() {
    let mut rig = Rig::new();
    let mut client = rig.stranger();
    rig.send(&mut client, b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(rig.read(&mut client), ["AMQP header"]);
    assert!(rig.broker.is_over(client.id));

    let mut client = rig.stranger();
    rig.send(&mut client, &PROTOCOL_HEADER);
    rig.read(&mut client);
    client.method(&mut rig, 0, start_ok(GUEST, "wrong"));
    assert_eq!(
        rig.read(&mut client),
        [
            "0 close 403 ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile. (0, 0)"
        ]
    );

    let mut client = rig.stranger();
    rig.send(&mut client, &PROTOCOL_HEADER);
    client.method(&mut rig, 0, open("/"));
    let lines = rig.read(&mut client);
    assert!(lines[1].starts_with("0 close 503 "), "{lines:?}");
}

/// Accepts: amqp/R34
#[test]
fn frames_that_are_none_close_the_connection_with_their_code() {
    let frame = |kind: u8, channel: u8, payload: &[u8], end: u8| {
        let mut bytes = vec![kind, 0, channel, 0, 0, 0, payload.len() as u8];
        bytes.extend_from_slice(payload);
        bytes.push(end);
        bytes
    };
    let header = |class: u8, size: u8| {
        [vec![0, class, 0, 0, 0, 0, 0, 0, 0, 0, 0, size], vec![0, 0]].concat()
    };
    let publish = frame(1, 1, &[0, 60, 0, 40, 0, 0, 0, 1, b'q', 0], 0xce);
    let with = |more: Vec<u8>| [publish.clone(), more].concat();
    for (bytes, code) in [
        (frame(1, 1, &[0, 60, 0, 40], 0), "501 FRAME_ERROR"),
        (frame(7, 1, &[], 0xce), "501 FRAME_ERROR"),
        (vec![1, 0, 1, 0xff, 0xff, 0xff, 0xff], "501 FRAME_ERROR"),
        (frame(1, 1, &[0, 60, 0, 40, 0], 0xce), "501 FRAME_ERROR"),
        (frame(2, 1, &header(60, 0), 0xce), "505 UNEXPECTED_FRAME"),
        (frame(3, 1, b"body", 0xce), "505 UNEXPECTED_FRAME"),
        (with(publish.clone()), "505 UNEXPECTED_FRAME"),
        (with(frame(3, 1, b"body", 0xce)), "505 UNEXPECTED_FRAME"),
        (
            with(frame(2, 1, &header(50, 0), 0xce)),
            "505 UNEXPECTED_FRAME",
        ),
        (
            with(
                [
                    frame(2, 1, &header(60, 3), 0xce),
                    frame(3, 1, b"body", 0xce),
                ]
                .concat(),
            ),
            "501 FRAME_ERROR",
        ),
        (frame(8, 1, &[], 0xce), "505 UNEXPECTED_FRAME"),
        (
            frame(1, 2, &[0, 60, 0, 10, 0, 0, 0, 0, 0, 1, 0], 0xce),
            "504 CHANNEL_ERROR - expected 'channel.open'",
        ),
        (
            frame(1, 1, &[0, 20, 0, 10, 0], 0xce),
            "504 CHANNEL_ERROR - second 'channel.open' seen",
        ),
        (
            frame(1, 0, &[0, 20, 0, 10, 0], 0xce),
            "504 CHANNEL_ERROR - unexpected method in connection state running",
        ),
        (frame(1, 1, &[0, 77, 0, 10], 0xce), "503 COMMAND_INVALID"),
        (frame(1, 1, &[0, 60, 0, 71, 0], 0xce), "501 FRAME_ERROR"),
    ] {
        let mut rig = Rig::new();
        let mut client = rig.client();
        rig.send(&mut client, &bytes);
        let lines = rig.read(&mut client);
        assert!(
            lines.len() == 1 && lines[0].starts_with(&format!("0 close {code}")),
            "{bytes:?}: {lines:?}"
        );
        assert!(!rig.broker.is_over(client.id), "it waits for close-ok");
    }
}

/// Accepts: amqp/R14
#[test]
fn a_soft_error_closes_its_channel_alone_and_the_number_can_be_used_again() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.open(&mut rig, 2);
    client.method(&mut rig, 2, declare("q"));
    client.method(&mut rig, 1, passive("nope"));
    // What was under way is dropped, content and all.
    client.publish(&mut rig, "", "q", "too late");
    client.method(&mut rig, 1, declare("also too late"));
    client.method(&mut rig, 2, passive("q"));
    assert_eq!(
        rig.read(&mut client),
        [
            "2 declare-ok q 0 0",
            "1 close 404 NOT_FOUND - no queue 'nope' in vhost '/' (50, 10)",
            "2 declare-ok q 0 0",
        ]
    );
    client.method(&mut rig, 1, close_ok());
    client.open(&mut rig, 1);
    client.publish(&mut rig, "", "q", "in time");
    assert_eq!(client.drain(&mut rig, "q"), ["in time"]);
}

#[test]
fn two_closes_that_cross_are_both_answered() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.method(&mut rig, 1, passive("nope"));
    client.method(&mut rig, 1, close_channel());
    let lines = rig.read(&mut client);
    assert_eq!((lines.len(), lines[1].as_str()), (2, "1 close-ok"));
    client.method(&mut rig, 1, close_ok());
    client.open(&mut rig, 1);
}

#[test]
fn a_channel_is_closed_by_a_cancel_ok_of_nobody_as_little_as_by_ours() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    let cancel_ok = basic::CancelOk {
        consumer_tag: "t".into(),
    };
    client.method(
        &mut rig,
        1,
        Method::Basic(basic::AMQPMethod::CancelOk(cancel_ok)),
    );
    assert_eq!(client.ask(&mut rig, declare("q")), ["1 declare-ok q 0 0"]);
}
