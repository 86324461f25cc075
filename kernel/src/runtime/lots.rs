//! Parking lots: the FIFO queues of waiting tasks behind every lock, event and queue (Curio's `SchedFIFO`).
//!
//! A lot is a node of its own, and the nodes parked in it form a ring with it: its `next` waits longest, its `prev` shortest. So no
//! link is ever missing, and whoever leaves the ring need not know whose it was.

use std::panic::Location;

use super::nodes::{Node, Nodes, ROOT, WaitKind};

impl Nodes {
    /// A lot in which nobody waits.
    pub(crate) fn open_lot(&mut self, at: &'static Location<'static>) -> u32 {
        self.insert(Node::new(WaitKind::Custom, ROOT, 0, at))
    }

    /// Removes a lot in which nobody waits.
    pub(crate) fn close_lot(&mut self, lot: u32) {
        debug_assert!(self.is_vacant(lot), "closed with tasks parked in it");
        self.put_back(lot);
    }

    /// Whether nobody waits in `lot`.
    pub(crate) fn is_vacant(&self, lot: u32) -> bool {
        self[lot].next == lot
    }

    /// How many wait in `lot`. Counts them.
    pub(crate) fn parked(&self, lot: u32) -> usize {
        let after = |&node: &u32| Some(self[node].next).filter(|&next| next != lot);
        std::iter::successors(after(&lot), after).count()
    }

    /// Puts `node` at the end of `lot`.
    #[inline]
    pub(crate) fn park(&mut self, node: u32, lot: u32) {
        let nodes = self.as_mut_slice();
        let last = std::mem::replace(&mut nodes[lot as usize].prev, node);
        nodes[last as usize].next = node;
        let node = &mut nodes[node as usize];
        (node.prev, node.next) = (last, lot);
    }

    /// Takes out the node that waits longest in `lot`.
    #[inline]
    pub(crate) fn unpark(&mut self, lot: u32) -> Option<u32> {
        let nodes = self.as_mut_slice();
        let first = nodes[lot as usize].next;
        if first == lot {
            return None;
        }
        let next = nodes[first as usize].next;
        nodes[lot as usize].next = next;
        nodes[next as usize].prev = lot;
        Some(first)
    }

    /// Takes `node` out of the lot in which it stands.
    pub(crate) fn leave_lot(&mut self, node: u32) {
        let (prev, next) = (self[node].prev, self[node].next);
        self[prev].next = next;
        self[next].prev = prev;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Park,
        Unpark,
        Leave(prop::sample::Index),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Park),
            1 => Just(Step::Unpark),
            2 => any::<prop::sample::Index>().prop_map(Step::Leave),
        ]
    }

    proptest! {
        #[test]
        fn a_lot_does_what_a_queue_does(steps in prop::collection::vec(step(), 1..60)) {
            let mut nodes = Nodes::new();
            let lot = nodes.open_lot(Location::caller());
            let mut model = VecDeque::new();
            for step in steps {
                match step {
                    Step::Park => {
                        let node = Node::new(WaitKind::Lock, ROOT, 0, Location::caller());
                        let node = nodes.insert(node);
                        nodes.park(node, lot);
                        model.push_back(node);
                    }
                    Step::Unpark => {
                        let first = nodes.unpark(lot);
                        prop_assert_eq!(first, model.pop_front());
                        if let Some(node) = first {
                            nodes.put_back(node);
                        }
                    }
                    Step::Leave(which) => {
                        if !model.is_empty() {
                            let node = model.remove(which.index(model.len())).unwrap();
                            nodes.leave_lot(node);
                            nodes.put_back(node);
                        }
                    }
                }
                prop_assert_eq!(nodes.parked(lot), model.len());
                prop_assert_eq!(nodes.is_vacant(lot), model.is_empty());
                prop_assert_eq!(nodes.live(), model.len() + 1);
            }
            while let Some(node) = nodes.unpark(lot) {
                prop_assert_eq!(Some(node), model.pop_front());
            }
            nodes.close_lot(lot);
        }
    }
}
