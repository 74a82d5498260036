"""The rollout of a Llama-style decoder on a CPU, in C++: a call a few steps long, not an op.

Each pass is the decoder's own ops in its own order (csrc/cpu/decoder.cpp), on weights packed once.
So it gives the bits that the decoder gives with products in a fixed order, and no Python runs
between two tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuserl.model.cache import CacheShape, KVCache
from fuserl.model.decoder import Decoder, Layer, Norm
from fuserl.model.heads import LanguageModel
from fuserl.model.packing import rows_and_offsets
from fuserl.model.products import PackedProducts
from fuserl.rollout.live_rows import Ended, NewPrompt, NewRow
from fuserl.rollout.requests import End
from fuserl.rollout.runner import RunnerOptions, allocate_rows, pack_prompts
from fuserl_kernels import native
from fuserl_kernels.packed_weight import PackedWeight

PASS_TOKENS = 1024
"""Prompt tokens of one pass: its activations stay small, its products large."""

_NO_NORM = (0, 0)


def why_not(model: LanguageModel) -> str | None:
    """Why a model has no native decode step; None if it has one."""
    config, trunk = model.config, model.trunk
    if (absent := native.why_absent()) is not None:
        return absent
    if not isinstance(trunk, Decoder):
        return "it runs through transformers"
    if trunk.dtype not in (torch.float32, torch.bfloat16) or trunk.device.type != "cpu":
        return f"its weights are {trunk.dtype} on {trunk.device}"
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue  # merged into what is packed
        if parameter.dtype != trunk.dtype or not parameter.is_contiguous():
            return f"{name} is {parameter.dtype}, or not contiguous, in a model of {trunk.dtype}"
    if config.rope is None or not config.gated_mlp or config.parallel_residual:
        return (
            "it is no Llama-style decoder (rotary positions, gated MLP, one residual after another)"
        )
    return None


class NativeRunner:
    """See Runner. A model for which `why_not` gives None."""

    can_refill = True

    def __init__(self, model: LanguageModel, shape: CacheShape, options: RunnerOptions) -> None:
        self._model, self._options = model, options
        config, trunk = model.config, model.trunk
        self._packed = PackedProducts(trunk, model.output_weight)
        self._cache = KVCache(config, shape, trunk.dtype, model.device)
        self.rows = allocate_rows(model, shape)
        self.num_flagged = 0
        self.weight_bytes, self.cache_bytes = self._packed.num_bytes, self._cache.num_bytes
        vocab_size = config.vocab_size
        self._is_stop = options.stop.stop_table(vocab_size, model.device)
        self._is_flag = options.stop.flag_table(vocab_size, model.device)
        self._ended = torch.zeros(3, shape.num_slots, dtype=torch.int64, device="cpu")
        self._kept: Tensor | None = None
        if options.keep_before:
            sizes = (shape.num_slots, shape.capacity, config.hidden_size)
            self._kept = torch.empty(sizes, dtype=trunk.dtype, device="cpu")
        self._tables: list[tuple[Tensor, Tensor]] = []  # alive as long as their addresses are used
        # What is read in place; it must stay where and as it is until the rollout ends.
        self._read = {name: (p, p.data_ptr(), _version(p)) for name, p in model.named_parameters()}
        self._decoder = self._build(trunk)

    def _build(self, trunk: Decoder) -> Any:
        config, packed, model = trunk.config, self._packed, self._model
        scale = torch.tensor(config.embedding_scale, dtype=trunk.dtype, device="cpu").item()
        decoder = native.module().Decoder(
            dtype=native.dtype(trunk.embed_tokens.weight),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            norm_offset=config.norm_weight_offset,
            norm_centered=config.norm == "layer",
            activation=config.activation,
            attention_scale=config.scale,
            attention_softcap=config.attention_softcap or 0.0,
            final_softcap=config.final_softcap or 0.0,
            embedding_scale=scale,
            embedding=trunk.embed_tokens.weight.data_ptr(),
            vocab_size=config.vocab_size,
            final_norm=_norm(trunk.norm),
            head=_linear(packed.head, model.output_bias),
            kept_layer=self._options.keep_before,
        )
        layers = [layer for layer in trunk.layers if isinstance(layer, Layer)]
        for layer in layers:
            self._add_layer(decoder, layer)
        shape, cache = self._cache.shape, self._cache
        decoder.set_cache(
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            num_slots=shape.num_slots,
            capacity=shape.capacity,
            prompt_keys=cache.prompt_keys.data_ptr(),
            prompt_values=cache.prompt_values.data_ptr(),
            num_prompts=shape.num_prompts,
            prompt_capacity=shape.prompt_capacity,
            prompt_lengths=cache.prompt_lengths.data_ptr(),
        )
        self._tables = [
            layer.attn.table.upto(cache.num_positions, model.device) for layer in layers
        ]
        decoder.set_rotary([(c.data_ptr(), s.data_ptr(), c.shape[1]) for c, s in self._tables])
        return decoder

    def _add_layer(self, decoder: Any, layer: Layer) -> None:
        packed, attn, mlp = self._packed, layer.attn, layer.mlp
        decoder.add_layer(
            attn_norm=_norm(layer.attn_norm),
            mlp_norm=_norm(layer.mlp_norm),
            post_attn_norm=_norm(layer.post_attn_norm),
            post_mlp_norm=_norm(layer.post_mlp_norm),
            qkv=_linear(packed.of(attn.qkv_proj), attn.qkv_proj.bias),
            attn_out=_linear(packed.of(attn.o_proj), attn.o_proj.bias),
            gate_up=_linear(packed.of(mlp.gate_up_proj), mlp.gate_up_proj.bias),
            down=_linear(packed.of(mlp.down_proj), mlp.down_proj.bias),
            q_norm=_norm(attn.q_norm)[0],
            k_norm=_norm(attn.k_norm)[0],
            interleaved=attn.table.interleaved,
            window=attn.window or 0,
        )

    def admit(self, prompts: Sequence[NewPrompt], rows: Sequence[NewRow]) -> list[Tensor | None]:
        kept = self._prefill(prompts) if prompts else []
        self.rows.start(rows)
        return kept

    def _prefill(self, prompts: Sequence[NewPrompt]) -> list[Tensor | None]:
        token_ids, lengths = pack_prompts(prompts, self._model.device)
        sequences, positions = rows_and_offsets(lengths)
        items = torch.tensor([prompt.item for prompt in prompts], device="cpu")
        of_prompt = torch.tensor(lengths, device="cpu")
        self._cache.prompt_lengths[items] = of_prompt
        prompt_ids = items[sequences]
        is_last = positions + 1 == of_prompt[sequences]
        streams = kept_at = None
        if self._kept is not None:
            streams = self._kept.new_empty(len(token_ids), self._kept.shape[2])
            kept_at = torch.arange(len(token_ids), device="cpu")
        for first in range(0, len(token_ids), PASS_TOKENS):
            part = slice(first, first + PASS_TOKENS)
            last = is_last[part].nonzero().squeeze(1)
            hidden = self.rows.hidden.new_empty(len(last), self.rows.hidden.shape[1])
            self._decoder.prefill(
                num_rows=len(token_ids[part]),
                token_ids=token_ids[part].data_ptr(),
                positions=positions[part].data_ptr(),
                prompt_ids=prompt_ids[part].data_ptr(),
                wanted=last.data_ptr(),
                num_wanted=len(last),
                hidden=hidden.data_ptr(),
                kept_streams=native.address(streams),
                kept_at=0 if kept_at is None else kept_at[part].data_ptr(),
                num_threads=torch.get_num_threads(),
            )
            self.rows.prompt_hidden[prompt_ids[part][last]] = hidden
        if streams is None:
            return [None] * len(prompts)
        return list(streams.split(lengths))

    def run(self, max_steps: int, enough: int) -> list[Ended]:
        self._refuse_other_weights()
        rows, sampling = self.rows, self._options.sampling
        slots, lengths, ends = self._ended
        _, rows.num_rows, num_ended, self.num_flagged = self._decoder.decode(
            num_rows=rows.num_rows,
            slots=rows.slots.data_ptr(),
            prompt_ids=rows.prompt_ids.data_ptr(),
            lengths=rows.lengths.data_ptr(),
            limits=rows.limits.data_ptr(),
            request_ids=rows.request_ids.data_ptr(),
            hidden=rows.hidden.data_ptr(),
            token_ids=rows.token_ids.data_ptr(),
            logprobs=rows.logprobs.data_ptr(),
            truncated_logprobs=rows.truncated_logprobs.data_ptr(),
            ended_slots=slots.data_ptr(),
            ended_lengths=lengths.data_ptr(),
            ended_by=ends.data_ptr(),
            kept_streams=native.address(self._kept),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            is_stop=native.address(self._is_stop),
            is_flag=native.address(self._is_flag),
            max_steps=max_steps,
            enough=enough,
            num_threads=torch.get_num_threads(),
        )
        return [
            Ended(slot, length, End(end))
            for slot, length, end in self._ended[:, :num_ended].t().tolist()
        ]

    def _refuse_other_weights(self) -> None:
        """A rollout that is asked for its rest after a training step would be of two policies."""
        now = dict(self._model.named_parameters())
        for name, (parameter, address, version) in self._read.items():
            if (
                now.get(name) is not parameter
                or parameter.data_ptr() != address
                or _version(parameter) != version
            ):
                raise RuntimeError(
                    f"{name} changed while a rollout was under way: take all its completions first"
                )

    def keep(self, rows: Tensor) -> None:
        self.rows.keep(rows)

    def kept(self, slot: int, length: int) -> Tensor | None:
        return None if self._kept is None else self._kept[slot, :length].clone()


def _version(parameter: Tensor) -> int:
    """It grows when the tensor is written to; of one made in inference mode nothing is known."""
    return 0 if parameter.is_inference() else parameter._version


def _norm(norm: Norm | None) -> tuple[int, int]:
    if norm is None:
        return _NO_NORM
    return norm.weight.data_ptr(), native.address(norm.bias)


def _linear(weight: PackedWeight, bias: Tensor | None) -> tuple[int, int, int, int]:
    return weight.panels.data_ptr(), weight.num_outputs, weight.num_inputs, native.address(bias)
