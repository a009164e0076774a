"""D4RL's files: rows as its own qlearning_dataset makes them, downloads from a server that misbehaves, bad files."""

import functools
import http.server
import os
import signal
import threading
import time

import h5py
import numpy as np
import pytest
import torch
from conftest import start

from datasets import UserError, collect, d4rl, find_task, load, store
from datasets.collect import plan
from datasets.d4rl import transitions

HOPPER = find_task("hopper-medium")
O, A = 11, 3  # Hopper's


def arrays(lengths, terminal, seed=0):
    """What D4RL's file of some episodes holds; `terminal` says of each whether it ends so, or by a time-out."""
    rng, N = np.random.default_rng(seed), sum(lengths)
    ends = np.cumsum(lengths) - 1
    done, timeouts = np.zeros(N, bool), np.zeros(N, bool)
    done[ends], timeouts[ends] = terminal, ~np.array(terminal)
    return {
        "observations": rng.normal(size=(N, O)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (N, A)).astype(np.float32),
        "rewards": rng.normal(size=N).astype(np.float32),
        "terminals": done,
        "timeouts": timeouts,
        "next_observations": rng.normal(size=(N, O)).astype(np.float32),  # in D4RL's v2 files; its reader ignores them
        "infos/qpos": rng.normal(size=(N, 6)),
        "metadata/algorithm": np.bytes_("SAC"),
    }


def write(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column, **({"compression": "gzip"} if np.ndim(column) else {}))
    return path


@pytest.fixture
def d4rl_folder(tmp_path):
    return tmp_path / "d4rl"


def loop(columns, limit=1000):
    """qlearning_dataset, row after row, from its description: the indices that it keeps."""
    kept, count = [], 0
    for i in range(len(columns["rewards"]) - 1):
        final = columns["timeouts"][i] if "timeouts" in columns else count == limit - 1
        if final:
            count = 0
            continue
        kept.append(i)
        count = 1 if columns["terminals"][i] else count + 1
    return kept


@pytest.mark.parametrize("with_timeouts", [True, False])
def test_rows_are_those_of_qlearning_dataset(tmp_path, with_timeouts):
    columns = arrays([7, 1, 20, 5, 9, 3], [True, True, False, False, True, False])
    if not with_timeouts:
        del columns["timeouts"]
    rows, ends, *sizes = transitions(write(tmp_path / "x.hdf5", columns), max_episode_steps=10)
    kept = loop(columns, limit=10)
    assert sizes == [O, A] and len(rows) == len(kept)
    np.testing.assert_array_equal(rows[:, :O], columns["observations"][kept])
    np.testing.assert_array_equal(rows[:, O : O + A], columns["actions"][kept])
    np.testing.assert_array_equal(rows[:, O + A], columns["rewards"][kept])
    np.testing.assert_array_equal(rows[:, O + A + 1 : -1], columns["observations"][np.add(kept, 1)])
    np.testing.assert_array_equal(rows[:, -1], columns["terminals"][kept])
    assert ends[-1] == len(rows)
    if with_timeouts:  # each time-out costs its episode one row, and so does the last row of the file
        np.testing.assert_array_equal(ends, np.cumsum([7, 1, 19, 4, 9, 2]))


def test_naive_reading_is_wrong(tmp_path):
    """What a reader gets who takes the next row for the next observation, or a time-out for a termination."""
    columns = arrays([10, 10, 10], [False, False, True])
    rows, *_ = transitions(write(tmp_path / "x.hdf5", columns))
    naive_next = columns["observations"][1:]
    assert len(rows) == 27 and len(naive_next) == 29
    across = columns["observations"][10]  # the start of the second episode
    assert (naive_next[9] == across).all()  # naively it follows the first episode's end
    assert not (rows[:, O + A + 1 : -1] == across).all(1).any()
    assert rows[:, -1].sum() == 0  # no time-out is a termination; the only terminal is the row that has no next one
    assert (columns["terminals"] | columns["timeouts"]).sum() == 3


def test_load_and_cache(d4rl_folder, monkeypatch, capsys):
    columns = arrays([50] * 20, [False, True] * 10)
    path = write(d4rl.local_file(HOPPER), columns)
    assert path == d4rl_folder / "hopper_medium-v2.hdf5"
    data = load("hopper-medium-v2", "d4rl")
    assert (data.source, data.task) == ("d4rl", HOPPER) and len(data) == 20 * 50 - 10 - 1
    assert "hopper-medium, source d4rl" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(d4rl, "transitions", None)  # the second time, the flat file is read
        again = load("hopper-medium")  # auto: the file is there
    assert torch.equal(again.rows, data.rows) and (again.ends == data.ends).all()
    assert again.fingerprint == data.fingerprint
    columns["rewards"] += 1
    write(path, columns)
    changed = load("hopper-medium", "d4rl")
    assert "have changed" in capsys.readouterr().out
    torch.testing.assert_close(changed.rew, data.rew + 1)
    assert changed.fingerprint != data.fingerprint


def test_versions_are_different_files():
    assert find_task("hopper-medium-v0").d4rl_file == "gym_mujoco/hopper_medium.hdf5"
    assert find_task("hopper-medium-v2") is HOPPER is find_task("Hopper-Medium")
    assert find_task("antmaze-umaze").rew_shift == -1
    with pytest.raises(UserError, match="nearest names are hopper-medium"):
        find_task("hopper-medium-v7")


def test_bad_files(d4rl_folder, tmp_path):
    good = arrays([30, 30], [True, False])
    place = d4rl.local_file(HOPPER)
    bad = {
        "has no transitions": {**good, "rewards": good["rewards"][:0]},
        "different lengths": {**good, "actions": good["actions"][:-1]},
        "rows that are not finite, the first is row 3": {**good, "rewards": np.where(np.arange(60) == 3, np.nan, 1)},
        "another task's file": {**good, "observations": np.zeros((60, 17), np.float32)},
        "lacks rewards": {key: column for key, column in good.items() if key != "rewards"},
    }
    for message, columns in bad.items():
        with pytest.raises(UserError, match=message):
            write(place, columns)
            load("hopper-medium", "d4rl")
    place.write_bytes(write(tmp_path / "whole.hdf5", good).read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        load("hopper-medium", "d4rl")
    place.unlink()
    place.mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        load("hopper-medium", "d4rl")
    assert not list(store.cache_dir().iterdir())


def test_own_file(tmp_path, capsys):
    columns = arrays([30, 20, 10], [True, False, False])
    columns["actions"][4, 0] = 1.5
    path = write(tmp_path / "mine.hdf5", columns)
    data = load(str(path), eval_env="Hopper-v4")
    out = capsys.readouterr().out
    assert "1 actions of" in out and "clipped" in out and "raw return" in out
    assert len(data) == 60 and data.ends.tolist() == [30, 50, 60] and data.act.max() <= 1
    np.testing.assert_array_equal(data.next_obs, columns["next_observations"])  # its own, at time-outs too
    assert data.evaluate(lambda obs: torch.zeros(len(obs), A), 2, seed=0).shape == (2,)
    del columns["next_observations"]
    data = load(str(write(path, columns)))
    assert "not evaluated" in capsys.readouterr().out
    assert len(data) == 58 and data.evaluate(None, 2, seed=0) is None
    for words, message in (
        ({"eval_env": "HalfCheetah-v4"}, "11 observations and 3 actions"),
        ({"eval_env": "Hoper-v4"}, "Cannot make the environment of mine: Environment `Hoper`"),
    ):
        with pytest.raises(UserError, match=message):
            load(str(path), **words)
    del columns["timeouts"]
    with pytest.raises(UserError, match="lacks timeouts: see 'bring your own data'"):
        load(str(write(path, columns)))


class Server(http.server.BaseHTTPRequestHandler):
    """A server with one file, and one fault at a time."""

    content, fault, served = b"", "", []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.served.append(self.headers.get("Range"))
        if self.fault in ("403", "404"):
            return self.send_error(int(self.fault))
        first = int(self.headers["Range"][6:-1]) if "Range" in self.headers and self.fault != "no ranges" else 0
        if first >= len(self.content):
            return self.send_error(416)
        body = b"<html>Sign in</html>" if self.fault == "html" else self.content[first:]
        self.send_response(206 if first else 200)
        if self.fault != "no length":
            wrong = {"too long": 1000, "too short": -1000}.get(self.fault, 0)
            self.send_header("Content-Length", str(len(body) + wrong))
        self.send_header("Content-Type", "text/html" if self.fault == "html" else "application/octet-stream")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.fault in ("cut once", "cut always"):
            body = body[: len(body) // 2]
            Server.fault = "" if self.fault == "cut once" else self.fault
        for i in range(0, len(body), 10_000):
            self.wfile.write(body[i : i + 10_000])
            if self.fault == "slow":
                time.sleep(0.02)
            if self.fault == "silent" and i:
                time.sleep(3)
        return None

    def log_message(self, *words):
        pass


@pytest.fixture
def server(tmp_path, d4rl_folder, monkeypatch):
    content = write(tmp_path / "served.hdf5", arrays([500] * 10, [False] * 10)).read_bytes()
    Server.content, Server.fault, Server.served = content, "", []
    handler = functools.partial(Server)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("D4RL_URL", f"http://127.0.0.1:{running.server_port}/offline_rl")
    yield Server
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("fault", ["", "slow", "no length", "cut once", "no ranges"])
def test_download(server, fault, capfd):
    server.fault = fault
    assert load("hopper-medium").source == "d4rl"  # auto: the server answers
    assert d4rl.local_file(HOPPER).read_bytes() == server.content
    assert "download hopper-medium" in capfd.readouterr().err
    assert [path.name for path in d4rl.local_file(HOPPER).parent.iterdir()] == ["hopper_medium-v2.hdf5"]
    if fault == "cut once":
        assert server.served[-1] == f"bytes={len(server.content) // 2}-"


@pytest.mark.parametrize(
    "fault, message",
    [
        ("403", "answers 403 Forbidden"),
        ("404", "answers 404 Not Found"),
        ("html", "sent text/html, not an HDF5 file"),
        ("cut always", "broke off after"),
        ("too long", "answers 416"),
        ("too short", "is no D4RL file"),
        ("silent", "timed out"),
    ],
)
def test_download_fails(server, fault, message, monkeypatch):
    server.fault = fault
    monkeypatch.setattr(d4rl, "TRIES", 2)
    with pytest.raises(UserError, match=message):
        d4rl.download(HOPPER, seconds=1)
    assert not d4rl.local_file(HOPPER).exists()


def test_download_goes_on_after_failure(server):
    server.fault = "cut always"
    with pytest.raises(UserError, match="the same command goes on there"):
        d4rl.download(HOPPER)
    have = d4rl.local_file(HOPPER).with_name("hopper_medium-v2.hdf5.part").stat().st_size
    assert 0 < have < len(server.content)
    server.fault, server.served = "", []
    d4rl.download(HOPPER)
    assert server.served == [f"bytes={have}-"]
    assert d4rl.local_file(HOPPER).read_bytes() == server.content


def test_download_of_something_else(server):
    Server.content = write(d4rl.local_file(HOPPER).parent / "x", {"a": np.zeros(5000)}).read_bytes()
    with pytest.raises(UserError, match="it lacks observations, actions, rewards, terminals"):
        d4rl.download(HOPPER)
    assert [path.name for path in d4rl.local_file(HOPPER).parent.iterdir()] == ["x"]


def test_two_downloads_at_once(server):
    server.fault = "slow"
    threads = [threading.Thread(target=d4rl.download, args=(HOPPER,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.served) == 1 and d4rl.local_file(HOPPER).read_bytes() == server.content


def test_interrupted_download(server, tmp_path):
    server.fault = "slow"
    process = start("-c", "from datasets import load; load('hopper-medium', 'd4rl')")
    part = d4rl.local_file(HOPPER).with_name("hopper_medium-v2.hdf5.part")
    while not part.exists() or part.stat().st_size < 10_000:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "the same command goes on there" in err and "Traceback" not in err
    assert not d4rl.local_file(HOPPER).exists()


def test_unreachable(here, d4rl_folder, monkeypatch, capsys):
    with pytest.raises(UserError, match="pen-human exists only as D4RL's file"):
        load("pen-human")
    with pytest.raises(UserError, match="refused"):
        load("hopper-medium", "d4rl")
    monkeypatch.setattr(collect, "plan", lambda task, n=0: plan(task, n or 2000))
    assert load("halfcheetah-medium").source == "collected"
    assert "its server cannot be reached: using collected data" in capsys.readouterr().out


def test_no_permission(server, d4rl_folder):
    if os.geteuid() == 0:
        d4rl_folder.write_text("a file where the folder should be")
    else:
        d4rl_folder.mkdir(mode=0o500)
    with pytest.raises(UserError, match="Cannot write"):
        load("hopper-medium", "d4rl")
