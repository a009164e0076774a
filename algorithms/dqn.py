"""DQN: Human-level control through deep reinforcement learning (Mnih et al., Nature 2015), double: arXiv:1509.06461.

    target = rew + gamma (1 - done) Q'(next_obs, argmax_a Q(next_obs, a))
    L      = E huber(Q(obs, act) - target)           so that no error's gradient is beyond [-1, 1]
    act    = argmax_a Q(obs, a), with probability epsilon any;   Q' is Q as it was at the last copy

Online: it acts while it learns. Its snapshots and logs of actions are the data of cartpole-replay and minatar-*.
Differs from Nature's code: double (van Hasselt et al. 2016); the schedule is MinAtar's (Young & Tian 2019,
arXiv:1903.03176): an update a frame and not one in four, a copy every 1,000, epsilon at 0.1 after 100,000 frames, as
many in the buffer; RMSprop adds its eps outside the root, as MinAtar's code does; the loss is the batch's mean, no sum.
Usage: python algorithms/dqn.py --env minatar-breakout --steps 1000000
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import GAMES, ActionLog, Dataset, find_task
from results.run import Run


@dataclass
class Args:
    env: str = "cartpole"  # the game: cartpole, minatar-breakout, ...
    seed: int = 0
    steps: int = 1_000_000  # environment steps
    batch_size: int = 32
    lr: float = 2.5e-4
    gamma: float = 0.99  # discount
    target_every: int = 1_000  # steps between copies of the network into its target
    eval_every: int = 10_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    start_steps: int = 5_000  # uniformly random actions, before the first update
    buffer_size: int = 100_000
    update_every: int = 1  # environment steps to an update
    epsilon: float = 0.1  # probability of a random action, in the end
    epsilon_steps: int = 100_000  # after the first update, until it is down from 1
    snapshot_every: int = 0  # write the network every so many steps (0: never), for datasets/policies/
    log_actions: bool = False  # keep the actions in the checkpoint, from which all transitions can be replayed


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def encoder(obs_shape):
    """What comes before the linear layers, and their sizes: convolutions as published, for MinAtar's grids and for
    Atari's frames of 84 x 84; nothing for vectors."""
    if len(obs_shape) == 1:
        return nn.Identity(), (*obs_shape, 256, 256)
    C, H, _ = obs_shape
    filters = [(C, 16, 3)] if H == 10 else [(C, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3)]
    layers = [layer for sizes in filters for layer in (nn.Conv2d(*sizes), nn.ReLU(inplace=True))]
    return nn.Sequential(nn.Unflatten(-1, obs_shape), *layers, nn.Flatten()), (1024, 128) if H == 10 else (3136, 512)


class Critic(nn.Module):
    """obs (B, O) -> q (B, A)."""

    def __init__(self, obs_shape, n_actions):
        super().__init__()
        self.encoder, sizes = encoder(obs_shape)
        self.q = mlp(*sizes, n_actions)

    def forward(self, obs):
        return self.q(self.encoder(obs))


def policy(obs, critic):
    """The action to evaluate, the greedy one: obs (B, O) -> act (B,)."""
    return critic(obs).argmax(-1)


def critic_loss(args, batch, critic, critic_target):
    with torch.no_grad():
        next_act = critic(batch.next_obs).argmax(-1, keepdim=True)  # (B, 1), by the one network
        next_q = critic_target(batch.next_obs).gather(-1, next_act).squeeze(-1)  # (B,), judged by the other
        target = batch.rew + args.gamma * (1 - batch.done) * next_q
    q = critic(batch.obs).gather(-1, batch.act[:, None]).squeeze(-1)  # (B,)
    return F.smooth_l1_loss(q, target)


def save_policy(path, critic):
    """Weights as float16 arrays of one small file, with which datasets/collect.py acts."""
    np.savez(path, **{name: weight.half().cpu().numpy() for name, weight in critic.state_dict().items()})


def train(args):
    run = Run(__file__, args)
    task = find_task(args.env, GAMES)
    env, data = task.make_env(), Dataset.buffer(task, min(args.buffer_size, args.steps), run.device)

    critic = Critic(data.obs_shape, data.n_actions).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    critic_opt = torch.optim.RMSprop(critic.parameters(), args.lr, alpha=0.95, eps=0.01, centered=True)

    def update(copy):
        batch = data.sample(args.batch_size)
        loss = critic_loss(args, batch, critic, critic_target)
        critic_opt.zero_grad()
        loss.backward()
        critic_opt.step()
        if copy:
            with torch.no_grad():  # or the target would drag the whole history of the critic along
                torch._foreach_copy_(list(critic_target.parameters()), list(critic.parameters()))
        return {"critic_loss": loss.detach()}

    losses, obs, log = {"critic_loss": torch.zeros(())}, None, ActionLog()
    state = dict(buffer=data, critic=critic, critic_target=critic_target)
    state |= dict(log=log) if args.log_actions else {}
    for step in run.steps(data, **state, critic_opt=critic_opt):
        if args.snapshot_every and (step - 1) % args.snapshot_every == 0:  # the first is the untrained network
            save_policy(run.folder / f"policy-{step - 1:07d}.npz", critic)
        if obs is None:  # seeded by the step, so that a resumed run meets the same start states
            seed = 10_000_000 * args.seed + step
            obs, _ = env.reset(seed=seed)
            log.start(seed)
        explored = min(1.0, max(0, step - args.start_steps) / args.epsilon_steps)
        if torch.rand(()) < 1 - (1 - args.epsilon) * explored:
            action = torch.randint(data.n_actions, ()).item()
        else:
            with torch.no_grad():
                action = policy(torch.as_tensor(obs, dtype=torch.float32, device=run.device)[None], critic).item()
        next_obs, rew, terminated, truncated, _ = env.step(action)
        log.took(action)
        log.earn(rew)
        data.add(obs, action, rew, next_obs, terminated)
        run.resumable = terminated or truncated
        obs = None if run.resumable else next_obs

        if step > args.start_steps and step % args.update_every == 0:
            losses = update(step % args.target_every == 0)
        run.watch(losses)
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, critic), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
