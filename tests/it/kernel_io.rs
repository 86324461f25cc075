//! Sockets, pipes, files, channels, children and signals, and the traps below them. Loopback only.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net as unix;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::rc::Rc;
use std::sync::Barrier;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use futures::io::AsyncReadExt;
use kernel::channel::Connection;
use kernel::fs::File;
use kernel::net::{
    Incomplete, Io, Places, PollRead, Polled, Server, Stream, TcpListener, TcpStream, UdpSocket,
    UnixListener, UnixStream,
};
use kernel::process::{Command, ProcessError};
use kernel::signal::{self, SignalEvent, SignalQueue};
use kernel::{
    Builder, Interrupt, MaybeInterrupt, ResourceBusy, TaskRef, VirtualClock, WaitKind,
    current_task, sleep, spawn, timeout_after, traps, yield_now,
};
use rig::unique;

const SECOND: Duration = Duration::from_secs(1);

/// Runs `main` in real time; a test that hangs fails after a while.
fn run<T>(main: impl Future<Output = io::Result<T>>) -> T {
    kernel::run(timeout_after(60 * SECOND, main))
        .unwrap()
        .unwrap()
}

/// Runs `main` in virtual time: when nothing happens, the next deadline comes at once.
fn run_virtual<T>(main: impl Future<Output = io::Result<T>>) -> T {
    let mut kernel = Builder::new().clock(VirtualClock::new()).build().unwrap();
    kernel.run(main).unwrap().unwrap()
}

async fn tcp_pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?).await?;
    let (server, peer) = listener.accept().await?;
    assert_eq!(peer, client.local_addr()?);
    Ok((client, server))
}

/// Lets every other task run until it waits.
async fn settle() {
    for _ in 0..3 {
        yield_now().await.unwrap();
    }
}

fn interrupted_by<T, E: MaybeInterrupt>(outcome: &Result<T, E>, interrupt: Interrupt) -> bool {
    matches!(outcome, Err(error) if error.interrupt() == Some(&interrupt))
}

fn is_timeout<T, E: MaybeInterrupt>(outcome: &Result<T, E>) -> bool {
    interrupted_by(outcome, Interrupt::TaskTimeout)
}

/// Which direction is another task's, if that is why a call was refused.
fn busy<T>(outcome: &io::Result<T>) -> Option<&ResourceBusy> {
    outcome.as_ref().err()?.get_ref()?.downcast_ref()
}

fn kind<T>(outcome: io::Result<T>) -> io::ErrorKind {
    outcome.map(drop).unwrap_err().kind()
}

/// Data and the end may come in one event; the read that takes the data must not forget the end.
#[test]
fn the_end_is_seen_after_a_short_read_that_came_with_it() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let reader = spawn(async move {
            let mut buf = [0; 64];
            let first = ours.read(&mut buf).await?;
            let second = ours.read(&mut buf).await?;
            io::Result::Ok((first, second))
        });
        settle().await;
        theirs.write_all(b"hello").await?;
        drop(theirs);
        assert_eq!(reader.join().await.unwrap()?, (5, 0));
        Ok(())
    });
}

#[test]
fn a_released_socket_can_be_used_again() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let ours = Rc::new(ours);
        let mut buf = [0; 8];
        let early = timeout_after(Duration::from_millis(1), ours.read(&mut buf)).await;
        assert!(is_timeout(&early));
        traps::io_release(&*ours);
        let reader = spawn({
            let ours = ours.clone();
            async move { ours.read(&mut [0; 8]).await }
        });
        settle().await;
        theirs.write_all(b"again").await?;
        assert_eq!(reader.join().await.unwrap()?, 5);
        Ok(())
    });
}

#[test]
fn a_socket_outlives_its_kernel() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let ours = &ours;
    for word in ["first", "second"] {
        run(async {
            let mut buf = [0; 16];
            let early = timeout_after(Duration::from_millis(1), ours.read(&mut buf)).await;
            assert!(is_timeout(&early));
            theirs.write_all(word.as_bytes()).await?;
            assert_eq!(ours.read(&mut buf).await?, word.len());
            Ok(())
        });
    }
}

/// Accepts: curio/socket/tcp_echo
#[test]
fn an_echo_over_tcp_takes_the_same_course_every_time() {
    let log = Rc::new(RefCell::new(Vec::new()));
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let server = spawn({
            let log = log.clone();
            async move {
                log.borrow_mut().push("accept wait");
                let (client, _) = listener.accept().await?;
                log.borrow_mut().push("accepted");
                let mut buf = [0; 100];
                loop {
                    let read = client.read(&mut buf).await?;
                    if read == 0 {
                        log.borrow_mut().push("end");
                        return io::Result::Ok(());
                    }
                    log.borrow_mut().push("read");
                    client.write_all(&buf[..read]).await?;
                }
            }
        });
        settle().await;
        let client = TcpStream::connect(address).await?;
        for word in ["hello", "again"] {
            log.borrow_mut().push("send");
            client.write_all(word.as_bytes()).await?;
            let mut answer = [0; 100];
            let read = client.read(&mut answer).await?;
            log.borrow_mut().push("answer");
            assert_eq!(&answer[..read], word.as_bytes());
        }
        drop(client);
        server.join().await.unwrap()
    });
    let expected = "accept wait, accepted, send, read, answer, send, read, answer, end";
    // Whether the server is told of the connection before the client goes on is the system's affair.
    let mut log = log.take();
    let accepted = log.iter().position(|&line| line == "accepted").unwrap();
    log.remove(accepted);
    log.insert(1, "accepted");
    assert_eq!(log.join(", "), expected);
}

/// A socket that counts the calls made on it.
#[derive(Debug)]
struct Counting {
    stream: unix::UnixStream,
    reads: Cell<u32>,
}

impl AsFd for Counting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Read for &Counting {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.reads.set(self.reads.get() + 1);
        (&self.stream).read(buf)
    }
}

#[test]
fn a_short_read_spares_the_call_that_would_block() {
    run(async {
        let (stream, mut theirs) = unix::UnixStream::pair()?;
        let counting = Counting {
            stream,
            reads: Cell::new(0),
        };
        let ours = Rc::new(Io::from_std(counting)?);
        let reader = spawn({
            let ours = ours.clone();
            async move {
                let mut buf = [0; 100];
                while ours.read(&mut buf).await? > 0 {}
                io::Result::Ok(())
            }
        });
        for _ in 0..100 {
            settle().await;
            theirs.write_all(b"hello")?;
            traps::read_wait(&ours.as_std().stream.try_clone()?).await?;
        }
        drop(theirs);
        reader.join().await.unwrap()?;
        // One to find that it has to wait, one each, one for the end.
        assert_eq!(ours.as_std().reads.get(), 102);
        Ok(())
    });
}

/// Accepts: curio/socket/fromfd_tcp_echo, curio/io/socket_blocking
#[test]
fn a_socket_is_taken_from_a_thread_and_given_back() {
    run(async {
        let (ours, theirs) = tcp_pair().await?;
        let mut lent = theirs.into_std()?;
        let echo = thread::spawn(move || -> io::Result<OwnedFd> {
            let mut buf = [0; 5];
            lent.read_exact(&mut buf)?;
            lent.write_all(&buf)?;
            Ok(lent.into())
        });
        ours.write_all(b"hello").await?;
        let mut buf = [0; 5];
        assert_eq!(ours.read(&mut buf).await?, 5);
        assert_eq!(&buf, b"hello");
        let back = TcpStream::from_std(echo.join().unwrap()?.into())?;
        ours.write_all(b"again").await?;
        assert_eq!(back.read(&mut buf).await?, 5);
        assert_eq!(&buf, b"again");
        Ok(())
    });
}

/// Accepts: curio/socket/accept_timeout, curio/socket/accept_cancel
#[test]
fn accept_can_be_interrupted_and_called_again() {
    run_virtual(async {
        let listener = Rc::new(TcpListener::bind("127.0.0.1:0")?);
        let late = timeout_after(SECOND, listener.accept()).await;
        assert!(is_timeout(&late));
        let server = spawn({
            let listener = listener.clone();
            async move { listener.accept().await }
        });
        settle().await;
        server.cancel().await?;
        let outcome = server.join().await.unwrap();
        assert!(interrupted_by(&outcome, Interrupt::cancelled()));
        let client = TcpStream::connect(listener.local_addr()?).await?;
        let (_, peer) = listener.accept().await?;
        assert_eq!(peer, client.local_addr()?);
        Ok(())
    });
}

/// Accepts: curio/socket/recv_timeout, curio/socket/recv_cancel
#[test]
fn read_can_be_interrupted_and_loses_nothing() {
    run_virtual(async {
        let (ours, theirs) = tcp_pair().await?;
        let (ours, mut buf) = (Rc::new(ours), [0; 5]);
        let late = timeout_after(SECOND, ours.read(&mut buf)).await;
        assert!(is_timeout(&late));
        let reader = spawn({
            let ours = ours.clone();
            async move { ours.read(&mut [0; 5]).await }
        });
        settle().await;
        reader.cancel().await?;
        let outcome = reader.join().await.unwrap();
        assert!(interrupted_by(&outcome, Interrupt::cancelled()));
        theirs.write_all(b"hello").await?;
        assert_eq!(ours.read(&mut buf).await?, 5);
        Ok(())
    });
}

/// Accepts: curio/socket/buffer_into
#[test]
fn four_megabytes_arrive_whole() {
    run(async {
        let (ours, theirs) = tcp_pair().await?;
        let sent: Vec<u8> = (0..4 << 20).map(|i: u32| (i % 251) as u8).collect();
        let writer = spawn({
            let sent = sent.clone();
            async move { theirs.write_all(&sent).await }
        });
        let mut received = vec![0; sent.len()];
        let mut done = 0;
        while done < received.len() {
            done += ours.read(&mut received[done..]).await?;
        }
        assert!(received == sent);
        assert_eq!(ours.read(&mut [0; 1]).await?, 0);
        Ok(writer.join().await.unwrap()?)
    });
}

/// Accepts: curio/socket/read_write_on_same_socket, curio/io/io_unregister, curio/io/io_waiting, trap/io_waiting,
/// sweepea-defect/S1, sweepea-defect/S2, sweepea-defect/S5
#[test]
fn one_task_reads_while_another_writes_and_each_is_woken_for_its_own() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let ours = Rc::new(ours);
        let big = vec![1; 4 << 20];
        let reader = spawn({
            let ours = ours.clone();
            async move { ours.read(&mut [0; 10]).await }
        });
        let writer = spawn({
            let (ours, big) = (ours.clone(), big.clone());
            async move { ours.write_all(&big).await }
        });
        settle().await;
        let waiting = (Some(reader.id()), Some(writer.id()));
        assert_eq!(traps::io_waiting(&*ours), waiting);
        // A second writer beside both waiters is refused, and takes nobody's place.
        let refused = ours.write(b"x").await;
        assert_eq!(busy(&refused), Some(&ResourceBusy { writing: true }));
        assert_eq!(kind(refused), io::ErrorKind::ResourceBusy);
        assert_eq!(traps::io_waiting(&*ours), waiting);

        drain(&theirs, big.len()).await?;
        writer.join().await.unwrap()?;
        settle().await;
        assert_eq!(traps::io_waiting(&*ours), (Some(reader.id()), None));
        theirs.write_all(b"hello").await?;
        assert_eq!(reader.join().await.unwrap()?, 5);
        assert_eq!(traps::io_waiting(&*ours), (None, None));
        Ok(())
    });
}

#[test]
fn who_waits_for_a_sockets_descriptor_does_not_take_its_registration_along() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let ours = Rc::new(ours);
        let reading = ours.clone();
        let reader = spawn(async move { reading.read(&mut [0; 10]).await });
        settle().await;
        traps::write_wait(&*ours).await?;
        assert_eq!(traps::io_waiting(&*ours), (Some(reader.id()), None));
        theirs.write_all(b"hello").await?;
        assert_eq!(reader.join().await.unwrap()?, 5);
        Ok(())
    });
}

/// Accepts: curio/io/double_recv
#[test]
fn a_second_reader_is_refused_and_the_first_is_served() {
    run(async {
        let (ours, theirs) = tcp_pair().await?;
        let ours = Rc::new(ours);
        let reader = spawn({
            let ours = ours.clone();
            async move { ours.read(&mut [0; 10]).await }
        });
        settle().await;
        let refused = ours.read(&mut [0; 10]).await;
        assert_eq!(busy(&refused), Some(&ResourceBusy { writing: false }));
        assert_eq!(kind(refused), io::ErrorKind::ResourceBusy);
        theirs.write_all(b"hello").await?;
        assert_eq!(reader.join().await.unwrap()?, 5);
        Ok(())
    });
}

/// Accepts: curio-old/socket/sendall_cancel
#[test]
fn an_interrupted_write_all_tells_how_many_bytes_went() {
    run_virtual(async {
        let (ours, theirs) = UnixStream::pair()?;
        let (ours, big) = (Rc::new(ours), vec![1; 4 << 20]);
        let writer = spawn({
            let (ours, big) = (ours.clone(), big.clone());
            async move { ours.write_all(&big).await }
        });
        settle().await;
        writer.cancel().await?;
        let cancelled: Result<(), Incomplete> = writer.join().await.unwrap();
        assert!(interrupted_by(&cancelled, Interrupt::cancelled()));
        let first = cancelled.unwrap_err().done;
        assert!(0 < first && first < big.len());

        assert_eq!(drain(&theirs, first).await?, first);

        // The count survives the change of interrupts at nested blocks.
        let outer = timeout_after(SECOND, async {
            let inner = timeout_after(10 * SECOND, ours.write_all(&big)).await;
            assert!(interrupted_by(&inner, Interrupt::TimeoutCancellation));
            inner
        });
        let expired = outer.await;
        assert!(is_timeout(&expired));
        let second = expired.unwrap_err().done;
        assert!(0 < second && second < big.len());
        drop(ours);
        assert_eq!(drain(&theirs, usize::MAX).await?, second);
        Ok(())
    });
}

/// Reads up to `most` bytes, or to the end, and says how many there were.
async fn drain(stream: &UnixStream, most: usize) -> io::Result<usize> {
    let (mut buf, mut done) = (vec![0; 1 << 16], 0);
    while done < most {
        match stream.read(&mut buf).await? {
            0 => break,
            read => done += read,
        }
    }
    Ok(done)
}

/// Accepts: curio/network/tcp_echo
#[test]
fn a_cancelled_server_closes_its_clients() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let server = spawn(async move {
            let mut clients = Vec::new();
            let stopped = loop {
                match listener.accept().await {
                    Ok((client, _)) => clients.push(spawn(async move {
                        let mut buf = [0; 100];
                        loop {
                            match client.read(&mut buf).await? {
                                0 => return io::Result::Ok(()),
                                read => client.write_all(&buf[..read]).await?,
                            }
                        }
                    })),
                    Err(error) => break error,
                }
            };
            for client in &clients {
                client.cancel().await.unwrap();
            }
            stopped
        });
        let client = TcpStream::connect(address).await?;
        client.write_all(b"hello").await?;
        let mut buf = [0; 100];
        assert_eq!(client.read(&mut buf).await?, 5);
        server.cancel().await?;
        let stopped = server.join().await.unwrap();
        assert_eq!(stopped.interrupt(), Some(&Interrupt::cancelled()));
        assert_eq!(client.read(&mut buf).await?, 0);
        Ok(())
    });
}

/// Accepts: curio/network/unix_echo
#[test]
fn an_echo_over_a_unix_socket() {
    let path = std::env::temp_dir().join(format!("kernel-io-{}.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    run(async {
        let listener = UnixListener::bind(&path)?;
        let server = spawn(async move {
            let client = listener.accept().await?;
            let mut buf = [0; 100];
            let read = client.read(&mut buf).await?;
            Ok(client.write_all(&buf[..read]).await?)
        });
        let client = UnixStream::connect(&path).await?;
        client.write_all(b"hello").await?;
        let mut buf = [0; 100];
        assert_eq!(client.peek(&mut buf).await?, 5);
        assert_eq!(client.read(&mut buf).await?, 5);
        assert_eq!(client.read(&mut buf).await?, 0);
        let again = UnixListener::bind(&path).unwrap_err().to_string();
        assert!(again.contains(path.to_str().unwrap()), "{again}");
        server.join().await.unwrap()
    });
    std::fs::remove_file(&path).unwrap();
}

/// Accepts: curio-old/network/create_bad_connection
#[test]
fn a_connection_that_is_refused_says_to_where() {
    run(async {
        // The port of a client: taken, so that no other test listens there, and nobody does.
        let (client, _server) = tcp_pair().await?;
        let address = client.local_addr()?;
        let error = TcpStream::connect(address).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(error.to_string().contains(&address.to_string()), "{error}");
        Ok(())
    });
}

/// Accepts: curio/socket/create_connection
#[test]
fn a_connection_by_name_and_one_from_an_address_of_choice() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        TcpStream::connect(("localhost", address.port())).await?;
        listener.accept().await?;
        TcpStream::connect(address.to_string()).await?;
        listener.accept().await?;

        let source = "127.0.0.2:0".parse().unwrap();
        let client = TcpStream::connect_from(source, address).await?;
        let (_, peer) = listener.accept().await?;
        assert_eq!(peer, client.local_addr()?);
        assert_eq!(peer.ip(), source.ip());
        Ok(())
    });
}

#[test]
fn a_shut_down_direction_ends_and_the_other_goes_on() {
    run(async {
        let (ours, theirs) = tcp_pair().await?;
        ours.write_all(b"last").await?;
        ours.shutdown(Shutdown::Write)?;
        let mut buf = [0; 100];
        assert_eq!(theirs.peek(&mut buf).await?, 4);
        assert_eq!(theirs.read(&mut buf).await?, 4);
        assert_eq!(theirs.read(&mut buf).await?, 0);
        theirs.write_all(b"answer").await?;
        assert_eq!(ours.read(&mut buf).await?, 6);
        assert_eq!(kind(ours.write(b"x").await), io::ErrorKind::BrokenPipe);
        Ok(())
    });
}

/// Accepts: sweepea-defect/S4
#[test]
fn a_reset_reaches_both_waiters_and_the_kernel_goes_on() {
    run(async {
        let (ours, theirs) = tcp_pair().await?;
        let ours = Rc::new(ours);
        let reader = spawn({
            let ours = ours.clone();
            async move { ours.read(&mut [0; 10]).await }
        });
        let writer = spawn({
            let ours = ours.clone();
            async move {
                let big = vec![0; 64 << 20];
                ours.write_all(&big).await
            }
        });
        settle().await;
        // Closed with unread data: a reset.
        drop(theirs);
        let lost = kind(reader.join().await.unwrap());
        let write_lost = writer.join().await.unwrap().unwrap_err().error.kind();
        let errors = [lost, write_lost];
        assert!(
            errors.contains(&io::ErrorKind::ConnectionReset),
            "{errors:?}"
        );
        sleep(Duration::from_millis(1)).await?;
        Ok(())
    });
}

/// Accepts: sweepea-defect/S3
#[test]
fn a_task_reads_and_then_sleeps_and_joins() {
    run(async {
        let (ours, theirs) = tcp_pair().await?;
        let reader = spawn(async move {
            let mut buf = [0; 10];
            let first = ours.read(&mut buf).await?;
            sleep(Duration::from_millis(1)).await?;
            let second = spawn(async move { ours.read(&mut [0; 10]).await });
            Ok((first, second.join().await.unwrap()?))
        });
        settle().await;
        theirs.write_all(b"one").await?;
        sleep(Duration::from_millis(2)).await?;
        theirs.write_all(b"three").await?;
        let read: io::Result<_> = reader.join().await.unwrap();
        assert_eq!(read?, (3, 5));
        Ok(())
    });
}

/// Accepts: sweepea-defect/S6
#[test]
fn readiness_of_a_closed_socket_does_not_reach_its_successor() {
    run_virtual(async {
        let (ours, theirs) = UnixStream::pair()?;
        let number = ours.as_fd().as_raw_fd();
        // The poller goes on telling about a duplicate unless it was told to stop.
        let _duplicate = ours.as_fd().try_clone_to_owned()?;
        let waiter = spawn(async move { ours.read(&mut [0; 10]).await });
        settle().await;
        theirs.write_all(b"for the first").await?;
        // Closes the descriptor, whose event the poller has ready, and opens another of the same number.
        waiter.abort();
        let (mut next, mut other) = UnixStream::pair()?;
        if other.as_fd().as_raw_fd() == number {
            std::mem::swap(&mut next, &mut other);
        }
        let late = timeout_after(SECOND, next.read(&mut [0; 10])).await;
        assert!(is_timeout(&late), "{late:?}");
        Ok(())
    });
}

/// A descriptor of each kind that can be read from, with something to read.
fn readable() -> io::Result<Vec<OwnedFd>> {
    let (mut pipe, unix) = (io::pipe()?, unix::UnixStream::pair()?);
    pipe.1.write_all(b"xx")?;
    (&unix.1).write_all(b"xx")?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let mut tcp = std::net::TcpStream::connect(listener.local_addr()?)?;
    let accepted = listener.accept()?.0;
    tcp.write_all(b"xx")?;
    let udp = std::net::UdpSocket::bind("127.0.0.1:0")?;
    udp.send_to(b"xx", udp.local_addr()?)?;
    // The writing ends are closed but for what is sent.
    Ok(vec![
        pipe.0.into(),
        unix.0.into(),
        accepted.into(),
        udp.into(),
    ])
}

/// Accepts: trap/read_wait
#[test]
fn read_wait_answers_although_the_edge_is_spent() {
    run(async {
        for fd in readable()? {
            // Nobody reads in between, so the poller has nothing new to tell.
            for _ in 0..3 {
                traps::read_wait(&fd).await?;
            }
        }
        Ok(())
    });
}

/// Accepts: sweepea-defect/S19
#[test]
fn a_bare_descriptor_is_asked_about_anew_for_every_wait() {
    run_virtual(async {
        let (first, mut peer) = unix::UnixStream::pair()?;
        let mut bare = OwnedFd::from(first);
        peer.write_all(b"x")?;
        traps::read_wait(&bare).await?;
        // Another connection gets the number.
        let (next, mut peer) = unix::UnixStream::pair()?;
        rustix::io::dup2(&next, &mut bare)?;
        let late = timeout_after(SECOND, traps::read_wait(&bare)).await;
        assert!(is_timeout(&late), "{late:?}");
        peer.write_all(b"x")?;
        traps::read_wait(&bare).await
    });
}

/// Accepts: trap/write_wait
#[test]
fn write_wait_answers_when_there_is_room() {
    run_virtual(async {
        let (ours, theirs) = unix::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        traps::write_wait(&ours).await?;
        while (&ours).write(&[0; 1 << 14]).is_ok() {}
        let late = timeout_after(SECOND, traps::write_wait(&ours)).await;
        assert!(is_timeout(&late), "{late:?}");
        while (&theirs).read(&mut [0; 1 << 14]).is_ok() {}
        traps::write_wait(&ours).await
    });
}

/// Accepts: trap/io_release, curio-defect/C4
#[test]
fn whoever_waits_for_a_released_source_is_told() {
    run(async {
        let (ours, _theirs) = UnixStream::pair()?;
        let ours = Rc::new(ours);
        let reader = spawn({
            let ours = ours.clone();
            async move { ours.read(&mut [0; 10]).await }
        });
        let (bare, _other) = io::pipe()?;
        let bare = Rc::new(bare);
        let waiter = spawn({
            let bare = bare.clone();
            async move { traps::read_wait(&*bare).await }
        });
        settle().await;
        traps::io_release(&*ours);
        traps::io_release(&*bare);
        for outcome in [
            reader.join().await.unwrap().map(drop),
            waiter.join().await.unwrap(),
        ] {
            assert_eq!(kind(outcome), io::ErrorKind::NotConnected);
        }
        assert_eq!(traps::io_waiting(&*ours), (None, None));
        Ok(())
    });
}

#[test]
fn the_dump_names_the_line_that_waits_in_a_write_all() {
    run(async {
        let (ours, _theirs) = UnixStream::pair()?;
        let writer = spawn(async move { ours.write_all(&vec![0; 4 << 20]).await });
        let line = line!() - 1;
        settle().await;
        let info = writer.info().unwrap().to_string();
        let at = format!("kernel_io.rs:{line}");
        assert!(
            info.matches(&at).count() == 2,
            "spawned and waiting at {at}: {info}"
        );
        writer.abort();
        Ok(())
    });
}

/// Accepts: curio/socket/udp_echo
#[test]
fn an_echo_over_udp() {
    run(async {
        let server = UdpSocket::bind("127.0.0.1:0")?;
        let address = server.local_addr()?;
        let echo = spawn(async move {
            let mut buf = [0; 100];
            let (length, peer) = server.recv_from(&mut buf).await?;
            server.send_to(&buf[..length], peer).await
        });
        settle().await;
        let client = UdpSocket::bind("127.0.0.1:0")?;
        client.connect(address)?;
        assert_eq!(client.send(b"hello").await?, 5);
        let mut buf = [0; 100];
        assert_eq!(client.recv(&mut buf).await?, 5);
        assert_eq!(&buf[..5], b"hello");
        assert_eq!(echo.join().await.unwrap()?, 5);

        // Two that came together are two reads, although both were shorter than the buffer.
        let other = UdpSocket::bind("127.0.0.1:0")?;
        let server = UdpSocket::bind("127.0.0.1:0")?;
        let late = timeout_after(Duration::from_millis(1), server.recv_from(&mut buf)).await;
        assert!(is_timeout(&late));
        for word in ["one", "three"] {
            other.send_to(word.as_bytes(), server.local_addr()?).await?;
        }
        assert_eq!(server.recv_from(&mut buf).await?.0, 3);
        assert_eq!(server.recv_from(&mut buf).await?.0, 5);
        Ok(())
    });
}

/// Accepts: curio/socket/recvfrom_timeout, curio/socket/recvfrom_cancel
#[test]
fn recv_from_can_be_interrupted_and_called_again() {
    run_virtual(async {
        let socket = Rc::new(UdpSocket::bind("127.0.0.1:0")?);
        let late = timeout_after(SECOND, socket.recv_from(&mut [0; 10])).await;
        assert!(is_timeout(&late));
        let receiver = spawn({
            let socket = socket.clone();
            async move { socket.recv_from(&mut [0; 10]).await }
        });
        settle().await;
        receiver.cancel().await?;
        let outcome = receiver.join().await.unwrap();
        assert!(interrupted_by(&outcome, Interrupt::cancelled()));
        let itself = socket.local_addr()?;
        socket.send_to(b"hello", itself).await?;
        assert_eq!(socket.recv_from(&mut [0; 10]).await?, (5, itself));
        Ok(())
    });
}

const LIMIT: usize = 1 << 20;

/// Accepts: curio/io/readline, curio/io/read_partial, curio/io/readall, curio/io/readall_partial, curio/io/readlines, curio/io/iterline
#[test]
fn lines_and_the_rest_come_from_one_buffer() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let mut stream = Stream::new(ours);
        let text: String = (1..=2_000).map(|i| format!("line {i}\n")).collect();
        let writer = spawn({
            let text = text.clone();
            async move { theirs.write_all((text + "rest").as_bytes()).await }
        });
        assert_eq!(stream.read_line(LIMIT).await?, b"line 1\n");
        let mut buf = [0; 3];
        assert_eq!(stream.read(&mut buf).await?, 3);
        assert_eq!(&buf, b"lin");
        let mut lines = String::from("line 1\nlin");
        for _ in 2..=1_000 {
            lines += str::from_utf8(&stream.read_line(LIMIT).await?).unwrap();
        }
        lines += str::from_utf8(&stream.read_to_end(LIMIT).await?).unwrap();
        assert_eq!(lines, text + "rest");
        assert_eq!(stream.read_line(LIMIT).await?, b"");
        assert_eq!(stream.read(&mut buf).await?, 0);
        Ok(writer.join().await.unwrap()?)
    });
}

/// Accepts: curio/io/read_exactly, curio/io/read_exactly_incomplete, curio/socket/buffer_stream_into
#[test]
fn read_exact_is_all_or_tells_what_there_was() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let mut stream = Stream::new(ours);
        let big: Vec<u8> = (0..4 << 20).map(|i: u32| (i % 251) as u8).collect();
        let writer = spawn({
            let big = big.clone();
            async move {
                theirs.write_all(b"header\n").await?;
                theirs.write_all(&big).await?;
                theirs.write_all(b"partial").await
            }
        });
        assert_eq!(stream.read_line(LIMIT).await?, b"header\n");
        let mut buf = vec![0; big.len()];
        stream.read_exact(&mut buf).await?;
        assert!(buf == big);
        let short = stream.read_exact(&mut buf).await.unwrap_err();
        assert_eq!(short.error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(short.done, 7);
        assert_eq!(stream.buffered(), b"partial");
        Ok(writer.join().await.unwrap()?)
    });
}

/// Accepts: curio/io/read_exactly_timeout, curio/io/readall_timeout, curio/io/readlines_timeout
#[test]
fn an_interrupted_read_keeps_what_came_and_goes_on_from_there() {
    run_virtual(async {
        let (ours, theirs) = UnixStream::pair()?;
        let mut stream = Stream::new(ours);
        let mut buf = [0; 10];
        theirs.write_all(b"hello").await?;
        let late = timeout_after(SECOND, stream.read_exact(&mut buf)).await;
        assert!(is_timeout(&late));
        assert_eq!(late.unwrap_err().done, 5);
        theirs.write_all(b"world").await?;
        stream.read_exact(&mut buf).await?;
        assert_eq!(&buf, b"helloworld");

        theirs.write_all(b"first\nsec").await?;
        let mut lines = Vec::new();
        let late: Result<(), Incomplete> = timeout_after(SECOND, async {
            loop {
                lines.push(stream.read_line(LIMIT).await?);
            }
        })
        .await;
        assert!(is_timeout(&late));
        assert_eq!(lines, [b"first\n"]);

        // Dropped instead of interrupted: the same.
        let dropped = kernel::drop_after(SECOND, stream.read_to_end(LIMIT)).await;
        assert!(dropped.is_none());
        let late = timeout_after(SECOND, stream.read_to_end(LIMIT)).await;
        assert_eq!(late.unwrap_err().done, 3);
        theirs.write_all(b"ond").await?;
        drop(theirs);
        assert_eq!(stream.read_to_end(LIMIT).await?, b"second");
        Ok(())
    });
}

#[test]
fn a_peer_that_sends_no_end_is_bounded() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let mut stream = Stream::new(ours);
        theirs.write_all(&[b'x'; 50_000]).await?;
        let endless = stream.read_line(20_000).await.unwrap_err();
        assert_eq!(endless.error.kind(), io::ErrorKind::InvalidData);
        assert!(endless.done < 50_000, "{}", endless.done);
        drop(theirs);
        // Also where the limit is what the buffer has room for.
        let full = stream.read_to_end(1 << 15).await.unwrap_err();
        assert_eq!(full.error.kind(), io::ErrorKind::FileTooLarge);
        let large = stream.read_to_end(30_000).await.unwrap_err();
        assert_eq!(large.error.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(stream.read_to_end(50_000).await?.len(), 50_000);
        Ok(())
    });
}

/// Accepts: curio/io/writelines, curio/io/write_timeout, curio/io/writelines_timeout
#[test]
fn an_interrupted_write_tells_how_much_the_peer_gets() {
    run_virtual(async {
        let (ours, theirs) = UnixStream::pair()?;
        let stream = Stream::new(ours);
        let line = [b'x'; 1000];
        let (mut lines, mut sent) = (0, 0);
        let late: Result<(), Incomplete> = timeout_after(SECOND, async {
            loop {
                stream.write_all(&line).await?;
                (lines, sent) = (lines + 1, sent + line.len());
            }
        })
        .await;
        assert!(is_timeout(&late));
        assert!(lines > 0);
        sent += late.unwrap_err().done;
        drop(stream);
        let received = Stream::new(theirs).read_to_end(1 << 30).await?;
        assert_eq!(received.len(), sent);
        Ok(())
    });
}

/// Accepts: curio/io/socketstream_blocking, curio/io/socketstream_bad_blocking
#[test]
fn a_stream_is_taken_apart_with_what_it_has_buffered() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let mut stream = Stream::new(ours);
        theirs.write_all(b"line\nrest").await?;
        stream.read_line(LIMIT).await?;
        let (connection, rest) = stream.into_parts();
        assert_eq!(rest, b"rest");
        let mut lent = connection.into_std()?;
        let reader = thread::spawn(move || {
            let mut buf = [0; 5];
            lent.read_exact(&mut buf).map(|()| buf)
        });
        theirs.write_all(b"hello").await?;
        assert_eq!(&reader.join().unwrap()?, b"hello");
        Ok(())
    });
}

fn raise(signal: &str) {
    let pid = std::process::id().to_string();
    let kill = std::process::Command::new("kill")
        .args([signal, &pid])
        .status();
    assert!(kill.unwrap().success());
}

/// Accepts: curio-old/signal/task_signal, curio-old/signal/task_signal_timeout
#[test]
fn signals_reach_a_queue_one_by_one() {
    run(async {
        let signals = SignalQueue::new(&[signal::SIGUSR1, signal::SIGUSR2])?;
        for (name, number) in [
            ("-USR1", signal::SIGUSR1),
            ("-USR2", signal::SIGUSR2),
            ("-USR1", signal::SIGUSR1),
        ] {
            let late = timeout_after(Duration::from_millis(5), signals.next()).await;
            assert!(is_timeout(&late));
            raise(name);
            assert_eq!(signals.next().await?, number);
        }
        assert_eq!(signals.try_next(), None);
        Ok(())
    });
}

#[test]
fn every_queue_of_every_kernel_gets_the_signal() {
    let ready = Barrier::new(3);
    thread::scope(|scope| {
        let watch = || {
            run(async {
                let queues = [
                    SignalQueue::new(&[signal::SIGWINCH])?,
                    SignalQueue::new(&[signal::SIGWINCH])?,
                ];
                ready.wait();
                for queue in &queues {
                    assert_eq!(queue.next().await?, signal::SIGWINCH);
                }
                Ok(())
            });
        };
        let threads = [scope.spawn(watch), scope.spawn(watch)];
        ready.wait();
        raise("-WINCH");
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// Accepts: curio-old/signal/task_signal_event
#[test]
fn a_signal_event_wakes_everybody_and_stays_set() {
    run(async {
        let event = Rc::new(SignalEvent::new(&[signal::SIGHUP])?);
        let waiters = [(); 3].map(|()| {
            let event = event.clone();
            spawn(async move { event.wait().await })
        });
        settle().await;
        assert!(!event.is_set());
        raise("-HUP");
        for waiter in waiters {
            waiter.join().await.unwrap()?;
        }
        event.wait().await?;
        event.clear();
        assert!(!event.is_set());
        let late = timeout_after(Duration::from_millis(5), event.wait()).await;
        assert!(is_timeout(&late));
        Ok(())
    });
}

#[test]
fn a_signal_event_that_is_dropped_leaves_no_task() {
    let mut kernel = kernel::Kernel::new().unwrap();
    let main = async {
        let event = SignalEvent::new(&[signal::SIGUSR2]).unwrap();
        let late = timeout_after(Duration::from_millis(1), event.wait()).await;
        assert!(is_timeout(&late));
        drop(event);
        yield_now().await.unwrap();
    };
    kernel.run(main).unwrap();
    assert!(kernel.tasks().is_empty(), "{:?}", kernel.tasks());
}

#[test]
fn a_signal_nobody_can_handle_is_refused() {
    for number in [signal::SIGKILL, signal::SIGSEGV, 0, -1] {
        let refused = kernel::run(async move { SignalQueue::new(&[number]) }).unwrap();
        assert_eq!(kind(refused), io::ErrorKind::InvalidInput);
    }
}

/// Runs in a process of its own, see below.
#[test]
#[ignore = "sends itself a signal that may end it"]
fn signal_after_the_last_queue() {
    run(async {
        let signals = SignalQueue::new(&[signal::SIGUSR1])?;
        drop(SignalQueue::new(&[signal::SIGUSR1])?);
        raise("-USR1");
        assert_eq!(signals.next().await?, signal::SIGUSR1);
        drop(signals);
        raise("-USR1");
        Ok(())
    });
}

#[test]
fn the_old_action_of_a_signal_returns_with_the_last_queue() {
    let test = "kernel_io::signal_after_the_last_queue --ignored --exact";
    let itself = std::env::current_exe().unwrap();
    let run_with = |trap: &str| {
        let script = format!("{trap} exec \"$0\" {test}");
        let mut child = std::process::Command::new("sh");
        child.args(["-c", &script]).arg(&itself);
        child.output().unwrap().status
    };
    assert_eq!(run_with("").signal(), Some(signal::SIGUSR1));
    assert!(run_with("trap '' USR1;").success());
}

/// Accepts: curio-old/subprocess/simple, curio-old/subprocess/simple_check_output
#[test]
fn the_output_of_a_command_is_collected() {
    run(async {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2"]);
        for output in [command.output(b"").await?, command.check_output(b"").await?] {
            assert!(output.status.success());
            assert_eq!(output.stdout, b"out\n");
            assert_eq!(output.stderr, b"err\n");
        }
        Ok(())
    });
}

/// Accepts: curio-old/subprocess/bad_cmd, curio-old/subprocess/bad_cmd_check_output
#[test]
fn a_command_that_fails_tells_its_status_and_one_that_is_not_there_its_name() {
    run(async {
        let mut command = Command::new("sh");
        command.args(["-c", "echo why; exit 3"]);
        assert_eq!(command.output(b"").await?.status.code(), Some(3));
        let failed = match command.check_output(b"").await {
            Err(ProcessError::Failed(output)) => output,
            outcome => panic!("{outcome:?}"),
        };
        assert_eq!(failed.status.code(), Some(3));
        assert_eq!(failed.stdout, b"why\n");
        let talkative = Command::new("sh")
            .args(["-c", "printf '%01000d' 0 >&2; false"])
            .check_output(b"")
            .await;
        let text = talkative.unwrap_err().to_string();
        assert!(text.ends_with(&format!(": {}", "0".repeat(400))), "{text}");

        let missing = Command::new("/no/such/program").spawn().unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(
            missing.to_string().contains("/no/such/program"),
            "{missing}"
        );
        Ok(())
    });
}

fn exists(pid: &str) -> bool {
    Path::new("/proc").join(pid.trim()).exists()
}

const TELL_AND_WAIT: &str = "echo $$; exec sleep 1000";

/// Accepts: curio-old/subprocess/timeout
#[test]
fn a_timeout_kills_and_reaps_the_child() {
    run(async {
        let mut patience = Duration::from_millis(50);
        loop {
            let mut command = Command::new("sh");
            command.args(["-c", TELL_AND_WAIT]);
            let late = timeout_after(patience, command.output(b"")).await;
            assert!(is_timeout(&late));
            let Err(ProcessError::Stopped { stdout, .. }) = late else {
                panic!("{late:?}");
            };
            // A busy machine may not have come to the first line.
            if let Ok(pid) = str::from_utf8(&stdout)
                && !pid.is_empty()
            {
                assert!(!exists(pid), "{pid}");
                return Ok(());
            }
            patience *= 2;
        }
    });
}

/// Accepts: curio-old/subprocess/no_input_cancel
#[test]
fn a_cancelled_communicate_kills_reaps_and_keeps_the_output() {
    run(async {
        let mut command = Command::new("sh");
        command.args(["-c", "echo early; read line; exec sleep 1000"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn()?;
        let pid = child.id().to_string();
        let output = child.stdout.as_ref().unwrap();
        traps::read_wait(output).await?;
        let task = spawn(async move { child.communicate(b"line\n").await });
        settle().await;
        task.cancel().await?;
        let cancelled = task.join().await.unwrap();
        assert!(interrupted_by(&cancelled, Interrupt::cancelled()));
        let Err(ProcessError::Stopped { stdout, .. }) = cancelled else {
            panic!("{cancelled:?}");
        };
        assert_eq!(stdout, b"early\n");
        assert!(!exists(&pid));
        Ok(())
    });
}

/// Accepts: curio-old/subprocess/stdin_pipe, curio-old/subprocess/check_output_stdin
#[test]
fn a_child_answers_what_it_is_told() {
    run(async {
        let mut cat = Command::new("cat");
        let mut child = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut buf = [0; 100];
        for word in ["hello", "again"] {
            stdin.write_all(word.as_bytes()).await?;
            let read = stdout.read(&mut buf).await?;
            assert_eq!(&buf[..read], word.as_bytes());
        }
        drop(stdin);
        assert_eq!(stdout.read(&mut buf).await?, 0);
        assert!(child.wait().await?.success());

        let megabyte = vec![b'x'; 1 << 20];
        let echoed = cat.check_output(&megabyte).await?;
        assert!(echoed.stdout == megabyte);
        Ok(())
    });
}

/// Accepts: curio-old/subprocess/popen_join
#[test]
fn children_are_waited_for_each_for_itself() {
    run(async {
        let mut command = Command::new("sh");
        let quick = command.args(["-c", "exit 7"]).spawn()?;
        let slow = Command::new("sleep").arg("1000").spawn()?;
        let slow = Rc::new(slow);
        let waiter = spawn({
            let slow = slow.clone();
            async move { slow.wait().await }
        });
        assert_eq!(quick.wait().await?.code(), Some(7));
        assert_eq!(quick.wait().await?.code(), Some(7));
        assert_eq!(kind(quick.signal(signal::SIGTERM)), io::ErrorKind::NotFound);
        settle().await;
        assert!(slow.try_wait()?.is_none());
        assert!(!waiter.is_terminated());
        slow.signal(signal::SIGTERM)?;
        let status = waiter.join().await.unwrap()?;
        assert_eq!(status.signal(), Some(signal::SIGTERM));
        Ok(())
    });
}

/// Accepts: curio-old/subprocess/io_error
#[test]
fn writing_to_a_child_that_reads_no_more_is_an_error() {
    run(async {
        let mut command = Command::new("true");
        let child = command.stdin(Stdio::piped()).spawn()?;
        child.wait().await?;
        let stdin = child.stdin.as_ref().unwrap();
        // A child that another test is about to start has the pipe's other end too, until its exec.
        let error = loop {
            if let Err(error) = stdin.write_all(b"anybody?").await {
                break error;
            }
            sleep(Duration::from_millis(1)).await?;
        };
        assert_eq!(error.error.kind(), io::ErrorKind::BrokenPipe);
        // To communicate it is none: the child chose not to read.
        let output = command.output(&vec![0; 1 << 20]).await?;
        assert!(output.status.success());
        Ok(())
    });
}

#[test]
fn a_communicate_that_is_dropped_takes_the_child_with_it() {
    run(async {
        let child = Command::new("sleep").arg("1000").spawn()?;
        let pid = child.id().to_string();
        let talk = spawn(async move { child.communicate(b"").await });
        settle().await;
        assert!(exists(&pid));
        talk.abort();
        while exists(&pid) {
            sleep(Duration::from_millis(1)).await?;
            // Starting another reaps what has ended.
            Command::new("true").spawn()?.wait().await?;
        }
        Ok(())
    });
}

#[test]
fn a_dropped_child_goes_on_or_is_killed_as_asked() {
    run(async {
        let mut command = Command::new("sleep");
        let spared = command.arg("1000").spawn()?;
        let killed = command.kill_on_drop(true).spawn()?;
        let (spared_pid, killed_pid) = (spared.id().to_string(), killed.id().to_string());
        drop((spared, killed));
        while exists(&killed_pid) {
            sleep(Duration::from_millis(1)).await?;
            // Starting another reaps what has ended.
            Command::new("true").spawn()?.wait().await?;
        }
        assert!(exists(&spared_pid));
        let mut kill = Command::new("kill");
        kill.args(["-KILL", &spared_pid]).check_output(b"").await?;
        Ok(())
    });
}

// ---- buffers, connections and signals at their limits

/// Takes nothing of what is written to it.
struct Deaf(unix::UnixStream);

impl AsFd for Deaf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl io::Write for &Deaf {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_connection_that_takes_nothing_is_an_error_and_no_endless_loop() {
    run(async {
        let deaf = || Io::from_std(Deaf(unix::UnixStream::pair()?.0));
        let of_io = deaf()?.write_all(b"moon").await.unwrap_err();
        let of_stream = Stream::new(deaf()?).write_all(b"moon").await.unwrap_err();
        let of_messages = Connection::new(deaf()?).send(b"moon").await.unwrap_err();
        for Incomplete { done, error } in [of_io, of_stream, of_messages] {
            assert_eq!((done, error.kind()), (0, io::ErrorKind::WriteZero));
        }
        Ok(())
    });
}

/// What is left of one filling of the buffer is moved before the next.
#[test]
fn lines_across_the_ends_of_the_buffer_come_whole() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let writer = spawn(async move {
            let text: String = (0..10_000).map(|line| format!("line {line}\n")).collect();
            theirs.write_all(text.as_bytes()).await
        });
        let mut lines = Stream::new(ours);
        for line in 0..10_000 {
            assert_eq!(
                lines.read_until(b'\n', 100).await?,
                format!("line {line}\n").as_bytes()
            );
        }
        Ok(writer.join().await.unwrap()?)
    });
}

#[test]
fn an_interrupted_read_of_a_stream_is_no_end() {
    run(async {
        let (ours, _theirs) = UnixStream::pair()?;
        let mut stream = Stream::new(ours);
        for length in [1, 1 << 16] {
            let late =
                timeout_after(Duration::from_millis(1), stream.read(&mut vec![0; length])).await;
            assert!(is_timeout(&late), "{late:?}");
        }
        Ok(())
    });
}

#[test]
fn a_wait_for_several_buffers_is_for_the_direction_that_it_needs() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let (ours, theirs) = (Rc::new(ours), Rc::new(theirs));
        let reader = spawn({
            let ours = Rc::clone(&ours);
            async move {
                let (mut one, mut two) = ([0; 1], [0; 8]);
                let mut both = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
                let read = ours.read_vectored(&mut both).await?;
                io::Result::Ok([&one[..], &two[..read - 1]].concat())
            }
        });
        let full = timeout_after(Duration::ZERO, ours.write_all(&vec![7; 1 << 20])).await;
        assert!(is_timeout(&full));
        let writer = spawn({
            let ours = Rc::clone(&ours);
            async move { ours.write_vectored(&[IoSlice::new(b"late")]).await }
        });
        settle().await;
        let waits = |task: &TaskRef| task.info().unwrap().waits[0].0;
        assert_eq!(waits(&reader), WaitKind::Read);
        assert_eq!(waits(&writer), WaitKind::Write);
        theirs.write_all(b"moon").await?;
        assert_eq!(reader.join().await.unwrap()?, b"moon");
        writer.cancel().await?;
        let peeker = spawn(async move { ours.peek(&mut [0]).await });
        settle().await;
        assert_eq!(waits(&peeker), WaitKind::Read);
        peeker.cancel().await?;
        Ok(())
    });
}

#[test]
fn several_buffers_are_filled_from_what_is_buffered_and_then_from_the_connection() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.write_all(b"line\nabcdef").await?;
        let mut stream = Stream::new(ours);
        assert_eq!(stream.read_line(100).await?, b"line\n");
        let mut ours = Polled::from(stream);
        let (mut one, mut two) = ([0; 2], [0; 8]);
        let mut both = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
        assert_eq!(ours.read_vectored(&mut both).await?, 6);
        assert_eq!((&one, &two[..4]), (b"ab", &b"cdef"[..]));
        let reader = spawn(async move {
            let (mut one, mut two) = ([0; 2], [0; 8]);
            let mut both = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
            let read = ours.read_vectored(&mut both).await?;
            io::Result::Ok((read, one, two))
        });
        settle().await;
        assert_eq!(reader.info().unwrap().waits[0].0, WaitKind::Read);
        theirs.write_all(b"ghi").await?;
        assert_eq!(
            reader.join().await.unwrap()?,
            (3, *b"gh", *b"i\0\0\0\0\0\0\0")
        );
        Ok(())
    });
}

/// Has no way of its own to read into several buffers.
struct Plain(UnixStream);
impl PollRead for Plain {
    fn poll_read(
        &self,
        places: &mut Places,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        assert!(!buf.is_empty(), "nothing can be read into this");
        self.0.poll_read(places, cx, buf)
    }
}

#[test]
fn the_first_buffer_with_room_is_read_into_where_there_is_no_other_way() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.write_all(b"moon").await?;
        let (mut one, mut two) = ([0; 0], [0; 8]);
        let mut both = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
        assert_eq!(Polled::new(Plain(ours)).read_vectored(&mut both).await?, 4);
        assert_eq!(&two[..4], b"moon");
        Ok(())
    });
}

#[test]
fn a_connection_from_an_address_of_choice_that_fails_names_both_ends() {
    run(async {
        let nobody = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let local = "127.0.0.1:0".parse().unwrap();
        let refused = TcpStream::connect_from(local, nobody).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let text = refused.to_string();
        assert!(
            text.contains(&local.to_string()) && text.contains(&nobody.to_string()),
            "{text}"
        );
        Ok(())
    });
}

// io
#[test]
fn a_port_can_be_listened_on_again_at_once() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let client = TcpStream::connect(address).await?;
        // Who closes first keeps the connection for a minute.
        drop(listener.accept().await?);
        assert_eq!(client.read(&mut [0]).await?, 0);
        drop((client, listener));
        TcpListener::bind(address)?;
        Ok(())
    });
}

#[test]
fn a_connection_to_a_unix_server_that_lets_nobody_in_can_be_interrupted() {
    run(async {
        let path = std::env::temp_dir().join(unique("kernel-full"));
        let _listener = Server::new().backlog(0).unix_socket(&path)?;
        let mut crowd = Vec::new();
        let late = loop {
            match timeout_after(Duration::from_millis(20), UnixStream::connect(&path)).await {
                Ok(stream) => crowd.push(stream),
                late => break late,
            }
        };
        assert!(is_timeout(&late), "{late:?}");
        std::fs::remove_file(path)
    });
}

#[test]
fn a_signal_event_needs_nobody_who_waits_to_be_set() {
    run(async {
        let event = SignalEvent::new(&[signal::SIGURG])?;
        assert!(!event.is_set());
        for _ in 0..2 {
            raise("-URG");
            while !event.is_set() {
                sleep(Duration::from_millis(1)).await?;
            }
            assert!(event.is_set());
            event.clear();
            assert!(!event.is_set());
        }
        Ok(())
    });
}

#[test]
fn a_number_that_is_no_signal_is_refused() {
    run(async {
        let child = Command::new("sleep")
            .arg("1000")
            .kill_on_drop(true)
            .spawn()?;
        for number in [0, -1, 1000] {
            assert_eq!(kind(child.signal(number)), io::ErrorKind::InvalidInput);
        }
        assert_eq!(child.try_wait()?, None);
        Ok(())
    });
}

// ---- channels

// ---- channel
#[test]
fn a_message_that_nobody_can_receive_is_not_sent() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let (mut ours, mut theirs) = (Connection::new(ours), Connection::new(theirs));
        // Nobody touches its pages.
        let refused = ours.send(&vec![0; 1 << 31]).await.unwrap_err();
        assert_eq!(
            (refused.done, refused.error.kind()),
            (0, io::ErrorKind::InvalidInput)
        );
        ours.send(b"moon").await?;
        assert_eq!(theirs.recv(4).await?, b"moon");
        Ok(())
    });
}

#[test]
fn a_peer_that_goes_within_a_message_that_is_skipped_is_missed() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.write_all(&[0, 0, 0, 9, b'm', b'o']).await?;
        drop(theirs);
        let mut ours = Connection::new(ours);
        assert_eq!(kind(ours.recv(8).await), io::ErrorKind::FileTooLarge);
        for _ in 0..2 {
            assert_eq!(kind(ours.recv(8).await), io::ErrorKind::UnexpectedEof);
        }
        Ok(())
    });
}

/// Until a peer has proved that it knows the key, it cannot make us hold more than a few bytes.
#[test]
fn a_peer_without_the_key_cannot_send_long_messages() {
    run(async {
        for (length, expected) in [
            (256, io::ErrorKind::PermissionDenied),
            (257, io::ErrorKind::FileTooLarge),
        ] {
            let long = vec![b'x'; length];
            let pair = || UnixStream::pair().map(|(a, b)| (Connection::new(a), Connection::new(b)));
            let (mut ours, mut theirs) = pair()?;
            theirs.send(&long).await?;
            assert_eq!(kind(ours.authenticate_server(b"key").await), expected);
            let (mut ours, mut theirs) = pair()?;
            theirs.send(&long).await?;
            assert_eq!(kind(ours.authenticate_client(b"key").await), expected);
            let (mut ours, mut theirs) = pair()?;
            theirs.send(b"#CHALLENGE#nonce").await?;
            theirs.send(&long).await?;
            assert_eq!(kind(ours.authenticate_client(b"key").await), expected);
        }
        Ok(())
    });
}

// ---- files

fn pipe_with(bytes: &[u8]) -> io::Result<(File, io::PipeWriter)> {
    let (reader, mut writer) = io::pipe()?;
    writer.write_all(bytes)?;
    Ok((std::fs::File::from(OwnedFd::from(reader)).into(), writer))
}

#[test]
fn a_file_that_is_no_text_is_an_error_for_those_who_want_text() {
    run(async {
        let text = b"moon\n\xff\n";
        let (mut file, _) = pipe_with(text)?;
        assert_eq!(file.read_line().await?, "moon\n");
        assert_eq!(kind(file.read_line().await), io::ErrorKind::InvalidData);
        let (mut file, _) = pipe_with(text)?;
        assert_eq!(
            kind(file.read_to_string().await),
            io::ErrorKind::InvalidData
        );
        Ok(())
    });
}

#[test]
fn a_pipe_cannot_be_put_back_to_where_reading_has_come_to() {
    run(async {
        let (mut file, _writer) = pipe_with(b"moon\nsun\n")?;
        assert_eq!(file.read_line().await?, "moon\n");
        let never = file.blocking(|_| -> io::Result<()> { panic!("at which position?") });
        assert_eq!(kind(never.await), io::ErrorKind::NotSeekable);
        Ok(())
    });
}

// fs
#[test]
fn a_file_that_cannot_be_read_is_an_error_and_no_end() {
    run(async {
        let mut folder = File::open("/").await?;
        assert_eq!(
            kind(folder.read(&mut [0; 10]).await),
            io::ErrorKind::IsADirectory
        );
        assert_eq!(kind(folder.read_line().await), io::ErrorKind::IsADirectory);
        assert_eq!(
            kind(folder.read_to_end().await),
            io::ErrorKind::IsADirectory
        );
        Ok(())
    });
}

#[test]
fn what_a_file_has_read_ahead_is_got_without_waiting() {
    run(async {
        let (mut file, _writer) = pipe_with(b"moon\nsun\n")?;
        assert_eq!(file.read_line().await?, "moon\n");
        current_task().request_cancel("late");
        let mut buf = [0; 10];
        assert_eq!(file.read(&mut buf).await?, 4);
        assert_eq!(file.read(&mut []).await?, 0);
        assert!(file.read(&mut buf).await.unwrap_err().interrupt().is_some());
        Ok(())
    });
}

#[test]
fn a_task_that_reads_lines_from_the_buffer_lets_others_run() {
    run(async {
        let (mut file, writer) = pipe_with(&b"moon\n".repeat(2000))?;
        drop(writer);
        assert_eq!(file.read_line().await?, "moon\n"); // and with it all
        let turns = Rc::new(Cell::new(0));
        let (ours, other) = (Rc::clone(&turns), Rc::clone(&turns));
        let other = spawn(async move {
            while yield_now().await.is_ok() {
                other.set(other.get() + 1);
            }
        });
        for _ in 0..1000 {
            assert_eq!(file.read_line().await?, "moon\n");
        }
        assert!(ours.get() > 0);
        other.cancel().await?;
        Ok(())
    });
}
