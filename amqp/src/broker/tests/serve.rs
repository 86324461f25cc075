//! The broker behind a listener, with real sockets on the loopback.

use std::io;
use std::net::SocketAddr;

use kernel::net::{TcpListener, TcpStream};
use kernel::{MaybeInterrupt, spawn, yield_now};

use super::rig::*;
use crate::broker::{Config, Server};
use crate::wire::cold::{self, Method, connection};
use crate::wire::{Frame, PROTOCOL_HEADER, Publish, Splitter};

/// A client that sends what it is told and reads as many frames as it is told.
struct Peer {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Peer {
    async fn connect(server: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(server).await?;
        let mut peer = Self {
            stream,
            unread: Vec::new(),
        };
        peer.stream.write_all(&PROTOCOL_HEADER).await?;
        for (channel, method) in [
            (0, start_ok("guest", "guest")),
            (0, tune_ok(0)),
            (0, open("/")),
            (1, open_channel()),
        ] {
            peer.send(channel, method).await?;
        }
        assert_eq!(
            peer.read(4).await?,
            ["0 start", "0 tune 2047 131072 60", "0 open-ok", "1 open-ok"]
        );
        Ok(peer)
    }

    async fn send(&self, channel: u16, method: Method) -> io::Result<()> {
        let mut bytes = Vec::new();
        cold::put(&mut bytes, channel, &method);
        Ok(self.stream.write_all(&bytes).await?)
    }

    async fn publish(&self, key: &str, body: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::new();
        let publish = Publish {
            routing_key: key,
            ..Publish::default()
        };
        publish.put(&mut bytes, 1, &[0, 0], body, 131_064).unwrap();
        Ok(self.stream.write_all(&bytes).await?)
    }

    /// Reads until there are so many methods, with what belongs to them.
    async fn read(&mut self, methods: usize) -> io::Result<Vec<String>> {
        loop {
            if let Some(len) = self.complete(methods) {
                let bytes: Vec<u8> = self.unread.drain(..len).collect();
                return Ok(lines(&bytes));
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.unread.extend_from_slice(&buffer[..n]),
            }
        }
    }

    /// The length of the first so many methods, if they are there.
    fn complete(&self, methods: usize) -> Option<usize> {
        let splitter = Splitter::with_frame_max(131_072);
        let (mut at, mut found, mut body) = (0, 0, 0);
        while found < methods || body > 0 {
            let (frame, len) = splitter.next_frame(&self.unread[at..]).unwrap()?;
            at += len;
            match frame {
                Frame::Method {
                    class: 60,
                    method: 50 | 60 | 71,
                    ..
                } => {
                    found += 1;
                    let (header, _) = splitter.next_frame(&self.unread[at..]).unwrap()?;
                    let Frame::Header { raw, .. } = header else {
                        panic!("{header:?}")
                    };
                    body = usize::from_be_bytes(raw[4..12].try_into().unwrap());
                    at += raw.len() + 8;
                }
                Frame::Method { .. } => found += 1,
                Frame::Body { data, .. } => body -= data.len(),
                Frame::Header { .. } | Frame::Heartbeat => {}
            }
        }
        Some(at)
    }

    /// Whether the broker has closed the connection, with nothing said before.
    async fn is_cut_off(&self) -> bool {
        let mut buffer = [0; 1];
        matches!(self.stream.read(&mut buffer).await, Ok(0) | Err(_))
    }
}

fn listen() -> (Server, TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (Server::new(Config::default()), listener, address)
}

fn run(test: impl Future<Output = io::Result<()>>) {
    kernel::run(test).unwrap().unwrap();
}

#[test]
fn one_connection_publishes_and_another_consumes() {
    run(async {
        let (server, listener, address) = listen();
        let running = spawn({
            let server = server.clone();
            async move { server.serve(listener).await }
        });
        let mut consumer = Peer::connect(address).await?;
        consumer.send(1, declare("q")).await?;
        consumer.send(1, consume("q", "t")).await?;
        assert_eq!(
            consumer.read(2).await?,
            ["1 declare-ok q 0 0", "1 consume-ok t"]
        );

        let mut publisher = Peer::connect(address).await?;
        publisher.send(1, confirm_select()).await?;
        assert_eq!(publisher.read(1).await?, ["1 select-ok"]);
        publisher.publish("q", b"small").await?;
        assert_eq!(publisher.read(1).await?, ["1 ack 1"]);
        // Larger than any buffer on the way.
        let large = "x".repeat(3 << 20);
        publisher.publish("q", large.as_bytes()).await?;
        assert_eq!(publisher.read(1).await?, ["1 ack 2"]);
        assert_eq!(
            consumer.read(2).await?,
            [
                "1 deliver t #1 small".to_owned(),
                format!("1 deliver t #2 {large}")
            ]
        );

        // A consumer that goes without a word gives back what it had.
        drop(consumer);
        let waiting = |server: &Server| server.with(|broker, _| broker.queues()[0].ready);
        while waiting(&server) < 2 {
            yield_now().await?;
        }
        publisher
            .send(
                0,
                Method::Connection(connection::AMQPMethod::Close(connection::Close::default())),
            )
            .await?;
        assert_eq!(publisher.read(1).await?, ["0 close-ok"]);
        assert!(publisher.is_cut_off().await);
        running.cancel().await?;
        Ok(())
    });
}

#[test]
fn an_interrupted_server_asks_its_clients_to_go_and_waits_for_them() {
    run(async {
        let (server, listener, address) = listen();
        let running = spawn({
            let server = server.clone();
            async move { server.serve(listener).await }
        });
        let mut peer = Peer::connect(address).await?;
        running.to_ref().request_cancel(kernel::Reason::default());
        assert_eq!(
            peer.read(1).await?,
            [
                "0 close 320 CONNECTION_FORCED - broker forced connection closure with reason 'shutdown' (0, 0)"
            ]
        );
        assert!(!running.to_ref().is_terminated(), "it waits for the answer");
        peer.send(
            0,
            Method::Connection(connection::AMQPMethod::CloseOk(connection::CloseOk {})),
        )
        .await?;
        assert!(peer.is_cut_off().await);
        let ended = running.join().await.unwrap();
        assert!(ended.unwrap_err().interrupt().is_some());
        assert_eq!(server.with(|broker, _| broker.session_count()), 0);
        assert!(TcpStream::connect(address).await.is_err());
        Ok(())
    });
}

#[test]
fn a_dropped_server_cuts_everybody_off() {
    run(async {
        let (server, listener, address) = listen();
        let running = spawn({
            let server = server.clone();
            async move { server.serve(listener).await }
        });
        let peer = Peer::connect(address).await?;
        running.to_ref().abort();
        assert!(peer.is_cut_off().await);
        while server.with(|broker, _| broker.session_count()) > 0 {
            yield_now().await?;
        }
        Ok(())
    });
}

#[test]
fn a_consumer_that_does_not_read_stops_its_deliveries_and_nobody_elses() {
    run(async {
        let (server, listener, address) = listen();
        let running = spawn({
            let server = server.clone();
            async move { server.serve(listener).await }
        });
        let mut lazy = Peer::connect(address).await?;
        lazy.send(1, declare("q")).await?;
        lazy.send(1, consume_with("q", "t", |c| c.no_ack = true))
            .await?;
        lazy.read(2).await?;
        let mut publisher = Peer::connect(address).await?;
        publisher.send(1, confirm_select()).await?;
        publisher.read(1).await?;
        // More than the sockets' buffers and the broker's together.
        let body = vec![b'x'; 1 << 20];
        for n in 1..=32 {
            publisher.publish("q", &body).await?;
            assert_eq!(publisher.read(1).await?, [format!("1 ack {n}")]);
        }
        let waiting = server.with(|broker, _| broker.queues()[0].ready);
        assert!(waiting > 0, "some are kept back");
        // Then it reads, and gets every one of them.
        let mut got = 0;
        while got < 32 {
            let line = lazy.read(1).await?.remove(0);
            got += 1;
            assert!(line.starts_with(&format!("1 deliver t #{got} xxx")) && line.len() > 1 << 20);
        }
        running.to_ref().abort();
        Ok(())
    });
}

#[test]
fn who_speaks_something_else_hears_what_we_speak_and_is_let_go() {
    run(async {
        let (server, listener, address) = listen();
        let running = spawn(async move { server.serve(listener).await });
        let stream = TcpStream::connect(address).await?;
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .await?;
        let mut answer = Vec::new();
        let mut buffer = [0; 64];
        loop {
            match stream.read(&mut buffer).await? {
                0 => break,
                n => answer.extend_from_slice(&buffer[..n]),
            }
        }
        assert_eq!(answer, PROTOCOL_HEADER);
        running.to_ref().abort();
        Ok(())
    });
}
