"""What the training-step benchmark trains: two models, two batches of rows, and the fp64 truth."""

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fuserl.bench.rivals import load
from fuserl.bench.truth import Error
from fuserl.data.examples import PromptCompletion
from fuserl.model.config import DecoderConfig
from fuserl.model.config_json import config_to_hf
from fuserl.model.families import FAMILIES
from fuserl.model.heads import LanguageModel
from fuserl.model.weights import hf_state, load_hf_state

MAX_LENGTH = 512
_MEDIAN_LENGTH, _SPREAD = 96, 0.8  # of the log-normal distribution
_NUM_ROWS = 32
_SEED = 0


def _sizes(hidden_size: int, num_layers: int, num_heads: int, vocab_size: int) -> DecoderConfig:
    return DecoderConfig(
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 3 // 32) * 32,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=vocab_size,
        max_positions=MAX_LENGTH,
    )


MODELS = {
    "tiny": _sizes(32, 2, 2, 128),
    "3M": _sizes(192, 4, 6, 4096),
    "25M": _sizes(512, 6, 8, 12_288),
}
"""tiny is for tests; the others have 2.6 and 25.3 million parameters, embeddings tied."""

BATCHES = ("ragged", "equal")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCase:
    """One model, batch and dtype."""

    model: str
    """A key of MODELS."""
    batch: str
    """One of BATCHES."""
    dtype: str
    """fp32 or bf16: of the products."""
    device: str
    num_rows: int = _NUM_ROWS
    max_length: int = MAX_LENGTH

    @property
    def title(self) -> str:
        return f"training step, {self.model}, {self.batch} lengths, {self.dtype} {self.device}"


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one forward and backward."""

    loss: float
    gradients: dict[str, Tensor]  # by transformers' names


class StepProblem:
    """Rows, transformers' model with random weights in fp32, and what a step must find."""

    def __init__(self, case: StepCase) -> None:
        """Raises Unavailable without transformers."""
        self.case = case
        self.config = MODELS[case.model]
        self.rows = make_rows(case, self.config.vocab_size)
        self.source = make_source(self.config, case.device)
        if case.dtype == "bf16":  # every provider starts from the same numbers
            convert(convert(self.source, torch.bfloat16), torch.float32)

    def our_model(self, dtype: torch.dtype) -> LanguageModel:
        model = LanguageModel(self.config)
        load_hf_state(model, self.source.state_dict())
        return model.to(device=self.case.device, dtype=dtype)

    def padded(self) -> dict[str, Tensor]:
        """The rows as transformers takes them: right-padded, -100 where nothing is learned."""
        width = max(map(len, map(_ids, self.rows)))
        shape = (len(self.rows), width)
        token_ids = torch.zeros(shape, dtype=torch.int64)
        mask, labels = torch.zeros_like(token_ids), torch.full(shape, -100)
        for number, row in enumerate(self.rows):
            ids = torch.tensor(_ids(row))
            token_ids[number, : len(ids)] = ids
            mask[number, : len(ids)] = 1
            labels[number, len(row.prompt_ids) : len(ids)] = ids[len(row.prompt_ids) :]
        batch = {"input_ids": token_ids, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(self.case.device) for name, tensor in batch.items()}

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(len(_ids(row)) for row in self.rows)

    @property
    def num_completion_tokens(self) -> int:
        return sum(len(row.completion_ids) for row in self.rows)

    @cached_property
    def truth(self) -> Answer:
        """By transformers' module in float64, a row at a time: no padding, no mask."""
        model = copy.deepcopy(self.source).double()
        total = 0.0
        for row in self.rows:
            ids = torch.tensor([_ids(row)], device=self.case.device)
            first = len(row.prompt_ids)
            logits = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum")
            (loss / self.num_completion_tokens).backward()
            total += float(loss.detach())
        return Answer(total / self.num_completion_tokens, gradients_of(model))

    def error(self, answer: Answer) -> Error:
        """Absolute of the loss, relative (2-norm) of all gradients together; infinite for NaN."""
        wrong = right = 0.0
        for name, true in self.truth.gradients.items():
            wrong += float((answer.gradients[name].double() - true).square().sum())
            right += float(true.square().sum())
        errors = (abs(answer.loss - self.truth.loss), math.sqrt(wrong / right))
        return Error(*(error if math.isfinite(error) else math.inf for error in errors))


def make_rows(case: StepCase, vocab_size: int) -> list[PromptCompletion]:
    """Half of each row is its prompt. ragged: log-normal lengths; equal: each of their mean."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(case.num_rows, generator=generator).mul(_SPREAD).exp() * _MEDIAN_LENGTH
    lengths = drawn.round().long().clamp(4, case.max_length).tolist()
    if case.batch == "equal":
        lengths = [round(sum(lengths) / len(lengths))] * len(lengths)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        half = length // 2
        rows.append(PromptCompletion(tuple(ids[:half]), tuple(ids[half:]), f"row {number}"))
    return rows


def make_source(config: DecoderConfig, device: str = "cpu") -> Any:
    """transformers' model of the config's family in fp32, with weights that let every part
    matter."""
    settings = {
        "initializer_range": config.hidden_size**-0.5,
        "attn_implementation": "sdpa",
        "dtype": "float32",
    }
    theirs = load("transformers", "AutoConfig").for_model(**config_to_hf(config) | settings)
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []), torch.device(device):
        torch.manual_seed(_SEED)
        return load("transformers", FAMILIES[config.family].language_model)(theirs).train()


def convert(model: Any, dtype: torch.dtype) -> Any:
    """Weights alone, as transformers loads them: `model.to` would round the rotary frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Of transformers' module, by name; dropped from the module."""
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def our_gradients(model: LanguageModel) -> dict[str, Tensor]:
    """The same of ours, under transformers' names; dropped from the model."""
    holder = copy.deepcopy(model).float()
    with torch.no_grad():
        for held, parameter in zip(holder.parameters(), model.parameters(), strict=True):
            assert parameter.grad is not None
            held.copy_(parameter.grad)
    model.zero_grad(set_to_none=True)
    return hf_state(holder)


def _ids(row: PromptCompletion) -> tuple[int, ...]:
    return row.prompt_ids + row.completion_ids
