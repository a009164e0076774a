"""Which of these policies is best? Candidates ranked without the environment, against the share of the data used.

Checkpoints of six scripts at two ages, trained on the same data, each as a distribution: those that are deterministic
get noise of deviation 0.1. FQE and, on its critics, weighted DR with weights of at most 10 value them from 1 % to all
of the episodes, three times with other episodes and other networks; DR's behaviour policy is estimated. The truth is
the discounted return of the same distribution in 20 episodes. Beside them the naive choice: what a candidate's own
critics promise its mean action, and what FQE makes of the same candidates: BC has no critics, and those of IQL, of
scaled rewards, are left out. Regrets are shares of the range from the worst candidate to the best. To fit a CPU: 2,000
and 10,000 updates (CQL's second age 5,000); FQE's target network follows fast, with tau 0.1, and it has 15,000
updates: after 3,000 the estimates of policies that leave the data still fall.

Usage: make studies, or python results/studies/model_selection.py
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algorithms.doubly_robust import Args, doubly_robust, estimated, from_critic, log_weights, pad, with_tail
from datasets import load
from results.checkpoint import load_checkpoint
from results.policies import load_critics, load_policies, log_probs
from results.studies.common import SEEDS, keep, kept, mean_std, once, rollout, save_figure, train, value_and_truth

STUDY, TASKS, GAMMA = "model_selection", ("hopper-medium-replay", "halfcheetah-medium"), 0.99
SCRIPTS, AGES, SHARES = ("bc", "td3_bc", "iql", "awac", "offline_sac", "cql"), (2_000, 10_000), (0.01, 0.1, 1.0)
CHEAPER, YOUNGER = {"cql": ("--n-actions", 4, "--actor-lr", 3e-4)}, {"cql": (2_000, 5_000)}
STEPS, CAP, EPISODES, NOISE = 15_000, 10, 20, 0.1  # of FQE; the largest weight; of the truth; its deviation


def candidates(task):
    """{name: checkpoint}, trained where they are not there yet."""
    words = "--env", task, "--eval-every", max(AGES), "--eval-episodes", 5
    return {
        f"{script} {age}": train(STUDY, f"{task} {script} {age}", script, age, *words, *CHEAPER.get(script, ()))
        for script in SCRIPTS
        for age in YOUNGER.get(script, AGES)
    }


def promise_and_truth(task, path):
    """What a candidate's critics promise, and the discounted return of its distribution: the mean of EPISODES."""
    data = load(task, "collected")
    (policy,) = load_policies([path], data, NOISE)
    torch.manual_seed(0)
    _, rew = rollout(data, policy.act, EPISODES)
    truth = (GAMMA ** np.arange(len(rew)) @ rew).mean()
    return {"promise": value_and_truth(path, EPISODES)["promise"], "truth": truth}


def doubly_robust_values(task, share, seed, checkpoint):
    """WDR of each policy of an FQE checkpoint, from the same share of the data."""
    data, args = load(task, "collected"), Args(gamma=GAMMA)
    torch.manual_seed(seed)
    if share < 1:
        rng = np.random.default_rng(seed)  # as fqe.py chooses them
        data.keep(rng.choice(len(data.ends), max(1, int(share * len(data.ends))), replace=False))
    log_b, values = estimated(data, args), []
    rew, done = pad(data.rew.numpy(), data.ends), data.done.numpy() > 0
    for policy, critic in zip(*load_critics(checkpoint, data)):
        log_w = log_weights(log_probs(policy, data), log_b, data.ends, CAP)
        q, v, next_v = from_critic(data, policy, critic, args.samples)
        q, v = pad(q, data.ends), with_tail(v, next_v, done, data.ends)
        values.append(doubly_robust(log_w, rew, q, v, GAMMA, True).item())
    return values


def estimates(task, share, seed, paths):
    """FQE's and DR's of each candidate, from a share of the data."""
    words = "--env", task, "--share", share, "--seed", seed, "--tau", 0.1, "--gamma", GAMMA, "--eval-every", STEPS
    words += "--policies", *paths, "--noise", "--std", NOISE
    checkpoint = train(STUDY, f"{task} fqe {share} seed {seed}", "fqe", STEPS, *words)
    values = load_checkpoint(checkpoint)["curve"][-1]["losses"]["estimate"]
    return {"FQE": values, "DR": doubly_robust_values(task, share, seed, checkpoint)}


def measure():
    tasks = {}
    for task in TASKS:
        found = candidates(task)
        paths = list(found.values())
        truths = [
            once(STUDY, f"{task} {name} truth", [EPISODES, NOISE], partial(promise_and_truth, task, path))
            for name, path in found.items()
        ]
        settings = [GAMMA, SCRIPTS, AGES, YOUNGER, CHEAPER, STEPS, CAP, NOISE]
        shares = {share: [] for share in SHARES}
        for seed in SEEDS:
            for share in SHARES:
                ask = partial(estimates, task, share, seed, paths)
                cell = once(STUDY, f"{task} {share} seed {seed}", settings, ask)
                shares[share].append(cell)
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
    """{method: {share: [ranked of each seed]}} of a task; the naive choice needs no share."""
    truth = np.array([point["truth"] for point in row["candidates"]])
    promised = [point["promise"] for point in row["candidates"]]
    both = [i for i, name in enumerate(row["names"]) if promised[i] is not None and not name.startswith("iql")]
    found = {"FQE": {}, "DR": {}, "FQE of the same": {}}
    for share, cells in row["shares"].items():
        for method in ("FQE", "DR"):
            found[method][float(share)] = [ranked(cell[method], truth) for cell in cells]
        same = [ranked(np.array(cell["FQE"])[both], truth[both]) for cell in cells]
        found["FQE of the same"][float(share)] = same
    return found | {"own critic": {1.0: [ranked([promised[i] for i in both], truth[both])]}}


def told(cells):
    """What the seeds' rankings are worth."""
    keys = ("rank", "rank correlation", 2), ("regret@1", "regret@1", 2), ("regret@3", "@3", 2), ("error", "error", 0)
    return ", ".join(f"{name} {mean_std([cell[key] for cell in cells], digits)}" for key, name, digits in keys)


def worst(cells):
    """The lowest rank correlation of the seeds."""
    return min(cell["rank"] for cell in cells)


def findings():
    sentences = []
    for task, row in kept(STUDY)["tasks"].items():
        found = results(row)
        reliable = None  # the share from which on all seeds are
        for share, cells in sorted(found["FQE"].items(), reverse=True):
            if worst(cells) <= 0.8:
                break
            reliable = share
        last = {method: cells[max(cells)] for method, cells in found.items()}
        better = worst(last["FQE of the same"]) > worst(last["own critic"])
        sentences.append(
            f"Expected on {task}: FQE ranks reliably, correlation above 0.8 for each of {len(SEEDS)} seeds, from some "
            "share of the data on, and better than the candidates' own critics. "
            f"{'So it is' if reliable and better else 'Not so'}: reliable "
            f"{f'from {100 * reliable:g} % on' if reliable else 'with no share'}, "
            f"{'better' if better else 'not better'} than the critics. With all data, "
            f"{STEPS:,} updates of FQE, "
            + "; ".join(f"{method}: {told(cells)}" for method, cells in last.items())
            + "."
        )
    return sentences


def draw():
    import matplotlib.pyplot as plt

    tasks = kept(STUDY)["tasks"]
    figure, axes = plt.subplots(len(tasks), 3, figsize=(11, 3.4 * len(tasks)), squeeze=False)
    for line, (task, row) in zip(axes, tasks.items()):
        for axis, key in zip(line, ("rank", "regret@1", "error")):
            for method, shares in results(row).items():
                xs = [100 * share for share in shares]
                ys = np.array([[cell[key] for cell in cells] for cells in shares.values()])  # (shares, seeds)
                axis.plot(xs, ys.mean(1), marker="x" if len(xs) == 1 else ".", label=method)
                axis.fill_between(xs, ys.min(1), ys.max(1), alpha=0.15)
            axis.set(title=f"{task}: {key}", xlabel="share of the data, %", xscale="log")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
