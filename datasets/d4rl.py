"""D4RL's HDF5 files: where they lie, how they are downloaded, how their rows become transitions.

Neither the d4rl package nor gym is needed. D4RL: Fu et al. 2020, arXiv:2004.07219; github.com/Farama-Foundation/D4RL.
"""

import fcntl
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from datasets.catalog import UserError

URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"  # another mirror: D4RL_URL
SIGNATURE = b"\x89HDF\r\n\x1a\n"
KEYS = ("observations", "actions", "rewards", "terminals")
TRIES = 5  # connections to the server, each of which goes on where the last one broke off


def local_file(task):
    """Where D4RL itself keeps the file of `task`: D4RL_DATASET_DIR, or ~/.d4rl/datasets."""
    folder = os.environ.get("D4RL_DATASET_DIR", Path.home() / ".d4rl" / "datasets")
    return Path(folder) / Path(task.d4rl_file).name


def address(task):
    return os.environ.get("D4RL_URL", URL).rstrip("/") + "/" + task.d4rl_file


def reachable(task, seconds=3):
    """Whether the server has the file and answers within `seconds`."""
    try:
        request = urllib.request.Request(address(task), method="HEAD")
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return answer.status == 200
    except (OSError, ValueError, http.client.HTTPException):
        return False


def download(task, seconds=30):
    """Downloads the file of `task` to its place, where it appears when it is whole and readable, or not at all.

    What has come so far lies beside it as *.part, from which the next call goes on. UserError when the server refuses,
    sends something else, stays silent for `seconds`, or breaks off too often.
    """
    path, url = local_file(task), address(task)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may be downloading it: wait for that one
            if not path.exists():
                _fetch(url, file, task.name, seconds)
                if wrong := _flaw(part):
                    part.unlink(missing_ok=True)
                    raise UserError(f"What {url} sent is no D4RL file ({wrong}); it was removed.")
                part.replace(path)
            else:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error.strerror}): make room, or set D4RL_DATASET_DIR.") from None
    return path


def _fetch(url, file, name, seconds):
    """Appends to `file` what it still lacks of `url`."""
    total = None
    for _ in range(TRIES):
        have = file.seek(0, os.SEEK_END)
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                if answer.status != 206:  # the server sends it all, whatever was asked for
                    have = file.seek(0)
                    file.truncate()
                length = answer.headers.get("Content-Length")
                total = have + int(length) if length else None
                with tqdm(total=total, initial=have, desc=f"download {name}", unit="B", unit_scale=True) as bar:
                    while chunk := answer.read(2**16):
                        if file.tell() == 0 and not chunk.startswith(SIGNATURE):
                            kind = answer.headers.get("Content-Type", "something unknown")
                            raise UserError(f"{url} sent {kind}, not an HDF5 file; check D4RL_URL.")
                        file.write(chunk)
                        bar.update(len(chunk))
                file.flush()
            if total is None or file.tell() == total:
                return
            cause = f"the connection broke off after {file.tell():,} of {total:,} bytes"
        except urllib.error.HTTPError as error:
            if error.code == 416 and total in (None, have):  # nothing left to send: it is whole, or another file by now
                return
            answer = f"{error.code} {error.reason}"
            raise UserError(f"{url} answers {answer}; check D4RL_URL, or use --source collected.") from None
        except (http.client.HTTPException, TimeoutError, ConnectionError, urllib.error.URLError) as error:
            cause = str(getattr(error, "reason", "") or error or type(error).__name__)
        except KeyboardInterrupt:
            raise UserError(f"Stopped after {file.tell():,} bytes of {name}; the same command goes on there.") from None
    raise UserError(f"Cannot download {url}: {cause}; the same command goes on there, or use --source collected.")


def _flaw(path):
    """What is wrong with a file that should be D4RL's, in a few words, or None."""
    try:
        with h5py.File(path, locking=False) as file:  # it is locked by `download`
            missing = [key for key in KEYS if key not in file]
            return f"it lacks {', '.join(missing)}" if missing else None
    except OSError as error:
        return str(error).splitlines()[0]


def transitions(path, max_episode_steps=None, own=False):
    """Rows (N, O + A + 1 + O + 1) float32: obs, act, rew, next_obs, done; ends (E,) after each episode's last; O; A.

    As D4RL's qlearning_dataset makes them: the next observation is that of the next row, so the step on which an
    episode timed out, whose next row begins another episode, is left out, and so is the last row of the file. `done`
    is the file's `terminals`. Where a file has no `timeouts`, which the v0 files lack, an episode times out after
    `max_episode_steps`, counted as D4RL counts: from 1 after a terminal.
    A user's `own` file may hold next_observations, and then every row is kept.
    """
    try:
        with h5py.File(path) as file:
            if missing := [key for key in KEYS + ("timeouts",) * own if key not in file]:
                raise UserError(f"{path} lacks {', '.join(missing)}: see 'bring your own data' in the README.")
            obs, act, rew, done = (file[key][:] for key in KEYS)
            timeouts = file["timeouts"][:].astype(bool).ravel() if "timeouts" in file else None
            next_obs = file["next_observations"][:] if own and "next_observations" in file else None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        name = "it is a folder" if Path(path).is_dir() else str(error).splitlines()[0]
        raise UserError(f"{path} is damaged or not an HDF5 file in D4RL's layout ({name}).") from None
    columns = {"observations": obs, "actions": act, "rewards": rew, "terminals": done, "timeouts": timeouts}
    lengths = {key: len(column) for key, column in columns.items() if column is not None}
    if obs.ndim != 2 or len(set(lengths.values())) > 1 or not len(obs):
        raise UserError(f"{path} has no transitions, or columns of different lengths: {lengths}.")
    N, done = len(obs), done.astype(bool).ravel()
    if timeouts is None:
        timeouts = _count_timeouts(done, max_episode_steps)
    if next_obs is None:
        next_obs = np.concatenate([obs[1:], obs[-1:]])
        keep = ~timeouts
        keep[-1] = False
    else:
        keep = np.ones(N, bool)
    rows = np.hstack(
        [obs, act.reshape(N, -1), rew.reshape(N, 1), next_obs, done[:, None]], dtype=np.float32, casting="unsafe"
    )
    rows = rows[keep]
    last = (done | timeouts)[keep] | np.append(np.diff(np.cumsum(~keep)[keep]) > 0, True)
    return rows, np.flatnonzero(last) + 1, obs.shape[1], act[0].size


def _count_timeouts(done, limit):
    timeouts, count = np.zeros(len(done), bool), 0
    for i in range(len(done)):
        timeouts[i] = count == limit - 1
        count = 0 if timeouts[i] else 1 if done[i] else count + 1
    return timeouts
