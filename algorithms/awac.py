"""AWAC: Accelerating Online Reinforcement Learning with Offline Datasets (Nair et al. 2020), arXiv:2006.09359.

    critic   target = rew + gamma (1 - done) min_i Q'_i(next_obs, next_act),   next_act ~ pi(next_obs)
             L_Q    = sum_i E (Q_i(obs, act) - target)^2
    actor    L_pi   = -E exp(adv / lam) log pi(act | obs)                                                  (Eq. 13)
             adv    = min_i Q_i(obs, act) - min_i Q_i(obs, pi_act),   pi_act ~ pi(obs)

The paper's offline part; it goes on online, and has no scores on today's D4RL. Networks, batch size, lam, normalisation
and the bound on the weights are therefore those of CORL's awac.py, whose scores are known. Differs from the authors'
code (rlkit): there the weights are a softmax over the batch, of 128 transitions (1024 online), with lam 2 (locomotion)
or 0.5 (Adroit), the actor's mean is a tanh, its log_std lies in [-6, 0], its weights decay, depths are others, actions
not clipped, losses taken before all steps; on Adroit's binary rewards Q is at most 0, adv 0.5, pi_act the mean, done 0.
Usage: python algorithms/awac.py --env halfcheetah-medium
"""

import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
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
    lam: float | None = None  # temperature of the policy's weights (Eq. 13); None: as in TUNED


TUNED = {  # "" for all tasks, then by family, then by task: configs/offline/awac of github.com/corl-team/CORL
    "": dict(lam=0.3333),
    **dict.fromkeys(("antmaze", "pointmaze", "stitch"), dict(lam=0.1)),  # the last two, this repository's: as AntMaze
    **dict.fromkeys(("maze2d", "pen", "door", "hammer", "relocate"), dict(lam=0.1)),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian: obs (B, O) -> mean (B, A), log_std (A,)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, 256, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs):
        return self.net(obs), self.log_std.clamp(-20, 2)


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
        sizes = (obs_dim + act_dim, 256, 256, 256, 1)
        self.layers = nn.ModuleList(EnsembleLinear(2, i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, obs, act):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        for layer in self.layers[:-1]:
            x = layer(x).relu_()  # (2, B, 256)
        return self.layers[-1](x).squeeze(-1)


def policy(obs, actor):
    """The action to evaluate, the mean: obs (B, O) -> act (B, A)."""
    return actor(obs)[0]


def critic_loss(args, batch, critic, critic_target, actor):
    with torch.no_grad():
        mean, log_std = actor(batch.next_obs)  # (B, A), (A,)
        next_act = (mean + log_std.exp() * torch.randn_like(batch.act)).clamp(-1, 1)
        next_q = critic_target(batch.next_obs, next_act)  # (2, B)
        assert next_q.shape == (2, len(batch.rew))
        target = batch.rew + args.gamma * (1 - batch.done) * next_q.amin(0)  # (B,)
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()


def actor_loss(args, batch, actor, critic):
    mean, log_std = actor(batch.obs)  # (B, A), (A,)
    with torch.no_grad():
        pi_act = (mean + log_std.exp() * torch.randn_like(batch.act)).clamp(-1, 1)
        q, pi_q = critic(batch.obs, batch.act), critic(batch.obs, pi_act)  # (2, B)
        assert q.shape == pi_q.shape == (2, len(batch.rew))
        adv = q.amin(0) - pi_q.amin(0)  # (B,)
        weight = (adv / args.lam).exp().clamp(max=100)
    log_prob = -0.5 * ((batch.act - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)  # (B, A)
    return -(weight * log_prob.sum(-1)).mean()  # (Eq. 13)


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
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)

    O, A = data.obs_dim, data.act_dim
    actor = stack([Actor(O, A) for _ in range(args.seeds)]).to(run.device)
    critic = stack([Critic(O, A) for _ in range(args.seeds)]).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    actor_opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True, capturable=True)
    critic_opt = torch.optim.Adam(critic.parameters(), args.lr, fused=True, capturable=True)
    critic_losses = lift(args.seeds, partial(critic_loss, args), critic, critic_target, actor)
    actor_losses = lift(args.seeds, partial(actor_loss, args), actor, critic)

    def update():
        batch = data.sample(args.batch_size, args.seeds)
        loss_q = critic_losses(batch)  # (), or (S,)
        critic_opt.zero_grad()
        loss_q.sum().backward()
        critic_opt.step()

        loss_pi = actor_losses(batch)
        actor_opt.zero_grad()
        loss_pi.sum().backward()
        actor_opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the networks along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
        run.watch({"critic_loss": loss_q, "actor_loss": loss_pi})

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    state = dict(actor=actor, critic=critic, critic_target=critic_target)
    for step in run.steps(data, **state, actor_opt=actor_opt, critic_opt=critic_opt):
        update()
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
