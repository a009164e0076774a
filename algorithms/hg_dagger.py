"""HG-DAgger: Interactive Imitation Learning with Human Experts (Kelly et al., ICRA 2019), arXiv:1810.02890.

    act      the policy, until the expert takes the controls, and again when it has given them back
    data     D <- D + {(obs, expert(obs)) while the expert acts}; the first round is the expert's alone
    policy   L_pi = sum_n E_D (pi_n(obs) - act)^2, an ensemble, whose mean acts
    doubt    d(obs) = |variances of the pi_n(obs)|_2;  threshold = mean d at the last quarter of the take-overs

Sister of dagger.py. Where d is below the threshold the last policy is to be trusted; it gates nothing here. Differs
from the paper: the person is simulated, by a gate on the true off = |pi(obs) - expert(obs)|^2, which takes over above
--take-over, gives back below --give-back, and looks all the time, which no count shows; 5 networks, each with batches
of its own; a round is so many steps, its last episode cut; a fit goes on from the last one.
Usage: python algorithms/hg_dagger.py --env hopper-expert
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
    take_over: float = 0.5  # squared distance of the actions above which the expert takes over
    give_back: float = 0.1  # and below which it gives back


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """N policies: obs (B, O) or (N, B, O) -> act (N, B, A) in [-1, 1]."""

    N = 5

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.nets = nn.ModuleList(mlp(obs_dim, 256, 256, act_dim) for _ in range(self.N))

    def forward(self, obs):
        each = obs.expand(self.N, *obs.shape[-2:])  # (N, B, O)
        return torch.stack([net(x) for net, x in zip(self.nets, each)]).tanh()


def policy(obs, actor):
    """The action to evaluate, the mean of the ensemble: obs (B, O) -> act (B, A)."""
    return actor(obs).mean(0)


def doubt_of(acts):
    """The norm of the ensemble's variances: the members' acts (N, B, A) -> (B,)."""
    return acts.var(0).norm(dim=-1)


def threshold_of(doubts):
    """The mean of the last quarter of the doubts (K,) at which the expert took over; 0 where it never did."""
    return doubts[int(0.75 * len(doubts)) :].mean() if len(doubts) else torch.zeros(())


def actor_loss(batch, actor):
    return actor.N * F.mse_loss(actor(batch.obs), batch.act)  # the sum over members: none feels another


def train(args):
    run = Run(__file__, args, schedule=True)  # the doubts kept are as many as --steps
    task = find_task(args.env)
    expert = load_expert(task, args.expert)  # obs (O,) -> act (A,)
    if args.steps % args.round_steps:
        raise UserError(f"--steps must be a multiple of --round-steps, {args.round_steps}, not {args.steps}.")
    env, data = task.make_env(), Dataset.buffer(task, min(args.buffer_size, args.steps), run.device)

    actor = Actor(data.obs_dim, data.act_dim).to(run.device)
    actor_opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True)
    counts = {name: torch.zeros(()) for name in ("labels", "takeovers", "policy_steps", "falls")}
    doubts = torch.full((args.steps,), -1.0)  # at the steps at which the expert took over

    def fit():
        """On all that is labelled, from where the last round's fit ended."""
        for _ in range(args.updates):
            loss = actor_loss(data.sample(args.batch_size, actor.N), actor)  # batches (N, B, ...)
            actor_opt.zero_grad()
            loss.backward()
            actor_opt.step()
        return {"actor_loss": loss}

    state = dict(buffer=data, actor=actor, actor_opt=actor_opt, doubts=doubts, **counts)
    for step in run.steps(data, stride=args.round_steps, **state):
        i, obs = step // args.round_steps - 1, None
        for t in range(step - args.round_steps, step):
            if obs is None:  # seeded by the step, so that a resumed run meets the same start states
                obs, _ = env.reset(seed=10_000_000 * args.seed + t)
                expert_acted = False
            label, x = expert(obs), torch.as_tensor(obs, dtype=torch.float32, device=run.device)[None]  # (A,), (1, O)
            with torch.no_grad():
                act, doubt = (acts := actor(x)).mean(0)[0].cpu().numpy(), doubt_of(acts)[0].cpu()  # (A,), ()
            off = ((act - label) ** 2).sum()
            expert_acts = i == 0 or off > (args.give_back if expert_acted else args.take_over)
            next_obs, rew, terminated, truncated, _ = env.step(label if expert_acts else act)
            if expert_acts:
                data.add(obs, label, rew, next_obs, terminated)
            if i > 0 and expert_acts and not expert_acted:
                doubts[t] = doubt
            counts["labels"] += expert_acts
            counts["takeovers"] += expert_acts and not expert_acted
            counts["policy_steps"] += not expert_acts
            counts["falls"] += terminated
            obs, expert_acted = None if terminated or truncated else next_obs, expert_acts

        run.watch(fit() | counts | {"doubt_threshold": threshold_of(doubts[doubts >= 0])})
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
