"""AIRL: f, D and the reward in closed form, and the whole update."""

import dataclasses

import numpy as np
import pytest
import torch
from test_gail import arguments, expert, tanh_net, whole_update  # noqa: F401
from test_scripts import assert_equal, stopped, trained

from algorithms import airl
from datasets import UserError

O, A, B = 4, 2, 6


def array(x):
    return x.detach().double().numpy()


@pytest.mark.parametrize("reward", ["state", "state-action"])
def test_f(reward):
    """g + gamma h(next_obs) - h(obs), without h(next_obs) after a termination; g of the state sees no action."""
    torch.manual_seed(0)
    disc = airl.Shaped(airl.Args(reward=reward, gamma=0.9), O, A).double()
    obs, act, next_obs, done = torch.randn(B, O), torch.randn(B, A), torch.randn(B, O), torch.arange(B) % 2
    obs, act, next_obs, done = (x.double() for x in (obs, act, next_obs, done))
    g, h = (lambda x, net=net: tanh_net(net.state_dict(), x)[..., 0] for net in (disc.g, disc.h))
    f = disc(torch.cat([obs, act, next_obs], -1), done)
    expected = g(obs if reward == "state" else torch.cat([obs, act], -1)) - h(obs)
    torch.testing.assert_close(f, expected + torch.where(done > 0, 0.0, 0.9 * h(next_obs)), rtol=1e-12, atol=1e-12)
    other = disc(torch.cat([obs, -act, next_obs], -1), done)
    assert torch.equal(f, other) == (reward == "state")


def test_discriminator_and_reward():
    """D = pi / (exp f + pi), the policy's probability; log(1 - D) - log D = f - log pi, in [-10, 10] and 10 added."""
    f, log_prob = torch.randn(2, B).double(), torch.randn(2, B).double()
    D = 1 / (1 + np.exp(array(f)) / np.exp(array(log_prob)))
    loss = airl.discriminator_loss(*(log_prob - f))
    assert loss.item() == pytest.approx(-np.mean(np.log(D[0])) - np.mean(np.log(1 - D[1])), rel=1e-12)
    np.testing.assert_allclose(airl.reward_of(log_prob - f), 10 + np.log(1 - D) - np.log(D), rtol=1e-12)
    np.testing.assert_allclose(airl.reward_of(log_prob - f), 10 + array(f - log_prob), rtol=1e-12)
    assert airl.reward_of(torch.tensor([-99.0, 99.0])).tolist() == [20, 0]


@pytest.mark.parametrize("reward", ["state", "state-action"])
def test_update(reward, small, monkeypatch):
    def net(params, x, done):
        g, h = ({k: p for k, p in params.items() if k.startswith(part)} for part in ("g.", "h."))
        obs, next_obs = x[..., :11], x[..., 14:]
        seen = obs if reward == "state" else x[..., :14]
        return (tanh_net(g, seen) - tanh_net(h, obs))[..., 0] + 0.9 * (1 - done) * tanh_net(h, next_obs)[..., 0]

    sees = lambda obs, act, next_obs: torch.cat([obs, act, next_obs], -1)
    D = lambda f, density: density / (f.exp() + density)
    whole_update(airl, small, monkeypatch, sees, net, D, lambda p: 10 + (1 - p).log() - p.log(), reward=reward)


def test_resume_is_exact(expert, tmp_path, monkeypatch):  # noqa: F811
    """And a resume changes no --steps, which the learning rate follows."""
    args = arguments(expert, airl, steps=1600, eval_episodes=1)
    whole = trained(tmp_path, monkeypatch, "whole", (airl.train, args))
    parts = (stopped(airl.train, 800), args), (airl.train, dataclasses.replace(args, resume=True))
    assert_equal(whole["state"], trained(tmp_path, monkeypatch, "parts", *parts)["state"])
    with pytest.raises(UserError, match="steps was 1600"):
        airl.train(dataclasses.replace(args, steps=2400, resume=True))


def test_bad_input(expert):  # noqa: F811
    with pytest.raises(UserError, match="--demos 5 are more than the 4 trajectories of pendulum"):
        airl.train(arguments(expert, airl, demos=5))
    with pytest.raises(UserError, match="--steps must be a multiple of --envs x --horizon, 800, not 1000"):
        airl.train(arguments(expert, airl, steps=1000))
