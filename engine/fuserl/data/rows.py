"""Rows of JSON objects out of a file or a list, each with the place it came from."""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
Item = TypeVar("Item")
Parsed = TypeVar("Parsed")


class DataError(ValueError):
    """The data is at fault; the message begins with "file:line" or "data[i]"."""


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object."""

    fields: dict[str, Any]
    where: str  # "file:line" (from 1) or "data[i]" (from 0)


def source_name(source: Source) -> str:
    """What messages call the source: its path, or "data"."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "data"


def read_rows(source: Source, *, skip_bad_rows: bool = False) -> tuple[list[Row], int]:
    """All rows of a .jsonl or .jsonl.gz file, or of a list of dicts -> rows, bad rows skipped.

    Blank lines are passed over. DataError for a bad row (unless skipped and counted), a file
    that cannot be read, and a source without a single good row.
    """
    name = source_name(source)
    if isinstance(source, str | os.PathLike):
        rows, num_bad = parse_each(_lines(name), _parse_line, skip_bad_rows=skip_bad_rows)
    else:
        items = ((f"{name}[{index}]", item) for index, item in enumerate(source))
        rows, num_bad = parse_each(items, _parse_object, skip_bad_rows=skip_bad_rows)
    if not rows:
        raise DataError(f"{name}: no rows" + (f" but {num_bad} bad ones" if num_bad else ""))
    return rows, num_bad


def parse_each(
    items: Iterable[Item], parse: Callable[[Item], Parsed], *, skip_bad_rows: bool
) -> tuple[list[Parsed], int]:
    """parse(item) of each item -> results, and how many were skipped for a DataError."""
    parsed: list[Parsed] = []
    num_bad = 0
    for item in items:
        try:
            parsed.append(parse(item))
        except DataError as error:
            if not skip_bad_rows:
                raise
            num_bad += 1
            logger.info("bad row skipped: %s", error)
    return parsed, num_bad


def _lines(path: str) -> Iterator[tuple[str, bytes]]:
    """("path:line", the line) of every line that is not blank."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _parse_line(item: tuple[str, bytes]) -> Row:
    where, line = item
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise DataError(f"{where}: not usable JSON: {error}") from error
    return _parse_object((where, value))


def _parse_object(item: tuple[str, Any]) -> Row:
    where, value = item
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: expected one object per row, like {{...}}; found {type(value).__name__}"
        )
    return Row(dict(value), where)
