"""Measures every script that trains, on this machine, and appends to results/bench.json, which `make results` draws.

Each row is a run of the script as it is: its updates per second without the evaluations, the memory it took at most,
and the share of a whole run that evaluation takes at the script's defaults (10 episodes every 5,000 updates).
On CUDA it also trains with and without the graph, and notes by how much the parameters differ.

Usage: make bench, or python results/bench.py --scripts td3_bc --seeds 1 16
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets import UserError, write_whole
from datasets.processes import cores
from results.checkpoint import load_checkpoint
from results.run import choose_device, code_version

FILE = ROOT / "results" / "bench.json"
# Updates of one agent on a CPU, about ten seconds; S agents take a share of them. CUDA runs CUDA_FACTOR as many.
UPDATES = {"bc": 6000, "td3_bc": 2000, "iql": 1500, "awac": 1000, "rebrac": 200}
UPDATES |= {"cql": 200, "offline_sac": 1000, "sac_n": 200, "edac": 100, "dt": 100, "sac": 1500, "gail": 16_000}
UPDATES |= {"mopo": 1000}
CUDA_FACTOR = {"bc": 50, "td3_bc": 100, "iql": 100, "awac": 100, "rebrac": 300}
CUDA_FACTOR |= {"cql": 200, "offline_sac": 100, "sac_n": 300, "edac": 300, "dt": 200, "sac": 8, "gail": 4, "mopo": 100}
ONLINE = ("sac", "gail")  # in which a seed is a run
EVERY = {"gail": 96_000}  # updates between evaluations; of the others 5,000


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(UPDATES)
    seeds: tuple[int, ...] = ()  # as many at once, each number in turn: (1, 4) on a CPU, (1, 4, 16) on a GPU
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


def train(script, runs, *words):
    """Runs the script; its record and its checkpoint."""
    command = [sys.executable, str(ROOT / "algorithms" / f"{script}.py"), *map(str, words)]
    done = subprocess.run(command, env=os.environ | {"RUNS_DIR": str(runs)}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError(f"{script}.py failed, and nothing was recorded: {last}")
    record = max(Path(runs).rglob("record-seed=0.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(record.read_text()), load_checkpoint(record.with_name("checkpoint.pt"))


def measure(script, seeds, device):
    """One row: `script` with `seeds` agents, two evaluations included."""
    if device == "cuda":
        steps = UPDATES[script] * CUDA_FACTOR[script]
    else:
        steps = max(100, UPDATES[script] // seeds)
    words = ["--device", device, "--steps", steps, "--eval-every", steps // 2]
    if script == "sac":
        words += ["--start-steps", steps // 10]
    else:
        words += ["--source", "collected"]
    if script not in ONLINE:
        words += ["--seeds", seeds]
    with tempfile.TemporaryDirectory() as runs:
        before = 0.0
        if script == "mopo":  # whose model, and a first rollout, come before the first update, and are not counted
            words += ["--env", "halfcheetah-medium-replay", "--model-updates", 1, "--rollout-every", steps]
            record, _ = train(script, runs, *words, "--steps", 1)
            before = record["seconds"] - record["eval_seconds"]
        record, _ = train(script, runs, *words)
    seconds, each = record["seconds"] - record["eval_seconds"] - before, record["eval_seconds"] / 2
    return {
        "script": script,
        "seeds": seeds,
        "updates": steps,
        "updates_per_s": round(steps / seconds, 1),
        "agent_updates_per_s": round(seeds * steps / seconds, 1),
        "memory_mb": record["memory_mb"],
        "evaluation_s": round(each, 2),
        "evaluation_share": round(each / (each + EVERY.get(script, 5000) * seconds / steps), 3),
    }


def learned(state):
    """{name: tensor} of what a checkpoint's `state` holds, less the optimisers."""
    items = {name: item for name, item in state.items() if not name.endswith("opt")}
    items = {name: {"": item} if isinstance(item, torch.Tensor) else item for name, item in items.items()}
    return {f"{name}.{key}": value for name, item in items.items() for key, value in item.items()}


def graph_difference(script):
    """The largest difference of a parameter after 200 updates with and without the CUDA graph."""
    words = ["--source", "collected", "--steps", 200, "--eval-every", 200, "--eval-episodes", 1, "--seeds", 2]
    with tempfile.TemporaryDirectory() as runs:
        ends = [learned(train(script, runs, *words, *more)[1]["state"]) for more in ((), ("--no-graph",))]
    return max((ends[0][name] - ends[1][name]).abs().max().item() for name in ends[0])


def bench(args):
    device = choose_device(args.device).type
    numbers = args.seeds or ((1, 4, 16) if device == "cuda" else (1, 4))
    print(
        f"{machine(device)['device']}\n\nscript     seeds  updates/s  agent-updates/s  memory MB  evaluation s  share"
    )
    for script in args.scripts:
        rows = []
        for seeds in (1,) if script in ONLINE else numbers:
            rows.append(row := measure(script, seeds, device))
            print(
                f"{script:10} {seeds:5} {row['updates_per_s']:10.0f} {row['agent_updates_per_s']:16.0f} "
                f"{row['memory_mb']:10} {row['evaluation_s']:13.2f} {row['evaluation_share']:6.1%}"
            )
        entry = {"kind": "scripts", **machine(device), "rows": rows}
        if device == "cuda" and script not in ONLINE:
            entry["graph_difference"] = {script: graph_difference(script)}
        append(entry)


if __name__ == "__main__":
    args = tyro.cli(Args)
    for script in args.scripts:
        if script not in UPDATES:
            raise UserError(f"Unknown --scripts '{script}'; known are {', '.join(UPDATES)}.")
    bench(args)
