"""The study of off-policy evaluation on ICU-Sepsis: its numbers are what they are called."""

import importlib.util

import numpy as np
import pytest

from datasets.tasks import icu_sepsis
from results.studies import common, ope

if importlib.util.find_spec("icu_sepsis") is None:
    pytest.skip("icu-sepsis is not installed: pip install --no-deps -r requirements-tasks.txt", allow_module_level=True)


def test_values_within():
    """Of a long horizon, the whole value; of a short one, what sampled episodes earn by then."""
    pi = ope.target(0.3)
    assert ope.value_within(pi, 500) == pytest.approx(icu_sepsis.value(pi, ope.GAMMA), abs=1e-9)
    logs = ope.cut(icu_sepsis.trajectories(pi, 5_000, 0), 3)
    lengths = np.diff(logs.ends, prepend=0)
    assert lengths.max() == 3 and logs.ends[-1] == len(logs.state)
    time = np.arange(len(logs.rew)) - np.repeat(logs.ends - lengths, lengths)
    earned = (ope.GAMMA**time * logs.rew).sum() / 5_000
    assert earned == pytest.approx(ope.value_within(pi, 3), abs=0.02)
    whole = icu_sepsis.trajectories(pi, 50, 1)
    for cut, column in zip(ope.cut(whole, 500), whole):
        np.testing.assert_array_equal(cut, column)


def test_repeated(monkeypatch):
    """Bias and deviation make up the error; with the exact Q and the true weights DR is right within its error."""
    monkeypatch.setattr(ope, "LOGS", 4)
    pi = ope.target(0.1)
    truth = icu_sepsis.value(pi, ope.GAMMA)
    q = icu_sepsis.q_values(pi, ope.GAMMA)
    result = ope.repeated(300, pi, truth, wrong_q=q, with_intervals=True)
    assert result["truth"] == truth and 0 < result["ess"] < 300
    for name in ope.ESTIMATORS:
        row = result[name]
        assert row["mse"] == pytest.approx(row["bias"] ** 2 + row["std"] ** 2) and row["logs"] == 4
        assert row["held"] in (0, 0.25, 0.5, 0.75, 1)
    assert abs(result["DR"]["bias"]) < 0.05 and result["DR"]["mse"] < result["IS"]["mse"]
    logs = icu_sepsis.trajectories(ope.behaviour(), 300, 0)
    found, _ = ope.estimators_of(logs, pi, ope.behaviour(), q)
    v = icu_sepsis.state_values(pi, ope.GAMMA)
    assert found["DM"]().item() == pytest.approx(v[logs.state[np.r_[0, logs.ends[:-1]]]].mean())


@pytest.mark.parametrize("expected", [True, False])
def test_findings(expected, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "STUDIES", tmp_path)

    def row(scale, **words):
        mse = {name: scale * k for k, name in enumerate(("DR", "WDR", "WIS", "WPDIS", "DM", "PDIS", "IS"), 1)}
        if not expected:
            mse["DR"] = 10 * scale
        each = {name: {"bias": 0.01, "std": x, "mse": x**2, "logs": 100} for name, x in mse.items()}
        return {"truth": 0.5, "ess": 50.0, **each, **words}

    numbers = {n: row(0.01) for n in ope.NUMBERS}
    for name in ope.ESTIMATORS:
        numbers[ope.NUMBER][name] |= {"held": 0.95 if expected else 0.5}
    corners = dict.fromkeys(("both right", "wrong Q", "wrong b", "both wrong"), row(0.01))
    horizons = {h: row(0.05 if expected else 0.001) for h in ope.HORIZONS}
    truncations = {c: row(0.001 if expected else 0.1) for c in ope.TRUNCATIONS}
    distances = {d: row(0.02) for d in ope.DISTANCES}
    parts = dict(truncated=corners, distances=distances, horizons=horizons, corners=corners, truncations=truncations)
    common.keep(ope.STUDY, numbers=numbers, **parts)
    verdicts = [sentence.split(". ")[1] for sentence in ope.findings()]
    first, truncated, second, third, fourth = verdicts
    assert all(text.startswith("So it" if expected else "Not so") for text in (first, truncated, third, fourth))
    assert second.startswith("Those of IS, WIS" if expected else "Those of no estimator do")
    if expected:
        ope.draw()
    assert not expected or (tmp_path / "ope.png").stat().st_size > 10_000
