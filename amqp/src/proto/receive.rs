//! What a connection makes of the frames that come.

use std::borrow::Cow;
use std::time::Instant;

use super::channel::{Channel, Consumer, Purpose, Stage, Waiter};
use super::confirms::fingerprint;
use super::connection::{Connection, Sink, State};
use super::content::{self, Assembly, Content};
use super::event::{ChannelKey, CloseReason, DeliveryKey, Down, Event, Lost, Outcome, ReqId};
use super::handshake::{ClientStep, HandshakeError};
use super::heartbeat::Heartbeat;
use super::outbox::Outbox;
use super::unsettled::{Settle, Unsettled};
use crate::error::{ReplyCode, WireError};
use crate::wire::cold::{self, Method, basic, channel, connection};
use crate::wire::{AnyMethod, Deliver, Frame, Props, Splitter, hot};

impl Connection {
    /// One frame, and the bytes behind it, of which it may use some: answers how many.
    #[inline]
    pub(super) fn frame(
        &mut self,
        frame: Frame<'_>,
        rest: &[u8],
        now: Instant,
        sink: &mut Sink<'_>,
    ) -> Result<usize, WireError> {
        match frame {
            Frame::Heartbeat => Ok(0),
            Frame::Method {
                channel: 0,
                class,
                method,
                args,
            } => self
                .connection_method(cold::decode(class, method, args)?, now, sink)
                .map(|()| 0),
            Frame::Method {
                channel,
                class,
                method,
                args,
            } => self.channel_method(channel, class, method, args, rest, sink),
            Frame::Header { channel, raw } => {
                self.content_frame(channel, sink, |assembly| assembly.header(raw))
            }
            Frame::Body { channel, data } => {
                self.content_frame(channel, sink, |assembly| assembly.body(data))
            }
        }
    }

    /// Whether what comes on channels is to be dropped, because the connection is being closed.
    fn drops_channels(&self, id: u16) -> Result<bool, WireError> {
        match self.state {
            State::Open(_) => Ok(false),
            State::AwaitCloseOk | State::Down => Ok(true),
            State::Handshake(_) => {
                let detail = format_args!("frame on channel {id} before the connection was open");
                Err(WireError::new(ReplyCode::CHANNEL_ERROR, detail))
            }
        }
    }

    fn content_frame(
        &mut self,
        id: u16,
        sink: &mut Sink<'_>,
        step: impl FnOnce(&mut Assembly) -> Result<Option<Content<'_>>, WireError>,
    ) -> Result<usize, WireError> {
        if self.drops_channels(id)? {
            return Ok(0);
        }
        let channel = present(&mut self.channels, id)?;
        if !channel.takes_requests() {
            return Ok(0);
        }
        // The assembly lends out what it has put together, so it steps aside while the channel deals with that. An error
        // ends the connection, and the assembly with it.
        let mut assembly = std::mem::replace(&mut channel.assembly, Assembly::new(0));
        if let Some(Content {
            method,
            args,
            props,
            body,
        }) = step(&mut assembly)?
        {
            if method == hot::DELIVER {
                let channel = present(&mut self.channels, id)?;
                delivery(channel, &mut self.out, args, props, body, sink)?;
            } else {
                let method = AnyMethod::decode(hot::BASIC, method, args)?;
                self.content(id, method, props, body, sink)?;
            }
        }
        if let Some(Some(channel)) = self.channels.get_mut(usize::from(id)) {
            channel.assembly = assembly;
        }
        Ok(0)
    }

    /// A complete message that is no delivery.
    fn content(
        &mut self,
        id: u16,
        method: AnyMethod<'_>,
        props: Props<'_>,
        body: Cow<'_, [u8]>,
        sink: &mut Sink<'_>,
    ) -> Result<(), WireError> {
        let channel = present(&mut self.channels, id)?;
        match method {
            AnyMethod::GetOk(get) => {
                let key = DeliveryKey {
                    channel: channel.key,
                    tag: get.delivery_tag,
                };
                // Looked at first: a waiter that is not meant has to have its event when the connection ends over this.
                let next = channel.next_in_order();
                let Some(&Waiter {
                    purpose: Purpose::Get { no_ack },
                    n,
                    abandoned,
                    ..
                }) = channel.waiters.get(next)
                else {
                    let detail = format_args!("basic.get-ok, but no basic.get waits");
                    return Err(bad_method(ReplyCode::COMMAND_INVALID, hot::GET_OK, detail));
                };
                if !channel.unsettled.delivered(key.tag, !no_ack) {
                    return Err(bad_tag(hot::GET_OK, key.tag));
                }
                channel.waiters.remove(next);
                if !abandoned {
                    let id = ReqId { channel: id, n };
                    sink(Event::Got {
                        id,
                        key,
                        get,
                        props,
                        body,
                    });
                } else if !no_ack {
                    let back = Settle::Nack { requeue: true };
                    channel
                        .unsettled
                        .settle(key.tag, back, id, self.out.lane(id));
                }
            }
            AnyMethod::Return(reason) => {
                let print = fingerprint(reason.exchange, reason.routing_key, props.message_id());
                let seq = channel.confirms.as_mut().and_then(|c| c.returned(print));
                let channel = channel.key;
                sink(match seq {
                    Some(seq) => {
                        let outcome = Outcome::Returned {
                            reason,
                            props,
                            body,
                        };
                        Event::Confirm {
                            channel,
                            seq,
                            outcome,
                        }
                    }
                    None => Event::Returned {
                        channel,
                        reason,
                        props,
                        body,
                    },
                });
            }
            // Only methods that a content follows begin one.
            AnyMethod::Publish(_)
            | AnyMethod::Deliver(_)
            | AnyMethod::Ack(_)
            | AnyMethod::Nack(_)
            | AnyMethod::Reject(_)
            | AnyMethod::Cold(_) => {}
        }
        Ok(())
    }

    #[inline]
    fn channel_method(
        &mut self,
        id: u16,
        class: u16,
        method: u16,
        args: &[u8],
        rest: &[u8],
        sink: &mut Sink<'_>,
    ) -> Result<usize, WireError> {
        if self.drops_channels(id)? {
            return Ok(0);
        }
        let (splitter, max_body) = (self.splitter, self.max_body);
        let channel = present(&mut self.channels, id)?;
        if channel.stage == Stage::Closing {
            return self.closing_channel_method(id, class, method, args, sink);
        }
        channel.assembly.method()?;
        if (class, method) == (hot::BASIC, hot::DELIVER)
            && let Some((props, body, used)) = content::whole(&splitter, id, max_body, rest)
        {
            let body = Cow::Borrowed(body);
            delivery(channel, &mut self.out, args, props, body, sink)?;
            return Ok(used);
        }
        match AnyMethod::decode(class, method, args)? {
            AnyMethod::Deliver(_) => channel.assembly.begin(method, args)?,
            lead @ (AnyMethod::GetOk(_) | AnyMethod::Return(_)) => {
                let Some((props, body, used)) = content::whole(&splitter, id, max_body, rest)
                else {
                    channel.assembly.begin(method, args)?;
                    return Ok(0);
                };
                self.content(id, lead, props, Cow::Borrowed(body), sink)?;
                return Ok(used);
            }
            AnyMethod::Ack(ack) => {
                confirmed(channel, ack.delivery_tag, ack.multiple, true, sink)?;
            }
            AnyMethod::Nack(nack) => {
                confirmed(channel, nack.delivery_tag, nack.multiple, false, sink)?;
            }
            AnyMethod::Publish(_) | AnyMethod::Reject(_) => {
                let detail = format_args!("method {method} of class {class} is not for clients");
                return Err(bad_method(ReplyCode::COMMAND_INVALID, method, detail));
            }
            AnyMethod::Cold(method) => self.cold_method(id, method, sink)?,
        }
        Ok(0)
    }

    /// `channel.close` has been sent. Confirms still count, all else was sent before the peer knew.
    fn closing_channel_method(
        &mut self,
        id: u16,
        class: u16,
        method: u16,
        args: &[u8],
        sink: &mut Sink<'_>,
    ) -> Result<usize, WireError> {
        let channel = present(&mut self.channels, id)?;
        match (class, method) {
            (hot::BASIC, hot::ACK | hot::NACK) => match AnyMethod::decode(class, method, args)? {
                AnyMethod::Ack(m) => confirmed(channel, m.delivery_tag, m.multiple, true, sink)?,
                AnyMethod::Nack(m) => confirmed(channel, m.delivery_tag, m.multiple, false, sink)?,
                _ => {}
            },
            CHANNEL_CLOSE => {
                // Both have closed at once: the peer will answer ours as well.
                let ok = channel::AMQPMethod::CloseOk(channel::CloseOk {});
                cold::put(self.out.lane(id), id, &Method::Channel(ok));
            }
            CHANNEL_CLOSE_OK => {
                let ours = channel.waiters.pop_back();
                channel.fail(&Lost::ChannelClosedByUs, sink);
                if let Some(waiter) = ours
                    && !waiter.abandoned
                {
                    let id = channel.request_id(&waiter);
                    let ok = channel::AMQPMethod::CloseOk(channel::CloseOk {});
                    let result = Ok(Method::Channel(ok));
                    sink(Event::Reply { id, result });
                }
                self.forget_channel(id);
            }
            _ => {}
        }
        Ok(0)
    }

    fn cold_method(
        &mut self,
        id: u16,
        method: Method,
        sink: &mut Sink<'_>,
    ) -> Result<(), WireError> {
        let channel = present(&mut self.channels, id)?;
        match method {
            Method::Channel(channel::AMQPMethod::Close(close)) => {
                let ok = channel::AMQPMethod::CloseOk(channel::CloseOk {});
                self.out.forget_channel(id);
                cold::put(self.out.lane(id), id, &Method::Channel(ok));
                let reason = CloseReason {
                    code: ReplyCode(close.reply_code),
                    text: close.reply_text.into(),
                    class: close.class_id,
                    method: close.method_id,
                };
                channel.fail(&Lost::ChannelClosed(reason.clone()), sink);
                let channel = channel.key;
                self.forget_channel(id);
                let reason = &reason;
                sink(Event::ChannelDown { channel, reason });
                Ok(())
            }
            Method::Channel(channel::AMQPMethod::Flow(flow)) => {
                let active = flow.active;
                let ok = channel::AMQPMethod::FlowOk(channel::FlowOk { active });
                cold::put(self.out.lane(id), id, &Method::Channel(ok));
                let channel = channel.key;
                sink(Event::Flow { channel, active });
                Ok(())
            }
            Method::Basic(basic::AMQPMethod::Cancel(cancel)) => {
                if !cancel.nowait {
                    let consumer_tag = cancel.consumer_tag.clone();
                    let ok = basic::AMQPMethod::CancelOk(basic::CancelOk { consumer_tag });
                    cold::put(self.out.lane(id), id, &Method::Basic(ok));
                }
                if let Some(entry) = channel.consumers.by_tag(cancel.consumer_tag.as_str()) {
                    let (consumer, abandoned) = (entry.key, entry.abandoned);
                    channel.remove_consumer(consumer);
                    let channel = channel.key;
                    if !abandoned {
                        sink(Event::Cancelled { channel, consumer });
                    }
                }
                Ok(())
            }
            method => self.reply(id, method, sink),
        }
    }

    /// The answer to a request: the oldest, but for what [`Channel::next_in_order`] says.
    fn reply(&mut self, id: u16, method: Method, sink: &mut Sink<'_>) -> Result<(), WireError> {
        let channel = present(&mut self.channels, id)?;
        let came = (method.get_amqp_class_id(), method.get_amqp_method_id());
        let index = match &method {
            Method::Basic(basic::AMQPMethod::ConsumeOk(ok)) => {
                channel.waiter_of_consumer(came, ok.consumer_tag.as_str())
            }
            Method::Basic(basic::AMQPMethod::CancelOk(ok)) => {
                channel.waiter_of_consumer(came, ok.consumer_tag.as_str())
            }
            _ => Some(channel.next_in_order()),
        };
        let fits = |waiter: &Waiter| {
            let (class, methods) = waiter.reply;
            came.0 == class && methods.contains(&came.1)
        };
        let index = index.filter(|&index| channel.waiters.get(index).is_some_and(fits));
        let Some(waiter) = index.and_then(|index| channel.waiters.remove(index)) else {
            let detail = format_args!(
                "method {} of class {} answers nothing that was asked",
                came.1, came.0
            );
            let error = WireError::new(ReplyCode::COMMAND_INVALID, detail);
            return Err(error.in_method(came.0, came.1));
        };
        let key = channel.key;
        match waiter.purpose {
            Purpose::Open => channel.stage = Stage::Open,
            Purpose::Cancel(consumer) => channel.remove_consumer(consumer),
            Purpose::Recover => channel.unsettled.recovered(),
            Purpose::Consume(_) | Purpose::Close | Purpose::Get { .. } | Purpose::Other => {}
        }
        if !waiter.abandoned {
            let id = channel.request_id(&waiter);
            let result = Ok(method);
            sink(Event::Reply { id, result });
            return Ok(());
        }
        // What nobody waited for is undone, by a request that nobody waits for either. Refused means that it is gone anyway.
        let undo = match waiter.purpose {
            Purpose::Open => self.close_channel(key, ReplyCode::SUCCESS, "abandoned"),
            Purpose::Consume(consumer) => self.cancel(key, consumer),
            _ => return Ok(()),
        };
        if let Ok(request) = undo {
            self.abandon(request);
        }
        Ok(())
    }

    fn connection_method(
        &mut self,
        method: Method,
        now: Instant,
        sink: &mut Sink<'_>,
    ) -> Result<(), WireError> {
        use connection::AMQPMethod as M;
        match method {
            Method::Connection(M::Close(close)) => {
                let ok = M::CloseOk(connection::CloseOk {});
                cold::put(self.out.lane(0), 0, &Method::Connection(ok));
                self.go_down(
                    match self.state {
                        State::AwaitCloseOk => Down::ClosedByUs,
                        _ => Down::ClosedByPeer(CloseReason {
                            code: ReplyCode(close.reply_code),
                            text: close.reply_text.into(),
                            class: close.class_id,
                            method: close.method_id,
                        }),
                    },
                    sink,
                );
                return Ok(());
            }
            Method::Connection(M::CloseOk(_)) if matches!(self.state, State::AwaitCloseOk) => {
                self.go_down(Down::ClosedByUs, sink);
                return Ok(());
            }
            _ => {}
        }
        match std::mem::replace(&mut self.state, State::Down) {
            State::Handshake(client) => {
                self.state = match client.step(method, self.out.lane(0)) {
                    Ok(ClientStep::Continue(client)) => State::Handshake(client),
                    Ok(ClientStep::Tuned(client, tuned)) => {
                        self.splitter = Splitter::with_frame_max(tuned.frame_max as usize)
                            .taking_large_headers();
                        self.beat = Heartbeat::new(tuned.heartbeat, now);
                        State::Handshake(client)
                    }
                    Ok(ClientStep::Open(tuned)) => {
                        sink(Event::Up(tuned));
                        State::Open(tuned)
                    }
                    Err(HandshakeError::Violation(error)) => {
                        self.state = State::AwaitCloseOk;
                        return Err(error);
                    }
                    Err(error) => {
                        self.state = State::AwaitCloseOk;
                        self.go_down(Down::Handshake(error), sink);
                        return Ok(());
                    }
                };
                Ok(())
            }
            State::AwaitCloseOk => {
                self.state = State::AwaitCloseOk;
                Ok(())
            }
            State::Open(tuned) => {
                self.state = State::Open(tuned);
                match method {
                    Method::Connection(M::Blocked(blocked)) => {
                        self.is_blocked = true;
                        sink(Event::Blocked(blocked.reason.as_str()));
                        Ok(())
                    }
                    Method::Connection(M::Unblocked(_)) => {
                        self.is_blocked = false;
                        sink(Event::Unblocked);
                        Ok(())
                    }
                    Method::Connection(M::UpdateSecretOk(_)) if !self.secrets.is_empty() => {
                        if let Some((n, true)) = self.secrets.pop_front() {
                            let id = ReqId { channel: 0, n };
                            let result = Ok(method);
                            sink(Event::Reply { id, result });
                        }
                        Ok(())
                    }
                    method => {
                        let (class, id) = (method.get_amqp_class_id(), method.get_amqp_method_id());
                        let detail = "unexpected method in connection state running";
                        Err(WireError::new(ReplyCode::CHANNEL_ERROR, detail).in_method(class, id))
                    }
                }
            }
            State::Down => Ok(()),
        }
    }
}

const CHANNEL_CLOSE: (u16, u16) = (20, 40);
const CHANNEL_CLOSE_OK: (u16, u16) = (20, 41);

/// The channel that a frame names.
fn present(channels: &mut [Option<Box<Channel>>], id: u16) -> Result<&mut Channel, WireError> {
    let channel = channels.get_mut(usize::from(id));
    channel.and_then(Option::as_deref_mut).ok_or_else(|| {
        let detail = format_args!("frame on channel {id}, which is not open");
        WireError::new(ReplyCode::CHANNEL_ERROR, detail)
    })
}

/// A complete delivery.
#[inline]
fn delivery(
    channel: &mut Channel,
    out: &mut Outbox,
    args: &[u8],
    props: Props<'_>,
    body: Cow<'_, [u8]>,
    sink: &mut Sink<'_>,
) -> Result<(), WireError> {
    let like_last = channel.consumers.last().and_then(|consumer| {
        Deliver::number_if_like(args, &consumer.tag, &channel.last_delivered.names)
    });
    let (delivery_tag, redelivered) = match like_last {
        Some(number) => number,
        None => unlike_last(channel, args)?,
    };
    let (consumer, names) = (channel.consumers.last(), &channel.last_delivered);
    let consumer = consumer.expect("it is the last delivery's, or has just been found");
    let deliver = Deliver {
        consumer_tag: &consumer.tag,
        delivery_tag,
        redelivered,
        exchange: &names.exchange,
        routing_key: &names.key,
    };
    let (key, unsettled) = (channel.key, &mut channel.unsettled);
    hand_out(key, consumer, unsettled, out, deliver, props, body, sink)
}

/// A delivery for another consumer than the last one, or of other names. From now on those are the last. Answers its tag, and whether it was redelivered.
fn unlike_last(channel: &mut Channel, args: &[u8]) -> Result<(u64, bool), WireError> {
    let deliver = Deliver::decode(args)?;
    if channel.consumers.by_tag(deliver.consumer_tag).is_none() {
        let detail = format_args!("delivery for unknown consumer '{}'", deliver.consumer_tag);
        return Err(bad_method(ReplyCode::NOT_ALLOWED, hot::DELIVER, detail));
    }
    channel.last_delivered.change(&deliver, args);
    Ok((deliver.delivery_tag, deliver.redelivered))
}

#[inline]
fn hand_out(
    channel: ChannelKey,
    consumer: &Consumer,
    unsettled: &mut Unsettled,
    out: &mut Outbox,
    deliver: Deliver<'_>,
    props: Props<'_>,
    body: Cow<'_, [u8]>,
    sink: &mut Sink<'_>,
) -> Result<(), WireError> {
    let tag = deliver.delivery_tag;
    if !unsettled.delivered(tag, !consumer.no_ack) {
        return Err(bad_tag(hot::DELIVER, tag));
    }
    if !consumer.abandoned {
        sink(Event::Delivery {
            consumer: consumer.key,
            key: DeliveryKey { channel, tag },
            deliver,
            props,
            body,
        });
    } else if !consumer.no_ack {
        let back = Settle::Nack { requeue: true };
        unsettled.settle(tag, back, channel.id, out.lane(channel.id));
    }
    Ok(())
}

/// The broker's answer to publishings.
#[inline]
fn confirmed(
    channel: &mut Channel,
    tag: u64,
    multiple: bool,
    is_ack: bool,
    sink: &mut Sink<'_>,
) -> Result<(), WireError> {
    let key = channel.key;
    let Some(confirms) = &mut channel.confirms else {
        let method = if is_ack { hot::ACK } else { hot::NACK };
        let detail = format_args!("a confirm on a channel that is not in confirm mode");
        return Err(bad_method(ReplyCode::COMMAND_INVALID, method, detail));
    };
    confirms.answered(tag, multiple, |seq| {
        let outcome = if is_ack { Outcome::Ack } else { Outcome::Nack };
        sink(Event::Confirm {
            channel: key,
            seq,
            outcome,
        });
    });
    Ok(())
}

#[cold]
fn bad_method(code: ReplyCode, method: u16, detail: std::fmt::Arguments<'_>) -> WireError {
    WireError::new(code, detail).in_method(hot::BASIC, method)
}

#[cold]
fn bad_tag(method: u16, tag: u64) -> WireError {
    let detail = format_args!("delivery tag {tag} does not follow the last one");
    bad_method(ReplyCode::NOT_ALLOWED, method, detail)
}
