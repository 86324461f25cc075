"""The functions that sweepea's own producer asks for, by the import paths it uses."""

import time


def sleep_n(n):
    """Sleeps that many seconds and says how many."""
    time.sleep(n)
    return n


def do_nothing(*_args, **_kwargs):
    """Returns at once."""
