"""Discrete BCQ's whole update against the paper's (Fujimoto et al. 2019, arXiv:1910.01708), and its threshold."""

import numpy as np
import pytest
import torch
from test_dqn import huber
from test_scripts import arguments, checkpoint_of
from update import Adam, assert_same, columns, leaves, mlp, table, trace

from algorithms import discrete_bcq
from datasets import Dataset, UserError
from results.checkpoint import load_agent, load_checkpoint


def heads(params):
    """The two networks of one dictionary: Q, and the imitation."""
    return [{key: x for key, x in params.items() if key.startswith(name)} for name in ("q.", "imitation.")]


def best_allowed(q, logits, threshold):
    """argmax of q over the actions whose probability is at least so much of the likeliest one's, a row at a time."""
    chosen = []
    for values, row in zip(q.tolist(), logits.tolist()):
        prob = np.exp(row) / np.exp(row).sum()
        allowed = [a for a in range(len(row)) if prob[a] / prob.max() >= threshold]
        chosen.append(max(allowed, key=lambda a, values=values: values[a]))
    return torch.tensor(chosen)


def test_update(small, monkeypatch):
    """Eight steps with other values than the defaults, and a threshold that forbids some of the best actions."""
    changes = dict(threshold=0.9, logit_penalty=0.3, target_every=3)
    args = arguments(discrete_bcq, small, steps=8, batch_size=16, gamma=0.9, lr=1e-2, **changes)
    traced = trace(discrete_bcq, monkeypatch, args)
    torch.testing.assert_close(
        traced.rows, table(*columns(small.with_name("cartpole.hdf5")))
    )  # as they are in the file

    params, target_params = (leaves(traced.start[name]) for name in ("critic", "critic_target"))
    assert_same(params, target_params)
    opt, forbidden = Adam(params, 1e-2), 0
    assert len(traced.batches) == len(traced.watched) == 8 and not traced.random
    for step, (batch, watched) in enumerate(zip(traced.batches, traced.watched), 1):
        assert batch.obs.shape == (16, 4)
        (q, imitation), (q_target, _) = heads(params), heads(target_params)
        next_q, rows = mlp(q, batch.next_obs), torch.arange(16)
        best = best_allowed(next_q, mlp(imitation, batch.next_obs), 0.9)
        forbidden += (best != next_q.argmax(1)).sum()
        target = (batch.rew + 0.9 * (1 - batch.done) * mlp(q_target, batch.next_obs)[rows, best]).detach()
        logits = mlp(imitation, batch.obs)
        log_prob = logits - logits.exp().sum(1, keepdim=True).log()
        loss = huber(mlp(q, batch.obs)[rows, batch.act] - target).mean()
        loss = loss - log_prob[rows, batch.act].mean() + 0.3 * (logits**2).mean()
        opt.step(loss)
        if step % 3 == 0:
            target_params = leaves(params)
        assert_same({"critic_loss": loss}, watched)
    assert 0 < forbidden < 8 * 16
    assert_same(params, traced.end["critic"], "critic")
    assert_same(target_params, traced.end["critic_target"], "target")


def test_threshold():
    """The likeliest action is always allowed; 0 allows all, 1 clones."""
    rng = torch.Generator().manual_seed(0)
    q, logits = torch.randn(200, 5, generator=rng), torch.randn(200, 5, generator=rng)
    act = {t: discrete_bcq.policy(None, lambda obs: (q, logits), t) for t in (0.0, 0.3, 1.0)}
    assert torch.equal(act[0.0], q.argmax(1)) and torch.equal(act[1.0], logits.argmax(1))
    assert torch.equal(act[0.3], best_allowed(q, logits, 0.3))
    assert not torch.equal(act[0.3], act[0.0]) and not torch.equal(act[0.3], act[1.0])


def test_checkpoint_keeps_the_threshold(small, tmp_path, monkeypatch):
    """What is evaluated, and what a checkpoint acts by, has the run's threshold, not the default."""
    obs, evaluated = torch.randn(500, 4), []
    with monkeypatch.context() as patch:
        evaluate = lambda data, policy, episodes, *_: evaluated.append(policy(obs)) or np.zeros(episodes)
        patch.setattr(Dataset, "evaluate", evaluate)
        discrete_bcq.train(arguments(discrete_bcq, small, steps=10, threshold=0.999))
    _, _, data, policy = load_agent(checkpoint_of(tmp_path))
    assert torch.equal(policy(obs), evaluated[-1])
    discrete_bcq.train(arguments(discrete_bcq, small, steps=10, threshold=1.0))
    (path,) = (path for path in tmp_path.rglob("checkpoint.pt") if "threshold=1.0" in str(path))
    _, _, data, policy = load_agent(path)
    q, logits = (mlp(head, obs) for head in heads(load_checkpoint(path)["state"]["critic"]))
    assert torch.equal(policy(obs), logits.argmax(1)) and not torch.equal(policy(obs), q.argmax(1))
    assert data.n_actions == 2


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_bad_threshold(threshold, small):
    with pytest.raises(UserError, match=rf"--threshold must lie in \[0, 1\], not {threshold}"):
        discrete_bcq.train(arguments(discrete_bcq, small, steps=2, threshold=threshold))
