//! Bytes to messages and back, without any connection: our `wire` beside the crate that lapin is built on.
//!
//! The messages are as a task queue's: 100 bytes with a content type, a correlation id and a queue to reply to. Reading means what a consumer
//! needs to know, from bytes checked in full: both ids, the key, the reply queue, the body. Writing goes into a buffer that is used again.

use crate::harness::{Bench, Better, Error, Figure, Sample, time};
use amqp::wire::{Ack, AnyMethod, ContentHeader, Deliver, Frame, Properties, Publish, Splitter};
use std::hint::black_box;

const FIGURES: &[Figure] = &[
    Figure {
        key: "ns",
        unit: "ns",
        better: Better::Less,
    },
    Figure {
        key: "allocations",
        unit: "allocations",
        better: Better::Less,
    },
];

pub(super) fn publish() -> Bench {
    let about = "basic.publish of 100 bytes with properties, to bytes; per message";
    let bench = Bench::new("codec_publish", about, FIGURES).ours(|| {
        let (mut out, mut props) = (Vec::new(), Vec::new());
        timed(move || {
            out.clear();
            put(&mut out, &mut props);
            black_box(&out);
        })
    });
    #[cfg(feature = "peers")]
    let bench = bench.peer("amq-protocol", || {
        let mut out = vec![0; peer::BUFFER];
        timed(move || {
            let length = peer::put(&mut out);
            black_box(&out[..length]);
        })
    });
    bench
}

pub(super) fn deliver() -> Bench {
    let about = "basic.deliver of 100 bytes with properties, from bytes; per message";
    let bench = Bench::new("codec_deliver", about, FIGURES).ours(|| {
        let bytes = delivery();
        timed(move || {
            black_box(read(black_box(&bytes)));
        })
    });
    #[cfg(feature = "peers")]
    let bench = bench.peer("amq-protocol", || {
        let bytes = delivery();
        timed(move || {
            black_box(peer::read(black_box(&bytes)));
        })
    });
    bench
}

pub(super) fn ack() -> Bench {
    let about = "basic.ack to bytes and back; per ack";
    let bench = Bench::new("codec_ack", about, FIGURES).ours(|| {
        let (mut out, mut tag) = (Vec::new(), 0);
        timed(move || {
            tag += 1;
            out.clear();
            put_ack(&mut out, tag);
            black_box(read_ack(black_box(&out)));
        })
    });
    #[cfg(feature = "peers")]
    let bench = bench.peer("amq-protocol", || {
        let (mut out, mut tag) = (vec![0; peer::BUFFER], 0);
        timed(move || {
            tag += 1;
            let length = peer::put_ack(&mut out, tag);
            black_box(peer::read_ack(black_box(&out[..length])));
        })
    });
    bench
}

/// Operations a lap.
const LAP: u64 = 10_000;

fn timed(mut operation: impl FnMut()) -> Result<Sample, Error> {
    let mut lap = || (0..LAP).for_each(|_| operation());
    // The kernel only because the clock is async: nothing here waits.
    #[allow(unused_mut, reason = "changes only where allocations are counted")]
    let mut sample = kernel::run(time(LAP, async || lap()))?;
    #[cfg(feature = "allocations")]
    sample.insert(
        "allocations".into(),
        crate::allocations_in(lap) as f64 / LAP as f64,
    );
    Ok(sample)
}

const CHANNEL: u16 = 1;
const KEY: &str = "Olive.k";
const EXCHANGE: &str = "Olive.x";
const CONSUMER: &str = "ctag1.fde2c4e0a6c44ee0a4dcdcc47e6e0a4c";
const CONTENT_TYPE: &str = "application/json";
const ID: &str = "4f94b073-cbf6-4872-b73b-2b9afabe70b3";
const REPLY_TO: &str = "amq.gen-JzTY20BRgKO-HjmUJj0wLg";
const BODY: [u8; 100] = super::BODY;

const PROPERTIES: Properties<'_> = Properties {
    content_type: Some(CONTENT_TYPE),
    content_encoding: None,
    headers: None,
    delivery_mode: Some(1),
    priority: None,
    correlation_id: Some(ID),
    reply_to: Some(REPLY_TO),
    expiration: None,
    message_id: None,
    timestamp: None,
    kind: None,
    user_id: None,
    app_id: None,
    cluster_id: None,
};

/// What is read of a delivery.
type Read = (u64, usize, usize, usize, usize);

fn splitter() -> Splitter {
    Splitter::with_frame_max(131_072)
}

fn put(out: &mut Vec<u8>, props: &mut Vec<u8>) {
    // Encoded each time, as one must where every message has an id of its own.
    props.clear();
    let properties = black_box(PROPERTIES);
    properties.encode_into(props).expect("short properties");
    let publish = Publish {
        exchange: black_box(EXCHANGE),
        routing_key: black_box(KEY),
        mandatory: false,
        immediate: false,
    };
    publish
        .put(
            out,
            CHANNEL,
            props,
            black_box(&BODY),
            splitter().max_payload(),
        )
        .expect("short names");
}

/// The bytes of one delivery.
fn delivery() -> Vec<u8> {
    let mut bytes = Vec::new();
    let deliver = Deliver {
        consumer_tag: CONSUMER,
        delivery_tag: 7,
        redelivered: false,
        exchange: EXCHANGE,
        routing_key: KEY,
    };
    deliver.put(&mut bytes, CHANNEL);
    let props = PROPERTIES.encode().expect("short properties");
    amqp::wire::frame::put_content(
        &mut bytes,
        CHANNEL,
        props.as_bytes(),
        &BODY,
        splitter().max_payload(),
    );
    bytes
}

fn read(bytes: &[u8]) -> Read {
    let mut rest = bytes;
    let mut next = || {
        let (frame, used) = splitter().next_frame(rest).expect("good").expect("whole");
        rest = &rest[used..];
        frame
    };
    let (
        Frame::Method {
            class,
            method,
            args,
            ..
        },
        Frame::Header { raw, .. },
        Frame::Body { data, .. },
    ) = (next(), next(), next())
    else {
        panic!("a delivery is a method, a header and a body");
    };
    let Ok(AnyMethod::Deliver(deliver)) = AnyMethod::decode(class, method, args) else {
        panic!("not a delivery");
    };
    let header = ContentHeader::parse(raw).expect("a good header");
    header.props.check().expect("good properties");
    // Owned, as by a consumer that goes on reading into the same buffer.
    let body = black_box(data.to_vec());
    (
        deliver.delivery_tag,
        deliver.routing_key.len(),
        header.props.correlation_id().map_or(0, str::len),
        header.props.reply_to().map_or(0, str::len),
        body.len(),
    )
}

fn put_ack(out: &mut Vec<u8>, delivery_tag: u64) {
    let ack = Ack {
        delivery_tag,
        multiple: false,
    };
    ack.put(out, CHANNEL);
}

fn read_ack(bytes: &[u8]) -> u64 {
    let frame = splitter().next_frame(bytes).expect("good");
    let Some((
        Frame::Method {
            class,
            method,
            args,
            ..
        },
        _,
    )) = frame
    else {
        panic!("not a method");
    };
    match AnyMethod::decode(class, method, args) {
        Ok(AnyMethod::Ack(ack)) => ack.delivery_tag,
        _ => panic!("not an ack"),
    }
}

#[cfg(feature = "peers")]
mod peer {
    use super::*;
    use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, WriteContext, gen_frame, parse_frame};
    use amq_protocol::protocol::{AMQPClass, basic};
    use amq_protocol::types::ShortString;

    /// More than any message here.
    pub(super) const BUFFER: usize = 4096;

    /// Writes the frame at the front of `out`, the quickest of the buffers it can write to; gives its length.
    fn write(frame: &AMQPFrame, out: &mut [u8]) -> usize {
        let context = WriteContext::from(out);
        let (_, length) = gen_frame(frame)(context).expect("it fits").into_inner();
        length as usize
    }

    pub(super) fn put(out: &mut [u8]) -> usize {
        let publish = basic::Publish {
            exchange: short(EXCHANGE),
            routing_key: short(KEY),
            mandatory: false,
            immediate: false,
        };
        let properties = basic::AMQPProperties::default()
            .with_content_type(short(CONTENT_TYPE))
            .with_delivery_mode(1)
            .with_correlation_id(short(ID))
            .with_reply_to(short(REPLY_TO));
        let header = AMQPContentHeader {
            class_id: 60,
            body_size: BODY.len() as u64,
            properties,
        };
        let method = AMQPClass::Basic(basic::AMQPMethod::Publish(publish));
        let mut length = write(&AMQPFrame::Method(CHANNEL, method), out);
        length += write(&AMQPFrame::Header(CHANNEL, header), &mut out[length..]);
        let body = black_box(&BODY).to_vec();
        length + write(&AMQPFrame::Body(CHANNEL, body), &mut out[length..])
    }

    fn short(text: &'static str) -> ShortString {
        black_box(text).into()
    }

    pub(super) fn read(bytes: &[u8]) -> Read {
        let mut rest = bytes;
        let mut next = || {
            let (left, frame) = parse_frame(rest).expect("a frame");
            rest = left;
            frame
        };
        let (
            AMQPFrame::Method(_, AMQPClass::Basic(basic::AMQPMethod::Deliver(deliver))),
            AMQPFrame::Header(_, header),
            AMQPFrame::Body(_, body),
        ) = (next(), next(), next())
        else {
            panic!("a delivery is a method, a header and a body");
        };
        let length = |text: &Option<ShortString>| text.as_ref().map_or(0, |it| it.as_str().len());
        (
            deliver.delivery_tag,
            deliver.routing_key.as_str().len(),
            length(header.properties.correlation_id()),
            length(header.properties.reply_to()),
            black_box(body).len(),
        )
    }

    pub(super) fn put_ack(out: &mut [u8], delivery_tag: u64) -> usize {
        let ack = basic::Ack {
            delivery_tag,
            multiple: false,
        };
        let method = AMQPClass::Basic(basic::AMQPMethod::Ack(ack));
        write(&AMQPFrame::Method(CHANNEL, method), out)
    }

    pub(super) fn read_ack(bytes: &[u8]) -> u64 {
        match parse_frame(bytes) {
            Ok((_, AMQPFrame::Method(_, AMQPClass::Basic(basic::AMQPMethod::Ack(ack))))) => {
                ack.delivery_tag
            }
            _ => panic!("not an ack"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_what_was_written() {
        let expected = (7, KEY.len(), ID.len(), REPLY_TO.len(), BODY.len());
        assert_eq!(read(&delivery()), expected);
        #[cfg(feature = "peers")]
        assert_eq!(peer::read(&delivery()), expected);
    }

    #[cfg(feature = "peers")]
    #[test]
    fn both_sides_write_the_same_bytes() {
        let (mut ours, mut theirs) = (Vec::new(), vec![0; peer::BUFFER]);
        put(&mut ours, &mut Vec::new());
        let length = peer::put(&mut theirs);
        assert_eq!(ours, theirs[..length]);
        ours.clear();
        put_ack(&mut ours, 9);
        let length = peer::put_ack(&mut theirs, 9);
        assert_eq!(ours, theirs[..length]);
        assert_eq!((read_ack(&ours), peer::read_ack(&ours)), (9, 9));
    }
}
