"""The grid's runner on a real local Ray, which make test-slow installs; where it is not installed this is skipped."""

import importlib.util
import json

import pytest
from test_reproduce import launch, project, records  # noqa: F401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: make test-slow"),
]


def test_ray(project):  # noqa: F811
    """The same records as from the local runner, one failed run named; what is recorded is skipped."""
    (project / "algorithms" / "td3_bc.py").write_text("raise SystemExit('error: no such luck')\n")
    words = ["--algos", "bc", "td3_bc", "--envs", "stitch-gap", "--seeds", "0", "1", "--steps", "50"]
    process = launch(project, *words, "--runner", "ray")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1].startswith("error: 2 of 4 runs failed: td3_bc stitch-gap seed 0: ")
    theirs = records(project)
    assert len(theirs) == 2
    for path in (project / "results" / "runs").rglob("*.json"):
        path.unlink()
    out, err = launch(project, "--algos", "bc", *words[3:]).communicate(timeout=100)
    assert "Nothing is left" in out, err
    assert json.dumps(records(project)) == json.dumps(theirs)
    out, err = launch(project, "--algos", "bc", *words[3:], "--runner", "ray").communicate(timeout=100)
    assert "0 runs left" in out, err
