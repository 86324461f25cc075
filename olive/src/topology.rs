//! Names of exchanges and queues, and how a delay is spelled as a route through the ladder.
//!
//! Queues that others publish to carry no arguments (a producer that declares them plainly would be refused with 406), so nothing of
//! olive's rests on them: retries, delays and dead letters are published by olive itself.
//!
//! The ladder holds a message for any number of seconds with no worker running. Level N is a topic exchange; a routing key starts
//! with one bit a level, highest first. Bit 1 leads into that level's queue, where the message stays 2^N seconds and is then
//! dead-lettered to the next lower level; bit 0 leads there at once. Below level 0 the words after the bits name the queue:
//!
//! ```text
//! Olive.delay.22 ─1▶ queue Olive.delay.22 (TTL 2^22 s) ─┐
//!       └────────0─────────────────────────────────────▶ Olive.delay.21 … Olive.delay.0 ─▶ Olive.delay.out ─"*.*. … .Olive.q"▶ Olive.q
//! ```
//!
//! One queue with a TTL per message would be simpler and wrong: RabbitMQ expires at the head only, so a short delay waits behind a long one.

use std::time::Duration;

/// Levels of the ladder: 2^23 - 1 seconds, 97 days. The TTL of one more would not fit into the 32 bits that RabbitMQ counts
/// milliseconds with.
pub const LEVELS: u32 = 23;
/// The exchange below the last level; the queues are bound to it.
pub const OUT: &str = "Olive.delay.out";
/// Longest queue name whose route still fits into a routing key (255 bytes), in bytes.
pub const MAX_QUEUE_NAME: usize = 255 - 2 * LEVELS as usize;

/// Name of a level's exchange and of its queue.
#[must_use]
pub fn level(n: u32) -> String {
    format!("Olive.delay.{n}")
}

/// How long a level's queue keeps a message, in milliseconds (`x-message-ttl`).
#[must_use]
pub fn level_ttl(n: u32) -> u64 {
    1000 << n
}

/// Where a level hands its messages on to.
#[must_use]
pub fn below(n: u32) -> String {
    n.checked_sub(1).map_or_else(|| OUT.to_owned(), level)
}

/// The topic pattern of a level for the messages that stay (`bit` 1) or pass (`bit` 0).
#[must_use]
pub fn level_pattern(n: u32, bit: u8) -> String {
    format!("{}{bit}.#", "*.".repeat((LEVELS - 1 - n) as usize))
}

/// The topic pattern that takes a queue's messages off the ladder. Exactly one `*` a level: with `#` in their place a queue
/// `q` would also get what is meant for a queue `a.q`.
#[must_use]
pub fn out_pattern(queue: &str) -> String {
    format!("{}{queue}", "*.".repeat(LEVELS as usize))
}

/// The exchange and the routing key that bring a message to `queue` after `delay`, rounded up to whole seconds.
/// `None` when the queue's name does not fit, or would read as a pattern.
#[must_use]
pub fn delayed(delay: Duration, queue: &str) -> Option<(String, String)> {
    if queue.is_empty()
        || queue.len() > MAX_QUEUE_NAME
        || queue.split('.').any(|word| word == "*" || word == "#")
    {
        return None;
    }
    let seconds = delay
        .as_secs()
        .saturating_add(u64::from(delay.subsec_nanos() > 0));
    let seconds = seconds.min((1 << LEVELS) - 1);
    let bits = (0..LEVELS)
        .rev()
        .map(|n| if seconds >> n & 1 == 1 { "1." } else { "0." });
    Some((level(LEVELS - 1), bits.collect::<String>() + queue))
}

/// Name of the queue that keeps what could not be done.
#[must_use]
pub fn dead(queue: &str) -> String {
    format!("{queue}.dead")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // AMQP's topic rule: `*` is one word, `#` any number of them.
    fn matches(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), _) => {
                matches(rest, key) || (!key.is_empty() && matches(pattern, &key[1..]))
            }
            (Some((&word, rest)), Some((&first, key))) => {
                (word == "*" || word == first) && matches(rest, key)
            }
            _ => false,
        }
    }

    fn topic(pattern: &str, key: &str) -> bool {
        matches(
            &pattern.split('.').collect::<Vec<_>>(),
            &key.split('.').collect::<Vec<_>>(),
        )
    }

    // Sends a key down the ladder; the time it spends there, and the queues of `bound` that get it.
    fn walk<'a>(key: &str, bound: &[&'a str]) -> (Duration, Vec<&'a str>) {
        let mut spent = Duration::ZERO;
        for n in (0..LEVELS).rev() {
            let (stays, passes) = (
                topic(&level_pattern(n, 1), key),
                topic(&level_pattern(n, 0), key),
            );
            assert!(stays != passes, "level {n} must take {key} exactly once");
            if stays {
                spent += Duration::from_millis(level_ttl(n));
            }
        }
        (
            spent,
            bound
                .iter()
                .copied()
                .filter(|queue| topic(&out_pattern(queue), key))
                .collect(),
        )
    }

    #[test]
    fn a_delay_is_the_sum_of_its_levels() {
        let (exchange, key) = delayed(Duration::from_secs(5), "Olive.q").unwrap();
        assert_eq!(exchange, "Olive.delay.22");
        assert!(key.ends_with(".0.1.0.1.Olive.q"), "{key}");
        assert_eq!(
            walk(&key, &["Olive.q"]),
            (Duration::from_secs(5), vec!["Olive.q"])
        );
    }

    #[test]
    fn a_queue_never_gets_what_is_meant_for_another_whose_name_ends_alike() {
        let (_, key) = delayed(Duration::from_secs(1), "My.Olive.q").unwrap();
        assert_eq!(
            walk(&key, &["q", "Olive.q", "My.Olive.q", "x.My.Olive.q"]).1,
            ["My.Olive.q"]
        );
    }

    #[test]
    fn delays_round_up_and_end_at_the_top_of_the_ladder() {
        let spent = |delay| walk(&delayed(delay, "q").unwrap().1, &[]).0;
        assert_eq!(spent(Duration::from_millis(1)), Duration::from_secs(1));
        assert_eq!(spent(Duration::from_millis(2001)), Duration::from_secs(3));
        assert_eq!(spent(Duration::MAX), Duration::from_secs((1 << LEVELS) - 1));
    }

    #[test]
    fn a_name_that_would_not_fit_or_reads_as_a_pattern_has_no_route() {
        let second = Duration::from_secs(1);
        assert_eq!(
            delayed(second, &"q".repeat(MAX_QUEUE_NAME))
                .unwrap()
                .1
                .len(),
            255
        );
        assert_eq!(delayed(second, &"q".repeat(MAX_QUEUE_NAME + 1)), None);
        assert_eq!(
            (
                delayed(second, "a.#"),
                delayed(second, "*"),
                delayed(second, "")
            ),
            (None, None, None)
        );
    }

    #[test]
    fn levels_hand_on_downwards() {
        assert_eq!(
            (below(22), below(1), below(0)),
            ("Olive.delay.21".into(), "Olive.delay.0".into(), OUT.into())
        );
        assert_eq!((level_ttl(0), level_ttl(22)), (1000, 4_194_304_000));
        assert_eq!(dead("Olive.q"), "Olive.q.dead");
    }

    proptest! {
        #[test]
        fn any_delay_comes_out_at_its_queue_alone(seconds in 0_u64..1 << LEVELS, queue in "[a-zA-Z0-9_-]{1,9}(\\.[a-z]{1,5}){0,3}") {
            let (_, key) = delayed(Duration::from_secs(seconds), &queue).unwrap();
            let longer = format!("x.{queue}");
            let (spent, got) = walk(&key, &[&queue, &longer]);
            prop_assert_eq!(spent.as_secs(), seconds);
            prop_assert_eq!(got, vec![queue.as_str()]);
        }
    }
}
