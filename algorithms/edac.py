"""EDAC: Uncertainty-Based Offline RL with Diversified Q-Ensemble (An et al., NeurIPS 2021), arXiv:2110.01548.

    critic   target = rew + gamma (1 - done) [min_i Q'_i(next_obs, next_act) - alpha log pi(next_act | next_obs)]
             L_Q    = sum_i E (Q_i(obs, act) - target)^2 + eta L_ES
             L_ES   = E 1/(N-1) sum_{i != j} <g_i, g_j>,  g_i = dQ_i/da / |dQ_i/da| at (obs, act)
    actor    L_pi   = E [alpha log pi(a | obs) - min_i Q_i(obs, a)],  a = tanh(mean + std * noise)
    alpha    L_a    = -log_alpha E (log pi(a | obs) + target_entropy),  target_entropy = -A

SAC-N with a term that turns the critics' slopes apart at the data's actions, so that fewer critics are enough.
Differs from the authors' code: PyTorch's initialisation; on pen-cloned theirs has the best of 10 next actions.
Usage: python algorithms/edac.py --env halfcheetah-medium
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
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
    steps: int = 3_000_000  # updates
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
    n_critics: int | None = None  # N; None, here and below: as in TUNED
    actor_lr: float | None = None  # of the policy and alpha
    eta: float | None = None  # weight of the diversification


# actor_lr on Adroit, where they make 200,000 updates, is the authors' (github.com/snu-mllab/EDAC) for pen.
TUNED = {  # "" for all tasks, then by family, then by task: configs/offline/edac of github.com/corl-team/CORL
    "": dict(n_critics=10, eta=1.0, actor_lr=3e-4),
    "hopper": dict(n_critics=50),
    **dict.fromkeys(("halfcheetah-medium-expert", "walker2d-medium-expert"), dict(eta=5.0)),
    "maze2d": dict(eta=0.1),
    "pen": dict(n_critics=20, eta=10.0, actor_lr=3e-5),
    "pen-human": dict(eta=1000.0),
    **dict.fromkeys(("door", "hammer", "relocate"), dict(n_critics=50, eta=200.0, actor_lr=3e-5)),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian squashed by tanh: obs (B, O) -> act (B, A) in [-1, 1] and its log density (B,), or the mean alone."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, 256, 2 * act_dim)

    def forward(self, obs, sample=True):
        mean, log_std = self.net(obs).chunk(2, -1)  # (B, A) each
        if not sample:
            return mean.tanh()
        log_std = log_std.clamp(-5, 2)  # the authors' bounds; SAC's are -20 and 2
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        # log N(u) - log |d tanh(u) / du|, the latter as 2 (log 2 - u - softplus(-2 u)), which does not underflow
        log_prob = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - 2 * (np.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), log_prob.sum(-1)


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
    """N Q-functions: obs (B, O), act (B, A) -> q (N, B)."""

    def __init__(self, obs_dim, act_dim, N):
        super().__init__()
        sizes = (obs_dim + act_dim, 256, 256, 256, 1)
        self.layers = nn.ModuleList(EnsembleLinear(N, i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, obs, act):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        for layer in self.layers[:-1]:
            x = layer(x).relu_()  # (N, B, 256)
        return self.layers[-1](x).squeeze(-1)


def policy(obs, actor):
    """The action to evaluate, the squashed mean: obs (B, O) -> act (B, A)."""
    return actor(obs, False)


def diversity_loss(slope):
    """Slopes dQ_i/da (N, B, A) -> L_ES."""
    g = F.normalize(slope, dim=-1)
    # sum_{i != j} <g_i, g_j> is |sum_i g_i|^2 - sum_i |g_i|^2, without an (N, N) matrix
    similarity = g.sum(0).square().sum(-1) - g.square().sum((0, -1))  # (B,)
    return similarity.mean() / max(len(slope) - 1, 1)


def critic_loss(args, batch, alpha, actor, critic, critic_target):
    with torch.no_grad():
        next_act, next_log_prob = actor(batch.next_obs)  # (B, A), (B,)
        next_q = critic_target(batch.next_obs, next_act)  # (N, B)
        assert next_q.shape == (args.n_critics, len(batch.rew))
        next_v = next_q.amin(0) - alpha * next_log_prob  # (B,)
        target = batch.rew + args.gamma * (1 - batch.done) * next_v
    obs, act = (x.expand(args.n_critics, *x.shape) for x in (batch.obs, batch.act))  # (N, B, O), (N, B, A)
    q, pull_back = torch.func.vjp(lambda act: critic(obs, act), act)  # q (N, B)
    (slope,) = pull_back(torch.ones_like(q))  # (N, B, A): each critic's own, from the pass that gave q
    return ((q - target) ** 2).mean(1).sum() + args.eta * diversity_loss(slope)  # (Alg. 1)


def actor_loss(args, batch, alpha, actor, critic):
    act, log_prob = actor(batch.obs)  # (B, A), (B,)
    q = critic(batch.obs, act)  # (N, B)
    assert q.shape == (args.n_critics, len(batch.rew))
    return (alpha * log_prob - q.amin(0)).mean(), log_prob.detach()  # (Alg. 1)


def alpha_loss(log_alpha, log_prob, target_entropy):
    return -log_alpha * (log_prob.mean(-1) + target_entropy)


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
    if data.task.family in ("pen", "door", "hammer", "relocate"):
        data.rew = (data.rew - data.rew.mean()) / data.rew.std()

    O, A = data.obs_dim, data.act_dim
    actor = stack([Actor(O, A) for _ in range(args.seeds)]).to(run.device)
    critic = stack([Critic(O, A, args.n_critics) for _ in range(args.seeds)]).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    log_alpha = torch.zeros(args.seeds, device=run.device, requires_grad=True)  # (S,)
    groups = [dict(params=[*actor.parameters(), log_alpha], lr=args.actor_lr), dict(params=critic.parameters())]
    adam_opt = torch.optim.Adam(groups, args.lr, fused=True, capturable=True)
    critic_losses = lift(args.seeds, partial(critic_loss, args), actor, critic, critic_target)
    actor_losses = lift(args.seeds, partial(actor_loss, args), actor, critic)

    def update():
        batch = data.sample(args.batch_size, args.seeds)
        alpha = log_alpha.detach().exp()  # (S,)
        adam_opt.zero_grad()  # one step for all, as the authors': each loss sees the others' networks before it
        loss_q = critic_losses(batch, alpha)  # (), or (S,)
        loss_q.sum().backward()
        loss_pi, log_prob = actor_losses(batch, alpha)  # log_prob (B,), or (S, B)
        loss_pi.sum().backward(inputs=list(actor.parameters()))  # the critics' weights have their gradient already
        alpha_loss(log_alpha, log_prob, -A).sum().backward()
        adam_opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the critics along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
        run.watch({"critic_loss": loss_q, "actor_loss": loss_pi, "alpha": alpha})

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    state = dict(actor=actor, critic=critic, critic_target=critic_target, log_alpha=log_alpha)
    for step in run.steps(data, **state, adam_opt=adam_opt):
        update()
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
