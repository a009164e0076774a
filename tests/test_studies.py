import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro

from algorithms import cql, mopo, td3_bc
from datasets import Dataset, UserError, find_task
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
    switch,
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


def test_cost_of_the_switch():
    """By hand: the lowest within 50,000 steps, back from then on; without an offline phase no drop."""
    curve = [[0, 50.0], [5_000, 60.0], [10_000, 20.0], [15_000, 49.0], [50_000, 50.0], [60_000, 10.0], [100_000, 70.0]]
    expected = {"before": 50, "drop": 30, "back": 50_000, "final": 70, "regret": 1 - 259 / 600}
    assert switch.cost(curve) == pytest.approx(expected)
    assert switch.cost([[0, 50.0], [5_000, 49.0], [100_000, 49.5]])["back"] is None
    assert switch.cost([[0, 50.0], [5_000, 55.0], [100_000, 49.5]])["drop"] == -5
    row = switch.cost([[5_000, 10.0], [100_000, 40.0]])
    assert row == {"before": None, "drop": None, "back": None, "final": 40, "regret": 0.75}
    points = [{"step": step, "scores": [step / 10]} for step in (100, 200, 300)]
    assert switch.curve_of({"args": {"offline_steps": 200}, "curve": points}) == [(0, 20), (100, 30)]
    assert switch.curve_of({"args": {}, "curve": points})[0] == (100, 10)


def test_stages_of_the_switch(short, in_process, folder, monkeypatch):
    """Two methods from one checkpoint of CQL's, which is trained once, and one without an offline phase."""
    monkeypatch.setattr(switch, "TASKS", (str(short),))
    monkeypatch.setattr(switch, "SEEDS", (1,))
    for name, value in (("OFFLINE", 4), ("ONLINE", 12), ("EVERY", 4)):
        monkeypatch.setattr(switch, name, value)
    small = ["--eval-episodes", 1, "--batch-size", 8]
    cheap = [*small, "--n-actions", 2, "--critic-layers", 1]
    methods = {}
    for method in ("CQL", "SAC after CQL", "RLPD"):
        script, words = switch.METHODS[method]
        methods[method] = script, [*(small if script == "rlpd" else cheap), *words]
    monkeypatch.setattr(switch, "METHODS", methods)
    train = switch.train
    begun = []

    def train_cheaply(study, name, script, steps, *words):
        begun.append(name.split()[0])
        return train(study, name, script, steps, *(cheap if script == "cql" else []), *words)

    monkeypatch.setattr(switch, "train", train_cheaply)
    switch.measure()
    rows = common.kept("switch")["curves"]
    assert begun == ["cql", "CQL", "cql", "SAC", "RLPD"] and len(rows) == 3
    assert [[step for step, _ in row["curve"]] for row in rows] == [[0, 4, 8, 12]] * 2 + [[4, 8, 12]]
    assert rows[0]["curve"][0] == rows[1]["curve"][0]


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_switch(expected, folder):
    low = {"IQL": 38, "AWAC": 38, "SPOT": 35, "Cal-QL": 39, "CQL": 20, "SAC after CQL": 1, "Off2On": 30}
    end = {"IQL": 61, "AWAC": 60, "SPOT": 41, "Cal-QL": 45, "RLPD": 80, "SAC": 30}
    if not expected:
        low |= {"CQL": 39.5, "SAC after CQL": 36}
        end |= {"AWAC": 59, "SPOT": 39}
    curves = [
        {
            "method": method,
            "task": task,
            "seed": seed,
            "curve": [[0, 40.0]] * (method in low)
            + [[5_000, low.get(method, 5) + 0.1 * seed], [100_000, float(end.get(method, 42))]],
        }
        for method in switch.METHODS
        for task in switch.TASKS
        for seed in switch.SEEDS
    ]
    common.keep(switch.STUDY, curves=curves)
    sentences = switch.findings()
    verdicts = [sentence.split(". ")[1][:6] for sentence in sentences[:4]]
    assert verdicts == (["So it "] * 4 if expected else ["Not so"] * 4)
    assert "RLPD ends at 80.0" in sentences[4] and "IQL drops by 1.9 ± 0.1" in sentences[4]
    switch.draw()
    assert (folder / "switch.png").stat().st_size > 10_000
