"""Preferences are fixed data, too: when does a policy earn more of a learned reward, and less of what it stands for?

The setting of datasets/tasks/text.py, where the judge, gold, is known: answers of 32 characters by a language model of
0.8 million parameters. The proxy is what a reward model has learned of some pairs of answers. Against it the policy is
optimised by rlhf.py's PPO, whose way from the supervised model is followed, or by taking the best of n answers; dpo.py
learns from the pairs directly. Reported against d = sqrt(KL(pi, pi_ref)), as Gao, Schulman & Hilton do
(arXiv:2210.10760), of 512 answers to prompts that nobody has seen; gains are above the supervised model's. Varied:
the number of pairs, the size of the reward model, the weight beta of the KL penalty. Three seeds each.

What it is in offline RL: prompt and answer are state and action, the reward model is the critic, fitted on fixed data;
over-optimisation is extrapolation error, found by a policy that leaves the data; KL(pi, pi_ref) is the behaviour
regularisation that keeps it there (TD3+BC's cloning, AWAC's weight exp(A / lam), which has DPO's closed form).

Usage: make studies, or python results/studies/overoptimisation.py
"""

import math
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algorithms import dpo, rlhf
from datasets import cache_dir, text
from results.checkpoint import load_checkpoint
from results.studies import common
from results.studies.common import SEEDS, beyond, keep, kept, once, save_figure, train

STUDY = "overoptimisation"
PREFS, WIDTHS, SMALL = (200, 2_000, 20_000), (16, 64), 16
BETAS, DPO_BETAS, MIDDLE = (0.1, 0.3), (0.03, 0.1, 0.3), 2_000  # with MIDDLE pairs and, of PPO, the small reward model
UPDATES = {200: 60, 2_000: 300, 20_000: 1_000}  # of the reward model: about least held-out loss, in a pilot
PPO, DPO = ("--steps", 32, "--eval-every", 2), ("--steps", 200, "--eval-every", 20)
PROMPTS, BEST = 256, 64  # for the best of n: prompts, and answers to each
mean_std = partial(common.mean_std, digits=2)


def cells():
    """{name: (script, "--steps", number, *words)}: what is trained, each with every seed."""
    ppo = [(prefs, width, 0.0) for prefs in PREFS for width in WIDTHS] + [(MIDDLE, SMALL, beta) for beta in BETAS]
    found = {}
    for prefs, width, beta in ppo:
        words = "--prefs", prefs, "--reward-width", width, "--beta", beta, "--offline-steps", UPDATES[prefs]
        found[f"ppo {prefs} {width} {beta}"] = "rlhf", *PPO, *words
    for prefs, beta in [(prefs, 0.1) for prefs in PREFS] + [(MIDDLE, beta) for beta in DPO_BETAS if beta != 0.1]:
        found[f"dpo {prefs} {beta}"] = "dpo", *DPO, "--prefs", prefs, "--beta", beta
    return found


def trained(name, seed):
    """The checkpoint of a cell's run."""
    script, _, steps, *words = cells()[name]
    return train(STUDY, f"{name} {seed}", script, steps, *words, "--seed", seed, source=None)


def curve_of(checkpoint):
    """Lists over the evaluations: step, gold, and what the script reports, kl among it."""
    points = load_checkpoint(checkpoint)["curve"]
    curve = {name: [point["losses"][name] for point in points] for name in points[0]["losses"]}
    return curve | {"step": [p["step"] for p in points], "gold": [float(np.mean(p["returns"])) for p in points]}


@cache
def reference():
    """The supervised model, from the cache that the runs have filled."""
    saved = load_checkpoint(cache_dir() / "sft" / "pydoc" / "text" / "seed=0,sft_steps=3000" / "checkpoint.pt")
    actor = rlhf.Transformer(rlhf.WIDTH, rlhf.LAYERS, rlhf.VOCAB)
    actor.load_state_dict(saved["state"]["actor"])
    return actor


@cache
def many_answers():
    """tokens (PROMPTS, BEST, T) of the supervised model's answers, their gold (PROMPTS, BEST)."""
    data = text.load_pairs("text-preferences", text.load_text(), reference(), rlhf.sample)
    prompts = data.test_prompts[:PROMPTS].repeat_interleave(BEST, 0)
    answers = text.write(rlhf.sample, reference(), prompts, 0)
    golds = data.gold(prompts, answers).reshape(PROMPTS, BEST)
    return torch.cat([prompts, answers], 1).unflatten(0, (PROMPTS, BEST)), golds


def best_of(n, proxy, gold):
    """Of each prompt, (P, N) each: the expected proxy and gold of the answer with the highest proxy among n of the N,
    over all choices of n."""
    N, order = proxy.shape[1], proxy.argsort(1)
    weights = np.array([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])  # of the i-th lowest to be the best
    return [float((np.take_along_axis(x, order, 1) @ weights).mean()) for x in (proxy, gold)]


@torch.no_grad()
def judged(checkpoint, tokens):
    """The proxy (N,) of texts (N, T), by the reward model of a run of rlhf.py."""
    saved = load_checkpoint(checkpoint)
    reward = rlhf.Transformer(saved["args"]["reward_width"], 2, 1)
    reward.load_state_dict(saved["state"]["reward"])
    scale = saved["state"]["scale"]
    parts = [rlhf.score(part, torch.ones_like(part), reward) for part in tokens.split(2000)]
    return ((torch.cat(parts) - scale[1]) / scale[0]).numpy()


def best_of_all(checkpoint):
    """For n = 1, 2, 4, ...: the KL divergence log n - (n - 1) / n, proxy and gold."""
    tokens, golds = many_answers()
    proxies = judged(checkpoint, tokens.flatten(0, 1)).reshape(golds.shape)
    ns = [2**i for i in range(BEST.bit_length())]
    rows = [best_of(n, proxies, golds) for n in ns]
    return {"kl": [math.log(n) - (n - 1) / n for n in ns], "proxy": [p for p, _ in rows], "gold": [g for _, g in rows]}


def answers_of(checkpoint, number=256):
    """What a run's last policy writes to the first prompts, with gold."""
    data = text.load_pairs("text-preferences", text.load_text(), reference(), rlhf.sample)
    actor = rlhf.Transformer(rlhf.WIDTH, rlhf.LAYERS, rlhf.VOCAB)
    actor.load_state_dict(load_checkpoint(checkpoint)["state"]["actor"] if checkpoint else reference().state_dict())
    prompts = data.test_prompts[:number]
    answers = text.write(rlhf.sample, actor, prompts, 0)
    return torch.cat([prompts, answers], 1), data.gold(prompts, answers)


def texts(over, penalised, dpo_run):
    """Answers of four models to the same prompt, and those of the over-optimised one that the proxy overrates most;
    the proxy is its own reward model in all."""
    rows = {}
    for name, checkpoint in (("supervised", None), ("RLHF", penalised), ("DPO", dpo_run), ("over-optimised", over)):
        tokens, golds = answers_of(checkpoint)
        proxies = judged(over, tokens)
        rows[name] = [
            [text.decode(row[: text.PROMPT]), text.decode(row[text.PROMPT :]), round(float(g), 2), round(float(p), 2)]
            for row, g, p in zip(tokens, golds, proxies)
        ]
    worst = sorted(rows["over-optimised"], key=lambda row: row[2] - row[3])[:3]
    return {"prompts": {name: found[:2] for name, found in rows.items()}, "overrated": worst}


def closed_form(beta=0.5, answers=64, seed=0):
    """KL(pi, pi*) in nats of what dpo.py's loss, with pairs without end, and rlhf.py's, with the true reward, make of a
    table of so many answers; and KL(pi_ref, pi*), from where they begin."""
    torch.manual_seed(seed)
    log_ref, r = torch.randn(answers).log_softmax(0), torch.randn(answers)
    best = (log_ref + r / beta).log_softmax(0)
    gap = lambda log_pi: (log_pi.exp() * (log_pi - best)).sum().item()
    found = {"reference": gap(log_ref)}
    for name in ("dpo", "ppo"):
        logits = log_ref.clone().requires_grad_()
        opt = torch.optim.Adam([logits], 0.02)
        for step in range(1500):
            opt.param_groups[0]["lr"] = 0.02 * (1 - step / 1500)
            log_pi = logits.log_softmax(0)
            if name == "dpo":
                two = log_ref.exp().multinomial(8192, replacement=True).view(-1, 2)
                first = torch.rand(len(two)) < torch.sigmoid(r[two[:, 0]] - r[two[:, 1]])
                chosen, rejected = torch.where(first[:, None], two, two.flip(1)).T
                ratio = log_pi - log_ref
                loss = dpo.preference_loss(dpo.Args(beta=beta), ratio[chosen] - ratio[rejected])
            else:
                drawn = log_pi.exp().multinomial(4096, replacement=True)[:, None]  # answers of one token
                old = log_pi[drawn].detach()
                rew = r[drawn] - beta * (old - log_ref[drawn])
                adv = rlhf.advantages(rlhf.Args(), rew, rew.mean().expand_as(rew))
                loss = rlhf.actor_loss(rlhf.Args(), log_pi[drawn], old, adv)
            opt.zero_grad()
            loss.backward()
            opt.step()
        found[name] = gap(logits.detach().log_softmax(0))
    return found


def measure():
    curves, best, settings = {}, {}, [PPO, DPO, UPDATES, PROMPTS, BEST]
    for name in cells():
        runs = [trained(name, seed) for seed in SEEDS]
        curves[name] = [curve_of(run) for run in runs]
        if name.startswith("ppo") and name.endswith(" 0.0"):
            best[name] = [
                once(STUDY, f"best {name} {seed}", settings, lambda run=run: best_of_all(run))
                for seed, run in zip(SEEDS, runs)
            ]
    names = f"ppo {MIDDLE} {SMALL} 0.0", f"ppo {MIDDLE} {SMALL} {BETAS[-1]}", f"dpo {MIDDLE} 0.1"
    shown = once(STUDY, "texts", settings, lambda: texts(*(trained(name, 0) for name in names)))
    keep(STUDY, curves=curves, best=best, texts=shown, closed_form=once(STUDY, "closed form", [], closed_form))


def mean_of(runs, key):
    """(points,) over the seeds."""
    return np.mean([run[key] for run in runs], 0)


def peak(run):
    """Where gold is highest: its KL divergence, and gold."""
    at = int(np.argmax(run["gold"]))
    return run["kl"][at], run["gold"][at]


def fitted(runs, logarithm):
    """alpha, beta of the gain in gold, d (alpha - beta log d) or d (alpha - beta d), of the mean over the seeds."""
    d, gain = np.sqrt(mean_of(runs, "kl"))[1:], mean_of(runs, "gold")[1:] - mean_of(runs, "gold")[0]
    features = np.stack([d, -d * (np.log(d) if logarithm else d)], 1)
    return np.linalg.lstsq(features, gain, rcond=None)[0]


def verdict(so, yes="So it is"):
    return yes if so else "Not so"


def findings():
    study = kept(STUDY)
    curves, best, exact = study["curves"], study["best"], study["closed_form"]
    last = lambda name, key: [run[key][-1] for run in curves[name]]
    peaks = lambda name: [mean_std(column) for column in zip(*map(peak, curves[name]))]  # KL, gold
    sentences = []
    for width in WIDTHS:
        name = f"ppo {MIDDLE} {width} 0.0"
        falls = beyond([peak(run)[1] for run in curves[name]], last(name, "gold"))
        rises = all(run["proxy"][-1] > run["proxy"][int(np.argmax(run["gold"]))] for run in curves[name])
        at, top = peaks(name)
        sentences.append(
            f"Expected with {MIDDLE:,} pairs, a reward model of width {width} and no penalty: gold rises, then falls "
            f"by more than the seeds differ, while the proxy goes on. {verdict(falls and rises)}: gold from "
            f"{curves[name][0]['gold'][0]:.2f} to {top} at KL {at}, then {mean_std(last(name, 'gold'))} at KL "
            f"{mean_std(last(name, 'kl'))}; the proxy from 0 to {mean_std(last(name, 'proxy'))}."
        )
    free, *held = (f"ppo {MIDDLE} {SMALL} {beta}" for beta in (0.0, *BETAS))
    ends = (f"{mean_std(last(x, 'gold'))} at KL {mean_std(last(x, 'kl'))} with {x.split()[3]}" for x in held)
    prevents = beyond(last(held[-1], "gold"), last(free, "gold"))
    sentences.append(
        f"Expected of the small one: a KL penalty prevents it. {verdict(prevents, 'So it does')}: gold after as many "
        f"iterations is {', '.join(ends)}, {mean_std(last(free, 'gold'))} without."
    )
    for width in WIDTHS:
        names = {prefs: f"ppo {prefs} {width} 0.0" for prefs in PREFS}
        few, many = ([peak(run)[0] for run in curves[names[prefs]]] for prefs in (PREFS[0], PREFS[-1]))
        tops = (f"{prefs:,} pairs KL {' (gold '.join(peaks(name))})" for prefs, name in names.items())
        sentences.append(
            f"Expected with width {width}: more pairs move the peak to a larger KL. "
            f"{verdict(beyond(many, few), 'So they do')}: {', '.join(tops)}."
        )
    fits = []
    for name in best:
        (a, b), (c, d) = fitted(curves[name], True), fitted(best[name], False)
        _, prefs, width, _ = name.split()
        fits.append(f"{int(prefs):,} pairs, width {width}: {a:.2f}, {b:.2f} and {c:.2f}, {d:.2f}")
    sentences.append(
        "Gao et al.'s forms of the gain in gold, d (alpha - beta log d) of PPO, d (alpha - beta d) of the best of n; "
        f"alpha, beta: {'; '.join(fits)}."
    )
    falls = (f"{int(x.split()[1]):,} pairs, width {x.split()[2]}: {told(best[x])}" for x in best)
    sentences.append(
        f"The best of {BEST} by the proxy, at KL {math.log(BEST) - 1 + 1 / BEST:.1f}; gold, and the highest of any n: "
        f"{'; '.join(falls)}."
    )
    for name in (name for name in curves if name.startswith("dpo")):
        (at, top), (_, prefs, beta) = peaks(name), name.split()
        sentences.append(
            f"DPO, {int(prefs):,} pairs, beta {beta}: gold {top} at KL {at}, in the end {mean_std(last(name, 'gold'))} "
            f"at {mean_std(last(name, 'kl'))}; the log-likelihood of chosen answers of held-out pairs has changed by "
            f"{mean_std(last(name, 'chosen'))}."
        )
    near = max(exact["dpo"], exact["ppo"]) < 0.02
    sentences.append(
        "Expected of a table of 64 answers: DPO, with pairs without end, and PPO, with the true reward, come within "
        f"0.02 nats of pi_ref exp(r / beta) / Z. {verdict(near, 'So they do')}: {exact['dpo']:.4f} and "
        f"{exact['ppo']:.4f}, from {exact['reference']:.2f}."
    )
    overrated = (f"`{prompt}|{answer}` {gold}, {proxy}" for prompt, answer, gold, proxy in study["texts"]["overrated"])
    sentences.append(
        f"What the small model overrates most in its policy's answers; gold, proxy: {'; '.join(overrated)}."
    )
    return sentences


def told(runs):
    return f"{mean_std([run['gold'][-1] for run in runs])}, {mean_std([max(run['gold']) for run in runs])}"


def draw():
    import matplotlib.pyplot as plt

    study = kept(STUDY)
    curves, best = study["curves"], study["best"]
    pairs = {width: [(f"ppo {prefs} {width} 0.0", f"{prefs:,} pairs") for prefs in PREFS] for width in WIDTHS}
    panels = [(f"PPO, reward model of width {width}", pairs[width], curves) for width in WIDTHS]
    penalised = [(f"ppo {MIDDLE} {SMALL} {beta}", f"beta {beta:g}") for beta in (0.0, *BETAS)]
    panels += [(f"PPO, {MIDDLE:,} pairs, width {SMALL}", penalised, curves)]
    panels += [(f"best of n, width {width}", pairs[width], best) for width in WIDTHS]
    dpos = [name for name in curves if name.startswith("dpo")]
    dpos = [(name, f"{int(name.split()[1]):,} pairs, beta {name.split()[2]}") for name in dpos]
    panels += [("DPO", dpos, curves)]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    for axis, (title, shown, source) in zip(axes.flat, panels):
        for i, (name, label) in enumerate(shown):
            runs = source[name]
            d = np.sqrt(mean_of(runs, "kl"))
            axis.plot(d, mean_of(runs, "gold"), color=f"C{i}", marker=".", label=label)
            lows, highs = (f([run["gold"] for run in runs], 0) for f in (np.min, np.max))
            axis.fill_between(d, lows, highs, color=f"C{i}", alpha=0.15, linewidth=0)
            if "proxy" in runs[0]:
                axis.plot(d, mean_of(runs, "proxy"), color=f"C{i}", linestyle=":")
        axis.set(title=title, xlabel="sqrt(KL(pi, pi_ref))", ylabel="gold; dotted: proxy")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, STUDY)


if __name__ == "__main__":
    measure()
