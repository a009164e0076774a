import dataclasses

import numpy as np
import pytest
import torch
from ensembles import CHANGES, assert_model_learned, cosine, fitted, rollout, shuffled, split
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, mlp, polyak, squashed, table, trace

from algorithms import combo
from datasets import Batch

B, O, A, n = 5, 3, 2, 4


def q_values(params, obs, act):
    """Both Q-functions, of weights (out, in): (2, ...)."""
    nets = [{key: x for key, x in params.items() if key.startswith(f"nets.{k}.")} for k in (0, 1)]
    x = torch.cat([obs.expand(*act.shape[:-1], -1), act], -1)
    return torch.stack([mlp(net, x)[..., 0] for net in nets])


def test_critic_loss(monkeypatch):
    """The gap: log-sum-exp over all 3 n sampled actions at all states, less Q on the data's alone, which come first."""
    torch.manual_seed(0)
    args, real, rng = combo.Args(beta=0.7, gamma=0.9, n_actions=n), 2, np.random.default_rng(0)
    batch = Batch(torch.randn(B, O), torch.rand(B, A), torch.randn(B), torch.randn(B, O), (torch.rand(B) > 0.5).float())
    drawn = rng.uniform(-0.9, 0.9, (n, 2 * B, A)).astype(np.float32), rng.normal(size=(n, 2 * B)).astype(np.float32)
    uniform = rng.uniform(size=(n, B, A)).astype(np.float32)
    monkeypatch.setattr(combo, "sample", lambda obs, actor, n: tuple(map(torch.from_numpy, drawn)))
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.from_numpy(uniform))
    q_of = lambda obs, act: np.stack([np.sin(obs.sum(-1) + 2 * act.sum(-1)), np.cos(obs.sum(-1) - act.sum(-1))])
    critic = lambda obs, act: torch.from_numpy(q_of(obs.numpy(), act.numpy()))
    loss, gap = combo.critic_loss(args, real, batch, None, critic, lambda obs, act: 3 * critic(obs, act))

    obs, act, rew, next_obs, done = (x.numpy().astype(np.float64) for x in batch)
    target = rew + 0.9 * (1 - done) * 3 * q_of(next_obs, drawn[0][0, B:]).min(0)
    expected, gaps = 0, []
    for k in (0, 1):
        q = q_of(obs, act)[k]
        total = np.zeros(B)
        for j in range(n):
            total += np.exp(q_of(obs, 2 * uniform[j] - 1)[k] - A * np.log(0.5))
            total += np.exp(q_of(obs, drawn[0][j, :B])[k] - drawn[1][j, :B])
            total += np.exp(q_of(obs, drawn[0][j, B:])[k] - drawn[1][j, B:])
        gaps.append(np.log(total).mean() - q[:real].mean())
        expected += 0.7 * gaps[-1] + ((q - target) ** 2).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gap.item() == pytest.approx(np.mean(gaps), rel=1e-5)


def test_update(small, tmp_path, monkeypatch):
    """The fit; rollouts whose rewards stand; critics with the gap, the policy after them, the temperature."""
    monkeypatch.setattr(combo, "PATIENCE", 1)
    args = arguments(combo, shuffled(small, tmp_path / "tiny.hdf5"), **CHANGES, batch_size=36)
    args = dataclasses.replace(args, beta=0.7, n_actions=3, model_lr=6e-4, model_updates=7)
    traced = trace(combo, monkeypatch, args)
    start, end, draws, batches = traced.start, traced.end, (x for _, x in traced.random), iter(traced.batches)

    rows = table(*columns(tmp_path / "tiny.hdf5"))
    assert_same(traced.rows, rows)
    fit, _ = fitted(start, rows, draws, args.seed, 36, 6e-4, 7)
    nets = {name: leaves(start[name]) for name in ("actor", "critic", "critic_target")}
    (actor, critic, target), log_temperature = nets.values(), start["log_temperature"].requires_grad_()
    assert_same(critic, target)
    assert log_temperature == 0
    actor_opt, critic_opt = Adam(actor, None), Adam(critic, 1e-3)
    temperature_opt = Adam({"": log_temperature}, args.actor_lr)
    imagined = torch.zeros(2 * 180, 27).double()
    of_policy = ((x[0] if x.dim() == 3 else x) for x in draws)  # one action a state, n = 1
    settle = lambda mean, std, rew: (rew, torch.zeros(60, dtype=torch.bool))
    for step in range(8):
        if step % 3 == 0:
            place = (0, 180, 0)[step // 3]
            imagined[place : place + 180] = rollout(fit, rows, actor, of_policy, batches, 3, settle)
        of_model, of_data = next(draws), next(draws)
        assert (len(of_model), len(of_data)) == (26, 10)
        obs, act, rew, next_obs, done = split(torch.cat([rows[of_data], imagined[of_model]]))
        sampled, log_prob = squashed(actor, torch.cat([obs, next_obs]), next(draws))  # (3, 72, ...)
        goal = rew[:, 0] + 0.9 * (1 - done[:, 0]) * q_values(target, next_obs, sampled[0, 36:]).min(0).values
        uniform = 2 * next(draws) - 1
        acts = torch.cat([uniform, sampled[:, :36], sampled[:, 36:]]).detach()
        density = torch.cat([torch.full((3, 36), 3 * np.log(0.5)), log_prob[:, :36], log_prob[:, 36:]]).detach()
        q = q_values(critic, obs, act)
        gap = (q_values(critic, obs, acts) - density).exp().sum(1).log().mean(1) - q[:, :10].mean(1)
        critic_opt.step((0.7 * gap + ((q - goal.detach()) ** 2).mean(1)).sum())
        pi, log_prob = squashed(actor, obs, next(draws)[0])
        actor_opt.lr, temperature = cosine(args.actor_lr, step), log_temperature.exp().item()
        actor_opt.step((temperature * log_prob - q_values(critic, obs, pi).min(0).values).mean())
        temperature_opt.step(-(log_temperature * (log_prob.detach().mean() - 3)).sum())
        polyak(target, critic, 0.1)

    learned = nets | {"log_temperature": log_temperature, "model_rows": imagined}
    # Far out log_prob has errors of 2e-9: torch's softplus is linear beyond 20.
    assert_same(learned, {name: end[name] for name in learned}, atol=1e-7)
    assert_model_learned(fit, end)
    assert [group["lr"] for group in end["actor_opt"]["param_groups"]] == [0, 2**-10]
    assert [group["lr"] for group in end["critic_opt"]["param_groups"]] == [1e-3]
    assert gap.mean().item() == pytest.approx(traced.watched[-1]["gap"].item(), rel=1e-9)
