//! Threads with a seat in the kernel (Curio's `AsyncThread`).
//!
//! [`run_in_thread`](crate::run_in_thread) is for a call that blocks and returns. What is here is for a longer piece of ordinary, blocking code that now
//! and then needs something of the kernel: a sleep that can be cancelled, a socket of the kernel's, a lock that tasks hold. It gets a thread
//! of its own and a *proxy*, a task like any other, in which the kernel runs the futures that the thread asks for with [`run`].
//!
//! So a thread is joined, cancelled and put into a [`TaskGroup`] as a task is. A cancellation cannot stop a thread in the middle of its own code; it
//! waits for the thread's next [`run`], or hits the one that goes on, and is the answer of a trap there. Shields and timeouts are used by running them: `run(|| timeout_after(...))`.
//!
//! ```
//! use std::time::Duration;
//! use kernel::thread::{self, spawn_thread};
//! use kernel::{Interrupt, sleep, timeout_after};
//!
//! kernel::run(async {
//!     let counter = spawn_thread(|| {
//!         let mut count = 0;
//!         while thread::run(|| sleep(Duration::from_millis(1))).is_ok() {
//!             count += 1;
//!         }
//!         count // cancelled
//!     });
//!     sleep(Duration::from_millis(20)).await?;
//!     counter.cancel().await?;
//!     println!("{} times", counter.join().await.unwrap());
//!     Ok::<_, Interrupt>(())
//! })
//! .unwrap()
//! .unwrap();
//! ```

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::thread;

use crate::cancel::shield;
use crate::error::{Interrupt, Reason};
use crate::group::TaskGroup;
use crate::sync::UniversalQueue;
use crate::task::{Task, TaskRef, spawn};

/// Starts `f` in a thread of its own. The task that stands for it ends when the thread does, with its value.
///
/// The thread starts when the task first runs. A task that is aborted, or whose kernel is closed, leaves the thread to itself: every
/// [`run`] answers that it is cancelled from then on.
///
/// # Panics
/// Outside a running kernel. The task panics with what the thread panicked with, and if no thread can be started.
#[track_caller]
pub fn spawn_thread<T, F>(f: F) -> Task<T>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    spawn_thread_with((), |_| f())
}

/// As [`spawn_thread`], for a thread that works with something of the kernel's, which never leaves the kernel's thread and so need not be
/// [`Send`]: a lock, a socket, a queue. Futures that the thread runs through the [`Door`] get at it.
///
/// # Panics
/// As [`spawn_thread`].
///
/// ```
/// use std::rc::Rc;
/// use kernel::sync::Lock;
/// use kernel::thread::spawn_thread_with;
/// use kernel::Interrupt;
///
/// # kernel::run(async {
/// let total = Rc::new(Lock::new(0));
/// let adder = spawn_thread_with(total.clone(), |door| {
///     for n in 1..=4 {
///         door.run(async move |total| {
///             *total.acquire().await? += n;
///             Ok::<_, Interrupt>(())
///         })?;
///     }
///     Ok::<_, Interrupt>(())
/// });
/// adder.join().await.unwrap().unwrap();
/// assert_eq!(*total.acquire().await.unwrap(), 10);
/// # }).unwrap();
/// ```
#[track_caller]
pub fn spawn_thread_with<L, T, F>(local: L, f: F) -> Task<T>
where
    L: 'static,
    T: Send + 'static,
    F: FnOnce(&Door<L>) -> T + Send + 'static,
{
    spawn(async move {
        let local: Rc<dyn Any> = Rc::new(local);
        let seat = Seat(UniversalQueue::new(None));
        let end = Arc::new(Mutex::new(None));
        let started = thread::Builder::new().name("kernel-thread".into()).spawn({
            let (requests, end) = (seat.0.clone(), Arc::clone(&end));
            move || {
                REQUESTS.set(Some(requests.clone()));
                let door = Door {
                    requests,
                    local: PhantomData,
                };
                let outcome = catch_unwind(AssertUnwindSafe(|| f(&door)));
                *end.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
                door.requests.close();
            }
        });
        if let Err(error) = started {
            panic!("no thread could be started: {error}");
        }
        // Between two requests there is nothing to interrupt: it is the next one that is.
        while let Ok(request) = shield(seat.0.get()).await {
            request(Rc::clone(&local)).await;
        }
        let outcome = end.lock().unwrap_or_else(PoisonError::into_inner).take();
        match outcome.expect("only the thread's end closes its queue") {
            Ok(value) => value,
            Err(payload) => resume_unwind(payload),
        }
    })
}

/// Runs a future on the kernel, in the task that stands for this thread, and blocks the thread for its answer (Curio's `AWAIT`). `make` is called
/// there too, so that the future need not be [`Send`].
///
/// Cancellation point: as the future. If the task is aborted or the kernel closed, the future is dropped, and the answer is [`Interrupt::Cancelled`].
///
/// # Errors
/// Those of the future; see above.
///
/// # Panics
/// With what the future panicked with. Outside of a thread that [`spawn_thread`] started: a task awaits, other threads have
/// [`Remote`](crate::Remote).
pub fn run<T, E, Fut>(make: impl FnOnce() -> Fut + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<Interrupt> + Send + 'static,
    Fut: Future<Output = Result<T, E>>,
{
    let requests = REQUESTS.with_borrow(Clone::clone);
    let requests = requests.expect("this thread has no seat in a kernel: use `spawn_thread`");
    request(&requests, async move |_| make().await)
}

/// The way from a thread to its task, and to what that holds for it; made by [`spawn_thread_with`].
pub struct Door<L> {
    requests: Requests,
    local: PhantomData<fn() -> L>,
}

impl<L: 'static> Door<L> {
    /// As [`run`], for a future that works with what was given to [`spawn_thread_with`].
    ///
    /// # Errors
    /// As [`run`].
    ///
    /// # Panics
    /// With what the future panicked with.
    pub fn run<T, E, F>(&self, make: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Interrupt> + Send + 'static,
        F: AsyncFnOnce(&L) -> Result<T, E> + Send + 'static,
    {
        request(&self.requests, async move |local: Rc<dyn Any>| {
            let local = local.downcast_ref::<L>();
            make(local.expect("the door and the task were made together")).await
        })
    }
}

impl<L> fmt::Debug for Door<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Door")
    }
}

impl<T: Send + 'static, E: Send + 'static> TaskGroup<T, E> {
    /// Starts a thread as a member; see [`spawn_thread`].
    ///
    /// # Panics
    /// Outside a running kernel.
    #[track_caller]
    pub fn spawn_thread(&mut self, f: impl FnOnce() -> Result<T, E> + Send + 'static) -> TaskRef {
        self.adopt(spawn_thread(f))
    }
}

/// Something that a thread wants done; it answers the thread itself.
type Request = Box<dyn FnOnce(Rc<dyn Any>) -> Pin<Box<dyn Future<Output = ()>>> + Send>;
type Requests = UniversalQueue<Request>;

thread_local! {
    /// Where this thread puts its requests, if it has a seat.
    static REQUESTS: RefCell<Option<Requests>> = const { RefCell::new(None) };
}

fn request<T, E, F>(requests: &Requests, make: F) -> Result<T, E>
where
    T: Send + 'static,
    E: From<Interrupt> + Send + 'static,
    F: AsyncFnOnce(Rc<dyn Any>) -> Result<T, E> + Send + 'static,
{
    let (reply, answer) = crossbeam_channel::bounded(1);
    let request: Request = Box::new(move |local| {
        Box::pin(async move {
            let mut body = pin!(async move { make(local).await });
            let outcome = poll_fn(|cx| {
                let polled = catch_unwind(AssertUnwindSafe(|| body.as_mut().poll(cx)));
                polled.map_or_else(|payload| Poll::Ready(Err(payload)), |poll| poll.map(Ok))
            });
            let _thread_waits = reply.send(outcome.await);
        })
    });
    // A request that is refused, or dropped unanswered, drops its end of the channel: at once, or we would wait for ourselves.
    drop(requests.try_put(request));
    match answer.recv() {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(payload)) => resume_unwind(payload),
        Err(_) => Err(Interrupt::Cancelled(Reason::from("the thread's task is gone")).into()),
    }
}

/// Where the task takes its requests from. When it is dropped, the thread is told that nobody does any more.
struct Seat(Requests);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.close();
        while self.0.try_get().is_ok() {}
    }
}
