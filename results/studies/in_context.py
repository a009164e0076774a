"""Does a transformer that imitates how others learned learn itself, on tasks that nobody has shown it?

Algorithm distillation (ad.py) on two worlds of datasets/tasks/dark_room.py: a room of 5 x 5 cells with an unseen goal,
and bandits of ten arms. It is trained on the histories of a learner, tabular Q-learning or upper confidence bounds;
beside it, in the room, expert distillation: the same transformer on an expert's episodes, which are all alike. Then it
acts a hundred episodes in a row on tasks that are held out, with no update of its weights: what it has seen and got in
its last four episodes (the bandit's: pulls, 100) is all that can make it better. Laid beside it is the source on the
same tasks, which learns each from nothing, in so many episodes. Regret is what the best arm would have paid more.
To fit a CPU: 6,000 updates in the room, 2,000 of the bandit; three seeds.

Usage: make studies, or python results/studies/in_context.py
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algorithms import ad
from datasets.tasks import dark_room
from results.checkpoint import load_checkpoint
from results.studies.common import SEEDS, keep, kept, mean_std, once, save_figure, train

STUDY, STEPS, EPISODES = "in_context", {"dark-room-5": 6_000, "bandit": 2_000}, 100
CELLS = ("dark-room-5", "source"), ("dark-room-5", "expert"), ("bandit", "source")


def returns(checkpoint):
    """Of each episode in a row, the mean return over tasks: those held out, and those of the histories."""
    saved = load_checkpoint(checkpoint)
    data = dark_room.load_histories(saved["task"]["name"], saved["args"]["history"])
    tasks, held_out = dark_room.split(data.kind)
    world = data.world(held_out)
    context = saved["args"]["context"] * world.length
    actor = ad.Actor(world.n_obs, world.n_actions, context)
    actor.load_state_dict(saved["state"]["actor"])
    torch.manual_seed(0)
    acted = {
        name: ad.learn_in_context(data.world(some), EPISODES, context, actor).mean(0).tolist()
        for name, some in (("held_out", held_out), ("trained", tasks[:: len(tasks) // 100]))
    }
    return acted


def source_returns(world):
    """The same of the source, on the tasks held out: of all its episodes, not only of those that are kept."""
    kind = dark_room.WORLDS[world]
    held_out = kind(dark_room.split(kind)[1], 3)
    learner = dark_room.upper_confidence if world == "bandit" else dark_room.q_learning
    _, _, rew = dark_room.play(held_out, learner(held_out, kind.episodes, np.random.default_rng(3)))
    return rew.reshape(held_out.n, -1, kind.length).sum(2).mean(0).tolist()


def measure():
    cells = {}
    for world, history in CELLS:
        runs = []
        for seed in SEEDS:
            name = f"{world} {history} {seed}"
            words = "--env", world, "--history", history, "--seed", seed, "--eval-every", STEPS[world]
            checkpoint = train(STUDY, name, "ad", STEPS[world], *words, source=None)
            runs.append(once(STUDY, f"{name} returns", [STEPS[world], EPISODES], partial(returns, checkpoint)))
        cells[f"{world} {history}"] = runs
    best = dark_room.split(dark_room.Bandit)[1].max(1).mean()  # what the best arm pays
    keep(STUDY, cells=cells, sources={world: source_returns(world) for world, _ in CELLS}, best_arm=best)


def ends(runs, name="held_out"):
    """Of each seed, the mean return of the first tenth of the episodes and of the last."""
    tenth = EPISODES // 10
    return [[np.mean(run[name][part]) for run in runs] for part in (slice(tenth), slice(-tenth, None))]


def findings():
    result = kept(STUDY)
    cells, sources = result["cells"], result["sources"]
    final = np.mean(sources["dark-room-5"][-len(sources["dark-room-5"]) // 10 :])
    first, last = ends(cells["dark-room-5 source"])
    learned = ends(cells["dark-room-5 source"], "trained")[1]
    rises = min(last) >= 0.8 * final
    sentences = [
        f"Expected in the room: on goals that no history is of, the return rises over episodes in context to 80 % of "
        f"the source's last, {final:.1f}. {'So it does' if rises else 'Not so'}: from {mean_std(first)} in the first "
        f"ten episodes to {mean_std(last)} in the last ten, {100 * np.mean(last) / final:.0f} %; on goals of the "
        f"histories to {mean_std(learned)}. The source itself needs {len(sources['dark-room-5'])} episodes."
    ]
    first, last = ends(cells["dark-room-5 expert"])
    flat = max(last) - min(first) < 0.1 * final
    sentences.append(
        f"Expected: expert distillation, whose episodes are all alike, does not become better. "
        f"{'So it is' if flat else 'Not so'}: {mean_std(first)} at first, {mean_std(last)} at last."
    )
    regret = [EPISODES * result["best_arm"] - np.sum(run["held_out"]) for run in cells["bandit source"]]
    of_source = EPISODES * result["best_arm"] - np.sum(sources["bandit"])
    less = max(regret) <= 1.5 * of_source
    sentences.append(
        f"Expected of bandits: a regret after {EPISODES} pulls within 1.5 times that of the source, upper confidence "
        f"bounds. {'So it is' if less else 'Not so'}: {mean_std(regret)} against {of_source:.1f}."
    )
    return sentences


def draw():
    import matplotlib.pyplot as plt

    result = kept(STUDY)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, world in zip(axes, ("dark-room-5", "bandit")):
        for cell, runs in result["cells"].items():
            name, history = cell.split()
            for part, style in (("held_out", "-"), ("trained", ":")) if name == world else ():
                curves = np.array([run[part] for run in runs])  # (seeds, episodes)
                color, label = f"C{('source', 'expert').index(history)}", f"{history}: {part.replace('_', ' ')}"
                axis.plot(curves.mean(0), style, color=color, label=label)
                axis.fill_between(range(EPISODES), curves.min(0), curves.max(0), color=color, alpha=0.12, linewidth=0)
        source = result["sources"][world]
        axis.plot(
            np.linspace(0, EPISODES, len(source)), source, color="black", linewidth=0.8, label="the source itself"
        )
        axis.set(title=world, xlabel="episodes in a row" if world != "bandit" else "pulls", ylabel="mean return")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_xlabel(f"episodes in a row (the source's: {len(result['sources']['dark-room-5'])}, drawn as wide)")
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
