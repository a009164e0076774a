"""ICU-Sepsis (Choudhary et al. 2024, arXiv:2406.05646): treating a patient, an MDP whose matrices are known.

716 states: 0 to 712 are clusters of patients' measurements (MIMIC-III), 713 is death, 714 survival, and 715 follows on
both. 25 actions: five levels of fluids times five of vasopressors. The reward is 1 upon survival, else 0, so without a
discount a policy's value is the probability of survival. An action that the clinicians took too rarely in a state is
not admissible there: it does what the mean of the admissible ones does.

A policy is a table of probabilities (716, 25), and its value is computed, not sampled:

    mdp = load_mdp()
    value(uniform()), value(mdp.clinicians), value(solve()), value(solve(worst=True))   0.7801 0.7818 0.8751 0.6330
    logs = trajectories(mdp.clinicians, 1000, seed=0)

The matrices come with the package icu-sepsis 2.0.1, which is read but not imported: that takes gym, pandas and more.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from datasets.errors import UserError

S, A = 716, 25
DEATH, SURVIVAL, LIVE = 713, 714, 713  # LIVE: the first so many states are not terminal
MAX_STEPS = 500  # of an episode; a mean one takes 9
BEHAVIOURS = ("clinicians", "optimal", "mixture")  # who acts in the data


class MDP(NamedTuple):
    transition: np.ndarray  # (S, A, S) probabilities of the next state; SURVIVAL pays 1 to whoever enters it
    start: np.ndarray  # (S,) probabilities of the first state
    clinicians: np.ndarray  # (S, A) the policy estimated from what was done to the patients
    admissible: np.ndarray  # (S, A) bool
    features: np.ndarray  # (S, 47) the clusters' centres, standardized measurements; 0 in terminal states
    sofa: np.ndarray  # (S,) SOFA scores: how ill a patient is


class Trajectories(NamedTuple):
    """N steps, episode after episode."""

    state: np.ndarray  # (N,) int64
    act: np.ndarray  # (N,) int64
    rew: np.ndarray  # (N,) float64
    next_state: np.ndarray  # (N,) int64
    done: np.ndarray  # (N,) bool: dead or alive; not where an episode was cut after MAX_STEPS
    ends: np.ndarray  # (E,) the index after each episode's last step


@cache
def load_mdp():
    """The MDP; in half a second, once. UserError without the package."""
    package = importlib.util.find_spec("icu_sepsis")
    if package is None:
        raise UserError("ICU-Sepsis needs a package that is missing: pip install --no-deps icu-sepsis==2.0.1.")
    folder = Path(package.submodule_search_locations[0]) / "envs" / "assets"
    with np.load(folder / "dynamics.npz") as arrays:
        names = ("tx_mat", "d_0", "expert_policy", "state_cluster_centers", "sofa_scores")
        transition, start, clinicians, features, sofa = (arrays[name] for name in names)
    clinicians[LIVE:] = 1 / A  # zeros there, and nothing is done any more
    admissible = np.zeros((S, A), bool)
    for state, line in enumerate((folder / "admissible_actions.txt").read_text().splitlines()[1:]):
        admissible[state, [int(word) for word in line.split()]] = True
    return MDP(transition, start, clinicians, admissible, features.astype(np.float32), sofa)


def uniform():
    """Each action as likely as another, (S, A)."""
    return np.full((S, A), 1 / A)


def deterministic(act):
    """The table (S, A) of a policy that takes act[s], (S,) integers, in state s."""
    return np.eye(A)[act]


def soften(policy, epsilon):
    """The policy that takes `policy`'s action, or with probability epsilon any: (S, A)."""
    return (1 - epsilon) * policy + epsilon * uniform()


def behaviour(who):
    """A policy that collects data, (S, A): the clinicians', or the best one, which takes a tenth of its actions at
    random. A mixture of data has trajectories of both, half of the transitions each."""
    return load_mdp().clinicians if who == "clinicians" else soften(solve(), 0.1)


def visits(policy, gamma=1.0):
    """How often an episode comes by each state, discounted, (S,); without a discount its sum is the mean length."""
    mdp, moves = load_mdp(), moves_of(policy)
    counts = np.zeros(S)
    counts[:LIVE] = np.linalg.solve(np.eye(LIVE) - gamma * moves[:, :LIVE].T, mdp.start[:LIVE])
    return counts


def value(policy, gamma=1.0):
    """The exact expected return of a policy (S, A): without a discount, the probability of survival."""
    return float(visits(policy, gamma)[:LIVE] @ moves_of(policy)[:, SURVIVAL])


def state_values(policy, gamma=1.0):
    """The exact value of each state, (S,); 0 of terminal ones."""
    moves, values = moves_of(policy), np.zeros(S)
    values[:LIVE] = np.linalg.solve(np.eye(LIVE) - gamma * moves[:, :LIVE], moves[:, SURVIVAL])
    return values


def q_values(policy, gamma=1.0):
    """The exact value of each action in each state, followed by the policy, (S, A); 0 in terminal states."""
    q = load_mdp().transition @ (gamma * state_values(policy, gamma) + (np.arange(S) == SURVIVAL))
    q[LIVE:] = 0
    return q


def solve(gamma=1.0, worst=False):
    """The best policy, or the worst, by policy iteration: a table (S, A) of zeros and ones."""
    sign = -1 if worst else 1
    act = np.zeros(S, int)
    while True:
        q = sign * q_values(deterministic(act), gamma)
        better = q.max(1) > q[np.arange(S), act] + 1e-12  # or equals would alternate
        if not better.any():
            return deterministic(act)
        act[better] = q[better].argmax(1)


def trajectories(policy, number, seed):
    """Trajectories of `number` episodes of the policy (S, A)."""
    _check(policy)
    draw_act, rng = _Drawer(policy), np.random.default_rng(seed)
    state = _Drawer(load_mdp().start[None])(np.zeros(number, int), rng)
    episode, steps = np.arange(number), []
    for _ in range(MAX_STEPS):
        act = draw_act(state, rng)
        next_state = _next_state()(state * A + act, rng)
        steps.append((episode, state, act, next_state))
        on = next_state < LIVE
        episode, state = episode[on], next_state[on]
        if not len(episode):
            break
    episode, state, act, next_state = (np.concatenate(column) for column in zip(*steps))
    order = np.argsort(episode, kind="stable")  # which keeps the order of time
    state, act, next_state = state[order], act[order], next_state[order]
    ends = np.cumsum(np.bincount(episode, minlength=number))
    return Trajectories(state, act, (next_state == SURVIVAL) * 1.0, next_state, next_state >= LIVE, ends)


def observe(state, kind="one-hot"):
    """What a network sees of states (N,): "one-hot" (N, S) or their "features" (N, 47), float32."""
    state = np.asarray(state)
    if (wrong := (state < 0) | (state >= S)).any():
        raise UserError(f"ICU-Sepsis has states 0 to {S - 1}, and {state[wrong][0]} is none of them.")
    return np.eye(S, dtype=np.float32)[state] if kind == "one-hot" else load_mdp().features[state]


class ICUSepsis(gymnasium.Env):
    """obs (O,) as `observe` gives it; kind: "one-hot" or "features"."""

    metadata = {"render_modes": [], "render_fps": 1}

    def __init__(self, kind="one-hot"):
        self.kind, self.mdp = kind, load_mdp()
        self.observation_space = spaces.Box(-np.inf, np.inf, observe([0], kind)[0].shape, np.float32)
        self.action_space = spaces.Discrete(A)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.choice(S, p=self.mdp.start)
        return observe([self.state], self.kind)[0], {}

    def step(self, act):
        self.state = self.np_random.choice(S, p=self.mdp.transition[self.state, act])
        obs = observe([self.state], self.kind)[0]
        return obs, float(self.state == SURVIVAL), bool(self.state >= LIVE), False, {"state": self.state}


gymnasium.register("ICUSepsis-v0", entry_point="datasets.tasks.icu_sepsis:ICUSepsis")


def moves_of(policy):
    """Probabilities of the next state under a policy, (LIVE, S)."""
    _check(policy)
    return np.einsum("sa,sat->st", policy[:LIVE], load_mdp().transition[:LIVE], optimize=True)


def _check(policy):
    if np.shape(policy) != (S, A) or np.min(policy) < 0 or not np.allclose(np.sum(policy, 1), 1, atol=1e-6):
        raise UserError(
            f"A policy of ICU-Sepsis is a table ({S}, {A}) of probabilities, each row of which adds up to 1."
        )


class _Drawer:
    """Draws a column for each of the rows (N,) of a table of probabilities (R, C): (N,) int64."""

    def __init__(self, probabilities):
        # Rows that follow each other as [0, 1), [1, 2), ... are one sorted list, and a search finds all the columns.
        rows, self.columns = probabilities.nonzero()
        sums = np.cumsum(probabilities[rows, self.columns])
        self.last = np.searchsorted(rows, np.arange(len(probabilities)), side="right") - 1
        sums += np.arange(len(probabilities))[rows] + 1 - sums[self.last][rows]  # what rounding has added up
        self.sums = sums

    def __call__(self, row, rng):
        found = np.searchsorted(self.sums, row + rng.random(len(row)), side="right")
        return self.columns[np.minimum(found, self.last[row])]


@cache
def _next_state():
    return _Drawer(load_mdp().transition.reshape(S * A, S))
