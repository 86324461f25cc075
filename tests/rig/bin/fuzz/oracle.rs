//! What `amq-protocol` makes of a frame, and what we make of it.

use amq_protocol::frame::{AMQPFrame, parse_frame};
use amq_protocol::protocol::{AMQPClass, BasicProperties, basic};
use amqp::wire::{AnyMethod, ContentHeader, Frame, Props, Splitter, cold};

/// Whether both read the frame; `None` if they are not to be compared.
///
/// # Panics
/// If one reads what the other refuses, or they read it differently.
pub(crate) fn judge(bytes: &[u8]) -> Option<bool> {
    if is_deep(bytes) {
        // Their parser recurses; ours has a limit. That we refuse in time is for the players to see.
        return None;
    }
    let theirs = match parse_frame(bytes) {
        // They have no limits and wait for what will never be.
        Err(error) if error.is_incomplete() => return None,
        Ok((_, frame)) => Some(frame),
        Err(_) => None,
    };
    let ours = Splitter::with_frame_max(131_072).next_frame(bytes);
    let ours = match ours {
        Ok(None) => {
            assert!(theirs.is_none(), "they finished {bytes:?}");
            return None;
        }
        Ok(Some((frame, _))) => Some(frame),
        Err(_) => None,
    };
    match (ours, theirs) {
        (None, None) => Some(false),
        (None, Some(frame)) => {
            let is_known = match frame {
                AMQPFrame::ProtocolHeader(_)
                | AMQPFrame::InvalidHeartbeat(_)
                | AMQPFrame::Heartbeat => true,
                AMQPFrame::Header(channel, _) | AMQPFrame::Body(channel, _) => {
                    channel == 0 || bytes.len() > 131_072
                }
                AMQPFrame::Method(..) => bytes.len() > 131_072,
            };
            assert!(is_known, "only they read {bytes:?}");
            None
        }
        (Some(Frame::Heartbeat), theirs) => {
            assert!(matches!(theirs, Some(AMQPFrame::Heartbeat)), "{bytes:?}");
            Some(true)
        }
        (Some(Frame::Body { channel, data }), theirs) => {
            let theirs = theirs.expect("they read every body");
            assert_eq!(theirs, AMQPFrame::Body(channel, data.to_vec()));
            Some(true)
        }
        (
            Some(Frame::Method {
                channel,
                class,
                method,
                args,
            }),
            theirs,
        ) => match (AnyMethod::decode(class, method, args), theirs) {
            (Err(_), None) => Some(false),
            (Ok(ours), Some(AMQPFrame::Method(of, theirs))) => {
                assert_eq!(channel, of);
                same_method(&ours, &theirs);
                Some(true)
            }
            (ours, theirs) => panic!("we: {ours:?}, they: {theirs:?}, of {bytes:?}"),
        },
        (Some(Frame::Header { channel, raw }), theirs) => {
            let ours = ContentHeader::parse(raw).and_then(|header| {
                header.props.check()?;
                Ok(header)
            });
            match (ours, theirs) {
                (Err(_), None) => Some(false),
                (Ok(ours), Some(AMQPFrame::Header(of, theirs))) => {
                    assert_eq!((channel, ours.body_size), (of, theirs.body_size));
                    same_properties(ours.props, &theirs.properties);
                    Some(true)
                }
                // Flags that basic does not have, among them one for more flags, are no matter to them.
                (Err(_), Some(_)) if raw.len() >= 14 && raw[13] & 3 != 0 => None,
                // Nor is the weight.
                (Err(_), Some(_)) if raw.len() >= 4 && raw[2..4] != [0, 0] => None,
                // To us, most texts may be any bytes.
                (Ok(ours), None) if has_raw_bytes(ours.props) => None,
                (ours, theirs) => panic!("we: {ours:?}, they: {theirs:?}, of {bytes:?}"),
            }
        }
    }
}

/// Whether a property is left out when all of them are read as what they should be.
fn has_raw_bytes(props: Props<'_>) -> bool {
    let all = props.to_properties().encode();
    all.map_or(true, |all| all.as_bytes() != props.as_bytes())
}

/// Whether something may nest deeper than we allow: two bytes of five, or of seven, for each level.
fn is_deep(bytes: &[u8]) -> bool {
    let opens = |byte: &&u8| matches!(byte, b'A' | b'F');
    bytes.iter().filter(opens).count() > 60
}

fn same_method(ours: &AnyMethod<'_>, theirs: &AMQPClass) {
    use basic::AMQPMethod as Theirs;
    let theirs = match (ours, theirs) {
        (AnyMethod::Cold(ours), theirs) => return assert_eq!(ours, theirs),
        (_, AMQPClass::Basic(theirs)) => theirs,
        (ours, theirs) => panic!("we: {ours:?}, they: {theirs:?}"),
    };
    let is_same = match (ours, theirs) {
        (AnyMethod::Publish(a), Theirs::Publish(b)) => {
            (a.exchange, a.routing_key) == (b.exchange.as_str(), b.routing_key.as_str())
                && (a.mandatory, a.immediate) == (b.mandatory, b.immediate)
        }
        (AnyMethod::Deliver(a), Theirs::Deliver(b)) => {
            (a.exchange, a.routing_key) == (b.exchange.as_str(), b.routing_key.as_str())
                && a.consumer_tag == b.consumer_tag.as_str()
                && (a.delivery_tag, a.redelivered) == (b.delivery_tag, b.redelivered)
        }
        (AnyMethod::GetOk(a), Theirs::GetOk(b)) => {
            (a.exchange, a.routing_key) == (b.exchange.as_str(), b.routing_key.as_str())
                && a.message_count == b.message_count
                && (a.delivery_tag, a.redelivered) == (b.delivery_tag, b.redelivered)
        }
        (AnyMethod::Return(a), Theirs::Return(b)) => {
            (a.exchange, a.routing_key) == (b.exchange.as_str(), b.routing_key.as_str())
                && (a.reply_code.0, a.reply_text) == (b.reply_code, b.reply_text.as_str())
        }
        (AnyMethod::Ack(a), Theirs::Ack(b)) => {
            (a.delivery_tag, a.multiple) == (b.delivery_tag, b.multiple)
        }
        (AnyMethod::Nack(a), Theirs::Nack(b)) => {
            (a.delivery_tag, a.multiple, a.requeue) == (b.delivery_tag, b.multiple, b.requeue)
        }
        (AnyMethod::Reject(a), Theirs::Reject(b)) => {
            (a.delivery_tag, a.requeue) == (b.delivery_tag, b.requeue)
        }
        _ => false,
    };
    assert!(is_same, "we: {ours:?}, they: {theirs:?}");
}

fn same_properties(ours: Props<'_>, theirs: &BasicProperties) {
    let texts = [
        (ours.content_type(), theirs.content_type()),
        (ours.content_encoding(), theirs.content_encoding()),
        (ours.correlation_id(), theirs.correlation_id()),
        (ours.reply_to(), theirs.reply_to()),
        (ours.expiration(), theirs.expiration()),
        (ours.message_id(), theirs.message_id()),
        (ours.kind(), theirs.kind()),
        (ours.user_id(), theirs.user_id()),
        (ours.app_id(), theirs.app_id()),
        (ours.cluster_id(), theirs.cluster_id()),
    ];
    for (ours, theirs) in texts {
        assert_eq!(ours, theirs.as_ref().map(|text| text.as_str()));
    }
    assert_eq!(ours.delivery_mode(), *theirs.delivery_mode());
    assert_eq!(ours.priority(), *theirs.priority());
    assert_eq!(ours.timestamp(), *theirs.timestamp());
    let headers = ours.headers().map(|table| cold::field_table(table));
    let headers = headers.transpose().expect("it has been checked");
    // By their text, since a float that is not a number is not even like itself.
    assert_eq!(format!("{headers:?}"), format!("{:?}", theirs.headers()));
}
