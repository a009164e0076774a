"""Dataset: transitions as tensors on the training device."""

import contextlib
import functools
from typing import NamedTuple

import numpy as np
import torch

from datasets.catalog import UserError
from datasets.tasks import icu_sepsis
from datasets.vector_env import make_envs


@contextlib.contextmanager
def one_thread():
    """Torch on one CPU thread: between two small operations the others would spin on the cores that workers need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def apart(evaluate):
    """What a policy draws is drawn anew from the evaluation's seed, and takes nothing from the run's random numbers: a
    policy scores alike whenever it is evaluated, and a run trains alike however often."""

    @functools.wraps(evaluate)
    def evaluated(data, policy, episodes, seed, *words, **options):
        with torch.random.fork_rng([data.rows.device] if data.rows.is_cuda else []):
            torch.manual_seed(seed)
            return evaluate(data, policy, episodes, seed, *words, **options)

    return evaluated


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O)
    act: torch.Tensor  # (B, A), in [-1, 1]; of discrete actions the index, (B,) int64
    rew: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, O)
    done: torch.Tensor  # (B,), 1 where the episode terminated; a time-out is not a termination


class SarsaBatch(NamedTuple):
    """A Batch and what the data did next."""

    obs: torch.Tensor
    act: torch.Tensor
    rew: torch.Tensor
    next_obs: torch.Tensor
    done: torch.Tensor
    next_act: torch.Tensor  # (B, A), the action of next_obs; 0 after a termination


class ReturnBatch(NamedTuple):
    """A Batch and what came of it."""

    obs: torch.Tensor
    act: torch.Tensor
    rew: torch.Tensor
    next_obs: torch.Tensor
    done: torch.Tensor
    mc_return: torch.Tensor  # (B,), the return from this transition to the end of its episode; -inf: not known yet


class Dataset:
    """N transitions, each one row of a single table, so that a batch costs one gather.

    Columns are views of the table (`data.rew *= 0.1` changes the data): obs (N, O), act (N, A), rew (N,),
    next_obs (N, O), done (N,). `ends` (E,) holds, for each episode, the index after its last row.
    With discrete actions `n_actions` is their number, else 0; `act` then holds one index, (N, 1), which batches give
    as (B,) int64. Where observations recur, as states do, or frames, which are one row's next_obs and the next row's
    obs, `frames` (F, O) holds each once, in their own type; obs and next_obs then are its rows' numbers, (N, 1), which
    batches look up.
    Behind the rows of the data, `fixed` of them, there may be room for those of an online phase, `added` so far.
    `obs_mean` and `obs_std` (O,) are what `normalize_obs` applied, 0 and 1 before; whoever acts applies them too.
    """

    def __init__(self, task, source, fingerprint, rows, ends, obs_dim, act_dim, n_actions=0, frames=None):
        self.task, self.source, self.fingerprint = task, source, fingerprint
        self.rows, self.ends, self.obs_dim, self.act_dim = rows, np.asarray(ends), obs_dim, act_dim
        self.size, self.n_actions, self.frames = len(rows), n_actions, frames
        self.fixed, self.added, self.share = 0, 0, None  # see make_room
        self.batch_type = Batch  # what `sample` returns
        self.obs_mean = torch.zeros(obs_dim, device=rows.device)
        self.obs_std = torch.ones(obs_dim, device=rows.device)
        self._envs = None  # (how many, environments) of the last evaluation

    @classmethod
    def buffer(cls, task, capacity, device="cpu", n_actions=None):
        """An empty replay buffer of an online run; once it is full, `add` replaces the oldest transition. n_actions:
        of a task without an environment, which else tells the sizes."""
        if task.evaluable or n_actions is None:
            env = task.make_env()
            O, n_actions = env.observation_space.shape[0], int(getattr(env.action_space, "n", 0))
            A = 1 if n_actions else env.action_space.shape[0]
        else:
            O, A = task.obs_dim, 1 if n_actions else task.act_dim
        data = cls(task, "online", "", torch.zeros(0, device=device), [], O, A, n_actions)
        if task.obs_shape:  # each transition's two frames, one after the other
            data.frames = torch.zeros(2 * capacity, O, dtype=torch.uint8, device=device)
        data.rows = torch.zeros(capacity, 2 * data.width + A + 2, device=device)
        data.size = 0
        return data

    def make_room(self, n, share=None):
        """Room behind the data for n transitions, which `add` fills; then the oldest of them gives way to the next.
        Once there is one, `share` of each batch is of the data, the rest of what was added; None: all are drawn alike.
        """
        if share is not None and not 0 <= share < 1:
            raise UserError(f"--offline-share must lie in [0, 1), not {share}.")
        self.fixed, self.share = self.size, share
        self.rows = torch.cat([self.rows, self.rows.new_zeros(n, self.rows.shape[1])])

    def add(self, obs, act, rew, next_obs, done, *more):
        """One transition, its observations as the environment gives them; more: of the columns beyond a Batch's."""
        self.check_env(next_obs, rew)
        i = self.fixed + self.added % (len(self.rows) - self.fixed)
        if self.frames is not None:
            self.frames[2 * i : 2 * i + 2] = torch.as_tensor(np.stack([obs, next_obs]))
            obs, next_obs = [2 * i], [2 * i + 1]
        row = np.concatenate([obs, np.atleast_1d(act), [rew], next_obs, [done], more])
        self.rows[i] = torch.as_tensor(row, dtype=torch.float32)
        if self.frames is None:
            batch = self.split(self.rows[i])
            for part in batch.obs, batch.next_obs:
                part.sub_(self.obs_mean).div_(self.obs_std)
        self.added += 1
        self.size = min(self.fixed + self.added, len(self.rows))

    def state_dict(self):
        """What was added; torch saves all that a view is of, hence a clone."""
        state = {"rows": self.rows[self.fixed : self.size].clone(), "added": self.added}
        return state if self.frames is None else state | {"frames": self.frames[: 2 * self.size].clone()}

    def load_state_dict(self, state):
        self.added, self.size = state["added"], self.fixed + len(state["rows"])
        self.rows[self.fixed : self.size] = state["rows"]
        if self.frames is not None:
            self.frames[: 2 * self.size] = state["frames"]

    def __len__(self):
        return self.size

    @property
    def obs_shape(self):
        """What an observation is for a network: (O,), or (channels, height, width) of pixels."""
        return self.task.obs_shape or (self.obs_dim,)

    @property
    def width(self):
        """Of obs and of next_obs in a row."""
        return self.obs_dim if self.frames is None else 1

    def split(self, rows):
        """The columns of a block of rows, as views: a Batch, after `add_next_act` a SarsaBatch, and so on."""
        O, A = self.width, self.act_dim
        widths = [O, A, 1, O, 1, *{Batch: [], SarsaBatch: [A], ReturnBatch: [1]}[self.batch_type]]
        obs, act, rew, next_obs, done, *more = rows.split(widths, dim=-1)
        more = [column.squeeze(-1) for column in more] if self.batch_type is ReturnBatch else more
        return self.batch_type(obs, act, rew.squeeze(-1), next_obs, done.squeeze(-1), *more)

    obs = property(lambda self: self.split(self.rows[: self.size]).obs)
    act = property(lambda self: self.split(self.rows[: self.size]).act)
    next_obs = property(lambda self: self.split(self.rows[: self.size]).next_obs)
    done = property(lambda self: self.split(self.rows[: self.size]).done)

    @property
    def rew(self):
        return self.split(self.rows[: self.size]).rew

    @rew.setter
    def rew(self, value):  # lets `data.rew *= 0.1` work
        self.rew[:] = value

    def sample(self, batch_size, seeds=1):
        """A Batch drawn uniformly with replacement, indices drawn on the device; one for each of several agents,
        with a leading axis (seeds,). Where `make_room` was given a share, the data's part comes first."""
        shape, device = (batch_size,) if seeds == 1 else (seeds, batch_size), self.rows.device
        if self.share is None or not self.added:
            rows = torch.randint(self.size, shape, device=device)
        else:
            n = round(self.share * batch_size)
            of_data = torch.randint(self.fixed, (*shape[:-1], n), device=device)
            of_others = torch.randint(self.fixed, self.size, (*shape[:-1], batch_size - n), device=device)
            rows = torch.cat([of_data, of_others], -1)
        return self.batch(self.rows[rows])

    def batch(self, rows):
        """The columns of a block of rows as losses take them: observations looked up, discrete actions as indices."""
        batch = self.split(rows)
        if self.frames is not None:
            batch = batch._replace(obs=self.look_up(batch.obs), next_obs=self.look_up(batch.next_obs))
        return batch._replace(act=batch.act.squeeze(-1).long()) if self.n_actions else batch

    def look_up(self, numbers):
        """Observations (..., O) by their rows' numbers in `frames`, (..., 1)."""
        return self.frames[numbers.squeeze(-1).long()].to(self.rows.dtype)

    def returns(self):
        """Undiscounted return of each episode, (E,) float64."""
        starts = np.concatenate([[0], self.ends[:-1]])
        return np.add.reduceat(self.rew.cpu().double().numpy(), starts)

    def keep(self, episodes):
        """Keeps only these episodes, (E',) indices, in this order."""
        starts = np.concatenate([[0], self.ends[:-1]])
        spans = [np.arange(starts[e], self.ends[e]) for e in episodes]
        self.rows = self.rows[torch.from_numpy(np.concatenate(spans)).to(self.rows.device)]
        self.ends, self.size = np.cumsum([len(span) for span in spans]), len(self.rows)

    def keep_demos(self, n, every, seed):
        """Keeps `n` trajectories drawn at random, and of each every so manieth row, from a random one on."""
        if n > len(self.ends):
            raise UserError(f"--demos {n} are more than the {len(self.ends)} trajectories of {self.task.name}.")
        rng = np.random.default_rng(seed)
        self.keep(rng.choice(len(self.ends), n, replace=False))
        print(f"{n} demonstrations, mean return {self.returns().mean():.4g}, every {every}th pair")
        starts = np.concatenate([[0], self.ends[:-1]])
        rows = [np.arange(a + rng.integers(min(every, b - a)), b, every) for a, b in zip(starts, self.ends)]
        self.rows = self.rows[torch.from_numpy(np.concatenate(rows)).to(self.rows.device)]
        self.ends, self.size = np.cumsum([len(part) for part in rows]), len(self.rows)

    def add_next_act(self):
        """Gives each row the action of the row after it, so that `sample` returns SarsaBatches.

        After a termination nothing follows, and the action is 0. Where an episode was cut, its last row has a next
        observation but no next action, and is dropped.
        """
        last = torch.zeros(self.size, dtype=torch.bool, device=self.rows.device)
        last[self.ends - 1] = True
        next_act = self.act.roll(-1, 0)
        next_act[last] = 0
        kept = ~last | (self.done > 0)
        self.rows, self.batch_type = torch.cat([self.rows[: self.size], next_act], 1)[kept], SarsaBatch
        ends = np.unique(kept.cpu().numpy().cumsum()[self.ends - 1])  # an episode of one dropped row is no more
        self.ends, self.size = ends[ends > 0], len(self.rows)

    def add_returns(self, mc_return):
        """Gives each row what came of it, mc_return (N,) float64, so that `sample` returns ReturnBatches."""
        column = torch.from_numpy(mc_return).to(self.rows)[:, None]
        self.rows, self.batch_type = torch.cat([self.rows[: self.size], column], 1), ReturnBatch

    def set_returns(self, mc_return):
        """Of the transitions that were added last, as many as mc_return (T,) has."""
        room = len(self.rows) - self.fixed
        mc_return = mc_return[-room:]  # of a longer episode the rest has given way
        rows = self.fixed + (self.added - len(mc_return) + np.arange(len(mc_return))) % room
        self.rows[torch.from_numpy(rows).to(self.rows.device), -1] = torch.from_numpy(mc_return).to(self.rows)

    def normalize_obs(self, eps=1e-3):
        """(obs - mean) / (std + eps), in place, for obs and next_obs."""
        self.obs_mean, self.obs_std = self.obs.mean(0), self.obs.std(0) + eps
        self.obs.sub_(self.obs_mean).div_(self.obs_std)
        self.next_obs.sub_(self.obs_mean).div_(self.obs_std)

    def normalized(self, obs):
        """obs (..., O) of an environment -> as policies are given them, a tensor on the device."""
        return (torch.as_tensor(obs, dtype=torch.float32, device=self.rows.device) - self.obs_mean) / self.obs_std

    @torch.no_grad()
    @one_thread()
    @apart
    def evaluate(self, policy, episodes, seed, seeds=1, rewards=False, gamma=1.0):
        """Returns of `episodes` episodes, (episodes,) float64; of several agents, (seeds, episodes). None where the
        task has no environment.

        `policy` maps normalized obs (episodes, O) to act (episodes, A); of several agents, with leading axis (seeds,).
        The episodes of all agents run side by side with one policy call a step. The same seed gives the same start
        states, so that two evaluations of a run differ by the policy alone; agent k's are those of seed + k. With
        `rewards`, the policy is also given the reward (episodes,) of the step before, 0 at first. gamma: the returns'
        discount. Discrete actions are indices, (episodes,). Of ICU-Sepsis each return is the policy's exact value:
        nothing is sampled, and the policy may give probabilities (states, actions) instead.
        """
        shape = (episodes,) if seeds == 1 else (seeds, episodes)
        if not self.task.evaluable:
            return None
        if self.task.family == "icu":
            obs = torch.as_tensor(icu_sepsis.observe(np.arange(icu_sepsis.S), **self.task.env_args)).to(self.rows)
            act = policy(obs.expand(*shape[:-1], *obs.shape))
            table = act if act.is_floating_point() else torch.nn.functional.one_hot(act, self.n_actions)
            tables = table.view(-1, *table.shape[-2:]).double().cpu().numpy()
            values = [icu_sepsis.value(own, gamma) for own in tables]
            return np.repeat(values, episodes).reshape(shape)
        n = episodes * seeds
        if self._envs is None or self._envs[0] != n:
            self._envs = n, make_envs(self.task, n)
        envs = self._envs[1]
        obs = envs.reset(np.add.outer(1000 * (seed + np.arange(seeds)), np.arange(episodes)).ravel())
        rew, returns, running, discount = np.zeros(n), np.zeros(n), np.ones(n, bool), 1.0
        while running.any():
            x = self.normalized(obs).view(*shape, self.obs_dim)
            more = [torch.as_tensor(rew, dtype=torch.float32, device=x.device).view(shape)] if rewards else []
            act = policy(x, *more)
            act = act.long().view(n) if self.n_actions else act.clamp(-1, 1).view(n, self.act_dim)
            act = act.cpu().numpy()
            if not np.isfinite(act).all():
                raise UserError("The policy returns actions that are not finite; the run has diverged.")
            obs, rew, terminated, truncated = envs.step(act)
            self.check_env(obs, rew)
            returns += discount * rew
            discount *= gamma
            running &= ~(terminated | truncated)
        return returns.reshape(shape)

    def check_env(self, *values):
        """Stops where the environment has returned observations or rewards that are not finite."""
        if not all(np.isfinite(value).all() for value in values):
            raise UserError(
                f"The environment of {self.task.name} returned an observation or a reward that is not finite: its "
                "simulation has failed, or it is broken. --resume goes on from the last checkpoint."
            )

    def describe(self):
        """One line: source, size, mean return."""
        returns = self.returns()
        score = "" if self.task.ref_min is None else f" (normalized {self.score(returns.mean()):.1f})"
        return (
            f"{self.task.name}, source {self.source} (fingerprint {self.fingerprint}): {len(self):,} transitions, "
            f"{len(returns):,} episodes, mean return {returns.mean():.4g} ± {returns.std():.4g}{score}"
        )

    def score(self, returns):
        """Normalized score: 0 is a random policy, 100 an expert."""
        return self.task.score(returns)
