"""DPO: Your Language Model is Secretly a Reward Model (Rafailov et al., NeurIPS 2023), arXiv:2305.18290.

max_pi E r - beta KL(pi, pi_ref) is solved by pi*(y | x) = pi_ref(y | x) exp(r / beta) / Z(x), or the other way round
r = beta log pi* / pi_ref + beta log Z. Of preferences the difference of two r's is all that counts (Bradley and Terry),
Z falls out, and what rlhf.py does in two steps is one loss of pi:

    h    = log pi(chosen) / pi_ref(chosen) - log pi(rejected) / pi_ref(rejected),  of an answer as a whole
    dpo  L = -E (1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)           (Eq. 7), eps: --label-smoothing
    ipo  L = E (h - 1 / (2 beta))^2, whose best h is finite: Azar et al. (AISTATS 2024, arXiv:2310.12036, Eq. 17)

pi_ref is the supervised model, which wrote the answers, so that it need not learn the chosen ones first. Differs from
the authors' code: Adam, not RMSprop, warmed up over 20 updates, not 150; the learning rate of so small a model.
Usage: python algorithms/dpo.py --loss ipo
"""

import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import UserError, cache_dir, text
from results.run import Run


@dataclass
class Args:
    env: str = "text-preferences"  # the pairs of answers, or a file of your own, .jsonl
    seed: int = 0
    steps: int = 200  # updates
    batch_size: int = 64
    lr: float = 1e-4
    eval_every: int = 20
    eval_episodes: int = 512
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    prefs: int = 2_000  # pairs to learn from
    sft_steps: int = 3_000  # updates of the supervised model, which all runs share
    loss: Literal["dpo", "ipo"] = "dpo"  # which of the two
    beta: float = 0.1  # weight of the KL divergence in what is maximised
    label_smoothing: float = 0.0  # share of pairs that are thought to be labelled the wrong way round, with dpo
    clip: float = 10.0  # bound on the gradient's norm


@dataclass
class Supervised:
    """Arguments of the supervised model's run."""

    steps: int
    sft_steps: int  # the same, for the name of its folder
    device: str
    graph: bool
    seed: int = 0
    batch_size: int = 32
    lr: float = 1e-3
    eval_every: int = 500
    resume: bool | None = None  # if there is a checkpoint


VOCAB, CONTEXT = len(text.SIGNS), text.CONTEXT
WIDTH, LAYERS, HEADS = 128, 4, 4  # of the language model


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


class Transformer(nn.Module):
    """tokens (B, T) -> (B, T, out), each output of the tokens up to its own.

    past: a list, empty at first, that keeps what tokens have left; later calls then give the next token alone.
    """

    def __init__(self, width, layers, out):
        super().__init__()
        self.token, self.place = nn.Embedding(VOCAB, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=0.02)

    def hidden(self, tokens, past=None):
        """What the head sees, (B, T, W)."""
        start = past[0][0].shape[2] if past else 0
        x, seen = self.token(tokens) + self.place.weight[start : start + tokens.shape[1]], []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, past[i] if past else None)
            seen.append(kept)
        if past is not None:
            past[:] = seen
        return self.norm(x)

    def forward(self, tokens, past=None):
        return self.head(self.hidden(tokens, past))


@torch.no_grad()
def sample(actor, prompts):
    """Prompts (B, P) -> answers (B, ANSWER), each token drawn by its probability."""
    past, tokens, answer = [], prompts, []
    for _ in range(text.ANSWER):
        logits = actor(tokens, past)[:, -1:]  # (B, 1, VOCAB)
        gumbel = -torch.empty_like(logits).exponential_().log()  # whose largest sum is drawn as softmax says
        tokens = (logits + gumbel).argmax(-1)  # (B, 1)
        answer.append(tokens)
    return torch.cat(answer, 1)


def log_probs(logits, tokens):
    """Of each token but the first, by the outputs at the tokens before: (B, T, VOCAB), (B, T) -> (B, T - 1)."""
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def supervised_loss(tokens, actor):
    return -log_probs(actor(tokens), tokens).mean()


def supervised(args, corpus):
    """The language model that has learned the text: trained once, and from its checkpoint in the cache after that."""
    args = Supervised(args.sft_steps, args.sft_steps, args.device, args.graph)
    run = Run("sft", args, runs=cache_dir())
    train, held_out = (tokens.to(run.device) for tokens in (corpus.train, corpus.held_out))
    actor = Transformer(WIDTH, LAYERS, VOCAB).to(run.device)
    lr = torch.tensor(args.lr, device=run.device)  # a tensor, for a graph to read
    opt = torch.optim.AdamW(actor.parameters(), lr, weight_decay=0.01, fused=True, capturable=True)
    place = torch.arange(CONTEXT, device=run.device)

    def update():
        starts = torch.randint(len(train) - CONTEXT, (args.batch_size, 1), device=run.device)
        loss = supervised_loss(train[starts + place], actor)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        opt.step()
        run.watch({"supervised_loss": loss})

    update = run.graphed(update)
    for step in run.steps(corpus, actor=actor, opt=opt):
        rate = min(step / 100, 0.5 + 0.5 * math.cos(math.pi * (step - 1) / args.steps))
        opt.param_groups[0]["lr"].fill_(args.lr * rate)
        update()
        if run.due(step):
            with torch.no_grad():
                windows = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)
                run.report(step, None, held_out_loss=supervised_loss(windows, actor))
    return actor


@torch.no_grad()
def kl(tokens, actor, reference):
    """KL(pi, pi_ref) of an answer, in nats: at each token that of the whole distribution, (B, T) -> (B,)."""
    p, q = (net(tokens)[:, text.PROMPT - 1 : -1].log_softmax(-1) for net in (actor, reference))
    return (p.exp() * (p - q)).sum((1, 2))


def answer_log_probs(batch, actor):
    """log pi of each answer as a whole, (B, 2): the sum over its own tokens."""
    tokens, mask = (column.flatten(0, 1) for column in batch)  # (2 B, T)
    return (log_probs(actor(tokens), tokens) * mask[:, 1:]).sum(1).view(-1, 2)


def preference_loss(args, h):
    """h (B,) -> ()."""
    if args.loss == "ipo":
        return ((h - 1 / (2 * args.beta)) ** 2).mean()
    right, wrong = F.logsigmoid(args.beta * h), F.logsigmoid(-args.beta * h)
    return -((1 - args.label_smoothing) * right + args.label_smoothing * wrong).mean()


def train(args):
    run = Run(__file__, args)
    if args.beta <= 0 or not 0 <= args.label_smoothing < 0.5:
        raise UserError(
            f"--beta must be above 0 and --label-smoothing in [0, 0.5), not {args.beta} and {args.label_smoothing}."
        )
    corpus = text.load_text()
    actor = supervised(args, corpus)
    data = text.load_pairs(args.env, corpus, actor, sample, run.device)
    data.keep(args.prefs)
    torch.manual_seed(args.seed)
    reference = deepcopy(actor).requires_grad_(False)
    lr = torch.tensor(args.lr, device=run.device)  # a tensor, for a graph to read
    opt = torch.optim.Adam(actor.parameters(), lr, fused=True, capturable=True)

    def ratios(batch):
        """log pi / pi_ref of both answers of each pair, (B, 2): times beta, the implicit reward."""
        with torch.no_grad():
            reference_log_probs = answer_log_probs(batch, reference)
        return answer_log_probs(batch, actor) - reference_log_probs

    def update():
        ratio = ratios(data.sample(args.batch_size))
        loss = preference_loss(args, ratio[:, 0] - ratio[:, 1])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(actor.parameters(), args.clip)
        opt.step()
        run.watch({f"{args.loss}_loss": loss})

    update = run.graphed(update)
    for step in run.steps(data, actor=actor, opt=opt):
        opt.param_groups[0]["lr"].fill_(args.lr * min(step / 20, 1.0))
        update()
        if run.due(step):
            prompts = data.test_prompts[: args.eval_episodes]
            answers = text.write(sample, actor, prompts, args.seed)
            golds, tokens = data.gold(prompts, answers), torch.cat([prompts, answers], 1)
            with torch.no_grad():
                chosen, rejected = ratios(data.test).T  # (N,)
            text.show(prompts, answers, gold=golds)
            margin, right = args.beta * (chosen - rejected).mean(), (chosen > rejected).float().mean()
            divergence = kl(tokens, actor, reference).mean()
            run.report(step, golds, kl=divergence, margin=margin, accuracy=right, chosen=chosen.mean())


if __name__ == "__main__":
    train(tyro.cli(Args))
