"""What the suite found, in Markdown: everything for the folder of results, a row an op for the
README."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuserl.bench.op import BASELINE
from fuserl.bench.output import table_row
from fuserl.bench.phases import PhaseResult, phase_table
from fuserl.bench.suite.reader import Results, read_folder
from fuserl.bench.timing import Ceilings, as_milliseconds

BEGIN, END = "<!-- GPU numbers, written by benchmarks/tables -->", "<!-- end of GPU numbers -->"
_NONE = """\
**No GPU number exists yet**: the Triton kernels are tested in Triton's interpreter and compiled for
sm_80, sm_90, sm_100 and gfx942 within bounds on registers, spills and shared memory, and have never
run on a GPU."""
_README_CONTEXT = 1024

Found = Mapping[str, Any]


def write_summary(folder: Path) -> str:
    """Every table, also as summary.md in the folder."""
    text = "\n\n".join(map(_section, read_folder(folder))) or "nothing was timed"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text(f"{text}\n")
    return text


def readme_block(folders: Sequence[Path]) -> str:
    """What stands between BEGIN and END: of each op the case that was timed first, and of the rest
    what is shortest to say."""
    blocks = []
    for folder in folders:
        for results in read_folder(folder):
            tables = list(_tables(_first_of_each_op(results)))
            blocks += [_heading(results), *tables] if tables else []
    return "\n\n".join(blocks) or _NONE


def replace_block(text: str, block: str) -> str:
    """The text with another block. ValueError where it has no place for one."""
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"the text has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def _first_of_each_op(results: Results) -> Results:
    cases, seen = [], set()
    for case in results.cases:
        if case["kind"] == "op":
            if case["case"]["op"] in seen:
                continue
            seen.add(case["case"]["op"])
        elif case["kind"] == "decode_steps":
            kept = [one for one in case["results"] if one["context"] == _README_CONTEXT]
            case = {**case, "results": kept}
        cases.append(case)
    return Results(results.part, results.machine, results.ceilings, cases, ())


def _section(results: Results) -> str:
    blocks = [_heading(results), *_tables(results)]
    absent = [(case["title"], _why_absent(case)) for case in results.of_kind("op")]
    hidden = [*results.hidden, *((title, reason) for title, reason in absent if reason)]
    if hidden:
        lines = [f"- {title}: {(reason.splitlines() or ['?'])[0]}" for title, reason in hidden]
        blocks.append("Not shown:\n\n" + "\n".join(lines))
    return "\n\n".join(blocks)


def _heading(results: Results) -> str:
    machine, ceilings = results.machine, results.ceilings
    versions = machine["versions"]
    return (
        f"**{results.part}**: {machine['device']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, {machine['date'][:10]}, commit {(machine['commit'] or '?')[:10]}; "
        f"copy {ceilings['bytes_per_second'] / 1e12:.2f} TB/s, {ceilings['matmul_dtype']} product "
        f"{ceilings['flops_per_second'] / 1e12:.0f} TFLOP/s, launch "
        f"{1e3 * ceilings['launch_ms']:.1f} us"
    )


def _tables(results: Results) -> Iterable[str]:
    for kind, make in _TABLES.items():
        rows = make(results.of_kind(kind))
        if len(rows) > 2:  # the heads and the line under them
            yield "\n".join(rows)
    for case in results.of_kind("step"):
        if case["results"]:
            yield f"{case['title']}:"
            yield phase_table(*_phases(case))


def _phases(case: Found) -> tuple[list[PhaseResult], Ceilings]:
    names = [field.name for field in dataclasses.fields(PhaseResult)]
    found = [PhaseResult(**{name: one[name] for name in names}) for one in case["results"]]
    return found, Ceilings(**case["ceilings"])


def _timed(case: Found) -> list[Found]:
    """The fastest first."""
    found = [result for result in case["results"] if result.get("samples_ms")]
    return sorted(found, key=lambda result: result["median_ms"])


def ours_of(case: Found) -> Found | None:
    """What a user gets who chooses no implementation, where it was timed: never a faster one of
    ours that has to be asked for."""
    return next((r for r in _timed(case) if r["provider"] == case["default"]), None)


def _why_absent(case: Found) -> str | None:
    """Why it has no row; None if it has one."""
    if ours_of(case) is not None:
        return None
    for result in case["results"]:
        if result["provider"] == case["default"]:
            return f"{result['provider']}: {result['status']}, {result['reason']}"
    return f"{case['default']}, which a user gets, was not timed"


def _op_rows(cases: Iterable[Found]) -> list[str]:
    heads = ("", "ours", "ms", "limit, ms", "share of it", f"vs {BASELINE}", "vs best rival")
    rows = [table_row(*heads, "peak, MB"), table_row("---", "---", *["--:"] * 4, "---", "--:")]
    for case in cases:
        timed = _timed(case)
        default = ours_of(case)
        if default is None:
            continue
        rivals = [result for result in timed if not result["is_ours"]]
        torch = next((result for result in rivals if result["provider"] == BASELINE), None)
        best = next((result for result in rivals if result["provider"] != BASELINE), None)
        others = [result for result in timed if result["is_ours"] and result is not default]
        for ours in (default, *others):
            peak = ours.get("peak_beyond_gradients_bytes")
            asked_for = "" if ours is default else " (asked for)"
            rows.append(
                table_row(
                    case["title"],
                    f"{ours['provider'].removeprefix('fuserl-')}{asked_for}",
                    _spread(ours),
                    as_milliseconds(case["floor_ms"]),
                    f"{case['floor_ms'] / ours['median_ms']:.0%}",
                    "-" if torch is None else _ratio(torch, ours),
                    "-" if best is None else f"{_ratio(best, ours)} {best['provider']}",
                    "-" if peak is None else f"{peak / 1e6:.0f}",
                )
            )
    return rows


def _spread(result: Found) -> str:
    low, high = map(as_milliseconds, result["quartiles_ms"])
    return f"{as_milliseconds(result['median_ms'])} [{low}, {high}]"


def _ratio(rival: Found, ours: Found) -> str:
    return f"{rival['median_ms'] / ours['median_ms']:.2f}x"


def _step_rows(cases: Iterable[Found]) -> list[str]:
    heads = ("decode steps", "rows", "context", "ms a step", "limit, ms", "share of it", "tokens/s")
    rows = [table_row(*heads), table_row("---", *["--:"] * 6)]
    for case in cases:
        for result in case["results"]:
            if not result["samples_ms"]:
                continue
            rows.append(
                table_row(
                    case["case"]["model"],
                    str(result["num_rows"]),
                    str(result["context"]),
                    _spread(result),
                    as_milliseconds(result["floor_ms"]),
                    f"{result['share_of_limit']:.0%}",
                    f"{result['tokens_per_second']:,.0f}",
                )
            )
    return rows


def _rollout_rows(cases: Iterable[Found]) -> list[str]:
    rows = [
        table_row("whole rollouts", "", "ms", "tokens/s", "peak, MB"),
        table_row("---", "---", *["--:"] * 3),
    ]
    for case in cases:
        for result in _timed(case):
            peak = result["peak_extra_bytes"]
            rows.append(
                table_row(
                    case["title"].removeprefix("rollout, "),
                    result["provider"],
                    _spread(result),
                    f"{result['tokens_per_second']:,.0f}",
                    "-" if peak is None else f"{peak / 1e6:.0f}",
                )
            )
    return rows


_TABLES: dict[str, Callable[[Iterable[Found]], list[str]]] = {
    "op": _op_rows,
    "decode_steps": _step_rows,
    "rollout": _rollout_rows,
}
