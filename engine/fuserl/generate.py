"""`fuserl generate`: prompts in, completions out as JSONL.

Completions finish in any order and are written in that of the prompts: each as soon as all before
it are.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from fuserl.config import GenerateConfig
from fuserl.data.examples import load_prompts
from fuserl.generation import FinishedCompletion
from fuserl.interrupt import Interrupted, InterruptFlag
from fuserl.rollout.engine import RolloutFacts
from fuserl.stages.opening import loading, open_policy, room_for_prompts, tell


def run_generate(config: GenerateConfig) -> None:
    """Write one line a completion: {"prompt", "completion", "token_ids", "logprobs",
    "finish_reason"}. Interrupted, it leaves the lines that are written, all of them whole."""
    _refuse_full_file(config)
    policy = open_policy(config)
    source = config.data if config.data is not None else [{"prompt": config.prompt}]
    room = room_for_prompts(policy.model.config, config.max_new_tokens)
    prompts, counts = load_prompts(
        source,
        policy.text_tokenizer,
        max_prompt_length=min(config.max_prompt_length, room),
        **loading(config, policy.notes),
    )
    tell("prompts", counts, file=sys.stderr)
    facts, progress = RolloutFacts(), _Progress(len(prompts) * config.num_samples, config)
    interrupt = InterruptFlag()
    finished = policy.stream(
        [prompt.ids for prompt in prompts],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        n=config.num_samples,
        seed=config.seed,
        eos_token_id=config.eos_token_id,
        ignore_eos=config.ignore_eos,
        stop=config.stop,
        stop_token_ids=config.stop_token_ids,
        num_slots=config.num_slots,
        kv_budget_bytes=config.kv_budget_bytes,
        on_step=interrupt.check,
        facts=facts,
    )
    if config.out is not None:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    screen = nullcontext(sys.stdout)
    with (
        Path(config.out).open("w", encoding="utf-8") if config.out else screen as file,
        progress,
        interrupt,
    ):
        for completion in in_order(progress.watch(finished)):
            line = {
                "prompt": prompts[completion.prompt_index].text,
                "completion": completion.text,
                "token_ids": completion.token_ids,
                "logprobs": completion.logprobs,
                "finish_reason": completion.finish_reason,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            progress.num_written += 1
    print(progress.summary(facts), file=sys.stderr)


def in_order(completions: Iterable[FinishedCompletion]) -> Iterator[FinishedCompletion]:
    """By index, each as soon as all before it are there."""
    waiting: dict[int, FinishedCompletion] = {}
    following = 0
    for completion in completions:
        waiting[completion.index] = completion
        while following in waiting:
            yield waiting.pop(following)
            following += 1


class _Progress:
    """The bar, and what became of all completions so far."""

    def __init__(self, num_completions: int, config: GenerateConfig) -> None:
        self._total, self._out = num_completions, config.out
        self.num_written, self._num_tokens = 0, 0
        self._finish_reasons: Counter[str] = Counter()

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        self._bar = tqdm(
            total=self._total, desc="generate", unit="completion", disable=self._out is None
        )

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._seconds = time.perf_counter() - self._began
        self._bar.close()
        if isinstance(error, Interrupted):
            where = "" if self._out is None else f" in {self._out}"
            raise Interrupted(
                f"generate stopped: the first {self.num_written:,} of {self._total:,} completions "
                f"are written{where}"
            ) from None

    def watch(self, completions: Iterable[FinishedCompletion]) -> Iterator[FinishedCompletion]:
        for completion in completions:
            self._num_tokens += len(completion.token_ids)
            self._finish_reasons[completion.finish_reason] += 1
            rate = self._num_tokens / (time.perf_counter() - self._began)
            self._bar.set_postfix({"tokens/s": f"{rate:,.0f}"}, refresh=False)
            self._bar.update()
            yield completion

    def summary(self, facts: RolloutFacts) -> str:
        reasons = self._finish_reasons
        return (
            f"completions: {self._total:,}, {self._num_tokens:,} tokens, "
            f"{self._num_tokens / self._seconds:,.0f} tokens/s; {reasons['stop']:,} ended by "
            f"stop, {reasons['length']:,} by length; {facts.num_slots:,} slots, "
            f"{facts.cache_bytes / 1e6:,.1f} MB of keys and values"
        )


def _refuse_full_file(config: GenerateConfig) -> None:
    """Before any work is done: ValueError for an --out that cannot be, or that would be lost."""
    if config.out is None:
        return
    out = Path(config.out)
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: give it a file")
    if files := [parent for parent in out.parents if parent.is_file()]:
        raise ValueError(f"--out {out} cannot be: {files[0]} is a file and no folder")
    if config.data is not None and out.exists() and out.samefile(config.data):
        raise ValueError(f"--out {out} holds the prompts: choose another --out")
    if config.overwrite:
        return
    if out.is_file() and out.stat().st_size:
        raise ValueError(f"{out} is not empty: choose another --out, or add --overwrite to lose it")
