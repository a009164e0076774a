"""ReBRAC: Revisiting the Minimalist Approach to Offline RL (Tarasov et al., NeurIPS 2023), arXiv:2305.09836.

    critic   target = rew + gamma (1 - done) [min_i Q'_i(next_obs, a') - critic_weight |a' - next_act|^2]
             L_Q    = sum_i E (Q_i(obs, act) - target)^2,   a' = clip(pi'(next_obs) + noise)
    actor    L_pi   = E [actor_weight |pi(obs) - act|^2 - lam min_i Q_i(obs, pi(obs))],   lam = 1 / E|min_i Q_i|

TD3+BC with a penalty in the critics too, weighted apart from the actor's; deeper networks, layer norm in the critics,
larger batches. next_act is what the data did in next_obs.
Differs from the authors' code: PyTorch's initialisation; layer norm without scale and shift, which the next layer has;
the target actor follows the actor after its step, not before; of D4RL's files a cut episode loses one row more.
Usage: python algorithms/rebrac.py --env halfcheetah-medium
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
    batch_size: int | None = None  # None, here and below: as in TUNED
    lr: float | None = None
    gamma: float | None = None  # discount
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
    actor_weight: float | None = None  # of the actor's penalty (beta_1)
    critic_weight: float | None = None  # of the critics' penalty (beta_2)


# (actor_weight, critic_weight) of Table 11. The authors' files: hopper-medium (0.01, 0.01), hopper-expert (0.1, 0.1).
LOCOMOTION = "random", "medium", "expert", "medium-expert", "medium-replay", "full-replay"
MAZES = "umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"
ADROIT = "human", "cloned", "expert"
WEIGHTS = {
    ("halfcheetah", LOCOMOTION): ((0.001, 0.1), (0.001, 0.01), (0.01, 0.01), (0.01, 0.1), (0.01, 0.001), (0.001, 0.1)),
    ("hopper", LOCOMOTION): ((0.001, 0.01), (0.01, 0.001), (0.1, 0.001), (0.1, 0.01), (0.05, 0.5), (0.01, 0.01)),
    ("walker2d", LOCOMOTION): ((0.01, 0.0), (0.05, 0.1), (0.01, 0.5), (0.01, 0.01), (0.05, 0.01), (0.01, 0.01)),
    ("antmaze", MAZES): ((0.003, 0.002), (0.003, 0.001), (0.001, 5e-4), (0.001, 0.0), (0.002, 0.001), (0.002, 0.002)),
    ("pen", ADROIT): ((0.1, 0.5), (0.05, 0.5), (0.01, 0.01)),
    ("door", ADROIT): ((0.1, 0.1), (0.01, 0.1), (0.05, 0.01)),
    ("hammer", ADROIT): ((0.01, 0.5), (0.1, 0.5), (0.01, 0.01)),
    ("relocate", ADROIT): ((0.1, 0.01), (0.1, 0.01), (0.05, 0.01)),
}
TUNED = {  # "" for all tasks, then by family, then by task: Table 10; the authors' files have other lr for AntMaze
    "": dict(batch_size=1024, lr=1e-3, gamma=0.99, actor_weight=0.01, critic_weight=0.01),
    "antmaze": dict(batch_size=256, lr=1e-4, gamma=0.999),
    "maze2d": dict(batch_size=256, lr=3e-4, actor_weight=0.003, critic_weight=0.001),  # CORL's, of all its mazes
    **dict.fromkeys(("pen", "door", "hammer", "relocate"), dict(batch_size=256, lr=3e-4)),
}
TUNED |= {
    f"{family}-{kind}": dict(actor_weight=of_actor, critic_weight=of_critic)
    for (family, kinds), pairs in WEIGHTS.items()
    for kind, (of_actor, of_critic) in zip(kinds, pairs)
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """obs (B, O) -> act (B, A) in [-1, 1]."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, 256, act_dim)

    def forward(self, obs):
        return self.net(obs).tanh()


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
            x = F.layer_norm(layer(x).relu_(), (256,))  # (2, B, 256)
        return self.layers[-1](x).squeeze(-1)


def policy(obs, actor):
    """The action to evaluate: obs (B, O) -> act (B, A)."""
    return actor(obs)


def critic_loss(args, batch, critic, critic_target, actor_target):
    with torch.no_grad():
        noise = (torch.randn_like(batch.act) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_act = (actor_target(batch.next_obs) + noise).clamp(-1, 1)  # (B, A)
        next_q = critic_target(batch.next_obs, next_act)  # (2, B)
        assert next_q.shape == (2, len(batch.rew))
        penalty = ((next_act - batch.next_act) ** 2).sum(-1)  # (B,)
        target = batch.rew + args.gamma * (1 - batch.done) * (next_q.amin(0) - args.critic_weight * penalty)  # (B,)
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()


def actor_loss(args, batch, actor, critic):
    act = actor(batch.obs)  # (B, A)
    qs = critic(batch.obs, act)  # (2, B)
    assert qs.shape == (2, len(batch.rew))
    q = qs.amin(0)  # (B,)
    lam = 1 / q.abs().mean().detach()
    penalty = ((act - batch.act) ** 2).sum(-1)  # (B,)
    return (args.actor_weight * penalty - lam * q).mean()


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
    # Drops the row where an episode was cut, which has none. So do the authors; but D4RL's loader has dropped that row
    # already, as theirs does, and of D4RL's files the row before it, whose next action went with it, goes as well.
    data.add_next_act()
    if data.task.family == "antmaze":
        data.rew *= 100  # and not - 1, as in other papers

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
