"""Configurations refuse what cannot be and what makes no sense, with the reason, at once."""

import dataclasses
from typing import Any

import pytest

from fuserl.algorithms import ALGORITHMS
from fuserl.config import (
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    RewardConfig,
    RLConfig,
    SFTConfig,
    TrainConfig,
)

TRAINING = [SFTConfig, RewardConfig, RLConfig]
ALL = [*TRAINING, GenerateConfig, EvaluateConfig]


def build(kind: type, **options: Any) -> Any:
    given = {"model": "m", "data": "d"}
    if issubclass(kind, TrainConfig):
        given["out"] = "o"
    return kind(**{**given, **options})


@pytest.mark.parametrize("kind", ALL)
def test_defaults_run(kind: type) -> None:
    config = build(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = "other"


@pytest.mark.parametrize("kind", ALL)
def test_every_field_says_what_it_is(kind: type) -> None:
    """The text under a field is its help."""
    import inspect

    lines = "".join(inspect.getsource(base) for base in kind.__mro__[:-1]).splitlines()
    for field in dataclasses.fields(kind):
        index = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert '"""' in lines[index + 1], field.name


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *(
            (kind, {"batch_size": 0}, "batch_size must be positive, got 0")
            for kind in (*TRAINING, EvaluateConfig)
        ),
        *((kind, {"over_long": "cut"}, r"over_long must be one of \('filter', ") for kind in ALL),
        *((kind, {"learning_rate": 0.0}, "learning_rate must be positive") for kind in TRAINING),
        *((kind, {"learning_rate": float("nan")}, "learning_rate must be") for kind in TRAINING),
        *((kind, {"microbatch_size": -1}, "microbatch_size must be pos") for kind in TRAINING),
        *(
            (kind, {"max_grad_norm": -1.0}, "max_grad_norm must not be negative")
            for kind in TRAINING
        ),
        *((kind, {"warmup_share": 1.0}, r"warmup_share must be in \[0, 1\)") for kind in TRAINING),
        *((kind, {"dtype": "float16"}, r"dtype must be one of \('auto', 'f") for kind in TRAINING),
        *(
            (kind, {"frozen_layers": number}, f"frozen_layers must be a number .* {number}")
            for kind in TRAINING
            for number in (-1, 1.5, float("nan"))
        ),
        *((kind, {"save_every": -1}, "save_every must not be negative") for kind in TRAINING),
        *((kind, {"schedule": "step"}, "schedule must be one of") for kind in TRAINING),
        *(
            (kind, {"resume": True, "overwrite": True}, "resume and overwrite exclude each other")
            for kind in TRAINING
        ),
        (SFTConfig, {"max_length": 0}, "max_length must be positive"),
        (SFTConfig, {"epochs": 0}, r"epochs \(0\) and lm_epochs \(0\)"),
        (SFTConfig, {"epochs": -1, "lm_epochs": 2}, r"epochs \(-1\)"),
        (RewardConfig, {"epochs": 0}, "epochs must be positive"),
        (RewardConfig, {"validate_every": -1}, "validate_every must not be negative"),
        (RLConfig, {"algorithm": "trpo"}, "algorithm must be one of .*'ppo'.* got 'trpo'"),
        (RLConfig, {"preset": "mine"}, "preset must be one of"),
        (RLConfig, {"reward_at": "word"}, "reward_at must be one of"),
        (RLConfig, {"kl_estimator": "k9"}, "kl_estimator must be one of"),
        (RLConfig, {"steps": 0}, "steps must be positive"),
        (RLConfig, {"num_samples": 0}, "num_samples must be positive"),
        (RLConfig, {"num_epochs": 0}, "num_epochs must be positive"),
        (RLConfig, {"temperature": 0.0}, "temperature must be positive"),
        (RLConfig, {"max_new_tokens": 0}, "max_new_tokens must be positive"),
        (RLConfig, {"clip_range": 0.0}, "clip_range must be positive"),
        (RLConfig, {"old_logprobs": "mine"}, "old_logprobs must be one of"),
        (RLConfig, {"importance_correction": "both"}, "importance_correction must be one of"),
        (RLConfig, {"importance_cap": 0.5}, "importance_cap must be at least 1, got 0.5"),
        (RLConfig, {"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        (RLConfig, {"gae_lambda": -0.1}, r"gae_lambda must be in \[0, 1\]"),
        (
            RLConfig,
            {"batch_size": 2, "num_samples": 3, "num_minibatches": 7},
            r"num_minibatches \(7\) exceeds the rollout's 6 sequences",
        ),
        (GenerateConfig, {"prompt": "p"}, "give either data or prompt"),
        (GenerateConfig, {"data": None}, "give either data or prompt"),
        (GenerateConfig, {"num_samples": 0}, "num_samples must be positive"),
        (GenerateConfig, {"top_p": 2.0}, r"top_p must be in \(0, 1\]"),
        (GenerateConfig, {"top_k": -1}, "top_k must not be negative"),
        (GenerateConfig, {"num_slots": 0}, "num_slots must be positive"),
        (GenerateConfig, {"kv_budget_bytes": -1}, "kv_budget_bytes must be positive"),
        (GenerateConfig, {"stop": ("a", "")}, "stop must not hold an empty string"),
        (GenerateConfig, {"eos_token_id": 3, "ignore_eos": True}, "no sense with ignore_eos"),
        (GenerateConfig, {"overwrite": True}, "overwrite makes no sense without an out file"),
        (EvaluateConfig, {"num_slots": 0}, "num_slots must be positive"),
        (EvaluateConfig, {"temperature": -1.0}, "temperature must be finite, not negative"),
        (EvaluateConfig, {"limit": 0}, "limit must be positive"),
        (EvaluateConfig, {"max_new_tokens": 0}, "max_new_tokens must be positive"),
    ],
)
def test_impossible_values_are_refused(
    kind: type[DataConfig], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, **options)


@pytest.mark.parametrize("algorithm", ["reinforce", "reinforce_baseline"])
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"critic_model": "c"}, "it has no critic"),
        ({"critic_learning_rate": 1e-3}, "it has no critic"),
        ({"vf_coef": 0.5}, "it has no critic"),
        ({"value_clip_range": 0.5}, "it has no critic"),
        ({"gae_lambda": 0.9}, "it has no critic"),
        ({"clip_range": 0.3}, "it does not clip"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    algorithm: str, option: dict[str, Any], reason: str
) -> None:
    build(RLConfig, **option)
    [name] = option
    with pytest.raises(ValueError, match=f"{name} makes no sense with {algorithm}: {reason}"):
        build(RLConfig, algorithm=algorithm, **option)


def test_a_correction_needs_log_probabilities_of_two_kinds() -> None:
    both = {"importance_correction": "sequence", "importance_cap": 3.0}
    build(RLConfig, old_logprobs="recomputed", **both)
    for name, value in both.items():
        with pytest.raises(ValueError, match=f"{name} makes no sense with old_logprobs rollout: "):
            build(RLConfig, **{name: value})
    with pytest.raises(ValueError, match="importance_cap makes no sense without an importance_c"):
        build(RLConfig, old_logprobs="recomputed", importance_cap=3.0)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"gae_lambda": 0.9}, "it has no critic"),
        ({"vf_coef": 0.5}, "it has no critic"),
        ({"critic": "shared"}, "it has no critic"),
        ({"reward_at": "token"}, "its advantages are of whole completions"),
        ({"gamma": 0.9}, "its advantages are of whole completions"),
        ({"whiten_rewards": True}, "its advantages are of whole completions"),
    ],
)
def test_what_grpo_has_no_use_for_is_refused(option: dict[str, Any], reason: str) -> None:
    build(RLConfig, **option)
    [name] = option
    with pytest.raises(ValueError, match=f"{name} makes no sense with grpo: {reason}"):
        build(RLConfig, algorithm="grpo", num_samples=4, **option)


def test_grpo_needs_a_group() -> None:
    build(RLConfig, algorithm="grpo", num_samples=2, clip_range=0.3)
    with pytest.raises(ValueError, match="num_samples must be at least 2 with grpo"):
        build(RLConfig, algorithm="grpo")


def test_the_kl_penalty_is_the_algorithms_unless_it_is_set() -> None:
    def found(**options: Any) -> tuple[float, float, str]:
        kl = build(RLConfig, **options).kl
        return kl.reward_coef, kl.loss_coef, kl.estimator

    grpo = {"algorithm": "grpo", "num_samples": 2}
    assert found() == (0.05, 0.0, "k1")
    assert found(algorithm="reinforce") == (0.05, 0.0, "k1")
    assert found(**grpo) == (0.0, 0.0, "k3")
    assert found(**grpo, kl_coef=0.1) == (0.0, 0.1, "k3")
    assert found(**grpo, kl_coef=0.1, kl_in="reward") == (0.1, 0.0, "k1")
    assert found(kl_in="loss", kl_coef=0.2) == (0.0, 0.2, "k3")
    assert found(kl_in="loss", kl_estimator="k2") == (0.0, 0.05, "k2")
    assert found(kl_coef=0.0) == (0.0, 0.0, "k1")


@pytest.mark.parametrize(
    "option", [{"kl_in": "loss"}, {"kl_estimator": "k3"}, {"reference": "hydra"}]
)
def test_without_a_kl_penalty_there_is_no_reference_to_choose(option: dict[str, Any]) -> None:
    [name] = option
    options = {"frozen_layers": 1, **option}
    build(RLConfig, **options)
    with pytest.raises(ValueError, match=f"{name} makes no sense with kl_coef 0: there is no ref"):
        build(RLConfig, kl_coef=0.0, **options)
    with pytest.raises(ValueError, match=rf"{name} .* kl_coef 0 \(the default of grpo\)"):
        build(RLConfig, algorithm="grpo", num_samples=2, **options)


def test_the_eos_rule_is_of_whole_sequences() -> None:
    build(RLConfig, missing_eos_penalty=2.0)
    with pytest.raises(ValueError, match=r'missing_eos_penalty makes no sense with reward_at "tok'):
        build(RLConfig, missing_eos_penalty=2.0, reward_at="token")


def test_every_name_stands_for_something() -> None:
    for algorithm in ALGORITHMS:
        assert build(RLConfig, algorithm=algorithm, num_samples=2).algorithm == algorithm
