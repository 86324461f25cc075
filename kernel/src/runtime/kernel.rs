//! The kernel as its owner has it: set it up, run it, make it a guest, shut it down.

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{Location, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::board::Board;
use super::watch::Observer;
use super::{Clock, Core, Handle, KERNELS, LOOK_INTERVAL, Remote, SystemClock, with_current};
use crate::activation::{Activation, OnPanic};
use crate::error::{Interrupt, RunError};
use crate::monitor::{Monitor, MonitorAddress};
use crate::task::TaskInfo;
use crate::watchdog::{Stuck, Watchdog, WatchdogThread};

/// How a [`Kernel`] is set up.
#[must_use]
pub struct Builder {
    pub(super) clock: Box<dyn Clock>,
    pub(super) io_interval: u32,
    pub(super) observers: Vec<Observer>,
    pub(super) on_panic: OnPanic,
    watchdog: Option<Watchdog>,
    monitor: Option<MonitorAddress>,
}

impl Builder {
    /// The system's clock, and a look at I/O at least every 61 polls.
    pub fn new() -> Self {
        Self {
            clock: Box::new(SystemClock),
            io_interval: LOOK_INTERVAL,
            observers: Vec::new(),
            on_panic: OnPanic::Contain,
            watchdog: None,
            monitor: None,
        }
    }

    /// Takes the time from `clock`, for instance a [`VirtualClock`](crate::VirtualClock).
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Box::new(clock);
        self
    }

    /// Looks at I/O, timers and other threads after this many polls although tasks are still ready.
    /// Fewer answer sooner, more cost less. At least 1.
    pub fn io_interval(mut self, polls: u32) -> Self {
        self.io_interval = polls.max(1);
        self
    }

    /// Adds an observer. Several are told of everything in the order in which they were added.
    pub fn activation(mut self, observer: impl Activation + 'static) -> Self {
        self.observers.push(Observer::new(observer));
        self
    }

    /// What happens when a task panics, apart from the main task of [`Kernel::run`], whose panic always leaves `run`. Panics of destructors, of
    /// observers and of [`Remote::call`]s are logged and go no further, whatever is said here.
    ///
    /// ```
    /// use std::panic::{AssertUnwindSafe, catch_unwind};
    /// use kernel::{Builder, OnPanic, sleep, spawn};
    /// use std::time::Duration;
    ///
    /// let mut kernel = Builder::new().on_panic(OnPanic::Propagate).build()?;
    /// let left = catch_unwind(AssertUnwindSafe(|| {
    ///     kernel.run(async {
    ///         spawn(async { panic!("nobody joins me") });
    ///         sleep(Duration::from_secs(3600)).await
    ///     })
    /// }));
    /// assert_eq!(left.unwrap_err().downcast_ref(), Some(&"nobody joins me"));
    /// # Ok::<(), kernel::RunError>(())
    /// ```
    pub fn on_panic(mut self, policy: OnPanic) -> Self {
        self.on_panic = policy;
        self
    }

    /// Has a thread look for tasks that run for longer than `limit` in one step, so that no other runs: each such step is logged as a warning when
    /// the limit is reached and whenever its time has doubled. In real time, whatever the kernel's clock. The loop pays two stores a step.
    pub fn watchdog(self, limit: Duration) -> Self {
        self.watchdog_with(limit, |stuck| log::warn!("{stuck}"))
    }

    /// As [`Builder::watchdog`], but calls `report`, in the watchdog's thread. A panic of it is logged and ends the watchdog.
    ///
    /// ```
    /// use std::sync::mpsc;
    /// use std::time::Duration;
    ///
    /// let (sender, reports) = mpsc::channel();
    /// let report = move |stuck: &kernel::Stuck| sender.send(stuck.to_string()).unwrap();
    /// let mut kernel = kernel::Builder::new()
    ///     .watchdog_with(Duration::from_millis(20), report)
    ///     .build()?;
    /// kernel.run(async {
    ///     let report = reports.recv().unwrap(); // blocks the whole kernel
    ///     assert!(report.starts_with("task 1 spawned at "), "{report}");
    /// })?;
    /// # Ok::<(), kernel::RunError>(())
    /// ```
    pub fn watchdog_with(
        mut self,
        limit: Duration,
        report: impl FnMut(&Stuck) + Send + 'static,
    ) -> Self {
        self.watchdog = Some(Watchdog {
            limit,
            report: Box::new(report),
        });
        self
    }

    /// Has a [monitor](crate::monitor) listen there, in a thread of its own, until the kernel is dropped. [`Kernel::monitor`] tells the address.
    /// The loop pays a few dozen plain stores a step, and no system call.
    ///
    /// ```
    /// use std::io::{Read, Write};
    /// use std::net::TcpStream;
    /// use kernel::monitor::MonitorAddress;
    ///
    /// let mut kernel = kernel::Builder::new()
    ///     .monitor(MonitorAddress::loopback(0))
    ///     .build()?;
    /// let Some(MonitorAddress::Tcp(address)) = kernel.monitor().cloned() else { unreachable!() };
    /// let answer = kernel.run(async move {
    ///     kernel::current_task().set_name("stubborn");
    ///     let mut client = TcpStream::connect(address)?; // blocks the whole kernel
    ///     client.write_all(b"ps\nexit\n")?;
    ///     let mut answer = String::new();
    ///     client.read_to_string(&mut answer)?;
    ///     std::io::Result::Ok(answer)
    /// })??;
    /// assert!(answer.contains("RUNNING") && answer.contains("stubborn"), "{answer}");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn monitor(mut self, at: MonitorAddress) -> Self {
        self.monitor = Some(at);
        self
    }

    /// Makes the kernel.
    ///
    /// # Errors
    /// If the poller cannot be made, 4096 kernels already exist in this process, a thread that was asked for cannot be started, or the
    /// monitor cannot listen where it should.
    pub fn build<'env>(mut self) -> io::Result<Kernel<'env>> {
        let (watchdog, monitor) = (self.watchdog.take(), self.monitor.take());
        let is_read = watchdog.is_some() || monitor.is_some();
        let board = is_read.then(|| Arc::new(Board::new(monitor.is_some())));
        let core = Core::new(self, board.clone())?;
        let mut kernel = Kernel {
            core,
            env: PhantomData,
            watchdog: None,
            monitor: None,
        };
        if let Some(board) = board {
            let core = &kernel.core;
            if let Some(watchdog) = watchdog {
                kernel.watchdog = Some(watchdog.start(Arc::clone(&board))?);
            }
            if let Some(address) = monitor {
                let state = core.state.borrow();
                let epoch = (!state.clock.is_virtual()).then_some(state.epoch);
                let monitor = Monitor::start(&address, board, core.sender(), epoch)?;
                drop(state);
                kernel.monitor = Some(monitor);
            }
        }
        Ok(kernel)
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("io_interval", &self.io_interval)
            .field("observers", &self.observers.len())
            .field("on_panic", &self.on_panic)
            .finish_non_exhaustive()
    }
}

/// A kernel: tasks, and the loop that runs them on the thread that owns it.
///
/// Tasks spawned with [`Kernel::spawn`] and the main future of [`Kernel::run`] may borrow whatever outlives the kernel (`'env`),
/// since they are polled inside its methods and dropped with it at the latest.
///
/// ```
/// use std::time::Duration;
///
/// let name = String::from("kernel");
/// let mut kernel = kernel::Kernel::new()?;
/// let greeting = kernel.run(async {
///     let task = kernel::spawn(async { kernel::sleep(Duration::from_millis(1)).await });
///     task.join().await.unwrap().unwrap();
///     format!("hello, {name}")
/// })?;
/// assert_eq!(greeting, "hello, kernel");
/// # Ok::<(), kernel::RunError>(())
/// ```
///
/// What it borrows must outlive it, and it stays on its thread, as its tasks do:
///
/// ```compile_fail,E0597
/// let mut kernel = kernel::Kernel::new().unwrap();
/// let dies_first = String::new();
/// kernel.spawn(async { dies_first.len() });
/// kernel.run(async {}).unwrap();
/// ```
/// ```compile_fail,E0373
/// # async fn main_task() {
/// let local = String::new();
/// kernel::spawn(async { local.len() });
/// # }
/// ```
/// ```compile_fail,E0505
/// // A value that borrows must be gone, with its task, before what it borrows.
/// struct Noisy<'a>(&'a String);
/// impl Drop for Noisy<'_> {
///     fn drop(&mut self) { println!("{}", self.0); }
/// }
/// let text = String::new();
/// let mut kernel = kernel::Kernel::new().unwrap();
/// let task = kernel.spawn(async { Noisy(&text) });
/// kernel.run(task.wait()).unwrap().unwrap();
/// drop(kernel);
/// drop(text);
/// drop(task);
/// ```
/// ```compile_fail,E0277
/// fn is_send<T: Send>() {}
/// is_send::<kernel::Kernel<'static>>();
/// ```
/// ```compile_fail,E0277
/// fn is_send<T: Send>() {}
/// is_send::<kernel::Task<()>>();
/// ```
/// ```compile_fail,E0277
/// fn is_sync<T: Sync>() {}
/// is_sync::<kernel::TaskRef>();
/// ```
/// ```compile_fail,E0382
/// // A kernel that was shut down is gone.
/// let mut kernel = kernel::Kernel::new().unwrap();
/// kernel.shutdown(None).unwrap();
/// kernel.run(async {}).unwrap();
/// ```
pub struct Kernel<'env> {
    pub(super) core: Rc<Core>,
    /// Invariant, and with the `Drop` below: borrowed data must outlive the kernel strictly.
    env: PhantomData<Cell<&'env ()>>,
    /// After the core, so that these see the end of all tasks.
    watchdog: Option<WatchdogThread>,
    monitor: Option<Monitor>,
}

/// What a [`Kernel::turn`] did and what is left to do.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// How many tasks were polled.
    pub polled: usize,
    /// Whether there is more to do at once: call `turn` again soon.
    pub ready: bool,
    /// When to call `turn` again at the latest.
    pub next_deadline: Option<Instant>,
    /// How many tasks have not ended.
    pub live: usize,
}

/// How a [`Kernel::shutdown`] went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShutdownReport {
    /// Tasks that ended after they were cancelled.
    pub cancelled: usize,
    /// Tasks that did not end within the grace and were dropped.
    pub aborted: usize,
}

impl<'env> Kernel<'env> {
    /// A kernel as [`Builder::new`] sets it up.
    ///
    /// # Errors
    /// As [`Builder::build`].
    pub fn new() -> io::Result<Self> {
        Builder::new().build()
    }

    /// Runs `main` as a task until it ends, and with it whatever it spawns. Other tasks that are still alive then stand still until
    /// the next `run` or [`turn`](Kernel::turn) (Curio's `Kernel.run`).
    ///
    /// # Errors
    /// [`RunError::Reentrant`] from inside a running kernel of this thread, [`RunError::Deadlock`] if nothing can wake `main` any more,
    /// [`RunError::Aborted`] if somebody aborted it.
    ///
    /// # Panics
    /// With what `main` panicked with; under [`OnPanic::Propagate`] also with what any other task did.
    #[track_caller]
    pub fn run<T>(&mut self, main: impl Future<Output = T>) -> Result<T, RunError> {
        if with_current(|core| core.is_some()) {
            return Err(RunError::Reentrant);
        }
        let running = self.core.enter()?;
        // `main` may borrow from the caller: it must be gone when this returns, however that comes about.
        let main = DropMain {
            handle: self.core.spawn(main, Location::caller()),
            core: &self.core,
        };
        let outcome = self.core.run(main.handle.body());
        let output = main.handle.take();
        drop(main);
        drop(running);
        if let Some(payload) = self.core.take_failure() {
            resume_unwind(payload);
        }
        outcome?;
        match output.expect("the main task has ended") {
            Ok(value) => Ok(value),
            Err(crate::JoinError::Panicked(panic)) => resume_unwind(panic.into_payload()),
            Err(_) => Err(RunError::Aborted),
        }
    }

    /// One pass of the loop, for a host that has a loop of its own: polls I/O, fires timers, and runs each task that is ready then, once.
    /// Waits up to `max_wait` for something to do (`None`: until there is something; zero: not at all).
    ///
    /// The host watches [`as_fd`](AsFd::as_fd) for reading, and calls `turn(Some(Duration::ZERO))` when it is readable, at
    /// [`Turn::next_deadline`], and again at once while [`Turn::ready`].
    ///
    /// # Errors
    /// [`RunError::Reentrant`] if one of its own tasks calls it; [`RunError::Io`] if the poller fails.
    ///
    /// # Panics
    /// Under [`OnPanic::Propagate`] with what a task panicked with.
    pub fn turn(&mut self, max_wait: Option<Duration>) -> Result<Turn, RunError> {
        let running = self.core.enter()?;
        let turn = self.core.turn(max_wait);
        drop(running);
        if let Some(payload) = self.core.take_failure() {
            resume_unwind(payload);
        }
        Ok(turn?)
    }

    /// Starts a task, to be run by the next `run` or `turn`.
    #[track_caller]
    pub fn spawn<T: 'env>(&self, future: impl Future<Output = T> + 'env) -> crate::Task<T> {
        let handle = self.core.spawn(future, Location::caller());
        self.core.nudge();
        crate::Task::from_handle(handle)
    }

    /// A handle for other threads.
    #[must_use]
    pub fn remote(&self) -> Remote {
        self.core.remote()
    }

    /// Where its monitor listens, if it was [built](Builder::monitor) with one.
    #[must_use]
    pub fn monitor(&self) -> Option<&MonitorAddress> {
        self.monitor.as_ref().map(Monitor::address)
    }

    /// Every live task, in the order they were spawned.
    #[must_use]
    pub fn tasks(&self) -> Vec<TaskInfo> {
        self.core.state.borrow().dump()
    }

    /// Cancels the tasks, newest first, and waits for each; what has not ended after `grace` (`None`: however long it takes) is
    /// dropped, newest first.
    ///
    /// # Errors
    /// As [`Kernel::turn`]; then all tasks are dropped.
    ///
    /// # Panics
    /// As [`Kernel::turn`], once all tasks have ended or were dropped.
    pub fn shutdown(self, grace: Option<Duration>) -> Result<ShutdownReport, RunError> {
        let _running = self.core.enter()?;
        let core = &self.core;
        let deadline = grace.and_then(|grace| core.state.borrow().now().checked_add(grace));
        let mut cancelled = 0;
        'tasks: loop {
            let bodies = core.state.borrow().bodies();
            if bodies.is_empty() {
                break;
            }
            for body in bodies {
                if !body.is_live() {
                    continue; // it ended while another was waited for
                }
                core.with(|state| state.cancel(body.slot.get(), Interrupt::cancelled()));
                while body.is_live() {
                    let left = deadline.map(|deadline| {
                        deadline.saturating_duration_since(core.state.borrow().now())
                    });
                    if left == Some(Duration::ZERO) || core.is_stuck() {
                        break 'tasks;
                    }
                    if core.turn(left)?.polled == 0
                        && let Some(deadline) = deadline
                    {
                        // A virtual clock does not move while only I/O or a thread is waited for; the grace must end all the same.
                        core.state.borrow().clock.advance_to(deadline);
                    }
                }
                cancelled += 1;
            }
        }
        let aborted = core.close();
        if let Some(payload) = core.take_failure() {
            resume_unwind(payload);
        }
        Ok(ShutdownReport { cancelled, aborted })
    }
}

/// Drops what is left of a main task when `run` returns, by whichever way: the future; an output goes with the handle.
struct DropMain<'a, T> {
    handle: Handle<T>,
    pub(super) core: &'a Core,
}

impl<T> Drop for DropMain<'_, T> {
    fn drop(&mut self) {
        self.core.abort(self.handle.body());
    }
}

impl Drop for Kernel<'_> {
    /// Drops every task, newest first. [`Kernel::shutdown`] lets them clean up.
    fn drop(&mut self) {
        if let Ok(_running) = self.core.enter() {
            self.core.close();
        }
        let serial = self.core.serial;
        // During thread exit the list may be gone already.
        let _ = KERNELS.try_with(|kernels| {
            kernels.borrow_mut().retain(|known| known.serial != serial);
        });
    }
}

impl AsFd for Kernel<'_> {
    /// Readable when there is something for [`Kernel::turn`] to do, apart from deadlines.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.core.registry.as_fd()
    }
}

impl std::fmt::Debug for Kernel<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("id", &self.core.id())
            .finish_non_exhaustive()
    }
}
