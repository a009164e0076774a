"""SafeDAgger's training against Algorithm 1 of its paper (Zhang & Cho 2017); see test_dagger.py for what is shared."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_dagger import assert_drawn, assert_kept, counts_of, play, traced_run
from test_scripts import arguments
from update import Adam, assert_same, leaves, mlp

from algorithms import safe_dagger
from datasets import Batch, UserError


def test_safety_loss():
    """Danger is a squared distance of the actions above max_off, which moves the classifier and not the policy."""
    torch.manual_seed(0)
    obs, act, rew = torch.randn(6, 4), torch.randn(6, 2), torch.zeros(6)
    actor, safety = torch.nn.Linear(4, 2), torch.nn.Linear(4, 1)
    off = ((actor(obs).detach().numpy() - act.numpy()) ** 2).sum(1)
    max_off = np.sort(off)[2:4].mean()
    p = 1 / (1 + np.exp(-safety(obs).detach().numpy()[:, 0].astype(np.float64)))
    expected = -np.mean(np.where(off > max_off, np.log(p), np.log(1 - p)))
    loss = safe_dagger.safety_loss(safe_dagger.Args(max_off=max_off), Batch(obs, act, rew, obs, rew), actor, safety)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert actor.weight.grad is None and safety.weight.grad.abs().sum() > 0


def test_update(monkeypatch):
    """Three rounds, of which the expert has the first: half of it is for the classifier alone."""
    max_off = 0.7
    task, traced = traced_run(safe_dagger, monkeypatch, max_off=max_off)
    actor, safety = (leaves(traced.start[name]) for name in ("actor", "safety"))
    assert [len(x) for x in safety.values()] == [256, 256, 256, 256, 1, 1]
    actor_opt, safety_opt, steps, data, judged = Adam(actor, 3e-3), Adam(safety, 3e-3), [], [], []
    policy, batches = lambda obs: mlp(actor, obs).tanh(), iter(traced.batches)
    unsafe = lambda obs: mlp(safety, torch.from_numpy(np.float32(obs)).double()).item() > 0
    for i, watched in enumerate(traced.watched):
        new = play(task, i, policy, lambda obs, *_, i=i: i == 0 or unsafe(obs))
        steps += new
        asked = [step for step in new if step[5]]
        judged, data = judged + asked, data + (asked if i else asked[:20])
        for _ in range(4):
            batch = next(batches)
            assert_drawn(batch, data)
            actor_loss = ((policy(batch.obs) - batch.act) ** 2).mean()
            actor_opt.step(actor_loss)
        for _ in range(4):
            batch = next(batches)
            assert_drawn(batch, judged)
            label = (((policy(batch.obs) - batch.act) ** 2).sum(1) > max_off).double()
            safety_loss = F.binary_cross_entropy(mlp(safety, batch.obs)[:, 0].sigmoid(), label)
            safety_opt.step(safety_loss)
        assert_same(
            {"actor_loss": actor_loss, "safety_loss": safety_loss}, dict(list(watched.items())[:2]), f"round {i}"
        )
        assert {name: watched[name].item() for name in list(watched)[2:]} == counts_of(steps, len(judged))
    assert next(batches, None) is None and not traced.random
    assert_same(actor, traced.end["actor"])
    assert_same(safety, traced.end["safety"])
    assert_kept(traced, "buffer", data)
    assert_kept(traced, "judged", judged)
    counts = counts_of(steps, len(judged))
    assert 40 < counts["labels"] < 110 and counts["policy_steps"] == 120 - len(judged) and counts["falls"] > 2


def test_buffer_size(tmp_path):
    """The newest of what is labelled, of both; the expert's round of 20 steps is half for the classifier alone."""
    safe_dagger.train(arguments(safe_dagger, "", steps=20, updates=1, buffer_size=9))
    (path,) = tmp_path.rglob("checkpoint.pt")
    state = torch.load(path, weights_only=True)["state"]
    assert [state[name]["rows"].shape for name in ("buffer", "judged")] == [(9, 27)] * 2


def test_bad_input():
    with pytest.raises(UserError, match="--steps must be a multiple of --round-steps, 20, not 50"):
        safe_dagger.train(arguments(safe_dagger, "", steps=50))
    with pytest.raises(UserError, match="stitch-gap has no one policy to ask"):
        safe_dagger.train(arguments(safe_dagger, "", env="stitch-gap"))
