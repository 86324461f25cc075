//! Child processes, with pipes and an end that tasks can wait for.
//!
//! On Linux the end is told by a pidfd, in the same poller as everything else; elsewhere the child is asked in growing intervals. Only our
//! own children are ever reaped, each by its number: never "any child", which would steal from other code in the process.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::future::{Future, poll_fn};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::process::{self, ExitStatus, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::cancel::shield;
use crate::error::{Interrupt, MaybeInterrupt};
use crate::net::Io;
use crate::time::sleep;
use crate::traps::{Direction, at_caller};

/// Our end of a pipe that a child writes to.
pub type ReadPipe = Io<io::PipeReader>;

/// Our end of a pipe that a child reads from. If dropped, the child reads to the end of what was written.
pub type WritePipe = Io<io::PipeWriter>;

/// How a child is to be started: [`std::process::Command`], with what matters to waiting tasks.
///
/// ```
/// use kernel::process::Command;
///
/// # kernel::run(async {
/// let sorted = Command::new("sort").check_output(b"pear\napple\n").await?;
/// assert_eq!(sorted.stdout, b"apple\npear\n");
/// # Ok::<_, kernel::process::ProcessError>(()) }).unwrap().unwrap();
/// ```
#[derive(Debug)]
pub struct Command {
    std: process::Command,
    kill_on_drop: bool,
}

impl Command {
    /// Runs `program`, found by `PATH` if it has no slash.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        process::Command::new(program).into()
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.std.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.std.args(args);
        self
    }

    /// What the child reads from; a pipe shows up in [`Child::stdin`].
    pub fn stdin(&mut self, from: impl Into<Stdio>) -> &mut Self {
        self.std.stdin(from);
        self
    }

    /// What the child writes to; a pipe shows up in [`Child::stdout`].
    pub fn stdout(&mut self, to: impl Into<Stdio>) -> &mut Self {
        self.std.stdout(to);
        self
    }

    /// What the child writes errors to; a pipe shows up in [`Child::stderr`].
    pub fn stderr(&mut self, to: impl Into<Stdio>) -> &mut Self {
        self.std.stderr(to);
        self
    }

    /// Whether a [`Child`] that is dropped takes the process with it. Otherwise it goes on, and is reaped when it has ended and
    /// another child is started or dropped.
    pub const fn kill_on_drop(&mut self, kill: bool) -> &mut Self {
        self.kill_on_drop = kill;
        self
    }

    /// Everything else: environment, directory, process group.
    pub const fn as_std_mut(&mut self) -> &mut process::Command {
        &mut self.std
    }

    /// Starts the child.
    ///
    /// Not a cancellation point; blocks for the time of a `fork` and an `exec`.
    ///
    /// # Errors
    /// Those of starting, with the program's name.
    pub fn spawn(&mut self) -> io::Result<Child> {
        reap_orphans();
        let started = self.std.spawn().map_err(|error| {
            let program = self.std.get_program().display();
            io::Error::new(error.kind(), format!("cannot start {program}: {error}"))
        });
        let mut std = started?;
        let pipes = (std.stdin.take(), std.stdout.take(), std.stderr.take());
        let pid = Pid::from_child(&std);
        // From here on a failure drops the child, as somebody who no longer wants it would.
        let mut child = Child {
            stdin: None,
            stdout: None,
            stderr: None,
            end: watch_end(pid),
            pid,
            std: RefCell::new(std),
            kill_on_drop: true,
        };
        if let Some(pipe) = pipes.0 {
            child.stdin = Some(Io::from_std(OwnedFd::from(pipe).into())?);
        }
        if let Some(pipe) = pipes.1 {
            child.stdout = Some(Io::from_std(OwnedFd::from(pipe).into())?);
        }
        if let Some(pipe) = pipes.2 {
            child.stderr = Some(Io::from_std(OwnedFd::from(pipe).into())?);
        }
        child.kill_on_drop = self.kill_on_drop;
        Ok(child)
    }

    /// Runs the child to its end on `input`, and collects what it writes to both outputs (Curio's `run`). No input means the null device.
    ///
    /// Cancellation point: yes. If interrupted, the child is killed and reaped before this returns. If dropped, it is killed.
    ///
    /// # Errors
    /// [`ProcessError::Stopped`] if it could not be started or was not waited for, with the output so far.
    #[track_caller]
    pub fn output(&mut self, input: &[u8]) -> impl Future<Output = Result<Output, ProcessError>> {
        at_caller(async move {
            let stdin = if input.is_empty() {
                Stdio::null()
            } else {
                Stdio::piped()
            };
            self.stdin(stdin);
            self.stdout(Stdio::piped()).stderr(Stdio::piped());
            self.spawn()?.communicate(input).await
        })
    }

    /// As [`output`](Self::output), where not to succeed is an error too (Curio's `check_output`).
    ///
    /// # Errors
    /// As [`output`](Self::output); [`ProcessError::Failed`] if the child did not end with success.
    #[track_caller]
    pub fn check_output(
        &mut self,
        input: &[u8],
    ) -> impl Future<Output = Result<Output, ProcessError>> {
        at_caller(async move {
            let output = self.output(input).await?;
            if output.status.success() {
                Ok(output)
            } else {
                Err(ProcessError::Failed(output))
            }
        })
    }
}

impl From<process::Command> for Command {
    fn from(std: process::Command) -> Self {
        Self {
            std,
            kill_on_drop: false,
        }
    }
}

/// A started child. If dropped, see [`Command::kill_on_drop`].
#[derive(Debug)]
pub struct Child {
    /// Where to write its input, if that was to be a pipe. The child sees the end of it when this is dropped.
    pub stdin: Option<WritePipe>,
    /// Where to read its output, if that was to be a pipe.
    pub stdout: Option<ReadPipe>,
    /// Where to read its errors, if that was to be a pipe.
    pub stderr: Option<ReadPipe>,
    /// Readable once it has ended; `None` where there is no such thing.
    end: Option<Io<OwnedFd>>,
    pid: Pid,
    std: RefCell<process::Child>,
    kill_on_drop: bool,
}

impl Child {
    /// Its process number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits for its end and reaps it; again if asked again. One task at a time may wait. Its input is not closed: a child that reads
    /// to the end first needs [`stdin`](Self::stdin) dropped.
    ///
    /// Cancellation point: only if it has not ended. If dropped, it goes on.
    ///
    /// # Errors
    /// As [`Source::ready_op`](crate::traps::Source::ready_op), with those of `waitpid(2)`.
    #[track_caller]
    pub fn wait(&self) -> impl Future<Output = io::Result<ExitStatus>> {
        at_caller(async move {
            if let Some(end) = &self.end {
                let exited = |_: &_| {
                    self.try_wait()?
                        .ok_or_else(|| io::ErrorKind::WouldBlock.into())
                };
                return end.ready_op(Direction::Read, exited).await;
            }
            let mut pause = Duration::from_millis(1);
            loop {
                if let Some(status) = self.try_wait()? {
                    return Ok(status);
                }
                sleep(pause).await?;
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        })
    }

    /// How it ended, if it has; then it is reaped.
    ///
    /// # Errors
    /// Those of `waitpid(2)`.
    pub fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        self.std.borrow_mut().try_wait()
    }

    /// Ends it with `SIGKILL`; nothing happens if it has ended. It still has to be waited for.
    ///
    /// # Errors
    /// Those of `kill(2)`.
    pub fn kill(&self) -> io::Result<()> {
        self.std.borrow_mut().kill()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such signal, `NotFound` if it has ended; those of `kill(2)`.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        // Once it is reaped its number may be somebody else's.
        if self.try_wait()?.is_some() {
            let text = format!("process {} has ended already", self.id());
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        let signal = Signal::from_named_raw(signal).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("no signal {signal}"))
        })?;
        Ok(kill_process(self.pid, signal)?)
    }

    /// Writes `input` and closes the pipe, reads both outputs to their ends, and waits for the child's. All at once, so that neither
    /// side can block the other. A child that does not read its input is no error: its status tells.
    ///
    /// Cancellation point: yes. If interrupted, the child is killed and reaped before this returns. If dropped, it is killed.
    ///
    /// # Errors
    /// [`ProcessError::Stopped`], with the output so far.
    #[track_caller]
    pub fn communicate(
        mut self,
        input: &[u8],
    ) -> impl Future<Output = Result<Output, ProcessError>> {
        at_caller(async move {
            self.kill_on_drop = true;
            let (stdin, readers) = (self.stdin.take(), (self.stdout.take(), self.stderr.take()));
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            let talk = async {
                let feed = pin!(feed(stdin, input));
                let out = pin!(drain(readers.0.as_ref(), &mut stdout));
                let err = pin!(drain(readers.1.as_ref(), &mut stderr));
                all([Some(feed), Some(out), Some(err)]).await?;
                self.wait().await
            };
            match talk.await {
                Ok(status) => Ok(Output {
                    status,
                    stdout,
                    stderr,
                }),
                Err(error) => {
                    self.put_to_rest().await;
                    // What it had written before it was killed.
                    for (pipe, output) in [(readers.0, &mut stdout), (readers.1, &mut stderr)] {
                        let _would_block = pipe.map(|pipe| pipe.as_std().read_to_end(output));
                    }
                    Err(ProcessError::Stopped {
                        error,
                        stdout,
                        stderr,
                    })
                }
            }
        })
    }

    /// Kills and reaps it, whatever interrupts come.
    async fn put_to_rest(&self) {
        let ended = match self.kill() {
            Ok(()) => shield(self.wait()).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            log::warn!("process {} could not be reaped: {error}", self.id());
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !matches!(self.try_wait(), Ok(None)) {
            return;
        }
        if self.kill_on_drop
            && let Err(error) = self.kill()
        {
            log::warn!("process {} could not be killed: {error}", self.id());
        }
        ORPHANS
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(self.pid);
        reap_orphans();
    }
}

/// What went wrong with a child that was run to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// It ended by itself, without success (Curio's `CalledProcessError`).
    #[error("the child failed: {}{}", .0.status, last_words(&.0.stderr))]
    Failed(Output),
    /// It could not be started, or was killed because the caller was interrupted or a pipe broke.
    #[error("{error}")]
    Stopped {
        /// Why.
        #[source]
        error: io::Error,
        /// What it had written until then.
        stdout: Vec<u8>,
        /// The errors it had written until then.
        stderr: Vec<u8>,
    },
}

/// The last line of what a child wrote to its errors, which most often says what is wrong.
fn last_words(stderr: &[u8]) -> String {
    let mut lines = stderr.rsplit(|&byte| byte == b'\n');
    match lines.find(|line| !line.trim_ascii().is_empty()) {
        None => String::new(),
        Some(line) => {
            let line = String::from_utf8_lossy(&line[..line.len().min(400)]);
            format!(": {}", line.trim())
        }
    }
}

impl From<io::Error> for ProcessError {
    fn from(error: io::Error) -> Self {
        Self::Stopped {
            error,
            stdout: Vec::new(),
            stderr: Vec::new(),
        }
    }
}

impl From<Interrupt> for ProcessError {
    fn from(interrupt: Interrupt) -> Self {
        io::Error::from(interrupt).into()
    }
}

impl From<ProcessError> for io::Error {
    fn from(error: ProcessError) -> Self {
        match error {
            ProcessError::Failed(_) => Self::other(error),
            ProcessError::Stopped { error, .. } => error,
        }
    }
}

impl MaybeInterrupt for ProcessError {
    fn interrupt(&self) -> Option<&Interrupt> {
        match self {
            Self::Failed(_) => None,
            Self::Stopped { error, .. } => error.interrupt(),
        }
    }

    fn replace_interrupt(self, with: Interrupt) -> Self {
        match self {
            Self::Failed(_) => self,
            Self::Stopped { stdout, stderr, .. } => Self::Stopped {
                error: with.into(),
                stdout,
                stderr,
            },
        }
    }
}

async fn feed(pipe: Option<WritePipe>, input: &[u8]) -> io::Result<()> {
    let Some(pipe) = pipe else { return Ok(()) };
    match pipe.write_all(input).await {
        Err(unread) if unread.error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => Ok(outcome?),
    }
}

async fn drain(pipe: Option<&ReadPipe>, output: &mut Vec<u8>) -> io::Result<()> {
    let Some(pipe) = pipe else { return Ok(()) };
    let mut buf = vec![0; 64 * 1024];
    loop {
        match pipe.read(&mut buf).await? {
            0 => return Ok(()),
            read => output.extend_from_slice(&buf[..read]),
        }
    }
}

type Part<'a> = Pin<&'a mut dyn Future<Output = io::Result<()>>>;

/// Waits for all, or for the first error.
async fn all(mut parts: [Option<Part<'_>>; 3]) -> io::Result<()> {
    poll_fn(|cx| {
        for part in &mut parts {
            if let Some(future) = part
                && let Poll::Ready(outcome) = future.as_mut().poll(cx)
            {
                outcome?;
                *part = None;
            }
        }
        if parts.iter().all(Option::is_none) {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    })
    .await
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn watch_end(pid: Pid) -> Option<Io<OwnedFd>> {
    use rustix::process::{PidfdFlags, pidfd_open};
    // Linux before 5.3 has none, and a sandbox may forbid it.
    pidfd_open(pid, PidfdFlags::empty()).ok().map(Io::adopt)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
const fn watch_end(_: Pid) -> Option<Io<OwnedFd>> {
    None
}

/// Children that were dropped before their end. Their numbers are theirs until we reap them.
static ORPHANS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

fn reap_orphans() {
    ORPHANS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .retain(|&pid| matches!(waitpid(Some(pid), WaitOptions::NOHANG), Ok(None)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_failed_is_quoted() {
        for (stderr, text) in [
            ("", "the child failed: exit status: 3"),
            (" \n\n", "the child failed: exit status: 3"),
            (
                "looking\r\nno such host \r\n\n",
                "the child failed: exit status: 3: no such host",
            ),
        ] {
            let status = Command::new("sh")
                .as_std_mut()
                .args(["-c", "exit 3"])
                .status();
            let failed = ProcessError::Failed(Output {
                status: status.unwrap(),
                stdout: Vec::new(),
                stderr: stderr.into(),
            });
            assert_eq!(failed.to_string(), text);
        }
    }
}
