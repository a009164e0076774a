"""BEAR: Stabilizing Off-Policy Q-Learning via Bootstrapping Error Reduction (Kumar et al. 2019), arXiv:1906.00949.

    critic   L_Q  = sum_i E (Q_i(obs, act) - target)^2,   next_act_k ~ pi(next_obs)
             target = rew + gamma (1 - done) max_k [lam min_i Q'_i + (1 - lam) max_i Q'_i](next_obs, next_act_k)
    MMD      mmd  = sqrt(E k(x, x') + E k(y, y') - 2 E k(x, y)),   x ~ pi, y of BCQ's VAE of the data, before the tanh
             k(x, y) = exp(-|x - y|_1 / (2 sigma)), laplacian, or exp(-|x - y|_2^2 / (2 sigma)), gaussian
    actor    L_pi = E alpha (mmd - threshold) - min_i Q_i(obs, x);   alpha grows while mmd > threshold

NeurIPS 2019; as in its authors' later code, d4rl_evaluations, which made D4RL's scores. The older one has 400 and 300
units, a target actor, other rates and a start of another kind. It acts by the best of 100 actions by Q_1. Differs from
that code: the actor's loss sees the critics after their step; PyTorch's initial weights; the noise of those 100 is
drawn once for all states, so that a checkpoint always acts alike; AntMaze's rewards are lowered by 1.
Usage: python algorithms/bear.py --env halfcheetah-medium
"""

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
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    n_actions: int = 10  # for each next observation, of which the target takes the best
    lam: float = 0.75  # weight of the lower Q-function in the target, against the higher
    actor_lr: float = 1e-4  # of the policy; --lr is of the critics and the VAE
    alpha_lr: float = 1e-3  # of the multiplier's logarithm
    n_mmd: int = 4  # actions of the policy and of the VAE for each observation, of which the MMD is taken
    threshold: float = 0.05  # of the MMD
    warmup: int = 40_000  # updates at the start in which the policy comes near the data, and heeds no Q
    kernel: Literal["laplacian", "gaussian"] | None = None  # of the MMD; None: as in TUNED
    sigma: float | None = None  # the kernel's width; None: as in TUNED


TUNED = {  # "" for all tasks, then by family, then by task: bear/README.md of github.com/rail-berkeley/d4rl_evaluations
    "": dict(kernel="laplacian", sigma=20.0),  # there hopper's and walker2d's; the others' as in d3rlpy
    "halfcheetah": dict(kernel="gaussian"),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


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


class VAE(nn.Module):
    """Of actions: the encoder, (obs, act) -> mean and log_std of z (B, 2 A), and the decoder, (obs, z) -> act."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.encoder = mlp(obs_dim + act_dim, 750, 750, 4 * act_dim)
        self.decoder = mlp(obs_dim + 2 * act_dim, 750, 750, act_dim)


def decode(obs, z, decoder):
    """The VAE's action: obs (B, O), z (B, 2 A) -> (B, A) in [-1, 1]."""
    return decoder(torch.cat([obs, z], -1)).tanh()


def before_tanh(obs, pi, noise):
    """Actions of the policy: obs (B, O), noise (n, B, A) -> (n, B, A)."""
    mean, log_std = pi(obs).chunk(2, -1)  # (B, A) each: the network runs once, not n times
    return mean + log_std.clamp(-5, 2).exp() * noise


class Actor(nn.Module):
    """What acts: obs (B, O) -> act (B, A), of 100 actions of the policy the one with the highest Q_1."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.pi = mlp(obs_dim, 256, 256, 2 * act_dim)
        self.critic = Critic(obs_dim, act_dim)
        # Not learned, but a parameter: each agent has its own, and a checkpoint keeps it.
        self.noise = nn.Parameter(torch.randn(100, 1, act_dim), requires_grad=False)

    def forward(self, obs):
        n, B = len(self.noise), len(obs)
        act = before_tanh(obs, self.pi, self.noise).tanh()  # (100, B, A)
        q = self.critic(obs.repeat(n, 1), act.flatten(0, 1), 1).view(n, B)
        return act[q.argmax(0), torch.arange(B, device=obs.device)]


def policy(obs, actor):
    """The action to evaluate: obs (B, O) -> act (B, A)."""
    return actor(obs)


def vae_loss(batch, encoder, decoder):
    mean, log_std = encoder(torch.cat([batch.obs, batch.act], -1)).chunk(2, -1)  # (B, 2 A) each
    log_std = log_std.clamp(-4, 15)
    z = mean + log_std.exp() * torch.randn_like(mean)
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std  # (B, 2 A), of N(mean, std) from N(0, 1)
    return F.mse_loss(decode(batch.obs, z, decoder), batch.act) + 0.5 * kl.mean()


def critic_loss(args, batch, critic, critic_target, pi):
    n, B = args.n_actions, len(batch.rew)
    with torch.no_grad():
        next_act = before_tanh(batch.next_obs, pi, torch.randn_like(batch.act.expand(n, -1, -1))).tanh()  # (n, B, A)
        next_q = critic_target(batch.next_obs.repeat(n, 1), next_act.flatten(0, 1)).view(2, n, B)
        next_q = args.lam * next_q.amin(0) + (1 - args.lam) * next_q.amax(0)  # (n, B)
        assert next_q.shape == (n, B)
        target = batch.rew + args.gamma * (1 - batch.done) * next_q.amax(0)  # (B,)
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()


def mmd(args, x, y):
    """Maximum mean discrepancy of two samples of actions, each (n, B, A): (B,)."""

    def kernel(x, y):
        diff = x[:, None] - y  # (n, n, B, A)
        distance = (diff.abs() if args.kernel == "laplacian" else diff**2).sum(-1)
        return (-distance / (2 * args.sigma)).exp().mean((0, 1))  # (B,)

    return (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y) + 1e-6).sqrt()


def actor_loss(args, heeds_q, batch, log_alpha, pi, critic, decoder):
    """Also how far the MMD lies above its threshold."""
    n, (B, A) = args.n_mmd, batch.act.shape
    with torch.no_grad():
        z = torch.randn_like(batch.act.repeat(n, 2)).clamp(-0.5, 0.5)  # (n B, 2 A)
        data_act = decoder(torch.cat([batch.obs.repeat(n, 1), z], -1)).view(n, B, A)
    act = before_tanh(batch.obs, pi, torch.randn_like(data_act))  # (n, B, A)
    gap = (mmd(args, act, data_act) - args.threshold).mean()
    loss = log_alpha.detach().exp() * gap
    if heeds_q:
        q = critic(batch.obs, act[0].tanh())  # (2, B)
        assert q.shape == (2, B)
        loss = loss - q.amin(0).mean()
    return loss, gap.detach()


def alpha_loss(log_alpha, gap):
    return -log_alpha.exp() * gap


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
    args = run.tuned(data.task, TUNED)
    if args.sigma <= 0:
        raise UserError(f"--sigma must be positive, not {args.sigma}.")
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before

    O, A = data.obs_dim, data.act_dim
    actor = stack([Actor(O, A) for _ in range(args.seeds)]).to(run.device)
    vae = stack([VAE(O, A) for _ in range(args.seeds)]).to(run.device)
    pi, critic = actor.pi, actor.critic
    critic_target = deepcopy(critic).requires_grad_(False)
    log_alpha = torch.zeros(() if args.seeds == 1 else (args.seeds,), device=run.device, requires_grad=True)
    opt = torch.optim.Adam([*vae.parameters(), *critic.parameters()], args.lr, fused=True, capturable=True)
    groups = [{"params": pi.parameters()}, {"params": [log_alpha], "lr": args.alpha_lr}]
    actor_opt = torch.optim.Adam(groups, args.actor_lr, fused=True, capturable=True)
    vae_losses = lift(args.seeds, vae_loss, vae.encoder, vae.decoder)
    critic_losses = lift(args.seeds, partial(critic_loss, args), critic, critic_target, pi)
    actor_losses = [lift(args.seeds, partial(actor_loss, args, q), pi, critic, vae.decoder) for q in (False, True)]

    def update(heeds_q):
        batch = data.sample(args.batch_size, args.seeds)
        loss_vae, loss_q = vae_losses(batch), critic_losses(batch)  # () each, or (S,)
        opt.zero_grad()
        (loss_vae + loss_q).sum().backward()
        opt.step()

        loss_pi, gap = actor_losses[heeds_q](batch, log_alpha)
        loss = loss_pi + alpha_loss(log_alpha, gap)
        actor_opt.zero_grad()
        loss.sum().backward(inputs=[*pi.parameters(), log_alpha])  # the critics' weights need no gradient here
        actor_opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the critics along
            log_alpha.clamp_(-5, 10)
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
            scalars = {"mmd": gap + args.threshold, "alpha": log_alpha.exp()}
        run.watch({"vae_loss": loss_vae, "critic_loss": loss_q, "actor_loss": loss_pi, **scalars})

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    state = dict(actor=actor, vae=vae, critic_target=critic_target, log_alpha=log_alpha)
    for step in run.steps(data, **state, opt=opt, actor_opt=actor_opt):
        update(step > args.warmup)
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
