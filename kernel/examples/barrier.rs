//! A primitive of one's own, built outside the crate on `kernel::traps` alone: a barrier, at which tasks wait until so many have come.
//!
//! `cargo run -p sweepea-kernel --example barrier`

use std::rc::Rc;

use kernel::traps::{Lot, WaitKind, sched_wait, sched_wake};
use kernel::{Interrupt, spawn, yield_now};

/// Lets `size` tasks go on together, and then the next `size`.
pub(crate) struct Barrier {
    size: usize,
    /// Who waits. A task that is interrupted or dropped is out of it by itself, so nothing else need be counted.
    lot: Lot,
}

impl Barrier {
    pub(crate) fn new(size: usize) -> Self {
        let lot = Lot::new();
        Self { size, lot }
    }

    /// Waits for the others. True for the one that came last.
    ///
    /// Cancellation point: for all but the last. Who is interrupted or dropped has not come.
    pub(crate) async fn wait(&self) -> Result<bool, Interrupt> {
        let is_last = self.lot.len() + 1 >= self.size;
        if is_last {
            sched_wake(&self.lot, self.size);
        } else {
            sched_wait(&self.lot, WaitKind::Custom).await?;
        }
        Ok(is_last)
    }
}

/// Three tasks go through two phases; none begins the second before all have done the first.
pub(crate) async fn phases() -> Vec<String> {
    let barrier = Rc::new(Barrier::new(3));
    let log = Rc::new(std::cell::RefCell::new(Vec::new()));
    let tasks = ["a", "b", "c"].map(|name| {
        let (barrier, log) = (barrier.clone(), log.clone());
        spawn(async move {
            for phase in 1..=2 {
                for _ in 0..name.len() * phase {
                    yield_now().await?; // some work
                }
                log.borrow_mut().push(format!("{name}{phase}"));
                barrier.wait().await?;
            }
            Ok::<_, Interrupt>(())
        })
    });
    for task in &tasks {
        task.join().await.unwrap().unwrap();
    }
    log.take()
}

pub(crate) fn main() -> Result<(), kernel::RunError> {
    let log = kernel::run(phases())?;
    println!("{}", log.join(" "));
    Ok(())
}
