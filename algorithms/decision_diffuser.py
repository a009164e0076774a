"""Decision Diffuser: Is Conditional Generative Modeling All You Need ...? (Ajay et al., ICLR 2023), arXiv:2211.15657.

    plan x   H observations, of which the first is always the present one
    model    L = E |f(x_t, t, ret) - noise|^2,   x_t = sqrt(a_t) x + sqrt(1 - a_t) noise;  ret is left out in 1 of 4
    inverse  L = E |g(obs, next_obs) - act|^2
    acting   from noise, for t = T - 1 .. 0:  noise~ = f(x, t) + w (f(x, t, target) - f(x, t));  act = g(x_0, x_1)

ret: the discounted return from the plan's first step on, over the highest in the data. All noise is halved when acting,
as in the authors' code. --acting-steps takes fewer t, --warm the last few, from the last plan. Differs from their code:
what x is without noise is kept within the data's range of each number (their data are made uniform, in [-1, 1]); beyond
an episode's end its last step is repeated; channels double at each level (1-4-8); ret is added to t, not beside it.
Usage: python algorithms/decision_diffuser.py --env hopper-medium
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
    width: int = 128  # channels of the first level
    levels: int = 3  # of the U-Net, each of twice the channels and half the steps
    horizon: int = 100  # H, steps of a plan
    T: int = 200  # steps of the diffusion
    w: float = 1.2  # of the guidance: 0 asks for nothing, 1 for the target
    target: float = 0.9  # the return to ask for, a share of the highest in the data
    temperature: float = 0.5  # of all noise when acting
    acting_steps: int | None = None  # of the t, when acting; None: all
    warm: int | None = None  # of them, from the last plan instead of from noise; None: all, from noise


EMA_RATE, EMA_EVERY, EMA_START = 0.005, 10, 2_000  # of the weights that act
TERMINATION = 100  # what a return is lower by where an episode terminates, unless that is the best that can happen
HIDDEN = 0.25  # how often ret is left out


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
    """The U-Net f: x (B, H, D), t (B,), ret (B,), nan where it is left out -> the noise in x, (B, H, D)."""

    def __init__(self, dim, width, levels):
        super().__init__()
        sizes, block = [width * 2**i for i in range(levels)], partial(Residual, time_dim=width)
        self.time = Time(width)
        self.ret = nn.Sequential(nn.Linear(1, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.down = nn.ModuleList(block(i, o) for i, o in zip([dim, *sizes], sizes))
        self.shrink = nn.ModuleList(nn.Conv1d(size, size, 3, 2, 1) for size in sizes[:-1])
        self.middle = block(sizes[-1], sizes[-1])
        self.grow = nn.ModuleList(nn.ConvTranspose1d(size, size // 2, 4, 2, 1) for size in sizes[:0:-1])
        self.up = nn.ModuleList(block(size, size // 2) for size in sizes[:0:-1])
        self.last = nn.Conv1d(width, dim, 1)

    def forward(self, x, t, ret):
        told = self.ret(ret.nan_to_num()[:, None]) * ~ret.isnan()[:, None]  # (B, W)
        x, time, kept = x.transpose(1, 2), self.time(t) + told, []  # (B, D, H)
        for down, shrink in zip(self.down, [*self.shrink, None]):
            x = down(x, time)
            if shrink is not None:
                kept.append(x)
                x = shrink(x)
        x = self.middle(x, time)
        for grow, up in zip(self.grow, self.up):
            x = up(torch.cat([grow(x), kept.pop()], 1), time)
        return self.last(x).transpose(1, 2)


class Actor(nn.Module):
    """What plans and acts: the model, the inverse, and the range of each number of an observation (O,)."""

    def __init__(self, obs_dim, act_dim, width=128, levels=3):
        super().__init__()
        self.model = Model(obs_dim, width, levels)
        layers = nn.Linear(2 * obs_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, act_dim)
        self.inverse = nn.Sequential(*layers)
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(obs_dim))


def schedule(T):
    """a_t of t = 0 .. T - 1: what is left of a plan, by a cosine (Nichol & Dhariwal 2021), float32 (T,)."""
    left = torch.cos((torch.linspace(0, T, T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0).float()


def inpainted(x, first):
    """The plans x (B, H, O) with their first obs (B, O) written in."""
    return torch.cat([first[:, None], x[:, 1:]], 1)


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
    """The plan to be followed: obs (E, O), the last plan (E, H, O) or None -> (E, H, O), and its act (E, A)."""
    left = schedule(args.T).to(obs)
    times = torch.linspace(args.T - 1, 0, args.acting_steps or args.T).round().long().tolist()
    shape, like = (len(obs), args.horizon, obs.shape[1]), dict(dtype=obs.dtype, device=obs.device)
    noise = lambda: args.temperature * torch.randn(shape, **like)
    asked = torch.tensor([torch.nan, args.target], **like).repeat_interleave(len(obs))  # (2 E,)
    x = noise()
    if args.warm and plan is not None:
        times = times[-args.warm :]
        plan = torch.cat([plan[:, 1:], plan[:, -1:]], 1)
        x = left[times[0]].sqrt() * plan + (1 - left[times[0]]).sqrt() * x
    for t, after in zip(times, [*times[1:], None]):
        a, b = left[t], left[after] if after is not None else torch.ones_like(left[0])
        x, level = inpainted(x, obs), torch.full((2 * len(obs),), t, device=obs.device)
        free, told = actor.model(x.repeat(2, 1, 1), level, asked).chunk(2)
        clean = (x - (1 - a).sqrt() * (free + args.w * (told - free))) / a.sqrt()
        x = jump(x, torch.minimum(torch.maximum(clean, actor.low), actor.high), a, b, noise())
    x = inpainted(x, obs)
    return x, actor.inverse(x[:, :2].flatten(1))


def losses(left, batch, ret, actor):
    """Of H steps in a row of the data, columns (B, H, ...), and the returns ret (B,) from the first of them on: the
    model's and the inverse's."""
    t = torch.randint(len(left), (len(ret),), device=ret.device)
    ret = torch.where(torch.rand_like(ret) < HIDDEN, torch.nan, ret)
    a, noise = left[t, None, None], torch.randn_like(batch.obs)  # (B, 1, 1), (B, H, O)
    noisy = inpainted(a.sqrt() * batch.obs + (1 - a).sqrt() * noise, batch.obs[:, 0])
    error = (actor.model(noisy, t, ret) - noise)[:, 1:] ** 2  # (B, H - 1, O): the first obs is known
    found = actor.inverse(torch.cat([batch.obs, batch.next_obs], 2))  # (B, H, A)
    assert found.shape == batch.act.shape
    return error.mean(), ((found - batch.act) ** 2).mean()


class Rollout:
    """Acts in episodes side by side, (E,), by a new plan at each step.

    Called at each step with obs (E, O); returns act (E, A).
    """

    def __init__(self, act):
        self.act, self.plan = act, None

    def __call__(self, obs):
        self.plan, act = self.act(obs, self.plan)
        return act


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
    shrinks = 2 ** (args.levels - 1)
    if args.horizon % shrinks or args.width % 8:
        raise UserError(f"--horizon must be a multiple of {shrinks}, for {args.levels} levels, and --width of 8.")
    if not 0 < (args.acting_steps or 1) <= args.T or not 0 < (args.warm or 1) <= (args.acting_steps or args.T):
        raise UserError("--acting-steps must lie between 1 and T, and --warm between 1 and --acting-steps.")
    learner = Actor(data.obs_dim, data.act_dim, args.width, args.levels).to(run.device)
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)
    learner.low.copy_(data.obs.amin(0))
    learner.high.copy_(data.obs.amax(0))
    actor = deepcopy(learner).requires_grad_(False)  # the average, which acts
    opt = torch.optim.Adam(learner.parameters(), args.lr, fused=True, capturable=True)
    left, (ret, end) = schedule(args.T).to(data.rew), index(args, data)
    ret /= ret.abs().max().clamp(min=1e-6)
    place = torch.arange(args.horizon, device=run.device)

    def update(rate):
        first = torch.randint(len(data), (args.batch_size,), device=run.device)
        batch = data.split(data.rows[torch.minimum(first[:, None] + place, end[first, None] - 1)])
        loss_x, loss_i = losses(left, batch, ret[first], learner)
        opt.zero_grad()
        ((loss_x + loss_i) / 2).backward()
        opt.step()
        if rate:
            with torch.no_grad():
                torch._foreach_lerp_(list(actor.parameters()), list(learner.parameters()), rate)
        run.watch({"model_loss": loss_x, "inverse_loss": loss_i})

    update = run.graphed(update)
    act = lambda *inputs: policy(*inputs, actor, args)
    for step in run.steps(data, learner=learner, actor=actor, opt=opt):
        update((1.0 if step <= EMA_START else EMA_RATE) if step % EMA_EVERY == 0 else 0.0)
        if run.due(step):
            run.report(step, data.evaluate(Rollout(act), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
