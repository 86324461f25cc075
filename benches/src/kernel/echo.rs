//! A TCP server that sends back what it gets.

use super::runtimes;
use crate::harness::{Bench, Better, Error, Figure, Side};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

/// Any free port of the loopback.
const ANY: &str = "127.0.0.1:0";
/// More than a message, so that a short read can tell that the socket is empty.
const BUFFER: usize = 1024;

pub(super) fn over(connections: usize) -> Bench {
    const FIGURES: &[Figure] = &[
        Figure {
            key: "cpu_us",
            unit: "us server CPU",
            better: Better::Less,
        },
        Figure {
            key: "rps",
            unit: "requests/s",
            better: Better::More,
        },
    ];
    let name = format!("echo_{connections}");
    let bench = Bench::new(
        name,
        "64-byte messages, one in flight a connection, server on core 0; per request",
        FIGURES,
    )
    .server("sweepea", Side::Ours, connections, ours)
    .server("epoll by hand", Side::Floor, connections, epoll_by_hand);
    #[cfg(feature = "peers")]
    let bench = bench
        .server("tokio", Side::Peer, connections, peers::tokio)
        .server("smol", Side::Peer, connections, peers::smol)
        .server("monoio uring", Side::Peer, connections, peers::monoio_uring)
        .server("monoio epoll", Side::Peer, connections, peers::monoio_epoll)
        .server("glommio", Side::Peer, connections, peers::glommio);
    bench
}

/// The loop one would write without a runtime: edge-triggered, one read and one write a message.
fn epoll_by_hand(ready: fn(SocketAddr)) -> Result<(), Error> {
    let listener = TcpListener::bind(ANY)?;
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX))?;
    ready(listener.local_addr()?);
    let mut streams: Vec<Option<TcpStream>> = Vec::new();
    let mut events = vec![EpollEvent::empty(); 1024];
    let mut buffer = [0; BUFFER];
    loop {
        let n = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..n] {
            if event.data() == u64::MAX {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
                epoll.add(&stream, EpollEvent::new(flags, streams.len() as u64))?;
                streams.push(Some(stream));
                continue;
            }
            let slot = &mut streams[event.data() as usize];
            let Some(stream) = slot else { continue };
            match stream.read(&mut buffer) {
                Ok(0) => *slot = None,
                Ok(n) => stream.write_all(&buffer[..n])?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => *slot = None,
            }
        }
    }
}

fn ours(ready: fn(SocketAddr)) -> Result<(), Error> {
    runtimes::ours(async move {
        let listener = kernel::net::TcpListener::bind(ANY)?;
        ready(listener.local_addr()?);
        loop {
            let (stream, _) = listener.accept().await?;
            kernel::spawn(async move {
                let mut buffer = [0; BUFFER];
                while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&buffer[..n]).await.is_err() {
                        break;
                    }
                }
            });
        }
    })?
}

#[cfg(feature = "peers")]
mod peers {
    use super::*;

    pub(super) fn tokio(ready: fn(SocketAddr)) -> Result<(), Error> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        runtimes::tokio(async move {
            let listener = tokio::net::TcpListener::bind(ANY).await?;
            ready(listener.local_addr()?);
            loop {
                let (mut stream, _) = listener.accept().await?;
                tokio::task::spawn_local(async move {
                    let mut buffer = [0; BUFFER];
                    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                        if stream.write_all(&buffer[..n]).await.is_err() {
                            break;
                        }
                    }
                });
            }
        })?
    }

    pub(super) fn smol(ready: fn(SocketAddr)) -> Result<(), Error> {
        use async_io::Async;
        use futures_lite::{AsyncReadExt, AsyncWriteExt};
        runtimes::smol(async move |smol| {
            let listener = Async::<TcpListener>::bind(ANY.parse::<SocketAddr>()?)?;
            ready(listener.get_ref().local_addr()?);
            loop {
                let (mut stream, _) = listener.accept().await?;
                smol.spawn(async move {
                    let mut buffer = [0; BUFFER];
                    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                        if stream.write_all(&buffer[..n]).await.is_err() {
                            break;
                        }
                    }
                })
                .detach();
            }
        })?
    }

    pub(super) fn monoio_uring(ready: fn(SocketAddr)) -> Result<(), Error> {
        runtimes::monoio_uring(monoio(ready))?
    }

    pub(super) fn monoio_epoll(ready: fn(SocketAddr)) -> Result<(), Error> {
        runtimes::monoio_epoll(monoio(ready))?
    }

    /// monoio's own traits, which lend the buffer to the ring.
    async fn monoio(ready: fn(SocketAddr)) -> Result<(), Error> {
        use monoio::io::{AsyncReadRent, AsyncWriteRentExt};
        let listener = monoio::net::TcpListener::bind(ANY)?;
        ready(listener.local_addr()?);
        loop {
            let (mut stream, _) = listener.accept().await?;
            drop(monoio::spawn(async move {
                let mut buffer = Vec::with_capacity(BUFFER);
                loop {
                    let (read, filled) = stream.read(buffer).await;
                    if !matches!(read, Ok(1..)) {
                        break;
                    }
                    let (written, mut sent) = stream.write_all(filled).await;
                    if written.is_err() {
                        break;
                    }
                    sent.clear();
                    buffer = sent;
                }
            }));
        }
    }

    pub(super) fn glommio(ready: fn(SocketAddr)) -> Result<(), Error> {
        use futures_lite::{AsyncReadExt, AsyncWriteExt};
        runtimes::glommio(async move {
            let listener = glommio::net::TcpListener::bind(ANY).map_err(|e| e.to_string())?;
            ready(listener.local_addr().map_err(|e| e.to_string())?);
            loop {
                let mut stream = listener.accept().await.map_err(|e| e.to_string())?;
                glommio::spawn_local(async move {
                    let mut buffer = [0; BUFFER];
                    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                        if stream.write_all(&buffer[..n]).await.is_err() {
                            break;
                        }
                    }
                })
                .detach();
            }
        })?
    }
}
