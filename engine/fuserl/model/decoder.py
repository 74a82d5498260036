"""One Llama-style decoder for training and for cached decoding.

Everything is right-padded and causal. Position p of a row is its p-th real token, so padding
comes after everything that could look at it: training and prefill need no attention mask, and
what is computed at padded positions is never read.

Module names are Hugging Face's, so a state dict of this module is one of theirs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuserl.model.cache import KVCache
from fuserl.model.config import DecoderConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in fp32 (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x32 * scale).to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin for rotary embeddings (Su et al., 2021) in Llama's half-split layout.

    positions: [B, S] or [1, S]. Returns two fp32 tensors [B or 1, 1, S, head_dim].
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = theta ** (-exponents / head_dim)  # [head_dim / 2]
    angles = positions.float().unsqueeze(-1) * frequencies  # [B, S, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings. x: [B, heads, S, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        bias = config.attention_bias
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        batch, length, _ = x.shape
        query = self._heads(self.q_proj(x), self.num_heads)
        key = self._heads(self.k_proj(x), self.num_kv_heads)
        value = self._heads(self.v_proj(x), self.num_kv_heads)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            cache.write(self.layer, key, value)
        if cache is None or cache.is_prefill:
            grouped = self.num_kv_heads != self.num_heads
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped
            )
        else:
            # One query a head: the heads of a group become the query axis over one shared key.
            keys, values, mask = cache.read(self.layer)
            folded = query.view(batch, self.num_kv_heads, -1, self.head_dim)
            out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
            out = out.reshape(batch, self.num_heads, 1, self.head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, num_heads, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """Token ids in, final hidden states out. The heads are subclasses (heads.py).

    On the meta device nothing is allocated or initialised: the loader asks a model built there
    for its names and shapes, and fills it afterwards.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Weights from N(0, init_std^2) by a generator of their own; norms one, biases zero."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=self.config.init_std, generator=generator)

    def forward(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """token_ids: [B, S] int64, right-padded. Returns the hidden states after the final norm,
        [B, S, D].

        With a cache, the first call is the prefill of whole prompts; every later call brings
        one token a row, at the position the cache holds for that row.
        """
        if cache is None or cache.is_prefill:
            positions = torch.arange(token_ids.shape[1], device=token_ids.device).unsqueeze(0)
        else:
            positions = cache.positions.unsqueeze(1)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        x = self.model.embed_tokens(token_ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin, cache)
        return self.model.norm(x)
