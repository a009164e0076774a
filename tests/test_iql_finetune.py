"""IQL's two phases against section 5.2 of its paper: the losses are Eq. 5 to 7 in both, and act as `update` says."""

import pytest
import torch
from test_scripts import arguments
from update import (
    Adam,
    World,
    are_rows_of,
    assert_same,
    columns,
    episodes,
    kept,
    leaves,
    mlp,
    part,
    polyak,
    q_values,
    table,
    trace,
)

from algorithms import iql, iql_finetune
from datasets import UserError, load


@pytest.mark.parametrize(
    "name, share, size",
    [("hopper-medium", 0.25, 100), ("antmaze-umaze", None, 9)],
)
def test_update(name, share, size, small, monkeypatch):
    """Five steps on the data and twenty-five that act, of several episodes, with other values than the defaults. Only
    locomotion's rewards are scaled, and new ones are as those of the data. The updates of both phases are one."""
    drop = lambda x, p: x * (torch.rand_like(x) >= p) / (1 - p) if p else x  # torch's own draws unseen
    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    changes = dict(lr=2e-4, gamma=0.9, tau=0.1, expectile=0.75, beta=100.0, dropout=0.3, seed=3, buffer_size=size)
    args = arguments(
        iql_finetune, small, steps=25, batch_size=16, offline_share=share, **changes | {"offline_steps": 5}
    )
    traced = trace(iql_finetune, monkeypatch, args, task={"name": name, "rew_shift": -2.0})

    obs, act, rew, next_obs, done = columns(small)
    mean, std, scale = obs.mean(0), obs.std(0) + 1e-3, 1
    if name == "hopper-medium":
        returns = [rew[span].sum().item() for span in episodes(small)]
        scale = 1000 / (max(returns) - min(returns))
    data = table((obs - mean) / std, act, scale * rew - 2, (next_obs - mean) / std, done)
    torch.testing.assert_close(traced.rows[: len(data)], data, rtol=1e-9, atol=1e-9)
    assert len(traced.rows) == len(data) + min(size, 25)

    nets = {name: leaves(traced.start[name]) for name in ("actor", "critic", "critic_target", "value")}
    actor, critic, critic_target, value = nets.values()
    assert_same(critic, critic_target)
    assert [len(x) for x in value.values()] == [256] * 4 + [1] * 2
    log_std, mean_params = actor["log_std"], {key: x for key, x in actor.items() if key != "log_std"}
    opts = Adam(actor, 2e-4), Adam(critic, 2e-4), Adam(value, 2e-4)
    world = World(load(str(small)).task, 3, mean, std, lambda rew: scale * rew - 2)
    assert len(traced.batches) == 30
    draws, bounded, ends = (noise for _, noise in traced.random), [], 0
    for step, batch in enumerate(traced.batches, 1):
        assert batch.obs.shape == (16, 11)
        if step > 5:
            seen = world.look(step)
            world.act((mlp(mean_params, seen).tanh() + log_std.exp() * next(draws)).clamp(-1, 1).detach())
            ends += world.over
            new = kept(world.rows, size)
            if share is None:
                assert are_rows_of(batch, torch.cat([data, new]))
            else:
                assert are_rows_of(part(batch, slice(4)), data) and are_rows_of(part(batch, slice(4, 16)), new)
        else:
            assert are_rows_of(batch, data)
        u = q_values(critic_target, batch.obs, batch.act).min(0).values.detach() - mlp(value, batch.obs)[:, 0]
        value_loss = (torch.where(u > 0, 0.75, 0.25) * u**2).mean()  # (Eq. 5)
        target = (batch.rew + 0.9 * (1 - batch.done) * mlp(value, batch.next_obs)[:, 0]).detach()
        critic_loss = ((q_values(critic, batch.obs, batch.act) - target) ** 2).mean(1).sum()  # (Eq. 6)
        pi = mlp(mean_params, batch.obs, hidden=lambda x: torch.where(next(draws) < 0.3, 0.0, x / 0.7)).tanh()
        log_pi = torch.distributions.Normal(pi, log_std.exp()).log_prob(batch.act).sum(1)
        weight = (100 * u.detach()).exp()
        bounded += (weight > 100).tolist()
        actor_loss = -(weight.clamp(max=100) * log_pi).mean()  # (Eq. 7)
        for opt, loss in zip(opts, (actor_loss, critic_loss, value_loss)):
            opt.step(loss)
        polyak(critic_target, critic, 0.1)
        losses = {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}
        assert_same(losses, traced.watched[step - 1], f"step {step}")
    assert any(bounded) and not all(bounded) and next(draws, None) is None and ends
    for key, params in nets.items():
        assert_same(params, traced.end[key], key)
    torch.testing.assert_close(traced.end["buffer"]["rows"], kept(world.rows, size), rtol=1e-5, atol=1e-5)


def test_losses_are_iqls(small):
    """On equal batches and networks, to the bit."""
    batch = load(str(small)).sample(32)
    args = arguments(iql, small, expectile=0.8, beta=2.0, dropout=0.0)
    torch.manual_seed(0)
    nets = iql.Actor(11, 3), iql.Critic(11, 3), iql.mlp(11, 256, 256, 1), iql.Critic(11, 3)
    theirs, ours = iql.losses(args, batch, *nets), iql_finetune.losses(args, batch, *nets)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_bad_arguments(small):
    with pytest.raises(UserError, match=r"--expectile must lie in \(0, 1\), not 1.0"):
        iql_finetune.train(arguments(iql_finetune, small, expectile=1.0))
    with pytest.raises(UserError, match=r"--expectile must lie in \(0, 1\), not 0.0"):
        iql_finetune.train(arguments(iql_finetune, small, expectile=0.0))
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"--offline-share must lie in \[0, 1\), not "):
            iql_finetune.train(arguments(iql_finetune, small, offline_share=share))
