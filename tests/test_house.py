"""The house: which module may import which. Arrows go down only, and none leads back."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "datasets.__init__"  # what the package itself offers: `from datasets import load`
# Within datasets/ a module imports modules of later lines only. What has no line stands above all: commands.
LAYERS = [
    {LIBRARY},
    {"datasets.loading"},
    {"datasets.collect"},  # which exports to Minari
    {"datasets.collect_discrete"},
    {"datasets.d4rl", "datasets.minari_io"},
    {"datasets.tasks.dark_room"},
    {"datasets.tasks.text"},
    {"datasets.store"},
    {"datasets.dataset"},
    {"datasets.vector_env"},
    {"datasets.tasks.gridworlds"},
    {"datasets.catalog"},
    {"datasets.tasks.maze2d"},
    {"datasets.tasks.d4rl_envs"},
    {"datasets.tasks.mazes", "datasets.tasks.icu_sepsis", "datasets.tasks.minatar"},
    {"datasets.processes", "datasets.action_log", "datasets.errors"},
]


def modules(root):
    """{name: path} of the modules in datasets/ and results/; a package is called like its file: datasets.__init__."""
    paths = [path for folder in ("datasets", "results") for path in (root / folder).rglob("*.py")]
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}


def imports(path, known):
    """The names among `known`, and algorithms, that the file imports anywhere, in its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from datasets import d4rl` takes a module, `from datasets import load` what the package itself offers.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if {name, f"{name}.__init__"} & known else node.module for name in names]
        else:
            continue
        found |= {name if name in known else f"{name}.__init__" for name in names}
        found |= {"algorithms"} & {name.split(".")[0] for name in names}
    return found & (known | {"algorithms"})


def graph(root=ROOT):
    paths = modules(root)
    return {name: imports(path, set(paths)) for name, path in paths.items()}


def cycle(graph):
    """The modules of a circle, the first one again at its end, or None."""
    done = set()

    def visit(name, way):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := visit(name, []))), None)


def upward(graph):
    """The arrows (from, to) that lead up."""
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    arrows = [(a, b) for a in graph for b in graph[a]]
    commands = {name for name in graph if name.startswith("results.") and "__main__" in modules(ROOT)[name].read_text()}
    wrong = [(a, b) for a, b in arrows if b in level and a in level and level[a] >= level[b]]
    wrong += [(a, b) for a, b in arrows if a in level and b not in level and b.startswith("datasets.")]
    wrong += [(a, b) for a, b in arrows if a.startswith("datasets.") and b.startswith(("results.", "algorithms"))]
    wrong += [(a, b) for a, b in arrows if a == "results.checkpoint" and not b.startswith("datasets.")]
    # --video draws at the end of a run: the one command that a run uses.
    wrong += [(a, b) for a, b in arrows if a == "results.run" and b in commands - {"results.video"} | {"algorithms"}]
    return wrong


def test_imports_go_down_only():
    found = graph()
    assert cycle(found) is None
    assert upward(found) == []
    assert set().union(*LAYERS) <= set(found)


@pytest.mark.parametrize(
    "module, line",
    [
        ("datasets/store.py", "from datasets import d4rl"),
        ("datasets/d4rl.py", "def load():\n    from datasets.loading import load"),
        ("datasets/catalog.py", "import datasets.vector_env"),
        ("datasets/tasks/mazes.py", "from datasets.catalog import Task"),
        ("datasets/dataset.py", "from datasets import UserError"),
        ("results/checkpoint.py", "from results import evaluate"),
        ("results/video.py", "import results.run"),
    ],
)
def test_a_circle_is_found(tmp_path, module, line):
    for name, path in modules(ROOT).items():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text() + ("\n\n" + line + "\n") * (path == ROOT / module))
        assert name in modules(tmp_path)
    assert cycle(graph(tmp_path))


def test_an_arrow_upwards_is_found():
    found = graph()
    for module, other in [
        ("datasets.show", "results.table"),
        ("datasets.catalog", "algorithms"),
        ("datasets.vector_env", "datasets.dataset"),
        ("datasets.store", "datasets.show"),
        ("results.checkpoint", "results.run"),
        ("results.run", "results.evaluate"),
    ]:
        assert (module, other) in upward({**found, module: found[module] | {other}})
