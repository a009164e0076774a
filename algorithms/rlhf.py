"""RLHF: Training language models to follow instructions with human feedback (Ouyang et al. 2022), arXiv:2203.02155.

    supervised  L = -E log pi(token | tokens before), of a text: pi_ref, which has written the pairs' answers
    reward      L = -E log sigmoid(r(chosen) - r(rejected)), as Christiano et al. have it, arXiv:1706.03741
    PPO         rew_t = -beta log pi(token_t | ...) / pi_ref(token_t | ...), and r besides where the answer ends
                L = -E min(ratio adv, clip(ratio, 1 - eps, 1 + eps) adv) + value_weight E (V - ret)^2

The tokens before are the observation, a token is the action, and r has learned from fixed data: where pi leaves
them, it may be wrong in pi's favour. The judge's own reward, gold, is in no loss. As in Ziegler et al.
(arXiv:1909.08593) V is a head of pi, and r has mean 0 and deviation 1 over the pairs. Differs from Ouyang et al.: r is
a small network of its own, V does not begin with it; no pre-training loss; no end token; gradients clipped at 1.
Usage: python algorithms/rlhf.py --beta 0.2
"""

import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

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
    steps: int = 60  # iterations of PPO
    batch_size: int = 64
    lr: float = 3e-5
    eval_every: int = 6
    eval_episodes: int = 512
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    prefs: int = 2_000  # pairs to learn from
    sft_steps: int = 3_000  # updates of the supervised model, which all runs share
    offline_steps: int = 300  # updates of the reward model, before PPO
    reward_lr: float = 1e-3  # of the reward model
    reward_width: int = 64  # of the reward model
    beta: float = 0.1  # weight of the KL penalty
    answers: int = 128  # written in an iteration
    epochs: int = 4  # of PPO, over an iteration's answers
    clip: float = 0.2  # of the probability ratio (eps)
    gae_lambda: float = 0.95  # of advantage estimation: 0 the TD error, 1 the whole return
    value_weight: float = 0.1  # of V's loss


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
WIDTH, LAYERS, HEADS = 128, 4, 4  # of the language model; the reward model has two layers


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


def score(tokens, mask, reward):
    """r of texts (B, T), at the last token of the answer that mask (B, T) shows: (B,)."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)
    return reward(tokens)[..., 0].gather(1, last[:, None]).squeeze(1)


def reward_loss(batch, reward):
    chosen, rejected = (score(batch.tokens[:, i], batch.mask[:, i], reward) for i in range(2))  # (B,)
    return -F.logsigmoid(chosen - rejected).mean()  # Bradley and Terry's model


def advantages(args, rew, value):
    """Generalised advantage estimation without a discount, (B, L); nothing follows an answer's end."""
    delta = rew + F.pad(value[:, 1:], (0, 1)) - value
    adv, total = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        adv[:, t] = total = delta[:, t] + args.gae_lambda * total
    return adv


def actor_loss(args, log_prob, old_log_prob, adv):
    """PPO's, (B, L) each."""
    ratio = (log_prob - old_log_prob).exp()
    assert ratio.shape == adv.shape
    return -torch.min(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv).mean()


@torch.no_grad()
def kl(tokens, actor, reference):
    """KL(pi, pi_ref) of an answer, in nats: at each token that of the whole distribution, (B, T) -> (B,)."""
    p, q = (net(tokens)[:, text.PROMPT - 1 : -1].log_softmax(-1) for net in (actor, reference))
    return (p.exp() * (p - q)).sum((1, 2))


def train(args):
    run = Run(__file__, args)
    if args.beta < 0:
        raise UserError(f"--beta must be at least 0, not {args.beta}.")
    corpus = text.load_text()
    actor = supervised(args, corpus)
    data = text.load_pairs(args.env, corpus, actor, sample, run.device)
    data.keep(args.prefs)
    torch.manual_seed(args.seed)
    reference = deepcopy(actor).requires_grad_(False)
    value = nn.Linear(WIDTH, 1).to(run.device)  # V of the tokens so far
    nn.init.zeros_(value.weight)
    params = [*actor.parameters(), *value.parameters()]
    opt = torch.optim.Adam(params, args.lr, eps=1e-5, fused=True)
    reward = Transformer(args.reward_width, 2, 1).to(run.device)
    reward_opt = torch.optim.AdamW(reward.parameters(), args.reward_lr, weight_decay=0.01, fused=True, capturable=True)
    scale = torch.tensor([1.0, 0.0], device=run.device)  # deviation and mean of r over the pairs' answers
    first = text.PROMPT - 1  # the place of the output that says an answer's first token

    def learn_reward():
        loss = reward_loss(data.sample(args.batch_size), reward)
        reward_opt.zero_grad()
        loss.backward()
        reward_opt.step()
        run.watch({"loss": loss})  # of either phase

    @torch.no_grad()
    def pair_scores(batch):
        """r of both answers of each pair, (N, 2)."""
        both = zip(*(column.flatten(0, 1).split(1000) for column in batch))
        return torch.cat([score(*some, reward) for some in both]).view(-1, 2)

    @torch.no_grad()
    def judge(tokens):
        """r as the policy is given it, of texts that end with their answer, (B, T) -> (B,)."""
        return (score(tokens, torch.ones_like(tokens), reward) - scale[1]) / scale[0]

    def look(tokens):
        """log pi of each token of the answers, and V before it: (B, T) -> (B, L) each."""
        hidden = actor.hidden(tokens)
        return log_probs(actor.head(hidden), tokens)[:, first:], value(hidden)[:, first:-1].squeeze(-1)

    def improve():
        prompts = data.prompts[torch.randint(len(data.prompts), (args.answers,), device=run.device)]
        tokens = torch.cat([prompts, sample(actor, prompts)], 1)  # (E, T)
        with torch.no_grad():
            old, v = look(tokens)  # (E, L)
            rew = -args.beta * (old - log_probs(reference(tokens), tokens)[:, first:])
            rew[:, -1] += judge(tokens)
            adv = advantages(args, rew, v)
            ret, adv = adv + v, (adv - adv.mean()) / (adv.std() + 1e-8)
        for _ in range(args.epochs):
            for rows in torch.randperm(args.answers, device=run.device).split(args.batch_size):
                log_prob, v = look(tokens[rows])
                loss = actor_loss(args, log_prob, old[rows], adv[rows]) + args.value_weight * F.mse_loss(v, ret[rows])
                opt.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(params, 1.0)
                opt.step()
        run.watch({"loss": loss})

    learn_reward = run.graphed(learn_reward)
    state = dict(actor=actor, value=value, reward=reward, opt=opt, reward_opt=reward_opt, scale=scale)
    for step in run.steps(data, **state):
        if step <= args.offline_steps:
            learn_reward()
        else:
            improve()
        if step == args.offline_steps:
            scale.copy_(torch.stack(torch.std_mean(pair_scores(data.train))))
        if step >= args.offline_steps and run.due(step):
            prompts = data.test_prompts[: args.eval_episodes]
            answers = text.write(sample, actor, prompts, args.seed)
            tokens = torch.cat([prompts, answers], 1)
            golds, proxies = data.gold(prompts, answers), judge(tokens)
            text.show(prompts, answers, gold=golds, proxy=proxies)
            right = (pair_scores(data.test).diff() < 0).float().mean()  # pairs of which r prefers the chosen one
            divergence = kl(tokens, actor, reference).mean()
            run.report(step, golds, proxy=proxies.mean(), kl=divergence, accuracy=right)


if __name__ == "__main__":
    train(tyro.cli(Args))
