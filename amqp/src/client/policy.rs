//! When to connect again, and when to leave it. Pure: what happened and how long things lasted go in.

use std::time::Duration;

use super::Recovery;
use crate::error::ReplyCode;
use crate::proto::event::Down;

/// Waits that double, each drawn at random between nothing and its bound ("full jitter"), so that clients which lost the
/// same server do not come back in step.
#[derive(Debug)]
pub(super) struct Backoff {
    first: Duration,
    max: Duration,
    tries: u32,
    chance: u64,
}

impl Backoff {
    pub(super) fn new(recovery: Recovery, seed: u64) -> Self {
        Self {
            first: recovery.first_wait,
            max: recovery.max_wait,
            tries: 0,
            chance: seed,
        }
    }

    /// How long to wait before the next try.
    pub(super) fn next(&mut self) -> Duration {
        let bound = self.first.saturating_mul(2_u32.saturating_pow(self.tries));
        let bound = bound.min(self.max);
        self.tries = self.tries.saturating_add(1);
        // SplitMix64: good from any seed.
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        bound.mul_f64((z >> 11) as f64 / (1_u64 << 53) as f64)
    }

    fn reset(&mut self) {
        self.tries = 0;
    }
}

/// What has become of the attempts so far.
#[derive(Debug)]
pub(super) struct Policy {
    recovery: Recovery,
    backoff: Backoff,
    /// Attempts since the last that succeeded.
    attempt: u32,
    /// The last connection ended because one side broke the protocol.
    was_fault: bool,
}

impl Policy {
    pub(super) fn new(recovery: Recovery, seed: u64) -> Self {
        Self {
            recovery,
            backoff: Backoff::new(recovery, seed),
            attempt: 0,
            was_fault: false,
        }
    }

    /// Whether a connection that ended like this, after it had been fine for so long, is to be made again.
    pub(super) fn recovers(&mut self, down: &Down, up_for: Duration) -> bool {
        // One that lasted is forgiven; one that did not goes on where the last left off, or a server that accepts and closes
        // would be asked without a pause.
        if up_for >= self.recovery.max_wait {
            self.backoff.reset();
            self.was_fault = false;
        }
        if down.is_final() {
            return false;
        }
        let is_fault = match down {
            Down::ClosedByPeer(reason) => is_fault(reason.code),
            Down::Violation(_) => true,
            Down::ClosedByUs
            | Down::Handshake(_)
            | Down::HeartbeatMissed(_)
            | Down::Eof
            | Down::Io(_) => false,
        };
        // What broke it once may have been chance; twice in a row, it is what we do, and we would do it again.
        !(std::mem::replace(&mut self.was_fault, is_fault) && is_fault)
    }

    /// The number of the next attempt, from 1, and the wait before it; `None` if there have been as many as allowed.
    pub(super) fn next_attempt(&mut self) -> Option<(u32, Duration)> {
        if self
            .recovery
            .attempts
            .is_some_and(|most| self.attempt >= most)
        {
            return None;
        }
        self.attempt = self.attempt.saturating_add(1);
        Some((self.attempt, self.backoff.next()))
    }

    /// Everything is as it was before.
    pub(super) fn recovered(&mut self) {
        self.attempt = 0;
    }
}

/// 501 to 505: frames and commands that one side does not accept from the other.
fn is_fault(code: ReplyCode) -> bool {
    (501..=505).contains(&code.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::event::CloseReason;

    const RECOVERY: Recovery = Recovery {
        first_wait: Duration::from_millis(100),
        max_wait: Duration::from_secs(10),
        attempts: None,
    };

    fn closed(code: u16) -> Down {
        Down::ClosedByPeer(CloseReason {
            code: ReplyCode(code),
            text: String::new(),
            class: 0,
            method: 0,
        })
    }

    /// Accepts: amqp/R4
    #[test]
    fn waits_are_spread_below_a_bound_that_doubles_and_never_end() {
        let mut longest = [Duration::ZERO; 12];
        let mut shortest = [Duration::MAX; 12];
        for seed in 0..2_000 {
            let mut policy = Policy::new(RECOVERY, seed << 20);
            for n in 0..12 {
                let (attempt, wait) = policy.next_attempt().unwrap();
                assert_eq!(attempt as usize, n + 1);
                longest[n] = longest[n].max(wait);
                shortest[n] = shortest[n].min(wait);
            }
        }
        for n in 0..12 {
            let bound = Duration::from_millis((100 << n).min(10_000));
            assert!(
                longest[n] <= bound && longest[n] > bound.mul_f64(0.9),
                "{n}: {longest:?}"
            );
            assert!(shortest[n] < bound.mul_f64(0.1), "{n}: {shortest:?}");
        }
        let mut policy = Policy::new(RECOVERY, 7);
        assert!((0..100_000).all(|_| policy.next_attempt().is_some()));
    }

    #[test]
    fn attempts_are_counted_from_the_last_success_and_may_be_limited() {
        let mut policy = Policy::new(
            Recovery {
                attempts: Some(2),
                ..RECOVERY
            },
            7,
        );
        assert_eq!(policy.next_attempt().map(|(n, _)| n), Some(1));
        policy.recovered();
        assert_eq!(policy.next_attempt().map(|(n, _)| n), Some(1));
        assert_eq!(policy.next_attempt().map(|(n, _)| n), Some(2));
        assert_eq!(policy.next_attempt(), None);
    }

    #[test]
    fn a_connection_that_does_not_last_does_not_shorten_the_waits() {
        let mut policy = Policy::new(RECOVERY, 7);
        for _ in 0..20 {
            policy.next_attempt().unwrap();
            policy.recovered();
            assert!(policy.recovers(&Down::Eof, Duration::from_secs(9)));
        }
        assert_eq!(policy.backoff.tries, 20);
        assert!(policy.recovers(&Down::Eof, Duration::from_secs(10)));
        assert_eq!(policy.backoff.tries, 0);
    }

    /// Accepts: amqp/R15
    #[test]
    fn what_would_end_the_same_way_again_is_not_recovered() {
        let short = Duration::from_secs(1);
        let mut policy = Policy::new(RECOVERY, 7);
        for code in [402, 403, 530] {
            assert!(!policy.recovers(&closed(code), short), "{code}");
        }
        assert!(!policy.recovers(&Down::ClosedByUs, short));
        for code in [320, 506, 540, 541] {
            for _ in 0..2 {
                assert!(policy.recovers(&closed(code), short), "{code}");
            }
        }
        for code in 501..=505 {
            let mut policy = Policy::new(RECOVERY, 7);
            assert!(policy.recovers(&closed(code), short), "{code} once");
            assert!(policy.recovers(&Down::Eof, short), "something else between");
            assert!(policy.recovers(&closed(code), short), "{code} once more");
            assert!(!policy.recovers(&closed(505), short), "twice in a row");
            let mut policy = Policy::new(RECOVERY, 7);
            assert!(policy.recovers(&closed(code), short));
            let long = RECOVERY.max_wait;
            assert!(policy.recovers(&closed(code), long), "it was fine for long");
        }
    }
}
