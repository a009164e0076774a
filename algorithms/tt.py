"""TT: Offline RL as One Big Sequence Modeling Problem (Janner et al., NeurIPS 2021), arXiv:2106.02039.

    tokens  each number of obs_1, act_1, rew_1, value_1, obs_2, ...: which of its N bins, equally full, it is in
            value_t = rew_t+1 + gamma rew_t+2 + ... of the data; a fall's rew is -100, and all after it `stop`
    loss    L = -E log p(token | those before), actions times 5, over windows of --context steps
    plan    beam search over --horizon steps for  sum_k<=t gamma^k E rew_k + gamma^(t+1) E value_t:
            actions are drawn from the likeliest tokens, observations are the likeliest

A value's token is seen by none after it. --beam 1 draws the first action alone: a clone by the same model. Past tokens'
keys and values are kept, all beams of all episodes are one batch; a window that is full begins anew, a step later.
Differs from the authors' code: a bin stands for its data's mean, not its middle; the cosine ends with the run (theirs
rises again after 20 epochs); a batch's loss is divided by its tokens that are real. AntMaze has no values of IQL's.
Usage: python algorithms/tt.py --env hopper-medium
"""

import math
import sys
from dataclasses import dataclass, replace
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
    steps: int = 195_000  # updates
    batch_size: int = 256
    lr: float = 6e-4
    gamma: float = 0.99  # discount
    eval_every: int = 20_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    width: int = 128  # of the transformer's tokens
    layers: int = 4  # of the transformer
    context: int = 10  # steps of a window
    bins: int = 100  # N, of each number
    dropout: float = 0.1  # of embeddings, attention and residual branches, in training
    weight_decay: float = 0.1  # AdamW's, of matrices
    warmup: int = 4_000  # updates over which the learning rate rises to lr; then it falls to a tenth along a cosine
    clip: float = 1.0  # bound on the gradient's norm
    past: int = 5  # steps before the present that a plan is told, fewer where the context is short
    expand: int = 2  # sequences that each of the beam becomes, at each step
    keep: float = 0.4  # share of the probability that the tokens have from which actions are drawn
    plan_every: int = 1  # steps of a plan that are done
    beam: int | None = None  # sequences that go on; None, here and below: as in TUNED
    horizon: int | None = None  # steps of a plan


TUNED = {  # "" for all tasks, then by family, then by task: the authors' config/offline.py
    "": dict(beam=128, horizon=15),
    "halfcheetah": dict(beam=32, horizon=5),
    "halfcheetah-medium-expert": dict(horizon=15),
    "walker2d-medium-replay": dict(beam=32, horizon=20),  # theirs also draws from 40 tokens, however likely
    "walker2d-medium-expert": dict(horizon=5),
}
HEADS = 4  # of the transformer
TERMINATION = -100  # the rew of one, where it is not the best that can happen, as it is at a maze's goal


class Block(nn.Module):
    """Of a transformer, normalisation first: x (B, T, W) -> the same, and the keys and values of all tokens.

    past: keys and values of the tokens before x, or None. seen (T, all), True where x's token may see another.
    """

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, past, seen, dropout):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, HEADS, T, D) each
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, seen, dropout)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), dropout)
        return x + F.dropout(self.mlp(self.norm2(x)), dropout), (k, v)


class Actor(nn.Module):
    """The bins of D = O + A + 2 numbers a step, and the transformer of their tokens."""

    def __init__(self, obs_dim, act_dim, width, layers, context, bins):
        super().__init__()
        self.obs_dim, self.act_dim, self.dim = obs_dim, act_dim, obs_dim + act_dim + 2
        length = context * self.dim
        self.register_buffer("edges", torch.zeros(self.dim, bins - 1))  # between bins
        self.register_buffer("means", torch.zeros(self.dim, bins))  # of the data in each
        self.token = nn.Embedding(self.dim * (bins + 1), width)  # the last of each bins + 1 is `stop`
        self.place = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Parameter(torch.randn(self.dim, width, bins + 1) * 0.02)  # at each of the D, of the next one
        self.heads_bias = nn.Parameter(torch.zeros(self.dim, bins + 1))
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=0.02)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
        value = torch.arange(length) % self.dim == self.dim - 1
        self.register_buffer("seen", torch.ones(length, length).tril().bool() & ~value, persistent=False)

    def fit_bins(self, table):
        """Of a table (N, D): edges at its quantiles."""
        columns, bins = table.double().cpu().numpy(), self.means.shape[1]
        edges = np.quantile(columns, np.linspace(0, 1, bins + 1), axis=0).T  # (D, bins + 1)
        self.edges.copy_(torch.from_numpy(edges[:, 1:-1]))
        for i, token in enumerate(self.encode(table).T.cpu().numpy()):
            count, total = np.bincount(token, minlength=bins), np.bincount(token, columns[:, i], bins)
            means = np.where(count, total / np.maximum(count, 1), (edges[i, 1:] + edges[i, :-1]) / 2)
            self.means[i].copy_(torch.from_numpy(means))

    def encode(self, x):
        """Numbers (..., D) -> tokens (..., D) int64."""
        by_column = x.flatten(0, -2).T.contiguous()
        return torch.searchsorted(self.edges, by_column, right=True).T.reshape(x.shape)

    def forward(self, tokens, past=None, dropout=0.0):
        """tokens (B, T) that follow those of `past` -> logits of what follows each, (B, T, bins + 1), and the past."""
        start = past[0][0].shape[2] if past else 0
        place = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        dim, seen = place % self.dim, self.seen[start : start + tokens.shape[1], : start + tokens.shape[1]]
        x = F.dropout(self.token(tokens + dim * self.heads.shape[2]) + self.place[place], dropout)
        now = []
        for block, before in zip(self.blocks, past or [None] * len(self.blocks)):
            x, both = block(x, before, seen, dropout)
            now.append(both)
        logits = torch.einsum("btw,twn->btn", self.norm(x), self.heads[dim])
        return logits + self.heads_bias[dim], now


def draw(logits, keep):
    """A token of each row (B, N), of the likeliest that have `keep` of the probability: (B,)."""
    p, token = logits.softmax(-1).sort(-1, descending=True)
    likelier = p.cumsum(-1) - p
    return token.gather(-1, torch.multinomial(p * (likelier < keep), 1))[:, 0]


def search(args, tokens, actor):
    """The best plan's actions, of tokens (E, T) that end with the present observation: (E, horizon, A)."""
    E, O, A, D = len(tokens), actor.obs_dim, actor.act_dim, actor.dim
    total, acts = actor.means.new_zeros(E), actor.means.new_zeros(E, 0, A)
    (logits, past), n = actor(tokens), 1

    def take(rows):  # the sequences go on
        nonlocal tokens, logits, past, total, acts
        tokens, logits, total, acts = (x[rows] for x in (tokens, logits, total, acts))
        past = [(k[rows], v[rows]) for k, v in past]

    def tell(token):
        nonlocal tokens, logits, past
        tokens = torch.cat([tokens, token[:, None]], 1)
        if tokens.shape[1] < len(actor.place):
            logits, past = actor(token[:, None], past)
        else:  # the window is full
            tokens = tokens[:, D:]
            logits, past = actor(tokens)

    def mean(d):  # of the next number, d
        return logits[:, -1].softmax(-1)[:, :-1] @ actor.means[d]

    for t in range(args.horizon):
        grown = args.beam * args.expand if t == 0 else args.expand
        take(torch.arange(E * n, device=tokens.device).repeat_interleave(grown))
        act = []
        for d in range(O, O + A):
            token = draw(logits[:, -1, :-1], args.keep)
            act.append(actor.means[d, token])
            tell(token)
        acts = torch.cat([acts, torch.stack(act, 1)[:, None]], 1)
        total = total + args.gamma**t * mean(D - 2)
        tell(logits[:, -1].argmax(1))
        score = total + args.gamma ** (t + 1) * mean(D - 1)
        best = score.view(E, -1).topk(args.beam, 1).indices  # (E, beam), the best first
        n = args.beam
        take((best + torch.arange(E, device=best.device)[:, None] * (len(score) // E)).flatten())
        if t < args.horizon - 1:
            for _ in range(1 + O):  # the value, the next observation
                tell(logits[:, -1].argmax(1))
    return acts.unflatten(0, (E, n))[:, 0]


def policy(table, actor, args):
    """The plan: steps (E, T, D), of the last of which obs alone counts -> actions (E, horizon, A); of --beam 1, one."""
    if args.beam == 1:
        args = replace(args, expand=1, horizon=1)
    return search(args, actor.encode(table).flatten(1)[:, : -actor.act_dim - 2], actor)


class Rollout:
    """Acts in episodes side by side, (E,), by a plan anew every --plan-every steps.

    Called at each step with obs (E, O) and the reward (E,) of the step before, 0 at first; returns act (E, A).
    """

    def __init__(self, args, act_dim, act):
        self.args, self.act_dim, self.act, self.past, self.step = args, act_dim, act, None, 0

    def __call__(self, obs, rew):
        now = torch.cat([obs, obs.new_zeros(len(obs), self.act_dim + 2)], 1)[:, None]  # values, which none sees: 0
        if self.past is None:
            self.past = now
        else:
            self.past[:, -1, -2] = rew
            self.past = torch.cat([self.past, now], 1)[:, -1 - min(self.args.past, self.args.context - 1) :]
        place = self.step % self.args.plan_every
        if place == 0:
            self.plan = self.act(self.past)
        self.past[:, -1, -2 - self.act_dim : -2] = self.plan[:, place]
        self.step += 1
        return self.plan[:, place]


def actor_loss(args, weight, tokens, real, actor):
    """The cross-entropy of tokens (B, K, D), weighted by weight (D,), where steps are real (B, K)."""
    logits, _ = actor(tokens.flatten(1), dropout=args.dropout)
    error = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens.flatten(1)[:, 1:].flatten(), reduction="none")
    real = real[..., None].expand(tokens.shape).flatten(1)[:, 1:].flatten()
    weight = weight.expand(tokens.shape).flatten(1)[:, 1:].flatten()
    assert error.shape == weight.shape == real.shape
    return (weight * error * real).sum() / real.sum()


def tabulate(args, data):
    """Each step as its numbers, (N, D): obs, act, rew and value."""
    rew = data.rew.masked_fill((data.done > 0) & (data.rew < data.rew.max()), TERMINATION)
    values, start = np.zeros(len(data)), 0
    for end in data.ends:
        ahead = rew[start:end].double().cpu().numpy()
        values[start : end - 1] = lfilter([1], [1, -args.gamma], ahead[:0:-1])[::-1]
        start = end
    return torch.cat([data.obs, data.act, rew[:, None], torch.from_numpy(values).to(rew)[:, None]], 1)


def sample(args, data, tokens, end):
    """Windows whose first step is drawn uniformly: tokens (B, K, D), and which of their steps are real (B, K)."""
    first = torch.randint(len(tokens), (args.batch_size, 1), device=tokens.device)
    place, last = first + torch.arange(args.context, device=tokens.device), end[first] - 1  # (B, K), (B, 1)
    over = place > last
    window = tokens[torch.minimum(place, last)].masked_fill(over[..., None], args.bins)  # stop
    return window, ~over | (data.done[last] > 0)  # what follows a time-out is not known


def train(args):
    if min(args.context, args.bins) < 2 or args.width % HEADS or not 0 < args.keep <= 1:
        raise UserError(
            f"--context and --bins must be at least 2, --width a multiple of {HEADS}, --keep above 0 and at most 1."
        )
    run = Run(__file__, args, schedule=True)  # of the learning rate
    data = load(args.env, args.source, run.device, args.eval_env)
    args = run.tuned(data.task, TUNED)
    if args.plan_every > (args.horizon if args.beam > 1 else 1):
        raise UserError("--plan-every must be at most --horizon, and 1 where --beam is 1.")

    actor = Actor(data.obs_dim, data.act_dim, args.width, args.layers, args.context, args.bins).to(run.device)
    table = tabulate(args, data)
    actor.fit_bins(table)
    tokens = actor.encode(table)  # (N, D)
    starts = np.concatenate([[0], data.ends[:-1]])
    end = torch.from_numpy(np.repeat(data.ends, data.ends - starts)).to(run.device)  # of each row's episode
    weight = torch.ones(actor.dim, device=run.device)
    weight[data.obs_dim : -2] = 5

    matrices = [x for name, x in actor.named_parameters() if x.dim() > 1 and name.split(".")[0] in ("blocks", "heads")]
    others = [x for x in actor.parameters() if all(x is not y for y in matrices)]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    lr = torch.tensor(args.lr / args.warmup, device=run.device)  # a tensor, for update() to change
    opt = torch.optim.AdamW(groups, lr, (0.9, 0.95), fused=True, capturable=True)

    def update():
        loss = actor_loss(args, weight, *sample(args, data, tokens, end), actor)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(actor.parameters(), args.clip)
        opt.step()
        done = opt.state[actor.heads]["step"]  # (), on the device: Adam's own count
        past_warmup = (done + 1 - args.warmup) / max(1, args.steps - args.warmup)
        cosine = (1 + torch.cos(math.pi * past_warmup.clamp(0, 1))) / 2
        for group in opt.param_groups:  # for the next update
            group["lr"].copy_(args.lr * torch.minimum((done + 1) / args.warmup, cosine.clamp(min=0.1)))
        run.watch({"actor_loss": loss})

    update = run.graphed(update)
    act = partial(policy, actor=actor, args=args)
    for step in run.steps(data, actor=actor, opt=opt):
        update()
        if run.due(step):
            rollout = Rollout(args, data.act_dim, act)
            run.report(step, data.evaluate(rollout, args.eval_episodes, args.seed, rewards=True))


if __name__ == "__main__":
    train(tyro.cli(Args))
