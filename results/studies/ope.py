"""Off-policy evaluation where the truth is known: ICU-Sepsis, whose matrices give every policy's value.

Logs of the clinicians' policy, a tenth of whose actions are any, so that each has a probability. Policies to evaluate
go from there towards the best one by a share, their distance. gamma 0.99; 100 logs of each size, drawn anew; Q is
solved from counts, cross-fitted (doubly_robust.py). Asked: the error against the number of episodes, the distance, and
the horizon, after which episodes are cut; the four corners, where Q is another policy's, or the probabilities are of
another behaviour, or both, without a bound on the weights and with one; truncation; whether 95 % intervals hold the
truth.

Usage: make studies, or python results/studies/ope.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algorithms import doubly_robust, importance_sampling
from algorithms.doubly_robust import cross_fitted, with_tail
from algorithms.importance_sampling import effective_sample_size, interval, log_weights, pad
from datasets import UserError
from datasets.tasks import icu_sepsis
from results.studies.common import keep, kept, once, save_figure

STUDY, GAMMA, LOGS = "ope", 0.99, 100
NUMBERS = 10, 30, 100, 300, 1000, 3000, 10_000  # of episodes
DISTANCES = 0.05, 0.1, 0.2, 0.3, 0.5, 0.8
HORIZONS = 1, 2, 4, 8, 16, 32
TRUNCATIONS = 1, 3, 10, 30, 100, 1000
CAP = 10  # of the weights in the corners, which are measured without one, too
NUMBER, DISTANCE, RESAMPLES = 1000, 0.3, 200  # where another of them varies; of each interval
ESTIMATORS = "IS", "WIS", "PDIS", "WPDIS", "DM", "DR", "WDR"


def behaviour(epsilon=0.1):
    return icu_sepsis.soften(icu_sepsis.load_mdp().clinicians, epsilon)


def target(distance):
    """So much of the way from the behaviour policy to the best, softened likewise."""
    return (1 - distance) * behaviour() + distance * icu_sepsis.soften(icu_sepsis.solve(GAMMA), 0.1)


def cut(logs, horizon):
    """The first `horizon` steps of each episode."""
    starts = np.r_[0, logs.ends[:-1]]
    lengths = np.minimum(logs.ends - starts, horizon)
    rows = np.repeat(starts - np.r_[0, np.cumsum(lengths)[:-1]], lengths) + np.arange(lengths.sum())
    return icu_sepsis.Trajectories(*(column[rows] for column in logs[:-1]), np.cumsum(lengths))


def value_within(pi, horizon):
    """The exact discounted return of the first `horizon` steps."""
    moves, chance, total = icu_sepsis.moves_of(pi), icu_sepsis.load_mdp().start[: icu_sepsis.LIVE], 0.0
    for t in range(horizon):
        after = chance @ moves
        total += GAMMA**t * after[icu_sepsis.SURVIVAL]
        chance = after[: icu_sepsis.LIVE]
    return total


def estimators_of(logs, pi, b, wrong_q=None, truncate=np.inf, with_model=True):
    """All estimators of the logs, {name: function of counts}, and log W. wrong_q (S, A): instead of the fit."""
    with np.errstate(divide="ignore"):
        log_pi, log_b = np.log(pi[logs.state, logs.act]), np.log(b[logs.state, logs.act])
    log_w, rew = log_weights(log_pi, log_b, logs.ends, truncate), pad(logs.rew, logs.ends)
    found = importance_sampling.estimators(log_w, rew, GAMMA)
    if with_model:
        if wrong_q is None:
            q, v, next_v = cross_fitted(*logs, pi, GAMMA)
        else:
            values = (pi * wrong_q).sum(1)
            q, v, next_v = wrong_q[logs.state, logs.act], values[logs.state], values[logs.next_state]
        q, v = pad(q, logs.ends), with_tail(v, next_v, logs.done, logs.ends)
        found |= doubly_robust.estimators(log_w, rew, q, v, GAMMA)
    return found, log_w


def repeated(number, pi, truth, b=None, horizon=None, with_intervals=False, **words):
    """Of LOGS logs: each estimator's bias, deviation, mean squared error, share of intervals that hold the truth;
    the median effective sample size."""
    estimates, held, sizes, rng = {}, {}, [], np.random.default_rng(0)
    for seed in range(LOGS):
        logs = icu_sepsis.trajectories(behaviour(), number, seed)
        logs = cut(logs, horizon) if horizon else logs
        found, log_w = estimators_of(logs, pi, behaviour() if b is None else b, **words)
        sizes.append(effective_sample_size(log_w)[-1])
        for name, estimator in found.items():
            try:
                estimates.setdefault(name, []).append(estimator().item())
                if with_intervals:
                    low, high = interval(estimator, number, RESAMPLES, rng)
                    held.setdefault(name, []).append(bool(low <= truth <= high))
            except UserError:  # weights too large or all zero: counted below
                estimates.setdefault(name, [])
    result = {"truth": truth, "ess": float(np.median(sizes))}
    for name, values in estimates.items():
        error = np.array(values) - truth
        row = {"bias": error.mean(), "std": error.std(), "mse": (error**2).mean(), "logs": len(error)}
        result[name] = {key: float(value) for key, value in row.items()}
        if with_intervals:
            result[name]["held"] = float(np.mean(held[name]))
    return result


def measure():
    pi, wrong_b = target(DISTANCE), behaviour(0.6)
    truth = icu_sepsis.value(pi, GAMMA)
    wrong_q = icu_sepsis.q_values(icu_sepsis.solve(GAMMA, worst=True), GAMMA)
    wrong = {"both right": {}, "wrong Q": {"wrong_q": wrong_q}, "wrong b": {"b": wrong_b}}
    wrong["both wrong"] = wrong["wrong Q"] | wrong["wrong b"]
    settings = [GAMMA, LOGS, NUMBER, DISTANCE, RESAMPLES, CAP]
    stage = lambda name, *words, **more: once(STUDY, name, settings, lambda: repeated(*words, **more))
    keep(
        STUDY,
        numbers={n: stage(f"n={n}", n, pi, truth, with_intervals=n == NUMBER) for n in NUMBERS},
        distances={d: stage(f"distance={d}", NUMBER, target(d), icu_sepsis.value(target(d), GAMMA)) for d in DISTANCES},
        horizons={
            h: stage(f"horizon={h}", NUMBER, pi, value_within(pi, h), horizon=h, with_model=False) for h in HORIZONS
        },
        corners={name: stage(name, NUMBER, pi, truth, **wrong[name]) for name in wrong},
        truncated={name: stage(f"{name} {CAP}", NUMBER, pi, truth, truncate=CAP, **wrong[name]) for name in wrong},
        truncations={c: stage(f"truncate={c}", NUMBER, pi, truth, truncate=c) for c in TRUNCATIONS},
    )


def rmse(row, name):
    return np.sqrt(row[name]["mse"])


def findings():
    result = kept(STUDY)
    numbers, horizons = result["numbers"], result["horizons"]
    sentences = []
    for key, weights in (("corners", "weights as they are"), ("truncated", f"weights of at most {CAP}")):
        corners = result[key]
        better = [name for name, row in corners.items() if row["DR"]["mse"] <= min(row["DM"]["mse"], row["WIS"]["mse"])]
        texts = [
            f"{name}: " + ", ".join(f"{e} {rmse(row, e):.3g}" for e in ("DM", "WIS", "DR", "WDR"))
            for name, row in corners.items()
        ]
        sentences.append(
            f"Expected, {weights}: DR is at least as good as the better of DM and WIS in three of the four corners. "
            f"{'So it is' if len(better) >= 3 else 'Not so'}: in {', '.join(better) or 'none'} of them, {NUMBER:,} "
            f"episodes. Root mean squared errors, {'; '.join(texts)}."
        )
    held = {name: numbers[str(NUMBER)][name]["held"] for name in ESTIMATORS}
    least, most = min(map(int, horizons)), max(map(int, horizons))
    cuts = result["truncations"]
    best = min(cuts, key=lambda c: cuts[c]["IS"]["mse"])
    whole = numbers[str(NUMBER)]["IS"]
    grows = horizons[str(most)]["IS"]["std"] / horizons[str(most)]["truth"] > 0.5
    return [
        *sentences,
        f"Expected: 95 % intervals hold the truth in 90 to 98 % of logs. Those of "
        f"{', '.join(name for name, share in held.items() if 0.9 <= share <= 0.98) or 'no estimator'} do: "
        + ", ".join(f"{name} {100 * share:.0f} %" for name, share in held.items())
        + ".",
        f"Expected: IS explodes with the horizon. {'So it does' if grows else 'Not so'}: cut after {least} step, the "
        f"effective sample size is {horizons[str(least)]['ess']:.0f} of {NUMBER:,} episodes, after {most} it is "
        f"{horizons[str(most)]['ess']:.0f}, and IS deviates by {horizons[str(most)]['IS']['std']:.3f} around "
        f"{horizons[str(most)]['truth']:.3f}; WIS by {horizons[str(most)]['WIS']['std']:.3f}.",
        f"Expected: truncation trades bias for variance. "
        f"{'So it does' if cuts[best]['IS']['mse'] < whole['mse'] else 'Not so'}: IS has bias {whole['bias']:+.3f} and "
        f"deviation {whole['std']:.3f} as it is, {cuts[best]['IS']['bias']:+.3f} and {cuts[best]['IS']['std']:.3f} "
        f"with weights of at most {best}.",
    ]


def draw():
    import matplotlib.pyplot as plt

    result = kept(STUDY)
    figure, axes = plt.subplots(1, 5, figsize=(19, 3.8))
    panels = (
        ("numbers", "episodes", ESTIMATORS),
        ("distances", "distance of the policies", ESTIMATORS),
        ("horizons", "horizon", ESTIMATORS[:4]),
        ("truncations", "largest weight", ("IS", "WIS", "DR", "WDR")),
    )
    colors = dict(zip(ESTIMATORS, plt.colormaps["tab10"].colors))
    for axis, (key, label, names) in zip(axes, panels):
        xs = [float(x) for x in result[key]]
        for name in names:
            ys = [rmse(row, name) if row[name]["logs"] else np.nan for row in result[key].values()]
            axis.plot(xs, ys, marker=".", color=colors[name], label=name)
        axis.set(xlabel=label, yscale="log", xscale="linear" if key == "distances" else "log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("root mean squared error")
    axes[0].legend(fontsize=7, ncol=2)
    corners = {**result["corners"], **{f"{name}, {CAP}": row for name, row in result["truncated"].items()}}
    for i, name in enumerate(("DM", "WIS", "DR", "WDR")):
        bars = [rmse(row, name) for row in corners.values()]
        axes[4].bar(np.arange(len(bars)) + 0.2 * i, bars, 0.2, color=colors[name], label=name)
    axes[4].set_xticks(np.arange(len(corners)) + 0.3, list(corners), rotation=30, ha="right", fontsize=7)
    axes[4].set(yscale="log", ylim=(5e-3, 5), title=f"corners; weights of at most {CAP}", xlabel="")
    axes[4].legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
