//! The model: a kernel of lists and loops, written from the rules alone (R1 to R11 in `kernel::runtime`'s scopes, FIFO
//! everywhere). It searches where the kernel links, and has no wheel, no slot that is used again, no flag that sums anything up.

use std::any::Any;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use futures::FutureExt;
use kernel::Interrupt;

use super::program::{OBJECTS, Run, World};

#[derive(Clone, Copy, PartialEq, Debug)]
enum For {
    Time(u64),
    End(usize),
    Lock(usize),
    Item(usize),
    Room(usize),
    Event(usize),
    Nothing,
}

/// What fired: the task's own scope, or a timeout block. Smaller is not outer; see `reaches`.
type Scope = Option<usize>;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Phase {
    Armed,
    Fired,
    Interrupted(Scope),
}

/// A leaf that has blocked. Its number, from one sequence with those of the blocks, is the order of arming.
struct Wait {
    task: usize,
    scope: Scope,
    what: For,
    phase: Phase,
    waker: Waker,
}

struct Block {
    task: usize,
    parent: Scope,
    is_shield: bool,
    deadline: Option<u64>,
    fired: bool,
    /// When it fired, in the sequence of the numbers.
    fired_at: usize,
    told: bool,
    /// R9: a deadline that a cancellation has switched off.
    is_off: bool,
}

struct Task {
    body: Option<Run>,
    is_live: bool,
    is_cancelled: bool,
    told: bool,
    abort: bool,
    value: Option<String>,
    polls: u32,
}

#[derive(Default)]
struct Ready {
    queue: VecDeque<usize>,
}

struct Flag(usize, Arc<Mutex<Ready>>);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        let queue = &mut self.1.lock().unwrap().queue;
        if !queue.contains(&self.0) {
            queue.push_back(self.0);
        }
    }
}

#[derive(Default)]
struct State {
    now: u64,
    number: usize,
    tasks: Vec<Task>,
    waits: BTreeMap<usize, Wait>,
    blocks: BTreeMap<usize, Block>,
    current: usize,
    scope: Scope,
    /// What one operation of the kernel wakes.
    woken: Vec<Waker>,
    is_locked: [bool; OBJECTS],
    items: [VecDeque<usize>; OBJECTS],
    is_set: [bool; OBJECTS],
}

pub(crate) struct Model {
    state: RefCell<State>,
    ready: Arc<Mutex<Ready>>,
    story: RefCell<Vec<String>>,
    room: usize,
}

impl State {
    fn number(&mut self) -> usize {
        self.number += 1;
        self.number
    }

    /// Whether a firing of `outer` is felt in `scope`.
    fn reaches(&self, mut scope: Scope, outer: Scope) -> bool {
        loop {
            if scope == outer {
                return true;
            }
            match scope.and_then(|inner| self.blocks.get(&inner)) {
                Some(block) if !block.is_shield => scope = block.parent,
                _ => return false,
            }
        }
    }

    /// R4, R6, R11: what has fired around the current scope, up to a shield, counts as told; the outermost is reported.
    fn pending(&mut self) -> Option<Interrupt> {
        let mut found = None;
        let mut scope = self.scope;
        while let Some(number) = scope {
            let block = self.blocks.get_mut(&number).unwrap();
            if block.is_shield {
                return found;
            }
            if block.fired && !block.told {
                block.told = true;
                found = Some(Interrupt::TaskTimeout);
            }
            scope = block.parent;
        }
        let task = &mut self.tasks[self.current];
        if task.is_cancelled && !task.told {
            task.told = true;
            found = Some(Interrupt::cancelled());
        }
        found
    }

    /// R1, R3, R5, R6: interrupts what waits inside `fired`, the newest wait first.
    fn fire_scope(&mut self, task: usize, fired: Scope) {
        let waits: Vec<_> = self.waits.keys().rev().copied().collect();
        for number in waits {
            let wait = &self.waits[&number];
            if wait.task != task || !self.reaches(wait.scope, fired) {
                continue;
            }
            let phase = match wait.phase {
                Phase::Armed => Phase::Interrupted(fired),
                Phase::Interrupted(by) if self.reaches(by, fired) => Phase::Interrupted(fired),
                phase => phase,
            };
            let was_armed = wait.phase == Phase::Armed;
            let wait = self.waits.get_mut(&number).unwrap();
            wait.phase = phase;
            if was_armed {
                self.woken.push(wait.waker.clone());
            }
        }
    }

    fn cancel(&mut self, task: usize) -> bool {
        let victim = &mut self.tasks[task];
        if !victim.is_live || victim.is_cancelled {
            return false;
        }
        victim.is_cancelled = true;
        let blocks: Vec<_> = self.blocks.keys().copied().collect();
        for number in blocks {
            // R9
            if self.blocks[&number].task == task && self.reaches(Some(number), None) {
                let block = self.blocks.get_mut(&number).unwrap();
                block.is_off = true;
                block.fired &= block.told;
            }
        }
        self.fire_scope(task, None);
        self.wake();
        true
    }

    /// In the order in which they were fired, wrapped wakers too, although these are foreign code, called when the operation is done.
    fn wake(&mut self) {
        self.woken.drain(..).for_each(Waker::wake);
    }

    /// Wakes up to `count` of those who wait for `what`, the longest waiting first.
    fn fire(&mut self, what: For, count: usize) -> usize {
        let mut waiting = self.waits.values_mut();
        let mut fired = 0;
        while fired < count
            && let Some(wait) = waiting.find(|wait| wait.what == what && wait.phase == Phase::Armed)
        {
            wait.phase = Phase::Fired;
            self.woken.push(wait.waker.clone());
            fired += 1;
        }
        self.wake();
        fired
    }

    /// How many were given `what` and have not run since.
    fn granted(&self, what: For) -> usize {
        let granted = |wait: &&Wait| wait.what == what && wait.phase == Phase::Fired;
        self.waits.values().filter(granted).count()
    }

    fn has_item(&self, queue: usize) -> bool {
        self.items[queue].len() > self.granted(For::Item(queue))
    }

    fn is_overdue(&self, block: &Block) -> bool {
        !block.fired && !block.is_off && block.deadline.is_some_and(|at| at <= self.now)
    }

    fn fire_timers(&mut self) {
        loop {
            let blocks = self
                .blocks
                .iter()
                .filter(|(_, block)| self.is_overdue(block));
            let blocks = blocks.map(|(&number, block)| (block.deadline.unwrap(), number, true));
            let waits = self
                .waits
                .iter()
                .filter_map(|(&number, wait)| match wait.what {
                    For::Time(at) if wait.phase == Phase::Armed && at <= self.now => {
                        Some((at, number, false))
                    }
                    _ => None,
                });
            let Some((_, number, is_block)) = blocks.chain(waits).min() else {
                return self.wake();
            };
            if is_block {
                let block = self.blocks.get_mut(&number).unwrap();
                block.fired = true;
                self.number += 1;
                block.fired_at = self.number;
                let task = block.task;
                self.fire_scope(task, Some(number));
            } else {
                let wait = self.waits.get_mut(&number).unwrap();
                wait.phase = Phase::Fired;
                self.woken.push(wait.waker.clone());
            }
        }
    }

    fn next_deadline(&self) -> Option<u64> {
        let blocks = self
            .blocks
            .values()
            .filter(|block| !block.fired && !block.is_off);
        let waits = self.waits.values().filter_map(|wait| match wait.what {
            For::Time(at) if wait.phase == Phase::Armed => Some(at),
            _ => None,
        });
        blocks.filter_map(|block| block.deadline).chain(waits).min()
    }
}

/// What is taken back when a leaf is dropped.
struct Leaf {
    world: &'static Model,
    number: Option<usize>,
}

impl Leaf {
    fn poll(&mut self, cx: &Context<'_>, what: For) -> Poll<Result<(), Interrupt>> {
        let mut state = self.world.state.borrow_mut();
        let Some(number) = self.number else {
            if let Some(interrupt) = state.pending() {
                return Poll::Ready(Err(interrupt));
            }
            let number = state.number();
            let wait = Wait {
                task: state.current,
                scope: state.scope,
                what,
                phase: Phase::Armed,
                waker: cx.waker().clone(),
            };
            state.waits.insert(number, wait);
            self.number = Some(number);
            return Poll::Pending;
        };
        let (task, scope) = (state.current, state.scope);
        let wait = state.waits.get_mut(&number).unwrap();
        match wait.phase {
            Phase::Armed => {
                (wait.task, wait.scope) = (task, scope);
                wait.waker = cx.waker().clone();
                return Poll::Pending;
            }
            Phase::Fired | Phase::Interrupted(_) => {}
        }
        self.number = None;
        let wait = state.waits.remove(&number).unwrap();
        Poll::Ready(match wait.phase {
            Phase::Interrupted(fired) => {
                state.pending();
                Err(match fired {
                    None => Interrupt::cancelled(),
                    Some(_) => Interrupt::TaskTimeout,
                })
            }
            _ => Ok(()),
        })
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        let state = &mut *self.world.state.borrow_mut();
        let wait = state.waits.remove(&number).unwrap();
        if wait.phase != Phase::Fired {
            return;
        }
        // What it was given goes to the next.
        match wait.what {
            For::Lock(lock) => state.is_locked[lock] = state.fire(wait.what, 1) == 1,
            For::Item(_) | For::Room(_) => {
                state.fire(wait.what, 1);
            }
            _ => {}
        }
    }
}

struct Guard(&'static Model, usize);

impl Drop for Guard {
    fn drop(&mut self) {
        let state = &mut *self.0.state.borrow_mut();
        state.is_locked[self.1] = state.fire(For::Lock(self.1), 1) == 1;
    }
}

/// Runs a body inside a block, and says how that ended for a timeout block.
struct Scoped {
    world: &'static Model,
    number: Option<usize>,
    limit: Option<u32>,
    is_shield: bool,
    body: Option<Run>,
}

impl Scoped {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Interrupt>> {
        let number = *self.number.get_or_insert_with(|| {
            let state = &mut *self.world.state.borrow_mut();
            let number = state.number();
            let block = Block {
                task: state.current,
                parent: state.scope,
                is_shield: self.is_shield,
                deadline: self.limit.map(|limit| state.now + u64::from(limit)),
                fired: false,
                fired_at: 0,
                told: false,
                is_off: false,
            };
            state.blocks.insert(number, block);
            number
        });
        let outer = self.world.state.borrow_mut().scope.replace(number);
        let outcome = self.body.as_mut().unwrap().poll_unpin(cx);
        self.world.state.borrow_mut().scope = outer;
        let Poll::Ready(outcome) = outcome else {
            return Poll::Pending;
        };
        self.number = None;
        let state = &mut *self.world.state.borrow_mut();
        let block = state.blocks.remove(&number).unwrap();
        if block.is_shield {
            return Poll::Ready(outcome);
        }
        let mut enclosing = None;
        let mut scope = block.parent;
        while let Some(around) = scope
            && !state.blocks[&around].is_shield
        {
            if state.blocks[&around].fired {
                enclosing = Some(around);
            }
            scope = state.blocks[&around].parent;
        }
        if let Some(around) = enclosing {
            // R7, for a block that the firing found open: what is opened to clean up does not bring it back, nor does a deadline
            // that is off come back.
            let around = state.blocks.get_mut(&around).unwrap();
            let was_open = number < around.fired_at;
            around.told &= !was_open || around.is_off;
        }
        Poll::Ready(match outcome {
            // R8
            Err(Interrupt::TaskTimeout | Interrupt::TimeoutCancellation) => {
                Err(if enclosing.is_some() {
                    Interrupt::TimeoutCancellation
                } else if block.fired {
                    Interrupt::TaskTimeout
                } else {
                    Interrupt::UncaughtTimeout
                })
            }
            outcome => outcome,
        })
    }
}

impl Drop for Scoped {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        self.world.state.borrow_mut().blocks.remove(&number);
        self.body = None;
    }
}

impl Model {
    pub(crate) fn new(room: usize) -> &'static Self {
        Box::leak(Box::new(Self {
            state: RefCell::default(),
            ready: Arc::default(),
            story: RefCell::default(),
            room,
        }))
    }

    /// Runs until the clock has reached `end` and nothing is left to do before it; then drops every task, the newest first.
    pub(crate) fn run(&'static self, end: u64, interval: u32) -> Vec<String> {
        // The kernel's main task, which starts the program, was the first.
        let mut polls = 1 % interval;
        loop {
            while let Some(task) = self.pop() {
                self.poll_task(task);
                polls += 1;
                if polls >= interval {
                    polls = 0;
                    self.state.borrow_mut().fire_timers();
                }
            }
            polls = 0;
            let state = &mut *self.state.borrow_mut();
            let next = state.next_deadline().unwrap_or(end).max(state.now);
            if next >= end {
                break;
            }
            state.now = next;
            state.fire_timers();
        }
        self.state.borrow_mut().now = end;
        let counts = self.polls();
        let tasks = self.spawned();
        for task in (0..tasks).rev() {
            self.abort_now(task);
        }
        // Nobody runs any more.
        let mut story = self.story.take();
        story.push(counts);
        story
    }

    fn polls(&self) -> String {
        let state = self.state.borrow();
        let polls = state.tasks.iter().map(|task| (task.is_live, task.polls));
        format!("{:?}", polls.collect::<Vec<_>>())
    }

    fn pop(&self) -> Option<usize> {
        self.ready.lock().unwrap().queue.pop_front()
    }

    fn wake(&self, task: usize) {
        Arc::new(Flag(task, self.ready.clone())).wake();
    }

    fn poll_task(&self, task: usize) {
        let Some(mut body) = self.state.borrow_mut().tasks[task].body.take() else {
            return;
        };
        let waker = Waker::from(Arc::new(Flag(task, self.ready.clone())));
        {
            let state = &mut *self.state.borrow_mut();
            (state.current, state.scope) = (task, None);
            state.tasks[task].polls += 1;
        }
        let outcome = body.poll_unpin(&mut Context::from_waker(&waker));
        self.state.borrow_mut().current = usize::MAX;
        match outcome {
            Poll::Ready(value) => {
                drop(body);
                self.finish(task, format!("{value:?}"));
            }
            Poll::Pending if self.state.borrow().tasks[task].abort => {
                drop(body);
                self.finish(task, "aborted".into());
            }
            Poll::Pending => self.state.borrow_mut().tasks[task].body = Some(body),
        }
    }

    fn finish(&self, task: usize, value: String) {
        let state = &mut *self.state.borrow_mut();
        state.tasks[task].is_live = false;
        state.tasks[task].value = Some(value);
        state.fire(For::End(task), usize::MAX);
    }

    fn abort_now(&self, task: usize) -> bool {
        let mut state = self.state.borrow_mut();
        if !state.tasks[task].is_live {
            return false;
        }
        let Some(body) = state.tasks[task].body.take() else {
            state.tasks[task].abort = true;
            return true;
        };
        drop(state);
        drop(body);
        self.finish(task, "aborted".into());
        true
    }

    /// A leaf that blocks while `or_else` finds nothing at its first poll, and takes with `take` what it was given.
    fn leaf<T: 'static>(
        &'static self,
        what: For,
        or_else: impl Fn(&mut State) -> Option<T> + 'static,
        take: impl Fn(&mut State) -> T + 'static,
    ) -> Run<T> {
        let mut leaf = Leaf {
            world: self,
            number: None,
        };
        poll_fn(move |cx| {
            if leaf.number.is_none()
                && let Some(value) = or_else(&mut self.state.borrow_mut())
            {
                return Poll::Ready(Ok(value));
            }
            let given = leaf.poll(cx, what);
            given.map_ok(|()| take(&mut self.state.borrow_mut()))
        })
        .boxed_local()
    }

    fn scoped(&'static self, limit: Option<u32>, is_shield: bool, body: Run) -> Run {
        let mut scoped = Scoped {
            world: self,
            number: None,
            limit,
            is_shield,
            body: Some(body),
        };
        poll_fn(move |cx| scoped.poll(cx)).boxed_local()
    }
}

impl World for Model {
    fn story(&self) -> &RefCell<Vec<String>> {
        &self.story
    }

    fn now(&self) -> u64 {
        self.state.borrow().now
    }

    fn stall(&self, time: u32) {
        self.state.borrow_mut().now += u64::from(time);
    }

    fn check(&self) -> Result<(), Interrupt> {
        self.state.borrow_mut().pending().map_or(Ok(()), Err)
    }

    fn spawn(&'static self, body: Run) {
        let task = self.spawned();
        self.state.borrow_mut().tasks.push(Task {
            body: Some(body),
            is_live: true,
            is_cancelled: false,
            told: false,
            abort: false,
            value: None,
            polls: 0,
        });
        self.wake(task);
    }

    fn spawned(&self) -> usize {
        self.state.borrow().tasks.len()
    }

    fn request_cancel(&self, task: usize) -> bool {
        self.state.borrow_mut().cancel(task)
    }

    fn abort(&self, task: usize) -> bool {
        self.abort_now(task)
    }

    fn join(&'static self, task: usize) -> Run<String> {
        let take = move |state: &mut State| {
            let value = state.tasks[task].value.as_mut().unwrap();
            if value == "aborted" {
                return value.clone();
            }
            std::mem::replace(value, "taken".into())
        };
        let or_else = move |state: &mut State| (!state.tasks[task].is_live).then(|| take(state));
        self.leaf(For::End(task), or_else, take)
    }

    fn wait(&'static self, task: usize) -> Run {
        let or_else = move |state: &mut State| (!state.tasks[task].is_live).then_some(());
        self.leaf(For::End(task), or_else, |_| ())
    }

    fn sleep(&'static self, time: u32) -> Run {
        if time == 0 {
            return self.yield_now();
        }
        let mut leaf = Leaf {
            world: self,
            number: None,
        };
        poll_fn(move |cx| {
            let at = self.state.borrow().now + u64::from(time);
            leaf.poll(cx, For::Time(at))
        })
        .boxed_local()
    }

    fn yield_now(&'static self) -> Run {
        let mut is_done = false;
        poll_fn(move |cx| {
            if is_done {
                return Poll::Ready(Ok(()));
            }
            is_done = true;
            if let Some(interrupt) = self.state.borrow_mut().pending() {
                return Poll::Ready(Err(interrupt));
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .boxed_local()
    }

    fn never(&'static self) -> Run {
        self.leaf(For::Nothing, |_| None, |_| ())
    }

    fn acquire(&'static self, lock: usize) -> Run<Box<dyn Any>> {
        let free = move |state: &mut State| {
            let was_locked = std::mem::replace(&mut state.is_locked[lock], true);
            (!was_locked).then(|| Box::new(Guard(self, lock)) as Box<dyn Any>)
        };
        let take = move |_: &mut State| Box::new(Guard(self, lock)) as Box<dyn Any>;
        self.leaf(For::Lock(lock), free, take)
    }

    fn put(&'static self, queue: usize, item: usize) -> Run {
        let room = self.room;
        let push = move |state: &mut State| {
            state.items[queue].push_back(item);
            state.fire(For::Item(queue), 1);
        };
        let or_else = move |state: &mut State| {
            let taken = state.items[queue].len() + state.granted(For::Room(queue));
            (taken < room).then(|| push(state))
        };
        self.leaf(For::Room(queue), or_else, push)
    }

    fn get(&'static self, queue: usize) -> Run<usize> {
        let pop = move |state: &mut State| {
            let item = state.items[queue].pop_front().unwrap();
            state.fire(For::Room(queue), 1);
            item
        };
        let or_else = move |state: &mut State| state.has_item(queue).then(|| pop(state));
        self.leaf(For::Item(queue), or_else, pop)
    }

    fn await_event(&'static self, event: usize) -> Run {
        let or_else = move |state: &mut State| state.is_set[event].then_some(());
        self.leaf(For::Event(event), or_else, |_| ())
    }

    fn set(&self, event: usize) {
        let state = &mut *self.state.borrow_mut();
        if !std::mem::replace(&mut state.is_set[event], true) {
            state.fire(For::Event(event), usize::MAX);
        }
    }

    fn clear(&self, event: usize) {
        self.state.borrow_mut().is_set[event] = false;
    }

    fn timeout(&'static self, limit: Option<u32>, body: Run) -> Run {
        self.scoped(limit, false, body)
    }

    fn ignore(&'static self, limit: Option<u32>, body: Run) -> Run<Option<()>> {
        self.scoped(limit, false, body)
            .map(|outcome| match outcome {
                Err(Interrupt::TaskTimeout) => Ok(None),
                outcome => outcome.map(Some),
            })
            .boxed_local()
    }

    fn shield(&'static self, body: Run) -> Run {
        self.scoped(None, true, body)
    }
}
