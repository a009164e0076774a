"""IQL's score on walker2d-medium-expert sinks while it trains: is it this code, or IQL on these data?

d3rlpy's IQL on the same transitions, one seed, with the settings of its own reproduction on D4RL: ten episodes every
5,000 updates up to 30,000, by when iql.py has sunk. The data are an expert's and a medium policy's, 1,000,000
transitions each, as D4RL's are, but of other policies; on D4RL's IQL reaches 111.7. Dashed: the IQL authors' own code
on D4RL's v0 data, whose published curve begins low and rises late.

Usage: make studies, or python results/studies/peer_iql.py (which needs .venv-peers: make .venv-peers/installed)
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import UserError, find_task, load
from datasets.collect import collected_file
from results.run import ROOT
from results.studies.common import keep, kept, mean_std, once, runs_of, save_figure
from results.tables.records import read_published

STUDY, TASK, STEPS, EVERY, EPISODES = "peer_iql", "walker2d-medium-expert", 30_000, 5_000, 10
SETTINGS = TASK, STEPS, EVERY, EPISODES
PEER = ROOT / ".venv-peers" / "bin" / "python"


def measure():
    def stage():
        if not PEER.exists():
            raise UserError("This study needs d3rlpy: make .venv-peers/installed.")
        data, folder = load(TASK, "collected", "cpu"), runs_of(STUDY, "policies", SETTINGS)
        folder.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).with_name("d3rlpy_iql.py")
        words = map(str, (collected_file(find_task(TASK)), folder, 0, STEPS, EVERY))
        if subprocess.run([PEER, script, *words]).returncode:
            raise UserError("d3rlpy's IQL stopped; what it printed says why.")
        scores = {}
        for step in range(EVERY, STEPS + 1, EVERY):
            policy = torch.jit.load(folder / f"{step}.pt")
            scores[step] = data.score(data.evaluate(policy, EPISODES, seed=0)).mean()
        return {"steps": list(scores), "scores": list(scores.values()), "data": data.score(data.returns()).mean()}

    keep(STUDY, **once(STUDY, "d3rlpy", SETTINGS, stage))


def ours():
    """The steps (T,) and scores (seeds, T) of iql.py's records."""
    records = sorted((ROOT / "results" / "runs" / "iql" / "collected" / TASK).glob("seed=?,steps=100000.json"))
    curves = [json.loads(path.read_text())["curve"] for path in records]
    return [point["step"] for point in curves[0]], np.array([[point["score"] for point in curve] for curve in curves])


def published():
    """{updates: mean score} of the authors' code."""
    return {key[2]: float(row["mean"]) for key, row in read_published().items() if key[:2] == ("IQL", TASK) and key[2:]}


def findings():
    row, (steps, scores) = kept(STUDY), ours()
    best, end, mean = int(np.argmax(row["scores"])), steps.index(STEPS), scores.mean(0)
    top = int(mean[: end + 1].argmax())
    alike = row["scores"][-1] < row["scores"][best] / 2
    return [
        f"Expected, if it is not this code: d3rlpy's sinks below half of its best too. "
        f"{'So it does, in the one seed there is' if alike else 'Not so, in the one seed there is'}: "
        f"{row['scores'][best]:.1f} after {row['steps'][best]:,} updates, {row['scores'][-1]:.1f} after {STEPS:,}; "
        f"iql.py, {len(scores)} seeds: {mean_std(scores[:, top])} after {steps[top]:,}, {mean_std(scores[:, end])} "
        f"after {STEPS:,}, {mean_std(scores[:, -1])} after {steps[-1]:,}. The data: {row['data']:.1f}.",
        "Whether it would rise again is not known here: the authors' code, on D4RL's v0 data, has "
        + ", ".join(f"{score:.1f} after {step:,}" for step, score in published().items())
        + ".",
    ]


def draw():
    import matplotlib.pyplot as plt

    row, (steps, scores) = kept(STUDY), ours()
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    for seed, curve in enumerate(scores):
        axis.plot(steps, curve, color="tab:orange", linewidth=0.8, label=None if seed else "iql.py, its seeds")
    axis.plot(row["steps"], row["scores"], color="black", marker=".", label="d3rlpy's IQL")
    theirs = {step: score for step, score in published().items() if step <= steps[-1]}
    axis.plot(
        theirs.keys(), theirs.values(), color="tab:blue", linestyle="--", label="the authors' code, D4RL's v0 data"
    )
    axis.axhline(row["data"], color="gray", linestyle=":", label="the data's mean")
    axis.set(title=TASK, xlabel="updates", ylabel="normalized score", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
