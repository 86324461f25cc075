//! Work on a pool of threads that the program has already, through the trap `future_wait`.
//!
//! `cargo run -p sweepea-kernel --example own_pool`

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use kernel::traps::future_wait;
use kernel::{Interrupt, spawn};

type Job = Box<dyn FnOnce() + Send>;

/// Stands for whichever pool the program has: all that is asked of it is that it runs a closure in some thread.
pub(crate) struct Pool {
    jobs: Option<mpsc::Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(crate) fn new(size: usize) -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let work = move || {
            loop {
                let job = queue.lock().unwrap().recv();
                let Ok(job) = job else { return };
                job();
            }
        };
        Self {
            jobs: Some(jobs),
            threads: (0..size).map(|_| thread::spawn(work.clone())).collect(),
        }
    }

    pub(crate) fn execute(&self, job: impl FnOnce() + Send + 'static) {
        let jobs = self.jobs.as_ref().expect("taken when it is dropped");
        jobs.send(Box::new(job)).expect("its threads wait for jobs");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            thread.join().expect("its jobs contain their panics");
        }
    }
}

/// Runs `call` in the pool and waits for its value.
///
/// Cancellation point: yes; the call runs on to its end, and its value is dropped there.
///
/// # Panics
/// With what the call panicked with, and if the pool dropped it.
pub(crate) async fn run_in_pool<T, F>(pool: &Pool, call: F) -> Result<T, Interrupt>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let outcome = Arc::new(Mutex::new(None));
    let there = Arc::clone(&outcome);
    // Called once the task is sure to hear of the answer. A completer that is dropped answers, too.
    future_wait(move |completer| {
        pool.execute(move || {
            let value = catch_unwind(AssertUnwindSafe(call));
            *there.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
            completer.complete();
        });
    })
    .await?;
    let outcome = outcome
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    match outcome.expect("the pool dropped the call") {
        Ok(value) => Ok(value),
        Err(payload) => resume_unwind(payload),
    }
}

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    kernel::run(async {
        let pool = std::rc::Rc::new(Pool::new(2));
        let calls = [5_u64, 10, 20].map(|n| {
            let pool = pool.clone();
            spawn(async move { run_in_pool(&pool, move || (1..=n).product::<u64>()).await })
        });
        for call in &calls {
            println!("{}", call.join().await??);
        }
        Ok(())
    })?
}
