//! A broker and an app in one process: nothing else need be installed.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use amqp::broker::{Config as BrokerConfig, Server};
use kernel::Task;
use kernel::net::TcpListener;
use kernel::signal::{SIGINT, SIGTERM, SignalQueue};

use crate::app::{App, Either, in_kernel, race, system};
use crate::config::{Config, Origin, Url};
use crate::error::Error;

/// How many ports are tried when the first one is taken.
const PORTS: u16 = 100;
/// How long other clients may take to leave.
const GOODBYE_WITHIN: Duration = Duration::from_secs(1);

/// A broker that runs inside this kernel.
#[derive(Debug)]
pub struct Embedded {
    /// Where it listens.
    pub address: SocketAddr,
    server: Server,
    task: Task<io::Result<()>>,
}

impl Embedded {
    /// Starts one on 127.0.0.1: at `port`, at the next free one if that is taken, at any if it is 0.
    ///
    /// # Errors
    /// [`Error::System`] if no port can be had.
    pub fn start(port: u16) -> Result<Self, Error> {
        let listener = listen(port)
            .map_err(|cause| system(&format!("listening on 127.0.0.1:{port}"), cause))?;
        let address = listener.local_addr();
        let address = address.map_err(|cause| system("listening", cause))?;
        let server = Server::new(BrokerConfig::default());
        let serving = server.clone();
        let task = kernel::spawn(async move { serving.serve(listener).await });
        task.set_name("embedded broker");
        Ok(Self {
            address,
            server,
            task,
        })
    }

    /// Its address with a login.
    #[must_use]
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@{}/%2F", self.address)
    }

    /// Messages that wait in its queues, or are out for delivery.
    #[must_use]
    pub fn messages(&self) -> usize {
        let queues = self.server.with(|broker, _| broker.queues());
        queues
            .iter()
            .map(|queue| queue.ready + queue.unsettled)
            .sum()
    }

    /// Messages in one of its queues, of either sort.
    #[must_use]
    pub fn messages_in(&self, name: &str) -> usize {
        let queues = self.server.with(|broker, _| broker.queues());
        let queue = queues.iter().find(|queue| queue.name == name);
        queue.map_or(0, |queue| queue.ready + queue.unsettled)
    }

    /// Asks all clients to leave, and waits a moment until they have.
    pub async fn stop(self) {
        let _ = kernel::ignore_after(GOODBYE_WITHIN, self.task.cancel()).await;
    }
}

fn listen(first: u16) -> io::Result<TcpListener> {
    let mut port = first;
    loop {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse
                    && port != 0
                    && port - first < PORTS
                    && port < u16::MAX =>
            {
                port += 1;
            }
            bound => return bound,
        }
    }
}

/// The port that `olive_amqp_url` asks for, if it names this machine.
fn port_of(config: &Config) -> Option<u16> {
    if config.origin("olive_amqp_url") == Origin::Default {
        return None;
    }
    let rest = config.amqp_url.0.split_once("://")?.1;
    let authority = rest.split(['/', '?']).next()?;
    let host = authority.rsplit('@').next()?;
    let (name, port) = host.rsplit_once(':')?;
    let is_here = matches!(name, "localhost" | "127.0.0.1" | "[::1]");
    port.parse().ok().filter(|_| is_here)
}

/// Runs a broker and an app until SIGTERM or Ctrl-C. `say` gets what a user wants to know once both are there.
///
/// # Errors
/// As [`App::start`].
pub fn dev(mut app: App, port: Option<u16>, say: impl FnOnce(&str)) -> Result<(), Error> {
    if let Some(served) = app.serve_if_child() {
        return served;
    }
    in_kernel(async move {
        let signals = SignalQueue::new(&[SIGTERM, SIGINT])
            .map_err(|cause| system("watching for signals", cause))?;
        let wanted = port.or_else(|| port_of(app.config())).unwrap_or(5672);
        let broker = Embedded::start(wanted)?;
        let at = broker.address.port();
        app.set_broker(Url(broker.url()), "embedded");
        let app = match race(app.launch(), signals.next()).await {
            Either::Left(launched) => launched?,
            Either::Right(_) => return Ok(()),
        };
        let moved = match wanted {
            0 => String::new(),
            wanted if wanted == at => String::new(),
            wanted => format!("   (port {wanted} is taken)"),
        };
        let setting = match at {
            5672 => String::new(),
            _ => format!("olive_amqp_url={} ", broker.url()),
        };
        say(&format!(
            "broker   {}{moved}\nsubmit   {setting}olive submit olive.tasks.sleep_n 1 --wait\nstop     kill {}   (or Ctrl-C)",
            broker.url(),
            std::process::id(),
        ));
        let left = app.until(&signals).await;
        if left.is_ok() {
            let messages = broker.messages();
            if messages > 0 {
                log::warn!("{messages} messages end with this broker, which keeps them in memory");
            }
            broker.stop().await;
        }
        left
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_of_the_settings_counts_if_it_is_one_of_this_machine() {
        let port = |url: &str| {
            let mut config = Config::default();
            config.set("olive_amqp_url", url).unwrap();
            port_of(&config)
        };
        assert_eq!(port("amqp://127.0.0.1:0"), Some(0));
        assert_eq!(
            port("amqp://guest:guest@localhost:5673/%2F?heartbeat=3"),
            Some(5673)
        );
        assert_eq!(port("amqp://localhost/v"), None);
        assert_eq!(port("amqp://me:1234@rabbit:5673/"), None);
        assert_eq!(port_of(&Config::default()), None);
    }

    #[test]
    fn a_port_that_is_taken_is_passed_over() {
        kernel::run(async {
            let first = Embedded::start(0).unwrap();
            let second = Embedded::start(first.address.port()).unwrap();
            assert_ne!(first.address, second.address);
            assert!(first.address.ip().is_loopback() && second.address.ip().is_loopback());
        })
        .unwrap();
    }
}
