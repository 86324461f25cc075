//! What a connection relies on, written down so that it can be made again after the connection was lost.
//!
//! One journal for the whole connection, not one a channel: a queue declared on channel 1 has to be there before the consumer
//! on channel 2. The order is: exchanges, bindings between exchanges, queues ([`Journal::plan`]); then, by the names the
//! queues have now, their bindings ([`Journal::plan_of_bindings`]); then, for each channel, its prefetch, its confirm mode and its
//! consumers, each after the prefetch it was started with ([`Journal::plan_of_channel`]).
//!
//! What has been deleted is struck out and is not made again, and so is what the broker deletes by itself: a queue with `auto_delete` after its last
//! consumer, an exchange after its last binding. What was declared passively was never ours.

use std::collections::BTreeSet;
use std::fmt;

use crate::wire::cold::{Method, basic, confirm, exchange, queue, tx};

/// The channel something belongs to, as the client numbers them; unlike AMQP's numbers these outlive a connection.
pub type ChannelTag = u32;

/// What has been made and not unmade.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    exchanges: Vec<exchange::Declare>,
    exchange_bindings: Vec<exchange::Bind>,
    queues: Vec<Queue>,
    queue_bindings: Vec<queue::Bind>,
    channels: Vec<Channel>,
    /// Queues that the broker has been asked to delete. Whether it has may never be known; they are not made again.
    doomed: BTreeSet<String>,
}

#[derive(Clone, Debug)]
struct Queue {
    declare: queue::Declare,
    /// The name it has now. Differs from the declared one, which is empty, if the server chose it.
    name: String,
}

#[derive(Clone, Debug)]
struct Channel {
    tag: ChannelTag,
    qos: Option<basic::Qos>,
    confirms: bool,
    is_transactional: bool,
    consumers: Vec<Consumer>,
    /// What an empty queue name means.
    last_queue: String,
}

#[derive(Clone, Debug)]
struct Consumer {
    consume: basic::Consume,
    /// What the channel's prefetch was when it was started.
    qos: Option<basic::Qos>,
}

/// One thing to be done again.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Declare an exchange.
    Exchange(exchange::Declare),
    /// Bind an exchange to another.
    ExchangeBinding(exchange::Bind),
    /// Declare a queue. If the server chooses its name, [`Journal::renamed`] is to be told of the new one before the steps
    /// that follow are asked for.
    Queue {
        /// As it was declared.
        declare: queue::Declare,
        /// The name it had.
        name: String,
    },
    /// Bind a queue.
    QueueBinding(queue::Bind),
    /// Set the prefetch.
    Qos(basic::Qos),
    /// Put a channel into confirm mode.
    Confirms,
    /// Start a consumer.
    Consume(basic::Consume),
}

impl Journal {
    /// A request has been answered: notes what that means. Consumers have functions of their own.
    pub fn answered(&mut self, channel: ChannelTag, request: Method, answer: &Method) {
        use exchange::AMQPMethod as Exchange;
        use queue::AMQPMethod as Queue;
        match request {
            Method::Exchange(Exchange::Declare(declare)) => self.declared_exchange(declare),
            Method::Exchange(Exchange::Delete(delete)) => {
                self.deleted_exchange(delete.exchange.as_str());
            }
            Method::Exchange(Exchange::Bind(bind)) => self.bound_exchange(bind),
            Method::Exchange(Exchange::Unbind(unbind)) => self.unbound_exchange(&unbind),
            Method::Queue(Queue::Declare(declare)) => {
                if let Method::Queue(Queue::DeclareOk(ok)) = answer {
                    ok.queue
                        .as_str()
                        .clone_into(&mut self.channel(channel).last_queue);
                    self.declared_queue(declare, ok.queue.as_str());
                }
            }
            Method::Queue(Queue::Delete(mut delete)) => {
                self.name_queue(channel, &mut delete.queue);
                self.deleted_queue(delete.queue.as_str());
            }
            Method::Queue(Queue::Bind(mut bind)) => {
                self.name_queue(channel, &mut bind.queue);
                self.bound_queue(bind);
            }
            Method::Queue(Queue::Unbind(mut unbind)) => {
                self.name_queue(channel, &mut unbind.queue);
                self.unbound_queue(&unbind);
            }
            Method::Basic(basic::AMQPMethod::Qos(qos)) => self.set_qos(channel, qos),
            Method::Confirm(confirm::AMQPMethod::Select(_)) => {
                self.channel(channel).confirms = true;
            }
            Method::Tx(tx::AMQPMethod::Select(_)) => {
                self.channel(channel).is_transactional = true;
            }
            _ => {}
        }
    }

    /// Puts the name that is meant by none.
    fn name_queue(&mut self, channel: ChannelTag, name: &mut crate::wire::cold::ShortString) {
        if name.as_str().is_empty()
            && let Ok(last) = crate::wire::cold::short("queue", &self.channel(channel).last_queue)
        {
            *name = last;
        }
    }

    fn declared_exchange(&mut self, declare: exchange::Declare) {
        if declare.passive {
            return;
        }
        self.exchanges.retain(|e| e.exchange != declare.exchange);
        self.exchanges.push(declare);
    }

    /// An exchange is gone, and with it its bindings.
    pub fn deleted_exchange(&mut self, name: &str) {
        self.exchanges.retain(|e| e.exchange.as_str() != name);
        self.queue_bindings.retain(|b| b.exchange.as_str() != name);
        let sources = self
            .exchange_bindings
            .extract_if(.., |b| {
                b.source.as_str() == name || b.destination.as_str() == name
            })
            .map(|b| b.source.to_string())
            .collect();
        self.lost_bindings(sources);
    }

    fn bound_exchange(&mut self, bind: exchange::Bind) {
        if !self.exchange_bindings.contains(&bind) {
            self.exchange_bindings.push(bind);
        }
    }

    fn unbound_exchange(&mut self, unbind: &exchange::Unbind) {
        self.exchange_bindings.retain(|b| {
            (&b.destination, &b.source, &b.routing_key, &b.arguments)
                != (
                    &unbind.destination,
                    &unbind.source,
                    &unbind.routing_key,
                    &unbind.arguments,
                )
        });
        self.lost_bindings(vec![unbind.source.to_string()]);
    }

    /// A queue has been declared; `name` is what the server answered.
    fn declared_queue(&mut self, declare: queue::Declare, name: &str) {
        self.doomed.remove(name);
        if declare.passive {
            return;
        }
        self.queues.retain(|q| q.name != name);
        let name = name.to_owned();
        self.queues.push(Queue { declare, name });
    }

    /// The broker is asked to delete a queue: from now on, it is not made again, whatever becomes of the question.
    pub fn dooms_queue(&mut self, name: &str) {
        self.doomed.insert(name.to_owned());
    }

    /// The broker has refused to delete a queue.
    pub fn spared_queue(&mut self, name: &str) {
        self.doomed.remove(name);
    }

    /// A queue is gone, and with it its bindings and consumers.
    pub fn deleted_queue(&mut self, name: &str) {
        self.doomed.remove(name);
        self.queues.retain(|q| q.name != name);
        for channel in &mut self.channels {
            channel
                .consumers
                .retain(|c| c.consume.queue.as_str() != name);
        }
        let exchanges = self
            .queue_bindings
            .extract_if(.., |b| b.queue.as_str() == name)
            .map(|b| b.exchange.to_string())
            .collect();
        self.lost_bindings(exchanges);
    }

    fn bound_queue(&mut self, bind: queue::Bind) {
        if !self.queue_bindings.contains(&bind) {
            self.queue_bindings.push(bind);
        }
    }

    fn unbound_queue(&mut self, unbind: &queue::Unbind) {
        self.queue_bindings.retain(|b| {
            (&b.queue, &b.exchange, &b.routing_key, &b.arguments)
                != (
                    &unbind.queue,
                    &unbind.exchange,
                    &unbind.routing_key,
                    &unbind.arguments,
                )
        });
        self.lost_bindings(vec![unbind.exchange.to_string()]);
    }

    /// Some exchanges have fewer bindings: without any, one with `auto_delete` goes.
    fn lost_bindings(&mut self, exchanges: Vec<String>) {
        for name in exchanges {
            let is_bound = self
                .queue_bindings
                .iter()
                .any(|b| b.exchange.as_str() == name)
                || self
                    .exchange_bindings
                    .iter()
                    .any(|b| b.source.as_str() == name);
            let deletes = |e: &exchange::Declare| e.auto_delete && e.exchange.as_str() == name;
            if !is_bound && self.exchanges.iter().any(deletes) {
                self.deleted_exchange(&name);
            }
        }
    }

    fn set_qos(&mut self, channel: ChannelTag, qos: basic::Qos) {
        self.channel(channel).qos = Some(qos);
    }

    /// A consumer has been started, after the prefetch was set if one is given.
    pub fn consumes(
        &mut self,
        channel: ChannelTag,
        mut consume: basic::Consume,
        qos: Option<basic::Qos>,
    ) {
        self.name_queue(channel, &mut consume.queue);
        let channel = self.channel(channel);
        if qos.is_some() {
            channel.qos = qos;
        }
        let qos = channel.qos.clone();
        channel
            .consumers
            .retain(|c| c.consume.consumer_tag != consume.consumer_tag);
        channel.consumers.push(Consumer { consume, qos });
    }

    /// A consumer has ended, and perhaps its queue.
    pub fn cancelled(&mut self, channel: ChannelTag, consumer_tag: &str) {
        let channel = self.channels.iter_mut().find(|c| c.tag == channel);
        let Some(channel) = channel else { return };
        let ended = channel
            .consumers
            .extract_if(.., |c| c.consume.consumer_tag.as_str() == consumer_tag)
            .map(|c| c.consume.queue.to_string())
            .collect();
        self.lost_consumers(ended);
    }

    /// A channel has been closed, with its consumers.
    pub fn closed_channel(&mut self, channel: ChannelTag) {
        let consumers = self
            .channels
            .extract_if(.., |c| c.tag == channel)
            .flat_map(|c| c.consumers);
        let ended = consumers.map(|c| c.consume.queue.to_string()).collect();
        self.lost_consumers(ended);
    }

    /// Some queues have fewer consumers: without any, one with `auto_delete` goes.
    fn lost_consumers(&mut self, queues: Vec<String>) {
        for name in queues {
            let mut consumers = self.channels.iter().flat_map(|c| &c.consumers);
            let is_consumed = consumers.any(|c| c.consume.queue.as_str() == name);
            let deletes = |q: &Queue| q.declare.auto_delete && q.name == name;
            if !is_consumed && self.queues.iter().any(deletes) {
                self.deleted_queue(&name);
            }
        }
    }

    /// Whether a consumer is still wanted, and its queue has not been given up.
    pub fn wants_consumer(&self, channel: ChannelTag, consumer_tag: &str) -> bool {
        let channel = self.channels.iter().filter(|c| c.tag == channel);
        channel.flat_map(|c| &c.consumers).any(|c| {
            c.consume.consumer_tag.as_str() == consumer_tag
                && !self.doomed.contains(c.consume.queue.as_str())
        })
    }

    /// Whether a channel is in the middle of a transaction, which cannot be made again.
    pub fn is_transactional(&self, channel: ChannelTag) -> bool {
        let mut channels = self.channels.iter();
        channels.any(|c| c.tag == channel && c.is_transactional)
    }

    /// The server has given a queue another name: all that speaks of the old one follows.
    pub fn renamed(&mut self, old: &str, new: &str) {
        let Ok(short) = crate::wire::cold::short("queue", new) else {
            return; // it came from the wire, where there are no longer ones
        };
        for queue in self.queues.iter_mut().filter(|q| q.name == old) {
            new.clone_into(&mut queue.name);
        }
        for bind in &mut self.queue_bindings {
            if bind.queue.as_str() == old {
                bind.queue = short.clone();
            }
        }
        for channel in &mut self.channels {
            if channel.last_queue == old {
                new.clone_into(&mut channel.last_queue);
            }
            for Consumer { consume, .. } in &mut channel.consumers {
                if consume.queue.as_str() == old {
                    consume.queue = short.clone();
                }
            }
        }
    }

    /// What has to be there before anything that names a queue: exchanges, bindings between them, queues.
    pub fn plan(&self) -> Vec<Step> {
        let exchanges = self.exchanges.iter().cloned().map(Step::Exchange);
        let bindings = self.exchange_bindings.iter().cloned();
        let queues = self
            .queues
            .iter()
            .filter(|q| !self.doomed.contains(&q.name));
        exchanges
            .chain(bindings.map(Step::ExchangeBinding))
            .chain(queues.map(Queue::step))
            .collect()
    }

    /// Bindings of queues, by the names these have now.
    pub fn plan_of_bindings(&self) -> Vec<Step> {
        let bindings = self.queue_bindings.iter();
        bindings
            .filter(|b| !self.doomed.contains(b.queue.as_str()))
            .cloned()
            .map(Step::QueueBinding)
            .collect()
    }

    /// One queue, if it is ours. Its bindings follow, by the name it then has: [`Journal::plan_of_bindings`].
    pub fn plan_of_queue(&self, name: &str) -> Option<Step> {
        self.queues.iter().find(|q| q.name == name).map(Queue::step)
    }

    /// What a channel had, in the order it had it: prefetch, confirm mode, consumers, each after its prefetch.
    pub fn plan_of_channel(&self, tag: ChannelTag) -> Vec<Step> {
        let Some(channel) = self.channels.iter().find(|c| c.tag == tag) else {
            return Vec::new();
        };
        let mut steps = Vec::new();
        let mut set = None;
        let mut set_qos = |steps: &mut Vec<_>, qos: &Option<basic::Qos>| {
            if let Some(qos) = qos
                && set.replace(qos.clone()).as_ref() != Some(qos)
            {
                steps.push(Step::Qos(qos.clone()));
            }
        };
        let first = channel.consumers.first();
        set_qos(&mut steps, first.map_or(&channel.qos, |c| &c.qos));
        steps.extend(channel.confirms.then_some(Step::Confirms));
        for consumer in &channel.consumers {
            if !self.doomed.contains(consumer.consume.queue.as_str()) {
                set_qos(&mut steps, &consumer.qos);
                steps.push(Step::Consume(consumer.consume.clone()));
            }
        }
        set_qos(&mut steps, &channel.qos);
        steps
    }

    /// One consumer: its prefetch, itself, and the prefetch that its channel has.
    pub fn plan_of_consumer(&self, tag: ChannelTag, consumer_tag: &str) -> Vec<Step> {
        let Some(channel) = self.channels.iter().find(|c| c.tag == tag) else {
            return Vec::new();
        };
        let mut consumers = channel.consumers.iter();
        let found = consumers.find(|c| c.consume.consumer_tag.as_str() == consumer_tag);
        let Some(Consumer { consume, qos }) = found else {
            return Vec::new();
        };
        let differs = |other: &&basic::Qos| Some(*other) != qos.as_ref();
        let mut steps: Vec<_> = qos.clone().map(Step::Qos).into_iter().collect();
        steps.push(Step::Consume(consume.clone()));
        steps.extend(channel.qos.as_ref().filter(differs).cloned().map(Step::Qos));
        steps
    }

    fn channel(&mut self, tag: ChannelTag) -> &mut Channel {
        let index = match self.channels.iter().position(|c| c.tag == tag) {
            Some(index) => index,
            None => {
                self.channels.push(Channel {
                    tag,
                    qos: None,
                    confirms: false,
                    is_transactional: false,
                    consumers: Vec::new(),
                    last_queue: String::new(),
                });
                self.channels.len() - 1
            }
        };
        &mut self.channels[index]
    }
}

impl Step {
    /// Whether it starts a consumer.
    pub fn is_consume(&self) -> bool {
        matches!(self, Self::Consume(_))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exchange(declare) => write!(f, "exchange {:?}", declare.exchange.as_str()),
            Self::ExchangeBinding(bind) => write!(
                f,
                "binding of exchange {:?} to {:?}",
                bind.destination.as_str(),
                bind.source.as_str()
            ),
            Self::Queue { name, .. } => write!(f, "queue {name:?}"),
            Self::QueueBinding(bind) => write!(
                f,
                "binding of queue {:?} to {:?}",
                bind.queue.as_str(),
                bind.exchange.as_str()
            ),
            Self::Qos(qos) => write!(f, "prefetch of {}", qos.prefetch_count),
            Self::Confirms => f.write_str("confirm mode"),
            Self::Consume(consume) => write!(
                f,
                "consumer {:?} of queue {:?}",
                consume.consumer_tag.as_str(),
                consume.queue.as_str()
            ),
        }
    }
}

impl Queue {
    fn step(&self) -> Step {
        Step::Queue {
            declare: self.declare.clone(),
            name: self.name.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(name: &str) -> exchange::Declare {
        exchange::Declare {
            exchange: name.into(),
            kind: "direct".into(),
            passive: false,
            durable: true,
            auto_delete: false,
            internal: false,
            nowait: false,
            arguments: Default::default(),
        }
    }

    fn queue(name: &str) -> queue::Declare {
        queue::Declare {
            queue: name.into(),
            passive: false,
            durable: false,
            exclusive: true,
            auto_delete: false,
            nowait: false,
            arguments: Default::default(),
        }
    }

    fn bind(queue: &str, exchange: &str) -> queue::Bind {
        queue::Bind {
            queue: queue.into(),
            exchange: exchange.into(),
            routing_key: "k".into(),
            nowait: false,
            arguments: Default::default(),
        }
    }

    fn consume(queue: &str, tag: &str) -> basic::Consume {
        basic::Consume {
            queue: queue.into(),
            consumer_tag: tag.into(),
            no_local: false,
            no_ack: false,
            exclusive: false,
            nowait: false,
            arguments: Default::default(),
        }
    }

    fn qos(prefetch_count: u16) -> basic::Qos {
        basic::Qos {
            prefetch_count,
            global: false,
        }
    }

    fn e2e(destination: &str, source: &str) -> exchange::Bind {
        exchange::Bind {
            destination: destination.into(),
            source: source.into(),
            routing_key: "k".into(),
            nowait: false,
            arguments: Default::default(),
        }
    }

    fn unbind(queue: &str, exchange: &str) -> queue::Unbind {
        queue::Unbind {
            queue: queue.into(),
            exchange: exchange.into(),
            routing_key: "k".into(),
            arguments: Default::default(),
        }
    }

    fn all(journal: &Journal) -> Vec<Step> {
        let channels = journal.channels.iter();
        let channels = channels.flat_map(|c| journal.plan_of_channel(c.tag));
        [
            journal.plan(),
            journal.plan_of_bindings(),
            channels.collect(),
        ]
        .concat()
    }

    fn queue_step(declare: queue::Declare) -> Step {
        let name = declare.queue.to_string();
        Step::Queue { declare, name }
    }

    fn declare_ok(name: &str) -> Method {
        Method::Queue(queue::AMQPMethod::DeclareOk(queue::DeclareOk {
            queue: name.into(),
            message_count: 0,
            consumer_count: 0,
        }))
    }

    /// Accepts: amqp/R5
    #[test]
    fn the_plan_is_in_order_across_channels_whatever_the_order_of_the_calls() {
        let mut journal = Journal::default();
        let select = confirm::AMQPMethod::Select(confirm::Select { nowait: false });
        let ok = Method::Confirm(confirm::AMQPMethod::SelectOk(confirm::SelectOk {}));
        journal.answered(2, Method::Confirm(select), &ok);
        journal.set_qos(2, qos(5));
        journal.consumes(2, consume("q", "t"), None);
        journal.bound_queue(bind("q", "x"));
        journal.declared_queue(queue("q"), "q");
        journal.bound_exchange(e2e("x", "y"));
        journal.declared_exchange(exchange("y"));
        journal.declared_exchange(exchange("x"));
        // Declaring and binding again is done once.
        journal.declared_queue(queue("q"), "q");
        journal.bound_queue(bind("q", "x"));
        assert_eq!(
            all(&journal),
            [
                Step::Exchange(exchange("y")),
                Step::Exchange(exchange("x")),
                Step::ExchangeBinding(e2e("x", "y")),
                queue_step(queue("q")),
                Step::QueueBinding(bind("q", "x")),
                Step::Qos(qos(5)),
                Step::Confirms,
                Step::Consume(consume("q", "t")),
            ]
        );
    }

    /// Accepts: amqp/R1
    #[test]
    fn every_consumer_is_started_with_the_prefetch_it_had() {
        let mut journal = Journal::default();
        journal.set_qos(1, qos(5));
        journal.consumes(1, consume("q", "a"), None);
        journal.consumes(1, consume("q", "b"), None);
        journal.set_qos(1, qos(7));
        journal.consumes(1, consume("q", "c"), None);
        journal.set_qos(1, qos(9));
        assert_eq!(
            journal.plan_of_channel(1),
            [
                Step::Qos(qos(5)),
                Step::Consume(consume("q", "a")),
                Step::Consume(consume("q", "b")),
                Step::Qos(qos(7)),
                Step::Consume(consume("q", "c")),
                Step::Qos(qos(9)),
            ]
        );
        assert_eq!(journal.plan_of_channel(2), []);
    }

    /// Accepts: amqp/R6
    #[test]
    fn what_was_deleted_or_only_looked_at_is_not_in_the_plan() {
        let mut journal = Journal::default();
        journal.declared_exchange(exchange("x"));
        journal.declared_queue(queue("q"), "q");
        journal.bound_queue(bind("q", "x"));
        journal.consumes(1, consume("q", "t"), None);
        journal.declared_queue(queue("r"), "r");
        journal.bound_queue(bind("r", "x"));
        journal.consumes(1, consume("r", "u"), None);
        journal.deleted_queue("q");
        journal.deleted_exchange("x");
        journal.cancelled(1, "u");
        let mut passive = queue("p");
        passive.passive = true;
        journal.declared_queue(passive, "p");
        assert_eq!(all(&journal), [queue_step(queue("r"))]);
        journal.closed_channel(1);
        assert!(journal.channels.is_empty());
    }

    /// Accepts: amqp/R6
    #[test]
    fn what_the_broker_deletes_by_itself_is_not_in_the_plan() {
        let mut journal = Journal::default();
        let mut fleeting = queue("q");
        fleeting.auto_delete = true;
        let short_lived = |name| exchange::Declare {
            auto_delete: true,
            ..exchange(name)
        };
        journal.declared_exchange(short_lived("x"));
        journal.declared_exchange(short_lived("y"));
        journal.declared_exchange(short_lived("never bound"));
        journal.bound_exchange(e2e("x", "y"));
        journal.declared_queue(fleeting.clone(), "q");
        journal.bound_queue(bind("q", "x"));
        journal.consumes(1, consume("q", "t"), None);
        journal.consumes(2, consume("q", "u"), None);
        journal.cancelled(1, "t");
        assert_eq!(all(&journal).len(), 7, "one consumer is left");
        // The last consumer takes the queue along, that the exchange, and that the one which is bound to it.
        journal.closed_channel(2);
        let left = Step::Exchange(short_lived("never bound"));
        assert_eq!(all(&journal), [left]);

        journal.declared_exchange(short_lived("x"));
        journal.declared_queue(fleeting.clone(), "q");
        journal.bound_queue(bind("q", "x"));
        journal.unbound_queue(&unbind("q", "x"));
        assert_eq!(all(&journal).len(), 2, "the queue never had a consumer");
    }

    /// Accepts: amqp/R6
    #[test]
    fn a_queue_that_is_being_deleted_is_not_in_the_plan_unless_the_broker_refuses() {
        let mut journal = Journal::default();
        journal.declared_queue(queue("q"), "q");
        journal.bound_queue(bind("q", "x"));
        journal.consumes(1, consume("q", "t"), None);
        assert!(journal.wants_consumer(1, "t"));
        journal.dooms_queue("q");
        assert_eq!(all(&journal), []);
        assert!(!journal.wants_consumer(1, "t"));
        journal.spared_queue("q");
        assert_eq!(all(&journal).len(), 3);
        journal.dooms_queue("q");
        journal.deleted_queue("q");
        assert!(journal.doomed.is_empty());
        journal.dooms_queue("q");
        journal.declared_queue(queue("q"), "q");
        assert_eq!(all(&journal), [queue_step(queue("q"))]);
    }

    /// Accepts: amqp/R2
    #[test]
    fn a_queue_the_server_names_is_declared_without_a_name_and_followed_to_the_new_one() {
        let mut journal = Journal::default();
        let declare = Method::Queue(queue::AMQPMethod::Declare(queue("")));
        journal.answered(1, declare, &declare_ok("amq.gen-1"));
        // An empty name is that of the queue that the channel declared last.
        let bound = Method::Queue(queue::AMQPMethod::Bind(bind("", "x")));
        let ok = Method::Queue(queue::AMQPMethod::BindOk(queue::BindOk {}));
        journal.answered(1, bound.clone(), &ok);
        journal.consumes(1, consume("", "t"), None);
        let [Step::Queue { declare, name }] = &journal.plan()[..] else {
            panic!("one queue")
        };
        assert_eq!((declare.queue.as_str(), name.as_str()), ("", "amq.gen-1"));
        journal.renamed("amq.gen-1", "amq.gen-2");
        assert_eq!(
            journal.plan_of_bindings(),
            [Step::QueueBinding(bind("amq.gen-2", "x"))]
        );
        assert_eq!(
            journal.plan_of_channel(1),
            [Step::Consume(consume("amq.gen-2", "t"))]
        );
        journal.answered(1, bound, &ok);
        assert_eq!(journal.plan_of_bindings().len(), 1);
        assert!(journal.plan_of_queue("amq.gen-1").is_none());
        assert!(journal.plan_of_queue("amq.gen-2").is_some());
    }
}
