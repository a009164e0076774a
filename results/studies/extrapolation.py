"""Why offline RL needs a cure: what the critics promise, and what the policy then earns, over training.

On halfcheetah-medium, three seeds: offline SAC, which nothing cures, and BC, TD3+BC and CQL; the last two with gamma
0.9 as well, for which values have spread after a few hundred updates. From the start states of ten episodes the
critics' value of the policy's own action, beside the discounted return that the same policy truly gets; and the share
of the policy's actions that lie farther from the data than 99 % of the data's own do. The distance, at 10,000 states of
the data, is that to the clone's action (BC of the same seed after its last update), which stands for the mean action.

Usage: make studies, or python results/studies/extrapolation.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import load
from results.checkpoint import load_agent
from results.studies.common import SEEDS, keep, kept, mean_std, normalized, once, save_figure, train, value_and_truth

STUDY, TASK = "extrapolation", "halfcheetah-medium"
STEPS = 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000
EQUAL = 10_000  # updates after which methods are compared: CQL's last, which take an hour on two cores
METHODS = {  # the clone first: the others' actions are measured against its last checkpoint
    "BC": ("bc", STEPS[-1]),
    "SAC (offline)": ("offline_sac", STEPS[-1]),
    "TD3+BC": ("td3_bc", STEPS[-1]),
    "CQL": ("cql", EQUAL),
    "TD3+BC, gamma 0.9": ("td3_bc", EQUAL, "--gamma", 0.9),
    "CQL, gamma 0.9": ("cql", EQUAL, "--gamma", 0.9),
}
COLORS = {"SAC (offline)": "tab:brown", "BC": "tab:gray", "TD3+BC": "tab:blue", "CQL": "tab:red"}


@torch.no_grad()
def actions(checkpoint, obs):
    _, _, data, policy = load_agent(checkpoint)
    return policy(normalized(data, obs)).clamp(-1, 1)


def measure():
    """Seed after seed, so that what is kept, should it be interrupted, is every method with fewer seeds."""
    data = load(TASK, "collected", "cpu")
    rows = np.random.default_rng(0).choice(len(data), 10_000, replace=False)
    obs, act = data.obs[rows], data.act[rows]
    starts = np.concatenate([[0], data.ends[:-1]])
    best = max((0.99 ** np.arange(b - a) @ data.rew[a:b].numpy()).item() for a, b in zip(starts, data.ends))
    curves = {name: [] for name in METHODS}

    def stage(name, seed, step):
        script, _, *words = METHODS[name]
        words = "--env", TASK, "--seed", seed, "--eval-every", 20_000, *words

        def run():
            checkpoint = train(STUDY, f"{name} {seed}", script, step, *words)
            measured = value_and_truth(checkpoint) | {"step": step}
            return measured | {"actions": actions(checkpoint, obs).half().tolist()}

        return once(STUDY, f"{name} {seed} {step}", [script, *words], run)

    for seed in SEEDS:
        for name, (_, last, *_) in METHODS.items():
            points = [stage(name, seed, step) for step in STEPS if step <= last]
            if name == "BC":
                center = torch.tensor(points[-1]["actions"])
                limit = (act - center).norm(dim=-1).quantile(0.99)
            for point in points:
                far = (torch.tensor(point.pop("actions")) - center).norm(dim=-1) > limit
                point["outside"] = far.float().mean().item()
            curves[name].append(points)
        keep(STUDY, best=best, curves=curves)


def divergence(points, best):
    """The first point from which on the promise stays above ten times the truth and above the best discounted return
    in the data; None: never."""
    far = [point["promise"] > max(10 * abs(point["truth"]), best) for point in points]
    return next((point for i, point in enumerate(points) if all(far[i:])), None)


def at(curves, step, name):
    """Of each seed's curve the value `name` after `step` updates."""
    return [next(point[name] for point in points if point["step"] == step) for points in curves]


def findings():
    """Sentences, each of what was expected, with the numbers that say whether it came so."""
    curves, best = kept(STUDY)["curves"], kept(STUDY)["best"]
    sac, last = curves["SAC (offline)"], STEPS[-1]
    apart = [divergence(points, best) for points in sac]
    left = all(apart) and max(at(sac, last, "score")) < 10
    moments = ", ".join(f"{p['step']:,} ({p['outside']:.0%} of its actions outside)" if p else "never" for p in apart)
    sentences = [
        f"Expected: the estimates of offline SAC leave the true return by a factor of ten and more, and its score "
        f"stays near 0. {'So it is' if left else 'Not so here'}, of {len(sac)} seed{'s' * (len(sac) > 1)}: after "
        f"{last:,} updates they promise {mean_std(at(sac, last, 'promise'))}, the policy earns "
        f"{mean_std(at(sac, last, 'truth'))} (score {mean_std(at(sac, last, 'score'))}), the best of the data "
        f"{best:.0f}; apart for good, seed by seed, from update {moments} on.",
        f"Expected: BC does not fail. {'So it is' if min(at(curves['BC'], last, 'score')) > 30 else 'Not so here'}: "
        f"score {mean_std(at(curves['BC'], last, 'score'))}.",
    ]
    words = []
    for name in ("TD3+BC", "CQL", "TD3+BC, gamma 0.9", "CQL, gamma 0.9"):
        if own := curves.get(name):
            promise, truth, score = (mean_std(at(own, EQUAL, key)) for key in ("promise", "truth", "score"))
            words.append(f"{name} promises {promise} and earns {truth} (score {score})")
    sentences.append(f"After {EQUAL:,} updates each, {'; '.join(words)}.")
    if np.mean(at(curves["TD3+BC"], EQUAL, "promise")) < np.mean(at(curves["TD3+BC"], EQUAL, "truth")) / 2:
        sentences[-1] += (
            " So a promise below the truth is not yet conservatism: with gamma 0.99 values have not spread by then, "
            "those of TD3+BC, which is not pessimistic, neither."
        )
    if all(curves.get(f"{name}, gamma 0.9") for name in ("TD3+BC", "CQL")):
        share = {
            name: np.divide(*(at(curves[f"{name}, gamma 0.9"], EQUAL, key) for key in ("promise", "truth")))
            for name in ("TD3+BC", "CQL")
        }
        lower = max(share["CQL"]) < min(share["TD3+BC"])
        sentences.append(
            "Expected, if CQL is conservative: with gamma 0.9, where they have spread, it promises less of what is "
            f"earned than TD3+BC, in every seed. {'So it is' if lower else 'Not so'}: "
            + ", ".join(f"{name} {mean_std(100 * x)} %" for name, x in share.items())
            + "."
        )
    ends = {name: mean_std([100 * points[-1]["outside"] for points in own]) for name, own in curves.items() if own}
    sentences.append(
        "Farther from the data than 99 % of the data, of the policy's actions at the end: "
        + ", ".join(f"{name} {share} %" for name, share in ends.items())
        + "."
    )
    return sentences


def draw():
    import matplotlib.pyplot as plt

    curves, best = kept(STUDY)["curves"], kept(STUDY)["best"]
    figure, (scores, values, outside) = plt.subplots(1, 3, figsize=(13, 3.6))
    for name, color in COLORS.items():
        for seed, points in enumerate(curves[name]):
            steps = [point["step"] for point in points]
            lines = [(scores, "score", "-"), (outside, "outside", "-"), (values, "truth", ":")]
            if points[0]["promise"] is not None:
                lines.append((values, "promise", "-"))
                if apart := divergence(points, best):
                    for axis in (scores, values, outside):
                        axis.axvline(apart["step"], color=color, linewidth=0.8, linestyle="--")
            for axis, key, style in lines:
                style = dict(color=color, linestyle=style, linewidth=1, marker=".", label=None if seed else name)
                axis.plot(steps, [point[key] for point in points], **style)
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
