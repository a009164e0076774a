"""What the tests of whole updates share: `train` itself, run for a few steps in float64 with all that was random
written down, and the plain pieces that papers take for granted. Nothing here comes from a script."""

import copy
import dataclasses

import h5py
import numpy as np
import torch

from datasets import Dataset
from results.run import Run

RANDOM = ("randn_like", "rand_like", "randn", "rand", "randint", "randperm")  # torch's functions that scripts draw with


@dataclasses.dataclass
class Traced:
    start: dict  # what a checkpoint would hold before the first update: {name: tensor, or state_dict}
    end: dict  # the same after the last
    rows: torch.Tensor  # (N, 2 O + A + 2) the data as `train` had changed them before the first update
    batches: list  # that Dataset.sample returned, in order
    random: list  # (name, tensor) of each draw of RANDOM within the updates, in order
    watched: list  # {name: loss} of each step


def copied(state):
    return {
        name: item.detach().clone() if isinstance(item, torch.Tensor) else copy.deepcopy(item.state_dict())
        for name, item in state.items()
    }


def noted(name, note):
    """torch's function of that name, after which `note(name, what it drew)` is called."""
    function = getattr(torch, name)

    def draw(*words, **options):
        value = function(*words, **options)
        note(name, value.clone())
        return value

    return draw


def trace(script, monkeypatch, args, task=None):
    """Trains, and returns what was Traced. task: what of the data's task is to be changed, {field: value}."""
    traced, steps, sample = Traced({}, {}, None, [], [], []), Run.steps, Dataset.sample
    load = getattr(script, "load", None)  # not of one that makes its own data
    drawing = []

    def load_double(*words, **options):
        data = load(*words, **options)
        data.rows = data.rows.double()
        data.obs_mean, data.obs_std = data.obs_mean.double(), data.obs_std.double()
        data.task = dataclasses.replace(data.task, **task or {})
        return data

    def steps_traced(run, data, stride=1, **state):
        traced.start, traced.rows = copied(state), data.rows.clone()
        drawing.append(True)
        yield from steps(run, data, stride, **state)
        traced.end = copied(state)

    def sample_traced(data, *words):
        drawing.append(False)  # the indices are the batch's affair
        traced.batches.append(type(batch := sample(data, *words))(*(column.clone() for column in batch)))
        drawing.pop()
        return batch

    def note(name, value):
        if drawing and drawing[-1]:
            traced.random.append((name, value))

    def watch(run, losses):
        traced.watched.append({name: loss.detach().clone() for name, loss in losses.items()})

    with monkeypatch.context() as patch:
        for name in RANDOM:
            patch.setattr(torch, name, noted(name, note))
        patch.setattr(script, "load", load_double, raising=bool(load))
        patch.setattr(Run, "steps", steps_traced)
        patch.setattr(Dataset, "sample", sample_traced)
        patch.setattr(Run, "watch", watch)
        patch.setattr(Run, "_changed", lambda run: "")  # so many values make too long a folder's name
        patch.setattr(Run, "_check_finite", lambda run, step: None)  # it counts what was watched
        patch.setattr(Dataset, "evaluate", lambda data, _, episodes, *_words, **_k: np.zeros(episodes))
        torch.set_default_dtype(torch.float64)
        try:
            script.train(args)
        finally:
            torch.set_default_dtype(torch.float32)
    return traced


def columns(path):
    """obs, act, rew, next_obs, done of a collected file, float64 tensors."""
    keys = ("observations", "actions", "rewards", "next_observations", "terminals")
    with h5py.File(path) as file:
        return [torch.from_numpy(file[key][:].astype(np.float64)) for key in keys]


def episodes(path):
    """The rows of each episode of a collected file, one slice each, in order."""
    with h5py.File(path) as file:
        ends = (np.flatnonzero(file["terminals"][:] | file["timeouts"][:]) + 1).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def table(*cols):
    """The rows (N, …) that a Dataset of these columns holds."""
    return torch.cat([col if col.ndim == 2 else col[:, None] for col in cols], 1)


class World:
    """An online phase as its test plays it: the environment, and the normalized transitions that it gave, in order."""

    def __init__(self, task, seed, mean, std, reward=lambda rew: rew):
        self.env, self.seed, self.mean, self.std, self.reward = task.make_env(), seed, mean, std, reward
        self.raw, self.rows, self.obs, self.over = None, [], None, False

    def look(self, step):
        """The normalized obs (1, O) of that step, the first of an episode from a seed of its own."""
        if self.raw is None:
            self.raw, _ = self.env.reset(seed=10_000_000 * self.seed + step)
        self.obs = self.seen(self.raw)
        return self.obs

    def seen(self, raw):
        return ((torch.from_numpy(raw).float().double() - self.mean) / self.std)[None]

    def act(self, act):
        """act (1, A). Scripts keep the environment's numbers in float32."""
        raw, rew, terminated, truncated, _ = self.env.step(act[0].numpy())
        rew, done = (torch.tensor([[x]], dtype=torch.float32).double() for x in (self.reward(rew), terminated))
        self.rows.append(torch.cat([self.obs, act.float().double(), rew, self.seen(raw), done], 1)[0])
        self.over = terminated or truncated
        self.raw = None if self.over else raw


def are_rows_of(batch, rows):
    """Whether each transition of a batch is one of the rows; float32 is what new ones are kept in."""
    return bool((torch.cdist(table(*batch)[:, : rows.shape[1]], rows).amin(1) < 1e-4).all())


def kept(rows, size):
    """What a replay buffer of that size holds of the transitions that it was given."""
    ring = {i % size: row for i, row in enumerate(rows)}
    return torch.stack([ring[i] for i in sorted(ring)])


def part(batch, span):
    return type(batch)(*(column[span] for column in batch))


def leaves(state, *names):
    """Copies of a state_dict's tensors that gradients can be taken of, all, or those whose names begin so."""
    return {key: x.clone().requires_grad_() for key, x in state.items() if key.startswith(names or "")}


def mlp(params, x, hidden=lambda x: x):
    """A ReLU network of weights (out, in) and biases (out,), in their order: (..., in) -> (..., out). hidden: what
    becomes of each hidden layer's output, here and below."""
    params = list(params.values())
    for i in range(0, len(params), 2):
        x = x @ params[i].T + params[i + 1]
        x = hidden(x.clamp(min=0)) if i + 2 < len(params) else x
    return x


def q_values(params, obs, act, hidden=lambda x: x):
    """All N Q-functions of weights (N, in, out) and biases (N, 1, out), one after the other: (N, B)."""
    params, values = list(params.values()), []
    for n in range(len(params[0])):
        x = torch.cat([obs, act], -1)
        for i in range(0, len(params), 2):
            x = x @ params[i][n] + params[i + 1][n]
            x = hidden(x.clamp(min=0)) if i + 2 < len(params) else x
        values.append(x[..., 0])
    return torch.stack(values)


def squashed(params, obs, noise):
    """SAC's policy, appendix C of arXiv:1812.05905: act (..., A), the tanh of mean + std * noise, and its log density
    (...). Without bounds on log_std, which nothing reaches in a few steps."""
    mean, log_std = mlp(params, obs).chunk(2, -1)
    u = mean + log_std.exp() * noise
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - (1 - u.tanh() ** 2).log()
    return u.tanh(), log_prob.sum(-1)


class Adam:
    """Kingma & Ba 2015, Algorithm 1, on a dictionary of leaves; `decay`: AdamW's."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
        self.params, self.lr, self.betas, self.eps, self.decay, self.t = params, lr, betas, eps, decay, 0
        self.m = {key: torch.zeros_like(x) for key, x in params.items()}
        self.v = {key: torch.zeros_like(x) for key, x in params.items()}

    def step(self, loss, clip=None):
        """clip: of the gradients' common norm."""
        grads = torch.autograd.grad(loss, list(self.params.values()), retain_graph=True)
        if clip is not None:
            norm = torch.sqrt(sum((g**2).sum() for g in grads))
            grads = [g * min(1.0, clip / (norm.item() + 1e-6)) for g in grads]
        self.t += 1
        for (key, x), g in zip(self.params.items(), grads):
            self.m[key] = self.betas[0] * self.m[key] + (1 - self.betas[0]) * g
            self.v[key] = self.betas[1] * self.v[key] + (1 - self.betas[1]) * g**2
            m, v = (a / (1 - b**self.t) for a, b in zip((self.m[key], self.v[key]), self.betas))
            x.data.mul_(1 - self.lr * self.decay).sub_(self.lr * m / (v.sqrt() + self.eps))


def polyak(target, net, tau):
    for x, y in zip(target.values(), net.values()):
        x.data.copy_((1 - tau) * x + tau * y)


def assert_same(ours, theirs, name="", rtol=1e-9, atol=1e-12):
    """Two tensors, or dictionaries of them, of equal names."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            assert_same(ours[key], theirs[key], f"{name} {key}", rtol, atol)
    else:
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")
