"""AWAC's whole update against the paper's Algorithm 1, as far as it is offline (the actor's loss is Eq. 13)."""

import torch
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, mlp, polyak, q_values, table, trace

from algorithms import awac


def test_update(small, monkeypatch):
    """With so low a temperature that some weights reach their bound."""
    changes = dict(lr=1e-3, gamma=0.9, tau=0.1, lam=0.005)
    args = arguments(awac, small, steps=8, batch_size=16, **changes)
    traced = trace(awac, monkeypatch, args, task={"rew_shift": -2.0})

    obs, act, rew, next_obs, done = columns(small)
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    expected = table((obs - mean) / std, act, rew - 2, (next_obs - mean) / std, done)
    torch.testing.assert_close(traced.rows, expected, rtol=1e-9, atol=1e-9)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target")}
    actor, critic, critic_target = nets.values()
    assert_same(critic, critic_target)
    mean_params = {key: x for key, x in actor.items() if key != "log_std"}
    pi = lambda obs: torch.distributions.Normal(mlp(mean_params, obs), actor["log_std"].exp())
    drawn = lambda pi, noise: (pi.mean + pi.stddev * noise).clamp(-1, 1).detach()
    actor_opt, critic_opt = Adam(actor, 1e-3), Adam(critic, 1e-3)
    assert len(traced.batches) == 8 and [kind for kind, _ in traced.random] == ["randn_like"] * 16
    draws, bounded = (noise for _, noise in traced.random), []
    for batch in traced.batches:
        assert batch.obs.shape == (16, 11)
        next_act = drawn(pi(batch.next_obs), next(draws))
        next_q = q_values(critic_target, batch.next_obs, next_act).min(0).values
        target = (batch.rew + 0.9 * (1 - batch.done) * next_q).detach()
        critic_opt.step(((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum())

        now = pi(batch.obs)
        v = q_values(critic, batch.obs, drawn(now, next(draws))).min(0).values
        weight = ((q_values(critic, batch.obs, batch.act).min(0).values - v) / 0.005).exp().detach()
        bounded += (weight > 100).tolist()
        actor_opt.step(-(weight.clamp(max=100) * now.log_prob(batch.act).sum(1)).mean())  # (Eq. 13)
        polyak(critic_target, critic, 0.1)
    assert any(bounded) and not all(bounded)
    for name, params in nets.items():
        assert_same(params, traced.end[name], name)
