"""`fuserl generate`: one JSON line a completion, equal to the policy's own."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fuserl import cli
from fuserl.config import GenerateConfig
from fuserl.generate import in_order, run_generate
from fuserl.generation import FinishedCompletion
from fuserl.interrupt import EXIT_CODE
from fuserl.policy import Policy, load_policy

Rows = list[dict[str, Any]]


@pytest.fixture
def data(rows: Rows, tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("num_slots", [1, 4, 50])
def test_a_file_of_prompts(
    num_slots: int, policy_folder: Path, data: Path, rows: Rows, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out.jsonl"
    config = GenerateConfig(
        model=str(policy_folder),
        data=str(data),
        out=str(out),
        num_samples=2,
        max_new_tokens=6,
        seed=3,
        num_slots=num_slots,
    )
    run_generate(config)
    lines = read(out)
    prompts = [row["prompt"] for row in rows[:7]]
    policy = load_policy(policy_folder)
    expected = policy.generate(prompts, n=2, max_new_tokens=6, seed=3)
    assert [line["prompt"] for line in lines] == [p for p in prompts for _ in range(2)]
    assert [line["token_ids"] for line in lines] == expected.token_ids
    assert [line["completion"] for line in lines] == expected.texts
    assert [line["finish_reason"] for line in lines] == expected.finish_reasons
    for line, logprobs in zip(lines, expected.logprobs, strict=True):
        assert line["logprobs"] == pytest.approx(logprobs, abs=1e-5)


def test_one_prompt_goes_to_the_screen(
    policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GenerateConfig(
        model=str(policy_folder), prompt="red dog", max_new_tokens=4, temperature=0.0
    )
    run_generate(config)
    said = capsys.readouterr()
    [line] = said.out.splitlines()
    assert "prompts: 1 row: 1 kept" in said.err
    expected = load_policy(policy_folder).generate(["red dog"], max_new_tokens=4, temperature=0.0)
    assert json.loads(line)["token_ids"] == expected.token_ids[0]


def test_rows_that_are_dropped_are_told_beside_the_screen(
    policy_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with data.open("a") as file:
        file.write('{"prompt": 3}\n')
    model = str(policy_folder)
    run_generate(GenerateConfig(model=model, data=str(data), max_new_tokens=2, skip_bad_rows=True))
    said = capsys.readouterr()
    assert len([json.loads(line) for line in said.out.splitlines()]) == 7
    assert "prompts: 8 rows: 7 kept, 1 bad skipped" in said.err


def test_the_template_can_be_changed(
    policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GenerateConfig(
        model=str(policy_folder), prompt="red", max_new_tokens=4, prompt_template="Q: {prompt}"
    )
    run_generate(config)
    policy = load_policy(policy_folder)
    assert policy.tokenizer is not None
    ids = policy.tokenizer.encode_prompt("Q: red")
    expected = policy.generate([ids], max_new_tokens=4).token_ids[0]
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected


def test_limits_and_options_are_checked(policy_folder: Path) -> None:
    model = str(policy_folder)
    with pytest.raises(ValueError, match=r"max_new_tokens \(500\) leaves no room for a prompt"):
        run_generate(GenerateConfig(model=model, prompt="red", max_new_tokens=500))
    with pytest.raises(ValueError, match="no row is left"):
        run_generate(
            GenerateConfig(model=model, prompt="red " * 20, max_prompt_length=5, max_new_tokens=4)
        )


def test_stops_from_the_command_line(
    policy_folder: Path, data: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, out = load_policy(policy_folder), tmp_path / "out.jsonl"
    prompts = [row["prompt"] for row in rows[:7]]
    whole = policy.generate(prompts, max_new_tokens=20, n=3, ignore_eos=True)
    drawn = [i for row in whole.token_ids for i in row]
    common = max(set(drawn), key=drawn.count)
    flags = [f"--model={policy_folder}", f"--data={data}", f"--out={out}", "--max-new-tokens=20"]
    flags += ["--num-samples=3", "--ignore-eos"]
    stops = ["--stop", "e", "og", "--stop-token-ids", str(common)]
    assert cli.main(["generate", *flags, *stops, "--num-slots=5"]) == 0
    lines = read(out)
    expected = policy.generate(
        prompts,
        max_new_tokens=20,
        n=3,
        ignore_eos=True,
        stop=["e", "og"],
        stop_token_ids=[common],
    )
    assert [line["token_ids"] for line in lines] == expected.token_ids
    assert [line["completion"] for line in lines] == expected.texts
    assert not any("e" in line["completion"] or "og" in line["completion"] for line in lines)
    reasons = [line["finish_reason"] for line in lines]
    assert reasons == expected.finish_reasons
    assert set(reasons) == {"stop", "length"}

    said = capsys.readouterr()
    assert said.out == ""
    num_tokens = sum(map(len, expected.token_ids))
    counts = f"{reasons.count('stop')} ended by stop, {reasons.count('length')} by length"
    assert re.search(
        rf"completions: 21, {num_tokens} tokens, [\d,]+ tokens/s; {counts}; 5 slots, "
        r"0\.\d MB of keys and values\n$",
        said.err,
    )
    assert "21/21" in said.err
    assert "tokens/s=" in said.err
    eos = [f"--eos-token-id={common}", "--overwrite"]
    assert cli.main(["generate", *flags[:-1], *eos]) == 0
    ended = policy.generate(prompts, max_new_tokens=20, n=3, eos_token_id=common)
    assert [line["token_ids"] for line in read(out)] == ended.token_ids


def test_a_completion_is_written_as_soon_as_all_before_it_are() -> None:
    def finished(index: int) -> FinishedCompletion:
        return FinishedCompletion(
            index=index,
            prompt_index=index,
            token_ids=[],
            logprobs=[],
            truncated_logprobs=[],
            text="",
            finish_reason="stop",
        )

    drawn: list[int] = []

    def source() -> Iterator[FinishedCompletion]:
        for index in (2, 0, 3, 1, 5, 4):
            drawn.append(index)
            yield finished(index)

    seen = [(completion.index, len(drawn)) for completion in in_order(source())]
    assert seen == [(0, 2), (1, 4), (2, 4), (3, 4), (4, 6), (5, 6)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_whole_lines(
    number: signal.Signals,
    policy_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    command = ["generate", f"--model={policy_folder}", f"--data={data}", "--num-slots=2"]
    command += ["--num-samples=4", "--max-new-tokens=20"]
    assert cli.main([*command, f"--out={whole}"]) == 0
    stream = Policy.stream

    def interrupted(self: Policy, *args: Any, **options: Any) -> Iterator[FinishedCompletion]:
        for i, completion in enumerate(stream(self, *args, **options)):
            if i == 9:
                signal.raise_signal(number)
            yield completion

    monkeypatch.setattr(Policy, "stream", interrupted)
    capsys.readouterr()
    assert cli.main([*command, f"--out={cut}"]) == EXIT_CODE
    text = cut.read_text()
    assert text.endswith("\n")
    assert whole.read_text().startswith(text)
    num_lines = len(text.splitlines())
    assert 8 <= num_lines < 28
    message = f"the first {num_lines} of 28 completions are written in {cut}"
    assert message in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    assert cli.main([*command, f"--out={cut}"]) == 1
    assert f"{cut} is not empty: choose another --out, or add --ov" in capsys.readouterr().err
    assert cut.read_text() == text


def test_a_full_file_is_refused_before_any_work(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("kept\n")
    config: dict[str, Any] = {"prompt": "red", "max_new_tokens": 2, "out": str(out)}
    with pytest.raises(ValueError, match=r"out\.jsonl is not empty"):
        run_generate(GenerateConfig(model="nowhere", **config))
    assert out.read_text() == "kept\n"
    run_generate(GenerateConfig(model=str(policy_folder), **config, overwrite=True))
    assert len(read(out)) == 1
    out.write_text("")
    run_generate(GenerateConfig(model=str(policy_folder), **config))
    assert len(read(out)) == 1


def test_a_folder_without_a_tokenizer_is_named(
    policy_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(policy_folder, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    out = tmp_path / "out.jsonl"
    assert cli.main(["generate", f"--model={folder}", f"--data={data}", f"--out={out}"]) == 1
    assert f"{folder} has no tokenizer files, and the rows are text" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_out_that_cannot_be_is_refused_before_the_model_is_opened(
    data: Path, tmp_path: Path, overwrite: bool
) -> None:
    def refused(out: Path, message: str) -> None:
        config = GenerateConfig(
            model="no such folder", data=str(data), out=str(out), overwrite=overwrite
        )
        with pytest.raises(ValueError, match=message):
            run_generate(config)

    before = data.read_bytes()
    refused(tmp_path, "is a folder: give it a file")
    refused(data / "under" / "a.jsonl", "is a file and no folder")
    refused(data, "holds the prompts: choose another --out")
    assert data.read_bytes() == before
