"""Evaluates a checkpoint, or a behaviour policy of datasets/policies/, in its environment.

Usage: python results/evaluate.py runs/td3_bc/collected/halfcheetah-medium/seed=0/checkpoint.pt --episodes 100
       python results/evaluate.py datasets/policies/halfcheetah-0110000.npz --noise
       python results/evaluate.py runs/diffuser/…/checkpoint.pt --episodes 50 --change acting_steps=5 warm=2
It also says how many actions the policy gives in a second, all episodes at once: the environments' time is not in it.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets import BODIES, Dataset, UserError, find_task
from datasets.collect import load_policy
from results.checkpoint import load_agent, takes_rewards
from results.run import choose_device


@dataclass
class Args:
    checkpoint: Annotated[Path, tyro.conf.Positional]  # checkpoint.pt of a run, or a behaviour policy (.npz)
    episodes: int = 100
    seed: int = 0  # of the start states; a run evaluates with its own seed
    device: str = "cpu"
    noise: bool = False  # behaviour policies: sample the actions, as the data were collected, instead of the mean
    change: tuple[str, ...] = ()  # of the run's arguments, to act with others: name=value


def evaluate(args):
    """Episode returns, (episodes,) or of several agents (seeds, episodes); the Dataset that scores them; actions/s."""
    if args.episodes <= 0:
        raise UserError(f"--episodes must be at least 1, not {args.episodes}.")
    device = choose_device(args.device)
    if args.checkpoint.suffix == ".npz":
        data = Dataset.buffer(find_task(args.checkpoint.stem.split("-")[0], BODIES), 0, device)
        behaviour, rng = load_policy(args.checkpoint), np.random.default_rng(args.seed)

        def policy(obs):
            mean, log_std = behaviour(obs.cpu().numpy())
            noise = args.noise * np.exp(log_std) * rng.standard_normal(mean.shape, np.float32)
            return torch.from_numpy(np.tanh(mean + noise))

        seeds, rewards = 1, False
    else:
        saved, script, data, policy = load_agent(args.checkpoint, device, **changes_of(args.change))
        seeds, rewards = saved["args"].get("seeds", 1), takes_rewards(policy)
        if not data.task.evaluable:
            data.task.make_env()  # which says why
    taken = []

    def timed(*inputs):
        start = time.perf_counter()
        act = policy(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        return act

    returns = data.evaluate(timed, args.episodes, args.seed, seeds, rewards)
    return returns, data, returns.size * len(taken) / sum(taken)


def changes_of(words):
    """["acting_steps=5", …] -> {"acting_steps": 5, …}"""
    changes = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            changes[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            raise UserError(f"--change takes name=value, a number, true or false, not {word}.") from None
    return changes


if __name__ == "__main__":
    args = tyro.cli(Args)
    returns, data, rate = evaluate(args)
    for agent, own in enumerate(np.atleast_2d(returns)):
        name = f"{args.checkpoint}, agent {agent}" if returns.ndim > 1 else args.checkpoint
        print(
            f"{name} in {data.task.env_id}, {len(own)} episodes: return {own.mean():.1f} ± {own.std():.1f}, "
            f"normalized score {data.score(own).mean():.1f} ± {data.score(own).std():.1f}"
        )
    print(f"{rate:.0f} actions/s, {returns.size} at once")
