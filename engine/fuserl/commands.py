"""From a configuration to the stage it describes."""

from dataclasses import asdict

from fuserl.config import BenchConfig, RewardConfig, RLConfig, SFTConfig


def sft(config: SFTConfig) -> None:
    from fuserl.stages.sft import SFTTrainer

    _tell(config.out, SFTTrainer(**asdict(config)).train())


def reward(config: RewardConfig) -> None:
    from fuserl.stages.reward import RewardTrainer

    _tell(config.out, RewardTrainer(**asdict(config)).train())


def rl(config: RLConfig) -> None:
    from fuserl.stages.rl import RLTrainer

    options = asdict(config)
    model, reward_model = options.pop("model"), options.pop("reward_model")
    if reward_model is None:
        raise ValueError("reward_model is missing (a Python function needs fuserl.RLTrainer)")
    _tell(config.out, RLTrainer(model, reward=reward_model, **options).train())


def bench(config: BenchConfig) -> None:
    from fuserl.bench import lora_linear, rl_step, rollout, run, training_step

    if config.op == training_step.NAME:
        training_step.run_training_step(config)
    elif config.op == rl_step.NAME:
        rl_step.run_rl_step(config)
    elif config.op == rollout.NAME:
        rollout.run_rollout(config)
    elif config.op == lora_linear.NAME:
        lora_linear.run_lora_linear(config)
    else:
        run.run_bench(config)


def _tell(out: str, summary: dict[str, object]) -> None:
    numbers = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in summary.items()
        if name != "stage"
    )
    print(f"{out}: {numbers}")
