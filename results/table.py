"""Rebuilds every table and figure from the records in results/runs/ and the published scores in results/reference.csv.

Reads files only, and writes the same bytes from the same files: the pictures, and what stands between `<!-- x -->` and
`<!-- /x -->` in README.md, datasets/README.md and results/README.md. Each table is a file in results/tables/.

Usage: make results
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets.show import dataset_table
from results.tables import (
    agreement,
    curves,
    imitation,
    interactive,
    runs,
    scores,
    scripts,
    speed,
    studies,
    summary,
    texts,
)
from results.tables.records import RESULTS, compared, grouped, read_cells, read_published

# Tables of the README that are made of records: MARK, and table(cells, published, datasets). A new one is a new file.
TABLES = scores, imitation, interactive, texts


def comparisons(cells, published):
    """A section for each source and number of updates: the scores, their means, and the order of the algorithms."""
    sections = []
    for group in grouped(compared(cells), "source", "steps").values():
        section = f"### {scores.caption(group)}\n\n{scores.grid(group, published)}\n\n{summary.table(group)}"
        if order := agreement.lines(group, published):
            section += f"\n\nSpearman's correlation of our order with the published:\n\n{order}"
        sections.append(section)
    return "\n\n".join(sections)


def fill(text, name, content):
    """`text` with what stands between <!-- name --> and <!-- /name --> replaced by `content`."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"error: there are {count} places marked <!-- {name} -->, not one.")
    return filled


def write(path, parts):
    text = path.read_text()
    for name, content in parts.items():
        text = fill(text, name, content)
    path.write_text(text)


if __name__ == "__main__":
    cells, published = read_cells(), read_published()
    datasets = json.loads((ROOT / "datasets" / "statistics.json").read_text())
    measured = json.loads((RESULTS / "bench.json").read_text())
    together = [cell for group in scores.comparisons(cells).values() for cell in group]
    curves.draw(together, published, RESULTS / "learning_curves.png")
    interactive.draw(cells, RESULTS / "interactive.png")
    parts = {module.MARK: module.table(cells, published, datasets) for module in TABLES}
    write(ROOT / "README.md", parts | {"scripts": scripts.table(), "peers": speed.peers(measured)})
    write(ROOT / "datasets" / "README.md", {"datasets": dataset_table(datasets)})
    parts = {
        "comparisons": comparisons(cells, published),
        "sources": "\n".join(sorted({f"- {row['source']}: {row['note']}" for row in published.values()})),
        "speed": speed.scripts(measured),
        "peers": speed.peers(measured),
        "studies": studies.sections(),
        "cells": runs.cells_table(cells, published),
        "runs": runs.runs_table(cells),
    }
    write(RESULTS / "README.md", parts)
    print(f"rank agreement (Spearman):\n{agreement.lines(together, published)}")
    print(f"{len(cells)} cells, {sum(len(cell.records) for cell in cells)} records: README.md, results/")
