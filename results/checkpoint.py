"""Reads a checkpoint that `Run` saved: as it is, or as the agent that acts."""

import importlib
from functools import partial

import torch

from datasets import Dataset, Task, UserError


def load_checkpoint(path, device="cpu"):
    """The dictionary that `Run` saved: algorithm, args, state, obs_mean, obs_std, … Nothing is unpickled."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint {path}.") from None
    except Exception as error:  # torch.load has no one exception for a damaged file
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}).") from None


def load_agent(path, device="cpu"):
    """A checkpoint as (what was saved, its script's module, an empty Dataset that evaluates and scores, the policy as
    a function of normalized obs); of several agents, stacked."""
    saved = load_checkpoint(path, device)
    data = Dataset.buffer(Task(**saved["task"]), 0, device)
    data.obs_mean, data.obs_std = saved["obs_mean"], saved["obs_std"]
    script = importlib.import_module(f"algorithms.{saved['algorithm']}")
    seeds = saved["args"].get("seeds", 1)
    if data.n_actions:  # the critic acts
        quantiles = [saved["args"]["quantiles"]] if "quantiles" in saved["args"] else []
        actors = [script.Critic(data.obs_shape, data.n_actions, *quantiles) for _ in range(seeds)]
    else:
        actors = [script.Actor(data.obs_dim, data.act_dim) for _ in range(seeds)]
    actor = (script.stack(actors) if seeds > 1 else actors[0]).to(device)
    actor.load_state_dict(saved["state"]["critic" if data.n_actions else "actor"])
    words = {"threshold": saved["args"]["threshold"]} if data.n_actions and "threshold" in saved["args"] else {}
    act = partial(script.policy, **words)
    policy = script.lift(seeds, act, actor) if seeds > 1 else lambda obs: act(obs, actor)
    if hasattr(script, "Rollout"):  # a policy with a memory, for one evaluation
        policy = script.Rollout(script.Args(**saved["args"]), data.act_dim, policy, saved["args"]["target"])
    return saved, script, data, policy
