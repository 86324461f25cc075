"""Celery as its users run it: an unmodified worker of its own processes, and results by rpc, which is by messages."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from checks import check, equal, main, unique

PATIENCE = 60
QUEUE, NODE = unique("celery"), unique("worker") + "@localhost"


@contextlib.contextmanager
def worker(url):
    """A worker with a queue of its own, which is asked to finish in the end; gives the module of its tasks."""
    os.environ |= {"CELERY_CHECK_BROKER": url, "CELERY_CHECK_QUEUE": QUEUE}
    folder = Path(__file__).parent
    sys.path.insert(0, str(folder))
    import celery_app

    command = [sys.executable, "-m", "celery", "-A", "celery_app", "worker", "-c", "2", "-l", "INFO", "-n", NODE]
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, env=os.environ | {"C_FORCE_ROOT": "yes"})
    try:
        yield celery_app
        process.terminate()
        equal(process.wait(PATIENCE), 0)
    finally:
        process.kill()
        with celery_app.app.connection() as connection:
            connection.channel().queue_delete(QUEUE)


@check
def tasks_travel_there_and_back(url):
    with worker(url) as tasks:
        equal(tasks.add.delay(40, 2).get(timeout=PATIENCE), 42)
        results = [tasks.add.delay(number, number) for number in range(100)]
        equal([result.get(timeout=PATIENCE) for result in results], [2 * number for number in range(100)])


@check
def a_task_is_tried_again(url):
    with worker(url) as tasks:
        equal(tasks.third_time_lucky.delay().get(timeout=PATIENCE), 2)


@check
def an_error_is_told(url):
    with worker(url) as tasks:
        try:
            tasks.add.delay(1, "2").get(timeout=PATIENCE)
        except TypeError as told:
            equal("unsupported operand" in str(told), True)
        else:
            raise AssertionError("added a number and a text")


@check
def remote_control_answers(url):
    with worker(url) as tasks:
        tasks.add.delay(1, 2).get(timeout=PATIENCE)
        [queues] = tasks.app.control.inspect([NODE], timeout=PATIENCE, limit=1).active_queues().values()
        equal([queue["name"] for queue in queues], [QUEUE])


if __name__ == "__main__":
    main()
