"""Trains d3rlpy's IQL on a collected file and leaves its policies in FOLDER: for peer_iql.py, in .venv-peers.

Settings of d3rlpy's own reproduction on D4RL: rewards divided by the range of returns, the actor's learning rate along
a cosine, observations as they are.

Usage: .venv-peers/bin/python results/studies/d3rlpy_iql.py FILE FOLDER SEED STEPS EVERY
"""

import sys
from pathlib import Path

import d3rlpy
import h5py
import numpy as np
import torch

path, folder, (seed, steps, every) = sys.argv[1], Path(sys.argv[2]), map(int, sys.argv[3:])
torch.set_num_threads(1)  # networks this small are no faster with more
d3rlpy.seed(seed)
with h5py.File(path) as file:
    obs, act, rew = (file[name][:] for name in ("observations", "actions", "rewards"))
    ends = [file[name][:].astype(np.float32) for name in ("terminals", "timeouts")]
data = d3rlpy.dataset.MDPDataset(obs, act, rew, *ends)
scaler = d3rlpy.preprocessing.ReturnBasedRewardScaler(multiplier=1000.0)
scaler.fit_with_trajectory_slicer(data.episodes, d3rlpy.dataset.BasicTrajectorySlicer())
cosine = d3rlpy.optimizers.CosineAnnealingLRFactory(T_max=100_000)
agent = d3rlpy.algos.IQLConfig(
    actor_learning_rate=3e-4,
    critic_learning_rate=3e-4,
    actor_optim_factory=d3rlpy.optimizers.AdamFactory(lr_scheduler_factory=cosine),
    expectile=0.7,
    weight_temp=3.0,
    max_weight=100.0,
    batch_size=256,
    reward_scaler=scaler,
).create(device="cpu:0")
agent.build_with_dataset(data)
for step in range(1, steps + 1):
    agent.update(data.sample_transition_batch(256))
    if step % every == 0:
        agent.save_policy(str(folder / f"{step}.pt"))  # TorchScript: obs (B, O) -> the Gaussian's mean (B, A)
        print(f"d3rlpy's IQL, seed {seed}: {step} updates", flush=True)
