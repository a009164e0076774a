"""The study of ranking policies without the environment."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro

from results.studies import common, model_selection


def test_ranked():
    """Worked out by hand: one pair of four changes places, and the best is second."""
    cell = model_selection.ranked([10.0, 30, 20, 5], [1.0, 3, 4, 0])
    assert cell["rank"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert cell["regret@1"] == pytest.approx(1 / 4) and cell["regret@3"] == 0
    assert cell["error"] == pytest.approx((9 + 27 + 16 + 5) / 4)
    assert model_selection.ranked([1.0, 2, 3, 4], [4.0, 3, 2, 1])["regret@3"] == pytest.approx(1 / 3)


def test_measure(small, tmp_path, monkeypatch):
    """Whole, with two scripts and few updates on the small dataset: estimates of each candidate, and its truth."""

    def run(command, env):
        script = importlib.import_module(f"algorithms.{Path(command[1]).stem}")
        with monkeypatch.context() as patch:
            patch.setenv("RUNS_DIR", env["RUNS_DIR"])
            script.train(tyro.cli(script.Args, args=command[2:]))
        return SimpleNamespace(returncode=0)

    load = model_selection.load
    monkeypatch.setattr(common, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(common, "STUDIES", tmp_path)
    monkeypatch.setattr(model_selection, "load", lambda task, source: load(task))
    args = model_selection.Args
    monkeypatch.setattr(model_selection, "Args", lambda **words: args(steps=3, samples=1, **words))
    for name, value in dict(TASKS=(str(small),), SCRIPTS=("bc", "td3_bc"), AGES=(2,), STEPS=3, EPISODES=1).items():
        monkeypatch.setattr(model_selection, name, value)
    monkeypatch.setattr(model_selection, "SHARES", (0.2,))
    monkeypatch.setattr(model_selection, "SEEDS", (0, 1))
    model_selection.measure()
    (row,) = common.kept("model_selection")["tasks"].values()
    assert row["names"] == ["bc 2", "td3_bc 2"]
    assert [point["promise"] is None for point in row["candidates"]] == [True, False]
    for cells in row["shares"].values():
        assert len(cells) == 2
        assert all(
            np.isfinite(cell[method]).all() and len(cell[method]) == 2 for cell in cells for method in ("FQE", "DR")
        )
        assert cells[0]["FQE"] != cells[1]["FQE"] and cells[0]["DR"] != cells[1]["DR"]
    assert len(model_selection.findings()) == 1 and list(model_selection.results(row)["FQE"]) == [0.2]


def test_truth_is_the_noisy_policys(small, monkeypatch):
    """The policy that is asked in the environment is the one that is valued."""
    asked, load = [], model_selection.load
    monkeypatch.setattr(model_selection, "load", lambda task, source: load(task))
    policy = SimpleNamespace(act="its actions")
    monkeypatch.setattr(model_selection, "load_policies", lambda paths, data, std: asked.append(std) or [policy])
    monkeypatch.setattr(model_selection, "value_and_truth", lambda path, episodes: {"promise": 7.0, "truth": 0.0})
    monkeypatch.setattr(model_selection, "rollout", lambda data, act, episodes: (asked.append(act), np.ones((3, 2))))
    found = model_selection.promise_and_truth(str(small), "checkpoint.pt")
    assert asked == [0.1, "its actions"]
    assert found == {"promise": 7.0, "truth": pytest.approx(1 + 0.99 + 0.99**2)}


@pytest.mark.parametrize("expected", [True, False])
def test_findings(expected, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "STUDIES", tmp_path)
    truth = np.arange(8.0)
    promises = [None, 1e6, *(truth[2:] if not expected else -truth[2:])]  # IQL's are of scaled rewards
    points = [{"promise": p, "truth": t, "score": 0.0} for p, t in zip(promises, truth)]
    names = ["bc", "iql", *6 * ["cql"]]
    good, bad = list(truth + 5), list(np.roll(truth, 4))
    shares = {0.01: 2 * [{"FQE": bad, "DR": bad}], 1.0: 2 * [{"FQE": good if expected else bad, "DR": bad}]}
    common.keep(
        "model_selection", tasks={"hopper-medium-replay": {"names": names, "candidates": points, "shares": shares}}
    )
    (sentence,) = model_selection.findings()
    assert ("So it is: reliable from 100 % on, better" if expected else "Not so: reliable with no share") in sentence
    if expected:
        model_selection.draw()
        assert (tmp_path / "model_selection.png").stat().st_size > 10_000
