"""Does a Decision Transformer do what it is asked? The return that it achieves against the one it is asked for.

One seed on each task; 30,000 updates on hopper-medium, whose score rises only between 15,000 and 20,000, and 10,000
on the others, of the published 100,000 to fit a CPU: so the learning rate is three times the published one, after 500
updates. Ten episodes for each of seven requests, from 0 to 1.5 times the best return in the data, all in one batch.
Marked: where the data's returns lie. The runs are recorded in results/runs/ too.

Usage: make studies, or python results/studies/return_conditioning.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import load
from results.checkpoint import load_agent
from results.studies.common import keep, kept, once, save_figure, train

STUDY, EPISODES = "return_conditioning", 10
TASKS = {"hopper-medium": 30_000, "hopper-medium-replay": 10_000, "halfcheetah-medium": 10_000}  # updates
FACTORS = 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5  # of the best return in the data
WORDS = "--lr", 3e-4, "--warmup", 500, "--record"


def measure():
    def stage(task):
        returns = load(task, "collected", "cpu").returns()
        checkpoint = train(STUDY, task, "dt", TASKS[task], "--env", task, *WORDS)
        _, script, data, rollout = load_agent(checkpoint)
        requests = np.outer(FACTORS, np.full(EPISODES, returns.max()))
        asking = script.Rollout(rollout.args, rollout.act_dim, rollout.act, torch.tensor(requests.ravel()).float())
        achieved = data.evaluate(asking, requests.size, seed=0, rewards=True).reshape(requests.shape)
        low, middle, high = np.quantile(returns, (0.05, 0.5, 0.95))
        curve = {"asked": requests[:, 0].tolist(), "mean": achieved.mean(1).tolist(), "std": achieved.std(1).tolist()}
        return {**curve, "low": low, "middle": middle, "high": high, "best": returns.max()}

    keep(STUDY, tasks={task: once(STUDY, task, lambda task=task: stage(task)) for task in TASKS})


def findings():
    """For each task: over the requests within the data's range, does more asked give more achieved?"""
    sentences = []
    for task, row in kept(STUDY)["tasks"].items():
        asked, mean = np.array(row["asked"]), np.array(row["mean"])
        within = asked <= row["best"]
        correlation = np.corrcoef(asked[within], mean[within])[0, 1]
        sentences.append(
            f"Expected on {task}: what is achieved follows what is asked, as far as the data go (5 to 95 % of their "
            f"episodes return {row['low']:.0f} to {row['high']:.0f}). "
            f"{'So it is' if correlation > 0.8 else 'Not so'}: correlation {correlation:.2f}; asked for "
            + ", ".join(f"{a:.0f} it gets {m:.0f}" for a, m in zip(asked, mean))
            + "."
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
