"""Where transitions come from, and the files in which they lie: HDF5 in D4RL's layout.

One array a key: observations (N, O), actions (N, A), rewards, terminals, timeouts (N,), next_observations (N, O).
Files collected here name their task, source and fingerprint in attributes.
"""

import io
import os
from pathlib import Path

import h5py
import numpy as np
import torch

from datasets.catalog import TASKS, UserError, find_task
from datasets.dataset import Dataset

CHUNK = 50_000  # rows read at a time, which bounds the memory used beside the tensors


def load(env, source="auto", device="cpu"):
    """The Dataset of a task ("halfcheetah-medium"), or of an HDF5 file that datasets/collect.py wrote, on `device`.

    source: "collected" collects the task here if that has not been done yet, in minutes; "auto" is the same today.
    Raises UserError, in one sentence, for an unknown name or source, a task without policies, an unusable cache.
    """
    if source not in ("auto", "collected"):
        raise UserError(f"Unknown --source '{source}'; known are auto and collected.")
    if env.endswith((".hdf5", ".h5")):
        data = read_hdf5(Path(env), device)
    else:
        data = _load_collected(find_task(env), device)
    print(describe(data))
    return data


def describe(data):
    """One line: source, size, mean return."""
    returns = data.returns()
    return (
        f"{data.task.name}, source {data.source} (fingerprint {data.fingerprint}): {len(data):,} transitions, "
        f"{len(returns):,} episodes, mean return {returns.mean():.0f} ± {returns.std():.0f} "
        f"(normalized {data.score(returns.mean()):.1f})"
    )


def cache_dir():
    """The folder for rebuilt datasets: OFFLINE_RL_CACHE, or ~/.cache/offline-rl. UserError if it cannot be used."""
    folder = Path(os.environ.get("OFFLINE_RL_CACHE", Path.home() / ".cache" / "offline-rl"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"Cannot use the cache folder {folder}, {error.strerror}: set OFFLINE_RL_CACHE.") from None
    return folder


def collected_file(task):
    """Where the collected dataset of `task` lies or will lie; another fingerprint is another file."""
    from datasets.collect import fingerprint, plan  # here, because that module imports this one

    return cache_dir() / f"{task.name}-{fingerprint(task, plan(task))}.hdf5"


def _load_collected(task, device):
    path = collected_file(task)
    if path.exists():
        try:
            return read_hdf5(path, device)
        except UserError as error:
            print(f"{error} It is collected again.")
    from datasets.collect import collect

    collect(task, path)
    return read_hdf5(path, device)


def write_hdf5(path, task, source, fingerprint, rows):
    """Writes rows (N, O + A + 1 + O + 2), columns obs, act, rew, next_obs, done, timeout, to the file `path`."""
    env = task.make_env()
    O, A = env.observation_space.shape[0], env.action_space.shape[0]
    obs, act, rew, next_obs, done, timeout = np.split(rows, np.cumsum([O, A, 1, O, 1]), axis=1)

    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        file.attrs.update(task=task.name, source=source, fingerprint=fingerprint)
        file["observations"], file["actions"], file["next_observations"] = obs, act, next_obs
        file["rewards"], file["terminals"], file["timeouts"] = rew[:, 0], done[:, 0] > 0, timeout[:, 0] > 0
    write_whole(path, image.getbuffer())


def read_hdf5(path, device="cpu"):
    """The Dataset in a file that `write_hdf5` wrote. UserError if it is absent, damaged, or not such a file."""
    try:
        with h5py.File(path) as file:
            task = TASKS[file.attrs["task"]]
            keys = ("observations", "actions", "rewards", "next_observations", "terminals")
            columns = [file[key] for key in keys]
            widths = [column.shape[1] if column.ndim == 2 else 1 for column in columns]
            rows = np.empty((len(columns[0]), sum(widths)), np.float32)
            for i in range(0, len(rows), CHUNK):
                block = slice(i, i + CHUNK)
                for column, end, width in zip(columns, np.cumsum(widths), widths):
                    rows[block, end - width : end] = column[block].reshape(-1, width)
            ends = np.flatnonzero(file["terminals"][:] | file["timeouts"][:]) + 1
            source, fingerprint = file.attrs["source"], file.attrs["fingerprint"]
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged or not a dataset ({str(error).splitlines()[0]}).") from None
    return Dataset(task, source, fingerprint, torch.from_numpy(rows).to(device), ends, widths[0], widths[1])


def write_whole(path, content):
    """Writes the bytes `content` to a temporary file and moves it to `path`; on a failure what was at `path` stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error.strerror}); what was there before stays.") from None
    finally:
        temporary.unlink(missing_ok=True)
