"""imitation's side of results/peers.py, in an environment of its own: .venv-imitation."""

import sys
import tempfile
import time

import numpy as np
import torch

from results.peers import ROOT, columns, commands, timed


def run_maxent_irl(path):
    from imitation.algorithms.mce_irl import MCEIRL
    from imitation.rewards.reward_nets import BasicRewardNet
    from seals.base_envs import TabularModelPOMDP

    arrays = np.load(path)
    env = TabularModelPOMDP(
        transition_matrix=arrays["move"],
        observation_matrix=arrays["features"].astype(np.float32),
        reward_matrix=arrays["rew"],
        horizon=int(arrays["horizon"]),
        initial_state_dist=arrays["start"],
    )
    words = dict(hid_sizes=[], use_action=False, use_next_state=False, use_done=False)

    def begin():
        net = BasicRewardNet(env.observation_space, env.action_space, **words)
        words_ = dict(optimizer_kwargs={"lr": 0.2}, linf_eps=0, grad_l2_eps=0, log_interval=None)
        return net, MCEIRL(
            arrays["visits"], env, net, np.random.default_rng(0), discount=float(arrays["gamma"]), **words_
        )

    for n in commands():
        start = time.perf_counter()
        net, irl = begin()  # as ours does
        irl.train(n)
        print("seconds", time.perf_counter() - start, flush=True)
        features = torch.as_tensor(arrays["features"], dtype=torch.float32)
        np.save(path.with_name("imitation.npy"), net(features, None, None, None).detach().numpy().squeeze())


def run_dagger(path):
    import gymnasium
    from imitation.algorithms import bc
    from imitation.algorithms.dagger import SimpleDAggerTrainer
    from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
    from stable_baselines3.common.vec_env import DummyVecEnv

    W0, b0, W1, b1, W2, b2 = (x.astype(np.float32) for x in np.load(path).values())

    class Expert(BasePolicy):  # as datasets/collect.py asks it
        def _predict(self, *words):
            raise NotImplementedError

        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            h = np.maximum(observation.astype(np.float32) @ W0.T + b0, 0)
            h = np.maximum(h @ W1.T + b1, 0)
            return np.tanh(np.split(h @ W2.T + b2, 2, -1)[0]), None

    envs, rng = DummyVecEnv([lambda: gymnasium.make("Hopper-v4")]), np.random.default_rng(0)
    spaces = envs.observation_space, envs.action_space
    net = ActorCriticPolicy(*spaces, lambda _: 1e-3, net_arch=dict(pi=[256, 256], vf=[]), activation_fn=torch.nn.ReLU)
    words = dict(batch_size=256, optimizer_kwargs={"lr": 1e-3}, policy=net, rng=rng)
    trainer = SimpleDAggerTrainer(
        venv=envs,
        scratch_dir=tempfile.mkdtemp(),
        expert_policy=Expert(*spaces),
        rng=rng,
        beta_schedule=lambda i: float(i == 0),
        bc_trainer=bc.BC(observation_space=spaces[0], action_space=spaces[1], **words),
    )
    updates = dict(n_batches=1000, log_rollouts_venv=None, progress_bar=False, log_interval=10**9)
    for n in commands():
        start, before = time.perf_counter(), len(trainer._all_demos)
        for _ in range(n):
            trainer.train(1, rollout_round_min_episodes=1, rollout_round_min_timesteps=1000, bc_train_kwargs=updates)
        steps = sum(len(demo) for demo in trainer._all_demos[before:])
        print("seconds", (time.perf_counter() - start) * 1000 * n / steps, flush=True)


def run_adversarial(script, path):
    import gymnasium
    from imitation.algorithms.adversarial.airl import AIRL
    from imitation.algorithms.adversarial.gail import GAIL
    from imitation.data.types import Transitions
    from imitation.rewards.reward_nets import BasicRewardNet, BasicShapedRewardNet
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    obs, act, rew, terminals, timeouts = (column[:20_000] for column in columns(path))
    rows = np.flatnonzero(~(terminals[:-1] | timeouts[:-1]).astype(bool))[::20][:200]  # as many as 4 demos of 50 pairs
    infos, dones = np.array([{}] * len(rows)), np.zeros(len(rows), bool)
    demos = Transitions(obs=obs[rows], acts=act[rows], next_obs=obs[rows + 1], dones=dones, infos=infos)
    envs = DummyVecEnv([lambda: gymnasium.make("Hopper-v4")] * 8)
    net = {"net_arch": [100, 100], "activation_fn": torch.nn.Tanh}
    ppo = dict(n_steps=1000, batch_size=256, n_epochs=10, gamma=0.995, gae_lambda=0.97, policy_kwargs=net)
    agent = PPO("MlpPolicy", envs, **ppo)
    spaces, sizes = (envs.observation_space, envs.action_space), (100, 100)
    if script == "gail":
        learner, reward = GAIL, BasicRewardNet(*spaces, hid_sizes=sizes)
    else:  # the reward of states and its shaping, as airl.py's
        words = dict(reward_hid_sizes=sizes, potential_hid_sizes=sizes, use_action=False)
        learner, reward = AIRL, BasicShapedRewardNet(*spaces, **words)
    gail = learner(
        demonstrations=demos,
        demo_batch_size=200,  # at most as many as there are
        venv=envs,
        gen_algo=agent,
        reward_net=reward,
        n_disc_updates_per_round=30,
        gen_replay_buffer_capacity=8000,
        allow_variable_horizon=True,
    )
    for n in commands():
        timed(lambda: gail.train(8000), n)


def run(script, path):
    sys.path[:] = [path for path in sys.path if path != str(ROOT)]  # imitation's `datasets` is another package
    if script == "maxent_irl":
        run_maxent_irl(path)
    elif script == "dagger":
        run_dagger(path)
    else:
        run_adversarial(script, path)
