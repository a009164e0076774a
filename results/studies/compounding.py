"""Do a clone's errors compound, and does asking the expert on the clone's own states stop it?

The tightrope: at each of T steps the expert follows a bit, which the learner sees flipped with probability eps. A
wrong step falls to one of eight places beside the rope, each with a climb of its own that leads back; each step there
costs 1. Both learners are tables of what the expert did most often at what they saw, of as many labels and 10 seeds:
BC's are the expert's own steps, DAgger's are of ten rounds, the first the expert's. Costs are exact, by the
probabilities of all places. A clone that falls never climbs, so that its cost is the sum over t of 1 - (1 - eps)^t:
eps T^2 / 2 while eps T is small, and less than T. Where it has never been, DAgger knows no more, and few falls show it
few places. Then Hopper, with 4,000 labels and 3 seeds: dagger.py, and its --decay 1, which clones the expert. Of ten
episodes with the mean action, the distance to the nearest of the expert's states (of ten other episodes), in their
standard deviations.

Usage: make studies, or python results/studies/compounding.py
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import find_task, load_expert
from results.checkpoint import load_agent
from results.studies.common import keep, kept, once, rollout, save_figure, train

STUDY = "compounding"
EPS, HORIZONS, SEEDS = (0.002, 0.02), (8, 16, 32, 64, 128, 256, 512), 10
LABELS, ROUNDS, PLACES = (10_000, 100_000), 10, 8
TASK, STEPS, RUNS, EPISODES = "hopper-expert", 4000, 3, 10
BIN, LATE = 20, 10  # steps of the environment; bins, after which a policy has had time to drift
METHODS = {"BC": ["--decay", 1], "DAgger": []}

# Observations: 0 and 1 the bit as it is seen, 2 to 9 the places. Actions: 0 and 1 steps, 2 to 9 climbs.


def table_of(labels):
    """labels (N, 2), rows (what was seen, what the expert does) -> the action at each observation, (10,): the most
    frequent there; where nothing was ever seen, the most frequent of all."""
    n = 2 + PLACES
    counts = np.bincount(labels @ [n, 1], minlength=n * n).reshape(n, n)
    return np.where(counts.any(1), counts.argmax(1), counts.sum(0).argmax())


def walk(rng, table, eps, T, n):
    """n walks of T steps by the table, or by the expert where it is None -> labels (n T, 2) of all that was seen."""
    place, labels = np.zeros(n, int), []  # 0: on the rope
    for _ in range(T):
        bit, flipped = rng.integers(2, size=n), rng.random(n) < eps
        seen = np.where(place > 0, place + 1, bit ^ flipped)
        expert = np.where(place > 0, place + 1, bit)
        act = expert if table is None else table[seen]
        fallen = rng.integers(1, PLACES + 1, size=n)
        place = np.where(act == expert, 0, np.where(place > 0, place, fallen))
        labels.append(np.stack([seen, expert], 1))
    return np.concatenate(labels)


def cost(table, eps, T):
    """The expected number of steps off the rope, of the T after the first stands on it: exact."""
    wrong = np.mean([(1 - eps) * (table[bit] != bit) + eps * (table[1 - bit] != bit) for bit in (0, 1)])
    back = table[2:] == np.arange(2, 2 + PLACES)
    rope, places, total = 1.0, np.zeros(PLACES), 0.0
    for _ in range(T):
        rope, places = rope * (1 - wrong) + places[back].sum(), places * ~back + rope * wrong / PLACES
        total += places.sum()
    return total


def tightrope(eps, labels, T, seed):
    """{method: cost}, after so many labels."""
    rng, share = np.random.default_rng([seed, T, labels, int(1000 * eps)]), labels // ROUNDS
    seen = walk(rng, None, eps, T, -(-share // T))[:share]
    clone = np.concatenate([seen, walk(rng, None, eps, T, -(-labels // T))[: labels - share]])
    for _ in range(ROUNDS - 1):
        seen = np.concatenate([seen, walk(rng, table_of(seen), eps, T, -(-share // T))[:share]])
    return {"BC": float(cost(table_of(clone), eps, T)), "DAgger": float(cost(table_of(seen), eps, T))}


def drift(data, policy, states, episodes=EPISODES):
    """Of a policy's episodes, by bins of BIN steps: the share that still goes on, and how far they then are from the
    nearest of the expert's states (N, O), in their standard deviations (None where none goes on); the mean return."""
    obs, rew = rollout(data, policy, episodes)
    scaled = [torch.from_numpy(x / states.std(0)).float() for x in (obs[:-1], states)]
    near = torch.cdist(scaled[0].flatten(0, 1), scaled[1]).amin(1).view(rew.shape).numpy()  # (T, episodes)
    bins = [(near[t : t + BIN], rew[t : t + BIN] != 0) for t in range(0, len(rew), BIN)]
    return {
        "distance": [round(float(far[on].mean()), 4) if on.any() else None for far, on in bins],
        "alive": [float(on.mean()) for _, on in bins],
        "return": float(rew.sum(0).mean()),
    }


def hopper():
    """{method: what `drift` says, one of each seed}; of the expert, on other episodes than its states are of."""
    expert, agents = load_expert(find_task(TASK)), {}
    for name, words in METHODS.items():
        for seed in range(RUNS):
            more = ["--env", TASK, "--seed", seed, "--eval-every", STEPS, "--eval-episodes", 1, *words]
            checkpoint = train(STUDY, f"{name} {seed}", "dagger", STEPS, *more, source=None)
            _, _, data, policy = load_agent(checkpoint)
            agents.setdefault(name, []).append((data, policy))
    agents["expert"] = [(data, lambda x: torch.from_numpy(expert(x.numpy())))]
    obs, rew = rollout(*agents["expert"][0], EPISODES, seed=1)
    states = obs[:-1][rew != 0]  # (N, O)
    return {name: [drift(data, policy, states) for data, policy in own] for name, own in agents.items()}


def ropes():
    """{"eps labels T": {method: costs of the seeds}}"""
    found = {}
    for eps, labels, T in itertools.product(EPS, LABELS, HORIZONS):
        own = [tightrope(eps, labels, T, seed) for seed in range(SEEDS)]
        found[f"{eps} {labels} {T}"] = {name: [one[name] for one in own] for name in METHODS}
    return found


def measure():
    walks = once(STUDY, "tightrope", [EPS, HORIZONS, SEEDS, LABELS, ROUNDS, PLACES], ropes)
    runs = once(STUDY, "hopper", [TASK, STEPS, RUNS, EPISODES, BIN, METHODS], hopper)
    keep(STUDY, commits=[row.pop("commit") for row in (walks, runs)], ropes=walks, hopper=runs)


def costs(method, eps, labels):
    """(horizons, seeds)"""
    return np.array([kept(STUDY)["ropes"][f"{eps} {labels} {T}"][method] for T in HORIZONS])


def slopes(method, eps, labels, most):
    """Of log cost over log T up to the horizon `most`: one of each seed."""
    n = HORIZONS.index(most) + 1
    return np.polyfit(np.log(HORIZONS[:n]), np.log(costs(method, eps, labels)[:n]), 1)[0]


def mean_and_deviation(values, digits):
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def findings():
    eps, sentences = EPS[0], []
    for labels in LABELS:
        bc, dagger = slopes("BC", eps, labels, 64), slopes("DAgger", eps, labels, HORIZONS[-1])
        as_expected = 1.8 < bc.mean() < 2.2 and 0.9 < dagger.mean() < 1.2
        last = [mean_and_deviation(costs(method, eps, labels)[-1], 1) for method in METHODS]
        sentences.append(
            f"Expected on the tightrope from {labels:,} labels: BC's cost grows as T^2, DAgger's as T. "
            f"{'So it is' if as_expected else 'Not so'}: at eps = {eps} the slopes of log cost over log T are "
            f"{mean_and_deviation(bc, 2)} of BC to T = 64, while eps T is small, and {mean_and_deviation(dagger, 2)} "
            f"of DAgger to T = {HORIZONS[-1]}, where the costs are {last[0]} and {last[1]} and eps T is "
            f"{eps * HORIZONS[-1]:.1f}."
        )
    own = {name: np.array([run["return"] for run in runs]) for name, runs in kept(STUDY)["hopper"].items()}
    far = {name: [late(run) for run in runs] for name, runs in kept(STUDY)["hopper"].items()}
    apart = min(far["BC"]) > max(far["DAgger"])
    bc, dagger = (f"{mean_and_deviation(far[name], 2)} and {mean_and_deviation(own[name], 0)}" for name in METHODS)
    sentences.append(
        f"Expected on {TASK}: BC drifts away from the expert's states, and DAgger stays. "
        f"{'So it is' if apart else 'Not so of every seed'}: from step {LATE * BIN} on the distance, and the return, "
        f"are {bc} of BC, {dagger} of DAgger, {far['expert'][0]:.2f} and {own['expert'][0]:.0f} of the expert."
    )
    return sentences


def late(run):
    """The mean distance from bin LATE on; of a policy that has fallen by then, in the last bin before."""
    known = [x for x in run["distance"] if x is not None]
    return float(np.mean(known[LATE:] or known[-1:]))


def draw():
    import matplotlib.pyplot as plt

    colors = {"BC": "tab:gray", "DAgger": "tab:blue", "expert": "black"}
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8))
    for axis, eps in zip(axes, EPS):
        for method, (labels, style) in itertools.product(METHODS, zip(LABELS, ("--", "-"))):
            own = costs(method, eps, labels)
            label = f"{method}, {labels:,} labels"
            axis.errorbar(HORIZONS, own.mean(1), own.std(1, ddof=1), color=colors[method], linestyle=style, label=label)
        fallen = [np.sum(1 - (1 - eps) ** np.arange(1, T + 1)) for T in HORIZONS]
        axis.plot(HORIZONS, fallen, "k:", label="who never climbs")
        axis.plot(HORIZONS, eps * np.array(HORIZONS), "k-", linewidth=0.6, label="eps T")
        axis.set(xscale="log", yscale="log", title=f"tightrope, eps = {eps}", xlabel="T", ylabel="steps off the rope")
    for name, runs in kept(STUDY)["hopper"].items():
        for i, run in enumerate(runs):
            t = BIN * np.arange(len(run["alive"]))
            label = name if i == 0 else None
            for axis, key in zip(axes[2:], ("distance", "alive")):
                axis.plot(t, [np.nan if x is None else x for x in run[key]], color=colors[name], label=label)
    axes[2].set(title=f"{TASK}: distance from the expert's states", xlabel="step", yscale="log")
    axes[3].set(title=f"{TASK}: share of episodes that go on", xlabel="step", ylim=(0, 1.05))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
