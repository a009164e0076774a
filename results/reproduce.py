"""Runs a grid of algorithms x tasks x seeds, with records in results/runs/: make reproduce.

What is recorded is skipped, and what was interrupted goes on from its checkpoint: the same command again finishes what
is left. Without a GPU there is one run on each core; with GPUs one on each, which trains the seeds of a cell together.
RUNNER=ray gives the runs to a Ray cluster instead (RAY_ADDRESS, else a local one; see requirements-ray.txt).
A run that fails does not stop the others and is named at the end.

Usage: make reproduce ALGOS="td3_bc iql" ENVS="hopper-medium hopper-medium-replay" SEEDS="0 1 2" STEPS=100000
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets import UserError, load, write_whole
from datasets.processes import cores
from results.run import code_version
from tests.scripts import TRAINED

RECORDS = ROOT / "results" / "runs"
# All scripts but those that act while they learn, in reading order, and 10% BC.
ALGOS = {name: [name] for name, script in TRAINED.items() if not script.acts}
ALGOS["10bc"] = ["bc", "--top-fraction", "0.1"]
BODIES, QUALITIES = ("halfcheetah", "hopper", "walker2d"), ("medium", "medium-replay", "medium-expert")


@dataclass
class Args:
    algos: tuple[str, ...] = ("bc", "10bc", "td3_bc", "iql")
    envs: tuple[str, ...] = tuple(f"{body}-{quality}" for body in BODIES for quality in QUALITIES)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100_000
    source: Literal["collected", "d4rl"] = "collected"
    runner: Literal["local", "ray"] = "local"


@dataclass(frozen=True)
class Job:
    """One process: an algorithm on a task, for `seeds` seeds from `seed` on."""

    algo: str
    env: str
    seed: int
    seeds: int
    steps: int
    source: str
    fingerprint: str  # of the data
    words: tuple[str, ...] = ()  # more arguments

    @property
    def name(self):
        last = f" to {self.seed + self.seeds - 1}" if self.seeds > 1 else ""
        return f"{self.algo} {self.env} seed {self.seed}{last}"

    @property
    def place(self):
        """The folders of the run and of its records, relative (results/run.py)."""
        return Path(ALGOS[self.algo][0], self.source, self.env)

    @property
    def changed(self):
        words = [*self.words, *ALGOS[self.algo][1:]]  # in the order of the script's Args
        return "".join(f",{key[2:].replace('-', '_')}={value}" for key, value in zip(words[::2], words[1::2]))

    @property
    def runs(self):
        """RUNS_DIR of the run: no other data or length is ever resumed there."""
        return runs_dir() / "reproduce" / f"{self.fingerprint},steps={self.steps}"

    @property
    def folder(self):
        together = f",seeds={self.seeds}" * (self.seeds > 1)
        return self.runs / self.place / f"seed={self.seed}{together}{self.changed}"

    @property
    def records(self):
        seeds = range(self.seed, self.seed + self.seeds)
        return [RECORDS / self.place / f"seed={seed}{self.changed},steps={self.steps}.json" for seed in seeds]

    def command(self, root, device):
        script, *words = ALGOS[self.algo]
        words += ["--env", self.env, "--source", self.source, "--steps", self.steps, "--device", device]
        words += ["--seed", self.seed, "--seeds", self.seeds, *self.words]
        words += ["--resume"] * (self.folder / "checkpoint.pt").exists()
        return [sys.executable, str(Path(root, "algorithms", f"{script}.py")), *map(str, words)]


def runs_dir():
    return Path(os.environ.get("RUNS_DIR", ROOT / "runs")).resolve()


def find_jobs(args, fingerprints, together):
    """Jobs for what has no record with the data's fingerprint: the first seed of everything, then the next.

    together: whether consecutive seeds of a cell are one job.
    """
    jobs = []
    for algo in args.algos:
        for env, fingerprint in fingerprints.items():
            for seed in sorted(set(args.seeds)):
                job = Job(algo, env, seed, 1, args.steps, args.source, fingerprint)
                (path,) = job.records
                if path.exists() and json.loads(path.read_text())["fingerprint"] == fingerprint:
                    continue
                last = jobs[-1] if jobs else None
                if together and last and (last.algo, last.env, last.seed + last.seeds) == (algo, env, seed):
                    jobs[-1] = replace(last, seeds=last.seeds + 1)
                else:
                    jobs.append(job)
    return sorted(jobs, key=lambda job: job.seed)  # stable: otherwise in the order of the arguments


def seconds_of(job, device):
    """How long the job takes, by the median of its algorithm's records on a CPU or on GPUs; None: there is none."""
    times = []
    for path in (RECORDS / ALGOS[job.algo][0]).rglob("*.json"):
        record = json.loads(path.read_text())
        if record["device"].startswith("cpu") == (device == "cpu"):
            times.append(record["seconds"] / record["steps"] / record.get("trained_together", 1))
    return sorted(times)[len(times) // 2] * job.steps * job.seeds if times else None


def what_is_left(jobs, devices):
    """A sentence: how many jobs, and how long they will take."""
    times = [seconds_of(job, devices[0]) for job in jobs]
    hours = sum(time for time in times if time) / 3600 / len(devices)
    unknown = f" and {times.count(None)} of unknown length" if None in times else ""
    return f"{len(jobs)} runs left on {len(devices)} devices, about {hours:.1f} hours{unknown}."


def start(job, root, device, log):
    own = {"RUNS_DIR": str(job.runs), "END_WITH": str(os.getpid())}  # or a run might be trained by two at once
    own |= {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    return subprocess.Popen(
        job.command(root, device),
        env=os.environ | own,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def outcome(job, process, log):
    """What a run that ended leaves: its records' texts, or None and the reason why not."""
    if process.wait() == 0:
        seeds = range(job.seed, job.seed + job.seeds)
        return [(job.folder / f"record-seed={seed}.json").read_text() for seed in seeds], ""
    log.seek(0)
    lines = log.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
    return None, lines[-1] if process.returncode > 0 and lines else f"it was killed by signal {-process.returncode}"


def run_local(jobs, devices):
    """Yields (job, records, error) as they end; each device has one job at a time."""
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            for device in devices:
                if waiting and device not in running:
                    job, log = waiting.pop(0), tempfile.TemporaryFile()  # noqa: SIM115
                    running[device] = job, start(job, ROOT, device.split()[0], log), log
            time.sleep(0.2)
            for device, (job, process, log) in list(running.items()):
                if process.poll() is not None:
                    del running[device]
                    yield job, *outcome(job, process, log)
    except KeyboardInterrupt:  # the runs have had the Ctrl-C too, and save
        for _, process, _ in running.values():
            process.wait()
        raise


def run_ray(jobs, gpus):
    """The same on a Ray cluster, whose nodes have the packages of requirements.txt and get this repository's files."""
    import ray

    def train(job):
        with tempfile.TemporaryFile() as log:
            return outcome(job, start(job, Path.cwd(), "cuda" if gpus else "cpu", log), log)

    remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=0)(train)
    waiting = {remote.remote(job): job for job in jobs}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        job = waiting.pop(done)
        try:
            yield job, *ray.get(done)
        except ray.exceptions.RayError as error:
            yield job, None, str(error).strip().splitlines()[-1]


def connect_ray():
    """Joins or starts the cluster; how many CPUs and GPUs it has."""
    try:
        import ray
    except ImportError:
        raise UserError("RUNNER=ray needs Ray: pip install -r requirements-ray.txt.") from None
    skipped = [".git", ".venv*", "runs", "results/runs", "__pycache__"]
    files = {"working_dir": str(ROOT), "excludes": skipped, "env_vars": {"RUNS_DIR": str(runs_dir())}}
    ray.init(address=os.environ.get("RAY_ADDRESS"), runtime_env=files, log_to_driver=False)
    return [int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU")]


def reproduce(args):
    for algo in args.algos:
        if algo not in ALGOS:
            raise UserError(f"Unknown algorithm '{algo}' in ALGOS; known are {', '.join(ALGOS)}.")
    kinds = {TRAINED[ALGOS[algo][0]].discrete for algo in args.algos}
    if len(kinds) == 2:
        raise UserError("--algos has scripts for continuous and for discrete actions: one kind at a time.")
    loaded = (load(env, args.source, "cpu", discrete=True in kinds) for env in args.envs)  # collects what is missing
    fingerprints = dict(zip(args.envs, (data.fingerprint for data in loaded)))
    if args.runner == "ray":
        cpus, gpus = connect_ray()
    else:
        cpus, gpus = cores(), torch.cuda.device_count()
    devices = [f"cuda:{i}" for i in range(gpus)] or ["cpu"] * cpus
    jobs = find_jobs(args, fingerprints, together=gpus > 0)
    print(what_is_left(jobs, devices), flush=True)
    slots = devices if gpus else [f"cpu {i}" for i in range(cpus)]
    ends = run_ray(jobs, gpus) if args.runner == "ray" else run_local(jobs, slots)
    failed, left = [], list(jobs)
    for job, records, error in ends:
        left.remove(job)
        if records is None:
            failed.append(f"{job.name}: {error}")
            print(f"FAILED {failed[-1]}", flush=True)
            continue
        for path, text in zip(job.records, records):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = text.replace('"commit": "unknown"', f'"commit": "{code_version()}"')  # a Ray node has no history
            write_whole(path, text.encode())
        score = ", ".join(f"{json.loads(text)['score']:.1f}" for text in records)
        print(f"{job.name}: {score}. {what_is_left(left, devices)}", flush=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)}")
    print("Nothing is left; 'make results' draws the tables.")


if __name__ == "__main__":
    try:
        reproduce(tyro.cli(Args))
    except KeyboardInterrupt:
        raise UserError("Stopped, and the runs are saved; the same command goes on.") from None
