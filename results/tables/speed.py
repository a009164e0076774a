"""Of results/bench.json, the latest measurement of each script on each device, and of each comparison."""

from results.tables.layout import markdown
from results.tables.records import display_name
from tests.scripts import SCRIPTS


def scripts(entries):
    rows, order = {}, list(SCRIPTS)
    for entry in entries:
        if entry["kind"] != "scripts":
            continue
        for row in entry["rows"]:
            way = row.get("way", "")
            rows[entry["device"], order.index(row["script"]), row["seeds"], way] = [
                entry["device"],
                row["script"],
                f"{row['seeds']}, {way}" if way else row["seeds"],
                f"{row['updates_per_s']:,.0f}",
                f"{row['agent_updates_per_s']:,.0f}"
                + (f"<br>{x:,} tokens/s" if (x := row.get("tokens_per_s")) else ""),
                f"{row['memory_mb']:,}" if "memory_mb" in row else "",
                f"{row['evaluation_s']:.1f}" if "evaluation_s" in row else "",
                f"{row['evaluation_share']:.0%}" if "evaluation_share" in row else "",
                entry["commit"],
            ]
    heads = ["device", "script", "seeds:", "updates/s:", "agent-updates/s:", "memory, MB:", "evaluation, s:"]
    return markdown([*heads, "its share:", "commit"], [rows[key] for key in sorted(rows)])


def peers(entries):
    comparisons, order = {}, list(SCRIPTS)
    for entry in entries:
        if entry["kind"] == "peers":
            script = entry.get("script", "td3_bc")
            comparisons[order.index(script), script, entry["device"]] = entry
    tables = []
    for (_, script, device), entry in sorted(comparisons.items()):
        rows = entry["rows"]
        names = [row["name"] for row in rows if row["name"] in row]
        unit = "environment steps/s" if SCRIPTS[script].acts else "agent-updates/s"
        unit = "gradient steps/s" if script == "maxent_irl" else unit
        heads = [f"{display_name(script)}, {device}", f"{unit}:", *(f"ratio to {name}:" for name in names)]
        lines = []
        for row in rows:
            seeds = f", {row['seeds']} seed{'s' * (row['seeds'] > 1)}" if row["name"] == "ours" else ""
            ratios = [f"{row[name]:.2f}" for name in names]
            lines.append([row["name"] + seeds, f"{row['agent_updates_per_s']:,}", *ratios])
        tables.append(markdown(heads, lines))
        if "apart" in entry:
            tables.append(
                f"The occupancies of both fitted policies differ by {entry['apart']:.2%}, the rewards' correlation is "
                f"{entry['correlation']:.4f}."
            )
    return "\n\n".join(tables)
