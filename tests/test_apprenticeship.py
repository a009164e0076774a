"""Apprenticeship learning: its two ways to the next reward against brute force, its whole course, what it promises."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from test_gridworlds import SMALL, some_policy, trajectories

from algorithms import apprenticeship
from datasets import UserError
from datasets.tasks.gridworlds import make_world


def test_feature_expectations():
    """Against every trajectory, to 1e-8; of sampled ones, the mean of theirs."""
    world = make_world("x", SMALL, "terrain", wind=0.3, gamma=0.8, horizon=4)
    policy, F = some_policy(world), world.features.numpy()
    expected = sum(p * sum(0.8**t * F[s] for t, s in enumerate(states)) for p, states in trajectories(world, policy))
    np.testing.assert_allclose(apprenticeship.feature_expectations(world, policy), expected, rtol=1e-8)
    torch.manual_seed(0)
    states, _ = world.sample(policy, 3)
    mean = np.mean([sum(0.8**t * F[s] for t, s in enumerate(own)) for own in states.tolist()], 0)
    torch.manual_seed(0)
    np.testing.assert_allclose(apprenticeship.shown_expectations(world, policy, 3), mean, rtol=1e-12)


def test_project():
    """The nearest of many points between the two; and of no more than all of mu."""
    near, mu = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 1.0]]).double()
    weights = torch.tensor([0.3, 0.7]).double()
    for shown in ((1.0, 1.0, 1.0), (4.0, 0.0, 2.0)):
        shown = torch.tensor(shown).double()
        point, mixed = apprenticeship.project(shown, near, weights, mu)
        shares = torch.linspace(0, 1, 100_001).double()[:, None]
        line = (1 - shares) * near + shares * mu
        best = (line - shown).norm(dim=1).argmin()
        torch.testing.assert_close(point, line[best], atol=2e-5, rtol=0)
        torch.testing.assert_close(mixed, torch.cat([(1 - shares[best]) * weights, shares[best]]), atol=2e-5, rtol=0)
    assert torch.equal(point, mu)


def test_nearest():
    """Of a hull against a general optimiser, to 1e-8 of the distance; the margin is the paper's: along w no policy's
    expectations come nearer to the expert's than the hull's nearest point does."""
    rng = np.random.default_rng(0)
    mus, shown = torch.from_numpy(rng.normal(size=(6, 4))), torch.tensor([2.0, 0.5, -0.3, 1.0]).double()
    point, weights = apprenticeship.nearest(shown, mus)
    assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(point, weights @ mus)
    loss = lambda x: np.sum((x @ mus.numpy() - shown.numpy()) ** 2)
    ends = {"type": "eq", "fun": lambda x: x.sum() - 1}
    other = minimize(loss, np.full(6, 1 / 6), bounds=[(0, 1)] * 6, constraints=ends, tol=1e-14)
    assert ((point - shown) ** 2).sum().item() == pytest.approx(other.fun, rel=1e-8)
    w = shown - point
    margins = (shown - mus) @ w / w.norm()
    assert margins.min().item() == pytest.approx(w.norm().item(), rel=1e-9)
    inside, _ = apprenticeship.nearest(mus.mean(0), mus)
    torch.testing.assert_close(inside, mus.mean(0))


def quick(tmp_path, **changes):
    (tmp_path / "small.txt").write_text("\n".join(SMALL))
    words = dict(env=str(tmp_path / "small.txt"), wind=0.25, gamma=0.8, horizon=6, seed=3, features="cell", eps=0.02)
    return dataclasses.replace(apprenticeship.Args(), **words | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "margin"}, {"steps": 2}, {"steps": 2, "method": "margin"}, {"demos": 4, "eps": 0.05}, {"eps": 9.0}],
)
def test_update(changes, tmp_path, capsys):
    """The whole course, in NumPy, with the projection's formula as the paper has it, and a general optimiser for the
    hull."""
    args = quick(tmp_path, **changes)
    result = apprenticeship.train(args)
    world = make_world("small", SMALL, "cell", 0.25, 0.8, 6)
    move, start = world.move.numpy(), world.start.numpy()

    def best(rew):
        V, policy = np.zeros(8), []
        for _ in range(6):
            Q = rew[:, None] + 0.8 * np.einsum("san,n->sa", move, V)
            V = Q.max(1)
            top = (V[:, None] - 1e-9 < Q).astype(float)
            policy.insert(0, top / top.sum(1, keepdims=True))
        return policy

    def mu(policy):
        at, total = start, np.zeros(8)
        for t, probs in enumerate(policy):
            total = total + 0.8**t * at
            at = np.einsum("s,sa,san->n", at, probs, move)
        return total

    true = world.rew.numpy()
    expert = best(true)
    shown = mu(expert)
    if args.demos:
        torch.manual_seed(3)
        states, _ = world.sample(torch.from_numpy(np.array(expert)), 4)
        shown = np.mean([sum(0.8**t * np.eye(8)[s] for t, s in enumerate(own)) for own in states.tolist()], 0)
    policies = [np.full((6, 8, 4), 0.25)]
    mus, weights = [mu(policies[0])], np.ones(1)
    near = mus[0]
    while len(mus) <= args.steps and np.linalg.norm(shown - near) > args.eps * np.linalg.norm(shown):
        policy = best(shown - near)
        if (shown - near) @ (mu(policy) - near) <= args.eps * (shown - near) @ (shown - near):
            break
        policies.append(policy)
        mus.append(mu(policy))
        if args.method == "project":
            way = mus[-1] - near
            share = min(1.0, way @ (shown - near) / (way @ way))
            near, weights = near + share * way, np.append((1 - share) * weights, share)
        else:
            near, weights = (
                x.numpy() for x in apprenticeship.nearest(torch.from_numpy(shown), torch.tensor(np.array(mus)))
            )
    assert len(mus) == 1 if args.eps > 1 else 2 <= len(mus) < 60
    np.testing.assert_allclose(result["policies"], policies, atol=1e-9)
    np.testing.assert_allclose(result["weights"], weights, atol=1e-9)
    gap = np.linalg.norm(weights @ mus - shown) / np.linalg.norm(shown)
    share = weights @ mus @ true / (mu(expert) @ true)
    assert [result["feature_gap"], result["share"]] == pytest.approx([gap, share], rel=1e-6, abs=1e-9)
    assert result["mixed"] == np.sum(weights > 1e-9)
    said = capsys.readouterr().out
    assert f"on small, {args.method}: {result['mixed']} of {len(mus)} policies mixed\n" in said
    assert f"{gap:.2%} from the expert's; {share:.1%} of the optimum; {result['seconds']:.1f} s\n" in said
    assert 0 <= result["seconds"] < 60


@pytest.mark.parametrize("method", ["project", "margin"])
@pytest.mark.parametrize("features", ["cell", "terrain"])
def test_reaches_the_expert(method, features):
    """With the defaults: expectations within 1 %, and so as good as the expert."""
    result = apprenticeship.train(apprenticeship.Args(method=method, features=features))
    assert result["feature_gap"] <= 0.01 and result["share"] > 0.98


def test_bad_input(tmp_path):
    (tmp_path / "none.txt").write_text("S \n  \n")
    with pytest.raises(UserError, match="The world none has no goal"):
        apprenticeship.train(apprenticeship.Args(env=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match="--demos must be at least 0, not -1"):
        apprenticeship.train(apprenticeship.Args(demos=-1))


@pytest.mark.parametrize("method", ["project", "margin"])
def test_expectations_that_nobody_has(method, tmp_path):
    """One lucky trajectory is not to be matched: the end is where no mixture is 2 % nearer, and it says how far."""
    args = quick(tmp_path, method=method, demos=1, features="terrain")
    result = apprenticeship.train(args)
    best = apprenticeship.train(dataclasses.replace(args, method="margin", eps=1e-9))
    assert torch.isfinite(result["weights"]).all() and len(result["weights"]) < 100
    assert 0.05 < best["feature_gap"] <= result["feature_gap"] < best["feature_gap"] / 0.97
