"""DQN's training against Algorithm 1 of Mnih et al. 2015, with the double target of van Hasselt et al. 2016."""

import numpy as np
import pytest
import torch
from test_scripts import arguments, checkpoint_of
from update import assert_same, leaves, mlp, table, trace

from algorithms import dqn
from datasets import GAMES
from results.checkpoint import load_checkpoint


class RMSprop:
    """Centred (Graves 2013, Eq. 38 to 40), the epsilon outside the root and without momentum."""

    def __init__(self, params, lr):
        self.params, self.lr = params, lr
        self.square, self.mean = ({key: torch.zeros_like(x) for key, x in params.items()} for _ in range(2))

    def step(self, loss):
        for (key, x), g in zip(self.params.items(), torch.autograd.grad(loss, list(self.params.values()))):
            self.square[key] = 0.95 * self.square[key] + 0.05 * g**2
            self.mean[key] = 0.95 * self.mean[key] + 0.05 * g
            x.data.sub_(self.lr * g / ((self.square[key] - self.mean[key] ** 2).sqrt() + 0.01))


def huber(u):
    return torch.where(u.abs() < 1, u**2 / 2, u.abs() - 0.5)


@pytest.mark.parametrize("every", [1, 25])
def test_update(every, monkeypatch, tmp_path):
    """Sixty steps, twenty of them before the first update, in a buffer of 50, with other values than the defaults.
    The updates are exact; what the environment says is kept in float32, and compared so."""
    forward = dqn.Critic.forward
    monkeypatch.setattr(dqn.Critic, "forward", lambda critic, obs: forward(critic, obs.double()))  # it acts on float32
    changes = dict(seed=3, start_steps=20, buffer_size=50, epsilon=0.3, epsilon_steps=4, update_every=2, target_every=8)
    args = arguments(dqn, "", steps=60, batch_size=16, gamma=0.9, lr=1e-2, snapshot_every=every, **changes)
    traced = trace(dqn, monkeypatch, args)

    critic, critic_target = (leaves(traced.start[name]) for name in ("critic", "critic_target"))
    assert_same(critic, critic_target)
    opt, losses = RMSprop(critic, 1e-2), {"critic_loss": torch.zeros((), dtype=torch.float64)}
    env, obs, rows = GAMES["cartpole"].make_env(), None, torch.zeros(50, 11, dtype=torch.float64)
    draws, batches, greedy = iter(traced.random), iter(traced.batches), 0
    assert (len(traced.watched), len(traced.batches)) == (60, 20)
    snapshots = {int(path.stem[-7:]): np.load(path) for path in tmp_path.rglob("policy-???????.npz")}
    assert sorted(snapshots) == list(range(0, 60, every))
    for step, watched in enumerate(traced.watched, 1):
        if saved := snapshots.get(step - 1):
            assert_same({name: torch.from_numpy(saved[name]).double() for name in saved}, critic, "saved", 1e-3, 1e-7)
        if obs is None:
            obs, _ = env.reset(seed=30_000_000 + step)
        epsilon = np.interp(step, [20, 24], [1, 0.3])
        kind, chance = next(draws)
        assert kind == "rand"
        if chance < epsilon:
            kind, act = next(draws)
            assert kind == "randint"
            act = int(act)
        else:
            act, greedy = int(mlp(critic, torch.from_numpy(obs).double()).argmax()), greedy + 1
        next_obs, rew, terminated, truncated, _ = env.step(act)
        rows[(step - 1) % 50] = torch.from_numpy(np.concatenate([obs, [act, rew], next_obs, [terminated]]))
        obs = None if terminated or truncated else next_obs

        if step > 20 and step % 2 == 0:
            batch = next(batches)
            assert batch.obs.shape == (16, 4) and batch.act.shape == (16,) and batch.act.dtype == torch.int64
            assert torch.cdist(table(*batch), rows[:step]).amin(1).max() < 1e-5  # all are in the buffer
            best = mlp(critic, batch.next_obs).argmax(1)
            next_q = mlp(critic_target, batch.next_obs)[torch.arange(16), best]
            target = (batch.rew + 0.9 * (1 - batch.done) * next_q).detach()
            loss = huber(mlp(critic, batch.obs)[torch.arange(16), batch.act] - target).mean()
            opt.step(loss)
            if step % 8 == 0:
                critic_target = leaves(critic)
            losses = {"critic_loss": loss}
        assert_same(losses, watched, f"step {step}")
    assert greedy > 10 and next(draws, None) is None
    assert_same(critic, traced.end["critic"], "critic")
    assert_same(critic_target, traced.end["critic_target"], "target")
    torch.testing.assert_close(traced.end["buffer"]["rows"], rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("game", ["cartpole", "minatar-breakout"])
def test_log_repeats_the_buffer(game, tmp_path):
    """Across a resume: each transition again, from seeds and actions, bit for bit; frames too."""
    args = dict(
        env=game, start_steps=150, eval_every=200, eval_episodes=1, batch_size=8, epsilon_steps=50, log_actions=True
    )
    dqn.train(dqn.Args(steps=200, **args))
    dqn.train(dqn.Args(steps=400, resume=True, **args))
    saved = load_checkpoint(checkpoint_of(tmp_path))["state"]
    buffer, log = saved["buffer"], {key: value.numpy() for key, value in saved["log"].items()}
    env, row = GAMES[game].make_env(), 0
    assert log["act"].shape == (400,) and log["episodes"][:, 1].sum() == 400 and len(buffer["rows"]) == 400
    for seed, steps, ret in log["episodes"]:
        obs, total = env.reset(seed=int(seed))[0], 0.0
        for _ in range(int(steps)):
            next_obs, rew, terminated, *_ = env.step(int(log["act"][row]))
            kept, total = buffer["rows"][row].numpy(), total + rew
            if "frames" in buffer:
                np.testing.assert_array_equal(buffer["frames"][2 * row : 2 * row + 2], [obs, next_obs])
                np.testing.assert_array_equal(kept, [2 * row, log["act"][row], rew, 2 * row + 1, terminated])
            else:
                np.testing.assert_array_equal(kept, np.float32([*obs, log["act"][row], rew, *next_obs, terminated]))
            obs, row = next_obs, row + 1
        assert total == ret


def test_networks():
    """Of pixels the published sizes: MinAtar's 16 filters of 3 x 3 and 128 units, Nature's on 84 x 84 frames."""
    count = lambda shape, n: sum(p.numel() for p in dqn.Critic(shape, n).parameters())
    assert count((4, 10, 10), 3) == (4 * 9 * 16 + 16) + (8 * 8 * 16 * 128 + 128) + (128 * 3 + 3)
    nature = (4 * 64 * 32 + 32) + (32 * 16 * 64 + 64) + (64 * 9 * 64 + 64) + (7 * 7 * 64 * 512 + 512) + (512 * 6 + 6)
    assert count((4, 84, 84), 6) == nature
    assert count((4,), 2) == (4 * 256 + 256) + (256 * 256 + 256) + (256 * 2 + 2)
    critic, obs = dqn.Critic((4, 10, 10), 3), torch.rand(5, 400)
    x = torch.nn.functional.conv2d(obs.view(5, 4, 10, 10), critic.encoder[1].weight, critic.encoder[1].bias).relu()
    torch.testing.assert_close(critic(obs), critic.q(x.flatten(1)))
