//! Turns the readiness of file descriptors into completed waits.
//!
//! mio is edge-triggered where Curio's selector is level-triggered: it tells once that a socket became readable, and not
//! again before somebody has emptied it. So each source keeps what is known of its readiness in two bits (see `readiness`). An event sets a bit; a
//! system call that answers `WouldBlock`, or that moved less than it was asked to, clears it; a task waits only while
//! the bit is clear. An echo costs three system calls: wait, read, write. The end of a stream is told once too, perhaps together
//! with its last bytes: a read that moved less than asked does not clear a bit that also stands for the end.
//!
//! A source is registered the first time a task has to wait for it: adding a descriptor reports readiness that is already there, so nothing is missed, and a
//! connection that never blocks costs no registration. It is registered for reading, and for writing too from the first time that a task has to wait
//! to write: few ever do, and the system tells of a Unix socket that it can be written to whenever the peer has read, which would wake us for nothing. The poller's
//! token carries a generation, since an event for a source that was closed earlier in the same batch must not reach its successor.
//!
//! `read_wait` on a bare descriptor cannot use the bits: the caller's system calls are not seen here. It registers for each wait
//! anew and unregisters when the wait ends (as Curio does for bare integers).

use std::io;
use std::os::fd::RawFd;
use std::panic::Location;
use std::rc::Rc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};
use slab::Slab;

use super::nodes::{NIL, Phase, WaitKind};
use super::readiness::{Direction, Readiness};
use super::{Aftermath, State};
use crate::error::ResourceBusy;
use crate::task::TaskId;

pub(crate) const WAKE: Token = Token(usize::MAX);

struct Source {
    fd: RawFd,
    generation: u32,
    /// Waits that hold a bare descriptor's registration; 0 for a source that holds its own.
    watchers: u32,
    interest: Interest,
    readiness: Rc<Readiness>,
}

/// What to ask the poller for, on behalf of a task that waits in that direction.
const fn interest(direction: Direction) -> Interest {
    match direction {
        Direction::Read => Interest::READABLE,
        Direction::Write => Interest::READABLE.add(Interest::WRITABLE),
    }
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
    sources: Slab<Source>,
    generation: u32,
    /// How many nodes wait for I/O.
    waiting: usize,
}

impl Reactor {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            poll: Poll::new()?,
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

    /// Registers a descriptor that a task is to wait for, with the kernel of that serial number, which is the one of this reactor.
    pub(crate) fn register(
        &mut self,
        kernel: u32,
        fd: RawFd,
        direction: Direction,
        readiness: Rc<Readiness>,
    ) -> io::Result<SourceId> {
        let entry = self.sources.vacant_entry();
        let index = u32::try_from(entry.key()).expect("fewer than 2^32 descriptors");
        // The generation of `WAKE` is never given out.
        self.generation = (self.generation + 1) % u32::MAX;
        let id = SourceId {
            index,
            generation: self.generation,
        };
        let interest = interest(direction);
        self.poll
            .registry()
            .register(&mut SourceFd(&fd), id.token(), interest)?;
        readiness.set_at(Some((kernel, id)));
        readiness.exhaust(Direction::Read);
        readiness.exhaust(direction);
        entry.insert(Source {
            fd,
            generation: self.generation,
            watchers: 0,
            interest,
            readiness,
        });
        Ok(id)
    }

    /// Has the poller tell of that direction, and again of what it told before: what is ready now is reported as a new event.
    fn register_again(&mut self, id: SourceId, direction: Direction) -> io::Result<()> {
        let source = &mut self.sources[id.index as usize];
        let interest = source.interest | interest(direction);
        self.poll
            .registry()
            .reregister(&mut SourceFd(&source.fd), id.token(), interest)?;
        source.interest = interest;
        Ok(())
    }

    /// A call on a registered source answered `WouldBlock`, which proves more than any event.
    pub(crate) fn exhaust(&mut self, id: SourceId, direction: Direction) -> io::Result<()> {
        let source = &self.sources[id.index as usize];
        let readiness = Rc::clone(&source.readiness);
        if direction == Direction::Write && !source.interest.is_writable() {
            self.register_again(id, direction)?;
        }
        readiness.exhaust(direction);
        Ok(())
    }

    /// Registers a bare descriptor for one wait, or asks again about one that is registered: what is ready now is reported as a new event.
    pub(crate) fn watch(
        &mut self,
        kernel: u32,
        fd: RawFd,
        direction: Direction,
    ) -> io::Result<Rc<Readiness>> {
        let Some(id) = self.find(fd) else {
            let readiness = Rc::new(Readiness::unregistered());
            let id = self.register(kernel, fd, direction, Rc::clone(&readiness))?;
            self.get(id).expect("just registered").watchers = 1;
            return Ok(readiness);
        };
        if self.sources[id.index as usize].readiness.waiter(direction) != NIL {
            return Err(ResourceBusy {
                writing: direction == Direction::Write,
            }
            .into());
        }
        self.register_again(id, direction)?;
        let source = &mut self.sources[id.index as usize];
        if source.watchers > 0 {
            source.watchers += 1;
        }
        Ok(Rc::clone(&source.readiness))
    }

    #[inline(always)]
    fn get(&mut self, id: SourceId) -> Option<&mut Source> {
        self.sources
            .get_mut(id.index as usize)
            .filter(|source| source.generation == id.generation)
    }

    /// The nodes that wait to read from and to write to it, `NIL` for none.
    pub(crate) fn waiters(&mut self, id: SourceId) -> [u32; 2] {
        let waiters = |source: &mut Source| {
            [Direction::Read, Direction::Write].map(|direction| source.readiness.waiter(direction))
        };
        self.get(id).map_or([NIL; 2], waiters)
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

    pub(crate) fn remove_waiter(&mut self, key: u64, direction: Direction) {
        if let Some(source) = self.get(SourceId::from_bits(key)) {
            source.readiness.set_waiter(direction, NIL);
            self.waiting -= 1;
        }
    }
}

impl State {
    /// Asks the poller what happened, waiting up to `wait` for something (`None`: for as long as it takes), and fires those who waited for it.
    #[inline(always)]
    pub(crate) fn poll_io(
        &mut self,
        events: &mut Events,
        wait: Option<Duration>,
    ) -> io::Result<()> {
        if let Err(error) = self.reactor.poll.poll(events, wait) {
            // A signal handler ran; whoever cares watches its pipe.
            if error.kind() == io::ErrorKind::Interrupted {
                return Ok(());
            }
            return Err(error);
        }
        for event in &*events {
            // The bell's token is no source's.
            let Some(source) = self.reactor.get(SourceId::from_token(event.token())) else {
                continue;
            };
            let (readiness, is_broken) = (&source.readiness, event.is_error());
            let has_ended = event.is_read_closed() || is_broken;
            let reader = readiness.tell(Direction::Read, event.is_readable(), has_ended);
            let has_ended = event.is_write_closed() || is_broken;
            let writer = readiness.tell(Direction::Write, event.is_writable(), has_ended);
            self.fire_io(reader);
            self.fire_io(writer);
        }
        Ok(())
    }

    #[inline(always)]
    fn fire_io(&mut self, waiter: u32) {
        if waiter != NIL {
            self.reactor.waiting -= 1;
            self.fire(waiter);
        }
    }

    /// A wait for a direction of a source that is registered here and that nobody else waits for.
    #[inline(always)]
    pub(crate) fn open_io_wait(
        &mut self,
        readiness: &Readiness,
        direction: Direction,
        at: &'static Location<'static>,
    ) -> Option<u32> {
        let (_, id) = readiness
            .at()
            .expect("a task waits only for a registered source");
        debug_assert!(readiness.waiter(direction) == NIL, "one waiter a direction");
        let kind = match direction {
            Direction::Read => WaitKind::Read,
            Direction::Write => WaitKind::Write,
        };
        let node = self.open_wait(kind, id.to_bits(), at)?;
        readiness.set_waiter(direction, node);
        self.reactor.waiting += 1;
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
        if self.reactor.get(id).is_none() {
            return;
        }
        let waiters = self.reactor.waiters(id);
        let Source { fd, readiness, .. } = self.reactor.sources.remove(id.index as usize);
        readiness.set_at(None);
        if let Err(error) = self.reactor.registry().deregister(&mut SourceFd(&fd)) {
            let text = format!("descriptor {fd} was closed before it was released: {error}");
            self.aftermath.push(Aftermath::Log(log::Level::Debug, text));
        }
        for waiter in waiters {
            if waiter != NIL {
                self.reactor.waiting -= 1;
                self.settle(waiter, Phase::Closed);
            }
        }
    }
}
