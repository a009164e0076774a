"""Environments side by side, in worker processes where there are cores for them."""

import contextlib
import multiprocessing
import os
import signal
import sys

import numpy as np

from datasets.catalog import UserError
from datasets.processes import cores, end_with

PER_WORKER = 10  # environments; with fewer, talking to a worker costs more than it saves


class Envs:
    """N environments of one task. What they return does not depend on the number of workers."""

    def __init__(self, task, n):
        self.envs = [task.make_env() for _ in range(n)]
        self.obs, self.running = [None] * n, set()

    def reset(self, seeds):
        """Starts an episode in each environment, a seed below 0 aside: seeds (N,) -> obs (N, O)."""
        for i, seed in enumerate(seeds):
            if seed >= 0:
                self.obs[i], _ = self.envs[i].reset(seed=int(seed))
                self.running.add(i)
        return np.array(self.obs)

    def step(self, act):
        """act (N, A) -> obs (N, O), rew (N,), terminated (N,), truncated (N,). An episode that is over stays as it is,
        with rewards of 0 and truncated."""
        rew, terminated = np.zeros(len(self.envs)), np.zeros(len(self.envs), bool)
        truncated = np.ones(len(self.envs), bool)
        for i in tuple(self.running):
            self.obs[i], rew[i], terminated[i], truncated[i], _ = self.envs[i].step(act[i])
            if terminated[i] or truncated[i]:
                self.running.remove(i)
        return np.array(self.obs), rew, terminated, truncated


class Workers:
    """The same as Envs, each worker process with a share of the environments."""

    def __init__(self, task, n, workers):
        # A forked worker is there at once, and touches neither torch nor CUDA; outside Linux forks are unsafe.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.shares = [slice(part[0], part[-1] + 1) for part in np.array_split(np.arange(n), workers)]
        self.pipes, self.processes = [], []
        for share in self.shares:
            pipe, theirs = context.Pipe()
            args = (theirs, task, share.stop - share.start, os.getpid())
            self.processes.append(context.Process(target=serve, args=args, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(pipe)

    def __del__(self):  # closing the pipes would not do: workers that were forked later hold copies
        for process in self.processes:
            process.terminate()

    def call(self, method, values):
        try:
            for pipe, share in zip(self.pipes, self.shares):
                pipe.send((method, values[share]))
            return [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError):
            raise UserError("A worker process of the environments died (out of memory?); --resume goes on.") from None

    def reset(self, seeds):
        return np.concatenate(self.call("reset", seeds))

    def step(self, act):
        return [np.concatenate(parts) for parts in zip(*self.call("step", act))]


def serve(pipe, task, n, parent):
    """A worker: answers until the parent closes its end or is no more."""
    end_with(parent)  # which closes nothing when it is killed: the other workers hold copies of the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    envs = Envs(task, n)
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, values = pipe.recv()
            pipe.send(getattr(envs, method)(values))


def make_envs(task, n):
    """Envs, or Workers where there are cores for them."""
    workers = min(cores(), n // PER_WORKER)
    return Workers(task, n, workers) if workers > 1 else Envs(task, n)
