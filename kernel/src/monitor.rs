//! The side door: a thread that tells whoever connects what the kernel's tasks do (Curio's monitor).
//!
//! It is made with [`Builder::monitor`](crate::Builder::monitor) and speaks lines of text, so `telnet` or `nc` will do as a client; `examples/monitor.rs` is a nicer one.
//!
//! | command | answer |
//! |---|---|
//! | `ps [FROM]` | the tasks: number, state, steps, time left until a timeout and of a sleep, name; a thousand at a time, from number FROM on |
//! | `where ID` | what a task waits for, where it awaits that, and where it was spawned |
//! | `parents ID` | who spawned it, and who spawned that task, ... |
//! | `cancel ID` | cancels a task, as [`TaskRef::request_cancel`](crate::TaskRef::request_cancel) does |
//! | `signal NAME` | sends this process a signal, such as `SIGTERM` |
//! | `help`, `exit` | |
//!
//! It reads a board that the kernel keeps and asks the kernel nothing, so it answers also while a task spins and all others stand still, which is when one wants to
//! know. What a task does is shown as of the end of its last step. A cancellation alone must reach the kernel's thread, which sees to it between two steps.
//!
//! There is no password. It listens on this machine only, at a loopback address or a Unix socket; whoever may connect there can cancel tasks and
//! stop the process. A browser may connect, too, but is sent away after its first line, which is no command.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::process::{Signal, getpid, kill_process};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::runtime::{self, Board, InboxSender, Posted, Step};

/// A longer line ends the connection.
const LINE: usize = 256;
/// So many may be connected at a time.
const CLIENTS: usize = 8;
/// So many tasks are listed at a time.
const ROWS: usize = 1000;
/// How long a client may take to read an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it looks who runs, so that it can tell for how long.
const SAMPLE: Duration = Duration::from_millis(250);
/// How long it waits for the kernel to see to a cancellation, before it answers that this will take longer.
const GRACE: Duration = Duration::from_millis(500);
const PROMPT: &str = "kernel> ";

/// Where a monitor listens.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum MonitorAddress {
    /// A loopback address; port 0 stands for any that is free.
    Tcp(SocketAddr),
    /// A path that does not exist yet. It is removed when the kernel is dropped. Who may enter its folder may connect.
    Unix(PathBuf),
}

impl MonitorAddress {
    /// 127.0.0.1 and this port (Curio's is 48802), or any free port if it is 0.
    #[must_use]
    pub fn loopback(port: u16) -> Self {
        Self::Tcp((Ipv4Addr::LOCALHOST, port).into())
    }

    /// A listening socket there, and where "there" is.
    fn listen(&self) -> io::Result<(Socket, Self)> {
        let (domain, address) = match self {
            Self::Tcp(address) if !address.ip().is_loopback() => {
                let text = format!(
                    "a monitor has no password and listens on loopback only, not at {address}; reach it through a tunnel"
                );
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            Self::Tcp(address) => (Domain::for_address(*address), SockAddr::from(*address)),
            Self::Unix(path) => (Domain::UNIX, SockAddr::unix(path)?),
        };
        let listen = || {
            let listener = Socket::new(domain, Type::STREAM, None)?;
            if domain != Domain::UNIX {
                listener.set_reuse_address(true)?;
            }
            listener.bind(&address)?;
            listener.listen(8)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let explain =
            |error: io::Error| io::Error::new(error.kind(), format!("monitor at {self}: {error}"));
        let listener = listen().map_err(explain)?;
        let bound = match self {
            Self::Tcp(_) => listener.local_addr()?.as_socket().map(Self::Tcp),
            Self::Unix(_) => None,
        };
        Ok((listener, bound.unwrap_or_else(|| self.clone())))
    }
}

impl fmt::Display for MonitorAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// The monitor of a kernel. Dropping it closes its socket and its clients' connections, and waits for its threads.
pub(crate) struct Monitor {
    address: MonitorAddress,
    room: Arc<Room>,
    stop: mio::Waker,
    thread: Option<JoinHandle<()>>,
}

/// What the monitor's threads share.
struct Room {
    board: Arc<Board>,
    inbox: InboxSender,
    /// What the kernel's times count from; `None` if its clock is not the system's, so that nobody here can read it.
    epoch: Option<Instant>,
    /// The step that was seen last, and when it was seen first.
    seen: Mutex<(Option<Step>, Instant)>,
    clients: Mutex<Clients>,
}

#[derive(Default)]
struct Clients {
    connected: HashMap<u64, Arc<Socket>>,
    last: u64,
}

const LISTENER: Token = Token(0);
const STOP: Token = Token(1);

impl Monitor {
    pub(crate) fn start(
        address: &MonitorAddress,
        board: Arc<Board>,
        inbox: InboxSender,
        epoch: Option<Instant>,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        let stop = mio::Waker::new(poll.registry(), STOP)?;
        let (listener, address) = address.listen()?;
        poll.registry().register(
            &mut SourceFd(&listener.as_raw_fd()),
            LISTENER,
            Interest::READABLE,
        )?;
        let room = Arc::new(Room {
            board,
            inbox,
            epoch,
            seen: Mutex::new((None, Instant::now())),
            clients: Mutex::default(),
        });
        let thread = thread::Builder::new()
            .name("kernel-monitor".into())
            .spawn({
                let room = Arc::clone(&room);
                move || room.receive(poll, &listener)
            })?;
        log::info!("a monitor listens at {address}");
        Ok(Self {
            address,
            room,
            stop,
            thread: Some(thread),
        })
    }

    pub(crate) const fn address(&self) -> &MonitorAddress {
        &self.address
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Err(error) = self.stop.wake() {
            log::error!("the monitor at {} cannot be stopped: {error}", self.address);
            return;
        }
        for client in lock(&self.room.clients).connected.values() {
            let _ = client.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let MonitorAddress::Unix(path) = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Room {
    /// Lets clients in until it is told to stop. Those who are in have left when it returns.
    fn receive(&self, mut poll: Poll, listener: &Socket) {
        let mut events = Events::with_capacity(8);
        thread::scope(|scope| {
            loop {
                match poll.poll(&mut events, Some(SAMPLE)) {
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                        return log::error!("the monitor ends, its poller failed: {error}");
                    }
                    _ => {}
                }
                self.look();
                if events.iter().any(|event| event.token() == STOP) {
                    // Who came in after the others were sent away.
                    let clients = lock(&self.clients);
                    for client in clients.connected.values() {
                        let _ = client.shutdown(Shutdown::Both);
                    }
                    return;
                }
                while let Ok((client, _)) = listener.accept() {
                    let Some((number, client)) = self.admit(client) else {
                        continue;
                    };
                    let thread = thread::Builder::new().name("kernel-monitor".into());
                    let started = thread.spawn_scoped(scope, move || {
                        // A client that is gone needs no answer.
                        let _ = self.serve(&client);
                        lock(&self.clients).connected.remove(&number);
                    });
                    if started.is_err() {
                        lock(&self.clients).connected.remove(&number);
                    }
                }
            }
        });
    }

    fn admit(&self, client: Socket) -> Option<(u64, Arc<Socket>)> {
        client.set_nonblocking(false).ok()?;
        client.set_write_timeout(Some(PATIENCE)).ok()?;
        let mut clients = lock(&self.clients);
        if clients.connected.len() == CLIENTS {
            drop(clients);
            let text = format!("{CLIENTS} clients are connected already\n");
            let _ = (&client).write_all(text.as_bytes());
            return None;
        }
        clients.last += 1;
        let number = clients.last;
        let client = Arc::new(client);
        clients.connected.insert(number, Arc::clone(&client));
        Some((number, client))
    }

    /// Answers a client line by line.
    fn serve(&self, client: &Socket) -> io::Result<()> {
        // In one piece, as far as the system takes it: what is cut off by a reset need not be half a line.
        let say = |text: String| (&*client).write_all(text.as_bytes());
        let live = self.board.list(0, 0).1;
        say(format!(
            "kernel monitor, process {}: {live} tasks. Type help for commands.\n{PROMPT}",
            std::process::id()
        ))?;
        let mut input = BufReader::with_capacity(LINE, client);
        let mut line = Vec::new();
        let mut is_first = true;
        loop {
            line.clear();
            let most = LINE as u64;
            (&mut input).take(most).read_until(b'\n', &mut line)?;
            if line.is_empty() {
                return Ok(());
            }
            if line.len() == LINE && !line.ends_with(b"\n") {
                return say(format!("a line has at most {LINE} bytes\n"));
            }
            let text = String::from_utf8_lossy(&line);
            match self.answer(&text) {
                Answer::Text(text) => say(text + PROMPT)?,
                Answer::Goodbye => return Ok(()),
                Answer::Unknown if is_first => {
                    return say("not a command, so this is no client of ours\n".into());
                }
                Answer::Unknown => say(format!("not a command; try help\n{PROMPT}"))?,
            }
            is_first = false;
        }
    }

    fn answer(&self, line: &str) -> Answer {
        let words: Vec<_> = line.split_whitespace().collect();
        Answer::Text(match words[..] {
            [] => String::new(),
            ["help"] => HELP.to_owned(),
            ["exit" | "quit"] => return Answer::Goodbye,
            ["ps"] => self.ps(0),
            ["ps", from] => with_number(from, |from| self.ps(from)),
            ["where", task] => with_number(task, |task| self.whereabouts(task)),
            ["parents", task] => with_number(task, |task| self.parents(task)),
            ["cancel", task] => with_number(task, |task| self.cancel(task)),
            ["signal", name] => signal(name),
            [
                command @ ("ps" | "where" | "parents" | "cancel" | "signal" | "help"),
                ..,
            ] => {
                format!("{command} takes something else; try help\n")
            }
            _ => return Answer::Unknown,
        })
    }

    fn ps(&self, from: u64) -> String {
        let running = self.running();
        let (tasks, left) = self.board.list(from, ROWS);
        let mut text = format!(
            "{:>6}  {:<10} {:>9}  {:>9}  {:>9}  Name\n",
            "Task", "State", "Steps", "Timeout", "Sleep"
        );
        for task in &tasks {
            let time = |at: Option<u64>| {
                self.left(at)
                    .map_or_else(|| "-".into(), |left| format!("{left:.1?}"))
            };
            let name = match &task.name {
                Some(name) => format!("{name:?}"),
                None => format!("spawned at {}", task.spawned_at),
            };
            let is_running = running.as_ref().is_some_and(|(now, _)| now.id == task.id);
            let _ = writeln!(
                text,
                "{:>6}  {:<10} {:>9}  {:>9}  {:>9}  {name}",
                task.id,
                state(task, is_running),
                task.cycles,
                time(task.timeout),
                time(task.sleep),
            );
        }
        if left > 0 {
            let next = tasks.last().map_or(0, |task| task.id + 1);
            let _ = writeln!(text, "{left} more; ps {next} goes on");
        }
        match running {
            Some((task, since)) => {
                let _ = writeln!(
                    text,
                    "task {} runs now, without a break for at least {since:.1?}",
                    task.id
                );
            }
            None => text.push_str("no task runs now\n"),
        }
        text
    }

    fn whereabouts(&self, id: u64) -> String {
        let Some(task) = self.board.find(id) else {
            return nobody(id);
        };
        let mut text = format!("{}\n", describe(&task));
        let running = self.running().filter(|(now, _)| now.id == id);
        let _ = match (running, task.wait) {
            (Some((_, since)), _) => {
                writeln!(text, "  runs without a break for at least {since:.1?}")
            }
            _ if task.is_ready => writeln!(text, "  is ready to run"),
            (None, Some((kind, at))) => writeln!(text, "  waits for {kind:?} at {at}"),
            (None, None) => writeln!(text, "  waits in a foreign future"),
        };
        if task.others > 0 {
            let _ = writeln!(text, "  and {} more", task.others);
        }
        for (what, at) in [("sleep", task.sleep), ("timeout", task.timeout)] {
            if let Some(left) = self.left(at) {
                let _ = writeln!(text, "  {what} ends in {left:.1?}");
            }
        }
        if task.is_cancelled {
            text.push_str("  was cancelled\n");
        }
        text
    }

    fn parents(&self, id: u64) -> String {
        let Some(task) = self.board.find(id) else {
            return nobody(id);
        };
        let mut text = format!("{}\n", describe(&task));
        let (mut parent, mut depth) = (task.parent, 1);
        // A parent is older than its child, so this ends.
        while parent != 0 {
            let task = self.board.find(parent);
            let what = match &task {
                Some(task) => describe(task),
                None => format!("task {parent}, which has ended"),
            };
            let _ = writeln!(text, "{:1$}by {what}", "", depth * 2);
            depth += 1;
            parent = task.map_or(0, |task| task.parent);
        }
        text
    }

    /// Has the kernel's thread cancel a task.
    fn cancel(&self, id: u64) -> String {
        let Some(task) = self.board.find(id) else {
            return nobody(id);
        };
        let (sender, answer) = mpsc::channel();
        let is_sent = self.inbox.call(move || {
            let outcome = runtime::cancel_task(task.slot, id);
            let _ = sender.send(outcome);
        });
        if !is_sent {
            return "the kernel is gone\n".into();
        }
        match answer.recv_timeout(GRACE) {
            Ok(Some(true)) => format!("task {id} is cancelled\n"),
            Ok(Some(false)) => format!("task {id} was cancelled before\n"),
            Ok(None) => nobody(id),
            Err(mpsc::RecvTimeoutError::Disconnected) => "the kernel is gone\n".into(),
            Err(mpsc::RecvTimeoutError::Timeout) => match self.running() {
                Some((now, _)) => {
                    format!("task {id} will be cancelled once task {} lets go\n", now.id)
                }
                None => format!("task {id} will be cancelled once the kernel runs again\n"),
            },
        }
    }

    /// Notes which step runs.
    fn look(&self) -> Option<(Step, Duration)> {
        let mut seen = lock(&self.seen);
        let running = self.board.running();
        if seen.0 != running {
            *seen = (running, Instant::now());
        }
        running.map(|step| (step, seen.1.elapsed()))
    }

    /// Who runs, and since when at the latest.
    fn running(&self) -> Option<(Posted, Duration)> {
        let (step, since) = self.look()?;
        Some((self.board.task_of(step)?, since))
    }

    /// The time left until then.
    fn left(&self, at: Option<u64>) -> Option<Duration> {
        let at = self.epoch?.checked_add(Duration::from_nanos(at?))?;
        Some(at.saturating_duration_since(Instant::now()))
    }
}

enum Answer {
    Text(String),
    Unknown,
    Goodbye,
}

const HELP: &str = "\
ps [FROM]     the tasks, from number FROM on
where ID      what a task waits for, and where
parents ID    who spawned it
cancel ID     cancel it
signal NAME   send this process a signal, such as SIGTERM
exit          leave
";

fn with_number(word: &str, answer: impl FnOnce(u64) -> String) -> String {
    match word.parse() {
        Ok(number) => answer(number),
        Err(_) => format!("{word:?} is no number of a task\n"),
    }
}

fn nobody(id: u64) -> String {
    format!("there is no task {id}\n")
}

fn describe(task: &Posted) -> String {
    let name = task.name.as_ref().map(|name| format!(" {name:?}"));
    let name = name.unwrap_or_default();
    format!("task {}{name} spawned at {}", task.id, task.spawned_at)
}

fn state(task: &Posted, is_running: bool) -> String {
    match task.wait {
        _ if is_running => "RUNNING".into(),
        _ if task.is_ready => "READY".into(),
        Some((kind, _)) => format!("{kind:?}"),
        None => "Foreign".into(),
    }
}

/// Sends this process a signal by its name, with or without `SIG`.
fn signal(name: &str) -> String {
    let upper = name.to_ascii_uppercase();
    let wanted = upper.strip_prefix("SIG").unwrap_or(&upper);
    let named = |number: &i32| {
        let known = signal_hook::low_level::signal_name(*number);
        known.and_then(|known| known.strip_prefix("SIG")) == Some(wanted)
    };
    let Some(signal) = (1..32).find(named).and_then(Signal::from_named_raw) else {
        return format!("{name:?} is no signal\n");
    };
    match kill_process(getpid(), signal) {
        Ok(()) => format!("SIG{wanted} is sent\n"),
        Err(error) => format!("SIG{wanted} was not sent: {error}\n"),
    }
}

/// Nothing that runs under these locks leaves something half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
