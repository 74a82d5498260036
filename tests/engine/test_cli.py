"""The command line: flags, YAML, exit codes, and messages without a traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuserl import cli
from fuserl.config import GenerateConfig, RLConfig, SFTConfig
from fuserl.interrupt import EXIT_CODE, Interrupted
from fuserl.optimizer import NonFiniteError

NEEDED = ["--model=m", "--data=d", "--out=o"]


def parsed(*flags: str, kind: type = SFTConfig) -> Any:
    return cli.parse(kind, [*NEEDED, *flags], prog="fuserl test")


@pytest.fixture
def yaml(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "options.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_are_the_fields() -> None:
    config = parsed("--epochs=3", "--learning-rate", "2e-3", "--resume", "--schedule=linear")
    assert config == SFTConfig(
        model="m",
        data="d",
        out="o",
        epochs=3,
        learning_rate=2e-3,
        resume=True,
        schedule="linear",
    )


def test_yaml_gives_options_and_a_flag_wins(yaml: Callable[[str], str]) -> None:
    path = yaml(
        "epochs: 3\nlearning-rate: 1e-3\nskip_bad_rows: true\nresume: false\n"
        'prompt_template: "{prompt}\\nTL;DR:"\nvalidation_data: null\nseed: -4\n'
    )
    for flags in ([f"--config={path}"], ["--config", path]):
        config = parsed(*flags, "--epochs=5")
        assert config.epochs == 5
        assert config.learning_rate == 1e-3
        assert config.skip_bad_rows is True
        assert config.resume is False
        assert config.prompt_template == "{prompt}\nTL;DR:"
        assert config.validation_data is None
        assert config.seed == -4
    assert parsed("--epochs=5", f"--config={path}").epochs == 5, "wherever it stands"
    assert parsed(f"--config={path}", "--no-skip-bad-rows").skip_bad_rows is False
    assert parsed(f"--config={yaml('')}") == parsed()


def test_yaml_alone_is_enough(yaml: Callable[[str], str]) -> None:
    path = yaml("model: m\ndata: d\nout: o\ngamma: 0.5\n")
    config = cli.parse(RLConfig, ["--config", path], prog="fuserl rl")
    assert config == RLConfig(model="m", data="d", out="o", gamma=0.5)


def test_an_option_may_take_several_values(yaml: Callable[[str], str]) -> None:
    def stops(*flags: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        config = cli.parse(GenerateConfig, ["--model=m", "--prompt=p", *flags], prog="fuserl")
        return config.stop, config.stop_token_ids

    assert stops() == ((), ())
    flags = ["--stop", " a ", "\n", "---", "--stop-token-ids", "3", "4"]
    assert stops(*flags) == ((" a ", "\n", "---"), (3, 4))
    path = yaml('stop: [END, "---", "2"]\nstop_token_ids: [3, 4]')
    several = f"--config={path}"
    assert stops(several) == (("END", "---", "2"), (3, 4))
    assert stops(several, "--stop=x") == (("x",), (3, 4)), "a flag wins, it adds nothing"
    assert stops(f"--config={yaml('stop: END')}") == (("END",), ())
    for wrong in ("stop: null", "stop: [[a]]", "stop: [true]", "stop: {a: b}"):
        with pytest.raises(ValueError, match=r"options\.yaml: stop must be values, not"):
            stops(f"--config={yaml(wrong)}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"options\.yaml: unknown option 'epoch'; known: .*epochs"),
        ("- a\n- b", r"options\.yaml: expected `option: value` lines, found \['a', 'b'\]"),
        ("a: [", r"options\.yaml: while parsing"),
        ("out: null", r"options\.yaml: out must be one value, not None"),
        ("epochs: [1, 2]", r"options\.yaml: epochs must be one value, not \[1, 2\]"),
        ("epochs: true", r"options\.yaml: epochs must be one value, not True"),
        ("resume: 1", r"options\.yaml: resume must be true or false, not 1"),
        ("resume: maybe", r"options\.yaml: resume must be true or false, not 'maybe'"),
    ],
)
def test_wrong_yaml_names_the_file_and_the_key(
    text: str, message: str, yaml: Callable[[str], str]
) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(f"--config={yaml(text)}")


def test_config_needs_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["sft", "--config"]) == 1
    assert "--config needs a file" in capsys.readouterr().err
    assert cli.main(["sft", f"--config={tmp_path / 'none.yaml'}"]) == 1
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--epochs=two"], "--epochs"),
        (["--schedule=step"], "--schedule"),
        (["--epoch-count=2"], "--epoch-count"),
        (["--batch-size=0"], "batch_size must be positive"),
    ],
)
def test_wrong_flags_are_named_and_exit_with_2(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["sft", *NEEDED, *flags])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert named in said.out + said.err


def test_missing_flags_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["sft", "--data=d"])
    assert stop.value.code == 2
    said = "".join(capsys.readouterr())
    assert "--model" in said
    assert "--out" in said


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert cli.main(["train"]) == 2
    assert "no command 'train'" in capsys.readouterr().err
    assert cli.main(["doctor", "--help"]) == 0
    assert cli.main(["doctor", "--fast"]) == 2


def test_every_command_has_its_function() -> None:
    for command in cli.COMMANDS.values():
        assert callable(cli._load(command.function))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("gamma is wrong"), 1, "fuserl sft: gamma is wrong"),
        (FileNotFoundError("no folder x"), 1, "fuserl sft: no folder x"),
        (NotADirectoryError("x is a file"), 1, "fuserl sft: x is a file"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (NonFiniteError("NaN 6 times"), 1, "fuserl sft: NaN 6 times"),
        (Interrupted("stopped after step 3"), EXIT_CODE, "stopped after step 3"),
    ],
)
def test_exit_codes(
    error: Exception,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(config: SFTConfig) -> None:
        raise error

    monkeypatch.setattr("fuserl.commands.sft", fail)
    assert cli.main(["sft", *NEEDED]) == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: SFTConfig) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("fuserl.commands.sft", fail)
    with pytest.raises(KeyError):
        cli.main(["sft", *NEEDED])


def test_the_stages_by_command(
    policy_folder: Path,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """sft, reward, rl, generate and evaluate, each on what the one before left."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fuserl(command: str, model: Path, *flags: str) -> str:
        code = cli.main([command, f"--model={model}", f"--data={data}", *flags])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    sft, reward, rl = (tmp_path / name for name in ("sft", "reward", "rl"))
    told = fuserl("sft", policy_folder, f"--out={sft}", "--epochs=2")
    assert "data: 24 rows: 24 kept" in told
    assert f"{sft}: steps 2, rows 24" in told
    fuserl("reward", sft, f"--out={reward}")
    judged = f"--reward-model={reward}"
    fuserl("rl", sft, judged, f"--out={rl}", "--steps=1", "--max-new-tokens=4")
    lines = fuserl("generate", rl, "--max-new-tokens=3", "--num-slots=5").splitlines()
    assert len(lines) == 24
    result = json.loads(fuserl("evaluate", rl, judged, "--max-new-tokens=3").split("\n", 1)[1])
    assert 0 <= result["win_rate"] <= 1

    assert cli.main(["sft", f"--model={policy_folder}", f"--data={data}", f"--out={sft}"]) == 1
    assert "holds a finished run" in capsys.readouterr().err
    assert cli.main(["rl", f"--model={sft}", f"--data={data}", f"--out={tmp_path / 'x'}"]) == 1
    assert "reward_model is missing" in capsys.readouterr().err
    assert cli.main(["sft", "--model=nowhere", f"--data={data}", f"--out={tmp_path / 'x'}"]) == 1
    assert "no model 'nowhere'" in capsys.readouterr().err


def test_ctrl_c_outside_a_run_ends_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(function: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupt)
    assert cli.main(["doctor"]) == EXIT_CODE
    assert "interrupted" in capsys.readouterr().err
