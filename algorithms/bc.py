"""BC: behaviour cloning, supervised learning of the actions in the data; the baseline of every table.

    deterministic  L_pi = E (pi(obs) - act)^2
    gaussian       L_pi = -E log N(act; pi(obs), std(obs)^2), less its constant
    discrete       L_pi = -E log pi(act | obs), where the data's actions are; the likeliest acts

--top-fraction 0.1 is 10% BC: it clones only the tenth of the trajectories with the highest returns, as CORL does. Chen
et al. (Decision Transformer, NeurIPS 2021, arXiv:2106.01345) take the best trajectories up to a tenth of the timesteps.

--demos 4 clones as few and as thinned out trajectories as GAIL is given (gail.py).
Widths, learning rate, batch size and normalisation are those of CORL's any_percent_bc.py.
Usage: python algorithms/bc.py --env halfcheetah-medium
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import UserError, load
from results.run import Run


@dataclass
class Args:
    env: str = "halfcheetah-medium"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    eval_env: str = ""  # the Gymnasium environment to evaluate in, for an HDF5 file of your own
    seed: int = 0
    seeds: int = 1  # agents trained side by side: seed, seed + 1, ...
    steps: int = 1_000_000  # updates
    batch_size: int = 256
    lr: float = 3e-4
    eval_every: int = 5_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    policy: Literal["deterministic", "gaussian"] = "deterministic"  # of continuous actions; gaussian: with a deviation
    top_fraction: float = 1.0  # share of the trajectories that are cloned, the best by return (0.1: 10% BC)
    demos: int = 0  # trajectories of the expert, drawn at random; 0: all that there are, whole
    every: int = 20  # of each trajectory, every so manieth pair is used (with --demos)


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """obs (B, O) -> act (B, A) in [-1, 1]."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, act_dim)

    def forward(self, obs):
        return self.net(obs).tanh()


def classifier(obs_dim, n_actions):
    """obs (B, O) -> the logits of discrete actions (B, A)."""
    return mlp(obs_dim, 256, 256, n_actions)


def policy(obs, actor):
    """The action to evaluate: obs (B, O) -> act (B, A)."""
    return actor(obs)


def choice(obs, actor):
    """The discrete action to evaluate, the likeliest: obs (B, O) -> act (B,)."""
    return actor(obs).argmax(-1)


def actor_loss(batch, actor):
    return F.mse_loss(actor(batch.obs), batch.act)


def gaussian_loss(batch, actor, deviation):
    """The negative log-likelihood, less its constant. The mean acts, and is the deterministic policy's network."""
    mean, log_std = actor(batch.obs), deviation(batch.obs).clamp(-5, 2)  # (B, A) each
    return (0.5 * ((batch.act - mean) / log_std.exp()) ** 2 + log_std).sum(-1).mean()


def discrete_loss(batch, actor):
    return F.cross_entropy(actor(batch.obs), batch.act)


def top_trajectories(data, fraction):
    """Indices of the trajectories with the highest returns, best first; at least one."""
    return np.argsort(-data.returns())[: max(1, int(fraction * len(data.ends)))]


def stack(nets):
    """The networks of S agents as one, whose parameters have a leading axis S; of one agent, its own."""
    if len(nets) > 1:
        for params in zip(*(net.parameters() for net in nets)):
            params[0].data = torch.stack([param.data for param in params])
    return nets[0]


def lift(seeds, function, *nets):
    """`function(*inputs, *nets)` of one agent -> a function of the inputs of all agents, each (S, ...)."""
    if seeds == 1:
        return lambda *inputs: function(*inputs, *nets)

    def one_agent(params, *inputs):
        calls = [lambda *x, net=net, p=p: functional_call(net, p, x) for net, p in zip(nets, params)]
        return function(*inputs, *calls)

    return partial(torch.vmap(one_agent, randomness="different"), [dict(net.named_parameters()) for net in nets])


def train(args):
    run = Run(__file__, args)
    if not 0 < args.top_fraction <= 1:
        raise UserError(f"--top-fraction must lie in (0, 1], not {args.top_fraction}.")
    data = load(args.env, args.source, run.device, args.eval_env, discrete=None)
    if data.n_actions and args.policy == "gaussian":
        raise UserError(
            f"--policy gaussian is for continuous actions, and {args.env} has {data.n_actions} discrete ones."
        )
    if args.top_fraction < 1:
        data.keep(top_trajectories(data, args.top_fraction))
    if args.demos:
        data.keep_demos(args.demos, args.every, args.seed)
    if not data.n_actions:  # states and frames are in no other units
        data.normalize_obs()  # (obs - mean) / (std + 1e-3)

    O, A = data.obs_dim, data.n_actions or data.act_dim
    net, loss_of, acts = (classifier, discrete_loss, choice) if data.n_actions else (Actor, actor_loss, policy)
    actor = stack([net(O, A) for _ in range(args.seeds)]).to(run.device)
    nets = {"actor": actor}
    if args.policy == "gaussian":
        deviations = [mlp(O, 256, 256, A) for _ in range(args.seeds)]
        nets, loss_of = nets | {"deviation": stack(deviations).to(run.device)}, gaussian_loss
    params = [param for net in nets.values() for param in net.parameters()]
    actor_opt = torch.optim.Adam(params, args.lr, fused=True, capturable=True)
    actor_losses = lift(args.seeds, loss_of, *nets.values())

    def update():
        batch = data.sample(args.batch_size, args.seeds)
        loss = actor_losses(batch)  # (), or (S,)
        actor_opt.zero_grad()
        loss.sum().backward()
        actor_opt.step()
        run.watch({"actor_loss": loss})

    update = run.graphed(update)
    act = lift(args.seeds, acts, actor)
    for step in run.steps(data, **nets, actor_opt=actor_opt):
        update()
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
