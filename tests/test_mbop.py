import json

import h5py
import pytest
import torch
from test_scripts import arguments, checkpoint_of, trained
from update import Adam, assert_same, columns, episodes, leaves, table, trace

from algorithms import mbop
from datasets import UserError
from results.checkpoint import load_agent

E, H, O, A, n = 2, 3, 2, 1, 2  # n candidates of each of the NETWORKS


def index(data, ends, horizon):
    """mbop.index, row by row: data of obs, act, rew, next_obs, done."""
    _, act, rew, _, done = data
    last_act, value, known = torch.zeros_like(act), torch.zeros(len(act)).double(), torch.zeros(len(act)).bool()
    for span in ends:
        for i in range(span.start, span.stop):
            if i > span.start:
                last_act[i] = act[i - 1]
            stop = min(i + horizon, span.stop)
            value[i] = rew[i:stop].sum()
            known[i] = stop == i + horizon or done[span.stop - 1] > 0
    return last_act, value, known


@pytest.fixture
def tiny(small, tmp_path):
    """Five episodes of 3 to 12 steps; the second ends, the others are cut."""
    path = tmp_path / "tiny.hdf5"
    with h5py.File(small) as file, h5py.File(path, "w") as part:
        part.attrs.update(file.attrs)
        for name, column in file.items():
            part[name] = column[:40]
        part["terminals"][:], part["timeouts"][:] = False, False
        part["terminals"][9] = True
        part["timeouts"][[5, 12, 24, 39]] = True
    return path


def ensemble(p, name, obs, act):
    """Each of the three networks, one after the other: (N, B, ...) -> (N, B, out)."""
    outs = []
    for k in range(3):
        x = torch.cat([obs[k], act[k]], -1)
        for i in range(3):
            x = x @ p[f"{name}.layers.{i}.weight"][k] + p[f"{name}.layers.{i}.bias"][k]
            x = x.clamp(min=0) if i < 2 else x
        outs.append(p[f"{name}.mean"] + p[f"{name}.std"] * x)
    return torch.stack(outs)


def test_update(tiny, monkeypatch):
    """Eight steps: normalized data, last actions, values that are known or not, scales, three losses, Adam."""
    args = arguments(mbop, tiny, steps=8, horizon=4, batch_size=16, lr=2e-3)
    traced = trace(mbop, monkeypatch, args)
    data, ends = columns(tiny), episodes(tiny)
    obs, act, rew, next_obs, done = data
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    obs, next_obs = (obs - mean) / std, (next_obs - mean) / std
    torch.testing.assert_close(traced.rows, table(obs, act, rew, next_obs, done), rtol=1e-9, atol=1e-9)
    last_act, value, known = index(data, ends, 4)
    assert 0 < known.sum() < 40
    y = torch.cat([next_obs - obs, rew[:, None]], 1)
    net = leaves(traced.start["actor"], *(f"{name}.layers" for name in ("model", "prior", "value")))
    targets = {"model": y, "prior": act, "value": value[:, None]}
    scales = {}
    for name, x in targets.items():
        over = x[known] if name == "value" else x
        scales |= {f"{name}.mean": over.mean(0), f"{name}.std": over.std(0) + 1e-6}
    opt = Adam(net, 2e-3)
    for (_, rows), watched in zip(traced.random, traced.watched, strict=True):
        assert rows.shape == (3, 16) and not torch.equal(rows[0], rows[1])
        losses = {}
        for name, target in targets.items():
            before = act if name == "model" else last_act
            error = (ensemble(net | scales, name, obs[rows], before[rows]) - target[rows]) / scales[f"{name}.std"]
            error = (error**2).mean(2)
            if name == "value":
                losses[name] = sum(error[k][known[rows[k]]].mean() for k in range(3))
            else:
                losses[name] = error.mean(1).sum()
        opt.step(sum(losses.values()))
        assert_same({f"{name}_loss": x for name, x in losses.items()}, watched)
    assert_same(net | scales, traced.end["actor"])


def test_index(tiny):
    data = mbop.load(str(tiny))
    for horizon in (1, 4, 100):
        found = mbop.index(mbop.Args(horizon=horizon), data)
        for ours, theirs in zip(found, index(columns(tiny), episodes(tiny), horizon)):
            torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-4, rtol=1e-5)


class World:
    """A stand-in for the three ensembles: what network k is, is said by its number."""

    def __call__(self, name, obs, act):
        if obs.dim() == 2:
            obs, act = obs.expand(3, *obs.shape), act.expand(3, *act.shape)
        k = torch.arange(1.0, 4).double().view(3, 1, 1)
        if name == "model":
            return torch.cat([0.1 * k * obs + act, k * obs.sum(-1, keepdim=True) - act], -1)
        return 0.3 * k * act + 0.1 * obs[..., :1] if name == "prior" else 2 * k * obs[..., :1] + act


def by_hand(k, obs, act, choose):
    """One candidate of network k: its actions (H, A) and what it returns."""
    world, total, acts = World(), 0, []
    of_k = lambda name, obs, act: world(name, obs[None], act[None])[k, 0]
    for t in range(H):
        act = choose(t, lambda obs=obs, act=act: of_k("prior", obs, act))
        y = of_k("model", obs, act)
        obs, total = obs + y[:-1], total + y[-1]
        acts.append(act)
    return torch.stack(acts), total + world("value", obs[None], act[None])[:, 0, 0].mean()


def test_mppi(monkeypatch):
    """Algorithm 2, one candidate after the other."""
    torch.manual_seed(0)
    args = mbop.Args(horizon=H, candidates=n, sigma=0.3, beta=0.25, kappa=0.7)
    obs, plan, drawn = torch.randn(E, O).double(), torch.rand(E, H, A).double(), []
    randn_like = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn.append(randn_like(x)) or drawn[-1])
    found = mbop.policy(obs, plan, World(), args)
    assert found.shape == (E, H, A) and len(drawn) == H and drawn[0].shape == (3, E * n, A)
    for e in range(E):
        acts, totals = [], []
        for k in range(3):
            for i in range(n):

                def choose(t, prior, k=k, i=i, e=e):
                    noisy = prior() + 0.3 * drawn[t][k, e * n + i]
                    return (0.75 * noisy + 0.25 * plan[e, t]).clamp(-1, 1)

                act, total = by_hand(k, obs[e], plan[e, 0], choose)
                acts.append(act)
                totals.append(total)
        weight = torch.stack(totals).mul(0.7).exp()
        expected = sum(w * act for w, act in zip(weight, acts)) / weight.sum()
        torch.testing.assert_close(found[e], expected)


def test_cem(monkeypatch):
    """Twice: the best tenth of what was drawn, and at least two, say where to draw next."""
    torch.manual_seed(0)
    args = mbop.Args(planner="cem", horizon=H, candidates=7, iterations=2)
    obs, plan, drawn = torch.randn(E, O).double(), torch.rand(E, H, A).double(), []
    randn_like = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn.append(randn_like(x)) or drawn[-1])
    found = mbop.policy(obs, plan, World(), args)
    assert found.shape == (E, H, A) and len(drawn) == 2
    for e in range(E):
        mean, std = torch.cat([plan[e, 1:], torch.zeros(1, A)]), torch.ones(H, A)
        for noise in drawn:
            tried = []
            for k in range(3):
                for i in range(7):
                    act = (mean + std * noise[k, e * 7 + i]).clamp(-1, 1)
                    tried.append(by_hand(k, obs[e], plan[e, 0], lambda t, prior, act=act: act[t]))
            best = torch.stack([act for act, _ in sorted(tried, key=lambda x: -x[1])[:2]])
            mean, std = best.mean(0), best.std(0)
        torch.testing.assert_close(found[e], mean.double())


class Linear:
    """A linear system with quadratic costs, known exactly: x' = x + 0.2 v, v' = v + 0.2 act, cost x^2 + act^2 / 10.
    The prior is a clumsy controller, the value minus the cost-to-go of the best one."""

    step = torch.tensor([[1, 0.2], [0, 1]]).double(), torch.tensor([0, 0.2]).double()

    def __init__(self):
        F, G = self.step
        self.P = torch.zeros(2, 2).double()
        for _ in range(500):  # Riccati's equation
            self.K = (G @ self.P @ F) / (0.1 + G @ self.P @ G)
            self.P = torch.diag(torch.tensor([1, 0.0])).double() + F.T @ self.P @ (F - torch.outer(G, self.K))

    def move(self, obs, act):
        F, G = self.step
        return obs @ F.T + act * G, -(obs[..., :1] ** 2 + 0.1 * act**2)

    def __call__(self, name, obs, act):
        if obs.dim() == 2:
            obs, act = obs.expand(3, *obs.shape), act.expand(3, *act.shape)
        if name == "model":
            next_obs, rew = self.move(obs, act)
            return torch.cat([next_obs - obs, rew], -1)
        if name == "prior":
            return -(obs * torch.tensor([0.6, 0.8])).sum(-1, keepdim=True)
        return -(obs @ self.P * obs).sum(-1, keepdim=True)


def cost(world, act, obs):
    """Of 60 steps, mean over the starts."""
    total = 0
    for _ in range(60):
        obs, rew = world.move(obs, act(obs))
        total = total - rew
    return total.mean().item()


def test_linear_system():
    """Where the best is known, planning makes of a clumsy prior what is within 5 % of it; and cem needs no prior."""
    torch.manual_seed(0)
    world, starts = Linear(), torch.tensor([[0.5, 0.0], [-0.3, 0.4], [0.4, -0.2]]).double()
    best = cost(world, lambda obs: -(obs @ world.K)[:, None], starts)
    prior = cost(world, lambda obs: world("prior", obs, obs[:, :1])[0], starts)
    assert prior > 1.15 * best
    for planner in ("mppi", "cem"):
        args = mbop.Args(planner=planner, horizon=5, candidates=300, sigma=0.3, kappa=30.0, beta=0.0)
        act = lambda obs, plan, args=args: mbop.policy(obs, plan, world, args)
        assert cost(world, mbop.Rollout(args, 1, act), starts) < 1.05 * best, planner


def test_seeds_do_not_leak(small, tmp_path, monkeypatch):
    """The other agent's parameters change nothing for an agent, in training and in what it plans."""
    args, stack = arguments(mbop, small, steps=6, eval_every=6, seeds=2), mbop.stack
    ends = []
    for agent in (None, 0, 1):

        def perturbed(nets, agent=agent):
            for param in nets[1 - agent].parameters() if agent is not None else ():
                param.data *= 1.3
            return stack(nets)

        monkeypatch.setattr(mbop, "stack", perturbed)
        saved = trained(tmp_path, monkeypatch, f"other than {agent}", (mbop.train, args))
        records = sorted((tmp_path / f"other than {agent}").rglob("record-*.json"))
        ends.append((saved["state"]["actor"], [json.loads(path.read_text())["returns"] for path in records]))
    (plain, returns), *others = ends
    for agent, (other, theirs) in enumerate(others):
        for key, value in plain.items():
            if "layers" in key:
                assert [torch.equal(*x) for x in zip(value, other[key])] == [agent == 0, agent == 1]
        assert theirs[agent] == returns[agent] and theirs[1 - agent] != returns[1 - agent]


def test_rollout():
    """Plans go on from each other, from one of zeros; the first action of each is done."""
    asked = []

    def act(obs, plan):
        asked.append(plan)
        return plan + 1 + torch.arange(3.0).view(3, 1)

    rollout = mbop.Rollout(mbop.Args(horizon=3), 2, act)
    first, second = rollout(torch.zeros(4, 5)), rollout(torch.zeros(4, 5))
    assert torch.equal(first, torch.ones(4, 2)) and torch.equal(second, torch.full((4, 2), 2.0))
    assert asked[0].shape == (4, 3, 2) and not asked[0].any() and asked[1][0, 2, 0] == 3


@pytest.mark.parametrize("planner", ["mppi", "cem"])
def test_checkpoint_acts_alike(planner, small, tmp_path):
    """Read back, it plans as it did at the run's end."""
    args = arguments(mbop, small, steps=20, planner=planner, horizon=3, kappa=2.0, seed=3, candidates=7)
    mbop.train(args)
    (record,) = (tmp_path / "runs").rglob("record-*.json")
    _, _, data, policy = load_agent(checkpoint_of(tmp_path))
    returns = data.evaluate(policy, args.eval_episodes, args.seed)
    assert returns.tolist() == pytest.approx(json.loads(record.read_text())["returns"], rel=1e-4)


def test_least(small, tmp_path):
    """A plan of one step, one candidate of each network, one iteration."""
    mbop.train(arguments(mbop, small, steps=1, horizon=1, candidates=1, iterations=1, planner="cem"))
    assert checkpoint_of(tmp_path).exists()


def test_bad_input(tiny):
    for changes in ({"horizon": 0}, {"candidates": 0}, {"iterations": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            mbop.train(mbop.Args(**changes))
    with h5py.File(tiny, "r+") as file:
        file["terminals"][9], file["timeouts"][9] = False, True
    with pytest.raises(UserError, match="No episode of .* has 100 steps: lower --horizon"):
        mbop.train(arguments(mbop, tiny, horizon=100))
