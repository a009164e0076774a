"""TD3+BC: A Minimalist Approach to Offline Reinforcement Learning (Fujimoto & Gu, NeurIPS 2021), arXiv:2106.06860.

    critic   target = rew + gamma (1 - done) min_i Q'_i(next_obs, clip(pi'(next_obs) + noise))
             L_Q    = sum_i E (Q_i(obs, act) - target)^2
    actor    L_pi   = -lam E Q_1(obs, pi(obs)) + E (pi(obs) - act)^2,   lam = alpha / E|Q_1(obs, pi(obs))|  (Eq. 3, 5)

The critics are TD3's (Fujimoto et al. 2018, arXiv:1802.09477): two of them, target smoothing, delayed actor.
Differs from the paper as the authors' code does: Eq. 5 averages |Q| over the data's actions, here it is over pi's.
Usage: python algorithms/td3_bc.py --env halfcheetah-medium
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import load
from results.run import Run


@dataclass
class Args:
    env: str = "halfcheetah-medium"  # the task, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, collected
    seed: int = 0
    steps: int = 1_000_000  # updates
    batch_size: int = 256
    lr: float = 3e-4
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak step of the target networks
    eval_every: int = 5_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    policy_noise: float = 0.2  # TD3: standard deviation of the noise on target actions
    noise_clip: float = 0.5  # TD3: its bound
    policy_freq: int = 2  # TD3: critic updates to one of the actor
    alpha: float = 2.5  # weight of the critic's value against cloning (Eq. 5)


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """obs (B, O) -> act (B, A) in [-1, 1]."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, act_dim)

    def forward(self, obs):
        return self.net(obs).tanh()


class Critic(nn.Module):
    """Two Q-functions: obs (B, O), act (B, A) -> q (2, B)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.nets = nn.ModuleList(mlp(obs_dim + act_dim, 256, 256, 1) for _ in range(2))

    def forward(self, obs, act):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        return torch.stack([net(x).squeeze(-1) for net in self.nets])

    def first(self, obs, act):
        """The first Q-function alone, (B,): all that the actor needs."""
        return self.nets[0](torch.cat([obs, act], -1)).squeeze(-1)


def policy(actor, obs):
    """The action to evaluate: obs (B, O) -> act (B, A)."""
    return actor(obs)


def critic_loss(args, batch, critic, critic_target, actor_target):
    with torch.no_grad():
        noise = (torch.randn_like(batch.act) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_act = (actor_target(batch.next_obs) + noise).clamp(-1, 1)  # (B, A)
        next_q = critic_target(batch.next_obs, next_act)  # (2, B)
        assert next_q.shape == (2, len(batch.rew))
        target = batch.rew + args.gamma * (1 - batch.done) * next_q.amin(0)  # (B,)
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()


def actor_loss(args, batch, actor, q1):
    act = actor(batch.obs)  # (B, A)
    q = q1(batch.obs, act)  # (B,)
    lam = args.alpha / q.abs().mean().detach()  # (Eq. 5)
    return -lam * q.mean() + F.mse_loss(act, batch.act)  # (Eq. 3)


def train(args):
    run = Run(__file__, args)
    data = load(args.env, args.source, run.device)
    data.normalize_obs()  # (Eq. 4)

    O, A = data.obs_dim, data.act_dim
    actor, actor_target = Actor(O, A).to(run.device), Actor(O, A).to(run.device)
    critic, critic_target = Critic(O, A).to(run.device), Critic(O, A).to(run.device)
    for target, net in ((actor_target, actor), (critic_target, critic)):
        target.load_state_dict(net.state_dict())
        target.requires_grad_(False)
    actor_opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True)
    critic_opt = torch.optim.Adam(critic.parameters(), args.lr, fused=True)
    losses = {}  # () tensors, of the last update of each

    def update(step):
        batch = data.sample(args.batch_size)
        loss = critic_loss(args, batch, critic, critic_target, actor_target)
        critic_opt.zero_grad()
        loss.backward()
        critic_opt.step()
        losses["critic_loss"] = loss.detach()

        if step % args.policy_freq == 0:
            loss = actor_loss(args, batch, actor, critic.first)
            actor_opt.zero_grad()
            loss.backward(inputs=list(actor.parameters()))  # the critic's weights need no gradient here
            actor_opt.step()
            losses["actor_loss"] = loss.detach()
            with torch.no_grad():  # or the targets would drag the whole history of the networks along
                for target, net in ((actor_target, actor), (critic_target, critic)):
                    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), args.tau)
        return losses

    state = dict(actor=actor, actor_target=actor_target, critic=critic, critic_target=critic_target)
    for step in run.steps(data, **state, actor_opt=actor_opt, critic_opt=critic_opt):
        losses = update(step)
        run.watch(losses)
        if run.due(step):
            run.report(step, losses, data.evaluate(lambda obs: policy(actor, obs), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
