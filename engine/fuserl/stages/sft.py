"""Supervised fine-tuning: next-token loss on the completions, or on every token."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fuserl.checkpoint import digest, digest_ids, digest_tokenizer
from fuserl.config import SFTConfig
from fuserl.data.examples import PromptCompletion, load_completions
from fuserl.data.formats import training_texts
from fuserl.data.rows import Source, read_rows, source_name
from fuserl.model.config import SMALL_NAMES, small_config
from fuserl.model.heads import LanguageModel
from fuserl.optimizer import Optimizer
from fuserl.policy import Policy
from fuserl.run import Run, prepare_folder
from fuserl.sequences import Sequences, completion_loss
from fuserl.stages.opening import (
    loading,
    open_notes,
    open_policy,
    tell,
    untrained_policy,
    with_chat_template,
)
from fuserl.stages.supervised import evaluate_on, plan_epochs, train_on
from fuserl.stages.trainable import adapt, make_trainable, save_trained, training_dtype
from fuserl.tokenizer import train_tokenizer


class SFTTrainer:
    """SFTTrainer("folder", data="rows.jsonl", out="runs/sft", epochs=2).train()

    model: a folder, a hub id, a named small configuration (a model and tokenizer from scratch),
    or a Policy. data, validation_data: a file, or a list of dicts. options: SFTConfig's fields.
    """

    def __init__(
        self,
        model: str | Path | Policy,
        *,
        data: Source,
        out: str | Path,
        validation_data: Source | None = None,
        **options: Any,
    ) -> None:
        # A tokenizer trained on the rows reads them once more: a generator would be spent.
        self._data = data if isinstance(data, str | os.PathLike) else list(data)
        self._validation_data = validation_data
        self._given = model if isinstance(model, Policy) else None
        self.config = SFTConfig(
            model=model.source if isinstance(model, Policy) else str(model),
            data=source_name(data),
            out=str(out),
            validation_data=None if validation_data is None else source_name(validation_data),
            **options,
        )

    def train(self) -> dict[str, Any]:
        """Train and save; returns what summary.json says."""
        config = self.config
        if (finished := prepare_folder("sft", config)) is not None:
            return finished
        policy = self._policy()
        make_trainable(policy.model, config)
        examples = self._load(self._data, policy, "data")
        objective = CompletionLoss(policy.model, examples)
        text_objective = CompletionLoss(policy.model, [_whole_text(e) for e in examples])
        validation = None
        if self._validation_data is not None:
            held_out = self._load(self._validation_data, policy, "validation data")
            validation = CompletionLoss(policy.model, held_out)
        plan = plan_epochs(
            [text_objective] * config.lm_epochs + [objective] * config.epochs,
            config.batch_size,
            seed=config.seed,
        )
        adapt(policy.model, config, seed=config.seed)
        modules = {"policy": policy.model}
        optimizer = Optimizer(modules, config, total_steps=len(plan))
        facts = {
            "data": digest_ids((e.prompt_ids, e.completion_ids) for e in examples),
            "tokenizer": digest_tokenizer(policy.text_tokenizer),
            "starting policy": digest(policy.model),
        }
        with Run(
            "sft",
            config,
            total_steps=len(plan),
            modules=modules,
            optimizer=optimizer,
            facts=facts,
        ) as run:
            last = train_on(
                run,
                plan,
                optimizer,
                config,
                validate=lambda: evaluate_on(validation, config.microbatch_size),
                validate_every=config.validate_every,
            )
            policy.model = save_trained(
                run.out, policy.model, policy.tokenizer, policy.notes, base=policy.source
            )
            return run.finish({"steps": len(plan), "rows": len(examples), **last})

    def _policy(self) -> Policy:
        config = self.config
        if self._given is None and config.model in SMALL_NAMES:
            if config.lora_rank:
                raise ValueError(
                    f"lora_rank is for a model that was trained before: {config.model} starts "
                    "from random weights, which adapters would leave as they are"
                )
            return _from_scratch(config, self._data)
        if config.vocab_size is not None:
            raise ValueError("vocab_size is for a model from scratch: this one brings its own")
        return open_policy(config, self._given, dtype=training_dtype(config))

    def _load(self, source: Source, policy: Policy, name: str) -> list[PromptCompletion]:
        config = self.config
        examples, counts = load_completions(
            source,
            policy.text_tokenizer,
            max_length=min(config.max_length, policy.model.config.max_positions),
            **loading(config, policy.notes),
        )
        tell(name, counts)
        return examples


class CompletionLoss:
    """Mean negative log-likelihood of the completion tokens (an Objective of supervised.py)."""

    def __init__(self, model: LanguageModel, examples: Sequence[PromptCompletion]) -> None:
        self._model, self._examples = model, examples
        self.lengths = [len(e.prompt_ids) + len(e.completion_ids) for e in examples]

    def weight(self, rows: Sequence[int]) -> int:
        return sum(len(self._examples[row].completion_ids) for row in rows)

    def loss(self, rows: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        examples = [self._examples[row] for row in rows]
        sequences = Sequences.of(
            [e.prompt_ids for e in examples],
            [e.completion_ids for e in examples],
            self._model.device,
        )
        return completion_loss(self._model, sequences), {}


def _whole_text(example: PromptCompletion) -> PromptCompletion:
    """The same tokens, trained from the second one on: language modelling."""
    first, *rest = example.prompt_ids
    return dataclasses.replace(
        example, prompt_ids=(first,), completion_ids=(*rest, *example.completion_ids)
    )


def _from_scratch(config: SFTConfig, data: Source) -> Policy:
    """A small model with random weights, and a tokenizer trained on the rows' text."""
    notes = open_notes(None, config)
    vocab_size = small_config(config.model, config.vocab_size).vocab_size
    rows, _ = read_rows(data, skip_bad_rows=config.skip_bad_rows)
    tokenizer = train_tokenizer(training_texts(rows, notes.prompt_template), vocab_size)
    tokenizer = with_chat_template(tokenizer, config)
    return untrained_policy(config, tokenizer, notes, dtype=training_dtype(config))
