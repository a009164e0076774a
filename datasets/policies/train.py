"""Trains the behaviour policies again and copies the snapshots that policies.toml names into this folder.

Runs one body after the other, hours each; a run that was stopped goes on where it stood. Another machine's arithmetic
leads to other policies: look at their returns in the run's curve, choose snapshots anew, and the datasets collected
with them have another fingerprint.

Usage: make policies
"""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ROOT / "datasets" / "policies"

for body, row in tomllib.loads((POLICIES / "policies.toml").read_text()).items():
    options = {"env": body, "seed": row["seed"], "steps": row["steps"], "eval_every": 10_000, "snapshot_every": 5_000}
    folder = ROOT / f"runs/sac/online/{body}/seed={row['seed']},eval_every=10000,snapshot_every=5000"
    command = [sys.executable, ROOT / "algorithms" / "sac.py"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    if (folder / "checkpoint.pt").exists():
        command.append("--resume")
    if status := subprocess.run(command).returncode:
        sys.exit(status)
    for step in {step for snapshots in row.values() if isinstance(snapshots, list) for step in snapshots}:
        shutil.copy(folder / f"policy-{step:07d}.npz", POLICIES / f"{body}-{step:07d}.npz")
