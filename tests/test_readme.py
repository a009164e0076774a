"""What README.md says to the one who copies a file works."""

import shutil

import numpy as np
import torch
from conftest import ROOT, start
from test_scripts import arguments

from algorithms import iql, td3_bc


def test_what_to_bring_along(small, tmp_path):
    """A script, datasets/, results/run.py and results/checkpoint.py, elsewhere and alone, train."""
    (tmp_path / "mine" / "results").mkdir(parents=True)
    for path in ("algorithms/bc.py", "results/run.py", "results/checkpoint.py"):
        (tmp_path / "mine" / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / "mine" / path)
    shutil.copytree(ROOT / "datasets", tmp_path / "mine" / "datasets", ignore=shutil.ignore_patterns("policies"))
    words = ["algorithms/bc.py", "--env", small, "--steps", 10, "--eval-episodes", 1]
    out, err = start(*words, cwd=tmp_path / "mine").communicate(timeout=120)
    assert "bc on hopper-medium (source collected, 10 steps): normalized score" in out, err


def test_stand_in(small, monkeypatch, capsys):
    """README's class Run in the place of ours: 20 updates make the same networks, whatever TUNED fills in."""
    code = (ROOT / "README.md").read_text().split("```python\nclass Run")[1].split("```")[0]
    names = {"torch": torch}
    exec("class Run" + code, names)
    for script in (td3_bc, iql):
        make, actors = script.Actor, []

        def kept(*sizes, make=make, actors=actors):
            actors.append(make(*sizes))
            return actors[-1]

        monkeypatch.setattr(script, "Actor", kept)
        args = arguments(script, small, steps=20, device="cpu")
        with monkeypatch.context() as patch:
            patch.setattr(script, "Run", names["Run"])
            script.train(args)
        out = capsys.readouterr().out
        assert f"{args.steps} {{" in out and "return" in out and "nan" not in out
        script.train(arguments(script, small, steps=20))
        theirs, ours = (actor.state_dict().values() for actor in actors)
        assert all(np.array_equal(a, b) for a, b in zip(theirs, ours))
