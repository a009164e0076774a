import dataclasses

import numpy as np
import pytest
import torch
from test_scripts import arguments
from torch.nn import functional
from update import Adam, assert_same, columns, episodes, leaves, table, trace

from algorithms import dt
from datasets import Dataset, find_task
from results.checkpoint import load_checkpoint
from results.evaluate import load_agent

B, K, O, A = 5, 4, 17, 6


@pytest.fixture
def actor():
    torch.manual_seed(0)
    actor = dt.Actor(O, A)
    for param in actor.parameters():  # nothing is 0 or 1
        param.data += 0.1 * torch.randn_like(param)
    return actor


def sequence(lengths, seed=1):
    """Sequences of K steps, of which the last `lengths` are real."""
    torch.manual_seed(seed)
    n = len(lengths)
    real = torch.arange(K) >= K - torch.tensor(lengths)[:, None]
    time = torch.randint(0, 1000, (n, K))
    return dt.Sequence(torch.randn(n, K), torch.randn(n, K, O), torch.rand(n, K, A) * 2 - 1, time, real)


def layer(module, x):
    out = x @ module.weight.detach().numpy().T.astype(np.float64)
    return out + module.bias.detach().numpy()


def norm(module, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * module.weight.detach().numpy() + module.bias.detach().numpy()


def in_numpy(actor, rtg, obs, act, time, real):
    """The transformer for one sequence, one token and one head at a time: (K, A)."""
    tokens, seen = [], []
    for t in range(K):
        place = actor.time.weight[time[t]].detach().numpy()
        for linear, value in ((actor.rtg, rtg[t : t + 1]), (actor.obs, obs[t]), (actor.act, act[t])):
            tokens.append(layer(linear, value) + place)
            seen.append(real[t])
    x = norm(actor.norm, np.array(tokens))
    for block in actor.blocks:
        q, k, v = np.split(layer(block.qkv, norm(block.norm1, x)), 3, -1)
        mixed = np.zeros_like(x)
        for i in range(3 * K):
            earlier = [j for j in range(i + 1) if seen[j] or j == i]
            weight = np.exp([q[i] @ k[j] / np.sqrt(dt.WIDTH) for j in earlier])
            mixed[i] = sum(w * v[j] for w, j in zip(weight / weight.sum(), earlier))
        x = x + layer(block.out, mixed)
        x = x + layer(block.mlp[2], np.maximum(layer(block.mlp[0], norm(block.norm2, x)), 0))
    return np.tanh(layer(actor.head, norm(actor.last_norm, x)))[1::3]


def test_loss(actor):
    seq = sequence([4, 1, 3, 4, 2])
    errors = []
    for i in range(B):
        act = in_numpy(actor, *(x[i].numpy() for x in seq))
        errors += [((act[t] - seq.act[i, t].numpy()) ** 2).mean() for t in range(K) if seq.real[i, t]]
    assert len(errors) == 14
    loss = dt.actor_loss(dataclasses.replace(dt.Args(), dropout=0.0), seq, actor)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert dt.HEADS == 1


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def layer_norm(p, name, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / (var + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def transformer(p, rtg, obs, act, time, real, dropout):
    """Of the weights p, the actions at all steps: rtg, obs, act (B, K, ...), time, real (B, K) -> (B, K, A)."""
    drop = lambda x: functional.dropout(x, dropout)
    tokens = [linear(p, "rtg", rtg), linear(p, "obs", obs), linear(p, "act", act)]
    x = torch.stack([token + p["time.weight"][time] for token in tokens], 2).flatten(1, 2)  # (B, 3 K, 128)
    x, own = drop(layer_norm(p, "norm", x)), torch.arange(x.shape[1])
    hidden = (own > own[:, None]) | ~real.repeat_interleave(3, 1)[:, None]  # (B, who looks, at whom)
    for n in range(3):
        q, k, v = linear(p, f"blocks.{n}.qkv", layer_norm(p, f"blocks.{n}.norm1", x)).chunk(3, -1)
        if n == 2:  # nobody asks the others for what they make of it
            q, x, hidden = q[:, 1::3], x[:, 1::3], hidden[:, 1::3]
        weight = (q @ k.mT / 128**0.5 - 1e9 * hidden).softmax(-1)
        x = x + drop(linear(p, f"blocks.{n}.out", drop(weight) @ v))
        hidden_layer = linear(p, f"blocks.{n}.mlp.0", layer_norm(p, f"blocks.{n}.norm2", x)).clamp(min=0)
        x = x + drop(linear(p, f"blocks.{n}.mlp.2", hidden_layer))
    return linear(p, "head", layer_norm(p, "last_norm", x)).tanh()


def test_update(small, monkeypatch):
    """Eight steps, four of them of warm-up, with dropout drawn from the same states of torch's generator."""
    states, sample = [], dt.sample_sequences

    def sample_watched(*words):
        seq = sample(*words)
        states.append(torch.get_rng_state())
        return seq

    monkeypatch.setattr(dt, "MAX_STEPS", 300)  # all later steps look alike
    monkeypatch.setattr(dt, "sample_sequences", sample_watched)
    lr = 2**-9  # exact in float32, in which torch.optim counts the steps that warm-up depends on
    changes = dict(context=13, dropout=0.2, weight_decay=0.03, warmup=4, clip=1.6, scale=50.0, lr=lr, seed=3)
    traced = trace(dt, monkeypatch, arguments(dt, small, steps=8, batch_size=9, **changes))

    obs, act, rew, next_obs, done = columns(small)
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    obs = (obs - mean) / std
    torch.testing.assert_close(traced.rows, table(obs, act, rew, (next_obs - mean) / std, done), rtol=1e-9, atol=1e-9)
    whole = episodes(small)
    parts = [table(rew[own].flip(0).cumsum(0).flip(0) / 50, torch.arange(len(rew[own]))) for own in whole]
    steps = torch.cat([torch.cat(parts), obs, act], 1)  # return-to-go, time, obs, act of each
    steps = torch.cat([steps, torch.zeros(1, 16)])  # row -1 is padding

    p = leaves(traced.start["actor"])
    opt = Adam(p, None, decay=0.03)
    assert len(states) == len(traced.random) == 8
    for step, ((_, firsts), state) in enumerate(zip(traced.random, states), 1):
        ends = [next(own.stop for own in whole if i < own.stop) for i in firsts]
        seen = [range(i, min(i + 13, end)) for i, end in zip(firsts.flatten().tolist(), ends)]
        rows = torch.tensor([[-1] * (13 - len(own)) + list(own) for own in seen])
        rtg, time, seq_obs, seq_act = steps[rows].split([1, 1, 11, 3], -1)
        torch.set_rng_state(state)
        pi = transformer(p, rtg, seq_obs, seq_act, time[..., 0].long().clamp(max=299), rows >= 0, 0.2)
        loss = ((pi - seq_act) ** 2)[rows >= 0].mean()
        opt.lr = lr * min(step / 4, 1)
        opt.step(loss, clip=1.6)  # of which some are clipped
    assert_same(p, traced.end["actor"])
    assert traced.end["actor_opt"]["param_groups"][0]["lr"] == lr


def test_heads(actor, monkeypatch):
    """Several heads: each attends with its own part of queries, keys and values."""
    monkeypatch.setattr(dt, "HEADS", 4)
    block, x = actor.blocks[0], torch.randn(2, 6, dt.WIDTH)
    mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    ours = block(x, mask, 0.0)
    reference = torch.nn.MultiheadAttention(dt.WIDTH, 4, batch_first=True)
    reference.in_proj_weight, reference.in_proj_bias = block.qkv.weight, block.qkv.bias
    reference.out_proj.weight, reference.out_proj.bias = block.out.weight, block.out.bias
    y = block.norm1(x)
    x = x + reference(y, y, y, attn_mask=~mask[0, 0])[0]
    torch.testing.assert_close(ours, x + block.mlp(block.norm2(x)))


def test_no_token_sees_a_later_one_or_padding(actor):
    """Whatever is changed in the padding, in later steps, or in the action of the step itself: the action stays."""
    seq = sequence([4, 2, 3])
    before = actor(seq)
    for t in range(K):
        changed = dt.Sequence(*(x.clone() for x in seq))
        for x in changed[:4]:
            noise = torch.randint(1, 9, x.shape) if x.dtype == torch.long else torch.randn_like(x)
            hidden = ~seq.real | (torch.arange(K) > t)
            x[hidden] = (x[hidden] + noise[hidden]) % 1000 if x.dtype == torch.long else noise[hidden]
        changed.act[:, t] = torch.randn(3, A)
        own = seq.real[:, t]
        assert torch.equal(actor(changed)[own, t], before[own, t])
    for name in ("rtg", "obs", "time"):  # but it sees these of its own step
        changed = dt.Sequence(*(x.clone() for x in seq))
        getattr(changed, name)[:, -1] += 1
        assert (actor(changed)[:, -1] != before[:, -1]).any(1).all()
    earlier = dt.Sequence(*(x.clone() for x in seq))
    earlier.act[0, 0] += 1
    assert (actor(earlier)[0, -1] != before[0, -1]).all()


@pytest.fixture
def data():
    """Three episodes of 6, 2 and 9 steps, whose rows are numbered by their first observation."""
    rows = torch.zeros(17, 2 * O + A + 2)
    rows[:, 0] = torch.arange(17)
    rows[:, O + A] = torch.arange(17) * 0.5  # rewards
    return Dataset(find_task("halfcheetah-medium"), "collected", "x", rows, [6, 8, 17], O, A)


def test_index(data):
    rtg, time, end = dt.index(data)
    for start, stop in ((0, 6), (6, 8), (8, 17)):
        for row in range(start, stop):
            assert rtg[row].item() == sum(0.5 * r for r in range(row, stop))
            assert (time[row].item(), end[row].item()) == (row - start, stop)


@pytest.mark.parametrize("seeds", [1, 2])
def test_sequences(seeds, data):
    """Each holds the steps from a row on, up to --context or its episode's end, padded at the front; rows are drawn
    uniformly, hence trajectories in proportion to their length."""
    args = dataclasses.replace(dt.Args(), batch_size=1000, seeds=seeds, context=K, scale=10.0)
    rtg, time, end = dt.index(data)
    seq = dt.sample_sequences(args, data, rtg, time, end)
    assert seq.obs.shape == (*((2,) if seeds == 2 else ()), 1000, K, O)
    seq, firsts = dt.Sequence(*(x[1] for x in seq)) if seeds == 2 else seq, []
    for i in range(1000):
        own = dt.Sequence(*(x[i] for x in seq))
        n = int(own.real.sum())
        assert own.real.tolist() == [False] * (K - n) + [True] * n
        rows = own.obs[K - n :, 0].long()
        first = int(rows[0])
        assert rows.tolist() == list(range(first, min(first + K, int(end[first]))))
        assert torch.equal(own.rtg[K - n :], rtg[rows] / 10) and torch.equal(own.time[K - n :], time[rows])
        firsts.append(first)
    counts = np.bincount(firsts, minlength=17)
    assert len(counts) == 17 and counts.min() > 25 and counts.max() < 110  # 59 expected


def test_rollout(actor):
    """Each action is that of the whole history's last steps, with what has been received taken off the target."""
    args = dataclasses.replace(dt.Args(), context=K, scale=10.0)
    target = torch.tensor([50.0, 20.0])
    rollout = dt.Rollout(args, A, lambda seq: dt.policy(seq, actor), target)
    torch.manual_seed(5)
    obs, rew = torch.randn(7, 2, O), torch.cat([torch.zeros(1, 2), torch.randn(6, 2)])
    acts, left = [], target - rew.cumsum(0)
    for t in range(7):
        acts.append(rollout(obs[t], rew[t]).detach())
        for episode in range(2):
            start, pad = max(0, t + 1 - K), max(0, K - t - 1)
            past = [act[episode] for act in acts[start:t]] + [torch.zeros(A)]
            seq = dt.Sequence(
                torch.cat([torch.zeros(pad), left[start : t + 1, episode] / 10])[None],
                torch.cat([torch.zeros(pad, O), obs[start : t + 1, episode]])[None],
                torch.cat([torch.zeros(pad, A), torch.stack(past)])[None],
                torch.cat([torch.zeros(pad, dtype=torch.long), torch.arange(start, t + 1)])[None],
                torch.cat([torch.zeros(pad), torch.ones(t + 1 - start)]).bool()[None],
            )
            torch.testing.assert_close(acts[t][episode], actor(seq)[0, -1].detach())


def test_evaluation_gives_the_rewards():
    """What the policy is given adds up to the returns."""
    data, given = Dataset.buffer(find_task("hopper-medium"), 0), []

    def policy(obs, rew):
        given.append(rew.clone())
        return torch.zeros(*rew.shape, 3)

    returns = data.evaluate(policy, 3, seed=0, seeds=2, rewards=True)
    assert given[0].shape == (2, 3) and not given[0].any()
    assert (returns >= sum(given).numpy() - 1e-3).all() and (returns - sum(given).numpy()).max() < 5  # but the last


@pytest.mark.parametrize("bound", [0.1, 1e6])
def test_clip_gradients(bound):
    nets = [dt.Actor(O, A) for _ in range(3)]
    for net in nets:
        for param in net.parameters():
            param.grad = torch.randn_like(param)
    own = [[param.grad.clone() for param in net.parameters()] for net in nets]
    expected = []
    for net in nets:
        torch.nn.utils.clip_grad_norm_(net.parameters(), bound)
        expected.append([param.grad.clone() for param in net.parameters()])
    together = [torch.nn.Parameter(torch.zeros(3, *param.shape)) for param in nets[0].parameters()]
    alone = [torch.nn.Parameter(torch.zeros_like(param)) for param in nets[0].parameters()]
    for i, param in enumerate(together):
        param.grad = torch.stack([grads[i] for grads in own])
        alone[i].grad = own[0][i].clone()
    dt.clip_gradients(together, 3, bound)
    dt.clip_gradients(alone, 1, bound)
    for i, param in enumerate(together):
        torch.testing.assert_close(param.grad, torch.stack([grads[i] for grads in expected]))
        torch.testing.assert_close(alone[i].grad, expected[0][i])


def test_warm_up(small, monkeypatch):
    """The learning rate of update k is lr k / warmup, then lr."""
    rates, step = [], torch.optim.AdamW.step

    def watch(optimizer, *words):
        rates.append(optimizer.param_groups[0]["lr"].item())
        return step(optimizer, *words)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    dt.train(arguments(dt, small, steps=8, batch_size=2, warmup=5, lr=1e-3))
    np.testing.assert_allclose(rates, np.minimum(np.arange(1, 9) / 5, 1) * 1e-3, rtol=1e-6)


def test_asks_for_the_target(small, monkeypatch):
    asked, call = [], dt.Rollout.__call__

    def watch(rollout, obs, rew):
        if rollout.past is None:
            asked.append((rollout.left, rollout.args.scale))
        return call(rollout, obs, rew)

    monkeypatch.setattr(dt.Rollout, "__call__", watch)
    dt.train(arguments(dt, small, steps=1, batch_size=2))
    dt.train(arguments(dt, small, steps=1, batch_size=2, target=6000.0))
    assert asked == [(3600.0, 1000.0), (6000.0, 1000.0)]


@pytest.mark.parametrize("name", ["own", "antmaze-umaze"])
def test_asks_an_unknown_task_for_the_best(name, small, tmp_path, monkeypatch, capsys):
    """Where no return to ask for is known, it is the best in the data, as a raw return; said aloud, kept for later."""
    load, best = dt.load, []

    def load_as(*words):
        data = load(*words)
        data.task = dataclasses.replace(data.task, name=name)
        starts = np.concatenate([[0], data.ends[:-1]])
        best[:] = [max(data.rew[a:b].double().sum().item() for a, b in zip(starts, data.ends))]
        return data

    monkeypatch.setattr(dt, "load", load_as)
    args = arguments(dt, small, steps=1, batch_size=2)
    dt.train(args)
    (path,) = (tmp_path / "runs").rglob("checkpoint.pt")
    saved, out = load_checkpoint(path)["args"], capsys.readouterr().out
    _, _, _, policy = load_agent(path)
    assert saved["target"] == policy.left == pytest.approx(best[0] if name == "own" else 1.0) and saved["scale"] == 1.0
    assert ("the target is the best in the data" in out) == (name == "own")
    assert f"{name}: target {saved['target']}, scale 1.0\n" in out and path.parent.name.endswith("context=5")
    dt.train(dataclasses.replace(args, resume=True, steps=2))
    dt.train(dataclasses.replace(args, target=20.0))
    assert "the best in the data" not in capsys.readouterr().out.split("Resumed")[1]
    assert {load_checkpoint(path)["args"]["target"] for path in (tmp_path / "runs").rglob("checkpoint.pt")} == {
        saved["target"],
        20.0,
    }
