//! Values that belong to a task and are inherited by those it spawns: a request's id for every log line, a user, a deadline.
//!
//! A task begins with its parent's values, as they were when it was spawned; what either sets afterwards is its own (Curio's `Local`, and the
//! `contextvars` that took its place). One that is spawned from outside, with [`Kernel::spawn`](crate::Kernel::spawn) or by
//! [`Remote::call`](crate::Remote::call), begins with none, so nothing travels from one kernel to another.
//!
//! ```
//! use kernel::TaskLocal;
//! use kernel::{spawn, yield_now};
//!
//! static REQUEST: TaskLocal<u32> = TaskLocal::new();
//!
//! # kernel::run(async {
//! REQUEST.set(7);
//! let child = spawn(async {
//!     assert_eq!(REQUEST.get(), Some(7)); // inherited
//!     REQUEST.set(8);
//! });
//! child.join().await.unwrap();
//! assert_eq!(REQUEST.get(), Some(7)); // the child's was its own
//!
//! // For the time of one future only, and for what is spawned there.
//! let inside = REQUEST.scope(9, async { REQUEST.get() });
//! assert_eq!(inside.await, Some(9));
//! assert_eq!(REQUEST.get(), Some(7));
//! # }).unwrap();
//! ```
//!
//! A thread that [`spawn_thread`](crate::spawn_thread) started has a task, and asks there: `thread::run(async || Ok(REQUEST.get()))`.
//!
//! **Cost.** The values of a task are a small vector, shared by reference count: to inherit is to count one up, and the first who sets something after that
//! copies the vector, not the values. A task without values costs nothing but the question whether anybody has some.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use pin_project_lite::pin_project;

use crate::error::{drop_quietly, panic_text};
use crate::traps::call;

/// A value of which each task has its own; see [the module](self). Most often a `static`.
///
/// A value lives until its task and those that inherited it have ended, or have set another one; not only as long as the `TaskLocal`.
pub struct TaskLocal<T> {
    /// Which one it is; 0 before it is first used.
    key: AtomicU64,
    /// Each thread has its own values: `T` itself never travels.
    value: PhantomData<fn() -> T>,
}

/// The last key given to a [`TaskLocal`].
static LAST_KEY: AtomicU64 = AtomicU64::new(0);

impl<T: 'static> TaskLocal<T> {
    /// One that no task has a value of.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            key: AtomicU64::new(0),
            value: PhantomData,
        }
    }

    /// The running task's value, if it has one.
    ///
    /// # Panics
    /// Outside a task; [`try_with`](Self::try_with) does not.
    #[track_caller]
    pub fn get(&self) -> Option<T>
    where
        T: Clone,
    {
        self.with(|value| value.cloned())
    }

    /// Calls `f` with the running task's value, if it has one. `f` may set another one; it goes on with this one.
    ///
    /// # Panics
    /// Outside a task; [`try_with`](Self::try_with) does not.
    #[track_caller]
    pub fn with<R>(&self, f: impl FnOnce(Option<&T>) -> R) -> R {
        match self.try_with(f) {
            Ok(result) => result,
            Err(outside) => panic!("{outside}"),
        }
    }

    /// As [`with`](Self::with), also outside a task, such as in a logger.
    ///
    /// # Errors
    /// [`OutsideTask`]; then `f` was not called.
    pub fn try_with<R>(&self, f: impl FnOnce(Option<&T>) -> R) -> Result<R, OutsideTask> {
        let value = self.find().ok_or(OutsideTask)?;
        Ok(f(value.as_deref().map(downcast)))
    }

    /// Gives the running task this value, and returns the one it had, which others may share that inherited it.
    ///
    /// # Panics
    /// Outside a task.
    #[track_caller]
    pub fn set(&self, value: T) -> Option<Rc<T>> {
        self.replace(Some(Rc::new(value)))
    }

    /// Takes the running task's value away from it, and returns it.
    ///
    /// # Panics
    /// Outside a task.
    #[track_caller]
    pub fn unset(&self) -> Option<Rc<T>> {
        self.replace(None)
    }

    /// Runs `future` with this value; around it, in the branches of a `select!` beside it for instance, the task keeps the one it has. Tasks spawned inside
    /// inherit it. What `future` sets holds until its end.
    ///
    /// Cancellation point: as the future. If dropped, the future is dropped, and still sees the value.
    ///
    /// # Panics
    /// When polled outside a task.
    pub fn scope<F: Future>(&self, value: T, future: F) -> Scoped<'_, T, F> {
        Scoped {
            local: self,
            value: Some(Rc::new(value)),
            future: Some(future),
        }
    }

    #[track_caller]
    fn replace(&self, value: Option<Rc<T>>) -> Option<Rc<T>> {
        match self.exchange(value) {
            Ok(before) => before,
            Err(outside) => panic!("{outside}"),
        }
    }

    fn exchange(&self, value: Option<Rc<T>>) -> Result<Option<Rc<T>>, OutsideTask> {
        let key = self.key();
        let mut value = value.map(|value| value as _);
        let before = call::locals_mut(|locals| locals.replace(key, value.take()));
        let before = before.ok_or(OutsideTask)?;
        Ok(before.map(|value| value.downcast().expect(OWN_TYPE)))
    }

    /// The running task's value; the outer `None`: there is no task.
    fn find(&self) -> Option<Option<Rc<dyn Any>>> {
        call::locals(|locals| locals?.get(self.key()))
    }

    fn key(&self) -> u64 {
        let key = self.key.load(Ordering::Relaxed);
        if key != 0 {
            return key;
        }
        // Whoever is second to store one takes that of the first.
        let fresh = LAST_KEY.fetch_add(1, Ordering::Relaxed) + 1;
        let stored = self
            .key
            .compare_exchange(0, fresh, Ordering::Relaxed, Ordering::Relaxed);
        stored.map_or_else(|first| first, |_| fresh)
    }
}

const OWN_TYPE: &str = "a key belongs to one `TaskLocal`, and so to one type";

fn downcast<T: 'static>(value: &dyn Any) -> &T {
    value.downcast_ref().expect(OWN_TYPE)
}

impl<T: 'static> Default for TaskLocal<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: 'static + fmt::Debug> fmt::Debug for TaskLocal<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.find() {
            Some(value) => {
                let value = value.as_deref().map(downcast::<T>);
                f.debug_tuple("TaskLocal").field(&value).finish()
            }
            None => f.write_str("TaskLocal(outside a task)"),
        }
    }
}

/// A task-local value was used where no task runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("task-local values belong to a task, and none runs on this thread")]
pub struct OutsideTask;

pin_project! {
    /// A future with a value of its own; made by [`TaskLocal::scope`].
    #[must_use = "a future does nothing until it is awaited"]
    pub struct Scoped<'a, T, F>
    where
        T: 'static,
    {
        local: &'a TaskLocal<T>,
        // What is in the scope while the future is not polled; what is around it while it is.
        value: Option<Rc<T>>,
        #[pin]
        future: Option<F>,
    }

    impl<T: 'static, F> PinnedDrop for Scoped<'_, T, F> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if this.future.is_none() {
                return;
            }
            // A kernel that closes drops futures outside of any task.
            let _inside = Inside::enter(this.local, this.value).ok();
            this.future.set(None);
        }
    }
}

impl<T: 'static, F: Future> Future for Scoped<'_, T, F> {
    type Output = F::Output;

    #[track_caller]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let mut this = self.project();
        let inside = match Inside::enter(this.local, this.value) {
            Ok(inside) => inside,
            Err(outside) => panic!("{outside}"),
        };
        let future = this.future.as_mut().as_pin_mut();
        let outcome = future.expect("polled after it was ready").poll(cx);
        if outcome.is_ready() {
            this.future.set(None);
        }
        drop(inside);
        outcome
    }
}

impl<T: 'static, F> fmt::Debug for Scoped<'_, T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scoped").finish_non_exhaustive()
    }
}

/// While this lives, the value of a scope has changed places with the task's.
struct Inside<'a, T: 'static> {
    local: &'a TaskLocal<T>,
    value: &'a mut Option<Rc<T>>,
}

impl<'a, T: 'static> Inside<'a, T> {
    fn enter(local: &'a TaskLocal<T>, value: &'a mut Option<Rc<T>>) -> Result<Self, OutsideTask> {
        local.find().ok_or(OutsideTask)?; // before the value is taken out of its place
        *value = local.exchange(value.take())?;
        Ok(Self { local, value })
    }
}

impl<T: 'static> Drop for Inside<'_, T> {
    fn drop(&mut self) {
        if let Ok(inner) = self.local.exchange(self.value.take()) {
            *self.value = inner;
        }
    }
}

/// The values of a task, by key; shared with its children until one of them sets something.
#[derive(Clone, Default)]
pub(crate) struct Locals(Rc<Vec<(u64, Rc<dyn Any>)>>);

impl Locals {
    fn get(&self, key: u64) -> Option<Rc<dyn Any>> {
        let (_, value) = self.0.iter().find(|(of, _)| *of == key)?;
        Some(Rc::clone(value))
    }

    fn replace(&mut self, key: u64, value: Option<Rc<dyn Any>>) -> Option<Rc<dyn Any>> {
        let values = Rc::make_mut(&mut self.0);
        let at = values.iter().position(|(of, _)| *of == key);
        match (at, value) {
            (Some(at), Some(value)) => Some(std::mem::replace(&mut values[at].1, value)),
            (Some(at), None) => Some(values.swap_remove(at).1),
            (None, Some(value)) => {
                values.push((key, value));
                None
            }
            (None, None) => None,
        }
    }

    /// Drops them at the end of their task, outside of any poll: a panic of a destructor is logged and goes no further.
    pub(crate) fn discard(self) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(self))) {
            let text = panic_text(&*panic);
            log::error!("panic while a task-local value was dropped: {text}");
            drop_quietly(panic);
        }
    }
}
