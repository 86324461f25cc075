//! What threads meet at: the standard library's locks and atomics or, in tests under `--cfg loom`, loom's, which tries every order of
//! their steps. What is worth such a test takes them from here.

#[cfg(not(all(test, loom)))]
mod chosen {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
    pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::thread;

    pub(crate) use crossbeam_channel as channel;
}

#[cfg(all(test, loom))]
mod chosen {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU8, Ordering};
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use loom::thread;

    pub(crate) use super::loom_channel as channel;
}

pub(crate) use chosen::*;

/// A channel that loom sees into, as far as the thread pool needs one.
#[cfg(all(test, loom))]
pub(crate) mod loom_channel {
    use std::collections::VecDeque;
    use std::sync::Arc;

    use loom::sync::Mutex;

    pub(crate) struct Sender<T>(Arc<Mutex<VecDeque<T>>>);
    pub(crate) struct Receiver<T>(Arc<Mutex<VecDeque<T>>>);

    pub(crate) fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
        let items = Arc::new(Mutex::new(VecDeque::new()));
        (Sender(items.clone()), Receiver(items))
    }

    impl<T> Sender<T> {
        pub(crate) fn send(&self, item: T) -> Result<(), std::convert::Infallible> {
            self.0.lock().unwrap().push_back(item);
            Ok(())
        }
    }

    impl<T> Receiver<T> {
        pub(crate) fn try_recv(&self) -> Result<T, ()> {
            self.0.lock().unwrap().pop_front().ok_or(())
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.0.lock().unwrap().is_empty()
        }
    }
}

/// What the models share.
#[cfg(all(test, loom))]
pub(crate) mod models {
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::{Context, Poll, Wake, Waker};

    use loom::sync::Notify;

    /// Runs `check` in every order in which threads are interrupted at most `preemptions` times; more find little and take for ever.
    pub(crate) fn model(preemptions: usize, check: impl Fn() + Send + Sync + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(check);
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
