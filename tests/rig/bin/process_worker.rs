//! A program whose functions can be called in processes, good and bad ones. As a program of its own it does what its first argument says.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::process::{self, Command};
use std::time::Duration;
use std::{env, thread};

use kernel::ProcessFn;

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
    let (_, path) = marker()?;
    let spinning = kernel::run(async {
        let spin = kernel::spawn(kernel::run_in_process("spin", path.clone()));
        while fs::read(&path).is_ok_and(|pid| pid.is_empty()) {
            kernel::sleep(Duration::from_millis(1)).await.unwrap();
        }
        drop(spin);
        println!("{}", fs::read_to_string(&path).unwrap());
        io::stdout().flush().unwrap();
        fs::remove_file(&path).unwrap();
        process::abort()
    });
    spinning.map_err(|error: kernel::RunError| error.to_string())
}

fn marker() -> Result<(File, String), String> {
    let path = env::temp_dir().join(format!("rig-orphan-{}", process::id()));
    let file = File::create(&path).map_err(|error| error.to_string())?;
    Ok((file, path.to_string_lossy().into_owned()))
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

/// Writes its process number to the file, then keeps a processor busy for ever.
fn spin(path: &[u8]) -> Result<Vec<u8>, String> {
    say_pid(path, process::id())?;
    loop {
        std::hint::spin_loop();
    }
}

/// Writes its process number to the file, and returns when that is gone.
fn hold(path: &[u8]) -> Result<Vec<u8>, String> {
    say_pid(path, process::id())?;
    while fs::exists(&*String::from_utf8_lossy(path)).map_err(|error| error.to_string())? {
        thread::sleep(Duration::from_millis(1));
    }
    Ok(Vec::new())
}

/// Starts a child that sleeps, and waits for it.
fn grandchild(path: &[u8]) -> Result<Vec<u8>, String> {
    let mut child = Command::new("sleep")
        .arg("600")
        .spawn()
        .map_err(|error| error.to_string())?;
    say_pid(path, child.id())?;
    child.wait().map_err(|error| error.to_string())?;
    thread::sleep(Duration::from_secs(600));
    Ok(Vec::new())
}

/// All at once, so that nobody reads half a number.
fn say_pid(path: &[u8], pid: u32) -> Result<(), String> {
    fs::write(&*String::from_utf8_lossy(path), pid.to_string()).map_err(|error| error.to_string())
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
