"""SPOT: Supported Policy Optimization for Offline Reinforcement Learning (Wu et al., NeurIPS 2022), arXiv:2202.06239.

    vae      L_vae = E |decode(obs, z) - act|^2 / A + beta KL(encode(obs, act) || N(0, 1)) / 2 A,   z ~ encode(obs, act)
    critic   target = rew + gamma (1 - done) min_i Q'_i(next_obs, clip(pi'(next_obs) + noise)),   TD3's
    actor    L_pi  = -E Q_1(obs, pi) / E|Q_1(obs, pi)| + lam L_vae(obs, pi),   pi = pi(obs)
    online   act = clip(pi + noise); the transition joins the data; the same update, lam falling to cool * lam

L_vae stands for -log of the density that the data's actions have at pi. The VAE is trained in the first vae_steps of
the offline_steps, then fixed. As in the authors' code: dropout in the actor and its target, in training. Differs from
it: PyTorch's initial weights on mazes too; lam falls over --steps, not over a million; gamma is 0.99 on large mazes;
huge Q-values stop nothing; the phases share one count of TD3's delayed actor. One seed is a process.
Usage: python algorithms/spot.py --env hopper-medium --offline-steps 200000 --steps 100000
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

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
    policy_noise: float = 0.2  # TD3: standard deviation of the noise on target actions
    noise_clip: float = 0.5  # TD3: its bound
    policy_freq: int = 2  # TD3: critic updates to one of the actor
    expl_noise: float = 0.1  # standard deviation of the noise on the actions of the online phase
    beta: float = 0.5  # weight of the VAE's KL
    vae_lr: float = 1e-3  # its learning rate
    vae_steps: int = 100_000  # of the offline steps, the first, in which the VAE is trained and nothing else
    actor_lr: float | None = None  # None, here and below: as in TUNED
    lam: float | None = None  # weight of the policy's support
    cool: float | None = None  # lam falls with the online steps, linearly to 0 over --steps, but not below this share
    dropout: float | None = None  # of the actor's hidden layers, in training
    normalize: bool | None = None  # observations to mean 0 and deviation 1
    offline_steps: int = 1_100_000  # updates of the offline phase
    offline_share: float | None = None  # of each online batch, from the data; None: data and others are drawn alike
    buffer_size: int = 1_000_000


MAZE = dict(actor_lr=1e-4, lam=0.25, dropout=0.0, normalize=False)
TUNED = {  # "" for all tasks, then by family, then by task: configs/ of github.com/thuml/SPOT, Adroit's CORL's
    "": dict(actor_lr=3e-4, lam=0.1, cool=0.2, dropout=0.1, normalize=True),
    **dict.fromkeys(("antmaze", "pointmaze", "stitch"), MAZE),  # the last two, this repository's, as AntMaze's umaze
    **dict.fromkeys(("pen", "door", "hammer", "relocate"), dict(lam=1.0, cool=0.5)),
    "antmaze-medium-play": dict(lam=0.05),
    **dict.fromkeys(("antmaze-medium-diverse", "antmaze-large-play", "antmaze-large-diverse"), dict(lam=0.025)),
    **dict.fromkeys(("halfcheetah-medium", "halfcheetah-medium-replay"), dict(lam=0.05)),
    "halfcheetah-medium-expert": dict(lam=1.0),
    **dict.fromkeys(("hopper-medium-expert", "walker2d-medium", "walker2d-medium-replay"), dict(lam=0.2)),
    "walker2d-medium-expert": dict(lam=0.5),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """obs (B, O) -> act (B, A) in [-1, 1]; dropout: of the hidden layers."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, act_dim)

    def forward(self, obs, dropout=0.0):
        x = obs
        for layer in self.net:
            x = F.dropout(layer(x), dropout) if isinstance(layer, nn.ReLU) else layer(x)
        return x.tanh()


class EnsembleLinear(nn.Module):
    """The linear layers of N networks: x (B, I) or (N, B, I) -> (N, B, O); n: of the first n networks alone."""

    def __init__(self, N, in_dim, out_dim):
        super().__init__()
        layers = [nn.Linear(in_dim, out_dim) for _ in range(N)]
        self.weight = nn.Parameter(torch.stack([layer.weight.data.T for layer in layers]))  # (N, I, O)
        self.bias = nn.Parameter(torch.stack([layer.bias.data[None] for layer in layers]))  # (N, 1, O)

    def forward(self, x, n=None):
        weight, bias = (self.weight, self.bias) if n is None else (self.weight[:n], self.bias[:n])
        return torch.baddbmm(bias, x.expand(len(weight), *x.shape[-2:]), weight)  # x @ weight + bias


class Critic(nn.Module):
    """Two Q-functions: obs (B, O), act (B, A) -> q (2, B); n: of the first n alone."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        sizes = (obs_dim + act_dim, 256, 256, 1)
        self.layers = nn.ModuleList(EnsembleLinear(2, i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, obs, act, n=None):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        for layer in self.layers[:-1]:
            x = layer(x, n).relu_()  # (2, B, 256)
        return self.layers[-1](x, n).squeeze(-1)


class VAE(nn.Module):
    """The data's actions: obs, act (B, A) -> of the code z (B, 2 A) mean and log_std; decode: obs, z -> act (B, A)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.encoder = mlp(obs_dim + act_dim, 750, 750, 4 * act_dim)
        self.decoder = mlp(obs_dim + 2 * act_dim, 750, 750, act_dim)

    def forward(self, obs, act):
        mean, log_std = self.encoder(torch.cat([obs, act], -1)).chunk(2, -1)  # (B, 2 A) each
        return mean, log_std.clamp(-4, 15)

    def decode(self, obs, z):
        return self.decoder(torch.cat([obs, z], -1)).tanh()


def policy(obs, actor):
    """The action to evaluate: obs (B, O) -> act (B, A)."""
    return actor(obs)


def explore(args, obs, actor):
    """The action to learn from, with noise and clipped: obs (B, O) -> act (B, A)."""
    act = actor(obs)
    return (act + args.expl_noise * torch.randn_like(act)).clamp(-1, 1)


def vae_loss(args, obs, act, vae):
    """Of each action (B,): its distance to what is decoded, and its code's KL to N(0, 1), means over dimensions."""
    mean, log_std = vae(obs, act)  # (B, 2 A)
    z = mean + log_std.exp() * torch.randn_like(mean)
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).mean(-1)  # (B,)
    return ((vae.decode(obs, z) - act) ** 2).mean(-1) + args.beta * kl


def critic_loss(args, batch, critic, critic_target, actor_target):
    with torch.no_grad():
        noise = (torch.randn_like(batch.act) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_act = (actor_target(batch.next_obs, args.dropout) + noise).clamp(-1, 1)  # (B, A)
        next_q = critic_target(batch.next_obs, next_act)  # (2, B)
        assert next_q.shape == (2, len(batch.rew))
        target = batch.rew + args.gamma * (1 - batch.done) * next_q.amin(0)  # (B,)
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()


def actor_loss(args, batch, lam, actor, critic, vae):
    act = actor(batch.obs, args.dropout)  # (B, A)
    (q,) = critic(batch.obs, act, 1)  # (B,)
    support = vae_loss(args, batch.obs, act, vae).mean()
    return -q.mean() / q.abs().mean().detach() + lam * support, support


def train(args):
    run = Run(__file__, args, schedule=True)  # of lam
    data = load(args.env, args.source, run.device, args.eval_env)
    args = run.tuned(data.task, TUNED)
    if args.vae_steps >= args.offline_steps:
        raise UserError(f"--vae-steps {args.vae_steps} must leave some of the --offline-steps {args.offline_steps}.")
    env = data.task.make_env()
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before
    if args.normalize:
        data.normalize_obs()  # (obs - mean) / (std + 1e-3)
    data.make_room(min(args.buffer_size, args.steps), args.offline_share)

    O, A = data.obs_dim, data.act_dim
    actor, critic, vae = Actor(O, A).to(run.device), Critic(O, A).to(run.device), VAE(O, A).to(run.device)
    actor_target, critic_target = deepcopy(actor).requires_grad_(False), deepcopy(critic).requires_grad_(False)
    actor_opt = torch.optim.Adam(actor.parameters(), args.actor_lr, fused=True, capturable=True)
    critic_opt = torch.optim.Adam(critic.parameters(), args.lr, fused=True, capturable=True)
    vae_opt = torch.optim.Adam(vae.parameters(), args.vae_lr, fused=True, capturable=True)

    def vae_update():
        batch = data.sample(args.batch_size)
        loss = vae_loss(args, batch.obs, batch.act, vae).mean()
        vae_opt.zero_grad()
        loss.backward()
        vae_opt.step()
        run.watch({"vae_loss": loss})

    def update(with_actor, lam):
        batch = data.sample(args.batch_size)
        loss = critic_loss(args, batch, critic, critic_target, actor_target)
        critic_opt.zero_grad()
        loss.backward()
        critic_opt.step()
        losses = {"critic_loss": loss}

        if with_actor:
            loss, support = actor_loss(args, batch, lam, actor, critic, vae)
            actor_opt.zero_grad()
            loss.backward(inputs=list(actor.parameters()))  # the critic's and the VAE's weights need no gradient here
            actor_opt.step()
            losses |= {"actor_loss": loss, "vae_loss": support}
            with torch.no_grad():  # or the targets would drag the whole history of the networks along
                for target, net in ((actor_target, actor), (critic_target, critic)):
                    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), args.tau)
        run.watch(losses)

    # Online the table grows and lam falls, which a graph cannot see.
    vae_update, offline_update = run.graphed(vae_update), run.graphed(update)
    obs, state = None, dict(actor=actor, actor_target=actor_target, critic=critic, critic_target=critic_target, vae=vae)
    state |= dict(buffer=data, actor_opt=actor_opt, critic_opt=critic_opt, vae_opt=vae_opt)
    for step in run.steps(data, **state):
        if step <= args.vae_steps:
            vae_update()
        elif step <= args.offline_steps:
            offline_update(step % args.policy_freq == 0, args.lam)
        else:
            if obs is None:  # seeded by the step, so that a resumed run meets the same start states
                obs, _ = env.reset(seed=10_000_000 * args.seed + step)
            with torch.no_grad():
                action = explore(args, data.normalized(obs)[None], actor)[0].cpu().numpy()
            next_obs, rew, terminated, truncated, _ = env.step(action)
            data.add(obs, action, rew + data.task.rew_shift, next_obs, terminated)
            run.resumable = terminated or truncated
            obs = None if run.resumable else next_obs
            lam = args.lam * max(args.cool, 1 - (step - args.offline_steps) / args.steps)
            update(step % args.policy_freq == 0, lam)
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
