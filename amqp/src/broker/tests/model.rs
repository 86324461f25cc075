//! Random histories against an oracle so simple that it must be right.
//!
//! The oracle keeps for each queue the set of messages that wait, and for each client what it holds. It does not predict who gets what: it
//! takes each delivery as given and checks that it was allowed, and at the end that nothing was lost or made up.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::rig::*;

const QUEUES: [&str; 3] = ["a", "b", "c"];
const CLIENTS: usize = 3;
const PREFETCH: [u16; CLIENTS] = [1, 3, 0];

#[derive(Clone, Debug)]
enum Step {
    /// To one queue through the default exchange, or to all through the fan-out.
    Publish {
        queue: Option<usize>,
    },
    Consume {
        client: usize,
        queue: usize,
    },
    Cancel {
        client: usize,
        queue: usize,
    },
    Get {
        client: usize,
        queue: usize,
    },
    /// The n-th of what it holds, or all up to it.
    Ack {
        client: usize,
        nth: usize,
        multiple: bool,
    },
    Nack {
        client: usize,
        nth: usize,
        multiple: bool,
    },
    CloseChannel {
        client: usize,
    },
    LoseConnection {
        client: usize,
    },
    Purge {
        queue: usize,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (client, queue) = (0..CLIENTS, 0..QUEUES.len());
    let step = prop_oneof![
        8 => proptest::option::weighted(0.8, queue.clone()).prop_map(|queue| Step::Publish { queue }),
        3 => (client.clone(), queue.clone()).prop_map(|(client, queue)| Step::Consume { client, queue }),
        1 => (client.clone(), queue.clone()).prop_map(|(client, queue)| Step::Cancel { client, queue }),
        2 => (client.clone(), queue.clone()).prop_map(|(client, queue)| Step::Get { client, queue }),
        6 => (client.clone(), 0..6usize, any::<bool>())
            .prop_map(|(client, nth, multiple)| Step::Ack { client, nth, multiple }),
        4 => (client.clone(), 0..6usize, any::<bool>())
            .prop_map(|(client, nth, multiple)| Step::Nack { client, nth, multiple }),
        1 => client.clone().prop_map(|client| Step::CloseChannel { client }),
        1 => client.prop_map(|client| Step::LoseConnection { client }),
        1 => queue.prop_map(|queue| Step::Purge { queue }),
    ];
    proptest::collection::vec(step, 1..120)
}

/// What one client is known to have.
#[derive(Default)]
struct Holder {
    /// Delivery tag -> queue, message, and the subscription it came by; what came by `get` is not for the prefetch to bound.
    held: BTreeMap<u64, (usize, u64, Option<u64>)>,
    /// Queue -> subscription. One that was cancelled and begun again is another.
    consumes: BTreeMap<usize, u64>,
}

impl Holder {
    fn unsettled(&self, subscription: u64) -> usize {
        self.held
            .values()
            .filter(|(.., by)| *by == Some(subscription))
            .count()
    }
}

#[derive(Default)]
struct Oracle {
    next: u64,
    waiting: [BTreeSet<u64>; QUEUES.len()],
    /// Delivered at least once; a delivery says `again` of these and of no other.
    seen: BTreeSet<(usize, u64)>,
    clients: [Holder; CLIENTS],
}

impl Oracle {
    /// Takes one line that a client has read.
    fn hear(&mut self, client: usize, line: &str, asked: Option<usize>) {
        let words: Vec<&str> = line.split(' ').collect();
        let (queue, by_get) = match words[1] {
            "deliver" => (words[2].parse().unwrap(), false),
            "get-ok" => (asked.expect("an answer to a question"), true),
            _ => return,
        };
        let tag = words
            .iter()
            .find_map(|w| w.strip_prefix('#'))
            .unwrap()
            .parse()
            .unwrap();
        let message: u64 = words.last().unwrap().parse().unwrap();
        assert!(
            self.waiting[queue].remove(&message),
            "{line}: not waiting in {}",
            QUEUES[queue]
        );
        assert!(
            self.waiting[queue]
                .first()
                .is_none_or(|first| *first > message),
            "{line}: {} waits in front of it",
            self.waiting[queue].first().unwrap()
        );
        let again = !self.seen.insert((queue, message));
        assert_eq!(words.contains(&"again"), again, "{line}");
        let holder = &mut self.clients[client];
        let subscription = if by_get {
            None
        } else {
            Some(holder.consumes[&queue])
        };
        let used = holder.held.insert(tag, (queue, message, subscription));
        assert!(used.is_none(), "{line}: tag used twice");
        let limit = usize::from(PREFETCH[client]);
        let pushed = subscription.map_or(0, |subscription| holder.unsettled(subscription));
        assert!(
            limit == 0 || pushed <= limit,
            "{line}: {pushed} unsettled, prefetch {limit}"
        );
    }

    /// The tags that the step settles, or none.
    fn settle(&mut self, client: usize, nth: usize, multiple: bool, requeue: bool) -> Option<u64> {
        let held = &mut self.clients[client].held;
        let tag = *held.keys().nth(nth)?;
        let gone: Vec<u64> = if multiple {
            held.range(..=tag).map(|(t, _)| *t).collect()
        } else {
            vec![tag]
        };
        for tag in gone {
            let (queue, message, _) = held.remove(&tag).unwrap();
            if requeue {
                self.waiting[queue].insert(message);
            }
        }
        Some(tag)
    }

    fn lose(&mut self, client: usize) {
        for (queue, message, _) in std::mem::take(&mut self.clients[client]).held.into_values() {
            self.waiting[queue].insert(message);
        }
    }
}

fn fresh(rig: &mut Rig, client: usize) -> Client {
    let mut fresh = rig.client();
    fresh.ask(rig, qos(PREFETCH[client], false));
    fresh
}

fn play(steps: &[Step]) {
    let mut rig = Rig::new();
    let mut publisher = rig.client();
    for queue in QUEUES {
        publisher.ask(&mut rig, declare(queue));
        publisher.ask(&mut rig, bind(queue, "amq.fanout", ""));
    }
    let mut clients: Vec<Client> = (0..CLIENTS).map(|n| fresh(&mut rig, n)).collect();
    let mut oracle = Oracle::default();
    for step in steps {
        let mut asked = None;
        match *step {
            Step::Publish { queue } => {
                let message = oracle.next;
                oracle.next += 1;
                match queue {
                    Some(queue) => {
                        oracle.waiting[queue].insert(message);
                        publisher.publish(&mut rig, "", QUEUES[queue], &message.to_string());
                    }
                    None => {
                        oracle
                            .waiting
                            .iter_mut()
                            .for_each(|q| assert!(q.insert(message)));
                        publisher.publish(&mut rig, "amq.fanout", "", &message.to_string());
                    }
                }
            }
            Step::Consume { client, queue } => {
                oracle.next += 1;
                let subscription = oracle.next;
                if let Entry::Vacant(place) = oracle.clients[client].consumes.entry(queue) {
                    place.insert(subscription);
                    clients[client].method(&mut rig, 1, consume(QUEUES[queue], &queue.to_string()));
                }
            }
            Step::Cancel { client, queue } => {
                clients[client].method(&mut rig, 1, cancel(&queue.to_string()));
                oracle.clients[client].consumes.remove(&queue);
            }
            Step::Get { client, queue } => {
                asked = Some((client, queue));
                clients[client].method(&mut rig, 1, get(QUEUES[queue], false));
            }
            Step::Ack {
                client,
                nth,
                multiple,
            } => {
                if let Some(tag) = oracle.settle(client, nth, multiple, false) {
                    clients[client].ack(&mut rig, tag, multiple);
                }
            }
            Step::Nack {
                client,
                nth,
                multiple,
            } => {
                if let Some(tag) = oracle.settle(client, nth, multiple, true) {
                    clients[client].nack(&mut rig, tag, multiple, true);
                }
            }
            Step::CloseChannel { client } => {
                oracle.lose(client);
                assert_eq!(
                    clients[client].ask(&mut rig, close_channel()),
                    ["1 close-ok"]
                );
                clients[client].open(&mut rig, 1);
                clients[client].ask(&mut rig, qos(PREFETCH[client], false));
            }
            Step::LoseConnection { client } => {
                oracle.lose(client);
                rig.broker.close(clients[client].id, rig.now);
                clients[client] = fresh(&mut rig, client);
            }
            Step::Purge { queue } => {
                let gone = oracle.waiting[queue].len();
                oracle.waiting[queue].clear();
                assert_eq!(
                    publisher.ask(&mut rig, purge(QUEUES[queue])),
                    [format!("1 purge-ok {gone}")]
                );
            }
        }
        // Whoever is heard first may have got what another gave back in the same step, in whatever order: what is delivered is compared
        // by queue order only within one client, so the smaller messages have to be heard first.
        let mut heard: Vec<(u64, usize, String)> = Vec::new();
        for (n, client) in clients.iter_mut().enumerate() {
            for line in rig.read(client) {
                let message = line
                    .rsplit(' ')
                    .next()
                    .and_then(|w| w.parse().ok())
                    .unwrap_or(0);
                heard.push((message, n, line));
            }
        }
        heard.sort();
        for (_, n, line) in heard {
            oracle.hear(
                n,
                &line,
                asked
                    .filter(|(client, _)| *client == n)
                    .map(|(_, queue)| queue),
            );
        }
        for (n, queue) in QUEUES.iter().enumerate() {
            let (ready, unsettled, _) = rig.queue(queue).unwrap();
            let held = oracle
                .clients
                .iter()
                .flat_map(|c| c.held.values())
                .filter(|(q, ..)| *q == n)
                .count();
            assert_eq!(
                (ready, unsettled),
                (oracle.waiting[n].len(), held),
                "{queue} after {step:?}"
            );
            // Nothing waits while somebody could take it.
            let free = oracle.clients.iter().zip(PREFETCH).any(|(c, limit)| {
                let subscription = c.consumes.get(&n);
                subscription.is_some_and(|s| limit == 0 || c.unsettled(*s) < limit.into())
            });
            assert!(
                ready == 0 || !free,
                "{queue} holds {ready} back after {step:?}"
            );
        }
    }
    for client in &clients {
        rig.broker.close(client.id, rig.now);
    }
    (0..CLIENTS).for_each(|n| oracle.lose(n));
    for (n, queue) in QUEUES.iter().enumerate() {
        let left: Vec<String> = oracle.waiting[n].iter().map(u64::to_string).collect();
        assert_eq!(publisher.drain(&mut rig, queue), left, "{queue} at the end");
    }
    assert_eq!(rig.broker.memory(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_doubled_or_out_of_order(steps in steps()) {
        play(&steps);
    }
}

proptest! {
    /// Accepts: amqp/R34
    #[test]
    fn no_bytes_make_the_broker_panic(
        frames in proptest::collection::vec(
            (prop_oneof![Just(1u8), Just(1), Just(2), Just(3), Just(8), any::<u8>()], 0u8..3,
             prop_oneof![Just(10u8), Just(20), Just(40), Just(50), Just(60), any::<u8>()],
             0u8..130, proptest::collection::vec(any::<u8>(), 0..40)),
            1..20),
    ) {
        let mut rig = Rig::new();
        let mut client = rig.client();
        for (kind, channel, class, method, rest) in frames {
            let mut bytes = vec![kind, 0, channel, 0, 0, 0, 4 + rest.len() as u8, 0, class, 0, method];
            bytes.extend_from_slice(&rest);
            bytes.push(0xce);
            rig.send(&mut client, &bytes);
        }
        rig.broker.close(client.id, rig.now);
        prop_assert_eq!(rig.broker.memory(), 0);
    }
}
