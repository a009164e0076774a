"""The worlds of algorithm distillation, their sources, and the histories that are made of them."""

import h5py
import numpy as np
import pytest
import torch

from datasets import UserError, cache_dir, dark_room
from datasets.tasks.dark_room import Bandit, DarkRoom, KeyToDoor, SmallDarkRoom


def test_dark_room():
    """Walls hold, the goal pays at each step on it, an episode ends after 10 steps, in the middle again."""
    world = SmallDarkRoom(np.array([0, 7, 12]))  # the upper left corner; the cell above the middle; the middle
    assert world.obs.tolist() == [12, 12, 12] and (world.n_obs, world.n_actions) == (25, 5)
    rews = [world.step(np.array(acts)) for acts in ([1, 1, 0], [1, 0, 0], [1, 0, 2], [4, 3, 4], [4, 1, 3], [4, 1, 0])]
    assert np.array(rews).T.tolist() == [[0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0]]
    assert world.obs.tolist() == [0, 2, 17]
    for _ in range(4):
        world.step(np.array([4, 0, 3]))
    assert world.obs.tolist() == [12, 12, 12] and world.time == 0


def test_key_to_door():
    """The key pays once, the door once and only after it; the next episode starts without."""
    world = KeyToDoor(np.array([[0, 1], [0, 1]]))
    world.obs = np.array([1, 0])
    rews = [world.step(np.array(acts)) for acts in ([0, 2], [4, 4], [2, 0], [4, 2], [2, 4])]
    assert np.array(rews).T.tolist() == [[0, 1, 1, 0, 0], [0, 1, 0, 1, 0]]
    for _ in range(45):
        world.step(np.zeros(2, int))
    assert world.time == 0 and not world.has_key.any() and not world.done.any()


def test_bandit():
    """The good arm is odd in training and even where it is held out; arms pay as often as their chances say."""
    learn, held_out = Bandit.all_tasks(np.random.default_rng(0))
    assert (learn.shape, held_out.shape) == ((500, 10), (100, 10))
    assert (learn.argmax(1) % 2 == 1).all() and (held_out.argmax(1) % 2 == 0).all()
    assert learn.max(1).min() > 0.7 and np.sort(learn, 1)[:, -2].max() < 0.6
    world = Bandit(np.tile([0.1, *[0.0] * 8, 0.9], (4000, 1)))
    assert world.step(np.full(4000, 9)).mean() == pytest.approx(0.9, abs=0.02)
    assert world.step(np.zeros(4000, int)).mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("kind", [SmallDarkRoom, DarkRoom, KeyToDoor])
def test_tasks_are_apart(kind):
    """None that is held out is among those that are learned; of rooms, every cell is one or the other."""
    learn, held_out = (
        {tuple(np.atleast_1d(task)) for task in tasks} for tasks in kind.all_tasks(np.random.default_rng(0))
    )
    assert not learn & held_out
    if kind is not KeyToDoor:
        assert len(learn | held_out) == kind.size**2 and len(held_out) == -(-(kind.size**2) // 5)


def test_best():
    """An expert goes to the goal by the shortest way and stays, fetches the key first, and pulls the best arm."""
    world = SmallDarkRoom(np.arange(25))
    rew = np.stack([world.step(world.best()) for _ in range(10)], 1)
    distance = np.abs(np.arange(25) // 5 - 2) + np.abs(np.arange(25) % 5 - 2)
    assert rew.sum(1).tolist() == (10 - np.maximum(distance, 1) + 1).tolist()
    world = KeyToDoor(KeyToDoor.all_tasks(np.random.default_rng(0))[1])
    assert sum(world.step(world.best()) for _ in range(50)).tolist() == [2.0] * 100
    world = Bandit(np.eye(10)[[3, 8]])
    assert world.best().tolist() == [3, 8]


@pytest.mark.parametrize("kind, task", [(SmallDarkRoom, 3), (KeyToDoor, (30, 42))])
def test_q_learning(kind, task):
    """Of one task, step by step, against a table written out, in which time-outs are not terminal, and what a place is
    worth changes with the key and with the door alone; and what it has learned at the end."""
    world, rng, T, cells, size = (
        kind(np.array([task]), 4),
        np.random.default_rng(5),
        kind.length,
        kind.size**2,
        kind.size,
    )
    obs, act, rew = dark_room.play(world, dark_room.q_learning(world, 100, rng))
    assert obs.shape == act.shape == rew.shape == (1, 100 * T)
    rng, stages = np.random.default_rng(5), 3 if kind is KeyToDoor else 1
    q = 1e-3 * rng.random((1, stages, cells, 5))[0]
    for episode in range(100):
        stage = 0
        for t in range(episode * T, episode * T + T):
            random, other = rng.random(1) < 1 - 1.25 * episode / 100, rng.integers(5, size=1)
            assert act[0, t] == (other[0] if random else q[stage, obs[0, t]].argmax())
            row, column = np.divmod(obs[0, t], size) + dark_room.MOVES[act[0, t]]
            after = min(max(row, 0), size - 1) * size + min(max(column, 0), size - 1)
            later = stage + int(rew[0, t]) if kind is KeyToDoor else 0
            target = rew[0, t] + 0.9 * q[later, after].max()
            q[stage, obs[0, t], act[0, t]] += 0.5 * (target - q[stage, obs[0, t], act[0, t]])
            stage = later
    if kind is SmallDarkRoom:
        assert rew.reshape(100, T).sum(1)[-10:].min() >= 7  # the goal is three steps away
    else:
        assert rew.reshape(100, T).sum(1).max() == 2


@pytest.mark.parametrize("kind", [SmallDarkRoom, DarkRoom, KeyToDoor])
def test_the_source_gets_better_and_better(kind):
    """To what there is to be had, without falling back in between."""
    world, episodes = kind(kind.all_tasks(np.random.default_rng(0))[1][:30], 3), min(kind.episodes, 600)
    _, _, rew = dark_room.play(world, dark_room.q_learning(world, episodes, np.random.default_rng(3)))
    tenths = rew.reshape(world.n, 10, -1).sum(2).mean(0) / (episodes // 10)
    best = kind(world.tasks, 3)
    _, _, rew = dark_room.play(best, dark_room.expert(best, 3, None))
    assert np.diff(tenths).min() > -0.02 * tenths[-1] and tenths[0] < 0.3 * tenths[-1]
    assert tenths[-1] > 0.98 * rew.sum(1).mean() / 3


def test_upper_confidence():
    """Each arm once, then the one with the highest bound."""
    world = Bandit(np.linspace(0.05, 0.95, 10)[None])
    _, act, rew = dark_room.play(world, dark_room.upper_confidence(world, 60, np.random.default_rng(0)))
    assert sorted(act[0, :10]) == list(range(10))
    for t in range(10, 60):
        pulls = np.bincount(act[0, :t], minlength=10)
        bound = np.bincount(act[0, :t], rew[0, :t], 10) / pulls + np.sqrt(np.log(t + 1) / (2 * pulls))
        assert bound[act[0, t]] == pytest.approx(bound.max(), abs=1e-8)


def test_other_histories():
    """Noise falls from all to none; an expert's episodes are all alike."""
    world = SmallDarkRoom(np.full(500, 0))
    returns = {}
    for history in ("noise", "expert"):
        _, act, rew = dark_room.make(world, history, 0)
        assert act.shape == (500, 30 * 10)
        returns[history] = rew.reshape(500, 30, 10).sum(2)
    assert (returns["expert"] == 7).all() and (returns["noise"][:, -1] == 7).all()
    assert returns["noise"][:, 0].mean() < 0.5 and 1.5 < returns["noise"][:, 15].mean() < 5


def test_load_histories(monkeypatch):
    """Made once, the same bytes again; the reward belongs to the cell and the act; episodes rise; sources differ."""
    data = dark_room.load_histories("dark-room-5")
    monkeypatch.setattr(dark_room, "_write", None)
    again = dark_room.load_histories("dark-room-5")
    assert again.fingerprint == data.fingerprint and torch.equal(again.act, data.act)
    assert data.obs.shape == data.act.shape == data.rew.shape == (1000, 300)
    assert data.held_out_tasks.shape == (100,) and data.source_rew.shape == (100, 300)
    returns = data.rew.view(1000, 30, 10).sum(2).mean(0)
    assert returns[:3].mean() < 1.5 and returns[-3:].mean() > 6.5
    assert (data.obs.view(1000, 30, 10)[..., 0] == 12).all()
    path = next(cache_dir().glob("dark-room-5-source-*.hdf5"))
    with h5py.File(path, "r+") as file:
        del file["act"]
    with pytest.raises(UserError, match="is damaged .*: remove it, and it is made again"):
        dark_room.load_histories("dark-room-5")
    path.unlink()
    with pytest.raises(UserError, match="Unknown --env 'dark': bandit, dark-room, dark-room-5, key-to-door"):
        dark_room.load_histories("dark")
