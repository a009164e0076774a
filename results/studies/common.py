"""What the studies share: they run the scripts, read their checkpoints, and keep what they have measured.

Training runs and single measurements lie in runs/studies/ (git-ignored), where an interrupted study goes on; each is
known by its settings, so that one made with others is never taken for it, and holds the commit that made it. A whole
study is one JSON file beside its script, from which `make results` draws its picture and writes its findings.
"""

import hashlib
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
from results.checkpoint import load_agent, takes_rewards
from results.run import ROOT, code_version

STUDIES = ROOT / "results" / "studies"
SEEDS = 0, 1, 2


def once(study, name, settings, measure):
    """`measure()`, a dict that JSON can hold, and the commit that it was made with; from its file if it has been
    measured before with the same settings (whatever JSON can hold, all that the result depends on but the code).
    """
    path = runs_of(study, name, settings).with_suffix(".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(measure() | {"commit": code_version()}).encode())
    return json.loads(path.read_text())


def runs_of(study, name, settings):
    """Where a study keeps the run or measurement of this name and these settings; other settings, another place."""
    digest = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:8]
    runs = Path(os.environ.get("RUNS_DIR", ROOT / "runs"))
    return runs / "studies" / study / f"{name}-{digest}".replace(" ", "_").replace(".", "_")


def train(study, name, script, steps, *words, source="collected"):
    """Trains `script` up to `steps` with the command-line words, going on from its own checkpoint; the checkpoint.
    source: None for a script that takes none."""
    runs = runs_of(study, name, [script, *words])
    command = [sys.executable, ROOT / "algorithms" / f"{script}.py", "--steps", steps, *words]
    command += ["--source", source] * (source is not None)
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
    envs, asks = make_envs(data.task, episodes), takes_rewards(policy)
    obs, rews, running = [envs.reset(1000 * seed + np.arange(episodes))], [], np.ones(episodes, bool)
    while running.any():
        more = [torch.as_tensor(rews[-1] if rews else np.zeros(episodes), dtype=torch.float32)] if asks else []
        act = policy(normalized(data, obs[-1]), *more).clamp(-1, 1).numpy()
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
    """Writes the study's file."""
    (STUDIES / f"{study}.json").write_text(json.dumps(result) + "\n")
    print(f"Written: results/studies/{study}.json; 'make results' draws it.")


def kept(study):
    return json.loads((STUDIES / f"{study}.json").read_text())


def mean_std(values, digits=1):
    """ "43.1 ± 0.4" of the seeds' values, or "43.1" of one."""
    deviation = f" ± {np.std(values, ddof=1):,.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):,.{digits}f}{deviation}"


def beyond(high, low):
    """Whether the seeds' values `high` lie above `low` by more than both spreads together; one seed cannot say it."""
    if min(len(high), len(low)) < 2:
        return False
    return np.mean(high) - np.mean(low) > np.std(high, ddof=1) + np.std(low, ddof=1)


def save_figure(figure, study):
    figure.tight_layout()
    figure.savefig(STUDIES / f"{study}.png", dpi=100, metadata={"Software": None})
