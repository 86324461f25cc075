//! Work that another thread, and another runtime there, asks this kernel for.
//!
//! The other way needs nothing of ours: what another runtime spawns is a future here like any other, [`interruptible`](crate::interruptible) if it must be.

use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::error::{JoinError, Panic, Reason};
use crate::runtime::Remote;
use crate::task::{current_task, spawn};

impl Remote {
    /// Starts a task in the kernel and answers with a future of its value, which can be awaited in any runtime and on any thread. `make` is called on the kernel's thread, so
    /// that what it makes need not be [`Send`].
    ///
    /// If the future is dropped, the task goes on.
    ///
    /// ```
    /// let (remote, remotes) = std::sync::mpsc::channel();
    /// let (stop, stopped) = futures::channel::oneshot::channel::<()>();
    /// let thread = std::thread::spawn(move || {
    ///     kernel::run(async {
    ///         remote.send(kernel::traps::get_kernel().await).unwrap();
    ///         stopped.await
    ///     })
    /// });
    /// let kernel = remotes.recv().unwrap();
    ///
    /// // Any executor will do, here that of the `futures` crate.
    /// let slept = kernel.spawn(async || kernel::sleep(std::time::Duration::from_millis(1)).await);
    /// assert!(futures::executor::block_on(slept).unwrap().is_ok());
    /// let panicked = kernel.spawn(async || panic!("over there"));
    /// let error: Result<(), _> = futures::executor::block_on(panicked);
    /// assert_eq!(error.unwrap_err().to_string(), "task panicked: over there");
    /// drop(stop);
    /// assert!(thread.join().unwrap().is_ok());
    /// ```
    pub fn spawn<T, F>(&self, make: F) -> RemoteTask<T>
    where
        T: Send + 'static,
        F: AsyncFnOnce() -> T + Send + 'static,
    {
        let shared = Arc::new(Shared(Mutex::new(State {
            outcome: None,
            asker: None,
            cancel: None,
            task: None,
        })));
        let answer = Answer {
            shared: Arc::clone(&shared),
            is_told: false,
        };
        // If the kernel is gone the answer is dropped here, and with it says so.
        self.call(move || drop(spawn(answer.of(make))));
        RemoteTask { shared }
    }
}

/// A task of a kernel that is, or may be, on another thread; made by [`Remote::spawn`]. Awaiting it waits for the task's end.
///
/// Not a cancellation point, since it may be awaited anywhere; in a task of a kernel, [`interruptible`](crate::interruptible) makes it one. If
/// dropped, the task goes on.
///
/// Its errors are [`JoinError::Panicked`] if the task panicked, and [`JoinError::Aborted`] if it was dropped before its end or its kernel is gone. A
/// panic is told to the one who waits here and to nobody else.
#[must_use = "it is the only way to the task's value"]
pub struct RemoteTask<T> {
    shared: Arc<Shared<T>>,
}

impl<T> RemoteTask<T> {
    /// Asks for the task to be interrupted, as [`TaskRef::request_cancel`](crate::TaskRef::request_cancel) does. Only the first time counts. Does not wait.
    pub fn request_cancel(&self, why: impl Into<Reason>) {
        let mut state = self.shared.lock();
        state.cancel.get_or_insert_with(|| Some(why.into()));
        let task = state.task.clone();
        drop(state);
        if let Some(task) = task {
            task.wake();
        }
    }

    /// Whether its value, or what it failed with, is there.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.shared.lock().outcome.is_some()
    }
}

impl<T> Future for RemoteTask<T> {
    type Output = Result<T, JoinError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let waker = cx.waker().clone(); // user code, so nothing is locked
        let mut state = self.shared.lock();
        match state.outcome.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                let before = state.asker.replace(waker);
                drop(state);
                drop(before);
                Poll::Pending
            }
        }
    }
}

impl<T> fmt::Debug for RemoteTask<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteTask")
            .field("is_finished", &self.is_finished())
            .finish()
    }
}

/// What the two sides share.
struct Shared<T>(Mutex<State<T>>);

struct State<T> {
    outcome: Option<Result<T, JoinError>>,
    /// Who waits for it.
    asker: Option<Waker>,
    /// A cancellation was asked for; the inner `None`: and passed on.
    cancel: Option<Option<Reason>>,
    /// Wakes the task.
    task: Option<Waker>,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task's side. Dropped without an outcome, it says that the task was aborted.
struct Answer<T> {
    shared: Arc<Shared<T>>,
    is_told: bool,
}

impl<T> Answer<T> {
    async fn of(mut self, make: impl AsyncFnOnce() -> T) {
        let mut body = pin!(async { make().await });
        let outcome = poll_fn(|cx| {
            self.pass_cancel_on(cx);
            match catch_unwind(AssertUnwindSafe(|| body.as_mut().poll(cx))) {
                Ok(poll) => poll.map(Ok),
                Err(payload) => Poll::Ready(Err(JoinError::Panicked(Panic::new(payload)))),
            }
        });
        let outcome = outcome.await;
        self.is_told = true;
        self.tell(outcome);
    }

    fn pass_cancel_on(&self, cx: &Context<'_>) {
        let mut state = self.shared.lock();
        if state.task.is_none() {
            state.task = Some(cx.waker().clone());
        }
        let why = state.cancel.as_mut().and_then(Option::take);
        drop(state);
        if let Some(why) = why {
            current_task().request_cancel(why);
        }
    }

    fn tell(&self, outcome: Result<T, JoinError>) {
        let mut state = self.shared.lock();
        state.task = None;
        state.outcome = Some(outcome);
        let asker = state.asker.take();
        drop(state);
        if let Some(asker) = asker {
            asker.wake();
        }
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        if !self.is_told {
            self.tell(Err(JoinError::Aborted));
        }
    }
}
