"""The picture of the learning curves: mean score, the seeds' range shaded; dots: the published curve, where there is
one, and a triangle at the right edge: the published last score."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from results.tables.records import grouped

STYLES = "-", "--", "-."  # in turn, so that neighbours in colour differ in something else too


def draw(cells, published, path):
    """cells: those that are compared; one panel for each source, number of updates and task."""
    panels = []
    for group in grouped(cells, "source", "steps").values():  # each in the order of the tasks
        panels += [[cell for cell in group if cell.env == env] for env in dict.fromkeys(cell.env for cell in group)]
    if not panels:  # nothing is recorded yet: an older picture stays
        return
    names = [name for _, name in grouped(cells, "place", "name")]
    colors = plt.get_cmap("turbo")(np.linspace(0.02, 0.95, len(names)))[:, :3] * 0.85  # its yellow is too pale
    height = -(-len(panels) // 3)
    figure, axes = plt.subplots(height, 3, figsize=(16, 3.6 * height + 0.4), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels):
        for cell in panel:
            i = names.index(cell.name)
            curves = [{point["step"]: point["score"] for point in record["curve"]} for record in cell.records]
            steps = [step for step in curves[0] if all(step in curve for curve in curves)]
            scores = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, points)
            style = dict(color=colors[i], linestyle=STYLES[i % len(STYLES)])
            axis.plot(steps, scores.mean(0), label=cell.name, **style)
            axis.fill_between(steps, scores.min(0), scores.max(0), color=colors[i], alpha=0.12, linewidth=0)
            marks = [step for step in range(10_000, cell.steps + 1, 10_000) if (cell.name, cell.env, step) in published]
            means = [float(published[cell.name, cell.env, step]["mean"]) for step in marks]
            axis.plot(marks, means, "o", color=colors[i], markersize=3.5, markeredgecolor="white", markeredgewidth=0.4)
            if row := published.get((cell.name, cell.env)):
                edge = axis.get_yaxis_transform()  # x: 0 to 1 from edge to edge; y: a score
                axis.plot(1.0, float(row["mean"]), "<", color=colors[i], transform=edge, clip_on=False, markersize=8)
        axis.set(title=f"{panel[0].env} ({panel[0].source})", xlabel="updates", ylabel="normalized score")
        axis.set(ylim=(0, None))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines if line.get_label() in names}
    figure.legend([lines[name] for name in names], names, loc="lower center", ncols=8, frameon=False)
    figure.text(
        0.995,
        0.005,
        "published, D4RL's data: dots after as many updates (v0), triangles last (v2)",
        ha="right",
        fontsize=8,
        color="gray",
    )
    figure.tight_layout(rect=(0, 0.3 * -(-len(names) // 8) / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
