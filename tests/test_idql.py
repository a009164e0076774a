"""IDQL's diffusion against closed forms, and its whole update: IQL's, with the loss of Ho et al. 2020."""

import math

import numpy as np
import pytest
import torch
from test_scripts import arguments
from update import Adam, assert_same, columns, episodes, leaves, mlp, polyak, q_values, table, trace

from algorithms import idql


def mish(x):
    """Misra 2019: x tanh(log(1 + exp x))."""
    return x * torch.tanh(torch.log1p(torch.exp(x)))


def denoise(params, obs, act, t, drop=lambda x: x):
    """The authors' network: learned Fourier features of t, then three blocks with a norm before each."""
    p = lambda name, x: x @ params[f"{name}.weight"].T + params[f"{name}.bias"]
    angle = 2 * torch.pi * t * params["frequencies"][0]
    time = p("time.2", mish(p("time.0", torch.cat([angle.cos(), angle.sin()], 1))))
    x = p("first", torch.cat([act, obs, time], 1))
    for i in range(3):
        y = drop(x)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        y = y * params[f"blocks.{i}.0.weight"] + params[f"blocks.{i}.0.bias"]
        x = x + p(f"blocks.{i}.3", mish(p(f"blocks.{i}.1", y)))
    return p("last", mish(x))


def schedule(T=5):
    """The variance-preserving SDE from 0.1 to 10 (Song et al. 2021) in T steps: b_s, and what is left of an action."""
    edges = np.arange(T + 1) / T
    left = np.exp(-0.1 * edges - 0.5 * (10 - 0.1) * edges**2)  # exp of minus the integral of 0.1 + 9.9 s
    return 1 - left[1:] / left[:-1], left[1:]


def test_schedule():
    betas, alphas = schedule()
    np.testing.assert_allclose(idql.BETAS, betas, rtol=1e-12)
    np.testing.assert_allclose(idql.ALPHAS, alphas, rtol=1e-12)
    assert alphas[-1] < 0.01  # what comes out at the end is noise


@pytest.mark.parametrize("task", ["hopper-medium", "antmaze-umaze"])
def test_update(task, small, monkeypatch):
    """With dropout, and a clone's average that follows faster. Locomotion's returns are rescaled, AntMaze's are not."""
    drop = lambda x, p: x * (torch.rand_like(x) >= p) / (1 - p)  # torch's own draws unseen
    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    changes = dict(lr=2e-4, gamma=0.9, tau=0.1, expectile=0.75, dropout=0.3, actor_tau=0.2)
    args = arguments(idql, small, steps=3, batch_size=16, **changes)
    traced = trace(idql, monkeypatch, args, task={"name": task, "rew_shift": -2.0})

    obs, act, rew, next_obs, done = columns(small)
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    if task == "hopper-medium":
        returns = [rew[span].sum().item() for span in episodes(small)]
        rew = rew / (max(returns) - min(returns)) * 1000
    expected = table((obs - mean) / std, act, rew - 2, (next_obs - mean) / std, done)
    torch.testing.assert_close(traced.rows, expected, rtol=1e-9, atol=1e-9)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "clone", "critic", "value")}
    actor, clone, critic, value = nets.values()
    average, critic_target = (
        {key.removeprefix(part): x for key, x in actor.items() if key.startswith(part)}
        for part in ("clone.", "critic.")
    )
    assert_same(average, clone)
    assert_same(critic_target, critic)
    assert [x.shape for x in value.values()] == [(256, 11), (256,), (256, 256), (256,), (1, 256), (1,)]
    assert len(average) + len(critic_target) == len(actor)
    opts = Adam(clone, 2e-4, decay=1e-4), Adam(critic, 2e-4), Adam(value, 2e-4)
    alphas = torch.from_numpy(schedule()[1])
    draws = (x for _, x in traced.random)
    for step, (batch, watched) in enumerate(zip(traced.batches, traced.watched), 1):
        t, noise = (5 * next(draws)).floor().long()[:, None], next(draws)
        assert t.shape == (16, 1) and noise.shape == (16, 3)
        u = q_values(critic_target, batch.obs, batch.act).min(0).values.detach() - mlp(value, batch.obs)[:, 0]
        value_loss = (torch.where(u > 0, 0.75, 0.25) * u**2).mean()
        target = (batch.rew + 0.9 * (1 - batch.done) * mlp(value, batch.next_obs)[:, 0]).detach()
        critic_loss = ((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()
        noisy = alphas[t].sqrt() * batch.act + (1 - alphas[t]).sqrt() * noise
        guess = denoise(clone, batch.obs, noisy, t, lambda x: torch.where(next(draws) < 0.3, 0.0, x / 0.7))
        actor_loss = ((guess - noise) ** 2).sum(1).mean()
        for opt, loss in zip(opts, (actor_loss, critic_loss, value_loss)):
            opt.step(loss)
        assert_same(
            {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}, watched, rtol=1e-7
        )
        polyak(critic_target, critic, 0.1)
        polyak(average, clone, 0.2)
        progress = torch.tensor(step / 3, dtype=torch.float32)
        opts[0].lr = (1e-4 * (1 + torch.cos(torch.pi * progress))).double()
    assert next(draws, None) is None and len(traced.batches) == 3
    for name, params in nets.items():
        if name in ("critic", "value"):
            assert_same(params, traced.end[name], name)
            continue
        # Some weights of the clone have gradients so small that Adam makes rounding 2e4 times as large, step by step.
        off = torch.cat([(x - traced.end[name][key]).detach().abs().flatten() for key, x in params.items()])
        assert off.max() < 2e-6 and (off > 1e-10).double().mean() < 0.02


def test_the_best_sample_acts(monkeypatch):
    """Against samples drawn step by step from the posterior of Ho et al. 2020 (Eq. 11), and the lower of two Q's."""
    torch.manual_seed(0)
    actor, obs = idql.Actor(4, 2, n_samples=3).requires_grad_(False), torch.randn(5, 4)
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **options: drawn.append(randn(*size, **options)) or drawn[-1])
    act = idql.policy(obs, actor)
    betas, alphas = schedule()
    draws, clone = iter(drawn), dict(actor.clone.named_parameters())
    x, many = next(draws), obs.repeat(3, 1)
    for t in reversed(range(5)):
        noise = denoise(clone, many, x, torch.full((15, 1), float(t)))
        x = (x - betas[t] / math.sqrt(1 - alphas[t]) * noise) / math.sqrt(1 - betas[t])
        x = (x + math.sqrt(betas[t]) * next(draws) if t > 0 else x).clamp(-1, 1)
    q = q_values(dict(actor.critic.named_parameters()), many, x).min(0).values.view(3, 5)
    expected = torch.stack([x.view(3, 5, 2)[q[:, i].argmax(), i] for i in range(5)])
    torch.testing.assert_close(act, expected, rtol=1e-4, atol=1e-5)
    assert next(draws, None) is None and len(set(q.argmax(0).tolist())) > 1


def test_sampling_of_a_mixture(monkeypatch):
    """With the denoiser that a mixture of two Gaussians has in closed form. A hundred steps give the mixture. The five
    of the paper give both modes, narrower, and leave one sample of seven between them, where data hardly are."""
    torch.manual_seed(0)
    modes, std = torch.tensor([[0.6, 0.6], [-0.6, -0.6]]), 0.15

    def denoiser(obs, act, t):
        a = torch.tensor(idql.ALPHAS)[t.long()]  # (B, 1)
        variance = a * std**2 + 1 - a
        off = act[:, None] - a[:, None].sqrt() * modes  # (B, 2, 2), from each mode
        weight = (-(off**2).sum(-1) / (2 * variance)).softmax(1)  # (B, 2), that it is of this mode
        return (1 - a).sqrt() / variance * (weight[..., None] * off).sum(1)

    for T, most, near in ((5, 0.16, 0.08), (100, 0.02, 0.02)):
        monkeypatch.setattr(idql, "T", T)
        for name, values in zip(("BETAS", "ALPHAS"), schedule(T)):
            monkeypatch.setattr(idql, name, values.tolist())
        made = idql.sample(torch.zeros(4000, 1), 2, denoiser)
        between = made.abs().min(1).values < 0.2
        own = made[(made[:, 0] > 0) & ~between]
        assert between.float().mean() < most
        np.testing.assert_allclose(len(own) / (~between).sum(), 0.5, atol=0.05)
        np.testing.assert_allclose(own.mean(0), modes[0], atol=near)
        np.testing.assert_allclose(own.std(0), [std, std], atol=near)
