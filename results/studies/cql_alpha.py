"""How conservative is right: CQL's score, and what its critics promise and its policy earns, against alpha.

On halfcheetah-medium-replay and -medium, alpha fixed; BC is the line that conservatism approaches, and the lowest alpha
stands for 0, which is SAC on fixed data. Three seeds, of each 20 episodes. To fit a CPU: batches of 128, four sampled
actions instead of ten, the policy's learning rate 3e-4, and 10,000 updates. "Above" is by more than both spreads.

Usage: make studies, or python results/studies/cql_alpha.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from results.studies.common import SEEDS, beyond, keep, kept, mean_std, once, save_figure, train, value_and_truth

STUDY, TASKS, STEPS, EPISODES = "cql_alpha", ("halfcheetah-medium-replay", "halfcheetah-medium"), 10_000, 20
ALPHAS = 1e-3, 1.0, 5.0, 20.0, 100.0  # the first stands for 0, which has no logarithm
SETTINGS = "--batch-size", 128, "--eval-every", STEPS
CQL = "--n-actions", 4, "--actor-lr", 3e-4


def measure():
    """Seed after seed, so that what is kept, should it be interrupted, is every point with fewer seeds."""
    tasks = {task: {"clone": [], "points": [{"alpha": alpha, "seeds": []} for alpha in ALPHAS]} for task in TASKS}

    def stage(script, task, seed, *words):
        words = "--env", task, "--seed", seed, *SETTINGS, *words
        name = f"{task} {words[-1] if script == 'cql' else 'BC'} {seed}"
        return once(
            STUDY,
            name,
            [script, STEPS, EPISODES, *words],
            lambda: value_and_truth(train(STUDY, name, script, STEPS, *words), EPISODES),
        )

    for seed in SEEDS:
        for task, result in tasks.items():
            result["clone"].append(stage("bc", task, seed))
            for point in result["points"]:
                point["seeds"].append(stage("cql", task, seed, *CQL, "--alpha", point["alpha"]))
        keep(STUDY, tasks=tasks)


def values(seeds, name):
    return [row[name] for row in seeds]


def findings():
    sentences = []
    for task, result in kept(STUDY)["tasks"].items():
        points, clone = result["points"], values(result["clone"], "score")
        scores = {point["alpha"]: values(point["seeds"], "score") for point in points}
        best = max(scores, key=lambda alpha: np.mean(scores[alpha]))
        below = [f"{alpha:g}" for alpha in scores if alpha != best and beyond(scores[best], scores[alpha])]
        above = [f"{alpha:g}" for alpha in scores if beyond(scores[alpha], clone)]
        promises = [np.mean(values(point["seeds"], "promise")) for point in points]
        too_high = [
            f"{point['alpha']:g}"
            for point in points
            if np.mean(values(point["seeds"], "promise")) > np.mean(values(point["seeds"], "truth"))
        ]
        falls = all(a > b for a, b in zip(promises, promises[1:]))
        sentences += [
            f"{task}, scores: "
            + ", ".join(f"alpha {alpha:g} {mean_std(seeds)}" for alpha, seeds in scores.items())
            + f"; BC {mean_std(clone)} ({len(clone)} seed{'s' * (len(clone) > 1)}). The highest, alpha {best:g}, is "
            + (f"above alpha {', '.join(below)}" if below else "above no other")
            + f" by more than both spreads. Above BC: {', '.join(above) or 'none'}.",
            f"Expected on {task}: the promise falls as alpha grows. {'So it is' if falls else 'Not so throughout'}: "
            f"from {promises[0]:,.0f} to {promises[-1]:,.0f}; above the truth with alpha "
            f"{', '.join(too_high) or 'none'}.",
        ]
    return sentences


def draw():
    import matplotlib.pyplot as plt

    tasks = kept(STUDY)["tasks"]
    figure, axes = plt.subplots(len(tasks), 2, figsize=(9, 3.4 * len(tasks)), squeeze=False)
    for (scores, returns), (task, result) in zip(axes, tasks.items()):
        lines = (scores, "score", "CQL", "-"), (returns, "promise", "promised", "-"), (returns, "truth", "true", ":")
        for axis, name, label, style in lines:
            seeds = np.array([values(point["seeds"], name) for point in result["points"]])  # (alphas, seeds)
            spread = seeds.std(1, ddof=1) if seeds.shape[1] > 1 else None
            style = dict(color="tab:red", linestyle=style, marker=".", capsize=2, label=label)
            axis.errorbar(ALPHAS, seeds.mean(1), spread, **style)
        scores.axhline(np.mean(values(result["clone"], "score")), color="tab:gray", label="BC")
        scores.set(title=task, ylabel="normalized score")
        returns.set(title="discounted return from the start")
        for axis in (scores, returns):
            axis.set(xscale="log", xlabel="alpha")
            axis.grid(alpha=0.3)
            axis.legend()
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
