//! The task that runs a connection: it alone reads and writes the socket.
//!
//! Handles and driver share [`Shared`]. A user's call appends to the protocol's output and nudges the driver, which has
//! its turn behind all tasks that are ready by then, and again as long as they go on filling it up to 64 KiB; so what they all queued leaves in one write, the
//! acks merged just before.
//! What a read brings is taken apart in one go, and only afterwards, when nothing is borrowed any more, is anybody woken. When the socket is empty, or
//! 256 KiB have been read, whoever was woken has a turn, and what they say in return is sent before the driver waits again. So a message and its answer
//! take two turns of the driver: one that reads, one that writes and waits. The wait to read is made once for each read, whatever else there is to do
//! meanwhile.
//!
//! What must stay true:
//!
//! - `core` and `book` are borrowed within one statement or block, never across an await, and no code of a user's runs meanwhile:
//!   no waker is called and no delivery is dropped (which would settle it).
//! - The driver never waits for the socket to take bytes without reading from it as well.
//! - A peer is found dead only after an attempt to read: a task that kept the kernel busy for long is no proof of anything.
//! - Whatever ends the driver, everybody who waits is told: [`Shared::end`] runs also when it is dropped.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Instant;

use kernel::traps::SleepUntil;
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

    fn is_empty(&self) -> bool {
        self.rest().is_empty()
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
    if let Some(tuned) = shared.peek(Core::tuned) {
        transport.set_user_timeout(u32::from(tuned.heartbeat) * 2);
    }
    let mut driver = Driver {
        transport,
        shared,
        outgoing: Outgoing::default(),
        timer: pin!(None),
        due: None,
        now: kernel::now(),
    };
    let mut read_in_a_row = 0;
    loop {
        let space = input.space();
        let room = space.len();
        let read = match driver.serve(pin!(transport.read(space))).await {
            None => return,
            Some(Ok(0)) => {
                shared.with_sink(|core, sink| core.stream_ended(None, sink));
                continue;
            }
            Some(Ok(read)) => read,
            Some(Err(error)) => {
                driver.broke(&error);
                continue;
            }
        };
        driver.take_in(input, read);
        read_in_a_row += read;
        if transport.has_emptied(read, room) || read_in_a_row >= FAIR_READ {
            read_in_a_row = 0;
            driver.let_others_run().await;
        }
    }
}

struct Driver<'a> {
    transport: &'a Transport,
    shared: &'a Shared,
    outgoing: Outgoing,
    timer: Pin<&'a mut Option<SleepUntil>>,
    /// When the timer goes off.
    due: Option<Instant>,
    /// The time since which no other task has run.
    now: Instant,
}

impl Driver<'_> {
    /// Sends what there is, and keeps time, until something has been read. `None` if the connection has ended.
    ///
    /// `read` is one wait to read, however often there is something else to do meanwhile.
    async fn serve(
        &mut self,
        mut read: Pin<&mut impl Future<Output = io::Result<usize>>>,
    ) -> Option<io::Result<usize>> {
        let shared = self.shared;
        loop {
            shared.nudge.clear();
            if let Err(error) = self.send().await {
                self.broke(&error);
            }
            shared.close_step(self.now, self.outgoing.is_empty());
            if shared.peek(Core::is_down) {
                self.last_words().await;
                return None;
            }
            self.set_timer();
            match self.wait(read.as_mut()).await {
                Woke::Read(read) => return Some(read),
                Woke::Wrote(Ok(n)) => self.outgoing.wrote(n, shared, self.now),
                Woke::Wrote(Err(error)) => self.broke(&error),
                Woke::Nudged => self.gather().await,
                Woke::Time => self.tick(),
                Woke::Interrupted(interrupt) => self.interrupted(&interrupt),
            }
        }
    }

    /// Gives the socket what there is, as far as it takes that at once.
    async fn send(&mut self) -> io::Result<()> {
        self.outgoing.fill(self.shared);
        while !self.outgoing.is_empty() {
            let Some(wrote) = at_once(self.transport.write(self.outgoing.rest())).await else {
                self.outgoing.stalled_since.get_or_insert(self.now);
                break;
            };
            self.outgoing.wrote(wrote?, self.shared, self.now);
            if self.shared.peek(Core::output_len) > 0 {
                // Of large bodies there is one part at a time.
                self.outgoing.fill(self.shared);
            }
        }
        Ok(())
    }

    fn set_timer(&mut self) {
        let due = self.shared.deadline(self.outgoing.stalled_since, self.now);
        if let Some(due) = due
            && self.due.is_none_or(|armed| due < armed)
        {
            self.timer.set(Some(sleep_until(due)));
            self.due = Some(due);
        }
    }

    async fn wait(&mut self, mut read: Pin<&mut impl Future<Output = io::Result<usize>>>) -> Woke {
        let (transport, shared) = (self.transport, self.shared);
        let wants_write = !self.outgoing.is_empty();
        let wants_read = shared.overfull.get() == 0;
        // Ciphertext that the system has not taken leaves with the next read or write. Where there is neither, it has to be seen to.
        let wants_flush = !wants_write && !wants_read;
        let mut write = pin!(wants_write.then(|| transport.write(self.outgoing.rest())));
        let mut flush = pin!(wants_flush.then(|| transport.flush()));
        let mut nudge = pin!(shared.nudge.wait());
        let woke = poll_fn(|cx| {
            if let Some(write) = write.as_mut().as_pin_mut()
                && let Poll::Ready(wrote) = write.poll(cx)
            {
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
            if let Poll::Ready(nudged) = nudge.as_mut().poll(cx) {
                return Poll::Ready(nudged.map_or_else(Woke::Interrupted, |()| Woke::Nudged));
            }
            if let Some(timer) = self.timer.as_mut().as_pin_mut()
                && let Poll::Ready(time) = timer.poll(cx)
            {
                return Poll::Ready(time.map_or_else(Woke::Interrupted, |_| Woke::Time));
            }
            Poll::Pending
        })
        .await;
        self.now = kernel::now();
        if let Some(due) = self.due
            && due <= self.now
        {
            shared.lagged(self.now - due);
        }
        woke
    }

    /// Takes apart what has come.
    fn take_in(&mut self, input: &mut Input, read: usize) {
        let is_due = self.due.is_some_and(|due| due <= self.now);
        if is_due {
            // That we are alive is said before what has come is looked at.
            self.shared.core.borrow_mut().beat(self.now);
        }
        input.feed(read, |bytes| self.shared.feed(bytes, self.now));
        if is_due {
            self.tick();
        }
    }

    /// Does what is due; only after an attempt to read.
    fn tick(&mut self) {
        self.due = None;
        self.timer.set(None);
        self.shared.tick(self.now);
        self.outgoing.check_stall(self.shared, self.now);
    }

    /// Whoever was woken by what has come goes first, so that what they have to say leaves in one write.
    async fn let_others_run(&mut self) {
        if let Err(interrupt) = kernel::yield_now().await {
            self.interrupted(&interrupt);
        }
        self.gather().await;
    }

    /// Lets tasks go on that are in the middle of publishing: after so many operations in a row each has to let others run, and the
    /// driver is one of them.
    async fn gather(&mut self) {
        let mut queued = self.shared.peek(Core::output_len);
        while (A_BATCH..ENOUGH).contains(&queued) {
            if let Err(interrupt) = kernel::yield_now().await {
                self.interrupted(&interrupt);
                break;
            }
            let before = std::mem::replace(&mut queued, self.shared.peek(Core::output_len));
            if queued <= before {
                break;
            }
        }
        self.now = kernel::now();
    }

    fn broke(&self, error: &io::Error) {
        let text = Some(error.to_string());
        self.shared
            .with_sink(|core, sink| core.stream_ended(text, sink));
    }

    fn interrupted(&self, interrupt: &Interrupt) {
        let text = format!("its task was interrupted: {interrupt}");
        self.shared.give_up(Down::Io(text));
    }

    /// Sends what there still is to say, the answer to a `connection.close`, if the socket takes it at once.
    async fn last_words(&mut self) {
        if self.send().await.is_ok()
            && self.outgoing.is_empty()
            && let Some(Err(error)) = at_once(self.transport.say_goodbye()).await
        {
            log::debug!("the end of the connection was not said: {error}");
        }
    }
}

/// What a future has to say at its first poll, and then it is dropped.
async fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|cx| {
        Poll::Ready(match future.as_mut().poll(cx) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        })
    })
    .await
}
