"""The study of over-optimisation: the best of n by enumeration, the closed form, its fits, and that it can say no."""

import itertools

import numpy as np
import pytest

from results.studies import common
from results.studies import overoptimisation as study


def test_best_of_n():
    proxy, gold = np.random.default_rng(0).normal(size=(2, 3, 7))
    for n in (1, 3, 7):
        chosen = [[max(some, key=lambda i, p=p: p[i]) for some in itertools.combinations(range(7), n)] for p in proxy]
        expected = [np.mean([x[i] for x, of in zip(table, chosen) for i in of]) for table in (proxy, gold)]
        np.testing.assert_allclose(study.best_of(n, proxy, gold), expected)


def test_closed_form():
    found = study.closed_form()
    assert found["reference"] > 1 and found["dpo"] < 0.02 and found["ppo"] < 0.02


def test_fits():
    kl = np.array([0.0, 0.3, 1.0, 4.0, 9.0])
    d = np.sqrt(kl[1:])
    for logarithm, shape in ((True, d * (2 - 0.7 * np.log(d))), (False, d * (2 - 0.7 * d))):
        gold = np.concatenate([[1.5], 1.5 + shape])
        runs = [{"kl": kl.tolist(), "gold": (gold + shift).tolist()} for shift in (-0.1, 0.1)]
        np.testing.assert_allclose(study.fitted(runs, logarithm), [2, 0.7], rtol=1e-9)


def made(gold, kl=(0.0, 4.0, 16.0), **more):
    """Three seeds' curves."""
    return [{"kl": list(kl), "gold": [g + s for g in gold], "step": [0, 1, 2], **more} for s in (-0.1, 0.0, 0.1)]


@pytest.mark.parametrize("so", [True, False])
def test_findings(so, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "STUDIES", tmp_path)
    curves, best = {}, {}
    for name in study.cells():
        kind, prefs, *_ = name.split()
        if kind == "dpo":
            curves[name] = made([1.0, 1.4, 1.2], chosen=[0.0, -3.0, -9.0])
            continue
        free = name.endswith(" 0.0")
        at = (0.0, 1.0 + 0.001 * int(prefs), 40.0) if so else (0.0, 4.0, 16.0)
        gold = [1.0, 2.0, -3.0 if free else 1.9] if so else [1.0, 1.2, 1.3]
        curves[name] = made(gold, at, proxy=[0.0, 1.0, 2.0])
        if free:
            best[name] = made([1.0, 1.3, 1.2], (0.0, 0.2, 1.0), proxy=[0.0, 1.0, 2.0])
    exact = {"reference": 2.0, "dpo": 0.001 if so else 0.3, "ppo": 0.002}
    texts = {"prompts": {}, "overrated": [["a", "b", -1.0, 3.0]]}
    common.keep(study.STUDY, curves=curves, best=best, texts=texts, closed_form=exact)
    sentences = study.findings()
    expected = [sentence for sentence in sentences if sentence.startswith("Expected")]
    assert len(expected) == 6
    assert all(("Not so" not in sentence) == so for sentence in expected)
    assert any("-9.00 ± 0.00" in sentence for sentence in sentences)
    study.draw()
    assert (tmp_path / "overoptimisation.png").exists()
