"""Collects the tasks with discrete actions: ICU-Sepsis from its matrices, games from what algorithms/dqn.py played.

replay: every transition of a training, from its log of seeds and actions, with which the games are played again.
medium, expert: a snapshot of that training plays, and a tenth of its actions are random, as at the training's end.

cartpole-replay.npz in datasets/policies/ is the log (ActionLog.write) that the checkpoint of this run held:
    python algorithms/dqn.py --env cartpole --steps 20000 --buffer-size 20000 --start-steps 1000 --epsilon-steps 4000
        --lr 1e-3 --target-every 200 --update-every 2 --eval-every 2000 --log-actions
"""

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from datasets.catalog import TASKS, UserError
from datasets.dataset import Dataset
from datasets.tasks import icu_sepsis

POLICIES = Path(__file__).resolve().parent / "policies"
EPSILON = 0.1
# Transitions of each task; None: as many as the log has.
SIZES = {name: 200_000 for name in TASKS if name.startswith("icu-sepsis-")}
SIZES |= {name: 100_000 for name in TASKS if name.startswith("minatar-")}
SIZES |= {name: None for name in TASKS if name in ("cartpole-replay", "minatar-breakout-replay")}


def plan(task, transitions=0):
    """What to collect: a list of jobs (file, or who treats, transitions, seed). UserError if something is missing."""
    size, quality = transitions or SIZES[task.name], task.name.split("-")[2 if task.family == "icu" else -1]
    if task.family == "icu":
        icu_sepsis.load_mdp()
        if quality == "mixture":
            return [("clinicians", size // 2, 0), ("optimal", size - size // 2, 1)]
        return [(quality, size, 0)]
    file = POLICIES / f"{task.name}.npz"
    if not file.exists():
        raise UserError(f"{task.name} needs {file}, of a training with algorithms/dqn.py, which is not there.")
    return [(file, size, 0)]


def collect(task, jobs, fingerprint):
    """The Dataset of the jobs that `plan` gave."""
    if task.family == "icu":
        rows, n_actions = np.concatenate([treat(*job) for job in jobs]), icu_sepsis.A
        frames = icu_sepsis.observe(np.arange(icu_sepsis.S), **task.env_args)
        frames = frames.astype(np.uint8) if task.obs_dim == icu_sepsis.S else frames
    else:
        frames, rows, n_actions = play(task, *jobs[0])
        if not task.obs_shape:  # vectors, which a row may as well hold
            obs, next_obs = (frames[rows[:, i].astype(int)] for i in (0, 3))
            frames, rows = None, np.hstack([obs, rows[:, 1:3], next_obs, rows[:, 4:]])
    ends, rows = np.flatnonzero(rows[:, -2:].any(1)) + 1, torch.from_numpy(rows[:, :-1].astype(np.float32))
    frames = None if frames is None else torch.from_numpy(frames)
    return Dataset(task, "collected", fingerprint, rows, ends, task.obs_dim, 1, n_actions, frames)


def treat(who, transitions, seed):
    """Rows (state, act, rew, next_state, done, timeout) of patients, one after the other, the last one cut to fit."""
    logs = icu_sepsis.trajectories(icu_sepsis.behaviour(who), transitions // 5 + 100, seed)  # of 9 steps and more
    timeout = np.zeros(len(logs.state), bool)
    timeout[logs.ends - 1] = ~logs.done[logs.ends - 1]
    rows = np.stack([*logs[:5], timeout], 1)[:transitions]
    rows[-1, -1] = not rows[-1, -2]
    return rows


def play(task, file, transitions, seed):
    """frames (F, O), each once; rows (number of obs, act, rew, number of next_obs, done, timeout); how many actions."""
    env = task.make_env()
    frames, rows = [], []
    episodes = logged(file) if task.name.endswith("-replay") else acting(task, file, seed, env.action_space.n)
    for start, steps, choose in episodes:
        frames.append(env.reset(seed=start)[0])
        for _ in range(steps):
            act = choose(frames[-1])
            obs, rew, terminated, truncated, _ = env.step(act)
            frames.append(obs)
            rows.append((len(frames) - 2, act, rew, len(frames) - 1, terminated, truncated))
            if terminated or truncated or len(rows) == transitions:
                break
        if len(rows) == transitions:
            break
    rows = np.array(rows, float)
    rows[-1, -1] = not rows[-1, -2]  # an episode that is cut has timed out
    return np.array(frames), rows, int(env.action_space.n)


def logged(file):
    """Of each episode of a log: its seed, its steps, and a function obs (O,) -> the next action."""
    with np.load(file) as log:
        acts, episodes = iter(log["act"].tolist()), log["episodes"].astype(int).tolist()
    for start, steps, _ in episodes:
        yield start, steps, lambda obs: next(acts)


def acting(task, file, seed, n_actions):
    """The same, for ever, of a snapshot of dqn.py."""
    with np.load(file) as arrays:
        weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    rng, limit = np.random.default_rng(seed), task.max_episode_steps

    @torch.no_grad()
    def choose(obs):
        if rng.random() < EPSILON:
            return int(rng.integers(n_actions))
        x = torch.from_numpy(obs).float().view(1, *task.obs_shape)
        x = F.conv2d(x, weights["encoder.1.weight"], weights["encoder.1.bias"]).relu().flatten()
        x = (weights["q.0.weight"] @ x + weights["q.0.bias"]).relu()
        return int((weights["q.2.weight"] @ x + weights["q.2.bias"]).argmax())

    for _ in itertools.count():
        yield int(rng.integers(2**31)), limit, choose
