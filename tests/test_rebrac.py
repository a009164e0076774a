"""ReBRAC's whole update against the paper's: TD3+BC with layer norm in the critics and a penalty in each loss."""

import pytest
import torch
from test_scripts import arguments
from update import Adam, assert_same, columns, episodes, leaves, mlp, polyak, q_values, table, trace

from algorithms import rebrac


@pytest.mark.parametrize("task, scale", [("hopper-medium", 1), ("antmaze-umaze", 100)])
def test_update(task, scale, small, monkeypatch):
    """Eight steps with other values than the defaults; AntMaze's rewards count a hundredfold."""
    changes = dict(policy_noise=0.4, noise_clip=0.3, policy_freq=3, actor_weight=0.7, critic_weight=1.7)
    args = arguments(rebrac, small, steps=8, batch_size=16, gamma=0.9, tau=0.1, lr=2e-3, **changes)
    traced = trace(rebrac, monkeypatch, args, task={"name": task, "rew_shift": -1.0})

    obs, act, rew, next_obs, done = columns(small)
    next_act, kept = torch.zeros_like(act), torch.ones(len(act), dtype=bool)
    for span in episodes(small):
        next_act[span][:-1] = act[span][1:]
        kept[span.stop - 1] = done[span.stop - 1] == 1  # where it was cut, nobody knows the next action
    assert done.any() and (~kept).any()
    expected = table(obs, act, rew * scale, next_obs, done, next_act)[kept]
    torch.testing.assert_close(traced.rows, expected, rtol=1e-9, atol=1e-9)

    norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    q = lambda params, obs, act: q_values(params, obs, act, hidden=norm)
    nets = {name: leaves(traced.start[name]) for name in ("actor", "actor_target", "critic", "critic_target")}
    actor, actor_target, critic, critic_target = nets.values()
    assert_same(actor, actor_target)
    assert_same(critic, critic_target)
    actor_opt, critic_opt = Adam(actor, 2e-3), Adam(critic, 2e-3)
    assert len(traced.batches) == len(traced.random) == 8
    for step, (batch, (kind, noise)) in enumerate(zip(traced.batches, traced.random), 1):
        assert kind == "randn_like" and batch.obs.shape == (16, 11)
        pi = (mlp(actor_target, batch.next_obs).tanh() + (0.4 * noise).clamp(-0.3, 0.3)).clamp(-1, 1)
        next_q = q(critic_target, batch.next_obs, pi).min(0).values - 1.7 * ((pi - batch.next_act) ** 2).sum(1)
        target = (batch.rew + 0.9 * (1 - batch.done) * next_q).detach()
        critic_opt.step(((q(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum())
        if step % 3 == 0:
            pi = mlp(actor, batch.obs).tanh()
            values = q(critic, batch.obs, pi).min(0).values
            lam = 1 / values.abs().mean().item()
            actor_opt.step((0.7 * ((pi - batch.act) ** 2).sum(1) - lam * values).mean())
            polyak(actor_target, actor, 0.1)
            polyak(critic_target, critic, 0.1)
    for name, params in nets.items():
        assert_same(params, traced.end[name], name)
