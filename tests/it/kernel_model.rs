//! Random programs run on the kernel and on a model of it, and the same must happen: in the same order, at the same virtual time,
//! with the same answer of every trap.
//!
//! `PROPTEST_CASES` sets how many; a failure prints the smallest program that shows it, and the seed.

mod model;
mod program;

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use futures::FutureExt;
use kernel::sync::{Event, Lock, Queue, QueueError};
use kernel::{Builder, Interrupt, JoinError, Reason, Task, TaskRef, VirtualClock};
use proptest::prelude::*;

use model::Model;
use program::{OBJECTS, Program, Run, World, programs, start};

/// When a run ends; every program is at rest long before.
const END: u64 = 1_000_000_000;

const fn us(us: u64) -> Duration {
    Duration::from_micros(us)
}

type Started = Task<Result<(), Interrupt>>;

/// The kernel.
struct Real {
    clock: VirtualClock,
    story: RefCell<Vec<String>>,
    tasks: RefCell<Vec<Rc<Started>>>,
    locks: [Lock; OBJECTS],
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
    fn task(&self, task: usize) -> Rc<Started> {
        self.tasks.borrow()[task].clone()
    }

    fn task_ref(&self, task: usize) -> TaskRef {
        self.tasks.borrow()[task].to_ref()
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
        self.tasks.borrow_mut().push(Rc::new(kernel::spawn(body)));
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
        let task = self.task(task);
        async move {
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
        self.task_ref(task).wait().boxed_local()
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
}

fn on_the_kernel(program: &Program) -> Vec<String> {
    let clock = VirtualClock::new();
    let builder = Builder::new().clock(clock.clone());
    let mut kernel = builder.io_interval(program.interval).build().unwrap();
    let world: &'static Real = Box::leak(Box::new(Real {
        clock: clock.clone(),
        story: RefCell::default(),
        tasks: RefCell::default(),
        locks: Default::default(),
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
    let tasks = world.tasks.borrow().clone();
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

fn assert_same(program: &Program) {
    let (real, model) = (on_the_kernel(program), on_the_model(program));
    if real == model {
        return;
    }
    let same = real.iter().zip(&model).take_while(|(a, b)| a == b).count();
    panic!(
        "{program:#?}\nkernel and model agree on\n  {}\nthen the kernel says\n  {}\nand the model\n  {}\n",
        real[..same].join("\n  "),
        real[same..].join("\n  "),
        model[same..].join("\n  "),
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn the_kernel_does_what_the_model_says(program in programs()) {
        assert_same(&program);
    }
}
