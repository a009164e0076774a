"""Linux, macOS and Windows, as far as Linux can tell: their modules and functions are hidden, or played."""

import fcntl
import inspect
import os
import queue
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, start
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

from datasets import processes
from results import run

# Packages are imported as they are; then the system is another one; then this project is imported.
ELSEWHERE = """
import concurrent.futures.process, importlib, multiprocessing.popen_spawn_posix, os, signal, sys, warnings
import gymnasium_robotics, h5py, imageio, matplotlib.pyplot, minari, mujoco, scipy.stats, torch, tyro
from gymnasium.envs.mujoco import hopper_v4
from torch.utils.tensorboard import SummaryWriter
system, small, *modules = sys.argv[1:]
if system == "win32":
    sys.modules["fcntl"] = sys.modules["resource"] = None  # cannot be imported
    del os.fork, os.killpg, os.geteuid, signal.SIGKILL, signal.SIGHUP
del os.sched_getaffinity
os.cpu_count = lambda: 2  # two workers, started and not forked
sys.platform = system
sys.path.insert(0, "algorithms")
for name in modules:
    importlib.import_module(name)
import bc
bc.train(bc.Args(env=small, steps=10, eval_every=10, eval_episodes=20))
"""


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_modules_are_imported_and_a_script_trains(system, small, tmp_path):
    modules = []
    if system == "win32":  # which lacks most
        modules = [path.stem for path in (ROOT / "algorithms").glob("*.py")]
        modules += [f"{name}.{path.stem}" for name in ("datasets", "results") for path in (ROOT / name).glob("*.py")]
    process = start("-c", ELSEWHERE, system, small, *sorted(modules))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "over 20 episodes" in out
    (record,) = (tmp_path / "runs").rglob("record-seed=0.json")
    assert system == "darwin" or '"memory_mb": 0,' in record.read_text()


@pytest.fixture(params=["POSIX", "Windows"])
def locking(request, monkeypatch):
    if request.param == "Windows":

        def lock(descriptor, mode, size):  # as msvcrt's: an OSError where another one holds it for long
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

        monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_LOCK=1, locking=lock))
        monkeypatch.setattr(processes, "fcntl", None)


def test_locked(locking, tmp_path):
    """One at a time, and nothing is left; whoever fails lets the next one go on."""
    inside, most, failed = [], [], []

    def work(k):
        try:
            with processes.locked(tmp_path / "x.lock"):
                inside.append(k)
                most.append(len(inside))
                time.sleep(0.01)
                inside.remove(k)
                if k % 2:
                    raise KeyError(k)
        except KeyError:
            failed.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 12 and len(failed) == 6
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, time; from pathlib import Path; from datasets.processes import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    process = start("-c", code, tmp_path / "x.lock")
    assert process.stdout.readline() == "held\n"
    process.kill()
    with processes.locked(tmp_path / "x.lock"):
        pass
    process.communicate()


@pytest.fixture
def windows(monkeypatch):
    """Python's interface to Windows, of whose processes 5 lives on and 6 has ended; their handles, if any are left."""
    handles = set()

    def open_process(access, inherit, pid):
        if pid not in (5, 6):
            raise OSError("The parameter is incorrect")
        handles.add(pid)
        return pid

    def wait(handle, milliseconds):
        assert handle in handles
        return 258 if handle == 5 else 0

    fake = SimpleNamespace(OpenProcess=open_process, WaitForSingleObject=wait, CloseHandle=handles.remove)
    monkeypatch.setitem(sys.modules, "_winapi", fake)
    monkeypatch.setattr(processes, "sys", SimpleNamespace(platform="win32"))
    return handles


def test_alive_on_windows(windows):
    assert [processes.alive(pid) for pid in (5, 6, 7)] == [True, False, False]
    assert not windows


def test_end_with_on_windows(windows, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    processes.end_with(6)
    assert ended.wait(10)


def test_alive():
    process = start("-c", "pass")
    assert processes.alive(process.pid) and processes.alive(os.getpid())
    process.communicate()
    assert not processes.alive(process.pid)


def test_end_with():
    """A child ends with its parent, and not before."""
    child = "import os, time; from datasets.processes import end_with; end_with(os.getppid()); "
    child += "print(os.getpid(), flush=True); time.sleep(100)"
    parent = start("-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    pid = int(parent.stdout.readline())
    time.sleep(1)
    assert processes.alive(pid)
    parent.kill()
    parent.wait()
    deadline = time.time() + 20
    while processes.alive(pid):
        assert time.time() < deadline
        time.sleep(0.05)
    parent.stdout.close()


def test_only_tensorboards_thread_may_fail_in_silence(capsys):
    def fail():
        raise OSError("no such luck")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert "no such luck" in capsys.readouterr().err
    thread = _AsyncWriterThread(queue.Queue(), SimpleNamespace(write=lambda data: fail()), 1)
    thread._queue.put(b"a line")
    thread.start()
    thread.join()
    assert isinstance(thread.exception, OSError) and capsys.readouterr().err == ""


def test_the_warning_that_is_dropped_is_torchs():
    assert run.UNGRAPHED in inspect.getsource(torch.optim.Optimizer)
