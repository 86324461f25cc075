"""A script of named checks against a broker: `SCRIPT --list`, `SCRIPT URL NAME`.

The same script runs against RabbitMQ and against the embedded broker, with the same expectations: what it asserts of
one is what it asserts of the other.
"""

import os
import sys
import uuid

CHECKS = {}


def check(function):
    """Makes the function callable by name; its doc string or name is the claim."""
    CHECKS[function.__name__] = function
    return function


def unique(kind):
    """A name that no other check on a shared broker has."""
    return f"{kind}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def equal(found, wanted):
    if found != wanted:
        raise AssertionError(f"found {found!r}, wanted {wanted!r}")


def main():
    if sys.argv[1:] == ["--list"]:
        print("\n".join(CHECKS))
        return
    url, name = sys.argv[1:]
    CHECKS[name](url)
    print("ok")
