"""The README's list of scripts in reading order: length and the first line of the docstring."""

import ast

from results.tables.layout import markdown, with_families
from results.tables.records import ROOT
from tests.scripts import FAMILIES, SCRIPTS


def table():
    rows = []
    for name, script in sorted(SCRIPTS.items(), key=lambda item: FAMILIES.index(item[1].family)):
        text = (ROOT / "algorithms" / f"{name}.py").read_text()
        title = ast.get_docstring(ast.parse(text)).splitlines()[0]
        row = [f"[{name}.py](algorithms/{name}.py)", len(text.splitlines()), title]
        rows.append((f"**{script.family}**", row))
    return markdown(["script", "lines:", "paper"], with_families(rows))
