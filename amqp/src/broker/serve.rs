//! The broker on the kernel.
//!
//! Each connection has two tasks. The reader waits for bytes, gives them to the [`Broker`] and reads no further while the
//! broker does not want to hear more of this peer. The writer sends what the broker has for it, everything that has gathered
//! since its last turn in one write, and while it waits it keeps the connection's one timer: heartbeats, the time a handshake
//! may take, and a peer that takes nothing.
//!
//! One connection's input is another's output. So whoever has called the broker tells the tasks of every session that this has
//! changed ([`Broker::next_changed`]); nobody polls. The broker is borrowed for the length of one call, never across an await.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use kernel::net::{TcpListener, TcpStream};
use kernel::sync::Event;
use kernel::{
    Interrupt, MaybeInterrupt, TaskRef, ignore_after, sleep, spawn, timeout_at, yield_now,
};

use super::{Broker, Config, SessionId};

/// A running broker: clone it to reach it from several tasks.
///
/// ```no_run
/// use amqp::broker::{Config, Server};
/// use kernel::net::TcpListener;
///
/// kernel::run(async {
///     let server = Server::new(Config::default());
///     server.serve(TcpListener::bind("127.0.0.1:5672")?).await
/// })??;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Server {
    shared: Rc<Shared>,
}

#[derive(Debug)]
struct Shared {
    broker: RefCell<Broker>,
    connections: RefCell<HashMap<SessionId, Rc<Connection>>>,
    /// Set when the broker's deadline is sooner than `armed`.
    sooner: Event,
    armed: Cell<Option<Instant>>,
    /// Set when the last connection has gone.
    empty: Event,
}

#[derive(Debug)]
struct Connection {
    id: SessionId,
    stream: TcpStream,
    /// There is something to send, or the session is over.
    output: Event,
    /// More may be read, or the session is over.
    input: Event,
    /// The reader has ended.
    gone: Event,
}

/// What is read at once at first, and at most.
const READ_MIN: usize = 16 << 10;
const READ_MAX: usize = 256 << 10;
/// The largest output buffer that is kept for the next time.
const KEEP: usize = 1 << 20;
/// How long a peer may take to hear our last words. Closing at once would reset the connection under them.
const LINGER: Duration = Duration::from_secs(2);
/// How long to wait before accepting again when that failed, for want of descriptors as a rule.
const PAUSE: Duration = Duration::from_millis(100);

impl Server {
    /// A broker that serves nobody yet.
    ///
    /// # Panics
    /// Outside of a kernel.
    #[must_use]
    pub fn new(config: Config) -> Self {
        #[expect(clippy::disallowed_methods, reason = "here the broker meets the world")]
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self::from_broker(Broker::new(config, kernel::now(), wall.unwrap_or_default()))
    }

    /// Serves a broker made elsewhere, with a store for instance.
    #[must_use]
    pub fn from_broker(broker: Broker) -> Self {
        let shared = Shared {
            broker: RefCell::new(broker),
            connections: RefCell::default(),
            sooner: Event::new(),
            armed: Cell::new(None),
            empty: Event::new(),
        };
        Self {
            shared: Rc::new(shared),
        }
    }

    /// Does something with the broker, at the instant it is given, and tells the connections that this concerns.
    ///
    /// # Panics
    /// If called from within itself.
    pub fn with<T>(&self, act: impl FnOnce(&mut Broker, Instant) -> T) -> T {
        self.shared.with(act)
    }

    /// Accepts connections and serves them until it is interrupted. Then every client is asked to close, and those that have not done so
    /// after ten seconds are cut off.
    ///
    /// Cancellation point: yes. If dropped, the listener closes and every connection is cut off.
    ///
    /// # Errors
    /// The [`Interrupt`], after every connection has ended. Failures to accept are logged, and tried again.
    pub async fn serve(&self, listener: TcpListener) -> io::Result<()> {
        let shared = &self.shared;
        let keeper = spawn(shared.clone().keep_time());
        let _guard = Guard {
            shared,
            keeper: keeper.to_ref(),
        };
        let interrupt = loop {
            match listener.accept().await {
                Ok((stream, _)) => shared.welcome(stream),
                Err(error) if error.interrupt().is_some() => break error,
                Err(error) => {
                    log::warn!("broker: cannot accept a connection: {error}");
                    if let Err(interrupt) = sleep(PAUSE).await {
                        break interrupt.into();
                    }
                }
            }
        };
        drop(listener);
        shared.with(Broker::shutdown);
        while !shared.connections.borrow().is_empty() {
            shared.empty.clear();
            shared.empty.wait().await?;
        }
        Err(interrupt)
    }
}

/// Cuts everybody off when [`Server::serve`] ends, however it ends.
struct Guard<'a> {
    shared: &'a Shared,
    keeper: TaskRef,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.keeper.abort();
        for connection in self.shared.connections.borrow().values() {
            // A connection that is closed already is as good.
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&mut Broker, Instant) -> T) -> T {
        let mut broker = self.broker.borrow_mut();
        let result = act(&mut broker, kernel::now());
        let connections = self.connections.borrow();
        while let Some(id) = broker.next_changed() {
            if let Some(connection) = connections.get(&id) {
                connection.output.set();
                connection.input.set();
            }
        }
        if let Some(deadline) = broker.deadline()
            && self.armed.get().is_none_or(|armed| deadline < armed)
        {
            self.sooner.set();
        }
        result
    }

    fn welcome(self: &Rc<Self>, stream: TcpStream) {
        if let Err(error) = stream.set_nodelay(true) {
            log::debug!("broker: a connection went before it was served: {error}");
            return;
        }
        let Some(id) = self.with(Broker::open) else {
            log::warn!("broker: too many connections, one is turned away");
            return;
        };
        let connection = Rc::new(Connection {
            id,
            stream,
            output: Event::new(),
            input: Event::new(),
            gone: Event::new(),
        });
        self.connections.borrow_mut().insert(id, connection.clone());
        // The writer starts first: it has the timer that bounds the handshake.
        spawn(self.clone().write(connection.clone()));
        spawn(self.clone().read(connection));
    }

    async fn read(self: Rc<Self>, connection: Rc<Connection>) {
        if let Err(error) = self.read_on(&connection).await {
            log::debug!("broker: {}: {error}", connection.id);
        }
        self.with(|broker, now| broker.close(connection.id, now));
        let empty = {
            let mut connections = self.connections.borrow_mut();
            connections.remove(&connection.id);
            connections.is_empty()
        };
        connection.gone.set();
        connection.output.set();
        // The writer may be in the middle of something nobody will take.
        let _ = connection.stream.shutdown(Shutdown::Both);
        if empty {
            self.empty.set();
        }
    }

    /// Ends at the end of the stream, or with the session.
    async fn read_on(&self, connection: &Connection) -> io::Result<()> {
        let id = connection.id;
        let mut buffer = vec![0; READ_MIN];
        // What has been read and not been handled is in `buffer[start..end]`.
        let (mut start, mut end) = (0, 0);
        loop {
            loop {
                connection.input.clear();
                let (used, go_on) = self.with(|broker, now| {
                    let used = broker.input(id, &buffer[start..end], now);
                    (used, broker.wants_input(id) || broker.is_over(id))
                });
                start += used;
                if go_on {
                    break;
                }
                connection.input.wait().await?;
            }
            if start == end {
                (start, end) = (0, 0);
            } else if start > 0 && end == buffer.len() {
                buffer.copy_within(start..end, 0);
                (start, end) = (0, end - start);
            }
            if end == buffer.len() {
                buffer.resize(buffer.len() * 2, 0);
            }
            let room = buffer.len() - end;
            match connection.stream.read(&mut buffer[end..]).await? {
                0 => return Ok(()),
                n => {
                    end += n;
                    if n == room {
                        // There may be more at once; the writers have their turn before that.
                        yield_now().await?;
                        if start == 0 && end == buffer.len() && buffer.len() < READ_MAX {
                            buffer.resize(buffer.len() * 2, 0);
                        }
                    }
                }
            }
        }
    }

    async fn write(self: Rc<Self>, connection: Rc<Connection>) {
        if let Err(error) = self.write_on(&connection).await {
            log::debug!("broker: {}: {error}", connection.id);
            // The reader may not be reading just now, and so would not notice.
            self.with(|broker, now| broker.close(connection.id, now));
            connection.input.set();
        } else {
            // What we said last must arrive, though the peer may still be sending.
            let _ = connection.stream.shutdown(Shutdown::Write);
            let _ = ignore_after(LINGER, connection.gone.wait()).await;
        }
        let _ = connection.stream.shutdown(Shutdown::Both);
    }

    /// Ends when the session is over and everything is said.
    async fn write_on(&self, connection: &Connection) -> io::Result<()> {
        let id = connection.id;
        let mut buffer = Vec::new();
        loop {
            connection.output.clear();
            let deadline = self.with(|broker, now| {
                broker.take_output(id, &mut buffer, now);
                broker.session_deadline(id)
            });
            if buffer.is_empty() {
                if self.broker.borrow().is_over(id) {
                    return Ok(());
                }
                match timeout_at(deadline, connection.output.wait()).await {
                    Err(Interrupt::TaskTimeout) => {
                        self.with(|broker, now| broker.session_tick(id, now))
                    }
                    outcome => outcome?,
                }
                continue;
            }
            let mut sent = 0;
            while sent < buffer.len() {
                let deadline = self.broker.borrow().session_deadline(id);
                match timeout_at(deadline, connection.stream.write(&buffer[sent..])).await {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => {
                        sent += n;
                        self.with(|broker, now| broker.written(id, n, now));
                        connection.input.set();
                    }
                    Err(error) if error.interrupt() == Some(&Interrupt::TaskTimeout) => {
                        self.with(|broker, now| broker.session_tick(id, now));
                        if self.broker.borrow().is_over(id) {
                            return Err(io::ErrorKind::TimedOut.into());
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
            buffer.clear();
            if buffer.capacity() > KEEP {
                buffer = Vec::new();
            }
        }
    }

    async fn keep_time(self: Rc<Self>) {
        loop {
            self.sooner.clear();
            let deadline = self.broker.borrow().deadline();
            self.armed.set(deadline);
            match timeout_at(deadline, self.sooner.wait()).await {
                Ok(()) => {}
                Err(Interrupt::TaskTimeout) => self.with(Broker::tick),
                Err(_) => return,
            }
        }
    }
}
