"""Worlds small enough to enumerate, as arrays in float64: gridworlds, for what is computed and not sampled.

A map is rows of cells: `#` is a wall and no state, S the start (without one, every cell but a goal), G a goal, which is
never left, ~ mud, : gravel, _ floor with a wall along its lower side, anything else floor. A move goes up, down, left
or right, and stays where there is a wall; with probability `wind` it goes in one of the four directions at random
instead. Each step in a cell earns what its terrain is worth, so that a policy's value, discounted and over `horizon`
steps, is visits @ rew.

    open            random starts and some mud and gravel: its reward can be told from what an expert does
    left, right     a wall with one gap, at its left or its right end: what is learned in the one is tried in the other
"""

import dataclasses
import difflib
from pathlib import Path

import numpy as np
import torch

from datasets.catalog import UserError

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
TERRAINS = " G~:"  # floor, goal, mud, gravel
REWARDS = 0.0, 1.0, -0.5, -0.2  # of a step in each
MAPS = {
    "open": ("  ~   ", "  ~ : ", "    : ", " ::  G", "    ~ ", " ~    "),
    "left": ("       G", "        ", "        ", " _______", "        ", "        ", "        ", "       S"),
    "right": ("       G", "        ", "        ", "_______ ", "        ", "        ", "        ", "       S"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """S states, A = 4 actions, K features; all tensors float64."""

    name: str
    rows: tuple[str, ...]  # of the map
    cells: list[tuple[int, int]]  # row and column of each state
    move: torch.Tensor  # (S, A, S) probability of each next state
    start: torch.Tensor  # (S,) probability of each first state
    rew: torch.Tensor  # (S,) the true reward of a step there
    features: torch.Tensor  # (S, K)
    gamma: float
    horizon: int  # T, steps of an episode

    def visits(self, policy):
        """Expected visits of each state, discounted: policy (T, S, A), probabilities -> (T, S)."""
        at, visits = self.start, []
        for t, probs in enumerate(policy):
            visits.append(self.gamma**t * at)
            at = (at[:, None] * probs).flatten() @ self.move.flatten(0, 1)
        return torch.stack(visits)

    def value(self, policy):
        """The true value of a policy (T, S, A) -> float."""
        return (self.visits(policy).sum(0) @ self.rew).item()

    def optimum(self, rew):
        """A policy that no other beats under the reward (S,) or (S, A), by value iteration: (T, S, A). Actions that are
        equally good share."""
        next_value, policy = torch.zeros_like(self.rew), []
        for _ in range(self.horizon):
            q = rew.reshape(len(rew), -1) + self.gamma * self.move @ next_value  # (S, A)
            next_value = q.amax(1)
            best = (q > next_value[:, None] - 1e-9).to(q)
            policy.append(best / best.sum(1, keepdim=True))
        return torch.stack(policy[::-1])

    def sample(self, policy, episodes, generator=None):
        """Trajectories of a policy (T, S, A): states and actions, (episodes, T) each."""
        draw = lambda probs: torch.multinomial(probs, 1, generator=generator)[:, 0]
        state, states, acts = draw(self.start.expand(episodes, -1)), [], []
        for probs in policy:
            states.append(state)
            acts.append(draw(probs[state]))
            state = draw(self.move[state, acts[-1]])
        return torch.stack(states, 1), torch.stack(acts, 1)

    def show(self, values):
        """The map with a number in each cell, (S,) -> text."""
        texts = {cell: f"{value:7.2f}" for cell, value in zip(self.cells, values.tolist())}
        lines = [[texts.get((i, j), "      #") for j in range(len(row))] for i, row in enumerate(self.rows)]
        return "\n".join(map("".join, lines))


def make_world(name, rows, features="cell", wind=0.1, gamma=0.95, horizon=50):
    """The World of a map. features: "cell", one for each; "terrain", one for each kind; or an array (S, K).

    UserError: no goal, ragged rows, features of another size, a wind or discount that is none.
    """
    if not (0 <= wind <= 1 and 0 < gamma <= 1):
        raise UserError(f"--wind must lie in [0, 1] and --gamma in (0, 1], not {wind} and {gamma}.")
    if len({len(row) for row in rows}) != 1:
        raise UserError(f"The rows of the map of {name} must be equally long; fill them up with # or spaces.")
    if not any("G" in row for row in rows):
        raise UserError(f"The world {name} has no goal: mark a cell of its map with G.")
    cells = [(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if cell != "#"]
    index, marks = {cell: s for s, cell in enumerate(cells)}, [rows[i][j] for i, j in cells]
    S = len(cells)
    move = torch.zeros(S, len(MOVES), S, dtype=torch.float64)
    for (i, j), s in index.items():
        for a, (down, right) in enumerate(MOVES):
            upper = index.get((min(i, i + down), j), s)
            stays = marks[s] == "G" or (down and marks[upper] == "_")
            move[s, a, s if stays else index.get((i + down, j + right), s)] = 1
    move = (1 - wind) * move + wind * move.mean(1, keepdim=True)
    first = "S" if "S" in marks else "".join({*marks} - {"G"})
    start = torch.tensor([mark in first for mark in marks], dtype=torch.float64)
    kinds = torch.tensor([max(TERRAINS.find(mark), 0) for mark in marks])
    rew = torch.tensor(REWARDS, dtype=torch.float64)[kinds]
    if isinstance(features, str):
        made = {"cell": torch.eye(S), "terrain": torch.eye(len(TERRAINS))[kinds]}
        if features not in made:
            raise UserError(
                f"Unknown features '{features}'; use cell, terrain, or a .npy file with a row of each cell."
            )
        features = made[features]
    features = torch.as_tensor(features).to(torch.float64)
    if features.ndim != 2 or len(features) != S:
        raise UserError(
            f"The features are of shape {tuple(features.shape)}; the world {name} has {S} cells and needs ({S}, K)."
        )
    return World(name, tuple(rows), cells, move, start / start.sum(), rew, features, gamma, horizon)


def find_world(name, features="cell", wind=0.1, gamma=0.95, horizon=50):
    """The world of that name, or of a text file with its map; features may be a .npy file, too."""
    path = Path(name)
    if name not in MAPS and not path.is_file():
        near = ", ".join(difflib.get_close_matches(name, MAPS, n=3, cutoff=0))
        raise UserError(f"Unknown --env '{name}': neither a text file with a map nor one of the worlds {near}.")
    rows = MAPS[name] if name in MAPS else path.read_text().splitlines()
    if features.endswith(".npy"):
        try:
            features = np.load(features, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot read --features {features} ({error}).") from None
    return make_world(path.stem, rows, features, wind, gamma, horizon)
