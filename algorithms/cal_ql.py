"""Cal-QL: Calibrated Offline RL Pre-Training for Efficient Online Fine-Tuning (Nakamoto et al. 2023), arXiv:2303.05479.

    critic   L_Q = sum_i alpha gap_i + E (Q_i(obs, act) - target)^2, as in cql.py
    gap      E [log sum_a exp max(Q(obs, a), mc_return) - Q(obs, act)],   a ~ pi: CQL never lowers Q below what came of
             the data; mc_return is the discounted return from obs to the end of its episode
    online   act ~ pi(obs); the same update, half of each batch from the data; mc_return of new transitions as well

--no-calibrated is CQL fine-tuned, which --checkpoint of cql.py can begin. As in the authors' code, uniform actions have
no bound, and a maze's episode without its goal has its reward for ever; an episode cut by time counts up to there.
Differs from it, beside TUNED and what cql.py says: there each episode is followed by its updates, here a step by
one, and until an episode ends its transitions have no bound. (CORL leaves new returns out.) One seed is a process.
Usage: python algorithms/cal_ql.py --env hopper-medium --offline-steps 100000 --steps 100000
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    steps: int = 1_000_000  # environment steps of the online phase, one update each
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
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    backup_entropy: bool = False  # SAC: the target holds the entropy of the next action too
    bc_steps: int = 0  # updates at the start in which the policy clones the data (40,000 in the authors' code)
    variant: Literal["h", "rho"] = "h"  # CQL(H), or CQL(rho) with the policy so far as rho
    n_actions: int = 10  # sampled for each state from each of: the uniform distribution, the policy at obs, at next_obs
    actor_lr: float | None = None  # of the policy and the temperature; None, here and below: as in TUNED
    alpha: float | None = None  # weight of the gap (Eq. 4); what it starts from where a threshold is given
    threshold: float | None = None  # of the gap, in the Lagrange version that learns alpha; below 0: alpha is fixed
    gap_min: float | None = None  # a state's gap below this has no gradient
    max_target: bool | None = None  # the target is of the best of n_actions next actions, by the lower of their two Q
    critic_layers: int | None = None  # hidden layers of the critics
    normalize: bool | None = None  # observations to mean 0 and deviation 1
    rew_scale: float | None = None  # rewards are scaled, then shifted
    rew_shift: float | None = None  # by this
    calibrated: bool = True  # no Q of the policy's actions is lowered below the data's return
    online_alpha: float | None = None  # what alpha is at the switch; 0: SAC goes on; None: what it was
    offline_steps: int = 1_000_000  # updates of the offline phase; --checkpoint brings its own number
    checkpoint: str = ""  # of cql.py on the same data, instead of an offline phase
    offline_share: float | None = 0.5  # of each online batch, from the data; None: data and others are drawn alike
    buffer_size: int = 1_000_000


# With a threshold, CORL's alpha has a factor that starts at e. Left out: it rescales hopper-medium's rewards.
ANTMAZE = dict(actor_lr=1e-4, alpha=5.0 * np.e, threshold=0.8, gap_min=-200.0, max_target=True)
ANTMAZE |= dict(critic_layers=5, normalize=False, rew_scale=10.0, rew_shift=-5.0)
TUNED = {  # "" for all tasks, then by family, then by task: configs/offline/cql of github.com/corl-team/CORL
    "": dict(actor_lr=3e-5, alpha=10.0, threshold=-1.0, gap_min=-1e9, max_target=False)
    | dict(critic_layers=3, normalize=True, rew_scale=1.0, rew_shift=0.0),
    **dict.fromkeys(("antmaze", "pointmaze", "stitch"), ANTMAZE),  # the last two, this repository's, as the first
    "maze2d": dict(alpha=10.0 * np.e, threshold=5.0),
    **dict.fromkeys(("pen", "door", "hammer", "relocate"), dict(actor_lr=1e-4, alpha=1.0)),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian that tanh squashes: obs (B, O) -> mean and log_std (B, A)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, 256, 2 * act_dim)

    def forward(self, obs):
        mean, log_std = self.net(obs).chunk(2, -1)  # (B, A) each
        return mean, log_std.clamp(-20, 2)


class Critic(nn.Module):
    """Two Q-functions: obs (B, O), act (B, A) -> q (2, B); act (K, B, A) -> (2, K, B). One after the other: for
    thousands of rows that is faster than one batched product, and than the share of obs in the first layer once."""

    def __init__(self, obs_dim, act_dim, hidden_layers):
        super().__init__()
        self.nets = nn.ModuleList(mlp(obs_dim + act_dim, *[256] * hidden_layers, 1) for _ in range(2))

    def forward(self, obs, act):
        x = torch.cat([obs.expand(*act.shape[:-1], -1), act], -1).flatten(0, -2)  # (K * B, O + A)
        return torch.stack([net(x).view(act.shape[:-1]) for net in self.nets])


def policy(obs, actor):
    """The action to evaluate, the squashed mean: obs (B, O) -> act (B, A)."""
    return actor(obs)[0].tanh()


def log_density(u, noise, log_std):
    """Of tanh(u), u = mean + std * noise: (..., B, A) -> (..., B)."""
    # log N(u) - log |d tanh(u) / du|, the latter as 2 (log 2 - u - softplus(-2 u)), which does not underflow
    log_prob = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - 2 * (np.log(2) - u - F.softplus(-2 * u))
    return log_prob.sum(-1)


def sample(obs, actor, n):
    """n actions of the policy for each obs: (n, B, A), and their log densities (n, B)."""
    mean, log_std = actor(obs)
    noise = torch.randn_like(mean.expand(n, *mean.shape))  # the network runs once, not n times
    u = mean + log_std.exp() * noise
    return u.tanh(), log_density(u, noise, log_std)


def explore(obs, actor):
    """The action to learn from, drawn: obs (B, O) -> act (B, A)."""
    return sample(obs, actor, 1)[0][0]


def returns_to_go(rew, gamma, forever):
    """The discounted return from each step of an episode on, rew (T,) -> (T,); forever: of a goal that was not reached,
    where every reward is the first and it does not end."""
    if forever:
        return np.full(len(rew), rew[0] / (1 - gamma))
    returns, later = np.zeros(len(rew)), 0.0
    for t in reversed(range(len(rew))):
        later = returns[t] = rew[t] + gamma * later
    return returns


def soft_maximum(args, q, log_prob):
    """What the critics lower: of q (2, K, B) at K sampled actions with log densities (K, B), for each state (2, B)."""
    assert q.shape == (2, *log_prob.shape)
    if args.variant == "rho":
        weight = q.softmax(1).detach()  # w maximizes E_w Q - KL(w, pi), so it adds no gradient of its own
        return (weight * q).sum(1)
    # Importance sampling. The sum has log K more than the mean: published thresholds are for the sum.
    return (q - log_prob).logsumexp(1)


def critic_loss(args, batch, log_temperature, log_alpha, actor, critic, critic_target):
    B, A = batch.act.shape
    n, m = args.n_actions, args.n_actions if args.max_target else 1
    with torch.no_grad():
        both = sample(torch.cat([batch.obs, batch.next_obs]), actor, n)  # (n, 2 B, A), (n, 2 B)
        (pi_act, next_act), (pi_log_prob, next_log_prob) = (x.split(B, 1) for x in both)
        next_qs = critic_target(batch.next_obs, next_act[:m])
        assert next_qs.shape == (2, m, B)
        next_q, best = next_qs.amin(0).max(0)  # (B,), of the best of m actions
        if args.backup_entropy:
            next_q = next_q - log_temperature.exp() * next_log_prob.gather(0, best[None])[0]
        target = batch.rew + args.gamma * (1 - batch.done) * next_q
        uniform, sampled, log_prob = [], [pi_act], pi_log_prob
        if args.variant == "h":
            uniform, sampled = [2 * torch.rand_like(pi_act) - 1], [pi_act, next_act]
            uniform_log_prob = torch.full_like(pi_log_prob, A * np.log(0.5))
            log_prob = torch.cat([uniform_log_prob, pi_log_prob, next_log_prob])  # (3 n, B)
    q = critic(batch.obs, batch.act)  # (2, B)
    floor = batch.mc_return if args.calibrated else torch.full_like(batch.rew, -np.inf)  # (B,)
    uniform_q, policy_q = ([critic(batch.obs, act) for act in acts] for acts in (uniform, sampled))  # (2, n, B) each
    sampled_q = torch.cat([*uniform_q, *(x.maximum(floor) for x in policy_q)], 1)  # (2, 3 n, B), or (2, n, B)
    gap = (soft_maximum(args, sampled_q, log_prob) - q).clamp(args.gap_min).mean(1)  # (2,)
    alpha = log_alpha.detach().exp().clamp(max=1e6)
    return (alpha * gap + ((q - target) ** 2).mean(1)).sum(), gap.detach().mean()  # (Eq. 4)


def alpha_loss(args, log_alpha, gap):
    return -log_alpha.exp().clamp(max=1e6) * (gap - args.threshold)  # Eq. 4's weight as a Lagrange multiplier


def actor_loss(batch, log_temperature, actor, critic):
    act, log_prob = sample(batch.obs, actor, 1)  # (1, B, A), (1, B)
    q = critic(batch.obs, act)
    assert q.shape == (2, 1, len(batch.obs))
    return (log_temperature.detach().exp() * log_prob - q.amin(0)).mean(), log_prob.detach().mean()  # SAC's (Eq. 9)


def cloning_loss(batch, log_temperature, actor):
    _, log_prob = sample(batch.obs, actor, 1)  # (1, B)
    mean, log_std = actor(batch.obs)
    u = batch.act.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    data_log_prob = log_density(u, (u - mean) / log_std.exp(), log_std)  # (B,)
    return (log_temperature.detach().exp() * log_prob - data_log_prob).mean(), log_prob.detach().mean()


def temperature_loss(log_temperature, log_prob, target_entropy):
    return -log_temperature * (log_prob + target_entropy)  # SAC's (Eq. 18)


def train(args):
    run = Run(__file__, args)
    data = load(args.env, args.source, run.device, args.eval_env)
    run.tuned(data.task, TUNED)
    args = run.begins_with("cql", data)
    if args.checkpoint and args.calibrated:
        raise UserError("A checkpoint of cql.py is not calibrated: --no-calibrated goes on from it.")
    env = data.task.make_env()
    data.rew = args.rew_scale * data.rew + args.rew_shift
    if args.normalize:
        data.normalize_obs()  # (obs - mean) / (std + 1e-3)

    def returns_of(rew):
        sparse = data.task.family in ("antmaze", "pointmaze", "stitch")
        return returns_to_go(rew, args.gamma, sparse and np.allclose(rew, args.rew_shift))

    episodes = np.split(data.rew.cpu().double().numpy(), data.ends[:-1])
    data.add_returns(np.concatenate([returns_of(rew) for rew in episodes]))
    data.make_room(min(args.buffer_size, args.steps), args.offline_share)

    O, A = data.obs_dim, data.act_dim
    actor, critic = Actor(O, A).to(run.device), Critic(O, A, args.critic_layers).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    log_temperature = torch.zeros((), device=run.device, requires_grad=True)
    log_alpha = torch.full((), np.log(args.alpha), device=run.device, requires_grad=args.threshold >= 0)
    # Adam is elementwise and passes over what has no gradient: the two numbers need no optimisers of their own.
    actor_opt = torch.optim.Adam([*actor.parameters(), log_temperature], args.actor_lr, fused=True, capturable=True)
    critic_opt = torch.optim.Adam([*critic.parameters(), log_alpha], args.lr, fused=True, capturable=True)

    def update(cloning):
        batch = data.sample(args.batch_size)
        critics_loss, gap = critic_loss(args, batch, log_temperature, log_alpha, actor, critic, critic_target)
        loss = critics_loss + (alpha_loss(args, log_alpha, gap) if args.threshold >= 0 else 0)
        critic_opt.zero_grad()
        loss.backward()
        critic_opt.step()

        if cloning:
            policy_loss, log_prob = cloning_loss(batch, log_temperature, actor)
        else:
            policy_loss, log_prob = actor_loss(batch, log_temperature, actor, critic)
        loss = policy_loss + temperature_loss(log_temperature, log_prob, -A)
        actor_opt.zero_grad()
        loss.backward(inputs=[*actor.parameters(), log_temperature])  # the critics' weights need no gradient here
        actor_opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the critics along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
            scalars = {"gap": gap, "alpha": log_alpha.exp(), "temperature": log_temperature.exp()}
        run.watch({"critic_loss": critics_loss, "actor_loss": policy_loss, **scalars})

    offline_update = run.graphed(update)  # online the table grows, which a graph cannot see
    obs, state = None, dict(actor=actor, critic=critic, critic_target=critic_target, buffer=data)
    state |= dict(actor_opt=actor_opt, critic_opt=critic_opt)
    for step in run.steps(data, **state, log_temperature=log_temperature, log_alpha=log_alpha):
        if step <= args.offline_steps:
            offline_update(step <= args.bc_steps)
        else:
            if step == args.offline_steps + 1 and args.online_alpha is not None:
                log_alpha.data.fill_(args.online_alpha).log_()
            if obs is None:  # seeded by the step, so that a resumed run meets the same start states
                obs, _ = env.reset(seed=10_000_000 * args.seed + step)
                rewards = []
            with torch.no_grad():
                action = explore(data.normalized(obs)[None], actor)[0].cpu().numpy()
            next_obs, rew, terminated, truncated, _ = env.step(action)
            rewards.append(args.rew_scale * rew + args.rew_shift)
            data.add(obs, action, rewards[-1], next_obs, terminated, -np.inf)
            run.resumable = terminated or truncated
            if run.resumable:
                data.set_returns(returns_of(np.array(rewards)))
            obs = None if run.resumable else next_obs
            update(False)
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
