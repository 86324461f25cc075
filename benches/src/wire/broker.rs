//! The RabbitMQ of the AMQP benches: one that is given, or a private node on free ports that lives as long as the run.

use crate::harness::Error;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::env;
use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const URL: &str = "BENCHES_AMQP_URL";
const PID: &str = "BENCHES_AMQP_PID";

pub(crate) struct Broker {
    pub(crate) url: String,
    /// The broker's process, if it is on this machine and known: then its CPU is a figure too.
    pub(crate) pid: Option<u32>,
    /// Kept for its `Drop`.
    _node: Option<Node>,
}

impl Broker {
    /// The broker at `url`, or, without one, a node of our own.
    pub(crate) fn at_or_private(url: Option<String>) -> Result<Self, Error> {
        match url {
            Some(url) => Ok(Self {
                url,
                pid: None,
                _node: None,
            }),
            None => {
                let node = Node::start()?;
                Ok(Self {
                    url: format!("amqp://guest:guest@127.0.0.1:{}/%2f", node.port),
                    pid: Some(node.server.id()),
                    _node: Some(node),
                })
            }
        }
    }

    /// What [`Broker::from_env`] reads in a measuring process.
    pub(crate) fn to_env(&self) -> Vec<(&'static str, String)> {
        let mut env = vec![(URL, self.url.clone())];
        env.extend(self.pid.map(|pid| (PID, pid.to_string())));
        env
    }

    pub(crate) fn from_env() -> Result<Self, Error> {
        Ok(Self {
            url: env::var(URL)?,
            pid: env::var(PID).ok().and_then(|pid| pid.parse().ok()),
            _node: None,
        })
    }
}

/// A RabbitMQ node with its own directory, cookie, ports and port mapper, so that it meets no other node of the machine.
struct Node {
    server: Child,
    port: u16,
    mapper_port: u16,
    folder: PathBuf,
}

/// Debian's `rabbitmq-server` in the path changes the user and drops the environment; the script behind it does not.
const SCRIPTS: [&str; 2] = ["/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server"];
const START_LIMIT: Duration = Duration::from_secs(60);

impl Node {
    fn start() -> Result<Self, Error> {
        let script = SCRIPTS
            .into_iter()
            .find(|script| Path::new(script).exists())
            .unwrap_or(SCRIPTS[1]);
        let folder = env::temp_dir().join(format!("sweepea-benches-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let [port, dist_port, mapper_port] = free_ports()?;
        let log = File::create(folder.join("output"))?;
        let server = Command::new(script)
            // Makes the script become the node, so that the child's pid is the broker's.
            .env("RUNNING_UNDER_SYSTEMD", "1")
            .env("HOME", &folder)
            .env("ERL_EPMD_PORT", mapper_port.to_string())
            .env("RABBITMQ_NODENAME", "benches@localhost")
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODE_PORT", port.to_string())
            .env("RABBITMQ_DIST_PORT", dist_port.to_string())
            .env("RABBITMQ_MNESIA_BASE", folder.join("mnesia"))
            .env("RABBITMQ_LOG_BASE", folder.join("log"))
            .env("RABBITMQ_PID_FILE", folder.join("pid"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", folder.join("plugins"))
            .env("RABBITMQ_CONFIG_FILE", folder.join("none"))
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|error| {
                format!(
                    "cannot start {script}: {error}; install rabbitmq-server or give --amqp URL"
                )
            })?;
        let mut node = Self {
            server,
            port,
            mapper_port,
            folder,
        };
        node.wait()?;
        Ok(node)
    }

    /// Until the node listens, which RabbitMQ does last.
    fn wait(&mut self) -> Result<(), Error> {
        let begin = Instant::now();
        loop {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return Ok(());
            }
            let output = || self.folder.join("output");
            if let Some(status) = self.server.try_wait()? {
                let text = std::fs::read_to_string(output()).unwrap_or_default();
                return Err(format!("RabbitMQ ended with {status}: {}", text.trim()).into());
            }
            if begin.elapsed() > START_LIMIT {
                return Err(format!("RabbitMQ does not listen on port {}", self.port).into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Nothing here can be reported to anyone; what fails leaves a process or a folder in the temporary directory.
        let pid = Pid::from_raw(self.server.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        let _ = self.server.wait();
        let _ = Command::new("epmd")
            .env("ERL_EPMD_PORT", self.mapper_port.to_string())
            .arg("-kill")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Ports that are free now, all held at once so that they differ.
fn free_ports<const N: usize>() -> Result<[u16; N], Error> {
    let mut listeners = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}
