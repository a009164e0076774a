"""BC's whole update: supervised learning of the actions, and which pairs of the data it learns from."""

import dataclasses

import numpy as np
import pytest
import torch
from test_scripts import arguments, assert_equal, trained
from update import Adam, assert_same, columns, episodes, leaves, mlp, table, trace

from algorithms import bc
from datasets import Batch, UserError, load
from results.checkpoint import load_agent
from results.policies import load_policies


def test_update(small, monkeypatch):
    traced = trace(bc, monkeypatch, arguments(bc, small, steps=8, batch_size=16, lr=1e-3))
    assert_rows(traced.rows, small, np.arange(len(columns(small)[0])))
    actor = leaves(traced.start["actor"])
    opt = Adam(actor, 1e-3)
    assert len(traced.batches) == 8 and not traced.random
    for batch in traced.batches:
        assert batch.obs.shape == (16, 11)
        opt.step(((mlp(actor, batch.obs).tanh() - batch.act) ** 2).mean())
    assert_same(actor, traced.end["actor"])


def test_gaussian_loss():
    """The negative log-density of N(mean, std^2), less its constant; the deviation is bounded."""
    torch.manual_seed(0)
    obs, act, rew = torch.randn(6, 4), torch.randn(6, 2), torch.zeros(6)
    actor, deviation = bc.Actor(4, 2), lambda obs: 9 * obs[:, :2]
    mean, log_std = actor(obs).detach().numpy().astype(np.float64), 9 * obs.numpy()[:, :2].astype(np.float64)
    assert log_std.min() < -5 and log_std.max() > 2
    std = np.exp(np.clip(log_std, -5, 2))
    log = -0.5 * ((act.numpy() - mean) / std) ** 2 - np.log(std)
    loss = bc.gaussian_loss(Batch(obs, act, rew, obs, rew), actor, deviation)
    assert loss.item() == pytest.approx(-np.mean(np.sum(log, 1)), rel=1e-5)


def test_gaussian_update(small, monkeypatch):
    """Mean and deviation, two networks, maximise the likelihood; the mean starts as the deterministic policy does."""
    args = arguments(bc, small, steps=8, batch_size=16, lr=1e-3, policy="gaussian")
    traced = trace(bc, monkeypatch, args)
    actor, deviation = leaves(traced.start["actor"]), leaves(traced.start["deviation"])
    assert [len(x) for x in deviation.values()] == [256, 256, 256, 256, 3, 3]
    opts = Adam(actor, 1e-3), Adam(deviation, 1e-3)
    for batch in traced.batches:
        pi = torch.distributions.Normal(mlp(actor, batch.obs).tanh(), mlp(deviation, batch.obs).exp())
        loss = -pi.log_prob(batch.act).sum(1).mean() - 1.5 * np.log(2 * np.pi)
        for opt in opts:
            opt.step(loss)
    assert_same(traced.watched[-1]["actor_loss"], loss)
    assert_same(actor, traced.end["actor"])
    assert_same(deviation, traced.end["deviation"])
    plain = trace(bc, monkeypatch, arguments(bc, small, steps=1))
    assert_same(plain.start["actor"], traced.start["actor"])


@pytest.mark.parametrize("seeds", [1, 2])
def test_gaussian_resumes(seeds, small, tmp_path, monkeypatch):
    args = arguments(bc, small, steps=20, batch_size=16, policy="gaussian", seeds=seeds)
    whole = trained(tmp_path, monkeypatch, "whole", (bc.train, args))
    parts = (bc.train, dataclasses.replace(args, steps=10)), (bc.train, dataclasses.replace(args, resume=True))
    parts = trained(tmp_path, monkeypatch, "parts", *parts)
    assert_equal(whole["state"], parts["state"])
    shapes = [x.shape for x in whole["state"]["deviation"].values()]
    assert all(shape[0] == 2 for shape in shapes) if seeds == 2 else shapes[0] == (256, 11)
    if seeds == 1:  # a policy to be valued has both
        data = load(str(small))
        (policy,) = load_policies([next((tmp_path / "whole").rglob("checkpoint.pt"))], data)
        x = (data.obs[:5] - whole["obs_mean"]) / whole["obs_std"]
        net = whole["state"]["actor"], whole["state"]["deviation"]
        mean, log_std = mlp(net[0], x).tanh(), mlp(net[1], x).clamp(-5, 2)
        expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(data.act[:5]).sum(1)
        torch.testing.assert_close(policy.log_prob(data.obs[:5], data.act[:5]), expected)


def test_discrete_update(small, monkeypatch):
    """Cross-entropy, of observations as they are."""
    path = small.with_name("cartpole.hdf5")
    traced = trace(bc, monkeypatch, arguments(bc, path, steps=8, batch_size=16, lr=1e-3))
    torch.testing.assert_close(traced.rows, table(*columns(path)), rtol=1e-9, atol=1e-9)
    actor = leaves(traced.start["actor"])
    assert [len(x) for x in actor.values()] == [256, 256, 256, 256, 2, 2]
    opt = Adam(actor, 1e-3)
    for batch in traced.batches:
        chances = mlp(actor, batch.obs).exp()
        taken = chances[range(16), batch.act] / chances.sum(1)
        opt.step(-taken.log().mean())
    assert_same(traced.watched[-1]["actor_loss"], -taken.log().mean())
    assert_same(actor, traced.end["actor"])


@pytest.mark.parametrize("seeds", [1, 2])
def test_discrete_resumes(seeds, small, tmp_path, monkeypatch):
    """And what is evaluated is the likeliest action; a policy to be valued has its probabilities."""
    path = small.with_name("cartpole.hdf5")
    args = arguments(bc, path, steps=20, batch_size=16, seeds=seeds, eval_episodes=3)
    whole = trained(tmp_path, monkeypatch, "whole", (bc.train, args))
    parts = (bc.train, dataclasses.replace(args, steps=10)), (bc.train, dataclasses.replace(args, resume=True))
    parts = trained(tmp_path, monkeypatch, "parts", *parts)
    assert_equal(whole["state"], parts["state"])
    checkpoint = next((tmp_path / "whole").rglob("checkpoint.pt"))
    _, _, data, act = load_agent(checkpoint)
    returns = data.evaluate(act, 3, args.seed, seeds)
    np.testing.assert_array_equal(np.atleast_2d(returns), whole["curve"][-1]["returns"])
    if seeds == 1:
        obs = torch.randn(5, 4)
        net = bc.classifier(4, 2)
        net.load_state_dict(whole["state"]["actor"])
        assert torch.equal(act(obs), net(obs).argmax(1))
        (policy,) = load_policies([checkpoint], load(str(path), discrete=True))
        torch.testing.assert_close(policy.probs(obs), net(obs).softmax(1))


def test_gaussian_is_continuous(small):
    with pytest.raises(UserError, match="--policy gaussian is for continuous actions, and .* has 2 discrete ones"):
        bc.train(arguments(bc, small.with_name("cartpole.hdf5"), steps=1, policy="gaussian"))


@pytest.mark.parametrize("changes", [dict(top_fraction=0.3), dict(demos=1), dict(top_fraction=0.6, demos=2)])
def test_pairs(changes, small, monkeypatch):
    """The best trajectories by return, the best first; of those, demonstrations drawn by the seed, thinned out."""
    traced = trace(bc, monkeypatch, arguments(bc, small, steps=1, seed=5, every=7, **changes))
    rew = columns(small)[2]
    spans = [np.arange(len(rew))[span] for span in episodes(small)]
    if fraction := changes.get("top_fraction"):
        spans.sort(key=lambda span: -rew[span].sum())
        spans = spans[: int(fraction * len(spans))]
    if demos := changes.get("demos"):
        rng = np.random.default_rng(5)
        spans = [spans[i] for i in rng.choice(len(spans), demos, replace=False)]
        spans = [span[rng.integers(min(7, len(span))) :: 7] for span in spans]
    assert_rows(traced.rows, small, np.concatenate(spans))


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_bad_fraction(fraction, small):
    with pytest.raises(UserError, match=rf"--top-fraction must lie in \(0, 1\], not {fraction}"):
        bc.train(arguments(bc, small, steps=1, top_fraction=fraction))


def assert_rows(rows, path, kept):
    """The data are these rows of the file, (obs - mean) / (std + 1e-3) of these rows."""
    obs, act, rew, next_obs, done = (column[kept] for column in columns(path))
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    expected = table((obs - mean) / std, act, rew, (next_obs - mean) / std, done)
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-9)
