//! Random programs run on the kernel and on a model of it, and the same must happen: in the same order, at the same virtual time,
//! with the same answer of every trap.
//!
//! `PROPTEST_CASES` sets how many; a failure prints the smallest program that shows it, and the seed, which `PROPTEST_RNG_SEED` takes.

mod model;
pub(crate) mod program;

use std::any::Any;
use std::cell::RefCell;
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;
use std::time::Duration;

use futures::FutureExt;
use kernel::sync::{Condition, Event, Lock, Queue, QueueError, RLock, Semaphore};
use kernel::{
    Builder, GroupError, Interrupt, JoinError, Reason, Task, TaskRef, VirtualClock, Wait,
};
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};

use model::Model;
use program::{
    Group, OBJECTS, Objects, Policy, Program, Run, World, block_of, body_of, programs, start, tell,
};

/// When a run ends; every program is at rest long before.
pub(crate) const END: u64 = 1_000_000_000;

const fn us(us: u64) -> Duration {
    Duration::from_micros(us)
}

type Started = Task<Result<(), Interrupt>>;

#[derive(Clone)]
enum Spawned {
    Task(Rc<Started>),
    /// Belongs to a group.
    Member(TaskRef),
}

/// The kernel.
struct Real {
    clock: VirtualClock,
    story: RefCell<Vec<String>>,
    tasks: RefCell<Vec<Spawned>>,
    locks: [Lock; OBJECTS],
    rlocks: [RLock; OBJECTS],
    semaphores: [Semaphore; OBJECTS],
    conditions: [(Lock, Condition); OBJECTS],
    queues: [Queue<usize>; OBJECTS],
    events: [Event; OBJECTS],
}

fn interrupt(error: QueueError) -> Interrupt {
    match error {
        QueueError::Interrupted(interrupt) => interrupt,
        error => unreachable!("{error}"),
    }
}

impl Real {
    fn task(&self, task: usize) -> TaskRef {
        match &self.tasks.borrow()[task] {
            Spawned::Task(task) => task.to_ref(),
            Spawned::Member(task) => task.clone(),
        }
    }

    fn number(&self, task: &TaskRef) -> usize {
        let mut tasks = 0..self.spawned();
        tasks.find(|&number| self.task(number) == *task).unwrap()
    }
}

impl World for Real {
    fn story(&self) -> &RefCell<Vec<String>> {
        &self.story
    }

    fn now(&self) -> u64 {
        self.clock.elapsed().as_micros() as u64
    }

    fn stall(&self, by: u32) {
        self.clock.advance(us(by.into()));
    }

    fn check(&self) -> Result<(), Interrupt> {
        kernel::check_cancellation()
    }

    fn spawn(&'static self, body: Run) {
        let task = Rc::new(kernel::spawn(body));
        self.tasks.borrow_mut().push(Spawned::Task(task));
    }

    fn spawned(&self) -> usize {
        self.tasks.borrow().len()
    }

    fn request_cancel(&self, task: usize) -> bool {
        self.task(task).request_cancel(Reason::default())
    }

    fn abort(&self, task: usize) -> bool {
        self.task(task).abort()
    }

    fn join(&'static self, task: usize) -> Run<String> {
        let task = self.tasks.borrow()[task].clone();
        async move {
            let task = match task {
                Spawned::Task(task) => task,
                Spawned::Member(task) => {
                    task.wait().await?;
                    return Ok("of a group".into());
                }
            };
            match task.join().await {
                Ok(value) => Ok(format!("{value:?}")),
                Err(JoinError::Aborted) => Ok("aborted".into()),
                Err(JoinError::Taken) => Ok("taken".into()),
                Err(JoinError::Interrupted(interrupt)) => Err(interrupt),
                Err(error) => unreachable!("{error}"),
            }
        }
        .boxed_local()
    }

    fn wait(&'static self, task: usize) -> Run {
        self.task(task).wait().boxed_local()
    }

    fn sleep(&'static self, duration: u32) -> Run {
        let sleep = kernel::sleep(us(duration.into()));
        sleep.map(|outcome| outcome.map(drop)).boxed_local()
    }

    fn yield_now(&'static self) -> Run {
        kernel::yield_now().boxed_local()
    }

    fn never(&'static self) -> Run {
        kernel::interruptible(futures::future::pending()).boxed_local()
    }

    fn acquire(&'static self, lock: usize) -> Run<Box<dyn Any>> {
        let guard = self.locks[lock].acquire();
        guard
            .map(|guard| guard.map(|guard| Box::new(guard) as Box<dyn Any>))
            .boxed_local()
    }

    fn put(&'static self, queue: usize, item: usize) -> Run {
        let put = self.queues[queue].put(item);
        put.map(|outcome| outcome.map_err(interrupt)).boxed_local()
    }

    fn get(&'static self, queue: usize) -> Run<usize> {
        let get = self.queues[queue].get();
        get.map(|outcome| outcome.map_err(interrupt)).boxed_local()
    }

    fn await_event(&'static self, event: usize) -> Run {
        self.events[event].wait().boxed_local()
    }

    fn set(&self, event: usize) {
        self.events[event].set();
    }

    fn clear(&self, event: usize) {
        self.events[event].clear();
    }

    fn timeout(&'static self, limit: Option<u32>, body: Run) -> Run {
        kernel::timeout_after(limit.map(|limit| us(limit.into())), body).boxed_local()
    }

    fn ignore(&'static self, limit: Option<u32>, body: Run) -> Run<Option<()>> {
        kernel::ignore_after(limit.map(|limit| us(limit.into())), body).boxed_local()
    }

    fn shield(&'static self, body: Run) -> Run {
        kernel::shield(body).boxed_local()
    }

    fn acquire_again(&'static self, lock: usize) -> Run<Box<dyn Any>> {
        let guard = self.rlocks[lock].acquire();
        guard
            .map(|guard| guard.map(|guard| Box::new(guard) as Box<dyn Any>))
            .boxed_local()
    }

    fn permit(&'static self, semaphore: usize) -> Run<Box<dyn Any>> {
        let permit = self.semaphores[semaphore].acquire();
        permit
            .map(|permit| permit.map(|permit| Box::new(permit) as Box<dyn Any>))
            .boxed_local()
    }

    fn notified(&'static self, condition: usize) -> Run {
        let (lock, condition) = &self.conditions[condition];
        async {
            let mut guard = lock.acquire().await?;
            condition.wait(&mut guard).await
        }
        .boxed_local()
    }

    fn notify(&'static self, condition: usize, count: usize) -> Run {
        let (lock, condition) = &self.conditions[condition];
        async move {
            let _guard = lock.acquire().await?;
            condition.notify(count);
            Ok(())
        }
        .boxed_local()
    }

    fn group(&'static self, me: usize, group: Group) -> Run<String> {
        let policy = match group.policy {
            Policy::All => Wait::All,
            Policy::Any => Wait::Any,
            Policy::First => Wait::First(Option::is_some),
            Policy::None => Wait::None,
        };
        let result = |result: Result<Option<usize>, GroupError<Interrupt>>| match result {
            Ok(value) => format!("Ok({value:?})"),
            Err(GroupError::Failed(interrupt)) => format!("Err({interrupt:?})"),
            Err(GroupError::Join(error)) => format!("{error:?}"),
        };
        async move {
            let ((), outcome) = kernel::group(policy, async |tasks| {
                for ops in group.members {
                    let number = self.spawned();
                    let body = body_of(self, number, ops);
                    let task =
                        tasks.spawn(body.map(move |outcome| {
                            outcome.map(|()| (number % 2 == 1).then_some(number))
                        }));
                    self.tasks.borrow_mut().push(Spawned::Member(task));
                }
                block_of(self, me, group.body).await?;
                while group.iterate
                    && let Some(done) = tasks.next_done().await?
                {
                    let number = self.number(&done.task);
                    tell(
                        self,
                        me,
                        format_args!("done {number}: {}", result(done.result)),
                    );
                }
                Ok::<_, Interrupt>(())
            })
            .await?;
            let number = |id| {
                let mut tasks = 0..self.spawned();
                tasks.find(|&number| self.task(number).id() == id).unwrap()
            };
            let completed = outcome.completed.map(number);
            let results = outcome.results.into_iter();
            let results = results.map(|(id, end)| format!("{}: {}", number(id), result(end)));
            let results: Vec<_> = results.collect();
            Ok(format!("{completed:?} of [{}]", results.join(", ")))
        }
        .boxed_local()
    }
}

/// What happens, and of each task whether it has not ended, and how often it was polled.
pub(crate) fn on_the_kernel(program: &Program) -> Vec<String> {
    let clock = VirtualClock::new();
    let builder = Builder::new().clock(clock.clone());
    let mut kernel = builder.io_interval(program.interval).build().unwrap();
    let world: &'static Real = Box::leak(Box::new(Real {
        clock: clock.clone(),
        story: RefCell::default(),
        tasks: RefCell::default(),
        locks: Default::default(),
        rlocks: Default::default(),
        semaphores: std::array::from_fn(|_| Semaphore::new(2)),
        conditions: Default::default(),
        queues: std::array::from_fn(|_| Queue::new(Some(program.room))),
        events: Default::default(),
    }));
    let main = program.main.clone();
    kernel
        .run(async {
            start(world, main);
            kernel::sleep(us(END)).await.unwrap();
        })
        .unwrap();
    let tasks: Vec<_> = (0..world.spawned()).map(|task| world.task(task)).collect();
    let polls = tasks
        .iter()
        .map(|task| (!task.is_terminated(), task.cycles()));
    let polls = format!("{:?}", polls.collect::<Vec<_>>());
    drop(kernel);
    world.tasks.take();
    let mut story = world.story.take();
    story.push(polls);
    story
}

fn on_the_model(program: &Program) -> Vec<String> {
    let world = Model::new(program.room);
    start(world, program.main.clone());
    world.run(END, program.interval)
}

pub(crate) fn assert_same(program: &Program, real: &[String], other: &[String], name: &str) {
    if real == other {
        return;
    }
    let same = real.iter().zip(other).take_while(|(a, b)| a == b).count();
    panic!(
        "{program:#?}\nkernel and {name} agree on\n  {}\nthen the kernel says\n  {}\nand {name}\n  {}\n",
        real[..same].join("\n  "),
        real[same..].join("\n  "),
        other[same..].join("\n  "),
    );
}

/// Runs `test` with that many random programs, or `PROPTEST_CASES`. Of one that panics the smallest is printed, and the seed.
pub(crate) fn for_programs(
    cases: u32,
    programs: impl Strategy<Value = Program>,
    test: impl Fn(&Program),
) {
    let told = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seed = told("PROPTEST_RNG_SEED").unwrap_or_else(|| RandomState::new().hash_one(cases));
    let mut runner = TestRunner::new(ProptestConfig {
        cases: told("PROPTEST_CASES").map_or(cases, |cases| cases as u32),
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let test = |program| {
        test(&program);
        Ok(())
    };
    if let Err(error) = runner.run(&programs, test) {
        panic!("PROPTEST_RNG_SEED={seed}\n{error}");
    }
}

#[test]
fn the_kernel_does_what_the_model_says() {
    for_programs(500, programs(Objects::Modelled), |program| {
        assert_same(
            program,
            &on_the_kernel(program),
            &on_the_model(program),
            "the model",
        );
    });
}
