"""Renders a trained policy to a GIF or MP4, off screen: what --video of every script does at the end of its run.

Drawing needs EGL, which comes with a GPU's driver, or OSMesa (Debian: apt-get install libosmesa6); MUJOCO_GL=egl or
MUJOCO_GL=osmesa chooses. MP4 needs the package imageio-ffmpeg.

Usage: python results/video.py runs/td3_bc/collected/halfcheetah-medium/seed=0/checkpoint.pt --out halfcheetah.gif
"""

import dataclasses
import os
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import imageio
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import UserError
from results.checkpoint import load_agent, takes_rewards

FPS = 20


@dataclass
class Args:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    out: Path = Path("video.gif")  # .gif or .mp4
    seconds: float = 8.0  # of the simulation
    width: int = 240  # pixels; the height is three quarters of it
    seed: int = 0  # of the start state


def render(checkpoint, seconds=8.0, width=240, seed=0):
    """Frames (height, width, 3) of one episode, FPS to a second of the simulation; the first of several agents."""
    if sys.platform == "linux":  # the others draw off screen by themselves
        os.environ.setdefault("MUJOCO_GL", "egl" if torch.cuda.is_available() else "osmesa")
    saved, script, data, policy = load_agent(checkpoint)
    agents = (saved["args"]["seeds"], 1) if saved["args"].get("seeds", 1) > 1 else (1,)
    args = data.task.env_args | {"render_mode": "rgb_array", "width": width, "height": width * 3 // 4}
    env = dataclasses.replace(data.task, env_args=args).make_env()
    obs, rew, frames, over = env.reset(seed=seed)[0], 0.0, [], False
    per_frame, steps = max(1, env.metadata["render_fps"] / FPS), 0
    while not over and len(frames) < seconds * FPS:
        if steps >= len(frames) * per_frame:
            frames.append(env.render())
        x = ((torch.as_tensor(obs, dtype=torch.float32) - data.obs_mean) / data.obs_std).expand(*agents, -1)
        more = [torch.full(agents, rew)] if takes_rewards(policy) else []
        with torch.no_grad():
            act = policy(x, *more)
        act = act.flatten()[0].item() if data.n_actions else act.clamp(-1, 1).flatten(0, -2)[0].numpy()
        obs, rew, terminated, truncated, _ = env.step(act)
        over, steps = terminated or truncated, steps + 1
    env.close()
    return frames


def record(checkpoint, out, **options):
    """Writes what `render` gives; UserError if this machine cannot draw."""
    if out.suffix not in (".gif", ".mp4") or not out.parent.is_dir():
        raise UserError(f"Cannot write {out}: it must be a .gif or .mp4 in a folder that exists.")
    if out.suffix == ".mp4" and not find_spec("imageio_ffmpeg"):
        raise UserError(f"Cannot write {out}: pip install imageio-ffmpeg, or write a .gif.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frames = render(checkpoint, **options)
            if out.suffix == ".gif":  # an octree's 64 colours: half as large as with 256, and the body stands out
                first, *rest = (Image.fromarray(x).quantize(64, Image.Quantize.FASTOCTREE) for x in frames)
                first.save(out, save_all=True, append_images=rest, duration=1000 / FPS, loop=0)
            else:
                imageio.mimsave(out, frames, fps=FPS)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each of the OpenGL platforms fails in its own ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"Cannot draw {out} ({reason}): apt-get install libosmesa6, and MUJOCO_GL=osmesa.") from None
    print(f"{out}: {len(frames) / FPS:.0f} seconds, {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    args = tyro.cli(Args)
    record(args.checkpoint, args.out, seconds=args.seconds, width=args.width, seed=args.seed)
