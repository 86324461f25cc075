//! A program whose functions can be called in processes, good and bad ones. As a program of its own it does what its first argument says.

use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{self, Command};

use kernel::ProcessFn;
use rig::Gate;

/// Set: this program forgets to serve and, as a child as well, calls one of its functions. It names a file, which gets a byte from each that
/// is started; three are enough to see that there is no end.
const FORGETFUL: &str = "RIG_FORGETFUL_WORKER";

const FUNCTIONS: &[(&str, ProcessFn)] = &[
    ("square", square),
    ("length", |args| Ok(args.len().to_be_bytes().to_vec())),
    ("zeros", |args| Ok(vec![0; number(args)?])),
    ("pid", |_| Ok(process::id().to_be_bytes().to_vec())),
    ("panic", |args| panic!("{}", String::from_utf8_lossy(args))),
    ("exit", |args| process::exit(number(args)? as i32)),
    ("abort", |_| process::abort()),
    ("spin", spin),
    ("hold", hold),
    ("grandchild", grandchild),
    ("read_stdin", read_stdin),
    ("descriptors", descriptors),
    ("call_another", |args| call("square", args)),
];

fn main() {
    let outcome = if let Ok(path) = env::var(FORGETFUL) {
        forget(&path)
    } else {
        kernel::process_worker(FUNCTIONS);
        match env::args().nth(1).as_deref() {
            Some("square") => call("square", b"12"),
            Some("orphan") => orphan(),
            _ => Err("started as nobody's worker".into()),
        }
    };
    match outcome {
        Ok(said) => println!("{}", String::from_utf8_lossy(&said)),
        Err(error) => {
            eprintln!("{error}");
            process::exit(9);
        }
    }
}

/// As any program calls its own functions.
fn call(function: &str, args: &[u8]) -> Result<Vec<u8>, String> {
    let called = kernel::run(kernel::run_in_process(function, args));
    let outcome = called.map_err(|error| error.to_string())?;
    outcome.map_err(|error| error.to_string())
}

fn forget(path: &str) -> Result<Vec<u8>, String> {
    let file = File::options().append(true).create(true).open(path);
    let mut file = file.map_err(|error| error.to_string())?;
    file.write_all(b".").map_err(|error| error.to_string())?;
    if file.metadata().map_err(|error| error.to_string())?.len() >= 3 {
        return Err("there is no end of it".into());
    }
    call("square", b"12")
}

/// Has a child spin, says its number, and dies without any clean-up.
fn orphan() -> Result<Vec<u8>, String> {
    let gate = Gate::open();
    let spinning = kernel::run(async {
        drop(kernel::spawn(kernel::run_in_process(
            "spin",
            gate.port().to_string(),
        )));
        let visitor = kernel::run_in_thread(move || gate.next()).await.unwrap();
        println!("{}", visitor.pid);
        io::stdout().flush().unwrap();
        process::abort()
    });
    spinning.map_err(|error: kernel::RunError| error.to_string())
}

fn number(args: &[u8]) -> Result<usize, String> {
    let text = std::str::from_utf8(args).map_err(|error| error.to_string())?;
    text.parse()
        .map_err(|error| format!("{text:?} is no number: {error}"))
}

fn square(args: &[u8]) -> Result<Vec<u8>, String> {
    let n = number(args)?;
    Ok((n * n).to_string().into_bytes())
}

/// Comes to the gate, then keeps a processor busy for ever.
fn spin(port: &[u8]) -> Result<Vec<u8>, String> {
    let _gate = come_to_gate(port, process::id())?;
    loop {
        std::hint::spin_loop();
    }
}

/// Comes to the gate, and returns when it is let go.
fn hold(port: &[u8]) -> Result<Vec<u8>, String> {
    let mut gate = come_to_gate(port, process::id())?;
    let let_go = gate.read_exact(&mut [0]);
    let_go.map_err(|error| error.to_string())?;
    Ok(Vec::new())
}

/// Starts a child that sleeps, brings it to the gate and waits for it.
fn grandchild(port: &[u8]) -> Result<Vec<u8>, String> {
    let mut child = Command::new("sleep")
        .arg("600")
        .spawn()
        .map_err(|error| error.to_string())?;
    let _gate = come_to_gate(port, child.id())?;
    child.wait().map_err(|error| error.to_string())?;
    Ok(Vec::new())
}

/// Says at the gate that the process is there.
fn come_to_gate(port: &[u8], pid: u32) -> Result<TcpStream, String> {
    let port = number(port)? as u16;
    let mut gate =
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(|error| error.to_string())?;
    writeln!(gate, "{pid} here").map_err(|error| error.to_string())?;
    Ok(gate)
}

fn read_stdin(_: &[u8]) -> Result<Vec<u8>, String> {
    let mut input = Vec::new();
    let read = io::stdin().read_to_end(&mut input);
    read.map_err(|error| error.to_string())?;
    Ok(input)
}

/// What a program that the function starts has open, one a line.
fn descriptors(_: &[u8]) -> Result<Vec<u8>, String> {
    let listed = Command::new("ls").args(["-l", "/proc/self/fd"]).output();
    Ok(listed.map_err(|error| error.to_string())?.stdout)
}
