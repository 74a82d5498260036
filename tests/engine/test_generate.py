"""`fuserl generate`: one JSON line a completion, equal to the policy's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from fuserl.config import GenerateConfig
from fuserl.generate import run_generate
from fuserl.policy import load_policy

Rows = list[dict[str, Any]]


@pytest.fixture
def data(rows: Rows, tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_a_file_of_prompts(
    batch_size: int, policy_folder: Path, data: Path, rows: Rows, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out.jsonl"
    config = GenerateConfig(
        model=str(policy_folder),
        data=str(data),
        out=str(out),
        num_samples=2,
        max_new_tokens=6,
        seed=3,
        batch_size=batch_size,
    )
    run_generate(config)
    lines = read(out)
    prompts = [row["prompt"] for row in rows[:7]]
    policy = load_policy(policy_folder)
    expected = policy.generate(prompts, n=2, max_new_tokens=6, seed=3)
    assert [line["prompt"] for line in lines] == [p for p in prompts for _ in range(2)]
    assert [line["token_ids"] for line in lines] == expected.token_ids
    assert [line["completion"] for line in lines] == expected.texts
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
