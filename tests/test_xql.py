"""XQL's whole update against the paper's Eq. 11 and 12, with the authors' cut exponents, scaled loss, Huber loss."""

import numpy as np
import pytest
import torch
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, mlp, polyak, q_values, table, trace

from algorithms import xql
from datasets import Batch


def normed(params, x):
    """V: linear, layer normalisation, ReLU, twice, and linear."""
    params = list(params.values())
    for i in range(0, len(params) - 2, 4):
        x = x @ params[i].T + params[i + 1]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        x = (x * params[i + 2] + params[i + 3]).clamp(min=0)
    return (x @ params[-2].T + params[-1])[..., 0]


def log_prob(mean, log_std, act):
    return torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp()).log_prob(act).sum(-1)


def test_update(small, monkeypatch):
    changes = dict(scale=0.7, max_clip=0.2, beta=2.0, dropout=0.0, gamma=0.9, tau=0.1, lr=1e-3)
    traced = trace(xql, monkeypatch, arguments(xql, small, steps=6, batch_size=16, **changes), {"rew_shift": -1.0})

    obs, act, rew, next_obs, done = columns(small)
    returns = np.add.reduceat(rew.numpy(), [0, *ends_of(small)[:-1]])
    rew = rew * 1000 / (returns.max() - returns.min()) - 1
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    expected = table((obs - mean) / std, act, rew, (next_obs - mean) / std, done)
    torch.testing.assert_close(traced.rows, expected, rtol=1e-6, atol=1e-9)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target", "value")}
    actor, critic, critic_target, value = nets.values()
    assert_same(critic, critic_target)
    opts = {name: Adam(nets[name], 1e-3) for name in ("actor", "critic", "value")}
    cut = 0
    for step, batch in enumerate(traced.batches, 1):
        assert batch.obs.shape == (16, 11)
        target = (batch.rew + 0.9 * (1 - batch.done) * normed(value, batch.next_obs)).detach()
        u = q_values(critic_target, batch.obs, batch.act).min(0).values.detach() - normed(value, batch.obs)
        z, weight = (u / 0.7).clamp(max=0.2), (2 * u.detach()).exp().clamp(max=100)
        cut += int((u / 0.7 > 0.2).sum())
        biggest = max(z.max().item(), -1.0)
        value_loss = np.exp(-biggest) * (z.exp() - z - 1).mean()  # (Eq. 11)
        error = (q_values(critic, batch.obs, batch.act) - target).abs()
        critic_loss = torch.where(error < 20, error**2 / 2, 20 * error - 200).mean(1).sum()
        mean = mlp({key: x for key, x in actor.items() if key != "log_std"}, batch.obs).tanh()
        actor_loss = -(weight * log_prob(mean, actor["log_std"], batch.act)).mean()  # (Eq. 12)
        shown = traced.watched[step - 1]
        assert_same({"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}, shown)
        losses = {"actor": actor_loss, "critic": critic_loss, "value": value_loss}
        for name, loss in losses.items():
            opts[name].step(loss)
        polyak(critic_target, critic, 0.1)
        progress = torch.tensor(step / 6, dtype=torch.float32)  # as Adam counts its steps
        opts["actor"].lr = (1e-3 / 2 * (1 + torch.cos(torch.pi * progress))).double()
    assert 0 < cut < 6 * 16
    for name, params in nets.items():
        assert_same(params, traced.end[name], name)


def ends_of(path):
    import h5py

    with h5py.File(path) as file:
        return np.flatnonzero(file["terminals"][:] | file["timeouts"][:]) + 1


@pytest.fixture
def nets():
    torch.manual_seed(0)
    return xql.Actor(5, 3), xql.Critic(5, 3), xql.value_mlp(5, 256, 256, 1), xql.Critic(5, 3)


def test_value_is_the_soft_maximum(nets):
    """Where one state has many actions in the data, V comes to scale log mean exp(Q / scale) of them."""
    actor, critic, value, critic_target = nets
    batch = Batch(torch.ones(64, 5), torch.rand(64, 3) * 2 - 1, *torch.zeros(3, 64))
    batch = batch._replace(next_obs=batch.obs)
    critic_target.layers[-1].weight.data *= 20
    q = critic_target(batch.obs, batch.act).amin(0).detach()
    opt = torch.optim.Adam(value.parameters(), 3e-3)
    args = xql.Args(scale=0.3, max_clip=7.0, beta=3.0, dropout=0.0)
    for _ in range(300):
        opt.zero_grad()
        xql.losses(args, batch, actor, critic, value, critic_target)["value_loss"].backward()
        opt.step()
    expected = 0.3 * torch.logsumexp(q / 0.3, 0) - 0.3 * np.log(64)
    assert q.mean() + 0.05 < expected < q.max()
    assert value(batch.obs)[0].item() == pytest.approx(expected.item(), abs=0.02)


def test_huber(nets):
    """Beyond an error of 20 the critic's loss grows with it, not with its square; each loss trains its own network."""
    batch = Batch(torch.randn(8, 5), torch.rand(8, 3), torch.full((8,), 1000.0), torch.randn(8, 5), torch.ones(8))
    args = xql.Args(scale=1.0, max_clip=5.0, beta=3.0, dropout=0.0)
    losses = xql.losses(args, batch, *nets)
    q = nets[1](batch.obs, batch.act).detach()
    assert losses["critic_loss"].item() == pytest.approx((20 * (1000 - q) - 200).mean(1).sum().item(), rel=1e-5)
    for name, own in zip(("actor_loss", "critic_loss", "value_loss"), nets):
        for net in nets:
            net.zero_grad()
        losses[name].backward(retain_graph=True)
        assert [net for net in nets if any(p.grad is not None for p in net.parameters())] == [own]
