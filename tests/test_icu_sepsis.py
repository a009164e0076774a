"""ICU-Sepsis: exact values against those that its authors' README and paper's matrices give, and against sampling."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from datasets import UserError
from datasets.tasks import icu_sepsis
from datasets.tasks.icu_sepsis import (
    DEATH,
    LIVE,
    SURVIVAL,
    A,
    S,
    deterministic,
    load_mdp,
    soften,
    trajectories,
    uniform,
)

if importlib.util.find_spec("icu_sepsis") is None:
    pytest.skip("icu-sepsis is not installed: pip install --no-deps -r requirements-tasks.txt", allow_module_level=True)


def test_matrices():
    """They are what the module takes for granted: the package's rewards, terminal states, inadmissible actions."""
    mdp = load_mdp()
    folder = Path(importlib.util.find_spec("icu_sepsis").submodule_search_locations[0])
    rewards = np.load(folder / "envs" / "assets" / "dynamics.npz")["r_mat"]
    assert (rewards[:LIVE, :, SURVIVAL] == 1).all() and not np.delete(rewards, SURVIVAL, 2).any()
    np.testing.assert_allclose(mdp.transition.sum(2), 1, atol=1e-12)
    assert mdp.start[LIVE:].sum() == 0 and mdp.start.sum() == pytest.approx(1)
    assert (mdp.transition[LIVE:, :, S - 1] == 1).all()
    for state in range(0, LIVE, 50):
        mean = mdp.transition[state, mdp.admissible[state]].mean(0)
        np.testing.assert_allclose(mdp.transition[state, ~mdp.admissible[state]] - mean, 0, atol=1e-12)
    assert mdp.admissible[:LIVE].sum(1).max() == 13 and mdp.features.shape == (S, 47) and mdp.sofa.shape == (S,)


def test_known_values():
    """Survival and mean lengths, of the authors' README (.78, .78, .88; 9.45, 9.22, 10.99) and to more digits."""
    mdp, best, worst = load_mdp(), icu_sepsis.solve(), icu_sepsis.solve(worst=True)
    for policy, survival, length in (
        (uniform(), 0.78007, 9.462),
        (mdp.clinicians, 0.78184, 9.238),
        (best, 0.87514, 10.992),
        (worst, 0.63299, None),
        (deterministic(mdp.clinicians.argmax(1)), 0.78683, None),
        (icu_sepsis.solve(0.99), 0.86818, None),
    ):
        assert icu_sepsis.value(policy) == pytest.approx(survival, abs=1e-5)
        if length:
            assert icu_sepsis.visits(policy).sum() == pytest.approx(length, abs=1e-3)
    assert icu_sepsis.value(best) > icu_sepsis.value(soften(best, 0.1)) > icu_sepsis.value(soften(best, 0.2)) > 0.85
    np.testing.assert_allclose(soften(best, 1.0), uniform())


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_bellman(gamma):
    """q and v satisfy the Bellman equation, and start weighs v as visits weigh rewards. No action improves the best."""
    mdp, rng = load_mdp(), np.random.default_rng(0)
    policy = rng.dirichlet(np.ones(A), S)
    q, v = icu_sepsis.q_values(policy, gamma), icu_sepsis.state_values(policy, gamma)
    np.testing.assert_allclose((policy * q).sum(1), v, atol=1e-10)
    rewards = np.zeros(S)
    rewards[SURVIVAL] = 1
    for state, act in rng.integers((LIVE, A), size=(50, 2)):
        assert q[state, act] == pytest.approx(mdp.transition[state, act] @ (rewards + gamma * v), abs=1e-10)
    assert v[LIVE:].tolist() == [0, 0, 0] and not q[LIVE:].any()
    assert icu_sepsis.value(policy, gamma) == pytest.approx(mdp.start @ v, abs=1e-10)
    best = icu_sepsis.solve(gamma)
    assert (icu_sepsis.q_values(best, gamma).max(1) <= icu_sepsis.state_values(best, gamma) + 1e-9).all()


def test_trajectories():
    """Survival, lengths and each step's probabilities are the policy's and the matrices'; a seed repeats them."""
    mdp, number = load_mdp(), 20_000
    policy = soften(icu_sepsis.solve(), 0.3)
    logs = trajectories(policy, number, seed=1)
    starts = np.r_[0, logs.ends[:-1]]
    assert len(logs.ends) == number and logs.ends[-1] == len(logs.state)
    survival, length = icu_sepsis.value(policy), icu_sepsis.visits(policy).sum()
    assert abs(logs.rew.sum() / number - survival) < 4 * np.sqrt(survival * (1 - survival) / number)
    assert abs(np.diff(logs.ends).mean() / length - 1) < 0.03
    assert logs.done[logs.ends - 1].all() and logs.done.sum() == number
    np.testing.assert_array_equal(logs.rew, logs.next_state == SURVIVAL)
    assert set(logs.next_state[logs.done]) == {DEATH, SURVIVAL}
    inside = np.delete(np.arange(len(logs.state)), logs.ends - 1)
    np.testing.assert_array_equal(logs.state[inside + 1], logs.next_state[inside])
    # Counts are within five deviations of what they should be, and nothing impossible happens.
    for counts, p in (
        (np.bincount(logs.state[starts], minlength=S), mdp.start),
        (np.bincount(logs.act[logs.state == 5], minlength=A), policy[5]),
        (np.bincount(logs.next_state[(logs.state == 5) & (logs.act == 0)], minlength=S), mdp.transition[5, 0]),
    ):
        n = counts.sum()
        assert n > 100 and (np.abs(counts - n * p) <= 5 * np.sqrt(n * p) + 3 * (p > 0)).all()
    again, other = trajectories(policy, 50, seed=1), trajectories(policy, 50, seed=2)
    np.testing.assert_array_equal(again.state, trajectories(policy, 50, seed=1).state)
    assert again.state.tolist() != other.state.tolist()


def test_cut_after_the_longest_episode(monkeypatch):
    monkeypatch.setattr(icu_sepsis, "MAX_STEPS", 3)
    logs = trajectories(uniform(), 500, seed=0)
    lengths = np.diff(np.r_[0, logs.ends])
    assert lengths.max() == 3 and not logs.done[logs.ends - 1][lengths == 3].all() and logs.done.sum() < 500


def test_bad_input(monkeypatch):
    for policy in (uniform()[:, :24], uniform() * 2, uniform() - np.eye(A)[np.zeros(S, int)]):
        with pytest.raises(UserError, match=r"a table \(716, 25\) of probabilities"):
            icu_sepsis.value(policy)
    for state in (716, -1):
        with pytest.raises(UserError, match=f"states 0 to 715, and {state} is none"):
            icu_sepsis.observe([3, state])
    load_mdp.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps icu-sepsis==2.0.1"):
        load_mdp()


def test_observations():
    np.testing.assert_array_equal(icu_sepsis.observe([3, 5]).argmax(1), [3, 5])
    assert icu_sepsis.observe([3, 5]).sum() == 2 and icu_sepsis.observe([3, 5]).shape == (2, S)
    np.testing.assert_array_equal(icu_sepsis.observe([3, 5], "features"), load_mdp().features[[3, 5]])
