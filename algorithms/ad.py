"""AD: In-context Reinforcement Learning with Algorithm Distillation (Laskin et al., ICLR 2023), arXiv:2210.14215.

    data   histories: all that a learner did on one task, from its first episode, which knows nothing, to its last
    loss   L = -E log pi(act_t | obs_0, act_0, rew_0, ..., obs_t), over windows of so many episodes of a history
    acting on a task that no history is of: pi(. | its own last episodes), whose returns rise; no weight changes

What is imitated is not a policy but how one becomes better, so the window must hold more than an episode. --history
expert, whose episodes are all alike, cannot teach it (results/studies/in_context.py); noise (arXiv:2312.12275) needs no
learner: an expert whose random actions become fewer. Without official code. Differs from the paper: tabular sources
(A3C); a step is one token, of obs and the act and rew before it (three); one in so many windows begins at a history's
start, as acting does; smaller, with a larger lr: 2 layers (4), lr 1e-3 (3e-4); no dropout.
Usage: python algorithms/ad.py --env dark-room-5
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import UserError, dark_room
from results.run import Run


@dataclass
class Args:
    env: str = "dark-room-5"  # bandit, dark-room-5, dark-room, key-to-door
    seed: int = 0
    steps: int = 20_000  # updates
    batch_size: int = 64
    lr: float = 1e-3
    eval_every: int = 2_000
    eval_episodes: int = 100
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    history: Literal["source", "noise", "expert"] = "source"  # of a learner, a less and less noisy expert, an expert
    context: int | None = None  # episodes in a window; None: as in TUNED
    warmup: int = 500  # updates over which the learning rate rises to lr; then it falls along a cosine
    clip: float = 1.0  # bound on the gradient's norm


TUNED = {  # "" for all tasks, then by family, then by task: the paper has 2 to 4; the bandit's are single steps
    "": {"context": 4},
    "bandit": {"context": 100},
}
WIDTH, LAYERS, HEADS = 64, 2, 4  # of the transformer


class Sequence(NamedTuple):
    obs: torch.Tensor  # (B, K) int64
    last_act: torch.Tensor  # (B, K) int64, of the step before; n_actions where there is none
    last_rew: torch.Tensor  # (B, K)


class Block(nn.Module):
    """Of a causal transformer, normalisation first: x (B, T, W) -> the same, and the keys and values of all tokens.

    past: keys and values of the tokens before; x is then that of one token.
    """

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, past=None):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, HEADS, T, D) each
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=not past)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), (k, v)


class Actor(nn.Module):
    """A Sequence -> at each step the logits of its action, (B, K, n_actions)."""

    def __init__(self, n_obs, n_actions, context):
        super().__init__()
        self.size = math.isqrt(n_obs)  # cells along a side
        self.row, self.column = nn.Embedding(self.size, WIDTH), nn.Embedding(self.size, WIDTH)
        self.act = nn.Embedding(n_actions + 1, WIDTH)
        self.rew, self.place = nn.Linear(1, WIDTH), nn.Embedding(context, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, n_actions)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, seq):
        x = self.row(seq.obs // self.size) + self.column(seq.obs % self.size)
        x = x + self.act(seq.last_act) + self.rew(seq.last_rew[..., None])
        x = x + self.place.weight[: x.shape[1]]  # (B, K, WIDTH)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x))


def actor_loss(seq, act, actor):
    """The cross-entropy of the history's own actions (B, K)."""
    return F.cross_entropy(actor(seq).flatten(0, 1), act.flatten())


def sample(args, data, last_act, last_rew, context):
    """Windows of histories, and their actions: a Sequence, (B, K). As many begin at a history's start as would, had
    each history `context` empty steps before it."""
    B, device = args.batch_size, data.obs.device
    steps = data.obs.shape[1]
    history = torch.randint(len(data.obs), (B, 1), device=device)
    first = torch.randint(1 - context, steps - context + 1, (B, 1), device=device).clamp(min=0)
    place = first + torch.arange(context, device=device)  # (B, K)
    seq = Sequence(*(column[history, place] for column in (data.obs, last_act, last_rew)))
    return seq, data.act[history, place]


@torch.no_grad()
def learn_in_context(world, episodes, context, actor):
    """Acts on each of a world's tasks, knowing nothing at first: the returns of its episodes in turn, (n, episodes)."""
    device = actor.head.weight.device
    act, rew = torch.full((world.n,), world.n_actions), torch.zeros(world.n)
    past, rews = None, []
    for _ in range(episodes * world.length):
        now = (torch.from_numpy(world.obs), act, rew)
        now = [x.to(device)[:, None] for x in now]
        past = [torch.cat(both, 1)[:, -context:] for both in zip(past, now)] if past else now
        logits = actor(Sequence(*past))[:, -1]  # (n, n_actions)
        act = torch.multinomial(logits.softmax(-1), 1)[:, 0].cpu()
        rew = torch.from_numpy(world.step(act.numpy())).float()
        rews.append(rew)
    return torch.stack(rews, 1).unflatten(1, (episodes, world.length)).sum(2)


def train(args):
    run = Run(__file__, args, schedule=True)  # of the learning rate
    data = dark_room.load_histories(args.env, args.history, run.device)
    args = run.tuned(data.task, TUNED)
    world = data.world(data.held_out_tasks)
    context = args.context * world.length  # steps
    if not 1 < context <= data.obs.shape[1]:
        raise UserError(f"--context must be of 2 steps at least and {data.obs.shape[1]} at most, not {context}.")
    last_act, last_rew = data.act.roll(1, 1), data.rew.roll(1, 1)
    last_act[:, 0], last_rew[:, 0] = world.n_actions, 0

    actor = Actor(world.n_obs, world.n_actions, context).to(run.device)
    lr = torch.tensor(args.lr / args.warmup, device=run.device)  # a tensor, for update() to change
    opt = torch.optim.Adam(actor.parameters(), lr, (0.9, 0.99), fused=True, capturable=True)

    def update():
        loss = actor_loss(*sample(args, data, last_act, last_rew, context), actor)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(actor.parameters(), args.clip)
        opt.step()
        done = opt.state[actor.head.bias]["step"]  # (), on the device: Adam's own count
        cosine = (1 + torch.cos(math.pi * done / args.steps)) / 2
        opt.param_groups[0]["lr"].copy_(
            args.lr * torch.minimum((done + 1) / args.warmup, cosine)
        )  # for the next update
        run.watch({"actor_loss": loss})

    source = data.source_rew.reshape(len(data.source_rew), -1, world.length).sum(2).mean(0)  # (episodes of a history,)
    update = run.graphed(update)
    for step in run.steps(data, actor=actor, opt=opt):
        update()
        if run.due(step):
            world = data.world(data.held_out_tasks, args.seed)
            with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
                torch.manual_seed(args.seed)
                returns = learn_in_context(world, args.eval_episodes, context, actor).double().cpu().numpy()  # (n, E)
            tenth = max(1, args.eval_episodes // 10)
            first, last = returns[:, :tenth].mean(), returns[:, -tenth:].mean(1)
            run.report(step, last, first=torch.tensor(first), source=torch.tensor(source[-1]))


if __name__ == "__main__":
    train(tyro.cli(Args))
