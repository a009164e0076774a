"""What the expert was asked for, and what came of it: DAgger and its sisters, by task; as a table, and as curves."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from results.tables.layout import markdown, mean_and_deviation

MARK = "interactive"
COUNTS = {"labels": "labels:", "takeovers": "take-overs:", "falls": "falls:"}  # of a record's last point


def asking(cells):
    """Those whose records count labels."""
    return [cell for cell in cells if all("labels" in record["curve"][-1].get("losses", {}) for record in cell.records)]


def table(cells, published, datasets):
    rows = []
    for cell in asking(cells):
        ends = [record["curve"][-1]["losses"] for record in cell.records]
        counts = [f"{np.mean([end[name] for end in ends]):,.0f}" for name in COUNTS]
        rows.append(
            [cell.env, cell.label, mean_and_deviation(cell.scores), *counts, f"{len(cell.records)} x {cell.steps:,}"]
        )
    return markdown(["expert", "algorithm", "score:", *COUNTS.values(), "seeds x steps:"], rows)


def draw(cells, path):
    """Score against labels, and against falls, a panel each for each expert: of the cells that are longest there, the
    mean over seeds after each round, and each seed's last round as a dot."""
    cells = asking(cells)
    experts = list(dict.fromkeys(cell.env for cell in cells))
    names = list(dict.fromkeys(cell.label for cell in cells))
    figure, axes = plt.subplots(len(experts), 2, figsize=(10, 3.4 * len(experts) + 0.4), squeeze=False)
    for line, expert in zip(axes, experts):
        own = [cell for cell in cells if cell.env == expert]
        for cell in (cell for cell in own if cell.steps == max(other.steps for other in own)):
            for axis, count in zip(line, ("labels", "falls")):
                points = [[(p["losses"][count], p["score"]) for p in record["curve"]] for record in cell.records]
                points, color = np.array(points), f"C{names.index(cell.label)}"  # (seeds, rounds, 2)
                axis.plot(*points.mean(0).T, color=color, label=cell.label, linewidth=1.2)
                axis.plot(*points[:, -1].T, "o", color=color, markersize=4)
                axis.set(title=expert, xlabel=f"{count} so far", ylabel="normalized score")
                axis.grid(alpha=0.3)
        line[0].set_xscale("log")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
