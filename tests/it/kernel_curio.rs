//! Random programs run on our kernel and on Curio, its ancestor, and the same must happen, in the same order, at the same virtual
//! time, with the same answer of every trap. The programs are those of [`kernel_model`](crate::kernel_model), with groups,
//! semaphores, conditions and recursive locks added.
//!
//! Where the two differ on purpose, either tests/python/curio_programs.py changes the part of Curio in question, or [`shared`]
//! keeps out of the programs what brings the difference about. Both say why.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::kernel_model::program::{Group, Objects, Op, Program, programs};
use crate::kernel_model::{END, assert_same, for_programs, on_the_kernel};

/// A Python process that runs one program after the other.
struct Curio {
    process: Child,
    programs: ChildStdin,
    stories: BufReader<ChildStdout>,
}

impl Curio {
    fn start() -> Self {
        let mut script = rig::script("curio_programs.py");
        script.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = script.spawn().unwrap();
        Self {
            programs: process.stdin.take().unwrap(),
            stories: BufReader::new(process.stdout.take().unwrap()),
            process,
        }
    }

    fn run(&mut self, program: &Program) -> Vec<String> {
        let line = json!({ "room": program.room, "main": block(&program.main) });
        writeln!(self.programs, "{line}").unwrap();
        let mut story = String::new();
        self.stories.read_line(&mut story).unwrap();
        serde_json::from_str(&story).expect("the script answers each program")
    }
}

impl Drop for Curio {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn block(ops: &[Op]) -> Value {
    ops.iter().map(in_python).collect()
}

/// The call of the script's method for it.
fn in_python(op: &Op) -> Value {
    match op {
        Op::Sleep(0) | Op::Yield => json!(["yield_now"]),
        Op::Sleep(time) => json!(["sleep", time]),
        Op::Check => json!(["check"]),
        Op::Spawn(body) => json!(["spawn", block(body)]),
        Op::Request(task) => json!(["request", task]),
        Op::Cancel(task) => json!(["cancel", task]),
        Op::Join(task) => json!(["join", task]),
        Op::Wait(task) => json!(["wait", task]),
        Op::Timeout(limit, body) => json!(["timeout", limit, block(body)]),
        Op::Ignore(limit, body) => json!(["ignore", limit, block(body)]),
        Op::Shield(body) => json!(["shield", block(body)]),
        Op::Attempt(body) => json!(["attempt", block(body)]),
        Op::Finally(body, last) => json!(["finish", block(body), block(last)]),
        Op::Locked(lock, body) => json!(["locked", lock, block(body)]),
        Op::Relocked(lock, body) => json!(["relocked", lock, block(body)]),
        Op::Permitted(semaphore, body) => json!(["permitted", semaphore, block(body)]),
        Op::Notified(condition) => json!(["notified", condition]),
        Op::Notify(condition, count) => json!(["notify", condition, count]),
        Op::Put(queue) => json!(["put", queue]),
        Op::Get(queue) => json!(["get", queue]),
        Op::Await(event) => json!(["await_event", event]),
        Op::Set(event) => json!(["set_event", event]),
        Op::Clear(event) => json!(["clear_event", event]),
        Op::Group(group) => {
            let members: Vec<_> = group.members.iter().map(|body| block(body)).collect();
            let policy = format!("{:?}", group.policy);
            json!(["group", policy, members, block(&group.body), group.iterate])
        }
        Op::Stall(_) | Op::Abort(_) | Op::Never | Op::Select(..) | Op::Both(..) | Op::All(_) => {
            unreachable!("Curio does not have it")
        }
    }
}

/// Rewrites a program so that it means the same to both.
struct Shared {
    /// Of a sequence of numbers that look random.
    last: u32,
    shields: u32,
}

impl Shared {
    /// Deadlines that fall together expire in the order of the tasks' ids in Curio, in that of their arming here. So they do not.
    fn apart(&mut self, time: u32) -> u32 {
        self.last = self.last.wrapping_mul(1_103_515_245).wrapping_add(12_345);
        time * 1_000_000 + 1 + (self.last >> 8) % 900_000
    }

    fn block(&mut self, ops: Vec<Op>) -> Vec<Op> {
        ops.into_iter().filter_map(|op| self.op(op)).collect()
    }

    fn op(&mut self, op: Op) -> Option<Op> {
        Some(match op {
            Op::Sleep(0) => Op::Yield,
            Op::Sleep(time) => Op::Sleep(self.apart(time)),
            // Inside a shield no timeout expires in Curio, whereas ours looks only at what is around the shield.
            Op::Timeout(_, body) | Op::Ignore(_, body) if self.shields > 0 => {
                Op::Attempt(self.block(body))
            }
            // Curio's blocks without a limit end in a `TypeError`.
            Op::Timeout(limit, body) => {
                Op::Timeout(Some(self.apart(limit.unwrap_or(60))), self.block(body))
            }
            Op::Ignore(limit, body) => {
                Op::Ignore(Some(self.apart(limit.unwrap_or(60))), self.block(body))
            }
            Op::Shield(body) => {
                self.shields += 1;
                let body = self.block(body);
                self.shields -= 1;
                Op::Shield(body)
            }
            Op::Spawn(body) => Op::Spawn(self.task(body)),
            Op::Attempt(body) => Op::Attempt(self.block(body)),
            Op::Finally(body, last) => Op::Finally(self.block(body), self.block(last)),
            Op::Locked(lock, body) => Op::Locked(lock, self.block(body)),
            Op::Relocked(lock, body) => Op::Relocked(lock, self.block(body)),
            Op::Permitted(semaphore, body) => Op::Permitted(semaphore, self.block(body)),
            Op::Group(group) => Op::Group(Group {
                members: group
                    .members
                    .into_iter()
                    .map(|body| self.task(body))
                    .collect(),
                body: self.block(group.body),
                ..group
            }),
            // What Curio does not have: a task that is dropped, foreign futures, several waits at a time. A computation takes no
            // time on its virtual clock.
            Op::Stall(_) | Op::Abort(_) | Op::Never => return None,
            Op::Select(body, _) | Op::Both(body, _) => Op::Attempt(self.block(body)),
            Op::All(mut bodies) => Op::Spawn(self.task(bodies.pop().unwrap_or_default())),
            op => op,
        })
    }

    /// A task of its own: shields of the one that starts it are not around it.
    fn task(&mut self, body: Vec<Op>) -> Vec<Op> {
        let shields = std::mem::take(&mut self.shields);
        let body = self.block(body);
        self.shields = shields;
        body
    }
}

fn shared(mut program: Program) -> Program {
    let mut shared = Shared {
        last: program.interval,
        shields: 0,
    };
    program.main = shared.block(program.main);
    program
}

#[test]
fn the_kernel_does_what_curio_does() {
    let curio = RefCell::new(Curio::start());
    for_programs(400, programs(Objects::All).prop_map(shared), |program| {
        let mut ours = on_the_kernel(program);
        ours.pop();
        // Tasks that are left are dropped, here and there.
        ours.retain(|line| !line.starts_with(&format!("{END} us")));
        assert_same(program, &ours, &curio.borrow_mut().run(program), "Curio");
    });
}
