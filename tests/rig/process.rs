//! A child process that cannot outlive its test.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use rustix::process::{Pid, PidfdFlags, kill_process, kill_process_group, pidfd_open};

pub use rustix::process::Signal;

use crate::Deadline;

/// A running child in a process group of its own, whose output is collected line by line.
///
/// Dropping it kills the group; if the test is failing, what the child said is shown.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    output: Arc<Output>,
}

/// A child that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

#[derive(Debug, Default)]
struct Output {
    said: Mutex<Said>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Said {
    lines: Vec<(Stream, String)>,
    open: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Out,
    Err,
}

impl Process {
    /// Starts the command with piped output and no input.
    #[track_caller]
    pub fn spawn(command: &mut Command) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        let output = Arc::new(Output::default());
        collect(
            &output,
            Stream::Out,
            child.stdout.take().expect("standard output is piped"),
        );
        collect(
            &output,
            Stream::Err,
            child.stderr.take().expect("standard error is piped"),
        );
        Self {
            name,
            child,
            output,
        }
    }

    /// Its process id, which is its group's id too.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until a line of its output contains `text`, which may have come before, and returns the line.
    #[track_caller]
    pub fn wait_for_line(&self, text: &str) -> String {
        self.wait_for_lines(text, 1).remove(0)
    }

    /// Waits until `count` lines of its output contain `text` and returns them.
    #[track_caller]
    pub fn wait_for_lines(&self, text: &str, count: usize) -> Vec<String> {
        self.wait_for_lines_by(text, count, Deadline::default())
    }

    /// The same for what may take longer.
    #[track_caller]
    pub fn wait_for_lines_by(&self, text: &str, count: usize, deadline: Deadline) -> Vec<String> {
        let mut said = self
            .output
            .said
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            let found: Vec<String> = said
                .lines
                .iter()
                .map(|(_, line)| line)
                .filter(|line| line.contains(text))
                .take(count)
                .cloned()
                .collect();
            if found.len() == count {
                return found;
            }
            let left = deadline.left().filter(|_| said.open > 0);
            let Some(left) = left else {
                let why = if said.open == 0 { "ended" } else { "is silent" };
                drop(said);
                panic!(
                    "{} {why} after {} of {count} lines with {text:?}",
                    self.name,
                    found.len()
                );
            };
            said = self
                .output
                .changed
                .wait_timeout(said, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// All lines so far, of both streams.
    pub fn lines(&self) -> Vec<String> {
        let said = self
            .output
            .said
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        said.lines.iter().map(|(_, line)| line.clone()).collect()
    }

    /// Sends a signal to the process itself, as `kill` would.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal)
            .unwrap_or_else(|error| panic!("signal to {}: {error}", self.name));
    }

    /// Waits until it has ended by itself and its output is complete.
    #[track_caller]
    pub fn ended(self) -> Ended {
        self.ended_by(Deadline::default())
    }

    /// The same for what may take longer.
    #[track_caller]
    pub fn ended_by(mut self, deadline: Deadline) -> Ended {
        assert!(
            exit_seen(self.pid(), &deadline),
            "{} does not end",
            self.name
        );
        // Before the status is collected, the id cannot belong to anybody else yet.
        let _ = kill_process_group(self.pid(), Signal::KILL);
        let status = self.child.wait().expect("an ended child has a status");
        let mut said = self
            .output
            .said
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while said.open > 0 {
            let Some(left) = deadline.left() else {
                drop(said);
                panic!(
                    "{} has ended, but something it started holds its output open",
                    self.name
                );
            };
            said = self
                .output
                .changed
                .wait_timeout(said, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let text = |wanted| {
            let lines = said.lines.iter().filter(|(stream, _)| *stream == wanted);
            lines.map(|(_, line)| format!("{line}\n")).collect()
        };
        Ended {
            status,
            stdout: text(Stream::Out),
            stderr: text(Stream::Err),
        }
    }

    /// Kills it as the kernel would, with no chance to clean up, and waits for its end.
    #[track_caller]
    pub fn kill(self) -> Ended {
        self.signal(Signal::KILL);
        self.ended()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process_group(self.pid(), Signal::KILL);
            let _ = self.child.wait();
        }
        if thread::panicking() {
            eprintln!("---- {} ({}) said", self.name, self.child.id());
            for line in self.lines() {
                eprintln!("{line}");
            }
        }
    }
}

impl Ended {
    /// The exit code; a process that a signal ended has none.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The signal that ended it.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// Asserts the exit code, and shows what the process said if it is another.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        let shown = || {
            format!(
                "{}\nstdout:\n{}stderr:\n{}",
                self.status, self.stdout, self.stderr
            )
        };
        assert_eq!(self.code(), Some(code), "{}", shown());
        self
    }
}

/// Waits until a process has exited that need not be our child.
#[track_caller]
pub fn wait_until_gone(pid: u32) {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .expect("a process id is a positive number");
    assert!(
        exit_seen(pid, &Deadline::default()),
        "process {pid:?} does not end"
    );
}

fn exit_seen(pid: Pid, deadline: &Deadline) -> bool {
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => deadline.wait_readable(pidfd),
        Err(rustix::io::Errno::SRCH) => true,
        Err(error) => panic!("pidfd_open {pid:?}: {error}"),
    }
}

fn collect(output: &Arc<Output>, stream: Stream, from: impl Read + Send + 'static) {
    output
        .said
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .open += 1;
    let output = Arc::clone(output);
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while matches!(from.read_until(b'\n', &mut line), Ok(1..)) {
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            let text = String::from_utf8_lossy(&line).into_owned();
            line.clear();
            output
                .said
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .lines
                .push((stream, text));
            output.changed.notify_all();
        }
        output
            .said
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .open -= 1;
        output.changed.notify_all();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        Process::spawn(Command::new("sh").args(["-c", script]))
    }

    #[test]
    fn output_and_exit_code_are_collected() {
        let ended = shell("echo out; echo err >&2; exit 3").ended();
        assert_eq!(
            (ended.code(), ended.stdout.as_str(), ended.stderr.as_str()),
            (Some(3), "out\n", "err\n")
        );
    }

    #[test]
    fn a_line_is_found_before_and_after_it_was_said() {
        let process = shell("echo one; read -r never < /dev/zero; echo two");
        process.wait_for_line("one");
        process.wait_for_line("one");
    }

    #[test]
    #[should_panic(expected = "ended after 0 of 1 lines with \"two\"")]
    fn a_line_that_cannot_come_any_more_fails_at_once() {
        shell("echo one").wait_for_line("two");
    }

    #[test]
    fn dropping_it_kills_the_whole_group() {
        let process = shell("sleep 1000 & echo $!; wait");
        let grandchild = process
            .wait_for_line("")
            .parse()
            .expect("the shell prints a process id");
        drop(process);
        wait_until_gone(grandchild);
    }

    #[test]
    fn a_killed_process_ends_by_the_signal() {
        assert_eq!(shell("sleep 1000").kill().signal(), Some(9));
    }
}
