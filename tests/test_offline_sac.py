"""SAC's whole update on fixed data against Algorithm 1 of its paper (Haarnoja et al. 2018)."""

import torch
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, polyak, q_values, squashed, table, trace

from algorithms import offline_sac


def test_update(small, monkeypatch):
    """Six steps with other values than the defaults. All losses see the parameters as they are before the step."""
    args = arguments(offline_sac, small, steps=6, batch_size=16, gamma=0.9, tau=0.1, lr=1e-3)
    traced = trace(offline_sac, monkeypatch, args)
    torch.testing.assert_close(traced.rows, table(*columns(small)))

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target")}
    actor, critic, critic_target = nets.values()
    assert_same(critic, critic_target)
    log_alpha = traced.start["log_alpha"].requires_grad_()
    assert log_alpha.item() == 0
    opts = [Adam(params, 1e-3) for params in (critic, actor, {"": log_alpha})]
    assert len(traced.batches) == len(traced.watched) == 6 and len(traced.random) == 12
    noises = iter(noise for _, noise in traced.random)
    for batch, watched in zip(traced.batches, traced.watched):
        assert batch.obs.shape == (16, 11)
        alpha = log_alpha.detach().exp()
        next_act, next_log_prob = squashed(actor, batch.next_obs, next(noises))
        next_v = q_values(critic_target, batch.next_obs, next_act).min(0).values - alpha * next_log_prob
        target = (batch.rew + 0.9 * (1 - batch.done) * next_v).detach()
        critic_loss = ((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()  # (Eq. 5)
        act, log_prob = squashed(actor, batch.obs, next(noises))
        actor_loss = (alpha * log_prob - q_values(leaves(critic), batch.obs, act).min(0).values).mean()  # (Eq. 9)
        alpha_loss = -(log_alpha * (log_prob.detach() - 3)).mean()  # (Eq. 18); Hopper has three actions
        for opt, loss in zip(opts, (critic_loss, actor_loss, alpha_loss)):
            opt.step(loss)
        polyak(critic_target, critic, 0.1)
        losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "alpha": alpha}
        assert_same(losses, watched)
    for name, params in (nets | {"log_alpha": log_alpha}).items():
        assert_same(params, traced.end[name], name)
