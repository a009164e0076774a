"""How every table is written: Markdown that GitHub shows."""

import numpy as np


def markdown(heads, rows):
    """heads: the columns' titles, with a colon at the end where numbers stand at the right."""
    titles = [head.removesuffix(":") for head in heads]
    rule = ["---:" if head.endswith(":") else "---" for head in heads]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (titles, rule, *rows))


def with_families(rows):
    """rows: (family as it is to be written, row) in reading order; before a family's rows goes one with its name."""
    lines, last = [], None
    for family, row in rows:
        if family != last:
            lines.append([family, *[""] * (len(row) - 1)])
        lines.append(row)
        last = family
    return lines


def mean_and_deviation(values):
    """Over seeds; "" where there is nothing to average."""
    if None in values:
        return ""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
