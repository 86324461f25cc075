//! The ready queue: a FIFO ring of task slots.

use super::task::Flags;

/// A power-of-two ring of slot numbers. A task is in it at most once (a flag on its slot says so), so it never holds more
/// entries than there are slots; it grows with the task table and a push in between never allocates.
pub(crate) struct Ready {
    ring: Box<[u32]>,
    /// How many entries were ever taken out and put in; they wrap, the ring's size divides the wrap.
    taken: u32,
    put: u32,
}

impl Ready {
    pub(crate) fn new() -> Self {
        Self {
            ring: vec![0; 64].into_boxed_slice(),
            taken: 0,
            put: 0,
        }
    }

    pub(crate) const fn len(&self) -> u32 {
        self.put.wrapping_sub(self.taken)
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.put == self.taken
    }

    /// Makes room for `slots` entries.
    pub(crate) fn reserve(&mut self, slots: usize) {
        if slots <= self.ring.len() {
            return;
        }
        let mut ring = Vec::with_capacity(slots.next_power_of_two());
        let len = self.len();
        ring.extend((0..len).map(|i| self.ring[self.place(self.taken.wrapping_add(i))]));
        ring.resize(slots.next_power_of_two(), 0);
        self.ring = ring.into_boxed_slice();
        (self.taken, self.put) = (0, len);
    }

    const fn place(&self, count: u32) -> usize {
        count as usize & (self.ring.len() - 1)
    }

    /// Puts a task at the end, unless its flags say that it is queued.
    #[inline]
    pub(crate) fn queue(&mut self, slot: u32, flags: &mut Flags) {
        if !flags.has(Flags::QUEUED) {
            flags.set(Flags::QUEUED);
            self.push(slot);
        }
    }

    #[inline]
    pub(crate) fn push(&mut self, slot: u32) {
        debug_assert!(
            (self.len() as usize) < self.ring.len(),
            "a task is queued twice"
        );
        let place = self.place(self.put);
        self.ring[place] = slot;
        self.put = self.put.wrapping_add(1);
    }

    #[inline]
    pub(crate) fn pop(&mut self) -> Option<u32> {
        if self.is_empty() {
            return None;
        }
        let slot = self.ring[self.place(self.taken)];
        self.taken = self.taken.wrapping_add(1);
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
        let place = ready.ring.as_ptr();
        ready.reserve(64);
        assert_eq!(ready.ring.as_ptr(), place, "there is room");
        ready.reserve(65);
        ready.push(64);
        assert_eq!(ready.len(), 65);
        for i in 0..=64 {
            assert_eq!(ready.pop(), Some(i));
        }
        assert_eq!(ready.pop(), None);
    }
}
