"""DT: Decision Transformer: Reinforcement Learning via Sequence Modeling (Chen et al., NeurIPS 2021), arXiv:2106.01345.

    tokens   rtg_1, obs_1, act_1, rtg_2, obs_2, act_2, ...,   rtg_t = rew_t + rew_t+1 + ... to the trajectory's end
    actor    L_pi = E (pi(rtg_1, obs_1, act_1, ..., rtg_t, obs_t) - act_t)^2,   over all t of the --context steps

No values and no bootstrap: acting, one asks for the return --target, and takes off what has been received. The last
--context steps of all episodes are encoded anew at each step, in one batch. Sequences start at a uniformly drawn step,
which prefers trajectories in proportion to their length; where one is shorter it is padded at the front.
Differs from the authors' code: all weights start from N(0, 0.02^2), as in CORL, not the transformer's alone; the
normalisation of observations adds 1e-3 to their deviation, not 1e-6.
Usage: python algorithms/dt.py --env hopper-medium
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    steps: int = 100_000  # updates
    batch_size: int = 64
    lr: float = 1e-4
    eval_every: int = 5_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    context: int = 20  # steps of a sequence, each of three tokens
    dropout: float = 0.1  # of embeddings, attention and residual branches, in training
    weight_decay: float = 1e-4  # AdamW's
    warmup: int = 10_000  # updates over which the learning rate rises to lr
    clip: float = 0.25  # bound on the gradient's norm
    target: float | None = None  # the return to ask for in evaluation; None, here and below: as in TUNED
    scale: float | None = None  # by which returns-to-go are divided


# CORL trains maze2d, Adroit and locomotion with batches of 4096 and lr 8e-4; here all have the authors' 64 and 1e-4.
TUNED = {  # "" for all tasks, then by family, then by task: the authors' gym/experiment.py; from antmaze on CORL's
    "": dict(target=None, scale=1.0),  # None: the best return in the data
    "halfcheetah": dict(target=12000.0, scale=1000.0),
    "hopper": dict(target=3600.0, scale=1000.0),
    "walker2d": dict(target=5000.0, scale=1000.0),
    "antmaze": dict(target=1.0),
    "maze2d": dict(target=280.0),
    "pen": dict(target=3100.0),
    "door": dict(target=2900.0),
    "hammer": dict(target=12800.0),
    "relocate": dict(target=4300.0),
}
WIDTH, LAYERS, HEADS, MAX_STEPS = 128, 3, 1, 1000  # of the transformer; MAX_STEPS: timesteps that it tells apart


class Sequence(NamedTuple):
    rtg: torch.Tensor  # (B, K), returns-to-go / scale
    obs: torch.Tensor  # (B, K, O)
    act: torch.Tensor  # (B, K, A)
    time: torch.Tensor  # (B, K), steps since the episode's start
    real: torch.Tensor  # (B, K), False for padding


class Block(nn.Module):
    """Of a transformer, normalisation first: (B, L, WIDTH) -> the same at the tokens `ask`, a slice of the L.

    mask (B, 1, L, L), True where the token of a row may see that of a column.
    """

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, mask, dropout, ask=slice(None)):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-3, -2)
        q, x, mask = q[..., ask, :], x[..., ask, :], mask[..., ask, :]
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernels, which are no faster at this length
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # (B, HEADS, L, ...)
        x = x + F.dropout(self.out(y.transpose(-3, -2).flatten(-2)), dropout)
        return x + F.dropout(self.mlp(self.norm2(x)), dropout)


class Actor(nn.Module):
    """A Sequence -> the action at each of its steps, (B, K, A) in [-1, 1]."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.rtg, self.obs, self.act = (nn.Linear(size, WIDTH) for size in (1, obs_dim, act_dim))
        self.time = nn.Embedding(MAX_STEPS, WIDTH)
        self.norm, self.last_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, act_dim)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=0.02)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, seq, dropout=0.0):
        tokens = self.rtg(seq.rtg.unsqueeze(-1)), self.obs(seq.obs), self.act(seq.act)  # (B, K, WIDTH) each
        tokens = torch.stack(tokens, -2) + self.time(seq.time).unsqueeze(-2)  # (B, K, 3, WIDTH)
        x = F.dropout(self.norm(tokens.flatten(-3, -2)), dropout)  # (B, 3 K, WIDTH)
        L, real = x.shape[-2], seq.real.repeat_interleave(3, -1)  # (B, L)
        earlier = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=x.device)  # or a padded token would see none, which is 0 / 0
        mask = (earlier & real.unsqueeze(-2) | itself).unsqueeze(-3)  # (B, 1, L, L)
        for block in self.blocks[:-1]:
            x = block(x, mask, dropout)
        x = self.blocks[-1](x, mask, dropout, slice(1, None, 3))  # (B, K, WIDTH), at the tokens of obs, which act
        return self.head(self.last_norm(x)).tanh()


def policy(seq, actor):
    """The action to evaluate, that at the last step: a Sequence -> act (B, A)."""
    return actor(seq)[..., -1, :]


class Rollout:
    """Acts in episodes side by side, (E,) or of several agents (S, E), asking for `target`, a number or (E,).

    Called at each step with obs (E, O) and the reward (E,) of the step before, 0 at first; returns act (E, A).
    """

    def __init__(self, args, act_dim, act, target):
        self.args, self.act_dim, self.act, self.left, self.past, self.step = args, act_dim, act, target, None, 0

    def __call__(self, obs, rew):
        shape, dim = rew.shape, rew.dim()
        self.left = self.left - rew
        time = torch.full(shape, min(self.step, MAX_STEPS - 1), device=obs.device)
        real = torch.ones(shape, dtype=torch.bool, device=obs.device)
        now = (self.left / self.args.scale, obs, obs.new_zeros(*shape, self.act_dim), time, real)
        if self.past is None:
            self.past = [torch.zeros_like(x).unsqueeze(dim).repeat_interleave(self.args.context, dim) for x in now]
        self.past = [
            torch.cat([old.narrow(dim, 1, self.args.context - 1), new.unsqueeze(dim)], dim)
            for old, new in zip(self.past, now)
        ]
        act = self.act(Sequence(*self.past))
        self.past[2][..., -1, :] = act
        self.step += 1
        return act


def actor_loss(args, seq, actor):
    act = actor(seq, args.dropout)  # (B, K, A)
    error = ((act - seq.act) ** 2).mean(-1)  # (B, K)
    assert error.shape == seq.real.shape
    return (error * seq.real).sum() / seq.real.sum()


def index(data):
    """For each row, (N,): the return from it on, the steps since its episode's start, the row after its episode."""
    starts = np.concatenate([[0], data.ends[:-1]])
    start, end = (torch.from_numpy(np.repeat(x, data.ends - starts)).to(data.rows.device) for x in (starts, data.ends))
    total = data.rew.double().cumsum(0)
    rtg = total[end - 1] - total + data.rew
    return rtg.to(data.rew.dtype), torch.arange(len(data), device=start.device) - start, end


def sample_sequences(args, data, rtg, time, end):
    """A Sequence drawn uniformly by its first row, on the device; of several agents, with a leading axis (S,)."""
    shape = (args.batch_size,) if args.seeds == 1 else (args.seeds, args.batch_size)
    first = torch.randint(len(data), shape, device=end.device).unsqueeze(-1)  # (B, 1)
    padding = args.context - (end[first] - first).clamp(max=args.context)
    place = torch.arange(args.context, device=end.device) - padding  # (B, K), below 0 in the padding
    rows = first + place.clamp(min=0)
    batch = data.split(data.rows[rows])
    return Sequence(rtg[rows] / args.scale, batch.obs, batch.act, time[rows].clamp(max=MAX_STEPS - 1), place >= 0)


def clip_gradients(params, seeds, bound):
    """Scales each agent's gradient so that its norm is at most `bound`."""
    grads = [param.grad.view(seeds, -1) for param in params]  # (S, ...)
    norm = sum(grad.square().sum(1) for grad in grads).sqrt()  # (S,)
    for grad in grads:
        grad.mul_((bound / (norm + 1e-6)).clamp(max=1).unsqueeze(1))


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
    best = data.returns().max().item()
    args = run.tuned(data.task, TUNED | {"": TUNED[""] | {"target": best}})
    if args.target == best:
        print(f"{data.task.name}: no return to ask for is known, so the target is the best in the data, {best:.4g}")
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)
    rtg, time, end = index(data)

    actor = stack([Actor(data.obs_dim, data.act_dim) for _ in range(args.seeds)]).to(run.device)
    lr = torch.tensor(args.lr / args.warmup, device=run.device)  # a tensor, for update() to change
    actor_opt = torch.optim.AdamW(actor.parameters(), lr, weight_decay=args.weight_decay, fused=True, capturable=True)
    actor_losses = lift(args.seeds, partial(actor_loss, args), actor)

    def update():
        loss = actor_losses(sample_sequences(args, data, rtg, time, end))  # (), or (S,)
        actor_opt.zero_grad()
        loss.sum().backward()
        clip_gradients(list(actor.parameters()), args.seeds, args.clip)
        actor_opt.step()
        done = actor_opt.state[actor.head.bias]["step"]  # (), on the device: Adam's own count
        actor_opt.param_groups[0]["lr"].copy_(args.lr * ((done + 1) / args.warmup).clamp(max=1))  # for the next update
        run.watch({"actor_loss": loss})

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    for step in run.steps(data, actor=actor, actor_opt=actor_opt):
        update()
        if run.due(step):
            rollout = Rollout(args, data.act_dim, act, args.target)
            run.report(step, data.evaluate(rollout, args.eval_episodes, args.seed, args.seeds, rewards=True))


if __name__ == "__main__":
    train(tyro.cli(Args))
