"""Discrete BCQ: Benchmarking Batch Deep Reinforcement Learning Algorithms (Fujimoto et al. 2019), arXiv:1910.01708.

    allowed(s) = {a: G(a | s) / max_b G(b | s) >= threshold}
    target     = rew + gamma (1 - done) Q'(next_obs, argmax_{a in allowed(next_obs)} Q(next_obs, a))
    L          = E huber(Q(obs, act) - target) - E log G(act | obs) + logit_penalty E logits^2
    act        = argmax_{a in allowed(obs)} Q(obs, a);   Q' is Q as it was at the last copy

G imitates the data: with --threshold 1 what is left is behaviour cloning, with 0 offline_dqn.py.
Differs from the authors' code: for vectors it takes a Polyak step of 0.005 each update instead of copies, which it has
for Atari (every 8,000 updates, batches of 32, lr 6.25e-5, eps 1.5e-4); there an action at the threshold is not allowed.
Usage: python algorithms/discrete_bcq.py --env icu-sepsis-clinicians
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    env: str = "cartpole-replay"  # the task, a Minari id, or an HDF5 file
    source: str = "auto"  # where its data come from: auto, d4rl, minari, collected
    eval_env: str = ""  # the Gymnasium environment to evaluate in, for an HDF5 file of your own
    seed: int = 0
    seeds: int = 1  # agents trained side by side: seed, seed + 1, ...
    steps: int = 100_000  # updates
    batch_size: int = 64
    lr: float = 3e-4
    gamma: float = 0.99  # discount
    target_every: int = 1_000  # updates between copies of the network into its target
    eval_every: int = 5_000
    eval_episodes: int = 10
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    resume: bool = False  # continue the run with these arguments from its checkpoint
    record: bool = False  # keep the run's record in results/runs/ as well
    video: bool = False  # draw the trained policy into the run's folder, at the end
    graph: bool = True  # replay each update as one CUDA graph, on a GPU
    threshold: float = 0.3  # allowed are actions with this share of the likeliest one's probability
    logit_penalty: float = 0.01  # weight of the imitation's squared logits


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
    """obs (B, O) -> q (B, A), and the logits of the data's actions (B, A)."""

    def __init__(self, obs_shape, n_actions):
        super().__init__()
        self.encoder, sizes = encoder(obs_shape)
        self.q, self.imitation = mlp(*sizes, n_actions), mlp(*sizes, n_actions)

    def forward(self, obs):
        x = self.encoder(obs)
        return self.q(x), self.imitation(x)


def policy(obs, critic, threshold):
    """The best action of those that the data take often enough: obs (B, O) -> act (B,)."""
    q, logits = critic(obs)  # (B, A) each
    prob = logits.softmax(-1)
    return q.masked_fill(prob < threshold * prob.amax(-1, keepdim=True), -torch.inf).argmax(-1)


def critic_loss(args, batch, critic, critic_target):
    with torch.no_grad():
        next_act = policy(batch.next_obs, critic, args.threshold)  # (B,), by the one network
        next_q = critic_target(batch.next_obs)[0].gather(-1, next_act[:, None]).squeeze(-1)  # (B,), judged by the other
        target = batch.rew + args.gamma * (1 - batch.done) * next_q
    q, logits = critic(batch.obs)  # (B, A) each
    q = q.gather(-1, batch.act[:, None]).squeeze(-1)  # (B,)
    imitation = F.cross_entropy(logits, batch.act) + args.logit_penalty * (logits**2).mean()
    return F.smooth_l1_loss(q, target) + imitation


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
    if not 0 <= args.threshold <= 1:
        raise UserError(
            f"--threshold must lie in [0, 1], not {args.threshold}: 0 allows every action, 1 the likeliest."
        )
    run = Run(__file__, args)
    data = load(args.env, args.source, run.device, args.eval_env, discrete=True)

    critic = stack([Critic(data.obs_shape, data.n_actions) for _ in range(args.seeds)]).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    critic_opt = torch.optim.Adam(critic.parameters(), args.lr, fused=True, capturable=True)
    critic_losses = lift(args.seeds, partial(critic_loss, args), critic, critic_target)

    def update(copy):
        batch = data.sample(args.batch_size, args.seeds)
        loss = critic_losses(batch)  # (), or (S,)
        critic_opt.zero_grad()
        loss.sum().backward()
        critic_opt.step()
        if copy:
            with torch.no_grad():  # or the target would drag the whole history of the critic along
                torch._foreach_copy_(list(critic_target.parameters()), list(critic.parameters()))
        run.watch({"critic_loss": loss})

    update = run.graphed(update)
    act = lift(args.seeds, partial(policy, threshold=args.threshold), critic)
    for step in run.steps(data, critic=critic, critic_target=critic_target, critic_opt=critic_opt):
        update(step % args.target_every == 0)
        if run.due(step):
            run.report(step, data.evaluate(act, args.eval_episodes, args.seed, args.seeds))


if __name__ == "__main__":
    train(tyro.cli(Args))
