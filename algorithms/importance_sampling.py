"""Importance sampling: Eligibility Traces for Off-Policy Policy Evaluation (Precup, Sutton & Singh, ICML 2000).

    ratio    W_t = prod_{k <= t} pi(act_k | obs_k) / b(act_k | obs_k),   at most --truncate (Ionides 2008)
    IS       1/n sum_i W_i,T G_i                        PDIS   sum_t gamma^t 1/n sum_i W_it rew_it
    WIS      sum_i W_i,T G_i / sum_i W_i,T              WPDIS  sum_t gamma^t sum_i W_it rew_it / sum_i W_it

IS and PDIS (per decision) are unbiased; the weighted ones vary less, and WPDIS is CWPDIS of arXiv:1604.00923.
b is --behaviour, or estimated from the data, which lowers the variance (Hanna et al. 2019, arXiv:1806.01347): by
counts where actions are discrete, else as a Gaussian squashed by tanh. What follows on a time-out is not counted.
Of a policy with a distribution it is this that is valued, not its mean action. Intervals: bootstrap over episodes.
Usage: python algorithms/importance_sampling.py --env hopper-medium --policies runs/awac/.../checkpoint.pt
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import UserError, load
from results.policies import Gaussian, load_policies, log_probs


@dataclass
class Args:
    policies: tuple[str, ...]  # checkpoints, behaviour policies (.npz) or tables of probabilities (.npy)
    env: str = "halfcheetah-medium"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    behaviour: str = ""  # the policy that collected the data; "": estimated from them
    seed: int = 0
    gamma: float = 0.99  # discount
    truncate: float = float("inf")  # the largest weight; a lower bound trades bias for variance
    std: float = 0.0  # of noise on the actions of a deterministic policy, which is then what is valued
    resamples: int = 1_000  # of the episodes, for the 95 % interval
    steps: int = 10_000  # updates of an estimated behaviour policy, where actions are continuous
    batch_size: int = 256
    lr: float = 1e-3


def pad(flat, ends):
    """Of each step (N,) -> of each episode and time (E, T), 0 after its end; ends (E,): the index after each's last."""
    lengths = np.diff(ends, prepend=0)
    padded = np.zeros((len(ends), lengths.max()))
    padded[np.arange(lengths.max()) < lengths[:, None]] = flat
    return padded


def log_weights(log_pi, log_b, ends, truncate=np.inf):
    """log W (E, T) of log probabilities (N,) of the logged actions; after its end an episode keeps its last weight.
    UserError where the data acted as b never does."""
    if len(ends) < 2:
        raise UserError("One trajectory has no variance: importance sampling needs at least two.")
    if never := np.sum(np.isneginf(log_b)):
        raise UserError(f"The behaviour policy gives probability 0 to {never:,} logged actions: it did not act here.")
    with np.errstate(divide="ignore"):
        return np.minimum(pad(log_pi - log_b, ends).cumsum(1), np.log(truncate))


def estimate(log_w, rew, discount, weighted, counts=None):
    """sum_t discount_t sum_i share_it rew_it, where share is W_it / n or, weighted, W_it / sum_j W_jt: (R,).

    log_w, rew (E, T); discount (T,); counts (R, E): how often each episode is in each resample; None: in one, once.
    UserError where all weights are 0, or a float64 is too small for the result; a resample without weights has nan.
    """
    counts = np.ones((1, len(rew))) if counts is None else counts
    top = log_w.max(0)  # (T,), taken out, so that nothing overflows before it must
    if np.isneginf(top).any():
        raise UserError(f"From step {np.isneginf(top).argmax() + 1} on no logged episode is possible under the policy.")
    w = np.exp(log_w - top)
    total, norm = counts @ (w * rew), counts @ w  # (R, T)
    if weighted:
        with np.errstate(invalid="ignore"):
            return total / norm @ discount
    if top.max() > 700:
        raise UserError(f"The largest weight, e^{top.max():.0f}, overflows: use WIS or WPDIS, or --truncate.")
    return total * np.exp(top) @ discount / counts.sum(1)


def estimators(log_w, rew, gamma):
    """The four, each a function of counts (R, E) -> (R,)."""
    discount = gamma ** np.arange(rew.shape[1])
    whole = log_w[:, -1:], (rew @ discount)[:, None], np.ones(1)  # a trajectory is one step, its return the reward
    return {
        "IS": partial(estimate, *whole, False),
        "WIS": partial(estimate, *whole, True),
        "PDIS": partial(estimate, log_w, rew, discount, False),
        "WPDIS": partial(estimate, log_w, rew, discount, True),
    }


def interval(estimator, episodes, resamples, rng):
    """A 95 % interval by bootstrap over episodes (percentiles), (2,)."""
    counts = rng.multinomial(episodes, np.full(episodes, 1 / episodes), resamples)  # (R, E)
    return np.nanquantile(np.concatenate([estimator(part) for part in np.array_split(counts, 10)]), (0.025, 0.975))


def effective_sample_size(log_w):
    """(sum_i W_it)^2 / sum_i W_it^2 at each time, (T,): as many episodes of pi's own would be as good; 0: none left."""
    w = np.exp(log_w - np.maximum(log_w.max(0), -1e300))  # -inf less -inf would be nan
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(w.sum(0) ** 2 / (w**2).sum(0))


class Behaviour(nn.Module):
    """The estimated behaviour policy: obs (B, O) -> mean and log_std (B, A), before the tanh."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(obs_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, 2 * act_dim)

    def forward(self, obs):
        mean, log_std = self.head(self.net(obs)).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


def estimated(data, args):
    """The behaviour policy of most likelihood, as it acts in the data: log probabilities (N,) of their actions."""
    if data.n_actions:
        seen, state = np.unique(data.obs.cpu().numpy(), axis=0, return_inverse=True)
        if len(seen) > len(data) / 2:
            raise UserError("Observations hardly recur, and counts cannot estimate who acted: name --behaviour.")
        pair = state.ravel() * data.n_actions + data.act.cpu().numpy().ravel().astype(int)
        return np.log(np.bincount(pair)[pair] / np.bincount(state.ravel())[state.ravel()])
    mean, std = data.obs.mean(0), data.obs.std(0) + 1e-3
    net = Behaviour(data.obs_dim, data.act_dim).to(data.rows.device)
    policy = Gaussian("the estimated behaviour policy", lambda obs: net((obs - mean) / std), True)
    opt = torch.optim.Adam(net.parameters(), args.lr)
    for _ in range(args.steps):
        batch = data.sample(args.batch_size)
        opt.zero_grad()
        (-policy.log_prob(batch.obs, batch.act).mean()).backward()
        opt.step()
    return log_probs(policy, data)


def train(args):
    if args.truncate <= 0:
        raise UserError(f"--truncate must be above 0, not {args.truncate}.")
    torch.manual_seed(args.seed)
    data = load(args.env, args.source, discrete=None)
    policies = load_policies(args.policies, data, args.std)
    if args.behaviour:
        log_b = log_probs(*load_policies([args.behaviour], data, args.std), data)
    else:
        log_b = estimated(data, args)
    rew = pad(data.rew.cpu().numpy(), data.ends)
    print(f"Discounted return of the data: {(rew @ args.gamma ** np.arange(rew.shape[1])).mean():.4g}")
    for policy in policies:
        log_w = log_weights(log_probs(policy, data), log_b, data.ends, args.truncate)
        print(f"\n{policy.name}\n{'':8}{'estimate':>12}   95 % bootstrap interval (too short where few episodes weigh)")
        for name, estimator in estimators(log_w, rew, args.gamma).items():
            try:
                low, high = interval(estimator, len(rew), args.resamples, np.random.default_rng(args.seed))
                print(f"{name:8}{estimator().item():12.4g}   {low:.4g} to {high:.4g}")
            except UserError as error:
                print(f"{name:8}{'none':>12}   {error}")
        size, finite = effective_sample_size(log_w), np.where(np.isneginf(log_w), np.nan, log_w)
        print(f"Of {len(rew):,} episodes, by step: effective sample size, deviation of log W")
        for t in sorted({0, *(2**k - 1 for k in range(1, 20) if 2**k < len(size)), len(size) - 1}):
            print(f"{t + 1:8}{size[t]:12.1f}{np.nanstd(finite[:, t]):12.3g}")


if __name__ == "__main__":
    train(tyro.cli(Args))
