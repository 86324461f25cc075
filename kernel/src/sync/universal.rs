//! A flag and a value across threads: for tasks of any kernel, for other runtimes, and for threads that run none.
//!
//! Every wait comes in three forms. The plain one (`wait`) is for tasks of a kernel, which can interrupt it. `wait_blocking` is for threads.
//! `wait_anywhere` is an ordinary `Send` future, for tokio and its like.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use super::crossing::{Anywhere, Crossing, Errand, Line, Waiter, block_on, in_task};
use crate::error::Interrupt;

/// A flag that tasks of several kernels, and other threads, set and wait for (Curio's `UniversalEvent`). Clones are the same event.
///
/// ```
/// use kernel::sync::UniversalEvent;
///
/// let ready = UniversalEvent::new();
/// let setter = ready.clone();
/// std::thread::spawn(move || setter.set());
/// kernel::run(async { ready.wait().await }).unwrap().unwrap();
/// ```
#[derive(Clone, Default)]
pub struct UniversalEvent {
    shared: Arc<Crossing<Flag>>,
}

#[derive(Default)]
struct Flag {
    is_set: bool,
    line: Line,
}

impl UniversalEvent {
    /// An event that is not set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets it and wakes all who wait. Who was woken goes on even if the event is cleared before it runs.
    pub fn set(&self) {
        self.shared.with(|flag, woken| {
            flag.is_set = true;
            flag.line.grant_all(woken);
        });
    }

    /// Resets it: who comes now waits.
    pub fn clear(&self) {
        self.shared.with(|flag, _| flag.is_set = false);
    }

    /// Whether it is set.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.shared.with(|flag, _| flag.is_set)
    }

    /// Waits, in a task of a kernel, until it is set.
    ///
    /// Cancellation point: only if it has to wait. If dropped, nothing is lost.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn wait(&self) -> impl Future<Output = Result<(), Interrupt>> + use<> {
        in_task(&self.shared, WaitForFlag)
    }

    /// Waits, in a thread that runs no kernel, until it is set; for at most `timeout`, if there is one. False if it was not.
    ///
    /// In a task this would stop the whole kernel: use [`wait`](Self::wait) there.
    #[must_use = "false means that the event was not set"]
    pub fn wait_blocking(&self, timeout: Option<Duration>) -> bool {
        block_on(&mut Anywhere::new(&self.shared, WaitForFlag), timeout).is_some()
    }

    /// Waits, in any executor, until it is set. If dropped, nothing is lost.
    pub fn wait_anywhere(&self) -> impl Future<Output = ()> + Send + use<> {
        Anywhere::new(&self.shared, WaitForFlag)
    }
}

impl fmt::Debug for UniversalEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UniversalEvent")
            .field("is_set", &self.is_set())
            .finish_non_exhaustive()
    }
}

struct WaitForFlag;

impl Errand for WaitForFlag {
    type State = Flag;
    type Output = ();

    fn line(flag: &mut Flag) -> &mut Line {
        &mut flag.line
    }

    fn is_open(flag: &Flag) -> bool {
        flag.is_set
    }

    fn finish(&mut self, _: &mut Flag, _: &mut Vec<Waiter>) -> Option<()> {
        Some(())
    }

    fn hand_on(_: &mut Flag, _: &mut Vec<Waiter>) {}
}

/// A value that one thread or task gives, once, and any number wait for (Curio's `UniversalResult`). Clones are the same result; who
/// waits gets a clone of the value. For something that can fail, let `T` be a [`Result`].
///
/// ```
/// use kernel::sync::UniversalResult;
///
/// let answer = UniversalResult::new();
/// let giver = answer.clone();
/// std::thread::spawn(move || giver.set(42));
/// assert_eq!(kernel::run(async { answer.wait().await }).unwrap(), Ok(42));
/// assert_eq!(answer.wait_blocking(None), Some(42));
/// ```
pub struct UniversalResult<T> {
    shared: Arc<Crossing<Slot<T>>>,
}

struct Slot<T> {
    value: Option<T>,
    line: Line,
}

impl<T> UniversalResult<T> {
    /// A result that has no value yet.
    #[must_use]
    pub fn new() -> Self {
        let slot = Slot {
            value: None,
            line: Line::default(),
        };
        Self {
            shared: Arc::new(Crossing::new(slot)),
        }
    }

    /// Gives the value and wakes all who wait.
    ///
    /// # Errors
    /// The value, if there was one before; that one stands.
    pub fn set(&self, value: T) -> Result<(), T> {
        self.shared.with(|slot, woken| {
            if slot.value.is_some() {
                return Err(value);
            }
            slot.value = Some(value);
            slot.line.grant_all(woken);
            Ok(())
        })
    }

    /// Whether the value is there.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.shared.with(|slot, _| slot.value.is_some())
    }
}

impl<T: Clone> UniversalResult<T> {
    /// The value, if it is there.
    #[must_use]
    pub fn value(&self) -> Option<T> {
        self.shared.with(|slot, _| slot.value.clone())
    }

    /// Waits, in a task of a kernel, for the value.
    ///
    /// Cancellation point: only if it has to wait. If dropped, nothing is lost.
    ///
    /// # Errors
    /// An [`Interrupt`].
    #[track_caller]
    pub fn wait(&self) -> impl Future<Output = Result<T, Interrupt>> + use<T> {
        in_task(&self.shared, WaitForValue::new())
    }

    /// Waits, in a thread that runs no kernel, for the value; for at most `timeout`, if there is one. `None` if it did not come.
    ///
    /// In a task this would stop the whole kernel: use [`wait`](Self::wait) there.
    #[must_use]
    pub fn wait_blocking(&self, timeout: Option<Duration>) -> Option<T> {
        block_on(
            &mut Anywhere::new(&self.shared, WaitForValue::new()),
            timeout,
        )
    }

    /// Waits, in any executor, for the value. If dropped, nothing is lost.
    pub fn wait_anywhere(&self) -> impl Future<Output = T> + use<T> {
        Anywhere::new(&self.shared, WaitForValue::new())
    }
}

impl<T> Default for UniversalResult<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Clone for UniversalResult<T> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<T> fmt::Debug for UniversalResult<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UniversalResult")
            .field("is_set", &self.is_set())
            .finish_non_exhaustive()
    }
}

struct WaitForValue<T>(PhantomData<fn() -> T>);

impl<T> WaitForValue<T> {
    const fn new() -> Self {
        Self(PhantomData)
    }
}

impl<T: Clone> Errand for WaitForValue<T> {
    type State = Slot<T>;
    type Output = T;

    fn line(slot: &mut Slot<T>) -> &mut Line {
        &mut slot.line
    }

    fn is_open(slot: &Slot<T>) -> bool {
        slot.value.is_some()
    }

    fn finish(&mut self, slot: &mut Slot<T>, _: &mut Vec<Waiter>) -> Option<T> {
        slot.value.clone()
    }

    fn hand_on(_: &mut Slot<T>, _: &mut Vec<Waiter>) {}
}

/// Every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p sweepea-kernel --lib --release loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::thread;

    use super::*;
    use crate::primitives::models::{block_on, model, poll_once};

    #[test]
    fn loom_all_who_wait_for_an_event_are_woken() {
        model(3, || {
            let event = UniversalEvent::new();
            let waiter = event.clone();
            let waiter = thread::spawn(move || block_on(waiter.wait_anywhere()));
            let setter = event.clone();
            let setter = thread::spawn(move || setter.set());
            block_on(event.wait_anywhere());
            waiter.join().unwrap();
            setter.join().unwrap();
        });
    }

    #[test]
    fn loom_one_who_gives_up_takes_no_wake_with_it() {
        model(3, || {
            let event = UniversalEvent::new();
            let fickle = event.clone();
            let fickle = thread::spawn(move || poll_once(fickle.wait_anywhere()).is_some());
            let waiter = event.clone();
            let waiter = thread::spawn(move || block_on(waiter.wait_anywhere()));
            event.set();
            fickle.join().unwrap();
            waiter.join().unwrap();
        });
    }

    #[test]
    fn loom_of_two_values_one_stands_and_everybody_gets_it() {
        model(3, || {
            let result = UniversalResult::new();
            let givers = [1, 2].map(|value| {
                let result = result.clone();
                thread::spawn(move || result.set(value).is_ok())
            });
            let value = block_on(result.wait_anywhere());
            let [first, second] = givers.map(|giver| giver.join().unwrap());
            assert_ne!(first, second, "one was first");
            assert_eq!(value, if first { 1 } else { 2 });
            assert_eq!(result.value(), Some(value));
        });
    }
}
