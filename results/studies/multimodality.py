"""What does a policy that can be of several minds gain, where the data are? One Gaussian against diffusion and flow.

Three bandits of two-dimensional actions, 10,000 each, of two experts with opposite habits, equally good; of two of whom
one is half as good; of one expert and of chance. An action pays by its distance to an expert's habit, nothing between
them. Each script gets 5,000 updates; then 1,000 actions are drawn from its policy, BC's and IQL's Gaussians as such.
IDQL with one sample is its clone of the data alone. An action is between the modes if it is 4 deviations from each.
Then the same on a body: Hopper's data, half an expert's and half those of a random policy, 10,000 updates, and on the
maze stitch-meet of stitching.py, 20,000: does expressiveness make up for values that are carried over? Three seeds of
the bandits, one of the others; FQL has 128 hidden units, to fit a CPU.

Usage: make studies, or python results/studies/multimodality.py
"""

import dataclasses
import sys
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import Dataset, Task, load
from datasets.store import write_hdf5
from results.checkpoint import load_agent, load_checkpoint
from results.policies import load_policies
from results.studies.common import SEEDS, keep, kept, mean_std, normalized, once, runs_of, save_figure, train

STUDY, N, DRAWN, STEPS = "multimodality", 10_000, 1_000, 5_000
WIDTH, HABITS = 0.08, np.array([[0.6, 0.6], [-0.6, -0.6]])  # an expert's deviation, and where its actions lie
BANDITS = {  # what each habit pays, and what the second half of the data is: that of the second expert, or chance
    "two experts": ((1.0, 1.0), "expert"),
    "a better and a worse expert": ((1.0, 0.5), "expert"),
    "an expert and chance": ((1.0, 0.0), "chance"),
}
METHODS = {
    "BC": ["bc"],
    "BC, Gaussian": ["bc", "--policy", "gaussian"],
    "IQL": ["iql"],
    "TD3+BC": ["td3_bc"],
    "IDQL": ["idql"],
    "FQL": ["fql", "--width", 128],
}
GAUSSIAN, EXPRESSIVE = ("BC, Gaussian", "IQL"), ("IDQL, one sample", "IDQL", "FQL")
BODIES = {"hopper, half expert, half random": 10_000, "stitch-meet": 20_000}


def pays(act, worth):
    """Rewards (n,) of actions (n, 2), by their distance to the habits, of which each has its worth."""
    far = np.linalg.norm(act[:, None] - HABITS, axis=-1)  # (n, 2)
    return (worth * np.exp(-((far / (2 * WIDTH)) ** 2) / 2)).max(1)


def between(act):
    """The share of actions (n, 2) that are 4 deviations from each habit."""
    return (np.linalg.norm(act[:, None] - HABITS, axis=-1).min(1) > 4 * WIDTH).mean()


def logged(name):
    """The actions (N, 2) of a bandit's data."""
    rng, other = np.random.default_rng(0), BANDITS[name][1]
    act = HABITS[0] + WIDTH * rng.standard_normal((N, 2))
    second = HABITS[1] + WIDTH * rng.standard_normal((N // 2, 2))
    act[N // 2 :] = second if other == "expert" else rng.uniform(-1, 1, (N // 2, 2))
    return act.clip(-1, 1)


def bandit_file(name):
    """Its data as a file: each row an episode, of one observation that says nothing."""
    path = runs_of(STUDY, name, [N, WIDTH, BANDITS[name]]).with_suffix(".hdf5")
    path.parent.mkdir(parents=True, exist_ok=True)
    act = logged(name).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["observations"] = file["next_observations"] = np.zeros((N, 1), np.float32)
        file["actions"], file["rewards"] = act, pays(act, BANDITS[name][0]).astype(np.float32)
        file["terminals"], file["timeouts"] = np.ones(N, bool), np.zeros(N, bool)
    return path


def body_file(name):
    """250,000 transitions of Hopper's expert and as many of its random policy, as a file; or a task's name."""
    if name == "stitch-meet":
        return name
    path = runs_of(STUDY, name, []).with_suffix(".hdf5")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        parts = [load(f"hopper-{quality}", "collected", "cpu") for quality in ("expert", "random")]
        ends = [part.ends[part.ends <= 250_000] for part in parts]  # whole episodes
        rows = torch.cat([part.rows[: end[-1]] for part, end in zip(parts, ends)])
        task = dataclasses.replace(parts[0].task, name="hopper-half-random")
        ends = np.concatenate([ends[0], ends[0][-1] + ends[1]])
        made_of = "+".join(part.fingerprint for part in parts)
        write_hdf5(path, Dataset(task, "collected", made_of, rows, ends, parts[0].obs_dim, parts[0].act_dim))
    return path


@torch.no_grad()
def drawn(checkpoint, **changes):
    """DRAWN actions of a bandit's policy, (DRAWN, 2): of a Gaussian, drawn from it."""
    saved, _, data, policy = load_agent(checkpoint, **changes)
    obs = torch.zeros(DRAWN, 1)
    torch.manual_seed(0)
    if saved["algorithm"] in ("bc", "iql"):
        return load_policies([checkpoint], data)[0].act(obs).numpy()
    return policy(normalized(data, obs)).clamp(-1, 1).numpy()


def of_bandit(name, method, seed):
    """{method: what its policy does}; of IDQL, also with one sample."""
    script, *words = METHODS[method]
    words += "--seed", seed, "--eval-every", STEPS
    checkpoint = train(STUDY, f"{name} {method} {seed}", script, STEPS, "--env", bandit_file(name), *words, source=None)
    found = {}
    for each, changes in {method: {}, **({"IDQL, one sample": {"n_samples": 1}} if method == "IDQL" else {})}.items():
        act = drawn(checkpoint, **changes)
        paid = pays(act, BANDITS[name][0]).mean()
        found[each] = {"between": between(act), "paid": paid, "act": act[:200].round(3).tolist()}
    return found


def of_body(name, method):
    """The score of 20 episodes."""
    script, *words = METHODS[method]
    words += ["--n-samples", 16] if method == "IDQL" else []
    words += "--eval-every", BODIES[name], "--eval-episodes", 20
    checkpoint = train(STUDY, f"{name} {method}", script, BODIES[name], "--env", body_file(name), *words, source=None)
    saved = load_checkpoint(checkpoint)
    return {"score": Task(**saved["task"]).score(np.mean(saved["curve"][-1]["returns"]))}


def measure():
    """The bandits first; what is kept, should it be interrupted, is whole up to there."""
    bandits, bodies = {name: [] for name in BANDITS}, {}
    for seed in SEEDS:
        for name in BANDITS:
            cell = {}
            for method, words in METHODS.items():
                settings = [words, BANDITS[name], N, WIDTH, STEPS, DRAWN]
                found = once(STUDY, f"{name} {method} {seed}", settings, lambda: of_bandit(name, method, seed))  # noqa: B023
                cell |= {each: row for each, row in found.items() if each != "commit"}
            bandits[name].append(cell)
        keep(STUDY, bandits=bandits, bodies=bodies)
    for name, steps in BODIES.items():
        for method, words in METHODS.items():
            if method not in GAUSSIAN[:1]:
                found = once(STUDY, f"{name} {method}", [words, steps], lambda: of_body(name, method))  # noqa: B023
                bodies.setdefault(name, {})[method] = found["score"]
                keep(STUDY, bandits=bandits, bodies=bodies)


def findings():
    result, sentences = kept(STUDY), []
    of = lambda cells, method, key: [cell[method][key] for cell in cells]
    for name, cells in result["bandits"].items():
        lost = lambda method, cells=cells: of(cells, method, "between")
        text = "; ".join(
            f"{method} {mean_std([100 * x for x in lost(method)], 0)} %, paid {mean_std(of(cells, method, 'paid'), 2)}"
            for method in cells[0]
        )
        wanted = ""
        if name == "two experts":
            holds = min(map(min, map(lost, GAUSSIAN))) >= 0.3 and max(map(max, map(lost, EXPRESSIVE))) <= 0.05
            wanted = "Expected: Gaussians put at least 30 % of their actions between the modes, diffusion and flow at "
            wanted += f"most 5 %. {'So it is. ' if holds else 'Not so. '}"
        sentences.append(f"{name}, {len(cells)} seeds: {wanted}Between the modes: {text}.")
    for name, scores in result["bodies"].items():
        text = ", ".join(f"{method} {score:.1f}" for method, score in scores.items())
        sentences.append(f"{name}, one seed: {text}.")
    return sentences


def draw():
    import matplotlib.pyplot as plt

    bandits = kept(STUDY)["bandits"]
    methods = list(next(iter(bandits.values()))[0])
    figure, axes = plt.subplots(len(bandits), 1 + len(methods), figsize=(1.9 * (1 + len(methods)), 2.1 * len(bandits)))
    for line, (name, cells) in zip(axes, bandits.items()):
        line[0].scatter(*logged(name)[:: N // 400].T, s=2, color="gray")
        line[0].set_title(f"data: {name}", fontsize=6)
        for axis, method in zip(line[1:], methods):
            axis.scatter(*np.array(cells[0][method]["act"]).T, s=2)
            axis.set_title(f"{method}: {np.mean([cell[method]['paid'] for cell in cells]):.2f}", fontsize=7)
        for axis in line:
            axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
