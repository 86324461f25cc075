//! `wire` against `amq-protocol` as the oracle, against real bytes, and against bytes nobody should send.

use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, gen_frame, parse_frame};
use amq_protocol::protocol::{AMQPClass, BasicProperties, basic};
use proptest::prelude::*;

use super::frame::{check_header_size, put_content};
use super::props::{ArrayBuf, Changes, MAX_DEPTH};
use super::*;
use crate::error::{EncodeError, ReplyCode, TableError};

/// What py-amqp 5.4.2 sends for a Celery task (protocol 2): method, header, body.
pub(crate) const CELERY_PUBLISH: &str = "\
01 00 01 00 00 00 0f 00 3c 00 28 00 00 00 06 63 65 6c 65 72 79 00 ce 02 00 01 00 00 01 c4 00 3c \
00 00 00 00 00 00 00 00 00 55 fe 00 10 61 70 70 6c 69 63 61 74 69 6f 6e 2f 6a 73 6f 6e 05 75 74 \
66 2d 38 00 00 01 4f 04 6c 61 6e 67 53 00 00 00 02 70 79 04 74 61 73 6b 53 00 00 00 01 78 02 69 \
64 53 00 00 00 24 34 66 39 34 62 30 37 33 2d 63 62 66 36 2d 34 38 37 32 2d 62 37 33 62 2d 32 62 \
39 61 66 61 62 65 37 30 62 33 06 73 68 61 64 6f 77 56 03 65 74 61 56 07 65 78 70 69 72 65 73 56 \
05 67 72 6f 75 70 56 0b 67 72 6f 75 70 5f 69 6e 64 65 78 56 07 72 65 74 72 69 65 73 49 00 00 00 \
00 09 74 69 6d 65 6c 69 6d 69 74 41 00 00 00 02 56 56 07 72 6f 6f 74 5f 69 64 53 00 00 00 24 34 \
66 39 34 62 30 37 33 2d 63 62 66 36 2d 34 38 37 32 2d 62 37 33 62 2d 32 62 39 61 66 61 62 65 37 \
30 62 33 09 70 61 72 65 6e 74 5f 69 64 56 08 61 72 67 73 72 65 70 72 53 00 00 00 04 5b 34 30 5d \
0a 6b 77 61 72 67 73 72 65 70 72 53 00 00 00 08 7b 27 62 27 3a 20 32 7d 06 6f 72 69 67 69 6e 53 \
00 00 00 0b 67 65 6e 31 35 30 30 37 40 76 6d 0d 69 67 6e 6f 72 65 5f 72 65 73 75 6c 74 56 15 72 \
65 70 6c 61 63 65 64 5f 74 61 73 6b 5f 6e 65 73 74 69 6e 67 49 00 00 00 00 0f 73 74 61 6d 70 65 \
64 5f 68 65 61 64 65 72 73 56 06 73 74 61 6d 70 73 46 00 00 00 00 02 00 24 34 66 39 34 62 30 37 \
33 2d 63 62 66 36 2d 34 38 37 32 2d 62 37 33 62 2d 32 62 39 61 66 61 62 65 37 30 62 33 24 62 31 \
33 31 34 39 61 65 2d 31 31 66 38 2d 33 37 33 30 2d 62 64 65 63 2d 37 31 39 38 61 35 32 63 61 66 \
34 65 ce 03 00 01 00 00 00 55 5b 5b 34 30 5d 2c 20 7b 22 62 22 3a 20 32 7d 2c 20 7b 22 63 61 6c \
6c 62 61 63 6b 73 22 3a 20 6e 75 6c 6c 2c 20 22 65 72 72 62 61 63 6b 73 22 3a 20 6e 75 6c 6c 2c \
20 22 63 68 61 69 6e 22 3a 20 6e 75 6c 6c 2c 20 22 63 68 6f 72 64 22 3a 20 6e 75 6c 6c 7d 5d ce";

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    text.split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16).expect("two hex digits"))
        .collect()
}

fn frames(mut bytes: &[u8]) -> Vec<Frame<'_>> {
    let splitter = Splitter::with_frame_max(131_072);
    let mut frames = Vec::new();
    while let Some((frame, used)) = splitter.next_frame(bytes).expect("well-formed") {
        frames.push(frame);
        bytes = &bytes[used..];
    }
    assert!(bytes.is_empty(), "left over: {bytes:?}");
    frames
}

#[test]
fn the_fields_of_a_celery_task_sent_by_py_amqp_are_read() {
    let bytes = unhex(CELERY_PUBLISH);
    let [
        Frame::Method {
            channel: 1,
            class,
            method,
            args,
        },
        Frame::Header { channel: 1, raw },
        Frame::Body { channel: 1, data },
    ] = frames(&bytes)[..]
    else {
        panic!("method, header, body")
    };
    let AnyMethod::Publish(publish) = AnyMethod::decode(class, method, args).unwrap() else {
        panic!("basic.publish")
    };
    assert_eq!((publish.exchange, publish.routing_key), ("", "celery"));
    let header = ContentHeader::parse(raw).unwrap();
    assert_eq!((header.class, header.body_size), (60, 85));
    assert!(data.starts_with(b"[[40], {\"b\": 2}, "));

    let props = header.props;
    props.check().unwrap();
    assert_eq!(props.content_type(), Some("application/json"));
    assert_eq!(props.content_encoding(), Some("utf-8"));
    assert_eq!(props.delivery_mode(), Some(2));
    assert_eq!(props.priority(), Some(0));
    let id = "4f94b073-cbf6-4872-b73b-2b9afabe70b3";
    assert_eq!(props.correlation_id(), Some(id));
    let reply_to = "b13149ae-11f8-3730-bdec-7198a52caf4e";
    assert_eq!(props.reply_to(), Some(reply_to));
    assert_eq!(props.message_id(), None);
    assert_eq!(props.header("id").unwrap().as_str(), Some(id));
    assert_eq!(props.header("retries"), Some(Value::I32(0)));
    assert_eq!(props.header("eta"), Some(Value::Void));
    let limits: Vec<_> = props
        .header("timelimit")
        .unwrap()
        .as_array()
        .unwrap()
        .iter()
        .collect();
    assert_eq!(limits, [Value::Void, Value::Void]);
    assert!(
        props
            .header("stamps")
            .unwrap()
            .as_table()
            .unwrap()
            .is_empty()
    );
    assert_eq!(props.headers().unwrap().iter().count(), 19);
    // Reading all and writing it again loses nothing.
    let again = props.to_properties().encode().unwrap();
    assert_eq!(again.as_bytes(), props.as_bytes());
}

#[test]
fn what_py_amqp_sent_is_what_we_would_send() {
    let bytes = unhex(CELERY_PUBLISH);
    let [_, Frame::Header { raw, .. }, Frame::Body { data, .. }] = frames(&bytes)[..] else {
        panic!("method, header, body")
    };
    let publish = Publish {
        routing_key: "celery",
        ..Publish::default()
    };
    let props = ContentHeader::parse(raw)
        .unwrap()
        .props
        .to_properties()
        .encode()
        .unwrap();
    let mut out = Vec::new();
    publish
        .put(&mut out, 1, props.as_bytes(), data, 131_064)
        .unwrap();
    assert!(out == bytes);
}

/// Accepts: feature/properties_and_table
#[test]
fn every_type_of_the_dialect_goes_both_ways_with_the_bytes_of_amq_protocol() {
    let mut array = ArrayBuf::new();
    array.push(true).push("in an array").push(Value::Void);
    let mut inner = TableBuf::new();
    inner.insert("deep", i64::MIN).unwrap();
    let values = [
        ("Bool", Value::Bool(true)),
        ("I8", Value::I8(-8)),
        ("U8", Value::U8(200)),
        ("I16", Value::I16(-16)),
        ("U16", Value::U16(60_000)),
        ("I32", Value::I32(-32)),
        ("U32", Value::U32(4_000_000_000)),
        ("I64", Value::I64(-64)),
        ("F32", Value::F32(1.5)),
        ("F64", Value::F64(-2.25)),
        (
            "Decimal",
            Value::Decimal {
                scale: 2,
                value: 314,
            },
        ),
        ("Str", Value::Str(b"text \xff")),
        ("Bytes", Value::Bytes(&[0, 1, 2])),
        ("Timestamp", Value::Timestamp(1_700_000_000)),
        ("Array", array.as_array().into()),
        ("Table", inner.as_table().into()),
        ("Void", Value::Void),
    ];
    let mut table = TableBuf::new();
    for (key, value) in values {
        table.insert(key, value).unwrap();
    }
    table.as_table().check().unwrap();
    assert_eq!(table.as_table().iter().collect::<Vec<_>>(), values);
    // Through amq-protocol's own types, which sort by key.
    let theirs = cold::field_table(table.as_table()).unwrap();
    let back = cold::table_buf(&theirs);
    let mut sorted = values;
    sorted.sort_by_key(|(key, _)| *key);
    assert_eq!(back.as_table().iter().collect::<Vec<_>>(), sorted);
    // The two spellings that are read but not written.
    let other = Table::from_bytes(b"\x01aU\xff\xfe\x01bL\xff\xff\xff\xff\xff\xff\xff\xfd");
    assert_eq!(
        (other.get("a"), other.get("b")),
        (Some(Value::I16(-2)), Some(Value::I64(-3)))
    );
}

/// Accepts: amqp/R34
#[test]
fn tables_that_cannot_be_read_are_errors_and_hide_only_what_is_behind_them() {
    for (bytes, expected) in [
        (&b"\x01at"[..], TableError::Truncated),
        (b"\x05at", TableError::Truncated),
        (b"\x01a", TableError::Truncated),
        (b"\x01aS\0\0\0\x09x", TableError::Truncated),
        (b"\x01aF\xff\xff\xff\xff", TableError::Truncated),
        (b"\x01aA\0\0\0\x01S", TableError::Truncated),
        (b"\x01aF\0\0\0\x03\x01b?", TableError::UnknownType(b'?')),
        (b"\x01\xffV", TableError::BadKey),
    ] {
        assert_eq!(Table::from_bytes(bytes).check(), Err(expected), "{bytes:?}");
        assert!(cold::field_table(Table::from_bytes(bytes)).is_err());
        let with_good = [&b"\x04goodt\x01"[..], bytes].concat();
        let table = Table::from_bytes(&with_good);
        assert_eq!(table.get("good"), Some(Value::Bool(true)));
        assert_eq!(table.get("behind"), None);
        let raw = [
            &[0x20, 0][..],
            &(with_good.len() as u32).to_be_bytes(),
            &with_good,
        ]
        .concat();
        let props = Props::from_bytes(&raw);
        assert_eq!(props.check().unwrap_err().code, ReplyCode::FRAME_ERROR);
        assert_eq!(props.header("good"), Some(Value::Bool(true)));
    }
}

/// Accepts: amqp/R34
#[test]
fn tables_may_nest_sixty_four_levels_and_no_deeper() {
    let nested = |levels: usize| {
        let mut table = TableBuf::new();
        for _ in 1..levels {
            let mut outer = TableBuf::new();
            outer.insert("t", table.as_table()).unwrap();
            table = outer;
        }
        table
    };
    // An empty table has nothing in it that could be too deep, so the innermost holds a value.
    let with_value = |levels: usize| {
        let mut table = TableBuf::new();
        table.insert("v", 1).unwrap();
        for _ in 1..levels {
            let mut outer = TableBuf::new();
            outer.insert("t", table.as_table()).unwrap();
            table = outer;
        }
        table
    };
    for (table, levels) in [(nested(MAX_DEPTH), 64), (with_value(MAX_DEPTH), 64)] {
        assert_eq!(table.as_table().check(), Ok(()), "{levels}");
        cold::field_table(table.as_table()).unwrap();
    }
    for table in [nested(MAX_DEPTH + 1), with_value(MAX_DEPTH + 1)] {
        assert_eq!(table.as_table().check(), Err(TableError::TooDeep));
        let props = Properties {
            headers: Some(table.as_table()),
            ..Properties::default()
        };
        assert_eq!(
            props.encode(),
            Err(EncodeError::BadTable(TableError::TooDeep))
        );
    }
}

/// Accepts: amqp/R33
#[test]
fn properties_that_are_none_are_refused_by_name() {
    let long = "x".repeat(256);
    let base = Properties::default();
    for (properties, expected) in [
        (
            Properties {
                message_id: Some(&long),
                ..base
            },
            "message_id is 256 bytes long, a short string holds at most 255",
        ),
        (
            Properties {
                kind: Some("a\0"),
                ..base
            },
            "type contains a zero byte, which AMQP does not allow",
        ),
        (
            Properties {
                expiration: Some("abc"),
                ..base
            },
            r#"expiration "abc" is not a number of milliseconds in decimal digits"#,
        ),
        (
            Properties {
                expiration: Some("-5"),
                ..base
            },
            r#"expiration "-5" is not a number of milliseconds in decimal digits"#,
        ),
        (
            Properties {
                expiration: Some(""),
                ..base
            },
            r#"expiration "" is not a number of milliseconds in decimal digits"#,
        ),
    ] {
        let mut out = b"before".to_vec();
        assert_eq!(
            properties.encode_into(&mut out).unwrap_err().to_string(),
            expected
        );
        assert_eq!(out, b"before");
    }
    assert!(TableBuf::new().insert(&long, true).is_err());
    assert!(cold::short("queue", &long).is_err());
    let exact = "x".repeat(255);
    assert!(
        Properties {
            message_id: Some(&exact),
            ..base
        }
        .encode()
        .is_ok()
    );
}

/// Accepts: amqp/R32
#[test]
fn headers_of_exactly_a_frame_fit_and_one_byte_more_does_not() {
    let props = vec![0; 131_064 - 12];
    assert_eq!(check_header_size(&props, 131_064), Ok(()));
    let len = 131_065;
    let props = vec![0; len - 12];
    assert_eq!(
        check_header_size(&props, 131_064),
        Err(EncodeError::HeadersTooLarge { len, max: 131_064 })
    );
}

// ---- amq-protocol as the oracle -----------------------------------------------------------------------------------------

fn theirs(frame: &AMQPFrame) -> Vec<u8> {
    gen_frame(frame)(Vec::new().into()).unwrap().into_inner().0
}

fn method(channel: u16, method: basic::AMQPMethod) -> Vec<u8> {
    theirs(&AMQPFrame::Method(channel, AMQPClass::Basic(method)))
}

fn text() -> impl Strategy<Value = String> {
    "[a-z\u{e9}.#*]{0,60}"
}

proptest! {
    #[test]
    fn hot_methods_have_the_bytes_and_fields_of_amq_protocol(
        channel in 1..=u16::MAX, tag: u64, code: u16, count: u32, a: bool, b: bool,
        s in text(), exchange in text(), routing_key in text(),
    ) {
        let (x, k) = (exchange.as_str(), routing_key.as_str());
        let short = |s: &str| s.into();
        let mut ours: Vec<Vec<u8>> = vec![Vec::new(); 7];
        let expected = [
            AnyMethod::Deliver(Deliver { consumer_tag: &s, delivery_tag: tag, redelivered: a, exchange: x, routing_key: k }),
            AnyMethod::GetOk(GetOk { delivery_tag: tag, redelivered: a, exchange: x, routing_key: k, message_count: count }),
            AnyMethod::Return(Return { reply_code: ReplyCode(code), reply_text: &s, exchange: x, routing_key: k }),
            AnyMethod::Ack(Ack { delivery_tag: tag, multiple: a }),
            AnyMethod::Nack(Nack { delivery_tag: tag, multiple: a, requeue: b }),
            AnyMethod::Reject(Reject { delivery_tag: tag, requeue: a }),
            AnyMethod::Publish(Publish { exchange: x, routing_key: k, mandatory: a, immediate: b }),
        ];
        for (method, out) in expected.iter().zip(&mut ours) {
            match method {
                AnyMethod::Deliver(m) => m.put(out, channel),
                AnyMethod::GetOk(m) => m.put(out, channel),
                AnyMethod::Return(m) => m.put(out, channel),
                AnyMethod::Ack(m) => m.put(out, channel),
                AnyMethod::Nack(m) => m.put(out, channel),
                AnyMethod::Reject(m) => m.put(out, channel),
                AnyMethod::Publish(m) => m.put(out, channel, Props::EMPTY.as_bytes(), b"", 4088).unwrap(),
                AnyMethod::Cold(_) => unreachable!("none of them is cold"),
            }
        }
        let header = AMQPContentHeader { class_id: 60, body_size: 0, properties: BasicProperties::default() };
        let header = theirs(&AMQPFrame::Header(channel, header));
        use basic::AMQPMethod as M;
        let oracle = [
            method(channel, M::Deliver(basic::Deliver { consumer_tag: short(&s), delivery_tag: tag, redelivered: a, exchange: short(x), routing_key: short(k) })),
            method(channel, M::GetOk(basic::GetOk { delivery_tag: tag, redelivered: a, exchange: short(x), routing_key: short(k), message_count: count })),
            method(channel, M::Return(basic::Return { reply_code: code, reply_text: short(&s), exchange: short(x), routing_key: short(k) })),
            method(channel, M::Ack(basic::Ack { delivery_tag: tag, multiple: a })),
            method(channel, M::Nack(basic::Nack { delivery_tag: tag, multiple: a, requeue: b })),
            method(channel, M::Reject(basic::Reject { delivery_tag: tag, requeue: a })),
            [method(channel, M::Publish(basic::Publish { exchange: short(x), routing_key: short(k), mandatory: a, immediate: b })), header].concat(),
        ];
        for ((ours, theirs), expected) in ours.iter().zip(&oracle).zip(&expected) {
            prop_assert_eq!(ours, theirs);
            let Frame::Method { class, method, args, .. } = frames(ours)[0] else { panic!("a method") };
            prop_assert_eq!(&AnyMethod::decode(class, method, args).unwrap(), expected);
        }
    }

    #[test]
    fn properties_have_the_bytes_of_amq_protocol(
        names in prop::collection::vec(prop::option::of(text()), 9),
        mode: Option<u8>, priority: Option<u8>, timestamp: Option<u64>, header: Option<i64>, size: u64,
    ) {
        let mut table = TableBuf::new();
        if let Some(n) = header {
            table.insert("n", n).unwrap();
        }
        let n = |i: usize| names[i].as_deref();
        let ours = Properties {
            content_type: n(0), content_encoding: n(1), headers: header.map(|_| table.as_table()),
            delivery_mode: mode, priority, correlation_id: n(2), reply_to: n(3), expiration: None,
            message_id: n(4), timestamp, kind: n(5), user_id: n(6), app_id: n(7), cluster_id: n(8),
        };
        let encoded = ours.encode().unwrap();
        let mut properties = BasicProperties::default();
        if let Some(s) = n(0) { properties = properties.with_content_type(s.into()); }
        if let Some(s) = n(1) { properties = properties.with_content_encoding(s.into()); }
        if header.is_some() { properties = properties.with_headers(cold::field_table(table.as_table()).unwrap()); }
        if let Some(b) = mode { properties = properties.with_delivery_mode(b); }
        if let Some(b) = priority { properties = properties.with_priority(b); }
        if let Some(s) = n(2) { properties = properties.with_correlation_id(s.into()); }
        if let Some(s) = n(3) { properties = properties.with_reply_to(s.into()); }
        if let Some(s) = n(4) { properties = properties.with_message_id(s.into()); }
        if let Some(t) = timestamp { properties = properties.with_timestamp(t); }
        if let Some(s) = n(5) { properties = properties.with_type(s.into()); }
        if let Some(s) = n(6) { properties = properties.with_user_id(s.into()); }
        if let Some(s) = n(7) { properties = properties.with_app_id(s.into()); }
        if let Some(s) = n(8) { properties = properties.with_cluster_id(s.into()); }
        let header = AMQPContentHeader { class_id: 60, body_size: size, properties };
        let oracle = theirs(&AMQPFrame::Header(3, header));
        let mut out = Vec::new();
        super::frame::put_content_header(&mut out, 3, encoded.as_bytes(), size);
        prop_assert_eq!(&out, &oracle);
        prop_assert_eq!(encoded.as_props().check(), Ok(()));
        prop_assert_eq!(encoded.as_props().to_properties(), ours);
        let mut persistent = Vec::new();
        encoded.as_props().put_persistent(&mut persistent);
        let expected = Properties { delivery_mode: Some(2), ..ours };
        prop_assert_eq!(persistent, expected.encode().unwrap().as_bytes().to_vec());
    }

    /// The same verdict on frames that a peer has mangled. Ours is stricter in three places only: depth of tables, a weight, and
    /// property flags that basic does not have; and less strict in one: most texts among the properties may be any bytes.
    #[test]
    fn a_mangled_frame_is_refused_by_both_or_read_alike_by_both(
        which in 0..4_usize, at: prop::sample::Index, with: u8, cut: prop::sample::Index,
    ) {
        let celery = unhex(CELERY_PUBLISH);
        let mut table = TableBuf::new();
        table.insert("x-max-priority", 10).unwrap();
        let declare = cold::queue::Declare {
            queue: "q".into(), passive: false, durable: true, exclusive: false, auto_delete: false, nowait: false,
            arguments: cold::field_table(table.as_table()).unwrap(),
        };
        let mut bytes = match which {
            0 => celery[..23].to_vec(),
            1 => celery[23..483].to_vec(),
            2 => { let mut out = Vec::new(); cold::put(&mut out, 1, &Method::Queue(cold::queue::AMQPMethod::Declare(declare))); out }
            _ => { let mut out = Vec::new(); Ack { delivery_tag: 7, multiple: true }.put(&mut out, 1); out }
        };
        let at = at.index(bytes.len());
        bytes[at] = with;
        // Sometimes cut as well, and closed properly again, so that the frame is whole and its content is short.
        let keep = cut.index(bytes.len() - 8);
        if with.is_multiple_of(3) {
            bytes.truncate(7 + keep);
            let size = (bytes.len() - 7) as u32;
            bytes[3..7].copy_from_slice(&size.to_be_bytes());
            bytes.push(0xCE);
        }
        let splitter = Splitter::with_frame_max(131_072);
        let ours = match splitter.next_frame(&bytes) {
            Ok(None) => None,
            Ok(Some((Frame::Method { class, method, args, .. }, _))) => Some(AnyMethod::decode(class, method, args).is_ok()),
            Ok(Some((Frame::Header { raw, .. }, _))) => {
                Some(ContentHeader::parse(raw).and_then(|h| h.props.check()).is_ok())
            }
            Ok(Some(_)) => Some(true),
            Err(_) => Some(false),
        };
        let theirs = match parse_frame(&bytes[..]) {
            Err(e) if e.is_incomplete() => None,
            other => Some(other),
        };
        match (ours, theirs) {
            // They have no limits and wait for what will never be: not a verdict to compare with.
            (_, None) => {}
            (Some(true), Some(Err(_))) if has_raw_bytes(&bytes) => {}
            (Some(true), Some(result)) => prop_assert!(result.is_ok(), "we read {:?}", bytes),
            (Some(false), Some(Ok((_, frame)))) => {
                let known = match &frame {
                    AMQPFrame::ProtocolHeader(_) | AMQPFrame::InvalidHeartbeat(_) | AMQPFrame::Heartbeat => true,
                    AMQPFrame::Header(0, _) | AMQPFrame::Body(0, _) => true,
                    AMQPFrame::Header(..) => {
                        let flags = u16::from_be_bytes([bytes[19], bytes[20]]);
                        flags & 3 != 0 || bytes[9..11] != [0, 0]
                    }
                    _ => false,
                };
                prop_assert!(known, "only they read {:?} as {:?}", bytes, frame);
            }
            (Some(false), Some(Err(_))) => {}
            (None, Some(result)) => prop_assert!(result.is_err(), "they finished {:?}", bytes),
        }
    }

    /// Accepts: amqp/R34
    #[test]
    fn arbitrary_properties_never_panic(bytes: Vec<u8>) {
        let props = Props::from_bytes(&bytes);
        let _ = props.check();
        let _ = props.to_properties();
        let _ = props.header("key");
        props.put_persistent(&mut Vec::new());
        let _ = ContentHeader::parse(&bytes);
        let _ = Table::from_bytes(&bytes).check();
        prop_assert!(Table::from_bytes(&bytes).iter().count() <= bytes.len());
    }
}

/// Whether it is a header of whose properties something is left out when all are read as what they should be.
fn has_raw_bytes(frame: &[u8]) -> bool {
    let Some(raw) = frame.strip_prefix(&[2]) else {
        return false;
    };
    let props = ContentHeader::parse(&raw[6..raw.len() - 1]).unwrap().props;
    let all = props.to_properties().encode();
    all.map_or(true, |all| all.as_bytes() != props.as_bytes())
}

#[test]
fn texts_of_raw_bytes_are_passed_on_unless_a_broker_acts_upon_them() {
    let raw = b"\x07\x10\x02\xff\0\x02a\0\x015\x05guest"; // correlation_id, reply_to, expiration, user_id
    let props = Props::from_bytes(raw);
    assert_eq!(props.check(), Ok(()));
    assert_eq!(
        (props.correlation_id(), props.reply_to()),
        (None, Some("a\0"))
    );
    let changes = Changes {
        no_expiration: true,
        ..Changes::default()
    };
    let changed = props.changed(&changes);
    assert_eq!(changed.as_bytes(), b"\x06\x10\x02\xff\0\x02a\0\x05guest");
    let mut headers = TableBuf::new();
    headers.put("k\0", true);
    let changes = Changes {
        headers: Some(headers.as_table()),
        reply_to: Some("b"),
        no_expiration: false,
    };
    let changed = props.changed(&changes);
    let expected = b"\x27\x10\0\0\0\x05\x02k\0t\x01\x02\xff\0\x01b\x015\x05guest";
    assert_eq!(changed.as_bytes(), expected);
    assert_eq!(changed.as_props().changed(&Changes::default()), changed);
    for acted_upon in [b"\x01\0\x01\xff", b"\0\x10\x01\xff"] {
        let refused = Props::from_bytes(acted_upon).check();
        assert_eq!(refused.unwrap_err().code, ReplyCode::FRAME_ERROR);
    }
}

#[test]
fn a_body_longer_than_a_frame_is_split_and_an_empty_one_has_no_frame() {
    let mut out = Vec::new();
    put_content(&mut out, 1, Props::EMPTY.as_bytes(), &[7; 20], 8);
    put_content(&mut out, 1, Props::EMPTY.as_bytes(), b"", 8);
    let sizes: Vec<_> = frames(&out)
        .iter()
        .map(|frame| match frame {
            Frame::Header { raw, .. } => ("header", ContentHeader::parse(raw).unwrap().body_size),
            Frame::Body { data, .. } => ("body", data.len() as u64),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        sizes,
        [
            ("header", 20),
            ("body", 8),
            ("body", 8),
            ("body", 4),
            ("header", 0)
        ]
    );
}
