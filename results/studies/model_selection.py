"""Which of these policies is best? Candidates ranked without the environment, against the share of the data used.

Checkpoints of six scripts at two ages, trained on the same data, are valued by FQE and by weighted DR with weights of
at most 10, from 1 % to all of the episodes. DR's policies have noise of deviation 0.1 where they are deterministic; its
behaviour policy is estimated. Beside them the naive choice: what a candidate's own critics promise. BC has none, and
IQL's, of scaled rewards, are left out. True is the discounted return in 20 episodes. Regrets are shares of the range
from the worst candidate to the best. To fit a CPU: 2,000 and 10,000 updates (CQL's second age 5,000), one seed; FQE's
target network follows fast, with tau 0.1, and it has 15,000 updates: after 3,000 the estimates of policies that leave
the data still fall.

Usage: make studies, or python results/studies/model_selection.py
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algorithms.doubly_robust import Args, doubly_robust, estimated, from_critic, log_weights, pad, with_tail
from datasets import load
from results.checkpoint import load_checkpoint
from results.policies import load_critics, log_probs
from results.studies.common import keep, kept, once, save_figure, train, value_and_truth

STUDY, TASKS, GAMMA = "model_selection", ("hopper-medium-replay", "halfcheetah-medium"), 0.99
SCRIPTS, AGES, SHARES = ("bc", "td3_bc", "iql", "awac", "offline_sac", "cql"), (2_000, 10_000), (0.01, 0.1, 1.0)
CHEAPER, YOUNGER = {"cql": ("--n-actions", 4, "--actor-lr", 3e-4)}, {"cql": (2_000, 5_000)}
STEPS, CAP, EPISODES = 15_000, 10, 20  # of FQE; the largest weight; of the truth


def candidates(task):
    """{name: checkpoint}, trained where they are not there yet."""
    words = "--env", task, "--eval-every", max(AGES), "--eval-episodes", 5
    return {
        f"{script} {age}": train(STUDY, f"{task} {script} {age}", script, age, *words, *CHEAPER.get(script, ()))
        for script in SCRIPTS
        for age in YOUNGER.get(script, AGES)
    }


def fitted(task, share, paths, *words):
    """FQE's checkpoint for these policies, from a share of the data."""
    common = "--env", task, "--share", share, "--tau", 0.1, "--gamma", GAMMA, "--eval-every", STEPS
    name = f"{task} fqe {share}{' noise' * bool(words)}"
    return train(STUDY, name, "fqe", STEPS, "--policies", *paths, *common, *words)


def doubly_robust_values(task, share, checkpoint):
    """WDR of each policy of an FQE checkpoint, from the same share of the data."""
    data, args = load(task, "collected"), Args(gamma=GAMMA)
    rng = np.random.default_rng(0)  # as fqe.py chooses them
    data.keep(rng.choice(len(data.ends), max(2, int(share * len(data.ends))), replace=False))
    log_b, values = estimated(data, args), []
    rew, done = pad(data.rew.numpy(), data.ends), data.done.numpy() > 0
    for policy, critic in zip(*load_critics(checkpoint, data)):
        log_w = log_weights(log_probs(policy, data), log_b, data.ends, CAP)
        q, v, next_v = from_critic(data, policy, critic, args.samples)
        q, v = pad(q, data.ends), with_tail(v, next_v, done, data.ends)
        values.append(doubly_robust(log_w, rew, q, v, GAMMA, True).item())
    return values


def measure():
    def stage(task, share, paths):
        estimates = load_checkpoint(fitted(task, share, paths))["curve"][-1]["losses"]["estimate"]
        noisy = fitted(task, share, paths, "--noise", "--std", 0.1)
        return {"FQE": estimates, "DR": doubly_robust_values(task, share, noisy)}

    tasks = {}
    for task in TASKS:
        found = candidates(task)
        paths = list(found.values())
        truths = [
            once(STUDY, f"{task} {name} truth", [EPISODES], lambda path=path: value_and_truth(path, EPISODES))
            for name, path in found.items()
        ]
        settings = [GAMMA, SCRIPTS, AGES, YOUNGER, CHEAPER, STEPS, CAP]
        shares = {
            share: once(STUDY, f"{task} {share}", settings, lambda words=(task, share, paths): stage(*words))
            for share in SHARES
        }
        tasks[task] = {"names": list(found), "candidates": truths, "shares": shares}
    keep(STUDY, tasks=tasks)


def ranked(values, truth):
    """Spearman's correlation, regret@1 and @3, and mean absolute error of estimates (candidates,) of true values."""
    values, truth = np.array(values), np.array(truth)
    order, span = np.argsort(-values), max(np.ptp(truth), 1e-12)
    regrets = [(truth.max() - truth[order[:k]].max()) / span for k in (1, 3)]
    correlation = spearmanr(values, truth).statistic
    return {"rank": correlation, "regret@1": regrets[0], "regret@3": regrets[1], "error": np.abs(values - truth).mean()}


def results(row):
    """{method: {share: ranked}} of a task; the naive choice is among those with critics, and needs no share."""
    truth = [point["truth"] for point in row["candidates"]]
    methods = {
        method: {float(share): ranked(values[method], truth) for share, values in row["shares"].items()}
        for method in ("FQE", "DR")
    }
    named = zip(row["names"], row["candidates"])
    promised = [(x["promise"], x["truth"]) for name, x in named if x["promise"] is not None and "iql" not in name]
    return methods | {"own critic": {1.0: ranked(*zip(*promised))}}


def findings():
    sentences = []
    for task, row in kept(STUDY)["tasks"].items():
        found = results(row)
        reliable = None  # the share from which on all are
        for share, cell in sorted(found["FQE"].items(), reverse=True):
            if cell["rank"] <= 0.8:
                break
            reliable = share
        told = lambda cell: (
            f"rank correlation {cell['rank']:.2f}, regret@1 {cell['regret@1']:.2f}, @3 {cell['regret@3']:.2f}, "
            f"error {cell['error']:.0f}"
        )
        last = {method: cells[max(cells)] for method, cells in found.items()}
        sentences.append(
            f"Expected on {task}: FQE ranks reliably, correlation above 0.8, from some share of the data on, and "
            f"better than the candidates' own critics. "
            f"{'So it is' if reliable and last['FQE']['rank'] > last['own critic']['rank'] else 'Not so'}: "
            f"{f'from {100 * reliable:g} % on' if reliable else 'with no share'}. With all data, "
            f"{STEPS:,} updates of FQE, " + "; ".join(f"{method}: {told(cell)}" for method, cell in last.items()) + "."
        )
    return sentences


def draw():
    import matplotlib.pyplot as plt

    tasks = kept(STUDY)["tasks"]
    figure, axes = plt.subplots(len(tasks), 3, figsize=(11, 3.4 * len(tasks)), squeeze=False)
    for line, (task, row) in zip(axes, tasks.items()):
        for axis, key in zip(line, ("rank", "regret@1", "error")):
            for method, cells in results(row).items():
                xs, ys = [100 * share for share in cells], [cell[key] for cell in cells.values()]
                axis.plot(xs, ys, marker="x" if len(xs) == 1 else ".", label=method)
            axis.set(title=f"{task}: {key}", xlabel="share of the data, %", xscale="log")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
