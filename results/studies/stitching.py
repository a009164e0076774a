"""Stitching: who reaches a goal that no single trajectory of the data reaches from the start?

On the mazes stitch-meet, where trajectories from the start and trajectories to the goal share cells, and stitch-gap,
where they do not: nothing in the data crosses the cells between them, and whoever arrives there has extrapolated.
Success of 50 episodes after 20,000 updates, one seed; IQL with the expectiles 0.7 and 0.9. Values are AntMaze's, on
which the scripts' TUNED model these mazes; to fit a CPU, CQL has batches of 128 and four sampled actions, TT two layers
and plans of five steps.

It shows who does it with these settings, and not who can. The way is 283 steps long, over which a discount of 0.99
leaves 0.06, and 20,000 updates are a hundred time constants of the target networks; CQL's threshold is meant for ten
actions; no method but IQL had two values of its argument. Who fails here may stitch a shorter way. DT has no values at
all, and TT's are sums of rewards along the data's own trajectories: only its plan could join two of them.

Usage: make studies, or python results/studies/stitching.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import find_task
from datasets.tasks import mazes
from results.checkpoint import load_agent
from results.studies.common import keep, kept, once, rollout, save_figure, train

STUDY, TASKS, STEPS, EPISODES, DRAWN = "stitching", ("stitch-meet", "stitch-gap"), 20_000, 50, 10
SMALL = "--layers", 2, "--width", 64, "--context", 4, "--batch-size", 64, "--warmup", 500, "--beam", 32, "--horizon", 5
METHODS = {
    "IQL 0.7": ["iql", "--expectile", 0.7],
    "IQL 0.9": ["iql", "--expectile", 0.9],
    "CQL": ["cql", "--batch-size", 128, "--n-actions", 4],
    "TD3+BC": ["td3_bc"],
    "BC": ["bc"],
    "10% BC": ["bc", "--top-fraction", 0.1],
    "DT": ["dt"],
    "TT": ["tt", *SMALL],
}


def measure():
    def stage(name, task):
        script, *words = METHODS[name]
        checkpoint = train(STUDY, f"{task} {name}", script, STEPS, "--env", task, "--eval-every", STEPS, *words)
        _, _, data, policy = load_agent(checkpoint)
        obs, rew = rollout(data, policy, EPISODES)
        paths = []
        for k in range(DRAWN):
            end = rew[:, k].argmax() + 1 if rew[:, k].any() else len(rew)
            paths.append(obs[np.linspace(0, end, 40).astype(int), k, :2].round(2).tolist())
        return {"success": rew.sum(0).mean(), "paths": paths}

    def measured(name, task):
        return once(STUDY, f"{task} {name}", [*METHODS[name], STEPS, EPISODES, DRAWN], lambda: stage(name, task))

    keep(STUDY, tasks={task: {name: measured(name, task) for name in METHODS} for task in TASKS})


def findings():
    sentences = []
    for task, rows in kept(STUDY)["tasks"].items():
        arrive = ", ".join(f"{name} {row['success']:.0%}" for name, row in rows.items())
        sentences.append(f"{task}, the share of 50 episodes that reach the goal, one seed: {arrive}.")
    return sentences


def draw():
    import matplotlib.pyplot as plt

    tasks = kept(STUDY)["tasks"]
    names = [name for name in METHODS if all(name in tasks[task] for task in TASKS)]
    figure, axes = plt.subplots(len(TASKS), len(names), figsize=(2.6 * len(names), 2.9 * len(TASKS) / 2 + 0.6))
    for row, task in zip(axes, TASKS):
        for axis, name in zip(row, names):
            paths = np.array(tasks[task][name]["paths"])  # (DRAWN, 40, 2)
            mazes.draw(find_task(task), paths.reshape(-1, 2), 40 * np.arange(1, DRAWN + 1), axis)
            axis.set_title(f"{name}, {task.split('-')[1]}: {tasks[task][name]['success']:.0%}", fontsize=9)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
