//! The kernel's core against Curio's tests and the rules of cancellation, on the virtual clock wherever time passes.

mod cancel;
mod embedding;
mod idle;
mod ownership;
mod panics;
mod tasks;
mod timeouts;
mod traps;

use std::cell::RefCell;
use std::fmt::Display;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use kernel::{Builder, Kernel, VirtualClock};

fn virtual_kernel<'env>() -> (Kernel<'env>, VirtualClock) {
    let clock = VirtualClock::new();
    let kernel = Builder::new().clock(clock.clone()).build().unwrap();
    (kernel, clock)
}

/// Runs `main` in a kernel of its own whose clock jumps.
fn run<T>(main: impl Future<Output = T>) -> T {
    virtual_kernel().0.run(main).unwrap()
}

/// As `run`, for what stalls the loop by moving the clock under it.
fn run_with<T, F: Future<Output = T>>(main: impl FnOnce(VirtualClock) -> F) -> T {
    let (mut kernel, clock) = virtual_kernel();
    kernel.run(main(clock)).unwrap()
}

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// What happened, in order.
#[derive(Clone, Default)]
struct Story(Rc<RefCell<Vec<String>>>);

impl Story {
    fn tell(&self, what: impl Display) {
        self.0.borrow_mut().push(what.to_string());
    }

    #[track_caller]
    fn assert(&self, expected: &[&str]) {
        assert_eq!(*self.0.borrow(), expected);
    }

    fn len(&self) -> usize {
        self.0.borrow().len()
    }
}

/// Tells the story when it is dropped.
struct Teller(Story, &'static str);

impl Drop for Teller {
    fn drop(&mut self) {
        self.0.tell(self.1);
    }
}
