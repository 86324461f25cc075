//! The workers: what takes a task message and gives back an outcome.

pub mod child;
pub mod process;
pub mod thread;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use kernel::Interrupt;
use kernel::sync::Queue;

use self::process::{ProcessPool, Program};
use self::thread::ThreadPool;
use crate::config::{AllowList, Config, WorkerType};
use crate::error::Error;
use crate::message::{Failure, TaskMessage};
use crate::outcome::{Outcome, Reason};
use crate::registry::{Registry, nearest};

/// One attempt, as a worker gets it.
#[derive(Debug, Clone)]
pub struct Task {
    /// The message.
    pub message: Arc<TaskMessage>,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// Its time limit.
    pub timeout: Option<Duration>,
    /// When it is asked to end before that.
    pub soft: Option<Duration>,
}

/// Who runs a function.
#[derive(Debug, PartialEq)]
pub enum Lane {
    /// The registry: a thread of this process, or this program as a child.
    Rust,
    /// A Python child.
    Python,
    /// Nobody, and this is what the submitter hears.
    Nobody(Outcome),
}

/// Finds out who runs `func`. The allow-list comes first: whoever names a module there wants its functions from Python.
#[must_use]
pub fn lane(func: &str, registry: &Registry, allow: &AllowList) -> Lane {
    if allow.admits(func) {
        return Lane::Python;
    }
    if registry.has(func) {
        return Lane::Rust;
    }
    let is_misspelt = nearest(func, registry.names()).is_some();
    if func.contains('.') && !allow.0.is_empty() && !is_misspelt {
        let text = format!("function \"{func}\" is not allowed (olive_worker_allow={allow})");
        return Lane::Nobody(Outcome::Refused {
            reason: Reason::NotAllowed,
            failure: Failure::new("NotAllowed", text),
        });
    }
    let mut unknown = registry.unknown(func);
    if let (true, Outcome::Refused { failure, .. }) = (func.contains('.'), &mut unknown) {
        failure
            .message
            .push_str("; Python functions run when olive_worker_allow names their module");
    }
    Lane::Nobody(unknown)
}

/// All workers of an app: those for Rust functions, and Python's where there is an allow-list.
#[derive(Debug)]
pub struct Workers {
    registry: Arc<Registry>,
    allow: AllowList,
    rust: Crew<Rust>,
    python: Option<Crew<ProcessPool>>,
}

#[derive(Debug)]
enum Rust {
    Threads(ThreadPool),
    Processes(ProcessPool),
}

/// A pool and the places in it that are free. A task takes a place before it is handed to the pool: so it is known at any time which
/// tasks run and which only wait, and those that wait can be left to another app.
#[derive(Debug)]
struct Crew<P> {
    pool: P,
    places: Rc<Queue<()>>,
}

/// A place in a pool; free again when dropped.
#[derive(Debug)]
pub struct Place(Rc<Queue<()>>);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.0.try_put(());
    }
}

impl<P> Crew<P> {
    fn new(pool: P, size: usize) -> Self {
        let places = Queue::new(None);
        for _ in 0..size {
            places
                .try_put(())
                .expect("a queue without bound takes everything");
        }
        let places = Rc::new(places);
        Self { pool, places }
    }
}

impl Workers {
    /// As many workers of each kind as the settings say; none is started yet.
    #[must_use]
    pub fn new(config: &Config, registry: Arc<Registry>) -> Self {
        let size = usize::from(config.num_workers.0);
        let rust = match config.worker_type {
            WorkerType::Thread => Rust::Threads(ThreadPool::new(registry.clone(), size)),
            WorkerType::Process => Rust::Processes(ProcessPool::new(Program::Myself, size, config)),
        };
        let python = || {
            let pool = ProcessPool::new(Program::Python(config.python.clone()), size, config);
            Crew::new(pool, size)
        };
        Self {
            allow: config.allow.clone(),
            rust: Crew::new(rust, size),
            python: (!config.allow.0.is_empty()).then(python),
            registry,
        }
    }

    /// Starts a first Python worker, so that a mistake in the settings is found at the start.
    ///
    /// # Errors
    /// [`Error::WorkerBoot`] with what it said.
    pub async fn warm_up(&self) -> Result<(), Error> {
        match &self.python {
            Some(python) => python.pool.warm_up().await,
            None => Ok(()),
        }
    }

    /// Who runs `func`.
    #[must_use]
    pub fn lane(&self, func: &str) -> Lane {
        lane(func, &self.registry, &self.allow)
    }

    /// Waits for a free worker; `None` once [`Workers::quiet`] was called.
    ///
    /// If dropped, no place is lost.
    pub async fn place(&self, lane: &Lane) -> Option<Place> {
        let places = match (lane, &self.python) {
            (Lane::Python, Some(python)) => &python.places,
            (Lane::Python | Lane::Rust | Lane::Nobody(_), _) => &self.rust.places,
        };
        places.get().await.ok().map(|()| Place(places.clone()))
    }

    /// Runs a task, for which a place was taken.
    ///
    /// # Errors
    /// The caller's interrupt.
    pub async fn run(&self, lane: Lane, task: Task) -> Result<Outcome, Interrupt> {
        match (lane, &self.python, &self.rust.pool) {
            (Lane::Nobody(outcome), _, _) => Ok(outcome),
            (Lane::Python, Some(python), _) => python.pool.run(task).await,
            (Lane::Python | Lane::Rust, _, Rust::Threads(pool)) => pool.run(task).await,
            (Lane::Python | Lane::Rust, _, Rust::Processes(pool)) => pool.run(task).await,
        }
    }

    /// Starts nothing new from here on.
    pub fn quiet(&self) {
        let crews = [
            Some(&self.rust.places),
            self.python.as_ref().map(|p| &p.places),
        ];
        for places in crews.into_iter().flatten() {
            while places.try_get().is_ok() {}
            places.close();
        }
    }

    /// Sends idle worker processes home and waits for them, for a few seconds.
    ///
    /// # Errors
    /// The caller's interrupt.
    pub async fn close(&self) -> Result<(), Interrupt> {
        if let Some(python) = &self.python {
            python.pool.close().await?;
        }
        match &self.rust.pool {
            Rust::Processes(pool) => pool.close().await,
            Rust::Threads(_) => Ok(()),
        }
    }

    /// What there is, for the banner: `20 threads, 20 Python processes (jobs)`.
    #[must_use]
    pub fn describe(&self, size: u16) -> String {
        let s = if size == 1 { "" } else { "s" };
        let rust = match self.rust.pool {
            Rust::Threads(_) => format!("{size} thread{s}"),
            Rust::Processes(_) => format!("{size} process{}", if size == 1 { "" } else { "es" }),
        };
        match &self.python {
            Some(_) => format!(
                "{rust} for Rust, {size} process{} for Python ({})",
                if size == 1 { "" } else { "es" },
                self.allow
            ),
            None => format!("{rust} for Rust; none for Python, olive_worker_allow is empty"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(func: &str, allow: &[&str]) -> Lane {
        let mut registry = Registry::default();
        registry.add("olive.tasks.do_nothing", |_, ()| Ok(()));
        lane(
            func,
            &registry,
            &AllowList(allow.iter().map(|m| (*m).to_owned()).collect()),
        )
    }

    fn refusal(lane: Lane) -> (Reason, String) {
        match lane {
            Lane::Nobody(Outcome::Refused { reason, failure }) => (reason, failure.message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_name_that_the_allow_list_names_goes_to_python() {
        assert_eq!(of("olive.tasks.do_nothing", &[]), Lane::Rust);
        assert_eq!(of("olive.tasks.do_nothing", &["olive.tasks"]), Lane::Python);
        assert_eq!(of("proj.tasks.add", &["proj.tasks"]), Lane::Python);
    }

    #[test]
    fn a_name_that_nobody_runs_is_refused_with_the_setting_to_look_at() {
        let (reason, text) = refusal(of("os.system", &["proj.tasks"]));
        assert_eq!(reason, Reason::NotAllowed);
        assert_eq!(
            text,
            "function \"os.system\" is not allowed (olive_worker_allow=proj.tasks)"
        );
        let (reason, text) = refusal(of("os.system", &[]));
        assert_eq!(reason, Reason::NotRegistered);
        assert!(
            text.ends_with("Python functions run when olive_worker_allow names their module"),
            "{text}"
        );
        let (reason, text) = refusal(of("olive.tasks.do_nothin", &["proj.tasks"]));
        assert_eq!(reason, Reason::NotRegistered);
        assert!(text.contains("did you mean"), "{text}");
        assert_eq!(
            refusal(of("add", &[])).1,
            "function \"add\" is not registered; the app's log begins with the names that are"
        );
    }
}
