"""SAC: Soft Actor-Critic Algorithms and Applications (Haarnoja et al. 2018), arXiv:1812.05905.

    critic   target = rew + gamma (1 - done) [min_i Q'_i(next_obs, next_act) - alpha log pi(next_act | next_obs)]
             L_Q    = sum_i E (Q_i(obs, act) - target)^2                                                      (Eq. 5)
    actor    L_pi   = E [alpha log pi(a | obs) - min_i Q_i(obs, a)],  a = tanh(mean + std * noise)            (Eq. 9)
    alpha    L_a    = -E log_alpha (log pi(a | obs) + target_entropy),  target_entropy = -A                   (Eq. 18)

Online: it acts while it learns. Its snapshots are the behaviour policies of the datasets collected here. As in the
authors' first code and rlkit, log_alpha stands for the alpha of Eq. 18, which the later code has. As in the later code,
whose actor sees the mean of the Q_i, the critics step before the actor's loss is taken; in the first, all step at once.
Usage: python algorithms/sac.py --env halfcheetah --steps 1000000
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
from datasets import BODIES, ActionLog, Dataset, find_task
from results.run import Run


@dataclass
class Args:
    env: str = "halfcheetah"  # the body: halfcheetah, hopper, walker2d
    seed: int = 0
    steps: int = 1_000_000  # environment steps, one update each
    batch_size: int = 256
    lr: float = 3e-4
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak step of the target networks
    eval_every: int = 5_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    start_steps: int = 10_000  # uniformly random actions, before the first update
    buffer_size: int = 1_000_000
    snapshot_every: int = 0  # write the policy every so many steps (0: never), for datasets/policies/
    log_actions: bool = False  # act with bytes and keep them in the checkpoint, from which the buffer can be replayed


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian squashed by tanh: obs (B, O) -> act (B, A) in [-1, 1] and its log density (B,)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, 2 * act_dim)

    def forward(self, obs):
        mean, log_std = self.net(obs).chunk(2, -1)  # (B, A) each
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        # log N(u) - log |d tanh(u) / du|, the latter as 2 (log 2 - u - softplus(-2 u)), which does not underflow
        log_prob = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - 2 * (np.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), log_prob.sum(-1)


class EnsembleLinear(nn.Module):
    """The linear layers of N networks: x (B, I) or (N, B, I) -> (N, B, O)."""

    def __init__(self, N, in_dim, out_dim):
        super().__init__()
        layers = [nn.Linear(in_dim, out_dim) for _ in range(N)]
        self.weight = nn.Parameter(torch.stack([layer.weight.data.T for layer in layers]))  # (N, I, O)
        self.bias = nn.Parameter(torch.stack([layer.bias.data[None] for layer in layers]))  # (N, 1, O)

    def forward(self, x):
        return torch.baddbmm(self.bias, x.expand(len(self.weight), *x.shape[-2:]), self.weight)  # x @ weight + bias


class Critic(nn.Module):
    """Two Q-functions: obs (B, O), act (B, A) -> q (2, B)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        sizes = (obs_dim + act_dim, 256, 256, 1)
        self.layers = nn.ModuleList(EnsembleLinear(2, i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, obs, act):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        for layer in self.layers[:-1]:
            x = layer(x).relu_()  # (2, B, 256)
        return self.layers[-1](x).squeeze(-1)


def policy(obs, actor):
    """The action to evaluate, the squashed mean: obs (B, O) -> act (B, A)."""
    return actor.net(obs).chunk(2, -1)[0].tanh()


def critic_loss(args, batch, actor, critic, critic_target, alpha):
    with torch.no_grad():
        next_act, next_log_prob = actor(batch.next_obs)  # (B, A), (B,)
        next_q = critic_target(batch.next_obs, next_act).amin(0) - alpha * next_log_prob  # (B,)
        target = batch.rew + args.gamma * (1 - batch.done) * next_q
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()  # (Eq. 5)


def actor_loss(batch, actor, critic, alpha):
    act, log_prob = actor(batch.obs)  # (B, A), (B,)
    q = critic(batch.obs, act).amin(0)  # (B,)
    return (alpha * log_prob - q).mean(), log_prob.detach()  # (Eq. 9)


def alpha_loss(log_alpha, log_prob, target_entropy):
    return -(log_alpha * (log_prob + target_entropy)).mean()  # (Eq. 18)


def save_policy(path, actor):
    """Weights as float16 arrays of one small file, read by datasets/collect.py without PyTorch."""
    np.savez(path, **{name: weight.half().cpu().numpy() for name, weight in actor.net.state_dict().items()})


def train(args):
    run = Run(__file__, args)
    task = find_task(args.env, BODIES)
    env, data = task.make_env(), Dataset.buffer(task, min(args.buffer_size, args.steps), run.device)
    O, A = data.obs_dim, data.act_dim

    actor, critic = Actor(O, A).to(run.device), Critic(O, A).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    log_alpha = torch.zeros((), device=run.device, requires_grad=True)
    actor_opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True)
    critic_opt = torch.optim.Adam(critic.parameters(), args.lr, fused=True)
    alpha_opt = torch.optim.Adam([log_alpha], args.lr, fused=True)

    def update():
        batch = data.sample(args.batch_size)
        alpha = log_alpha.detach().exp()
        loss_q = critic_loss(args, batch, actor, critic, critic_target, alpha)
        critic_opt.zero_grad()
        loss_q.backward()
        critic_opt.step()

        loss_pi, log_prob = actor_loss(batch, actor, critic, alpha)
        actor_opt.zero_grad()
        loss_pi.backward(inputs=list(actor.parameters()))  # the critic's weights need no gradient here
        actor_opt.step()

        loss_alpha = alpha_loss(log_alpha, log_prob, -A)
        alpha_opt.zero_grad()
        loss_alpha.backward()
        alpha_opt.step()

        with torch.no_grad():  # or the targets would drag the whole history of the critics along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
        return {"critic_loss": loss_q.detach(), "actor_loss": loss_pi.detach(), "alpha": alpha}

    losses, obs, log = {"alpha": log_alpha.detach().exp()}, None, ActionLog()
    state = dict(buffer=data, actor=actor, critic=critic, critic_target=critic_target, log_alpha=log_alpha)
    state |= dict(log=log) if args.log_actions else {}
    for step in run.steps(data, **state, actor_opt=actor_opt, critic_opt=critic_opt, alpha_opt=alpha_opt):
        if args.snapshot_every and (step - 1) % args.snapshot_every == 0:  # the first is the untrained policy
            save_policy(run.folder / f"policy-{step - 1:07d}.npz", actor)
        if obs is None:  # seeded by the step, so that a resumed run meets the same start states
            seed = 10_000_000 * args.seed + step
            obs, _ = env.reset(seed=seed)
            log.start(seed)
        if step <= args.start_steps:
            action = torch.rand(A) * 2 - 1
        else:
            with torch.no_grad():
                action = actor(torch.as_tensor(obs, dtype=torch.float32, device=run.device)[None])[0][0].cpu()
        if args.log_actions:
            action = log.rounded(action, env.unwrapped.data)
        next_obs, rew, terminated, truncated, _ = env.step(action.numpy())
        log.earn(rew)
        data.add(obs, action, rew, next_obs, terminated)
        run.resumable = terminated or truncated
        obs = None if run.resumable else next_obs

        if step > args.start_steps:
            losses = update()
        run.watch(losses)
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
