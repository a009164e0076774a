"""What imitates --demos trajectories: its return beside the mean return of the data that they are drawn from."""

import numpy as np

from results.tables.layout import markdown, mean_and_deviation
from results.tables.records import grouped

MARK = "imitation"


def table(cells, published, datasets):
    experts = {row["fingerprint"]: row["mean"] for row in datasets}
    imitators = [cell for cell in cells if cell.records[0]["args"].get("demos") and cell.fingerprint in experts]
    tables = []
    for (source,), own in grouped(imitators, "source").items():
        rows = []
        for cell in own:
            demos, expert = cell.records[0]["args"]["demos"], experts[cell.fingerprint]
            returns = [np.mean(record["returns"]) for record in cell.records]
            label = " ".join((cell.name, *(word for word in cell.changed if not word.startswith("demos="))))
            share = f"{round(np.mean(returns) / expert, 2) + 0:.0%}"  # + 0: no "-0%"
            runs = f"{len(returns)} x {cell.steps:,}"
            rows.append(
                [f"{demos} of {cell.env} ({source})", label, mean_and_deviation(returns), f"{expert:.0f}", share, runs]
            )
        heads = ["demonstrations", "algorithm", "return:", "expert's return:", "share:", "seeds x steps:"]
        tables.append(markdown(heads, rows))
    return "\n\n".join(tables)
