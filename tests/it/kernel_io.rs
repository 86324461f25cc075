//! Sockets and descriptors over loopback, and the traps below them.

use std::cell::{Cell, RefCell};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::rc::Rc;
use std::time::Duration;

use kernel::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use kernel::{
    Builder, Interrupt, Kernel, MaybeInterrupt, ResourceBusy, Task, VirtualClock, spawn,
    timeout_after, traps, yield_now,
};

/// Runs `main` in real time; a test that hangs fails after a while.
fn run<T>(main: impl Future<Output = io::Result<T>>) -> T {
    let guarded = timeout_after(Duration::from_secs(20), main);
    kernel::run(guarded).unwrap().unwrap()
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

async fn read_exact(stream: &TcpStream, buf: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match stream.read(&mut buf[done..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(())
}

/// Lets every other task run until it waits.
async fn settle() {
    for _ in 0..3 {
        yield_now().await.unwrap();
    }
}

fn is_timeout<T>(outcome: &io::Result<T>) -> bool {
    matches!(outcome, Err(error) if error.interrupt() == Some(&Interrupt::TaskTimeout))
}

fn is_cancelled<T>(outcome: &io::Result<T>) -> bool {
    matches!(outcome, Err(error) if error.interrupt() == Some(&Interrupt::cancelled()))
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
