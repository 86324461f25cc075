//! The load generator of the echo benches: 64-byte messages, one in flight a connection.
//!
//! One loop over mio on the second core, the same for every server. It reads the server's CPU clock at both ends of its window, so that the
//! figure covers exactly the requests that were counted and neither start-up nor the first connections.

use crate::harness::{Error, Sample};
use mio::{Events, Interest, Poll, Token, net::TcpStream};
use nix::sys::signal::{self, Signal};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) const MESSAGE: usize = 64;
const WARM_UP: Duration = Duration::from_millis(300);
const MEASURE: Duration = Duration::from_secs(1);
/// With a server under valgrind, some of which never answer there (io_uring).
const PATIENCE: Duration = Duration::from_secs(120);

/// Starts the server, talks to it, kills it; gives `rps` and `cpu_us`.
pub(crate) fn against(mut server: Command, connections: usize) -> Result<Sample, Error> {
    let server = Server(server.stdout(Stdio::piped()).spawn()?);
    let (server, address) = server.address()?;
    let mut load = Load::connect(address, connections)?;
    load.run_for(WARM_UP)?;
    let (begin, cpu) = (Instant::now(), server.cpu()?);
    let requests = load.run_for(MEASURE)? as f64;
    let (wall, cpu) = (begin.elapsed(), server.cpu()? - cpu);
    Ok(Sample::from([
        ("rps".into(), requests / wall.as_secs_f64()),
        ("cpu_us".into(), cpu.as_secs_f64() * 1e6 / requests),
    ]))
}

/// Starts the server, has it answer so many requests, asks it to end; gives what it wrote to its standard error.
pub(crate) fn count(
    mut server: Command,
    connections: usize,
    requests: u64,
) -> Result<String, Error> {
    let server = server.stdout(Stdio::piped()).stderr(Stdio::piped());
    let (mut server, address) = Server(server.spawn()?).address()?;
    let mut load = Load::connect(address, connections)?;
    let answers = load.run(requests, Instant::now() + PATIENCE)?;
    if answers < requests {
        return Err(format!("{answers} answers in {PATIENCE:?}, not {requests}").into());
    }
    // Valgrind counts to the end of a process that ends so, not of one that is killed.
    signal::kill(Pid::from_raw(server.0.id().try_into()?), Signal::SIGTERM)?;
    let mut log = String::new();
    if let Some(mut stderr) = server.0.stderr.take() {
        stderr.read_to_string(&mut log)?;
    }
    Ok(log)
}

/// The server's process; killed when dropped.
struct Server(Child);

impl Server {
    fn address(mut self) -> Result<(Self, SocketAddr), Error> {
        let mut line = String::new();
        let stdout = self.0.stdout.take().ok_or("the server has no output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        // What is no address is the reason why there is none.
        let address = line.trim().parse().map_err(|_| line.trim().to_string())?;
        Ok((self, address))
    }

    fn cpu(&self) -> Result<Duration, Error> {
        cpu_of(self.0.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails only if it has ended by itself, which is as well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// CPU time that another process has used, all its threads.
pub(crate) fn cpu_of(pid: u32) -> Result<Duration, Error> {
    let pid = Pid::from_raw(pid.try_into()?);
    Ok(clock_getcpuclockid(pid)?.now()?.into())
}

struct Load {
    poll: Poll,
    connections: Vec<Connection>,
}

struct Connection {
    stream: TcpStream,
    /// Bytes of the answer that are still to come.
    missing: usize,
}

impl Load {
    /// Opens the connections and sends the first message on each.
    fn connect(address: SocketAddr, connections: usize) -> Result<Self, Error> {
        let poll = Poll::new()?;
        let mut load = Self {
            poll,
            connections: Vec::with_capacity(connections),
        };
        for token in 0..connections {
            let stream = std::net::TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            let registry = load.poll.registry();
            registry.register(&mut stream, Token(token), Interest::READABLE)?;
            stream.write_all(&[0; MESSAGE])?;
            load.connections.push(Connection {
                stream,
                missing: MESSAGE,
            });
        }
        Ok(load)
    }

    /// Answers every answer with the next message for the given time; returns the answers counted.
    fn run_for(&mut self, time: Duration) -> Result<u64, Error> {
        self.run(u64::MAX, Instant::now() + time)
    }

    /// As `run_for`, or until so many answers have come, or a few more.
    fn run(&mut self, most: u64, end: Instant) -> Result<u64, Error> {
        let mut events = Events::with_capacity(1024);
        let mut answers = 0;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if answers >= most || left.is_zero() {
                return Ok(answers);
            }
            self.poll.poll(&mut events, Some(left))?;
            for event in &events {
                answers += self.connections[event.token().0].turn()?;
            }
        }
    }
}

impl Connection {
    /// Reads what is there, and sends the next message when the answer is complete; returns 1 then.
    fn turn(&mut self) -> Result<u64, Error> {
        let mut buffer = [0; MESSAGE];
        match self.stream.read(&mut buffer[..self.missing]) {
            Ok(0) => Err("the server closed a connection".into()),
            Ok(n) => {
                self.missing -= n;
                if self.missing > 0 {
                    return Ok(0);
                }
                self.missing = MESSAGE;
                // 64 bytes into an empty socket buffer always fit.
                self.stream.write_all(&[0; MESSAGE])?;
                Ok(1)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}
