//! The embedded broker in a process of its own, so that a test can kill it: says where it listens, and what it holds to whoever sends it
//! `SIGUSR1`, and ends with its parent.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::{process, thread};

use amqp::broker::{Config, Server};
use kernel::net::TcpListener;
use kernel::signal::{SIGUSR1, SignalQueue};
use kernel::spawn;
use rustix::event::{PollFd, PollFlags, poll};

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    thread::spawn(end_with_parent);
    kernel::run(async {
        let server = Server::new(Config::default());
        spawn(tell_what_it_holds(
            server.clone(),
            SignalQueue::new(&[SIGUSR1])?,
        ));
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        say(&format!("listening on {}", listener.local_addr()?))?;
        server.serve(listener).await
    })??;
    Ok(())
}

fn say(line: &str) -> io::Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "{line}")?;
    // Into a pipe nothing leaves by itself before much more has gathered.
    output.flush()
}

async fn tell_what_it_holds(server: Server, asked: SignalQueue) -> io::Result<()> {
    loop {
        asked.next().await?;
        let held = server.with(|broker, _| {
            let queues = broker.queues();
            let consumers: usize = queues.iter().map(|queue| queue.consumers).sum();
            format!(
                "{} connections, {} channels, {} queues, {} bindings, {consumers} consumers, {} bytes of messages",
                broker.session_count(),
                broker.channel_count(),
                queues.len(),
                broker.binding_count(),
                broker.memory(),
            )
        });
        say(&format!("it holds {held}"))?;
    }
}

/// The parent reads our standard output. Once nobody does, the parent is gone, in whatever way, and even before we could ask
/// for its process id.
fn end_with_parent() {
    let output = io::stdout();
    loop {
        // No event is asked for: errors are told unasked.
        match poll(&mut [PollFd::new(&output, PollFlags::empty())], None) {
            Err(rustix::io::Errno::INTR) => {}
            outcome => {
                eprintln!("embedded-broker: nobody reads what I say ({outcome:?})");
                process::exit(1);
            }
        }
    }
}
