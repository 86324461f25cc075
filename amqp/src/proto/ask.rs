//! What a connection asks of its server: a channel, a declaration, a consumer, anything that has an answer.

use std::cmp::Reverse;

use super::channel::{Channel, Consumer, Purpose, Stage, Waiter};
use super::connection::{Connection, find_mut};
use super::event::{ChannelKey, ConsumerKey, Refused, ReqId};
use crate::error::ReplyCode;
use crate::wire::cold::{self, Method, basic, channel, confirm, connection, exchange, queue, tx};

impl Connection {
    /// Shows the server another secret, before the one we have expires. The reply is `connection.update-secret-ok`; a server that does
    /// not like it closes the connection.
    ///
    /// # Errors
    /// [`Refused::NotOpen`]; [`Refused::Encode`] if the reason is longer than 255 bytes, or the secret than a frame.
    pub fn update_secret(
        &mut self,
        secret: &str,
        reason: &str,
    ) -> Result<(ChannelKey, ReqId), Refused> {
        self.must_be_open()?;
        let update = connection::UpdateSecret {
            new_secret: secret.into(),
            reason: cold::short("reason", reason)?,
        };
        let update = Method::Connection(connection::AMQPMethod::UpdateSecret(update));
        cold::try_put(self.out.lane(0), 0, &update, self.splitter.max_payload())?;
        let n = self.next_request;
        self.next_request += 1;
        self.secrets.push_back((n, true));
        // No channel has this number.
        let nobody = ChannelKey {
            id: 0,
            generation: u64::MAX,
        };
        Ok((nobody, ReqId { channel: 0, n }))
    }

    /// Opens a channel with the lowest free number. It can be used at once; the reply to the request is `channel.open-ok`.
    ///
    /// # Errors
    /// [`Refused::NotOpen`], [`Refused::NoChannelLeft`].
    pub fn open_channel(&mut self) -> Result<(ChannelKey, ReqId), Refused> {
        let tuned = self.must_be_open()?;
        let id = match self.free.pop() {
            Some(Reverse(id)) => id,
            None => match u16::try_from(self.channels.len()) {
                Ok(id) if id <= tuned.channel_max => {
                    self.channels.push(None);
                    id
                }
                Ok(_) | Err(_) => return Err(Refused::NoChannelLeft(tuned.channel_max)),
            },
        };
        let key = ChannelKey {
            id,
            generation: self.next_generation,
        };
        self.next_generation += 1;
        self.channels[usize::from(id)] = Some(Box::new(Channel::new(key, self.max_body)));
        let open = Method::Channel(channel::AMQPMethod::Open(channel::Open {}));
        let request = self.ask(key, &open, Purpose::Open)?;
        Ok((key, request))
    }

    /// Closes a channel. Nothing can be sent on it any more; what still comes is dropped. The reply is `channel.close-ok`.
    ///
    /// # Errors
    /// [`Refused::NotOpen`], [`Refused::ChannelGone`].
    pub fn close_channel(
        &mut self,
        key: ChannelKey,
        code: ReplyCode,
        text: &str,
    ) -> Result<ReqId, Refused> {
        self.flush_acks();
        let close = channel::Close {
            reply_code: code.0,
            reply_text: cold::short_text(text),
            class_id: 0,
            method_id: 0,
        };
        let close = Method::Channel(channel::AMQPMethod::Close(close));
        let request = self.ask(key, &close, Purpose::Close)?;
        if let Some(channel) = self.channel_mut(key) {
            channel.stage = Stage::Closing;
        }
        Ok(request)
    }

    /// Sends a method that has a reply, on a channel. Requests may be pipelined: replies come in their order.
    ///
    /// `confirm.select` puts the channel in confirm mode from here on, so publishings may follow without waiting.
    ///
    /// # Errors
    /// [`Refused::NotARequest`] for methods without a reply (`nowait`), and for those that have a function of their own here;
    /// [`Refused::Encode`] for arguments larger than a frame; otherwise as [`Connection::close_channel`].
    pub fn request(&mut self, key: ChannelKey, method: &Method) -> Result<ReqId, Refused> {
        let purpose = match method {
            Method::Basic(basic::AMQPMethod::Consume(_) | basic::AMQPMethod::Cancel(_))
            | Method::Channel(channel::AMQPMethod::Open(_) | channel::AMQPMethod::Close(_)) => {
                return Err(Refused::NotARequest);
            }
            Method::Basic(basic::AMQPMethod::Get(get)) => Purpose::Get { no_ack: get.no_ack },
            Method::Basic(basic::AMQPMethod::Recover(_)) => {
                // Behind it, acks given before would be for tags that the broker has forgotten.
                self.flush_acks();
                Purpose::Recover
            }
            Method::Tx(_) => {
                // Acks given before belong to this transaction.
                self.flush_acks();
                Purpose::Other
            }
            _ => Purpose::Other,
        };
        let request = self.ask(key, method, purpose)?;
        if let Some(channel) = self.channel_mut(key) {
            match method {
                Method::Basic(basic::AMQPMethod::Recover(_)) => channel.unsettled.recovers(),
                Method::Confirm(confirm::AMQPMethod::Select(_)) => {
                    channel.confirms.get_or_insert_default();
                }
                Method::Tx(tx::AMQPMethod::Select(_)) => channel.unsettled.transactional(),
                _ => {}
            }
        }
        Ok(request)
    }

    /// Starts a consumer. An empty tag is replaced by one of our own, so that deliveries find their consumer without waiting
    /// for the reply.
    ///
    /// # Errors
    /// [`Refused::ConsumerTagTaken`]: RabbitMQ would close the connection (530). Others as [`Connection::request`].
    pub fn consume(
        &mut self,
        key: ChannelKey,
        mut method: basic::Consume,
    ) -> Result<(ConsumerKey, ReqId), Refused> {
        let consumer = ConsumerKey(self.next_consumer);
        if method.consumer_tag.as_str().is_empty() {
            let (epoch, n) = (consumer.0 >> 32, consumer.0 as u32);
            method.consumer_tag = cold::short_text(&format!("sweepea-{epoch}-{n}"));
        }
        let tag = method.consumer_tag.as_str();
        let channel = self.channel_mut(key);
        if channel.is_some_and(|c| c.has_consumer(tag)) {
            return Err(Refused::ConsumerTagTaken(tag.to_owned()));
        }
        let entry = Consumer {
            key: consumer,
            tag: method.consumer_tag.as_str().into(),
            no_ack: method.no_ack,
            abandoned: false,
        };
        let method = Method::Basic(basic::AMQPMethod::Consume(method));
        let request = self.ask(key, &method, Purpose::Consume(consumer))?;
        self.next_consumer += 1;
        if let Some(channel) = self.channel_mut(key) {
            channel.add_consumer(entry);
        }
        Ok((consumer, request))
    }

    /// Ends a consumer. Deliveries may come until the reply does.
    ///
    /// # Errors
    /// As [`Connection::request`]; [`Refused::ChannelGone`] also if the consumer has ended already.
    pub fn cancel(&mut self, key: ChannelKey, consumer: ConsumerKey) -> Result<ReqId, Refused> {
        let entry = self.channel_mut(key).and_then(|c| c.consumer(consumer));
        let tag = entry.ok_or(Refused::ChannelGone)?.tag.clone();
        self.ask(key, &cancel_method(&tag), Purpose::Cancel(consumer))
    }

    /// Ends a consumer that nobody listens to any more: what still comes for it goes back to the queue, and there is no event.
    /// Nothing happens if it has ended already.
    pub fn abandon_consumer(&mut self, key: ChannelKey, consumer: ConsumerKey) {
        let Some(channel) = self.channel_mut(key) else {
            return;
        };
        match channel.consumer(consumer) {
            Some(entry) if !entry.abandoned => entry.abandoned = true,
            Some(_) | None => return,
        }
        // RabbitMQ's channel crashes over a cancel that overtakes its consume-ok: then it is sent when that has come.
        let starts = |w: &&mut Waiter| w.purpose == Purpose::Consume(consumer);
        if let Some(waiter) = channel.waiters.iter_mut().find(starts) {
            waiter.abandoned = true;
            return;
        }
        // Refused means that the channel is about to go, and the consumer with it.
        if let Ok(request) = self.cancel(key, consumer) {
            self.abandon(request);
        }
    }

    /// Nobody waits for this reply any more. It is consumed in its turn without an event, and undone where it matters: a
    /// consumer is cancelled and its deliveries go back, a message that was got goes back, a channel is closed.
    pub fn abandon(&mut self, id: ReqId) {
        if let Some((_, waits)) = self.secrets.iter_mut().find(|(n, _)| *n == id.n) {
            *waits = false;
        }
        if let Some(Some(channel)) = self.channels.get_mut(usize::from(id.channel))
            && let Some(waiter) = channel.waiters.iter_mut().find(|w| w.n == id.n)
        {
            waiter.abandoned = true;
            if let Purpose::Consume(key) = waiter.purpose
                && let Some(consumer) = channel.consumer(key)
            {
                consumer.abandoned = true;
            }
        }
    }

    /// Appends a request and notes who waits for the reply.
    fn ask(
        &mut self,
        key: ChannelKey,
        method: &Method,
        purpose: Purpose,
    ) -> Result<ReqId, Refused> {
        self.must_be_open()?;
        let reply = reply_to(method).ok_or(Refused::NotARequest)?;
        let n = self.next_request;
        let channel = find_mut(&mut self.channels, key).ok_or(Refused::ChannelGone)?;
        if !channel.takes_requests() {
            return Err(Refused::ChannelGone);
        }
        let max_payload = self.splitter.max_payload();
        cold::try_put(self.out.lane(key.id), key.id, method, max_payload)?;
        channel.waiters.push_back(Waiter {
            n,
            reply,
            purpose,
            abandoned: false,
        });
        self.next_request += 1;
        Ok(ReqId { channel: key.id, n })
    }
}

/// Which methods answer a request; `None` if none does.
fn reply_to(method: &Method) -> Option<(u16, [u16; 2])> {
    use Method as M;
    let class = method.get_amqp_class_id();
    let id = method.get_amqp_method_id();
    let next = Some((class, [id + 1; 2]));
    match method {
        M::Basic(basic::AMQPMethod::Get(_)) => Some((class, [71, 72])),
        M::Basic(basic::AMQPMethod::Qos(_) | basic::AMQPMethod::Recover(_)) => next,
        M::Basic(basic::AMQPMethod::Consume(m)) if !m.nowait => next,
        M::Basic(basic::AMQPMethod::Cancel(m)) if !m.nowait => next,
        M::Basic(_) => None,
        M::Channel(channel::AMQPMethod::Open(_) | channel::AMQPMethod::Close(_)) => next,
        M::Channel(channel::AMQPMethod::Flow(_)) => next,
        M::Channel(_) => None,
        M::Exchange(exchange::AMQPMethod::Declare(m)) if !m.nowait => next,
        M::Exchange(exchange::AMQPMethod::Delete(m)) if !m.nowait => next,
        M::Exchange(exchange::AMQPMethod::Bind(m)) if !m.nowait => next,
        // The one reply whose number is not its request's plus one.
        M::Exchange(exchange::AMQPMethod::Unbind(m)) if !m.nowait => Some((class, [51; 2])),
        M::Exchange(_) => None,
        M::Queue(queue::AMQPMethod::Declare(m)) if !m.nowait => next,
        M::Queue(queue::AMQPMethod::Bind(m)) if !m.nowait => next,
        M::Queue(queue::AMQPMethod::Purge(m)) if !m.nowait => next,
        M::Queue(queue::AMQPMethod::Delete(m)) if !m.nowait => next,
        M::Queue(queue::AMQPMethod::Unbind(_)) => next,
        M::Queue(_) => None,
        M::Tx(
            tx::AMQPMethod::Select(_) | tx::AMQPMethod::Commit(_) | tx::AMQPMethod::Rollback(_),
        ) => next,
        M::Tx(_) => None,
        M::Confirm(confirm::AMQPMethod::Select(m)) if !m.nowait => next,
        M::Confirm(_) => None,
        M::Connection(_) | M::Access(_) => None,
    }
}

fn cancel_method(tag: &str) -> Method {
    Method::Basic(basic::AMQPMethod::Cancel(basic::Cancel {
        consumer_tag: cold::short_text(tag),
        nowait: false,
    }))
}
