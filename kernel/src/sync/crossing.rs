//! How the universal types wait: a lock, and lines in which tasks of any kernel, futures of any executor, and threads stand.
//!
//! It is the scheme of the [`Line`](super::Line) of one kernel. A wake is a grant: it is given to one *ticket*, which redeems it when it runs,
//! or hands it on if it goes away before. What was granted never travels by itself. So it does not matter that a task is interrupted, on its own thread,
//! at the moment in which another thread serves it: what it would have got still lies where it lay.
//!
//! Nobody is woken, and no foreign code runs, under the lock.

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::error::Interrupt;
use crate::primitives::Mutex;
use crate::traps::{Completer, FutureWait, future_wait, poll_proceed};

/// A state that threads share.
#[derive(Debug, Default)]
pub(super) struct Crossing<S>(Mutex<S>);

impl<S> Crossing<S> {
    pub(super) fn new(state: S) -> Self {
        Self(Mutex::new(state))
    }

    /// Works on the state, and wakes afterwards whom `f` put on the list.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut S, &mut Vec<Waiter>) -> R) -> R {
        let mut woken = Vec::new();
        // Nothing that runs under the lock leaves the state half changed, so poison is no reason to stop.
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = f(&mut state, &mut woken);
        drop(state);
        for waiter in woken {
            waiter.wake();
        }
        answer
    }
}

/// Whom to wake.
#[derive(Debug)]
pub(super) enum Waiter {
    Task(Completer),
    Future(Waker),
}

impl Waiter {
    fn wake(self) {
        match self {
            Self::Task(completer) => completer.complete(),
            Self::Future(waker) => waker.wake(),
        }
    }
}

/// A queue of those who wait, and the grants that were not redeemed yet.
#[derive(Debug, Default)]
pub(super) struct Line {
    /// In the order of asking.
    waiting: VecDeque<(u64, Waiter)>,
    granted: HashSet<u64>,
    last_ticket: u64,
}

impl Line {
    const fn ticket(&mut self) -> u64 {
        self.last_ticket += 1;
        self.last_ticket
    }

    /// Stands at the end, or, if it stands already, changes whom to wake; then the answer is who was to be woken before.
    fn wait(&mut self, ticket: u64, waiter: Waiter) -> Option<Waiter> {
        let place = self.waiting.iter_mut().find(|(id, _)| *id == ticket);
        if let Some((_, before)) = place {
            return Some(std::mem::replace(before, waiter));
        }
        self.waiting.push_back((ticket, waiter));
        None
    }

    fn is_waiting(&self, ticket: u64) -> bool {
        self.waiting.iter().any(|(id, _)| *id == ticket)
    }

    /// Gives one thing to the one who waits longest, if anybody does.
    pub(super) fn grant(&mut self, woken: &mut Vec<Waiter>) {
        if let Some((ticket, waiter)) = self.waiting.pop_front() {
            self.granted.insert(ticket);
            woken.push(waiter);
        }
    }

    pub(super) fn grant_all(&mut self, woken: &mut Vec<Waiter>) {
        while !self.waiting.is_empty() {
            self.grant(woken);
        }
    }

    /// How many grants have not been redeemed.
    pub(super) fn granted(&self) -> usize {
        self.granted.len()
    }

    fn redeem(&mut self, ticket: u64) -> bool {
        self.granted.remove(&ticket)
    }

    /// Leaves the line. The waiter must be dropped without the lock.
    fn leave(&mut self, ticket: u64) -> Option<Waiter> {
        let place = self.waiting.iter().position(|(id, _)| *id == ticket)?;
        self.waiting.remove(place).map(|(_, waiter)| waiter)
    }
}

/// Something to be done to a state, for which one may have to wait in one of its lines.
pub(super) trait Errand {
    type State;
    type Output;

    fn line(state: &mut Self::State) -> &mut Line;

    /// Whether one who comes now need not wait.
    fn is_open(state: &Self::State) -> bool;

    /// Does it: it was granted, or it is open. `None`: the grant is out of date, wait again.
    fn finish(&mut self, state: &mut Self::State, woken: &mut Vec<Waiter>) -> Option<Self::Output>;

    /// A grant comes back unredeemed.
    fn hand_on(state: &mut Self::State, woken: &mut Vec<Waiter>);
}

/// An errand in progress, as a future for any executor; it stands in line from the first poll that has to wait. If dropped, it
/// leaves the line and hands on what it was granted.
pub(super) struct Anywhere<E: Errand> {
    crossing: Arc<Crossing<E::State>>,
    errand: E,
    ticket: u64,
}

impl<E: Errand> Anywhere<E> {
    pub(super) fn new(crossing: &Arc<Crossing<E::State>>, errand: E) -> Self {
        Self {
            crossing: Arc::clone(crossing),
            errand,
            ticket: crossing.with(|state, _| E::line(state).ticket()),
        }
    }

    pub(super) const fn errand(&mut self) -> &mut E {
        &mut self.errand
    }

    /// Does it if that is possible without waiting. In a kernel's task, where each such step counts, see [`InTask`].
    pub(super) fn attempt(&mut self) -> Option<E::Output> {
        self.attempt_or(|_, _| None).ok()
    }

    /// Does it, or else calls `otherwise` under the same lock; what that returns is dropped without it.
    fn attempt_or(
        &mut self,
        otherwise: impl FnOnce(&mut Line, u64) -> Option<Waiter>,
    ) -> Result<E::Output, ()> {
        let Self {
            crossing,
            errand,
            ticket,
        } = self;
        let (answer, replaced) = crossing.with(|state, woken| {
            let line = E::line(state);
            let may_go = line.redeem(*ticket) || (!line.is_waiting(*ticket) && E::is_open(state));
            if may_go && let Some(output) = errand.finish(state, woken) {
                return (Ok(output), None);
            }
            (Err(()), otherwise(E::line(state), *ticket))
        });
        drop(replaced);
        answer
    }

    fn leave(&self) {
        let waiter = self.crossing.with(|state, woken| {
            let waiter = E::line(state).leave(self.ticket);
            if waiter.is_none() && E::line(state).redeem(self.ticket) {
                E::hand_on(state, woken);
            }
            waiter
        });
        drop(waiter);
    }
}

impl<E: Errand> Unpin for Anywhere<E> {}

impl<E: Errand> Future for Anywhere<E> {
    type Output = E::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<E::Output> {
        let waker = cx.waker().clone();
        match self.attempt_or(|line, ticket| line.wait(ticket, Waiter::Future(waker))) {
            Ok(output) => Poll::Ready(output),
            Err(()) => Poll::Pending,
        }
    }
}

impl<E: Errand> Drop for Anywhere<E> {
    fn drop(&mut self) {
        self.leave();
    }
}

/// An errand of a kernel's task: the kernel knows that it waits for another thread, and can interrupt it.
pub(super) struct InTask<E: Errand, F> {
    visit: Anywhere<E>,
    wait: FutureWait<F>,
    is_waiting: bool,
    restart: F,
}

/// `errand` as a future for kernels' tasks.
#[track_caller]
pub(super) fn in_task<E: Errand>(
    crossing: &Arc<Crossing<E::State>>,
    errand: E,
) -> InTask<E, impl FnOnce(Completer) + Clone + use<E>> {
    let visit = Anywhere::new(crossing, errand);
    let (crossing, ticket) = (Arc::clone(crossing), visit.ticket);
    // It may have become possible since the last look, when nobody knew of us yet.
    let start = move |completer| {
        crossing.with(|state, woken| {
            let is_open = E::is_open(state);
            let line = E::line(state);
            let before = line.wait(ticket, Waiter::Task(completer));
            debug_assert!(before.is_none(), "a ticket stands in line once");
            if is_open {
                woken.extend(line.leave(ticket));
                line.granted.insert(ticket);
            }
        });
    };
    InTask {
        visit,
        wait: future_wait(start.clone()),
        is_waiting: false,
        restart: start,
    }
}

impl<E: Errand, F> InTask<E, F> {
    pub(super) const fn errand(&mut self) -> &mut E {
        self.visit.errand()
    }
}

impl<E: Errand, F> Unpin for InTask<E, F> {}

impl<E: Errand, F: FnOnce(Completer) + Clone> Future for InTask<E, F> {
    type Output = Result<E::Output, Interrupt>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if !this.is_waiting {
            if this.visit.crossing.with(|state, _| E::is_open(state)) {
                ready!(poll_proceed(cx));
            }
            if let Some(output) = this.visit.attempt() {
                return Poll::Ready(Ok(output));
            }
            this.is_waiting = true;
        }
        loop {
            if let Err(interrupt) = ready!(Pin::new(&mut this.wait).poll(cx)) {
                // The future may be kept for what is in it, but it waits no more.
                this.visit.leave();
                return Poll::Ready(Err(interrupt));
            }
            if let Some(output) = this.visit.attempt() {
                return Poll::Ready(Ok(output));
            }
            this.wait = future_wait(this.restart.clone());
        }
    }
}

/// Waits in a thread that runs no kernel; `None` if it was not done within `timeout`.
pub(super) fn block_on<E: Errand>(
    visit: &mut Anywhere<E>,
    timeout: Option<Duration>,
) -> Option<E::Output> {
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        if let Poll::Ready(output) = Pin::new(&mut *visit).poll(&mut Context::from_waker(&waker)) {
            return Some(output);
        }
        let Some(deadline) = deadline else {
            thread::park();
            continue;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        thread::park_timeout(left);
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
