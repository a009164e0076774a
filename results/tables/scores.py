"""The first table: algorithms by family x the nine locomotion tasks, ours above the published scores: what a published
curve has after as many updates, and the last one.

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
    """Of cells of one source and number of updates. A cell has the lines that its row's label names."""
    usual = usual_seeds(cells)
    small = lambda words: "".join(f"<br><sub>{word}</sub>" for word in words)
    rows = []
    for (_, name), own in grouped(cells, "place", "name").items():
        ours = {cell.env: np.mean(cell.scores) for cell in own}
        lines = {"± seeds": {cell.env: spread(cell.scores, usual) for cell in own}}
        for title, updates in (("then", own[0].steps), ("published", None)):
            keys = {env: (name, env, updates) if updates else (name, env) for env in TASKS}
            theirs = {env: float(published[key]["mean"]) for env, key in keys.items() if key in published}
            if theirs:
                theirs |= {"mean": np.mean(list(theirs.values()))} if len(theirs) == len(TASKS) else {}
                lines[title] = {env: f"{score:.1f}" for env, score in theirs.items()}
        ours |= {"mean": np.mean(list(ours.values()))} if len(ours) == len(TASKS) else {}
        row = [
            f"{ours[env]:.1f}" + small(line.get(env, "") for line in lines.values()) if env in ours else ""
            for env in (*TASKS, "mean")
        ]
        rows.append((f"<sub>**{own[0].family}**</sub>", [name + small(lines), *row]))
    # Narrow columns, so that all fit into GitHub's page: short lines in the heads, and in each cell.
    heads = [env.replace("-", "<br>") for env in TASKS]
    heads = [head.replace("halfcheetah", "half-<br>cheetah").replace("walker2d", "walker<br>2d") for head in heads]
    return markdown(
        ["<sub>algorithm</sub>", *(f"<sub>{head}</sub>:" for head in (*heads, "mean"))], with_families(rows)
    )


def spread(scores, usual):
    """The deviation over seeds, and how many they are where that is not the usual number."""
    deviation = f"±{np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
    seeds = f"{len(scores)} seed{'s' * (len(scores) > 1)}" if len(scores) != usual else ""
    return " ".join(filter(None, (deviation, seeds)))


def table(cells, published, datasets):
    return "\n\n".join(f"**{caption(own)}**\n\n{grid(own, published)}" for own in comparisons(cells).values())
