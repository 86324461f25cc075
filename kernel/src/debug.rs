//! Ready-made observers that log (Curio's `curio.debug`), for [`Builder::activation`](crate::Builder::activation).
//!
//! They write through the [`log`] crate under the target `kernel::debug`. Each can be given another level, and be limited to some tasks:
//!
//! ```
//! use std::time::Duration;
//! use kernel::debug::{logcrash, longblock, schedtrace, traptrace};
//! use kernel::{Builder, WaitKind};
//! use log::Level;
//!
//! let mut kernel = Builder::new()
//!     .activation(longblock(Duration::from_millis(50)))
//!     .activation(logcrash())
//!     .activation(schedtrace().level(Level::Trace))
//!     .activation(traptrace(&[WaitKind::Lock]).named(["accountant"]))
//!     .build()?;
//! kernel.run(async {})?;
//! # Ok::<(), kernel::RunError>(())
//! ```
//!
//! `longblock` tells of a long step when that is over. A task that never lets go is the business of [`Builder::watchdog`](crate::Builder::watchdog).

use std::fmt;
use std::time::{Duration, Instant};

use log::Level;

use crate::activation::{Activation, StepEnd, TaskView};
use crate::traps::WaitKind;

/// Logs each step as it begins. At level info, if nothing else is said.
pub fn schedtrace() -> Debugger {
    Debugger::new(Level::Info, Event::Step)
}

/// Logs in which blocking trap each step ends, or how else; if `traps` names some, only those. At level info, if nothing else is said. Immediate traps, and blocking ones
/// that need not wait, end no step.
pub fn traptrace(traps: &[WaitKind]) -> Debugger {
    Debugger::new(Level::Info, Event::Trap(traps.to_vec()))
}

/// Logs steps that took longer than `max_time`, by the kernel's clock, during which no other task ran (Curio's default is 50 ms). As a warning, if nothing else is said.
pub fn longblock(max_time: Duration) -> Debugger {
    let began = None;
    Debugger::new(Level::Warn, Event::LongStep { max_time, began })
}

/// Logs tasks that panic, at once, whoever joins them later. As an error, if nothing else is said.
pub fn logcrash() -> Debugger {
    Debugger::new(Level::Error, Event::Crash)
}

/// An observer that logs; made by the functions of [this module](self).
#[must_use]
pub struct Debugger {
    level: Level,
    wants: Box<dyn Fn(&TaskView<'_>) -> bool>,
    event: Event,
}

enum Event {
    Step,
    /// All traps if it is empty.
    Trap(Vec<WaitKind>),
    LongStep {
        max_time: Duration,
        began: Option<Instant>,
    },
    Crash,
}

impl Debugger {
    fn new(level: Level, event: Event) -> Self {
        Self {
            level,
            wants: Box::new(|_| true),
            event,
        }
    }

    /// Logs at this level.
    pub const fn level(mut self, level: Level) -> Self {
        self.level = level;
        self
    }

    /// Looks only at tasks of which `wants` is true.
    pub fn filter(mut self, wants: impl Fn(&TaskView<'_>) -> bool + 'static) -> Self {
        self.wants = Box::new(wants);
        self
    }

    /// Looks only at tasks with one of these names (Curio's `filter`).
    pub fn named<N: Into<String>>(self, names: impl IntoIterator<Item = N>) -> Self {
        let names: Vec<String> = names.into_iter().map(Into::into).collect();
        self.filter(move |task| {
            let name = task.name();
            name.is_some_and(|name| names.iter().any(|wanted| **wanted == *name))
        })
    }

    fn log(&self, what: fmt::Arguments<'_>) {
        log::log!(target: "kernel::debug", self.level, "{what}");
    }
}

impl Activation for Debugger {
    fn running(&mut self, task: &TaskView<'_>) {
        match &mut self.event {
            Event::Step if (self.wants)(task) => self.log(format_args!("runs: {task}")),
            Event::LongStep { began, .. } => *began = Some(task.now()),
            Event::Step | Event::Trap(_) | Event::Crash => {}
        }
    }

    fn suspended(&mut self, task: &TaskView<'_>, end: StepEnd) {
        match &self.event {
            Event::Step => {}
            Event::Trap(traps) => {
                let is_wanted = match end {
                    StepEnd::Waits(kind, _) => traps.is_empty() || traps.contains(&kind),
                    _ => traps.is_empty(),
                };
                if is_wanted && (self.wants)(task) {
                    self.log(format_args!("trap: {task} {end}"));
                }
            }
            Event::LongStep { max_time, began } => {
                let took = began.map_or(Duration::ZERO, |began| task.now() - began);
                if took > *max_time && (self.wants)(task) {
                    self.log(format_args!("{task} ran for {took:.3?} without a break"));
                }
            }
            Event::Crash => {
                if end == StepEnd::Panicked && (self.wants)(task) {
                    let text = task.panic().unwrap_or_default();
                    self.log(format_args!("{task} panicked: {text}"));
                }
            }
        }
    }
}

impl fmt::Debug for Debugger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Debugger")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}
