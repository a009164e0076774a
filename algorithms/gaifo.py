"""GAIfO: Generative Adversarial Imitation from Observation (Torabi, Warnell & Stone 2018), arXiv:1807.06158.

    D        L_D  = -E_pi log D(obs, next_obs) - E_expert log(1 - D(obs, next_obs)),   D: the policy's probability
    reward   rew  = -log D(obs, next_obs), large where the step is taken for the expert's; the true one is only reported
    actor    L_pi = -E min(ratio adv, clip(ratio, 1 - eps, 1 + eps) adv),   ratio = pi(act | obs) / pi_old(act | obs)
    value    L_V  = E (V(obs) - ret)^2,   ret = adv + V_old(obs),   adv by generalised advantage estimation

GAIL on steps from observation to observation: nobody knows what the expert did, only what came of it.
-log D > 0 pays for staying alive, whoever the expert was; log(1 - D) < 0 for ending; their sum for neither (--reward).
Differs from the paper, whose authors' code we have not seen: PPO, its lr falling to 0, not TRPO; all else is gail.py's,
sizes and steps included: D's gradient penalty and its 30 steps, normalization by the demonstrations' observations.
Usage: python algorithms/gaifo.py --env hopper-expert --demos 4
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import Envs, UserError, load
from results.run import Run


@dataclass
class Args:
    env: str = "hopper-expert"  # the task whose data are the expert's, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    eval_env: str = ""  # the Gymnasium environment to act and evaluate in, for an HDF5 file of your own
    seed: int = 0
    steps: int = 2_000_000  # environment steps
    batch_size: int = 256
    lr: float = 3e-4
    gamma: float = 0.995  # discount
    eval_every: int = 96_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    demos: int = 4  # trajectories of the expert
    every: int = 20  # of each trajectory, every so manieth step is used (with --demos)
    envs: int = 8  # environments side by side
    horizon: int = 1000  # steps of each environment in an iteration
    epochs: int = 10  # of PPO, over an iteration's steps
    clip: float = 0.2  # of the probability ratio (eps)
    gae_lambda: float = 0.97  # of advantage estimation: 0 the TD error, 1 the whole return
    disc_lr: float = 3e-4  # of the discriminator
    disc_updates: int = 30  # of the discriminator in an iteration
    grad_penalty: float = 10.0  # weight of the discriminator's gradient penalty
    reward: Literal["-logD", "log(1-D)", "sum"] = "-logD"  # what the policy earns


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian, its mean near 0 at first: obs (B, O) -> mean (B, A), log_std (A,)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 100, 100, act_dim)
        self.net[-1].weight.data *= 0.01  # at first all actions are near 0
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs):
        return self.net(obs), self.log_std


def policy(obs, actor):
    """The action to evaluate, the mean at obs within [-10, 10]: obs (B, O) -> act (B, A)."""
    return actor(obs.clamp(-10, 10))[0]


def log_density(act, mean, log_std):
    """act, mean (B, A), log_std (A,) -> (B,)."""
    return (-0.5 * ((act - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def discriminator_loss(logit, expert_logit):
    """At pairs of the policy (B,) and of the expert (B,), D = sigmoid(logit): log D = -softplus(-logit)."""
    return F.softplus(-logit).mean() + F.softplus(expert_logit).mean()  # (Eq. 14)


def gradient_penalty(pairs, expert_pairs, disc):
    """(|gradient| - 1)+^2 of the logit between pairs of the policy and of the expert, (B, 2 O) each -> ()."""
    between = torch.lerp(pairs, expert_pairs, torch.rand_like(pairs[:, :1])).requires_grad_()
    (grad,) = torch.autograd.grad(disc(between).sum(), between, create_graph=True)
    return ((grad.norm(dim=-1) - 1).clamp(min=0) ** 2).mean()


def reward_of(args, logit):
    """What the policy earns: (B,) -> (B,)."""
    return {"-logD": F.softplus(-logit), "log(1-D)": -F.softplus(logit), "sum": -logit}[args.reward]


def actor_loss(args, obs, act, old_log_prob, adv, actor):
    ratio = (log_density(act, *actor(obs)) - old_log_prob).exp()  # (B,)
    assert ratio.shape == adv.shape
    return -torch.min(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv).mean()


def advantages(args, rew, value, next_value, done, last):
    """Generalised advantage estimation, all (T, E). next_value is that of the next observation of the same episode;
    done: the episode terminated here; last: it terminated or was cut, by time or by the iteration's end."""
    delta = rew + args.gamma * (1 - done) * next_value - value
    adv, total = torch.zeros_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        adv[t] = total = delta[t] + args.gamma * args.gae_lambda * (1 - last[t]) * total
    return adv


@torch.no_grad()
def play(args, envs, seed, data, actor):
    """`horizon` steps in each environment, from new episodes on: obs, act, next_obs (T, E, ...), done, last (T, E)."""
    tensor = lambda x: torch.as_tensor(x, dtype=torch.float32, device=data.rows.device)
    normalized = lambda x: ((tensor(x) - data.obs_mean) / data.obs_std).clamp(-10, 10)
    columns, started = [], args.envs
    obs = envs.reset(seed + np.arange(args.envs))  # (E, O)
    for t in range(args.horizon):
        x = normalized(obs)
        mean, log_std = actor(x)
        act = mean + log_std.exp() * torch.randn_like(mean)
        next_obs, _, terminated, truncated = envs.step(act.clamp(-1, 1).cpu().numpy())
        data.check_env(next_obs)
        over = terminated | truncated
        columns.append((x, act, next_obs, terminated, over | (t + 1 == args.horizon)))
        obs = next_obs
        if over.any():
            seeds = np.where(over, seed + started + over.cumsum() - 1, -1)  # of the episodes that start now
            obs, started = envs.reset(seeds), started + over.sum()
    obs, act, *rest = zip(*columns)
    next_obs, done, last = map(np.array, rest)
    return torch.stack(obs), torch.stack(act), normalized(next_obs), tensor(done), tensor(last)


def train(args):
    run = Run(__file__, args, schedule=True)  # of the policy's learning rate
    data = load(args.env, args.source, run.device, args.eval_env)
    data.keep_demos(args.demos, args.every, args.seed)
    data.act.fill_(torch.nan)  # of the expert's actions nothing is left to look at
    data.normalize_obs()  # (obs - mean) / (std + 1e-3), of the demonstrations
    envs, size = Envs(data.task, args.envs), args.envs * args.horizon
    if args.steps % size:
        raise UserError(f"--steps must be a multiple of --envs x --horizon, {size}, not {args.steps}.")

    O, A = data.obs_dim, data.act_dim
    actor, value, disc = (net.to(run.device) for net in (Actor(O, A), mlp(O, 100, 100, 1), mlp(2 * O, 100, 100, 1)))
    opt = torch.optim.Adam([*actor.parameters(), *value.parameters()], args.lr, fused=True)
    disc_opt = torch.optim.Adam(disc.parameters(), args.disc_lr, fused=True)
    judge = lambda pairs: disc(pairs).squeeze(-1)  # (..., 2 O) -> logit (...)

    def update(seed):
        obs, act, next_obs, done, last = play(args, envs, seed, data, actor)
        flat_obs, flat_act = obs.flatten(0, 1), act.flatten(0, 1)  # (T E, O), (T E, A)
        pairs = torch.cat([obs, next_obs], -1)  # (T, E, 2 O)
        for _ in range(args.disc_updates):
            expert, rows = data.sample(args.batch_size), torch.randint(size, (args.batch_size,), device=run.device)
            both = pairs.flatten(0, 1)[rows], torch.cat([expert.obs, expert.next_obs], -1)  # (B, 2 O) each
            loss_d = discriminator_loss(*map(judge, both)) + args.grad_penalty * gradient_penalty(*both, disc)
            disc_opt.zero_grad()
            loss_d.backward()
            disc_opt.step()

        with torch.no_grad():
            rew = (1 - args.gamma) * reward_of(args, judge(pairs))  # (T, E); values are then as large as rewards
            v, next_v = value(obs).squeeze(-1), value(next_obs).squeeze(-1)
            adv = advantages(args, rew, v, next_v, done, last)
            ret, adv = (adv + v).flatten(), ((adv - adv.mean()) / (adv.std() + 1e-8)).flatten()  # (T E,)
            log_prob = log_density(flat_act, *actor(flat_obs))
        for _ in range(args.epochs):
            for rows in torch.randperm(size, device=run.device).split(args.batch_size):
                loss_pi = actor_loss(args, flat_obs[rows], flat_act[rows], log_prob[rows], adv[rows], actor)
                loss_v = F.mse_loss(value(flat_obs[rows]).squeeze(-1), ret[rows])
                opt.zero_grad()
                (loss_pi + loss_v).backward()
                opt.step()
        run.watch({"disc_loss": loss_d, "actor_loss": loss_pi, "value_loss": loss_v, "reward": rew.mean()})

    state = dict(actor=actor, value=value, disc=disc, opt=opt, disc_opt=disc_opt)
    for step in run.steps(data, stride=size, **state):
        opt.param_groups[0]["lr"] = args.lr * (1 - (step - size) / args.steps)
        update(100_000_000 * args.seed + step)  # seeded by the step, so that a resumed run meets the same start states
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
