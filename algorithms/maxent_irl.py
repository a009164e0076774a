"""MaxEnt IRL: Maximum Entropy Inverse Reinforcement Learning (Ziebart et al., AAAI 2008), deep: arXiv:1507.04888.

    policy   V_t(s) = log sum_a exp Q_t(s, a),   Q_t(s, a) = rew(s) + gamma E V_{t+1}(next s),   pi_t = exp(Q_t - V_t)
    loss     L = E_start V_0 - visits_expert @ rew,   dL / d rew = visits - visits_expert, both discounted
    reward   linear: rew = theta @ features, so that dL / d theta is the difference of the feature expectations
             deep: rew = net(features), and the same difference goes back through it (Wulfmeier et al. 2015)

The expert is soft itself, of --beta times the true reward, or the best there is (--expert optimal); its visits are
exact, or those of --demos trajectories. Of a soft one's reward a constant stays open, and whatever no visit tells.
Exact, in float64, on worlds that can be enumerated (datasets/tasks/gridworlds.py).
Differs from the authors' code: none was published with the paper. The visits are those of the causal form (Ziebart's
thesis, 2010), which wind needs and which is the paper's without; Adam, its lr falling to 0; both discounted.
Usage: python algorithms/maxent_irl.py --env open
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import find_world
from results.run import check_arguments


@dataclass
class Args:
    env: str = "open"  # a gridworld: open, left, right, or a text file with a map (datasets/tasks/gridworlds.py)
    features: str = "cell"  # of its cells: cell, terrain, or a .npy file (cells, features)
    wind: float = 0.1  # probability that a move goes in a random direction
    seed: int = 0
    steps: int = 500  # of the gradient
    lr: float = 0.2
    gamma: float = 0.95  # discount
    horizon: int = 50  # steps of an episode
    expert: Literal["soft", "optimal"] = "soft"  # the fitted model itself, or a policy without error
    beta: float = 5.0  # of the soft expert: its rewards are so many times the true ones
    demos: int = 0  # trajectories that it shows; 0: its visits are known exactly
    reward: Literal["linear", "deep"] = "linear"  # in the features


def soft_policy(world, rew):
    """Soft value iteration: a reward (S,), or of actions too, (S, A) -> pi (T, S, A), V_0 (S,)."""
    next_value, policy = torch.zeros_like(world.rew), []
    for _ in range(world.horizon):
        q = rew.reshape(len(rew), -1) + world.gamma * world.move @ next_value  # (S, A)
        next_value = q.logsumexp(1)  # (S,)
        policy.append((q - next_value[:, None]).exp())
    return torch.stack(policy[::-1]), next_value


def expert_visits(world, policy, demos):
    """Discounted visits of each state that an expert shows, (S,): expected, or the mean of so many trajectories."""
    if not demos:
        return world.visits(policy).sum(0)
    states, _ = world.sample(policy, demos)  # (demos, T)
    weights = (world.gamma ** torch.arange(world.horizon, dtype=torch.float64)).expand(demos, -1)
    return torch.zeros_like(world.rew).index_add(0, states.flatten(), weights.flatten()) / demos


def maxent_loss(rew, visits, shown):
    """Of which the gradient is that of L: the learner's visits (S,), and the expert's as they are shown (S,)."""
    return (visits - shown) @ rew


def make_reward(args, K):
    if args.reward == "linear":
        net = nn.Linear(K, 1, bias=False)
        nn.init.zeros_(net.weight)
        return net.double()
    layers = nn.Linear(K, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1, bias=False)
    return nn.Sequential(*layers).double()


def correlation(a, b):
    """Pearson's, of two (S,): what neither a factor nor a constant changes."""
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def train(args):
    """Learns the reward and prints how good it is: "rew" (S,), and the numbers that it prints."""
    check_arguments(args)
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    world = find_world(args.env, args.features, args.wind, args.gamma, args.horizon)
    best = world.optimum(world.rew)
    expert = best if args.expert == "optimal" else soft_policy(world, args.beta * world.rew)[0]
    shown = expert_visits(world, expert, args.demos)
    net = make_reward(args, world.features.shape[1])
    opt, lr = torch.optim.Adam(net.parameters()), args.lr * (0.1 if args.reward == "deep" else 1)  # nets are touchier
    for step in range(args.steps):
        rew = net(world.features).squeeze(1)  # (S,)
        policy, _ = soft_policy(world, rew.detach())
        loss = maxent_loss(rew, world.visits(policy).sum(0), shown)
        opt.param_groups[0]["lr"] = lr * (1 - step / args.steps)
        opt.zero_grad()
        loss.backward()
        opt.step()

    rew = net(world.features).squeeze(1).detach()
    policy, _ = soft_policy(world, rew)
    expected, theirs = (visits @ world.features for visits in (world.visits(policy).sum(0), shown))
    result = {
        "feature_gap": ((expected - theirs).norm() / theirs.norm()).item(),
        "correlation": correlation(rew, world.rew),
        "share": world.value(world.optimum(rew)) / world.value(best),
        "seconds": time.perf_counter() - start,
    }
    print(f"MaxEnt IRL on {world.name}, {args.reward} reward of {args.features} features:\n{world.show(rew)}")
    print(f"feature expectations {result['feature_gap']:.2%} from the expert's; ", end="")
    print(f"correlation with the true reward {result['correlation']:.3f}; ", end="")
    print(f"optimised, {result['share']:.1%} of the optimum; {result['seconds']:.1f} s")
    return result | {"rew": rew}


if __name__ == "__main__":
    train(tyro.cli(Args))
