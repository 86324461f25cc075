//! Random programs, and the interpreter that runs one on any kernel.

use std::any::Any;
use std::cell::RefCell;

use futures::future::{Either, LocalBoxFuture, join, select};
use futures::stream::{FuturesUnordered, StreamExt};
use futures::{FutureExt, pin_mut};
use kernel::Interrupt;
use proptest::prelude::*;

/// An instruction. Times are in microseconds, and small, so that deadlines often coincide; tasks are counted back from the newest.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Sleep(u32),
    Yield,
    /// Computes: time passes and nobody else runs.
    Stall(u32),
    /// `check_cancellation`.
    Check,
    Spawn(Vec<Self>),
    /// Asks and does not wait.
    Request(u8),
    Cancel(u8),
    Join(u8),
    Wait(u8),
    Abort(u8),
    Timeout(Option<u32>, Vec<Self>),
    Ignore(Option<u32>, Vec<Self>),
    Shield(Vec<Self>),
    /// Swallows what interrupts it.
    Attempt(Vec<Self>),
    /// Whatever happens to the first, the second runs: clean-up.
    Finally(Vec<Self>, Vec<Self>),
    Locked(u8, Vec<Self>),
    /// Inside a lock that its holder may take again.
    Relocked(u8, Vec<Self>),
    /// Inside a semaphore of two permits.
    Permitted(u8, Vec<Self>),
    /// Waits for a condition.
    Notified(u8),
    /// Wakes as many as this who wait for a condition.
    Notify(u8, u8),
    Put(u8),
    Get(u8),
    Await(u8),
    Set(u8),
    Clear(u8),
    /// A foreign future that never ends, made interruptible.
    Never,
    Select(Vec<Self>, Vec<Self>),
    Both(Vec<Self>, Vec<Self>),
    /// A combinator that wraps wakers.
    All(Vec<Vec<Self>>),
    Group(Group),
}

/// A task group.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) policy: Policy,
    pub(crate) members: Vec<Vec<Op>>,
    /// What the block does when it has started its members.
    pub(crate) body: Vec<Op>,
    /// Whether it then looks at each member as it ends.
    pub(crate) iterate: bool,
}

/// For whom a group waits; the members with odd numbers have a value that `First` accepts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Policy {
    All,
    Any,
    First,
    None,
}

#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) main: Vec<Op>,
    /// Polls between two looks at the timers. Fewer than 16: there the kernel looks by the clock too.
    pub(crate) interval: u32,
    /// Room in the queues.
    pub(crate) room: usize,
}

/// How many locks, queues and events there are.
pub(crate) const OBJECTS: usize = 2;

fn leaf(objects: Objects) -> BoxedStrategy<Op> {
    let time = || 0..8_u32;
    let task = || 0..4_u8;
    let object = || 0..OBJECTS as u8;
    let modelled = prop_oneof![
        6 => time().prop_map(Op::Sleep),
        2 => Just(Op::Yield),
        1 => time().prop_map(Op::Stall),
        1 => Just(Op::Check),
        2 => task().prop_map(Op::Request),
        2 => task().prop_map(Op::Cancel),
        2 => task().prop_map(Op::Join),
        1 => task().prop_map(Op::Wait),
        1 => task().prop_map(Op::Abort),
        2 => object().prop_map(Op::Put),
        2 => object().prop_map(Op::Get),
        2 => object().prop_map(Op::Await),
        2 => object().prop_map(Op::Set),
        1 => object().prop_map(Op::Clear),
        1 => Just(Op::Never),
    ];
    if objects == Objects::Modelled {
        return modelled.boxed();
    }
    let notify = |(condition, count)| Op::Notify(condition, count);
    prop_oneof![
        28 => modelled,
        2 => object().prop_map(Op::Notified),
        2 => (object(), 1..3_u8).prop_map(notify),
    ]
    .boxed()
}

fn block(op: impl Strategy<Value = Op> + Clone) -> impl Strategy<Value = Vec<Op>> + Clone {
    prop::collection::vec(op, 0..5)
}

/// Of which objects programs make use.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Objects {
    /// Those that the model has too.
    Modelled,
    All,
}

pub(crate) fn programs(objects: Objects) -> impl Strategy<Value = Program> {
    let op = leaf(objects).prop_recursive(5, 60, 5, move |op| {
        let limit = || prop::option::weighted(0.9, 0..8_u32);
        let body = block(op.clone());
        let one = op.clone();
        let modelled = prop_oneof![
            4 => one,
            6 => body.clone().prop_map(Op::Spawn),
            4 => (limit(), body.clone()).prop_map(|(limit, body)| Op::Timeout(limit, body)),
            2 => (limit(), body.clone()).prop_map(|(limit, body)| Op::Ignore(limit, body)),
            2 => body.clone().prop_map(Op::Shield),
            3 => body.clone().prop_map(Op::Attempt),
            1 => (body.clone(), body.clone()).prop_map(|(body, last)| Op::Finally(body, last)),
            2 => (0..OBJECTS as u8, body.clone()).prop_map(|(lock, body)| Op::Locked(lock, body)),
            1 => (body.clone(), body.clone()).prop_map(|(a, b)| Op::Select(a, b)),
            1 => (body.clone(), body.clone()).prop_map(|(a, b)| Op::Both(a, b)),
            1 => prop::collection::vec(body.clone(), 0..4).prop_map(Op::All),
        ];
        if objects == Objects::Modelled {
            return modelled.boxed();
        }
        let object = || 0..OBJECTS as u8;
        prop_oneof![
            26 => modelled,
            1 => (object(), body.clone()).prop_map(|(lock, body)| Op::Relocked(lock, body)),
            1 => (object(), body.clone()).prop_map(|(number, body)| Op::Permitted(number, body)),
            3 => groups(body).prop_map(Op::Group),
        ]
        .boxed()
    });
    let main = prop::collection::vec(op, 1..8);
    let interval = prop_oneof![Just(1), Just(3), Just(13)];
    (main, interval, 1..3_usize).prop_map(|(main, interval, room)| Program {
        main,
        interval,
        room,
    })
}

fn groups(body: impl Strategy<Value = Vec<Op>> + Clone) -> impl Strategy<Value = Group> {
    let policy = prop_oneof![
        Just(Policy::All),
        Just(Policy::Any),
        Just(Policy::First),
        Just(Policy::None),
    ];
    let members = prop::collection::vec(body.clone(), 0..4);
    (policy, members, body, any::<bool>()).prop_map(|(policy, members, body, iterate)| Group {
        policy,
        members,
        body,
        iterate,
    })
}

pub(crate) type Run<T = ()> = LocalBoxFuture<'static, Result<T, Interrupt>>;

/// A kernel as programs see it. It is leaked, so that futures need not borrow it.
pub(crate) trait World: 'static {
    fn story(&self) -> &RefCell<Vec<String>>;
    fn now(&self) -> u64;
    fn stall(&self, time: u32);
    fn check(&self) -> Result<(), Interrupt>;
    /// Starts a task and adds it to the list of them.
    fn spawn(&'static self, body: Run);
    fn spawned(&self) -> usize;
    fn request_cancel(&self, task: usize) -> bool;
    fn abort(&self, task: usize) -> bool;
    /// Its value as text.
    fn join(&'static self, task: usize) -> Run<String>;
    fn wait(&'static self, task: usize) -> Run;
    fn sleep(&'static self, time: u32) -> Run;
    fn yield_now(&'static self) -> Run;
    fn never(&'static self) -> Run;
    /// Gives a guard.
    fn acquire(&'static self, lock: usize) -> Run<Box<dyn Any>>;
    fn put(&'static self, queue: usize, item: usize) -> Run;
    fn get(&'static self, queue: usize) -> Run<usize>;
    fn await_event(&'static self, event: usize) -> Run;
    fn set(&self, event: usize);
    fn clear(&self, event: usize);
    fn timeout(&'static self, limit: Option<u32>, body: Run) -> Run;
    fn ignore(&'static self, limit: Option<u32>, body: Run) -> Run<Option<()>>;
    fn shield(&'static self, body: Run) -> Run;

    // What the model does not have; see `Objects`.

    /// Gives a guard.
    fn acquire_again(&'static self, _lock: usize) -> Run<Box<dyn Any>> {
        not_modelled()
    }
    /// Gives a guard.
    fn permit(&'static self, _semaphore: usize) -> Run<Box<dyn Any>> {
        not_modelled()
    }
    fn notified(&'static self, _condition: usize) -> Run {
        not_modelled()
    }
    fn notify(&'static self, _condition: usize, _count: usize) -> Run {
        not_modelled()
    }
    /// Runs task `me`'s block in it, and says what became of it.
    fn group(&'static self, _me: usize, _group: Group) -> Run<String> {
        not_modelled()
    }
}

fn not_modelled() -> ! {
    unreachable!("the model gets programs without it")
}

pub(crate) fn tell<W: World>(world: &W, me: usize, what: std::fmt::Arguments<'_>) {
    let line = format!("{} us, task {me}: {what}", world.now());
    world.story().borrow_mut().push(line);
}

/// Tells the story of a body's end, also if that is a drop.
struct End<W: World>(&'static W, usize, Option<Result<(), Interrupt>>);

impl<W: World> Drop for End<W> {
    fn drop(&mut self) {
        match &self.2 {
            Some(outcome) => tell(self.0, self.1, format_args!("ends: {outcome:?}")),
            None => tell(self.0, self.1, format_args!("is dropped")),
        }
    }
}

/// Starts a program as a task.
pub(crate) fn start<W: World>(world: &'static W, ops: Vec<Op>) {
    let body = body_of(world, world.spawned(), ops);
    world.spawn(body);
}

/// All that task `me` does.
pub(crate) fn body_of<W: World>(world: &'static W, me: usize, ops: Vec<Op>) -> Run {
    let body = async move {
        let mut end = End(world, me, None);
        let outcome = block_of(world, me, ops).await;
        end.2 = Some(outcome.clone());
        outcome
    };
    body.boxed_local()
}

pub(crate) fn block_of<W: World>(world: &'static W, me: usize, ops: Vec<Op>) -> Run {
    let body = async move {
        for op in ops {
            step(world, me, op).await?;
        }
        Ok(())
    };
    body.boxed_local()
}

async fn step<W: World>(world: &'static W, me: usize, op: Op) -> Result<(), Interrupt> {
    let nth = |back: u8| {
        let all = world.spawned();
        all - 1 - back as usize % all
    };
    let run = |ops| block_of(world, me, ops);
    macro_rules! told {
        ($outcome:expr, $($what:tt)*) => {{
            let outcome = $outcome;
            tell(world, me, format_args!("{} -> {outcome:?}", format_args!($($what)*)));
            outcome
        }};
    }
    match op {
        Op::Sleep(time) => told!(world.sleep(time).await, "sleep {time}"),
        Op::Yield => told!(world.yield_now().await, "yield"),
        Op::Stall(time) => {
            world.stall(time);
            Ok(())
        }
        Op::Check => told!(world.check(), "check"),
        Op::Spawn(body) => {
            start(world, body);
            Ok(())
        }
        Op::Request(back) => {
            let task = nth(back);
            told!(world.request_cancel(task), "request cancel of {task}");
            Ok(())
        }
        Op::Cancel(back) => {
            let task = nth(back);
            world.request_cancel(task);
            told!(world.wait(task).await, "cancel {task}")
        }
        Op::Join(back) => {
            let task = nth(back);
            told!(world.join(task).await, "join {task}").map(drop)
        }
        Op::Wait(back) => {
            let task = nth(back);
            told!(world.wait(task).await, "wait {task}")
        }
        Op::Abort(back) => {
            let task = nth(back);
            told!(world.abort(task), "abort {task}");
            Ok(())
        }
        Op::Timeout(limit, body) => {
            told!(world.timeout(limit, run(body)).await, "timeout {limit:?}")
        }
        Op::Ignore(limit, body) => {
            told!(world.ignore(limit, run(body)).await, "ignore {limit:?}").map(drop)
        }
        Op::Shield(body) => told!(world.shield(run(body)).await, "shield"),
        Op::Attempt(body) => {
            let _ = told!(run(body).await, "attempt");
            Ok(())
        }
        Op::Finally(body, last) => {
            let outcome = told!(run(body).await, "finally");
            run(last).await?;
            outcome
        }
        Op::Locked(lock, body) => {
            let guard = world.acquire(lock.into()).await;
            told!(guard.as_ref().map(drop), "acquire {lock}").map_err(Clone::clone)?;
            run(body).await
        }
        Op::Relocked(lock, body) => {
            let guard = world.acquire_again(lock.into()).await;
            told!(guard.as_ref().map(drop), "acquire again {lock}").map_err(Clone::clone)?;
            run(body).await
        }
        Op::Permitted(semaphore, body) => {
            let permit = world.permit(semaphore.into()).await;
            told!(permit.as_ref().map(drop), "permit {semaphore}").map_err(Clone::clone)?;
            run(body).await
        }
        Op::Notified(condition) => {
            told!(
                world.notified(condition.into()).await,
                "condition {condition}"
            )
        }
        Op::Notify(condition, count) => {
            let notify = world.notify(condition.into(), count.into());
            told!(notify.await, "notify {condition}")
        }
        Op::Put(queue) => {
            let item = world.story().borrow().len();
            told!(
                world.put(queue.into(), item).await,
                "put {item} into {queue}"
            )
        }
        Op::Get(queue) => told!(world.get(queue.into()).await, "get from {queue}").map(drop),
        Op::Await(event) => told!(world.await_event(event.into()).await, "await {event}"),
        Op::Set(event) => {
            world.set(event.into());
            Ok(())
        }
        Op::Clear(event) => {
            world.clear(event.into());
            Ok(())
        }
        Op::Never => told!(world.never().await, "never"),
        Op::Select(a, b) => {
            let (first, outcome) = match select(run(a), run(b)).await {
                Either::Left((outcome, _)) => ("first", outcome),
                Either::Right((outcome, _)) => ("second", outcome),
            };
            told!(outcome, "select, {first}")
        }
        Op::Both(a, b) => {
            let (a, b) = told!(join(run(a), run(b)).await, "both");
            a.and(b)
        }
        Op::Group(group) => {
            let policy = group.policy;
            let outcome = world.group(me, group).await;
            let line = outcome.as_ref().map_or_else(
                |error| format!("Err({error:?})"),
                |text| format!("Ok({text})"),
            );
            tell(world, me, format_args!("group {policy:?} -> {line}"));
            outcome.map(drop)
        }
        Op::All(bodies) => {
            let all: FuturesUnordered<_> = bodies
                .into_iter()
                .enumerate()
                .map(|(n, body)| run(body).map(move |outcome| (n, outcome)))
                .collect();
            pin_mut!(all);
            while let Some((n, outcome)) = all.next().await {
                told!(outcome, "of all, {n}")?;
            }
            Ok(())
        }
    }
}
