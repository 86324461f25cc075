//! What threads meet at: the standard library's locks and atomics or, in tests under `--cfg loom`, loom's, which tries every order of
//! their steps. What is worth such a test takes them from here.

#[cfg(all(test, loom))]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering, fence},
};
#[cfg(not(all(test, loom)))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering, fence},
};

#[cfg(all(test, loom))]
pub(crate) use models::{Parker, Queue};
#[cfg(not(all(test, loom)))]
pub(crate) use real::{Parker, Queue};

#[cfg(not(all(test, loom)))]
mod real {
    use std::thread::{self, Thread};
    use std::time::Duration;

    use crossbeam_channel::{Receiver, Sender, unbounded};

    /// A first-in-first-out queue.
    pub(crate) struct Queue<T>(Sender<T>, Receiver<T>);

    impl<T> Queue<T> {
        pub(crate) fn new() -> Self {
            let (put, take) = unbounded();
            Self(put, take)
        }

        pub(crate) fn push(&self, item: T) {
            let pushed = self.0.send(item);
            pushed.expect("`self` holds the receiving end too");
        }

        pub(crate) fn pop(&self) -> Option<T> {
            self.1.try_recv().ok()
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.1.is_empty()
        }
    }

    /// Lets one thread, which made it, stand still until another unparks it, or for no reason.
    pub(crate) struct Parker(Thread);

    impl Parker {
        pub(crate) fn of_this_thread() -> Self {
            Self(thread::current())
        }

        pub(crate) fn park(&self) {
            thread::park();
        }

        pub(crate) fn nap(&self, time: Duration) {
            thread::park_timeout(time);
        }

        pub(crate) fn unpark(&self) {
            self.0.unpark();
        }
    }
}

/// What the models share.
#[cfg(all(test, loom))]
pub(crate) mod models {
    use std::cell::RefCell;
    use std::collections::VecDeque;
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::{Context, Poll, Wake, Waker};
    use std::time::Duration;

    use loom::sync::Notify;
    use loom::thread::{self, Thread};

    use super::{AtomicBool, AtomicUsize, Ordering};

    /// Runs `check` in every order in which threads are interrupted at most `preemptions` times, or `LOOM_MAX_PREEMPTIONS`; more find little and
    /// take for ever.
    pub(crate) fn model(preemptions: usize, check: impl Fn() + Send + Sync + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = model.preemption_bound.or(Some(preemptions));
        model.max_branches = 10_000;
        model.check(check);
    }

    /// Promises less than the real one: whether it is empty may be told late.
    pub(crate) struct Queue<T> {
        length: AtomicUsize,
        items: std::sync::Mutex<VecDeque<T>>,
    }

    impl<T> Queue<T> {
        pub(crate) fn new() -> Self {
            Self {
                length: AtomicUsize::new(0),
                items: std::sync::Mutex::default(),
            }
        }

        pub(crate) fn push(&self, item: T) {
            let length = self.length.fetch_add(1, Ordering::AcqRel);
            let mut items = self.items.lock().unwrap();
            assert_eq!(items.len(), length);
            items.push_back(item);
        }

        pub(crate) fn pop(&self) -> Option<T> {
            if self.is_empty() {
                return None;
            }
            let taken = |length: usize| length.checked_sub(1);
            let update = (Ordering::AcqRel, Ordering::Acquire);
            self.length.fetch_update(update.0, update.1, taken).ok()?;
            self.items.lock().unwrap().pop_front()
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.length.load(Ordering::Acquire) == 0
        }
    }

    /// Any thread may wait at it, one at a time.
    pub(crate) struct Parker {
        token: AtomicBool,
        parked: std::sync::Mutex<Option<Thread>>,
    }

    impl Parker {
        pub(crate) fn new() -> Self {
            Self {
                token: AtomicBool::new(false),
                parked: std::sync::Mutex::new(None),
            }
        }

        pub(crate) fn of_this_thread() -> Self {
            Self::new()
        }

        pub(crate) fn park(&self) {
            if !self.token.swap(false, Ordering::AcqRel) {
                *self.parked.lock().unwrap() = Some(thread::current());
                thread::park();
                self.token.swap(false, Ordering::AcqRel);
            }
        }

        /// Others go on meanwhile, how far is left open; in a [`Night`] until that is over.
        pub(crate) fn nap(&self, _: Duration) {
            match NIGHT.with_borrow(Clone::clone) {
                Some(night) => night.nap(),
                None => thread::yield_now(),
            }
        }

        pub(crate) fn unpark(&self) {
            self.token.swap(true, Ordering::AcqRel);
            // Loom's own `unpark` would also wake it from a lock.
            let parked = self.parked.lock().unwrap().take();
            if let Some(thread) = parked {
                thread.unpark();
            }
        }
    }

    std::thread_local! {
        /// All threads of a model share it.
        static NIGHT: RefCell<Option<Arc<Night>>> = const { RefCell::new(None) };
    }

    /// While it lasts nobody wakes from a nap: nothing may depend on one that does.
    pub(crate) struct Night {
        is_over: AtomicBool,
        napper: Parker,
    }

    impl Night {
        pub(crate) fn begin() -> Arc<Self> {
            let night = Arc::new(Self {
                is_over: AtomicBool::new(false),
                napper: Parker::new(),
            });
            NIGHT.set(Some(night.clone()));
            night
        }

        fn nap(&self) {
            // A load may be late.
            if !self.is_over.fetch_or(false, Ordering::AcqRel) {
                self.napper.park();
            }
        }

        pub(crate) fn end(self: Arc<Self>) {
            self.is_over.swap(true, Ordering::AcqRel);
            self.napper.unpark();
            NIGHT.take();
        }
    }

    struct Ring(Notify);

    impl Wake for Ring {
        fn wake(self: Arc<Self>) {
            self.0.notify();
        }
    }

    /// An executor of one future. A wake that is lost is a deadlock, which loom reports.
    pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        let ring = Arc::new(Ring(Notify::new()));
        let waker = Waker::from(ring.clone());
        loop {
            if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return value;
            }
            ring.0.wait();
        }
    }

    /// Polls once, with a waker that does nothing, and drops the future.
    pub(crate) fn poll_once<T>(future: impl Future<Output = T>) -> Option<T> {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }
}
