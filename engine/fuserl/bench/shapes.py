"""Shapes of published models, to be filled with random weights."""

from typing import Any

from fuserl.model.config import DecoderConfig, Rope


def _shape(**sizes: Any) -> DecoderConfig:
    return DecoderConfig(max_positions=4096, **sizes)


TINY = _shape(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
"""For tests."""

SHAPES = {
    "Qwen3-0.6B": _shape(
        family="qwen3",
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        qk_norm=True,
        rope=Rope(theta=1e6),
    ),
    "Qwen2.5-1.5B": _shape(
        family="qwen2",
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        qkv_bias=True,
        rope=Rope(theta=1e6),
    ),
    "Llama-3-8B": _shape(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        tie_embeddings=False,
        rope=Rope(theta=5e5),
    ),
}
"""As their config.json files give them, but for the longest context."""
