"""AWR's returns and losses worked out in NumPy, and its whole training against the paper's Algorithm 1."""

import dataclasses

import numpy as np
import pytest
import torch
from test_losses import array, forward
from test_scripts import arguments
from update import assert_same, columns, episodes, leaves, mlp, table, trace

from algorithms import awr
from datasets import Batch, UserError
from results.run import Run

B, O, A = 32, 5, 3


@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_lambda_returns(lam):
    """The mean of all n-step returns with weights (1 - lam) lam^(n - 1), of which the last has what remains; of an
    episode that ends, of one that is cut, of one with a single step, and of two agents at once."""
    args, rng = awr.Args(lam=lam, gamma=0.9), np.random.default_rng(0)
    ends, done = np.array([5, 9, 10, 16]), np.zeros(16)
    done[[4, 9]] = 1
    rew, next_v = rng.normal(size=16), rng.normal(size=(2, 16))
    expected = np.zeros((2, 16))
    for start, end in zip([0, *ends], ends):
        for t in range(start, end):
            left = end - t
            for n in range(1, left + 1):  # so many rewards, and then V where the episode goes on
                last = t + n - 1
                n_step = sum(0.9**k * rew[t + k] for k in range(n)) + 0.9**n * (1 - done[last]) * next_v[:, last]
                weight = lam ** (n - 1) * (1 - lam if n < left else 1)
                expected[:, t] += weight * n_step
    np.testing.assert_allclose(awr.lambda_returns(args, rew, done, next_v, ends), expected, rtol=1e-12)
    np.testing.assert_allclose(awr.lambda_returns(args, rew, done, next_v[0], ends), expected[0], rtol=1e-12)


def test_weights():
    torch.manual_seed(0)
    adv = torch.randn(2, 1000) * torch.tensor([[0.1], [30.0]]) + 5
    x = array(adv)
    normal = (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1e-5)
    expected = np.minimum(np.exp(normal / 0.5), 20)
    assert 0 < np.mean(expected == 20) < 0.5
    np.testing.assert_allclose(array(awr.weights(awr.Args(beta=0.5), adv)), expected, rtol=1e-4)


def test_losses():
    """The means of some actions lie outside their bounds."""
    torch.manual_seed(1)
    batch = Batch(torch.randn(B, O), torch.rand(B, A) * 2 - 1, *[None] * 3)
    actor, value = awr.Actor(O, A), awr.mlp(O, 128, 64, 1)
    actor.net[-1].weight.data *= 20
    returns, weight = 100 * torch.randn(B), torch.rand(B)
    args = awr.Args(gamma=0.9, action_std=0.3)
    obs, act = array(batch.obs), array(batch.act)
    v = forward(value, obs)[:, 0]
    expected = 0.5 * np.mean((0.1 * array(returns) - v) ** 2)
    assert awr.critic_loss(args, batch, returns, value).item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(array(awr.values(args, batch.obs, value)), 10 * v, rtol=1e-4, atol=1e-5)

    mean = forward(actor.net, obs)
    density = np.prod(np.exp(-(((act - mean) / 0.3) ** 2) / 2) / (0.3 * np.sqrt(2 * np.pi)), 1)
    outside = np.maximum(mean - 1, 0) ** 2 + np.minimum(mean + 1, 0) ** 2
    assert 0 < np.mean(outside > 0) < 1
    expected = -np.mean(array(weight) * np.log(density)) + 10 * 0.5 * np.mean(outside.sum(1))
    assert awr.actor_loss(args, batch, weight, actor).item() == pytest.approx(expected, rel=1e-4)


def test_bad_lam(small):
    with pytest.raises(UserError, match=r"--lam must lie in \[0, 1\], not 1\.5"):
        awr.train(arguments(awr, small, lam=1.5))


def test_update(small, monkeypatch):
    """Nine updates of the actor in turns of four, three of V before each turn; SGD with momentum 0.9 throughout."""
    changes = dict(gamma=0.9, lam=0.7, beta=0.4, critic_steps=3, actor_steps=4, lr=0.05, actor_lr=1e-3, action_std=0.6)
    args = arguments(awr, small, steps=9, batch_size=16, **changes)
    traced = trace(awr, monkeypatch, args, task={"rew_shift": -1.0})

    obs, act, rew, next_obs, done = columns(small)
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    obs, next_obs, rew = (obs - mean) / std, (next_obs - mean) / std, rew - 1
    torch.testing.assert_close(traced.rows, table(obs, act, rew, next_obs, done), rtol=1e-9, atol=1e-9)

    actor, value = leaves(traced.start["actor"]), leaves(traced.start["value"])
    assert [len(x) for x in value.values()] == [128, 128, 64, 64, 1, 1]
    assert [len(x) for x in actor.values()] == [128, 128, 64, 64, 3, 3]
    speed = {id(x): torch.zeros_like(x) for x in (*actor.values(), *value.values())}

    def step_of(params, lr, loss):
        for x, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values()))):
            speed[id(x)] = 0.9 * speed[id(x)] + grad
            x.data -= lr * speed[id(x)]

    def returns():
        """Backwards through each episode."""
        with torch.no_grad():
            next_v = (mlp(value, next_obs)[:, 0] / 0.1 * (1 - done)).tolist()
        result = []
        for span in episodes(small):
            after, own = next_v[span.stop - 1], []
            for t in reversed(range(span.start, span.stop)):
                after = rew[t].item() + 0.9 * (0.3 * next_v[t] + 0.7 * after)
                own.append(after)
            result += reversed(own)
        return torch.tensor(result, dtype=torch.float64)

    draws = iter(traced.random)
    assert [kind for kind, _ in traced.random] == ["randint"] * (3 * 3 + 9)
    R, bounded = returns(), 0
    for step in range(9):
        if step % 4 == 0:
            for _ in range(3):
                rows = next(draws)[1]
                assert rows.shape == (16,)
                critic_loss = 0.5 * ((0.1 * R[rows] - mlp(value, obs[rows])[:, 0]) ** 2).mean()
                step_of(value, 0.05, critic_loss)
            R = returns()
            with torch.no_grad():
                adv = R - mlp(value, obs)[:, 0] / 0.1
            adv = (adv - adv.mean()) / ((adv - adv.mean()).square().mean().sqrt() + 1e-5)
            weight = (adv / 0.4).exp()
            bounded += (weight > 20).sum().item()
            weight = weight.clamp(max=20)
        rows = next(draws)[1]
        mean = mlp(actor, obs[rows])
        log_pi = torch.distributions.Normal(mean, 0.6).log_prob(act[rows]).sum(1)
        outside = (mean.abs() - 1).clamp(min=0)
        actor_loss = -(weight[rows] * log_pi).mean() + 5 * (outside**2).sum(1).mean()
        step_of(actor, 1e-3, actor_loss)
        losses = {"critic_loss": critic_loss, "actor_loss": actor_loss}
        assert_same(losses, traced.watched[step], f"step {step}")
    assert bounded and next(draws, None) is None
    assert_same(actor, traced.end["actor"], "actor")
    assert_same(value, traced.end["value"], "value")


def test_seeds_do_not_leak(small, monkeypatch):
    """Each of 3 agents, and that agent alone with its parameters and batches: equal to 1e-9 after 20 updates."""
    args = arguments(awr, small, steps=20, eval_every=20, batch_size=8)
    monkeypatch.setattr(Run, "_finish", lambda run: None)  # what `trace` puts in the place of scores is of one agent
    together = trace(awr, monkeypatch, dataclasses.replace(args, seeds=3))
    assert together.random[0][1].shape == (3, 8)
    for agent in range(3):
        rows = [draw[agent] for _, draw in together.random]
        own = {name: {key: x[agent] for key, x in together.start[name].items()} for name in ("actor", "value")}
        with monkeypatch.context() as patch:
            stack, starts = awr.stack, [own["actor"], own["value"]]

            def load_start(nets, starts=starts, stack=stack):
                nets[0].load_state_dict(starts.pop(0))
                return stack(nets)

            patch.setattr(awr, "stack", load_start)
            patch.setattr(torch, "randint", lambda *_, rows=rows, **__: rows.pop(0))
            alone = trace(awr, patch, args)
        assert not rows
        for name in ("actor", "value"):
            ours = {key: x[agent] for key, x in together.end[name].items()}
            assert_same(ours, dict(alone.end[name]), f"{name} of {agent}", atol=1e-15)


def test_a_resume_weighs_anew(small, monkeypatch):
    """Within a turn of the actor's: the weights come from V as it is, and V does not move. What is kept of V's loss has
    no history, which would chain each of its updates to the one before."""
    turns, runs, save = [], [], Run._save
    original = awr.lambda_returns
    monkeypatch.setattr(awr, "lambda_returns", lambda *words: turns.append(1) or original(*words))
    monkeypatch.setattr(Run, "_save", lambda run: (runs.append(run), save(run)))
    args = arguments(awr, small, steps=10, actor_steps=7)
    awr.train(args)
    assert len(turns) == 3  # at the start, and in both turns after V's updates
    awr.train(dataclasses.replace(args, steps=13, resume=True))
    assert len(turns) == 4
    assert all(not run.state["loss_v"].requires_grad for run in runs)
