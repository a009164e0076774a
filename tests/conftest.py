import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from datasets import Dataset, collect, find_task
from datasets.store import write_hdf5

ROOT = Path(__file__).resolve().parent.parent

# Whoever is started in the background of a script ignores Ctrl-C, and so would every process started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Here:
    """Stands for the workers of a collection, each of which would first spend seconds on its imports."""

    def __init__(self, *words, **options):
        self.map = map

    def shutdown(self, **options):
        pass


@pytest.fixture(scope="session")
def collected(tmp_path_factory):
    """A collected hopper-medium of 20,000 transitions, as an HDF5 file."""
    if "COLLECTED" in os.environ:  # tests/mutate.py has one for all its processes
        return Path(shutil.copy(os.environ["COLLECTED"], tmp_path_factory.mktemp("data")))
    path = tmp_path_factory.mktemp("data") / "collected.hdf5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "ProcessPoolExecutor", Here)
        collect.collect(find_task("hopper-medium"), path, 20_000)
    return path


def cut(collected, name, steps):
    path = collected.with_name(name)
    shutil.copy(collected, path)
    with h5py.File(path, "r+") as file:
        file.attrs["task"] = json.dumps(json.loads(file.attrs["task"]) | {"max_episode_steps": steps})
    return path


@pytest.fixture(scope="session")
def small(collected):
    """The same, but quickly evaluated: an episode is over after 100 steps."""
    path = cut(collected, "small.hdf5", 100)
    write_hdf5(path.with_name("cartpole.hdf5"), random_cartpole())
    return path


@pytest.fixture(scope="session")
def short(collected):
    """And after 20 steps."""
    return cut(collected, "short.hdf5", 20)


def random_cartpole(transitions=2000):
    """CartPole's data, for scripts of discrete actions: played at random, an episode is over after 40 steps."""
    task = dataclasses.replace(find_task("cartpole-replay"), max_episode_steps=40)
    env, rng, rows, obs = task.make_env(), np.random.default_rng(0), [], None
    while len(rows) < transitions:
        obs = env.reset(seed=len(rows))[0] if obs is None else obs
        act = int(rng.integers(2))
        next_obs, rew, terminated, truncated, _ = env.step(act)
        truncated = truncated or len(rows) == transitions - 1
        rows.append(np.concatenate([obs, [act, rew], next_obs, [terminated, truncated and not terminated]]))
        obs = None if terminated or truncated else next_obs
    rows = np.array(rows, np.float32)
    ends = np.flatnonzero(rows[:, -2:].any(1)) + 1
    return Dataset(task, "collected", "random", torch.from_numpy(rows[:, :-1]), ends, 4, 1, n_actions=2)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Each test has runs and a cache of its own, and one thread, so that sums are taken in one order."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("OFFLINE_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("D4RL_URL", "http://127.0.0.1:9/")  # nobody answers there
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def here(monkeypatch):
    """Whatever is collected is collected in this process."""
    monkeypatch.setattr(collect, "ProcessPoolExecutor", Here)


def start(*words, cwd=ROOT, **options):
    """A Python process of this repository, started in the background."""
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ), **options
    )


def error_of(process):
    """The one sentence on standard error with which a process fails; no traceback, exit status not 0."""
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None), err
    assert "Traceback" not in err, err
    return err.strip().splitlines()[-1]


def fails(*words, **options):
    return error_of(start(*words, **options))


def wait_until(begun, process, seconds=120):
    """Until `begun()`, so that nothing is killed that had not begun; fails if the process ends before, or hangs."""
    deadline = time.time() + seconds
    while not begun():
        assert process.poll() is None, f"it ended before it had begun: {process.communicate()}"
        assert time.time() < deadline, "it has not begun in time"
        time.sleep(0.02)


def children(parent):
    """Process ids of a process's children that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that has ended meanwhile
            state, ppid = path.read_text().rsplit(")", 1)[1].split()[:2]
            if int(ppid) == parent and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_for_the_end(pids, seconds=30):
    """Until none of the processes lives."""
    deadline = time.time() + seconds
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.time() < deadline, f"{alive} outlive the process that they worked for"
        time.sleep(0.05)
