//! Proof of life, both ways.
//!
//! Half the negotiated interval without a byte written: a heartbeat is due. Two intervals without a byte read: the peer is
//! dead. Bytes of any kind count, so a busy connection sends no heartbeats at all, and the marks are all that is updated per
//! read or write; the timer is looked at only when it fires.
//!
//! Bytes that are only ever the next few of a frame which is never whole count for two intervals as well. What stands between two programs may lose
//! some of a stream's bytes; whoever takes what follows for the rest of a long frame sees heartbeats go by for hours, and nothing else.

use std::time::{Duration, Instant};

/// The clock marks of one connection. With an interval of 0 there are no timers.
#[derive(Clone, Copy, Debug)]
pub struct Heartbeat {
    interval: Duration,
    last_read: Instant,
    last_write: Instant,
    /// Of a frame that is not whole: since when hardly more has come, and how much there was then.
    unfinished: Option<(Instant, usize)>,
}

/// More than the heartbeats of two intervals, which are five at most. A stream that is slower even than this is as good as dead.
const TRICKLE: usize = 64;

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
            unfinished: None,
        }
    }

    /// Bytes have come in.
    #[inline]
    pub fn read(&mut self, now: Instant) {
        self.last_read = now;
    }

    /// What has come is used but for `len` bytes of a frame that is not whole. `is_new`: they are not those of the last time, and some more.
    #[inline]
    pub fn unfinished(&mut self, len: usize, is_new: bool, now: Instant) {
        let goes_on = |(_, before): &(Instant, usize)| !is_new && len < before + TRICKLE;
        if len == 0 {
            self.unfinished = None;
        } else if !self.unfinished.as_ref().is_some_and(goes_on) {
            self.unfinished = Some((now, len));
        }
    }

    /// Nobody looks at what comes, so that its absence proves nothing.
    pub fn not_reading(&mut self, now: Instant) {
        self.read(now);
        if let Some((since, _)) = &mut self.unfinished {
            *since = now;
        }
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
        let unfinished = self.unfinished.map_or(self.last_read, |(since, _)| since);
        self.last_read.min(unfinished) + self.patience()
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
    fn a_frame_that_is_never_whole_proves_life_only_while_it_grows() {
        let t = start();
        let mut beat = Heartbeat::new(10, t);
        let mut come = |at: u64, len, is_new| {
            let now = t + ms(1000 * at);
            beat.wrote(now);
            beat.read(now);
            beat.unfinished(len, is_new, now);
            beat.poll(now)
        };
        // Slowly, but it grows.
        for (at, len) in [(0, 100), (15, 130), (19, 164), (38, 228)] {
            assert_eq!(come(at, len, at == 0), Beat::Quiet, "{at}");
        }
        // Another one; then heartbeats that are taken for more of it.
        assert_eq!(come(50, 228, true), Beat::Quiet);
        for n in 1..4 {
            assert_eq!(come(50 + 5 * n, 228 + 8 * n as usize, false), Beat::Quiet);
        }
        assert_eq!(come(70, 260, false), Beat::Dead);
        // Time in which nobody looked does not count.
        let mut beat = Heartbeat::new(10, t);
        beat.unfinished(1, true, t);
        beat.not_reading(t + ms(19_000));
        beat.wrote(t + ms(38_000));
        assert_eq!(beat.poll(t + ms(38_999)), Beat::Quiet);
        assert_eq!(beat.deadline(), Some(t + ms(39_000)));
        beat.read(t + ms(39_000));
        assert_eq!(beat.poll(t + ms(39_000)), Beat::Dead);
        beat.unfinished(0, true, t + ms(39_000));
        assert_eq!(beat.poll(t + ms(39_000)), Beat::Quiet);
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
