//! Calls in processes.
//!
//! A thread that a call has been given to cannot be stopped; a process can. And what crashes or leaks in it does so without us. Curio sends a pickled function to a
//! process; a Rust program has no such thing, and cannot fork once it has threads. So a child is the program itself, started anew, that finds the functions it
//! may be asked for in its own `main` ([`process_worker`](super::process_worker)), and calls go by name.
//!
//! A pool starts children when it needs them, up to its size, and uses the one that became idle last first. A child runs one call at a time.
//! If the caller is interrupted or goes away, the child is killed with every process of its group, and the next call that finds no idle one starts
//! another. So a child that is idle is one that has answered all it was asked: no answer can reach the wrong caller.
//!
//! A call that is not the child's first costs a write, a wait and a read: our end of the socket stays registered in the kernel that used it last, from which
//! another takes it over, and what the read brings beyond the head of an answer is kept. An idle child says nothing, so it wakes nobody, except when it dies.
//!
//! That it died while it was idle is found out when the next call cannot be written. Not a byte of that call was heard then, so it can be given to another.

use std::cell::{Cell, RefCell};
use std::env;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::Shutdown;
use std::num::NonZero;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::process::{self, ExitStatus};
use std::rc::Rc;
use std::thread;

use rustix::process::{Pid, Signal, kill_process_group};

use super::child::{self, HELLO, Kind};
use crate::cancel::{check_cancellation, shield};
use crate::error::{Interrupt, MaybeInterrupt};
use crate::net::UnixStream;
use crate::process::{Child, Command};
use crate::sync::Semaphore;
use crate::traps::at_caller;

/// The longest message of a pool that was not told otherwise.
const MAX_MESSAGE: usize = 64 << 20;
/// An answer of up to so many bytes is read at once.
const INBOX: usize = 4096;

/// Calls a function in another process and waits for its result (Curio's `run_in_process`). The function is one that the program's `main` gives to
/// [`process_worker`](super::process_worker), where there is an example; `args` is in an encoding of your own, as is the result.
///
/// At most as many such calls run for this thread at a time as the machine has processors; the others wait their turn. [`ProcessPool`] makes a pool of one's own.
///
/// Cancellation point: yes, as [`ProcessPool::run`].
///
/// # Errors
/// As [`ProcessPool::run`].
#[track_caller]
pub fn run_in_process(
    function: &str,
    args: impl AsRef<[u8]>,
) -> impl Future<Output = Result<Vec<u8>, ProcessCallError>> {
    thread_local! {
        static POOL: Rc<ProcessPool> = Rc::new(ProcessPool::new(processors()));
    }
    let at = Location::caller();
    async move {
        let pool = POOL.with(Rc::clone);
        pool.run_at(function, args.as_ref(), at).await
    }
}

/// Curio's `MAX_WORKER_PROCESSES`.
fn processors() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// A pool of processes for calls that compute for long, may crash, or must be stopped when their caller is interrupted.
///
/// It belongs to one thread, and to the kernel in which a task first has to wait for a free place in it, until that ends. Put it into an [`Rc`] to share it.
///
/// If dropped, its processes are killed; [`shutdown`](Self::shutdown) lets them end. They do not outlive this thread, however it ends: on Linux they are killed with
/// it, elsewhere they end when they have answered. The processes that a function starts are not looked after, other than in an interrupt.
#[derive(Debug)]
pub struct ProcessPool {
    size: usize,
    program: Option<PathBuf>,
    max_message: usize,
    places: Semaphore,
    /// The one that became idle last comes last.
    idle: RefCell<Vec<Worker>>,
    /// Counts those that there are.
    processes: Rc<Cell<usize>>,
}

impl ProcessPool {
    /// A pool of up to `size` processes of this program, none of which is started yet.
    ///
    /// # Panics
    /// If `size` is 0.
    #[must_use]
    #[track_caller]
    pub fn new(size: usize) -> Self {
        assert!(size > 0, "a pool needs a process");
        Self {
            size,
            program: None,
            max_message: MAX_MESSAGE,
            places: Semaphore::new(size),
            idle: RefCell::new(Vec::new()),
            processes: Rc::default(),
        }
    }

    /// Starts processes of another program, which calls [`process_worker`](super::process_worker) too.
    #[must_use]
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = Some(program.into());
        self
    }

    /// Refuses arguments (with the function's name) and results of more than this many bytes; 64 MiB unless told, at most 4 GiB. Texts of errors are cut at it.
    #[must_use]
    pub const fn max_message(mut self, bytes: usize) -> Self {
        self.max_message = bytes;
        self
    }

    /// How many processes it may have.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// How many processes it has now, idle or not.
    #[must_use]
    pub fn processes(&self) -> usize {
        self.processes.get()
    }

    /// Calls `function` in a process of the pool and waits for its result. Starting a process blocks the kernel for the time of a `fork` and an `exec`.
    ///
    /// Cancellation point: yes. The call starts only when the task waits for it: an interrupt that is pending prevents it. One that comes later kills the process,
    /// and this returns when it has ended. If dropped, the process is killed too.
    ///
    /// # Errors
    /// See [`ProcessCallError`]. Whatever it is, the next call finds the pool in order.
    #[track_caller]
    pub fn run(
        &self,
        function: &str,
        args: impl AsRef<[u8]>,
    ) -> impl Future<Output = Result<Vec<u8>, ProcessCallError>> {
        let at = Location::caller();
        async move { self.run_at(function, args.as_ref(), at).await }
    }

    async fn run_at(
        &self,
        function: &str,
        args: &[u8],
        at: &'static Location<'static>,
    ) -> Result<Vec<u8>, ProcessCallError> {
        let limit = u32::try_from(self.max_message).unwrap_or(u32::MAX);
        let length = function.len().saturating_add(args.len());
        if length > limit as usize {
            return Err(ProcessCallError::TooLong {
                what: "arguments",
                length,
                limit: limit as usize,
            });
        }
        check_cancellation()?;
        let _place = self.places.acquire().await?;
        let call = child::encode_call(limit, function, args);
        loop {
            let idle = self.idle.borrow_mut().pop();
            let mut worker = match idle {
                Some(worker) => worker,
                None => Worker::start(self.program.as_deref(), &self.processes)
                    .map_err(|error| ProcessCallError::Start { error })?,
            };
            let error = match worker.call(&call, limit as usize, at).await {
                Ok((kind, said)) => {
                    self.idle.borrow_mut().push(worker);
                    return outcome(kind, said, function, limit as usize);
                }
                Err(error) => error,
            };
            let (pid, said_hello, heard) = (worker.child.id(), worker.said_hello, worker.heard);
            let ended = worker.put_to_rest().await;
            if said_hello && !heard && is_hangup(&error) {
                log::warn!("worker process {pid} ended while it was idle: {ended:?}");
                check_cancellation()?;
                continue;
            }
            return Err(failure(error, ended, said_hello, function));
        }
    }

    /// Tells all processes to end, and waits for them.
    ///
    /// Cancellation point: yes. If interrupted or dropped, those that have not ended are killed.
    ///
    /// # Errors
    /// An [`Interrupt`]; the errors of `waitpid(2)`.
    #[track_caller]
    pub fn shutdown(self) -> impl Future<Output = io::Result<()>> {
        at_caller(async move {
            let workers = self.idle.take();
            for worker in &workers {
                // They end all at once, each at the end of its input.
                worker.socket.shutdown(Shutdown::Both)?;
            }
            for worker in &workers {
                worker.child.wait().await?;
            }
            Ok(())
        })
    }
}

/// What it means to the caller that there is no answer, and that the process `ended` so.
fn failure(
    error: io::Error,
    ended: io::Result<ExitStatus>,
    said_hello: bool,
    function: &str,
) -> ProcessCallError {
    if let Some(interrupt) = error.interrupt() {
        return interrupt.clone().into();
    }
    match ended {
        Ok(status) if is_hangup(&error) && said_hello => ProcessCallError::Died {
            function: function.to_owned(),
            status,
        },
        Ok(status) if is_hangup(&error) => {
            let text = match status.signal() {
                Some(_) => format!("it ended with {status} at once"),
                None => format!("it ended with {status} at once; {NO_MAIN}"),
            };
            let error = io::Error::other(text);
            ProcessCallError::Start { error }
        }
        _ => ProcessCallError::Broken { error },
    }
}

/// What an answer means to the caller.
fn outcome(
    kind: Kind,
    said: Vec<u8>,
    function: &str,
    limit: usize,
) -> Result<Vec<u8>, ProcessCallError> {
    let function = || function.to_owned();
    let text = |said: &[u8]| String::from_utf8_lossy(said).into_owned();
    match kind {
        Kind::Value => Ok(said),
        Kind::Error => Err(ProcessCallError::Failed {
            function: function(),
            error: text(&said),
        }),
        Kind::Panic => Err(ProcessCallError::Panicked {
            function: function(),
            text: text(&said),
        }),
        Kind::Unknown => Err(ProcessCallError::Unknown {
            function: function(),
            known: text(&said),
        }),
        Kind::TooLong => Err(ProcessCallError::TooLong {
            what: "result",
            length: text(&said).parse().unwrap_or(usize::MAX),
            limit,
        }),
    }
}

/// Why a call in a process has no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessCallError {
    /// The caller was interrupted; the process that worked for it has been killed.
    #[error("{0}")]
    Interrupted(#[from] Interrupt),
    /// The function returned this error.
    #[error("{error}")]
    Failed {
        /// Which function.
        function: String,
        /// Its error.
        error: String,
    },
    /// The function panicked; the process goes on.
    #[error("`{function}` panicked in a worker process: {text}")]
    Panicked {
        /// Which function.
        function: String,
        /// With what, and where.
        text: String,
    },
    /// The worker has no function of this name.
    #[error("no function `{function}` in the worker process, which has: {known}")]
    Unknown {
        /// Which function.
        function: String,
        /// The names that it has.
        known: String,
    },
    /// The arguments, or the result, are longer than the pool allows; see [`ProcessPool::max_message`]. If it was the result, the function has run.
    #[error("{what} of {length} bytes for a worker process, of which at most {limit} are allowed")]
    TooLong {
        /// "arguments" or "result".
        what: &'static str,
        /// How long.
        length: usize,
        /// How long it may be.
        limit: usize,
    },
    /// The process died, crashed by the function or killed from outside. How far the function came is not known.
    #[error("the worker process died while it ran `{function}`: {status}")]
    Died {
        /// Which function.
        function: String,
        /// By which signal, or with which code.
        status: ExitStatus,
    },
    /// No process could be started, or it is no worker. The function has not run.
    #[error("cannot start a worker process: {error}")]
    Start {
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The connection to the process failed, or what came over it made no sense; the process has been killed.
    #[error("talking to a worker process: {error}")]
    Broken {
        /// How.
        #[source]
        error: io::Error,
    },
}

impl MaybeInterrupt for ProcessCallError {
    fn interrupt(&self) -> Option<&Interrupt> {
        match self {
            Self::Interrupted(interrupt) => Some(interrupt),
            Self::Failed { .. }
            | Self::Panicked { .. }
            | Self::Unknown { .. }
            | Self::TooLong { .. }
            | Self::Died { .. }
            | Self::Start { .. }
            | Self::Broken { .. } => None,
        }
    }
}

/// A child and our end of its socket.
#[derive(Debug)]
struct Worker {
    socket: UnixStream,
    inbox: Box<[u8]>,
    /// Where in the inbox the bytes are that were read and not yet asked for.
    kept: Range<usize>,
    child: Child,
    said_hello: bool,
    /// Whether any byte of the last call was written.
    heard: bool,
    /// How many there are in the pool.
    count: Rc<Cell<usize>>,
}

impl Worker {
    fn start(program: Option<&Path>, count: &Rc<Cell<usize>>) -> io::Result<Self> {
        // It would start itself without end.
        if child::is_worker() {
            let text = format!("this process was started as one; {NO_MAIN}");
            return Err(io::Error::other(text));
        }
        let (socket, theirs) = net::UnixStream::pair()?;
        let socket = UnixStream::from_std(socket)?;
        let mut command = match program {
            Some(program) => process::Command::new(program),
            None => this_program()?,
        };
        // A group of its own: what the terminal sends is for the parent to decide about, and the children of a call can be killed with it.
        command
            .env(child::VARIABLE, child::socket_inode(&theirs)?)
            .stdin(OwnedFd::from(theirs))
            .process_group(0);
        let child = Command::from(command).spawn()?;
        count.set(count.get() + 1);
        Ok(Self {
            socket,
            inbox: vec![0; INBOX].into(),
            kept: 0..0,
            child,
            said_hello: false,
            heard: false,
            count: Rc::clone(count),
        })
    }

    /// Sends a call and waits for its answer.
    async fn call(
        &mut self,
        call: &[u8],
        limit: usize,
        at: &'static Location<'static>,
    ) -> io::Result<(Kind, Vec<u8>)> {
        self.socket.move_here();
        self.send(call, at).await?;
        if !self.said_hello {
            if self.receive(at).await? != HELLO {
                let text = format!("it speaks another language; {NO_MAIN}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            self.said_hello = true;
        }
        let (kind, length) = child::decode_answer_head(self.receive(at).await?)?;
        // The text of an error, or a length in decimal, may be longer than a very low limit.
        if length > limit.max(64) {
            let text = format!("an answer of {length} bytes, beyond the limit");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let mut said = vec![0; length];
        self.receive_into(&mut said, at).await?;
        if !self.kept.is_empty() {
            let text = format!("{} bytes more than the answer has", self.kept.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok((kind, said))
    }

    async fn send(&mut self, mut bytes: &[u8], at: &'static Location<'static>) -> io::Result<()> {
        self.heard = false;
        while !bytes.is_empty() {
            bytes = &bytes[self.socket.write(bytes).called_at(at).await?..];
            self.heard = true;
        }
        Ok(())
    }

    async fn receive<const LENGTH: usize>(
        &mut self,
        at: &'static Location<'static>,
    ) -> io::Result<[u8; LENGTH]> {
        let mut bytes = [0; LENGTH];
        self.receive_into(&mut bytes, at).await?;
        Ok(bytes)
    }

    async fn receive_into(
        &mut self,
        bytes: &mut [u8],
        at: &'static Location<'static>,
    ) -> io::Result<()> {
        let known = self.kept.len().min(bytes.len());
        let (known, mut bytes) = bytes.split_at_mut(known);
        known.copy_from_slice(&self.inbox[self.kept.start..][..known.len()]);
        self.kept.start += known.len();
        while !bytes.is_empty() {
            // With room for more than there is, or the next call would have to find out that no more is there.
            let mut room = [IoSliceMut::new(bytes), IoSliceMut::new(&mut self.inbox)];
            let read = self.socket.read_vectored(&mut room).called_at(at).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let asked = read.min(bytes.len());
            self.kept = 0..read - asked;
            bytes = &mut bytes[asked..];
        }
        Ok(())
    }

    /// Kills it, if it has not ended, and waits for the end, whatever interrupts come.
    async fn put_to_rest(self) -> io::Result<ExitStatus> {
        self.kill_group();
        shield(self.child.wait()).await
    }

    /// Kills it with every process of its group, unless it has ended: then its number may be another's.
    fn kill_group(&self) {
        if let (Ok(None), Some(group)) = (
            self.child.try_wait(),
            Pid::from_raw(self.child.id().cast_signed()),
        ) && let Err(error) = kill_process_group(group, Signal::KILL)
        {
            log::warn!(
                "worker process {}: cannot kill it: {error}",
                self.child.id()
            );
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.count.set(self.count.get() - 1);
        self.kill_group();
    }
}

const NO_MAIN: &str = "does its `main` begin with `kernel::process_worker`?";

/// The program that runs now, even if its file has been replaced since.
fn this_program() -> io::Result<process::Command> {
    let path = env::current_exe()?;
    let itself = Path::new("/proc/self/exe");
    if !itself.exists() {
        return Ok(process::Command::new(path));
    }
    let mut command = process::Command::new(itself);
    command.arg0(path);
    Ok(command)
}

/// Whether the other side is gone.
fn is_hangup(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}
