"""FQL: Flow Q-Learning (Park, Li & Levine, ICML 2025), arXiv:2502.02538.

    flow     L_F  = E (v(obs, x_t, t) - (act - x_0))^2,   x_t = (1 - t) x_0 + t act,   x_0 ~ N(0, I), t ~ U(0, 1)
    critic   L_Q  = sum_i E (Q_i(obs, act) - target)^2,   target = rew + gamma (1 - done) agg_i Q'_i(next_obs, pi)
    actor    L_pi = E alpha (pi(obs, z) - flow(obs, z))^2 - mean_i Q_i(obs, pi(obs, z)),   z ~ N(0, I)

The flow clones the data, however many modes they have: flow(obs, z) is where v carries z from t = 0 to 1, in 10 Euler
steps. The policy learns to come there in one step while it climbs Q, so that no gradient goes back through time.
Differs from the authors' code: PyTorch's initial weights; no scores on locomotion are theirs: there, as their README
advises for new tasks, Q is divided by its mean size, and alpha is this project's, not searched.
Usage: python algorithms/fql.py --env halfcheetah-medium
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
from datasets import load
from results.run import Run


@dataclass
class Args:
    env: str = "halfcheetah-medium"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    eval_env: str = ""  # the Gymnasium environment to evaluate in, for an HDF5 file of your own
    seed: int = 0
    seeds: int = 1  # agents trained side by side: seed, seed + 1, ...
    steps: int = 500_000  # updates
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
    width: int = 512  # of the four hidden layers of each network
    flow_steps: int = 10  # of Euler's method
    alpha: float | None = None  # weight of the distillation
    normalize_q: bool | None = None  # divide the actor's Q by its mean size
    agg: Literal["mean", "min"] | None = None  # of the two target Q-functions


TUNED = {  # "" for all tasks, then by family, then by task: README.md of github.com/seohongpark/fql
    "": dict(alpha=10.0, normalize_q=False, agg="mean"),
    **dict.fromkeys(("halfcheetah", "hopper", "walker2d", "ant"), dict(alpha=1.0, normalize_q=True)),
    **dict.fromkeys(("antmaze-large-play", "antmaze-large-diverse"), dict(alpha=3.0)),
    **dict.fromkeys(("pen", "door", "hammer", "relocate"), dict(alpha=30_000.0, agg="min")),
    **dict.fromkeys(("pen-human", "pen-cloned", "hammer-cloned", "relocate-human"), dict(alpha=10_000.0)),
    "pen-expert": dict(alpha=3_000.0),
}


def gelu_mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.GELU("tanh")]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """From noise in one step: obs (B, O), noise (B, A) -> act (B, A), not yet clipped."""

    def __init__(self, obs_dim, act_dim, width=512):
        super().__init__()
        self.act_dim, self.net = act_dim, gelu_mlp(obs_dim + act_dim, *[width] * 4, act_dim)

    def forward(self, obs, noise=None):
        if noise is None:
            noise = torch.randn(*obs.shape[:-1], self.act_dim, dtype=obs.dtype, device=obs.device)
        return self.net(torch.cat([obs, noise], -1))


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
    """Two Q-functions, normalized behind each hidden layer: obs (B, O), act (B, A) -> q (2, B)."""

    def __init__(self, obs_dim, act_dim, width=512):
        super().__init__()
        sizes = (obs_dim + act_dim, *[width] * 4, 1)
        self.layers = nn.ModuleList(EnsembleLinear(2, i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, obs, act):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x), approximate="tanh")  # (2, B, 512)
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.layers[-1](x).squeeze(-1)


def policy(obs, actor):
    """The action to evaluate, of fresh noise in each step: obs (B, O) -> act (B, A)."""
    return actor(obs).clamp(-1, 1)


def velocity(obs, x, t, flow):
    """v, where the actions x (B, A) go at the times t (B, 1): (B, A)."""
    return flow(torch.cat([obs, x, t], -1))


@torch.no_grad()
def flow_act(args, obs, noise, flow):
    """Where the flow carries the noise (B, A): an action as in the data, (B, A)."""
    act = noise
    for i in range(args.flow_steps):
        act = act + velocity(obs, act, torch.full_like(act[:, :1], i / args.flow_steps), flow) / args.flow_steps
    return act.clamp(-1, 1)


def flow_loss(batch, flow):
    x_0, t = torch.randn_like(batch.act), torch.rand_like(batch.act[:, :1])  # (B, A), (B, 1)
    x_t = (1 - t) * x_0 + t * batch.act
    return F.mse_loss(velocity(batch.obs, x_t, t, flow), batch.act - x_0)


def critic_loss(args, batch, actor, critic, critic_target):
    with torch.no_grad():
        next_act = actor(batch.next_obs, torch.randn_like(batch.act)).clamp(-1, 1)  # (B, A)
        next_qs = critic_target(batch.next_obs, next_act)  # (2, B)
        assert next_qs.shape == (2, len(batch.rew))
        next_q = next_qs.mean(0) if args.agg == "mean" else next_qs.amin(0)  # (B,)
        target = batch.rew + args.gamma * (1 - batch.done) * next_q
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()


def actor_loss(args, batch, actor, critic, flow):
    noise = torch.randn_like(batch.act)  # (B, A)
    act = actor(batch.obs, noise)  # (B, A)
    q = critic(batch.obs, act.clamp(-1, 1)).mean(0)  # (B,)
    lam = 1 / q.abs().mean().detach() if args.normalize_q else 1
    return args.alpha * F.mse_loss(act, flow_act(args, batch.obs, noise, flow)) - lam * q.mean()


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

    O, A, layers = data.obs_dim, data.act_dim, [args.width] * 4
    actor = stack([Actor(O, A, args.width) for _ in range(args.seeds)]).to(run.device)
    flow = stack([gelu_mlp(O + A + 1, *layers, A) for _ in range(args.seeds)]).to(run.device)
    critic = stack([Critic(O, A, args.width) for _ in range(args.seeds)]).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    params = [*actor.parameters(), *flow.parameters(), *critic.parameters()]
    opt = torch.optim.Adam(params, args.lr, fused=True, capturable=True)
    flow_losses = lift(args.seeds, flow_loss, flow)
    critic_losses = lift(args.seeds, partial(critic_loss, args), actor, critic, critic_target)
    actor_losses = lift(args.seeds, partial(actor_loss, args), actor, critic, flow)

    def update():
        batch = data.sample(args.batch_size, args.seeds)
        opt.zero_grad()  # one step for all: each loss sees the others' networks before it
        loss_flow, loss_q = flow_losses(batch), critic_losses(batch)  # () each, or (S,)
        (loss_flow + loss_q).sum().backward()
        loss_pi = actor_losses(batch)
        loss_pi.sum().backward(inputs=list(actor.parameters()))  # the critic's weights have their gradient already
        opt.step()
        with torch.no_grad():  # or the target would drag the whole history of the critic along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
        run.watch({"flow_loss": loss_flow, "critic_loss": loss_q, "actor_loss": loss_pi})

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    state = dict(actor=actor, flow=flow, critic=critic, critic_target=critic_target, opt=opt)
    for step in run.steps(data, **state):
        update()
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
