//! Foreign protocol code over our sockets: websockets and the tools of `futures` through futures-io, HTTP/1 and HTTP/2 by hyper. Loopback, and
//! the virtual clock, which stands still while I/O is ready.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::error::Error;
use std::future::{Future, pending};
use std::io::{self, IoSlice, IoSliceMut};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use async_tungstenite::WebSocketStream;
use async_tungstenite::tungstenite::{self, Message};
use futures::future::{Either, join, select};
use futures::io::{AsyncReadExt, AsyncWriteExt, copy};
use futures::{AsyncBufReadExt, StreamExt, TryStreamExt};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::rt::Timer;
use hyper::service::service_fn;
use hyper::{Request, Response, client, server};
use kernel::net::hyper::{KernelExecutor, KernelTimer};
use kernel::net::{Polled, Stream, TcpListener, TcpStream, UnixStream};
use kernel::{
    Builder, Interrupt, Reason, Task, VirtualClock, drop_after, interruptible, now, shield, sleep,
    spawn, timeout_after, yield_now,
};

type Anyhow<T = ()> = Result<T, Box<dyn Error>>;

/// Runs `main` on a clock that jumps; errors fail the test.
fn run<T>(main: impl Future<Output = Anyhow<T>>) -> T {
    let mut kernel = Builder::new().clock(VirtualClock::new()).build().unwrap();
    kernel.run(main).unwrap().unwrap()
}

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Lets every other task run until it waits.
async fn settle() {
    for _ in 0..5 {
        yield_now().await.unwrap();
    }
}

type Unix = Polled<UnixStream>;
type Tcp = Polled<TcpStream>;

fn unix_pair() -> io::Result<(Unix, Unix)> {
    let (a, b) = UnixStream::pair()?;
    Ok((Polled::new(a), Polled::new(b)))
}

async fn tcp_pair() -> io::Result<(Tcp, Tcp)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let connecting = spawn(async move { TcpStream::connect(address).await });
    let (accepted, _) = listener.accept().await?;
    let connected = connecting.join().await.unwrap()?;
    Ok((Polled::new(connected), Polled::new(accepted)))
}

// ---- futures-io

/// More than the system's buffers hold, so that both sides wait for each other.
const MUCH: usize = 3 << 20;

#[test]
fn bytes_are_copied_split_buffered_and_closed_by_the_tools_of_futures() {
    run(async {
        let (ours, theirs) = tcp_pair().await?;
        let echo = spawn(async move {
            let (reader, mut writer) = theirs.split();
            let copied = copy(reader, &mut writer).await?;
            writer.close().await?;
            io::Result::Ok(copied)
        });
        let sent: Vec<u8> = (0..MUCH).map(|n| (n % 251) as u8).collect();
        let (mut reader, mut writer) = ours.split();
        let sending = async {
            writer.write_all(&sent).await?;
            writer.flush().await?;
            writer.close().await // the other end reads to the end of what was written
        };
        let mut back = Vec::new();
        let (sending, receiving) = join(sending, reader.read_to_end(&mut back)).await;
        sending?;
        receiving?;
        assert!(back == sent);
        assert_eq!(echo.join().await??, MUCH as u64);

        // Several buffers at once, lines, and what a stream of ours has read already.
        let (ours, mut theirs) = unix_pair()?;
        let parts = [IoSlice::new(b"one\ntw"), IoSlice::new(b"o\nthree")];
        assert_eq!(theirs.write_vectored(&parts).await?, 13);
        let mut stream = Stream::new(ours.into_parts().0);
        assert_eq!(stream.read_line(100).await?, b"one\n");
        let mut ours = Polled::from(stream);
        let (mut first, mut second) = ([0; 2], [0; 3]);
        let mut parts = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        assert_eq!(ours.read_vectored(&mut parts).await?, 5);
        assert_eq!((&first, &second), (b"tw", b"o\nt"));
        theirs.write_all(b"\nfour").await?;
        theirs.close().await?;
        let lines: Vec<_> = futures::io::BufReader::new(ours)
            .lines()
            .try_collect()
            .await?;
        assert_eq!(lines, ["hree", "four"]);

        // A peer that is gone: closing says nothing, writing does.
        let (mut ours, theirs) = unix_pair()?;
        drop(theirs);
        ours.close().await?;
        assert_eq!(
            ours.write(b"x").await.unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
        // A pipe can be closed only by dropping it; that is no error.
        let (_reader, writer) = std::io::pipe()?;
        Polled::new(kernel::net::Io::from_std(std::fs::File::from(
            std::os::fd::OwnedFd::from(writer),
        ))?)
        .close()
        .await?;
        Ok(())
    });
}

type WebSocket<S> = WebSocketStream<S>;

async fn web_sockets() -> Anyhow<(WebSocket<Tcp>, WebSocket<Tcp>)> {
    let (ours, theirs) = tcp_pair().await?;
    let accepting = spawn(async_tungstenite::accept_async(theirs));
    let (socket, response) = async_tungstenite::client_async("ws://localhost/chat", ours).await?;
    assert_eq!(response.status(), 101);
    Ok((socket, accepting.join().await??))
}

/// Accepts: interop/futures_io
#[test]
fn a_web_socket_speaks_over_our_sockets() {
    run(async {
        let (mut client, mut server) = web_sockets().await?;
        let echo = spawn(async move {
            let mut count = 0;
            while let Some(message) = server.next().await {
                match message? {
                    Message::Close(_) => continue, // answered by the library
                    message if message.is_text() || message.is_binary() => {
                        count += 1;
                        server.send(message).await?;
                    }
                    _ => {}
                }
            }
            Ok::<_, tungstenite::Error>(count)
        });
        for n in 0..100 {
            client.send(Message::text(n.to_string())).await?;
            assert_eq!(
                client.next().await.unwrap()?.into_text()?.as_str(),
                n.to_string()
            );
        }
        // Large ones, both ways at once.
        let large = Bytes::from(vec![7; MUCH]);
        let (mut sink, mut stream) = client.split();
        let sending = async {
            for _ in 0..3 {
                sink.send(Message::binary(large.clone())).await.unwrap();
            }
            sink.close(None).await.unwrap();
        };
        let receiving = async {
            for _ in 0..3 {
                let message = stream.next().await.unwrap().unwrap();
                assert!(message.into_data() == large);
            }
            assert!(matches!(stream.next().await, Some(Ok(Message::Close(_)))));
            assert!(stream.next().await.is_none());
        };
        join(sending, receiving).await;
        assert_eq!(echo.join().await??, 103);
        Ok(())
    });
}

/// The error of the foreign library carries the interrupt, so that the task ends, and knows why.
#[test]
fn a_task_that_waits_in_foreign_code_is_interrupted_there() {
    run(async {
        // In the middle of a handshake that never ends.
        let (ours, theirs) = tcp_pair().await?;
        let handshake = spawn(async move {
            let socket = async_tungstenite::client_async("ws://localhost/", ours).await;
            socket.map(drop).map_err(Box::<dyn Error>::from)
        });
        settle().await;
        handshake.request_cancel(Reason::from("enough"));
        let error = handshake.join().await?.unwrap_err();
        let interrupt = Interrupt::find_in(&*error).unwrap();
        assert_eq!(interrupt.to_string(), "task cancelled: enough");
        drop(theirs);

        // Waiting for a message: a timeout that passes through the library is its block's own.
        let (mut client, mut server) = web_sockets().await?;
        let began = now();
        let late = timeout_after(s(5), async {
            Ok::<_, Box<dyn Error>>(client.next().await.transpose()?)
        });
        let late = late.await.unwrap_err();
        assert_eq!(Interrupt::find_in(&*late), Some(&Interrupt::TaskTimeout));
        assert_eq!(now() - began, s(5));

        // Waiting for room.
        let (mut ours, _theirs) = tcp_pair().await?;
        let late = timeout_after(s(5), async { ours.write_all(&vec![0; 64 << 20]).await });
        let late = late.await.unwrap_err();
        assert_eq!(Interrupt::find_in(&late), Some(&Interrupt::TaskTimeout));
        assert_ne!(
            late.kind(),
            io::ErrorKind::Interrupted,
            "which would be tried again"
        );

        // Behind a shield it is not told.
        let waiter = spawn(async move {
            let next = shield(server.next()).await;
            (next.unwrap().is_err(), sleep(s(1)).await)
        });
        settle().await;
        waiter.request_cancel("");
        settle().await;
        assert!(!waiter.is_terminated());
        drop(client); // ends it without a close frame
        let (is_err, interrupted) = waiter.join().await?;
        assert!(is_err && matches!(interrupted, Err(Interrupt::Cancelled(_))));
        Ok(())
    });
}

/// A wait that was dropped stays in the connection: it wakes for nothing, and that is all.
#[test]
fn a_foreign_read_that_is_dropped_half_way_loses_nothing() {
    run(async {
        let (mut client, server) = web_sockets().await?;
        let (mut sink, mut stream) = server.split();
        for round in 0..3 {
            assert!(drop_after(s(1), client.next()).await.is_none());
            sink.send(Message::text("late")).await?;
            let other = pin!(sleep(s(1)));
            // Lost again, to a wait of ours, or won.
            if round == 1 {
                match select(pin!(pending::<()>()), other).await {
                    Either::Left(_) => unreachable!(),
                    Either::Right((slept, _)) => drop(slept?),
                }
            }
            assert_eq!(client.next().await.unwrap()?, Message::text("late"));
        }
        // Read on by another task, with another waker.
        assert!(drop_after(s(1), client.next()).await.is_none());
        let reader = spawn(async move { join_all_of(client).await });
        settle().await;
        sink.send(Message::text("last")).await?;
        sink.close(None).await?;
        assert!(stream.next().await.unwrap()?.is_close());
        drop((sink, stream)); // which the client waits for
        assert_eq!(reader.join().await?, 2);
        // An interrupt that comes after the wait was dropped is told once more by the next read; then the connection works.
        let (mut ours, mut theirs) = unix_pair()?;
        let task = spawn(async move {
            let mut buf = [0; 10];
            assert!(drop_after(s(1), ours.read(&mut buf)).await.is_none());
            let told = sleep(s(10)).await.is_err();
            let again = ours.read(&mut buf).await.unwrap_err();
            let again = Interrupt::find_in(&again).is_some();
            (told, again, ours.read(&mut buf).await.unwrap())
        });
        sleep(s(2)).await?;
        task.request_cancel("");
        settle().await;
        theirs.write_all(b"bye").await?;
        assert_eq!(task.join().await?, (true, true, 3));
        Ok(())
    });
}

/// Polls each message with a waker of its own.
async fn join_all_of(mut socket: WebSocket<Tcp>) -> usize {
    let mut count = 0;
    loop {
        let mut next: futures::stream::FuturesUnordered<_> =
            std::iter::once(socket.next()).collect();
        match next.next().await.unwrap() {
            Some(message) => drop(message.unwrap()),
            None => return count,
        }
        count += 1;
    }
}

// ---- hyper

type Body = Full<Bytes>;
type Reply = Result<Response<Body>, Infallible>;

fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into())
}

fn get(path: &str) -> Request<Body> {
    let request = Request::get(path).header("host", "localhost");
    request.body(full("")).unwrap()
}

async fn text(response: Response<Incoming>) -> Anyhow<String> {
    assert_eq!(response.status(), 200);
    let bytes = response.into_body().collect().await?.to_bytes();
    Ok(String::from_utf8(bytes.into())?)
}

/// A server whose state is an `Rc`, a task for each client. Over Unix sockets: what is on its way through the network would not hold the clock.
#[derive(Default)]
struct Server {
    is_http2: bool,
    connections: Cell<usize>,
    requests: Rc<Cell<usize>>,
    /// How each connection ended.
    ends: RefCell<Vec<Task<hyper::Result<()>>>>,
}

async fn handle(request: Request<Incoming>, requests: Rc<Cell<usize>>) -> Reply {
    requests.set(requests.get() + 1);
    let path = request.uri().path().to_string();
    let body = request.into_body().collect().await;
    let reply = match path.as_str() {
        "/sleep" => match sleep(s(30)).await {
            Ok(_) => full("slept"),
            Err(interrupt) => full(interrupt.to_string()),
        },
        "/large" => full(vec![b'x'; MUCH]),
        "/length" => full(body.unwrap().to_bytes().len().to_string()),
        path => full(format!("{path} {}", requests.get())),
    };
    Ok(Response::new(reply))
}

impl Server {
    fn connect(&self) -> io::Result<Unix> {
        let (ours, theirs) = unix_pair()?;
        self.connections.set(self.connections.get() + 1);
        let requests = self.requests.clone();
        let service = service_fn(move |request| handle(request, requests.clone()));
        self.ends.borrow_mut().push(if self.is_http2 {
            let mut http = server::conn::http2::Builder::new(KernelExecutor);
            spawn(http.timer(KernelTimer).serve_connection(theirs, service))
        } else {
            let mut http = server::conn::http1::Builder::new();
            http.timer(KernelTimer).header_read_timeout(s(10));
            spawn(http.serve_connection(theirs, service))
        });
        Ok(ours)
    }

    /// How connection `number` ended.
    async fn end(&self, number: usize) -> hyper::Result<()> {
        let task = self.ends.borrow_mut().remove(number);
        task.join().await.unwrap()
    }
}

/// Accepts: interop/hyper
#[test]
fn hyper_serves_and_asks_over_our_sockets_and_keeps_connections_alive() {
    run(async {
        let server = Server::default();
        let (mut sender, connection) = client::conn::http1::handshake(server.connect()?).await?;
        let connection = spawn(connection);
        for n in 1..=20 {
            let answer = text(sender.send_request(get("/hello")).await?).await?;
            assert_eq!(answer, format!("/hello {n}"));
        }
        // Bodies that need many turns in each direction, one of them in chunks.
        let large = text(sender.send_request(get("/large")).await?).await?;
        assert_eq!(large.len(), MUCH);
        let request = Request::post("/length").header("host", "localhost");
        let answer = sender
            .send_request(request.body(full(vec![0; MUCH]))?)
            .await?;
        assert_eq!(text(answer).await?, MUCH.to_string());
        assert_eq!((server.connections.get(), server.requests.get()), (1, 22));
        // A second client at the same time is a second connection.
        let (mut other, second) =
            client::conn::http1::handshake::<_, Body>(server.connect()?).await?;
        let second = spawn(second);
        let (slow, quick) = join(
            sender.send_request(get("/sleep")),
            other.send_request(get("/b")),
        )
        .await;
        assert_eq!(text(slow?).await?, "slept");
        assert!(text(quick?).await?.starts_with("/b "));
        assert_eq!(server.connections.get(), 2);
        drop((sender, other)); // then the client closes, and the server sees it
        connection.join().await??;
        second.join().await??;
        let idle = server.end(1).await.unwrap_err(); // while the slow answer was waited for
        assert!(idle.is_timeout());
        server.end(0).await?;
        Ok(())
    });
}

#[test]
fn hypers_timeouts_run_on_the_kernels_clock() {
    run(async {
        let server = Server::default();
        // A head that does not come to its end within 10 seconds.
        let mut slow = server.connect()?;
        let began = now();
        slow.write_all(b"GET / HTTP/1.1\r\nhost: local").await?;
        sleep(s(9)).await?;
        assert!(!server.ends.borrow()[0].is_terminated());
        let mut rest = Vec::new();
        slow.read_to_end(&mut rest).await?;
        assert_eq!(now() - began, s(10));
        assert!(server.end(0).await.unwrap_err().is_timeout());
        // A request that is slow to be answered is none of its business, but ours may be.
        let (mut sender, connection) =
            client::conn::http1::handshake::<_, Body>(server.connect()?).await?;
        let _connection = spawn(connection);
        let began = now();
        let late = timeout_after(s(5), async {
            Ok::<_, Interrupt>(
                interruptible(sender.send_request(get("/sleep")))
                    .await?
                    .is_ok(),
            )
        });
        assert_eq!(late.await, Err(Interrupt::TaskTimeout));
        assert_eq!(now() - began, s(5));
        Ok(())
    });
}

/// Both sides of a connection that ends in the middle of something, each by its own way.
#[test]
fn a_connection_of_hypers_ends_half_way() {
    run(async {
        let server = Server::default();
        let ask = async || {
            let (mut sender, connection) =
                client::conn::http1::handshake::<_, Body>(server.connect()?).await?;
            let connection = spawn(connection);
            let asking = spawn(async move { sender.send_request(get("/sleep")).await });
            while server.requests.take() == 0 {
                sleep(Duration::ZERO).await?;
            }
            Ok::<_, Box<dyn Error>>((connection, asking))
        };
        // The client's task is cancelled while it waits for the answer: hyper gives the error to who asked.
        let (connection, asking) = ask().await?;
        connection.cancel().await?;
        connection.join().await??;
        let error = asking.join().await?.unwrap_err();
        assert_eq!(Interrupt::find_in(&error), Some(&Interrupt::cancelled()));
        drop(server.end(0).await); // it noticed

        // The client's task is dropped.
        let (connection, asking) = ask().await?;
        connection.abort();
        assert!(asking.join().await?.is_err());
        drop(server.end(0).await);

        // The server's is cancelled, while its handler waits and hyper reads beside it to see the client go away.
        let (connection, asking) = ask().await?;
        server.ends.borrow()[0].request_cancel("");
        assert!(asking.join().await?.unwrap_err().is_incomplete_message());
        connection.join().await??;
        let error = server.end(0).await.unwrap_err();
        assert!(matches!(
            Interrupt::find_in(&error),
            Some(Interrupt::Cancelled(_))
        ));

        // And amid the head of a request.
        let mut half = server.connect()?;
        half.write_all(b"GET / HT").await?;
        sleep(s(1)).await?;
        server.ends.borrow()[0].request_cancel("");
        let error = server.end(0).await.unwrap_err();
        assert!(
            matches!(Interrupt::find_in(&error), Some(Interrupt::Cancelled(_))),
            "{error:?}"
        );
        let mut rest = Vec::new();
        half.read_to_end(&mut rest).await?;

        // Between two requests it is the end of the connection.
        let (mut sender, connection) =
            client::conn::http1::handshake::<_, Body>(server.connect()?).await?;
        let connection = spawn(connection);
        text(sender.send_request(get("/")).await?).await?;
        let cancelled = server.ends.borrow()[0].cancel();
        cancelled.await?;
        server.end(0).await?;
        connection.join().await??;

        // The server's is dropped.
        let (connection, asking) = ask().await?;
        server.ends.borrow()[0].abort();
        assert!(asking.join().await?.is_err());
        drop(connection.join().await?);
        Ok(())
    });
}

/// Many streams of one connection; hyper spawns tasks for them, whose futures are not `Send`.
#[test]
fn hyper_speaks_http2_with_tasks_of_ours() {
    run(async {
        let server = Server {
            is_http2: true,
            ..Server::default()
        };
        let mut http = client::conn::http2::Builder::new(KernelExecutor);
        http.timer(KernelTimer)
            .keep_alive_interval(s(20))
            .keep_alive_while_idle(true);
        let (sender, connection) = http.handshake::<_, Body>(server.connect()?).await?;
        let connection = spawn(connection);
        let began = now();
        let paths = ["/sleep", "/large", "/length"].into_iter().cycle().take(30);
        let asking = paths.map(|path| {
            let mut sender = sender.clone();
            spawn(async move {
                let answer = sender.send_request(get(path)).await.unwrap();
                text(answer).await.unwrap().len()
            })
        });
        for (n, asked) in asking.collect::<Vec<_>>().iter().enumerate() {
            assert_eq!(asked.join().await?, [5, MUCH, 1][n % 3]);
        }
        assert_eq!(now() - began, s(30));
        assert_eq!(server.connections.get(), 1);
        // Pings keep it alive for an hour, and its end is noticed.
        sleep(s(3600)).await?;
        assert!(!connection.is_terminated());
        drop(sender);
        connection.join().await??;
        drop(server.end(0).await); // it may say goodbye to nobody
        Ok(())
    });
}

/// A timer of hyper's says that it may go to another thread, because hyper asks for that; it must not.
#[test]
fn a_timer_stays_on_its_thread() {
    run(async {
        let timer: &dyn Timer = &KernelTimer;
        let began = now();
        timer.sleep(s(2)).await;
        timer.sleep_until(began + s(5)).await;
        timer.sleep_until(began).await;
        assert_eq!(now() - began, s(5));
        // Its time begins when it is made.
        let slept = timer.sleep(s(3));
        sleep(s(2)).await?;
        slept.await;
        assert_eq!(timer.now() - began, s(8));
        assert!(drop_after(s(1), timer.sleep(Duration::MAX)).await.is_none());
        // An interrupt is not its end.
        let task = spawn(async {
            KernelTimer.sleep(s(5)).await;
            (now(), sleep(s(1)).await.is_err())
        });
        settle().await;
        task.request_cancel("");
        assert_eq!(task.join().await?, (began + s(14), true));
        let moved = timer.sleep(s(1));
        let panicked = std::thread::spawn(move || drop(moved)).join();
        assert!(panicked.is_err());
        Ok(())
    });
}
