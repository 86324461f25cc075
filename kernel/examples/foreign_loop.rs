//! The kernel as a guest of an event loop that is somebody else's: here one of mio's, with a socket of its own.
//!
//! The host knows three things of its guest: a descriptor that becomes readable, the next deadline, and `turn`.
//!
//! `cargo run -p sweepea-kernel --example foreign_loop`

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use kernel::Kernel;
use mio::net::UnixStream;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

const GUEST: Token = Token(0);
const OWN: Token = Token(1);

/// The host's loop. It answers each byte on `own` with the next one, and gives its guest a turn whenever that has something to do, until `is_done`.
/// Says how often it woke.
pub(crate) fn host(
    guest: &mut Kernel<'_>,
    mut own: UnixStream,
    is_done: impl Fn() -> bool,
) -> Result<usize, Box<dyn std::error::Error>> {
    let mut poll = Poll::new()?;
    let bell = guest.as_fd().as_raw_fd();
    let registry = poll.registry();
    registry.register(&mut SourceFd(&bell), GUEST, Interest::READABLE)?;
    registry.register(&mut own, OWN, Interest::READABLE)?;
    let mut events = Events::with_capacity(8);
    let mut wakes = 0;
    loop {
        // Bounded, so that a busy guest does not keep the host from its own work.
        let turn = guest.turn(Some(Duration::ZERO))?;
        if is_done() {
            return Ok(wakes);
        }
        let wait = match turn.next_deadline {
            _ if turn.ready => Some(Duration::ZERO),
            Some(deadline) => Some(deadline.saturating_duration_since(Instant::now())),
            None => None,
        };
        poll.poll(&mut events, wait)?;
        wakes += 1;
        for _ in events.iter().filter(|event| event.token() == OWN) {
            answer(&mut own)?;
        }
    }
}

fn answer(own: &mut UnixStream) -> io::Result<()> {
    let mut byte = [0];
    loop {
        match own.read(&mut byte) {
            Ok(0) => return Ok(()),
            Ok(_) => own.write_all(&[byte[0] + 1])?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (host_side, guest_side) = std::os::unix::net::UnixStream::pair()?;
    host_side.set_nonblocking(true)?;
    let mut guest = Kernel::new()?;
    let task = guest.spawn(async move {
        let stream = kernel::net::UnixStream::from_std(guest_side)?;
        let mut byte = [0];
        for _ in 0..3 {
            kernel::sleep(Duration::from_millis(10)).await?;
            stream.write_all(&byte).await?;
            stream.read(&mut byte).await?;
        }
        io::Result::Ok(byte[0])
    });
    let wakes = host(&mut guest, UnixStream::from_std(host_side), || {
        task.is_terminated()
    })?;
    let count = task.try_join().expect("it has ended")??;
    println!("counted to {count} in {wakes} wakes of the host");
    Ok(())
}
