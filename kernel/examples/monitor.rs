//! A client for a kernel's monitor, and a program to try it on.
//!
//! ```sh
//! cargo run -p sweepea-kernel --example monitor -- --demo            # prints its monitor's address, and now and then does not let go
//! cargo run -p sweepea-kernel --example monitor -- 127.0.0.1:48802   # interactive; a Unix socket's path will do, too
//! cargo run -p sweepea-kernel --example monitor -- --command ps 127.0.0.1:48802
//! ```

use std::error::Error;
use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use kernel::monitor::MonitorAddress;
use kernel::{Builder, Interrupt, sleep, spawn};

const USAGE: &str =
    "usage: monitor --demo | [--command COMMAND] HOST:PORT | [--command COMMAND] PATH";

enum Connection {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connection {
    /// What contains a slash is a path.
    fn open(address: &str) -> io::Result<Self> {
        if address.contains('/') {
            UnixStream::connect(address).map(Self::Unix)
        } else {
            TcpStream::connect(address).map(Self::Tcp)
        }
    }

    fn halves(&self) -> io::Result<(Box<dyn Read + Send>, Box<dyn Write + Send>)> {
        Ok(match self {
            Self::Tcp(stream) => (Box::new(stream.try_clone()?), Box::new(stream.try_clone()?)),
            Self::Unix(stream) => (Box::new(stream.try_clone()?), Box::new(stream.try_clone()?)),
        })
    }

    fn shut(&self) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
        };
    }
}

/// Sends one command and prints its answer, without greeting and prompt.
fn command(connection: &Connection, command: &str) -> io::Result<()> {
    let (mut from, mut to) = connection.halves()?;
    write!(to, "{command}\nexit\n")?;
    let mut text = String::new();
    from.read_to_string(&mut text)?;
    let prompt = "kernel> ";
    let answer = text.split(prompt).nth(1).unwrap_or(&text);
    print!("{answer}");
    Ok(())
}

/// Passes lines on in both directions until the monitor hangs up.
fn interact(connection: Connection) -> io::Result<()> {
    let (mut from, mut to) = connection.halves()?;
    thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if writeln!(to, "{line}").is_err() {
                return;
            }
        }
        connection.shut();
    });
    let mut buf = [0; 4096];
    loop {
        match from.read(&mut buf)? {
            0 => return Ok(()),
            read => io::stdout().write_all(&buf[..read])?,
        }
        io::stdout().flush()?;
    }
}

/// A program with something to see: sleepers, one of which spins for five of each ten seconds.
fn demo() -> Result<(), Box<dyn Error>> {
    let mut kernel = Builder::new()
        .monitor(MonitorAddress::loopback(0))
        .build()?;
    if let Some(address) = kernel.monitor() {
        println!("the monitor listens at {address}");
    }
    kernel.run(async {
        let sleeper = spawn(sleep(Duration::from_secs(86_400)));
        sleeper.set_name("sleeper");
        let hog = spawn(async {
            loop {
                let began = Instant::now();
                while began.elapsed() < Duration::from_secs(5) {}
                sleep(Duration::from_secs(5)).await?;
            }
            #[expect(unreachable_code, reason = "names the type")]
            Ok::<(), Interrupt>(())
        });
        hog.set_name("hog");
        hog.wait().await?;
        sleeper.wait().await
    })??;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["--demo"] => demo(),
        ["--command", text, address] => Ok(command(&Connection::open(address)?, text)?),
        [address] if !address.starts_with('-') => Ok(interact(Connection::open(address)?)?),
        _ => Err(USAGE.into()),
    }
}
