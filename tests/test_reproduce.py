import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tyro
from conftest import ROOT, children, wait_for_the_end, wait_until

from algorithms import bc
from datasets import UserError, collect, find_task
from results import reproduce, run
from results.reproduce import Args, Job, find_jobs
from tests.scripts import TRAINED

GRID = ["--algos", "bc", "--envs", "stitch-gap"]
TIMES = ("seconds", "eval_seconds", "memory_mb")


@pytest.fixture
def project(tmp_path, here):
    """A copy of the project without records, and a small stitch-gap in the cache."""
    task = find_task("stitch-gap")
    collect.collect(task, collect.collected_file(task), 3000)
    root = tmp_path / "project"
    root.mkdir()
    for folder in ("algorithms", "datasets", "results"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("runs", "__pycache__", "*.gif"))
    (root / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "scripts.py", root / "tests")
    return root


def reproduce_here(root, monkeypatch, *words):
    """`results/reproduce.py` of the copy, its runs aside, in this process, which has its imports already."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "ROOT", root)
        patch.setattr(reproduce, "ROOT", root)
        patch.setattr(reproduce, "RECORDS", root / "results" / "runs")
        reproduce.reproduce(tyro.cli(Args, args=list(map(str, words))))


def launch(root, *words):
    """`results/reproduce.py` as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "results/reproduce.py", *map(str, words)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def records(root):
    found = {}
    for path in (root / "results" / "runs").rglob("*.json"):
        record = json.loads(path.read_text())
        found[str(path.relative_to(root))] = {key: value for key, value in record.items() if key not in TIMES}
    return found


def begun(folder):
    """How many starts of runs have come to their updates."""
    return len(list(folder.rglob("events*")))


@pytest.mark.parametrize(
    "kills, seeds, steps",
    [(1, (0,), 2000), pytest.param(int(os.environ.get("KILLS", 10)), (0, 1), 12_000, marks=pytest.mark.slow)],
)
def test_killed_and_started_again(kills, seeds, steps, project, tmp_path, monkeypatch, capsys):
    """Killed at random moments, runner and all, and started again: the same records as without."""
    words = [*GRID, "--seeds", *seeds, "--steps", steps]
    with monkeypatch.context() as patch:
        patch.setenv("RUNS_DIR", str(tmp_path / "undisturbed"))
        reproduce_here(project, monkeypatch, *words)
    out = capsys.readouterr().out
    assert "0 runs left" in out and "Nothing is left" in out
    expected = records(project)
    assert len(expected) == len(seeds)
    shutil.rmtree(project / "results" / "runs")
    for _ in range(kills):
        process, before = launch(project, *words), begun(tmp_path / "runs")
        wait_until(lambda before=before: begun(tmp_path / "runs") > before, process)
        time.sleep(random.uniform(0, 2))
        runs = children(process.pid)
        process.kill()  # the runner alone: its runs must end with it
        process.communicate()
        wait_for_the_end(runs)
        if len(records(project)) == len(seeds):
            break  # nothing is left to be killed
    reproduce_here(project, monkeypatch, *words)
    assert records(project) == expected


def test_ctrl_c(project, tmp_path):
    process = launch(project, *GRID, "--seeds", 0, "--steps", 10**6)
    wait_until(lambda: begun(tmp_path / "runs"), process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1] == "error: Stopped, and the runs are saved; the same command goes on."
    assert any((tmp_path / "runs").rglob("checkpoint.pt"))


def test_one_that_fails_does_not_stop_the_others(project, monkeypatch):
    (project / "algorithms" / "td3_bc.py").write_text("raise SystemExit('error: no such luck')\n")
    words = "--algos", "td3_bc", "bc", "--envs", "stitch-gap", "--seeds", 0, "--steps", 20
    with pytest.raises(UserError, match="^1 of 2 runs failed: td3_bc stitch-gap seed 0: error: no such luck$"):
        reproduce_here(project, monkeypatch, *words)
    assert list(records(project)) == ["results/runs/bc/collected/stitch-gap/seed=0,steps=20.json"]


def test_find_jobs_of_every_script():
    """Whatever learns from data alone can be asked for, without a list of its own."""
    assert {words[0] for words in reproduce.ALGOS.values()} == {name for name in TRAINED if not TRAINED[name].acts}
    assert "mopo" in reproduce.ALGOS and "sac" not in reproduce.ALGOS
    assert reproduce.ALGOS["10bc"] == ["bc", "--top-fraction", "0.1"]


def test_find_jobs(tmp_path, monkeypatch):
    """Only what has no record of these data; seeds outermost, or consecutive ones together."""
    monkeypatch.setattr(reproduce, "RECORDS", tmp_path)
    args = Args(algos=("bc", "10bc"), envs=("a", "b"), seeds=(0, 1, 2, 3), steps=50)

    def job(algo, env, seed, seeds=1):
        return Job(algo, env, seed, seeds, 50, "collected", f"data of {env}")

    recorded = {job("10bc", "a", 1): "data of a", job("bc", "b", 0): "data of b", job("bc", "b", 2): "older data"}
    for done, of in recorded.items():
        (path,) = done.records
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"fingerprint": of}))
    assert path.name == "seed=2,steps=50.json"
    fingerprints = {env: f"data of {env}" for env in args.envs}
    everything = [job(algo, env, seed) for seed in range(4) for algo in args.algos for env in args.envs]
    everything.remove(job("10bc", "a", 1))
    everything.remove(job("bc", "b", 0))
    assert find_jobs(args, fingerprints, together=False) == everything
    assert set(find_jobs(args, fingerprints, together=True)) == {
        job("bc", "a", 0, 4),
        job("bc", "b", 1, 3),
        job("10bc", "a", 0, 1),
        job("10bc", "a", 2, 2),
        job("10bc", "b", 0, 4),
    }
    assert job("10bc", "a", 2, 2).records[1].name == "seed=3,top_fraction=0.1,steps=50.json"


def test_places_are_those_of_the_scripts(here, tmp_path, monkeypatch):
    """The runner looks for records and checkpoints where the scripts put them."""
    task = find_task("stitch-gap")
    collect.collect(task, collect.collected_file(task), 3000)
    job = Job("10bc", "stitch-gap", 1, 2, 20, "collected", "x")
    _, script, *words = job.command(ROOT, "cpu")
    assert script == str(ROOT / "algorithms" / "bc.py")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("RUNS_DIR", str(job.runs))
    bc.train(tyro.cli(bc.Args, args=[*words, "--record"]))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    assert (job.folder / "checkpoint.pt").exists()
    ours = {path.relative_to(reproduce.ROOT) for path in job.records}
    assert {path.relative_to(tmp_path) for path in (tmp_path / "results" / "runs").rglob("*.json")} == ours
    assert "--resume" in job.command(ROOT, "cpu")
