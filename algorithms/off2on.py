"""Off2On: Offline-to-Online RL via Balanced Replay and Pessimistic Q-Ensemble (Lee et al. 2021), arXiv:2107.00591.

    offline  CQL(H), --members of them side by side, each as in cql.py
    policy   of all: N(mean of the means, the mixture's variance), which tanh squashes
    critic   target_k = rew + gamma (1 - done) [min_i Q'_ki(next_obs, next_act) - temperature log pi],   SAC's; member k
    actor    L_pi = E [temperature log pi(a | obs) - mean_k min_i Q_ki(obs, a)]
    weight   L_w  = E_data [-log (2 / (w + 1))] - E_online [log (2 w / (w + 1))],   w(obs, act) = how near to on-policy
    replay   draws in proportion to w^(1 / heat), of mean 1 over the data; new ones to make up online_share at first

Differs from the authors' code: an update for each step, not 1,000 after each 1,000 (the first time 10,000); critics
step before the actor's loss is taken; all new transitions begin with one priority. One seed is a process.
Usage: python algorithms/off2on.py --env hopper-medium --members 2 --offline-steps 100000 --steps 100000
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import UserError, load
from results.run import Run


@dataclass
class Args:
    env: str = "halfcheetah-medium"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    eval_env: str = ""  # the Gymnasium environment to evaluate in, for an HDF5 file of your own
    seed: int = 0
    steps: int = 250_000  # environment steps of the online phase, one update each
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
    n_actions: int = 10  # sampled for each state from each of: the uniform distribution, the policy at obs, at next_obs
    actor_lr: float | None = None  # of the policy and the temperature; None, here and below: as in TUNED
    alpha: float | None = None  # weight of the gap (CQL's Eq. 4); what it starts from where a threshold is given
    threshold: float | None = None  # of the gap, in the Lagrange version that learns alpha; below 0: alpha is fixed
    gap_min: float | None = None  # a state's gap below this has no gradient
    max_target: bool | None = None  # the target is of the best of n_actions next actions, by the lower of their two Q
    critic_layers: int | None = None  # hidden layers of the critics
    normalize: bool | None = None  # observations to mean 0 and deviation 1
    rew_scale: float | None = None  # rewards are scaled, then shifted
    rew_shift: float | None = None  # by this
    members: int = 5  # CQL agents, trained side by side, which are one online
    start_steps: int = 1_000  # of the online phase, before its first update
    online_share: float = 0.5  # of the first batches, from what was lived through itself
    heat: float = 5.0  # temperature of the priorities
    offline_steps: int = 1_000_000  # updates of the offline phase; --checkpoint brings its own number
    checkpoint: str = ""  # of cql.py --seeds MEMBERS on the same data, instead of an offline phase
    buffer_size: int = 250_000


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


def each(net, *inputs):
    """What each of M stacked networks makes of the same inputs, with a leading axis M."""
    one = lambda params: functional_call(net, params, inputs)
    return torch.vmap(one)(dict(net.named_parameters()))


def mixture(obs, actor):
    """Mean and log_std (B, A) of the M stacked policies taken together."""
    mean, log_std = each(actor, obs)  # (M, B, A)
    variance = (2 * log_std).exp().mean(0) + mean.var(0, correction=0)  # within the members, and between them
    return mean.mean(0), (0.5 * variance.log()).clamp(-20, 2)


def policy(obs, actor):
    """The action to evaluate, the squashed mean of the members' means: obs (B, O) -> act (B, A)."""
    return mixture(obs, actor)[0].tanh()


def explore(obs, actor):
    """The action to learn from, drawn from the members' mixture: obs (B, O) -> act (B, A)."""
    return sample(obs, partial(mixture, actor=actor), 1)[0][0]


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


def critic_loss(args, batch, log_alpha, actor, critic, critic_target):
    B, A = batch.act.shape
    n, m = args.n_actions, args.n_actions if args.max_target else 1
    with torch.no_grad():
        both = sample(torch.cat([batch.obs, batch.next_obs]), actor, n)  # (n, 2 B, A), (n, 2 B)
        (pi_act, next_act), (pi_log_prob, next_log_prob) = (x.split(B, 1) for x in both)
        next_qs = critic_target(batch.next_obs, next_act[:m])
        assert next_qs.shape == (2, m, B)
        target = batch.rew + args.gamma * (1 - batch.done) * next_qs.amin(0).amax(0)  # (B,), of the best of m actions
        sampled = [2 * torch.rand_like(pi_act) - 1, pi_act, next_act]
        uniform_log_prob = torch.full_like(pi_log_prob, A * np.log(0.5))
        log_prob = torch.cat([uniform_log_prob, pi_log_prob, next_log_prob])  # (3 n, B)
    q = critic(batch.obs, batch.act)  # (2, B)
    sampled_q = torch.cat([critic(batch.obs, act) for act in sampled], 1)  # (2, 3 n, B)
    assert sampled_q.shape == (2, *log_prob.shape)
    gap = ((sampled_q - log_prob).logsumexp(1) - q).clamp(args.gap_min).mean(1)  # (2,)
    alpha = log_alpha.detach().exp().clamp(max=1e6)
    return (alpha * gap + ((q - target) ** 2).mean(1)).sum(), gap.detach().mean()


def alpha_loss(args, log_alpha, gap):
    return -log_alpha.exp().clamp(max=1e6) * (gap - args.threshold)  # CQL's Eq. 4's weight as a Lagrange multiplier


def actor_loss(batch, log_temperature, actor, critic):
    act, log_prob = sample(batch.obs, actor, 1)  # (1, B, A), (1, B)
    q = critic(batch.obs, act)
    assert q.shape == (2, 1, len(batch.obs))
    return (log_temperature.detach().exp() * log_prob - q.amin(0)).mean(), log_prob.detach().mean()  # SAC's (Eq. 9)


def temperature_loss(log_temperature, log_prob, target_entropy):
    return -log_temperature * (log_prob + target_entropy)  # SAC's (Eq. 18)


def online_critic_loss(args, batch, temperature, actor, critic, critic_target):
    with torch.no_grad():
        next_act, next_log_prob = sample(batch.next_obs, partial(mixture, actor=actor), 1)  # (1, B, A), (1, B)
        next_qs = each(critic_target, batch.next_obs, next_act[0])  # (M, 2, B)
        assert next_qs.shape == (args.members, 2, len(batch.rew))
        next_q = next_qs.amin(1) - temperature * next_log_prob  # (M, B)
        target = batch.rew + args.gamma * (1 - batch.done) * next_q
    q = each(critic, batch.obs, batch.act)  # (M, 2, B)
    return ((q - target[:, None]) ** 2).mean(-1).sum()


def online_actor_loss(batch, temperature, actor, critic):
    act, log_prob = sample(batch.obs, partial(mixture, actor=actor), 1)  # (1, B, A), (1, B)
    q = each(critic, batch.obs, act[0]).amin(1).mean(0)  # (B,) of (M, 2, B)
    return (temperature * log_prob - q).mean(), log_prob.detach().mean()


def weight_loss(data_weight, online_weight):
    """The bound on the divergence of Jensen and Shannon that w maximizes: both (B,)."""
    return (-(2 / (data_weight + 1) + 1e-10).log() - (2 * online_weight / (online_weight + 1) + 1e-10).log()).mean()


def draw(priority, n):
    """n rows (n,) in proportion to their priority (N,), one from each n-th of the sum."""
    sums = priority.double().cumsum(0)
    points = (torch.arange(n, device=sums.device) + torch.rand(n, device=sums.device)) / n * sums[-1]
    return torch.searchsorted(sums, points.to(sums)).clamp(max=len(priority) - 1)


def stack(nets):
    """The networks of S agents as one, whose parameters have a leading axis S; of one agent, its own."""
    if len(nets) > 1:
        for params in zip(*(net.parameters() for net in nets)):
            params[0].data = torch.stack([param.data for param in params])
    return nets[0]


def lift(seeds, function, *nets):
    """`function(*inputs, *nets)` of one agent -> a function of the inputs of all agents, each (S, ...)."""
    if seeds == 1:
        return lambda *inputs: function(*inputs, *nets)

    def one_agent(params, *inputs):
        calls = [lambda *x, net=net, p=p: functional_call(net, p, x) for net, p in zip(nets, params)]
        return function(*inputs, *calls)

    return partial(torch.vmap(one_agent, randomness="different"), [dict(net.named_parameters()) for net in nets])


def train(args):
    run = Run(__file__, args)
    data = load(args.env, args.source, run.device, args.eval_env)
    run.tuned(data.task, TUNED)
    args = run.begins_with("cql", data, args.members)
    M = args.members
    if M < 2:
        raise UserError("--members must be at least 2: an ensemble.")
    if not 0 < args.online_share < 1:
        raise UserError(f"--online-share must lie in (0, 1), not {args.online_share}.")
    env = data.task.make_env()
    data.rew = args.rew_scale * data.rew + args.rew_shift
    if args.normalize:
        data.normalize_obs()  # (obs - mean) / (std + 1e-3)
    data.make_room(args.buffer_size, 0.5)  # half and half for the weights; the agents' batches go by priority
    priority = torch.ones(len(data.rows), device=run.device)
    new_priority = data.fixed * args.online_share / (1 - args.online_share) / args.start_steps

    O, A = data.obs_dim, data.act_dim
    actor = stack([Actor(O, A) for _ in range(M)]).to(run.device)
    critic = stack([Critic(O, A, args.critic_layers) for _ in range(M)]).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    log_temperature = torch.zeros(M, device=run.device, requires_grad=True)
    log_alpha = torch.full((M,), np.log(args.alpha), device=run.device, requires_grad=args.threshold >= 0)
    # Adam is elementwise and passes over what has no gradient: the two numbers need no optimisers of their own.
    actor_opt = torch.optim.Adam([*actor.parameters(), log_temperature], args.actor_lr, fused=True, capturable=True)
    critic_opt = torch.optim.Adam([*critic.parameters(), log_alpha], args.lr, fused=True, capturable=True)
    critic_losses = lift(M, partial(critic_loss, args), actor, critic, critic_target)
    actor_losses = lift(M, actor_loss, actor, critic)

    weight = mlp(O + A, 256, 256, 1).to(run.device)
    nn.init.ones_(weight[-1].bias)
    online_log_temperature = torch.zeros((), device=run.device, requires_grad=True)
    policy_params = [*actor.parameters(), online_log_temperature]
    online_actor_opt = torch.optim.Adam(policy_params, args.lr, fused=True)
    online_critic_opt = torch.optim.Adam(critic.parameters(), args.lr, fused=True)
    weight_opt = torch.optim.Adam(weight.parameters(), args.lr, fused=True)

    def follow():
        with torch.no_grad():  # or the targets would drag the whole history of the critics along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)

    def offline_update():
        batch = data.sample(args.batch_size, M)
        critics_loss, gap = critic_losses(batch, log_alpha)  # (M,)
        loss = critics_loss + (alpha_loss(args, log_alpha, gap) if args.threshold >= 0 else 0)
        critic_opt.zero_grad()
        loss.sum().backward()
        critic_opt.step()

        policy_loss, log_prob = actor_losses(batch, log_temperature)
        loss = policy_loss + temperature_loss(log_temperature, log_prob, -A)
        actor_opt.zero_grad()
        loss.sum().backward(inputs=[*actor.parameters(), log_temperature])  # the critics' weights need no gradient here
        actor_opt.step()
        follow()
        run.watch({"critic_loss": critics_loss.sum(), "actor_loss": policy_loss.sum()})

    def weights(batch):
        return weight(torch.cat([batch.obs, batch.act], -1)).squeeze(-1).relu()

    def online_update():
        data_weight, online_weight = weights(data.sample(2 * args.batch_size)).chunk(2)
        loss_w = weight_loss(data_weight, online_weight)
        rows = draw(priority[: len(data)], args.batch_size)
        batch = data.split(data.rows[rows])
        with torch.no_grad():
            mean = (data_weight ** (1 / args.heat)).mean() + 1e-10
            priority[rows] = (weights(batch) ** (1 / args.heat) / mean).clamp(1e-3, 1e3)
        weight_opt.zero_grad()
        loss_w.backward()
        weight_opt.step()

        temperature = online_log_temperature.detach().exp()
        loss_q = online_critic_loss(args, batch, temperature, actor, critic, critic_target)
        online_critic_opt.zero_grad()
        loss_q.backward()
        online_critic_opt.step()

        loss_pi, log_prob = online_actor_loss(batch, temperature, actor, critic)
        online_actor_opt.zero_grad()
        loss = loss_pi + temperature_loss(online_log_temperature, log_prob, -A)
        loss.backward(inputs=policy_params)  # the critics' weights need no gradient here
        online_actor_opt.step()
        follow()
        return {"critic_loss": loss_q.detach(), "actor_loss": loss_pi.detach(), "weight_loss": loss_w.detach()}

    graphed_update = run.graphed(offline_update)  # online the table grows, which a graph cannot see
    obs, losses, state = None, {"critic_loss": torch.zeros((), device=run.device)}, dict(actor=actor, critic=critic)
    state |= dict(critic_target=critic_target, actor_opt=actor_opt, critic_opt=critic_opt, log_alpha=log_alpha)
    state |= dict(log_temperature=log_temperature, online_log_temperature=online_log_temperature, weight=weight)
    state |= dict(online_actor_opt=online_actor_opt, online_critic_opt=online_critic_opt, weight_opt=weight_opt)
    for step in run.steps(data, **state, priority=priority, buffer=data):
        if step <= args.offline_steps:
            graphed_update()
        else:
            if obs is None:  # seeded by the step, so that a resumed run meets the same start states
                obs, _ = env.reset(seed=10_000_000 * args.seed + step)
            with torch.no_grad():
                action = explore(data.normalized(obs)[None], actor)[0].cpu().numpy()
            next_obs, rew, terminated, truncated, _ = env.step(action)
            priority[data.fixed + data.added % args.buffer_size] = new_priority
            data.add(obs, action, args.rew_scale * rew + args.rew_shift, next_obs, terminated)
            run.resumable = terminated or truncated
            obs = None if run.resumable else next_obs
            if step > args.offline_steps + args.start_steps:
                losses = online_update()
            run.watch(losses)
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
