//! The task that runs a connection: it alone reads and writes the socket.
//!
//! Handles and driver share [`Shared`]. A user's call appends to the protocol's output and nudges the driver, which has
//! its turn behind all tasks that are ready by then, and again as long as they go on filling it up to 64 KiB; so what they all queued leaves in one write, the
//! acks merged just before.
//! What arrives is read until the socket is empty, or 256 KiB, then taken apart in one go, and only afterwards, when nothing is
//! borrowed any more, is anybody woken.
//!
//! What must stay true:
//!
//! - `core` and `book` are borrowed within one statement or block, never across an await, and no code of a user's runs meanwhile:
//!   no waker is called and no delivery is dropped (which would settle it).
//! - The driver never waits for the socket to take bytes without reading from it as well.
//! - A peer is found dead only after an attempt to read: a task that kept the kernel busy for long is no proof of anything.
//! - Whatever ends the driver, everybody who waits is told: [`Shared::end`] runs also when it is dropped.

use std::io;
use std::pin::pin;
use std::task::Poll;
use std::time::Instant;

use kernel::{Interrupt, sleep_until};

use super::shared::Shared;
use super::transport::Transport;
use crate::proto::connection::Connection as Core;
use crate::proto::event::Down;
use crate::proto::outbox::Sending;

/// Read at once before anything else has its turn.
const FAIR_READ: usize = 256 << 10;
/// Less to send than this comes from no batch.
const A_BATCH: usize = 4 << 10;
/// Enough for a write that is worth the call.
const ENOUGH: usize = 64 << 10;
/// Room for a read that is worth the call.
const LEAST_READ: usize = 64 << 10;

/// What has been read and not been used yet.
pub(super) struct Input {
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            buf: vec![0; 2 * LEAST_READ],
            start: 0,
            end: 0,
        }
    }

    /// Room for the next read, behind what is left of a frame.
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.buf.len() - self.end < LEAST_READ {
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            if self.buf.len() - self.end < LEAST_READ {
                // No frame is longer than agreed upon, so this ends at about that.
                self.buf.resize(self.end + 2 * LEAST_READ, 0);
            }
        }
        &mut self.buf[self.end..]
    }

    /// Passes on what has come: `feed` answers how much of it was of use.
    pub(super) fn feed(&mut self, read: usize, feed: impl FnOnce(&[u8]) -> usize) {
        self.end += read;
        self.start += feed(&self.buf[self.start..self.end]);
    }
}

/// Bytes on their way into the socket.
#[derive(Default)]
struct Outgoing {
    sending: Sending,
    /// Since when the socket has taken nothing.
    stalled_since: Option<Instant>,
}

impl Outgoing {
    fn rest(&self) -> &[u8] {
        self.sending.rest()
    }

    /// Takes what there is to be sent, if the last is gone.
    fn fill(&mut self, shared: &Shared) {
        self.sending.fill(&mut shared.core.borrow_mut());
        shared.unsent.set(self.rest().len());
    }

    /// Gives up on a peer that takes nothing. One that has said so (`connection.blocked`) may take its time.
    fn check_stall(&mut self, shared: &Shared, now: Instant) {
        if shared.peek(Core::is_blocked) {
            self.stalled_since = self.stalled_since.map(|_| now);
        }
        let patience = shared.write_stall();
        if self
            .stalled_since
            .is_some_and(|since| now >= since + patience)
        {
            let secs = patience.as_secs_f64();
            let text = format!("the server has not taken a byte for {secs} s");
            shared.give_up(Down::Io(text));
        }
    }

    fn wrote(&mut self, n: usize, shared: &Shared, now: Instant) {
        self.sending.advance(n);
        self.stalled_since = None;
        shared.unsent.set(self.rest().len());
        shared.core.borrow_mut().wrote(now);
        shared.update_room();
    }
}

/// What the driver was woken by.
enum Woke {
    Wrote(io::Result<usize>),
    Read(io::Result<usize>),
    Nudged,
    Time,
    Interrupted(Interrupt),
}

/// A stream to a server, and what has been read from it.
pub(super) struct Pipe {
    pub(super) transport: Transport,
    pub(super) input: Input,
}

/// Runs a connection until it has ended.
pub(super) async fn drive(pipe: &mut Pipe, shared: &Shared) {
    let Pipe { transport, input } = pipe;
    let mut outgoing = Outgoing::default();
    let mut timer = pin!(None::<kernel::traps::SleepUntil>);
    let mut armed: Option<Instant> = None;
    let mut read_in_a_row = 0;
    let mut has_options = false;
    let mut now = kernel::now();
    loop {
        shared.nudge.clear();
        outgoing.fill(shared);
        shared.close_step(now, outgoing.rest().is_empty());
        if shared.peek(Core::is_down) {
            last_words(transport, &mut outgoing, shared).await;
            return;
        }
        if outgoing.rest().is_empty() {
            // `close_step` may have had something to say.
            outgoing.fill(shared);
        }
        if !has_options && let Some(tuned) = shared.peek(Core::tuned) {
            has_options = true;
            transport.set_user_timeout(u32::from(tuned.heartbeat) * 2);
        }
        if !outgoing.rest().is_empty() {
            outgoing.stalled_since.get_or_insert(now);
        }
        let due = shared.deadline(outgoing.stalled_since, now);
        if let Some(due) = due
            && armed.is_none_or(|armed| due < armed)
        {
            timer.set(Some(sleep_until(due)));
            armed = Some(due);
        }

        let woke = {
            let wants_write = !outgoing.rest().is_empty();
            let wants_read = shared.overfull.get() == 0;
            let mut write = pin!(transport.write(outgoing.rest()));
            let mut read = pin!(transport.read(input.space()));
            // Ciphertext that the system has not taken leaves with the next read or write. Where there is neither, it has to be seen to.
            let wants_flush = !wants_write && !wants_read;
            let mut flush = pin!(wants_flush.then(|| transport.flush()));
            let mut nudge = pin!(shared.nudge.wait());
            std::future::poll_fn(|cx| {
                if wants_write && let Poll::Ready(wrote) = write.as_mut().poll(cx) {
                    return Poll::Ready(Woke::Wrote(wrote));
                }
                if wants_read && let Poll::Ready(read) = read.as_mut().poll(cx) {
                    return Poll::Ready(Woke::Read(read));
                }
                if let Some(flushing) = flush.as_mut().as_pin_mut()
                    && let Poll::Ready(flushed) = flushing.poll(cx)
                {
                    flush.set(None);
                    if let Err(error) = flushed {
                        return Poll::Ready(Woke::Wrote(Err(error)));
                    }
                }
                if let Some(timer) = timer.as_mut().as_pin_mut()
                    && let Poll::Ready(time) = timer.poll(cx)
                {
                    return Poll::Ready(time.map_or_else(Woke::Interrupted, |_| Woke::Time));
                }
                nudge.as_mut().poll(cx).map(|nudged| match nudged {
                    Ok(()) => Woke::Nudged,
                    Err(interrupt) => Woke::Interrupted(interrupt),
                })
            })
            .await
        };
        now = kernel::now();
        if let Some(due) = armed
            && due <= now
        {
            if let Woke::Read(Ok(1..)) = woke {
                // That we are alive is said before what has come is looked at.
                shared.core.borrow_mut().beat(now);
            }
            shared.lagged(now - due);
        }
        match woke {
            Woke::Wrote(Ok(n)) => {
                outgoing.wrote(n, shared, now);
            }
            Woke::Read(Ok(0)) => {
                shared.with_sink(|core, sink| core.stream_ended(None, sink));
            }
            Woke::Read(Ok(n)) => {
                input.feed(n, |bytes| shared.feed(bytes, now));
                read_in_a_row += n;
                if armed.is_some_and(|at| at <= now) {
                    armed = None;
                    timer.set(None);
                    shared.tick(now);
                    outgoing.check_stall(shared, now);
                }
                if read_in_a_row >= FAIR_READ {
                    read_in_a_row = 0;
                    if let Err(interrupt) = kernel::yield_now().await {
                        shared.give_up(Down::Io(interrupt.to_string()));
                    }
                    now = kernel::now();
                }
                continue;
            }
            Woke::Wrote(Err(error)) | Woke::Read(Err(error)) => {
                let text = Some(error.to_string());
                shared.with_sink(|core, sink| core.stream_ended(text, sink));
            }
            Woke::Nudged => {
                if let Err(interrupt) = gather(shared).await {
                    shared.give_up(Down::Io(interrupt.to_string()));
                }
            }
            Woke::Time => {
                armed = None;
                timer.set(None);
                shared.tick(now);
                outgoing.check_stall(shared, now);
            }
            Woke::Interrupted(interrupt) => {
                shared.give_up(Down::Io(format!("its task was interrupted: {interrupt}")));
            }
        }
        read_in_a_row = 0;
    }
}

/// Lets tasks go on that are in the middle of publishing: after so many operations in a row each has to let others run, and the
/// driver is one of them.
async fn gather(shared: &Shared) -> Result<(), Interrupt> {
    let mut queued = shared.peek(Core::output_len);
    while (A_BATCH..ENOUGH).contains(&queued) {
        kernel::yield_now().await?;
        let before = std::mem::replace(&mut queued, shared.peek(Core::output_len));
        if queued <= before {
            break;
        }
    }
    Ok(())
}

/// Sends what there still is to say, the answer to a `connection.close`, if the socket takes it at once.
async fn last_words(transport: &Transport, outgoing: &mut Outgoing, shared: &Shared) {
    loop {
        outgoing.fill(shared);
        if outgoing.rest().is_empty() {
            let mut goodbye = pin!(transport.say_goodbye());
            let said = std::future::poll_fn(|cx| Poll::Ready(goodbye.as_mut().poll(cx))).await;
            if let Poll::Ready(Err(error)) = said {
                log::debug!("the end of the connection was not said: {error}");
            }
            return;
        }
        let wrote = {
            let mut write = pin!(transport.write(outgoing.rest()));
            std::future::poll_fn(|cx| match write.as_mut().poll(cx) {
                Poll::Ready(Ok(n)) => Poll::Ready(n),
                Poll::Ready(Err(_)) | Poll::Pending => Poll::Ready(0),
            })
            .await
        };
        if wrote == 0 {
            return;
        }
        outgoing.sending.advance(wrote);
    }
}
