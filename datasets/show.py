"""Prints and draws every dataset at hand, collected ones and those of D4RL and Minari in the cache.

Writes statistics.json (from which `make results` makes the table of datasets/README.md), returns.png, a histogram of
the episodes' returns for each dataset, and mazes.png, trajectories in the mazes.

Usage: make datasets                  collects first what is missing
       python datasets/show.py
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets.catalog import UserError, find_task
from datasets.collect import COLLECTED, can_collect, collected_file
from datasets.store import cache_dir, read_hdf5
from datasets.tasks import mazes

FOLDER = Path(__file__).resolve().parent


def statistics(data):
    """What a row of the table says of a Dataset. Of its returns, those of all episodes, the last one cut or not."""
    returns = data.returns()
    counts, edges = np.histogram(returns, 60)
    return {
        "task": data.task.name,
        "source": data.source,
        "fingerprint": data.fingerprint,
        "transitions": len(data),
        "episodes": len(returns),
        "terminals": int(data.done.sum()),
        **{name: round(float(getattr(returns, name)()), 3) for name in ("mean", "std", "min", "max")},
        "score": None if data.task.ref_min is None else round(float(data.score(returns.mean())), 2),
        "histogram": counts.tolist(),
        "edges": [round(float(edges[0]), 3), round(float(edges[-1]), 3)],
    }


def dataset_table(rows):
    """One line a dataset, from the rows of statistics.json, beside what D4RL's dataset of that name holds."""
    with Path(__file__).with_name("d4rl.csv").open() as file:
        theirs = {row["file"]: row for row in csv.DictReader(file)}
    lines = [
        "| task | source | transitions | episodes | return | range | score | D4RL's return | ratio |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    for row in rows:
        digits = 0 if abs(row["max"]) > 10 else 2
        mean, std, least, most = (f"{row[key]:.{digits}f}" for key in ("mean", "std", "min", "max"))
        score = "" if row["score"] is None else f"{row['score']:.1f}"
        d4rl = theirs.get(row["d4rl_file"], {})
        their_return = ratio = ""
        if d4rl.get("return_mean"):
            their_return = f"{float(d4rl['return_mean']):.0f} ± {float(d4rl['return_std']):.0f}"
            ratio = f"{row['mean'] / float(d4rl['return_mean']):.2f}"
        episodes = f"{row['episodes']:,}" + (f" ({int(d4rl['episodes']):,})" if d4rl.get("episodes") else "")
        cells = row["task"], row["source"], f"{row['transitions']:,}", episodes, f"{mean} ± {std}"
        lines.append("| " + " | ".join((*cells, f"{least} to {most}", score, their_return, ratio)) + " |")
    return "\n".join(lines)


def draw_returns(rows):
    figure, axes = plt.subplots(-(-len(rows) // 5), 5, figsize=(15, 2.2 * -(-len(rows) // 5)), squeeze=False)
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows):
        axis.stairs(row["histogram"], np.linspace(*row["edges"], len(row["histogram"]) + 1), fill=True)
        axis.axvline(row["mean"], color="tab:red", linewidth=1)
        axis.set_title(f"{row['task']} ({row['source']})", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_yticks([])
    figure.supxlabel("return of an episode; red: mean", fontsize=9)
    figure.tight_layout()
    figure.savefig(FOLDER / "returns.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def draw_mazes(datasets):
    figure, axes = plt.subplots(1, len(datasets), figsize=(3.6 * len(datasets), 3.2), squeeze=False)
    for axis, data in zip(axes[0], datasets):
        mazes.draw(data.task, data.obs.numpy(), data.ends, axis)
        axis.set_title(data.task.name, fontsize=9)
    figure.tight_layout()
    figure.savefig(FOLDER / "mazes.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def main():
    tasks = [task for task in map(find_task, COLLECTED) if can_collect(task)]
    files = [path for path in map(collected_file, tasks) if path.exists()]
    files += sorted([*cache_dir().glob("d4rl-*.hdf5"), *cache_dir().glob("minari-*.hdf5")])
    if not files:
        raise UserError("No dataset is at hand: 'make datasets' collects all of them, 'datasets/collect.py' one.")
    rows, in_mazes = [], []
    for path in files:
        data = read_hdf5(path)
        rows.append({**statistics(data), "d4rl_file": data.task.d4rl_file})
        if data.task.name in mazes.MAPS:
            in_mazes.append(data)
    # A collected dataset that is not at hand keeps its row, if it would be collected the same.
    file = FOLDER / "statistics.json"
    known = {row["fingerprint"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    for task in tasks:
        if not collected_file(task).exists():
            print(f"not at hand: python datasets/collect.py --env {task.name}")
            if row := known.get(collected_file(task).stem.split("-")[-1]):
                rows.append(row)
    rows.sort(key=lambda row: COLLECTED.index(row["task"]) if row["source"] == "collected" else len(COLLECTED))
    print(dataset_table(rows))
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.write_text(f"[\n{lines}\n]\n")
    draw_returns(rows)
    # A picture of all mazes is not replaced by one of some.
    if new := bool(in_mazes) and (len(in_mazes) == len(mazes.MAPS) or not (FOLDER / "mazes.png").exists()):
        draw_mazes(in_mazes)
    print(f"Written: statistics.json, returns.png{', mazes.png' * new} in {FOLDER}")


if __name__ == "__main__":
    main()
