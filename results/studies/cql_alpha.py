"""How conservative is right: CQL's score, and what its critics promise and its policy earns, against alpha.

On halfcheetah-medium-replay, alpha fixed; BC is the line that conservatism approaches, and alpha 0 is SAC on fixed
data. To fit a CPU: batches of 128, four sampled actions instead of ten, the policy's learning rate 3e-4, and 10,000
updates; one seed.

Usage: make studies, or python results/studies/cql_alpha.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from results.studies.common import keep, kept, once, save_figure, train, value_and_truth

STUDY, TASK, STEPS = "cql_alpha", "halfcheetah-medium-replay", 10_000
ALPHAS = 1e-3, 1.0, 5.0, 20.0, 100.0  # the first stands for 0, which has no logarithm
SETTINGS = ["--env", TASK, "--batch-size", 128, "--eval-every", STEPS]
CQL = ["--n-actions", 4, "--actor-lr", 3e-4]


def measure():
    def stage(script, name, *words):
        return value_and_truth(train(STUDY, name, script, STEPS, *SETTINGS, *words), episodes=20)

    clone = once(STUDY, "BC", lambda: stage("bc", "BC"))
    points = []
    for alpha in ALPHAS:
        name = f"alpha={alpha}"
        point = once(STUDY, name, lambda name=name, alpha=alpha: stage("cql", name, *CQL, "--alpha", alpha))
        points.append({"alpha": alpha, **point})
    keep(STUDY, clone=clone, points=points)


def findings():
    result = kept(STUDY)
    clone, points = result["clone"], result["points"]
    best = max(points, key=lambda point: point["score"])
    low, high = points[0], points[-1]
    inner = best not in (low, high) and best["score"] > clone["score"]
    above = [f"{point['alpha']:g}" for point in points if point["promise"] > point["truth"]]
    falls = all(a["promise"] > b["promise"] for a, b in zip(points, points[1:]))
    return [
        f"Expected: a middle alpha is best, and better than BC. {'So it is' if inner else 'Not so here'}: alpha "
        f"{best['alpha']:g} scores {best['score']:.1f}, {low['alpha']:g} {low['score']:.1f}, {high['alpha']:g} "
        f"{high['score']:.1f}, BC {clone['score']:.1f}.",
        f"Expected: the promise falls as alpha grows. {'So it is' if falls else 'Not so throughout'}: from "
        f"{low['promise']:,.0f} to {high['promise']:,.0f}; above the truth with alpha {', '.join(above) or 'none'}.",
    ]


def draw():
    import matplotlib.pyplot as plt

    result = kept(STUDY)
    alphas = [point["alpha"] for point in result["points"]]
    figure, (scores, values) = plt.subplots(1, 2, figsize=(9, 3.6))
    scores.plot(alphas, [point["score"] for point in result["points"]], color="tab:red", marker=".", label="CQL")
    scores.axhline(result["clone"]["score"], color="tab:gray", label="BC")
    values.plot(alphas, [point["promise"] for point in result["points"]], color="tab:red", marker=".", label="promised")
    values.plot(alphas, [point["truth"] for point in result["points"]], color="tab:red", linestyle=":", label="true")
    scores.set(title=TASK, ylabel="normalized score")
    values.set(title="discounted return from the start")
    for axis in (scores, values):
        axis.set(xscale="log", xlabel="alpha")
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
