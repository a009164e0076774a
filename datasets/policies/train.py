"""Trains the behaviour policies again and copies the snapshots that policies.toml names into this folder.

Trains one run after the other, hours each; a run that was stopped goes on where it stood. Another machine's arithmetic
leads to other policies: look at their returns in the run's curve, choose snapshots anew, and the datasets collected
with them have another fingerprint.

Usage: make policies
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ROOT / "datasets" / "policies"

for name, row in tomllib.loads((POLICIES / "policies.toml").read_text()).items():
    body = name.split("-")[0]
    options = {"env": body, "steps": 1_000_000, "eval_every": 10_000, "snapshot_every": 5_000, **row["options"]}
    command = [sys.executable, ROOT / "algorithms" / "sac.py"]
    command += [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    runs = ROOT / f"runs/policies/{name}"
    if list(runs.rglob("checkpoint.pt")):
        command.append("--resume")
    if status := subprocess.run(command, env={**os.environ, "RUNS_DIR": str(runs)}).returncode:
        sys.exit(status)
    for step in {step for snapshots in row.values() if isinstance(snapshots, list) for step in snapshots}:
        (snapshot,) = runs.rglob(f"policy-{step:07d}.npz")
        shutil.copy(snapshot, POLICIES / f"{name}-{step:07d}.npz")
