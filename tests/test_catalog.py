"""The catalog: what `make_env` builds is what D4RL evaluates in; where that is not possible, evaluation is refused.

The numbers are read from D4RL's source (hand_manipulation_suite, locomotion, pointmaze; gym's Ant-v2 and its siblings).
"""

import itertools

import numpy as np
import pytest

from datasets import UserError
from datasets.catalog import find_task

norm, RNG = np.linalg.norm, np.random.default_rng(0)
ANT = 0.75 * np.eye(15)[2] + np.eye(15)[3]
LOCOMOTION = {  # obs, actions, start noise, cost of actions, reward for being alive, time of a step, start, where
    # episodes end: index in (positions, velocities), a value just inside, one just outside
    "halfcheetah-medium-v2": (17, 6, 0.1, 0.1, 0.0, 0.05, np.zeros(9), []),
    "hopper-expert-v2": (11, 3, 0.005, 0.001, 1.0, 0.008, 1.25 * np.eye(6)[1],
                         [(1, 0.701, 0.699), (2, 0.199, 0.201), (2, -0.199, -0.201), (7, 99, 101)]),
    "walker2d-random-v0": (17, 6, 0.005, 0.001, 1.0, 0.008, 1.25 * np.eye(9)[1],
                           [(1, 0.801, 0.799), (1, 1.999, 2.001), (2, 0.999, 1.001), (2, -0.999, -1.001)]),
    "ant-medium-v2": (111, 8, 0.1, 0.5, 1.0, 0.05, ANT, [(2, 0.201, 0.199), (2, 0.999, 1.001)]),
}  # fmt: skip
ADROIT = {  # obs, actions, time limit, that of "longhorizon", bodies and sites placed at a reset: lowest, highest
    "pen": (45, 24, 100, 200, []),
    "door": (39, 28, 200, 300, [("body", "frame", (-0.3, 0.25, 0.252), (-0.2, 0.35, 0.35))]),
    "hammer": (46, 26, 200, 600, [("body", "nail_board", (0.05, 0, 0.1), (0.05, 0, 0.25))]),
    "relocate": (39, 30, 200, 500, [("body", "Object", (-0.15, -0.15, 0.035), (0.15, 0.3, 0.035)),
                                    ("site", "target", (-0.2, -0.2, 0.15), (0.2, 0.2, 0.35))]),
}  # fmt: skip
ANTMAZES = [("umaze", (0, 8), 700), ("medium-play", (20, 20), 1000), ("large-diverse", (32, 24), 1000)]
MAZES = [("umaze-v1", (1, 1), 7, 300), ("medium-dense-v1", (6, 6), 26, 600), ("large-v1", (7, 9), 46, 800)]


def make(name, obs, act, limit):
    """The environment of `name`, its sizes checked, and the simulation in it."""
    env = find_task(name).make_env()
    assert env.observation_space.shape == env.reset(seed=0)[0].shape == (obs,)
    assert (env.action_space.low == -np.ones(act)).all() and (env.action_space.high == np.ones(act)).all()
    assert env.get_wrapper_attr("_max_episode_steps") == limit
    return env, env.unwrapped


def within(draws, low, high):
    """All of `draws` between `low` and `high`, and nearly all of that range used."""
    draws, low, high = np.array(draws), np.array(low), np.array(high)
    assert (draws >= low - 1e-9).all() and (draws <= high + 1e-9).all()
    assert (np.ptp(draws, axis=0) >= 0.9 * (high - low) - 1e-9).all()


@pytest.mark.parametrize("name", LOCOMOTION)
def test_locomotion(name):
    obs_dim, act_dim, noise, cost, alive, dt, start, edges = LOCOMOTION[name]
    (env, sim), n, ant = make(name, obs_dim, act_dim, 1000), start.size, name.startswith("ant")
    draws = np.array([sim.state_vector() for seed in range(300) if env.reset(seed=seed)])
    within(draws[:, :n] - start, np.full(n, -noise), np.full(n, noise))
    np.testing.assert_allclose(draws[:, n:].std(), noise if noise == 0.1 else noise / 3**0.5, rtol=0.05)  # else uniform
    for _ in range(40):
        act, x = RNG.uniform(-1, 1, act_dim), sim.data.body("torso").xpos if ant else sim.data.qpos  # views
        before = x[0].copy()
        obs, rew, terminated, _, _ = env.step(act)
        np.testing.assert_allclose(rew, (x[0] - before) / dt - cost * np.sum(act**2) + alive, atol=1e-6)
        qvel = sim.data.qvel if noise == 0.1 else np.clip(sim.data.qvel, -10, 10)
        forces = np.zeros(84 if ant else 0)  # MuJoCo 2.0 left them at 0 in D4RL's data and evaluations (D4RL issue 143)
        np.testing.assert_allclose(obs, np.concatenate([sim.data.qpos[1 + ant :], qvel, forces]))
        if terminated:
            env.reset(seed=0)
    for index, inside, outside in edges:
        for value in (inside, outside):
            state = np.append(start, np.zeros(sim.model.nv))
            state[index] = value
            sim.set_state(state[:n], state[n:])
            assert sim.terminated == (value == outside), (index, value)


def adroit_reward(task, obs, data):
    """D4RL's reward of the state that a step led to."""
    if task == "pen":
        away, along = norm(obs[39:42]), obs[33:36] @ obs[36:39]
        return along - away + (away < 0.075) * (10 * (along > 0.9) + 50 * (along > 0.95)) - 5 * (obs[26] < 0.075)
    if task == "door":
        bonus = 2 * (obs[28] > 0.2) + 8 * (obs[28] > 1) + 10 * (obs[28] > 1.35)
        return bonus - 0.1 * norm(obs[35:38]) - 0.1 * (obs[28] - 1.57) ** 2 - 1e-5 * np.sum(data.qvel**2)
    if task == "hammer":
        palm, hammer, nail, head = obs[33:36], obs[36:39], obs[42:45], data.site("tool").xpos
        left = norm(nail - data.site("nail_goal").xpos)
        bonus = 2 * (hammer[2] > 0.04 and head[2] > 0.04) + 25 * (left < 0.02) + 75 * (left < 0.01)
        return bonus - 0.1 * norm(palm - hammer) - norm(head - nail) - 10 * left - 0.01 * norm(data.qvel)
    far, lifted = norm(obs[36:39]), data.body("Object").xpos[2] > 0.04
    carried = lifted * (1 - 0.5 * norm(obs[33:36]) - 0.5 * far)
    return carried - 0.1 * norm(obs[30:33]) + 10 * (far < 0.1) + 20 * (far < 0.05)


@pytest.mark.parametrize("task", ADROIT)
def test_adroit(task):
    obs_dim, act_dim, limit, long_limit, drawn = ADROIT[task]
    assert find_task(f"{task}-human-longhorizon-v1").max_episode_steps == long_limit
    (env, sim), rewards = make(f"{task}-cloned-v1", obs_dim, act_dim, limit), []
    for kind, name, low, high in drawn:
        place = getattr(sim.model, kind)(name).pos  # a view
        within([place.copy() for seed in range(100) if env.reset(seed=seed)], low, high)
    if task == "pen":  # the goal is turned about x and about y, each by at most 1 radian
        quat = sim.model.body("target").quat
        w, x, y, z = np.array([quat.copy() for seed in range(100) if env.reset(seed=seed)]).T
        within(2 * np.arctan([x / w, y / w]).T, (-1, -1), (1, 1))
        np.testing.assert_allclose(np.abs(w * z), np.abs(x * y), atol=1e-12)
    for i in range(24):  # nearer to the goal and farther from it, so that every bonus is met
        env.reset(seed=i)
        assert not sim.state_vector().any()
        pos, up = np.zeros(sim.model.nq), 0.3 * (i % 2)
        if task == "door":
            pos[28] = 0.065 * i
        elif task == "pen":
            sim.model.body("target").quat[:], pos[-6] = (1, 0, 0.04 * i, 0), up  # -6 points down
        elif task == "hammer":
            pos[26], pos[-5] = 0.09 - 0.002 * i, up
        else:
            sim.model.site("target").pos[:], pos[-4] = sim.data.body("Object").xpos + (0.01 * i, 0, up), up
        sim.set_state(pos, np.zeros(sim.model.nv))
        obs, rew, terminated, truncated, _ = env.step(RNG.uniform(-0.1, 0.1, act_dim))
        np.testing.assert_allclose(rew, adroit_reward(task, obs, sim.data), atol=1e-9)
        assert bool(terminated) == (task == "pen" and up > 0) == (task == "pen" and obs[26] < 0.075) and not truncated
        rewards.append(rew)
    assert len({round(rew / 6) for rew in rewards}) >= 3 and sim.data.time == pytest.approx(0.01)
    env.step(np.ones(act_dim))
    np.testing.assert_allclose(sim.data.ctrl, sim.model.actuator_ctrlrange[:, 1])


@pytest.mark.parametrize("maze, goal, limit", ANTMAZES)
def test_antmaze(maze, goal, limit):
    (env, sim), hits = make(f"antmaze-{maze}-v2", 29, 8, limit), []
    within([env.reset(seed=seed)[0][:3] for seed in range(200)], (-0.1, -0.1, 0.65), (0.1, 0.1, 0.85))
    env.step(np.ones(8))
    np.testing.assert_allclose(sim.data.qfrc_actuator[6:], 30)  # torque
    assert sim.dt == pytest.approx(0.1) and (sim.model.geom_pos == (-4, 0, 1)).all(1).any()  # a wall beside the start
    for seed in range(40):  # goals lie 0 to 1 plus 0 to 0.5 beyond the middle of their cell
        env.reset(seed=seed)
        for x, y in itertools.product(np.arange(-0.4, 2, 0.4), repeat=2):
            sim.set_state(np.append(np.add(goal, (x, y)), ANT[2:]), np.zeros(14))
            obs, rew, terminated, _, _ = env.step(np.zeros(8))
            assert rew == float(terminated)
            hits += [obs[:2] - goal] * terminated
    assert np.min(hits) >= -0.5 and np.max(hits) <= 2 and np.abs(np.mean(hits, axis=0) - 0.75).max() < 0.2


@pytest.mark.parametrize("maze, goal, free, limit", MAZES)
def test_maze2d(maze, goal, free, limit):
    env, sim = make(f"maze2d-{maze}", 4, 2, limit)
    starts = np.array([env.reset(seed=seed)[0] for seed in range(600)])
    within(starts[:, :2] - np.round(starts[:, :2]), (-0.1, -0.1), (0.1, 0.1))
    assert len({*map(tuple, np.round(starts[:, :2]))}) == free and abs(starts[:, 2:].std() - 0.1) < 0.01
    for offset in (0.0, 0.2, 0.29, -0.45, -0.6):
        sim.set_state(np.add(goal, (offset, 0)), np.zeros(2))
        obs, rew, terminated, _, _ = env.step(np.zeros(2))
        away = norm(obs[:2] - goal)
        assert rew == pytest.approx(np.exp(-away) if "dense" in maze else float(away <= 0.5)) and not terminated
    sim.set_state(np.array(goal, float), np.array([0.0, 9.0]))
    assert 4 < env.step(np.zeros(2))[0][3] < 5 and sim.dt == 0.01 and (sim.model.actuator_gear[:, 0] == 100).all()


@pytest.mark.parametrize("kind", ["complete", "partial", "mixed"])
def test_kitchen_is_refused(kind):
    task = find_task(f"kitchen-{kind}-v0")
    assert not task.evaluable and (task.obs_dim, task.act_dim, task.max_episode_steps) == (60, 9, 280)
    with pytest.raises(UserError, match=f"D4RL/kitchen/{kind}-v2"):
        task.make_env()
