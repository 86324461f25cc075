//! Names that no other test uses: all tests share one RabbitMQ node, and a virtual host each would cost a second each.

use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// `kind` made unique over the tests of this run and over runs against the same broker.
pub fn unique(kind: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let serial = NEXT.fetch_add(1, Ordering::Relaxed);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("the clock is past 1970");
    format!("{kind}-{}-{}-{serial}", process::id(), now.as_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_names_of_a_kind_differ() {
        assert_ne!(unique("queue"), unique("queue"));
    }
}
