import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datasets import find_task
from datasets.collect import collect

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A collected hopper-medium of 20,000 transitions: short episodes, quickly evaluated, as an HDF5 file."""
    path = tmp_path_factory.mktemp("data") / "small.hdf5"
    collect(find_task("hopper-medium"), path, 20_000)
    return path


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
