//! A TCP proxy that breaks connections on purpose.
//!
//! Two threads a connection copy bytes, one each way, and look at the orders before every write. Threads, because the
//! proxy must go on breaking things while the kernel under test hangs.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;

/// Which way bytes go through the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the one who connected.
    ToServer,
    /// From the one behind the proxy.
    ToClient,
}

/// A listening proxy in front of one server. Dropping it cuts every connection and stops listening.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    orders: Mutex<Orders>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Orders {
    /// Bytes are neither read nor refused: to both sides, the network is just silent.
    paused: bool,
    /// New connections are closed at once.
    refusing: bool,
    closed: bool,
    /// Bytes that may still pass before the connection is cut, for each direction; `None`: no limit.
    budget: [Option<u64>; 2],
    connections: Vec<Weak<Connection>>,
    /// Where new connections go.
    server: Option<SocketAddr>,
}

/// The two sockets of one connection, closed when both of its threads are done.
#[derive(Debug)]
struct Connection {
    client: TcpStream,
    server: TcpStream,
    /// Ended by a reset: a shutdown now would send the orderly end that a reset is not.
    reset: AtomicBool,
}

impl Proxy {
    /// Listens on a free port and passes everything on to `server`.
    pub fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .expect("a free port on the loopback interface");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let shared = Arc::new(Shared::default());
        shared.order(|orders| orders.server = Some(server));
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accept(&listener, &accepting));
        Self { address, shared }
    }

    /// Where to connect instead of the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Passes new connections on to another server.
    pub fn pass_to(&self, server: SocketAddr) {
        self.shared.order(|orders| orders.server = Some(server));
    }

    /// Stops passing bytes on without closing anything, like a network that is gone.
    pub fn pause(&self) {
        self.shared.order(|orders| orders.paused = true);
    }

    /// Goes on where [`pause`](Self::pause) stopped; nothing was lost.
    pub fn resume(&self) {
        self.shared.order(|orders| orders.paused = false);
    }

    /// Closes new connections at once, or accepts them again.
    pub fn refuse(&self, refusing: bool) {
        self.shared.order(|orders| orders.refusing = refusing);
    }

    /// Lets `bytes` more pass in one direction, then closes the connection that carried the last of them.
    pub fn cut_after(&self, direction: Direction, bytes: u64) {
        self.shared
            .order(|orders| orders.budget[direction as usize] = Some(bytes));
    }

    /// Ends every open connection with a TCP reset on both sides.
    pub fn reset(&self) {
        self.shared.order(|orders| {
            orders
                .connections
                .drain(..)
                .for_each(|connection| Connection::reset(&connection))
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.order(|orders| {
            orders.closed = true;
            orders
                .connections
                .drain(..)
                .filter_map(|connection| connection.upgrade())
                .for_each(|open| open.end());
        });
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits while the proxy is paused; then how many of `wanted` bytes may pass, and whether they are the last ones.
    fn allowance(
        &self,
        connection: &Connection,
        direction: Direction,
        wanted: usize,
    ) -> (usize, bool) {
        let held = |orders: &mut Orders| orders.paused && !orders.closed && !connection.was_reset();
        let mut orders = self
            .changed
            .wait_while(self.lock(), held)
            .unwrap_or_else(PoisonError::into_inner);
        let Some(left) = orders.budget[direction as usize] else {
            return (wanted, false);
        };
        let passes = usize::try_from(left).map_or(wanted, |left| left.min(wanted));
        let left = left - passes as u64;
        let spent = left == 0;
        orders.budget[direction as usize] = (!spent).then_some(left);
        (passes, spent)
    }
}

impl Connection {
    /// The end of the stream for both sides.
    fn end(&self) {
        if !self.was_reset() {
            let _ = self.client.shutdown(Shutdown::Both);
            let _ = self.server.shutdown(Shutdown::Both);
        }
    }

    fn reset(connection: &Weak<Self>) {
        let Some(connection) = connection.upgrade() else {
            return;
        };
        connection.reset.store(true, Ordering::Relaxed);
        for socket in [&connection.client, &connection.server] {
            // Closing a socket that lingers for no time resets the connection. Shutting down the reading side sends
            // nothing, it only wakes the thread that reads, so that the socket is closed.
            let _ = set_socket_linger(socket, Some(Duration::ZERO));
            let _ = socket.shutdown(Shutdown::Read);
        }
    }

    fn was_reset(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for client in listener.incoming() {
        let Ok(client) = client else { continue };
        let mut orders = shared.lock();
        if orders.closed {
            return;
        }
        if orders.refusing {
            continue;
        }
        let server = orders.server.expect("set before the proxy listens");
        let Ok(server) = TcpStream::connect(server) else {
            continue;
        };
        let connection = Arc::new(Connection {
            client,
            server,
            reset: AtomicBool::new(false),
        });
        orders.connections.retain(|old| old.strong_count() > 0);
        orders.connections.push(Arc::downgrade(&connection));
        drop(orders);
        for direction in [Direction::ToServer, Direction::ToClient] {
            let (connection, shared) = (Arc::clone(&connection), Arc::clone(shared));
            thread::spawn(move || copy(&connection, direction, &shared));
        }
    }
}

fn copy(connection: &Connection, direction: Direction, shared: &Shared) {
    let (mut from, mut to) = match direction {
        Direction::ToServer => (&connection.client, &connection.server),
        Direction::ToClient => (&connection.server, &connection.client),
    };
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let (passes, spent) = shared.allowance(connection, direction, read);
        if connection.was_reset() || to.write_all(&buffer[..passes]).is_err() || spent {
            break;
        }
    }
    connection.end();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

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
}
