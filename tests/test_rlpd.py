"""RLPD against Algorithm 1 of its paper (Ball et al. 2023): acting, symmetric batches, utd updates of each step."""

import dataclasses

import pytest
import torch
from test_scripts import arguments
from update import Adam, World, are_rows_of, assert_same, columns, kept, leaves, part, polyak, squashed, table, trace

from algorithms import rlpd
from datasets import UserError, load

MODES = [
    dict(utd=3, n_critics=5, n_min=2, critic_layers=2, backup_entropy=True, buffer_size=9),
    dict(utd=1, n_critics=3, n_min=1, critic_layers=1, backup_entropy=False, buffer_size=100),
]


def q_values(params, obs, act, layers):
    """All N Q-functions, one after the other: (N, B). Layer norm (Ba et al. 2016), then ReLU."""
    found = []
    for n in range(len(params["layers.0.weight"])):
        x = torch.cat([obs, act], 1)
        for i in range(layers + 1):
            x = x @ params[f"layers.{i}.weight"][n] + params[f"layers.{i}.bias"][n]
            if i < layers:
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
                x = (x * params["scale"][i, n] + params["shift"][i, n]).clamp(min=0)
        found.append(x[:, 0])
    return torch.stack(found)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_update(mode, small, monkeypatch):
    """Thirty steps, twenty at random, with other values than the defaults."""
    changes = dict(seed=3, start_steps=20, gamma=0.9, tau=0.1, lr=1e-3, offline_share=0.25)
    args = arguments(rlpd, small, steps=30, batch_size=16, **changes | mode)
    traced = trace(rlpd, monkeypatch, args, task={"rew_shift": -2.0, "max_episode_steps": 12})

    obs, act, rew, next_obs, done = columns(small)
    data = table(obs, act, rew - 2, next_obs, done)
    torch.testing.assert_close(traced.rows[: len(data)], data, rtol=1e-9, atol=1e-9)
    assert len(traced.rows) == len(data) + min(args.buffer_size, 30)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target")}
    actor, critic, critic_target = nets.values()
    assert_same(critic, critic_target)
    assert len(critic["layers.0.weight"]) == args.n_critics and len(critic["scale"]) == args.critic_layers
    log_alpha = traced.start["log_alpha"].requires_grad_()
    assert log_alpha.item() == 0
    critic_opt, actor_opt, alpha_opt = (Adam(params, 1e-3) for params in (critic, actor, {"": log_alpha}))
    world = World(dataclasses.replace(load(str(small)).task, max_episode_steps=12), 3, 0, 1, lambda rew: rew - 2)
    draws, batches, losses = (x for _, x in traced.random), iter(traced.batches), {"alpha": log_alpha.detach().exp()}
    assert (len(traced.watched), len(traced.batches)) == (30, 10)
    for step, watched in enumerate(traced.watched, 1):
        seen = world.look(step)
        world.act(2 * next(draws)[None] - 1 if step <= 20 else squashed(actor, seen, next(draws)[0])[0].detach())
        if step > 20:
            new, both, alpha = kept(world.rows, args.buffer_size), next(batches), log_alpha.detach().exp()
            assert both.obs.shape == ((3, 16, 11) if args.utd == 3 else (16, 11))
            noise = next(draws)
            for i in range(args.utd):
                batch = part(both, i) if args.utd > 1 else both
                assert are_rows_of(part(batch, slice(4)), data) and are_rows_of(part(batch, slice(4, 16)), new)
                next_act, next_log_prob = squashed(actor, batch.next_obs, noise[i])
                chosen = next(draws)[: args.n_min]
                next_q = q_values(critic_target, batch.next_obs, next_act, args.critic_layers)[chosen].min(0).values
                if args.backup_entropy:
                    next_q = next_q - alpha * next_log_prob
                target = (batch.rew + 0.9 * (1 - batch.done) * next_q).detach()
                q = q_values(critic, batch.obs, batch.act, args.critic_layers)
                critic_loss = ((q - target) ** 2).mean(1).sum()
                critic_opt.step(critic_loss)
                polyak(critic_target, critic, 0.1)
            pi, log_prob = squashed(actor, batch.obs, next(draws))
            actor_loss = (alpha * log_prob - q_values(critic, batch.obs, pi, args.critic_layers).mean(0)).mean()
            actor_opt.step(actor_loss)
            alpha_opt.step(log_alpha.exp() * (1.5 - log_prob.detach().mean()))  # Hopper has three actions
            losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "alpha": alpha}
        assert_same(losses, watched, f"step {step}")
    assert next(draws, None) is None and next(batches, None) is None
    for name, params in (nets | {"log_alpha": log_alpha}).items():
        assert_same(params, traced.end[name], name)
    torch.testing.assert_close(traced.end["buffer"]["rows"], new, rtol=1e-6, atol=1e-6)


def test_bad_arguments(small):
    with pytest.raises(UserError, match="--n-min 4 are more than the --n-critics 3"):
        rlpd.train(arguments(rlpd, small, n_min=4, n_critics=3))
