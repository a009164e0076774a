"""Does a Decision Transformer do what it is asked? The return that it achieves against the one it is asked for.

One seed on each task; 30,000 updates on hopper-medium, whose score rises only between 15,000 and 20,000, and 10,000
on the others, of the published 100,000 to fit a CPU: so the learning rate is three times the published one, after 500
updates. Ten episodes for each request, all in one batch: quantiles of the data's own returns, nothing, and half as much
again as the best. Marked: where the data's returns lie. The runs are recorded in results/runs/ too.

Usage: make studies, or python results/studies/return_conditioning.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import load
from results.checkpoint import load_agent
from results.studies.common import keep, kept, once, save_figure, train

STUDY, EPISODES = "return_conditioning", 10
TASKS = {"hopper-medium": 30_000, "hopper-medium-replay": 10_000, "halfcheetah-medium": 10_000}  # updates
QUANTILES = 0, 0.05, 0.25, 0.5, 0.75, 0.95, 1  # of the data's returns
VARIED = (
    0.2  # of the best return: where 5 to 95 % of the data's returns lie closer together, there is nothing to follow
)
WORDS = "--lr", 3e-4, "--warmup", 500, "--record"


def measure():
    def stage(task):
        returns = load(task, "collected", "cpu").returns()
        checkpoint = train(STUDY, task, "dt", TASKS[task], "--env", task, *WORDS)
        _, script, data, rollout = load_agent(checkpoint)
        asked = [0.0, *np.quantile(returns, QUANTILES), 1.5 * returns.max()]
        requests = np.outer(asked, np.ones(EPISODES))
        asking = script.Rollout(rollout.args, rollout.act_dim, rollout.act, torch.tensor(requests.ravel()).float())
        achieved = data.evaluate(asking, requests.size, seed=0, rewards=True).reshape(requests.shape)
        low, middle, high = np.quantile(returns, (0.05, 0.5, 0.95))
        curve = {"asked": requests[:, 0].tolist(), "mean": achieved.mean(1).tolist(), "std": achieved.std(1).tolist()}
        return {**curve, "low": low, "middle": middle, "high": high, "best": returns.max()}

    settings = {task: [TASKS[task], EPISODES, QUANTILES, WORDS] for task in TASKS}
    keep(STUDY, tasks={task: once(STUDY, task, settings[task], lambda task=task: stage(task)) for task in TASKS})


def findings():
    """For each task: over the requests up to the data's best return, does more asked give more achieved? Spearman's
    correlation, where the data's returns differ enough for it to mean something."""
    sentences = []
    for task, row in kept(STUDY)["tasks"].items():
        asked, mean = np.array(row["asked"]), np.array(row["mean"])
        within = asked <= row["best"]
        gets = ", ".join(f"{a:.0f} it gets {m:.0f}" for a, m in zip(asked, mean))
        of_data = f"5 to 95 % of the data's episodes return {row['low']:.0f} to {row['high']:.0f}"
        if row["high"] - row["low"] < VARIED * abs(row["best"]):
            sentences.append(f"{task}: {of_data}, so there is nothing to follow. Asked for {gets}.")
            continue
        sentences.append(
            f"{task}: {of_data}. Of the requests up to the best return, Spearman's correlation with what is achieved "
            f"is {spearmanr(asked[within], mean[within]).statistic:.2f} ({within.sum()} requests, one seed). Asked for "
            f"{gets}."
        )
    return sentences


def draw():
    import matplotlib.pyplot as plt

    tasks = kept(STUDY)["tasks"]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.3 * len(tasks), 3.6))
    for axis, (task, row) in zip(axes, tasks.items()):
        axis.axvspan(row["low"], row["high"], color="tab:blue", alpha=0.15, label="5 to 95 % of the data's returns")
        axis.axvline(row["best"], color="tab:blue", linewidth=0.8, label="best return of the data")
        axis.plot(row["asked"], row["asked"], color="gray", linestyle=":", label="as asked")
        axis.errorbar(row["asked"], row["mean"], row["std"], color="black", marker=".", capsize=2, label="achieved")
        axis.set(title=task, xlabel="return asked for", ylabel="return")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
