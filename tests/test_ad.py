import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_scripts import assert_equal, checkpoint_of, stopped, trained
from update import Adam, assert_same, leaves, trace

from algorithms import ad
from datasets import UserError, dark_room

ARGS = ad.Args(env="dark-room-5", steps=8, batch_size=6, eval_every=4, eval_episodes=2, device="cpu", warmup=3)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Histories of five episodes of the twenty tasks, made in no time."""
    monkeypatch.setattr(dark_room.SmallDarkRoom, "episodes", 50)


def transformer(p, obs, last_act, last_rew):
    """The logits of weights p, one head and one place after the other: (B, K) each -> (B, K, 5)."""
    norm = lambda x, name: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]
        + p[f"{name}.bias"]
    )
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    K = obs.shape[1]
    x = p["row.weight"][obs // 5] + p["column.weight"][obs % 5]
    x = x + p["act.weight"][last_act] + linear(last_rew[..., None], "rew") + p["place.weight"][:K]
    for i in range(2):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.qkv")
        heads = []
        for head in range(4):
            q, k, v = (qkv[..., 64 * j + 16 * head :][..., :16] for j in range(3))
            rows = []
            for t in range(K):
                weight = (q[:, t, None] @ k[:, : t + 1].transpose(1, 2) / 4).softmax(-1)
                rows.append(weight @ v[:, : t + 1])
            heads.append(torch.cat(rows, 1))
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.out")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.0")
        x = x + linear(h * (1 + torch.erf(h / math.sqrt(2))) / 2, f"blocks.{i}.mlp.2")
    return linear(norm(x, "norm"), "head")


@pytest.mark.parametrize("context, clip", [(1, 1.0), (2, 0.05)])
def test_update(context, clip, monkeypatch):
    """Eight steps: windows, what came before each step, cross-entropy, clipping, warm-up and cosine, Adam."""
    args = dataclasses.replace(ARGS, context=context, clip=clip, lr=2e-3)
    load = dark_room.load_histories

    def load_double(*words):
        data = load(*words)
        data.rew = data.rew.double()
        data.rows = data.rew  # for the trace
        return data

    monkeypatch.setattr(dark_room, "load_histories", load_double)
    monkeypatch.setattr(ad, "learn_in_context", lambda world, episodes, *_: torch.zeros(world.n, episodes))
    traced = trace(ad, monkeypatch, args)
    data, params = load("dark-room-5"), leaves(traced.start["actor"])
    opt, draws, K, starts = Adam(params, 2e-3 / 3, betas=(0.9, 0.99)), (x for _, x in traced.random), 10 * context, []
    for step in range(8):
        history, first = next(draws), next(draws)
        assert first.shape == history.shape == (6, 1) and first.min() > -K and first.max() <= 50 - K
        obs, last_act, last_rew, act = [], [], [], []
        for h, start in zip(history[:, 0].tolist(), first[:, 0].clamp(min=0).tolist()):
            starts.append(start)
            span = range(start, start + K)
            obs.append([data.obs[h, t] for t in span])
            last_act.append([data.act[h, t - 1] if t else 5 for t in span])
            last_rew.append([data.rew[h, t - 1] if t else 0 for t in span])
            act.append([data.act[h, t] for t in span])
        logits = transformer(params, torch.tensor(obs), torch.tensor(last_act), torch.tensor(last_rew).double())
        loss = -logits.log_softmax(-1).gather(-1, torch.tensor(act)[..., None]).mean()
        assert_same(loss, traced.watched[step]["actor_loss"])
        opt.step(loss, clip)
        done = torch.tensor(step + 1.0, dtype=torch.float32)
        cosine = (1 + torch.cos(math.pi * done / 8)) / 2
        opt.lr = (2e-3 * torch.minimum((done + 1) / 3, cosine)).item()
    assert next(draws, None) is None and starts.count(0) > 3 and max(starts) > 0
    assert_same(params, traced.end["actor"], atol=1e-9)  # some gradients, of keys' biases, are rounding alone


def test_windows_begin_at_the_start():
    """As often as if a history had `context` empty steps before it: of 50 steps, with windows of 10, in a fifth."""
    data = dark_room.load_histories("dark-room-5")
    steps = torch.arange(50).expand(len(data.obs), 50)
    data.obs, rew = steps, torch.zeros(steps.shape)
    seq, _ = ad.sample(dataclasses.replace(ARGS, batch_size=20_000), data, steps, rew, 10)
    assert (seq.obs.diff() == 1).all() and seq.obs.max() == 49
    assert (seq.obs[:, 0] == 0).float().mean().item() == pytest.approx(10 / 50, abs=0.02)


def test_no_step_sees_a_later_one():
    torch.manual_seed(0)
    actor = ad.Actor(25, 5, 8)
    seq = ad.Sequence(torch.randint(25, (3, 8)), torch.randint(6, (3, 8)), torch.rand(3, 8))
    before = actor(seq)
    for column in seq:
        other = column.clone()
        other[:, 5] += 1 if other.is_floating_point() else -other[:, 5] + (other[:, 5] + 1) % 5
        after = actor(ad.Sequence(*(other if x is column else x for x in seq)))
        assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


class Counter:
    """A world whose rewards are the acts, and whose observation counts the steps; two steps an episode."""

    n, n_actions, length = 2, 5, 2

    def __init__(self):
        self.obs, self.acts = np.zeros(2, np.int64), []

    def step(self, act):
        self.obs = self.obs + 1
        self.acts.append(act)
        return act.astype(float)


def test_learn_in_context():
    """The window is that of the last steps, with the act and the reward before each; returns are sums of episodes."""
    asked = []

    def actor(seq):
        asked.append(seq)
        return torch.full((2, seq.obs.shape[1], 5), -1e9).index_fill(2, torch.tensor([len(asked) % 5]), 0.0)

    actor.head = SimpleNamespace(weight=torch.zeros(1))
    world = Counter()
    returns = ad.learn_in_context(world, 3, 4, actor)
    assert returns.tolist() == 2 * [[1 + 2, 3 + 4, 0 + 1]]
    assert asked[0].obs.tolist() == [[0], [0]] and asked[0].last_act.tolist() == [[5], [5]]
    assert asked[-1].obs[0].tolist() == [2, 3, 4, 5]
    assert asked[-1].last_act[0].tolist() == [2, 3, 4, 0] and asked[-1].last_rew[1].tolist() == [2, 3, 4, 0]


def test_resume_is_exact(tmp_path, monkeypatch):
    """Stopped by Ctrl-C after step 4: the end is that of a run undisturbed, evaluations included."""
    whole = trained(tmp_path, monkeypatch, "whole", (ad.train, ARGS))
    again = dataclasses.replace(ARGS, resume=True)
    parts = trained(tmp_path, monkeypatch, "parts", (stopped(ad.train, 4), ARGS), (ad.train, again))
    for saved in (whole, parts):
        del saved["args"], saved["seconds"], saved["eval_seconds"]
    assert_equal(whole, parts)
    assert checkpoint_of(tmp_path / "parts").exists()


def test_learning(tmp_path, monkeypatch):
    """Of an expert's histories, whose first act already says where the goal is, it learns to go where it went."""
    tasks = np.array([10, 14])  # two steps to the left, two to the right
    monkeypatch.setattr(dark_room.SmallDarkRoom, "all_tasks", classmethod(lambda cls, rng: (tasks, tasks)))
    args = dataclasses.replace(
        ARGS, history="noise", steps=100, batch_size=32, lr=3e-3, eval_every=100, eval_episodes=20
    )
    ad.train(args)
    (record,) = (tmp_path / "runs").rglob("record-*.json")
    end = json.loads(record.read_text())["curve"][-1]
    assert np.mean(end["returns"]) > 1.5 * end["losses"]["first"]


def test_bad_input():
    with pytest.raises(UserError, match="Unknown --env 'dark'"):
        ad.train(dataclasses.replace(ARGS, env="dark"))
    for context in (0, 6):
        with pytest.raises(UserError, match=f"--context must be .* not {10 * context}"):
            ad.train(dataclasses.replace(ARGS, context=context))
