//! The scripts of tests/python, run with the pinned clients.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::environment;

/// A command that runs a script of tests/python; arguments are added to it, then [`crate::Process::spawn`] starts it.
#[track_caller]
pub fn script(name: &str) -> Command {
    let mut command = Command::new(environment::python());
    command.arg("-u").arg(folder().join(name));
    command
}

/// The folder with the functions that the Python workers under test run.
pub fn modules() -> PathBuf {
    folder().join("modules")
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("python")
}
