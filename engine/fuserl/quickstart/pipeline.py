"""`fuserl quickstart`: corpus, SFT, reward model, PPO, and a report of what came of it."""

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuserl.config import QuickstartConfig
from fuserl.policy import Policy, load_policy
from fuserl.quickstart.corpus import gold_scores, make_rows
from fuserl.quickstart.report import verdict, write_report
from fuserl.run import holds_run, remove_run
from fuserl.stages.reward import RewardTrainer
from fuserl.stages.rl import RLTrainer
from fuserl.stages.sft import SFTTrainer
from fuserl.statistics import bootstrap_ci95

NUM_TRAIN, NUM_HELD_OUT = 8000, 500
TEMPLATE = "{prompt} TL;DR:"
TEMPERATURE = 0.7
MAX_NEW_TOKENS = 24

SFT: dict[str, Any] = {"epochs": 3, "learning_rate": 3e-3, "validate_every": 50}
REWARD: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3, "validate_every": 50}
PPO: dict[str, Any] = {
    "steps": 60,
    "batch_size": 64,
    "microbatch_size": 64,
    "learning_rate": 3e-4,
    "temperature": TEMPERATURE,
    "max_new_tokens": MAX_NEW_TOKENS,
}

STAGES = ("sft", "reward", "policy")
"""Their folders, in the order in which each builds on those before."""

Rows = list[dict[str, str]]


def run_quickstart(config: QuickstartConfig) -> None:
    """Leaves in config.out: report.html, plots/, metrics.jsonl, summary.json, the corpus in
    data/, and the models as Hugging Face folders sft/, reward/ and policy/."""
    out = Path(config.out)
    _prepare(config)
    train = make_rows(NUM_TRAIN, seed=config.seed, part="train")
    held_out = make_rows(NUM_HELD_OUT, seed=config.seed, part="held-out")
    rows = held_out["demonstrations"]

    def options(stage: str) -> dict[str, Any]:
        resume = holds_run(out / stage)
        overwrite = not resume and (config.resume or config.overwrite)
        return {"out": out / stage, "seed": config.seed, "resume": resume, "overwrite": overwrite}

    sft = SFTTrainer(
        "tiny",
        data=train["demonstrations"],
        validation_data=held_out["demonstrations"],
        prompt_template=TEMPLATE,
        **SFT,
        **options("sft"),
    ).train()
    files = _write_rows(out / "data", train=train, held_out=held_out)  # the seed is not refused
    reward = RewardTrainer(
        out / "sft",
        data=files["train_preferences"],
        validation_data=files["held_out_preferences"],
        **REWARD,
        **options("reward"),
    ).train()
    ppo = RLTrainer(
        out / "sft",
        data=files["train_demonstrations"],
        reward=out / "reward",
        monitors={"gold": gold_scores},
        algorithm="ppo",
        **PPO,
        **options("policy"),
    ).train()

    before, after = load_policy(out / "sft"), load_policy(out / "policy")
    samples_before, samples_after = _sample(before, rows, config), _sample(after, rows, config)
    gold_before, gold_after = _gold(samples_before[0], rows), _gold(samples_after[0], rows)
    gain = [b - a for a, b in zip(gold_before, gold_after, strict=True)]
    summary = {
        "reward_accuracy": reward["validation/accuracy"],
        "gold_before": _mean(gold_before),
        "gold_after": _mean(gold_after),
        "gold_gain_ci95": bootstrap_ci95(gain, seed=config.seed),
        "kl": _kl(before, after, rows, samples_after[1]),
        "rollout_tokens_per_second": ppo["rollout_tokens_per_second"],
        "seconds": {
            "sft": sft["seconds"],
            "reward": reward["seconds"],
            "ppo": ppo["seconds"],
        },
        "peak_memory_mb": _peak_memory_mb(),
        "held_out_prompts": len(rows),
        "seed": config.seed,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _join_metrics(out)
    examples = [
        {
            "document": row["prompt"],
            "ideal": row["ideal"],
            "before": text_before,
            "after": text_after,
            "gold_before": score_before,
            "gold_after": score_after,
        }
        for row, text_before, text_after, score_before, score_after in zip(
            rows, samples_before[0], samples_after[0], gold_before, gold_after, strict=True
        )
    ]
    write_report(out, summary, examples[:12])
    print(verdict(summary))
    print(f"report: {out / 'report.html'}")


def _prepare(config: QuickstartConfig) -> None:
    """Refuse to lose a run unasked. Of one to resume, keep the stages up to the first that is
    unfinished; what comes after it was built on something else."""
    out = Path(config.out)
    finished = (out / "summary.json").exists()
    begun = finished or any(holds_run(out / stage) for stage in STAGES)
    if begun and not (config.resume or config.overwrite):
        kind = "a finished" if finished else "an unfinished"
        raise ValueError(f"{out} holds {kind} run: add --resume, or --overwrite to lose it")
    if config.resume and not begun:
        raise ValueError(f"there is no run to resume in {out}")
    keep = config.resume
    for stage in STAGES:
        if begun and not keep:
            remove_run(out / stage)
        keep = keep and (out / stage / "summary.json").exists()
    if not keep:
        (out / "summary.json").unlink(missing_ok=True)


def _sample(
    policy: Policy, rows: Rows, config: QuickstartConfig
) -> tuple[list[str], list[list[int]]]:
    out = policy.generate(
        [row["prompt"] for row in rows],
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=TEMPERATURE,
        seed=config.seed + 1,
    )
    assert out.texts is not None
    return out.texts, out.token_ids


def _gold(texts: Sequence[str], rows: Rows) -> list[float]:
    return gold_scores([row["prompt"] for row in rows], texts, [row["ideal"] for row in rows])


def _kl(before: Policy, after: Policy, rows: Rows, token_ids: list[list[int]]) -> float:
    """Mean over completions of the summed log-ratio, in nats, at the sampling temperature."""
    prompt_ids = after.encode([row["prompt"] for row in rows])
    ours = after.logprobs(prompt_ids, token_ids, temperature=TEMPERATURE)
    reference = before.logprobs(prompt_ids, token_ids, temperature=TEMPERATURE)
    return _mean([float((a - b).sum()) for a, b in zip(ours, reference, strict=True)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)


def _write_rows(folder: Path, **parts: dict[str, Rows]) -> dict[str, str]:
    """Every set of rows as a JSONL file; returns the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, sets in parts.items():
        for kind, rows in sets.items():
            path = folder / f"{part}_{kind}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[path.stem] = str(path)
    return files


def _join_metrics(out: Path) -> None:
    parts = [(out / stage / "metrics.jsonl").read_text() for stage in ("sft", "reward", "policy")]
    (out / "metrics.jsonl").write_text("".join(parts))
