"""GAIfO: GAIL's update on pairs of observations, and that the expert's actions are out of reach."""

import dataclasses

import h5py
import numpy as np
import pytest
import torch
from test_gail import arguments, expert, plain, sigmoid, whole_update  # noqa: F401
from test_scripts import assert_equal, stopped, trained

from algorithms import gaifo
from datasets import UserError


@pytest.mark.parametrize("reward", ["-logD", "log(1-D)", "sum"])
def test_update(reward, small, monkeypatch):
    sees = lambda obs, act, next_obs: torch.cat([obs, next_obs], -1)
    earns = {"-logD": lambda p: -p.log(), "log(1-D)": lambda p: (1 - p).log(), "sum": lambda p: (1 / p - 1).log()}
    whole_update(gaifo, small, monkeypatch, sees, plain, sigmoid, earns[reward], hidden=["act"], reward=reward)
    assert gaifo.Args().reward == "-logD"


def test_the_experts_actions_are_out_of_reach(expert, tmp_path, monkeypatch):  # noqa: F811
    """Other actions in the file, and the same run bit for bit; with other observations it is another."""
    args = arguments(expert, gaifo, steps=800, eval_episodes=1)
    runs = []
    for column in (None, "actions", "next_observations"):
        path = tmp_path / f"{column}" / "pendulum.hdf5"
        path.parent.mkdir()
        with h5py.File(expert) as old, h5py.File(path, "w") as new:
            for name in old:
                new[name] = old[name][:][::-1] if name == column else old[name][:]
        args = dataclasses.replace(args, env=str(path))
        runs.append(trained(tmp_path, monkeypatch, f"run {column}", (gaifo.train, args))["state"])
    assert_equal(*runs[:2])
    assert not np.array_equal(runs[0]["disc"]["0.weight"], runs[2]["disc"]["0.weight"])


def test_resume_is_exact(expert, tmp_path, monkeypatch):  # noqa: F811
    """And a resume changes no --steps, which the learning rate follows."""
    args = arguments(expert, gaifo, steps=1600, eval_episodes=1)
    whole = trained(tmp_path, monkeypatch, "whole", (gaifo.train, args))
    parts = (stopped(gaifo.train, 800), args), (gaifo.train, dataclasses.replace(args, resume=True))
    assert_equal(whole["state"], trained(tmp_path, monkeypatch, "parts", *parts)["state"])
    with pytest.raises(UserError, match="steps was 1600"):
        gaifo.train(dataclasses.replace(args, steps=2400, resume=True))


def test_bad_input(expert):  # noqa: F811
    with pytest.raises(UserError, match="--demos 5 are more than the 4 trajectories of pendulum"):
        gaifo.train(arguments(expert, gaifo, demos=5))
    with pytest.raises(UserError, match="--steps must be a multiple of --envs x --horizon, 800, not 1000"):
        gaifo.train(arguments(expert, gaifo, steps=1000))
