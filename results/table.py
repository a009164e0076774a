"""Rebuilds every table and figure from the records in results/runs/ and the published scores in results/reference.csv.

Reads files only, and writes the same bytes from the same files: results/README.md, results/learning_curves.png, the
studies' pictures, and the parts of README.md and datasets/README.md between `<!-- x -->` and `<!-- /x -->`. A cell is
one algorithm on one task with equal source, fingerprint, steps and arguments; its seeds are averaged, and nothing else
ever is.

Usage: make results
"""

import ast
import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr, trim_mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets.show import dataset_table
from results.studies import (
    cql_alpha,
    demonstrations,
    extrapolation,
    model_error,
    peer_iql,
    return_conditioning,
    stitching,
)

RESULTS = ROOT / "results"
NAMES = {
    "bc": "BC",
    "td3_bc": "TD3+BC",
    "iql": "IQL",
    "awac": "AWAC",
    "cql": "CQL",
    "rebrac": "ReBRAC",
    "offline_sac": "SAC (offline)",
    "sac_n": "SAC-N",
    "edac": "EDAC",
    "dt": "DT",
    "sac": "SAC (online)",
    "gail": "GAIL",
    "mopo": "MOPO",
}
COLORS = {
    "BC": "tab:gray",
    "10% BC": "tab:olive",
    "TD3+BC": "tab:blue",
    "IQL": "tab:green",
    "AWAC": "tab:orange",
    "CQL": "tab:red",
    "ReBRAC": "tab:cyan",
    "SAC (offline)": "tab:brown",
    "SAC-N": "tab:pink",
    "EDAC": "tab:purple",
    "DT": "black",
    "MOPO": "gold",
}
ACTING = ("GAIL", "SAC (online)")  # which learn from the environment too: not among those that do not
LEAST = 100_000  # updates; shorter runs are listed and not compared
# Arguments that a script has got later, with the values that stand for what it did before.
LATER = {"bc": {"demos": 0, "every": 20}}


def read_cells():
    """Records grouped by cell, in the order of the table: [(cell, [record, one a seed])]."""
    cells = defaultdict(list)
    for path in sorted((RESULTS / "runs").rglob("*.json")):
        record = json.loads(path.read_text())
        # The file's name holds the arguments that are not at their defaults: seed=0,alpha=1.0,steps=200000.json
        changed = tuple(word for word in path.stem.split(",") if not word.startswith(("seed=", "steps=")))
        name = NAMES[record["algorithm"]]
        if name == "BC" and changed == ("top_fraction=0.1",):
            name, changed = "10% BC", ()
        cell = (record["env"], record["source"], name, changed, record["steps"], record["fingerprint"])
        arguments = LATER.get(record["algorithm"], {}) | record["args"]
        arguments = json.dumps(arguments, sort_keys=True)  # equal in one cell, also where a default has changed
        cells[(*cell, arguments)].append(record)
    return sorted(cells.items())


def read_published():
    """(algorithm, task) -> (text, source) of results/reference.csv."""
    with (RESULTS / "reference.csv").open() as file:
        return {(row["algorithm"], row["env"]): row for row in csv.DictReader(file)}


def mean_and_deviation(values):
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def score_table(cells, published):
    lines = [
        "| task | algorithm | score | seeds | updates | data | published, D4RL's data |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for (env, source, name, changed, steps, *_), records in cells:
        row = published.get((name, env))
        theirs = f"{float(row['mean']):.1f} ± {float(row['std']):.1f}" if row and not changed else ""
        score = mean_and_deviation([record["score"] for record in records])
        score += "" if records[0].get("normalized", True) else " (return)"
        name = " ".join((name, *changed))
        lines.append(f"| {env} | {name} | {score} | {len(records)} | {steps:,} | {source} | {theirs} |")
    return "\n".join(lines)


def longest_runs(cells):
    """Those with the published arguments, of each algorithm on a task: {(source, env, name): (steps, records)}."""
    longest = {}
    for (env, source, name, changed, steps, *_), records in cells:
        if not changed and steps >= longest.get((source, env, name), (0,))[0]:
            longest[source, env, name] = steps, records
    return {key: longest[key] for key in sorted(longest, key=lambda key: (key[0], place_of(key[1])))}


def grid_table(cells, published):
    """Tasks x algorithms: the score of the longest runs, and below it the published one."""
    longest = longest_runs(cells)
    names = [name for name in COLORS if any(key[2] == name for key in longest)]
    lines = ["| task, data | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for source, env in dict.fromkeys(key[:2] for key in longest):
        line = [f"{env}<br><sub>{source}; published</sub>"]
        for name in names:
            cell, (steps, records) = "", longest.get((source, env, name), (0, []))
            if records:
                score = mean_and_deviation([record["score"] for record in records])
                cell = f"{score}<br><sub>{len(records)} x {steps // 1000:,}k"
                cell += f"; {float(published[name, env]['mean']):.1f}</sub>" if (name, env) in published else "</sub>"
            line.append(cell)
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def imitation_table(cells, rows):
    """What imitates --demos trajectories: its return beside the mean return of the data that they are drawn from."""
    experts = {row["fingerprint"]: row["mean"] for row in rows}
    lines = [
        "| demonstrations | algorithm | return | expert's return | share | seeds x steps |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (env, source, name, changed, steps, fingerprint, _), records in cells:
        if not (demos := records[0]["args"].get("demos")) or fingerprint not in experts:
            continue
        returns, expert = [np.mean(record["returns"]) for record in records], experts[fingerprint]
        name = " ".join((name, *(word for word in changed if not word.startswith("demos="))))
        lines.append(
            f"| {demos} of {env} ({source}) | {name} | {mean_and_deviation(returns)} | {expert:.0f} "
            f"| {round(np.mean(returns) / expert, 2) + 0:.0%} | {len(records)} x {steps:,} |"
        )
    return "\n".join(lines)


def place_of(env):
    """Where a task stands in a table: the bodies' in D4RL's order, then the others."""
    body, _, quality = env.partition("-")
    order = ("medium", "medium-replay", "medium-expert")
    return (
        body not in ("halfcheetah", "hopper", "walker2d"),
        body,
        order.index(quality) if quality in order else 9,
        env,
    )


def summary_table(cells):
    """Of each algorithm, data source and number of updates: the interquartile mean over all runs of all tasks, with the
    95 % interval of 2,000 bootstrap samples that draw each task's seeds anew (Agarwal et al. 2021)."""
    groups = defaultdict(list)
    for (_, source, name, changed, steps, *_), records in cells:
        if not changed and records[0].get("normalized", True):
            groups[source, steps, name].append([record["score"] for record in records])
    lines = [
        "| algorithm | data | updates | tasks | runs | interquartile mean | 95 % interval |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (source, steps, name), tasks in sorted(groups.items()):
        rng, means = np.random.default_rng(0), []
        for _ in range(2000):
            means.append(trim_mean(np.concatenate([rng.choice(scores, len(scores)) for scores in tasks]), 0.25))
        runs = np.concatenate(tasks)
        interval = (
            f"{np.quantile(means, 0.025):.1f} to {np.quantile(means, 0.975):.1f}" if len(runs) > len(tasks) else ""
        )
        lines.append(
            f"| {name} | {source} | {steps:,} | {len(tasks)} | {len(runs)} | {trim_mean(runs, 0.25):.1f} | {interval} |"
        )
    return "\n".join(lines)


def rank_agreement(cells, published):
    """Lines of a list: for each task with three algorithms or more, Spearman's correlation with the published order."""
    tasks = defaultdict(dict)
    for (source, env, name), (_, records) in longest_runs(cells).items():
        if (name, env) in published:
            tasks[env, source][name] = np.mean([record["score"] for record in records])
    lines = []
    for (env, source), ours in tasks.items():
        if len(ours) >= 3:
            rho = spearmanr(list(ours.values()), [float(published[name, env]["mean"]) for name in ours]).statistic
            lines.append(f"- {env} ({source}): {rho:.2f}, of {', '.join(sorted(ours, key=ours.get))}")
    return "\n".join(lines)


def detail_table(cells):
    lines = [
        "| task | algorithm | seed: return of each final episode | minutes a run | device | data | commit |",
        "| --- | --- | --- | ---: | --- | --- | --- |",
    ]
    for (env, source, name, changed, _, fingerprint, _), records in cells:
        returns = "<br>".join(f"{r['seed']}: {' '.join(f'{x:.0f}' for x in r['returns'])}" for r in records)
        minutes = f"{np.mean([record['seconds'] for record in records]) / 60:.0f}"
        if (together := max(record.get("trained_together", 1) for record in records)) > 1:
            minutes += f" ({together} seeds together)"
        devices, commits = ({record[key] for record in records} for key in ("device", "commit"))
        lines.append(
            f"| {env} | {' '.join((name, *changed))} | {returns} | {minutes} | {', '.join(sorted(devices))} "
            f"| {source} {fingerprint} | {', '.join(sorted(commits))} |"
        )
    return "\n".join(lines)


def speed_tables():
    """Of results/bench.json, the latest measurement of each script on each device, and of each comparison."""
    scripts, comparisons = {}, {}
    for entry in json.loads((RESULTS / "bench.json").read_text()):
        device = entry["device"]
        if entry["kind"] == "peers":
            comparisons[entry.get("script", "td3_bc"), device] = entry["rows"]
            continue
        for row in entry["rows"]:
            scripts[device, row["script"], row["seeds"]] = (
                f"| {device} | {row['script']} | {row['seeds']} | {row['updates_per_s']:,.0f} "
                f"| {row['agent_updates_per_s']:,.0f} | {row['memory_mb']:,} | {row['evaluation_s']:.1f} "
                f"| {row['evaluation_share']:.0%} | {entry['commit']} |"
            )
        for name, difference in entry.get("graph_difference", {}).items():
            line = f"| {device} | {name}, graph or not: parameters differ by {difference:.1e} | | | | | | | |"
            scripts[device, name, 0] = line
    lines = [
        "| device | script | seeds | updates/s | agent-updates/s | memory, MB | evaluation, s | its share | commit |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        *(scripts[key] for key in sorted(scripts)),
    ]
    peers = []
    for (script, device), rows in sorted(comparisons.items()):
        peers += [""] if peers else []
        names = [row["name"] for row in rows if row["name"] in row]
        unit = "environment steps/s" if script == "gail" else "agent-updates/s"
        peers.append(f"| {NAMES[script]}, {device} | {unit} | {' | '.join(f'ratio to {name}' for name in names)} |")
        peers += ["| --- | ---: |" + " ---: |" * len(names)]
        for row in rows:
            name = (
                f"{row['name']}, {row['seeds']} seed{'s' * (row['seeds'] > 1)}"
                if row["name"] == "ours"
                else row["name"]
            )
            ratios = " | ".join(f"{row[name]:.2f}" for name in names)
            peers.append(f"| {name} | {row['agent_updates_per_s']:,} | {ratios} |")
    return "\n".join(lines), "\n".join(peers)


def draw_curves(cells, published):
    """Mean score over training, the seeds' range shaded, the published score as a dotted line; one panel a task."""
    longest = longest_runs(cells)
    tasks = list(dict.fromkeys(key[:2] for key in longest))
    rows = -(-len(tasks) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(16, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for axis, (source, env) in zip(axes.flat, tasks):
        for name, color in COLORS.items():
            if (source, env, name) not in longest:
                continue
            curves = [{p["step"]: p["score"] for p in record["curve"]} for record in longest[source, env, name][1]]
            steps = [step for step in curves[0] if all(step in curve for curve in curves)]
            scores = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, points)
            axis.plot(steps, scores.mean(0), color=color, label=name)
            axis.fill_between(steps, scores.min(0), scores.max(0), color=color, alpha=0.2, linewidth=0)
            if (name, env) in published:
                axis.axhline(float(published[name, env]["mean"]), color=color, linestyle=":", linewidth=1)
        axis.set(title=f"{env} ({source})", xlabel="updates", ylabel="normalized score", ylim=(0, None))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines if line.get_label() in COLORS}
    shown = [name for name in COLORS if name in lines]
    figure.legend([lines[name] for name in shown], shown, loc="lower center", ncols=12, frameon=False)
    figure.text(0.995, 0.01, "dotted: published, D4RL's data", ha="right", fontsize=7, color="gray")
    figure.tight_layout(rect=(0, 0.035, 1, 1))
    figure.savefig(RESULTS / "learning_curves.png", dpi=110, metadata={"Software": None})


def study_sections():
    """What the studies measured: each one's question, picture and findings. One not yet measured is left out."""
    sections = []
    for study in (extrapolation, cql_alpha, stitching, return_conditioning, model_error, demonstrations, peer_iql):
        if not (RESULTS / "studies" / f"{study.STUDY}.json").exists():
            continue
        study.draw()
        question, about = study.__doc__.split("\nUsage:")[0].strip().split("\n", 1)
        findings = "\n".join(f"- {sentence}" for sentence in study.findings())
        sections.append(f"### {question}\n{about}\n\n![{study.STUDY}](studies/{study.STUDY}.png)\n\n{findings}")
    return "\n\n".join(sections)


def script_table():
    """One row a script: its length and the first line of its docstring."""
    lines = ["| script | lines | paper |", "| --- | ---: | --- |"]
    for path in sorted((ROOT / "algorithms").glob("*.py")):
        text = path.read_text()
        title = ast.get_docstring(ast.parse(text)).splitlines()[0]
        lines.append(f"| [{path.name}](algorithms/{path.name}) | {len(text.splitlines())} | {title} |")
    return "\n".join(lines)


def fill(text, name, content):
    """`text` with what stands between <!-- name --> and <!-- /name --> replaced by `content`."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"error: README.md has {count} places marked <!-- {name} -->, not one.")
    return filled


if __name__ == "__main__":
    cells, published = read_cells(), read_published()
    long = [(cell, records) for cell, records in cells if cell[4] >= LEAST and cell[2] not in ACTING]
    scores, agreement = score_table(cells, published), rank_agreement(long, published)
    draw_curves(long, published)
    readme = (ROOT / "README.md").read_text()
    scripts, peers = speed_tables()
    rows = json.loads((ROOT / "datasets" / "statistics.json").read_text())
    parts = {"scores": grid_table(long, published), "imitation": imitation_table(cells, rows)}
    for name, content in (parts | {"scripts": script_table(), "peers": peers}).items():
        readme = fill(readme, name, content)
    (ROOT / "README.md").write_text(readme)
    guide = ROOT / "datasets" / "README.md"
    guide.write_text(fill(guide.read_text(), "datasets", dataset_table(rows)))
    sources = "\n".join(sorted({f"- {row['source']}: {row['note']}" for row in published.values()}))
    (RESULTS / "README.md").write_text(f"""# Results

Written by `make results` from the records in [runs/](runs) and the published scores in [reference.csv](reference.csv).

Scores are normalized as D4RL does (0: random policy, 100: expert), of the policy after the last update, never of the
best one seen: choosing by evaluation return would need the environment that offline learning does without. Mean ±
sample standard deviation over seeds; each seed is the mean of its final evaluation episodes.

{scores}

The curves, the README's table and the order of the algorithms below are those of the longest runs with the published
arguments. The means below are over all tasks of the table, so far as they are run. Both leave out runs of fewer than
{LEAST:,} updates:

{summary_table(long)}

Spearman's correlation between our order of the algorithms, named from the lowest score up, and the published one:

{agreement}

"collected" data come from this project's own behaviour policies: same task, size and quality as D4RL's, not the same
transitions. Published scores are for D4RL's own data, 1,000,000 updates where nothing else is said:

{sources}

![learning curves](learning_curves.png)

## Speed

`make bench`, the latest on each device: batch 256, updates without evaluation; the seconds of one evaluation of all
agents, 10 episodes each, and its share of a run that evaluates every 5,000 updates, as is the default (of GAIL, whose
updates are environment steps, 96,000). MOPO's updates are without the training of its model and its rollouts.

{scripts}

`make bench-peers`: the updates of TD3+BC, IQL and CQL with the same data, batch size, widths and device, in turns in
one run; medians of the rounds. Of GAIL the environment steps, all training included. An update draws its batch; "one
fixed batch" is d3rlpy's update without that, compared with ours that does.

{peers}

## Studies

`make studies` runs the scripts, reads their checkpoints and keeps what it measures in [studies/](studies), from which
pictures and findings are made.

{study_sections()}

## Every run

{detail_table(cells)}
""")
    print(f"rank agreement (Spearman):\n{agreement}")
    print(f"{len(cells)} cells, {sum(len(records) for _, records in cells)} records: README.md, results/")
