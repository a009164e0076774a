"""What the tests of language models share: small ones, `train` with all that was random written down, and a transformer
written out from its definition. Nothing here comes from a script."""

import math

import pytest
import torch
from update import copied, noted

from datasets import UserError, text
from results.checkpoint import load_checkpoint
from results.run import Run


class Traced:
    def __init__(self):
        self.start, self.end = {}, {}  # {algorithm, "sft" too: what its checkpoint would hold}
        self.random = {}  # {algorithm: [(name of torch's function, what it drew)] within the steps}
        self.answers, self.reports, self.losses = [], [], []


def make_small(script, monkeypatch, signs=6, prompt=4, answer=3, width=8, layers=2, pairs=30, held_out=11):
    """Models of a few hundred parameters, of the first so many signs; the data are made anew."""
    for name, value in dict(VOCAB=signs, CONTEXT=prompt + answer + 2, WIDTH=width, LAYERS=layers).items():
        monkeypatch.setattr(script, name, value)
    for name, value in dict(PROMPT=prompt, ANSWER=answer, CONTEXT=prompt + answer + 2).items():
        monkeypatch.setattr(text, name, value)
    monkeypatch.setattr(text, "PAIRS", pairs)
    monkeypatch.setattr(text, "HELD_OUT", held_out)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(signs, (2000,), generator=generator)
    corpus = text.Text(text.decode(torch.where(torch.arange(2000) % 3 == 0, words, words.roll(1))))
    monkeypatch.setattr(text, "load_text", lambda: corpus)
    return corpus


def trace(script, monkeypatch, args):
    """Trains in float64, and returns what was Traced."""
    traced, now, steps, report, watch = Traced(), [], Run.steps, Run.report, Run.watch

    def steps_traced(run, data, stride=1, **state):
        traced.start[run.algorithm], traced.random[run.algorithm] = copied(state), []
        now.append(run.algorithm)
        yield from steps(run, data, stride, **state)
        now.pop()
        traced.end[run.algorithm] = copied(state)

    def note(name, value):
        if now:
            traced.random[now[-1]].append((name, value))

    def watch_traced(run, losses):
        traced.losses.append((run.algorithm, losses))
        watch(run, losses)

    def report_traced(run, step, returns, **more):
        traced.reports.append((run.algorithm, step, returns, more))
        report(run, step, returns, **more)

    with monkeypatch.context() as patch:
        for name in ("randint", "randperm"):
            patch.setattr(torch, name, noted(name, note))
        sample = script.sample
        patch.setattr(script, "sample", lambda *words: traced.answers.append(sample(*words)) or traced.answers[-1])
        normal = torch.nn.init.normal_
        # so large that gradients are clipped
        patch.setattr(torch.nn.init, "normal_", lambda x, std=0.05: normal(x, std=20 * std))
        patch.setattr(Run, "steps", steps_traced)
        patch.setattr(Run, "report", report_traced)
        patch.setattr(Run, "watch", watch_traced)
        torch.set_default_dtype(torch.float64)
        try:
            script.train(args)
        finally:
            torch.set_default_dtype(torch.float32)
    return traced


def module(params):
    """Something with these parameters."""
    net = torch.nn.Module()
    for i, x in enumerate(params.values()):
        net.register_parameter(f"x{i}", torch.nn.Parameter(x))
    return net


def norm(x, params, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * params[f"{name}.weight"] + params[f"{name}.bias"]


def linear(x, params, name):
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def hidden(params, tokens, heads=4):
    """Vaswani et al. 2017 with the normalisation first: (B, T) -> (B, T, W)."""
    T = tokens.shape[1]
    x = params["token.weight"][tokens] + params["place.weight"][torch.arange(T)]
    for i in range(sum(name.endswith("norm1.weight") for name in params)):
        at = f"blocks.{i}"
        q, k, v = linear(norm(x, params, f"{at}.norm1"), params, f"{at}.qkv").chunk(3, -1)
        size, mixed = q.shape[-1] // heads, []
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(size)
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            mixed.append(weights @ v[..., own])
        x = x + linear(torch.cat(mixed, -1), params, f"{at}.out")
        h = linear(norm(x, params, f"{at}.norm2"), params, f"{at}.mlp.0")
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        x = x + linear(h, params, f"{at}.mlp.2")
    return norm(x, params, "norm")


def outputs(params, tokens):
    return linear(hidden(params, tokens), params, "head")


def log_prob(params, tokens):
    """Of each token but the first, (B, T - 1)."""
    logits = outputs(params, tokens)[:, :-1]
    logits = logits - logits.exp().sum(-1, keepdim=True).log()
    return torch.stack([row[range(len(row)), after] for row, after in zip(logits, tokens[:, 1:])])


def supervised(start, draws, corpus, context, steps, adam):
    """The supervised model after its updates, and its loss at each."""
    params = {name: x.clone().requires_grad_() for name, x in start.items()}
    opt, losses = adam(params, 1e-3, decay=0.01), []
    for step, (_, starts) in enumerate(draws, 1):
        windows = torch.stack([corpus.train[i : i + context] for i in starts[:, 0]])
        loss = -log_prob(params, windows).mean()
        opt.lr = 1e-3 * min(step / 100, (1 + math.cos(math.pi * (step - 1) / steps)) / 2)
        opt.step(loss, clip=1.0)
        losses.append(loss.item())
    return params, losses


def checkpoint(name, folder):
    """That of the newest run in the folder; earlier ones are moved aside."""
    (path,) = (path for path in (folder / name).rglob("checkpoint.pt") if "~" not in str(path))
    return path


def assert_resumes(script, name, at, tmp_path, monkeypatch, **words):
    """Stopped after step `at` of the run called `name`, the supervised model's or the script's own, it goes on to the
    same parameters, bit for bit; the supervised model is learned once."""
    make_small(script, monkeypatch)
    own = script.__name__.split(".")[1]
    words |= {"steps": 6, "prefs": 20, "sft_steps": 5, "batch_size": 5, "eval_every": 2, "eval_episodes": 6}
    script.train(script.Args(**words))
    whole = load_checkpoint(checkpoint(own, tmp_path / "runs"))
    if name == "sft":
        checkpoint("sft", tmp_path / "cache").unlink()
    steps = Run.steps

    def interrupted(run, data, stride=1, **state):
        for step in steps(run, data, stride, **state):
            run._interrupted = run.algorithm == name and step == at
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(Run, "steps", interrupted)
        with pytest.raises(UserError, match=f"Stopped after step {at} and saved"):
            script.train(script.Args(**words))
    script.train(script.Args(**words, resume=name == own))
    assert load_checkpoint(checkpoint("sft", tmp_path / "cache"))["step"] == 5
    resumed = load_checkpoint(checkpoint(own, tmp_path / "runs"))
    assert resumed["curve"] == whole["curve"] and resumed["step"] == whole["step"]
    assert_equal(whole["state"], resumed["state"])


def assert_equal(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list):
        for both in zip(ours, theirs, strict=True):
            assert_equal(*both)
    else:
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
