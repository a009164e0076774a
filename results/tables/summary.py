"""Of each algorithm: the interquartile mean over all runs of all tasks, with a 95 % interval (Agarwal et al. 2021).

One table for each data source and number of updates.
"""

import numpy as np
from scipy.stats import trim_mean

from results.tables.layout import markdown
from results.tables.records import grouped


def table(cells):
    heads = ["algorithm", "data", "updates:", "tasks:", "runs:", "interquartile mean:", "95 % interval:"]
    tables = []
    for (source, steps), group in grouped(cells, "source", "steps").items():
        rows = []
        for (_, name), own in grouped(group, "place", "name").items():
            tasks = [cell.scores for cell in sorted(own, key=lambda cell: cell.env)]  # whatever the tables' order
            runs = np.concatenate(tasks)
            mean = f"{trim_mean(runs, 0.25):.1f}"
            interval = "{:.1f} to {:.1f}".format(*bootstrap(tasks)) if len(runs) > len(tasks) else ""
            rows.append([name, source, f"{steps:,}", len(tasks), len(runs), mean, interval])
        tables.append(markdown(heads, rows))
    return "\n\n".join(tables)


def bootstrap(tasks, samples=2000):
    """The interval's ends; a sample draws each task's seeds anew. tasks: of each, its seeds' scores."""
    rng = np.random.default_rng(0)
    drawn = [np.concatenate([rng.choice(scores, len(scores)) for scores in tasks]) for _ in range(samples)]
    return np.quantile(trim_mean(drawn, 0.25, axis=1), [0.025, 0.975])
