"""RLPD: Efficient Online Reinforcement Learning with Offline Data (Ball et al., ICML 2023), arXiv:2302.02948.

    batch    half from the data, half from what it has lived through itself: there is no offline phase
    critic   target = rew + gamma (1 - done) [min_Z Q'_i(next_obs, next_act) - alpha log pi(next_act | next_obs)]
             L_Q    = sum_i E (Q_i(obs, act) - target)^2,   Z: n_min of the n_critics, drawn anew for each update
    actor    L_pi   = E [alpha log pi(a | obs) - mean_i Q_i(obs, a)],   after utd updates of the critics
    alpha    L_a    = -E alpha (log pi(a | obs) + target_entropy),   target_entropy = -A / 2

SAC with layer norm in many critics, which learn utd times a step. As in the authors' code, the actor and alpha learn
from the last of the utd batches. Differs from it: PyTorch's initial weights; two hidden layers in every task's actor.
On a CPU take --utd 4 --n-critics 4: one core makes some 1.5 steps a second at the published size.
Usage: python algorithms/rlpd.py --env hopper-medium --steps 250000
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
from datasets import UserError, load
from results.run import Run


@dataclass
class Args:
    env: str = "halfcheetah-medium"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    eval_env: str = ""  # the Gymnasium environment to evaluate in, for an HDF5 file of your own
    seed: int = 0
    steps: int = 250_000  # environment steps
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
    start_steps: int = 5_000  # uniformly random actions, before the first update
    buffer_size: int = 1_000_000
    offline_share: float = 0.5  # of each batch, from the data
    utd: int = 20  # updates of the critics for each environment step
    n_critics: int = 10  # Q-functions (N)
    n_min: int | None = None  # the target is the lowest of so many of them; None, here and below: as in TUNED
    critic_layers: int | None = None  # hidden layers of the critics
    backup_entropy: bool | None = None  # the target holds the entropy of the next action too


TUNED = {  # "" for all tasks, then by family, then by task: README.md of github.com/ikostrikov/rlpd
    "": dict(n_min=2, critic_layers=2, backup_entropy=True),
    **dict.fromkeys(("antmaze", "pointmaze", "stitch"), dict(n_min=1, critic_layers=3, backup_entropy=False)),
    **dict.fromkeys(("pen", "door", "hammer", "relocate"), dict(critic_layers=3, backup_entropy=False)),
}


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
    """The linear layers of N networks: x (B, I) or (N, B, I) -> (N, B, O); some (K,): of these networks alone."""

    def __init__(self, N, in_dim, out_dim):
        super().__init__()
        layers = [nn.Linear(in_dim, out_dim) for _ in range(N)]
        self.weight = nn.Parameter(torch.stack([layer.weight.data.T for layer in layers]))  # (N, I, O)
        self.bias = nn.Parameter(torch.stack([layer.bias.data[None] for layer in layers]))  # (N, 1, O)

    def forward(self, x, some):
        weight, bias = self.weight[some], self.bias[some]
        return torch.baddbmm(bias, x.expand(len(weight), *x.shape[-2:]), weight)  # x @ weight + bias


class Critic(nn.Module):
    """N Q-functions with layer norm: obs (B, O), act (B, A) -> q (N, B); some (K,): of these alone, q (K, B)."""

    def __init__(self, obs_dim, act_dim, n_critics, hidden_layers):
        super().__init__()
        sizes = (obs_dim + act_dim, *[256] * hidden_layers, 1)
        self.layers = nn.ModuleList(EnsembleLinear(n_critics, i, o) for i, o in zip(sizes, sizes[1:]))
        self.scale = nn.Parameter(torch.ones(hidden_layers, n_critics, 1, 256))
        self.shift = nn.Parameter(torch.zeros(hidden_layers, n_critics, 1, 256))

    def forward(self, obs, act, some=slice(None)):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        for layer, scale, shift in zip(self.layers, self.scale, self.shift):
            x = F.layer_norm(layer(x, some), (256,), eps=1e-6)  # (N, B, 256)
            x = torch.addcmul(shift[some], x, scale[some]).relu_()
        return self.layers[-1](x, some).squeeze(-1)


def policy(obs, actor):
    """The action to evaluate, the squashed mean: obs (B, O) -> act (B, A)."""
    return actor.net(obs).chunk(2, -1)[0].tanh()


def critic_loss(args, batch, next_act, next_log_prob, critic, critic_target, alpha):
    with torch.no_grad():
        some = torch.randperm(args.n_critics, device=batch.rew.device)[: args.n_min]
        next_q = critic_target(batch.next_obs, next_act, some)  # (n_min, B)
        assert next_q.shape == (args.n_min, len(batch.rew))
        next_q = next_q.amin(0)  # (B,)
        if args.backup_entropy:
            next_q = next_q - alpha * next_log_prob
        target = batch.rew + args.gamma * (1 - batch.done) * next_q
    q = critic(batch.obs, batch.act)  # (N, B)
    return ((q - target) ** 2).mean(1).sum()


def actor_loss(batch, actor, critic, alpha):
    act, log_prob = actor(batch.obs)  # (B, A), (B,)
    q = critic(batch.obs, act)  # (N, B)
    assert q.shape[1:] == (len(batch.rew),)
    return (alpha * log_prob - q.mean(0)).mean(), log_prob.detach()


def alpha_loss(log_alpha, log_prob, target_entropy):
    return -(log_alpha.exp() * (log_prob + target_entropy)).mean()


def train(args):
    run = Run(__file__, args)
    data = load(args.env, args.source, run.device, args.eval_env)
    args = run.tuned(data.task, TUNED)
    if args.n_min > args.n_critics:
        raise UserError(f"--n-min {args.n_min} are more than the --n-critics {args.n_critics}.")
    env = data.task.make_env()
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before
    data.make_room(min(args.buffer_size, args.steps), args.offline_share)

    O, A = data.obs_dim, data.act_dim
    actor, critic = Actor(O, A).to(run.device), Critic(O, A, args.n_critics, args.critic_layers).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    log_alpha = torch.zeros((), device=run.device, requires_grad=True)
    actor_opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True)
    critic_opt = torch.optim.Adam(critic.parameters(), args.lr, fused=True)
    alpha_opt = torch.optim.Adam([log_alpha], args.lr, fused=True)

    def update():
        alpha, columns = log_alpha.detach().exp(), data.sample(args.batch_size, args.utd)
        batches = [type(columns)(*batch) for batch in zip(*columns)] if args.utd > 1 else [columns]
        with torch.no_grad():  # the actor is the same in all of these updates
            next_acts = actor(torch.stack([batch.next_obs for batch in batches]))  # (utd, B, A), (utd, B)
        for batch, next_act, next_log_prob in zip(batches, *next_acts):
            loss_q = critic_loss(args, batch, next_act, next_log_prob, critic, critic_target, alpha)
            critic_opt.zero_grad()
            loss_q.backward()
            critic_opt.step()
            with torch.no_grad():  # or the targets would drag the whole history of the critics along
                torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)

        loss_pi, log_prob = actor_loss(batch, actor, critic, alpha)
        actor_opt.zero_grad()
        loss_pi.backward(inputs=list(actor.parameters()))  # the critic's weights need no gradient here
        actor_opt.step()

        loss_alpha = alpha_loss(log_alpha, log_prob, -A / 2)
        alpha_opt.zero_grad()
        loss_alpha.backward()
        alpha_opt.step()
        return {"critic_loss": loss_q.detach(), "actor_loss": loss_pi.detach(), "alpha": alpha}

    losses, obs = {"alpha": log_alpha.detach().exp()}, None
    state = dict(buffer=data, actor=actor, critic=critic, critic_target=critic_target, log_alpha=log_alpha)
    for step in run.steps(data, **state, actor_opt=actor_opt, critic_opt=critic_opt, alpha_opt=alpha_opt):
        if obs is None:  # seeded by the step, so that a resumed run meets the same start states
            obs, _ = env.reset(seed=10_000_000 * args.seed + step)
        if step <= args.start_steps:
            action = (torch.rand(A) * 2 - 1).numpy()
        else:
            with torch.no_grad():
                action = actor(data.normalized(obs)[None])[0][0].cpu().numpy()
        next_obs, rew, terminated, truncated, _ = env.step(action)
        data.add(obs, action, rew + data.task.rew_shift, next_obs, terminated)
        run.resumable = terminated or truncated
        obs = None if run.resumable else next_obs

        if step > args.start_steps:
            losses = update()
        run.watch(losses)
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
