"""BCQ: Off-Policy Deep Reinforcement Learning without Exploration (Fujimoto et al., ICML 2019), arXiv:1812.02900.

    VAE      L_V  = E (act - decode(obs, z))^2 + 0.5 KL(N(mean, std), N(0, 1)),   z ~ N(mean, std) = encode(obs, act)
    actions  pi_k = a_k + phi tanh perturb(obs, a_k),   a_k = decode(obs, z_k),   z_k ~ N(0, 1) within [-0.5, 0.5]
    critic   L_Q  = sum_i E (Q_i(obs, act) - target)^2
             target = rew + gamma (1 - done) max_k [lam min_i Q'_i + (1 - lam) max_i Q'_i](next_obs, pi'_k)
    actor    L_pi = -E Q_1(obs, pi_1);   it acts by the pi_k, of 100, with the highest Q_1

As in the authors' code, which is not the one of the paper's scores: KL is a mean over the dimensions of z, not their
sum, and observations are as they are. Differs from it: the critics' target sees the VAE before its step; the 100 z_k
are drawn once for all states, so that a checkpoint always acts alike; AntMaze's rewards are lowered by 1.
Usage: python algorithms/bcq.py --env halfcheetah-medium
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
    batch_size: int = 100
    lr: float = 1e-3
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
    phi: float = 0.05  # how far an action is perturbed at most


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
    """Two Q-functions, 400 and 300 wide: obs (B, O), act (B, A) -> q (2, B); n: of the first n alone."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        sizes = (obs_dim + act_dim, 400, 300, 1)
        self.layers = nn.ModuleList(EnsembleLinear(2, i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, obs, act, n=None):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        for layer in self.layers[:-1]:
            x = layer(x, n).relu_()  # (2, B, 400), (2, B, 300)
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


def perturbed(obs, act, perturb, phi):
    """act (B, A), moved by at most phi."""
    return (act + phi * perturb(torch.cat([obs, act], -1)).tanh()).clamp(-1, 1)


class Actor(nn.Module):
    """What acts: obs (B, O) -> act (B, A), of 100 perturbed proposals of the VAE the one with the highest Q_1."""

    def __init__(self, obs_dim, act_dim, phi=0.05):
        super().__init__()
        self.vae = VAE(obs_dim, act_dim)
        self.perturb = mlp(obs_dim + act_dim, 400, 300, act_dim)
        self.critic = Critic(obs_dim, act_dim)
        # Not learned, but parameters: each agent has its own, and a checkpoint keeps them.
        self.z = nn.Parameter(torch.randn(100, 2 * act_dim).clamp(-0.5, 0.5), requires_grad=False)
        self.phi = nn.Parameter(torch.tensor(phi), requires_grad=False)

    def forward(self, obs):
        n, B = len(self.z), len(obs)
        obs = obs.repeat(n, 1)  # (100 B, O)
        act = decode(obs, self.z.repeat_interleave(B, 0), self.vae.decoder)  # (100 B, A)
        act = perturbed(obs, act, self.perturb, self.phi)
        q = self.critic(obs, act, 1).view(n, B)
        return act.view(n, B, -1)[q.argmax(0), torch.arange(B, device=obs.device)]


def policy(obs, actor):
    """The action to evaluate: obs (B, O) -> act (B, A)."""
    return actor(obs)


def vae_loss(batch, encoder, decoder):
    mean, log_std = encoder(torch.cat([batch.obs, batch.act], -1)).chunk(2, -1)  # (B, 2 A) each
    log_std = log_std.clamp(-4, 15)
    z = mean + log_std.exp() * torch.randn_like(mean)
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std  # (B, 2 A), of N(mean, std) from N(0, 1)
    return F.mse_loss(decode(batch.obs, z, decoder), batch.act) + 0.5 * kl.mean()


def critic_loss(args, batch, critic, critic_target, perturb_target, decoder):
    n, B = args.n_actions, len(batch.rew)
    with torch.no_grad():
        next_obs = batch.next_obs.repeat(n, 1)  # (n B, O)
        z = torch.randn_like(batch.act.repeat(n, 2)).clamp(-0.5, 0.5)  # (n B, 2 A)
        next_act = perturbed(next_obs, decode(next_obs, z, decoder), perturb_target, args.phi)  # (n B, A)
        next_q = critic_target(next_obs, next_act).view(2, n, B)
        next_q = args.lam * next_q.amin(0) + (1 - args.lam) * next_q.amax(0)  # (n, B)
        assert next_q.shape == (n, B)
        target = batch.rew + args.gamma * (1 - batch.done) * next_q.amax(0)  # (B,)
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()


def actor_loss(args, batch, perturb, critic, decoder):
    with torch.no_grad():
        z = torch.randn_like(batch.act.repeat(1, 2)).clamp(-0.5, 0.5)  # (B, 2 A)
        act = decode(batch.obs, z, decoder)  # (B, A)
    (q,) = critic(batch.obs, perturbed(batch.obs, act, perturb, args.phi), 1)  # (B,)
    return -q.mean()


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

    O, A = data.obs_dim, data.act_dim
    actor = stack([Actor(O, A, args.phi) for _ in range(args.seeds)]).to(run.device)
    vae, perturb, critic = actor.vae, actor.perturb, actor.critic
    perturb_target, critic_target = deepcopy(perturb).requires_grad_(False), deepcopy(critic).requires_grad_(False)
    opt = torch.optim.Adam([*vae.parameters(), *critic.parameters()], args.lr, fused=True, capturable=True)
    actor_opt = torch.optim.Adam(perturb.parameters(), args.lr, fused=True, capturable=True)
    vae_losses = lift(args.seeds, vae_loss, vae.encoder, vae.decoder)
    critic_losses = lift(args.seeds, partial(critic_loss, args), critic, critic_target, perturb_target, vae.decoder)
    actor_losses = lift(args.seeds, partial(actor_loss, args), perturb, critic, vae.decoder)

    def update():
        batch = data.sample(args.batch_size, args.seeds)
        loss_vae, loss_q = vae_losses(batch), critic_losses(batch)  # () each, or (S,)
        opt.zero_grad()
        (loss_vae + loss_q).sum().backward()
        opt.step()

        loss_pi = actor_losses(batch)
        actor_opt.zero_grad()
        loss_pi.sum().backward(inputs=list(perturb.parameters()))  # the critic's weights need no gradient here
        actor_opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the networks along
            for target, net in ((perturb_target, perturb), (critic_target, critic)):
                torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), args.tau)
        run.watch({"vae_loss": loss_vae, "critic_loss": loss_q, "actor_loss": loss_pi})

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    state = dict(actor=actor, perturb_target=perturb_target, critic_target=critic_target)
    for step in run.steps(data, **state, opt=opt, actor_opt=actor_opt):
        update()
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
