"""How good is MOPO's model, and does its penalty know where it is not?

One seed of the ensemble on each task, trained as mopo.py trains it (ten minutes on a CPU). On transitions held
out: each dimension's error of the ensemble's mean (root of the mean square), as a share of that of "the next is the
current one, the reward the mean one"; the predicted standard deviation over that error; and the true error against the
penalty u, in ten groups of equal size by u.

Usage: make studies, or python results/studies/model_error.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algorithms import mopo
from datasets import load
from results.checkpoint import load_checkpoint
from results.studies.common import keep, kept, once, save_figure, train

STUDY = "model_error"
TASKS = "halfcheetah-medium-replay", "hopper-medium-replay"
WORDS = "--eval-episodes", 1, "--rollouts", 1000, "--keep", 1
GROUPS = 10


@torch.no_grad()
def quality(dynamics, data, rows):
    """What the study keeps of a task: lists of a number for each dimension, or for each group."""
    batch = data.split(rows)
    mean, log_std = dynamics(batch.obs, batch.act)  # (N, B, O + 1)
    y = mopo.outcome(batch)  # (B, O + 1)
    naive = torch.cat([torch.zeros(data.obs_dim), data.rew.mean()[None]])
    error = mean.mean(0) - y
    rmse, rmse_naive = ((x**2).mean(0).sqrt() for x in (error, naive - y))
    u = mopo.uncertainty(mopo.Args(), mean, log_std).numpy()  # (B,)
    length = error.norm(dim=-1).numpy()
    groups = np.array_split(u.argsort(), GROUPS)
    return {
        "share": (rmse / rmse_naive).tolist(),
        "calibration": ((2 * log_std).exp().mean((0, 1)).sqrt() / rmse).tolist(),
        "correlation": mopo.rank_correlation(mopo.Args(), batch, dynamics).item(),
        "u": [u[group].mean().item() for group in groups],
        "error": [length[group].mean().item() for group in groups],
    }


def measure():
    def stage(task):
        saved = load_checkpoint(train(STUDY, task, "mopo", 1, "--env", task, *WORDS))
        data = load(task, "collected", "cpu")
        dynamics = mopo.Dynamics(mopo.NETWORKS, data)
        dynamics.load_state_dict(saved["state"]["dynamics"])
        rows, _ = mopo.held_out(data, saved["args"]["seed"])
        return quality(dynamics, data, rows) | {"epochs": saved["state"]["epochs"].item()}

    settings = [*WORDS, GROUPS]
    keep(STUDY, tasks={task: once(STUDY, task, settings, lambda task=task: stage(task)) for task in TASKS})


def findings():
    sentences = []
    for task, row in kept(STUDY)["tasks"].items():
        share, ratio = np.array(row["share"]), np.array(row["calibration"])
        good, honest = share.max() < 0.5, ratio.min() >= 0.5 and ratio.max() <= 2
        sentences += [
            f"Expected on {task}: in every dimension the error is below half of the naive one. "
            f"{'So it is' if good else 'Not so'}: from {share.min():.2f} to {share.max():.2f} of it, after "
            f"{row['epochs']:.0f} epochs.",
            "Expected: the predicted deviation is between half and twice the error. "
            f"{'So it is' if honest else 'Not so'}: {ratio.min():.2f} to {ratio.max():.2f} times.",
            "Expected: the penalty ranks the errors, with a correlation above 0.5. "
            f"{'So it is' if row['correlation'] > 0.5 else 'Not so'}: Spearman's is {row['correlation']:.2f}.",
        ]
    return sentences


def draw():
    import matplotlib.pyplot as plt

    figure, (shares, ratios, errors) = plt.subplots(1, 3, figsize=(13, 3.6))
    for task, row in kept(STUDY)["tasks"].items():
        for axis, name in ((shares, "share"), (ratios, "calibration")):
            axis.plot(row[name], marker="o", linestyle="", label=task)
        errors.plot(row["u"], row["error"], marker="o", label=f"{task}: {row['correlation']:.2f}")
    shares.axhline(0.5, color="gray", linewidth=0.8)
    shares.set(title="error / naive error", xlabel="dimension (last of each: the reward)", ylim=(0, None))
    for level in (0.5, 2):
        ratios.axhline(level, color="gray", linewidth=0.8)
    ratios.set(title="predicted deviation / error", xlabel="dimension", yscale="log")
    errors.set(title="penalty and error, Spearman's correlation", xlabel="u, mean of a tenth", ylabel="error")
    errors.set(xscale="log", yscale="log")
    for axis in (shares, ratios, errors):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
