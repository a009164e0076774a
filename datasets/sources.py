"""Where transitions come from, and the flat files in which they are kept: HDF5 in D4RL's layout.

One array a key: observations (N, O), actions (N, A), rewards, terminals, timeouts (N,), next_observations (N, O).
Files written here hold their task, source and fingerprint in attributes.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
from pathlib import Path

import h5py
import numpy as np
import torch

from datasets import d4rl
from datasets.catalog import Task, UserError, find_task
from datasets.dataset import Dataset

SOURCES = ("auto", "d4rl", "minari", "collected")
READER = 1  # to be raised when another Dataset is made of the same D4RL or Minari files
CHUNK = 50_000  # rows read at a time, which bounds the memory used beside the tensors


def load(env, source="auto", device="cpu", eval_env="", discrete=False):
    """The Dataset called `env` on `device`, said aloud in a line: source, size, mean return.

    env: a task's name ("halfcheetah-medium"), a Minari id ("mujoco/hopper/medium-v0"), or an HDF5 file in D4RL's
    layout, which is evaluated in the Gymnasium environment `eval_env`.
    source: "d4rl", the published file, downloaded if need be; "collected", collected here if need be, in minutes;
    "auto", the former if it is there or its server answers within seconds, else the latter. Minari ids: "minari".
    discrete: whether the caller can do with discrete actions.
    Raises UserError, in one sentence, for an unknown name or source, unusable data, an unusable cache.
    """
    if source not in SOURCES:
        raise UserError(f"Unknown --source '{source}'; known are {', '.join(SOURCES)}.")
    is_file = env.endswith((".hdf5", ".h5"))
    if eval_env and not is_file:
        raise UserError(f"--eval-env goes with an HDF5 file; {env} brings its own environment.")
    if is_file:
        data = read_hdf5(Path(env), device, eval_env)
    elif source == "minari" or re.fullmatch(r"[\w.-]+/.+-v\d+", env):
        if source not in ("auto", "minari"):
            raise UserError(f"{env} is a Minari id: --source must be auto or minari, not {source}.")
        data = _load_minari(env, device)
    else:
        task = find_task(env)
        data = {"auto": _load_auto, "d4rl": _load_d4rl, "collected": _load_collected}[source](task, device)
    if data.n_actions and not discrete:
        raise UserError(f"{env} has {data.n_actions} discrete actions; this algorithm is for continuous ones.")
    print(describe(data))
    if not data.task.evaluable:
        print(f"Policies are not evaluated: {data.task.refusal or 'no environment given, see --eval-env'}.")
    elif data.task.ref_min is None:
        print(f"{data.task.name} has no reference scores: every score below is the raw return.")
    return data


def describe(data):
    """One line: source, size, mean return."""
    returns = data.returns()
    score = "" if data.task.ref_min is None else f" (normalized {data.score(returns.mean()):.1f})"
    return (
        f"{data.task.name}, source {data.source} (fingerprint {data.fingerprint}): {len(data):,} transitions, "
        f"{len(returns):,} episodes, mean return {returns.mean():.4g} ± {returns.std():.4g}{score}"
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


def _load_auto(task, device):
    from datasets.collect import can_collect

    if not task.d4rl_file:
        return _load_collected(task, device)
    if d4rl.local_file(task).exists() or d4rl.reachable(task):
        return _load_d4rl(task, device)
    if not can_collect(task):
        raise UserError(
            f"{task.name} exists only as D4RL's file, which is not at {d4rl.local_file(task)}, "
            f"and {d4rl.address(task)} cannot be reached."
        )
    print(f"D4RL's file of {task.name} is not here and its server cannot be reached: using collected data.")
    return _load_collected(task, device)


def _load_collected(task, device):
    from datasets.collect import collect

    path = collected_file(task)
    data = _cached(path, "", lambda: collect(task, path), device)
    data.task = task
    return data


def _load_d4rl(task, device):
    if not task.d4rl_file:
        raise UserError(f"D4RL has no data called {task.name}; use --source collected.")
    path = d4rl.local_file(task)
    if not path.exists():
        d4rl.download(task)
    status = path.stat()
    flat = cache_dir() / f"d4rl-{task.name}.hdf5"

    def build():
        rows, ends, O, A = d4rl.transitions(path, task.max_episode_steps)
        if (task.obs_dim, task.act_dim) != (O, A):
            wanted = f"{task.obs_dim} and {task.act_dim}"
            raise UserError(f"{path} has {O} observations and {A} actions, {task.name} {wanted}: another task's file?")
        write_hdf5(flat, _dataset(task, "d4rl", path, rows, ends, O, A), origin)

    origin = f"{READER} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    data = _cached(flat, origin, build, device)
    data.task = task
    if task.name.startswith("ant-") and data.obs[:, 27:].any():
        refusal = "the data's contact forces are not all 0, as those of D4RL's v2 data and of the environment are"
        data.task = dataclasses.replace(task, refusal=refusal)
    return data


def _load_minari(dataset_id, device):
    from datasets import minari_io  # Minari takes a second to import

    origin = f"{READER} {minari_io.origin(dataset_id)}"
    flat = cache_dir() / f"minari-{dataset_id.replace('/', '-')}.hdf5"

    def build():
        task, rows, ends, O, A, n_actions = minari_io.read_minari(dataset_id)
        write_hdf5(flat, _dataset(task, "minari", dataset_id, rows, ends, O, A, n_actions), origin)

    return _cached(flat, origin, build, device)


def _cached(path, origin, build, device):
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


def _dataset(task, source, where, rows, ends, O, A, n_actions=0, device="cpu"):
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
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path} is damaged or not a dataset ({str(error).splitlines()[0]}).") from None
    rows = torch.from_numpy(rows).to(device)
    return Dataset(task, source, fingerprint, rows, ends, widths[0], widths[1], int(n_actions))


def _own_file(path, device, eval_env):
    rows, ends, O, A = d4rl.transitions(path, own=True)
    task = Task(Path(path).stem, eval_env, max_episode_steps=None, obs_dim=O, act_dim=A)
    if eval_env:
        env = task.make_env()
        sizes = env.observation_space.shape, env.action_space.shape
        if sizes != ((O,), (A,)):
            raise UserError(f"{path} has {O} observations and {A} actions, --eval-env {eval_env} {sizes}.")
    return _dataset(task, "file", path, rows, ends, O, A, device=device)


def write_whole(path, content):
    """Writes the bytes `content` to a temporary file and moves it to `path`; on a failure what was at `path` stays."""
    for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
        with contextlib.suppress(OSError, ValueError):
            if not _alive(int(left.suffix[1:])):
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


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
