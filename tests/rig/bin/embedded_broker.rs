//! The embedded broker in a process of its own, so that a test can kill it: says where it listens and ends with its parent.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::{process, thread};

use amqp::broker::{Config, Server};
use kernel::net::TcpListener;
use rustix::event::{PollFd, PollFlags, poll};

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    thread::spawn(end_with_parent);
    kernel::run(async {
        let server = Server::new(Config::default());
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        // Into a pipe nothing leaves by itself before much more has gathered.
        writeln!(io::stdout(), "listening on {}", listener.local_addr()?)?;
        io::stdout().flush()?;
        server.serve(listener).await
    })??;
    Ok(())
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
