"""TD3+BC's whole update against the paper's: Algorithm 1 of TD3 (Fujimoto et al. 2018) with Eq. 3 to 5 of TD3+BC."""

import torch
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, mlp, polyak, q_values, table, trace

from algorithms import td3_bc


def test_update(small, monkeypatch):
    """Eight steps with other values than the defaults, on rewards that a task shifts."""
    changes = dict(policy_noise=0.4, noise_clip=0.3, policy_freq=3, alpha=1.5, gamma=0.9, tau=0.1, lr=1e-3)
    args = arguments(td3_bc, small, steps=8, batch_size=16, **changes)
    traced = trace(td3_bc, monkeypatch, args, task={"rew_shift": -1.0})

    obs, act, rew, next_obs, done = columns(small)
    mean, std = obs.mean(0), obs.std(0) + 1e-3  # (Eq. 4)
    expected = table((obs - mean) / std, act, rew - 1, (next_obs - mean) / std, done)
    torch.testing.assert_close(traced.rows, expected, rtol=1e-9, atol=1e-9)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "actor_target", "critic_target")}
    actor, critic, actor_target, critic_target = nets.values()
    assert_same(actor, actor_target)
    assert_same(critic, critic_target)
    actor_opt, critic_opt = Adam(actor, 1e-3), Adam(critic, 1e-3)
    assert len(traced.batches) == len(traced.random) == 8
    for step, (batch, (kind, noise)) in enumerate(zip(traced.batches, traced.random), 1):
        assert kind == "randn_like" and batch.obs.shape == (16, 11)
        next_act = (mlp(actor_target, batch.next_obs).tanh() + (0.4 * noise).clamp(-0.3, 0.3)).clamp(-1, 1)
        next_q = q_values(critic_target, batch.next_obs, next_act).min(0).values
        target = (batch.rew + 0.9 * (1 - batch.done) * next_q).detach()
        critic_opt.step(((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum())
        if step % 3 == 0:
            pi = mlp(actor, batch.obs).tanh()
            q = q_values(critic, batch.obs, pi)[0]
            lam = 1.5 / q.abs().mean().item()  # (Eq. 5)
            actor_opt.step(-lam * q.mean() + ((pi - batch.act) ** 2).mean())  # (Eq. 3)
            polyak(actor_target, actor, 0.1)
            polyak(critic_target, critic, 0.1)
    for name, params in nets.items():
        assert_same(params, traced.end[name], name)
