"""Olive's Python worker: runs functions by import path for the process that started it.

One file, no dependencies, Python 3.8 or later. Olive starts it as a child process and talks to it over a socket (descriptor 3, named
by OLIVE_WORKER_FD), so stdin, stdout and stderr belong to the tasks. A frame is

    u32 length of what follows, u32 length of the head, head (JSON object with "op"), blob (bytes)

with both numbers big-endian. The child says hello, gets welcome, imports what it was told to, says ready, and then answers each task
with done or fail. Tasks run in the main thread, one at a time.

What a task may import from here: SoftTimeLimit (raised in it when its time is up), Retry and Permanent (raised by it), current().
"""

import importlib
import json
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types

PROTOCOL = 1
# No part may start with two underscores: from __globals__ or __class__ everything is within reach.
FUNCTION = re.compile(r"(?!__)[A-Za-z_]\w*(\.(?!__)[A-Za-z_]\w*)+")


class SoftTimeLimit(Exception):
    """The task's time is up. It may clean up, for a moment; then its process is killed."""


class Retry(Exception):
    """Raised by a task that wants another attempt, after `after` seconds or after the usual backoff."""

    def __init__(self, message="", after=None):
        super().__init__(message)
        self.after = after


class Permanent(Exception):
    """Raised by a task that knows that no further attempt can help."""


class NotRegistered(Exception):
    """There is no such function."""


class NotAllowed(Exception):
    """The function is not one of an allowed module."""


class Current:
    """The task that is running: its id, which attempt this is (from 1), and the seconds it was given (None: no limit)."""

    def __init__(self, tid, attempt, timeout):
        self.tid, self.attempt, self.timeout = tid, attempt, timeout


_current = None
_interruptible = False


def current():
    """The task that is running, or None outside of one."""
    return _current


def allowed(entries, module):
    """Whether one of the entries (`proj.tasks`, `proj.jobs.*`) names the module."""
    for entry in entries:
        if entry.endswith(".*"):
            if module.startswith(entry[:-1]) and len(module) > len(entry) - 1:
                return True
        elif entry == module:
            return True
    return False


def resolve(path, entries):
    """The function of that import path, if it is one of an allowed module.

    Nothing is imported that the list does not name. And the function itself must come from a module that it names, or
    `from os import system` in an allowed module would open the door that the list closes.
    """
    if not entries:
        text = "function %r is not allowed: olive_worker_allow is empty; set it to the modules whose functions may run"
        raise NotAllowed(text % path)
    if not FUNCTION.fullmatch(path):
        raise NotAllowed("function %r is not allowed: it is not the import path of a function, such as proj.tasks.add" % path)
    refused = NotAllowed("function %r is not allowed (olive_worker_allow=%s)" % (path, ",".join(entries)))
    parts = path.split(".")
    found = None
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        if allowed(entries, name):
            module = import_module(name)
            if module is not None:
                found = module
                break
    else:
        if any(allowed(entries, ".".join(parts[:cut])) for cut in range(1, len(parts))):
            raise NotRegistered("there is no module for %r; looked for it in %s; olive_worker_path adds folders" % (path, ":".join(p or "." for p in sys.path)))
        raise refused
    for part in parts[cut:]:
        try:
            found = getattr(found, part)
        except AttributeError:
            near = closest(part, vars(found)) if isinstance(found, (types.ModuleType, type)) else None
            hint = " - did you mean %r?" % ".".join(parts[:cut] + [near]) if near else ""
            file = getattr(sys.modules.get(name), "__file__", None)
            place = " in %s" % file if file else ""
            raise NotRegistered("there is no function %r%s%s" % (path, place, hint)) from None
    if not callable(found):
        raise NotRegistered("%r is not a function" % path)
    home = getattr(found, "__module__", None)
    if not isinstance(home, str) or not allowed(entries, home):
        raise NotAllowed("%s: it comes from module %s" % (refused, home))
    return found


def closest(name, names):
    import difflib

    near = difflib.get_close_matches(name, [n for n in names if not n.startswith("_")], 1)
    return near[0] if near else None


def import_module(name):
    """The module, or None if there is none of that name. An error inside the module is the caller's to see."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
    return builtin_tasks() if name == "olive.tasks" else None


def builtin_tasks():
    """The functions that sweepea's own producers name, for those who have no module olive.tasks themselves."""
    module = types.ModuleType("olive.tasks", "Functions to try olive with.")

    def sleep_n(n):
        time.sleep(n)

    def do_nothing():
        pass

    for function in (sleep_n, do_nothing):
        function.__module__ = module.__name__
        setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
    return module


def is_users(trace):
    """Whether this line of a traceback is the user's, not this file's or that of the import machinery."""
    file = trace.tb_frame.f_code.co_filename
    return file not in (is_users.__code__.co_filename, importlib.__file__) and not file.startswith("<frozen importlib")


def failure(error):
    """The fields of a failure: what was raised, with the traceback from the user's first line on."""
    trace = error.__traceback__
    while trace is not None and not is_users(trace):
        trace = trace.tb_next
    try:
        message = str(error)
    except Exception as inner:  # a broken __str__ is no reason to lose the failure
        message = "<%s, and its __str__ raised %s>" % (type(error).__name__, type(inner).__name__)
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except Exception:
        text = "%s: %s\n" % (type(error).__name__, message)
    kind = type(error)
    return {
        "kind": cut(kind.__name__, 255),
        "module": cut(str(kind.__module__), 255),
        "message": cut(message, 8192),
        "trace": cut(text, 65536, True),
    }


def cut(text, most, keep_end=False):
    # A lone surrogate cannot be written as UTF-8, and JSON parsers other than Python's refuse it.
    text = text.encode("utf-8", "replace").decode("utf-8")
    if len(text) <= most:
        return text
    return "…" + text[-most:] if keep_end else text[:most] + "…"


def on_soft_limit(signum, frame):
    # A signal that comes late, between two tasks, is nobody's business any more.
    global _interruptible
    if _interruptible:
        _interruptible = False
        raise SoftTimeLimit("the time of the task is up")


def call(function, args, kwargs):
    global _interruptible
    _interruptible = True
    try:
        return function(*args, **kwargs)
    finally:
        _interruptible = False


def run(head, blob, entries, max_frame):
    """Runs one task. The head and the blob of the answer."""
    global _current
    tid = head["tid"]
    started = time.monotonic()
    _current = Current(tid, head.get("attempt", 1), head.get("timeout"))
    verdict, after, function = "failed", None, None
    try:
        message = json.loads(blob.decode("utf-8"))
        function = resolve(message["func"], entries)
        value = call(function, message.get("args") or [], message.get("kwargs") or {})
        try:
            result = json.dumps(value, separators=(",", ":")).encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            text = "the result, a %s, is not JSON: %s" % (type(value).__name__, error)
            fields = {"kind": "ResultNotSerializable", "module": "olive.exceptions", "message": cut(text, 8192), "trace": ""}
            return dict(fields, op="fail", tid=tid, verdict="permanent"), b""
        if len(result) + 4096 > max_frame:
            text = "result of %d bytes, olive_worker_max_frame allows %d" % (len(result), max_frame)
            fields = {"kind": "ResultTooLarge", "module": "olive.exceptions", "message": text, "trace": ""}
            return dict(fields, op="fail", tid=tid, verdict="permanent"), b""
        ms = (time.monotonic() - started) * 1000
        return {"op": "done", "tid": tid, "ms": ms, "rss_kb": rss_kb()}, result
    except SoftTimeLimit as error:
        verdict, caught = "timeout", error
    except Retry as error:
        verdict, after, caught = "retry", error.after, error
    except Permanent as error:
        verdict, caught = "permanent", error
    except NotAllowed as error:
        verdict, caught = "not_allowed", error
    except NotRegistered as error:
        verdict, caught = "not_registered", error
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: a task ends itself, not its worker
        # Source that does not parse will not at the next attempt either. What a task itself parses is its own business.
        if function is None and isinstance(error, SyntaxError):
            verdict = "permanent"
        caught = error
    finally:
        _current = None
    fields = failure(caught)
    if isinstance(caught, (NotAllowed, NotRegistered)):
        fields["module"], fields["trace"] = "celery.exceptions" if verdict == "not_registered" else "olive.exceptions", ""
    return dict(fields, op="fail", tid=tid, verdict=verdict, after=after), b""


def rss_kb():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


class Channel:
    """Frames over the socket."""

    def __init__(self, sock):
        self.sock = sock

    def send(self, head, blob=b""):
        text = json.dumps(head, separators=(",", ":")).encode("utf-8")
        self.sock.sendall(struct.pack(">II", 4 + len(text) + len(blob), len(text)) + text + blob)

    def receive(self):
        """The head and the blob of the next frame; None at the end."""
        lengths = self.exactly(8)
        if lengths is None:
            return None
        total, head = struct.unpack(">II", lengths)
        frame = self.exactly(total - 4)
        if frame is None:
            return None
        return json.loads(bytes(frame[:head])), frame[head:]

    def exactly(self, count):
        data = bytearray(count)
        view, have = memoryview(data), 0
        while have < count:
            n = self.sock.recv_into(view[have:])
            if n == 0:
                return None
            have += n
        return data


def leave_with_the_app(fd):
    """Ends this process when the app is gone, even while a task runs: nobody is left to tell the result to."""
    poll = select.poll()
    poll.register(fd, 0)  # asks for nothing, so that only the hang-up is reported
    while not any(event & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, event in poll.poll()):
        pass
    os._exit(0)


def main():
    # Tasks import what they raise from here by this name, wherever this file was read from.
    sys.modules["olive_worker"] = sys.modules[__name__]
    fd = int(os.environ.pop("OLIVE_WORKER_FD"))
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    if hasattr(os, "register_at_fork"):
        # A process that a task forks must not hold the socket open: its end is how the app sees this one die.
        os.register_at_fork(after_in_child=sock.close)
    signal.signal(signal.SIGUSR1, on_soft_limit)
    threading.Thread(target=leave_with_the_app, args=(fd,), name="olive-watch", daemon=True).start()

    channel = Channel(sock)
    version = "%d.%d.%d" % sys.version_info[:3]
    channel.send({"op": "hello", "proto": PROTOCOL, "lang": "python", "ver": version, "pid": os.getpid()})
    frame = channel.receive()
    if frame is None:
        return
    welcome = frame[0]
    sys.path[:0] = [os.path.abspath(p) for p in welcome.get("path", [])]
    for name in welcome.get("preload", []):
        try:
            if import_module(name) is None:
                raise ModuleNotFoundError("No module named %r" % name, name=name)
        except BaseException as error:
            channel.send({"op": "unfit", "trace": "importing %s: %s" % (name, failure(error)["trace"])})
            return
    channel.send({"op": "ready"})

    while True:
        frame = channel.receive()
        if frame is None or frame[0]["op"] == "bye":
            break
        if frame[0]["op"] == "ping":
            channel.send({"op": "pong"})
        else:
            channel.send(*run(frame[0], frame[1], welcome.get("allow", []), welcome["max_frame"]))


if __name__ == "__main__":
    main()
