"""Every task this repository knows: environment, reference scores, time limit.

A normalized score is 100 * (return - ref_min) / (ref_max - ref_min): 0 is a random policy, 100 an expert.
D4RL's names, files, reference scores and time limits are in d4rl.csv (from Farama-Foundation/D4RL, d4rl/infos.py and
the registrations of its environments).
"""

import csv
import dataclasses
import difflib
import re
import warnings
from pathlib import Path

import gymnasium
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import FilterObservation, FlattenObservation, RescaleAction, TransformAction

from datasets.errors import UserError
from datasets.tasks import icu_sepsis, mazes, minatar


@dataclasses.dataclass(frozen=True)
class Task:
    name: str  # as D4RL spells it, without the newest version: "halfcheetah-medium"; or a Minari id, or a file's name
    env_id: str = ""  # the Gymnasium environment that policies are evaluated in; "": there is none
    ref_min: float | None = None  # mean return of a random policy; None: no reference, scores are raw returns
    ref_max: float | None = None  # mean return of an expert
    max_episode_steps: int | None = 1000  # None: as the environment has it
    env_args: dict = dataclasses.field(default_factory=dict)  # for gymnasium.make
    env_spec: str = ""  # instead of env_id, its time limit and env_args: the environment as JSON, as Minari keeps it
    obs_keys: tuple = ()  # of an observation that is a dictionary, the parts to use; (): all
    obs_dim: int = 0  # of the data; 0: not known beforehand
    act_dim: int = 0
    d4rl_file: str = ""  # of D4RL's data, relative to its server
    rew_shift: float = 0.0  # what papers add to the rewards of the data (AntMaze: -1), as scripts do; scores do not
    refusal: str = ""  # why a policy for these data cannot be evaluated here
    obs_shape: tuple = ()  # of pixels, (channels, height, width), which observations hold in a row; (): no pixels

    def __post_init__(self):
        object.__setattr__(self, "obs_keys", tuple(self.obs_keys))  # JSON, in which files keep a task, has lists
        object.__setattr__(self, "obs_shape", tuple(self.obs_shape))
        # Checkpoints and files older than the folder tasks/ name its modules without it.
        object.__setattr__(self, "env_id", re.sub(r"^datasets\.(mazes|d4rl_envs):", r"datasets.tasks.\1:", self.env_id))

    @property
    def evaluable(self):
        return bool(self.env_id or self.env_spec) and not self.refusal

    def make_env(self):
        """A new environment: observations (O,), actions (A,) in [-1, 1] or 0 … n - 1, truncated at the time limit."""
        if not self.evaluable:
            raise UserError(f"{self.name} cannot be evaluated: {self.refusal or 'no environment is known for it'}.")
        try:
            env = self._make()
        except (gymnasium.error.Error, ImportError) as error:
            raise UserError(f"Cannot make the environment of {self.name}: {str(error).splitlines()[0]}") from None
        space = env.observation_space
        if isinstance(space, spaces.Dict) and self.obs_keys:
            env = FilterObservation(env, self.obs_keys)
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            env = FlattenObservation(env)
        space = env.action_space
        if isinstance(space, spaces.Discrete) and space.start:
            env = TransformAction(env, lambda act: act + space.start, spaces.Discrete(space.n))
        elif isinstance(space, spaces.Box) and not ((space.low == -1).all() and (space.high == 1).all()):
            env = RescaleAction(env, -1.0, 1.0)
        return env

    def _make(self):
        with warnings.catch_warnings():
            # v4 is called out of date, but its dynamics are those of D4RL's data; v5 changed them.
            warnings.simplefilter("ignore", DeprecationWarning)
            if self.env_spec:
                return gymnasium.make(EnvSpec.from_json(self.env_spec))
            if ":" not in self.env_id and self.env_id not in gymnasium.registry:
                import gymnasium_robotics

                gymnasium.register_envs(gymnasium_robotics)
            limit = self.max_episode_steps
            return gymnasium.make(self.env_id, max_episode_steps=limit, disable_env_checker=True, **self.env_args)

    @property
    def family(self):
        """The name's first word: halfcheetah of halfcheetah-medium, and of mujoco/halfcheetah/medium-v0."""
        return self.name.split("/")[-2:][0].split("-")[0].lower()

    @property
    def score_name(self):
        return "normalized score" if self.ref_min is not None else "return"

    def score(self, returns):
        """Normalized score of a return or of an array of returns; the return itself without reference scores."""
        if self.ref_min is None:
            return returns
        return 100 * (returns - self.ref_min) / (self.ref_max - self.ref_min)


ENVS = {  # what D4RL's tasks are evaluated in, by the first part of their names
    "halfcheetah": {"obs_dim": 17, "act_dim": 6, "env_id": "HalfCheetah-v4"},
    "hopper": {"obs_dim": 11, "act_dim": 3, "env_id": "Hopper-v4"},
    "walker2d": {"obs_dim": 17, "act_dim": 6, "env_id": "Walker2d-v4"},
    # 84 of D4RL's 111 observations are contact forces, which its MuJoCo 2.0 left at 0 (D4RL's issue 143).
    "ant": {
        "obs_dim": 111,
        "act_dim": 8,
        "env_id": "Ant-v4",
        "env_args": {"use_contact_forces": True, "contact_force_range": [0.0, 0.0]},
    },
    "pen": {"obs_dim": 45, "act_dim": 24, "env_id": "datasets.tasks.d4rl_envs:D4RL/AdroitPen-v1"},
    "door": {"obs_dim": 39, "act_dim": 28, "env_id": "datasets.tasks.d4rl_envs:D4RL/AdroitDoor-v1"},
    "hammer": {"obs_dim": 46, "act_dim": 26, "env_id": "datasets.tasks.d4rl_envs:D4RL/AdroitHammer-v1"},
    "relocate": {"obs_dim": 39, "act_dim": 30, "env_id": "datasets.tasks.d4rl_envs:D4RL/AdroitRelocate-v1"},
    "antmaze": {"obs_dim": 29, "act_dim": 8, "env_id": "datasets.tasks.d4rl_envs:D4RL/AntMaze-v0", "rew_shift": -1.0},
    "maze2d": {"obs_dim": 4, "act_dim": 2, "env_id": "datasets.tasks.d4rl_envs:D4RL/Maze2d-v0"},
    "kitchen": {"obs_dim": 60, "act_dim": 9},
}
NEWEST = {}  # "hopper-medium": "hopper-medium-v2"


def d4rl_tasks():
    """All of D4RL's tasks by name, the newest version of each without its suffix: hopper-medium, hopper-medium-v0."""
    rows = list(csv.DictReader((Path(__file__).parent / "d4rl.csv").open()))
    NEWEST.update({re.sub(r"-v\d+$", "", row["name"]): row["name"] for row in rows})  # in the order of their versions
    tasks = {}
    for row in rows:
        base = re.sub(r"-v\d+$", "", row["name"])
        name = base if NEWEST[base] == row["name"] else row["name"]
        family, kind = base.split("-")[:2]
        env = dict(ENVS[family])
        if family in ("antmaze", "maze2d"):
            env["env_args"] = {"maze": kind} | ({"dense": True} if base.endswith("dense") else {})
        if family == "kitchen":  # its environment keeps the goal among the observations, today's does not
            env["refusal"] = f"today's FrankaKitchen has 59 other observations; use D4RL/kitchen/{kind}-v2 of Minari"
        scores = {"ref_min": float(row["ref_min"]), "ref_max": float(row["ref_max"])}
        limit = int(row["max_episode_steps"])
        tasks[name] = Task(name, **scores, max_episode_steps=limit, d4rl_file=row["file"], **env)
    return tasks


def maze_tasks():
    """A task of each map in tasks/mazes.py, by name. A return is 1 at the goal, else 0, and so is the reference."""
    tasks = {}
    for name, rows in mazes.MAPS.items():
        cells = [[1 if cell == "#" else 0 if cell == " " else cell for cell in row] for row in rows]
        tasks[name] = Task(
            name,
            "datasets.tasks.mazes:PointMazeFixedGoal-v3",
            ref_min=0.0,
            ref_max=1.0,
            max_episode_steps=mazes.LIMITS[name],
            env_args={"maze_map": cells, "continuing_task": False},
            obs_keys=("observation",),
            obs_dim=4,
            act_dim=2,
            rew_shift=-1.0,  # as in AntMaze
        )
    return tasks


def icu_tasks():
    """ICU-Sepsis by who acts in the data, seen as one-hot states or as the 47 features. 0 is uniform, 100 optimal."""
    tasks = {}
    for kind, ending, O in (("one-hot", "", icu_sepsis.S), ("features", "-features", 47)):
        for who in icu_sepsis.BEHAVIOURS:
            name = f"icu-sepsis-{who}{ending}"
            tasks[name] = Task(
                name,
                "datasets.tasks.icu_sepsis:ICUSepsis-v0",
                ref_min=0.7800709,
                ref_max=0.8751417,
                max_episode_steps=icu_sepsis.MAX_STEPS,
                env_args={"kind": kind},
                obs_dim=O,
                act_dim=1,
            )
    return tasks


def games():
    """What dqn.py plays, by name: CartPole, and MinAtar with the actions that matter in each game."""
    tasks = {"cartpole": Task("cartpole", "CartPole-v1", 22.0, 500.0, max_episode_steps=500, obs_dim=4, act_dim=1)}
    for game, channels in minatar.CHANNELS.items():
        name = f"minatar-{game}"
        tasks[name] = Task(
            name,
            "datasets.tasks.minatar:MinAtar-v0",
            max_episode_steps=minatar.MAX_STEPS,
            env_args={"game": game},
            obs_dim=channels * 100,
            act_dim=1,
            obs_shape=(channels, 10, 10),
        )
    return tasks


def game_tasks():
    """The data of games: what dqn.py's training played, and two of its snapshots."""
    tasks = {"cartpole-replay": dataclasses.replace(GAMES["cartpole"], name="cartpole-replay")}
    for quality in ("medium", "replay", "expert"):
        name = f"minatar-breakout-{quality}"
        tasks[name] = dataclasses.replace(GAMES["minatar-breakout"], name=name)
    return tasks


GAMES = games()
TASKS = d4rl_tasks() | maze_tasks() | icu_tasks() | game_tasks()
BODIES = {  # the environments themselves, for algorithms that learn online
    body: dataclasses.replace(TASKS[f"{body}-medium"], name=body, d4rl_file="")
    for body in ("halfcheetah", "hopper", "walker2d")
}


def find_task(name, tasks=TASKS):
    """The task called `name`; the suffix of D4RL's newest version is optional. UserError names the nearest."""
    key = name.lower()
    key = next((base for base, newest in NEWEST.items() if newest == key), key)
    if key in tasks:
        return tasks[key]
    near = difflib.get_close_matches(key, tasks, n=3, cutoff=0)
    raise UserError(f"Unknown --env '{name}'; the nearest names are {', '.join(near)}.")
