"""The README's "Add an algorithm", followed to the letter in a copy of the project."""

import shutil

import pytest
import test_scripts
from conftest import ROOT, start

from tests.scripts import SCRIPTS


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    skipped = shutil.ignore_patterns("__pycache__")
    for folder in ("algorithms", "datasets", "results", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=skipped)
    for name in ("README.md", "Makefile", "LICENSE", "CITATION.cff", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    return root


def change(path, *pairs):
    """Each (old, new) once."""
    text = path.read_text()
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


def test_made_up_script(project, small):
    """A copy of td3_bc.py with a docstring and a constant of its own, and its row in tests/scripts.py: the general
    tests find it and pass, and every table has it."""
    path = project / "algorithms" / "made_up.py"
    shutil.copy(project / "algorithms" / "td3_bc.py", path)
    first, usage = path.read_text().splitlines()[0], "python algorithms/td3_bc.py"
    name = '"""Made-Up: A Paper That Nobody Wrote (Nobody 2030), arXiv:3001.00001.'
    change(path, (first, name), (usage, "python algorithms/made_up.py"), ("alpha: float = 2.5", "alpha: float = 3.5"))
    row = '    "made_up": Script("policy constraint", 190),\n'
    change(project / "tests" / "scripts.py", ('    "rebrac"', f'{row}    "rebrac"'))

    words = "--env", small, "--steps", 20, "--eval-every", 20, "--eval-episodes", 1, "--record"
    for command in (["algorithms/made_up.py", *words], ["results/table.py"]):
        process = start(*command, cwd=project)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert "| [made_up.py](algorithms/made_up.py) | 188 | Made-Up: A Paper" in (project / "README.md").read_text()
    assert "Made-Up" in (project / "results" / "README.md").read_text()

    files = ("tests/test_anatomy.py", "tests/test_scripts.py", "tests/test_seeds.py")
    chosen = "made_up or test_table or readme_is_true or help_from_anywhere"
    process = start("-m", "pytest", "-vv", "-p", "no:cacheprovider", *files, "-k", chosen, cwd=project)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    for test in (
        "test_anatomy.py::test_order[made_up]",
        "test_anatomy.py::test_what_says_the_same_is_the_same[made_up]",
        "test_anatomy.py::test_readme_is_true",
        "test_scripts.py::test_table",
        "test_scripts.py::test_train_stop_resume_evaluate[made_up-1]",
        "test_scripts.py::test_train_stop_resume_evaluate[made_up-2]",
        "test_scripts.py::test_help_from_anywhere",
        "test_seeds.py::test_seeds_do_not_leak[made_up]",
    ):
        assert f"{test} PASSED" in out, out


def test_script_without_a_row(monkeypatch):
    """And a row without its script: one test fails, and says what to do."""
    with (
        monkeypatch.context() as patch,
        pytest.raises(AssertionError, match="made_up.py has no row in tests/scripts.py: "),
    ):
        patch.setattr(test_scripts, "FOUND", [*test_scripts.FOUND, "made_up"])
        test_scripts.test_table()
    monkeypatch.setitem(SCRIPTS, "made_up", SCRIPTS["td3_bc"])
    with pytest.raises(AssertionError, match="there is no algorithms/made_up.py: remove it"):
        test_scripts.test_table()
