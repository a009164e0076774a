"""XQL: Extreme Q-Learning: MaxEnt RL without Entropy (Garg et al., ICLR 2023), arXiv:2301.02328.

    value    L_V  = E [exp(z) - z - 1],   z = (min_i Q'_i(obs, act) - V(obs)) / scale                    (Eq. 11)
    critic   L_Q  = sum_i E huber(Q_i(obs, act) - target),   target = rew + gamma (1 - done) V(next_obs)
    actor    L_pi = -E min(exp(beta u), 100) log pi(act | obs),   u = min_i Q'_i(obs, act) - V(obs)      (Eq. 12)

iql.py with another L_V: Gumbel regression, whose V is scale log E exp(Q / scale), the soft maximum of Q in the data.
As in the authors' code: z is cut at max_clip, L_V is divided by exp of a batch's largest z, V has layer normalisation,
and the Huber loss is linear beyond 20. Differs from theirs as iql.py does, and: AntMaze's actor has a schedule too; no
noise on the actions of V's Q on halfcheetah-medium, no random ones beside the data's on hopper-medium-expert and
antmaze-umaze-diverse, one update of V at a time on antmaze-medium-diverse; no dropout in V, theirs is never on.
Usage: python algorithms/xql.py --env halfcheetah-medium
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
    scale: float | None = None  # of the Gumbel distribution, the paper's beta (Eq. 11); None: as in TUNED
    max_clip: float | None = None  # of the exponents in V's loss; None: as in TUNED
    beta: float | None = None  # inverse temperature of the policy's weights (Eq. 12); None: as in TUNED
    dropout: float | None = None  # of the actor's hidden layers, in training; None: as in TUNED


TUNED = {  # "" for all tasks, then by family, then by task: offline/reproduce/ of github.com/Div99/XQL
    "": dict(scale=2.0, max_clip=7.0, beta=3.0, dropout=0.0),
    "halfcheetah": dict(scale=1.0, max_clip=5.0),
    "halfcheetah-medium": dict(scale=1.0, max_clip=7.0),
    "hopper-medium": dict(scale=5.0),
    "walker2d-medium": dict(scale=10.0),
    "walker2d-medium-replay": dict(scale=5.0, max_clip=5.0),
    "walker2d-medium-expert": dict(scale=2.0, max_clip=5.0),
    **dict.fromkeys(("antmaze", "pointmaze", "stitch"), dict(scale=0.6, beta=10.0)),  # the last two: as AntMaze
    "antmaze-umaze": dict(scale=2.0),
    "antmaze-umaze-diverse": dict(scale=5.0),
    "antmaze-medium-play": dict(scale=0.8, max_clip=5.0),
    "antmaze-large-play": dict(scale=0.6, max_clip=5.0),
    "antmaze-large-diverse": dict(scale=0.55, max_clip=5.0),
    **dict.fromkeys(("kitchen", "pen", "door", "hammer", "relocate"), dict(scale=5.0, beta=0.5, dropout=0.1)),
    "kitchen-complete": dict(scale=2.0),
    "kitchen-mixed": dict(scale=8.0),
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
    """Of V (scaled), Q and pi; each has a gradient in its own network alone, so that they can be summed."""
    with torch.no_grad():
        target_q = critic_target(batch.obs, batch.act)  # (2, B)
        assert target_q.shape == (2, len(batch.rew))
        target = batch.rew + args.gamma * (1 - batch.done) * value(batch.next_obs).squeeze(-1)  # (B,)
    u = target_q.amin(0) - value(batch.obs).squeeze(-1)  # (B,)
    z = (u / args.scale).clamp(max=args.max_clip)  # (B,)
    m = z.detach().amax().clamp(min=-1)  # what follows is (Eq. 11) times exp(-m): a step that fits the batch
    value_loss = ((z - m).exp() - (z + 1) * (-m).exp()).mean()

    q = critic(batch.obs, batch.act)  # (2, B)
    critic_loss = F.huber_loss(q, target.expand_as(q), reduction="none", delta=20.0).mean(1).sum()

    weight = (args.beta * u.detach()).exp().clamp(max=100)
    mean, log_std = actor(batch.obs, args.dropout)  # (B, A), (A,)
    log_prob = -0.5 * ((batch.act - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)  # (B, A)
    actor_loss = -(weight * log_prob.sum(-1)).mean()  # (Eq. 12)
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
