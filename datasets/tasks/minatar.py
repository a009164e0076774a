"""MinAtar (Young & Tian 2019, arXiv:1903.03176): five Atari games on 10 x 10 cells, a channel for each kind of thing.

Actions are those that matter in the game; with probability 0.1 the last one is repeated, as its paper has it.
The package MinAtar 1.0.15 (GPL-3) brings the games. Each game's own module is imported, which needs NumPy alone, not
its environment, which tries to draw, does not reset the action that sticks, and ends Freeway, whose 2,500 steps are a
time limit, as if it were lost: here that is a truncation.
"""

import importlib.util
from functools import cache
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium import spaces

from datasets.errors import UserError

CHANNELS = {"asterix": 4, "breakout": 4, "freeway": 7, "seaquest": 10, "space_invaders": 6}
MAX_STEPS = 5000  # of an episode; the games but Freeway have no limit
STICKY = 0.1


@cache
def game_module(game):
    """The package's module of a game. UserError without the package."""
    package = importlib.util.find_spec("minatar")
    if package is None:
        raise UserError("MinAtar's games need a package that is missing: pip install --no-deps MinAtar==1.0.15.")
    path = Path(package.submodule_search_locations[0]) / "environments" / f"{game}.py"
    spec = importlib.util.spec_from_file_location(f"minatar_{game}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class MinAtar(gymnasium.Env):
    """obs (C, 10, 10) uint8, zeros and ones; the same seed and actions give the same episode."""

    metadata = {"render_modes": [], "render_fps": 10}

    def __init__(self, game):
        self.game = game_module(game).Env(ramping=True)
        self.actions = self.game.minimal_action_set()
        self.observation_space = spaces.Box(0, 1, (CHANNELS[game], 10, 10), np.uint8)
        self.action_space = spaces.Discrete(len(self.actions))

    def obs(self):
        return self.game.state().transpose(2, 0, 1).astype(np.uint8)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.game.random = np.random.RandomState(seed)
        self.game.reset()
        self.last = self.actions[0]
        return self.obs(), {}

    def step(self, act):
        if self.game.random.rand() >= STICKY:
            self.last = self.actions[act]
        rew, over = self.game.act(self.last)
        timed_out = over and getattr(self.game, "terminate_timer", 0) < 0
        return self.obs(), float(rew), over and not timed_out, timed_out, {}


gymnasium.register("MinAtar-v0", entry_point="datasets.tasks.minatar:MinAtar")
