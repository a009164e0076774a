"""The study of learning in context: what it reads of a checkpoint, and that it can say no."""

import numpy as np
import pytest
from test_scripts import checkpoint_of

from algorithms import ad
from datasets import dark_room
from results.studies import common
from results.studies import in_context as study


def test_returns(tmp_path, monkeypatch):
    """Of a checkpoint of another context than the default: a mean of each episode, of tasks held out and of others."""
    monkeypatch.setattr(dark_room.SmallDarkRoom, "episodes", 50)
    monkeypatch.setattr(study, "EPISODES", 3)
    ad.train(ad.Args(steps=1, eval_every=1, eval_episodes=1, context=2, device="cpu"))
    asked, learn = [], ad.learn_in_context

    def watch(world, episodes, context, actor):
        asked.append((sorted(set(world.tasks.tolist())), context))
        return learn(world, episodes, context, actor)

    monkeypatch.setattr(ad, "learn_in_context", watch)
    found = study.returns(checkpoint_of(tmp_path))
    tasks, held_out = (sorted(set(some.tolist())) for some in dark_room.split(dark_room.SmallDarkRoom))
    assert asked == [(held_out, 20), (tasks, 20)]
    assert all(len(found[name]) == 3 and np.isfinite(found[name]).all() for name in ("held_out", "trained"))


def test_source_returns():
    """Every episode, not only those that are kept; the bandit's first pulls pay as any arm does, its last more."""
    room, bandit = study.source_returns("dark-room-5"), study.source_returns("bandit")
    assert (len(room), len(bandit)) == (300, 100)
    assert np.mean(room[:10]) < 1 and np.mean(room[-10:]) > 7.5
    assert np.mean(bandit[:10]) < 0.5 and np.mean(bandit[-10:]) > 0.65


@pytest.mark.parametrize("so", [True, False])
def test_findings(so, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "STUDIES", tmp_path)
    rising, flat = np.linspace(0.5, 8, 100), np.full(100, 0.5)
    runs = lambda curve: [{"held_out": (curve + s).tolist(), "trained": curve.tolist()} for s in (-0.01, 0, 0.01)]
    sources = {"dark-room-5": np.linspace(0, 8, 300).tolist(), "bandit": np.full(100, 0.7).tolist()}
    cells = {
        "dark-room-5 source": runs(rising if so else flat),
        "dark-room-5 expert": runs(flat if so else rising),
        "bandit source": runs(np.full(100, 0.68 if so else 0.5)),
    }
    common.keep(study.STUDY, cells=cells, sources=sources, best_arm=0.85)
    sentences = study.findings()
    assert len(sentences) == 3
    assert all(("Not so" not in sentence) == so for sentence in sentences)
    study.draw()
    assert (tmp_path / "in_context.png").stat().st_size > 10_000
