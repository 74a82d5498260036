"""A hydra computes what three whole models compute: scores, gradients and weights of a step."""

import copy
import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fuserl_kernels as fk
from fuserl.batch import RolloutBatch, ShapedBatch
from fuserl.config import RLConfig
from fuserl.data.examples import Prompt
from fuserl.model.config import DecoderConfig, Rope
from fuserl.model.flops import Lengths, Pass, layers_flops, step_flops
from fuserl.model.freezing import freeze_lowest
from fuserl.model.heads import Critic, LanguageModel, ScalarModel, SharedCritic
from fuserl.model.hydra import critic_on, frozen_copy, share_trunk
from fuserl.optimizer import Optimizer
from fuserl.rollout.collect import rollout
from fuserl.scoring import score
from fuserl.sequences import Sequences
from fuserl.shaping import shape
from fuserl.update import update

LLAMA = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    init_std=0.3,
    eos_token_id=2,
)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": dataclasses.replace(
        LLAMA,
        rope=None,
        norm="layer",
        gated_mlp=False,
        activation="gelu_tanh",
        num_kv_heads=4,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    "gpt_neox": dataclasses.replace(
        LLAMA,
        parallel_residual=True,
        norm="layer",
        gated_mlp=False,
        activation="gelu",
        num_kv_heads=4,
        rope=Rope(dim=4),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
    ),
    "gemma2": dataclasses.replace(
        LLAMA,
        window=4,
        window_layers=(True, False, True, False),
        norm_weight_offset=1.0,
        post_norms=True,
        attention_softcap=5.0,
        final_softcap=3.0,
        attention_scale=0.5,
        embedding_scale=32**0.5,
        activation="gelu_tanh",
    ),
}
DEPTH = 2
config_of_each_kind = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


class Models(NamedTuple):
    policy: LanguageModel
    reference: LanguageModel
    critic: Critic


@torch.no_grad()
def move(model: nn.Module, seed: int) -> None:
    """What training would do: every parameter that trains is somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)  # drawn for frozen ones too
        if parameter.requires_grad:
            parameter.add_(0.05 * noise)


def make(config: DecoderConfig, kind: str, depth: int = DEPTH) -> Models:
    """A policy on its way from its reference, and a critic on its way from the policy: as three
    whole models ("naive"), or as a hydra ("hydra"; "shared": the critic is a head alone)."""
    policy = LanguageModel(config)
    policy.initialize(1)
    freeze_lowest(policy, depth)
    critic: Critic
    if kind == "naive":
        reference = copy.deepcopy(policy).requires_grad_(False)
        critic = ScalarModel.on_trunk(policy, 3, "mlp")
        freeze_lowest(critic, depth)
    else:
        reference = frozen_copy(policy)
        if kind == "hydra":
            critic = critic_on(policy, 3, "mlp")
            share_trunk(depth, policy.trunk, reference.trunk, critic.trunk)
        else:
            critic = SharedCritic(policy)
            critic.initialize_head(3)
            share_trunk(depth, policy.trunk, reference.trunk)
    move(policy, 5)
    move(critic, 6)
    return Models(policy, reference, critic)


def options(**changes: Any) -> RLConfig:
    defaults: dict[str, Any] = {"model": "m", "data": "d", "out": "o", "batch_size": 4}
    defaults |= {"num_samples": 2, "max_new_tokens": 9, "microbatch_size": 3, "num_epochs": 2}
    defaults |= {"num_minibatches": 2, "learning_rate": 1e-3, "schedule": "constant"}
    defaults |= {"warmup_share": 0.0}
    return RLConfig(**{**defaults, **changes})


Sampled = tuple[RolloutBatch, list[Prompt]]


def sample(models: Models, config: RLConfig) -> Sampled:
    """Ragged prompts, two samples each; some completions end early."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 61, (length,), generator=generator) for length in (3, 1, 7, 5)]
    prompts = [Prompt(tuple(row.tolist()), "", {}, "") for row in ids for _ in range(2)]

    def sampled_with(eos: int | None) -> RolloutBatch:
        ids = [] if eos is None else [eos]
        return rollout(
            models.policy, prompts, config, eos_token_ids=ids, step=0, on_step=lambda: None
        )

    early = sampled_with(None).completions[:, 1:6]
    rows_with = {token: int((early == token).any(1).sum()) for token in early.unique().tolist()}
    sampled = sampled_with(max(rows_with, key=lambda token: min(rows_with[token], 5)))
    assert sampled.completion_lengths.min() < sampled.completion_lengths.max() == 9
    return sampled, prompts


def judge(models: Models, sampled: Sampled, config: RLConfig) -> ShapedBatch:
    """Scored, one sequence without a score, and shaped."""
    batch, prompts = sampled
    scores = torch.randn(len(batch), generator=torch.Generator().manual_seed(4))
    scores[3] = math.nan
    scored = score(
        batch,
        prompts,
        reward=lambda *_: scores,
        reference=models.reference,
        critic=models.critic,
        temperature=config.temperature,
        microbatch_size=config.microbatch_size,
    )
    return shape(scored, config)


def learn(
    models: Models, batch: ShapedBatch, config: RLConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The first gradient, the weights after all updates, and the metrics."""
    modules = {"policy": models.policy, "critic": models.critic}
    first: dict[str, Tensor] = {}

    class Watched(Optimizer):
        def step(self) -> dict[str, Tensor]:
            if self.steps == 0:
                first.update(
                    {
                        f"{name}.{key}": parameter.grad.clone()
                        for name, module in modules.items()
                        for key, parameter in module.named_parameters()
                        if parameter.grad is not None
                    }
                )
            return super().step()

    optimizer = Watched(modules, config, total_steps=10)
    metrics = update(models.policy, models.critic, optimizer, batch, config, seed=0)
    weights = {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    return first, weights, metrics


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        scale = max(tensor.abs().max().item(), 1e-3)
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5 * scale, msg=name)


@config_of_each_kind
def test_a_step_equals_that_of_three_whole_models(config: DecoderConfig) -> None:
    naive, hydra, chosen = make(config, "naive"), make(config, "hydra"), options()
    expected = judge(naive, sample(naive, chosen), chosen)
    found = judge(hydra, sample(hydra, chosen), chosen)
    assert torch.equal(found.completions, expected.completions)
    assert (found.ref_logprobs - found.logprobs).abs().max() > 0.05, "the policy has moved"
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, msg=name
        )
    (gradients, weights, metrics), (their_gradients, their_weights, _) = (
        learn(hydra, found, chosen),
        learn(naive, expected, chosen),
    )
    assert metrics["first/val/ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert metrics["first/policy/clipfrac_avg"].item() == 0.0
    trained = {k for k in gradients if not k.endswith("bias")}
    assert {"policy.trunk.layers.2.attn.qkv_proj.weight", "critic.score.weight"} <= trained
    assert not any("layers.1." in name or "embed" in name for name in gradients)
    assert_near(gradients, their_gradients)
    # Adam's first steps are signs: where a gradient is rounding alone, they may differ.
    for name, tensor in their_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=2e-4, msg=name)


@config_of_each_kind
@torch.no_grad()
def test_the_kept_stream_is_that_of_a_packed_pass(config: DecoderConfig) -> None:
    """Rows that ended early were dropped on the way, and last tokens were never read."""
    models, chosen = make(config, "hydra"), options()
    batch, _ = sample(models, chosen)
    assert batch.trunk_states is not None
    tokens = int(batch.prompt_lengths[::2].sum() + batch.completion_lengths.sum())
    assert batch.trunk_states.shape == (tokens, config.hidden_size), "a prompt is kept once"
    for rows in (torch.arange(8), torch.tensor([6, 1, 3])):
        sequences = Sequences.of_batch(batch.select(rows))
        assert sequences.trunk_states is not None
        trunk = copy.deepcopy(models.policy.trunk)
        trunk.shared_layers = 0
        hidden = trunk(sequences.token_ids, sequences.packing)
        kept = sequences.hidden_states(models.policy.trunk)
        torch.testing.assert_close(kept, hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["hydra", "shared"])
def test_no_pass_goes_below_the_tops(kind: str) -> None:
    models, chosen = make(LLAMA, kind), options()
    sampled = sample(models, chosen)
    seen = []
    for trunk in {models.policy.trunk, models.reference.trunk, models.critic.trunk}:
        for number, layer in enumerate(trunk.layers):
            layer.register_forward_hook(lambda *_, number=number: seen.append(number))
    batch = judge(models, sampled, chosen)
    num_scored = len(seen)
    learn(models, batch, chosen)
    assert set(seen) == {2, 3}
    microbatches = 3, 2 * 2 * 2  # of 3 rows: of 8 rows, and of 4 rows a minibatch
    decoders = (2, 2 if kind == "hydra" else 1)
    assert num_scored == 2 * microbatches[0] * decoders[0]
    assert len(seen) - num_scored == 2 * microbatches[1] * decoders[1]


def test_a_shared_critic_learns_through_the_policys_decoder() -> None:
    """Half the squared error over the value slots, beside what the policy's loss gives."""
    found = {}
    for vf_coef in (0.0, 0.5):
        chosen = options(num_epochs=1, num_minibatches=1, vf_coef=vf_coef)
        models = make(LLAMA, "shared")
        batch = judge(models, sample(models, chosen), chosen)
        found[vf_coef] = learn(models, batch, chosen)[0]
    models = make(LLAMA, "shared")
    sequences = Sequences.of_batch(batch)
    hidden = models.policy(sequences.token_ids, sequences.packing)
    values = sequences.states_by_slot(models.critic.score(hidden)[:, 0], batch.returns.shape[1])
    error = (values - batch.returns)[batch.value_mask]
    (0.5 * 0.5 * error.square().mean()).backward()
    for name, parameter in models.policy.named_parameters():
        if parameter.grad is not None and f"policy.{name}" in found[0.5]:
            both, alone = found[0.5][f"policy.{name}"], found[0.0][f"policy.{name}"]
            scale = both.abs().max().item()
            assert (both - alone).abs().max() > 1e-3 * scale, name
            expected = parameter.grad
            torch.testing.assert_close(both - alone, expected, rtol=1e-3, atol=1e-5 * scale)
    expected = models.critic.score.weight.grad
    assert expected is not None
    torch.testing.assert_close(found[0.5]["critic.score.weight"], expected, rtol=1e-4, atol=1e-5)
    assert models.critic.state_dict().keys() == {"score.weight", "score.bias"}


def test_bf16_errs_no_more_than_three_whole_models() -> None:
    """Against fp32 models of the same weights, on the same tokens."""
    chosen, errors = options(), {}
    for kind in ("naive", "hydra"):
        models = Models(*(model.bfloat16() for model in make(LLAMA, kind)))
        batch, prompts = sample(models, chosen)
        found = judge(models, (batch, prompts), chosen)
        exact = Models(*(copy.deepcopy(model).float() for model in models))
        plain = dataclasses.replace(batch, trunk_states=None, trunk_starts=None)
        truth = judge(exact, (plain, prompts), chosen)
        mask = found.loss_mask
        errors[kind] = torch.stack(
            [
                (getattr(found, name) - getattr(truth, name))[mask].abs().mean()
                for name in ("ref_logprobs", "values")
            ]
        )
    assert (errors["hydra"] <= 1.5 * errors["naive"] + 1e-3).all(), errors


def test_only_what_trains_is_copied() -> None:
    policy = LanguageModel(LLAMA)
    policy.initialize(0)
    freeze_lowest(policy, DEPTH)
    models: list[LanguageModel | ScalarModel] = [frozen_copy(policy), critic_on(policy, 0)]
    for model in models:
        own = dict(model.trunk.named_parameters())
        for name, parameter in policy.trunk.named_parameters():
            same = own[name].data_ptr() == parameter.data_ptr()
            assert same is not parameter.requires_grad, name
            assert torch.equal(own[name], parameter)
    assert not any(parameter.requires_grad for parameter in models[0].parameters())
    trained = {name for name, p in models[1].named_parameters() if p.requires_grad}
    assert trained == {n for n, p in policy.named_parameters() if p.requires_grad} | {
        "score.weight",
        "score.bias",
    }
    bytes_of = {
        parameter.data_ptr(): parameter.nbytes
        for model in (policy, models[0])
        for parameter in model.parameters()
    }
    copied = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert sum(bytes_of.values()) == sum(p.nbytes for p in policy.parameters()) + copied


def test_models_that_differ_below_are_no_hydra() -> None:
    policy = LanguageModel(LLAMA)
    with pytest.raises(ValueError, match="needs a frozen layer"):
        share_trunk(0, policy.trunk)
    with pytest.raises(ValueError, match="must be frozen"):
        share_trunk(1, policy.trunk)
    freeze_lowest(policy, 1)
    with pytest.raises(ValueError, match="must be the same"):
        share_trunk(1, policy.trunk, copy.deepcopy(policy).trunk)
    with pytest.raises(ValueError, match="must be frozen"):
        share_trunk(2, policy.trunk, frozen_copy(policy).trunk)


@config_of_each_kind
def test_the_products_are_counted_as_torch_counts_them(config: DecoderConfig) -> None:
    """All but attention: torch counts that at the full square."""
    models, lengths = make(config, "naive"), [5, 9]
    sequences = Sequences.of([[3] * 2] * 2, [[4] * (length - 2) for length in lengths])
    # Torch counts its own products.
    with fk.use_backend("reference"), FlopCounterMode(display=False) as counter:
        models.policy(sequences.token_ids, sequences.packing)
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counted.items() if "mm" in str(op) and "b" not in str(op))
    attention = 0
    for layer in range(config.num_layers):
        for length in lengths:
            window = config.window_of(layer) or length
            pairs = sum(min(i + 1, window) for i in range(length))
            attention += 2 * 2 * config.num_heads * config.head_dim * pairs
    assert layers_flops(config, 0, config.num_layers, lengths) - attention == products


def test_what_a_hydra_saves() -> None:
    """Half the layers frozen: in scoring half of all; in the update one of four shares (the
    lower forward pass, beside the upper one and a backward pass of twice that)."""
    config = dataclasses.replace(LLAMA, vocab_size=1)  # the head's share is next to nothing

    def saved_share(from_kept: bool, num_epochs: int) -> float:
        passes = [Pass(config=config, head="vocabulary", depth=2, from_kept=from_kept)] * 2
        flops = step_flops(
            Lengths([63] * 8, [1] * 8), scored=passes, updated=passes, num_epochs=num_epochs
        )
        return flops.saved_share

    assert saved_share(True, 0) == pytest.approx(0.5, abs=0.02)
    assert saved_share(True, 1000) == pytest.approx(0.25, abs=0.001)
    assert -0.02 < saved_share(False, 1) < 0, "last tokens go through the trunk for nothing"
