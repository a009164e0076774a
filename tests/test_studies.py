import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro

from algorithms import airl, cql, gail, mopo, td3_bc
from datasets import Dataset, UserError, find_task, find_world
from results.checkpoint import load_checkpoint
from results.studies import (
    common,
    cql_alpha,
    demonstrations,
    extrapolation,
    model_error,
    peer_iql,
    return_conditioning,
    stitching,
    transfer,
)
from results.studies.common import once, runs_of, train, value_and_truth


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "STUDIES", tmp_path)
    return tmp_path


@pytest.fixture
def in_process(monkeypatch):
    """`train` runs its script in this process: another would first spend seconds on its imports."""

    def run(command, env):
        script = importlib.import_module(f"algorithms.{Path(command[1]).stem}")
        with monkeypatch.context() as patch:
            patch.setenv("RUNS_DIR", env["RUNS_DIR"])
            try:
                script.train(tyro.cli(script.Args, args=command[2:]))
            except UserError:
                return SimpleNamespace(returncode=1)
            return SimpleNamespace(returncode=0)

    monkeypatch.setattr(common, "subprocess", SimpleNamespace(run=run))


def test_once():
    """A second call reads what the first measured; one that failed has left nothing."""
    with pytest.raises(ZeroDivisionError):
        once("study", "a run", lambda: 1 / 0)
    assert once("study", "a run", lambda: {"score": 0.1 + 0.2}) == {"score": 0.1 + 0.2}
    assert once("study", "a run", lambda: 1 / 0) == {"score": 0.1 + 0.2}
    assert once("study", "a run 0.7", lambda: 5) == 5
    assert once("study", "a run 0.9", lambda: 6) == 6
    names = ["a_run.json", "a_run_0.7.json", "a_run_0.9.json"]
    assert sorted(path.name for path in runs_of("study", "x").parent.iterdir()) == names


def test_train_goes_on(small, in_process):
    words = "--env", small, "--eval-every", 100, "--eval-episodes", 1
    first = load_checkpoint(train("study", "a run", "bc", 10, *words))
    second = load_checkpoint(train("study", "a run", "bc", 20, *words))
    assert (first["step"], second["step"]) == (10, 20)
    assert [point["step"] for point in second["curve"]] == [10, 20]
    with pytest.raises(UserError, match="bc.py stopped; 'make studies' goes on"):
        train("study", "a run", "bc", 15, *words)


@pytest.mark.parametrize("module, words", [(td3_bc, ()), (cql, ("--n-actions", 2, "--critic-layers", 2))])
def test_value_and_truth(module, words, collected, in_process):
    """Against one episode at a time, with the networks taken out of the checkpoint by hand."""
    name = module.__name__.split(".")[-1]
    checkpoint = train("study", name, name, 20, "--env", collected, "--eval-episodes", 1, "--gamma", 0.9, *words)
    measured = value_and_truth(checkpoint, episodes=2)
    saved = load_checkpoint(checkpoint)
    actor, critic = module.Actor(11, 3), module.Critic(11, 3, *([2] if module is cql else []))
    actor.load_state_dict(saved["state"]["actor"])
    critic.load_state_dict(saved["state"]["critic"])
    env, scores, promises, truths = find_task("hopper-medium").make_env(), [], [], []
    for seed in (0, 1):
        obs, _ = env.reset(seed=seed)
        rews, over = [], False
        while not over:
            x = ((torch.tensor(obs, dtype=torch.float32) - saved["obs_mean"]) / saved["obs_std"])[None]
            with torch.no_grad():
                act = module.policy(x, actor)
                if not rews:
                    promises.append(critic(x, act).min().item())
            obs, rew, terminated, truncated, _ = env.step(act[0].numpy())
            rews.append(rew)
            over = terminated or truncated
        scores.append(find_task("hopper-medium").score(sum(rews)))
        truths.append(sum(0.9**t * rew for t, rew in enumerate(rews)))
    expected = {"score": np.mean(scores), "promise": np.mean(promises), "truth": np.mean(truths)}
    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-3)


def curve(promises, truth, score):
    return [
        {"step": step, "promise": promise, "truth": truth, "score": score, "outside": 0.5}
        for step, promise in zip((100, 200, 500), promises)
    ]


def test_divergence():
    assert extrapolation.divergence(curve((1, 200, 300), 10, 0), best=50) == 200
    assert extrapolation.divergence(curve((1, 200, 15), 10, 0), best=50) is None
    assert extrapolation.divergence(curve((1, 200, 300), 10, 0), best=250) == 500
    assert extrapolation.divergence(curve((1, 200, 300), -25, 0), best=50) == 500


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_extrapolation(expected, folder):
    curves = {
        "SAC (offline)": curve((1, 2000, 3e6) if expected else (1, 11, 12), 10, -1.0),
        "BC": curve((None, None, None), 300, 42.0 if expected else 20.0),
        "TD3+BC": curve((1, 200, 350), 300, 44.0),
        "CQL": curve((1, 150, 250) if expected else (1, 350, 250), 300, 43.0),
    }
    common.keep(extrapolation.STUDY, best=350, curves=curves)
    verdicts = [sentence.split(". ")[1][:6] for sentence in extrapolation.findings()[:3]]
    assert verdicts == (["So it "] * 3 if expected else ["Not so"] * 3)
    extrapolation.draw()
    assert (folder / "extrapolation.png").stat().st_size > 10_000


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_cql_alpha(expected, folder):
    rows = [(0.1, -1, 5000, 10), (1, 45, 300, 290), (10, 41 if expected else 50, 200 if expected else 400, 280)]
    points = [dict(zip(("alpha", "score", "promise", "truth"), row)) for row in rows]
    common.keep(cql_alpha.STUDY, clone={"score": 40}, points=points)
    verdicts = [sentence.split(". ")[1][:6] for sentence in cql_alpha.findings()]
    assert verdicts == (["So it "] * 2 if expected else ["Not so"] * 2)
    cql_alpha.draw()
    assert (folder / "cql_alpha.png").stat().st_size > 10_000


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_stitching(expected, folder):
    paths = np.zeros((stitching.DRAWN, 40, 2)).tolist()
    success = {name: float("BC" not in name or "TD3" in name) for name in stitching.METHODS}
    meet = {name: {"success": s if expected else 1.0, "paths": paths} for name, s in success.items()}
    gap = {name: {"success": 0.0 if expected else 1.0, "paths": paths} for name in success}
    common.keep(stitching.STUDY, tasks={"stitch-meet": meet, "stitch-gap": gap})
    verdicts = [sentence.split(". ")[1][:6] for sentence in stitching.findings()]
    assert verdicts == (["So it "] * 2 if expected else ["Not so"] * 2)
    stitching.draw()
    assert (folder / "stitching.png").stat().st_size > 10_000


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_return_conditioning(expected, folder):
    row = {"asked": [0, 1, 2, 3], "mean": [0, 1, 2, 1] if expected else [1, 0, 1, 9], "std": [0.1] * 4}
    range_of_data = {"low": 0.5, "middle": 1.5, "high": 1.9, "best": 2}
    common.keep(return_conditioning.STUDY, tasks={"a": row | range_of_data, "b": row | range_of_data})
    verdicts = [sentence.split(". ")[1][:6] for sentence in return_conditioning.findings()]
    assert verdicts == (["So it "] * 2 if expected else ["Not so"] * 2)
    return_conditioning.draw()
    assert (folder / "return_conditioning.png").stat().st_size > 10_000


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_peer_iql(expected, folder):
    scores = [30, 70, 50, 40, 30, 20 if expected else 60]
    common.keep(peer_iql.STUDY, steps=[5000 * n for n in range(1, 7)], scores=scores, data=75.0)
    (sentence,) = peer_iql.findings()
    assert f"{'So it is' if expected else 'Not so'}: 70.0 after 10,000 updates" in sentence
    peer_iql.draw()
    assert (folder / "peer_iql.png").stat().st_size > 10_000


def test_quality_of_a_model():
    """A model that is off by 1 and says 2 in every dimension, and by 10 where the first observation is positive."""
    torch.manual_seed(0)
    data = Dataset(None, "", "", torch.randn(4000, 2 * 3 + 2 + 2), [4000], 3, 2)
    rows = data.rows[:1000]
    batch = data.split(rows)
    wrong = 1 + 9.0 * (batch.obs[:, :1] > 0)

    def dynamics(obs, act):
        mean = mopo.outcome(batch) + wrong
        return mean.expand(7, -1, -1), (2 * wrong).log().expand(7, *mean.shape)

    row = model_error.quality(dynamics, data, rows)
    rmse = np.sqrt((wrong**2).mean().item())
    y = np.concatenate([batch.next_obs - batch.obs, batch.rew[:, None]], 1)
    naive = np.sqrt(np.mean((y - [0, 0, 0, data.rew.mean()]) ** 2, 0))
    np.testing.assert_allclose(row["share"], rmse / naive, rtol=1e-5)
    np.testing.assert_allclose(row["calibration"], 2, rtol=1e-5)
    np.testing.assert_allclose([row["u"][0], row["u"][-1]], [4, 40], rtol=1e-5)  # 4 dimensions: sqrt(4) times the one
    np.testing.assert_allclose([row["error"][0], row["error"][-1]], [2, 20], rtol=1e-5)
    assert row["correlation"] > 0.5


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_model_error(expected, folder):
    row = {"share": [0.1, 0.4], "calibration": [0.8, 1.5], "correlation": 0.7, "epochs": 40.0}
    if not expected:
        row |= {"share": [0.1, 0.6], "calibration": [0.4, 1.5], "correlation": 0.3}
    groups = {"u": [1.0, 2.0], "error": [0.1, 0.4]}
    common.keep(model_error.STUDY, tasks={"a": row | groups, "b": row | groups})
    verdicts = [sentence.split(". ")[1][:6] for sentence in model_error.findings()]
    assert verdicts == (["So it "] * 6 if expected else ["Not so"] * 6)
    model_error.draw()
    assert (folder / "model_error.png").stat().st_size > 10_000


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_demonstrations(expected, folder):
    value = {"gail": 900.0, "bc": 400.0 if expected else 950.0}
    points = [
        {"script": script, "task": task, "demos": demos, "return": value[script]}
        for script in value
        for task in demonstrations.TASKS
        for demos in demonstrations.COUNTS
    ]
    experts = {task: {"expert": 1000.0, "random": -100.0} for task in demonstrations.TASKS}
    common.keep(demonstrations.STUDY, experts=experts, points=points)
    assert demonstrations.ours("gail", "hopper-expert")[1] == (4, pytest.approx(1000 / 1100))
    assert demonstrations.papers("gail", "hopper-expert")[0] == (4, pytest.approx(3614.22 / 3571.38))
    verdicts = [sentence.split(". ")[1][:6] for sentence in demonstrations.findings()]
    assert verdicts == (["So it "] * 3 if expected else ["Not so"] * 3)
    demonstrations.draw()
    assert (folder / "demonstrations.png").stat().st_size > 10_000


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_transfer(expected, folder):
    def world(name):
        share = dict.fromkeys(transfer.METHODS, 0.95)
        if name == "right":
            share |= (
                {"BC": 0.0, "AIRL state-action": 0.4, "GAIL": 0.2} if expected else {"MaxEnt deep": 0.1, "GAIL": 1.0}
            )
        elif not expected:
            share["GAIL"] = 0.4
        return {method: [[x, x / 2], [x, x / 2 + 0.01], [x, x / 2]] for method, x in share.items()}

    common.keep(transfer.STUDY, worlds={name: world(name) for name in transfer.WORLDS})
    home, wind, *verdicts = transfer.findings()
    assert [text.split(". ")[1][:6] for text in (home, *verdicts)] == (["So it "] * 5 if expected else ["Not so"] * 5)
    assert "MaxEnt linear 95% ± 0" in wind and "with the soft policy MaxEnt linear 48% ± 1" in wind
    transfer.draw()
    assert (folder / "transfer.png").stat().st_size > 10_000


def test_what_transfer_learns(monkeypatch):
    """BC: shares of what was seen. An adversary: the one of states says nothing of actions, and each is a reward that
    brings its soft policy nearer to the expert's visits than a policy that draws any action."""
    world = find_world("left")
    torch.manual_seed(0)
    states, acts = transfer.demonstrations(world)
    policy = transfer.clone(world, states, acts)
    seen = acts[states == 63]
    np.testing.assert_allclose(policy[7, 63], np.bincount(seen, minlength=4) / len(seen))
    assert torch.equal(policy[0], policy[49]) and torch.allclose(policy.sum(-1), torch.ones(50, 64).double())
    monkeypatch.setattr(transfer, "STEPS", 15)
    shown = torch.bincount(states.flatten(), minlength=64) / states.numel()
    for script, kind in ((airl, "state"), (airl, "state-action"), (gail, "GAIL")):
        rew = transfer.adversary(world, script, kind, states, acts)
        assert rew.shape == (64, 4) and (rew == rew[:, :1]).all() == (kind == "state")
        far = []
        for policy in (transfer.maxent_irl.soft_policy(world, rew)[0], torch.full((50, 64, 4), 0.25).double()):
            visited = torch.bincount(world.sample(policy, 2000)[0].flatten(), minlength=64) / 100_000
            far.append((visited - shown).abs().sum())
        assert far[0] < far[1], kind
