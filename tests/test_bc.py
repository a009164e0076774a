"""BC's whole update: supervised learning of the actions, and which pairs of the data it learns from."""

import numpy as np
import pytest
import torch
from test_scripts import arguments
from update import Adam, assert_same, columns, episodes, leaves, mlp, table, trace

from algorithms import bc
from datasets import UserError


def test_update(small, monkeypatch):
    traced = trace(bc, monkeypatch, arguments(bc, small, steps=8, batch_size=16, lr=1e-3))
    assert_rows(traced.rows, small, np.arange(len(columns(small)[0])))
    actor = leaves(traced.start["actor"])
    opt = Adam(actor, 1e-3)
    assert len(traced.batches) == 8 and not traced.random
    for batch in traced.batches:
        assert batch.obs.shape == (16, 11)
        opt.step(((mlp(actor, batch.obs).tanh() - batch.act) ** 2).mean())
    assert_same(actor, traced.end["actor"])


@pytest.mark.parametrize("changes", [dict(top_fraction=0.3), dict(demos=1), dict(top_fraction=0.6, demos=2)])
def test_pairs(changes, small, monkeypatch):
    """The best trajectories by return, the best first; of those, demonstrations drawn by the seed, thinned out."""
    traced = trace(bc, monkeypatch, arguments(bc, small, steps=1, seed=5, every=7, **changes))
    rew = columns(small)[2]
    spans = [np.arange(len(rew))[span] for span in episodes(small)]
    if fraction := changes.get("top_fraction"):
        spans.sort(key=lambda span: -rew[span].sum())
        spans = spans[: int(fraction * len(spans))]
    if demos := changes.get("demos"):
        rng = np.random.default_rng(5)
        spans = [spans[i] for i in rng.choice(len(spans), demos, replace=False)]
        spans = [span[rng.integers(min(7, len(span))) :: 7] for span in spans]
    assert_rows(traced.rows, small, np.concatenate(spans))


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_bad_fraction(fraction, small):
    with pytest.raises(UserError, match=rf"--top-fraction must lie in \(0, 1\], not {fraction}"):
        bc.train(arguments(bc, small, steps=1, top_fraction=fraction))


def assert_rows(rows, path, kept):
    """The data are these rows of the file, (obs - mean) / (std + 1e-3) of these rows."""
    obs, act, rew, next_obs, done = (column[kept] for column in columns(path))
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    expected = table((obs - mean) / std, act, rew, (next_obs - mean) / std, done)
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-9)
