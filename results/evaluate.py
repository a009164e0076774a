"""Evaluates a checkpoint, or a behaviour policy of datasets/policies/, in its environment.

Usage: python results/evaluate.py runs/td3_bc/collected/halfcheetah-medium/seed=0/checkpoint.pt --episodes 100
       python results/evaluate.py datasets/policies/halfcheetah-0110000.npz --noise
"""

import sys
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


def evaluate(args):
    """Episode returns, (episodes,) or of several agents (seeds, episodes), and the Dataset that scores them."""
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
        saved, script, data, policy = load_agent(args.checkpoint, device)
        seeds, rewards = saved["args"].get("seeds", 1), takes_rewards(policy)

    return data.evaluate(policy, args.episodes, args.seed, seeds, rewards), data


if __name__ == "__main__":
    args = tyro.cli(Args)
    returns, data = evaluate(args)
    for agent, own in enumerate(np.atleast_2d(returns)):
        name = f"{args.checkpoint}, agent {agent}" if returns.ndim > 1 else args.checkpoint
        print(
            f"{name} in {data.task.env_id}, {len(own)} episodes: return {own.mean():.1f} ± {own.std():.1f}, "
            f"normalized score {data.score(own).mean():.1f} ± {data.score(own).std():.1f}"
        )
