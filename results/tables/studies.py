"""What the studies measured: of each its question, picture and findings. One not yet measured is left out."""

from results.studies import (
    compounding,
    cql_alpha,
    demonstrations,
    extrapolation,
    in_context,
    model_error,
    model_selection,
    ope,
    open_bandit,
    overoptimisation,
    peer_iql,
    q_divergence,
    return_conditioning,
    stitching,
    switch,
    transfer,
)
from results.tables.records import RESULTS

STUDIES = (
    extrapolation,
    q_divergence,
    cql_alpha,
    stitching,
    return_conditioning,
    in_context,
    model_error,
    demonstrations,
    compounding,
    transfer,
    ope,
    open_bandit,
    model_selection,
    switch,
    overoptimisation,
    peer_iql,
)


def sections():
    texts = []
    for study in STUDIES:
        if not (RESULTS / "studies" / f"{study.STUDY}.json").exists():
            continue
        study.draw()
        question, about = study.__doc__.split("\nUsage:")[0].strip().split("\n", 1)
        findings = "\n".join(f"- {sentence}" for sentence in study.findings())
        texts.append(f"### {question}\n{about}\n\n![{study.STUDY}](studies/{study.STUDY}.png)\n\n{findings}")
    return "\n\n".join(texts)
