//! Turns the readiness of file descriptors into completed waits.
//!
//! mio is edge-triggered where Curio's selector is level-triggered: it tells once that a socket became readable, and not
//! again before somebody has emptied it. So each source keeps what is known of its readiness in two bits. An event sets a bit; a
//! system call that answers `WouldBlock`, or that moved less than it was asked to, clears it; a task waits only while
//! the bit is clear. An echo costs three system calls: wait, read, write. The end of a stream is told once too, perhaps together
//! with its last bytes: a read that moved less than asked does not clear a bit that also stands for the end.
//!
//! A source is registered once, for both directions, the first time a task has to wait for it: adding a descriptor
//! reports readiness that is already there, so nothing is missed, and a connection that never blocks costs no registration. The poller's token carries
//! a generation, since an event for a source that was closed earlier in the same batch must not reach its successor.
//!
//! `read_wait` on a bare descriptor cannot use the bits: the caller's system calls are not seen here. It registers for each wait
//! anew and unregisters when the wait ends (as Curio does for bare integers).

use std::io;
use std::os::fd::RawFd;
use std::panic::Location;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};
use slab::Slab;

use super::nodes::{NIL, Phase, WaitKind};
use super::{Aftermath, Core, State};
use crate::error::ResourceBusy;
use crate::task::TaskId;

pub(crate) const WAKE: Token = Token(usize::MAX);

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Direction {
    /// Towards us.
    Read,
    /// Away from us.
    Write,
}

struct Source {
    fd: RawFd,
    generation: u32,
    /// By direction.
    sides: [Side; 2],
    /// Waits that hold a bare descriptor's registration; 0 for a source that holds its own.
    watchers: u32,
}

/// What is known of one direction.
#[derive(Clone, Copy)]
struct Side {
    /// The node that waits for it.
    waiter: u32,
    is_ready: bool,
    /// It has ended or is broken: no call will block again, however little the last one moved.
    has_ended: bool,
}

impl Side {
    const NEW: Self = Self {
        waiter: NIL,
        is_ready: false,
        has_ended: false,
    };

    /// Notes what an event says. The answer is who waited for it.
    #[inline(always)]
    const fn tell(&mut self, is_ready: bool, has_ended: bool) -> u32 {
        self.has_ended |= has_ended;
        if !(is_ready || has_ended) {
            return NIL;
        }
        self.is_ready = true;
        std::mem::replace(&mut self.waiter, NIL)
    }
}

/// What a system call has to expect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outlook {
    /// It may succeed, as far as is known.
    Call,
    /// It would block: wait first.
    Wait,
    /// It would block, and another task waits already.
    Busy,
    /// The budget of the task is spent: let others run first.
    Spent,
}

/// Number of a registered source, with the generation that keeps it apart from its successors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SourceId {
    index: u32,
    generation: u32,
}

impl SourceId {
    const fn token(self) -> Token {
        Token((self.generation as usize) << 32 | self.index as usize)
    }

    const fn from_token(token: Token) -> Self {
        Self {
            index: token.0 as u32,
            generation: (token.0 >> 32) as u32,
        }
    }

    pub(crate) const fn to_bits(self) -> u64 {
        self.token().0 as u64
    }

    const fn from_bits(bits: u64) -> Self {
        Self::from_token(Token(bits as usize))
    }
}

/// The sources of a kernel and its poller.
pub(crate) struct Reactor {
    poll: Poll,
    events: Events,
    sources: Slab<Source>,
    generation: u32,
    /// How many nodes wait for I/O.
    waiting: usize,
}

impl Reactor {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            poll: Poll::new()?,
            events: Events::with_capacity(1024),
            sources: Slab::new(),
            generation: 0,
            waiting: 0,
        })
    }

    pub(crate) fn registry(&self) -> &Registry {
        self.poll.registry()
    }

    /// Whether any descriptor is registered, so that polling can tell something.
    pub(crate) fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// How many tasks' waits depend on I/O.
    pub(crate) const fn waiting(&self) -> usize {
        self.waiting
    }

    pub(crate) fn register(&mut self, fd: RawFd) -> io::Result<SourceId> {
        let entry = self.sources.vacant_entry();
        let index = u32::try_from(entry.key()).expect("fewer than 2^32 descriptors");
        // The generation of `WAKE` is never given out.
        self.generation = (self.generation + 1) % u32::MAX;
        let id = SourceId {
            index,
            generation: self.generation,
        };
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll
            .registry()
            .register(&mut SourceFd(&fd), id.token(), interest)?;
        entry.insert(Source {
            fd,
            generation: self.generation,
            sides: [Side::NEW; 2],
            watchers: 0,
        });
        Ok(id)
    }

    /// Registers a bare descriptor for one wait, or asks again about one that is registered: what is ready now is reported as a new event.
    pub(crate) fn watch(&mut self, fd: RawFd, direction: Direction) -> io::Result<SourceId> {
        let Some(id) = self.find(fd) else {
            let id = self.register(fd)?;
            self.get(id).expect("just registered").watchers = 1;
            return Ok(id);
        };
        let source = &mut self.sources[id.index as usize];
        if source.sides[direction as usize].waiter != NIL {
            return Err(ResourceBusy {
                writing: direction == Direction::Write,
            }
            .into());
        }
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll
            .registry()
            .reregister(&mut SourceFd(&fd), id.token(), interest)?;
        if source.watchers > 0 {
            source.watchers += 1;
        }
        Ok(id)
    }

    #[inline(always)]
    fn get(&mut self, id: SourceId) -> Option<&mut Source> {
        self.sources
            .get_mut(id.index as usize)
            .filter(|source| source.generation == id.generation)
    }

    #[inline(always)]
    fn side(&mut self, id: SourceId, direction: Direction) -> Option<&mut Side> {
        let source = self.get(id)?;
        Some(&mut source.sides[direction as usize])
    }

    /// A source that is gone has nothing to wait for.
    #[inline(always)]
    fn outlook(&mut self, id: SourceId, direction: Direction) -> Outlook {
        match self.side(id, direction) {
            Some(side) if side.is_ready => Outlook::Call,
            Some(side) if side.waiter != NIL => Outlook::Busy,
            Some(_) => Outlook::Wait,
            None => Outlook::Call,
        }
    }

    /// A call moved less than it was asked to.
    #[inline(always)]
    pub(crate) fn clear_ready(&mut self, id: SourceId, direction: Direction) {
        if let Some(side) = self.side(id, direction) {
            side.is_ready = side.has_ended;
        }
    }

    /// A call answered `WouldBlock`, which proves more than any event. `None` if the source is gone.
    pub(crate) fn exhaust(&mut self, id: SourceId, direction: Direction) -> Option<Outlook> {
        let side = self.side(id, direction)?;
        (side.is_ready, side.has_ended) = (false, false);
        Some(self.outlook(id, direction))
    }

    /// The nodes that wait to read from and to write to it, `NIL` for none.
    pub(crate) fn waiters(&mut self, id: SourceId) -> [u32; 2] {
        self.get(id)
            .map_or([NIL; 2], |source| source.sides.map(|side| side.waiter))
    }

    pub(crate) fn find(&self, fd: RawFd) -> Option<SourceId> {
        self.sources
            .iter()
            .find(|(_, source)| source.fd == fd)
            .map(|(index, source)| SourceId {
                index: index as u32,
                generation: source.generation,
            })
    }

    #[inline(always)]
    fn set_waiter(&mut self, id: SourceId, direction: Direction, node: u32) {
        let side = self
            .side(id, direction)
            .expect("a task waits only for a registered source");
        debug_assert!(side.waiter == NIL, "one waiter a direction");
        side.waiter = node;
        self.waiting += 1;
    }

    pub(crate) fn remove_waiter(&mut self, key: u64, direction: Direction) {
        if let Some(side) = self.side(SourceId::from_bits(key), direction) {
            side.waiter = NIL;
            self.waiting -= 1;
        }
    }
}

impl Core {
    /// The one look before a system call on a source, which is `at` that place of that kernel if it is registered. Counts against the
    /// task's budget.
    #[inline(always)]
    pub(crate) fn outlook(&self, at: Option<(u32, SourceId)>, direction: Direction) -> Outlook {
        if !self.spend() {
            return Outlook::Spent;
        }
        match at {
            Some((kernel, id)) if kernel == self.serial => {
                self.state.borrow_mut().reactor.outlook(id, direction)
            }
            _ => Outlook::Call,
        }
    }

    /// The one look after a system call that moved less than it was asked to. False if the source is not one of this kernel.
    #[inline(always)]
    pub(crate) fn clear_ready(&self, (kernel, id): (u32, SourceId), direction: Direction) -> bool {
        let is_ours = kernel == self.serial;
        if is_ours {
            self.state.borrow_mut().reactor.clear_ready(id, direction);
        }
        is_ours
    }
}

impl State {
    /// Asks the poller what happened, waiting up to `wait` for something (`None`: for as long as it takes).
    pub(crate) fn poll_io(&mut self, wait: Option<Duration>) -> io::Result<()> {
        let reactor = &mut self.reactor;
        if let Err(error) = reactor.poll.poll(&mut reactor.events, wait) {
            // A signal handler ran; whoever cares watches its pipe.
            if error.kind() == io::ErrorKind::Interrupted {
                return Ok(());
            }
            return Err(error);
        }
        let events = std::mem::replace(&mut self.reactor.events, Events::with_capacity(0));
        for event in &events {
            // The bell's token is no source's.
            let Some(source) = self.reactor.get(SourceId::from_token(event.token())) else {
                continue;
            };
            let [read, write] = &mut source.sides;
            let failed = event.is_error();
            let reader = read.tell(event.is_readable() || failed, event.is_read_closed());
            let writer = write.tell(event.is_writable() || failed, event.is_write_closed());
            self.fire_io(reader);
            self.fire_io(writer);
        }
        self.reactor.events = events;
        Ok(())
    }

    #[inline(always)]
    fn fire_io(&mut self, waiter: u32) {
        if waiter != NIL {
            self.reactor.waiting -= 1;
            self.fire(waiter);
        }
    }

    /// A wait for a direction that nobody else waits for.
    #[inline(always)]
    pub(crate) fn open_io_wait(
        &mut self,
        id: SourceId,
        direction: Direction,
        at: &'static Location<'static>,
    ) -> Option<u32> {
        let kind = match direction {
            Direction::Read => WaitKind::Read,
            Direction::Write => WaitKind::Write,
        };
        let node = self.open_wait(kind, id.to_bits(), at)?;
        self.reactor.set_waiter(id, direction, node);
        Some(node)
    }

    pub(crate) fn waiting_task(&self, node: u32) -> Option<TaskId> {
        let task = self.nodes.get(node)?.task();
        let body = self.tasks.get(task)?.body.as_ref()?;
        Some(TaskId(body.id))
    }

    /// A wait for a bare descriptor ended.
    pub(crate) fn unwatch(&mut self, id: SourceId) {
        let Some(source) = self.reactor.get(id) else {
            return;
        };
        if source.watchers == 0 {
            return; // it belongs to a socket of ours
        }
        source.watchers -= 1;
        if source.watchers == 0 {
            self.release_source(id);
        }
    }

    /// Forgets a source, before its descriptor is closed: `epoll` would go on reporting a duplicate of it. Whoever
    /// waits for it is told that it is closed (in Curio such a task sleeps for ever).
    pub(crate) fn release_source(&mut self, id: SourceId) {
        let Some(source) = self.reactor.get(id) else {
            return;
        };
        let (fd, sides) = (source.fd, source.sides);
        self.reactor.sources.remove(id.index as usize);
        if let Err(error) = self.reactor.registry().deregister(&mut SourceFd(&fd)) {
            let text = format!("descriptor {fd} was closed before it was released: {error}");
            self.aftermath.push(Aftermath::Log(log::Level::Debug, text));
        }
        for waiter in sides.map(|side| side.waiter) {
            if waiter != NIL {
                self.reactor.waiting -= 1;
                self.settle(waiter, Phase::Closed);
            }
        }
    }
}
