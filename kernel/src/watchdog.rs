//! A thread that notices a task which does not let go: while one runs, no other does.
//!
//! It looks at the kernel's [`Board`] four times in each span of the limit, so the kernel's loop reads no clock for it. What it takes for the length of a
//! step began when it first saw that step: never too long, at most a quarter of the limit too short.

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender};

use crate::error::{drop_quietly, panic_text};
use crate::runtime::{Board, Step};
use crate::task::TaskId;

/// A task that has been running for too long; see [`Builder::watchdog`](crate::Builder::watchdog).
#[derive(Clone, Debug)]
pub struct Stuck {
    /// Its number.
    pub task: TaskId,
    /// Its name, if it was given one.
    pub name: Option<String>,
    /// Where it was spawned.
    pub spawned_at: &'static Location<'static>,
    /// For how long it has been running without a break, in real time: at least this.
    pub running_for: Duration,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "task {}", self.task)?;
        if let Some(name) = &self.name {
            write!(f, " {name:?}")?;
        }
        write!(
            f,
            " spawned at {} has been running for {:.1?} and lets no other task run; give it a `yield_now().await`, or do its work with `run_in_thread`",
            self.spawned_at, self.running_for
        )
    }
}

/// What a watchdog does with what it sees, in its own thread.
pub(crate) type Report = Box<dyn FnMut(&Stuck) + Send>;

/// As the builder has it.
pub(crate) struct Watchdog {
    pub(crate) limit: Duration,
    pub(crate) report: Report,
}

impl Watchdog {
    pub(crate) fn start(self, board: Arc<Board>) -> io::Result<WatchdogThread> {
        let (alive, ended) = crossbeam_channel::bounded::<()>(0);
        let Self { limit, mut report } = self;
        let limit = limit.max(Duration::from_millis(4));
        let thread = thread::Builder::new().name("kernel-watchdog".into());
        let thread = thread.spawn(move || {
            let mut episode = Episode::new(limit, Instant::now());
            while ended.recv_timeout(limit / 4) == Err(RecvTimeoutError::Timeout) {
                let running = board.running();
                let Some(running_for) = episode.observe(Instant::now(), running) else {
                    continue;
                };
                let Some(task) = running.and_then(|step| board.task_of(step)) else {
                    continue; // it has just let go
                };
                let stuck = Stuck {
                    task: TaskId(task.id),
                    name: task.name,
                    spawned_at: task.spawned_at,
                    running_for,
                };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| report(&stuck))) {
                    let text = panic_text(&*panic);
                    log::error!("the watchdog's callback panicked; the watchdog ends: {text}");
                    drop_quietly(panic);
                    return;
                }
            }
        })?;
        Ok(WatchdogThread {
            alive: Some(alive),
            thread: Some(thread),
        })
    }
}

/// Ends the thread when it is dropped.
pub(crate) struct WatchdogThread {
    alive: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for WatchdogThread {
    fn drop(&mut self) {
        self.alive.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One step, seen again and again.
struct Episode {
    limit: Duration,
    step: Option<Step>,
    first_seen: Instant,
    /// Worth the next report.
    next: Duration,
}

impl Episode {
    const fn new(limit: Duration, now: Instant) -> Self {
        Self {
            limit,
            step: None,
            first_seen: now,
            next: limit,
        }
    }

    /// For how long `running` has been running, if that is to be reported: at the limit, and whenever the time has doubled.
    fn observe(&mut self, now: Instant, running: Option<Step>) -> Option<Duration> {
        if running.is_none() || running != self.step {
            self.step = running;
            self.first_seen = now;
            self.next = self.limit;
            return None;
        }
        let ran = now - self.first_seen;
        if ran < self.next {
            return None;
        }
        while self.next <= ran {
            self.next = self.next.saturating_mul(2);
        }
        Some(ran)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_reported_at_the_limit_and_whenever_its_time_has_doubled() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let mut episode = Episode::new(ms(100), start);
        let board = Board::new(false);
        let mut at = |millis, step: u32| {
            board.end();
            if step > 0 {
                board.begin(0, step);
            }
            episode.observe(start + ms(millis), board.running())
        };
        assert_eq!(at(0, 1), None);
        assert_eq!(at(99, 1), None);
        assert_eq!(at(100, 1), Some(ms(100)));
        assert_eq!(at(150, 1), None, "once");
        assert_eq!(at(199, 1), None);
        assert_eq!(at(200, 1), Some(ms(200)));
        assert_eq!(at(1000, 1), Some(ms(1000)), "not for each doubling missed");
        assert_eq!(at(1599, 1), None);
        assert_eq!(at(1600, 1), Some(ms(1600)));
        // Another step is another episode, also of the same task.
        assert_eq!(at(1650, 2), None);
        assert_eq!(at(1749, 2), None);
        assert_eq!(at(1750, 2), Some(ms(100)));
        // A kernel that sleeps is not stuck.
        assert_eq!(at(1800, 0), None);
        assert_eq!(at(9999, 0), None);
        assert_eq!(at(10_000, 2), None);
    }
}
