"""Discrete CQL's whole update against Eq. 4 of its paper (Kumar et al. 2020), with and without QR-DQN's quantiles."""

import numpy as np
import pytest
import torch
from test_dqn import huber
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, mlp, table, trace

from algorithms import discrete_cql


def quantile_huber(theta, target):
    """Eq. 10 of Dabney et al. 2018 with kappa 1, its sums written out: theta (B, N), target (B, N)."""
    B, N = theta.shape
    total = 0.0
    for b in range(B):
        for i in range(N):
            for j in range(N):
                u = target[b, j] - theta[b, i]
                total = total + abs((i + 0.5) / N - (1.0 if u < 0 else 0.0)) * huber(u) / N
    return total / B


@pytest.mark.parametrize("quantiles", [0, 3])
def test_update(quantiles, small, monkeypatch):
    """Eight steps with other values than the defaults; the target is copied after the third and the sixth."""
    changes = dict(alpha=0.7, quantiles=quantiles, target_every=3)
    args = arguments(discrete_cql, small, steps=8, batch_size=16, gamma=0.9, lr=1e-2, **changes)
    traced = trace(discrete_cql, monkeypatch, args)
    torch.testing.assert_close(
        traced.rows, table(*columns(small.with_name("cartpole.hdf5")))
    )  # as they are in the file

    N, rows = max(1, quantiles), torch.arange(16)
    critic, critic_target = (leaves(traced.start[name]) for name in ("critic", "critic_target"))
    assert_same(critic, critic_target)
    quantiles_of = lambda params, obs: mlp(params, obs).view(16, 2, N)
    opt = Adam(critic, 1e-2)
    assert len(traced.batches) == len(traced.watched) == 8 and not traced.random
    for step, (batch, watched) in enumerate(zip(traced.batches, traced.watched), 1):
        assert batch.obs.shape == (16, 4)
        best = quantiles_of(critic, batch.next_obs).mean(2).argmax(1)
        next_theta = quantiles_of(critic_target, batch.next_obs)[rows, best]
        target = (batch.rew[:, None] + 0.9 * (1 - batch.done)[:, None] * next_theta).detach()
        theta = quantiles_of(critic, batch.obs)
        taken, q = theta[rows, batch.act], theta.mean(2)
        td_loss = quantile_huber(taken, target) if quantiles else huber(taken - target).mean()
        gap = q.exp().sum(1).log() - q[rows, batch.act]
        loss = td_loss + 0.7 * gap.mean()
        opt.step(loss)
        if step % 3 == 0:
            critic_target = leaves(critic)
        assert_same({"critic_loss": loss}, watched)
    assert_same(critic, traced.end["critic"], "critic")
    assert_same(critic_target, traced.end["critic_target"], "target")


def test_quantile_loss_finds_quantiles():
    """Fitted to samples far apart, so that the Huber loss is all but |u|, theta comes to lie at their quantiles."""
    samples = 1000 * torch.distributions.Exponential(1.0).icdf((torch.arange(2000.0) + 0.5) / 2000)
    theta = torch.zeros(1, 5, requires_grad=True)
    opt = torch.optim.Adam([theta], 20.0)
    for step in range(1500):
        opt.param_groups[0]["lr"] = 20.0 * (1 - step / 1500)
        loss = sum_over_samples(theta, samples)
        opt.zero_grad()
        loss.backward()
        opt.step()
    expected = 1000 * -np.log(1 - np.array([0.1, 0.3, 0.5, 0.7, 0.9]))
    np.testing.assert_allclose(theta[0].detach().numpy(), expected, rtol=0.02)


def sum_over_samples(theta, samples):
    """The script's loss, for it takes as many samples as quantiles: in turns of five."""
    turns = samples.view(-1, 5)
    return discrete_cql.quantile_loss(theta.expand(len(turns), 5), turns)
