import dataclasses
import json
import pickle
from functools import cache

import matplotlib.figure
import numpy as np
import pytest

from datasets import find_task
from datasets.tasks.mazes import MAPS, SIZES, G, M, S, cell_of, center, control, draw, find_cells, find_ways, rollout

TASKS = {name: find_task(name) for name in MAPS}
LIMITS = dict(zip(TASKS, (300, 600, 800, 400, 400)))
TRANSITIONS = 6000
every = pytest.mark.parametrize("name", TASKS)


@cache
def collected(name):
    """Rows, where each episode begins and ends, and the task's map."""
    rows = rollout(TASKS[name], TRANSITIONS, seed=1)
    ends = np.flatnonzero(rows[:, -2] + rows[:, -1]) + 1
    return rows, np.r_[0, ends[:-1]], ends, TASKS[name].env_args["maze_map"]


def halves(name):
    """The whole trajectories of stitch's two halves: lists of rows."""
    rows, starts, ends, _ = collected(name)
    episodes = [rows[a:b] for a, b in zip(starts, ends)][:-1]  # the last is cut
    first = [cell_of(TASKS[name].env_args["maze_map"], episode[0]) == S for episode in episodes]
    return [e for e, f in zip(episodes, first) if f], [e for e, f in zip(episodes, first) if not f]


@every
def test_environment(name):
    task = TASKS[name]
    assert json.loads(json.dumps(dataclasses.asdict(task)))["env_args"] == task.env_args
    env, maze_map = pickle.loads(pickle.dumps(task)).make_env(), task.env_args["maze_map"]
    assert (env.observation_space.shape, env.action_space.shape) == ((4,), (2,))
    assert np.all(env.action_space.low == -1) and np.all(env.action_space.high == 1)
    assert env.spec.max_episode_steps == task.max_episode_steps == LIMITS[name]
    (goal,) = find_cells(maze_map, "g")
    starts, seen = find_cells(maze_map, "r"), set()
    for seed in range(10 * len(starts)):
        obs, _ = env.reset(seed=seed)
        np.testing.assert_array_equal(env.unwrapped.goal, center(maze_map, goal))
        seen.add(cell_of(maze_map, obs))
        assert np.all(np.abs(obs[:2] - center(maze_map, cell_of(maze_map, obs))) <= 0.25) and np.all(obs[2:] == 0)
    assert seen == set(starts)
    np.testing.assert_array_equal(obs, env.reset(seed=seed)[0])
    assert not np.array_equal(obs, env.reset(seed=seed + 1)[0])


def test_maps_are_the_environments():
    from gymnasium_robotics.envs.maze import maps

    for name, theirs in (("umaze", maps.U_MAZE), ("medium", maps.MEDIUM_MAZE), ("large", maps.LARGE_MAZE)):
        assert [[int(cell == "#") for cell in row] for row in MAPS[f"pointmaze-{name}"]] == theirs
        assert SIZES[f"pointmaze-{name}"] == 1_000_000
    assert SIZES["stitch-meet"] == SIZES["stitch-gap"] == 100_000


@every
def test_controller_reaches_the_goal_from_every_start(name):
    """Only at the goal there is a reward, and only there the episode terminates. Half of the time is enough."""
    env, maze_map = TASKS[name].make_env(), TASKS[name].env_args["maze_map"]
    (goal,) = find_cells(maze_map, "g")
    ways = find_ways(maze_map, goal)
    slowest = 0
    for start in find_cells(maze_map, "r"):
        obs, _ = env.reset(seed=0, options={"reset_cell": start})
        assert cell_of(maze_map, obs) == start
        for step in range(LIMITS[name]):  # noqa: B007
            obs, rew, terminated, truncated, _ = env.step(control(obs, ways[cell_of(maze_map, obs)]).clip(-1, 1))
            at_goal = np.hypot(*(obs[:2] - center(maze_map, goal))) <= 0.45
            assert (rew, terminated) == (at_goal, at_goal)
            if terminated or truncated:
                break
        assert terminated
        slowest = max(slowest, step)
    assert LIMITS[name] / 5 < slowest < LIMITS[name] / 2


def test_time_limit():
    env = TASKS["stitch-gap"].make_env()
    env.reset(seed=0)
    over = [env.step(np.zeros(2))[2:4] for _ in range(400)]
    assert over == [(False, False)] * 399 + [(False, True)]


@every
def test_rollout(name):
    rows, starts, ends, maze_map = collected(name)
    obs, act, rew, next_obs, done, timeout = np.split(rows, [4, 6, 7, 11, 12], 1)
    assert rows.shape == (TRANSITIONS, 13) and rows.dtype == np.float32
    inside = (done + timeout)[:-1, 0] == 0
    np.testing.assert_array_equal(next_obs[:-1][inside], obs[1:][inside])
    assert not np.any(np.all(next_obs[:-1][~inside] == obs[1:][~inside], axis=1))
    np.testing.assert_array_equal(rew, done)
    assert not np.any(done * timeout) and ends[-1] == TRANSITIONS
    assert np.all(np.abs(act) <= 1) and np.all(obs[starts, 2:] == 0)
    lengths = ends - starts
    assert lengths.max() <= LIMITS[name]
    if name.startswith("pointmaze"):  # only the time limit cuts, and the last row
        assert np.all(lengths[:-1][timeout[ends[:-1] - 1, 0] == 1] == LIMITS[name])
    (goal,) = find_cells(maze_map, "g")
    distance = np.hypot(*(next_obs[:, :2] - center(maze_map, goal)).T)
    assert np.all((distance <= 0.45) == (done[:, 0] == 1))


@every
def test_rollout_replays_in_the_environment(name):
    rows, *_ = collected(name)
    env = TASKS[name].make_env()
    env.reset(seed=0)
    env.unwrapped.point_env.set_state(rows[0, :2], rows[0, 2:4])
    for row in rows[:20]:
        obs, rew, terminated, *_ = env.step(row[4:6])
        np.testing.assert_allclose(obs, row[7:11], atol=1e-4)
        assert (rew, terminated) == (row[6], row[-2])


@pytest.mark.parametrize("name", ["pointmaze-umaze", "stitch-meet"])
def test_rollout_is_deterministic(name):
    """Once more the same bytes; a longer collection begins with the shorter; another seed is another collection."""
    rows, *_ = collected(name)
    again = rollout(TASKS[name], 1000, seed=1)
    np.testing.assert_array_equal(again[:, :-1], rows[:1000, :-1])
    assert again[-1, -2:].sum() == 1
    assert not np.array_equal(rollout(TASKS[name], 1000, seed=2), again)


def test_wanderer_covers_the_maze():
    rows, starts, ends, maze_map = collected("pointmaze-umaze")
    assert {cell_of(maze_map, pos) for pos in rows[:, :2]} == set(find_cells(maze_map, "r", "g"))
    assert 0.2 < rows[:, -2].sum() / len(ends) < 0.8
    assert len({cell_of(maze_map, rows[start]) for start in starts}) == 6


@pytest.mark.parametrize("name", ["stitch-meet", "stitch-gap"])
def test_stitch_halves(name):
    """As many of each; none of the first half comes near the goal, none of the second near the start."""
    first, second = halves(name)
    assert abs(len(first) - len(second)) <= 1 and len(second) > 10
    maze_map = TASKS[name].env_args["maze_map"]
    assert all(e[-1, -2:].tolist() == [0, 1] and cell_of(maze_map, e[0]) == S for e in first)
    assert all(e[-1, -2:].tolist() == [1, 0] and cell_of(maze_map, e[0]) == M for e in second)
    assert all(e[:, 7].max() < center(maze_map, G)[0] - 1 for e in first)
    assert all(e[:, 0].min() > center(maze_map, S)[0] + 1 for e in second)
    if name == "stitch-meet":
        assert all(np.hypot(*(e[-1, 7:9] - center(maze_map, M))) < 0.2 for e in first)


def test_stitch_gap():
    """In one set a stretch of almost two cells, over the corridor's whole width, is without data; in the other none."""
    for name, gap in (("stitch-gap", True), ("stitch-meet", False)):
        first, second = (np.concatenate(half)[:, 7:9] for half in halves(name))
        x, y = center(TASKS[name].env_args["maze_map"], G)[0] - 1.5, np.r_[first, second]  # the last column but two
        y = np.sort(y[(y[:, 0] < x) & (y[:, 0] > x - 1), 1])
        assert (1.5 < np.diff(y).max() < 2) if gap else (np.diff(y).max() < 0.1)


@pytest.mark.parametrize("name, possible", [("stitch-meet", True), ("stitch-gap", False)])
def test_stitching(name, possible):
    """Do the data lead from the start to the goal, if one may pass from a state to another of the same bin?"""
    rows = np.concatenate(sum(halves(name), []))
    size = np.array([0.1, 0.1, 0.5, 0.5])  # of a bin, in (x, y, vx, vy)
    bins, next_bins = (list(map(tuple, np.floor(x / size).astype(int))) for x in (rows[:, :4], rows[:, 7:11]))
    follow, goals = {}, {b for b, done in zip(next_bins, rows[:, -2]) if done}
    for a, b in zip(bins, next_bins):
        follow.setdefault(a, set()).add(b)
    maze_map = TASKS[name].env_args["maze_map"]
    reached = {b for b, row in zip(bins, rows) if cell_of(maze_map, row) == S}
    queue = list(reached)
    for a in queue:
        new = follow.get(a, set()) - reached
        reached |= new
        queue += new
    assert bool(reached & goals) == possible


@every
def test_draw(name):
    rows, starts, ends, maze_map = collected(name)
    axis = matplotlib.figure.Figure().subplots()
    draw(TASKS[name], rows[:, :4], ends, axis)
    paths = [line for line in axis.lines if line.get_linewidth() == 0.5]
    assert len(paths) == min(100, len(ends))
    assert {line.get_color() for line in paths} == ({"C0"} if name.startswith("pointmaze") else {"C0", "C1"})
    walls = axis.images[0].get_array()  # row 0 is the top one, as in the environment's map
    x, y = rows[:, 0], rows[:, 1]
    left, right, bottom, top = axis.images[0].get_extent()
    assert (axis.images[0].origin, right - left, top - bottom) == ("upper", len(maze_map[0]), len(maze_map))
    assert not walls[(top - y).astype(int), (x - left).astype(int)].any()
