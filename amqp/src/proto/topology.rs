//! What a connection relies on, written down so that it can be made again after the connection was lost.
//!
//! One journal for the whole connection, not one a channel: a queue declared on channel 1 has to be there before the consumer
//! on channel 2. The order is: exchanges, bindings between exchanges, queues ([`Journal::plan`]); then, by the names the
//! queues have now, their bindings, and for each channel its prefetch, its confirm mode and its consumers
//! ([`Journal::plan_of_names`]). What has been deleted is struck out, and is not made again; what was declared passively was
//! never ours.

use crate::wire::cold::{basic, exchange, queue};

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
    consumers: Vec<basic::Consume>,
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
    /// Set the prefetch; always before the channel's consumers.
    Qos(ChannelTag, basic::Qos),
    /// Put a channel into confirm mode.
    Confirms(ChannelTag),
    /// Start a consumer.
    Consume(ChannelTag, basic::Consume),
}

impl Journal {
    /// An exchange has been declared.
    pub fn declared_exchange(&mut self, declare: exchange::Declare) {
        if declare.passive {
            return;
        }
        self.exchanges.retain(|e| e.exchange != declare.exchange);
        self.exchanges.push(declare);
    }

    /// An exchange has been deleted, and with it its bindings.
    pub fn deleted_exchange(&mut self, name: &str) {
        self.exchanges.retain(|e| e.exchange.as_str() != name);
        self.exchange_bindings
            .retain(|b| b.source.as_str() != name && b.destination.as_str() != name);
        self.queue_bindings.retain(|b| b.exchange.as_str() != name);
    }

    /// An exchange has been bound to another.
    pub fn bound_exchange(&mut self, bind: exchange::Bind) {
        if !self.exchange_bindings.contains(&bind) {
            self.exchange_bindings.push(bind);
        }
    }

    /// A binding between exchanges has been removed.
    pub fn unbound_exchange(&mut self, unbind: &exchange::Unbind) {
        self.exchange_bindings.retain(|b| {
            (&b.destination, &b.source, &b.routing_key, &b.arguments)
                != (
                    &unbind.destination,
                    &unbind.source,
                    &unbind.routing_key,
                    &unbind.arguments,
                )
        });
    }

    /// A queue has been declared; `name` is what the server answered.
    pub fn declared_queue(&mut self, declare: queue::Declare, name: &str) {
        if declare.passive {
            return;
        }
        self.queues.retain(|q| q.name != name);
        let name = name.to_owned();
        self.queues.push(Queue { declare, name });
    }

    /// A queue has been deleted, by us or as the broker tells, and with it its bindings and consumers.
    pub fn deleted_queue(&mut self, name: &str) {
        self.queues.retain(|q| q.name != name);
        self.queue_bindings.retain(|b| b.queue.as_str() != name);
        for channel in &mut self.channels {
            channel.consumers.retain(|c| c.queue.as_str() != name);
        }
    }

    /// A queue has been bound.
    pub fn bound_queue(&mut self, bind: queue::Bind) {
        if !self.queue_bindings.contains(&bind) {
            self.queue_bindings.push(bind);
        }
    }

    /// A binding of a queue has been removed.
    pub fn unbound_queue(&mut self, unbind: &queue::Unbind) {
        self.queue_bindings.retain(|b| {
            (&b.queue, &b.exchange, &b.routing_key, &b.arguments)
                != (
                    &unbind.queue,
                    &unbind.exchange,
                    &unbind.routing_key,
                    &unbind.arguments,
                )
        });
    }

    /// The prefetch of a channel has been set.
    pub fn set_qos(&mut self, channel: ChannelTag, qos: basic::Qos) {
        self.channel(channel).qos = Some(qos);
    }

    /// A channel has been put into confirm mode.
    pub fn confirms(&mut self, channel: ChannelTag) {
        self.channel(channel).confirms = true;
    }

    /// A consumer has been started.
    pub fn consumes(&mut self, channel: ChannelTag, consume: basic::Consume) {
        let consumers = &mut self.channel(channel).consumers;
        consumers.retain(|c| c.consumer_tag != consume.consumer_tag);
        consumers.push(consume);
    }

    /// A consumer has ended. A queue that deletes itself after its last one has to be reported apart.
    pub fn cancelled(&mut self, channel: ChannelTag, consumer_tag: &str) {
        self.channel(channel)
            .consumers
            .retain(|c| c.consumer_tag.as_str() != consumer_tag);
    }

    /// A channel has been closed.
    pub fn closed_channel(&mut self, channel: ChannelTag) {
        self.channels.retain(|c| c.tag != channel);
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
        for consume in self.channels.iter_mut().flat_map(|c| &mut c.consumers) {
            if consume.queue.as_str() == old {
                consume.queue = short.clone();
            }
        }
    }

    /// What has to be there before anything that names a queue: exchanges, bindings between them, queues.
    pub fn plan(&self) -> Vec<Step> {
        let exchanges = self.exchanges.iter().cloned().map(Step::Exchange);
        let bindings = self.exchange_bindings.iter().cloned();
        let queues = self.queues.iter().cloned();
        exchanges
            .chain(bindings.map(Step::ExchangeBinding))
            .chain(queues.map(|Queue { declare, name }| Step::Queue { declare, name }))
            .collect()
    }

    /// The rest, by the names the queues have now: bindings, then channel by channel prefetch, confirm mode, consumers.
    pub fn plan_of_names(&self) -> Vec<Step> {
        let mut steps: Vec<_> = self
            .queue_bindings
            .iter()
            .cloned()
            .map(Step::QueueBinding)
            .collect();
        for channel in &self.channels {
            let tag = channel.tag;
            steps.extend(channel.qos.clone().map(|qos| Step::Qos(tag, qos)));
            steps.extend(channel.confirms.then_some(Step::Confirms(tag)));
            let consumers = channel.consumers.iter().cloned();
            steps.extend(consumers.map(|consume| Step::Consume(tag, consume)));
        }
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
                    consumers: Vec::new(),
                });
                self.channels.len() - 1
            }
        };
        &mut self.channels[index]
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

    const QOS: basic::Qos = basic::Qos {
        prefetch_count: 5,
        global: false,
    };

    fn all(journal: &Journal) -> Vec<Step> {
        [journal.plan(), journal.plan_of_names()].concat()
    }

    #[test]
    fn the_plan_is_in_order_across_channels_whatever_the_order_of_the_calls() {
        let mut journal = Journal::default();
        journal.consumes(2, consume("q", "t"));
        journal.confirms(2);
        journal.set_qos(2, QOS);
        journal.bound_queue(bind("q", "x"));
        journal.declared_queue(queue("q"), "q");
        let e2e = exchange::Bind {
            destination: "x".into(),
            source: "y".into(),
            routing_key: "k".into(),
            nowait: false,
            arguments: Default::default(),
        };
        journal.bound_exchange(e2e.clone());
        journal.declared_exchange(exchange("y"));
        journal.declared_exchange(exchange("x"));
        // Declaring and binding again is done once.
        journal.declared_queue(queue("q"), "q");
        journal.bound_queue(bind("q", "x"));
        let name = "q".to_owned();
        assert_eq!(
            all(&journal),
            [
                Step::Exchange(exchange("y")),
                Step::Exchange(exchange("x")),
                Step::ExchangeBinding(e2e),
                Step::Queue {
                    declare: queue("q"),
                    name
                },
                Step::QueueBinding(bind("q", "x")),
                Step::Qos(2, QOS),
                Step::Confirms(2),
                Step::Consume(2, consume("q", "t")),
            ]
        );
    }

    #[test]
    fn what_was_deleted_or_only_looked_at_is_not_in_the_plan() {
        let mut journal = Journal::default();
        journal.declared_exchange(exchange("x"));
        journal.declared_queue(queue("q"), "q");
        journal.bound_queue(bind("q", "x"));
        journal.consumes(1, consume("q", "t"));
        journal.declared_queue(queue("r"), "r");
        journal.bound_queue(bind("r", "x"));
        journal.consumes(1, consume("r", "u"));
        journal.deleted_queue("q");
        journal.deleted_exchange("x");
        journal.cancelled(1, "u");
        let mut passive = queue("p");
        passive.passive = true;
        journal.declared_queue(passive, "p");
        let name = "r".to_owned();
        assert_eq!(
            all(&journal),
            [Step::Queue {
                declare: queue("r"),
                name
            }]
        );
        journal.closed_channel(1);
        assert!(journal.channels.is_empty());
    }

    #[test]
    fn a_queue_the_server_names_is_declared_without_a_name_and_followed_to_the_new_one() {
        let mut journal = Journal::default();
        journal.declared_queue(queue(""), "amq.gen-1");
        journal.bound_queue(bind("amq.gen-1", "x"));
        journal.consumes(1, consume("amq.gen-1", "t"));
        let [Step::Queue { declare, name }] = &journal.plan()[..] else {
            panic!("one queue")
        };
        assert_eq!((declare.queue.as_str(), name.as_str()), ("", "amq.gen-1"));
        journal.renamed("amq.gen-1", "amq.gen-2");
        assert_eq!(
            journal.plan_of_names(),
            [
                Step::QueueBinding(bind("amq.gen-2", "x")),
                Step::Consume(1, consume("amq.gen-2", "t")),
            ]
        );
    }
}
