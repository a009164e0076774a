"""FQL's flow on a mixture, and its whole update against Eq. 1 to 9 of its paper (Park, Li & Levine 2025)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_scripts import arguments
from update import Adam, assert_same, columns, leaves, polyak, table, trace

from algorithms import fql
from datasets import Dataset, find_task


def gelu(x):
    """The approximation of Hendrycks & Gimpel 2016."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def net(params, *inputs):
    """A network of GELUs, weights (out, in) and biases (out,) in their order."""
    x, params = torch.cat(inputs, -1), list(params.values())
    for i in range(0, len(params), 2):
        x = x @ params[i].T + params[i + 1]
        x = gelu(x) if i + 2 < len(params) else x
    return x


def q_values(params, *inputs):
    """Both Q-functions, weights (2, in, out), each hidden layer normalized behind its GELU: (2, B)."""
    values, params = [], list(params.values())
    for n in range(2):
        x = torch.cat(inputs, -1)
        for i in range(0, len(params), 2):
            x = x @ params[i][n] + params[i + 1][n]
            if i + 2 < len(params):
                x = gelu(x)
                x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        values.append(x[:, 0])
    return torch.stack(values)


MODES = [dict(alpha=7.0, normalize_q=False, agg="mean"), dict(alpha=0.6, normalize_q=True, agg="min")]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_update(mode, small, monkeypatch):
    """Five steps with other values than the defaults, on rewards that a task shifts."""
    changes = dict(width=24, flow_steps=4, gamma=0.9, tau=0.1, lr=1e-3) | mode
    args = arguments(fql, small, steps=5, batch_size=16, **changes)
    traced = trace(fql, monkeypatch, args, task={"rew_shift": -1.0})
    obs, act, rew, next_obs, done = columns(small)
    torch.testing.assert_close(traced.rows, table(obs, act, rew - 1, next_obs, done), rtol=1e-9, atol=1e-9)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "flow", "critic", "critic_target")}
    actor, flow, critic, critic_target = nets.values()
    assert_same(critic, critic_target)
    for params in nets.values():  # four hidden layers of 24
        assert len(params) == 10 and all(24 in list(params.values())[2 * i].shape[-2:] for i in range(5))
    opts = [Adam(params, 1e-3) for params in (actor, flow, critic)]
    draws = (x for _, x in traced.random)
    for (obs, act, rew, next_obs, done), watched in zip(traced.batches, traced.watched):
        x_0, t, next_noise, noise = (next(draws) for _ in range(4))
        assert x_0.shape == noise.shape == (16, 3) and t.shape == (16, 1) and 0 <= t.min() <= t.max() < 1
        flow_loss = ((net(flow, obs, (1 - t) * x_0 + t * act, t) - (act - x_0)) ** 2).mean()  # (Eq. 5)

        next_q = q_values(critic_target, next_obs, net(actor, next_obs, next_noise).clamp(-1, 1))
        next_q = next_q.mean(0) if mode["agg"] == "mean" else next_q.min(0).values
        target = (rew + 0.9 * (1 - done) * next_q).detach()
        critic_loss = ((q_values(critic, obs, act) - target) ** 2).mean(1).sum()  # (Eq. 1)

        carried = noise
        for k in range(4):
            carried = carried + net(flow, obs, carried, torch.full((16, 1), k / 4)) / 4
        pi = net(actor, obs, noise)
        q = q_values(critic, obs, pi.clamp(-1, 1)).mean(0)
        distilled = ((pi - carried.clamp(-1, 1).detach()) ** 2).mean()  # (Eq. 7)
        size = q.abs().mean().item() if mode["normalize_q"] else 1
        actor_loss = mode["alpha"] * distilled - q.mean() / size  # (Eq. 9)
        losses = actor_loss, flow_loss, critic_loss
        for opt, loss in zip(opts, losses):
            opt.step(loss)
        polyak(critic_target, critic, 0.1)
        assert_same(dict(zip(("actor_loss", "flow_loss", "critic_loss"), losses)), watched)
    assert next(draws, None) is None and len(traced.batches) == 5
    for name, params in nets.items():
        assert_same(params, traced.end[name], name)


def test_tuned():
    """README of the authors' code: AntMaze and Adroit, offline; elsewhere Q is divided by its size."""
    tuned = lambda name: {
        key: value for part in ("", name.split("-")[0], name) for key, value in fql.TUNED.get(part, {}).items()
    }
    alphas = {"antmaze-umaze": 10, "antmaze-large-play": 3, "pen-human": 1e4, "pen-expert": 3e3, "door-cloned": 3e4}
    alphas |= {"hammer-human": 3e4, "hammer-cloned": 1e4, "relocate-human": 1e4, "relocate-cloned": 3e4}
    for name, alpha in alphas.items():
        assert find_task(name) and tuned(name)["alpha"] == alpha and not tuned(name)["normalize_q"]
        assert tuned(name)["agg"] == ("mean" if name.startswith("antmaze") else "min")
    assert tuned("hopper-medium")["normalize_q"]


def test_flow_of_a_mixture():
    """A flow clones data of two modes: its samples are as near to fresh ones of the mixture, in energy distance, as
    those are to one another, to a factor of two, and few lie between the modes."""
    torch.manual_seed(0)
    draw = lambda n: 0.6 * (2 * torch.randint(2, (n, 1)) - 1) + 0.15 * torch.randn(n, 2)
    net, steps = fql.gelu_mlp(4, 64, 64, 2), 1500
    opt = torch.optim.Adam(net.parameters())
    data = Dataset(find_task("hopper-medium"), "", "", torch.zeros(1, 6), [1], 1, 2)
    for step in range(steps):
        batch = data.split(torch.cat([torch.zeros(256, 1), draw(256), torch.zeros(256, 3)], 1))
        opt.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        opt.zero_grad()
        fql.flow_loss(batch, net).backward()
        opt.step()
    make = lambda n: fql.flow_act(fql.Args(flow_steps=20), torch.zeros(n, 1), torch.randn(n, 2), net)

    def energy(one, other, n=200, times=20):
        distance = lambda x, y: np.linalg.norm(x.numpy()[:, None] - y.numpy()[None], axis=2).mean()
        pairs = [(one(n), other(n)) for _ in range(times)]
        return np.mean([2 * distance(x, y) - distance(x, x) - distance(y, y) for x, y in pairs])

    assert energy(make, draw) < 2 * energy(draw, draw)
    between = lambda x: (x.abs().min(1).values < 0.2).float().mean().item()
    assert between(make(2000)) < 0.06 < between(torch.randn(2000, 2))


def test_agents_draw_their_own_noise():
    """Of two agents with the same networks the actions differ; clipped to what an environment takes."""
    torch.manual_seed(0)
    actors = [fql.Actor(3, 2, 8) for _ in range(2)]
    actors[1].load_state_dict(actors[0].state_dict())
    act = fql.lift(2, fql.policy, fql.stack(actors))(torch.zeros(2, 500, 3))
    assert act.shape == (2, 500, 2) and not torch.equal(act[0], act[1]) and act.abs().max() <= 1
    assert F.mse_loss(act[0].mean(0), act[1].mean(0)) < 0.01
