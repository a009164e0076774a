"""A chain of three states and two actions whose trajectories can all be listed: what evaluations are tested against.

Action 1 goes right with probability 0.7, action 0 with 0.2; from the last state "right" ends the episode. Each step
pays by state and action. An episode is cut after HORIZON steps, which are the end here, so values depend on the time.
"""

import itertools
from functools import cache

import numpy as np

S, A, HORIZON, GAMMA = 3, 2, 4, 0.9
RIGHT = np.array([0.2, 0.7])
REW = np.array([[0.3, -0.2], [0.0, 0.5], [1.0, 2.0]])
PI = np.array([[0.1, 0.9], [0.6, 0.4], [0.0, 1.0]])  # the policy to evaluate; one of its probabilities is 0
B = np.array([[0.5, 0.5], [0.3, 0.7], [0.8, 0.2]])  # the one that collects


@cache
def trajectories(right=tuple(RIGHT)):
    """[(states, actions, rewards, whether it ended by itself, probability of its moves)], all of them."""
    found = []
    for acts in itertools.product(range(A), repeat=HORIZON):
        for moves in itertools.product((0, 1), repeat=HORIZON):
            state, states, chance, done = 0, [], 1.0, False
            for act, move in zip(acts, moves):
                states.append(state)
                chance *= right[act] if move else 1 - right[act]
                state += move
                if state == S:
                    done = True
                    break
            key = tuple(states), acts[: len(states)], moves[: len(states)]
            if chance > 0 and key not in {item[0] for item in found}:
                rew = [REW[s, a] for s, a in zip(states, acts)]
                found.append((key, states, list(acts[: len(states)]), rew, done, chance))
    return [item[1:] for item in found]


def probability(policy, trajectory):
    states, acts, _, _, chance = trajectory
    return chance * np.prod([policy[s, a] for s, a in zip(states, acts)])


@cache
def chances_under_b():
    """Of each of trajectories()."""
    return np.array([probability(B, item) for item in trajectories()])


def value(policy, right=tuple(RIGHT)):
    """By enumeration."""
    worth = lambda item: sum(GAMMA**t * r for t, r in enumerate(item[2]))
    return sum(probability(policy, item) * worth(item) for item in trajectories(right))


def q_values(policy, right=RIGHT, gamma=GAMMA, horizon=HORIZON):
    """By dynamic programming backwards in time: Q (HORIZON + 1, S + 1, A), V (HORIZON + 1, S + 1)."""
    q, v = np.zeros((horizon + 1, S + 1, A)), np.zeros((horizon + 1, S + 1))
    for t in reversed(range(horizon)):
        for s, a in itertools.product(range(S), range(A)):
            q[t, s, a] = REW[s, a] + gamma * (right[a] * v[t + 1, s + 1] + (1 - right[a]) * v[t + 1, s])
        v[t, :S] = (policy * q[t, :S]).sum(1)
    return q, v


def flat(found):
    """state (N,), act (N,), rew (N,), ends (E,) of a list of trajectories, one after the other."""
    columns = [np.concatenate([item[i] for item in found]) for i in range(3)]
    return *columns, np.cumsum([len(item[0]) for item in found])


def sample(number, rng):
    """Trajectories that B draws."""
    chances = chances_under_b()
    return [trajectories()[i] for i in rng.choice(len(chances), number, p=chances / chances.sum())]
