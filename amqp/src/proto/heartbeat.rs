//! Proof of life, both ways.
//!
//! Half the negotiated interval without a byte written: a heartbeat is due. Two intervals without a byte read: the peer is
//! dead. Bytes of any kind count, so a busy connection sends no heartbeats at all, and the marks are all that is updated per
//! read or write; the timer is looked at only when it fires.

use std::time::{Duration, Instant};

/// The clock marks of one connection. With an interval of 0 there are no timers.
#[derive(Clone, Copy, Debug)]
pub struct Heartbeat {
    interval: Duration,
    last_read: Instant,
    last_write: Instant,
}

/// What [`Heartbeat::poll`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// Nothing is due.
    Quiet,
    /// A heartbeat frame has to be sent; it counts as written.
    Due,
    /// The peer has been silent for two intervals.
    Dead,
}

impl Heartbeat {
    /// Starts both clocks. `seconds` is what `tune-ok` said; 0 is none.
    pub fn new(seconds: u16, now: Instant) -> Self {
        Self {
            interval: Duration::from_secs(seconds.into()),
            last_read: now,
            last_write: now,
        }
    }

    /// Bytes have come in.
    #[inline]
    pub fn read(&mut self, now: Instant) {
        self.last_read = now;
    }

    /// Bytes have gone out.
    #[inline]
    pub fn wrote(&mut self, now: Instant) {
        self.last_write = now;
    }

    /// When [`Heartbeat::poll`] has something to say at the earliest; `None` without heartbeats.
    pub fn deadline(&self) -> Option<Instant> {
        (!self.interval.is_zero()).then(|| {
            let send = self.last_write + self.interval / 2;
            send.min(self.dead_at())
        })
    }

    /// Whether a heartbeat has to be sent; whether the peer lives is another question.
    pub fn is_due(&self, now: Instant) -> bool {
        !self.interval.is_zero() && now >= self.last_write + self.interval / 2
    }

    /// What is due at `now`.
    pub fn poll(&mut self, now: Instant) -> Beat {
        if self.interval.is_zero() {
            Beat::Quiet
        } else if now >= self.dead_at() {
            Beat::Dead
        } else if self.is_due(now) {
            self.last_write = now;
            Beat::Due
        } else {
            Beat::Quiet
        }
    }

    /// How long the peer may be silent.
    pub fn patience(&self) -> Duration {
        self.interval * 2
    }

    fn dead_at(&self) -> Instant {
        self.last_read + self.patience()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(
        clippy::disallowed_methods,
        reason = "any instant will do to count from"
    )]
    fn start() -> Instant {
        Instant::now()
    }

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Accepts: amqp/R11
    #[test]
    fn an_interval_of_zero_has_no_timers_and_one_of_a_second_beats_twice_a_second() {
        let t = start();
        let mut none = Heartbeat::new(0, t);
        assert_eq!(none.deadline(), None);
        assert_eq!(none.poll(t + ms(1_000_000)), Beat::Quiet);

        let mut one = Heartbeat::new(1, t);
        let mut beats = 0;
        let mut polls = 0;
        let mut now = t;
        while now < t + ms(10_000) {
            one.read(now);
            now = one.deadline().unwrap();
            polls += 1;
            beats += u32::from(one.poll(now) == Beat::Due);
        }
        assert_eq!(
            (beats, polls),
            (20, 20),
            "every 500 ms, and never for nothing"
        );
    }

    #[test]
    fn a_peer_silent_for_two_intervals_is_dead_and_any_byte_keeps_it_alive() {
        let t = start();
        let mut beat = Heartbeat::new(10, t);
        assert_eq!(beat.poll(t + ms(19_999)), Beat::Due);
        beat.wrote(t + ms(19_999));
        assert_eq!(beat.deadline(), Some(t + ms(20_000)));
        assert_eq!(beat.poll(t + ms(20_000)), Beat::Dead);
        beat.read(t + ms(19_999));
        assert_eq!(beat.poll(t + ms(20_000)), Beat::Quiet);
    }

    #[test]
    fn written_bytes_put_the_heartbeat_off() {
        let t = start();
        let mut beat = Heartbeat::new(10, t);
        beat.wrote(t + ms(4_999));
        assert_eq!(beat.poll(t + ms(5_000)), Beat::Quiet);
        assert_eq!(beat.deadline(), Some(t + ms(9_999)));
    }
}
