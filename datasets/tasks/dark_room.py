"""Tasks to learn within a context, many side by side, and how an algorithm learned each: bandits, rooms in the dark.

bandit       ten arms pay 1, each with a chance of its own below 0.6, the good one, an odd arm in training and an even
             one where it is held out, above 0.7; an episode is one pull
dark-room    a room of 9 x 9 cells (dark-room-5: 5 x 5), entered in its middle; each step on the goal pays 1, and
             nothing shows where it is; 20 steps (10)
key-to-door  9 x 9 cells, entered anywhere; the key pays 1, the door after it 1, and nothing shows either; 50 steps

What is observed is the cell; acts are to stay, up, right, down, left. A history is all that a learner did on one task,
from knowing nothing to knowing how: upper confidence bounds on bandits, else tabular Q-learning, of whose episodes
every so manieth is kept. Of the tasks some are held out, so that nobody who imitates histories has seen them learned.

    data = load_histories("dark-room-5", "source")       # made on the first call, in seconds to minutes
    world = data.world(data.held_out_tasks)              # to act in
"""

import hashlib
import io

import h5py
import numpy as np
import torch

from datasets.errors import UserError
from datasets.store import cache_dir, write_whole
from datasets.tasks.text import Data

MOVES = np.array([(0, 0), (-1, 0), (0, 1), (1, 0), (0, -1)])  # (row, column)
MAKER = 2  # to be raised when other histories are made of the same settings
HISTORIES = ("source", "noise", "expert")


class World:
    """n tasks side by side, whose next episode begins by itself: `obs` (n,) int64, what is seen now; `after` (n,), what
    the last step led to, which is `obs` unless an episode has ended there."""

    stages = 1  # of an episode: rewards after which a place is worth something else, and 1

    def __init__(self, tasks, seed=0):
        self.tasks, self.n, self.rng = tasks, len(tasks), np.random.default_rng(seed)
        self.begin()

    def begin(self):
        self.obs, self.time = self.start(), 0

    def step(self, act):
        """act (n,) int64 -> rew (n,) float64; `obs` is then that of the next step."""
        rew = self.move(act)
        self.after = self.obs
        self.time += 1
        if self.time == self.length:
            self.begin()
        return rew


class Bandit(World):
    """tasks (n, 10): each arm's chance."""

    n_obs, n_actions, length = 1, 10, 1
    episodes, every = 100, 1  # of a history; the share of them that is kept

    @staticmethod
    def all_tasks(rng):
        """500 to learn and 100 held out."""
        chances, arms = rng.uniform(0, 0.6, (600, 10)), 2 * rng.integers(5, size=600)
        arms[:500] += 1
        chances[np.arange(600), arms] = rng.uniform(0.7, 1, 600)
        return chances[:500], chances[500:]

    def start(self):
        return np.zeros(self.n, np.int64)

    def move(self, act):
        return (self.rng.random(self.n) < self.tasks[np.arange(self.n), act]).astype(float)

    def best(self):
        """What an expert would do now, (n,)."""
        return self.tasks.argmax(1)


class DarkRoom(World):
    """tasks (n,): the goal's cell."""

    size, n_actions, length = 9, 5, 20
    episodes, every = 600, 20
    n_obs = property(lambda self: self.size**2)

    @classmethod
    def all_tasks(cls, rng):
        """Each cell once, a fifth of them held out."""
        cells = rng.permutation(cls.size**2)
        cut = len(cells) * 4 // 5
        return cells[:cut], cells[cut:]

    def start(self):
        return np.full(self.n, self.size**2 // 2)

    def go(self, act):
        place = np.stack([self.obs // self.size, self.obs % self.size], 1) + MOVES[act]
        row, column = place.clip(0, self.size - 1).T
        self.obs = row * self.size + column

    def move(self, act):
        self.go(act)
        return (self.obs == self.tasks).astype(float)

    def best(self):
        return self.toward(self.tasks)

    def toward(self, goal):
        down, right = goal // self.size - self.obs // self.size, goal % self.size - self.obs % self.size
        return np.where(down != 0, np.where(down > 0, 3, 1), np.where(right != 0, np.where(right > 0, 2, 4), 0))


class SmallDarkRoom(DarkRoom):
    size, length, episodes, every = 5, 10, 300, 10


class KeyToDoor(DarkRoom):
    """tasks (n, 2): the cells of key and door."""

    length, episodes, every, stages = 50, 2_000, 40, 3

    @classmethod
    def all_tasks(cls, rng):
        """1,000 to learn and 100 held out."""
        tasks = np.stack(np.divmod(rng.permutation(cls.size**4), cls.size**2), 1)
        tasks = tasks[tasks[:, 0] != tasks[:, 1]]
        return tasks[:1_000], tasks[1_000:1_100]

    def start(self):
        self.has_key, self.done = np.zeros(self.n, bool), np.zeros(self.n, bool)
        return self.rng.integers(self.size**2, size=self.n)

    def move(self, act):
        self.go(act)
        finds = ~self.has_key & (self.obs == self.tasks[:, 0])
        opens = self.has_key & ~self.done & (self.obs == self.tasks[:, 1])
        self.has_key |= finds
        self.done |= opens
        return (finds | opens).astype(float)

    def best(self):
        return self.toward(np.where(self.has_key, self.tasks[:, 1], self.tasks[:, 0]))


WORLDS = {"bandit": Bandit, "dark-room": DarkRoom, "dark-room-5": SmallDarkRoom, "key-to-door": KeyToDoor}


def upper_confidence(world, episodes, rng):
    """Pulls the arm of the highest mean so far + sqrt(log t / 2 pulls), each once at first. A learner, as those below:
    it yields acts (n,) and is sent rewards."""
    pulls, paid = np.zeros((2, world.n, world.n_actions))
    for t in range(episodes):
        bound = paid / np.maximum(pulls, 1) + np.sqrt(np.log(t + 1) / (2 * np.maximum(pulls, 1e-9)))
        act = (bound + 1e-9 * rng.random(bound.shape)).argmax(1)  # ties at random
        rew = yield act
        pulls[np.arange(world.n), act] += 1
        paid[np.arange(world.n), act] += rew


def q_learning(world, episodes, rng, lr=0.5, gamma=0.9):
    """Tabular, each task its own; of the actions all are random at first, and none in the last fifth. An episode's end
    is a time-out, and not terminal."""
    rows = np.arange(world.n)
    q = 1e-3 * rng.random((world.n, world.stages, world.n_obs, world.n_actions))
    for episode in range(episodes):
        stage = np.zeros(world.n, int)
        for _ in range(world.length):
            obs, random = world.obs, rng.random(world.n) < 1 - 1.25 * episode / episodes
            act = np.where(random, rng.integers(world.n_actions, size=world.n), q[rows, stage, obs].argmax(1))
            rew = yield act
            next_stage = np.minimum(stage + (rew > 0), world.stages - 1)
            target = rew + gamma * q[rows, next_stage, world.after].max(1)
            q[rows, stage, obs, act] += lr * (target - q[rows, stage, obs, act])
            stage = next_stage


def falling_noise(world, episodes, rng):
    """An expert, of whose actions all are random at first and none at last: Zisman et al. 2024, arXiv:2312.12275."""
    for episode in range(episodes):
        for _ in range(world.length):
            random = rng.random(world.n) < 1 - episode / max(1, episodes - 1)
            yield np.where(random, rng.integers(world.n_actions, size=world.n), world.best())


def expert(world, episodes, rng):
    for _ in range(episodes * world.length):
        yield world.best()


def play(world, learner):
    """What a learner does and gets: obs, act (n, steps) int64, rew (n, steps) float64."""
    obs, acts, rews = [], [], []
    act = next(learner)
    while act is not None:
        obs.append(world.obs.copy())
        acts.append(act)
        rews.append(world.step(act))
        try:
            act = learner.send(rews[-1])
        except StopIteration:
            act = None
    return [np.stack(x, 1) for x in (obs, acts, rews)]


def split(kind):
    """The tasks of the histories, some 1,000, and those held out, some 100; where they are fewer, each some times."""
    parts = zip(kind.all_tasks(np.random.default_rng(0)), (1_000, 100))
    return [np.repeat(tasks, max(1, number // len(tasks)), 0) for tasks, number in parts]


def make(world, history, seed):
    """The histories of a world's tasks: obs, act, rew (n, steps), of every so manieth episode."""
    rng, episodes, every = np.random.default_rng(seed), world.episodes, world.every
    if history != "source":  # which needs no time to find out
        learner, every = {"noise": falling_noise, "expert": expert}[history](world, episodes // every, rng), 1
    else:
        learner = (upper_confidence if isinstance(world, Bandit) else q_learning)(world, episodes, rng)
    kept = [x.reshape(world.n, -1, world.length)[:, ::every] for x in play(world, learner)]
    return [x.reshape(world.n, -1) for x in kept]


class Histories(Data):
    """Histories of the tasks to learn: `obs`, `act` int64, `rew` float32, tensors (n, steps); and, of the tasks held
    out, each as often as makes a hundred, what the source got, `source_rew` (m, steps)."""

    def __init__(self, name, history, arrays, device):
        self.kind, self.history = WORLDS[name], history
        _, self.held_out_tasks = split(self.kind)
        obs, act, rew, self.source_rew = arrays
        super().__init__(name, history, *map(torch.from_numpy, arrays))
        self.obs, self.act = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (obs, act))
        self.rew = torch.from_numpy(rew).float().to(device)

    def world(self, tasks, seed=0):
        return self.kind(tasks, seed)


def load_histories(name, history="source", device="cpu"):
    """The Histories of a world, made and cached on the first call. history: of the source algorithm; of an expert with
    falling noise; of the expert. UserError for a name that is not known."""
    if name not in WORLDS:
        raise UserError(f"Unknown --env '{name}': {', '.join(WORLDS)}.")
    kind = WORLDS[name]
    settings = MAKER, name, history, kind.episodes, kind.every, kind.length
    path = cache_dir() / f"{name}-{history}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}.hdf5"
    if not path.exists():
        _write(path, kind, history)
    try:
        with h5py.File(path) as file:
            arrays = [file[key][:] for key in ("obs", "act", "rew", "source_rew")]
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and it is made again.") from None
    return Histories(name, history, arrays, device)


def _write(path, kind, history):
    tasks, held_out = split(kind)
    print(f"{path.stem}: {len(tasks):,} histories are made, once.")
    obs, act, rew = make(kind(tasks, 1), history, 1)
    _, _, source_rew = make(kind(held_out, 2), "source", 2)
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        file["obs"], file["act"] = obs.astype(np.uint8), act.astype(np.uint8)
        file["rew"], file["source_rew"] = rew.astype(np.uint8), source_rew.astype(np.uint8)
    write_whole(path, image.getbuffer())
