//! The olive command, set up for one test.

use std::env;
use std::process::Command;

use crate::{Broker, Ended, Process, environment, modules, script, unique};

/// What `olive run` says once it consumes: from here on, a message that is published finds its queue.
const READY: &str = "ready";

/// Olive's settings for one test: the broker, and an exchange, a queue and a key that no other test has.
#[derive(Debug, Clone)]
pub struct Olive {
    settings: Vec<(String, String)>,
    url: String,
    exchange: String,
    key: String,
}

impl Olive {
    /// Settings for this broker: a further attempt comes soon, the rest is olive's defaults.
    pub fn on(broker: &Broker) -> Self {
        let (exchange, queue, key) = (unique("olive-x"), unique("olive-q"), unique("olive-k"));
        Self {
            settings: Vec::new(),
            url: String::new(),
            exchange: exchange.clone(),
            key: key.clone(),
        }
        .set("olive_amqp_exchange_name", &exchange)
        .set("olive_amqp_queue_name", &queue)
        .set("olive_amqp_routing_key", &key)
        .set("log_level", "info")
        .set("olive_retry_base", "10ms")
        .at(&broker.url())
    }

    /// Another way to the broker.
    #[must_use]
    pub fn at(mut self, url: &str) -> Self {
        url.clone_into(&mut self.url);
        self.set("olive_amqp_url", url)
    }

    /// One setting, by its environment name.
    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Olive's own names of exchange, queue and key; for one test alone, as they are not unique.
    #[must_use]
    pub fn with_default_names(mut self) -> Self {
        let names = [
            "olive_amqp_exchange_name",
            "olive_amqp_queue_name",
            "olive_amqp_routing_key",
        ];
        self.settings
            .retain(|(name, _)| !names.contains(&name.as_str()));
        "Olive.x".clone_into(&mut self.exchange);
        "Olive.k".clone_into(&mut self.key);
        self
    }

    /// `workers` Python processes that may run what tests/python/modules has.
    #[must_use]
    pub fn with_python_workers(self, workers: usize) -> Self {
        let modules = modules();
        self.set("olive_worker_worker_type", "process")
            .set("olive_worker_num_workers", &workers.to_string())
            .set(
                "olive_worker_python",
                &environment::python().to_string_lossy(),
            )
            .set("olive_worker_path", &modules.to_string_lossy())
            .set("olive_worker_allow", "jobs,olive.tasks")
    }

    /// A worker that consumes.
    #[track_caller]
    pub fn run(&self) -> Process {
        let process = Process::spawn(&mut self.command(&["run"]));
        process.wait_for_line(READY);
        process
    }

    /// Runs a command of olive's to its end.
    #[track_caller]
    pub fn call(&self, arguments: &[&str]) -> Ended {
        Process::spawn(&mut self.command(arguments)).ended()
    }

    /// A command of olive's with these settings and no others.
    #[track_caller]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(environment::olive());
        for (name, _) in env::vars_os() {
            if name.to_string_lossy().starts_with("olive_") {
                command.env_remove(name);
            }
        }
        command
            .args(arguments)
            .envs(self.settings.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Sweepea's own producer, sending to this exchange and key; arguments are added to it.
    #[track_caller]
    pub fn seed_producer(&self, arguments: &[&str]) -> Command {
        let mut command = script("seed_producer.py");
        command
            .args([
                "--url",
                &self.url,
                "--exchange",
                &self.exchange,
                "--key",
                &self.key,
            ])
            .args(arguments);
        command
    }
}
