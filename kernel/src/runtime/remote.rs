//! What other threads hold of a kernel: a handle, and the answers that its tasks wait for.

use std::sync::Arc;

use super::inbox::{InboxSender, Note, Ticket};

/// A kernel as other threads see it. It may outlive the kernel; then it does nothing.
#[derive(Clone)]
pub struct Remote {
    sender: InboxSender,
    _alive: Arc<()>,
}

impl Remote {
    pub(super) const fn new(sender: InboxSender, alive: Arc<()>) -> Self {
        Self {
            sender,
            _alive: alive,
        }
    }

    /// Runs `call` on the kernel's thread, between two tasks; there it may use [`spawn`](crate::spawn) and every trap that does not block.
    /// False if the kernel is gone.
    pub fn call(&self, call: impl FnOnce() + Send + 'static) -> bool {
        self.sender.call(call)
    }
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Remote")
    }
}

/// Answers one wait of a kernel's task, from any thread, once. Dropping it answers too, so that no task waits for a thread that is gone.
pub struct Completer {
    sender: InboxSender,
    ticket: Ticket,
}

impl Completer {
    pub(crate) const fn new(sender: InboxSender, ticket: Ticket) -> Self {
        Self { sender, ticket }
    }

    /// Wakes the task.
    pub fn complete(self) {}

    /// Answers without waking the kernel, if that sleeps; to wake it is then up to the caller, who may have more answers soon. `None` if there is nothing to wake:
    /// the kernel runs, or another owes it that already.
    pub fn complete_on_credit(self) -> Option<Ring> {
        let is_owed = self.sender.push_on_credit(Note::Complete(self.ticket));
        let sender = self.sender;
        std::mem::forget(self);
        is_owed.then_some(Ring { sender })
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        self.sender.push(Note::Complete(self.ticket));
    }
}

impl std::fmt::Debug for Completer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Completer")
    }
}

/// Wakes a sleeping kernel, for which there are answers, when it is dropped. Made by [`Completer::complete_on_credit`].
#[must_use = "dropping it wakes the kernel"]
pub struct Ring {
    sender: InboxSender,
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.sender.ring();
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}
