"""Policies that are to be evaluated without acting, as distributions: checkpoints, behaviour policies, tables."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

from datasets import Task, UserError
from datasets.collect import load_policy as load_behaviour
from results.checkpoint import load_agent, load_checkpoint

EDGE = 1 - 1e-6  # actions are taken back through the tanh from within these bounds
LOWEST = {"sac_n": -5, "edac": -5}  # of log_std, where it is not SAC's -20


@dataclass(frozen=True)
class Gaussian:
    """Continuous actions u ~ N(mean, std), or tanh(u); without a deviation the mean alone."""

    name: str
    forward: Callable  # obs (B, O), not normalized -> mean (B, A), log_std (B, A), (A,) or None
    squashed: bool
    has_noise: bool = True

    def act(self, obs, noise=True):
        """An action each: (B, O) -> (B, A). noise: drawn from the distribution; else the mean, which is what runs."""
        u, log_std = self.forward(obs)
        if noise and log_std is not None:
            u = u + log_std.exp() * torch.randn_like(u)
        return u.tanh() if self.squashed else u.clamp(-1, 1)

    def log_prob(self, obs, act):
        """Log densities of the actions: (B, O), (B, A) -> (B,). UserError where the policy has none."""
        mean, log_std = self.forward(obs)
        if log_std is None:
            raise UserError(
                f"{self.name} is deterministic: no logged action is exactly its own, and every importance weight would "
                "be 0. Value it with fqe.py, or with --std 0.1 (fqe.py: and --noise) the policy that adds such noise."
            )
        u = act.clamp(-EDGE, EDGE).atanh() if self.squashed else act
        log_prob = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
        if self.squashed:  # log |d tanh(u) / du|, as 2 (log 2 - u - softplus(-2 u)), which does not underflow
            log_prob = log_prob - 2 * (np.log(2) - u - F.softplus(-2 * u))
        return log_prob.sum(-1)


@dataclass(frozen=True)
class Discrete:
    """Discrete actions, drawn with given probabilities."""

    name: str
    probs: Callable  # obs (B, O), not normalized -> (B, A)
    has_noise = False  # no distribution beside the one that acts

    def act(self, obs, noise=True):
        """An action each, one-hot: (B, O) -> (B, A)."""
        probs = self.probs(obs)
        drawn = torch.multinomial(probs.flatten(0, -2), 1).view(probs.shape[:-1])
        return F.one_hot(drawn, probs.shape[-1]).to(probs.dtype)

    def log_prob(self, obs, act):
        """Log probabilities of the actions: (B, O), (B,) -> (B,); -inf where there is none."""
        return self.probs(obs).gather(-1, act.long().view(-1, 1)).squeeze(-1).log()


def load_policies(paths, data, std=0.0):
    """The policy in each file, for the task of a Dataset, on its device:

        checkpoint.pt   of a run (--seeds 1): the distribution of its actions, if it has one, else its action
        hopper-*.npz    a behaviour policy of datasets/policies/
        table.npy       probabilities (states, actions), for data whose observations are one-hot states

    std: of the noise given to the actions of a policy without any. UserError for another task's policy.
    """
    if not paths:
        raise UserError("There is no policy to evaluate: name one or several after --policies.")
    return [_load(Path(path), data, std) for path in paths]


def _load(path, data, std):
    if path.suffix == ".npy":
        return _table(path, data)
    if path.suffix != ".npz":
        return _checkpoint(path, data, std)
    _check_task(path, path.stem.split("-")[0], data)
    load_behaviour(path)  # which says what is wrong with the file; it is on NumPy, and this is on the data's device
    with np.load(path) as arrays:
        layers = [torch.from_numpy(array.astype(np.float32)).to(data.rows) for array in arrays.values()]

    def forward(obs):
        W0, b0, W1, b1, W2, b2 = layers
        h = F.linear(F.linear(obs, W0, b0).relu(), W1, b1).relu()
        mean, log_std = F.linear(h, W2, b2).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    return Gaussian(str(path), forward, True)


def _checkpoint(path, data, std):
    device = data.rows.device
    saved = load_checkpoint(path, device)
    name, script = saved["algorithm"], importlib.import_module(f"algorithms.{saved['algorithm']}")
    if not hasattr(script, "policy") or hasattr(script, "Rollout"):
        raise UserError(f"{path} is of {name}.py, whose agent is no function of the observation alone.")
    if saved["args"].get("seeds", 1) > 1:
        raise UserError(f"{path} holds {saved['args']['seeds']} agents; evaluate one that was trained with --seeds 1.")
    _check_task(path, Task(**saved["task"]).family, data, len(saved["obs_mean"]))
    normalized = lambda obs: (obs - saved["obs_mean"]) / saved["obs_std"]
    if data.n_actions and hasattr(script, "classifier"):
        actor = script.classifier(data.obs_dim, data.n_actions).to(device).requires_grad_(False)
        actor.load_state_dict(saved["state"]["actor"])
        return Discrete(str(path), lambda obs: actor(normalized(obs)).softmax(-1))
    if data.n_actions:  # the action that it takes for the best
        policy = load_agent(path, device)[-1]
        return Discrete(str(path), lambda obs: F.one_hot(policy(normalized(obs)), data.n_actions).to(obs.dtype))
    actor = script.Actor(data.obs_dim, data.act_dim).to(device).requires_grad_(False)
    actor.load_state_dict(saved["state"]["actor"])
    if "deviation" in saved["state"]:  # bc.py --policy gaussian
        deviation = script.mlp(data.obs_dim, 256, 256, data.act_dim).to(device).requires_grad_(False)
        deviation.load_state_dict(saved["state"]["deviation"])
        spread = lambda obs: deviation(normalized(obs)).clamp(-5, 2)
        return Gaussian(str(path), lambda obs: (actor(normalized(obs)), spread(obs)), False)
    sample, lowest = actor(torch.zeros(1, data.obs_dim, device=device)), LOWEST.get(name, -20)
    if isinstance(sample, torch.Tensor):
        log_std = torch.full((data.act_dim,), std, device=device).log() if std else None
        return Gaussian(str(path), lambda obs: (script.policy(normalized(obs), actor), log_std), False, bool(std))
    if hasattr(actor, "log_std"):
        mean = lambda obs: script.policy(normalized(obs), actor)
        return Gaussian(str(path), lambda obs: (mean(obs), actor(normalized(obs))[1]), False)

    def squashed(obs):
        mean, log_std = actor.net(normalized(obs)).chunk(2, -1)
        return mean, log_std.clamp(lowest, 2)

    return Gaussian(str(path), squashed, True)


def _table(path, data):
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        raise UserError(f"There is no readable table of probabilities {path}.") from None
    shape = data.obs_dim, data.n_actions
    if table.shape != shape or not (table >= 0).all() or not np.allclose(table.sum(-1), 1, atol=1e-6):
        raise UserError(
            f"{path} is no policy for {data.task.name}: it must be a table {shape} of probabilities, a row for each "
            "state, and each row must add up to 1."
        )
    table = torch.as_tensor(table, dtype=data.rows.dtype, device=data.rows.device)
    return Discrete(str(path), lambda obs: obs @ table)


def _check_task(path, family, data, obs_dim=None):
    if family != data.task.family or (data.n_actions and path.suffix == ".npz"):
        raise UserError(f"{path} is a policy for {family}, and the data are {data.task.name}'s.")
    if obs_dim not in (None, data.obs_dim):
        raise UserError(f"{path} sees {obs_dim} numbers; an observation of {data.task.name} has {data.obs_dim}.")


@torch.no_grad()
def log_probs(policy, data):
    """Log probabilities, or densities, of the logged actions of a Dataset that is not normalized: (N,) float64."""
    blocks = map(data.batch, data.rows[: len(data)].split(10_000))
    return torch.cat([policy.log_prob(batch.obs, batch.act) for batch in blocks]).double().cpu().numpy()


def load_critics(path, data):
    """The policies that a checkpoint of fqe.py values, and the Q of each: raw obs (B, O), act (B, A) -> (B,)."""
    saved, device = load_checkpoint(path, data.rows.device), data.rows.device
    if saved["algorithm"] != "fqe":
        raise UserError(f"{path} is of {saved['algorithm']}.py; --critic takes a checkpoint of fqe.py.")
    policies = load_policies(saved["args"]["policies"], data, saved["args"]["std"])
    if noisy := [policy.name for policy in policies if not saved["args"]["noise"] and policy.has_noise]:
        raise UserError(f"{path} values the mean action of {noisy[0]}, not its distribution: train it with --noise.")
    fqe = importlib.import_module("algorithms.fqe")
    net = fqe.Critic(data.obs_dim, data.n_actions or data.act_dim).to(device).requires_grad_(False)

    def q_function(k):
        state = saved["state"]["critic_target"]
        params = {name: x[k] for name, x in state.items()} if len(policies) > 1 else state

        def q(obs, act):
            obs = (obs - saved["obs_mean"]) / saved["obs_std"]
            return saved["state"]["scale"] * functional_call(net, params, (obs, act))

        return q

    return policies, [q_function(k) for k in range(len(policies))]
