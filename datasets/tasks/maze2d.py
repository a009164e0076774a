"""Maze2d's data by D4RL's protocol: one ball steered to random goals one after another, in one stream.

As D4RL's generator (scripts/generation/generate_maze2d_datasets.py and its waypoint controller) does it, actions noisy:
the way to a goal's cell leads over cells next to one another, whose corners are cut by up to 0.2; a new goal when the
ball is within 0.1 of the old or the task's time is up. The reward is 1 where the ball is within 0.5 of the one place
that the task evaluates, at obs and not at next_obs; nothing is terminal, and each way to a goal ends in a time-out.
Differs: there the first observation of a way is the one before it once more, which is mended here.
"""

import numpy as np

from datasets.tasks.d4rl_envs import GOALS, cells
from datasets.tasks.mazes import NOISE, next_cells

REACHED = 0.1  # so near to a cell's centre, or to where a corner is cut, the ball has arrived
CUT = 0.2  # a corner, by up to so much of a cell in each direction
SIZES = dict.fromkeys(("maze2d-umaze", "maze2d-medium", "maze2d-large"), 1_000_000)


def rollout(task, transitions, seed):
    """`transitions` rows (obs, act, rew, next_obs, done, timeout) of one stream."""
    maze = task.env_args["maze"]
    rng, env, free = np.random.default_rng([seed, 0]), task.make_env(), cells(maze, "rg")
    ways = {cell: next_cells(free, cell) for cell in free}
    obs = env.reset(seed=int(rng.integers(2**31)))[0].astype(np.float32)
    env, rows = env.unwrapped, []  # without the time limit: the stream goes on
    while len(rows) < transitions:
        target = free[rng.integers(len(free))]
        points, cell = [], cell_of(obs)
        while cell != target:
            cell = ways[target][cell]
            points.append(cell - CUT * rng.uniform(size=2) * (cell != target))
        points = points or [np.array(target, float)]  # it lies in the goal's cell already
        over, steps = False, 0
        while not over:
            over = np.linalg.norm(obs[:2] - target) < REACHED or steps >= task.max_episode_steps
            act = np.clip(10 * (points[0] - obs[:2]) - obs[2:], -1, 1) + NOISE * rng.standard_normal(2)
            act = act.clip(-1, 1).astype(np.float32)
            if len(points) > 1 and np.linalg.norm(obs[:2] - points[0]) < REACHED:
                points = points[1:]
            next_obs = env.step(act)[0].astype(np.float32)
            rew = np.linalg.norm(obs[:2] - GOALS[maze]) <= 0.5
            rows.append(np.concatenate([obs, act, [rew], next_obs, [False, over]]))
            obs, steps = next_obs, steps + 1
    rows = np.array(rows[:transitions], np.float32)
    rows[-1, -1] = True  # a way that is cut has timed out
    return rows


def cell_of(obs):
    """The cell (row, column) around a position (x, y): rows run along x, and cell i reaches from i - 0.7 to i + 0.3."""
    return int(round(obs[0] + 0.2)), int(round(obs[1] + 0.2))
