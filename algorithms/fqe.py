"""FQE: fitted Q evaluation, of Batch Policy Learning under Constraints (Le et al., ICML 2019), arXiv:1903.08738.

    critic    target = rew + gamma (1 - done) Q'(next_obs, next_act),   next_act ~ pi(next_obs)
              L_Q    = E (Q(obs, act) - target)^2
    estimate  mean over the episodes' first obs of Q'(obs, act),   act ~ pi(obs)

The value of each policy from others' data; --truth 10 asks the environment, too. As Deep OPE (Fu et al., ICLR 2021,
arXiv:2103.16596) makes a network of it: a target network for a fit to its end, AdamW, targets within what rewards
allow, the estimate from the target network. Differs from it: rewards are divided by the largest return of the data, not
normalized; no bootstrap weights; no noise on actions. The interval is of the first observations, not of the fit.
Usage: python algorithms/fqe.py --env halfcheetah-medium --policies runs/td3_bc/.../checkpoint.pt runs/iql/...
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
from results.policies import load_policies
from results.run import Run


@dataclass
class Args:
    policies: tuple[str, ...]  # checkpoints, behaviour policies (.npz) or tables of probabilities (.npy)
    env: str = "halfcheetah-medium"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    eval_env: str = ""  # the Gymnasium environment to evaluate in, for an HDF5 file of your own
    seed: int = 0
    steps: int = 1_000_000  # updates
    batch_size: int = 256
    lr: float = 3e-4
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak step of the target networks
    eval_every: int = 5_000
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    noise: bool = False  # value the policies' distributions instead of their mean actions, which are what runs
    std: float = 0.0  # of noise on the actions of a deterministic policy (with --noise)
    share: float = 1.0  # of the episodes, those that are used, drawn at random
    weight_decay: float = 1e-5  # AdamW's
    truth: int = 0  # episodes of each policy in the environment, beside the estimates; 0: it is not asked


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Critic(nn.Module):
    """One Q-function: obs (B, O), act (B, A), one-hot where actions are discrete -> q (B,)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim + act_dim, 256, 256, 1)

    def forward(self, obs, act):
        return self.net(torch.cat([obs, act], -1)).squeeze(-1)


def critic_loss(args, bounds, batch, next_act, critic, critic_target):
    with torch.no_grad():
        next_q = critic_target(batch.next_obs, next_act)  # (B,)
        target = (batch.rew + args.gamma * (1 - batch.done) * next_q).clamp(*bounds)
    return F.mse_loss(critic(batch.obs, batch.act), target)


def value_bounds(rew, gamma):
    """What discounted returns cannot leave, whether episodes end or not: (low, high)."""
    if gamma == 1:
        return -float("inf"), float("inf")
    return min(0.0, rew.min().item()) / (1 - gamma), max(0.0, rew.max().item()) / (1 - gamma)


def discounted_returns(data, gamma):
    """Of each episode, (E,) float64."""
    starts = np.concatenate([[0], data.ends[:-1]])
    time = np.arange(len(data)) - starts.repeat(data.ends - starts)
    return np.add.reduceat(gamma**time * data.rew.cpu().double().numpy(), starts)


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
    S = len(args.policies)  # critics side by side, one a policy
    run = Run(__file__, args, agents=S)
    data = load(args.env, args.source, run.device, args.eval_env, None)  # discrete actions or continuous ones
    policies = load_policies(args.policies, data, args.std)
    if args.truth:
        data.task.make_env()  # an error comes now or never
    if not 0 < args.share <= 1:
        raise UserError(f"--share must lie in (0, 1], not {args.share}.")
    if args.share < 1:
        rng = np.random.default_rng(args.seed)
        data.keep(rng.choice(len(data.ends), max(1, int(args.share * len(data.ends))), replace=False))
    scale = torch.as_tensor(np.abs(discounted_returns(data, args.gamma)).max()).to(data.rew).clamp(1e-6)
    data.rew /= scale  # so that Q is of the order of 1
    if not data.n_actions:  # of states and frames nothing is measured in other units
        data.normalize_obs()
    bounds = value_bounds(data.rew, args.gamma)

    O, A = data.obs_dim, data.n_actions or data.act_dim
    critic = stack([Critic(O, A) for _ in range(S)]).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    opt = torch.optim.AdamW(critic.parameters(), args.lr, weight_decay=args.weight_decay, fused=True, capturable=True)
    critic_losses = lift(S, partial(critic_loss, args, bounds), critic, critic_target)
    values = lift(S, lambda obs, act, critic_target: critic_target(obs, act), critic_target)
    starts = data.batch(data.rows[np.concatenate([[0], data.ends[:-1]])]).obs  # (E, O)

    @torch.no_grad()
    def chosen(obs, choose):
        """By each policy: normalized obs (B, O), or of several policies (S, B, O) -> (B, A), or (S, B, A)."""
        obs = obs * data.obs_std + data.obs_mean
        return choose(policies[0], obs) if S == 1 else torch.stack([choose(*both) for both in zip(policies, obs)])

    act = partial(chosen, choose=lambda pi, obs: pi.act(obs, args.noise))

    def play(obs):
        if data.task.family == "icu":  # whose environment computes the value of probabilities
            return chosen(obs, lambda pi, obs: pi.probs(obs))
        return act(obs).argmax(-1) if data.n_actions else act(obs)

    def update():
        batch = data.sample(args.batch_size, S)
        if data.n_actions:
            batch = batch._replace(act=F.one_hot(batch.act, A).to(batch.obs))
        loss = critic_losses(batch, act(batch.next_obs))  # (), or (S,)
        opt.zero_grad()
        loss.sum().backward()
        opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the critics along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
        run.watch({"critic_loss": loss})

    @torch.no_grad()
    def estimates():
        """Each policy's value from each episode's start, (S, E)."""
        obs = starts if S == 1 else starts.expand(S, *starts.shape)
        return (scale * values(obs, act(obs))).view(S, -1).double().cpu().numpy()

    update = run.graphed(update)
    for step in run.steps(data, critic=critic, critic_target=critic_target, opt=opt, scale=scale):
        update()
        if run.due(step):
            run.report(step, None, estimate=torch.from_numpy(estimates().mean(1)))

    rng = np.random.default_rng(args.seed)
    for policy, own in zip(policies, estimates()):
        low, high = np.quantile(own[rng.integers(len(own), size=(1000, len(own)))].mean(1), (0.025, 0.975))
        print(f"{policy.name}: {own.mean():.4g}, 95 % interval {low:.4g} to {high:.4g}")
    if args.truth:
        truth = np.atleast_2d(data.evaluate(play, args.truth, args.seed, S, gamma=args.gamma))
        for policy, own in zip(policies, truth):
            print(f"{policy.name} in the environment: {own.mean():.4g} ± {own.std() / np.sqrt(len(own)):.2g}")


if __name__ == "__main__":
    train(tyro.cli(Args))
