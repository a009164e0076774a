import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, start

from results import bench, run, table
from results.tables import agreement, curves, imitation, interactive, records, runs, scores, speed, summary
from results.tables.records import compared, read_cells, read_published
from tests.scripts import SCRIPTS, Script

FILES = [
    "README.md",
    "results/README.md",
    "datasets/README.md",
    "results/learning_curves.png",
    "results/interactive.png",
]


def copy_of_the_project(root):
    root.mkdir()
    subprocess.run(["cp", "-r", "README.md", "algorithms", "datasets", "results", root], cwd=ROOT, check=True)
    (root / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "scripts.py", root / "tests")
    return root


def test_the_same_bytes(tmp_path):
    """Tables and figures made twice, in two copies, from the same records; the tables are those committed."""
    roots = [copy_of_the_project(tmp_path / name) for name in "ab"]
    for process in [start("results/table.py", cwd=root) for root in roots]:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    made = [[(root / file).read_bytes() for file in FILES] for root in roots]
    assert made[0] == made[1]
    assert made[0][:3] == [(ROOT / file).read_bytes() for file in FILES[:3]]


def write(folder, name, **changes):
    record = {
        "algorithm": "td3_bc",
        "env": "hopper-medium",
        "source": "collected",
        "fingerprint": "f0",
        "steps": 1000,
        "seed": 0,
        "score": 10.0,
        "returns": [300.0, 310.0],
        "args": {"lr": 3e-4},
        "commit": "c0",
        "device": "cpu",
        "seconds": 60.0,
        "curve": [{"step": 1000, "score": 10.0, "returns": [300.0, 310.0]}],
        **changes,
    }
    path = (
        folder
        / "runs"
        / record["algorithm"]
        / record["source"]
        / record["env"]
        / f"{name},steps={record['steps']}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def cells_in(folder):
    return read_cells(folder / "runs")


def tables_in(text):
    """Each Markdown table of a page as [[the cells of a row]], its head and rule first."""
    tables, last = [], None
    for line in text.splitlines():
        if line.startswith("|"):
            tables += [] if last else [[]]
            tables[-1].append([part.strip() for part in line.strip("|").split("|")])
        last = line.startswith("|")
    return tables


def test_cells(folder):
    """Seeds of equal everything are averaged; another source, fingerprint, length or argument is another row."""
    write(folder, "seed=0", seed=0, score=10.0)
    write(folder, "seed=1", seed=1, score=14.0)
    write(folder, "seed=2", seed=2, score=90.0, fingerprint="f1")
    write(folder, "seed=3,lr=0.1", seed=3, score=91.0, args={"lr": 0.1})
    write(folder, "seed=4", seed=4, score=92.0, steps=2000)
    write(folder, "seed=5", seed=5, score=93.0, source="d4rl")
    write(folder, "seed=6", seed=6, score=94.0, args={"lr": 1e-4})  # the default was another one then
    write(folder, "seed=0,top_fraction=0.1", algorithm="bc", score=20.0)
    write(folder, "seed=0", algorithm="awr", score=30.0)
    text = runs.cells_table(cells_in(folder), read_published())
    lines = [line for line in text.splitlines() if line.startswith("| hopper")]
    assert "| hopper-medium | AWR | 30.0 | 1 | 1,000 | collected | 17.4 |" in lines  # published without a deviation
    assert "| hopper-medium | TD3+BC | 12.0 ± 2.8 | 2 | 1,000 | collected | 60.4 ± 3.5 |" in lines
    assert "| hopper-medium | 10% BC | 20.0 | 1 | 1,000 | collected | 55.5 ± 7.3 |" in lines
    assert "| hopper-medium | TD3+BC lr=0.1 | 91.0 | 1 | 1,000 | collected |  |" in lines
    assert len(lines) == 8


def test_a_record_of_an_unknown_script(folder):
    write(folder, "seed=0", algorithm="nobody")
    with pytest.raises(SystemExit, match="is a record of nobody.py, which has no row in tests/scripts.py"):
        cells_in(folder)


def test_grid(folder):
    """Algorithms by family; no other arguments or tasks; the deviation over seeds, and the published scores: the last,
    and what a published curve has after as many updates, if there is one."""
    write(folder, "seed=0", seed=0, score=20.0)
    write(folder, "seed=1", seed=1, score=24.0)
    write(folder, "seed=0,lr=0.1", seed=0, score=99.0)
    write(folder, "seed=0", algorithm="bc", env="stitch-gap", score=1.0)
    write(folder, "seed=0", algorithm="bc", env="halfcheetah-medium", score=2.0)
    write(folder, "seed=0", algorithm="gail", score=98.0)  # which acts while it learns
    cells = compared(cells_in(folder), least=1000)
    assert not compared(cells_in(folder))  # none has 100,000 updates
    published = read_published() | {("TD3+BC", "hopper-medium", 1000): {"mean": "7.25"}}
    lines = scores.grid(cells, published).splitlines()
    heads = [part.strip() for part in lines[0].strip("|").split("|")]
    assert heads[0] == "<sub>algorithm</sub>" and heads[10] == "<sub>mean</sub>" and len(heads) == 11
    assert heads[1] == "<sub>half-<br>cheetah<br>medium</sub>" and heads[5] == "<sub>hopper<br>medium<br>replay</sub>"
    assert lines[2:] == [
        "| <sub>**imitation**</sub> |" + "  |" * 10,
        "| BC<br><sub>± seeds</sub><br><sub>published</sub> | 2.0<br><sub></sub><br><sub>42.4</sub> |" + "  |" * 9,
        "| <sub>**policy constraint**</sub> |" + "  |" * 10,
        "| TD3+BC<br><sub>± seeds</sub><br><sub>then</sub><br><sub>published</sub> |  |  |  "
        "| 22.0<br><sub>±2.8 2 seeds</sub><br><sub>7.2</sub><br><sub>60.4</sub> |" + "  |" * 6,
    ]
    assert scores.caption(cells) == "1,000 updates, collected data, 1 seed where no other number is given"


def test_mean_of_all_nine(folder):
    for i, env in enumerate(records.TASKS):
        write(folder, "seed=0", env=env, score=float(i))
        if i < 8:
            write(folder, "seed=0", algorithm="iql", env=env)
    lines = scores.grid(compared(cells_in(folder), least=0), read_published()).splitlines()
    assert lines[3].startswith("| TD3+BC") and lines[3].endswith("| 4.0<br><sub></sub><br><sub>76.4</sub> |")
    assert lines[5].startswith("| IQL") and lines[5].endswith("|  |")


def test_unequal_updates_and_sources_share_no_table(folder):
    """Nor do they share a mean, an order, or a panel; one algorithm alone is no comparison."""
    algorithms = "bc", "td3_bc", "iql"
    for i, (source, steps) in enumerate([("collected", 100_000), ("collected", 200_000), ("d4rl", 100_000)]):
        for j, algorithm in enumerate(algorithms):
            score = 100.0 * i + j
            write(folder, "seed=0", algorithm=algorithm, source=source, steps=steps, score=score, returns=[score])
    write(folder, "seed=0", algorithm="iql", steps=300_000, score=900.0)
    cells, published = cells_in(folder), read_published()
    assert list(scores.comparisons(cells)) == [("collected", 100_000), ("collected", 200_000), ("d4rl", 100_000)]
    expected = [["0.0", "1.0", "2.0"], ["100.0", "101.0", "102.0"], ["200.0", "201.0", "202.0"]]
    text = scores.table(cells, published, [])
    own = [[row[4].split("<br>")[0] for row in rows[2:] if row[4]] for rows in tables_in(text)]
    assert own == expected
    assert re.findall(r"\*\*(\d.*)\*\*", text) == [
        "100,000 updates, collected data, 1 seed",
        "200,000 updates, collected data, 1 seed",
        "100,000 updates, d4rl data, 1 seed",
    ]
    page = table.comparisons(cells, published)
    assert page.count("### ") == 4 and "### 300,000 updates, collected data, 1 seed\n" in page
    assert page.count("- hopper-medium") == 3
    for text in (page, runs.cells_table(cells, published)):
        for head, _, *rows in tables_in(text):
            if "updates" in head:
                columns = [head.index("updates"), head.index("data")]
                assert len({tuple(row[column] for column in columns) for row in rows}) == 1
    assert len(tables_in(runs.runs_table(cells))) == 2  # a list of runs: by source


def test_a_new_algorithm(folder, monkeypatch):
    """Its script and its row in tests/scripts.py are all that tables and curves need; its name is its docstring's."""
    shutil.copytree(ROOT / "algorithms", folder / "algorithms")
    (folder / "algorithms" / "rnd.py").write_text('"""SAC-RND: Anti-Exploration by RND: a paper, arXiv:0."""\n')
    monkeypatch.setattr(records, "ROOT", folder)
    monkeypatch.setitem(SCRIPTS, "rnd", Script("pessimism", 100))
    for algorithm in ("td3_bc", "iql", "rnd"):
        write(folder, "seed=0", algorithm=algorithm, steps=100_000)
    cells = cells_in(folder)
    assert [cell.name for cell in cells] == ["TD3+BC", "SAC-RND", "IQL"]  # by family
    text = scores.table(cells, read_published(), [])
    assert "| <sub>**pessimism**</sub> |" in text
    assert "| SAC-RND<br><sub>± seeds</sub> |" in text  # nothing is published
    assert "| SAC-RND | collected | 100,000 | 1 | 1 | 10.0 |  |" in summary.table(compared(cells))
    assert "| hopper-medium | SAC-RND |" in runs.cells_table(cells, read_published())
    assert "| hopper-medium | SAC-RND |" in runs.runs_table(cells)
    curves.draw(compared(cells), read_published(), folder / "curves.png")


def test_names_are_those_of_the_docstrings():
    """All differ, and are those of the published scores, where there are any."""
    names = [records.display_name(script) for script in SCRIPTS]
    assert len(set(names)) == len(names) and all(0 < len(name) < 24 for name in names)
    assert (names[0], records.display_name("offline_sac"), records.display_name("sac")) == ("BC", "Offline SAC", "SAC")
    assert {name for name, *_ in read_published()} <= {*names, records.TENTH}


def test_imitation(folder):
    """Shares of the mean return of the data that the demonstrations come from; other runs are not there."""
    gail = {"algorithm": "gail", "env": "hopper-expert", "steps": 8000, "args": {"demos": 4}}
    write(folder, "seed=0", **gail, returns=[2000.0, 3000.0])
    write(folder, "seed=1", **gail, seed=1, returns=[1000.0, 2000.0])
    write(folder, "seed=0,demos=4,lr=0.1", **gail | {"algorithm": "bc"}, returns=[0.0])
    write(folder, "seed=0,demos=4", **gail | {"algorithm": "bc"}, returns=[0.0], fingerprint="unknown")
    write(folder, "seed=0", algorithm="bc", env="hopper-expert", args={"demos": 0})
    lines = imitation.table(cells_in(folder), {}, [{"fingerprint": "f0", "mean": 4000.0}]).splitlines()
    assert lines[2:] == [
        "| 4 of hopper-expert (collected) | BC lr=0.1 | 0.0 | 4000 | 0% | 1 x 8,000 |",
        "| 4 of hopper-expert (collected) | GAIL | 2000.0 ± 707.1 | 4000 | 50% | 2 x 8,000 |",
    ]


def test_interactive(folder):
    """Means over seeds of the score, and of what the expert was asked for; runs that asked nobody are not there."""
    run = {"algorithm": "dagger", "env": "hopper-expert", "source": "online", "steps": 4000}
    for seed, labels in enumerate((1000.0, 3000.0)):
        end = {"step": 4000, "score": 1.0, "losses": {"labels": labels, "takeovers": 5.0, "falls": seed}}
        write(folder, f"seed={seed}", seed=seed, score=80.0 + seed, curve=[{"step": 1, "losses": {}}, end], **run)
    write(folder, "seed=0", algorithm="bc", env="hopper-expert")
    lines = interactive.table(cells_in(folder), {}, []).splitlines()
    assert lines[2:] == ["| hopper-expert | DAgger | 80.5 ± 0.7 | 2,000 | 5 | 0 | 2 x 4,000 |"]


def test_interactive_picture(folder, monkeypatch):
    """The mean over seeds after each round, each seed's end; of an expert's cells those that are longest."""
    run = {"algorithm": "dagger", "env": "hopper-expert", "source": "online"}
    for seed in (0, 1):
        losses = [{"labels": 10.0 * k + seed, "takeovers": 1.0, "falls": k} for k in (1, 2)]
        curve = [{"step": 2000 * k, "score": 10.0 * k + 2 * seed, "losses": losses[k - 1]} for k in (1, 2)]
        write(folder, f"seed={seed}", seed=seed, steps=4000, curve=curve, **run)
    write(folder, "seed=0,decay=1.0", steps=2000, curve=curve[:1], **run)
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axis, x, y, *words, **style: drawn.append((*x, *y)))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axis, **style: None)
    interactive.draw(cells_in(folder), folder / "interactive.png")
    assert drawn == [(10.5, 20.5, 11, 21), (20, 21, 20, 22), (1, 2, 11, 21), (2, 2, 20, 22)]
    assert (folder / "interactive.png").stat().st_size > 1000


def test_summary(folder):
    """Eight runs on two tasks: the mean without the lowest and highest quarter; the interval draws seeds per task."""
    for seed, score in enumerate((1.0, 2.0, 3.0, 100.0)):
        write(folder, f"seed={seed}", seed=seed, score=score)
        write(folder, f"seed={seed}", seed=seed, score=50.0, env="walker2d-medium")
    write(folder, "seed=0", algorithm="bc", score=7.0)
    lines = summary.table(cells_in(folder)).splitlines()[2:]
    assert lines[0] == "| BC | collected | 1,000 | 1 | 1 | 7.0 |  |"
    middle = (3 + 50 + 50 + 50) / 4
    assert lines[1].startswith(f"| TD3+BC | collected | 1,000 | 2 | 8 | {middle:.1f} | ")
    low, high = map(float, lines[1].split(" | ")[-1].strip(" |").split(" to "))
    assert 25 <= low < middle < high == (50 + 50 + 50 + 100) / 4  # three or four draws of 100: 5 % of the samples


def test_rank_agreement(folder):
    for algorithm, score in (("bc", 3.0), ("td3_bc", 1.0), ("iql", 2.0)):  # published: BC 53.5, TD3+BC 60.4, IQL 67.5
        write(folder, "seed=0", algorithm=algorithm, score=score)
        write(folder, "seed=0", algorithm=algorithm, score=score if algorithm != "bc" else 0.0, env="walker2d-medium")
    write(folder, "seed=0", algorithm="bc", env="halfcheetah-medium")
    write(folder, "seed=0", algorithm="bcq", score=1.5)  # its published last score, 52.5, is of v0's hopper-medium
    then = {"BC": "3", "TD3+BC": "1", "IQL": "2"}  # after 1,000 updates, on hopper-medium alone
    then = {(name, "hopper-medium", 1000): {"mean": mean, "note": "v0 data"} for name, mean in then.items()}
    lines = agreement.lines(cells_in(folder), read_published() | then).splitlines()
    assert lines == [
        "- hopper-medium (collected): after 1,000 updates 1.00, of TD3+BC, IQL, BC; last -0.50, of TD3+BC, IQL, BC",
        "- walker2d-medium (collected): last 0.50, of BC, TD3+BC, IQL",
        "- mean (collected): after 1,000 updates 1.00 of 1 task; last 0.00 of 2 tasks",
    ]


def test_curves_of_cells(folder):
    for seed in range(2):
        write(folder, f"seed={seed}", seed=seed)
    curves.draw(cells_in(folder), read_published(), folder / "learning_curves.png")
    assert Path(folder / "learning_curves.png").stat().st_size > 1000
    curves.draw([], read_published(), folder / "none.png")
    assert not (folder / "none.png").exists()


def test_fill():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert table.fill(text, "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    with pytest.raises(SystemExit, match="0 places"):
        table.fill(text, "y", "new")


def test_published_scores_have_sources():
    rows = read_published()
    assert sum(len(key) == 2 for key in rows) == 15 * 9  # algorithms x tasks
    assert sum(len(key) == 3 for key in rows) == 8 * 9 * 7 - 3 * 9  # x updates, of DT up to 50,000
    assert all(row["source"] and row["note"].startswith(("v0 data", "v2 data")) for row in rows.values())


def test_speed_tables(tmp_path, monkeypatch):
    """The latest measurement of each script on each device."""
    row = {"script": "bc", "seeds": 1, "updates": 10, "updates_per_s": 5.0, "agent_updates_per_s": 5.0}
    row |= {"memory_mb": 100, "evaluation_s": 0.5, "evaluation_share": 0.1}
    monkeypatch.setattr(bench, "FILE", tmp_path / "bench.json")
    bench.FILE.write_text("[]")
    lifted, plain = row | {"seeds": 16}, {"script": "bc", "seeds": 16, "way": "one thread each"}
    rows = [plain | {"updates_per_s": 2.0, "agent_updates_per_s": 32.0}, lifted]
    bench.append({"kind": "scripts", "device": "H200", "commit": "gpu", "rows": rows})
    bench.append({"kind": "scripts", "device": "cpu", "commit": "old", "rows": [row]})
    bench.append({"kind": "scripts", "device": "cpu", "commit": "new", "rows": [row | {"updates_per_s": 1234.5}]})
    ratios = [{"name": "ours", "seeds": 4, "agent_updates_per_s": 250, "peer": 2.5}]
    ratios += [{"name": "peer", "seeds": 1, "agent_updates_per_s": 100, "peer": 1.0}]
    bench.append({"kind": "peers", "device": "cpu", "commit": "new", "rows": ratios})
    entries = json.loads(bench.FILE.read_text())
    scripts, peers = speed.scripts(entries), speed.peers(entries)
    ways = [line for line in scripts.splitlines() if "| H200 |" in line]
    assert ways[1] == "| H200 | bc | 16, one thread each | 2 | 32 |  |  |  | gpu |" and len(ways) == 2
    assert ways[0].startswith("| H200 | bc | 16 | 5 | 5 |") and "| old |" not in scripts
    assert "| cpu | bc | 1 | 1,234 | 5 | 100 | 0.5 | 10% | new |" in scripts
    assert "| ours, 4 seeds | 250 | 2.50 |" in peers and "| peer | 100 | 1.00 |" in peers


def test_code_version(tmp_path, monkeypatch):
    """Dirty is code that differs from the commit; a measurement or a table written meanwhile is not code."""
    who = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    git = lambda *words: subprocess.run([*who, *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.code_version() == "unknown"
    for name in ("code.py", "bench.json"):
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "1")
    clean = run.code_version()
    (tmp_path / "bench.json").write_text("2")
    assert run.code_version() == clean and len(clean) == 12
    (tmp_path / "code.py").write_text("2")
    assert run.code_version() == clean + "-dirty"
