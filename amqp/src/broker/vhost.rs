//! The virtual host: every exchange and queue by name, and what may be done to them.
//!
//! Each request is checked as RabbitMQ 3.10 checks it, in its order and with its texts. What concerns sessions (a queue that has
//! something to deliver, a consumer that is cancelled) is left in `dirty` and `cancelled` for the broker, which knows them.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;
use std::time::Instant;

use slab::Slab;

use super::SessionId;
use super::deadletter::{self, Reason};
use super::exchange::{Destination, Exchange, ExchangeId, Kind, QueueId};
use super::fault::{Fault, type_name};
use super::queue::{COMPARED, Consumer, Entry, Features, Message, Overflow, Queue};
use super::store::{Mark, Store, Stored};
use crate::wire::{Table, TableBuf, Value};

/// The pseudo queue of direct reply-to, and the start of the names that stand for its consumers.
pub(crate) const REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// How many of each thing a vhost holds; peers create them, so they are bounded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) queues: usize,
    pub(crate) exchanges: usize,
    pub(crate) bindings: usize,
}

/// `exchange.declare`, without the transport.
#[derive(Debug)]
pub(crate) struct ExchangeSpec<'a> {
    pub(crate) name: &'a str,
    pub(crate) kind: &'a str,
    pub(crate) durable: bool,
    pub(crate) auto_delete: bool,
    pub(crate) internal: bool,
    pub(crate) arguments: Table<'a>,
}

/// `queue.declare`, without the transport.
#[derive(Debug)]
pub(crate) struct QueueSpec<'a> {
    /// Empty for a name made here.
    pub(crate) name: &'a str,
    pub(crate) durable: bool,
    pub(crate) exclusive: bool,
    pub(crate) auto_delete: bool,
    pub(crate) arguments: Table<'a>,
}

/// What to do with queues that a message was routed to and that are full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Enqueued {
    Taken,
    /// `x-overflow: reject-publish`: the publisher gets a nack.
    Rejected,
}

/// Where a message goes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Route {
    pub(crate) queues: Rc<[QueueId]>,
    /// Looking up the same exchange and key again gives the same until the topology changes.
    pub(crate) lasting: bool,
}

/// An entry that leaves its queue other than by an ack, on its way to the queue's dead letter exchange.
#[derive(Debug)]
struct Dead {
    entry: Entry,
    queue: Rc<str>,
    exchange: Rc<str>,
    key: Option<Rc<str>>,
    reason: Reason,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Vhost {
    name: Rc<str>,
    limits: Limits,
    exchanges: Slab<Exchange>,
    exchange_names: HashMap<Rc<str>, ExchangeId>,
    queues: Slab<Queue>,
    queue_names: HashMap<Rc<str>, QueueId>,
    bindings: usize,
    next_serial: u32,
    /// Counts changes of the topology; a remembered route is good as long as it stays the same.
    pub(crate) version: u64,
    /// Queues that may have something to deliver, drop or expire.
    pub(crate) dirty: VecDeque<QueueId>,
    /// Consumers whose queue has gone.
    pub(crate) cancelled: Vec<Rc<Consumer>>,
    /// A queue that rejects when full has to be looked at before the next message, to know how full it is.
    pub(crate) urgent: bool,
    alarms: BTreeSet<(Instant, QueueId)>,
    dead: VecDeque<Dead>,
    store: Box<dyn Store>,
    /// Bytes held by messages, in queues and unsettled.
    pub(crate) memory: Rc<Cell<usize>>,
    random: RandomState,
    names_made: u64,
}

impl Vhost {
    pub(crate) fn new(name: &str, limits: Limits, store: Box<dyn Store>) -> Self {
        let mut vhost = Self {
            name: name.into(),
            limits,
            exchanges: Slab::new(),
            exchange_names: HashMap::new(),
            queues: Slab::new(),
            queue_names: HashMap::new(),
            bindings: 0,
            next_serial: 0,
            version: 0,
            dirty: VecDeque::new(),
            cancelled: Vec::new(),
            urgent: false,
            alarms: BTreeSet::new(),
            dead: VecDeque::new(),
            store,
            memory: Rc::default(),
            random: RandomState::new(),
            names_made: 0,
        };
        for (name, kind) in [
            ("amq.direct", Kind::Direct),
            ("amq.fanout", Kind::Fanout),
            ("amq.topic", Kind::Topic),
            ("amq.headers", Kind::Headers),
            ("amq.match", Kind::Headers),
        ] {
            vhost.add_exchange(name, kind);
        }
        vhost
    }

    // ---- exchanges ----

    fn add_exchange(&mut self, name: &str, kind: Kind) -> &mut Exchange {
        let serial = self.serial();
        let name: Rc<str> = name.into();
        let place = self.exchanges.vacant_entry();
        let id = ExchangeId {
            slot: place.key() as u32,
            serial,
        };
        self.exchange_names.insert(name.clone(), id);
        place.insert(Exchange::new(id, name, kind))
    }

    /// `exchange.declare`.
    pub(crate) fn declare_exchange(&mut self, spec: &ExchangeSpec<'_>) -> Result<(), Fault> {
        let Some(kind) = Kind::parse(spec.kind) else {
            let kind = spec.kind;
            return Err(Fault::command_invalid(format_args!(
                "unknown exchange type '{kind}'"
            )));
        };
        not_default(spec.name)?;
        let what = self.exchange_called(spec.name);
        let alternate = exchange_argument("alternate-exchange", &what, spec.arguments)?;
        if let Some(found) = self.exchange(spec.name) {
            equivalent("type", &what, &spec.kind, &found.kind.name())?;
            equivalent("durable", &what, &spec.durable, &found.durable)?;
            equivalent("auto_delete", &what, &spec.auto_delete, &found.auto_delete)?;
            equivalent("internal", &what, &spec.internal, &found.internal)?;
            let current = found.alternate.as_deref().map(Value::from);
            return equivalent_argument(
                "alternate-exchange",
                &what,
                alternate.map(Value::from),
                current,
            );
        }
        if spec.name.starts_with("amq.") {
            return Err(reserved("exchange", spec.name));
        }
        if self.exchanges.len() >= self.limits.exchanges {
            return Err(self.limit_reached(
                &self.exchange_called(spec.name),
                "exchange",
                self.limits.exchanges,
            ));
        }
        let exchange = self.add_exchange(spec.name, kind);
        exchange.durable = spec.durable;
        exchange.auto_delete = spec.auto_delete;
        exchange.internal = spec.internal;
        exchange.alternate = alternate.map(Rc::from);
        self.version += 1;
        Ok(())
    }

    /// `exchange.declare` with `passive`.
    pub(crate) fn check_exchange(&self, name: &str) -> Result<(), Fault> {
        not_default(name)?;
        self.require_exchange(name).map(drop)
    }

    /// `exchange.delete`. Deleting what is not there is no error.
    pub(crate) fn delete_exchange(&mut self, name: &str, if_unused: bool) -> Result<(), Fault> {
        not_default(name)?;
        if name.starts_with("amq.") {
            let what = self.exchange_called(name);
            return Err(Fault::access_refused(format_args!(
                "deletion of system {what} not allowed"
            )));
        }
        let Some(exchange) = self.exchange(name) else {
            return Ok(());
        };
        if if_unused && exchange.binding_count() > 0 {
            let what = self.exchange_called(name);
            return Err(Fault::precondition(format_args!("{what} in use")));
        }
        self.remove_exchange(exchange.id);
        Ok(())
    }

    fn remove_exchange(&mut self, id: ExchangeId) {
        self.version += 1;
        let exchange = self.exchanges.remove(id.slot as usize);
        self.exchange_names.remove(&exchange.name);
        self.bindings -= exchange.binding_count();
        self.forget_destination(Destination::Exchange(id), None);
    }

    /// Removes every binding to `to`: from the exchanges in `at`, or from all. Auto-delete exchanges that lose their last one go too.
    fn forget_destination(&mut self, to: Destination, at: Option<Vec<(ExchangeId, Rc<str>)>>) {
        let mut bereft = Vec::new();
        let places: Vec<(ExchangeId, Option<Rc<str>>)> = match at {
            Some(places) => places
                .into_iter()
                .map(|(id, key)| (id, Some(key)))
                .collect(),
            None => self.exchanges.iter().map(|(_, x)| (x.id, None)).collect(),
        };
        for (id, key) in places {
            let Some(exchange) = exchange_mut(&mut self.exchanges, id) else {
                continue;
            };
            let before = exchange.binding_count();
            match key {
                Some(key) => exchange.unbind_all(&key, to),
                None => exchange.forget(to),
            };
            let after = exchange.binding_count();
            self.bindings -= before - after;
            if after == 0 && before > 0 && exchange.auto_delete {
                bereft.push(id);
            }
        }
        // The chain of auto-delete exchanges is as long as a peer makes it; each call removes one, so it ends.
        for id in bereft {
            if exchange_mut(&mut self.exchanges, id).is_some() {
                self.remove_exchange(id);
            }
        }
    }

    fn exchange(&self, name: &str) -> Option<&Exchange> {
        let id = self.exchange_names.get(name)?;
        self.exchanges.get(id.slot as usize)
    }

    pub(crate) fn require_exchange(&self, name: &str) -> Result<&Exchange, Fault> {
        self.exchange(name)
            .ok_or_else(|| Fault::not_found(format_args!("no {}", self.exchange_called(name))))
    }

    // ---- queues ----

    /// `queue.declare`.
    pub(crate) fn declare_queue(
        &mut self,
        spec: &QueueSpec<'_>,
        session: SessionId,
        now: Instant,
    ) -> Result<&Queue, Fault> {
        if spec.name.starts_with("amq.") {
            return Err(reserved("queue", spec.name));
        }
        let what = self.queue_called(spec.name);
        if let Some(&id) = self.queue_names.get(spec.name) {
            let queue = &mut self.queues[id.slot as usize];
            if queue.owner != spec.exclusive.then_some(session) {
                return Err(locked(&what));
            }
            equivalent("durable", &what, &spec.durable, &queue.durable)?;
            equivalent("auto_delete", &what, &spec.auto_delete, &queue.auto_delete)?;
            let current = queue.arguments.as_table();
            for name in COMPARED {
                equivalent_argument(name, &what, spec.arguments.get(name), current.get(name))?;
            }
            queue.last_used = now;
            let id = queue.id;
            self.rearm(id);
            return Ok(&self.queues[id.slot as usize]);
        }
        exchange_argument("x-dead-letter-exchange", &what, spec.arguments)?;
        let features = Features::parse(spec.arguments, &what)?;
        if self.queues.len() >= self.limits.queues {
            return Err(self.limit_reached(&what, "queue", self.limits.queues));
        }
        let mut kept = TableBuf::new();
        for name in COMPARED {
            if let Some(value) = spec.arguments.get(name) {
                kept.insert(name, value)
                    .expect("the names in COMPARED are short");
            }
        }
        let name: Rc<str> = match spec.name {
            "" => self.make_name("amq.gen-"),
            name => name.into(),
        };
        let queue = self.add_queue(name, features, now);
        queue.durable = spec.durable;
        queue.auto_delete = spec.auto_delete;
        queue.owner = spec.exclusive.then_some(session);
        queue.arguments = kept;
        let id = queue.id;
        self.rearm(id);
        Ok(&self.queues[id.slot as usize])
    }

    /// The queue behind one direct reply-to consumer: its name is what `reply_to` is rewritten to.
    pub(crate) fn declare_reply_queue(
        &mut self,
        session: SessionId,
        now: Instant,
    ) -> Result<QueueId, Fault> {
        if self.queues.len() >= self.limits.queues {
            return Err(self.limit_reached(
                &self.queue_called(REPLY_TO),
                "queue",
                self.limits.queues,
            ));
        }
        let name = self.make_name("amq.rabbitmq.reply-to.");
        let queue = self.add_queue(name, Features::default(), now);
        queue.owner = Some(session);
        queue.auto_delete = true;
        Ok(queue.id)
    }

    fn add_queue(&mut self, name: Rc<str>, features: Features, now: Instant) -> &mut Queue {
        let serial = self.serial();
        self.version += 1;
        let place = self.queues.vacant_entry();
        let id = QueueId {
            slot: place.key() as u32,
            serial,
        };
        self.queue_names.insert(name.clone(), id);
        place.insert(Queue::new(id, name, features, now))
    }

    /// The queue called `name`, if `session` may use it.
    pub(crate) fn usable_queue(&self, name: &str, session: SessionId) -> Result<&Queue, Fault> {
        let what = self.queue_called(name);
        let Some(id) = self.queue_names.get(name) else {
            return Err(Fault::not_found(format_args!("no {what}")));
        };
        let queue = &self.queues[id.slot as usize];
        match queue.owner {
            Some(owner) if owner != session => Err(locked(&what)),
            Some(_) | None => Ok(queue),
        }
    }

    /// `queue.declare` with `passive`. That somebody still waits for replies may be asked by everybody.
    pub(crate) fn declared_queue(&self, name: &str, session: SessionId) -> Result<&Queue, Fault> {
        match self.queue_names.get(name) {
            Some(id) if name.starts_with(REPLY_TO) => Ok(&self.queues[id.slot as usize]),
            Some(_) | None => self.usable_queue(name, session),
        }
    }

    /// `queue.delete`: how many messages went with it. Deleting what is not there is no error.
    pub(crate) fn delete_queue(
        &mut self,
        name: &str,
        if_unused: bool,
        if_empty: bool,
        session: SessionId,
    ) -> Result<usize, Fault> {
        if !self.queue_names.contains_key(name) {
            return Ok(0);
        }
        let queue = self.usable_queue(name, session)?;
        let what = self.queue_called(name);
        if if_unused && !queue.consumers().is_empty() {
            return Err(Fault::precondition(format_args!("{what} in use")));
        }
        if if_empty && !queue.is_empty() {
            return Err(Fault::precondition(format_args!("{what} not empty")));
        }
        let (id, held) = (queue.id, queue.len());
        self.remove_queue(id);
        Ok(held)
    }

    /// Removes a queue with all that it holds; its consumers are cancelled.
    pub(crate) fn remove_queue(&mut self, id: QueueId) {
        if self.queue(id).is_none() {
            return;
        }
        self.version += 1;
        let mut queue = self.queues.remove(id.slot as usize);
        self.queue_names.remove(&queue.name);
        if let Some(at) = queue.alarm {
            self.alarms.remove(&(at, id));
        }
        self.cancelled.extend_from_slice(queue.consumers());
        if queue.durable {
            self.store.forget(&queue.name);
        }
        let bound = std::mem::take(&mut queue.bound);
        self.forget_destination(Destination::Queue(id), Some(bound));
    }

    /// `queue.purge`: how many messages went.
    pub(crate) fn purge(&mut self, name: &str, session: SessionId) -> Result<usize, Fault> {
        let id = self.usable_queue(name, session)?.id;
        let queue = &mut self.queues[id.slot as usize];
        let gone = queue.purge();
        for entry in &gone {
            settle(self.store.as_mut(), queue, entry);
        }
        self.rearm(id);
        Ok(gone.len())
    }

    /// `basic.get`: the first entry and how many are left.
    pub(crate) fn take(&mut self, id: QueueId, now: Instant) -> Option<(Entry, usize)> {
        self.expire(id, |at| at <= now);
        let queue = self.queue_mut(id)?;
        queue.last_used = now;
        let entry = queue.pop();
        queue.unsettled += usize::from(entry.is_some());
        let left = queue.len();
        self.rearm(id);
        entry.map(|entry| (entry, left))
    }

    /// Removes a consumer; a queue that was to go with its last one goes.
    pub(crate) fn leave(&mut self, consumer: &Rc<Consumer>, now: Instant) {
        let Some(queue) = self.queue_mut(consumer.queue) else {
            return;
        };
        if !queue.remove_consumer(consumer, now) {
            return;
        }
        if queue.auto_delete && queue.consumers().is_empty() {
            self.remove_queue(consumer.queue);
        } else {
            self.rearm(consumer.queue);
            // With single-active-consumer somebody else's turn has come.
            self.touch(consumer.queue);
        }
    }

    pub(crate) fn queue(&self, id: QueueId) -> Option<&Queue> {
        self.queues.get(id.slot as usize).filter(|q| q.id == id)
    }

    pub(crate) fn queue_mut(&mut self, id: QueueId) -> Option<&mut Queue> {
        self.queues.get_mut(id.slot as usize).filter(|q| q.id == id)
    }

    pub(crate) fn queues(&self) -> impl Iterator<Item = &Queue> {
        self.queues.iter().map(|(_, queue)| queue)
    }

    /// The exclusive queues of a session that ends.
    pub(crate) fn remove_owned(&mut self, session: SessionId) {
        let owned: Vec<QueueId> = self
            .queues()
            .filter(|q| q.owner == Some(session))
            .map(|q| q.id)
            .collect();
        for id in owned {
            self.remove_queue(id);
        }
    }

    // ---- bindings ----

    /// `queue.bind`.
    pub(crate) fn bind_queue(
        &mut self,
        queue: &str,
        exchange: &str,
        key: &str,
        arguments: TableBuf,
        session: SessionId,
    ) -> Result<(), Fault> {
        not_default(exchange)?;
        let from = self.require_exchange(exchange)?.id;
        let id = self.usable_queue(queue, session)?.id;
        if self.bind(from, key, Destination::Queue(id), arguments)? {
            self.queues[id.slot as usize].bound.push((from, key.into()));
        }
        Ok(())
    }

    /// `queue.unbind`. Neither has to be there.
    pub(crate) fn unbind_queue(
        &mut self,
        queue: &str,
        exchange: &str,
        key: &str,
        arguments: &TableBuf,
        session: SessionId,
    ) -> Result<(), Fault> {
        not_default(exchange)?;
        let (Some(from), true) = (
            self.exchange(exchange).map(|x| x.id),
            self.queue_names.contains_key(queue),
        ) else {
            return Ok(());
        };
        let id = self.usable_queue(queue, session)?.id;
        if self.unbind(from, key, Destination::Queue(id), arguments) {
            let bound = &mut self.queues[id.slot as usize].bound;
            if let Some(at) = bound.iter().position(|(x, k)| *x == from && **k == *key) {
                bound.swap_remove(at);
            }
        }
        Ok(())
    }

    /// `exchange.bind`: what `source` takes goes on to `destination`.
    pub(crate) fn bind_exchange(
        &mut self,
        destination: &str,
        source: &str,
        key: &str,
        arguments: TableBuf,
    ) -> Result<(), Fault> {
        not_default(destination)?;
        not_default(source)?;
        let to = self.require_exchange(destination)?.id;
        let from = self.require_exchange(source)?.id;
        self.bind(from, key, Destination::Exchange(to), arguments)
            .map(drop)
    }

    /// `exchange.unbind`. Neither has to be there.
    pub(crate) fn unbind_exchange(
        &mut self,
        destination: &str,
        source: &str,
        key: &str,
        arguments: &TableBuf,
    ) -> Result<(), Fault> {
        not_default(destination)?;
        not_default(source)?;
        if let (Some(to), Some(from)) = (self.exchange(destination), self.exchange(source)) {
            let (to, from) = (to.id, from.id);
            self.unbind(from, key, Destination::Exchange(to), arguments);
        }
        Ok(())
    }

    fn bind(
        &mut self,
        from: ExchangeId,
        key: &str,
        to: Destination,
        arguments: TableBuf,
    ) -> Result<bool, Fault> {
        let size = arguments.as_table().as_bytes().len();
        if self.bindings >= self.limits.bindings || size > BINDING_ARGUMENTS_MAX {
            return Err(Fault::precondition(format_args!(
                "cannot bind with key '{key}': at most {} bindings in vhost '{}', {BINDING_ARGUMENTS_MAX} bytes of arguments each",
                self.limits.bindings, self.name
            )));
        }
        let exchange = exchange_mut(&mut self.exchanges, from).expect("looked up by name just now");
        let new = exchange.bind(key, to, arguments)?;
        if new {
            self.bindings += 1;
            self.version += 1;
        }
        Ok(new)
    }

    fn unbind(
        &mut self,
        from: ExchangeId,
        key: &str,
        to: Destination,
        arguments: &TableBuf,
    ) -> bool {
        let exchange = exchange_mut(&mut self.exchanges, from).expect("looked up by name just now");
        let found = exchange.unbind(key, to, arguments);
        if found {
            self.bindings -= 1;
            self.version += 1;
            if exchange.auto_delete && exchange.binding_count() == 0 {
                self.remove_exchange(from);
            }
        }
        found
    }

    /// Asks the exchanges; `bindings` has to agree.
    pub(crate) fn binding_count(&self) -> usize {
        let counts = self.exchanges.iter().map(|(_, x)| x.binding_count());
        counts.sum()
    }

    // ---- messages ----

    /// The queues that a message published to `exchange` with `keys` goes to, each once.
    pub(crate) fn route(&self, exchange: &str, keys: &[&str], headers: Option<Table<'_>>) -> Route {
        let mut queues = Vec::new();
        let mut lasting = true;
        let mut seen: Vec<ExchangeId> = Vec::new();
        // The default exchange stands for the queues themselves; nothing is bound to it or from it.
        let mut by_name = exchange.is_empty();
        let mut next = self.exchange(exchange).map(|x| x.id);
        let mut found = Vec::new();
        let mut waiting = Vec::new();
        loop {
            if by_name {
                queues.extend(keys.iter().filter_map(|&key| self.queue_names.get(key)));
                by_name = false;
            }
            let Some(id) = next.take().or_else(|| waiting.pop()) else {
                break;
            };
            if seen.contains(&id) {
                continue;
            }
            seen.push(id);
            let exchange = &self.exchanges[id.slot as usize];
            lasting &= exchange.kind != Kind::Headers;
            for key in keys {
                exchange.route(key, headers, |to| found.push(to));
            }
            if found.is_empty() {
                match exchange.alternate.as_deref() {
                    Some("") => by_name = true,
                    Some(name) => waiting.extend(self.exchange(name).map(|x| x.id)),
                    None => {}
                }
            }
            for to in found.drain(..) {
                match to {
                    Destination::Queue(id) => queues.push(id),
                    Destination::Exchange(id) => waiting.push(id),
                }
            }
        }
        if queues.len() > 1 {
            queues.sort_unstable();
            queues.dedup();
        }
        Route {
            queues: queues.into(),
            lasting,
        }
    }

    /// Adds a message to one queue.
    pub(crate) fn enqueue(&mut self, id: QueueId, message: &Rc<Message>, now: Instant) -> Enqueued {
        let Some(queue) = self.queues.get_mut(id.slot as usize).filter(|q| q.id == id) else {
            return Enqueued::Taken;
        };
        if queue.features.overflow != Overflow::DropHead {
            if queue.is_full(message.body().len()) {
                if queue.features.overflow == Overflow::RejectPublishDlx {
                    let (queue, features) = (queue.name.clone(), &queue.features);
                    if let Some(exchange) = features.dead_letter_exchange.clone() {
                        let key = features.dead_letter_key.clone();
                        let entry = Entry::unplaced(message.clone());
                        let reason = Reason::MaxLen;
                        self.dead.push_back(Dead {
                            entry,
                            queue,
                            exchange,
                            key,
                            reason,
                        });
                    }
                }
                return Enqueued::Rejected;
            }
            self.urgent = true;
        }
        let sequence = queue.push(message.clone(), now);
        if queue.durable && message.persistent {
            self.store
                .append(Stored::new(&queue.name, sequence, message));
        }
        touch(&mut self.dirty, queue);
        Enqueued::Taken
    }

    /// An unsettled entry was acknowledged.
    pub(crate) fn acked(&mut self, id: QueueId, entry: Entry) {
        // A queue that was deleted meanwhile took its messages with it.
        if let Some(queue) = self.queues.get_mut(id.slot as usize).filter(|q| q.id == id) {
            queue.unsettled -= 1;
            settle(self.store.as_mut(), queue, &entry);
        }
    }

    /// An unsettled entry comes back, or dies of coming back too often.
    pub(crate) fn requeue(&mut self, id: QueueId, entry: Entry) {
        let Some(queue) = self.queues.get_mut(id.slot as usize).filter(|q| q.id == id) else {
            return;
        };
        queue.unsettled -= 1;
        if queue
            .features
            .delivery_limit
            .is_some_and(|most| entry.returns >= most)
        {
            self.bury(id, entry, Reason::DeliveryLimit);
            return;
        }
        queue.restore(entry);
        touch(&mut self.dirty, queue);
    }

    /// An unsettled entry was refused for good.
    pub(crate) fn rejected(&mut self, id: QueueId, entry: Entry) {
        if let Some(queue) = self.queue_mut(id) {
            queue.unsettled -= 1;
            self.bury(id, entry, Reason::Rejected);
        }
    }

    /// An entry leaves its queue without having been acknowledged.
    fn bury(&mut self, id: QueueId, entry: Entry, reason: Reason) {
        let Some(queue) = self.queues.get_mut(id.slot as usize).filter(|q| q.id == id) else {
            return;
        };
        settle(self.store.as_mut(), queue, &entry);
        if let Some(exchange) = queue.features.dead_letter_exchange.clone() {
            self.dead.push_back(Dead {
                entry,
                queue: queue.name.clone(),
                exchange,
                key: queue.features.dead_letter_key.clone(),
                reason,
            });
        }
    }

    /// Buries what is at the head of the queue and `is_due`.
    pub(crate) fn expire(&mut self, id: QueueId, is_due: impl Fn(Instant) -> bool) {
        while let Some(entry) = self.queue_mut(id).and_then(|q| q.pop_expired(&is_due)) {
            self.bury(id, entry, Reason::Expired);
        }
    }

    /// Drops from the head what the queue may not hold.
    pub(crate) fn shorten(&mut self, id: QueueId) {
        while let Some(entry) = self.queue_mut(id).and_then(Queue::pop_overflow) {
            self.bury(id, entry, Reason::MaxLen);
        }
    }

    /// Publishes everything that died to its dead letter exchange. `wall` is the time of day, seconds since 1970.
    /// `false` if nothing did.
    pub(crate) fn publish_dead(&mut self, now: Instant, wall: u64) -> bool {
        let any = !self.dead.is_empty();
        while let Some(dead) = self.dead.pop_front() {
            let letter = deadletter::write(
                &dead.entry.message,
                &dead.queue,
                dead.key.as_ref(),
                dead.reason,
                wall,
            );
            // The exchange may not exist; then the message is dropped.
            let keys: Vec<&str> = letter.keys.iter().map(AsRef::as_ref).collect();
            let route = self.route(&dead.exchange, &keys, letter.props.as_props().headers());
            let targets: Vec<QueueId> = route
                .queues
                .iter()
                .copied()
                .filter(|&id| {
                    // Going round without anyone having rejected it would never end.
                    dead.reason == Reason::Rejected
                        || !self
                            .queue(id)
                            .is_some_and(|q| deadletter::is_cycle(&letter, &q.name))
                })
                .collect();
            if targets.is_empty() {
                continue;
            }
            let message =
                Rc::new(letter.into_message(&dead.entry.message, dead.exchange, &self.memory));
            for id in targets {
                self.enqueue(id, &message, now);
            }
        }
        any
    }

    /// Whether a session in confirm mode may be told that what it has published is safe.
    pub(crate) fn mark(&mut self) -> Mark {
        self.store.mark()
    }

    /// See [`Store::safe`].
    pub(crate) fn safe(&self) -> Mark {
        self.store.safe()
    }

    // ---- time ----

    /// Puts a queue on the list of those to be looked at.
    pub(crate) fn touch(&mut self, id: QueueId) {
        if let Some(queue) = self.queues.get_mut(id.slot as usize).filter(|q| q.id == id) {
            queue.starved = false;
            touch(&mut self.dirty, queue);
        }
    }

    /// Sets the queue's alarm to when it next has to be looked at.
    pub(crate) fn rearm(&mut self, id: QueueId) {
        let Some(queue) = self.queues.get_mut(id.slot as usize).filter(|q| q.id == id) else {
            return;
        };
        let wanted = queue.deadline();
        if wanted == queue.alarm {
            return;
        }
        if let Some(old) = queue.alarm {
            self.alarms.remove(&(old, id));
        }
        queue.alarm = wanted;
        self.alarms.extend(wanted.map(|at| (at, id)));
    }

    /// The earliest alarm.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.alarms.first().map(|&(at, _)| at)
    }

    /// Deletes queues nobody has used for `x-expires`, and lists those whose first message is due.
    pub(crate) fn tick(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.alarms.first() {
            if at > now {
                break;
            }
            self.alarms.pop_first();
            let Some(queue) = self.queue_mut(id) else {
                continue;
            };
            queue.alarm = None;
            if queue.expiry().is_some_and(|at| at <= now) {
                self.remove_queue(id);
            } else {
                // Its alarm is set again when it has been looked at.
                self.touch(id);
            }
        }
    }

    // ---- names and texts ----

    fn serial(&mut self) -> u32 {
        self.next_serial = self.next_serial.wrapping_add(1);
        self.next_serial
    }

    /// `prefix` and 22 characters nobody can guess, as RabbitMQ makes them: 16 bytes in url-safe base64.
    pub(crate) fn make_name(&mut self, prefix: &str) -> Rc<str> {
        const DIGITS: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        loop {
            self.names_made += 1;
            let half = |n: u8| u128::from(self.random.hash_one((self.names_made, n)));
            let bits = half(0) << 64 | half(1);
            let mut name = String::with_capacity(prefix.len() + 22);
            name.push_str(prefix);
            name.extend(
                (0..22)
                    .rev()
                    .map(|n| char::from(DIGITS[(bits >> (6 * n)) as usize & 63])),
            );
            if !self.queue_names.contains_key(name.as_str()) {
                return name.into();
            }
        }
    }

    pub(crate) fn queue_called(&self, name: &str) -> String {
        format!("queue '{name}' in vhost '{}'", self.name)
    }

    pub(crate) fn exchange_called(&self, name: &str) -> String {
        format!("exchange '{name}' in vhost '{}'", self.name)
    }

    fn limit_reached(&self, what: &str, kind: &str, most: usize) -> Fault {
        let vhost = &self.name;
        Fault::precondition(format_args!(
            "cannot declare {what}: {kind} limit in vhost '{vhost}' ({most}) is reached"
        ))
    }
}

/// Most bytes of arguments that a binding may have; they are kept for as long as it lives.
const BINDING_ARGUMENTS_MAX: usize = 4096;

fn exchange_mut(exchanges: &mut Slab<Exchange>, id: ExchangeId) -> Option<&mut Exchange> {
    exchanges.get_mut(id.slot as usize).filter(|x| x.id == id)
}

fn touch(dirty: &mut VecDeque<QueueId>, queue: &mut Queue) {
    if !queue.dirty {
        queue.dirty = true;
        dirty.push_back(queue.id);
    }
}

fn settle(store: &mut dyn Store, queue: &Queue, entry: &Entry) {
    if queue.durable && entry.message.persistent {
        store.settle(&queue.name, entry.sequence);
    }
}

fn not_default(exchange: &str) -> Result<(), Fault> {
    if exchange.is_empty() {
        return Err(Fault::access_refused(
            "operation not permitted on the default exchange",
        ));
    }
    Ok(())
}

/// An argument that names an exchange.
fn exchange_argument<'a>(
    name: &str,
    what: &str,
    arguments: Table<'a>,
) -> Result<Option<&'a str>, Fault> {
    let Some(value) = arguments.get(name) else {
        return Ok(None);
    };
    value.as_str().map(Some).ok_or_else(|| {
        let found = type_name(&value);
        Fault::precondition(format_args!(
            "invalid type '{found}' for arg '{name}' in {what}"
        ))
    })
}

fn reserved(kind: &str, name: &str) -> Fault {
    Fault::access_refused(format_args!(
        "{kind} name '{name}' contains reserved prefix 'amq.*'"
    ))
}

fn locked(what: &str) -> Fault {
    Fault::resource_locked(format_args!(
        "cannot obtain exclusive access to locked {what}. It could be originally declared on another connection or the \
         exclusive property value does not match that of the original declaration."
    ))
}

fn equivalent<T: PartialEq + std::fmt::Display>(
    field: &str,
    what: &str,
    received: &T,
    current: &T,
) -> Result<(), Fault> {
    if received == current {
        return Ok(());
    }
    Err(Fault::precondition(format_args!(
        "inequivalent arg '{field}' for {what}: received '{received}' but current is '{current}'"
    )))
}

/// Compares an argument as RabbitMQ does: integers by value whatever their width.
fn equivalent_argument(
    name: &str,
    what: &str,
    received: Option<Value<'_>>,
    current: Option<Value<'_>>,
) -> Result<(), Fault> {
    let text = |value: &Value<'_>| match (value.as_str(), value.as_int(), value.as_bool()) {
        (Some(text), _, _) => text.to_owned(),
        (_, Some(number), _) => number.to_string(),
        (_, _, Some(flag)) => flag.to_string(),
        _ => "?".to_owned(),
    };
    let typed = |value: Option<Value<'_>>| match value {
        None => "none".to_owned(),
        Some(value) => format!(
            "the value '{}' of type '{}'",
            text(&value),
            type_name(&value)
        ),
    };
    let (received, current) = match (received, current) {
        (None, None) => return Ok(()),
        (Some(a), Some(b)) if a == b || (a.as_int().is_some() && a.as_int() == b.as_int()) => {
            return Ok(());
        }
        (Some(a), Some(b)) => (format!("'{}'", text(&a)), format!("'{}'", text(&b))),
        (a, b) => (typed(a), typed(b)),
    };
    Err(Fault::precondition(format_args!(
        "inequivalent arg '{name}' for {what}: received {received} but current is {current}"
    )))
}
