"""What four language models answer to one prompt, of the study of over-optimisation."""

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
        for prompt, answer, gold, proxy in answers[:1]:
            rows.append([model, f"`{prompt}`", f"`{answer}`", f"{gold:.2f}", f"{proxy:.2f}"])
    return markdown(["model", "prompt", "answer", "gold:", "proxy:"], rows)
