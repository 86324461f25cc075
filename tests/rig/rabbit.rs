//! RabbitMQ nodes of a test's own, one or a cluster, to be killed, stopped, started again and put under pressure.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{Deadline, Process, environment};

/// For every wait here. A node takes some seconds and the tools half as long; on a machine that does much else, many times that.
const START: Duration = Duration::from_secs(300);

/// Nodes that know each other and nobody else: their own names, ports, port mapper, cookie, data and logs, on the loopback interface alone.
///
/// Every method blocks its thread until it is done, for seconds. Dropping it kills them all; what they logged stays in the folder `.cache` if the test is failing.
#[derive(Debug)]
pub struct Rabbit {
    dir: PathBuf,
    mapper_port: u16,
    nodes: Vec<Node>,
    _mapper: Process,
}

#[derive(Debug)]
struct Node {
    name: String,
    port: u16,
    distribution_port: u16,
    /// `None` while it is down.
    process: Mutex<Option<Process>>,
}

impl Rabbit {
    /// One node.
    #[track_caller]
    pub fn start() -> Self {
        Self::cluster(1)
    }

    /// `count` nodes that have found each other.
    #[track_caller]
    pub fn cluster(count: usize) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        // The process id last: whoever tidies up sees by it whether the folder is in use.
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("../.cache/rabbitmq-own{serial}-{pid}"));
        fs::create_dir_all(&dir).expect("a folder can be made beside the sources");
        let dir = dir.canonicalize().expect("it was made a moment ago");

        // All at once, so that no two are the same.
        let ports = free_ports(1 + 2 * count);
        let nodes = (0..count).map(|n| Node {
            name: format!("own{serial}n{n}-{pid}@127.0.0.1"),
            port: ports[1 + 2 * n],
            distribution_port: ports[2 + 2 * n],
            process: Mutex::default(),
        });
        let nodes: Vec<_> = nodes.collect();
        // Started by hand, because the one that a node starts for itself is a daemon that outlives it.
        let mapper = ["-port", &ports[0].to_string(), "-address", "127.0.0.1"];
        let rabbit = Self {
            _mapper: Process::spawn(Command::new("epmd").args(mapper)),
            mapper_port: ports[0],
            nodes,
            dir,
        };
        rabbit.configure();
        for n in 0..count {
            rabbit.launch(n);
        }
        for n in 0..count {
            rabbit.wait_until_up(n);
        }
        rabbit
    }

    /// Where a node listens for clients.
    pub fn address(&self, n: usize) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.nodes[n].port).into()
    }

    /// The name that a node has among the others.
    pub fn name(&self, n: usize) -> &str {
        &self.nodes[n].name
    }

    /// The URL of all nodes.
    pub fn url(&self) -> String {
        let hosts: Vec<_> = (0..self.nodes.len())
            .map(|n| self.address(n).to_string())
            .collect();
        format!("amqp://guest:guest@{}/%2F", hosts.join(","))
    }

    /// Kills a node as the kernel would.
    #[track_caller]
    pub fn kill(&self, n: usize) {
        let process = self.process(n).take();
        process.expect("the node runs").kill();
    }

    /// Tells a node to stop in good order, and waits until it has.
    #[track_caller]
    pub fn stop(&self, n: usize) {
        let process = self.process(n).take().expect("the node runs");
        process.signal(crate::Signal::TERM);
        process.ended_by(Deadline::after(START));
    }

    /// Starts a node that was killed or stopped, with the data it had.
    #[track_caller]
    pub fn restart(&self, n: usize) {
        self.launch(n);
        self.wait_until_up(n);
    }

    /// Runs `rabbitmqctl` against a node, and answers with what it said.
    #[track_caller]
    pub fn control(&self, n: usize, arguments: &[&str]) -> String {
        let mut command = self.command("rabbitmqctl", &self.nodes[n]);
        // The tool waits for answers as long as this, in seconds.
        let patience = START.as_secs().to_string();
        command
            .args(["-q", "-n", &self.nodes[n].name, "-l", "-t", &patience])
            .args(arguments);
        let ended = Process::spawn(&mut command).ended_by(Deadline::after(START));
        ended.expect_code(0).stdout
    }

    fn process(&self, n: usize) -> MutexGuard<'_, Option<Process>> {
        let process = self.nodes[n].process.lock();
        process.unwrap_or_else(PoisonError::into_inner)
    }

    fn configure(&self) {
        let mut all = String::from(
            "vm_memory_high_watermark.absolute = 1GB\n\
             disk_free_limit.absolute = 50MB\n\
             raft.wal_max_size_bytes = 16777216\n\
             log.file = false\n\
             log.console = true\n\
             cluster_formation.peer_discovery_backend = classic_config\n",
        );
        for (n, node) in self.nodes.iter().enumerate() {
            let n = n + 1;
            all += &format!(
                "cluster_formation.classic_config.nodes.{n} = {}\n",
                node.name
            );
        }
        for node in &self.nodes {
            let own = format!("{all}listeners.tcp.1 = 127.0.0.1:{}\n", node.port);
            self.put(&format!("{}.conf", node.name), &own);
        }
        self.put("enabled_plugins", "[].\n");
        self.put("env.conf", "");
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.dir.join(name), text).expect("a file can be written there");
    }

    fn launch(&self, n: usize) {
        let node = &self.nodes[n];
        let process = Process::spawn(&mut self.command("rabbitmq-server", node));
        *self.process(n) = Some(process);
    }

    #[track_caller]
    fn wait_until_up(&self, n: usize) {
        let process = self.process(n);
        let process = process.as_ref().expect("it was launched");
        let deadline = Deadline::after(START);
        process.wait_for_lines_by("Server startup complete", 1, deadline);
    }

    fn command(&self, program: &str, node: &Node) -> Command {
        let mut command = Command::new(environment::rabbitmq().join(program));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("RABBITMQ_") {
                command.env_remove(name);
            }
        }
        let of_node = |what: &str| self.dir.join(format!("{}{what}", node.name));
        command
            .current_dir(&self.dir)
            .env("HOME", &self.dir) // the cookie lives there
            .env("LANG", "C.UTF-8")
            .env("ERL_EPMD_PORT", self.mapper_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            // A long name with a number for a host, so that no host name has to resolve.
            .env("RABBITMQ_NODENAME", &node.name)
            .env("RABBITMQ_USE_LONGNAME", "true")
            .env("RABBITMQ_DIST_PORT", node.distribution_port.to_string())
            .env("RABBITMQ_CONF_ENV_FILE", self.dir.join("env.conf"))
            .env("RABBITMQ_CONFIG_FILE", of_node(".conf"))
            .env(
                "RABBITMQ_ENABLED_PLUGINS_FILE",
                self.dir.join("enabled_plugins"),
            )
            .env("RABBITMQ_MNESIA_BASE", of_node("-data"))
            .env("RABBITMQ_LOG_BASE", of_node("-log"))
            .env("RABBITMQ_PID_FILE", of_node("-pid"))
            .env("RUNNING_UNDER_SYSTEMD", "true") // makes the script become the node instead of watching over it
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none",
            );
        command
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        for n in 0..self.nodes.len() {
            drop(self.process(n).take());
        }
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

fn free_ports(count: usize) -> Vec<u16> {
    let bound = (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let bound: Vec<_> = bound.map(|socket| socket.expect("a free port")).collect();
    let port = |socket: &TcpListener| socket.local_addr().expect("a bound socket").port();
    bound.iter().map(port).collect()
}
