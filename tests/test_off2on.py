"""Off2On's two phases against its paper (Lee et al. 2021): CQL by member, then one agent of them all, whose replay goes
by priorities."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_cql import q_values
from test_scripts import arguments, checkpoint_of
from torch.func import functional_call
from update import Adam, World, are_rows_of, assert_same, columns, kept, leaves, mlp, part, polyak, table, trace

from algorithms import cql, off2on
from datasets import Batch, UserError, load

VALUES = dict(batch_size=16, n_actions=3, critic_layers=1, alpha=2.5, gap_min=-1e9, threshold=-1.0, seed=3, lr=2e-4)
VALUES |= dict(actor_lr=2e-3, gamma=0.9, tau=0.1, rew_scale=1.7, rew_shift=-0.4, members=2, heat=3.0, start_steps=8)
VALUES |= dict(offline_steps=4, steps=24, online_share=0.25, normalize=True)
MODES = [
    dict(buffer_size=9, threshold=0.5, max_target=True),
    dict(buffer_size=100, gap_min=4.3, normalize=False),
]


def plain_lift(members, function, *nets):
    """One member after the other."""

    def call(*inputs):
        found = []
        for k in range(members):
            params = [{name: p[k] for name, p in net.named_parameters()} for net in nets]
            calls = [lambda *x, net=net, p=p: functional_call(net, p, x) for net, p in zip(nets, params)]
            own = [Batch(*(column[k] for column in x)) if isinstance(x, Batch) else x[k] for x in inputs]
            found.append(function(*own, *calls))
        return tuple(map(torch.stack, zip(*found)))

    return call


def normal(mean, std):
    return torch.distributions.Normal(mean, std)


def squashed(mean, std, noise):
    u = mean + std * noise
    return u.tanh(), (normal(mean, std).log_prob(u) - (1 - u.tanh() ** 2).log()).sum(-1)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_update(mode, small, monkeypatch):
    """Four steps on the data, eight that act, sixteen that act and learn, with other values than the defaults."""
    monkeypatch.setattr(off2on, "lift", plain_lift)
    args = arguments(off2on, small, **VALUES | mode)
    traced = trace(off2on, monkeypatch, args, task={"max_episode_steps": 10})

    obs, act, rew, next_obs, done = columns(small)
    mean, std = (obs.mean(0), obs.std(0) + 1e-3) if args.normalize else (0, 1)
    data = table((obs - mean) / std, act, 1.7 * rew - 0.4, (next_obs - mean) / std, done)
    N = len(data)
    torch.testing.assert_close(traced.rows[:N], data, rtol=1e-9, atol=1e-9)
    data = traced.rows[:N]

    whole = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target")}
    members = [{name: {key: x[k] for key, x in net.items()} for name, net in whole.items()} for k in range(2)]
    members = [
        {name: {k: x.detach().clone().requires_grad_() for k, x in n.items()} for name, n in m.items()} for m in members
    ]
    assert not torch.equal(*(member["actor"]["net.0.weight"] for member in members))
    weight = leaves(traced.start["weight"])
    assert weight["4.bias"].item() == 1 and [len(x) for x in weight.values()] == [256] * 4 + [1] * 2
    log_temperature = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    log_alpha = [torch.tensor(math.log(2.5), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    opts = [
        [Adam(member["critic"], 2e-4), Adam({"": alpha}, 2e-4), Adam(member["actor"], 2e-3), Adam({"": temp}, 2e-3)]
        for member, alpha, temp in zip(members, log_alpha, log_temperature)
    ]
    draws, batches = (x for _, x in traced.random), iter(traced.batches)
    for step in range(1, 5):
        batch, found = next(batches), {"critic_loss": 0, "actor_loss": 0}
        assert batch.obs.shape == (2, 16, 11)
        for k, member in enumerate(members):
            obs, act, rew, next_obs, done = own = part(batch, k)
            assert are_rows_of(own, data)
            noise, next_noise = next(draws).split(16, 1)
            (pi, log_prob), (next_pi, next_log_prob) = (
                squashed((out := mlp(member["actor"], x).chunk(2, 1))[0], out[1].exp(), e)
                for x, e in ((obs, noise), (next_obs, next_noise))
            )
            tried = 3 if args.max_target else 1
            next_q = q_values(member["critic_target"], next_obs, next_pi[:tried]).min(0).values.max(0).values
            target = (rew + 0.9 * (1 - done) * next_q).detach()
            q = q_values(member["critic"], obs, act[None])[:, 0]
            uniform_q, pi_q, next_pi_q = (
                q_values(member["critic"], obs, x.detach()) for x in (2 * next(draws) - 1, pi, next_pi)
            )
            terms = uniform_q.exp() * 2**3, (pi_q - log_prob.detach()).exp(), (next_pi_q - next_log_prob.detach()).exp()
            gap = (sum(terms).sum(1).log() - q).clamp(min=args.gap_min).mean(1)
            loss = (log_alpha[k].exp().item() * gap + ((q - target) ** 2).mean(1)).sum()
            opts[k][0].step(loss)
            found["critic_loss"] += loss
            if args.threshold >= 0:
                opts[k][1].step(-log_alpha[k].exp() * (gap.mean().item() - args.threshold))
        for k, member in enumerate(members):
            own = part(batch, k)
            out = mlp(member["actor"], own.obs).chunk(2, 1)
            pi, log_prob = squashed(out[0], out[1].exp(), next(draws))
            value = q_values(member["critic"], own.obs, pi).min(0).values
            loss = (log_temperature[k].exp().item() * log_prob - value).mean()
            opts[k][2].step(loss)
            found["actor_loss"] += loss
            opts[k][3].step(-log_temperature[k] * (log_prob.mean().item() - 3))
            polyak(member["critic_target"], member["critic"], 0.1)
        assert_same(found, traced.watched[step - 1], f"step {step}")

    def together(obs):
        """The mixture's mean and standard deviation: its second moment less the square of its first."""
        outs = [mlp(member["actor"], obs).chunk(2, 1) for member in members]
        first = sum(m for m, _ in outs) / 2
        return first, (sum(m**2 + s.exp() ** 2 for m, s in outs) / 2 - first**2).sqrt()

    world = World(
        dataclasses.replace(load(str(small)).task, max_episode_steps=10), 3, mean, std, lambda r: 1.7 * r - 0.4
    )
    temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    critic_opts, actor_opts = ([Adam(member[name], 2e-4) for member in members] for name in ("critic", "actor"))
    weight_opt, temperature_opt = Adam(weight, 2e-4), Adam({"": temperature}, 2e-4)
    priority = torch.ones(N + args.buffer_size, dtype=torch.float64)
    w = lambda obs, act: mlp(weight, torch.cat([obs, act], 1))[:, 0].clamp(min=0)
    seen_new = 0
    for step in range(5, 29):
        world.act(squashed(*together(world.look(step)), next(draws)[0])[0].detach())
        new = kept(world.rows, args.buffer_size)
        priority[N + (len(world.rows) - 1) % args.buffer_size] = N * (0.25 / 0.75) / 8
        if step <= 12:
            assert traced.watched[step - 1] == {"critic_loss": 0}
            continue
        both = next(batches)
        assert are_rows_of(part(both, slice(16)), data) and are_rows_of(part(both, slice(16, 32)), new)
        now = w(both.obs, both.act)
        of_data, of_new = 2 / (now[:16] + 1), 2 * now[16:] / (now[16:] + 1)
        weight_loss = -(of_data + 1e-10).log().mean() - (of_new + 1e-10).log().mean()  # with the authors' guard
        sums = np.cumsum(priority[: N + len(new)].numpy())
        rows = np.searchsorted(sums, (np.arange(16) + next(draws).numpy()) / 16 * sums[-1])
        seen_new += (rows >= N).sum()
        obs, act, rew, next_obs, done = torch.cat([data, new])[rows].split([11, 3, 1, 11, 1], 1)
        rew, done = rew[:, 0], done[:, 0]
        assert (now[:16] > 0).any()
        heated = w(obs, act) ** (1 / 3) / ((now[:16] ** (1 / 3)).mean() + 1e-10)
        priority[rows] = heated.clamp(1e-3, 1e3).detach()
        weight_opt.step(weight_loss)

        next_act, next_log_prob = squashed(*together(next_obs), next(draws)[0])
        alpha, losses = temperature.exp().item(), []
        for member in members:
            next_q = q_values(member["critic_target"], next_obs, next_act[None])[:, 0].min(0).values
            target = (rew + 0.9 * (1 - done) * (next_q - alpha * next_log_prob)).detach()
            losses.append(((q_values(member["critic"], obs, act[None])[:, 0] - target) ** 2).mean(1).sum())
        for opt, loss in zip(critic_opts, losses):
            opt.step(loss)
        pi, log_prob = squashed(*together(obs), next(draws)[0])
        value = sum(q_values(member["critic"], obs, pi[None])[:, 0].min(0).values for member in members) / 2
        actor_loss = (alpha * log_prob - value).mean()
        grads = [torch.autograd.grad(actor_loss, list(m["actor"].values()), retain_graph=True) for m in members]
        for opt, grad in zip(actor_opts, grads):  # of both before either steps
            opt.step(sum((g * x).sum() for g, x in zip(grad, opt.params.values())))
        temperature_opt.step(-temperature * (log_prob.mean().item() - 3))
        for member in members:
            polyak(member["critic_target"], member["critic"], 0.1)
        expected = {"critic_loss": sum(losses), "actor_loss": actor_loss, "weight_loss": weight_loss}
        assert_same(expected, traced.watched[step - 1], f"step {step}")
    assert next(draws, None) is None and next(batches, None) is None and 0 < seen_new < 16 * 16
    for name in whole:
        for k, member in enumerate(members):
            assert_same(member[name], {key: x[k] for key, x in traced.end[name].items()}, name)
    ends = {"weight": weight, "log_temperature": torch.stack(log_temperature), "log_alpha": torch.stack(log_alpha)}
    for name, params in (ends | {"online_log_temperature": temperature}).items():
        assert_same(params, traced.end[name], name)
    assert_same(traced.end["priority"], priority, "priority")
    torch.testing.assert_close(traced.end["buffer"]["rows"], kept(world.rows, args.buffer_size), rtol=1e-9, atol=1e-9)


def test_draw():
    """In proportion to the priorities, and stratified: never further than one from the expected number."""
    torch.manual_seed(0)
    priority = torch.tensor([1.0, 0.0, 5.0, 2.0])
    counts = torch.bincount(off2on.draw(priority, 800), minlength=4)
    assert (counts - 100 * priority).abs().max() <= 1 and counts[1] == 0


def test_starts_from_several(small, tmp_path, monkeypatch):
    """Of cql.py --seeds 2, all that the members are; a checkpoint of one is refused, and so is an ensemble of one."""
    shared = dict(batch_size=16, n_actions=2, critic_layers=1)
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "a"))
    paths = []
    for seeds in (1, 2):
        monkeypatch.setenv("RUNS_DIR", str(tmp_path / str(seeds) / "runs"))
        cql.train(dataclasses.replace(arguments(cql, small, steps=4, seeds=seeds), threshold=None, **shared))
        paths.append(checkpoint_of(tmp_path / str(seeds)))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "online" / "runs"))
    start = lambda **changes: off2on.train(arguments(off2on, small, steps=10, **shared, **changes))
    with pytest.raises(UserError, match="is of --seeds 1; what is wanted is one of cql.py --seeds 2"):
        start(checkpoint=str(paths[0]))
    with pytest.raises(UserError, match="--members must be at least 2"):
        start(members=1)
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match=rf"--online-share must lie in \(0, 1\), not {share}\."):
            start(online_share=share)
    start(checkpoint=str(paths[1]))  # ten steps that act, and no update yet
    theirs, ours = (torch.load(path)["state"] for path in (paths[1], checkpoint_of(tmp_path / "online")))
    for name in ("actor", "critic", "critic_target"):
        assert_same(ours[name], theirs[name], name, rtol=0, atol=0)
