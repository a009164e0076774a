"""What four language models answer to the same prompts, of the study of over-optimisation."""

import json

from results.tables.layout import markdown
from results.tables.records import RESULTS

MARK = "texts"


def table(cells, published, datasets):
    path = RESULTS / "studies" / "overoptimisation.json"
    if not path.exists():
        return ""
    rows = []
    for model, answers in json.loads(path.read_text())["texts"]["prompts"].items():
        for prompt, answer, gold, proxy in answers:
            rows.append([model, f"`{prompt}`", f"`{answer}`", f"{gold:.2f}", f"{proxy:.2f}"])
    return markdown(["model", "prompt", "answer", "gold:", "proxy:"], rows)
