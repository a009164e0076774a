"""Every cell and every run there is, whatever its task, length and arguments."""

import numpy as np

from results.tables.layout import markdown, mean_and_deviation
from results.tables.records import grouped


def cells_table(cells, published):
    """One line a cell; a table for each source and number of updates."""
    heads = ["task", "algorithm", "score:", "seeds:", "updates:", "data", "published, D4RL's data:"]
    tables = []
    for own in grouped(cells, "source", "steps").values():
        rows = []
        for cell in own:
            row = published.get((cell.name, cell.env))
            theirs = f"{float(row['mean']):.1f}" if row and not cell.changed else ""
            theirs += f" ± {float(row['std']):.1f}" if theirs and row["std"] else ""  # AWR's is not published
            score = mean_and_deviation(cell.scores) + ("" if cell.normalized else " (return)")
            rows.append([cell.env, cell.label, score, len(cell.records), f"{cell.steps:,}", cell.source, theirs])
        tables.append(markdown(heads, rows))
    return "\n\n".join(tables)


def runs_table(cells):
    """One line a cell, with each seed's final episodes; a table for each source."""
    heads = ["task", "algorithm", "updates:", "seed: return of each final episode", "minutes a run:", "device", "data"]
    tables = []
    for own in grouped(cells, "source").values():
        rows = []
        for cell in own:
            returns = "<br>".join(
                f"{r['seed']}: {' '.join(f'{x:.0f}' for x in r['returns'] or [])}" for r in cell.records
            )
            minutes = f"{np.mean([record['seconds'] for record in cell.records]) / 60:.0f}"
            if (together := max(record.get("trained_together", 1) for record in cell.records)) > 1:
                minutes += f" ({together} seeds together)"
            devices, commits = (", ".join(sorted({r[key] for r in cell.records})) for key in ("device", "commit"))
            data = f"{cell.source} {cell.fingerprint}"
            rows.append([cell.env, cell.label, f"{cell.steps:,}", returns, minutes, devices, data, commits])
        tables.append(markdown([*heads, "commit"], rows))
    return "\n\n".join(tables)
