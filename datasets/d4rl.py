"""D4RL's HDF5 files: where they lie, how they are downloaded, the Dataset that is made of one.

Neither the d4rl package nor gym is needed. D4RL: Fu et al. 2020, arXiv:2004.07219; github.com/Farama-Foundation/D4RL.
"""

import dataclasses
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

import h5py
from tqdm import tqdm

from datasets.catalog import UserError
from datasets.processes import locked
from datasets.store import KEYS, READER, cache_dir, cached, make_dataset, transitions, write_hdf5

URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"  # another mirror: D4RL_URL
SIGNATURE = b"\x89HDF\r\n\x1a\n"
TRIES = 5  # connections to the server, each of which goes on where the last one broke off


def local_file(task):
    """Where D4RL itself keeps the file of `task`: D4RL_DATASET_DIR, or ~/.d4rl/datasets."""
    folder = os.environ.get("D4RL_DATASET_DIR", Path.home() / ".d4rl" / "datasets")
    return Path(folder) / Path(task.d4rl_file).name


def address(task):
    return os.environ.get("D4RL_URL", URL).rstrip("/") + "/" + task.d4rl_file


def load(task, device="cpu"):
    """The Dataset of D4RL's file of `task`, downloaded unless it is there, by way of a flat file in the cache."""
    if not task.d4rl_file:
        raise UserError(f"D4RL has no data called {task.name}; use --source collected.")
    path = local_file(task)
    if not path.exists():
        download(task)
    status = path.stat()
    flat = cache_dir() / f"d4rl-{task.name}.hdf5"

    def build():
        rows, ends, O, A = transitions(path, task.max_episode_steps)
        if (task.obs_dim, task.act_dim) != (O, A):
            wanted = f"{task.obs_dim} and {task.act_dim}"
            raise UserError(f"{path} has {O} observations and {A} actions, {task.name} {wanted}: another task's file?")
        write_hdf5(flat, make_dataset(task, "d4rl", path, rows, ends, O, A), origin)

    origin = f"{READER} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    data = cached(flat, origin, build, device)
    data.task = task
    if task.name.startswith("ant-") and data.obs[:, 27:].any():
        refusal = "the data's contact forces are not all 0, as those of D4RL's v2 data and of the environment are"
        data.task = dataclasses.replace(task, refusal=refusal)
    return data


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
        with locked(path.with_name(path.name + ".lock")):  # another process may be downloading it: wait for that one
            if not path.exists():
                with part.open("ab") as file:
                    _fetch(url, file, task.name, seconds)
                if wrong := _flaw(part):
                    part.unlink(missing_ok=True)
                    raise UserError(f"What {url} sent is no D4RL file ({wrong}); it was removed.")
                part.replace(path)
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
        with h5py.File(path) as file:
            missing = [key for key in KEYS if key not in file]
            return f"it lacks {', '.join(missing)}" if missing else None
    except OSError as error:
        return str(error).splitlines()[0]
