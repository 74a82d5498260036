"""`fuserl generate`: prompts in, completions out as JSONL."""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from fuserl.config import GenerateConfig
from fuserl.data.examples import load_prompts
from fuserl.stages.opening import loading, open_policy, room_for_prompts, tell


def run_generate(config: GenerateConfig) -> None:
    """Write one line a completion: {"prompt", "completion", "token_ids", "logprobs"}."""
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
    if config.out is not None:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    num_tokens, began = 0, time.perf_counter()
    bar = tqdm(total=len(prompts), desc="generate", unit="prompt", disable=config.out is None)
    screen = nullcontext(sys.stdout)
    with Path(config.out).open("w", encoding="utf-8") if config.out else screen as file, bar:
        for first in range(0, len(prompts), config.batch_size):
            part = prompts[first : first + config.batch_size]
            out = policy.generate(
                [prompt.ids for prompt in part],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
                n=config.num_samples,
                seed=config.seed,
                batch_size=config.batch_size,
                first_request_id=first * config.num_samples,
            )
            for i, (token_ids, logprobs) in enumerate(
                zip(out.token_ids, out.logprobs, strict=True)
            ):
                line = {
                    "prompt": part[i // config.num_samples].text,
                    "completion": policy.text_tokenizer.decode(token_ids),
                    "token_ids": token_ids,
                    "logprobs": logprobs,
                }
                num_tokens += len(token_ids)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            bar.update(len(part))
            bar.set_postfix({"tokens/s": f"{num_tokens / (time.perf_counter() - began):.0f}"})
