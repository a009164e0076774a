"""TD3+BC: A Minimalist Approach to Offline Reinforcement Learning (Fujimoto & Gu, NeurIPS 2021), arXiv:2106.06860.

    critic   target = rew + gamma (1 - done) min_i Q'_i(next_obs, clip(pi'(next_obs) + noise))
             L_Q    = sum_i E (Q_i(obs, act) - target)^2
    actor    L_pi   = -lam E Q_1(obs, pi(obs)) + E (pi(obs) - act)^2,   lam = alpha / E|Q_1(obs, pi(obs))|  (Eq. 3, 5)

The critics are TD3's (Fujimoto et al. 2018, arXiv:1802.09477): two of them, target smoothing, delayed actor.
Differs from the paper as the authors' code does: Eq. 5 averages |Q| over the data's actions, here it is over pi's.
Usage: python algorithms/td3_bc.py --env halfcheetah-medium
"""

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
    lr: float = 3e-4
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak step of the target networks
    eval_every: int = 5_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    policy_noise: float = 0.2  # TD3: standard deviation of the noise on target actions
    noise_clip: float = 0.5  # TD3: its bound
    policy_freq: int = 2  # TD3: critic updates to one of the actor
    alpha: float = 2.5  # weight of the critic's value against cloning (Eq. 5)


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


class EnsembleLinear(nn.Module):
    """The linear layers of N networks: x (B, I) or (N, B, I) -> (N, B, O); n: of the first n networks alone."""

    def __init__(self, N, in_dim, out_dim):
        super().__init__()
        layers = [nn.Linear(in_dim, out_dim) for _ in range(N)]
        self.weight = nn.Parameter(torch.stack([layer.weight.data.T for layer in layers]))  # (N, I, O)
        self.bias = nn.Parameter(torch.stack([layer.bias.data[None] for layer in layers]))  # (N, 1, O)

    def forward(self, x, n=None):
        weight, bias = (self.weight, self.bias) if n is None else (self.weight[:n], self.bias[:n])
        return torch.baddbmm(bias, x.expand(len(weight), *x.shape[-2:]), weight)  # x @ weight + bias


class Critic(nn.Module):
    """Two Q-functions: obs (B, O), act (B, A) -> q (2, B); n: of the first n alone."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        sizes = (obs_dim + act_dim, 256, 256, 1)
        self.layers = nn.ModuleList(EnsembleLinear(2, i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, obs, act, n=None):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        for layer in self.layers[:-1]:
            x = layer(x, n).relu_()  # (2, B, 256)
        return self.layers[-1](x, n).squeeze(-1)


def policy(obs, actor):
    """The action to evaluate: obs (B, O) -> act (B, A)."""
    return actor(obs)


def critic_loss(args, batch, critic, critic_target, actor_target):
    with torch.no_grad():
        noise = (torch.randn_like(batch.act) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_act = (actor_target(batch.next_obs) + noise).clamp(-1, 1)  # (B, A)
        next_q = critic_target(batch.next_obs, next_act)  # (2, B)
        assert next_q.shape == (2, len(batch.rew))
        target = batch.rew + args.gamma * (1 - batch.done) * next_q.amin(0)  # (B,)
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()


def actor_loss(args, batch, actor, critic):
    act = actor(batch.obs)  # (B, A)
    (q,) = critic(batch.obs, act, 1)  # (B,)
    lam = args.alpha / q.abs().mean().detach()  # (Eq. 5)
    return -lam * q.mean() + F.mse_loss(act, batch.act)  # (Eq. 3)


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
    data = load(args.env, args.source, run.device, args.eval_env)
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before
    data.normalize_obs()  # (Eq. 4)

    O, A = data.obs_dim, data.act_dim
    actor = stack([Actor(O, A) for _ in range(args.seeds)]).to(run.device)
    critic = stack([Critic(O, A) for _ in range(args.seeds)]).to(run.device)
    actor_target, critic_target = deepcopy(actor).requires_grad_(False), deepcopy(critic).requires_grad_(False)
    actor_opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True, capturable=True)
    critic_opt = torch.optim.Adam(critic.parameters(), args.lr, fused=True, capturable=True)
    critic_losses = lift(args.seeds, partial(critic_loss, args), critic, critic_target, actor_target)
    actor_losses = lift(args.seeds, partial(actor_loss, args), actor, critic)

    def update(with_actor):
        batch = data.sample(args.batch_size, args.seeds)
        loss = critic_losses(batch)  # (), or (S,)
        critic_opt.zero_grad()
        loss.sum().backward()
        critic_opt.step()
        losses = {"critic_loss": loss}

        if with_actor:
            loss = actor_losses(batch)
            actor_opt.zero_grad()
            loss.sum().backward(inputs=list(actor.parameters()))  # the critic's weights need no gradient here
            actor_opt.step()
            losses["actor_loss"] = loss
            with torch.no_grad():  # or the targets would drag the whole history of the networks along
                for target, net in ((actor_target, actor), (critic_target, critic)):
                    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), args.tau)
        run.watch(losses)

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    state = dict(actor=actor, actor_target=actor_target, critic=critic, critic_target=critic_target)
    for step in run.steps(data, **state, actor_opt=actor_opt, critic_opt=critic_opt):
        update(step % args.policy_freq == 0)
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
