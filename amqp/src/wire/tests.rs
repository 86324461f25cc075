//! `wire` against `amq-protocol` as the oracle, against real bytes, and against bytes nobody should send.

use super::*;

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
