"""Every script trains, evaluates, stops, resumes exactly, and refuses what it cannot do."""

import contextlib
import dataclasses
import importlib
import json
import os
import random
import re
import resource
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, error_of, start, wait_until

from algorithms import bc, cql, edac, gail, idql, iql, mbop, mopo, offline_dqn, rebrac, sac, td3_bc
from datasets import TASKS, UserError, collect, find_task
from datasets.minari_io import export_minari
from results import evaluate
from results.checkpoint import load_agent, load_checkpoint
from results.run import Run, choose_device
from tests.scripts import SCRIPTS, TRAINED

FOUND = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py"))
MODULES = {name: importlib.import_module(f"algorithms.{name}") for name in TRAINED if name in FOUND}
FROM_DATA = [name for name in MODULES if not SCRIPTS[name].acts]
SEEDED = [name for name in MODULES if hasattr(MODULES[name].Args, "seeds")]  # they can train several agents at once
EACH = [(name, 1) for name in MODULES] + [(name, 2) for name in SEEDED]


def test_table():
    """tests/scripts.py, which the other tests read, has a row of each script."""
    for name in FOUND:
        assert name in SCRIPTS, (
            f"algorithms/{name}.py has no row in tests/scripts.py: add "
            f'"{name}": Script(family, lines), from which tests, tables and bench know it.'
        )
    for name in SCRIPTS:
        assert name in FOUND, f"tests/scripts.py has a row of {name}, but there is no algorithms/{name}.py: remove it."


def arguments(script, small, **changes):
    """Of a short run on the small dataset, with what the script's row in the table says."""
    row = SCRIPTS[script.__name__.split(".")[-1]]
    small = Path(small).with_name("cartpole.hdf5") if row.discrete else small  # which stands beside it
    return dataclasses.replace(
        script.Args(), **{"env": str(small), "eval_every": 10, "eval_episodes": 1, **row.quick} | changes
    )


def checkpoint_of(tmp_path):
    (path,) = (tmp_path / "runs").rglob("checkpoint.pt")
    return path


def assert_equal(a, b):
    """Nested dictionaries and lists of tensors and numbers, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


def trained(tmp_path, monkeypatch, name, *runs):
    """Trains with each of the arguments in turn, in a folder of their own; the last checkpoint."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / name / "runs"))
    for train, args in runs:
        train(args)
    return load_checkpoint(checkpoint_of(tmp_path / name))


def stopped(train, step, later=0):
    """`train`, stopped by Ctrl-C in the evaluation after that step, or at most so many steps later: in an environment
    of its own a run stops where an episode ends."""
    original = Run.report

    def report(run, at, returns, **more):
        original(run, at, returns, **more)
        if at == step:
            signal.raise_signal(signal.SIGINT)

    def train_and_stop(args):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="Stopped after step ") as error:
            patch.setattr(Run, "report", report)
            train(args)
        assert step <= int(re.search(r"after step (\d+) ", str(error.value))[1]) <= step + later

    return train_and_stop


@pytest.mark.parametrize("name, seeds", EACH)
def test_train_stop_resume_evaluate(name, seeds, small, tmp_path, monkeypatch):
    """20 updates = 10 + resume + 10: parameters, optimisers, random state, curve. What was evaluated in training comes
    out again, from the checkpoint alone. Each agent has a record. Targets have no history: a Polyak step with
    gradients on would chain every update to the one before, with right scores and memory without end."""
    script, runs = MODULES[name], []
    args = arguments(script, small, batch_size=32, seed=7, eval_episodes=2, **({"seeds": seeds} if seeds > 1 else {}))
    total, offline = 2 * args.eval_every, getattr(args, "offline_steps", 0)
    args = dataclasses.replace(args, steps=total - offline)
    save = Run._save
    monkeypatch.setattr(Run, "_save", lambda run: (runs.append(run), save(run)))
    whole = trained(tmp_path, monkeypatch, "whole", (script.train, args))

    targets = [net for key, net in runs[-1].state.items() if key.endswith("_target")]
    assert len(targets) == len(set(re.findall(r"\b(\w+_target)=\1\b", Path(script.__file__).read_text())))
    assert all(p.is_leaf and not p.requires_grad for net in targets for p in net.parameters())

    path = checkpoint_of(tmp_path / "whole")
    returns, data, _ = evaluate.evaluate(evaluate.Args(path, episodes=2, seed=7))
    for agent, own in enumerate(np.atleast_2d(returns)):
        record = json.loads((path.parent / f"record-seed={7 + agent}.json").read_text())
        np.testing.assert_allclose(own, record["returns"], atol=1e-3)
        assert record["score"] == pytest.approx(data.score(np.mean(own)), abs=1e-3)
        assert (record["seed"], record["trained_together"]) == (7 + agent, seeds)
    assert len(list(path.parent.glob("record*"))) == seeds

    stop = stopped(script.train, args.eval_every, later=args.eval_every - 1 if SCRIPTS[name].acts else 0)
    first, second = (stop, args), (script.train, dataclasses.replace(args, resume=True))
    parts = trained(tmp_path, monkeypatch, "parts", first, second)
    for saved in (whole, parts):
        del saved["args"], saved["seconds"], saved["eval_seconds"]
    ends = sorted({args.eval_every, total} | ({offline} if offline else set()))
    assert whole["step"] == total and [point["step"] for point in whole["curve"]] == ends
    assert_equal(whole, parts)


def test_steps_may_grow(small, tmp_path, monkeypatch):
    """A finished run goes on with more --steps, unless a schedule spans them."""
    args = arguments(td3_bc, small, steps=20)
    whole = trained(tmp_path, monkeypatch, "whole", (td3_bc.train, args))
    first, second = dataclasses.replace(args, steps=10), dataclasses.replace(args, resume=True)
    parts = trained(tmp_path, monkeypatch, "parts", (td3_bc.train, first), (td3_bc.train, second))
    assert_equal(whole["state"], parts["state"])
    for script in (iql, idql, mopo, gail):
        script.train(arguments(script, small, steps=20))
        with pytest.raises(UserError, match="Cannot resume .* with other arguments: steps was 20"):
            script.train(arguments(script, small, steps=40, resume=True))


@pytest.mark.parametrize("script, opt, name", [(iql, "opt", "lr"), (idql, "opt", "lr"), (mopo, "adam_opt", "actor_lr")])
def test_schedule(script, opt, name, small, monkeypatch):
    """The actor's learning rate after k of 20 updates: lr (1 + cos(pi k / 20)) / 2."""
    rates, watch = [], Run.watch

    def watch_rate(run, losses):
        rates.append(run.state[opt].param_groups[0]["lr"].item())
        watch(run, losses)

    monkeypatch.setattr(Run, "watch", watch_rate)
    script.train(arguments(script, small, steps=20, **{name: 1e-3}))
    np.testing.assert_allclose(rates, 1e-3 * (1 + np.cos(np.pi * np.arange(1, 21) / 20)) / 2, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", ["halfcheetah-medium", "D4RL/antmaze/umaze-v1"])
def test_tuned(name, small, tmp_path, monkeypatch, capsys):
    """What is None comes from TUNED, by the task's family; what is given wins; the record has what was used.
    The rewards too go by the task: locomotion's returns span 1000, AntMaze's rewards are lowered by 1."""
    antmaze, loaded = "antmaze" in name, []
    load = iql.load

    def load_as(*words):
        data = load(*words)
        data.task = dataclasses.replace(data.task, name=name, rew_shift=-1.0 if antmaze else 0.0)
        loaded.append((data, data.rew.clone()))
        return data

    monkeypatch.setattr(iql, "load", load_as)
    iql.train(arguments(iql, small, steps=10))
    folder = checkpoint_of(tmp_path).parent
    record = json.loads((folder / "record-seed=0.json").read_text())
    assert folder.name == "seed=0,eval_every=10,eval_episodes=1"
    assert (record["args"]["expectile"], record["args"]["beta"]) == ((0.9, 10) if antmaze else (0.7, 3))
    ((data, rew),) = loaded
    if antmaze:
        torch.testing.assert_close(data.rew, rew - 1)
    else:
        assert np.ptp(data.returns()) == pytest.approx(1000, rel=1e-4)
    iql.train(arguments(iql, small, steps=10, beta=4.0, expectile=record["args"]["expectile"]))
    record = json.loads(
        (folder.with_name("seed=0,eval_every=10,eval_episodes=1,beta=4.0") / "record-seed=0.json").read_text()
    )
    assert record["args"]["beta"] == 4 and "beta 4.0" in capsys.readouterr().out


def test_resume_is_exact_online(tmp_path, monkeypatch):
    """SAC, whose environment cannot be checkpointed, killed within an episode: it resumes from the end of an episode,
    with its replay buffer."""
    args = sac.Args("hopper", steps=300, start_steps=260, batch_size=32, eval_every=90, eval_episodes=1)
    whole = trained(tmp_path, monkeypatch, "whole", (sac.train, args))
    calls = []

    class Killed(Exception):
        pass

    def killing(*words):
        calls.append(1)
        if len(calls) == 30:
            raise Killed
        return alpha_loss(*words)

    alpha_loss = sac.alpha_loss
    monkeypatch.setattr(sac, "alpha_loss", killing)
    with pytest.raises(Killed):
        trained(tmp_path, monkeypatch, "parts", (sac.train, args))
    assert 180 < load_checkpoint(checkpoint_of(tmp_path / "parts"))["step"] < 290  # where it was killed
    parts = trained(tmp_path, monkeypatch, "parts", (sac.train, dataclasses.replace(args, resume=True)))
    assert whole["step"] == parts["step"] == 300 and len(whole["state"]["buffer"]["rows"]) == 300
    assert_equal(whole["state"], parts["state"])


@pytest.mark.parametrize("kills", [1, pytest.param(int(os.environ.get("KILLS", 10)), marks=pytest.mark.slow)])
def test_kill_and_resume(kills, small, tmp_path, monkeypatch):
    """kill -9 at random moments: the end is that of a run which nobody disturbed."""
    steps = 200 + 200 * kills
    args = arguments(td3_bc, small, steps=steps, eval_every=40)
    whole = trained(tmp_path, monkeypatch, "whole", (td3_bc.train, args))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "killed" / "runs"))
    words = ["algorithms/td3_bc.py", "--env", small, "--steps", steps, "--eval-every", 40, "--eval-episodes", 1]
    written = lambda: [path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("checkpoint.pt")]
    for _ in range(kills):
        before = written()
        process = start(*words, *(["--resume"] if before else []))
        wait_until(lambda before=before: written() > before, process)  # it has got on; and a random moment longer
        time.sleep(random.random())
        process.kill()
        process.communicate()
        assert load_checkpoint(checkpoint_of(tmp_path / "killed"))["step"] > 0  # whole, whenever the process died
    process = start(*words, "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_equal(whole["state"], load_checkpoint(checkpoint_of(tmp_path / "killed"))["state"])


def test_interrupt_saves(small, tmp_path):
    words = ["algorithms/bc.py", "--env", small, "--steps", 10**6, "--eval-every", 10**6, "--eval-episodes", 1]
    process = start(*words)
    wait_until(lambda: list((tmp_path / "runs").rglob("events*")), process)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err and "--resume goes on" in err
    step = load_checkpoint(checkpoint_of(tmp_path))["step"]
    assert step > 0 and f"after step {step} " in err


def test_readme_example(here, tmp_path, monkeypatch, capsys):
    """The README's ten lines act with a checkpoint and reach what was evaluated."""
    collect.collect(find_task("halfcheetah-medium"), tmp_path / "x.hdf5", 3000)
    td3_bc.train(arguments(td3_bc, tmp_path / "x.hdf5", steps=10))
    code = (ROOT / "README.md").read_text().split("```python\nimport sys; ")[1].split("```")[0]
    code = code.replace("runs/td3_bc/collected/halfcheetah-medium/seed=0/checkpoint.pt", str(checkpoint_of(tmp_path)))
    monkeypatch.chdir(ROOT)
    capsys.readouterr()
    exec(f"import sys; {code}", {})
    (evaluated,) = json.loads(checkpoint_of(tmp_path).with_name("record-seed=0.json").read_text())["returns"]
    assert float(capsys.readouterr().out) == pytest.approx(evaluated, rel=1e-3)


def test_evaluate_command():
    process = start("results/evaluate.py", "datasets/policies/halfcheetah-0110000.npz", "--episodes", 2)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "2 episodes" in out and "normalized score 4" in out
    assert float(out.split("\n")[1].split(" actions/s, 2 at once")[0]) > 100


def test_acting_with_other_arguments(small, tmp_path, monkeypatch):
    """The policy is given them; the time that it takes counts, all episodes' actions of a step in it."""
    mbop.train(arguments(mbop, small, steps=1))
    path, seen, clock = checkpoint_of(tmp_path), [], iter(range(10**6))
    monkeypatch.setattr(mbop, "cem", lambda args, obs, plan, actor: seen.append(args) or plan)
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    returns, _, rate = evaluate.evaluate(evaluate.Args(path, episodes=2, change=('planner="cem"', "horizon=5")))
    assert len(returns) == 2 and rate == 2
    assert {args.horizon for args in seen} == {5} and {args.candidates for args in seen} == {2}
    with pytest.raises(UserError, match="mbop.py has no argument steeps"):
        evaluate.evaluate(evaluate.Args(path, change=("steeps=5",)))
    with pytest.raises(UserError, match="--change takes name=value"):
        evaluate.evaluate(evaluate.Args(path, change=("horizon",)))


def test_evaluate_refuses(tmp_path):
    (tmp_path / "halfcheetah-1.npz").write_text("not an archive")
    (tmp_path / "x.pt").write_text("not a checkpoint")
    for name, message in (
        ("halfcheetah-0.npz", "no readable behaviour policy"),
        ("halfcheetah-1.npz", "no readable behaviour policy"),
        ("x.pt", "not a readable checkpoint"),
        ("y.pt", "There is no checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.evaluate(evaluate.Args(tmp_path / name))
    with pytest.raises(UserError, match="--episodes must be at least 1"):
        evaluate.evaluate(evaluate.Args(tmp_path / "y.pt", episodes=0))


def test_tuned_by_task(small, tmp_path, monkeypatch, capsys):
    """A task's own entry of TUNED wins over its family's, and what it says now must be what a resumed run was given."""
    monkeypatch.setitem(edac.TUNED, "hopper", dict(eta=5.0))
    monkeypatch.setitem(edac.TUNED, "hopper-medium", dict(eta=2.0))
    args = arguments(edac, small, steps=10, batch_size=8, n_critics=3)
    edac.train(args)
    assert "hopper-medium: n_critics 3, eta 2.0, actor_lr 0.0003\n" in capsys.readouterr().out
    folder = checkpoint_of(tmp_path).parent
    assert folder.name == "seed=0,batch_size=8,eval_every=10,eval_episodes=1,n_critics=3"
    tuned = json.loads((folder / "record-seed=0.json").read_text())["args"]
    assert (tuned["eta"], tuned["n_critics"], tuned["lr"]) == (2.0, 3, 3e-4)
    edac.train(dataclasses.replace(args, steps=20, resume=True))
    monkeypatch.setitem(edac.TUNED, "hopper-medium", dict(eta=3.0))
    with pytest.raises(UserError, match=r"with other arguments: eta was 2\.0"):
        edac.train(dataclasses.replace(args, steps=30, resume=True))
    with pytest.raises(UserError, match="--n-critics must be at least 1"):
        edac.train(dataclasses.replace(args, n_critics=0))


def test_tuned_names():
    """Of tuned values, only what is given and differs from the task's is in the folder's name."""
    for env, words, name in (
        ("antmaze-umaze", {"n_actions": 5, "alpha": 1.0}, ",n_actions=5,alpha=1.0"),
        ("pen-human", {"alpha": 1.0}, ""),
        ("halfcheetah-medium", {"alpha": 10.0, "threshold": 3.0}, ",threshold=3.0"),
    ):
        run = Run("algorithms/cql.py", cql.Args(env, device="cpu", **words))
        args = run.tuned(find_task(env), cql.TUNED)
        assert run._changed() == name and None not in dataclasses.asdict(args).values()
        assert all(getattr(args, key) == value for key, value in words.items())


@pytest.mark.parametrize("name", [name for name in MODULES if hasattr(MODULES[name], "TUNED")])
def test_tuned_tasks_exist(name):
    """Each entry of TUNED is a task, a family of tasks or "", and names arguments that are open by default."""
    script = MODULES[name]
    known = {"", *TASKS, *(task.family for task in TASKS.values())}
    assert known >= script.TUNED.keys()
    names = set(script.TUNED[""])
    for values in script.TUNED.values():
        assert set(values) <= names
    assert all(getattr(script.Args(), field) is None for field in names)


def test_antmaze_rewards(small, monkeypatch):
    """ReBRAC learns AntMaze's rewards times 100."""
    load, seen = rebrac.load, []

    def load_as_antmaze(*words):
        data = load(*words)
        data.task = dataclasses.replace(data.task, name="antmaze-umaze")
        data.rew[:] = 1
        return data

    monkeypatch.setattr(rebrac, "load", load_as_antmaze)
    monkeypatch.setattr(Run, "steps", lambda run, data, **state: seen.extend(data.rew.unique().tolist()) or [])
    rebrac.train(arguments(rebrac, small))
    assert seen == [100]


def test_cql_variants(small, tmp_path):
    """CQL(rho) and the target's options train; an alpha that is not learned stays where it is."""
    changes = dict(variant="rho", max_target=True, backup_entropy=True, threshold=None, normalize=False, rew_scale=2.0)
    cql.train(arguments(cql, small, steps=10, **changes))
    saved = load_checkpoint(checkpoint_of(tmp_path))
    assert saved["state"]["log_alpha"].item() == pytest.approx(np.log(10))
    assert saved["args"]["threshold"] == -1 and saved["obs_std"].eq(1).all()
    assert "rew_scale=2.0" in checkpoint_of(tmp_path).parent.name


def test_top_fraction(small):
    data = bc.load(str(small))
    best = bc.top_trajectories(data, 0.1)
    returns = data.returns()
    assert sorted(returns[best]) == sorted(returns)[-int(0.1 * len(returns)) :]
    assert len(bc.top_trajectories(data, 0.001)) == 1
    data.keep(best)
    np.testing.assert_allclose(data.returns(), returns[best])


def test_demos(small):
    """BC and GAIL with the same arguments are given the same pairs."""
    seen = []

    def load(*words, **options):
        seen.append(bc_load(*words, **options))
        return seen[-1]

    bc_load = bc.load
    for script, more in ((bc, {"steps": 10}), (gail, {"steps": 20, "envs": 2, "horizon": 10})):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "load", load)
            script.train(arguments(script, small, demos=3, every=5, seed=4, **more))
    for data in seen:
        data.obs.mul_(data.obs_std).add_(data.obs_mean)
    assert torch.equal(seen[0].obs, seen[1].obs) and torch.equal(seen[0].act, seen[1].act)
    with pytest.raises(UserError, match="--demos 5000 are more than the"):
        bc.train(arguments(bc, small, demos=5000, steps=10))


def test_record_and_earlier_run(small, tmp_path):
    """The record says what was run; a second run with the same arguments leaves the first beside it."""
    args = arguments(bc, small, steps=10, lr=1e-3)
    bc.train(args)
    folder = checkpoint_of(tmp_path).parent
    assert folder == tmp_path / "runs/bc/collected/hopper-medium/seed=0,lr=0.001,eval_every=10,eval_episodes=1"
    record = json.loads((folder / "record-seed=0.json").read_text())
    assert (record["algorithm"], record["env"], record["source"]) == ("bc", "hopper-medium", "collected")
    assert (record["steps"], record["seed"], record["args"]["lr"]) == (10, 0, 1e-3)
    assert len(record["returns"]) == 1 and record["curve"][-1]["score"] == record["score"]
    (folder / "mine").touch()
    bc.train(args)
    assert not (folder / "mine").exists() and Path(f"{folder}~1/mine").exists()


def test_without_environment(small, tmp_path, capsys):
    """A file of one's own, and nothing to evaluate in: the run reports its losses."""
    with h5py.File(small) as file, h5py.File(tmp_path / "own.hdf5", "w") as own:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            own[key] = file[key][:]
    args = arguments(td3_bc, tmp_path / "own.hdf5", steps=20, seeds=2)
    td3_bc.train(args)
    out = capsys.readouterr().out
    assert "not evaluated" in out and "actor_loss" in out
    record = json.loads(checkpoint_of(tmp_path).with_name("record-seed=1.json").read_text())
    assert record["score"] is None and record["curve"][-1]["losses"]["critic_loss"] > 0
    with pytest.raises(UserError, match="cannot be evaluated: no environment is known"):
        evaluate.evaluate(evaluate.Args(checkpoint_of(tmp_path), episodes=1))
    with pytest.raises(UserError, match="--record keeps scores"):
        td3_bc.train(dataclasses.replace(args, record=True))
    *_, data, policy = load_agent(checkpoint_of(tmp_path))  # which acts all the same
    assert (data.obs_dim, data.act_dim, data.n_actions) == (11, 3, 0)
    assert policy(torch.zeros(2, 5, 11)).shape == (2, 5, 3)


def test_discrete_without_environment(small, tmp_path):
    with h5py.File(small.with_name("cartpole.hdf5")) as file, h5py.File(tmp_path / "own.hdf5", "w") as own:
        for key in ("observations", "rewards", "terminals", "timeouts"):
            own[key] = file[key][:]
        own["actions"] = file["actions"][:].ravel().astype(int)
    offline_dqn.train(offline_dqn.Args(env=str(tmp_path / "own.hdf5"), steps=2, batch_size=8))
    *_, data, policy = load_agent(checkpoint_of(tmp_path))
    assert (data.obs_dim, data.n_actions) == (4, 2) and set(policy(torch.randn(50, 4)).tolist()) <= {0, 1}


def test_minari_run(tmp_path, capsys, small):
    """A Minari id: its slashes stay out of the folder's name, and its raw return is called so."""
    data = bc.load(str(small))
    data.task = dataclasses.replace(data.task, ref_min=None, ref_max=None)
    data.keep([0, 1])
    export_minari(data, "test/cheetah/medium-v0")
    bc.train(arguments(bc, "test/cheetah/medium-v0", steps=10))
    out = capsys.readouterr().out
    assert "every score below is the raw return" in out and ": return " in out.splitlines()[-1]
    assert (tmp_path / "runs/bc/minari/test-cheetah-medium-v0").is_dir()
    returns, data, _ = evaluate.evaluate(evaluate.Args(checkpoint_of(tmp_path), episodes=1))
    assert data.task.name == "test/cheetah/medium-v0" and np.isfinite(returns).all()


def test_not_finite(small, tmp_path, monkeypatch):
    """A NaN stops the run, names the step, and leaves the checkpoint before it."""
    args = arguments(td3_bc, small, steps=10)
    td3_bc.train(args)
    before = checkpoint_of(tmp_path).read_bytes()
    critic_loss, calls = td3_bc.critic_loss, []

    def poisoned(*words):
        calls.append(1)
        return critic_loss(*words) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(td3_bc, "critic_loss", poisoned)
    with pytest.raises(UserError, match=r"stopped being finite at step 14; the last good checkpoint is kept"):
        td3_bc.train(dataclasses.replace(args, steps=30, resume=True))
    assert checkpoint_of(tmp_path).read_bytes() == before
    monkeypatch.undo()
    with pytest.raises(UserError, match="stopped being finite at step .* no checkpoint yet"):
        td3_bc.train(dataclasses.replace(args, steps=20, lr=1e30))


@contextlib.contextmanager
def small_files(size):
    """As on a full disk: no file grows beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_while_checkpointing(small, tmp_path):
    args = arguments(bc, small, steps=10)
    bc.train(args)
    path = checkpoint_of(tmp_path)
    before = path.read_bytes()
    with small_files(200_000), pytest.raises(UserError, match="Cannot write"):
        bc.train(dataclasses.replace(args, steps=20, resume=True))
    assert path.read_bytes() == before
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]  # no half-written file is left


def test_bad_resumes(small, tmp_path, monkeypatch):
    args = arguments(bc, small, steps=10, resume=True)
    with pytest.raises(UserError, match="Nothing to resume"):
        bc.train(args)
    bc.train(dataclasses.replace(args, resume=False))
    with pytest.raises(UserError, match="there is one of seed=0,eval_every=10,eval_episodes=1"):
        bc.train(dataclasses.replace(args, lr=1.0))
    path = checkpoint_of(tmp_path)
    changed = path.parent.with_name("seed=0,batch_size=32,eval_every=10,eval_episodes=1")
    path.parent.rename(changed)  # a checkpoint in another run's folder is not taken for that run's
    with pytest.raises(UserError, match="other arguments: batch_size was 256"):
        bc.train(dataclasses.replace(args, batch_size=32))
    changed.rename(path.parent)
    with pytest.raises(UserError, match="already stands at step 10"):
        bc.train(dataclasses.replace(args, steps=5))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        bc.train(args)


@pytest.mark.parametrize(
    "word, value, message",
    [
        ("--steps", "0", "--steps must be at least 1"),
        ("--batch-size", "-1", "--batch-size must be at least 1"),
        ("--seed", "-1", "--seed must be at least 0"),
        ("--device", "mps", "not supported"),
        ("--device", "gpu", "Unknown --device 'gpu'"),
        ("--top-fraction", "2", r"--top-fraction must lie in \(0, 1\]"),
    ],
)
def test_bad_arguments(word, value, message):
    with pytest.raises(UserError, match=message):
        bc.train(tyro.cli(bc.Args, args=[word, value]))


def test_error_of_a_process():
    """One sentence, no traceback, exit status 1."""
    process = start("algorithms/bc.py", "--env", "halfcheetah-mediun")
    assert "nearest names are halfcheetah-medium" in error_of(process) and process.returncode == 1


@pytest.mark.parametrize("script", [iql, idql], ids=["iql", "idql"])
@pytest.mark.parametrize("expectile", [0.0, 1.0])
def test_bad_expectile(script, expectile, small):
    with pytest.raises(UserError, match=rf"--expectile must lie in \(0, 1\), not {expectile}"):
        script.train(arguments(script, small, steps=10, expectile=expectile))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda():
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no such CUDA device"):
        choose_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", FROM_DATA)
def test_cuda(name, small, tmp_path, monkeypatch):
    """On CUDA: trains, resumes, and its checkpoint acts on a CPU."""
    script = MODULES[name]
    args = arguments(script, small, steps=20, device="cuda")
    first, second = (stopped(script.train, 10), args), (script.train, dataclasses.replace(args, resume=True))
    trained(tmp_path, monkeypatch, "cuda", first, second)
    returns, _, _ = evaluate.evaluate(evaluate.Args(checkpoint_of(tmp_path / "cuda"), episodes=1))
    assert np.isfinite(returns).all()


def test_help_from_anywhere(tmp_path):
    """Of every script, from another folder; all in one process, so that the imports are paid for once."""
    code = """if True:
        import runpy, sys
        for path in sys.argv[1:]:
            print("\\n===", path)
            sys.argv = [path, "--help"]
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as end:
                assert not end.code
    """
    process = start("-c", code, *(ROOT / "algorithms" / f"{name}.py" for name in FOUND), cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    shown = out.split("\n===")[1:]
    assert len(shown) == len(FOUND)
    for text, name in zip(shown, FOUND):
        assert f"{name}.py" in text.splitlines()[0] and "--env" in text, text
        assert name not in TRAINED or ("--resume" in text and "--lr" in text), text


def test_bc_learns(collected, tmp_path):
    """BC of 20 episodes comes near their mean score, 41, in seconds."""
    bc.train(arguments(bc, collected, steps=2000, eval_every=2000, eval_episodes=5))
    assert load_checkpoint(checkpoint_of(tmp_path))["curve"][-1]["scores"][0] > 35
