"""FQE's whole update against the paper's (arXiv:1903.08738, Algorithm 3) with Deep OPE's network and optimiser."""

import dataclasses
import re

import chain
import h5py
import numpy as np
import pytest
import torch
from test_doubly_robust import dataset
from test_scripts import arguments, assert_equal, checkpoint_of, stopped, trained
from update import Adam, assert_same, columns, episodes, leaves, mlp, polyak, table, trace

from algorithms import awac, doubly_robust, fqe, offline_sac, td3_bc
from datasets import Dataset, Task, UserError
from datasets.collect import POLICIES
from results.checkpoint import load_agent, load_checkpoint
from results.policies import load_critics, load_policies

SNAPSHOT = str(POLICIES / "hopper-0105000.npz")


def checkpoint(script, small, folder, monkeypatch, **words):
    """Of 10 updates, in a folder of its own."""
    trained(folder, monkeypatch, script.__name__, (script.train, arguments(script, small, steps=10, **words)))
    return str(checkpoint_of(folder / script.__name__))


@pytest.fixture(scope="module")
def policies(small, tmp_path_factory):
    """One deterministic, one squashed, one plain Gaussian."""
    folder = tmp_path_factory.mktemp("policies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "evaluate", lambda data, *words, **options: np.zeros(1))
        return [checkpoint(script, small, folder, patch) for script in (td3_bc, offline_sac, awac)]


def args_of(policies, small, **changes):
    return fqe.Args(tuple(policies), str(small), **{"eval_every": 10} | changes)


def discounted(rew, gamma):
    return sum(gamma**t * r for t, r in enumerate(rew.tolist()))


@pytest.mark.parametrize("number", [1, 2])
def test_update(number, policies, small, monkeypatch):
    """Eight steps with other values than the defaults: next actions are the policies', targets are held within what
    rewards allow, rewards are scaled by the largest return; the estimate is the target network's at the starts."""
    paths = [policies[0], SNAPSHOT][:number]
    gamma, changes = 0.9, dict(lr=1e-3, tau=0.1, weight_decay=0.3, batch_size=16, steps=8, noise=True, eval_every=8)
    args = args_of(paths, small, gamma=gamma, std=0.3, **changes)
    reports, report = [], fqe.Run.report
    monkeypatch.setattr(
        fqe.Run, "report", lambda run, *words, **more: (reports.append(more), report(run, *words, **more))
    )
    bounds, seen = fqe.value_bounds, []
    monkeypatch.setattr(fqe, "value_bounds", lambda *words: seen.append(bounds(*words)) or (0.0, 0.02))
    traced = trace(fqe, monkeypatch, args)

    obs, act, rew, next_obs, done = columns(small)
    scale = max(abs(discounted(rew[rows], gamma)) for rows in episodes(small))
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    normalized = lambda x: (x - mean) / std
    expected = table(normalized(obs), act, rew / scale, normalized(next_obs), done)
    torch.testing.assert_close(traced.rows, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(seen[0], (0, rew.max() / scale / (1 - gamma)), rtol=1e-6)

    saved, draws = load_checkpoint(policies[0]), iter(traced.random)
    snapshot = [torch.from_numpy(x.astype(np.float64)) for x in np.load(SNAPSHOT).values()]
    td3 = {key: x.double() for key, x in saved["state"]["actor"].items()}

    def action(k, obs, noise):
        if k == 0:
            return (mlp(td3, (obs - saved["obs_mean"]) / saved["obs_std"]).tanh() + 0.3 * noise).clamp(-1, 1)
        out = mlp(dict(enumerate(snapshot)), obs)
        u, log_std = out.chunk(2, -1)
        return (u + log_std.clamp(-20, 2).exp() * noise).tanh()

    alone = lambda state, k: {key: x[k] if number > 1 else x for key, x in state.items()}
    critics = [leaves(alone(traced.start["critic"], k)) for k in range(number)]
    targets = [leaves(alone(traced.start["critic_target"], k)) for k in range(number)]
    opts = [Adam(critic, 1e-3, decay=0.3) for critic in critics]
    assert len(traced.batches) == 8
    for batch in traced.batches:
        assert batch.obs.shape == ((16, 11) if number == 1 else (2, 16, 11))
        for k in range(number):
            own = batch if number == 1 else type(batch)(*(column[k] for column in batch))
            noise = next(draws)[1]
            next_act = action(k, own.next_obs * std + mean, noise)
            next_q = mlp(targets[k], torch.cat([own.next_obs, next_act], -1))[:, 0]
            target = (own.rew + gamma * (1 - own.done) * next_q).clamp(0, 0.02).detach()
            q = mlp(critics[k], torch.cat([own.obs, own.act], -1))[:, 0]
            opts[k].step(((q - target) ** 2).mean())
        for k in range(number):
            polyak(targets[k], critics[k], 0.1)
    for k in range(number):
        for state, params in (("critic", critics[k]), ("critic_target", targets[k])):
            assert_same(params, alone(traced.end[state], k), state)
    starts = normalized(obs[[rows.start for rows in episodes(small)]])
    for k in range(number):
        q = mlp(targets[k], torch.cat([starts, action(k, starts * std + mean, next(draws)[1])], -1))
        assert reports[-1]["estimate"][k].item() == pytest.approx(scale * q.mean().item(), rel=1e-9)


def test_value_bounds():
    rew = torch.tensor([0.5, 2.0])
    assert fqe.value_bounds(rew, 0.9) == pytest.approx((0, 20))
    assert fqe.value_bounds(rew - 1, 0.9) == pytest.approx((-5, 10))
    assert fqe.value_bounds(-rew, 0.5) == pytest.approx((-4, 0))
    assert fqe.value_bounds(rew, 1) == (-np.inf, np.inf)


def test_resume(policies, small, tmp_path, monkeypatch):
    """20 updates are 10, a stop, and 10 more; the critic that is read back is the one that estimated."""
    args = args_of(policies, small, steps=20, batch_size=32)
    whole = trained(tmp_path, monkeypatch, "whole", (fqe.train, args))
    first, second = (stopped(fqe.train, 10), args), (fqe.train, dataclasses.replace(args, resume=True))
    parts = trained(tmp_path, monkeypatch, "parts", first, second)
    for saved in (whole, parts):
        del saved["args"], saved["seconds"], saved["eval_seconds"]
    assert_equal(whole, parts)
    data = fqe.load(str(small))
    loaded, critics = load_critics_without_noise(checkpoint_of(tmp_path / "parts"), data)
    starts = data.obs[np.r_[0, data.ends[:-1]]]
    values = [q(starts, pi.act(starts, False)).mean().item() for pi, q in zip(loaded, critics)]
    np.testing.assert_allclose(whole["curve"][-1]["losses"]["estimate"], values, rtol=1e-4)
    with pytest.raises(UserError, match="with other arguments: policies was"):
        fqe.train(args_of(policies[::-1], small, steps=30, batch_size=32, resume=True))


def load_critics_without_noise(path, data):
    with pytest.raises(UserError, match="values the mean action of .*, not its distribution: train it with --noise"):
        load_critics(path, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("results.policies.Gaussian.has_noise", False)
        load = lambda *words: [dataclasses.replace(pi, has_noise=False) for pi in load_policies(*words)]
        patch.setattr("results.policies.load_policies", load)
        return load_critics(path, data)


def test_truth(policies, small, tmp_path, monkeypatch, capsys):
    """What is printed: the mean of Q at the starts, its interval by bootstrap, and with --truth each policy's
    discounted return from the task's start states."""
    args = args_of(policies[:2], small, steps=10, truth=2, gamma=0.9, seed=4)
    trained(tmp_path, monkeypatch, "truth", (fqe.train, args))
    lines, rng = capsys.readouterr().out.strip().splitlines()[-4:], np.random.default_rng(4)
    data = fqe.load(str(small))
    starts = data.obs[np.r_[0, data.ends[:-1]]]
    loaded, critics = load_critics_without_noise(checkpoint_of(tmp_path / "truth"), data)
    for k, (path, pi, q) in enumerate(zip(policies, loaded, critics)):
        own = q(starts, pi.act(starts, False)).double().numpy()
        means = own[rng.integers(len(own), size=(1000, len(own)))].mean(1)
        words = re.fullmatch(r": (\S+), 95 % interval (\S+) to (\S+)", lines[k].removeprefix(path)).groups()
        value, low, high = map(float, words)
        np.testing.assert_allclose((value, low, high), (own.mean(), *np.quantile(means, (0.025, 0.975))), rtol=2e-3)
        assert lines[k].startswith(path)
        _, _, data_of_agent, policy = load_agent(path)
        returns, words = (
            data_of_agent.evaluate(policy, 2, 4 + k, gamma=0.9),
            lines[2 + k].split(" in the environment: "),
        )
        value, error = (float(word) for word in words[1].split(" ± "))
        assert words[0] == path and value == pytest.approx(returns.mean(), rel=1e-3)
        assert error == pytest.approx(returns.std() / np.sqrt(2), rel=0.06)


def test_truth_of_data_without_environment(small, policies, tmp_path):
    """Asked before the training, not after it."""
    with h5py.File(small) as file, h5py.File(tmp_path / "hopper.hdf5", "w") as own:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            own[key] = file[key][:]
    with pytest.raises(UserError, match="cannot be evaluated: no environment is known"):
        fqe.train(fqe.Args((policies[0],), str(tmp_path / "hopper.hdf5"), steps=2, truth=1))


def test_share(small, policies, monkeypatch):
    """Some of the episodes, drawn at random and the same again for the same seed."""
    seen = []
    monkeypatch.setattr(fqe.Run, "steps", lambda run, data, **state: seen.append(data) or [])
    for seed in (0, 0, 1):
        fqe.train(args_of(policies[:1], small, share=0.2, seed=seed))
    whole = fqe.load(str(small))
    assert all(len(data.ends) == int(0.2 * len(whole.ends)) for data in seen)
    assert torch.equal(seen[0].rows, seen[1].rows) and seen[0].rows.shape != seen[2].rows.shape
    for share in (0.9, 1e-6):
        fqe.train(args_of(policies[:1], small, share=share))
    assert (
        len(seen[-2].rows.unique(dim=0)) == len(seen[-2].rows) and len(seen[-1].ends) == 1
    )  # none twice; one at least
    with pytest.raises(UserError, match=r"--share must lie in \(0, 1\], not 2"):
        fqe.train(args_of(policies[:1], small, share=2.0))


def test_learns_the_chain(monkeypatch, tmp_path, capsys):
    """The value of a table of probabilities, from the chain's transitions."""
    np.save(tmp_path / "pi.npy", chain.PI)
    monkeypatch.setattr(fqe, "load", lambda *words: dataset(400))
    words = dict(steps=800, lr=3e-3, tau=0.05, gamma=0.9, batch_size=64, eval_every=800)
    fqe.train(fqe.Args((str(tmp_path / "pi.npy"),), **words))
    value = float(capsys.readouterr().out.split("pi.npy: ")[1].split(",")[0])
    assert value == pytest.approx(chain.q_values(chain.PI, horizon=400)[1][0, 0], rel=0.1)


def test_doubly_robust_with_a_critic(small, tmp_path, monkeypatch, capsys):
    """Where the policy is the one that acted, all weights are 1: DR is the mean of V(start) and what it left out."""
    args = args_of([SNAPSHOT], small, steps=10, noise=True)
    trained(tmp_path, monkeypatch, "critic", (fqe.train, args))
    path = str(checkpoint_of(tmp_path / "critic"))
    words = dict(critic=path, behaviour=SNAPSHOT, samples=2, resamples=20, seed=5, gamma=0.9)
    capsys.readouterr()
    doubly_robust.train(doubly_robust.Args(str(small), **words))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = {words[0]: float(words[1]) for words in lines if words[:1] in (["DM"], ["DR"], ["WDR"])}
    torch.manual_seed(5)
    data = fqe.load(str(small))
    (policy,), (critic,) = load_critics(path, data)
    q, v, next_v = doubly_robust.from_critic(data, policy, critic, 2)
    totals, starts = [], []
    for rows in episodes(small):
        discount = 0.9 ** np.arange(rows.stop - rows.start)
        left = data.rew[rows].numpy() - q[rows] + v[rows]
        tail = 0.9 * discount[-1] * next_v[rows.stop - 1] * (1 - data.done[rows.stop - 1].item())
        totals.append(discount @ left + tail)
        starts.append(v[rows.start])
    assert printed["DM"] == pytest.approx(np.mean(starts), rel=1e-3)
    assert printed["DR"] == printed["WDR"] == pytest.approx(np.mean(totals), rel=1e-3)


def test_discrete(monkeypatch, tmp_path):
    """What an environment is given are the indices of each policy's actions; states are not normalized, and rewards of
    0 have no largest return to be divided by."""
    np.save(tmp_path / "pi.npy", np.array([[0.0, 1], [1, 0], [0, 1]]))
    np.save(tmp_path / "b.npy", np.array([[1.0, 0], [1, 0], [1, 0]]))
    data, played = dataset(20), []
    data.rew[:] = 0
    monkeypatch.setattr(fqe, "load", lambda *words: data)
    monkeypatch.setattr(Task, "make_env", lambda task: None)

    def evaluate(data, play, episodes, seed, seeds, gamma):
        played.append(play(torch.eye(3).expand(seeds, 3, 3)))
        return np.zeros((seeds, episodes))

    monkeypatch.setattr(Dataset, "evaluate", evaluate)
    paths = str(tmp_path / "pi.npy"), str(tmp_path / "b.npy")
    fqe.train(fqe.Args(paths, steps=2, eval_every=2, batch_size=4, truth=1))
    assert played[0].tolist() == [[1, 0, 1], [0, 0, 0]]
    saved = load_checkpoint(checkpoint_of(tmp_path))
    assert saved["obs_std"].eq(1).all() and saved["obs_mean"].eq(0).all()
    assert saved["state"]["scale"].item() == pytest.approx(1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_densities(k, policies, small):
    """A checkpoint's log density is the script's own of the actions that it samples; of the mean, what it evaluates."""
    data = fqe.load(str(small))
    (policy,) = load_policies([policies[k]], data)
    saved, script, _, mean = load_agent(policies[k])
    obs = data.obs[:50]
    normalized = (obs - saved["obs_mean"]) / saved["obs_std"]
    assert torch.equal(policy.act(obs, False), mean(normalized).clamp(-1, 1))
    actor = script.Actor(11, 3)
    actor.load_state_dict(saved["state"]["actor"])
    torch.manual_seed(0)
    if k == 1:
        act, log_prob = actor(normalized)
    else:
        mu, log_std = actor(normalized)
        act = mu + log_std.exp() * torch.randn_like(mu)
        log_prob = torch.distributions.Normal(mu, log_std.exp()).log_prob(act).sum(-1)
    torch.manual_seed(0)
    torch.testing.assert_close(policy.act(obs), act.clamp(-1, 1))
    inside = (act.abs() < 0.999).all(1)
    torch.testing.assert_close(policy.log_prob(obs, act)[inside], log_prob[inside], rtol=1e-3, atol=1e-3)


def test_bad_policies(policies, small, tmp_path):
    data = fqe.load(str(small))
    table_data = Dataset(Task("chain-logs"), "own", "", torch.zeros(4, 9), [4], 3, 1, 2)
    np.save(tmp_path / "bad.npy", np.full((3, 2), 0.6))
    (tmp_path / "x.npy").write_text("no table")
    for given, where, message in (
        ([], data, "There is no policy to evaluate: name one or several after --policies"),
        ([POLICIES / "halfcheetah-0110000.npz"], data, "is a policy for halfcheetah, and the data are hopper-medium's"),
        ([tmp_path / "y.pt"], data, "There is no checkpoint"),
        ([tmp_path / "bad.npy"], table_data, "is no policy for chain-logs: it must be a table .3, 2. of probabilities"),
        ([tmp_path / "bad.npy"], data, "is no policy for hopper-medium"),
        ([tmp_path / "x.npy"], table_data, "There is no readable table of probabilities"),
        ([SNAPSHOT], table_data, "is a policy for hopper, and the data are chain-logs's"),
    ):
        with pytest.raises(UserError, match=message):
            load_policies(given, where)
    (deterministic,) = load_policies(policies[:1], data)
    with pytest.raises(UserError, match="is deterministic: no logged action is exactly its own"):
        deterministic.log_prob(data.obs, data.act)
    with pytest.raises(UserError, match="--critic takes a checkpoint of fqe.py"):
        load_critics(policies[0], data)
    (noisy,) = load_policies(policies[:1], data, 0.5)
    mean = noisy.act(data.obs, False)
    expected = torch.distributions.Normal(mean, 0.5).log_prob(data.act).sum(-1)
    torch.testing.assert_close(noisy.log_prob(data.obs, data.act), expected)
    assert load_checkpoint(policies[0])["algorithm"] == "td3_bc"
