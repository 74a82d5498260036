"""The decoder against transformers' Llama, cached decoding against one full forward, and the
promise that padding changes nothing."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fuserl.model.cache import KVCache
from fuserl.model.config import DecoderConfig, small_config
from fuserl.model.decoder import Decoder
from fuserl.model.heads import LanguageModel, ScalarModel

GROUPED = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
CONFIGS = {
    "grouped_tied": GROUPED,
    "multi_head_untied_biased": dataclasses.replace(
        GROUPED, num_kv_heads=4, tie_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "one_kv_head_wide_heads": dataclasses.replace(
        GROUPED, num_kv_heads=1, head_dim=12, rope_theta=5e5, rms_norm_eps=1e-6
    ),
}

config_of_each_kind = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@torch.no_grad()
def scramble(model: Decoder) -> Decoder:
    """Weights of ordinary size everywhere, biases and norms included, so that every parameter
    shows in the output."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(std=0.3, generator=generator)
    return model


def random_tokens(config: DecoderConfig, batch: int, length: int) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length))


def logits(model: LanguageModel, hidden: Tensor) -> Tensor:
    return hidden @ model.output_weight.T


@config_of_each_kind
def test_logits_and_gradients_equal_transformers(config: DecoderConfig) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = scramble(LanguageModel(config))
    theirs = LlamaForCausalLM(LlamaConfig(**config.to_hf(), attn_implementation="eager"))
    keys = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys == (["lm_head.weight"] if config.tie_embeddings else [])

    token_ids = random_tokens(config, 3, 17)
    our_logits = logits(ours, ours(token_ids))
    their_logits = theirs(token_ids).logits
    assert our_logits.std() > 0.5
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-5, atol=1e-5)

    weights = torch.randn_like(our_logits)
    (our_logits.log_softmax(-1) * weights).mean().backward()
    (their_logits.log_softmax(-1) * weights).mean().backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            parameter.grad, their_gradients[name], rtol=1e-4, atol=1e-5 * scale, msg=name
        )


def test_logits_equal_transformers_at_the_last_position() -> None:
    """Rotary angles grow with the position, and so does the error of their frequencies."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = dataclasses.replace(GROUPED, num_layers=1, max_positions=2048)
    ours = scramble(LanguageModel(config))
    theirs = LlamaForCausalLM(LlamaConfig(**config.to_hf()))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    token_ids = random_tokens(config, 1, config.max_positions)
    with torch.no_grad():
        torch.testing.assert_close(
            logits(ours, ours(token_ids)), theirs(token_ids).logits, rtol=1e-5, atol=1e-5
        )


@config_of_each_kind
def test_values_equal_transformers_scores(config: DecoderConfig) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    pad = 0
    ours = scramble(ScalarModel(dataclasses.replace(config, pad_token_id=pad)))
    with torch.no_grad():
        ours.score.bias.zero_()
    theirs = LlamaForSequenceClassification(LlamaConfig(**ours.config.to_hf(), num_labels=1))
    keys = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert keys.missing_keys == []
    assert keys.unexpected_keys == ["score.bias"]

    lengths = torch.tensor([5, 11, 1])
    token_ids = random_tokens(config, 3, 11).clamp(min=1)
    token_ids[torch.arange(11) >= lengths[:, None]] = pad
    with torch.no_grad():
        values = ours.values(token_ids)
        scores = theirs(token_ids).logits.squeeze(-1)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[torch.arange(3), lengths - 1], scores, rtol=1e-5, atol=1e-5)


@config_of_each_kind
@torch.no_grad()
def test_cached_decode_equals_one_full_forward(config: DecoderConfig) -> None:
    model = scramble(LanguageModel(config))
    prompt_lengths = torch.tensor([3, 7, 1, 5])
    steps, drop_at, kept = 6, 3, torch.tensor([0, 2])
    rows = torch.arange(4)
    token_ids = random_tokens(config, 4, 7 + steps)  # row b is real up to prompt b + steps
    full = model(token_ids)

    cache = KVCache(config, prompt_lengths, 7 + steps, torch.float32)
    hidden = model(token_ids[:, :7], cache)
    last = prompt_lengths - 1
    torch.testing.assert_close(hidden[rows, last], full[rows, last], rtol=1e-5, atol=1e-5)
    cache.begin_decode(7)
    for step in range(steps):
        if step == drop_at:
            cache.keep(kept)
            rows = rows[kept]
        positions = prompt_lengths[rows] + step
        cache.begin_step()
        hidden = model(token_ids[rows, positions].unsqueeze(1), cache)
        cache.end_step()
        assert hidden.shape == (len(rows), 1, config.hidden_size)
        torch.testing.assert_close(
            hidden.squeeze(1), full[rows, positions], rtol=1e-5, atol=1e-5, msg=f"step {step}"
        )
    assert rows.tolist() == [0, 2]


@config_of_each_kind
def test_prompts_padding_never_reaches_a_later_step(config: DecoderConfig) -> None:
    """The slots a short prompt padded are read again only after they are overwritten."""
    model = scramble(LanguageModel(config))
    prompt_lengths = torch.tensor([2, 6])
    token_ids = random_tokens(config, 2, 6)
    outputs = []
    with torch.no_grad():
        for padding in (0, 1):
            token_ids[0, 2:] = padding
            cache = KVCache(config, prompt_lengths, 9, torch.float32)
            model(token_ids, cache)
            cache.begin_decode(6)
            steps = []
            for step in range(3):
                cache.begin_step()
                steps.append(model(torch.full((2, 1), step), cache))
                cache.end_step()
            outputs.append(torch.cat(steps, dim=1))
    assert torch.equal(outputs[0], outputs[1])


@config_of_each_kind
def test_padding_does_not_matter(config: DecoderConfig) -> None:
    model = scramble(ScalarModel(config))
    lengths, width = [4, 9, 1], 12
    token_ids = random_tokens(config, 3, width)
    weights = torch.randn(3, width, config.hidden_size)

    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    padded = model(token_ids)
    (padded * weights)[mask].sum().backward()
    padded_gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    for row, length in enumerate(lengths):
        alone = model(token_ids[row : row + 1, :length])
        scale = alone.abs().max().item()  # a lone token takes another matrix product's rounding
        torch.testing.assert_close(alone[0], padded[row, :length], rtol=1e-6, atol=1e-6 * scale)
        (alone[0] * weights[row, :length]).sum().backward()
    for name, gradient in padded_gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            model.get_parameter(name).grad, gradient, rtol=1e-6, atol=1e-6 * scale, msg=name
        )


@config_of_each_kind
def test_what_padding_holds_never_shows(config: DecoderConfig) -> None:
    model = scramble(ScalarModel(config))
    mask = torch.arange(12) < torch.tensor([4, 9, 1])[:, None]
    token_ids = random_tokens(config, 3, 12)
    weights = torch.randn(3, 12)
    results = []
    for padding in (0, 7):
        values = model.values(token_ids.masked_fill(~mask, padding))
        gradients = torch.autograd.grad((values * weights)[mask].sum(), list(model.parameters()))
        results.append([values[mask], *gradients[1:]])  # 0: the embedding, checked above
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_initialize_depends_on_its_seed_only() -> None:
    config = dataclasses.replace(CONFIGS["multi_head_untied_biased"], init_std=0.05)
    first, second, other = (ScalarModel(config) for _ in range(3))
    state = torch.get_rng_state()
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        model.initialize(seed)
        model.initialize_head(seed)
    assert torch.equal(state, torch.get_rng_state())
    weights = first.state_dict()
    assert all(torch.equal(weights[name], t) for name, t in second.state_dict().items())
    assert not torch.equal(weights["score.weight"], other.state_dict()["score.weight"])
    assert torch.equal(weights["model.norm.weight"], torch.ones(config.hidden_size))
    assert weights["model.layers.0.self_attn.q_proj.bias"].abs().max() == 0
    embedding = weights["model.embed_tokens.weight"]
    assert embedding.std().item() == pytest.approx(config.init_std, rel=0.1)


@pytest.mark.parametrize("name", ["tiny", "small", "medium"])
def test_small_configurations_build(name: str) -> None:
    with torch.device("meta"):
        model = LanguageModel(small_config(name, vocab_size=100))
    assert model.output_weight.shape[0] == 100


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, "num_layers must be positive"),
        ("num_kv_heads", 3, "multiple of num_kv_heads"),
        ("head_dim", 7, "head_dim must be even"),
    ],
)
def test_impossible_sizes_are_refused(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GROUPED, **{field: value})
