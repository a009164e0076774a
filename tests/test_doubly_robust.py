"""DR against the enumeration of a chain's trajectories: exact with the true Q, unbiased with either part wrong."""

import importlib.util

import chain
import numpy as np
import pytest
import torch
from test_importance_sampling import FOUND, logs, printed

from algorithms import doubly_robust, fqe, td3_bc
from algorithms.doubly_robust import (
    Args,
    cross_fitted,
    estimators,
    fit_q,
    from_counts,
    from_critic,
    pad,
    train,
    with_tail,
)
from datasets import Dataset, Task, UserError, collect_discrete, find_task, load
from datasets.collect import POLICIES
from datasets.tasks import icu_sepsis
from results.policies import Discrete, load_critics, load_policies, log_probs

CHANCES = chain.chances_under_b()[None]
TRUTH = chain.value(chain.PI)


def parts(found, q):
    """Of Q (time, S, A): q (E, T) of what was done, v (E, T + 1) under pi; the chain ends with its last step."""
    T = chain.HORIZON
    qs, vs = np.zeros((len(found), T)), np.zeros((len(found), T + 1))
    for i, (states, acts, *_) in enumerate(found):
        for t, (s, a) in enumerate(zip(states, acts)):
            qs[i, t], vs[i, t] = q[t, s, a], chain.PI[s] @ q[t, s]
    return qs, vs


def made(found, q, b=chain.B):
    log_w, rew = logs(found, b=b)
    return estimators(log_w, rew, *parts(found, q), chain.GAMMA)


TRUE_Q = chain.q_values(chain.PI)[0]
WRONG_Q = TRUE_Q + np.random.default_rng(0).normal(size=TRUE_Q.shape)
WRONG_B = np.array([[0.3, 0.7], [0.6, 0.4], [0.5, 0.5]])


def test_doubly_robust():
    """Weighed by their chances, all trajectories give the value of pi if Q is right, or the weights are, or both; with
    both wrong they do not."""
    for q, b, right in (
        (TRUE_Q, chain.B, True),
        (WRONG_Q, chain.B, True),
        (TRUE_Q, WRONG_B, True),
        (WRONG_Q, WRONG_B, False),
    ):
        value = made(FOUND, q, b)["DR"](CHANCES).item()
        assert (abs(value - TRUTH) < 1e-10) == right and (right or abs(value - TRUTH) > 0.01)
    assert made(FOUND, WRONG_Q)["WDR"](CHANCES).item() == pytest.approx(TRUTH, abs=1e-10)  # its limit
    assert made(FOUND, TRUE_Q)["DM"](CHANCES).item() == pytest.approx(TRUTH, abs=1e-10)
    assert abs(made(FOUND, WRONG_Q)["DM"](CHANCES).item() - TRUTH) > 0.1


def test_no_error_with_the_true_q():
    """Where the chain's moves are certain, each two trajectories give the very value, whatever the weights."""
    right = (0.0, 1.0)
    found, truth, q = chain.trajectories(right), chain.value(chain.PI, right), chain.q_values(chain.PI, right)[0]
    possible = [item for item in found if chain.probability(chain.PI, item) > 0]
    assert len(possible) > 3
    for item in possible:
        for name in ("DM", "DR", "WDR"):
            value = made([item, possible[0]], q)[name]().item()
            assert value == pytest.approx(truth, abs=1e-10), name
    assert abs(estimators(*logs(possible), *parts(possible, 0 * q), chain.GAMMA)["DR"]().item() - truth) > 0.1


def test_recursion():
    """Against Eq. 10 of Jiang & Li, backwards through each trajectory; weighted, against Thomas & Brunskill's sum."""
    found = chain.sample(9, np.random.default_rng(3))
    single, T, n = [], chain.HORIZON, len(found)
    w = np.ones((n, T + 1))  # w[:, t + 1] is W_t
    for i, (states, acts, rew, _, _) in enumerate(found):
        value = 0.0
        for t in reversed(range(len(states))):
            s, a = states[t], acts[t]
            rho = chain.PI[s, a] / chain.B[s, a]
            value = chain.PI[s] @ WRONG_Q[t, s] + rho * (rew[t] + chain.GAMMA * value - WRONG_Q[t, s, a])
            w[i, t + 1 :] *= rho
        single.append(value)
    both = made(found, WRONG_Q)
    assert both["DR"]().item() == pytest.approx(np.mean(single), abs=1e-12)
    share, total = w / w.sum(0), 0.0
    for i, (states, acts, rew, _, _) in enumerate(found):
        for t, (s, a) in enumerate(zip(states, acts)):
            model = share[i, t + 1] * WRONG_Q[t, s, a] - share[i, t] * chain.PI[s] @ WRONG_Q[t, s]
            total += chain.GAMMA**t * (share[i, t + 1] * rew[t] - model)
    assert both["WDR"]().item() == pytest.approx(total, abs=1e-12)


def transitions(number, seed=0):
    """Of B in the chain, never cut: state, act, rew, next_state, done (N,), ends (E,)."""
    rng, rows, ends = np.random.default_rng(seed), [], []
    for _ in range(number):
        state = 0
        while state < chain.S:
            act = int(rng.random() < chain.B[state, 1])
            after = state + (rng.random() < chain.RIGHT[act])
            rows.append((state, act, chain.REW[state, act], min(after, chain.S - 1), after == chain.S))
            state = after
        ends.append(len(rows))
    state, act, rew, next_state, done = (np.array(column) for column in zip(*rows))
    return state, act, rew, next_state, done, np.array(ends)


def test_fit_q():
    """Bellman's equation of the counted MDP, solved by iterating it; many transitions give the true Q."""
    *columns, _ = transitions(30)
    state, act, rew, next_state, done = columns
    q = fit_q(*columns, chain.PI, chain.GAMMA)
    expected = np.zeros((3, 2))
    for _ in range(600):
        v, new = (chain.PI * expected).sum(1), np.zeros((3, 2))
        for s in range(3):
            for a in range(2):
                new[s, a] = np.mean((rew + chain.GAMMA * ~done * v[next_state])[(state == s) & (act == a)])
        expected = new
    np.testing.assert_allclose(q, expected, atol=1e-10)
    true, _ = chain.q_values(chain.PI, horizon=400)
    *columns, _ = transitions(5_000)
    np.testing.assert_allclose(fit_q(*columns, chain.PI, chain.GAMMA), true[0, :3], atol=0.12)


def test_fit_q_of_what_was_not_seen():
    """An unseen action does what the state's others did; in an unseen state all do what all did."""
    state, act, rew = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), np.array([1.0, 3.0, 5.0, 7.0])
    q = fit_q(
        state, act, rew, np.array([1, 2, 1, 1]), np.array([False, False, True, True]), np.full((3, 3), 1 / 3), 0.5
    )
    v1 = 7.0  # state 1: one action seen, which ended
    v0 = lambda v2: (1 + v1 / 2 + 3 + v2 / 2) / 2 / 3 + 5 / 3 + (1 + v1 / 2 + 3 + v2 / 2 + 5) / 3 / 3
    v2 = (1 + v1 / 2 + 3 + 5 + 7) / 4 / (1 - 1 / 8)  # V(2) = mean(1 + V(1) / 2, 3 + V(2) / 2, 5, 7)
    np.testing.assert_allclose(q[1], [7, 7, 7])
    np.testing.assert_allclose(q[2], [v2] * 3)
    np.testing.assert_allclose(q[0], [(1 + v1 / 2 + 3 + v2 / 2) / 2, 5, (1 + v1 / 2 + 3 + v2 / 2 + 5) / 3])
    assert q[0].mean() == pytest.approx(v0(v2))


def dataset(number, cut=False):
    state, act, rew, next_state, done, ends = transitions(number)
    if cut:
        done[ends - 1] = False
    rows = np.column_stack([np.eye(3)[state], act, rew, np.eye(3)[next_state], done])
    return Dataset(Task("chain-logs"), "own", "", torch.tensor(rows, dtype=torch.float32), ends, 3, 1, 2)


def test_cross_fitted():
    """Each episode's Q comes from the episodes of the other parity."""
    data, policy = dataset(40), Discrete("pi", lambda obs: obs @ torch.tensor(chain.PI, dtype=torch.float32))
    *columns, ends = transitions(40)
    state, act, _, next_state, _ = columns
    q, v, next_v = from_counts(data, policy, 0.9)
    parity = np.repeat(np.arange(40), np.diff(ends, prepend=0)) % 2
    for half in (0, 1):
        table = fit_q(*(x[parity != half] for x in columns), chain.PI, 0.9)
        own = parity == half
        np.testing.assert_allclose(q[own], table[state, act][own], rtol=1e-5)
        np.testing.assert_allclose(v[own], (chain.PI * table).sum(1)[state[own]], rtol=1e-5)
        np.testing.assert_allclose(next_v[own], (chain.PI * table).sum(1)[next_state[own]], rtol=1e-5)


def test_tail():
    """What follows on a cut is V of the last next observation; on a termination nothing."""
    v = with_tail(np.arange(1.0, 6), np.arange(10.0, 15), np.array([0, 0, 0, 0, 1]), np.array([2, 5]))
    np.testing.assert_allclose(v, [[1, 2, 11, 0], [3, 4, 5, 0]])


def test_from_critic():
    """V is the mean of Q over sampled actions, of each block of rows."""
    data = dataset(10)
    policy = Discrete("pi", lambda obs: obs @ torch.tensor(chain.PI, dtype=torch.float32))
    q_function = lambda obs, act: obs @ torch.tensor([1.0, 2, 3]) + (act[:, 1] if act.ndim == 2 else act)
    q, v, next_v = from_critic(data, policy, q_function, 4000)
    state, act, _, next_state, _, _ = transitions(10)
    np.testing.assert_allclose(q, 1 + state + act)
    np.testing.assert_allclose(v, 1 + state + chain.PI[state, 1], atol=0.05)
    np.testing.assert_allclose(next_v, 1 + next_state + chain.PI[next_state, 1], atol=0.05)


@pytest.mark.parametrize("cut", [False, True])
def test_train(cut, monkeypatch, tmp_path, capsys):
    """What is printed are the estimates of the parts put together by hand."""
    monkeypatch.setattr(doubly_robust, "load", lambda *words, discrete: dataset(50, cut))
    np.save(tmp_path / "pi.npy", chain.PI)
    np.save(tmp_path / "b.npy", chain.B)
    words = {"behaviour": str(tmp_path / "b.npy"), "gamma": 0.9, "resamples": 300, "seed": 2}
    train(Args(policies=(str(tmp_path / "pi.npy"),), truncate=20.0, **words))
    rows = printed(capsys)
    state, act, rew, next_state, done, ends = transitions(50)
    policy = Discrete("pi", lambda obs: obs @ torch.tensor(chain.PI, dtype=torch.float32))
    q, v, next_v = from_counts(dataset(50, cut), policy, 0.9)
    with np.errstate(divide="ignore"):
        log_ratio = np.log(chain.PI[state, act]) - np.log(chain.B[state, act])
    log_w = np.minimum(pad(log_ratio, ends).cumsum(1), np.log(20))
    v = np.pad(pad(v, ends), ((0, 0), (0, 1)))
    if cut:
        v[np.arange(50), np.diff(ends, prepend=0)] = next_v[ends - 1]
    all_of_them = estimators(log_w, pad(rew, ends), pad(q, ends), v, 0.9)
    assert list(rows) == ["DM", "DR", "WDR"] == list(all_of_them)
    for name, estimator in all_of_them.items():
        assert rows[name][0] == pytest.approx(estimator().item(), rel=1e-3), name
        ends_ = doubly_robust.interval(estimator, 50, 300, np.random.default_rng(2))
        np.testing.assert_allclose(rows[name][1:], ends_, rtol=2e-3)


def test_estimators_without_a_result(monkeypatch, tmp_path, capsys):
    """Each says why; and whose estimates they are."""

    def failing(*words):
        raise UserError("It overflows.")

    monkeypatch.setattr(doubly_robust, "load", lambda *words, **options: dataset(50))
    monkeypatch.setattr(doubly_robust, "interval", failing)
    np.save(tmp_path / "pi.npy", chain.PI)
    train(Args(policies=(str(tmp_path / "pi.npy"),), truncate=1.0))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", str(tmp_path / "pi.npy")] and "(of DM, without its bias)" in lines[2]
    assert [line.split() for line in lines[3:]] == [[name, "none", "It", "overflows."] for name in ("DM", "DR", "WDR")]


def test_continuous(collected, tmp_path, capsys):
    """With FQE's critic: the estimates of the parts put together by hand, V over --samples actions by --seed."""
    common = dict(eval_every=3, batch_size=8, device="cpu")
    td3_bc.train(td3_bc.Args(str(collected), steps=3, eval_episodes=1, **common))
    policy = str(next((tmp_path / "runs" / "td3_bc").rglob("checkpoint.pt")))
    fqe.train(fqe.Args((policy,), str(collected), steps=3, noise=True, std=0.3, **common))
    critic = str(next((tmp_path / "runs" / "fqe").rglob("checkpoint.pt")))
    medium = str(POLICIES / "hopper-0105000.npz")
    words = dict(critic=critic, behaviour=medium, truncate=5.0, resamples=20, samples=3, seed=4)
    capsys.readouterr()
    train(Args(str(collected), **words))
    rows = printed(capsys)
    torch.manual_seed(4)  # networks that are loaded draw, too, before they are filled
    data = load(str(collected), discrete=None)
    ((policy,), (q_function,)) = load_critics(critic, data)
    log_b = log_probs(*load_policies([medium], data), data)
    log_w = doubly_robust.log_weights(log_probs(policy, data), log_b, data.ends, 5.0)
    q, v, next_v = from_critic(data, policy, q_function, 3)
    v = with_tail(v, next_v, data.done.numpy() > 0, data.ends)
    expected = estimators(log_w, pad(data.rew.numpy(), data.ends), pad(q, data.ends), v, 0.99)
    assert list(rows) == list(expected)
    for name, estimator in expected.items():
        assert rows[name][0] == pytest.approx(estimator().item(), rel=1e-3), name


def test_no_critic(collected):
    with pytest.raises(UserError, match="Where actions are continuous Q must be learned: fqe.py does"):
        train(Args(str(collected)))


@pytest.mark.skipif(importlib.util.find_spec("icu_sepsis") is None, reason="icu-sepsis is not installed")
def test_states_that_are_looked_up(tmp_path, monkeypatch, capsys):
    """ICU-Sepsis, whose rows have the numbers of states: the same as of its trajectories; FQE's truth is the exact
    value of the probabilities."""
    task = find_task("icu-sepsis-clinicians")
    monkeypatch.setattr(collect_discrete, "SIZES", {task.name: 3_000})
    data = collect_discrete.collect(task, collect_discrete.plan(task), "x")
    table = icu_sepsis.soften(icu_sepsis.load_mdp().clinicians, 0.3)
    np.save(tmp_path / "pi.npy", table)
    (policy,) = load_policies([tmp_path / "pi.npy"], data)
    state, act, rew, next_state, done = (column.numpy().ravel().astype(int) for column in data.split(data.rows))
    np.testing.assert_allclose(log_probs(policy, data), np.log(table[state, act]), rtol=1e-4)
    expected = cross_fitted(state, act, rew, next_state, done > 0, data.ends, table, 0.9)
    np.testing.assert_allclose(from_counts(data, policy, 0.9)[:, :500], expected[:, :500], atol=0.03)
    monkeypatch.setattr(fqe, "load", lambda *words: data)
    fqe.train(fqe.Args((str(tmp_path / "pi.npy"),), steps=2, eval_every=2, batch_size=8, truth=1))
    truth = float(capsys.readouterr().out.split("in the environment: ")[1].split()[0])
    assert truth == pytest.approx(icu_sepsis.value(table, 0.99), rel=1e-3)


@pytest.mark.parametrize("truncate", [-1.0, 0.0])
def test_truncation_must_be_above_0(truncate):
    with pytest.raises(UserError, match=f"--truncate must be above 0, not {truncate}"):
        train(Args(truncate=truncate))
