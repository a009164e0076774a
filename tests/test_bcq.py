"""BCQ's losses worked out in NumPy, how it acts, and its whole update against the paper's Algorithm 1."""

import numpy as np
import pytest
import torch
from test_losses import array, forward, q_values
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, mlp, polyak, table, trace
from update import q_values as all_q

from algorithms import bcq
from datasets import Batch

B, O, A = 32, 5, 3


@pytest.fixture
def batch():
    torch.manual_seed(1)
    done = (torch.arange(B) % 4 == 0).float()
    return Batch(torch.randn(B, O), torch.rand(B, A) * 2 - 1, torch.randn(B), torch.randn(B, O), done)


@pytest.fixture
def actor():
    """Some of its actions reach the bounds, where a perturbation is cut."""
    actor = bcq.Actor(O, A, phi=0.3)
    actor.vae.decoder[-1].weight.data *= 50
    return actor


def fixed_noise(monkeypatch, rows):
    noise = torch.randn(rows, 2 * A, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.view(x.shape))
    return array(noise)


def proposal(actor, obs, noise):
    """One perturbed action for each obs, and whether it was cut."""
    act = np.tanh(forward(actor.vae.decoder, np.hstack([obs, np.clip(noise, -0.5, 0.5)])))
    act = act + 0.3 * np.tanh(forward(actor.perturb, np.hstack([obs, act])))
    return np.clip(act, -1, 1), np.abs(act) > 1


@pytest.mark.parametrize("shift, bounds", [(0, (-1, 1)), (-6, (-4, -4)), (17, (15, 15))])
def test_vae_loss(shift, bounds, batch, actor, monkeypatch):
    """The negative ELBO, with the authors' weights; also where the deviation is at its bounds."""
    encoder = actor.vae.encoder
    encoder[-1].bias.data[2 * A :] += shift
    noise = fixed_noise(monkeypatch, B)
    obs, act, *_ = map(array, batch)
    mean, log_std = np.split(forward(encoder, np.hstack([obs, act])), 2, -1)
    std = np.exp(np.clip(log_std, -4, 15))
    assert np.exp(bounds[0]) <= std.min() and std.max() <= np.exp(bounds[1])
    decoded = np.tanh(forward(actor.vae.decoder, np.hstack([obs, mean + std * noise])))
    kl = np.log(1 / std) + (std**2 + mean**2) / 2 - 1 / 2
    expected = np.mean((decoded - act) ** 2) + 0.5 * np.mean(kl)
    assert bcq.vae_loss(batch, encoder, actor.vae.decoder).item() == pytest.approx(expected, rel=1e-5)


def test_critic_loss(batch, actor, monkeypatch):
    """Of ten actions at the next observation the best, by 0.75 of the lower and 0.25 of the higher Q."""
    critic, critic_target = bcq.Critic(O, A), bcq.Critic(O, A)
    noise = fixed_noise(monkeypatch, 10 * B).reshape(10, B, 2 * A)
    obs, act, rew, next_obs, done = map(array, batch)
    best, cut = np.full(B, -np.inf), []
    for k in range(10):
        next_act, outside = proposal(actor, next_obs, noise[k])
        q = q_values(critic_target, next_obs, next_act)
        best = np.maximum(best, 0.75 * q.min(0) + 0.25 * q.max(0))
        cut.append(outside)
    assert 0 < np.mean(cut) < 1
    target = rew + 0.99 * (1 - done) * best
    expected = sum(np.mean((q - target) ** 2) for q in q_values(critic, obs, act))
    args = bcq.Args(phi=0.3)
    loss = bcq.critic_loss(args, batch, critic, critic_target, actor.perturb, actor.vae.decoder)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_actor_loss(batch, actor, monkeypatch):
    critic = bcq.Critic(O, A)
    noise = fixed_noise(monkeypatch, B)
    obs = array(batch.obs)
    expected = -np.mean(q_values(critic, obs, proposal(actor, obs, noise)[0])[0])
    loss = bcq.actor_loss(bcq.Args(phi=0.3), batch, actor.perturb, critic, actor.vae.decoder)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in actor.vae.parameters())
    assert all(p.grad is not None for p in actor.perturb.parameters())


def test_policy(batch, actor):
    """The best by Q_1 of the actions of a hundred latents, clipped normal ones; the same at each call."""
    obs, z = array(batch.obs), array(actor.z)
    assert z.shape == (100, 2 * A) and np.abs(z).max() == 0.5 and np.std(z) > 0.3
    acts = np.stack([proposal(actor, obs, np.tile(latent, (B, 1)))[0] for latent in z])  # (100, B, A)
    best = np.argmax([q_values(actor.critic, obs, act)[0] for act in acts], 0)
    assert len(np.unique(best)) > 1
    with torch.no_grad():
        chosen, again = bcq.policy(batch.obs, actor), bcq.policy(batch.obs, actor)
    np.testing.assert_allclose(array(chosen), acts[best, np.arange(B)], rtol=1e-4, atol=1e-5)
    assert torch.equal(chosen, again)


def test_update(small, monkeypatch):
    """Four steps with other values than the defaults, on rewards that a task shifts."""
    changes = dict(n_actions=3, lam=0.6, phi=0.3, gamma=0.9, tau=0.1, lr=2e-3)
    args = arguments(bcq, small, steps=4, batch_size=16, **changes)
    traced = trace(bcq, monkeypatch, args, task={"rew_shift": -1.0})

    obs, act, rew, next_obs, done = columns(small)
    torch.testing.assert_close(traced.rows, table(obs, act, rew - 1, next_obs, done), rtol=1e-9, atol=1e-9)

    start = traced.start["actor"]
    encoder, decoder, perturb, critic = (
        leaves(start, name) for name in ("vae.encoder", "vae.decoder", "perturb", "critic")
    )
    perturb_target, critic_target = (leaves(traced.start[name]) for name in ("perturb_target", "critic_target"))
    assert start["phi"] == 0.3 and start["z"].shape == (100, 6)
    assert [len(x) for x in critic.values()] == [2] * 6 and critic["critic.layers.2.weight"].shape == (2, 300, 1)
    vae_opt, critic_opt, actor_opt = (Adam(params, 2e-3) for params in (encoder | decoder, critic, perturb))

    def decoded(obs, z):
        return mlp(decoder, torch.cat([obs, z], 1)).tanh()

    def moved(params, obs, act):
        return (act + 0.3 * mlp(params, torch.cat([obs, act], 1)).tanh()).clamp(-1, 1)

    draws = iter(traced.random)
    assert len(traced.batches) == 4 and {kind for kind, _ in traced.random} == {"randn_like"}
    for step, batch in enumerate(traced.batches):
        assert batch.obs.shape == (16, 11)
        (_, noise), (_, next_noise) = next(draws), next(draws)
        mean, log_std = mlp(encoder, torch.cat([batch.obs, batch.act], 1)).chunk(2, 1)
        std = log_std.clamp(-4, 15).exp()
        kl = -0.5 * (1 + torch.log(std**2) - mean**2 - std**2).mean()
        vae_loss = ((decoded(batch.obs, mean + std * noise) - batch.act) ** 2).mean() + 0.5 * kl
        best = []
        for b in range(16):  # one state after the other
            state = batch.next_obs[b].repeat(3, 1)
            next_act = moved(perturb_target, state, decoded(state, next_noise[b::16].clamp(-0.5, 0.5)))
            q1, q2 = all_q(critic_target, state, next_act)
            best.append((0.6 * torch.minimum(q1, q2) + 0.4 * torch.maximum(q1, q2)).max())
        target = (batch.rew + 0.9 * (1 - batch.done) * torch.stack(best)).detach()
        critic_loss = ((all_q(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()
        vae_opt.step(vae_loss)
        critic_opt.step(critic_loss)
        (_, noise) = next(draws)
        pi = moved(perturb, batch.obs, decoded(batch.obs, noise.clamp(-0.5, 0.5)).detach())
        actor_loss = -all_q(critic, batch.obs, pi)[0].mean()
        actor_opt.step(actor_loss)
        polyak(perturb_target, perturb, 0.1)
        polyak(critic_target, critic, 0.1)
        losses = {"vae_loss": vae_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}
        assert_same(losses, traced.watched[step], "losses")
    assert next(draws, None) is None
    assert_same(perturb_target, traced.end["perturb_target"])
    assert_same(critic_target, traced.end["critic_target"])
    kept = {name: start[name] for name in ("z", "phi")}
    assert_same(encoder | decoder | perturb | critic | kept, dict(traced.end["actor"]), "actor")
