"""Processes beside this one, on Linux, macOS and Windows: how many there are cores for, how each ends with the one that
started it, and how they take turns."""

import contextlib
import os
import sys
import threading
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with(parent):
    """In a process that `parent`, a process id, has started: ends it within half a second when that one is no more.

    A parent that was killed tells nobody, and its children would wait for work, or train on, for ever.
    """

    def watch():
        if sys.platform == "win32":  # where getppid still gives the number of a parent that is no more
            _ends(parent, 0xFFFFFFFF)  # for ever
        else:
            while os.getppid() == parent:
                time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def alive(pid):
    """Whether there is a process of this id."""
    if sys.platform == "win32":  # where os.kill does what it says
        return not _ends(pid, 0)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _ends(pid, milliseconds):
    """On Windows: whether the process ends within so many milliseconds, or has ended."""
    import _winapi

    try:
        handle = _winapi.OpenProcess(0x100000, False, pid)  # SYNCHRONIZE, the right to wait for it
    except OSError:
        return True
    try:
        return _winapi.WaitForSingleObject(handle, milliseconds) == 0  # WAIT_OBJECT_0
    finally:
        _winapi.CloseHandle(handle)


@contextlib.contextmanager
def locked(path):
    """Holds a lock that ends with the process, too: the file `path`, which is gone afterwards. Others wait for it."""
    while True:
        with path.open("ab") as file:
            _lock(file)
            if not _lies_at(file, path):  # the one before has removed it: that lock holds nobody up
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows removes no open file: there it stays, empty
                    path.unlink()
            return


def _lock(file):
    if fcntl:
        return fcntl.flock(file, fcntl.LOCK_EX)
    import msvcrt

    while True:
        with contextlib.suppress(OSError):  # after ten seconds
            return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)


def _lies_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
