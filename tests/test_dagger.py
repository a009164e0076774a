"""DAgger's training against Algorithm 3.1 of its paper (Ross et al. 2011), and what its sisters' tests share."""

import dataclasses

import numpy as np
import pytest
import torch
from test_scripts import arguments
from update import Adam, assert_same, leaves, mlp, table, trace

from algorithms import dagger
from datasets import UserError, collect, find_task, load_expert

POLICY = collect.POLICIES / "hopper-0160000.npz"  # with which hopper-expert is collected
ROUND, LIMIT = 40, 22  # steps of a round; of an episode, unless the body falls before


def ask(obs):
    """The expert's mean action: obs (O,) -> (A,), from its file."""
    x, arrays = np.asarray(obs, np.float32), np.load(POLICY)
    weights = [arrays[name].astype(np.float32) for name in arrays]
    for i in (0, 2, 4):
        x = x @ weights[i].T + weights[i + 1]
        x = np.maximum(x, 0) if i < 4 else x
    return np.tanh(x[:3])


def traced_run(script, monkeypatch, rounds=3, **changes):
    """Of so many rounds; the networks act in float64 on what the environment gives in float32."""
    upright = {"healthy_angle_range": (-0.01, 0.01)}  # falls come soon
    task = dataclasses.replace(find_task("hopper-expert"), max_episode_steps=LIMIT, env_args=upright)
    monkeypatch.setattr(script, "find_task", lambda name: task)
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda layer, x: forward(layer, x.double()))
    changes |= dict(seed=2, steps=rounds * ROUND, round_steps=ROUND, updates=4, batch_size=16, lr=3e-3)
    return task, trace(script, monkeypatch, arguments(script, "", **changes))


def play(task, i, policy, gate):
    """Round i, as a list of steps (obs, expert's action, reward, next_obs, fell, who acted, whether the expert took the
    controls). policy: obs -> act; gate: (obs, act, label, whether the expert acted before) -> whether it acts now."""
    env, obs, steps = task.make_env(), None, []
    for t in range(i * ROUND, (i + 1) * ROUND):
        if obs is None:
            (obs, _), before = env.reset(seed=20_000_000 + t), False
        label, act = ask(obs), policy(torch.from_numpy(np.float32(obs)).double()[None])[0].detach().numpy()
        acts = gate(obs, act, label, before)
        next_obs, rew, terminated, truncated, _ = env.step(label if acts else act)
        steps.append((obs, label, rew, next_obs, terminated, acts, acts and not before))
        obs, before = None if terminated or truncated else next_obs, acts
    return steps


def rows_of(steps):
    return torch.tensor(np.array([np.concatenate([o, a, [r], n, [d]]) for o, a, r, n, d, *_ in steps]))


def assert_kept(traced, name, steps):
    """The buffer holds these steps, in order, in float32."""
    torch.testing.assert_close(traced.end[name]["rows"], rows_of(steps), rtol=1e-6, atol=1e-6)


def assert_drawn(batch, steps, shape=(16,)):
    """A batch of pairs of these steps."""
    assert batch.obs.shape == (*shape, 11)
    rows = table(*(column.flatten(0, len(shape) - 1) for column in batch))
    assert torch.cdist(rows, rows_of(steps)).amin(1).max() < 1e-5


def counts_of(steps, labels):
    acts, takes, falls = (np.array([step[k] for step in steps], bool) for k in (5, 6, 4))
    return {"labels": labels, "takeovers": takes.sum(), "policy_steps": (~acts).sum(), "falls": falls.sum()}


def test_update(monkeypatch):
    """Three rounds in which the expert acts always, half and a quarter of the time: falls, time-outs, cut episodes."""
    task, traced = traced_run(dagger, monkeypatch, decay=0.5)
    actor = leaves(traced.start["actor"])
    opt, steps = Adam(actor, 3e-3), []
    draws, batches = (x for _, x in traced.random), iter(traced.batches)
    for i, watched in enumerate(traced.watched):
        policy = lambda obs: mlp(actor, obs).tanh()
        steps += play(task, i, policy, lambda *_, i=i: next(draws).item() < 0.5**i)
        for _ in range(4):
            batch = next(batches)
            assert_drawn(batch, steps)
            loss = ((mlp(actor, batch.obs).tanh() - batch.act) ** 2).mean()
            opt.step(loss)
        assert_same(watched["actor_loss"], loss, f"round {i}")
        assert {name: watched[name].item() for name in list(watched)[1:]} == counts_of(steps, len(steps))
    assert len(steps) == 120 and next(batches, None) is next(draws, None) is None
    assert_same(actor, traced.end["actor"])
    assert_kept(traced, "buffer", steps)
    counts = counts_of(steps, 120)
    assert counts["falls"] > 2 and 9 < counts["takeovers"] < 40 and 20 < counts["policy_steps"] < 80


@pytest.mark.parametrize("decay, left", [(0.0, 20), (1.0, 0)])
def test_beta(decay, left, monkeypatch):
    """By default the expert acts in the first round alone; --decay 1 is a clone."""
    assert dagger.Args().decay == 0
    watched = []
    monkeypatch.setattr(dagger.Run, "watch", lambda run, losses: watched.append(losses["policy_steps"].item()))
    monkeypatch.setattr(dagger.Run, "_check_finite", lambda run, step: None)
    dagger.train(arguments(dagger, "", steps=40, decay=decay, updates=1))
    assert watched == [0, left]


def test_buffer_size(tmp_path):
    """The newest of what is labelled."""
    dagger.train(arguments(dagger, "", steps=40, updates=1, buffer_size=30))
    (path,) = tmp_path.rglob("checkpoint.pt")
    assert torch.load(path, weights_only=True)["state"]["buffer"]["rows"].shape == (30, 27)


def test_expert():
    """It is the policy that collects the task's data, or the file that is named, asked without its noise."""
    obs = np.random.default_rng(0).normal(size=(5, 11))
    for expert in (
        load_expert(find_task("hopper-expert")),
        load_expert(find_task("hopper-medium-replay"), str(POLICY)),
    ):
        np.testing.assert_allclose(expert(obs), [ask(row) for row in obs], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(expert(obs[0]), ask(obs[0]), rtol=1e-5, atol=1e-6)
    assert abs(load_expert(find_task("hopper-medium"))(obs) - expert(obs)).max() > 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(env="hopper-medium-replay"), "hopper-medium-replay has no one policy to ask, as hopper-expert has"),
        (dict(env="stitch-gap"), "stitch-gap has no one policy to ask"),
        (dict(env="antmaze-umaze"), "antmaze-umaze has no one policy to ask"),
        (dict(env="walker2d-expert", expert=str(POLICY)), "hopper-0160000.npz has another body than walker2d-expert"),
        (dict(env="ant-expert", expert=str(POLICY)), "hopper-0160000.npz has another body than ant-expert"),
        (dict(expert="nowhere.npz"), "There is no readable behaviour policy nowhere.npz"),
        (dict(env="hoper-expert"), "nearest names are hopper-expert"),
        (dict(steps=50), "--steps must be a multiple of --round-steps, 20, not 50"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(UserError, match=message):
        dagger.train(arguments(dagger, "", **dict(env="hopper-expert") | changes))
