//! What the seed producer prints: the tasks it sent and the replies it got.

use std::collections::{BTreeMap, BTreeSet};

use rig::Ended;
use serde_json::Value;

/// The tasks sent, and the replies by task; a redelivered task may have several.
#[derive(Debug, Default)]
pub(crate) struct Replies {
    pub(crate) sent: BTreeSet<String>,
    pub(crate) by_task: BTreeMap<String, Vec<Value>>,
}

impl Replies {
    /// Reads the output of a producer that must have ended well.
    #[track_caller]
    pub(crate) fn of(producer: Ended) -> Self {
        let mut replies = Self::default();
        for line in producer.expect_code(0).stdout.lines() {
            let value: Value =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            match (&value["sent"], &value["tid"]) {
                (Value::String(tid), _) => _ = replies.sent.insert(tid.clone()),
                (_, Value::String(tid)) => {
                    replies.by_task.entry(tid.clone()).or_default().push(value)
                }
                _ => panic!("neither a task nor a reply: {line}"),
            }
        }
        replies
    }

    /// The one reply to the one task.
    #[track_caller]
    pub(crate) fn only(&self) -> &Value {
        let replies: Vec<_> = self.by_task.values().flatten().collect();
        assert_eq!(replies.len(), 1, "{replies:#?}");
        replies[0]
    }

    /// Every reply, in no order.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Value> {
        self.by_task.values().flatten()
    }

    /// Asserts that every task was answered, every answer is to a task of ours, and each is this status.
    #[track_caller]
    pub(crate) fn expect_all(&self, status: &str) -> &Self {
        assert_eq!(
            self.by_task.keys().collect::<BTreeSet<_>>(),
            self.sent.iter().collect()
        );
        for reply in self.all() {
            assert_eq!(reply["status"], status, "{reply:#}");
        }
        self
    }
}
