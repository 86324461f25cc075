//! The kernel's core against Curio's tests and the rules of cancellation, on the virtual clock wherever time passes.

mod cancel;
mod embedding;
mod idle;
pub(crate) mod logged;
mod ownership;
mod panics;
mod tasks;
mod timeouts;
mod traps;

use std::cell::RefCell;
use std::fmt::Display;
use std::future::Future;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use kernel::{Activation, Builder, Kernel, KernelView, VirtualClock};

fn virtual_kernel<'env>() -> (Kernel<'env>, VirtualClock) {
    let clock = VirtualClock::new();
    let kernel = Builder::new().clock(clock.clone()).build().unwrap();
    (kernel, clock)
}

/// Tells another thread that the kernel is about to sleep: what the thread sends after that must wake it.
struct Bedtime(mpsc::Sender<()>);

impl Activation for Bedtime {
    fn idle(&mut self, _: &KernelView<'_>) {
        let _ = self.0.send(());
    }
}

/// A kernel, and what its [`Bedtime`] tells.
fn told_of_sleep<'env>(builder: Builder) -> (Kernel<'env>, mpsc::Receiver<()>) {
    let (sender, asleep) = mpsc::channel();
    (builder.activation(Bedtime(sender)).build().unwrap(), asleep)
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
