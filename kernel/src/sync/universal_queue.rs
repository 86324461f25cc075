//! A queue across threads.
//!
//! As in the [`Queue`](super::Queue) of one kernel, an item that is granted to a getter stays in the queue until that has taken it. A getter that
//! goes away with a grant leaves the item where it is, at the head, be the queue full or not; Curio's puts it back,
//! and loses it if a put has taken the room meanwhile.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::ioctl_fionbio;

use super::crossing::{Anywhere, Crossing, Errand, InTask, Line, Waiter, block_on, in_task};
use super::{QueueError, TryGetError, TryPutError};
use crate::error::Interrupt;
use crate::traps::Completer;

/// A queue for tasks of any kernel, for other runtimes and for threads that run none (Curio's `UniversalQueue`). Clones are the same queue.
/// Items leave in the order they came.
///
/// Every operation that may wait comes in three forms: `get` for tasks of a kernel, `get_blocking` for threads, `get_anywhere` for any executor. For event loops
/// there is a descriptor: see [`with_fd`](UniversalQueue::with_fd).
///
/// ```
/// use kernel::sync::UniversalQueue;
///
/// let queue = UniversalQueue::new(Some(2));
/// let producer = queue.clone();
/// std::thread::spawn(move || {
///     for n in 0..10 {
///         producer.put_blocking(n, None).unwrap();
///     }
///     producer.close();
/// });
/// let sum = kernel::run(async move {
///     let mut sum = 0;
///     while let Ok(n) = queue.get().await {
///         sum += n;
///     }
///     sum
/// });
/// assert_eq!(sum.unwrap(), 45);
/// ```
pub struct UniversalQueue<T> {
    shared: Arc<Crossing<State<T>>>,
    signal: Option<Arc<Signal>>,
}

struct State<T> {
    items: VecDeque<T>,
    /// `usize::MAX`: as many as memory holds.
    maxsize: usize,
    /// Of its grants there are never more than items, until it is closed and empty.
    getters: Line,
    putters: Line,
    /// Items that were put and not reported done.
    undone: usize,
    joiners: Line,
    is_closed: bool,
    signal: Option<Arc<Signal>>,
}

impl<T> UniversalQueue<T> {
    /// An empty queue for at most `maxsize` items; `None` sets no limit, and a put then never waits.
    ///
    /// # Panics
    /// If `maxsize` is 0: nothing could ever be put.
    #[must_use]
    #[track_caller]
    pub fn new(maxsize: Option<usize>) -> Self {
        Self::build(maxsize, None)
    }

    /// As [`new`](Self::new), with a [descriptor](Self::fd) for event loops that cannot wait otherwise (Curio's `withfd`).
    ///
    /// # Errors
    /// Those of `pipe(2)`.
    ///
    /// # Panics
    /// If `maxsize` is 0.
    #[track_caller]
    pub fn with_fd(maxsize: Option<usize>) -> io::Result<Self> {
        Ok(Self::build(maxsize, Some(Arc::new(Signal::new()?))))
    }

    #[track_caller]
    fn build(maxsize: Option<usize>, signal: Option<Arc<Signal>>) -> Self {
        assert!(maxsize != Some(0), "a queue needs room for one item");
        let state = State {
            items: VecDeque::new(),
            maxsize: maxsize.unwrap_or(usize::MAX),
            getters: Line::default(),
            putters: Line::default(),
            undone: 0,
            joiners: Line::default(),
            is_closed: false,
            signal: signal.clone(),
        };
        Self {
            shared: Arc::new(Crossing::new(state)),
            signal,
        }
    }

    /// The descriptor of a queue that was made with one. It is readable while [`try_get`](Self::try_get) has an answer other than
    /// [`Empty`](TryGetError::Empty), and each item raises it anew, for pollers that tell changes only. There is no need to read from it, and no harm.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.signal.as_ref().map(|signal| signal.reader.as_fd())
    }

    /// Puts `item` in, from a task of a kernel, waiting for room if it is full.
    ///
    /// Cancellation point: only if it has to wait. If dropped, so is the item; after an error [`UniversalPut::take_item`] has it.
    ///
    /// # Errors
    /// [`QueueError::Closed`], also if it is closed while this waits; [`QueueError::Interrupted`].
    #[track_caller]
    pub fn put(&self, item: T) -> UniversalPut<T, impl FnOnce(Completer) + Clone + use<T>> {
        UniversalPut {
            visit: in_task(&self.shared, PutItem(Some(item))),
        }
    }

    /// Puts `item` in, from a thread that runs no kernel, waiting for room if it is full; for at most `timeout`, if there is one.
    ///
    /// In a task this would stop the whole kernel: use [`put`](Self::put) there.
    ///
    /// # Errors
    /// The item: there was no room in time, or the queue is closed.
    pub fn put_blocking(&self, item: T, timeout: Option<Duration>) -> Result<(), TryPutError<T>> {
        let mut visit = Anywhere::new(&self.shared, PutItem(Some(item)));
        block_on(&mut visit, timeout)
            .or_else(|| visit.attempt())
            .unwrap_or_else(|| Err(TryPutError::Full(visit.errand().take())))
    }

    /// Puts `item` in, in any executor, waiting for room if it is full. If dropped, so is the item.
    ///
    /// # Errors
    /// The item: the queue is closed.
    pub fn put_anywhere(
        &self,
        item: T,
    ) -> impl Future<Output = Result<(), TryPutError<T>>> + use<T> {
        Anywhere::new(&self.shared, PutItem(Some(item)))
    }

    /// Puts `item` in if that is possible now.
    ///
    /// # Errors
    /// The item: there is no room, or those who wait longer have a right to it; or the queue is closed.
    pub fn try_put(&self, item: T) -> Result<(), TryPutError<T>> {
        let mut visit = Anywhere::new(&self.shared, PutItem(Some(item)));
        let outcome = visit.attempt();
        outcome.unwrap_or_else(|| Err(TryPutError::Full(visit.errand().take())))
    }

    /// Takes an item out, in a task of a kernel, waiting for one if there is none that is free.
    ///
    /// Cancellation point: only if it has to wait. If dropped or interrupted, no item is lost.
    ///
    /// # Errors
    /// [`QueueError::Closed`] once it is closed and empty; [`QueueError::Interrupted`].
    #[track_caller]
    pub fn get(&self) -> impl Future<Output = Result<T, QueueError>> + use<T> {
        let visit = in_task(&self.shared, GetItem::new());
        async move { visit.await?.ok_or(QueueError::Closed) }
    }

    /// Takes an item out, in a thread that runs no kernel, waiting for one if there is none that is free; for at most `timeout`, if there is one.
    ///
    /// In a task this would stop the whole kernel: use [`get`](Self::get) there.
    ///
    /// # Errors
    /// There was none in time, or the queue is closed and empty.
    pub fn get_blocking(&self, timeout: Option<Duration>) -> Result<T, TryGetError> {
        let mut visit = Anywhere::new(&self.shared, GetItem::new());
        block_on(&mut visit, timeout)
            .or_else(|| visit.attempt())
            .map_or(Err(TryGetError::Empty), |item| {
                item.ok_or(TryGetError::Closed)
            })
    }

    /// Takes an item out, in any executor, waiting for one if there is none that is free; `None` once it is closed and empty. If
    /// dropped, no item is lost.
    pub fn get_anywhere(&self) -> impl Future<Output = Option<T>> + use<T> {
        Anywhere::new(&self.shared, GetItem::new())
    }

    /// Takes an item out if that is possible now.
    ///
    /// # Errors
    /// There is none, or only such as those who wait longer have a right to; or the queue is closed and empty.
    pub fn try_get(&self) -> Result<T, TryGetError> {
        let item = Anywhere::new(&self.shared, GetItem::new()).attempt();
        item.map_or(Err(TryGetError::Empty), |item| {
            item.ok_or(TryGetError::Closed)
        })
    }

    /// Reports one item that was got as done. When all are, the joins return.
    ///
    /// # Panics
    /// If it is called more often than items were put.
    #[track_caller]
    pub fn task_done(&self) {
        let counts = self.shared.with(|state, woken| {
            let Some(undone) = state.undone.checked_sub(1) else {
                return false;
            };
            state.undone = undone;
            if undone == 0 {
                state.joiners.grant_all(woken);
            }
            true
        });
        assert!(
            counts,
            "task_done was called more often than items were put"
        );
    }

    /// Waits, in a task of a kernel, until every item that was put has been reported done.
    ///
    /// Cancellation point: only if it has to wait. If dropped, nothing is lost.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn join(&self) -> impl Future<Output = Result<(), Interrupt>> + use<T> {
        in_task(&self.shared, AwaitDone::new())
    }

    /// Waits, in a thread that runs no kernel, until every item that was put has been reported done; for at most `timeout`, if there is one. False if
    /// they were not.
    #[must_use = "false means that items are undone"]
    pub fn join_blocking(&self, timeout: Option<Duration>) -> bool {
        block_on(&mut Anywhere::new(&self.shared, AwaitDone::new()), timeout).is_some()
    }

    /// Waits, in any executor, until every item that was put has been reported done. If dropped, nothing is lost.
    pub fn join_anywhere(&self) -> impl Future<Output = ()> + use<T> {
        Anywhere::new(&self.shared, AwaitDone::new())
    }

    /// Closes it: nothing can be put any more, and those who wait to put are told so. What is in it can still be got; those who wait
    /// for more are told.
    pub fn close(&self) {
        self.shared.with(|state, woken| {
            state.is_closed = true;
            state.putters.grant_all(woken);
            state.settle(woken);
        });
    }

    /// Whether it was closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.with(|state, _| state.is_closed)
    }

    /// How many items are in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.with(|state, _| state.items.len())
    }

    /// Whether it has no items.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it has as many items as it may. One without a limit never is.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.shared
            .with(|state, _| state.items.len() >= state.maxsize)
    }
}

impl<T> Clone for UniversalQueue<T> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            signal: self.signal.clone(),
        }
    }
}

impl<T> fmt::Debug for UniversalQueue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shared.with(|state, _| {
            f.debug_struct("UniversalQueue")
                .field("len", &state.items.len())
                .field("maxsize", &state.maxsize)
                .field("undone", &state.undone)
                .field("is_closed", &state.is_closed)
                .finish_non_exhaustive()
        })
    }
}

impl<T> State<T> {
    fn is_drained(&self) -> bool {
        self.is_closed && self.items.is_empty()
    }

    /// Whether there is an item for somebody who comes now.
    fn has_item(&self) -> bool {
        self.items.len() > self.getters.granted()
    }

    /// Whether there is room for somebody who comes now.
    fn has_room(&self) -> bool {
        self.items.len().saturating_add(self.putters.granted()) < self.maxsize
    }

    /// After a change: gives what has become free to those who wait for it, and raises or lowers the descriptor.
    fn settle(&mut self, woken: &mut Vec<Waiter>) {
        if self.is_drained() {
            self.getters.grant_all(woken);
        } else if self.has_item() {
            self.getters.grant(woken);
        }
        if !self.is_closed && self.has_room() {
            self.putters.grant(woken);
        }
        if let Some(signal) = &self.signal {
            signal.set(self.is_drained() || self.has_item());
        }
    }
}

struct GetItem<T>(PhantomData<fn() -> T>);

impl<T> GetItem<T> {
    const fn new() -> Self {
        Self(PhantomData)
    }
}

impl<T> Errand for GetItem<T> {
    type State = State<T>;
    /// `None`: closed and empty.
    type Output = Option<T>;

    fn line(state: &mut State<T>) -> &mut Line {
        &mut state.getters
    }

    fn is_open(state: &State<T>) -> bool {
        state.is_drained() || state.has_item()
    }

    fn finish(&mut self, state: &mut State<T>, woken: &mut Vec<Waiter>) -> Option<Option<T>> {
        let item = state.items.pop_front();
        debug_assert!(item.is_some() || state.is_closed, "a grant is an item");
        state.settle(woken);
        Some(item)
    }

    fn hand_on(state: &mut State<T>, woken: &mut Vec<Waiter>) {
        state.settle(woken);
    }
}

/// The item, until it is in the queue.
struct PutItem<T>(Option<T>);

impl<T> PutItem<T> {
    fn take(&mut self) -> T {
        self.0.take().expect("the item was not put")
    }
}

impl<T> Errand for PutItem<T> {
    type State = State<T>;
    type Output = Result<(), TryPutError<T>>;

    fn line(state: &mut State<T>) -> &mut Line {
        &mut state.putters
    }

    fn is_open(state: &State<T>) -> bool {
        state.is_closed || state.has_room()
    }

    fn finish(&mut self, state: &mut State<T>, woken: &mut Vec<Waiter>) -> Option<Self::Output> {
        let item = self.take();
        if state.is_closed {
            return Some(Err(TryPutError::Closed(item)));
        }
        state.items.push_back(item);
        state.undone += 1;
        state.settle(woken);
        Some(Ok(()))
    }

    fn hand_on(state: &mut State<T>, woken: &mut Vec<Waiter>) {
        state.settle(woken);
    }
}

struct AwaitDone<T>(PhantomData<fn() -> T>);

impl<T> AwaitDone<T> {
    const fn new() -> Self {
        Self(PhantomData)
    }
}

impl<T> Errand for AwaitDone<T> {
    type State = State<T>;
    type Output = ();

    fn line(state: &mut State<T>) -> &mut Line {
        &mut state.joiners
    }

    fn is_open(state: &State<T>) -> bool {
        state.undone == 0
    }

    /// An item may have been put between the wake and this.
    fn finish(&mut self, state: &mut State<T>, _: &mut Vec<Waiter>) -> Option<()> {
        (state.undone == 0).then_some(())
    }

    fn hand_on(_: &mut State<T>, _: &mut Vec<Waiter>) {}
}

/// Puts an item in; made by [`UniversalQueue::put`].
#[must_use = "a future does nothing until it is awaited"]
pub struct UniversalPut<T, F> {
    visit: InTask<PutItem<T>, F>,
}

impl<T, F> UniversalPut<T, F> {
    /// The item, if it was not put.
    pub fn take_item(&mut self) -> Option<T> {
        self.visit.errand().0.take()
    }
}

impl<T, F> Unpin for UniversalPut<T, F> {}

impl<T, F: FnOnce(Completer) + Clone> Future for UniversalPut<T, F> {
    type Output = Result<(), QueueError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.visit).poll(cx).map(|outcome| {
            outcome?.map_err(|refused| {
                *self.visit.errand() = PutItem(Some(refused.into_item()));
                QueueError::Closed
            })
        })
    }
}

impl<T, F> fmt::Debug for UniversalPut<T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UniversalPut").finish_non_exhaustive()
    }
}

/// A pipe that is readable while it has bytes. How many is of no interest, so a full pipe says no less than one with a byte in it.
struct Signal {
    reader: PipeReader,
    writer: PipeWriter,
}

impl Signal {
    fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        ioctl_fionbio(&reader, true)?;
        ioctl_fionbio(&writer, true)?;
        Ok(Self { reader, writer })
    }

    /// Neither call blocks. It is written even if it should be readable already: somebody may have read from it, and a poller that tells changes
    /// only wants one.
    fn set(&self, readable: bool) {
        if readable && matches!((&self.writer).write(&[0]), Ok(1)) {
            return;
        }
        let mut bytes = [0; 4096];
        while matches!((&self.reader).read(&mut bytes), Ok(1..)) {}
        if readable {
            // It was full; now it has room.
            let _room = (&self.writer).write(&[0]);
        }
    }
}

/// Every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p sweepea-kernel --lib --release loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::thread;

    use super::*;
    use crate::primitives::models::{block_on, model, poll_once};

    #[test]
    fn loom_a_full_queue_and_an_empty_one_make_both_sides_wait_and_lose_nothing() {
        model(3, || {
            let queue = UniversalQueue::new(Some(1));
            let producer = queue.clone();
            let producer = thread::spawn(move || {
                for item in 0..3 {
                    block_on(producer.put_anywhere(item)).unwrap();
                }
                producer.close();
            });
            for item in 0..3 {
                assert_eq!(block_on(queue.get_anywhere()), Some(item));
            }
            assert_eq!(block_on(queue.get_anywhere()), None);
            producer.join().unwrap();
        });
    }

    /// Whoever goes away with a grant hands it on; two items for two getters, of whom one may give up.
    #[test]
    fn loom_a_getter_that_gives_up_takes_no_item_with_it() {
        model(3, || {
            let queue = UniversalQueue::new(Some(1));
            let fickle = queue.clone();
            let fickle = thread::spawn(move || poll_once(fickle.get_anywhere()).flatten());
            let getter = queue.clone();
            let getter = thread::spawn(move || block_on(getter.get_anywhere()));
            block_on(queue.put_anywhere(1)).unwrap();
            let taken = fickle.join().unwrap();
            if taken.is_some() {
                block_on(queue.put_anywhere(2)).unwrap();
            }
            assert_eq!(
                getter.join().unwrap(),
                Some(if taken.is_some() { 2 } else { 1 })
            );
            assert!(queue.is_empty());
        });
    }

    #[test]
    fn loom_a_putter_that_gives_up_leaves_its_room_to_others() {
        model(3, || {
            let queue = UniversalQueue::new(Some(1));
            block_on(queue.put_anywhere(0)).unwrap();
            let fickle = queue.clone();
            let fickle = thread::spawn(move || poll_once(fickle.put_anywhere(1)).is_some());
            let putter = queue.clone();
            let putter = thread::spawn(move || block_on(putter.put_anywhere(2)).is_ok());
            assert_eq!(block_on(queue.get_anywhere()), Some(0));
            let mut rest = vec![block_on(queue.get_anywhere()).unwrap()];
            if fickle.join().unwrap() {
                rest.push(block_on(queue.get_anywhere()).unwrap());
            }
            assert!(putter.join().unwrap());
            rest.sort_unstable();
            assert!(rest == [2] || rest == [1, 2], "{rest:?}");
        });
    }
}
