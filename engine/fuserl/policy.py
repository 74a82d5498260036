"""A policy: language model and tokenizer of one folder, ready to speak and to train."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fuserl.data.prompt_template import PromptTemplate
from fuserl.device import default_device
from fuserl.generation import FinishedCompletion, Generation
from fuserl.model.adapter_folder import load_adapter
from fuserl.model.folder import check_vocabulary, load_language_model, read_config, save_model
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.hub import resolve_folder
from fuserl.model.lora import merged
from fuserl.model.notes import FolderNotes, read_notes, write_notes
from fuserl.rollout import engine
from fuserl.rollout.kept_runner import RolloutMemory
from fuserl.rollout.requests import (
    Completion,
    End,
    PromptRequest,
    check_request,
    check_token_ids,
)
from fuserl.rollout.runner import RunnerOptions
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule
from fuserl.sequences import Sequences, completion_logprobs
from fuserl.tokenizer import Tokenizer, load_tokenizer


class Policy:
    """What `load_policy` returns; the trainers train `policy.model` in place.

    On a GPU what `generate` and `stream` made for decoding, a cache and captured graphs, waits for
    the next call if others have room beside it: see `release`.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer | None, notes: FolderNotes, source: str
    ) -> None:
        self.model, self.tokenizer, self.notes, self.source = model, tokenizer, notes, source
        self._rollouts = RolloutMemory(share=None)

    def release(self) -> None:
        """Give the device back what the last calls of `generate` and `stream` left for the next: a
        cache of at most two fifths of what was free, and its graphs. The trainers do it before
        they begin. The next call makes it anew; on a CPU there is nothing."""
        self._rollouts.release()
        self._rollouts = RolloutMemory(share=None)

    @property
    def _keeps(self) -> bool:
        return self.model.device.type == "cuda"

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's, else the model configuration's."""
        return self.tokenizer.eos_token_id if self.tokenizer else self.model.config.eos_token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """All ids that end a completion: `eos_token_id`, and those that generation_config.json
        lists, else config.json. Ids outside the vocabulary, which a folder may list, are never
        drawn and left out."""
        config = self.model.config
        default = config.source.get("eos_token_id", config.eos_token_id)
        listed = config.generation.get("eos_token_id", default)
        several = listed if isinstance(listed, list) else [listed]
        ids = {self.eos_token_id, *several}
        return frozenset(i for i in ids if isinstance(i, int) and 0 <= i < config.vocab_size)

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
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        num_slots: int | None = None,
        kv_budget_bytes: int | None = None,
        first_request_id: int = 0,
    ) -> Generation:
        """n completions of every prompt.

        prompts: texts (put into the policy's prompt template) or token ids. max_new_tokens: one
        limit, or one a prompt. eos_token_id: the one EOS of this call, instead of
        `eos_token_ids`; with ignore_eos there is none. stop: strings that end a completion once
        its text holds one; the prompt does not count, nor do special tokens, which are no text.
        stop_token_ids: ids that end one beside the EOS, with ignore_eos too. num_slots: sequences
        decoded at a time, kv_budget_bytes: memory for their keys and values; neither changes a
        draw. Completions are numbered from first_request_id, and a completion's draws depend on
        (seed, number) alone: calls that share a seed give each its own numbers.

        A completion that ends by a stop string keeps all its token ids, which are what was
        sampled; its text is cut before the string.
        """
        facts = engine.RolloutFacts()
        completions = self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            n=n,
            seed=seed,
            eos_token_id=eos_token_id,
            ignore_eos=ignore_eos,
            stop=stop,
            stop_token_ids=stop_token_ids,
            num_slots=num_slots,
            kv_budget_bytes=kv_budget_bytes,
            first_request_id=first_request_id,
            facts=facts,
        )
        return Generation.of(completions, facts, has_texts=self.tokenizer is not None)

    def stream(
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
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        num_slots: int | None = None,
        kv_budget_bytes: int | None = None,
        first_request_id: int = 0,
        on_step: Callable[[], None] | None = None,
        facts: engine.RolloutFacts | None = None,
    ) -> Iterator[FinishedCompletion]:
        """The completions of `generate`, in the order in which they finish. The request is checked
        at once, and computed as the iterator is drawn from.

        on_step is called every few tokens and may raise to give the rest up; facts: filled in.
        """
        sampling = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
        )
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if num_slots is not None and num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        rule = self._stop_rule(eos_token_id, ignore_eos, stop, stop_token_ids)
        prompt_ids = self.encode(prompts)
        if not prompt_ids:
            return iter(())
        limits = check_request(self.model.config, prompt_ids, max_new_tokens)
        requests = [
            PromptRequest(
                ids=ids,
                max_new_tokens=limit,
                request_ids=range(first_request_id + i * n, first_request_id + (i + 1) * n),
            )
            for i, (ids, limit) in enumerate(zip(prompt_ids, limits, strict=True))
        ]
        completions = engine.generate(
            self.model,
            requests,
            RunnerOptions(sampling=sampling, stop=rule),
            num_slots=num_slots,
            kv_budget_bytes=kv_budget_bytes,
            on_step=on_step,
            facts=facts,
            memory=self._rollouts if self._keeps else None,
        )
        return (self._finished(completion, n, rule) for completion in completions)

    def _stop_rule(
        self,
        eos_token_id: int | None,
        ignore_eos: bool,
        stop: str | Sequence[str],
        stop_token_ids: Sequence[int],
    ) -> StopRule:
        own = frozenset() if ignore_eos or eos_token_id is not None else self.eos_token_ids
        return StopRule.of(
            None if ignore_eos else eos_token_id,
            stop_token_ids={*own, *stop_token_ids},
            stop=stop,
            tokenizer=self.tokenizer,
            vocab_size=self.model.config.vocab_size,
        )

    def _finished(self, completion: Completion, n: int, rule: StopRule) -> FinishedCompletion:
        token_ids = completion.token_ids.tolist()
        return FinishedCompletion(
            index=completion.index,
            prompt_index=completion.index // n,
            token_ids=token_ids,
            logprobs=completion.logprobs.tolist(),
            truncated_logprobs=completion.truncated_logprobs.tolist(),
            text=rule.cut(self.tokenizer.decode(token_ids)) if self.tokenizer else None,
            finish_reason="stop" if completion.end is End.STOP else "length",
        )

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
