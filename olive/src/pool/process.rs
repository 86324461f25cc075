//! Process workers: started by exec, joined by one socket, killed by process group.
//!
//! A pool grows when a task waits and no child is idle, up to its size, and prefers the child that was idle for the shortest time, so
//! a pool that is hardly used stays small and warm. One kernel task a child does everything for it: reads and writes its frames, keeps
//! its deadlines, buries it when it dies. A dead child harms no sibling and is replaced by the next task that needs it.
//!
//! Death is the end of file on the socket, never a guess: nobody else holds the child's end (close-on-exec everywhere, and a forked
//! grandchild closes it). A child dies with this process: Linux kills it, and it leaves by itself when the socket ends.
#![allow(unsafe_code)] // `spawn` and `inherited`, nothing else

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::pin::pin;
use std::process::{Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::Poll;
use std::time::Duration;

use kernel::sync::{Broken, Promise, promise};
use kernel::traps::{Direction, Lot, Source, WaitKind, sched_wait, sched_wake};
use rustix::process::{Pid, Signal};

use super::Task;
use super::child::{Due, FD_VARIABLE, Limit, Link, PYTHON_WORKER, Said, ToChild, serve};
use crate::config::Config;
use crate::error::Error;
use crate::message::Failure;
use crate::outcome::Outcome;
use crate::registry::Registry;

/// How long a task may go on after it was asked to end.
const SOFT_GRACE: Duration = Duration::from_secs(1);
/// How long an idle child may take to leave after bye.
const BYE_WITHIN: Duration = Duration::from_secs(5);
/// How long the pipes of a dead child may stay open (a grandchild may hold them).
const LAST_WORDS_WITHIN: Duration = Duration::from_millis(500);
/// Wait before the next start after so many failed ones in a row: 1, 2, 4 … 30 s.
const BOOT_BACKOFF_CAP: Duration = Duration::from_secs(30);
/// Longest line of a child's output that is kept; the rest of the line is dropped and counted.
const MAX_LINE: usize = 64 * 1024;
/// How many lines of stderr are kept for the report of a death.
const LAST_WORDS: usize = 20;

/// What a pool's children are.
#[derive(Debug, Clone)]
pub enum Program {
    /// The embedded worker, run by this interpreter.
    Python(String),
    /// This program again, with the arguments it was started with.
    Myself,
}

/// A pool of child processes. Cheap to clone; must be used inside one kernel.
#[derive(Debug, Clone)]
pub struct ProcessPool {
    shared: Rc<Shared>,
}

#[derive(Debug)]
struct Shared {
    program: Program,
    welcome: ToChild,
    max_frame: usize,
    size: usize,
    /// Idle children, the one that was busy last at the end.
    idle: RefCell<Vec<Rc<Desk>>>,
    waiting: RefCell<VecDeque<Assignment>>,
    children: Cell<usize>,
    closing: Cell<bool>,
    failed_boots: Cell<u32>,
    restarts: Cell<u64>,
}

/// A task that was handed in, and the place for its outcome.
#[derive(Debug)]
struct Assignment {
    task: Task,
    answer: Promise<Outcome>,
}

/// Where an idle child finds its next task.
#[derive(Debug, Default)]
struct Desk {
    next: RefCell<Option<Assignment>>,
    leave: Cell<bool>,
    lot: Lot,
}

impl ProcessPool {
    /// A pool of up to `size` children; none is started yet.
    #[must_use]
    pub fn new(program: Program, size: usize, config: &Config) -> Self {
        let max_frame = config.max_frame.0;
        let welcome = ToChild::Welcome {
            allow: config.allow.0.clone(),
            preload: config.preload.0.clone(),
            path: config.path.0.clone(),
            max_frame,
        };
        let shared = Shared {
            program,
            welcome,
            max_frame,
            size,
            idle: RefCell::default(),
            waiting: RefCell::default(),
            children: Cell::new(0),
            closing: Cell::new(false),
            failed_boots: Cell::new(0),
            restarts: Cell::new(0),
        };
        Self {
            shared: Rc::new(shared),
        }
    }

    /// Starts the first child, so that a mistake in the settings is found at the start.
    ///
    /// # Errors
    /// [`Error::WorkerBoot`] with what the child said.
    pub async fn warm_up(&self) -> Result<(), Error> {
        let child = Child::boot(&self.shared)
            .await
            .map_err(|cause| Error::WorkerBoot { cause })?;
        self.shared.children.set(self.shared.children.get() + 1);
        kernel::spawn(staff(self.shared.clone(), Some(child), None));
        Ok(())
    }

    /// Runs a task in a child. Waits for a free one.
    ///
    /// If dropped, a task that has begun runs on and nobody hears of it.
    ///
    /// # Errors
    /// The caller's interrupt.
    pub async fn run(&self, task: Task) -> Result<Outcome, kernel::Interrupt> {
        if task.message.body().len() + 4096 > self.shared.max_frame {
            let text = format!(
                "body of {} bytes, olive_worker_max_frame allows {}",
                task.message.body().len(),
                self.shared.max_frame
            );
            return Ok(Outcome::Permanent(Failure::new("BodyTooLarge", text)));
        }
        let (answer, mut outcome) = promise();
        self.assign(Assignment { task, answer });
        match outcome.wait().await {
            Ok(outcome) => Ok(outcome),
            Err(Broken::Interrupted(interrupt)) => Err(interrupt),
            // Its kernel task was cancelled: the app is on its way out.
            Err(_) => Err(kernel::Interrupt::cancelled()),
        }
    }

    fn assign(&self, assignment: Assignment) {
        let shared = &self.shared;
        let idle = shared.idle.borrow_mut().pop();
        if let Some(desk) = idle {
            *desk.next.borrow_mut() = Some(assignment);
            sched_wake(&desk.lot, 1);
        } else if shared.children.get() < shared.size {
            shared.children.set(shared.children.get() + 1);
            kernel::spawn(staff(shared.clone(), None, Some(assignment)));
        } else {
            shared.waiting.borrow_mut().push_back(assignment);
        }
    }

    /// How many children there are or are being started.
    #[must_use]
    pub fn children(&self) -> usize {
        self.shared.children.get()
    }

    /// How many children died and were replaced.
    #[must_use]
    pub fn restarts(&self) -> u64 {
        self.shared.restarts.get()
    }

    /// Sends the idle children home and waits for them, for a few seconds; busy ones leave after their task.
    ///
    /// # Errors
    /// The caller's interrupt.
    pub async fn close(&self) -> Result<(), kernel::Interrupt> {
        self.shared.closing.set(true);
        for desk in self.shared.idle.borrow_mut().drain(..) {
            desk.leave.set(true);
            sched_wake(&desk.lot, 1);
        }
        let deadline = kernel::now() + BYE_WITHIN;
        while self.shared.children.get() > 0 && kernel::now() < deadline {
            kernel::sleep(Duration::from_millis(5)).await?;
        }
        Ok(())
    }
}

/// The life of one place in the pool: a child, the tasks it is given, its burial, the next child.
async fn staff(shared: Rc<Shared>, mut child: Option<Child>, mut next: Option<Assignment>) {
    loop {
        if next.is_none() {
            next = shared.waiting.borrow_mut().pop_front();
        }
        let Some(assignment) = next.take() else {
            // A place without a child and without work is given up; the next task that needs it takes it again.
            let Some(mut idle) = child.take().filter(|_| !shared.closing.get()) else {
                break;
            };
            match idle.wait(&shared).await {
                Ok(Idle::Task(assignment)) => (child, next) = (Some(idle), Some(assignment)),
                Ok(Idle::Leave) => {
                    idle.dismiss().await;
                    break;
                }
                Ok(Idle::Dead(why)) => {
                    let end = idle.bury().await;
                    log::warn!("idle worker process ended: {why} ({})", end.how);
                    shared.restarts.set(shared.restarts.get() + 1);
                }
                Err(_) => break,
            }
            continue;
        };
        let mut worker = match child.take() {
            Some(worker) => worker,
            None => match Child::boot(&shared).await {
                Ok(worker) => {
                    shared.failed_boots.set(0);
                    worker
                }
                Err(why) => {
                    let failed = shared.failed_boots.get() + 1;
                    shared.failed_boots.set(failed);
                    let wait = Duration::from_secs(1 << failed.min(6)).min(BOOT_BACKOFF_CAP) / 2;
                    log::error!(
                        "worker process does not start ({failed} times now; next attempt in {wait:?}): {why}"
                    );
                    next = Some(assignment);
                    if kernel::sleep(wait).await.is_err() {
                        break;
                    }
                    continue;
                }
            },
        };
        match worker.run(&assignment.task).await {
            Ok(Ended::Alive(outcome)) => {
                let _ = assignment.answer.keep(outcome);
                child = Some(worker);
            }
            Ok(Ended::Dead(known, why)) => {
                let end = worker.bury().await;
                shared.restarts.set(shared.restarts.get() + 1);
                let how = if why.is_empty() {
                    end.how
                } else {
                    format!("{why}, {}", end.how)
                };
                let tid = &assignment.task.message.tid;
                log::warn!("worker process ended with task {tid}: {how}");
                let lost = Outcome::Lost {
                    how,
                    last_words: end.last_words,
                };
                let _ = assignment.answer.keep(known.unwrap_or(lost));
            }
            Err(_) => break,
        }
    }
    shared.children.set(shared.children.get() - 1);
}

enum Idle {
    Task(Assignment),
    Leave,
    Dead(String),
}

enum Ended {
    Alive(Outcome),
    /// With the outcome, if it is not simply lost, and why.
    Dead(Option<Outcome>, String),
}

/// How a child ended.
struct End {
    how: String,
    last_words: String,
}

/// A running child process. Dropping it kills its process group.
struct Child {
    link: Link,
    // Before the socket: it must be released first.
    source: Source,
    socket: UnixStream,
    process: std::process::Child,
    stderr: Rc<RefCell<VecDeque<String>>>,
    output: Vec<kernel::Task<()>>,
    running: Rc<RefCell<String>>,
    buried: bool,
    chunk: Box<[u8]>,
}

enum Step {
    Said(Vec<Said>),
    Closed(String),
    Time,
    Desk,
}

impl Child {
    /// Starts a process and brings it to its first ready.
    async fn boot(shared: &Shared) -> Result<Self, String> {
        let (ours, theirs) = UnixStream::pair().map_err(|e| format!("socketpair: {e}"))?;
        ours.set_nonblocking(true)
            .map_err(|e| format!("socketpair: {e}"))?;
        let mut process = match spawn(&shared.program, theirs.into()) {
            Ok(process) => process,
            Err(e) => {
                let program = match &shared.program {
                    Program::Python(python) => format!("{python} (olive_worker_python)"),
                    Program::Myself => "this program".into(),
                };
                return Err(format!("cannot start {program}: {e}"));
            }
        };
        let running = Rc::new(RefCell::new(String::new()));
        let stderr = Rc::new(RefCell::new(VecDeque::new()));
        let pid = process.id();
        let mut output = Vec::new();
        if let Some(pipe) = process.stdout.take() {
            output.push(kernel::spawn(relay(
                pipe.into(),
                "stdout",
                pid,
                running.clone(),
                None,
            )));
        }
        if let Some(pipe) = process.stderr.take() {
            output.push(kernel::spawn(relay(
                pipe.into(),
                "stderr",
                pid,
                running.clone(),
                Some(stderr.clone()),
            )));
        }
        let link = Link::new(kernel::now(), shared.welcome.clone(), shared.max_frame);
        let mut child = Self {
            link,
            source: Source::new(&ours),
            socket: ours,
            process,
            stderr,
            output,
            running,
            buried: false,
            chunk: vec![0; 64 * 1024].into(),
        };
        loop {
            let why = match child.step(None).await.map_err(|e| e.to_string())? {
                Step::Said(said) if said.contains(&Said::Ready) => return Ok(child),
                Step::Said(said) => match said.into_iter().next() {
                    Some(Said::Unfit(trace)) => trace,
                    _ => continue,
                },
                Step::Closed(why) => why,
                Step::Time => match child.link.due(kernel::now()) {
                    Due::Kill(why, _) => why,
                    Due::AskToEnd | Due::Nothing => continue,
                },
                Step::Desk => continue,
            };
            let end = child.bury().await;
            let why = if why.is_empty() { end.how } else { why };
            return Err(format!("{}\n{}", why.trim_end(), end.last_words)
                .trim_end()
                .to_owned());
        }
    }

    /// Runs one task to its end.
    async fn run(&mut self, task: &Task) -> Result<Ended, kernel::Interrupt> {
        let now = kernel::now();
        let limit = Limit::new(now, task.timeout, task.soft, SOFT_GRACE);
        self.running.borrow_mut().clone_from(&task.message.tid);
        self.link.start(&task.message, task.attempt, limit, now);
        let ended = loop {
            match self.step(None).await? {
                Step::Said(said) => {
                    match said.into_iter().next() {
                        // It was torn out of its work, and what it started may go on: better a fresh process. Whoever sets a
                        // soft limit says that its functions know how to end.
                        Some(Said::Ended(outcome @ Outcome::TimedOut { .. }, _))
                            if task.soft.is_none() =>
                        {
                            break Ended::Dead(Some(outcome), "its time was up".into());
                        }
                        Some(Said::Ended(outcome, _)) => break Ended::Alive(outcome),
                        Some(Said::Ready | Said::Unfit(_)) | None => {}
                    }
                }
                Step::Closed(why) => break Ended::Dead(None, why),
                Step::Time => match self.link.due(kernel::now()) {
                    Due::AskToEnd => {
                        let _ = rustix::process::kill_process(self.pid(), Signal::USR1);
                    }
                    Due::Kill(why, outcome) => break Ended::Dead(outcome, why),
                    Due::Nothing => {}
                },
                Step::Desk => {}
            }
        };
        self.running.borrow_mut().clear();
        Ok(ended)
    }

    /// Sits at a desk until there is a task, or until it is to leave or has died.
    async fn wait(&mut self, shared: &Shared) -> Result<Idle, kernel::Interrupt> {
        let desk = Rc::new(Desk::default());
        shared.idle.borrow_mut().push(desk.clone());
        loop {
            let step = self.step(Some(&desk)).await;
            if let Some(assignment) = desk.next.borrow_mut().take() {
                // A child that died at the very moment it was given a task is found dead by `run`.
                return Ok(Idle::Task(assignment));
            }
            if desk.leave.get() {
                return Ok(Idle::Leave);
            }
            let why = match step {
                Ok(Step::Closed(why)) => Ok(Idle::Dead(why)),
                Ok(Step::Time) => match self.link.due(kernel::now()) {
                    Due::Kill(why, _) => Ok(Idle::Dead(why)),
                    Due::AskToEnd | Due::Nothing => continue,
                },
                Ok(Step::Said(_) | Step::Desk) => continue,
                Err(interrupt) => Err(interrupt),
            };
            shared
                .idle
                .borrow_mut()
                .retain(|other| !Rc::ptr_eq(other, &desk));
            return why;
        }
    }

    /// Waits for whatever comes first: bytes, room for bytes, a deadline, something on the desk.
    async fn step(&mut self, desk: Option<&Desk>) -> Result<Step, kernel::Interrupt> {
        enum Event {
            Read(io::Result<usize>),
            Wrote(io::Result<usize>),
            Woken(Result<(), kernel::Interrupt>),
        }
        let Self {
            link,
            source,
            socket,
            chunk,
            ..
        } = self;
        let deadline = link.deadline();
        let event = {
            let (output, mut socket_in, mut socket_out) = (link.output(), &*socket, &*socket);
            let mut read = pin!(source.ready_op(Direction::Read, || socket_in.read(chunk)));
            let mut write = pin!(source.ready_op(Direction::Write, || socket_out.write(output)));
            let mut sleep = deadline.map(|at| Box::pin(kernel::sleep_until(at)));
            let mut sit = desk.map(|desk| Box::pin(sched_wait(&desk.lot, WaitKind::Custom)));
            poll_fn(|cx| {
                if desk.is_some_and(|desk| desk.next.borrow().is_some() || desk.leave.get()) {
                    return Poll::Ready(Event::Woken(Ok(())));
                }
                if let Some(Poll::Ready(woken)) = sit.as_mut().map(|sit| sit.as_mut().poll(cx)) {
                    return Poll::Ready(Event::Woken(woken));
                }
                if let Poll::Ready(read) = read.as_mut().poll(cx) {
                    return Poll::Ready(Event::Read(read));
                }
                if !output.is_empty()
                    && let Poll::Ready(wrote) = write.as_mut().poll(cx)
                {
                    return Poll::Ready(Event::Wrote(wrote));
                }
                if let Some(Poll::Ready(woken)) =
                    sleep.as_mut().map(|sleep| sleep.as_mut().poll(cx))
                {
                    return Poll::Ready(Event::Woken(woken.map(|_| ())));
                }
                Poll::Pending
            })
            .await
        };
        let failed = |error: io::Error| match kernel::MaybeInterrupt::interrupt(&error) {
            Some(interrupt) => Err(interrupt.clone()),
            None => Ok(Step::Closed(format!("socket: {error}"))),
        };
        match event {
            Event::Woken(woken) => {
                woken?;
                Ok(if deadline.is_some_and(|at| kernel::now() >= at) {
                    Step::Time
                } else {
                    Step::Desk
                })
            }
            Event::Read(Ok(0)) => Ok(Step::Closed(String::new())),
            Event::Read(Ok(n)) => match link.feed(&chunk[..n], kernel::now()) {
                Ok(said) => Ok(Step::Said(said)),
                Err(error) => Ok(Step::Closed(format!("broke the protocol: {error}"))),
            },
            Event::Wrote(Ok(n)) => {
                link.wrote(n);
                Ok(Step::Said(Vec::new()))
            }
            Event::Read(Err(error)) | Event::Wrote(Err(error)) => failed(error),
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Kills the process group and waits until the process is gone.
    async fn bury(mut self) -> End {
        let _ = rustix::process::kill_process_group(self.pid(), Signal::KILL);
        let status = reap(&mut self.process).await;
        self.buried = true;
        let pipes = std::mem::take(&mut self.output);
        let _ = kernel::ignore_after(LAST_WORDS_WITHIN, async {
            for pipe in &pipes {
                pipe.wait().await?;
            }
            Ok::<(), kernel::Interrupt>(())
        })
        .await;
        for pipe in &pipes {
            pipe.abort();
        }
        let lines: Vec<String> = self.stderr.borrow_mut().drain(..).collect();
        End {
            how: status.map_or_else(|e| e.to_string(), describe),
            last_words: lines.join("\n"),
        }
    }

    /// Says bye and waits for the exit, for a while.
    async fn dismiss(mut self) {
        self.link.dismiss();
        let left = kernel::ignore_after(BYE_WITHIN, async {
            while !matches!(self.step(None).await?, Step::Closed(_)) {}
            Ok::<(), kernel::Interrupt>(())
        });
        let _ = left.await;
        let _ = self.bury().await;
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.buried {
            let _ = rustix::process::kill_process_group(self.pid(), Signal::KILL);
            let _ = self.process.try_wait();
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// Waits for a process that is about to end, without blocking the kernel.
async fn reap(process: &mut std::process::Child) -> io::Result<ExitStatus> {
    #[cfg(target_os = "linux")]
    if let Ok(pidfd) = rustix::process::pidfd_open(
        Pid::from_child(process),
        rustix::process::PidfdFlags::empty(),
    ) {
        kernel::traps::read_wait(&pidfd).await?;
        return process.wait(); // does not block: a pidfd is readable when the process has ended
    }
    loop {
        if let Some(status) = process.try_wait()? {
            return Ok(status);
        }
        kernel::sleep(Duration::from_millis(5)).await?;
    }
}

/// Passes a child's output on to the log, line by line, with the task that runs.
async fn relay(
    pipe: OwnedFd,
    name: &'static str,
    pid: u32,
    running: Rc<RefCell<String>>,
    keep: Option<Rc<RefCell<VecDeque<String>>>>,
) {
    if rustix::io::ioctl_fionbio(&pipe, true).is_err() {
        return;
    }
    let source = Source::new(&pipe);
    let mut lines = Lines::default();
    let mut chunk = [0; 4096];
    loop {
        let read = source
            .ready_op(Direction::Read, || Ok(rustix::io::read(&pipe, &mut chunk)?))
            .await;
        let n = read.unwrap_or(0);
        lines.push(&chunk[..n], &mut |line| {
            let line = String::from_utf8_lossy(line);
            log::info!(target: "olive::worker", "{name} pid={pid} tid={} {line}", running.borrow());
            if let Some(keep) = &keep {
                let mut keep = keep.borrow_mut();
                if keep.len() == LAST_WORDS {
                    keep.pop_front();
                }
                keep.push_back(crate::message::head(&line, 1024).to_owned());
            }
        });
        if n == 0 {
            return;
        }
    }
}

/// Cuts output into lines, each bounded.
#[derive(Debug, Default)]
struct Lines {
    line: Vec<u8>,
    dropped: usize,
}

impl Lines {
    /// Takes bytes; an empty slice is the end, which ends an unfinished line too.
    fn push(&mut self, bytes: &[u8], each: &mut dyn FnMut(&[u8])) {
        for part in bytes.split_inclusive(|b| *b == b'\n') {
            let (text, ends) = part
                .strip_suffix(b"\n")
                .map_or((part, false), |text| (text, true));
            let room = MAX_LINE - self.line.len();
            self.line.extend_from_slice(&text[..text.len().min(room)]);
            self.dropped += text.len().saturating_sub(room);
            if ends {
                self.end(each);
            }
        }
        if bytes.is_empty() && !self.line.is_empty() {
            self.end(each);
        }
    }

    fn end(&mut self, each: &mut dyn FnMut(&[u8])) {
        if self.dropped > 0 {
            self.line
                .extend_from_slice(format!(" … {} bytes more", self.dropped).as_bytes());
        }
        each(&self.line);
        self.line.clear();
        self.dropped = 0;
    }
}

/// Starts a child that holds `socket` and nothing else of ours.
fn spawn(program: &Program, socket: OwnedFd) -> io::Result<std::process::Child> {
    // Clear of the descriptors that the standard library uses between fork and exec.
    let socket = rustix::io::fcntl_dupfd_cloexec(&socket, 10)?;
    let mut command = match program {
        Program::Python(python) => {
            let mut command = Command::new(python);
            command.args(["-u", "-"]).stdin(source()?);
            command
        }
        Program::Myself => {
            let mut command = Command::new(std::env::current_exe()?);
            command
                .args(std::env::args_os().skip(1))
                .stdin(Stdio::null());
            command
        }
    };
    let fd = socket.as_raw_fd();
    command
        .env(FD_VARIABLE, fd.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // A group of its own: Ctrl-C in the terminal does not reach it, and its children die with it.
    command.process_group(0);
    let app = rustix::process::getpid();
    let prepare = move || {
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty())?;
        #[cfg(target_os = "linux")]
        {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            if rustix::process::getppid() != Some(app) {
                return Err(rustix::io::Errno::SRCH.into());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. `prepare` makes three plain
    // system calls and does not allocate.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// The Python worker's source as a readable end of a pipe, written already.
fn source() -> io::Result<OwnedFd> {
    let (read, mut write) = io::pipe()?;
    // Less than a pipe holds, so that this does not wait for a reader.
    write.write_all(PYTHON_WORKER.as_bytes())?;
    Ok(read.into())
}

/// In a program that was started as a worker process: serves tasks until the app goes or says bye, then `Some`. Else `None`.
///
/// # Errors
/// Those of the socket.
pub fn serve_if_child(registry: &Registry) -> Option<io::Result<()>> {
    let fd: RawFd = std::env::var(FD_VARIABLE).ok()?.parse().ok()?;
    let serve = || {
        let socket = inherited(fd)?;
        let stop = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGUSR1, stop.clone())?;
        let watched = socket.try_clone()?;
        std::thread::Builder::new()
            .name("olive-watch".into())
            .spawn(move || leave_with_the_app(&watched))?;
        serve(registry, &socket, &stop)
    };
    Some(serve())
}

/// Ends this process when the app is gone, even while a task runs: nobody is left to tell the result to.
fn leave_with_the_app(socket: &UnixStream) {
    use rustix::event::{PollFd, PollFlags, poll};
    loop {
        // Asks for nothing, so that only the hang-up is reported.
        let mut fds = [PollFd::new(socket, PollFlags::empty())];
        if poll(&mut fds, None).is_ok()
            && fds[0]
                .revents()
                .intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL)
        {
            std::process::exit(0);
        }
    }
}

fn inherited(fd: RawFd) -> io::Result<UnixStream> {
    // SAFETY: the app that started this process opened `fd` for it, names it in the environment for nobody else, and this is called
    // once, at the start, so nothing else owns it. A number that is not open is noticed by the next call.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::TaskMessage;
    use std::path::PathBuf;

    // A folder with a Python module of its own name; removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(tasks: &str) -> Self {
            let path = std::env::temp_dir().join(format!("olive-{}", uuid::Uuid::new_v4()));
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("proj.py"), tasks).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn pool(folder: &Folder, size: usize) -> ProcessPool {
        let mut config = Config::default();
        config.set("olive_worker_allow", "proj").unwrap();
        config
            .set("olive_worker_path", folder.0.to_str().unwrap())
            .unwrap();
        ProcessPool::new(Program::Python("python3".into()), size, &config)
    }

    fn task(func: &str, args: &str, timeout: Option<Duration>) -> Task {
        let body = format!(r#"{{"func":"proj.{func}","args":{args},"tid":"t"}}"#);
        let message = Arc::new(TaskMessage::decode(body.into_bytes()).unwrap());
        Task {
            message,
            attempt: 1,
            timeout,
            soft: None,
        }
    }

    fn done(text: &str) -> Outcome {
        Outcome::Done(text.as_bytes().to_vec())
    }

    fn alive(pid: &str) -> bool {
        // A zombie has ended: only its parent has not looked yet.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| !rest.trim_start().starts_with('Z') && !rest.is_empty())
    }

    /// Accepts: seed/process_worker, seed/python_import_path
    #[test]
    fn tasks_run_in_python_children_side_by_side() {
        let folder =
            Folder::new("import os, time\ndef pid(s): time.sleep(s); return os.getpid()\n");
        kernel::run(async {
            let pool = pool(&folder, 3);
            pool.warm_up().await.unwrap();
            assert_eq!(pool.children(), 1);
            let tasks: Vec<_> = (0..6)
                .map(|_| {
                    let pool = pool.clone();
                    kernel::spawn(
                        async move { pool.run(task("pid", "[0.2]", None)).await.unwrap() },
                    )
                })
                .collect();
            let mut pids = std::collections::HashSet::new();
            for task in tasks {
                let Outcome::Done(pid) = task.join().await.unwrap() else {
                    panic!("a pid")
                };
                pids.insert(pid);
            }
            assert_eq!((pids.len(), pool.children()), (3, 3));
            pool.close().await.unwrap();
            assert_eq!(pool.children(), 0);
        })
        .unwrap();
    }

    #[test]
    fn a_child_that_dies_is_replaced_and_says_its_last_words() {
        let folder = Folder::new(
            "import os, signal, sys\ndef die():\n  print('so long', file=sys.stderr, flush=True)\n  os.kill(os.getpid(), signal.SIGKILL)\ndef add(a, b): return a + b\n",
        );
        kernel::run(async {
            let pool = pool(&folder, 1);
            let lost = pool.run(task("die", "[]", None)).await.unwrap();
            assert_eq!(
                lost,
                Outcome::Lost {
                    how: "killed by signal 9".into(),
                    last_words: "so long".into()
                }
            );
            assert_eq!(
                pool.run(task("add", "[40, 2]", None)).await.unwrap(),
                done("42")
            );
            assert_eq!(pool.restarts(), 1);
        })
        .unwrap();
    }

    /// Accepts: limits/soft_hard
    #[test]
    fn a_task_that_does_not_end_is_killed_with_its_grandchildren() {
        let folder = Folder::new(
            "import ctypes, signal, subprocess\ndef stuck(path):\n  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n  p = subprocess.Popen(['sleep', '600'])\n  open(path, 'w').write(str(p.pid))\n  ctypes.PyDLL(None).sleep(600)\ndef add(a, b): return a + b\n",
        );
        let note = folder.0.join("grandchild");
        kernel::run(async {
            let pool = pool(&folder, 1);
            let limit = Duration::from_millis(1000);
            let path = serde_json::to_string(&[note.to_str().unwrap()]).unwrap();
            let outcome = pool.run(task("stuck", &path, Some(limit))).await.unwrap();
            assert_eq!(outcome, Outcome::TimedOut { limit });
            let grandchild = std::fs::read_to_string(&note).expect("the task had begun");
            let gone = kernel::ignore_after(Duration::from_secs(60), async {
                while alive(&grandchild) {
                    kernel::sleep(Duration::from_millis(5)).await?;
                }
                Ok::<(), kernel::Interrupt>(())
            });
            assert_eq!(gone.await, Ok(Some(())));
            assert_eq!(
                pool.run(task("add", "[1, 1]", None)).await.unwrap(),
                done("2")
            );
        })
        .unwrap();
    }

    #[test]
    fn a_task_whose_time_is_up_takes_its_child_along_unless_a_soft_limit_was_set() {
        let folder = Folder::new(
            "import os, time\ndef slow(): time.sleep(600)\ndef pid(): return os.getpid()\n",
        );
        kernel::run(async {
            let pool = pool(&folder, 1);
            let before = pool.run(task("pid", "[]", None)).await.unwrap();
            let limit = Duration::from_millis(300);
            let soft = Task {
                soft: Some(limit),
                ..task("slow", "[]", None)
            };
            assert_eq!(pool.run(soft).await.unwrap(), Outcome::TimedOut { limit });
            let after = pool.run(task("pid", "[]", None)).await.unwrap();
            assert_eq!((&after, pool.restarts()), (&before, 0));
            let hard = task("slow", "[]", Some(limit));
            assert_eq!(pool.run(hard).await.unwrap(), Outcome::TimedOut { limit });
            let after = pool.run(task("pid", "[]", None)).await.unwrap();
            assert!(after != before && pool.restarts() == 1);
        })
        .unwrap();
    }

    #[test]
    fn large_bodies_and_results_pass_both_ways_at_once() {
        let folder = Folder::new("def echo(x): return x\n");
        kernel::run(async {
            let pool = pool(&folder, 2);
            let text = format!("[\"{}\"]", "x".repeat(16 << 20));
            for _ in 0..2 {
                let outcome = pool.run(task("echo", &text, None)).await.unwrap();
                assert!(matches!(outcome, Outcome::Done(result) if result.len() == text.len() - 2));
            }
        })
        .unwrap();
    }

    #[test]
    fn a_child_that_cannot_start_says_why() {
        let folder = Folder::new("raise RuntimeError('broken at import')\n");
        kernel::run(async {
            let mut config = Config::default();
            let missing =
                ProcessPool::new(Program::Python("/nonexistent/python".into()), 1, &config);
            let text = missing.warm_up().await.unwrap_err().to_string();
            assert!(
                text.contains(
                    "cannot start /nonexistent/python (olive_worker_python): No such file"
                ),
                "{text}"
            );
            config.set("olive_worker_preload", "proj").unwrap();
            config
                .set("olive_worker_path", folder.0.to_str().unwrap())
                .unwrap();
            let broken = ProcessPool::new(Program::Python("python3".into()), 1, &config);
            let text = broken.warm_up().await.unwrap_err().to_string();
            assert!(
                text.contains("proj.py\", line 1") && text.contains("broken at import"),
                "{text}"
            );
            let other = ProcessPool::new(Program::Python("false".into()), 1, &config);
            let text = other.warm_up().await.unwrap_err().to_string();
            assert_eq!(text, "worker process does not start: exit status 1");
        })
        .unwrap();
    }

    #[test]
    fn a_line_of_output_is_bounded_and_the_rest_counted() {
        let mut lines = Lines::default();
        let mut got: Vec<Vec<u8>> = Vec::new();
        for part in [
            b"a\nb".as_slice(),
            b"c\n\n",
            &[b'x'; MAX_LINE + 5],
            b"yz\nend",
            b"",
        ] {
            lines.push(part, &mut |line| got.push(line.to_vec()));
        }
        assert_eq!(
            (&got[..3], got[4].as_slice()),
            (
                [b"a".to_vec(), b"bc".to_vec(), b"".to_vec()].as_slice(),
                b"end".as_slice()
            )
        );
        assert!(got[3].ends_with("x … 7 bytes more".as_bytes()));
    }

    #[test]
    fn the_python_worker_fits_into_a_pipe() {
        assert!(PYTHON_WORKER.len() < 64 * 1024);
    }
}
