"""AWAC online: Accelerating Online Reinforcement Learning with Offline Datasets (Nair et al. 2020), arXiv:2006.09359.

    offline  --offline-steps updates of awac.py, on the data alone
    online   act = clip(pi_act), pi_act ~ pi(obs); the transition joins the data; one update of them all

The whole of Algorithm 1: neither the losses (the actor's is Eq. 13) nor the optimisers change at the switch.
With --checkpoint awac.py has trained the first phase. --offline-share 0.5 keeps half of each batch for the data; the
paper draws data and new transitions alike. Differs from the authors' code as awac.py does. One seed is a process.
Usage: python algorithms/awac_finetune.py --env hopper-medium --checkpoint runs/awac/.../checkpoint.pt
"""

import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import load
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
    lam: float | None = None  # temperature of the policy's weights (Eq. 13); None: as in TUNED
    offline_steps: int = 1_000_000  # updates of the offline phase; --checkpoint brings its own number
    checkpoint: str = ""  # of awac.py on the same data, instead of an offline phase
    offline_share: float | None = None  # of each online batch, from the data; None: data and others are drawn alike
    buffer_size: int = 1_000_000


TUNED = {  # "" for all tasks, then by family, then by task: configs/offline/awac of github.com/corl-team/CORL
    "": dict(lam=0.3333),
    **dict.fromkeys(("antmaze", "pointmaze", "stitch"), dict(lam=0.1)),  # the last two, this repository's: as AntMaze
    **dict.fromkeys(("maze2d", "pen", "door", "hammer", "relocate"), dict(lam=0.1)),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian: obs (B, O) -> mean (B, A), log_std (A,)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, 256, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs):
        return self.net(obs), self.log_std.clamp(-20, 2)


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
    """Two Q-functions of three hidden layers: obs (B, O), act (B, A) -> q (2, B)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        sizes = (obs_dim + act_dim, 256, 256, 256, 1)
        self.layers = nn.ModuleList(EnsembleLinear(2, i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, obs, act):
        x = torch.cat([obs, act], -1)  # (B, O + A)
        for layer in self.layers[:-1]:
            x = layer(x).relu_()  # (2, B, 256)
        return self.layers[-1](x).squeeze(-1)


def policy(obs, actor):
    """The action to evaluate, the mean: obs (B, O) -> act (B, A)."""
    return actor(obs)[0]


def explore(obs, actor):
    """The action to learn from, drawn and clipped: obs (B, O) -> act (B, A)."""
    mean, log_std = actor(obs)
    return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)


def critic_loss(args, batch, critic, critic_target, actor):
    with torch.no_grad():
        mean, log_std = actor(batch.next_obs)  # (B, A), (A,)
        next_act = (mean + log_std.exp() * torch.randn_like(batch.act)).clamp(-1, 1)
        next_q = critic_target(batch.next_obs, next_act)  # (2, B)
        assert next_q.shape == (2, len(batch.rew))
        target = batch.rew + args.gamma * (1 - batch.done) * next_q.amin(0)  # (B,)
    q = critic(batch.obs, batch.act)  # (2, B)
    return ((q - target) ** 2).mean(1).sum()


def actor_loss(args, batch, actor, critic):
    mean, log_std = actor(batch.obs)  # (B, A), (A,)
    with torch.no_grad():
        pi_act = (mean + log_std.exp() * torch.randn_like(batch.act)).clamp(-1, 1)
        q, pi_q = critic(batch.obs, batch.act), critic(batch.obs, pi_act)  # (2, B)
        assert q.shape == pi_q.shape == (2, len(batch.rew))
        adv = q.amin(0) - pi_q.amin(0)  # (B,)
        weight = (adv / args.lam).exp().clamp(max=100)
    log_prob = -0.5 * ((batch.act - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)  # (B, A)
    return -(weight * log_prob.sum(-1)).mean()  # (Eq. 13)


def train(args):
    run = Run(__file__, args)
    data = load(args.env, args.source, run.device, args.eval_env)
    run.tuned(data.task, TUNED)
    args = run.begins_with("awac", data)
    env = data.task.make_env()
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)
    data.make_room(min(args.buffer_size, args.steps), args.offline_share)

    O, A = data.obs_dim, data.act_dim
    actor, critic = Actor(O, A).to(run.device), Critic(O, A).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    actor_opt = torch.optim.Adam(actor.parameters(), args.lr, fused=True, capturable=True)
    critic_opt = torch.optim.Adam(critic.parameters(), args.lr, fused=True, capturable=True)

    def update():
        batch = data.sample(args.batch_size)
        loss_q = critic_loss(args, batch, critic, critic_target, actor)
        critic_opt.zero_grad()
        loss_q.backward()
        critic_opt.step()

        loss_pi = actor_loss(args, batch, actor, critic)
        actor_opt.zero_grad()
        loss_pi.backward()
        actor_opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the networks along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
        run.watch({"critic_loss": loss_q, "actor_loss": loss_pi})

    offline_update = run.graphed(update)  # online the table grows, which a graph cannot see
    obs, state = None, dict(actor=actor, critic=critic, critic_target=critic_target, buffer=data)
    for step in run.steps(data, **state, actor_opt=actor_opt, critic_opt=critic_opt):
        if step <= args.offline_steps:
            offline_update()
        else:
            if obs is None:  # seeded by the step, so that a resumed run meets the same start states
                obs, _ = env.reset(seed=10_000_000 * args.seed + step)
            with torch.no_grad():
                action = explore(data.normalized(obs)[None], actor)[0].cpu().numpy()
            next_obs, rew, terminated, truncated, _ = env.step(action)
            data.add(obs, action, rew + data.task.rew_shift, next_obs, terminated)
            run.resumable = terminated or truncated
            obs = None if run.resumable else next_obs
            update()
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
