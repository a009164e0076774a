"""DPO: its losses against NumPy, the gradient of Eq. 7, one whole run against the paper's formulas, the closed form."""

import itertools

import numpy as np
import pytest
import torch
from language import assert_resumes, checkpoint, log_prob, make_small, module, outputs, supervised, trace
from update import Adam, assert_same

from algorithms import dpo
from datasets import UserError, text
from results.checkpoint import load_checkpoint


def test_losses():
    h = np.array([-30.0, -1.0, 0.0, 0.5, 4.0])
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))
    for eps in (0.0, 0.2):
        expected = -((1 - eps) * log_sigmoid(0.3 * h) + eps * log_sigmoid(-0.3 * h)).mean()
        args = dpo.Args(beta=0.3, label_smoothing=eps)
        np.testing.assert_allclose(dpo.preference_loss(args, torch.tensor(h)).item(), expected, rtol=1e-12)
    expected = ((h - 1 / 0.6) ** 2).mean()
    args = dpo.Args(beta=0.3, loss="ipo")
    np.testing.assert_allclose(dpo.preference_loss(args, torch.tensor(h)).item(), expected, rtol=1e-12)


def test_gradient():
    """-beta sigmoid(r(rejected) - r(chosen)) (grad log pi(chosen) - grad log pi(rejected)), which follows Eq. 7."""
    logits = torch.tensor([0.3, -0.2, 1.1, 0.4], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()
    ratio = logits.log_softmax(0) - reference
    dpo.preference_loss(dpo.Args(beta=0.7), (ratio[2] - ratio[1])[None]).backward()
    grad_log = torch.eye(4, dtype=torch.float64) - logits.detach().softmax(0)  # (answer, logit)
    weight = torch.sigmoid(0.7 * (ratio[1] - ratio[2])).item()
    torch.testing.assert_close(logits.grad, -0.7 * weight * (grad_log[2] - grad_log[1]))


def test_only_the_answer_counts():
    """Neither the prompt nor the padding after an answer is part of its log-probability; both change nothing."""
    torch.manual_seed(0)
    net = dpo.Transformer(16, 1, dpo.VOCAB)
    tokens = torch.randint(dpo.VOCAB, (1, 2, 9))
    mask = torch.zeros(1, 2, 9, dtype=torch.bool)
    mask[0, 0, 3:7] = mask[0, 1, 3:6] = True
    got = dpo.answer_log_probs(text.Batch(tokens, mask), net)
    p = net(tokens[0]).log_softmax(-1)
    expected = [sum(p[i, t - 1, tokens[0, i, t]] for t in range(3, end)) for i, end in ((0, 7), (1, 6))]
    torch.testing.assert_close(got[0], torch.stack(expected))
    after = tokens.clone()
    after[0, 0, 7:] = (after[0, 0, 7:] + 1) % dpo.VOCAB
    torch.testing.assert_close(dpo.answer_log_probs(text.Batch(after, mask), net), got)


@pytest.mark.parametrize("loss, eps", [("dpo", 0.1), ("ipo", 0.0)])
def test_whole_run(loss, eps, tmp_path, monkeypatch, capsys):
    corpus = make_small(dpo, monkeypatch)
    args = dpo.Args(
        seed=3, steps=25, batch_size=5, lr=3e-3, eval_every=25, eval_episodes=7, device="cpu", prefs=20, sft_steps=30,
        loss=loss, beta=0.4, label_smoothing=eps, clip=0.05,
    )  # fmt: skip
    traced = trace(dpo, monkeypatch, args)

    draws = traced.random["sft"]
    assert [x.shape for _, x in draws] == [(32, 1)] * 30 and max(x.max() for _, x in draws) < len(corpus.train) - 9
    params, losses = supervised(traced.start["sft"]["actor"], draws, corpus, 9, 30, Adam)
    assert_same(traced.end["sft"]["actor"], {name: x.detach() for name, x in params.items()}, "supervised")
    told = [loss["supervised_loss"].item() for name, loss in traced.losses if name == "sft"]
    np.testing.assert_allclose(told, losses, rtol=1e-9)
    windows = corpus.held_out[: len(corpus.held_out) // 9 * 9].view(-1, 9)
    name, step, _, more = traced.reports[0]
    assert (name, step) == ("sft", 30)
    torch.testing.assert_close(more["held_out_loss"], -log_prob(params, windows).mean().detach())

    assert_same(traced.start["dpo"]["actor"], traced.end["sft"]["actor"], "it begins with the supervised model")
    reference = {name: x.detach() for name, x in params.items()}
    answers = torch.cat(traced.answers[:1])  # of all pairs; later ones are of evaluations
    data = text.load_pairs("text-preferences", corpus, module(traced.end["sft"]["actor"]), None)  # from the cache
    assert {tuple(x) for x in answers.tolist()} >= {tuple(x) for x in data.train.tokens[..., 4:].flatten(0, 1).tolist()}
    params = {name: x.clone().requires_grad_() for name, x in reference.items()}
    opt, rows = Adam(params, 0.0), [x for name, x in traced.random["dpo"] if name == "randint"]
    assert len(rows) == 25 and all(x.shape == (5,) for x in rows) and 10 < torch.cat(rows).max() < 20
    torch.manual_seed(3)
    assert torch.equal(rows[0], torch.randint(20, (5,)))
    assert (tmp_path / "cache" / "sft" / "pydoc" / "text" / "seed=0,sft_steps=30").is_dir()
    told = [loss[f"{loss_}_loss"].item() for name, loss in traced.losses if name == "dpo" for loss_ in (args.loss,)]
    for step, drawn in enumerate(rows, 1):
        tokens = data.train.tokens[drawn]
        ratio = lambda tokens: (log_prob(params, tokens) - log_prob(reference, tokens))[:, 3:].sum(1)
        h = ratio(tokens[:, 0]) - ratio(tokens[:, 1])
        sure = torch.sigmoid(0.4 * h)
        expected = -((1 - eps) * sure.log() + eps * (1 - sure).log()).mean()
        expected = ((h - 1 / 0.8) ** 2).mean() if loss == "ipo" else expected
        np.testing.assert_allclose(told[step - 1], expected.item(), rtol=1e-9)
        opt.lr = 3e-3 * min(step / 20, 1)
        opt.step(expected, clip=0.05)
    assert_same(traced.end["dpo"]["actor"], {name: x.detach() for name, x in params.items()}, "after DPO")

    name, step, golds, more = traced.reports[-1]
    assert (name, step) == ("dpo", 25) and len(traced.reports) == 2
    prompts = data.test_prompts[:7]
    actor = dpo.Transformer(8, 2, 6).double()
    actor.load_state_dict(traced.end["dpo"]["actor"])
    torch.manual_seed(3)
    assert torch.equal(traced.answers[1], dpo.sample(actor, prompts))
    shown = f"{text.decode(prompts[0])}|{text.decode(traced.answers[1][0])}|  gold {golds[0]:.2f}"
    assert shown in capsys.readouterr().out
    np.testing.assert_array_equal(golds, text.gold(text.decode(prompts), text.decode(traced.answers[1])))
    held_out = [(log_prob(params, x) - log_prob(reference, x))[:, 3:].sum(1) for x in data.test.tokens.unbind(1)]
    torch.testing.assert_close(more["margin"], 0.4 * (held_out[0] - held_out[1]).mean())
    torch.testing.assert_close(more["chosen"], held_out[0].mean())
    assert more["accuracy"] == (held_out[0] > held_out[1]).float().mean()
    tokens = torch.cat([prompts, traced.answers[1]], 1)
    p, q = (outputs(net, tokens)[:, 3:-1].softmax(-1) for net in (params, reference))
    torch.testing.assert_close(more["kl"], (p * (p / q).log()).sum((1, 2)).mean())


def test_closed_form(tmp_path, monkeypatch):
    """With unlimited pairs of a judge whose reward is known, DPO finds pi_ref exp(r) / Z among 16 answers, beta = 1."""
    make_small(dpo, monkeypatch, signs=4, answer=2, width=16, layers=1)
    every = torch.tensor(list(itertools.product(range(4), repeat=2)))  # (16, 2)
    prompt = torch.tensor([1, 2, 0, 3]).expand(16, -1)
    tokens = torch.cat([prompt, every], 1)
    rewards = torch.randn(16, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 4:] = True
    chances = {}

    def log_chances(net):
        return dpo.log_probs(net(tokens), tokens)[:, 3:].sum(1)

    def pairs(data, number):
        two = torch.multinomial(chances["of pi_ref"], 2 * number, replacement=True).view(-1, 2)
        first = torch.rand(number) < torch.sigmoid(rewards[two[:, 0]] - rewards[two[:, 1]])
        two = torch.where(first[:, None], two, two.flip(1))
        return text.Batch(tokens[two], mask.expand(number, -1, -1))

    monkeypatch.setattr(text.Pairs, "sample", pairs)
    load = text.load_pairs

    def load_and_look(env, corpus, actor, *words):
        chances["of pi_ref"] = log_chances(actor).detach().exp()
        return load(env, corpus, actor, *words)

    monkeypatch.setattr(text, "load_pairs", load_and_look)
    args = dpo.Args(
        steps=400, batch_size=256, lr=1e-3, eval_every=10_000, device="cpu", prefs=20, sft_steps=60, beta=1.0
    )
    dpo.train(args)
    best = chances["of pi_ref"] * rewards.exp()
    best /= best.sum()
    actor = dpo.Transformer(16, 1, 4)
    actor.load_state_dict(load_checkpoint(checkpoint("dpo", tmp_path / "runs"))["state"]["actor"])
    found = log_chances(actor).detach()
    assert (best * (best.log() - chances["of pi_ref"].log())).sum() > 0.3  # there is a way to go
    assert (found.exp() * (found - best.log())).sum() < 0.02


@pytest.mark.parametrize("name, at", [("sft", 2), ("dpo", 1), ("dpo", 4)])
def test_resume(name, at, tmp_path, monkeypatch):
    assert_resumes(dpo, name, at, tmp_path, monkeypatch, device="cpu")


@pytest.mark.parametrize("beta, smoothing", [(0.0, 0.1), (-0.1, 0.1), (0.1, 0.5), (0.1, 0.7), (0.1, -0.1)])
def test_bad_arguments(beta, smoothing):
    message = rf"--beta must be above 0 and --label-smoothing in \[0, 0.5\), not {beta} and {smoothing}\."
    with pytest.raises(UserError, match=message):
        dpo.train(dpo.Args(beta=beta, label_smoothing=smoothing, device="cpu"))
