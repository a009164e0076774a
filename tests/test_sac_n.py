"""SAC-N's whole update against Algorithm 1 of its paper (An et al. 2021)."""

import pytest
import torch
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, polyak, q_values, squashed, table, trace

from algorithms import sac_n


@pytest.mark.parametrize("task", ["hopper-medium", "pen-human"])
def test_update(task, small, monkeypatch):
    """Six steps with other values than the defaults; on Adroit the actor's rate is a tenth, and rewards have mean 0 and
    deviation 1. All losses see the parameters as they are before the step."""
    changes = dict(n_critics=5, actor_lr=2e-3) if task == "hopper-medium" else dict(n_critics=3)
    args = arguments(sac_n, small, steps=6, batch_size=16, gamma=0.9, tau=0.1, lr=1e-3, **changes)
    traced = trace(sac_n, monkeypatch, args, task={"name": task})

    obs, act, rew, next_obs, done = columns(small)
    rew = rew if task == "hopper-medium" else (rew - rew.mean()) / rew.std()
    torch.testing.assert_close(traced.rows, table(obs, act, rew, next_obs, done), rtol=1e-9, atol=1e-9)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target")}
    actor, critic, critic_target = nets.values()
    assert_same(critic, critic_target)
    log_alpha = traced.start["log_alpha"].requires_grad_()
    assert log_alpha.item() == 0
    actor_lr = 2e-3 if task == "hopper-medium" else 3e-5
    opts = [Adam(critic, 1e-3), Adam(actor, actor_lr), Adam({"": log_alpha}, actor_lr)]
    assert len(traced.batches) == len(traced.watched) == 6 and len(traced.random) == 12
    noises = iter(noise for _, noise in traced.random)
    for batch, watched in zip(traced.batches, traced.watched):
        assert batch.obs.shape == (16, 11)
        alpha = log_alpha.detach().exp()
        next_act, next_log_prob = squashed(actor, batch.next_obs, next(noises))
        next_v = q_values(critic_target, batch.next_obs, next_act).min(0).values - alpha * next_log_prob
        target = (batch.rew + 0.9 * (1 - batch.done) * next_v).detach()
        critic_loss = ((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()
        act, log_prob = squashed(actor, batch.obs, next(noises))
        actor_loss = (alpha * log_prob - q_values(leaves(critic), batch.obs, act).min(0).values).mean()
        alpha_loss = -(log_alpha * (log_prob.detach() - 3)).mean()  # Hopper has three actions
        for opt, loss in zip(opts, (critic_loss, actor_loss, alpha_loss)):
            opt.step(loss)
        polyak(critic_target, critic, 0.1)
        assert_same({"critic_loss": critic_loss, "actor_loss": actor_loss, "alpha": alpha}, watched)
    for name, params in (nets | {"log_alpha": log_alpha}).items():
        assert_same(params, traced.end[name], name)
