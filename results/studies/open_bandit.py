"""Off-policy evaluation of data that nobody simulated: a shop's recommendations, by two policies in the same week.

From the log of Thompson sampling the click rate of random recommendations is estimated, and the other way round; the
other log's own clicks are the truth, up to their chance. Each recommendation is an episode of one step, whose IS is
called IPS, and WIS SNIPS. Random has the propensity 1 / items. Thompson sampling's probabilities for the items that
random showed were not logged: they are its frequencies of items by position, from its log without the clicks. Q is the
click rate of an item at a position, cross-fitted; DM's intervals, too narrow, leave out the error of that fit.

Usage: make studies, or python results/studies/open_bandit.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algorithms import doubly_robust, importance_sampling
from algorithms.doubly_robust import cross_fitted, with_tail
from algorithms.importance_sampling import effective_sample_size, interval, log_weights, pad
from datasets.tasks.open_bandit import N_ITEMS, POSITIONS, load_logs
from results.studies.common import keep, kept, once, save_figure

STUDY, RESAMPLES = "open_bandit", 500
NAMES = {"IS": "IPS", "WIS": "SNIPS", "DM": "DM", "DR": "DR", "WDR": "weighted DR"}


def frequencies(logs, items):
    """How often the log shows each item at each position, (POSITIONS, items)."""
    counts = np.bincount(logs.position * items + logs.item, minlength=POSITIONS * items).reshape(POSITIONS, items)
    return counts / counts.sum(1, keepdims=True)


def estimates(campaign, by):
    """The other policy's click rate, from the log of `by`: {estimator: value and 95 % interval}, and the truth."""
    items, other = N_ITEMS[campaign], "random" if by == "bts" else "bts"
    logs, others = load_logs(by, campaign), load_logs(other, campaign)
    pi = np.full((POSITIONS, items), 1 / items) if other == "random" else frequencies(others, items)
    N, ends = len(logs.item), np.arange(1, len(logs.item) + 1)
    with np.errstate(divide="ignore"):
        log_w = log_weights(np.log(pi[logs.position, logs.item]), np.log(logs.propensity), ends)
    rew, done = pad(logs.click, ends), np.ones(N, bool)
    q, v, next_v = cross_fitted(logs.position, logs.item, logs.click, logs.position, done, ends, pi, 1.0)
    found = importance_sampling.estimators(log_w, rew, 1.0)
    found |= doubly_robust.estimators(log_w, rew, pad(q, ends), with_tail(v, next_v, done, ends), 1.0)
    rows, rng = {}, np.random.default_rng(0)
    for key, name in NAMES.items():
        low, high = interval(found[key], N, RESAMPLES, rng)
        rows[name] = [found[key]().item(), float(low), float(high)]
    rate = others.click.mean()
    spread = 1.96 * np.sqrt(rate * (1 - rate) / len(others.click))
    ess, largest = effective_sample_size(log_w)[-1], np.exp(log_w.max())
    truth = {"truth": [rate, rate - spread, rate + spread], "own": logs.click.mean()}
    return {"rows": rows, **truth, "ess": float(ess), "largest": float(largest)}


def measure():
    cells = {}
    for campaign in N_ITEMS:
        for by in ("bts", "random"):
            name = f"{campaign} from {by}"
            cells[name] = once(STUDY, name, [RESAMPLES], lambda words=(campaign, by): estimates(*words))
    keep(STUDY, cells=cells)


def agrees(value, truth):
    """Whether an estimate and the truth differ by no more than both their chances, 95 %, allow."""
    half = lambda row: max(row[2] - row[0], row[0] - row[1])
    return abs(value[0] - truth[0]) <= np.hypot(half(value), half(truth))


def findings():
    sentences = []
    for name, cell in kept(STUDY)["cells"].items():
        rows, truth = cell["rows"], cell["truth"]
        held = [key for key, row in rows.items() if agrees(row, truth)]
        told = lambda row: f"{100 * row[0]:.2f} % ({100 * row[1]:.2f} to {100 * row[2]:.2f})"
        sentences.append(
            f"Expected, {name}: every estimate of the other policy's click rate agrees with its own clicks, "
            f"{told(truth)}. {'So it is' if len(held) == len(rows) else 'Not so'}: "
            + ", ".join(f"{key} {told(row)}" for key, row in rows.items())
            + f"; the log's own rate is {100 * cell['own']:.2f} %, its effective sample size {cell['ess']:.0f} of "
            f"10,000, its largest weight {cell['largest']:,.0f}."
        )
    return sentences


def draw():
    import matplotlib.pyplot as plt

    cells = kept(STUDY)["cells"]
    figure, axes = plt.subplots(1, len(cells), figsize=(3 * len(cells), 3.4))
    for axis, (name, cell) in zip(axes, cells.items()):
        rows = {**cell["rows"], "the other's clicks": cell["truth"]}
        for i, (key, row) in enumerate(rows.items()):
            errors = np.array([[row[0] - row[1]], [row[2] - row[0]]]).clip(0) * 100
            color = "black" if key == "the other's clicks" else "tab:blue"
            axis.errorbar(100 * row[0], -i, xerr=errors, marker="o", color=color, capsize=3)
        axis.axvline(100 * cell["own"], color="gray", linestyle=":", label="the log's own rate")
        axis.set(title=name, xlabel="click rate, %")
        axis.set_yticks(-np.arange(len(rows)), list(rows) if axis is axes[0] else [""] * len(rows))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
