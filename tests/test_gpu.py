"""results/bench.py and results/gpu.py: what they measure is the script's own loop, and what they bring comes home."""

import dataclasses
import gc
import json
import os
import signal
import tarfile
import time

import pytest
import torch

from datasets import UserError
from results import bench, gpu, reproduce
from results.run import Run
from tests.scripts import TRAINED


@pytest.fixture
def on_small(small, monkeypatch):
    """The bench on the small dataset, and the number of updates that were watched."""
    arguments, watch, seen = bench.arguments, Run.watch, []

    def on_small(script, *words):
        changes = {"env": str(small), "source": "auto", "eval_episodes": 1, "batch_size": 8}
        return dataclasses.replace(arguments(script, *words), **changes)

    monkeypatch.setattr(bench, "arguments", on_small)
    monkeypatch.setattr(Run, "watch", lambda run, losses: (seen.append(run.args), watch(run, losses))[1])
    return seen


def test_measure(on_small, monkeypatch):
    """A clock that moves 10 ms with each update: 100 updates/s, of 2 agents 200 agent-updates/s."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.01 * len(on_small))
    row = bench.measure("bc", 2, "cpu", 0.3)
    assert (row["updates_per_s"], row["agent_updates_per_s"]) == (100.0, 200.0)
    assert row["seeds"] == 2 and row["memory_mb"] > 0 and on_small[-1].seeds == 2
    assert len(on_small) > 3 * 10 and row["evaluation_share"] == 0  # the evaluation took none of this clock's time


def test_measure_takes_whole_turns(on_small, monkeypatch):
    """The first update, three rounds of a turn, which is longer than asked for, and the last, to be evaluated."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.01 * len(on_small))
    monkeypatch.setitem(bench.TURN, "bc", 20)
    bench.measure("bc", 1, "cpu", 0.01)
    assert len(on_small) == 1 + 3 * 20 + 1


def test_measure_of_two_phases(on_small):
    """The evaluation at the switch has looked at the losses so far; at the end all the others are looked at."""
    row = bench.measure("spot", 1, "cpu", 0.1)
    assert row["updates_per_s"] > 0 and len(on_small) > 3 and on_small[-1].offline_steps == 2


def test_measure_sees_a_loss_that_is_not_finite(on_small, monkeypatch):
    watch = Run.watch
    monkeypatch.setattr(Run, "watch", lambda run, losses: watch(run, {k: v * float("nan") for k, v in losses.items()}))
    with pytest.raises(UserError, match="stopped being finite"):
        bench.measure("bc", 1, "cpu", 0.01)


def test_measure_plain(on_small):
    """Three agents in threads: each makes its own updates, of seeds 0, 1 and 2."""
    row = bench.measure_plain("bc", 3, "cpu", 0.1, 100.0)
    counts = [sum(args.seed == seed for args in on_small) for seed in range(3)]
    assert counts == [bench.WARM + 10] * 3
    assert row["seeds"] == 3 and row["way"] == "one thread each"
    assert row["agent_updates_per_s"] == pytest.approx(3 * row["updates_per_s"], abs=0.2)


def test_measure_plain_fails(on_small, monkeypatch):
    watch = Run.watch

    def fail(run, losses):
        if run.args.seed == 1:
            raise RuntimeError("no such luck")
        watch(run, losses)

    monkeypatch.setattr(Run, "watch", fail)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="no such luck"):
        bench.measure_plain("bc", 3, "cpu", 0.1, 100.0)
    gc.collect()  # ends the loops that were left
    assert signal.getsignal(signal.SIGINT) == before


def rows_then(ending):
    def tell_rows(script, seeds, seconds, device, tell):
        tell({"device": "a machine"})
        tell({"script": script, "seeds": 1, "updates_per_s": 1.0, "agent_updates_per_s": 1.0})
        ending()

    return tell_rows


def fail():
    raise RuntimeError("CUDA error")


@pytest.mark.parametrize(
    "ending, error", [(int, None), (fail, "RuntimeError: CUDA error"), (lambda: time.sleep(60), "not done after 2 s")]
)
def test_children(ending, error, tmp_path, monkeypatch):
    """What was measured before a child failed or took too long is kept, and the reason is said."""
    monkeypatch.setattr(bench, "tell_rows", rows_then(ending))
    entry, said = bench.entry_of("bc", (), 1.0, "cpu", tmp_path / "log", limit=2.0)
    assert said == error and entry["device"] == "a machine" and entry["rows"][0]["script"] == "bc"


def test_bench_appends(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FILE", tmp_path / "bench.json")
    bench.FILE.write_text("[]")
    monkeypatch.setattr(bench, "tell_rows", rows_then(fail))
    with pytest.raises(UserError, match="Not measured: bc .*CUDA error"):
        bench.bench(bench.Args(scripts=("bc",)))
    (entry,) = json.loads(bench.FILE.read_text())
    assert entry["kind"] == "scripts" and len(entry["rows"]) == 1
    with pytest.raises(UserError, match="Unknown --scripts 'bd'"):
        bench.bench(bench.Args(scripts=("bd",)))


@pytest.mark.parametrize("script", TRAINED)
def test_arguments_of_the_bench(script):
    """Every script takes them."""
    module = bench.importlib.import_module(f"algorithms.{script}")
    args = bench.arguments(script, module, 1 if TRAINED[script].acts else 4, "cpu")
    assert args.steps == args.eval_every == bench.LONG and getattr(args, "seeds", 4) == 4


@pytest.fixture
def grid(small, tmp_path, monkeypatch):
    """Cells of bc alone, on the small dataset under the name of stitch-gap's folder."""
    monkeypatch.setattr(gpu, "ALGOS", {"bc": 1})
    monkeypatch.setattr(gpu, "ENVS", ["hopper-medium"])
    monkeypatch.setattr(gpu, "at_hand", lambda env: True)
    monkeypatch.setattr(gpu, "collect", lambda args, out: reproduce.subprocess.Popen(["sleep", "100"]))
    command = reproduce.Job.command
    words = ["--env", str(small), "--source", "auto", "--eval-episodes", "1"]
    monkeypatch.setattr(reproduce.Job, "command", lambda job, *more: [*command(job, *more), *words])
    folder = reproduce.Job.folder.fget
    named = lambda job: (path := folder(job)).with_name(f"{path.name},eval_episodes=1")
    monkeypatch.setattr(reproduce.Job, "folder", property(named))
    return gpu.Args(minutes=2.0, out=tmp_path / "out", parts=("cells",), steps=20, device="cpu")


def test_cells_come_home(grid, tmp_path, monkeypatch, capsys):
    """Trained, archived, filed; what is recorded is not trained again."""
    gpu.main(grid)
    assert "bc hopper-medium seed 0 to 4: " in capsys.readouterr().out
    home = tmp_path / "home"
    (home / "results").mkdir(parents=True)
    monkeypatch.setattr(gpu, "ROOT", home)
    gpu.main(gpu.Args(take=grid.out / "gpu.tar.gz"))
    records = sorted((home / "results/runs/bc/collected/hopper-medium").iterdir())
    assert [path.name for path in records] == [f"seed={seed},eval_every=4,steps=20.json" for seed in range(5)]
    assert [json.loads(path.read_text())["seed"] for path in records] == list(range(5))
    monkeypatch.setattr(gpu, "ROOT", reproduce.ROOT)
    gpu.main(grid)
    assert "seed 0 to 4" not in capsys.readouterr().out


def test_cells_stop_in_time(grid, capsys):
    """When time is up a cell is saved, and the same command goes on with it."""
    grid = dataclasses.replace(grid, steps=10**7, minutes=0.3)
    gpu.main(grid)
    (checkpoint,) = grid.out.rglob("checkpoint.pt")
    step = torch.load(checkpoint)["step"]
    assert step > 0 and f"Stopped after step {step}" in capsys.readouterr().out
    gpu.main(grid)
    assert torch.load(checkpoint)["step"] > step


def test_archive_and_take(tmp_path, monkeypatch):
    """Without its logs where they are too much; nothing but records, measurements and the tests' output is filed."""
    out, home = tmp_path / "out", tmp_path / "home"
    (out / "results" / "runs").mkdir(parents=True)
    (out / "runs").mkdir()
    (home / "results").mkdir(parents=True)
    (out / "results" / "runs" / "a.json").write_text("{}")
    (out / "runs" / "record-seed=0.json").write_text("{}")
    (out / "tests.txt").write_text("3 passed")
    (out / "bench.json").write_text(json.dumps([{"kind": "scripts", "rows": []}]))
    (out / "x.log").write_bytes(os.urandom(2000))
    gpu.archive(out)

    def names():
        with tarfile.open(out / "gpu.tar.gz") as tar:
            return sorted(tar.getnames())

    assert names() == ["bench.json", "results/runs/a.json", "tests.txt", "x.log"]
    monkeypatch.setattr(gpu, "MOST", 1500)
    gpu.archive(out)
    assert names() == ["bench.json", "results/runs/a.json", "tests.txt"]
    monkeypatch.setattr(gpu, "ROOT", home)
    monkeypatch.setattr(bench, "FILE", home / "results" / "bench.json")
    bench.FILE.write_text("[]")
    gpu.take(out / "gpu.tar.gz")
    assert {str(path.relative_to(home)) for path in home.rglob("*.*")} == {
        "results/bench.json",
        "results/gpu_tests.txt",
        "results/runs/a.json",
    }
    assert json.loads(bench.FILE.read_text()) == [{"kind": "scripts", "rows": []}]
    with pytest.raises(UserError, match="is no archive"):
        gpu.take(out / "tests.txt")


def test_bad_arguments():
    for args, message in (
        (gpu.Args(parts=("bensh",)), "Unknown part 'bensh'; known are tests, bench, cells"),
        (gpu.Args(minutes=0), "--minutes must be above 0"),
        (gpu.Args(steps=1), "--steps at least 5"),
    ):
        with pytest.raises(UserError, match=message):
            gpu.main(args)
