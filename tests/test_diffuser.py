import dataclasses
import math

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_scripts import arguments, checkpoint_of
from update import Adam, assert_same, columns, episodes, leaves, trace

from algorithms import diffuser
from datasets import UserError, find_task

A, O, H, T = 2, 3, 4, 5


def levels(T):
    """Of a cosine, as Nichol & Dhariwal have it, written out: what is left of a plan at t = 0 .. T - 1."""
    f = lambda t: math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    left, kept = [], 1.0
    for t in range(T):
        kept *= 1 - min(1 - f(t + 1) / f(t), 0.999)
        left.append(kept)
    return torch.tensor(left).double()


@pytest.mark.parametrize("T", [1, 5, 20])
def test_schedule(T):
    torch.testing.assert_close(diffuser.schedule(T).double(), levels(T), rtol=1e-5, atol=1e-7)


def test_jump():
    """Between neighbours DDPM's posterior; over any distance what it arrives at is as noisy as it should be."""
    left, x, clean = levels(T), torch.randn(6).double(), torch.randn(6).double()
    for t in range(1, T):
        alpha, beta = left[t] / left[t - 1], 1 - left[t] / left[t - 1]
        mean = left[t - 1].sqrt() * beta / (1 - left[t]) * clean + alpha.sqrt() * (1 - left[t - 1]) / (1 - left[t]) * x
        found, var = diffuser.jump(x, clean, left[t], left[t - 1], 0), diffuser.variance(left[t], left[t - 1])
        torch.testing.assert_close(found, mean)
        assert var.item() == pytest.approx((beta * (1 - left[t - 1]) / (1 - left[t])).item())
    for t in range(T):
        for s in range(t):
            a, b = left[t], left[s]
            of_x, of_noise = diffuser.jump(1, 0, a, b, 0), diffuser.jump(0, 0, a, b, 1)  # their shares
            assert (of_x**2 * (1 - a) + of_noise**2).item() == pytest.approx((1 - b).item())
            assert diffuser.jump(a.sqrt(), 1, a, b, 0).item() == pytest.approx(b.sqrt().item())
    torch.testing.assert_close(diffuser.jump(x, clean, left[0], torch.ones(()).double(), torch.randn(6)), clean)


class Stand:
    """In place of an Actor: model and value are simple functions, written so that autograd knows them."""

    dim, goal = A + O, torch.arange(3.0).double() + 10

    def __init__(self):
        self.asked = []

    def model(self, x, t):
        self.asked.append((x.clone(), t.clone()))
        return 0.5 * x + 0.1 * (t[:, None, None] + 1)

    def value(self, x, t):
        return (torch.sin(x) * torch.linspace(1, 2, A + O).double()).sum((1, 2)) + t


@pytest.mark.parametrize("goal", [False, True])
def test_inpainted(goal):
    x, first, last = torch.randn(2, H, A + O), torch.randn(2, O), torch.randn(2, O)
    found = diffuser.inpainted(x, first, last) if goal else diffuser.inpainted(x, first)
    expected = x.clone()
    expected[:, 0, A:] = first
    if goal:
        expected[:, -1, A:] = last
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "changes",
    [{}, {"goal": True}, {"acting_steps": 3}, {"acting_steps": 3, "warm": 2}, {"warm": 1}, {"scale": 0.0}, {"stop": 2}],
    ids=str,
)
def test_policy(changes, monkeypatch):
    """Step by step: where it begins, guidance by a gradient taken by hand, jumps, what is written in, the best plan."""
    base = dict(T=T, horizon=H, plans=3, scale=0.7, stop=1, goal=False, guide_steps=2)
    args, actor, drawn, randn = diffuser.Args(**base | changes), Stand(), [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *words, **more: drawn.append(randn(*words, **more)) or drawn[-1])
    obs, last = randn(2, O).double(), randn(2, H, A + O).double()
    found = diffuser.policy(obs, last, actor, args)

    left, weight = levels(T), torch.linspace(1, 2, A + O).double()
    times = {None: [4, 3, 2, 1, 0], 3: [4, 2, 0]}[args.acting_steps]
    times = times[-args.warm :] if args.warm else times
    assert len(drawn) == len(times) + 1 and [t[0].item() for _, t in actor.asked] == times
    for e in range(2):
        plans = []
        for n in range(3):
            x = drawn[0][3 * e + n]
            if args.warm:
                shifted = torch.cat([last[e, 1:], last[e, -1:]])
                x = left[times[0]].sqrt() * shifted + (1 - left[times[0]]).sqrt() * x

            def write(x, e=e):
                x = x.clone()
                x[0, A:] = obs[e]
                if args.goal:
                    x[-1, A:] = Stand.goal
                return x

            for i, t in enumerate(times):
                a, b = left[t], left[times[i + 1]] if i + 1 < len(times) else torch.ones(()).double()
                var = (1 - b) / (1 - a) * (1 - a / b)
                x = write(x)
                for _ in range(2 if t >= args.stop and args.scale else 0):
                    x = write(x + args.scale * var * x.cos() * weight)
                torch.testing.assert_close(actor.asked[i][0][3 * e + n], x, rtol=1e-5, atol=1e-6)
                clean = 0.5 * x + 0.1 * (t + 1)
                x = diffuser.jump(x, clean, a, b, drawn[i + 1][3 * e + n])
            plans.append(write(x))
        best = max(plans, key=lambda x: (x.sin() * weight).sum())
        torch.testing.assert_close(found[e], best, rtol=1e-5, atol=1e-6)


def test_samples_are_the_datas():
    """With the exact denoiser of Gaussian data, N(2, 0.5^2), the plans are of that distribution; with few steps, or
    begun from the last plan, of a narrower one, for a jump goes to the mean of what x could have been."""

    class Exact(Stand):
        def model(self, x, t):
            a = diffuser.schedule(50).double()[t][:, None, None]
            return 2 + (a.sqrt() * 0.25 / (a * 0.25 + 1 - a)) * (x - 2 * a.sqrt())

    torch.manual_seed(0)
    args = diffuser.Args(T=50, horizon=8, plans=1, scale=0.0, goal=False)
    for changes, least in (({}, 0.47), ({"acting_steps": 10}, 0.35), ({"acting_steps": 10, "warm": 4}, 0.35)):
        last = 2 + 0.5 * torch.randn(2_000, 8, A + O).double()
        x = diffuser.policy(torch.zeros(2_000, O).double(), last, Exact(), dataclasses.replace(args, **changes))[:, 1:]
        assert x.mean().item() == pytest.approx(2, abs=0.02) and least < x.std() < 0.53


def test_mixture():
    """Trained on eight Gaussians around a circle, the energy distance of its samples to theirs is within twice that of
    two fresh samples."""
    torch.manual_seed(0)

    def drawn(n):
        angle = torch.randint(8, (n,)) * math.pi / 4
        return torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(n, 2)

    def energy(one, other):
        apart = lambda x, y: torch.cdist(x, y).mean().item()
        pairs = [(one(200), other(200)) for _ in range(20)]
        return np.mean([2 * apart(x, y) - apart(x, x) - apart(y, y) for x, y in pairs])

    model, left = diffuser.Model(2, 32, 1), diffuser.schedule(50)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1_000)
    for _ in range(1_000):
        x, t = drawn(128)[:, None], torch.randint(50, (128,))
        a = left[t, None, None]
        loss = ((model(a.sqrt() * x + (1 - a).sqrt() * torch.randn_like(x), t) - x) ** 2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        slower.step()

    @torch.no_grad()
    def sampled(n):
        x = torch.randn(n, 1, 2)
        for t in range(49, -1, -1):
            after = left[t - 1] if t else torch.ones(())
            x = diffuser.jump(x, model(x, torch.full((n,), t)), left[t], after, torch.randn_like(x))
        return x[:, 0]

    assert energy(sampled, drawn) < 2 * energy(drawn, drawn)


def embedded(p, name, t, width):
    """Sines and cosines of t, and two layers."""
    frequency = torch.tensor([10_000 ** (-i / (width // 2 - 1)) for i in range(width // 2)]).double()
    x = torch.cat([(t[:, None] * frequency).sin(), (t[:, None] * frequency).cos()], 1)
    x = F.mish(x @ p[f"{name}.time.net.0.weight"].T + p[f"{name}.time.net.0.bias"])
    return x @ p[f"{name}.time.net.2.weight"].T + p[f"{name}.time.net.2.bias"]


def residual(p, name, x, time):
    def conv(x, name):
        x = F.conv1d(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"], padding=2)
        return F.mish(F.group_norm(x, 8, p[f"{name}.1.weight"], p[f"{name}.1.bias"]))

    told = F.mish(time) @ p[f"{name}.time.weight"].T + p[f"{name}.time.bias"]
    skip = F.conv1d(x, p[f"{name}.skip.weight"], p[f"{name}.skip.bias"]) if f"{name}.skip.weight" in p else x
    return conv(conv(x, f"{name}.first") + told[..., None], f"{name}.second") + skip


def model(p, x, t):
    """The U-Net of two levels, 8 and 16 channels."""
    x, time = x.transpose(1, 2), embedded(p, "model", t, 8)
    shrink = lambda x: F.conv1d(x, p["model.shrink.0.weight"], p["model.shrink.0.bias"], stride=2, padding=1)
    high = residual(p, "model.down.0", x, time)
    low = residual(p, "model.middle", residual(p, "model.down.1", shrink(high), time), time)
    grown = F.conv_transpose1d(low, p["model.grow.0.weight"], p["model.grow.0.bias"], stride=2, padding=1)
    x = residual(p, "model.up.0", torch.cat([grown, high], 1), time)
    return F.conv1d(x, p["model.last.weight"], p["model.last.bias"]).transpose(1, 2)


def value(p, x, t):
    x, time = x.transpose(1, 2), embedded(p, "value", t, 8)
    x = residual(p, "value.down.0", x, time)
    x = F.conv1d(x, p["value.shrink.0.weight"], p["value.shrink.0.bias"], stride=2, padding=1)
    x = residual(p, "value.down.1", x, time).mean(2)
    return (x @ p["value.head.weight"].T + p["value.head.bias"])[:, 0]


@pytest.mark.parametrize("goal", [False, True])
def test_update(goal, small, tmp_path, monkeypatch):
    """Six steps: windows that end with their episode, returns less what a termination costs, noise, what is written in,
    weights, Adam, and the average, which is first a copy."""
    with h5py.File(small) as file, h5py.File(tmp_path / "tiny.hdf5", "w") as part:
        part.attrs.update(file.attrs)
        for name, column in file.items():
            part[name] = column[:40]
        part["terminals"][:], part["timeouts"][:] = False, False
        part["terminals"][[9, 20]] = True
        part["timeouts"][[12, 39]] = True
        part["rewards"][:] = np.where(np.arange(40) % 7, -0.5, 1.0)
        part["rewards"][20] = 9  # the best that can happen, as at a maze's goal
    for name, number in dict(EMA_EVERY=2, EMA_START=2, EMA_RATE=0.3, TERMINATION=3).items():
        monkeypatch.setattr(diffuser, name, number)
    args = arguments(diffuser, tmp_path / "tiny.hdf5", steps=6, T=7, gamma=0.9, batch_size=5, lr=2e-3, goal=goal)
    traced = trace(diffuser, monkeypatch, args)
    obs, act, rew, next_obs, done = columns(tmp_path / "tiny.hdf5")
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    goal_obs = torch.zeros(11).double()
    if goal:
        goal_obs[:2] = next_obs[rew > 0].mean(0)[:2]
    goal_obs, x = (goal_obs - mean) / std, torch.cat([act, (obs - mean) / std], 1)
    ends, ret = torch.zeros(40, dtype=torch.long), torch.zeros(40).double()
    for span in episodes(tmp_path / "tiny.hdf5"):
        total = 0
        for i in reversed(range(span.start, span.stop)):
            total = rew[i] - 3 * (i == 9) + 0.9 * total
            ends[i], ret[i] = span.stop, total

    params, left = leaves(traced.start["learner"], "model", "value"), levels(7)
    constants = {key: x for key, x in params.items() if key.endswith("frequencies")}
    learned = {key: x for key, x in params.items() if key not in constants}
    averaged = {key: x.detach().clone() for key, x in learned.items()}
    opt, draws = Adam(learned, 2e-3), (x for _, x in traced.random)
    for step in range(1, 7):
        first, t, noise = next(draws), next(draws), next(draws)
        assert (first.shape, t.shape, noise.shape) == ((5,), (5,), (5, 4, 14))
        rows = [[min(i + k, ends[i] - 1) for k in range(4)] for i in first.tolist()]
        clean = x[torch.tensor(rows)]

        def write(y, clean=clean):
            y = y.clone()
            y[:, 0, 3:] = clean[:, 0, 3:]
            if goal:
                y[:, -1, 3:] = clean[:, -1, 3:]
            return y

        a = left[t][:, None, None]
        noisy = write(a.sqrt() * clean + (1 - a).sqrt() * noise)
        error = (write(model(params, noisy, t)) - clean) ** 2
        model_loss = (error.sum() + 9 * error[:, 0, :3].sum()) / error.numel()
        value_loss = ((value(params, noisy, t) - ret[first]) ** 2).mean()
        watched = traced.watched[step - 1]
        assert_same({"model_loss": model_loss, "value_loss": value_loss}, watched, rtol=1e-5)  # a_t is float32
        opt.step(model_loss + value_loss)
        if step % 2 == 0:
            for key, x_ in averaged.items():
                x_.add_((1.0 if step == 2 else 0.3) * (learned[key] - x_))
    assert next(draws, None) is None
    for name, ours in (("learner", learned), ("actor", averaged)):
        theirs = {key: traced.end[name][key] for key in ours}
        assert_same(ours, theirs, name, rtol=1e-4, atol=1e-6)
    assert_same(goal_obs, traced.end["actor"]["goal"])


def test_rollout():
    """A new plan at each step, of which the first act is done; in mazes one, whose states are steered for in turn."""
    asked, unit = [], torch.tensor([2.0, 2.0, 0.5, 0.5])

    def act(obs, plan):
        asked.append(plan)
        return torch.arange(3 * 6.0).view(1, 3, 6).expand(len(obs), 3, 6) / 100 + len(asked)

    args = diffuser.Args(horizon=3, goal=False)
    rollout = diffuser.Rollout(args, 2, act, unit)
    assert torch.equal(rollout(torch.zeros(2, 4)), torch.tensor([[1.0, 1.01]] * 2))
    assert torch.equal(rollout(torch.zeros(2, 4)), torch.tensor([[2.0, 2.01]] * 2))
    assert asked[0] is None and asked[1][0, 0, 0] == 1
    asked.clear()
    rollout, obs = diffuser.Rollout(dataclasses.replace(args, goal=True), 2, act, unit), torch.ones(1, 4)
    acts = torch.cat([rollout(obs) for _ in range(3)])
    second, third = (torch.tensor([8.0, 9, 10, 11]) + k for k in (0, 6))
    steer = lambda ahead: (ahead * unit / 100)[:2] + (ahead * unit / 100)[2:]
    torch.testing.assert_close(acts, torch.stack([steer(second), steer(third), steer(third)]))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"horizon": 3}, "--horizon must be a multiple of 2, for 2 levels"),
        ({"width": 12}, "--width of 8"),
        ({"acting_steps": 4}, "--acting-steps must lie between 1 and T"),
        ({"acting_steps": 2, "warm": 3}, "--warm between 1 and --acting-steps"),
    ],
)
def test_bad_input(changes, message, small):
    with pytest.raises(UserError, match=message):
        diffuser.train(arguments(diffuser, small, **changes))


@pytest.mark.parametrize("name", ["hopper-medium", "halfcheetah-medium", "hopper-medium-expert", "maze2d-umaze"])
def test_published_sizes(name):
    """A task's own plan can be halved as often as its U-Net does."""
    task, table = find_task(name), diffuser.TUNED
    sizes = table[""] | table.get(task.family, {}) | table.get(name, {})
    dim = (task.obs_dim or 4) + (task.act_dim or 2)
    x = torch.zeros(1, sizes["horizon"], dim)
    assert diffuser.Model(dim, 32, sizes["levels"])(x, torch.zeros(1, dtype=torch.long)).shape == x.shape


@pytest.mark.parametrize("changes", [{"T": 1}, {"acting_steps": 3, "warm": 3}, {"acting_steps": 1, "warm": 1}], ids=str)
def test_least_and_most(changes, small, tmp_path):
    """A diffusion of one step; all steps from the last plan; one of one."""
    diffuser.train(arguments(diffuser, small, steps=1, batch_size=2, **changes))
    assert checkpoint_of(tmp_path).exists()


def test_a_goal_is_rewarded(small, tmp_path):
    with h5py.File(small) as file, h5py.File(tmp_path / "tiny.hdf5", "w") as part:
        part.attrs.update(file.attrs)
        for name, column in file.items():
            part[name] = column[:1000]
        part["rewards"][:] = 0
    with pytest.raises(UserError, match="its goal cannot be known: --no-goal"):
        diffuser.train(arguments(diffuser, tmp_path / "tiny.hdf5", goal=True))
