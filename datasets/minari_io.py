"""Minari's datasets as rows of transitions, and a Dataset of ours as a Minari dataset. Written against minari 0.5.4.

A Minari dataset is a folder <id>/data: metadata.json and, as a rule, main_data.hdf5 with one group an episode, in which
T actions lie between T + 1 observations. That file is read directly; of short episodes minari takes twice as long.
"""

import contextlib
import dataclasses
import difflib
import functools
import http.client
import json
import os
import re
import tempfile
import threading
import urllib.request
import warnings
from pathlib import Path

import h5py
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.serialization import serialize_space
from minari.storage import get_dataset_path, remotes

from datasets.catalog import TASKS, Task, UserError
from datasets.store import READER, cache_dir, cached, make_dataset, write_hdf5


def load(dataset_id, device="cpu"):
    """The Dataset of a Minari id, downloaded unless it is here, by way of a flat file in the cache."""
    made_of = f"{READER} {origin(dataset_id)}"
    flat = cache_dir() / f"minari-{dataset_id.replace('/', '-')}.hdf5"

    def build():
        task, rows, ends, O, A, n_actions = read_minari(dataset_id)
        write_hdf5(flat, make_dataset(task, "minari", dataset_id, rows, ends, O, A, n_actions), made_of)

    return cached(flat, made_of, build, device)


def read_minari(dataset_id):
    """A Minari dataset, downloaded unless it is here: task, rows (N, O + A + 1 + O + 1), ends (E,), O, A, discrete.

    rows are float32, columns obs, act, rew, next_obs, done (terminated, not truncated); `ends` holds, for each episode,
    the index after its last row. Observations are flat as gymnasium's FlattenObservation makes them. Continuous actions
    are scaled from their bounds to [-1, 1], which Task.make_env undoes; of `discrete` many actions (0: continuous) one
    column holds the index. UserError, in one sentence, for what cannot be had, read or learned from.
    """
    folder = _find(dataset_id)
    try:
        metadata, tables, A, space = _read(folder / "data")
        spec = _env_spec(metadata)
    except ImportError as error:
        raise UserError(f"{dataset_id} needs a package that is missing: {_line(error)}.") from None
    except (OSError, KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} is damaged or no dataset ({_line(error)}); remove it to download it.") from None
    if not tables:
        raise UserError(f"{folder} holds no transitions; remove it to download it.")
    rows, ends = np.concatenate(tables), np.cumsum([len(table) for table in tables])
    O = (rows.shape[1] - A - 2) // 2
    wrong = np.argwhere(~np.isfinite(rows))
    if len(wrong):
        row, column = wrong[0]
        name = np.repeat(["observation", "action", "reward", "next observation", "end"], [O, A, 1, O, 1])[column]
        raise UserError(f"{dataset_id} cannot be learned from: in row {row}, the {name} is not finite.")

    act, refusal = rows[:, O : O + A], "" if spec else "its Minari dataset names no environment"
    if space["type"] == "Discrete":
        act -= space["start"]
        if act.min() < 0 or act.max() >= space["n"]:
            raise UserError(f"{dataset_id} cannot be learned from: an action is none of its {space['n']}.")
    elif np.isfinite([space["low"], space["high"]]).all():
        outside = _rescale(act, np.array(space["low"]), np.array(space["high"]))
        if outside:
            print(f"{dataset_id}: {outside:,} of {len(act):,} actions lay outside the action space and were clipped.")
    else:
        refusal = "its actions have no bounds, and policies act in [-1, 1]"
    low, high = _references(dataset_id, metadata, spec)
    spec = json.dumps(spec) if spec else ""
    task = Task(dataset_id, ref_min=low, ref_max=high, max_episode_steps=None, env_spec=spec, refusal=refusal)
    return task, rows, ends, O, A, space.get("n", 0)


def origin(dataset_id):
    """A line that is another one when the dataset, downloaded unless it is here, has been replaced or added to."""
    path = _find(dataset_id) / "data" / "metadata.json"
    status = path.stat() if path.exists() else None
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}" if status else str(path.resolve())


def _read(folder):
    """metadata, rows of each episode that has any, A, and the action space.

    Spaces are the JSON that minari keeps of them: of its keys alone it has the environment's order, for gymnasium sorts
    those of what minari makes of it.
    """
    metadata = MinariStorage.read_raw_metadata(folder)
    for key in {"observation_space", "action_space"} - metadata.keys():  # then it is the environment's
        metadata[key] = serialize_space(getattr(MinariStorage.read(folder), key))
    obs_space, space = json.loads(metadata["observation_space"]), json.loads(metadata["action_space"])
    if space["type"] != "Discrete" and (space["type"] != "Box" or len(space["shape"]) != 1):
        raise UserError(f"The actions of {metadata['dataset_id']} are neither a vector nor one of several.")
    A = 1 if space["type"] == "Discrete" else space["shape"][0]
    tables = []
    for i, get in enumerate(_episodes(folder, metadata)):
        obs, act, rew, done = _flat(obs_space, get, "observations"), get("actions"), get("rewards"), get("terminations")
        T = len(obs) - 1
        if not len(act) == len(rew) == len(done) == T:
            raise ValueError(f"episode {i} has {T + 1} observations, {len(act)} actions, {len(rew)} rewards")
        parts = [obs[:-1], act.reshape(T, A), rew.reshape(T, 1), obs[1:], done.reshape(T, 1)]
        tables += [np.hstack(parts, dtype=np.float32)] if T else []
    return metadata, tables, A, space


def _episodes(folder, metadata):
    """For each episode a function: path in it ("observations/achieved_goal") -> array."""
    episodes = range(metadata["total_episodes"])
    if metadata.get("data_format", "hdf5") != "hdf5":
        for episode in MinariStorage.read(folder).get_episodes(episodes):
            yield functools.partial(_walk, episode)
        return
    with h5py.File(folder / "main_data.hdf5") as file:
        for i in episodes:
            yield functools.partial(_array, file, f"episode_{i}")


def _walk(episode, path):
    for key in path.split("/"):
        episode = episode[int(key.removeprefix("_index_"))] if isinstance(episode, tuple) else episode[key]
    return np.asarray(episode)


def _array(file, group, path):
    try:
        data = h5py.h5d.open(file.id, f"{group}/{path}".encode())  # file[path][:] takes 3 times as long
    except KeyError:
        raise KeyError(f"it lacks {group}/{path}") from None
    array = np.empty(data.shape, data.dtype)
    data.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
    return array


def _flat(space, get, path):
    """The observations at `path` of an episode, (T + 1, O), each as gymnasium.spaces.flatten makes it."""
    kind = space["type"]
    if kind in ("Dict", "Tuple"):
        parts = space["subspaces"] if kind == "Dict" else {f"_index_{i}": s for i, s in enumerate(space["subspaces"])}
        return np.hstack([_flat(part, get, f"{path}/{key}") for key, part in parts.items()])
    if kind in ("Discrete", "MultiDiscrete"):
        sizes = np.ravel(space["n"] if kind == "Discrete" else space["nvec"])
        index = (get(path) - np.array(space["start"])).reshape(-1, len(sizes))
        return np.hstack([np.eye(size, dtype=np.float32)[i] for size, i in zip(sizes, index.T)])
    if kind == "Box" and space["dtype"] == "uint8" and len(space["shape"]) > 1:
        raise UserError(f"The dataset's {path} are images, too large for rows; take another dataset.")
    if kind not in ("Box", "MultiBinary"):
        raise UserError(f"The dataset's {path} are of the kind {kind}, not numbers; take another dataset.")
    x = get(path)
    return x.reshape(len(x), -1)


def _rescale(act, low, high):
    """Clips act (N, A) to the bounds (A,) and scales it to [-1, 1], in place. Returns how many lay well outside."""
    slack = 1e-5 * (high - low)  # rounding is not worth a word
    outside = ((act < low - slack) | (act > high + slack)).any(1).sum()
    np.clip(act, low, high, out=act)
    if (low != -1).any() or (high != 1).any():
        act[:] = 2 * (act - low) / (high - low) - 1
    return outside


def _env_spec(metadata):
    """The evaluation environment as a dictionary that this gymnasium understands; older ones wrote more into it."""
    spec = json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or "null")
    names = [field.name for field in dataclasses.fields(EnvSpec) if field.init]
    return spec and {"kwargs": {}, "additional_wrappers": []} | {name: spec[name] for name in names if name in spec}


def _references(dataset_id, metadata, spec):
    """Reference scores: Minari's own, or D4RL's where returns are counted as there, or None, None."""
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    name = re.fullmatch(r"D4RL/([^/]+)/(.+)-v\d+", dataset_id)
    task = TASKS.get(f"{name[1]}-{name[2]}") if name else None
    if low is None or high is None:
        low = high = None
        if task and task.d4rl_file and spec:
            # Most of Minari's AntMaze and Kitchen environments pay for a goal in each step after it; D4RL's pay once.
            again = spec["kwargs"].get("continuing_task", name[1] == "antmaze")
            if not again and spec["kwargs"].get("remove_task_when_completed", True):
                low, high = task.ref_min, task.ref_max
    return low, high


def _folder(dataset_id):
    try:
        parse_dataset_id(dataset_id)
        return get_dataset_path(dataset_id)
    except (ValueError, TypeError):
        raise UserError(f"'{dataset_id}' is no Minari id; those are written like mujoco/hopper/medium-v0.") from None
    except OSError as error:
        raise UserError(f"Cannot use Minari's folder ({_line(error)}): set MINARI_DATASETS_PATH.") from None


def _find(dataset_id):
    folder = _folder(dataset_id)
    if not folder.exists():
        _download(dataset_id)
    return folder


def _download(dataset_id):
    """Brings a dataset from Minari's remote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of folders that are no datasets
        known = list(minari.list_local_datasets())
    remote = os.environ.get("MINARI_REMOTE", remotes.DEFAULT_REMOTE)
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    where = f"here, and {url} cannot be reached"
    if not remote.startswith("hf:") or _reachable(url):
        where = f"here or at {remote}"
        try:
            storage = remotes.get_cloud_storage()
            offered = list(storage.list_datasets(prefix=dataset_id.split("/")[0]))
            if dataset_id in offered:
                print(f"Downloading {dataset_id} from {remote}.")
                with _placed(dataset_id) as folder:
                    return storage.download_dataset(dataset_id, folder)
            known += offered
        except Exception as error:  # those of several HTTP libraries have no base in common
            raise UserError(f"Cannot download {dataset_id} from {remote} ({_line(error)}); nothing was kept.") from None
    near = ", ".join(difflib.get_close_matches(dataset_id, known, n=3, cutoff=0)) or "none"
    raise UserError(f"There is no Minari dataset {dataset_id} {where}; the nearest: {near}.")


def _reachable(url, seconds=3):
    """Whether a server answers in time; minari's own attempts take 23 s to fail."""
    answers = []

    def ask():
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            urllib.request.urlopen(url, timeout=seconds).close()
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # the time-out does not apply to the look-up of the name
    thread.start()
    thread.join(seconds)
    return bool(answers)


@contextlib.contextmanager
def _placed(dataset_id):
    """A hidden folder to build <dataset_id>/ in, which then moves into its place; on a failure nothing remains."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=get_dataset_path()) as folder:
        yield Path(folder)
        target = get_dataset_path(dataset_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / dataset_id).rename(target)


def export_minari(data, dataset_id, algorithm_name="SAC"):
    """Writes a Dataset as a Minari dataset: an episode that does not end in a termination is truncated there.

    `minari.load_dataset(dataset_id)` gives the same float32 values, T + 1 observations an episode. UserError if that id
    is taken, the rows are not in order, the task has no environment, or the disk is full; then nothing is written.
    """
    folder, task, env = _folder(dataset_id), data.task, data.task.make_env()
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it, or give another id.")
    columns = np.cumsum([data.width, data.act_dim, 1, data.width])
    obs, act, rew, next_obs, done = np.split(data.rows.cpu().numpy(), columns, axis=1)
    if data.frames is not None:
        obs, next_obs = (data.frames.cpu().numpy()[x[:, 0].astype(int)] for x in (obs, next_obs))
    act = act[:, 0].astype(np.int64) + env.action_space.start if data.n_actions else act
    last = np.zeros(len(rew), bool)
    last[data.ends - 1] = True
    if not np.array_equal(next_obs[:-1][~last[:-1]], obs[1:][~last[:-1]]):
        raise UserError(f"The rows of {task.name} are not in the order of time, episode after episode.")
    episodes = (
        EpisodeBuffer(  # filled directly, because its own method needs jax
            observations=np.concatenate([obs[start:end], next_obs[end - 1 : end]]),
            actions=act[start:end],
            rewards=rew[start:end, 0],
            terminations=done[start:end, 0] > 0,
            truncations=last[start:end] & (done[start:end, 0] == 0),
        )
        for start, end in zip([0, *data.ends], data.ends)
    )
    metadata = {
        "dataset_id": dataset_id,
        "minari_version": minari.__version__,
        "eval_env_spec": env.spec.to_json(),
        "algorithm_name": algorithm_name,
        "author": {"The contributors of this project"},
        "description": f"{task.name}, source {data.source}, fingerprint {data.fingerprint}.",
    }
    if task.ref_min is not None:
        metadata |= {"ref_min_score": task.ref_min, "ref_max_score": task.ref_max}
    try:
        with _placed(dataset_id) as parent:
            (parent / dataset_id).mkdir(parents=True)
            data = parent / dataset_id / "data"
            storage = MinariStorage.new(data, env.observation_space, env.action_space, env.spec)
            storage.update_metadata(metadata)
            storage.update_episodes(episodes)
        namespace = parse_dataset_id(dataset_id)[0]
        if namespace and namespace not in list_local_namespaces():
            create_namespace(namespace)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Cannot write {folder} ({_line(error)}); nothing was kept.") from None


def _line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
