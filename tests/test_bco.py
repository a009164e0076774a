"""BCO's training against Algorithm 1 of its paper (Torabi et al. 2018), without the demonstrations' actions."""

import dataclasses
import shutil

import h5py
import numpy as np
import pytest
import torch
from test_scripts import arguments, assert_equal, checkpoint_of
from update import Adam, assert_same, columns, episodes, leaves, mlp, trace

from algorithms import bco
from datasets import UserError
from results.checkpoint import load_checkpoint


def test_likelihood_loss():
    """The negative log-density of a Gaussian, less its constant."""
    act, mean, log_std = torch.randn(3, 6, 2, dtype=torch.float64)
    density = torch.distributions.Normal(mean, log_std.exp()).log_prob(act).numpy() + 0.5 * np.log(2 * np.pi)
    assert bco.likelihood_loss(act, mean, log_std).item() == pytest.approx(-density.sum(1).mean(), rel=1e-12)


def test_actor():
    """The mean lies in [-1, 1], the deviation within bounds; the policy is the mean."""
    actor, obs = bco.Actor(4, 2), 20 * torch.randn(50, 4)
    actor.net[-1].weight.data *= 30
    mean, log_std = actor(obs)
    assert mean.abs().max() <= 1 and log_std.min() == -5 and log_std.max() == 2
    out = mlp(dict(actor.net.named_parameters()), obs.clamp(-10, 10)).detach()
    torch.testing.assert_close(bco.policy(obs, actor), out[:, :2].tanh())
    assert obs.abs().max() > 10


def gaussian(params, x):
    mean, log_std = mlp(params, x).chunk(2, -1)
    return torch.distributions.Normal(mean.tanh(), log_std.clamp(-5, 2).exp())


def test_update(small, monkeypatch):
    """Four iterations of 60 steps: two of the untrained policy, then one fit that makes up for them, and one each after
    the others; the oldest steps are forgotten."""
    played, play = [], bco.play
    monkeypatch.setattr(bco, "play", lambda *words: played.append((words[2], play(*words))) or played[-1][1])
    changes = dict(
        envs=3, horizon=20, steps=240, pre_steps=120, eval_every=60, lr=3e-3, updates=3, batch_size=16, seed=2
    )
    args = arguments(bco, small, demos=5, every=7, **changes | dict(buffer_size=150))
    traced = trace(bco, monkeypatch, args)

    rng, whole = np.random.default_rng(2), [np.arange(20_000)[own] for own in episodes(small)]
    rows = [whole[i] for i in rng.choice(len(whole), 5, replace=False)]
    rows = np.concatenate([own[rng.integers(7) :: 7] for own in rows])
    obs, _, _, next_obs, _ = (column[rows] for column in columns(small))
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    obs, next_obs = (obs - mean) / std, (next_obs - mean) / std
    torch.testing.assert_close(traced.rows[:, :11], obs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(traced.rows[:, 15:26], next_obs, rtol=1e-9, atol=1e-9)
    assert traced.rows[:, 11:14].isnan().all()

    actor, inverse = leaves(traced.start["actor"]), leaves(traced.start["inverse"])
    assert [len(x) for x in (*actor.values(), *inverse.values())] == 2 * [256, 256, 256, 256, 6, 6]
    actor_opt, inverse_opt = Adam(actor, 3e-3), Adam(inverse, 3e-3)
    draws, batches, own = (x for _, x in traced.random), iter(traced.batches), torch.zeros(0, 25).double()
    for i, (seed, (o, a, n, *_)) in enumerate(played):
        assert seed == 200_000_000 + 60 * (i + 1) and a.shape == (20, 3, 3)
        noise = torch.stack([next(draws) for _ in range(20)])
        assert_same(a, gaussian(actor, o).mean + gaussian(actor, o).stddev * noise)
        own = torch.cat([own, torch.cat([o, n, a.clamp(-1, 1)], -1).reshape(60, 25)])
        loss_m, loss_pi = torch.zeros(2).double()
        ring = torch.zeros(150, 25).double()
        for t, row in enumerate(own):
            ring[t % 150] = row
        updates = (0, 6, 3, 3)[i]
        for _ in range(updates):
            rows = ring[next(draws)]
            assert len(rows) == 16
            loss_m = -gaussian(inverse, rows[:, :22]).log_prob(rows[:, 22:]).sum(1).mean()
            inverse_opt.step(loss_m)
        guess = gaussian(inverse, torch.cat([obs, next_obs], 1)).mean.detach()
        for _ in range(updates):
            batch = next(batches)
            assert batch.obs.shape == (16, 11)
            chosen = torch.cdist(batch.obs, obs).argmin(1)
            assert_same(batch.act, guess[chosen])
            loss_pi = -gaussian(actor, batch.obs).log_prob(batch.act).sum(1).mean()
            actor_opt.step(loss_pi)
        if updates:
            loss_m, loss_pi = (loss - 1.5 * np.log(2 * np.pi) for loss in (loss_m, loss_pi))
        assert_same(traced.watched[i], {"model_loss": loss_m, "actor_loss": loss_pi}, f"iteration {i}")
    assert next(batches, None) is next(draws, None) is None and i == 3
    assert_same(actor, traced.end["actor"])
    assert_same(inverse, traced.end["inverse"])
    torch.testing.assert_close(traced.end["own"], ring, rtol=1e-9, atol=1e-9)


def test_actions_of_the_demonstrations_are_never_seen(small, tmp_path, monkeypatch):
    """With other actions and rewards in the file, the same run bit for bit."""
    ends = []
    for name in ("true", "false"):
        shutil.copy(small, path := tmp_path / f"{name}.hdf5")
        with h5py.File(path, "r+") as file:
            if name == "false":
                file["actions"][:], file["rewards"][:] = -(file["actions"][:] ** 3), 7
        monkeypatch.setenv("RUNS_DIR", str(tmp_path / name / "runs"))
        bco.train(arguments(bco, path, steps=40))
        ends.append(load_checkpoint(checkpoint_of(tmp_path / name)))
    assert_equal(ends[0]["state"], ends[1]["state"])
    assert_equal(ends[0]["curve"], ends[1]["curve"])


def test_resume_within_the_first_steps(small, tmp_path, monkeypatch):
    """Stopped while the untrained policy still acts, and after it."""
    ends, args = [], arguments(bco, small, steps=80, pre_steps=40)
    for name, parts in (("whole", [80]), ("parts", [40, 80])):
        monkeypatch.setenv("RUNS_DIR", str(tmp_path / name / "runs"))
        for steps in parts:
            bco.train(dataclasses.replace(args, steps=steps, resume=steps != parts[0]))
        ends.append(load_checkpoint(checkpoint_of(tmp_path / name)))
    assert_equal(ends[0]["state"], ends[1]["state"])


@pytest.mark.parametrize("steps, pre_steps", [(50, 20), (60, 30), (40, 60)])
def test_bad_input(steps, pre_steps, small):
    message = f"multiples of --envs x --horizon, 20, --steps the larger or equal, not {pre_steps} and {steps}"
    with pytest.raises(UserError, match=message):
        bco.train(arguments(bco, small, steps=steps, pre_steps=pre_steps))
    with pytest.raises(UserError, match="--buffer-size must hold an iteration, 20 steps, not 19"):
        bco.train(arguments(bco, small, steps=20, buffer_size=19))
    bco.train(arguments(bco, small, steps=20, buffer_size=20))
    with pytest.raises(UserError, match="--demos 5000 are more than the"):
        bco.train(arguments(bco, small, steps=20, demos=5000))
