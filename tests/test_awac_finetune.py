"""AWAC's two phases against Algorithm 1 of its paper (the actor's loss is Eq. 13): the second acts, too."""

import pytest
import torch
from test_scripts import arguments
from update import (
    Adam,
    World,
    are_rows_of,
    assert_same,
    columns,
    kept,
    leaves,
    mlp,
    part,
    polyak,
    q_values,
    table,
    trace,
)

from algorithms import awac, awac_finetune
from datasets import load


@pytest.mark.parametrize("share, size", [(0.25, 100), (None, 9)])
def test_update(share, size, small, monkeypatch):
    """Five steps on the data and twenty-five that act, of several episodes, with other values than the defaults and so
    low a temperature that some weights reach their bound. New rewards are as those of the data."""
    changes = dict(lr=1e-3, gamma=0.9, tau=0.1, lam=0.005, seed=3, offline_steps=5, buffer_size=size)
    args = arguments(awac_finetune, small, steps=25, batch_size=16, offline_share=share, **changes)
    traced = trace(awac_finetune, monkeypatch, args, task={"rew_shift": -2.0})

    obs, act, rew, next_obs, done = columns(small)
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    data = table((obs - mean) / std, act, rew - 2, (next_obs - mean) / std, done)
    torch.testing.assert_close(traced.rows[: len(data)], data, rtol=1e-9, atol=1e-9)
    assert len(traced.rows) == len(data) + min(size, 25)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target")}
    actor, critic, critic_target = nets.values()
    assert_same(critic, critic_target)
    mean_params = {key: x for key, x in actor.items() if key != "log_std"}
    pi = lambda obs: torch.distributions.Normal(mlp(mean_params, obs), actor["log_std"].exp())
    drawn = lambda pi, noise: (pi.mean + pi.stddev * noise).clamp(-1, 1).detach()
    actor_opt, critic_opt = Adam(actor, 1e-3), Adam(critic, 1e-3)
    world = World(load(str(small)).task, 3, mean, std, lambda rew: rew - 2)
    assert len(traced.batches) == 30 and [kind for kind, _ in traced.random] == ["randn_like"] * (2 * 30 + 25)
    draws, bounded, ends = (noise for _, noise in traced.random), [], 0
    for step, (batch, watched) in enumerate(zip(traced.batches, traced.watched), 1):
        assert batch.obs.shape == (16, 11)
        if step > 5:
            world.act(drawn(pi(world.look(step)), next(draws)))
            ends += world.over
            new = kept(world.rows, size)
            if share is None:
                assert are_rows_of(batch, torch.cat([data, new]))
            else:
                assert are_rows_of(part(batch, slice(4)), data) and are_rows_of(part(batch, slice(4, 16)), new)
        else:
            assert are_rows_of(batch, data)
        next_act = drawn(pi(batch.next_obs), next(draws))
        next_q = q_values(critic_target, batch.next_obs, next_act).min(0).values
        target = (batch.rew + 0.9 * (1 - batch.done) * next_q).detach()
        critic_loss = ((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()
        critic_opt.step(critic_loss)

        now = pi(batch.obs)
        v = q_values(critic, batch.obs, drawn(now, next(draws))).min(0).values
        weight = ((q_values(critic, batch.obs, batch.act).min(0).values - v) / 0.005).exp().detach()
        bounded += (weight > 100).tolist()
        actor_loss = -(weight.clamp(max=100) * now.log_prob(batch.act).sum(1)).mean()  # (Eq. 13)
        actor_opt.step(actor_loss)
        polyak(critic_target, critic, 0.1)
        assert_same({"critic_loss": critic_loss, "actor_loss": actor_loss}, watched, f"step {step}")
    assert any(bounded) and not all(bounded) and ends
    for name, params in nets.items():
        assert_same(params, traced.end[name], name)
    torch.testing.assert_close(traced.end["buffer"]["rows"], kept(world.rows, size), rtol=1e-5, atol=1e-5)


def test_losses_are_awacs(small):
    """On equal batches, networks and noise, to the bit."""
    batch = load(str(small)).sample(32)
    args = arguments(awac, small, lam=0.5)
    torch.manual_seed(0)
    actor, critic, target = awac.Actor(11, 3), awac.Critic(11, 3), awac.Critic(11, 3)
    found = []
    for script in (awac, awac_finetune):
        torch.manual_seed(1)
        losses = script.critic_loss(args, batch, critic, target, actor), script.actor_loss(args, batch, actor, critic)
        found.append(torch.stack(losses))
    assert torch.equal(*found)
