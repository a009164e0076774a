import dataclasses

import numpy as np
import pytest
import torch
from ensembles import CHANGES, assert_model_learned, fitted, gaussians, shuffled, soft_actor_critic, split
from test_scripts import arguments
from update import assert_same, columns, table, trace

from algorithms import morel
from datasets import Dataset, UserError

N, B, O, A = 7, 6, 4, 2


def apart(mean):
    """The largest distance between two networks' next observations, of any: (N, B, O + 1) -> (B,)."""
    found = torch.zeros(mean.shape[1]).double()
    for one in mean:
        for other in mean:
            found = torch.maximum(found, ((one - other)[:, :-1] ** 2).sum(1).sqrt())
    return found


@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_disagreement(n):
    """Over all pairs, however many networks; the reward does not count."""
    torch.manual_seed(n)
    mean = torch.randn(n, B, O + 1).double()
    torch.testing.assert_close(morel.disagreement(mean), apart(mean))
    mean[0, :, -1] += 1e6
    torch.testing.assert_close(morel.disagreement(mean), apart(mean))


def test_imagine(monkeypatch):
    """What is known is the model's; what is not ends, with the reward of HALT."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    obs, act, bound, halt = torch.randn(B, O), torch.rand(B, A), torch.full((O,), 1.5), torch.tensor(-70.0)
    mean, log_std, elites = torch.randn(N, B, O + 1), torch.randn(N, B, O + 1), torch.tensor([6, 1, 4, 2, 3])
    threshold = apart(mean.double()).median().float()
    policy, dynamics, ended = (lambda x: (act, None)), (lambda *x: (mean, log_std)), lambda x: x[:, 0] > 1
    seen = set()
    for _ in range(50):
        rows = morel.imagine(ended, bound, halt, obs, elites, threshold, policy, dynamics)
        batch = Dataset(None, "", "", rows, [], O, A).split(rows)
        assert torch.equal(batch.obs, obs) and torch.equal(batch.act, act)
        unknown = apart(mean.double()) > threshold
        assert 0 < unknown.sum() < B
        assert torch.equal(batch.done, (unknown | (batch.next_obs[:, 0] > 1)).float())
        assert torch.equal(batch.rew == halt, unknown)
        for b in range(B):
            y = (mean + log_std.exp())[:, b]  # (N, O + 1)
            distance = ((obs[b] + y[:, :O]).clamp(-1.5, 1.5) - batch.next_obs[b]).abs().amax(1)
            drawn = min(elites.tolist(), key=lambda i: distance[i])
            assert distance[drawn] < 1e-5
            if not unknown[b]:
                seen.add(drawn)
                assert any(distance[i] < 1e-5 and abs(y[i, O] - batch.rew[b]) < 1e-5 for i in elites)
    assert seen == set(elites.tolist())


@pytest.mark.parametrize("coef", [1.0, 1.1])
def test_update(coef, small, tmp_path, monkeypatch):
    """The fit, the threshold of the data's largest disagreement, rollouts that halt, SAC."""
    monkeypatch.setattr(morel, "PATIENCE", 1)
    args = arguments(morel, shuffled(small, tmp_path / "tiny.hdf5"), **CHANGES, batch_size=36)
    args = dataclasses.replace(args, coef=coef, kappa=3.0, model_lr=6e-4, model_updates=7)
    traced = trace(morel, monkeypatch, args)
    start, end, draws, batches = traced.start, traced.end, (x for _, x in traced.random), iter(traced.batches)

    rows = table(*columns(tmp_path / "tiny.hdf5"))
    assert_same(traced.rows, rows)
    fit, _ = fitted(start, rows, draws, args.seed, 36, 6e-4, 7)
    threshold = apart(gaussians(fit["dynamics"], *split(rows)[:2])[0]).max() / coef
    assert end["threshold"].item() == pytest.approx(threshold.item(), rel=1e-9)
    halt, shares = rows[:, 14].min() - 3, []

    def settle(mean, std, rew):
        unknown = apart(mean) > threshold
        shares.append(unknown.double().mean().item())
        return torch.where(unknown, halt, rew), unknown

    learned = soft_actor_critic(args, start, fit, rows, draws, batches, settle)
    assert_same(learned, {name: end[name] for name in learned})
    assert_model_learned(fit, end)
    assert 0 < np.mean(shares) < 1
    assert end["halted"].item() == pytest.approx(np.mean(shares[-3:]))
    assert [group["lr"] for group in end["adam_opt"]["param_groups"]] == [0, 2**-10, 1e-3]


def test_data_must_be_known(small):
    args = arguments(morel, small, steps=10, coef=1000.0)
    with pytest.raises(UserError, match="of the data themselves would be unknown: lower --coef"):
        morel.train(args)
