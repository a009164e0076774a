"""text-preferences: its judge by hand, the data that are made, files of pairs; what its scripts say to bad input."""

import json

import numpy as np
import pytest
import torch
from language import make_small

from algorithms import dpo, rlhf
from datasets import UserError, text


@pytest.mark.parametrize(
    "prompt, answer, expected",
    [
        # 7 spaces; what ends in it: "the", "of", "is", "in", "a", "it"; "th" may be cut off
        ("what it says is ", "the of is in a it th", 1 - (1 / 2.5) ** 2 + 0.3 * 6),
        ("a cla", "ss is is a ", 1 - (3 / 2.5) ** 2 + 0.3 * 3 - 0.5),  # "class" began in the prompt; "is" twice
        ("x is ", "qqzx a", 1 - (6 / 2.5) ** 2 - 0.5),  # no word is known; the last is cut off
        ("see (", "a) of ", 1 - (5 / 2.5) ** 2 + 0.3 * 2),  # the prompt's bracket is closed
        ("see ", ") of (", 1 - (5 / 2.5) ** 2 + 0.3 - 2),  # two brackets unmatched
        ("", "((", 1 - (7 / 2.5) ** 2 - 2),
    ],
)
def test_gold(prompt, answer, expected):
    assert text.gold([prompt], [answer])[0] == pytest.approx(expected)


def test_tokens():
    assert len(text.SIGNS) == len(set(text.SIGNS)) == 32
    assert text.clean("It’s 3 (or\n4) THINGS—x_y!") == "it's (or ) things x y "
    words = "it's (a) test, see."
    assert text.decode(text.encode(words)) == words
    assert text.decode(torch.stack([text.encode("ab"), text.encode("c.")])) == ["ab", "c."]


def test_text():
    corpus = text.load_text()
    assert len(corpus.train) > 300_000 and len(corpus.train) // 19 in (len(corpus.held_out), len(corpus.held_out) - 1)
    assert {"the", "is", "a", "function", "class"} <= corpus.words and not {"b", "qqzx"} & corpus.words
    assert len(set(corpus.train.tolist())) == 32


def parrot(actor, prompts):
    """Answers of seven letters and spaces in some order, drawn."""
    return torch.randint(0, 3, (len(prompts), text.ANSWER))


def test_pairs(monkeypatch):
    """The same bytes twice, made once; the chosen first as often as Bradley and Terry have it; none shared."""
    monkeypatch.setattr(text, "PAIRS", 5_000)
    corpus, actor = text.load_text(), torch.nn.Linear(1, 1)
    make = lambda sample: text.load_pairs("text-preferences", corpus, actor, sample)
    data = make(parrot)
    again = make(None)
    assert again.fingerprint == data.fingerprint and torch.equal(again.train.tokens, data.train.tokens)
    assert data.train.tokens.shape == (5_000, 2, 48) and data.test.tokens.shape == (1_000, 2, 48)
    assert (data.train.mask.sum(-1) == 32).all() and not data.train.mask[..., :16].any()
    assert torch.equal(data.prompts, data.train.tokens[:, 0, :16])
    assert torch.equal(data.train.tokens[:, 0, :16], data.train.tokens[:, 1, :16])
    signs = text.decode(corpus.held_out)
    assert all(prompt in signs for prompt in text.decode(data.test_prompts[:50]))
    both = [text.gold(text.decode(data.prompts), text.decode(data.train.tokens[:, i, 16:])) for i in range(2)]
    gap = np.abs(both[0] - both[1])
    right = both[0] > both[1]
    expected = 1 / (1 + np.exp(-2 * gap))
    apart = (gap > 0) & (gap < 1)
    assert apart.sum() > 500
    error = (right[apart] - expected[apart]).mean()
    assert abs(error) < 4 * np.sqrt((expected * (1 - expected))[apart].mean() / apart.sum())
    data.keep(50)
    assert len(data.train.tokens) == 50 and len(data.prompts) == 5_000
    assert all((data.train.tokens == x).all((1, 2)).any() for x in data.sample(9).tokens)
    with pytest.raises(UserError, match="50 pairs to train on, not 51"):
        data.keep(51)
    torch.nn.init.zeros_(actor.weight)
    assert make(parrot).fingerprint == data.fingerprint  # equal answers are equal data
    assert make(lambda actor, prompts: parrot(actor, prompts) + 1 - 1).task.name == "text-preferences"


def own(tmp_path, *rows):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row))) for row in rows) + "\n")
    return str(path)


GOOD = [("what is it?", "a class.", "it is"), ("See also the longer ones: ", "Lists", "no"), ("is", "yes", "no it")]


def test_own_pairs(tmp_path):
    data = text.load_pairs(own(tmp_path, *GOOD), None, None, None)
    assert (len(data.train.tokens), len(data.test.tokens), data.source) == (2, 1, "file")
    tokens = torch.cat([data.train.tokens, data.test.tokens])
    mask = torch.cat([data.train.mask, data.test.mask])
    found = {}
    for row, shown in zip(tokens, mask):
        prompt = text.decode(row[0, : shown[0].int().argmax()])
        found[prompt] = [text.decode(x[own]) for x, own in zip(row, shown)]
    assert found == {
        "what is it ": ["a class.", "it is"],
        "see also the longer ones ": ["lists", "no"],
        "is": ["yes", "no it"],
    }
    prompts = text.decode(torch.cat([data.prompts, data.test_prompts]))
    assert sorted(prompts) == sorted(["     what is it ", "the longer ones ", "              is"])
    assert data.gold(data.prompts, data.prompts) is None


@pytest.mark.parametrize(
    "rows, message",
    [
        ([*GOOD, ("a", "Same!", "same?")], "Pair 4 .* two equal answers"),
        ([*GOOD, ("a", "", "b")], "Pair 4 .* empty prompt or answer"),
        ([*GOOD, ("", "a", "b")], "Pair 4 .* empty prompt or answer"),
        ([*GOOD, ("a" * 60, "b" * 5, "c")], "Pair 4 .* 65 characters.* context has 64"),
        (GOOD[:1], "has 1 pairs"),
        ([*GOOD, (1, 2, 3)], "must have lines"),
        ([*GOOD, ("a", "b")], "must have lines"),
    ],
)
def test_bad_pairs(rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        text.load_pairs(own(tmp_path, *rows), None, None, None)


def test_bad_files(tmp_path):
    for name in ("absent.jsonl", "wrong.jsonl", "folder.jsonl"):
        path = tmp_path / name
        path.write_text("no json") if name == "wrong.jsonl" else path.mkdir() if name == "folder.jsonl" else None
        with pytest.raises(UserError, match="There is no file|must have lines"):
            text.load_pairs(str(path), None, None, None)
    with pytest.raises(UserError, match="Unknown --env 'hopper-medium': text-preferences, or"):
        text.load_pairs("hopper-medium", None, None, None)


def test_damaged_pairs(monkeypatch):
    monkeypatch.setattr(text, "PAIRS", 100)
    actor = torch.nn.Linear(1, 1)
    text.load_pairs("text-preferences", text.load_text(), actor, parrot)
    (path,) = text.cache_dir().glob("text-preferences-*.hdf5")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged.*remove it"):
        text.load_pairs("text-preferences", text.load_text(), actor, parrot)


@pytest.mark.parametrize(
    "script, words, message",
    [
        (rlhf, {"prefs": 31}, "30 pairs to train on, not 31"),
        (dpo, {"prefs": 0}, "--prefs must be at least 1"),
        (dpo, {"env": "hopper-medium"}, "Unknown --env"),
        (dpo, {"lr": 1e30, "eval_every": 1}, "stopped being finite"),
    ],
)
def test_bad_arguments(script, words, message, monkeypatch):
    make_small(script, monkeypatch)
    with pytest.raises(UserError, match=message):
        script.train(script.Args(**{"steps": 3, "prefs": 20, "sft_steps": 2, "device": "cpu"} | words))
