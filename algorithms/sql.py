"""SQL: In-Sample Learning via Implicit Value Regularization (Xu et al., ICLR 2023), arXiv:2303.15810; and its EQL.

    value    SQL   L_V  = E [max(1 + u / (2 alpha), 0)^2 + V(obs) / alpha],   u = min_i Q'_i(obs, act) - V(obs)
             EQL   L_V  = E [exp(u / alpha) + V(obs) / alpha]
    critic   L_Q  = sum_i E (Q_i(obs, act) - target)^2,   target = rew + gamma (1 - done) V(next_obs)
    actor    L_pi = -E w log pi(act | obs),   SQL: w = max(u, 0), EQL: w = exp(10 u / alpha); both at most 100

iql.py with another L_V and other weights. SQL is sparse: what is worse than V is not cloned at all. As in the authors'
code: SQL's weight is u, EQL's has the factor 10; EQL's exponent is cut at 5, its L_V is divided by exp of a batch's
largest; V has layer normalisation. Differs from theirs as iql.py does; no dropout in V, theirs is never on.
Usage: python algorithms/sql.py --env halfcheetah-medium [--variant eql]
"""

import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import load
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
    lr: float | None = None  # None, here and below: as in TUNED
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak step of the target networks
    eval_every: int = 5_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    variant: Literal["sql", "eql"] = "sql"  # sparse or exponential Q-learning
    alpha_sql: float | None = None  # how close to the data V and the policy stay, in SQL
    alpha_eql: float | None = None  # the same in EQL
    dropout: float | None = None  # of the actor's hidden layers, in training; None: as in TUNED


TUNED = {  # "" for all tasks, then by family, then by task: run_*.sh and configs/ of github.com/ryanxhr/IVR
    "": dict(lr=3e-4, alpha_sql=1.0, alpha_eql=2.0, dropout=0.0),
    **dict.fromkeys(("antmaze", "pointmaze", "stitch"), dict(lr=2e-4, alpha_sql=0.1, alpha_eql=0.5)),  # as AntMaze
    "antmaze-umaze-diverse": dict(alpha_sql=3.0, alpha_eql=5.0),
    "kitchen": dict(alpha_sql=0.5, alpha_eql=2.0, dropout=0.1),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def value_mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.LayerNorm(o, eps=1e-6), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2])


class Actor(nn.Module):
    """Gaussian: obs (B, O) -> mean (B, A) in [-1, 1], log_std (A,)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs, dropout=0.0):
        x = obs
        for layer in self.net:
            x = F.dropout(layer(x), dropout) if isinstance(layer, nn.ReLU) else layer(x)
        return x.tanh(), self.log_std.clamp(-5, 2)


class EnsembleLinear(nn.Module):
    """The linear layers of N networks: x (B, I) or (N, B, I) -> (N, B, O)."""

    def __init__(self, N, in_dim, out_dim):
        super().__init__()
        layers = [nn.Linear(in_dim, out_dim) for _ in range(N)]
        self.weight = nn.Parameter(torch.stack([layer.weight.data.T for layer in layers]))  # (N, I, O)
        self.bias = nn.Parameter(torch.stack([layer.bias.data[None] for layer in layers]))  # (N, 1, O)

    def forward(self, x):
        return torch.baddbmm(self.bias, x.expand(len(self.weight), *x.shape[-2:]), self.weight)  # x @ weight + bias


class Critic(nn.Module):
    """Two Q-functions: obs (B, O), act (B, A) -> q (2, B)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        sizes = (obs_dim + act_dim, 256, 256, 1)
        self.layers = nn.ModuleList(EnsembleLinear(2, i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, obs, act):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        for layer in self.layers[:-1]:
            x = layer(x).relu_()  # (2, B, 256)
        return self.layers[-1](x).squeeze(-1)


def policy(obs, actor):
    """The action to evaluate, the mean: obs (B, O) -> act (B, A)."""
    return actor(obs)[0]


def losses(args, batch, actor, critic, value, critic_target):
    """Of V (by the variant), Q and pi; each has a gradient in its own network alone, so that they can be summed."""
    with torch.no_grad():
        target_q = critic_target(batch.obs, batch.act)  # (2, B)
        assert target_q.shape == (2, len(batch.rew))
        target = batch.rew + args.gamma * (1 - batch.done) * value(batch.next_obs).squeeze(-1)  # (B,)
    v = value(batch.obs).squeeze(-1)  # (B,)
    u = target_q.amin(0) - v  # (B,)
    if args.variant == "sql":
        value_loss = ((1 + u / (2 * args.alpha_sql)).clamp(min=0) ** 2 + v / args.alpha_sql).mean()
        weight = u.detach().clamp(0, 100)
    else:
        z = (u / args.alpha_eql).clamp(max=5)
        m = z.detach().amax().clamp(min=-1)  # times exp(-m): a step that fits the batch
        value_loss = ((z - m).exp() + (-m).exp() * v / args.alpha_eql).mean()
        weight = (10 * u.detach() / args.alpha_eql).exp().clamp(max=100)

    critic_loss = ((critic(batch.obs, batch.act) - target) ** 2).mean(1).sum()  # of (2, B)

    mean, log_std = actor(batch.obs, args.dropout)  # (B, A), (A,)
    log_prob = -0.5 * ((batch.act - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)  # (B, A)
    actor_loss = -(weight * log_prob.sum(-1)).mean()
    return {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}


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
    run = Run(__file__, args, schedule=True)  # of the actor's learning rate
    data = load(args.env, args.source, run.device, args.eval_env)
    args = run.tuned(data.task, TUNED)
    if data.task.family in ("halfcheetah", "hopper", "walker2d"):
        returns = data.returns()
        data.rew *= 1000 / (returns.max() - returns.min())
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)

    O, A = data.obs_dim, data.act_dim
    actor = stack([Actor(O, A) for _ in range(args.seeds)]).to(run.device)
    critic = stack([Critic(O, A) for _ in range(args.seeds)]).to(run.device)
    value = stack([value_mlp(O, 256, 256, 1) for _ in range(args.seeds)]).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    lr = torch.tensor(args.lr, device=run.device)  # the actor's: a tensor, for update() to change
    groups = [{"params": actor.parameters(), "lr": lr}, {"params": [*critic.parameters(), *value.parameters()]}]
    opt = torch.optim.Adam(groups, args.lr, fused=True, capturable=True)
    all_losses = lift(args.seeds, partial(losses, args), actor, critic, value, critic_target)

    def update():
        batch = data.sample(args.batch_size, args.seeds)
        loss = all_losses(batch)  # three, () each or (S,)
        opt.zero_grad()
        sum(loss.values()).sum().backward()
        opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the networks along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
            progress = opt.state[actor.log_std]["step"] / args.steps  # (), on the device: Adam's own count
            opt.param_groups[0]["lr"].copy_(args.lr / 2 * (1 + torch.cos(torch.pi * progress)))  # for the next update
        run.watch(loss)

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    state = dict(actor=actor, critic=critic, critic_target=critic_target, value=value)
    for step in run.steps(data, **state, opt=opt):
        update()
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
