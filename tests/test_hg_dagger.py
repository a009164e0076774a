"""HG-DAgger's training against Algorithm 1 of its paper (Kelly et al. 2019); see test_dagger.py for what is shared."""

import dataclasses

import numpy as np
import pytest
import torch
from test_dagger import assert_drawn, assert_kept, counts_of, play, traced_run
from test_scripts import arguments
from update import Adam, assert_same, leaves, mlp

from algorithms import hg_dagger
from datasets import UserError


def members(params):
    """The parameters of each network of an ensemble."""
    return [{key: x for key, x in params.items() if key.startswith(f"nets.{n}.")} for n in range(5)]


def test_ensemble():
    """Five networks of their own, the mean of which acts; the doubt is the norm of their variances."""
    torch.manual_seed(0)
    actor, obs = hg_dagger.Actor(4, 2), torch.randn(6, 4)
    each = np.array([mlp(own, obs).tanh().detach().numpy() for own in members(actor.state_dict())])  # (5, 6, 2)
    assert each.std(0).min() > 1e-3
    np.testing.assert_allclose(actor(obs).detach(), each, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hg_dagger.policy(obs, actor).detach(), each.mean(0), rtol=1e-5, atol=1e-6)
    doubt = [np.linalg.norm(np.diag(np.cov(each[:, b].T))) for b in range(6)]
    np.testing.assert_allclose(hg_dagger.doubt_of(actor(obs)).detach(), doubt, rtol=1e-4)


def test_threshold():
    assert hg_dagger.threshold_of(torch.tensor([9.0, 9, 9, 9, 9, 9, 1, 3])).item() == 2
    assert hg_dagger.threshold_of(torch.tensor([9.0, 4, 3])).item() == 3
    assert hg_dagger.threshold_of(torch.tensor([])).item() == 0


def test_update(monkeypatch):
    """Three rounds, of which the expert has the first; then it takes over and gives back, at other distances."""
    task, traced = traced_run(hg_dagger, monkeypatch, take_over=0.45, give_back=0.3)
    actor = leaves(traced.start["actor"])
    opts, steps, data, doubts = [Adam(own, 3e-3) for own in members(actor)], [], [], []
    each = lambda obs: torch.stack([mlp(own, obs).tanh() for own in members(actor)])  # (5, B, 3)
    held, batches = [], iter(traced.batches)

    def gate(obs, act, label, before, i):
        off = np.sum((act - label) ** 2)
        acts = i == 0 or off > (0.3 if before else 0.45)
        held.append(before and 0.3 < off < 0.45)
        if i and acts and not before:
            x = torch.from_numpy(np.float32(obs)).double()[None]
            doubts.append(np.linalg.norm(each(x)[:, 0].detach().numpy().var(0, ddof=1)))
        return acts

    for i, watched in enumerate(traced.watched):
        steps += play(task, i, lambda obs: each(obs).mean(0), lambda *words, i=i: gate(*words, i))
        data = [step for step in steps if step[5]]
        for _ in range(4):
            batch, losses = next(batches), []
            assert_drawn(batch, data, (5, 16))
            for n, (opt, own) in enumerate(zip(opts, members(actor))):
                losses.append(((mlp(own, batch.obs[n]).tanh() - batch.act[n]) ** 2).mean())
                opt.step(losses[-1])
        assert_same(watched["actor_loss"], sum(losses), f"round {i}")
        assert {name: watched[name].item() for name in list(watched)[1:5]} == counts_of(steps, len(data))
        last = doubts[int(0.75 * len(doubts)) :]
        assert watched["doubt_threshold"].item() == pytest.approx(np.mean(last) if last else 0, rel=1e-9)
    assert next(batches, None) is None and not traced.random
    assert_same(actor, traced.end["actor"])
    assert_kept(traced, "buffer", data)
    counts = counts_of(steps, len(data))
    assert 40 < counts["labels"] < 110 and counts["falls"] > 2 and len(doubts) > 4 and any(held)


def test_steps_stay(tmp_path):
    """As many doubts are kept as there are steps; more steps would be another run."""
    args = arguments(hg_dagger, "", steps=40, updates=1)
    hg_dagger.train(args)
    (path,) = tmp_path.rglob("checkpoint.pt")
    assert torch.load(path, weights_only=True)["state"]["doubts"].shape == (40,)
    with pytest.raises(UserError, match="Cannot resume .* with other arguments: steps was 40"):
        hg_dagger.train(dataclasses.replace(args, steps=60, resume=True))


def test_buffer_size(tmp_path):
    """The newest of what is labelled, here all."""
    hg_dagger.train(arguments(hg_dagger, "", steps=40, updates=1, buffer_size=30, take_over=0.0, give_back=0.0))
    (path,) = tmp_path.rglob("checkpoint.pt")
    assert torch.load(path, weights_only=True)["state"]["buffer"]["rows"].shape == (30, 27)


def test_bad_input():
    with pytest.raises(UserError, match="--steps must be a multiple of --round-steps, 20, not 50"):
        hg_dagger.train(arguments(hg_dagger, "", steps=50))
    with pytest.raises(UserError, match="stitch-gap has no one policy to ask"):
        hg_dagger.train(arguments(hg_dagger, "", env="stitch-gap"))
