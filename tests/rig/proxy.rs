//! A TCP proxy that breaks connections on purpose.
//!
//! It runs in a kernel of its own, in a thread of its own: so it goes on breaking things while the kernel under test hangs. Two tasks a
//! connection copy bytes, one each way, and look at the faults that are in force before every write. An order has been carried out
//! when the call that gives it returns.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::net::{self, Ipv4Addr, Shutdown, SocketAddr};
use std::rc::{Rc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kernel::net::{TcpListener, TcpStream};
use kernel::sync::{Event, UniversalQueue, UniversalResult};
use kernel::{TaskRef, spawn};

use rustix::net::sockopt::set_socket_linger;

use crate::PATIENCE;

/// Which way bytes go through the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the one who connected.
    ToServer,
    /// From the one behind the proxy.
    ToClient,
}

impl Direction {
    /// Both of them.
    pub const BOTH: [Self; 2] = [Self::ToServer, Self::ToClient];
}

/// A listening proxy in front of one server. Dropping it cuts every connection and stops listening.
pub struct Proxy {
    address: SocketAddr,
    orders: UniversalQueue<Order>,
    thread: Option<JoinHandle<()>>,
}

struct Order {
    carry_out: Box<dyn FnOnce(&mut State) + Send>,
    done: UniversalResult<()>,
}

/// What the proxy's kernel knows.
struct State {
    /// Where new connections go.
    server: SocketAddr,
    faults: Faults,
    connections: Vec<Weak<Connection>>,
    /// Connections that have ended for the client alone.
    stranded: Vec<Rc<Connection>>,
    /// Set, and replaced, whenever an order changes something.
    changed: Rc<Event>,
}

#[derive(Debug, Default)]
struct Faults {
    /// Bytes in this direction are neither read nor refused: to both sides, the network is just silent.
    is_silent: [bool; 2],
    /// New connections are closed at once.
    is_refusing: bool,
    /// Bytes that may still pass before the connection is cut; `None`: no limit.
    left: [Option<u64>; 2],
    /// Bytes that pass before one that is changed.
    sound: [Option<u64>; 2],
    /// For each chunk that has been read.
    latency: Duration,
    /// Bytes per second, for each direction of each connection.
    bandwidth: Option<u32>,
    /// The most bytes that are written at once.
    slice: Option<usize>,
}

/// The two sockets of one connection, closed when both of its tasks are done.
#[derive(Debug)]
struct Connection {
    client: TcpStream,
    server: TcpStream,
    tasks: RefCell<Vec<TaskRef>>,
    /// It has been cut: nothing more passes either way.
    is_over: Cell<bool>,
}

impl Proxy {
    /// Listens on a free port and passes everything on to `server`.
    pub fn to(server: SocketAddr) -> Self {
        let listener = net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .expect("a free port on the loopback interface");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let orders = UniversalQueue::new(None);
        let taken = orders.clone();
        let thread = thread::spawn(move || {
            let listener = TcpListener::from_std(listener).expect("a socket can be non-blocking");
            kernel::run(obey(listener, server, taken)).expect("the thread has no other kernel");
        });
        Self {
            address,
            orders,
            thread: Some(thread),
        }
    }

    /// Where to connect instead of the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Passes new connections on to another server.
    pub fn pass_to(&self, server: SocketAddr) {
        self.order(move |state| state.server = server);
    }

    /// Stops passing bytes on without closing anything, like a network that is gone.
    pub fn pause(&self) {
        self.order(|state| state.faults.is_silent = [true; 2]);
    }

    /// The same in one direction alone: one side goes on hearing the other and is not heard.
    pub fn half_open(&self, silent: Direction) {
        self.order(move |state| state.faults.is_silent[silent as usize] = true);
    }

    /// Goes on where [`pause`](Self::pause) or [`half_open`](Self::half_open) stopped; nothing was lost.
    pub fn resume(&self) {
        self.order(|state| state.faults.is_silent = [false; 2]);
    }

    /// Closes new connections at once, or accepts them again.
    pub fn refuse(&self, refusing: bool) {
        self.order(move |state| state.faults.is_refusing = refusing);
    }

    /// Lets `bytes` more pass in one direction, then closes the connection that carried the last of them.
    pub fn cut_after(&self, direction: Direction, bytes: u64) {
        self.order(move |state| state.faults.left[direction as usize] = Some(bytes));
    }

    /// Lets `bytes` more pass in one direction, then changes the next, once.
    pub fn corrupt_after(&self, direction: Direction, bytes: u64) {
        self.order(move |state| state.faults.sound[direction as usize] = Some(bytes));
    }

    /// Holds each chunk of up to 64 KiB for so long, in both directions.
    pub fn delay(&self, latency: Duration) {
        self.order(move |state| state.faults.latency = latency);
    }

    /// Passes at most so many bytes per second, in each direction of each connection.
    pub fn throttle(&self, bytes_per_second: u32) {
        assert!(bytes_per_second > 0, "that is a pause");
        self.order(move |state| state.faults.bandwidth = Some(bytes_per_second));
    }

    /// Passes bytes on in pieces of at most this size, each a write and, as a rule, a packet of its own.
    pub fn slice(&self, bytes: usize) {
        assert!(bytes > 0, "that is a pause");
        self.order(move |state| state.faults.slice = Some(bytes));
    }

    /// No more faults from now on.
    pub fn heal(&self) {
        self.order(|state| state.faults = Faults::default());
    }

    /// Ends every open connection with a TCP reset on both sides.
    pub fn reset(&self) {
        self.order(|state| {
            for connection in state.connections.drain(..) {
                if let Some(connection) = connection.upgrade() {
                    connection.reset();
                }
            }
        });
    }

    /// Ends every open connection for the client, of which the server hears nothing: for it, they are just silent, until
    /// [`let_go`](Self::let_go).
    pub fn strand(&self) {
        self.order(|state| {
            for connection in state.connections.drain(..) {
                if let Some(connection) = connection.upgrade() {
                    connection.strand();
                    state.stranded.push(connection);
                }
            }
        });
    }

    /// Ends for the server, too, what was [stranded](Self::strand).
    pub fn let_go(&self) {
        self.order(|state| state.stranded.clear());
    }

    fn order(&self, carry_out: impl FnOnce(&mut State) + Send + 'static) {
        let done = UniversalResult::new();
        let order = Order {
            carry_out: Box::new(carry_out),
            done: done.clone(),
        };
        let put = self.orders.try_put(order);
        assert!(put.is_ok(), "the queue has no limit");
        let done = done.wait_blocking(Some(PATIENCE));
        done.expect("the proxy does as it is told");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.orders.close();
        let thread = self.thread.take().expect("taken here alone");
        // That it panicked has been said already, and a second panic would hide the first.
        let _ = thread.join();
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({})", self.address)
    }
}

/// Takes orders until there can be no more; the other tasks end with this one.
async fn obey(listener: TcpListener, server: SocketAddr, orders: UniversalQueue<Order>) {
    let state = Rc::new(RefCell::new(State {
        server,
        faults: Faults::default(),
        connections: Vec::new(),
        stranded: Vec::new(),
        changed: Rc::new(Event::new()),
    }));
    let _ = spawn(accept(listener, Rc::clone(&state))).to_ref();
    while let Ok(order) = orders.get().await {
        (order.carry_out)(&mut state.borrow_mut());
        let changed = std::mem::take(&mut state.borrow_mut().changed);
        changed.set();
        let _ = order.done.set(());
    }
}

async fn accept(listener: TcpListener, state: Rc<RefCell<State>>) -> io::Result<()> {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            continue;
        };
        if !state.borrow().faults.is_refusing {
            spawn(serve(client, Rc::clone(&state)));
        }
    }
}

async fn serve(client: TcpStream, state: Rc<RefCell<State>>) -> io::Result<()> {
    let to = state.borrow().server;
    let server = TcpStream::connect(to).await?;
    for socket in [&client, &server] {
        socket.set_nodelay(true)?;
    }
    let connection = Rc::new(Connection {
        client,
        server,
        tasks: RefCell::default(),
        is_over: Cell::new(false),
    });
    let connections = &mut state.borrow_mut().connections;
    connections.retain(|old| old.strong_count() > 0);
    connections.push(Rc::downgrade(&connection));
    for direction in Direction::BOTH {
        let copying = spawn({
            let (connection, state) = (Rc::clone(&connection), Rc::clone(&state));
            async move {
                // An error is an end like another.
                let _ = copy(&connection, direction, &state).await;
                connection.end();
            }
        });
        connection.tasks.borrow_mut().push(copying.to_ref());
    }
    Ok(())
}

async fn copy(
    connection: &Connection,
    direction: Direction,
    state: &RefCell<State>,
) -> io::Result<()> {
    let (from, to) = match direction {
        Direction::ToServer => (&connection.client, &connection.server),
        Direction::ToClient => (&connection.server, &connection.client),
    };
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        let latency = state.borrow().faults.latency;
        if !latency.is_zero() {
            kernel::sleep(latency).await?;
        }
        let mut rest = &mut buffer[..read];
        while !rest.is_empty() {
            while state.borrow().faults.is_silent[direction as usize] {
                let changed = Rc::clone(&state.borrow().changed);
                changed.wait().await?;
            }
            let passing = state.borrow_mut().faults.pass(direction, rest);
            if connection.is_over.get() {
                return Ok(());
            }
            let (piece, behind) = rest.split_at_mut(passing.bytes);
            to.write_all(piece).await?;
            if passing.is_cut {
                return Ok(());
            }
            if !passing.pause.is_zero() {
                kernel::sleep(passing.pause).await?;
            }
            rest = behind;
        }
    }
}

/// What may be done with the next bytes.
struct Passing {
    bytes: usize,
    /// Before the next ones.
    pause: Duration,
    is_cut: bool,
}

impl Faults {
    /// Lets some of `bytes` pass, not always unchanged.
    fn pass(&mut self, direction: Direction, bytes: &mut [u8]) -> Passing {
        let mut passing = bytes.len();
        let mut pause = Duration::ZERO;
        if let Some(most) = self.slice {
            passing = passing.min(most);
            // Long enough for whoever reads to be woken.
            pause = Duration::from_micros(50);
        }
        if let Some(rate) = self.bandwidth {
            // A hundred pieces a second.
            passing = passing.min((rate as usize / 100).max(1));
            pause = Duration::from_secs_f64(passing as f64 / f64::from(rate));
        }
        let left = &mut self.left[direction as usize];
        let mut is_cut = false;
        if let Some(bytes) = left {
            passing = usize::try_from(*bytes).map_or(passing, |bytes| bytes.min(passing));
            *bytes -= passing as u64;
            is_cut = *bytes == 0;
            if is_cut {
                *left = None;
            }
        }
        let sound = &mut self.sound[direction as usize];
        if let Some(before) = *sound {
            match bytes[..passing].get_mut(usize::try_from(before).unwrap_or(usize::MAX)) {
                Some(byte) => {
                    *byte = !*byte;
                    *sound = None;
                }
                None => *sound = Some(before - passing as u64),
            }
        }
        Passing {
            bytes: passing,
            pause,
            is_cut,
        }
    }
}

impl Connection {
    /// The end of the stream for both sides.
    fn end(&self) {
        if !self.is_over.replace(true) {
            let _ = self.client.shutdown(Shutdown::Both);
            let _ = self.server.shutdown(Shutdown::Both);
        }
    }

    /// The end of the stream for the client, while the server's socket stays open.
    fn strand(&self) {
        self.is_over.set(true);
        let _ = self.client.shutdown(Shutdown::Both);
        for task in self.tasks.take() {
            task.abort();
        }
    }

    /// Closing a socket that lingers for no time resets the connection; both are closed with their tasks.
    fn reset(&self) {
        if !self.is_over.replace(true) {
            for socket in [&self.client, &self.server] {
                let _ = set_socket_linger(socket.as_std(), Some(Duration::ZERO));
            }
        }
        for task in self.tasks.take() {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    /// A connection through a proxy, seen from both ends.
    fn pair() -> (Proxy, TcpStream, TcpStream) {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let proxy = Proxy::to(server.local_addr().unwrap());
        let near = TcpStream::connect(proxy.address()).unwrap();
        let (far, _) = server.accept().unwrap();
        for end in [&near, &far] {
            end.set_read_timeout(Some(crate::PATIENCE)).unwrap();
        }
        (proxy, near, far)
    }

    fn read(mut stream: &TcpStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn bytes_pass_both_ways() {
        let (_proxy, mut near, mut far) = pair();
        near.write_all(b"ping").unwrap();
        assert_eq!(read(&far, 4), b"ping");
        far.write_all(b"pong").unwrap();
        assert_eq!(read(&near, 4), b"pong");
    }

    #[test]
    fn what_was_sent_while_paused_arrives_after_it() {
        let (proxy, mut near, far) = pair();
        proxy.pause();
        near.write_all(b"late").unwrap();
        far.set_nonblocking(true).unwrap();
        assert_eq!(
            (&far).read(&mut [0; 4]).unwrap_err().kind(),
            ErrorKind::WouldBlock
        );
        far.set_nonblocking(false).unwrap();
        proxy.resume();
        assert_eq!(read(&far, 4), b"late");
    }

    #[test]
    fn a_cut_passes_exactly_the_bytes_allowed() {
        let (proxy, mut near, mut far) = pair();
        proxy.cut_after(Direction::ToServer, 3);
        near.write_all(b"abcdef").unwrap();
        let mut seen = Vec::new();
        far.read_to_end(&mut seen).unwrap();
        assert_eq!(seen, b"abc");
    }

    #[test]
    fn a_reset_reaches_both_ends_as_one() {
        let (proxy, near, far) = pair();
        proxy.reset();
        for mut end in [&near, &far] {
            assert_eq!(
                end.read(&mut [0]).unwrap_err().kind(),
                ErrorKind::ConnectionReset
            );
        }
    }

    #[test]
    fn a_refused_connection_ends_at_once() {
        let (proxy, _near, _far) = pair();
        proxy.refuse(true);
        let mut refused = TcpStream::connect(proxy.address()).unwrap();
        assert!(matches!(refused.read(&mut [0]), Ok(0) | Err(_)));
    }

    #[test]
    fn a_half_open_connection_is_silent_in_one_direction_alone() {
        let (proxy, mut near, mut far) = pair();
        proxy.half_open(Direction::ToServer);
        near.write_all(b"late").unwrap();
        far.write_all(b"soon").unwrap();
        assert_eq!(read(&near, 4), b"soon");
        far.set_nonblocking(true).unwrap();
        let nothing = (&far).read(&mut [0; 4]).unwrap_err();
        assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
        far.set_nonblocking(false).unwrap();
        proxy.resume();
        assert_eq!(read(&far, 4), b"late");
    }

    #[test]
    fn one_byte_is_changed_and_only_one() {
        let (proxy, mut near, far) = pair();
        proxy.corrupt_after(Direction::ToServer, 5);
        near.write_all(b"abc").unwrap();
        assert_eq!(read(&far, 3), b"abc");
        near.write_all(b"defghi").unwrap();
        assert_eq!(read(&far, 6), [b'd', b'e', !b'f', b'g', b'h', b'i']);
    }

    #[test]
    fn slow_networks_are_slow_and_lose_nothing() {
        let (proxy, mut near, far) = pair();
        proxy.delay(Duration::from_millis(20));
        let begin = Instant::now();
        near.write_all(b"a").unwrap();
        assert_eq!(read(&far, 1), b"a");
        assert!(begin.elapsed() >= Duration::from_millis(20));
        proxy.heal();
        proxy.throttle(10_000);
        let begin = Instant::now();
        near.write_all(&[7; 500]).unwrap();
        assert_eq!(read(&far, 500), [7; 500]);
        // All but the last of the pieces has been waited for.
        assert!(begin.elapsed() >= Duration::from_millis(40));
    }

    #[test]
    fn slices_are_no_larger_than_told() {
        let mut faults = Faults {
            slice: Some(3),
            ..Faults::default()
        };
        let mut bytes = [0; 10];
        assert_eq!(faults.pass(Direction::ToClient, &mut bytes).bytes, 3);
        assert_eq!(faults.pass(Direction::ToClient, &mut bytes[..2]).bytes, 2);
        let (proxy, mut near, far) = pair();
        proxy.slice(3);
        near.write_all(b"abcdefgh").unwrap();
        assert_eq!(read(&far, 8), b"abcdefgh");
    }
}
