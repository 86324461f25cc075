//! What threads meet at: the standard library's locks and atomics or, in tests under `--cfg loom`, loom's, which tries every order of
//! their steps. What is worth such a test takes them from here.

#[cfg(all(test, loom))]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU8, Ordering},
};
#[cfg(not(all(test, loom)))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU8, Ordering},
};

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
