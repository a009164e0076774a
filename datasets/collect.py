"""Collects datasets here: D4RL's locomotion suite anew, from the behaviour policies in datasets/policies/, and mazes.

D4RL's protocol for locomotion: actions are sampled from SAC policies, "random" is an untrained one, "medium" one
stopped early, "expert" one trained to the end, "medium-expert" both; for "medium-replay", which in D4RL is the replay
buffer of the medium policy's training, snapshots along that training act. Sizes are D4RL's. Mazes: tasks/mazes.py and
tasks/maze2d.py. Discrete actions: collect_discrete.py.

Usage: python datasets/collect.py --env halfcheetah-medium
       python datasets/collect.py --all
       python datasets/collect.py --env hopper-medium --minari offline-rl/hopper/medium-v0
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tomllib
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import collect_discrete
from datasets.catalog import UserError, find_task
from datasets.dataset import Dataset
from datasets.processes import cores, end_with
from datasets.store import cache_dir, cached, read_hdf5, write_hdf5
from datasets.tasks import maze2d, mazes

POLICIES = Path(__file__).resolve().parent / "policies"
PROTOCOL = 1  # to be raised with every change here or in tasks/maze*.py that changes the transitions
SHARD = 20_000  # transitions that one job collects; fixed, so that the data do not depend on the number of workers
ENVS = 10  # environments that one job steps together, with one call of the policy
QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
COLLECTED = [f"{body}-{quality}" for body in ("halfcheetah", "hopper", "walker2d") for quality in QUALITIES]
CONTROLLED = dict.fromkeys(mazes.SIZES, mazes) | dict.fromkeys(maze2d.SIZES, maze2d)  # by a controller: no policy
COLLECTED += [*CONTROLLED, *collect_discrete.SIZES]
REPLAY_SIZES = {"halfcheetah": 202_000, "hopper": 402_000, "walker2d": 302_000}


@dataclass
class Args:
    env: str = ""  # the task, say halfcheetah-medium
    all: bool = False  # instead: every task that can be collected
    transitions: int = 0  # collect so many instead of D4RL's number (then give --out as well)
    out: str = ""  # write to this file instead of the cache
    minari: str = ""  # write it as the Minari dataset of this id as well


def load(task, device="cpu"):
    """The collected Dataset of `task`, collected unless it is there."""
    path = collected_file(task)
    data = cached(path, "", lambda: collect(task, path), device)
    data.task = task
    return data


def collected_file(task):
    """Where the collected dataset of `task` lies or will lie; another fingerprint is another file."""
    return cache_dir() / f"{task.name}-{fingerprint(task, plan(task))}.hdf5"


def plan(task, transitions=0):
    """What to collect: a list of jobs (policy file, transitions, seed). UserError if a policy does not exist.

    In mazes a controller acts, and the file is None; in ICU-Sepsis a table does, and it is a name.
    """
    if task.name not in COLLECTED:
        raise UserError(f"{task.name} cannot be collected here, only {', '.join(COLLECTED)}.")
    if task.name in CONTROLLED:
        total = transitions or CONTROLLED[task.name].SIZES[task.name]
        return [(None, size, seed) for seed, size in enumerate(spread(total, -(-total // SHARD)))]
    if task.name in collect_discrete.SIZES:
        return collect_discrete.plan(task, transitions)
    body, quality = task.name.split("-", 1)
    table = tomllib.loads((POLICIES / "policies.toml").read_text())
    jobs = []
    for part in quality.split("-") if quality == "medium-expert" else [quality]:
        files = [
            POLICIES / f"{run}-{step:07d}.npz"
            for run, row in table.items()
            if run.split("-")[0] == body
            for step in row.get(part, [])
        ]
        if not files or not all(file.exists() for file in files):
            raise UserError(
                f"The behaviour policy of {body}-{part} does not exist: 'make policies' trains it, in hours."
            )
        total = transitions or (REPLAY_SIZES[body] if part == "medium-replay" else 1_000_000)
        for file, share in zip(files, spread(total, len(files))):
            jobs += [(file, size, len(jobs) + i) for i, size in enumerate(spread(share, -(-share // SHARD)))]
    return jobs


def can_collect(task):
    try:
        return bool(plan(task))
    except UserError:
        return False


def spread(total, parts, unit=1000):
    """`total` in `parts` near-equal sizes, all but the last multiples of `unit`: whole episodes, if none ends early."""
    edges = [round(total * i / parts / unit) * unit for i in range(parts)] + [total]
    return [b - a for a, b in zip(edges, edges[1:]) if b > a]


def fingerprint(task, jobs):
    """12 hexadecimal digits that change with the policies, the sizes, the protocol and the simulator."""
    env_id = task.env_id.replace("datasets.tasks.", "datasets.")  # as when the records' data were collected
    digest = hashlib.sha256(f"{PROTOCOL} {env_id} {task.max_episode_steps} {mujoco.__version__}".encode())
    if task.name in mazes.MAPS:
        controller = mazes.NOISE, mazes.NEAR, mazes.STAY, mazes.TRIPS.get(task.name)
        as_collected = dataclasses.asdict(task) | {"env_id": env_id, "rew_shift": 0.0}  # scripts shift, not the data
        del as_collected["obs_shape"]  # younger than the records' data
        digest.update(json.dumps([controller, as_collected]).encode())
    if task.name in maze2d.SIZES:
        digest.update(json.dumps([task.env_args, maze2d.NOISE, maze2d.REACHED, maze2d.CUT]).encode())
    for file, size, seed in jobs:
        digest.update(
            f"{size} {seed}".encode() + (file.read_bytes() if isinstance(file, Path) else (file or "").encode())
        )
    return digest.hexdigest()[:12]


def load_policy(file):
    """A snapshot of algorithms/sac.py as a function: obs (E, O) -> mean, log_std, (E, A) each, before the tanh."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            W0, b0, W1, b1, W2, b2 = (array.astype(np.float32) for array in arrays.values())
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile):
        raise UserError(f"There is no readable behaviour policy {file}.") from None

    def policy(obs):
        h = np.maximum(obs @ W0.T + b0, 0)
        h = np.maximum(h @ W1.T + b1, 0)
        mean, log_std = np.split(h @ W2.T + b2, 2, -1)
        return mean, log_std.clip(-20, 2)

    return policy


def load_expert(task, file=""):
    """The behaviour policy that collected `task`, or the snapshot `file` of algorithms/sac.py, as an expert to ask: a
    function obs (..., O) -> its mean action (..., A) in [-1, 1]. UserError if there is not one policy, or it is of
    another body."""
    files = {file} if file else {job[0] for job in plan(task)} if can_collect(task) else {None}
    if len(files) > 1 or None in files:
        raise UserError(f"{task.name} has no one policy to ask, as hopper-expert has; --expert takes a file of sac.py.")
    policy = load_policy(*files)
    try:
        fits = policy(np.zeros(task.obs_dim, np.float32))[0].shape == (task.act_dim,)
    except ValueError:  # of other observations
        fits = False
    if not fits:
        raise UserError(f"The expert {Path(*files).name} has another body than {task.name}; ask one of the same body.")
    return lambda obs: np.tanh(policy(np.asarray(obs, np.float32))[0])


def rollout(task, file, transitions, seed):
    """`transitions` rows (obs, act, rew, next_obs, done, timeout), episode after episode, the last one cut to fit.

    Episodes count in the order of their start, not of their end, or short ones would be preferred.
    """
    if task.name in CONTROLLED:
        return CONTROLLED[task.name].rollout(task, transitions, seed)
    policy, rng = load_policy(file), np.random.default_rng([seed, 0])
    envs = [task.make_env() for _ in range(ENVS)]
    episodes, current = [], [None] * ENVS  # lists of rows in the order of their start; the one each environment is in
    finished = set()
    obs = np.zeros((ENVS, envs[0].observation_space.shape[0]), np.float32)

    def start(i):
        obs[i] = envs[i].reset(seed=int(rng.integers(2**31)))[0]
        current[i] = len(episodes)
        episodes.append([])

    for i in range(ENVS):
        start(i)
    whole = kept = 0  # the first `whole` episodes are finished and have `kept` rows
    while kept < transitions:
        mean, log_std = policy(obs)
        act = np.tanh(mean + np.exp(log_std) * rng.standard_normal(mean.shape, np.float32))
        for i in range(ENVS):
            next_obs, rew, terminated, truncated, _ = envs[i].step(act[i])
            next_obs = next_obs.astype(np.float32)
            episodes[current[i]].append(np.concatenate([obs[i], act[i], [rew], next_obs, [terminated, truncated]]))
            obs[i] = next_obs
            if terminated or truncated:
                finished.add(current[i])
                start(i)
        while whole in finished:
            kept += len(episodes[whole])
            whole += 1
    rows = np.array([row for episode in episodes[:whole] for row in episode][:transitions], np.float32)
    rows[-1, -1] = not rows[-1, -2]  # an episode that is cut has timed out
    return rows


def collect(task, path, transitions=0):
    """Collects `task` into the HDF5 file `path`, in D4RL's layout. The file appears when it is whole, or not at all."""
    jobs, tables = plan(task, transitions), []
    if task.name in collect_discrete.SIZES:  # a matter of seconds
        return write_hdf5(path, collect_discrete.collect(task, jobs, fingerprint(task, jobs)))
    context, count = multiprocessing.get_context("spawn"), min(len(jobs), cores())
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the workers' NumPy, whose matrices are small
    workers = ProcessPoolExecutor(count, context, initializer=end_with, initargs=(os.getpid(),))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit it: Ctrl-C is for this process
    shards = workers.map(rollout, [task] * len(jobs), *zip(*jobs))
    signal.signal(signal.SIGINT, handler)
    try:
        total = sum(size for _, size, _ in jobs)
        with tqdm(total=total, desc=f"collect {task.name}", unit=" steps", unit_scale=True) as bar:
            for rows in shards:
                tables.append(rows)
                bar.update(len(rows))
    except KeyboardInterrupt:
        raise UserError(f"Stopped while collecting {task.name}; nothing was written, start again.") from None
    except BrokenProcessPool:
        raise UserError(f"A worker was killed, perhaps for want of memory; collect {task.name} again.") from None
    finally:
        workers.shutdown(wait=False, cancel_futures=True)
    write_hdf5(path, assemble(task, fingerprint(task, jobs), np.concatenate(tables)))


def assemble(task, fingerprint, rows):
    """The Dataset of rows (N, O + A + 1 + O + 2) that `rollout` gave."""
    O = task.obs_dim
    ends = np.flatnonzero(rows[:, -2:].any(1)) + 1
    return Dataset(task, "collected", fingerprint, torch.from_numpy(rows[:, :-1]), ends, O, rows.shape[1] - 2 * O - 3)


def main(args):
    if args.transitions < 0 or bool(args.transitions) != bool(args.out):
        raise UserError("--transitions N, at least 1, and --out FILE go together: another number is another dataset.")
    if bool(args.env) == args.all or (args.all and (args.out or args.minari)):
        raise UserError("Give one task with --env, or --all alone.")
    for name in COLLECTED if args.all else [args.env]:
        task = find_task(name)
        if args.all and name in collect_discrete.SIZES and not can_collect(task):
            print(f"{name} is left out: its package, or its file of a training, is missing.")
            continue
        path = Path(args.out) if args.out else collected_file(task)
        if args.out or not path.exists():
            collect(task, path, args.transitions)
        data = read_hdf5(path)
        print(f"{data.describe()}\n{path}, {path.stat().st_size / 1e6:.0f} MB")
        if args.minari:
            from datasets.minari_io import export_minari

            who = "table of probabilities" if task.family == "icu" else "DQN" if data.n_actions else "SAC"
            export_minari(data, args.minari, "waypoint controller" if name in CONTROLLED else who)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
