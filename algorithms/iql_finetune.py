"""IQL online: Offline Reinforcement Learning with Implicit Q-Learning (Kostrikov et al., ICLR 2022), arXiv:2110.06169.

    offline  --offline-steps updates of iql.py, on the data alone
    online   act = clip(pi_act), pi_act ~ pi(obs); the transition joins the data; one update (Eq. 5 to 7) of them all

The paper's section 5.2. Both phases have the same losses and optimiser. With --checkpoint iql.py has trained the first.
--offline-share 0.5 keeps half of each batch for the data; the papers draw data and new transitions alike. As in the
authors' code, no learning rate falls (in iql.py's own phase the actor's does). Differs from theirs, beside what iql.py
says: the rewards of new transitions are scaled as the data's are; there they are not. One seed is a process.
Usage: python algorithms/iql_finetune.py --env hopper-medium --checkpoint runs/iql/.../checkpoint.pt
"""

import math
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
    expectile: float | None = None  # of the Q-values that V estimates (Eq. 5); None: as in TUNED
    beta: float | None = None  # inverse temperature of the policy's weights (Eq. 7); None: as in TUNED
    dropout: float | None = None  # of the actor's hidden layers, in training; None: as in TUNED
    offline_steps: int = 1_000_000  # updates of the offline phase; --checkpoint brings its own number
    checkpoint: str = ""  # of iql.py on the same data, instead of an offline phase
    offline_share: float | None = None  # of each online batch, from the data; None: data and others are drawn alike
    buffer_size: int = 1_000_000


TUNED = {  # "" for all tasks, then by family, then by task: configs/ of github.com/ikostrikov/implicit_q_learning
    "": dict(expectile=0.7, beta=3.0, dropout=0.0),
    **dict.fromkeys(("antmaze", "pointmaze", "stitch"), dict(expectile=0.9, beta=10.0)),  # the last two: as AntMaze
    **dict.fromkeys(("kitchen", "pen", "door", "hammer", "relocate"), dict(beta=0.5, dropout=0.1)),
}


def mlp(*sizes):
    layers = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian: obs (B, O) -> mean (B, A) in [-1, 1], log_std (A,)."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, act_dim)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs, dropout=0.0):
        x = obs
        for layer in self.net:
            x = F.dropout(layer(x), dropout) if isinstance(layer, nn.ReLU) else layer(x)
        return x.tanh(), self.log_std.clamp(-5, 2)


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


def policy(obs, actor):
    """The action to evaluate, the mean: obs (B, O) -> act (B, A)."""
    return actor(obs)[0]


def explore(obs, actor):
    """The action to learn from, drawn and clipped: obs (B, O) -> act (B, A)."""
    mean, log_std = actor(obs)
    return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)


def losses(args, batch, actor, critic, value, critic_target):
    """Of V, of the Q-functions and of pi; each has a gradient in its own network alone, so that they can be summed."""
    with torch.no_grad():
        target_q = critic_target(batch.obs, batch.act)  # (2, B)
        assert target_q.shape == (2, len(batch.rew))
        target = batch.rew + args.gamma * (1 - batch.done) * value(batch.next_obs).squeeze(-1)  # (B,)
    u = target_q.amin(0) - value(batch.obs).squeeze(-1)  # (B,)
    value_loss = ((args.expectile - (u < 0).float()).abs() * u**2).mean()  # (Eq. 5)

    critic_loss = ((critic(batch.obs, batch.act) - target) ** 2).mean(1).sum()  # of (2, B) (Eq. 6)

    weight = (args.beta * u.detach()).exp().clamp(max=100)
    mean, log_std = actor(batch.obs, args.dropout)  # (B, A), (A,)
    log_prob = -0.5 * ((batch.act - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)  # (B, A)
    actor_loss = -(weight * log_prob.sum(-1)).mean()  # (Eq. 7)
    return {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}


def train(args):
    run = Run(__file__, args)
    data = load(args.env, args.source, run.device, args.eval_env)
    run.tuned(data.task, TUNED)
    args = run.begins_with("iql", data)
    if not 0 < args.expectile < 1:
        raise UserError(f"--expectile must lie in (0, 1), not {args.expectile}.")
    env, rew_scale = data.task.make_env(), 1.0
    if data.task.family in ("halfcheetah", "hopper", "walker2d"):
        returns = data.returns()
        rew_scale = 1000 / (returns.max() - returns.min())
    data.rew *= rew_scale
    data.rew += data.task.rew_shift  # AntMaze: 0 at the goal, -1 before
    data.normalize_obs()  # (obs - mean) / (std + 1e-3)
    data.make_room(min(args.buffer_size, args.steps), args.offline_share)

    O, A = data.obs_dim, data.act_dim
    actor, critic, value = Actor(O, A).to(run.device), Critic(O, A).to(run.device), mlp(O, 256, 256, 1).to(run.device)
    critic_target = deepcopy(critic).requires_grad_(False)
    groups = [{"params": actor.parameters()}, {"params": [*critic.parameters(), *value.parameters()]}]  # as in iql.py
    opt = torch.optim.Adam(groups, args.lr, fused=True, capturable=True)

    def update():
        batch = data.sample(args.batch_size)
        loss = losses(args, batch, actor, critic, value, critic_target)
        opt.zero_grad()
        sum(loss.values()).backward()
        opt.step()
        with torch.no_grad():  # or the targets would drag the whole history of the networks along
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
        run.watch(loss)

    offline_update = run.graphed(update)  # online the table grows, which a graph cannot see
    obs, state = None, dict(actor=actor, critic=critic, critic_target=critic_target, value=value, buffer=data)
    for step in run.steps(data, **state, opt=opt):
        if step <= args.offline_steps:
            offline_update()
        else:
            if obs is None:  # seeded by the step, so that a resumed run meets the same start states
                obs, _ = env.reset(seed=10_000_000 * args.seed + step)
            with torch.no_grad():
                action = explore(data.normalized(obs)[None], actor)[0].cpu().numpy()
            next_obs, rew, terminated, truncated, _ = env.step(action)
            data.add(obs, action, rew_scale * rew + data.task.rew_shift, next_obs, terminated)
            run.resumable = terminated or truncated
            obs = None if run.resumable else next_obs
            update()
        if run.due(step):
            run.report(step, data.evaluate(lambda x: policy(x, actor), args.eval_episodes, args.seed))


if __name__ == "__main__":
    train(tyro.cli(Args))
