//! Parking lots: the FIFO queues of waiting tasks behind every lock, event, queue and join (Curio's `SchedFIFO` and `SchedBarrier`).

use slab::Slab;

use super::nodes::{NIL, Nodes};

pub(crate) struct Lot {
    head: u32,
    tail: u32,
    len: u32,
}

/// All lots of a kernel. A parked node's `key` is the number of its lot.
pub(crate) struct Lots(Slab<Lot>);

impl Lots {
    pub(crate) const fn new() -> Self {
        Self(Slab::new())
    }

    pub(crate) fn open(&mut self) -> u32 {
        let lot = self.0.insert(Lot {
            head: NIL,
            tail: NIL,
            len: 0,
        });
        u32::try_from(lot).expect("fewer lots than nodes")
    }

    /// Removes an empty lot.
    pub(crate) fn close(&mut self, lot: u32) {
        let lot = self.0.remove(lot as usize);
        debug_assert!(lot.head == NIL, "closed with tasks parked in it");
    }

    pub(crate) fn len(&self, lot: u32) -> usize {
        self.0.get(lot as usize).map_or(0, |lot| lot.len as usize)
    }

    /// Puts `node` at the end.
    pub(crate) fn park(&mut self, nodes: &mut Nodes, lot: u32, node: u32) {
        let queue = &mut self.0[lot as usize];
        nodes[node].prev = queue.tail;
        nodes[node].next = NIL;
        match queue.tail {
            NIL => queue.head = node,
            tail => nodes[tail].next = node,
        }
        queue.tail = node;
        queue.len += 1;
    }

    /// Takes out the node that waits longest.
    pub(crate) fn unpark(&mut self, nodes: &mut Nodes, lot: u32) -> Option<u32> {
        let queue = self.0.get_mut(lot as usize)?;
        let head = queue.head;
        if head == NIL {
            return None;
        }
        let next = std::mem::replace(&mut nodes[head].next, NIL);
        queue.head = next;
        queue.len -= 1;
        match next {
            NIL => queue.tail = NIL,
            next => nodes[next].prev = NIL,
        }
        Some(head)
    }

    /// Takes out `node`, wherever it stands.
    pub(crate) fn remove(&mut self, nodes: &mut Nodes, lot: u32, node: u32) {
        let queue = &mut self.0[lot as usize];
        let (prev, next) = (nodes[node].prev, nodes[node].next);
        match prev {
            NIL => queue.head = next,
            prev => nodes[prev].next = next,
        }
        match next {
            NIL => queue.tail = prev,
            next => nodes[next].prev = prev,
        }
        queue.len -= 1;
        nodes[node].prev = NIL;
        nodes[node].next = NIL;
    }
}
