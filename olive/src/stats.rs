//! What an app has done, in numbers.

use std::cell::Cell;
use std::fmt;
use std::time::Duration;

use crate::outcome::Settlement;

/// Counts what happened to deliveries since the start.
#[derive(Debug, Default)]
pub struct Stats {
    received: Cell<u64>,
    done: Cell<u64>,
    failed: Cell<u64>,
    retried: Cell<u64>,
    reconnects: Cell<u64>,
}

fn add(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

impl Stats {
    /// A delivery came.
    pub fn received(&self) {
        add(&self.received);
    }

    /// An attempt was settled so, and acked.
    pub fn settled(&self, how: &Settlement) {
        add(match how {
            Settlement::Reply => &self.done,
            Settlement::Retry { .. } => &self.retried,
            Settlement::Dead(_) => &self.failed,
        });
    }

    /// The connection was lost and made again.
    pub fn reconnected(&self) {
        add(&self.reconnects);
    }

    /// Tasks that returned a result.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.get()
    }

    /// Tasks that were given up.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.get()
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            done,
            failed,
            retried,
            ..
        } = self;
        let (done, failed, retried) = (done.get(), failed.get(), retried.get());
        write!(f, "{done} done, {failed} failed, {retried} retried")?;
        match self.reconnects.get() {
            0 => Ok(()),
            n => write!(f, ", {n} reconnects"),
        }
    }
}

/// How long things took.
#[derive(Debug, Clone, Default)]
pub struct Timings {
    all: Vec<Duration>,
    is_sorted: bool,
}

impl Timings {
    /// Notes one.
    pub fn add(&mut self, took: Duration) {
        self.is_sorted = false;
        self.all.push(took);
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The smallest time that `share` (0..=1) of them did not exceed; `None` if there are none.
    pub fn percentile(&mut self, share: f64) -> Option<Duration> {
        if !self.is_sorted {
            self.all.sort_unstable();
            self.is_sorted = true;
        }
        let rank = (self.all.len() as f64 * share).ceil() as usize;
        self.all
            .get(rank.clamp(1, self.all.len().max(1)) - 1)
            .copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::{Marks, Reason};

    #[test]
    fn attempts_that_will_be_repeated_are_no_failed_tasks() {
        let stats = Stats::default();
        let (delay, marks) = (Duration::ZERO, Marks::default());
        stats.settled(&Settlement::Retry { delay, marks });
        stats.settled(&Settlement::Reply);
        stats.settled(&Settlement::Dead(Reason::Failed));
        assert_eq!(stats.to_string(), "1 done, 1 failed, 1 retried");
    }

    #[test]
    fn a_percentile_is_one_of_the_times() {
        let mut timings = Timings::default();
        assert_eq!(timings.percentile(0.5), None);
        for ms in [5, 1, 4, 2, 3] {
            timings.add(Duration::from_millis(ms));
        }
        let ms = |share| {
            timings
                .clone()
                .percentile(share)
                .map(|took| took.as_millis())
        };
        assert_eq!(
            [ms(0.0), ms(0.5), ms(0.6), ms(0.99), ms(1.0)],
            [Some(1), Some(3), Some(3), Some(5), Some(5)]
        );
    }
}
