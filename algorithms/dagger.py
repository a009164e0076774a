"""DAgger: A Reduction of Imitation Learning ... to No-Regret Online Learning (Ross et al. 2011), arXiv:1011.0686.

    act      in round i the expert acts with probability beta = decay^i, drawn at each step, and else the policy
    data     D <- D + {(obs, expert(obs)) for every obs of the round}, whoever acted
    policy   L_pi = E_D (pi(obs) - act)^2, fitted after each round

A clone errs most where the expert never was, and its cost grows with the horizon as eps T^2; asked about the policy's
own states, as eps T (results/studies/compounding.py). --decay 1 is a clone with as many labels. The record's curve
counts what matters to whoever is asked: labels, take-overs, steps left to the policy, falls. Differs from the paper:
squared error, on continuous actions; a round is so many steps, its last episode cut; a fit goes on from the last one;
the last policy is returned, not the best on validation. The expert is a network, asked for its mean action.
Usage: python algorithms/dagger.py --env hopper-expert
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import Dataset, UserError, find_task, load_expert
from results.run import Run


@dataclass
class Args:
    env: str = "hopper-expert"  # the task whose behaviour policy is the expert
    expert: str = ""  # another expert: a policy that sac.py has written (--snapshot-every)
    seed: int = 0
    steps: int = 10_000  # environment steps
    batch_size: int = 256
    lr: float = 1e-3
    eval_every: int = 1_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    buffer_size: int = 1_000_000
    round_steps: int = 1_000  # environment steps of a round
    updates: int = 1_000  # of the policy after each round
    decay: float = 0.0  # beta is 1, decay, decay^2, ...: 0 the expert acts in the first round only, 1 always


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """obs (B, O) -> act (B, A) in [-1, 1]."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, act_dim)

    def forward(self, obs):
        return self.net(obs).tanh()


def policy(obs, actor):
    """The action to evaluate: obs (B, O) -> act (B, A)."""
    return actor(obs)


def actor_loss(batch, actor):
    return F.mse_loss(actor(batch.obs), batch.act)


def train(args):
    run = Run(__file__, args)
    task = find_task(args.env)
    expert = load_expert(task, args.expert)  # obs (O,) -> act (A,)
    if args.steps % args.round_steps:
        raise UserError(f"--steps must be a multiple of --round-steps, {args.round_steps}, not {args.steps}.")
    env, data = task.make_env(), Dataset.buffer(task, min(args.buffer_size, args.steps), run.device)

    actor = Actor(data.obs_dim, data.act_dim).to(run.device)
    actor_opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True)
    counts = {name: torch.zeros(()) for name in ("labels", "takeovers", "policy_steps", "falls")}

    def fit():
        """On all that is labelled, from where the last round's fit ended."""
        for _ in range(args.updates):
            loss = actor_loss(data.sample(args.batch_size), actor)
            actor_opt.zero_grad()
            loss.backward()
            actor_opt.step()
        return {"actor_loss": loss}

    state = dict(buffer=data, actor=actor, actor_opt=actor_opt, **counts)
    for step in run.steps(data, stride=args.round_steps, **state):
        i, obs = step // args.round_steps - 1, None
        for t in range(step - args.round_steps, step):
            if obs is None:  # seeded by the step, so that a resumed run meets the same start states
                obs, _ = env.reset(seed=10_000_000 * args.seed + t)
                expert_acted = False
            label, x = expert(obs), torch.as_tensor(obs, dtype=torch.float32, device=run.device)[None]  # (A,), (1, O)
            with torch.no_grad():
                act = policy(x, actor)[0].cpu().numpy()  # (A,)
            expert_acts = torch.rand(()).item() < args.decay**i
            next_obs, rew, terminated, truncated, _ = env.step(label if expert_acts else act)
            data.add(obs, label, rew, next_obs, terminated)
            counts["labels"] += 1
            counts["takeovers"] += expert_acts and not expert_acted
            counts["policy_steps"] += not expert_acts
            counts["falls"] += terminated
            obs, expert_acted = None if terminated or truncated else next_obs, expert_acts

        run.watch(fit() | counts)
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
