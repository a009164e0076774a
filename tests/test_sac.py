"""SAC's training against Algorithm 1 of its paper (Haarnoja et al. 2018): acting, the replay buffer, the updates."""

import numpy as np
import pytest
import torch
from test_scripts import arguments
from update import Adam, assert_same, leaves, polyak, q_values, squashed, table, trace

from algorithms import sac
from datasets import BODIES


@pytest.mark.parametrize("every", [1, 25])
def test_update(every, monkeypatch, tmp_path):
    """Sixty steps, 45 of them at random, in a buffer of 50, with other values than the defaults; snapshots on the way.
    The updates are exact; what the environment says is kept in float32, and compared so."""
    forward = sac.Actor.forward
    monkeypatch.setattr(sac.Actor, "forward", lambda actor, obs: forward(actor, obs.double()))  # it acts on float32
    changes = dict(seed=3, start_steps=45, buffer_size=50, snapshot_every=every, gamma=0.9, tau=0.1, lr=1e-3)
    traced = trace(sac, monkeypatch, arguments(sac, "", env="hopper", steps=60, batch_size=16, **changes))

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target")}
    actor, critic, critic_target = nets.values()
    assert_same(critic, critic_target)
    log_alpha = traced.start["log_alpha"].requires_grad_()
    assert log_alpha.item() == 0
    critic_opt, actor_opt, alpha_opt = (Adam(params, 1e-3) for params in (critic, actor, {"": log_alpha}))
    env, obs, rows = BODIES["hopper"].make_env(), None, torch.zeros(50, 27, dtype=torch.float64)
    draws, batches, losses = (x for _, x in traced.random), iter(traced.batches), {"alpha": log_alpha.detach().exp()}
    assert (len(traced.watched), len(traced.batches), len(traced.random)) == (60, 15, 60 + 2 * 15)
    snapshots = {int(path.stem[-7:]): np.load(path) for path in tmp_path.rglob("policy-???????.npz")}
    assert sorted(snapshots) == list(range(0, 60, every))
    for step, watched in enumerate(traced.watched, 1):
        if saved := snapshots.get(step - 1):
            weights = {f"net.{name}": torch.from_numpy(saved[name]).double() for name in saved}
            assert_same(weights, actor, f"snapshot {step}", 1e-3, 1e-7)  # they are in float16
        if obs is None:
            obs, _ = env.reset(seed=30_000_000 + step)
        seen = torch.from_numpy(obs).float().double()
        act = 2 * next(draws) - 1 if step <= 45 else squashed(actor, seen, next(draws)[0])[0].detach()
        next_obs, rew, terminated, truncated, _ = env.step(act.numpy())
        rows[(step - 1) % 50] = torch.from_numpy(np.concatenate([obs, act, [rew], next_obs, [terminated]]))
        obs = None if terminated or truncated else next_obs

        if step > 45:
            batch, alpha = next(batches), log_alpha.detach().exp()
            assert batch.obs.shape == (16, 11)
            assert torch.cdist(table(*batch), rows[:step]).amin(1).max() < 1e-5  # all are in the buffer
            next_act, next_log_prob = squashed(actor, batch.next_obs, next(draws))
            next_v = q_values(critic_target, batch.next_obs, next_act).min(0).values - alpha * next_log_prob
            target = (batch.rew + 0.9 * (1 - batch.done) * next_v).detach()
            critic_loss = ((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()  # (Eq. 5)
            critic_opt.step(critic_loss)
            pi, log_prob = squashed(actor, batch.obs, next(draws))
            actor_loss = (alpha * log_prob - q_values(critic, batch.obs, pi).min(0).values).mean()  # (Eq. 9)
            actor_opt.step(actor_loss)
            alpha_opt.step(-(log_alpha * (log_prob.detach() - 3)).mean())  # (Eq. 18); Hopper has three actions
            polyak(critic_target, critic, 0.1)
            losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "alpha": alpha}
        assert_same(losses, watched, f"step {step}")
    for name, params in (nets | {"log_alpha": log_alpha}).items():
        assert_same(params, traced.end[name], name)
    torch.testing.assert_close(traced.end["buffer"]["rows"], rows, rtol=1e-6, atol=1e-6)
