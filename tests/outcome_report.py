"""What each test came to, for whoever times an op only where its tests are green.

    FUSERL_TEST_REPORT=FILE.jsonl pytest -m gpu tests

FILE is made anew, and each line is written when it is known, so that a run that is cut short
leaves what it has found. Also under xdist. One JSON object a line, by its "kind":

    session           selection (of -m), torch, triton, device (its name, or null)
    collected         id, ops (what the test covers, sorted), large: each test for a GPU (of the
                      ops asked for), whatever -m leaves of them, before any runs
    collection_error  id (the file), reason: its tests are unknown
    outcome           id, ops, outcome ("passed", "failed" or "skipped"), seconds, reason (""
                      where it passed). A test has a second line where its teardown failed.
                      ops is null where a worker died of the test: "collected" knows them
    end               exit_code of pytest

An op is proven where every collected test that covers it has passed, one of them at least, where
there is no collection error, and where the last line is "end": a collected test without an outcome
has not run.
"""

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

VARIABLE = "FUSERL_TEST_REPORT"
_NAME = "fuserl-outcomes"


def add_options(parser: pytest.Parser) -> None:
    parser.addoption(
        "--covers",
        action="append",
        default=[],
        metavar="OP",
        help="only tests that name this op in a marker `covers` (repeatable)",
    )


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what covers none of the ops asked for, and report what is left. For hooks of
    conftest.py, which run before -m leaves more of them out."""
    wanted = set(config.getoption("covers"))
    if wanted:
        config.hook.pytest_deselected(items=[i for i in items if not wanted & set(ops_of(i))])
        items[:] = [item for item in items if wanted & set(ops_of(item))]
    report = config.pluginmanager.get_plugin(_NAME)
    if report is not None:
        report.collected([i for i in items if ops_of(i) or i.get_closest_marker("gpu")])


def ops_of(item: pytest.Item) -> list[str]:
    """The arguments of all its markers `covers`."""
    return sorted({op for marker in item.iter_markers("covers") for op in marker.args})


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        return report.longrepr[2]
    return report.longreprtext.strip()[-1000:]


class OutcomeReport:
    """A plugin. Under xdist the first worker says what was collected, the controller the rest."""

    def __init__(self, path: Path, config: pytest.Config) -> None:
        self._path = path
        worker = getattr(config, "workerinput", {}).get("workerid")
        self._says_outcomes = worker is None
        self._says_collected = worker in (None, "gw0")
        if self._says_outcomes:
            path.write_text("", encoding="utf-8")
            self._write(
                kind="session",
                selection=config.getoption("markexpr"),
                torch=torch.__version__,
                triton=_triton_version(),
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            )

    def _write(self, **fields: Any) -> None:
        """In one call, so that lines of several processes stay whole."""
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(fields).encode() + b"\n")

    def collected(self, items: list[pytest.Item]) -> None:
        if not self._says_collected:
            return
        for item in items:
            large = item.get_closest_marker("large") is not None
            self._write(kind="collected", id=item.nodeid, ops=ops_of(item), large=large)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if self._says_outcomes and report.failed:
            self._write(kind="collection_error", id=report.nodeid, reason=_reason(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self._says_outcomes or (report.when != "call" and report.passed):
            return
        self._write(
            kind="outcome",
            id=report.nodeid,
            ops=dict(report.user_properties).get("ops"),
            outcome=report.outcome,
            seconds=round(report.duration, 3),
            reason=_reason(report),
        )

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self._says_outcomes:
            self._write(kind="end", exit_code=int(exitstatus))


def _triton_version() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def register(config: pytest.Config) -> None:
    """Writes a report where FUSERL_TEST_REPORT names a file."""
    if path := os.environ.get(VARIABLE):
        config.pluginmanager.register(OutcomeReport(Path(path), config), _NAME)
