"""EnsembleDAgger's training against its paper's decision rule (Menda et al. 2019), and DAgger's: test_dagger.py."""

import numpy as np
import pytest
import torch
from test_dagger import assert_drawn, assert_kept, counts_of, play, traced_run
from test_hg_dagger import members
from test_scripts import arguments
from update import Adam, assert_same, leaves, mlp

from algorithms import ensemble_dagger, hg_dagger
from datasets import UserError


def test_update(monkeypatch):
    """Three rounds, of which the expert has the first; then it acts where the policy is far off, or doubts."""
    max_off, max_doubt = 0.5, 0.08
    task, traced = traced_run(ensemble_dagger, monkeypatch, max_off=max_off, max_doubt=max_doubt)
    actor = leaves(traced.start["actor"])
    opts, steps, batches, why = [Adam(own, 3e-3) for own in members(actor)], [], iter(traced.batches), set()
    each = lambda obs: torch.stack([mlp(own, obs).tanh() for own in members(actor)])  # (5, B, 3)

    def gate(obs, act, label, before, i):
        acts = each(torch.from_numpy(np.float32(obs)).double()[None])[:, 0].detach().numpy()
        far, doubts = np.sum((act - label) ** 2) > max_off, np.linalg.norm(acts.var(0, ddof=1)) > max_doubt
        why.add((far, doubts))
        return i == 0 or far or doubts

    for i, watched in enumerate(traced.watched):
        steps += play(task, i, lambda obs: each(obs).mean(0), lambda *words, i=i: gate(*words, i))
        for _ in range(4):
            batch, losses = next(batches), []
            assert_drawn(batch, steps, (5, 16))
            for n, (opt, own) in enumerate(zip(opts, members(actor))):
                losses.append(((mlp(own, batch.obs[n]).tanh() - batch.act[n]) ** 2).mean())
                opt.step(losses[-1])
        assert_same(watched["actor_loss"], sum(losses), f"round {i}")
        assert {name: watched[name].item() for name in list(watched)[1:]} == counts_of(steps, len(steps))
    assert len(steps) == 120 and next(batches, None) is None and not traced.random
    assert_same(actor, traced.end["actor"])
    assert_kept(traced, "buffer", steps)
    assert len(why) == 4 and counts_of(steps, 120)["falls"] > 2 and 10 < counts_of(steps, 120)["policy_steps"] < 70


def test_ensemble():
    """It is HG-DAgger's."""
    torch.manual_seed(0)
    ours, obs = ensemble_dagger.Actor(4, 2), torch.randn(6, 4)
    torch.manual_seed(0)
    theirs = hg_dagger.Actor(4, 2)
    assert torch.equal(ensemble_dagger.policy(obs, ours), hg_dagger.policy(obs, theirs))
    assert torch.equal(ensemble_dagger.doubt_of(ours(obs)), hg_dagger.doubt_of(theirs(obs)))


def test_buffer_size(tmp_path):
    """The newest of what is labelled."""
    ensemble_dagger.train(arguments(ensemble_dagger, "", steps=40, updates=1, buffer_size=30))
    (path,) = tmp_path.rglob("checkpoint.pt")
    assert torch.load(path, weights_only=True)["state"]["buffer"]["rows"].shape == (30, 27)


def test_bad_input():
    with pytest.raises(UserError, match="--steps must be a multiple of --round-steps, 20, not 50"):
        ensemble_dagger.train(arguments(ensemble_dagger, "", steps=50))
    with pytest.raises(UserError, match="stitch-gap has no one policy to ask"):
        ensemble_dagger.train(arguments(ensemble_dagger, "", env="stitch-gap"))
