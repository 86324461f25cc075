//! Olive beside other task queues: draining a queue that was filled before.
//!
//! The queue holds a stamp, 20,000 tasks that do nothing, and another stamp. A stamp is a task that is asked for its result; the time between
//! the two results is the time of the drain, and start-up does not count in it. At both ends the CPU clocks of the whole session are read: the
//! worker that was started, and every process below it.

use crate::harness::{Bench, Better, Error, Figure, Sample};
use crate::load::cpu_of;
use crate::wire::{Broker, Ours, on_kernel};
use amqp::client::{Cap, Consumer, Message, Publisher};
use amqp::wire::Properties;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const TASKS: u64 = 20_000;
/// Deliveries that a worker may hold; olive's default, and Celery's for 20 threads.
const PREFETCH: usize = 80;

pub(crate) fn benches() -> Vec<Bench> {
    vec![rust(), python()]
}

const FIGURES: &[Figure] = &[
    Figure {
        key: "rate",
        unit: "tasks/s",
        better: Better::More,
    },
    Figure {
        key: "cpu_ms",
        unit: "ms worker CPU / 1000",
        better: Better::Less,
    },
    Figure {
        key: "broker_ms",
        unit: "ms broker CPU / 1000",
        better: Better::Less,
    },
    Figure {
        key: "rss_mb",
        unit: "MB resident",
        better: Better::Less,
    },
    Figure {
        key: "start_s",
        unit: "s to the first result",
        better: Better::Less,
    },
];

fn rust() -> Bench {
    let about = "20,000 preloaded no-ops in Rust, results ignored";
    Bench::new("drain_rust", about, FIGURES)
        .on_all_cores()
        .with_broker()
        .ours_called("olive 20 threads", || {
            drain(&Olive(&[("olive_worker_num_workers", "20")]))
        })
        .ours_called("olive 2 processes", || {
            drain(&Olive(&[
                ("olive_worker_worker_type", "process"),
                ("olive_worker_num_workers", "2"),
            ]))
        })
}

fn python() -> Bench {
    let about = "20,000 preloaded no-ops in Python, results ignored";
    let bench = Bench::new("drain_python", about, FIGURES)
        .on_all_cores()
        .with_broker()
        .ours_called("olive 2 processes", || {
            drain(&Olive(&[
                ("olive_worker_allow", "olive.tasks"),
                ("olive_worker_num_workers", "2"),
            ]))
        });
    #[cfg(feature = "peers")]
    let bench = bench
        .peer("celery 20 threads", || {
            drain(&peers::Celery {
                pool: "threads",
                size: 20,
            })
        })
        .peer("celery 2 processes", || {
            drain(&peers::Celery {
                pool: "prefork",
                size: 2,
            })
        });
    bench
}

/// A task queue that takes part.
trait Contestant {
    /// The worker's command, to be run in `folder`, where it may put files.
    fn worker(&self, folder: &Path, queue: &str) -> Result<Command, Error>;

    /// A task that does nothing. Who is to get its result is `reply_to`, if anyone.
    async fn publish(
        &self,
        publisher: &Publisher,
        queue: &str,
        id: &str,
        reply_to: Option<&str>,
    ) -> Result<(), Error>;
}

/// `olive run` with these settings.
#[derive(Clone, Copy)]
struct Olive(&'static [(&'static str, &'static str)]);

impl Contestant for Olive {
    fn worker(&self, folder: &Path, queue: &str) -> Result<Command, Error> {
        let program = std::env::current_exe()?.with_file_name("olive");
        if !program.exists() {
            let program = program.display();
            let how = "cargo build --release -p sweepea-olive";
            return Err(format!("there is no {program}; build it: {how}").into());
        }
        std::fs::create_dir(folder.join("olive"))?;
        let tasks = "def do_nothing():\n    pass\n";
        std::fs::write(folder.join("olive/tasks.py"), tasks)?;
        let mut command = Command::new(program);
        command
            .arg("run")
            .env("log_level", "warn")
            .env("olive_amqp_url", Broker::from_env()?.url)
            .env("olive_amqp_queue_name", queue)
            .env("olive_amqp_exchange_name", queue)
            .env("olive_amqp_routing_key", queue)
            .env("olive_amqp_qos", PREFETCH.to_string())
            .env("olive_worker_path", folder)
            .envs(self.0.iter().copied());
        Ok(command)
    }

    async fn publish(
        &self,
        publisher: &Publisher,
        queue: &str,
        id: &str,
        reply_to: Option<&str>,
    ) -> Result<(), Error> {
        let body = format!(
            r#"{{"tid":"{id}","func":"olive.tasks.do_nothing","args":[],"kwargs":{{}},"timeout":-1}}"#
        );
        let properties = Properties {
            content_type: Some("application/json"),
            reply_to,
            ..Default::default()
        };
        let message = Message::new(body.as_bytes()).key(queue);
        // Not awaited one by one: that all are in the queue is seen at the end.
        drop(publisher.publish(message.properties(&properties)).await?);
        Ok(())
    }
}

const FIRST_RESULT_WITHIN: Duration = Duration::from_secs(60);
const LAST_RESULT_WITHIN: Duration = Duration::from_secs(300);
const GOES_BACK_WITHIN: Duration = Duration::from_secs(2);

/// Fills a queue, lets the contestant empty it, and makes sure that it did.
fn drain(contestant: &(impl Contestant + Copy + 'static)) -> Result<Sample, Error> {
    let contestant = *contestant;
    on_kernel(async move {
        let client = Ours::connect().await?;
        // As every contestant declares its own.
        let queue = client.declare_durable("drain").await?;
        let answers = client.declare("results").await?;
        let results = client.channel.consume(&answers).no_ack(Cap {
            count: 100,
            bytes: 1 << 20,
        });
        let mut results = results.start().await?;
        let id = |n: u64| format!("00000000-0000-4000-8000-{n:012}");
        let publisher = client.connection.publisher(Default::default()).await?;
        for n in 0..TASKS + 2 {
            let is_stamp = n == 0 || n == TASKS + 1;
            let reply_to = is_stamp.then_some(answers.as_str());
            contestant
                .publish(&publisher, &queue, &id(n), reply_to)
                .await?;
        }
        // RabbitMQ's counts overtake messages that are on their way to the queue; its confirms do not.
        publisher.flush().await?;
        let filled = client.messages(&queue).await?;
        assert_eq!(u64::from(filled), TASKS + 2, "the queue is not filled");

        let folder = Folder::create()?;
        let mut worker = contestant.worker(&folder.0, &queue)?;
        let begin = Instant::now();
        let mut session = Session(worker.spawn()?);
        let outcome = async {
            session.result(&mut results, FIRST_RESULT_WITHIN).await?;
            let (started, cpu, broker) = (Instant::now(), session.cpu()?, broker_cpu()?);
            session.result(&mut results, LAST_RESULT_WITHIN).await?;
            let drained = started.elapsed();
            let thousands = TASKS as f64 / 1000.0;
            let per_thousand = |time: Duration| time.as_secs_f64() * 1e3 / thousands;
            let mut sample = Sample::from([
                ("rate".into(), TASKS as f64 / drained.as_secs_f64()),
                ("cpu_ms".into(), per_thousand(session.cpu()? - cpu)),
                ("rss_mb".into(), session.resident() as f64 / 1e6),
                ("start_s".into(), (started - begin).as_secs_f64()),
            ]);
            if let (Some(before), Some(after)) = (broker, broker_cpu()?) {
                sample.insert("broker_ms".into(), per_thousand(after - before));
            }
            // What a worker has not acked goes back to the queue when it leaves.
            session.leave().await?;
            let begin = Instant::now();
            loop {
                match client.messages(&queue).await? {
                    0 => return Ok(sample),
                    left if begin.elapsed() > GOES_BACK_WITHIN => {
                        return Err(format!("{left} tasks were left in the queue").into());
                    }
                    // Acks may still be on their way to the queue.
                    _ => {
                        kernel::sleep(Duration::from_millis(10)).await?;
                    }
                }
            }
        }
        .await;
        client.delete(&queue).await?;
        client.delete(&answers).await?;
        client.channel.delete_exchange(&queue, false).await?;
        outcome
    })
}

fn broker_cpu() -> Result<Option<Duration>, Error> {
    Broker::from_env()?.pid.map(cpu_of).transpose()
}

/// A temporary folder; removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self, Error> {
        let folder = std::env::temp_dir().join(format!("sweepea-drain-{}", std::process::id()));
        std::fs::create_dir(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed stays in the temporary folder, which somebody sweeps.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const LEAVE_WITHIN: Duration = Duration::from_secs(20);

/// A worker with all processes below it; killed when dropped.
struct Session(Child);

impl Session {
    /// Waits for the result of a stamp.
    async fn result(&mut self, results: &mut Consumer, within: Duration) -> Result<(), Error> {
        let end = Instant::now() + within;
        let delivery = loop {
            if let Some(delivery) = results.try_next() {
                break delivery?.ok_or("the consumer ended")?;
            }
            if let Some(status) = self.0.try_wait()? {
                return Err(format!("the worker ended with {status}").into());
            }
            if Instant::now() > end {
                return Err(format!("no result within {} s", within.as_secs()).into());
            }
            kernel::sleep(Duration::from_millis(1)).await?;
        };
        // Celery's format, which olive's reply is as well.
        let reply: serde_json::Value = serde_json::from_slice(delivery.body())?;
        match reply["status"].as_str() {
            Some("SUCCESS") => Ok(()),
            _ => Err(format!("a task failed: {reply}").into()),
        }
    }

    fn processes(&self) -> Vec<u32> {
        descendants(self.0.id(), &parents())
    }

    /// CPU time of all its processes.
    fn cpu(&self) -> Result<Duration, Error> {
        self.processes().into_iter().map(cpu_of).sum()
    }

    /// Bytes of memory of all its processes; what they share counts in each.
    fn resident(&self) -> u64 {
        let status = |pid| std::fs::read_to_string(format!("/proc/{pid}/status"));
        let processes = self.processes().into_iter();
        // One that has just ended has none.
        processes
            .filter_map(|pid| resident(&status(pid).ok()?))
            .sum()
    }

    /// Asks the worker to end, and waits for it.
    async fn leave(&mut self) -> Result<(), Error> {
        kill(Pid::from_raw(self.0.id().try_into()?), Signal::SIGTERM)?;
        let begin = Instant::now();
        while self.0.try_wait()?.is_none() {
            if begin.elapsed() > LEAVE_WITHIN {
                return Err("the worker does not leave when it is told to".into());
            }
            kernel::sleep(Duration::from_millis(10)).await?;
        }
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            for pid in self.processes() {
                // One that has ended by itself needs nothing.
                let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
            }
            let _ = self.0.wait();
        }
    }
}

/// Every process of the machine with its parent.
fn parents() -> Vec<(u32, u32)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            Some((pid, parent(&stat)?))
        })
        .collect()
}

/// The fourth field of `/proc/PID/stat`. The second is a name in parentheses that may hold anything.
fn parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// `root` and all processes below it.
fn descendants(root: u32, parents: &[(u32, u32)]) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(parents.iter().filter(|it| it.1 == parent).map(|it| it.0));
        next += 1;
    }
    found
}

/// `VmRSS` of `/proc/PID/status`, in bytes.
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|it| it.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(feature = "peers")]
mod peers {
    use super::*;
    use amqp::wire::TableBuf;
    use std::process::Stdio;

    /// Celery's own defaults where they cost nothing; no gossip, mingling, heartbeats or events, as one does for speed. Its tasks are acked
    /// before they run, which is its default and less work than olive's acks after them.
    #[derive(Clone, Copy)]
    pub(super) struct Celery {
        pub(super) pool: &'static str,
        pub(super) size: usize,
    }

    const VERSION: &str = "5.7.0";

    const APP: &str = "\
import os
from celery import Celery

app = Celery('drain', broker=os.environ['BENCHES_AMQP_URL'], backend='rpc://')

@app.task(name='do_nothing', ignore_result=True)
def do_nothing():
    pass

@app.task(name='stamp')
def stamp():
    pass
";

    impl Contestant for Celery {
        fn worker(&self, folder: &Path, queue: &str) -> Result<Command, Error> {
            let python = python()?;
            std::fs::write(folder.join("drain.py"), APP)?;
            let multiplier = PREFETCH / self.size;
            let mut command = Command::new(python);
            command
                .args(["-m", "celery", "-A", "drain", "worker", "-l", "WARNING"])
                .args(["-Q", queue, "-P", self.pool])
                .args(["-c", &self.size.to_string()])
                .args(["--prefetch-multiplier", &multiplier.to_string()])
                .args([
                    "--without-gossip",
                    "--without-mingle",
                    "--without-heartbeat",
                ])
                // Celery warns of being root, and prints its banner.
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .current_dir(folder);
            Ok(command)
        }

        async fn publish(
            &self,
            publisher: &Publisher,
            queue: &str,
            id: &str,
            reply_to: Option<&str>,
        ) -> Result<(), Error> {
            let task = match reply_to {
                Some(_) => "stamp",
                None => "do_nothing",
            };
            let mut headers = TableBuf::new();
            headers
                .insert("lang", "py")?
                .insert("task", task)?
                .insert("id", id)?
                .insert("root_id", id)?
                .insert("ignore_result", reply_to.is_none())?;
            let properties = Properties {
                content_type: Some("application/json"),
                content_encoding: Some("utf-8"),
                headers: Some(headers.as_table()),
                correlation_id: Some(id),
                reply_to,
                ..Default::default()
            };
            let body =
                br#"[[], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]"#;
            let message = Message::new(body).key(queue);
            drop(publisher.publish(message.properties(&properties)).await?);
            Ok(())
        }
    }

    /// The interpreter of a virtual environment with Celery, made beside this program at the first time.
    fn python() -> Result<PathBuf, Error> {
        let home = std::env::current_exe()?.with_file_name(format!("benches-celery-{VERSION}"));
        let (python, complete) = (home.join("bin/python"), home.join("complete"));
        if !complete.exists() {
            run(Command::new("python3").args(["-m", "venv"]).arg(&home))?;
            let celery = format!("celery=={VERSION}");
            let install = ["-m", "pip", "install", "--quiet", &celery];
            run(Command::new(&python).args(install))?;
            std::fs::write(complete, "")?;
        }
        Ok(python)
    }

    fn run(command: &mut Command) -> Result<(), Error> {
        let output = command
            .output()
            .map_err(|error| format!("cannot run {command:?}: {error}"))?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{command:?} failed: {}", why.trim()).into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_found_behind_any_name() {
        assert_eq!(parent("42 (a) b) (c) S 7 42 42 0"), Some(7));
        assert_eq!(parent("42 (sh"), None);
    }

    #[test]
    fn descendants_are_children_and_theirs_and_nobody_else() {
        let parents = [(1, 0), (10, 1), (11, 10), (12, 11), (13, 10), (20, 1)];
        assert_eq!(descendants(10, &parents), [10, 11, 13, 12]);
        assert_eq!(descendants(20, &parents), [20]);
    }

    #[test]
    fn resident_memory_is_in_bytes() {
        let status = "Name:\tolive\nVmRSS:\t    1234 kB\nThreads:\t1\n";
        assert_eq!(resident(status), Some(1234 * 1024));
        assert_eq!(resident("Name:\tkthreadd\n"), None);
    }

    #[test]
    fn this_very_process_is_found_below_its_parent() {
        let own = std::process::id();
        let parents = parents();
        let parent = parents.iter().find(|it| it.0 == own).unwrap().1;
        assert!(descendants(parent, &parents).contains(&own));
    }
}
