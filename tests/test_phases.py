"""What scripts with an offline and an online phase rest on: room behind the data, the start from a checkpoint of the
offline sister, the exact resume within both phases."""

import dataclasses
import json

import h5py
import numpy as np
import pytest
import torch
from test_scripts import MODULES, arguments, assert_equal, checkpoint_of, trained

from algorithms import iql, iql_finetune
from datasets import Dataset, UserError, find_task
from results.checkpoint import load_checkpoint
from results.run import Run

BOTH = [name for name, module in MODULES.items() if hasattr(module.Args, "offline_steps")]


def made(n, room, share=None):
    """n rows of zeros but for the reward, which is the row's number; observations with mean 1 and deviation 2."""
    rows = torch.zeros(n, 2 * 3 + 2 + 2)
    data = Dataset(find_task("hopper-medium"), "", "", rows, [n], 3, 2)
    data.rew = torch.arange(float(n))
    data.obs_mean, data.obs_std = torch.ones(3), torch.full((3,), 2.0)
    data.make_room(room, share)
    return data


def add(data, *numbers):
    for i in numbers:
        data.add(np.full(3, 5.0), np.zeros(2), i, np.full(3, -1.0), i == 7)


def test_room_behind_the_data():
    """What is added is normalized as the data are, fills the room, and then replaces the oldest that was added."""
    data = made(4, 3)
    assert len(data) == 4 and data.rew.tolist() == [0, 1, 2, 3]
    add(data, 5, 6)
    assert len(data) == 6 and data.rew.tolist() == [0, 1, 2, 3, 5, 6]
    add(data, 7, 8, 9)
    assert len(data) == 7 and data.rew.tolist() == [0, 1, 2, 3, 8, 9, 7]
    assert data.obs[4:].eq(2).all() and data.next_obs[4:].eq(-1).all() and data.obs[:4].eq(0).all()
    assert data.done.tolist() == [0, 0, 0, 0, 0, 0, 1]
    other = made(4, 3)
    other.load_state_dict(data.state_dict())
    assert len(data.state_dict()["rows"]) == 3 and torch.equal(other.rows, data.rows)
    for each in (data, other):
        add(each, 10)
    assert torch.equal(other.rows, data.rows) and data.rew.tolist() == [0, 1, 2, 3, 8, 9, 10]
    assert data.normalized(np.array([[5.0, 1.0, -1.0]])).tolist() == [[2, 0, -1]]


def test_share_of_the_data():
    """All rows alike without a share; with one, so many of each batch are of the data, from the first addition on."""
    torch.manual_seed(0)
    for share in (None, 0.25):
        data = made(30, 10, share)
        assert data.sample(4000).rew.max() == 29
        add(data, *range(100, 110))
        rew = data.sample(4000).rew
        assert (rew[:1000] < 30).all() == (share is not None)
        drawn = torch.bincount(rew.long(), minlength=110)
        expected = np.r_[np.full(30, 100 if share is None else 1000 / 30), np.full(10, 100 if share is None else 300)]
        counts = drawn[np.r_[0:30, 100:110]].numpy()
        assert counts.sum() == 4000 and ((counts - expected) ** 2 / expected).sum() < 80  # chi-square of 39, 1e-4
        assert data.sample(8, 3).obs.shape == (3, 8, 3)
    assert data.sample(8, 3).rew[:, :2].max() < 30 <= data.sample(8, 3).rew[:, 2:].min()


def pretrained(small, tmp_path, monkeypatch, **changes):
    """A checkpoint of iql.py after ten updates."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "offline" / "runs"))
    iql.train(arguments(iql, small, steps=10, batch_size=32, **changes))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "online" / "runs"))
    return checkpoint_of(tmp_path / "offline")


def test_starts_from_the_offline_sister(small, tmp_path, monkeypatch):
    """Its networks, targets, Adam's moments, curve and step, but not its learning rate, which had fallen; the record
    says which script, and tells the steps of the two phases apart. Then it resumes as any run does."""
    path, first, steps = pretrained(small, tmp_path, monkeypatch, lr=1e-3), [], Run.steps

    def steps_seen(run, data, stride=1, **state):
        for step in steps(run, data, stride, **state):
            if not first:
                first.append({name: item.state_dict() for name, item in state.items()})
                torch.save(first[0], tmp_path / "first.pt")
            yield step

    monkeypatch.setattr(Run, "steps", steps_seen)
    args = arguments(iql_finetune, small, batch_size=32, lr=1e-3, checkpoint=str(path), steps=40, eval_every=20, seed=5)
    iql_finetune.train(args)
    saved, start = load_checkpoint(path), torch.load(tmp_path / "first.pt")
    assert saved["state"]["opt"]["param_groups"][0]["lr"] < 1e-8
    assert [group["lr"] for group in start["opt"]["param_groups"]] == [1e-3, 1e-3]
    assert_equal(saved["state"]["opt"]["state"], start["opt"]["state"])
    for name in ("actor", "critic", "critic_target", "value"):
        assert_equal(saved["state"][name], start[name])
    assert len(start["buffer"]["rows"]) == 0

    end = checkpoint_of(tmp_path / "online")
    assert end.parent.name.endswith("checkpoint=iql") and "offline_steps=10," in end.parent.name
    record = json.loads((end.parent / "record-seed=5.json").read_text())
    assert (record["steps"], record["args"]["offline_steps"], record["args"]["checkpoint"]) == (40, 10, "iql")
    assert [(p["step"], p["env_step"]) for p in record["curve"]] == [(10, 0), (20, 10), (40, 30), (50, 40)]
    assert record["curve"][0]["returns"] == np.round(saved["curve"][0]["returns"][0], 3).tolist()
    iql_finetune.train(dataclasses.replace(args, steps=50, resume=True))
    assert load_checkpoint(end)["step"] == 60


def test_bad_checkpoints(small, tmp_path, monkeypatch):
    path = pretrained(small, tmp_path, monkeypatch, seeds=2)
    start = lambda **changes: iql_finetune.train(arguments(iql_finetune, small, steps=10, batch_size=32, **changes))
    with pytest.raises(UserError, match=r"is of --seeds 2; what is wanted is one of iql.py --seeds 1\."):
        start(checkpoint=str(path))
    with pytest.raises(UserError, match="There is no checkpoint /nowhere"):
        start(checkpoint="/nowhere")
    saved = load_checkpoint(path)
    saved["args"]["seeds"] = 1
    for changes, message in (
        ({"algorithm": "td3_bc"}, r"is of td3_bc.py; --checkpoint takes one of iql.py\."),
        (
            {"task": saved["task"] | {"name": "walker2d-medium"}},
            "is of walker2d-medium .* is of hopper-medium",
        ),
        ({"fingerprint": "other"}, r"is of hopper-medium \(data other\), and this run is of hopper-medium \(data "),
        ({"args": saved["args"] | {"beta": 7.0, "gamma": 0.5}}, "must share: gamma is 0.5, beta is 7.0"),
    ):
        torch.save(saved | changes, tmp_path / "changed.pt")
        with pytest.raises(UserError, match=message):
            start(checkpoint=str(tmp_path / "changed.pt"))


@pytest.mark.parametrize("name", [name for name in MODULES if name in (*BOTH, "rlpd")])
def test_no_environment(name, small, tmp_path):
    """A file of one's own, and nothing to act in: it stops before it learns."""
    with h5py.File(small) as file, h5py.File(tmp_path / "own.hdf5", "w") as own:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            own[key] = file[key][:]
    with pytest.raises(UserError, match="cannot be evaluated: no environment is known"):
        MODULES[name].train(arguments(MODULES[name], tmp_path / "own.hdf5", steps=20))
    assert not list((tmp_path / "runs").rglob("*"))


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", BOTH)
def test_killed_in_either_phase(name, short, tmp_path, monkeypatch):
    """Without a chance to save: once on the data, once within an episode. The end is that of a run left alone."""
    script, watch, kills = MODULES[name], Run.watch, []
    args = arguments(script, short, batch_size=16, eval_every=10, steps=60)
    first, second = args.offline_steps - 3, args.offline_steps + 52
    whole = trained(tmp_path, monkeypatch, "whole", (script.train, args))

    def killing(run, losses):
        if run.step + 1 in kills:
            raise Killed
        watch(run, losses)

    monkeypatch.setattr(Run, "watch", killing)
    for kills[:], least, resume in (([first], 10, False), ([second], args.offline_steps + 1, True)):
        with pytest.raises(Killed):
            trained(tmp_path, monkeypatch, "parts", (script.train, dataclasses.replace(args, resume=resume)))
        assert least <= load_checkpoint(checkpoint_of(tmp_path / "parts"))["step"] < kills[0]
    kills.clear()
    parts = trained(tmp_path, monkeypatch, "parts", (script.train, dataclasses.replace(args, resume=True)))
    assert whole["step"] == parts["step"] == args.offline_steps + 60
    assert len(whole["state"]["buffer"]["rows"]) == 60
    assert_equal(whole["state"], parts["state"])
