"""Of each task with three algorithms or more: Spearman's correlation of our order with the published one."""

from collections import defaultdict

import numpy as np
from scipy.stats import spearmanr

from results.tables.records import grouped


def lines(cells, published):
    """A line of a list for each task, source and number of updates; the algorithms from the lowest score up. Published
    scores of D4RL's v0 datasets, which are other data, have no place in an order of v2's."""
    found = []
    for group in grouped(cells, "source", "steps").values():
        tasks = defaultdict(dict)
        for cell in group:
            row = published.get((cell.name, cell.env))
            if row and row["note"].startswith("v2 "):
                tasks[cell.env, cell.source][cell.name] = np.mean(cell.scores)
        for (env, source), ours in tasks.items():
            if len(ours) >= 3:
                theirs = [float(published[name, env]["mean"]) for name in ours]
                rho = spearmanr(list(ours.values()), theirs).statistic
                found.append(f"- {env} ({source}): {rho:.2f}, of {', '.join(sorted(ours, key=ours.get))}")
    return "\n".join(found)
