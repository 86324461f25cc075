//! Task slots, and the bodies that hold the tasks' futures.
//!
//! A task is a 32-byte *slot* in the task table, which is all that scheduling looks at, and a *body*: one allocation with a
//! header, and a place that first holds the future and then its output. The slot is freed the moment the task ends (its generation
//! grows, so that stale wakers miss); the body lives on while a handle refers to it.
//!
//! One of the two files of this crate with `unsafe`: the type of a future is erased here, and its output is written
//! over it. What must stay true:
//!
//! - a body never leaves its thread (`BodyRef` holds a raw pointer, so it is neither `Send` nor `Sync`);
//! - `stage` says what the place holds: the future while `Idle` or `Busy`, the output while `Value`, a panic's payload while `Panicked`, else nothing;
//! - while `Busy` the future is being polled or dropped further up the stack, and nobody else touches the place;
//! - user code (a future's `poll` or `drop`, an output's `drop`) runs only here, and always while no kernel table is borrowed.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::pin::Pin;
use std::ptr::{self, NonNull};
use std::task::{Context, Poll};

use super::nodes::NIL;
use super::waker::{self, MAX_SLOTS};
use crate::error::{JoinError, Panic, panic_text};
use crate::task::TaskRef;

/// What the place of a body holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// The future, between polls.
    Idle,
    /// The future, being polled or dropped right now.
    Busy,
    /// The output, not taken yet.
    Value,
    /// What the task panicked with, not taken yet.
    Panicked,
    /// Nothing: the future was dropped before it ended.
    Aborted,
    /// Nothing: a join took the output or the payload.
    Taken,
}

/// What is known of a task whatever its type.
pub(crate) struct Header {
    vtable: &'static VTable,
    pub(crate) spawned_at: &'static Location<'static>,
    pub(crate) id: u64,
    /// Id of the task that spawned it, 0 for none.
    pub(crate) parent: u64,
    refs: Cell<u32>,
    /// How often it was polled.
    pub(crate) cycles: Cell<u32>,
    /// Its slot, for as long as `is_live`.
    pub(crate) slot: Cell<u32>,
    pub(crate) kernel: u16,
    stage: Cell<Stage>,
    marks: Cell<u8>,
}

/// A cancellation was asked for while it lived.
const CANCELLED: u8 = 1;
/// Its handle is gone: nobody will take the output.
const DETACHED: u8 = 2;
/// To be dropped instead of polled, or as soon as the poll it is in returns.
const DOOMED: u8 = 4;
/// Somebody was told of its panic.
const REPORTED: u8 = 8;

const _: () = assert!(size_of::<Header>() == 48);

impl Header {
    /// Whether the task has not ended; then its slot is its own.
    pub(crate) fn is_live(&self) -> bool {
        matches!(self.stage.get(), Stage::Idle | Stage::Busy)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.marks.get() & CANCELLED != 0
    }

    /// Notes that a cancellation was asked for; false if it was before.
    pub(crate) fn mark_cancelled(&self) -> bool {
        let before = self.marks.replace(self.marks.get() | CANCELLED);
        before & CANCELLED == 0
    }

    pub(crate) fn is_doomed(&self) -> bool {
        self.marks.get() & DOOMED != 0
    }

    pub(crate) fn doom(&self) {
        self.marks.set(self.marks.get() | DOOMED);
    }

    pub(super) fn has_panicked(&self) -> bool {
        self.stage.get() == Stage::Panicked
    }

    /// A panic that nobody joins is not worth a line in the log any more.
    pub(super) fn mark_reported(&self) {
        self.marks.set(self.marks.get() | REPORTED);
    }

    /// Makes the task look as if it ran, so that an abort dooms it instead of dropping its future.
    pub(super) fn hold(&self) {
        debug_assert!(self.stage.get() == Stage::Idle);
        self.stage.set(Stage::Busy);
    }

    pub(super) fn let_go(&self) {
        self.stage.set(Stage::Idle);
    }
}

struct VTable {
    /// Polls the future; true when the task ended, with the output or the panic in place.
    poll: unsafe fn(NonNull<Header>, &mut Context<'_>) -> bool,
    /// Drops what the place holds, as `stage` says.
    clear: unsafe fn(NonNull<Header>),
    /// Moves a `Value` to the pointer, which is one to the future's output type.
    take: unsafe fn(NonNull<Header>, *mut ()),
    /// Where the payload of a `Panicked` body is.
    panic: unsafe fn(NonNull<Header>) -> *mut Box<dyn Any + Send>,
    layout: Layout,
}

/// `header` comes first, so that a pointer to the body is one to its header.
#[repr(C)]
struct Body<F: Future> {
    header: Header,
    place: UnsafeCell<Place<F>>,
}

union Place<F: Future> {
    future: ManuallyDrop<F>,
    output: ManuallyDrop<F::Output>,
    panic: ManuallyDrop<Box<dyn Any + Send>>,
}

impl<F: Future> Body<F> {
    const VTABLE: VTable = VTable {
        poll: Self::poll,
        clear: Self::clear,
        take: Self::take,
        panic: Self::panic,
        layout: block_layout(Layout::new::<Self>()),
    };

    /// # Safety
    /// `body` points to a live `Body<F>` in stage `Busy`, entered by the caller.
    unsafe fn poll(body: NonNull<Header>, cx: &mut Context<'_>) -> bool {
        // SAFETY: per contract it is a `Body<F>` whose place holds the future and is the caller's alone; the future was
        // written there once and is dropped in place, so it stays pinned.
        let (header, place) = unsafe { Self::parts(body) };
        let polled = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: as above.
            let future = unsafe { Pin::new_unchecked(&mut *place.future) };
            future.poll(cx)
        }));
        let ended = match polled {
            Ok(Poll::Pending) => return false,
            Ok(Poll::Ready(output)) => Ok(output),
            Err(panic) => Err(panic),
        };
        let ended = if std::mem::needs_drop::<F>() {
            let dropped = catch_unwind(AssertUnwindSafe(|| {
                // SAFETY: the future is in place and nothing looks at it again after this.
                unsafe { ManuallyDrop::drop(&mut place.future) }
            }));
            match (ended, dropped) {
                (ended, Ok(())) => ended,
                (Ok(output), Err(panic)) => {
                    drop_quietly(output);
                    Err(panic)
                }
                (Err(first), Err(second)) => {
                    drop_quietly(second);
                    Err(first)
                }
            }
        } else {
            ended
        };
        match ended {
            Ok(output) => {
                place.output = ManuallyDrop::new(output);
                header.stage.set(Stage::Value);
            }
            Err(panic) => {
                place.panic = ManuallyDrop::new(panic);
                header.stage.set(Stage::Panicked);
            }
        }
        true
    }

    /// # Safety
    /// `body` points to a live `Body<F>`; if it holds a future, the caller has entered stage `Busy`.
    unsafe fn clear(body: NonNull<Header>) {
        // SAFETY: per contract; `stage` says which field of the union is there.
        unsafe {
            let (header, place) = Self::parts(body);
            match header.stage.get() {
                Stage::Busy | Stage::Idle => ManuallyDrop::drop(&mut place.future),
                Stage::Value => ManuallyDrop::drop(&mut place.output),
                Stage::Panicked => ManuallyDrop::drop(&mut place.panic),
                Stage::Aborted | Stage::Taken => {}
            }
        }
    }

    /// # Safety
    /// `body` points to a live `Body<F>` in stage `Value`, `to` to room for an `F::Output`.
    unsafe fn take(body: NonNull<Header>, to: *mut ()) {
        // SAFETY: per contract the output is there; the caller changes the stage, so it is read once.
        unsafe {
            let (_, place) = Self::parts(body);
            to.cast::<F::Output>()
                .write(ManuallyDrop::take(&mut place.output));
        }
    }

    /// # Safety
    /// `body` points to a live `Body<F>` that holds neither future nor output, and the caller is the only one to use its place.
    unsafe fn panic(body: NonNull<Header>) -> *mut Box<dyn Any + Send> {
        // SAFETY: per contract; the pointer is to a field of the union, whatever that holds.
        unsafe {
            let (_, place) = Self::parts(body);
            (&raw mut place.panic).cast()
        }
    }

    /// # Safety
    /// `body` points to a live `Body<F>`, and the caller is the only one to use its place.
    unsafe fn parts<'a>(body: NonNull<Header>) -> (&'a Header, &'a mut Place<F>) {
        // SAFETY: `repr(C)` puts the header first; the pointer was made from the whole body. The place is in an
        // `UnsafeCell` and the caller's alone.
        unsafe {
            let body = body.cast::<Self>().as_ref();
            (&body.header, &mut *body.place.get())
        }
    }
}

/// A counted reference to a body. Dropping the last one drops what the body holds, which is user code.
pub(crate) struct BodyRef(NonNull<Header>);

impl BodyRef {
    /// Puts `future` into a new body.
    ///
    /// The kernel may hold it past the end of the borrows in `F`: the caller promises, by a type that carries the lifetime or by a guard,
    /// that the future and its output are dropped before that.
    pub(crate) fn with_future<F: Future>(
        future: F,
        id: u64,
        parent: u64,
        kernel: u16,
        spawned_at: &'static Location<'static>,
    ) -> Handle<F::Output> {
        let header = Header {
            vtable: &Body::<F>::VTABLE,
            spawned_at,
            id,
            parent,
            refs: Cell::new(1),
            cycles: Cell::new(0),
            slot: Cell::new(NIL),
            kernel,
            stage: Cell::new(Stage::Idle),
            marks: Cell::new(0),
        };
        let place = UnsafeCell::new(Place {
            future: ManuallyDrop::new(future),
        });
        let block = take_block(Body::<F>::VTABLE.layout).cast::<Body<F>>();
        // SAFETY: the block is fresh, large enough and aligned for a `Body<F>`.
        unsafe { block.write(Body { header, place }) };
        Handle {
            task: TaskRef::new(Self(block.cast())),
            output: PhantomData,
        }
    }

    /// Polls the future; true when the task ended.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> bool {
        assert!(
            self.stage.replace(Stage::Busy) == Stage::Idle,
            "polled while it runs or after it ended"
        );
        self.cycles.set(self.cycles.get().wrapping_add(1));
        // SAFETY: the future is there, and `Busy` since the line above: nobody else polls or drops it.
        let ended = unsafe { (self.vtable.poll)(self.0, cx) };
        if !ended {
            self.stage.set(Stage::Idle);
        }
        ended
    }

    /// Drops the future now. False if it is running further up the stack, or has ended.
    pub(crate) fn abort(&self) -> bool {
        if self.stage.get() != Stage::Idle {
            return false;
        }
        self.stage.set(Stage::Busy);
        self.clear();
        self.stage.set(Stage::Aborted);
        true
    }

    /// Drops what the place holds; a panic in a destructor is logged and goes no further.
    fn clear(&self) {
        // SAFETY: called with the future entered as `Busy`, or when the last reference goes, so nobody uses the place.
        let cleared = catch_unwind(AssertUnwindSafe(|| unsafe { (self.vtable.clear)(self.0) }));
        if let Err(panic) = cleared {
            log::error!(
                "task {} spawned at {}: panic while it was dropped: {}",
                self.id,
                self.spawned_at,
                panic_text(&*panic)
            );
            drop_quietly(panic);
        }
    }

    /// Drops an output that nobody can take any more. It may borrow what the handle's type vouches for, so it must not live
    /// on in a body that a `TaskRef` keeps.
    pub(crate) fn drop_unwanted_output(&self) {
        if self.marks.get() & DETACHED == 0 {
            return;
        }
        match self.stage.get() {
            Stage::Idle | Stage::Busy | Stage::Aborted | Stage::Taken => return,
            Stage::Value => {}
            Stage::Panicked if self.marks.get() & REPORTED != 0 => {}
            Stage::Panicked => log::error!(
                "task {} spawned at {} panicked and nobody joined it: {}",
                self.id,
                self.spawned_at,
                self.panic_text().unwrap_or_default()
            ),
        }
        self.clear();
        self.stage.set(Stage::Taken);
    }
}

impl BodyRef {
    /// Moves out what the task panicked with.
    pub(super) fn take_panic(&self) -> Option<Box<dyn Any + Send>> {
        if self.stage.get() != Stage::Panicked {
            return None;
        }
        self.stage.set(Stage::Taken);
        // SAFETY: the stage said that the payload is there, and was changed, so that it is read once.
        Some(unsafe { (self.vtable.panic)(self.0).read() })
    }

    /// Puts the payload back, or another in its place.
    pub(super) fn put_panic(&self, payload: Box<dyn Any + Send>) {
        assert!(self.stage.get() == Stage::Taken, "the place is taken");
        // SAFETY: the stage says that the place is empty; it has room for a payload, as for any other field of the union.
        unsafe { (self.vtable.panic)(self.0).write(payload) };
        self.stage.set(Stage::Panicked);
    }

    /// The text of what the task panicked with.
    pub(crate) fn panic_text(&self) -> Option<String> {
        let payload = self.take_panic()?;
        let text = panic_text(&*payload).to_owned();
        self.put_panic(payload);
        Some(text)
    }
}

/// Drops what may panic at that. A panic's payload may panic again when it is dropped, so it is leaked.
pub(super) fn drop_quietly<T>(value: T) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
        std::mem::forget(panic);
    }
}

impl BodyRef {
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Deref for BodyRef {
    type Target = Header;
    fn deref(&self) -> &Header {
        // SAFETY: the count keeps the body allocated while this reference lives.
        unsafe { self.0.as_ref() }
    }
}

impl Clone for BodyRef {
    #[inline]
    fn clone(&self) -> Self {
        self.refs.set(
            self.refs
                .get()
                .checked_add(1)
                .expect("fewer than 2^32 references to a task"),
        );
        Self(self.0)
    }
}

impl Drop for BodyRef {
    #[inline]
    fn drop(&mut self) {
        let refs = self.refs.get() - 1;
        self.refs.set(refs);
        if refs == 0 {
            self.free();
        }
    }
}

impl BodyRef {
    /// Drops a reference that is not the last one. (Were it the last, the body would leak.)
    #[inline]
    pub(crate) fn release_shared(self) {
        debug_assert!(self.refs.get() > 1);
        self.refs.set(self.refs.get() - 1);
        std::mem::forget(self);
    }

    /// The last reference goes.
    fn free(&self) {
        if self.stage.get() != Stage::Taken {
            self.clear();
        }
        // SAFETY: this was the last reference; the block was allocated with this layout.
        unsafe { give_block(self.0.cast(), self.vtable.layout) };
    }
}

/// The reference to a body that knows the type of its output, and owns it: there is one for each task, and what is left of the output
/// goes with it.
pub(crate) struct Handle<T> {
    pub(crate) task: TaskRef,
    output: PhantomData<T>,
}

impl<T> Drop for Handle<T> {
    fn drop(&mut self) {
        self.body().marks.set(self.body().marks.get() | DETACHED);
        self.body().drop_unwanted_output();
    }
}

impl<T> Handle<T> {
    pub(crate) const fn body(&self) -> &BodyRef {
        self.task.body()
    }

    /// The output, once the task has ended; `None` before that.
    pub(crate) fn take(&self) -> Option<Result<T, JoinError>> {
        match self.body().stage.get() {
            Stage::Idle | Stage::Busy => None,
            Stage::Value => {
                let mut output = std::mem::MaybeUninit::<T>::uninit();
                // SAFETY: a value is there, of type `T`: `Handle<T>` is made by `BodyRef::with_future` alone, which ties `T` to the
                // future. The stage is changed before anything else can look.
                let output = unsafe {
                    (self.body().vtable.take)(self.body().0, output.as_mut_ptr().cast());
                    self.body().stage.set(Stage::Taken);
                    output.assume_init()
                };
                Some(Ok(output))
            }
            Stage::Panicked => {
                let panic = self.body().take_panic()?;
                Some(Err(JoinError::Panicked(Panic::new(panic))))
            }
            Stage::Aborted => Some(Err(JoinError::Aborted)),
            Stage::Taken => Some(Err(JoinError::Taken)),
        }
    }
}

/// Bodies of up to this size come from free lists.
const LARGEST_POOLED: usize = 1024;
const GRAIN: usize = 16;
/// How much a free list keeps, so that a burst of tasks does not hold its memory for ever.
const KEPT_BYTES: usize = 1 << 20;

/// The layout a body's block really has: pooled blocks come in multiples of `GRAIN`.
const fn block_layout(body: Layout) -> Layout {
    if body.size() > LARGEST_POOLED || body.align() > GRAIN {
        return body;
    }
    match Layout::from_size_align(body.size().next_multiple_of(GRAIN), GRAIN) {
        Ok(layout) => layout,
        Err(_) => panic!("a size of at most LARGEST_POOLED is a layout"),
    }
}

/// Free blocks by size. Each kernel has one, so that taking a block touches no lock.
pub(crate) struct Pool {
    classes: [Cell<FreeList>; LARGEST_POOLED / GRAIN],
}

#[derive(Clone, Copy)]
struct FreeList {
    /// The first free block; its first word points to the next one.
    head: *mut FreeBlock,
    /// How many bytes it keeps.
    kept: usize,
}

struct FreeBlock {
    next: *mut Self,
}

impl Pool {
    pub(crate) const fn new() -> Self {
        Self {
            classes: [const {
                Cell::new(FreeList {
                    head: ptr::null_mut(),
                    kept: 0,
                })
            }; LARGEST_POOLED / GRAIN],
        }
    }

    fn class(&self, layout: Layout) -> Option<&Cell<FreeList>> {
        if layout.align() != GRAIN {
            return None;
        }
        // No list for a size of 0, which wraps, nor for more than the largest.
        self.classes.get(layout.size().wrapping_sub(1) / GRAIN)
    }

    fn take(&self, layout: Layout) -> Option<NonNull<u8>> {
        let class = self.class(layout)?;
        let FreeList { head, kept } = class.get();
        let block = NonNull::new(head)?;
        // SAFETY: blocks on the list are free, at least `GRAIN` bytes, and begin with a `FreeBlock` that `give` wrote.
        let next = unsafe { block.as_ref() }.next;
        class.set(FreeList {
            head: next,
            kept: kept - layout.size(),
        });
        Some(block.cast())
    }

    /// # Safety
    /// `block` was allocated with `layout` and is in nobody's use. On true it belongs to the pool.
    unsafe fn give(&self, block: NonNull<u8>, layout: Layout) -> bool {
        let Some(class) = self.class(layout) else {
            return false;
        };
        let FreeList { head, kept } = class.get();
        if kept >= KEPT_BYTES {
            return false;
        }
        let block = block.cast::<FreeBlock>();
        // SAFETY: the block is ours per contract, aligned to `GRAIN` and at least as large.
        unsafe { block.write(FreeBlock { next: head }) };
        class.set(FreeList {
            head: block.as_ptr(),
            kept: kept + layout.size(),
        });
        true
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, list) in self.classes.iter().enumerate() {
            let size = (class + 1) * GRAIN;
            let layout = Layout::from_size_align(size, GRAIN).expect("a pooled layout");
            let mut head = list.get().head;
            while let Some(block) = NonNull::new(head) {
                // SAFETY: each block of the list is free and was allocated with its class's layout.
                unsafe {
                    head = block.as_ref().next;
                    dealloc(block.as_ptr().cast(), layout);
                }
            }
        }
    }
}

fn take_block(layout: Layout) -> NonNull<u8> {
    if let Some(block) = waker::with_current(|core| core?.pool.take(layout)) {
        return block;
    }
    // SAFETY: a body is never empty: it has a header.
    let block = unsafe { alloc(layout) };
    NonNull::new(block).unwrap_or_else(|| handle_alloc_error(layout))
}

/// # Safety
/// `block` was allocated with `layout` and is in nobody's use.
unsafe fn give_block(block: NonNull<u8>, layout: Layout) {
    let pooled = waker::with_current(|core| {
        // SAFETY: per contract.
        core.is_some_and(|core| unsafe { core.pool.give(block, layout) })
    });
    if !pooled {
        // SAFETY: per contract, and the pool did not take it.
        unsafe { dealloc(block.as_ptr(), layout) };
    }
}

/// All that scheduling needs to know of a task; two of them share a cache line.
pub(crate) struct Slot {
    /// `None` for a free slot.
    pub(crate) body: Option<BodyRef>,
    /// Grows with each task that had this slot.
    pub(crate) generation: u32,
    /// First of the nodes that the task waits at; the next free slot while this one is free.
    pub(crate) waits: u32,
    /// First of the task's scopes, see `scopes`.
    pub(crate) scopes: u32,
    /// First of the nodes that wait for its end, in a ring: the `prev` of the first is the last.
    pub(crate) joiners: u32,
    pub(crate) flags: Flags,
}

const _: () = assert!(size_of::<Slot>() == 32);

/// What the scheduler and the canceller note about a task.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flags(u8);

impl Flags {
    /// In the ready queue.
    pub(crate) const QUEUED: Self = Self(1);
    /// Some scope of it has fired and no trap has told the task yet.
    pub(crate) const PENDING: Self = Self(2);
    /// The task itself was cancelled.
    pub(crate) const CANCELLED: Self = Self(4);
    /// ... and a trap has told it.
    pub(crate) const CANCEL_DELIVERED: Self = Self(8);
    /// A foreign future keeps its waker.
    pub(crate) const ESCAPED: Self = Self(16);
    /// It has task-local values.
    pub(crate) const LOCALS: Self = Self(32);

    /// Both.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether it has any of `flag`'s.
    pub(crate) const fn has(self, flag: Self) -> bool {
        self.0 & flag.0 != 0
    }

    pub(crate) const fn set(&mut self, flag: Self) {
        self.0 |= flag.0;
    }

    pub(crate) const fn clear(&mut self, flag: Self) {
        self.0 &= !flag.0;
    }
}

/// The task table.
pub(crate) struct Tasks {
    slots: Vec<Slot>,
    free: u32,
    live: usize,
    last_id: u64,
}

impl Tasks {
    pub(crate) const fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: NIL,
            live: 0,
            last_id: 0,
        }
    }

    /// How many tasks have not ended.
    pub(crate) const fn live(&self) -> usize {
        self.live
    }

    /// How many slots there are, used or free.
    pub(crate) const fn capacity(&self) -> usize {
        self.slots.len()
    }

    pub(crate) const fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// A slot for a new task. Its flags say that it is queued, which the caller sees to.
    pub(crate) fn insert(&mut self, body: BodyRef) -> u32 {
        self.live += 1;
        if self.free != NIL {
            let id = self.free;
            body.slot.set(id);
            let slot = &mut self.slots[id as usize];
            self.free = slot.waits;
            *slot = Slot {
                body: Some(body),
                waits: NIL,
                scopes: NIL,
                joiners: NIL,
                flags: Flags::QUEUED,
                ..*slot
            };
            return id;
        }
        assert!(
            self.slots.len() < MAX_SLOTS,
            "a kernel holds at most 2^28 tasks"
        );
        let id = self.slots.len() as u32;
        body.slot.set(id);
        self.slots.push(Slot {
            body: Some(body),
            generation: 0,
            waits: NIL,
            scopes: NIL,
            joiners: NIL,
            flags: Flags::QUEUED,
        });
        id
    }

    /// Ends a task: takes the body out of the slot and moves the slot to its next generation. A slot that still stands in the ready queue
    /// is freed when it is popped there, lest its next task be queued twice.
    pub(crate) fn retire(&mut self, id: u32) -> BodyRef {
        self.live -= 1;
        let slot = &mut self.slots[id as usize];
        let body = slot.body.take().expect("only a live task is retired");
        slot.generation = slot.generation.wrapping_add(1);
        if !slot.flags.has(Flags::QUEUED) {
            self.free_slot(id);
        }
        body
    }

    pub(crate) fn free_slot(&mut self, id: u32) {
        let slot = &mut self.slots[id as usize];
        slot.waits = self.free;
        self.free = id;
    }

    pub(crate) fn get(&self, id: u32) -> Option<&Slot> {
        self.slots.get(id as usize)
    }

    pub(crate) fn get_mut(&mut self, id: u32) -> Option<&mut Slot> {
        self.slots.get_mut(id as usize)
    }

    /// Every live task's slot.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Slot)> {
        (0u32..)
            .zip(&self.slots)
            .filter(|(_, slot)| slot.body.is_some())
    }
}

impl std::ops::Index<u32> for Tasks {
    type Output = Slot;
    fn index(&self, id: u32) -> &Slot {
        &self.slots[id as usize]
    }
}

impl std::ops::IndexMut<u32> for Tasks {
    fn index_mut(&mut self, id: u32) -> &mut Slot {
        &mut self.slots[id as usize]
    }
}
