//! Parking lots: the FIFO queues of waiting tasks behind every lock, event and queue (Curio's `SchedFIFO`).
//!
//! A lot is a node of its own, and the nodes parked in it form a ring with it: its `next` waits longest, its `prev` shortest. So no
//! link is ever missing, and whoever leaves the ring need not know whose it was.

use std::panic::Location;

use super::nodes::{Node, Nodes, ROOT, WaitKind};

impl Nodes {
    /// A lot in which nobody waits.
    pub(crate) fn open_lot(&mut self, at: &'static Location<'static>) -> u32 {
        let lot = self.insert(Node::new(WaitKind::Custom, ROOT, 0, at));
        (self[lot].prev, self[lot].next) = (lot, lot);
        lot
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
