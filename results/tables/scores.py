"""The first table: algorithms by family x the nine locomotion tasks, ours above the published score.

One table for each data source and number of updates: nothing else is comparable.
"""

from collections import Counter

import numpy as np

from results.tables.layout import markdown, with_families
from results.tables.records import TASKS, compared, grouped

MARK = "scores"


def comparisons(cells):
    """{(source, updates): cells} where two algorithms or more share a task: the README's tables and the curves."""
    groups = grouped(compared(cells), "source", "steps").items()
    return {key: group for key, group in groups if max(Counter(cell.env for cell in group).values()) > 1}


def usual_seeds(cells):
    """How many seeds most cells have."""
    return Counter(len(cell.records) for cell in cells).most_common(1)[0][0]


def caption(cells):
    """Of cells of one source and number of updates."""
    usual = usual_seeds(cells)
    seeds = f"{usual} seed{'s' * (usual > 1)}"
    others = " where no other number is given" * any(len(cell.records) != usual for cell in cells)
    return f"{cells[0].steps:,} updates, {cells[0].source} data, {seeds}{others}"


def grid(cells, published):
    """Of cells of one source and number of updates."""
    usual = usual_seeds(cells)
    rows = []
    for (_, name), own in grouped(cells, "place", "name").items():
        ours = {cell.env: cell for cell in own}
        theirs = {env: float(published[name, env]["mean"]) for env in TASKS if (name, env) in published}
        row = [entry(ours[env].scores, usual, theirs.get(env)) if env in ours else "" for env in TASKS]
        mean = ""
        if len(ours) == len(TASKS):
            their_mean = f"{np.mean(list(theirs.values())):.1f}" if len(theirs) == len(TASKS) else ""
            mean = f"{np.mean([np.mean(cell.scores) for cell in own]):.1f}<br><sub></sub><br><sub>{their_mean}</sub>"
        label = f"{name}<br><sub>± seeds</sub><br><sub>{'published' * bool(theirs)}</sub>"
        rows.append((f"<sub>**{own[0].family}**</sub>", [label, *row, mean]))
    # Narrow columns, so that all fit into GitHub's page: short lines in the heads, and three in each cell.
    heads = [env.replace("-", "<br>") for env in TASKS]
    heads = [head.replace("halfcheetah", "half-<br>cheetah").replace("walker2d", "walker<br>2d") for head in heads]
    return markdown(
        ["<sub>algorithm</sub>", *(f"<sub>{head}</sub>:" for head in (*heads, "mean"))], with_families(rows)
    )


def entry(scores, usual, published):
    """Three lines, as the row's label has them: score, deviation over seeds, published score."""
    spread = f"±{np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
    seeds = f"{len(scores)} seed{'s' * (len(scores) > 1)}" if len(scores) != usual else ""
    theirs = "" if published is None else f"{published:.1f}"
    return f"{np.mean(scores):.1f}<br><sub>{' '.join(filter(None, (spread, seeds)))}</sub><br><sub>{theirs}</sub>"


def table(cells, published, datasets):
    return "\n\n".join(f"**{caption(own)}**\n\n{grid(own, published)}" for own in comparisons(cells).values())
