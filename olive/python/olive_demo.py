"""What `olive demo` runs in Python workers."""

import os
import signal
import time


def square(n):
    return n * n


def nap(seconds):
    time.sleep(seconds)


def fail(text):
    raise ValueError(text)


def stuck():
    """Does not even end when it is asked to: its process has to be killed."""
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass


def crash():
    os.kill(os.getpid(), signal.SIGKILL)
