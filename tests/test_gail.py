import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from test_scripts import assert_equal, stopped, trained
from update import Adam, assert_same, columns, episodes, leaves, table, trace

from algorithms import gail
from datasets import Dataset, UserError, find_task
from datasets.vector_env import Envs, Workers

B, O, A = 6, 4, 2


def test_discriminator_loss_and_reward():
    """D is the probability of the policy: a pair taken for the expert's has a D near 0, and earns most."""
    logit, expert_logit = torch.randn(B), torch.randn(B)
    D, expert_D = (1 / (1 + np.exp(-x.numpy().astype(np.float64))) for x in (logit, expert_logit))
    expected = -np.mean(np.log(D)) - np.mean(np.log(1 - expert_D))
    assert gail.discriminator_loss(logit, expert_logit).item() == pytest.approx(expected, rel=1e-5)
    for name, value in (("-logD", -np.log(D)), ("log(1-D)", np.log(1 - D)), ("sum", np.log(1 - D) - np.log(D))):
        rew = gail.reward_of(gail.Args(reward=name), logit)
        np.testing.assert_allclose(rew, value, rtol=1e-4, atol=1e-6)
        assert gail.reward_of(gail.Args(reward=name), torch.tensor([-3.0, 3.0])).diff() < 0
    assert gail.Args().reward == "-logD"


def test_gradient_penalty():
    """Against differences of the logit at the points between; a discriminator that is flat costs nothing."""
    torch.manual_seed(0)
    disc = torch.nn.Sequential(torch.nn.Linear(O, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    disc[2].weight.data *= 4
    pairs, expert_pairs = torch.randn(2, B, O, dtype=torch.float64)
    torch.manual_seed(1)
    penalty = gail.gradient_penalty(pairs, expert_pairs, disc)
    torch.manual_seed(1)
    x = pairs + torch.rand(B, 1, dtype=torch.float64) * (expert_pairs - pairs)
    with torch.no_grad():
        steps = 1e-6 * torch.eye(O, dtype=torch.float64)[:, None]  # (O, 1, O)
        grad = (disc(x + steps) - disc(x - steps)).squeeze(-1).numpy() / 2e-6  # (O, B)
    norms = np.sqrt(np.sum(grad**2, 0))
    assert norms.min() < 1 < norms.max()
    assert penalty.item() == pytest.approx(np.mean(np.maximum(norms - 1, 0) ** 2), rel=1e-5)
    penalty.backward()
    assert disc[0].weight.grad.abs().sum() > 0
    disc[2].weight.data *= 0.001
    assert gail.gradient_penalty(pairs, expert_pairs, disc) == 0


def test_actor_loss():
    torch.manual_seed(0)
    actor = gail.Actor(O, A)
    obs, act, adv = torch.randn(B, O), torch.randn(B, A), torch.randn(B)
    mean, log_std = (x.detach().numpy().astype(np.float64) for x in actor(obs))
    z = (act.numpy() - mean) / np.exp(log_std)
    log_prob = np.sum(-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi), 1)
    old = log_prob + np.array([0.0, 0.5, -0.5, 0.1, -0.1, 0.3])
    ratio = np.exp(log_prob - old)
    expected = -np.mean(np.minimum(ratio * adv.numpy(), np.clip(ratio, 0.8, 1.2) * adv.numpy()))
    loss = gail.actor_loss(gail.Args(), obs, act, torch.tensor(old, dtype=torch.float32), adv, actor)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_advantages():
    """Against the sum of discounted TD errors up to the episode's end; time-outs are bootstrapped, terminations not."""
    T, args = 7, gail.Args(gamma=0.9, gae_lambda=0.8)
    rng = np.random.default_rng(0)
    rew, value, next_value = rng.normal(size=(3, T, 2))
    done, last = np.zeros((T, 2)), np.zeros((T, 2))
    done[2, 0] = last[2, 0] = last[4, 0] = last[3, 1] = last[6] = 1
    expected = np.zeros((T, 2))
    for e in range(2):
        for t in range(T):
            for k in range(t, T):
                delta = rew[k, e] + 0.9 * (1 - done[k, e]) * next_value[k, e] - value[k, e]
                expected[t, e] += (0.9 * 0.8) ** (k - t) * delta
                if last[k, e]:
                    break
    ours = gail.advantages(args, *(torch.tensor(x) for x in (rew, value, next_value, done, last)))
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_play():
    """Whole transitions of each environment: next observations are the episode's own, ends and cuts are told apart."""
    task = dataclasses.replace(find_task("hopper-medium"), max_episode_steps=15)
    data = Dataset.buffer(task, 0)
    data.obs_mean += 0.5
    torch.manual_seed(0)
    envs, actor = Envs(task, 3), gail.Actor(11, 3)
    args = gail.Args(horizon=40, envs=3)
    columns = gail.play(args, envs, 7, data, actor)
    obs, act, next_obs, done, last = columns
    assert obs.shape == next_obs.shape == (40, 3, 11) and act.shape == (40, 3, 3) and last.shape == (40, 3)
    goes_on = last[:-1] == 0
    assert torch.equal(next_obs[:-1][goes_on], obs[1:][goes_on])
    assert not (next_obs[:-1][~goes_on] == obs[1:][~goes_on]).all(-1).any()
    assert (last[-1] == 1).all() and (done <= last).all() and 0 < done.sum() < last.sum()
    env = task.make_env()
    env.reset(seed=7)
    for t in range(5):
        following, *_ = env.step(act[t, 0].clamp(-1, 1).numpy())
        np.testing.assert_allclose(next_obs[t, 0], following - 0.5, atol=1e-5)
    for again in (envs, Workers(task, 3, 2)):
        torch.manual_seed(0)
        for one, other in zip(columns, gail.play(args, again, 7, data, gail.Actor(11, 3))):
            assert torch.equal(one, other)


def tanh_net(params, x):
    """A network of weights and biases, in their order: (..., in) -> (..., out)."""
    *hidden, weight, bias = params.values()
    for w, b in zip(hidden[::2], hidden[1::2]):
        x = (x @ w.T + b).tanh()
    return x @ weight.T + bias


def whole_update(script, small, monkeypatch, sees, net, D, earns, hidden=(), **changes):
    """Three iterations of GAIL or a sister, in which episodes end and are cut; what `play` returned is taken as it is.

    sees(obs, act, next_obs): what its network is given, (..., X); net(params, x, done): what that says, (...), whose
    slope is penalized; D(net's, pi(act | obs)): the policy's probability; earns(D's): the reward; hidden: columns of
    the data that the script has made NaN.
    """
    played, play = [], script.play
    monkeypatch.setattr(script, "play", lambda *words: played.append((words[2], play(*words))) or played[-1][1])
    changes |= dict(gamma=0.9, gae_lambda=0.8, clip=0.1, lr=3e-3, epochs=2, seed=2)
    changes |= dict(demos=5, every=7, disc_lr=0.02, disc_updates=4, grad_penalty=3.0, batch_size=32)
    args = arguments(str(small), script, eval_env="", envs=3, horizon=40, steps=360, **changes)
    traced = trace(script, monkeypatch, args, task={"max_episode_steps": 18})

    rng, whole = np.random.default_rng(2), [np.arange(20_000)[own] for own in episodes(small)]
    rows = [whole[i] for i in rng.choice(len(whole), 5, replace=False)]
    rows = np.concatenate([own[rng.integers(7) :: 7] for own in rows])
    obs, act, rew, next_obs, done = (column[rows] for column in columns(small))
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    data = dict(obs=(obs - mean) / std, act=act, rew=rew, next_obs=(next_obs - mean) / std, done=done)
    data |= {name: torch.full_like(data[name], torch.nan) for name in hidden}
    torch.testing.assert_close(traced.rows, table(*data.values()), rtol=1e-9, atol=1e-9, equal_nan=True)

    actor, value, disc = (leaves(traced.start[name]) for name in ("actor", "value", "disc"))
    assert [len(x) for x in value.values()] == [100, 100, 100, 100, 1, 1]
    assert [len(x) for x in disc.values()] in ([100, 100, 100, 100, 1, 1], 2 * [100, 100, 100, 100, 1, 1])
    actor_opt, value_opt, disc_opt = Adam(actor, None), Adam(value, None), Adam(disc, 0.02)
    mean_net = {name: x for name, x in actor.items() if name != "log_std"}
    draws, batches = (x for _, x in traced.random), iter(traced.batches)
    assert 0 < sum(done.sum() for _, (*_, done, last) in played) < sum(last.sum() - 3 for _, (*_, last) in played)
    V = lambda obs: tanh_net(value, obs)[..., 0]
    pi = lambda obs: torch.distributions.Normal(tanh_net(mean_net, obs), actor["log_std"].exp())
    for step, (seed, (obs, act, next_obs, done, last)) in zip((120, 240, 360), played, strict=True):
        assert seed == 200_000_000 + step and act.shape == (40, 3, 3)
        noise = torch.stack([next(draws) for _ in range(40)])
        assert_same(act, pi(obs).mean + pi(obs).stddev * noise)
        with torch.no_grad():
            old = pi(obs).log_prob(act).sum(-1)
        seen = sees(obs, act.clamp(-1, 1), next_obs)  # (40, 3, X)
        for _ in range(4):
            batch, rows, share = next(batches), next(draws), next(draws)
            ours, experts = seen.reshape(120, -1)[rows], sees(batch.obs, batch.act, batch.next_obs)
            between = (ours + share * (experts - ours)).requires_grad_()
            (slope,) = torch.autograd.grad(net(disc, between, 0).sum(), between, create_graph=True)
            penalty = ((slope.norm(dim=1) - 1).clamp(min=0) ** 2).mean()
            theirs = pi(batch.obs).log_prob(batch.act).sum(-1).exp().detach() if "act" not in hidden else None
            p = D(net(disc, ours, done.reshape(120)[rows]), old.reshape(120)[rows].exp())
            expert_p = D(net(disc, experts, batch.done), theirs)
            disc_opt.step(-p.log().mean() - (1 - expert_p).log().mean() + 3.0 * penalty)

        with torch.no_grad():
            rew = (1 - 0.9) * earns(D(net(disc, seen, done), old.exp()))
            delta = rew + 0.9 * (1 - done) * V(next_obs) - V(obs)
            adv = torch.zeros(41, 3).double()
            for t in reversed(range(40)):
                adv[t] = delta[t] + 0.9 * 0.8 * (1 - last[t]) * adv[t + 1]
            adv, ret = adv[:-1], adv[:-1] + V(obs)
            adv = (adv - adv.mean()) / (adv.std() + 1e-8)
        actor_opt.lr = value_opt.lr = 3e-3 * (1 - (step - 120) / 360)
        for order in next(draws), next(draws):
            for rows in (order[i : i + 32] for i in range(0, 120, 32)):
                o, a, adv_, ret_, old_ = (column.flatten(0, 1)[rows] for column in (obs, act, adv, ret, old))
                ratio = (pi(o).log_prob(a).sum(-1) - old_).exp()
                actor_opt.step(-torch.min(ratio * adv_, ratio.clamp(0.9, 1.1) * adv_).mean())
                value_opt.step(((V(o) - ret_) ** 2).mean())
    for name, params in {"actor": actor, "value": value, "disc": disc}.items():
        assert_same(params, traced.end[name], name)
    assert traced.end["opt"]["param_groups"][0]["lr"] == pytest.approx(1e-3)


def plain(params, x, done):
    """A discriminator that is one network, of pairs that know no ends."""
    return tanh_net(params, x)[..., 0]


def sigmoid(logit, density):
    return 1 / (1 + (-logit).exp())


@pytest.mark.parametrize("reward", ["-logD", "log(1-D)", "sum"])
def test_update(reward, small, monkeypatch):
    sees = lambda obs, act, next_obs: torch.cat([obs, act], -1)
    earns = {"-logD": lambda p: -p.log(), "log(1-D)": lambda p: (1 - p).log(), "sum": lambda p: (1 / p - 1).log()}
    whole_update(gail, small, monkeypatch, sees, plain, sigmoid, earns[reward], reward=reward)


PLACE = 0.4  # of the cart, where the expert keeps it


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """A file of InvertedPendulum episodes by a linear controller, which never falls and keeps the cart in its place."""
    env, rng = gymnasium.make("InvertedPendulum-v4", max_episode_steps=200), np.random.default_rng(0)
    rows = []
    for episode in range(4):
        obs, _ = env.reset(seed=episode)
        for step in range(200):
            act = (obs - [PLACE, 0, 0, 0]) @ [0.4, 5.0, 0.6, 1.0] + 0.3 * rng.standard_normal()
            next_obs, rew, terminated, _, _ = env.step(np.clip([act], -3, 3))
            assert not terminated
            rows.append((obs, [np.clip(act / 3, -1, 1)], rew, next_obs, False, step == 199))
            obs = next_obs
    path = tmp_path_factory.mktemp("expert") / "pendulum.hdf5"
    names = "observations", "actions", "rewards", "next_observations", "terminals", "timeouts"
    with h5py.File(path, "w") as file:
        for name, column in zip(names, zip(*rows)):
            file[name] = np.array(column)
    return str(path)


def arguments(expert, script=gail, **changes):
    quick = {"env": expert, "eval_env": "InvertedPendulum-v4", "envs": 4, "horizon": 200, "eval_every": 800, "every": 1}
    return dataclasses.replace(script.Args(), **quick | changes)


def test_right_signs_imitate_and_wrong_ones_do_not(expert, monkeypatch):
    """The policy balances with the cart where the expert keeps it. With flipped labels it may balance too, as -log D
    pays for surviving, but elsewhere; with a constant reward it falls."""
    loss, args = gail.discriminator_loss, arguments(expert, steps=24_000, eval_every=24_000, lr=2e-3, gamma=0.99)

    def place_after_training():
        """Of the cart, the mean over the second half of 200 steps; None if the pendulum has fallen by then."""
        ends = []
        monkeypatch.setattr(gail.Run, "_save", lambda run: ends.append((run.data, run.state["actor"])))
        gail.train(args)
        data, actor = ends[-1]
        (obs, _), places = (env := data.task.make_env()).reset(seed=1), []
        for _ in range(200):
            x = (torch.as_tensor(obs, dtype=torch.float32) - data.obs_mean) / data.obs_std
            obs, _, terminated, *_ = env.step(gail.policy(x[None], actor).clamp(-1, 1)[0].detach().numpy())
            places.append(obs[0])
            if terminated:
                return None
        return np.mean(places[100:])

    assert place_after_training() == pytest.approx(PLACE, abs=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(gail, "discriminator_loss", lambda logit, expert_logit: loss(expert_logit, logit))
        flipped = place_after_training()
    assert flipped is None or abs(flipped - PLACE) > 0.5
    monkeypatch.setattr(gail, "reward_of", lambda args, logit: torch.zeros_like(logit))
    assert place_after_training() is None


def test_resume_is_exact(expert, tmp_path, monkeypatch):
    args = arguments(expert, steps=1600, eval_episodes=1)
    whole = trained(tmp_path, monkeypatch, "whole", (gail.train, args))
    parts = (stopped(gail.train, 800), args), (gail.train, dataclasses.replace(args, resume=True))
    parts = trained(tmp_path, monkeypatch, "parts", *parts)
    for saved in (whole, parts):
        del saved["args"], saved["seconds"], saved["eval_seconds"]
    assert [point["step"] for point in whole["curve"]] == [800, 1600]
    assert_equal(whole, parts)


def test_bad_input(expert):
    with pytest.raises(UserError, match="--demos 5 are more than the 4 trajectories of pendulum"):
        gail.train(arguments(expert, demos=5))
    with pytest.raises(UserError, match="--steps must be a multiple of --envs x --horizon, 800, not 1000"):
        gail.train(arguments(expert, steps=1000))


def test_environment_that_returns_nan(expert, monkeypatch):
    """Acting and in an evaluation; what is saved stays."""
    env_class = type(gymnasium.make("InvertedPendulum-v4").unwrapped)
    step, calls = env_class.step, []

    def broken(env, action):
        calls.append(action)
        obs, *rest = step(env, action)
        return (obs * np.nan if len(calls) > 2000 else obs, *rest)

    monkeypatch.setattr(env_class, "step", broken)
    args = arguments(expert, steps=4000, eval_episodes=1)
    with pytest.raises(UserError, match="not finite: its simulation has failed, or it is broken. --resume goes on"):
        gail.train(args)
    ((folder, _, files),) = [entry for entry in os.walk(os.environ["RUNS_DIR"]) if "checkpoint.pt" in entry[2]]
    assert torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["step"] in (800, 1600)
    data = Dataset.buffer(find_task("hopper-medium"), 10)
    with pytest.raises(UserError, match="not finite"):
        data.add(np.zeros(11), np.zeros(3), np.nan, np.zeros(11), False)
    step = lambda act: (np.full((1, 11), np.inf), np.zeros(1), *np.ones((2, 1), bool))
    monkeypatch.setattr(data, "_envs", (1, SimpleNamespace(reset=lambda seeds: np.zeros((1, 11)), step=step)))
    with pytest.raises(UserError, match="not finite"):
        data.evaluate(lambda x: torch.zeros(1, 3), 1, 0)


def test_keep_demos():
    """So many trajectories, and of each every third row from a random one on."""
    rows = torch.zeros(60, 2 * O + A + 2)
    rows[:, 0] = torch.arange(60)
    ends = [10, 12, 30, 60]

    def kept(seed):
        data = Dataset(SimpleNamespace(name="x"), "file", "", rows.clone(), ends, O, A)
        data.keep_demos(3, 3, seed)
        assert len(data) == data.ends[-1] and len(data.ends) == 3
        return [part.tolist() for part in np.split(data.obs[:, 0].numpy().astype(int), data.ends[:-1])]

    seen = set()
    for seed in range(20):
        for part in kept(seed):
            (episode,) = [i for i, (a, b) in enumerate(zip([0, *ends], ends)) if a <= part[0] < b]
            assert all(b - a == 3 for a, b in zip(part, part[1:]))
            assert part[0] - [0, *ends][episode] < 3 and part[-1] + 3 >= ends[episode]
            seen.add((episode, part[0]))
    assert len(seen) == 3 + 2 + 3 + 3
    assert kept(1) == kept(1)
