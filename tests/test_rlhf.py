"""RLHF: its losses against NumPy, one whole run of its three steps against the papers' formulas, the closed form."""

import inspect
import itertools

import numpy as np
import pytest
import torch
from language import assert_resumes, checkpoint, hidden, log_prob, make_small, module, outputs, supervised, trace
from update import Adam, assert_same, leaves

from algorithms import dpo, rlhf
from datasets import UserError, text
from results.checkpoint import load_checkpoint


def test_same_as_dpo():
    """The supervised step is the other script's, so that both begin with the same model."""
    for name in ("Supervised", "Block", "Transformer", "sample", "log_probs", "supervised_loss", "supervised", "kl"):
        assert inspect.getsource(getattr(rlhf, name)) == inspect.getsource(getattr(dpo, name)), name


def test_reward_loss():
    """Bradley and Terry's, of the outputs at the answers' last tokens, which padding follows."""
    torch.manual_seed(0)
    net = rlhf.Transformer(16, 2, 1)
    tokens, mask = torch.randint(rlhf.VOCAB, (3, 2, 8)), torch.zeros(3, 2, 8, dtype=torch.bool)
    ends = [[5, 7], [8, 6], [4, 4]]
    for i, j in itertools.product(range(3), range(2)):
        mask[i, j, 3 : ends[i][j]] = True
    r = [[net(tokens[i, j, : ends[i][j]][None])[0, -1, 0].item() for j in range(2)] for i in range(3)]
    r = np.array(r, np.float64)
    expected = np.log1p(np.exp(r[:, 1] - r[:, 0])).mean()
    got = rlhf.reward_loss(text.Batch(tokens, mask), net).item()
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_advantages():
    """The sum over n of (1 - lam) lam^(n-1) times the n-step estimates, whose last is the whole return."""
    rng = np.random.default_rng(0)
    rew, value = rng.normal(size=(2, 5)), rng.normal(size=(2, 5))
    got = rlhf.advantages(rlhf.Args(gae_lambda=0.6), torch.tensor(rew), torch.tensor(value))
    after = np.concatenate([value, np.zeros((2, 1))], 1)
    for b, t in itertools.product(range(2), range(5)):
        steps = [rew[b, t : t + n].sum() + after[b, t + n] - value[b, t] for n in range(1, 6 - t)]
        weights = [0.4 * 0.6**n for n in range(len(steps) - 1)] + [0.6 ** (len(steps) - 1)]
        np.testing.assert_allclose(got[b, t].item(), np.dot(weights, steps), rtol=1e-12)


def test_actor_loss():
    new, old, adv = np.array([[0.0, -1.0, 0.5, 0.1]]), np.zeros((1, 4)), np.array([[1.0, -2.0, 3.0, -1.0]])
    ratio = np.exp(new - old)
    expected = -np.minimum(ratio * adv, np.clip(ratio, 0.8, 1.2) * adv).mean()
    got = rlhf.actor_loss(rlhf.Args(clip=0.2), *map(torch.tensor, (new, old, adv))).item()
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_transformer():
    """It is that of the definition, no token sees a later one, and a cache changes nothing."""
    torch.manual_seed(0)
    net, tokens = rlhf.Transformer(16, 2, 5).double(), torch.randint(rlhf.VOCAB, (3, 9))
    with torch.no_grad():
        expected = outputs(leaves(net.state_dict()), tokens)
        torch.testing.assert_close(net(tokens), expected)
        later = tokens.clone()
        later[:, 5:] = (later[:, 5:] + 1) % rlhf.VOCAB
        assert torch.equal(net(later)[:, :5], net(tokens)[:, :5])
        assert not torch.allclose(net(later)[:, 5], net(tokens)[:, 5])
        past = []
        parts = [net(tokens[:, :4], past)] + [net(tokens[:, i : i + 1], past) for i in range(4, 9)]
        torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_sample_and_kl(monkeypatch):
    """Answers come as often as the model says, and the mean of kl over them is the divergence, by enumeration."""
    make_small(rlhf, monkeypatch, signs=3, prompt=2, answer=2)
    torch.manual_seed(0)
    nets = [rlhf.Transformer(8, 1, 3).double() for _ in range(2)]
    for net in nets:
        torch.nn.init.normal_(net.head.weight, std=0.5)
    every = torch.tensor(list(itertools.product(range(3), repeat=2)))
    tokens = torch.cat([torch.tensor([[2, 0]]).expand(9, -1), every], 1)
    p, q = (log_prob(leaves(net.state_dict()), tokens)[:, 1:].sum(1).exp().detach() for net in nets)
    answers = rlhf.sample(nets[0], tokens[:1, :2].expand(40_000, -1))
    seen = torch.bincount(3 * answers[:, 0] + answers[:, 1], minlength=9) / 40_000
    assert (seen - p).abs().max() < 4 * (0.25 / 40_000) ** 0.5
    torch.testing.assert_close((p * rlhf.kl(tokens, *nets)).sum(), (p * (p / q).log()).sum())


def test_whole_run(tmp_path, monkeypatch, capsys):
    corpus = make_small(rlhf, monkeypatch)
    args = rlhf.Args(
        seed=3, steps=3, batch_size=5, lr=2e-3, eval_every=4, eval_episodes=7, device="cpu", prefs=20, sft_steps=30,
        offline_steps=5, reward_lr=5e-3, reward_width=8, beta=0.3, answers=11, epochs=2, clip=0.002, gae_lambda=0.7,
        value_weight=0.6,
    )  # fmt: skip
    traced = trace(rlhf, monkeypatch, args)
    params, losses = supervised(traced.start["sft"]["actor"], traced.random["sft"], corpus, 9, 30, Adam)
    assert_same(traced.end["sft"]["actor"], {name: x.detach() for name, x in params.items()}, "supervised")
    told = [loss["supervised_loss"].item() for name, loss in traced.losses if name == "sft"]
    np.testing.assert_allclose(told, losses, rtol=1e-9)
    assert [x.shape for _, x in traced.random["sft"]] == [(32, 1)] * 30
    windows = corpus.held_out[: len(corpus.held_out) // 9 * 9].view(-1, 9)
    torch.testing.assert_close(traced.reports[0][3]["held_out_loss"], -log_prob(params, windows).mean().detach())
    assert (tmp_path / "cache" / "sft" / "pydoc" / "text" / "seed=0,sft_steps=30").is_dir()
    reference, start = traced.end["sft"]["actor"], traced.start["rlhf"]
    assert_same(start["actor"], reference, "it begins with the supervised model")
    assert (start["value"]["weight"] == 0).all() and start["scale"].tolist() == [1, 0]
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    torch.nn.Linear(8, 1)
    fresh = rlhf.Transformer(8, 2, 1).state_dict()
    torch.set_default_dtype(torch.float32)
    assert start["reward"].keys() == fresh.keys()
    torch.testing.assert_close(start["reward"]["head.weight"], 20 * fresh["head.weight"])  # so large by trace
    data = text.load_pairs("text-preferences", corpus, module(reference), None)  # from the cache: nobody writes

    draws, told = iter(traced.random["rlhf"]), [loss for name, loss in traced.losses if name == "rlhf"]
    reward = leaves(start["reward"])
    r = lambda tokens: outputs(reward, tokens)[:, -1, 0]
    opt, seen = Adam(reward, 5e-3, decay=0.01), []
    for step in range(5):
        name, rows = next(draws)
        assert name == "randint" and rows.shape == (5,) and rows.max() < 20
        seen.append(rows)
        chosen, rejected = (r(x) for x in data.train.tokens[rows].unbind(1))
        loss = (1 + (rejected - chosen).exp()).log().mean()
        np.testing.assert_allclose(told[step]["loss"].item(), loss.item(), rtol=1e-9)
        opt.step(loss)
    assert torch.cat(seen).max() > 10
    # The gradient of a key's bias is 0 but for rounding, which Adam enlarges: hence atol.
    assert_same(
        traced.end["rlhf"]["reward"], {name: x.detach() for name, x in reward.items()}, "the reward model", atol=1e-9
    )
    with torch.no_grad():
        scores = r(data.train.tokens[:20].flatten(0, 1))
    torch.testing.assert_close(traced.end["rlhf"]["scale"], torch.stack([scores.std(), scores.mean()]))
    judge = lambda tokens: ((r(tokens) - scores.mean()) / scores.std()).detach()

    policy, V = leaves(start["actor"]), leaves(start["value"])
    both = {f"actor.{name}": x for name, x in policy.items()} | {f"value.{name}": x for name, x in V.items()}
    opt = Adam(both, 2e-3, eps=1e-5)
    log_pi = lambda tokens: log_prob(policy, tokens)[:, 3:]
    value = lambda tokens: (hidden(policy, tokens) @ V["weight"].T + V["bias"])[:, 3:-1, 0]
    answers = iter(traced.answers)
    next(answers), next(answers)  # of the pairs; of the evaluation after the reward model
    for step in range(5, 8):
        name, rows = next(draws)
        assert name == "randint" and rows.shape == (11,) and rows.max() < 30
        tokens = torch.cat([data.prompts[rows], next(answers)], 1)
        if step == 7:  # which is evaluated, as the last one
            last = next(answers)
        with torch.no_grad():
            old, v = log_pi(tokens), value(tokens)
            rew = -0.3 * (old - log_prob(reference, tokens)[:, 3:])
            rew[:, -1] += judge(tokens)
            after = torch.cat([v[:, 1:], torch.zeros(11, 1)], 1)
            delta = rew + after - v
            raw = torch.stack([sum(0.7 ** (k - t) * delta[:, k] for k in range(t, 3)) for t in range(3)], 1)
            ret, adv = raw + v, (raw - raw.mean()) / (raw.std() + 1e-8)
        for _ in range(2):
            name, order = next(draws)
            assert name == "randperm" and sorted(order.tolist()) == list(range(11))
            for some in (order[:5], order[5:10], order[10:]):
                ratio = (log_pi(tokens[some]) - old[some]).exp()
                gain = torch.minimum(ratio * adv[some], ratio.clamp(0.998, 1.002) * adv[some])
                loss_pi, loss_v = -gain.mean(), ((value(tokens[some]) - ret[some]) ** 2).mean()
                opt.step(loss_pi + 0.6 * loss_v, clip=1.0)
        np.testing.assert_allclose(told[step]["loss"].item(), (loss_pi + 0.6 * loss_v).item(), rtol=1e-9)
    assert next(draws, None) is None
    assert_same(traced.end["rlhf"]["actor"], {name: x.detach() for name, x in policy.items()}, "after PPO")
    assert_same(traced.end["rlhf"]["value"], {name: x.detach() for name, x in V.items()}, "its value")

    assert [(name, step) for name, step, *_ in traced.reports] == [("sft", 30), ("rlhf", 5), ("rlhf", 8)]
    _, _, golds, more = traced.reports[-1]
    prompts = data.test_prompts[:7]
    np.testing.assert_array_equal(golds, text.gold(text.decode(prompts), text.decode(last)))
    actor = rlhf.Transformer(8, 2, 6).double()
    actor.load_state_dict(traced.end["rlhf"]["actor"])
    torch.manual_seed(3)
    assert torch.equal(last, rlhf.sample(actor, prompts))
    tokens = torch.cat([prompts, last], 1)
    shown = f"{text.decode(prompts[0])}|{text.decode(last[0])}|  gold {golds[0]:.2f}, proxy {judge(tokens)[0]:.2f}"
    assert shown in capsys.readouterr().out
    torch.testing.assert_close(more["proxy"], judge(tokens).mean())
    p, q = (outputs(net, tokens)[:, 3:-1].softmax(-1) for net in (policy, reference))
    torch.testing.assert_close(more["kl"], (p * (p / q).log()).sum((1, 2)).mean())
    chosen, rejected = (r(x) for x in data.test.tokens.unbind(1))
    assert more["accuracy"] == (chosen > rejected).float().mean()


def test_closed_form(tmp_path, monkeypatch):
    """With the true reward PPO finds pi_ref exp(r / beta) / Z among 16 answers."""
    make_small(rlhf, monkeypatch, signs=4, answer=2, width=16, layers=1)
    every = torch.tensor(list(itertools.product(range(4), repeat=2)))  # (16, 2)
    tokens = torch.cat([torch.tensor([1, 2, 0, 3]).expand(16, -1), every], 1)
    rewards = torch.randn(16, generator=torch.Generator().manual_seed(1))
    log_chances = lambda net: rlhf.log_probs(net(tokens), tokens)[:, 3:].sum(1).detach()
    of_reference, load = [], text.load_pairs

    def load_and_look(env, corpus, actor, *words):
        of_reference.append(log_chances(actor))
        data = load(env, corpus, actor, *words)
        data.prompts = tokens[:1, :4]
        return data

    monkeypatch.setattr(text, "load_pairs", load_and_look)
    monkeypatch.setattr(rlhf, "score", lambda tokens, *_: rewards[4 * tokens[:, -2] + tokens[:, -1]])
    monkeypatch.setattr(rlhf, "reward_loss", lambda batch, reward: sum(x.sum() for x in reward.parameters()))
    common = dict(eval_every=10_000, device="cpu", prefs=20, sft_steps=60, offline_steps=1)
    rlhf.train(rlhf.Args(steps=60, answers=1024, batch_size=512, lr=3e-3, beta=0.5, **common))
    saved = load_checkpoint(checkpoint("rlhf", tmp_path / "runs"))["state"]
    best = (of_reference[0] + rewards / saved["scale"][0] / 0.5).log_softmax(0)  # beta weighs the scaled reward
    actor = rlhf.Transformer(16, 1, 4)
    actor.load_state_dict(saved["actor"])
    found = log_chances(actor)
    assert (best.exp() * (best - of_reference[0])).sum() > 0.5  # there is a way to go
    assert (found.exp() * (found - best)).sum() < 0.02


@pytest.mark.parametrize("name, at", [("sft", 2), ("rlhf", 1), ("rlhf", 3), ("rlhf", 5)])
def test_resume(name, at, tmp_path, monkeypatch):
    """Within each of the three steps."""
    words = {"offline_steps": 3, "answers": 8, "reward_width": 8, "device": "cpu"}
    assert_resumes(rlhf, name, at, tmp_path, monkeypatch, **words)


def test_bad_beta():
    with pytest.raises(UserError, match=r"--beta must be at least 0, not -0.1\."):
        rlhf.train(rlhf.Args(beta=-0.1, device="cpu"))
