//! A place where running tasks report and wait.
//!
//! A test that kills a worker in the middle of a task must know that the task runs, and which process runs it. So such
//! tasks connect to the test, say one line and go on when they are told to:
//!
//! ```text
//! task -> test    <pid> <word>\n
//! test -> task    one byte: go on        (or the end of the stream: give up)
//! ```

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use crate::{Deadline, PATIENCE};

/// The test's side: a listening socket whose port goes to the tasks as an argument.
#[derive(Debug)]
pub struct Gate(TcpListener);

/// A task that stands at the gate. Dropping it makes the task give up.
#[derive(Debug)]
pub struct Visitor {
    /// The process that runs the task.
    pub pid: u32,
    /// What the task was told to say.
    pub word: String,
    stream: TcpStream,
}

impl Gate {
    /// Opens a gate on a free port.
    pub fn open() -> Self {
        Self(
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                .expect("a free port on the loopback interface"),
        )
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.0
            .local_addr()
            .expect("a bound socket has an address")
            .port()
    }

    /// Waits for the next task.
    #[track_caller]
    pub fn next(&self) -> Visitor {
        assert!(
            Deadline::default().wait_readable(&self.0),
            "no task came to the gate"
        );
        let (stream, _) = self.0.accept().expect("a connection is waiting");
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("the timeout is not zero");
        let mut line = String::new();
        BufReader::new(&stream)
            .read_line(&mut line)
            .expect("a task at the gate says a line");
        let (pid, word) = line
            .trim_end()
            .split_once(' ')
            .unwrap_or_else(|| panic!("not \"pid word\": {line:?}"));
        let pid = pid
            .parse()
            .unwrap_or_else(|_| panic!("not a process id: {line:?}"));
        Visitor {
            pid,
            word: word.to_owned(),
            stream,
        }
    }
}

impl Visitor {
    /// Lets the task go on.
    pub fn release(mut self) {
        // A task that was killed meanwhile cannot be told any more.
        let _ = self.stream.write_all(b"g");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_visitor_is_held_until_released() {
        let gate = Gate::open();
        let mut task = TcpStream::connect(("127.0.0.1", gate.port())).unwrap();
        task.write_all(b"42 first try\n").unwrap();
        let visitor = gate.next();
        assert_eq!((visitor.pid, visitor.word.as_str()), (42, "first try"));
        visitor.release();
        let mut byte = [0];
        task.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"g");
    }
}
