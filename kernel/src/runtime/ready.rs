//! The ready queue: a FIFO ring of task slots.

/// A power-of-two ring of slot numbers. A task is in it at most once (a flag on its slot says so), so it never holds more
/// entries than there are slots; it grows with the task table and a push in between never allocates.
pub(crate) struct Ready {
    ring: Box<[u32]>,
    head: usize,
    len: usize,
}

impl Ready {
    pub(crate) fn new() -> Self {
        Self {
            ring: vec![0; 64].into_boxed_slice(),
            head: 0,
            len: 0,
        }
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    pub(crate) const fn capacity(&self) -> usize {
        self.ring.len()
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room for `slots` entries.
    pub(crate) fn reserve(&mut self, slots: usize) {
        if slots <= self.ring.len() {
            return;
        }
        let mut ring = Vec::with_capacity(slots.next_power_of_two());
        ring.extend((0..self.len).map(|i| self.ring[(self.head + i) & (self.ring.len() - 1)]));
        ring.resize(slots.next_power_of_two(), 0);
        self.ring = ring.into_boxed_slice();
        self.head = 0;
    }

    pub(crate) fn push(&mut self, slot: u32) {
        debug_assert!(self.len < self.ring.len(), "a task is queued twice");
        let mask = self.ring.len() - 1;
        self.ring[(self.head + self.len) & mask] = slot;
        self.len += 1;
    }

    pub(crate) fn pop(&mut self) -> Option<u32> {
        if self.len == 0 {
            return None;
        }
        let mask = self.ring.len() - 1;
        let slot = self.ring[self.head & mask];
        self.head = (self.head + 1) & mask;
        self.len -= 1;
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_queued_keeps_its_order_while_the_ring_grows() {
        let mut ready = Ready::new();
        for i in 0..40 {
            ready.push(i);
        }
        for i in 0..40 {
            assert_eq!(ready.pop(), Some(i));
        }
        for i in 0..64 {
            ready.push(i); // wraps round the end
        }
        ready.reserve(65);
        ready.push(64);
        assert_eq!(ready.len(), 65);
        for i in 0..=64 {
            assert_eq!(ready.pop(), Some(i));
        }
        assert_eq!(ready.pop(), None);
    }
}
