"""BCO: Behavioral Cloning from Observation (Torabi, Warnell & Stone, IJCAI 2018), arXiv:1805.01954.

    model    L_M  = -E_own log M(act | obs, next_obs), the inverse dynamics, of what the policy itself has done
    actions  act~ = argmax M(act | obs, next_obs) of the demonstrations, which come without
    policy   L_pi = -E_demo log pi(act~ | obs);   M and pi are Gaussian

The untrained policy acts for --pre-steps. BCO(0) learns once from these (--steps the same); BCO(alpha) goes on, by
alpha = envs x horizon / pre_steps as much in each iteration, on what the better policy does. Differs from the paper:
so many updates, which go on from the last, not until a held-out loss rises; the newest --buffer-size steps, not all;
observations normalized by the demonstrations; all of an observation is the agent's own. The demonstrations' actions
are overwritten before anything has seen them.
Usage: python algorithms/bco.py --env hopper-expert --demos 4
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
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
    eval_every: int = 96_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    demos: int = 4  # trajectories of the expert
    every: int = 20  # of each trajectory, every so manieth pair is used (with --demos)
    envs: int = 8  # environments side by side
    horizon: int = 1000  # steps of each environment in an iteration
    pre_steps: int = 80_000  # environment steps of the untrained policy, before it learns; BCO(0): as many as --steps
    buffer_size: int = 200_000
    updates: int = 500  # of the model, then of the policy in an iteration; the first makes up for those before


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian: x (B, I) -> mean (B, A) in [-1, 1], log_std (B, A). Of obs it is the policy, of obs and next_obs, side
    by side, the model."""

    def __init__(self, in_dim, act_dim):
        super().__init__()
        self.net = mlp(in_dim, 256, 256, 2 * act_dim)

    def forward(self, x):
        mean, log_std = self.net(x).chunk(2, -1)
        return mean.tanh(), log_std.clamp(-5, 2)


def policy(obs, actor):
    """The action to evaluate, the mean: obs (B, O) -> act (B, A)."""
    return actor(obs.clamp(-10, 10))[0]


def likelihood_loss(act, mean, log_std):
    """Negative log-likelihood of a Gaussian, less its constant: (B, A) each -> ()."""
    return (0.5 * ((act - mean) / log_std.exp()) ** 2 + log_std).sum(-1).mean()


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
    run = Run(__file__, args)
    data = load(args.env, args.source, run.device, args.eval_env)
    data.act.fill_(torch.nan)
    data.keep_demos(args.demos, args.every, args.seed)
    data.normalize_obs()  # (obs - mean) / (std + 1e-3), of the demonstrations
    envs, size = Envs(data.task, args.envs), args.envs * args.horizon
    if args.steps % size or args.pre_steps % size or args.pre_steps > args.steps:
        raise UserError(
            f"--pre-steps and --steps must be multiples of --envs x --horizon, {size}, --steps the larger or equal, "
            f"not {args.pre_steps} and {args.steps}."
        )
    if args.buffer_size < size:
        raise UserError(f"--buffer-size must hold an iteration, {size} steps, not {args.buffer_size}.")

    O, A = data.obs_dim, data.act_dim
    actor, inverse = Actor(O, A).to(run.device), Actor(2 * O, A).to(run.device)
    actor_opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True)
    inverse_opt = torch.optim.Adam(inverse.parameters(), args.lr, fused=True)
    own = torch.zeros(args.buffer_size, 2 * O + A, device=run.device)  # obs, next_obs and act of the newest steps
    both = lambda batch: torch.cat([batch.obs, batch.next_obs], -1)  # (B, 2 O)
    losses = {name: torch.zeros((), device=run.device) for name in ("model_loss", "actor_loss")}

    def learn(step):
        updates = args.updates * (step // size if step == args.pre_steps else 1)
        for _ in range(updates):
            rows = own[torch.randint(min(step, len(own)), (args.batch_size,), device=run.device)]
            loss_m = likelihood_loss(rows[:, 2 * O :], *inverse(rows[:, : 2 * O]))
            inverse_opt.zero_grad()
            loss_m.backward()
            inverse_opt.step()
        with torch.no_grad():
            data.act.copy_(inverse(both(data))[0])  # act~
        for _ in range(updates):
            batch = data.sample(args.batch_size)
            loss_pi = likelihood_loss(batch.act, *actor(batch.obs))
            actor_opt.zero_grad()
            loss_pi.backward()
            actor_opt.step()
        losses.update(model_loss=loss_m.detach(), actor_loss=loss_pi.detach())

    state = dict(own=own, actor=actor, inverse=inverse, actor_opt=actor_opt, inverse_opt=inverse_opt)
    for step in run.steps(data, stride=size, **state):
        # seeded by the step, so that a resumed run meets the same start states
        obs, act, next_obs, *_ = play(args, envs, 100_000_000 * args.seed + step, data, actor)
        columns = torch.cat([obs, next_obs, act.clamp(-1, 1)], -1).flatten(0, 1)  # (T E, 2 O + A)
        own[torch.arange(step - size, step, device=run.device) % len(own)] = columns
        if step >= args.pre_steps:
            learn(step)
        run.watch(losses)
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
