//! How long a test waits for something that must happen.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longer than anything takes on a busy machine: it ends a hang, it measures nothing.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The instant at which a wait gives up.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Default for Deadline {
    fn default() -> Self {
        Self::after(PATIENCE)
    }
}

impl Deadline {
    /// For what may take longer than others.
    pub fn after(patience: Duration) -> Self {
        Self(Instant::now() + patience)
    }

    /// What is left of it; `None` once it has passed.
    pub fn left(&self) -> Option<Duration> {
        let left = self.0.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Waits until the file descriptor is readable (a connection to accept, bytes, an exit on a pidfd). False: too late.
    pub fn wait_readable(&self, fd: impl AsFd) -> bool {
        while let Some(left) = self.left() {
            let timeout = Timespec::try_from(left).expect("minutes fit into a timespec");
            let mut fds = [PollFd::new(&fd, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return true,
                Err(error) => panic!("poll: {error}"),
            }
        }
        false
    }
}
