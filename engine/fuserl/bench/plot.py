"""One panel of bars a case: the fastest on top, the quartiles as whiskers, the limit as a line."""

from pathlib import Path
from typing import Any

from fuserl.bench.report import CaseReport
from fuserl.bench.timing import as_milliseconds, quartiles

_OURS, _RIVAL, _LIMIT = "#1f6f8b", "#b8bfc6", "#c0392b"
_LOG_FROM = 40.0  # ratio of slowest to fastest from which a linear axis hides the fast ones


def draw(path: Path, machine: dict[str, Any], reports: list[CaseReport]) -> None:
    """Write a PNG (or what the suffix says)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [len(report.timed()) * 0.42 + 1.3 for report in reports]
    figure, axes = plt.subplots(
        len(reports),
        squeeze=False,
        figsize=(9.5, sum(heights) + 0.4),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axis, report in zip(axes[:, 0], reports, strict=True):
        _panel(axis, report)
    versions = machine["versions"]
    figure.supxlabel(
        f"{machine['device']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"{machine['date'][:10]}, commit {(machine['commit'] or 'unknown')[:10]}",
        fontsize=8,
        color="#666666",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis: Any, report: CaseReport) -> None:
    results = report.timed()
    spread = [quartiles(result.samples_ms) for result in results]
    medians = [middle for _, middle, _ in spread]
    whiskers = [[m - low for low, m, _ in spread], [high - m for _, m, high in spread]]
    colors = [_OURS if result.is_ours else _RIVAL for result in results]
    axis.barh(range(len(results)), medians, 0.68, xerr=whiskers, color=colors, ecolor="#444444")
    for i, (result, (_, median, high)) in enumerate(zip(results, spread, strict=True)):
        speedup = report.speedup(result)
        parts = [
            f"{as_milliseconds(median)} ms",
            f"{100 * report.floor_ms / median:.0f} % of limit",
        ]
        if speedup is not None and result.provider != report.baseline:
            parts.insert(1, f"{speedup:.2g}x {report.baseline}")
        axis.annotate(
            ", ".join(parts), (high, i), (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.axvline(report.floor_ms, color=_LIMIT, linestyle="--", linewidth=1.2)
    axis.set_yticks(range(len(results)), [result.provider for result in results])
    axis.invert_yaxis()
    shortest, longest = min([report.floor_ms, *medians]), max(high for _, _, high in spread)
    is_log = longest > _LOG_FROM * shortest
    if is_log:
        axis.set_xscale("log")
        axis.set_xlim(shortest * 0.7, shortest * (longest / shortest) ** 1.45)
    else:
        axis.set_xlim(0, longest * 1.38)
    scale = ", log scale" if is_log else ""
    limit = f"dashed: the limit, {as_milliseconds(report.floor_ms)} ms"
    axis.set_xlabel(f"milliseconds{scale}; {limit}", fontsize=8)
    axis.set_title(report.case.title, fontsize=10, loc="left")
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
