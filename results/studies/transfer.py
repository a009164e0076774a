"""Does a recovered reward outlive the world it was learned in? Inverse RL and cloning where the dynamics are others.

Demonstrations are 500 trajectories of the soft expert in the gridworld `left`, whose wall is open at its left end only.
What was learned of them is tried there, with a wind of 0.3 instead of 0.1, and in `right`, where the way is on the
other side: a reward is optimised anew, exactly, once greedily and once with the soft policy that fits MaxEnt IRL. BC
copies the share of each action where the expert was seen, and draws any where it was not. MaxEnt IRL is
maxent_irl.py's. AIRL and GAIL train the networks of airl.py and gail.py with their losses, on one-hot cells and
actions; but the policy that they train against is the exact soft optimum of the reward so far, not PPO's: of f for
AIRL, of -log D for GAIL, where entropy weighs 0.1. AIRL's reward is its g. Three seeds: demonstrations, networks,
batches. Values are the true discounted return from the start, as shares of the optimum of each world.

Usage: make studies, or python results/studies/transfer.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algorithms import airl, gail, maxent_irl
from datasets import find_world
from results.studies.common import SEEDS, beyond, keep, kept, once, save_figure

STUDY, DEMOS, BETA, STEPS, UPDATES, BATCH, LR = "transfer", 500, 5.0, 300, 5, 64, 3e-3
WORLDS = {"left": ("left", 0.1), "left, windy": ("left", 0.3), "right": ("right", 0.1)}
METHODS = ("BC", "MaxEnt linear", "MaxEnt deep", "AIRL state", "AIRL state-action", "GAIL")
COPIES = "AIRL state-action", "GAIL"  # rewards that may be the expert's advantage, of actions as they were here


def demonstrations(world):
    """States and actions of the soft expert, (DEMOS, T) each."""
    return world.sample(maxent_irl.soft_policy(world, BETA * world.rew)[0], DEMOS)


def clone(world, states, acts):
    """The share of each action in each state, (T, S, A), the same at all times; 1/4 where there is none."""
    counts = torch.zeros(len(world.cells), 4, dtype=torch.float64)
    counts.index_put_((states.flatten(), acts.flatten()), torch.ones(states.numel(), dtype=torch.float64), True)
    counts[counts.sum(1) == 0] = 1
    return (counts / counts.sum(1, keepdim=True)).expand(world.horizon, -1, -1)


def adversary(world, script, reward, states, acts):
    """The reward (S, A) that AIRL's or GAIL's discriminator leaves, trained against the exact policy of its own."""
    S, A, T = len(world.cells), 4, world.horizon
    cell, one_hot = torch.eye(S, dtype=torch.float64), torch.eye(A, dtype=torch.float64)
    each = torch.cat([cell.repeat_interleave(A, 0), one_hot.repeat(S, 1)], 1)  # (S A, S + A)
    if script is airl:
        net = airl.Shaped(airl.Args(reward=reward, gamma=world.gamma), S, A).double()
    else:
        net = gail.mlp(S + A, 100, 100, 1).double()
    opt = torch.optim.Adam(net.parameters(), LR)

    @torch.no_grad()
    def earned():
        """What the policy is trained on: f, or -log D times ten (S, A); next states as they are expected."""
        if script is gail:
            return 10 * F.softplus(-net(each)).view(S, A)
        h = net.h(cell)[:, 0]
        return net.g(each[:, : net.seen]).view(S, A) + world.gamma * world.move @ h - h[:, None]

    def logit(policy, states, acts, t, i):
        """Of D, at steps t of trajectories i, (BATCH,) each."""
        s, a, next_s = states[i, t], acts[i, t], states[i, t + 1]
        if script is gail:
            return net(torch.cat([cell[s], one_hot[a]], 1))[:, 0]
        return policy[t, s, a].log() - net(torch.cat([cell[s], one_hot[a], cell[next_s]], 1), 0)

    for _ in range(STEPS):
        policy, _ = maxent_irl.soft_policy(world, earned())
        own = world.sample(policy, 32)
        for _ in range(UPDATES):
            t = torch.randint(T - 1, (2, BATCH))
            logits = (
                logit(policy, *own, t[0], torch.randint(32, (BATCH,))),
                logit(policy, states, acts, t[1], torch.randint(DEMOS, (BATCH,))),
            )
            loss = gail.discriminator_loss(*logits)  # airl.py's is the same
            opt.zero_grad()
            loss.backward()
            opt.step()
    if script is gail:
        return earned()
    with torch.no_grad():
        return net.g(each[:, : net.seen]).view(S, A)


def learned(method, seed):
    """What a method leaves of the demonstrations: a policy (T, S, A) of BC, else a reward (S,) or (S, A)."""
    if method.startswith("MaxEnt"):
        words = dict(env="left", demos=DEMOS, beta=BETA, seed=seed, reward=method.split()[1])
        return maxent_irl.train(maxent_irl.Args(**words))["rew"]
    torch.manual_seed(seed)
    world = find_world("left")
    shown = demonstrations(world)
    if method == "BC":
        return clone(world, *shown)
    return adversary(world, airl if "AIRL" in method else gail, method.split()[-1], *shown)


def measure():
    def stage(method, seed):
        left, shares = learned(method, seed), {}
        for name, (env, wind) in WORLDS.items():
            world = find_world(env, wind=wind)
            ways = [left, left] if method == "BC" else [world.optimum(left), maxent_irl.soft_policy(world, left)[0]]
            best = world.value(world.optimum(world.rew))
            shares[name] = [world.value(policy) / best for policy in ways]
        return {"shares": shares}

    settings = [DEMOS, BETA, STEPS, UPDATES, BATCH, LR, WORLDS]
    result = {name: {method: [] for method in METHODS} for name in WORLDS}
    for seed in SEEDS:
        for method in METHODS:
            row = once(STUDY, f"{method} {seed}", [method, seed, *settings], lambda m=method, s=seed: stage(m, s))
            for name in WORLDS:
                result[name][method].append(row["shares"][name])
        keep(STUDY, worlds=result)


def shares(world, method, soft=False):
    """Of the optimum, one a seed."""
    return [pair[soft] for pair in kept(STUDY)["worlds"][world][method]]


def percents(values):
    return f"{np.mean(values):.0%} ± {100 * np.std(values, ddof=1):.0f}" if len(values) > 1 else f"{values[0]:.0%}"


def findings():
    def row(world):
        greedy = ", ".join(f"{m} {percents(shares(world, m))}" for m in METHODS)
        soft = ", ".join(f"{m} {percents(shares(world, m, True))}" for m in METHODS[1:])
        return f"{greedy}; with the soft policy {soft}"

    rewards, moved = [m for m in METHODS[1:] if m not in COPIES], list(WORLDS)[-1]
    at_home = min(np.mean(shares("left", m)) for m in METHODS) > 0.5
    outlives = min(np.mean(shares(moved, m)) for m in rewards) > 0.9
    bc = all(beyond(shares(moved, m), shares(moved, "BC")) for m in rewards)
    say = lambda true: "So it is" if true else "Not so"
    return [
        f"Expected at home: all come to more than half of the optimum. {say(at_home)}: {row('left')}.",
        f"In the wind: {row('left, windy')}.",
        f"Expected where the wall has moved: rewards of states are worth 90 % of the optimum. {say(outlives)}: "
        f"{row(moved)}.",
        f"Expected there: each of them is above BC by more than both spreads. {say(bc)}.",
    ] + [
        f"Expected there: AIRL's reward of states is above that of {method}, greedily, by more than both spreads. "
        f"{say(beyond(shares(moved, 'AIRL state'), shares(moved, method)))}."
        for method in COPIES
    ]


def draw():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(WORLDS), figsize=(4.0 * len(WORLDS), 3.6), sharey=True)
    for axis, world in zip(axes, WORLDS):
        for soft, color, label in ((False, "tab:blue", "optimised greedily"), (True, "tab:orange", "soft policy")):
            values = np.array([shares(world, method, soft) for method in METHODS])  # (methods, seeds)
            places = np.arange(len(METHODS)) + (0.2 if soft else -0.2)
            axis.bar(places, values.mean(1), 0.4, color=color, label=label)
            for place, own in zip(places, values):
                axis.plot([place] * len(own), own, color="black", marker=".", markersize=4, linestyle="none")
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set(title=world, ylim=(0, 1.1))
        axis.set_xticks(range(len(METHODS)), METHODS, rotation=40, ha="right", fontsize=8)
    axes[0].set_ylabel("share of the optimum")
    axes[0].legend(fontsize=7, loc="lower left")
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
