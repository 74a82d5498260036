"""One decoder for training and for cached decoding, for every family.

Sequences are packed end to end: N tokens, no padding, nothing computed that is not read. What a
family is made of are switches of its DecoderConfig. How attention finds the keys of a token is
the step's business (steps.py): among the tokens of the same pass while training, in the cache
while decoding; everything else is written once, here.

The residual stream is carried as two tensors, the stream and the last branch not yet added to it,
so that adding and the next norm are one kernel.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fuserl_kernels as fk
from fuserl.model.config import DecoderConfig
from fuserl.model.packing import Packing
from fuserl.model.rotary import RotaryTable
from fuserl.model.steps import PackedStep, Step

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich, 2019) or layer norm (Ba et al., 2016), statistics in fp32."""

    def __init__(self, config: DecoderConfig, size: int | None = None) -> None:
        super().__init__()
        size = config.hidden_size if size is None else size
        self.is_rms, self.eps = config.norm == "rms", config.norm_eps
        self.offset = config.norm_weight_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        self.bias = None if self.is_rms else nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_rms:
            return fk.rms_norm(x, self.weight, eps=self.eps, weight_offset=self.offset)
        return fk.layer_norm(x, self.weight, self.bias, eps=self.eps)

    def add(self, branch: Tensor | None, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of stream + branch, and that sum."""
        if branch is None:
            return self(stream), stream
        if self.is_rms:
            return fk.rms_norm(
                branch, self.weight, residual=stream, eps=self.eps, weight_offset=self.offset
            )
        return fk.layer_norm(branch, self.weight, self.bias, residual=stream, eps=self.eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023), its three inputs one product."""

    def __init__(self, config: DecoderConfig, layer: int, table: RotaryTable) -> None:
        super().__init__()
        self.layer, self.table = layer, table
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.scale = config.head_dim, config.scale
        self.window, self.softcap = config.window_of(layer), config.attention_softcap
        self.eps, self.offset = config.norm_eps, config.norm_weight_offset
        heads = config.num_heads * config.head_dim
        both = heads + 2 * config.num_kv_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, both, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.output_bias)
        self.q_norm = Norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = Norm(config, config.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        attended = step.attend(self, step.product(self.qkv_proj, x))
        return step.product(self.o_proj, attended.flatten(1))

    def rotary(
        self, qkv: Tensor, positions: Tensor, num_positions: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads with their positions in, [N, heads, head_dim] each.
        num_positions: more than any of `positions`."""
        cos, sin = self.table.upto(num_positions, qkv.device)
        return fk.rotary(qkv, cos, sin, positions, **self._heads())

    def rotary_kv_write(
        self,
        qkv: Tensor,
        positions: Tensor,
        num_positions: int,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        """As `rotary`, with key and value of token n written to keys[slots[n], :, offsets[n]] and
        values likewise; returns the query heads. No gradient."""
        cos, sin = self.table.upto(num_positions, qkv.device)
        return fk.rotary_kv_write(
            qkv, cos, sin, positions, keys, values, slots, offsets, **self._heads()
        )

    def _heads(self) -> dict:
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "interleaved": self.table.interleaved,
            "q_norm_weight": None if self.q_norm is None else self.q_norm.weight,
            "k_norm_weight": None if self.k_norm is None else self.k_norm.weight,
            "eps": self.eps,
            "weight_offset": self.offset,
        }


class MLP(nn.Module):
    """Gated (Shazeer, 2020), its two inputs one product; or plain."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        if config.gated_mlp:
            self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        else:
            self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.is_gated = config.gated_mlp
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        if self.is_gated:
            inner = fk.glu(step.product(self.gate_up_proj, x), activation=self.activation)
        else:
            inner = _ACTIVATIONS[self.activation](step.product(self.up_proj, x))
        return step.product(self.down_proj, inner)


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int, table: RotaryTable) -> None:
        super().__init__()
        self.is_parallel = config.parallel_residual
        self.attn_norm = Norm(config)
        self.attn = Attention(config, layer, table)
        self.mlp_norm = None if config.shared_norm else Norm(config)
        self.mlp = MLP(config)
        self.post_attn_norm = Norm(config) if config.post_norms else None
        self.post_mlp_norm = Norm(config) if config.post_norms else None

    def forward(self, branch: Tensor | None, stream: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """branch: what the layer before has not yet added to the stream, [N, D] each."""
        normed, stream = self.attn_norm.add(branch, stream)
        attended = self.attn(normed, step)
        if self.post_attn_norm is not None:
            attended = self.post_attn_norm(attended)
        if self.is_parallel:
            if self.mlp_norm is not None:
                normed = self.mlp_norm(stream)
            return attended + self.mlp(normed, step), stream
        assert self.mlp_norm is not None
        normed, stream = self.mlp_norm.add(attended, stream)
        branch = self.mlp(normed, step)
        if self.post_mlp_norm is not None:
            branch = self.post_mlp_norm(branch)
        return branch, stream


class Decoder(nn.Module):
    """Token ids in, final hidden states out.

    On the meta device nothing is allocated or initialised: the loader asks a model built there
    for its names and shapes, and fills it afterwards.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each layer in the backward pass
        self.exact = False  # attention sums as in cached decoding: see steps.py
        self.shared_layers = 0  # lowest ones held in common with a policy: see hydra.py
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.rope is None:
            self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        tables = {
            rope: RotaryTable(rope, config.head_dim)
            for rope in map(config.rope_of, range(config.num_layers))
        }
        self.layers = nn.ModuleList(
            Layer(config, layer, tables[config.rope_of(layer)])
            for layer in range(config.num_layers)
        )
        self.norm = Norm(config)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(self, token_ids: Tensor, packing: Packing) -> Tensor:
        """token_ids: [N] int64, packed. Returns the hidden states after the final norm, [N, D]."""
        return self.run(token_ids, PackedStep(packing, self.exact))

    def run(self, token_ids: Tensor, step: Step) -> Tensor:
        """The whole decoder in one step of any kind. [N] to [N, D], after the final norm."""
        return self.upper(self.lower(token_ids, step, 0), step, 0)

    def lower(self, token_ids: Tensor, step: Step, stop: int) -> Tensor:
        """Embedding and the layers below `stop`: the residual stream before that layer, [N, D]."""
        stream = self.embed_tokens(token_ids)
        if self.config.embedding_scale != 1.0:
            # Rounded to the dtype first, as Gemma was trained; a number on the host, so that no
            # token waits for a copy to the device.
            stream = stream * torch.tensor(self.config.embedding_scale, dtype=stream.dtype)
        if self.config.rope is None:
            stream = stream + self.embed_positions(step.positions)
        branch, stream = self._layers(stream, step, 0, stop)
        return stream if branch is None else stream + branch

    def upper(self, stream: Tensor, step: Step, start: int) -> Tensor:
        """The layers from `start` on and the final norm, from the stream `lower` gave: [N, D]."""
        branch, stream = self._layers(stream, step, start, len(self.layers))
        return self.norm.add(branch, stream)[0]

    def _layers(
        self, stream: Tensor, step: Step, start: int, stop: int
    ) -> tuple[Tensor | None, Tensor]:
        branch: Tensor | None = None
        for layer in self.layers[start:stop]:
            if self.checkpointing and torch.is_grad_enabled():
                branch, stream = checkpoint(
                    layer, branch, stream, step, use_reentrant=False, preserve_rng_state=False
                )
            else:
                branch, stream = layer(branch, stream, step)
        return branch, stream

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Matrices from N(0, init_std^2); norms one, biases zero."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.weight.fill_(1.0 - module.offset)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=self.config.init_std, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
