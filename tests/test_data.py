import dataclasses
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import time

import gymnasium
import h5py
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, Here, children, fails, start, wait_for_the_end

from datasets import BODIES, Dataset, Task, UserError, collect, find_task, load, show
from datasets.collect import assemble, fingerprint, load_policy, plan, rollout, spread
from datasets.store import read_hdf5, write_hdf5

HOPPER = find_task("hopper-medium")
O, A = 11, 3  # Hopper's


@pytest.fixture
def hopper_policy(tmp_path):
    """A policy file as algorithms/sac.py writes it, untrained: its hopper falls after some twenty steps."""
    rng = np.random.default_rng(0)
    sizes = (O, 256, 256, 2 * A)
    arrays = {}
    for layer, (i, o) in zip((0, 2, 4), zip(sizes, sizes[1:])):
        arrays[f"{layer}.weight"] = rng.uniform(-1, 1, (o, i)).astype(np.float16) / np.float16(np.sqrt(i))
        arrays[f"{layer}.bias"] = np.zeros(o, np.float16)
    np.savez(tmp_path / "hopper.npz", **arrays)
    return tmp_path / "hopper.npz"


@pytest.mark.parametrize(
    "body, env_id, obs_dim, act_dim, low, high",
    [
        ("halfcheetah", "HalfCheetah-v4", 17, 6, -280.178953, 12135.0),
        ("hopper", "Hopper-v4", 11, 3, -20.272305, 3234.3),
        ("walker2d", "Walker2d-v4", 17, 6, 1.629008, 4592.3),
    ],
)
def test_catalog_has_d4rl_facts(body, env_id, obs_dim, act_dim, low, high):
    for quality in ("random", "medium", "medium-replay", "medium-expert", "expert"):
        task = find_task(f"{body}-{quality}-v2")
        assert (task.env_id, task.score(low), task.score(high)) == (env_id, 0, 100)
    env = task.make_env()
    assert (env.observation_space.shape, env.action_space.shape) == ((obs_dim,), (act_dim,))
    assert env.spec.max_episode_steps == 1000
    assert np.all(env.action_space.high == 1) and np.all(env.action_space.low == -1)


def test_rollout_marks_terminals_and_timeouts(hopper_policy):
    rows = rollout(HOPPER, hopper_policy, 1000, seed=3)
    obs, next_obs, done, timeout = rows[:, :O], rows[:, O + A + 1 : -2], rows[:, -2], rows[:, -1]
    assert rows.shape == (1000, 2 * O + A + 3)
    assert done.sum() > 20 and timeout.sum() == 1 and timeout[-1] == 1  # only the last, cut, episode timed out
    inside = (done[:-1] + timeout[:-1]) == 0
    np.testing.assert_array_equal(next_obs[:-1][inside], obs[1:][inside])
    assert not np.any(np.all(next_obs[:-1][~inside] == obs[1:][~inside], axis=1))
    assert np.all(np.abs(rows[:, O : O + A]) <= 1)


def test_rollout_replays_in_the_environment(hopper_policy):
    """The rewards and observations of an episode are those of its actions: nothing is shifted by a step."""
    rows = rollout(HOPPER, hopper_policy, 300, seed=4)
    env = HOPPER.make_env()
    env.reset(seed=0)
    qpos_qvel = np.concatenate([[0.0], rows[0, :O]])  # Hopper's observation lacks the root's x, which moves nothing
    env.unwrapped.set_state(qpos_qvel[:6], qpos_qvel[6:])
    for row in rows[:5]:
        next_obs, rew, *_ = env.step(row[O : O + A])
        np.testing.assert_allclose(next_obs, row[O + A + 1 : -2], atol=1e-4)
        assert rew == pytest.approx(row[O + A], abs=1e-3)


def test_episodes_count_in_the_order_of_their_start(hopper_policy):
    """Taking episodes as they end would prefer short ones: a longer collection must begin with the shorter one."""
    short, long = rollout(HOPPER, hopper_policy, 200, seed=5), rollout(HOPPER, hopper_policy, 600, seed=5)
    np.testing.assert_array_equal(short[:, :-1], long[:200, :-1])


def test_halfcheetah_times_out(here, tmp_path):
    path = tmp_path / "x.hdf5"
    collect.collect(find_task("halfcheetah-medium"), path, 3000)
    with h5py.File(path) as file:
        assert not file["terminals"][:].any()
        np.testing.assert_array_equal(np.flatnonzero(file["timeouts"][:]), [999, 1999, 2999])
    data = read_hdf5(path)
    assert data.done.sum() == 0
    np.testing.assert_array_equal(data.ends, [1000, 2000, 3000])
    # The row after a time-out begins another episode, so the next observation cannot be read from it.
    assert not torch.equal(data.next_obs[999], data.obs[1000])


def test_the_same_bytes_twice(tmp_path, monkeypatch):
    """Three jobs, done here and by two workers."""
    task = find_task("halfcheetah-medium")
    monkeypatch.setattr(collect, "SHARD", 2000)
    assert len(plan(task, 5000)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(collect, "ProcessPoolExecutor", Here)
        collect.collect(task, tmp_path / "here.hdf5", 5000)
    monkeypatch.setattr(collect, "cores", lambda: 2)
    collect.collect(task, tmp_path / "two.hdf5", 5000)
    assert (tmp_path / "here.hdf5").read_bytes() == (tmp_path / "two.hdf5").read_bytes()


def test_sizes_are_whole_episodes():
    assert sum(spread(202_000, 19)) == 202_000
    assert all(size % 1000 == 0 for size in spread(202_000, 19))
    assert spread(500, 1) == [500]
    jobs = plan(find_task("halfcheetah-medium-replay"))
    assert sum(size for _, size, _ in jobs) == 202_000
    assert len({seed for *_, seed in jobs}) == len(jobs)
    assert sum(size for _, size, _ in plan(find_task("halfcheetah-medium"))) == 1_000_000


def test_fingerprint_follows_policies_and_sizes(hopper_policy, tmp_path):
    jobs = [(hopper_policy, 1000, 0)]
    first = fingerprint(HOPPER, jobs)
    assert fingerprint(HOPPER, jobs) == first
    assert fingerprint(HOPPER, [(hopper_policy, 2000, 0)]) != first
    other = tmp_path / "other.npz"
    other.write_bytes(hopper_policy.read_bytes() + b"\0")
    assert fingerprint(HOPPER, [(other, 1000, 0)]) != first


def toy():
    """Three episodes, of 3, 1 and 2 steps; O = 11, A = 3; every number tells where it belongs."""
    rows = torch.arange(6.0)[:, None] + torch.arange(2 * O + A + 2.0) / 100
    rows[:, O + A] = torch.tensor([1.0, 1, 1, 10, 2, 2])
    rows[:, -1] = torch.tensor([0.0, 0, 1, 0, 0, 1])
    return Dataset(HOPPER, "toy", "", rows, [3, 4, 6], O, A)


def test_fingerprints_are_those_of_the_published_data():
    """Records and statistics.json carry them: whoever moves a module or renames a task must leave them as they are."""
    rows = json.loads((ROOT / "datasets" / "statistics.json").read_text())
    rows = [row for row in rows if row["source"] == "collected"]
    assert {row["task"]: fingerprint(find_task(row["task"]), plan(find_task(row["task"]))) for row in rows} == {
        row["task"]: row["fingerprint"] for row in rows
    }


@pytest.mark.parametrize("module, name", [("mazes", "stitch-gap"), ("d4rl_envs", "antmaze-umaze")])
def test_older_files_name_modules_elsewhere(module, name):
    task = find_task(name)
    saved = dataclasses.asdict(task) | {"env_id": task.env_id.replace("datasets.tasks.", "datasets.")}
    assert saved["env_id"].startswith(f"datasets.{module}:") and Task(**saved) == task
    task.make_env()


def test_columns_and_returns():
    data = toy()
    row = data.rows[4]
    assert torch.equal(data.obs[4], row[:O]) and torch.equal(data.act[4], row[O : O + A])
    assert torch.equal(data.next_obs[4], row[O + A + 1 : -1]) and data.done.tolist() == [0, 0, 1, 0, 0, 1]
    np.testing.assert_array_equal(data.returns(), [3, 10, 4])
    data.rew *= 0.5
    np.testing.assert_array_equal(data.returns(), [1.5, 5, 2])


def test_sample_keeps_rows_together():
    torch.manual_seed(0)
    data = toy()
    batch = data.sample(1000)
    index = batch.obs[:, 0].long()
    assert set(index.tolist()) == set(range(6))
    for column, whole in zip(batch, (data.obs, data.act, data.rew, data.next_obs, data.done)):
        assert torch.equal(column, whole[index])


def test_keep():
    data = toy()
    data.keep([2, 1])
    assert data.ends.tolist() == [2, 3] and data.rew.tolist() == [2, 2, 10] and len(data) == 3


def test_normalize_obs(small):
    data, raw = read_hdf5(small), read_hdf5(small)
    data.normalize_obs()
    obs = raw.obs.double().numpy()
    mean, std = obs.mean(0), obs.std(0, ddof=1) + 1e-3
    np.testing.assert_allclose(data.obs_mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(data.obs, (obs - mean) / std, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(data.next_obs, (raw.next_obs.numpy() - mean) / std, rtol=1e-3, atol=1e-3)
    assert torch.equal(data.act, raw.act) and torch.equal(data.rew, raw.rew)


def test_buffer_replaces_the_oldest():
    data = Dataset.buffer(HOPPER, 3)
    for i in range(5):
        data.add(np.full(O, i), np.full(A, i), i, np.full(O, i + 1), i == 4)
    assert len(data) == 3 and data.rew.tolist() == [3, 4, 2] and data.done.tolist() == [0, 1, 0]
    other = Dataset.buffer(HOPPER, 3)
    other.load_state_dict(data.state_dict())
    assert torch.equal(other.rows, data.rows) and (other.added, other.size) == (5, 3)


def test_buffer_is_saved_without_its_empty_rows():
    data, file = Dataset.buffer(HOPPER, 100_000), io.BytesIO()
    data.add(np.zeros(O), np.zeros(A), 0, np.zeros(O), False)
    torch.save(data.state_dict(), file)
    assert file.tell() < 10_000


def test_evaluate_is_the_plain_loop():
    """Against one environment after the other; hoppers fall at different times, and none may disturb the rest."""
    data = Dataset.buffer(HOPPER, 0)
    data.obs_mean, data.obs_std = torch.full((O,), 0.1), torch.full((O,), 2.0)

    def policy(obs):
        return torch.stack([obs[:, 2] * 3, obs[:, 5], 2 * obs[:, 7]], 1)  # goes beyond [-1, 1], and is clipped

    expected = []
    for i in range(4):
        env = gymnasium.make("Hopper-v4")
        obs, total, over = env.reset(seed=2000 + i)[0], 0.0, False
        while not over:
            x = (torch.tensor(obs[None], dtype=torch.float32) - 0.1) / 2.0
            obs, rew, terminated, truncated, _ = env.step(policy(x)[0].clamp(-1, 1).numpy())
            total, over = total + rew, terminated or truncated
        expected.append(total)
    returns = data.evaluate(policy, 4, seed=2)
    assert len(set(returns)) == 4
    np.testing.assert_allclose(returns, expected, rtol=1e-6)
    np.testing.assert_array_equal(data.evaluate(policy, 4, seed=2), returns)


def test_evaluation_draws_apart():
    """What a policy draws: the same in each evaluation of a seed, another in another's; the run's numbers stay."""
    data, noisy = Dataset.buffer(HOPPER, 0), lambda obs: torch.rand(len(obs), 3)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, again, other = (data.evaluate(noisy, 2, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_load_policy_is_sac(hopper_policy):
    from algorithms import sac

    actor = sac.Actor(O, A)
    sac.save_policy(hopper_policy, actor)
    obs = torch.randn(4, O)
    mean, log_std = load_policy(hopper_policy)(obs.numpy())
    expected = actor.net(obs).detach().numpy()
    np.testing.assert_allclose(np.hstack([mean, log_std]), expected, atol=2e-3)  # float16


def test_cache(here, monkeypatch, capsys):
    """Collected once; a truncated file is not used but collected again; a whole one is read as it is."""
    monkeypatch.setattr(collect, "plan", lambda task, n=0: plan(task, n or 3000))
    task = find_task("halfcheetah-medium")
    first = load("halfcheetah-medium-v2", "collected")
    path = collect.collected_file(task)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = load("halfcheetah-medium")
    assert "damaged" in capsys.readouterr().out
    assert torch.equal(again.rows, first.rows) and path.read_bytes() == whole
    monkeypatch.setattr(collect, "collect", None)  # from here on, it must not be called
    assert torch.equal(load("halfcheetah-medium").rows, first.rows)


def test_rows_survive_the_file(tmp_path, hopper_policy):
    rows = rollout(HOPPER, hopper_policy, 500, seed=6)
    write_hdf5(tmp_path / "x.hdf5", assemble(HOPPER, "abc", rows))
    data = read_hdf5(tmp_path / "x.hdf5")
    np.testing.assert_array_equal(data.rows, rows[:, :-1])
    np.testing.assert_array_equal(data.ends, np.flatnonzero(rows[:, -2] + rows[:, -1]) + 1)
    assert (data.task, data.source, data.fingerprint) == (HOPPER, "collected", "abc")


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nearest names are hopper-medium"):
        load("hoper-medium")
    with pytest.raises(UserError, match="Unknown --env 'ant'"):
        find_task("ant", BODIES)
    (tmp_path / "policies.toml").write_text("[walker2d]\nmedium = [1000]\n")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="policy of walker2d-medium does not exist"):
        patch.setattr(collect, "POLICIES", tmp_path)
        load("walker2d-medium-expert", "collected")
    with pytest.raises(UserError, match="pen-human cannot be collected here, only halfcheetah-random"):
        load("pen-human", "collected")
    with pytest.raises(UserError, match="D4RL has no data called stitch-gap"):
        load("stitch-gap", "d4rl")
    with pytest.raises(UserError, match="Unknown --source"):
        load("halfcheetah-medium", "elsewhere")
    with pytest.raises(UserError, match="There is no file"):
        load(str(tmp_path / "no.hdf5"))
    (tmp_path / "text.hdf5").write_text("not HDF5")
    with pytest.raises(UserError, match="damaged or not a dataset"):
        load(str(tmp_path / "text.hdf5"))
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["observations"] = np.zeros((3, O))
    with pytest.raises(UserError, match="lacks actions, rewards, terminals, timeouts"):
        load(str(tmp_path / "other.hdf5"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("OFFLINE_RL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="Cannot use the cache folder"):
        load("halfcheetah-medium")


def test_full_disk_while_collecting(tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    words = ("datasets/collect.py", "--env", "halfcheetah-medium", "--transitions", 2000, "--out", tmp_path / "x.hdf5")
    assert "Cannot write" in fails(*words, preexec_fn=small_files)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_collection_leaves_nothing(tmp_path):
    words = (
        "datasets/collect.py",
        "--env",
        "halfcheetah-medium",
        "--transitions",
        400_000,
        "--out",
        tmp_path / "x.hdf5",
    )
    process = start(*words, start_new_session=True)
    begun = ""
    while "collect" not in begun:  # the progress bar: the workers are starting
        begun = process.stderr.readline(10)
        assert begun, "it ended before it had begun"
    time.sleep(random.random() * 4)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it, to the workers too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Stopped while collecting" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers_by", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_killed_collection_leaves_nothing_half(workers_by, tmp_path, monkeypatch):
    """kill -9 at random moments: the file is whole or absent, no worker lives on, leftovers go the next time."""
    path, task = tmp_path / "x.hdf5", find_task("stitch-meet")
    get_context = multiprocessing.get_context
    context = get_context("fork")  # quicker than so many new interpreters, here and, unless slow, for the workers
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: get_context(workers_by))
    seconds, whole, workers = 0.0, None, []
    for _ in range(11):
        process, start = context.Process(target=collect.collect, args=(task, path, 3000)), time.time()
        process.start()
        if whole is None:  # undisturbed
            process.join()
            seconds, whole = time.time() - start, path.read_bytes()
        else:
            while process.is_alive() and not children(process.pid):  # the worker
                time.sleep(0.001)
            process.join(random.random() * seconds)
            if process.is_alive():
                workers += children(process.pid)
            process.kill()
            process.join()
        if path.exists():
            assert path.read_bytes() == whole
            path.unlink()
    assert workers
    wait_for_the_end(workers)
    (tmp_path / f".x.hdf5.{process.pid}").touch()  # as if it had died while it wrote
    collect.collect(task, path, 3000)
    assert list(tmp_path.iterdir()) == [path]


def test_two_build_the_same_cache(here, monkeypatch):
    """Two processes at once, each of which finds no cache: both end with the whole dataset."""
    monkeypatch.setattr(collect, "plan", lambda task, n=0: plan(task, n or 3000))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=load, args=("stitch-gap", "collected")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    path = collect.collected_file(find_task("stitch-gap"))
    assert list(path.parent.iterdir()) == [path] and len(load("stitch-gap")) == 3000


def test_export_command(here, tmp_path):
    """collect.py --minari writes a dataset that load reads back, row for row."""
    words = ("--env", "stitch-meet", "--transitions", 2000, "--out", tmp_path / "x.hdf5", "--minari", "test/stitch-v0")
    process = start("datasets/collect.py", *words)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    ours, theirs = load(str(tmp_path / "x.hdf5")), load("test/stitch-v0")
    assert torch.equal(ours.rows, theirs.rows) and (ours.ends == theirs.ends).all()
    assert theirs.source == "minari" and theirs.task.ref_max == 1
    with pytest.raises(UserError, match="exists already"):
        collect.main(tyro.cli(collect.Args, args=[*map(str, words)]))


def test_readme_own_data(tmp_path, monkeypatch):
    """The README's ten lines, on episodes of which one terminates and one is cut."""
    rng = np.random.default_rng(0)
    episodes = [
        (rng.normal(size=(T + 1, O)), rng.uniform(-1, 1, (T, A)), rng.normal(size=T), terminated)
        for T, terminated in ((30, True), (20, False))
    ]
    code = (ROOT / "README.md").read_text().split("### Bring your own data")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {"episodes": episodes})
    data = load("mine.hdf5", eval_env="Hopper-v4")
    assert data.ends.tolist() == [30, 50] and np.flatnonzero(data.done).tolist() == [29]
    for (obs, act, rew, _), rows in zip(episodes, (slice(0, 30), slice(30, 50))):
        np.testing.assert_allclose(data.obs[rows], obs[:-1], rtol=1e-6)
        np.testing.assert_allclose(data.next_obs[rows], obs[1:], rtol=1e-6)
        np.testing.assert_allclose(data.act[rows], act, rtol=1e-6)
        np.testing.assert_allclose(data.rew[rows], rew, rtol=1e-6)


def test_show(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect, "plan", lambda task, n=0: plan(task, n or 2000))
    monkeypatch.setattr(show, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="No dataset is at hand"):
        show.main()
    for name in ("hopper-medium", "stitch-gap"):
        load(name, "collected")
    show.main()
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "statistics.json").read_text())
    assert [row["task"] for row in rows] == ["hopper-medium", "stitch-gap"]
    assert rows[0]["transitions"] == 2000 and sum(rows[0]["histogram"]) == rows[0]["episodes"]
    assert "| 1422 ± 379 |" in out and "not at hand: python datasets/collect.py --env hopper-random" in out
    assert all((tmp_path / name).stat().st_size > 2000 for name in ("returns.png", "mazes.png"))


def test_collect_arguments():
    for words, message in (
        ([], "Give one task"),
        (["--env", "halfcheetah-medium", "--transitions", "10"], "go together"),
        (["--env", "halfcheeta-medium"], "nearest names"),
    ):
        with pytest.raises(UserError, match=message):
            collect.main(tyro.cli(collect.Args, args=words))


def test_next_act():
    """The next row's action within an episode, 0 after a termination, and no row where an episode was cut."""
    O, A, lengths, ended = 2, 1, (3, 1, 1, 2, 3), (True, False, True, False, True)
    N, ends = sum(lengths), np.cumsum(lengths)
    rows = torch.arange(1.0, N + 1).repeat_interleave(2 * O + A + 2).view(N, -1)  # row k holds k + 1
    rows[:, -1] = 0
    rows[ends[list(ended)] - 1, -1] = 1
    data = Dataset(find_task("hopper-medium"), "file", "", rows, ends, O, A)
    returns = data.returns()
    data.add_next_act()
    batch = data.split(data.rows)
    assert batch.act[:, 0].tolist() == batch.rew.tolist() == [1, 2, 3, 5, 6, 8, 9, 10]
    assert batch.next_act[:, 0].tolist() == [2, 3, 0, 0, 7, 9, 10, 0]
    assert data.ends.tolist() == [3, 4, 5, 8] and len(data) == 8
    assert data.returns()[[0, 1, 3]].tolist() == returns[[0, 2, 4]].tolist()
    assert data.sample(4, 3).next_act.shape == (3, 4, 1) and data.next_obs.shape == (8, O)
