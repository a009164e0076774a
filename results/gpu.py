"""All that a short loan of a GPU is for, in one call, the most valuable first: make gpu MINUTES=8 OUT=folder.

    tests   every script's CUDA tests: trains, resumes, acts on a CPU; one graph gives what no graph gives
    bench   results/bench.py of every script: 1 and 16 seeds, with the graph and without, seeds lifted or a thread each
    cells   of the grid, five seeds together, first those that a CPU is too slow for, until time is up

Each part is bounded in time and is in OUT/gpu.tar.gz (at most 16 MiB) as soon as it is there: tests.txt, bench.json,
and records in the folders of results/runs/. The datasets are collected meanwhile. A cell that time cuts off is saved in
OUT/runs, and the same command goes on with it. At home, `python results/gpu.py --take gpu.tar.gz` files all of it.

Usage: python results/gpu.py --minutes 8 --out runs/gpu
A machine without network needs the packages of requirements.txt as wheels (pip download), and COMMIT in the environment
where its copy has no history.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets import UserError, find_task, write_whole
from datasets.collect import collected_file, fingerprint, plan
from datasets.processes import cores
from results import bench, reproduce
from tests.scripts import TRAINED

PARTS = ("tests", "bench", "cells")
SHARES = {"tests": 0.25, "bench": 0.65, "cells": 1.0}  # of the minutes, when a part must have ended
MOST = 16 * 2**20  # bytes of the archive
SEEDS, AT_ONCE = 5, 3  # agents of a cell; cells, of which one trains while another evaluates or starts
# Cells by their multiples of --steps: those that a CPU is too slow for at all, then those that it is for long runs.
ALGOS = {"rebrac": 1, "cql": 1, "edac": 1, "sac_n": 1, "dt": 1, "td3_bc": 10, "iql": 10}
ENVS = [f"{body}-{data}" for data in ("medium", "medium-replay", "medium-expert") for body in reproduce.BODIES]
TRAINED_ON = {"gail": "hopper-expert"}  # by the bench; the others: see `measure`
TRAINED_ON |= dict.fromkeys(("mopo", "morel", "combo"), "halfcheetah-medium-replay")


@dataclass
class Args:
    minutes: float = 8.0
    out: Path = Path("runs/gpu")
    parts: tuple[str, ...] = PARTS
    steps: int = 100_000  # updates of a cell
    seconds: float = 1.0  # of each measurement
    device: str = "cuda"  # cpu: to try the command
    take: Path | None = None  # instead: files what such an archive holds into results/


def archive(out):
    """OUT/gpu.tar.gz anew, of what OUT holds beside the runs; without the logs where it would be too large."""
    files = [path for path in sorted(out.rglob("*.*")) if path.suffix in (".json", ".txt", ".log")]
    files = [path for path in files if path.relative_to(out).parts[0] != "runs"]
    for kept in (files, [path for path in files if path.suffix != ".log"]):
        with tarfile.open(out / "new.tar.gz", "w:gz") as tar:
            for path in kept:
                tar.add(path, path.relative_to(out))
        if (out / "new.tar.gz").stat().st_size <= MOST:
            break
    (out / "new.tar.gz").replace(out / "gpu.tar.gz")


def collect(args, out):
    """A process that collects beside the rest what bench and cells need, in the order in which they need it."""
    names = [
        "halfcheetah-medium",
        *dict.fromkeys(TRAINED_ON.values()),
        *(ENVS if "cells" in args.parts and args.device != "cpu" else []),
    ]
    code = "import sys; from datasets import load; [load(env, 'collected') for env in sys.argv[1:]]"
    log = (out / "collect.log").open("w")
    return subprocess.Popen([sys.executable, "-c", code, *names], cwd=ROOT, stdout=log, stderr=log)


def at_hand(env):
    return collected_file(find_task(env)).exists()


def test(args, out, deadline):
    words = ["-k", "cuda or graph_changes", "--tb=short", "-p", "no:cacheprovider"]
    words += ["--continue-on-collection-errors"]  # a package that CUDA does not need may be missing
    if find_spec("xdist") and (workers := min(8, cores() // 2)) > 1:
        words += ["-n", str(workers)]  # they wait for the CPU, not for the GPU
    with (out / "tests.txt").open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "pytest", *words], cwd=ROOT, stdout=file, stderr=file)
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            file.write("\nnot done in time\n")
    print("".join((out / "tests.txt").read_text().splitlines(keepends=True)[-40:]), flush=True)


def measure(args, out, deadline):
    """Every script, as soon as its data are there."""
    waiting, entries = list(TRAINED), []
    print(bench.HEAD)
    while waiting and (left := deadline - time.monotonic()) > 5:
        script = next((one for one in waiting if at_hand(TRAINED_ON.get(one, "halfcheetah-medium"))), None)
        if script is None:
            time.sleep(0.5)
            continue
        waiting.remove(script)
        entry, _ = bench.entry_of(script, (), args.seconds, args.device, out / f"bench-{script}.log", min(left, 90.0))
        entries += [entry] if entry["rows"] else []
        write_whole(out / "bench.json", json.dumps(entries).encode())
        archive(out)
    if waiting:
        print(f"no time left for {', '.join(waiting)}", flush=True)


def train(args, out, deadline):
    """Cells, AT_ONCE at a time. When time is up the rest are interrupted, and save."""
    waiting, running, at_once = [], {}, 1 if args.device == "cpu" else AT_ONCE
    for env in ENVS:
        data = fingerprint(find_task(env), plan(find_task(env)))
        for algo, times in ALGOS.items():
            steps = times * args.steps
            words = ("--eval-every", str(steps // 5))  # every 5,000 updates would take half of a GPU's time
            job = reproduce.Job(algo, env, 0, SEEDS, steps, "collected", data, words)
            records = job.records[0], replace(job, words=()).records[0]  # by whichever number of evaluations
            if not any(path.exists() or (out / path.relative_to(ROOT)).exists() for path in records):
                waiting.append(job)
    stopping = False
    while running or (waiting and not stopping):
        ready = [job for job in waiting if at_hand(job.env)][: 0 if stopping else at_once - len(running)]
        for job in ready:
            waiting.remove(job)
            log = (out / f"cell-{job.name.replace(' ', '-')}.log").open("w+b")
            running[job] = reproduce.start(job, ROOT, args.device, log), log
        time.sleep(0.2)
        for job, (process, log) in list(running.items()):
            if process.poll() is None:
                continue
            del running[job]
            records, error = reproduce.outcome(job, process, log)
            for path, text in zip(job.records, records or []):
                target = out / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, text.encode())
            scores = ", ".join(f"{json.loads(text)['score']:.1f}" for text in records or [])
            print(f"{job.name}: {scores or error}", flush=True)
            archive(out)
        if not stopping and time.monotonic() > deadline:
            stopping = True
            for process, _ in running.values():
                process.send_signal(signal.SIGINT)
        if time.monotonic() > deadline + 20:
            for process, _ in running.values():
                process.kill()


def take(path):
    """Files an archive's records, measurements and the tests' output into results/, and says what."""
    try:
        with tarfile.open(path) as tar:
            texts = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path} is no archive of results/gpu.py ({error}).") from None
    for entry in json.loads(texts.get("bench.json", b"[]")):
        bench.append(entry)
    if "tests.txt" in texts:
        write_whole(ROOT / "results" / "gpu_tests.txt", texts["tests.txt"])
    records = [name for name in texts if name.startswith("results/runs/") and ".." not in name]
    for name in records:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(ROOT / name, texts[name])
    others = [name for name in ("bench.json", "tests.txt") if name in texts]
    print(f"Filed in results/: {', '.join([f'{len(records)} records', *others])}; 'make results' draws them.")


def main(args):
    if args.take:
        return take(args.take)
    for part in args.parts:
        if part not in PARTS:
            raise UserError(f"Unknown part '{part}'; known are {', '.join(PARTS)}.")
    if args.minutes <= 0 or args.steps < 5:
        raise UserError("--minutes must be above 0, --steps at least 5.")
    start, out = time.monotonic(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["RUNS_DIR"] = str(out / "runs")
    collecting = collect(args, out)
    try:
        for part, function in zip(PARTS, (test, measure, train)):
            if part in args.parts:
                print(f"\n{part}, {time.monotonic() - start:.0f} s", flush=True)
                share = 1.0 if part == args.parts[-1] else SHARES[part]
                function(args, out, start + 60 * args.minutes * share - 5)
                archive(out)
    finally:
        collecting.kill()
    size = (out / "gpu.tar.gz").stat().st_size / 1e6
    print(f"\n{out / 'gpu.tar.gz'}, {size:.1f} MB, after {time.monotonic() - start:.0f} s; file it with --take.")


if __name__ == "__main__":
    main(tyro.cli(Args))
