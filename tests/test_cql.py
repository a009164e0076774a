"""CQL's whole update against Algorithm 1, Eq. 4 and appendix A of its paper (Kumar et al. 2020), with SAC's policy."""

import math

import pytest
import torch
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, mlp, polyak, squashed, table, trace

from algorithms import cql

VALUES = dict(batch_size=16, n_actions=3, critic_layers=1, alpha=2.5, threshold=-1.0, bc_steps=3, gap_min=-1e9)
VALUES |= dict(actor_lr=2e-3, lr=1e-3, gamma=0.9, tau=0.1, rew_scale=1.7, rew_shift=-0.4)
MODES = [
    dict(gap_min=4.3),
    dict(variant="rho", backup_entropy=True, normalize=False),
    dict(threshold=0.5, bc_steps=4, critic_layers=2),
    dict(threshold=8.0, bc_steps=0, max_target=True, backup_entropy=True),
    dict(threshold=0.3, variant="rho", max_target=True),
]


def q_values(critic, obs, act):
    """Both Q-functions at act (n, B, A): (2, n, B)."""
    x = torch.cat([obs.expand(len(act), *obs.shape), act], -1)
    nets = [{key: p for key, p in critic.items() if key.startswith(f"nets.{i}.")} for i in range(2)]
    return torch.stack([mlp(net, x)[..., 0] for net in nets])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_update(mode, small, monkeypatch):
    """Six steps with other values than the defaults."""
    args = arguments(cql, small, steps=6, **VALUES | mode)
    traced = trace(cql, monkeypatch, args)

    obs, act, rew, next_obs, done = columns(small)
    mean, std = (0, 1) if "normalize" in mode else (obs.mean(0), obs.std(0) + 1e-3)
    expected = table((obs - mean) / std, act, 1.7 * rew - 0.4, (next_obs - mean) / std, done)
    torch.testing.assert_close(traced.rows, expected, rtol=1e-9, atol=1e-9)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target")}
    actor, critic, critic_target = nets.values()
    assert_same(critic, critic_target)
    assert len(critic) == 4 * args.critic_layers + 4
    log_temperature, log_alpha = (traced.start[name].requires_grad_() for name in ("log_temperature", "log_alpha"))
    assert log_temperature.item() == 0 and log_alpha.item() == pytest.approx(math.log(2.5), rel=1e-12)
    critic_opt, alpha_opt = Adam(critic, 1e-3), Adam({"": log_alpha}, 1e-3)
    actor_opt, temperature_opt = Adam(actor, 2e-3), Adam({"": log_temperature}, 2e-3)
    assert len(traced.batches) == len(traced.watched) == 6
    draws = (x for _, x in traced.random)
    for step, ((obs, act, rew, next_obs, done), watched) in enumerate(zip(traced.batches, traced.watched), 1):
        assert obs.shape == (16, 11)
        noise, next_noise = next(draws).split(16, 1)
        (pi, log_prob), (next_pi, next_log_prob) = squashed(actor, obs, noise), squashed(actor, next_obs, next_noise)
        tried = 3 if args.max_target else 1
        next_q, best = q_values(critic_target, next_obs, next_pi[:tried]).min(0).values.max(0)
        if args.backup_entropy:
            next_q = next_q - log_temperature.exp() * next_log_prob[best, range(16)]
        target = (rew + 0.9 * (1 - done) * next_q).detach()
        q, pi_q = q_values(critic, obs, act[None])[:, 0], q_values(critic, obs, pi.detach())
        if args.variant == "h":  # log of the sum of exp Q / density, over three kinds of three actions (appendix F)
            uniform_q, next_pi_q = (q_values(critic, obs, x) for x in (2 * next(draws) - 1, next_pi.detach()))
            terms = uniform_q.exp() * 2**3, (pi_q - log_prob.detach()).exp(), (next_pi_q - next_log_prob.detach()).exp()
            soft = sum(terms).sum(1).log()
        else:  # (appendix A)
            soft = (pi_q.detach().softmax(1) * pi_q).sum(1)
        gap = soft - q
        assert args.gap_min == -1e9 or 0 < (gap < 4.3).sum() < 32  # some are below their bound
        gap = gap.clamp(min=args.gap_min).mean(1)
        critic_loss = (log_alpha.exp().item() * gap + ((q - target) ** 2).mean(1)).sum()
        critic_opt.step(critic_loss)
        if args.threshold >= 0:
            alpha_opt.step(-log_alpha.exp() * (gap.mean().item() - args.threshold))
        pi, log_prob = squashed(actor, obs, next(draws))
        value = q_values(critic, obs, pi).min(0).values
        if step <= args.bc_steps:
            u = act.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
            mean, log_std = mlp(actor, obs).chunk(2, 1)
            value = (torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - (1 - u.tanh() ** 2).log()).sum(1)
        actor_loss = (log_temperature.exp().item() * log_prob - value).mean()
        actor_opt.step(actor_loss)
        temperature_opt.step(-log_temperature * (log_prob.mean().item() - 3))  # Hopper has three actions
        polyak(critic_target, critic, 0.1)
        losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "gap": gap.mean()}
        assert_same(losses | {"alpha": log_alpha.exp(), "temperature": log_temperature.exp()}, watched, f"step {step}")
    assert next(draws, None) is None
    for name, params in (nets | {"log_temperature": log_temperature, "log_alpha": log_alpha}).items():
        assert_same(params, traced.end[name], name)
