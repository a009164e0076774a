"""Why offline RL needs a cure: what the critics promise, and what the policy then earns, over training.

On halfcheetah-medium: offline SAC, which nothing cures, and BC, TD3+BC and CQL. From the start states of ten episodes
the critics' value of the policy's own action, beside the discounted return that the same policy truly gets; and the
share of the policy's actions that lie farther from the data than 99 % of the data's own do. The distance, at 10,000
states of the data, is that to the clone's action (BC after its last update), which stands for the data's mean action.

Usage: make studies, or python results/studies/extrapolation.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import load
from results.checkpoint import load_agent
from results.studies.common import keep, kept, normalized, once, save_figure, train, value_and_truth

STUDY, TASK = "extrapolation", "halfcheetah-medium"
STEPS = 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000
SCRIPTS = {"SAC (offline)": "offline_sac", "BC": "bc", "TD3+BC": "td3_bc", "CQL": "cql"}
LAST = {"CQL": 10_000}  # which takes an hour on two cores
COLORS = {"SAC (offline)": "tab:brown", "BC": "tab:gray", "TD3+BC": "tab:blue", "CQL": "tab:red"}


@torch.no_grad()
def actions(checkpoint, obs):
    _, _, data, policy = load_agent(checkpoint)
    return policy(normalized(data, obs)).clamp(-1, 1)


def measure():
    data = load(TASK, "collected", "cpu")
    rows = np.random.default_rng(0).choice(len(data), 10_000, replace=False)
    obs, act = data.obs[rows], data.act[rows]
    starts = np.concatenate([[0], data.ends[:-1]])
    best = max((0.99 ** np.arange(b - a) @ data.rew[a:b].numpy()).item() for a, b in zip(starts, data.ends))
    names = sorted(SCRIPTS, key="BC".__ne__)  # the clone first: the others are measured against its last checkpoint
    center, curves = None, {}

    def stage(name, step):
        checkpoint = train(STUDY, name, SCRIPTS[name], step, "--env", TASK, "--eval-every", 20_000)
        pi_act = actions(checkpoint, obs)
        return value_and_truth(checkpoint) | {"step": step, "actions": pi_act.half().tolist()}

    for name in names:
        steps = [step for step in STEPS if step <= LAST.get(name, STEPS[-1])]
        points = [once(STUDY, f"{name} {step}", lambda name=name, step=step: stage(name, step)) for step in steps]
        if center is None:
            center = torch.tensor(points[-1]["actions"])
            limit = (act - center).norm(dim=-1).quantile(0.99)
        for point in points:
            far = (torch.tensor(point.pop("actions")) - center).norm(dim=-1) > limit
            point["outside"] = far.float().mean().item()
        curves[name] = points
    keep(STUDY, best=best, curves={name: curves[name] for name in SCRIPTS})


def divergence(points, best):
    """The first step from which on the promise stays above ten times the truth and above the best discounted return in
    the data; None: never."""
    far = [point["promise"] > max(10 * abs(point["truth"]), best) for point in points]
    steps = [point["step"] for i, point in enumerate(points) if all(far[i:])]
    return steps[0] if steps else None


def findings():
    """Sentences, each of what was expected, with the numbers that say whether it came so."""
    curves, best = kept(STUDY)["curves"], kept(STUDY)["best"]
    sac, bc, cql = (curves[name][-1] for name in ("SAC (offline)", "BC", "CQL"))
    at = divergence(curves["SAC (offline)"], best)
    above = [f"{p['step']:,}" for p in curves["CQL"] if p["promise"] > p["truth"]]
    left = at is not None and sac["score"] < 10
    return [
        f"Expected: the estimates of offline SAC leave the true return by a factor of ten and more, and its score "
        f"stays near 0. {'So it is' if left else 'Not so here'}: after {sac['step']:,} updates they promise "
        f"{sac['promise']:,.0f}, the policy earns {sac['truth']:.0f} (score {sac['score']:.1f})"
        + (f", the best of the data {best:.0f}; apart for good from update {at:,} on." if at else "."),
        f"Expected: BC does not fail. {'So it is' if bc['score'] > 30 else 'Not so here'}: score {bc['score']:.1f}.",
        "Expected: CQL's estimates stay below the truth. "
        f"{'Not so after ' + ', '.join(above) + ' updates' if above else 'So it is'}; after {cql['step']:,} updates "
        f"they promise {cql['promise']:.0f}, the policy earns {cql['truth']:.0f} (score {cql['score']:.1f}).",
        "Farther from the data than 99 % of the data: "
        + ", ".join(f"{name} {points[-1]['outside']:.0%}" for name, points in curves.items())
        + " of the policy's actions at the end.",
    ]


def draw():
    import matplotlib.pyplot as plt

    curves, best = kept(STUDY)["curves"], kept(STUDY)["best"]
    figure, (scores, values, outside) = plt.subplots(1, 3, figsize=(13, 3.6))
    for name, points in curves.items():
        steps, style = [point["step"] for point in points], dict(color=COLORS[name], marker=".", label=name)
        scores.plot(steps, [point["score"] for point in points], **style)
        outside.plot(steps, [point["outside"] for point in points], **style)
        if points[0]["promise"] is not None:
            values.plot(steps, [point["promise"] for point in points], **style)
        values.plot(steps, [point["truth"] for point in points], color=COLORS[name], linestyle=":")
        if points[0]["promise"] is not None and (at := divergence(points, best)):
            for axis in (scores, values, outside):
                axis.axvline(at, color=COLORS[name], linewidth=0.8, linestyle="--")
    values.axhline(best, color="gray", linewidth=0.8)
    scores.set(title=TASK, ylabel="normalized score")
    values.set(title="promised (solid), true (dotted), best of data (gray)", ylabel="discounted return")
    outside.set(title="actions farther than 99 % of the data", ylabel="share")
    for axis in (scores, values, outside):
        axis.set(xscale="log", xlabel="updates; dashed: divergence")
        axis.grid(alpha=0.3)
    scores.legend()
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
