"""Navigation in mazes: pointmaze-{umaze, medium, large}, and stitch-{meet, gap}, which no single trajectory solves.

A policy pushes a ball and sees (x, y, vx, vy), not the goal, which is one fixed place. The reward is 1 at the goal,
where the episode terminates, else 0, so a score is the success rate in percent. Episodes start around the centre of an
"r" cell.

pointmaze: D4RL's maze2d in its maps, goals and time limits. The data are a wanderer's, as there: it heads for a random
cell, then for another, until time is up or it happens to come to the goal: in 53, 35 and 18 % of the episodes.

stitch: a winding corridor from the start S to J, and from there down to M and right to the goal G.

    . . . .                meet: trajectories S to M and M to G, which meet between J and M, in opposite directions.
    .     .                gap:  trajectories S to X, the upper right corner, and M to G: nothing in the cell above J.
    . S   J . G
          .                The start lies behind a wall: to do there as the second half does elsewhere does not help,
          M                nor does it help to do at J as the first half does.

Those of the first half stay at M (or X) until they time out, so that who imitates them stays there too.
"""

import itertools
from pathlib import Path

import gymnasium
import numpy as np

NOISE = 0.5  # standard deviation of the noise on actions, which are in [-1, 1]
NEAR = 0.2  # of a cell: so close to its target the ball has arrived
STAY = 50  # steps from arriving to the time-out of stitch's first half
WINDING = ("########", "#    ###", "# ## ###", "# r#  g#", "#### ###", "#### ###", "########")
MAPS = {  # wall, start (an evaluation's), goal; D4RL's goals
    "pointmaze-umaze": ("#####", "#grr#", "###r#", "#rrr#", "#####"),
    "pointmaze-medium": (
        "########",
        "#rr##rr#",
        "#rr#rrr#",
        "##rrr###",
        "#rr#rrr#",
        "#r#rr#r#",
        "#rrr#rg#",
        "########",
    ),
    "pointmaze-large": (
        "############",
        "#rrrr#rrrrr#",
        "#r##r#r#r#r#",
        "#rrrrrr#rrr#",
        "#r####r###r#",
        "#rr#r#rrrrr#",
        "##r#r#r#r###",
        "#rr#rrr#rgr#",
        "############",
    ),
    "stitch-meet": WINDING,
    "stitch-gap": WINDING,
}
LIMITS = dict(zip(MAPS, (300, 600, 800, 400, 400)))
SIZES = {name: 100_000 if name.startswith("stitch") else 1_000_000 for name in MAPS}
S, X, M, G = (3, 2), (1, 4), (5, 4), (3, 6)  # (row, column)
TRIPS = {"stitch-meet": ((S, M), (M, G)), "stitch-gap": ((S, X), (M, G))}  # trajectories from where to where, in turns


class FixedGoal(gymnasium.Wrapper):
    """Takes the environment's noise from the goal, which policies do not see, and leaves it on the start."""

    def __init__(self, env):
        super().__init__(env)
        Path(self.unwrapped.tmp_xml_file_path).unlink(missing_ok=True)  # which the environment would leave behind

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.unwrapped.goal = obs["desired_goal"] = self.unwrapped.maze.unique_goal_locations[0].copy()
        self.unwrapped.update_target_site_pos()
        return obs, info


gymnasium.register(
    "PointMazeFixedGoal-v3",
    entry_point="gymnasium_robotics.envs.maze.point_maze:PointMazeEnv",
    additional_wrappers=(FixedGoal.wrapper_spec(),),
)


def center(maze_map, cell):
    """The centre (x, y) of a cell (row, column), in the environment's coordinates; rows may be fractions."""
    return np.array([cell[1] + 0.5 - len(maze_map[0]) / 2, len(maze_map) / 2 - cell[0] - 0.5])


def cell_of(maze_map, pos):
    """The cell (row, column) around a position (x, y)."""
    return int(len(maze_map) / 2 - pos[1]), int(pos[0] + len(maze_map[0]) / 2)


def find_cells(maze_map, *kinds):
    return [(i, j) for i, row in enumerate(maze_map) for j, kind in enumerate(row) if kind in kinds]


def next_cells(free, target):
    """From every one of the cells `free` the next on a shortest way to `target`, {cell: cell}. Breadth first."""
    ways, queue = {target: target}, [target]
    for i, j in queue:
        for cell in ((i, j + 1), (i, j - 1), (i + 1, j), (i - 1, j)):
            if cell in free and cell not in ways:
                ways[cell] = (i, j)
                queue.append(cell)
    return ways


def find_ways(maze_map, target):
    """From every free cell the point to head for on a shortest way to `target`, {cell: (x, y)}."""
    root, free = (round(target[0]), target[1]), find_cells(maze_map, 0, "r", "g")
    ways = {cell: center(maze_map, after) for cell, after in next_cells(free, root).items()}
    return ways | {root: center(maze_map, target)}


def control(obs, point):
    """PD control: the action that brings the ball, obs = (x, y, vx, vy), to `point`. Gains as in D4RL."""
    return 10 * (point - obs[:2]) - obs[2:]


def rollout(task, transitions, seed):
    """`transitions` rows (obs, act, rew, next_obs, done, timeout), episode after episode, the last one cut to fit."""
    rng, env, maze_map = np.random.default_rng([seed, 0]), task.make_env(), task.env_args["maze_map"]
    trips, cells = TRIPS.get(task.name), find_cells(maze_map, 0, "r", "g")
    ways = {target: find_ways(maze_map, target) for target in cells + [target for _, target in trips or ()]}
    rows = []
    for start, target in itertools.cycle(trips or [(None, None)]):
        obs = env.reset(seed=int(rng.integers(2**31)), options={"reset_cell": start})[0].astype(np.float32)
        arrived, over = 0, False
        while not over:
            target = target or cells[rng.integers(len(cells))]
            act = control(obs, ways[target][cell_of(maze_map, obs)]) + NOISE * rng.standard_normal(2)
            act = act.clip(-1, 1).astype(np.float32)
            next_obs, rew, terminated, truncated, _ = env.step(act)
            next_obs = next_obs.astype(np.float32)
            arrived += np.hypot(*(center(maze_map, target) - next_obs[:2])) < NEAR
            if arrived and not trips:
                arrived, target = 0, None
            truncated = (truncated or arrived == STAY) and not terminated
            rows.append(np.concatenate([obs, act, [rew], next_obs, [terminated, truncated]]))
            obs, over = next_obs, terminated or truncated
        if len(rows) >= transitions:
            break
    rows = np.array(rows[:transitions], np.float32)
    rows[-1, -1] = not rows[-1, -2]  # an episode that is cut has timed out
    return rows


def draw(task, obs, ends, axis):
    """Draws up to 100 trajectories over the walls: obs (N, 4), not normalized; ends (E,), after each one's last row.

    The colour tells whether a trajectory begins in a cell where an evaluation may start.
    """
    maze_map, obs, ends = task.env_args["maze_map"], np.asarray(obs), np.asarray(ends)
    height, width = len(maze_map), len(maze_map[0])
    walls = np.array([[cell == 1 for cell in row] for row in maze_map])
    axis.imshow(walls, cmap="Greys", vmax=2, extent=(-width / 2, width / 2, -height / 2, height / 2))
    for k in np.random.default_rng(0).choice(len(ends), min(100, len(ends)), replace=False):
        path = obs[ends[k - 1] if k else 0 : ends[k], :2]
        i, j = cell_of(maze_map, path[0])
        axis.plot(*path.T, lw=0.5, alpha=0.6, color="C0" if maze_map[i][j] == "r" else "C1")
    for kind, marker in (("r", "ko"), ("g", "r*")):
        for cell in find_cells(maze_map, kind):
            axis.plot(*center(maze_map, cell), marker, ms=3 if kind == "r" else 12)
    axis.set(xticks=[], yticks=[], title=task.name)
