"""f-MAX: the reward of each divergence against its f, and GAIL's update with it."""

import dataclasses

import numpy as np
import pytest
import torch
from test_gail import arguments, expert, plain, sigmoid, whole_update  # noqa: F401
from test_scripts import assert_equal, stopped, trained

from algorithms import f_max
from datasets import UserError

F = {  # f of u = rho_expert / rho_pi, as E_pi f(u) is the divergence
    "rkl": lambda u: -np.log(u),
    "fkl": lambda u: u * np.log(u),
    "js": lambda u: u * np.log(u) - (1 + u) * np.log((1 + u) / 2),
    "chi2": lambda u: (u - 1) ** 2,
}
LEAST = {"rkl": -11.0, "js": -np.log(2), "chi2": -1.0}  # f*(f'(u)) where u = exp(-10), from which rewards count


def test_divergences():
    """E_pi f(u) is what the table calls it."""
    expert_p, p = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3])
    kl = lambda a, b: np.sum(a * np.log(a / b))
    half = (expert_p + p) / 2
    js = kl(expert_p, half) + kl(p, half)
    chi2 = np.sum((expert_p - p) ** 2 / p)
    for name, value in {"rkl": kl(p, expert_p), "fkl": kl(expert_p, p), "js": js, "chi2": chi2}.items():
        assert np.sum(p * F[name](expert_p / p)) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", F)
def test_reward(name):
    """f*(f'(u)), with f*(t) the largest t x - f(x) over a grid of x, but of fkl -f(u), which is FAIRL's. The logit is
    that of D, the policy's probability, of which (1 - D) / D = u; beyond exp(10) u is taken to be that."""
    D = np.array([0.2, 0.4, 0.5, 0.7, 0.9])
    u = (1 - D) / D
    slope = (F[name](u + 1e-6) - F[name](u - 1e-6)) / 2e-6
    x = np.linspace(1e-3, 6, 200_001)[:, None]
    expected = -F[name](u) if name == "fkl" else np.max(slope * x - F[name](x), 0) - LEAST[name]
    logit = torch.tensor(np.log(D / (1 - D)))
    args = f_max.Args(divergence=name)
    np.testing.assert_allclose(f_max.reward_of(args, logit), expected, rtol=1e-7, atol=1e-7)
    ends = f_max.reward_of(args, torch.tensor([-10.0, -99.0, 10.0, 99.0]))
    assert ends[0] == ends[1] and ends[2] == ends[3] and torch.isfinite(ends).all()
    assert 0 <= ends[3] < 1e-3  # where the expert never is, and after an end, there is nothing to earn


@pytest.mark.parametrize("divergence", F)
def test_update(divergence, small, monkeypatch):
    sees = lambda obs, act, next_obs: torch.cat([obs, act], -1)
    rewards = {
        "rkl": lambda p: 10 + (1 / p - 1).log(),
        "fkl": lambda p: (1 - 1 / p) * (1 / p - 1).log(),
        "js": lambda p: -p.log(),
        "chi2": lambda p: (1 / p - 1) ** 2,
    }
    whole_update(f_max, small, monkeypatch, sees, plain, sigmoid, rewards[divergence], divergence=divergence)


def test_resume_is_exact(expert, tmp_path, monkeypatch):  # noqa: F811
    """And a resume changes no --steps, which the learning rate follows."""
    args = arguments(expert, f_max, steps=1600, eval_episodes=1)
    whole = trained(tmp_path, monkeypatch, "whole", (f_max.train, args))
    parts = (stopped(f_max.train, 800), args), (f_max.train, dataclasses.replace(args, resume=True))
    assert_equal(whole["state"], trained(tmp_path, monkeypatch, "parts", *parts)["state"])
    with pytest.raises(UserError, match="steps was 1600"):
        f_max.train(dataclasses.replace(args, steps=2400, resume=True))


def test_bad_input(expert):  # noqa: F811
    with pytest.raises(UserError, match="--demos 5 are more than the 4 trajectories of pendulum"):
        f_max.train(arguments(expert, f_max, demos=5))
    with pytest.raises(UserError, match="--steps must be a multiple of --envs x --horizon, 800, not 1000"):
        f_max.train(arguments(expert, f_max, steps=1000))
