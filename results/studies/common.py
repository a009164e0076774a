"""What the studies share: they run the scripts, read their checkpoints, and keep what they have measured.

Training runs and single measurements lie in runs/studies/ (git-ignored), where an interrupted study goes on. A whole
study is one JSON file beside its script, from which `make results` draws its picture and writes its findings.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from datasets import UserError, write_whole
from datasets.dataset import one_thread
from datasets.vector_env import make_envs
from results.checkpoint import load_agent
from results.run import ROOT, code_version

STUDIES = ROOT / "results" / "studies"


def once(study, name, measure):
    """`measure()`, a value that JSON can hold; from its file if it has been measured before."""
    path = runs_of(study, f"{name}.json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(measure()).encode())
    return json.loads(path.read_text())


def runs_of(study, name):
    return Path(os.environ.get("RUNS_DIR", ROOT / "runs")) / "studies" / study / name.replace(" ", "_")


def train(study, name, script, steps, *words):
    """Trains `script` up to `steps` with the command-line words, going on from its own checkpoint; the checkpoint."""
    runs = runs_of(study, name)
    source = [] if script == "sac" else ["--source", "collected"]  # it has no data
    command = [sys.executable, ROOT / "algorithms" / f"{script}.py", *source, "--steps", steps, *words]
    command += ["--resume"] * any(runs.rglob("checkpoint.pt"))
    print(" ".join(map(str, command[1:])), flush=True)
    done = subprocess.run(list(map(str, command)), env=os.environ | {"RUNS_DIR": str(runs)})
    if done.returncode:
        raise UserError(f"{script}.py stopped; 'make studies' goes on from its last checkpoint.")
    return next(runs.rglob("checkpoint.pt"))


@torch.no_grad()
@one_thread()
def rollout(data, policy, episodes, seed=0):
    """Episodes side by side: obs (T + 1, episodes, O), not normalized, and rew (T, episodes), 0 after an end."""
    envs = make_envs(data.task, episodes)
    obs, rews, running = [envs.reset(1000 * seed + np.arange(episodes))], [], np.ones(episodes, bool)
    while running.any():
        act = policy(normalized(data, obs[-1])).clamp(-1, 1).numpy()
        next_obs, rew, terminated, truncated = envs.step(act)
        obs.append(next_obs)
        rews.append(rew)
        running &= ~(terminated | truncated)
    return np.array(obs), np.array(rews)


def normalized(data, obs):
    return (torch.as_tensor(obs, dtype=torch.float32) - data.obs_mean) / data.obs_std


@torch.no_grad()
def value_and_truth(checkpoint, episodes=10):
    """Of a checkpoint's policy: its score, and from the same start states the value that its critics promise (the lower
    of the two) and the discounted return that follows, both means; the promise is None if there are no critics.
    """
    saved, script, data, policy = load_agent(checkpoint)
    obs, rew = rollout(data, policy, episodes)
    gamma = saved["args"].get("gamma", 0.99)
    truth = (gamma ** np.arange(len(rew)) @ rew).mean()
    promise = None
    if hasattr(script, "Critic"):
        depth = [saved["args"]["critic_layers"]] if saved["algorithm"] == "cql" else []
        critic = script.Critic(data.obs_dim, data.act_dim, *depth)
        critic.load_state_dict(saved["state"]["critic"])
        x = normalized(data, obs[0])
        promise = critic(x, policy(x).clamp(-1, 1)).amin(0).mean().item()
    return {"score": data.score(rew.sum(0)).mean(), "promise": promise, "truth": truth}


def keep(study, **result):
    """Writes the study's file, with the commit that measured it."""
    (STUDIES / f"{study}.json").write_text(json.dumps({"commit": code_version(), **result}) + "\n")
    print(f"Written: results/studies/{study}.json; 'make results' draws it.")


def kept(study):
    return json.loads((STUDIES / f"{study}.json").read_text())


def save_figure(figure, study):
    figure.tight_layout()
    figure.savefig(STUDIES / f"{study}.png", dpi=100, metadata={"Software": None})
