//! The kernel as a task of tokio's, on the same thread. Its tasks may then await tokio's timers, sockets and tasks, and tokio's may wake them.
//!
//! `cargo run -p sweepea-kernel --example in_tokio`

use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::time::Duration;

use futures::future::{Either, select};
use kernel::{Kernel, sleep};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Gives `guest` a turn whenever it has something to do, until `is_done`. Says how many turns that were.
pub(crate) async fn host(guest: &mut Kernel<'_>, is_done: impl Fn() -> bool) -> io::Result<usize> {
    let bell = guest.as_fd().try_clone_to_owned()?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe; an `OwnedFd` keeps its promise"
    )]
    let bell = AsyncFd::with_interest(bell, Interest::READABLE)?;
    let mut turns = 0;
    loop {
        let turn = guest.turn(Some(Duration::ZERO)).map_err(io::Error::other)?;
        turns += 1;
        if is_done() {
            return Ok(turns);
        }
        if turn.ready {
            tokio::task::yield_now().await; // tokio's tasks have their turn, too
            continue;
        }

        let rung = async { bell.readable().await.map(|mut guard| guard.clear_ready()) };
        match turn.next_deadline {
            Some(deadline) => {
                let late = tokio::time::sleep_until(deadline.into());
                if let Either::Left((rung, _)) = select(pin!(rung), pin!(late)).await {
                    rung?;
                }
            }
            None => rung.await?,
        }
    }
}

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut guest = Kernel::new()?;
    let task = guest.spawn(async {
        sleep(Duration::from_millis(10)).await?;
        let theirs = tokio::spawn(async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            "tokio's task says hello"
        });
        theirs.await.map_err(Box::<dyn std::error::Error>::from)
    });
    let turns = runtime.block_on(host(&mut guest, || task.is_terminated()))?;
    let said = task.try_join().expect("it has ended")??;
    println!("{said} after {turns} turns");
    Ok(())
}
