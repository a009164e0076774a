"""Discrete actions through the library: batches, frames stored once, files, tasks, and games played again."""

import dataclasses

import h5py
import numpy as np
import pytest
import torch
from conftest import random_cartpole

from algorithms import discrete_cql, offline_dqn, td3_bc
from datasets import GAMES, ActionLog, Dataset, UserError, collect_discrete, find_task, icu_sepsis, load
from datasets.collect import collected_file
from datasets.minari_io import export_minari
from datasets.store import read_hdf5, write_hdf5
from datasets.tasks import minatar
from results.checkpoint import load_checkpoint


def pixels(n=1000, O=400):
    """A set of frames, of which each is one row's next_obs and the next row's obs; episodes of 100 rows."""
    starts = np.arange(0, n, 100)
    first = np.arange(n) + np.arange(n) // 100  # each episode has a frame more than it has rows
    rows = np.stack([first, np.arange(n) % 3, np.arange(n) % 2, first + 1, np.zeros(n)], 1)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (n + len(starts), O), np.uint8))
    task = dataclasses.replace(GAMES["minatar-breakout"], name="frames")
    ends = starts + 100
    return Dataset(task, "collected", "f", torch.from_numpy(rows.astype(np.float32)), ends, O, 1, 3, frames)


def test_batches():
    """act is an index, (B,) int64, of several agents (S, B); the columns of the table stay views of it."""
    data = random_cartpole()
    for shape, seeds in (((5,), 1), ((2, 5), 2)):
        batch = data.sample(5, seeds)
        assert (
            batch.act.shape == shape and batch.act.dtype == torch.int64 and set(batch.act.flatten().tolist()) <= {0, 1}
        )
        assert batch.obs.shape == (*shape, 4) and batch.rew.shape == shape
    assert data.act.shape == (2000, 1)
    data.rew *= 0.5
    assert (data.sample(5).rew == 0.5).all()


def test_frames_are_looked_up():
    data = pixels()
    assert data.obs_dim == 400 and data.obs_shape == (4, 10, 10) and len(data.returns()) == 10
    for seeds in (1, 2):
        torch.manual_seed(0)
        batch = data.sample(50, seeds)
        torch.manual_seed(0)
        i = torch.randint(1000, (50,) if seeds == 1 else (seeds, 50))
        frame = i + i // 100
        assert batch.obs.dtype == torch.float32
        assert torch.equal(batch.obs, data.frames[frame].float()) and torch.equal(
            batch.next_obs, data.frames[frame + 1].float()
        )
        assert torch.equal(batch.act, i % 3)


def test_memory_of_pixels():
    """At most 1.2 times the bytes of the frames stored once; as rows of floats it would be 8 times."""
    data = pixels(20_000)
    assert data.rows.nbytes + data.frames.nbytes <= 1.2 * data.frames.nbytes
    assert data.frames.nbytes == (20_000 + 200) * 400


def test_file_of_frames(tmp_path):
    data = pixels()
    write_hdf5(tmp_path / "x.hdf5", data)
    again = read_hdf5(tmp_path / "x.hdf5")
    assert torch.equal(again.rows, data.rows) and torch.equal(again.frames, data.frames)
    assert (again.task, again.obs_dim, again.n_actions, again.ends.tolist()) == (data.task, 400, 3, data.ends.tolist())
    assert again.frames.dtype == torch.uint8
    write_hdf5(tmp_path / "y.hdf5", random_cartpole())
    assert read_hdf5(tmp_path / "y.hdf5").frames is None


def test_own_file(tmp_path):
    """Integers, one a step, are discrete actions, of the environment's number; numbers with a point are not."""
    path, data = tmp_path / "mine.hdf5", random_cartpole()
    act = data.act[:, 0].numpy().astype(np.int64)

    def write(act):
        with h5py.File(path, "w") as file:
            file["observations"], file["next_observations"] = data.obs.numpy(), data.next_obs.numpy()
            file["actions"], file["rewards"] = act, data.rew.numpy()
            file["terminals"], file["timeouts"] = data.done.numpy() > 0, np.zeros(len(data), bool)

    write(act)
    for eval_env in ("", "CartPole-v1"):
        own = load(str(path), eval_env=eval_env, discrete=True)
        assert own.n_actions == 2 and torch.equal(own.act, data.act)
        assert own.sample(8).act.dtype == torch.int64
    offline_dqn.train(offline_dqn.Args(str(path), eval_env="CartPole-v1", steps=2, eval_every=2, batch_size=8))
    with pytest.raises(UserError, match="2 discrete actions; this algorithm is for continuous ones"):
        load(str(path))
    with pytest.raises(UserError, match="4 observations and 2 discrete actions, --eval-env Hopper-v4"):
        load(str(path), eval_env="Hopper-v4", discrete=True)
    write(act + 1)
    with pytest.raises(UserError, match="has 3 discrete actions, --eval-env CartPole-v1 2"):
        load(str(path), eval_env="CartPole-v1", discrete=True)
    write(act - 1)
    with pytest.raises(UserError, match="has the action -1; discrete ones count from 0"):
        load(str(path), discrete=True)
    write(act.astype(np.float32))
    with pytest.raises(UserError, match="has continuous actions"):
        load(str(path), discrete=True)


def test_frames_as_a_minari_dataset(here, tmp_path):
    """States by number become what a network sees of them, and come back as rows."""
    task = find_task("icu-sepsis-mixture-features")
    data = collect_discrete.collect(task, [("clinicians", 300, 0)], "x")
    export_minari(data, "icu/sepsis/mixture-v0", "table of probabilities")
    again = load("icu/sepsis/mixture-v0", discrete=True)
    for ours, theirs in ((data.look_up(data.obs), again.obs), (data.look_up(data.next_obs), again.next_obs)):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(again.act, data.act) and again.n_actions == 25 and again.obs_dim == 47


@pytest.mark.parametrize("game", ["cartpole", "minatar-breakout"])
def test_buffer(game):
    """A ring: the newest rows, with their frames; and what is saved is all of it."""
    data, rng = Dataset.buffer(GAMES[game], 8), np.random.default_rng(0)
    draw = lambda: rng.integers(0, 2, data.obs_dim).astype(np.uint8)
    added = [(draw(), int(rng.integers(2)), float(k), draw(), k % 5 == 0) for k in range(13)]
    for row in added[:3]:
        data.add(*row)
    assert len(data) == 3 and len(data.state_dict()["rows"]) == 3
    for row in added[3:]:
        data.add(*row)
    again = Dataset.buffer(GAMES[game], 8)
    again.load_state_dict(data.state_dict())
    for buffer in (data, again):
        assert len(buffer) == 8 and buffer.added == 13
        batch = buffer.sample(200)
        assert set(batch.rew.tolist()) == set(range(5, 13))
        for i in range(200):
            obs, act, rew, next_obs, done = added[int(batch.rew[i])]
            assert batch.obs[i].tolist() == obs.tolist() and batch.next_obs[i].tolist() == next_obs.tolist()
            assert (int(batch.act[i]), bool(batch.done[i])) == (act, done)


def test_continuous_and_discrete_do_not_mix(small, tmp_path):
    with pytest.raises(UserError, match="has 2 discrete actions; this algorithm is for continuous ones"):
        td3_bc.train(td3_bc.Args(str(small.with_name("cartpole.hdf5"))))
    with pytest.raises(
        UserError, match="has continuous actions; this algorithm is for discrete ones, say cartpole-replay"
    ):
        offline_dqn.train(offline_dqn.Args(str(small)))


def test_cartpole_replay():
    """The log's episodes, each with the return that the training saw; and as many bytes as a picture."""
    data = load("cartpole-replay", discrete=True)
    with np.load(collect_discrete.POLICIES / "cartpole-replay.npz") as log:
        acts, episodes = log["act"], log["episodes"]
    assert len(data) == len(acts) == 20_000 and data.n_actions == 2
    np.testing.assert_array_equal(data.act[:, 0], acts)
    np.testing.assert_array_equal(data.returns(), episodes[:, 2])
    starts = np.r_[0, data.ends[:-1]]
    env = find_task("cartpole-replay").make_env()
    for e in (0, 5, len(starts) - 1):
        np.testing.assert_array_equal(data.obs[starts[e]], env.reset(seed=int(episodes[e, 0]))[0])
    inside = np.delete(np.arange(20_000), data.ends - 1)
    assert torch.equal(data.next_obs[inside], data.obs[inside + 1])
    assert 0 < data.done.sum() < len(data.ends)  # some reach the time limit
    assert collected_file(find_task("cartpole-replay")).exists()


def test_a_log_is_played_again(tmp_path, monkeypatch):
    """MinAtar's frames from a log of its actions, each stored once."""
    monkeypatch.setattr(collect_discrete, "POLICIES", tmp_path)
    task, log, env = find_task("minatar-breakout-replay"), ActionLog(), GAMES["minatar-breakout"].make_env()
    rng, seen = np.random.default_rng(0), []
    for seed in (3, 4):
        seen.append(env.reset(seed=seed)[0])
        log.start(seed)
        for _ in range(4):
            act = int(rng.integers(3))
            obs, rew, *_ = env.step(act)
            log.took(act)
            log.earn(rew)
            seen.append(obs)
    log.write(tmp_path / "minatar-breakout-replay.npz")
    data = collect_discrete.collect(task, collect_discrete.plan(task), "x")
    np.testing.assert_array_equal(data.frames, seen)
    assert data.rows[:, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and data.rows[:, 3].tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert data.ends.tolist()[-1] == 8


def test_a_snapshot_plays(tmp_path, monkeypatch):
    """Its network is dqn.py's: without random actions it does what that would do."""
    from algorithms import dqn

    task, critic = find_task("minatar-breakout-expert"), dqn.Critic((4, 10, 10), 3)
    for param in critic.parameters():
        param.data = param.data.half().float()
    dqn.save_policy(tmp_path / "minatar-breakout-expert.npz", critic)
    monkeypatch.setattr(collect_discrete, "POLICIES", tmp_path)
    monkeypatch.setattr(collect_discrete, "EPSILON", 0.0)
    data = collect_discrete.collect(task, collect_discrete.plan(task, 200), "x")
    assert len(data) == 200 and data.ends[-1] == 200
    greedy = critic(data.frames[data.rows[:, 0].long()].float()).argmax(1)
    assert torch.equal(greedy, data.act[:, 0].long())
    monkeypatch.setattr(collect_discrete, "EPSILON", 1.0)
    assert len(set(collect_discrete.collect(task, collect_discrete.plan(task, 200), "x").act[:, 0].tolist())) == 3


def test_without_files(tmp_path, monkeypatch):
    monkeypatch.setattr(collect_discrete, "POLICIES", tmp_path)
    with pytest.raises(UserError, match="minatar-breakout-expert needs .*minatar-breakout-expert.npz"):
        load("minatar-breakout-expert", discrete=True)


@pytest.mark.parametrize("game", minatar.CHANNELS)
def test_minatar(game):
    """The same seed and actions, the same game; the catalog's sizes are its own."""
    task = GAMES[f"minatar-{game}"]
    first, second = task.make_env(), task.make_env()
    assert first.observation_space.shape == (task.obs_dim,) and task.obs_dim == 100 * minatar.CHANNELS[game]
    rng = np.random.default_rng(0)
    for seed in (0, 1):
        np.testing.assert_array_equal(first.reset(seed=seed)[0], second.reset(seed=seed)[0])
        for _ in range(60):
            act = int(rng.integers(first.action_space.n))
            obs, rew, over, *_ = first.step(act)
            again = second.step(act)
            np.testing.assert_array_equal(obs, again[0])
            assert (rew, over) == again[1:3] and set(np.unique(obs)) <= {0, 1}
            if over:
                break


def test_minatar_sticks_and_times_out():
    """A tenth of the actions are the last one again; Freeway's end after 2,500 steps is a truncation."""
    env = minatar.MinAtar("freeway")
    env.reset(seed=0)
    taken, act = [], env.game.act
    env.game.act = lambda action: (taken.append(action), act(action))[1]
    over = step = 0
    while not over:
        _, _, terminated, truncated, _ = env.step(step % 3)
        over, step = terminated or truncated, step + 1
    assert (terminated, truncated, step) == (False, True, 2501)
    stuck = np.mean([action != env.actions[k % 3] for k, action in enumerate(taken)])
    assert 0.08 < stuck < 0.12
    env.reset(seed=0)
    assert env.last == env.actions[0]


@pytest.mark.parametrize("who", icu_sepsis.BEHAVIOURS)
def test_icu_data(who, monkeypatch):
    """What the data are of, and that states are stored as numbers that both kinds of observations share."""
    monkeypatch.setitem(collect_discrete.SIZES, f"icu-sepsis-{who}", 20_000)
    monkeypatch.setitem(collect_discrete.SIZES, f"icu-sepsis-{who}-features", 20_000)
    one_hot, features = (load(f"icu-sepsis-{who}{ending}", discrete=True) for ending in ("", "-features"))
    assert torch.equal(one_hot.rows, features.rows) and one_hot.fingerprint == features.fingerprint
    assert len(one_hot) == 20_000 and one_hot.n_actions == 25
    batch, _ = one_hot.sample(64), features.sample(64)
    assert batch.obs.shape == (64, 716) and (batch.obs.sum(1) == 1).all() and features.sample(3).obs.shape == (3, 47)
    policies = {name: icu_sepsis.behaviour(name) for name in ("clinicians", "optimal")}
    state, act = one_hot.rows[:, 0].long().numpy(), one_hot.act[:, 0].long().numpy()
    likely = {name: np.log(policy[state, act] + 1e-9).reshape(2, -1).mean(1) for name, policy in policies.items()}
    told = [max(likely, key=lambda name, half=half: likely[name][half]) for half in (0, 1)]
    assert told == {"mixture": ["clinicians", "optimal"]}.get(who, [who, who])
    # As many die as live in the data; the value is within four deviations.
    if who != "mixture":
        value, n = icu_sepsis.value(policies[who]), len(one_hot.ends)
        assert abs(one_hot.returns().mean() - value) < 4 * np.sqrt(value * (1 - value) / n)


@pytest.mark.parametrize("seeds", [1, 2])
def test_icu_evaluation_is_exact(seeds):
    """Each return is the value of the policy on all states; a uniform policy would score 0, the best 100."""
    task = find_task("icu-sepsis-clinicians")
    best, worst = icu_sepsis.solve(), icu_sepsis.solve(worst=True)
    data = Dataset.buffer(task, 0)
    tables = torch.from_numpy(np.stack([best, worst])).float()
    policy = lambda obs: (obs @ (tables[0] if seeds == 1 else tables)).argmax(-1)
    returns = np.atleast_2d(data.evaluate(policy, 3, seed=0, seeds=seeds))
    expected = [icu_sepsis.value(best), icu_sepsis.value(worst)][:seeds]
    np.testing.assert_allclose(returns, np.repeat(expected, 3).reshape(seeds, 3))
    assert task.score(returns[0]) == pytest.approx(100, abs=1e-3)
    assert task.score(icu_sepsis.value(icu_sepsis.uniform())) == pytest.approx(0, abs=1e-3)


def test_icu_environment():
    """Its steps have the matrices' probabilities: the survival of 300 patients is within four deviations."""
    env, policy = find_task("icu-sepsis-clinicians").make_env(), icu_sepsis.solve().argmax(1)
    assert env.observation_space.shape == (716,) and env.action_space.n == 25
    returns = []
    for seed in range(300):
        obs, over = env.reset(seed=seed)[0], False
        while not over:
            obs, rew, over, *_ = env.step(policy[obs.argmax()])
        returns.append(rew)
    assert abs(np.mean(returns) - 0.875) < 4 * np.sqrt(0.875 * 0.125 / 300)


def test_learns_cartpole(tmp_path):
    """CQL, in seconds, from a training's mixed play, whose score is 13."""
    options = dict(alpha=0.5, lr=1e-3, target_every=50)
    discrete_cql.train(discrete_cql.Args(steps=1000, eval_every=1000, eval_episodes=5, **options))
    (path,) = (tmp_path / "runs").rglob("checkpoint.pt")
    ((score,),) = (point["scores"] for point in load_checkpoint(path)["curve"])
    assert score > 17
