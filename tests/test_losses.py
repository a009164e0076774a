"""Each loss against its formula in the paper, worked out in NumPy (float64) from the same parameters."""

import dataclasses

import numpy as np
import pytest
import torch

from algorithms import awac, bc, cql, edac, iql, offline_sac, rebrac, sac, sac_n, td3_bc
from datasets import Batch, SarsaBatch

B, O, A = 32, 5, 3
GAMMA = 0.99


@pytest.fixture
def batch():
    torch.manual_seed(1)
    done = (torch.arange(B) % 4 == 0).float()
    return Batch(torch.randn(B, O), torch.rand(B, A) * 2 - 1, torch.randn(B), torch.randn(B, O), done)


def array(tensor):
    return tensor.detach().double().numpy()


def forward(net, x):
    """A ReLU network, layer by layer."""
    weights = [array(p) for p in net.parameters()]
    for i in range(0, len(weights), 2):
        x = x @ weights[i].T + weights[i + 1]
        x = np.maximum(x, 0) if i + 2 < len(weights) else x
    return x


def q_values(critic, obs, act, norm=False):
    """All Q-functions, (N, B), one after another and layer by layer."""
    values = []
    for i in range(len(critic.layers[0].weight)):
        x = np.hstack([obs, act])
        for layer in critic.layers[:-1]:
            x = np.maximum(x @ array(layer.weight[i]) + array(layer.bias[i]), 0)
            if norm:
                x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        values.append(x @ array(critic.layers[-1].weight[i]) + array(critic.layers[-1].bias[i]))
    return np.stack(values)[:, :, 0]


def fixed_noise(monkeypatch):
    noise = torch.randn(B, A, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    return array(noise)


def test_bc(batch):
    actor = bc.Actor(O, A)
    expected = np.mean((np.tanh(forward(actor.net, array(batch.obs))) - array(batch.act)) ** 2)
    assert bc.actor_loss(batch, actor).item() == pytest.approx(expected, rel=1e-5)


def test_td3_bc_critic(batch, monkeypatch):
    critic, critic_target, actor_target = td3_bc.Critic(O, A), td3_bc.Critic(O, A), td3_bc.Actor(O, A)
    loss = td3_bc.critic_loss
    noise = np.clip(0.2 * 4 * fixed_noise(monkeypatch), -0.5, 0.5)  # 4 times the usual, so that it is clipped
    args = td3_bc.Args(policy_noise=0.8)
    obs, act, rew, next_obs, done = map(array, batch)
    next_act = np.clip(np.tanh(forward(actor_target.net, next_obs)) + noise, -1, 1)
    target = rew + GAMMA * (1 - done) * q_values(critic_target, next_obs, next_act).min(0)
    expected = sum(np.mean((q - target) ** 2) for q in q_values(critic, obs, act))
    assert loss(args, batch, critic, critic_target, actor_target).item() == pytest.approx(expected, rel=1e-5)


def test_td3_bc_actor(batch):
    actor, critic = td3_bc.Actor(O, A), td3_bc.Critic(O, A)
    obs, act, *_ = map(array, batch)
    pi = np.tanh(forward(actor.net, obs))
    q = q_values(critic, obs, pi)[0]
    expected = -2.5 / np.mean(np.abs(q)) * np.mean(q) + np.mean((pi - act) ** 2)
    loss = td3_bc.actor_loss(td3_bc.Args(), batch, actor, critic)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_td3_bc_lambda_has_no_gradient(batch):
    """lam is a constant of the loss, not something that the actor could lower."""
    actor, critic = td3_bc.Actor(O, A), td3_bc.Critic(O, A)
    td3_bc.actor_loss(td3_bc.Args(), batch, actor, critic).backward()
    gradient = actor.net[0].weight.grad.clone()
    act = actor(batch.obs)
    q = critic(batch.obs, act)[0]
    lam = 2.5 / q.abs().mean().item()
    actor.zero_grad()
    (-lam * q.mean() + ((act - batch.act) ** 2).mean()).backward()
    torch.testing.assert_close(gradient, actor.net[0].weight.grad)


def log_density(mean, log_std, act):
    """Of a Gaussian: the logarithm of the product of each dimension's density."""
    std = np.exp(log_std)
    return np.log(np.prod(np.exp(-((act - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi)), -1))


@pytest.fixture
def iql_nets():
    """actor, critic, value, critic_target"""
    nets = iql.Actor(O, A), iql.Critic(O, A), iql.mlp(O, 256, 256, 1), iql.Critic(O, A)
    nets[0].log_std.data = torch.tensor([-0.5, 0.3, 2.5])
    nets[3].layers[-1].weight.data *= 100  # so that some weights reach their bound
    return nets


def test_iql(batch, iql_nets):
    actor, critic, value, critic_target = iql_nets
    obs, act, rew, next_obs, done = map(array, batch)
    u = q_values(critic_target, obs, act).min(0) - forward(value, obs)[:, 0]
    assert 0 < np.sum(u > 0) < B  # both sides of the expectile
    target = rew + GAMMA * (1 - done) * forward(value, next_obs)[:, 0]
    weight = np.exp(4.0 * u)
    assert 0 < np.sum(weight > 100) < B
    log_prob = log_density(np.tanh(forward(actor.net, obs)), np.array([-0.5, 0.3, 2.0]), act)
    expected = {
        "value_loss": np.mean(np.where(u > 0, 0.9, 0.1) * u**2),
        "critic_loss": sum(np.mean((q - target) ** 2) for q in q_values(critic, obs, act)),
        "actor_loss": -np.mean(np.minimum(weight, 100) * log_prob),
    }
    losses = iql.losses(iql.Args(expectile=0.9, beta=4.0, dropout=0.0), batch, *iql_nets)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-5)


def test_iql_each_loss_trains_its_own(batch, iql_nets):
    """What a loss is not meant to move gets no gradient from it."""
    losses = iql.losses(iql.Args(expectile=0.7, beta=3.0, dropout=0.0), batch, *iql_nets)
    for name, own in zip(("actor_loss", "critic_loss", "value_loss"), iql_nets):
        for net in iql_nets:
            net.zero_grad()
        losses[name].backward()
        assert [net for net in iql_nets if any(p.grad is not None for p in net.parameters())] == [own]


def test_iql_dropout(batch):
    """In training, with probability p on each hidden layer and rescaled; never in evaluation."""
    actor = iql.Actor(O, A)
    torch.manual_seed(3)
    dropped = actor(batch.obs, 0.5)[0]
    torch.manual_seed(3)
    x = actor.net[0](batch.obs).relu()
    x = x * torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    x = actor.net[2](x).relu()
    x = x * torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    torch.testing.assert_close(dropped, actor.net[4](x).tanh())
    expected = np.tanh(forward(actor.net, array(batch.obs)))
    np.testing.assert_allclose(array(iql.policy(batch.obs, actor)), expected, rtol=1e-5, atol=1e-6)


def test_awac_critic(batch, monkeypatch):
    actor, critic, critic_target = awac.Actor(O, A), awac.Critic(O, A), awac.Critic(O, A)
    actor.log_std.data = torch.tensor([-0.5, 0.3, 2.5])
    noise = fixed_noise(monkeypatch)
    obs, act, rew, next_obs, done = map(array, batch)
    next_act = np.clip(forward(actor.net, next_obs) + np.exp([-0.5, 0.3, 2.0]) * noise, -1, 1)
    target = rew + GAMMA * (1 - done) * q_values(critic_target, next_obs, next_act).min(0)
    expected = sum(np.mean((q - target) ** 2) for q in q_values(critic, obs, act))
    loss = awac.critic_loss(awac.Args(), batch, critic, critic_target, actor)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_awac_actor(batch, monkeypatch):
    actor, critic = awac.Actor(O, A), awac.Critic(O, A)
    critic.layers[-1].weight.data *= 100  # so that some weights reach their bound
    actor.log_std.data = torch.tensor([-0.5, 0.3, -0.1])
    noise = fixed_noise(monkeypatch)
    obs, act, *_ = map(array, batch)
    mean, log_std = forward(actor.net, obs), np.array([-0.5, 0.3, -0.1])
    pi_act = np.clip(mean + np.exp(log_std) * noise, -1, 1)
    adv = q_values(critic, obs, act).min(0) - q_values(critic, obs, pi_act).min(0)
    weight = np.exp(adv / 0.5)
    assert 0 < np.sum(weight > 100) < B
    expected = -np.mean(np.minimum(weight, 100) * log_density(mean, log_std, act))
    loss = awac.actor_loss(awac.Args(lam=0.5), batch, actor, critic)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in critic.parameters()) and all(p.grad is not None for p in actor.parameters())


def squashed(actor, obs, noise, least=-20):
    mean, log_std = np.split(forward(actor.net, obs), 2, -1)
    log_std = np.clip(log_std, least, 2)
    act = np.tanh(mean + np.exp(log_std) * noise)
    normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    return act, np.sum(normal - np.log(1 - act**2), -1)  # the textbook form of the change of variables


def test_sac_critic(batch, monkeypatch):
    actor, critic, critic_target = sac.Actor(O, A), sac.Critic(O, A), sac.Critic(O, A)
    noise = fixed_noise(monkeypatch)
    obs, act, rew, next_obs, done = map(array, batch)
    next_act, log_prob = squashed(actor, next_obs, noise)
    target = rew + GAMMA * (1 - done) * (q_values(critic_target, next_obs, next_act).min(0) - 0.3 * log_prob)
    expected = sum(np.mean((q - target) ** 2) for q in q_values(critic, obs, act))
    loss = sac.critic_loss(sac.Args(), batch, actor, critic, critic_target, 0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_sac_actor_and_alpha(batch, monkeypatch):
    actor, critic = sac.Actor(O, A), sac.Critic(O, A)
    noise = fixed_noise(monkeypatch)
    act, log_prob = squashed(actor, array(batch.obs), noise)
    expected = np.mean(0.3 * log_prob - q_values(critic, array(batch.obs), act).min(0))
    loss, returned = sac.actor_loss(batch, actor, critic, 0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    log_alpha = torch.tensor(np.log(0.3))
    expected = -np.log(0.3) * np.mean(log_prob - A)
    assert sac.alpha_loss(log_alpha, returned, -A).item() == pytest.approx(expected, rel=1e-5)


def test_sac_log_prob_far_out():
    """Where tanh rounds to 1 the density stays finite; log(1 - tanh^2) alone would be minus infinity."""
    actor = sac.Actor(O, A)
    torch.nn.init.constant_(actor.net[-1].bias, 30.0)
    act, log_prob = actor(torch.zeros(1, O))
    assert torch.all(act == 1)
    assert torch.isfinite(log_prob).all()


@pytest.fixture
def sarsa(batch):
    return SarsaBatch(*batch, torch.rand(B, A) * 2 - 1)


def test_rebrac_critic(sarsa, monkeypatch):
    critic, critic_target, actor_target = rebrac.Critic(O, A), rebrac.Critic(O, A), rebrac.Actor(O, A)
    noise = np.clip(0.2 * 4 * fixed_noise(monkeypatch), -0.5, 0.5)
    args = rebrac.Args(policy_noise=0.8, gamma=GAMMA, critic_weight=0.3)
    obs, act, rew, next_obs, done, next_act = map(array, sarsa)
    pi = np.clip(np.tanh(forward(actor_target.net, next_obs)) + noise, -1, 1)
    next_q = q_values(critic_target, next_obs, pi, norm=True).min(0)
    target = rew + GAMMA * (1 - done) * (next_q - 0.3 * np.sum((pi - next_act) ** 2, -1))
    expected = sum(np.mean((q - target) ** 2) for q in q_values(critic, obs, act, norm=True))
    loss = rebrac.critic_loss(args, sarsa, critic, critic_target, actor_target)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_rebrac_actor(sarsa):
    actor, critic = rebrac.Actor(O, A), rebrac.Critic(O, A)
    obs, act, *_ = map(array, sarsa)
    pi = np.tanh(forward(actor.net, obs))
    q = q_values(critic, obs, pi, norm=True).min(0)
    lam = 1 / np.mean(np.abs(q))
    expected = np.mean(0.3 * np.sum((pi - act) ** 2, -1) - lam * q)
    loss = rebrac.actor_loss(rebrac.Args(actor_weight=0.3), sarsa, actor, critic)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()  # lam is a constant of the loss
    gradient = actor.net[0].weight.grad.clone()
    actor.zero_grad()
    pi = actor(sarsa.obs)
    (0.3 * ((pi - sarsa.act) ** 2).sum(-1) - lam * critic(sarsa.obs, pi).amin(0)).mean().backward()
    torch.testing.assert_close(gradient, actor.net[0].weight.grad)


ENSEMBLES = {offline_sac: (2, -20), sac_n: (7, -5), edac: (7, -5)}  # critics, the least log_std


def ensemble(script):
    N, least = ENSEMBLES[script]
    words = () if script is offline_sac else (N,)
    return script.Actor(O, A), script.Critic(O, A, *words), script.Critic(O, A, *words), least


def sac_args(script):
    more = dict(n_critics=7) if script is sac_n else dict(n_critics=7, eta=0.7) if script is edac else {}
    return script.Args(**more)


def diversity(critic, obs, act):
    """The cosine of dQ_i/da and dQ_j/da, over all ordered pairs of critics, by the chain rule, layer by layer."""
    slopes = []
    for i in range(len(critic.layers[0].weight)):
        x, slope = np.hstack([obs, act]), np.eye(O + A)[None].repeat(B, 0)  # (B, O + A, width): dx / d(obs, act)
        for layer in critic.layers:
            x, slope = x @ array(layer.weight[i]) + array(layer.bias[i]), slope @ array(layer.weight[i])
            if layer is not critic.layers[-1]:
                x, slope = np.maximum(x, 0), slope * (x > 0)[:, None]
        slopes.append(slope[:, O:, 0])
    unit = [slope / np.linalg.norm(slope, axis=-1, keepdims=True) for slope in slopes]
    pairs = [(i, j) for i in range(len(unit)) for j in range(len(unit)) if i != j]
    return np.mean(sum(np.sum(unit[i] * unit[j], -1) for i, j in pairs)) / (len(unit) - 1)


@pytest.mark.parametrize("script", ENSEMBLES, ids=lambda script: script.__name__)
def test_ensemble_critic(script, batch, monkeypatch):
    actor, critic, critic_target, least = ensemble(script)
    noise = fixed_noise(monkeypatch)
    obs, act, rew, next_obs, done = map(array, batch)
    next_act, log_prob = squashed(actor, next_obs, noise, least)
    target = rew + GAMMA * (1 - done) * (q_values(critic_target, next_obs, next_act).min(0) - 0.3 * log_prob)
    expected = sum(np.mean((q - target) ** 2) for q in q_values(critic, obs, act))
    if script is edac:
        expected += 0.7 * diversity(critic, obs, act)
    loss = script.critic_loss(sac_args(script), batch, 0.3, actor, critic, critic_target)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("script", ENSEMBLES, ids=lambda script: script.__name__)
def test_ensemble_actor_and_alpha(script, batch, monkeypatch):
    actor, critic, _, least = ensemble(script)
    torch.nn.init.constant_(actor.net[-1].bias[A:], -6.0)  # where the bounds of log_std differ
    noise = fixed_noise(monkeypatch)
    act, log_prob = squashed(actor, array(batch.obs), noise, least)
    expected = np.mean(0.3 * log_prob - q_values(critic, array(batch.obs), act).min(0))
    words = () if script is offline_sac else (sac_args(script),)
    loss, returned = script.actor_loss(*words, batch, 0.3, actor, critic)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    log_alpha = torch.tensor([np.log(0.3), np.log(2.0)])  # of two agents
    expected = [-np.log(0.3) * np.mean(log_prob - A), -np.log(2.0) * np.mean(2 * log_prob - A)]
    losses = script.alpha_loss(log_alpha, torch.stack([returned, 2 * returned]), -A)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert script.alpha_loss(log_alpha[:1], returned, -A).tolist() == pytest.approx(expected[:1], rel=1e-5)
    torch.testing.assert_close(script.policy(batch.obs, actor), actor.net(batch.obs)[:, :A].tanh())


@pytest.mark.parametrize("script", [sac_n, edac], ids=lambda script: script.__name__)
@pytest.mark.parametrize("family", ["pen", "hopper"])
def test_adroit_settings(script, family, small, monkeypatch):
    """On Adroit rewards have mean 0 and deviation 1, and the policy and alpha learn at a tenth of the critics' rate."""
    load, seen = script.load, []

    def load_as(*words):
        data = load(*words)
        data.task = dataclasses.replace(data.task, name=f"{family}-human")
        seen.append(data.rew.clone())
        return data

    monkeypatch.setattr(script, "load", load_as)
    monkeypatch.setattr(script.Run, "steps", lambda run, data, **state: seen.extend((data.rew, state)) or [])
    script.train(script.Args(str(small), n_critics=2, device="cpu"))
    before, rew, state = seen
    expected = (before - before.mean()) / before.std() if family == "pen" else before
    torch.testing.assert_close(rew, expected)
    rates = {}
    for group in state["adam_opt"].param_groups:
        rates |= {id(param): group["lr"] for param in group["params"]}
    of_actor = [*state["actor"].parameters(), state["log_alpha"]]
    assert {rates[id(param)] for param in of_actor} == {3e-5 if family == "pen" else 3e-4}
    assert {rates[id(param)] for param in state["critic"].parameters()} == {3e-4}


def test_edac_diversity_reaches_the_weights(batch, monkeypatch):
    """The gradient of the critics' loss, most of which is the diversity's, against finite differences."""
    actor, critic, critic_target, _ = (
        net.double() if isinstance(net, torch.nn.Module) else net for net in ensemble(edac)
    )
    batch, noise = Batch(*(column.double() for column in batch)), torch.randn(B, A).double()
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    weight, args = critic.layers[0].weight, edac.Args(n_critics=7, eta=100.0)

    def loss(eta=100.0):
        return edac.critic_loss(dataclasses.replace(args, eta=eta), batch, 0.3, actor, critic, critic_target)

    value = array(loss()) - array(loss(0.0))
    assert value == pytest.approx(100 * diversity(critic, array(batch.obs), array(batch.act)), rel=1e-9)
    loss().backward()
    for place in [(0, O, 3), (6, O + 2, 200), (3, 0, 7)]:
        values = []
        for change in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                weight[place] += change
            values.append(loss().item())
        assert weight.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_edac_diversity_at_its_edges():
    """One critic has nobody to differ from; where a slope is 0 its cosine counts as 0, and leaves no NaN."""
    assert edac.diversity_loss(torch.randn(1, B, A)).item() == pytest.approx(0, abs=1e-6)
    assert edac.diversity_loss(torch.ones(7, B, A)).item() == pytest.approx(7, rel=1e-5)  # all alike
    slope = torch.zeros(7, B, A, requires_grad=True)
    loss = edac.diversity_loss(slope)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(slope.grad).all()


def all_noise(monkeypatch):
    """What randn_like and rand_like return from now on, as they are asked for it."""
    noises, generator = [], torch.Generator().manual_seed(2)

    def draw(like, drawn):
        noises.append(array(drawn(like.shape, generator=generator, dtype=like.dtype)))
        return torch.from_numpy(noises[-1]).to(like.dtype)

    monkeypatch.setattr(torch, "randn_like", lambda x: draw(x, torch.randn))
    monkeypatch.setattr(torch, "rand_like", lambda x: draw(x, torch.rand))
    return noises


def cql_args(**changes):
    return cql.Args(**{**cql.TUNED[""], "n_actions": 4, **changes})


def cql_q(critic, obs, act):
    """Both Q-functions at act (K, B, A), one state and action after another, (2, K, B)."""
    rows = [[forward(net, np.hstack([obs, a]))[:, 0] for a in act] for net in critic.nets]
    return np.array(rows)


def samples(actor, obs, noise):
    """Actions (K, B, A) and log densities (K, B) of a policy, for noise (K, B, A)."""
    act, log_prob = zip(*(squashed(actor, obs, own) for own in noise))
    return np.array(act), np.array(log_prob)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gap_min": 4.5, "gamma": 0.9},
        {"max_target": True, "backup_entropy": True},
        {"variant": "rho"},
        {"variant": "rho", "backup_entropy": True},
    ],
    ids=str,
)
def test_cql_critic(changes, batch, monkeypatch):
    args = cql_args(**changes)
    n, alpha, temperature = args.n_actions, 3.0, 0.3
    actor, critic, critic_target = cql.Actor(O, A), cql.Critic(O, A, 3), cql.Critic(O, A, 3)
    noises = all_noise(monkeypatch)
    numbers = (torch.tensor(x).log() for x in (temperature, alpha))
    loss, gap = cql.critic_loss(args, batch, *numbers, actor, critic, critic_target)
    obs, act, rew, next_obs, done = map(array, batch)
    pi_act, pi_log_prob = samples(actor, obs, noises[0][:, :B])
    next_act, next_log_prob = samples(actor, next_obs, noises[0][:, B:])
    target = np.zeros(B)
    for b in range(B):
        values = []
        for k in range(n if args.max_target else 1):
            q1, q2 = cql_q(critic_target, next_obs[b : b + 1], next_act[k : k + 1, b : b + 1])[:, 0, 0]
            values.append((min(q1, q2), next_log_prob[k, b]))
        best, log_prob = max(values)
        target[b] = rew[b] + args.gamma * (1 - done[b]) * (best - args.backup_entropy * temperature * log_prob)
    expected, gaps = 0, []
    for q, all_q in zip(cql_q(critic, obs, act[None])[:, 0], zip(*(cql_q(critic, obs, a) for a in (pi_act, next_act)))):
        pi_q, next_q = np.exp(all_q)
        if args.variant == "h":
            uniform = 2 * noises[1] - 1
            uniform_q = np.exp(cql_q(critic, obs, uniform)[len(gaps)])
            total = np.sum(uniform_q / 0.5**A, 0) + np.sum(pi_q / np.exp(pi_log_prob), 0)
            soft = np.log(total + np.sum(next_q / np.exp(next_log_prob), 0))  # (B,)
        else:
            soft = np.sum(pi_q * np.log(pi_q), 0) / np.sum(pi_q, 0)
        gaps.append(np.mean(np.maximum(soft - q, args.gap_min)))
        expected += alpha * gaps[-1] + np.mean((q - target) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gap.item() == pytest.approx(np.mean(gaps), rel=1e-5, abs=1e-6)


def test_cql_actor_and_numbers(batch, monkeypatch):
    actor, critic = cql.Actor(O, A), cql.Critic(O, A, 3)
    noises = all_noise(monkeypatch)
    obs, act, *_ = map(array, batch)
    log_temperature = torch.tensor(0.3).log()
    loss, returned = cql.actor_loss(batch, log_temperature, actor, critic)
    pi_act, log_prob = samples(actor, obs, noises[0])
    assert loss.item() == pytest.approx(np.mean(0.3 * log_prob - cql_q(critic, obs, pi_act).min(0)), rel=1e-5)
    expected = -np.log(0.3) * np.mean(log_prob - A)
    assert cql.temperature_loss(log_temperature, returned, -A).item() == pytest.approx(expected, rel=1e-5)

    loss, returned = cql.cloning_loss(batch, log_temperature, actor)
    _, log_prob = samples(actor, obs, noises[1])
    mean, log_std = np.split(forward(actor.net, obs), 2, -1)
    z = (np.arctanh(act) - mean) / np.exp(log_std)
    data_log_prob = np.sum(-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - act**2), -1)
    assert loss.item() == pytest.approx(np.mean(0.3 * log_prob[0] - data_log_prob), rel=1e-5)
    assert returned.item() == pytest.approx(np.mean(log_prob), rel=1e-5)

    log_alpha, gap = torch.tensor(2.0).log(), torch.tensor(4.0)
    assert cql.alpha_loss(cql_args(threshold=1.0), log_alpha, gap).item() == pytest.approx(-2 * (4 - 1))


def test_cql_samples_give_the_integral():
    """The importance-sampled logsumexp, less log K, tends to log of the integral of exp Q over the whole action box."""
    n, args = 100_000, cql_args()
    peak = np.array([0.3, -0.6])

    def q(act):
        return 2.0 - 3.0 * ((act - peak) ** 2).sum(-1)

    grid = (np.arange(2000) + 0.5) / 1000 - 1
    integral = np.prod([np.mean(np.exp(-3.0 * (grid - x) ** 2)) * 2 for x in peak]) * np.exp(2.0)
    torch.manual_seed(0)
    actor = cql.Actor(O, 2)
    with torch.no_grad():
        act, log_prob = cql.sample(torch.randn(2, O), actor, n)  # as if of the policy at obs, and at next_obs
    uniform = torch.rand(n, 2) * 2 - 1
    all_act = torch.cat([uniform, act[:, 0], act[:, 1]])
    all_log_prob = torch.cat([torch.full((n,), 2 * np.log(0.5)), log_prob[:, 0], log_prob[:, 1]])
    all_q = torch.from_numpy(q(array(all_act))).expand(2, -1)[..., None]
    soft = cql.soft_maximum(args, all_q, all_log_prob[:, None])
    assert soft.shape == (2, 1)
    np.testing.assert_allclose(soft - np.log(3 * n), np.log(integral), atol=0.02)


def test_cql_rho_has_the_gradient_of_its_maximum():
    """w maximizes E_w Q - KL(w, rho), whose maximum is log E_rho exp Q: the same gradient, another value."""
    q = torch.randn(2, 6, 3, requires_grad=True)
    cql.soft_maximum(cql_args(variant="rho"), q, torch.zeros(6, 3)).sum().backward()
    gradient, q.grad = q.grad, None
    q.exp().mean(1).log().sum().backward()
    torch.testing.assert_close(gradient, q.grad)


def test_cql_reduces_over_the_actions():
    for q in (torch.zeros(2, 5, 7), torch.zeros(7, 2, 5), torch.zeros(1, 7, 5)):
        with pytest.raises(AssertionError):
            cql.soft_maximum(cql_args(), q, torch.zeros(7, 5))
