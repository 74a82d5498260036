"""A policy: language model and tokenizer of one folder, ready to speak and to train."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fuserl.data.prompt_template import PromptTemplate
from fuserl.device import default_device
from fuserl.model.adapter_folder import load_adapter
from fuserl.model.folder import check_vocabulary, load_language_model, read_config, save_model
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.hub import resolve_folder
from fuserl.model.lora import merged
from fuserl.model.notes import FolderNotes, read_notes, write_notes
from fuserl.rollout.decode import decode
from fuserl.rollout.requests import check_request, check_token_ids
from fuserl.rollout.sampling import SamplingParams
from fuserl.sequences import Sequences, completion_logprobs
from fuserl.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Generation:
    """One entry a completion: prompts' order, the samples of a prompt together."""

    token_ids: list[list[int]]
    """The EOS included, where one was sampled."""
    logprobs: list[list[float]]
    """Of each token, after the temperature and before truncation."""
    texts: list[str] | None
    """None for a policy without a tokenizer."""


class Policy:
    """What `load_policy` returns; the trainers train `policy.model` in place."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer | None, notes: FolderNotes, source: str
    ) -> None:
        self.model, self.tokenizer, self.notes, self.source = model, tokenizer, notes, source

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's, else the model configuration's."""
        return self.tokenizer.eos_token_id if self.tokenizer else self.model.config.eos_token_id

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer, for work that is text; ValueError for a policy without one."""
        if self.tokenizer is None:
            raise no_tokenizer(self.source)
        return self.tokenizer

    def encode(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids of texts put into the prompt template; token ids pass as they are."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of texts, got one text: [{prompts!r}]")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            return [list(prompt) for prompt in prompts]  # type: ignore[arg-type]
        if len(texts) != len(prompts):
            raise ValueError("prompts must be all texts or all token ids")
        if self.tokenizer is None:
            raise ValueError(f"{self.source} has no tokenizer: give prompts as lists of token ids")
        template = PromptTemplate.parse(self.notes.prompt_template)
        encoded = template.encode(texts, self.tokenizer)
        return [[*prompt.head, *prompt.tail] for prompt in encoded]

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int] = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        n: int = 1,
        seed: int = 0,
        eos_token_id: int | None = None,
        ignore_eos: bool = False,
        batch_size: int = 64,
        first_request_id: int = 0,
    ) -> Generation:
        """n completions of every prompt. Prompts are texts (put into the policy's prompt
        template) or token ids; max_new_tokens is one limit or one a prompt; eos_token_id
        overrides the tokenizer's; batch_size bounds the sequences decoded at a time and changes
        no draw. Completions are numbered from first_request_id, and a completion's draws depend
        on (seed, number) alone: calls that share a seed give each its own numbers.
        """
        sampling = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
        )
        if n < 1 or batch_size < 1:
            raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
        if eos_token_id is not None and not 0 <= eos_token_id < self.model.config.vocab_size:
            raise ValueError(
                f"eos_token_id {eos_token_id} is outside the vocabulary of "
                f"{self.model.config.vocab_size}"
            )
        prompt_ids = self.encode(prompts)
        if not prompt_ids:
            return Generation([], [], [] if self.tokenizer else None)
        limits = check_request(self.model.config, prompt_ids, max_new_tokens)
        eos = None if ignore_eos else self.eos_token_id if eos_token_id is None else eos_token_id
        token_ids: list[list[int]] = []
        logprobs: list[list[float]] = []
        wave = max(1, batch_size // n)
        for first in range(0, len(prompt_ids), wave):
            part = prompt_ids[first : first + wave]
            out = decode(
                self.model,
                part,
                max_new_tokens=limits[first : first + wave],
                sampling=sampling,
                eos_token_id=eos,
                num_samples=n,
                request_ids=[first_request_id + first * n + i for i in range(len(part) * n)],
            )
            for row, row_logprobs, length in zip(
                out.token_ids.tolist(), out.logprobs.tolist(), out.lengths.tolist(), strict=True
            ):
                token_ids.append(row[:length])
                logprobs.append(row_logprobs[:length])
        tokenizer = self.tokenizer
        texts = [tokenizer.decode(row) for row in token_ids] if tokenizer else None
        return Generation(token_ids, logprobs, texts)

    @torch.no_grad()
    def logprobs(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
    ) -> list[Tensor]:
        """The trainer's forward: log-probabilities of the completions' tokens, one fp32 tensor
        [completion length] a pair."""
        if len(prompt_ids) != len(completion_ids):
            raise ValueError(
                f"prompt_ids has {len(prompt_ids)} rows and completion_ids {len(completion_ids)}"
            )
        if not prompt_ids:
            return []
        for name, rows in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
            check_token_ids(self.model.config, name, rows)
        if not all(prompt_ids):
            raise ValueError("prompt_ids holds an empty prompt: it needs at least one token")
        sequences = Sequences.of(prompt_ids, completion_ids, self.model.device)
        logprobs = completion_logprobs(self.model, sequences, temperature)
        return list(logprobs.split([len(ids) for ids in completion_ids]))

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder: weights, configuration, tokenizer."""
        save_folder(folder, self.model, self.tokenizer, self.notes)


def save_folder(
    folder: str | Path,
    model: LanguageModel | ScalarModel,
    tokenizer: Tokenizer | None,
    notes: FolderNotes,
) -> None:
    """A model with all that its next stage needs, its adapters merged."""
    save_model(merged(model), folder)
    if tokenizer:
        tokenizer.save(folder)
    write_notes(notes, folder)


def no_tokenizer(source: str | Path) -> ValueError:
    return ValueError(
        f"{source} has no tokenizer files, and the rows are text: save a tokenizer into the "
        "folder with transformers' tokenizer.save_pretrained(folder)"
    )


def load_policy(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> Policy:
    """A policy from a Hugging Face folder or hub id.

    adapter: folder of low-rank adapters in PEFT's format, which are merged into the weights.
    dtype: default the checkpoint's on CUDA, fp32 on a CPU. device: default cuda:LOCAL_RANK, else
    cpu. A folder without a tokenizer works with token ids.
    """
    path = resolve_folder(folder)
    tokenizer = load_tokenizer(path)
    place = default_device(device)
    if dtype is None and place.type == "cpu":
        dtype = torch.float32
    if tokenizer:
        check_vocabulary(read_config(path), tokenizer.vocab_size, path)
    model = load_language_model(path, device=place, dtype=dtype)
    if adapter is not None:
        load_adapter(model, adapter)
        model = merged(model)
    return Policy(model, tokenizer, read_notes(path), str(folder))
