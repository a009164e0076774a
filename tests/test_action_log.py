"""What --log-actions keeps of a training is enough to have its replay buffer again."""

import numpy as np
import torch
from test_scripts import checkpoint_of

from algorithms import sac
from datasets import BODIES
from results.checkpoint import load_checkpoint


def test_log_repeats_the_buffer(tmp_path):
    """Across a resume: each transition from the states, bytes and returns that were kept, and nothing is left over."""
    args = dict(env="hopper", start_steps=300, eval_every=400, eval_episodes=1, batch_size=8, log_actions=True)
    sac.train(sac.Args(steps=400, **args))
    sac.train(sac.Args(steps=800, resume=True, **args))
    saved = load_checkpoint(checkpoint_of(tmp_path))["state"]
    rows, act, sim, episodes = (
        saved["buffer"]["rows"],
        *(saved["log"][key].numpy() for key in ("act", "sim", "episodes")),
    )
    env = BODIES["hopper"].make_env().unwrapped
    row = kept = 0
    for _, steps, ret in episodes:
        total = 0.0
        for t in range(int(steps)):
            if t % 25 == 0:
                env.reset()
                env.set_state(*np.split(sim[kept], [env.model.nq]))
                kept += 1
            next_obs, rew, *_ = env.step(act[row].astype(np.float32) / 127)
            torch.testing.assert_close(rows[row, 11:14], torch.from_numpy(act[row]) / 127)
            torch.testing.assert_close(rows[row, 15:26], torch.from_numpy(next_obs).float(), rtol=1e-5, atol=1e-5)
            total, row = total + rew, row + 1
        assert abs(total - ret) < 1e-5 * max(1, abs(ret))
    assert (row, kept) == (len(act), len(sim)) == (len(rows), len(sim)) and len(rows) == 800
    env.reset(seed=int(episodes[1, 0]))
    np.testing.assert_array_equal(env.data.qpos, sim[int(np.ceil(episodes[0, 1] / 25))][: env.model.nq])
