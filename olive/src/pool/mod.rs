//! The workers: what takes a task message and gives back an outcome.

pub mod child;
pub mod process;
pub mod thread;

use std::sync::Arc;
use std::time::Duration;

use crate::config::AllowList;
use crate::message::{Failure, TaskMessage};
use crate::outcome::{Outcome, Reason};
use crate::registry::Registry;

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
    if func.contains('.') && !allow.0.is_empty() {
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
        assert_eq!(
            refusal(of("add", &[])).1,
            "function \"add\" is not registered"
        );
    }
}
