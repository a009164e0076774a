"""Run: what every script needs around its updates, and what carries no algorithmic choice.

A progress bar, TensorBoard, the check for losses that are not finite, checkpoints, exact resume, the run's record.
"""

import collections
import contextlib
import ctypes
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

from datasets import UserError, write_whole
from datasets.processes import end_with
from results.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# Arguments that do not tell one run from another: a resume may change them, and they are not in the folder's name.
FREE = {"steps", "device", "resume", "record", "video", "graph", "truth"}
# These, too, do not stand in the folder's name: they have places of their own in the record or the checkpoint.
NOT_OF_THE_CELL = FREE | {"env", "source", "eval_env", "seed", "seeds", "policies"}
# Arguments in which a run may differ from the checkpoint that stands for its offline phase.
OF_ONE_PHASE = NOT_OF_THE_CELL | {"eval_every", "eval_episodes"}
SAVE_SECONDS = 60  # at least, between the checkpoints within a step
# The first steps on CUDA are no graph yet (see `graphed`), and no reason to warn of optimisers that are ready for one.
UNGRAPHED = "This instance was constructed with capturable=True"
warnings.filterwarnings("ignore", message=UNGRAPHED)


def _thread_failed(args):
    """TensorBoard writes in a thread of its own; what the disk refuses it is raised again, and told, in `report`."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(args)


threading.excepthook = _thread_failed


class Run:
    """One training run: of one agent, or of `args.seeds` of them side by side.

        run = Run(__file__, args)                        # checks the arguments, seeds torch, names the device
        for step in run.steps(data, actor=actor, ...):   # from 1, or from where the checkpoint stands
            update()                                     # which ends in run.watch({name: loss})
            if run.due(step):
                run.report(step, returns)

    The keyword arguments of `steps` are what a checkpoint holds: anything with a state_dict, or a tensor.
    """

    def __init__(self, script, args, schedule=False, agents=None, runs=None):
        """schedule: whether something follows a schedule over --steps, which a resume may then not change. agents: how
        many learn side by side, where that is not --seeds. runs: the folder of all runs, if not RUNS_DIR, or runs/."""
        if parent := os.environ.pop("END_WITH", ""):  # the process id of a runner, which waits for this run
            end_with(int(parent))
        self.args, self.algorithm = args, Path(script).stem
        self.runs = runs or Path(os.environ.get("RUNS_DIR", ROOT / "runs"))
        self.free, self.defaults = FREE - {"steps"} if schedule else FREE, {}
        check_arguments(args)
        self.device = choose_device(args.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device.index or 0)
            torch.cuda.set_stream(torch.cuda.Stream())  # one stream for all: a graph cannot be captured in the default
        keep_freed_memory()
        torch.manual_seed(args.seed)
        self.seeds = range(args.seed, args.seed + (agents or getattr(args, "seeds", 1)))
        self._offline = None  # the checkpoint that stands for the offline phase
        self.resumable = True  # an online script clears it inside an episode: an environment cannot be checkpointed
        self.curve, self.seconds, self.eval_seconds = [], 0.0, 0.0
        self._interrupted = self._save_due = False

    def tuned(self, task, table):
        """The arguments, with what `table` has for the task in place of each None: {"": values of all tasks, then of a
        family or of a task: what is different there}. Records and the name of the folder take them for defaults."""
        self.defaults = {**table[""], **table.get(task.family, {}), **table.get(task.name, {})}
        chosen = {name: value for name, value in self.defaults.items() if getattr(self.args, name) is None}
        self.args = dataclasses.replace(self.args, **chosen)
        print(f"{task.name}: " + ", ".join(f"{name} {getattr(self.args, name)}" for name in self.defaults))
        return self.args

    def begins_with(self, sister, data, seeds=1):
        """The arguments. With --checkpoint, `steps` then starts from that checkpoint of `sister`.py, in place of an
        offline phase: from its step, its curve and whatever of its state has the same name here, learning rates aside.
        The argument becomes `sister`, in records and the folder's name. UserError where it is of another script, task,
        data, number of agents, or of other arguments that both have."""
        path = self.args.checkpoint
        if not path:
            return self.args
        saved = load_checkpoint(path, self.device)
        theirs, number = saved["args"], saved["args"].get("seeds", 1)
        if saved["algorithm"] != sister:
            raise UserError(f"{path} is of {saved['algorithm']}.py; --checkpoint takes one of {sister}.py.")
        if (saved["task"]["name"], saved["fingerprint"]) != (data.task.name, data.fingerprint):
            raise UserError(
                f"{path} is of {saved['task']['name']} (data {saved['fingerprint']}), "
                f"and this run is of {data.task.name} (data {data.fingerprint})."
            )
        if number != seeds:
            raise UserError(f"{path} is of --seeds {number}; what is wanted is one of {sister}.py --seeds {seeds}.")
        ours = dataclasses.asdict(self.args)
        differ = [f"{k} is {theirs[k]}" for k in ours if k in theirs.keys() - OF_ONE_PHASE and ours[k] != theirs[k]]
        if differ:
            raise UserError(f"{path} is of a run with other arguments, which this one must share: {', '.join(differ)}.")
        self._offline = saved
        self.args = dataclasses.replace(self.args, checkpoint=sister, offline_steps=saved["step"])
        return self.args

    @property
    def total(self):
        """Steps in all: --steps, after the --offline-steps of a script that has both."""
        return self._switch + self.args.steps

    @property
    def _switch(self):
        return getattr(self.args, "offline_steps", 0)

    def steps(self, data, stride=1, **state):
        """Yields the steps, with a stride every so manieth; saves when it is due, on Ctrl-C, and at the end, where the
        record is written as well."""
        if getattr(self.args, "record", False) and not data.task.evaluable:
            raise UserError(f"--record keeps scores, and policies for {data.task.name} are not evaluated.")
        self.data, self.stride, self.state, self.folder = data, stride, state, self._folder(data)
        self.checkpoint = self.folder / "checkpoint.pt"
        resume = self.checkpoint.exists() if self.args.resume is None else self.args.resume  # None: if it can
        start = self._restore() if resume else self._start_afresh()
        start = self._take_over() if self._offline and not self.args.resume else start
        self.step = self._checked = start
        self._losses = {}
        self._finite = torch.ones(len(self.seeds), dtype=torch.bool, device=self.device)
        self._good_steps = torch.zeros(len(self.seeds), dtype=torch.long, device=self.device)
        handler = signal.signal(signal.SIGINT, self._interrupt)  # first: who sees the curves may count on a checkpoint
        with _writing(self.folder):
            self._board = SummaryWriter(self.folder, purge_step=start + 1)
        title = f"{self.algorithm} {data.task.name}"
        self._bar = tqdm(total=self.total, initial=start, desc=title, unit="step", mininterval=0.5)
        self._clock = time.perf_counter()
        try:
            for step in range(start + stride, self.total + 1, stride):
                yield step
                self.step = step
                self._bar.update(stride)
                if self.resumable and (self._save_due or self._interrupted):
                    self._save()
                    self._stop_if_interrupted()
            self._save()
            self._finish()
            if getattr(self.args, "video", False):
                from results.video import record  # here, because few want it and it needs packages for drawing

                record(self.checkpoint, self.folder / "video.gif")
        finally:
            signal.signal(signal.SIGINT, handler)
            self._bar.close()
            with contextlib.suppress(OSError):  # a full disk has been reported by then
                self._board.close()

    def progress(self, text):
        """For what takes minutes within a step, between parts of it that may be stopped and resumed as steps are."""
        self._bar.set_postfix_str(text)
        if self._interrupted or time.perf_counter() - self._clock > SAVE_SECONDS:
            self._save()
            self._stop_if_interrupted()

    def _stop_if_interrupted(self):
        if self._interrupted:
            raise UserError(f"Stopped after step {self.step} and saved; the same command with --resume goes on.")

    def graphed(self, update):
        """`update(*key)`, on CUDA replayed as one graph for each key, after three calls that create what it cannot:
        the optimisers' state, the libraries' workspaces, the tensors of `watch`."""
        if self.device.type != "cuda" or not self.args.graph:
            return update
        calls, graphs = collections.Counter(), {}

        def replay(*key):
            calls[key] += 1
            if calls[key] <= 3:
                return update(*key)
            if key not in graphs:
                graphs[key] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[key], stream=torch.cuda.current_stream()):
                    update(*key)  # recorded, not run
            graphs[key].replay()

        return replay

    def watch(self, losses):
        """Once a step, {name: () or (S,) tensor}: keeps the last of each and counts the steps up to the first that is
        not finite. Reads nothing back from the device and writes in place only, so that a CUDA graph can hold it."""
        for name, loss in losses.items():
            if name not in self._losses:
                self._losses[name] = torch.zeros_like(loss)
            self._losses[name].copy_(loss.detach())
        self._finite &= torch.isfinite(sum(losses.values()))
        self._good_steps += self.stride * self._finite

    def due(self, step):
        """True when this step is to be evaluated: so is the last of each phase."""
        if step % self.args.eval_every >= self.stride and step not in (self._switch, self.total):
            return False
        self._check_finite(step)
        self._eval_start = time.perf_counter()
        return True

    def report(self, step, returns, **more):
        """Writes an evaluation to the bar, TensorBoard and the curve, and has the step saved next.

        returns: (episodes,) or (S, episodes); None without an environment. more: beside the losses, () or (S,).
        """
        now = time.perf_counter()
        self.eval_seconds += now - self._eval_start
        values = {**self._losses, **more}
        scalars = {name: value.mean().item() for name, value in values.items()}
        losses = {name: value.tolist() for name, value in values.items()}  # a number, or one for each seed
        point, S = {"step": step, "losses": losses}, len(self.seeds)
        text = ", ".join(f"{name} {value:.3g}" for name, value in scalars.items())
        if returns is not None:
            returns = np.atleast_2d(returns)
            scores = self.data.score(returns).mean(1)  # (S,)
            point |= {"scores": scores.round(3).tolist(), "returns": returns.round(3).tolist()}
            scalars |= {"score": scores.mean(), "return": returns.mean()}
            if S > 1:
                scalars |= {f"score_seed={seed}": score for seed, score in zip(self.seeds, scores)}
            spread = f" ± {scores.std(ddof=1):.1f}" if S > 1 else ""
            text = f"{self.data.task.score_name} {scores.mean():.1f}{spread}"
            text += f", return {returns.mean():.4g}" if self.data.task.ref_min is not None else ""
        if S > 1:
            speed = S * step / (self.seconds + now - self._clock - self.eval_seconds)
            text += f", {speed:.0f} agent-updates/s"
        self.curve.append(point)
        with _writing(self.folder):
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        self._bar.set_postfix_str(text, refresh=False)
        self._save_due = True

    def _check_finite(self, step):
        good, agent = self._good_steps.min(0)
        if good < step - self._checked:
            kept = f"the last good checkpoint is kept in {_short(self.checkpoint)}"
            whose = f" of seed {self.seeds[agent]}" if len(self.seeds) > 1 else ""
            raise UserError(
                f"A loss{whose} stopped being finite at step {self._checked + int(good) + 1}; "
                f"{kept if self.checkpoint.exists() else 'there is no checkpoint yet'}. A lower --lr is the usual cure."
            )
        self._checked = step
        self._good_steps.zero_()

    def _folder(self, data):
        """runs/<algorithm>/<source>/<task>/<seed, seeds and the arguments that are not at their defaults>."""
        name = f"seed={self.args.seed}" + (f",seeds={len(self.seeds)}" if len(self.seeds) > 1 else "") + self._changed()
        task = data.task.name.replace("/", "-")  # a Minari id
        return self.runs / self.algorithm / data.source / task / name

    def _changed(self):
        """`,name=value` of each argument that makes another cell of the table and is not at its default."""
        fields = [field for field in dataclasses.fields(self.args) if field.name not in NOT_OF_THE_CELL]
        defaults = {field.name: field.default for field in fields} | self.defaults
        values = {name: getattr(self.args, name) for name in defaults}
        return "".join(f",{name}={value}" for name, value in values.items() if value != defaults[name])

    def _start_afresh(self):
        with _writing(self.folder):
            if self.folder.exists():  # an earlier run with the same arguments is moved aside: nothing is lost
                number = 1
                while (aside := self.folder.with_name(f"{self.folder.name}~{number}")).exists():
                    number += 1
                self.folder.rename(aside)
            self.folder.mkdir(parents=True)
        return 0

    def _restore(self):
        if not self.checkpoint.exists():
            others = sorted(path.parent.name for path in self.folder.parent.glob("*/checkpoint.pt"))
            hint = f"; there is one of {' and of '.join(others)}" if others else ""
            raise UserError(
                f"Nothing to resume: no checkpoint of {self.folder.name} in {_short(self.folder.parent)}{hint}. "
                "A resume takes the arguments of the run that it continues."
            )
        saved = load_checkpoint(self.checkpoint, self.device)
        theirs = {**saved["args"], "fingerprint": saved["fingerprint"]}
        ours = {**dataclasses.asdict(self.args), "fingerprint": self.data.fingerprint}
        differ = [f"{k} was {theirs.get(k)}" for k in ours if k not in self.free and ours[k] != theirs.get(k)]
        if differ:
            raise UserError(f"Cannot resume {_short(self.checkpoint)} with other arguments: {', '.join(differ)}.")
        if self.total < saved["step"]:
            raise UserError(f"The run already stands at step {saved['step']}; --steps must not be below it.")
        for name, item in self.state.items():
            if isinstance(item, torch.Tensor):
                item.data.copy_(saved["state"][name])
            else:
                item.load_state_dict(saved["state"][name])
        torch.set_rng_state(saved["rng"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"].cpu(), self.device)
        self.curve, self.seconds, self.eval_seconds = saved["curve"], saved["seconds"], saved["eval_seconds"]
        print(f"Resumed {_short(self.checkpoint)} at step {saved['step']}.")
        return saved["step"]

    def _take_over(self):
        """The state, curve and step of the checkpoint that stands for the offline phase."""
        for name, item in self.state.items():
            if name not in self._offline["state"]:
                continue
            theirs = self._offline["state"][name]
            if isinstance(item, torch.Tensor):
                item.data.copy_(theirs)
            elif isinstance(item, torch.optim.Optimizer):
                rates = [group["lr"] for group in item.param_groups]
                item.load_state_dict(theirs)
                for group, rate in zip(item.param_groups, rates):
                    group["lr"] = rate
            else:
                item.load_state_dict(theirs)
        if self._offline["args"].get("seeds", 1) == 1:
            self.curve = self._offline["curve"]
        self.seconds, self.eval_seconds = self._offline["seconds"], self._offline["eval_seconds"]
        return self._offline["step"]

    def _save(self):
        """Replaces the checkpoint by a whole new one, or leaves it as it is."""
        self._check_finite(self.step)
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        checkpoint = {
            "algorithm": self.algorithm,
            "args": dataclasses.asdict(self.args),
            "task": dataclasses.asdict(self.data.task),
            "source": self.data.source,
            "fingerprint": self.data.fingerprint,
            "n_actions": getattr(self.data, "n_actions", 0),
            "step": self.step,
            "state": {k: v.detach() if isinstance(v, torch.Tensor) else v.state_dict() for k, v in self.state.items()},
            "obs_mean": self.data.obs_mean,
            "obs_std": self.data.obs_std,
            "rng": torch.get_rng_state(),
            "curve": self.curve,
            "seconds": self.seconds,
            "eval_seconds": self.eval_seconds,
        }
        if self.device.type == "cuda":
            checkpoint["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        file = io.BytesIO()  # torch.save itself would report a full disk in riddles
        torch.save(checkpoint, file)
        write_whole(self.checkpoint, file.getbuffer())
        self._save_due = False

    def _finish(self):
        """Writes one record for each seed."""
        args, cuda = dataclasses.asdict(self.args), self.device.type == "cuda"
        shared = {
            "args": {name: value for name, value in args.items() if name not in NOT_OF_THE_CELL},
            "commit": code_version(),
            "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
            "versions": {m.__name__: m.__version__ for m in (torch, np, gymnasium, mujoco)},
            "trained_together": len(self.seeds),
            "seconds": round(self.seconds, 1),
            "eval_seconds": round(self.eval_seconds, 1),
            "memory_mb": peak_memory(self.device),
        }
        for agent, seed in enumerate(self.seeds):
            curve = [_point_of(agent, point) for point in self.curve]
            if self._switch:
                curve = [{"step": p["step"], "env_step": max(0, p["step"] - self._switch), **p} for p in curve]
            record = {
                "algorithm": self.algorithm,
                "env": self.data.task.name,
                "source": self.data.source,
                "fingerprint": self.data.fingerprint,
                "eval_env": self.data.task.env_id,
                "steps": self.args.steps,
                "seed": seed,
                "score": curve[-1].get("score"),
                "normalized": self.data.task.ref_min is not None,
                "returns": curve[-1].get("returns"),
                **shared,
                "curve": curve,
            }
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
            places = [self.folder / f"record-seed={seed}.json"]
            if getattr(self.args, "record", False):
                cell = ROOT / "results" / "runs" / self.folder.parent.relative_to(self.folder.parents[3])
                places.append(cell / f"seed={seed}{self._changed()},steps={self.args.steps}.json")
            for place in places:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_whole(place, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
        self._bar.close()
        end = self.curve[-1]
        if "scores" in end:
            spread = f" ± {np.std(end['scores'], ddof=1):.1f} of {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
            score = f"{self.data.task.score_name} {np.mean(end['scores']):.1f}{spread}"
            result = f"{score} over {len(end['returns'][0])} episodes"
        else:
            losses = (f"{name} {np.mean(value):.3g}" for name, value in end["losses"].items())
            result = f"not evaluated, {', '.join(losses)}"
        print(
            f"{self.algorithm} on {self.data.task.name} (source {self.data.source}, {self.total} steps): "
            f"{result}; record, checkpoint and TensorBoard curves in {_short(self.folder)}"
        )

    def _interrupt(self, signum, frame):
        if self._interrupted:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self._interrupted = True


def _point_of(agent, point):
    """What a point of the curve says of one of the agents: step, score, returns, losses, as far as there are."""
    own = {"step": point["step"]}
    if "scores" in point:
        own |= {"score": point["scores"][agent], "returns": point["returns"][agent]}
    if "losses" in point:  # not beside the scores of checkpoints that are older than this line
        each = {name: value[agent] if isinstance(value, list) else value for name, value in point["losses"].items()}
        own["losses"] = {name: float(f"{value:.6g}") for name, value in each.items()}
    return own


def check_arguments(args):
    """UserError where a number that counts something is too small."""
    for field in dataclasses.fields(args):
        value, least = getattr(args, field.name), 0 if field.default == 0 else 1  # a default of 0 allows 0: --seed
        if field.type in (int, int | None) and value is not None and value < least:
            raise UserError(f"--{field.name.replace('_', '-')} must be at least {least}, not {value}.")


def choose_device(name):
    """The torch.device called "auto", "cpu", "cuda" or "cuda:1". UserError where this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"Unknown --device '{name}'; use cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} was asked for, but PyTorch sees no such CUDA device; use --device cpu.")
    return device


def code_version():
    """The commit, with -dirty where Python code differs from it; records and measurements may. In a copy without its
    history the environment variable COMMIT can say it."""
    dirty = _git("diff", "--name-only", "HEAD", "--", "*.py") and "-dirty"
    return (_git("rev-parse", "--short=12", "HEAD") or os.environ.get("COMMIT", "unknown")) + dirty


def keep_freed_memory():
    """Lets glibc keep what is freed: else each update gives megabytes back to the system and faults them in again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def peak_memory(device):
    """Megabytes that this process has held at most: of the GPU's memory on CUDA, of the machine's on a CPU, where it is
    0 on Windows, which is not asked."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) // 2**20
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


@contextlib.contextmanager
def _writing(folder):
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot write into {_short(folder)} ({error.strerror}); what is there stays.") from None


def _short(path):
    try:
        return os.path.relpath(path)
    except ValueError:  # on Windows, it lies on another drive
        return str(path)


def _git(*words):
    try:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # a machine without git
        return ""
