"""Measures every script that trains, on this machine, and appends to results/bench.json, which `make results` draws.

Each row is the script's own `train`, its loop stopped once it has been timed: updates per second without the
evaluations, the memory taken at most, and the share of a whole run that evaluation takes at the script's defaults
(10 episodes every 5,000 updates). On CUDA also without the graph, and with agents that are not lifted but trained by
one thread each, a graph and a stream of its own: what seeds side by side are worth. Of language models also the tokens
that go through what is trained, prompts included, each time that they do.

Usage: make bench, or python results/bench.py --scripts td3_bc --seeds 1 16
"""

import contextlib
import dataclasses
import datetime
import importlib
import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets import UserError, text, write_whole
from datasets.processes import cores
from results.run import Run, choose_device, code_version, peak_memory
from tests.scripts import SCRIPTS, TRAINED

FILE = ROOT / "results" / "bench.json"
ROUNDS = 3  # of which the median is taken
WARM = 12  # updates beforehand: three of each kind, then those that capture its graph
EVERY = dict.fromkeys(("gail", "gaifo", "airl", "f_max"), 96_000)  # updates between evaluations; of the others 5,000
TURN = {"awr": 1000}  # updates that belong together: before them come those of V
LONG = 96 * 10**7  # --steps, never reached
TOKENS = {  # of an update
    "rlhf": lambda args: args.epochs * args.answers * (text.PROMPT + text.ANSWER),
    "dpo": lambda args: 2 * args.batch_size * (text.PROMPT + text.ANSWER),
}
MEASURED = (*TRAINED, *TOKENS)


@dataclass
class Args:
    scripts: tuple[str, ...] = MEASURED
    seeds: tuple[int, ...] = ()  # as many at once, each number in turn: (1, 4) on a CPU, (1, 16) on a GPU
    seconds: float = 5.0  # for each measurement
    device: str = "auto"


def machine(device):
    """What an entry says about where and with what it was measured; device: cpu or cuda."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    cpu = f"{(names or [platform.machine()])[0]}, {cores()} cores"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": code_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def append(entry):
    """Adds an entry to results/bench.json, one line each."""
    entries = [*json.loads(FILE.read_text()), entry]
    write_whole(FILE, ("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n").encode())


def arguments(script, module, seeds, device, graph=True):
    """The script's own defaults on collected data, so long that no schedule ends, evaluated when we say so."""
    changes = {"steps": LONG, "eval_every": LONG, "device": device}
    if hasattr(module.Args, "seeds"):
        changes["seeds"] = seeds
    if hasattr(module.Args, "graph"):
        changes["graph"] = graph
    if hasattr(module.Args, "start_steps"):
        changes["start_steps"] = 1  # it learns from the second on
    if hasattr(module.Args, "source"):
        changes["source"] = "collected"
    if hasattr(module.Args, "offline_steps"):
        changes["offline_steps"] = 2  # what is measured acts
    if script == "spot":
        changes["vae_steps"] = 1
    if script == "bco":
        changes["pre_steps"] = 8000  # it learns from its first iteration on
    if script in ("mopo", "morel", "combo"):  # whose model, and rollouts, come before the first update: not counted
        changes |= {"env": "halfcheetah-medium-replay", "model_updates": 1, "rollout_every": LONG}
    if "diffuser" in script:  # whose evaluation takes an hour on a CPU: as little of it as there can be
        changes |= {"acting_steps": 1} | ({"plans": 1} if script == "diffuser" else {})
    if script == "morel":
        changes["coef"] = 1.0  # all data are known, whatever the model
    return module.Args(**changes)


def finish(device):
    if device == "cuda":
        torch.cuda.synchronize()


def measure(script, seeds, device, seconds, graph=True):
    """One row: `script` with `seeds` agents."""
    module, original, row = importlib.import_module(f"algorithms.{script}"), Run.steps, {}

    def timed(run, data, **state):
        if run.algorithm != script:  # it begins with another run, whose result it needs
            yield from original(run, data, **state)
            return
        loop, taken = original(run, data, **state), 0

        def some(n):
            nonlocal taken
            for _ in range(n):
                step = next(loop)  # which sets run.stride
                taken += run.stride
                yield step

        yield from some(1)
        yield from some(WARM if device == "cuda" and run.stride == 1 else 0)
        n, rates = (turn := TURN.get(script, 1)), []
        while len(rates) < ROUNDS:
            finish(device)
            start = time.perf_counter()
            yield from some(n)
            finish(device)
            elapsed = time.perf_counter() - start
            if elapsed > 0.5 * seconds / ROUNDS:
                rates.append(n * run.stride / elapsed)
            n = max(n, min(10 * n, int(n * seconds / ROUNDS / elapsed) // turn * turn))
        run._checked += LONG - taken - run.stride  # so many steps were watched, not all up to the last
        yield LONG  # the last one is evaluated
        loop.close()
        row.update(script=script, seeds=seeds, updates_per_s=round(float(np.median(rates)), 1))
        row.update(memory_mb=peak_memory(run.device), evaluation_s=round(run.eval_seconds, 2))

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, RUNS_DIR=folder):
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with mock.patch.object(Run, "steps", timed):
            module.train(args := arguments(script, module, seeds, device, graph))
    if script in TOKENS:
        row["tokens_per_s"] = round(row["updates_per_s"] * TOKENS[script](args))
    row["agent_updates_per_s"] = round(seeds * row["updates_per_s"], 1)
    training = EVERY.get(script, 5000) / row["updates_per_s"]
    row["evaluation_share"] = round(row["evaluation_s"] / (row["evaluation_s"] + training), 3)
    return row if graph else {**row, "way": "no graph"}


def measure_plain(script, agents, device, seconds, rate):
    """One row: `agents` runs of one agent at once, each in a thread of its own, on CUDA with its own graph and stream.

    rate: about how many updates each makes in a second.
    """
    module, original, n = importlib.import_module(f"algorithms.{script}"), Run.steps, max(1, int(seconds * rate))
    ready, barrier, failed = [threading.Event() for _ in range(agents)], threading.Barrier(agents + 1), []

    def timed(run, data, **state):
        loop = original(run, data, **state)
        for _ in range(WARM):
            yield next(loop)
        finish(device)
        ready[run.args.seed].set()
        barrier.wait()
        for _ in range(n):
            yield next(loop)
        finish(device)
        barrier.wait()
        loop.close()

    def train(seed):
        try:
            module.train(dataclasses.replace(arguments(script, module, 1, device), seed=seed))
        except BaseException as error:
            failed.append(error)
            ready[seed].set()
            barrier.abort()

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, RUNS_DIR=folder),
        mock.patch.object(Run, "steps", timed),
        # Only a main thread may. A loop that ends later puts back what it was told was there before.
        mock.patch("signal.signal", return_value=signal.getsignal(signal.SIGINT)),
    ):
        threads = [threading.Thread(target=train, args=(seed,), daemon=True) for seed in range(agents)]
        for seed, thread in enumerate(threads):  # one after another: while a graph is captured nobody may allocate
            thread.start()
            ready[seed].wait()
        if not failed:
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait()
                start = time.perf_counter()
                barrier.wait()
                elapsed = time.perf_counter() - start
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
    row = {"script": script, "seeds": agents, "way": "one thread each", "updates_per_s": round(n / elapsed, 1)}
    return {**row, "agent_updates_per_s": round(agents * n / elapsed, 1)}


def tell_rows(script, seeds, seconds, device, tell):
    """Tells where it measures, then each row: `script` in every way that this device allows."""
    device = choose_device(device).type
    tell(machine(device))
    alone = SCRIPTS[script].acts or script in TOKENS
    numbers = (1,) if alone else seeds or ((1, 16) if device == "cuda" else (1, 4))
    for number in numbers:
        tell(row := measure(script, number, device, seconds))
        if device == "cuda" and not alone:
            tell(measure(script, number, device, seconds, graph=False))
            if number > 1:
                tell(measure_plain(script, number, device, seconds, row["updates_per_s"]))


def run_child(pipe, log, function, *args):
    with log.open("a", buffering=1) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)  # a library's messages too
        sys.stdout = sys.stderr = file
        try:
            function(*args, pipe.send)
        except Exception:
            traceback.print_exc()  # while the file is open
            sys.exit(1)


def in_child(log, limit, function, *args):
    """Yields what `function(*args, tell)` tells, from a process of its own: a GPU that fails there fails for it alone,
    and its memory is its own. It prints into the file `log`. UserError if it fails, or is not done after `limit` s."""
    # A forked child has imported torch already; the parent must not have touched CUDA.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_child, args=(theirs, log, function, *args))
    process.start()
    theirs.close()
    deadline = time.monotonic() + limit
    try:
        with contextlib.suppress(EOFError):  # it has ended
            while ours.poll(max(0.0, deadline - time.monotonic())):
                yield ours.recv()
        process.join(max(1.0, deadline - time.monotonic()))
        late = process.is_alive()
    finally:
        process.kill()
        process.join()
    if late:
        raise UserError(f"not done after {limit:.0f} s")
    if process.exitcode:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise UserError(lines[-1] if lines else f"exit status {process.exitcode}")


HEAD = "script       seeds  way               updates/s  agent-updates/s  memory MB  evaluation s  share"


def entry_of(script, seeds, seconds, device, log, limit=600.0):
    """Measures one script in a child and prints its rows; the entry, with all that was measured, and the error."""
    where, rows, error = {}, [], None
    try:
        for told in in_child(log, limit, tell_rows, script, seeds, seconds, device):
            if "script" not in told:
                where = told
                continue
            rows.append(told)
            end = "  ".join(str(told.get(name, "")) for name in ("memory_mb", "evaluation_s", "evaluation_share"))
            end += f"  {told['tokens_per_s']:,} tokens/s" if "tokens_per_s" in told else ""
            print(
                f"{script:12} {told['seeds']:5}  {told.get('way', ''):16} {told['updates_per_s']:10.0f} "
                f"{told['agent_updates_per_s']:16.0f}  {end}",
                flush=True,
            )
    except UserError as failure:
        error = str(failure)
        print(f"{script:12} failed: {error}", flush=True)
    return {"kind": "scripts", **where, "rows": rows}, error


def bench(args):
    for script in args.scripts:
        if script not in MEASURED:
            raise UserError(f"Unknown --scripts '{script}'; known are {', '.join(MEASURED)}.")
    failed = []
    print(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        for script in args.scripts:
            log = Path(folder, f"{script}.log")
            entry, error = entry_of(script, args.seeds, args.seconds, args.device, log)
            if entry["rows"]:
                append(entry)
            if error:
                failed.append(f"{script} ({error})")
    if failed:
        raise UserError(f"Not measured: {', '.join(failed)}.")


if __name__ == "__main__":
    bench(tyro.cli(Args))
