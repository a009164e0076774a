import imageio
import numpy as np
import pytest
from test_scripts import arguments, checkpoint_of

from algorithms import bc, dt
from datasets import UserError
from results import video


def can_draw():
    try:
        import OpenGL.osmesa  # noqa: F401
    except (ImportError, AttributeError, OSError):
        return False
    return True


@pytest.mark.parametrize("script, seeds", [(bc, 1), (bc, 2), (dt, 1)])
def test_video(script, seeds, small, tmp_path, monkeypatch):
    """A GIF in the run's folder, in which something moves; the run itself is what it is without."""
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    render = video.render
    monkeypatch.setattr(video, "render", lambda checkpoint: render(checkpoint, seconds=0.5))
    args = arguments(script, small, steps=2, batch_size=4, seeds=seeds, video=True)
    if not can_draw():
        with pytest.raises(UserError, match="Cannot draw .*video.gif .*: apt-get install libosmesa6"):
            script.train(args)
        assert checkpoint_of(tmp_path).with_name("record-seed=0.json").exists()
        return
    script.train(args)
    frames = imageio.mimread(checkpoint_of(tmp_path).with_name("video.gif"))
    assert len(frames) == 10 and frames[0].shape[:2] == (180, 240)
    assert np.mean(frames[0] != frames[-1]) > 0.01


def test_cannot_draw(small, tmp_path, monkeypatch):
    """One sentence, after the records have been written."""
    monkeypatch.setattr(video, "render", lambda checkpoint: 1 / 0)
    with pytest.raises(UserError, match="Cannot draw .*video.gif .division by zero.: apt-get install libosmesa6"):
        bc.train(arguments(bc, small, steps=2, batch_size=4, video=True))
    assert checkpoint_of(tmp_path).with_name("record-seed=0.json").exists()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("a.avi", "Cannot write .*a.avi: it must be a .gif or .mp4"),
        ("none/a.gif", "Cannot write .*a.gif: it must be .* in a folder that exists"),
        ("a.mp4", "Cannot write .*a.mp4: pip install imageio-ffmpeg, or write a .gif"),
    ],
)
def test_cannot_write(name, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "find_spec", lambda package: None)
    monkeypatch.setattr(video, "render", lambda checkpoint: 1 / 0)
    with pytest.raises(UserError, match=sentence):
        video.record(tmp_path / "checkpoint.pt", tmp_path / name)
