import json
import os
import shutil
import socket
import sys
import threading
from collections import OrderedDict
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import gymnasium
import gymnasium_robotics
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple, flatten
from minari.data_collector import EpisodeBuffer
from minari.dataset._storages.hdf5_storage import HDF5Storage
from minari.storage.remotes import huggingface

from datasets import Dataset, UserError, find_task, load, minari_io
from datasets.minari_io import _reachable, _references, export_minari, origin, read_minari

gymnasium.register_envs(gymnasium_robotics)
pytestmark = pytest.mark.filterwarnings("ignore")  # minari's and gymnasium's advice
ENVS = {  # Minari id: environment, sizes O, A, number of discrete actions
    "mujoco/hopper/medium-v0": ("Hopper-v4", 11, 3, 0),
    "pendulum-v3": ("Pendulum-v1", 3, 1, 0),
    "D4RL/pointmaze/umaze-v2": ("PointMaze_UMaze-v3", 8, 2, 0),
    "classic/cartpole-v0": ("CartPole-v1", 4, 1, 2),
}
HOPPER = find_task("hopper-medium")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(minari_io, "_reachable", lambda url: False)
    return tmp_path / "minari"


def stack(values):
    """Observations one a step -> one dictionary, tuple or array of all steps, as Minari keeps them."""
    if isinstance(values[0], dict):
        return {key: stack([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return tuple(stack(part) for part in zip(*values))
    return np.array(values)


def episode(env, seed, steps):
    obs, act, rew, done, timeout = [env.reset(seed=seed)[0]], [], [], [], []
    env.action_space.seed(seed)
    while len(act) < steps and not (done and done[-1]):
        act.append(env.action_space.sample())
        for column, value in zip((obs, rew, done, timeout), env.step(act[-1])):
            column.append(value)
    timeout[-1] = not done[-1]
    return EpisodeBuffer(None, seed, None, stack(obs), np.array(act), rew, done, timeout)


def write(dataset_id, env="Pendulum-v1", lengths=(3, 1, 5), **options):
    env = gymnasium.make(env)
    episodes = [episode(env, seed, steps) for seed, steps in enumerate(lengths)]
    return minari.create_dataset_from_buffers(dataset_id, episodes, env, **options)


def made(obs_space, act_space, T=4, act=None, **options):
    """A dataset "made-v0" of two episodes drawn from the spaces, without environment; its observations one by one."""
    obs = [[obs_space.sample() for _ in range(T + 1)] for _ in range(2)]
    act = [[act_space.sample() for _ in range(T)] if act is None else act for _ in range(2)]
    ends = [False] * (T - 1) + [True]
    episodes = [EpisodeBuffer(None, None, None, stack(o), np.array(a), [1.0] * T, ends, ends) for o, a in zip(obs, act)]
    spaces = {"observation_space": obs_space, "action_space": act_space}
    minari.create_dataset_from_buffers("made-v0", episodes, **spaces, **options)
    return obs, act


@pytest.mark.parametrize("dataset_id", ENVS)
def test_rows_are_those_of_minari(dataset_id):
    """Every transition of every episode, the first of each included, against minari's own reading."""
    env_id, *sizes = ENVS[dataset_id]
    write(dataset_id, env_id, lengths=(7, 1, 30, 12))
    task, rows, ends, O, A, discrete = read_minari(dataset_id)
    assert [O, A, discrete] == sizes and rows.dtype == np.float32 and rows.shape[1] == 2 * O + A + 2
    dataset, start = minari.load_dataset(dataset_id), 0
    space, bounds = dataset.observation_space, dataset.action_space
    for data, end in zip(dataset.iterate_episodes(), ends, strict=True):
        assert end - start == len(data)
        for t, row in enumerate(rows[start:end]):
            now, then = (
                flatten(space, {key: value[s] for key, value in data.observations.items()})
                if isinstance(space, Dict)
                else data.observations[s]
                for s in (t, t + 1)
            )
            act = data.actions[t] if discrete else 2 * (data.actions[t] - bounds.low) / (bounds.high - bounds.low) - 1
            columns = [now, np.atleast_1d(act), [data.rewards[t]], then, [data.terminations[t]]]
            np.testing.assert_allclose(row, np.concatenate(columns).astype(np.float32), rtol=1e-6, atol=1e-7)
        start = end


@pytest.mark.parametrize("dataset_id", ENVS)
def test_rows_replay_in_the_evaluation_environment(dataset_id):
    """Flattening and scaling of data and environment are the same, and nothing is shifted by a step."""
    write(dataset_id, ENVS[dataset_id][0], lengths=(2, 20))
    task, rows, ends, O, A, discrete = read_minari(dataset_id)
    env = task.make_env()
    obs = env.reset(seed=1)[0]
    np.testing.assert_allclose(obs, rows[ends[0], :O], atol=1e-6)
    for row in rows[ends[0] : ends[1]]:
        act = row[O : O + A]
        obs, rew, done, *_ = env.step(int(act[0]) if discrete else act)
        np.testing.assert_allclose(obs, row[O + A + 1 : -1], rtol=1e-4, atol=1e-4)
        assert (rew, done) == (pytest.approx(row[O + A], abs=1e-4), row[-1])


def nested():
    """Every kind of space, the keys not in alphabetical order, which gymnasium keeps in an OrderedDict alone."""
    inner = Dict(OrderedDict(z=Discrete(3, start=2), a=Tuple([MultiBinary(2), Box(-1, 1, (2, 2))])))
    return Dict(OrderedDict(pose=Box(-9, 9, (2,), np.float64), grid=MultiDiscrete([2, 3]), deep=inner, b=Box(0, 5, ())))


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
@pytest.mark.parametrize(
    "space", [nested(), Tuple([Discrete(2), Box(0, 1, (3,))]), Discrete(4, start=-1), Box(0, 1, (2, 3))], ids=str
)
def test_observations_are_flattened_as_gymnasium_does(space, data_format):
    if data_format == "arrow":
        pytest.importorskip("pyarrow")
        if space == nested():
            space = Dict({"b": Discrete(3), "a": Box(0, 1, (2,))})
    obs, act = made(space, Box(-1, 1, (2,)), data_format=data_format)
    task, rows, ends, O, A, _ = read_minari("made-v0")
    expected = np.array([[flatten(space, step) for step in steps] for steps in obs], np.float32)
    np.testing.assert_array_equal(rows[:, :O], expected[:, :-1].reshape(8, -1))
    np.testing.assert_array_equal(rows[:, O + A + 1 : -1], expected[:, 1:].reshape(8, -1))
    np.testing.assert_array_equal(rows[:, O : O + A], np.concatenate(act))
    assert ends.tolist() == [4, 8] and rows[:, -1].tolist() == 2 * [0, 0, 0, 1]
    assert not task.evaluable and "names no environment" in task.refusal


def test_actions(root, capsys):
    def actions(space, act):
        made(Box(0, 1, (1,)), space, len(act), act)
        task, rows, *_, discrete = read_minari("made-v0")
        shutil.rmtree(root / "made-v0")
        return rows[: len(act), 1:-3].tolist(), task.refusal, discrete

    space = Box(np.float32([-2, 0]), np.float32([2, 10]))
    scaled, _, discrete = actions(space, np.float32([[-2, 0], [1, 10], [0, 2.5]]))
    assert scaled == [[-1, -1], [0.5, 1], [0, -0.5]] and discrete == 0 and not capsys.readouterr().out
    scaled, *_ = actions(space, np.float32([[-3, 5], [0, 11], [2, 10.000001], [0, 0]]))
    assert scaled == [[-1, 0], [0, 1], [1, 1], [0, -1]]
    assert "4 of 8 actions lay outside the action space" in capsys.readouterr().out
    plain, *_ = actions(Box(-1, 1, (1,)), np.float32([[0.3], [-1]]))
    assert np.float32(plain).tolist() == np.float32([[0.3], [-1]]).tolist()
    index, _, discrete = actions(Discrete(3, start=5), [5, 7])
    assert index == [[0], [2]] and discrete == 3
    free, refusal, _ = actions(Box(-np.inf, np.inf, (1,)), np.float32([[3], [-4]]))
    assert free == [[3], [-4]] and "no bounds" in refusal
    with pytest.raises(UserError, match="an action is none of its 3"):
        actions(Discrete(3), [0, 3])


def test_evaluation_environment(root):
    """The one meant for evaluation if there is one; entries that this gymnasium no longer knows are passed over."""
    write("pendulum-v0", eval_env=gymnasium.make("Pendulum-v1", g=3.0, max_episode_steps=77))
    path = root / "pendulum-v0" / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["eval_env_spec"]) | {"autoreset": False, "apply_api_compatibility": False}
    path.write_text(json.dumps(metadata | {"eval_env_spec": json.dumps(spec)}))
    env = read_minari("pendulum-v0")[0].make_env()
    assert env.unwrapped.g == 3.0 and env.spec.max_episode_steps == 77


def test_empty_episodes_are_passed_over(root):
    write("pendulum-v0", lengths=(2, 3, 2))
    with h5py.File(root / "pendulum-v0" / "data" / "main_data.hdf5", "a") as file:
        for key in ("observations", "actions", "rewards", "terminations"):
            file["episode_1"][key].resize(key == "observations", axis=0)
    _, rows, ends, *_ = read_minari("pendulum-v0")
    assert len(rows) == 4 and ends.tolist() == [2, 4]


@pytest.mark.parametrize(
    "dataset_id, kwargs, d4rl",
    [
        ("D4RL/pen/human-v2", {}, "pen-human"),
        ("D4RL/door/cloned-v2", {}, "door-cloned"),
        ("D4RL/antmaze/medium-play-v1", {"continuing_task": False}, "antmaze-medium-play"),
        ("D4RL/kitchen/complete-v2", {}, "kitchen-complete"),
        # Their returns count a goal in each step after it, and go far beyond D4RL's 1 and 4.
        ("D4RL/antmaze/umaze-v1", {}, None),
        ("D4RL/kitchen/mixed-v2", {"remove_task_when_completed": False}, None),
        ("D4RL/pointmaze/umaze-v2", {}, None),
        ("mujoco/hopper/medium-v0", {}, None),
        ("pen/human-v2", {}, None),
    ],
)
def test_reference_scores(dataset_id, kwargs, d4rl):
    expected = (find_task(d4rl).ref_min, find_task(d4rl).ref_max) if d4rl else (None, None)
    assert _references(dataset_id, {}, {"kwargs": kwargs}) == expected


def test_reference_scores_of_minari_come_first():
    write("D4RL/pen/human-v2", ref_min_score=-5.0, ref_max_score=15.0)
    assert read_minari("D4RL/pen/human-v2")[0].score(np.array([-5, 5, 15])).tolist() == [0, 50, 100]
    write("D4RL/pen/cloned-v2")
    assert read_minari("D4RL/pen/cloned-v2")[0].ref_max == find_task("pen-cloned").ref_max
    write("pendulum-v0")
    assert read_minari("pendulum-v0")[0].score(7.0) == 7.0


def collected(lengths=(7, 1, 30, 12)):
    """Of a hopper that falls, or is stopped."""
    env, tables = HOPPER.make_env(), []
    for seed, steps in enumerate(lengths):
        data = episode(env, seed, steps)
        obs = data.observations
        tables.append(np.column_stack([obs[:-1], data.actions, data.rewards, obs[1:], data.terminations]))
    rows = torch.from_numpy(np.concatenate(tables).astype(np.float32))
    return Dataset(HOPPER, "collected", "abc", rows, np.cumsum([len(table) for table in tables]), 11, 3)


def test_export_round_trip():
    ours = collected()
    export_minari(ours, "ours/hopper/medium-v0")
    dataset, start = minari.load_dataset("ours/hopper/medium-v0"), 0
    for data, end in zip(dataset.iterate_episodes(), ours.ends, strict=True):
        part = ours.split(ours.rows[start:end])
        np.testing.assert_array_equal(data.observations[:-1], part.obs, strict=True)  # float32, as they are
        np.testing.assert_array_equal(data.observations[1:], part.next_obs, strict=True)
        np.testing.assert_array_equal(data.actions, part.act, strict=True)
        np.testing.assert_array_equal(data.rewards, part.rew, strict=True)
        np.testing.assert_array_equal(data.terminations, part.done > 0, strict=True)
        np.testing.assert_array_equal(data.truncations, [*[False] * (end - start - 1), not part.done[-1]], strict=True)
        assert dataset.observation_space.contains(data.observations[0])
        start = end
    assert start == len(ours) == dataset.total_steps and 0 < ours.done.sum() < 4
    assert dataset.recover_environment(eval_env=True).spec.id == "Hopper-v4"
    assert minari.get_normalized_score(dataset, HOPPER.ref_max) == 1
    assert "ours/hopper/medium-v0" in minari.list_local_datasets()
    assert minari.namespace.list_local_namespaces() == ["ours", "ours/hopper"]
    task, rows, ends, O, A, discrete = read_minari("ours/hopper/medium-v0")
    np.testing.assert_array_equal(rows, ours.rows, strict=True)
    np.testing.assert_array_equal(ends, ours.ends)
    assert (O, A, discrete, task.ref_min, task.ref_max) == (11, 3, 0, HOPPER.ref_min, HOPPER.ref_max)
    assert task.make_env().spec.max_episode_steps == 1000


@pytest.mark.parametrize("dataset_id", ENVS)
def test_export_of_what_was_read(dataset_id):
    """The recovered environment has the flat observations and scaled actions of the rows."""
    write(dataset_id, ENVS[dataset_id][0], lengths=(5, 4))
    task, rows, ends, O, A, discrete = read_minari(dataset_id)
    export_minari(Dataset(task, "minari", "", torch.from_numpy(rows), ends, O, A, discrete), f"flat/{dataset_id}")
    again = read_minari(f"flat/{dataset_id}")
    np.testing.assert_array_equal(again[1], rows)
    assert again[3:] == (O, A, discrete)
    env = again[0].make_env()
    assert env.observation_space.shape == (O,) and (discrete or env.action_space.high.tolist() == [1] * A)


def test_load():
    """Through the flat cache of datasets/store.py, which is made again when the dataset has changed."""
    export_minari(collected(), "ours/hopper/medium-v0")
    first, before = load("ours/hopper/medium-v0"), origin("ours/hopper/medium-v0")
    assert torch.equal(load("ours/hopper/medium-v0").rows, first.rows)
    dataset = minari.load_dataset("ours/hopper/medium-v0")
    dataset.update_dataset_from_buffer([episode(HOPPER.make_env(), 9, 5)])
    assert origin("ours/hopper/medium-v0") != before
    assert len(load("ours/hopper/medium-v0")) == len(first) + 5


def test_export_errors(root, monkeypatch):
    ours = collected()
    write("taken-v0")
    before = (root / "taken-v0" / "data" / "main_data.hdf5").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        export_minari(ours, "taken-v0")
    assert (root / "taken-v0" / "data" / "main_data.hdf5").read_bytes() == before
    with pytest.raises(UserError, match="no Minari id"):
        export_minari(ours, "no version")
    shuffled = Dataset(HOPPER, "", "", ours.rows.flip(0), ours.ends, 11, 3)
    with pytest.raises(UserError, match="order of time"):
        export_minari(shuffled, "new/x-v0")
    for error, kind in ((OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def stop(storage, episodes, error=error):
            next(iter(episodes))
            raise error

        monkeypatch.setattr(HDF5Storage, "update_episodes", stop)
        with pytest.raises(kind) as caught:
            export_minari(ours, "new/x-v0")
        assert kind is KeyboardInterrupt or "No space left on device); nothing was kept" in str(caught.value)
    assert [path.name for path in root.iterdir()] == ["taken-v0"]


def change(path, **values):
    metadata = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))


def h5(path, change):
    with h5py.File(path, "a") as file:
        change(file)


def put(file, key, value, index=1):
    file[key][index] = value


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data, file: os.truncate(file, 100), "damaged or no dataset"),
        (lambda data, file: file.unlink(), "damaged or no dataset"),
        (lambda data, file: (data / "metadata.json").unlink(), "No data found"),
        (lambda data, file: (data / "metadata.json").write_text("{"), "damaged or no dataset"),
        (lambda data, file: shutil.rmtree(data), "doesn't exist"),
        (lambda data, file: change(data / "metadata.json", total_episodes=4), "it lacks episode_3/observations"),
        (lambda data, file: change(data / "metadata.json", total_episodes=0), "holds no transitions"),
        (lambda data, file: change(data / "metadata.json", total_episodes=None), "total_episodes"),
        (lambda data, file: h5(file, lambda f: f.pop("episode_1/rewards")), "rewards"),
        (
            lambda data, file: h5(file, lambda f: f["episode_2/observations"].resize(5, 0)),
            "episode 2 has 5 observations",
        ),
        (
            lambda data, file: h5(file, lambda f: put(f, "episode_0/rewards", np.nan)),
            "in row 1, the reward is not finite",
        ),
        (lambda data, file: h5(file, lambda f: put(f, "episode_2/actions", np.inf)), "in row 5, the action is not"),
        (lambda data, file: h5(file, lambda f: put(f, "episode_0/observations", -np.inf)), "in row 0, the next obs"),
        (
            lambda data, file: h5(file, lambda f: put(f, "episode_2/observations", np.nan, 0)),
            "in row 4, the observation",
        ),
    ],
)
def test_damaged_datasets(root, damage, message):
    write("pendulum-v0")
    data = root / "pendulum-v0" / "data"
    damage(data, data / "main_data.hdf5")
    with pytest.raises(UserError, match=message) as caught:
        read_minari("pendulum-v0")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_learned_from(root):
    for obs, act, message in (
        (Dict({"camera": Box(0, 255, (40, 40, 3), np.uint8)}), Discrete(2), "observations/camera are images"),
        (Box(0, 255, (7, 7, 3), np.uint8), Discrete(2), "observations are images"),
        (Box(0, 1, (2,)), MultiDiscrete([2, 2]), "neither a vector nor"),
        (Box(0, 1, (2,)), Box(-1, 1, (2, 2)), "neither a vector nor"),
    ):
        made(obs, act)
        with pytest.raises(UserError, match=message):
            read_minari("made-v0")
        shutil.rmtree(root / "made-v0")
    path = write("texts-v0").spec.data_path
    change(Path(path) / "metadata.json", observation_space=minari.serialization.serialize_space(Text(5)))
    with pytest.raises(UserError, match="of the kind Text"):
        read_minari("texts-v0")


def test_a_missing_package(monkeypatch):
    change(Path(write("pendulum-v0").spec.data_path) / "metadata.json", data_format="arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "minari.dataset._storages.arrow_storage", raising=False)
    with pytest.raises(UserError, match='missing: pyarrow is not installed. Please .* "minari\\[arrow\\]"`.$'):
        read_minari("pendulum-v0")


class Hub:
    """As much of huggingface_hub.HfApi as minari uses, over the folder `source`; snapshot_download may break off."""

    source = None
    breaks = False

    def __init__(self, token=None):
        pass

    def list_datasets(self, author, dataset_name):
        repos = [path.name for path in self.source.iterdir() if dataset_name in path.name]
        return [type("Info", (), {"id": f"{author}/{repo}"}) for repo in repos]

    def hf_hub_download(self, repo_id, filename, repo_type):
        return self.source / repo_id.split("/")[1] / filename

    def snapshot_download(self, repo_id, allow_patterns, repo_type, local_dir):
        inside = allow_patterns.removesuffix("/*")
        source, target = self.source / repo_id.split("/")[1] / inside / "data", Path(local_dir) / inside / "data"
        target.mkdir(parents=True)
        shutil.copy(source / "metadata.json", target)
        if self.breaks:
            raise self.breaks
        shutil.copy(source / "main_data.hdf5", target)


@pytest.fixture
def hub(root, tmp_path, monkeypatch):
    """A remote with one dataset, online/pendulum/good-v1; here there is local-v0."""
    write("online/pendulum/good-v1")
    names = {"datasets": ["online/pendulum/good-v1"]}
    (root / "online" / "namespace_metadata.json").write_text(json.dumps(names))
    root.rename(tmp_path / "hub")
    write("local-v0")
    monkeypatch.setattr(huggingface, "HfApi", Hub)
    monkeypatch.setattr(Hub, "source", tmp_path / "hub")
    monkeypatch.setattr(minari_io, "_reachable", lambda url: True)


def test_download(hub, root, monkeypatch, capsys):
    assert len(read_minari("online/pendulum/good-v1")[1]) == 9
    assert "Downloading online/pendulum/good-v1 from hf://farama-minari" in capsys.readouterr().out
    assert len(minari.load_dataset("online/pendulum/good-v1")) == 3
    assert sorted(path.name for path in root.iterdir()) == ["local-v0", "online"]
    monkeypatch.setattr(huggingface, "HfApi", None)  # from here on it is local
    assert len(read_minari("online/pendulum/good-v1")[1]) == 9


@pytest.mark.parametrize("error", [ConnectionError("reset by peer"), KeyboardInterrupt()], ids=["lost", "interrupted"])
def test_half_a_download_is_nothing(hub, root, monkeypatch, error):
    monkeypatch.setattr(Hub, "breaks", error)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError) as caught:
        read_minari("online/pendulum/good-v1")
    assert isinstance(error, KeyboardInterrupt) or "reset by peer); nothing was kept" in str(caught.value)
    assert [path.name for path in root.iterdir()] == ["local-v0"]
    monkeypatch.setattr(Hub, "breaks", False)
    assert len(read_minari("online/pendulum/good-v1")[1]) == 9


def test_unknown_ids(hub, root, monkeypatch):
    with pytest.raises(
        UserError, match="here or at hf://farama-minari; the nearest: online/pendulum/good-v1, local-v0"
    ):
        read_minari("online/pendulum/god-v1")
    with pytest.raises(UserError, match="here or at hf://farama-minari; the nearest: local-v0"):
        read_minari("locale-v0")
    monkeypatch.setattr(minari_io, "_reachable", lambda url: False)
    with pytest.raises(UserError, match="here, and https://huggingface.co cannot be reached; the nearest: local-v0"):
        read_minari("mujoco/hopper/medium-v0")
    for bad in ("hopper-medium", "../../etc-v0", "a b-v0", ""):
        with pytest.raises(UserError, match="no Minari id"):
            read_minari(bad)
    (root / "local-v0").rename(root / "file")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root / "file" / "data" / "metadata.json" / "x"))
    with pytest.raises(UserError, match="set MINARI_DATASETS_PATH"):
        read_minari("mujoco/hopper/medium-v0")


def test_reachable():
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request).start()
        assert _reachable(f"http://127.0.0.1:{server.server_port}")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not _reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)
    assert not _reachable("http://127.0.0.1:9") and not _reachable("no address")
