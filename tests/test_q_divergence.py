"""The study of Q-learning on ICU-Sepsis: what it measures against sums written out, and its sentences."""

import numpy as np
import pytest
import torch
from test_studies import folder  # noqa: F401

from datasets import Dataset, find_task, icu_sepsis
from datasets.collect_discrete import collect
from datasets.store import write_hdf5
from results.studies import common
from results.studies import q_divergence as study


def test_truth():
    """Survival, and how much of what the policy does clinicians rarely do; of themselves, counted from trajectories."""
    clinicians = icu_sepsis.load_mdp().clinicians
    measured = study.truth(clinicians, 0.5)
    logs = icu_sepsis.trajectories(clinicians, 3000, seed=0)
    rare = (clinicians[logs.state, logs.act] < 0.01).mean()
    assert measured["truth"] == pytest.approx(0.78184, abs=1e-5) and measured["promise"] == 0.5
    assert measured["rare"] == pytest.approx(rare, abs=4 * np.sqrt(rare / len(logs.state)))
    assert study.truth(clinicians)["promise"] is None


def test_tables():
    """One patient's state with three actions: taken 10 times with 5 survivors, 4 times with 3, once with one."""
    state = int(icu_sepsis.load_mdp().start.argmax())
    rows = [(state, 0, k < 5) for k in range(10)] + [(state, 1, k < 3) for k in range(4)] + [(state, 2, True)]
    rows = [[s, a, lived, icu_sepsis.SURVIVAL if lived else icu_sepsis.DEATH, 1] for s, a, lived in rows]
    task = find_task(study.TASK)
    frames = torch.from_numpy(icu_sepsis.observe(np.arange(716), "features"))
    data = Dataset(task, "", "", torch.tensor(rows, dtype=torch.float32), np.arange(1, 16), 47, 1, 25, frames)
    measured, start = study.tables(data), icu_sepsis.load_mdp().start[state]
    best = {"table": 2, "table, BCQ": 1, "table, penalty": 2}
    for name, promise in (("table", 1.0), ("table, BCQ", 0.75), ("table, penalty", 0.8)):
        assert measured[name]["promise"] == pytest.approx(start * promise)
        policy = icu_sepsis.uniform()
        policy[state] = np.eye(25)[best[name]]
        assert measured[name]["truth"] == pytest.approx(icu_sepsis.value(policy))
    policy = icu_sepsis.uniform()
    policy[state] = np.r_[10, 4, 1, np.zeros(22)] / 15
    assert measured["table, BC"]["truth"] == pytest.approx(icu_sepsis.value(policy))


@pytest.mark.parametrize("naive, cured, survival, expected", [(0.95, 0.8, 0.8, "So it "), (0.8, 0.95, 0.77, "Not so")])
def test_findings(naive, cured, survival, expected, folder):  # noqa: F811
    points = []
    for name in ("table", "table, penalty", "table, BCQ", "table, BC", *study.DEEP, "BC"):
        promise = None if name.endswith("BC") else naive if name in ("table", "offline DQN") else cured
        point = {"name": name, "promise": promise, "truth": survival, "rare": 0.25}
        points += [point | {"size": size, "seed": seed} for size in study.SIZES for seed in (0, 1)]
    common.keep(study.STUDY, points=points)
    sentences = study.findings()
    assert [sentence.split(". ")[1][:6] for sentence in sentences[:2]] == [expected] * 2
    assert f"offline DQN {naive - survival:+.3f}" in sentences[0] and "BC 25%, 25%" in sentences[2]
    study.draw()
    assert (folder / "q_divergence.png").exists()


def test_deep(tmp_path):
    """A network's promise and its policy's truth, from a short run on a small file."""
    task = find_task(study.TASK)
    write_hdf5(tmp_path / "1000 0.hdf5", collect(task, [("clinicians", 1000, 0)], "x"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(study.SETTINGS, "steps", 2)
        for name in study.DEEP:
            measured = study.deep(name, tmp_path / "1000 0.hdf5", 0)
            assert set(measured) == ({name, "BC"} if name == "BCQ" else {name})
            assert abs(measured[name]["promise"]) < 1 and 0.63 < measured[name]["truth"] < 0.8752
