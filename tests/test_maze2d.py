import numpy as np
import pytest

from datasets import find_task
from datasets.tasks.d4rl_envs import GOALS, cells
from datasets.tasks.maze2d import CUT, REACHED, SIZES, cell_of, rollout
from datasets.tasks.mazes import next_cells

every = pytest.mark.parametrize("name", SIZES)
ROWS = {}  # what each maze's test has collected


def collected(name):
    if name not in ROWS:
        ROWS[name] = rollout(find_task(name), 6_000, seed=1)
    return np.split(ROWS[name], [4, 6, 7, 11, 12], 1)


@every
def test_one_stream(name):
    """Each row goes on where the one before it ended, also where a new goal is given; nothing is terminal."""
    obs, act, _, next_obs, done, timeout = collected(name)
    assert ROWS[name].shape == (6_000, 13) and ROWS[name].dtype == np.float32
    np.testing.assert_array_equal(next_obs[:-1], obs[1:])
    assert not done.any() and timeout[-1] == 1 and np.abs(act).max() == 1
    free = cells(name.split("-")[1], "rg")
    assert {cell_of(x) for x in obs} <= set(free) and len({cell_of(x) for x in obs}) >= 7


@every
def test_reward(name):
    """1 where obs, not next_obs, is within 0.5 of the one evaluated goal, whatever is headed for."""
    obs, _, rew, *_ = collected(name)
    near = np.hypot(*(obs[:, :2] - GOALS[name.split("-")[1]]).T) <= 0.5
    np.testing.assert_array_equal(rew[:, 0] == 1, near)
    assert set(rew[:, 0]) <= {0, 1} and (name != "maze2d-umaze" or near.any())


@every
def test_ways(name):
    """Each ends at the centre of a cell, or by the time limit, and passes only cells next to one another."""
    obs, _, _, _, _, timeout = collected(name)
    ends = np.flatnonzero(timeout[:-1, 0])
    away = np.hypot(*(obs[ends, :2] - np.round(obs[ends, :2])).T)
    lengths = np.diff(ends)
    assert np.all((away[1:] < REACHED) | (lengths > find_task(name).max_episode_steps))
    assert len(ends) > 15 and 40 < lengths.mean() < 400
    visited = [cell_of(x) for x in obs]
    steps = {(b[0] - a[0], b[1] - a[1]) for a, b in zip(visited, visited[1:])}
    assert {(0, 1), (0, -1), (1, 0), (-1, 0)} <= steps and max(abs(i) + abs(j) for i, j in steps) <= 2  # cut corners


@every
def test_controller(name):
    """Where no bound cuts it, an action is that of a spring of 10 to the next point, damped by 1, with noise of 0.5."""
    obs, act, *_, timeout = collected(name)
    ends = np.flatnonzero(timeout[:, 0])
    errors = []
    for a, b in zip(ends, ends[1:]):  # the last steps of a way, which head for its goal's centre
        rows = np.arange(max(a + 1, b - 4), b + 1)
        errors.append(act[rows] - (10 * (np.round(obs[b, :2]) - obs[rows, :2]) - obs[rows, 2:]).clip(-1, 1))
    free = np.concatenate([e for e, rows in zip(errors, zip(ends, ends[1:]))])
    inside = free[np.abs(np.concatenate([act[max(a + 1, b - 4) : b + 1] for a, b in zip(ends, ends[1:])])) < 1]
    assert inside.std() == pytest.approx(0.45, abs=0.12)  # less than 0.5: what is beyond a bound is left out


@every
def test_replays_in_the_environment(name):
    rows = np.concatenate(collected(name), 1)[:20]
    env = find_task(name).make_env()
    env.reset(seed=0)
    env.unwrapped.set_state(rows[0, :2].astype(float), rows[0, 2:4].astype(float))
    for row in rows:
        np.testing.assert_allclose(env.step(row[4:6])[0], row[7:11], atol=1e-4)


def test_deterministic():
    """A longer collection begins with the shorter; another seed is another."""
    task, rows = find_task("maze2d-umaze"), np.concatenate(collected("maze2d-umaze"), 1)
    np.testing.assert_array_equal(rollout(task, 500, seed=1)[:, :-1], rows[:500, :-1])
    assert not np.array_equal(rollout(task, 500, seed=2)[:, :-1], rows[:500, :-1])


def test_next_cells():
    ways = next_cells([(1, 1), (1, 2), (2, 2), (2, 1)], (2, 1))
    assert ways == {(2, 1): (2, 1), (1, 1): (2, 1), (2, 2): (2, 1), (1, 2): (2, 2)}
    assert 0 < CUT < 0.5
