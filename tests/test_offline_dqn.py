"""Offline DQN's whole update against the paper's: double DQN on fixed data (Fujimoto et al. 2019)."""

import torch
from test_dqn import huber
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, mlp, table, trace

from algorithms import offline_dqn


def test_update(small, monkeypatch):
    """Eight steps with other values than the defaults; the target is copied after the third and the sixth."""
    args = arguments(offline_dqn, small, steps=8, batch_size=16, gamma=0.9, lr=1e-2, target_every=3)
    traced = trace(offline_dqn, monkeypatch, args)
    torch.testing.assert_close(
        traced.rows, table(*columns(small.with_name("cartpole.hdf5")))
    )  # as they are in the file

    critic, critic_target = (leaves(traced.start[name]) for name in ("critic", "critic_target"))
    assert_same(critic, critic_target)
    opt = Adam(critic, 1e-2)
    assert len(traced.batches) == len(traced.watched) == 8 and not traced.random
    for step, (batch, watched) in enumerate(zip(traced.batches, traced.watched), 1):
        assert batch.obs.shape == (16, 4) and batch.act.shape == (16,) and batch.act.dtype == torch.int64
        best = mlp(critic, batch.next_obs).argmax(1)
        next_q = mlp(critic_target, batch.next_obs)[torch.arange(16), best]
        target = (batch.rew + 0.9 * (1 - batch.done) * next_q).detach()
        loss = huber(mlp(critic, batch.obs)[torch.arange(16), batch.act] - target).mean()
        opt.step(loss)
        if step % 3 == 0:
            critic_target = leaves(critic)
        assert_same({"critic_loss": loss}, watched)
    assert_same(critic, traced.end["critic"], "critic")
    assert_same(critic_target, traced.end["critic_target"], "target")
