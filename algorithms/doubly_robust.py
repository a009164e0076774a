"""DR: Doubly Robust Off-policy Value Evaluation for Reinforcement Learning (Jiang & Li, ICML 2016), arXiv:1511.03722.

    DR    V_t = V(obs_t) + rho_t (rew_t + gamma V_t+1 - Q(obs_t, act_t)),   rho_t = pi(act_t | obs_t) / b(act_t | obs_t)
          = sum_t gamma^t [W_t-1 / n V(obs_t) + W_t / n (rew_t - Q(obs_t, act_t))],   W_t = prod_{k <= t} rho_k
    WDR   the same with W_it / sum_j W_jt for W_it / n (Thomas & Brunskill, ICML 2016, arXiv:1604.00923)
    DM    1/n sum_i V(obs_i0), the direct method

Unbiased if either Q or the weights (importance_sampling.py) are right. Where observations are states, Q is solved from
counts, of each half of the episodes for the other: of its own data it would be biased. Else it is --critic of fqe.py,
trained with --noise unless its policies have none. An episode that was cut goes on with V of its last observation.
Usage: python algorithms/doubly_robust.py --env hopper-medium --critic runs/fqe/.../checkpoint.pt
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
from results.policies import Gaussian, load_critics, load_policies, log_probs


@dataclass
class Args:
    env: str = "halfcheetah-medium"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    policies: tuple[str, ...] = ()  # where actions are discrete: checkpoints, tables of probabilities (.npy)
    critic: str = ""  # where they are continuous: a checkpoint of fqe.py, whose policies are valued
    behaviour: str = ""  # the policy that collected the data; "": estimated from them
    seed: int = 0
    gamma: float = 0.99  # discount
    truncate: float = float("inf")  # the largest weight; a lower bound trades bias for variance
    resamples: int = 1_000  # of the episodes, for the 95 % interval
    steps: int = 10_000  # updates of an estimated behaviour policy, where actions are continuous
    samples: int = 10  # actions over which V averages Q
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


def doubly_robust(log_w, rew, q, v, gamma, weighted, counts=None):
    """DR or WDR, (R,): log_w, rew, q (E, T); v (E, T + 1), after the last step, too, where an episode was cut."""
    before = np.concatenate([np.zeros((len(rew), 1)), log_w], 1)  # (E, T + 1): log W_t-1
    discount = gamma ** np.arange(v.shape[1])
    values = estimate(before, v, discount, weighted, counts)
    return values + estimate(log_w, rew - q, discount[:-1], weighted, counts)


def estimators(log_w, rew, q, v, gamma):
    """The three, each a function of counts (R, E) -> (R,)."""
    return {
        "DM": partial(estimate, np.zeros((len(v), 1)), v[:, :1], np.ones(1), False),
        "DR": partial(doubly_robust, log_w, rew, q, v, gamma, False),
        "WDR": partial(doubly_robust, log_w, rew, q, v, gamma, True),
    }


def fit_q(state, act, rew, next_state, done, pi, gamma):
    """Q (S, A) of pi (S, A), exact for the MDP that N transitions count. An action that was not seen in a state does
    what those seen there did, and one in a state that was not seen what all did."""
    S, A = pi.shape
    pair, N = state * A + act, len(state)
    n_pair, n_state = np.bincount(pair, minlength=S * A), np.bincount(state, minlength=S)

    def expected(x):
        """Of x (N,), one a transition, given state and action, (S, A)."""
        of_state = np.where(n_state, np.bincount(state, x, S) / n_state.clip(1), x.mean())
        of_pair = np.bincount(pair, x, S * A) / n_pair.clip(1)
        return np.where(n_pair, of_pair, of_state.repeat(A)).reshape(S, A)

    # The same under pi, as a share of each transition in its state's V: V = moves (rew + gamma (1 - done) V(next)).
    unseen = (pi * (n_pair == 0).reshape(S, A)).sum(1)  # (S,)
    share = pi.ravel()[pair] / n_pair[pair] + unseen[state] / n_state[state]  # (N,)
    moves = np.bincount(state * S + next_state, share * ~done, S * S).reshape(S, S)
    moves[n_state == 0] = np.bincount(next_state, ~done / N, S)
    v = np.linalg.solve(np.eye(S) - gamma * moves, (pi * expected(rew)).sum(1))
    return expected(rew + gamma * ~done * v[next_state])


def cross_fitted(state, act, rew, next_state, done, ends, pi, gamma):
    """Q of (state, act), V of state and V of next_state, (3, N): of each episode by what every other episode counts."""
    half = np.arange(len(ends)).repeat(np.diff(ends, prepend=0)) % 2  # (N,)
    values = np.zeros((3, len(state)))
    for own, other in ((half == 0, half == 1), (half == 1, half == 0)):
        q = fit_q(*(column[other] for column in (state, act, rew, next_state, done)), pi, gamma)
        v = (pi * q).sum(1)
        values[:, own] = q[state, act][own], v[state[own]], v[next_state[own]]
    return values


def from_counts(data, policy, gamma):
    """The same of a Dataset, whose different observations are the states."""
    obs, act, rew, next_obs, done = (column.cpu().numpy() for column in data.split(data.rows))
    seen, state = np.unique(np.concatenate([obs, next_obs]), axis=0, return_inverse=True)
    seen = torch.as_tensor(seen)  # in a Dataset with frames, which are looked up, their numbers
    pi = policy.probs(seen if data.frames is None else data.look_up(seen)).double().numpy()
    state, next_state = state.reshape(2, -1)
    return cross_fitted(state, act.ravel().astype(int), rew, next_state, done > 0, data.ends, pi, gamma)


@torch.no_grad()
def from_critic(data, policy, q_function, samples):
    """The same by a critic, V as a mean over so many actions."""
    blocks, v = [], lambda obs: sum(q_function(obs, policy.act(obs)) for _ in range(samples)) / samples
    for batch in map(data.batch, data.rows.split(10_000)):
        blocks.append(torch.stack([q_function(batch.obs, batch.act), v(batch.obs), v(batch.next_obs)]))
    return torch.cat(blocks, 1).double().cpu().numpy()


def with_tail(v, next_v, done, ends):
    """V of each episode and time (E, T + 1): after its last step that of its next observation, 0 at a termination."""
    values = np.concatenate([pad(v, ends), np.zeros((len(ends), 1))], 1)
    values[np.arange(len(ends)), np.diff(ends, prepend=0)] = np.where(done, 0, next_v)[ends - 1]
    return values


def interval(estimator, episodes, resamples, rng):
    """A 95 % interval by bootstrap over episodes (percentiles), (2,)."""
    counts = rng.multinomial(episodes, np.full(episodes, 1 / episodes), resamples)  # (R, E)
    return np.nanquantile(np.concatenate([estimator(part) for part in np.array_split(counts, 10)]), (0.025, 0.975))


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
    if data.n_actions:
        policies = load_policies(args.policies, data)
        fits = [lambda policy=policy: from_counts(data, policy, args.gamma) for policy in policies]
    elif args.critic:
        policies, critics = load_critics(args.critic, data)
        fits = [lambda two=two: from_critic(data, *two, args.samples) for two in zip(policies, critics)]
    else:
        raise UserError("Where actions are continuous Q must be learned: fqe.py does, then name it with --critic.")
    log_b = log_probs(*load_policies([args.behaviour], data), data) if args.behaviour else estimated(data, args)
    rew = pad(data.rew.cpu().numpy(), data.ends)
    for policy, fit in zip(policies, fits):
        log_w = log_weights(log_probs(policy, data), log_b, data.ends, args.truncate)
        q, v, next_v = fit()
        q, v = pad(q, data.ends), with_tail(v, next_v, data.done.cpu().numpy() > 0, data.ends)
        print(f"\n{policy.name}\n{'':8}{'estimate':>12}   95 % bootstrap interval (of DM, without its bias)")
        for name, estimator in estimators(log_w, rew, q, v, args.gamma).items():
            try:
                low, high = interval(estimator, len(rew), args.resamples, np.random.default_rng(args.seed))
                print(f"{name:8}{estimator().item():12.4g}   {low:.4g} to {high:.4g}")
            except UserError as error:
                print(f"{name:8}{'none':>12}   {error}")


if __name__ == "__main__":
    train(tyro.cli(Args))
