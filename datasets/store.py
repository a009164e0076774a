"""The flat files in which transitions are kept: HDF5 in D4RL's layout.

One array a key: observations (N, O), actions (N, A), rewards, terminals, timeouts (N,), next_observations (N, O).
Where there are `frames` (F, O), both observations are numbers (N, 1) of its rows.
Files written here hold their task, source and fingerprint in attributes.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path

import h5py
import numpy as np
import torch

from datasets.catalog import Task, UserError
from datasets.dataset import Dataset
from datasets.processes import alive

READER = 1  # to be raised when another Dataset is made of the same D4RL or Minari files
KEYS = ("observations", "actions", "rewards", "terminals")  # of every file in D4RL's layout
CHUNK = 50_000  # rows read at a time, which bounds the memory used beside the tensors


def cache_dir():
    """The folder for rebuilt datasets: OFFLINE_RL_CACHE, or ~/.cache/offline-rl. UserError if it cannot be used."""
    folder = Path(os.environ.get("OFFLINE_RL_CACHE", Path.home() / ".cache" / "offline-rl"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"Cannot use the cache folder {folder}, {error.strerror}: set OFFLINE_RL_CACHE.") from None
    return folder


def cached(path, origin, build, device):
    """The Dataset in the flat file `path`; `build` writes it if it is not there, is damaged or has another origin."""
    if path.exists():
        try:
            with contextlib.suppress(OSError), h5py.File(path) as file:
                if file.attrs.get("origin", "") != origin:
                    raise UserError(f"{path.name} was made of data that have changed.")
            return read_hdf5(path, device)
        except UserError as error:
            print(f"{error} It is made again.")
    build()
    return read_hdf5(path, device)


def make_dataset(task, source, where, rows, ends, O, A, n_actions=0, device="cpu"):
    """A Dataset of rows read from `where`, checked; its fingerprint is that of the rows."""
    if not (finite := np.isfinite(rows).all(1)).all():
        raise UserError(
            f"{where} has {(~finite).sum():,} rows that are not finite, the first is row {finite.argmin():,}."
        )
    act = rows[:, O : O + A]
    if not n_actions and (outside := (np.abs(act) > 1).any(1).sum()):
        print(f"{outside:,} actions of {where} lay outside [-1, 1] and were clipped.")
        np.clip(act, -1, 1, out=act)
    digest = hashlib.sha256(rows)
    digest.update(ends)
    return Dataset(task, source, digest.hexdigest()[:12], torch.from_numpy(rows).to(device), ends, O, A, n_actions)


def write_hdf5(path, data, origin=""):
    """Writes a Dataset as a flat file. `origin` names what it was made of, and in which state that was."""
    columns = [column.numpy() for column in data.split(data.rows)]
    done = columns[-1] > 0
    timeouts = np.zeros(len(data), bool)
    timeouts[data.ends - 1] = ~done[data.ends - 1]

    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        file.attrs.update(task=json.dumps(dataclasses.asdict(data.task)), source=data.source, origin=origin)
        file.attrs.update(fingerprint=data.fingerprint, n_actions=data.n_actions)
        for key, column in zip(("observations", "actions", "rewards", "next_observations"), columns):
            file[key] = column
        if data.frames is not None:
            file["frames"] = data.frames.numpy()
        file["terminals"], file["timeouts"] = done, timeouts
    write_whole(path, image.getbuffer())


def read_hdf5(path, device="cpu", eval_env=""):
    """The Dataset in a file that `write_hdf5` wrote, or in a user's own file of D4RL's layout, to be evaluated in the
    Gymnasium environment `eval_env`. UserError if it is absent, damaged, or not such a file."""
    try:
        with h5py.File(path) as file:
            if "task" not in file.attrs:
                return _own_file(path, device, eval_env)
            if eval_env:
                raise UserError(f"{path} names its own environment; --eval-env is for files of your own.")
            task = Task(**json.loads(file.attrs["task"]))
            keys = ("observations", "actions", "rewards", "next_observations", "terminals")
            columns = [file[key] for key in keys]
            widths = [column.shape[1] if column.ndim == 2 else 1 for column in columns]
            rows = np.empty((len(columns[0]), sum(widths)), np.float32)
            for i in range(0, len(rows), CHUNK):
                block = slice(i, i + CHUNK)
                for column, end, width in zip(columns, np.cumsum(widths), widths):
                    rows[block, end - width : end] = column[block].reshape(-1, width)
            ends = np.flatnonzero(file["terminals"][:] | file["timeouts"][:]) + 1
            source, fingerprint, n_actions = (file.attrs[key] for key in ("source", "fingerprint", "n_actions"))
            frames = torch.from_numpy(file["frames"][:]).to(device) if "frames" in file else None
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path} is damaged or not a dataset ({str(error).splitlines()[0]}).") from None
    rows = torch.from_numpy(rows).to(device)
    O = widths[0] if frames is None else frames.shape[1]
    return Dataset(task, source, fingerprint, rows, ends, O, widths[1], int(n_actions), frames)


def _own_file(path, device, eval_env):
    rows, ends, O, A = transitions(path, own=True)
    with h5py.File(path) as file:  # integers, one a step: discrete actions
        act = file["actions"]
        discrete = act.ndim == 1 and np.issubdtype(act.dtype, np.integer)
        least, most = (int(act[:].min()), int(act[:].max())) if discrete else (0, -1)
    if least < 0:
        raise UserError(f"{path} has the action {least}; discrete ones count from 0.")
    task, n_actions = Task(Path(path).stem, eval_env, max_episode_steps=None, obs_dim=O, act_dim=A), most + 1
    if eval_env:
        env = task.make_env()
        theirs = env.observation_space.shape, env.action_space.shape
        if theirs != ((O,), () if discrete else (A,)):
            kind = f"{n_actions} discrete" if discrete else A
            raise UserError(f"{path} has {O} observations and {kind} actions, --eval-env {eval_env} {theirs}.")
        if discrete and n_actions > env.action_space.n:
            raise UserError(f"{path} has {n_actions} discrete actions, --eval-env {eval_env} {env.action_space.n}.")
        n_actions = int(env.action_space.n) if discrete else 0  # also those that nobody took
    return make_dataset(task, "file", path, rows, ends, O, A, n_actions, device)


def transitions(path, max_episode_steps=None, own=False):
    """Rows (N, O + A + 1 + O + 1) float32: obs, act, rew, next_obs, done; ends (E,) after each episode's last; O; A.

    As D4RL's qlearning_dataset makes them: the next observation is that of the next row, so the step on which an
    episode timed out, whose next row begins another episode, is left out, and so is the last row of the file. `done`
    is the file's `terminals`. Where a file has no `timeouts`, which the v0 files lack, an episode times out after
    `max_episode_steps`, counted as D4RL counts: from 1 after a terminal.
    A user's `own` file may hold next_observations, and then every row is kept.
    """
    try:
        with h5py.File(path) as file:
            if missing := [key for key in KEYS + ("timeouts",) * own if key not in file]:
                raise UserError(f"{path} lacks {', '.join(missing)}: see 'bring your own data' in the README.")
            obs, act, rew, done = (file[key][:] for key in KEYS)
            timeouts = file["timeouts"][:].astype(bool).ravel() if "timeouts" in file else None
            next_obs = file["next_observations"][:] if own and "next_observations" in file else None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        name = "it is a folder" if Path(path).is_dir() else str(error).splitlines()[0]
        raise UserError(f"{path} is damaged or not an HDF5 file in D4RL's layout ({name}).") from None
    columns = {"observations": obs, "actions": act, "rewards": rew, "terminals": done, "timeouts": timeouts}
    lengths = {key: len(column) for key, column in columns.items() if column is not None}
    if obs.ndim != 2 or len(set(lengths.values())) > 1 or not len(obs):
        raise UserError(f"{path} has no transitions, or columns of different lengths: {lengths}.")
    N, done = len(obs), done.astype(bool).ravel()
    if timeouts is None:
        timeouts = _count_timeouts(done, max_episode_steps)
    if next_obs is None:
        next_obs = np.concatenate([obs[1:], obs[-1:]])
        keep = ~timeouts
        keep[-1] = False
    else:
        keep = np.ones(N, bool)
    rows = np.hstack(
        [obs, act.reshape(N, -1), rew.reshape(N, 1), next_obs, done[:, None]], dtype=np.float32, casting="unsafe"
    )
    rows = rows[keep]
    last = (done | timeouts)[keep] | np.append(np.diff(np.cumsum(~keep)[keep]) > 0, True)
    return rows, np.flatnonzero(last) + 1, obs.shape[1], act[0].size


def _count_timeouts(done, limit):
    timeouts, count = np.zeros(len(done), bool), 0
    for i in range(len(done)):
        timeouts[i] = count == limit - 1
        count = 0 if timeouts[i] else 1 if done[i] else count + 1
    return timeouts


def write_whole(path, content):
    """Writes the bytes `content` to a temporary file and moves it to `path`; on a failure what was at `path` stays."""
    for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
        with contextlib.suppress(OSError, ValueError):
            if not alive(int(left.suffix[1:])):
                left.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error.strerror}); what was there before stays.") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
