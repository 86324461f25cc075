//! `olive demo`, which brings its own broker and leaves the one under test alone.

use rig::{Broker, Olive};

/// What the table must say: a kind, and how all tasks of it must end.
const KINDS: [(&str, &str); 13] = [
    ("quick, thread", "ok"),
    ("quick, Python", "ok"),
    ("slow (20 ms), thread", "ok"),
    ("slow (100 ms), Python", "ok"),
    ("fails once, thread", "ok"),
    ("asks for 1 s, thread", "ok"),
    ("fails, thread", "TaskError"),
    ("fails, Python", "ValueError"),
    ("too slow (200 ms), thread", "TimeLimitExceeded"),
    ("stuck (200 ms), Python", "TimeLimitExceeded"),
    ("kills its worker, Python", "WorkerLostError"),
    ("unknown function", "NotRegistered"),
    ("not allowed, Python", "NotAllowed"),
];

#[test]
fn every_kind_of_task_ends_as_it_should() {
    let ended = demo(&Olive::on(&Broker::under_test()).with_python_workers(2));
    for (kind, how) in KINDS {
        let row = ended
            .lines()
            .find_map(|line| line.strip_prefix(kind))
            .unwrap_or_else(|| panic!("no {kind:?} in the table:\n{ended}"));
        // Tasks, expected, actual.
        let cells: Vec<_> = row.split_whitespace().skip(1).take(2).collect();
        assert_eq!(cells, [how, how], "{kind}");
    }
    assert_eq!(
        ended.lines().last(),
        Some("every outcome is the expected one")
    );
}

#[test]
fn without_a_python_it_shows_the_rest() {
    let olive = Olive::on(&Broker::under_test()).set("olive_worker_python", "/no/python/here");
    let ended = demo(&olive);
    assert!(ended.contains("no processes, as there is no \"/no/python/here\" here"));
    for (kind, _) in KINDS {
        let shown = ended.lines().any(|line| line.starts_with(kind));
        assert_eq!(shown, !kind.ends_with("Python"), "{kind}:\n{ended}");
    }
}

/// What it says, if it is content.
#[track_caller]
fn demo(olive: &Olive) -> String {
    let ended = olive.call(&["demo", "--tasks", "200"]);
    ended.expect_code(0).stdout
}
