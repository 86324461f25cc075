//! Looking into a kernel: observers, the ready-made debuggers, what happens after panics, the task tree, the watchdog and the monitor.
//! The last two are other threads: their tests run in real time and wait for lines, however long those take.

mod activations;
mod monitor;
mod panics;
mod places;
mod tree;
mod watchdog;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use kernel::{Activation, Builder, KernelView, StepEnd, TaskView, VirtualClock};

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn virtual_builder() -> (Builder, VirtualClock) {
    let clock = VirtualClock::new();
    (Builder::new().clock(clock.clone()), clock)
}

/// Writes down all that it is told, with the tasks' numbers.
#[derive(Clone, Default)]
struct Diary(Rc<RefCell<Vec<String>>>);

impl Diary {
    fn note(&self, what: impl Into<String>) {
        self.0.borrow_mut().push(what.into());
    }

    fn take(&self) -> Vec<String> {
        self.0.take()
    }
}

impl Activation for Diary {
    fn activate(&mut self, kernel: &KernelView<'_>) {
        assert!(kernel.tasks().is_empty());
        self.note("activate");
    }
    fn created(&mut self, task: &TaskView<'_>) {
        self.note(format!("{} created", task.id()));
    }
    fn running(&mut self, task: &TaskView<'_>) {
        self.note(format!("{} running", task.id()));
    }
    fn suspended(&mut self, task: &TaskView<'_>, end: StepEnd) {
        let end = match end {
            StepEnd::Waits(kind, _) => format!("{kind:?}"),
            other => format!("{other:?}"),
        };
        self.note(format!("{} suspended {end}", task.id()));
    }
    fn terminated(&mut self, task: &TaskView<'_>) {
        self.note(format!("{} terminated", task.id()));
    }
}
