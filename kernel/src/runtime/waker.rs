//! The integer waker, and the pointer to the kernel that runs on this thread.
//!
//! A waker is one 64-bit word: kernel (12 bits), generation of the slot (24), slot (28). Cloning and dropping it do nothing,
//! there is no reference count to keep between cores, and nothing to free late: a waker that outlives its task, or its
//! kernel, finds another generation and is ignored. At worst the generation has wrapped round and a stranger is polled once
//! for nothing, which the contract of `Future` allows.
//!
//! One of the two files of this crate with `unsafe`. The benchmark that pays for it is `spawn_join`: with an `Arc` for each
//! waker, every clone is an atomic add on a line that other cores touch.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ptr;
use std::task::{RawWaker, RawWakerVTable, Waker};

use super::{Core, inbox};

#[cfg(not(target_pointer_width = "64"))]
compile_error!("the integer waker needs 64-bit pointers");

const SLOT_BITS: u32 = 28;
pub(super) const GENERATION_BITS: u32 = 24;

/// How many tasks a kernel can hold; one number is kept for "none".
pub(crate) const MAX_SLOTS: usize = (1 << SLOT_BITS) - 1;

/// A waker's content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Word(u64);

impl Word {
    pub(crate) const fn new(kernel: u16, generation: u32, slot: u32) -> Self {
        let generation = generation as u64 & ((1 << GENERATION_BITS) - 1);
        Self(
            (kernel as u64) << (SLOT_BITS + GENERATION_BITS)
                | generation << SLOT_BITS
                | slot as u64,
        )
    }

    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(crate) const fn kernel(self) -> u16 {
        (self.0 >> (SLOT_BITS + GENERATION_BITS)) as u16
    }

    pub(crate) const fn slot(self) -> u32 {
        (self.0 & ((1 << SLOT_BITS) - 1)) as u32
    }

    /// Whether a slot that is at `generation` is the one this waker was made for.
    pub(crate) const fn fits(self, generation: u32) -> bool {
        let mask = (1 << GENERATION_BITS) - 1;
        (self.0 >> SLOT_BITS) & mask == generation as u64 & mask
    }

    /// The word as a waker.
    pub(crate) fn waker(self) -> Waker {
        // SAFETY: the vtable's functions take the data pointer as a number and never dereference it; they may be called
        // from any thread, any number of times, at any time.
        unsafe { Waker::from_raw(raw(self.0)) }
    }

    /// Whether `waker` is this word.
    pub(crate) fn is(self, waker: &Waker) -> bool {
        waker.data().addr() as u64 == self.0 && ptr::eq(waker.vtable(), &VTABLE)
    }
}

static VTABLE: RawWakerVTable = RawWakerVTable::new(clone, wake, wake, |_| {});

const fn raw(word: u64) -> RawWaker {
    RawWaker::new(ptr::without_provenance(word as usize), &VTABLE)
}

/// Cloning is how a foreign future keeps the waker: the kernel notes that this task can now be woken from anywhere, which
/// the search for deadlocks must respect.
fn clone(data: *const ()) -> RawWaker {
    let word = Word(data.addr() as u64);
    with_current(|core| {
        if let Some(core) = core
            && core.id() == word.kernel()
        {
            core.note_escaped_waker(word);
        }
    });
    raw(word.0)
}

fn wake(data: *const ()) {
    let word = Word(data.addr() as u64);
    let here = with_current(|core| match core {
        Some(core) if core.id() == word.kernel() => core.wake_local(word),
        _ => false,
    });
    if !here {
        inbox::push_wake(word.kernel(), word.0);
    }
}

thread_local! {
    /// The kernel that is running on this thread, null between turns.
    static CURRENT: Cell<*const Core> = const { Cell::new(ptr::null()) };
}

/// Marks `core` as the running kernel until it is dropped; then the one before is current again.
pub(crate) struct Entered<'a> {
    outer: *const Core,
    _core: &'a Core,
}

pub(crate) fn enter(core: &Core) -> Entered<'_> {
    Entered {
        outer: CURRENT.replace(core),
        _core: core,
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        CURRENT.set(self.outer);
    }
}

/// Calls `f` with the running kernel.
#[inline(always)]
pub(crate) fn with_current<R>(f: impl FnOnce(Option<&Core>) -> R) -> R {
    let core = CURRENT.get();
    // SAFETY: the pointer is null, or was set by `enter` from a reference that `Entered` still borrows: `Entered` values are
    // kept on the stack of `Kernel` methods (this module is private to the runtime, which never leaks one) and restore the outer pointer when dropped, innermost first.
    f(unsafe { core.as_ref() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_keeps_its_three_parts_apart() {
        let word = Word::new(4095, 0x01ff_fffe, (1 << 28) - 1);
        assert_eq!(word.kernel(), 4095);
        assert_eq!(word.slot(), (1 << 28) - 1);
        assert!(
            word.fits(0x00ff_fffe),
            "only the low 24 bits of the generation are kept"
        );
        assert!(!word.fits(0x00ff_ffff));
        let word = Word::new(0, u32::MAX, 0);
        assert_eq!((word.kernel(), word.slot()), (0, 0));
    }

    #[test]
    fn a_clone_will_wake_the_same_task() {
        let waker = Word::new(3, 1, 7).waker();
        assert!(waker.clone().will_wake(&waker));
        assert!(Word::new(3, 1, 7).is(&waker));
        assert!(!Word::new(3, 2, 7).is(&waker));
    }
}
