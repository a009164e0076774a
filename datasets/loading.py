"""load(): which source a name means, and which is at hand."""

import re
from pathlib import Path

from datasets import collect, d4rl
from datasets.catalog import UserError, find_task
from datasets.store import read_hdf5

SOURCES = ("auto", "d4rl", "minari", "collected")


def load(env, source="auto", device="cpu", eval_env="", discrete=False):
    """The Dataset called `env` on `device`, said aloud in a line: source, size, mean return.

    env: a task's name ("halfcheetah-medium"), a Minari id ("mujoco/hopper/medium-v0"), or an HDF5 file in D4RL's
    layout, which is evaluated in the Gymnasium environment `eval_env`.
    source: "d4rl", the published file, downloaded if need be; "collected", collected here if need be, in minutes;
    "auto", the former if it is there or its server answers within seconds, else the latter. Minari ids: "minari".
    discrete: whether the caller is for discrete actions; others are for continuous ones; None: it is for both.
    Raises UserError, in one sentence, for an unknown name or source, unusable data, an unusable cache.
    """
    if source not in SOURCES:
        raise UserError(f"Unknown --source '{source}'; known are {', '.join(SOURCES)}.")
    is_file = env.endswith((".hdf5", ".h5"))
    if eval_env and not is_file:
        raise UserError(f"--eval-env goes with an HDF5 file; {env} brings its own environment.")
    if is_file:
        data = read_hdf5(Path(env), device, eval_env)
    elif source == "minari" or re.fullmatch(r"[\w.-]+/.+-v\d+", env):
        if source not in ("auto", "minari"):
            raise UserError(f"{env} is a Minari id: --source must be auto or minari, not {source}.")
        from datasets import minari_io  # here, because Minari takes a second to import

        data = minari_io.load(env, device)
    else:
        task = find_task(env)
        source = choose(task) if source == "auto" else source
        data = (d4rl if source == "d4rl" else collect).load(task, device)
    if data.n_actions and discrete is False:
        raise UserError(f"{env} has {data.n_actions} discrete actions; this algorithm is for continuous ones.")
    if discrete and not data.n_actions:
        raise UserError(f"{env} has continuous actions; this algorithm is for discrete ones, say cartpole-replay.")
    print(data.describe())
    if not data.task.evaluable:
        print(f"Policies are not evaluated: {data.task.refusal or 'no environment given, see --eval-env'}.")
    elif data.task.ref_min is None:
        print(f"{data.task.name} has no reference scores: every score below is the raw return.")
    return data


def choose(task):
    """The source of `task` that is at hand: "d4rl" if its file is there or its server answers, else "collected"."""
    if not task.d4rl_file:
        return "collected"
    if d4rl.local_file(task).exists() or d4rl.reachable(task):
        return "d4rl"
    if not collect.can_collect(task):
        raise UserError(
            f"{task.name} exists only as D4RL's file, which is not at {d4rl.local_file(task)}, "
            f"and {d4rl.address(task)} cannot be reached."
        )
    print(f"D4RL's file of {task.name} is not here and its server cannot be reached: using collected data.")
    return "collected"
