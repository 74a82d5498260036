"""The command line: a table of commands, flags made from the configuration classes, and YAML.

A YAML file given with --config is turned into flags that stand before the ones typed, so a typed
flag wins. torch is imported by a command that runs, never to show help.
"""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from fuserl import config as configs
from fuserl.interrupt import EXIT_CODE, Interrupted
from fuserl.profile_config import ProfileConfig


@dataclass(frozen=True, slots=True)
class Command:
    config: type | None
    function: str
    """module:function, called with the configuration (without one: with nothing)."""
    help: str
    positional: str | None = None
    """The option whose value may come first, without its flag."""


COMMANDS = {
    "quickstart": Command(
        configs.QuickstartConfig,
        "fuserl.quickstart.pipeline:run_quickstart",
        "watch a language model learn from preferences, from nothing, in minutes",
    ),
    "sft": Command(configs.SFTConfig, "fuserl.commands:sft", "supervised fine-tuning"),
    "reward": Command(
        configs.RewardConfig, "fuserl.commands:reward", "a reward model from preferences"
    ),
    "rl": Command(
        configs.RLConfig, "fuserl.commands:rl", "PPO or REINFORCE against a reward model"
    ),
    "profile": Command(
        ProfileConfig,
        "fuserl.profile:run_profile",
        "where a step of rl spends its time: phases, limits, memory, a trace",
    ),
    "generate": Command(
        configs.GenerateConfig, "fuserl.generate:run_generate", "completions of prompts"
    ),
    "evaluate": Command(
        configs.EvaluateConfig,
        "fuserl.evaluate:run_evaluate",
        "loss, ROUGE-L and win rate of a policy; accuracy of a reward model",
    ),
    "bench": Command(
        configs.BenchConfig,
        "fuserl.commands:bench",
        "time an op, or a training step, against the rivals; every answer is checked first",
        positional="op",
    ),
    "doctor": Command(
        None, "fuserl.doctor:run_doctor", "what is installed, what is in use, what would be faster"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The `fuserl` command. Returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name, *flags = arguments
    if name == "--version":
        from importlib.metadata import version

        print(f"fuserl {version('fuserl')}")
        return 0
    if name not in COMMANDS:
        print(f"fuserl: no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        return _run(command, name, flags)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:  # before the first step or after the last, or the second Ctrl-C
        print("\ninterrupted; what was finished or saved before is as it was", file=sys.stderr)
        return EXIT_CODE
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"fuserl {name}: {error}", file=sys.stderr)
        return 1


def _run(command: Command, name: str, flags: list[str]) -> int:
    if command.config is None:
        if flags:
            print(f"usage: fuserl {name}\n\n{command.help}")
            return 0 if flags[0] in ("-h", "--help") else 2
        _load(command.function)()
        return 0
    if command.positional is not None and flags and not flags[0].startswith("-"):
        flags = [f"--{command.positional}={flags[0]}", *flags[1:]]
    config = parse(command.config, flags, prog=f"fuserl {name}")
    _load(command.function)(config)
    return 0


def parse(kind: type, flags: list[str], *, prog: str) -> Any:
    """A configuration from flags and the YAML file that `--config` names."""
    import tyro

    flags, path = _take_config(flags)
    if path is not None:
        flags = _yaml_flags(kind, path) + flags
    about = inspect.cleandoc(kind.__doc__ or "")
    return tyro.cli(
        kind,
        args=flags,
        prog=prog,
        description=f"{about}\n\n--config FILE.yaml gives any of these options too.",
    )


def _take_config(flags: list[str]) -> tuple[list[str], Path | None]:
    for i, flag in enumerate(flags):
        if flag == "--config":
            if i + 1 == len(flags):
                raise ValueError("--config needs a file")
            return flags[:i] + flags[i + 2 :], Path(flags[i + 1])
        if flag.startswith("--config="):
            return flags[:i] + flags[i + 1 :], Path(flag.removeprefix("--config="))
    return flags, None


def _yaml_flags(kind: type, path: Path) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected `option: value` lines, found {content!r}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    flags = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{path}: unknown option {key!r}; known: {', '.join(known)}")
        flag, is_switch = name.replace("_", "-"), known[name].type in (bool, "bool")
        if value is None and known[name].default is None:
            continue
        is_several = get_origin(known[name].type) is tuple
        values = value if is_several and isinstance(value, list) else [value]
        if not all(_is_one(item) and is_switch == isinstance(item, bool) for item in values):
            wanted = "true or false" if is_switch else "values" if is_several else "one value"
            raise ValueError(f"{path}: {key} must be {wanted}, not {value!r}")
        if is_switch:
            flags.append(f"--{'' if value else 'no-'}{flag}")
        elif is_several:
            flags += [f"--{flag}", *map(str, values)]
        else:
            flags.append(f"--{flag}={value}")
    return flags


def _is_one(value: object) -> bool:
    return value is not None and not isinstance(value, list | dict)


def _load(function: str) -> Any:
    from importlib import import_module

    module, name = function.split(":")
    return getattr(import_module(module), name)


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{command.help}" for name, command in COMMANDS.items()]
    commands = "\n".join(lines)
    return (
        f"usage: fuserl COMMAND [--option VALUE ...]\n\ncommands:\n{commands}\n\n"
        "`fuserl COMMAND --help` lists the options; --config FILE.yaml sets them from a file."
    )
