"""Open Bandit (Saito et al. 2021, arXiv:2008.07146): what a fashion shop recommended, and whether it was clicked.

In the same week of 2019 each visitor was shown items by one of two policies: at random, or by Thompson sampling, "bts".
For each of three campaigns and both policies the package obp 0.4.1 has 10,000 rows of the logs, as CSV files. They are
read, but the package is not imported: its own loader fails with today's pandas. The propensities are those that were
logged when the item was shown, for each item the probability of being shown at that position.

    logs = load_logs("bts", "all")
    (logs.click / logs.propensity / N_ITEMS["all"]).mean()      the click rate of random recommendations, estimated
"""

import csv
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.errors import UserError

POLICIES, N_ITEMS, POSITIONS = ("random", "bts"), {"all": 80, "men": 34, "women": 46}, 3


class Logs(NamedTuple):
    """N recommendations, in the order of time."""

    item: np.ndarray  # (N,) int64, below N_ITEMS
    position: np.ndarray  # (N,) int64: left, centre, right
    click: np.ndarray  # (N,) float64, 0 or 1
    propensity: np.ndarray  # (N,) float64: how probable it was that this item was shown there


def load_logs(policy, campaign):
    """The logs of a policy, "random" or "bts", for "all", "men" or "women". UserError without the package."""
    if policy not in POLICIES or campaign not in N_ITEMS:
        raise UserError(
            f"Open Bandit has logs of {', '.join(POLICIES)} for {', '.join(N_ITEMS)}: none of {policy}, {campaign}."
        )
    package = importlib.util.find_spec("obp")
    if package is None:
        raise UserError("Open Bandit needs a package that is missing: pip install --no-deps obp==0.4.1.")
    folder = Path(package.submodule_search_locations[0]) / "dataset" / "obd"
    with (folder / policy / campaign / f"{campaign}.csv").open(newline="") as file:
        rows = [
            [float(row[name]) for name in ("item_id", "position", "click", "propensity_score")]
            for row in csv.DictReader(file)
        ]
    item, position, click, propensity = np.array(rows).T
    return Logs(item.astype(int), position.astype(int) - 1, click, propensity)
