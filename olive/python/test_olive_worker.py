"""The Python worker from outside: a child process, a socket, frames. Run with any Python from 3.8 on."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
WORKER = os.path.join(HERE, "olive_worker.py")

TASKS = """
import os, subprocess, sys, time
from os import system
from olive_worker import SoftTimeLimit, Retry, Permanent, current
import helpers

def add(a, b=0): return a + b
def whoami(): return [current().tid, current().attempt, current().timeout]
def fails(text): raise ValueError(text)
def surrogate(): raise ValueError("\\ud800")
def unwritable(): return {1, 2}
def nan(): return float("nan")
def leaves(): sys.exit(3)
def dies(): os._exit(9)
def prints(): print("to stdout"); print("to stderr", file=sys.stderr); return input() if sys.stdin.readable() else None
def echo(x): return x
def big(n): return "x" * n
def deep():
    x = []
    for _ in range(100000): x = [x]
    return x
def tidy():
    try:
        print("running", flush=True)
        time.sleep(30)
    except SoftTimeLimit:
        return "cleaned up"
def stubborn():
    print("running", flush=True)
    time.sleep(30)
def later(): raise Retry("not yet", after=7)
def never(): raise Permanent("no")
def memory(): raise MemoryError()
def fds(): return subprocess.run([sys.executable, "-c", "import os; print(os.path.exists('/proc/self/fd/%s'))" % os.environ.get("FD", "?")],
                                 stdout=subprocess.PIPE).stdout.decode().strip()
def forks():
    pid = os.fork()
    if pid == 0:
        os.close(1); os.close(2)
        time.sleep(30)
        os._exit(0)
    return pid
class Broken(Exception):
    def __str__(self): raise RuntimeError("no text")
def broken(): raise Broken()
def parses(text): return eval(text)
class Mail:
    def __init__(self): pass
    @staticmethod
    def send(to): return "sent to " + to
constant = 42
_hidden = system
helper = helpers.helper
"""
HELPERS = "def helper(): return 'helper ran'\n"
BROKEN = "raise RuntimeError('broken at import')\n"
UNPARSED = "def task():\n    return 1 +\n"
IMPORTS_UNPARSED = "import unparsed\n"


class Worker:
    """A worker process and our end of its socket."""

    def __init__(self, folder, allow=("proj_tasks",), preload=(), max_frame=1 << 26):
        ours, theirs = socket.socketpair()
        env = dict(os.environ, OLIVE_WORKER_FD=str(theirs.fileno()), FD=str(theirs.fileno()), PYTHONDONTWRITEBYTECODE="1")
        # As olive starts it: the source comes on stdin, so that no file needs to be installed.
        with open(WORKER, "rb") as source:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-"], stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
                pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        ours.settimeout(60)
        self.sock = ours
        self.hello = self.receive()[0]
        self.send({"op": "welcome", "allow": list(allow), "preload": list(preload), "path": [folder], "max_frame": max_frame})
        self.first = self.receive()[0]

    def send(self, head, blob=b""):
        text = json.dumps(head).encode()
        self.sock.sendall(struct.pack(">II", 4 + len(text) + len(blob), len(text)) + text + blob)

    def exactly(self, n):
        data = b""
        while len(data) < n:
            more = self.sock.recv(n - len(data))
            if not more:
                return None
            data += more
        return data

    def receive(self):
        lengths = self.exactly(8)
        if lengths is None:
            return None
        total, head = struct.unpack(">II", lengths)
        frame = self.exactly(total - 4)
        return json.loads(frame[:head]), frame[head:]

    def start(self, func, *args, **kwargs):
        body = {"func": func, "args": args, "kwargs": kwargs, "tid": "t1", "timeout": -1, "resp_exchange": None, "resp_routing_key": None}
        self.send({"op": "task", "tid": "t1", "attempt": 2, "timeout": 1.5}, json.dumps(body).encode())

    def call(self, func, *args, **kwargs):
        self.start(func, *args, **kwargs)
        return self.receive()

    def close(self):
        self.sock.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


class WorkerTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        for name, text in [("proj_tasks", TASKS), ("helpers", HELPERS), ("broken", BROKEN), ("unparsed", UNPARSED), ("imports_unparsed", IMPORTS_UNPARSED)]:
            with open(os.path.join(cls.folder.name, name + ".py"), "w") as f:
                f.write(textwrap.dedent(text))

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def worker(self, **options):
        worker = Worker(self.folder.name, **options)
        self.addCleanup(worker.close)
        return worker

    def refused(self, worker, func, verdict):
        head, _ = worker.call(func)
        self.assertEqual((head["op"], head.get("verdict")), ("fail", verdict), (func, head))
        return head["message"]

    def test_a_task_runs_and_its_result_is_json(self):
        w = self.worker()
        self.assertEqual((w.hello["proto"], w.hello["lang"], w.hello["pid"]), (1, "python", w.process.pid))
        self.assertEqual(w.first, {"op": "ready"})
        head, blob = w.call("proj_tasks.add", 40, b=2)
        self.assertEqual((head["op"], head["tid"], blob), ("done", "t1", b"42"))
        self.assertGreater(head["rss_kb"], 1000)
        self.assertEqual(json.loads(w.call("proj_tasks.whoami")[1]), ["t1", 2, 1.5])
        self.assertEqual(w.call("proj_tasks.Mail.send", "me")[1], b'"sent to me"')
        self.assertEqual(w.call("proj_tasks.nan")[1], b"NaN")

    def test_a_failure_carries_type_message_and_the_tasks_own_traceback(self):
        head, _ = self.worker().call("proj_tasks.fails", "bad")
        self.assertEqual((head["kind"], head["module"], head["message"], head["verdict"]), ("ValueError", "builtins", "bad", "failed"))
        self.assertIn("in fails", head["trace"])
        self.assertNotIn("<stdin>", head["trace"])

    def test_failures_that_are_hard_to_tell_are_told(self):
        w = self.worker()
        self.assertEqual(w.call("proj_tasks.surrogate")[0]["message"], "?")
        self.assertIn("__str__ raised RuntimeError", w.call("proj_tasks.broken")[0]["message"])
        self.assertEqual(w.call("proj_tasks.memory")[0]["kind"], "MemoryError")
        self.assertEqual(w.call("proj_tasks.add")[0]["kind"], "TypeError")

    def test_a_result_that_is_not_json_or_too_large_is_a_failure(self):
        w = self.worker(max_frame=10000)
        for func, kind in [("unwritable", "ResultNotSerializable"), ("deep", "ResultNotSerializable")]:
            head, _ = w.call("proj_tasks." + func)
            self.assertEqual((head["kind"], head["verdict"]), (kind, "permanent"))
        self.assertEqual(w.call("proj_tasks.big", 9000)[0]["kind"], "ResultTooLarge")
        self.assertEqual(len(w.call("proj_tasks.big", 1000)[1]), 1002)

    def test_a_task_that_exits_does_not_end_its_worker(self):
        w = self.worker()
        head, _ = w.call("proj_tasks.leaves")
        self.assertEqual((head["kind"], head["message"]), ("SystemExit", "3"))
        self.assertEqual(w.call("proj_tasks.add", 1)[1], b"1")

    def test_a_worker_that_dies_closes_the_socket(self):
        w = self.worker()
        self.assertIsNone(w.call("proj_tasks.dies"))
        self.assertEqual(w.process.wait(60), 9)

    def test_large_bodies_and_results_pass_both_ways(self):
        data = "x" * (8 << 20)
        head, blob = self.worker().call("proj_tasks.echo", data)
        self.assertEqual((head["op"], len(blob)), ("done", len(data) + 2))

    def test_retry_and_permanent_say_so(self):
        w = self.worker()
        head, _ = w.call("proj_tasks.later")
        self.assertEqual((head["verdict"], head["after"], head["message"]), ("retry", 7, "not yet"))
        self.assertEqual(w.call("proj_tasks.never")[0]["verdict"], "permanent")

    def test_the_soft_limit_is_raised_in_the_task(self):
        w = self.worker()
        for func in ["tidy", "stubborn"]:
            w.start("proj_tasks." + func)
            self.assertEqual(w.process.stdout.readline(), b"running\n")
            os.kill(w.process.pid, signal.SIGUSR1)
            head, blob = w.receive()
            if func == "tidy":
                self.assertEqual((head["op"], blob), ("done", b'"cleaned up"'))
            else:
                self.assertEqual((head["verdict"], head["kind"]), ("timeout", "SoftTimeLimit"))

    def test_a_late_soft_limit_harms_nobody(self):
        w = self.worker()
        self.assertEqual(w.call("proj_tasks.add", 1)[1], b"1")
        os.kill(w.process.pid, signal.SIGUSR1)
        self.assertEqual(w.call("proj_tasks.add", 2)[1], b"2")

    def test_stdout_and_stderr_belong_to_the_tasks(self):
        w = self.worker()
        head, _ = w.call("proj_tasks.prints")
        self.assertEqual(head["kind"], "EOFError", "stdin is at its end")
        self.assertEqual(w.process.stdout.readline(), b"to stdout\n")
        self.assertEqual(w.process.stderr.readline(), b"to stderr\n")

    def test_the_socket_is_not_inherited(self):
        w = self.worker()
        self.assertEqual(w.call("proj_tasks.fds")[1], b'"False"')
        pid = int(w.call("proj_tasks.forks")[1])
        try:
            w.send({"op": "bye"})
            self.assertIsNone(w.receive(), "the end of the worker is seen although its fork lives")
            self.assertEqual(w.process.wait(60), 0)
        finally:
            os.kill(pid, signal.SIGKILL)

    def test_the_worker_leaves_when_the_app_is_gone_even_in_a_task(self):
        w = self.worker()
        w.start("proj_tasks.stubborn")
        self.assertEqual(w.process.stdout.readline(), b"running\n")
        w.sock.close()
        self.assertEqual(w.process.wait(25), 0)

    def test_pings_are_answered_and_bye_ends_it(self):
        w = self.worker()
        w.send({"op": "ping"})
        self.assertEqual(w.receive()[0], {"op": "pong"})
        w.send({"op": "bye"})
        self.assertEqual(w.process.wait(60), 0)

    def test_an_import_that_fails_at_preload_is_told_with_its_traceback(self):
        first = self.worker(preload=["broken"]).first
        self.assertEqual(first["op"], "unfit")
        self.assertIn("broken at import", first["trace"])
        self.assertIn('broken.py", line 1', first["trace"])
        self.assertIn("nosuchmodule", self.worker(preload=["nosuchmodule"]).first["trace"])

    # Accepts: allow_list
    def test_only_functions_of_allowed_modules_run(self):
        w = self.worker()
        for func in ["os.system", "helpers.helper", "proj_tasks.helper", "proj_tasks.system", "proj_tasks._hidden", "proj_tasks.os.system",
                     "proj_tasks.subprocess.Popen", "proj_tasks.add.__globals__", "proj_tasks.Mail.__init__", "proj_tasks.Mail.mro", "add",
                     "proj_tasks", "__main__.main", "os.system\n", "", "proj_tasks.", ".add", "proj_tasks.add()", "olive.tasks.sleep_n"]:
            self.refused(w, func, "not_allowed")
        self.assertNotIn("'os.system' is not allowed (olive_worker_allow=proj_tasks): it comes", self.refused(w, "os.system", "not_allowed"))
        self.assertIn("it comes from module helpers", self.refused(w, "proj_tasks.helper", "not_allowed"))
        self.assertIn("'proj_tasks.add'", self.refused(w, "proj_tasks.ad", "not_registered"))
        self.refused(w, "proj_tasks.constant", "not_registered")

    def test_an_empty_list_allows_nothing_and_says_which_setting_to_set(self):
        self.assertIn("olive_worker_allow", self.refused(self.worker(allow=[]), "proj_tasks.add", "not_allowed"))

    def test_a_star_allows_the_modules_below_and_not_the_module_itself(self):
        w = self.worker(allow=["proj_tasks.*"])
        self.refused(w, "proj_tasks.add", "not_allowed")
        self.refused(w, "proj_tasks.sub.add", "not_registered")

    def test_an_error_inside_a_tasks_module_is_the_tasks_failure(self):
        head, _ = self.worker(allow=["broken"]).call("broken.task")
        self.assertEqual((head["kind"], head["message"], head["verdict"]), ("RuntimeError", "broken at import", "failed"))

    def test_source_that_does_not_parse_will_not_at_the_next_attempt_either(self):
        w = self.worker(allow=["unparsed", "imports_unparsed", "proj_tasks"])
        for func in ["unparsed.task", "imports_unparsed.task"]:
            head, _ = w.call(func)
            self.assertEqual((head["kind"], head["verdict"]), ("SyntaxError", "permanent"), head)
            self.assertIn('unparsed.py", line 2', head["trace"])
        head, _ = w.call("proj_tasks.parses", "((")
        self.assertEqual((head["kind"], head["verdict"]), ("SyntaxError", "failed"), "what a task itself parses is another thing")

    # Accepts: seed/python_import_path
    def test_sweepeas_own_tasks_are_there_without_a_module_of_that_name(self):
        w = self.worker(allow=["olive.tasks"])
        self.assertEqual(w.call("olive.tasks.sleep_n", 0)[1], b"null")
        self.assertEqual(w.call("olive.tasks.do_nothing")[1], b"null")
        self.refused(w, "olive.tasks.other", "not_registered")

    # Accepts: seed/python_import_path
    def test_a_users_own_module_of_that_name_comes_first(self):
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(os.path.join(folder, "olive"))
            with open(os.path.join(folder, "olive", "tasks.py"), "w") as f:
                f.write("def do_nothing(): return 'mine'\n")
            w = Worker(folder, allow=["olive.tasks"])
            self.addCleanup(w.close)
            self.assertEqual(w.call("olive.tasks.do_nothing")[1], b'"mine"')


if __name__ == "__main__":
    unittest.main()
