//! Calls in threads that somebody else owns: rayon, a runtime's blocking pool, an executor of your own.

use std::future::Future;
use std::panic::{Location, resume_unwind};
use std::sync::Arc;

use super::call::{Call, End, Job};
use crate::error::{Interrupt, Reason};
use crate::traps::future_wait;

/// A call that a pool is to make, once, in whichever thread; given to the closure of [`run_on`].
pub type PoolJob = Box<dyn FnOnce() + Send>;

/// Hands `call` to a pool of your own and waits for its value (Curio's `run_in_executor`). `submit` gets the job and passes it on; it is called on the kernel's
/// thread and should not block.
///
/// The job is submitted only when the task waits for it: an interrupt that is pending prevents it.
///
/// Cancellation point: yes. If interrupted or dropped, the caller goes on at once. The job stays with its pool: one that has not begun does nothing when its turn comes,
/// one that has goes on to its end, and its value is dropped there.
///
/// # Errors
/// An [`Interrupt`]; also, as a cancellation, when the pool drops the job without running it.
///
/// # Panics
/// With what the call panicked with; the pool's thread does not see that.
///
/// ```
/// use std::sync::mpsc;
/// use std::thread;
/// use kernel::{PoolJob, run_on};
///
/// // A pool of one thread.
/// let (pool, jobs) = mpsc::channel::<PoolJob>();
/// thread::spawn(move || jobs.into_iter().for_each(|job| job()));
///
/// # kernel::run(async {
/// let sum = run_on(|job| pool.send(job).unwrap(), || (1..=100).sum::<u32>()).await;
/// assert_eq!(sum, Ok(5050));
/// # }).unwrap();
/// ```
#[track_caller]
pub fn run_on<T, F>(
    submit: impl FnOnce(PoolJob),
    call: F,
) -> impl Future<Output = Result<T, Interrupt>>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let at = Location::caller();
    async move {
        let mut errand = Errand(None);
        let slot = &mut errand.0;
        let start = move |completer| {
            let call = Arc::new(Call::new(call, completer));
            *slot = Some(Arc::clone(&call));
            let job = Submitted(Some(call));
            submit(Box::new(move || job.run()));
        };
        future_wait(start).called_at(at).await?;
        let call = errand.0.take().expect("the wait was answered");
        match call.take() {
            Some(Ok(value)) => Ok(value),
            Some(Err(payload)) => resume_unwind(payload),
            None => Err(Interrupt::Cancelled(Reason::from(
                "the pool dropped the call without making it",
            ))),
        }
    }
}

/// The pool's side of a call.
struct Submitted<F: FnOnce() -> T + Send, T: Send + 'static>(Option<Arc<Call<F, T>>>);

impl<F: FnOnce() -> T + Send, T: Send + 'static> Submitted<F, T> {
    fn run(mut self) {
        match self.0.take().map(|call| call.run()) {
            // The kernel is woken at once: when the pool has its next answer is not known here.
            Some(End::Answered(ring)) => drop(ring),
            Some(End::Unmade | End::Zombie) | None => {}
        }
    }
}

impl<F: FnOnce() -> T + Send, T: Send + 'static> Drop for Submitted<F, T> {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            call.abandon();
        }
    }
}

/// The caller's side of a call, from its submission until its value is taken.
struct Errand<F, T>(Option<Arc<Call<F, T>>>);

impl<F, T> Drop for Errand<F, T> {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            call.abandon();
        }
    }
}
