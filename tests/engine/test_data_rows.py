"""read_rows: every fault of a data file is named with its line, or counted."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fuserl.data.rows import DataError, Row, read_rows

GOOD = b'{"prompt": "a"}\n'


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_reads_a_file_with_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD + b"\n  \r\n" + b'{"prompt": "\\u00e9"}')
    rows, num_bad = read_rows(path)
    assert rows == [Row({"prompt": "a"}, f"{path}:1"), Row({"prompt": "é"}, f"{path}:4")]
    assert num_bad == 0
    assert read_rows(str(path)) == (rows, 0)


def test_reads_gzip_crlf_a_byte_order_mark_and_odd_separators(tmp_path: Path) -> None:
    line = json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False).encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + line + b"\r\n" + GOOD))
    rows, _ = read_rows(path)
    assert [row.fields for row in rows] == [{"text": "one\u2028two\x85three"}, {"prompt": "a"}]


def test_reads_a_list_and_copies_it() -> None:
    data = [{"prompt": "a"}, {"prompt": "b"}]
    rows, num_bad = read_rows(data)
    assert rows == [Row({"prompt": "a"}, "data[0]"), Row({"prompt": "b"}, "data[1]")]
    assert num_bad == 0
    data[0]["prompt"] = "changed"
    assert rows[0].fields == {"prompt": "a"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "not JSON: .* at column 15"),
        (b"[1, 2]", "one object per row.*found list"),
        (b'"text"', "one object per row.*found str"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 13 of the line"),
        (b"[" * 200_000, "not usable JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not usable JSON"),
    ],
)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path / "a.jsonl", GOOD + line + b"\n" + GOOD)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    rows, num_bad = read_rows(path, skip_bad_rows=True)
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
    assert num_bad == 1


def test_a_bad_list_item_is_named_or_counted() -> None:
    data: list[Any] = [{"prompt": "a"}, ["prompt"]]
    with pytest.raises(DataError, match=r"^data\[1\]: .*found list"):
        read_rows(data)
    assert read_rows(data, skip_bad_rows=True)[1] == 1


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match=r"no rows$"):
        read_rows(write(tmp_path / "empty.jsonl", b"\n\n"))
    with pytest.raises(DataError, match=r"^data: no rows$"):
        read_rows([])
    bad = write(tmp_path / "bad.jsonl", b"x\ny\n")
    with pytest.raises(DataError, match="no rows but 2 bad ones"):
        read_rows(bad, skip_bad_rows=True)


@pytest.mark.parametrize("content", [gzip.compress(GOOD * 100)[:-12], b"not gzip"])
def test_damaged_gzip_is_an_error_even_when_skipping(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.jsonl.gz", content)
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(path, skip_bad_rows=True)
