//! Task slots, the bodies that hold the tasks' futures, and the memory that bodies are cut from.
//!
//! A task is a 24-byte *slot* in the task table, which is all that scheduling looks at, and a *body*: one block with a
//! header, and a place that first holds the future and then its output. The slot is freed the moment the task ends (its generation
//! grows, so that stale wakers miss); the body lives on while a handle refers to it, and so does the *chunk* that its block is part of.
//!
//! One of the two files of this crate with `unsafe`: the type of a future is erased here, and its output is written
//! over it. What must stay true:
//!
//! - a body never leaves its thread (`BodyRef` holds a raw pointer, so it is neither `Send` nor `Sync`);
//! - `stage` says what the place holds: the future while `Idle` or `Busy`, the output while `Value`, a panic's payload while `Panicked`, else nothing;
//! - while `Busy` the future is being polled or dropped further up the stack, and nobody else touches the place;
//! - a chunk is alive while one of its blocks is in use; a block that is not is on its chunk's list, or was never cut;
//! - user code (a future's `poll` or `drop`, an output's `drop`) runs only here, and always while no kernel table is borrowed.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::mem::{ManuallyDrop, offset_of};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::pin::Pin;
use std::ptr::{self, NonNull};
use std::task::{Context, Poll};

use super::nodes::NIL;
use super::waker::{GENERATION_BITS, MAX_SLOTS};
use crate::error::{JoinError, Panic, drop_quietly, panic_text};
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
/// The nodes of those who wait for its end outlive it.
const KEEPS_JOINERS: u8 = 8;
/// Somebody was told of its panic.
const REPORTED: u8 = 16;
/// The noted join of the one who waits for it was interrupted.
const LOST_JOIN: u8 = 32;
/// Observers or another thread are told what it does.
const WATCHED: u8 = 64;

const _: () = assert!(size_of::<Header>() == 48);

impl Header {
    /// Whether the task has not ended; then its slot is its own.
    pub(crate) fn is_live(&self) -> bool {
        matches!(self.stage.get(), Stage::Idle | Stage::Busy)
    }

    /// Whether somebody may still take its output; then there is a handle, and with it a reference.
    pub(crate) fn is_wanted(&self) -> bool {
        self.marks.get() & DETACHED == 0
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.marks.get() & CANCELLED != 0
    }

    /// Notes that a cancellation was asked for; false if it was before.
    pub(crate) fn mark_cancelled(&self) -> bool {
        let before = self.marks.replace(self.marks.get() | CANCELLED);
        before & CANCELLED == 0
    }

    /// Whether it has ended, and its end has freed the nodes of those who waited for it, so that they need not look into any table.
    /// So it is for nearly all tasks; but once one of the waits was given up or interrupted, nobody could tell whether it was that of his.
    #[inline]
    pub(crate) fn has_freed_joiners(&self) -> bool {
        !self.is_live() && !self.keeps_joiners()
    }

    pub(crate) fn keeps_joiners(&self) -> bool {
        self.marks.get() & KEEPS_JOINERS != 0
    }

    pub(crate) fn keep_joiners(&self) {
        self.marks.set(self.marks.get() | KEEPS_JOINERS);
    }

    /// See `joins`.
    pub(crate) fn has_lost_join(&self) -> bool {
        self.marks.get() & LOST_JOIN != 0
    }

    pub(crate) fn lose_join(&self) {
        self.marks.set(self.marks.get() | LOST_JOIN);
    }

    pub(crate) fn is_doomed(&self) -> bool {
        self.marks.get() & DOOMED != 0
    }

    pub(crate) fn doom(&self) {
        self.marks.set(self.marks.get() | DOOMED);
    }

    /// Its kernel has a `Watch`.
    pub(super) fn watch(&self) {
        self.marks.set(self.marks.get() | WATCHED);
    }

    /// Whether there is more to a poll of it than the poll.
    pub(super) fn is_special(&self) -> bool {
        self.marks.get() & (DOOMED | WATCHED) != 0
    }

    /// Whether its end is a matter of the tables alone: nobody is told, and its output waits for a join.
    pub(super) fn ends_quietly(&self) -> bool {
        self.marks.get() & (DETACHED | WATCHED) == 0
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
    /// Where the place begins. All that it can hold begins there, so that a value is taken out without a call.
    place: usize,
    layout: Layout,
    is_pooled: bool,
}

/// `header` comes first, so that a pointer to the body is one to its header.
#[repr(C)]
struct Body<F: Future> {
    header: Header,
    place: UnsafeCell<Place<F>>,
}

#[repr(C)]
union Place<F: Future> {
    future: ManuallyDrop<F>,
    output: ManuallyDrop<F::Output>,
    panic: ManuallyDrop<Box<dyn Any + Send>>,
}

impl<F: Future> Body<F> {
    const VTABLE: VTable = VTable {
        poll: Self::poll,
        clear: Self::clear,
        place: offset_of!(Self, place),
        layout: Layout::new::<Self>(),
        is_pooled: is_pooled(Layout::new::<Self>()),
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
        pool: &Pool,
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
        let layout = Body::<F>::VTABLE.layout;
        let block = match Body::<F>::VTABLE.is_pooled {
            true => pool.take(layout),
            false => {
                // SAFETY: a body is never empty: it has a header.
                let block = unsafe { alloc(layout) };
                NonNull::new(block).unwrap_or_else(|| handle_alloc_error(layout))
            }
        };
        let block = block.cast::<Body<F>>();
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

    /// Where the place begins.
    fn place<T>(&self) -> NonNull<T> {
        // SAFETY: the place is that far into the body's block.
        unsafe { self.0.byte_add(self.vtable.place).cast() }
    }

    /// Moves out what the place holds.
    ///
    /// # Safety
    /// It holds a `T`: the stage is `Value` and `T` the output of the body's future, or it is `Panicked` and `T` the payload.
    unsafe fn take<T>(&self) -> T {
        self.stage.set(Stage::Taken);
        // SAFETY: the place holds a `T` at its beginning, which nobody reads again, as the stage says from now on.
        unsafe { self.place().read() }
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

    /// The handle goes before anybody took the output.
    #[inline(never)]
    fn detach(&self) {
        self.marks.set(self.marks.get() | DETACHED);
        self.drop_unwanted_output();
    }

    /// Drops an output that nobody can take any more. It may borrow what the handle's type vouches for, so it must not live
    /// on in a body that a `TaskRef` keeps.
    pub(crate) fn drop_unwanted_output(&self) {
        if self.is_wanted() {
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
        // SAFETY: the stage says that the payload is there.
        Some(unsafe { self.take() })
    }

    /// Puts the payload back, or another in its place.
    pub(super) fn put_panic(&self, payload: Box<dyn Any + Send>) {
        assert!(self.stage.get() == Stage::Taken, "the place is taken");
        // SAFETY: the stage says that the place is empty; it has room for a payload, as for any other field of the union.
        unsafe { self.place().write(payload) };
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
        // Leaves one for `share`.
        assert!(
            self.refs.get() < u32::MAX - 1,
            "fewer than 2^32 references to a task"
        );
        self.share()
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
    /// A clone that needs no check, because it is not one too many: that of the loop, one at a time, or of a body's first slot.
    #[inline]
    pub(crate) fn share(&self) -> Self {
        self.refs.set(self.refs.get() + 1);
        Self(self.0)
    }

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
        unsafe {
            match self.vtable.is_pooled {
                true => Pool::give(self.0.cast()),
                false => dealloc(self.0.as_ptr().cast(), self.vtable.layout),
            }
        };
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
        // Mostly a join has taken the output.
        if self.body().stage.get() != Stage::Taken {
            self.body().detach();
        }
    }
}

impl<T> Handle<T> {
    pub(crate) const fn body(&self) -> &BodyRef {
        self.task.body()
    }

    /// The output, once the task has ended; `None` before that.
    #[inline]
    pub(crate) fn take(&self) -> Option<Result<T, JoinError>> {
        match self.body().stage.get() {
            Stage::Value => {
                // SAFETY: a value is there, of type `T`: `Handle<T>` is made by `BodyRef::with_future` alone, which ties `T` to the
                // future.
                Some(Ok(unsafe { self.body().take() }))
            }
            stage => Some(Err(self.take_error(stage)?)),
        }
    }

    /// Why there is no value, once the task has ended.
    #[inline(never)]
    fn take_error(&self, stage: Stage) -> Option<JoinError> {
        match stage {
            Stage::Idle | Stage::Busy | Stage::Value => None,
            Stage::Panicked => {
                let panic = self.body().take_panic()?;
                Some(JoinError::Panicked(Panic::new(panic)))
            }
            Stage::Aborted => Some(JoinError::Aborted),
            Stage::Taken => Some(JoinError::Taken),
        }
    }
}

/// Larger bodies get a block of their own from the allocator.
const LARGEST_POOLED: usize = 1024;
const GRAIN: usize = align_of::<Header>();
/// Size and alignment of a chunk, so that a block's address says where its chunk begins.
const CHUNK: usize = 256 * 1024;
const CHUNK_LAYOUT: Layout = match Layout::from_size_align(CHUNK, CHUNK) {
    Ok(layout) => layout,
    Err(_) => panic!("a power of two is an alignment"),
};
/// Blocks begin at multiples of it if their size is one.
const LARGEST_ALIGN: usize = 16;
const FIRST_BLOCK: usize = size_of::<Chunk>().next_multiple_of(LARGEST_ALIGN);

const fn is_pooled(layout: Layout) -> bool {
    layout.size() <= LARGEST_POOLED && layout.align() <= LARGEST_ALIGN
}

/// Where a kernel's bodies come from: chunks that are cut into blocks of one size each. Against the system's allocator this
/// saves its 8 to 24 bytes for each task, and its locks and searching.
///
/// The chunks of one size form a ring: the head, from which blocks are taken; chunks with room; full ones. A chunk that is empty and not
/// the head goes back to the allocator. Bodies may outlive the kernel: then the last one in a chunk frees it.
pub(crate) struct Pool {
    /// By size in grains.
    heads: [Cell<*mut Chunk>; LARGEST_POOLED / GRAIN + 1],
}

struct Chunk {
    /// Null once the pool is gone. (Never a `Pool` that was moved: `Core` holds it, in an `Rc`.)
    pool: *const Pool,
    next: *mut Self,
    prev: *mut Self,
    free: *mut FreeBlock,
    /// Bytes of a block.
    size: u32,
    /// Where the first block begins that was never in use.
    fresh: u32,
    /// Blocks in use.
    used: u32,
    is_head: bool,
}

struct FreeBlock {
    next: *mut Self,
}

impl Pool {
    pub(crate) const fn new() -> Self {
        Self {
            heads: [const { Cell::new(ptr::null_mut()) }; LARGEST_POOLED / GRAIN + 1],
        }
    }

    /// A block of that `layout`, which is a pooled one.
    #[inline]
    fn take(&self, layout: Layout) -> NonNull<u8> {
        let head = self.heads[layout.size() / GRAIN].get();
        // SAFETY: a head is null or a chunk of ours, and what is on its list are free blocks that `give` wrote to.
        unsafe {
            if let Some(head) = head.as_mut()
                && let Some(block) = NonNull::new(head.free)
            {
                head.free = block.as_ref().next;
                head.used += 1;
                return block.cast();
            }
        }
        self.take_fresh(layout)
    }

    /// The head's list is empty.
    #[inline(never)]
    fn take_fresh(&self, layout: Layout) -> NonNull<u8> {
        let place = &self.heads[layout.size() / GRAIN];
        // SAFETY: all chunks that are reached from a head are alive; a block that is cut lies within its chunk, one on a list is free.
        unsafe {
            let mut head = place.get();
            if head.is_null() || (*head).is_full() {
                let full = head;
                head = match full.is_null() || (*(*full).next).is_full() {
                    true => self.add_chunk(layout, full),
                    false => (*full).next,
                };
                if !full.is_null() {
                    (*full).is_head = false;
                }
                (*head).is_head = true;
                place.set(head);
            }
            (*head).used += 1;
            let free = (*head).free;
            if !free.is_null() {
                (*head).free = (*free).next;
                return NonNull::new_unchecked(free.cast());
            }
            let fresh = (*head).fresh;
            (*head).fresh += (*head).size;
            NonNull::new_unchecked(head.byte_add(fresh as usize).cast())
        }
    }

    /// A new chunk, before `next` in its ring, or in one of its own.
    ///
    /// # Safety
    /// `next` is null or a chunk in a ring.
    unsafe fn add_chunk(&self, layout: Layout, next: *mut Chunk) -> *mut Chunk {
        // SAFETY: the layout is not empty; the ring's chunks are alive per contract.
        unsafe {
            let chunk = alloc(CHUNK_LAYOUT).cast::<Chunk>();
            if chunk.is_null() {
                handle_alloc_error(CHUNK_LAYOUT);
            }
            chunk.write(Chunk {
                pool: self,
                next: chunk,
                prev: chunk,
                free: ptr::null_mut(),
                size: layout.size() as u32,
                fresh: FIRST_BLOCK as u32,
                used: 0,
                is_head: false,
            });
            if !next.is_null() {
                Chunk::link(chunk, (*next).prev);
            }
            chunk
        }
    }

    /// Takes a block back, if need be into the pool of a kernel that is gone.
    ///
    /// # Safety
    /// `block` came from `take`, on this thread, and is in nobody's use.
    #[inline]
    unsafe fn give(block: NonNull<u8>) {
        let chunk = block
            .as_ptr()
            .map_addr(|address| address & !(CHUNK - 1))
            .cast::<Chunk>();
        // SAFETY: the block is ours per contract, and its chunk alive as long as one of its blocks is in use.
        unsafe {
            match (*chunk).is_head {
                true => Chunk::put(chunk, block),
                false => Chunk::put_behind(chunk, block),
            }
        }
    }
}

impl Chunk {
    const fn is_full(&self) -> bool {
        self.free.is_null() && (self.fresh + self.size) as usize > CHUNK
    }

    /// # Safety
    /// `block` is one of the chunk's and in nobody's use.
    unsafe fn put(chunk: *mut Self, block: NonNull<u8>) {
        let block = block.cast::<FreeBlock>();
        // SAFETY: per contract; a block is aligned to `GRAIN` and larger than a `FreeBlock`.
        unsafe {
            let next = (*chunk).free;
            block.write(FreeBlock { next });
            (*chunk).free = block.as_ptr();
            (*chunk).used -= 1;
        }
    }

    /// `put` for a chunk that is not the head.
    ///
    /// # Safety
    /// As `put`.
    #[inline(never)]
    unsafe fn put_behind(chunk: *mut Self, block: NonNull<u8>) {
        // SAFETY: per contract; a ring's chunks are alive, and so is the pool if the chunk still knows it.
        unsafe {
            let was_full = (*chunk).is_full();
            Self::put(chunk, block);
            let has_pool = !(*chunk).pool.is_null();
            if (*chunk).used == 0 {
                if has_pool {
                    Self::unlink(chunk);
                }
                dealloc(chunk.cast(), CHUNK_LAYOUT);
            } else if was_full && has_pool {
                // It has room now, so its place is before the full ones.
                Self::unlink(chunk);
                let pool = &*(*chunk).pool;
                Self::link(chunk, pool.heads[(*chunk).size as usize / GRAIN].get());
            }
        }
    }

    /// Puts `chunk` behind `prev` in its ring.
    ///
    /// # Safety
    /// Both are alive, and `chunk` in no ring but its own.
    unsafe fn link(chunk: *mut Self, prev: *mut Self) {
        // SAFETY: per contract.
        unsafe {
            let next = (*prev).next;
            ((*chunk).prev, (*chunk).next) = (prev, next);
            (*prev).next = chunk;
            (*next).prev = chunk;
        }
    }

    /// Takes `chunk` out of its ring.
    ///
    /// # Safety
    /// It is in one with others, all of them alive.
    unsafe fn unlink(chunk: *mut Self) {
        // SAFETY: per contract.
        unsafe {
            (*(*chunk).prev).next = (*chunk).next;
            (*(*chunk).next).prev = (*chunk).prev;
        }
    }
}

impl Drop for Pool {
    /// Bodies that are still in use keep their chunks.
    fn drop(&mut self) {
        for head in &self.heads {
            let head = head.get();
            let mut chunk = head;
            while !chunk.is_null() {
                // SAFETY: the chunks of a ring are alive, and an empty one is in nobody's use.
                unsafe {
                    let next = (*chunk).next;
                    (*chunk).pool = ptr::null();
                    (*chunk).is_head = false;
                    if (*chunk).used == 0 {
                        dealloc(chunk.cast(), CHUNK_LAYOUT);
                    }
                    chunk = if next == head { ptr::null_mut() } else { next };
                }
            }
        }
    }
}

/// All that scheduling needs to know of a task.
pub(crate) struct Slot {
    /// `None` for a free slot.
    pub(crate) body: Option<BodyRef>,
    /// First of the nodes that the task waits at; the next free slot while this one is free.
    pub(crate) waits: u32,
    /// First of the task's scopes, see `scopes`.
    pub(crate) scopes: u32,
    /// First of the nodes that wait for its end, in a ring: the `prev` of the first is the last. Or a note, see `joins`.
    pub(crate) joiners: u32,
    pub(crate) flags: Flags,
}

const _: () = assert!(size_of::<Slot>() == 24);

impl Slot {
    /// Whether its task, when it ends, leaves more behind than the slot and those who wait for it.
    #[inline]
    pub(crate) fn leaves_more(&self) -> bool {
        self.waits != NIL || self.scopes != NIL || self.flags.has(Flags::LEAVES_MORE)
    }
}

/// What the scheduler and the canceller note about a task; and, in the upper 24 bits, the generation of its slot, which grows with each task
/// that had it. A waker keeps as many.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flags(u32);

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
    /// It has a name.
    pub(crate) const NAMED: Self = Self(64);
    /// It has a noted join.
    pub(crate) const JOINS: Self = Self(128);
    /// When it ends there is more to do than to free its slot.
    pub(crate) const LEAVES_MORE: Self = Self::CANCELLED
        .and(Self::LOCALS)
        .and(Self::NAMED)
        .and(Self::JOINS);

    const GENERATION_SHIFT: u32 = 32 - GENERATION_BITS;

    pub(crate) const fn generation(self) -> u32 {
        self.0 >> Self::GENERATION_SHIFT
    }

    /// Those of a new task in the slot of this one.
    const fn of_next_task(self) -> Self {
        let generation = (self.0 >> Self::GENERATION_SHIFT).wrapping_add(1);
        Self(generation << Self::GENERATION_SHIFT)
    }

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

    /// Puts a new task into a free slot. Its flags say that it is queued, which the caller sees to. `None` if no slot is free.
    #[inline]
    pub(crate) fn reuse(&mut self, body: &BodyRef) -> Option<u32> {
        let id = self.free;
        let slot = self.slots.get_mut(id as usize)?;
        debug_assert!(
            (slot.scopes, slot.joiners) == (NIL, NIL),
            "as `retire` left it"
        );
        self.free = slot.waits;
        self.live += 1;
        body.slot.set(id);
        let before = slot.body.replace(body.share());
        debug_assert!(before.is_none(), "a free slot has none");
        std::mem::forget(before); // so that nothing looks whether it is one to be dropped
        slot.waits = NIL;
        slot.flags.set(Flags::QUEUED);
        Some(id)
    }

    /// As `reuse`, with a slot that there was not yet.
    #[cold]
    pub(crate) fn push(&mut self, body: &BodyRef) -> u32 {
        assert!(
            self.slots.len() < MAX_SLOTS,
            "a kernel holds at most 2^28 tasks"
        );
        let id = self.slots.len() as u32;
        self.live += 1;
        body.slot.set(id);
        self.slots.push(Slot {
            body: Some(body.clone()),
            waits: NIL,
            scopes: NIL,
            joiners: NIL,
            flags: Flags::QUEUED,
        });
        id
    }

    /// Ends a task whose waits and scopes are gone and whose joiners are known: takes the body out of the slot and moves the slot to its next
    /// generation. A slot that still stands in the ready queue is freed when it is popped there, lest its next task be queued twice.
    #[inline]
    pub(crate) fn retire(&mut self, id: u32) -> BodyRef {
        self.live -= 1;
        let slot = &mut self.slots[id as usize];
        let body = slot.body.take().expect("only a live task is retired");
        slot.joiners = NIL;
        let is_queued = slot.flags.has(Flags::QUEUED);
        slot.flags = slot.flags.of_next_task();
        if !is_queued {
            slot.waits = self.free;
            self.free = id;
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

#[cfg(test)]
mod tests {
    use std::alloc::{GlobalAlloc, System};
    use std::panic::resume_unwind;
    use std::task::{RawWaker, RawWakerVTable, Waker};
    use std::time::Duration;

    use super::super::waker;
    use super::*;
    use crate::{Interrupt, spawn};

    impl Pool {
        /// How many chunks it holds for blocks of `layout`, and how many of their blocks are in use.
        fn chunks(&self, layout: Layout) -> (usize, u32) {
            let head = self.heads[layout.size() / GRAIN].get();
            let (mut chunks, mut used, mut chunk) = (0, 0, head);
            while !chunk.is_null() {
                // SAFETY: the chunks of a ring are alive.
                unsafe {
                    chunks += 1;
                    used += (*chunk).used;
                    assert_eq!((*chunk).is_head, chunk == head);
                    chunk = (*chunk).next;
                }
                if chunk == head {
                    break;
                }
            }
            (chunks, used)
        }
    }

    /// Takes blocks and fills them with bytes of their own.
    fn take(pool: &Pool, layout: Layout, count: usize) -> Vec<NonNull<u8>> {
        (0..count)
            .map(|n| {
                let block = pool.take(layout);
                assert_eq!(block.addr().get() % layout.align(), 0);
                // SAFETY: the block is ours and that large.
                unsafe { block.write_bytes(n as u8, layout.size()) };
                block
            })
            .collect()
    }

    fn is_filled(block: NonNull<u8>, layout: Layout, with: usize) -> bool {
        // SAFETY: the block is ours, that large, and written to.
        let bytes = unsafe { std::slice::from_raw_parts(block.as_ptr(), layout.size()) };
        bytes.iter().all(|&byte| byte == with as u8)
    }

    fn give(block: NonNull<u8>) {
        // SAFETY: the tests give each block back once.
        unsafe { Pool::give(block) };
    }

    #[test]
    fn blocks_do_not_overlap_and_an_empty_chunk_goes_back() {
        for (size, align) in [(64, 8), (72, 8), (80, 16), (1024, 8)] {
            let layout = Layout::from_size_align(size, align).unwrap();
            let pool = Pool::new();
            for round in 0..3 {
                let blocks = take(&pool, layout, 1000);
                for (n, &block) in blocks.iter().enumerate() {
                    assert!(is_filled(block, layout, n), "size {size}, round {round}");
                }
                let (most, used) = pool.chunks(layout);
                assert_eq!(used, 1000);
                assert!(most * (CHUNK - FIRST_BLOCK) / size >= 1000);
                // Every third first, so that chunks are found full, with room and empty.
                for k in 0..3 {
                    for &block in blocks.iter().skip(k).step_by(3) {
                        give(block);
                    }
                }
                assert_eq!(pool.chunks(layout), (1, 0), "size {size}, round {round}");
            }
        }
    }

    #[test]
    fn room_in_chunks_behind_the_head_is_used_before_a_new_chunk() {
        let layout = Layout::from_size_align(128, 8).unwrap();
        let pool = Pool::new();
        let mut blocks = take(&pool, layout, 1000);
        let (chunks, _) = pool.chunks(layout);
        for _ in 0..10 {
            for block in blocks.drain(..500) {
                give(block);
            }
            blocks.extend(take(&pool, layout, 500));
            assert!(pool.chunks(layout).0 <= chunks);
        }
        blocks.into_iter().for_each(give);
    }

    thread_local! {
        static VICTIM: Cell<Option<TaskRef>> = const { Cell::new(None) };
    }

    static VICIOUS: RawWakerVTable = RawWakerVTable::new(
        |data| {
            if let Some(victim) = VICTIM.take() {
                victim.abort();
            }
            RawWaker::new(data, &VICIOUS)
        },
        |_| {},
        |_| {},
        |_| {},
    );

    #[test]
    fn a_task_that_ends_while_the_waker_of_its_joiner_is_cloned_leaves_the_node() {
        let live = || waker::with_current(|core| core.unwrap().live_nodes());
        let waits = async {
            let before = live();
            let task = spawn(std::future::pending::<()>());
            VICTIM.set(Some(task.to_ref()));
            let mut wait = task.wait();
            // SAFETY: the functions of the vtable leave the data alone.
            let waker = unsafe { Waker::from_raw(RawWaker::new(ptr::null(), &VICIOUS)) };
            let first = Pin::new(&mut wait).poll(&mut Context::from_waker(&waker));
            assert!(first.is_pending() && task.is_terminated());
            assert_eq!(live(), before + 1);
            wait.await.unwrap();
            assert_eq!(live(), before);
        };
        crate::run(waits).unwrap();
    }

    /// The system's allocator; counts the bytes that each thread has in use.
    struct Counting;

    thread_local! {
        static IN_USE: Cell<isize> = const { Cell::new(0) };
    }

    fn in_use() -> isize {
        IN_USE.get()
    }

    fn count(change: isize) {
        let _ = IN_USE.try_with(|bytes| bytes.set(bytes.get() + change));
    }

    // SAFETY: the system's allocator does what it is asked to.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            count(layout.size() as isize);
            // SAFETY: as the caller promises.
            unsafe { System.alloc(layout) }
        }
        unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
            count(-(layout.size() as isize));
            // SAFETY: as the caller promises.
            unsafe { System.dealloc(block, layout) }
        }
    }

    #[global_allocator]
    static ALLOCATOR: Counting = Counting;

    #[test]
    fn chunks_go_back_whether_the_pool_goes_before_its_blocks_or_after() {
        let layout = Layout::from_size_align(256, 8).unwrap();
        let before = in_use();
        for pool_goes_first in [false, true] {
            let pool = Pool::new();
            let mut blocks = take(&pool, layout, 3000);
            // Of three chunks the second is emptied now, the others when the rest goes.
            blocks.drain(500..2500).for_each(give);
            if !pool_goes_first {
                blocks.drain(..).for_each(give);
            }
            drop(pool);
            blocks.into_iter().for_each(give);
            assert_eq!(in_use(), before);
        }
    }

    /// Ends in every way, with a body of `N` bytes and more.
    async fn end_in_every_way<const N: usize>() {
        let body = async || {
            let bulk = [0_u8; N];
            crate::sleep(Duration::from_millis(1)).await?;
            Ok::<_, Interrupt>((bulk, Box::new(bulk)))
        };
        spawn(body()).join().await.unwrap().unwrap();
        drop(spawn(body()));
        spawn(body()).to_ref().wait().await.unwrap();
        let unjoined = spawn(body());
        unjoined.wait().await.unwrap();
        drop(unjoined);
        spawn(body()).abort();
        let [aborted, cancelled] = [spawn(body()), spawn(body())];
        aborted.set_name("aborted");
        crate::yield_now().await.unwrap();
        aborted.abort();
        cancelled.cancel().await.unwrap();
        let panicked = spawn(async move {
            let _bulk = body().await;
            resume_unwind(Box::new([0_u8; N]));
        });
        assert!(panicked.join().await.is_err());
    }

    #[test]
    fn tasks_leave_no_memory_behind() {
        let builder = crate::Builder::new().clock(crate::VirtualClock::new());
        let mut kernel = builder.build().unwrap();
        let mut round = || {
            let small = end_in_every_way::<16>();
            kernel.run(small).unwrap();
            let large = end_in_every_way::<2000>();
            kernel.run(large).unwrap();
            in_use()
        };
        // Until the tables are as large as they get.
        let before = (0..5).map(|_| round()).last();
        let after = (0..20).map(|_| round()).last();
        assert_eq!(after, before);
    }

    #[test]
    fn blocks_outlive_their_pool() {
        let layout = Layout::from_size_align(256, 8).unwrap();
        let pool = Box::new(Pool::new());
        let mut blocks = take(&pool, layout, 3000);
        assert!(pool.chunks(layout).0 > 2, "each is freed by itself later");
        for block in blocks.drain(100..200) {
            give(block);
        }
        drop(pool);
        for (n, &block) in (0..100).chain(200..3000).zip(&blocks) {
            assert!(is_filled(block, layout, n));
        }
        blocks.into_iter().for_each(give);
    }
}
