"""MOPO: Model-based Offline Policy Optimization (Yu et al., NeurIPS 2020), arXiv:2005.13239.

    model    N(mean_i, std_i^2) of y = (next_obs - obs, rew), i = 1 .. 7, each by maximum likelihood;
             the 5 with the lowest error on held-out data, the elites, predict: one of them drawn for each step
    reward   rew~ = rew - lam u(obs, act),   u = max_i |std_i(obs, act)|                       (Alg. 1, Sec. 4.3)
    policy   SAC (offline_sac.py) on 5 % data and 95 % rollouts of h steps, 50,000 of them every 1,000 updates  (Alg. 2)

As in OfflineRL-Kit (in brackets the authors' code): lam, h; actor and alpha lr 1e-4, the actor's along a cosine (3e-4);
target entropy -A (-3); 5 epochs without gain end the fit (6). Differs from both: PyTorch's initial weights; targets are
scaled as observations are, actions not; biases decay too; 5,000 rows held out (1,000); no bootstrap samples; rollouts
stay within twice the data's range and go on from its states after a termination; model_updates at most per fit.
Usage: python algorithms/mopo.py --env halfcheetah-medium-replay
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

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
    env: str = "halfcheetah-medium-replay"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    eval_env: str = ""  # the Gymnasium environment to evaluate in, for an HDF5 file of your own
    seed: int = 0
    seeds: int = 1  # agents trained side by side: seed, seed + 1, ...
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
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    actor_lr: float = 1e-4  # of the policy and of alpha
    h: int | None = None  # steps of a rollout
    lam: float | None = None  # weight of the penalty
    penalty: Literal["std", "disagreement"] = "std"  # u: the largest std, or distance of a mean from the mean of all
    real_ratio: float = 0.05  # share of the data in a batch
    rollouts: int = 50_000  # started at a time
    rollout_every: int = 1_000  # updates
    keep: int = 5  # the model transitions of so many times are kept
    model_lr: float = 1e-3  # of the dynamics
    model_updates: int = 1_000_000  # of the dynamics, at most: they end when for 5 epochs no network becomes 1 % better


TUNED = {  # "" for all tasks, then by family, then by task: OfflineRL-Kit's run_mopo.py, for random data the paper's
    "": {"h": 5, "lam": 0.5},
    "halfcheetah-medium-expert": {"lam": 2.5},
    "hopper-random": {"lam": 1.0},
    "hopper-medium": {"lam": 5.0},
    "hopper-medium-replay": {"lam": 2.5},
    "hopper-medium-expert": {"lam": 5.0},
    "walker2d-random": {"h": 1, "lam": 1.0},
    "walker2d-medium-replay": {"h": 1, "lam": 2.5},
    "walker2d-medium-expert": {"h": 1, "lam": 2.5},
}
NETWORKS, ELITES, PATIENCE = 7, 5, 5
WEIGHT_DECAY = 2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4  # of the model's layers
ENDED = {  # obs (..., O) -> bool (...): whether the environment ends there, which is known and not learned
    "HalfCheetah": lambda obs: obs[..., 0] > torch.inf,
    "Hopper": lambda obs: (obs[..., 0] <= 0.7) | (obs[..., 1].abs() >= 0.2) | (obs[..., 1:].abs() >= 100).any(-1),
    "Walker2d": lambda obs: (obs[..., 0] <= 0.8) | (obs[..., 0] >= 2) | (obs[..., 1].abs() >= 1),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian squashed by tanh: obs (B, O) -> act (B, A) in [-1, 1] and its log density (B,), or the mean alone."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, 2 * act_dim)

    def forward(self, obs, sample=True):
        mean, log_std = self.net(obs).chunk(2, -1)  # (B, A) each
        if not sample:
            return mean.tanh()
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


class Dynamics(nn.Module):
    """N Gaussians of (next_obs - obs, rew): obs (B, O) or (N, B, O), act -> mean, log_std (N, B, O + 1)."""

    def __init__(self, N, data):
        super().__init__()
        y = outcome(data.split(data.rows))  # (len(data), O + 1)
        for name, x in {"obs_mean": data.obs.mean(0), "obs_std": data.obs.std(0), "y_std": y.std(0)}.items():
            self.register_buffer(name, x if name == "obs_mean" else x + 1e-6)
        sizes = (data.obs_dim + data.act_dim, 200, 200, 200, 200, 2 * y.shape[1])
        self.layers = nn.ModuleList(EnsembleLinear(N, i, o) for i, o in zip(sizes, sizes[1:]))
        self.low, self.high = (nn.Parameter(torch.full((1, 1, y.shape[1]), x)) for x in (-5.0, 0.25))

    def forward(self, obs, act):
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, act], -1)  # (..., O + A)
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))  # (N, B, 200)
        mean, log_std = self.layers[-1](x).chunk(2, -1)  # (N, B, O + 1) each
        log_std = self.high - F.softplus(self.high - log_std)  # bounded softly, in units of y_std
        log_std = self.low + F.softplus(log_std - self.low)
        return mean * self.y_std, log_std + self.y_std.log()


def policy(obs, actor):
    """The action to evaluate, the squashed mean: obs (B, O) -> act (B, A)."""
    return actor(obs, False)


def held_out(data, seed):
    """The rows that the model is judged by, at most 5,000, and those that it learns from."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.rows.device)
    return data.rows[order].tensor_split([min(len(data) // 5, 5_000)])


def outcome(batch):
    """What the model predicts, y: next_obs - obs and rew, (..., O + 1)."""
    return torch.cat([batch.next_obs - batch.obs, batch.rew[..., None]], -1)


def model_loss(batch, dynamics):
    """Negative log-likelihood of N networks, each with a batch of its own: columns (N, B, ...) -> ()."""
    mean, log_std = dynamics(batch.obs, batch.act)  # (N, B, O + 1)
    y = outcome(batch)
    assert y.shape == mean.shape
    return (((mean - y) / log_std.exp()) ** 2 + 2 * log_std).mean((1, 2)).sum()


def model_error(batch, dynamics):
    """Of the variance of y, the share that each network leaves: columns (B, ...) -> (N,)."""
    y = outcome(batch)  # (B, O + 1)
    mean, _ = dynamics(batch.obs, batch.act)  # (N, B, O + 1)
    return (((mean - y) ** 2).mean(1) / y.var(0)).mean(-1)


def uncertainty(args, mean, log_std):
    """u of the predictions of N networks, (N, B, O + 1): (B,)."""
    distance = log_std.exp() if args.penalty == "std" else mean - mean.mean(0)
    return distance.norm(dim=-1).amax(0)  # (Sec. 4.3)


def rank_correlation(args, batch, dynamics):
    """Spearman's, of u and the error of the mean prediction: columns (B, ...) -> ()."""
    mean, log_std = dynamics(batch.obs, batch.act)
    error = (mean.mean(0) - outcome(batch)).norm(dim=-1)  # (B,)
    ranks = torch.stack([uncertainty(args, mean, log_std), error]).argsort(-1).argsort(-1).float()  # (2, B)
    return torch.corrcoef(ranks)[0, 1]


def imagine(args, ended, bound, obs, elites, actor, dynamics):
    """One step of the policy in the model: obs (B, O), elites (ELITES,) -> rows (B, 2 O + A + 2) as the data's are."""
    act = actor(obs)[0]  # (B, A)
    mean, log_std = dynamics(obs, act)  # (N, B, O + 1)
    member = elites[(torch.rand_like(obs[:, 0]) * ELITES).long()]  # (B,), an elite for each row
    rows = torch.arange(len(obs), device=obs.device)
    y = mean[member, rows] + log_std[member, rows].exp() * torch.randn_like(mean[0])  # (B, O + 1)
    next_obs = torch.minimum(torch.maximum(obs + y[:, :-1], -bound), bound)
    rew = y[:, -1] - args.lam * uncertainty(args, mean, log_std)  # (Alg. 1)
    return torch.cat([obs, act, rew[:, None], next_obs, ended(next_obs)[:, None]], -1)


def critic_loss(args, batch, alpha, actor, critic, critic_target):
    with torch.no_grad():
        next_act, next_log_prob = actor(batch.next_obs)  # (B, A), (B,)
        next_q = critic_target(batch.next_obs, next_act)  # (2, B)
        assert next_q.shape == (2, len(batch.rew))
        next_v = next_q.amin(0) - alpha * next_log_prob  # (B,)
        target = batch.rew + args.gamma * (1 - batch.done) * next_v
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()


def actor_loss(batch, alpha, actor, critic):
    act, log_prob = actor(batch.obs)  # (B, A), (B,)
    q = critic(batch.obs, act)  # (2, B)
    assert q.shape == (2, len(batch.rew))
    return (alpha * log_prob - q.amin(0)).mean(), log_prob.detach()


def alpha_loss(log_alpha, log_prob, target_entropy):
    return -log_alpha * (log_prob.mean(-1) + target_entropy)


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
    run = Run(__file__, args, schedule=True)  # of the actor's learning rate
    data = load(args.env, args.source, run.device, args.eval_env)
    args = run.tuned(data.task, TUNED)
    ended = [ENDED[body] for body in ENDED if body in data.task.env_id + data.task.env_spec]
    if not ended:
        raise UserError(f"When {data.task.name} ends is not known; MOPO can learn {', '.join(ENDED)}.")

    O, A, lead = data.obs_dim, data.act_dim, (args.seeds,) if args.seeds > 1 else ()
    held_rows, known_rows = held_out(data, args.seed)
    held = data.split(held_rows.expand(*lead, *held_rows.shape))
    bound = 2 * torch.maximum(data.obs.abs().amax(0), data.next_obs.abs().amax(0))  # (O,)

    dynamics = stack([Dynamics(NETWORKS, data) for _ in range(args.seeds)]).to(run.device)
    best = deepcopy(dynamics.layers).requires_grad_(False)
    best_error = torch.full((*lead, NETWORKS), torch.inf, device=run.device)
    epochs, stale, correlation = (torch.zeros(lead, device=run.device) for _ in range(3))
    groups = [dict(params=layer.parameters(), weight_decay=x) for layer, x in zip(dynamics.layers, WEIGHT_DECAY)]
    groups.append(dict(params=[dynamics.low, dynamics.high]))
    model_opt = torch.optim.Adam(groups, args.model_lr, fused=True, capturable=True)
    model_losses, model_errors = (lift(args.seeds, function, dynamics) for function in (model_loss, model_error))
    correlations = torch.no_grad()(lift(args.seeds, partial(rank_correlation, args), dynamics))

    actor = stack([Actor(O, A) for _ in range(args.seeds)]).to(run.device)
    critic = stack([Critic(O, A) for _ in range(args.seeds)]).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    log_alpha = torch.zeros(args.seeds, device=run.device, requires_grad=True)  # (S,)
    lr = torch.tensor(args.actor_lr, device=run.device)  # the actor's: a tensor, for update() to change
    groups = [dict(params=actor.parameters(), lr=lr), dict(params=[log_alpha], lr=args.actor_lr)]
    adam_opt = torch.optim.Adam([*groups, dict(params=critic.parameters())], args.lr, fused=True, capturable=True)
    critic_losses = lift(args.seeds, partial(critic_loss, args), actor, critic, critic_target)
    actor_losses = lift(args.seeds, actor_loss, actor, critic)

    @run.graphed
    @torch.enable_grad()
    def update_model():
        rows = torch.randint(len(known_rows), (*lead, NETWORKS, args.batch_size), device=run.device)
        loss = model_losses(data.split(known_rows[rows])).sum() + 0.02 * (dynamics.high - dynamics.low).sum()
        model_opt.zero_grad()
        loss.backward()
        model_opt.step()

    @torch.no_grad()
    def fit_model():
        """Epochs until PATIENCE of them have made no network better; the best of each network is kept."""
        updates = max(1, len(known_rows) // args.batch_size)  # in an epoch
        while stale.min() < PATIENCE and (left := args.model_updates - int(epochs.max()) * updates) > 0:
            for _ in range(min(left, updates)):
                update_model()
            error = model_errors(held)  # (N,), or (S, N)
            better = (error < 0.99 * best_error) & (stale < PATIENCE)[..., None]
            best_error.copy_(torch.where(better, error, best_error))
            stale.copy_(torch.where(better.any(-1), 0, stale + 1))
            epochs.add_(1)
            for kept, now in zip(best.parameters(), dynamics.layers.parameters()):
                kept.copy_(torch.where(better[..., None, None], now, kept))
            run.progress(f"model epoch {epochs.max():.0f}, held-out error {best_error.mean():.4f}")
        dynamics.layers.load_state_dict(best.state_dict())
        if not best_error.isfinite().all():
            raise UserError("The model diverged: its error on held-out data was never finite. Lower --model-lr.")

    block = args.h * args.rollouts
    model_rows = torch.zeros(*lead, args.keep * block, data.rows.shape[-1], device=run.device)
    step_in_model = lift(args.seeds, partial(imagine, args, ended[0], bound), actor, dynamics)

    @torch.no_grad()
    def roll_out(number):
        elites, place = best_error.argsort(-1)[..., :ELITES], block * (number % args.keep)
        for obs in data.sample(args.rollouts, args.seeds).obs.split(10_000, -2):
            for _ in range(args.h):
                rows = step_in_model(obs, elites)
                model_rows[..., place : place + obs.shape[-2], :] = rows
                place += obs.shape[-2]
                batch = data.split(rows)
                obs = torch.where(batch.done[..., None] > 0, data.sample(obs.shape[-2], args.seeds).obs, batch.next_obs)

    real = int(args.real_ratio * args.batch_size)
    agents = torch.arange(args.seeds, device=run.device)[:, None]

    def update(blocks):
        rows = torch.randint(blocks * block, (*lead, args.batch_size - real), device=run.device)
        of_model = model_rows[agents, rows] if lead else model_rows[rows]
        rows = torch.randint(len(data), (*lead, real), device=run.device)
        batch = data.split(torch.cat([data.rows[rows], of_model], -2))
        alpha = log_alpha.detach().exp()  # (S,)
        adam_opt.zero_grad()  # one step for all: each loss sees the others' networks before it
        loss_q = critic_losses(batch, alpha)  # (), or (S,)
        loss_q.sum().backward()
        loss_pi, log_prob = actor_losses(batch, alpha)  # log_prob (B,), or (S, B)
        loss_pi.sum().backward(inputs=list(actor.parameters()))  # the critics' weights have their gradient already
        alpha_loss(log_alpha, log_prob, -A).sum().backward()
        adam_opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the critics along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
            progress = adam_opt.state[log_alpha]["step"] / args.steps  # (), on the device: Adam's own count
            adam_opt.param_groups[0]["lr"].copy_(args.actor_lr / 2 * (1 + torch.cos(torch.pi * progress)))
        watched = {"critic_loss": loss_q, "actor_loss": loss_pi, "alpha": alpha}
        run.watch(watched | {"model_error": best_error.mean(-1), "penalty_correlation": correlation})

    update = run.graphed(update)
    act = lift(args.seeds, policy, actor)
    state = dict(dynamics=dynamics, best=best, best_error=best_error, epochs=epochs, stale=stale, model_opt=model_opt)
    state |= dict(correlation=correlation, model_rows=model_rows, actor=actor, critic=critic, log_alpha=log_alpha)
    state |= dict(critic_target=critic_target, adam_opt=adam_opt)
    for step in run.steps(data, **state):
        if step == 1:
            fit_model()
            correlation.copy_(correlations(held))
        times, rest = divmod(step - 1, args.rollout_every)
        if rest == 0:
            roll_out(times)
        update(min(times + 1, args.keep))
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
