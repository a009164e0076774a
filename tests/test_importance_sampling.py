"""Importance sampling against the enumeration of a chain's trajectories, plain loops, and bad input."""

import dataclasses
import time

import chain
import numpy as np
import pytest
import torch

from algorithms import importance_sampling, td3_bc
from algorithms.importance_sampling import (
    Args,
    effective_sample_size,
    estimate,
    estimators,
    interval,
    log_weights,
    pad,
    train,
)
from datasets import Dataset, Task, UserError
from datasets.collect import POLICIES
from results.policies import load_policies, log_probs

FOUND = chain.trajectories()


def logs(found, truncate=np.inf, pi=chain.PI, b=chain.B):
    """log_w and rew, (E, T), of trajectories."""
    state, act, rew, ends = chain.flat(found)
    with np.errstate(divide="ignore"):
        return log_weights(np.log(pi[state, act]), np.log(b[state, act]), ends, truncate), pad(rew, ends)


def by_hand(found, kind, truncate=np.inf):
    """An estimate by the papers' sums, one trajectory after the other."""
    T, ratios, rews = max(len(item[0]) for item in found), [], []
    for states, acts, rew, _, _ in found:
        w, own = 1.0, []
        for s, a in zip(states, acts):
            w *= chain.PI[s, a] / chain.B[s, a]
            own.append(min(w, truncate))
        ratios.append(own + [own[-1]] * (T - len(own)))
        rews.append(list(rew) + [0.0] * (T - len(rew)))
    g, n = [chain.GAMMA**t for t in range(T)], len(found)
    if kind in ("IS", "WIS"):
        norm = n if kind == "IS" else sum(w[-1] for w in ratios)
        return sum(w[-1] * sum(x * y for x, y in zip(g, r)) for w, r in zip(ratios, rews)) / norm
    total = 0
    for t in range(T):
        norm = n if kind == "PDIS" else sum(w[t] for w in ratios)
        total += g[t] * sum(w[t] * r[t] for w, r in zip(ratios, rews)) / norm
    return total


def test_all_trajectories():
    """Weighed by their probabilities under b, all trajectories give IS's and PDIS's expectation: the value of pi. The
    weighted estimators, which are biased, have it as their limit."""
    chances = chain.chances_under_b()[None]
    assert chances.sum() == pytest.approx(1, abs=1e-12)
    truth, both = chain.value(chain.PI), estimators(*logs(FOUND), chain.GAMMA)
    assert truth == pytest.approx(chain.q_values(chain.PI)[1][0, 0], abs=1e-12)
    for name, estimator in both.items():
        assert estimator(chances) == pytest.approx(truth, abs=1e-10), name
    twice = [FOUND[i] for i in (5, 17)]  # an estimate from two is the mean of those from each
    for name in ("IS", "PDIS"):
        one = [estimators(*logs([item] * 2), chain.GAMMA)[name]().item() for item in twice]
        assert estimators(*logs(twice), chain.GAMMA)[name]() == pytest.approx(np.mean(one), abs=1e-12)


@pytest.mark.parametrize("truncate", [np.inf, 1.5])
def test_against_loops(truncate):
    """Also of resamples, which counts stand for."""
    rng = np.random.default_rng(0)
    all_of_them = chain.sample(12, rng)
    counts = rng.multinomial(12, np.full(12, 1 / 12), 3)
    for name, estimator in estimators(*logs(all_of_them, truncate), chain.GAMMA).items():
        assert estimator() == pytest.approx(by_hand(all_of_them, name, truncate), abs=1e-12)
        for count, value in zip(counts, estimator(counts)):
            again = [item for item, n in zip(all_of_them, count) for _ in range(n)]
            assert value == pytest.approx(by_hand(again, name, truncate), abs=1e-12), name


def test_truncation_trades_bias_for_variance():
    chances = chain.chances_under_b()[None]
    truth, spreads, biases = chain.value(chain.PI), [], []
    for truncate in (np.inf, 3.0, 1.0):
        log_w, rew = logs(FOUND, truncate)
        each = np.exp(log_w[:, -1]) * (rew @ chain.GAMMA ** np.arange(4))
        mean = (chances @ each).item()
        biases.append(abs(mean - truth))
        spreads.append((chances @ (each - mean) ** 2).item())
    assert biases[0] < 1e-10 < biases[1] < biases[2] and spreads[0] > spreads[1] > spreads[2]


def test_intervals_cover():
    """95 % intervals of 300 trajectories hold the truth in 90 to 98 %, of a policy whose weights stay below 20; of one
    with larger weights, as chain.PI, they hold it less often: few of the largest are in the data."""
    rng, near = np.random.default_rng(1), (chain.PI + chain.B) / 2
    truth, held = chain.value(near), {"IS": 0, "WIS": 0, "PDIS": 0, "WPDIS": 0}
    assert np.exp(logs(FOUND, pi=near)[0]).max() < 20 < np.exp(logs(FOUND)[0]).max()
    for _ in range(150):
        all_of_them = estimators(*logs(chain.sample(300, rng), pi=near), chain.GAMMA)
        for name in held:
            low, high = interval(all_of_them[name], 300, 200, rng)
            held[name] += low <= truth <= high
    assert all(0.9 <= count / 150 <= 0.98 for count in held.values()), held


def test_effective_sample_size():
    with np.errstate(divide="ignore"):
        log_w = np.log([[1.0, 1, 4, 0], [1, 3, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_allclose(effective_sample_size(log_w), [3, 1.6, 1, 0])
    log_w, _ = logs(FOUND)
    w = np.exp(log_w)
    np.testing.assert_allclose(effective_sample_size(log_w), w.sum(0) ** 2 / (w**2).sum(0))
    np.testing.assert_allclose(effective_sample_size(log_w + 1000), effective_sample_size(log_w))


def test_no_silent_infinity():
    """Weights of e^900 over 1,000 steps: the weighted estimators stand, the others say why they do not."""
    rng = np.random.default_rng(0)
    log_w, rew = np.cumsum(rng.normal(0.9, 1.0, (50, 1000)), 1), rng.random((50, 1000))
    both = estimators(log_w, rew, 0.99)
    for name in ("IS", "PDIS"):
        with pytest.raises(UserError, match=r"The largest weight, e\^\d+, overflows: use WIS or WPDIS, or --truncate"):
            both[name]()
    for name in ("WIS", "WPDIS"):
        assert 0 < both[name]().item() < 100 and np.isfinite(interval(both[name], 50, 50, rng)).all()
        shifted = estimators(log_w - 2000, rew, 0.99)[name]()  # weights that would all be 0
        assert shifted == pytest.approx(both[name](), rel=1e-9)
    truncated = estimators(np.minimum(log_w, np.log(10)), rew, 0.99)
    assert all(np.isfinite(estimator()) for estimator in truncated.values())


def test_bad_weights():
    never = np.log(np.array([0.5, 0.5, 0.2]))
    for ends, log_b, message in (
        ([3], never, "One trajectory has no variance"),
        ([1, 3], np.array([0, 0, -np.inf]), "The behaviour policy gives probability 0 to 1 logged actions"),
    ):
        with pytest.raises(UserError, match=message):
            log_weights(never, log_b, np.array(ends))
    log_w = log_weights(np.array([0, -np.inf, 0, -np.inf]), np.zeros(4), np.array([2, 4]))
    with pytest.raises(UserError, match="From step 2 on no logged episode is possible under the policy"):
        estimate(log_w, np.ones((2, 2)), np.ones(2), True)


@pytest.mark.parametrize("size", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_speed(size):
    """All estimators on 10,000 trajectories of 1,000 steps within 10 s, a tenth of them in a tenth of that."""
    rng = np.random.default_rng(0)
    log_pi, log_b = rng.normal(-1, 0.05, (2, size * 1000))
    rew, start = rng.random(size * 1000), time.process_time()
    ends = np.arange(1, size + 1) * 1000
    log_w = log_weights(log_pi, log_b, ends)
    for estimator in estimators(log_w, pad(rew, ends), 0.99).values():
        assert np.isfinite(estimator())
    assert np.isfinite(effective_sample_size(log_w)).all()
    assert time.process_time() - start < size / 1000


@pytest.fixture
def discrete(monkeypatch, tmp_path):
    """train() on 60 episodes of the chain, seen as one-hot states; tables pi.npy and b.npy."""
    picked = chain.sample(60, np.random.default_rng(0))
    state, act, rew, ends = chain.flat(picked)
    next_state = np.append(state[1:], 0)
    done = np.zeros(len(state), bool)
    done[ends - 1] = [item[3] for item in picked]
    obs, next_obs = np.eye(chain.S)[state], np.eye(chain.S)[next_state]
    rows = torch.tensor(np.column_stack([obs, act, rew, next_obs, done]), dtype=torch.float32)
    task = Task("chain-logs")
    load = lambda *words, discrete: Dataset(task, "own", "", rows.clone(), ends, chain.S, 1, chain.A)
    monkeypatch.setattr(importance_sampling, "load", load)
    np.save(tmp_path / "pi.npy", chain.PI)
    np.save(tmp_path / "b.npy", chain.B)
    return picked


def printed(capsys):
    """{estimator: (estimate, low, high)} of what was printed last."""
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {row[0]: (float(row[1]), float(row[2]), float(row[4])) for row in words if len(row) == 5 and row[3] == "to"}


def test_train(discrete, tmp_path, capsys):
    args = Args(
        (str(tmp_path / "pi.npy"),), behaviour=str(tmp_path / "b.npy"), gamma=chain.GAMMA, resamples=500, seed=3
    )
    train(args)
    shown = capsys.readouterr().out
    print(shown)
    mean = np.mean([sum(chain.GAMMA**t * r for t, r in enumerate(item[2])) for item in discrete])
    assert f"Discounted return of the data: {mean:.4g}\n\n{args.policies[0]}\n" in shown
    rows = printed(capsys)
    assert list(rows) == ["IS", "WIS", "PDIS", "WPDIS"]
    all_of_them = estimators(*logs(discrete), chain.GAMMA)
    for name, (value, low, high) in rows.items():
        assert value == pytest.approx(by_hand(discrete, name), rel=1e-3)
        ends = interval(all_of_them[name], 60, 500, np.random.default_rng(3))
        np.testing.assert_allclose((low, high), ends, rtol=1e-3)
    with pytest.raises(UserError, match="--truncate must be above 0, not 0"):
        train(dataclasses.replace(args, truncate=0.0))
    args.truncate = 1.5
    train(args)
    assert all(
        value[0] == pytest.approx(by_hand(discrete, name, 1.5), rel=1e-3) for name, value in printed(capsys).items()
    )


def test_estimators_without_a_result(discrete, tmp_path, monkeypatch, capsys):
    """Each says why, and the others go on."""

    def failing(log_w, rew, discount, weighted, counts=None):
        if not weighted:
            raise UserError("It overflows.")
        return estimate(log_w, rew, discount, weighted, counts)

    monkeypatch.setattr(importance_sampling, "estimate", failing)
    train(Args((str(tmp_path / "pi.npy"),), resamples=10))
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.endswith("none   It overflows.")] == ["IS", "PDIS"]
    print(shown)
    assert list(printed(capsys)) == ["WIS", "WPDIS"]


def test_estimated_behaviour(discrete, tmp_path, capsys):
    """Counted in the data themselves."""
    train(Args((str(tmp_path / "pi.npy"),), gamma=chain.GAMMA, resamples=10))
    shown = capsys.readouterr().out
    state, act, _, _ = chain.flat(discrete)
    counted = np.array([[np.sum((state == s) & (act == a)) for a in range(2)] for s in range(3)])
    log_w, rew = logs(discrete, b=counted / counted.sum(1, keepdims=True))
    for name, estimator in estimators(log_w, rew, chain.GAMMA).items():
        (value,) = (float(line.split()[1]) for line in shown.splitlines() if line.split()[:1] == [name])
        assert value == pytest.approx(estimator().item(), rel=1e-3)
    sizes = [line.split() for line in shown.split("deviation of log W\n")[1].splitlines()]
    assert [row[0] for row in sizes] == ["1", "2", "4"]
    size = effective_sample_size(log_w)
    assert [float(row[1]) for row in sizes] == pytest.approx([size[0], size[1], size[3]], abs=0.06)


def test_observations_that_do_not_recur():
    rows = torch.randn(50, 9)
    rows[:, 3] = 1
    data = Dataset(Task("chain-logs"), "own", "", rows, [20, 50], 3, 1, 2)
    with pytest.raises(UserError, match="Observations hardly recur, .* name --behaviour"):
        importance_sampling.estimated(data, Args(()))


def test_continuous(collected, capsys):
    """The weights of the policy that collected the data are 1. Estimated from them, it comes near."""
    medium = str(POLICIES / "hopper-0105000.npz")
    train(Args((medium,), str(collected), behaviour=medium, resamples=20))
    data = importance_sampling.load(str(collected), discrete=None)
    rew = pad(data.rew.numpy(), data.ends)
    mean = (rew @ 0.99 ** np.arange(rew.shape[1])).mean()
    shown = capsys.readouterr().out
    print(shown)
    rows, T = printed(capsys), rew.shape[1]
    firsts = [line.split()[0] for line in shown.split("deviation of log W\n")[1].splitlines()]
    steps = [int(first) for first in firsts if first.isdigit()]
    assert steps == [2**k for k in range(20) if 2**k < T] + [T]
    assert len(rows) == 4 and all(value[0] == pytest.approx(mean, rel=1e-3) for value in rows.values())
    (policy,) = load_policies([medium], data)

    def divergence(steps):
        torch.manual_seed(0)
        return (log_probs(policy, data) - importance_sampling.estimated(data, Args((), steps=steps, lr=3e-3))).mean()

    assert 0 < divergence(200) < 1 < divergence(1)


def test_deterministic(collected, tmp_path, capsys):
    """With noise of --std it has a density, as whoever acted and as what is valued: then all weights are 1."""
    td3_bc.train(td3_bc.Args(str(collected), steps=2, eval_every=2, eval_episodes=1, batch_size=8, device="cpu"))
    checkpoint = str(next(tmp_path.rglob("checkpoint.pt")))
    train(Args((checkpoint,), str(collected), behaviour=checkpoint, std=0.3, truncate=1.0, resamples=20))
    capsys.readouterr()
    train(Args((checkpoint,), str(collected), behaviour=checkpoint, std=0.3, resamples=20))
    data = importance_sampling.load(str(collected), discrete=None)
    rew = pad(data.rew.numpy(), data.ends)
    mean = (rew @ 0.99 ** np.arange(rew.shape[1])).mean()
    assert all(value[0] == pytest.approx(mean, rel=1e-3) for value in printed(capsys).values())


def test_seed(collected, monkeypatch, capsys):
    """The estimated behaviour policy, and so all that is printed, goes by the seed."""
    shown, seeds, estimated = [], [], importance_sampling.estimated
    monkeypatch.setattr(
        importance_sampling, "estimated", lambda *w: seeds.append(torch.initial_seed()) or estimated(*w)
    )
    for seed in (3, 3, 1):
        train(Args((str(POLICIES / "hopper-0105000.npz"),), str(collected), seed=seed, steps=3, resamples=5))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2] and seeds == [3, 3, 1]


@pytest.mark.parametrize("truncate", [-1.0, 0.0])
def test_truncation_must_be_above_0(truncate):
    with pytest.raises(UserError, match=f"--truncate must be above 0, not {truncate}"):
        train(Args((), truncate=truncate))
