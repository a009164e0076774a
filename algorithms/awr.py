"""AWR: Advantage-Weighted Regression: Simple and Scalable Off-Policy RL (Peng et al. 2019), arXiv:1910.00177.

    returns  R    = rew + gamma [(1 - lam) V(next_obs) + lam R(next_obs)],   TD(lambda); V alone where an episode is cut
    value    L_V  = 0.5 E ((1 - gamma) (R - V(obs)))^2
    actor    L_pi = -E min(exp(A / beta), 20) log pi(act | obs) + 5 E |mean - clip(mean)|^2
             A    = R - V(obs), less its mean over the data, divided by its deviation

In turn: 200 updates of V, new returns, 1,000 of the actor, which --steps counts. As in the authors' code, not in the
paper, A is normalized over the data. Differs from that code: it learns online from its 50,000 newest transitions,
D4RL's scores of AWR are of the last 50,000 of each set, here it is all of them, drawn with replacement, observations
normalized over all, not the first 300,000; PyTorch's initial weights; AntMaze's rewards are lowered by 1.
Usage: python algorithms/awr.py --env halfcheetah-medium
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    steps: int = 1_000_000  # updates of the actor
    batch_size: int = 256
    lr: float = 0.01
    gamma: float = 0.99  # discount
    eval_every: int = 5_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    lam: float = 0.95  # of TD(lambda): 0 for one step of rewards before V, 1 for all of the episode's
    beta: float = 1.0  # temperature of the actor's weights
    critic_steps: int = 200  # updates of V between two estimates of the returns
    actor_steps: int = 1000  # and after them of the actor
    actor_lr: float | None = None  # of the actor, --lr is V's; None: as in TUNED
    action_std: float | None = None  # the actor's deviation, which is not learned; None: as in TUNED


TUNED = {  # "" for all tasks, then by family, then by task: awr_configs.py of github.com/xbpeng/awr
    "": dict(actor_lr=5e-5, action_std=0.2),
    "halfcheetah": dict(action_std=0.4),
    "hopper": dict(actor_lr=1e-4, action_std=0.4),
    "walker2d": dict(actor_lr=2.5e-5, action_std=0.4),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """The mean of a Gaussian: obs (B, O) -> mean (B, A)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 128, 64, act_dim)

    def forward(self, obs):
        return self.net(obs)


def policy(obs, actor):
    """The action to evaluate: obs (B, O) -> act (B, A)."""
    return actor(obs)


def values(args, obs, value):
    """V, which the network gives in units of 1 / (1 - gamma): obs (B, O) -> (B,)."""
    return value(obs).squeeze(-1) / (1 - args.gamma)


def lambda_returns(args, rew, done, next_v, ends):
    """R by TD(lambda): rew and done (N,), V of the next observations (..., N), where episodes end (E,) -> (..., N)."""
    returns = rew + args.gamma * (1 - done) * next_v  # as it is in an episode's last row
    rows, starts = ends - 1, np.concatenate([[0], ends[:-1]])
    while True:  # from there a row back in every episode, until the longest is done
        longer = rows > starts
        if not longer.any():
            return returns
        rows, starts = rows[longer] - 1, starts[longer]
        mixed = (1 - args.lam) * next_v[..., rows] + args.lam * returns[..., rows + 1]
        returns[..., rows] = rew[rows] + args.gamma * mixed


def weights(args, adv):
    """Of the actor's regression: advantages of all data (..., N) -> (..., N)."""
    std, mean = torch.std_mean(adv, -1, correction=0, keepdim=True)
    return ((adv - mean) / (std + 1e-5) / args.beta).exp().clamp(max=20)


def critic_loss(args, batch, returns, value):
    return 0.5 * ((1 - args.gamma) * (returns - values(args, batch.obs, value))).square().mean()


def actor_loss(args, batch, weight, actor):
    mean = actor(batch.obs)  # (B, A)
    log_prob = -0.5 * ((batch.act - mean) / args.action_std) ** 2 - math.log(args.action_std * math.sqrt(2 * math.pi))
    outside = mean - mean.clamp(-1, 1)  # (B, A)
    return -(weight * log_prob.sum(-1)).mean() + 5 * outside.square().sum(-1).mean()


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
    if not 0 <= args.lam <= 1:
        raise UserError(f"--lam must lie in [0, 1], not {args.lam}.")
    data = load(args.env, args.source, run.device, args.eval_env)
    args = run.tuned(data.task, TUNED)
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)

    O, A, S = data.obs_dim, data.act_dim, args.seeds
    actor = stack([Actor(O, A) for _ in range(S)]).to(run.device)
    value = stack([mlp(O, 128, 64, 1) for _ in range(S)]).to(run.device)
    shape = () if S == 1 else (S,)  # of what each agent has one number of
    returns, weight = torch.zeros(2, *shape, len(data), device=run.device)  # of every row
    loss_v = torch.zeros(shape, device=run.device)
    actor_opt = torch.optim.SGD(actor.parameters(), args.actor_lr, momentum=0.9, fused=True)
    critic_opt = torch.optim.SGD(value.parameters(), args.lr, momentum=0.9, fused=True)
    v = lift(S, partial(values, args), value)
    critic_losses = lift(S, partial(critic_loss, args), value)
    actor_losses = lift(S, partial(actor_loss, args), actor)

    rew, done = (x.cpu().double().numpy() for x in (data.rew, data.done))

    @torch.no_grad()
    def weigh():
        """The returns of all data by V as it is, and the actor's weights."""
        all_v = lambda obs: torch.cat([v(part.expand(*shape, -1, -1)) for part in obs.split(100_000)], -1)
        next_v = all_v(data.next_obs).cpu().double().numpy()
        returns.copy_(torch.from_numpy(lambda_returns(args, rew, done, next_v, data.ends)))
        weight.copy_(weights(args, returns - all_v(data.obs)))

    def update(of_actor):
        rows = torch.randint(data.size, (*shape, args.batch_size), device=run.device)
        batch = data.split(data.rows[rows])
        if not of_actor:
            loss = critic_losses(batch, returns.gather(-1, rows))  # (), or (S,)
            critic_opt.zero_grad()
            loss.sum().backward()
            critic_opt.step()
            loss_v.copy_(loss.detach())
            return
        loss = actor_losses(batch, weight.gather(-1, rows))
        actor_opt.zero_grad()
        loss.sum().backward()
        actor_opt.step()
        run.watch({"critic_loss": loss_v, "actor_loss": loss})

    update = run.graphed(update)
    act = lift(S, policy, actor)
    state, weighed = dict(actor=actor, value=value, loss_v=loss_v), False
    for step in run.steps(data, **state, actor_opt=actor_opt, critic_opt=critic_opt):
        if not weighed:  # at the start; after a resume, V being what it was, they come out as they were
            weigh()
            weighed = True
        if (step - 1) % args.actor_steps == 0:
            for _ in range(args.critic_steps):
                update(False)
            weigh()
        update(True)
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
