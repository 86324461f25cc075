//! The broker under test: an embedded one in a process of its own, or the RabbitMQ node that `tests/run` started.

use std::env;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use crate::{Process, Signal, environment};

/// A broker to run a test against. An embedded one is the test's own and ends with it; RabbitMQ is shared by all tests,
/// so what a test declares there has a [`unique`](crate::unique) name.
#[derive(Debug)]
pub struct Broker {
    address: SocketAddr,
    embedded: Option<Process>,
}

impl Broker {
    /// The broker that this run of the tests is about.
    #[track_caller]
    pub fn under_test() -> Self {
        match environment::broker().as_str() {
            "embedded" => Self::embedded(),
            url => Self {
                address: address_of(url),
                embedded: None,
            },
        }
    }

    /// A fresh embedded broker.
    #[track_caller]
    pub fn embedded() -> Self {
        let process = Process::spawn(&mut Command::new(broker_binary()));
        let line = process.wait_for_line("listening on ");
        let address = line
            .rsplit(' ')
            .next()
            .and_then(|address| address.parse().ok());
        let address = address.unwrap_or_else(|| panic!("no address in {line:?}"));
        Self {
            address,
            embedded: Some(process),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its URL, with a login that it accepts.
    pub fn url(&self) -> String {
        url("guest", self.address)
    }

    /// Its URL through something else that listens, such as a [`Proxy`](crate::Proxy).
    pub fn url_through(&self, address: SocketAddr) -> String {
        url("guest", address)
    }

    /// Its URL with a password that it refuses.
    pub fn url_with_wrong_password(&self) -> String {
        url("wrong", self.address)
    }

    /// The process of an embedded broker.
    pub fn process_id(&self) -> Option<u32> {
        self.embedded.as_ref().map(Process::id)
    }

    /// How much there is of everything that an embedded broker holds for its clients, in words that are the same for the same. RabbitMQ holds
    /// other tests' things as well.
    #[track_caller]
    pub fn holdings(&self) -> Option<String> {
        const ANSWER: &str = "it holds ";
        let process = self.embedded.as_ref()?;
        let before = process.lines();
        let before = before.iter().filter(|line| line.contains(ANSWER)).count();
        process.signal(Signal::USR1);
        process.wait_for_lines(ANSWER, before + 1).pop()
    }

    /// Panics that an embedded broker has told of; RabbitMQ's troubles are its own.
    pub fn complaints(&self) -> Vec<String> {
        let mut said = self.embedded.as_ref().map_or_else(Vec::new, Process::lines);
        said.retain(|line| line.contains("panicked"));
        said
    }

    /// Kills an embedded broker with all it holds.
    ///
    /// # Panics
    /// When RabbitMQ is under test: other tests use it.
    #[track_caller]
    pub fn kill(self) {
        self.embedded
            .expect("only a broker of the test's own may be killed")
            .kill();
    }
}

fn url(password: &str, address: SocketAddr) -> String {
    format!("amqp://guest:{password}@{address}/%2F")
}

#[track_caller]
fn address_of(url: &str) -> SocketAddr {
    let host = url
        .strip_prefix("amqp://guest:guest@")
        .and_then(|rest| rest.split('/').next());
    host.and_then(|host| host.parse().ok())
        .unwrap_or_else(|| panic!("not like amqp://guest:guest@127.0.0.1:5672/%2F: {url}"))
}

/// Cargo builds the binaries of a package beside its test executables, one folder up.
fn broker_binary() -> PathBuf {
    let test = env::current_exe().expect("a running program has a path");
    let folder = test
        .parent()
        .and_then(|deps| deps.parent())
        .expect("test executables are in target/<profile>/deps");
    folder.join("embedded-broker")
}
