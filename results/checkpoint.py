"""Reads a checkpoint that `Run` saved: as it is, or as the agent that acts."""

import importlib
from functools import partial
from inspect import signature

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


def set_up(function, settings):
    """A function, or class, with those of the settings that it has arguments for."""
    return partial(function, **{name: settings[name] for name in signature(function).parameters if name in settings})


def takes_rewards(policy):
    """Whether a policy is also to be given the reward of the step before."""
    return "rew" in signature(policy).parameters


def load_agent(path, device="cpu", **changes):
    """A checkpoint as (what was saved, its script's module, an empty Dataset that evaluates and scores, the policy as
    a function of normalized obs); of several agents, stacked. changes: of the script's arguments, to act with."""
    saved = load_checkpoint(path, device)
    if unknown := changes.keys() - saved["args"].keys():
        raise UserError(f"{saved['algorithm']}.py has no argument {', '.join(sorted(unknown))}.")
    saved["args"] |= changes
    data = Dataset.buffer(Task(**saved["task"]), 0, device, saved.get("n_actions"))
    data.obs_mean, data.obs_std = saved["obs_mean"], saved["obs_std"]
    script = importlib.import_module(f"algorithms.{saved['algorithm']}")
    seeds, members = (saved["args"].get(name, 1) for name in ("seeds", "members"))  # members: of one agent's policy
    settings = saved["args"] | {"args": script.Args(**saved["args"]), "obs_std": saved["obs_std"]}
    if data.n_actions and hasattr(script, "classifier"):
        actors, act = [script.classifier(data.obs_dim, data.n_actions) for _ in range(seeds)], script.choice
    else:
        act = set_up(script.policy, settings)
        net = set_up(script.Critic if data.n_actions else script.Actor, settings)  # of discrete actions the critic acts
        sizes = (data.obs_shape, data.n_actions) if data.n_actions else (data.obs_dim, data.act_dim)
        actors = [net(*sizes) for _ in range(seeds * members)]
    actor = (script.stack(actors) if len(actors) > 1 else actors[0]).to(device)
    actor.load_state_dict(saved["state"]["actor" if "actor" in saved["state"] else "critic"])
    policy = script.lift(seeds, act, actor) if seeds > 1 else lambda *inputs: act(*inputs, actor)
    if hasattr(script, "Rollout"):  # a policy with a memory, for one evaluation
        policy = set_up(script.Rollout, settings | {"act_dim": data.act_dim, "act": policy})()
    return saved, script, data, policy
