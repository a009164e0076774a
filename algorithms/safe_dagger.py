"""SafeDAgger: Query-Efficient Imitation Learning for End-to-End ... Driving (Zhang & Cho, AAAI 2017), arXiv:1605.06450.

    act      the policy where the classifier calls it safe, c(obs) <= 0, and else the expert
    data     D <- D + {(obs, expert(obs)) where the expert acted}; the first round is the expert's alone
    policy   L_pi = E_D (pi(obs) - act)^2, fitted after each round
    safety   L_c  = cross-entropy of sigmoid(c(obs)) and 1[|pi(obs) - act|^2 > max_off], fitted on D and D_safe after it

Sister of dagger.py: where the policy acts, nobody is asked. D_safe is the second half of the first round, which the
policy is not fitted on: by its own data alone it would seem safe. Differs from the paper: c is a network of its own,
not on the policy's features; max_off is not 0.0025, a steering wheel's: after the first fit a fifth of D_safe is beyond
0.015 (hopper), 0.046 (walker2d); a round is so many steps, its last episode cut; fits go on from the last ones.
Usage: python algorithms/safe_dagger.py --env hopper-expert
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
    max_off: float = 0.02  # squared distance of the actions from which a policy is not safe


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


def safety_loss(args, batch, actor, safety):
    logit = safety(batch.obs).squeeze(-1)  # (B,)
    with torch.no_grad():
        unsafe = ((actor(batch.obs) - batch.act) ** 2).sum(-1) > args.max_off
    return F.binary_cross_entropy_with_logits(logit, unsafe.to(logit.dtype))


def train(args):
    run = Run(__file__, args)
    task = find_task(args.env)
    expert = load_expert(task, args.expert)  # obs (O,) -> act (A,)
    if args.steps % args.round_steps:
        raise UserError(f"--steps must be a multiple of --round-steps, {args.round_steps}, not {args.steps}.")
    size = min(args.buffer_size, args.steps)
    env, data, judged = task.make_env(), *(Dataset.buffer(task, size, run.device) for _ in range(2))

    actor = Actor(data.obs_dim, data.act_dim).to(run.device)
    safety = mlp(data.obs_dim, 256, 256, 1).to(run.device)
    actor_opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True)
    safety_opt = torch.optim.Adam(safety.parameters(), args.lr, fused=True)
    counts = {name: torch.zeros(()) for name in ("labels", "takeovers", "policy_steps", "falls")}

    def fit():
        """On all that is labelled, from where the last round's fit ended."""
        for _ in range(args.updates):
            loss = actor_loss(data.sample(args.batch_size), actor)
            actor_opt.zero_grad()
            loss.backward()
            actor_opt.step()
        for _ in range(args.updates):
            loss_c = safety_loss(args, judged.sample(args.batch_size), actor, safety)
            safety_opt.zero_grad()
            loss_c.backward()
            safety_opt.step()
        return {"actor_loss": loss, "safety_loss": loss_c}

    state = dict(buffer=data, actor=actor, actor_opt=actor_opt, **counts)
    state |= dict(judged=judged, safety=safety, safety_opt=safety_opt)
    for step in run.steps(data, stride=args.round_steps, **state):
        i, obs = step // args.round_steps - 1, None
        for t in range(step - args.round_steps, step):
            if obs is None:  # seeded by the step, so that a resumed run meets the same start states
                obs, _ = env.reset(seed=10_000_000 * args.seed + t)
                expert_acted = False
            label, x = expert(obs), torch.as_tensor(obs, dtype=torch.float32, device=run.device)[None]  # (A,), (1, O)
            with torch.no_grad():
                act, unsafe = policy(x, actor)[0].cpu().numpy(), safety(x).item() > 0  # (A,)
            expert_acts = i == 0 or unsafe
            next_obs, rew, terminated, truncated, _ = env.step(label if expert_acts else act)
            if expert_acts:
                judged.add(obs, label, rew, next_obs, terminated)
                if i > 0 or 2 * t < args.round_steps:  # the rest of the first round is D_safe
                    data.add(obs, label, rew, next_obs, terminated)
            counts["labels"] += expert_acts
            counts["takeovers"] += expert_acts and not expert_acted
            counts["policy_steps"] += not expert_acts
            counts["falls"] += terminated
            obs, expert_acted = None if terminated or truncated else next_obs, expert_acts

        run.watch(fit() | counts)
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
