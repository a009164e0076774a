"""What the tables are made of: the records in results/runs/ as cells, and the published scores.

A cell is one algorithm on one task with equal source, fingerprint, steps and arguments; its seeds are averaged, and
nothing else ever is.
"""

import ast
import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.scripts import FAMILIES, SCRIPTS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
BODIES, QUALITIES = ("halfcheetah", "hopper", "walker2d"), ("medium", "medium-replay", "medium-expert")
TASKS = [f"{body}-{quality}" for body in BODIES for quality in QUALITIES]
TENTH = "10% BC"  # bc.py --top-fraction 0.1: a row of its own
LEAST = 100_000  # updates; shorter runs are listed and not compared
# Arguments that a script has got later, with the values that stand for what it did before.
LATER = {"bc": {"demos": 0, "every": 20, "policy": "deterministic"}}
LATER |= {"edac": {"actor_lr": 3e-4}, "sac_n": {"actor_lr": 3e-4}}


@dataclass(frozen=True)
class Cell:
    env: str
    source: str
    script: str  # "td3_bc"
    name: str  # in tables: "TD3+BC"
    changed: tuple  # the arguments that are not at their defaults: ("lr=0.1",)
    steps: int
    fingerprint: str  # of the data
    args: str  # all arguments, as JSON: equal in one cell, also where a default has changed
    records: list  # one a seed

    @property
    def label(self):
        return " ".join((self.name, *self.changed))

    @property
    def scores(self):
        """One a seed; None where the task cannot be evaluated."""
        return [record["score"] for record in self.records]

    @property
    def normalized(self):
        return self.records[0].get("normalized", True)

    @property
    def family(self):
        return SCRIPTS[self.script].family

    @property
    def place(self):
        """Where the algorithm stands among others: by family, then in the order of tests/scripts.py."""
        return FAMILIES.index(self.family), list(SCRIPTS).index(self.script), self.name == TENTH


def display_name(script):
    """What stands before the first colon of a script's docstring: "TD3+BC" of td3_bc."""
    return ast.get_docstring(ast.parse((ROOT / "algorithms" / f"{script}.py").read_text())).split(":")[0]


def read_cells(runs=RESULTS / "runs"):
    """All cells, in the order of every table: by task, the nine first, then by source and algorithm."""
    groups, names = defaultdict(list), {script: display_name(script) for script in SCRIPTS}
    for path in sorted(runs.rglob("*.json")):
        record = json.loads(path.read_text())
        script = record["algorithm"]
        if script not in SCRIPTS:
            raise SystemExit(f"error: {path.name} is a record of {script}.py, which has no row in tests/scripts.py.")
        # The file's name holds the arguments that are not at their defaults: seed=0,alpha=1.0,steps=200000.json
        unchanging = ("seed=", "steps=", "eval_every=")  # how often it is evaluated changes no update
        changed = tuple(word for word in path.stem.split(",") if not word.startswith(unchanging))
        name = names[script]
        if script == "bc" and changed == ("top_fraction=0.1",):
            name, changed = TENTH, ()
        args = LATER.get(script, {}) | {key: x for key, x in record["args"].items() if key != "eval_every"}
        args = json.dumps(args, sort_keys=True)
        key = record["env"], record["source"], script, name, changed, record["steps"], record["fingerprint"], args
        groups[key].append(record)
    cells = [Cell(*key, records) for key, records in groups.items()]
    task = lambda env: (TASKS.index(env) if env in TASKS else len(TASKS), env)
    return sorted(cells, key=lambda c: (task(c.env), c.source, c.place, c.changed, c.steps, c.fingerprint, c.args))


def compared(cells, least=LEAST):
    """Those that tables compare: the nine tasks, published arguments, at least `least` updates, never acting.

    Where a cell was run on several versions of its data or of the defaults, it is the one with the most seeds.
    """
    chosen = {}
    for cell in cells:
        if cell.env in TASKS and not cell.changed and cell.steps >= least and not SCRIPTS[cell.script].acts:
            key = cell.env, cell.source, cell.steps, cell.name
            if key not in chosen or len(cell.records) >= len(chosen[key].records):
                chosen[key] = cell
    return list(chosen.values())


def grouped(cells, *fields):
    """{values of the fields: cells}, in their order. What differs in source or updates never shares a table."""
    groups = defaultdict(list)
    for cell in cells:
        groups[tuple(getattr(cell, field) for field in fields)].append(cell)
    return {key: groups[key] for key in sorted(groups)}


def read_published():
    """(algorithm, task) -> the published score, and (algorithm, task, updates) -> what a published curve has after so
    many updates; each a row of its file: mean, std, source, note.
    """
    rows = {}
    for name in ("reference.csv", "published_curves.csv"):
        with (RESULTS / name).open() as lines:
            for row in csv.DictReader(lines):
                updates = (int(row["updates"]),) if "updates" in row else ()
                rows[row["algorithm"], row["env"], *updates] = row
    return rows
