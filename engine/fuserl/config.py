"""What each stage can be told: one frozen dataclass a stage, which is also its flags and its YAML.

Nothing here imports torch: `fuserl --help` reads this file alone.
"""

from dataclasses import dataclass, fields
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

from fuserl.algorithms import ALGORITHMS, KLPenalty
from fuserl.rollout.sampling import SamplingParams


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:  # NaN too is refused
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def _refuse_unknown_choices(config: object) -> None:
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        for part in (kind, *get_args(kind)):  # a Literal, or a Literal | None
            if get_origin(part) is Literal and value not in (*get_args(part), *_none_of(kind)):
                raise ValueError(f"{name} must be one of {get_args(part)}, got {value!r}")


def _none_of(kind: object) -> list[None]:
    return [None] if NoneType in get_args(kind) else []


def _refuse_resume_and_overwrite(resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: go on, or start again?")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What every command that reads a model and rows shares."""

    model: str
    """Hugging Face folder or hub id (sft also: tiny, small or medium, from scratch)."""
    data: str
    """JSONL file of rows."""
    seed: int = 0
    """Of everything random: initial weights, the order of the data, the sampler, the bootstrap."""
    prompt_template: str | None = None
    """Text around a plain prompt, such as "{prompt} TL;DR:". Default: what the model's folder
    says, else the prompt alone. It is kept with a trained model."""
    chat_template: str | None = None
    """Jinja file for conversational rows, where the tokenizer brings no template."""
    over_long: Literal["filter", "truncate"] = "filter"
    """Rows longer than the limit are left out, or lose the end of their prompt; counted."""
    skip_bad_rows: bool = False
    """Count rows that cannot be read and go on, instead of stopping at the first."""
    device: str | None = None
    """Default: the CUDA device of LOCAL_RANK if there is one, else the CPU."""

    def __post_init__(self) -> None:
        _refuse_unknown_choices(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(DataConfig):
    """What every training stage shares."""

    out: str
    """Folder for the trained model, metrics.jsonl, summary.json and the checkpoint."""
    resume: bool = False
    """Go on with the run in --out, with the same options, data and models as before."""
    overwrite: bool = False
    """Lose the run or model that --out holds. Files that are none of ours stay."""
    batch_size: int = 32
    """Rows of one optimizer step, prompts of one rollout."""
    microbatch_size: int = 32
    """Rows of one forward and backward; it changes memory, never the result."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate goes from its peak to zero (constant: it stays)."""
    warmup_share: float = 0.03
    """Share of the optimizer steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """The gradient of each model is scaled down to this norm (0: never, as in n+)."""
    save_every: int = 200
    """Steps between checkpoints (0: only when interrupted)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights that compute and are saved. bfloat16 trains through float32 masters. auto:
    float32, but on CUDA bfloat16 for a bfloat16 checkpoint."""
    activation_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations: less
    memory, a third more work, the same result."""
    frozen_layers: float = 0
    """How many of the lowest layers stay as they are, with the embeddings (and a head tied to
    them); below 1, the share of them. The critic's too. 0: everything trains."""
    lora_rank: int = 0
    """Rank of low-rank adapters, which train instead of the weights (0: none). The critic has its
    own. The reference is then the policy without its adapters."""
    lora_alpha: float | None = None
    """Adapters are scaled by this over their rank. Default: twice the rank."""
    lora_targets: str = "all-linear"
    """Which modules have adapters: ends of Hugging Face's names with commas between, such as
    q_proj,v_proj; all-linear: every product in the layers."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        _require_positive(self, "batch_size", "microbatch_size", "learning_rate")
        if not self.max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm must not be negative, got {self.max_grad_norm}")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share must be in [0, 1), got {self.warmup_share}")
        _refuse_resume_and_overwrite(self.resume, self.overwrite)
        if self.save_every < 0:
            raise ValueError(f"save_every must not be negative, got {self.save_every}")
        if not self.frozen_layers >= 0 or (self.frozen_layers > 1 and self.frozen_layers % 1):
            raise ValueError(
                "frozen_layers must be a number of layers or a share of them below 1, "
                f"got {self.frozen_layers}"
            )
        self._check_lora()

    def _check_lora(self) -> None:
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must not be negative, got {self.lora_rank}")
        if self.lora_alpha is not None:
            _require_positive(self, "lora_alpha")
        if not all(name.strip() for name in self.lora_targets.split(",")):
            raise ValueError(
                f"lora_targets must be names with commas between, got {self.lora_targets!r}"
            )
        if self.lora_rank and self.frozen_layers:
            raise ValueError(
                "lora_rank and frozen_layers exclude each other: with adapters all weights are "
                "frozen (lora_targets chooses where adapters are)"
            )
        if not self.lora_rank and (self.lora_alpha, self.lora_targets) != (None, "all-linear"):
            raise ValueError("lora_alpha and lora_targets make no sense without a lora_rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedConfig(TrainConfig):
    """What sft and reward share."""

    validation_data: str | None = None
    """JSONL file of held-out rows, measured before the first step and at the end of each epoch."""
    validate_every: int = 0
    """Steps between validations, beside those at the ends of epochs (0: those alone)."""
    epochs: int = 1
    """Passes over the data (sft: with the loss on the completion tokens)."""
    max_length: int = 512
    """Tokens of prompt and completion together."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _require_positive(self, "max_length")
        if self.validate_every < 0:
            raise ValueError(f"validate_every must not be negative, got {self.validate_every}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on {"prompt", "completion"}, {"text"} or {"messages"} rows.

    First `lm_epochs` with the loss on all tokens (language modelling: where a model from
    scratch begins), then `epochs` with the loss on the completions.
    """

    lm_epochs: int = 0
    """Passes before those of --epochs, with the loss on all tokens."""
    vocab_size: int | None = None
    """Of the tokenizer trained for a model from scratch. Default: the named configuration's."""

    def __post_init__(self) -> None:
        SupervisedConfig.__post_init__(self)
        if self.epochs < 0 or self.lm_epochs < 0 or self.epochs + self.lm_epochs == 0:
            raise ValueError(
                f"epochs ({self.epochs}) and lm_epochs ({self.lm_epochs}) must not be negative, "
                "and one of them must be positive"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig(SupervisedConfig):
    """A reward model from {"prompt", "chosen", "rejected"} pairs or {"prompt", "ranked"} rankings
    (best first), by -log sigmoid of the difference of scores."""

    head: Literal["linear", "mlp"] | None = None
    """Of the scores: one product, or an MLP of one hidden layer. Default: as in the model it
    starts from (linear where that has none); another than that is drawn anew."""
    center_coef: float = 0.0
    """Weight of (chosen + rejected)^2, which keeps scores around zero while training."""

    def __post_init__(self) -> None:
        SupervisedConfig.__post_init__(self)
        _require_positive(self, "epochs")


@dataclass(frozen=True, slots=True, kw_only=True)
class RLConfig(TrainConfig):
    """Reinforcement learning from a reward model or, in Python, any function."""

    reward_model: str | None = None
    """Folder of a reward model. From Python a function may take its place."""
    algorithm: Literal["ppo", "reinforce", "reinforce_baseline", "grpo"] = "ppo"
    """ppo has a critic and clips; reinforce weighs each token by its return;
    reinforce_baseline subtracts the batch's mean return first; grpo clips, and weighs all tokens
    of a completion by how its score stands among those of its prompt (num_samples)."""
    preset: Literal["n+", "trl", "trlx", "openrlhf", "verl"] = "n+"
    """Whose conventions: where the score stands, missing EOS, whitening, clips. An option that is
    set below wins."""
    steps: int = 100
    """Rollouts, each followed by its updates."""
    num_samples: int = 1
    """Completions of each prompt."""
    num_epochs: int | None = None
    """Passes over each rollout. Default: 4 for ppo, 1 for the others."""
    num_minibatches: int = 1
    """Optimizer steps of one pass."""
    max_new_tokens: int = 64
    """Limit of a completion, in tokens."""
    max_prompt_length: int = 512
    """Limit of a prompt, in tokens."""
    temperature: float = 0.7
    """Of the sampling, and of every log-probability taken after it."""
    rollout_slots: int | None = None
    """Completions sampled at a time; it changes memory and speed, never a result. Default: 64 on a
    CPU, 256 on a GPU, or what memory has room for."""
    exact: bool = False
    """Sum in the trainer as in the sampler, so that both give the same log-probabilities to the
    bit (CPU). Tried at the start, and turned off with a warning where it does not hold."""
    reward_batch_size: int | None = None
    """Call a Python reward with so many completions at a time, in a thread of its own, while
    others are still sampled. Default: with the whole rollout, after it."""
    reward_at: Literal["sequence", "token"] = "sequence"
    """One score a completion, or one a token."""
    kl_coef: float | None = None
    """Weight of the KL penalty against the starting policy. 0: there is none, no reference is made
    or run, and its KL is not logged. Default: 0.05, for grpo 0."""
    kl_in: Literal["reward", "loss"] | None = None
    """Whether the KL penalty is in the reward of each token, or a term of the loss. Default: the
    reward, for grpo the loss."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] | None = None
    """Estimator of the KL penalty. Default: k1 in the reward, k3 in the loss."""
    old_logprobs: Literal["rollout", "recomputed"] = "rollout"
    """The log-probabilities that ratios start from: those the sampler gave, or those of a forward
    pass of the trainer over the rollout, before its first update."""
    importance_correction: Literal["none", "token", "sequence", "mask"] = "none"
    """Weight of an advantage by exp(recomputed - rollout): of the token or of the whole sequence,
    cut off at importance_cap; mask: of the token, and 0 outside [1 / cap, cap]."""
    importance_cap: float = 2.0
    """Bound of the weights of importance_correction."""
    gamma: float = 1.0
    """Discount of later rewards."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation (ppo)."""
    clip_range: float | None = None
    """Clip of the policy's ratio around 1 (ppo, grpo). Default: the preset's, 0.2."""
    value_clip_range: float | None = None
    """Clip of the critic's move (ppo). Default: the preset's, 0.2 (openrlhf, verl: 0.5)."""
    vf_coef: float = 0.1
    """Weight of the value loss (ppo)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance, keeping their mean."""
    missing_eos_penalty: float | None = None
    """A completion without EOS scores minus this (n+), or this much less (trl). Default: the
    preset's, 1 (n+) or 0 (trl). The other presets have no such rule."""
    reference: Literal["copy", "hydra"] = "copy"
    """The starting policy, which the KL penalty is against: a frozen copy of what trains, run
    whole; or only its top, run on what the frozen layers gave in the rollout (frozen_layers)."""
    critic: Literal["separate", "shared", "hydra"] = "separate"
    """The critic (ppo): a model of its own; a head on the policy's own layers, which learn from
    its loss too; or a top of its own on the policy's frozen layers (frozen_layers)."""
    critic_head: Literal["linear", "mlp"] | None = None
    """One product, or an MLP of one hidden layer. Default: as in the model the critic starts from
    (linear where that has none); another than that is drawn anew."""
    critic_model: str | None = None
    """Folder a separate critic starts from (ppo). Default: the reward model, else the policy."""
    critic_learning_rate: float | None = None
    """Default: learning_rate. Of a shared critic it is the head's."""
    learning_rate: float = 3e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate goes from its peak to zero (constant: it stays)."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _require_positive(
            self,
            *("steps", "num_samples", "num_minibatches", "max_new_tokens", "max_prompt_length"),
            "temperature",
        )
        for name in ("clip_range", "value_clip_range"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("num_epochs", "rollout_slots", "reward_batch_size"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        if self.exact and self.lora_rank:
            raise ValueError(
                "exact makes no sense with lora_rank: adapters are merged for the sampler and "
                "apart for the trainer"
            )
        if self.exact and self.old_logprobs == "recomputed":
            raise ValueError(
                'exact makes no sense with old_logprobs "recomputed": it gives what was sampled'
            )
        if self.num_minibatches > self.batch_size * self.num_samples:
            raise ValueError(
                f"num_minibatches ({self.num_minibatches}) exceeds the rollout's "
                f"{self.batch_size * self.num_samples} sequences"
            )
        self._check_algorithm()
        if self.kl.coef == 0:
            default = "" if self.kl_coef is not None else f" (the default of {self.algorithm})"
            self._refuse(
                f"with kl_coef 0{default}: there is no reference",
                *("kl_in", "kl_estimator", "reference"),
            )
        if not self.importance_cap >= 1:
            raise ValueError(f"importance_cap must be at least 1, got {self.importance_cap}")
        if self.old_logprobs == "rollout":
            self._refuse(
                "with old_logprobs rollout: the loss's own ratio begins at the sampler",
                *("importance_correction", "importance_cap"),
            )
        if self.importance_correction == "none":
            self._refuse("without an importance_correction", "importance_cap")
        if self.critic != "separate":
            self._refuse(
                f"with critic {self.critic}: it starts from the policy's layers", "critic_model"
            )
        if self.frozen_layers == 0:
            for name in ("reference", "critic"):
                if getattr(self, name) == "hydra":
                    raise ValueError(
                        f"{name} hydra needs frozen_layers: what stays frozen is what is shared"
                    )
        if self.reward_at == "token":
            self._refuse('with reward_at "token": it is of whole sequences', "missing_eos_penalty")
        if self.missing_eos_penalty is not None:
            from fuserl_kernels import PRESETS  # imports torch, so not for --help

            if PRESETS[self.preset].missing_eos is None:
                self._refuse(
                    f"with preset {self.preset}: it has no such rule", "missing_eos_penalty"
                )

    def _check_algorithm(self) -> None:
        algorithm = ALGORITHMS[self.algorithm]
        if not algorithm.has_critic:
            self._refuse(
                f"with {self.algorithm}: it has no critic",
                *("critic", "critic_head", "critic_model", "critic_learning_rate"),
                *("vf_coef", "value_clip_range", "gae_lambda"),
            )
        if algorithm.clip == "none":
            self._refuse(f"with {self.algorithm}: it does not clip", "clip_range")
        if algorithm.advantage == "group":
            self._refuse(
                f"with {self.algorithm}: its advantages are of whole completions",
                *("reward_at", "gamma", "whiten_rewards"),
            )
            if self.num_samples == 1:
                raise ValueError(
                    f"num_samples must be at least 2 with {self.algorithm}: a completion is "
                    "compared with the others of its prompt"
                )

    @property
    def kl(self) -> KLPenalty:
        """The KL penalty, the algorithm's own but for what is set."""
        algorithm = ALGORITHMS[self.algorithm]
        place = self.kl_in or algorithm.kl_in
        return KLPenalty(
            coef=algorithm.kl_coef if self.kl_coef is None else self.kl_coef,
            place=place,
            estimator=self.kl_estimator or ("k3" if place == "loss" else "k1"),
        )

    @property
    def passes(self) -> int:
        """Passes over each rollout, the algorithm's own number unless num_epochs says."""
        return self.num_epochs or ALGORITHMS[self.algorithm].num_epochs

    def _refuse(self, reason: str, *names: str) -> None:
        """Options that were set although they would do nothing."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} makes no sense {reason}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(DataConfig):
    """Completions of prompts, from any policy folder."""

    data: str | None = None  # type: ignore[assignment]
    """JSONL file of rows with a prompt."""
    prompt: str | None = None
    """One prompt, instead of a file."""
    out: str | None = None
    """JSONL file to write; default: the screen."""
    overwrite: bool = False
    """Lose what the file --out holds."""
    max_new_tokens: int = 128
    """Limit of a completion, in tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among the k likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Leave out tokens below this share of the likeliest one's probability."""
    num_samples: int = 1
    """Completions of each prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion whose text comes to hold one of them; they are no part of the
    text that is written."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a completion, beside the EOS."""
    eos_token_id: int | None = None
    """The one EOS. Default: the tokenizer's, and all that the model's folder lists."""
    ignore_eos: bool = False
    """No EOS ends a completion."""
    num_slots: int | None = None
    """Completions decoded at a time, which changes speed and memory alone. Default: 64 on a CPU,
    256 on a GPU, fewer where memory has no room."""
    kv_budget_bytes: int | None = None
    """Memory for keys and values. Default: half of what a CPU has free, 80 % on a GPU."""
    max_prompt_length: int = 1024
    """Longer prompts are left out, or truncated; counted."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        if (self.data is None) == (self.prompt is None):
            raise ValueError("give either data or prompt")
        _require_positive(self, "max_new_tokens", "num_samples", "max_prompt_length")
        for name in ("num_slots", "kv_budget_bytes"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        if not all(self.stop):
            raise ValueError("stop must not hold an empty string")
        if self.ignore_eos and self.eos_token_id is not None:
            raise ValueError("eos_token_id makes no sense with ignore_eos")
        if self.overwrite and self.out is None:
            raise ValueError("overwrite makes no sense without an out file")
        SamplingParams(  # refuses what cannot be
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(DataConfig):
    """Measure a folder on held-out rows.

    A policy on prompts with completions: loss, ROUGE-L of its completions, and with a reward
    model their score and win rate against the rows' own. Against another policy: the gains, and
    the KL divergence from it. A reward model on pairs or rankings: accuracy.
    """

    reward_model: str | None = None
    """Folder of a reward model that judges the completions."""
    against: str | None = None
    """Another policy, measured on the same rows: a folder, a hub id, or tiny, small or medium
    (untrained weights with the model's tokenizer)."""
    tokenizer: str | None = None
    """Folder whose tokenizer an untrained model takes. Default: that of --against."""
    out: str | None = None
    """JSON file for the result too (completions beside it as .completions.jsonl)."""
    batch_size: int = 32
    """Rows of one forward."""
    num_slots: int | None = None
    """Completions decoded at a time. Default: 64 on a CPU, 256 on a GPU, fewer where memory has no
    room."""
    max_new_tokens: int = 64
    """Limit of a completion, in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    limit: int | None = None
    """Use only the first of the rows that are kept."""
    max_length: int = 1024
    """Tokens of prompt and completion together."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        _require_positive(self, "batch_size", "max_new_tokens", "max_length")
        if self.num_slots is not None:
            _require_positive(self, "num_slots")
        SamplingParams(temperature=self.temperature)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be positive, got {self.limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickstartConfig:
    """The whole pipeline on a corpus made from a seed: SFT, reward model, PPO, report."""

    out: str = "runs/quickstart"
    """Folder for the report, the metrics and the three models."""
    seed: int = 0
    """Of the corpus and of every stage."""
    resume: bool = False
    """Go on with a run that was interrupted."""
    overwrite: bool = False
    """Lose the run that --out holds."""

    def __post_init__(self) -> None:
        _refuse_resume_and_overwrite(self.resume, self.overwrite)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Time an op against its rivals, a product with adapters against PEFT's, a step of supervised
    fine-tuning or generation against transformers, or a step of PPO as a hydra and as three models:
    `fuserl bench OP`. Every answer is checked first."""

    op: str
    """Also without the flag: token_logprobs, linear_token_logprobs, linear_policy_loss, gae,
    rewards_to_advantages, discounted_returns, shape_rewards, masked_moments, masked_whiten,
    kl_penalty, policy_loss, value_loss, ppo_loss, pairwise_loss,
    sample_tokens, rms_norm, layer_norm, rotary, rotary_kv_write, glu, decode_attention,
    lora_linear, training_step, rl_step or rollout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA device if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the inputs. auto: fp32, but on a GPU bf16 for logits, hidden states and weights."""
    num_rows: int | None = None
    """Tokens, sampled rows or pairs, N. Defaults of the sizes: those of the op and device."""
    num_sequences: int | None = None
    """B of the ops on [B, T]. Half to all of their T slots are trained."""
    num_slots: int | None = None
    """T of the ops on [B, T]."""
    hidden_size: int | None = None
    """D."""
    vocab_size: int | None = None
    """V."""
    num_heads: int | None = None
    """Of queries."""
    num_kv_heads: int | None = None
    """Of keys and values."""
    head_dim: int | None = None
    """Columns of a head."""
    num_tokens: int | None = None
    """Of a cached row, at most; rows use half to all of them."""
    passes: Literal["all", "forward", "forward_backward"] = "all"
    """all: both, but for a loss forward and backward only."""
    with_entropy: bool = False
    """Also the entropy of each row (in a loss: its bonus)."""
    inplace_grad: bool = False
    """Let the gradient overwrite the logits, where a provider can."""
    with_metrics: bool = False
    """policy_loss, ppo_loss: rivals too make approximate KL, clip fractions and mean ratio, which
    ours always makes."""
    with_residual: bool = False
    """rms_norm, layer_norm: of the sum of two tensors, which is returned too."""
    temperature: float | None = None
    """Of sample_tokens. Default: 0.8."""
    top_p: float | None = None
    """Of sample_tokens, 1 for no truncation. Default: 0.95."""
    cuda_graph: bool = False
    """Time replays of a captured CUDA graph: the device's part of a call alone."""
    model: Literal["all", "tiny", "3M", "25M", "small", "big"] = "all"
    """Of training_step and rl_step: 3M, 25M or all of them; of rollout: small, big or all of them.
    tiny is no benchmark but a test."""
    providers: str = "all"
    """Names with commas between; plain torch always joins, for the ratios."""
    rounds: int = 25
    """Samples of each provider, at most."""
    budget_seconds: float = 60.0
    """Of the timed rounds together; three rounds are made in any case."""
    threads: int | None = None
    """Of the CPU. Default: torch's."""
    json: str | None = None
    """File for everything that was measured."""
    plot: str | None = None
    """PNG file for bars."""

    def __post_init__(self) -> None:
        _refuse_unknown_choices(self)
        _require_positive(self, "rounds", "budget_seconds")
        sizes = "num_rows num_sequences num_slots hidden_size vocab_size".split()
        sizes += "num_heads num_kv_heads head_dim num_tokens".split()
        for name in (*sizes, "threads", "temperature", "top_p"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        if self.top_p is not None and self.top_p > 1:
            raise ValueError(f"top_p must be at most 1, got {self.top_p}")
