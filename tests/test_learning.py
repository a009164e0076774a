"""What training is for: on a task of seconds each method earns what cloning and plain reinforcement learning do not.

The task is a Fork of one observation and one action, whose optimum is computed below. The data push at most 0.4; the
critics of plain SAC go on beyond that with what they saw, the more the better, and from 0.55 on the engine stalls.
"""

import json
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest

from algorithms import awr, bc, bcq, combo, cql, dt, iql, mbop, mopo, morel, offline_sac, td3_bc, tt

HORIZON = 10
VALUES = dict(gamma=0.9, tau=0.05)  # sees as far as an episode is long; the targets follow in 20 updates
PUSH, STALL = 0.4, 0.55  # the longest push in the data; the longest that the engine can do


def move(x, act):
    """A push from x: where it arrives and what it earns, of any shape.

    The square of the distance from the middle, 2.5 on the left and 10 on the right; there each push costs, so that
    whoever goes on pushing at the end earns nothing. A push beyond STALL moves nothing and costs 10.
    """
    stalls = np.abs(act) > STALL
    arrives = np.where(stalls, x, np.clip(x + act, -1, 1))
    rew = np.where(arrives > 0, 10.0, 2.5) * arrives**2 - 80 * np.abs(act) * np.maximum(x, 0) ** 2
    return arrives, np.where(stalls, -10.0, rew)


class Fork(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.1, 0.1)
        return np.array([self.x], np.float32), {}

    def step(self, act):
        self.x, rew = move(self.x, act[0])
        return np.array([self.x], np.float32), float(rew), False, False, {}


@pytest.fixture(autouse=True)
def fork(monkeypatch):
    """The environment by its name, and what MOPO and its sisters have to know of a body: when it ends, here never."""
    for script in (mopo, morel, combo):
        monkeypatch.setitem(script.ENDED, "Fork", lambda obs: obs[..., 0] > np.inf)
    gymnasium.register("Fork-v0", Fork, max_episode_steps=HORIZON)
    yield
    gymnasium.registry.pop("Fork-v0")


def episodes(n, behaviour, rng):
    """Played by behaviour, x (n,) -> act (n,): positions (n, HORIZON + 1), pushes and rewards (n, HORIZON)."""
    positions, pushes, rewards = [rng.uniform(-0.1, 0.1, n)], [], []
    for _ in range(HORIZON):
        pushes.append(behaviour(positions[-1]))
        x, rew = move(positions[-1], pushes[-1])
        positions.append(x)
        rewards.append(rew)
    return [np.stack(columns, 1) for columns in (positions, pushes, rewards)]


def both_ways():
    """Half the episodes go left, half right, with pushes of all lengths up to PUSH, and none in 3 of 10 steps."""
    rng = np.random.default_rng(0)
    side = rng.choice([-1, 1], 200)
    return episodes(200, lambda x: side * rng.uniform(0, PUSH, 200) * (rng.random(200) > 0.3), rng)


def shaky():
    """Goes right and stays there, which is best, but with a trembling hand, which there is dear."""
    rng = np.random.default_rng(0)
    return episodes(200, lambda x: np.clip(aim(x) + rng.uniform(-0.2, 0.2, 200), -PUSH, PUSH), rng)


def aim(x):
    return np.clip(1 - x, 0, PUSH)


def optimum(longest):
    """Mean over the starts of the best return with pushes up to `longest`: dynamic programming on a grid."""
    x, act = np.linspace(-1, 1, 401), np.linspace(-longest, longest, 241)
    value = np.zeros(len(x))
    for _ in range(HORIZON):
        arrives, rew = move(x[:, None], act)
        value = (rew + np.interp(arrives, x, value)).max(1)
    return value[np.abs(x) <= 0.1].mean()


def score(script, data, folder, **changes):
    """The mean return of 10 episodes that `train` records, on the episodes `data`."""
    positions, pushes, rewards = data
    last = np.zeros(rewards.shape, bool)
    last[:, -1] = True
    with h5py.File(folder / "fork.hdf5", "w") as file:
        file["observations"], file["next_observations"] = (
            positions[:, :-1].reshape(-1, 1),
            positions[:, 1:].reshape(-1, 1),
        )
        file["actions"], file["rewards"] = pushes.reshape(-1, 1), rewards.ravel()
        file["terminals"], file["timeouts"] = np.zeros(last.size, bool), last.ravel()
    env = dict(env=str(folder / "fork.hdf5"), eval_env="Fork-v0", device="cpu")
    script.train(script.Args(**env | {"batch_size": 64, "lr": 1e-3} | changes))
    (record,) = Path(folder, "runs").rglob("record-*.json")
    return json.loads(record.read_text())["score"]


def test_task():
    """What the scores below are to be held against: a policy that knows nothing, the data, one side, the optimum."""
    rng = np.random.default_rng(1)
    mean = lambda behaviour: episodes(2000, behaviour, rng)[2].sum(1).mean()
    assert mean(lambda x: rng.uniform(-1, 1, 2000)) == pytest.approx(-48, abs=2)
    assert mean(lambda x: np.full(2000, -PUSH)) == pytest.approx(22, abs=1)  # left is easy, and not worth much
    assert optimum(PUSH) == pytest.approx(72.8, abs=0.5)
    assert mean(aim) == pytest.approx(optimum(PUSH), abs=0.5)  # what the shaky ones mean to do
    assert optimum(1) == pytest.approx(83.0, abs=0.5)
    for data, expected in ((both_ways(), 9.1), (shaky(), 6.6)):
        assert np.abs(data[1]).max() <= PUSH
        assert data[2].sum(1).mean() == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("data", [both_ways, shaky])
def test_plain_sac_fails(data, tmp_path):
    """It stalls: far below the data (9.1 and 6.6), and below a policy that knows nothing (-48)."""
    assert score(offline_sac, data(), tmp_path, steps=500, **VALUES) < -50


def test_bc(tmp_path):
    """It learns the mean of what is done in a state, which does not tremble: 6.6 in the data, 73 without."""
    assert score(bc, shaky(), tmp_path, steps=300) > 45


def test_bcq(tmp_path):
    """All that is to be had on the left, of which a clone has half: 11.7. Here the VAE's proposals are hardly more than
    the clone's action, and --phi is how far from it the policy may go."""
    assert score(bcq, both_ways(), tmp_path, steps=250, n_actions=2, phi=0.3, **VALUES) > 18


def test_awr(tmp_path):
    """The clone's mean, of the better actions: more than 11.7. To V, which is the data's, left is better."""
    args = dict(steps=1500, gamma=0.9, critic_steps=100, actor_steps=100, lr=0.05, actor_lr=1e-3, beta=0.3)
    assert score(awr, both_ways(), tmp_path, **args) > 13


def test_td3_bc(tmp_path):
    """More than cloning, and more than all that is to be had on the left, without stalling."""
    assert score(td3_bc, both_ways(), tmp_path, steps=800, alpha=1.0, **VALUES) > 30


def test_cql(tmp_path):
    args = dict(steps=400, actor_lr=1e-3, alpha=1.0, n_actions=4, critic_layers=2)
    assert score(cql, both_ways(), tmp_path, **args, **VALUES) > 40


def test_iql(tmp_path):
    """Right earns more only for one who rests there; to a value that is the data's mean, left is better."""
    assert score(iql, both_ways(), tmp_path, steps=600, expectile=0.9, beta=1.0, **VALUES) > 40


def test_dt(tmp_path):
    """Asked for the data's best return, as where no target is given, it does better than they do on average."""
    args = dict(steps=800, batch_size=32, lr=5e-4, warmup=50, context=2, dropout=0.0, scale=10.0)
    assert score(dt, both_ways(), tmp_path, **args) > 15


def test_mopo(tmp_path):
    """In the model as well a longer push is better; how little its networks agree on it is what keeps from it.
    It settles on the left."""
    args = dict(steps=600, actor_lr=1e-3, h=5, lam=4.0, penalty="disagreement", model_updates=900)
    assert score(mopo, both_ways(), tmp_path, rollouts=500, rollout_every=100, **args, **VALUES) > 15


def test_morel(tmp_path):
    """It learns to stay where its networks agree, and hardly a step of its last rollouts ends as unknown."""
    args = dict(steps=600, actor_lr=1e-3, h=5, coef=1.0, model_updates=900)
    assert score(morel, shaky(), tmp_path, rollouts=500, rollout_every=100, **args, **VALUES) > 20
    (record,) = Path(tmp_path, "runs").rglob("record-*.json")
    assert json.loads(record.read_text())["curve"][-1]["losses"]["halted"] < 0.05


def test_combo(tmp_path):
    """Penalties on what the model leads to, and on no other state, are enough; they must outweigh its promises."""
    args = dict(steps=600, actor_lr=1e-3, h=5, beta=10.0, n_actions=4, model_updates=900)
    assert score(combo, both_ways(), tmp_path, rollouts=500, rollout_every=100, **args, **VALUES) > 20


@pytest.mark.parametrize("planner", ["mppi", "cem"])
def test_mbop(planner, tmp_path):
    """Planning from the data's own actions finds all that is to be had on the left; without a prior it stalls."""
    found = score(
        mbop, both_ways(), tmp_path, steps=600, horizon=5, candidates=20, sigma=0.1, kappa=1.0, planner=planner
    )
    assert found > 15 if planner == "mppi" else found < -50


@pytest.mark.parametrize("beam", [16, 1])
def test_tt(beam, tmp_path):
    """What trembles is only what a beam draws from: it plans with the best; the same model as a clone trembles on."""
    args = dict(steps=300, warmup=30, lr=3e-3, width=32, layers=1, context=3, bins=16, dropout=0.0, gamma=0.9)
    found = score(tt, shaky(), tmp_path, past=1, horizon=5, beam=beam, **args)
    assert found > 25 if beam > 1 else found < 10
