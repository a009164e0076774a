"""Apprenticeship: Apprenticeship Learning via Inverse Reinforcement Learning (Abbeel & Ng, ICML 2004), not on arXiv.

    expected  mu(pi) = E sum_t gamma^t features(s_t)
    reward    rew = w @ features,   w = mu_expert - mu_near,   |w| = t, how far it still is
    policy    pi_i is the best for that reward, and mu_i what it expects
    project   mu_near moves towards mu_i, to the point of that line that is nearest to mu_expert
    margin    mu_near is the nearest point of the hull of all mu_i: the dual of max t, w @ mu_expert >= w @ mu_i + t

Both end when |w| <= --eps |mu_expert|, or no mixture is nearer. What they return is a mixed policy, which draws one of
the pi_i for each episode and so expects mu_near: for whatever true weights, as good as the expert to |weights| |w|.
Exact, in float64, on worlds that can be enumerated (datasets/tasks/gridworlds.py); the expert is the best policy there.
Differs from the authors' code: none was published. From the paper: the first policy is uniform, not random; |w| is
compared with a share of the expert's expectations, not with eps itself; no step of `project` goes beyond mu_i.
Usage: python algorithms/apprenticeship.py --env open --method margin
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import find_world
from results.run import check_arguments


@dataclass
class Args:
    env: str = "open"  # a gridworld: open, left, right, or a text file with a map (datasets/tasks/gridworlds.py)
    features: str = "terrain"  # of its cells: cell, terrain, or a .npy file (cells, features)
    wind: float = 0.1  # probability that a move goes in a random direction
    seed: int = 0
    steps: int = 500  # at most, each of which adds a policy
    gamma: float = 0.95  # discount
    horizon: int = 50  # steps of an episode
    demos: int = 0  # trajectories that the expert shows; 0: what it expects is known exactly
    method: Literal["project", "margin"] = "project"  # how the next reward is found
    eps: float = 0.01  # of the expert's feature expectations: so near to them is near enough


def feature_expectations(world, policy):
    """mu of a policy (T, S, A) -> (K,)."""
    return world.visits(policy).sum(0) @ world.features


def shown_expectations(world, policy, demos):
    """The mean of mu over trajectories of a policy (T, S, A) -> (K,)."""
    states, _ = world.sample(policy, demos)  # (demos, T)
    discounts = world.gamma ** torch.arange(world.horizon, dtype=torch.float64)
    return (discounts[:, None] * world.features[states]).sum(1).mean(0)


def project(shown, near, weights, mu):
    """The point nearest to `shown` between `near` and `mu`, (K,) each, and what it is mixed of, (i,) -> (i + 1,)."""
    way = mu - near
    share = ((way @ (shown - near)) / (way @ way)).clamp(max=1)  # beyond mu, near would have a negative share
    return near + share * way, torch.cat([(1 - share) * weights, share[None]])


def nearest(shown, mus):
    """The point nearest to `shown` (K,) of the convex hull of mus (i, K), and what it is mixed of, (i,).

    The x >= 0 that is best for |(mus - shown)' x|^2 + (sum x - 1)^2 is a multiple of those weights: for a given
    distance d of x / sum x the best sum leaves d^2 / (1 + d^2).
    """
    ways = torch.cat([(mus - shown).T, torch.ones(1, len(mus), dtype=mus.dtype)])  # (K + 1, i)
    x, _ = nnls(ways.numpy(), [0.0] * len(shown) + [1.0])
    weights = torch.from_numpy(x / x.sum())
    return weights @ mus, weights


def train(args):
    """Finds the mixed policy and prints how near it is: "policies" (i, T, S, A), "weights" (i,), and what it prints."""
    check_arguments(args)
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    world = find_world(args.env, args.features, args.wind, args.gamma, args.horizon)
    best = world.optimum(world.rew)
    shown = shown_expectations(world, best, args.demos) if args.demos else feature_expectations(world, best)
    policies = [torch.full_like(best, 1 / best.shape[-1])]
    mus, weights = [feature_expectations(world, policies[0])], torch.ones(1, dtype=torch.float64)
    near = mus[0]
    for _ in range(args.steps):
        w = shown - near  # (K,)
        policy = world.optimum(world.features @ w)
        mu = feature_expectations(world, policy)
        stuck = w @ (mu - near) <= args.eps * w @ w  # no mixture is nearer, or by a share eps at most
        if stuck or w.norm() <= args.eps * shown.norm():
            break
        policies.append(policy)
        mus.append(mu)
        if args.method == "project":
            near, weights = project(shown, near, weights, mu)
        else:
            near, weights = nearest(shown, torch.stack(mus))

    values = torch.tensor([world.value(policy) for policy in policies], dtype=torch.float64)
    result = {
        "feature_gap": ((near - shown).norm() / shown.norm()).item(),
        "share": (weights @ values).item() / world.value(best),
        "mixed": int((weights > 1e-9).sum()),
        "seconds": time.perf_counter() - start,
    }
    print(f"Apprenticeship on {world.name}, {args.method}: {result['mixed']} of {len(policies)} policies mixed")
    print(f"feature expectations {result['feature_gap']:.2%} from the expert's; ", end="")
    print(f"{result['share']:.1%} of the optimum; {result['seconds']:.1f} s")
    return result | {"policies": torch.stack(policies), "weights": weights}


if __name__ == "__main__":
    train(tyro.cli(Args))
