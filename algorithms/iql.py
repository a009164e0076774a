"""IQL: Offline Reinforcement Learning with Implicit Q-Learning (Kostrikov et al., ICLR 2022), arXiv:2110.06169.

    value    L_V  = E |expectile - 1(u < 0)| u^2,   u = min_i Q'_i(obs, act) - V(obs)                    (Eq. 5)
    critic   L_Q  = sum_i E (Q_i(obs, act) - target)^2,   target = rew + gamma (1 - done) V(next_obs)    (Eq. 6)
    actor    L_pi = -E min(exp(beta u), 100) log pi(act | obs)                                           (Eq. 7)

No Q-function is ever asked about an action outside the data. pi is a Gaussian that is not squashed: its mean is a tanh,
its deviation does not depend on obs. As in the authors' code: the actor's learning rate falls to 0 along a cosine over
--steps, and locomotion rewards are divided by the range of the trajectories' returns. Differs from the authors' code:
observations are normalized, which learns several times as fast, as in CORL; PyTorch's initialisation, not orthogonal.
Usage: python algorithms/iql.py --env halfcheetah-medium
"""

import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak step of the target networks
    eval_every: int = 5_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    expectile: float | None = None  # of the Q-values that V estimates (Eq. 5); None: as in TUNED
    beta: float | None = None  # inverse temperature of the policy's weights (Eq. 7); None: as in TUNED
    dropout: float | None = None  # of the actor's hidden layers, in training; None: as in TUNED


TUNED = {  # "" for all tasks, then by family, then by task: configs/ of github.com/ikostrikov/implicit_q_learning
    "": dict(expectile=0.7, beta=3.0, dropout=0.0),
    "antmaze": dict(expectile=0.9, beta=10.0),
    **dict.fromkeys(("kitchen", "pen", "door", "hammer", "relocate"), dict(beta=0.5, dropout=0.1)),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


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


def value_loss(args, batch, value, critic_target):
    with torch.no_grad():
        q = critic_target(batch.obs, batch.act)  # (2, B)
        assert q.shape == (2, len(batch.rew))
    min_q = q.amin(0)  # (B,), which the actor's loss needs too
    u = min_q - value(batch.obs).squeeze(-1)
    return ((args.expectile - (u < 0).float()).abs() * u**2).mean(), min_q  # (Eq. 5)


def actor_loss(args, batch, min_q, actor, value):
    with torch.no_grad():
        u = min_q - value(batch.obs).squeeze(-1)  # (B,)
        weight = (args.beta * u).exp().clamp(max=100)
    mean, log_std = actor(batch.obs, args.dropout)  # (B, A), (A,)
    log_prob = -0.5 * ((batch.act - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)  # (B, A)
    return -(weight * log_prob.sum(-1)).mean()  # (Eq. 7)


def critic_loss(args, batch, critic, value):
    with torch.no_grad():
        next_v = value(batch.next_obs).squeeze(-1)  # (B,)
        target = batch.rew + args.gamma * (1 - batch.done) * next_v
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()  # (Eq. 6)


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
    if not 0 < args.expectile < 1:
        raise UserError(f"--expectile must lie in (0, 1), not {args.expectile}.")
    if data.task.family in ("halfcheetah", "hopper", "walker2d"):
        returns = data.returns()
        data.rew *= 1000 / (returns.max() - returns.min())
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)

    O, A = data.obs_dim, data.act_dim
    actor = stack([Actor(O, A) for _ in range(args.seeds)]).to(run.device)
    critic = stack([Critic(O, A) for _ in range(args.seeds)]).to(run.device)
    value = stack([mlp(O, 256, 256, 1) for _ in range(args.seeds)]).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    adam = partial(torch.optim.Adam, fused=True, capturable=True)
    actor_opt = adam(actor.parameters(), torch.tensor(args.lr, device=run.device))  # a tensor, for update() to change
    critic_opt = adam(critic.parameters(), args.lr)
    value_opt = adam(value.parameters(), args.lr)
    value_losses = lift(args.seeds, partial(value_loss, args), value, critic_target)
    actor_losses = lift(args.seeds, partial(actor_loss, args), actor, value)
    critic_losses = lift(args.seeds, partial(critic_loss, args), critic, value)

    def update():  # in the authors' order: actor and critic already see the new V
        batch = data.sample(args.batch_size, args.seeds)
        loss_v, min_q = value_losses(batch)  # (), or (S,); (B,), or (S, B)
        value_opt.zero_grad()
        loss_v.sum().backward()
        value_opt.step()

        loss_pi = actor_losses(batch, min_q)
        actor_opt.zero_grad()
        loss_pi.sum().backward()
        actor_opt.step()
        progress = actor_opt.state[actor.log_std]["step"] / args.steps  # (), on the device: Adam's own count
        actor_opt.param_groups[0]["lr"].copy_(args.lr / 2 * (1 + torch.cos(torch.pi * progress)))  # for the next update

        loss_q = critic_losses(batch)
        critic_opt.zero_grad()
        loss_q.sum().backward()
        critic_opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the networks along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
        run.watch({"value_loss": loss_v, "actor_loss": loss_pi, "critic_loss": loss_q})

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    state = dict(actor=actor, critic=critic, critic_target=critic_target, value=value)
    for step in run.steps(data, **state, actor_opt=actor_opt, critic_opt=critic_opt, value_opt=value_opt):
        update()
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
