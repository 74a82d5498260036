"""What every stage does first: tokenizer and notes of the model it starts from, and its rows."""

import dataclasses
from pathlib import Path
from typing import Any, TextIO

import torch

from fuserl.config import DataConfig
from fuserl.data.counts import Counts
from fuserl.device import default_device
from fuserl.model.config import DecoderConfig, small_config
from fuserl.model.heads import LanguageModel
from fuserl.model.notes import FolderNotes, read_notes
from fuserl.policy import Policy, load_policy, no_tokenizer
from fuserl.tokenizer import Tokenizer, load_tokenizer


def open_tokenizer(folder: Path, config: DataConfig) -> Tokenizer:
    """The folder's tokenizer, with the chat template asked for."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise no_tokenizer(folder)
    return with_chat_template(tokenizer, config)


def with_chat_template(tokenizer: Tokenizer, config: DataConfig) -> Tokenizer:
    if config.chat_template is None:
        return tokenizer
    return tokenizer.with_chat_template(Path(config.chat_template).read_text())


def open_notes(folder: Path | None, config: DataConfig) -> FolderNotes:
    """The folder's notes, with the prompt template asked for."""
    notes = read_notes(folder) if folder else FolderNotes()
    if config.prompt_template is None:
        return notes
    return dataclasses.replace(notes, prompt_template=config.prompt_template)


def open_policy(
    config: DataConfig, given: Policy | None = None, *, dtype: torch.dtype | None = None
) -> Policy:
    """The policy of config.model, or one that is handed over, with the templates asked for."""
    policy = given or load_policy(config.model, device=config.device, dtype=dtype)
    policy.release()  # training has another use for the memory
    device = policy.model.device
    if config.device is not None and default_device(config.device) != device:
        raise ValueError(f"device {config.device!r} was asked for, but the policy is on {device}")
    policy.tokenizer = with_chat_template(policy.text_tokenizer, config)
    if config.prompt_template is not None:
        policy.notes = dataclasses.replace(policy.notes, prompt_template=config.prompt_template)
    return policy


def untrained_policy(
    config: DataConfig,
    tokenizer: Tokenizer,
    notes: FolderNotes,
    vocab_size: int | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Policy:
    """The named small configuration config.model with random weights, for this tokenizer.
    vocab_size: default the tokenizer's. dtype: default float32."""
    sizes = dataclasses.replace(
        small_config(config.model, vocab_size or tokenizer.vocab_size),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LanguageModel(sizes)
    model.initialize(config.seed)
    model.to(device=default_device(config.device), dtype=dtype)
    return Policy(model, tokenizer, notes, config.model)


def room_for_prompts(model: DecoderConfig, max_new_tokens: int) -> int:
    """Tokens a prompt may have beside a whole completion."""
    room = model.max_positions - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens ({max_new_tokens}) leaves no room for a prompt in the model's "
            f"{model.max_positions} positions"
        )
    return room


def loading(config: DataConfig, notes: FolderNotes) -> dict[str, Any]:
    """The keyword arguments that every loader of rows takes."""
    return {
        "prompt_template": notes.prompt_template,
        "over_long": config.over_long,
        "skip_bad_rows": config.skip_bad_rows,
    }


def tell(name: str, counts: Counts, file: TextIO | None = None) -> None:
    """file: default stdout; stderr for a command whose stdout is its result."""
    print(f"{name}: {counts.summary()}", file=file, flush=True)
