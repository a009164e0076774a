import itertools
import math
import time

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_scripts import arguments, checkpoint_of
from update import Adam, assert_same, columns, episodes, leaves, trace

from algorithms import tt
from algorithms.tt import Actor, Args, draw, policy, search
from datasets import UserError, load
from results.checkpoint import load_agent

O, A, D = 2, 1, 5


def small_actor(context=3, bins=4, layers=2):
    """An Actor whose logits are far from uniform; its bins stand for 0, 1, ..., each column's a tenth apart."""
    torch.manual_seed(0)
    actor = Actor(O, A, 8, layers, context, bins)
    for param in actor.parameters():
        param.data.normal_(std=0.5)
    actor.edges[:] = torch.arange(bins - 1) + 0.5
    actor.means[:] = torch.arange(bins) + torch.arange(D)[:, None] / 10
    return actor.requires_grad_(False)


def test_bins():
    """As much of the data in each; what is read back is the mean of a bin, so never a bin away."""
    rng = np.random.default_rng(0)
    table = torch.from_numpy(np.stack([rng.normal(size=1000), rng.exponential(size=1000) * 50], 1)).float()
    actor = Actor(1, 0, 8, 1, 2, 10)
    actor.edges, actor.means = torch.zeros(2, 9), torch.zeros(2, 10)
    actor.fit_bins(table)
    tokens = actor.encode(table.view(10, 100, 2)).view(1000, 2)
    for d, column in enumerate(table.T):
        assert tokens[:, d].bincount().tolist() == 10 * [100]
        for token in range(10):
            inside = column[tokens[:, d] == token]
            assert actor.means[d, token].item() == pytest.approx(inside.mean().item(), rel=1e-5)
            low, high = (inside.min(), inside.max())
            assert all((column[tokens[:, d] < token] <= low).tolist()) and low <= actor.means[d, token] <= high
    beyond = torch.tensor([[-1e9, 1e9]])
    assert actor.encode(beyond).tolist() == [[0, 9]]


def test_bins_of_few_values():
    """A column that is constant, and one of three values, which fewer than its bins are: both are read back exactly."""
    column = torch.tensor([0.0] * 70 + [1.0] * 25 + [3.0] * 5)
    table = torch.stack([torch.full((100,), 0.3), column], 1)
    actor = Actor(1, 0, 8, 1, 2, 50)
    actor.edges, actor.means = torch.zeros(2, 49), torch.zeros(2, 50)
    actor.fit_bins(table)
    tokens = actor.encode(table)
    assert torch.equal(actor.means[torch.arange(2), tokens], table) and actor.means.isfinite().all()


def test_no_token_sees_a_later_one_nor_a_value():
    actor = small_actor()
    tokens = torch.randint(5, (1, 3 * D))
    before, _ = actor(tokens)
    for i in range(3 * D):
        other = tokens.clone()
        other[0, i] = (other[0, i] + 1) % 5
        changed = (actor(other)[0] != before).any(2)[0]
        expected = torch.arange(3 * D) == i if i % D == D - 1 else torch.arange(3 * D) >= i
        assert torch.equal(changed, expected)


def test_keys_and_values_are_kept():
    actor = small_actor()
    tokens = torch.randint(5, (3, 3 * D))
    whole, _ = actor(tokens)
    first, past = actor(tokens[:, :4])
    parts = [first]
    for i in range(4, 3 * D):
        logits, past = actor(tokens[:, i, None], past)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_draw():
    """Of 0.4, 0.35, 0.2 and 0.05: what has up to 0.4 is the first alone; 0.5 takes the second too, 1 all."""
    torch.manual_seed(0)
    logits = torch.tensor([0.05, 0.4, 0.2, 0.35]).log().expand(20_000, 4)
    assert draw(logits, 0.39).unique().tolist() == [1]
    share = draw(logits, 0.5).bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0, 0.4, 0, 0.35]) / 0.75, atol=0.02, rtol=0)
    share = draw(logits, 1.0).bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.05, 0.4, 0.2, 0.35]), atol=0.02, rtol=0)


def plain_search(args, tokens, actor, drawn):
    """One sequence after the other, each time all of it anew; drawn: the tokens that actions are."""
    bins = actor.means.shape[1]
    beams = [[(row.tolist(), [], 0.0)] for row in tokens]  # of each episode: window, actions, what they earned
    logits = lambda window: actor(torch.tensor([window]))[0][0, -1]

    def told(window, token):
        window = [*window, token]
        return window[D:] if len(window) == len(actor.place) else window

    def mean(window, d):
        return sum(p * m for p, m in zip(logits(window).softmax(0).tolist()[:bins], actor.means[d].tolist()))

    for t in range(args.horizon):
        n = args.beam * args.expand if t == 0 else args.expand
        beams = [[sequence for sequence in beam for _ in range(n)] for beam in beams]
        for d in range(O, O + A):
            chosen = iter(next(drawn).tolist())
            beams = [
                [(told(w, token := next(chosen)), [*acts, actor.means[d, token].item()], r) for w, acts, r in beam]
                for beam in beams
            ]
        for e, beam in enumerate(beams):
            scored = []
            for window, acts, total in beam:
                total += args.gamma**t * mean(window, D - 2)
                window = told(window, logits(window).argmax().item())
                scored.append((total + args.gamma ** (t + 1) * mean(window, D - 1), window, acts, total))
            scored = sorted(scored, key=lambda one: -one[0])[: args.beam]
            beams[e] = []
            for _, window, acts, total in scored:
                for _ in range(1 + O if t < args.horizon - 1 else 0):
                    window = told(window, logits(window).argmax().item())
                beams[e].append((window, acts, total))
    return torch.tensor([beam[0][1] for beam in beams])[..., None]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_search_is_that_of_a_plain_loop(steps, monkeypatch):
    """With keys and values kept, in one batch, windows that fill up included: the same plan from the same draws."""
    actor, drawn = small_actor(bins=4), []

    def random(logits, keep):
        assert keep == 0.7 and logits.shape[1] == 4  # never stop
        drawn.append(torch.randint(4, (len(logits),)))
        return drawn[-1]

    monkeypatch.setattr(tt, "draw", random)
    args = Args(beam=6, expand=2, horizon=4, gamma=0.9, keep=0.7)
    tokens = torch.randint(4, (3, (steps - 1) * D + O))
    start = time.perf_counter()
    plan = search(args, tokens, actor)
    middle = time.perf_counter()
    assert plan.shape == (3, 4, A)
    torch.testing.assert_close(plan, plain_search(args, tokens, actor, iter(drawn)))
    ratio = (time.perf_counter() - middle) / (middle - start)
    print(f"{ratio:.1f} times as fast")  # pytest -rP shows it
    assert ratio > 2


class Chain:
    """In place of an Actor: cells 0 .. 4. Left (0) earns 0.1 and goes to 0; right (1) goes on, and earns 0.6 with
    probability one half in cell 4, else nothing. The value is 10 in cell 3, or nothing."""

    obs_dim, act_dim, dim = 1, 1, 4
    means = torch.tensor([[0, 1, 2, 3, 4], [-1.0, 1, 0, 0, 0], [0, 0.1, 0.6, 0, 0], [0.0, 10, 0, 0, 0]])
    place = torch.zeros(1000)

    def __init__(self, value=True):
        self.value = value

    def __call__(self, tokens, past=None):
        before = past[0][0] if past else tokens[:, :0]
        tokens = torch.cat([before, tokens], 1)
        logits = torch.full((*tokens.shape, 6), -1e9)
        for row, sequence in zip(logits, tokens.tolist()):
            d, cell = (len(sequence) - 1) % 4, sequence[(len(sequence) - 1) // 4 * 4]
            if d == 0:
                row[-1, :2] = 0.0
                continue
            act = sequence[(len(sequence) - 1) // 4 * 4 + 1]
            if d == 1:
                row[-1, [2, 5] if act and cell == 4 else [0 if act else 1]] = 0.0
            elif d == 2:
                row[-1, int(self.value and cell == 3)] = 0.0
            else:
                row[-1, min(cell + 1, 4) if act else 0] = 0.0
        return logits[:, -1:], [(tokens, tokens)]


def earned(cell, acts, gamma, value):
    """What a plan promises, by the rule: at its last step also the value."""
    total = 0.0
    for t, act in enumerate(acts):
        total += gamma**t * ((0.3 if cell == 4 else 0.0) if act else 0.1)
        last, cell = cell, (min(cell + 1, 4) if act else 0)
    return total + gamma ** len(acts) * (10 if value and last == 3 else 0)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("horizon", [1, 3, 6])
@pytest.mark.parametrize("cell", [0, 2, 3])
def test_search_finds_the_optimum(cell, horizon, value):
    """A beam wide enough for all sequences finds the best of them."""
    torch.manual_seed(0)
    args = Args(beam=400, expand=1, horizon=horizon, gamma=0.9, keep=1.0)
    plan = search(args, torch.tensor([[cell]]), Chain(value))[0, :, 0]
    best = max(earned(cell, acts, 0.9, value) for acts in itertools.product((0, 1), repeat=horizon))
    assert earned(cell, (plan > 0).tolist(), 0.9, value) == pytest.approx(best)


def test_policy():
    """Of the last step only obs is told; --beam 1 plans a step, of one draw."""
    actor = small_actor()
    past = torch.rand(2, 2, D) * 4
    other = past.clone()
    other[:, -1, O:] = 3
    plans = []
    for x in (past, other):
        torch.manual_seed(0)
        plans.append(policy(x, actor, Args(beam=3, expand=2, horizon=2)))
    assert plans[0].shape == (2, 2, A) and torch.equal(*plans)
    torch.manual_seed(0)
    clone = policy(past, actor, Args(beam=1, expand=2, horizon=2))
    torch.manual_seed(0)
    logits, _ = actor(actor.encode(past).flatten(1)[:, : D + O])
    assert torch.equal(clone, actor.means[O, draw(logits[:, -1, :-1], 0.4)].view(2, 1, A))


@pytest.mark.parametrize("context, past", [(4, 2), (3, 5)])
def test_rollout(context, past):
    """A plan every two steps; what it is told is the present and the last two steps: obs, act and the rew after it."""
    asked = []

    def act(table):
        asked.append(table.clone())
        return torch.arange(3.0).view(1, 3, 1).expand(2, 3, 1) + 10 * len(asked)

    rollout = tt.Rollout(Args(context=context, past=past, plan_every=2), A, act)
    acts = [rollout(torch.full((2, O), float(i)), torch.full((2,), 100.0 + i))[0].item() for i in range(5)]
    assert acts == [10, 11, 20, 21, 30]
    assert [len(x[0]) for x in asked] == [1, 3, 3]
    assert asked[2][0, :, 0].tolist() == [2, 3, 4]
    assert asked[2][1, :2, O].tolist() == [20, 21] and asked[2][0, :2, -2].tolist() == [103, 104]


def attend(q, k, v, mask, dropout):
    """Attention by hand; what would be dropped is told by how much."""
    weight = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(~mask, -torch.inf).softmax(3)
    return weight @ v * (1 + dropout)


def transformer(p, tokens, dropout, layers, dim, bins):
    """Of weights p, one place after the other: tokens (B, L) -> logits (B, L, bins + 1)."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    keep, L = 1 + dropout, tokens.shape[1]
    x = torch.stack([p["token.weight"][tokens[:, i] + i % dim * (bins + 1)] + p["place"][i] for i in range(L)], 1)
    x, width = x * keep, x.shape[2]
    for i in range(layers):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.qkv")
        heads = []
        for h in range(4):
            q, k, v = (qkv[..., width * j + width // 4 * h :][..., : width // 4] for j in range(3))
            rows = []
            for t in range(L):
                seen = [s for s in range(t + 1) if s % dim != dim - 1]
                weight = (q[:, t, None] @ k[:, seen].transpose(1, 2) / math.sqrt(width / 4)).softmax(2)
                rows.append(weight @ v[:, seen] * keep)
            heads.append(torch.cat(rows, 1))
        x = x + linear(torch.cat(heads, 2), f"blocks.{i}.out") * keep
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.0")), f"blocks.{i}.mlp.2") * keep
    x = norm(x, "norm")
    return torch.stack([x[:, i] @ p["heads"][i % dim] + p["heads_bias"][i % dim] for i in range(L)], 1)


def test_update(small, tmp_path, monkeypatch):
    """Six steps: the table, its bins, windows with stops and without, weights, dropout's places, the norm's bound,
    warm-up and cosine, AdamW and what of it decays."""
    with h5py.File(small) as file, h5py.File(tmp_path / "tiny.hdf5", "w") as part:
        part.attrs.update(file.attrs)
        for name, column in file.items():
            part[name] = column[:42]
        part["terminals"][:], part["timeouts"][:] = False, False
        part["terminals"][[9, 20]] = True
        part["timeouts"][[12, 41]] = True
    monkeypatch.setattr(F, "dropout", lambda x, p: x * (1 + p))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(tt, "TERMINATION", -3)
    words = dict(width=8, layers=2, context=3, bins=6, batch_size=7, gamma=0.9, dropout=0.25)
    more = dict(steps=6, warmup=2, lr=2e-3, weight_decay=2.0, clip=0.7)
    args = arguments(tt, tmp_path / "tiny.hdf5", **words, **more)
    traced = trace(tt, monkeypatch, args)
    obs, act, rew, _, done = columns(tmp_path / "tiny.hdf5")
    rew, value, end = torch.where(done > 0, -3, rew), torch.zeros(42).double(), torch.zeros(42).long()
    for span in episodes(tmp_path / "tiny.hdf5"):
        total = 0
        for i in reversed(range(span.start, span.stop)):
            end[i], value[i] = span.stop, total
            total = rew[i] + 0.9 * total
    numbers = torch.cat([obs, act, rew[:, None], value[:, None]], 1)
    dim, tokens, means = 16, torch.zeros(42, 16).long(), torch.zeros(16, 6).double()
    for d in range(dim):
        edges = torch.quantile(numbers[:, d], torch.linspace(0, 1, 7, dtype=torch.float64))
        tokens[:, d] = (numbers[:, d, None] >= edges[1:-1]).sum(1)
        for token in range(6):
            inside = numbers[tokens[:, d] == token, d]
            means[d, token] = inside.mean() if len(inside) else edges[token : token + 2].mean()
    assert_same(traced.start["actor"]["means"], means, "means", rtol=1e-6, atol=1e-7)

    params = leaves({k: x for k, x in traced.start["actor"].items() if k not in ("edges", "means")})
    decays = [k for k in params if k == "heads" or (k.startswith("blocks") and params[k].dim() == 2)]
    opt, draws, stops, cut, clipped = Adam(params, 1e-3, (0.9, 0.95)), (x for _, x in traced.random), 0, 0, 0
    for step in range(6):
        first, windows, real = next(draws)[:, 0].tolist(), [], []
        assert len(first) == 7
        for i in first:
            over = [i + k >= end[i] for k in range(3)]
            windows += [torch.stack([torch.full((16,), 6) if gone else tokens[i + k] for k, gone in enumerate(over)])]
            real.append([not gone or bool(done[end[i] - 1]) for gone in over])
            stops, cut = stops + any(over) * real[-1][2], cut + (not real[-1][2])
        window, real = torch.stack(windows).flatten(1), torch.tensor(real).repeat_interleave(16, 1)[:, 1:]
        log_p = transformer(params, window, 0.25, 2, 16, 6).log_softmax(2)[:, :-1]
        weight = torch.tensor([1.0] * 11 + [5.0] * 3 + [1.0] * 2).repeat(3)[1:]
        error = -log_p.gather(2, window[:, 1:, None])[..., 0] * weight
        loss = error[real].sum() / real.sum()
        assert_same(loss, traced.watched[step]["actor_loss"], rtol=1e-8)
        gradient = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
        clipped += sum((g**2).sum() for g in gradient).sqrt().item() > 0.7
        old = {key: params[key].detach().clone() for key in decays}
        opt.step(loss, 0.7)
        for key, x in old.items():
            params[key].data -= opt.lr * 2.0 * x
        done_steps = torch.tensor(step + 2.0, dtype=torch.float32)
        cosine = (1 + torch.cos(math.pi * ((done_steps - 2) / 4).clamp(0, 1))) / 2
        opt.lr = (2e-3 * torch.minimum(done_steps / 2, cosine.clamp(min=0.1))).item()
    assert stops > 2 and cut > 2 and clipped > 3
    assert_same(params, {k: traced.end["actor"][k] for k in params}, rtol=1e-6, atol=1e-9)


def test_read_back_acts_the_same(small, tmp_path):
    """The bins are the checkpoint's."""
    tt.train(arguments(tt, small, steps=10))
    saved, _, data, act = load_agent(checkpoint_of(tmp_path))
    returns = data.evaluate(act, 1, saved["args"]["seed"], rewards=True)
    assert returns.round(2).tolist() == saved["curve"][-1]["returns"][0]
    assert saved["state"]["actor"]["means"].abs().sum() > 0


def test_terminations(small):
    """A fall earns -100 and a maze's goal what it does; no value reaches over an episode's end."""
    data = load(str(small))
    data.rows, data.ends, data.size = data.rows[:6].clone(), np.array([3, 5, 6]), 6
    data.rew[:] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 2.5])
    data.done[:] = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    table = tt.tabulate(Args(gamma=0.5), data)
    assert table[:, -2].tolist() == [1, 2, -100, 4, 5, 2.5]
    assert table[:, -1].tolist() == [2 - 50, -100, 0, 5, 0, 0]
    assert torch.equal(table[:, :-2], data.rows[:, : table.shape[1] - 2])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"context": 1}, "--context and --bins must be at least 2"),
        ({"bins": 1}, "--context and --bins must be at least 2"),
        ({"width": 6}, "--width a multiple of 4"),
        ({"keep": 0.0}, "--keep above 0 and at most 1"),
        ({"keep": 1.1}, "--keep above 0 and at most 1"),
        ({"beam": 0}, "--beam must be at least 1"),
        ({"plan_every": 3}, "--plan-every must be at most --horizon"),
        ({"plan_every": 2, "beam": 1}, "and 1 where --beam is 1"),
    ],
)
def test_bad_input(changes, message, small):
    with pytest.raises(UserError, match=message):
        tt.train(arguments(tt, small, **changes))


def test_discrete_data(small):
    with pytest.raises(UserError, match="discrete"):
        tt.train(arguments(tt, small.with_name("cartpole.hdf5"), steps=1))


@pytest.mark.parametrize(
    "changes",
    [{"plan_every": 2, "past": 1}, {"bins": 2, "keep": 1.0}, {"expand": 1, "horizon": 1}, {"beam": 1}],
    ids=str,
)
def test_least_and_most(changes, small, tmp_path):
    tt.train(arguments(tt, small, steps=1, **changes))
    assert checkpoint_of(tmp_path).exists() and load(str(small)).task.name
