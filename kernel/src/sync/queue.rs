//! Queues: a task puts items in, another takes them out.
//!
//! An item that is put is granted to the getter that waits longest, but stays in the queue until that has run; so an
//! item is never in flight between two tasks, where a cancellation could lose it. What is in the queue beyond the grants is free for whoever
//! comes. Room is granted to putters in the same way.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::{Line, Place};
use crate::error::{Interrupt, MaybeInterrupt};
use crate::runtime::WaitKind;
use crate::traps::{Lot, SchedWait, poll_proceed, sched_wait, sched_wake};

/// A queue of items, bounded or not (Curio's `Queue`). Items leave in the order they came; see [`PriorityQueue`] and
/// [`LifoQueue`] for others.
///
/// Curio's, with three differences: it can be closed; [`task_done`](Queue::task_done) checks its count, and [`join`](Queue::join) does not return
/// while an item is undone.
///
/// ```
/// use std::rc::Rc;
/// use kernel::sync::Queue;
///
/// # kernel::run(async {
/// let queue = Rc::new(Queue::new(Some(2)));
/// let producer = kernel::spawn({
///     let queue = queue.clone();
///     async move {
///         for n in 0..10 {
///             queue.put(n).await?;
///         }
///         queue.close();
///         Ok::<_, kernel::sync::QueueError>(())
///     }
/// });
/// let mut sum = 0;
/// while let Ok(n) = queue.get().await {
///     sum += n;
/// }
/// assert_eq!(sum, 45);
/// producer.join().await.unwrap().unwrap();
/// # }).unwrap();
/// ```
pub struct Queue<T, S = VecDeque<T>> {
    items: RefCell<S>,
    /// `usize::MAX`: as many as memory holds.
    maxsize: usize,
    /// Of its grants there are never more than items.
    getters: Line,
    putters: Line,
    /// Items that were put and not reported done.
    undone: Cell<usize>,
    joiners: Lot,
    is_closed: Cell<bool>,
    _items: PhantomData<T>,
}

/// A queue from which the smallest item leaves first; of equal ones, any.
pub type PriorityQueue<T> = Queue<T, BinaryHeap<Reverse<T>>>;

/// A queue from which the newest item leaves first.
pub type LifoQueue<T> = Queue<T, Vec<T>>;

/// What a queue keeps its items in, and thereby their order.
pub trait Store<T>: Default {
    /// Takes an item in.
    fn push(&mut self, item: T);
    /// Gives out the item whose turn it is.
    fn pop(&mut self) -> Option<T>;
    /// How many there are.
    fn len(&self) -> usize;
    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Store<T> for VecDeque<T> {
    fn push(&mut self, item: T) {
        self.push_back(item);
    }
    fn pop(&mut self) -> Option<T> {
        self.pop_front()
    }
    fn len(&self) -> usize {
        self.len()
    }
}

impl<T> Store<T> for Vec<T> {
    fn push(&mut self, item: T) {
        self.push(item);
    }
    fn pop(&mut self) -> Option<T> {
        self.pop()
    }
    fn len(&self) -> usize {
        self.len()
    }
}

impl<T: Ord> Store<T> for BinaryHeap<Reverse<T>> {
    fn push(&mut self, item: T) {
        self.push(Reverse(item));
    }
    fn pop(&mut self) -> Option<T> {
        self.pop().map(|Reverse(item)| item)
    }
    fn len(&self) -> usize {
        self.len()
    }
}

impl<T> Queue<T> {
    /// An empty queue for at most `maxsize` items; `None` sets no limit, and [`put`](Queue::put) then never waits.
    ///
    /// # Panics
    /// If `maxsize` is 0: nothing could ever be put.
    #[must_use]
    #[track_caller]
    pub fn new(maxsize: Option<usize>) -> Self {
        Self::ordered(maxsize)
    }
}

impl<T, S: Store<T>> Queue<T, S> {
    /// As [`Queue::new`], for queues of any order: `PriorityQueue::ordered(None)`.
    ///
    /// # Panics
    /// If `maxsize` is 0.
    #[must_use]
    #[track_caller]
    pub fn ordered(maxsize: Option<usize>) -> Self {
        assert!(maxsize != Some(0), "a queue needs room for one item");
        Self {
            items: RefCell::default(),
            maxsize: maxsize.unwrap_or(usize::MAX),
            getters: Line::default(),
            putters: Line::default(),
            undone: Cell::new(0),
            joiners: Lot::new(),
            is_closed: Cell::new(false),
            _items: PhantomData,
        }
    }

    /// Puts `item` in, waiting for room if it is full.
    ///
    /// Cancellation point: only if it has to wait. If dropped, so is the item; after an error [`Put::take_item`] has it.
    ///
    /// # Errors
    /// [`QueueError::Closed`], also if it is closed while this waits; [`QueueError::Interrupted`].
    #[track_caller]
    pub fn put(&self, item: T) -> Put<'_, T, S> {
        Put {
            queue: self,
            item: Some(item),
            place: self.putters.place(WaitKind::QueuePut),
        }
    }

    /// Takes an item out, waiting for one if there is none, or if all that are there have been granted to tasks that wait longer.
    ///
    /// Cancellation point: only if it has to wait. If dropped, no item is lost.
    ///
    /// # Errors
    /// [`QueueError::Closed`] once it is closed and empty; [`QueueError::Interrupted`].
    #[track_caller]
    pub fn get(&self) -> Get<'_, T, S> {
        Get {
            queue: self,
            place: self.getters.place(WaitKind::QueueGet),
        }
    }

    /// Waits until every item that was put has been reported done.
    ///
    /// Cancellation point: only if it has to wait. If dropped, nothing is lost.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn join(&self) -> QueueJoin<'_> {
        QueueJoin {
            undone: &self.undone,
            wait: sched_wait(&self.joiners, WaitKind::QueueJoin),
        }
    }

    /// Puts `item` in if that is possible now.
    ///
    /// # Errors
    /// The item: there is no room, or tasks that wait longer have a right to it; or the queue is closed.
    pub fn try_put(&self, item: T) -> Result<(), TryPutError<T>> {
        if self.is_closed() {
            Err(TryPutError::Closed(item))
        } else if !self.has_room() {
            Err(TryPutError::Full(item))
        } else {
            self.push(item);
            Ok(())
        }
    }

    /// Takes an item out if that is possible now.
    ///
    /// # Errors
    /// There is none, or only such as tasks that wait longer have a right to; or the queue is closed and empty.
    pub fn try_get(&self) -> Result<T, TryGetError> {
        if self.has_item() {
            Ok(self.pop())
        } else if self.is_drained() {
            Err(TryGetError::Closed)
        } else {
            Err(TryGetError::Empty)
        }
    }

    /// Reports one item that was got as done. When all are, [`join`](Queue::join) returns.
    ///
    /// # Panics
    /// If it is called more often than items were put.
    #[track_caller]
    pub fn task_done(&self) {
        let undone = self.undone.get().checked_sub(1);
        let undone = undone.expect("task_done was called more often than items were put");
        self.undone.set(undone);
        if undone == 0 {
            sched_wake(&self.joiners, usize::MAX);
        }
    }

    /// Closes it: nothing can be put any more, and those who wait to put are told so. What is in it can still be got; those who wait
    /// for more are told.
    pub fn close(&self) {
        if !self.is_closed.replace(true) {
            sched_wake(&self.putters.lot, usize::MAX);
            self.tell_if_drained();
        }
    }

    /// Whether it was closed.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.is_closed.get()
    }

    /// How many items are in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.borrow().len()
    }

    /// Whether it has no items.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it has as many items as it may. One without a limit never is.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.len() >= self.maxsize
    }

    /// Whether there is an item for somebody who comes now.
    fn has_item(&self) -> bool {
        self.len() > self.getters.granted()
    }

    /// Whether there is room for somebody who comes now.
    fn has_room(&self) -> bool {
        self.len().saturating_add(self.putters.granted()) < self.maxsize
    }

    fn is_drained(&self) -> bool {
        self.is_closed() && self.is_empty()
    }

    fn push(&self, item: T) {
        self.items.borrow_mut().push(item);
        self.undone.set(self.undone.get() + 1);
        self.getters.grant();
    }

    fn pop(&self) -> T {
        let item = self.items.borrow_mut().pop();
        if self.is_closed() {
            self.tell_if_drained();
        } else {
            self.putters.grant();
        }
        item.expect("there are never more grants than items")
    }

    /// No item will come any more: wakes those who wait for one. These wakes grant nothing.
    #[cold]
    fn tell_if_drained(&self) {
        if self.is_drained() {
            sched_wake(&self.getters.lot, usize::MAX);
        }
    }
}

impl<T, S: Store<T>> fmt::Debug for Queue<T, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("len", &self.len())
            .field("maxsize", &self.maxsize)
            .field("undone", &self.undone.get())
            .field("is_closed", &self.is_closed.get())
            .finish_non_exhaustive()
    }
}

/// Puts an item in; made by [`Queue::put`].
#[must_use = "a future does nothing until it is awaited"]
pub struct Put<'a, T, S: Store<T> = VecDeque<T>> {
    queue: &'a Queue<T, S>,
    item: Option<T>,
    place: Place<'a>,
}

impl<T, S: Store<T>> Put<'_, T, S> {
    /// The item, if it is not in the queue: for `let mut put = queue.put(item); (&mut put).await`, after an error.
    pub const fn take_item(&mut self) -> Option<T> {
        self.item.take()
    }
}

impl<T, S: Store<T>> Unpin for Put<'_, T, S> {}

impl<T, S: Store<T>> Future for Put<'_, T, S> {
    type Output = Result<(), QueueError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { queue, item, place } = self.get_mut();
        if !place.is_waiting() && queue.has_room() {
            ready!(poll_proceed(cx));
        } else if !queue.is_closed() || place.is_waiting() {
            ready!(place.poll(cx))?;
        }
        if queue.is_closed() {
            return Poll::Ready(Err(QueueError::Closed));
        }
        queue.push(
            item.take()
                .expect("a future is not polled after it was ready"),
        );
        Poll::Ready(Ok(()))
    }
}

impl<T, S: Store<T>> Drop for Put<'_, T, S> {
    fn drop(&mut self) {
        if self.place.leave() && !self.queue.is_closed() {
            self.queue.putters.grant();
        }
    }
}

impl<T, S: Store<T>> fmt::Debug for Put<'_, T, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Put").finish_non_exhaustive()
    }
}

/// Takes an item out; made by [`Queue::get`].
#[must_use = "a future does nothing until it is awaited"]
pub struct Get<'a, T, S: Store<T> = VecDeque<T>> {
    queue: &'a Queue<T, S>,
    place: Place<'a>,
}

impl<T, S: Store<T>> Unpin for Get<'_, T, S> {}

impl<T, S: Store<T>> Future for Get<'_, T, S> {
    type Output = Result<T, QueueError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { queue, place } = self.get_mut();
        if !place.is_waiting() && (queue.has_item() || queue.is_drained()) {
            ready!(poll_proceed(cx));
        } else {
            ready!(place.poll(cx))?;
        }
        if queue.is_drained() {
            return Poll::Ready(Err(QueueError::Closed));
        }
        Poll::Ready(Ok(queue.pop()))
    }
}

impl<T, S: Store<T>> Drop for Get<'_, T, S> {
    fn drop(&mut self) {
        if self.place.leave() && !self.queue.is_drained() {
            self.queue.getters.grant();
        }
    }
}

impl<T, S: Store<T>> fmt::Debug for Get<'_, T, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Get").finish_non_exhaustive()
    }
}

/// Waits until all items are done; made by [`Queue::join`].
#[derive(Debug)]
#[must_use = "a future does nothing until it is awaited"]
pub struct QueueJoin<'a> {
    undone: &'a Cell<usize>,
    wait: SchedWait<'a>,
}

impl Future for QueueJoin<'_> {
    type Output = Result<(), Interrupt>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.undone.get() == 0 && !self.wait.is_waiting() {
            ready!(poll_proceed(cx));
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(Pin::new(&mut self.wait).poll(cx))?;
            // An item may have been put between the wake and this poll.
            if self.undone.get() == 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

/// Why a queue took no item, or gave none.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// It is closed (and, to get, empty).
    #[error("the queue is closed")]
    Closed,
    /// The task was interrupted while it waited.
    #[error("{0}")]
    Interrupted(#[from] Interrupt),
}

impl MaybeInterrupt for QueueError {
    fn interrupt(&self) -> Option<&Interrupt> {
        match self {
            Self::Interrupted(interrupt) => Some(interrupt),
            Self::Closed => None,
        }
    }
}

/// Why [`Queue::try_put`] did not; it carries the item.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TryPutError<T> {
    /// There is no room, or none that is free.
    #[error("the queue is full")]
    Full(T),
    /// It is closed.
    #[error("the queue is closed")]
    Closed(T),
}

impl<T> TryPutError<T> {
    /// The item.
    pub fn into_item(self) -> T {
        match self {
            Self::Full(item) | Self::Closed(item) => item,
        }
    }
}

/// Why [`Queue::try_get`] gave nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TryGetError {
    /// There is no item, or none that is free.
    #[error("the queue is empty")]
    Empty,
    /// It is closed and empty.
    #[error("the queue is closed")]
    Closed,
}
