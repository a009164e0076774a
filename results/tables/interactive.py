"""What the expert was asked for, and what came of it: DAgger and its sisters, by task."""

import numpy as np

from results.tables.layout import markdown, mean_and_deviation

MARK = "interactive"
COUNTS = {"labels": "labels:", "takeovers": "take-overs:", "falls": "falls:"}  # of a record's last point


def table(cells, published, datasets):
    rows = []
    for cell in cells:
        ends = [record["curve"][-1].get("losses", {}) for record in cell.records]
        if not all("labels" in end for end in ends):
            continue
        counts = [f"{np.mean([end[name] for end in ends]):,.0f}" for name in COUNTS]
        rows.append(
            [cell.env, cell.label, mean_and_deviation(cell.scores), *counts, f"{len(cell.records)} x {cell.steps:,}"]
        )
    return markdown(["expert", "algorithm", "score:", *COUNTS.values(), "seeds x steps:"], rows)
