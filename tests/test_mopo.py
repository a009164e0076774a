import dataclasses

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from ensembles import CHANGES, assert_model_learned, fitted, gaussians, outcome, shuffled, soft_actor_critic
from test_scripts import arguments, assert_equal, stopped, trained
from update import assert_same, columns, table, trace

from algorithms import combo, mopo, morel
from datasets import Batch, Dataset, UserError, find_task
from results.run import Run

N, B, O, A = 3, 6, 4, 2
QUICK = {"rollouts": 40, "rollout_every": 5, "keep": 2, "model_updates": 12, "batch_size": 256}


@pytest.fixture(scope="module")
def small(small, tmp_path_factory):
    """Its first three episodes: an epoch of the model is 9 updates."""
    path = tmp_path_factory.mktemp("data") / "small.hdf5"
    with h5py.File(small) as file, h5py.File(path, "w") as part:
        part.attrs.update(file.attrs)
        for name, column in file.items():
            part[name] = column[:3000]
    return path


def model_of(*shape):
    """A network's stand-in that returns the same mean and log_std for whatever it is asked."""
    mean, log_std = torch.randn(*shape), torch.randn(*shape)
    return mean, log_std, lambda obs, act: (mean, log_std)


def batch_of(*lead):
    torch.manual_seed(0)
    return Batch(
        torch.randn(*lead, O), torch.randn(*lead, A), torch.randn(lead), torch.randn(*lead, O), torch.ones(lead)
    )


def test_model_loss():
    batch = batch_of(N, B)
    mean, log_std, dynamics = model_of(N, B, O + 1)
    y = np.concatenate([batch.next_obs - batch.obs, batch.rew[..., None]], -1).astype(np.float64)
    expected = 0
    for i in range(N):
        variance = np.exp(2 * log_std[i].numpy().astype(np.float64))
        expected += np.mean((y[i] - mean[i].numpy()) ** 2 / variance + np.log(variance))
    assert mopo.model_loss(batch, dynamics).item() == pytest.approx(expected, rel=1e-5)


def test_model_error():
    batch = batch_of(B)
    mean, _, dynamics = model_of(N, B, O + 1)
    y = np.concatenate([batch.next_obs - batch.obs, batch.rew[:, None]], 1).astype(np.float64)
    expected = [np.mean(((mean[i].numpy() - y) ** 2).mean(0) / y.var(0, ddof=1)) for i in range(N)]
    np.testing.assert_allclose(mopo.model_error(batch, dynamics), expected, rtol=1e-5)


def test_uncertainty():
    """The largest length of a network's deviations; or the largest distance of a mean from the mean of means."""
    mean, log_std, _ = model_of(N, B, O + 1)
    lengths = np.sqrt((np.exp(log_std.numpy().astype(np.float64)) ** 2).sum(-1))
    np.testing.assert_allclose(mopo.uncertainty(mopo.Args(), mean, log_std), lengths.max(0), rtol=1e-5)
    distances = np.sqrt(((mean - mean.mean(0)).numpy().astype(np.float64) ** 2).sum(-1))
    args = mopo.Args(penalty="disagreement")
    np.testing.assert_allclose(mopo.uncertainty(args, mean, log_std), distances.max(0), rtol=1e-5)


def test_imagine(monkeypatch):
    """The next observation and the reward of an elite drawn for each row, the penalty, the bound, the end."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    obs, act, bound = torch.randn(B, O), torch.rand(B, A), torch.full((O,), 1.5)
    mean, log_std, dynamics = model_of(7, B, O + 1)
    args, elites = mopo.Args(lam=2.0), torch.tensor([6, 1, 4, 2, 3])
    seen = set()
    for _ in range(50):
        rows = mopo.imagine(args, lambda x: x[:, 0] > 1, bound, obs, elites, lambda x: (act, None), dynamics)
        batch = Dataset(None, "", "", rows, [], O, A).split(rows)
        assert torch.equal(batch.obs, obs) and torch.equal(batch.act, act)
        assert torch.equal(batch.done, (batch.next_obs[:, 0] > 1).float())
        penalty = 2 * log_std.exp().norm(dim=-1).amax(0)
        for b in range(B):
            y = (mean + log_std.exp())[:, b]  # (7, O + 1)
            drawn = (y[:, O] - penalty[b] - batch.rew[b]).abs().argmin().item()
            assert y[drawn, O] - penalty[b] == pytest.approx(batch.rew[b].item(), abs=1e-5)
            torch.testing.assert_close(batch.next_obs[b], (obs[b] + y[drawn, :O]).clamp(-1.5, 1.5))
            seen.add(drawn)
    assert seen == set(elites.tolist())


@pytest.mark.parametrize("penalty, model_lr, model_updates, B", [("std", 6e-4, 7, 36), ("disagreement", 3e-4, 99, 130)])
def test_update(penalty, model_lr, model_updates, B, small, tmp_path, monkeypatch):
    """On shuffled data, whose steps are large: a fit that ends by --model-updates, or by patience; rollouts; SAC."""
    monkeypatch.setattr(mopo, "PATIENCE", 1)
    args = arguments(mopo, shuffled(small, tmp_path / "tiny.hdf5"), **CHANGES, penalty=penalty, batch_size=B)
    args = dataclasses.replace(args, lam=0.7, model_lr=model_lr, model_updates=model_updates)
    traced = trace(mopo, monkeypatch, args)
    start, end, draws, batches = traced.start, traced.end, (x for _, x in traced.random), iter(traced.batches)

    rows = table(*columns(tmp_path / "tiny.hdf5"))
    assert_same(traced.rows, rows)
    fit, held = fitted(start, rows, draws, args.seed, B, model_lr, model_updates)
    u = lambda mean, std: (std if penalty == "std" else mean - mean.mean(0)).norm(dim=-1).max(0).values
    mean, std = gaussians(fit["dynamics"], *held[:2])
    ranks = [x.argsort().argsort() for x in (u(mean, std), (mean.mean(0) - outcome(*held)).norm(dim=1))]
    spearman = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (30 * (30**2 - 1))

    assert_same(start["critic"], start["critic_target"])
    assert start["log_alpha"] == 0
    settle = lambda mean, std, rew: (rew - 0.7 * u(mean, std), torch.zeros(60, dtype=torch.bool))
    learned = soft_actor_critic(args, start, fit, rows, draws, batches, settle)
    assert_same(learned, {name: end[name] for name in learned})
    assert_model_learned(fit, end)
    assert (fit["stale"] == 1) == (penalty == "disagreement")
    assert end["correlation"].item() == pytest.approx(spearman.item(), abs=1e-6)
    assert [group["lr"] for group in end["adam_opt"]["param_groups"]] == [0, 2**-10, 1e-3]


@pytest.mark.parametrize("body", mopo.ENDED)
def test_ended_is_the_environments_own(body):
    """On states around the limits, reached by setting the simulator's state: the environment says the same."""
    env = gymnasium.make(f"{body}-v4").unwrapped
    env.reset(seed=0)
    rng, told, seen = np.random.default_rng(0), [], []
    start, zeros = env.data.qpos.copy(), np.zeros(env.model.nv)
    for _ in range(400):
        qpos = start.copy()
        qpos[1] += rng.uniform(-0.7, 1.0)
        qpos[2] += rng.uniform(-1.3, 1.3) * rng.choice([0.2, 1])
        env.set_state(qpos, zeros + rng.normal(size=env.model.nv))
        obs, _, terminated, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        seen.append(obs)
        told.append(terminated)
    ended = mopo.ENDED[body](torch.tensor(np.array(seen)))
    assert ended.tolist() == told
    assert 40 < sum(told) < 360 if body != "HalfCheetah" else not any(told)


def test_rollouts_stay_in_range(hopper):
    """However long, and with a model that was never trained and predicts enormous steps."""
    torch.manual_seed(0)
    dynamics, actor = mopo.Dynamics(7, hopper), mopo.Actor(11, 3)
    for param in dynamics.layers[-1].parameters():
        param.data *= 1e4
    bound = 2 * hopper.obs.abs().amax(0)
    args, obs = mopo.Args(lam=1.0), hopper.sample(50).obs
    with torch.no_grad():
        for _ in range(1000):
            rows = mopo.imagine(args, mopo.ENDED["Hopper"], bound, obs, torch.arange(5), actor, dynamics)
            obs = hopper.split(rows).next_obs
    assert torch.isfinite(rows).all() and (obs.abs() <= bound).all()


@pytest.fixture(scope="module")
def hopper():
    """Transitions of random actions, 6,000 of them."""
    data = Dataset.buffer(find_task("hopper-medium"), 6000)
    env, rng = data.task.make_env(), np.random.default_rng(0)
    obs = None
    for episode in range(6000):
        if obs is None:
            obs, _ = env.reset(seed=episode)
        act = rng.uniform(-1, 1, 3)
        next_obs, rew, terminated, truncated, _ = env.step(act)
        data.add(obs, act, rew, next_obs, terminated)
        obs = None if terminated or truncated else next_obs
    return data


def test_model_learns(hopper):
    """On held-out transitions: errors below those of "next = current", deviations of the errors' size."""
    torch.manual_seed(0)
    known, held = hopper.split(hopper.rows[:5000]), hopper.split(hopper.rows[5000:])
    dynamics = mopo.Dynamics(7, hopper)
    opt = torch.optim.Adam(dynamics.parameters(), 1e-3)
    for _ in range(400):
        rows = torch.randint(5000, (7, 128))
        loss = mopo.model_loss(Batch(*(column[rows] for column in known)), dynamics)
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        mean, log_std = dynamics(held.obs, held.act)
        y = mopo.outcome(held)
        rmse = ((mean.mean(0) - y) ** 2).mean(0).sqrt()
        ratio = rmse / (y**2).mean(0).sqrt()
        assert ratio.mean() < 0.5 and ratio.max() < 0.8
        ratio = (2 * log_std).exp().mean((0, 1)).sqrt() / rmse
        assert ((ratio > 0.3) & (ratio < 3)).all()
        assert mopo.rank_correlation(mopo.Args(), held, dynamics) > 0.2


@pytest.mark.parametrize("script, seeds", [(mopo, 1), (mopo, 2), (morel, 2), (combo, 2)])
def test_resume_is_exact(script, seeds, small, tmp_path, monkeypatch):
    """Stopped by Ctrl-C within the model's training, and after step 10: the end is that of a run undisturbed."""
    args = arguments(script, small, steps=20, seeds=seeds, **QUICK)
    whole = trained(tmp_path, monkeypatch, "whole", (script.train, args))
    progress = Run.progress

    def stopped_in_the_model(args):
        def interrupted(run, text):
            run._interrupted = True
            progress(run, text)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="Stopped after step 0 and saved"):
            patch.setattr(Run, "progress", interrupted)
            script.train(args)

    again = dataclasses.replace(args, resume=True)
    parts = (stopped_in_the_model, args), (stopped(script.train, 10), again), (script.train, again)
    parts = trained(tmp_path, monkeypatch, "parts", *parts)
    assert whole["state"]["epochs"].max() == 2
    for saved in (whole, parts):
        del saved["args"], saved["seconds"], saved["eval_seconds"]
    assert_equal(whole, parts)


@pytest.mark.parametrize("script", [mopo, morel, combo])
def test_seeds_do_not_leak(script, small, tmp_path, monkeypatch):
    """The other agent's parameters, model and all, change nothing for an agent."""
    args = arguments(script, small, steps=20, seeds=2, **QUICK)
    plain = trained(tmp_path, monkeypatch, "plain", (script.train, args))["state"]
    stack = script.stack
    for agent in (0, 1):

        def perturbed(nets, agent=agent):
            for param in nets[1 - agent].parameters():
                param.data *= 1.3
            return stack(nets)

        monkeypatch.setattr(script, "stack", perturbed)
        other = trained(tmp_path, monkeypatch, f"other than {agent}", (script.train, args))["state"]
        for name in ("dynamics", "actor", "critic"):
            for key, value in plain[name].items():
                if value.dim() > 1:
                    assert [torch.equal(*x) for x in zip(value, other[name][key])] == [agent == 0, agent == 1]
        assert torch.equal(plain["model_rows"][agent], other["model_rows"][agent])


def test_early_stop(small, tmp_path, monkeypatch):
    """The model's training ends when for 5 epochs no network has become better by 1 %, and the best are kept."""
    errors = iter([4.0, 3.0, 2.0, 2.5, 1.99, 1.985, 2.2, 2.1])
    told = []

    def error(batch, dynamics):
        told.append(next(errors))
        return torch.full((7,), told[-1])

    monkeypatch.setattr(mopo, "model_error", error)
    args = arguments(mopo, small, steps=10, **QUICK | {"model_updates": 10_000})
    saved = trained(tmp_path, monkeypatch, "run", (mopo.train, args))
    assert len(told) == 8 and saved["state"]["epochs"] == 8 and (saved["state"]["best_error"] == 2).all()
    layers = {name: x for name, x in saved["state"]["dynamics"].items() if name.startswith("layers.")}
    assert_equal({f"layers.{name}": x for name, x in saved["state"]["best"].items()}, layers)


@pytest.mark.parametrize("script, name", [(mopo, "MOPO"), (morel, "MOReL"), (combo, "COMBO")])
def test_bad_input(script, name, small, monkeypatch):
    load = script.load

    def load_other(*words):
        data = load(*words)
        data.task = dataclasses.replace(data.task, env_id="Ant-v4")
        return data

    monkeypatch.setattr(script, "load", load_other)
    args = arguments(script, small, steps=10, **QUICK)
    with pytest.raises(UserError, match=f"When .* ends is not known; {name} can learn HalfCheetah, Hopper, Walker2d"):
        script.train(args)


@pytest.mark.parametrize("script", [mopo, morel, combo])
def test_a_model_that_diverges(script, small):
    args = arguments(script, small, steps=10, model_lr=1e30)
    with pytest.raises(UserError, match="The model diverged: .* Lower --model-lr"):
        script.train(args)
