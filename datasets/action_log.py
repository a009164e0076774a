"""ActionLog: what repeats the training of a behaviour policy, in a hundredth of its replay buffer's bytes."""

import numpy as np
import torch


class ActionLog:
    """Each action as a byte; of each episode its seed, steps and return; and at every 25th step of an episode the
    simulator's state, so that another processor's rounding cannot drift far.

    act: (N, A) int8, 127 times the action. sim: (qpos, qvel) float64, a row each. episodes: (E, 3) float64.
    Of discrete actions act (N,) holds the indices and sim nothing: seeds and actions repeat those games to the bit.
    """

    def __init__(self):
        self.act, self.sim, self.episodes = [], [], []

    def start(self, seed):
        """An episode begins, whose environment was reset with `seed`."""
        self.episodes.append([seed, 0, 0.0])

    def rounded(self, act, sim):
        """The byte that stands for the tensor `act` (A,), as an action again; `sim`: MuJoCo's data before it acts."""
        if self.episodes[-1][1] % 25 == 0:
            self.sim.append(np.concatenate([sim.qpos, sim.qvel]))
        self.episodes[-1][1] += 1
        self.act.append((127 * act).round().char().numpy())
        return (127 * act).round() / 127

    def took(self, act):
        """The discrete action with this index."""
        self.episodes[-1][1] += 1
        self.act.append(np.int8(act))

    def earn(self, rew):
        self.episodes[-1][2] += rew

    def write(self, path):
        """Keeps a log of discrete actions as a small file, from which datasets/collect_discrete.py plays the games."""
        np.savez_compressed(path, act=np.array(self.act, np.uint8), episodes=np.array(self.episodes))

    def state_dict(self):
        return {name: torch.from_numpy(np.array(rows)) for name, rows in vars(self).items()}

    def load_state_dict(self, state):
        vars(self).update({name: list(rows.numpy()) for name, rows in state.items()})
