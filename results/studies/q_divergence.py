"""Recommending what nobody tried: what learners promise on ICU-Sepsis, what is true, and which cure helps.

From 10,000, 50,000 and 200,000 steps of the clinicians' policy (some 1,100, 5,400 and 21,700 patients), thrice each.
In a table: value iteration on the counts, which is offline Q-learning without a network and takes only what was taken;
the same with 0.2 / sqrt(count) off each step's value; BCQ, which wants an action taken 0.3 times as often as the
commonest; and the clone. With networks that see a state's 47 features: offline DQN, discrete BCQ, CQL with two weights,
and BC, which is BCQ's imitation. To fit a CPU: 2,000 updates at a learning rate of 1e-3, a copy every 50.
Nothing is discounted, so that all is a probability of survival; what is true is computed from the matrices.

Why CQL promises too much here is not settled. A part may be this: in a table it comes to rest where Q = target +
alpha (1 - softmax(Q) / behaviour). Over the data's actions the mean of what is added is 0, but the best action gets
more, and the target takes the best. 2,000 updates may also be too few; rewards as small as these make either matter.

Usage: make studies, or python results/studies/q_divergence.py
"""

import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy import sparse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algorithms import discrete_bcq, discrete_cql, offline_dqn
from datasets import find_task, icu_sepsis
from datasets.collect_discrete import collect
from datasets.store import write_hdf5
from results.checkpoint import load_agent
from results.studies.common import keep, kept, once, runs_of, save_figure

STUDY, TASK = "q_divergence", "icu-sepsis-clinicians-features"
SIZES, SEEDS, STEPS = (10_000, 50_000, 200_000), (0, 1, 2), 2_000
SETTINGS = dict(steps=STEPS, lr=1e-3, gamma=1.0, target_every=50, eval_every=STEPS, eval_episodes=1, device="cpu")
DEEP = {
    "offline DQN": (offline_dqn, {}),
    "BCQ": (discrete_bcq, {}),
    "CQL, alpha 0.1": (discrete_cql, {"alpha": 0.1}),
    "CQL, alpha 1": (discrete_cql, {"alpha": 1.0}),
}
COLORS = {"offline DQN": "tab:brown", "BCQ": "tab:blue", "CQL, alpha 0.1": "tab:orange", "CQL, alpha 1": "tab:red"}
COLORS |= {"BC": "tab:gray", "table": "tab:brown", "table, penalty": "tab:orange", "table, BCQ": "tab:blue"}
COLORS |= {"table, BC": "tab:gray"}
CLINICIANS, BEST = 0.78184, 0.87514  # survival under their policy, and under the best one
RARE = 0.01  # the clinicians take a rare action in fewer cases


def truth(policy, promise=None):
    """What is true of a policy (S, A): its survival, and the share of what it does that clinicians rarely do there."""
    rare = (policy * (icu_sepsis.load_mdp().clinicians < RARE)).sum(1)
    visits = icu_sepsis.visits(policy)
    promise = None if promise is None else float(promise)
    return {"promise": promise, "truth": icu_sepsis.value(policy), "rare": float(visits @ rare / visits.sum())}


def tables(data):
    """{name: measured} of the four learners in tables. A state without data has the value 0, and all is as likely."""
    S, A = icu_sepsis.S, icu_sepsis.A
    state, act, rew, next_state, _ = (column.flatten().long().numpy() for column in data.split(data.rows))
    row = state * A + act
    counts = np.bincount(row, minlength=S * A).reshape(S, A)
    n = np.maximum(counts, 1)
    rewards = np.bincount(row, rew, S * A).reshape(S, A) / n
    moves = sparse.csr_matrix((1 / n.ravel()[row], (row, next_state)), (S * A, S))
    start = icu_sepsis.load_mdp().start

    def iterate(allowed, penalty=0.0):
        values = np.zeros(S)
        for _ in range(1000):
            q = np.where(allowed, rewards - penalty / np.sqrt(n) + (moves @ values).reshape(S, A), -np.inf)
            best = np.where(allowed.any(1), q.max(1), 0)
            if np.abs(best - values).max() < 1e-6:
                break
            values = best
        policy = np.where(allowed.any(1)[:, None], icu_sepsis.deterministic(q.round(9).argmax(1)), icu_sepsis.uniform())
        return truth(policy, start @ values)

    clone = np.where(counts.any(1)[:, None], counts / np.maximum(counts.sum(1, keepdims=True), 1), icu_sepsis.uniform())
    often = (counts > 0) & (counts >= 0.3 * counts.max(1, keepdims=True))
    return {
        "table": iterate(counts > 0),
        "table, penalty": iterate(counts > 0, 0.2),
        "table, BCQ": iterate(often),
        "table, BC": truth(clone),
    }


def deep(name, file, seed):
    """The same of a network: what it says of its own actions at the start, what is true of them. BCQ's brings BC."""
    script, options = DEEP[name]
    runs = runs_of(STUDY, f"{name} {file.stem}", [SETTINGS, options])
    args = script.Args(env=str(file), seed=seed, resume=any(runs.rglob("checkpoint.pt")), **SETTINGS, **options)
    with mock.patch.dict(os.environ, RUNS_DIR=str(runs)):  # in this process: another would spend seconds on its imports
        script.train(args)
    (checkpoint,) = runs.rglob("checkpoint.pt")
    saved, script, data, policy = load_agent(checkpoint)
    critic = script.Critic(data.obs_shape, data.n_actions, *[0] * (script is discrete_cql))
    critic.load_state_dict(saved["state"]["critic"])
    obs = torch.from_numpy(icu_sepsis.observe(np.arange(icu_sepsis.S), **data.task.env_args))
    with torch.no_grad():
        act, out = policy(obs).numpy(), critic(obs)
    q = out[0] if name == "BCQ" else out.squeeze(-1) if script is discrete_cql else out
    promise = icu_sepsis.load_mdp().start @ q[torch.arange(len(q)), act].numpy()
    measured = {name: truth(icu_sepsis.deterministic(act), promise)}
    if name == "BCQ":
        measured["BC"] = truth(icu_sepsis.deterministic(out[1].argmax(1).numpy()))
    return measured


def measure():
    task, points = find_task(TASK), []
    for seed in SEEDS:
        for size in SIZES:
            file = runs_of(STUDY, f"{size} {seed}", []).with_suffix(".hdf5")
            data = collect(task, [("clinicians", size, seed)], f"{size} {seed}")
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_hdf5(file, data)
            measured = once(STUDY, f"tables {size} {seed}", [], lambda data=data: tables(data))
            for name in DEEP:
                stage = lambda name=name, file=file, seed=seed: deep(name, file, seed)
                measured |= once(STUDY, f"{name} {size} {seed}", [SETTINGS, DEEP[name][1]], stage)
            known = {"size": size, "seed": seed, "commit": measured.pop("commit")}
            points += [known | {"name": name, **point} for name, point in measured.items()]
    keep(STUDY, points=points)


def mean(points, name, key, size):
    return float(np.mean([point[key] for point in points if (point["name"], point["size"]) == (name, size)]))


def findings():
    """Sentences, each of what was expected, with the numbers that say whether it came so."""
    points, small, large = kept(STUDY)["points"], SIZES[0], SIZES[-1]
    ahead = {
        name: [mean(points, name, "promise", size) - mean(points, name, "truth", size) for size in SIZES]
        for name in ("table", "table, BCQ", "table, penalty", "offline DQN", "BCQ", "CQL, alpha 0.1", "CQL, alpha 1")
    }
    far, cured = ahead["table"] + ahead["offline DQN"], ahead["BCQ"] + ahead["CQL, alpha 0.1"] + ahead["CQL, alpha 1"]
    told = "; ".join(f"{name} " + ", ".join(f"{gap:+.3f}" for gap in gaps) for name, gaps in ahead.items())
    earned = lambda name, size: f"{mean(points, name, 'truth', size):.3f}"
    above = all(mean(points, name, "truth", large) > CLINICIANS for name in ("BCQ", "CQL, alpha 0.1", "CQL, alpha 1"))
    names = list(dict.fromkeys(point["name"] for point in points))
    return [
        f"Expected: what nothing cures promises far more than is true, and what is cured does not. "
        f"{'So it is' if min(far) > 0.1 and max(cured) < 0.1 else 'Not so throughout'}: promised less true survival, "
        f"from little to much data: {told}.",
        f"Expected: BCQ and CQL truly above the clinicians ({CLINICIANS:.3f}; the best policy {BEST:.3f}). "
        f"{'So it is' if above else 'Not so throughout'} with {large:,} steps. With {small:,}, and {large:,}, survive: "
        + "; ".join(f"{name} {earned(name, small)}, {earned(name, large)}" for name in names)
        + ".",
        f"Of what they do, the share that clinicians do in fewer than 1 % of such cases, with {small:,} and {large:,} "
        "steps: "
        + "; ".join(
            f"{name} {mean(points, name, 'rare', small):.0%}, {mean(points, name, 'rare', large):.0%}" for name in names
        )
        + ".",
    ]


def draw():
    import matplotlib.pyplot as plt

    points = kept(STUDY)["points"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), sharex=True)
    for row, tabular in zip(axes, (True, False)):
        for name in dict.fromkeys(point["name"] for point in points if point["name"].startswith("table") == tabular):
            for axis, key in zip(row, ("promise", "truth", "rare")):
                of = [[p[key] for p in points if (p["name"], p["size"]) == (name, size)] for size in SIZES]
                if None not in of[0]:
                    middle, low, high = ([f(values) for values in of] for f in (np.mean, np.min, np.max))
                    axis.plot(SIZES, middle, marker=".", color=COLORS[name], label=name)
                    axis.fill_between(SIZES, low, high, color=COLORS[name], alpha=0.2)
        for axis, title in zip(row, ("survival promised", "true survival", "share of rare actions")):
            axis.set(title=f"{title}, {'in tables' if tabular else 'networks'}", xscale="log")
            axis.grid(alpha=0.3)
        for axis in row[:2]:
            for value in (CLINICIANS, BEST):
                axis.axhline(value, color="gray", linewidth=0.8, linestyle="--")
        row[1].legend(fontsize=8)
    for axis in axes[1]:
        axis.set(xlabel="steps of the clinicians' data; dashed: clinicians, best")
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
