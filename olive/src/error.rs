//! What can end a command, in words for its user: what, where, and what to do next.

use crate::message::Failure;

/// Why a command or an app could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Settings that cannot be used, one line each.
    #[error("{}", lines(.0))]
    Config(Vec<String>),
    /// Nobody answers at the broker's address.
    #[error(
        "cannot reach the broker at {url}: {cause}\n  start RabbitMQ, or run without one:   olive dev"
    )]
    Unreachable {
        /// The address, password masked.
        url: String,
        /// What the system says.
        cause: String,
    },
    /// The broker does not accept user and password, or not for that vhost.
    #[error(
        "the broker at {url} refused the login for user \"{user}\" ({cause}); set user and password in olive_amqp_url{}",
        guests_place(.user)
    )]
    LoginRefused {
        /// The address, password masked.
        url: String,
        /// The user.
        user: String,
        /// What the broker says.
        cause: String,
    },
    /// Exchange or queue exist with other settings.
    #[error(
        "{name} exists with other settings ({cause}).\n  it was probably made by sweepea.  keep it: olive_amqp_durable={keep}   replace it: delete it, then start again"
    )]
    Mismatch {
        /// What exists, for instance `queue "Olive.q"`.
        name: String,
        /// What the broker says.
        cause: String,
        /// The value of `olive_amqp_durable` that goes with it.
        keep: &'static str,
    },
    /// The broker closed the connection or a channel, or answered with something unexpected.
    #[error("broker at {url}: {cause}")]
    Broker {
        /// The address, password masked.
        url: String,
        /// What happened.
        cause: String,
    },
    /// A child does not come up.
    #[error("worker process does not start: {cause}")]
    WorkerBoot {
        /// What it said, its traceback included.
        cause: String,
    },
    /// No queue takes the task.
    #[error(
        "no queue takes the task (exchange \"{exchange}\", routing key \"{routing_key}\")\n  start a worker first:   olive run"
    )]
    Unroutable {
        /// Exchange it was published to.
        exchange: String,
        /// Routing key it was published with.
        routing_key: String,
    },
    /// The task that was waited for failed.
    #[error("task {tid} FAILED: {}: {}", .failure.kind, .failure.message)]
    TaskFailed {
        /// Task id.
        tid: String,
        /// How.
        failure: Failure,
    },
    /// The task that was waited for did not end in time.
    #[error("task {tid} has not ended after {waited}; it is still queued or running")]
    WaitedTooLong {
        /// Task id.
        tid: String,
        /// How long was waited.
        waited: String,
    },
    /// A second signal cut the shutdown short.
    #[error("left at once: {unfinished} unfinished tasks go back to the queue")]
    Forced {
        /// Deliveries that were not acked.
        unfinished: usize,
    },
    /// The demo did not go as it should.
    #[error("{0}")]
    Unexpected(String),
    /// The operating system refused something.
    #[error("{what}: {cause}")]
    System {
        /// What was attempted.
        what: String,
        /// What the system says.
        cause: std::io::Error,
    },
}

impl Error {
    /// The exit code of the `olive` command: 1 failed or forced, 2 settings, 3 broker, 4 worker does not start, 124 waited too long.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::TaskFailed { .. }
            | Self::Forced { .. }
            | Self::Unexpected(_)
            | Self::System { .. } => 1,
            Self::Config(_) => 2,
            Self::Unreachable { .. }
            | Self::LoginRefused { .. }
            | Self::Mismatch { .. }
            | Self::Broker { .. }
            | Self::Unroutable { .. } => 3,
            Self::WorkerBoot { .. } => 4,
            Self::WaitedTooLong { .. } => 124,
        }
    }
}

fn guests_place(user: &str) -> &'static str {
    match user {
        "guest" => "; RabbitMQ lets guest in from its own machine only",
        _ => "",
    }
}

fn lines(bad: &[String]) -> String {
    bad.iter()
        .map(|line| format!("config: {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}
