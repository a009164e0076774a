"""Diffuser: Planning with Diffusion for Flexible Behavior Synthesis (Janner et al., ICML 2022), arXiv:2205.09991.

    plan x   H steps of (act, obs) as one picture; its first obs, and at a maze's end the goal, are always written in
    model    L = E w |f(x_t, t) - x|^2,   x_t = sqrt(a_t) x + sqrt(1 - a_t) noise,   w = 10 for the first act, else 1
    value    L = E (J(x_t, t) - ret)^2,   ret: the data's discounted return from the plan's first step on
    acting   from noise, for t = T - 1 .. 0:  x += scale var_t grad J(x, t), twice;  x ~ N(mean(f(x, t), x), var_t)

Of so many plans the one with the highest J is taken and its first act done; in mazes one plan is made, and a controller
steers for its states, as in the authors' code. --acting-steps takes fewer t, --warm the last few, from the last plan.
Differs from their code: acts are not normalised; beyond an episode's end its last step is repeated (zeros); channels
double at each level (halfcheetah: 1-4-8, attention); J ends in a mean over time; model and J are trained together.
Usage: python algorithms/diffuser.py --env hopper-medium
"""

import math
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
from scipy.signal import lfilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import UserError, load
from results.run import Run


@dataclass
class Args:
    env: str = "hopper-medium"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    eval_env: str = ""  # the Gymnasium environment to evaluate in, for an HDF5 file of your own
    seed: int = 0
    steps: int = 1_000_000  # updates
    batch_size: int = 32
    lr: float = 2e-4
    gamma: float = 0.99  # discount
    eval_every: int = 50_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    width: int = 32  # channels of the first level
    guide_steps: int = 2  # along J's gradient, at each t
    acting_steps: int | None = None  # of the t, when acting; None: all
    warm: int | None = None  # of them, from the last plan instead of from noise; None: all, from noise
    plans: int | None = None  # of which the best is taken; None, here and below: as in TUNED
    horizon: int | None = None  # H, steps of a plan
    levels: int | None = None  # of the U-Net, each of twice the channels and half the steps
    T: int | None = None  # steps of the diffusion
    scale: float | None = None  # of J's gradient
    stop: int | None = None  # t below which it does not count
    goal: bool | None = None  # whether a plan ends where the data were rewarded, and a controller follows it


TUNED = {  # "" for all tasks, then by family, then by task: configs of github.com/jannerm/diffuser, also branch maze2d
    "": dict(plans=64, horizon=32, levels=4, T=20, scale=0.1, stop=2, goal=False),
    "halfcheetah": dict(horizon=4, levels=3, scale=1e-3, stop=4),
    "hopper-medium-expert": dict(scale=1e-4, stop=4),
    **dict.fromkeys(("maze2d", "pointmaze"), dict(plans=1, horizon=128, T=64, scale=0.0, goal=True)),
}
EMA_RATE, EMA_EVERY, EMA_START = 0.005, 10, 2_000  # of the weights that act
TERMINATION = 100  # what J takes off where an episode terminates, unless that is the best that can happen


class Residual(nn.Module):
    """Two convolutions along time, told t in between: x (B, C, H), time (B, W) -> (B, out, H)."""

    def __init__(self, channels, out, time_dim):
        super().__init__()
        conv = lambda i: nn.Sequential(nn.Conv1d(i, out, 5, padding=2), nn.GroupNorm(8, out), nn.Mish())
        self.first, self.second = conv(channels), conv(out)
        self.time = nn.Linear(time_dim, out)
        self.skip = nn.Conv1d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x, time):
        return self.second(self.first(x) + self.time(F.mish(time))[..., None]) + self.skip(x)


class Time(nn.Module):
    """t (B,) int64 -> (B, W)."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2 - 1)))
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))

    def forward(self, t):
        angle = t[:, None] * self.frequencies
        return self.net(torch.cat([angle.sin(), angle.cos()], -1))


class Model(nn.Module):
    """The U-Net f: x (B, H, D), t (B,) -> what x was without noise, (B, H, D)."""

    def __init__(self, dim, width, levels):
        super().__init__()
        sizes, block = [width * 2**i for i in range(levels)], partial(Residual, time_dim=width)
        self.time = Time(width)
        self.down = nn.ModuleList(block(i, o) for i, o in zip([dim, *sizes], sizes))
        self.shrink = nn.ModuleList(nn.Conv1d(size, size, 3, 2, 1) for size in sizes[:-1])
        self.middle = block(sizes[-1], sizes[-1])
        self.grow = nn.ModuleList(nn.ConvTranspose1d(size, size // 2, 4, 2, 1) for size in sizes[:0:-1])
        self.up = nn.ModuleList(block(size, size // 2) for size in sizes[:0:-1])
        self.last = nn.Conv1d(width, dim, 1)

    def forward(self, x, t):
        x, time, kept = x.transpose(1, 2), self.time(t), []  # (B, D, H)
        for down, shrink in zip(self.down, [*self.shrink, None]):
            x = down(x, time)
            if shrink is not None:
                kept.append(x)
                x = shrink(x)
        x = self.middle(x, time)
        for grow, up in zip(self.grow, self.up):
            x = up(torch.cat([grow(x), kept.pop()], 1), time)
        return self.last(x).transpose(1, 2)


class Value(nn.Module):
    """The first half of a U-Net, J: x (B, H, D), t (B,) -> (B,)."""

    def __init__(self, dim, width, levels):
        super().__init__()
        sizes = [width * 2**i for i in range(levels)]
        self.time = Time(width)
        self.down = nn.ModuleList(Residual(i, o, width) for i, o in zip([dim, *sizes], sizes))
        self.shrink = nn.ModuleList(nn.Conv1d(size, size, 3, 2, 1) for size in sizes[:-1])
        self.head = nn.Linear(sizes[-1], 1)

    def forward(self, x, t):
        x, time = x.transpose(1, 2), self.time(t)
        for down, shrink in zip(self.down, [*self.shrink, nn.Identity()]):
            x = shrink(down(x, time))
        return self.head(x.mean(2)).squeeze(1)


class Actor(nn.Module):
    """What plans: model, value, and in mazes the goal, an observation (O,)."""

    def __init__(self, obs_dim, act_dim, width=32, levels=4):
        super().__init__()
        self.dim = act_dim + obs_dim
        self.model, self.value = (net(self.dim, width, levels) for net in (Model, Value))
        self.register_buffer("goal", torch.zeros(obs_dim))


def schedule(T):
    """a_t of t = 0 .. T - 1: what is left of a plan, by a cosine (Nichol & Dhariwal 2021), float32 (T,)."""
    left = torch.cos((torch.linspace(0, T, T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0).float()


def inpainted(x, first, last=None):
    """The plans x (B, H, A + O) with their first obs (B, O) written in, and where it is given their last."""
    act_dim = x.shape[2] - first.shape[1]
    x = torch.cat([torch.cat([x[:, :1, :act_dim], first[:, None]], 2), x[:, 1:]], 1)
    if last is None:
        return x
    return torch.cat([x[:, :-1], torch.cat([x[:, -1:, :act_dim], last[:, None]], 2)], 1)


def variance(a, b):
    """Of the less noisy of two levels, given the other: levels a and b = what is left of a plan, ()."""
    return (1 - b) / (1 - a) * (1 - a / b)


def jump(x, clean, a, b, noise):
    """From x at level a to level b, as if x had come from `clean`. With neighbours for a and b it is DDPM's posterior
    (arXiv:2006.11239, Eq. 7), its mean plus noise times its deviation."""
    var = variance(a, b)
    direction = (x - a.sqrt() * clean) / (1 - a).sqrt()
    return b.sqrt() * clean + (1 - b - var).clamp(min=0).sqrt() * direction + var.sqrt() * noise


def policy(obs, plan, actor, args):
    """The plan to be followed: obs (E, O), the last plan (E, H, A + O) or None -> (E, H, A + O)."""
    left = schedule(args.T).to(obs)
    times = torch.linspace(args.T - 1, 0, args.acting_steps or args.T).round().long().tolist()
    obs = obs.repeat_interleave(args.plans, 0)  # (E n, O)
    write = partial(inpainted, first=obs, last=actor.goal.expand_as(obs) if args.goal else None)
    noise = lambda: torch.randn(len(obs), args.horizon, actor.dim, dtype=obs.dtype, device=obs.device)
    x = noise()
    if args.warm and plan is not None:
        times = times[-args.warm :]
        plan = torch.cat([plan[:, 1:], plan[:, -1:]], 1).repeat_interleave(args.plans, 0)
        x = left[times[0]].sqrt() * plan + (1 - left[times[0]]).sqrt() * x
    for t, after in zip(times, [*times[1:], None]):
        a, b = left[t], left[after] if after is not None else torch.ones_like(left[0])
        x, level = write(x), torch.full((len(obs),), t, device=obs.device)
        for _ in range(args.guide_steps if args.scale and t >= args.stop else 0):
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                (grad,) = torch.autograd.grad(actor.value(y, level).sum(), y)
            x = write(x + args.scale * variance(a, b) * grad)
        x = jump(x, actor.model(x, level), a, b, noise())
    x = write(x)
    value = actor.value(x, torch.zeros_like(level)).view(-1, args.plans)  # (E, n)
    return x.unflatten(0, value.shape)[torch.arange(len(value), device=x.device), value.argmax(1)]


def losses(args, left, x, ret, actor):
    """Of plans x (B, H, A + O) of the data and the returns ret (B,) from their first step on: the model's and J's."""
    act_dim = x.shape[2] - len(actor.goal)
    write = partial(inpainted, first=x[:, 0, act_dim:], last=x[:, -1, act_dim:] if args.goal else None)
    t = torch.randint(args.T, (len(x),), device=x.device)
    a = left[t, None, None]  # (B, 1, 1)
    noisy = write(a.sqrt() * x + (1 - a).sqrt() * torch.randn_like(x))
    error = (write(actor.model(noisy, t)) - x) ** 2  # (B, H, A + O)
    weight = torch.ones_like(x[0])
    weight[0, :act_dim] = 10
    value = actor.value(noisy, t)
    assert value.shape == ret.shape
    return (weight * error).mean(), ((value - ret) ** 2).mean()


class Rollout:
    """Acts in episodes side by side, (E,), by a new plan at each step, of which the first act is done; in mazes by one
    plan, whose next state, in the data's own unit obs_std (O,), is steered for: positions (x, y), then velocities.

    Called at each step with obs (E, O); returns act (E, A).
    """

    def __init__(self, args, act_dim, act, obs_std):
        self.args, self.act_dim, self.act, self.obs_std, self.plan, self.step = args, act_dim, act, obs_std, None, 0

    def __call__(self, obs):
        if self.plan is None or not self.args.goal:
            self.plan = self.act(obs, self.plan)
        self.step = min(self.step + 1, self.args.horizon - 1)
        if not self.args.goal:
            return self.plan[:, 0, : self.act_dim]
        ahead = (self.plan[:, self.step, self.act_dim :] - obs) * self.obs_std  # (E, 4)
        return (ahead[:, :2] + ahead[:, 2:]).clamp(-1, 1)


def index(args, data):
    """For each row, (N,): the discounted return from it on, the row after its episode."""
    starts = np.concatenate([[0], data.ends[:-1]])
    fall = data.done * (data.rew < data.rew.max())
    rew, ret = (data.rew - TERMINATION * fall).double().cpu().numpy(), np.zeros(len(data))
    for start, end in zip(starts, data.ends):
        ret[start:end] = lfilter([1], [1, -args.gamma], rew[start:end][::-1])[::-1]
    end = torch.from_numpy(np.repeat(data.ends, data.ends - starts)).to(data.rows.device)
    return torch.from_numpy(ret).to(data.rew), end


def train(args):
    run = Run(__file__, args)
    data = load(args.env, args.source, run.device, args.eval_env)
    args = run.tuned(data.task, TUNED)
    shrinks = 2 ** (args.levels - 1)
    if args.horizon % shrinks or args.width % 8:
        raise UserError(f"--horizon must be a multiple of {shrinks}, for {args.levels} levels, and --width of 8.")
    if not 0 < (args.acting_steps or 1) <= args.T or not 0 < (args.warm or 1) <= (args.acting_steps or args.T):
        raise UserError("--acting-steps must lie between 1 and T, and --warm between 1 and --acting-steps.")
    if args.goal and not (rewarded := data.rew > 0).any():
        raise UserError(f"No step of {data.task.name} is rewarded, and its goal cannot be known: --no-goal.")
    learner = Actor(data.obs_dim, data.act_dim, args.width, args.levels).to(run.device)
    if args.goal:
        learner.goal[:2] = data.next_obs[rewarded].mean(0)[:2]  # at rest
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)
    learner.goal.sub_(data.obs_mean).div_(data.obs_std)
    actor = deepcopy(learner).requires_grad_(False)  # the average, which acts
    opt = torch.optim.Adam(learner.parameters(), args.lr, fused=True, capturable=True)
    left, (ret, end) = schedule(args.T).to(data.rew), index(args, data)
    place = torch.arange(args.horizon, device=run.device)

    def update(rate):
        first = torch.randint(len(data), (args.batch_size,), device=run.device)
        batch = data.split(data.rows[torch.minimum(first[:, None] + place, end[first, None] - 1)])
        loss_x, loss_v = losses(args, left, torch.cat([batch.act, batch.obs], 2), ret[first], learner)
        opt.zero_grad()
        (loss_x + loss_v).backward()
        opt.step()
        if rate:
            with torch.no_grad():
                torch._foreach_lerp_(list(actor.parameters()), list(learner.parameters()), rate)
        run.watch({"model_loss": loss_x, "value_loss": loss_v})

    update = run.graphed(update)
    act = lambda *inputs: policy(*inputs, actor, args)
    for step in run.steps(data, learner=learner, actor=actor, opt=opt):
        update((1.0 if step <= EMA_START else EMA_RATE) if step % EMA_EVERY == 0 else 0.0)
        if run.due(step):
            rollout = Rollout(args, data.act_dim, act, data.obs_std)
            run.report(step, data.evaluate(rollout, args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
