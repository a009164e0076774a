"""Discrete CQL: Conservative Q-Learning for Offline RL (Kumar et al., NeurIPS 2020), arXiv:2006.04779.

    target = rew + gamma (1 - done) Q'(next_obs, argmax_a Q(next_obs, a))
    L      = E huber(Q(obs, act) - target) + alpha E [logsumexp_a Q(obs, a) - Q(obs, act)]
    act    = argmax_a Q(obs, a);   Q' is Q as it was at the last copy

--quantiles N: the critic of QR-DQN (Dabney et al. 2018, arXiv:1710.10044), in the paper's Atari results with N = 200.
Of each action's return it has N quantiles theta_i, at tau_i = (i + 1/2) / N; Q is their mean, and for the huber loss
    L_QR   = E sum_i mean_j |tau_i - 1(u < 0)| huber(u),   u = target_j - theta_i(obs, act)
Differs from the authors' code, which is for Atari: there the target takes the maximum of Q' itself; copies come every
2,000 updates; batch 32, lr 5e-5, eps 3e-4; alpha is 1, on 1 % of the data 4.
Usage: python algorithms/discrete_cql.py --env icu-sepsis-clinicians
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
    env: str = "cartpole-replay"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    eval_env: str = ""  # the Gymnasium environment to evaluate in, for an HDF5 file of your own
    seed: int = 0
    seeds: int = 1  # agents trained side by side: seed, seed + 1, ...
    steps: int = 100_000  # updates
    batch_size: int = 64
    lr: float = 3e-4
    gamma: float = 0.99  # discount
    target_every: int = 1_000  # updates between copies of the network into its target
    eval_every: int = 5_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    alpha: float = 1.0  # weight of the conservative term
    quantiles: int = 0  # of each action's return; 0: its mean alone


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def encoder(obs_shape):
    """What comes before the linear layers, and their sizes: convolutions as published, for MinAtar's grids and for
    Atari's frames of 84 x 84; nothing for vectors."""
    if len(obs_shape) == 1:
        return nn.Identity(), (*obs_shape, 256, 256)
    C, H, _ = obs_shape
    filters = [(C, 16, 3)] if H == 10 else [(C, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3)]
    layers = [layer for sizes in filters for layer in (nn.Conv2d(*sizes), nn.ReLU(inplace=True))]
    return nn.Sequential(nn.Unflatten(-1, obs_shape), *layers, nn.Flatten()), (1024, 128) if H == 10 else (3136, 512)


class Critic(nn.Module):
    """obs (B, O) -> theta (B, A, N), the quantiles of each action's return; with none, N = 1 and theta is q."""

    def __init__(self, obs_shape, n_actions, quantiles):
        super().__init__()
        self.encoder, sizes = encoder(obs_shape)
        self.shape = n_actions, max(1, quantiles)
        self.theta = mlp(*sizes, n_actions * max(1, quantiles))

    def forward(self, obs):
        return self.theta(self.encoder(obs)).unflatten(-1, self.shape)


def policy(obs, critic):
    """The action to evaluate, of the highest mean: obs (B, O) -> act (B,)."""
    return critic(obs).mean(-1).argmax(-1)


def of_action(theta, act):
    """theta (B, A, N), act (B,) -> (B, N)."""
    return theta.gather(1, act[:, None, None].expand(-1, 1, theta.shape[-1])).squeeze(1)


def quantile_loss(theta, target):
    """theta (B, N) towards the quantiles of the distribution whose samples are target (B, N)."""
    N = theta.shape[-1]
    tau = (torch.arange(N, device=theta.device) + 0.5) / N  # (N,)
    u = target[:, None, :] - theta[:, :, None]  # (B, N, N): of each quantile, to each sample
    huber = torch.where(u.abs() < 1, 0.5 * u**2, u.abs() - 0.5)
    return ((tau[:, None] - (u < 0).float()).abs() * huber).mean(2).sum(1).mean()


def critic_loss(args, batch, critic, critic_target):
    with torch.no_grad():
        next_act = policy(batch.next_obs, critic)  # (B,), by the one network
        next_theta = of_action(critic_target(batch.next_obs), next_act)  # (B, N), judged by the other
        target = batch.rew[:, None] + args.gamma * (1 - batch.done)[:, None] * next_theta
    theta = critic(batch.obs)  # (B, A, N)
    taken = of_action(theta, batch.act)  # (B, N)
    td_loss = quantile_loss(taken, target) if args.quantiles else F.smooth_l1_loss(taken, target)
    assert theta.shape[::2] == taken.shape
    gap = theta.mean(-1).logsumexp(-1) - taken.mean(-1)  # (B,)
    return td_loss + args.alpha * gap.mean()


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
    data = load(args.env, args.source, run.device, args.eval_env, discrete=True)

    critic = stack([Critic(data.obs_shape, data.n_actions, args.quantiles) for _ in range(args.seeds)]).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    critic_opt = torch.optim.Adam(critic.parameters(), args.lr, fused=True, capturable=True)
    critic_losses = lift(args.seeds, partial(critic_loss, args), critic, critic_target)

    def update(copy):
        batch = data.sample(args.batch_size, args.seeds)
        loss = critic_losses(batch)  # (), or (S,)
        critic_opt.zero_grad()
        loss.sum().backward()
        critic_opt.step()
        if copy:
            with torch.no_grad():  # or the target would drag the whole history of the critic along
                torch._foreach_copy_(list(critic_target.parameters()), list(critic.parameters()))
        run.watch({"critic_loss": loss})

    update = run.graphed(update)
    act = lift(args.seeds, policy, critic)
    for step in run.steps(data, critic=critic, critic_target=critic_target, critic_opt=critic_opt):
        update(step % args.target_every == 0)
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
