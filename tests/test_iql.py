"""IQL's whole update against the paper's Algorithm 1 (Eq. 5 to 7), each loss with the networks before their steps."""

import pytest
import torch
from test_scripts import arguments
from update import Adam, assert_same, columns, episodes, leaves, mlp, polyak, q_values, table, trace

from algorithms import iql


@pytest.mark.parametrize("task", ["hopper-medium", "antmaze-umaze"])
def test_update(task, small, monkeypatch):
    """With dropout, and with weights that reach their bound. Locomotion's returns come to span 1000, AntMaze's stay.
    What the script takes in float32 even here: the expectile's two weights (exact for 0.75) and the schedule."""
    drop = lambda x, p: x * (torch.rand_like(x) >= p) / (1 - p)  # torch's own draws unseen
    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    changes = dict(lr=2e-4, gamma=0.9, tau=0.1, expectile=0.75, beta=100.0, dropout=0.3)
    args = arguments(iql, small, steps=8, batch_size=16, **changes)
    traced = trace(iql, monkeypatch, args, task={"name": task, "rew_shift": -2.0})

    obs, act, rew, next_obs, done = columns(small)
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    if task == "hopper-medium":
        returns = [rew[span].sum().item() for span in episodes(small)]
        rew = rew / (max(returns) - min(returns)) * 1000
    expected = table((obs - mean) / std, act, rew - 2, (next_obs - mean) / std, done)
    torch.testing.assert_close(traced.rows, expected, rtol=1e-9, atol=1e-9)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target", "value")}
    actor, critic, critic_target, value = nets.values()
    assert_same(critic, critic_target)
    assert [x.shape for x in value.values()] == [(256, 11), (256,), (256, 256), (256,), (1, 256), (1,)]
    log_std, mean_params = actor["log_std"], {key: x for key, x in actor.items() if key != "log_std"}
    opts = Adam(actor, 2e-4), Adam(critic, 2e-4), Adam(value, 2e-4)
    assert len(traced.batches) == 8 and {kind for kind, _ in traced.random} == {"rand_like"}
    draws, bounded = (noise for _, noise in traced.random), []
    for step, batch in enumerate(traced.batches, 1):
        assert batch.obs.shape == (16, 11)
        u = q_values(critic_target, batch.obs, batch.act).min(0).values.detach() - mlp(value, batch.obs)[:, 0]
        value_loss = (torch.where(u > 0, 0.75, 0.25) * u**2).mean()  # (Eq. 5)
        target = (batch.rew + 0.9 * (1 - batch.done) * mlp(value, batch.next_obs)[:, 0]).detach()
        critic_loss = ((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()  # (Eq. 6)
        mean = mlp(mean_params, batch.obs, hidden=lambda x: torch.where(next(draws) < 0.3, 0.0, x / 0.7)).tanh()
        log_pi = torch.distributions.Normal(mean, log_std.exp()).log_prob(batch.act).sum(1)
        weight = (100 * u.detach()).exp()
        bounded += (weight > 100).tolist()
        actor_loss = -(weight.clamp(max=100) * log_pi).mean()  # (Eq. 7)
        for opt, loss in zip(opts, (actor_loss, critic_loss, value_loss)):
            opt.step(loss)
        polyak(critic_target, critic, 0.1)
        progress = torch.tensor(step / 8, dtype=torch.float32)
        opts[0].lr = (1e-4 * (1 + torch.cos(torch.pi * progress))).double()
    assert any(bounded) and not all(bounded)
    for name, params in nets.items():
        assert_same(params, traced.end[name], name)
    first, second = traced.end["opt"]["param_groups"]
    assert (first["lr"], second["lr"]) == (opts[0].lr, 2e-4)
