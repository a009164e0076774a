"""SPOT's three parts against its paper (Wu et al. 2022): the VAE, TD3 with its density, and the phase that acts."""

import dataclasses

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

from algorithms import spot
from datasets import UserError, find_task, load
from results.run import Run

VALUES = dict(vae_steps=3, offline_steps=8, steps=20, batch_size=16, seed=3, gamma=0.9, tau=0.1, lr=1e-3, vae_lr=2e-4)
VALUES |= dict(policy_noise=0.4, noise_clip=0.3, policy_freq=3, expl_noise=0.7, beta=0.8, actor_lr=2e-3, lam=3.0)
MODES = [
    dict(cool=0.6, dropout=0.3, normalize=True, offline_share=0.25, buffer_size=100),
    dict(cool=0.0, dropout=0.0, normalize=False, buffer_size=9),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_update(mode, small, monkeypatch):
    """Three steps of the VAE, five of TD3 on the data, twenty that act, with other values than the defaults."""
    drop = lambda x, p: x * (torch.rand_like(x) >= p) / (1 - p) if p else x  # torch's own draws unseen
    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    args = arguments(spot, small, **VALUES | mode)
    traced = trace(spot, monkeypatch, args, task={"rew_shift": -2.0, "max_episode_steps": 15})

    obs, act, rew, next_obs, done = columns(small)
    mean, std = (obs.mean(0), obs.std(0) + 1e-3) if args.normalize else (0, 1)
    data = table((obs - mean) / std, act, rew - 2, (next_obs - mean) / std, done)
    torch.testing.assert_close(traced.rows[: len(data)], data, rtol=1e-9, atol=1e-9)
    assert len(traced.rows) == len(data) + min(args.buffer_size, 20)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "actor_target", "critic", "critic_target", "vae")}
    actor, actor_target, critic, critic_target, vae = nets.values()
    assert_same(actor, actor_target)
    assert_same(critic, critic_target)
    encoder, decoder = ({k: x for k, x in vae.items() if k.startswith(name)} for name in ("encoder", "decoder"))
    assert [len(x) for x in encoder.values()] == [750, 750, 750, 750, 12, 12] and len(encoder) + len(decoder) == 12
    critic_opt, actor_opt, vae_opt = Adam(critic, 1e-3), Adam(actor, 2e-3), Adam(vae, 2e-4)
    draws = (x for _, x in traced.random)
    dropped = lambda x: torch.where(next(draws) < 0.3, 0.0, x / 0.7)
    pi = lambda params, obs: mlp(params, obs, hidden=dropped if args.dropout else lambda x: x).tanh()

    def density_loss(obs, act):
        """-ELBO of a Gaussian decoder, up to a factor and a constant: both terms averaged over dimensions."""
        mu, log_std = mlp(encoder, torch.cat([obs, act], 1)).chunk(2, 1)
        code = torch.distributions.Normal(mu, log_std.exp())
        decoded = mlp(decoder, torch.cat([obs, mu + log_std.exp() * next(draws)], 1)).tanh()
        kl = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0))
        return ((decoded - act) ** 2).mean() + 0.8 * kl.mean()

    world = World(dataclasses.replace(load(str(small)).task, max_episode_steps=15), 3, mean, std, lambda rew: rew - 2)
    assert len(traced.batches) == len(traced.watched) == 28
    for step, (batch, watched) in enumerate(zip(traced.batches, traced.watched), 1):
        assert batch.obs.shape == (16, 11)
        lam = 3.0
        if step > 8:
            seen = world.look(step)
            world.act((mlp(actor, seen).tanh() + 0.7 * next(draws)).clamp(-1, 1).detach())
            new, lam = kept(world.rows, args.buffer_size), 3.0 * max(args.cool, 1 - (step - 8) / 20)
        if step > 8 and args.offline_share:
            assert are_rows_of(part(batch, slice(4)), data) and are_rows_of(part(batch, slice(4, 16)), new)
        else:
            assert are_rows_of(batch, torch.cat([data, new]) if step > 8 else data)
        if step <= 3:
            loss = density_loss(batch.obs, batch.act)
            vae_opt.step(loss)
            assert_same({"vae_loss": loss}, watched, f"step {step}")
            continue
        noise = (0.4 * next(draws)).clamp(-0.3, 0.3)
        next_act = (pi(actor_target, batch.next_obs) + noise).clamp(-1, 1)
        next_q = q_values(critic_target, batch.next_obs, next_act).min(0).values
        target = (batch.rew + 0.9 * (1 - batch.done) * next_q).detach()
        loss = ((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()
        critic_opt.step(loss)
        losses = {"critic_loss": loss}
        if step % 3 == 0:
            now = pi(actor, batch.obs)
            q = q_values(critic, batch.obs, now)[0]
            losses["vae_loss"] = density_loss(batch.obs, now)
            losses["actor_loss"] = -q.mean() / q.abs().mean().item() + lam * losses["vae_loss"]
            actor_opt.step(losses["actor_loss"])
            polyak(actor_target, actor, 0.1)
            polyak(critic_target, critic, 0.1)
        assert_same(losses, watched, f"step {step}")
    assert next(draws, None) is None
    for name, params in nets.items():
        assert_same(params, traced.end[name], name)
    torch.testing.assert_close(traced.end["buffer"]["rows"], kept(world.rows, args.buffer_size), rtol=1e-5, atol=1e-5)


def test_bounds_of_the_code():
    """log_std lies in [-4, 15]."""
    vae = spot.VAE(11, 3)
    with torch.no_grad():
        vae.encoder[-1].bias[6:9], vae.encoder[-1].bias[9:] = -1e3, 1e3
    log_std = vae(torch.randn(5, 11), torch.randn(5, 3))[1]
    assert log_std.min() == -4 and log_std.max() == 15 and log_std.shape == (5, 6)


def test_steps(small):
    """lam falls over --steps, which a resume may not change; the VAE leaves some of the offline phase."""
    args = arguments(spot, small, steps=10, batch_size=8)
    spot.train(args)
    with pytest.raises(UserError, match="Cannot resume .* with other arguments: steps was 10"):
        spot.train(dataclasses.replace(args, steps=20, resume=True))
    with pytest.raises(UserError, match="--vae-steps 30 must leave some of the --offline-steps 30"):
        spot.train(dataclasses.replace(args, vae_steps=30))


def test_tuned():
    """The most particular entry wins."""
    lam = {
        env: Run("algorithms/spot.py", spot.Args(env, device="cpu")).tuned(find_task(env), spot.TUNED).lam
        for env in ("hopper-medium", "walker2d-medium-expert", "antmaze-umaze", "antmaze-large-play", "pen-cloned")
    }
    assert list(lam.values()) == [0.1, 0.5, 0.25, 0.025, 1.0]
