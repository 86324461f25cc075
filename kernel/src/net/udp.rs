//! UDP.

use std::io;
use std::net::{self, SocketAddr, ToSocketAddrs};

use super::io::Io;
use crate::traps::{Direction, ReadyOp};

/// Sends and receives datagrams. Its methods are on the page of [`Io`].
///
/// If dropped, it is closed, with what nobody received.
pub type UdpSocket = Io<net::UdpSocket>;

impl Io<net::UdpSocket> {
    /// A socket at the first of the addresses that can be had; port 0 means any free one. A host name is looked up on the spot.
    ///
    /// Not a cancellation point.
    ///
    /// # Errors
    /// Those of `bind(2)`.
    pub fn bind(at: impl ToSocketAddrs) -> io::Result<Self> {
        Self::from_std(net::UdpSocket::bind(at)?)
    }

    /// The address it is bound to.
    ///
    /// # Errors
    /// Those of `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.as_std().local_addr()
    }

    /// Talks to `peer` alone from now on, by [`send`](Self::send) and [`recv`](Self::recv). Sends nothing.
    ///
    /// # Errors
    /// Those of `connect(2)`.
    pub fn connect(&self, peer: SocketAddr) -> io::Result<()> {
        self.as_std().connect(peer)
    }

    /// Receives a datagram, and says how long it is and from whom it came. What does not fit into `buf` is lost.
    ///
    /// Cancellation point: only if there is none. If dropped, none was received.
    ///
    /// # Errors
    /// As [`Source::ready_op`](crate::traps::Source::ready_op), with those of `recvfrom(2)`.
    #[track_caller]
    pub fn recv_from(
        &self,
        buf: &mut [u8],
    ) -> ReadyOp<'_, impl FnMut() -> io::Result<(usize, SocketAddr)>> {
        self.ready_op(Direction::Read, |socket| socket.recv_from(buf))
    }

    /// Sends a datagram.
    ///
    /// Cancellation point: only if there is no room. If dropped, nothing was sent.
    ///
    /// # Errors
    /// As [`Source::ready_op`](crate::traps::Source::ready_op), with those of `sendto(2)`.
    #[track_caller]
    pub fn send_to(
        &self,
        data: &[u8],
        to: SocketAddr,
    ) -> ReadyOp<'_, impl FnMut() -> io::Result<usize>> {
        self.ready_op(Direction::Write, move |socket| socket.send_to(data, to))
    }

    /// As [`recv_from`](Self::recv_from), from the peer it is connected to.
    ///
    /// # Errors
    /// As [`recv_from`](Self::recv_from). The peer's machine may have said that nobody listens: `ConnectionRefused`.
    #[track_caller]
    pub fn recv(&self, buf: &mut [u8]) -> ReadyOp<'_, impl FnMut() -> io::Result<usize>> {
        self.ready_op(Direction::Read, |socket| socket.recv(buf))
    }

    /// As [`send_to`](Self::send_to), to the peer it is connected to.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    #[track_caller]
    pub fn send(&self, data: &[u8]) -> ReadyOp<'_, impl FnMut() -> io::Result<usize>> {
        self.ready_op(Direction::Write, |socket| socket.send(data))
    }
}
