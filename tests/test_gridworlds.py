"""Gridworlds against what is counted one trajectory at a time."""

import itertools

import numpy as np
import pytest
import torch

from datasets import UserError, find_world
from datasets.tasks.gridworlds import MAPS, make_world

SMALL = ("S~ ", "#: ", "  G")  # 8 states


def trajectories(world, policy):
    """[(probability, states)] of every trajectory that a policy (T, S, A) can take."""
    move, ways = world.move.numpy(), [(p, [s]) for s, p in enumerate(world.start.numpy()) if p]
    for probs in policy.numpy()[:-1]:
        ways = [
            (p * probs[states[-1], a] * move[states[-1], a, s], [*states, s])
            for p, states in ways
            for a in range(4)
            for s in np.flatnonzero(move[states[-1], a])
        ]
    return ways


def some_policy(world, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(world.horizon, len(world.cells), 4, dtype=torch.float64, generator=generator).softmax(-1)


def test_map():
    """States are the cells that are no wall; a move ends where it can, the wind in all four directions."""
    world = make_world("x", SMALL, "terrain", wind=0.2)
    assert world.cells == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert world.start.tolist() == [1, 0, 0, 0, 0, 0, 0, 0] and world.move.dtype == torch.float64
    assert world.rew.tolist() == [0, -0.5, 0, -0.2, 0, 0, 0, 1]
    assert world.features.tolist() == torch.eye(4)[[0, 2, 0, 3, 0, 0, 0, 1]].tolist()
    right = [0.05 + 0.05 + 0.05, 0.8 + 0.05] + 6 * [0.0]  # against the border, the wall, the left
    np.testing.assert_allclose(world.move[0, 3], right, rtol=1e-12)
    np.testing.assert_allclose(world.move[3, 0], [0, 0.85, 0, 0.05, 0.05, 0, 0.05, 0], rtol=1e-12)
    np.testing.assert_allclose(world.move[3, 1], [0, 0.05, 0, 0.05, 0.05, 0, 0.85, 0], rtol=1e-12)
    np.testing.assert_allclose(world.move[3, 2], [0, 0.05, 0, 0.85, 0.05, 0, 0.05, 0], rtol=1e-12)
    np.testing.assert_allclose(world.move[7], np.tile(np.eye(8)[7], (4, 1)))  # a goal is never left
    np.testing.assert_allclose(world.move.sum(-1), 1, rtol=1e-12)
    thin = make_world("x", ("_S", "  ", "~G"), wind=0.0)  # a wall between the left cells of the first two rows
    assert thin.move.argmax(-1).tolist()[:3] == [[0, 0, 0, 1], [1, 3, 0, 1], [2, 4, 2, 3]]
    nowhere = make_world("x", (" G", "~:"))
    assert nowhere.start.tolist() == [1 / 3, 0, 1 / 3, 1 / 3] and torch.equal(nowhere.features, torch.eye(4).double())
    assert world.show(world.rew).splitlines()[1] == "      #  -0.20   0.00"


def test_visits_and_value():
    """To 1e-12 what every trajectory adds up to."""
    world = make_world("x", SMALL, wind=0.3, gamma=0.8, horizon=4)
    policy, expected = some_policy(world), np.zeros((4, 8))
    for p, states in trajectories(world, policy):
        for t, s in enumerate(states):
            expected[t, s] += 0.8**t * p
    np.testing.assert_allclose(world.visits(policy), expected, rtol=1e-12, atol=1e-15)
    assert world.value(policy) == pytest.approx(expected.sum(0) @ world.rew.numpy(), rel=1e-12)


def test_optimum():
    """Against the best of all plans where nothing is random, and in the wind the tree of all that can happen."""
    calm = make_world("x", SMALL, wind=0.0, gamma=0.8, horizon=5)
    best = -np.inf
    for plan in itertools.product(range(4), repeat=4):
        s, value = 0, calm.rew[0].item()
        for t, a in enumerate(plan):
            s = calm.move[s, a].argmax().item()
            value += 0.8 ** (t + 1) * calm.rew[s].item()
        best = max(best, value)
    assert calm.value(calm.optimum(calm.rew)) == pytest.approx(best, rel=1e-12)

    windy = make_world("x", SMALL, wind=0.4, gamma=0.8, horizon=4)
    rew, move = (
        torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).numpy(),
        windy.move.numpy(),
    )

    def value(s, t):
        if t == 4:
            return 0.0
        return rew[s] + 0.8 * max(
            sum(move[s, a, n] * value(n, t + 1) for n in np.flatnonzero(move[s, a])) for a in range(4)
        )

    policy = windy.optimum(torch.from_numpy(rew))
    assert torch.equal(policy, windy.optimum(torch.from_numpy(rew)[:, None].expand(-1, 4)))
    assert (windy.visits(policy).sum(0).numpy() @ rew) == pytest.approx(value(0, 0), rel=1e-12)
    np.testing.assert_allclose(policy.sum(-1), 1, rtol=1e-12)
    assert torch.equal(policy[-1], torch.full((8, 4), 0.25).double())  # after the last step nothing follows


@pytest.mark.parametrize("name, way", [("left", 21), ("right", 7)])
def test_known_optimum(name, way):
    """Without wind: the goal's reward from the step on that the shortest way takes."""
    world = find_world(name, wind=0.0)
    assert world.value(world.optimum(world.rew)) == pytest.approx(np.sum(0.95 ** np.arange(way, 50)), rel=1e-12)


def test_sample():
    """Trajectories visit what is expected, and each step is the action's."""
    world = make_world("x", SMALL, wind=0.3, gamma=0.8, horizon=4)
    policy, generator = some_policy(world), torch.Generator().manual_seed(0)
    states, acts = world.sample(policy, 20_000, generator)
    assert states.shape == acts.shape == (20_000, 4)
    visits = world.visits(policy)
    for t in range(4):
        seen = 0.8**t * np.bincount(states[:, t], minlength=8) / 20_000
        np.testing.assert_allclose(seen, visits[t], atol=0.015)
        taken = np.bincount(acts[states[:, t] == 0, t], minlength=4) / (states[:, t] == 0).sum()
        np.testing.assert_allclose(taken, policy[t, 0], atol=0.03)
    assert (world.move[states[:, :-1], acts[:, :-1], states[:, 1:]] > 0).all()


def test_bad_worlds(tmp_path):
    """One sentence each."""
    with pytest.raises(UserError, match="The world x has no goal: mark a cell of its map with G."):
        make_world("x", ("S ", "  "))
    with pytest.raises(UserError, match="rows of the map of x must be equally long"):
        make_world("x", ("S ", " G "))
    with pytest.raises(UserError, match=r"features are of shape \(3, 2\); the world x has 4 cells and needs \(4, K\)"):
        make_world("x", ("S ", " G"), np.zeros((3, 2)))
    with pytest.raises(UserError, match=r"of shape \(4,\)"):
        make_world("x", ("S ", " G"), np.zeros(4))
    for words in (dict(wind=1.5), dict(wind=-0.1), dict(gamma=0.0), dict(gamma=1.01)):
        with pytest.raises(UserError, match=r"--wind must lie in \[0, 1\] and --gamma in \(0, 1\], not"):
            find_world("open", **words)
    with pytest.raises(UserError, match="Unknown features 'cells'; use cell, terrain, or a .npy file"):
        find_world("open", "cells")
    with pytest.raises(UserError, match="Cannot read --features .*none.npy"):
        find_world("open", str(tmp_path / "none.npy"))
    with pytest.raises(
        UserError, match="Unknown --env 'opne': neither a text file with a map nor one of the worlds open"
    ):
        find_world("opne")


def test_world_of_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(SMALL) + "\n")
    np.save(tmp_path / "f.npy", np.arange(16.0).reshape(8, 2))
    world = find_world(str(tmp_path / "mine.txt"), str(tmp_path / "f.npy"), wind=0.5, gamma=0.7, horizon=3)
    assert (world.name, world.rows, world.gamma, world.horizon) == ("mine", SMALL, 0.7, 3)
    assert world.features[7].tolist() == [14, 15] and world.move[0, 1].tolist()[0] == 0.5 + 3 * 0.125
    assert all(find_world(name).rows == rows for name, rows in MAPS.items())
