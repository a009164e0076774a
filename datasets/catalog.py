"""Every task this repository knows: environment, reference scores, time limit.

A normalized score is 100 * (return - ref_min) / (ref_max - ref_min): 0 is a random policy, 100 an expert.
Reference scores and time limits are D4RL's (Farama-Foundation/D4RL, d4rl/infos.py).
"""

import dataclasses
import difflib
import re
import warnings

import gymnasium


class UserError(Exception):
    """Something the user can put right: a script shows it as one sentence, without a traceback."""


@dataclasses.dataclass(frozen=True)
class Task:
    name: str  # as D4RL spells it, without the version: "halfcheetah-medium"
    env_id: str  # the Gymnasium environment that policies are evaluated in
    ref_min: float  # mean return of a random policy
    ref_max: float  # mean return of an expert
    max_episode_steps: int = 1000

    def make_env(self):
        """A new environment, truncated after `max_episode_steps`."""
        with warnings.catch_warnings():
            # v4 is called out of date, but its dynamics are those of D4RL's data; v5 changed them.
            warnings.simplefilter("ignore", DeprecationWarning)
            return gymnasium.make(self.env_id, max_episode_steps=self.max_episode_steps, disable_env_checker=True)

    def score(self, returns):
        """Normalized score of a return or of an array of returns."""
        return 100 * (returns - self.ref_min) / (self.ref_max - self.ref_min)


BODIES = {  # the environments themselves, for algorithms that learn online
    "halfcheetah": Task("halfcheetah", "HalfCheetah-v4", -280.178953, 12135.0),
    "hopper": Task("hopper", "Hopper-v4", -20.272305, 3234.3),
    "walker2d": Task("walker2d", "Walker2d-v4", 1.629008, 4592.3),
}
QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
TASKS = {
    f"{body}-{quality}": dataclasses.replace(task, name=f"{body}-{quality}")
    for body, task in BODIES.items()
    for quality in QUALITIES
}


def find_task(name, tasks=TASKS):
    """The task called `name`; D4RL's version suffix is optional ("hopper-medium-v2"). UserError names the nearest."""
    key = re.sub(r"-v\d+$", "", name.lower())
    if key in tasks:
        return tasks[key]
    near = difflib.get_close_matches(key, tasks, n=3, cutoff=0)
    raise UserError(f"Unknown --env '{name}'; the nearest names are {', '.join(near)}.")
