"""IDQL: Implicit Q-Learning as Actor-Critic with Diffusion Policies (Hansen-Estruch et al. 2023), arXiv:2304.10573.

    value, critic   as in iql.py, of which this is a sister
    actor    L_pi = E |net(obs, act_t, t) - noise|^2,   act_t = sqrt(a_t) act + sqrt(1 - a_t) noise,   t ~ U{0 .. 4}
             a_t  = prod_{s <= t} (1 - b_s), the b_s of a variance-preserving schedule
    acts     by the best of 64 samples of the clone, by min_i Q'_i

The clone knows no advantage, so that nothing of it is lost where the data have several modes; what Q says is left to
the choice of a sample. As in the authors' code: AdamW for the clone, its average acts, samples stay within [-1, 1].
Differs from it: observations are normalized, as in iql.py; PyTorch's initial weights; each loss sees the networks
before their steps; no data are held out; the cosine ends with --steps.
Usage: python algorithms/idql.py --env halfcheetah-medium
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
    steps: int = 3_000_000  # updates
    batch_size: int = 512
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
    expectile: float | None = None  # of the Q-values that V estimates (Eq. 5); None: as in TUNED
    dropout: float = 0.1  # of the clone's blocks, in training
    actor_tau: float = 0.001  # step of the clone's average, which acts
    n_samples: int = 64  # of the clone for each observation, of which the best acts


TUNED = {  # "" for all tasks, then by family, then by task: launcher/ of github.com/philippe-eecs/IDQL
    "": dict(expectile=0.7),
    **dict.fromkeys(("antmaze", "pointmaze", "stitch"), dict(expectile=0.9)),  # the last two: as AntMaze
}
T = 5  # steps of the diffusion
BETAS = [1 - math.exp(-0.1 / T - 0.5 * (10 - 0.1) * (2 * t + 1) / T**2) for t in range(T)]
ALPHAS = [math.prod(1 - beta for beta in BETAS[: t + 1]) for t in range(T)]  # a_t: what is left of the action


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Denoiser(nn.Module):
    """The noise in an action, layers of LN-ResNet: obs (B, O), act (B, A), t (B, 1) -> (B, A)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(1, 32))
        self.time = nn.Sequential(nn.Linear(64, 128), nn.Mish(), nn.Linear(128, 128))
        self.first, self.last = nn.Linear(obs_dim + act_dim + 128, 256), nn.Linear(256, act_dim)
        block = lambda: nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.Mish(), nn.Linear(1024, 256))
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, obs, act, t, dropout=0.0):
        angle = 2 * math.pi * t @ self.frequencies  # (B, 32)
        time = self.time(torch.cat([angle.cos(), angle.sin()], -1))  # (B, 128)
        x = self.first(torch.cat([act, obs, time], -1))  # (B, 256)
        for block in self.blocks:
            x = x + block(F.dropout(x, dropout))
        return self.last(F.mish(x))


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


class Actor(nn.Module):
    """What acts: obs (B, O) -> act (B, A), of the samples of the clone's average the one with the best min_i Q'_i."""

    def __init__(self, obs_dim, act_dim, n_samples=64):
        super().__init__()
        self.clone, self.critic = Denoiser(obs_dim, act_dim), Critic(obs_dim, act_dim)
        self.act_dim, self.n_samples = act_dim, n_samples

    def forward(self, obs):
        n, B = self.n_samples, len(obs)
        obs = obs.repeat(n, 1)  # (n B, O)
        act = sample(obs, self.act_dim, self.clone)  # (n B, A)
        q = self.critic(obs, act).amin(0).view(n, B)
        return act.view(n, B, -1)[q.argmax(0), torch.arange(B, device=obs.device)]


def sample(obs, act_dim, clone):
    """Actions of the clone: noise, denoised step by step; obs (B, O) -> (B, A) in [-1, 1]."""
    draw = lambda: torch.randn(len(obs), act_dim, dtype=obs.dtype, device=obs.device)
    act = draw()
    for t in reversed(range(T)):
        noise = clone(obs, act, torch.full_like(obs[:, :1], t))  # (B, A)
        act = (act - BETAS[t] / math.sqrt(1 - ALPHAS[t]) * noise) / math.sqrt(1 - BETAS[t])
        act = (act + math.sqrt(BETAS[t]) * draw() if t else act).clamp(-1, 1)
    return act


def policy(obs, actor):
    """The action to evaluate, of fresh samples in each step: obs (B, O) -> act (B, A)."""
    return actor(obs)


def losses(args, alphas, batch, clone, critic, value, critic_target):
    """Of V, of the Q-functions and of the clone; each has a gradient in its own network alone: they can be summed."""
    with torch.no_grad():
        target_q = critic_target(batch.obs, batch.act)  # (2, B)
        assert target_q.shape == (2, len(batch.rew))
        target = batch.rew + args.gamma * (1 - batch.done) * value(batch.next_obs).squeeze(-1)  # (B,)
    u = target_q.amin(0) - value(batch.obs).squeeze(-1)  # (B,)
    value_loss = ((args.expectile - (u < 0).float()).abs() * u**2).mean()  # (Eq. 5)

    critic_loss = ((critic(batch.obs, batch.act) - target) ** 2).mean(1).sum()  # of (2, B) (Eq. 6)

    t, noise = (T * torch.rand_like(batch.rew)).long()[:, None], torch.randn_like(batch.act)  # (B, 1), (B, A)
    alpha = alphas[t]  # (B, 1)
    noisy = alpha.sqrt() * batch.act + (1 - alpha).sqrt() * noise  # (B, A)
    actor_loss = ((clone(batch.obs, noisy, t.to(noise), args.dropout) - noise) ** 2).sum(-1).mean()
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
    if not 0 < args.expectile < 1:
        raise UserError(f"--expectile must lie in (0, 1), not {args.expectile}.")
    if data.task.family in ("halfcheetah", "hopper", "walker2d"):
        returns = data.returns()
        data.rew *= 1000 / (returns.max() - returns.min())
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)

    O, A = data.obs_dim, data.act_dim
    actor = stack([Actor(O, A, args.n_samples) for _ in range(args.seeds)]).to(run.device).requires_grad_(False)
    clone, critic = (deepcopy(net).requires_grad_() for net in (actor.clone, actor.critic))  # the slow copies act
    value = stack([mlp(O, 256, 256, 1) for _ in range(args.seeds)]).to(run.device)
    alphas = torch.tensor(ALPHAS, device=run.device)  # (T,)
    lr = torch.tensor(args.lr, device=run.device)  # the actor's: a tensor, for update() to change
    groups = [{"params": clone.parameters(), "lr": lr, "weight_decay": 1e-4}]
    groups.append({"params": [*critic.parameters(), *value.parameters()]})
    opt = torch.optim.AdamW(groups, args.lr, weight_decay=0.0, fused=True, capturable=True)
    all_losses = lift(args.seeds, partial(losses, args, alphas), clone, critic, value, actor.critic)

    def update():
        batch = data.sample(args.batch_size, args.seeds)
        loss = all_losses(batch)  # three, () each or (S,)
        opt.zero_grad()
        sum(loss.values()).sum().backward()
        opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the networks along
            torch._foreach_lerp_(list(actor.critic.parameters()), list(critic.parameters()), args.tau)
            torch._foreach_lerp_(list(actor.clone.parameters()), list(clone.parameters()), args.actor_tau)
            progress = opt.state[clone.frequencies]["step"] / args.steps  # (), on the device: Adam's own count
            opt.param_groups[0]["lr"].copy_(args.lr / 2 * (1 + torch.cos(torch.pi * progress)))  # for the next update
        run.watch(loss)

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    state = dict(actor=actor, clone=clone, critic=critic, value=value)
    for step in run.steps(data, **state, opt=opt):
        update()
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
