"""Of each task with three algorithms or more: Spearman's correlation of our order with the published ones."""

from collections import defaultdict

import numpy as np
from scipy.stats import spearmanr

from results.tables.records import grouped


def lines(cells, published):
    """Items of a list for each task, source and number of updates, and the means over the tasks: with what published
    curves have after as many updates, on D4RL's v0 datasets, and with the published last scores, on the v2, which are
    other data: no order mixes them. The algorithms from the lowest score up.
    """
    found = []
    for (source, steps), group in grouped(cells, "source", "steps").items():
        tasks, after = defaultdict(dict), f"after {steps:,} updates"
        for cell in group:
            tasks[cell.env][cell.name] = np.mean(cell.scores)
        sums = {after: [], "last": []}
        for env, scores in tasks.items():
            words = []
            for which, key, version in ((after, (steps,), "v0 "), ("last", (), "v2 ")):
                rows = {name: published.get((name, env, *key), {"note": ""}) for name in scores}
                ours = {name: score for name, score in scores.items() if rows[name]["note"].startswith(version)}
                if len(ours) < 3:
                    continue
                theirs = [float(rows[name]["mean"]) for name in ours]
                sums[which].append(spearmanr(list(ours.values()), theirs).statistic)
                words.append(f"{which} {sums[which][-1]:.2f}, of {', '.join(sorted(ours, key=ours.get))}")
            if words:
                found.append(f"- {env} ({source}): {'; '.join(words)}")
        means = [f"{which} {np.mean(x):.2f} of {len(x)} task{'s' * (len(x) > 1)}" for which, x in sums.items() if x]
        if means:
            found.append(f"- mean ({source}): {'; '.join(means)}")
    return "\n".join(found)
