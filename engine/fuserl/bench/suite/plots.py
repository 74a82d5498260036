"""How near to the limit the suite found everything: one picture a folder of results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuserl.bench.suite.reader import Results, read_folder
from fuserl.bench.suite.tables import ours_of

_OURS, _GRID = "#1f6f8b", "#c0392b"
_ROW_INCHES = 0.26


def draw(folder: Path, path: Path) -> bool:
    """Write a PNG (or what the suffix says) of what may be shown. False where that is nothing."""
    parts = read_folder(folder)
    found = [bar for results in parts for bar in bars(results)]
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9.5, 1.2 + _ROW_INCHES * len(found)), layout="constrained")
    _fill(axis, found)
    machine = parts[0].machine
    figure.supxlabel(
        f"{machine['device']}, torch {machine['versions']['torch']}, {machine['date'][:10]}, "
        f"commit {(machine['commit'] or '?')[:10]}",
        fontsize=8,
        color="#666666",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def bars(results: Results) -> list[tuple[str, float]]:
    """(what, share of the limit) of what a user gets."""
    found = [
        (case["title"], case["floor_ms"] / ours["median_ms"])
        for case in results.of_kind("op")
        if (ours := ours_of(case)) is not None
    ]
    for case in results.of_kind("decode_steps"):
        for one in case["results"]:
            if one["samples_ms"]:
                name = f"decode step {case['case']['model']}, {one['num_rows']} rows"
                found.append((f"{name}, context {one['context']}", one["share_of_limit"]))
    return found


def _fill(axis: Any, found: Sequence[tuple[str, float]]) -> None:
    names, shares = zip(*found, strict=True)
    percents = [100 * share for share in shares]
    axis.barh(range(len(found)), percents, 0.7, color=_OURS)
    for place, percent in enumerate(percents):
        axis.annotate(
            f"{percent:.0f}",
            (percent, place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axis.axvline(100, color=_GRID, linestyle="--", linewidth=1)
    axis.set_yticks(range(len(found)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, max(108.0, 1.08 * max(percents)))
    axis.set_xlabel(
        "% of the limit: the time below which no implementation gets, over ours", fontsize=8
    )
    axis.margins(y=0.01)
    axis.spines[["top", "right"]].set_visible(False)
