"""A user's module with the kinds of tasks that the tests need."""

import os
import socket
import sys
import time
from os import getpid  # an allowed module must not open the door to what it imports

__all__ = ["add", "at_gate", "echo", "fail", "getpid", "leave", "shout", "who"]


def add(a, b=0):
    return a + b


def echo(*args, **kwargs):
    return {"args": args, "kwargs": kwargs}


def fail(text):
    raise ValueError(text)


def leave(code):
    """Ends the process without a word."""
    os._exit(code)


def who(seconds):
    """Takes that long and tells which process did it."""
    time.sleep(seconds)
    return os.getpid()


def shout(text):
    """Writes to both streams, which must not disturb the answer."""
    print(text, flush=True)
    print(text.upper(), file=sys.stderr, flush=True)
    return text


def at_gate(port, word):
    """Tells the test that it runs, and in which process, and returns when the test says so."""
    with socket.create_connection(("127.0.0.1", port)) as gate:
        gate.sendall(f"{os.getpid()} {word}\n".encode())
        if gate.recv(1) != b"g":
            raise RuntimeError("the test went away")
    return word
