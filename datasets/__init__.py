"""The shared library of datasets: `load(env)` returns a Dataset of tensors on the training device."""

import sys

import farama_notifications

# gymnasium-robotics would print above every output that some of its rewards changed; tasks/d4rl_envs.py mends those.
farama_notifications.notifications.pop("gymnasium_robotics", None)

from datasets.action_log import ActionLog
from datasets.catalog import BODIES, GAMES, TASKS, Task, UserError, find_task
from datasets.collect import load_expert
from datasets.dataset import Batch, Dataset, ReturnBatch, SarsaBatch
from datasets.loading import load
from datasets.store import cache_dir, write_whole
from datasets.tasks import dark_room, icu_sepsis, text
from datasets.tasks.gridworlds import find_world
from datasets.vector_env import Envs

__all__ = [
    "BODIES",
    "GAMES",
    "TASKS",
    "ActionLog",
    "Batch",
    "Dataset",
    "Envs",
    "ReturnBatch",
    "SarsaBatch",
    "Task",
    "UserError",
    "cache_dir",
    "dark_room",
    "find_task",
    "find_world",
    "icu_sepsis",
    "load",
    "load_expert",
    "text",
    "write_whole",
]


def _show(kind, error, traceback):
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _show  # exit status 1, as for any exception
