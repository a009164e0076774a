import h5py
import pytest
import torch
import torch.nn.functional as F
from test_diffuser import embedded, levels, residual
from test_scripts import arguments, checkpoint_of
from update import Adam, assert_same, columns, episodes, leaves, mlp, trace

from algorithms import decision_diffuser
from algorithms.decision_diffuser import Args, policy
from datasets import UserError

E, O, H, T = 2, 3, 4, 5


class Stand:
    """In place of an Actor: simple functions; what is asked for is a nan, or the target."""

    low, high = torch.full((O,), -0.6).double(), torch.full((O,), 0.8).double()

    def __init__(self):
        self.asked = []

    def model(self, x, t, ret):
        self.asked.append((x.clone(), t.clone(), ret.clone()))
        return 0.3 * x + torch.where(ret.isnan(), 0.2, ret)[:, None, None] * (t[:, None, None] + 1) / 10

    def inverse(self, x):
        return x.sum(1, keepdim=True)


@pytest.mark.parametrize("changes", [{}, {"w": 0.0}, {"acting_steps": 3}, {"acting_steps": 3, "warm": 2}], ids=str)
def test_policy(changes, monkeypatch):
    """Step by step: half the noise, guidance, the range of the data, the present written in; the act between the first
    two observations."""
    args, actor, drawn, randn = Args(T=T, horizon=H, **{"w": 1.5, "target": 0.7} | changes), Stand(), [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *words, **more: drawn.append(randn(*words, **more)) or drawn[-1])
    obs, last = randn(E, O).double(), randn(E, H, O).double()
    found, act = policy(obs, last, actor, args)
    left, times = levels(T), {None: [4, 3, 2, 1, 0], 3: [4, 2, 0]}[args.acting_steps]
    times = times[-args.warm :] if args.warm else times
    assert len(drawn) == len(times) + 1 and [t.unique().item() for _, t, _ in actor.asked] == times
    for e in range(E):
        x = 0.5 * drawn[0][e]
        if args.warm:
            x = left[times[0]].sqrt() * torch.cat([last[e, 1:], last[e, -1:]]) + (1 - left[times[0]]).sqrt() * x
        for i, t in enumerate(times):
            a, b = left[t], left[times[i + 1]] if i + 1 < len(times) else torch.ones(()).double()
            x = torch.cat([obs[e, None], x[1:]])
            free, told = (0.3 * x + ret * (t + 1) / 10 for ret in (0.2, 0.7))
            noise = free + args.w * (told - free)
            clean = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-0.6, 0.8)
            x = decision_diffuser.jump(x, clean, a, b, 0.5 * drawn[i + 1][e])
        x = torch.cat([obs[e, None], x[1:]])
        torch.testing.assert_close(found[e], x, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(act[e], (x[0] + x[1]).sum()[None], rtol=1e-5, atol=1e-6)


def test_what_is_left_out_is_not_told():
    """A return that is hidden changes nothing, and each row has its own."""
    torch.manual_seed(0)
    net, x, t = decision_diffuser.Model(O, 8, 2), torch.randn(3, H, O), torch.tensor([0, 1, 2])
    some = net(x, t, torch.tensor([0.5, torch.nan, 0.1]))
    other = net(x, t, torch.tensor([0.9, torch.nan, 0.1]))
    assert not torch.allclose(some[0], other[0]) and torch.equal(some[1:], other[1:])
    net.ret[2].weight.data *= 2
    third = net(x, t, torch.tensor([0.5, torch.nan, 0.1]))
    assert torch.equal(some[1], third[1]) and not torch.allclose(some[2], third[2])


def model(p, x, t, ret):
    """The U-Net of two levels, 8 and 16 channels."""
    told = F.mish(torch.where(ret.isnan(), 0, ret)[:, None] @ p["model.ret.0.weight"].T + p["model.ret.0.bias"])
    told = torch.where(ret.isnan()[:, None], 0, told @ p["model.ret.2.weight"].T + p["model.ret.2.bias"])
    x, time = x.transpose(1, 2), embedded(p, "model", t, 8) + told
    high = residual(p, "model.down.0", x, time)
    low = F.conv1d(high, p["model.shrink.0.weight"], p["model.shrink.0.bias"], stride=2, padding=1)
    low = residual(p, "model.middle", residual(p, "model.down.1", low, time), time)
    grown = F.conv_transpose1d(low, p["model.grow.0.weight"], p["model.grow.0.bias"], stride=2, padding=1)
    x = residual(p, "model.up.0", torch.cat([grown, high], 1), time)
    return F.conv1d(x, p["model.last.weight"], p["model.last.bias"]).transpose(1, 2)


def test_update(small, tmp_path, monkeypatch):
    """Six steps: windows that end with their episode, returns as shares of the highest, noise, hidden returns, both
    losses, Adam, and the average, which is first a copy."""
    with h5py.File(small) as file, h5py.File(tmp_path / "tiny.hdf5", "w") as part:
        part.attrs.update(file.attrs)
        for name, column in file.items():
            part[name] = column[:40]
        part["terminals"][:], part["timeouts"][:] = False, False
        part["terminals"][[9, 20]] = True
        part["rewards"][20] = 9  # the best that can happen, as at a maze's goal
        part["timeouts"][[12, 39]] = True
    for name, number in dict(EMA_EVERY=2, EMA_START=2, EMA_RATE=0.3, TERMINATION=3, HIDDEN=0.5).items():
        monkeypatch.setattr(decision_diffuser, name, number)
    args = arguments(decision_diffuser, tmp_path / "tiny.hdf5", steps=6, T=7, gamma=0.9, batch_size=5, lr=2e-3)
    traced = trace(decision_diffuser, monkeypatch, args)
    obs, act, rew, next_obs, done = columns(tmp_path / "tiny.hdf5")
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    obs, next_obs = (obs - mean) / std, (next_obs - mean) / std
    ends, ret = torch.zeros(40, dtype=torch.long), torch.zeros(40).double()
    for span in episodes(tmp_path / "tiny.hdf5"):
        total = 0
        for i in reversed(range(span.start, span.stop)):
            total = rew[i] - 3 * (i == 9) + 0.9 * total
            ends[i], ret[i] = span.stop, total
    ret /= ret.abs().max()

    params, left = leaves(traced.start["learner"], "model", "inverse"), levels(7)
    learned = {key: x for key, x in params.items() if not key.endswith("frequencies")}
    averaged = {key: x.detach().clone() for key, x in learned.items()}
    inverse = {key: x for key, x in learned.items() if key.startswith("inverse")}
    opt, draws, hidden = Adam(learned, 2e-3), (x for _, x in traced.random), 0
    for step in range(1, 7):
        first, t, chance, noise = (next(draws) for _ in range(4))
        assert (first.shape, t.shape, chance.shape, noise.shape) == ((5,), (5,), (5,), (5, 4, 11))
        rows = torch.tensor([[min(i + k, ends[i] - 1) for k in range(4)] for i in first.tolist()])
        a, told = left[t][:, None, None], torch.where(chance < 0.5, torch.nan, ret[first])
        hidden += told.isnan().sum().item()
        noisy = a.sqrt() * obs[rows] + (1 - a).sqrt() * noise
        noisy[:, 0] = obs[rows][:, 0]
        model_loss = ((model(params, noisy, t, told) - noise)[:, 1:] ** 2).mean()
        found = mlp(inverse, torch.cat([obs[rows], next_obs[rows]], 2))
        inverse_loss = ((found - act[rows]) ** 2).mean()
        watched = traced.watched[step - 1]
        assert_same({"model_loss": model_loss, "inverse_loss": inverse_loss}, watched, rtol=1e-5)  # a_t is float32
        opt.step((model_loss + inverse_loss) / 2)
        if step % 2 == 0:
            for key, x in averaged.items():
                x.add_((1.0 if step == 2 else 0.3) * (learned[key] - x))
    assert next(draws, None) is None and 5 < hidden < 25
    for name, ours in (("learner", learned), ("actor", averaged)):
        assert_same(ours, {key: traced.end[name][key] for key in ours}, name, rtol=1e-4, atol=1e-6)
    assert_same({"low": obs.amin(0), "high": obs.amax(0)}, {k: traced.end["actor"][k] for k in ("low", "high")})


def test_rollout():
    """Each plan is made from the last one; its act is done."""
    asked = []

    def act(obs, plan):
        asked.append(plan)
        return len(asked), 10 * obs

    rollout = decision_diffuser.Rollout(act)
    assert [rollout(1), rollout(2), rollout(3)] == [10, 20, 30] and asked == [None, 1, 2]


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
        decision_diffuser.train(arguments(decision_diffuser, small, **changes))


@pytest.mark.parametrize("changes", [{"T": 1}, {"acting_steps": 3, "warm": 3}, {"acting_steps": 1, "warm": 1}], ids=str)
def test_least_and_most(changes, small, tmp_path):
    """A diffusion of one step; all steps from the last plan; one of one."""
    decision_diffuser.train(arguments(decision_diffuser, small, steps=1, batch_size=2, **changes))
    assert checkpoint_of(tmp_path).exists()
