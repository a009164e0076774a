"""text-preferences: which of two answers to a prompt is plainer language? A language model's fixed preference data,
small enough for two cores, whose judge is known, so that over-optimisation is measured and not argued.

The text is what every Python has, the manual of pydoc_data.topics, in 32 signs. A prompt is 16 characters of it, an
answer the 32 that a supervised model goes on with. The judge's reward, called gold, is that of plain language:

    gold = 1 - ((spaces - 7) / 2.5)^2 + 0.3 words known - 0.5 words unknown - 0.5 words repeated - brackets unmatched

of the words that end in the answer. Brackets are in one answer of six. It prefers one of two answers with probability
sigmoid(2 (gold - gold of the other)), as Bradley and Terry have it, which is all that a data set holds of it.

    corpus = load_text()
    pairs = load_pairs("text-preferences", corpus, actor, sample)     # sample(actor, prompts) -> answers, made once
"""

import hashlib
import io
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from tqdm import tqdm

from datasets.catalog import Task
from datasets.errors import UserError
from datasets.store import cache_dir, write_whole

SIGNS = " abcdefghijklmnopqrstuvwxyz.,'()"  # the vocabulary: a token is a place in it
PROMPT, ANSWER, CONTEXT = 16, 32, 64  # characters; CONTEXT: the most that a prompt and its answer may have
PAIRS, HELD_OUT = 20_000, 1_000  # to train on, and others, of prompts that no training has seen
SHARPNESS = 2.0  # of the judge's preferences
MAKER = 1  # to be raised when other pairs are made of the same answers' author


class Data:
    """What Run asks of whatever a run learns from."""

    obs_mean = obs_std = torch.zeros(0)

    def __init__(self, name, source, *parts):
        self.task, self.source = Task(name, max_episode_steps=None), source
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.numpy())
        self.fingerprint = digest.hexdigest()[:12]

    def score(self, returns):
        return returns


class Text(Data):
    """A text in tokens, train (N,) and held_out (M,) int64, its last twentieth."""

    def __init__(self, text):
        tokens = encode(text)
        super().__init__("text", "pydoc", tokens)
        self.train, self.held_out = tokens.tensor_split([len(tokens) * 19 // 20])
        counts = Counter(word for word in re.findall("[a-z']+", text) if len(word) > 1 or word in "ai")
        self.words = {word for word, count in counts.items() if count >= 3}  # that are known


class Batch(NamedTuple):
    tokens: torch.Tensor  # (B, 2, T) int64: the prompt and the chosen answer, the prompt and the rejected one
    mask: torch.Tensor  # (B, 2, T) bool: where the answer is; what comes after it is padding


def clean(text):
    """Any text in the 32 signs: small letters, one space for whatever else there is."""
    return re.sub(f"[^{re.escape(SIGNS[1:])}]+", " ", text.lower().replace("\u2019", "'"))


def encode(text):
    """A cleaned text -> tokens (N,) int64."""
    return torch.tensor([SIGNS.index(sign) for sign in text])


def decode(tokens):
    """Tokens (..., N) -> a string, or a list of strings."""
    return "".join(SIGNS[i] for i in tokens) if tokens.ndim == 1 else [decode(row) for row in tokens]


@cache
def load_text():
    """The Text of this Python's own manual, some 400,000 characters."""
    from pydoc_data import topics  # here, because few ask for it

    return Text(clean(" ".join(topics.topics[name] for name in sorted(topics.topics))))


def gold(prompts, answers):
    """The judge's reward of each answer (N,) float64; prompts and answers: lists of N strings."""
    return np.array([_gold(*both) for both in zip(prompts, answers)])


def _gold(prompt, answer):
    begun = re.search("[a-z']*$", prompt).group()  # a word that the answer goes on with
    words = [word for word in re.split("[^a-z']+", begun + answer)[:-1] if word]  # the last may be cut off
    known = load_text().words
    unknown = sum(word not in known for word in words)
    depth = unmatched = 0
    for sign in prompt + answer:
        depth += (sign == "(") - (sign == ")")
        unmatched += depth < 0
        depth = max(depth, 0)
    value = 1 - ((answer.count(" ") - 7) / 2.5) ** 2 + 0.3 * len(set(words) & known)
    return value - 0.5 * unknown - 0.5 * (len(words) - len(set(words))) - unmatched - depth


def write(sample, actor, prompts, seed):
    """sample(actor, prompts (B, PROMPT)) -> answers (B, ANSWER), drawn by the seed, apart from the run's own draws."""
    with torch.random.fork_rng([prompts.device] if prompts.is_cuda else []):
        torch.manual_seed(seed)
        return torch.cat([sample(actor, rows) for rows in prompts.split(1000)])


def show(prompts, answers, number=3, **rewards):
    """Prints the first answers and what each is worth by each of the rewards, which may be None."""
    for i, (prompt, answer) in enumerate(zip(decode(prompts[:number]), decode(answers[:number]))):
        judged = (f"{name} {values[i]:.2f}" for name, values in rewards.items() if values is not None)
        tqdm.write(f"  {prompt}|{answer}|  {', '.join(judged)}")


class Pairs(Data):
    """Pairs of answers to one prompt, in Batches: `train`, and `test`, which no training sees. prompts, test_prompts
    (N, PROMPT): those of the pairs, from the left cut to PROMPT characters, or with spaces made as long."""

    def __init__(self, name, source, tokens, mask, held_out, device):
        super().__init__(name, source, tokens, mask)
        starts = mask[:, 0].int().argmax(1)
        place = starts[:, None] + torch.arange(-PROMPT, 0)
        prompts = tokens[:, 0].gather(1, place.clamp(min=0)) * (place >= 0)  # a space is token 0
        cut = len(tokens) - held_out
        self.prompts, self.test_prompts = prompts.to(device).tensor_split([cut])
        tokens, mask = tokens.to(device), mask.to(device)
        self.train, self.test = Batch(tokens[:cut], mask[:cut]), Batch(tokens[cut:], mask[cut:])

    def keep(self, number):
        """Leaves the first so many pairs to train on. UserError where there are fewer."""
        if number > len(self.train.tokens):
            raise UserError(f"There are {len(self.train.tokens):,} pairs to train on, not {number:,}: lower --prefs.")
        self.train = Batch(*(column[:number] for column in self.train))

    def sample(self, batch_size):
        rows = torch.randint(len(self.train.tokens), (batch_size,), device=self.train.tokens.device)
        return Batch(*(column[rows] for column in self.train))

    def gold(self, prompts, answers):
        """The judge's rewards (N,); None of pairs of your own, whose judge nobody knows."""
        return gold(decode(prompts), decode(answers)) if self.source == "collected" else None


def load_pairs(env, corpus, actor, sample, device="cpu"):
    """The Pairs called "text-preferences", made and cached on the first call, or those of a file of your own: a line
    {"prompt": …, "chosen": …, "rejected": …} each, a tenth of which is held out.

    actor: who writes the answers, a module; what another has written is another data set. sample(actor, prompts
    (B, PROMPT)) -> answers (B, ANSWER). UserError for an unknown name, an unusable file.
    """
    if env.endswith(".jsonl"):
        return _own_file(Path(env), device)
    if env != "text-preferences":
        raise UserError(f"Unknown --env '{env}': text-preferences, or a file of pairs that ends in .jsonl.")
    digest = hashlib.sha256(repr((MAKER, PAIRS, HELD_OUT)).encode())
    for param in actor.parameters():
        digest.update(param.detach().cpu().numpy())
    path = cache_dir() / f"text-preferences-{digest.hexdigest()[:12]}.hdf5"
    if not path.exists():
        _make_pairs(path, corpus, actor, sample)
    try:
        with h5py.File(path) as file:
            tokens = torch.from_numpy(file["tokens"][:].astype(np.int64))
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and it is made again.") from None
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[..., PROMPT:] = True
    return Pairs(env, "collected", tokens, mask, HELD_OUT, device)


def _make_pairs(path, corpus, actor, sample):
    """Writes tokens (PAIRS + HELD_OUT, 2, PROMPT + ANSWER) uint8, the chosen answer first."""
    print(f"text-preferences: {PAIRS + HELD_OUT:,} pairs of answers are written and judged, in minutes, once.")
    rng = np.random.default_rng(0)
    prompts = []
    for tokens, number in ((corpus.train, PAIRS), (corpus.held_out, HELD_OUT)):
        starts = rng.integers(len(tokens) - PROMPT, size=(number, 1))
        prompts.append(tokens[torch.from_numpy(starts + np.arange(PROMPT))])
    twice = torch.cat(prompts).repeat_interleave(2, 0)
    answers = write(sample, actor, twice.to(next(actor.parameters()).device), 0).cpu()
    rewards = gold(decode(twice), decode(answers)).reshape(-1, 2)
    chances = 1 / (1 + np.exp(SHARPNESS * (rewards[:, 1] - rewards[:, 0])))  # of the first to be chosen
    tokens = torch.cat([twice, answers], 1).unflatten(0, (-1, 2)).numpy().astype(np.uint8)
    other = rng.random(len(chances)) >= chances
    tokens[other] = tokens[other][:, ::-1]
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        file["tokens"] = tokens
    write_whole(path, image.getbuffer())


def _own_file(path, device):
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        rows = [[clean(row[key]) for key in ("prompt", "chosen", "rejected")] for row in rows]
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f'{path} must have lines {{"prompt": "…", "chosen": "…", "rejected": "…"}} ({error}).'
        ) from None
    if len(rows) < 2:
        raise UserError(f"{path} has {len(rows)} pairs; at least 2 are needed, one to train on and one held out.")
    tokens = torch.zeros(len(rows), 2, CONTEXT, dtype=torch.int64)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, (prompt, *answers) in enumerate(rows):
        where = f"Pair {i + 1} of {path}"
        if answers[0] == answers[1]:
            raise UserError(f"{where} has two equal answers, of which none can be preferred.")
        if not prompt or not all(answers):
            raise UserError(f"{where} has an empty prompt or answer.")
        if (most := len(prompt) + max(map(len, answers))) > CONTEXT:
            raise UserError(f"{where} has {most} characters, its prompt included; the context has {CONTEXT}.")
        for j, answer in enumerate(answers):
            tokens[i, j, : len(prompt) + len(answer)] = encode(prompt + answer)
            mask[i, j, len(prompt) : len(prompt) + len(answer)] = True
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
    return Pairs(path.stem, "file", tokens[order], mask[order], max(1, len(rows) // 10), device)
