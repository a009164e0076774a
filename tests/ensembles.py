"""What the tests of MOPO, MOReL and COMBO share: the fit of the dynamics ensemble, and rollouts in it, from the papers.

Nothing here comes from a script.
"""

import h5py
import numpy as np
import torch
from update import Adam, assert_same, leaves, polyak, q_values, squashed, table

# Arguments of a traced run of eight steps, none of them a default.
CHANGES = dict(steps=8, rollouts=60, rollout_every=3, keep=2, h=3, gamma=0.9, tau=0.1, lr=1e-3, actor_lr=2**-10, seed=2)
CHANGES |= dict(real_ratio=0.3)
DECAYS = 2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4  # of the layers' weights


def shuffled(small, path):
    """150 transitions in no order, whose steps are large, a tenth of them terminations."""
    with h5py.File(small) as file, h5py.File(path, "w") as part:
        part.attrs.update(file.attrs)
        rng = np.random.default_rng(0)
        for name, column in file.items():
            part[name] = rng.permutation(column[:])[:150]
        part["terminals"][9::10] = True
    return path


def split(rows):
    """obs, act, rew, next_obs, done of Hopper's rows."""
    return rows.split([11, 3, 1, 11, 1], -1)


def outcome(obs, act, rew, next_obs, done):
    return torch.cat([next_obs - obs, rew], -1)


def gaussians(p, obs, act):
    """Of the model's weights p, (7, in, out), means and standard deviations: (..., O), (..., A) -> (7, B, O + 1)."""
    x = torch.cat([(obs - p["obs_mean"]) / p["obs_std"], act], -1)
    for i in range(5):
        x = x @ p[f"layers.{i}.weight"] + p[f"layers.{i}.bias"]
        x = x * x.sigmoid() if i < 4 else x
    mean, log_std = x.chunk(2, -1)
    log_std = p["high"] - (1 + (p["high"] - log_std).exp()).log()
    log_std = p["low"] + (1 + (log_std - p["low"]).exp()).log()
    return p["y_std"] * mean, p["y_std"] * log_std.exp()


def fitted(start, rows, draws, seed, B, lr, most, patience=1):
    """The fit from a checkpoint's start: what the checkpoint holds of it, {name: value}, and the rows held out."""
    order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
    held, known = rows[order[:30]], rows[order[30:]]
    learned, best = leaves(start["dynamics"], "layers", "low", "high"), leaves(start["best"])
    obs, y = split(rows)[0], outcome(*split(rows))
    model = {"obs_mean": obs.mean(0), "obs_std": obs.std(0) + 1e-6, "y_std": y.std(0) + 1e-6} | learned
    opt, best_error, updates, epochs, stale = Adam(learned, lr), torch.full((7,), torch.inf).double(), 0, 0, 0
    while stale < patience and updates < most:
        for _ in range(min(max(1, 120 // B), most - updates)):
            batch = split(known[next(draws)])  # (7, B, ...)
            mean, std = gaussians(model, *batch[:2])
            assert mean.shape == (7, B, 12)
            loss = ((mean - outcome(*batch)) ** 2 / std**2 + (std**2).log()).mean((1, 2)).sum()
            for i, decay in enumerate(DECAYS):
                loss = loss + decay / 2 * sum((x**2).sum() for key, x in learned.items() if f"layers.{i}." in key)
            opt.step(loss + 0.01 * (2 * model["high"] - 2 * model["low"]).sum())  # the bounds of the log variance
            updates += 1
        mean, y = gaussians(model, *split(held)[:2])[0], outcome(*split(held))
        error = (((mean - y) ** 2).mean(1) / y.var(0)).mean(1)
        better = [i for i in range(7) if error[i] < 0.99 * best_error[i]]
        epochs, stale = epochs + 1, 0 if better else stale + 1
        best_error[better] = error[better]
        for key, x in best.items():
            x.data[better] = model[f"layers.{key}"][better]
    model |= {f"layers.{key}": x for key, x in best.items()}
    return dict(dynamics=model, best=best, best_error=best_error, epochs=epochs, stale=stale), split(held)


def rollout(fit, rows, actor, draws, batches, h, settle):
    """h steps of 60 rollouts in the model: rows (h * 60, 27). settle: mean, std, reward -> reward, whether it ends."""
    bound = 2 * torch.cat(split(rows)[::3]).abs().max(0).values
    obs, parts = next(batches).obs, []
    for _ in range(h):
        act = squashed(actor, obs, next(draws))[0]
        mean, std = gaussians(fit["dynamics"], obs, act)
        elite = fit["best_error"].argsort()[(next(draws) * 5).long()]  # for each row
        y = (mean + std * next(draws))[elite, range(60)]
        next_obs = (obs + y[:, :-1]).clamp(-bound, bound)
        rew, over = settle(mean, std, y[:, -1])
        over = over | (next_obs[:, 0] <= 0.7) | (next_obs[:, 1].abs() >= 0.2) | (next_obs[:, 1:].abs() >= 100).any(1)
        parts.append(table(obs, act, rew, next_obs, over).detach())
        obs = torch.where(over[:, None], next(batches).obs, next_obs).detach()
    return torch.cat(parts)


def soft_actor_critic(args, start, fit, rows, draws, batches, settle):
    """MOPO's and MOReL's policy from a checkpoint's start: eight updates, rollouts before the first, fourth, seventh;
    what the checkpoint holds of it."""
    nets = {name: leaves(start[name]) for name in ("actor", "critic", "critic_target")}
    (actor, critic, target), log_alpha = nets.values(), start["log_alpha"].requires_grad_()
    actor_opt, alpha_opt, critic_opt = Adam(actor, None), Adam({"": log_alpha}, args.actor_lr), Adam(critic, args.lr)
    block, real = args.h * 60, int(args.real_ratio * args.batch_size)
    imagined = torch.zeros(2 * block, 27).double()
    for step in range(8):
        if step % 3 == 0:
            place = (0, block, 0)[step // 3]
            imagined[place : place + block] = rollout(fit, rows, actor, draws, batches, args.h, settle)
        of_model, of_data = next(draws), next(draws)
        assert (len(of_model), len(of_data)) == (args.batch_size - real, real)
        assert (of_model.max() < block) == (step < 3)  # until the second rollouts
        obs, act, rew, next_obs, done = split(torch.cat([rows[of_data], imagined[of_model]]))
        alpha = log_alpha.exp().item()
        next_act, next_log_prob = squashed(actor, next_obs, next(draws))
        next_v = q_values(target, next_obs, next_act).min(0).values - alpha * next_log_prob
        goal = (rew[:, 0] + args.gamma * (1 - done[:, 0]) * next_v).detach()
        pi, log_prob = squashed(actor, obs, next(draws))
        actor_opt.lr = cosine(args.actor_lr, step)
        actor_opt.step((alpha * log_prob - q_values(critic, obs, pi).min(0).values).mean())
        alpha_opt.step(-(log_alpha * (log_prob.detach().mean() - 3)).sum())
        critic_opt.step(((q_values(critic, obs, act) - goal) ** 2).mean(1).sum())
        polyak(target, critic, args.tau)
    return nets | {"log_alpha": log_alpha, "model_rows": imagined}


def cosine(lr, step):
    """The learning rate of that of eight steps, along half a turn; torch.optim counts its steps in float32."""
    half_turn = torch.pi * torch.tensor(step / 8, dtype=torch.float32)
    return (lr / 2 * (1 + half_turn.cos())).item()


def assert_model_learned(fit, end):
    assert (end["epochs"], end["stale"]) == (fit["epochs"], fit["stale"])
    names = ("dynamics", "best", "best_error")
    assert_same({name: fit[name] for name in names}, {name: end[name] for name in names})
