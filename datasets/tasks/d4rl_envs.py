"""D4RL's environments where today's packages have others: Adroit, AntMaze and Maze2d, to be made by Gymnasium.

Written against gymnasium-robotics 1.4.2 and Gymnasium 1.2.3; tests/test_catalog.py holds what D4RL's source says.
"""

import contextlib
import tempfile
from pathlib import Path

import gymnasium
import gymnasium_robotics
import numpy as np
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.utils import RecordConstructorArgs
from gymnasium_robotics.envs.maze.point import PointEnv

from datasets.tasks.mazes import MAPS

WALLS = {name.removeprefix("pointmaze-"): rows for name, rows in MAPS.items()} | {
    "open": ("#######", *["#rrrrr#"] * 3, "#######")
}
GOALS = {"umaze": (1, 1), "medium": (6, 6), "large": (7, 9), "open": (2, 3)}  # Maze2d's, (row, column)
ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
POINT = Path(gymnasium_robotics.__file__).parent / "envs" / "assets" / "point" / "point.xml"


class Adroit(gymnasium.Wrapper, RecordConstructorArgs):
    """gymnasium-robotics 1.4.2 rewards the distance from hand to object (0.1 times it) that D4RL punishes, mended in
    its pull request 220, and does not end pen's episode when the pen falls. Both follow from the observation."""

    def __init__(self, env, task):
        RecordConstructorArgs.__init__(self, task=task)
        gymnasium.Wrapper.__init__(self, env)
        self.task = task

    def step(self, action):
        obs, rew, terminated, truncated, info = self.env.step(action)
        if self.task == "pen":
            return obs, rew, terminated or bool(obs[26] < 0.075), truncated, info  # the pen's height
        away = {"door": obs[35:38], "hammer": obs[33:36] - obs[36:39], "relocate": obs[30:33]}[self.task]
        return obs, rew - 0.2 * np.linalg.norm(away), terminated, truncated, info


class AntMaze(gymnasium.Wrapper):
    """D4RL's ant, weaker than Gymnasium's, from the cell (1, 1) to the goal: reward 1 and the end of the episode there.

    obs (29,): the position as well. A fall does not end an episode. A cell is 4 wide, the start is (0, 0),
    columns run along x. The goal lies beyond the middle of its cell, by 0 to 1 and 0 to 0.5.
    """

    def __init__(self, maze):
        self.cell = 4.0 * (np.array((3, 1) if maze == "umaze" else GOALS[maze])[::-1] - 1)
        walls = [box(4 * (j - 1), 4 * (i - 1), 1, 2, 1) for i, j in cells(maze, "#")]
        weaker = {
            'timestep="0.01"': 'timestep="0.02"',
            'gear="150"': 'gear="30"',
            'density="5.0"': 'density="5.0" solimp=".8 .8 .01"',
        }
        with changed(ASSETS / "ant.xml", weaker, walls) as xml_file:
            ant = Ant(xml_file, terminate_when_unhealthy=False, exclude_current_positions_from_observation=False)
        super().__init__(ant)

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        noise = self.unwrapped.np_random.uniform(size=(2, 2))
        self.goal = np.maximum(self.cell + noise[0] + 0.5 * noise[1], 0)
        return obs, info

    def step(self, action):
        obs, _, _, truncated, info = self.env.step(np.clip(action, -1, 1))
        reached = bool(np.linalg.norm(obs[:2] - self.goal) <= 0.5)
        return obs, float(reached), reached, truncated, info


class Ant(AntEnv):
    metadata = {**AntEnv.metadata, "render_fps": 10}  # Gymnasium insists that it fits the time of a step


class Maze2d(gymnasium.Wrapper):
    """D4RL's ball, from a random cell to the goal. Reward 1 in each step near it; nothing ends. Rows run along x."""

    def __init__(self, maze, dense=False):
        self.dense, self.goal = dense, np.array(GOALS[maze], float)
        self.free = cells(maze, "rg")
        walls = [box(i + 1, j + 1, 0, 0.5, 0.2) for i, j in cells(maze, "#")]
        with changed(POINT, {'name="particle" pos="0 0 0"': 'name="particle" pos="1.2 1.2 0"'}, walls) as xml_file:
            super().__init__(PointEnv(xml_file))

    def reset(self, *, seed=None, options=None):
        _, info = self.env.reset(seed=seed, options=options)
        env, rng = self.unwrapped, self.unwrapped.np_random
        env.set_state(rng.choice(self.free) + rng.uniform(-0.1, 0.1, 2), 0.1 * rng.standard_normal(2))
        return env._get_obs()[0], info

    def step(self, action):
        obs, _, _, truncated, info = self.env.step(action)
        distance = np.linalg.norm(obs[:2] - self.goal)
        return obs, float(np.exp(-distance) if self.dense else distance <= 0.5), False, truncated, info


def cells(maze, kinds):
    return [(i, j) for i, row in enumerate(WALLS[maze]) for j, kind in enumerate(row) if kind in kinds]


def box(x, y, z, half_width, half_height):
    size = f"{half_width} {half_width} {half_height}"
    return f'<geom type="box" pos="{x} {y} {z}" size="{size}" contype="1" conaffinity="1"/>'


@contextlib.contextmanager
def changed(model, changes, boxes):
    """The name of a file with the XML `model` in which texts are exchanged and boxes added."""
    xml = model.read_text()
    for old, new in {**changes, "</worldbody>": "".join(boxes) + "</worldbody>"}.items():
        if old not in xml:
            raise RuntimeError(f"{model} has no {old}: another version of it than requirements.txt pins?")
        xml = xml.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:  # not a temporary file: Windows does not open one twice
        file = Path(folder, model.name)
        file.write_text(xml)
        yield str(file)


def make_antmaze(**env_args):  # gymnasium.register takes a function or an environment, not a wrapper
    return AntMaze(**env_args)


def make_maze2d(**env_args):
    return Maze2d(**env_args)


gymnasium.register("D4RL/AntMaze-v0", make_antmaze)
gymnasium.register("D4RL/Maze2d-v0", make_maze2d)
for _task in ("pen", "door", "hammer", "relocate"):
    gymnasium.register(
        f"D4RL/Adroit{_task.title()}-v1",
        f"gymnasium_robotics.envs.adroit_hand.adroit_{_task}:AdroitHand{_task.title()}Env",
        additional_wrappers=(Adroit.wrapper_spec(task=_task),),
    )
