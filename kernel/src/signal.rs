//! Unix signals as something to wait for.
//!
//! signal-hook's handler notes the signal in a flag and writes a byte into the pipe of every watching queue; the rest happens in a task.
//! Equal signals that come before anybody looks count as one, as the system itself counts them.
//!
//! The process-wide handler is there while a queue watches (Curio's rule). It cannot be taken out without `unsafe` code of ours, so
//! when the last queue of a signal is dropped the handler stays and does what would happen without it: the default action,
//! if that was in force when the first queue came, else what the process had set.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

pub use signal_hook::consts::signal::*;
use signal_hook::flag::register_conditional_default;
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::task::{TaskRef, spawn};
use crate::traps::{Direction, Lot, ReadyOp, Source, WaitKind, at_caller, sched_wait, sched_wake};

/// Signals, in the order in which they are seen (Curio's `SignalQueue`). Several queues, of several kernels, each get every signal.
///
/// ```
/// use kernel::signal::{SIGHUP, SIGTERM, SignalQueue};
///
/// # kernel::run(async {
/// let signals = SignalQueue::new(&[SIGHUP, SIGTERM])?;
/// # let pid = std::process::id().to_string();
/// # assert!(std::process::Command::new("kill").args(["-HUP", &pid]).status()?.success());
/// assert_eq!(signals.next().await?, SIGHUP);
/// # std::io::Result::Ok(()) }).unwrap().unwrap();
/// ```
#[derive(Debug)]
pub struct SignalQueue {
    /// Before the pipe, which must be forgotten before it is closed.
    source: Source,
    delivery: RefCell<SignalDelivery<UnixStream, SignalOnly>>,
    seen: RefCell<VecDeque<i32>>,
    _watch: Watch,
}

impl SignalQueue {
    /// Watches `signals` from now on. If dropped, it no longer does.
    ///
    /// # Errors
    /// `InvalidInput` for a signal that cannot be handled (`SIGKILL`, `SIGSTOP`) or not reasonably (`SIGSEGV`, `SIGFPE`, `SIGILL`);
    /// those of `sigaction(2)`.
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        let watch = Watch::begin(signals)?;
        let (ours, handlers) = UnixStream::pair()?;
        let source = Source::new(&ours);
        let delivery = SignalDelivery::with_pipe(ours, handlers, SignalOnly, signals)?;
        watch.take_over();
        Ok(Self {
            source,
            delivery: RefCell::new(delivery),
            seen: RefCell::default(),
            _watch: watch,
        })
    }

    /// The next signal. One task at a time may wait.
    ///
    /// Cancellation point: only if none has come. If dropped, none is lost.
    ///
    /// # Errors
    /// As [`Source::ready_op`].
    #[track_caller]
    pub fn next(&self) -> ReadyOp<'_, impl FnMut() -> io::Result<i32>> {
        let next = || {
            self.try_next()
                .ok_or_else(|| io::ErrorKind::WouldBlock.into())
        };
        self.source.ready_op(Direction::Read, next)
    }

    /// The next signal, if one has come.
    pub fn try_next(&self) -> Option<i32> {
        let mut seen = self.seen.borrow_mut();
        if seen.is_empty() {
            seen.extend(self.delivery.borrow_mut().pending());
        }
        seen.pop_front()
    }
}

/// Is set by the first of its signals, and stays set (Curio's `SignalEvent`). Any number of tasks may wait for it.
///
/// A server that takes its leave when it is told to: each client's handler is interrupted where it waits, and may say goodbye before the program ends.
///
/// ```
/// use kernel::net::{Server, TcpStream};
/// use kernel::signal::{SIGINT, SIGTERM, SignalEvent};
/// use kernel::spawn;
/// use std::io;
///
/// async fn serve(client: TcpStream) -> io::Result<()> {
///     let mut buf = [0; 1024];
///     let ended = loop {
///         match client.read(&mut buf).await {
///             Ok(0) => return Ok(()),
///             Ok(n) => client.write_all(&buf[..n]).await?,
///             Err(error) => break error, // also an interrupt
///         }
///     };
///     client.write_all(b"goodbye\n").await?;
///     Err(ended)
/// }
///
/// # kernel::run(async {
/// let stop = SignalEvent::new(&[SIGINT, SIGTERM])?;
/// let server = spawn(Server::new().tcp("127.0.0.1:0", serve));
/// # let pid = std::process::id().to_string();
/// # assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status()?.success());
/// stop.wait().await?;
/// server.cancel().await?; // and waits until all clients have ended
/// # io::Result::Ok(()) }).unwrap().unwrap();
/// ```
#[derive(Debug)]
pub struct SignalEvent {
    state: Rc<EventState>,
    /// Waits for the signals on behalf of all.
    watcher: RefCell<Option<TaskRef>>,
}

#[derive(Debug)]
struct EventState {
    queue: SignalQueue,
    is_set: Cell<bool>,
    waiting: Lot,
}

impl SignalEvent {
    /// Watches `signals` from now on. If dropped, it no longer does.
    ///
    /// # Errors
    /// As [`SignalQueue::new`].
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        Ok(Self {
            state: Rc::new(EventState {
                queue: SignalQueue::new(signals)?,
                is_set: Cell::new(false),
                waiting: Lot::new(),
            }),
            watcher: RefCell::default(),
        })
    }

    /// Waits until one of the signals has come.
    ///
    /// Cancellation point: only if none has. If dropped, nothing is lost.
    ///
    /// # Errors
    /// An [`Interrupt`](crate::Interrupt).
    #[track_caller]
    pub fn wait(&self) -> impl Future<Output = Result<(), crate::Interrupt>> {
        at_caller(async move {
            while !self.is_set() {
                self.ensure_watcher();
                sched_wait(&self.state.waiting, WaitKind::Event).await?;
            }
            Ok(())
        })
    }

    /// Whether one of the signals has come since it was made or cleared.
    #[must_use]
    pub fn is_set(&self) -> bool {
        while self.state.queue.try_next().is_some() {
            self.state.is_set.set(true);
        }
        self.state.is_set.get()
    }

    /// Forgets what has come.
    pub fn clear(&self) {
        while self.state.queue.try_next().is_some() {}
        self.state.is_set.set(false);
    }

    fn ensure_watcher(&self) {
        let mut watcher = self.watcher.borrow_mut();
        if watcher.as_ref().is_some_and(|task| !task.is_terminated()) {
            return;
        }
        let state = self.state.clone();
        let task = spawn(async move {
            while state.queue.next().await.is_ok() {
                state.is_set.set(true);
                sched_wake(&state.waiting, usize::MAX);
            }
        });
        task.set_name("signal event");
        *watcher = Some(task.to_ref());
    }
}

impl Drop for SignalEvent {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.get_mut() {
            watcher.abort();
        }
    }
}

/// What this process knows of a signal that was ever watched.
struct Watched {
    queues: usize,
    /// Read by the handler: nobody watches, do the default action.
    unwatched: Arc<AtomicBool>,
}

static WATCHED: LazyLock<Mutex<HashMap<i32, Watched>>> = LazyLock::new(Mutex::default);

fn watched() -> MutexGuard<'static, HashMap<i32, Watched>> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts as one queue for each of its signals while it lives.
#[derive(Debug)]
struct Watch(Vec<i32>);

impl Watch {
    fn begin(signals: &[i32]) -> io::Result<Self> {
        let mut watch = Self(Vec::with_capacity(signals.len()));
        let mut watched = watched();
        for &signal in signals {
            if signal <= 0 || signal_hook::consts::FORBIDDEN.contains(&signal) {
                let text = format!("signal {signal} cannot be watched");
                drop(watched);
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            let entry = watched.entry(signal).or_insert_with(|| {
                let unwatched = Arc::new(AtomicBool::new(true));
                // Before our handler is there, or the answer would be ours. A real-time signal has no default action that could
                // be imitated; it is swallowed once nobody watches it.
                if has_default_action(signal)
                    && let Err(error) = register_conditional_default(signal, unwatched.clone())
                {
                    log::debug!("signal {signal}: no way back to its default action: {error}");
                }
                Watched {
                    queues: 0,
                    unwatched,
                }
            });
            entry.queues += 1;
            watch.0.push(signal);
        }
        Ok(watch)
    }

    /// From here on the queue answers for its signals. Until now the default action was in force.
    fn take_over(&self) {
        let watched = watched();
        for signal in &self.0 {
            watched[signal].unwatched.store(false, Ordering::SeqCst);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = watched();
        for signal in &self.0 {
            let entry = watched.get_mut(signal).expect("entries are never removed");
            entry.queues -= 1;
            if entry.queues == 0 {
                entry.unwatched.store(true, Ordering::SeqCst);
            }
        }
    }
}

/// Whether the process neither ignores nor handles a signal, as far as the system tells.
fn has_default_action(signal: i32) -> bool {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else {
        return true;
    };
    let is_in = |name: &str| {
        let mask = status.lines().find_map(|line| line.strip_prefix(name));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
    };
    !is_in("SigIgn:") && !is_in("SigCgt:")
}
