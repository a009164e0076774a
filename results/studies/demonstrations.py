"""How many demonstrations does imitation need? GAIL and BC against the number of trajectories, as in the GAIL paper.

Both get the same trajectories of the expert, of each every 20th pair; GAIL takes 1,000,000 steps of the environment
and BC 10,000 updates; three seeds, 20 episodes with the mean action. Returns are shares of the demonstrations' mean
return: 1 is the expert, 0 the random policy. Crosses: the paper's, as shares of its own expert (its logs,
results/studies/gail_paper_returns.csv). HalfCheetah's demonstrations are the medium ones, whose returns are about
those of the paper's expert.

Usage: make studies, or python results/studies/demonstrations.py
"""

import csv
import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import load
from results.checkpoint import load_agent
from results.studies.common import SEEDS, keep, kept, once, save_figure, train

STUDY, EPISODES, COUNTS = "demonstrations", 20, (1, 4, 11)
TASKS = {
    "hopper-expert": "hopper",
    "walker2d-expert": "walker",
    "halfcheetah-medium": "halfcheetah",
}  # the paper's name
STEPS = {"gail": 1_000_000, "bc": 10_000}


def measure():
    """Seed after seed, so that what is kept, should it be interrupted, is every point with fewer seeds."""
    points, experts = [], {}

    def stage(script, task, demos, seed):
        steps, name = STEPS[script], f"{script} {task} {demos} {seed}"
        words = "--env", task, "--demos", demos, "--seed", seed, "--eval-every", steps // 4

        def run():
            _, _, data, policy = load_agent(train(STUDY, name, script, steps, *words))
            return {"return": data.evaluate(policy, EPISODES, seed=0).mean()}

        return once(STUDY, name, [script, steps, EPISODES, *words], run)

    for seed in SEEDS:
        for task, demos, script in itertools.product(TASKS, COUNTS, STEPS):
            if task not in experts:
                data = load(task, "collected", "cpu")
                experts[task] = {"expert": data.returns().mean(), "random": data.task.ref_min}
            measured = stage(script, task, demos, seed)
            points.append({"script": script, "task": task, "demos": demos, "seed": seed, **measured})
        keep(STUDY, experts=experts, points=points)


def share(task, value):
    expert = kept(STUDY)["experts"][task]
    return (value - expert["random"]) / (expert["expert"] - expert["random"])


def ours(script, task):
    """{trajectories: the share of the expert, of each seed}"""
    points = [p for p in kept(STUDY)["points"] if (p["script"], p["task"]) == (script, task)]
    return {n: np.array([share(task, p["return"]) for p in points if p["demos"] == n]) for n in COUNTS}


def papers(script, task):
    """The same of the paper, whose random policy counts as 0 here."""
    with Path(__file__).with_name("gail_paper_returns.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["task"], row["algorithm"].lower()) == (TASKS[task], script)]
    return [
        (int(row["num_expert_trajectories"]), float(row["return_mean"]) / float(row["expert_return_mean"]))
        for row in rows
    ]


def findings():
    sentences = []
    for task in TASKS:
        gail, bc = ours("gail", task), ours("bc", task)
        ahead = all(gail[n].min() > bc[n].max() for n in gail if n <= 4)
        percent = lambda x: f"{round(x.mean(), 2) + 0:.0%}"  # + 0: no "-0%"
        text = ", ".join(f"with {n} {percent(gail[n])} and {percent(bc[n])}" for n in gail)
        text += f" of the expert's return ({len(gail[4])} seed{'s' * (len(gail[4]) > 1)})"
        sentences.append(
            f"Expected on {task}: from few trajectories GAIL imitates better than BC. "
            f"{'So it is, in every seed' if ahead else 'Not so'}: {text}."
        )
    return sentences


def draw():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(4.3 * len(TASKS), 3.6))
    for axis, task in zip(axes, TASKS):
        for script, color in (("gail", "tab:orange"), ("bc", "tab:gray")):
            own = ours(script, task)
            axis.plot(own.keys(), [x.mean() for x in own.values()], color=color, marker="o", label=script.upper())
            axis.vlines(own.keys(), *zip(*((x.min(), x.max()) for x in own.values())), color=color)
            axis.plot(
                *zip(*papers(script, task)), color=color, marker="x", linestyle=":", label=f"{script.upper()} (paper)"
            )
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set(title=task, xlabel="trajectories", ylabel="share of the expert's return", ylim=(-0.15, 1.2))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
