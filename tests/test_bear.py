"""BEAR's losses worked out in NumPy, its VAE's in test_bcq.py; how it acts; its whole update against its authors' later
code."""

import itertools

import numpy as np
import pytest
import torch
from test_losses import array, forward, q_values
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, mlp, polyak, table, trace
from update import q_values as all_q

from algorithms import bear
from datasets import Batch, UserError

B, O, A = 32, 5, 3


@pytest.fixture
def batch():
    torch.manual_seed(1)
    done = (torch.arange(B) % 4 == 0).float()
    return Batch(torch.randn(B, O), torch.rand(B, A) * 2 - 1, torch.randn(B), torch.randn(B, O), done)


@pytest.fixture
def actor():
    """With deviations that reach both bounds."""
    actor = bear.Actor(O, A)
    actor.pi[-1].bias.data[A:] += torch.tensor([-6.0, 0.0, 3.0])
    return actor


def fixed_noise(monkeypatch):
    """What randn_like gives from now on, in order."""
    drawn, generator = [], torch.Generator().manual_seed(2)

    def draw(x):
        drawn.append(torch.randn(x.shape, generator=generator))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn_like", draw)
    return drawn


def raw(actor, obs, noise):
    """Actions before the tanh."""
    mean, log_std = np.split(forward(actor.pi, obs), 2, -1)
    assert log_std[:, 0].max() < -5 and log_std[:, 2].min() > 2
    return mean + np.exp(np.clip(log_std, -5, 2)) * noise


def mmd_of(kernel, sigma, x, y):
    """Of two lists of actions at one state, pair by pair."""

    def mean(x, y):
        norm = (lambda d: np.sum(np.abs(d))) if kernel == "laplacian" else (lambda d: np.sum(d**2))
        return np.mean([np.exp(-norm(a - b) / (2 * sigma)) for a, b in itertools.product(x, y)])

    return np.sqrt(mean(x, x) + mean(y, y) - 2 * mean(x, y) + 1e-6)


@pytest.mark.parametrize("kernel", ["laplacian", "gaussian"])
def test_mmd(kernel):
    """By hand for one action each: sqrt(2 - 2 k); and pair by pair."""
    args = bear.Args(kernel=kernel, sigma=2.0)
    x, y = torch.tensor([[[0.0, 3.0]]]), torch.tensor([[[1.0, 1.0]]])  # |d|_1 = 3, |d|_2^2 = 5
    k = np.exp(-{"laplacian": 3, "gaussian": 5}[kernel] / 4)
    assert bear.mmd(args, x, y).item() == pytest.approx(np.sqrt(2 - 2 * k), rel=1e-5)
    assert bear.mmd(args, x, x).item() == pytest.approx(1e-3, rel=1e-3)
    torch.manual_seed(0)
    x, y = torch.randn(4, B, A), 2 * torch.randn(4, B, A)
    expected = [mmd_of(kernel, 2.0, array(x[:, b]), array(y[:, b])) for b in range(B)]
    np.testing.assert_allclose(array(bear.mmd(args, x, y)), expected, rtol=1e-5)


def test_critic_loss(batch, actor, monkeypatch):
    critic, critic_target, noise = bear.Critic(O, A), bear.Critic(O, A), fixed_noise(monkeypatch)
    loss = bear.critic_loss(bear.Args(), batch, critic, critic_target, actor.pi)
    obs, act, rew, next_obs, done = map(array, batch)
    best = np.full(B, -np.inf)
    assert len(noise) == 1 and len(noise[0]) == 10
    for each in array(noise[0]):
        q = q_values(critic_target, next_obs, np.tanh(raw(actor, next_obs, each)))
        best = np.maximum(best, 0.75 * q.min(0) + 0.25 * q.max(0))
    target = rew + 0.99 * (1 - done) * best
    expected = sum(np.mean((q - target) ** 2) for q in q_values(critic, obs, act))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("heeds_q", [False, True])
@pytest.mark.parametrize("kernel", ["laplacian", "gaussian"])
def test_actor_loss(kernel, heeds_q, batch, actor, monkeypatch):
    """The first of the policy's four actions is what the Q-functions are asked about."""
    decoder, critic, noise = bear.VAE(O, A).decoder, bear.Critic(O, A), fixed_noise(monkeypatch)
    args = bear.Args(kernel=kernel, sigma=20.0, threshold=0.1)
    log_alpha = torch.tensor(0.7, requires_grad=True)
    loss, gap = bear.actor_loss(args, heeds_q, batch, log_alpha, actor.pi, critic, decoder)
    obs = array(batch.obs)
    z, eps = np.clip(array(noise[0]).reshape(4, B, 2 * A), -0.5, 0.5), array(noise[1])
    assert eps.shape == (4, B, A)
    theirs = np.stack([forward(decoder, np.hstack([obs, each])) for each in z])
    ours = np.stack([raw(actor, obs, each) for each in eps])
    above = np.mean([mmd_of(kernel, 20.0, ours[:, b], theirs[:, b]) for b in range(B)]) - 0.1
    expected = np.exp(0.7) * above
    if heeds_q:
        expected -= np.mean(q_values(critic, obs, np.tanh(ours[0])).min(0))
    assert (loss.item(), gap.item()) == pytest.approx((expected, above), rel=1e-5)
    loss.backward()
    assert log_alpha.grad is None and all(p.grad is None for p in decoder.parameters())
    assert all(p.grad is not None for p in actor.pi.parameters())
    bear.alpha_loss(log_alpha, gap).backward()  # falls where the MMD is above: alpha grows
    assert log_alpha.grad.item() == pytest.approx(-np.exp(0.7) * above, rel=1e-5)


def test_policy(batch, actor):
    """The best by Q_1 of the actions of a hundred noises; the same at each call."""
    obs, noise = array(batch.obs), array(actor.noise)
    assert noise.shape == (100, 1, A) and 0.9 < np.std(noise) < 1.1
    acts = np.stack([np.tanh(raw(actor, obs, each)) for each in noise])  # (100, B, A)
    best = np.argmax([q_values(actor.critic, obs, act)[0] for act in acts], 0)
    assert len(np.unique(best)) > 1
    with torch.no_grad():
        chosen, again = bear.policy(batch.obs, actor), bear.policy(batch.obs, actor)
    np.testing.assert_allclose(array(chosen), acts[best, np.arange(B)], rtol=1e-4, atol=1e-5)
    assert torch.equal(chosen, again)


def test_bad_sigma(small):
    with pytest.raises(UserError, match=r"--sigma must be positive, not -2\.0"):
        bear.train(arguments(bear, small, sigma=-2.0))


@pytest.mark.parametrize("kernel, threshold, end", [("laplacian", 0.01, 10), ("gaussian", 10.0, -5)])
def test_update(kernel, threshold, end, small, monkeypatch):
    """Five steps, of which two warm up; alpha reaches its upper bound, or its lower one."""
    changes = dict(n_actions=3, lam=0.6, n_mmd=2, gamma=0.9, tau=0.1, warmup=2, kernel=kernel, threshold=threshold)
    changes |= dict(lr=2e-3, actor_lr=1e-3, alpha_lr=4.0, sigma=0.5)
    args = arguments(bear, small, steps=5, batch_size=16, **changes)
    traced = trace(bear, monkeypatch, args, task={"rew_shift": -1.0})

    obs, act, rew, next_obs, done = columns(small)
    torch.testing.assert_close(traced.rows, table(obs, act, rew - 1, next_obs, done), rtol=1e-9, atol=1e-9)

    pi, critic = (leaves(traced.start["actor"], name) for name in ("pi", "critic"))
    encoder, decoder = (leaves(traced.start["vae"], name) for name in ("encoder", "decoder"))
    critic_target = leaves(traced.start["critic_target"])
    log_alpha = {"log_alpha": traced.start["log_alpha"].clone().requires_grad_()}
    assert log_alpha["log_alpha"] == 0 and [x.shape[-1] for x in critic.values()] == [256] * 4 + [1] * 2
    assert [len(x) for x in pi.values()] == [256] * 4 + [6] * 2
    vae_opt, critic_opt, pi_opt = Adam(encoder | decoder, 2e-3), Adam(critic, 2e-3), Adam(pi, 1e-3)
    alpha_opt = Adam(log_alpha, 4.0)

    def sampled(obs, noise):
        mean, log_std = mlp(pi, obs).chunk(2, -1)
        return mean + log_std.clamp(-5, 2).exp() * noise

    def mean_kernel(x, y):
        total = 0
        for a, b in itertools.product(x, y):
            distance = (a - b).abs() if kernel == "laplacian" else (a - b) ** 2
            total = total + torch.exp(-distance.sum(1))
        return total / (len(x) * len(y))

    draws, alphas = iter(traced.random), []
    assert len(traced.batches) == 5 and {kind for kind, _ in traced.random} == {"randn_like"}
    for step, batch in enumerate(traced.batches, 1):
        assert batch.obs.shape == (16, 11)
        mean, log_std = mlp(encoder, torch.cat([batch.obs, batch.act], 1)).chunk(2, 1)
        std = log_std.clamp(-4, 15).exp()
        kl = -0.5 * (1 + torch.log(std**2) - mean**2 - std**2).mean()
        z = mean + std * next(draws)[1]
        vae_loss = ((mlp(decoder, torch.cat([batch.obs, z], 1)).tanh() - batch.act) ** 2).mean() + 0.5 * kl
        best = torch.full((16,), -torch.inf)
        for noise in next(draws)[1]:
            q1, q2 = all_q(critic_target, batch.next_obs, sampled(batch.next_obs, noise).tanh())
            best = torch.maximum(best, 0.6 * torch.minimum(q1, q2) + 0.4 * torch.maximum(q1, q2))
        target = (batch.rew + 0.9 * (1 - batch.done) * best).detach()
        critic_loss = ((all_q(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()
        vae_opt.step(vae_loss)
        critic_opt.step(critic_loss)

        theirs = [
            mlp(decoder, torch.cat([batch.obs, noise.clamp(-0.5, 0.5)], 1)).detach()
            for noise in next(draws)[1].split(16)
        ]
        ours = [sampled(batch.obs, noise) for noise in next(draws)[1]]
        assert len(theirs) == len(ours) == 2
        within = mean_kernel(ours, ours) + mean_kernel(theirs, theirs)
        mmd = (within - 2 * mean_kernel(ours, theirs) + 1e-6).sqrt().mean()
        alpha = log_alpha["log_alpha"].exp()
        actor_loss = alpha.detach() * (mmd - threshold)
        if step > 2:
            actor_loss = actor_loss - all_q(critic, batch.obs, ours[0].tanh()).min(0).values.mean()
        alpha_loss = -alpha * (mmd.detach() - threshold)
        pi_opt.step(actor_loss)
        alpha_opt.step(alpha_loss)
        log_alpha["log_alpha"].data.clamp_(-5, 10)
        alphas.append(log_alpha["log_alpha"].item())
        polyak(critic_target, critic, 0.1)
        losses = {"vae_loss": vae_loss, "critic_loss": critic_loss, "actor_loss": actor_loss, "mmd": mmd}
        assert_same(losses | {"alpha": log_alpha["log_alpha"].exp()}, traced.watched[step - 1], f"step {step}")
    assert next(draws, None) is None and alphas[-1] == end and abs(alphas[0]) < abs(end)
    kept = {"noise": traced.start["actor"]["noise"]}
    assert_same(pi | critic | kept, dict(traced.end["actor"]), "actor")
    assert_same(encoder | decoder, dict(traced.end["vae"]), "vae")
    assert_same(critic_target, traced.end["critic_target"], "critic_target")
    assert_same(log_alpha["log_alpha"], traced.end["log_alpha"], "log_alpha")
