"""The house: what DESIGN asks of every script, and the text that scripts repeat on purpose."""

import ast
import difflib
import re
import subprocess
from functools import cache

import pytest
from conftest import ROOT

from tests.scripts import FAMILIES, SCRIPTS, TRAINED

PATHS = sorted((ROOT / "algorithms").glob("*.py"))
SOURCES = {path.stem: path.read_text() for path in PATHS}
TUNED = tuple(name for name in SOURCES if "\nTUNED = {" in SOURCES[name])
LIFTED = tuple(name for name in SOURCES if "def lift(" in SOURCES[name])
MODEL_BASED = ("mopo", "morel", "combo")  # with one dynamics ensemble, and one fit of it
ALLOWED = {"datasets", "results.run", "results.policies"}  # what a script may import from this repository


@cache
def pieces(name):
    """Name of each class and function at the top of a script -> its source."""
    lines = SOURCES[name].splitlines()
    return {
        node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(SOURCES[name]).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }


def within(name):
    """The functions in `train` of a script."""
    (train,) = (node for node in ast.parse(SOURCES[name]).body if getattr(node, "name", "") == "train")
    return [node for node in train.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", SOURCES)
def test_order(name):
    """Docstring, imports, Args, TUNED where there is one, networks, policy and losses of an agent, train, main."""
    source = SOURCES[name]
    marks = [
        '"""',
        "\nimport ",
        "\nsys.path.insert(0, str(Path(__file__).resolve().parent.parent))\n",
        "\n@dataclass\nclass Args",
    ]
    marks += ["\nTUNED = {"] if name in TUNED else []
    if name not in SCRIPTS or SCRIPTS[name].agent:
        marks += [
            "\nclass Actor(" if "\nclass Actor(" in source else "\nclass Critic(",  # which acts if discrete
            "\ndef policy(",
            "\ndef losses(" if "\ndef losses(" in source else "_loss(",
        ]
    marks += ["\ndef train(args):"]
    marks += ['\nif __name__ == "__main__":\n    train(tyro.cli(Args))\n']
    places = [source.find(mark) for mark in marks]
    assert -1 not in places and places == sorted(places)
    assert source.endswith(marks[-1])
    assert source.count("sys.path") == 1


@pytest.mark.parametrize("name", SOURCES)
def test_docstring_and_length(name):
    docstring = ast.get_docstring(ast.parse(SOURCES[name]))
    assert len(docstring.splitlines()) <= 14
    assert f"python algorithms/{name}.py" in docstring and "arXiv" in docstring
    assert ":" in docstring.splitlines()[0]  # before it stands the name for tables
    if name in SCRIPTS:  # else test_table says what to do
        assert len(SOURCES[name].splitlines()) <= SCRIPTS[name].lines
        assert SCRIPTS[name].family in FAMILIES


@pytest.mark.parametrize("name", SOURCES)
def test_imports(name):
    own = set()
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (
            "datasets",
            "results",
            "algorithms",
            "tests",
        ):
            own.add(node.module)
    assert own <= ALLOWED


@pytest.mark.parametrize("name", SOURCES)
def test_arguments_are_explained(name):
    """Each argument has a comment, which --help shows; only those that every reader knows go without."""
    body = pieces(name)["Args"].splitlines()[1:]
    known = {"seed", "batch_size", "lr", "eval_every", "eval_episodes", "buffer_size"}
    for line in body:
        field, comment = re.fullmatch(r"    (\w+): [^#]*(#.*)?", line).groups()
        assert comment or field in known, line


# Pieces of the standing scripts that differ from those of others with the same docstring.
VARIANTS = {
    "Actor": ("rebrac", "sac_n", "edac"),
    "Critic": ("awac", "rebrac"),
    "policy": ("bco", "cal_ql", "combo", "cql", "rlpd", "sac"),
}


@cache
def docstring_of(text):
    return ast.get_docstring(ast.parse(text).body[0])


def with_relu(text):
    return re.sub(r"nn\.(?!ReLU|Linear|Sequential)\w+\(\)", "nn.ReLU(inplace=True)", text)


@pytest.mark.parametrize("name", SOURCES)
def test_what_says_the_same_is_the_same(name):
    """A class or function of the same name and docstring as another script's is that to the letter, so that a reader
    need read it once: what differs says so in its docstring."""
    for piece, text in pieces(name).items():
        for other in SOURCES:
            theirs = pieces(other).get(piece)
            if theirs is None or {name, other} & set(VARIANTS.get(piece, ())):
                continue
            if piece in ("mlp", "stack", "lift"):  # an mlp has the activation that its paper has
                assert with_relu(text) == with_relu(theirs), f"{piece} of {name}.py and {other}.py differ"
            elif (says := docstring_of(text)) and says == docstring_of(theirs):
                assert text == theirs, (
                    f"{piece} of {name}.py and {other}.py: the same docstring, but another text; say what differs"
                )


def test_same_text():
    """And these are the same whatever their docstrings say, or in part."""
    squashed = ("offline_sac", "sac_n", "edac")
    for name, scripts in [
        ("Actor", ("bc", "td3_bc", "dagger", "safe_dagger")),
        ("Actor", ("sac_n", "edac")),
        ("Actor", ("offline_sac", "mopo", "morel")),
        ("Actor", ("cql", "combo")),
        ("policy", ("bc", "td3_bc", "rebrac", "dagger", "safe_dagger")),
        ("actor_loss", ("bc", "dagger", "safe_dagger")),
        ("actor_loss", ("hg_dagger", "ensemble_dagger")),
        ("policy", ("iql", "awac")),
        ("policy", (*squashed, "mopo", "morel")),
        ("EnsembleLinear", ("sac", "iql", "awac", "rebrac", "mopo", *squashed)),
        ("Critic", ("sac", "iql", "offline_sac", "mopo", "morel")),
        ("critic_loss", ("mopo", "morel")),
        *((piece, MODEL_BASED) for piece in ("EnsembleLinear", "Dynamics", "held_out", "outcome", "model_loss")),
        ("model_error", MODEL_BASED),
        ("Critic", ("sac_n", "edac")),
        ("critic_loss", ("dqn", "offline_dqn")),
        ("vae_loss", ("bcq", "bear")),
    ]:
        assert len({pieces(script)[name] for script in scripts}) == 1, name
    for function in ("update_model", "fit_model"):
        texts = {ast.unparse(node) for name in MODEL_BASED for node in within(name) if node.name == function}
        assert len(texts) == 1, function
    assert len({SOURCES[name].split("\nNETWORKS, ")[1].split("\n\n")[0] for name in MODEL_BASED}) == 1
    ends = [pieces(name)["Actor"].split("log_std.clamp(")[1].split("\n", 1)[1] for name in ("sac", *squashed)]
    assert len(set(ends)) == 1
    density = "# log N(u) - log |d tanh(u) / du|"
    lines = [SOURCES[name].split(density)[1].splitlines()[:2] for name in ("sac", "cql")]
    assert len({"\n".join(line.strip() for line in two) for two in lines}) == 1
    tuned = [SOURCES[name].split("\nTUNED = {")[1] for name in TUNED]
    assert all(text.startswith('  # "" for all tasks, then by family, then by task: ') for text in tuned)
    for name in ("EnsembleLinear", "Critic"):  # TD3+BC's can compute the first Q-function alone, and say so
        made = [pieces(script)[name].split("def __init__")[1].split("def forward")[0] for script in ("sac", "td3_bc")]
        assert made[0] == made[1], name
    fields = [dict(re.findall(r"    (\w+): (.*)", pieces(name)["Args"])) for name in SOURCES]
    for field in (
        "seed",
        "seeds",
        "graph",
        "batch_size",
        "lr",
        "gamma",
        "tau",
        "eval_every",
        "eval_episodes",
        "device",
        "resume",
        "record",
        "video",
    ):
        texts = {re.sub(r" = [^#]*", "", args[field]) for args in fields if field in args}  # type and comment
        assert len({text for text in texts if "None" not in text}) == 1, (field, texts)  # None: TUNED has it
    alike = [name for name in LIFTED if name in TRAINED]
    alike = [name for name in alike if "\nclass Rollout" not in SOURCES[name]]  # which are given rewards, too
    alike = [name for name in alike if "\n    members: int" not in SOURCES[name]]  # which are one agent in the end
    assert len({SOURCES[name].split("        if run.due(step):\n")[1] for name in alike}) == 1
    for name in ("pad", "log_weights", "estimate", "interval", "Behaviour", "estimated"):
        assert pieces("importance_sampling")[name] == pieces("doubly_robust")[name], name


SISTERS = [("sac_n", "edac", 30), ("iql", "xql", 40), ("iql", "sql", 40), ("iql", "idql", 110)]
SISTERS += [("offline_dqn", "discrete_bcq", 40), ("offline_dqn", "discrete_cql", 50)]
SISTERS += [("dagger", "hg_dagger", 50), ("dagger", "safe_dagger", 40), ("dagger", "ensemble_dagger", 30)]
SISTERS += [("gail", "gaifo", 20), ("gail", "f_max", 10), ("gail", "airl", 60)]
SISTERS += [("diffuser", "decision_diffuser", 170)]
SISTERS += [("mopo", "morel", 90), ("mopo", "combo", 180)]
SISTERS += [("iql", "iql_finetune", 100), ("awac", "awac_finetune", 100), ("cql", "cal_ql", 140)]


@pytest.mark.parametrize("elder, younger, most", SISTERS)
def test_sisters(elder, younger, most):
    """Docstring and TUNED aside, the difference of two scripts is the younger one's paper."""
    texts = []
    for name in (elder, younger):
        before, tuned, rest = SOURCES[name].split('"""', 2)[2].partition("\nTUNED = {")
        texts.append((before + (rest.split("\n}\n", 1)[1] if tuned else "")).splitlines())
    changed = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    assert len(changed) <= most


@pytest.mark.parametrize("name", LIFTED)
def test_lines_that_speed_costs(name):
    """Seeds and graphs: two functions, and whatever else in the script speaks of them."""
    own = [line for piece in ("stack", "lift") for line in pieces(name)[piece].splitlines() if line.strip()]
    words = r"(?<!torch\.)\b(stack|lift|graph|graphed|partial|functional_call|seeds|capturable)\b"
    others = [line for line in SOURCES[name].splitlines() if re.search(words, line) and line not in own]
    assert 10 < len(own) + len(others) <= (38 if "Dynamics" in pieces(name) else 30)  # a model is trained, too


def test_readme_is_true():
    """Every script and every Makefile target is in the README or in `make help`, and each path it links to exists."""
    readme = (ROOT / "README.md").read_text()
    for path in PATHS:
        assert f"| [{path.name}](algorithms/{path.name}) | {len(path.read_text().splitlines())} |" in readme
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    for target in (
        "install",
        "quickstart",
        "test",
        "test-slow",
        "lint",
        "datasets",
        "results",
        "bench",
        "bench-peers",
        "policies",
        "clean",
    ):
        assert re.search(rf"^{target}\s", shown, re.MULTILINE), target
