"""SQL's and EQL's whole updates against the paper's, with the authors' weights and scaled loss."""

import numpy as np
import pytest
import torch
from test_scripts import arguments
from test_xql import ends_of, log_prob, normed
from update import Adam, assert_same, columns, leaves, mlp, polyak, q_values, table, trace

from algorithms import sql
from datasets import Batch


@pytest.mark.parametrize("variant", ["sql", "eql"])
def test_update(variant, small, monkeypatch):
    alpha = {"sql": 0.6, "eql": 0.08}[variant]
    changes = dict(variant=variant, alpha_sql=0.6, alpha_eql=0.08, dropout=0.0, gamma=0.9, tau=0.1, lr=1e-3)
    traced = trace(sql, monkeypatch, arguments(sql, small, steps=6, batch_size=16, **changes), {"rew_shift": -1.0})

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
    for step, batch in enumerate(traced.batches, 1):
        assert batch.obs.shape == (16, 11)
        target = (batch.rew + 0.9 * (1 - batch.done) * normed(value, batch.next_obs)).detach()
        v = normed(value, batch.obs)
        u = q_values(critic_target, batch.obs, batch.act).min(0).values.detach() - v
        if variant == "sql":
            sparse = 1 + u / (2 * alpha)
            value_loss = (torch.where(sparse > 0, sparse**2, 0.0) + v / alpha).mean()
            weight = u.detach().clamp(min=0, max=100)
        else:
            z = (u / alpha).clamp(max=5)
            value_loss = np.exp(-max(z.max().item(), -1.0)) * (z.exp() + v / alpha).mean()
            weight = (10 * u.detach() / alpha).exp().clamp(max=100)
        critic_loss = ((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()
        mean = mlp({key: x for key, x in actor.items() if key != "log_std"}, batch.obs).tanh()
        actor_loss = -(weight * log_prob(mean, actor["log_std"], batch.act)).mean()
        shown = traced.watched[step - 1]
        assert_same({"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}, shown)
        for name, loss in {"actor": actor_loss, "critic": critic_loss, "value": value_loss}.items():
            opts[name].step(loss)
        polyak(critic_target, critic, 0.1)
        progress = torch.tensor(step / 6, dtype=torch.float32)  # as Adam counts its steps
        opts["actor"].lr = (1e-3 / 2 * (1 + torch.cos(torch.pi * progress))).double()
    for name, params in nets.items():
        assert_same(params, traced.end[name], name)


@pytest.mark.parametrize("variant", ["sql", "eql"])
def test_value_of_one_state(variant):
    """Where one state has many actions in the data, V is what makes the loss least, between the mean of Q and its
    largest: EQL's alpha log E exp(Q / alpha), SQL's where E max(1 + (Q - V) / (2 alpha), 0) is 1. Each loss trains its
    own network."""
    torch.manual_seed(0)
    nets = sql.Actor(5, 3), sql.Critic(5, 3), sql.value_mlp(5, 256, 256, 1), sql.Critic(5, 3)
    actor, critic, value, critic_target = nets
    batch = Batch(torch.ones(64, 5), torch.rand(64, 3) * 2 - 1, *torch.zeros(3, 64))
    batch = batch._replace(next_obs=batch.obs)
    critic_target.layers[-1].weight.data *= 20
    q = critic_target(batch.obs, batch.act).amin(0).detach()
    args = sql.Args(variant=variant, alpha_sql=0.1, alpha_eql=0.3, dropout=0.0)
    opt = torch.optim.Adam(value.parameters(), 3e-3)
    for _ in range(300):
        opt.zero_grad()
        sql.losses(args, batch, *nets)["value_loss"].backward()
        opt.step()
    v = value(batch.obs)[0].detach()
    assert q.mean() + 0.05 < v < q.max()
    if variant == "eql":
        assert v.item() == pytest.approx((0.3 * torch.logsumexp(q / 0.3, 0) - 0.3 * np.log(64)).item(), abs=0.02)
    else:
        assert (1 + (q - v) / 0.2).clamp(min=0).mean().item() == pytest.approx(1, abs=0.02)
    losses = sql.losses(args, batch, *nets)
    for name, own in zip(("actor_loss", "critic_loss", "value_loss"), nets):
        for net in nets:
            net.zero_grad()
        losses[name].backward(retain_graph=True)
        assert [net for net in nets if any(p.grad is not None for p in net.parameters())] == [own]
