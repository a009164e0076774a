"""Breaks one place of a script's `train` at a time, and lists what its tests let pass: make mutants ALGOS="td3_bc iql".

A change is small and lawful Python: a statement left out, a sign or a comparison turned round, a number or an argument
changed, a target network that is the network itself. With each, tests/test_<script>.py runs in its own process, and
if it passes the general tests of that script. What survives is a hole in the tests, or an equivalent, which EQUIVALENT
names with its reason.

Usage: python tests/mutate.py td3_bc [--show]     --show lists the changes and runs nothing
"""

import ast
import copy
import importlib
import os
import re
import resource
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from datasets import find_task
from datasets.collect import assemble, fingerprint, plan, rollout
from datasets.processes import cores
from datasets.store import write_hdf5
from tests.scripts import SCRIPTS, TRAINED

SUPERVISED = {
    r"^args\.lr -> .* @ lr = ": "the schedule sets it before the first step",
    r"^weight_decay=0\.01 -> left out": "it is AdamW's default",
}
# {regular expression of "was -> became @ line", which the second of equal changes of a line ends in " #2":
# why no test on a CPU can see it}; of all scripts, then of one.
EQUIVALENT = {
    "": {
        r"^(fused|capturable)=": "how fast the optimiser steps, not where to",
        r"^False -> True @ .*requires_grad_\(": "in no optimiser; test_scripts sees that targets have no history",
        r"^inputs=.* need no gradient here": "gradients of other networks are set to zero before their own step",
        r"^(device=|run\.graphed)": "on CUDA alone: test_cuda, test_graph_changes_nothing",
        r"^log_alpha\.detach\(\) -> .*alpha.* = ": "no loss that holds alpha is differentiated with respect to it",
    },
    "sac": {
        r"^loss_(q|pi)\.detach\(\)": "Run.watch detaches what it keeps",
        r"if args\.log_actions else {} -> pass|^log\.earn": "test_log_repeats_the_buffer reads the log",
    },
    "awr": {
        r"^100000 -> 100001": "how many rows go through V at once, for want of memory",
    },
    "bear": {
        r"^args\.sigma -> .* @ if ": "half of it has the same sign",
    },
    "dqn": {
        r"^loss\.detach\(\)": "Run.watch detaches what it keeps",
    },
    "cql": {
        r"^args\.threshold -> ": "half of it has the same sign",
        r"^0 -> 1 @ loss = .* #2": "a number added to the loss has no gradient, and what is watched has not got it",
    },
    "cal_ql": {
        r"^args\.threshold -> ": "half of it has the same sign",
        r"^0 -> 1 @ loss = .* #2": "a number added to the loss has no gradient, and what is watched has not got it",
    },
    "fqe": {r"^1000 -> 1001": "how many resamples an interval is of"},
    "doubly_robust": {r"^args\.truncate -> .* @ if ": "half of it has the same sign"},
    "importance_sampling": {
        r"^args\.truncate -> .* @ (if|raise )": "half of it has the same sign; what is said is a test's",
        r"^20 -> 21": "up to which power of 2 steps are printed, of longer episodes than there are",
    },
    "gail": {
        r"^schedule=": "test_steps_may_grow of test_scripts",
        r"^args\.lr -> .* @ opt = ": "the schedule sets it before the first step",
        r"^-1 -> 1 @ (both|loss_v)": "the last of two axes",
    },
    "gaifo": {
        r"^args\.lr -> .* @ opt = ": "the schedule sets it before the first step",
        r"^-1 -> 1 @ (both|loss_v)": "the last of two axes",
    },
    "f_max": {
        r"^args\.lr -> .* @ opt = ": "the schedule sets it before the first step",
        r"^-1 -> 1 @ (both|loss_v)": "the last of two axes",
    },
    "airl": {
        r"^args\.lr -> .* @ opt = ": "the schedule sets it before the first step",
        r"^-1 -> 1 @ (both|loss_v)": "the last of two axes",
    },
    "bco": {
        r"^-1 -> 1 @ both": "the last of two axes",
        r"^loss_(m|pi)\.detach\(\)": "Run.watch detaches what it keeps",
    },
    "hg_dagger": {
        r"^1\.0 -> 2\.0 @ doubts = ": "any number below 0 stands for a step without a doubt",
    },
    "iql": {
        r"^schedule=": "test_steps_may_grow of test_scripts",
        r"^(1|args\.expectile) -> .* @ (if not 0 <|raise )": "test_bad_expectile of test_scripts",
    },
    "idql": {
        r"^schedule=": "test_steps_may_grow of test_scripts",
        r"^(1|args\.expectile) -> .* @ (if not 0 <|raise )": "test_bad_expectile of test_scripts",
    },
    "mopo": {
        r"^-1 -> 1 @ model_rows = ": "the last of two axes",
        r"^10000 -> 10001": "how many rollouts go side by side, for want of memory",
        r"^if step == 1 -> if True": "a fit that has ended does not go on",
        r"^schedule=": "test_steps_may_grow of test_scripts",
    },
    "rlhf": SUPERVISED
    | {
        r"^args\.beta -> .* @ if ": "half of it has the same sign",
        r"^if step == args\.offline_steps -> if True": "r changes no more after that step, the last that counts",
    },
    "dpo": SUPERVISED | {r"^args\.beta -> .* @ if ": "half of it has the same sign"},
    "rlpd": {r"^loss_(q|pi)\.detach\(\)": "Run.watch detaches what it keeps"},
    "off2on": {
        r"^-1 -> 1 @ return weight": "the last of two axes",
        r"^loss_(q|pi|w)\.detach\(\)": "Run.watch detaches what it keeps",
        r"^args\.threshold -> ": "half of it has the same sign",
        r"^0 -> 1 @ loss = .* #2": "a number added to the loss has no gradient, and what is watched has not got it",
    },
}
LIMIT = 120  # seconds of one change, of a processor; ten times that by the clock, for others may have it
for name in ("results.run", "torch._dynamo", "tyro"):  # what each child would import, here once
    importlib.import_module(name)


class Breaker(ast.NodeTransformer):
    """Makes the change number `wanted` within `train`, or what it calls `supervised`; counts them all."""

    def __init__(self, wanted=-1):
        self.wanted, self.count, self.changed = wanted, 0, None

    def here(self, node, new, text=None):
        """`node`, or what `new()` makes of it if this is the change that is wanted; text: (was, became)."""
        self.count += 1
        if self.count - 1 != self.wanted:
            return node
        was = ast.unparse(node)
        made = ast.copy_location(new(), node)
        self.changed = node.lineno, *(text or (was, ast.unparse(made)))
        return ast.fix_missing_locations(made)

    def statement(self, node):
        node = self.generic_visit(node)
        return self.here(node, ast.Pass)

    visit_AugAssign = statement

    def visit_Expr(self, node):
        node = self.generic_visit(node)
        return node if isinstance(node.value, ast.Constant | ast.Yield) else self.here(node, ast.Pass)

    def visit_If(self, node):
        node = self.generic_visit(node)
        text = f"if {ast.unparse(node.test)}", "if True"
        return self.here(node, lambda: ast.If(ast.Constant(True), node.body, []), text)

    def visit_BinOp(self, node):
        node = self.generic_visit(node)
        turned = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.FloorDiv}
        if type(node.op) not in turned:
            return node
        return self.here(node, lambda: ast.BinOp(node.left, turned[type(node.op)](), node.right))

    def visit_UnaryOp(self, node):
        node = self.generic_visit(node)
        return self.here(node, lambda: node.operand) if isinstance(node.op, ast.USub | ast.Not) else node

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        turned = {ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq}
        turned |= {new: old for old, new in turned.items()}
        if len(node.ops) != 1 or type(node.ops[0]) not in turned:
            return node
        return self.here(node, lambda: ast.Compare(node.left, [turned[type(node.ops[0])]()], node.comparators))

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            return self.here(node, lambda: ast.Constant(not node.value))
        if isinstance(node.value, int | float):
            return self.here(node, lambda: ast.Constant(node.value + 1))
        return node

    def visit_Attribute(self, node):
        node = self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "args" and isinstance(node.ctx, ast.Load):
            half = lambda: ast.parse(f"type({ast.unparse(node)})({ast.unparse(node)} * 0.5)", mode="eval").body
            return self.here(node, half) if self.numeric(node.attr) else node
        return node

    def visit_Call(self, node):
        node = self.generic_visit(node)
        for keyword in list(node.keywords):  # left out, one after the other
            if keyword.arg and getattr(node.func, "id", "") != "dict":
                rest = [other for other in node.keywords if other is not keyword]
                new = lambda node=node, rest=rest: ast.Call(node.func, node.args, rest)
                node = self.here(node, new, (ast.unparse(keyword), "left out"))
        if getattr(node.func, "id", "") == "deepcopy":
            return self.here(node, lambda: node.args[0])
        if getattr(node.func, "attr", "") in ("clamp", "detach", "abs", "amin", "amax", "min", "max"):
            return self.here(node, lambda: node.func.value)
        return node

    def visit_keyword(self, node):
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool):
            other = f"{node.arg}={not node.value.value}"
            new = lambda: ast.keyword(node.arg, ast.Constant(not node.value.value))
            return self.here(node, new, (ast.unparse(node), other))
        return self.generic_visit(node)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and node.id.endswith("_target"):
            return self.here(node, lambda: ast.Name(node.id.removesuffix("_target"), ast.Load()))
        return node


def breaker(source, wanted=-1):
    """The broken module's tree, and the Breaker that has counted, and changed `wanted`."""
    tree, numbers = ast.parse(source), set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            types_ = {field.target.id: ast.unparse(field.annotation) for field in node.body}
            numbers = {name for name, kind in types_.items() if re.match(r"(int|float)\b", kind)}
    one = Breaker(wanted)
    one.numeric = numbers.__contains__
    for i, node in enumerate(tree.body):
        if isinstance(node, ast.FunctionDef) and node.name in ("train", "supervised"):
            tree.body[i] = one.visit(copy.deepcopy(node))
    return tree, one


def changes(script):
    """[(line, was, became, reason it is equivalent or "")] of every change, in order."""
    source = (ROOT / "algorithms" / f"{script}.py").read_text()
    lines, found = source.splitlines(), []
    for wanted in range(breaker(source)[1].count):
        number, was, became = breaker(source, wanted)[1].changed
        text = f"{was} -> {became} @ {lines[number - 1].strip()}"
        equal = sum((number, was, became) == other[:3] for other in found)
        text += f" #{equal + 1}" if equal else ""
        known = EQUIVALENT[""] | EQUIVALENT.get(script, {})
        found.append((number, was, became, next((why for what, why in known.items() if re.search(what, text)), "")))
    return found


def survives(script, wanted):
    """Whether the tests pass, in a child, where algorithms.<script> is broken so."""
    if child := os.fork():
        deadline = time.time() + 10 * LIMIT
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.time() > deadline:  # a loop that never ends is seen, too
                os.kill(child, 9)
                os.waitpid(child, 0)
                return False
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(ended[1]) == 0
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    import algorithms

    source = ROOT / "algorithms" / f"{script}.py"
    module = types.ModuleType(f"algorithms.{script}")
    module.__file__ = str(source)
    sys.modules[module.__name__] = module
    setattr(algorithms, script, module)
    exec(compile(breaker(source.read_text(), wanted)[0], str(source), "exec"), vars(module))
    folder, tests = Path(os.environ["COLLECTED"]).parent, ROOT / "tests"
    words = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--basetemp={folder / str(os.getpid())}"]
    status = pytest.main([*words, str(tests / f"test_{script}.py")])
    if status == 0 and script in TRAINED:
        general = [str(tests / "test_scripts.py"), str(tests / "test_seeds.py")]
        names = "resume_evaluate or do_not_leak or learning_rate"
        status = pytest.main([*words, *general, "-k", f"({names}) and ({script}- or {script}])"])
    os._exit(int(status))


def collect_once(folder):
    """The file of conftest's `collected`, which each child would collect anew."""
    task = find_task("hopper-medium")
    if child := os.fork():  # so that no thread of torch's is started here, where children are forked from
        os.waitpid(child, 0)
    else:
        rows = rollout(task, *plan(task, 20_000)[0])
        write_hdf5(folder / "collected.hdf5", assemble(task, fingerprint(task, plan(task, 20_000)), rows))
        os._exit(0)
    return folder / "collected.hdf5"


def main(scripts, show):
    """Prints each script's survivors; exit status 1 if there is one, or if the tests fail without any change."""
    bad = 0
    for script in scripts:
        found = changes(script)
        tried = [i for i, (*_, why) in enumerate(found) if not why]
        known = f"{len(found)} changes, {len(found) - len(tried)} of them equivalents"
        if show:
            for number, was, became, why in found:
                print(f"{script}.py:{number}: {was} -> {became}" + f"    [{why}]" * bool(why))
            print(f"{script}: {known}")
            continue
        start = time.time()
        if not survives(script, -1):
            print(f"{script}: tests/test_{script}.py fails as it is, or does not exist", flush=True)
            bad += 1
            continue
        with ThreadPoolExecutor(cores()) as pool:
            left = [i for i, alive in zip(tried, pool.map(partial(survives, script), tried)) if alive]
        print(f"{script}: {known}; {len(left)} survive ({time.time() - start:.0f} s)", flush=True)
        for i in left:
            number, was, became, _ = found[i]
            print(f"    {script}.py:{number}: {was} -> {became}", flush=True)
        bad += len(left)
    return bad


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--show"]
    unknown = [word for word in words if word not in SCRIPTS]
    if unknown:
        sys.exit(f"error: there is no script {unknown[0]}; known are {', '.join(SCRIPTS)}.")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COLLECTED"] = str(collect_once(Path(folder)))
        sys.exit(bool(main(words or SCRIPTS, "--show" in sys.argv)))
