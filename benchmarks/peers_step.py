"""Whole RL steps on work that other trainers can be given too: time by phase, and peak memory.

    python benchmarks/peers_step.py --algorithm grpo --model DIR --prompts FILE.json
    python benchmarks/peers_step.py --algorithm grpo --kl-coef 0.04 --model DIR --prompts FILE.json
    python benchmarks/peers_step.py --algorithm ppo --reward-model DIR --value-model DIR
        --num-epochs 1 --model DIR --prompts FILE.json

The work of a step: 64 sequences, prompts of exactly 32 tokens (FILE.json: a list of
{"ids": [...], "text": ...}, taken in order), exactly 64 new tokens (nothing ends a completion but
the limit), temperature 1 without truncation, fp32, one microbatch, AdamW at a constant 1e-4 without
decay, one optimizer step for each pass over the rollout.
    grpo: 8 prompts with 8 samples each, scored by the share of the letter e in the text (cheap,
        and can be learned), token mean, gradient norm at most 1; with --kl-coef a k3 penalty
        against the starting policy in the loss.
    ppo: 64 prompts, a reward model, a critic of its own, KL penalty k1 of 0.05 in the reward, gamma
        1, lambda 0.95, both clips 0.2, value loss times 0.1, no bound on the gradient.

Prints one line of JSON: medians over the steps after --warm-steps ones, in seconds. A step that
other processes disturbed (foreign: the cores they held meanwhile) is left out where enough quiet
ones are left.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fuserl.allocator import keep_freed_memory
from fuserl.batch import RolloutBatch
from fuserl.bench.report import describe_machine
from fuserl.config import RLConfig
from fuserl.data.examples import Prompt
from fuserl.optimizer import Optimizer
from fuserl.policy import load_policy
from fuserl.rewards import Reward
from fuserl.stages.rl_metrics import Clock
from fuserl.stages.rl_models import open_models
from fuserl.stages.rl_step import Learner, experience, learn
from fuserl.stages.trainable import make_trainable

NUM_SEQUENCES, PROMPT_LENGTH, NUM_NEW_TOKENS = 64, 32, 64
NUM_SAMPLES = {"ppo": 1, "grpo": 8}
QUIET = 0.1  # cores that other processes may hold
MIN_QUIET_STEPS = 3


@dataclass(frozen=True, slots=True)
class Reading:
    """Of the clocks, in seconds: wall, this process's CPU, and all CPUs' (0 where it is not told:
    then no step looks disturbed)."""

    wall: float
    own: float
    all: float

    @classmethod
    def now(cls) -> "Reading":
        wall, own = time.perf_counter(), time.process_time()
        stat = Path("/proc/stat")
        if not stat.exists():
            return cls(wall, own, 0.0)
        user, nice, system, _idle, _iowait, irq, softirq, steal = (
            int(field) for field in stat.read_text().split(maxsplit=9)[1:9]
        )
        ticks = user + nice + system + irq + softirq + steal
        return cls(wall, own, ticks / os.sysconf("SC_CLK_TCK"))


class TimedReward:
    """A reward that adds up what it takes."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.seconds = 0.0

    def __call__(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
        began = time.perf_counter()
        scores = self._reward(batch, prompts)
        self.seconds += time.perf_counter() - began
        return scores


class Trainer:
    """The loop body of fuserl.RLTrainer on fixed work, without files and logs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.config = config = config_of(args)
        self._prompts = read_prompts(args.prompts)
        policy = load_policy(args.model, dtype=torch.float32, device="cpu")
        make_trainable(policy.model, config)
        source = share_of_e if args.algorithm == "grpo" else args.reward_model
        models = open_models(config, source, policy)
        modules: dict[str, nn.Module] = {"policy": policy.model}
        if models.critic is not None:
            modules["critic"] = models.critic
        self._reward = TimedReward(models.reward)
        self.learner = Learner(
            policy=policy.model,
            models=dataclasses.replace(models, reward=self._reward),
            optimizer=Optimizer(modules, config, total_steps=config.steps * config.passes),
            config=config,
        )

    def step(self, number: int) -> dict[str, float]:
        """Train on one rollout. Returns seconds by phase, and what the scores were."""
        prompts, clock = self._chosen(number), Clock()
        self._reward.seconds = 0.0
        before = Reading.now()
        shaped = experience(self.learner, prompts, step=number, clock=clock)
        learned = learn(self.learner, shaped, step=number, clock=clock)
        after = Reading.now()
        if shaped.completion_lengths.tolist() != [NUM_NEW_TOKENS] * NUM_SEQUENCES:
            raise ValueError("the rollout gave other lengths than were asked for")
        total, own = after.wall - before.wall, after.own - before.own
        return {
            "total": total,
            "cpu": own,
            "foreign": max(0.0, after.all - before.all - own) / total,
            "gen": clock.seconds["rollout"],
            "score": clock.seconds["score"],
            "reward": self._reward.seconds,
            "shape": clock.seconds["shape"],
            "update": clock.seconds["update"],
            "mean_score": float(shaped.scores.mean()),
            "first_ratio": float(learned["first/val/ratio"]),
        }

    def _chosen(self, number: int) -> list[Prompt]:
        """In the file's order, each num_samples times; a short file is gone through again."""
        size = self.config.batch_size
        places = range(number * size, (number + 1) * size)
        chosen = [self._prompts[place % len(self._prompts)] for place in places]
        return [prompt for prompt in chosen for _ in range(self.config.num_samples)]


def config_of(args: argparse.Namespace) -> RLConfig:
    num_samples = NUM_SAMPLES[args.algorithm]
    own: dict[str, Any] = {"kl_coef": args.kl_coef, "max_grad_norm": 1.0}
    if args.algorithm == "ppo":
        own = {
            "critic_model": args.value_model,
            "reward_model": args.reward_model,
            "kl_coef": 0.05,
            "kl_estimator": "k1",
            "gamma": 1.0,
            "gae_lambda": 0.95,
            "value_clip_range": 0.2,
            "vf_coef": 0.1,
            "max_grad_norm": 0.0,
        }
    return RLConfig(
        model=args.model,
        data=args.prompts,
        out="",
        algorithm=args.algorithm,
        preset="trl",
        steps=args.warm_steps + args.steps,
        batch_size=NUM_SEQUENCES // num_samples,
        num_samples=num_samples,
        num_epochs=args.num_epochs,
        microbatch_size=NUM_SEQUENCES,
        max_new_tokens=NUM_NEW_TOKENS,
        temperature=1.0,
        clip_range=0.2,
        learning_rate=1e-4,
        schedule="constant",
        warmup_share=0.0,
        weight_decay=0.0,
        **own,
    )


def share_of_e(completions: Sequence[str], **_: Any) -> list[float]:
    """The reward of grpo."""
    return [text.count("e") / max(1, len(text)) for text in completions]


def read_prompts(file: str) -> list[Prompt]:
    prompts = []
    for number, row in enumerate(json.loads(Path(file).read_text())):
        where = f"{file}, entry {number}"
        if len(row["ids"]) != PROMPT_LENGTH:
            raise ValueError(f"{where}: {len(row['ids'])} ids, not {PROMPT_LENGTH}")
        prompts.append(Prompt(tuple(row["ids"]), row.get("text", ""), {}, where))
    return prompts


def least_disturbed(steps: list[dict[str, float]]) -> tuple[list[dict[str, float]], bool]:
    """The quiet steps and True, or where those are too few the quietest third and False."""
    quiet = [step for step in steps if step["foreign"] < QUIET]
    if len(quiet) >= MIN_QUIET_STEPS:
        return quiet, True
    number = max(MIN_QUIET_STEPS, len(steps) // 3)
    return sorted(steps, key=lambda step: step["foreign"])[:number], False


def summarize(args: argparse.Namespace, steps: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the steps after the warm-up; every one of those steps is in `samples`."""
    timed = steps[args.warm_steps :]
    used, is_quiet = least_disturbed(timed)
    median = {name: statistics.median(step[name] for step in used) for name in used[0]}
    num_tokens = NUM_SEQUENCES * NUM_NEW_TOKENS
    return {
        "what": f"fuserl_{args.algorithm}",
        "model": Path(args.model).name,
        "kl_coef": args.kl_coef if args.algorithm == "grpo" else 0.05,
        "epochs": args.num_epochs,
        "threads": torch.get_num_threads(),
        "steps": len(used),
        "seen": len(timed),
        "quiet": is_quiet,
        "foreign": median["foreign"],
        "total_s": median["total"],
        "gen_s": median["gen"],
        "scoring_fwd_s": median["score"],
        "reward_s": median["reward"],
        "logp_s": statistics.median(step["score"] - step["reward"] for step in used),
        "shape_s": median["shape"],
        "update_s": median["update"],
        "update_and_rest_s": statistics.median(
            step["total"] - step["gen"] - step["score"] for step in used
        ),
        "cpu_s": median["cpu"],
        "min_total_s": min(step["total"] for step in timed),
        "max_total_s": max(step["total"] for step in timed),
        "completion_tok_s": num_tokens / median["total"],
        "gen_tok_s": num_tokens / median["gen"],
        "peak_rss_mb": _peak_rss_mb(),
        "first_ratio": steps[0]["first_ratio"],
        "score_first": steps[0]["mean_score"],
        "score_last": steps[-1]["mean_score"],
        "samples": timed,
    }


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=list(NUM_SAMPLES), required=True)
    parser.add_argument("--model", required=True, help="folder of the policy, with a tokenizer")
    parser.add_argument("--prompts", required=True, help="JSON file")
    parser.add_argument("--reward-model", help="folder (ppo)")
    parser.add_argument("--value-model", help="folder that the critic starts from (ppo)")
    parser.add_argument("--num-epochs", type=int, default=1, help="passes over a rollout")
    parser.add_argument("--kl-coef", type=float, default=0.0, help="of the loss (grpo)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    folders = (args.reward_model, args.value_model)
    if (args.algorithm == "ppo") != all(folders) or any(folders) != all(folders):
        parser.error("ppo needs --reward-model and --value-model, and grpo takes neither")
    if args.algorithm == "ppo" and args.kl_coef:
        parser.error("--kl-coef is of grpo: that of ppo is fixed")
    if args.steps < MIN_QUIET_STEPS:
        parser.error(f"--steps must be at least {MIN_QUIET_STEPS}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as a run does
    trainer = Trainer(args)
    before = _peak_rss_mb()
    steps = [trainer.step(number) for number in range(args.warm_steps + args.steps)]
    found = {
        **summarize(args, steps),
        "rss_before_steps_mb": before,
        "machine": describe_machine("cpu", args.threads),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
