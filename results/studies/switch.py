"""What does it cost to go online? The score through the switch, and which conservatism pays for it.

Each method learns 50,000 updates from the data, then acts 100,000 steps with one update each; three tasks, three seeds,
10 episodes every 5,000 steps. The drop is the score before less the lowest within the first 50,000 steps; the regret,
as in Cal-QL's paper, 1 less the mean share of an expert's score over all that was online. "SAC after CQL" takes CQL's
agent on without its penalty and without its data. RLPD and SAC have no offline phase: RLPD has the data in each batch
(4 critics, 4 updates a step: a CPU's), SAC nothing. Off2On has 2 members; SPOT's first 20,000 updates are its VAE's.

Usage: make studies, or python results/studies/switch.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import find_task
from results.checkpoint import load_checkpoint
from results.studies.common import keep, kept, once, save_figure, train

STUDY, OFFLINE, ONLINE, EVERY, SOON = "switch", 50_000, 100_000, 5_000, 50_000
TASKS, SEEDS = ("halfcheetah-medium", "hopper-medium", "walker2d-medium-replay"), (0, 1, 2)
AFTER_CQL = ["--no-calibrated", "--checkpoint"]
METHODS = {  # name: (script, its words)
    "IQL": ("iql_finetune", ["--offline-steps", OFFLINE]),
    "AWAC": ("awac_finetune", ["--offline-steps", OFFLINE]),
    "SPOT": ("spot", ["--offline-steps", OFFLINE, "--vae-steps", 20_000]),
    "Cal-QL": ("cal_ql", ["--offline-steps", OFFLINE]),
    "CQL": ("cal_ql", AFTER_CQL),  # which is followed by the path
    "SAC after CQL": ("cal_ql", ["--online-alpha", 0.0, "--offline-share", 0.0, *AFTER_CQL]),
    "Off2On": ("off2on", ["--offline-steps", OFFLINE, "--members", 2]),
    "RLPD": ("rlpd", ["--utd", 4, "--n-critics", 4]),
    "SAC": ("sac", []),
}
GUARDED = "IQL", "AWAC", "Cal-QL", "SPOT"  # of which the issue is: what they know they keep


def curve_of(saved):
    """[(environment step, score)] of a checkpoint's curve, from the switch on."""
    switch = saved["args"].get("offline_steps", 0)
    points = [(point["step"] - switch, float(np.mean(point["scores"]))) for point in saved["curve"]]
    return [(step, score) for step, score in points if step >= 0]


def cost(curve):
    """Of a curve from the switch on: the score before, the drop, the steps until it is back (None: never), the last
    score, the regret. Without a score at step 0, of what had no offline phase, the first three are None."""
    steps, scores = np.array(curve).T
    online = steps > 0
    row = {"before": None, "drop": None, "back": None, "final": scores[-1], "regret": 1 - scores[online].mean() / 100}
    if not online[0]:
        before, lowest = scores[0], scores[online & (steps <= SOON)].min()
        after = online & (steps >= steps[online & (scores == lowest)][0]) & (scores >= before)
        row |= {"before": before, "drop": before - lowest, "back": int(steps[after][0]) if after.any() else None}
    return row


def measure():
    def stage(method, task, seed):
        script, words = METHODS[method]
        env = find_task(task).family if script == "sac" else task
        common = ["--env", env, "--seed", seed, "--eval-every", EVERY]
        if words[-1:] == ["--checkpoint"]:
            offline = ["--env", task, "--seed", seed, "--eval-every", EVERY]
            words = [*words, train(STUDY, f"cql {task} {seed}", "cql", OFFLINE, *offline)]
        source = None if script == "sac" else "collected"  # it has no data
        checkpoint = train(STUDY, f"{method} {task} {seed}", script, ONLINE, *common, *words, source=source)
        return {"curve": curve_of(load_checkpoint(checkpoint))}

    curves = [
        {"method": method, "task": task, "seed": seed}
        | once(STUDY, f"{method} {task} {seed} curve", [OFFLINE, ONLINE, EVERY, METHODS[method]], run)
        for task in TASKS
        for method in METHODS
        for seed in SEEDS
        for run in [lambda m=method, t=task, s=seed: stage(m, t, s)]
    ]
    keep(STUDY, curves=curves)


def costs(method, task=None):
    """The costs of a method's runs, of one task or of all."""
    rows = [row for row in kept(STUDY)["curves"] if row["method"] == method and task in (None, row["task"])]
    return [cost(row["curve"]) for row in rows]


def mean(method, name, task=None):
    return float(np.mean([row[name] for row in costs(method, task)]))


def verdict(holds):
    return "So it is" if holds else "Not so"


def findings():
    gains = {m: {t: mean(m, "final", t) - mean(m, "before", t) for t in TASKS} for m in GUARDED}
    worst = min(((gain, m, t) for m, own in gains.items() for t, gain in own.items()))
    large = [m for m, own in gains.items() if max(own[t] for t in TASKS if t.endswith("medium")) >= 20]
    drops = {m: [row["drop"] for row in costs(m)] for m in METHODS if costs(m)[0]["drop"] is not None}
    apart = np.mean(drops["CQL"]) - np.mean(drops["Cal-QL"])
    spread = np.sqrt(np.var(drops["CQL"], ddof=1) + np.var(drops["Cal-QL"], ddof=1))
    naive, guarded = np.mean(drops["SAC after CQL"]), [np.mean(drops[m]) for m in GUARDED]
    lines = []
    for m in sorted(drops, key=lambda m: np.mean(drops[m])):
        back = [row["back"] for row in costs(m)]
        never = sum(step is None for step in back)
        lines.append(
            f"{m} drops by {np.mean(drops[m]):.1f} ± {np.std(drops[m], ddof=1):.1f} ({never} of {len(back)} runs never "
            f"came back) and ends at {mean(m, 'final'):.1f}, {mean(m, 'final') - mean(m, 'before'):+.1f} from the "
            f"switch, regret {mean(m, 'regret'):.2f}"
        )
    return [
        f"Expected: {', '.join(GUARDED)} end no lower than they began, on every task. {verdict(worst[0] >= 0)}: the "
        f"least gain is {worst[0]:+.1f}, of {worst[1]} on {worst[2]}.",
        f"Expected: two of them gain 20 on one of the medium tasks. {verdict(len(large) >= 2)}: "
        f"{', '.join(large) or 'none'}.",
        f"Expected: Cal-QL drops less than CQL, by more than the spread. {verdict(apart > spread)}: by {apart:.1f}, "
        f"spread {spread:.1f} (the two standard deviations over tasks and seeds, in quadrature).",
        f"Expected: SAC after CQL drops more than each of {', '.join(GUARDED)}. {verdict(naive > max(guarded))}: by "
        f"{naive:.1f}, they by {min(guarded):.1f} to {max(guarded):.1f}.",
        f"In numbers, over all tasks and seeds: {'; '.join(lines)}. Without an offline phase RLPD ends at "
        f"{mean('RLPD', 'final'):.1f}, regret {mean('RLPD', 'regret'):.2f}, SAC at {mean('SAC', 'final'):.1f}, regret "
        f"{mean('SAC', 'regret'):.2f}.",
    ]


def draw():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(5 * len(TASKS), 4))
    for axis, task in zip(axes, TASKS):
        for i, method in enumerate(METHODS):
            own = [row["curve"] for row in kept(STUDY)["curves"] if (row["method"], row["task"]) == (method, task)]
            steps, scores = np.array(own[0])[:, 0], np.array(own)[:, :, 1]  # (T,), (seeds, T)
            axis.plot(steps, scores.mean(0), color=f"C{i}", label=method)
            axis.fill_between(steps, scores.min(0), scores.max(0), color=f"C{i}", alpha=0.1, linewidth=0)
        axis.set(title=task, xlabel="environment steps", ylabel="normalized score", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
