"""MaxEnt IRL against every trajectory, finite differences, and its whole update."""

import dataclasses

import numpy as np
import pytest
import torch
from test_gridworlds import SMALL, trajectories
from update import Adam

from algorithms import maxent_irl
from datasets import UserError
from datasets.tasks.gridworlds import make_world


def some_reward(seed=0):
    return torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_every_trajectory():
    """Where nothing is random, a trajectory is as likely as exp of what it earns (times the plans that take it): the
    paper's model. Its partition function is exp V_0, and visits and policy follow, to 1e-8."""
    world = make_world("x", SMALL, wind=0.0, gamma=1.0, horizon=5)
    rew, uniform = some_reward(), torch.full((5, 8, 4), 0.25).double()
    policy, value = maxent_irl.soft_policy(world, rew)
    ways = [(p * np.exp(sum(rew[s].item() for s in states)), states) for p, states in trajectories(world, uniform)]
    Z = sum(weight for weight, _ in ways)
    assert value[0].item() == pytest.approx(np.log(Z) + 5 * np.log(4), rel=1e-10)
    visits = np.zeros((5, 8))
    for weight, states in ways:
        for t, s in enumerate(states):
            visits[t, s] += weight / Z
    np.testing.assert_allclose(world.visits(policy), visits, rtol=1e-8, atol=1e-12)


def test_soft_bellman():
    """In the wind, discounted, at each step; the last action is free."""
    world = make_world("x", SMALL, wind=0.3, gamma=0.8, horizon=3)
    rew, move = some_reward().numpy(), world.move.numpy()
    policy, value = maxent_irl.soft_policy(world, torch.from_numpy(rew))
    V = np.zeros(8)
    for t in (2, 1, 0):
        Q = rew[:, None] + 0.8 * np.einsum("san,n->sa", move, V)
        V = np.log(np.exp(Q).sum(1))
        np.testing.assert_allclose(policy[t], np.exp(Q) / np.exp(Q).sum(1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(value, V, rtol=1e-12)
    assert torch.equal(policy, maxent_irl.soft_policy(world, torch.from_numpy(rew)[:, None].expand(-1, 4))[0])


def test_gradient_by_finite_differences():
    """Of E_start V_0 - visits_expert @ rew, in each reward, to 1e-8; and of the log-likelihood of the expert's actions,
    which is the same to a sign and a constant that no reward moves."""
    world = make_world("x", SMALL, wind=0.3, gamma=0.8, horizon=6)
    expert, rew = maxent_irl.soft_policy(world, 2 * some_reward(1))[0], some_reward().requires_grad_()
    shown = world.visits(expert)
    maxent_irl.maxent_loss(
        rew, world.visits(maxent_irl.soft_policy(world, rew.detach())[0]).sum(0), shown.sum(0)
    ).backward()

    def loss(rew):
        return (world.start @ maxent_irl.soft_policy(world, rew)[1] - shown.sum(0) @ rew).item()

    def likelihood(rew):
        return (shown * (expert * maxent_irl.soft_policy(world, rew)[0].log()).sum(-1)).sum().item()

    for s in range(8):
        step = 1e-4 * torch.eye(8).double()[s]
        slopes = []
        for f in (loss, lambda rew: -likelihood(rew)):
            at = [f(rew.detach() + k * step) for k in (-2, -1, 1, 2)]
            slopes.append((at[0] - 8 * at[1] + 8 * at[2] - at[3]) / 12e-4)
        assert rew.grad[s].item() == pytest.approx(slopes[0], abs=1e-8)
        assert rew.grad[s].item() == pytest.approx(slopes[1], abs=1e-8)


def test_expert_visits():
    """Of sampled trajectories: the mean of what they discount."""
    world = make_world("x", SMALL, wind=0.3, gamma=0.8, horizon=4)
    policy = maxent_irl.soft_policy(world, some_reward())[0]
    torch.manual_seed(0)
    states, _ = world.sample(policy, 3)
    torch.manual_seed(0)
    shown, expected = maxent_irl.expert_visits(world, policy, 3), np.zeros(8)
    for trajectory in states.tolist():
        for t, s in enumerate(trajectory):
            expected[s] += 0.8**t / 3
    np.testing.assert_allclose(shown, expected, rtol=1e-12)
    assert torch.equal(maxent_irl.expert_visits(world, policy, 0), world.visits(policy).sum(0))


def quick(tmp_path, **changes):
    (tmp_path / "small.txt").write_text("\n".join(SMALL))
    words = dict(env=str(tmp_path / "small.txt"), wind=0.25, gamma=0.8, horizon=6, steps=4, lr=0.03, seed=3)
    return dataclasses.replace(maxent_irl.Args(), **words | changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(features="terrain", beta=3.0),
        dict(features="cell", expert="optimal"),
        dict(features="terrain", reward="deep", demos=5),
    ],
)
def test_update(changes, tmp_path, monkeypatch, capsys):
    """Four steps, and what is said of the outcome."""
    args, starts = quick(tmp_path, **changes), []
    make = maxent_irl.make_reward
    monkeypatch.setattr(maxent_irl, "make_reward", lambda *words: starts.append(make(*words)) or starts[0])
    start = {}
    soft, calls = maxent_irl.soft_policy, []

    def first(world, rew):
        if starts and not start:
            start.update({name: x.detach().clone() for name, x in starts[0].state_dict().items()})
        calls.append(1)
        return soft(world, rew)

    monkeypatch.setattr(maxent_irl, "soft_policy", first)
    result = maxent_irl.train(args)

    world = make_world("small", SMALL, args.features, 0.25, 0.8, 6)
    move, F = world.move, world.features

    def plan(rew, hard=False):
        V, policy = torch.zeros(8).double(), []
        for _ in range(6):
            Q = rew[:, None] + 0.8 * torch.einsum("san,n->sa", move, V)
            if hard:
                V = Q.max(1).values
                best = (V[:, None] - 1e-9 < Q).double()
                policy.insert(0, best / best.sum(1, keepdim=True))
            else:
                V = Q.exp().sum(1).log()
                policy.insert(0, Q.exp() / V.exp()[:, None])
        return policy

    def visits(policy):
        at, total = world.start, torch.zeros(8).double()
        for t, probs in enumerate(policy):
            total = total + 0.8**t * at
            at = torch.einsum("s,sa,san->n", at, probs, move)
        return total

    hard = args.expert == "optimal"
    expert = plan(world.rew if hard else args.beta * world.rew, hard)
    shown = visits(expert)
    if args.demos:
        torch.manual_seed(3)
        states, _ = world.sample(torch.stack(expert), 5)
        shown = sum(0.8**t * torch.eye(8).double()[states[:, t]].sum(0) for t in range(6)) / 5
    params = {name: x.requires_grad_() for name, x in start.items()}

    def out(params, x):
        *hidden, last = params.values()
        for weight, bias in zip(hidden[::2], hidden[1::2]):
            x = (x @ weight.T + bias).clamp(min=0)
        return x @ last.T

    assert args.reward == "deep" or not params["weight"].any()
    opt = Adam(params, None)
    for step in range(4):
        opt.lr = 0.03 * (1 - step / 4) * (0.1 if args.reward == "deep" else 1)
        rew = out(params, F)[:, 0]
        opt.step(((visits(plan(rew.detach())) - shown).detach() * rew).sum())
    rew = out(params, F)[:, 0].detach()
    # Adam enlarges the rounding of weights whose gradients nearly vanish: 8e-11 on one processor, 0 on another.
    torch.testing.assert_close(result["rew"], rew, rtol=1e-9, atol=1e-9)
    mine, theirs = visits(plan(rew)) @ F, shown @ F
    gap = ((mine - theirs).norm() / theirs.norm()).item()
    best = visits(plan(world.rew, True)) @ world.rew
    share = ((visits(plan(rew, True)) @ world.rew) / best).item()
    r = np.corrcoef(rew.numpy(), world.rew.numpy())[0, 1]
    assert [result[name] for name in ("feature_gap", "correlation", "share")] == pytest.approx(
        [gap, r, share], rel=1e-9
    )
    said = capsys.readouterr().out
    assert f"{args.reward} reward of {args.features} features:\n{world.show(rew)}\n" in said
    ends = f"optimised, {share:.1%} of the optimum; {result['seconds']:.1f} s\n"
    assert f"{gap:.2%} from the expert's; correlation with the true reward {r:.3f}; {ends}" in said
    assert 0 <= result["seconds"] < 60 and not result["rew"].requires_grad


@pytest.mark.parametrize("features, reward", [("cell", "linear"), ("terrain", "linear"), ("cell", "deep")])
def test_recovers_the_reward(features, reward):
    """With the defaults, where the reward can be told: expectations within 1 %, the reward up to what stays open."""
    result = maxent_irl.train(maxent_irl.Args(features=features, reward=reward))
    assert result["feature_gap"] < 0.01 and result["correlation"] > 0.9 and result["share"] > 0.99


def test_bad_input(tmp_path):
    (tmp_path / "none.txt").write_text("S \n  \n")
    np.save(tmp_path / "f.npy", np.zeros((3, 2)))
    with pytest.raises(UserError, match="The world none has no goal"):
        maxent_irl.train(maxent_irl.Args(env=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match=r"of shape \(3, 2\); the world open has 36 cells and needs \(36, K\)"):
        maxent_irl.train(maxent_irl.Args(features=str(tmp_path / "f.npy")))
    with pytest.raises(UserError, match="--horizon must be at least 1, not 0"):
        maxent_irl.train(maxent_irl.Args(horizon=0))
