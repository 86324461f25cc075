//! One channel of a session: what its methods do to the vhost, and which deliveries wait to be settled.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::deadletter::carbon_copies;
use super::exchange::QueueId;
use super::fault::{Fault, type_name};
use super::queue::{Consumer, Entry, Message};
use super::store::Mark;
use super::transaction::{Held, How, Transaction};
use super::vhost::{Enqueued, ExchangeSpec, QueueSpec, REPLY_TO, Route, Vhost};
use super::{Config, SessionId};
use crate::error::ReplyCode;
use crate::proto::content::Content;
use crate::proto::unsettled::Slots;
use crate::wire::cold::{self, Method, access, basic, confirm, exchange, queue, short_text, tx};
use crate::wire::props::Changes;
use crate::wire::{Ack, Deliver, GetOk, Nack, Props, PropsBuf, Publish, Reject, Return, TableBuf};

/// What a channel works with while it handles one frame.
pub(super) struct Scope<'a> {
    pub(super) session: SessionId,
    pub(super) user: &'a str,
    /// Channel number.
    pub(super) number: u16,
    pub(super) vhost: &'a mut Vhost,
    pub(super) config: &'a Config,
    pub(super) out: &'a mut Vec<u8>,
    /// Largest payload of the frames we send.
    pub(super) max_payload: usize,
    pub(super) now: Instant,
}

impl Scope<'_> {
    fn put(&mut self, method: impl Answer) {
        cold::put(self.out, self.number, &method.into_method());
    }
}

/// A method of one class as one of any: amq-protocol has no `From` for it.
pub(super) trait Answer {
    fn into_method(self) -> Method;
}

macro_rules! answers {
    ($($class:ident $variant:ident,)*) => {
        $(impl Answer for cold::$class::AMQPMethod {
            fn into_method(self) -> Method {
                Method::$variant(self)
            }
        })*
    };
}

answers! {
    access Access,
    basic Basic,
    channel Channel,
    confirm Confirm,
    connection Connection,
    exchange Exchange,
    queue Queue,
    tx Tx,
}

/// A delivery that the client has not settled.
#[derive(Debug)]
struct Delivered {
    queue: QueueId,
    entry: Entry,
    /// `None` if it was asked for by `basic.get`.
    consumer: Option<Rc<Consumer>>,
    /// The channel's transaction has settled it.
    settles_with_commit: bool,
}

/// Publisher confirms of one channel.
#[derive(Debug, Default)]
struct Confirms {
    /// The last publishing received; they are numbered from 1.
    last: u64,
    /// All up to and with this one have been answered.
    answered: u64,
    /// Publishings up to the number wait for the store to reach the mark.
    waiting: VecDeque<(Mark, u64)>,
}

impl Confirms {
    /// Acks everything up to `through` as one.
    fn ack(&mut self, through: u64, channel: u16, out: &mut Vec<u8>) {
        let multiple = match through.checked_sub(self.answered) {
            None | Some(0) => return,
            Some(n) => n > 1,
        };
        self.answered = through;
        Ack {
            delivery_tag: through,
            multiple,
        }
        .put(out, channel);
    }
}

/// Where the last publishing went: most go where the one before went.
#[derive(Debug)]
struct LastRoute {
    exchange: Rc<str>,
    key: Rc<str>,
    /// `None` if it depends on the message.
    route: Option<Route>,
    /// The vhost's version that `route` belongs to.
    version: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Channel {
    /// We have sent `channel.close`: what still comes in is dropped until the answer.
    pub(super) closing: bool,
    unsettled: Slots<Delivered>,
    /// Those of `unsettled` that went to consumers.
    pushed: u32,
    pub(super) consumers: BTreeMap<Rc<str>, Rc<Consumer>>,
    /// For consumers that start from now on.
    prefetch: u16,
    /// For all consumers of the channel together; 0 is no limit.
    prefetch_all: u16,
    confirms: Option<Confirms>,
    /// From `tx.select` on; never together with `confirms`.
    transaction: Option<Transaction>,
    /// Commits that wait for the store to reach the mark.
    commits: VecDeque<Mark>,
    /// For methods that name no queue.
    last_queue: Option<Rc<str>>,
    /// What is behind `amq.rabbitmq.reply-to`, if there is a consumer on it.
    reply_queue: Option<(QueueId, Rc<str>)>,
    last_route: Option<LastRoute>,
}

/// A channel that never acks its first delivery holds a slot for each later one; deliveries stop at this many.
const SLOTS_MAX: usize = 1 << 20;
/// A client that does not wait for `commit-ok` gets so far ahead of the store.
const COMMITS_MAX: usize = 1 << 10;

impl Channel {
    pub(super) fn new() -> Self {
        Self {
            closing: false,
            unsettled: Slots::new(),
            pushed: 0,
            consumers: BTreeMap::new(),
            prefetch: 0,
            prefetch_all: 0,
            confirms: None,
            transaction: None,
            commits: VecDeque::new(),
            last_queue: None,
            reply_queue: None,
            last_route: None,
        }
    }

    /// A content is complete. What follows a method other than publish has been refused before.
    pub(super) fn content(
        &mut self,
        content: Content<'_>,
        scope: &mut Scope<'_>,
    ) -> Result<(), Fault> {
        let publish = Publish::decode(content.args)?;
        let (props, mut body) = (content.props, content.body.into_owned());
        let body_len = body.len();
        body.extend_from_slice(props.as_bytes());
        self.publish(&publish, props, body, body_len, scope)
    }

    /// A message that lies whole in the read buffer: one copy, into the buffer that it is kept in.
    pub(super) fn whole(
        &mut self,
        publish: &Publish<'_>,
        props: Props<'_>,
        body: &[u8],
        scope: &mut Scope<'_>,
    ) -> Result<(), Fault> {
        let mut content = Vec::with_capacity(body.len() + props.as_bytes().len());
        content.extend_from_slice(body);
        content.extend_from_slice(props.as_bytes());
        self.publish(publish, props, content, body.len(), scope)
    }

    /// `content` is the body, `body_len` bytes, and the properties behind it.
    fn publish(
        &mut self,
        publish: &Publish<'_>,
        props: Props<'_>,
        mut content: Vec<u8>,
        body_len: usize,
        scope: &mut Scope<'_>,
    ) -> Result<(), Fault> {
        if publish.immediate {
            return Err(Fault::not_implemented("immediate=true"));
        }
        let remembered = self.last_route.as_ref().is_some_and(|last| {
            last.version == scope.vhost.version
                && *last.key == *publish.routing_key
                && *last.exchange == *publish.exchange
        });
        if !remembered {
            self.last_route = Some(look_up(publish, self.last_route.take(), scope)?);
        }
        props.check()?;
        let traits = Traits::read(props, scope.user)?;
        let copies = if traits.has_headers {
            copies(props)?
        } else {
            Vec::new()
        };
        if let Some(rewritten) = self.rewrite(props)? {
            content.truncate(body_len);
            content.extend_from_slice(rewritten.as_bytes());
        }
        let last = self.last_route.as_mut().expect("set above");
        let route = match (&last.route, copies.is_empty()) {
            (Some(route), true) => route.queues.clone(),
            (_, _) => {
                let mut keys = vec![publish.routing_key];
                keys.extend(copies.iter().copied());
                let route = scope.vhost.route(publish.exchange, &keys, props.headers());
                if copies.is_empty() && route.lasting {
                    last.route = Some(route.clone());
                }
                route.queues
            }
        };

        let mut message = Message::new(
            last.exchange.clone(),
            last.key.clone(),
            content,
            body_len,
            &scope.vhost.memory,
        );
        message.persistent = traits.persistent;
        message.priority = traits.priority;
        message.ttl = traits.ttl;

        let held = Held {
            message: Rc::new(message),
            queues: route,
            mandatory: publish.mandatory,
        };
        if let Some(transaction) = &mut self.transaction {
            return transaction.publish(held, scope.config);
        }
        let rejected = Self::enqueue(&held, scope) == Enqueued::Rejected;
        if let Some(confirms) = &mut self.confirms {
            confirms.last += 1;
            if rejected {
                let tag = confirms.last;
                if confirms.waiting.is_empty() {
                    // The publishings before it are safe or will be marked; answer them first, so that a later
                    // `multiple` does not seem to speak of this one.
                    let mark = scope.vhost.mark();
                    if scope.vhost.safe() >= mark {
                        confirms.ack(tag - 1, scope.number, scope.out);
                        confirms.answered = tag;
                    }
                }
                Nack {
                    delivery_tag: tag,
                    multiple: false,
                    requeue: false,
                }
                .put(scope.out, scope.number);
            }
        }
        Ok(())
    }

    /// Puts a message into its queues, or sends it back. `Rejected` if one of them did not take it.
    fn enqueue(held: &Held, scope: &mut Scope<'_>) -> Enqueued {
        let Held {
            message,
            queues,
            mandatory,
        } = held;
        if queues.is_empty() && *mandatory {
            Return {
                reply_code: ReplyCode::NO_ROUTE,
                reply_text: "NO_ROUTE",
                exchange: &message.exchange,
                routing_key: &message.routing_key,
            }
            .put(scope.out, scope.number);
            message.put_content(scope.out, scope.number, scope.max_payload);
        }
        let mut outcome = Enqueued::Taken;
        for &id in queues.iter() {
            if scope.vhost.enqueue(id, message, scope.now) == Enqueued::Rejected {
                outcome = Enqueued::Rejected;
            }
        }
        outcome
    }

    /// The properties as consumers see them where they differ: `reply_to` of direct reply-to, and no `BCC`.
    fn rewrite(&self, props: Props<'_>) -> Result<Option<PropsBuf>, Fault> {
        let direct = props.reply_to() == Some(REPLY_TO);
        let blind = props.header("BCC").is_some();
        if !direct && !blind {
            return Ok(None);
        }
        let mut changes = Changes::default();
        if direct {
            let Some((_, name)) = &self.reply_queue else {
                return Err(Fault::precondition("fast reply consumer does not exist"));
            };
            changes.reply_to = Some(name);
        }
        let mut headers = TableBuf::new();
        if blind {
            for (name, value) in props.headers().into_iter().flatten() {
                if name != "BCC" {
                    headers.put(name, value);
                }
            }
            changes.headers = Some(headers.as_table());
        }
        Ok(Some(props.changed(&changes)))
    }

    /// Whether publishings of it are answered, or commits wait for the store.
    pub(super) fn owes_confirms(&self) -> bool {
        self.confirms.is_some() || !self.commits.is_empty()
    }

    /// Whether a commit waits for the store.
    pub(super) fn awaits_store(&self) -> bool {
        !self.commits.is_empty()
    }

    /// Answers the publishings of the input that has just been handled, and commits, or has them wait for the store.
    /// `true` if some wait.
    pub(super) fn flush_confirms(
        &mut self,
        number: u16,
        vhost: &mut Vhost,
        out: &mut Vec<u8>,
    ) -> bool {
        while self
            .commits
            .front()
            .is_some_and(|&mark| mark <= vhost.safe())
        {
            self.commits.pop_front();
            let ok = tx::AMQPMethod::CommitOk(tx::CommitOk {});
            cold::put(out, number, &ok.into_method());
        }
        let Some(confirms) = &mut self.confirms else {
            return !self.commits.is_empty();
        };
        let marked = confirms
            .waiting
            .back()
            .map_or(confirms.answered, |&(_, through)| through);
        if confirms.last > marked {
            let mark = vhost.mark();
            confirms.waiting.push_back((mark, confirms.last));
        }
        let safe = vhost.safe();
        let mut through = 0;
        while let Some(&(mark, last)) = confirms.waiting.front()
            && mark <= safe
        {
            confirms.waiting.pop_front();
            through = last;
        }
        confirms.ack(through, number, out);
        !confirms.waiting.is_empty()
    }

    /// Whether `consumer` of this channel could be sent a message now.
    pub(super) fn has_room(&self, consumer: &Consumer) -> bool {
        !self.closing
            && (consumer.no_ack
                || (consumer.has_room()
                    && (self.prefetch_all == 0 || self.pushed < self.prefetch_all.into())
                    && self.unsettled.held() < SLOTS_MAX))
    }

    /// Sends a message to a consumer. Returns the entry if nobody will settle it.
    pub(super) fn deliver(
        &mut self,
        consumer: &Rc<Consumer>,
        entry: Entry,
        max_payload: usize,
        out: &mut Vec<u8>,
    ) -> Option<Entry> {
        let message = entry.message.clone();
        let redelivered = entry.redelivered;
        let replies = self.reply_queue.as_ref().map(|(id, _)| *id);
        let (delivery_tag, settled) = if replies == Some(consumer.queue) {
            // As RabbitMQ has it, replies use up no tags.
            (self.unsettled.next_tag(), Some(entry))
        } else if consumer.no_ack {
            (self.unsettled.skip(), Some(entry))
        } else {
            consumer.unsettled.update(|n| n + 1);
            self.pushed += 1;
            let delivered = Delivered {
                queue: consumer.queue,
                entry,
                consumer: Some(consumer.clone()),
                settles_with_commit: false,
            };
            (self.unsettled.push(delivered), None)
        };
        Deliver {
            consumer_tag: &consumer.tag,
            delivery_tag,
            redelivered,
            exchange: &message.exchange,
            routing_key: &message.routing_key,
        }
        .put(out, consumer.channel);
        message.put_content(out, consumer.channel, max_payload);
        settled
    }

    pub(super) fn ack(&mut self, ack: Ack, scope: &mut Scope<'_>) -> Result<(), Fault> {
        self.settle(ack.delivery_tag, ack.multiple, How::Ack, scope)
    }

    pub(super) fn nack(&mut self, nack: Nack, scope: &mut Scope<'_>) -> Result<(), Fault> {
        self.refuse(nack.delivery_tag, nack.multiple, nack.requeue, scope)
    }

    pub(super) fn reject(&mut self, reject: Reject, scope: &mut Scope<'_>) -> Result<(), Fault> {
        self.refuse(reject.delivery_tag, false, reject.requeue, scope)
    }

    fn refuse(
        &mut self,
        tag: u64,
        multiple: bool,
        requeue: bool,
        scope: &mut Scope<'_>,
    ) -> Result<(), Fault> {
        let how = if requeue { How::Requeue } else { How::Drop };
        self.settle(tag, multiple, how, scope)
    }

    fn settle(
        &mut self,
        tag: u64,
        multiple: bool,
        how: How,
        scope: &mut Scope<'_>,
    ) -> Result<(), Fault> {
        if self.transaction.is_some() {
            return self.settle_with_commit(tag, multiple, how);
        }
        if !multiple {
            let delivered = self.unsettled.take(tag).ok_or_else(|| unknown_tag(tag))?;
            self.give_back(delivered, scope.vhost, how);
            return Ok(());
        }
        if tag != 0 && self.unsettled.get_mut(tag).is_none() {
            return Err(unknown_tag(tag));
        }
        let through = if tag == 0 { u64::MAX } else { tag };
        while let Some((_, delivered)) = self.unsettled.take_first_through(through) {
            self.give_back(delivered, scope.vhost, how);
        }
        Ok(())
    }

    /// Notes what is settled in a transaction. The deliveries keep their places, for they may have to be settled again after a rollback.
    fn settle_with_commit(&mut self, tag: u64, multiple: bool, how: How) -> Result<(), Fault> {
        let Self {
            unsettled,
            transaction: Some(transaction),
            ..
        } = self
        else {
            return Ok(());
        };
        let is_open = |unsettled: &mut Slots<Delivered>, tag| {
            let delivered = unsettled.get_mut(tag);
            delivered.is_some_and(|delivered| !delivered.settles_with_commit)
        };
        if !(multiple && tag == 0 || is_open(unsettled, tag)) {
            return Err(unknown_tag(tag));
        }
        let tags = match (multiple, unsettled.front()) {
            (true, Some((first, _))) => {
                let last = unsettled.next_tag() - 1;
                let last = if tag == 0 { last } else { last.min(tag) };
                let tags = first.max(transaction.settled_below)..=last;
                transaction.settled_below = last + 1;
                tags
            }
            (_, _) => tag..=tag,
        };
        for tag in tags {
            if let Some(delivered) = unsettled.get_mut(tag)
                && !delivered.settles_with_commit
            {
                delivered.settles_with_commit = true;
                transaction.settle(tag, how)?;
            }
        }
        Ok(())
    }

    fn commit(&mut self, scope: &mut Scope<'_>) -> Result<(), Fault> {
        let transaction = self.transaction.as_mut().ok_or_else(not_transactional)?;
        let Transaction {
            publishings,
            settled,
            ..
        } = std::mem::take(transaction);
        let mut outcome = Enqueued::Taken;
        for held in &publishings {
            if Self::enqueue(held, scope) == Enqueued::Rejected {
                outcome = Enqueued::Rejected;
            }
        }
        for (tag, how) in settled {
            if let Some(delivered) = self.unsettled.take(tag) {
                self.give_back(delivered, scope.vhost, how);
            }
        }
        match outcome {
            Enqueued::Taken => {}
            Enqueued::Rejected => return Err(Fault::precondition("partial tx completion")),
        }
        let mark = scope.vhost.mark();
        if self.commits.is_empty() && mark <= scope.vhost.safe() {
            scope.put(tx::AMQPMethod::CommitOk(tx::CommitOk {}));
        } else if self.commits.len() < COMMITS_MAX {
            self.commits.push_back(mark);
        } else {
            return Err(Fault::precondition(format_args!(
                "{COMMITS_MAX} commits wait for the store, wait for commit-ok"
            )));
        }
        Ok(())
    }

    fn rollback(&mut self, scope: &mut Scope<'_>) -> Result<(), Fault> {
        let transaction = self.transaction.as_mut().ok_or_else(not_transactional)?;
        for (tag, _) in std::mem::take(transaction).settled {
            if let Some(delivered) = self.unsettled.get_mut(tag) {
                delivered.settles_with_commit = false;
            }
        }
        scope.put(tx::AMQPMethod::RollbackOk(tx::RollbackOk {}));
        Ok(())
    }

    /// Ends one delivery `how`, and lets the queue know if somebody waits for the room that this makes.
    fn give_back(&mut self, delivered: Delivered, vhost: &mut Vhost, how: How) {
        let Delivered {
            queue,
            entry,
            consumer,
            settles_with_commit: _,
        } = delivered;
        match how {
            How::Ack => vhost.acked(queue, entry),
            How::Requeue => vhost.requeue(queue, entry),
            How::Drop => vhost.rejected(queue, entry),
        }
        if let Some(consumer) = consumer {
            consumer.unsettled.update(|n| n - 1);
            self.pushed -= 1;
            if self.prefetch_all == 0 {
                feed(vhost, queue);
            } else {
                self.feed_all(vhost);
            }
        }
    }

    /// Room has been made for every consumer of the channel.
    pub(super) fn feed_all(&self, vhost: &mut Vhost) {
        for consumer in self.consumers.values() {
            feed(vhost, consumer.queue);
        }
    }

    /// Ends the channel: its consumers leave, its deliveries go back to their queues. What remains says no to everything.
    pub(super) fn end(&mut self, vhost: &mut Vhost, now: Instant) {
        self.closing = true;
        // The messages go back first: an auto-delete queue may go with its last consumer.
        while let Some((_, delivered)) = self.unsettled.take_first_through(u64::MAX) {
            self.give_back(delivered, vhost, How::Requeue);
        }
        for consumer in std::mem::take(&mut self.consumers).into_values() {
            vhost.leave(&consumer, now);
        }
        *self = Self {
            closing: true,
            ..Self::new()
        };
    }

    // ---- methods ----

    /// Any method of a channel that no content follows and that settles nothing. `args` is its encoded form.
    pub(super) fn method(
        &mut self,
        method: Method,
        args: &[u8],
        scope: &mut Scope<'_>,
    ) -> Result<(), Fault> {
        match method {
            Method::Basic(method) => self.basic(method, args, scope),
            Method::Queue(method) => self.queue(method, scope),
            Method::Exchange(method) => Self::exchange(method, scope),
            Method::Confirm(confirm::AMQPMethod::Select(_)) if self.transaction.is_some() => {
                Err(Fault::precondition("cannot switch from tx to confirm mode"))
            }
            Method::Confirm(confirm::AMQPMethod::Select(select)) => {
                self.confirms.get_or_insert_default();
                if !select.nowait {
                    scope.put(confirm::AMQPMethod::SelectOk(confirm::SelectOk {}));
                }
                Ok(())
            }
            Method::Access(access::AMQPMethod::Request(_)) => {
                scope.put(access::AMQPMethod::RequestOk(access::RequestOk {}));
                Ok(())
            }
            Method::Tx(tx::AMQPMethod::Select(_)) if self.confirms.is_some() => {
                Err(Fault::precondition("cannot switch from confirm to tx mode"))
            }
            Method::Tx(tx::AMQPMethod::Select(_)) => {
                self.transaction.get_or_insert_default();
                scope.put(tx::AMQPMethod::SelectOk(tx::SelectOk {}));
                Ok(())
            }
            Method::Tx(tx::AMQPMethod::Commit(_)) => self.commit(scope),
            Method::Tx(tx::AMQPMethod::Rollback(_)) => self.rollback(scope),
            // Answers that only a server gives, and what the session has kept to itself.
            Method::Confirm(_)
            | Method::Access(_)
            | Method::Tx(_)
            | Method::Channel(_)
            | Method::Connection(_) => Err(not_for_servers()),
        }
    }

    fn basic(
        &mut self,
        method: basic::AMQPMethod,
        args: &[u8],
        scope: &mut Scope<'_>,
    ) -> Result<(), Fault> {
        use basic::AMQPMethod as M;
        match method {
            M::Qos(qos) => {
                // amq-protocol leaves the first field out.
                if let Some(&size) = args.first_chunk::<4>()
                    && size != [0; 4]
                {
                    let size = u32::from_be_bytes(size);
                    return Err(Fault::not_implemented(format_args!(
                        "prefetch_size!=0 ({size})"
                    )));
                }
                if qos.global {
                    self.prefetch_all = qos.prefetch_count;
                    self.feed_all(scope.vhost);
                } else {
                    self.prefetch = qos.prefetch_count;
                }
                scope.put(M::QosOk(basic::QosOk {}));
                Ok(())
            }
            M::Consume(consume) => self.consume(&consume, scope),
            M::Cancel(cancel) => {
                if let Some(consumer) = self.consumers.remove(cancel.consumer_tag.as_str()) {
                    scope.vhost.leave(&consumer, scope.now);
                    self.reply_queue.take_if(|(id, _)| *id == consumer.queue);
                }
                if !cancel.nowait {
                    let consumer_tag = cancel.consumer_tag;
                    scope.put(M::CancelOk(basic::CancelOk { consumer_tag }));
                }
                Ok(())
            }
            // The client's answer to our own cancel, which does not ask for one.
            M::CancelOk(_) => Ok(()),
            M::Get(get) => self.get(&get, scope),
            M::Recover(recover) => {
                self.recover(recover.requeue, scope)?;
                scope.put(M::RecoverOk(basic::RecoverOk {}));
                Ok(())
            }
            M::RecoverAsync(recover) => self.recover(recover.requeue, scope),
            M::Publish(_) | M::Ack(_) | M::Nack(_) | M::Reject(_) => {
                unreachable!("hot methods are not decoded cold")
            }
            M::QosOk(_)
            | M::ConsumeOk(_)
            | M::Return(_)
            | M::Deliver(_)
            | M::GetOk(_)
            | M::GetEmpty(_)
            | M::RecoverOk(_) => Err(not_for_servers()),
        }
    }

    fn consume(&mut self, consume: &basic::Consume, scope: &mut Scope<'_>) -> Result<(), Fault> {
        let arguments = cold::table_buf(&consume.arguments);
        let priority = match arguments.as_table().get("x-priority") {
            None => 0,
            Some(value) => value.as_int().ok_or_else(|| {
                Fault::precondition(format_args!(
                    "invalid arg 'x-priority' for consumer: expected integer, got {}",
                    type_name(&value)
                ))
            })?,
        };
        let tag: Rc<str> = match consume.consumer_tag.as_str() {
            "" => scope.vhost.make_name("amq.ctag-"),
            tag => tag.into(),
        };
        if self.consumers.contains_key(&tag) {
            return Err(Fault::not_allowed(format_args!(
                "attempt to reuse consumer tag '{tag}'"
            )));
        }
        if self.consumers.len() >= scope.config.max_consumers {
            let most = scope.config.max_consumers;
            return Err(Fault::not_allowed(format_args!(
                "more than {most} consumers on one channel"
            )));
        }
        let name = self.queue_name(consume.queue.as_str())?;
        let id = if &*name == REPLY_TO {
            if !consume.no_ack {
                return Err(Fault::precondition("reply consumer cannot acknowledge"));
            }
            if self.reply_queue.is_some() {
                return Err(Fault::precondition("reply consumer already set"));
            }
            let id = scope.vhost.declare_reply_queue(scope.session, scope.now)?;
            let name = scope.vhost.queue(id).map(|queue| queue.name.clone());
            self.reply_queue = name.map(|name| (id, name));
            id
        } else {
            let queue = scope.vhost.usable_queue(&name, scope.session)?;
            let others = queue.consumers();
            if others
                .first()
                .is_some_and(|other| consume.exclusive || other.exclusive)
            {
                let what = scope.vhost.queue_called(&name);
                return Err(Fault::access_refused(format_args!(
                    "{what} in exclusive use"
                )));
            }
            queue.id
        };
        let consumer = Rc::new(Consumer {
            tag: tag.clone(),
            session: scope.session,
            channel: scope.number,
            queue: id,
            no_ack: consume.no_ack,
            exclusive: consume.exclusive,
            priority,
            prefetch: self.prefetch,
            unsettled: Cell::new(0),
        });
        self.consumers.insert(tag.clone(), consumer.clone());
        if let Some(queue) = scope.vhost.queue_mut(id) {
            queue.add_consumer(consumer);
        }
        scope.vhost.rearm(id);
        scope.vhost.touch(id);
        if !consume.nowait {
            let consumer_tag = short_text(&tag);
            scope.put(basic::AMQPMethod::ConsumeOk(basic::ConsumeOk {
                consumer_tag,
            }));
        }
        Ok(())
    }

    fn get(&mut self, get: &basic::Get, scope: &mut Scope<'_>) -> Result<(), Fault> {
        let name = self.queue_name(get.queue.as_str())?;
        let queue = scope.vhost.usable_queue(&name, scope.session)?.id;
        if self.unsettled.held() >= SLOTS_MAX {
            return Err(Fault::precondition(format_args!(
                "more than {SLOTS_MAX} deliveries since the first that is not settled"
            )));
        }
        let Some((entry, left)) = scope.vhost.take(queue, scope.now) else {
            scope.put(basic::AMQPMethod::GetEmpty(basic::GetEmpty {}));
            return Ok(());
        };
        let message = entry.message.clone();
        let redelivered = entry.redelivered;
        let delivery_tag = if get.no_ack {
            scope.vhost.acked(queue, entry);
            self.unsettled.skip()
        } else {
            self.unsettled.push(Delivered {
                queue,
                entry,
                consumer: None,
                settles_with_commit: false,
            })
        };
        GetOk {
            delivery_tag,
            redelivered,
            exchange: &message.exchange,
            routing_key: &message.routing_key,
            message_count: count(left),
        }
        .put(scope.out, scope.number);
        message.put_content(scope.out, scope.number, scope.max_payload);
        Ok(())
    }

    fn recover(&mut self, requeue: bool, scope: &mut Scope<'_>) -> Result<(), Fault> {
        if !requeue {
            return Err(Fault::not_implemented("requeue=false"));
        }
        // Not in a transaction's hands: what has been settled in one stays settled.
        let Some(transaction) = &self.transaction else {
            return self.refuse(0, true, true, scope);
        };
        let Some((first, _)) = self.unsettled.front() else {
            return Ok(());
        };
        for tag in first.max(transaction.settled_below)..self.unsettled.next_tag() {
            let delivered = self.unsettled.get_mut(tag);
            if delivered.is_some_and(|delivered| !delivered.settles_with_commit)
                && let Some(delivered) = self.unsettled.take(tag)
            {
                self.give_back(delivered, scope.vhost, How::Requeue);
            }
        }
        Ok(())
    }

    fn queue(&mut self, method: queue::AMQPMethod, scope: &mut Scope<'_>) -> Result<(), Fault> {
        use queue::AMQPMethod as M;
        let session = scope.session;
        match method {
            M::Declare(declare) => self.declare_queue(&declare, scope),
            M::Bind(bind) => {
                let name = self.queue_name(bind.queue.as_str())?;
                let key = self.key(bind.queue.as_str(), bind.routing_key.as_str());
                let arguments = cold::table_buf(&bind.arguments);
                scope
                    .vhost
                    .bind_queue(&name, bind.exchange.as_str(), &key, arguments, session)?;
                if !bind.nowait {
                    scope.put(M::BindOk(queue::BindOk {}));
                }
                Ok(())
            }
            M::Unbind(unbind) => {
                let name = self.queue_name(unbind.queue.as_str())?;
                let key = self.key(unbind.queue.as_str(), unbind.routing_key.as_str());
                let arguments = cold::table_buf(&unbind.arguments);
                scope.vhost.unbind_queue(
                    &name,
                    unbind.exchange.as_str(),
                    &key,
                    &arguments,
                    session,
                )?;
                scope.put(M::UnbindOk(queue::UnbindOk {}));
                Ok(())
            }
            M::Purge(purge) => {
                let name = self.queue_name(purge.queue.as_str())?;
                let message_count = count(scope.vhost.purge(&name, session)?);
                if !purge.nowait {
                    scope.put(M::PurgeOk(queue::PurgeOk { message_count }));
                }
                Ok(())
            }
            M::Delete(delete) => {
                let name = self.queue_name(delete.queue.as_str())?;
                let held =
                    scope
                        .vhost
                        .delete_queue(&name, delete.if_unused, delete.if_empty, session)?;
                if !delete.nowait {
                    let message_count = count(held);
                    scope.put(M::DeleteOk(queue::DeleteOk { message_count }));
                }
                Ok(())
            }
            M::DeclareOk(_) | M::BindOk(_) | M::UnbindOk(_) | M::PurgeOk(_) | M::DeleteOk(_) => {
                Err(not_for_servers())
            }
        }
    }

    fn declare_queue(
        &mut self,
        declare: &queue::Declare,
        scope: &mut Scope<'_>,
    ) -> Result<(), Fault> {
        let asked = declare.queue.as_str();
        let (name, messages, consumers) = if declare.passive {
            let name = self.queue_name(asked)?;
            if &*name == REPLY_TO {
                (name, 0, 1)
            } else {
                let queue = scope.vhost.declared_queue(&name, scope.session)?;
                (name, queue.len(), queue.consumers().len())
            }
        } else {
            let arguments = cold::table_buf(&declare.arguments);
            let spec = QueueSpec {
                name: asked,
                durable: declare.durable,
                exclusive: declare.exclusive,
                auto_delete: declare.auto_delete,
                arguments: arguments.as_table(),
            };
            let queue = scope.vhost.declare_queue(&spec, scope.session, scope.now)?;
            (queue.name.clone(), queue.len(), queue.consumers().len())
        };
        self.last_queue = Some(name.clone());
        if !declare.nowait {
            scope.put(queue::AMQPMethod::DeclareOk(queue::DeclareOk {
                queue: short_text(&name),
                message_count: count(messages),
                consumer_count: count(consumers),
            }));
        }
        Ok(())
    }

    fn exchange(method: exchange::AMQPMethod, scope: &mut Scope<'_>) -> Result<(), Fault> {
        use exchange::AMQPMethod as M;
        match method {
            M::Declare(declare) => {
                if declare.passive {
                    scope.vhost.check_exchange(declare.exchange.as_str())?;
                } else {
                    let arguments = cold::table_buf(&declare.arguments);
                    scope.vhost.declare_exchange(&ExchangeSpec {
                        name: declare.exchange.as_str(),
                        kind: declare.kind.as_str(),
                        durable: declare.durable,
                        auto_delete: declare.auto_delete,
                        internal: declare.internal,
                        arguments: arguments.as_table(),
                    })?;
                }
                if !declare.nowait {
                    scope.put(M::DeclareOk(exchange::DeclareOk {}));
                }
                Ok(())
            }
            M::Delete(delete) => {
                scope
                    .vhost
                    .delete_exchange(delete.exchange.as_str(), delete.if_unused)?;
                if !delete.nowait {
                    scope.put(M::DeleteOk(exchange::DeleteOk {}));
                }
                Ok(())
            }
            M::Bind(bind) => {
                scope.vhost.bind_exchange(
                    bind.destination.as_str(),
                    bind.source.as_str(),
                    bind.routing_key.as_str(),
                    cold::table_buf(&bind.arguments),
                )?;
                if !bind.nowait {
                    scope.put(M::BindOk(exchange::BindOk {}));
                }
                Ok(())
            }
            M::Unbind(unbind) => {
                scope.vhost.unbind_exchange(
                    unbind.destination.as_str(),
                    unbind.source.as_str(),
                    unbind.routing_key.as_str(),
                    &cold::table_buf(&unbind.arguments),
                )?;
                if !unbind.nowait {
                    scope.put(M::UnbindOk(exchange::UnbindOk {}));
                }
                Ok(())
            }
            M::DeclareOk(_) | M::DeleteOk(_) | M::BindOk(_) | M::UnbindOk(_) => {
                Err(not_for_servers())
            }
        }
    }

    /// The queue a method means: an empty name is the one declared last on this channel.
    fn queue_name(&self, name: &str) -> Result<Rc<str>, Fault> {
        if !name.is_empty() {
            return Ok(name.into());
        }
        self.last_queue
            .clone()
            .ok_or_else(|| Fault::not_found("no previously declared queue"))
    }

    /// The key a binding means: with neither queue nor key it is the name of the queue declared last.
    fn key(&self, queue: &str, key: &str) -> Rc<str> {
        match &self.last_queue {
            Some(last) if queue.is_empty() && key.is_empty() => last.clone(),
            Some(_) | None => key.into(),
        }
    }
}

/// Looks at the exchange of a publishing that does not go where the last one went; strings that did not change are kept.
fn look_up(
    publish: &Publish<'_>,
    last: Option<LastRoute>,
    scope: &Scope<'_>,
) -> Result<LastRoute, Fault> {
    let (exchange, key) = match last {
        Some(last) => (Some(last.exchange), Some(last.key)),
        None => (None, None),
    };
    let keep = |old: Option<Rc<str>>, new: &str| {
        old.filter(|old| **old == *new)
            .unwrap_or_else(|| new.into())
    };
    if !publish.exchange.is_empty() && scope.vhost.require_exchange(publish.exchange)?.internal {
        let what = scope.vhost.exchange_called(publish.exchange);
        return Err(Fault::access_refused(format_args!(
            "cannot publish to internal {what}"
        )));
    }
    Ok(LastRoute {
        exchange: keep(exchange, publish.exchange),
        key: keep(key, publish.routing_key),
        route: None,
        version: scope.vhost.version,
    })
}

/// What a broker has to know of a message's properties.
struct Traits {
    persistent: bool,
    priority: u8,
    ttl: Option<Duration>,
    has_headers: bool,
}

impl Traits {
    fn read(props: Props<'_>, user: &str) -> Result<Self, Fault> {
        if let Some(claimed) = props.user_id().filter(|&claimed| claimed != user) {
            return Err(Fault::precondition(format_args!(
                "user_id property set to '{claimed}' but authenticated user was '{user}'"
            )));
        }
        let ttl = match props.expiration() {
            None => None,
            Some(text) => Some(expiration(text).map_err(|why| {
                Fault::precondition(format_args!("invalid expiration '{text}': {why}"))
            })?),
        };
        Ok(Self {
            persistent: props.is_persistent(),
            priority: props.priority().unwrap_or(0),
            ttl,
            has_headers: props.headers().is_some(),
        })
    }
}

/// Milliseconds in decimal, with Erlang's errors.
fn expiration(text: &str) -> Result<Duration, String> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let end = digits.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, rest) = digits.split_at(end);
    if digits.is_empty() {
        return Err("no_integer".into());
    }
    if !rest.is_empty() {
        return Err(format!("{{leftover_string,\"{rest}\"}}"));
    }
    if text.starts_with('-') && digits.bytes().any(|b| b != b'0') {
        return Err(format!("{{value_negative,-{digits}}}"));
    }
    // RabbitMQ's timers hold 32 bits.
    match digits.parse::<u32>() {
        Ok(ms) => Ok(Duration::from_millis(ms.into())),
        Err(_) => Err(format!("{{value_too_large,{digits}}}")),
    }
}

/// Further routing keys, which have to be arrays.
fn copies(props: Props<'_>) -> Result<Vec<&str>, Fault> {
    for name in ["CC", "BCC"] {
        if let Some(value) = props.header(name)
            && value.as_array().is_none()
        {
            return Err(Fault::precondition(format_args!(
                "invalid message: {{unacceptable_type_in_header,\"{name}\",{}}}",
                type_name(&value)
            )));
        }
    }
    Ok(carbon_copies(props))
}

fn not_transactional() -> Fault {
    Fault::precondition("channel is not transactional")
}

/// A consumer of this queue has room again.
fn feed(vhost: &mut Vhost, queue: QueueId) {
    if vhost.queue(queue).is_some_and(|q| q.starved) {
        vhost.touch(queue);
    }
}

fn unknown_tag(tag: u64) -> Fault {
    Fault::precondition(format_args!("unknown delivery tag {tag}"))
}

fn not_for_servers() -> Fault {
    Fault::command_invalid("a client does not send this method")
}

fn count(n: usize) -> u32 {
    n.try_into().unwrap_or(u32::MAX)
}
