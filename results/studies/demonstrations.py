"""How many demonstrations does imitation need? GAIL and BC against the number of trajectories, as in the GAIL paper.

Both get the same trajectories of the expert, of each every 20th pair; GAIL takes 1,000,000 steps of the environment
and BC 10,000 updates; one seed, 20 episodes with the mean action. Returns are shares of the demonstrations' mean
return: 1 is the expert, 0 the random policy. Crosses: the paper's, as shares of its own expert (its logs,
results/studies/gail_paper_returns.csv). HalfCheetah's demonstrations are the medium ones, whose returns are about
those of the paper's expert.

Usage: make studies, or python results/studies/demonstrations.py
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import load
from results.checkpoint import load_agent
from results.studies.common import keep, kept, once, save_figure, train

STUDY, EPISODES, COUNTS = "demonstrations", 20, (1, 4, 11)
TASKS = {
    "hopper-expert": "hopper",
    "walker2d-expert": "walker",
    "halfcheetah-medium": "halfcheetah",
}  # the paper's name
STEPS = {"gail": 1_000_000, "bc": 10_000}


def measure():
    def stage(script, task, demos):
        steps = STEPS[script]
        words = ["--demos", demos, "--eval-every", steps // 4]
        checkpoint = train(STUDY, f"{script} {task} {demos}", script, steps, "--env", task, *words)
        _, _, data, policy = load_agent(checkpoint)
        return data.evaluate(policy, EPISODES, seed=0).mean()

    points, experts = [], {}
    for task in TASKS:
        data = load(task, "collected", "cpu")
        experts[task] = {"expert": data.returns().mean(), "random": data.task.ref_min}
        for demos in COUNTS:
            for script in STEPS:
                name = f"{script} {task} {demos}"
                value = once(STUDY, name, lambda s=script, t=task, d=demos: stage(s, t, d))
                points.append({"script": script, "task": task, "demos": demos, "return": value})
    keep(STUDY, experts=experts, points=points)


def share(task, value):
    expert = kept(STUDY)["experts"][task]
    return (value - expert["random"]) / (expert["expert"] - expert["random"])


def ours(script, task):
    """[(trajectories, share of the expert)]"""
    points = [p for p in kept(STUDY)["points"] if (p["script"], p["task"]) == (script, task)]
    return [(p["demos"], share(task, p["return"])) for p in points]


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
        gail, bc = dict(ours("gail", task)), dict(ours("bc", task))
        ahead = all(gail[n] > bc[n] for n in gail if n <= 4)
        percent = lambda x: f"{round(x, 2) + 0:.0%}"  # + 0: no "-0%"
        text = ", ".join(f"with {n} {percent(gail[n])} and {percent(bc[n])}" for n in gail)
        sentences.append(
            f"Expected on {task}: from few trajectories GAIL imitates better than BC. "
            f"{'So it is' if ahead else 'Not so'}: {text} of the expert's return."
        )
    return sentences


def draw():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(4.3 * len(TASKS), 3.6))
    for axis, task in zip(axes, TASKS):
        for script, color in (("gail", "tab:orange"), ("bc", "tab:gray")):
            axis.plot(*zip(*ours(script, task)), color=color, marker="o", label=script.upper())
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
