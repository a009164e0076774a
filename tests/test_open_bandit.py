"""The Open Bandit logs, and estimates from them against the other policy's clicks."""

import importlib.util

import numpy as np
import pytest

from datasets import UserError
from datasets.tasks.open_bandit import N_ITEMS, POSITIONS, load_logs
from results.studies import common, open_bandit

needs_obp = pytest.mark.skipif(
    importlib.util.find_spec("obp") is None, reason="pip install --no-deps -r requirements-tasks.txt"
)


@needs_obp
@pytest.mark.parametrize("campaign", N_ITEMS)
def test_logs(campaign):
    """10,000 rows; random's propensities are 1 / items, and Thompson sampling's weights have the mean 1, but for the
    women's, whose largest is 21,739."""
    random, bts = load_logs("random", campaign), load_logs("bts", campaign)
    for logs in (random, bts):
        assert {len(column) for column in logs} == {10_000} and set(logs.click) == {0, 1}
        assert set(logs.position) == {0, 1, 2} and logs.item.min() >= 0 and logs.item.max() < N_ITEMS[campaign]
        assert 0.003 < logs.click.mean() < 0.008
    np.testing.assert_allclose(random.propensity, 1 / N_ITEMS[campaign])
    w = 1 / N_ITEMS[campaign] / bts.propensity
    assert w.max() > 20_000 if campaign == "women" else w.mean() == pytest.approx(1, abs=0.06)


@needs_obp
def test_estimates(monkeypatch):
    """IPS and SNIPS against their formulas; DR's correction with these weights."""
    monkeypatch.setattr(open_bandit, "RESAMPLES", 50)
    cell, logs = open_bandit.estimates("men", "bts"), load_logs("bts", "men")
    w = 1 / 34 / logs.propensity
    assert cell["rows"]["IPS"][0] == pytest.approx((w * logs.click).mean(), rel=1e-9)
    assert cell["rows"]["SNIPS"][0] == pytest.approx((w * logs.click).sum() / w.sum(), rel=1e-9)
    assert cell["ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum()) and cell["largest"] == pytest.approx(w.max())
    rate = np.zeros((2, POSITIONS, 34))  # of the rows of the other parity
    for half in (0, 1):
        rows = np.flatnonzero(np.arange(10_000) % 2 != half)
        for position in range(POSITIONS):
            at = rows[logs.position[rows] == position]
            for item in range(34):
                own = at[logs.item[at] == item]
                rate[half, position, item] = logs.click[own].mean() if len(own) else logs.click[at].mean()
    parity = np.arange(10_000) % 2
    v, q = rate.mean(2)[parity, logs.position], rate[parity, logs.position, logs.item]
    assert cell["rows"]["DM"][0] == pytest.approx(v.mean(), rel=1e-9)
    assert cell["rows"]["DR"][0] == pytest.approx((v + w * (logs.click - q)).mean(), rel=1e-9)
    assert cell["truth"][0] == load_logs("random", "men").click.mean() and cell["own"] == logs.click.mean()
    for value, low, high in cell["rows"].values():
        assert low < value < high


def test_bad_logs(monkeypatch):
    with pytest.raises(UserError, match="none of bts, children"):
        load_logs("bts", "children")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps obp==0.4.1"):
        load_logs("bts", "all")


@pytest.mark.parametrize("far", [False, True])
def test_findings(far, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "STUDIES", tmp_path)
    row = [0.009, 0.008, 0.01] if far else [0.005, 0.003, 0.007]
    cell = {"rows": dict.fromkeys(open_bandit.NAMES.values(), row), "truth": [0.004, 0.003, 0.005], "own": 0.004}
    cell |= {"ess": 300.0, "largest": 280.0}
    common.keep(open_bandit.STUDY, cells={"all from bts": cell, "men from bts": cell})
    sentence, _ = open_bandit.findings()
    assert sentence.split(" (0.30 to 0.50). ")[1].startswith("Not so:" if far else "So it is:")
    open_bandit.draw()
    assert (tmp_path / "open_bandit.png").stat().st_size > 5000
