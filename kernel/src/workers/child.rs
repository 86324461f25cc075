//! The child's side of calls in processes, and what the two sides say to each other.
//!
//! A child is the program itself, or another, with one end of a socket pair as its standard input. On it travel, all numbers big-endian,
//!
//! ```text
//! child    hello (8 bytes)                                       answer: u8 kind · u32 length · bytes     …
//! parent                     call: u32 limit · u32 length of the name · u32 length of the arguments · name · arguments
//! ```
//!
//! One call at a time. The end of the stream is the order to leave, and for the parent the sign of death. Nothing else needs to be passed on:
//! where the system has it, the child also asks to be killed when its parent's thread ends, as it may be deep in a function then.

use std::cell::Cell;
use std::env;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::process;

use rustix::fs::{FileType, fstat};
use rustix::io::fcntl_dupfd_cloexec;

use crate::error::{drop_quietly, panic_text};

/// A function that can be called in a process: arguments to result, or the text of an error. Both are bytes in an encoding of the program's own choice.
pub type ProcessFn = fn(&[u8]) -> Result<Vec<u8>, String>;

/// Makes a child of [`run_in_process`](crate::run_in_process) or a [`ProcessPool`](crate::ProcessPool) serve its calls, and does not return there. In every other process it returns
/// at once. So it belongs at the top of `main`, before threads are started and arguments are read.
///
/// `functions` are what can be called, by name. They run on the main thread, one at a time. Standard input is empty for them, what they write goes where
/// the parent's output goes.
///
/// ```standalone_crate
/// fn word_count(text: &[u8]) -> Result<Vec<u8>, String> {
///     let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
///     Ok(text.split_whitespace().count().to_be_bytes().to_vec())
/// }
///
/// fn main() {
///     kernel::process_worker(&[("word_count", word_count)]);
///
///     let counted = kernel::run(kernel::run_in_process("word_count", "as many as these")).unwrap();
///     assert_eq!(counted.unwrap(), 4_usize.to_be_bytes());
/// }
/// ```
pub fn process_worker(functions: &[(&str, ProcessFn)]) {
    if !is_worker() {
        return;
    }
    let code = match take_socket().and_then(|socket| serve(&socket, functions)) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("worker process {}: {error}", process::id());
            1
        }
    };
    process::exit(code);
}

/// Names the socket, by its inode, to the child that finds it as standard input. Children of that child may inherit the variable, but not the socket.
pub(super) const VARIABLE: &str = "SWEEPEA_WORKER_SOCKET";

/// Whether this process was started as a worker and has not begun to serve.
pub(super) fn is_worker() -> bool {
    env::var(VARIABLE).is_ok_and(|inode| socket_inode(io::stdin()).is_ok_and(|ours| ours == inode))
}

/// What [`VARIABLE`] says of a socket.
pub(super) fn socket_inode(socket: impl AsFd) -> io::Result<String> {
    let stat = fstat(socket)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(ErrorKind::InvalidInput.into());
    }
    Ok(stat.st_ino.to_string())
}

/// Moves the socket out of the way of functions that read standard input, and of the programs that they start.
fn take_socket() -> io::Result<UnixStream> {
    let socket = fcntl_dupfd_cloexec(io::stdin(), 3)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    Ok(socket.into())
}

fn serve(socket: &UnixStream, functions: &[(&str, ProcessFn)]) -> io::Result<()> {
    note_where_panics_happen();
    let (mut reader, mut writer) = (BufReader::new(socket), socket);
    writer.write_all(&HELLO)?;
    let mut head = [0; CALL_HEAD];
    loop {
        match reader.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
        let [limit, name, args] = numbers(head);
        let mut text = vec![0; name + args];
        reader.read_exact(&mut text)?;
        let (name, args) = text.split_at(name);
        writer.write_all(&answer(functions, name, args, limit))?;
    }
}

fn answer(functions: &[(&str, ProcessFn)], name: &[u8], args: &[u8], limit: usize) -> Vec<u8> {
    let Some((_, function)) = functions.iter().find(|(known, _)| known.as_bytes() == name) else {
        let known: Vec<_> = functions.iter().map(|(name, _)| *name).collect();
        return encode_answer(Kind::Unknown, known.join(", ").as_bytes(), limit);
    };
    PANICKED_AT.set(None);
    let (kind, said) = match catch_unwind(AssertUnwindSafe(|| function(args))) {
        Ok(Ok(value)) => (Kind::Value, value),
        Ok(Err(error)) => (Kind::Error, error.into_bytes()),
        Err(payload) => {
            let mut text = panic_text(&*payload).to_string();
            if let Some(place) = PANICKED_AT.take() {
                text = format!("{text} (at {place})");
            }
            drop_quietly(payload);
            (Kind::Panic, text.into_bytes())
        }
    };
    encode_answer(kind, &said, limit)
}

thread_local! {
    /// File and line of the last panic.
    static PANICKED_AT: Cell<Option<String>> = const { Cell::new(None) };
}

fn note_where_panics_happen() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        PANICKED_AT.set(info.location().map(ToString::to_string));
        report(info);
    }));
}

/// What a child says first: a program that is none is found out by it. The last byte is the version.
pub(super) const HELLO: [u8; 8] = *b"SWEEPEA\x01";
pub(super) const CALL_HEAD: usize = 12;
pub(super) const ANSWER_HEAD: usize = 5;

/// What an answer holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Value = 0,
    /// The function's error.
    Error = 1,
    /// What it panicked with.
    Panic = 2,
    /// There is no such function; the names of those that there are.
    Unknown = 3,
    /// The value is longer than the limit; its length, in decimal.
    TooLong = 4,
}

impl Kind {
    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Value),
            1 => Some(Self::Error),
            2 => Some(Self::Panic),
            3 => Some(Self::Unknown),
            4 => Some(Self::TooLong),
            _ => None,
        }
    }
}

/// `limit`: how long an answer's value may be. The sum of the lengths is below 2^32.
pub(super) fn encode_call(limit: u32, name: &str, args: &[u8]) -> Vec<u8> {
    let mut call = Vec::with_capacity(CALL_HEAD + name.len() + args.len());
    for number in [limit, name.len() as u32, args.len() as u32] {
        call.extend_from_slice(&number.to_be_bytes());
    }
    call.extend_from_slice(name.as_bytes());
    call.extend_from_slice(args);
    call
}

/// A value that is too long is replaced by its length, any other text is cut.
fn encode_answer(kind: Kind, said: &[u8], limit: usize) -> Vec<u8> {
    if kind == Kind::Value && said.len() > limit {
        return encode_answer(Kind::TooLong, said.len().to_string().as_bytes(), usize::MAX);
    }
    let said = &said[..said.len().min(limit)];
    let mut answer = Vec::with_capacity(ANSWER_HEAD + said.len());
    answer.push(kind as u8);
    answer.extend_from_slice(&(said.len() as u32).to_be_bytes());
    answer.extend_from_slice(said);
    answer
}

/// What an answer begins with: its kind, and how many bytes follow.
pub(super) fn decode_answer_head(head: [u8; ANSWER_HEAD]) -> io::Result<(Kind, usize)> {
    let [kind, length @ ..] = head;
    let Some(kind) = Kind::from_byte(kind) else {
        let text = format!("an answer of no known kind, {kind}");
        return Err(io::Error::new(ErrorKind::InvalidData, text));
    };
    Ok((kind, u32::from_be_bytes(length) as usize))
}

fn numbers(head: [u8; CALL_HEAD]) -> [usize; 3] {
    let (numbers, _) = head.as_chunks::<4>();
    [0, 1, 2].map(|at| u32::from_be_bytes(numbers[at]) as usize)
}
