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
from results.run import code_version
from results.studies import (
    common,
    compounding,
    cql_alpha,
    demonstrations,
    extrapolation,
    model_error,
    peer_iql,
    return_conditioning,
    stitching,
    switch,
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
    """A second call reads what the first measured, with its commit; other settings are measured anew; one that failed
    has left nothing."""
    with pytest.raises(ZeroDivisionError):
        once("study", "a run", [1], lambda: 1 / 0)
    first = once("study", "a run", [1], lambda: {"score": 0.1 + 0.2})
    assert first == {"score": 0.1 + 0.2, "commit": code_version()}
    assert once("study", "a run", [1], lambda: 1 / 0) == first
    assert once("study", "a run", [2], lambda: {"score": 5})["score"] == 5
    assert once("study", "another run 0.7", [1], lambda: {"score": 6})["score"] == 6
    assert once("study", "a run", [1], lambda: 1 / 0) == first
    assert len(list(runs_of("study", "x", []).parent.iterdir())) == 3


def test_train_goes_on(small, in_process):
    words = "--env", small, "--eval-every", 100, "--eval-episodes", 1
    first = load_checkpoint(train("study", "a run", "bc", 10, *words))
    second = load_checkpoint(train("study", "a run", "bc", 20, *words))
    assert (first["step"], second["step"]) == (10, 20)
    assert [point["step"] for point in second["curve"]] == [10, 20]
    with pytest.raises(UserError, match="bc.py stopped; 'make studies' goes on"):
        train("study", "a run", "bc", 15, *words)
    other = load_checkpoint(train("study", "a run", "bc", 5, *words, "--lr", 1e-2))  # not the same run
    assert other["step"] == 5 and other["args"]["lr"] == 1e-2


def test_spreads():
    assert (common.mean_std([3.0]), common.mean_std([1.0, 3.0])) == ("3.0", "2.0 ± 1.4")
    assert common.beyond([10, 12], [5, 7]) and not common.beyond([10, 12], [8, 10])
    assert not common.beyond([10], [0]) and not common.beyond([5, 7], [10, 12])


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


def curve(promises, truth, score, steps=(100, 10_000, 100_000)):
    return [
        {"step": step, "promise": promise, "truth": truth, "score": score, "outside": 0.5}
        for step, promise in zip(steps, promises)
    ]


def test_divergence():
    moment = lambda *promises, truth=10, best: (
        extrapolation.divergence(curve(promises, truth, 0), best) or {"step": None}
    )["step"]
    assert moment(1, 200, 300, best=50) == 10_000
    assert moment(1, 200, 15, best=50) is None
    assert moment(1, 200, 300, best=250) == 100_000
    assert moment(1, 200, 300, truth=-25, best=50) == 100_000


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_extrapolation(expected, folder):
    both = lambda *args: [curve(*args), curve(*args)]
    curves = {
        "SAC (offline)": both((1, 2000, 3e6) if expected else (1, 11, 12), 10, -1.0),
        "BC": both((None, None, None), 300, 42.0 if expected else 20.0),
        "TD3+BC": both((1, 20 if expected else 200, 350), 300, 44.0),
        "CQL": both((1, -20), 300, 43.0),
        "TD3+BC, gamma 0.9": both((1, 38), 40, 44.0),
        "CQL, gamma 0.9": both((1, 30 if expected else 39), 40, 44.0),
    }
    common.keep(extrapolation.STUDY, best=350, curves=curves)
    sac, bc, equal, gamma, outside = extrapolation.findings()
    verdicts = [sentence.split(". ")[1][:6] for sentence in (sac, bc)]
    assert verdicts == (["So it "] * 2 if expected else ["Not so"] * 2)
    assert ("from update 10,000 (50% of its actions outside), 10,000" if expected else "never, never") in sac
    assert "CQL promises -20.0 ± 0.0 and earns 300.0 ± 0.0 (score 43.0 ± 0.0)" in equal
    assert ("not yet conservatism" in equal) == expected
    assert ("So it is: TD3+BC 95.0 ± 0.0 %, CQL 75.0" if expected else "Not so: TD3+BC 95.0 ± 0.0 %, CQL 97.5") in gamma
    assert "SAC (offline) 50.0 ± 0.0 %" in outside
    extrapolation.draw()
    assert (folder / "extrapolation.png").stat().st_size > 10_000


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_cql_alpha(expected, folder):
    rows = [(-1, 5000, 10), (45, 300, 290), (44.5, 200, 280), (35, 350 if not expected else 150, 270), (30, 100, 250)]
    seeds = lambda score, promise, truth: [
        {"score": score + x, "promise": promise, "truth": truth} for x in ((0, 0.5) if expected else (0, 20))
    ]
    points = [{"alpha": alpha, "seeds": seeds(*row)} for alpha, row in zip(cql_alpha.ALPHAS, rows)]
    clone = [{"score": 40}, {"score": 41}]
    common.keep(cql_alpha.STUDY, tasks={"a": {"clone": clone, "points": points}})
    best, promise = cql_alpha.findings()
    assert "alpha 1 45.2 ± 0.4" in best if expected else "alpha 1 55.0 ± 14.1" in best
    if expected:
        assert "BC 40.5 ± 0.7 (2 seeds). The highest, alpha 1, is above alpha 0.001, 20, 100 by" in best
        assert best.endswith("Above BC: 1, 5.")
        assert "So it is: from 5,000 to 100; above the truth with alpha 0.001, 1." in promise
    else:
        assert "is above alpha 0.001 by" in best and best.endswith("Above BC: none.")
        assert "Not so throughout" in promise
    cql_alpha.draw()
    assert (folder / "cql_alpha.png").stat().st_size > 10_000


def test_findings_of_stitching(folder):
    paths = np.zeros((stitching.DRAWN, 40, 2)).tolist()
    meet = {name: {"success": float(name == "IQL 0.9"), "paths": paths} for name in stitching.METHODS}
    common.keep(stitching.STUDY, tasks={"stitch-meet": meet, "stitch-gap": meet})
    assert all("IQL 0.7 0%, IQL 0.9 100%, CQL 0%" in sentence for sentence in stitching.findings())
    stitching.draw()
    assert (folder / "stitching.png").stat().st_size > 10_000


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_return_conditioning(expected, folder):
    row = {"asked": [0, 1, 2, 3], "mean": [0, 1, 2, 1] if expected else [1, 0, 1, 9], "std": [0.1] * 4}
    row |= {"low": 0.5, "middle": 1.5, "high": 1.9, "best": 2}
    common.keep(return_conditioning.STUDY, tasks={"a": row, "b": row | {"low": 1.6}})
    varied, alike = return_conditioning.findings()
    assert f"correlation with what is achieved is {'1.00' if expected else '0.00'} (3 requests" in varied
    assert "so there is nothing to follow" in alike and "correlation" not in alike
    return_conditioning.draw()
    assert (folder / "return_conditioning.png").stat().st_size > 10_000


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_peer_iql(expected, folder):
    scores = [30, 70, 50, 40, 30, 20 if expected else 60]
    common.keep(peer_iql.STUDY, steps=[5000 * n for n in range(1, 7)], scores=scores, data=75.0)
    sentence, published = peer_iql.findings()
    assert f"{'So it does' if expected else 'Not so'}, in the one seed there is: 70.0 after 10,000 updates" in sentence
    assert "54.0 after 100,000" in published and "99.9 after 500,000" in published
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
    points = [
        {"script": script, "task": task, "demos": demos, "seed": seed, "return": value + 10 * seed}
        for script, value in {"gail": 900.0, "bc": 400.0 if expected else 895.0}.items()
        for task in demonstrations.TASKS
        for demos in demonstrations.COUNTS
        for seed in (0, 1)
    ]
    experts = {task: {"expert": 1000.0, "random": -100.0} for task in demonstrations.TASKS}
    common.keep(demonstrations.STUDY, experts=experts, points=points)
    assert demonstrations.ours("gail", "hopper-expert")[4] == pytest.approx([1000 / 1100, 1010 / 1100])
    assert demonstrations.papers("gail", "hopper-expert")[0] == (4, pytest.approx(3614.22 / 3571.38))
    sentences = demonstrations.findings()
    assert all(("So it is, in every seed" if expected else "Not so: ") in sentence for sentence in sentences)
    assert all("(2 seeds)" in sentence for sentence in sentences)
    demonstrations.draw()
    assert (folder / "demonstrations.png").stat().st_size > 10_000


def test_tightrope():
    """Costs against many walks; a table knows what it has seen, and else does what is done most often."""
    rng = np.random.default_rng(0)
    table = compounding.table_of(np.array([[0, 0], [0, 0], [0, 1], [1, 1], [1, 1], [1, 1], [4, 4], [9, 9]]))
    assert table.tolist() == [0, 1, 1, 1, 4, 1, 1, 1, 1, 9]
    assert compounding.cost(table[[0, 1, 2, 3, 3, 5, 6, 7, 8, 8]], 0.3, 3) == pytest.approx(3 - 0.7 - 0.7**2 - 0.7**3)
    assert compounding.cost(np.arange(10), 0.1, 3) == pytest.approx(0.1 + 0.9 * 0.1 + (0.91 * 0.1))
    assert compounding.cost(np.full(10, 1), 0.1, 1) == pytest.approx(0.5)
    for wrong in (table, np.where(np.arange(10) < 2, 1, table)):
        seen = compounding.walk(rng, wrong, 0.1, 5, 40_000)[:, 0].reshape(5, -1)  # after the step before
        assert (seen[0] < 2).all()
        fallen = (seen[1:] > 1).sum(0).mean()
        assert compounding.cost(wrong, 0.1, 4) == pytest.approx(fallen, rel=0.03)
    expert = compounding.walk(rng, None, 0.1, 50, 1000)
    assert expert.max() == 1 and (expert[:, 0] != expert[:, 1]).mean() == pytest.approx(0.1, abs=0.01)
    costs = compounding.tightrope(0.02, 20_000, 16, 0)
    assert costs["BC"] == pytest.approx(16 - sum(0.98**t for t in range(1, 17)))
    assert costs["DAgger"] < 0.4 and compounding.tightrope(0.02, 20_000, 16, 0) == costs


def test_rollout_gives_the_reward_before():
    """To a policy that asks for it: 0 at first, then each step's."""
    data, told = Dataset.buffer(find_task("hopper-expert"), 0), []

    def policy(obs, rew):
        told.append(rew)
        return torch.zeros(len(obs), 3)

    _, rew = common.rollout(data, policy, 2)
    assert told[0].tolist() == [0, 0] and len(told) == len(rew) > 20
    np.testing.assert_allclose(torch.stack(told[1:]), rew[:-1], rtol=1e-6)


def test_drift():
    """Distances in the expert's deviations, of the episodes that still go on."""
    task = find_task("hopper-expert")
    data, states = Dataset.buffer(task, 0), np.random.default_rng(0).normal(size=(7, 11))
    row = compounding.drift(data, lambda x: torch.zeros(len(x), 3), states, episodes=2)
    obs, rew = common.rollout(data, lambda x: torch.zeros(len(x), 3), 2)
    far = np.linalg.norm((obs[:-1, :, None] - states) / states.std(0), axis=-1).min(-1)  # (T, 2)
    on = rew != 0
    assert len(rew) > 20 and row["return"] == pytest.approx(rew.sum(0).mean())
    for k, t in enumerate(range(0, len(rew), 20)):
        part = on[t : t + 20]
        assert row["alive"][k] == pytest.approx(part.mean())
        assert row["distance"][k] == pytest.approx(far[t : t + 20][part].mean(), rel=1e-3)
    assert len(row["alive"]) == k + 1


@pytest.mark.parametrize("expected", [True, False])
def test_findings_of_compounding(expected, folder):
    ropes = {}
    for eps in compounding.EPS:
        for labels in compounding.LABELS:
            for T in compounding.HORIZONS:
                noise = 1 + 0.01 * np.arange(3)
                worse = T**2 if expected else T
                ropes[f"{eps} {labels} {T}"] = {"BC": (worse * noise).tolist(), "DAgger": (T * noise).tolist()}
    run = {"alive": [1.0] * 50, "return": 3000.0}
    near, far, fallen = ([0.1] * 50, [0.1] * 9 + [3.0] * 41, [0.1, 2.0 if expected else 0.05] + [None] * 48)
    clones = [run | {"distance": far, "return": 500.0}, run | {"distance": fallen}]
    hopper = {"BC": clones, "DAgger": [run | {"distance": near}] * 2, "expert": [run | {"distance": near}]}
    common.keep(compounding.STUDY, ropes=ropes, hopper=hopper)
    sentences = compounding.findings()
    assert [text.split(". ")[1][:6] for text in sentences] == (["So it "] * 3 if expected else ["Not so"] * 3)
    assert ("are 2.00 ± 0.00 of BC to T = 64, while eps T is small, and 1.00 ± 0.00 of" in sentences[0]) == expected
    assert compounding.late(hopper["BC"][0]) == pytest.approx(3.0) and "1750 ± 1768 of BC" in sentences[2]
    compounding.draw()
    assert (folder / "compounding.png").stat().st_size > 10_000


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

    def train_cheaply(study, name, script, steps, *words, **source):
        begun.append(name.split()[0])
        return train(study, name, script, steps, *(cheap if script == "cql" else []), *words, **source)

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
