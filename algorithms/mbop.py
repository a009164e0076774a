"""MBOP: Model-Based Offline Planning (Argenson & Dulac-Arnold, ICLR 2021), arXiv:2008.05556.

    ensembles  model: next_obs - obs, rew of (obs, act); prior: act, and value: the next H rewards, of (obs, last_act)
    candidate  of network k:  act_t = (1 - beta) (prior_k(obs_t, act_t-1) + sigma eps) + beta plan_t,   t = 0 .. H - 1
               obs_t+1, rew_t = model_k(obs_t, act_t);   R = sum_t rew_t + mean_k value_k(obs_H, act_H-1)    (Alg. 2)
    plan       sum_n exp(kappa R_n) act_n / sum_n exp(kappa R_n), of which the first action is done, and so on

Without official code; networks, batches and lr as in MOPP's MBOP, beta and kappa as in Acme's. Differs from both: the
model predicts the change of obs; actions are clipped, not normalised; value is fitted as it is asked, on the action
before obs. It counts rewards to a termination, which is all that plans know of falls, and leaves out what a time-out
cut. --planner cem, the cross-entropy method, plans without prior: Gaussian actions, refitted to the best tenth.
Usage: python algorithms/mbop.py --env halfcheetah-medium
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
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
    seeds: int = 1  # agents trained side by side: seed, seed + 1, ...
    steps: int = 80_000  # updates
    batch_size: int = 512
    lr: float = 1e-3
    eval_every: int = 20_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    planner: Literal["mppi", "cem"] = "mppi"  # MBOP's, or the cross-entropy method without a prior
    horizon: int = 4  # H, steps of a plan
    candidates: int = 34  # of each network
    sigma: float = 0.2  # of the noise on the prior's action; of cem's actions at first it is 1
    beta: float = 0.0  # share of the last plan in an action
    kappa: float = 3.0  # the larger, the more the best candidates count
    iterations: int = 5  # of cem


NETWORKS, WIDTH = 3, 500  # of each ensemble; of a hidden layer


class EnsembleLinear(nn.Module):
    """The linear layers of N networks: x (B, I) or (N, B, I) -> (N, B, O)."""

    def __init__(self, N, in_dim, out_dim):
        super().__init__()
        layers = [nn.Linear(in_dim, out_dim) for _ in range(N)]
        self.weight = nn.Parameter(torch.stack([layer.weight.data.T for layer in layers]))  # (N, I, O)
        self.bias = nn.Parameter(torch.stack([layer.bias.data[None] for layer in layers]))  # (N, 1, O)

    def forward(self, x):
        return torch.baddbmm(self.bias, x.expand(len(self.weight), *x.shape[-2:]), self.weight)  # x @ weight + bias


class Ensemble(nn.Module):
    """N networks of two inputs: (B, I), (B, J), or with an axis N before -> (N, B, out_dim), in units of their own."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        sizes = (in_dim, WIDTH, WIDTH, out_dim)
        self.layers = nn.ModuleList(EnsembleLinear(NETWORKS, i, o) for i, o in zip(sizes, sizes[1:]))
        self.register_buffer("mean", torch.zeros(out_dim))
        self.register_buffer("std", torch.ones(out_dim))

    def forward(self, obs, act):
        x = torch.cat([obs, act], -1)
        for layer in self.layers[:-1]:
            x = layer(x).relu_()  # (N, B, WIDTH)
        return self.mean + self.std * self.layers[-1](x)


class Actor(nn.Module):
    """What is planned with."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.model = Ensemble(obs_dim + act_dim, obs_dim + 1)
        self.prior = Ensemble(obs_dim + act_dim, act_dim)
        self.value = Ensemble(obs_dim + act_dim, 1)

    def forward(self, name, obs, act):
        return getattr(self, name)(obs, act)


def imagine(args, obs, act, choose, actor):
    """Candidates, as many for each network, all side by side: obs (E, O), their last act (E, A) and choose(t, obs,
    act), which gives the next one's -> their actions (E, N, H, A) and what they return (E, N)."""
    E, n = len(obs), args.candidates
    obs, act = (x.repeat_interleave(n, 0).expand(NETWORKS, E * n, -1) for x in (obs, act))  # (N, E n, ...)
    acts, total = [], 0
    for t in range(args.horizon):
        act = choose(t, obs, act)
        y = actor("model", obs, act)  # (N, E n, O + 1)
        obs, total = obs + y[..., :-1], total + y[..., -1]
        acts.append(act)
    total = total + actor("value", obs.flatten(0, 1), act.flatten(0, 1)).mean(0).view(NETWORKS, E * n)
    of_each = lambda x: x.unflatten(1, (E, n)).transpose(0, 1).flatten(1, 2)  # (N, E n, ...) -> (E, N n, ...)
    return of_each(torch.stack(acts, 2)), of_each(total)


def mppi(args, obs, plan, actor):
    """obs (E, O) and the plan of the step before (E, H, A) -> that of this step."""
    last = plan.repeat_interleave(args.candidates, 0)  # (E n, H, A)

    def choose(t, obs, act):
        act = actor("prior", obs, act)  # (N, E n, A)
        act = act + args.sigma * torch.randn_like(act)
        return ((1 - args.beta) * act + args.beta * last[:, t]).clamp(-1, 1)

    acts, total = imagine(args, obs, plan[:, 0], choose, actor)
    weight = (args.kappa * total).softmax(1)  # (E, N), of candidates
    return (weight[..., None, None] * acts).sum(1)  # (Alg. 2)


def cem(args, obs, plan, actor):
    """The same, from a Gaussian around the last plan, a step on."""
    mean = torch.cat([plan[:, 1:], torch.zeros_like(plan[:, :1])], 1)  # (E, H, A)
    std = torch.ones_like(mean)
    for _ in range(args.iterations):
        spread = lambda x: x.repeat_interleave(args.candidates, 0)  # (E, H, A) -> (E n, H, A)
        wide = spread(mean).expand(NETWORKS, *spread(mean).shape)
        drawn = (wide + spread(std) * torch.randn_like(wide)).clamp(-1, 1)  # (N, E n, H, A)
        acts, total = imagine(args, obs, plan[:, 0], lambda t, obs, act, drawn=drawn: drawn[..., t, :], actor)
        best = total.topk(max(2, total.shape[1] // 10), 1).indices  # (E, a tenth)
        elites = acts.gather(1, best[..., None, None].expand(-1, -1, *acts.shape[2:]))
        mean, std = elites.mean(1), elites.std(1)
    return mean


def policy(obs, plan, actor, args):
    """The plan whose first action is to be evaluated: obs (E, O), the last plan (E, H, A) -> (E, H, A)."""
    return {"mppi": mppi, "cem": cem}[args.planner](args, obs, plan, actor)


class Rollout:
    """Acts in episodes side by side, (E,) or of several agents (S, E), by plans that go on from each other.

    Called at each step with obs (E, O); returns act (E, A).
    """

    def __init__(self, args, act_dim, act):
        self.args, self.act_dim, self.act, self.plan = args, act_dim, act, None

    def __call__(self, obs):
        if self.plan is None:
            self.plan = obs.new_zeros(*obs.shape[:-1], self.args.horizon, self.act_dim)
        self.plan = self.act(obs, self.plan)
        return self.plan[..., 0, :]


def losses(scale, batch, last_act, value, known, actor):
    """Squared errors of model, prior and value in units of what they predict: columns (N, B, ...) -> (), (), ()."""

    def error(name, obs, act, target):
        return (((actor(name, obs, act) - target) / scale[name]) ** 2).mean(-1)  # (N, B)

    y = torch.cat([batch.next_obs - batch.obs, batch.rew[..., None]], -1)  # (N, B, O + 1)
    of_model, of_prior = error("model", batch.obs, batch.act, y), error("prior", batch.obs, last_act, batch.act)
    of_value = error("value", batch.obs, last_act, value[..., None])
    assert of_model.shape == of_prior.shape == of_value.shape == known.shape
    of_value = (of_value * known).sum(1) / known.sum(1).clamp(min=1)
    return of_model.mean(1).sum(), of_prior.mean(1).sum(), of_value.sum()


def index(args, data):
    """For each row: the action before it, 0 at an episode's start (N, A); the sum of H rewards from it on, of fewer
    before a termination (N,); and whether it is known, as no time-out cuts it (N,)."""
    starts = np.concatenate([[0], data.ends[:-1]])
    last_act = data.act.roll(1, 0)
    last_act[starts] = 0
    end = torch.from_numpy(np.repeat(data.ends, data.ends - starts)).to(data.rows.device)
    now = torch.arange(len(data), device=end.device)
    total = torch.cat([now.new_zeros(1), data.rew.double().cumsum(0)])  # (N + 1,)
    value = total[torch.minimum(now + args.horizon, end)] - total[now]
    known = (now + args.horizon <= end) | (data.done[end - 1] > 0)
    return last_act, value.to(data.rew), known


def sample_rows(args, data, last_act, value, known):
    """A batch for each network, on the device; of several agents, with a leading axis (S,)."""
    lead = (args.seeds,) if args.seeds > 1 else ()
    rows = torch.randint(len(data), (*lead, NETWORKS, args.batch_size), device=known.device)
    return data.split(data.rows[rows]), last_act[rows], value[rows], known[rows]


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
    if min(args.horizon, args.candidates, args.iterations) < 1:
        raise UserError("--horizon, --candidates and --iterations must be at least 1.")
    run = Run(__file__, args)
    data = load(args.env, args.source, run.device, args.eval_env)
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)
    last_act, value, known = index(args, data)
    if not known.any():
        raise UserError(f"No episode of {data.task.name} has {args.horizon} steps: lower --horizon.")

    actor = stack([Actor(data.obs_dim, data.act_dim) for _ in range(args.seeds)]).to(run.device)
    y = torch.cat([data.next_obs - data.obs, data.rew[:, None]], 1)
    for net, x in (actor.model, y), (actor.prior, data.act), (actor.value, value[known][:, None]):
        net.mean.copy_(x.mean(0))
        net.std.copy_(x.std(0) + 1e-6)
    opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True, capturable=True)
    scale = {name: net.std for name, net in actor.named_children()}
    all_losses = lift(args.seeds, partial(losses, scale), actor)

    def update():
        of_model, of_prior, of_value = all_losses(*sample_rows(args, data, last_act, value, known))  # (), or (S,)
        opt.zero_grad()
        (of_model + of_prior + of_value).sum().backward()
        opt.step()
        run.watch({"model_loss": of_model, "prior_loss": of_prior, "value_loss": of_value})

    update = run.graphed(update)
    act = lift(args.seeds, partial(policy, args=args), actor)
    for step in run.steps(data, actor=actor, opt=opt):
        update()
        if run.due(step):
            rollout = Rollout(args, data.act_dim, act)
            run.report(step, data.evaluate(rollout, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
