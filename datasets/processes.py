"""Processes beside this one: how many there are cores for, and how each ends with the one that started it."""

import contextlib
import os
import sys
import threading
import time


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with(parent):
    """In a process that `parent`, a process id, has started: ends it within half a second when that one is no more.

    A parent that was killed tells nobody, and its children would wait for work, or train on, for ever.
    """

    def watch():
        if sys.platform == "win32":  # where getppid still tells the number of a parent that is no more
            import _winapi

            synchronize = 0x100000  # the right to wait for it
            with contextlib.suppress(OSError):  # there is no such process any more
                _winapi.WaitForSingleObject(_winapi.OpenProcess(synchronize, False, parent), _winapi.INFINITE)
        else:
            while os.getppid() == parent:
                time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
