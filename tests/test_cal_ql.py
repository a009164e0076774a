"""Cal-QL's two phases against its paper (Nakamoto et al. 2023): CQL's update, as test_cql has it, with a bound on what
is lowered; and the second phase acts."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_cql import q_values
from test_scripts import arguments
from update import (
    Adam,
    World,
    assert_same,
    columns,
    episodes,
    kept,
    leaves,
    mlp,
    polyak,
    squashed,
    table,
    trace,
)

from algorithms import cal_ql, cql
from datasets import ReturnBatch, UserError, load

VALUES = dict(batch_size=16, n_actions=3, critic_layers=1, alpha=2.5, threshold=-1.0, bc_steps=3, gap_min=-1e9, seed=3)
VALUES |= dict(actor_lr=2e-3, lr=1e-3, gamma=0.9, tau=0.1, rew_scale=0.1, rew_shift=-0.27, offline_share=0.25)
VALUES |= dict(offline_steps=5, steps=25, buffer_size=100, normalize=True)
MODES = [
    dict(gap_min=4.3, normalize=False),
    dict(variant="rho", backup_entropy=True, buffer_size=9, calibrated=False),
    dict(threshold=0.5, bc_steps=40, critic_layers=2, offline_share=None),
    dict(threshold=8.0, bc_steps=0, max_target=True, backup_entropy=True, family="antmaze"),
    dict(threshold=0.3, variant="rho", max_target=True, family="pointmaze", rew_scale=0.0),
    dict(rew_scale=0.0, online_alpha=0.0),
    dict(threshold=0.5, online_alpha=1.5),
]


def to_go(rew):
    """Discounted by 0.9, the definition: of each step the weighted sum of all that follow."""
    return [sum(0.9**k * r for k, r in enumerate(rew[t : t + 400])) for t in range(len(rew))]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_update(mode, small, monkeypatch):
    """Five steps on the data and twenty-five that act, of several episodes, with other values than the defaults. In a
    maze where rewards are those of no goal (all equal, here), they have no end."""
    family = mode.get("family", "hopper")
    changes = {key: value for key, value in mode.items() if key != "family"}
    args = arguments(cal_ql, small, **VALUES | changes)
    traced = trace(cal_ql, monkeypatch, args, task={"name": f"{family}-medium", "max_episode_steps": 20})

    obs, act, rew, next_obs, done = columns(small)
    mean, std = (obs.mean(0), obs.std(0) + 1e-3) if args.normalize else (0, 1)
    rew = args.rew_scale * rew - 0.27
    data = table((obs - mean) / std, act, rew, (next_obs - mean) / std, done)
    torch.testing.assert_close(traced.rows[: len(data), :-1], data, rtol=1e-9, atol=1e-9)
    assert len(traced.rows) == len(data) + min(args.buffer_size, 25)
    forever = family == "pointmaze"
    goal_less = lambda rew: [-0.27 / 0.1] * len(rew) if forever else to_go(rew)
    returns = traced.rows[: len(data), -1]
    for span in episodes(small)[:2] + episodes(small)[-2:]:
        np.testing.assert_allclose(returns[span], goal_less(rew[span].tolist()), rtol=1e-9)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target")}
    actor, critic, critic_target = nets.values()
    assert_same(critic, critic_target)
    log_temperature, log_alpha = (traced.start[name].requires_grad_() for name in ("log_temperature", "log_alpha"))
    assert log_temperature.item() == 0 and log_alpha.item() == pytest.approx(math.log(2.5), rel=1e-12)
    critic_opt, alpha_opt = Adam(critic, 1e-3), Adam({"": log_alpha}, 1e-3)
    actor_opt, temperature_opt = Adam(actor, 2e-3), Adam({"": log_temperature}, 2e-3)
    task = dataclasses.replace(load(str(small)).task, max_episode_steps=20)
    world = World(task, 3, mean, std, lambda rew: args.rew_scale * rew - 0.27)
    assert len(traced.batches) == len(traced.watched) == 30
    draws, new_returns, binding, begun = (x for _, x in traced.random), [], [], 0
    for step, (batch, watched) in enumerate(zip(traced.batches, traced.watched), 1):
        obs, act, rew, next_obs, done, mc_return = batch
        assert obs.shape == (16, 11)
        rows, all_returns, of_data = data, returns, 16
        if step == 6 and args.online_alpha is not None:
            log_alpha.data.fill_(math.log(args.online_alpha) if args.online_alpha else -math.inf)
        if step > 5:
            world.act(squashed(actor, world.look(step), next(draws)[0])[0].detach())
            new_returns.append(-math.inf)
            if world.over:
                rewards = [row[14].item() for row in world.rows[begun:]]
                new_returns[begun:], begun = goal_less(rewards), len(world.rows)
            new = kept(
                [torch.cat([row, torch.tensor([x])]) for row, x in zip(world.rows, new_returns)], args.buffer_size
            )
            rows, all_returns = torch.cat([data, new[:, :-1]]), torch.cat([returns, new[:, -1]])
            of_data = 4 if args.offline_share else 16
        distance, row = torch.cdist(table(*batch[:5]), rows).min(1)
        assert distance.max() < 1e-4 and (row[:of_data] < len(data)).all()
        assert args.offline_share is None or (row[of_data:] >= len(data)).all()
        torch.testing.assert_close(mc_return, all_returns[row], rtol=1e-5, atol=1e-6)

        noise, next_noise = next(draws).split(16, 1)
        (pi, log_prob), (next_pi, next_log_prob) = squashed(actor, obs, noise), squashed(actor, next_obs, next_noise)
        tried = 3 if args.max_target else 1
        next_q, best = q_values(critic_target, next_obs, next_pi[:tried]).min(0).values.max(0)
        if args.backup_entropy:
            next_q = next_q - log_temperature.exp() * next_log_prob[best, range(16)]
        target = (rew + 0.9 * (1 - done) * next_q).detach()
        q, pi_q = q_values(critic, obs, act[None])[:, 0], q_values(critic, obs, pi.detach())
        binding += (pi_q < mc_return).flatten().tolist()
        bounded = lambda q, bound=mc_return: torch.where(q < bound, bound, q) if args.calibrated else q
        pi_q = bounded(pi_q)
        if args.variant == "h":
            uniform_q, next_pi_q = (q_values(critic, obs, x) for x in (2 * next(draws) - 1, next_pi.detach()))
            next_pi_q = bounded(next_pi_q)
            terms = uniform_q.exp() * 2**3, (pi_q - log_prob.detach()).exp(), (next_pi_q - next_log_prob.detach()).exp()
            soft = sum(terms).sum(1).log()
        else:
            soft = (pi_q.detach().softmax(1) * pi_q).sum(1)
        gap = (soft - q).clamp(min=args.gap_min).mean(1)
        critic_loss = (log_alpha.exp().item() * gap + ((q - target) ** 2).mean(1)).sum()
        critic_opt.step(critic_loss)
        if args.threshold >= 0:
            alpha_opt.step(-log_alpha.exp() * (gap.mean().item() - args.threshold))
        pi, log_prob = squashed(actor, obs, next(draws))
        value = q_values(critic, obs, pi).min(0).values
        if step <= min(5, args.bc_steps):
            u = act.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
            mean_, log_std = mlp(actor, obs).chunk(2, 1)
            value = (torch.distributions.Normal(mean_, log_std.exp()).log_prob(u) - (1 - u.tanh() ** 2).log()).sum(1)
        actor_loss = (log_temperature.exp().item() * log_prob - value).mean()
        actor_opt.step(actor_loss)
        temperature_opt.step(-log_temperature * (log_prob.mean().item() - 3))  # Hopper has three actions
        polyak(critic_target, critic, 0.1)
        losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "gap": gap.mean()}
        assert_same(losses | {"alpha": log_alpha.exp(), "temperature": log_temperature.exp()}, watched, f"step {step}")
    assert next(draws, None) is None and begun > 0
    assert args.rew_scale == 0 or (any(binding) and not all(binding))
    for name, params in (nets | {"log_temperature": log_temperature, "log_alpha": log_alpha}).items():
        assert_same(params, traced.end[name], name)
    torch.testing.assert_close(traced.end["buffer"]["rows"], new, rtol=1e-5, atol=1e-5)


def test_without_a_bound_it_is_cql(small):
    """A return of minus infinity, or --no-calibrated: CQL's loss and its gradients, to the bit. A bound above every Q:
    the penalty lowers none of the policy's actions."""
    five = load(str(small)).sample(16)
    args = arguments(cal_ql, small, alpha=1.0, gap_min=-1e9, n_actions=4, max_target=False, threshold=-1.0)
    torch.manual_seed(0)
    actor, critic, target = cql.Actor(11, 3), cql.Critic(11, 3, 2), cql.Critic(11, 3, 2)

    def found(script, batch, **changes):
        torch.manual_seed(1)
        words = dataclasses.replace(args, **changes), batch, torch.tensor(0.0), torch.tensor(0.0), actor, critic, target
        loss, gap = script.critic_loss(*words)
        return torch.cat(
            [loss[None], gap[None], *(g.flatten() for g in torch.autograd.grad(loss, critic.parameters()))]
        )

    for variant in ("h", "rho"):
        expected = found(cql, five, variant=variant)
        unknown, high = (ReturnBatch(*five, torch.full((16,), x)) for x in (-math.inf, 100.0))
        assert torch.equal(found(cal_ql, unknown, variant=variant), expected)
        assert torch.equal(found(cal_ql, high, variant=variant, calibrated=False), expected)
        assert not torch.equal(found(cal_ql, high, variant=variant), expected)


def test_returns_to_go():
    assert cal_ql.returns_to_go(np.array([1.0, 2.0, 4.0]), 0.5, False).tolist() == [3.0, 4.0, 4.0]
    assert cal_ql.returns_to_go(np.array([-5.0, -5.0]), 0.75, True).tolist() == [-20.0, -20.0]


def test_starts_from_cql(small, tmp_path, monkeypatch):
    """Not calibrated; calibrated it refuses."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "offline"))
    args = dict(batch_size=16, n_actions=2, critic_layers=1, bc_steps=0, threshold=None)
    cql.train(arguments(cql, small, steps=10, **args))
    (path,) = (tmp_path / "offline").rglob("checkpoint.pt")
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "online"))
    args = arguments(cal_ql, small, steps=10, checkpoint=str(path), **args)
    with pytest.raises(UserError, match="A checkpoint of cql.py is not calibrated: --no-calibrated goes on from it"):
        cal_ql.train(args)
    cal_ql.train(dataclasses.replace(args, calibrated=False))
    (end,) = (tmp_path / "online").rglob("checkpoint.pt")
    assert torch.load(end)["step"] == 20 and end.parent.name.endswith(
        "calibrated=False,offline_steps=10,checkpoint=cql"
    )
