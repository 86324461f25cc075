"""Runs random programs on Curio, for comparison with our kernel: a program as a line of JSON comes in, its story goes out.

Time is virtual: Curio gets its clock and its selector from here, and instead of sleeping the clock jumps. Where our kernel
decides otherwise on purpose, Curio is made to agree by one of the classes below, each with the reason; what no class can mend, the
generator of the programs leaves out (tests/it/kernel_curio.rs).
"""

import heapq
import json
import logging
import math
import selectors
import sys
import time
from collections import deque

NOW = 0.0
TICKS = 0
# When a run ends. What tasks say afterwards is of no interest.
END = 1_000_000_000


def monotonic():
    """A little later each time it is asked, so that of two deadlines set at the same time the first expires first."""
    global TICKS
    TICKS += 1
    return NOW + TICKS * 1e-7


time.monotonic = monotonic

import curio  # noqa: E402 (it takes the clock at its import)
from curio.errors import CancelledError, TaskError, TaskTimeout, UncaughtTimeoutError  # noqa: E402
from curio.sched import SchedFIFO  # noqa: E402
from curio.time import _TimeoutAfter  # noqa: E402
from curio.traps import _set_timeout  # noqa: E402

INTERRUPTS = (CancelledError, UncaughtTimeoutError)
NAMES = {
    "TaskCancelled": "Cancelled(Reason(none))",
    "CancelledError": "Cancelled(Reason(none))",
    "TaskTimeout": "TaskTimeout",
    "TimeoutCancellationError": "TimeoutCancellation",
    "UncaughtTimeoutError": "UncaughtTimeout",
}


class JumpingSelector(selectors.SelectSelector):
    """Nothing here does I/O, so a wait for it is a jump of the clock."""

    def select(self, timeout=None):
        global NOW
        if timeout is None:
            raise AssertionError("every task waits, and none for a time")
        NOW += max(timeout, 0)
        return []


class Deadlines:
    """Of two far deadlines of a task Curio's queue keeps the earlier, though that one may have been given up; then none is left. This
    one keeps all; the kernel knows those that are out of date."""

    def __init__(self):
        self.heap = []

    def push(self, item, expires):
        heapq.heappush(self.heap, (expires, item))

    def cancel(self, _item, _expires):
        pass

    def next_deadline(self, now):
        return max(self.heap[0][0] - now, 0) if self.heap else None

    def expired(self, now):
        while self.heap and self.heap[0][0] <= now:
            yield heapq.heappop(self.heap)


class OrderedTask(curio.task.Task):
    """Curio wakes all joiners in the order of a set, that is: in none; we in the order in which they came.

    In Curio a timeout takes the place of a cancellation that was not told yet, which is lost with it; here the cancellation stays, since
    it comes from further out."""

    _pending = None

    @property
    def cancel_pending(self):
        return self._pending

    @cancel_pending.setter
    def cancel_pending(self, interrupt):
        is_late = isinstance(interrupt, TaskTimeout)
        if not (is_late and self._pending and not isinstance(self._pending, TaskTimeout)):
            self._pending = interrupt

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.joining = SchedFIFO()
        self.cancellations = 0

    async def cancel(self, **kwargs):
        if not self.terminated and not self.cancelled:
            self.cancellations += 1
            now = monotonic()
            # In place: blocks hold this list too.
            self._deadlines[:] = [end if end < now else math.inf for end in self._deadlines]
        await super().cancel(**kwargs)


class Timeout(_TimeoutAfter):
    """A cancellation switches off the timeouts that it finds, here and there. But in Curio they come back when an inner block of
    theirs ends, and a later timeout is taken for theirs.

    When an inner block ends after the deadline of an outer one, the outer interrupts the task once more: here its next wait, as
    Curio's comments want it too, in Curio what it waits for when the timers are looked at next."""

    async def __aenter__(self):
        self.task = await curio.current_task()
        self.cancellations = self.task.cancellations
        return await super().__aenter__()

    async def __aexit__(self, *error):
        if self.task.cancellations > self.cancellations:
            self._prior = None
        now = await curio.clock()
        again = None
        if self._prior is not None and self._prior < now:
            self._prior, again = None, TaskTimeout(now)
        try:
            return await super().__aexit__(*error)
        finally:
            self.task.cancel_pending = self.task.cancel_pending or again


class OrderedEvent(curio.Event):
    """As with joiners."""

    def __init__(self):
        super().__init__()
        self._waiting = SchedFIFO()

    async def set(self):
        self._set = True
        if self._waiting:
            await self._waiting.wake(len(self._waiting))


class FairQueue:
    """In Curio's a newcomer may take the item, or the room, for which a waiter was woken; ours keeps it for the waiter."""

    def __init__(self, room):
        self.queue = deque()
        self.items, self.room = curio.Semaphore(0), curio.Semaphore(room)

    async def put(self, item):
        await self.room.acquire()
        self.queue.append(item)
        await self.items.release()

    async def get(self):
        await self.items.acquire()
        item = self.queue.popleft()
        await self.room.release()
        return item


class ShieldedCondition(curio.Condition):
    """Curio's may be interrupted while it takes the lock again, and then leaves without; ours takes it whatever happens. And Curio's
    kernel dies of a notify with fewer waiters than it wants to wake."""

    async def wait(self):
        await self.release()
        try:
            await self._waiting.suspend("COND_WAIT")
        finally:
            async with curio.disable_cancellation():
                await self.acquire()

    async def notify(self, n=1):
        await self._waiting.wake(min(n, len(self._waiting)))


class OrderedGroup(curio.TaskGroup):
    """Curio cancels what is left of a group in the order of a set, and waits for each before it asks the next; we ask all, in the
    order of their creation, and then wait for all."""

    async def cancel_remaining(self):
        running = sorted(self._running, key=lambda task: task.id)
        for task in running:
            await task.cancel(blocking=False)
        for task in running:
            await task.wait()
            self._task_discard(task)

    async def join(self):
        # With nothing left to cancel, what Curio's own join does at its end is nothing.
        wait, group = self._wait, self
        try:
            await super_join_without_cancelling(group, wait)
        finally:
            for task in group.tasks:
                await task.cancel(blocking=False)
            for task in group.tasks:
                await task.wait()
            self._joined = True


async def super_join_without_cancelling(group, wait):
    """The policy of Curio's `TaskGroup.join`, whose other half is in a `finally` that cannot be taken apart."""
    if wait is None:
        return
    while group._finished or group._running:
        while not group._finished:
            await group._sema.acquire()
        while group._finished:
            task = group._finished.popleft()
            is_nothing = wait is object and not task.exception and task.result is None
            # With us a failure, which ends the wait, is always the one that is told; with Curio only if nobody ended before.
            if task.exception or (group.completed is None and not is_nothing):
                group.completed = task
            if task.exception or wait is any or (wait is object and task.result is not None):
                return


async def arm_again():
    """Of a task's deadlines Curio arms the earliest alone, and the next when the block of that one ends: whoever catches a timeout
    inside its block has none for the rest of it. With us each block keeps its own."""
    task = await curio.current_task()
    now = await curio.clock()
    if later := [deadline for deadline in task._deadlines if now < deadline < math.inf]:
        await _set_timeout(min(later))


def kind(error):
    return NAMES[type(error).__name__]


def option(value):
    return "None" if value is None else f"Some({value})"


class World:
    def __init__(self, room):
        self.story = []
        self.tasks = []
        self.members = set()
        self.taken = set()
        self.locks = [curio.Lock(), curio.Lock()]
        self.rlocks = [curio.RLock(), curio.RLock()]
        self.semaphores = [curio.Semaphore(2), curio.Semaphore(2)]
        self.conditions = [ShieldedCondition(), ShieldedCondition()]
        self.queues = [FairQueue(room), FairQueue(room)]
        self.events = [OrderedEvent(), OrderedEvent()]

    def tell(self, me, text):
        if NOW < END:
            self.story.append(f"{round(NOW)} us, task {me}: {text}")

    async def start(self, ops, spawn):
        me = len(self.tasks)
        self.tasks.append(None)

        async def body():
            try:
                await self.block(me, ops)
            except INTERRUPTS as error:
                self.tell(me, f"ends: Err({kind(error)})")
                raise
            self.tell(me, "ends: Ok(())")
            return me if me % 2 else None

        self.tasks[me] = await spawn(body)
        return me

    async def block(self, me, ops):
        for op in ops:
            await self.step(me, *op)

    async def told(self, me, text, body, answer="()"):
        try:
            value = await body
        except INTERRUPTS as error:
            self.tell(me, f"{text} -> Err({kind(error)})")
            raise
        self.tell(me, f"{text} -> Ok({value if answer is None else answer})")
        return value

    async def step(self, me, name, *args):
        await getattr(self, name)(me, *args)

    def nth(self, back):
        return len(self.tasks) - 1 - back % len(self.tasks)

    async def sleep(self, me, duration):
        await self.told(me, f"sleep {duration}", curio.sleep(duration))

    async def yield_now(self, me):
        await self.told(me, "yield", curio.sleep(0))

    async def check(self, me):
        await self.told(me, "check", curio.check_cancellation())

    async def spawn(self, _me, ops):
        await self.start(ops, lambda body: curio.spawn(body, daemon=True))

    async def request(self, me, back):
        number = self.nth(back)
        task = self.tasks[number]
        asked = not task.terminated and not task.cancelled
        await task.cancel(blocking=False)
        self.tell(me, f"request cancel of {number} -> {str(asked).lower()}")

    async def cancel(self, me, back):
        number = self.nth(back)
        await self.told(me, f"cancel {number}", self.tasks[number].cancel())

    async def join(self, me, back):
        number = self.nth(back)

        async def join():
            await self.tasks[number].wait()
            if number in self.members:
                return '"of a group"'
            if number in self.taken:
                return '"taken"'
            self.taken.add(number)
            try:
                await self.tasks[number].join()
                return '"Ok(())"'
            except TaskError as error:
                return f'"Err({kind(error.__cause__)})"'

        await self.told(me, f"join {number}", join(), None)

    async def wait(self, me, back):
        number = self.nth(back)
        await self.told(me, f"wait {number}", self.tasks[number].wait())

    async def timeout(self, me, limit, ops):
        async def body():
            async with Timeout(limit):
                await self.block(me, ops)

        await self.told(me, f"timeout {option(limit)}", body())

    async def ignore(self, me, limit, ops):
        async def body():
            async with Timeout(limit, ignore=True):
                await self.block(me, ops)
                return "Some(())"
            return "None"

        await self.told(me, f"ignore {option(limit)}", body(), None)

    async def shield(self, me, ops):
        await self.told(me, "shield", curio.disable_cancellation(self.block, me, ops))

    async def attempt(self, me, ops):
        try:
            await self.told(me, "attempt", self.block(me, ops))
        except INTERRUPTS:
            await arm_again()

    async def finish(self, me, ops, last):
        try:
            await self.told(me, "finally", self.block(me, ops))
        except INTERRUPTS as error:
            await arm_again()
            await self.block(me, last)
            raise error
        else:
            await self.block(me, last)

    async def held(self, me, text, lock, ops):
        await self.told(me, text, lock.acquire())
        try:
            await self.block(me, ops)
        finally:
            await lock.release()

    async def locked(self, me, lock, ops):
        await self.held(me, f"acquire {lock}", self.locks[lock], ops)

    async def relocked(self, me, lock, ops):
        await self.held(me, f"acquire again {lock}", self.rlocks[lock], ops)

    async def permitted(self, me, semaphore, ops):
        await self.held(me, f"permit {semaphore}", self.semaphores[semaphore], ops)

    async def notified(self, me, condition):
        async def wait():
            async with self.conditions[condition]:
                await self.conditions[condition].wait()

        await self.told(me, f"condition {condition}", wait())

    async def notify(self, me, condition, count):
        async def notify():
            async with self.conditions[condition]:
                await self.conditions[condition].notify(count)

        await self.told(me, f"notify {condition}", notify())

    async def put(self, me, queue):
        item = len(self.story)
        await self.told(me, f"put {item} into {queue}", self.queues[queue].put(item))

    async def get(self, me, queue):
        await self.told(me, f"get from {queue}", self.queues[queue].get(), None)

    async def await_event(self, me, event):
        await self.told(me, f"await {event}", self.events[event].wait())

    async def set_event(self, _me, event):
        await self.events[event].set()

    async def clear_event(self, _me, event):
        self.events[event].clear()

    async def group(self, me, wait, bodies, ops, iterate):
        policy = {"All": all, "Any": any, "First": object, "None": None}[wait]

        def result(task):
            return f"Err({kind(task.exception)})" if task.exception else f"Ok({option(task.result)})"

        async def group():
            async with OrderedGroup(wait=policy) as group:
                for body in bodies:
                    self.members.add(await self.start(body, group.spawn))
                await self.block(me, ops)
                if iterate:
                    async for task in group:
                        self.tell(me, f"done {self.tasks.index(task)}: {result(task)}")
            completed = None if group.completed is None else self.tasks.index(group.completed)
            results = [f"{self.tasks.index(task)}: {result(task)}" for task in group.tasks]
            return f"{option(completed)} of [{', '.join(results)}]"

        await self.told(me, f"group {wait}", group(), None)


def story_of(program):
    global NOW, TICKS
    NOW, TICKS = 0.0, 0
    world = World(program["room"])

    async def main():
        await world.spawn(None, program["main"])
        await curio.sleep(END)

    kernel = curio.Kernel(selector=JumpingSelector(), taskcls=OrderedTask)
    try:
        kernel.run(main)
    except Exception as error:
        world.story.append(f"Curio died: {error!r}")
    # A shutdown would wait for tasks that nobody can wake any more; they are dropped where they wait.
    kernel._shutdown_funcs = None
    kernel._tasks.clear()
    return world.story


curio.kernel.TimeQueue = Deadlines
# Tasks that are dropped where they wait complain about it.
logging.disable(logging.CRITICAL)
sys.unraisablehook = lambda _: None

for line in sys.stdin:
    print(json.dumps(story_of(json.loads(line))), flush=True)
